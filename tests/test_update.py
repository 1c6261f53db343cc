"""Claim: the update does what its flags say, on every token once per epoch, and on nothing else.

Reference: the gradient of one whole minibatch; losses, steps and ratios worked out by hand.
Run: python -m pytest tests/test_update.py (15 seconds)
"""

import copy
import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, FAMILIES, make_lm, make_policy, make_reward_model, make_tokenizer, run
from torch.nn.utils import parameters_to_vector as weights

import ppo_rlhf as ppo

PROMPTS = [{"prompt": x} for x in ["the", "plot was dull", "good bad", "a"] * 2]
DEMONSTRATIONS = [{"prompt": x, "chosen": y} for x, y in [
    ("the plot", " was"), ("dull", " good bad a b"), ("plot", ""), ("bad bad", " a b c d . , a")]]
PAIRS = [tuple({"prompt": x["prompt"], "response": y, "ended": True} for y in (
    x["chosen"], " bad")) for x in DEMONSTRATIONS]
UPDATE = {"response_len": 6, "batch_size": 8, "minibatch_size": 8, "microbatch_size": 8,
          "update_epochs": 1, "max_grad_norm": 1e9}
TARGETS = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")


class Recorder(torch.optim.SGD):
    """SGD that records each gradient as one vector."""

    def __init__(self, model, lr=0.0):
        super().__init__(model.parameters(), lr=lr)
        self.gradients = []

    def step(self):
        self.gradients.append(torch.cat([
            torch.zeros_like(x).flatten() if x.grad is None else x.grad.flatten().clone()
            for x in self.param_groups[0]["params"]]))
        super().step()


def plain(family="Llama", **settings):
    """A policy without critic and, as in a run, without dropout."""
    return make_policy(make_lm(family, attention_dropout=0.0), **(UPDATE | settings))


def judge():
    """A reward model with the policy's tokens, trainable and without dropout."""
    classifier = make_reward_model(seed=5, attention_dropout=0.0)
    return ppo.RewardModel(classifier, make_tokenizer(), plain().args)


def add_critic(policy, *sources):
    """The policy, with the critic of a run that has these sources of scores; V is 0 without any."""
    scorer = ppo.Scorer(list(sources), policy.args)
    policy.critic = ppo.make_critic(policy, scorer, 0.0, policy.args)
    return policy


def setting(moved=False, **changes):
    """A policy with its critic, and a rollout of 8 ragged rows with random scores. moved: in the
    middle of an update, where new and old differ and some tokens are clipped."""
    policy = plain(**changes)
    rollout = ppo.collect_rollout(policy, policy, PROMPTS, 3, policy.args)
    add_critic(policy)
    torch.manual_seed(0)
    rollout.scores = torch.randn(8)
    rollout.advantages, rollout.returns = ppo.compute_advantages(rollout, 0.05, policy.args)
    for name in TARGETS[:3] if moved else ():
        noise = 0.3 * torch.randn(rollout.response_mask.shape)
        setattr(rollout, name, getattr(rollout, name) + noise * rollout.response_mask)
    return policy, rollout


def of_ppo(policy, rollout, kl_coef=0.05):
    """What a step of PPO trains on: loss, batch, coefficient."""
    return lambda part: ppo.ppo_loss(policy, part, kl_coef, policy.args), rollout, 1.0


def of_sft(policy, rows=DEMONSTRATIONS, coef=1.0):
    """What a step of SFT trains on."""
    return lambda part: ppo.sft_loss(policy, part), ppo.encode(policy, rows, "chosen"), coef


def step(model, *parts, **changes):
    """One step on parts that moves nothing. Returns: the first part's statistics, the gradient."""
    optimizer, args = Recorder(model), replace(model.args, **changes)
    stats = [ppo.accumulate_gradients(*part, args) for part in parts]
    return ppo.optimizer_step(model, optimizer, stats[0], args), optimizer.gradients[0]


def update(policy, rollout, demonstrations=(), lr=0.0, seed=1, **changes):
    """One update by SGD. Returns: its statistics, and the gradients of its steps."""
    optimizer, args = Recorder(policy, lr), replace(policy.args, **changes)
    stats = ppo.update_policy(policy, optimizer, rollout, 0.05, demonstrations, seed, args)
    return stats, optimizer.gradients


# One step: losses and gradients -------------------------------------------------------------------

ALL_TERMS = {"kl_in": "loss", "kl_estimator": "k2", "ent_coef": 0.1, "temperature": 0.7}


def parts_of(name):
    """A model, and what a step of it trains on."""
    if name == "reward":
        model = judge()
        return model, (lambda part: ppo.reward_loss(model, part), PAIRS, 1.0)
    policy, rollout = setting(moved=True, **(ALL_TERMS if name == "PPO, all terms" else {}))
    parts = [of_ppo(policy, rollout)] if "PPO" in name else []
    return policy, *parts, *([of_sft(policy, DEMONSTRATIONS[:3], 3.0)] if "SFT" in name else [])


def disguised(loss_fn, batch, coef):
    """The same with rows in another order and, in the padding of a rollout, NaN."""
    if isinstance(batch, list):
        return loss_fn, batch[::-1], coef
    batch = batch[torch.arange(len(batch) - 1, -1, -1)]
    assert not batch.response_mask.all()
    for name in TARGETS if batch.returns is not None else ():
        clean = getattr(batch, name)
        setattr(batch, name, torch.where(batch.response_mask, clean, math.nan))
    return loss_fn, batch, coef


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["PPO", "PPO, all terms", "SFT", "reward", "PPO and SFT"])
def test_neither_microbatches_nor_the_order_of_rows_nor_padding_change_gradient_and_statistics(
        name, size):
    model, *parts = parts_of(name)
    whole_stats, whole = step(model, *parts)
    stats, found = step(model, *(disguised(*part) for part in parts), microbatch_size=size)
    assert torch.allclose(found, whole, atol=1e-5) and whole.abs().max() > 1e-2
    assert stats == pytest.approx(whole_stats, abs=1e-5)
    assert "clipfrac" not in stats or min(stats["clipfrac"], stats["vf_clipfrac"]) > 0


def test_loss_and_gradient_of_ppo_are_the_weighted_sum_of_its_four_terms():
    policy, rollout = setting(moved=True, vf_coef=2.0, **ALL_TERMS)
    mask, targets = rollout.response_mask, (rollout.old_values, rollout.returns)

    def by_hand(rows):
        logprobs, values, entropies = policy(rows, 0.7, True)
        clipped, _ = ppo.policy_loss(logprobs, rows.old_logprobs, rows.advantages, mask, 0.2)
        kl = ppo.masked_mean(ppo.kl_penalty(logprobs, rows.ref_logprobs, "k2"), mask)
        return {"loss": clipped + 2 * ppo.value_loss(values, *targets, mask, 0.2)[0] + 0.3 * kl
                - 0.1 * ppo.masked_mean(entropies, mask)}

    (stats, found), (expected_stats, expected) = (
        step(policy, part) for part in (of_ppo(policy, rollout, 0.3), (by_hand, rollout, 1.0)))
    assert stats["loss"] == pytest.approx(expected_stats["loss"], abs=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_sft_loss_trains_the_response_with_its_eos_and_not_the_prompt_at_temperature_1():
    policy = plain(temperature=0.1)
    logprobs = policy.lm(torch.tensor([[4, 5, 6, 1]])).logits[0].log_softmax(-1)
    expected = -(logprobs[1, 6] + logprobs[2, 1]) / 2  # "was" after "plot", EOS after "was"
    found = ppo.sft_loss(policy, ppo.encode(policy, DEMONSTRATIONS[:1], "chosen"))
    assert torch.allclose(found["loss"], expected, atol=1e-5)


def test_the_reward_loss_is_bradley_terry_and_a_tie_is_half_right():
    model, (good, bad) = judge(), PAIRS[0]  # "the plot": "was" before "bad"
    first, second = (model.classifier(torch.tensor([[4, 5, x, 1]])).logits[0, 0] for x in (6, 9))
    found = [ppo.reward_loss(model, [pair]) for pair in ((good, bad), (bad, good), (good, good))]
    assert torch.allclose(found[0]["loss"], -torch.log(torch.sigmoid(first - second)), atol=1e-5)
    assert [x["accuracy"] for x in found] == [float(first > second), float(second > first), 0.5]


class StraightforwardPolicy(ppo.Policy):
    """Reads whole padded rows, and makes all logits at once."""

    def forward(self, rows, temperature, with_entropies=True):
        ids, mask, response_len = rows.sequence_ids, rows.sequence_mask, rows.response_mask.shape[1]
        named = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        logits = self.lm(input_ids=ids, **named).logits[..., : len(self.tokenizer)] / temperature
        log_probs = logits.log_softmax(-1)[:, -response_len - 1 : -1]
        logprobs = log_probs.gather(-1, ids[:, -response_len:, None]).squeeze(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        trunk = self.critic.trunk or self.lm.base_model
        hidden = trunk(input_ids=ids, **named).last_hidden_state
        values = self.critic.head(hidden)[:, -response_len - 1 : -1, 0]
        return [x * rows.response_mask for x in (logprobs, values, entropies)]


@pytest.mark.parametrize(("family", "settings", "size"), [
    *product(FAMILIES, [{}, {"critic": "separate", "reward_fn": "f.py:f"},
                        {"ent_coef": 0.1, "temperature": 0.7},
                        {"kl_in": "loss", "kl_estimator": "k2"}], [3, 8])])
def test_the_gradient_is_that_of_the_straightforward_computation(family, settings, size):
    policy, rollout = setting(moved=True, family=family, **settings)
    torch.nn.init.normal_(policy.critic.head.weight)
    rollout.old_values += policy(rollout, 1.0)[1].detach()
    parts = of_ppo(policy, rollout), of_sft(policy, coef=0.5)
    stats, found = step(policy, *parts, microbatch_size=size)
    policy.__class__ = StraightforwardPolicy
    expected_stats, expected = step(policy, *parts)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert stats == pytest.approx(expected_stats, rel=1e-4, abs=1e-5)


def test_a_step_is_as_long_as_the_clipped_gradient_and_the_log_has_the_norm_before():
    policy, rollout = setting()
    before, (_, (whole,)) = weights(policy.parameters()), update(policy, rollout)
    stats, _ = update(policy, rollout, lr=1.0, max_grad_norm=0.01)
    assert stats["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4) and whole.norm() > 1
    assert (weights(policy.parameters()) - before).norm().item() == pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_update_before_it_reaches_weights(junk):
    policy, rollout = setting()
    before, rollout.returns[0, 0] = weights(policy.parameters()), junk
    with pytest.raises(FloatingPointError, match=r"^loss is (nan|inf); lower the learning rate"):
        update(policy, rollout, lr=1.0)
    assert torch.equal(weights(policy.parameters()), before)
    model = OneWeight()  # at 0, where the root is 0 and its slope infinite
    with pytest.raises(FloatingPointError, match=r"^grad_norm is inf"):
        step(model, (lambda rows: {"loss": model.weight.sqrt().sum()}, [1.0], 1.0))
    assert model.weight.item() == 0


# An update: steps and epochs ----------------------------------------------------------------------

def test_each_row_is_used_once_per_epoch_in_an_order_of_the_seed_and_targets_stay_the_same():
    class Observed(ppo.Rollout):
        def __getitem__(self, rows):
            asked.append(rows.tolist())
            return super().__getitem__(rows)

    asked, (policy, rollout) = [], setting(minibatch_size=4, update_epochs=2)
    before = copy.deepcopy(rollout)
    for seed in (1, 1, 2):
        update(policy, Observed(**vars(rollout)), lr=0.1, seed=seed)
    a, b, c, d = asked[:4]  # two minibatches in each of two epochs
    assert sorted(a + b) == sorted(c + d) == list(range(8)) and {*a} not in ({*c}, {*d})
    assert asked[:4] == asked[4:8] != asked[8:]
    for x, y in zip(vars(rollout).values(), vars(before).values(), strict=True):
        assert x is y is None or (torch.equal(x, y) and not x.requires_grad)


def test_a_minibatch_has_the_old_values_and_targets_of_its_own_rows():
    policy, rollout = setting(moved=True, minibatch_size=1, update_epochs=1)
    rows = [of_ppo(policy, rollout)[0](rollout[torch.tensor([i])]) for i in range(8)]
    stats, _ = update(policy, rollout)
    for name in ("policy_loss", "value_loss", "vf_clipfrac", "approx_kl"):
        assert stats[name] == pytest.approx(sum(float(x[name]) for x in rows) / 8, abs=1e-6), name


@pytest.mark.parametrize(("target_kl", "epochs"), [(0.71, 1), (0.73, 3), (None, 3)])
def test_target_kl_ends_the_update_after_an_epoch_whose_approx_kl_is_above_it(target_kl, epochs):
    policy, rollout = setting(update_epochs=3, minibatch_size=4, target_kl=target_kl)
    rollout.old_logprobs = rollout.old_logprobs - 1.0 * rollout.response_mask
    stats, gradients = update(policy, rollout)
    # Schulman's k3 of the step from old to new: exp(d) − 1 − d with d = 1
    assert stats["approx_kl"] == pytest.approx(math.e - 2, abs=1e-5)
    assert len(gradients) == epochs * 2


def test_target_kl_looks_at_the_last_epoch_and_not_at_the_mean_so_far():
    def after(**changes):
        policy, rollout = setting(minibatch_size=4)
        stats, _ = update(policy, rollout, lr=0.1, **changes)
        return stats["approx_kl"], weights(policy.parameters())

    (first, _), (both, two_epochs) = after(update_epochs=1), after(update_epochs=2)
    # Epoch 2 alone has 2 · both − first; the target lies half-way between that and both.
    _, stopped = after(update_epochs=3, target_kl=(3 * both - first) / 2)
    assert both > first and torch.equal(stopped, two_epochs)


def test_the_log_ratio_in_the_log_is_that_of_the_token_farthest_from_0():
    policy, rollout = setting()
    rollout.old_logprobs[0, 0] -= math.log(3)  # ratio 3
    rollout.old_logprobs[1, 0] += math.log(4)  # ratio 1/4, which is farther from 1
    stats, _ = update(policy, rollout)
    assert stats["log_ratio_first"] == stats["log_ratio_max"] == pytest.approx(math.log(4))


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_log_ratio_first_is_that_of_the_first_step_and_good_responses_become_likelier(family):
    policy, rollout = setting(update_epochs=3, family=family)
    for layer in policy.lm.model.layers:
        layer.mlp.jitter_noise = 0.5  # of Mixtral's router, in training mode
    stats, _ = update(policy, rollout, lr=0.1)
    assert stats["log_ratio_first"] < 1e-5 and stats["log_ratio_max"] > 0.01
    moved = (policy(rollout, 1.0)[0] - rollout.old_logprobs) * rollout.advantages
    assert moved[rollout.response_mask].sum() > 0


def test_ptx_adds_the_gradient_of_the_sft_loss_times_its_coefficient_and_reports_it_without():
    policy, rollout = setting(microbatch_size=3)
    _, (alone,) = update(policy, rollout)
    stats, (mixed,) = update(policy, rollout, DEMONSTRATIONS[:1], ptx_coef=3.0)
    sft_stats, of_demonstration = step(policy, of_sft(policy, DEMONSTRATIONS[:1]))
    assert torch.allclose(mixed - alone, 3 * of_demonstration, atol=1e-5)
    assert stats["ptx_loss"] == pytest.approx(sft_stats["loss"], rel=1e-5)


def test_ptx_draws_as_many_new_demonstrations_as_responses_for_every_step():
    class Drawn(list):
        def __getitem__(self, idx):
            drawn.append(idx)
            return super().__getitem__(idx)

    drawn, (policy, rollout) = [], setting(update_epochs=2, ptx_coef=1.0)
    update(policy, rollout, Drawn(DEMONSTRATIONS), minibatch_size=4)
    assert len(drawn) == 2 * 2 * 4 and {*drawn} == {0, 1, 2, 3}
    _, (first, second) = update(policy, rollout, DEMONSTRATIONS)  # both see the same responses
    assert not torch.allclose(first, second, atol=1e-3)


# Stages 1 and 2 -----------------------------------------------------------------------------------

class OneWeight(torch.nn.Module):
    """A model that is one number, at first 0."""

    def __init__(self):
        super().__init__()
        self.weight, self.args = torch.nn.Parameter(torch.zeros(1)), plain().args


def fit_slopes(slopes, epochs=1, **changes):
    """Fit slope · weight. Returns: slopes as used, weight before and after each step, the log."""
    model, used, path, logged = OneWeight(), [], [], []

    def loss(model, rows):
        used.extend(rows)
        path.append(model.weight.item())
        return {"loss": (model.weight * sum(rows) / len(rows)).sum()}

    args = plain(**({"minibatch_size": 1, "max_grad_norm": 2.0} | changes)).args
    log = SimpleNamespace(args=args, stage="test", scalars=lambda *x: logged.append(x[-2:]))
    ppo.fit(log, model, loss, list, slopes, epochs, 0.4, args.seed)
    return used, [*path, model.weight.item()], logged


@pytest.mark.parametrize("settings", [{}, {"lr_warmup": 5}])  # the warm-up is that of PPO
def test_fit_takes_steps_of_adam_on_clipped_gradients_at_rates_that_fall_to_0(settings):
    used, path, logged = fit_slopes([1.0, 5.0, 1.5, 1.0], **settings)
    weight = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([weight], eps=1e-5)
    for slope, rate, after in zip(used, [0.4, 0.3, 0.2, 0.1], path[1:], strict=True):
        adam.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([min(slope, 2.0)])  # 5 is clipped to 2
        adam.step()
        assert after == pytest.approx(weight.item(), abs=1e-5)
    assert [number for _, number in logged] == [1, 2, 3, 4] and logged[0][0]["loss"] == 0
    assert [values["grad_norm"] for values, _ in logged] == pytest.approx(used)


@pytest.mark.parametrize(("size", "steps", "used"), [(2, 2, 4), (5, 1, 5), (32, 1, 5)])
def test_an_epoch_of_fit_takes_each_row_once_in_a_new_order_but_no_incomplete_last_minibatch(
        size, steps, used):
    found, path, logged = fit_slopes([1.0, 2.0, 3.0, 4.0, 5.0], epochs=3, minibatch_size=size)
    assert len(logged) == 3 * steps and len(found) == 3 * used and path[-1] < path[0] == 0
    first, second = found[:used], found[used : 2 * used]
    assert len({*first}) == len({*second}) == used and first != second


@pytest.mark.parametrize(("given", "eps"), [(None, 1e-5), ("given", 1e-8)])
def test_the_first_step_of_adam_is_the_rate_times_gradient_over_gradient_plus_eps(given, eps):
    _, path, _ = fit_slopes([1e-6], policy_model=given)
    assert path[-1] == pytest.approx(-0.4 * 1e-6 / (1e-6 + eps), rel=1e-3)


# The critic, and the scores that it learns --------------------------------------------------------

def test_a_separate_critic_trains_its_own_trunk_and_neither_the_policy_nor_the_reward_model():
    found, rollout, model = [], setting()[1], judge().requires_grad_(False)
    frozen = weights(model.parameters())
    for vf_coef in (0.0, 10.0):
        policy = add_critic(plain(critic="separate", vf_coef=vf_coef), model)
        num, before = sum(x.numel() for x in policy.lm.parameters()), weights(policy.parameters())
        _, (gradient,) = update(policy, rollout, lr=0.1)
        found.append(gradient[:num])
    assert torch.equal(*found) and found[0].abs().max() > 1e-3
    moved = weights(policy.parameters())[num:] != before[num:]
    assert torch.equal(weights(model.parameters()), frozen) and moved.float().mean() > 0.5


def start(args, folder, body, **settings):
    """One iteration of PPO, all in one step, with a reward function. Returns: its metrics."""
    (folder / "f.py").write_text(
        "import json\ndef f(prompts, responses, ended, tokens):\n"
        f"    open({str(folder / 'calls')!r}, 'a').write(json.dumps([ended, tokens]) + '\\n')\n"
        f"    return [{body} for i in range(len(prompts))]\n")
    return run(args, **ALONE, **settings, reward_fn=f"{folder}/f.py:f", eval_prompts=0,
               update_epochs=1, total_episodes=8, minibatch_size=8)[0]


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("score", ["5.0", "[5.0] + [0.0] * (len(tokens[i]) - 1)"])
def test_v_starts_at_the_mean_score_minus_the_mean_penalty_of_sft_responses(
        tiny_args, tmp_path, score, critic):
    # No KL and λ = 1: the return of each token is the score to come, minus 4 if EOS is missing.
    found = start(tiny_args, tmp_path, score, critic=critic, missing_eos_penalty=4.0, gae_lambda=1)
    calls = [json.loads(x) for x in (tmp_path / "calls").read_text().splitlines()]
    (before, _), (ended, tokens) = calls[-2:]  # twice a batch of the SFT policy; the iteration
    v, dense, errors = 5 - 4 * before.count(False) / 16, "*" in score, []
    for has_ended, row in zip(ended, tokens, strict=True):
        returns = [5 * (t == 0 or not dense) - 4 * (not has_ended) for t in range(len(row))]
        errors += [(v - x) ** 2 for x in returns]
    assert found["ppo/value_loss"] == pytest.approx(0.5 * sum(errors) / len(errors), rel=1e-4)
    assert 1 < v < 5


@pytest.mark.parametrize(("unit", "norm_scores", "said", "noted"), [
    (1, None, "mean 4.000, std 1.000", False), (100, None, "mean 400.000, std 100.000", True),
    (0.01, None, "mean 0.040, std 0.010", True), (0, None, "mean 0.000, std 0.000", False),
    (100, True, "mean 0.000, std 1.000", False), (100, False, "mean 400.000, std 100.000", True)])
def test_scores_far_from_std_1_are_noted_and_norm_scores_normalises_those_of_a_function(
        tiny_args, tmp_path, capsys, unit, norm_scores, said, noted):
    found = start(tiny_args, tmp_path, f"{unit} * (3 + 2 * (i % 2))", norm_scores=norm_scores)
    console = capsys.readouterr().out
    assert said in console.replace("-0.000", "0.000") and ("--norm-scores" in console) is noted
    assert found["rollout/score"] == pytest.approx(0 if norm_scores else 4 * unit, abs=1e-5)
