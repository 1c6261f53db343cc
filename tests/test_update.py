"""Claim: the update does what its flags say, on every token once per epoch, and on nothing else.

Reference: the gradient of one whole minibatch; recorded rows, minibatches and optimizer steps.
Run: python -m pytest tests/test_update.py (10 seconds)
"""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_reward_model

import ppo_rlhf
from ppo_rlhf import (
    ActorCritic,
    Args,
    Data,
    Policy,
    ScoreNorm,
    accumulate_gradients,
    accuracy,
    backward_minibatch,
    collect_rollout,
    compute_advantages,
    compute_rewards,
    count_response_tokens,
    fit,
    gae,
    kl_penalty,
    lr_scale,
    make_actor_critic,
    make_optimizer,
    masked_mean,
    measure_score_norm,
    perplexity,
    reward_loss_sum,
    set_learning_rates,
    sft_loss_sum,
    shuffled_minibatches,
    update_policy,
)

PROMPTS = [[4], [5, 6, 7], [8, 9], [10]] * 2
EXAMPLES = [([4, 5], [6, 1]), ([7], [8, 9, 10, 11, 1]), ([5], [1]), ([9, 9, 9], [4, 5, 6])]
ARGS = Args(response_len=6, batch_size=8, minibatch_size=4, microbatch_size=4, learning_rate=1e-2,
            critic_learning_rate=1e-2, update_epochs=2)


def setting(args=ARGS, family="Llama"):
    """An actor-critic and a rollout of 8 ragged rows with random scores."""
    actor_critic = ActorCritic(Policy(make_lm(family), 0, [1]))
    reference = copy.deepcopy(actor_critic.policy).requires_grad_(False)
    rollout = collect_rollout(actor_critic, reference, PROMPTS, args, seed=3)
    torch.manual_seed(0)
    rollout.scores = torch.randn(8)
    rollout.rewards = compute_rewards(rollout, ScoreNorm(), args.kl_coef, args)
    rollout.advantages, rollout.returns = compute_advantages(rollout, args)
    return actor_critic, rollout


def moved_setting():
    """The same in the middle of an update: new and old differ, and some tokens are clipped."""
    actor_critic, rollout = setting()
    for name in ("old_logprobs", "old_values"):
        noise = 0.3 * torch.randn(rollout.response_mask.shape)
        setattr(rollout, name, getattr(rollout, name) + noise * rollout.response_mask)
    return actor_critic, rollout


def gradient(model):
    """All gradients in one vector."""
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])


def minibatch_gradient(args):
    """Gradient of the PPO loss of all 8 rows."""
    actor_critic, rollout = moved_setting()
    rollout.ref_logprobs = rollout.ref_logprobs - 0.1 * rollout.response_mask
    backward_minibatch(actor_critic, rollout, 0.05, args)
    return gradient(actor_critic)


def run_update(args, rng=0):
    """One update_policy. Returns: its statistics and the policy's parameters after it."""
    actor_critic, rollout = setting(args)
    optimizer = make_optimizer(actor_critic, args)
    stats = update_policy(actor_critic, optimizer, rollout, 0.05, args, rng, None, [])
    return stats, torch.cat([x.detach().flatten() for x in actor_critic.parameters()])


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_microbatches_of_ragged_rows_add_up_to_the_minibatch(microbatch_size, kl_in):
    whole = replace(ARGS, microbatch_size=8, kl_in=kl_in, kl_estimator="k2", ent_coef=0.1)
    parts = replace(whole, microbatch_size=microbatch_size)
    assert torch.allclose(minibatch_gradient(parts), minibatch_gradient(whole), atol=1e-6)


def test_the_mean_of_the_parts_means_would_be_another_gradient():
    # The tempting version: average equally, whatever number of tokens a part has.
    actor_critic, rollout = setting()
    backward_minibatch(actor_critic, rollout, 0.05, replace(ARGS, microbatch_size=8))
    right = gradient(actor_critic)
    actor_critic.zero_grad()
    for i in range(8):
        backward_minibatch(actor_critic, rollout.select([i]), 0.05, ARGS)
    assert not torch.allclose(gradient(actor_critic) / 8, right, atol=1e-3)


def test_the_order_of_the_rows_changes_nothing():
    actor_critic, rollout = moved_setting()
    forward = backward_minibatch(actor_critic, rollout, 0.05, ARGS)
    assert forward["clipfrac"] > 0 and forward["vf_clipfrac"] > 0  # or it would show little
    backward = backward_minibatch(actor_critic, rollout.select(range(7, -1, -1)), 0.05, ARGS)
    assert forward == pytest.approx(backward, abs=1e-5)


def test_the_critic_is_trained_on_the_returns():
    actor_critic, rollout = setting()
    stats = backward_minibatch(actor_critic, rollout, 0.05, replace(ARGS, microbatch_size=8))
    errors = (rollout.old_values - rollout.returns)[rollout.response_mask]
    assert stats["value_loss"] == pytest.approx(0.5 * (errors**2).mean().item(), rel=1e-4)


def test_the_padding_of_a_rollout_reaches_neither_loss_nor_statistics():
    results = []
    for junk in (0.0, 1e4, float("nan")):
        actor_critic, rollout = moved_setting()
        for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"):
            clean = getattr(rollout, name)
            setattr(rollout, name, torch.where(rollout.response_mask, clean, junk))
        stats = backward_minibatch(actor_critic, rollout, 0.05, ARGS)
        results.append((stats, gradient(actor_critic)))
    assert results[0][0] == results[1][0] == results[2][0]
    assert torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sft_and_reward_losses_do_not_depend_on_microbatches(size):
    policy, reward_model = Policy(make_lm(), 0, [1]), make_reward_model()
    comparisons = [(p, r, [4, 4]) for p, r in EXAMPLES]
    for model, loss_sum, examples, terms in (
        (policy, sft_loss_sum, EXAMPLES, count_response_tokens(EXAMPLES)),
        (reward_model, reward_loss_sum, comparisons, 4),
    ):
        gradients = []
        for microbatch_size in (4, size):
            model.zero_grad()
            accumulate_gradients(loss_sum, model, examples, terms, microbatch_size)
            gradients.append(gradient(model))
        assert torch.allclose(*gradients, atol=1e-6)


def test_the_sft_loss_trains_the_response_with_its_eos_and_not_the_prompt():
    policy = Policy(make_lm(), 0, [1])
    logits = policy.lm(torch.tensor([[4, 5, 6, 1]])).logits[0].clone()
    logits[:, 0] = -1e30
    logprobs = logits.log_softmax(-1)
    expected = -(logprobs[1, 6] + logprobs[2, 1])  # token 6 after 5, EOS after 6
    assert torch.allclose(sft_loss_sum(policy, EXAMPLES[:1]), expected, atol=1e-5)


def test_the_reward_loss_is_bradley_terry():
    reward_model = make_reward_model()
    good, bad = (ppo_rlhf.model_scores(reward_model, [[4, 5, x]])[0] for x in (6, 7))
    loss = reward_loss_sum(reward_model, [([4], [5, 6], [5, 7])])
    assert torch.allclose(loss, -torch.log(torch.sigmoid(good - bad)), atol=1e-5)


def test_ptx_adds_the_gradient_of_the_sft_loss_times_its_coefficient(monkeypatch):
    actor_critic, rollout = setting()
    monkeypatch.setattr(ppo_rlhf, "backward_minibatch", lambda *x: {"approx_kl": 0.0,
                                                                    "ratio_first": 1.0})
    args = replace(ARGS, ptx_coef=3.0, update_epochs=1, minibatch_size=8, microbatch_size=3)
    optimizer = torch.optim.SGD(actor_critic.parameters(), lr=0.0)
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(gradient(actor_critic)))
    update_policy(actor_critic, optimizer, rollout, 0.05, replace(args, max_grad_norm=1e9), 0,
                  actor_critic.policy, EXAMPLES[:1])
    actor_critic.zero_grad()
    (sft_loss_sum(actor_critic.policy, EXAMPLES[:1]) / 2).backward()
    assert torch.allclose(seen[0], 3.0 * gradient(actor_critic), atol=1e-5)


def test_the_kl_in_the_loss_pulls_the_new_policy_to_the_reference():
    args = replace(ARGS, kl_in="loss", kl_estimator="k2", vf_coef=0.0, microbatch_size=8)
    actor_critic, rollout = setting(args)
    mask, policy = rollout.response_mask, actor_critic.policy
    rollout.advantages = torch.zeros_like(rollout.advantages)  # nothing else to learn from
    rollout.ref_logprobs = rollout.ref_logprobs - 0.5 * mask
    backward_minibatch(actor_critic, rollout, 0.3, args)
    observed = gradient(policy)
    policy.zero_grad()
    logprobs, _, _ = policy(rollout.sequence_ids, rollout.sequence_mask, rollout.response_len)
    (0.3 * masked_mean(kl_penalty(logprobs, rollout.ref_logprobs, "k2"), mask)).backward()
    assert observed.abs().max() > 1e-3 and torch.allclose(observed, gradient(policy), atol=1e-6)


def test_ptx_draws_new_demonstrations_for_every_step_and_reads_them_at_temperature_1(monkeypatch):
    actor_critic, rollout = setting()
    seen, sft_policy = [], object()
    monkeypatch.setattr(ppo_rlhf, "accumulate_gradients", lambda *x: seen.append(x) or 0.0)
    update_policy(actor_critic, make_optimizer(actor_critic, ARGS), rollout, 0.05,
                  replace(ARGS, ptx_coef=1.0), 0, sft_policy, EXAMPLES * 2)
    assert all(x[1] is sft_policy and len(x[2]) == 4 for x in seen)
    assert seen[0][2] != seen[1][2]


# Steps -------------------------------------------------------------------------------------------


def test_sft_and_reward_model_see_each_example_once_per_epoch_in_a_new_order():
    batches = shuffled_minibatches(list(range(8)), 2, 4, random.Random(0))
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_each_row_is_used_once_per_epoch_in_a_new_order(monkeypatch):
    rows, select = [], ppo_rlhf.Rollout.select

    def recording_select(rollout, idx):
        if len(rollout.ended) == 8:  # the whole rollout: idx is a minibatch
            rows.extend(idx)
        return select(rollout, idx)

    monkeypatch.setattr(ppo_rlhf.Rollout, "select", recording_select)
    run_update(ARGS)
    first, second = rows[:8], rows[8:]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_there_are_epochs_times_minibatches_optimizer_steps(monkeypatch):
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(1) or step(self))
    run_update(replace(ARGS, update_epochs=3))
    assert len(steps) == 3 * 2


def test_a_step_of_sgd_is_as_long_as_the_clipped_gradient():
    args = replace(ARGS, update_epochs=1, minibatch_size=8, microbatch_size=8, max_grad_norm=0.01)
    actor_critic, rollout = setting(args)
    before = torch.cat([x.detach().flatten() for x in actor_critic.parameters()])
    optimizer = torch.optim.SGD(actor_critic.parameters(), lr=1.0)
    stats = update_policy(actor_critic, optimizer, rollout, 0.05, args, 0, None, [])
    after = torch.cat([x.detach().flatten() for x in actor_critic.parameters()])
    assert stats["grad_norm"] > 0.02 and abs((after - before).norm().item() - 0.01) < 1e-4


def test_the_entropy_bonus_raises_the_entropy():
    args = replace(ARGS, ent_coef=1.0, vf_coef=0.0, update_epochs=1, minibatch_size=8,
                   microbatch_size=8)
    actor_critic, rollout = setting(args)
    rollout.advantages = torch.zeros_like(rollout.advantages)  # nothing else to learn from
    optimizer = make_optimizer(actor_critic, args)
    update_policy(actor_critic, optimizer, rollout, 0.05, args, 0, None, [])
    _, after, _ = actor_critic(rollout.sequence_ids, rollout.sequence_mask, rollout.response_len)
    mask = rollout.response_mask
    assert after[mask].mean() > rollout.entropies[mask].mean()


def test_each_step_of_the_update_begins_its_gradient_anew(monkeypatch):
    (actor_critic, rollout), seen = setting(), []
    args = replace(ARGS, minibatch_size=8, microbatch_size=8, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(actor_critic.parameters(), lr=0.0)
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(gradient(actor_critic)))
    update_policy(actor_critic, optimizer, rollout, 0.05, args, 0, None, [])
    assert torch.allclose(seen[0], seen[1], atol=1e-5)  # two epochs, no movement


def test_targets_stay_the_same_over_the_epochs(monkeypatch):
    seen, original = [], ppo_rlhf.backward_minibatch

    def recording(actor_critic, minibatch, *others):
        seen.append(minibatch.select(minibatch.scores.argsort().tolist()))  # in a fixed order
        return original(actor_critic, minibatch, *others)

    monkeypatch.setattr(ppo_rlhf, "backward_minibatch", recording)
    run_update(replace(ARGS, minibatch_size=8, microbatch_size=8, update_epochs=2))
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        assert torch.equal(getattr(seen[0], name), getattr(seen[1], name))


def test_target_kl_ends_the_epochs():
    _, one_epoch = run_update(replace(ARGS, update_epochs=1))
    _, stopped = run_update(replace(ARGS, update_epochs=4, target_kl=1e-9))
    _, four_epochs = run_update(replace(ARGS, update_epochs=4))
    assert torch.equal(one_epoch, stopped) and not torch.equal(stopped, four_epochs)


def test_target_kl_is_a_limit_on_the_kl_itself(monkeypatch):
    (actor_critic, rollout), calls = setting(), []
    monkeypatch.setattr(ppo_rlhf, "backward_minibatch", lambda *x: calls.append(1) or
                        {"approx_kl": 1.2, "ratio_first": 1.0})
    update_policy(actor_critic, make_optimizer(actor_critic, ARGS), rollout, 0.05,
                  replace(ARGS, target_kl=1.0), 0, None, [])
    assert len(calls) == 2  # the minibatches of one epoch


def test_a_good_response_becomes_likelier_and_a_bad_one_less_likely():
    args = replace(ARGS, update_epochs=1, minibatch_size=8, microbatch_size=8)
    actor_critic, rollout = setting(args)
    optimizer = make_optimizer(actor_critic, args)
    update_policy(actor_critic, optimizer, rollout, 0.0, args, 0, None, [])
    new_logprobs, _, _ = actor_critic(rollout.sequence_ids, rollout.sequence_mask,
                                      rollout.response_len)
    moved = (new_logprobs - rollout.old_logprobs) * rollout.advantages
    assert moved[rollout.response_mask].sum() > 0


def test_the_critic_learns_at_its_own_rate():
    actor_critic, rollout = setting()
    args = replace(ARGS, critic_learning_rate=1e-9)
    before = actor_critic.policy.lm.lm_head.weight.clone()
    update_policy(actor_critic, make_optimizer(actor_critic, args), rollout, 0.05, args, 0,
                  None, [])
    assert actor_critic.value_head.weight.abs().max() < 1e-6
    assert (actor_critic.policy.lm.lm_head.weight - before).abs().max() > 1e-3


def test_nothing_stored_in_a_rollout_requires_grad():
    _, rollout = setting()
    assert not any(x.requires_grad for x in vars(rollout).values())


def test_a_nan_stops_the_update_before_it_reaches_the_weights():
    actor_critic, rollout = setting()
    rollout.advantages[0, 0] = float("nan")
    before = copy.deepcopy(actor_critic.state_dict())
    with pytest.raises(FloatingPointError, match="step 1 of the update: policy_loss is nan"):
        update_policy(actor_critic, make_optimizer(actor_critic, ARGS), rollout, 0.05,
                      replace(ARGS, minibatch_size=8, microbatch_size=8), 0, None, [])
    assert all(torch.equal(x, before[name]) for name, x in actor_critic.state_dict().items())


def test_the_learning_rate_warms_up_and_falls_linearly_to_zero():
    assert [lr_scale(i, 4) for i in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    assert [lr_scale(i, 4, warmup=2, anneal=False) for i in (1, 2, 3)] == [0.5, 1, 1]


def test_policy_and_critic_follow_the_schedule_of_ppo():
    actor_critic, _ = setting()
    args = replace(ARGS, total_episodes=32, critic_learning_rate=1e-1)
    optimizer = make_optimizer(actor_critic, args)
    assert set_learning_rates(optimizer, 3, args) == pytest.approx(5e-3)  # half is left
    assert [x["lr"] for x in optimizer.param_groups] == pytest.approx([5e-3, 5e-2])


def test_stages_1_and_2_anneal_clip_and_begin_each_gradient_anew(monkeypatch):
    model, seen = torch.nn.Linear(1, 1, bias=False), []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: seen.append(
        (self.param_groups[0]["lr"], model.weight.grad.item())))
    fit("test", model, [[1.0], [5.0], [1.0], [1.0]], lambda model, x: model.weight.sum() * x[0],
        len, 0.4, replace(ARGS, max_grad_norm=2.0), SimpleNamespace(scalars=lambda *x: None))
    rates, gradients = zip(*seen, strict=True)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert gradients == pytest.approx([1, 2, 1, 1], abs=1e-5)  # 5, clipped to 2


# Critics -----------------------------------------------------------------------------------------


def test_a_shared_critic_starts_at_zero():
    actor_critic, rollout = setting()
    assert (rollout.old_values == 0).all() and actor_critic.trunk is None


def test_a_separate_critic_starts_from_the_normalised_score_of_the_prompt():
    policy, reward_model = Policy(make_lm(), 0, [1]), make_reward_model(seed=5)
    args, norm = replace(ARGS, critic="separate"), ScoreNorm(mean=2.0, std=3.0)
    actor_critic = make_actor_critic(args, policy, reward_model, True, norm)
    ids = torch.tensor([[4, 5, 6]])
    _, _, values = actor_critic(ids, torch.ones_like(ids).bool(), 1)
    score_of_the_prompt = reward_model(torch.tensor([[4, 5]])).logits[0, 0]
    assert torch.allclose(values[0, 0], (score_of_the_prompt - 2) / 3, atol=1e-5)


def test_a_separate_critic_leaves_the_policys_gradient_alone():
    gradients = []
    for vf_coef in (0.0, 10.0):
        policy = Policy(make_lm(), 0, [1])
        args = replace(ARGS, critic="separate", vf_coef=vf_coef)
        actor_critic = make_actor_critic(args, policy, None, False, ScoreNorm())
        torch.nn.init.ones_(actor_critic.value_head.weight)  # 0 would pass no gradient on
        _, rollout = setting()
        backward_minibatch(actor_critic, rollout, 0.05, args)
        gradients.append(gradient(policy))
    assert torch.equal(*gradients)


def test_a_separate_critic_trains_a_trunk_of_its_own_and_not_the_reward_model():
    policy, reward_model = Policy(make_lm(), 0, [1]), make_reward_model(seed=5)
    args, (_, rollout) = replace(ARGS, critic="separate"), setting()
    actor_critic = make_actor_critic(args, policy, reward_model.requires_grad_(False), True,
                                     ScoreNorm())
    frozen, trunk = (copy.deepcopy(x.state_dict()) for x in (reward_model, actor_critic.trunk))
    update_policy(actor_critic, make_optimizer(actor_critic, args), rollout, 0.05, args, 0, None,
                  [])
    assert all(torch.equal(x, frozen[name]) for name, x in reward_model.state_dict().items())
    assert not any(torch.equal(x, trunk[name])
                   for name, x in actor_critic.trunk.state_dict().items())


# What surrounds the update ------------------------------------------------------------------------


def test_advantages_take_gamma_and_lambda_in_their_places():
    args = replace(ARGS, gamma=0.9, gae_lambda=0.2, norm_advantages=False)
    _, rollout = setting()
    rollout.old_values = torch.randn_like(rollout.rewards)
    expected = gae(rollout.rewards, rollout.old_values, rollout.response_mask, 0.9, 0.2)
    assert all(torch.equal(x, y) for x, y in
               zip(compute_advantages(rollout, args), expected, strict=True))


def test_sft_normalisation_gives_mean_0_and_std_1_and_only_shifts_equal_scores():
    policy, args = Policy(make_lm(), 0, [1]), replace(ARGS, score_norm="sft")
    data = Data([[4], [5]], [], [], [], [], [])
    scores = 3 * torch.arange(16.0)
    normalised = measure_score_norm(policy, lambda *x: scores, data, args)(scores)
    assert torch.allclose(normalised, (scores - scores.mean()) / scores.std(correction=0))
    norm = measure_score_norm(policy, lambda *x: torch.full((16,), 7.0), data, args)
    assert norm(torch.tensor([8.0])).item() == pytest.approx(1.0)


def test_perplexity_is_per_token_and_accuracy_counts_what_scores_higher(monkeypatch):
    policy = Policy(make_lm(), 0, [1])
    mean_loss = sft_loss_sum(policy, EXAMPLES) / count_response_tokens(EXAMPLES)
    assert perplexity(policy, EXAMPLES, 2) == pytest.approx(mean_loss.exp().item(), rel=1e-4)
    monkeypatch.setattr(ppo_rlhf, "score_margins", lambda _, x: torch.tensor(x))
    assert accuracy(None, [1.0, -1.0, 2.0, 3.0], 3) == 0.75
