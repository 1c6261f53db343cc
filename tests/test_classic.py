"""Claim: ppo_classic.py treats episode ends, actions and statistics right, and learns.

Reference: sums written out by hand, torch.distributions, environments whose observation says which
episode and step it belongs to, and a second PPO, written plainly, that repeats whole runs.
Run: python -m pytest tests/test_classic.py (20 seconds)
"""

import math
from collections import defaultdict
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from conftest import read_curves
from gymnasium.spaces import Box, Discrete, MultiDiscrete

import ppo_classic as ppo


class Counter(gymnasium.Env):
    """Observation (episode, step); every step is worth 2; the third one ends the episode."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    given: ClassVar = []  # actions
    seeds: ClassVar = []  # of resets that had one

    def __init__(self, action_space=None):  # no render_mode: cannot be filmed
        self.action_space, self.episode = action_space or Discrete(2), -1

    def reset(self, seed=None, options=None):
        self.episode, self.step_idx = self.episode + 1, 0
        if seed is not None:
            self.seed = seed
            self.seeds.append(seed)
        return self.obs(), {}

    def obs(self):
        return np.array([self.episode, self.step_idx], dtype=np.float32)

    def step(self, action):
        self.step_idx += 1
        self.given.append(np.copy(action))
        return self.obs(), 2.0, False, self.step_idx == 3, {}


class Sloppy(Counter):
    """One array for all observations, rewards in arrays of shape (1,), and 0 or 1 for the ends."""

    shared = np.zeros(2, dtype=np.float32)

    def obs(self):
        self.shared[:] = self.episode, self.step_idx
        return self.shared

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.array([reward]), int(terminated), int(truncated), info


class Staggered(Counter):
    """Observation (seed, episode, step); episodes last as many steps as the seed says, and more."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)

    def obs(self):
        return np.array([self.seed, self.episode, self.step_idx], dtype=np.float32)

    def step(self, action):
        self.step_idx += 1
        over = self.step_idx == self.seed + self.episode % 2
        return self.obs(), self.seed + 0.1 * self.step_idx, over and self.seed == 3, over, {}


class Scripted(Counter):
    """An episode without end that gives the rewards of its script, and then breaks."""

    script: ClassVar = []

    def step(self, action):
        if not self.script:
            raise RuntimeError("broken")
        return self.obs(), self.script.pop(0), False, False, {}


class Unseen(Counter):
    """Can be asked for pictures, but gives none."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return None


for env_class in (Counter, Sloppy, Staggered, Scripted, Unseen):
    gymnasium.register(f"{env_class.__name__}-v0", entry_point=env_class)
for env_id, space in {
    "Shifted-v0": Discrete(3, start=5), "Pair-v0": MultiDiscrete([2, 2]),
    "Narrow-v0": Box(-0.1, 0.1, (2,), np.float32),
    "Far-v0": Box(np.float32([-1, 100]), np.float32([1, 200])),
}.items():
    gymnasium.register(env_id, entry_point=Counter, kwargs={"action_space": space})


# A run of two iterations on CartPole, 40 steps each.
SMALL = ppo.Args(total_timesteps=80, num_envs=2, num_steps=20, num_minibatches=2, update_epochs=2,
                 eval_episodes=1, run_name="run")


@pytest.fixture
def args(tmp_path):
    """Its settings, with a folder of the test's own."""
    return replace(SMALL, output_dir=str(tmp_path))


def train(args, **changes):
    """Run the file. Returns: the trained agent."""
    args = replace(args, **changes)
    ppo.main(args)
    return ppo.load_agent(Path(args.output_dir, args.run_name))[0]


def make(env_id, args, num_envs=1):
    """An untrained agent, its environments and the settings of both."""
    args = ppo.resolve_args(replace(args, env_id=env_id, num_envs=num_envs))
    torch.manual_seed(1)
    agent = ppo.ActorCritic(ppo.make_env(env_id), args)
    return agent, ppo.Envs([lambda: ppo.make_env(env_id)] * num_envs, 1, args.gamma), args


def collect(agent, envs, args):
    """One rollout, with reward statistics of its own."""
    return ppo.collect_rollout(agent, envs, ppo.RunningStats(1), args)


# Formulas -----------------------------------------------------------------------------------------

def test_termination_drops_the_next_value_and_truncation_keeps_it():
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    inputs = torch.tensor([[[1.0]], [[0.0]], [[10.0]]])  # reward, V of now and of next
    assert ppo.gae(*inputs, yes, no, 0.9, 0.95)[0].item() == 1.0  # 1
    assert ppo.gae(*inputs, no, yes, 0.9, 0.95)[0].item() == 10.0  # 1 + 0.9·10


def test_beta_halves_below_and_doubles_above_one_and_a_half_times_the_target():
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.006, kl_target=0.01) == 0.5
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.007, kl_target=0.01) == 1.0
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.014, kl_target=0.01) == 1.0
    assert ppo.adaptive_kl_beta(1.0, observed_kl=0.016, kl_target=0.01) == 2.0


# Rollout ------------------------------------------------------------------------------------------

def test_arrays_as_rewards_numbers_as_ends_and_a_reused_observation_change_nothing(args):
    clean, sloppy = (collect(*make(env_id, args, num_envs=2)) for env_id in (
        "Counter-v0", "Sloppy-v0"))
    for field in fields(ppo.Rollout):
        assert torch.equal(getattr(clean, field.name), getattr(sloppy, field.name)), field.name


def test_the_environment_gets_clipped_actions_and_the_rollout_keeps_the_draws(args):
    Counter.given.clear()
    agent, envs, args = make("Narrow-v0", args)
    rollout = collect(agent, envs, args)
    assert np.allclose(Counter.given, rollout.actions[:, 0].clamp(-0.1, 0.1), rtol=0, atol=1e-8)
    assert rollout.actions.abs().max() > 0.1
    normal = torch.distributions.Normal(agent.actor(rollout.obs), 1)
    logprobs = normal.log_prob(rollout.actions)
    assert torch.allclose(rollout.old_logprobs, logprobs.sum(-1), atol=1e-5)


def test_discrete_actions_are_counted_from_the_start_of_their_space(args):
    Counter.given.clear()
    _, envs, _ = make("Shifted-v0", args, num_envs=2)
    envs.step(np.array([0, 2]))
    assert Counter.given == [5, 7]


# Policies -----------------------------------------------------------------------------------------

def test_gaussian_log_probability_and_entropy_sum_over_action_dimensions():
    mean, log_std = torch.zeros(1, 2), torch.tensor([0.0, math.log(2)])
    actions = torch.tensor([[1.0, 2.0]])
    # Both actions lie one std away: −½·1 − log σ − ½·log 2π each, σ = 1 and 2.
    by_hand = -1 - math.log(2) - math.log(2 * math.pi)
    assert math.isclose(ppo.gaussian_logprobs(mean, log_std, actions).item(), by_hand, rel_tol=1e-6)
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(ppo.gaussian_entropy(log_std), normal.entropy().sum())


def test_samples_follow_the_softmax_of_the_logits_and_the_greedy_action_is_the_likeliest(args):
    agent, _, _ = make("Acrobot-v1", args)  # three actions
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    shares = np.bincount(agent.act(np.zeros((20_000, 6)))) / 20_000
    assert np.allclose(shares, [0.2, 0.5, 0.3], atol=0.015)  # 4 standard errors
    assert agent.act(np.zeros((50, 6)), greedy=True).tolist() == [1] * 50


def test_gaussian_samples_have_the_mean_and_std_of_the_policy_for_normalised_observations(args):
    agent, _, _ = make("Narrow-v0", replace(args, orthogonal_init=False))
    agent.log_std.data.copy_(torch.tensor([0.0, 1.0]))
    agent.obs_norm.update(torch.tensor([[3.0, 3.0], [7.0, 7.0]]))  # mean 5, std 2
    actions = agent.act(np.ones((20_000, 2)))
    mean = agent.actor(torch.tensor([[-2.0, -2.0]])).detach().numpy()  # (1 − 5)/2
    assert np.allclose(actions.mean(0), mean, atol=0.08)
    assert np.allclose(actions.std(0), [1, math.e], rtol=0.03)
    assert np.allclose(agent.act(np.ones((1, 2)), greedy=True), mean)


def test_the_first_weights_are_those_of_the_37_details_or_on_demand_those_of_pytorch(args):
    agent, _, _ = make("CartPole-v1", args)
    norms = {(agent.critic[0], math.sqrt(2 * 4)), (agent.critic[2], math.sqrt(2 * 64)),
             (agent.actor[0], math.sqrt(2 * 4)), (agent.actor[2], math.sqrt(2 * 64)),
             (agent.critic[-1], 1), (agent.actor[-1], 0.01 * math.sqrt(2))}
    for layer, norm in norms:  # gain · √(number of orthogonal rows or columns)
        assert math.isclose(layer.weight.norm().item(), norm, rel_tol=1e-5)
    probabilities = agent.actor(torch.randn(100, 4)).softmax(-1)
    assert (probabilities - 0.5).abs().max() < 0.01  # hardly prefers any action
    agent, _, _ = make("CartPole-v1", replace(args, orthogonal_init=False))
    for layer in (agent.actor[0], agent.actor[2], agent.critic[0], agent.critic[2]):
        limit = layer.in_features**-0.5  # uniform in ± this; orthogonal columns reach beyond it
        assert 0.9 * limit < layer.weight.abs().max() <= limit


# Running statistics -------------------------------------------------------------------------------

def test_observations_leave_with_mean_0_and_std_1_and_are_clipped_at_10():
    stats = ppo.RunningStats(1)
    stats.update(torch.tensor([[1.0], [3.0]]))  # mean 2, std 1
    rows = torch.tensor([[2.0], [4.0], [100.0], [-100.0]])
    assert stats(rows).flatten().tolist() == [0, 2, 10, -10]


@pytest.mark.parametrize(("rewards", "scaled"), [
    ([2.0, 2.0], [4, 4]),  # discounted sums of the past: 2, then 2 + 0.5·2 = 3; their std: 0.5
    ([1.0] + 9999 * [0.0], [10]), ([-1.0] + 9999 * [0.0], [-10])])
def test_rewards_are_divided_by_the_std_of_their_discounted_sum_and_clipped_at_10(rewards, scaled):
    Scripted.script[:] = rewards
    agent, envs, args = make("Scripted-v0", ppo.Args(
        num_steps=len(rewards), num_minibatches=1, norm_reward=True, gae_lambda=0.0, gamma=0.5))
    agent.critic[-1].weight.data.zero_()  # V = 0 and λ = 0: each return is one reward
    rollout = collect(agent, envs, args)
    assert rollout.rewards.flatten().tolist() == rewards  # kept as they were
    assert rollout.returns[: len(scaled), 0].tolist() == pytest.approx(scaled)


# Runs repeated by a second PPO --------------------------------------------------------------------
# Written plainly: no vector of environments, no fused optimizer, sums instead of recursions. With
# the same seed, first weights and sampling of actions it must come to the same weights and curves.

RUNS = {
    "CartPole": {"env_id": "CartPole-v1", "num_envs": 3},
    "Pendulum": {"env_id": "Pendulum-v1", "gamma": 0.9, "gae_lambda": 0.6},
    "Pendulum, own scales": {"env_id": "Pendulum-v1", "ent_coef": 0.3, "norm_obs": False,
                             "norm_reward": False, "norm_advantages": False, "vf_coef": 0.01},
    "CartPole, penalty": {"policy_loss": "kl-adaptive", "kl_target": 1e-4, "norm_reward": True,
                          "norm_obs": True, "max_grad_norm": 0.2, "clip_vloss": False},
    "CartPole, early stop": {"target_kl": 3e-4, "policy_loss": "none"},
    "Counter": {"env_id": "Counter-v0", "anneal_lr": False, "norm_reward": True, "clip_coef": 0.05},
    "Staggered": {"env_id": "Staggered-v0", "num_envs": 3, "policy_loss": "kl-fixed"},
}


def play(agent, worlds, args):
    """Act for num_steps steps in worlds: environment, observation, rewards of the episode so far.
    Returns: the first six fields of Rollout, then Gₜ, sum and number of the episode's rewards."""
    rows = []
    for _ in range(args.num_steps):
        actions = agent.act(np.stack([obs for _, obs, _ in worlds]))
        for i, (env, obs, past) in enumerate(worlds):
            space = env.action_space
            action = actions[i] if agent.discrete else actions[i].clip(space.low, space.high)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            past = [*past, reward]
            discounted = sum(args.gamma**k * r for k, r in enumerate(reversed(past)))
            rows.append((obs, actions[i], next_obs, reward, terminated, truncated, discounted,
                         sum(past), len(past)))
            over = terminated or truncated
            worlds[i] = (env, env.reset()[0], []) if over else (env, next_obs, past)
    columns = map(np.array, zip(*rows, strict=True))
    return [torch.tensor(x).unflatten(0, (-1, len(worlds))) for x in columns]


def double_sum(deltas, done, decay):
    """Aₜ = Σₗ (γλ)ˡ·δₜ₊ₗ, up to the end of the episode or of the rollout."""
    advantages = torch.zeros_like(deltas)
    for t, env in np.ndindex(*deltas.shape):
        for k in range(t, len(deltas)):
            advantages[t, env] += decay ** (k - t) * deltas[k, env]
            if done[k, env]:
                break
    return advantages


def outputs(agent, obs):
    """The policy, by torch.distributions, and V for observations, which it first normalises."""
    if isinstance(agent.obs_norm, ppo.RunningStats):
        scale = (agent.obs_norm.var + 1e-8).sqrt()
        obs = ((obs - agent.obs_norm.mean) / scale).clamp(-10, 10)
    output, values = agent.actor(obs), agent.critic(obs)[..., 0]
    if agent.discrete:
        return torch.distributions.Categorical(logits=output), values
    normal = torch.distributions.Normal(output, agent.log_std.exp())
    return torch.distributions.Independent(normal, 1), values


def losses_of(agent, batch, beta, args):
    """The loss of a minibatch, and its parts."""
    obs, actions, old_logprobs, old_values, advantages, returns = batch
    (policy, values), limit = outputs(agent, obs), args.clip_coef
    ratio, error = (policy.log_prob(actions) - old_logprobs).exp(), (values - returns) ** 2
    objective, larger = ratio * advantages, error
    if args.policy_loss == "clip":
        objective = torch.minimum(objective, ratio.clip(1 - limit, 1 + limit) * advantages)
    if args.clip_vloss:
        near = old_values + (values - old_values).clip(-limit, limit)
        larger = torch.maximum(error, (near - returns) ** 2)
    parts = {"policy_loss": -objective.mean(), "entropy": policy.entropy().mean(),
             "value_loss": larger.mean() / 2, "vf_clipfrac": (larger > error).float().mean(),
             "clipfrac": (objective < ratio * advantages).float().mean()}
    loss = (parts["policy_loss"] + args.vf_coef * parts["value_loss"]
            - args.ent_coef * parts["entropy"] + beta * (ratio - 1 - ratio.log()).mean())
    return loss, parts


def second_update(agent, optimizer, batch, beta, args):
    """Train for a few epochs. Returns: the parts of the loss, means over the steps; the KL."""
    steps = []
    for _ in range(args.update_epochs):
        for idx in torch.randperm(args.batch_size).chunk(args.num_minibatches):
            loss, parts = losses_of(agent, [x[idx] for x in batch], beta, args)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            steps.append({name: x.item() for name, x in (parts | {"grad_norm": norm}).items()})
        with torch.no_grad():  # d: old − new log-probabilities
            d = (batch[2] - outputs(agent, batch[0])[0].log_prob(batch[1])).double()
        kl = ((-d).exp() - 1 + d).mean().item()
        if args.target_kl is not None and kl > args.target_kl:
            break
    return {name: np.mean([step[name] for step in steps]) for name in steps[0]}, kl


def second_ppo(args):
    """A whole run. Returns: its agent, and its curves {name: [(step, value), …]}."""
    torch.manual_seed(args.seed)
    envs = [ppo.make_env(args.env_id) for _ in range(args.num_envs)]
    worlds = [(env, env.reset(seed=args.seed + i)[0], []) for i, env in enumerate(envs)]
    agent = ppo.ActorCritic(envs[0], args)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    rollouts, curves = [], defaultdict(list)
    beta = args.kl_beta if "kl" in args.policy_loss else 0.0
    for iteration in range(5):
        rate = args.learning_rate * (1 - iteration / 5 if args.anneal_lr else 1)
        step, optimizer.param_groups[0]["lr"] = (iteration + 1) * args.batch_size, rate
        rollouts.append(play(agent, worlds, args))
        obs, actions, next_obs, rewards, terminated, truncated, *_ = rollouts[-1]
        past = [torch.cat(x) for x in zip(*rollouts, strict=True)]
        if args.norm_reward:
            rewards = (rewards / past[6].std(correction=0)).clamp(-10, 10)
        with torch.no_grad():
            policy, values = outputs(agent, obs)
            logprobs, next_values = policy.log_prob(actions), outputs(agent, next_obs)[1]
        deltas = rewards + args.gamma * next_values * ~terminated - values
        advantages = double_sum(deltas, terminated | truncated, args.gamma * args.gae_lambda)
        returns, left = advantages + values, advantages.var()  # returns − values
        if args.norm_advantages:
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        batch = [x.flatten(0, 1) for x in (obs, actions, logprobs, values, advantages, returns)]
        stats, kl = second_update(agent, optimizer, batch, beta, args)
        stats |= {"approx_kl": kl, "kl_beta": beta,
                  "explained_variance": 1 - (left / returns.var()).item()}
        curves["charts/learning_rate"].append((step, rate))
        for name, x in stats.items():
            curves[f"losses/{name}"].append((step, x))
        if args.policy_loss == "kl-adaptive":
            beta *= 0.5 if kl < args.kl_target / 1.5 else 2 if kl > args.kl_target * 1.5 else 1
        if args.norm_obs:
            agent.obs_norm.mean = past[0].flatten(0, 1).mean(0)
            agent.obs_norm.var = past[0].flatten(0, 1).var(0, correction=0)
    for t, i in (past[4] | past[5]).nonzero().tolist():
        for name, x in (("return", past[7][t, i]), ("length", past[8][t, i])):
            curves[f"charts/episodic_{name}"].append(((t + 1) * args.num_envs, x.item()))
    return agent, curves


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_curves_are_those_of_a_second_ppo_and_have_cleanrls_names(args, name):
    args = ppo.resolve_args(replace(args, **({
        "num_steps": 16, "learning_rate": 3e-3, "update_epochs": 3, "seed": 3,
        "eval_episodes": 0} | RUNS[name])))
    args = replace(args, total_timesteps=5 * args.batch_size)
    first, (agent, expected) = train(args).state_dict(), second_ppo(args)
    for name in first.keys() - {"obs_norm.count"}:  # mean and variance of observations included
        assert torch.allclose(first[name], agent.state_dict()[name], rtol=1e-4, atol=1e-5), name
    curves = read_curves(Path(args.output_dir, "run"))
    assert curves.pop("charts/SPS") and set(curves) == set(expected)
    for name, points in expected.items():
        tolerance = 0.05 if name == "losses/vf_clipfrac" else 1e-5  # rounding decides near ties
        assert np.allclose(curves[name], points, rtol=1e-3, atol=tolerance), name


# The whole run ------------------------------------------------------------------------------------

def test_cartpole_is_learnt(args, capsys):
    ppo.main(ppo.Args(total_timesteps=40_960, output_dir=args.output_dir, run_name="run"))
    last = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")][-1]
    assert float(last.split("return")[1].split()[0]) > 150  # a random policy: about 22


def test_a_saved_policy_is_the_last_one_evaluates_as_before_and_does_not_change(args, capsys):
    # 41 iterations: saved after every second one, and after the last. Its folder knows seed 2.
    agent = train(args, env_id="Pendulum-v1", num_envs=1, num_steps=8, total_timesteps=41 * 8,
                  learning_rate=1e-2, anneal_lr=False, norm_reward=True, eval_episodes=2, seed=2)
    line, run_dir = capsys.readouterr().out.splitlines()[-1], Path(args.output_dir, "run")
    ppo.main(ppo.Args(eval_only=run_dir, eval_episodes=2))
    assert capsys.readouterr().out.splitlines()[-1] == line and "2 episodes of Pendulum" in line
    with pytest.raises(SystemExit):
        ppo.main(ppo.Args(eval_only=run_dir, eval_episodes=0))
    assert "--eval-episodes 0 leaves --eval-only" in capsys.readouterr().err
    assert set(torch.load(run_dir / "model.pt")) == {"args", "agent"}  # no reward statistics
    before = deepcopy(agent.state_dict())
    ppo.evaluate(agent, replace(args, env_id="Pendulum-v1"), run_dir)
    assert before["obs_norm.count"] == 41 * 8  # of training, not of its evaluation
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


@pytest.mark.parametrize(("rewards", "error"), [
    ([], "broken"), ([math.nan] * 40, "iteration 31, step 1: .* is nan; lower")])
def test_a_run_that_breaks_in_the_31st_of_40_iterations_leaves_its_last_model(args, rewards, error):
    Scripted.script[:] = [1.0] * (30 * 40 + 20) + rewards
    with pytest.raises((RuntimeError, FloatingPointError), match=error):
        train(args, env_id="Scripted-v0", total_timesteps=1600)
    agent, _ = ppo.load_agent(Path(args.output_dir, "run"))  # saved after every second one
    assert agent.actor[-1].bias.abs().max() > 0  # zero before training
    assert all(x.isfinite().all() for x in agent.parameters())


def test_evaluation_clips_actions_and_sums_the_rewards_of_each_episode(args):
    agent, _, args = make("Narrow-v0", replace(args, eval_episodes=2))
    agent.actor[-1].bias.data += 5
    Counter.given.clear()
    Counter.seeds.clear()
    assert ppo.evaluate(agent, args, Path()) == [6.0, 6.0]
    assert np.max(Counter.given) <= np.float32(0.1)
    assert len(Counter.seeds) == 1 and Counter.seeds[0] > args.seed + 100_000  # not of training


def test_evaluation_episodes_differ_but_are_the_same_each_time(args):
    agent, _, args = make("Pendulum-v1", replace(args, eval_episodes=2))
    first, second = (ppo.evaluate(agent, args, Path()) for _ in range(2))
    assert first == second and first[0] != first[1]
    assert first != ppo.evaluate(agent, replace(args, seed=2), Path())


def test_an_evaluation_without_time_limit_ends(args):
    agent, _, args = make("Scripted-v0", args)
    Scripted.script[:] = [0.0] * 10_000
    assert ppo.evaluate(agent, args, Path()) == [0.0]


def test_evaluation_episodes_are_counted_and_filmed(args, capsys):
    train(args, eval_episodes=2, capture_video=True, run_name="film")
    assert "over 2 episodes" in capsys.readouterr().out
    assert len(list(Path(args.output_dir, "film", "videos").glob("*.mp4"))) == 2


def test_observations_of_any_shape_become_one_row(args):
    assert ppo.make_env("FrozenLake-v1").observation_space.shape == (16,)  # one of 16 fields
    train(args, env_id="FrozenLake-v1", total_timesteps=40)


@pytest.mark.parametrize(("env_id", "number"), [("Far-v0", 1), ("Pendulum-v1", 0)])
def test_actions_that_are_always_clipped_are_noted_once(args, capsys, env_id, number):
    train(args, env_id=env_id, eval_episodes=0)
    notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert len(notes) == number
    for note in notes:  # the first action is between −1 and 1
        assert "action 1 was always clipped to 100 … 200" in note and "rescale it to ± 1" in note


@pytest.mark.parametrize(("name", "step"), [
    ("policy_loss", 1), ("value_loss", 1), ("grad_norm", 3)])
def test_a_number_that_is_not_finite_stops_the_update_before_its_step(args, name, step):
    agent, envs, args = make("Counter-v0", replace(args, num_minibatches=1, update_epochs=3))
    rollout, factors = collect(agent, envs, args), iter([1.0, 1.0, math.inf])
    if name == "grad_norm":  # finite losses, but in the third epoch a gradient that is not
        agent.critic[0].weight.register_hook(lambda grad: grad * next(factors))
    else:
        (rollout.advantages if name == "policy_loss" else rollout.returns).fill_(math.nan)
    optimizer = torch.optim.Adam(agent.parameters())
    with pytest.raises(FloatingPointError, match=f"iteration 7, step {step}: {name} is"):
        ppo.update_policy(agent, optimizer, rollout, 0.0, 7, args)
    assert optimizer.state[agent.critic[0].weight].get("step", 0) == step - 1


# Flags --------------------------------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two runs, one with clipping and one with a KL penalty: settings and weights."""
    # A first rollout far from the optimum: large steps, so that clipping has something to do.
    args = replace(SMALL, learning_rate=1e-2, eval_episodes=0,
                   output_dir=str(tmp_path_factory.mktemp("bases")))
    found = {}
    for policy_loss in ("clip", "kl-adaptive"):
        settings = replace(args, policy_loss=policy_loss, run_name=f"base-{policy_loss}")
        found[policy_loss] = settings, list(train(settings).parameters())
    return found


@pytest.mark.parametrize("name", [x.name for x in fields(ppo.Args) if x.name not in ELSEWHERE])
def test_each_flag_changes_the_trained_weights(bases, name):
    args, base = bases["kl-adaptive" if name in CHANGES_KL else "clip"]
    changed = train(args, run_name=name, **{name: (CHANGES | CHANGES_KL)[name]})
    pairs = zip(base, changed.parameters(), strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_run_and_clipping_ignores_the_weight_of_the_kl(bases):
    args, base = bases["clip"]
    again = train(args, run_name="again", kl_beta=50.0)
    assert all(torch.equal(a, b) for a, b in zip(base, again.parameters(), strict=True))


def test_the_settings_follow_the_action_space_and_flags_override_them():
    assert ppo.resolve_args(ppo.Args(run_name="x")).num_steps == 128
    continuous = ppo.resolve_args(ppo.Args(env_id="Pendulum-v1", num_envs=3, run_name="x"))
    assert (continuous.num_steps, continuous.num_envs, continuous.norm_obs) == (2048, 3, True)


@pytest.mark.parametrize(("changes", "words"), [
    ({"gamma": 1.5}, "--gamma 1.5 is out of range; it must be from 0 to 1"),
    ({"gae_lambda": math.nan}, "--gae-lambda nan is out of range"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0 is out of range; it must be above 0"),
    ({"num_envs": 0}, "--num-envs 0 is out of range; it must be above 0"),
    ({"num_minibatches": 3}, "--num-minibatches 3 does not divide a rollout of --num-envs 2"),
    ({"total_timesteps": 20}, "--total-timesteps 20 is less than one rollout of 40"),
    ({"env_id": "CartPole-v99"}, "--env-id CartPole-v99 cannot be used"),
    ({"env_id": "Pair-v0"}, "with Discrete or one-dimensional real Box actions"),
    ({"seed": -1}, "--seed -1 is out of range; it must be from 0 to"),
    ({"capture_video": True, "eval_episodes": 0}, "--eval-episodes 0 leaves"),
    *(({"capture_video": True, "env_id": f"{name}-v0"},
       f"--env-id {name}-v0 with --capture-video cannot be used (TypeError: ")
      for name in ("Counter", "Unseen")),
    ({"output_dir": "/proc/x"}, "'/proc/x'); choose another, or another --output-dir"),
    ({"run_name": "taken"}, "--run-name taken cannot be used (FileExistsError"),
    ({"run_name": "../x"}, "--run-name ../x is no folder below --output-dir; choose a plain name"),
    ({"run_name": "/proc/x"}, "--run-name /proc/x is no folder below --output-dir"),
    ({"run_name": "."}, "--run-name . is no folder below --output-dir"),
    ({"eval_only": Path("nowhere")}, "--eval-only nowhere cannot be used"),
    pytest.param({"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device; use",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")),
])
def test_bad_input_is_refused_in_one_sentence_before_training(tmp_path, capsys, changes, words):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        ppo.main(replace(SMALL, **{"output_dir": str(tmp_path / "runs")} | changes))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and words in message and message.count("\n") == 1
    assert {x.name for x in tmp_path.rglob("*")} == {"runs", "taken"}  # nothing was written
