"""PPO on control tasks in one file: the algorithm of ppo_rlhf.py, where its results are known.

    python ppo_classic.py                            # CartPole-v1, in under a minute on CPU
    python ppo_classic.py --env-id HalfCheetah-v5    # continuous actions: other defaults
    python ppo_classic.py --eval-only runs/NAME --capture-video    # look at what was learnt

Again and again: act for num_steps in num_envs copies of the environment, estimate advantages (GAE),
take a few epochs of clipped steps (Schulman et al. 2017, arXiv 1707.06347, algorithm 1).

Read beside ppo_rlhf.py, this file shows what RLHF changes. Math functions of one name are the same
but for the mask: an environment always has a next step, so a rollout is a full rectangle. Instead,
episodes end anywhere inside it, and gae is told where. Shapes, in words:

    num_steps    steps per rollout: the first dimension      obs_size    numbers per observation
    num_envs     environments side by side: the second       batch       num_steps * num_envs

    next_obs     what an action led to: the final observation where the episode ended, never the
                 first one of the next episode
    terminated   the task is over: nothing follows, V(next_obs) counts 0
    truncated    a time limit has passed: V(next_obs) stands for the rewards to come, as it does
                 after the last step of a rollout
    kl_beta      weight of the KL to the policy that sampled (kl_coef of RLHF: to the reference)

Departures. From the paper: the details of "The 37 implementation details of PPO" for control tasks;
those that are a choice have a flag. From CleanRL: a time limit is no termination; observation
statistics move once per iteration, so that old and new log-probabilities see the same inputs;
advantages are normalised over the batch; the discounted sum that scales rewards starts anew after
every episode, truncated ones included; old values and log-probabilities come from one pass after
the rollout; losses are means over the update, and approx_kl is that of the whole update; clipfrac
counts actions whose gradient is cut. Left out: Atari, recurrence, a trunk shared by actor and
critic; not yet: resuming.
"""

import math
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

# gymnasium, tyro and tensorboard are imported by the functions that use them: whoever imports this
# file for its math needs torch and numpy alone.


# ==================================================================================================
# Settings
# ==================================================================================================


@dataclass
class Args:
    """Every setting of a run.

    Where the help ends in a pair, such as (4, 1), the default is the first for discrete actions
    (those of CleanRL's ppo.py), the second for continuous ones (the paper's table 3, with the
    details of CleanRL's ppo_continuous_action.py). The run prints all settings at its start.
    """

    env_id: str = "CartPole-v1"
    """Gymnasium environment with discrete or continuous (Box) actions"""
    total_timesteps: int | None = None
    """environment steps in all, rounded down to whole rollouts (500000, 1000000)"""
    num_envs: int | None = None
    """environments side by side (4, 1)"""
    num_steps: int | None = None
    """steps of each environment per rollout (128, 2048)"""
    num_minibatches: int | None = None
    """optimizer steps per epoch (4, 32)"""
    update_epochs: int | None = None
    """passes over each rollout (4, 10)"""
    learning_rate: float | None = None
    """Adam's, for actor and critic (0.00025, 0.0003)"""
    anneal_lr: bool = True
    """decay the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.95
    """GAE: 0 trusts the critic (one-step TD error), 1 trusts the sampled rewards"""
    policy_loss: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"
    """the paper's table 1: clipped ratio; penalty on KL(old, new); or the bare surrogate"""
    clip_coef: float = 0.2
    """policy ratio is clipped to 1 ± this"""
    clip_vloss: bool = True
    """clip new values to the old ones ± --clip-coef, in units of the return"""
    kl_beta: float = 1.0
    """weight of the KL penalty, per nat; where kl-adaptive starts"""
    kl_target: float = 0.01
    """nats per action that kl-adaptive steers each update to"""
    norm_advantages: bool = True
    """shift and scale advantages to mean 0, std 1 over the batch"""
    ent_coef: float | None = None
    """weight of the entropy bonus, per nat (0.01, 0.0)"""
    vf_coef: float = 0.5
    """weight of the value loss, which carries the factor ½"""
    max_grad_norm: float = 0.5
    """global norm to which gradients are clipped; inf: not at all"""
    target_kl: float | None = None
    """approx_kl (old to new policy, nats per action) that ends the epochs of an iteration"""
    norm_obs: bool | None = None
    """True or False: observations to mean 0, std 1 by running statistics, clipped to ± 10; the
    first iteration sees them as they are (False, True)"""
    norm_reward: bool | None = None
    """True or False: rewards divided by the running std of the discounted sum of past rewards,
    then clipped to ± 10 (False, True)"""
    orthogonal_init: bool = True
    """orthogonal weights, gain √2, last layer 0.01 (actor) and 1 (critic); else PyTorch's own"""
    seed: int = 1
    """of environments, weights, sampling and shuffling"""
    device: Literal["cpu", "cuda"] = "cpu"
    """networks of this size are faster on a CPU, in one thread"""
    eval_episodes: int = 10
    """episodes of the final policy, with its likeliest actions and frozen statistics; 0: none"""
    eval_only: Path | None = None
    """folder of a finished run: evaluate its policy again, train nothing"""
    capture_video: bool = False
    """film the evaluation: videos/ in the folder of the run"""
    output_dir: str = "runs"
    """folder of all runs"""
    run_name: str | None = None
    """folder of this run (default: environment, seed, time)"""

    @property
    def batch_size(self) -> int:
        """Steps per rollout over all environments."""
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        """Rollouts, and updates, in all."""
        return self.total_timesteps // self.batch_size

    @property
    def report_interval(self) -> int:
        """Iterations between two lines on the console, and two saves: a twentieth of the run."""
        return max(1, self.num_iterations // 20)


DISCRETE = {"total_timesteps": 500_000, "num_envs": 4, "num_steps": 128, "num_minibatches": 4,
            "update_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01, "norm_obs": False,
            "norm_reward": False}
CONTINUOUS = {"total_timesteps": 1_000_000, "num_envs": 1, "num_steps": 2048, "num_minibatches": 32,
              "update_epochs": 10, "learning_rate": 3e-4, "ent_coef": 0.0, "norm_obs": True,
              "norm_reward": True}


def refuse(message: str) -> NoReturn:
    """End the run with exit status 2 and one sentence that names flag, value and remedy."""
    print(f"ppo_classic.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def resolve_args(args: Args) -> Args:
    """Fill in the defaults that follow from the action space, then refuse what cannot work."""
    space, now = make_env(args.env_id).action_space, time.strftime("%Y%m%d-%H%M%S")
    is_row = hasattr(space, "low") and len(space.shape) == 1 and space.dtype.kind == "f"
    if not is_discrete(space) and not is_row:
        refuse(f"--env-id {args.env_id} has actions {space}; choose an environment with Discrete "
               "actions, or with real numbers in a one-dimensional Box.")
    defaults = {"run_name": f"{args.env_id.split('/')[-1]}__{args.seed}__{now}"}
    defaults |= DISCRETE if is_discrete(space) else CONTINUOUS
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = replace(args, **missing)
    check_args(args)
    return args


# What numbers must satisfy, the condition in words, and the settings concerned (None is allowed).
RANGES = [
    (lambda x: x >= 1, "1 or more",
     "total_timesteps num_envs num_steps num_minibatches update_epochs"),
    (lambda x: 0 < x < math.inf, "above 0, and finite",
     "learning_rate clip_coef kl_beta kl_target target_kl"),
    (lambda x: x > 0, "above 0", "max_grad_norm"),
    (lambda x: 0 <= x < math.inf, "0 or more, and finite", "ent_coef vf_coef eval_episodes"),
    (lambda x: 0 <= x < 2**32, "from 0 to 4294967295", "seed"),
    (lambda x: 0 <= x <= 1, "from 0 to 1", "gamma gae_lambda"),
]


def check_args(args: Args) -> None:
    """Refuse numbers out of range and settings that contradict each other."""
    for holds, wanted, names in RANGES:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                refuse(f"--{name.replace('_', '-')} {value} is out of range; it must be {wanted}.")
    for contradiction, message in (
        (args.batch_size % args.num_minibatches,
         f"--num-minibatches {args.num_minibatches} does not divide a rollout of --num-envs "
         f"{args.num_envs} x --num-steps {args.num_steps}; choose numbers that divide."),
        (args.num_iterations == 0,
         f"--total-timesteps {args.total_timesteps} is less than one rollout of "
         f"{args.batch_size}; give more, or lower --num-steps."),
        (args.device == "cuda" and not torch.cuda.is_available(),
         "--device cuda: PyTorch finds no CUDA device; use --device cpu."),
        (args.capture_video and args.eval_episodes == 0,
         "--capture-video with --eval-episodes 0 films nothing; drop one of them."),
    ):
        if contradiction:
            refuse(message)


def make_run_dir(args: Args) -> Path:
    """A new folder for the files of this run."""
    run_dir = Path(args.output_dir) / args.run_name
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        refuse(f"--run-name {args.run_name} exists in {args.output_dir}; choose another name.")
    except OSError as error:
        refuse(f"--output-dir {args.output_dir} cannot be written ({first_line(error)}); choose "
               "another folder.")
    return run_dir


# ==================================================================================================
# Environments
# ==================================================================================================


def make_env(env_id: str, **settings):
    """One environment whose observations are one row of numbers."""
    import gymnasium

    try:
        env = gymnasium.make(env_id, **settings)
    except Exception as error:  # unknown name or version, or a package that is not installed
        refuse(f"--env-id {env_id} cannot be made ({first_line(error)}); choose one that "
               "gymnasium.pprint_registry() lists, or install what it needs.")
    # Rows of numbers come through as they are, but as copies: an environment that reuses its array
    # would overwrite the final observation with the first one of the next episode.
    env = gymnasium.wrappers.FlattenObservation(env)
    if env.observation_space.shape is None:
        refuse(f"--env-id {env_id} has observations that are no fixed row of numbers; choose one "
               "with Box, Discrete, Tuple or Dict observations.")
    return env


def check_rendering(env_id: str) -> None:
    """Refuse to film what cannot be drawn, before the training and not after it."""
    try:
        import gymnasium
        import moviepy  # noqa: F401  gymnasium's RecordVideo writes with it

        env = gymnasium.make(env_id, render_mode="rgb_array")
        env.reset()
        env.render()
    except Exception as error:  # each simulator fails in its own way without a display
        refuse(f"--capture-video cannot film {env_id} ({first_line(error)}); install what it needs "
               "(without a display MUJOCO_GL=egl may do), or leave the flag out.")
    env.close()


def is_discrete(space) -> bool:
    """A choice among a few actions? Else a row of numbers."""
    from gymnasium.spaces import Discrete

    return isinstance(space, Discrete)


def to_env_actions(actions: np.ndarray, space) -> np.ndarray:
    """Actions as the environment takes them: counted from its start, or clipped to its bounds."""
    if is_discrete(space):
        return (actions + space.start).astype(space.dtype)
    return np.clip(actions, space.low, space.high).astype(space.dtype)


class Envs:
    """num_envs environments that remember, from rollout to rollout, where each of them stands."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        # SAME_STEP: the step that ends an episode already returns the first observation of the
        # next one, and the final one beside it. Gymnasium's default, NEXT_STEP, would follow each
        # episode with a row that is no step: its action is ignored, the environment resets.
        make = [lambda: make_env(env_id)] * num_envs
        self.vector_env = SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
        self.action_space = self.vector_env.single_action_space
        self.obs, _ = self.vector_env.reset(seed=seed)  # environment i gets seed + i
        self.episode_returns, self.episode_lens = np.zeros(num_envs), np.zeros(num_envs, dtype=int)
        self.steps_done = 0  # over all environments
        self.finished = []  # (steps done, return, length) of the episodes that have ended

    def step(self, actions: np.ndarray) -> tuple:
        """Act everywhere. Returns: next_obs, rewards, terminated, truncated, (num_envs, …) each."""
        self.obs, rewards, terminated, truncated, infos = self.vector_env.step(
            to_env_actions(actions, self.action_space))
        self.steps_done += len(rewards)
        self.episode_returns += rewards
        self.episode_lens += 1
        next_obs = self.obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            next_obs[i] = infos["final_obs"][i]
            self.finished.append((self.steps_done, self.episode_returns[i], self.episode_lens[i]))
            self.episode_returns[i] = self.episode_lens[i] = 0
        return next_obs, rewards, terminated, truncated


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
    """log softmax(logits) at the given ids, in nats: logits[id] − logsumexp(logits).

    Args: logits (..., num_actions); ids (...), the actions taken. Returns: (...).
    """
    check_same_shape(logits=logits[..., 0], ids=ids)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), in nats: H = logsumexp(z) − Σ softmax(z)·z. (..., n) -> (...)

    The entropy of the distribution; −log p of the one sampled action is only an estimate of it.
    """
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def gaussian_logprobs(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(a; μ, σ²) of independent dimensions: their sum, in nats [37 details, continuous #3].

    Args: mean, actions (..., action_size); log_std (action_size,). Returns: (...).
    """
    check_same_shape(mean=mean, actions=actions)
    distance = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * distance**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Σ (log σ + ½·log(2πe)) over the dimensions, in nats; the mean does not matter."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(−d) − 1 + d, d = logprobs − ref_logprobs: KL(π ‖ π_ref) per action, in nats.

    Never negative; unbiased where the actions were drawn from π. Of old and new policy the old one
    drew them: kl_penalty(old_logprobs, new_logprobs) is KL(π_old ‖ π_new), and, as the draws do not
    depend on π_new, its gradient is unbiased too. Args and result: one number per action.
    Source: Schulman, "Approximating KL divergence" (2020), k3.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    return torch.exp(-log_ratio) - 1 + log_ratio


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last step backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·V(next_obsₜ) − V(obsₜ).  V(next_obs) is 0 after termination,
    kept after truncation; A is cut after both: the next row belongs to another episode.
    The returns, Aₜ + Vₜ, are the critic's targets; with λ = 1, the discounted rewards up to the end
    of the episode, plus γᵏ·V(next_obs) where truncation or the end of the rollout cuts it short.

    Args: (num_steps, num_envs) each; terminated, truncated bool. Returns: advantages, returns, the
    same shape. Source: PPO paper, eqs. 11-12; Schulman et al. 2015 (1506.02438).
    """
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

    ratio = π_new / π_old. Once it has left [1 − ε, 1 + ε] the way A wants it to go, the gradient is
    zero. With ε = ∞ this is the bare surrogate, "no clipping" in the paper's table 1.

    Args: (batch,) each; clip_coef is ε. Returns: loss; clipfrac, the share of actions whose
    gradient is cut. Source: PPO paper, eq. 7.
    """
    check_same_shape(new=new_logprobs, old=old_logprobs, advantages=advantages)
    ratio = torch.exp(new_logprobs - old_logprobs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    loss = -torch.min(unclipped, clipped).mean()
    return loss, (clipped < unclipped).float().mean()


def value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, vf_clip_coef: float
) -> tuple[Tensor, Tensor]:
    """½·E[ max((V − R)², (V_old + clip(V − V_old, ±c) − R)²) ].

    c is in units of the return. As in CleanRL it is --clip-coef, even where returns are far above
    1; --no-clip-vloss sets it to ∞ [37 details, core #9].

    Args: (batch,) each; vf_clip_coef is c. Returns: loss; clipfrac, the share of steps for which
    the clipped term counts.
    """
    check_same_shape(new=new_values, old=old_values, returns=returns)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    unclipped = (new_values - returns) ** 2
    clipped = (old_values + change - returns) ** 2
    loss = 0.5 * torch.max(unclipped, clipped).mean()
    return loss, (clipped > unclipped).float().mean()


def adaptive_kl_beta(kl_beta: float, observed_kl: float, kl_target: float) -> float:
    """β/2 where KL < target/1.5, 2β where KL > 1.5·target, else β. Source: PPO paper, section 4.

    Args: observed_kl, KL(π_old ‖ π_new) after the update, and kl_target in nats per action.
    (adaptive_kl_coef of ppo_rlhf.py steers another KL: the one to the reference.)
    """
    if observed_kl < kl_target / 1.5:
        return kl_beta / 2
    return kl_beta * 2 if observed_kl > kl_target * 1.5 else kl_beta


# ==================================================================================================
# Running statistics, actor and critic
# ==================================================================================================


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far. Buffers: saved with the model, frozen with it."""

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
        """To mean 0 and std 1, clipped to ± 10 [37 details, continuous #6, #7]."""
        return ((rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)


class RewardNorm(nn.Module):
    """Divides rewards by the running std of Gₜ = rₜ + γ·Gₜ₋₁, the discounted sum of the episode's
    past rewards. No shift: it would change which behaviour is best [37 details, continuous #8, #9].
    """

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.stats = RunningStats(1)
        self.register_buffer("discounted", torch.zeros(num_envs))  # G of the episodes under way

    def update_and_scale(self, rewards: Tensor, done: Tensor) -> Tensor:
        """Take in the rewards (num_steps, num_envs) of a rollout, then scale and clip them."""
        rows = []
        for reward, ended in zip(rewards, done, strict=True):  # (num_envs,) each
            rows.append(self.gamma * self.discounted + reward)
            self.discounted = torch.where(ended, 0, rows[-1])
        self.stats.update(torch.stack(rows).reshape(-1, 1))
        return (rewards * torch.rsqrt(self.stats.var + 1e-8)).clamp(-10, 10)


def mlp(input_size: int, output_size: int, output_gain: float, orthogonal: bool) -> nn.Sequential:
    """Two hidden layers of 64 tanh units. Orthogonal start: [37 details, core #2]."""
    layers = [nn.Linear(input_size, 64), nn.Linear(64, 64), nn.Linear(64, output_size)]
    if orthogonal:
        for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), output_gain), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class CategoricalPolicy(nn.Module):
    """Discrete actions: a softmax over one logit for each."""

    def __init__(self, obs_size: int, num_actions: int, orthogonal: bool):
        super().__init__()
        self.logits = mlp(obs_size, num_actions, 0.01, orthogonal)

    def sample(self, obs: Tensor, greedy: bool) -> Tensor:
        """Actions (num_envs,): drawn, or the likeliest."""
        probabilities = self.logits(obs).softmax(dim=-1)  # (num_envs, num_actions)
        if greedy:
            return probabilities.argmax(dim=-1)
        # The first of clocks that ring after Exp(pₐ) times is a with probability pₐ. So works
        # torch.multinomial too, but its checks take longer than this draw.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the actions, and entropies: (...) each, in nats."""
        logits = self.logits(obs)  # (..., num_actions)
        return logprobs_from_logits(logits, actions), entropy(logits)


class GaussianPolicy(nn.Module):
    """Continuous actions: the mean from a network, one std for all states [37 details, continuous
    #2]. Actions are stored as drawn and clipped only for the environment: the log-probability
    belongs to the draw [continuous #5]."""

    def __init__(self, obs_size: int, action_size: int, orthogonal: bool):
        super().__init__()
        self.mean = mlp(obs_size, action_size, 0.01, orthogonal)
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def sample(self, obs: Tensor, greedy: bool) -> Tensor:
        """Actions (num_envs, action_size): drawn, or the likeliest."""
        mean = self.mean(obs)
        return mean if greedy else mean + self.log_std.exp() * torch.randn_like(mean)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the actions, and entropies: (...) each, in nats."""
        logprobs = gaussian_logprobs(self.mean(obs), self.log_std, actions)
        return logprobs, gaussian_entropy(self.log_std).expand_as(logprobs)


class ActorCritic(nn.Module):
    """A policy, a value network of its own, and the statistics that normalise what both see."""

    def __init__(self, env, args: Args):
        super().__init__()
        obs_size, space = env.observation_space.shape[0], env.action_space
        make_policy, action_size = (CategoricalPolicy, int(space.n)) if is_discrete(space) else (
            GaussianPolicy, space.shape[0])
        self.policy = make_policy(obs_size, action_size, args.orthogonal_init)
        self.critic = mlp(obs_size, 1, 1.0, args.orthogonal_init)
        self.obs_norm = RunningStats(obs_size) if args.norm_obs else nn.Identity()
        self.device = torch.device(args.device)
        self.to(self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray, greedy: bool = False) -> np.ndarray:
        """Actions (num_envs, ...) for observations (num_envs, obs_size)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.policy.sample(self.obs_norm(obs), greedy).cpu().numpy()

    def values(self, obs: Tensor) -> Tensor:
        """V(obs): (..., obs_size) -> (...). The last dimension, of size 1, is dropped here."""
        return self.critic(self.obs_norm(obs)).squeeze(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions, entropies, values: one number per observation."""
        return *self.policy(self.obs_norm(obs), actions), self.values(obs)


# ==================================================================================================
# Rollout and update
# ==================================================================================================


@dataclass
class Rollout:
    """One iteration of experience, (num_steps, num_envs, …) each. Five steps of one environment,
    in which episode s ends (with its fourth observation) and episode u begins:

        row                       0      1      2      3      4
        obs                      s0     s1     s2     u0     u1
        next_obs                 s1     s2     s3     u1     u2
        terminated | truncated    -      -      1      -      -

    s3 is seen by the critic alone, and only counts if the episode was truncated. The next rollout
    begins at u2; in this one V(u2) stands for what follows.
    """

    obs: Tensor
    actions: Tensor  # as drawn, not as clipped for the environment
    next_obs: Tensor
    rewards: Tensor  # as the environment gave them
    terminated: Tensor  # bool
    truncated: Tensor  # bool
    old_logprobs: Tensor  # nats
    old_values: Tensor  # in units of the rewards after --norm-reward, as the returns
    next_values: Tensor
    advantages: Tensor | None = None
    returns: Tensor | None = None


@torch.no_grad()
def collect_rollout(agent: ActorCritic, envs: Envs, args: Args) -> Rollout:
    """Act for num_steps; then read log-probabilities and values of all steps in one pass."""
    steps = []
    for _ in range(args.num_steps):
        obs, actions = envs.obs, agent.act(envs.obs)
        steps.append((obs, actions, *envs.step(actions)))
    obs, actions, next_obs, rewards, terminated, truncated = (
        torch.as_tensor(np.stack(column), device=args.device)
        for column in zip(*steps, strict=True))
    obs, next_obs, rewards = obs.float(), next_obs.float(), rewards.float()
    old_logprobs, _, old_values = agent(obs, actions)  # (num_steps, num_envs) each
    return Rollout(obs, actions, next_obs, rewards, terminated, truncated, old_logprobs,
                   old_values, agent.values(next_obs))


def compute_advantages(
    rollout: Rollout, reward_norm: RewardNorm, args: Args
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (num_steps, num_envs) each. Returns keep their scale: the critic has
    to learn it."""
    rewards, terminated, truncated = rollout.rewards, rollout.terminated, rollout.truncated
    if args.norm_reward:  # before use, unlike observations: no log-probability depends on rewards
        rewards = reward_norm.update_and_scale(rewards, terminated | truncated)
    advantages, returns = gae(rewards, rollout.old_values, rollout.next_values, terminated,
                              truncated, args.gamma, args.gae_lambda)
    return whiten(advantages) if args.norm_advantages else advantages, returns


def update_policy(
    agent: ActorCritic, optimizer, rollout: Rollout, kl_beta: float, args: Args
) -> dict[str, float]:
    """A few epochs of minibatch steps on one rollout. Returns: statistics, means over the steps.

    loss = policy loss + vf_coef · value loss − ent_coef · entropy [+ kl_beta · KL(π_old ‖ π_new)]
    Source: PPO paper, eqs. 8 and 9.
    """
    clip_coef = args.clip_coef if args.policy_loss == "clip" else math.inf
    vf_clip_coef = args.clip_coef if args.clip_vloss else math.inf
    batch = [x.flatten(0, 1) for x in (  # num_steps and num_envs become batch
        rollout.obs, rollout.actions, rollout.old_logprobs, rollout.old_values, rollout.advantages,
        rollout.returns)]
    batch_size, parameters, steps = len(batch[0]), list(agent.parameters()), []
    for _ in range(args.update_epochs):
        for idx in torch.randperm(batch_size).split(batch_size // args.num_minibatches):
            obs, actions, old_logprobs, old_values, advantages, returns = (x[idx] for x in batch)
            new_logprobs, entropies, new_values = agent(obs, actions)  # (minibatch,) each
            pg_loss, clipfrac = policy_loss(new_logprobs, old_logprobs, advantages, clip_coef)
            vf_loss, vf_clipfrac = value_loss(new_values, old_values, returns, vf_clip_coef)
            mean_entropy = entropies.mean()
            loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy
            if kl_beta > 0:
                loss = loss + kl_beta * kl_penalty(old_logprobs, new_logprobs).mean()
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            stats = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy,
                     "clipfrac": clipfrac, "vf_clipfrac": vf_clipfrac, "grad_norm": grad_norm}
            steps.append({name: value.item() for name, value in stats.items()})
        if args.target_kl is not None and measure_kl(agent, rollout) > args.target_kl:
            break
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    means["approx_kl"] = measure_kl(agent, rollout)  # no mean: how far the whole update went
    means["explained_variance"] = explained_variance(rollout.returns, rollout.old_values)
    for name, value in means.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}; lower the learning rate, check rewards")
    return means


@torch.no_grad()
def measure_kl(agent: ActorCritic, rollout: Rollout) -> float:
    """KL(π_old ‖ π_new) per action over the rollout, in nats."""
    new_logprobs, _ = agent.policy(agent.obs_norm(rollout.obs), rollout.actions)
    return kl_penalty(rollout.old_logprobs, new_logprobs).mean().item()


def explained_variance(returns: Tensor, values: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    unexplained = (returns - values).var(correction=0)
    return (1 - unexplained / (returns.var(correction=0) + 1e-8)).item()


# ==================================================================================================
# From here on, bookkeeping: evaluation, files
# ==================================================================================================


def evaluate(agent: ActorCritic, args: Args, run_dir: Path) -> list[float]:
    """Play --eval-episodes episodes with the likeliest actions and frozen statistics; film them if
    asked. Gives back the return of each."""
    import gymnasium

    env = make_env(args.env_id, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    # Some tasks have no time limit, and the likeliest actions may walk into a wall for ever.
    env = gymnasium.wrappers.TimeLimit(env, max_episode_steps=10_000)
    if args.capture_video:
        env = gymnasium.wrappers.RecordVideo(env, str(run_dir / "videos"),
                                             episode_trigger=lambda _: True)
    returns = []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed * 1_000_003 + episode)  # far from those of training
        total, done = 0.0, False
        while not done:
            actions = to_env_actions(agent.act(obs[None], greedy=True), env.action_space)
            obs, reward, terminated, truncated, _ = env.step(actions[0])
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    if returns:
        print(f"evaluation: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over "
              f"{len(returns)} episodes of {args.env_id}, likeliest actions")
    return returns


def save_model(path: Path, agent: ActorCritic, reward_norm: RewardNorm, args: Args) -> None:
    """Settings, weights and statistics; never half a file, whenever the run is killed."""
    torch.save({"args": asdict(args), "agent": agent.state_dict(),
                "reward_norm": reward_norm.state_dict()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_agent(run_dir: Path, device: str = "cpu") -> tuple[ActorCritic, Args]:
    """The policy of a finished run, and the settings that it was trained with."""
    try:
        saved = torch.load(run_dir / "model.pt", weights_only=True, map_location=device)
        args = Args(**saved["args"] | {"device": device})
        agent = ActorCritic(make_env(args.env_id), args)
        agent.load_state_dict(saved["agent"])
    except Exception as error:  # missing, broken, or of another kind
        refuse(f"--eval-only {run_dir} has no model.pt that can be read ({first_line(error)}); "
               "give the folder of a finished run.")
    return agent, args


class RunLog:
    """TensorBoard curves with CleanRL's names, and a line on the console now and then."""

    def __init__(self, args: Args):
        from torch.utils.tensorboard import SummaryWriter

        self.args, self.run_dir = args, make_run_dir(args)
        self.writer = SummaryWriter(str(self.run_dir))
        settings = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(args).items()]
        self.writer.add_text("args", "\n".join(f"    {x}" for x in settings))
        for i in range(0, len(settings), 3):
            print("  ".join(f"{x:<31}" for x in settings[i : i + 3]).rstrip())
        print(f"plan: {args.num_iterations} iterations x {args.batch_size} steps; in each "
              f"{args.update_epochs} epochs x {args.num_minibatches} optimizer steps on "
              f"{args.batch_size // args.num_minibatches} steps", flush=True)
        self.start_time, self.last_returns = time.perf_counter(), deque(maxlen=100)

    def iteration(self, number: int, steps_done: int, finished: list, stats: dict[str, float]):
        """One point per finished training episode, one per statistic."""
        for step, episode_return, length in finished:
            self.writer.add_scalar("charts/episodic_return", episode_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.last_returns.append(episode_return)
        sps = steps_done / (time.perf_counter() - self.start_time)
        for name, value in (stats | {"charts/SPS": sps}).items():
            self.writer.add_scalar(name, value, steps_done)
        if number % self.args.report_interval == 0 or number == self.args.num_iterations:
            mean = np.mean(self.last_returns) if self.last_returns else math.nan
            print(f"step {steps_done:>9,} | return {mean:8.1f} (last {len(self.last_returns)} "
                  f"episodes) | KL {stats['losses/approx_kl']:.4f} | "
                  f"clipped {stats['losses/clipfrac']:3.0%} | explained variance "
                  f"{stats['losses/explained_variance']:5.2f} | {sps:6,.0f} steps/s", flush=True)


def replay(args: Args) -> None:
    """--eval-only: the evaluation of a finished run, again."""
    if args.eval_episodes < 1:
        refuse(f"--eval-episodes {args.eval_episodes} leaves --eval-only nothing to do; give 1 or "
               "more.")
    agent, trained_args = load_agent(args.eval_only, args.device)
    if args.capture_video:
        check_rendering(trained_args.env_id)
    evaluate(agent, replace(trained_args, eval_episodes=args.eval_episodes,
                            capture_video=args.capture_video), args.eval_only)


# ==================================================================================================
# main: the table of contents
# ==================================================================================================


def main(args: Args) -> None:
    """The whole run."""
    torch.set_num_threads(1)  # matrices this small cost more to divide than to multiply
    if args.eval_only is not None:
        replay(args)
        return
    args = resolve_args(args)
    if args.capture_video:
        check_rendering(args.env_id)
    torch.manual_seed(args.seed)
    envs = Envs(args.env_id, args.num_envs, args.seed)
    agent = ActorCritic(make_env(args.env_id), args)
    reward_norm = RewardNorm(args.num_envs, args.gamma).to(args.device)
    # eps: [37 details, core #3]. fused: one call for all parameters, whose overhead would dominate.
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    kl_beta = args.kl_beta if args.policy_loss.startswith("kl") else 0.0
    log = RunLog(args)
    for iteration in range(1, args.num_iterations + 1):
        scale = 1 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0
        learning_rate = scale * args.learning_rate
        optimizer.param_groups[0]["lr"] = learning_rate
        rollout = collect_rollout(agent, envs, args)
        rollout.advantages, rollout.returns = compute_advantages(rollout, reward_norm, args)
        stats = update_policy(agent, optimizer, rollout, kl_beta, args)
        if args.norm_obs:  # after the update: old and new log-probabilities saw the same inputs
            agent.obs_norm.update(rollout.obs.flatten(0, 1))
        losses = {f"losses/{name}": x for name, x in (stats | {"kl_beta": kl_beta}).items()}
        log.iteration(iteration, envs.steps_done, envs.finished,
                      losses | {"charts/learning_rate": learning_rate})
        envs.finished = []
        if args.policy_loss == "kl-adaptive":
            kl_beta = adaptive_kl_beta(kl_beta, stats["approx_kl"], args.kl_target)
        if iteration % args.report_interval == 0:
            save_model(log.run_dir / "model.pt", agent, reward_norm, args)

    save_model(log.run_dir / "model.pt", agent, reward_norm, args)
    log.writer.close()
    evaluate(agent, args, log.run_dir)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
