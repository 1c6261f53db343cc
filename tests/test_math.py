"""Claim: every formula of ppo_rlhf.py is the one in its docstring.

Reference: arithmetic in the comments, autograd, exact expectations over a tiny vocabulary.
Run: python -m pytest tests/test_math.py (2 seconds)
"""

import math

import pytest
import torch

import ppo_rlhf as ppo

NAN = float("nan")


def row(*numbers):
    """A batch of one response."""
    return torch.tensor([numbers], dtype=torch.float32)


def mask(*ones):
    """Its response_mask."""
    return torch.tensor([ones], dtype=torch.bool)


def close(actual, expected, tolerance=1e-6):
    """Whether tensors or numbers agree."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float32) for x in (actual, expected))
    return torch.allclose(actual, expected, atol=tolerance)


# masked_mean, masked_whiten ----------------------------------------------------------------------

@pytest.mark.parametrize("padding", [100.0, NAN])  # 0 * NaN would be NaN
def test_masked_mean_counts_only_real_tokens(padding):
    assert ppo.masked_mean(row(1, 3, padding), mask(1, 1, 0)) == 2.0
    assert ppo.masked_mean(row(1, padding), mask(0, 0)).isnan()  # 0 / 0; optimizer_step stops at it
    x, real = torch.cat([row(1, 3), row(5, padding)]), torch.cat([mask(1, 1), mask(1, 0)])
    assert ppo.masked_mean(x, real, dim=1).tolist() == [2.0, 5.0]  # one mean per response
    assert ppo.masked_mean(x, real) == 3.0  # over tokens, (1 + 3 + 5) / 3, not over responses


def test_whitened_tokens_have_mean_zero_or_as_before_and_std_one_over_real_tokens():
    # (1, 3): mean 2, biased std 1 -> (-1, 1); padding becomes 0.
    assert close(ppo.masked_whiten(row(1, 3, 100), mask(1, 1, 0)), row(-1, 1, 0), 1e-4)
    assert ppo.masked_whiten(row(7), mask(1)).item() == 0.0  # a single token: std 0, and yet finite
    # Without shift the mean stays: (2, 6) has mean 4 and std 2 -> (2 - 4) / 2 + 4 = 3 and 5.
    assert close(ppo.masked_whiten(row(2, 6), mask(1, 1), shift_mean=False), row(3, 5), 1e-4)


# kl_penalty --------------------------------------------------------------------------------------

P, Q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])  # policy, reference
EXACT_KL = (P * (P / Q).log()).sum()


def test_k1_k2_k3_by_hand():
    # d = log(1/2) - log(1/4) = log 2: k1 = 0.693, k2 = 0.240, k3 = 1/2 - 1 + 0.693 = 0.193.
    logprobs, ref_logprobs = row(math.log(0.5)), row(math.log(0.25))
    values = [ppo.kl_penalty(logprobs, ref_logprobs, k).item() for k in ("k1", "k2", "k3")]
    assert close(values, [0.693147, 0.240227, 0.193147])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_policies_have_no_kl_and_only_the_ratio_counts(estimator):
    assert close(ppo.kl_penalty(P.log(), P.log(), estimator), torch.zeros(3))
    shifted = ppo.kl_penalty(P.log() - 5, Q.log() - 5, estimator)
    assert close(shifted, ppo.kl_penalty(P.log(), Q.log(), estimator), 1e-5)


@pytest.mark.parametrize("d", [1e-2, -1e-3, 1e-4, -1e-4])
def test_for_small_steps_k2_and_k3_are_half_the_square_of_k1(d):
    # k3 = d²/2 - d³/6 + …, of 1e-4: 5.0e-9. In float32, exp(-d) - 1 + d is wrong by 6e-8.
    k1, k2, k3 = (ppo.kl_penalty(row(d), row(0), k).item() for k in ("k1", "k2", "k3"))
    assert close(k1, d) and k2 == pytest.approx(d**2 / 2, rel=1e-6)
    assert k3 == pytest.approx(d**2 / 2 - d**3 / 6, rel=2e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_average_to_the_exact_kl(estimator):
    assert close((P * ppo.kl_penalty(P.log(), Q.log(), estimator)).sum(), EXACT_KL)


def test_k2_is_biased_k3_is_never_negative_and_k1_can_be():
    # Σ P·½·log²(P/Q) = 0.7·0.359 + 0.2·0.082 + 0.1·0.961 = 0.364; the KL is 0.373.
    assert close((P * ppo.kl_penalty(P.log(), Q.log(), "k2")).sum(), 0.3638, 1e-3)
    assert close(EXACT_KL, 0.3734, 1e-3)
    assert (ppo.kl_penalty(P.log(), Q.log(), "k3") >= 0).all()
    assert (ppo.kl_penalty(P.log(), Q.log(), "k1") < 0).any()


def kl_gradients(estimator, ref=Q):
    """Exact gradient of KL, and the expected gradient of the estimator as reward and as loss."""
    logits = P.log().clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    penalty = ppo.kl_penalty(logprobs, ref.log(), estimator)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - ref.log())).sum(), logits,
                                retain_graph=True)[0]
    as_reward = torch.autograd.grad((P * penalty.detach() * logprobs).sum(), logits,
                                    retain_graph=True)[0]
    return exact, as_reward, torch.autograd.grad((P * penalty).sum(), logits)[0]


def test_in_the_reward_k1_has_the_gradient_of_the_kl_and_near_the_reference_k2_and_k3_hardly_any():
    for ref in (Q, P + torch.tensor([-0.01, 0.01, 0.0])):
        exact, k1, _ = kl_gradients("k1", ref)
        assert close(k1, exact)
    k2, k3 = (kl_gradients(estimator, ref)[1] for estimator in ("k2", "k3"))
    assert max(k2.norm(), k3.norm()) < 0.05 * exact.norm()


def test_in_the_loss_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_forward_kl():
    exact, _, k2 = kl_gradients("k2")
    k1, k3 = kl_gradients("k1")[2], kl_gradients("k3")[2]
    assert close(k1, torch.zeros(3)) and close(k2, exact)
    # The gradient of KL(ref || policy) with respect to the policy's logits is P - Q.
    assert close(k3, P - Q) and not close(k3, exact, 0.01)


def test_an_unknown_estimator_and_shapes_that_would_broadcast_are_errors():
    one, two, real = torch.ones(2, 1), torch.ones(2, 2), torch.ones(2, 2) > 0
    for said, function, *arguments in [("k4", ppo.kl_penalty, two, two, "k4"),
                                       ("shapes differ", ppo.masked_mean, one, real),
                                       ("shapes differ", ppo.value_loss, one, two, two, real, 0.2)]:
        with pytest.raises(ValueError, match=said):
            function(*arguments)


# token_rewards -----------------------------------------------------------------------------------

def test_the_score_lands_on_the_last_real_token():
    scores = torch.tensor([5.0, 0.0, 2.0])  # a score of 0 is a score
    kl = torch.cat([row(1, 2, NAN), row(3, NAN, NAN), row(-1, 2, 4)])
    response_mask = torch.cat([mask(1, 1, 0), mask(1, 0, 0), mask(1, 1, 1)])
    rewards = ppo.token_rewards(scores, kl, response_mask, 0.1)  # 5 - 0.1 · 2 = 4.8
    assert close(rewards, [[-0.1, 4.8, 0], [-0.3, 0, 0], [0.1, -0.2, 1.6]])


# gae ---------------------------------------------------------------------------------------------

def test_gae_of_three_tokens_by_hand():
    # gamma 1, lambda 1/2.  A2 = 1 - 0.5 = 0.5;  A1 = 0 + 0.5 - 0.2 + 0.5 * 0.5 = 0.55;
    # A0 = 0 + 0.2 - 0.1 + 0.5 * 0.55 = 0.375.  returns = A + V.
    advantages, returns = ppo.gae(row(0, 0, 1), row(0.1, 0.2, 0.5), mask(1, 1, 1), 1.0, 0.5)
    assert close(advantages, row(0.375, 0.55, 0.5))
    assert close(returns, row(0.475, 0.75, 1.0))


@pytest.mark.parametrize("padding", [0, 100, NAN])
def test_values_in_the_padding_do_not_bootstrap_into_real_tokens(padding):
    rewards, values = row(0, 1, padding), row(2, 3, padding)
    advantages, returns = ppo.gae(rewards, values, mask(1, 1, 0), 1.0, 0.5)
    assert close(advantages, row(0, -2, 0))  # δ = 0 + 3 - 2 = 1 and 1 - 3 = -2; A0 = 1 - 0.5 · 2
    assert close(returns, row(2, 1, 0))


@pytest.mark.parametrize(("gamma", "lam", "to_come"), [
    (1.0, 1.0, (7, 6, 4)), (0.5, 1.0, (3, 4, 4)),  # 1 + 2 + 4 = 7; 1 + 0.5·(2 + 0.5·4) = 3
    (0.5, 0.0, (5, 5.5, 4))])  # 1 + 0.5·8 = 5; 2 + 0.5·7 = 5.5
def test_lambda_one_counts_all_rewards_and_lambda_zero_one_and_a_value(gamma, lam, to_come):
    advantages, returns = ppo.gae(row(1, 2, 4), row(9, 8, 7), mask(1, 1, 1), gamma, lam)
    assert close(returns, row(*to_come)) and close(advantages, row(*to_come) - row(9, 8, 7))


def test_without_critic_and_discount_every_token_gets_the_score():
    rewards = ppo.token_rewards(torch.tensor([2.0]), row(0, 0, 0), mask(1, 1, 0), 0.0)
    assert close(ppo.gae(rewards, row(0, 0, 0), mask(1, 1, 0), 1.0, 1.0)[0], row(2, 2, 0))


def test_score_minus_value_of_the_prompt_is_the_case_of_a_constant_critic():
    rewards, values = row(0, 0, 2), row(0.5, 0.5, 0.5)
    assert close(ppo.gae(rewards, values, mask(1, 1, 1), 1.0, 1.0)[0], row(1.5, 1.5, 1.5))


def test_gae_equals_the_double_sum_of_its_definition():
    rewards, values, gamma, lam = torch.randn(1, 5), torch.randn(1, 5), 0.9, 0.7
    following = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    deltas = (rewards + gamma * following - values)[0]
    sums = [sum((gamma * lam) ** k * deltas[t + k] for k in range(5 - t)) for t in range(5)]
    advantages, _ = ppo.gae(rewards, values, mask(1, 1, 1, 1, 1), gamma, lam)
    assert close(advantages[0], sums)


# compute_advantages ------------------------------------------------------------------------------

def scored(*scores):
    """Two real tokens and one padded slot, ended; three real tokens, cut at the limit."""
    zeros, real = torch.zeros(2, 3), torch.cat([mask(1, 1, 0), mask(1, 1, 1)])
    return ppo.Rollout(zeros, zeros, real, torch.tensor([True, False]), zeros, zeros, zeros,
                   torch.tensor(scores))


DENSE = [1.0, 2.0, 9.0], [3.0, 4.0, 5.0]
PENALTY = {"missing_eos_penalty": 3.0}  # at the end of the response that was cut


@pytest.mark.parametrize(("scores", "kl_coef", "settings", "expected"), [
    ((1.0, 2.0), 0.0, {}, [[0, 1, 0], [0, 0, 2]]),
    (DENSE, 0.5, {}, [[0.5, 1.5, 0], [2.5, 3.5, 4.5]]),
    ((1.0, 2.0), 0.0, PENALTY, [[0, 1, 0], [0, 0, -1]]),
    (DENSE, 0.0, PENALTY, [[1, 2, 0], [3, 4, 2]]),
    ((1.0, 2.0), 0.5, {}, [[-0.5, 0.5, 0], [-0.5, -0.5, 1.5]]),  # k1 is 1 at each token
    ((1.0, 2.0), 0.5, {"kl_in": "loss", "kl_estimator": "k2"}, [[0, 1, 0], [0, 0, 2]]),
    # 0, 1, 0, 0, 2: mean 0.6 and std 0.8. With the penalty 0, 1, 0, 0, -1: mean 0, variance 0.4.
    ((1.0, 2.0), 0.0, {"whiten_rewards": True}, [[-0.15, 1.1, 0], [-0.15, -0.15, 2.35]]),
    ((1.0, 2.0), 0.0, {"whiten_rewards": True} | PENALTY,
     [[0, 2.5**0.5, 0], [0, 0, -(2.5**0.5)]]),
])
def test_rewards_are_score_kl_and_penalty(scores, kl_coef, settings, expected):
    rollout = scored(*scores)
    rollout.ref_logprobs = torch.full((2, 3), -1.0)
    args = ppo.Args(**({"missing_eos_penalty": 0.0, "gae_lambda": 1.0} | settings))
    _, returns = ppo.compute_advantages(rollout, kl_coef, args)  # λ = 1: sums of rewards to come
    assert close(returns - torch.nn.functional.pad(returns[:, 1:], (0, 1)), expected)


def test_the_value_of_the_next_token_is_discounted_by_gamma_and_not_by_lambda():
    rollout = scored(1.0, 0.0)  # rewards of row 0: 0, 1
    rollout.old_values = torch.cat([row(0, 1, 0), row(0, 0, 0)])
    _, returns = ppo.compute_advantages(rollout, 0.0, ppo.Args(gamma=0.5, gae_lambda=0.9))
    # δ₁ = 1 - 1 = 0 and δ₀ = 0 + γ · 1 - 0 = 0.5; returns are δ + V.
    assert returns[0, :2].tolist() == [0.5, 1]


def test_advantages_are_whitened_and_returns_are_not():
    # All values are 0, so returns are the rewards to come. Their mean is 2.8, their variance 2.16.
    args = ppo.Args(missing_eos_penalty=0.0, gae_lambda=1.0)
    advantages, returns = ppo.compute_advantages(scored(1.0, 4.0), 0.0, args)
    assert returns.tolist() == [[1, 1, 0], [4, 4, 4]]
    assert close(advantages[returns != 0], (returns[returns != 0] - 2.8) / 2.16**0.5)


# policy_loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ratio", "advantage", "clip_coef", "objective", "cut"), [
    (1.5, 1, 0.2, 1.2, True), (0.5, 1, 0.2, 0.5, False), (1.5, -1, 0.2, -1.5, False),
    (0.5, -1, 0.2, -0.8, True), (3, 1, 100, 3, False)])  # a huge clip_coef clips nothing
def test_the_four_corners_of_clipping(ratio, advantage, clip_coef, objective, cut):
    new_logprobs = row(math.log(ratio)).requires_grad_()
    loss, clipfrac = ppo.policy_loss(new_logprobs, row(0), row(advantage), mask(1), clip_coef)
    loss.backward()
    assert close(loss, -objective) and clipfrac == cut
    assert (new_logprobs.grad.item() == 0) == cut


def test_the_clip_fraction_is_a_share_of_real_tokens():
    doubled, start = row(*[math.log(2)] * 4), row(0, 0, 0, 0)
    _, clipfrac = ppo.policy_loss(doubled, start, row(1, -1, 1, 1), mask(1, 1, 0, 0), 0.2)
    assert clipfrac == 0.5  # of the two real tokens one is cut; the padding is not asked


def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_and_has_the_policy_gradient():
    logprobs = row(-1, -2).requires_grad_()
    loss, clipfrac = ppo.policy_loss(logprobs, logprobs.detach(), row(3, 5), mask(1, 1), 0.2)
    loss.backward()
    assert close(loss, -4.0) and clipfrac == 0
    assert close(logprobs.grad, row(-1.5, -2.5))  # -A / number of tokens


# value_loss --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("new", "target", "clip", "error", "cut"), [
    (5.1, 7, 0.2, -1.9, False),  # V moves from 5 to 5.1: the loss is half the squared error
    (6, 6, 0.2, -0.8, True),  # to its target: clipped to 5.2, error 0.8 instead of 0
    (6, 6, math.inf, 0, False),  # the same without a limit
    (4, 6, 0.2, -2, False)])  # away from its target: the clipped error, 1.2, is the smaller one
def test_value_clipping_takes_the_larger_error(new, target, clip, error, cut):
    new_values = row(new).requires_grad_()
    loss, clipfrac = ppo.value_loss(new_values, row(5), row(target), mask(1), clip)
    loss.backward()
    assert close(loss, 0.5 * error**2) and clipfrac == cut
    assert close(new_values.grad, row(0 if cut else error))


@pytest.mark.parametrize("poison", [1e4, NAN])
def test_losses_and_gradients_are_blind_to_the_padding(poison):
    def run(junk):
        new = row(0.1, -0.2, junk).requires_grad_()
        loss = ppo.policy_loss(new, row(0, 0, junk), row(1, -1, junk), mask(1, 1, 0), 0.2)[0]
        loss = loss + ppo.value_loss(new, row(0, 0, junk), row(1, 1, junk), mask(1, 1, 0), 0.2)[0]
        loss.backward()
        return torch.cat([loss[None], new.grad[0]])

    assert torch.equal(run(poison), run(0.0))


# adaptive_kl_coef, explained_variance ------------------------------------------------------------

@pytest.mark.parametrize(("observed_kl", "factor"), [
    (6.0, 1), (6.6, 1.05), (5.4, 0.95),  # at the target, a tenth above: 1 + 1/20; a tenth below
    (-6.0, 0.9), (0.0, 0.9), (4.7, 0.9), (7.3, 1.1), (60.0, 1.1), (1e9, 1.1)])  # cut at 4.8, 7.2
def test_the_kl_coefficient_follows_the_kl_by_at_most_a_tenth(observed_kl, factor):
    assert ppo.adaptive_kl_coef(0.1, observed_kl, 6.0) == pytest.approx(0.1 * factor, abs=1e-12)


def test_explained_variance_of_a_perfect_a_constant_and_a_bad_critic_and_of_constant_returns():
    returns, ones = row(1, 2, 3, NAN), mask(1, 1, 1, 0)
    assert close(ppo.explained_variance(returns, returns, ones), 1.0)
    assert close(ppo.explained_variance(returns, row(5, 5, 5, NAN), ones), 0.0)
    assert close(ppo.explained_variance(returns, row(3, 2, 1, NAN), ones), -3.0)
    for constant in (row(2, 2, 2), row(2, 2 + 1e-6, 2)):  # up to rounding
        assert math.isnan(ppo.explained_variance(constant, row(1, 2, 3), mask(1, 1, 1)))
