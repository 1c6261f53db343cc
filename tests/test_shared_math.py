"""Claim: functions that both files have are one function, but for the mask.

Reference: each file is the other's reference, on inputs where they must agree.
Run: python -m pytest tests/test_shared_math.py (2 seconds)
"""

import inspect
import math

import pytest
import torch
from conftest import make_policy

import ppo_classic
import ppo_rlhf

SHARED = "check_same_shape", "explained_variance", "gae", "kl_penalty", "policy_loss", "value_loss"
EVERYWHERE = torch.ones(4, 7, dtype=torch.bool)


def draw(*shape):
    """Random numbers, the same ones in every test."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SHARED)
def test_arguments_keep_their_names_and_their_order(name):
    here, there = (list(inspect.signature(getattr(x, name)).parameters)
                   for x in (ppo_classic, ppo_rlhf))
    own = {"mask", "estimator", "next_values", "terminated", "truncated"}
    assert [x for x in here if x not in own] == [x for x in there if x not in own]


@pytest.mark.parametrize("clip_coef", [0.2, math.inf])
@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_losses_agree_where_every_token_is_real(name, clip_coef):
    new_old_and_targets = draw(3, 4, 7)
    masked = getattr(ppo_rlhf, name)(*new_old_and_targets, EVERYWHERE, clip_coef)
    flat = getattr(ppo_classic, name)(*new_old_and_targets.flatten(1), clip_coef)
    torch.testing.assert_close(masked, flat)


def test_gae_agrees_if_responses_are_episodes_that_terminate():
    rewards, values = draw(2, 4, 7)
    lens = torch.tensor([7, 5, 1, 3])
    mask = torch.arange(7) < lens[:, None]  # (batch, response_len)
    terminated = torch.arange(7) == lens[:, None] - 1
    masked, _ = ppo_rlhf.gae(rewards, values, mask, 0.9, 0.8)
    next_values = values.roll(-1, dims=1)  # of the last token: never read
    classic, _ = ppo_classic.gae(rewards.T, values.T, next_values.T, terminated.T,
                                 torch.zeros(7, 4, dtype=torch.bool), 0.9, 0.8)
    torch.testing.assert_close(masked[mask], classic.T[mask])


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-4])  # in rounding, too
def test_the_kl_of_the_classic_file_is_k3(unit):
    old, new = draw(2, 4, 7) * unit
    torch.testing.assert_close(ppo_classic.kl_penalty(old, new),
                               ppo_rlhf.kl_penalty(old, new, "k3"), atol=0, rtol=1e-5)


def test_the_classic_file_refuses_shapes_that_would_broadcast_too():
    with pytest.raises(ValueError, match="shapes differ"):
        ppo_classic.value_loss(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), 0.2)


@pytest.mark.parametrize(("returns", "constant"), [
    (draw(28), False), (1e-4 * draw(28), False), (1e4 * draw(28), False), (torch.zeros(28), True),
    (torch.full((28,), 0.1), True), (1e4 + 1e-4 * torch.arange(28.0), True)])  # up to rounding
def test_explained_variance_agrees_in_any_unit_and_is_nan_for_constant_returns(returns, constant):
    for values in (returns, returns + (returns.std() + 0.1) * draw(2, 28)[1]):
        found = ppo_classic.explained_variance(returns, values)
        expected = ppo_rlhf.explained_variance(returns, values, EVERYWHERE.flatten())
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert math.isnan(found) == constant


def test_log_probabilities_entropies_and_whitening_agree():
    policy, numbers = make_policy(), draw(4, 7)
    batch = ppo_rlhf.encode(policy, [{"prompt": "the", "chosen": " plot was"}], "chosen")
    logprobs, _, entropies = policy(batch, 1.0, with_entropies=True)
    logits, ids = policy.lm(batch.sequence_ids).logits[:, :-1], batch.sequence_ids[:, 1:]
    for a, b in [
        (ppo_classic.logprobs_from_logits(logits, ids), logprobs),
        (ppo_classic.entropy(logits), entropies),
        (ppo_classic.whiten(numbers), ppo_rlhf.masked_whiten(numbers, EVERYWHERE)),
    ]:
        torch.testing.assert_close(a, b)
