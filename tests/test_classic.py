"""Claim: ppo_classic.py treats episode ends, actions and statistics right, and learns.

Reference: sums written out by hand, torch.distributions, and environments whose observation says
which episode and step it belongs to.
Run: python -m pytest tests/test_classic.py (40 seconds)
"""

import math
from copy import deepcopy
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo_classic as ppo

PENDULUM = {"env_id": "Pendulum-v1", "num_steps": 32, "num_minibatches": 2, "total_timesteps": 64}


class Counter(gymnasium.Env):
    """Observation (episode, step); every step is worth 1; the third one ends the episode."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    end = "truncated"

    def __init__(self, render_mode=None):
        self.episode = -1

    def reset(self, seed=None, options=None):
        self.episode, self.step_idx = self.episode + 1, 0
        return self.obs(), {}

    def obs(self):
        return np.array([self.episode, self.step_idx], dtype=np.float32)

    def step(self, action):
        self.step_idx += 1
        over, terminates = self.step_idx == 3, self.end == "terminated"
        return self.obs(), 1.0, over and terminates, over and not terminates, {}


class Clock(Counter):
    """Observation: the step alone."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def obs(self):
        return np.array([self.step_idx], dtype=np.float32)


class TerminatedClock(Clock):
    """The same, but the task ends with the third step."""

    end = "terminated"


class Reused(Counter):
    """The same array for every observation, the final one and the first one included."""

    shared = np.zeros(2, dtype=np.float32)

    def obs(self):
        self.shared[:] = self.episode, self.step_idx
        return self.shared


class Endless(Counter):
    """An episode that never ends."""

    def step(self, action):
        return self.obs(), 0.0, False, False, {}


class Staggered(Counter):
    """Observation (seed, episode, step); episodes last as many steps as the seed says, and more."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    seed = 0

    def reset(self, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        return super().reset()

    def obs(self):
        return np.array([self.seed, self.episode, self.step_idx], dtype=np.float32)

    def step(self, action):
        self.step_idx += 1
        over = self.step_idx == self.seed + self.episode % 2
        return self.obs(), self.seed + 0.1 * self.step_idx, over and self.seed == 3, over, {}


class Narrow(Counter):
    """Two continuous actions between −0.1 and 0.1; remembers what it was given."""

    action_space = Box(-0.1, 0.1, (2,), np.float32)
    given: ClassVar = []

    def step(self, action):
        self.given.append(action.copy())
        return super().step(action)


for env_class in (Counter, Clock, TerminatedClock, Reused, Endless, Staggered, Narrow):
    gymnasium.register(f"{env_class.__name__}-v0", entry_point=env_class)


@pytest.fixture
def args(tmp_path):
    """Settings of a run of two iterations on CartPole, 40 steps each."""
    return ppo.Args(total_timesteps=80, num_envs=2, num_steps=20, num_minibatches=2,
                    update_epochs=2, eval_episodes=1, output_dir=str(tmp_path), run_name="run")


def train(args, **changes):
    """Run the file. Returns: the trained agent."""
    args = replace(args, **changes)
    ppo.main(args)
    return ppo.load_agent(Path(args.output_dir, args.run_name))[0]


def make_envs(env_id, num_envs=1, gamma=0.99, seed=1):
    """Environments side by side."""
    return ppo.Envs([lambda: ppo.make_env(env_id)] * num_envs, seed, gamma)


def make(env_id, args, num_envs=1):
    """An untrained agent and its environments."""
    args = ppo.resolve_args(replace(args, env_id=env_id, num_envs=num_envs))
    torch.manual_seed(1)
    agent = ppo.ActorCritic(ppo.make_env(env_id), args)
    return agent, make_envs(env_id, num_envs, args.gamma), args


def collect(agent, envs, args):
    """One rollout, its rewards scaled by statistics of its own."""
    return ppo.collect_rollout(agent, envs, ppo.RunningStats(1), args)


def curve(args, name):
    """What TensorBoard has of a run under one name: (step, value) of each point."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(args.output_dir, args.run_name))).Reload()
    if name not in events.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in events.Scalars(name)]


def column(*numbers):
    """Numbers over time, (num_steps, 1)."""
    return torch.tensor(numbers).unsqueeze(1)


# GAE ----------------------------------------------------------------------------------------------


def test_gae_of_three_steps_by_hand():
    no = column(False, False, False)
    advantages, returns = ppo.gae(column(1.0, 0.0, 2.0), column(1.0, 2.0, 3.0),
                                  column(2.0, 3.0, 4.0), no, no, gamma=0.5, gae_lambda=0.5)
    # δ = 1 + 0.5·2 − 1 = 1,  0 + 0.5·3 − 2 = −0.5,  2 + 0.5·4 − 3 = 1
    # A₂ = 1,  A₁ = −0.5 + 0.25·1 = −0.25,  A₀ = 1 + 0.25·(−0.25) = 0.9375
    assert advantages.flatten().tolist() == [0.9375, -0.25, 1.0]
    assert returns.flatten().tolist() == [1.9375, 1.75, 4.0]


def test_termination_drops_the_next_value_and_truncation_keeps_it():
    yes, no = column(True), column(False)
    inputs = column(1.0), column(0.0), column(10.0)
    assert ppo.gae(*inputs, yes, no, 0.9, 0.95)[0].item() == 1.0  # 1
    assert ppo.gae(*inputs, no, yes, 0.9, 0.95)[0].item() == 10.0  # 1 + 0.9·10


def test_the_value_of_the_next_episode_does_not_move_the_terminal_step():
    """Reward 1 and V = 5 at the terminal step, V = 100 after the reset: −4, and not 95."""
    advantages, _ = ppo.gae(column(1.0, 0.0), column(5.0, 100.0), column(7.0, 100.0),
                            column(True, False), column(False, False), 1.0, 0.95)
    assert advantages[0].item() == -4.0


def test_gae_equals_the_double_sum_over_random_episode_ends():
    torch.manual_seed(0)
    rewards, values, next_values = torch.randn(3, 40, 4, dtype=torch.double)
    terminated, truncated = torch.rand(2, 40, 4) < 0.1
    advantages, _ = ppo.gae(rewards, values, next_values, terminated, truncated, 0.9, 0.8)
    done, zero = terminated | truncated, torch.tensor(0.0)
    for env in range(4):
        for t in range(40):
            # Aₜ = Σₗ (γλ)ˡ·δₜ₊ₗ, up to the end of the episode or of the rollout
            ends = [u for u in range(t, 40) if done[u, env]]
            last = ends[0] if ends else 39
            total = sum((0.9 * 0.8) ** (u - t) * (rewards[u, env] - values[u, env] + 0.9 * (
                zero if terminated[u, env] else next_values[u, env])) for u in range(t, last + 1))
            assert math.isclose(advantages[t, env], total, rel_tol=1e-9)


def test_gae_in_one_column_does_not_know_its_neighbours():
    torch.manual_seed(0)
    inputs = [*torch.randn(3, 9, 4), *(torch.rand(2, 9, 4) < 0.2)]
    together, _ = ppo.gae(*inputs, 0.9, 0.8)
    alone, _ = ppo.gae(*(x[:, 2:3] for x in inputs), 0.9, 0.8)
    assert torch.equal(together[:, 2:3], alone)


def test_values_learn_that_a_truncated_episode_would_go_on(args):
    changes = {"total_timesteps": 12_000, "num_envs": 4, "num_steps": 24, "gamma": 0.5,
               "learning_rate": 3e-3, "update_epochs": 8, "gae_lambda": 0.95}
    truncated = train(args, env_id="Clock-v0", run_name="a", **changes)
    terminated = train(args, env_id="TerminatedClock-v0", run_name="b", **changes)
    steps = torch.tensor([[0.0], [1.0], [2.0]])
    # Reward 1 for ever: 1/(1 − 0.5) = 2. Three rewards of 1: 1 + 0.5 + 0.25, 1 + 0.5, 1.
    assert torch.allclose(truncated.values(steps), torch.tensor([2.0, 2.0, 2.0]), atol=0.1)
    assert torch.allclose(terminated.values(steps), torch.tensor([1.75, 1.5, 1.0]), atol=0.1)


# Rollout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Counter-v0", "Reused-v0"])
def test_no_transition_joins_two_episodes(args, env_id):
    agent, envs, args = make(env_id, replace(args, num_steps=12), num_envs=3)
    rollout = collect(agent, envs, args)
    episodes, steps = rollout.obs.unbind(-1)
    next_episodes, next_steps = rollout.next_obs.unbind(-1)
    assert torch.equal(episodes, next_episodes) and torch.equal(steps + 1, next_steps)
    assert torch.equal(rollout.truncated, next_steps == 3) and not rollout.terminated.any()
    assert steps[:, 0].tolist() == [0, 1, 2] * 4


def test_final_observations_belong_to_the_environment_and_episode_that_ended(args):
    agent, envs, args = make("Staggered-v0", replace(args, num_steps=26), num_envs=3)
    rollout = collect(agent, envs, args)
    step = torch.tensor([0.0, 0.0, 1.0])  # same environment, same episode, next step
    assert torch.equal(rollout.obs + step, rollout.next_obs)
    assert rollout.obs[:, :, 0].unique(dim=0).tolist() == [[1, 2, 3]]
    env, episode, next_step = rollout.next_obs.unbind(-1)
    assert torch.equal(rollout.truncated, next_step == env + episode % 2)
    assert torch.equal(rollout.terminated, rollout.truncated & (env == 3))


def test_a_rollout_begins_where_the_last_one_stopped(args):
    agent, envs, args = make("Counter-v0", replace(args, num_steps=4))
    rollouts = [collect(agent, envs, args) for _ in range(3)]
    for before, after in pairwise(rollouts):
        assert before.truncated[-1] or torch.equal(before.next_obs[-1], after.obs[0])
    assert torch.cat([x.obs for x in rollouts])[:, 0, 1].tolist() == [0, 1, 2] * 4


def test_the_reset_is_part_of_the_step_that_ends_an_episode(args):
    envs = make_envs("Counter-v0")
    assert envs.vector_env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP


def test_episodes_are_reported_with_return_length_and_step(args):
    agent, envs, args = make("Counter-v0", replace(args, num_steps=7), num_envs=2)
    collect(agent, envs, args)
    assert envs.finished == [(6, 3.0, 3), (6, 3.0, 3), (12, 3.0, 3), (12, 3.0, 3)]


def test_the_environment_gets_clipped_actions_and_the_rollout_keeps_the_draws(args):
    Narrow.given.clear()
    agent, envs, args = make("Narrow-v0", args)
    rollout = collect(agent, envs, args)
    assert rollout.actions.abs().max() > 0.1 and np.abs(Narrow.given).max() <= np.float32(0.1)
    normal = torch.distributions.Normal(agent.actor(rollout.obs), 1)
    logprobs = normal.log_prob(rollout.actions)
    assert torch.allclose(rollout.old_logprobs, logprobs.sum(-1), atol=1e-5)


def test_discrete_actions_are_counted_from_the_start_of_their_space(monkeypatch):
    given, step = [], Counter.step
    monkeypatch.setattr(Counter, "action_space", Discrete(3, start=5))
    monkeypatch.setattr(Counter, "step", lambda self, action: given.append(action) or step(self, 0))
    make_envs("Counter-v0", 2).step(np.array([0, 2]))
    assert given == [5, 7]


def test_before_the_first_step_the_ratio_is_1(args):
    agent, envs, args = make("Pendulum-v1", args)
    agent.obs_norm.update(torch.randn(50, 3) * 4 + 1)
    rollout = collect(agent, envs, args)
    logprobs, _, values = agent(rollout.obs.flatten(0, 1)[:7], rollout.actions.flatten(0, 1)[:7])
    assert torch.allclose(logprobs, rollout.old_logprobs.flatten()[:7], atol=1e-5)
    assert torch.allclose(values, rollout.old_values.flatten()[:7], atol=1e-5)


def test_the_values_of_a_rollout_are_those_of_its_normalised_observations(args):
    agent, envs, args = make("Counter-v0", replace(args, norm_obs=True))
    agent.obs_norm.update(torch.randn(50, 2) * 4 + 1)
    rollout = collect(agent, envs, args)
    for values, obs in ((rollout.old_values, rollout.obs),
                        (agent.values(rollout.next_obs), rollout.next_obs)):
        by_hand = agent.critic((obs - agent.obs_norm.mean) / agent.obs_norm.var.sqrt()).squeeze(-1)
        assert torch.allclose(values, by_hand, atol=1e-5)


def test_environments_of_a_vector_start_differently():
    envs = make_envs("CartPole-v1", 2, seed=7)
    alone = [ppo.make_env("CartPole-v1").reset(seed=7 + i)[0] for i in range(2)]
    assert np.array_equal(envs.obs, alone) and not np.array_equal(*alone)


# Policies -----------------------------------------------------------------------------------------


def test_gaussian_log_probability_and_entropy_sum_over_action_dimensions():
    mean, log_std = torch.zeros(1, 2), torch.tensor([0.0, math.log(2)])
    actions = torch.tensor([[1.0, 2.0]])
    # Both actions lie one std away: −½·1 − log σ − ½·log 2π each, σ = 1 and 2.
    by_hand = -1 - math.log(2) - math.log(2 * math.pi)
    assert math.isclose(ppo.gaussian_logprobs(mean, log_std, actions).item(), by_hand, rel_tol=1e-6)
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(ppo.gaussian_entropy(log_std), normal.entropy().sum())


def test_categorical_log_probability_and_entropy_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0]])  # probabilities ¾ and ¼
    assert math.isclose(ppo.logprobs_from_logits(logits, torch.tensor([0])).exp().item(), 0.75,
                        rel_tol=1e-6)
    by_hand = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert math.isclose(ppo.entropy(logits).item(), by_hand, rel_tol=1e-6)


def test_samples_follow_the_softmax_of_the_logits(args):
    agent, _, _ = make("Acrobot-v1", args)  # three actions
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.5, 0.2, 0.3]).log())
    shares = np.bincount(agent.act(np.zeros((20_000, 6)))) / 20_000
    assert np.allclose(shares, [0.5, 0.2, 0.3], atol=0.015)  # 4 standard errors


def test_gaussian_samples_have_the_mean_and_std_of_the_policy(args):
    agent, _, _ = make("Narrow-v0", replace(args, orthogonal_init=False))
    agent.log_std.data.copy_(torch.tensor([0.0, 1.0]))
    actions = agent.act(np.ones((20_000, 2)))
    mean = agent.actor(agent.obs_norm(torch.ones(1, 2))).detach().numpy()
    assert np.allclose(actions.mean(0), mean, atol=0.08)
    assert np.allclose(actions.std(0), [1, math.e], rtol=0.03)
    assert np.allclose(agent.act(np.ones((1, 2)), greedy=True), mean)


def test_the_first_policy_hardly_prefers_any_action(args):
    agent, _, _ = make("CartPole-v1", args)
    probabilities = agent.actor(torch.randn(100, 4)).softmax(-1)
    assert (probabilities - 0.5).abs().max() < 0.01


def test_the_greedy_action_is_that_of_the_highest_logit(args):
    agent, _, _ = make("Acrobot-v1", args)
    agent.actor[-1].bias.data.copy_(torch.tensor([0.0, 2.0, 1.0]))
    assert agent.act(np.zeros((50, 6)), greedy=True).tolist() == [1] * 50


def test_adam_and_the_first_weights_are_those_of_the_37_details(args, monkeypatch):
    kept, adam = {}, torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *x, **y: kept.update(y) or adam(*x, **y))
    train(args)
    agent, _, _ = make("CartPole-v1", replace(args, run_name="b"))
    assert kept["eps"] == 1e-5
    assert math.isclose(agent.critic[-1].weight.norm().item(), 1, rel_tol=1e-5)
    last = agent.actor[-1].weight  # two orthogonal rows of length 0.01
    assert math.isclose(last.norm().item(), 0.01 * math.sqrt(2), rel_tol=1e-5)


def test_hidden_layers_start_with_gain_sqrt_2(args):
    agent, _, _ = make("CartPole-v1", args)
    for layer, size in ((agent.critic[0], 4), (agent.critic[2], 64)):  # orthogonal columns
        assert math.isclose(layer.weight.norm().item(), math.sqrt(2 * size), rel_tol=1e-5)


def test_without_orthogonal_init_both_networks_have_the_first_weights_of_pytorch(args):
    agent, _, _ = make("CartPole-v1", replace(args, orthogonal_init=False))
    for layer in (agent.actor[0], agent.actor[2], agent.critic[0], agent.critic[2]):
        limit = layer.in_features**-0.5  # uniform in ± this; orthogonal columns reach beyond it
        assert 0.9 * limit < layer.weight.abs().max() <= limit


# Running statistics -------------------------------------------------------------------------------


def test_running_statistics_equal_those_of_all_rows_together():
    torch.manual_seed(0)
    rows, stats = torch.randn(30, 2) * 5 + 3, ppo.RunningStats(2)
    for part in rows.split([1, 20, 9]):
        stats.update(part)
    assert torch.allclose(stats.mean, rows.mean(0))
    assert torch.allclose(stats.var, rows.var(0, correction=0))


def test_observations_leave_with_mean_0_and_std_1_and_are_clipped_at_10():
    stats = ppo.RunningStats(1)
    stats.update(torch.tensor([[1.0], [3.0]]))  # mean 2, std 1
    assert stats(torch.tensor([[2.0], [4.0], [100.0]])).flatten().tolist() == [0, 2, 10]


def scaled_rewards(monkeypatch, rewards, **changes):
    """Let Endless give these rewards. Returns: what gae gets of them, and their statistics."""
    queue, given, stats, gae = iter(rewards), [], ppo.RunningStats(1), ppo.gae
    monkeypatch.setattr(Endless, "step", lambda self, _: (
        self.obs(), next(queue), False, False, {}))
    monkeypatch.setattr(ppo, "gae", lambda *x: given.append(x[0].flatten()) or gae(*x))
    agent, envs, args = make("Endless-v0", ppo.Args(
        num_steps=len(rewards), num_minibatches=1, norm_reward=True, **changes))
    rollout = ppo.collect_rollout(agent, envs, stats, args)
    assert rollout.rewards.flatten().tolist() == list(rewards)  # kept as they were
    return given[0], stats


def test_rewards_are_divided_by_the_std_of_their_discounted_sum(monkeypatch):
    scaled, stats = scaled_rewards(monkeypatch, [2.0, 2.0], gamma=0.5)
    # Discounted sums of the past: 2, then 2 + 0.5·2 = 3. Their std: 0.5.
    assert torch.allclose(scaled, torch.tensor([4.0, 4.0]))
    assert stats.mean.item() == 2.5 and stats.count == 2


def test_discounted_sums_of_rewards_go_on_in_the_next_rollout_and_end_with_the_episode(args):
    agent, envs, args = make("Clock-v0", replace(args, num_steps=2, gamma=0.5, norm_reward=True))
    stats = ppo.RunningStats(1)
    for _ in range(2):
        ppo.collect_rollout(agent, envs, stats, args)
    # 1, 1 + 0.5·1, then in the next rollout 1 + 0.5·1.5; a new episode: 1.
    assert math.isclose(stats.mean.item(), (1 + 1.5 + 1.75 + 1) / 4, rel_tol=1e-6)


def test_statistics_move_after_the_update_and_count_what_was_acted_on(args, monkeypatch):
    counts, seen, update = [], [], ppo.update_policy

    def spy(agent, optimizer, rollout, *rest):
        counts.append(agent.obs_norm.count.item())
        seen.append(rollout.obs.flatten(0, 1))
        return update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(ppo, "update_policy", spy)
    agent = train(args, **PENDULUM, num_envs=1)
    assert counts == [0, 32] and agent.obs_norm.count == 64
    assert torch.allclose(agent.obs_norm.mean, torch.cat(seen).mean(0), atol=1e-5)
    assert agent.log_std.item() != 0  # it is trained


@pytest.mark.parametrize("sign", [1, -1])
def test_scaled_rewards_and_observations_are_clipped_at_10_on_both_sides(monkeypatch, sign):
    rewards = [float(sign)] + 999 * [0.0]  # std of the sums: 0.03
    scaled, _ = scaled_rewards(monkeypatch, rewards, gamma=0.0)
    assert scaled[0] == 10 * sign
    assert ppo.RunningStats(1)(torch.tensor([[100.0 * sign]])).item() == 10 * sign


# Update -------------------------------------------------------------------------------------------


def test_each_sample_is_used_once_per_epoch(args, monkeypatch):
    agent, envs, args = make("Counter-v0", replace(args, num_steps=12, num_minibatches=4))
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.randn(2, 12, 1)
    seen, forward = [], agent.forward
    monkeypatch.setattr(agent, "forward", lambda *x: seen.append(x[0]) or forward(*x))
    ppo.update_policy(agent, torch.optim.Adam(agent.parameters()), rollout, 0.0, 1, args)
    everything = sorted(rollout.obs.flatten(0, 1).tolist())
    seen = [obs for obs in seen if obs.dim() == 2]  # the whole rollout serves to measure the KL
    assert len(seen) == args.update_epochs * 4 and {len(x) for x in seen} == {3}
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == everything
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))  # reshuffled


def test_the_update_follows_the_gradient_of_the_loss_in_its_docstring(args):
    agent, envs, args = make("Counter-v0", replace(args, num_minibatches=1, update_epochs=1,
                                                   ent_coef=0.1, max_grad_norm=1e9))
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.randn(2, 20, 1)
    rollout.old_logprobs = rollout.old_logprobs + 0.3 * torch.randn(20, 1)  # KL > 0 at once
    before = deepcopy(agent)
    ppo.update_policy(agent, torch.optim.SGD(agent.parameters(), 0.01), rollout, 2.0, 1, args)
    new, entropies, values = before(rollout.obs, rollout.actions)
    loss = (ppo.policy_loss(new, rollout.old_logprobs, rollout.advantages, 0.2)[0]
            + 0.5 * ppo.value_loss(values, rollout.old_values, rollout.returns, 0.2)[0]
            - 0.1 * entropies.mean() + 2.0 * ppo.kl_penalty(rollout.old_logprobs, new).mean())
    loss.backward()
    for a, b in zip(agent.parameters(), before.parameters(), strict=True):
        assert torch.allclose(a, b - 0.01 * b.grad, atol=1e-6)


def test_gradients_do_not_pile_up_from_step_to_step(args):
    agent, envs, args = make("Counter-v0", replace(args, num_minibatches=1, max_grad_norm=math.inf,
                                                   clip_vloss=False, vf_coef=1.0))
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.zeros(20, 1), rollout.old_values + 1
    ppo.update_policy(agent, torch.optim.SGD(agent.parameters(), 0.0), rollout, 0.0, 1, args)
    # Two epochs, no movement: ½(V − R)² with V − R = −1 has the gradient −1 at the last bias.
    assert math.isclose(agent.critic[-1].bias.grad.item(), -1, rel_tol=1e-5)


def test_the_kl_is_measured_from_old_to_new_on_normalised_observations(args):
    agent, envs, args = make("Pendulum-v1", args)
    agent.obs_norm.update(torch.randn(50, 3) * 4 + 1)
    rollout = collect(agent, envs, args)
    assert math.isclose(ppo.measure_kl(agent, rollout), 0, abs_tol=1e-6)
    agent.log_std.data += 0.5
    mean = agent.actor(agent.obs_norm(rollout.obs))
    new_logprobs = torch.distributions.Normal(mean, math.exp(0.5)).log_prob(rollout.actions).sum(-1)
    d = (rollout.old_logprobs - new_logprobs).detach()
    k3 = ((-d).exp() - 1 + d).mean()
    assert math.isclose(ppo.measure_kl(agent, rollout), k3, rel_tol=1e-4)


def test_target_kl_ends_the_epochs_of_an_iteration(args, monkeypatch):
    agent, envs, args = make("Counter-v0", replace(args, target_kl=0.01, update_epochs=5))
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.randn(2, 20, 1)
    epochs, optimizer = iter([0.005, 0.02, 0.02]), torch.optim.Adam(agent.parameters())
    monkeypatch.setattr(ppo, "measure_kl", lambda *_: next(epochs))
    stats = ppo.update_policy(agent, optimizer, rollout, 0.0, 1, args)
    assert stats["approx_kl"] == 0.02
    assert optimizer.state[agent.critic[-1].bias]["step"] == 2 * 2  # two epochs of two, not five


def test_beta_halves_below_and_doubles_above_one_and_a_half_times_the_target():
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.006, kl_target=0.01) == 0.5
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.007, kl_target=0.01) == 1.0
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.014, kl_target=0.01) == 1.0
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.016, kl_target=0.01) == 2.0


def test_the_gradient_of_the_kl_penalty_is_that_of_the_exact_kl():
    old, logits = torch.tensor([0.6, 0.3, 0.1]).log(), torch.zeros(3, requires_grad=True)
    new = logits.log_softmax(-1)
    weighted = (old.exp() * ppo.kl_penalty(old, new)).sum()  # expectation over actions of old
    exact = (old.exp() * (old - new)).sum()  # KL(π_old ‖ π_new)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (weighted, exact)]
    assert torch.allclose(weighted, exact) and torch.allclose(*grads)


def test_an_infinite_clip_range_is_the_bare_surrogate():
    new, old, advantages = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])
    loss, clipfrac = ppo.policy_loss(new, old, advantages, math.inf)
    assert math.isclose(loss.item(), -2 * math.e, rel_tol=1e-6) and clipfrac == 0


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        ppo.value_loss(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), 0.2)


def test_without_a_kl_penalty_its_weight_is_ignored(args):
    a, b = train(args, run_name="a"), train(args, run_name="b", kl_beta=50.0)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("ratio", "advantage", "objective", "cut"), [
    (1.5, 1.0, 1.2, True), (0.5, 1.0, 0.5, False), (1.5, -1.0, -1.5, False),
    (0.5, -1.0, -0.8, True)])
def test_the_four_corners_of_clipping(ratio, advantage, objective, cut):
    loss, clipfrac = ppo.policy_loss(torch.tensor([math.log(ratio)]), torch.zeros(1),
                                     torch.tensor([advantage]), 0.2)
    assert math.isclose(loss, -objective, rel_tol=1e-6) and clipfrac == cut


def test_value_clipping_takes_the_larger_error():
    # V moves from 0 to 1 with target 1: clipped to 0.2, error 0.8 instead of 0.
    loss, clipfrac = ppo.value_loss(torch.ones(1), torch.zeros(1), torch.ones(1), 0.2)
    assert math.isclose(loss, 0.5 * 0.8**2, rel_tol=1e-6) and clipfrac == 1


def test_values_are_clipped_by_default(args):
    agent, envs, args = make("Counter-v0", args)
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.zeros(20, 1), rollout.old_values
    rollout.old_values = rollout.old_values + 1  # V is right, but has moved by 1
    optimizer = torch.optim.SGD(agent.parameters(), 0.0)
    stats = ppo.update_policy(agent, optimizer, rollout, 0.0, 1, args)
    assert stats["vf_clipfrac"] == 1


def test_the_explained_variance_of_an_update_is_that_of_its_returns(args):
    agent, envs, args = make("Counter-v0", args)
    rollout = collect(agent, envs, args)
    rollout.advantages, rollout.returns = torch.randn(20, 1), 5 * torch.randn(20, 1)
    stats = ppo.update_policy(agent, torch.optim.Adam(agent.parameters()), rollout, 0.0, 1, args)
    assert stats["explained_variance"] == ppo.explained_variance(rollout.returns,
                                                                 rollout.old_values)


# Runs watched from outside ------------------------------------------------------------------------
# A second PPO, written plainly: no fused optimizer, no flattening, loops instead of recursions. It
# gets what the environments and the random numbers gave to a run, and must end with its weights.

RUNS = {
    "CartPole": {"env_id": "CartPole-v1", "num_envs": 3},
    "Pendulum": {"env_id": "Pendulum-v1", "num_envs": 2, "gamma": 0.9, "gae_lambda": 0.6},
    "Pendulum, own scales": {"env_id": "Pendulum-v1", "ent_coef": 0.3, "norm_obs": False,
                             "norm_reward": False, "norm_advantages": False, "vf_coef": 0.01},
    "CartPole, penalty": {"policy_loss": "kl-adaptive", "kl_target": 1e-4, "norm_reward": True,
                          "norm_obs": True, "max_grad_norm": 0.2, "clip_vloss": False},
    "Clock": {"env_id": "Clock-v0", "anneal_lr": False, "norm_reward": True, "clip_coef": 0.05},
    "Staggered": {"env_id": "Staggered-v0", "num_envs": 3, "policy_loss": "kl-fixed"},
}


def watch(monkeypatch, args):
    """Run main. Returns: agents before each update and at the end, rollouts, orders of samples."""
    agents, rollouts, orders = [], [], []
    collect_rollout, randperm = ppo.collect_rollout, torch.randperm

    def recorded(agent, *rest):
        agents.append(deepcopy(agent))
        rollouts.append(collect_rollout(agent, *rest))
        return rollouts[-1]

    monkeypatch.setattr(ppo, "collect_rollout", recorded)
    monkeypatch.setattr(torch, "randperm", lambda n: orders.append(randperm(n)) or orders[-1])
    ppo.main(args)
    return [*agents, ppo.load_agent(Path(args.output_dir, args.run_name))[0]], rollouts, orders


def values_of(agent, obs):
    """V of observations, normalised by what the agent has seen."""
    if isinstance(agent.obs_norm, ppo.RunningStats):
        scale = (agent.obs_norm.var + 1e-8).sqrt()
        obs = ((obs - agent.obs_norm.mean) / scale).clamp(-10, 10)
    return obs, agent.critic(obs)[..., 0]


def distribution(agent, obs):
    """The policy as an object of torch.distributions, over whole actions."""
    output = agent.actor(values_of(agent, obs)[0])
    if agent.discrete:
        return torch.distributions.Categorical(logits=output)
    normal = torch.distributions.Normal(output, agent.log_std.exp())
    return torch.distributions.Independent(normal, 1)


def targets(agent, rollout, all_sums, args):
    """Advantages and returns of one rollout by sums over its episodes; all_sums grows by its G."""
    (num_steps, num_envs), rewards = rollout.rewards.shape, rollout.rewards
    done = rollout.terminated | rollout.truncated
    if args.norm_reward:
        for t in range(num_steps):
            sums = rewards[t] + args.gamma * (all_sums[-1][0] if all_sums else 0)
            all_sums.append((torch.where(done[t], 0.0, sums), sums))
        std = torch.stack([sums for _, sums in all_sums]).double().var(correction=0).sqrt()
        rewards = (rewards / std.float()).clamp(-10, 10)
    values, next_values = (values_of(agent, x)[1] for x in (rollout.obs, rollout.next_obs))
    deltas = rewards + args.gamma * next_values * (~rollout.terminated) - values
    advantages = torch.zeros(num_steps, num_envs)
    for env in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                advantages[t, env] += (args.gamma * args.gae_lambda) ** (k - t) * deltas[k, env]
                if done[k, env]:
                    break
    returns = advantages + values
    if args.norm_advantages:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return advantages.detach(), returns.detach()


def loss_by_hand(agent, rollout, idx, old, beta, args):
    """The loss of one minibatch; old has log-probabilities, values, advantages and returns."""
    obs, actions = rollout.obs.flatten(0, 1)[idx], rollout.actions.flatten(0, 1)[idx]
    old_logprobs, old_values, advantages, returns = (x.flatten()[idx] for x in old)
    policy, values = distribution(agent, obs), values_of(agent, obs)[1]
    log_ratio = policy.log_prob(actions) - old_logprobs
    objective = log_ratio.exp() * advantages
    if args.policy_loss == "clip":
        limits = 1 - args.clip_coef, 1 + args.clip_coef
        objective = torch.minimum(objective, log_ratio.exp().clip(*limits) * advantages)
    error = (values - returns) ** 2
    if args.clip_vloss:
        near = old_values + (values - old_values).clip(-args.clip_coef, args.clip_coef)
        error = torch.maximum(error, (near - returns) ** 2)
    kl = (log_ratio.exp() - 1 - log_ratio).mean()
    entropy = policy.entropy().mean()
    return -objective.mean() + args.vf_coef * error.mean() / 2 - args.ent_coef * entropy + beta * kl


def second_ppo(agent, rollouts, orders, args):
    """Train agent on the rollouts of another run. Yields: (its KL weight, itself) per iteration."""
    optimizer, sums, seen = torch.optim.Adam(agent.parameters(), eps=1e-5), [], []
    beta, orders = args.kl_beta if "kl" in args.policy_loss else 0.0, iter(orders)
    for iteration, rollout in enumerate(rollouts):
        share = 1 - iteration / len(rollouts) if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = share * args.learning_rate
        with torch.no_grad():
            old_logprobs = distribution(agent, rollout.obs).log_prob(rollout.actions)
            old_values = values_of(agent, rollout.obs)[1]
            old = (old_logprobs, old_values, *targets(agent, rollout, sums, args))
        for _ in range(args.update_epochs):
            for idx in next(orders).chunk(args.num_minibatches):
                optimizer.zero_grad()
                loss_by_hand(agent, rollout, idx, old, beta, args).backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        used = beta
        if args.policy_loss == "kl-adaptive":
            with torch.no_grad():
                d = distribution(agent, rollout.obs).log_prob(rollout.actions) - old_logprobs
            kl, target = (d.exp() - 1 - d).mean(), args.kl_target
            beta = beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta
        seen.append(rollout.obs.flatten(0, 1))
        if args.norm_obs:
            agent.obs_norm.mean = torch.cat(seen).mean(0)
            agent.obs_norm.var = torch.cat(seen).var(0, correction=0)
        yield used, agent


@pytest.fixture(params=RUNS)
def watched(request, args, monkeypatch):
    """A run of five iterations: its settings, and what watch has seen of it."""
    args = ppo.resolve_args(replace(args, **({
        "num_steps": 16, "num_envs": 2, "learning_rate": 3e-3, "update_epochs": 3, "seed": 3,
        "eval_episodes": 0} | RUNS[request.param])))
    args = replace(args, total_timesteps=5 * args.batch_size)
    return args, *watch(monkeypatch, args)


def test_five_iterations_end_with_the_weights_of_a_second_ppo(watched):
    args, agents, rollouts, orders = watched
    betas = []
    for after, (beta, agent) in zip(
            agents[1:], second_ppo(deepcopy(agents[0]), rollouts, orders, args), strict=True):
        betas.append(beta)
        for a, b in zip(after.parameters(), agent.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-4), (a - b).abs().max()
        if args.norm_obs:
            assert torch.allclose(after.obs_norm.mean, agent.obs_norm.mean, atol=1e-4)
            assert torch.allclose(after.obs_norm.var, agent.obs_norm.var, rtol=1e-3)
    assert [value for _, value in curve(args, "losses/kl_beta")] == betas


def test_every_epoch_of_a_run_has_an_order_of_its_own(watched):
    args, _, rollouts, orders = watched
    assert len(orders) == len(rollouts) * args.update_epochs
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


def test_the_logged_learning_rate_entropy_and_kl_are_those_of_the_run(watched):
    args, agents, rollouts, _ = watched
    shares = [1 - i / 5 if args.anneal_lr else 1 for i in range(5)]
    rates = [value for _, value in curve(args, "charts/learning_rate")]
    assert np.allclose(rates, [args.learning_rate * x for x in shares])
    for i, ((_, kl), (_, entropy)) in enumerate(zip(
            curve(args, "losses/approx_kl"), curve(args, "losses/entropy"), strict=True)):
        after = deepcopy(agents[i + 1])
        after.obs_norm = agents[i].obs_norm  # the statistics move after the update
        before, after = (distribution(x, rollouts[i].obs) for x in (agents[i], after))
        d = before.log_prob(rollouts[i].actions) - after.log_prob(rollouts[i].actions)
        assert math.isclose(kl, ((-d).exp() - 1 + d).mean(), rel_tol=1e-2, abs_tol=1e-5)
        low, high = sorted(x.entropy().mean().item() for x in (before, after))
        assert low - 0.02 < entropy < high + 0.02


def test_every_reward_that_the_environments_gave_is_in_a_rollout_of_the_run(watched):
    args, _, rollouts, _ = watched
    returns, totals = [], torch.zeros(args.num_envs)
    for rollout in rollouts:
        for rewards, done in zip(rollout.rewards, rollout.terminated | rollout.truncated,
                                 strict=True):
            totals += rewards
            returns += totals[done].tolist()
            totals[done] = 0
    assert np.allclose([value for _, value in curve(args, "charts/episodic_return")], returns)


# Three iterations of the first edition of this file (commit 4de10bd): weights, last losses.
FIRST_EDITION = [
    ({}, 1242.126982, {"policy_loss": -0.000990398, "value_loss": 44.4485, "entropy": 0.690811,
                       "explained_variance": -0.00182366, "grad_norm": 8.47115}),
    ({"env_id": "Pendulum-v1", "num_envs": 2, "num_steps": 256, "num_minibatches": 4}, 1228.790178,
     {"policy_loss": -8.41128e-05, "value_loss": 0.17187, "entropy": 1.41544,
      "explained_variance": 0.0724674, "grad_norm": 0.535449}),
    ({"policy_loss": "kl-adaptive", "norm_obs": True, "norm_reward": True, "kl_target": 1e-3},
     1243.179558, {"policy_loss": -0.0015286, "value_loss": 0.481221, "entropy": 0.687361,
                   "explained_variance": -0.0338255, "grad_norm": 0.877332}),
]


@pytest.mark.parametrize(("changes", "weights", "losses"), FIRST_EDITION)
def test_three_iterations_are_those_of_the_first_edition(tmp_path, changes, weights, losses):
    args = ppo.Args(total_timesteps=1536, eval_episodes=0, output_dir=str(tmp_path), run_name="run")
    agent = train(replace(args, **changes))
    total = sum(x.double().abs().sum().item() for x in agent.parameters())
    assert total == pytest.approx(weights, rel=1e-5 / 10)
    for name, value in losses.items():
        assert curve(args, f"losses/{name}")[-1][1] == pytest.approx(value, rel=1e-5, abs=1e-5)


# The whole run ------------------------------------------------------------------------------------


def test_cartpole_is_learnt(args, capsys):
    ppo.main(ppo.Args(total_timesteps=40_960, output_dir=args.output_dir, run_name="run"))
    output = capsys.readouterr().out
    last = [line for line in output.splitlines() if line.startswith("step")][-1]
    assert float(last.split("return")[1].split()[0]) > 150  # a random policy: about 22


def test_the_same_seed_gives_the_same_run(args):
    first, second = train(args, run_name="a"), train(args, run_name="b")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_policy_evaluates_as_before_with_frozen_statistics(args, capsys):
    agent = train(args, **PENDULUM, num_envs=1, eval_episodes=2, seed=2)
    trained = capsys.readouterr().out.splitlines()[-1]  # seed 2: the replay knows it
    run_dir = Path(args.output_dir, "run")
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    ppo.main(ppo.Args(eval_only=run_dir, eval_episodes=2))
    assert capsys.readouterr().out.splitlines()[-1] == trained and "Pendulum" in trained
    ppo.evaluate(agent, replace(args, env_id="Pendulum-v1"), run_dir)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


def test_a_run_that_is_killed_leaves_its_last_model(args, monkeypatch):
    def killed(self, envs, *rest):
        if envs.steps_done == 30 * 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo.RunLog, "iteration", killed)
    with pytest.raises(KeyboardInterrupt):
        train(args, total_timesteps=1600)  # 40 iterations, a save after every second one
    agent, _ = ppo.load_agent(Path(args.output_dir, "run"))
    assert agent.actor[-1].bias.abs().max() > 0  # zero before training


def test_without_its_statistics_the_policy_is_another_one(args):
    agent = train(args, **PENDULUM, num_envs=1)
    obs = np.array([[0.1, 0.9, 5.0]], dtype=np.float32)
    with_statistics = agent.act(obs, greedy=True)
    agent.obs_norm = ppo.RunningStats(3)
    assert not np.allclose(with_statistics, agent.act(obs, greedy=True), atol=1e-6)


def test_curves_have_the_names_of_cleanrl(args):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(args, total_timesteps=800)
    events = EventAccumulator(str(Path(args.output_dir, "run"))).Reload()
    wanted = """charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate
        losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/clipfrac
        losses/explained_variance"""
    assert set(wanted.split()) <= set(events.Tags()["scalars"])
    rates = [point.value for point in events.Scalars("charts/learning_rate")]
    assert np.allclose(rates, [2.5e-4 * (1 - i / 20) for i in range(20)])  # 20 iterations, to 0


def test_evaluation_clips_actions_and_sums_the_rewards_of_each_episode(args):
    agent, _, args = make("Narrow-v0", replace(args, eval_episodes=2))
    agent.actor[-1].bias.data += 5
    Narrow.given.clear()
    assert ppo.evaluate(agent, args, Path()) == [3.0, 3.0]
    assert np.max(Narrow.given) <= np.float32(0.1)


def test_evaluation_episodes_differ_but_are_the_same_each_time(args):
    agent, _, args = make("Pendulum-v1", replace(args, eval_episodes=2))
    first, second = (ppo.evaluate(agent, args, Path()) for _ in range(2))
    assert first == second and first[0] != first[1]
    assert first != ppo.evaluate(agent, replace(args, seed=2), Path())


def test_curves_are_drawn_over_environment_steps_and_beta_follows_the_kl(args):
    train(args, env_id="Clock-v0", policy_loss="kl-adaptive", kl_target=10.0, num_steps=6,
          total_timesteps=36)
    assert curve(args, "losses/kl_beta") == [(12, 1.0), (24, 0.5), (36, 0.25)]
    steps = [step for step, _ in curve(args, "charts/episodic_return")]
    assert steps == [6, 6, 12, 12, 18, 18, 24, 24, 30, 30, 36, 36]


def test_the_settings_follow_the_action_space_and_flags_override_them(args, capsys):
    assert ppo.resolve_args(ppo.Args(run_name="x")).num_steps == 128
    continuous = ppo.resolve_args(ppo.Args(env_id="Pendulum-v1", num_envs=3, run_name="x"))
    assert (continuous.num_steps, continuous.num_envs, continuous.norm_obs) == (2048, 3, True)


def test_an_evaluation_without_time_limit_ends(args):
    agent, _, args = make("Endless-v0", args)
    assert ppo.evaluate(agent, args, Path()) == [0.0]


def test_a_non_finite_reward_stops_the_run_and_spares_the_saved_model(args, monkeypatch):
    rewards = iter([1.0] * 50 + [math.nan] * 30)  # in the second of two rollouts
    monkeypatch.setattr(Endless, "step", lambda self, _: (
        self.obs(), next(rewards), False, False, {}))
    with pytest.raises(FloatingPointError, match=r"iteration 2, step 1: .* is nan; lower"):
        train(args, env_id="Endless-v0")
    agent, _ = ppo.load_agent(Path(args.output_dir, "run"))
    assert all(x.isfinite().all() for x in agent.parameters())


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "grad_norm"])
def test_a_number_that_is_not_finite_stops_the_update_before_its_step(args, name):
    agent, envs, args = make("Counter-v0", args)
    rollout = collect(agent, envs, args)
    if name == "grad_norm":  # finite losses, but a gradient that is not
        agent.critic[0].weight.register_hook(lambda grad: grad * math.inf)
    else:
        (rollout.advantages if name == "policy_loss" else rollout.returns).fill_(math.nan)
    before = deepcopy(agent.state_dict())
    with pytest.raises(FloatingPointError, match=f"iteration 7, step 1: {name} is"):
        ppo.update_policy(agent, torch.optim.Adam(agent.parameters()), rollout, 0.0, 7, args)
    assert all(torch.equal(x, before[key]) for key, x in agent.state_dict().items())


def test_the_step_at_which_an_update_stopped_is_counted_over_its_epochs(args):
    agent, envs, args = make("Counter-v0", replace(args, num_minibatches=1, update_epochs=3))
    rollout, backwards = collect(agent, envs, args), iter([1.0, 1.0, math.nan])
    agent.critic[0].weight.register_hook(lambda grad: grad * next(backwards))
    with pytest.raises(FloatingPointError, match="iteration 1, step 3: grad_norm is nan"):
        ppo.update_policy(agent, torch.optim.Adam(agent.parameters()), rollout, 0.0, 1, args)


def test_what_is_saved_is_what_an_evaluation_needs(args):
    """No reward statistics: nothing continues a run, and an evaluation reports raw rewards."""
    train(args, norm_reward=True)
    assert set(torch.load(Path(args.output_dir, "run", "model.pt"))) == {"args", "agent"}


# What each flag changes. The weights after two iterations differ from those of the base run.
CHANGES = {
    "env_id": "Acrobot-v1", "total_timesteps": 120, "num_envs": 4, "num_steps": 10,
    "num_minibatches": 4, "update_epochs": 3, "learning_rate": 1e-3, "anneal_lr": False,
    "gamma": 0.5, "gae_lambda": 0.5, "policy_loss": "none", "clip_coef": 1e-4, "clip_vloss": False,
    "norm_advantages": False, "ent_coef": 0.5, "vf_coef": 2.0, "max_grad_norm": 0.01,
    "target_kl": 1e-12, "norm_obs": True, "norm_reward": True, "orthogonal_init": False, "seed": 2,
}
CHANGES_KL = {"kl_beta": 50.0, "kl_target": 1e-9}  # of the run with --policy-loss kl-adaptive
ELSEWHERE = {"device", "eval_episodes", "eval_only", "capture_video", "output_dir", "run_name"}


def test_every_flag_is_in_one_of_the_tests_below():
    assert {x.name for x in fields(ppo.Args)} == {*CHANGES, *CHANGES_KL, *ELSEWHERE}


@pytest.mark.parametrize("name", [*CHANGES, *CHANGES_KL])
def test_each_flag_changes_the_trained_weights(args, name):
    args = replace(args, policy_loss="kl-adaptive") if name in CHANGES_KL else args
    # A first rollout far from the optimum: large steps, so that clipping has something to do.
    args = replace(args, learning_rate=1e-2, eval_episodes=0)
    base = train(args, run_name="base")
    changed = train(args, run_name="changed", **{name: (CHANGES | CHANGES_KL)[name]})
    pairs = zip(base.parameters(), changed.parameters(), strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_evaluation_episodes_are_counted_and_filmed(args, capsys):
    train(args, eval_episodes=2, capture_video=True, run_name="film")
    assert "over 2 episodes" in capsys.readouterr().out
    assert len(list(Path(args.output_dir, "film", "videos").glob("*.mp4"))) == 2


@pytest.mark.parametrize(("changes", "words"), [
    ({"gamma": 1.5}, "--gamma 1.5 is out of range; it must be from 0 to 1"),
    ({"gae_lambda": math.nan}, "--gae-lambda nan is out of range"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0 is out of range; it must be above 0"),
    ({"num_envs": 0}, "--num-envs 0 is out of range; it must be above 0"),
    ({"num_minibatches": 3}, "--num-minibatches 3 does not divide a rollout of --num-envs 2"),
    ({"total_timesteps": 20}, "--total-timesteps 20 is less than one rollout of 40"),
    ({"env_id": "CartPole-v99"}, "--env-id CartPole-v99 cannot be used"),
    ({"env_id": "NoSuchTask-v0"}, "--env-id NoSuchTask-v0 cannot be used"),
    ({"seed": -1}, "--seed -1 is out of range; it must be from 0 to"),
    ({"max_grad_norm": math.nan}, "--max-grad-norm nan is out of range"),
    ({"capture_video": True, "eval_episodes": 0}, "--eval-episodes 0 leaves"),
    ({"output_dir": "/proc/x"}, "'/proc/x'); choose another, or another --output-dir"),
    ({"eval_only": Path("nowhere")}, "--eval-only nowhere cannot be used"),
    ({"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device; use --device cpu"),
])
def test_bad_input_is_refused_in_one_sentence(args, capsys, monkeypatch, changes, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        ppo.main(replace(args, **changes))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and words in message and message.count("\n") == 1


def test_an_existing_run_is_not_overwritten(args, capsys):
    train(args)
    with pytest.raises(SystemExit):
        ppo.main(args)
    assert "--run-name run cannot be used (FileExistsError" in capsys.readouterr().err


def test_other_action_spaces_are_refused(args, capsys, monkeypatch):
    monkeypatch.setattr(Counter, "action_space", gymnasium.spaces.MultiDiscrete([2, 2]))
    with pytest.raises(SystemExit):
        ppo.main(replace(args, env_id="Counter-v0"))
    message = capsys.readouterr().err
    assert "--env-id Counter-v0" in message and "Discrete or one-dimensional real Box" in message


def test_an_evaluation_of_no_episodes_is_refused(args, capsys):
    train(args)
    with pytest.raises(SystemExit):
        ppo.main(ppo.Args(eval_only=Path(args.output_dir, "run"), eval_episodes=0))
    assert "--eval-episodes 0 leaves --eval-only" in capsys.readouterr().err


def test_what_cannot_be_filmed_is_refused_before_training(args, capsys, monkeypatch):
    monkeypatch.setattr(Counter, "render", lambda self: 1 / 0, raising=False)
    with pytest.raises(SystemExit):
        ppo.main(replace(args, env_id="Counter-v0", capture_video=True))
    message = capsys.readouterr().err
    assert "--env-id Counter-v0 with --capture-video cannot be used" in message
    assert not Path(args.output_dir, "run").exists()


def test_observations_of_any_shape_become_one_row(args):
    assert ppo.make_env("FrozenLake-v1").observation_space.shape == (16,)  # one of 16 fields
    train(args, env_id="FrozenLake-v1", total_timesteps=40)


def test_the_curve_of_returns_is_not_that_of_lengths(args, monkeypatch):
    step = Counter.step
    monkeypatch.setattr(Counter, "step", lambda *x: (lambda y: (y[0], 2.0, *y[2:]))(step(*x)))
    train(args, env_id="Counter-v0")
    assert {value for _, value in curve(args, "charts/episodic_return")} == {6.0}
    assert {value for _, value in curve(args, "charts/episodic_length")} == {3.0}


def test_the_saved_model_is_that_of_the_last_iteration(args, monkeypatch):
    kept = []
    monkeypatch.setattr(ppo, "evaluate", lambda agent, *x: kept.append(agent))
    saved = train(args, total_timesteps=41 * 40)  # a save after every second of 41 iterations
    for a, b in zip(saved.parameters(), kept[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_evaluation_seed_is_far_from_those_of_training(args, monkeypatch):
    agent, _, args = make("Counter-v0", replace(args, eval_episodes=2))
    seeds, reset = [], Counter.reset
    monkeypatch.setattr(Counter, "reset", lambda self, seed=None, options=None:
                        seeds.append(seed) or reset(self))
    ppo.evaluate(agent, args, Path())
    given = [seed for seed in seeds if seed is not None]
    assert len(given) == 1 and given[0] > args.seed + 100_000
