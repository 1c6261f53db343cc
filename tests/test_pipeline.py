"""Claim: a run is reproducible, trains what it should, freezes the rest, and leaves what it says.

Reference: other runs; hand-worked logs; a reward function that writes down what it is given;
transformers' Auto classes on the saved folders.
Run: python -m pytest tests/test_pipeline.py (60 seconds)
"""

import contextlib
import functools
import io
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, make_lm, make_reward_model, make_tokenizer, read_metrics, save
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from ppo_rlhf import (
    Args,
    RewardFunction,
    RunLog,
    Score,
    gold_reward,
    load_data,
    load_policy,
    main,
    prompt_batch,
    resolve_args,
    reward_loss,
    train_ppo,
    train_reward_models,
)

METRIC_KEYS = """rollout/score_mean rollout/score_std rollout/score_len_corr rollout/kl
rollout/rewards_mean rollout/response_len rollout/eos_share rollout/entropy rollout/distinct_2
ppo/policy_loss ppo/value_loss ppo/entropy ppo/approx_kl ppo/clipfrac ppo/vf_clipfrac
ppo/ratio_first ppo/ratio_max ppo/explained_variance ppo/grad_norm ppo/kl_coef ppo/learning_rate
perf/episodes_per_s perf/rollout_s perf/score_s perf/update_s"""
KEYS = set(METRIC_KEYS.split())
EVAL_KEYS = {x.replace("rollout/", "eval/") for x in KEYS if x.startswith("rollout/")}
EVAL_KEYS = EVAL_KEYS - {"eval/rewards_mean"} | {"eval/perplexity"}

REWARDS = '''
import json
import time
from pathlib import Path

from my_words import WORD  # a neighbour of this file


def letters(prompts, responses):
    return [len(x) / 10 for x in responses]

def letters_plus_10(prompts, responses):
    return [10 + x for x in letters(prompts, responses)]

def letters_times_10(prompts, responses):
    return [10 * x for x in letters(prompts, responses)]

def letters_minus_10(prompts, responses):
    return [x - 10 for x in letters(prompts, responses)]

def count_good(prompts, responses):
    return [float(x.split().count(WORD)) for x in responses]

def dense_good(prompts, responses, tokens):
    return [[float(token == WORD) for token in row] for row in tokens]

def recorded(prompts, responses, answer, tokens):
    with open(Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps([prompts, responses, answer, tokens]) + "\\n")
    return letters(prompts, responses)

def slow(prompts, responses):
    time.sleep(0.5)
    return letters(prompts, responses)

def raises(prompts, responses):
    return [1 / 0 for _ in responses]

def wrong_count(prompts, responses):
    return [1.0]

def wrong_type(prompts, responses):
    return ["high" for _ in responses]

def not_a_number(prompts, responses):
    return [float("nan") for _ in responses]

def asks_for_more(prompts, responses, colour):
    return colour

def too_large(prompts, responses):
    return [3e38 * (i % 2) for i in range(len(responses))]
'''


def write_rows(path, rows):
    """A jsonl file. Returns: its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_text(path, text):
    """A file. Returns: its name."""
    path.write_text(text)
    return str(path)


def read_rows(path):
    """The rows of a jsonl file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def places(folder, pairs_file):
    """Data, models and reward functions on disk, by name."""
    lm = make_lm("GPT2", n_layer=1)  # with dropout, and a generation config that PPO must ignore
    lm.generation_config.update(do_sample=True, top_p=0.3, repetition_penalty=2.0)
    pairs = [row | {"answer": i} for i, row in enumerate(read_rows(Path(pairs_file)))]
    (folder / "my_words.py").write_text("WORD = 'good'\n")
    (folder / "my_rewards.py").write_text(REWARDS)
    return {
        "pairs": write_rows(folder / "with_answers.jsonl", pairs),
        "fewer_pairs": write_rows(folder / "fewer.jsonl", pairs[::-2]),
        "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": x} for x in WORDS]),
        "texts": write_rows(folder / "texts.jsonl", [{"text": "a b c d"}] * 20),
        "other_columns": write_rows(folder / "columns.jsonl", [{"question": "a", "reply": "b"}]),
        "unusable": write_rows(folder / "unusable.jsonl", [{"prompt": None, "chosen": None}]),
        "broken_line": write_text(folder / "line.jsonl", json.dumps(pairs[0]) + "\n" +
                                  json.dumps(pairs[1]) + '\n{"prompt": "a", "chos\n'),
        "bytes": write_text(folder / "bytes.parquet", "PAR1 and no more"),
        "broken_file": write_text(folder / "broken.py", "def f(prompts, responses:\n"),
        "empty": write_rows(folder / "empty.jsonl", []),
        "policy": save(folder / "one_layer", lm, make_tokenizer()),
        "other_policy": save(folder / "two_layers", make_lm("GPT2"), make_tokenizer()),
        "reward_model": save(folder / "reward", make_reward_model(), make_tokenizer()),
        "other_reward_model": save(folder / "reward2", make_reward_model(seed=1), make_tokenizer()),
        "two_outputs": save(folder / "two", make_reward_model(num_labels=2), make_tokenizer()),
        "no_eos": save(folder / "no_eos", make_lm(), make_tokenizer(eos_token=None)),
        "more_tokens": save(folder / "more", make_lm(vocab_size=12), make_tokenizer()),
        "rewards": str(folder / "my_rewards.py"),
        "runs": str(folder / "runs"),
    }


@pytest.fixture(scope="session")
def args(places):
    """Settings of a run of all three stages that takes a second."""
    return Args(
        dataset=places["pairs"], policy_model=places["policy"], output_dir=places["runs"],
        total_episodes=16, batch_size=8, minibatch_size=4, update_epochs=2, response_len=6,
        max_prompt_len=4, eval_prompts=4, learning_rate=1e-2, sft_learning_rate=1e-3,
        reward_learning_rate=1e-3, save_interval=1, device="cpu")


@pytest.fixture(scope="session")
def ppo_args(args, places):
    """Settings of stage 3 alone: the policy is given, and so is a reward function."""
    return replace(args, sft_epochs=0, reward_fn=f"{places['rewards']}:letters", eval_prompts=0)


numbers = itertools.count()


def start(args, **changes):
    """One run in a folder of its own. Returns: what it has left and what it has printed."""
    args = replace(args, run_name=f"run{next(numbers)}", **changes)
    with contextlib.redirect_stdout(io.StringIO()) as console:
        main(args)
    folder = Path(args.output_dir, args.run_name)
    return SimpleNamespace(
        folder=folder, console=console.getvalue(), metrics=read_metrics(args),
        samples=read_rows(folder / "samples.jsonl"),
        answers=read_rows(folder / "before_after.jsonl"),
        args=json.loads((folder / "args.json").read_text()))


@pytest.fixture(scope="session")
def runs(args):
    """runs(**changes): a run of all three stages, made once for each set of changes."""
    return functools.cache(functools.partial(start, args))


@pytest.fixture(scope="session")
def ppo_runs(ppo_args):
    """ppo_runs(**changes): a run of stage 3 alone, made once for each set of changes."""
    return functools.cache(functools.partial(start, ppo_args))


@pytest.fixture(scope="session")
def full(runs):
    """One run of all three stages with 4 iterations and 2 evaluations between them."""
    return runs(total_episodes=32, eval_interval=2)


def column(run, key):
    """One metric of a run, over its iterations."""
    return [row[key] for row in run.metrics]


def logs_alike(run, other):
    """Whether two runs have logged the same up to rounding; clip fractions may jump by a token."""
    exact, rounded = ([{key: x for key, x in row.items() if "clipfrac" not in key}
                       for row in each.metrics] for each in (run, other))
    return exact == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in rounded]


def curves(run):
    """The values of all curves of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder)).Reload()
    return {key: [x.value for x in events.Scalars(key)] for key in events.Tags()["scalars"]}


def weights(folder):
    """The weights of a saved model in one vector."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([x.detach().flatten() for x in model.parameters()])


# What a run leaves --------------------------------------------------------------------------------


def test_a_run_leaves_three_models_settings_metrics_samples_answers_and_curves(full):
    names = {x.name.split(".tfevents")[0] for x in full.folder.iterdir()}
    assert names == {"sft", "reward_model", "policy", "args.json", "metrics.jsonl",
                     "samples.jsonl", "before_after.jsonl", "events.out", "checkpoint.pt"}
    assert column(full, "iteration") == [1, 2, 3, 4]
    assert column(full, "episodes") == [8, 16, 24, 32]
    assert len(full.samples) == 4 * 2 and len(full.answers) == 4


def test_metrics_have_the_keys_of_the_contract_and_a_time(full):
    rows = read_rows(full.folder / "metrics.jsonl")
    assert set(rows[0]) == KEYS | {"iteration", "episodes", "wall_time"}
    times = [row["wall_time"] for row in rows]
    assert times == sorted(times)


def test_an_ensemble_leaves_a_model_each_that_differ_and_reports_its_disagreement(runs):
    run = runs(num_reward_models=2)
    for row in run.metrics:
        assert row["rollout/score_disagreement"] > 0
    one, other = (AutoModelForSequenceClassification.from_pretrained(run.folder / name)
                  for name in ("reward_model", "reward_model_2"))
    assert (one.score.weight - other.score.weight).abs().max() > 0.1
    evaluated = runs(num_reward_models=2, total_episodes=32, eval_interval=2)
    assert evaluated.metrics[1]["eval/score_disagreement"] > 0
    assert {"reward_model/loss", "reward_model_2/loss"} <= set(curves(run))


def test_the_members_of_an_ensemble_see_the_data_in_another_order(runs, folder):
    # A pair of equal texts has no gradient, whatever the model: with steps of one pair, the steps
    # without gradient show where those pairs stand in the order.
    rows = [{"prompt": x, "chosen": "good", "rejected": y} for x in WORDS for y in ("good", "bad")]
    run = runs(num_reward_models=2, dataset=write_rows(folder / "half_equal.jsonl", rows),
               minibatch_size=1, batch_size=2, total_episodes=2, update_epochs=1, eval_prompts=0)
    one, other = ([x < 1e-6 for x in curves(run)[f"{name}/grad_norm"]]
                  for name in ("reward_model", "reward_model_2"))
    assert sum(one) == sum(other) == len(one) / 2 and one != other


def test_ptx_adds_one_key_to_the_metrics(ppo_runs):
    keys = {*ppo_runs(ptx_coef=1.0).metrics[0]}
    assert keys == {*ppo_runs().metrics[0], "ppo/ptx_loss"}


def test_eval_interval_writes_evaluations_into_the_rows_of_their_iterations(full):
    found = [{key for key in row if key.startswith("eval/")} for row in full.metrics]
    assert found == [set(), EVAL_KEYS, set(), EVAL_KEYS]


def test_tensorboard_gets_the_same_keys_and_the_curves_of_stages_1_and_2(full):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(full.folder)).Reload()
    stages = {"sft/loss", "sft/grad_norm", "sft/held_out_perplexity", "reward_model/loss",
              "reward_model/grad_norm", "reward_model/accuracy", "reward_model/held_out_accuracy"}
    tags = set(events.Tags()["scalars"])
    assert {x for x in tags if not x.startswith(("sft/", "reward_model/"))} == KEYS | EVAL_KEYS
    assert tags > stages
    for key in ("sft/loss", "reward_model/accuracy"):  # a curve, one point for each step
        assert [x.step for x in events.Scalars(key)] == [1, 2, 3, 4, 5, 6, 7]
    assert [x.step for x in events.Scalars("rollout/kl")] == [8, 16, 24, 32]
    assert [x.step for x in events.Scalars("eval/kl")] == [16, 32]
    texts = [x.tensor_proto.string_val[0].decode() for x in events.Tensors("samples/text_summary")]
    shown = [str(x["response"]) for x in full.samples]
    assert all(shown[2 * i] in x and shown[2 * i + 1] in x for i, x in enumerate(texts))
    assert [x.value for x in events.Scalars("rollout/kl")] == pytest.approx(
        column(full, "rollout/kl"), abs=1e-5)


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(full, args):
    again = start(args, total_episodes=32, eval_interval=2)
    assert (again.metrics, again.samples, again.answers) == (
        full.metrics, full.samples, full.answers)
    assert start(args, total_episodes=32, eval_interval=2, seed=2).metrics != full.metrics


def test_args_json_holds_all_settings_as_resolved(full, args):
    given = {name: value for name, value in asdict(args).items() if value is not None}
    given |= {"total_episodes": 32, "eval_interval": 2, "run_name": full.folder.name}
    derived = {"critic_learning_rate": 0.1, "adam_eps": 1e-8, "microbatch_size": 4,
               "score_norm": "sft"}
    expected = dict.fromkeys(asdict(args)) | given | derived
    assert full.args == json.loads(json.dumps(expected))  # tuples become lists


def test_the_console_names_the_settings_that_were_derived(full):
    shown = json.loads(re.search(r"settings +(\{.*\})", full.console)[1])
    assert shown.items() <= full.args.items()
    assert shown.keys() >= {"critic_learning_rate", "adam_eps", "microbatch_size", "score_norm"}


def test_stages_whose_models_are_given_leave_no_folders(ppo_runs):
    names = {x.name for x in ppo_runs().folder.iterdir()}
    assert "policy" in names and not names & {"sft", "reward_model"}


def test_generate_of_the_saved_policy_samples_without_top_p_and_penalties(full):
    config = GenerationConfig.from_pretrained(full.folder / "policy")
    assert config.do_sample and config.top_p == 1.0 and config.top_k == 0
    assert config.repetition_penalty in (None, 1.0) and config.suppress_tokens == [0]


def test_the_times_are_those_of_their_parts(ppo_args, places):
    run = start(ppo_args, reward_fn=f"{places['rewards']}:slow")
    rows = read_rows(run.folder / "metrics.jsonl")
    assert min(row["perf/score_s"] for row in rows) > 0.5
    assert min(row["perf/rollout_s"] for row in rows) < 0.5
    for row in rows:
        seconds = row["perf/rollout_s"] + row["perf/score_s"] + row["perf/update_s"]
        assert row["perf/episodes_per_s"] == pytest.approx(8 / seconds)


def test_without_held_out_prompts_there_is_no_table(ppo_runs):
    run = ppo_runs(eval_interval=1)
    assert "held-out prompts" not in run.console and not run.answers
    assert not (run.folder / "before_after.jsonl").exists()
    assert run.metrics == ppo_runs().metrics  # an evaluation of no prompts adds no key


def test_samples_are_written_and_shown_at_the_save_interval(ppo_runs):
    run = ppo_runs(total_episodes=24, save_interval=2)
    assert [x["iteration"] for x in run.samples] == [2, 2]
    for x in run.samples:
        assert f"{x['prompt']!r} -> {x['response']!r}" in run.console


def test_the_total_of_a_sample_is_its_score_minus_the_weighted_kl(ppo_runs):
    run = ppo_runs(missing_eos_penalty=0.0, kl_coef=0.5, total_episodes=32)
    for x in run.samples:
        assert x["total"] == pytest.approx(x["score"] - 0.5 * x["kl"], abs=1e-4)
    assert max(abs(x["kl"]) for x in run.samples) > 0.01


def test_a_script_prints_only_what_is_ours(args, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(args).items()
             if value not in (None, True, False, ())]
    script = Path(sys.modules["ppo_rlhf"].__file__)
    ended = subprocess.run([sys.executable, str(script), *flags, "--run-name=script"],
                           cwd=tmp_path, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    bars = re.split(r"[\r\n]+", ended.stderr.strip())
    assert all(line.startswith(("sft:", "reward_model:")) for line in bars), ended.stderr
    assert not re.search(r"it/s|Warning|shards|Loading|Generating", ended.stdout)


# The three stages: what is trained, what is frozen ------------------------------------------------


def logprob(folder, prompt, answer, temperature=1.0):
    """log π(answer | prompt) of a saved model, token by token; PAD has probability 0."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    ids = tokenizer(prompt)["input_ids"][-4:]  # --max-prompt-len
    response = tokenizer.convert_tokens_to_ids(answer["response"].split())
    response = torch.tensor([*response, 1] if answer["ended"] else response)
    logits = lm(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1] / temperature
    logits[:, 0] = -1e30
    return logits.log_softmax(-1)[range(len(response)), response].sum().item()


@pytest.mark.parametrize(("temperature", "estimator"), [(1.0, "k1"), (0.7, "k1"), (1.0, "k3")])
def test_the_kl_of_an_answer_is_that_of_the_saved_policy_to_the_saved_sft_model(
    runs, temperature, estimator
):
    run = runs(total_episodes=32, eval_interval=2, temperature=temperature, kl_estimator=estimator)
    for row in run.answers:
        policy, sft = (logprob(run.folder / name, row["prompt"], row["ppo"], temperature)
                       for name in ("policy", "sft"))
        assert row["ppo"]["kl"] == pytest.approx(policy - sft, abs=1e-4)
        assert abs(row["sft"]["kl"]) < 1e-5
    assert max(abs(row["ppo"]["kl"]) for row in run.answers) > 0.1


def test_the_reference_is_the_sft_model_and_stays_it(full):
    # That the reference is frozen and shares no weight with the policy shows in the KL that grows.
    assert abs(column(full, "rollout/kl")[0]) < 1e-5 < column(full, "rollout/kl")[-1] - 0.1


def test_the_policy_of_ppo_starts_from_the_sft_model_and_not_from_the_given_one(runs, places):
    run = runs(learning_rate=1e-12)
    sft = weights(run.folder / "sft")
    assert torch.allclose(weights(run.folder / "policy"), sft, atol=1e-6)
    assert not torch.allclose(weights(places["policy"]), sft, atol=1e-4)


def test_a_stage_gives_the_same_whether_the_one_before_ran_here_or_its_model_was_given(full, runs):
    sft = str(full.folder / "sft")
    run = runs(policy_model=sft, sft_epochs=0, total_episodes=32, eval_interval=2)
    reward_models = [x.folder / "reward_model" / "model.safetensors" for x in (full, run)]
    assert reward_models[0].read_bytes() == reward_models[1].read_bytes()
    assert run.metrics == full.metrics


def test_ppo_moves_the_policy(full):
    policy, sft = (weights(full.folder / name) for name in ("policy", "sft"))
    assert (policy - sft).abs().max() > 1e-3


@pytest.mark.parametrize("pad_token", ["[PAD]", "[EOS]"])
def test_the_saved_reward_model_gives_the_scores_of_all_answers(args, tmp_path, pad_token):
    policy = save(tmp_path / "given", make_lm("GPT2"), make_tokenizer(pad_token=pad_token))
    run = start(args, policy_model=policy, score_norm="none")
    for row in run.answers:  # those of after PPO too: the reward model has not moved since
        for answer in (row["sft"], row["ppo"]):
            expected = read_score(run.folder / "reward_model", row["prompt"], answer)
            assert answer["score"] == pytest.approx(expected, abs=1e-5)


def read_score(folder, prompt, answer):
    """The score of prompt and answer, by transformers, with one EOS behind what has ended."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"{prompt} {answer['response']}"
    ids = [x for x in tokenizer(text)["input_ids"] if x != tokenizer.eos_token_id]
    ids = [*ids, tokenizer.eos_token_id] if answer["ended"] else ids
    return model(torch.tensor([ids])).logits[0, 0].item()


def test_ratio_first_is_one_in_every_iteration_at_any_temperature(runs, full):
    for run in (full, runs(total_episodes=32, eval_interval=2, temperature=0.7)):
        assert column(run, "ppo/ratio_first") == pytest.approx([1] * 4, abs=1e-5)


def test_the_critic_learns_at_its_own_rate(ppo_runs):
    slow_critic = ppo_runs(critic_learning_rate=1e-12)
    slow_policy = ppo_runs(learning_rate=1e-12, critic_learning_rate=1e-1)
    # A critic that is 0 everywhere explains nothing, and a policy that stands has no KL.
    assert column(slow_critic, "ppo/explained_variance") == pytest.approx([0, 0], abs=1e-6)
    assert column(slow_policy, "rollout/kl") == pytest.approx([0, 0], abs=1e-5)
    assert abs(column(slow_policy, "ppo/explained_variance")[1]) > 1e-3
    assert column(slow_critic, "rollout/kl")[1] > 1e-2


def test_a_reward_that_is_not_finite_stops_ppo_with_stage_step_and_quantity(args, places):
    run = replace(args, reward_fn=f"{places['rewards']}:too_large", score_norm="none",
                  run_name="too_large")
    with pytest.raises(FloatingPointError, match=r"^ppo iteration 1 step 1: \w*loss is (nan|inf)"):
        main(run)
    folder = Path(run.output_dir, run.run_name)
    assert torch.equal(weights(folder / "policy"), weights(folder / "sft"))  # both are intact


def test_a_loss_that_is_not_finite_stops_stage_1_before_it_saves_a_model(args):
    with pytest.raises(FloatingPointError, match=r"^sft step 2: loss is (nan|inf)"):
        main(replace(args, sft_learning_rate=1e30, run_name="diverged"))
    assert not Path(args.output_dir, "diverged", "sft").exists()


def test_gradient_checkpointing_changes_no_result(full, args):
    run = start(args, total_episodes=32, eval_interval=2, gradient_checkpointing=True)
    assert logs_alike(run, full)


def test_microbatches_change_the_plan_and_no_result(full, runs):
    run = runs(total_episodes=32, eval_interval=2, microbatch_size=3)
    assert "microbatches of 3" in run.console and "microbatches of 4" in full.console
    assert logs_alike(run, full)


# The loop of stage 3: schedules, logged numbers by hand -------------------------------------------


def test_the_plan_says_how_episodes_are_divided(full):
    assert re.search(r"plan .*4 iterations x 8 responses.* 2 epochs x 2 steps of 4.* microbatches "
                     "of 4", full.console)


def test_an_iteration_takes_the_next_rows_of_a_shuffled_pass_over_all():
    rows = [{"prompt": x} for x in "abcdef"]
    batches = [prompt_batch(rows, i, 4, seed=1) for i in (1, 2, 3)]  # 12 rows: two passes
    flat = [row["prompt"] for batch in batches for row in batch]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list("abcdef") and flat[:6] != flat[6:]


def test_a_batch_may_be_larger_than_the_data():
    flat = [row["prompt"] for row in prompt_batch([{"prompt": "a"}, {"prompt": "b"}], 1, 6, seed=1)]
    assert sorted(flat) == list("aaabbb")


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [1e-2, 7.5e-3, 5e-3, 2.5e-3]),
    ({"lr_warmup": 2}, [5e-3, 7.5e-3, 5e-3, 2.5e-3]),
    ({"lr_warmup": 2, "anneal_lr": False}, [5e-3, 1e-2, 1e-2, 1e-2]),
])
def test_the_learning_rate_of_the_log_warms_up_and_falls_to_0(ppo_runs, settings, expected):
    run = ppo_runs(total_episodes=32, **settings)
    assert column(run, "ppo/learning_rate") == pytest.approx(expected)


def test_the_adaptive_kl_coef_follows_from_the_kl_of_the_iteration_before(ppo_runs):
    run = ppo_runs(total_episodes=32, kl_target=3.0, kl_horizon=40)
    coefs, kls = column(run, "ppo/kl_coef"), column(run, "rollout/kl")
    expected = [0.05]
    for kl in kls[:-1]:  # 8 episodes of a horizon of 40
        expected.append(expected[-1] * (1 + max(-0.2, min(0.2, kl / 3.0 - 1)) * 8 / 40))
    assert coefs == pytest.approx(expected) and coefs[1] == pytest.approx(0.05 * 0.96)
    assert coefs[2] != coefs[1]


def test_the_adapted_kl_coef_is_used_in_the_rewards(ppo_runs):
    run = ppo_runs(total_episodes=32, kl_target=1e6, kl_horizon=8, missing_eos_penalty=0.0)
    coefs = column(run, "ppo/kl_coef")  # KL far below its target: each time a fifth less
    assert coefs == pytest.approx([0.05, 0.04, 0.032, 0.0256])
    for x in run.samples:
        expected = x["score"] - coefs[x["iteration"] - 1] * x["kl"]
        assert x["total"] == pytest.approx(expected, abs=1e-4)


def test_the_adapted_kl_coef_is_used_in_the_loss(ppo_runs):
    in_loss = {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.5}
    fixed, adapted = ppo_runs(**in_loss), ppo_runs(**in_loss, kl_target=1e6, kl_horizon=8)
    assert column(fixed, "ppo/kl_coef") == [0.5, 0.5]
    assert column(adapted, "ppo/kl_coef") == pytest.approx([0.5, 0.4])
    first, second = zip(column(fixed, "ppo/grad_norm"), column(adapted, "ppo/grad_norm"),
                        strict=True)
    assert first[0] == first[1] and abs(second[0] - second[1]) > 1e-3


def test_the_reference_is_refreshed_exactly_at_its_interval(ppo_runs):
    kls = column(ppo_runs(total_episodes=40, ref_update_interval=2), "rollout/kl")
    assert [abs(kl) < 1e-5 for kl in kls] == [True, False, True, False, True]


def test_max_kl_ends_the_run_with_the_last_policy_saved_before(ppo_runs):
    whole = ppo_runs(total_episodes=24, anneal_lr=False)
    run = ppo_runs(total_episodes=24, anneal_lr=False, max_kl=1e-3)
    # Iteration 1 has no KL, and its policy is saved. Iteration 2 has passed the limit.
    assert run.metrics == whole.metrics[:2] and run.metrics[1]["rollout/kl"] > 1e-3
    one_iteration = ppo_runs(total_episodes=8, anneal_lr=False)
    assert torch.equal(*(weights(x.folder / "policy") for x in (run, one_iteration)))
    assert re.search(r"ends: .*--max-kl", run.console)


def test_after_max_kl_the_table_is_about_the_saved_policy(ppo_runs, places):
    run = ppo_runs(total_episodes=24, max_kl=1e-3, save_interval=20, eval_prompts=4)
    assert torch.equal(weights(run.folder / "policy"), weights(places["policy"]))
    assert all(row["ppo"] == row["sft"] for row in run.answers)


def test_each_iteration_draws_random_numbers_of_its_own(tmp_path, ppo_args, recorder):
    rows = [{"prompt": "the", "answer": i} for i in range(8)]
    start(ppo_args, dataset=write_rows(tmp_path / "one.jsonl", rows), learning_rate=1e-12,
          reward_fn=f"{recorder}:recorded")
    *_, first, second = calls(recorder)  # one prompt, one policy
    assert first[0] == second[0] == ["the"] * 8 and first[1] != second[1]


def test_evaluations_repeat_prompts_and_random_numbers(ppo_args, recorder):
    run = start(ppo_args, eval_prompts=4, eval_interval=1, learning_rate=1e-12,
                reward_fn=f"{recorder}:recorded")
    held_out = [row["prompt"] for row in run.answers]
    evaluations = [x for x in calls(recorder) if x[0] == held_out]
    others = [x for x in calls(recorder) if x[0] != held_out]
    assert len(evaluations) == 1 + 2 + 1  # before, after each iteration, at the end
    assert all(x == evaluations[0] for x in evaluations)  # of a policy that stands
    assert not any(set(prompts) & set(held_out) for prompts, *_ in others)
    # Tried before training, measured for --score-norm, two iterations.
    assert [len(prompts) for prompts, *_ in others] == [2, 16, 8, 8]


def test_the_held_out_answers_do_not_depend_on_the_batch_size(ppo_runs):
    small, large = (ppo_runs(batch_size=size, eval_prompts=7, score_norm="none") for size in (4, 8))
    assert [x["sft"] for x in small.answers] == [pytest.approx(x["sft"]) for x in large.answers]


def test_score_len_corr_is_the_correlation_of_scores_and_numbers_of_tokens(ppo_args, recorder):
    run = start(ppo_args, reward_fn=f"{recorder}:recorded", batch_size=32, total_episodes=32)
    _, responses, _, tokens = calls(recorder)[-1]
    scores = torch.tensor([len(x) / 10 for x in responses])
    lens = torch.tensor([float(len(x)) for x in tokens])
    scores, lens = scores - scores.mean(), lens - lens.mean()
    expected = (scores * lens).mean() / ((scores**2).mean() * (lens**2).mean()) ** 0.5
    assert run.metrics[0]["rollout/score_len_corr"] == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected) > 0.01


def test_scores_that_do_not_vary_have_no_correlation_with_length(ppo_runs):
    assert ppo_runs(response_len=1).metrics[0]["rollout/score_len_corr"] == 0


def test_ratio_max_grows_with_the_learning_rate_and_is_at_least_ratio_first(ppo_runs):
    slow, fast = (max(column(ppo_runs(learning_rate=x), "ppo/ratio_max")) for x in (1e-12, 1e-2))
    assert slow == pytest.approx(1, abs=1e-5) and fast > 1.1


# The table before and after -----------------------------------------------------------------------


def table(run):
    """The final table: name -> numbers before and after."""
    lines = run.console.split("held-out prompts")[-1].split("\n\nprompt")[0].splitlines()[1:]
    rows = [line.rsplit(maxsplit=2) for line in lines]
    return {name.strip(): (float(before), float(after)) for name, before, after in rows}


def test_the_answers_are_one_before_and_one_after_to_every_held_out_prompt(full, args):
    held_out = load_data(resolve_args(args)).held_out
    assert {row["prompt"] for row in full.answers} == {row["prompt"] for row in held_out.prompts}
    for row in full.answers:
        assert set(row) == {"prompt", "sft", "ppo"}
        assert row["sft"]["prompt"] == row["ppo"]["prompt"] == row["prompt"]


def test_the_table_has_the_means_over_the_answers(full):
    for key, name in (("score", "score_mean"), ("kl", "kl"), ("ended", "eos_share")):
        for i, side in enumerate(("sft", "ppo")):
            mean = sum(row[side][key] for row in full.answers) / len(full.answers)
            assert table(full)[name][i] == pytest.approx(mean, abs=1e-3)


def test_the_win_rate_counts_answers_that_score_higher_and_half_of_those_that_tie(full):
    wins = [(row["ppo"]["score"] > row["sft"]["score"]) + 0.5 * (row["ppo"]["score"]
            == row["sft"]["score"]) for row in full.answers]
    assert table(full)["win rate by score"] == pytest.approx((0.5, sum(wins) / 4))


def test_the_last_evaluation_is_the_last_column_of_the_table(full):
    # The one is about the policy in memory, the other about policy/ on disk.
    for name, (_, after) in table(full).items():
        if not name.startswith("win rate"):
            assert full.metrics[-1][f"eval/{name}"] == pytest.approx(after, abs=1e-3)


def test_the_perplexity_in_the_table_is_that_of_held_out_demonstrations(full, args):
    held_out = load_data(resolve_args(args)).held_out
    for name, shown in zip(("sft", "policy"), table(full)["perplexity"], strict=True):
        policy = load_policy(str(full.folder / name), resolve_args(replace(args, run_name="none")))
        rows = policy.collate(held_out.demonstrations)
        logprobs, _, _ = policy(rows, 1.0)
        expected = math.exp(-logprobs[rows.response_mask].mean().item())
        assert shown == pytest.approx(expected, rel=1e-3)
    shown = float(re.search(r"sft/held_out_perplexity .*?(\d+\.\d+)", full.console)[1])
    assert shown == pytest.approx(table(full)["perplexity"][0], abs=1e-3)


def test_what_is_held_out_changes_nothing_in_training(full, args, places, folder):
    held_out = [row["prompt"] for row in full.answers]
    rows = [row | {"chosen": "a b c", "rejected": "d"} if row["prompt"] in held_out else row
            for row in read_rows(Path(places["pairs"]))]
    run = start(args, dataset=write_rows(folder / "other_answers.jsonl", rows), total_episodes=32)
    assert torch.equal(*(weights(x.folder / "sft") for x in (run, full)))
    assert run.metrics == [{key: x for key, x in row.items() if not key.startswith("eval/")}
                           for row in full.metrics]
    assert table(run)["perplexity"] != table(full)["perplexity"]


# Rewards from elsewhere ---------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path):
    """A file of reward functions in a folder of its own, where `recorded` writes calls.jsonl."""
    (tmp_path / "my_words.py").write_text("WORD = 'good'\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path / "my_rewards.py"


def calls(recorder):
    """What `recorded` was called with: prompts, responses, answers, tokens."""
    return read_rows(recorder.with_name("calls.jsonl"))


@pytest.mark.parametrize("function", ["count_good", "dense_good"])
def test_a_reward_function_from_a_file_is_learnt(ppo_args, places, function):
    run = start(ppo_args, reward_fn=f"{places['rewards']}:{function}", total_episodes=480,
                batch_size=32, minibatch_size=8, learning_rate=1e-2, kl_coef=0.01, save_interval=9)
    scores = column(run, "rollout/score_mean")
    assert scores[-1] > scores[0] + 2  # of at most 6 words


def test_a_reward_function_gets_uncut_prompts_columns_and_the_strings_of_the_tokens(
    ppo_args, places, recorder, tmp_path
):
    rows = [{"prompt": "the plot was dull good bad a b", "answer": i} for i in range(16)]
    run = start(ppo_args, dataset=write_rows(tmp_path / "long.jsonl", rows),
                reward_fn=f"{recorder}:recorded")
    prompts, responses, answers, tokens = calls(recorder)[-1]
    assert run.args["max_prompt_len"] == 4 and prompts == [rows[0]["prompt"]] * 8
    expected = prompt_batch(rows, 2, 8, seed=1)
    assert answers == [row["answer"] for row in expected]
    for response, strings in zip(responses, tokens, strict=True):
        assert response.split() == [x for x in strings if x != "[EOS]"]
        assert "[EOS]" not in strings[:-1] and 1 <= len(strings) <= 6


def test_a_reward_function_gets_messages_as_messages(ppo_args, recorder, tmp_path):
    messages = [{"role": "user", "content": "the plot was dull"}]
    rows = [{"prompt": messages, "answer": {"grade": i}} for i in range(16)]
    start(ppo_args, dataset=write_rows(tmp_path / "chat.jsonl", rows),
          reward_fn=f"{recorder}:recorded")
    prompts, _, answers, _ = calls(recorder)[-1]
    assert prompts == [messages] * 8 and {"grade"} == set().union(*answers)


def test_braces_in_prompts_are_no_placeholders(ppo_args, tmp_path):
    rows = [{"prompt": "{the} {0}", "answer": i} for i in range(8)]
    run = start(ppo_args, dataset=write_rows(tmp_path / "braces.jsonl", rows))
    assert "'{the} {0}' -> " in run.console


@pytest.mark.parametrize(("function", "reason"), [
    ("raises", "division by zero"), ("wrong_count", "1 scores for 2 responses"),
    ("wrong_type", "it returned high for '"), ("not_a_number", "it returned nan for '"),
    ("asks_for_more", "colour"), ("missing", "missing")])
def test_a_broken_reward_function_is_refused_before_training(
    args, places, function, reason, capsys
):
    name = f"{places['rewards']}:{function}"
    message = refusal(replace(args, reward_fn=name, run_name="refused"), capsys)
    assert f"--reward-fn {name} cannot be used" in message and reason in message


def test_a_constant_added_to_the_scores_changes_nothing(ppo_runs, places):
    plain, *shifted = (ppo_runs(total_episodes=32, reward_fn=f"{places['rewards']}:{name}")
                       for name in ("letters", "letters_plus_10", "letters_minus_10"))
    for run in shifted:
        assert run.args["score_norm"] == "center" and run.samples[0]["score"] < 5
        assert logs_alike(run, plain)


def test_the_score_of_the_sft_policy_is_0_on_average_with_std_1(ppo_runs, places):
    reward_fn = f"{places['rewards']}:letters_times_10"
    row, = ppo_runs(reward_fn=reward_fn, score_norm="sft", total_episodes=64, batch_size=64,
                    minibatch_size=64).metrics
    assert abs(row["rollout/score_mean"]) < 0.5 and 0.6 < row["rollout/score_std"] < 1.5


def test_the_unit_of_a_reward_model_changes_nothing_for_a_critic_that_starts_from_it(
    ppo_runs, places, folder
):
    model = make_reward_model()
    model.score.weight.data *= 10
    larger = save(folder / "ten_times_the_reward", model, make_tokenizer())
    usual, other = (ppo_runs(reward_fn=None, reward_model=(x,), critic="separate", score_norm="sft")
                    for x in (places["reward_model"], larger))
    assert logs_alike(usual, other)


class Spy(Score):
    """A Score that remembers the policy of a run, which measures it first."""

    def measure(self, policy, rows, args):
        self.policy = policy
        super().measure(policy, rows, args)


def test_the_whole_separate_critic_is_trained(full, ppo_args, places):
    args = resolve_args(replace(ppo_args, critic="separate", score_norm="center",
                                run_name="separate critic"))
    sft, score = str(full.folder / "sft"), Spy([RewardFunction(f"{places['rewards']}:letters")])
    train_ppo(sft, score, load_data(args), args, RunLog(args))
    before, after = load_policy(sft, args).lm.base_model, score.policy.trunk
    assert not any(torch.equal(x, y) for x, y in
                   zip(before.parameters(), after.parameters(), strict=True))


def test_without_score_norm_a_constant_changes_the_run(ppo_runs, places):
    plain, shifted = (ppo_runs(reward_fn=f"{places['rewards']}:{name}", score_norm="none")
                      for name in ("letters", "letters_plus_10"))
    assert shifted.metrics[0]["rollout/score_mean"] == pytest.approx(
        plain.metrics[0]["rollout/score_mean"] + 10, abs=1e-4)
    assert abs(plain.metrics[1]["rollout/kl"] - shifted.metrics[1]["rollout/kl"]) > 0.01


def test_score_norm_is_sft_for_a_trained_model_center_for_a_given_one_and_none_if_dense(
    full, ppo_runs, places
):
    assert full.args["score_norm"] == "sft"
    assert ppo_runs().args["score_norm"] == "center"
    assert ppo_runs(reward_fn=None, reward_model=(places["reward_model"],)).args["score_norm"] == (
        "center")
    assert ppo_runs(reward_fn=f"{places['rewards']}:dense_good").args["score_norm"] == "none"


def moved_tokenizer():
    """The words of make_tokenizer, with other ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    moved = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = list(moved["model"]["vocab"])
    moved["model"]["vocab"] = {w: i for i, w in enumerate(words[:4] + words[:3:-1])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(moved)),
                                   pad_token="[PAD]", eos_token="[EOS]")


def eos_writing_tokenizer():
    """A tokenizer that puts EOS behind every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, moved_tokenizer, eos_writing_tokenizer])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_given_reward_model_reads_the_text_through_its_own_tokenizer(
    ppo_args, tmp_path, make, critic
):
    reward = save(tmp_path / "reward", make_reward_model(), make())
    run = start(ppo_args, reward_fn=None, reward_model=(reward,), critic=critic, score_norm="none",
                eval_prompts=4, eval_interval=2)
    for row in run.answers:
        assert row["sft"]["score"] == pytest.approx(
            read_score(reward, row["prompt"], row["sft"]), abs=1e-5)
    assert run.metrics[0]["rollout/score_std"] > 0


# The embedded task --------------------------------------------------------------------------------


REVIEWS = Args(eval_prompts=16, num_comparisons=64, total_episodes=256, batch_size=128,
               update_epochs=1, learning_rate=1e-3, device="cpu")


@pytest.fixture(scope="session")
def review_rows():
    """The demonstrations of the embedded task."""
    data = load_data(resolve_args(replace(REVIEWS, eval_prompts=0)))
    return data.demonstrations


@pytest.fixture(scope="session")
def reviews(review_rows, places, folder):
    """One run of the embedded task, with few demonstrations."""
    rows = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in review_rows[:1000]]
    return start(REVIEWS, output_dir=places["runs"],
                 sft_dataset=write_rows(folder / "reviews.jsonl", rows))


def test_the_embedded_task_reports_gold_and_grammar(reviews):
    rows = read_rows(reviews.folder / "metrics.jsonl")
    assert set(rows[0]) - {"iteration", "episodes", "wall_time"} == KEYS | {
        "rollout/gold_mean", "rollout/grammatical"}
    for row in reviews.answers:
        for x in (row["sft"], row["ppo"]):
            assert x["gold"] == gold_reward(x["prompt"], x["response"], x["ended"])


def test_the_win_rate_of_the_embedded_task_is_by_gold(reviews):
    wins = [(row["ppo"]["gold"] > row["sft"]["gold"]) + 0.5 * (row["ppo"]["gold"]
            == row["sft"]["gold"]) for row in reviews.answers]
    assert len(wins) == 16
    assert table(reviews)["win rate by gold"] == pytest.approx((0.5, sum(wins) / 16), abs=1e-3)


def test_gold_is_reported_and_never_trained_on(reviews, review_rows, folder):
    # Stage 3 again, on the same prompts from a file: this run knows no gold.
    again = {name: reviews.args[name] for name in (
        "max_prompt_len", "response_len", "score_norm", "adam_eps", "output_dir")}
    blind = start(REVIEWS, **again, sft_epochs=0, policy_model=str(reviews.folder / "sft"),
                  reward_model=(str(reviews.folder / "reward_model"),),
                  dataset=write_rows(folder / "blind.jsonl", review_rows))
    for row in blind.metrics:
        assert not row.keys() & {"rollout/gold_mean", "rollout/grammatical"}
    gold = {"rollout/gold_mean", "rollout/grammatical"}
    assert blind.metrics == [{key: value for key, value in row.items() if key not in gold}
                             for row in reviews.metrics]


@pytest.fixture(scope="session")
def compared(reviews, review_rows, tmp_path_factory):
    """Stage 2 alone. Returns: what it was given, now with comparisons, and what it has reported."""
    folder = tmp_path_factory.mktemp("stage2")
    data, data.held_out = (SimpleNamespace(prompts=rows, comparisons=[])
                           for rows in (review_rows[:100], review_rows[100:120]))
    args, results = resolve_args(REVIEWS), {}
    log = SimpleNamespace(args=args, run_dir=folder, result=results.__setitem__, silent=True,
                          start=print, scalars=lambda *x: None)
    reward_model, = train_reward_models(reviews.folder / "sft", data, args, log)
    return data, data.held_out, results, reward_model


def test_the_reward_model_is_judged_on_samples_to_held_out_prompts(compared):
    data, held_out, results, reward_model = compared
    assert (len(data.comparisons), len(held_out.comparisons)) == (64, 500)
    for part in (data, held_out):
        prompts = {row["prompt"] for row in part.prompts}
        assert {row["prompt"] for row in part.comparisons} <= prompts
    (key, share), = results.items()
    assert key == "reward_model/held_out_accuracy" and 0 < share < 1
    expected = reward_loss(reward_model, held_out.comparisons)["accuracy"].item()
    assert share == pytest.approx(expected, abs=1e-3)


def test_the_annotator_prefers_more_gold_with_the_odds_of_bradley_terry(compared):
    right, expected = [], []
    for row in compared[1].comparisons:
        better, worse = (gold_reward(row["prompt"], row[x], row[x].endswith("."))
                         for x in ("chosen", "rejected"))
        right.append(float(better > worse) + 0.5 * (better == worse))
        expected.append(1 / (1 + math.exp(-2 * abs(better - worse))))
    assert max(expected) > 0.9
    # 500 choices: their mean has a standard error of at most 0.5 / √500 = 0.022.
    assert sum(right) / 500 == pytest.approx(sum(expected) / 500, abs=0.06)


# Every flag ---------------------------------------------------------------------------------------

PPO_CHANGES = {  # against a run of stage 3 alone
    "dataset": "{fewer_pairs}", "dataset_split": "train[:20]", "max_prompt_len": 2,
    "response_len": 4, "eval_prompts": 4, "policy_model": "{other_policy}",
    "reward_fn": "{rewards}:count_good", "critic": "separate", "critic_learning_rate": 1e-4,
    "score_norm": "none", "ref_update_interval": 1, "total_episodes": 8, "batch_size": 16,
    "minibatch_size": 8, "update_epochs": 1, "learning_rate": 1e-3, "lr_warmup": 2,
    "anneal_lr": False, "adam_eps": 1.0, "temperature": 0.5, "gamma": 0.5, "gae_lambda": 0.5,
    "clip_coef": 0.01, "vf_clip_coef": 0.001, "vf_coef": 1.0, "ent_coef": 0.5,
    "max_grad_norm": 0.01, "target_kl": 1e-9, "kl_coef": 0.5, "kl_in": "loss",
    "kl_estimator": "k2", "kl_target": 1.0, "kl_horizon": 10, "max_kl": 1e-3,
    "norm_advantages": False, "whiten_rewards": True, "score_clip": 0.1,
    "missing_eos_penalty": 0.0, "ptx_coef": 1.0, "seed": 2, "dtype": "bfloat16",
    "save_interval": 2, "eval_interval": 1,
}
STAGE_CHANGES = {  # against a run of all three stages
    "sft_dataset": "{texts}", "reward_model": ("{reward_model}",), "sft_epochs": 2,
    "sft_learning_rate": 2e-3, "reward_epochs": 2, "reward_learning_rate": 2e-3,
    "num_reward_models": 2, "ensemble_coef": 0.0,
}
OWN_TESTS = {"microbatch_size", "gradient_checkpointing", "num_comparisons", "device",
             "output_dir", "run_name", "resume"}
TOGETHER = {  # what a flag needs beside it to have an effect
    "kl_in": {"kl_estimator": "k2"}, "kl_horizon": {"kl_target": 1.0},
    "max_kl": {"total_episodes": 24}, "eval_interval": {"eval_prompts": 4},
    "ensemble_coef": {"reward_model": ("{reward_model}", "{other_reward_model}")},
}


def filled(value, places):
    """A setting with the names of places in it."""
    if isinstance(value, tuple):
        return tuple(filled(x, places) for x in value)
    return value.format(**places) if isinstance(value, str) else value


def test_the_tables_of_changes_name_every_flag():
    assert PPO_CHANGES.keys() | STAGE_CHANGES.keys() | OWN_TESTS == {x.name for x in fields(Args)}


@pytest.mark.parametrize("flag", [*PPO_CHANGES, *STAGE_CHANGES])
def test_changing_a_flag_changes_something_observable(runs, ppo_runs, places, flag):
    make, value = (runs, STAGE_CHANGES[flag]) if flag in STAGE_CHANGES else (
        ppo_runs, PPO_CHANGES[flag])
    value = filled(value, places)
    together = {name: filled(x, places) for name, x in TOGETHER.get(flag, {}).items()}
    before, after = make(**together), make(**together, **{flag: value})
    assert (before.metrics, before.samples, before.answers) != (
        after.metrics, after.samples, after.answers)


def test_a_run_goes_to_the_folder_that_its_flags_name(ppo_args, tmp_path):
    main(replace(ppo_args, output_dir=str(tmp_path / "here"), run_name="mine"))
    assert (tmp_path / "here" / "mine" / "metrics.jsonl").exists()


def test_num_comparisons_is_the_number_of_pairs_that_the_reward_model_is_trained_on(compared):
    assert len(compared[0].comparisons) == 64


def test_help_explains_every_flag_in_words(capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(Args, args=["--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for field in fields(Args):
        flag = f"--{field.name.replace('_', '-')} "
        if field.type is bool or field.type == "bool":
            flag = f"{flag.strip()}, --no-{flag[2:]}"
        assert flag in text, flag
        entry = text.split(flag)[1].split("(default: ")[0]
        assert len(re.findall(r"[a-z]{2,}", entry)) >= 2, entry


def test_defaults_follow_from_data_and_model(args):
    given = resolve_args(replace(args, learning_rate=None, sft_learning_rate=None))
    scratch = resolve_args(Args())
    assert (given.learning_rate, given.sft_learning_rate) == (3e-6, 1e-5)
    assert (scratch.learning_rate, scratch.sft_learning_rate) == (1e-4, 3e-3)
    assert (given.adam_eps, scratch.adam_eps) == (1e-8, 1e-5)
    assert scratch.critic_learning_rate == 10 * scratch.learning_rate
    assert (scratch.max_prompt_len, scratch.response_len) == (16, 32)
    assert (scratch.microbatch_size, scratch.score_norm) == (scratch.minibatch_size, "sft")


# Refusals -----------------------------------------------------------------------------------------


def refusal(args, capsys):
    """The one line that a refused run ends with; it leaves no folder."""
    capsys.readouterr()
    before = set(Path(args.output_dir).glob("*"))
    with pytest.raises(SystemExit) as end:
        main(args)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ppo_rlhf.py: ")]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].endswith(".")
    assert "Traceback" not in lines[0] and set(Path(args.output_dir).glob("*")) == before
    return lines[0]


NUMBERS = [x.name for x in fields(Args) if re.match("int|float", str(getattr(
    x.type, "__name__", x.type))) and x.name != "seed"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_negative_or_not_a_number_is_refused(args, name, capsys):
    for value in (-1, float("nan")):
        message = refusal(replace(args, **{name: value}), capsys)
        assert message.startswith(f"ppo_rlhf.py: --{name.replace('_', '-')} {value} ")


@pytest.mark.parametrize(("changes", "named"), [
    ({"gamma": 1.5}, "--gamma 1.5"),
    ({"gae_lambda": 1.01}, "--gae-lambda 1.01"),
    ({"temperature": 0.0}, "--temperature 0.0"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0"),
    ({"kl_coef": math.inf}, "--kl-coef inf"),
    ({"response_len": 0}, "--response-len 0"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"total_episodes": 12}, "--total-episodes 12 is not a multiple of --batch-size 8"),
    ({"batch_size": 6, "total_episodes": 18}, "--batch-size 6 is not a multiple of --minibatch-"),
    ({"kl_in": "loss"}, "--kl-in loss with --kl-estimator k1"),
    ({"kl_target": 1.0, "kl_coef": 0.0}, "--kl-target 1.0"),
    ({"kl_target": 1.0, "kl_horizon": 4}, "--kl-horizon 4"),
    ({"reward_fn": "{rewards}:letters", "reward_model": ("{policy}",)}, "--reward-model {policy}"),
    ({"reward_fn": "nowhere.py:f"}, "--reward-fn nowhere.py:f"),
    ({"reward_fn": "{rewards}:dense_good", "score_norm": "sft"}, "--score-norm sft"),
    ({"reward_epochs": 0}, "--reward-epochs 0"),
    ({"policy_model": None}, "--dataset {pairs} needs a --policy-model"),
    ({"dataset": "reviews", "policy_model": None, "sft_epochs": 0}, "--sft-epochs 0"),
    ({"eval_prompts": 20}, "--eval-prompts 20"),
    ({"response_len": 100}, "--max-prompt-len 4 + --response-len 100"),
    ({"dataset": "nowhere.jsonl"}, "--dataset nowhere.jsonl"),
    ({"dataset": "{empty}"}, "{empty} (split train) cannot be used (ValueError: it is empty"),
    ({"dataset": "{unusable}"}, "--dataset {unusable}"),
    ({"dataset": "{other_columns}"}, "it has columns question, reply"),
    ({"dataset": "{rewards}"}, "--dataset {rewards}"),
    ({"dataset_split": "test"}, "test"),
    ({"dataset": "{prompts}", "eval_prompts": 0}, "--dataset {prompts} has no demonstrations"),
    ({"dataset": "{prompts}", "eval_prompts": 0, "sft_epochs": 0, "ptx_coef": 1.0,
      "reward_fn": "{rewards}:letters"}, "--ptx-coef 1.0"),
    ({"dataset": "{prompts}", "eval_prompts": 0, "sft_epochs": 0}, "has no comparisons"),
    ({"sft_dataset": "nowhere.jsonl"}, "--sft-dataset nowhere.jsonl"),
    ({"sft_dataset": "{other_columns}"}, "it has columns question, reply"),
    ({"policy_model": "nowhere"}, "--policy-model nowhere"),
    ({"policy_model": "{reward_model}"}, "it is a LlamaForSequenceClassification"),
    ({"policy_model": "{no_eos}"}, "--policy-model {no_eos}"),
    ({"policy_model": "{more_tokens}"}, "its tokenizer has 16 tokens, its embedding 12"),
    ({"reward_model": ("nowhere",)}, "--reward-model nowhere"),
    ({"reward_model": ("{policy}",)}, "it is a GPT2LMHeadModel"),
    ({"reward_model": ("{two_outputs}",)}, "2 outputs"),
    ({"reward_model": ("{reward_model}", "nowhere")}, "--reward-model nowhere"),
    ({"reward_model": ("{reward_model}", "{policy}")}, "--reward-model {policy}"),
    ({"reward_model": ("{pairs}",)}, "--reward-model {pairs}"),
    ({"policy_model": "{runs}"}, "--policy-model {runs}"),
    ({"num_reward_models": 2, "reward_model": ("{reward_model}",)}, "--num-reward-models 2"),
    ({"num_reward_models": 2, "reward_fn": "{rewards}:letters"}, "--num-reward-models 2"),
    ({"num_reward_models": 0}, "--num-reward-models 0"),
    ({"reward_fn": "{rewards}"}, "--reward-fn {rewards}"),
    ({"reward_fn": "{rewards}:missing"}, "--reward-fn {rewards}:missing"),
    ({"reward_fn": "{broken_file}:f"}, "--reward-fn {broken_file}:f"),
    ({"dataset": "{broken_line}"}, "--dataset {broken_line}, line 3, cannot be used"),
    ({"dataset": "{bytes}"}, "--dataset {bytes}"),
    ({"sft_dataset": "{broken_line}"}, "--sft-dataset {broken_line}, line 3, cannot be used"),
    ({"run_name": "../elsewhere"}, "--run-name ../elsewhere is not a folder in"),
    ({"resume": True}, "--run-name refused does not exist"),
    ({"resume": True, "run_name": None}, "--resume needs the --run-name"),
])
def test_bad_input_is_refused_in_one_sentence_before_training(
    args, places, changes, named, capsys
):
    changes = {name: filled(value, places) for name, value in changes.items()}
    settings = replace(args, **({"run_name": "refused"} | changes))
    assert named.format(**places) in refusal(settings, capsys)


def test_an_existing_run_is_not_overwritten(full, args, capsys):
    before = (full.folder / "metrics.jsonl").read_text()
    message = refusal(replace(args, run_name=full.folder.name), capsys)
    assert f"--run-name {full.folder.name}" in message
    assert (full.folder / "metrics.jsonl").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(args, capsys):
    assert "--device cuda" in refusal(replace(args, device="cuda"), capsys)
    assert resolve_args(replace(args, device="auto")).device == "cpu"
