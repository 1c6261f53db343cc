"""Claim: functions that both files have are one function, but for the mask.

Reference: each file is the other's reference, on inputs where they must agree.
Run: python -m pytest tests/test_shared_math.py (2 seconds)
"""

import inspect

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


def test_policy_loss_agrees_where_every_token_is_real():
    new, old, advantages = draw(3, 4, 7)
    masked = ppo_rlhf.policy_loss(new, old, advantages, EVERYWHERE, 0.2)
    flat = ppo_classic.policy_loss(new.flatten(), old.flatten(), advantages.flatten(), 0.2)
    torch.testing.assert_close(masked, flat)


def test_value_loss_agrees_where_every_token_is_real():
    new, old, returns = draw(3, 4, 7)
    masked = ppo_rlhf.value_loss(new, old, returns, EVERYWHERE, 0.2)
    flat = ppo_classic.value_loss(new.flatten(), old.flatten(), returns.flatten(), 0.2)
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


def test_the_kl_of_the_classic_file_is_k3():
    old, new = draw(2, 4, 7)
    torch.testing.assert_close(ppo_classic.kl_penalty(old, new),
                               ppo_rlhf.kl_penalty(old, new, "k3"))


def test_log_probabilities_entropies_whitening_and_explained_variance_agree():
    policy, pair = make_policy(), draw(2, 4, 7)
    batch = ppo_rlhf.encode(policy, [{"prompt": "the", "chosen": " plot was"}], "chosen")
    logprobs, _, entropies = policy(batch, 1.0, with_entropies=True)
    logits, ids = policy.lm(batch.sequence_ids).logits[:, :-1], batch.sequence_ids[:, 1:]
    for a, b in [
        (ppo_classic.logprobs_from_logits(logits, ids), logprobs),
        (ppo_classic.entropy(logits), entropies),
        (ppo_classic.whiten(pair[0]), ppo_rlhf.masked_whiten(pair[0], EVERYWHERE)),
        (ppo_classic.explained_variance(*pair), ppo_rlhf.explained_variance(*pair, EVERYWHERE)),
    ]:
        torch.testing.assert_close(a, b)
