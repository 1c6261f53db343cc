"""Claim: on a language whose every response can be enumerated, PPO nears the exact optimum of
J(π) = E[r] − β·KL(π ‖ π_ref), and the enumeration that says so is itself right.

Reference: benchmarks/optimum.py, here with up to 3 tokens (8 words, 8 prompts: 4,680 responses);
its recursions are held against plain sums over all responses.
Run: python -m pytest tests/test_optimum.py (20 seconds)
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import ppo_rlhf

sys.path.insert(0, str(Path(ppo_rlhf.__file__).parent / "benchmarks"))
import optimum as bandit

bandit.MAX_LEN, BETA = 3, 0.2


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    """Reference, reward model and prompts of instance 18, on disk: at its optimum three responses
    in ten end by EOS, the others at the limit."""
    folder = tmp_path_factory.mktemp("bandit")
    bandit.make_instance(folder, 18)
    return folder


@pytest.fixture(scope="module")
def tables(instance):
    """log π_ref of every next token, and the reward of every response."""
    return bandit.read_instance(instance)


def test_the_probabilities_of_all_responses_sum_to_one(tables):
    probabilities = bandit.response_probabilities(tables[0])
    assert probabilities.shape == (8, 8**0 + 8**1 + 8**2 + 8**3)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(8, dtype=torch.double))


def test_the_optimum_is_beta_log_mean_exp_reward_over_beta_and_its_policy_has_the_weights(tables):
    reference, rewards = tables
    all_rewards = torch.cat(rewards, dim=1)  # (prompts, responses), in the same order
    weights = bandit.response_probabilities(reference) * (all_rewards / BETA).exp()
    best, policy = bandit.optimum(reference, rewards, BETA)
    assert best == pytest.approx((BETA * weights.sum(dim=1).log()).mean().item())
    probabilities = bandit.response_probabilities(policy)
    assert torch.allclose(probabilities, weights / weights.sum(dim=1, keepdim=True))
    assert bandit.objective(policy, reference, rewards, BETA).item() == pytest.approx(best)


def test_the_objective_is_mean_reward_minus_beta_kl_over_all_responses(tables):
    reference, rewards = tables
    _, policy = bandit.optimum(reference, rewards, 1.0)  # some policy that is not the reference
    p, q = (bandit.response_probabilities(x) for x in (policy, reference))
    by_hand = (p * (torch.cat(rewards, 1) - BETA * (p / q).log())).sum(dim=1).mean()
    assert bandit.objective(policy, reference, rewards, BETA).item() == pytest.approx(by_hand)


def test_ppo_gains_nine_tenths_of_what_can_be_gained(instance, tmp_path):
    args = ppo_rlhf.Args(
        dataset=str(instance / "prompts.jsonl"), policy_model=str(instance / "reference"),
        reward_model=(str(instance / "reward_model"),), sft_epochs=0, kl_coef=BETA, response_len=3,
        max_prompt_len=4, missing_eos_penalty=0.0, critic="separate", batch_size=256,
        minibatch_size=64, total_episodes=10_240, output_dir=str(tmp_path), run_name="run",
        learning_rate=3e-3, critic_learning_rate=1e-3, save_interval=100, device="cpu",
        eval_prompts=0, norm_scores=False)
    with contextlib.redirect_stdout(None):
        ppo_rlhf.main(args)
    found = bandit.report(tmp_path / "run" / "policy", instance, BETA)
    assert found["share"] > 0.9 and found["total_variation"] < 0.35
    assert found["kl"] == pytest.approx(found["kl_optimum"], rel=0.2)
    assert found["eos"] == pytest.approx(found["eos_optimum"], abs=0.1)
