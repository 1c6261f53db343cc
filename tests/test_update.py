"""Claim: the update does what its flags say, on every token once per epoch, and on nothing else.

Reference: the gradient of one whole minibatch; losses, steps and ratios worked out by hand.
Run: python -m pytest tests/test_update.py (10 seconds)
"""

import copy
import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from conftest import FAMILIES, make_lm, make_policy, make_reward_model, make_tokenizer

from ppo_rlhf import (
    Policy,
    RewardModel,
    Rollout,
    Score,
    collect_rollout,
    compute_advantages,
    fit,
    held_out_mean,
    kl_penalty,
    load_policy,
    masked_mean,
    ppo_loss,
    reward_loss,
    set_learning_rates,
    sft_loss,
    train_step,
    update_policy,
)

PROMPTS = ["the", "plot was dull", "good bad", "a"] * 2
DEMONSTRATIONS = [
    {"prompt": "the plot", "chosen": "was", "rejected": "bad"},
    {"prompt": "dull", "chosen": "good bad a b", "rejected": "the"},
    {"prompt": "plot", "chosen": "", "rejected": "c"},
    {"prompt": "bad bad", "chosen": "the plot was dull good bad a", "rejected": "d"},
]
UPDATE = {"response_len": 6, "batch_size": 8, "minibatch_size": 8, "microbatch_size": 8,
          "update_epochs": 1, "max_grad_norm": 1e9}


class Recorder(torch.optim.SGD):
    """An optimizer that records each gradient as one vector, and moves nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.gradients = []

    def step(self):
        parameters = [x for group in self.param_groups for x in group["params"]]
        self.gradients.append(torch.cat([
            torch.zeros_like(x).flatten() if x.grad is None else x.grad.flatten().clone()
            for x in parameters]))


def without_dropout(**settings):
    """A policy as load_policy makes it: make_lm turns dropout on, a run turns it off."""
    return make_policy(make_lm(attention_dropout=0.0), **settings)


def setting(**changes):
    """A policy with its critic and a rollout of 8 ragged rows with random scores."""
    policy = without_dropout(**(UPDATE | changes))
    reference = copy.deepcopy(policy).requires_grad_(False)
    policy.add_critic(Score([None]))
    rollout = collect_rollout(policy, reference, PROMPTS, 3, policy.args)
    torch.manual_seed(0)
    rollout.scores = torch.randn(8)
    compute_advantages(rollout, 0.05, policy.args)
    return policy, rollout


def moved_setting(**changes):
    """The same in the middle of an update: new and old differ, and some tokens are clipped."""
    policy, rollout = setting(**changes)
    for name in ("old_logprobs", "old_values", "ref_logprobs"):
        noise = 0.3 * torch.randn(rollout.response_mask.shape)
        setattr(rollout, name, getattr(rollout, name) + noise * rollout.response_mask)
    return policy, rollout


def ppo_part(policy, rollout, kl_coef=0.05):
    """The part of a train_step that trains on a rollout."""
    return functools.partial(ppo_loss, kl_coef=kl_coef, args=policy.args), rollout, 1.0


def step(model, *parts, **changes):
    """One train_step on parts (loss, rows, coef). Returns: its statistics and its gradient."""
    optimizer = Recorder(model)
    stats = train_step(model, optimizer, parts, "test", replace(model.args, **changes))
    return stats, optimizer.gradients[0]


def update(policy, optimizer, rollout, demonstrations=(), iteration=1, **changes):
    """One update_policy, with kl_coef 0.05. Returns: its statistics."""
    args = replace(policy.args, **changes)
    return update_policy(policy, optimizer, rollout, 0.05, demonstrations, iteration, args)


def gradients(policy, rollout, demonstrations=(), **changes):
    """The gradients of the steps of one update, none of which moves the weights."""
    optimizer = Recorder(policy)
    update(policy, optimizer, rollout, demonstrations, **changes)
    return optimizer.gradients


def weights(model):
    """All weights in one vector."""
    return torch.cat([x.detach().flatten().clone() for x in model.parameters()])


def judge():
    """A reward model with the policy's tokens, trainable and without dropout."""
    policy = without_dropout(**UPDATE)
    return RewardModel(make_reward_model(seed=5, attention_dropout=0.0), policy.tokenizer,
                       policy.args)


# One step: gradients of the three losses ----------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("settings", [
    {}, {"kl_in": "loss", "kl_estimator": "k2", "ent_coef": 0.1, "temperature": 0.7}])
def test_ppo_gradient_and_statistics_do_not_depend_on_microbatches(size, settings):
    policy, rollout = moved_setting(**settings)
    part = ppo_part(policy, rollout)
    whole_stats, whole = step(policy, part)
    stats, parts = step(policy, part, microbatch_size=size)
    assert torch.allclose(parts, whole, atol=1e-6) and whole.abs().max() > 1e-2
    assert stats == pytest.approx(whole_stats, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sft_gradient_does_not_depend_on_microbatches(size):
    policy = without_dropout(**UPDATE)
    part = sft_loss, policy.collate(DEMONSTRATIONS), 1.0
    (_, whole), (_, parts) = step(policy, part), step(policy, part, microbatch_size=size)
    assert torch.allclose(parts, whole, atol=1e-6) and whole.abs().max() > 1e-2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_reward_gradient_does_not_depend_on_microbatches(size):
    model = judge()
    part = reward_loss, DEMONSTRATIONS, 1.0
    (_, whole), (_, parts) = step(model, part), step(model, part, microbatch_size=size)
    assert torch.allclose(parts, whole, atol=1e-6) and whole.abs().max() > 1e-2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_parts_with_other_numbers_of_terms_do_not_depend_on_microbatches(size):
    policy, rollout = moved_setting()
    parts = ppo_part(policy, rollout), (sft_loss, policy.collate(DEMONSTRATIONS[:3]), 3.0)
    (_, whole), (_, small) = step(policy, *parts), step(policy, *parts, microbatch_size=size)
    assert torch.allclose(small, whole, atol=1e-6)


def test_the_mean_of_the_microbatches_means_would_be_another_gradient():
    # The tempting version: average equally, whatever number of tokens a row has.
    policy, rollout = moved_setting()
    _, right = step(policy, ppo_part(policy, rollout))
    of_rows = [step(policy, ppo_part(policy, rollout[[i]]))[1] for i in range(8)]
    assert not torch.allclose(sum(of_rows) / 8, right, atol=1e-3)


def test_the_gradient_of_two_parts_is_the_sum_of_coef_times_gradient():
    policy, rollout = moved_setting()
    ppo, demonstrations = ppo_part(policy, rollout), policy.collate(DEMONSTRATIONS)
    (_, first), (_, second) = step(policy, ppo), step(policy, (sft_loss, demonstrations, 1.0))
    _, both = step(policy, ppo, (sft_loss, demonstrations, 3.0))
    assert torch.allclose(both, first + 3 * second, atol=1e-5)


def test_the_order_of_the_rows_changes_nothing():
    policy, rollout = moved_setting()
    forward, _ = step(policy, ppo_part(policy, rollout))
    assert forward["clipfrac"] > 0 and forward["vf_clipfrac"] > 0  # else it would show little
    backward, _ = step(policy, ppo_part(policy, rollout[list(range(7, -1, -1))]))
    assert forward == pytest.approx(backward, abs=1e-5)


def test_the_critic_is_trained_on_the_returns():
    policy, rollout = setting()
    stats, _ = step(policy, ppo_part(policy, rollout))
    errors = (rollout.old_values - rollout.returns)[rollout.response_mask]
    assert stats["value_loss"] == pytest.approx(0.5 * (errors**2).mean().item(), rel=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_four_terms():
    policy, rollout = moved_setting(kl_in="loss", kl_estimator="k2", ent_coef=0.1, vf_coef=0.5)
    stats, _ = step(policy, ppo_part(policy, rollout, kl_coef=0.3))
    mask = rollout.response_mask
    logprobs, _, _ = policy(rollout, 1.0)
    kl = masked_mean(kl_penalty(logprobs, rollout.ref_logprobs, "k2"), mask).item()
    expected = (stats["policy_loss"] + 0.5 * stats["value_loss"] - 0.1 * stats["entropy"]
                + 0.3 * kl)
    assert stats["loss"] == pytest.approx(expected, abs=1e-5) and 0.3 * kl > 1e-3


def test_the_padding_of_a_rollout_reaches_neither_loss_nor_statistics():
    results = []
    for junk in (0.0, 1e4, float("nan")):
        policy, rollout = moved_setting()
        for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"):
            clean = getattr(rollout, name)
            setattr(rollout, name, torch.where(rollout.response_mask, clean, junk))
        results.append(step(policy, ppo_part(policy, rollout)))
    assert not rollout.response_mask.all()
    assert results[0][0] == results[1][0] == results[2][0]
    assert torch.equal(results[0][1], results[2][1])


def test_the_sft_loss_trains_the_response_with_its_eos_and_not_the_prompt():
    policy = without_dropout(**UPDATE)
    logits = policy.lm(torch.tensor([[4, 5, 6, 1]])).logits[0].clone()  # the plot | was [EOS]
    logits[:, 0] = -1e30  # PAD
    logprobs = logits.log_softmax(-1)
    expected = -(logprobs[1, 6] + logprobs[2, 1]) / 2  # "was" after "plot", EOS after "was"
    found = sft_loss(policy, policy.collate(DEMONSTRATIONS[:1]))
    assert torch.allclose(found["loss"], expected, atol=1e-5)
    assert found["sft_loss"] == found["loss"]


def test_the_sft_loss_reads_demonstrations_at_temperature_1():
    cold, warm = without_dropout(**UPDATE, temperature=0.1), without_dropout(**UPDATE)
    rows = warm.collate(DEMONSTRATIONS)
    assert torch.equal(sft_loss(cold, rows)["loss"], sft_loss(warm, rows)["loss"])


def test_the_reward_loss_is_bradley_terry():
    model = judge()
    good, bad = (model.classifier(torch.tensor([[4, 5, x, 1]])).logits[0, 0] for x in (6, 9))
    found = reward_loss(model, DEMONSTRATIONS[:1])  # "the plot": "was" before "bad"
    assert torch.allclose(found["loss"], -torch.log(torch.sigmoid(good - bad)), atol=1e-5)
    assert found["accuracy"] == float(good > bad)


def test_the_kl_in_the_loss_pulls_the_new_policy_to_the_reference():
    policy, rollout = setting(kl_in="loss", kl_estimator="k2", vf_coef=0.0)
    mask = rollout.response_mask
    rollout.advantages = torch.zeros_like(rollout.advantages)  # nothing else to learn from
    rollout.ref_logprobs = rollout.ref_logprobs - 0.5 * mask
    _, observed = step(policy, ppo_part(policy, rollout, kl_coef=0.3))

    def kl_alone(policy, rows):
        logprobs, _, _ = policy(rows, 1.0)
        return {"loss": 0.3 * masked_mean(kl_penalty(logprobs, rows.ref_logprobs, "k2"), mask)}

    _, expected = step(policy, (kl_alone, rollout, 1.0))
    assert observed.abs().max() > 1e-3 and torch.allclose(observed, expected, atol=1e-6)


def test_approx_kl_is_schulmans_k3_of_the_step_from_old_to_new():
    policy, rollout = setting()
    rollout.old_logprobs = rollout.old_logprobs - 1.0 * rollout.response_mask
    stats, _ = step(policy, ppo_part(policy, rollout))
    assert stats["approx_kl"] == pytest.approx(math.e - 2, abs=1e-5)  # exp(d) − 1 − d with d = 1


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_gradient_checkpointing_reads_each_layer_twice_and_changes_no_gradient(family, tmp_path):
    results = []
    make_lm(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for checkpointing in (False, True):
        args = without_dropout(**UPDATE, gradient_checkpointing=checkpointing).args
        policy, calls = load_policy(str(tmp_path), args), []
        layers = policy.lm.model.layers if family == "Llama" else policy.lm.transformer.h
        layers[0].mlp.register_forward_pre_hook(lambda *x, calls=calls: calls.append(x))
        _, found = step(policy, (sft_loss, policy.collate(DEMONSTRATIONS), 1.0))
        results.append((found, len(calls)))
    (plain, once), (checkpointed, twice) = results
    assert (once, twice) == (1, 2) and torch.allclose(plain, checkpointed, atol=1e-6)


class StraightforwardPolicy(Policy):
    """Reads whole padded rows, and makes all logits at once."""

    def forward(self, rows, temperature):
        ids, mask, response_len = rows.sequence_ids, rows.sequence_mask, rows.response_mask.shape[1]
        named = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        output = self.lm(input_ids=ids, output_hidden_states=True, **named)
        logits = (output.logits / temperature).index_fill(-1, self.banned_ids, -1e30)
        log_probs = logits.log_softmax(-1)[:, -response_len - 1 : -1]
        logprobs = log_probs.gather(-1, ids[:, -response_len:, None]).squeeze(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        hidden = output.hidden_states[-1]
        if self.trunk is not None:
            hidden = self.trunk(input_ids=ids, **named).last_hidden_state
        values = self.value_head(hidden)[:, -response_len - 1 : -1, 0]
        return [x * rows.response_mask for x in (logprobs, entropies, values)]


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("settings", [
    {}, {"critic": "separate"}, {"ent_coef": 0.1, "temperature": 0.7},
    {"kl_in": "loss", "kl_estimator": "k2"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_straightforward_computation(family, settings, size):
    torch.manual_seed(0)
    dropout = {f"{x}_pdrop": 0.0 for x in ("attn", "embd", "resid")} if family == "GPT2" else {
        "attention_dropout": 0.0} | ({"hidden_dropout": 0.0} if family == "GPTNeoX" else {})
    policy = make_policy(make_lm(family, **dropout), **(UPDATE | settings))
    policy.add_critic(Score([None]))
    torch.nn.init.normal_(policy.value_head.weight)
    rollout = collect_rollout(policy, policy, PROMPTS, 3, policy.args)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"):
        x = getattr(rollout, name)
        noise = 0.3 * torch.randn(rollout.response_mask.shape)
        setattr(rollout, name, (noise if x is None else x + noise) * rollout.response_mask)
    parts = ppo_part(policy, rollout), (sft_loss, policy.collate(DEMONSTRATIONS), 0.5)
    stats, found = step(policy, *parts, microbatch_size=size)
    policy.__class__ = StraightforwardPolicy
    expected_stats, expected = step(policy, *parts)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert stats == pytest.approx(expected_stats, rel=1e-4, abs=1e-5)


def test_a_large_vocabulary_is_read_in_chunks_with_the_same_gradient():
    # With 2,000,000 tokens, the logits of three response tokens are one chunk.
    lm = make_lm("GPT2", vocab_size=2_000_000, n_embd=2, attn_pdrop=0.0, embd_pdrop=0.0,
                 resid_pdrop=0.0)
    policy = make_policy(lm, ent_coef=0.1, **UPDATE)
    rows, results = policy.encode(["the", "a b"], ["plot was", "dull good bad a"]), []
    for kind in (Policy, StraightforwardPolicy):
        policy.__class__, policy.value_head = kind, torch.nn.Linear(2, 1)
        logprobs, entropies, _ = policy(rows, 0.7)
        policy.zero_grad()
        (logprobs.sum() + 2 * entropies.sum()).backward()
        results.append((logprobs.detach(), entropies.detach(), lm.transformer.wte.weight.grad))
    assert rows.response_mask.sum() == 8
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# One step: clipping, checks -----------------------------------------------------------------------


def test_a_step_of_sgd_is_as_long_as_the_clipped_gradient():
    policy, rollout = setting(max_grad_norm=0.01)
    before = weights(policy)
    stats = update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), rollout)
    assert stats["grad_norm"] > 0.02
    assert abs((weights(policy) - before).norm().item() - 0.01) < 1e-4


def test_the_gradient_norm_in_the_log_is_that_before_clipping():
    policy, rollout = moved_setting()
    _, whole = step(policy, ppo_part(policy, rollout))
    stats, clipped = step(policy, ppo_part(policy, rollout), max_grad_norm=0.01)
    assert stats["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_update_before_it_reaches_the_weights(junk):
    policy, rollout = setting()
    rollout.returns[0, 0] = junk
    before = weights(policy)
    with pytest.raises(FloatingPointError, match=r"^ppo iteration 7 step 1: \w*loss is (nan|inf)"):
        update(policy, torch.optim.Adam(policy.parameters()), rollout, iteration=7)
    assert torch.equal(weights(policy), before)


def test_a_gradient_that_is_not_finite_stops_the_step_although_the_loss_is():
    model = WithOneWeight()  # at 0, where the root is 0 and its slope infinite
    args = without_dropout(**UPDATE).args
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match=r"^here: grad_norm is inf"):
        train_step(model, optimizer, [(lambda model, rows: {"loss": model.weight.sqrt().sum()},
                                       [1.0], 1.0)], "here", args)
    assert model.weight.item() == 0


# An update: steps and epochs ----------------------------------------------------------------------


class Observed(Rollout):
    """A rollout that writes down which of its rows are asked for."""

    asked = ()

    def __getitem__(self, idx):
        Observed.asked += (idx,)
        return super().__getitem__(idx)


def test_each_row_is_used_once_per_epoch_in_a_new_order():
    Observed.asked = ()
    policy, rollout = setting(minibatch_size=4, microbatch_size=2, update_epochs=2)
    gradients(policy, Observed(**vars(rollout)))
    a, b, c, d = Observed.asked  # two minibatches in each of two epochs
    first, second = a + b, c + d
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_another_iteration_has_another_order_and_the_same_one_the_same():
    policy, rollout = moved_setting(minibatch_size=4)
    first, again, other = (gradients(policy, rollout), gradients(policy, rollout),
                           gradients(policy, rollout, iteration=2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


def test_there_are_epochs_times_minibatches_optimizer_steps():
    policy, rollout = setting(update_epochs=3, minibatch_size=4)
    assert len(gradients(policy, rollout)) == 3 * 2


def test_each_step_of_the_update_begins_its_gradient_anew():
    policy, rollout = moved_setting(update_epochs=2)
    first, second = gradients(policy, rollout)
    assert torch.allclose(first, second, atol=1e-5)  # two epochs, no movement


def test_targets_stay_the_same_over_the_epochs():
    policy, rollout = setting(update_epochs=2, minibatch_size=4)
    before = copy.deepcopy(rollout)
    update(policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout)
    assert all(x is y is None or torch.equal(x, y) for x, y in
               zip(vars(rollout).values(), vars(before).values(), strict=True))


@pytest.mark.parametrize(("target_kl", "epochs"), [(0.71, 1), (0.73, 3), (None, 3)])
def test_target_kl_ends_the_update_after_an_epoch_whose_approx_kl_is_above_it(target_kl, epochs):
    policy, rollout = setting(update_epochs=3, minibatch_size=4, target_kl=target_kl)
    rollout.old_logprobs = rollout.old_logprobs - 1.0 * rollout.response_mask
    assert len(gradients(policy, rollout)) == epochs * 2  # approx_kl is e − 2 = 0.718


def test_target_kl_looks_at_the_last_epoch_and_not_at_the_mean_so_far():
    def after(**changes):
        policy, rollout = setting(minibatch_size=4)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        return update(policy, optimizer, rollout, **changes)["approx_kl"], weights(policy)

    first, _ = after(update_epochs=1)
    both, two_epochs = after(update_epochs=2)
    # Epoch 2 alone has 2 · both − first; the target lies half-way between that and both.
    _, stopped = after(update_epochs=3, target_kl=(3 * both - first) / 2)
    assert both > first and torch.equal(stopped, two_epochs)


def test_ratio_first_is_the_ratio_farthest_from_1_and_ratio_max_the_largest():
    policy, rollout = setting()
    rollout.old_logprobs[0, 0] -= math.log(3)  # ratio 3
    rollout.old_logprobs[1, 0] += math.log(4)  # ratio 1/4, which is as far from 1 as 4
    stats = update(policy, Recorder(policy), rollout)
    assert stats["ratio_max"] == pytest.approx(3, abs=1e-4)
    assert stats["ratio_first"] == pytest.approx(4, abs=1e-4)


def test_ratio_first_is_that_of_the_first_step_alone():
    policy, rollout = setting(update_epochs=3)
    stats = update(policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout)
    assert abs(stats["ratio_first"] - 1) < 1e-5 and stats["ratio_max"] > 1.01


def test_a_good_response_becomes_likelier_and_a_bad_one_less_likely():
    policy, rollout = setting()
    update(policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout)
    mask = rollout.response_mask
    new, _, _ = policy(rollout, 1.0)
    moved = (new - rollout.old_logprobs) * rollout.advantages
    assert moved[mask].sum() > 0


def test_the_entropy_bonus_raises_the_entropy():
    policy, rollout = setting(ent_coef=1.0, vf_coef=0.0)
    rollout.advantages = torch.zeros_like(rollout.advantages)  # nothing else to learn from
    update(policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout)
    mask = rollout.response_mask
    _, after, _ = policy(rollout, 1.0)
    assert after[mask].mean() > rollout.entropies[mask].mean()


def test_ptx_adds_the_gradient_of_the_sft_loss_times_its_coefficient():
    policy, rollout = setting(microbatch_size=3)
    alone, = gradients(policy, rollout)
    mixed, = gradients(policy, rollout, DEMONSTRATIONS[:1], ptx_coef=3.0)
    _, of_sft = step(policy, (sft_loss, policy.collate(DEMONSTRATIONS[:1]), 1.0))
    assert torch.allclose(mixed - alone, 3 * of_sft, atol=1e-5)


def test_the_ptx_loss_of_the_log_is_the_sft_loss_without_its_coefficient():
    policy, rollout = setting(microbatch_size=3)
    stats = update(policy, Recorder(policy), rollout, DEMONSTRATIONS[:1], ptx_coef=3.0)
    expected = sft_loss(policy, policy.collate(DEMONSTRATIONS[:1]))["loss"].item()
    assert stats["ptx_loss"] == pytest.approx(expected, rel=1e-5)


class Drawn(list):
    """A list that counts how often an item is taken."""

    count = 0

    def __getitem__(self, idx):
        self.count += 1
        return super().__getitem__(idx)


def test_ptx_draws_as_many_demonstrations_as_responses_for_every_step():
    policy, rollout = setting(minibatch_size=4, update_epochs=2, ptx_coef=1.0)
    demonstrations = Drawn(DEMONSTRATIONS)
    assert len(gradients(policy, rollout, demonstrations)) == 4 and demonstrations.count == 4 * 4


def test_ptx_draws_new_demonstrations_for_every_step():
    policy, rollout = setting(update_epochs=2)  # both steps see the same responses
    first, second = gradients(policy, rollout, DEMONSTRATIONS, ptx_coef=1.0)
    assert not torch.allclose(first, second, atol=1e-3)


# Stages 1 and 2 -----------------------------------------------------------------------------------


class WithOneWeight(torch.nn.Module):
    """A model that is one number, at first 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def collate(self, rows):
        return rows


def fit_slopes(slopes, epochs=1, peak=0.4, **changes):
    """fit on the loss slope · weight. Returns: the slopes in the order used, and each weight."""
    model, used, path, logged = WithOneWeight(), [], [], []

    def loss(model, rows):
        used.extend(rows)
        path.append(model.weight.item())
        return {"loss": (model.weight * sum(rows) / len(rows)).sum()}

    settings = {"minibatch_size": 1, "max_grad_norm": 2.0} | changes
    log = SimpleNamespace(args=without_dropout(**settings).args, silent=True, start=print,
                          scalars=lambda values, step: logged.append((step, values)))
    fit("test", model, loss, slopes, epochs, peak, log.args.seed, log)
    return used, [*path, model.weight.item()], logged


def test_fit_takes_steps_of_adam_on_clipped_gradients_at_rates_that_fall_to_0():
    used, path, _ = fit_slopes([1.0, 5.0, 1.5, 1.0])
    weight = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([weight], eps=1e-5)
    for slope, rate, after in zip(used, [0.4, 0.3, 0.2, 0.1], path[1:], strict=True):
        adam.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([min(slope, 2.0)])  # 5 is clipped to 2
        adam.step()
        assert after == pytest.approx(weight.item(), abs=1e-5)


def test_warm_up_and_annealing_of_ppo_leave_stages_1_and_2_alone():
    assert fit_slopes([1.0, 2.0]) == fit_slopes([1.0, 2.0], lr_warmup=5, anneal_lr=False)


def test_fit_sees_each_row_once_per_epoch_in_a_new_order():
    rows = [float(i) for i in range(1, 9)]
    used, _, _ = fit_slopes(rows, epochs=2, minibatch_size=4, microbatch_size=2)
    assert sorted(used[:8]) == sorted(used[8:]) == rows and used[:8] != used[8:]


def test_the_last_minibatch_of_an_epoch_may_be_smaller():
    used, _, logged = fit_slopes([1.0, 2.0, 3.0, 4.0, 5.0], epochs=2, minibatch_size=2,
                                 microbatch_size=2)
    assert sorted(used[:5]) == sorted(used[5:]) == [1, 2, 3, 4, 5]
    assert len(logged) == 2 * 3  # of 2, 2 and 1 rows


def test_fit_takes_a_step_per_epoch_on_fewer_rows_than_a_minibatch():
    used, path, _ = fit_slopes([1.0, 2.0], epochs=3, minibatch_size=32)
    assert len(used) == 6 and path[-1] < path[0] == 0


def test_fit_logs_each_step_under_the_name_of_its_stage():
    used, _, logged = fit_slopes([3.0, 1.0])
    assert [number for number, _ in logged] == [1, 2]
    assert [values["test/grad_norm"] for _, values in logged] == pytest.approx(used)
    assert logged[0][1]["test/loss"] == 0  # slope · 0


@pytest.mark.parametrize(("adam_eps", "share"), [(1e-5, 1 / 11), (1e-6, 1 / 2), (1e-12, 1)])
def test_the_first_step_of_adam_is_the_rate_times_gradient_over_gradient_plus_eps(adam_eps, share):
    _, path, _ = fit_slopes([1e-6], peak=0.4, adam_eps=adam_eps)
    assert path[-1] == pytest.approx(-0.4 * share, rel=1e-3)


def test_a_loss_that_is_not_finite_names_stage_and_step():
    with pytest.raises(FloatingPointError, match=r"^test step 1: loss is nan"):
        fit_slopes([float("nan")])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_held_out_mean_is_taken_over_tokens_whatever_the_microbatch(size):
    policy = without_dropout(**UPDATE | {"microbatch_size": size})
    rows = policy.collate(DEMONSTRATIONS)
    logprobs, _, _ = policy(rows, 1.0)
    expected = -logprobs[rows.response_mask].mean().item()
    found = held_out_mean(policy, sft_loss, "loss", DEMONSTRATIONS, policy.args)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_held_out_accuracy_is_the_share_of_comparisons_that_are_right():
    model, args = WithOneWeight(), without_dropout(microbatch_size=3).args

    def right(model, rows):
        return {"accuracy": torch.tensor(sum(x > 0 for x in rows) / len(rows))}

    assert held_out_mean(model, right, "accuracy", [1.0, -1.0, 2.0, 3.0], args) == (
        pytest.approx(0.75))


# Learning rates -----------------------------------------------------------------------------------


def rates(num_steps, *peaks, **schedule):
    """The learning rates of steps 1 to num_steps, one list for each peak."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "peak": peak} for peak in peaks]
    optimizer, found = torch.optim.SGD(groups, lr=0.0), []
    for number in range(1, num_steps + 1):
        set_learning_rates(optimizer, number, num_steps, **schedule)
        found.append([group["lr"] for group in optimizer.param_groups])
    return [list(x) for x in zip(*found, strict=True)]


def test_the_learning_rate_falls_linearly_to_zero():
    assert rates(4, 1.0) == [[1, 0.75, 0.5, 0.25]]


def test_the_learning_rate_warms_up_linearly():
    assert rates(4, 1.0, warmup=2, anneal=False) == [[0.5, 1, 1, 1]]
    assert rates(4, 1.0, warmup=2) == [[0.5, 0.75, 0.5, 0.25]]


def test_policy_and_critic_follow_one_schedule_from_their_own_peaks():
    policy, critic = rates(4, 1e-2, 1e-1)
    assert policy == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert critic == pytest.approx([1e-1, 7.5e-2, 5e-2, 2.5e-2])


# Critics ------------------------------------------------------------------------------------------


def test_a_shared_critic_starts_at_zero_and_has_no_trunk():
    policy, rollout = setting()
    assert (rollout.old_values == 0).all() and policy.trunk is None


def values_of(policy, text):
    """The value of the first response token behind a prompt."""
    rows = policy.encode([text], ["was"])
    _, _, values = policy(rows, 1.0)
    return values[0, 0]


def test_a_separate_critic_starts_from_the_normalised_score_of_the_prompt():
    policy, model = without_dropout(**UPDATE, critic="separate"), judge()
    score = Score([model])
    score.norms = [(2.0, 3.0)]  # offset and scale
    policy.add_critic(score)
    score_of_the_prompt = model.classifier(torch.tensor([[4, 5]])).logits[0, 0]
    assert torch.allclose(values_of(policy, "the plot"), (score_of_the_prompt - 2) / 3, atol=1e-5)


def test_a_separate_critic_starts_at_zero_where_the_reward_model_reads_other_tokens():
    policy, model = without_dropout(**UPDATE, critic="separate"), judge()
    model.tokenizer = make_tokenizer(eos_token="[STOP]")  # a token that has another id here
    policy.tokenizer = make_tokenizer(additional_special_tokens=["[NEW]"])
    policy.add_critic(Score([model]))
    assert values_of(policy, "the plot") == 0
    for mine, its in zip(policy.trunk.parameters(), policy.lm.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_same_words_with_other_ids_are_other_tokens_for_the_critic():
    policy, model = without_dropout(**UPDATE, critic="separate"), judge()
    description = json.loads(policy.tokenizer.backend_tokenizer.to_str())
    vocab = description["model"]["vocab"]
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    model.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(description)))
    policy.add_critic(Score([model]))
    assert values_of(policy, "the plot") == 0


def test_a_separate_critic_leaves_the_policys_gradient_alone():
    found = []
    for vf_coef in (0.0, 10.0):
        policy = without_dropout(**UPDATE, critic="separate", vf_coef=vf_coef)
        policy.add_critic(Score([None]))
        torch.nn.init.ones_(policy.value_head.weight)  # 0 would pass no gradient on
        _, whole = step(policy, ppo_part(policy, setting()[1]))
        found.append(whole[: sum(x.numel() for x in policy.lm.parameters())])
    assert torch.equal(*found) and found[0].abs().max() > 1e-3


def test_a_separate_critic_trains_a_trunk_of_its_own_and_not_the_reward_model():
    policy, model = without_dropout(**UPDATE, critic="separate"), judge().requires_grad_(False)
    policy.add_critic(Score([model]))
    frozen, trunk = weights(model), weights(policy.trunk)
    rollout = setting()[1]
    update(policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout, update_epochs=2)
    assert torch.equal(weights(model), frozen) and not torch.equal(weights(policy.trunk), trunk)


# What surrounds the update ------------------------------------------------------------------------


def test_nothing_stored_in_a_rollout_requires_grad():
    _, rollout = setting()
    assert not any(x.requires_grad for x in vars(rollout).values() if x is not None)


class Fixed:
    """A source of scores that always gives the same."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def score(self, rows, responses, tokens, ended):
        return list(self.scores)


def normalised(scores, score_norm):
    """The scores as a run sees them, after --score-norm was measured on them."""
    policy = without_dropout(**UPDATE, score_norm=score_norm)
    score, rows = Score([Fixed(scores)]), [{"prompt": x} for x in PROMPTS]
    score.measure(policy, rows, policy.args)
    return score(rows, [], [], torch.ones(8))[0].tolist()


def test_score_norm_gives_the_sft_policys_scores_mean_0_and_std_1_or_mean_0_or_neither():
    raw = [30.0, 50.0] * 4  # mean 40, std 10
    assert normalised(raw, "sft") == pytest.approx([-1, 1] * 4)
    assert normalised(raw, "center") == pytest.approx([-10, 10] * 4)
    assert normalised(raw, "none") == pytest.approx([30, 50] * 4)


def test_scores_that_are_the_same_everywhere_are_only_shifted():
    assert normalised([7.0] * 8, "sft") == [0.0] * 8
