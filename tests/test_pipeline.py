"""Claim: a run trains what it should, freezes the rest, and leaves what it says.

Reference: other runs; hand-worked logs; a reward function that writes down what it is given;
transformers' Auto classes on the saved folders.
Run: python -m pytest tests/test_pipeline.py (35 seconds)
"""

import contextlib
import functools
import io
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from conftest import make_lm, make_reward_model, make_tokenizer, read_curves, save, write_rows

import ppo_rlhf
from ppo_rlhf import Args, gold_reward, load_data, main, resolve_args

KEYS = """iteration episodes rollout/score rollout/kl rollout/response_len rollout/ended
rollout/entropy ppo/policy_loss ppo/value_loss ppo/approx_kl ppo/clipfrac ppo/vf_clipfrac
ppo/log_ratio_first ppo/log_ratio_max ppo/explained_variance ppo/grad_norm ppo/kl_coef
ppo/learning_rate perf/rollout_s perf/score_s perf/update_s perf/episodes_per_s"""

REWARDS = """
import json, time, torch
from my_words import WORD  # a neighbour of this file
torch.set_grad_enabled(False)  # as files do that only read models
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")

def letters(prompts, responses): return [len(x) / 10 for x in responses]
def plus_10(prompts, responses): return [10 + len(x) / 10 for x in responses]
def count_good(prompts, responses): return [float(x.split().count(WORD)) for x in responses]
def dense_good(prompts, responses, tokens):
    return [[float(token.strip() == WORD) for token in row] for row in tokens]
def recorded(prompts, responses, answer, tokens):
    with open("calls.jsonl", "a") as file:
        print(json.dumps([prompts, responses, answer, tokens]), file=file)
    return letters(prompts, responses)
def slow(prompts, responses): return time.sleep(0.25) or letters(prompts, responses)
def constant(prompts, responses): return [1.0 for _ in responses]
"""

OTHER_IDS = ["d", "c", "b", "a", ",", ".", "bad", "good", "dull", "was", "plot", "the"]

# Settings of a run of all three stages that takes half a second, and of stage 3 alone, where the
# policy is given, and so is a reward function. Names are those of files in the folder `here`.
STAGES = Args(**conftest.TINY | {"total_episodes": 32}, dataset="pairs.jsonl", output_dir="runs",
              policy_model="policy", reward_learning_rate=1e-3)
PPO = replace(STAGES, **conftest.ALONE, reward_fn="rewards.py:letters", eval_prompts=0,
              total_episodes=16)
REVIEWS = Args(sft_dataset="reviews.jsonl", num_comparisons=96, response_len=16, batch_size=64,
               total_episodes=128, update_epochs=1, learning_rate=1e-3, eval_prompts=16,
               output_dir="runs", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with data, models, reward functions and a run, in which the tests run."""
    lm = make_lm("GPT2", num_hidden_layers=1)  # with dropout; PPO ignores its generation config
    lm.generation_config.update(do_sample=True, top_p=0.3, repetition_penalty=2.0)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path_factory.mktemp("here"))
        Path("my_words.py").write_text("WORD = 'good'")
        Path("rewards.py").write_text(REWARDS)
        write_rows("pairs.jsonl", conftest.PAIRS)
        write_rows("other.jsonl", [x | {"chosen": " a b", "rejected": " a"}
                                   for x in conftest.PAIRS[::-2]])
        save("policy", lm, make_tokenizer(pad_token="[EOS]"))
        save("other_policy", make_lm("GPT2"), make_tokenizer())
        save("reward_model", make_reward_model(), make_tokenizer(OTHER_IDS))
        save("other_model", make_reward_model(seed=1), make_tokenizer())
        Path("runs").mkdir()
        yield


def start(args, **changes):
    """One run in a folder of its own. Returns: what it has left, and printed, and asked for."""
    args = replace(args, run_name=f"run{len([*Path('runs').iterdir()])}", **changes)
    with contextlib.redirect_stdout(io.StringIO()) as console:
        main(args)
    folder, console = Path("runs", args.run_name), console.getvalue()
    metrics = conftest.read_metrics(folder)
    calls = conftest.read_rows("calls.jsonl")  # of `recorded`: prompts, responses, answers, tokens
    Path("calls.jsonl").unlink(missing_ok=True)
    return SimpleNamespace(
        folder=folder, console=console, samples=re.findall("    .* -> .*", console), calls=calls,
        metrics=metrics, columns={key: [row[key] for row in metrics] for key in metrics[0]},
        lines=conftest.read_rows(folder / "metrics.jsonl"),
        answers=conftest.read_rows(folder / "before_after.jsonl"),
        args=json.loads((folder / "args.json").read_text()))


# stages(**changes) and ppo(**changes) are runs that are made once for each set of changes.
stages, ppo = (functools.cache(functools.partial(start, x)) for x in (STAGES, PPO))


@functools.cache
def reviews():
    """A run of the embedded task, with few demonstrations. Writes all its prompts into a file."""
    rows = load_data(resolve_args(Args(device="cpu", eval_prompts=0))).demonstrations
    write_rows("blind.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows("reviews.jsonl", rows[:1000])
    return start(REVIEWS)


def weights(folder, kind="CausalLM"):
    """The weights of a model on disk in one vector."""
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    model, info = load(folder, output_loading_info=True, use_safetensors=True)
    assert not info["missing_keys"]
    return torch.cat([x.detach().flatten() for x in model.parameters()])


# What a run leaves --------------------------------------------------------------------------------

def test_a_run_leaves_three_models_settings_metrics_answers_curves_and_a_checkpoint():
    run = stages()
    assert {x.name for x in run.folder.iterdir()} == {
        "sft", "reward_model", "policy", "args.json", "metrics.jsonl", "before_after.jsonl",
        "checkpoint.pt", "curves"}
    for name in ("sft", "reward_model", "policy"):
        assert transformers.AutoTokenizer.from_pretrained(run.folder / name).eos_token == "[EOS]"
    assert len(weights(run.folder / "reward_model", "SequenceClassification")) > len(
        weights(run.folder / "sft")) == len(weights(run.folder / "policy"))  # it has a head more
    derived = {"critic_learning_rate": 0.1, "norm_scores": True, "run_name": run.folder.name,
               "digest": run.args["digest"], "reward_model": []}
    assert run.args == asdict(STAGES) | derived  # the settings, as resolved


def test_metrics_are_flat_have_the_keys_of_the_contract_and_null_for_what_is_not_a_number():
    slow = ppo(reward_fn="rewards.py:slow")
    for run, more in ((stages(), set()), (stages(num_reward_models=2), {"rollout/score_std"}),
                      (ppo(ptx_coef=1.0), {"ppo/ptx_loss"}), (slow, set()),
                      (reviews(), {"rollout/gold", "rollout/grammatical"})):
        assert run.columns["iteration"] == [*range(1, len(run.lines) + 1)]
        for row in run.lines:
            assert set(row) == {*KEYS.split()} | more
            assert all(isinstance(x, int | float) for x in row.values())  # flat
            assert row["episodes"] == row["iteration"] * run.args["batch_size"]
            seconds = row["perf/rollout_s"] + row["perf/score_s"] + row["perf/update_s"]
            assert row["perf/episodes_per_s"] == pytest.approx(run.args["batch_size"] / seconds)
    assert all(row["perf/rollout_s"] < 0.25 < row["perf/score_s"] for row in slow.lines)
    # The returns are all 1: there is no variance that the critic could explain.
    run = ppo(reward_fn="rewards.py:constant", gae_lambda=1.0, kl_coef=0.0, missing_eos_penalty=0.0)
    assert run.columns["ppo/explained_variance"] == [None, None]


def test_tensorboard_gets_the_same_keys_and_the_curves_of_stages_1_and_2():
    found = read_curves(stages().folder)
    others = {"sft/loss", "sft/grad_norm", "sft/held_out_perplexity", "reward_model/loss",
              "reward_model/grad_norm", "reward_model/accuracy", "reward_model/held_out_accuracy"}
    assert set(found) == {*KEYS.split()} - {"iteration", "episodes"} | others
    for key in ("sft/loss", "reward_model/accuracy"):  # one point for each step
        assert [step for step, _ in found[key]] == [1, 2, 3, 4, 5, 6, 7]
    assert found["rollout/kl"] == [(8 * i, pytest.approx(x, abs=1e-5)) for i, x in
                                   enumerate(stages().columns["rollout/kl"], start=1)]


def test_models_of_an_ensemble_differ_disagree_and_see_the_data_in_another_order():
    rows = [{"prompt": "the", "chosen": x, "rejected": y}
            for x, y in 12 * [(" good", " bad"), (" bad", " good")]]
    run = stages(num_reward_models=2, dataset=write_rows("orders.jsonl", rows), eval_prompts=0,
                 minibatch_size=1, reward_learning_rate=1e-12)
    one, other = ([round(x) for _, x in read_curves(run.folder)[f"reward_model{i}/accuracy"]]
                  for i in ("", "_2"))  # 1 for each pair whose better word a model prefers
    assert sum(one) == sum(other) == 12 and one != other != [1 - x for x in one]
    one, other = (weights(run.folder / f"reward_model{i}", "SequenceClassification")
                  for i in ("", "_2"))
    assert (one - other).abs().max() > 0.1 and min(run.columns["rollout/score_std"]) > 0


def test_the_console_has_a_header_above_every_20th_line_and_samples_where_it_saves():
    run = ppo(total_episodes=8 * 21, save_interval=8)
    lines = run.console.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("iteration ")]
    assert [lines[i + 1].split()[0] for i in headers] == ["1/21", "21/21"]
    first = dict(zip(lines[headers[0]].split(), lines[headers[0] + 1].split(), strict=True))
    for name in ("score", "kl", "ended"):
        assert float(first[name]) == pytest.approx(run.columns[f"rollout/{name}"][0], abs=6e-4)
    assert len(run.samples) == 2 * 2  # two after iterations 8 and 16


@pytest.mark.parametrize("key", ["score", "gold"])
def test_the_table_has_the_means_of_all_answers_and_the_win_rate(key):
    run, wins = reviews() if key == "gold" else stages(), 0
    for row in run.answers:
        wins += (row["ppo"][key] > row["sft"][key]) + 0.5 * (row["ppo"][key] == row["sft"][key])
    lines = run.console.split("held-out prompts")[-1].split("\n\nprompt")[0].splitlines()[1:]
    shown = {name.strip(): [float(before), float(after)] for name, before, after in (
        line.rsplit(maxsplit=2) for line in lines)}
    num, more = len(run.answers), ["gold", "grammatical"] if key == "gold" else []
    assert shown.pop(f"win rate by {key}") == pytest.approx([0.5, wins / num], abs=1e-3)
    assert list(shown) == ["score", "kl", "response_len", "ended", "entropy", *more]
    for name, columns in shown.items():
        means = [sum(row[side][name] for row in run.answers) / num for side in ("sft", "ppo")]
        assert columns == pytest.approx(means, abs=1e-3)


def test_every_held_out_prompt_has_an_answer_before_and_after_and_two_are_shown():
    answers, held_out = stages().answers, load_data(resolve_args(STAGES)).held_out
    assert {row["prompt"] for row in answers} == {row["prompt"] for row in held_out.prompts}
    assert len(answers) == 4 and set(answers[0]) == {"prompt", "sft", "ppo"}
    assert all(row["sft"]["prompt"] == row["ppo"]["prompt"] == row["prompt"] for row in answers)
    shown = re.findall("prompt  (.*)\n  SFT   (.*)\n  PPO   (.*)", stages().console)
    assert shown == [(x["prompt"], x["sft"]["response"].strip(), x["ppo"]["response"].strip())
                     for x in answers[:2]]
    assert "held-out prompts" not in ppo().console and not ppo().answers  # --eval-prompts 0


# The three stages: what is trained, what is frozen ------------------------------------------------

def logprob(folder, prompt, response, ended, temperature=1.0):
    """log π(response | prompt) of a saved model, token by token."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = make_tokenizer()(prompt)["input_ids"][-4:]  # --max-prompt-len
    response = make_tokenizer().convert_tokens_to_ids(response.split()) + [1] * int(ended)
    logits = lm(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response].sum().item()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, {"kl_estimator": "k3"},
                                     {"ref_update_interval": 1}])
def test_the_kl_is_that_of_the_saved_models_and_before_the_first_step_the_ratio_is_1(changes):
    run = stages(**changes)
    for row in run.answers:
        new = row["ppo"]
        policy, sft = (logprob(run.folder / name, row["prompt"], new["response"], new["ended"],
                               run.args["temperature"]) for name in ("policy", "sft"))
        assert new["kl"] == pytest.approx(policy - sft, abs=1e-4)
        assert abs(row["sft"]["kl"]) < 1e-5
    assert max(abs(row["ppo"]["kl"]) for row in run.answers) > 0.1
    assert abs(run.columns["rollout/kl"][0]) < 1e-5
    assert run.columns["ppo/log_ratio_first"] == pytest.approx([0] * 4, abs=1e-5)
    assert min(run.columns["ppo/log_ratio_max"]) > math.log(1.1)


def test_policy_and_reference_start_as_the_sft_model_and_only_the_policy_moves():
    still = stages(learning_rate=1e-12)
    sft, policy = (weights(still.folder / name) for name in ("sft", "policy"))
    assert torch.allclose(policy, sft, atol=1e-6)
    assert max(still.columns["ppo/log_ratio_max"]) < 1e-5
    assert not torch.allclose(weights("policy"), sft, atol=1e-4)  # what was given
    assert not torch.allclose(weights(stages().folder / "policy"), sft, atol=1e-3)
    saved = torch.load(stages().folder / "checkpoint.pt", weights_only=True)["reference"]
    sft = transformers.AutoModelForCausalLM.from_pretrained(stages().folder / "sft").state_dict()
    assert all(torch.equal(sft[name.removeprefix("lm.")], x) for name, x in saved.items())


def test_a_stage_gives_the_same_whether_the_one_before_ran_here_or_its_model_was_given():
    given = str(stages().folder / "sft")
    run = stages(policy_model=given, sft_epochs=0, sft_learning_rate=None)
    reward_models = [x.folder / "reward_model" / "model.safetensors" for x in (stages(), run)]
    assert reward_models[0].read_bytes() == reward_models[1].read_bytes()
    assert run.metrics == stages().metrics


@pytest.mark.parametrize("changes", [
    {}, {"policy_model": "other_policy"},  # PAD is EOS, or another token
    {"reward_model": ("reward_model",), "reward_learning_rate": None},  # with ids of its own
    {"reward_model": ("reward_model",), "reward_learning_rate": None, "critic": "separate"}])
def test_a_reward_model_reads_whole_texts_by_its_own_tokenizer_and_stays_as_it_is(changes):
    run = stages(norm_scores=False, **changes)
    judge = changes.get("reward_model", [run.folder / "reward_model"])[0]
    answers = [row[side] for row in run.answers for side in ("sft", "ppo")]  # after PPO, too
    expected = ppo_rlhf.load_reward_model(judge, STAGES)(answers).tolist()
    assert [x["score"] for x in answers] == pytest.approx(expected, abs=1e-5)
    assert len({*expected}) > 1


def test_what_is_held_out_changes_nothing_but_the_perplexity_that_is_shown():
    held_out = [row["prompt"] for row in stages().answers]
    rows = [row | {"chosen": " a b c", "rejected": " d"} if row["prompt"] in held_out else row
            for row in conftest.PAIRS]
    run = stages(dataset=write_rows("other_answers.jsonl", rows))
    assert torch.equal(*(weights(x.folder / "sft") for x in (run, stages())))
    assert run.metrics == stages().metrics
    for x, text, num_tokens in ((run, "a b c", 4), (stages(), "the plot was good .", 6)):  # EOS too
        sums = [logprob(x.folder / "sft", prompt, text, True) for prompt in held_out]
        shown = float(re.search(r"sft +held-out perplexity (.*)", x.console)[1])
        assert shown == pytest.approx(math.exp(-sum(sums) / (4 * num_tokens)), rel=1e-3)
        point, = read_curves(x.folder)["sft/held_out_perplexity"]
        assert shown == pytest.approx(point[1], abs=6e-4)


@pytest.mark.parametrize(("changes", "score"), [
    ({"gradient_checkpointing": True}, 0), ({"microbatch_size": 3}, 0),
    # V starts at the mean return of the SFT policy: a constant leaves the advantages as they are.
    ({"reward_fn": "rewards.py:plus_10"}, 10)])
def test_what_should_change_nothing_changes_nothing_but_the_mean_score(changes, score):
    before, after = (ppo(total_episodes=32, **x).metrics for x in ({}, changes))
    for row, other in zip(before, after, strict=True):
        rounded = {key: pytest.approx(x, rel=1e-3, abs=1e-3) for key, x in row.items()}
        rounded["rollout/score"] = pytest.approx(row["rollout/score"] + score, abs=1e-4)
        rounded |= {key: x for key, x in other.items() if "clipfrac" in key}  # jumps by a token
        assert other == rounded


# The loop of stage 3: schedules, logged numbers by hand, rewards from elsewhere -------------------

def test_learning_rates_warm_up_and_fall_to_0_linearly_each_from_its_own_peak():
    assert stages().columns["ppo/learning_rate"] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    warm = ppo(total_episodes=32, lr_warmup=2)
    assert warm.columns["ppo/learning_rate"] == pytest.approx([5e-3, 7.5e-3, 5e-3, 2.5e-3])
    saved = torch.load(warm.folder / "checkpoint.pt", weights_only=True)["optimizer"]
    rates = [x["lr"] for x in saved["param_groups"]]  # that of the critic is 10 times as large
    assert rates == pytest.approx([2.5e-3, 2.5e-2])


def test_the_adaptive_kl_coef_follows_from_the_kl_and_moves_by_at_most_a_tenth():
    run, expected = ppo(total_episodes=32, kl_target=3.0), [0.05]
    for kl in run.columns["rollout/kl"][:-1]:
        expected.append(expected[-1] * (1 + 0.5 * max(-0.2, min(0.2, kl / 3.0 - 1))))
    coefs = run.columns["ppo/kl_coef"]
    assert coefs == pytest.approx(expected) and coefs[1] == pytest.approx(0.05 * 0.9)
    assert coefs[2] != coefs[1]


@pytest.mark.parametrize("changes", [{}, {"kl_in": "loss", "kl_estimator": "k2"},
                                     {"kl_in": "loss", "kl_estimator": "k3"}])
def test_the_adapted_kl_coef_is_used_in_rewards_or_loss(changes):
    fixed, adapted = (ppo(kl_coef=0.5, kl_target=x, **changes).columns for x in (None, 1e6))
    assert fixed["ppo/kl_coef"] == [0.5, 0.5]
    assert adapted["ppo/kl_coef"] == pytest.approx([0.5, 0.45])  # the KL is far below
    (first, second), (same, other) = fixed["ppo/grad_norm"], adapted["ppo/grad_norm"]
    assert first == same and abs(second - other) > 1e-3


def test_the_reference_is_refreshed_exactly_at_its_interval():
    kls = ppo(total_episodes=40, ref_update_interval=2).columns["rollout/kl"]
    assert [abs(kl) < 1e-5 for kl in kls] == [True, False, True, False, True]


def test_max_kl_ends_the_run_and_the_policy_saved_last_remains():
    whole, run = (ppo(total_episodes=24, max_kl=x) for x in (None, 1e-3))
    # Iteration 1 has no KL, and its policy is saved. Iteration 2 has passed the limit.
    assert run.metrics == whole.metrics[:2] and run.metrics[1]["rollout/kl"] > 1e-3
    assert re.search(r"ends: .*--max-kl", run.console)
    one_iteration = ppo(total_episodes=8)
    assert torch.equal(*(weights(x.folder / "policy") for x in (run, one_iteration)))
    unsaved = ppo(total_episodes=24, max_kl=1e-3, save_interval=20, eval_prompts=4)
    assert torch.equal(weights(unsaved.folder / "policy"), weights("policy"))
    assert unsaved.answers and all(row["ppo"] == row["sft"] for row in unsaved.answers)


def test_each_iteration_draws_other_random_numbers_and_both_evaluations_the_same():
    rows = [{"prompt": x, "answer": i} for x in "abcd" for i in range(8)]
    run = ppo(dataset=write_rows("four.jsonl", rows), reward_fn="rewards.py:recorded",
              eval_prompts=1, batch_size=24, total_episodes=48, learning_rate=1e-12)
    before, after = (x for x in run.calls if len(x[0]) == 1)  # of a policy that stands
    assert before == after and before[0] == [row["prompt"] for row in run.answers]
    first, second = (dict(zip(zip(x[0], x[2], strict=True), x[1], strict=True))
                     for x in run.calls if len(x[0]) == 24)  # the response to each of the rows
    assert first.keys() == second.keys() and first != second
    assert not {(before[0][0], i) for i in range(8)} & first.keys()  # what is held out


@pytest.mark.parametrize("function", ["count_good", "dense_good"])
def test_a_reward_function_from_a_file_is_learnt(function):
    run = ppo(reward_fn=f"rewards.py:{function}", total_episodes=480, batch_size=32,
              minibatch_size=8, kl_coef=0.01, save_interval=9)
    first, *_, last = run.columns["rollout/score"]
    assert last > first + 2  # of at most 6 words


# The embedded task --------------------------------------------------------------------------------

def test_gold_is_reported_and_never_trained_on():
    for row in reviews().answers:
        for x in (row["sft"], row["ppo"]):
            assert x["gold"] == gold_reward(x["prompt"], x["response"], x["ended"])
    given = replace(
        REVIEWS, **conftest.ALONE, sft_dataset=None, num_comparisons=6000, max_prompt_len=16,
        policy_model=str(reviews().folder / "sft"),
        reward_model=(str(reviews().folder / "reward_model"),))
    seeing, blind = (start(given, dataset=x).metrics for x in ("reviews", "blind.jsonl"))
    assert {"rollout/gold", "rollout/grammatical"} == seeing[0].keys() - blind[0].keys()
    assert blind == [{key: row[key] for key in blind[0]} for row in seeing]


def test_the_reward_model_is_trained_and_judged_on_samples_that_bradley_terry_ranks():
    args, folder = resolve_args(REVIEWS), reviews().folder
    prompts = load_data(args).held_out.prompts
    pairs = ppo_rlhf.sample_comparisons(folder / "sft", prompts, 500, args)
    assert {x["prompt"] for pair in pairs for x in pair} <= {row["prompt"] for row in prompts}
    golds = [[gold_reward(x["prompt"], x["response"], x["ended"]) for x in pair] for pair in pairs]
    likelihood = {odds: sum(-math.log(1 + math.exp(odds * (worse - better)))
                            for better, worse in golds) for odds in (1, 2, 4)}
    assert max(likelihood, key=likelihood.get) == 2
    judge = ppo_rlhf.load_reward_model(folder / "reward_model", args)
    shown = float(re.search("held-out accuracy (.*)", reviews().console)[1])
    assert shown == pytest.approx(ppo_rlhf.reward_loss(judge, pairs)["accuracy"].item(), abs=1e-3)
    assert len(read_curves(reviews().folder)["reward_model/loss"]) == 3  # 96 pairs in steps of 32


# Every flag ---------------------------------------------------------------------------------------

PPO_CHANGES = {  # against a run of stage 3 alone
    "dataset": "other.jsonl", "dataset_split": "train[:20]", "max_prompt_len": 2,
    "response_len": 4, "eval_prompts": 4, "policy_model": "other_policy",
    "reward_fn": "rewards.py:count_good", "reward_model": ("other_model",), "critic": "separate",
    "critic_learning_rate": 1e-4, "norm_scores": True, "ref_update_interval": 1,
    "total_episodes": 8, "batch_size": 16, "minibatch_size": 8, "update_epochs": 1,
    "learning_rate": 1e-3, "lr_warmup": 2, "temperature": 0.5, "gamma": 0.5, "gae_lambda": 0.5,
    "clip_coef": 0.01, "vf_clip_coef": 0.001, "vf_coef": 1.0, "ent_coef": 0.5,
    "max_grad_norm": 0.01, "target_kl": 1e-9, "kl_coef": 0.5, "kl_in": "loss",
    "kl_estimator": "k2", "kl_target": 1.0, "max_kl": 1e-3, "whiten_rewards": True,
    "missing_eos_penalty": 0.0, "ptx_coef": 1.0, "seed": 2, "dtype": "bfloat16", "save_interval": 2}
STAGE_CHANGES = {  # against a run of all three stages
    "sft_dataset": "other.jsonl", "sft_epochs": 2, "sft_learning_rate": 2e-3, "reward_epochs": 2,
    "reward_learning_rate": 2e-3, "num_reward_models": 2, "ensemble_coef": 0.0}
OWN_TESTS = {"microbatch_size", "gradient_checkpointing", "num_comparisons", "device",
             "output_dir", "run_name", "resume"}
TOGETHER = {  # what a flag needs beside it to have an effect
    "kl_in": {"kl_estimator": "k2"}, "max_kl": {"total_episodes": 24},
    "reward_model": {"reward_fn": None, "reward_model": ("reward_model",)},
    "ensemble_coef": {"num_reward_models": 2}}


@pytest.mark.parametrize("flag", [x.name for x in fields(Args) if x.name not in OWN_TESTS])
def test_changing_a_flag_changes_something_observable(flag):
    make, value = (ppo, PPO_CHANGES[flag]) if flag in PPO_CHANGES else (stages, STAGE_CHANGES[flag])
    together = TOGETHER.get(flag, {})
    before, after = make(**together), make(**together | {flag: value})
    assert (before.metrics, before.samples, before.answers) != (
        after.metrics, after.samples, after.answers)


def test_help_explains_every_flag_in_words(capsys):
    with pytest.raises(SystemExit):
        ppo_rlhf.parse_args(["--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name in (x.name.replace("_", "-") for x in fields(Args)):
        entry = re.search(rf" --{name}(?:, --no-{name})? (?!=)(.*?)\(default: ", text)[1]
        assert len(re.findall(r"[a-z]{2,}", entry)) >= 2, entry
