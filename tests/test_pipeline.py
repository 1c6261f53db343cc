"""Claim: a run is reproducible, trains what it should, freezes the rest, and leaves what it says.

Reference: a second run; hashes of weights; transformers' Auto classes on the saved folders.
Run: python -m pytest tests/test_pipeline.py (90 seconds)
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import make_lm, make_reward_model, make_tokenizer, read_metrics, run, save

import ppo_rlhf
from ppo_rlhf import Args, Data, Policy, compare_own_samples, main

METRIC_KEYS = """rollout/score_mean rollout/score_std rollout/kl rollout/rewards_mean
rollout/response_len rollout/eos_share rollout/entropy rollout/distinct_2 ppo/policy_loss
ppo/value_loss ppo/entropy ppo/approx_kl ppo/clipfrac ppo/vf_clipfrac ppo/ratio_first
ppo/explained_variance ppo/grad_norm ppo/kl_coef ppo/learning_rate perf/episodes_per_s
perf/rollout_s perf/score_s perf/update_s perf/peak_memory_gb"""
KEYS = set(METRIC_KEYS.split())

REVIEWS = Args(total_episodes=64, batch_size=32, device="cpu", learning_rate=1e-2)


@pytest.fixture
def small_reviews(monkeypatch):
    """The embedded task with little data, so that a run takes seconds."""
    draw, label = ppo_rlhf.draw_reviews, ppo_rlhf.compare_own_samples
    monkeypatch.setattr(ppo_rlhf, "draw_reviews", lambda n, rng: draw(900, rng))
    monkeypatch.setattr(ppo_rlhf, "compare_own_samples",
                        lambda policy, prompts, *x: label(policy, prompts[:64], *x))


def count_good(prompts, responses):
    """A verifiable reward: how often the word appears."""
    return [float(response.split().count("good")) for response in responses]


@pytest.fixture
def reward_file(tmp_path):
    """A user's file of reward functions."""
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "def count_good(prompts, responses):\n"
        "    return [float(r.split().count('good')) for r in responses]\n"
        "def dense_good(prompts, responses, tokens):\n"
        "    return [[float(t == 'good') for t in row] for row in tokens]\n"
        "def raises(prompts, responses):\n    return [1 / 0 for _ in responses]\n"
        "def wrong_count(prompts, responses):\n    return [1.0]\n"
        "def not_a_number(prompts, responses):\n    return [float('nan') for _ in responses]\n"
    )
    return path


# A run and what it leaves ------------------------------------------------------------------------


def test_one_run_leaves_models_metrics_samples_and_curves(tiny_args):
    metrics = run(tiny_args)
    folder = Path(tiny_args.output_dir) / "run"
    assert {x.name for x in folder.iterdir()} >= {"policy", "reward_model", "metrics.jsonl",
                                                  "samples.jsonl"}
    assert list(folder.glob("events.out.tfevents*"))
    logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert KEYS | {"iteration", "episodes", "wall_time"} == set(logged)
    assert [m["episodes"] for m in metrics] == [8, 16]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4


def test_tensorboard_gets_the_same_keys_and_the_curves_of_stages_1_and_2(tiny_args):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny_args)
    events = EventAccumulator(f"{tiny_args.output_dir}/run").Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == KEYS | {"sft/loss", "sft/perplexity", "reward_model/loss",
                                "reward_model/accuracy"}
    assert [x.step for x in events.Scalars("rollout/kl")] == [8, 16]


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tiny_args):
    first = run(tiny_args, run_name="first")
    assert run(tiny_args, run_name="second") == first
    assert run(tiny_args, run_name="third", seed=2) != first


def test_ratio_first_is_one_in_every_iteration_at_any_temperature(tiny_args):
    for metrics in run(tiny_args, temperature=0.7, total_episodes=32):
        assert abs(metrics["ppo/ratio_first"] - 1) < 1e-5


def test_the_saved_policy_gives_the_runs_logprobs(tiny_args, monkeypatch):
    from transformers import AutoModelForCausalLM

    kept, original = {}, ppo_rlhf.evaluate
    monkeypatch.setattr(ppo_rlhf, "evaluate", lambda *x: kept.setdefault(len(kept), original(*x)))
    run(tiny_args)
    rollout = kept[1][1]  # after PPO
    lm = AutoModelForCausalLM.from_pretrained(f"{tiny_args.output_dir}/run/policy")
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits[:, 0] = -1e30  # PAD has probability zero
        expected = logits.log_softmax(-1)[range(len(response)), response]
        assert torch.allclose(rollout.old_logprobs[i, : len(response)], expected, atol=1e-5)


@pytest.mark.parametrize("pad_token", ["[PAD]", "[EOS]"])
def test_the_saved_reward_model_gives_the_raw_scores(tiny_args, tmp_path, monkeypatch, pad_token):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kept, original = {}, ppo_rlhf.evaluate
    monkeypatch.setattr(ppo_rlhf, "evaluate", lambda *x: kept.setdefault(len(kept), original(*x)))
    policy = save(tmp_path / "given", make_lm("GPT2"), make_tokenizer(pad_token=pad_token))
    run(tiny_args, policy_model=policy)
    rollout, folder = kept[0][1], f"{tiny_args.output_dir}/run/reward_model"
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [x + y for x, y in zip(rollout.prompts, rollout.responses, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    scores = reward_model(**batch).logits[:, 0]
    assert torch.allclose(rollout.scores, scores, atol=1e-5)


def test_generate_of_the_saved_policy_samples_without_top_p_and_penalties(tiny_args):
    from transformers import GenerationConfig

    run(tiny_args)
    config = GenerationConfig.from_pretrained(f"{tiny_args.output_dir}/run/policy")
    assert config.do_sample and config.top_p == 1.0 and config.top_k == 0
    assert config.repetition_penalty in (None, 1.0) and config.suppress_tokens == [0]


# What is trained, what is frozen -----------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """The models that the evaluations before and after PPO saw, and a copy of their weights."""
    seen, evaluate = [], ppo_rlhf.evaluate

    def spy(actor_critic, reference, score, *rest):
        models = {"actor_critic": actor_critic, "policy": actor_critic.policy,
                  "reference": reference, "reward": score.keywords["reward_model"]}
        seen.append({name: (model, torch.cat([x.detach().clone().flatten()
                                              for x in model.parameters()]))
                     for name, model in models.items()})
        return evaluate(actor_critic, reference, score, *rest)

    monkeypatch.setattr(ppo_rlhf, "evaluate", spy)
    return seen


def test_reference_and_reward_model_do_not_move_and_the_policy_does(tiny_args, seen):
    run(tiny_args)
    before, after = ({name: weights for name, (_, weights) in x.items()} for x in seen)
    assert torch.equal(before["reference"], after["reference"])
    assert torch.equal(before["reward"], after["reward"])
    assert not torch.equal(before["policy"], after["policy"])


def test_the_reference_is_frozen_and_shares_no_weight_with_the_policy(tiny_args, seen):
    run(tiny_args)
    for models in seen:
        trained, frozen = (list(models[x][0].parameters()) for x in ("actor_critic", "reference"))
        assert not any(x.requires_grad for x in frozen)
        assert not {x.data_ptr() for x in trained} & {x.data_ptr() for x in frozen}


def test_the_kl_starts_at_zero_and_grows(tiny_args):
    metrics = run(tiny_args, total_episodes=32)
    assert abs(metrics[0]["rollout/kl"]) < 1e-4 < metrics[-1]["rollout/kl"]


def forget_gold_after_labelling(monkeypatch):
    """The annotator still knows gold; for everybody else it is 0."""
    label, real = ppo_rlhf.compare_own_samples, ppo_rlhf.gold_reward

    def label_with_gold(*x):
        with monkeypatch.context() as patch:
            patch.setattr(ppo_rlhf, "gold_reward", real)
            return label(*x)

    monkeypatch.setattr(ppo_rlhf, "compare_own_samples", label_with_gold)
    monkeypatch.setattr(ppo_rlhf, "gold_reward", lambda *x: 0.0)


def test_the_adapted_kl_coef_is_carried_on_and_used_in_the_rewards(tiny_args, monkeypatch):
    used, original = [], ppo_rlhf.compute_rewards
    monkeypatch.setattr(ppo_rlhf, "compute_rewards", lambda rollout, norm, kl_coef, args:
                        used.append(kl_coef) or original(rollout, norm, kl_coef, args))
    metrics = run(tiny_args, kl_target=1e6, kl_horizon=8, total_episodes=32)
    # KL far below its target: each time a fifth less.
    assert used == pytest.approx([0.05 * 0.8**i for i in range(4)])
    assert used == [x["ppo/kl_coef"] for x in metrics]


def test_evaluations_share_prompts_and_seed_and_iterations_do_not(tiny_args, monkeypatch):
    calls, original = [], ppo_rlhf.collect_rollout
    monkeypatch.setattr(ppo_rlhf, "collect_rollout", lambda *x: calls.append(x) or original(*x))
    run(tiny_args, total_episodes=32)
    prompts, seeds = [{tuple(p) for p in x[2]} for x in calls], [x[4] for x in calls]
    assert prompts[0] == prompts[-1] and not prompts[0] & set.union(*prompts[1:-1])
    assert seeds[0] == seeds[-1] and len(set(seeds)) == 1 + 4


def test_demonstrations_are_always_read_at_temperature_1(tiny_args, monkeypatch):
    temperatures, original = [], ppo_rlhf.sft_loss_sum
    monkeypatch.setattr(ppo_rlhf, "sft_loss_sum", lambda policy, x:
                        temperatures.append(policy.temperature) or original(policy, x))
    run(tiny_args, temperature=0.5, ptx_coef=1.0)
    assert set(temperatures) == {1.0}


def test_gold_is_reported_and_never_trained_on(tmp_path, monkeypatch, small_reviews):
    args = replace(REVIEWS, output_dir=str(tmp_path))
    honest = run(args, run_name="honest")
    forget_gold_after_labelling(monkeypatch)
    blind = run(args, run_name="blind")
    assert [m.pop("rollout/gold_mean") for m in blind] == [0.0, 0.0]
    assert all(m.pop("rollout/gold_mean") != 0.0 for m in honest)
    assert blind == honest


# Rewards from elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["count_good", "dense_good"])
def test_a_reward_function_from_a_file_is_learnt(tiny_args, reward_file, function):
    metrics = run(tiny_args, reward_fn=f"{reward_file}:{function}", total_episodes=960,
                  batch_size=32, minibatch_size=8, learning_rate=3e-3, kl_coef=0.01)
    first, last = metrics[0]["rollout/score_mean"], metrics[-1]["rollout/score_mean"]
    assert last > first + 2  # of at most 6 words
    assert not (Path(tiny_args.output_dir) / "run" / "reward_model").exists()


@pytest.mark.parametrize(("function", "reason"), [
    ("raises", "division by zero"), ("wrong_count", "1 scores for 2"), ("not_a_number", "nan")])
def test_a_broken_reward_function_is_refused_before_training(
    tiny_args, reward_file, function, reason, capsys
):
    with pytest.raises(SystemExit) as end:
        run(tiny_args, reward_fn=f"{reward_file}:{function}")
    message = capsys.readouterr().err
    assert end.value.code == 2 and reason in message and function in message
    assert not (Path(tiny_args.output_dir) / "run").exists()


def test_a_given_reward_model_with_the_same_tokens_scores_ids(tiny_args, tmp_path):
    reward = save(tmp_path / "reward", make_reward_model(), make_tokenizer())
    metrics = run(tiny_args, reward_model=reward, critic="separate")
    assert metrics[0]["rollout/score_std"] > 0


def moved_tokenizer():
    """The words of make_tokenizer, with other ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    moved = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = list(moved["model"]["vocab"])
    moved["model"]["vocab"] = {w: i for i, w in enumerate(words[:4] + words[:3:-1])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(moved)),
                                   pad_token="[PAD]", eos_token="[EOS]")


def test_a_reward_model_with_other_tokens_is_fed_the_text():
    other = moved_tokenizer()
    rows = ppo_rlhf.retokenise([[4, 5, 6, 7, 1], [4, 5]], tokenizer=make_tokenizer(),
                               eos_ids=[1], reward_tokenizer=other)
    whole, cut = other(["the plot was dull", "the plot"])["input_ids"]
    assert whole != [4, 5, 6, 7]
    assert rows == [[*whole, other.eos_token_id], cut]  # only the first had ended


@pytest.mark.parametrize("kind", ["causal", "two outputs"])
def test_what_is_no_reward_model_is_refused(tiny_args, tmp_path, policy_folder, kind, capsys):
    two = save(tmp_path / "two", make_reward_model(num_labels=2), make_tokenizer())
    with pytest.raises(SystemExit) as end:
        run(tiny_args, reward_model=policy_folder if kind == "causal" else two)
    assert end.value.code == 2 and "--reward-model" in capsys.readouterr().err


# Every flag --------------------------------------------------------------------------------------

CHANGES = {
    "dataset": None, "policy_model": None, "reward_model": None, "reward_fn": None,
    "sft_dataset": None, "output_dir": None, "run_name": None, "device": None,  # tests of their own
    "dataset_split": "train[:20]", "max_prompt_len": 2, "response_len": 4, "vocab_size": 260,
    "eval_prompts": 2, "sft_epochs": 2, "sft_learning_rate": 2e-3, "reward_epochs": 2,
    "reward_learning_rate": 2e-3, "critic": "separate", "critic_learning_rate": 1e-4,
    "score_norm": "running", "ref_update_interval": 1, "total_episodes": 8, "batch_size": 16,
    "minibatch_size": 8, "microbatch_size": 2, "update_epochs": 1, "learning_rate": 1e-3,
    "lr_warmup": 2, "anneal_lr": False, "temperature": 0.5, "gamma": 0.5, "gae_lambda": 0.5,
    "clip_coef": 0.01, "vf_clip_coef": 0.001, "vf_coef": 1.0, "ent_coef": 0.5,
    "max_grad_norm": 0.01, "target_kl": 1e-9, "kl_coef": 0.5, "kl_in": "loss",
    "kl_estimator": "k2", "kl_target": 1.0, "kl_horizon": 10, "max_kl": 1e-3,
    "norm_advantages": False, "whiten_rewards": True, "score_clip": 0.1,
    "missing_eos_penalty": 0.0, "ptx_coef": 1.0, "seed": 2, "dtype": "bfloat16",
    "save_interval": 1, "log_samples_interval": 2,
}
TOGETHER = {  # what a flag needs beside it to have an effect
    "kl_in": {"kl_estimator": "k2"}, "kl_horizon": {"kl_target": 1.0},
    "vocab_size": {"policy_model": None},
}


def observe(args, capsys):
    """All that a run shows: console, metrics, samples, number of times that policy/ was saved."""
    saves, original = [], ppo_rlhf.save_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "save_policy", lambda *x: saves.append(1) or original(*x))
        metrics = run(args)
    samples = Path(args.output_dir, args.run_name, "samples.jsonl")
    lines = samples.read_text().splitlines() if samples.exists() else []
    texts = [json.loads(line)["response"] for line in lines]
    plan = capsys.readouterr().out.split("plan ")[1].split("sft ")[0]
    return metrics, texts, len(saves), plan


def test_the_table_of_changes_names_every_flag():
    assert set(CHANGES) == {field.name for field in fields(Args)}


@pytest.mark.parametrize("flag", [flag for flag, value in CHANGES.items() if value is not None])
def test_changing_a_flag_changes_something_observable(tiny_args, flag, capsys):
    base = replace(tiny_args, **TOGETHER.get(flag, {}))
    before = observe(replace(base, run_name="before"), capsys)
    after = observe(replace(base, run_name="after", **{flag: CHANGES[flag]}), capsys)
    if flag == "microbatch_size":  # memory, not results
        assert before[3] != after[3]
        for x, y in zip(before[0], after[0], strict=True):
            assert x == pytest.approx(y, abs=1e-3)
    else:
        assert before[:3] != after[:3]


def test_help_explains_every_flag_in_words():
    source = Path(ppo_rlhf.__file__).read_text().split("class Args:")[1].split("\ndef ")[0]
    for field in fields(Args):
        after = source.split(f"    {field.name}: ")[1].split("\n", 1)[1].strip()
        assert after.startswith('"""') and len(after.split('"""')[1]) > 10, field.name


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "named"), [
    ({"gamma": 1.5}, "--gamma 1.5"),
    ({"temperature": 0.0}, "--temperature 0.0"),
    ({"kl_coef": -1.0}, "--kl-coef -1.0"),
    ({"learning_rate": float("nan")}, "--learning-rate nan"),
    ({"batch_size": 6}, "--batch-size 6"),
    ({"kl_in": "loss"}, "--kl-in loss"),
    ({"response_len": 100}, "--response-len 100"),
    ({"dataset": "nowhere.jsonl"}, "--dataset nowhere.jsonl"),
    ({"dataset_split": "test"}, "test"),
    ({"policy_model": "nowhere"}, "--policy-model nowhere"),
    ({"policy_model": None, "sft_epochs": 0}, "--sft-epochs 0"),
    ({"reward_fn": "nowhere.py:f"}, "--reward-fn nowhere.py:f"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_before_training(tiny_args, changes, named, capsys):
    with pytest.raises(SystemExit) as end:
        main(replace(tiny_args, **changes))
    assert end.value.code == 2 and named in capsys.readouterr().err
    assert not (Path(tiny_args.output_dir) / "run").exists()


def test_an_existing_run_is_not_overwritten(tiny_args):
    run(tiny_args)
    metrics = read_metrics(tiny_args)
    with pytest.raises(SystemExit):
        main(tiny_args)
    assert read_metrics(tiny_args) == metrics


def test_cuda_is_refused_where_there_is_none(tiny_args, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(replace(tiny_args, device="cuda"))
    assert end.value.code == 2 and "--device cuda" in capsys.readouterr().err
    assert ppo_rlhf.resolve_args(replace(tiny_args, device="auto")).device == "cpu"


def test_defaults_follow_from_model_and_reward(tiny_args):
    given = ppo_rlhf.resolve_args(replace(tiny_args, learning_rate=None, reward_fn="f.py:f"))
    scratch = ppo_rlhf.resolve_args(Args())
    assert (given.learning_rate, given.score_norm) == (3e-6, "none")
    assert (scratch.learning_rate, scratch.score_norm) == (1e-4, "sft")
    assert scratch.critic_learning_rate == 10 * scratch.learning_rate


# Comparisons, reward models with their tokenizers, samples ----------------------------------------


def test_the_annotator_prefers_the_response_with_more_gold(monkeypatch):
    monkeypatch.setattr(ppo_rlhf, "gold_rewards", lambda texts, ended:
                        [5.0 * len(y.split()) for _, y in texts])  # 5 more: 20,000 to 1
    comparisons = compare_own_samples(Policy(make_lm(), 0, [1]), [[4], [5], [6]] * 20,
                                      make_tokenizer(), Args(response_len=6))
    more = [sum(t != 1 for t in x) - sum(t != 1 for t in y) for _, x, y in comparisons]
    assert min(more) == 0 < max(more)


def test_the_reward_model_is_judged_on_samples_to_held_out_prompts(monkeypatch):
    asked, data = [], Data([[4]], [], [], [[5]], [], [])
    monkeypatch.setattr(ppo_rlhf, "compare_own_samples", lambda _, x, *y: asked.append(x) or x)
    monkeypatch.delattr(ppo_rlhf, "new_reward_model")
    with pytest.raises(NameError):  # what comes next
        ppo_rlhf.train_reward_model(None, data, None, Args(), None)
    assert asked == [[[4]] * 6000, [[5]] * 500]


def test_a_tokenizer_that_writes_eos_by_itself_gets_no_second_one():
    def writes_eos(texts):
        return {"input_ids": [[5, 9] for _ in texts]}

    writes_eos.eos_token_id = 9
    assert ppo_rlhf.retokenise([[4, 1]], tokenizer=make_tokenizer(), eos_ids=[1],
                               reward_tokenizer=writes_eos) == [[5, 9]]


def test_the_same_words_with_other_ids_are_other_tokens(tiny_args, tmp_path):
    model, other = make_reward_model(), moved_tokenizer()
    path = save(tmp_path / "reward", model, other)
    args = ppo_rlhf.resolve_args(replace(tiny_args, reward_model=path))
    data = Data([], [([4], [5, 1])] * 2, [], [], [], [])
    score, _, same_tokens = ppo_rlhf.load_given_reward(
        args, Policy(make_lm(), 0, [1]), make_tokenizer(), data)
    expected = ppo_rlhf.model_scores(model, [[*other("the plot")["input_ids"], 1]])
    assert not same_tokens and torch.allclose(score([[4]], [[5, 1]]), expected, atol=1e-5)


def test_the_total_of_a_sample_is_its_score_minus_the_weighted_kl(tiny_args, reward_file):
    run(tiny_args, reward_fn=f"{reward_file}:count_good", missing_eos_penalty=0.0, kl_coef=0.5,
        total_episodes=32)
    lines = (Path(tiny_args.output_dir) / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    for x in samples:
        assert x["total"] == pytest.approx(x["score"] - 0.5 * x["kl"], abs=1e-4)
    assert max(abs(x["kl"]) for x in samples) > 0.01
