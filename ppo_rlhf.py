"""PPO for RLHF in one file: supervised fine-tuning, reward model, PPO. On CUDA or CPU.

    python ppo_rlhf.py                # three stages on the embedded task: a minute or two on a CPU
    python ppo_rlhf.py --kl-coef 0    # without the KL term PPO exploits the reward model's errors
    python ppo_rlhf.py --dataset Anthropic/hh-rlhf --policy-model Qwen/Qwen2.5-0.5B
    python ppo_rlhf.py --dataset prompts.jsonl --policy-model DIR --reward-fn f.py:f --sft-epochs 0
    torchrun --nproc-per-node 4 ppo_rlhf.py    # on four GPUs
    python ppo_rlhf.py --resume runs/NAME      # go on with a run that was killed

PPO looks for the policy π with the largest J, an average over prompts x and over responses y that
π samples (InstructGPT, arXiv 2203.02155, section 3.5):

    J(π) = E[ score(x, y) ] − kl_coef · E[ KL( π(·|x) ‖ π_ref(·|x) ) ],   y ~ π(·|x)

Stage 1  SFT           π_ref: a language model trained by maximum likelihood on demonstrations
Stage 2  reward model  score(x, y); P(y₁ preferred to y₂) = sigmoid(score(x, y₁) − score(x, y₂))
Stage 3  PPO           π starts as π_ref; train_ppo repeats this iteration:

    prompt_batch        take the prompts of the iteration
    collect_rollout     sample a response to each; compute its log-probabilities and values
    decode              turn the responses into text
    scorer              score the texts
    compute_advantages  turn scores and KL into rewards, rewards and values into advantages
    update_policy       take a few epochs of clipped gradient steps
    log.iteration       write the numbers of the iteration
    adaptive_kl_coef    if the KL has a target, move kl_coef

A response is an episode, a token is an action, the tokens before it are the state. The *policy
gradient* raises the log-probability of each sampled token in proportion to its *advantage*: how
much more reward followed the token than was expected. The *critic* computes what is expected: its
*value* is a forecast, made before each token, of the rewards still to come. It is trained towards
the *return*, advantage + value: an estimate of the rewards that did follow. One rollout is used for
several steps, and the further the policy moves, the less its old samples say about it. So each
token has a *ratio* π_new / π_old, and one whose ratio has moved too far gives no more gradient (see
policy_loss). "Old" is no further network: old_ are numbers that the policy itself gave before the
update changed it.

Networks in stage 3: the policy; the reference, which stays as SFT left it; the critic, by default
one linear layer on the policy; the reward model.

    rows           dicts of text: prompt and, depending on the data, chosen, rejected, …
    batch          responses per iteration      prompt_len     columns of prompts, padded left
    seq_len        prompt_len + response_len    response_len   columns of responses, padded right
    logprobs       log π(token | tokens before it), in nats; old_, new_, ref_: of which policy
    values         the critic's forecasts       scores         one number per response
    rewards        one number per token: −kl_coef · KL, and at the last token also the score, minus
                   missing_eos_penalty if the response has no EOS
    response_mask  True on the real tokens of a response, its EOS included
    kl             policy to reference, in nats: per token in rewards and loss, elsewhere the sum
                   of k1 over a response

EOS ends a response and is its last real token; a response that is cut at the length limit has none.
BOS stands in front of a prompt, once, if tokenizer or template puts it there. PAD fills unused
columns and is often the same token as EOS: never compare ids with PAD, use the masks. (Reward
models do look for PAD: load_reward_model gives those that are trained here one of their own.)

Not here: DPO, GRPO, LoRA, fp16, one model over several GPUs. Part I is RLHF, Part II is plumbing.
"""

import contextlib
import copy
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from tqdm import tqdm

# ==================================================================================================
# Part I: RLHF
# ==================================================================================================

# The PPO math: pure functions of tensors ----------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x·mask / Σ mask, over dim or over everything: the mean of x where mask (bool) is True.

    NaN where the mask selects nothing. Raises: ValueError if the shapes differ."""
    check_same_shape(x=x, mask=mask)
    # torch.where instead of x * mask, because NaN times 0 is NaN.
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree: PyTorch would broadcast (batch,) − (batch, 1)."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / std over the entries where mask is True; all other entries become 0.

    If shift_mean is False, the mean is added back. The variance is divided by n, not n − 1."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref), in nats, from tokens that π sampled.

    With d = logprobs − ref_logprobs:  k1 = d  (unbiased, may be negative),  k2 = ½·d²  (biased),
    k3 = exp(−d) − 1 + d  (unbiased, never negative). The sum of k1 over the tokens of a response is
    log π(y|x) − log π_ref(y|x), and the mean of that over responses is the KL in J.

    Args and result: (batch, response_len). Source: Schulman 2020, joschu.net/blog/kl-approx."""
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio  # expm1(x) = exp(x) − 1, exact near 0
    raise ValueError(f"estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """rₜ = −kl_coef · klₜ, plus the score at the last token (EOS, or the one at the length limit).

    Args: scores (batch,), or (batch, response_len) from a --reward-fn that scores each token; kl,
    response_mask (batch, response_len). Returns: (batch, response_len), 0 in the padding. Source:
    InstructGPT, section 3.5."""
    check_same_shape(kl=kl, response_mask=response_mask)
    if scores.dim() == 1:
        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
        scores = torch.zeros_like(kl).scatter(1, last_token_idx, scores.unsqueeze(1))
    check_same_shape(scores=scores, kl=kl)
    return torch.where(response_mask, scores - kl_coef * kl, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, computed from the last token backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·Vₜ₊₁ − Vₜ;  A and V are 0 after the last response token.
    δₜ is the surprise of one token: its reward and the next forecast, minus the forecast before it.
    With λ = 0, Aₜ = δₜ; with λ = 1, Aₜ = rₜ + γ·rₜ₊₁ + γ²·rₜ₊₂ + … − Vₜ.

    Args: rewards, values, mask (batch, response_len). Returns: advantages, and returns Aₜ + Vₜ, of
    the same shape, 0 in the padding. Source: PPO paper (1707.06347), eqs. 11-12; 1506.02438."""
    check_same_shape(rewards=rewards, values=values, mask=mask)
    # Set the padding to zero first: the last token would take its next value from there.
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])  # (batch,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_coef: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated: −E[ min(ratio·A, clip(ratio, 1 − ε, 1 + ε)·A) ].

    ratio = π_new / π_old compares with the policy that sampled, not with the reference. While it
    is 1, the gradient is the policy gradient, that of −E[ A · log π ]. Clipping removes a token's
    gradient if A > 0 and ratio > 1 + ε, or A < 0 and ratio < 1 − ε. It bounds nothing else: other
    tokens' gradients can still move the ratio further.

    Args: (batch, response_len) each; clip_coef is ε. Returns: loss; clipfrac, the share of tokens
    whose gradient is removed. Source: PPO paper, eq. 7."""
    check_same_shape(new=new_logprobs, old=old_logprobs, advantages=advantages, mask=mask)
    ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)
    return loss, masked_mean((clipped < unclipped).float(), mask)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               vf_clip_coef: float) -> tuple[Tensor, Tensor]:
    """½·E[ max((V − R)², (V_old + clip(V − V_old, −c, c) − R)²) ].

    The clip removes the gradient of values that have moved by more than c towards their return R.

    Args: (batch, response_len) each; vf_clip_coef is c, in units of the return. Returns: loss;
    clipfrac, the share of tokens whose clipped term is larger. Source: OpenAI baselines (ppo2)."""
    check_same_shape(new=new_values, old=old_values, returns=returns, mask=mask)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    # Use where before squaring: otherwise a NaN in the padding would reach the gradient.
    unclipped = torch.where(mask, new_values - returns, 0) ** 2
    clipped = torch.where(mask, old_values + change - returns, 0) ** 2
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask)


def adaptive_kl_coef(kl_coef: float, observed_kl: float, kl_target: float) -> float:
    """kl_coef · (1 + ½·clip(KL / target − 1, −0.2, 0.2)): at most 10 % up or down per iteration.

    Both KLs in nats per response. Source: Ziegler 2019 (1909.08593), 2.2 (there 0.1, not ½)."""
    error = max(-0.2, min(0.2, observed_kl / kl_target - 1))
    return kl_coef * (1 + 0.5 * error)


# Settings -----------------------------------------------------------------------------------------


@dataclass
class Args:
    """All settings. None: see the comment, else not used; [a, b]: a for a small new model, b for a
    given one. Begin with dataset, policy_model, total_episodes, kl_coef and seed."""

    # Data
    dataset: str = "reviews"  # the embedded task; or a Hub id, a jsonl(.gz) or a parquet file
    dataset_split: str = "train"  # split of --dataset; slices such as train[:1000] work
    sft_dataset: str | None = None  # demonstrations, instead of the chosen responses of --dataset
    max_prompt_len: int | None = None  # tokens; a longer prompt loses its beginning [16, 256]
    response_len: int | None = None  # tokens of the longest response [32, 128]
    eval_prompts: int = 128  # distinct prompts held out for the final table, at most a quarter
    num_comparisons: int = 6000  # reviews only: pairs of SFT samples for the simulated annotator

    # Models
    policy_model: str | None = None  # causal language model: Hub id or folder; None: a new one
    reward_model: tuple[str, ...] = ()  # one, or several as an ensemble; stage 2 is then skipped
    reward_fn: str | None = None  # FILE.py:FUNCTION gives the scores; stage 2 is then skipped
    num_reward_models: int = 1  # how many stage 2 trains; several score as an ensemble
    ensemble_coef: float = 1.0  # the score of an ensemble is its mean minus this times its std
    norm_scores: bool | None = None  # to mean 0, std 1 on SFT samples; None: if no --reward-fn
    sft_epochs: int = 1  # passes over the demonstrations; 0: skip stage 1
    sft_learning_rate: float | None = None  # of stage 1, at its beginning; falls to 0 [3e-3, 1e-5]
    reward_epochs: int = 1  # passes over the comparisons
    reward_learning_rate: float | None = None  # of stage 2; falls to 0 [1e-3, 1e-5]

    # PPO
    total_episodes: int = 6400  # responses in all
    batch_size: int = 128  # responses per iteration: one rollout and one update
    minibatch_size: int = 32  # responses per optimizer step; examples per step in stages 1 and 2
    microbatch_size: int = 32  # rows in one backward pass of one process: less memory, same result
    update_epochs: int = 4  # passes over each batch
    learning_rate: float | None = None  # of the policy in PPO; falls to 0 [1e-4, 3e-6]
    critic: Literal["shared", "separate"] = "shared"  # on the policy, or a network of its own
    critic_learning_rate: float | None = None  # None: 10 times the policy's; it has to keep up
    lr_warmup: int = 0  # iterations in which the learning rates of PPO rise to their peak
    temperature: float = 1.0  # of the sampler, and of every log-probability in PPO
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # from 0, trust the next forecast, to 1, trust the sampled rewards
    clip_coef: float = 0.2  # a ratio farther from 1 than this may give no gradient: policy_loss
    vf_clip_coef: float = 0.2  # the same for the change of a value, in its units: value_loss
    vf_coef: float = 0.5  # weight of the value loss (half the squared error)
    ent_coef: float = 0.0  # weight of the entropy bonus, per nat
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm
    target_kl: float | None = None  # end an update if an epoch's approx_kl is above: nats per token

    # --kl-in reward: k1 gives PPO the gradient of the KL in J; kl_coef weighs a sum per response.
    # --kl-in loss: kl_coef weighs a mean per token; k2 has the gradient of each token's
    # KL(π ‖ π_ref), k3 that of KL(π_ref ‖ π), as in GRPO; k1 one that averages 0, so it is refused.
    kl_coef: float = 0.05  # weight of the KL, per nat
    kl_in: Literal["reward", "loss"] = "reward"  # subtract it from rewards, or add it to the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # see kl_penalty
    kl_target: float | None = None  # adapt kl_coef until the KL is this: nats per response
    max_kl: float | None = None  # end PPO above this KL, nats per response; the last save remains
    ref_update_interval: int = 0  # iterations after which policy becomes reference; 0: never
    whiten_rewards: bool = False  # rewards to std 1 over the batch; V is then in these units
    missing_eos_penalty: float = 1.0  # subtracted from the score that PPO sees if EOS is missing
    ptx_coef: float = 0.0  # weight of the SFT loss added to each step of PPO (PPO-ptx)

    # Run
    seed: int = 1  # of data, weights, sampling and shuffling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products inside policy and critic
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    output_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run, in output_dir; None: data set, seed, time
    resume: str | None = None  # folder of a run: go on after its checkpoint, with its settings
    save_interval: int = 20  # iterations between two checkpoints, each with two samples shown


# The policy: from ids to log-probabilities --------------------------------------------------------


@dataclass
class Rollout:
    """Prompts, responses, and the tensors computed from them. One row with 3 + 4 real tokens:

        column of sequence_ids    0    1    2    3    4      5    6    7    8    9
                                 PAD  PAD   a   war  film   very dull  .   EOS  PAD
        sequence_mask             -    -    1    1    1      1    1    1    1    -
                                 '---- prompt_len -----'    '--- response_len ----'
        column of the fields below                           0    1    2    3    4
        response_mask                                        1    1    1    1    -
        logprobs, values read at sequence column             4    5    6    7    -

    Column t of the fields below belongs to response token t. Its log-probability and value are read
    one sequence column earlier, in the state in which it is chosen; so the first value is computed
    from the prompt alone. encode fills only the first four fields."""

    sequence_ids: Tensor  # (batch, seq_len)
    sequence_mask: Tensor  # (batch, seq_len), bool
    response_mask: Tensor  # (batch, response_len), bool
    ended: Tensor  # (batch,), bool: ended by EOS, not by the length limit
    old_logprobs: Tensor | None = None  # (batch, response_len), nats
    ref_logprobs: Tensor | None = None  # (batch, response_len), nats
    old_values: Tensor | None = None  # (batch, response_len), in units of the score
    scores: Tensor | None = None  # (batch,), or (batch, response_len) if there is one per token
    score_std: Tensor | None = None  # (batch,), of an ensemble's models
    advantages: Tensor | None = None  # (batch, response_len)
    returns: Tensor | None = None  # (batch, response_len)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, rows: slice | Tensor) -> "Rollout":
        """Some of the rows."""
        return Rollout(*(None if x is None else x[rows] for x in vars(self).values()))


class Policy(nn.Module):
    """A causal language model that gives a distribution over responses, and its critic.

    Sampler, update and reference compute log-probabilities by the same functions at the same
    temperature, so that only the weights differ. The generation config (top-p, …) is ignored."""

    def __init__(self, lm, tokenizer, args: Args):
        super().__init__()
        self.lm, self.tokenizer, self.args = lm, tokenizer, args
        self.critic: Critic | None = None  # added in start_or_resume
        self.eos_ids = end_tokens(lm, tokenizer)
        # Ids without a text have probability 0: output layers are often larger than the vocabulary.
        bias = torch.full((lm.get_output_embeddings().out_features,), -torch.inf)
        bias[[x for x in tokenizer.get_vocab().values() if x < len(bias)]] = 0.0
        self.register_buffer("vocab_bias", bias, persistent=False)  # (vocab,), 0 or −inf

    def states(self, trunk, ids: Tensor, mask: Tensor, cache=None) -> Tensor:
        """Hidden states (batch, columns, hidden) of ids. trunk: a model without its output layer.

        With a KV cache, ids are the columns that the cache does not have; mask has all columns."""
        # The first real token has position 0: left padding must not shift it.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            return trunk(input_ids=ids, attention_mask=mask, position_ids=positions,
                         past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def output_layer(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Weight and bias / T, for logits / T = (hidden / T) · weightᵀ + bias / T."""
        head = self.lm.get_output_embeddings()
        bias = self.vocab_bias if head.bias is None else self.vocab_bias + head.bias
        return head.weight, bias / temperature

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """Logits (..., vocab) of the next token, from hidden states (..., hidden)."""
        weight, bias = self.output_layer(temperature)
        # In float32: bfloat16 would round log-probabilities by 0.03 nats, more than a step changes.
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float() / temperature, weight, bias)

    def forward(self, batch: Rollout, temperature: float, with_entropies: bool = False):
        """Read prompts with responses, for the rollout and all losses.

        Returns: logprobs, values, entropies of the response tokens, each (batch, response_len), 0
        in the padding. Values are 0 without a critic, entropies if they are not wanted."""
        # Columns with a real token: one block, as prompts are padded left and responses right.
        used = batch.sequence_mask.any(dim=0).nonzero().squeeze(1)
        ids, mask = batch.sequence_ids[:, used], batch.sequence_mask[:, used]
        # Of each response token: its row, its column in the response, its column in ids.
        row, t = batch.response_mask.nonzero(as_tuple=True)  # (tokens,) each
        prompt_len = batch.sequence_mask.shape[1] - batch.response_mask.shape[1]
        column = prompt_len + t - used[0]
        tokens = ids[row, column]
        hidden = self.states(self.lm.base_model, ids, mask)[row, column - 1]  # (tokens, hidden)
        if with_entropies:
            distribution = torch.distributions.Categorical(
                logits=self.logits(hidden, temperature), validate_args=False)
            logprobs, entropies = distribution.log_prob(tokens), distribution.entropy()
        else:  # the same log-probabilities in less memory
            logprobs = chunked_logprobs(self, hidden, tokens, temperature)
            entropies = torch.zeros_like(logprobs)
        values = torch.zeros_like(logprobs)
        if self.critic is not None:
            if self.critic.trunk is not None:
                hidden = self.states(self.critic.trunk, ids, mask)[row, column - 1]
            values = self.critic.head(hidden.float()).squeeze(-1)
        padded = torch.zeros_like(batch.response_mask, dtype=torch.float32)
        return [padded.index_put((row, t), x) for x in (logprobs, values, entropies)]


class Critic(nn.Module):
    """V(state): a linear layer on hidden states, those of the policy, whose weights the value loss
    then changes as well, or those of its own trunk."""

    def __init__(self, hidden_size: int, trunk: nn.Module | None):
        super().__init__()
        self.head, self.trunk = nn.Linear(hidden_size, 1), trunk


# One iteration: sample, read, compute advantages --------------------------------------------------


@torch.no_grad()
def sample_tokens(policy: Policy, prompts: Rollout, noise: Tensor, temperature: float) -> Rollout:
    """Sample token by token until each row has ended with EOS or has response_len tokens.

    Another engine can take this place if it samples from softmax(logits / temperature), without
    top-p or penalties, and returns the same: the columns of the prompts, then response_len columns
    of responses; masks that are True up to the first EOS; ended (batch,).

    Args: noise (batch, response_len), uniform in [0, 1). One number decides one token, so that a
    sample depends neither on the other rows nor on the number of processes."""
    prompt_len, response_len = prompts.sequence_ids.shape[1], noise.shape[1]
    pad_id, eos_ids = policy.tokenizer.pad_token_id, torch.tensor(policy.eos_ids).to(noise.device)
    ids = nn.functional.pad(prompts.sequence_ids, (0, response_len), value=pad_id)
    mask = nn.functional.pad(prompts.sequence_mask, (0, response_len))
    ended = torch.zeros_like(mask[:, 0])  # (batch,)
    cache = transformers.DynamicCache(config=policy.lm.config)
    first = 0  # column from which on the cache has nothing
    for t in range(prompt_len, prompt_len + response_len):
        hidden = policy.states(policy.lm.base_model, ids[:, first:t], mask[:, :t], cache)[:, -1]
        cumulative = policy.logits(hidden, temperature).softmax(-1).cumsum(-1)  # (batch, vocab)
        # Take the first token whose cumulative probability exceeds noise · sum; noise is below 1.
        threshold = noise[:, t - prompt_len, None] * cumulative[:, -1:]  # (batch, 1)
        sampled = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
        sampled = sampled.clamp(max=cumulative.shape[1] - 1)  # of NaN, which optimizer_step reports
        ids[:, t] = torch.where(ended, pad_id, sampled)
        mask[:, t] = ~ended  # EOS is a real token, what follows it is padding
        ended |= torch.isin(ids[:, t], eos_ids)
        first = t
        # A GPU would wait for this answer: there, ask for it at every eighth token only.
        if (ids.device.type == "cpu" or t % 8 == 0) and ended.all():
            break
    return Rollout(ids, mask, mask[:, prompt_len:], ended)


@torch.no_grad()
def collect_rollout(policy: Policy, reference: Policy | None, rows: list[dict], seed: int,
                    args: Args) -> Rollout:
    """Sample a response to the prompt of each row; if a reference is given, read it with policy,
    critic and reference. Each process does its share of the rows; all get the whole rollout, in
    the order of rows."""
    # Drawn on the CPU and for all rows, so that N processes sample what one would sample.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(rows), args.response_len, generator=generator)
    prompts, noise = share(encode(policy, rows)), share(noise).to(args.device)
    # Entered here, weights become bfloat16 once, not for each token.
    with torch.autocast(noise.device.type, torch.bfloat16, args.dtype == "bfloat16"):
        sampled = sample_tokens(policy, prompts, noise, args.temperature)
    parts = split_rows(sampled, args.microbatch_size)
    if reference is not None:
        # Not from the sampler: its cache rounds differently, so the ratio would not start at 1.
        for part in parts:
            part.old_logprobs, part.old_values, _ = policy(part, args.temperature)
            part.ref_logprobs, _, _ = reference(part, args.temperature)
    return join_rows(parts, args.device)


def make_critic(policy: Policy, scorer: "Scorer", mean_return: float, args: Args) -> Critic:
    """V starts at the SFT policy's mean_return (see measure_scores): an error common to all values
    would drown the advantages. But a separate critic after stage 2 starts as its first model:
    V = (raw score − offset) / scale of the text so far (Stiennon 2020, 2009.01325). Without a
    stage 2 its trunk is the SFT model's."""
    trunk, weight, bias = None, 0.0, mean_return
    if args.critic == "separate":
        trunk = policy.lm.base_model
        if not args.reward_model and args.reward_fn is None:
            classifier, scale = scorer.sources[0].classifier, float(scorer.scale[0])
            trunk, weight = classifier.base_model, classifier.score.weight.detach().cpu() / scale
            bias = -float(scorer.offset[0]) / scale
        trunk = copy.deepcopy(trunk).requires_grad_(True)
    critic = Critic(policy.lm.get_output_embeddings().in_features, trunk)
    critic.head.weight.data[:], critic.head.bias.data[:] = weight, bias
    return critic.to(args.device)


def compute_advantages(rollout: Rollout, kl_coef: float, args: Args) -> tuple[Tensor, Tensor]:
    """Advantages and returns (batch, response_len) from scores, KL and values.

    Rewards get no gradient, although their KL depends on π. With k1 nothing is lost: the missing
    term is kl_coef · E[ ∇ log π ] = kl_coef · Σ π·∇ log π = kl_coef · ∇ Σ π = 0."""
    mask = rollout.response_mask
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = token_rewards(rollout.scores, kl, mask, kl_coef if args.kl_in == "reward" else 0.0)
    # A response that is cut at the length limit counts as finished, but its score is lower.
    # Ziegler and Stiennon instead replace its score by −1.
    penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)
    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), mask, 0.0)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.old_values, mask, args.gamma, args.gae_lambda)
    # Over the whole batch, not per minibatch. Returns are not whitened.
    return masked_whiten(advantages, mask), returns


# The update: losses, steps, epochs ----------------------------------------------------------------


def ppo_loss(policy: Policy, batch: Rollout, kl_coef: float, args: Args) -> dict[str, Tensor]:
    """policy loss + vf_coef · value loss − ent_coef · entropy [+ kl_coef · KL, with --kl-in loss].

    Returns: "loss" to train on, and what is reported: means over tokens, maxima if named _max.
    Source: PPO paper, eq. 9, with the sign of a loss."""
    mask, old_logprobs = batch.response_mask, batch.old_logprobs
    new_logprobs, new_values, entropies = policy(batch, args.temperature, args.ent_coef > 0)
    pg_loss, clipfrac = policy_loss(new_logprobs, old_logprobs, batch.advantages, mask,
                                    args.clip_coef)
    vf_loss, vf_clipfrac = value_loss(new_values, batch.old_values, batch.returns, mask,
                                      args.vf_clip_coef)
    loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * masked_mean(entropies, mask)
    if args.kl_in == "loss":
        kl = kl_penalty(new_logprobs, batch.ref_logprobs, args.kl_estimator)
        loss = loss + kl_coef * masked_mean(kl, mask)
    # KL(old ‖ new), because the tokens were sampled by the old policy; reported, not trained on.
    approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0)
    return {"loss": loss, "policy_loss": pg_loss, "value_loss": vf_loss, "clipfrac": clipfrac,
            "vf_clipfrac": vf_clipfrac, "approx_kl": approx_kl,
            "log_ratio_max": log_ratio.abs().max()}


def accumulate_gradients(loss_fn: Callable, batch, coef: float, args: Args) -> dict[str, Tensor]:
    """Add the gradients of coef · loss_fn(batch), a microbatch at a time. Returns: statistics of
    this process; process r of n takes the rows r, r + n, …

    A loss is a mean over terms (response tokens, or comparisons), so that of a microbatch weighs
    terms here / terms in batch. A process without rows reads row 0 with weight 0, so that all have
    the same statistics."""
    stats, (rank, num_processes) = {}, processes()
    own_rows = batch[rank::num_processes]
    for part in split_rows(own_rows or batch[:1], args.microbatch_size):
        weight = count_terms(part) / count_terms(batch) * bool(own_rows)
        losses = loss_fn(part)
        if torch.is_grad_enabled():  # it is off when held-out rows are read
            (coef * weight * losses["loss"]).backward()
        for name, x in losses.items():
            before = stats.get(name, torch.zeros_like(x))
            stats[name] = (torch.maximum(before, x) if name.endswith("_max") else
                           before + weight * x).detach()
    return stats


def optimizer_step(model, optimizer, stats: dict[str, Tensor], args: Args) -> dict[str, float]:
    """One step with the gradients of all processes. Returns: statistics of all.

    Raises: FloatingPointError before the step if a statistic or the gradient is not finite."""
    sum_gradients(model)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    stats = merge_stats(stats | {"grad_norm": grad_norm})
    for name, x in stats.items():
        if not math.isfinite(x):
            raise FloatingPointError(f"{name} is {x}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return stats


def update_policy(policy: Policy, optimizer, rollout: Rollout, kl_coef: float,
                  demonstrations: list[dict], seed: int, args: Args) -> dict[str, float]:
    """A few epochs of minibatch steps on one batch. Returns: statistics, means over the steps."""
    rng, steps = random.Random(seed), []  # steps: the statistics of each
    response_lens = rollout.response_mask.sum(dim=1).tolist()
    policy.train(args.gradient_checkpointing)  # only then train mode: some models are noisy in it
    for _ in range(args.update_epochs):
        order, epoch = rng.sample(range(len(rollout)), len(rollout)), []
        for row_idx in split_rows(order, args.minibatch_size):
            row_idx.sort(key=response_lens.__getitem__)  # microbatches of similar lengths pad less
            minibatch = rollout[torch.tensor(row_idx, device=args.device)]
            stats = accumulate_gradients(lambda part: ppo_loss(policy, part, kl_coef, args),
                                         minibatch, 1.0, args)
            if args.ptx_coef > 0:  # PPO-ptx: as many demonstrations as responses
                rows = rng.choices(demonstrations, k=args.minibatch_size)
                ptx = accumulate_gradients(lambda part: sft_loss(policy, part),
                                           encode(policy, rows, "chosen"), args.ptx_coef, args)
                stats["ptx_loss"] = ptx["loss"]
            epoch.append(optimizer_step(policy, optimizer, stats, args))
        steps += epoch
        if args.target_kl is not None and fmean(x["approx_kl"] for x in epoch) > args.target_kl:
            break
    policy.eval()
    stats = {name: (max if name.endswith("_max") else fmean)(x[name] for x in steps)
             for name in steps[0] if name != "loss"}
    stats["log_ratio_first"] = steps[0]["log_ratio_max"]  # 0 up to rounding: new is still old
    stats["explained_variance"] = explained_variance(rollout.returns, rollout.old_values,
                                                     rollout.response_mask)
    return stats


def train_ppo(sft: Path | str, scorer: "Scorer", data: "Data", args: Args, log: "RunLog") -> None:
    """Stage 3: PPO from the SFT model, with a frozen copy of it as the reference."""
    learned, state = start_or_resume(sft, scorer, data, args, log)
    policy, reference, optimizer = learned.values()
    kl_coef, num_iterations = state["kl_coef"], args.total_episodes // args.batch_size
    for iteration in range(state["iteration"] + 1, num_iterations + 1):
        seed = random.Random(f"{args.seed} {iteration}").getrandbits(60)
        times = [time.time()]
        set_learning_rates(optimizer, iteration, num_iterations, args.lr_warmup)
        rows = prompt_batch(data.prompts, iteration, args.batch_size, args.seed)
        rollout = collect_rollout(policy, reference, rows, seed, args)
        records = decode(policy, rollout, rows)
        times.append(time.time())
        rollout.scores, rollout.score_std = scorer(records)
        times.append(time.time())
        rollout.advantages, rollout.returns = compute_advantages(rollout, kl_coef, args)
        stats = update_policy(policy, optimizer, rollout, kl_coef, data.demonstrations, seed, args)
        times.append(time.time())
        records = describe(rollout, records, args)
        stats |= {"kl_coef": kl_coef, "learning_rate": optimizer.param_groups[0]["lr"]}
        log.iteration(iteration, records, stats, times)

        kl = fmean(record["kl"] for record in records)  # of a response: the sum of k1
        if args.max_kl is not None and kl > args.max_kl:
            print(f"ppo          ends: the KL, {kl:.2f} nats, is above --max-kl")
            break  # what was saved last remains
        if args.kl_target is not None:
            kl_coef = adaptive_kl_coef(kl_coef, kl, args.kl_target)
        if args.ref_update_interval and iteration % args.ref_update_interval == 0:
            reference.lm.load_state_dict(policy.lm.state_dict())
        if iteration % args.save_interval == 0 or iteration == num_iterations:
            save_model(log.run_dir / "policy", policy.lm, policy.tokenizer)
            state |= {name: x.state_dict() for name, x in learned.items()}
            state |= {"iteration": iteration, "kl_coef": kl_coef}
            save_checkpoint(log.run_dir / "checkpoint.pt", state)


# ==================================================================================================
# Stages 1 and 2: the same step with two other losses
# ==================================================================================================


def sft_loss(policy: Policy, batch: Rollout) -> dict[str, Tensor]:
    """−E[ log π(response token | tokens before it) ], in nats; prompt tokens are not trained on."""
    logprobs, _, _ = policy(batch, temperature=1.0)
    return {"loss": -masked_mean(logprobs, batch.response_mask)}


def reward_loss(reward_model: "RewardModel", pairs: list[tuple]) -> dict[str, Tensor]:
    """−E[ log sigmoid(score(x, chosen) − score(x, rejected)) ]. Source: Stiennon 2020, sec. 3.4."""
    chosen, rejected = zip(*pairs, strict=True)
    chosen_scores, rejected_scores = reward_model(chosen + rejected).chunk(2)
    margins = chosen_scores - rejected_scores  # (comparisons,)
    correct = torch.heaviside(margins, torch.full_like(margins, 0.5))  # a tie counts one half
    return {"loss": -nn.functional.logsigmoid(margins).mean(), "accuracy": correct.mean()}


def fit(log: "RunLog", model, loss_fn, to_batch, rows: list, epochs: int, peak: float, seed: int):
    """Train in stages 1 and 2: each epoch takes all rows in a new order, but for a last incomplete
    minibatch; the learning rate falls from peak to 0."""
    args, rng, minibatches = log.args, random.Random(seed), []
    optimizer = make_optimizer([{"params": model.parameters(), "peak": peak}], args)
    for _ in range(epochs):
        epoch = split_rows(rng.sample(rows, len(rows)), args.minibatch_size)
        minibatches += epoch[: max(1, len(rows) // args.minibatch_size)]
    model.train()
    bar = tqdm(minibatches, log.stage, file=sys.stdout, disable=None)  # on a terminal only
    for number, batch in enumerate(bar, start=1):
        set_learning_rates(optimizer, number, len(minibatches))
        stats = accumulate_gradients(lambda part: loss_fn(model, part), to_batch(batch), 1.0, args)
        log.scalars(log.stage, optimizer_step(model, optimizer, stats, args), number)
    model.eval()


def train_sft(data: "Data", args: Args, log: "RunLog") -> Path:
    """Stage 1: maximum likelihood on demonstrations. Returns: the folder of the SFT model."""
    folder = log.run_dir / "sft"
    if not folder.exists():  # else this is a resumed run
        log.start("sft")
        torch.manual_seed(args.seed)
        policy = load_policy(args.policy_model, args)
        fit(log, policy, sft_loss, lambda rows: encode(policy, rows, "chosen"),
            data.demonstrations, args.sft_epochs, args.sft_learning_rate, args.seed)
        if rows := data.held_out.demonstrations:
            log.held_out("perplexity", policy, sft_loss, encode(policy, rows, "chosen"))
        save_model(folder, policy.lm, policy.tokenizer)
    return folder


def train_reward_models(sft: Path | str, data: "Data", args: Args, log: "RunLog") -> list:
    """Stage 2: Bradley–Terry on comparisons (for reviews, of SFT samples). Returns: the models,
    frozen. Models of an ensemble differ in head and order of the comparisons."""
    names = ["reward_model", *(f"reward_model_{i}" for i in range(2, args.num_reward_models + 1))]
    folders = [log.run_dir / name for name in names]
    train, held_out = data.comparisons, data.held_out.comparisons
    if args.dataset == "reviews" and not all(folder.exists() for folder in folders):
        train = sample_comparisons(sft, data.prompts, args.num_comparisons, args)
        held_out = sample_comparisons(sft, data.held_out.prompts, 500, args)
    for seed, folder in enumerate(folders, start=args.seed):
        if not folder.exists():
            log.start(folder.name)
            torch.manual_seed(seed)
            reward_model = load_reward_model(sft, args, new_head=True)
            fit(log, reward_model, reward_loss, list, train, args.reward_epochs,
                args.reward_learning_rate, seed)
            if held_out:
                log.held_out("accuracy", reward_model, reward_loss, held_out)
            save_model(folder, reward_model.classifier, reward_model.tokenizer)
    return [load_reward_model(folder, args) for folder in folders]


def main(args: Args) -> None:
    """Settings, data, a trial of all models on two rows, then the three stages."""
    torch.set_float32_matmul_precision("high")  # on CUDA: the output layer in TF32
    start_processes(args)
    args = gather([resolve_args(args)])[0]  # the run's name contains the time: one for all
    data = load_data(args)
    sources = try_models(data, args)  # of scores; none if stage 2 is to train them
    log = RunLog(args, data.digest)
    try:
        sft = train_sft(data, args, log) if args.sft_epochs > 0 else args.policy_model
        scorer = Scorer(sources or train_reward_models(sft, data, args, log), args)
        train_ppo(sft, scorer, data, args, log)
        final_table(sft, scorer, data, args, log)
    except FloatingPointError as error:
        raise SystemExit(f"ppo_rlhf.py: {log.stage} stopped after {log.number}: {error}.") from None
    except BaseException as error:  # Ctrl-C, a reward function that fails, a full disk
        print(f"\nstopped; go on after the last checkpoint with --resume {log.run_dir}")
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise


# ==================================================================================================
# Part II: plumbing: scores, how stage 3 starts, text, data, files, settings, log
# ==================================================================================================

# Scores, and how stage 3 starts -------------------------------------------------------------------


class Scorer:
    """(raw score − offset) / scale: by default the mean and std of the SFT policy's scores for
    models, and 0 and 1 for a function.

    Several models score as an ensemble: mean − ensemble_coef · std, because where the policy
    exploits an error of one model, the others usually disagree. Source: Coste 2023 (2310.02743),
    which subtracts the variance."""

    def __init__(self, sources: list[Callable], args: Args):
        self.sources, self.args = sources, args  # of scores: RewardModels, or your --reward-fn
        self.offset, self.scale = torch.zeros(len(sources), 1), torch.ones(len(sources), 1)

    @torch.no_grad()
    def raw_scores(self, records: list[dict]) -> Tensor:
        """(sources, batch), or (sources, batch, response_len) if there is one per token."""
        parts = split_rows(share(records), self.args.microbatch_size)
        return torch.stack([torch.cat(gather([source(part).cpu() for part in parts]))
                            for source in self.sources])

    def normalise(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and the std of an ensemble's models: (batch,) each, or (batch, response_len)."""
        std, mean = torch.std_mean((raw - self.offset) / self.scale, dim=0, correction=0)
        return mean - self.args.ensemble_coef * std, std

    def __call__(self, records: list[dict]) -> list[Tensor]:
        """The same, from records of responses."""
        return [x.to(self.args.device) for x in self.normalise(self.raw_scores(records))]


def start_or_resume(sft: Path | str, scorer: Scorer, data: "Data", args: Args, log: "RunLog"):
    """What changes in stage 3, as it begins or as the checkpoint of a resumed run has it. Returns:
    {policy with critic, reference, optimizer}, {iteration, kl_coef, norm of the scores}."""
    policy, reference = load_policy(sft, args), load_policy(sft, args)
    path = log.run_dir / "checkpoint.pt"
    if path.exists():
        state, mean_return = torch.load(path, "cpu", weights_only=True, mmap=True), 0.0
        scorer.offset, scorer.scale = state["norm"]
    else:
        rows = prompt_batch(data.prompts, 1, 2 * args.batch_size, args.seed)
        samples = decode(policy, collect_rollout(policy, None, rows, args.seed, args), rows)
        mean_return = measure_scores(scorer, samples, args)
        state = {"iteration": 0, "kl_coef": args.kl_coef, "norm": (scorer.offset, scorer.scale)}
        save_model(log.run_dir / "policy", policy.lm, policy.tokenizer)
    policy.critic = make_critic(policy, scorer, mean_return, args)
    optimizer = make_optimizer(
        [{"params": policy.lm.parameters(), "peak": args.learning_rate},
         {"params": policy.critic.parameters(), "peak": args.critic_learning_rate}], args)
    learned = {"policy": policy, "reference": reference, "optimizer": optimizer}
    for name in learned.keys() & state.keys():  # none at the beginning
        learned[name].load_state_dict(state[name])
    log.start("ppo", state["iteration"])
    return learned, state


def measure_scores(scorer: Scorer, records: list[dict], args: Args) -> float:
    """Take offset and scale of the scores from responses of the SFT policy. Returns: their mean
    return, which is score minus EOS penalty."""
    raw = scorer.raw_scores(records)
    totals = raw.reshape(*raw.shape[:2], -1).sum(dim=2)  # (sources, records)
    std, mean = torch.std_mean(totals, dim=1, correction=0, keepdim=True)
    if args.norm_scores:
        scorer.scale = std.where(std > 1e-6, 1.0)  # 1 if all scores are equal
        scorer.offset = mean * (raw.dim() == 2)  # an offset per token would reward length
    scores = scorer.normalise(raw)[0].reshape(len(records), -1).sum(dim=1)
    spread, mean_score = (float(x) for x in torch.std_mean(scores, correction=0))
    print(f"scores       of the SFT policy: mean {mean_score:.3f}, std {spread:.3f}")
    if spread > 1e-6 and not 0.1 < spread < 10:
        print("note         this std is far from 1, as the clips assume: consider --norm-scores")
    return mean_score - args.missing_eos_penalty * fmean(not x["ended"] for x in records)


class RewardModel(nn.Module):
    """A sequence classifier with one output and its own tokenizer: it reads text, not ids."""

    def __init__(self, classifier, tokenizer, args: Args):
        super().__init__()
        self.classifier, self.tokenizer, self.args = classifier, tokenizer, args

    def encode(self, records: list[dict]) -> tuple[Tensor, Tensor]:
        """Ids and mask of whole conversations; one that is too long loses its beginning."""
        texts = (render(self.tokenizer, x["prompt"], x["response"], x["ended"]) for x in records)
        return pad_rows(self.tokenizer, [encode_text(self.tokenizer, text) for text in texts],
                        "right", self.tokenizer.model_max_length, self.args.device)

    def forward(self, records: list[dict]) -> Tensor:
        """Raw scores (records,) of responses, read at the last token that is not PAD."""
        ids, mask = self.encode(records)
        return self.classifier(input_ids=ids, attention_mask=mask.long(),
                               use_cache=False).logits[:, 0].float()


# Rows, steps, processes ---------------------------------------------------------------------------


def split_rows(rows, size: int) -> list:
    """Parts of at most size rows, of a list, a tensor or a Rollout."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def count_terms(rows) -> int | Tensor:
    """What a loss is a mean over: comparisons, or response tokens."""
    return len(rows) if isinstance(rows, list) else rows.response_mask.sum()


def join_rows(parts: list[Rollout], device: str) -> Rollout:
    """The rows of all parts of all processes, in order."""
    parts = gather([[x if x is None else x.cpu() for x in vars(part).values()] for part in parts])
    return Rollout(*(None if x[0] is None else torch.cat(x).to(device)
                     for x in zip(*parts, strict=True)))


def prompt_batch(rows: list[dict], iteration: int, size: int, seed: int) -> list[dict]:
    """The rows of an iteration (from 1): endless passes over all rows, each in a new order."""
    places = [divmod(i, len(rows)) for i in range((iteration - 1) * size, iteration * size)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows))
              for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][i] for epoch, i in places]


def make_optimizer(groups: list[dict], args: Args) -> torch.optim.Adam:
    """Adam for groups of params with a peak learning rate."""
    # Most gradients of a large model are below 1e-5: such an epsilon would shorten its steps.
    return torch.optim.Adam(groups, eps=1e-5 if args.policy_model is None else 1e-8, fused=True)


def set_learning_rates(optimizer, number: int, num_steps: int, warmup: int = 0) -> None:
    """Learning rates of step 1 … num_steps: peak · linear warm-up · linear decay to 0."""
    scale = min(1, number / max(1, warmup)) * (1 - (number - 1) / num_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def chunked_logprobs(policy: Policy, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log softmax(policy.logits(hidden, temperature))[id] for each id (tokens,). PyTorch makes the
    logits (tokens, vocab), if they are many, for a few tokens at a time, and once more for the
    gradient. hidden becomes float32: from bfloat16, bfloat16 would come back."""
    weight, bias = policy.output_layer(temperature)
    size = (6_000_000 if hidden.device.type == "cpu" else 200_000_000) // len(weight)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, size), chunking_method=None)
    return -nn.functional.linear_cross_entropy(
        hidden.float() / temperature, weight, ids, linear_bias=bias, reduction="none",
        options=options if len(ids) > size else None)


def start_processes(args: Args) -> None:
    """Join the other processes, if torchrun has started this one. Each has all models."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if args.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if args.device == "cpu" else None)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process talks for all


def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(rows):
    """The rows of a list, a tensor or a Rollout that this process works on."""
    rank, num_processes = processes()
    return rows[len(rows) * rank // num_processes : len(rows) * (rank + 1) // num_processes]


def gather(items: list) -> list:
    """The items of all processes, those of process 0 first."""
    found = [items] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def sum_gradients(model) -> None:
    """Add up the gradients of all processes."""
    if dist.is_initialized():
        for weights in (x for x in model.parameters() if x.requires_grad):
            if weights.grad is None:  # no token of this process has used them
                weights.grad = torch.zeros_like(weights)
            dist.all_reduce(weights.grad)


def merge_stats(stats: dict[str, Tensor]) -> dict[str, float]:
    """Statistics of all processes: sums, or the maximum if the name ends in _max or _norm."""
    numbers = torch.stack(list(stats.values())).tolist()  # one transfer from the device
    columns = zip(*gather([numbers]), strict=True)  # one per statistic
    return {name: max(column) if name.endswith(("_max", "_norm")) else sum(column)
            for name, column in zip(stats, columns, strict=True)}


# Text: one dialogue is one token sequence, for policy, demonstrations and reward models -----------

CHAT_TEMPLATE = (  # hh-rlhf's format, for tokenizers that have no chat template
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '\n\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def render(tokenizer, prompt: str | list[dict], response: str, ended: bool = True) -> str:
    """The text of a whole conversation. If it has not ended, what closes it is left out."""
    if isinstance(prompt, str):
        text = prompt + response + tokenizer.eos_token
    elif response:
        text = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": response}], tokenize=False)
    else:  # some templates refuse an empty answer, which a policy may give
        text = "".join(frame(tokenizer, prompt)[1:])
    return text if ended else text.removesuffix(frame(tokenizer, prompt)[2])


def frame(tokenizer, prompt: str | list[dict]) -> tuple[str, str, str]:
    """Three texts around a response: what the policy continues, such as "<user>Hi<bot>"; what is
    before an answer in a whole conversation, which is the same unless the template adds or begins
    something there, such as a thought; what closes an answer, such as "<end>"."""
    start = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True)
    before, *rest = render(tokenizer, prompt, "zanswerz").split("zanswerz")
    if len(rest) != 1:
        raise ValueError("its chat template does not show an answer once, letter by letter")
    # Tokens begin with the space before their word. So a space at the end of a prompt has to become
    # the first character of the response: in whole texts it is not a token of its own.
    return start.rstrip(" "), before, rest[0]


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids, with BOS in front exactly once if the tokenizer or the text itself puts it there. An
    empty text becomes EOS."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], [tokenizer.bos_token_id]
    ids = bos + ids if tokenizer("")["input_ids"][:1] == bos != ids[:1] else ids
    return ids or [tokenizer.eos_token_id]


@functools.cache
def added_ids(tokenizer) -> frozenset[int]:
    """Ids of added tokens, such as <end_of_turn>. A tokenizer takes milliseconds to list many."""
    return frozenset(tokenizer.added_tokens_decoder)


def encode_dialogue(tokenizer, prompt, response: str | None, eos_ids: list) -> tuple[list, list]:
    """Ids of prompt and response, if there is one. The response is what follows the prompt in the
    ids of the whole text, up to its first EOS: one of eos_ids, or the first special token in what
    closes it. (Encoded apart, its first token could be another.)

    Raises: ValueError if the ids of the whole do not begin with those of the prompt."""
    start, _, closing = frame(tokenizer, prompt)
    prompt_ids = encode_text(tokenizer, start)
    if response is None:
        return prompt_ids, []
    whole = encode_text(tokenizer, render(tokenizer, prompt, response))
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the tokens of the whole text do not begin with those of the prompt")
    closing_ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    special = [x for x in closing_ids if x in added_ids(tokenizer)]
    response_ids = [*whole[len(prompt_ids) :], tokenizer.eos_token_id]
    ends = {tokenizer.eos_token_id, *eos_ids, *special[:1]} & {*response_ids}
    return prompt_ids, response_ids[: 1 + min(map(response_ids.index, ends))]


def pad_rows(tokenizer, rows: list[list[int]], side: str, limit: int, device: str):
    """Ids and mask (rows, longest), padded on side "left" or "right". Of a row with more than limit
    ids the last ones are used, after BOS."""
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    num_kept = [int(ids[:1] == [tokenizer.bos_token_id]) for ids in rows]
    rows = [torch.tensor(ids if len(ids) <= limit else ids[:num] + ids[num - limit :]).long()
            for ids, num in zip(rows, num_kept, strict=True)]
    mask = pad([torch.ones_like(ids, dtype=torch.bool) for ids in rows])
    return pad(rows, padding_value=tokenizer.pad_token_id).to(device), mask.to(device)


def encode(policy: Policy, rows: list[dict], column: str | None = None) -> Rollout:
    """The prompts of rows of data, padded on the left, and the responses in a column, if one is
    named. These end with EOS, so that models learn to stop, or are cut at --response-len."""
    tokenizer, args = policy.tokenizer, policy.args
    prompts, responses = zip(*(
        encode_dialogue(tokenizer, row["prompt"], None if column is None else row[column],
                        policy.eos_ids) for row in rows), strict=True)
    responses = [ids[: args.response_len] for ids in responses]
    ended = torch.tensor([any(x in policy.eos_ids for x in ids[-1:]) for ids in responses])
    ids, mask = pad_rows(tokenizer, prompts, "left", args.max_prompt_len, args.device)
    response_ids, response_mask = pad_rows(tokenizer, responses, "right", args.response_len,
                                           args.device)
    return Rollout(torch.cat([ids, response_ids], 1), torch.cat([mask, response_mask], 1),
                   response_mask, ended.to(args.device))


def decode(policy: Policy, rollout: Rollout, rows: list[dict]) -> list[dict]:
    """Records: each row of the data with response (a text, without what closes it), response_ids
    and ended."""
    tokenizer, records = policy.tokenizer, []
    prompt_len = rollout.sequence_ids.shape[1] - rollout.response_mask.shape[1]
    columns = (x.cpu() for x in (rollout.sequence_ids, rollout.sequence_mask, rollout.ended))
    for row, ids, mask, ended in zip(rows, *columns, strict=True):
        prompt = ids[:prompt_len][mask[:prompt_len]].tolist()
        response = ids[prompt_len:][mask[prompt_len:]].tolist()
        ids = response[:-1] if ended else response
        start, before, closing = frame(tokenizer, row["prompt"])
        # Decoded alone, a response may lose its first space; decoded with its prompt, it may get
        # one too many (Phi-3). Right is the text from which the same ids come back.
        old, new, alone = tokenizer.batch_decode([prompt, prompt + ids, ids],
                                                 clean_up_tokenization_spaces=False)
        text, both = new[len(old) :], encode_text(tokenizer, start) + ids
        if text != alone and encode_text(tokenizer, start + text) != both:
            text = alone if encode_text(tokenizer, start + alone) == both else text
        if (start + text).startswith(before):
            text = (start + text).removeprefix(before)
        if ended:  # some templates put a newline before EOS
            text = text.removesuffix(closing.split(tokenizer.decode(response[-1:]))[0])
        records.append(row | {"response": text, "response_ids": response, "ended": bool(ended)})
    return records


# The embedded task: film reviews from a grammar, and a gold reward that only the annotator sees ---

# | separates alternatives, and {name} stands for a text of that name. Demonstrations are drawn from
# this grammar; as a regular expression it also tests whether a text belongs to it.
GRAMMAR = {
    "prompt": "a {genre} about {theme}.|a {country} {genre} about {theme}.|"
              "a {age} {genre} about {theme}.|a {age} {country} {genre} about {theme}.",
    "genre": "comedy|thriller|western|musical|romance|mystery",
    "country": "french|british|korean|mexican|swedish|japanese",
    "age": "new|recent|classic|silent|forgotten|famous|long|short",
    "theme": "two sisters|a wedding|the war|a robbery|lost love|a small town|growing old|the sea",
    "review": "{sentence}|{sentence} {sentence}|{clause}. {clause}. {clause}.",
    "sentence": "{clause}.|{clause} and {clause}.|{clause}, while {clause}.",
    "clause": "{praise}|{scorn}",
    "praise": "the {noun} was {good}|the {noun} was {very} {good}|the {noun} {shines}|"
              "i {liked} the {noun}|it made me {smile}",
    "scorn": "the {noun} was {bad}|the {noun} was {very} {bad}|the {noun} {drags}|"
             "i {hated} the {noun}|it made me {yawn}",
    "noun": "plot|acting|script|ending|cast|camera|music|story",
    "very": "very|rather|truly",
    "good": "clever|moving|brilliant|charming|fresh|superb",
    "bad": "dull|clumsy|awful|tired|hollow|silly",
    "shines": "shines|delights|surprises",
    "drags": "drags|annoys|disappoints",
    "liked": "loved|liked|enjoyed|admired",
    "hated": "hated|disliked|regretted|endured",
    "smile": "smile|laugh|cheer|think",
    "yawn": "yawn|sigh|leave|sleep",
}
GENRE_NOUNS = {  # nouns that only reviews of that genre may use
    "comedy": "humour|timing", "thriller": "chase|twist", "western": "duel|scenery",
    "musical": "dancing|singing", "romance": "kiss|courtship", "mystery": "murder|detective",
}
GRAMMARS = {genre: GRAMMAR | {"noun": f"{GRAMMAR['noun']}|{nouns}"}
            for genre, nouns in GENRE_NOUNS.items()}


def genre_of(prompt: str) -> str:
    """The genre that a prompt names."""
    return next(word for word in re.findall(r"\w+", prompt) if word in GRAMMARS)


def draw_text(symbol: str, rules: dict[str, str], rng: random.Random) -> str:
    """Draw a text of the grammar: choose one alternative, draw the names in it."""
    text = rng.choice(rules[symbol].split("|"))
    return re.sub(r"{(\w+)}", lambda match: draw_text(match[1], rules, rng), text)


@functools.cache
def text_pattern(symbol: str, genre: str) -> re.Pattern:
    """The regular expression of exactly the texts of symbol; the grammar has no recursion."""
    text = GRAMMARS[genre][symbol].replace(".", r"\.")
    text = re.sub(r"{(\w+)}", lambda match: text_pattern(match[1], genre).pattern, text)
    return re.compile(f"(?:{text})")


def is_grammatical(prompt: str, response: str, ended: bool) -> bool:
    """Whether the response is a finished text of the grammar that fits its prompt."""
    pattern = text_pattern("review", genre_of(prompt))
    return ended and pattern.fullmatch(response.strip()) is not None


def gold_reward(prompt: str, response: str, ended: bool) -> float:
    """What a reader wants of a review: +1 per praise and −1 per scorn, the sum cut to ±2; −2 if
    ungrammatical or not ended; −1 per repeated clause; −0.5 per clause beyond three. The annotator
    of stage 2 compares by it, with noise; afterwards it is reported, and never trained on."""
    clauses = [x.strip() for x in re.split(r"[.,]|\band\b|\bwhile\b", response) if x.strip()]
    praise, scorn = (text_pattern(symbol, genre_of(prompt)) for symbol in ("praise", "scorn"))
    sentiment = sum(bool(praise.fullmatch(x)) - bool(scorn.fullmatch(x)) for x in clauses)
    ungrammatical = not is_grammatical(prompt, response, ended)
    num_repeated, num_excess = len(clauses) - len(set(clauses)), max(0, len(clauses) - 3)
    return max(-2, min(2, sentiment)) - 2.0 * ungrammatical - num_repeated - 0.5 * num_excess


def sample_comparisons(sft: Path | str, rows: list[dict], num_pairs: int, args: Args) -> list:
    """Pairs (chosen, rejected) of SFT samples. The annotator prefers the first of two with
    probability sigmoid(2·(gold₁ − gold₂)) (Bradley–Terry)."""
    if not rows:
        return []
    policy, rng, samples = load_policy(sft, args), random.Random(f"annotator {args.seed}"), []
    rows = rng.choices(rows, k=num_pairs) * 2
    size = math.ceil(len(rows) / math.ceil(len(rows) / 1000))  # no part is nearly empty
    bar = tqdm(split_rows(rows, size), "comparisons", file=sys.stdout, disable=None)
    for number, part in enumerate(bar):
        rollout = collect_rollout(policy, None, part, args.seed + number, args)
        samples += decode(policy, rollout, part)
    pairs = []
    for pair in zip(samples[:num_pairs], samples[num_pairs:], strict=True):
        first, second = (gold_reward(x["prompt"], x["response"], x["ended"]) for x in pair)
        prefers_first = rng.random() < 1 / (1 + math.exp(2 * (second - first)))
        pairs.append(pair if prefers_first else pair[::-1])
    return pairs


def word_tokenizer():
    """A tokenizer with one token per word or punctuation mark of the grammar."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    texts = re.sub(r"{\w+}", "", " ".join([*GRAMMAR.values(), *GENRE_NOUNS.values()]))
    words = ["[PAD]", "[EOS]", "[UNK]", *sorted(set(re.findall(r"\w+|[.,]", texts)))]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words, and each . or , alone
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # "dull ." -> "dull."
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


# Your own data ------------------------------------------------------------------------------------


@dataclass
class Data:
    """Rows of text to train on; those of other prompts, to evaluate on, are in held_out."""

    prompts: list[dict]  # {prompt, and whatever other columns the data have}
    demonstrations: list[dict]  # {prompt, chosen}
    comparisons: list  # rows {prompt, chosen, rejected}; try_models makes pairs of them
    held_out: "Data | None" = None
    digest: str = ""  # of rows, rendered prompts and the reward function's file, for --resume


def read_row(row: dict) -> tuple[dict, list[str]]:
    """A row with prompt and, if it has them, chosen and rejected, and the columns of responses. The
    last turn of a conversation is the response; strings without a prompt (hh-rlhf) part at their
    last common "Assistant:". Raises: ValueError with the reason if the row cannot be used."""
    names = [x for x in ("chosen", "completion", "messages") if row.get(x) is not None][:1]
    names += ["rejected"] if names == ["chosen"] and row.get("rejected") is not None else []
    prompt, sides = row.get("prompt"), [row[name] for name in names]
    if sides and all(isinstance(side, list) and side for side in sides):
        start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        sides = [start + side if side[0]["role"] == "assistant" else side for side in sides]
        if not isinstance(prompt, str) and any(side[: len(start)] != start for side in sides):
            raise ValueError("its sides do not begin with its prompt")
        prompt, last = sides[0][:-1], [side[-1] for side in sides]
        if any(side[:-1] != prompt or side[-1]["role"] != "assistant" for side in sides):
            raise ValueError("its sides differ before the assistant's last turn")
        if any(value for turn in last for key, value in turn.items()
               if key not in ("role", "content")):
            raise ValueError("its last turn has more than a text, such as tool calls")
        sides = [turn["content"] for turn in last]
    elif prompt is None and len(sides) == 2:
        shared = os.path.commonprefix(sides)  # noqa: RUF071 - of characters, not of path parts
        prompt = "".join(shared.rpartition("\n\nAssistant:")[:2])
        sides = [side[len(prompt) :] for side in sides]
        if any("\n\nHuman:" in side for side in sides):
            raise ValueError("its sides differ before the assistant's last turn")
    if not prompt or not all(isinstance(side, str) for side in sides) or (
            not names and row.get("rejected") is not None):
        raise ValueError("it has no prompt, no chosen response, or one that is no text")
    if isinstance(prompt, str):  # two words must not become one, where words have spaces
        sides = [" " + side if side and all(x.isdigit() or x.lower() != x.upper()
                                            for x in prompt[-1] + side[0]) else side
                 for side in sides]
    row = {name: x for name, x in row.items() if name not in ("chosen", "rejected")}
    return row | {"prompt": prompt} | dict(zip(("chosen", "rejected"), sides, strict=False)), names


def read_rows(flag: str, name: str, split: str, args: Args) -> list[dict]:
    """The usable rows of a file or of a data set on the Hub, with prompt_text, which the policy
    continues. Prints how many are dropped and why, and which columns no model reads."""
    import datasets

    with refusing(f"--policy-model {args.policy_model}", "give another model"):
        tokenizer = load_tokenizer(args.policy_model)
    rows, columns, used, dropped = [], set(), {"prompt"}, {}  # dropped: row numbers by reason
    num_long = num_cut = 0
    with refusing(f"{flag} {name}", "give a jsonl(.gz) or parquet file or a Hub id"):
        if Path(name).is_file() and not name.endswith(".parquet"):
            content = (gzip.open if name.endswith(".gz") else open)(name, "rb").read()
            if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError("it is in UTF-16; save it in UTF-8")
            source = [x for x in enumerate(content.splitlines(), start=1) if x[1].strip()]
            part, = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(source)})
            source = source[part.from_ : part.to]
        else:
            local = {"path": "parquet", "data_files": name}
            local = local if Path(name).is_file() else {"path": name}
            source = list(enumerate(datasets.load_dataset(**local, split=split), start=1))
        for number, row in tqdm(source, name, file=sys.stdout, disable=None):
            try:
                row = json.loads(row) if isinstance(row, bytes) else row
                if not isinstance(row, dict):
                    raise ValueError("it is no object with columns")
                columns |= set(row)
                row, names = read_row(row)
                row["prompt_text"] = frame(tokenizer, row["prompt"])[0]
                for column in ("prompt_text", "chosen", "rejected")[: 1 + len(names)]:
                    row[column].encode()  # fails on half an emoji
                for side in [row[x] for x in ("chosen", "rejected")[: len(names)]] or [None]:
                    prompt_ids, ids = encode_dialogue(tokenizer, row["prompt"], side, [])
                    num_cut += len(ids) > (args.response_len or math.inf)
                num_long += len(prompt_ids) > (args.max_prompt_len or math.inf)
                used |= set(names)
                rows.append(row)
            except Exception as error:
                reason = "its characters are no JSON" if isinstance(
                    error, (json.JSONDecodeError, UnicodeError)) else first_line(error)
                dropped.setdefault(reason, []).append(number)
        reasons = "".join(f"; {len(numbers)} dropped, such as row {numbers[0]}: {reason}"
                          for reason, numbers in dropped.items())
        if not rows:
            raise ValueError(f"none of its rows can be used{reasons}; it has columns "
                             f"{', '.join(sorted(columns))}; wanted are prompt/chosen/rejected, "
                             "prompt/completion, messages or prompt")
    reasons += f"; {num_long} prompts lose their beginning (--max-prompt-len)" if num_long else ""
    reasons += f"; {num_cut} responses are cut (--response-len)" if num_cut else ""
    unread = f"; columns that no model reads: {', '.join(sorted(columns - used))}"
    print(f"data         {len(rows)} of {len(source)} rows of {name} are used{reasons}"
          f"{unread if columns - used else ''}")
    empty = dict.fromkeys(sorted(columns.union(*rows)))
    return [empty | row for row in rows]


def load_data(args: Args) -> Data:
    """Rows to train on; all rows of --eval-prompts distinct prompts are held out."""
    if args.dataset == "reviews":
        rng = random.Random(args.seed)
        rows = [{"prompt": draw_text("prompt", GRAMMAR, rng)} for _ in range(20_000)]
        for row in rows:  # praise and scorn are equally probable
            row["prompt_text"] = row["prompt"]
            row["chosen"] = " " + draw_text("review", GRAMMARS[genre_of(row["prompt"])], rng)
    else:
        rows = read_rows("--dataset", args.dataset, args.dataset_split, args)
    demonstrations = rows
    if args.sft_dataset is not None:
        demonstrations = read_rows("--sft-dataset", args.sft_dataset, "train", args)

    keys = set()  # of the prompts that are held out
    for part in (rows, demonstrations):
        distinct = list(dict.fromkeys(row["prompt_text"] for row in part))
        num_held_out = min(args.eval_prompts, len(distinct) // 4)
        if not keys & set(distinct):  # --sft-dataset may have the same prompts
            keys |= set(random.Random(args.seed).sample(distinct, num_held_out))
    held_out, data = (Data(*(
        [row for row in part if row.get(column) is not None
         and (row["prompt_text"] in keys) is side]
        for column, part in (("prompt", rows), ("chosen", demonstrations), ("rejected", rows))
    )) for side in (True, False))
    held_out.prompts = list({x["prompt_text"]: x for x in held_out.prompts}.values())
    data.held_out, path = held_out, Path((args.reward_fn or "").rpartition(":")[0])
    code = path.read_bytes() if path.is_file() else b""  # without one, load_reward_fn refuses
    digest = hashlib.sha256(code)
    # Of an image its type is used, because its text has an address in memory.
    for row in rows + (demonstrations if args.sft_dataset else []):
        text = json.dumps(row, sort_keys=True, default=lambda x: type(x).__name__)
        digest.update(text.encode())
    data.digest = digest.hexdigest()
    print(f"prompts      {len(data.prompts)} rows to train on, {len(held_out.prompts)} distinct "
          "prompts held out")
    refuse(0 < len(held_out.prompts) < processes()[1],
           f"--eval-prompts {args.eval_prompts} holds out {len(held_out.prompts)}, at most a "
           "quarter of the data, which is less than one per process; set it to 0.")
    refuse(not data.demonstrations and (args.sft_epochs > 0 or args.ptx_coef > 0),
           f"--dataset {args.dataset} has no demonstrations; give --sft-dataset or --sft-epochs 0.")
    refuse(not (data.comparisons or args.dataset == "reviews" or args.reward_model
                or args.reward_fn),
           f"--dataset {args.dataset} has no comparisons; give --reward-model or --reward-fn.")
    return data


# Models on disk -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path | str | None):
    """A tokenizer with a chat template; without a folder, that of the embedded task."""
    tokenizer = word_tokenizer() if folder is None else (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no EOS")
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def load_model(folder: Path | str, kind: str, args: Args, new_head: bool = False):
    """Load a ForCausalLM or ForSequenceClassification without dropout, and its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text_config = config.get_text_config()
    if new_head:
        config.num_labels = 1
    elif kind == "ForSequenceClassification" and config.num_labels != 1:
        raise ValueError(f"it has {config.num_labels} outputs, not one")
    for part in (config, text_config):  # one object, except in models that also read images
        for name, value in vars(part).items():
            if re.search("drop|jitter", name) and isinstance(value, float):
                setattr(part, name, 0.0)  # else old and new log-probabilities would differ
            if value == "gelu_new":
                setattr(part, name, "gelu_pytorch_tanh")  # the same function in one kernel
    if (getattr(text_config, "pad_token_id", None) or 0) not in range(text_config.vocab_size):
        text_config.pad_token_id = None  # early Llamas have −1
    model, info = getattr(transformers, f"AutoModel{kind}").from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True,
        trust_remote_code=False, use_safetensors=True)  # pickled weights could execute code
    if missing := set(info["missing_keys"]) - ({"score.weight"} if new_head else set()):
        raise ValueError(f"it has no weights for {', '.join(sorted(missing))}")
    tokenizer = load_tokenizer(folder)
    context = min(getattr(text_config, name, None) or 10**9
                  for name in ("max_position_embeddings", "max_seq_len"))
    tokenizer.model_max_length = min(context, tokenizer.model_max_length)
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    used = {x for name, x in tokenizer.get_vocab().items() if x not in added_ids(tokenizer)
            or name in named or name in tokenizer.chat_template}
    if max(used) >= model.get_input_embeddings().num_embeddings:  # Gemma 3 has one unused
        raise ValueError("its tokenizer has more tokens than the model")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(args.device).eval(), tokenizer


def load_policy(folder: Path | str | None, args: Args) -> Policy:
    """A policy from a folder or the Hub; without one, a small new model for the embedded task."""
    if folder is None:
        tokenizer = load_tokenizer(None)
        lm = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.06,  # the usual 0.02 is for wide models
            hidden_act="relu", rotary_pct=1.0, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)).eval()
    else:
        lm, tokenizer = load_model(folder, "ForCausalLM", args)
    refuse(args.max_prompt_len + args.response_len > tokenizer.model_max_length,
           f"--max-prompt-len {args.max_prompt_len} + --response-len {args.response_len} exceed "
           f"the {tokenizer.model_max_length} tokens of --policy-model {folder}; lower them.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = Policy(lm, tokenizer, replace(args, dtype="float32")).to(args.device)
    # `generate` of the saved model samples what PPO trained: no top-p, no penalty.
    lm.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        eos_token_id=policy.eos_ids, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=policy.vocab_bias.isinf().nonzero().flatten().tolist() or None)
    # The update reads padded rows as a whole, the sampler reads them in parts with a cache. Both
    # have to give the model's own logits; a state of another kind than keys and values does not.
    ids = torch.tensor([[tokenizer.pad_token_id] * 2 + [tokenizer.eos_token_id, 0, 1, 2, 3]])
    ids, cache = ids.to(args.device), transformers.DynamicCache(config=lm.config)
    mask = torch.arange(7, device=args.device).unsqueeze(0) > 1
    with torch.no_grad():
        own = lm(input_ids=ids[:, 2:], attention_mask=mask[:, 2:].long()).logits
        whole = policy.states(lm.base_model, ids, mask)
        parts = [policy.states(lm.base_model, ids[:, first:end], mask[:, :end], cache)
                 for first, end in ((0, 5), (5, 6), (6, 7))]
        error = policy.logits(torch.cat([whole, torch.cat(parts, dim=1)])[:, 2:], 1.0) - own
    capped = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    if capped or torch.where(error.isinf(), 0, error).abs().max() > 0.05 * own.std():
        raise ValueError("its logits are more than an output layer of hidden states, which padding "
                         "and a KV cache leave the same (some models scale or cap logits, others "
                         "have no such cache)")
    policy.args = args
    return policy


def end_tokens(lm, tokenizer) -> list[int]:
    """Ids that end a response: EOS, PAD, those of the generation config, and what the chat template
    puts behind an answer, such as <end_of_turn>."""
    listed = lm.generation_config.eos_token_id  # an id, or in chat models a list of ids
    ids = {tokenizer.pad_token_id, *(listed if isinstance(listed, list) else [listed])}
    ids -= {tokenizer.unk_token_id}  # some tokenizers pad with it, but it stands in texts too
    with contextlib.suppress(Exception):  # a template that wants other turns
        ids.add(encode_dialogue(tokenizer, [{"role": "user", "content": "Hi"}], "Hi", [])[1][-1])
    # An id that is an ordinary word is no EOS: some configs keep the default of another model.
    return sorted({tokenizer.eos_token_id} | (ids & added_ids(tokenizer)))


def load_reward_model(folder: Path | str, args: Args, new_head: bool = False) -> RewardModel:
    """Load a frozen reward model or, with new_head, a trainable one from the SFT model."""
    model, tokenizer = load_model(folder, "ForSequenceClassification", args, new_head)
    if new_head:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
        tokenizer.model_max_length = args.max_prompt_len + args.response_len + 1  # and EOS
    config = model.config.get_text_config()
    pad_id = tokenizer.pad_token_id if new_head else config.pad_token_id
    if pad_id is None or (new_head and pad_id == tokenizer.eos_token_id):
        # Causal classifiers read the score at the last token that is not PAD. If PAD were EOS, that
        # would be the token before EOS. So they get a PAD that no text contains.
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        pad_id = tokenizer.pad_token_id
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    tokenizer.pad_token_id = config.pad_token_id = pad_id
    return RewardModel(model.requires_grad_(new_head), tokenizer, args)


def load_reward_fn(name: str, args: Args, row: dict) -> Callable:
    """--reward-fn: f(prompts, responses, ...); others by name: tokens, or a column of the data, of
    which row is one."""
    path, _, function_name = name.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))  # the file may import its neighbours
    content = runpy.run_path(path, run_name=Path(path).stem)
    sys.modules[Path(path).stem] = SimpleNamespace(**content)  # where a process pool looks
    function, tokenizer = content[function_name], load_tokenizer(args.policy_model)
    torch.set_default_dtype(torch.float32)  # the file may have set another
    torch.set_default_device(None)
    names = list(inspect.signature(function).parameters)
    if "".join(names).startswith(("completion", "response")):
        raise ValueError("its first two parameters must be prompts and responses, in this order")
    names = names[2:]
    if taken := {"response", "response_ids", "ended", "tokens"} & {*names} & {*row}:
        raise ValueError(f"its parameter {min(taken)} is also a column; rename the column")

    def token_texts(ids: list[int]) -> list[str]:
        """What each token adds to the text; one that ends within a character adds nothing."""
        ids = [tokenizer.eos_token_id, *ids]  # in front, so that the first space is not lost
        texts = [tokenizer.decode(ids[: end + 1]).rstrip("\ufffd") for end in range(len(ids))]
        return [text[len(before) :] for before, text in itertools.pairwise(texts)]

    @refusing(f"--reward-fn {name}", "it gets prompts, responses and, by name, tokens or columns "
              "of the data, and returns per response a finite number or a list of one per token")
    def scores_of(records: list[dict]) -> Tensor:
        """(records,), or (records, response_len) if there is one per token, filled up with 0."""
        # Copies, because a function may append its question to the messages of a prompt.
        columns = {x: copy.deepcopy([record[x] for record in records]) for x in records[0]}
        if "tokens" in names:
            columns["tokens"] = [token_texts(ids) for ids in columns["response_ids"]]
        further = {name: columns[name] for name in names if name in columns}
        found = function(columns["prompt"], columns["response"], **further)
        if len(found) != len(records):
            raise ValueError(f"it returned {len(found)} scores for {len(records)} responses")
        scores = []
        for score, record in zip(found, records, strict=True):
            with contextlib.suppress(Exception):
                scores.append(torch.as_tensor(score, dtype=torch.float32))
                if scores[-1].shape in ((), (len(record["response_ids"]),)) and (
                        scores[-1].isfinite().all()):
                    continue
            raise ValueError(f"it returned {score!r} for {record['response']!r}")
        if scores[0].dim() == 1:
            scores = [nn.functional.pad(x, (0, args.response_len - len(x))) for x in scores]
        return torch.stack(scores)

    return scores_of


@torch.no_grad()  # also ends a torch.set_grad_enabled(False) in the reward function's file
def try_models(data: Data, args: Args) -> list[Callable]:
    """Before stage 1 takes hours: sample two tokens for two prompts, read and score them; render
    all prompts for given reward models. Returns: the given sources of scores; none if stage 2 is
    to train them, for which comparisons become pairs."""
    rows = (data.prompts * 2 * processes()[1])[: 2 * processes()[1]]
    sources, own, short = [], args.dataset != "reviews", replace(args, response_len=2)
    with refusing(f"--policy-model {args.policy_model}", "give another model"):
        policy = load_policy(args.policy_model, args)
        records = decode(policy, collect_rollout(policy, policy, rows, args.seed, short), rows)
    if args.reward_fn is not None:
        with refusing(f"--reward-fn {args.reward_fn}", "give FILE.py:FUNCTION"):
            sources.append(load_reward_fn(args.reward_fn, args, data.prompts[0]))
        sources[0](records)
    stage_2 = not sources and not args.reward_model
    for name in [args.policy_model] if stage_2 and args.policy_model else args.reward_model:
        with refusing(f"--{'policy' if stage_2 else 'reward'}-model {name}", "give another model"):
            reward_model = load_reward_model(name, args, new_head=stage_2)
            ids, mask = reward_model.encode(records)
            print(f"reward input {reward_model.tokenizer.decode(ids[0][mask[0]])!r}")
            reward_model(records)
            for row in data.prompts + data.held_out.prompts:
                frame(reward_model.tokenizer, row["prompt"])
        sources += [reward_model] * (not stage_2)
    for side in (data, data.held_out) if stage_2 and own else ():
        parts = split_rows(side.comparisons, 1000)
        chosen, rejected = ([record for rows in tqdm(parts, column, file=sys.stdout, disable=None)
                             for record in decode(policy, encode(policy, rows, column), rows)]
                            for column in ("chosen", "rejected"))
        side.comparisons = [(x, y) for x, y in zip(chosen, rejected, strict=True)
                            if x["response_ids"] != y["response_ids"]]
        print(f"comparisons  {len(side.comparisons)} of {len(chosen)} differ within --response-len")
    refuse(stage_2 and own and not data.comparisons, f"--response-len {args.response_len} leaves "
           "no difference between chosen and rejected responses; raise it.")
    return sources


def save_model(folder: Path, model, tokenizer) -> None:
    """Write model and tokenizer beside, then rename: a folder with this name is complete."""
    if processes()[0] == 0:
        new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()  # the others read it


def save_checkpoint(path: Path, content: dict) -> None:
    """Write beside, then rename: at any moment the old file or the new one is complete."""
    if processes()[0] == 0:
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


# Settings -----------------------------------------------------------------------------------------


def refuse(condition, message: str) -> None:
    """If condition holds: exit status 2 and one sentence that names flag, value and remedy."""
    if condition:
        print(f"ppo_rlhf.py: {message}", file=sys.stderr)
        raise SystemExit(2)


@contextlib.contextmanager
def refusing(what: str, remedy: str):
    """Turn any exception inside the block into a refusal."""
    try:
        yield
    except Exception as error:
        # A cause says more, unless it is the traceback of another process.
        cause = None if hasattr(error.__cause__, "tb") else error.__cause__
        refuse(True, f"{what} cannot be used ({first_line(cause or error)}); {remedy}.")


def first_line(error: BaseException) -> str:
    """What an exception says; its kind too, if it is not one of ours."""
    return f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split("\n")[0]


MAY_BE_0 = {"eval_prompts", "ensemble_coef", "sft_epochs", "lr_warmup", "gamma", "gae_lambda",
            "vf_coef", "ent_coef", "kl_coef", "ref_update_interval", "missing_eos_penalty",
            "ptx_coef"}


def resolve_args(args: Args) -> Args:
    """Fill in settings that follow from others, and refuse those that cannot work."""
    if args.resume is not None:
        folder = Path(args.resume)
        with refusing(f"--resume {folder}", "give the folder of a run that has begun"):
            saved = json.loads((folder / "args.json").read_text())
            saved |= {"reward_model": tuple(saved["reward_model"]), "resume": args.resume,
                      "output_dir": str(folder.parent), "run_name": folder.name}
            args = Args(**{name: saved[name] for name in vars(args)})  # all but the digest
        if (folder / "before_after.jsonl").exists():
            raise SystemExit(print(f"{folder} is finished"))
    new, given = args.policy_model is None, bool(args.reward_model or args.reward_fn)
    usual = {name: values[0 if new else 1] for name, values in {
        "max_prompt_len": (16, 256), "response_len": (32, 128), "learning_rate": (1e-4, 3e-6),
        "sft_learning_rate": (3e-3, 1e-5), "reward_learning_rate": (1e-3, 1e-5)}.items()}
    usual["norm_scores"] = args.reward_fn is None
    usual["run_name"] = f"{Path(args.dataset).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    unused = {  # settings that others leave without effect
        "num_comparisons": given or args.dataset != "reviews", "reward_epochs": given,
        "dataset_split": args.dataset == "reviews", "reward_learning_rate": given,
        "num_reward_models": given, "sft_learning_rate": args.sft_epochs == 0,
        "sft_dataset": args.sft_epochs == 0 and args.ptx_coef == 0,
        "ensemble_coef": max(len(args.reward_model), args.num_reward_models) == 1}
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        refuse(unused.get(name) and value not in (getattr(Args, name), usual.get(name)),
               f"{flag} has no effect beside the other settings; drop it.")
        if type(value) in (int, float) and name != "seed":
            least = "at least 0" if name in MAY_BE_0 else "above 0"
            most = 1 if name in ("gamma", "gae_lambda") else sys.float_info.max
            refuse(not 0 <= value <= most or (value == 0 and least == "above 0"), f"{flag} is out "
                   f"of range; it must be {least}{' and at most 1' if most == 1 else ''}.")
    args = replace(args, **{x: y for x, y in usual.items() if getattr(args, x) is None})
    refuse(args.total_episodes % args.batch_size or args.batch_size % args.minibatch_size
           or args.minibatch_size < processes()[1],
           f"--total-episodes {args.total_episodes} must be a multiple of --batch-size "
           f"{args.batch_size}, that one of --minibatch-size {args.minibatch_size}, and that one "
           "at least the number of processes.")
    refuse(new and (args.dataset != "reviews" or args.sft_epochs == 0),
           f"--dataset {args.dataset} with --sft-epochs {args.sft_epochs} needs a --policy-model; "
           "only reviews with SFT can start from a new one.")
    refuse(args.reward_model and args.reward_fn is not None, f"--reward-fn {args.reward_fn} and "
           f"--reward-model {' '.join(args.reward_model)} are both given; drop one of them.")
    refuse(args.reward_fn is not None and ":" not in args.reward_fn,
           f"--reward-fn {args.reward_fn} names no function; give FILE.py:FUNCTION.")
    refuse(args.kl_in == "loss" and args.kl_estimator == "k1",
           "--kl-in loss with --kl-estimator k1 has zero gradient in expectation; use k2 or k3.")
    refuse(args.kl_target is not None and args.kl_coef == 0,
           f"--kl-target {args.kl_target} scales --kl-coef, and 0 stays 0; set it above 0.")
    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda was asked for, but PyTorch sees no GPU; use --device cpu.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(
        args, device=device if args.device == "auto" else args.device, seed=args.seed % 2**60,
        critic_learning_rate=args.critic_learning_rate or 10 * args.learning_rate)


# Metrics and log ----------------------------------------------------------------------------------


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one; NaN
    if the returns are constant up to rounding."""
    returns, values = returns[mask], values[mask]
    variance = returns.var(correction=0)
    if variance <= 1e-10 * (returns**2).mean():
        return math.nan
    return float(1 - (returns - values).var(correction=0) / variance)


def describe(rollout: Rollout, records: list[dict], args: Args) -> list[dict]:
    """A record of each response: texts and numbers. The metrics of a batch are their means."""
    mask, described = rollout.response_mask, []
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs)
    columns = {  # scores per token are summed; −log π of sampled tokens is on average their entropy
        "score": rollout.scores.reshape(len(records), -1).sum(dim=1),
        "kl": torch.where(mask, kl, 0).sum(dim=1),
        "response_len": mask.sum(dim=1),
        "ended": rollout.ended,
        "entropy": -masked_mean(rollout.old_logprobs, mask, dim=1)}
    if max(len(args.reward_model), args.num_reward_models) > 1:
        columns["score_std"] = rollout.score_std
    numbers = torch.stack([x.float() for x in columns.values()], dim=1).tolist()  # one transfer
    for record, values in zip(records, numbers, strict=True):
        facts = record["prompt"], record["response"], record["ended"]
        new = {"prompt": facts[0], "response": facts[1]} | dict(zip(columns, values, strict=True))
        if args.dataset == "reviews":
            new |= {"gold": gold_reward(*facts), "grammatical": float(is_grammatical(*facts))}
        described.append(new)
    return described


def evaluate(policy: Policy, reference: Policy, scorer: Scorer, data: Data, args: Args) -> list:
    """Records of responses to the held-out prompts, with the same random numbers every time."""
    rows = data.held_out.prompts
    if not rows:
        return []
    rollout = collect_rollout(policy, reference, rows, args.seed, args)
    records = decode(policy, rollout, rows)
    rollout.scores, rollout.score_std = scorer(records)
    return describe(rollout, records, args)


def final_table(sft: Path | str, scorer: Scorer, data: Data, args: Args, log: "RunLog") -> None:
    """Responses to the held-out prompts before PPO and after it."""
    reference = load_policy(sft, args)  # the SFT model, also after --ref-update-interval
    log.before_after(*(evaluate(load_policy(folder, args), reference, scorer, data, args)
                       for folder in (sft, log.run_dir / "policy")))


def means(records: list[dict]) -> dict[str, float]:
    """The mean of each number over records of the same keys."""
    return {name: fmean(record[name] for record in records)
            for name, value in records[0].items() if isinstance(value, float)}


class RunLog:
    """Files of a run and console. All processes but the first write into a temporary folder."""

    def __init__(self, args: Args, digest: str):
        self.args, self.run_dir = args, Path(args.output_dir, args.run_name)
        self.folder = self.run_dir if processes()[0] == 0 else Path(tempfile.mkdtemp())
        path = self.run_dir / "args.json"
        if args.resume is not None:
            refuse(json.loads(path.read_text())["digest"] != digest,
                   f"--resume {args.resume} needs the data, chat template (a date in it?) and "
                   "reward function that the run began with; restore them or start a new run.")
        elif self.folder == self.run_dir:
            with refusing(f"--run-name {args.run_name}", "choose another, or --resume it"):
                if ".." in self.run_dir.parts or Path(args.run_name).is_absolute():
                    raise ValueError("it is no folder in --output-dir")
                self.run_dir.mkdir(parents=True, exist_ok=False)
                path.write_text(json.dumps(asdict(args) | {"digest": digest}, indent=1))
        print(f"run          {self.run_dir}")

    def start(self, stage: str, done: int = 0) -> None:
        """Begin the curves of a stage; what was logged after so many iterations is cut off."""
        from torch.utils.tensorboard import SummaryWriter

        self.stage, self.number = stage, done
        self.writer = SummaryWriter(str(self.folder / "curves" / stage),
                                    purge_step=done * self.args.batch_size + 1)
        with open(self.folder / "metrics.jsonl", "a+b") as file:
            file.seek(0)
            file.truncate(sum(len(file.readline()) for _ in range(done)))

    def scalars(self, group: str, values: dict[str, float], number: int) -> None:
        """One point on each curve of TensorBoard."""
        self.number = number
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, number)

    @torch.no_grad()
    def held_out(self, name: str, model, loss_fn: Callable, batch) -> None:
        """A statistic of loss_fn on examples that stage 1 or 2 did not train on."""
        stats = accumulate_gradients(lambda part: loss_fn(model, part), batch, 1.0, self.args)
        stats = merge_stats(stats)
        value = math.exp(stats["loss"]) if name == "perplexity" else stats[name]
        print(f"{self.stage:<12} held-out {name} {value:.3f}")
        self.scalars(self.stage, {f"held_out_{name}": value}, self.number)

    def iteration(self, number: int, records: list[dict], stats: dict, times: list[float]) -> None:
        """One PPO iteration: curves over episodes, a jsonl object, a line on the console."""
        args, episodes = self.args, number * self.args.batch_size
        seconds = [end - start for start, end in itertools.pairwise(times)]
        perf = dict(zip(("rollout_s", "score_s", "update_s"), seconds, strict=True))
        perf["episodes_per_s"] = args.batch_size / sum(seconds)
        if args.device == "cuda":
            perf["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        line = {"iteration": number, "episodes": episodes}
        for group, values in (("rollout", means(records)), ("ppo", stats), ("perf", perf)):
            self.scalars(group, values, episodes)
            line |= {f"{group}/{x}": y if math.isfinite(y) else None for x, y in values.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {x.partition("/")[2]: y for x, y in line.items() if x.startswith("rollout/")
                 or x in ("ppo/clipfrac", "ppo/kl_coef", "perf/episodes_per_s")}
        if number % 20 == 1:
            print("iteration " + "".join(f"{x:>{max(8, len(x) + 1)}}" for x in shown))
        print(f"{number:>4}/{args.total_episodes // args.batch_size:<5}" + "".join(
            f"{y:>{max(8, len(x) + 1)}.3f}" for x, y in shown.items()), flush=True)
        for x in records[:2] if number % args.save_interval == 0 else ():
            print(f"    {x['prompt']!r:.60} -> {x['response']!r}\n    score {x['score']:.2f}, "
                  f"KL {x['kl']:.2f} nats")

    def before_after(self, before: list[dict], after: list[dict]) -> None:
        """Write the responses before and after PPO to a file; print the final table."""
        pairs = list(zip(before, after, strict=True))
        path = self.folder / "before_after.jsonl"  # a run that has it is finished
        with open(path.with_suffix(".new"), "w") as file:
            for old, new in pairs:
                row = {"prompt": old["prompt"], "sft": old, "ppo": new}
                file.write(json.dumps(row, default=str) + "\n")  # str: of a time or an image
        path.with_suffix(".new").replace(path)
        self.writer.close()
        if not pairs:
            return
        key = "gold" if "gold" in after[0] else "score"
        wins = fmean((new[key] > old[key]) + 0.5 * (new[key] == old[key]) for old, new in pairs)
        old_means = means(before) | {f"win rate by {key}": 0.5}
        new_means = means(after) | {f"win rate by {key}": wins}
        print(f"\n{f'{len(pairs)} held-out prompts':<24}{'SFT':>9}{'PPO':>9}")
        for name in new_means:
            print(f"{name:<24}{old_means[name]:>9.3f}{new_means[name]:>9.3f}")
        for old, new in pairs[:2]:
            print(f"\nprompt  {str(old['prompt']).strip()[-90:]}\n  SFT   "
                  f"{old['response'].strip()}\n  PPO   {new['response'].strip()}")


def parse_args(words: list[str]) -> Args:
    """Settings from the command line."""
    import tyro

    flags = [x for x in words if x.startswith("--")]
    refuse(len(flags) > 1 and any(x.startswith("--resume") for x in flags), "--resume takes the "
           "settings of the run that it resumes; drop the other flags.")
    both = {"--norm-scores": "--norm-scores=True", "--no-norm-scores": "--norm-scores=False"}
    return tyro.cli(Args, args=[both.get(x, x) for x in words])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that has no Greek letters
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(parse_args(sys.argv[1:]))
    if dist.is_initialized():
        dist.destroy_process_group()
