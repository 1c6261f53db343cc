"""PPO on control tasks in one file: the algorithm of ppo_rlhf.py on tasks whose results are known.

    python ppo_classic.py                            # CartPole-v1, less than a minute on a CPU
    python ppo_classic.py --env-id HalfCheetah-v5    # continuous actions have other defaults
    python ppo_classic.py --eval-only runs/NAME --capture-video    # film the trained policy

PPO (Schulman et al. 2017, arXiv 1707.06347) repeats two stages. It acts for num_steps steps in
num_envs copies of the environment, and estimates the advantage A of each action: how much better it
turned out than the critic expected. Then it trains for a few epochs on these steps, to maximise

    E[ min(ratio·A, clip(ratio, 1 − ε, 1 + ε)·A) ],   ratio = π_new(action) / π_old(action)

Good actions become likelier and bad ones less likely, until the ratio leaves 1 ± ε: data from the
old policy say little about a policy far from it. Functions have the same names as in ppo_rlhf.py,
but need no mask: responses differ in length, a rollout is a full rectangle. Shapes:

    num_steps    steps per rollout: the first dimension      obs_size    numbers per observation
    num_envs     environments side by side: the second       batch       num_steps * num_envs

[37 details] is Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization".
"""

import math
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch  # gymnasium, tyro, tensorboard are imported where used: the math needs torch alone
from torch import Tensor, nn


@dataclass
class Args:
    """PPO on Gymnasium tasks. Where the help of a flag ends in a pair, such as (4, 1), discrete
    actions have the first default (as in CleanRL), continuous ones the second (as in the paper)."""

    env_id: str = "CartPole-v1"  # Gymnasium environment with discrete or continuous (Box) actions
    total_timesteps: int | None = None  # environment steps, in whole rollouts (500000, 1000000)
    num_envs: int | None = None  # environments that run side by side (4, 1)
    num_steps: int | None = None  # steps of each environment per rollout (128, 2048)
    num_minibatches: int | None = None  # optimizer steps per epoch (4, 32)
    update_epochs: int | None = None  # passes over each rollout (4, 10)
    learning_rate: float | None = None  # of Adam, for actor and critic (0.00025, 0.0003)
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # 0: advantages from the critic (one-step TD error); 1: from rewards
    policy_loss: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"  # the paper's table 1
    clip_coef: float = 0.2  # actions whose ratio has moved past 1 ± this lose their gradient
    clip_vloss: bool = True  # clip new values to the old ones ± --clip-coef, in units of returns
    kl_beta: float = 1.0  # weight of the KL penalty, per nat; kl-adaptive starts with it
    kl_target: float = 0.01  # KL in nats per action to which kl-adaptive steers each update
    norm_advantages: bool = True  # shift and scale advantages to mean 0, std 1 over the batch
    ent_coef: float | None = None  # weight of the entropy bonus, per nat (0.01, 0.0)
    vf_coef: float = 0.5  # weight of the value loss, which carries the factor ½
    max_grad_norm: float = 0.5  # global norm to which gradients are clipped; inf: not at all
    target_kl: float | None = None  # approx_kl, in nats per action, that ends the epochs early
    norm_obs: bool | None = None  # observations to mean 0, std 1, clipped to ± 10 (False, True)
    norm_reward: bool | None = None  # rewards over std of returns, clipped to ± 10 (False, True)
    orthogonal_init: bool = True  # start from orthogonal weights, else from PyTorch's own
    seed: int = 1  # of environments, weights, sampling and shuffling
    device: Literal["cpu", "cuda"] = "cpu"  # a CPU is faster for networks of this size
    eval_episodes: int = 10  # episodes played after training, always with the likeliest action
    eval_only: Path | None = None  # folder of a finished run: evaluate it with its own settings
    capture_video: bool = False  # film the evaluation: videos/ in the folder of the run
    output_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run (default: environment, seed, time)

    @property
    def batch_size(self) -> int:
        """Steps per rollout over all environments."""
        return self.num_envs * self.num_steps


DEFAULTS = {"total_timesteps": (500_000, 1_000_000), "num_envs": (4, 1), "num_steps": (128, 2048),
            "num_minibatches": (4, 32), "update_epochs": (4, 10), "learning_rate": (2.5e-4, 3e-4),
            "ent_coef": (0.01, 0.0), "norm_obs": (False, True), "norm_reward": (False, True)}


# ==================================================================================================
# The PPO math: pure functions of tensors
# ==================================================================================================


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree: (batch,) minus (batch, 1) would just broadcast."""
    if len({x.shape for x in tensors.values()}) > 1:
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"shapes differ: {shapes}")


def whiten(x: Tensor) -> Tensor:
    """Shift to mean 0, scale to variance 1 (biased)."""
    return (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)


def logprobs_from_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at the ids, in nats: logits[id] − logsumexp. (..., n), (...) -> (...)"""
    check_same_shape(logits=logits[..., 0], ids=ids)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), in nats: H = logsumexp(z) − Σ softmax(z)·z. (..., n) -> (...)"""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def gaussian_logprobs(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(a; μ, σ²), summed over the action's dimensions, in nats [37 details, continuous #3].
    Args: mean, actions (..., action_size); log_std (action_size,). Returns: (...)."""
    check_same_shape(mean=mean, actions=actions)
    distance = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * distance**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Σ (log σ + ½·log(2πe)) over the dimensions, in nats; it does not depend on the mean."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(−d) − 1 + d, d = logprobs − ref_logprobs: KL(π ‖ π_ref) per action, in nats.

    It is never negative, and unbiased if the actions were drawn from π. Here the old policy drew
    them, so kl_penalty(old_logprobs, new_logprobs) estimates KL(π_old ‖ π_new) and its gradient.
    One number per action. Source: Schulman, "Approximating KL divergence" (2020), k3."""
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio  # expm1(x) = exp(x) − 1, exact near 0


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last step backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·V(next_obsₜ) − V(obsₜ).
    V(next_obs) counts as 0 after termination, not after truncation. Aₜ₊₁ counts as 0 after both,
    because the next row belongs to another episode. The returns, Aₜ + Vₜ, are the critic's targets.
    Args: (num_steps, num_envs) each; terminated, truncated bool. Returns: advantages, returns, the
    same shape. Source: PPO paper, eqs. 11-12; Schulman et al. 2015 (1506.02438)."""
    check_same_shape(rewards=rewards, values=values, next_values=next_values,
                     terminated=terminated, truncated=truncated)
    deltas = rewards + gamma * torch.where(terminated, 0, next_values) - values
    decays = gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])  # (num_envs,)
    for t in reversed(range(len(rewards))):
        next_advantage = deltas[t] + decays[t] * next_advantage
        advantages[t] = next_advantage
    return advantages, advantages + values


def policy_loss(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated: −E[ min(ratio·A, clip(ratio, 1 − ε, 1 + ε)·A) ].

    ratio = π_new / π_old. Once it has left [1 − ε, 1 + ε] in the direction that A favours, the
    gradient is zero. With ε = ∞ this is the surrogate without clipping of the paper's table 1.
    Args: (batch,) each; clip_coef is ε. Returns: loss; clipfrac, the share of actions whose
    gradient is zero. Source: PPO paper, eq. 7."""
    check_same_shape(new=new_logprobs, old=old_logprobs, advantages=advantages)
    ratio = torch.exp(new_logprobs - old_logprobs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    loss = -torch.min(unclipped, clipped).mean()
    return loss, (clipped < unclipped).float().mean()


def value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, vf_clip_coef: float
) -> tuple[Tensor, Tensor]:
    """½·E[ max((V − R)², (V_old + clip(V − V_old, −c, c) − R)²) ]   [37 details, core #9].
    Args: (batch,) each; vf_clip_coef is c, in units of the return, ∞ for no clipping. Returns:
    loss; clipfrac, the share of steps for which the clipped term is the larger one."""
    check_same_shape(new=new_values, old=old_values, returns=returns)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    unclipped = (new_values - returns) ** 2
    clipped = (old_values + change - returns) ** 2
    loss = 0.5 * torch.max(unclipped, clipped).mean()
    return loss, (clipped > unclipped).float().mean()


def adaptive_kl_beta(kl_beta: float, observed_kl: float, kl_target: float) -> float:
    """β/2 if KL < target/1.5, 2β if KL > 1.5·target, else β. Source: PPO paper, section 4.
    Args: observed_kl is KL(π_old ‖ π_new) after the update; both KLs in nats per action."""
    if observed_kl < kl_target / 1.5:
        return kl_beta / 2
    return kl_beta * 2 if observed_kl > kl_target * 1.5 else kl_beta


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    variance = returns.var(correction=0)
    if variance <= 1e-10 * (returns**2).mean():  # constant up to rounding
        return math.nan
    return float(1 - (returns - values).var(correction=0) / variance)


# ==================================================================================================
# Agent, rollout, update, main
# ==================================================================================================


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far: buffers, so they are saved with the model."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Add rows (batch, size). Source: Chan et al. 1979, the variance of two sets together."""
        share = len(rows) / (self.count + len(rows))  # of the new rows in all rows
        change = rows.mean(dim=0) - self.mean
        self.mean = self.mean + share * change
        self.var = ((1 - share) * self.var + share * rows.var(dim=0, correction=0)
                    + share * (1 - share) * change**2)
        self.count = self.count + len(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """Shift to mean 0, scale to std 1, clip to ± 10 [37 details, continuous #6, #7]."""
        return ((rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)


def mlp(input_size: int, output_size: int, output_gain: float, orthogonal: bool) -> nn.Sequential:
    """Two hidden layers of 64 tanh units. Orthogonal start: [37 details, core #2]."""
    layers = [nn.Linear(input_size, 64), nn.Linear(64, 64), nn.Linear(64, output_size)]
    if orthogonal:
        for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), output_gain), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class ActorCritic(nn.Module):
    """Two separate networks. The actor gives a logit for each discrete action, or the mean of a
    Gaussian whose std does not depend on the observation [37 details, continuous #2]."""

    def __init__(self, env, args: Args):
        super().__init__()
        obs_size, space = env.observation_space.shape[0], env.action_space
        self.discrete = space.shape == ()
        action_size = int(space.n) if self.discrete else space.shape[0]
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(action_size))
        self.actor = mlp(obs_size, action_size, 0.01, args.orthogonal_init)
        self.critic = mlp(obs_size, 1, 1.0, args.orthogonal_init)
        self.obs_norm = RunningStats(obs_size) if args.norm_obs else nn.Identity()
        self.device = torch.device(args.device)
        self.to(self.device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Draw an action for each observation (num_envs, obs_size), or take the likeliest one."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        output = self.actor(self.obs_norm(obs))  # (num_envs, action_size)
        if self.discrete:  # exponential race: the distribution of torch.multinomial, but faster
            noise = torch.ones_like(output) if greedy else torch.empty_like(output).exponential_()
            actions = (output.softmax(dim=-1) / noise).argmax(dim=-1)  # (num_envs,)
        else:
            noise = torch.zeros_like(output) if greedy else torch.randn_like(output)
            actions = output + self.log_std.exp() * noise
        return actions.cpu().numpy()

    def values(self, obs: Tensor) -> Tensor:
        """V(obs): (..., obs_size) -> (...). The network's last dimension, of size 1, is dropped."""
        return self.critic(self.obs_norm(obs)).squeeze(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions, entropies, values: one number per observation."""
        output, values = self.actor(self.obs_norm(obs)), self.values(obs)
        if self.discrete:
            return logprobs_from_logits(output, actions), entropy(output), values
        entropies = gaussian_entropy(self.log_std).expand_as(values)
        return gaussian_logprobs(output, self.log_std, actions), entropies, values


@dataclass
class Rollout:
    """One iteration, (num_steps, num_envs, …) each. An example, in which an episode ends with s3:

        row                       0      1      2      3      4
        obs                      s0     s1     s2     u0     u1
        next_obs                 s1     s2     s3     u1     u2
        terminated | truncated    -      -      1      -      -

    If s3 is truncated, by a time limit, V(s3) stands for the rewards that would follow; if it is
    terminated, because the task is over, none would. V(u2) stands for those of the next rollout."""

    obs: Tensor
    actions: Tensor  # as drawn; only the environment gets them clipped to its bounds
    next_obs: Tensor
    rewards: Tensor  # as the environment gave them
    terminated: Tensor  # bool
    truncated: Tensor  # bool
    old_logprobs: Tensor  # nats
    old_values: Tensor  # in units of the returns, so after --norm-reward
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def collect_rollout(agent: ActorCritic, envs, reward_stats: RunningStats, args: Args) -> Rollout:
    """Act for num_steps steps, then compute log-probabilities, values and advantages for them."""
    steps = []
    for _ in range(args.num_steps):
        obs, actions = envs.obs, agent.act(envs.obs)
        steps.append((obs, actions, *envs.step(actions)))
    obs, actions, next_obs, rewards, reward_sums, terminated, truncated = (
        torch.as_tensor(np.stack(column), device=args.device)  # (num_steps, num_envs, …)
        for column in zip(*steps, strict=True))
    obs, next_obs, rewards, scaled = obs.float(), next_obs.float(), rewards.float(), rewards.float()
    if args.norm_reward:  # no shift: it would change what is best [37 details, continuous #8, #9]
        reward_stats.update(reward_sums.reshape(-1, 1))
        scaled = (rewards * torch.rsqrt(reward_stats.var + 1e-8)).clamp(-10, 10)
    # The update calls agent in the same way, so the ratio is 1 before its first step.
    old_logprobs, _, old_values = agent(obs, actions)  # (num_steps, num_envs) each
    advantages, returns = gae(scaled, old_values, agent.values(next_obs), terminated, truncated,
                              args.gamma, args.gae_lambda)
    if args.norm_advantages:  # but not the returns: the critic has to learn them as they are
        advantages = whiten(advantages)
    return Rollout(obs, actions, next_obs, rewards, terminated, truncated, old_logprobs,
                   old_values, advantages, returns)


def update_policy(agent, optimizer, rollout: Rollout, kl_beta, iteration, args: Args) -> dict:
    """Train for a few epochs. Returns: statistics, means over the steps. Source: paper, eqs. 8, 9.
    loss = policy loss + vf_coef · value loss − ent_coef · entropy + kl_beta · KL(π_old ‖ π_new)"""
    clip_coef = args.clip_coef if args.policy_loss == "clip" else math.inf
    vf_clip_coef = args.clip_coef if args.clip_vloss else math.inf
    batch = [x.flatten(0, 1) for x in (  # (num_steps, num_envs, …) -> (batch, …)
        rollout.obs, rollout.actions, rollout.old_logprobs, rollout.old_values, rollout.advantages,
        rollout.returns)]
    parameters, size, steps = list(agent.parameters()), args.batch_size // args.num_minibatches, []
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size)
        minibatches = zip(*(x[order].split(size) for x in batch), strict=True)
        for obs, actions, old_logprobs, old_values, advantages, returns in minibatches:
            new_logprobs, entropies, new_values = agent(obs, actions)  # (minibatch,) each
            pg_loss, clipfrac = policy_loss(new_logprobs, old_logprobs, advantages, clip_coef)
            vf_loss, vf_clipfrac = value_loss(new_values, old_values, returns, vf_clip_coef)
            loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropies.mean()
            if kl_beta > 0:
                loss = loss + kl_beta * kl_penalty(old_logprobs, new_logprobs).mean()
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            stats = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": entropies.mean(),
                     "clipfrac": clipfrac, "vf_clipfrac": vf_clipfrac, "grad_norm": grad_norm}
            steps.append({name: value.item() for name, value in stats.items()})
            for name, value in steps[-1].items():  # checked before it can get into the weights
                if not math.isfinite(value):
                    where = f"iteration {iteration}, step {len(steps)}"
                    raise FloatingPointError(f"{where}: {name} is {value}; lower --learning-rate")
            optimizer.step()
        if args.target_kl is not None and measure_kl(agent, rollout) > args.target_kl:
            break
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    means["approx_kl"] = measure_kl(agent, rollout)  # no mean: how far the whole update went
    means["explained_variance"] = explained_variance(rollout.returns, rollout.old_values)
    return means


@torch.no_grad()
def measure_kl(agent: ActorCritic, rollout: Rollout) -> float:
    """KL(π_old ‖ π_new) per action over the rollout, in nats."""
    new_logprobs, _, _ = agent(rollout.obs, rollout.actions)
    return kl_penalty(rollout.old_logprobs, new_logprobs).mean().item()


def main(args: Args) -> None:
    """Train a policy and evaluate it; with --eval-only, evaluate the policy of a finished run."""
    torch.set_num_threads(1)  # sharing such small matrices among threads costs more than it saves
    if args.eval_only is not None:
        agent, trained_args = load_agent(args.eval_only, args.device)
        args = replace(trained_args, eval_only=args.eval_only, eval_episodes=args.eval_episodes,
                       capture_video=args.capture_video)
        evaluate(agent, resolve_args(args), args.eval_only)
        return
    args = resolve_args(args)
    torch.manual_seed(args.seed)
    envs = Envs([lambda: make_env(args.env_id)] * args.num_envs, args.seed, args.gamma)
    agent = ActorCritic(make_env(args.env_id), args)
    reward_stats = RunningStats(1).to(args.device)
    # eps: [37 details, core #3]. fused: one call updates all parameters, which is faster.
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    kl_beta = args.kl_beta if args.policy_loss in ("kl-fixed", "kl-adaptive") else 0.0
    log, num_iterations = RunLog(args), args.total_timesteps // args.batch_size
    for iteration in range(1, num_iterations + 1):
        progress = (iteration - 1) / num_iterations if args.anneal_lr else 0.0
        optimizer.param_groups[0]["lr"] = learning_rate = (1 - progress) * args.learning_rate
        rollout = collect_rollout(agent, envs, reward_stats, args)
        if iteration == 1 and not agent.discrete:
            envs.note_clipping(rollout.actions)
        stats = update_policy(agent, optimizer, rollout, kl_beta, iteration, args)
        if args.norm_obs:  # after the update: old and new log-probabilities need the same inputs
            agent.obs_norm.update(rollout.obs.flatten(0, 1))
        due = iteration % max(1, num_iterations // 20) == 0 or iteration == num_iterations
        log.iteration(envs, stats | {"kl_beta": kl_beta}, learning_rate, due)
        if due:  # write, then rename: a run that is killed leaves no half-written file
            saved = {"args": asdict(args), "agent": agent.state_dict()}
            torch.save(saved, log.run_dir / "model.tmp")
            (log.run_dir / "model.tmp").replace(log.run_dir / "model.pt")
        if args.policy_loss == "kl-adaptive":
            kl_beta = adaptive_kl_beta(kl_beta, stats["approx_kl"], args.kl_target)
    log.writer.close()
    if args.eval_episodes > 0:
        evaluate(agent, args, log.run_dir)


# ==================================================================================================
# To understand PPO you need nothing below: environments, checks of the settings, evaluation, log
# ==================================================================================================


class Envs:
    """Environments side by side. Each goes on in a rollout where it stopped in the last one."""

    def __init__(self, makers: list, seed: int, gamma: float):
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        # SAME_STEP: the step that ends an episode also returns the first observation of the next.
        # Gymnasium's default, NEXT_STEP, would insert a row in which the action is ignored.
        self.vector_env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.obs, _ = self.vector_env.reset(seed=seed)  # environment i gets seed + i
        self.gamma, self.reward_sums = gamma, np.zeros(len(makers), dtype=np.float32)
        self.returns, self.lengths = np.zeros(len(makers)), np.zeros(len(makers), dtype=int)
        self.steps_done, self.finished = 0, []  # finished episodes: (steps_done, return, length)

    def step(self, actions: np.ndarray) -> tuple:
        """Act everywhere. Returns (num_envs, …) each: next_obs, rewards, reward_sums (the episode's
        rewards so far, older ones discounted: Gₜ = rₜ + γ·Gₜ₋₁), terminated, truncated."""
        space = self.vector_env.single_action_space
        if space.shape == ():  # discrete actions may be counted from another number than 0
            actions = (actions + space.start).astype(space.dtype)
        else:
            actions = np.clip(actions, space.low, space.high).astype(space.dtype)
        self.obs, rewards, terminated, truncated, infos = self.vector_env.step(actions)
        self.steps_done += len(rewards)
        self.returns += rewards
        self.lengths += 1
        reward_sums = self.gamma * self.reward_sums + rewards.astype(np.float32)
        self.reward_sums, next_obs = reward_sums.copy(), self.obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            next_obs[i] = infos["final_obs"][i]
            self.finished.append((self.steps_done, self.returns[i], self.lengths[i]))
            self.returns[i] = self.lengths[i] = self.reward_sums[i] = 0
        return next_obs, rewards, reward_sums, terminated, truncated

    def note_clipping(self, actions: Tensor) -> None:
        """Print a note if all draws for one of the actions' dimensions lie outside its bounds."""
        space, drawn = self.vector_env.single_action_space, actions.flatten(0, 1).cpu().numpy()
        for i in np.flatnonzero(((drawn <= space.low) | (drawn >= space.high)).all(axis=0))[:1]:
            print(f"note: action {i} was always clipped to {space.low[i]:g} … {space.high[i]:g} "
                  "and may never be learnt; rescale it to ± 1 (gymnasium.wrappers.RescaleAction).")


def make_env(env_id: str, film: bool = False):
    """One environment whose observations are rows of numbers."""
    import gymnasium

    with refusing("--env-id", f"{env_id}{' with --capture-video' * film}", "choose one of "
                  "gymnasium.pprint_registry() with Discrete or one-dimensional real Box actions, "
                  "or install what it needs (without a display MUJOCO_GL=egl may do)"):
        env = gymnasium.make(env_id, **({"render_mode": "rgb_array"} if film else {}))
        env = gymnasium.wrappers.FlattenObservation(env)  # also copies: some reuse their array
        env = gymnasium.wrappers.TransformReward(env, lambda x: np.asarray(x).item())  # or [x]
        obs, space = env.observation_space, env.action_space
        is_row = hasattr(space, "low") and len(space.shape) == 1 and space.dtype.kind == "f"
        if obs.shape is None or not (is_row or isinstance(space, gymnasium.spaces.Discrete)):
            raise TypeError(f"observations {obs}, actions {space}")
        if film:
            env.reset()
            len(env.render())  # fails on None, what environments without pictures give
            import moviepy  # noqa: F401  gymnasium's RecordVideo writes with it
    return env


def refuse(condition, message: str) -> None:
    """If condition holds, end the run: status 2, one sentence that names flag, value, remedy."""
    if condition:
        print(f"ppo_classic.py: {message}", file=sys.stderr)
        raise SystemExit(2)


@contextmanager
def refusing(flag: str, value, remedy: str):
    """Turn any exception of the block into a refusal."""
    try:
        yield
    except Exception as error:  # environments, simulators and files fail in many ways
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        refuse(True, f"{flag} {value} cannot be used ({reason}); {remedy}.")


def resolve_args(args: Args) -> Args:
    """Fill in the defaults that depend on the action space, then refuse what cannot work."""
    is_continuous = make_env(args.env_id, args.capture_video).action_space.shape != ()
    run_name = f"{args.env_id.split('/')[-1]}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    defaults = {k: x[is_continuous] for k, x in DEFAULTS.items()} | {"run_name": run_name}
    args = replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    for holds, wanted, names in (
        (lambda x: 0 < x < math.inf, "above 0, and finite",
         "total_timesteps num_envs num_steps num_minibatches update_epochs learning_rate "
         "clip_coef kl_beta kl_target target_kl"),
        (lambda x: x > 0, "above 0", "max_grad_norm"),
        (lambda x: 0 <= x < math.inf, "0 or more, and finite", "ent_coef vf_coef eval_episodes"),
        (lambda x: 0 <= x < 2**32, "from 0 to 4294967295", "seed"),
        (lambda x: 0 <= x <= 1, "from 0 to 1", "gamma gae_lambda")):
        for name in names.split():
            refuse((value := getattr(args, name)) is not None and not holds(value),
                   f"--{name.replace('_', '-')} {value} is out of range; it must be {wanted}.")
    refuse(args.batch_size % args.num_minibatches,
           f"--num-minibatches {args.num_minibatches} does not divide a rollout of --num-envs "
           f"{args.num_envs} x --num-steps {args.num_steps}; choose numbers that divide.")
    refuse(args.total_timesteps < args.batch_size, f"--total-timesteps {args.total_timesteps} is "
           f"less than one rollout of {args.batch_size}; give more.")
    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda: PyTorch finds no CUDA device; use --device cpu.")
    refuse(args.eval_episodes == 0 and (args.eval_only or args.capture_video),
           "--eval-episodes 0 leaves --eval-only or --capture-video nothing to do; give 1 or more.")
    return args


def evaluate(agent: ActorCritic, args: Args, run_dir: Path) -> list[float]:
    """Play episodes of at most 10,000 steps with the likeliest actions. Returns: their returns."""
    from gymnasium.wrappers import RecordVideo, TimeLimit

    env = TimeLimit(make_env(args.env_id, args.capture_video), 10_000)
    if args.capture_video:
        env = RecordVideo(env, str(run_dir / "videos"), lambda i: i < args.eval_episodes)
    envs = Envs([lambda: env], args.seed + 1_000_000, args.gamma)  # a seed far from the training's
    while len(envs.finished) < args.eval_episodes:
        envs.step(agent.act(envs.obs, greedy=True))
    envs.vector_env.close()
    returns = [episode_return for _, episode_return, _ in envs.finished]
    print(f"evaluation: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over "
          f"{len(returns)} episodes of {args.env_id}, likeliest actions")
    return returns


def load_agent(run_dir: Path, device: str = "cpu") -> tuple[ActorCritic, Args]:
    """The policy of a finished run, and the settings it was trained with."""
    with refusing("--eval-only", run_dir, "give the folder of a finished run"):
        saved = torch.load(run_dir / "model.pt", weights_only=True, map_location=device)
        args = Args(**saved["args"] | {"device": device})
        agent = ActorCritic(make_env(args.env_id), args)
        agent.load_state_dict(saved["agent"])
    return agent, args


class RunLog:
    """The folder of a run: TensorBoard curves with CleanRL's names, and lines on the console."""

    def __init__(self, args: Args):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = Path(args.output_dir, args.run_name)
        refuse(Path(args.output_dir).resolve() not in self.run_dir.resolve().parents,
               f"--run-name {args.run_name} is no folder below --output-dir; choose a plain name.")
        with refusing("--run-name", args.run_name, "choose another, or another --output-dir"):
            self.run_dir.mkdir(parents=True)
        self.writer, self.start_time = SummaryWriter(str(self.run_dir)), time.perf_counter()
        self.last_returns = []  # of 100 episodes
        settings = "  ".join(f"--{k.replace('_', '-')} {v}" for k, v in asdict(args).items())
        self.writer.add_text("args", settings)
        print(textwrap.fill(settings, 100, break_on_hyphens=False))

    def iteration(self, envs: Envs, stats: dict[str, float], learning_rate: float, report: bool):
        """Log one point per finished episode and one per statistic; print a line if asked to."""
        for step, episode_return, length in envs.finished:
            self.writer.add_scalar("charts/episodic_return", episode_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.last_returns = [*self.last_returns[-99:], episode_return]
        envs.finished = []
        sps = envs.steps_done / (time.perf_counter() - self.start_time)
        scalars = {f"losses/{name}": value for name, value in stats.items()}
        scalars |= {"charts/learning_rate": learning_rate, "charts/SPS": sps}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, envs.steps_done)
        if report:
            mean = np.mean(self.last_returns) if self.last_returns else math.nan
            print(f"step {envs.steps_done:9,} | return {mean:8.1f} | KL {stats['approx_kl']:.4f} | "
                  f"clipped {stats['clipfrac']:3.0%} | explained variance "
                  f"{stats['explained_variance']:5.2f} | {sps:6,.0f} steps/s", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
