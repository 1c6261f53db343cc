"""PPO for RLHF in one file: supervised fine-tuning, reward model, PPO. On CUDA or CPU.

    python ppo_rlhf.py                # three stages on the embedded task, some minutes on a CPU
    python ppo_rlhf.py --kl-coef 0    # without the KL term: watch the reward model being hacked
    python ppo_rlhf.py --dataset Anthropic/hh-rlhf --policy-model Qwen/Qwen2.5-0.5B
    torchrun --nproc-per-node 4 ppo_rlhf.py    # the same on four GPUs
    python ppo_rlhf.py --resume --run-name X   # go on with a run that was killed

PPO looks for the policy π with the largest J, averaged over prompts x and responses y that π
samples (InstructGPT, arXiv 2203.02155, eq. 2):

    J(π) = E[ score(x, y) ] − kl_coef · E[ KL( π(·|x) ‖ π_ref(·|x) ) ],   y ~ π(·|x)

Stage 1  SFT           π_ref: a language model trained by maximum likelihood on demonstrations
Stage 2  reward model  score(x, y); P(y₁ preferred to y₂) = sigmoid(score(x, y₁) − score(x, y₂))
Stage 3  PPO           repeat: sample responses, score them, turn score and KL into one reward per
                       token, estimate advantages (GAE), take a few clipped gradient steps

A response is an episode, a token is an action, the tokens so far are the state. Names:

    batch     responses per iteration      prompt_len     columns of prompts, padded on the left
    seq_len   prompt_len + response_len    response_len   columns of responses, padded on the right
    logprobs       log π(token | tokens before it), in nats. old_: under the policy that sampled;
                   new_: under the policy being updated; ref_: under the frozen reference
    values         the critic's forecast of the rewards to come, made before the token is chosen
    scores         one number per response, from the reward model
    rewards        one number per token: minus the KL penalty, and at the last token plus the score
    response_mask  True on the real tokens of a response, its EOS included

PAD fills the unused columns of a row. No mask is made by looking for PAD, so PAD may be the same
token as EOS; if it is another token, the policy can never sample it. EOS ends a response and is its
last real token; a response that is cut at the length limit has no EOS. If the tokenizer has a BOS,
exactly one stands in front of the prompt. Every mean over tokens leaves out the padding.

Part I is RLHF, in reading order. Part II is plumbing: data, files, settings, logging, processes. If
there are several processes, share(rows) gives each its part and gather joins all results; with one
process, share and gather return what they are given.
"""

import contextlib
import copy
import functools
import gzip
import inspect
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from tqdm import tqdm

# ==================================================================================================
# Part I: RLHF
# ==================================================================================================


@dataclass
class Args:
    """All settings. None means: not used, or [derived in this way] and printed at start."""

    # Data
    dataset: str = "reviews"  # embedded task, or preference data: Hub id, jsonl(.gz), parquet file
    dataset_split: str = "train"  # split of --dataset; slices such as train[:1000] work
    sft_dataset: str | None = None  # demonstrations, instead of the chosen responses of --dataset
    max_prompt_len: int | None = None  # a prompt's last tokens are used [16 reviews, else <= 512]
    response_len: int | None = None  # tokens of the longest response [32 for reviews, else 128]
    eval_prompts: int = 128  # distinct prompts held out for evaluation; 0: no evaluation
    num_comparisons: int = 6000  # reviews only: pairs of SFT samples for the simulated annotator

    # Models
    policy_model: str | None = None  # causal language model: Hub id or folder [a small new one]
    reward_model: tuple[str, ...] = ()  # one, or several as an ensemble; stage 2 is skipped
    reward_fn: str | None = None  # FILE.py:FUNCTION gives the scores; stage 2 is skipped
    sft_epochs: int = 1  # passes over the demonstrations; 0: skip stage 1
    sft_learning_rate: float | None = None  # of stage 1; falls to 0 [3e-3 new, 1e-5 given model]
    num_reward_models: int = 1  # how many stage 2 trains; several score as an ensemble
    ensemble_coef: float = 1.0  # an ensemble's score is its mean minus this times its std
    reward_epochs: int = 1  # passes over the comparisons
    reward_learning_rate: float | None = None  # of stage 2; falls to 0 [1e-3 new, 1e-5 given]
    critic: Literal["shared", "separate"] = "shared"  # value head on the policy, or own network
    critic_learning_rate: float | None = None  # of value head and separate critic [10 x policy's]
    # sft: the SFT policy's scores get mean 0 and std 1; center: mean 0; none: raw scores
    # [sft after stage 2 or with several models, none if each token has a score, else center]
    score_norm: Literal["sft", "center", "none"] | None = None
    ref_update_interval: int = 0  # iterations after which policy becomes reference; 0: never

    # PPO
    total_episodes: int = 12_800  # responses in all
    batch_size: int = 128  # responses per iteration: one rollout and one update
    minibatch_size: int = 32  # responses per optimizer step; examples per step in stages 1 and 2
    microbatch_size: int | None = None  # rows in a backward pass [minibatch_size / processes]
    update_epochs: int = 4  # passes over each batch
    learning_rate: float | None = None  # of the policy in PPO [1e-4 new, 3e-6 given model]
    lr_warmup: int = 0  # iterations of linear warm-up
    anneal_lr: bool = True  # decay the learning rate of PPO linearly to 0
    adam_eps: float | None = None  # Adam's epsilon [1e-5 for a new model, 1e-8 for a given one]
    temperature: float = 1.0  # of the sampler, and of every log-probability in PPO
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # 0: one reward plus the next value; 1: only the sampled rewards
    clip_coef: float = 0.2  # the ratio is clipped to 1 ± this
    vf_clip_coef: float = 0.2  # new values are clipped to old ± this, in normalised-score units
    vf_coef: float = 0.5  # weight of the value loss (half the squared error)
    ent_coef: float = 0.0  # weight of the entropy bonus, per nat
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm
    target_kl: float | None = None  # end an update if an epoch's KL(old ‖ new) is above: nats/token
    kl_coef: float = 0.05  # weight of the KL to the reference, per nat
    kl_in: Literal["reward", "loss"] = "reward"  # subtract it from rewards, or add it to the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # use k1 in the reward, k2 or k3 in the loss
    kl_target: float | None = None  # adapt kl_coef until the KL is this: nats per response
    kl_horizon: int = 10_000  # episodes over which the adaptive kl_coef reacts
    max_kl: float | None = None  # end PPO above this KL, in nats per response; keep the last save
    norm_advantages: bool = True  # advantages to mean 0 and std 1 over the tokens of the batch
    whiten_rewards: bool = False  # rewards to std 1 over the batch, their mean unchanged
    score_clip: float | None = None  # normalised scores are clipped to ± this
    missing_eos_penalty: float = 1.0  # subtracted from the normalised score if EOS is missing
    ptx_coef: float = 0.0  # weight of the SFT loss added to each step of PPO (PPO-ptx)

    # Run
    seed: int = 1  # of data, weights, sampling and shuffling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products, except the reward model
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    output_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder of this run, in output_dir [data set, seed, time]
    resume: bool = False  # go on with the run --run-name after its last checkpoint
    save_interval: int = 20  # iterations between two checkpoints, each with two samples shown
    eval_interval: int = 0  # iterations between two evaluations; 0: before and after PPO only


# The PPO math: pure functions of tensors ----------------------------------------------------------


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree: PyTorch would broadcast (batch,) − (batch, 1)."""
    if len({x.shape for x in tensors.values()}) > 1:
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"shapes differ: {shapes}")


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask (bool, the same shape) is True, over dim or over everything.

    NaN where the mask selects nothing. Raises: ValueError if the shapes differ."""
    check_same_shape(x=x, mask=mask)
    # torch.where instead of x * mask, because NaN times 0 is NaN.
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / std over the entries where mask is True; all other entries become 0.

    If shift_mean is False, the mean is added back. The variance is the biased one, divided by n."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def logprobs_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log p[id] and the exact entropy H = −Σ p·log p, in nats, of p = softmax(logits).

    Args: logits (..., vocab); ids (...). Returns: logprobs (...), entropies (...)."""
    check_same_shape(logits=logits[..., 0], ids=ids)
    log_probs = logits.log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropies


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref), in nats, from tokens that π sampled.

    With d = logprobs − ref_logprobs:  k1 = d  (unbiased, may be negative),  k2 = ½·d²  (biased),
    k3 = exp(−d) − 1 + d  (unbiased, never negative).
    A good estimate of the KL can have the wrong gradient. In the reward it is a constant factor of
    ∇log π: k1 gives the gradient of KL(π ‖ π_ref), k2 and k3 almost none while π ≈ π_ref. In the
    loss it is differentiated: while π is still the policy that sampled, k2 gives the gradient of
    each token's KL, k3 that of the forward KL KL(π_ref ‖ π), and k1 zero in expectation.

    Args and result: (batch, response_len). Source: Schulman 2020, joschu.net/blog/kl-approx."""
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """rₜ = −kl_coef · klₜ, plus the score at the last token of the response.

    The last token is EOS, or the one at the length limit; trl puts the score one column later.
    Dense scores (one per token instead of one per response) are added token by token.

    Args: scores (batch,), or (batch, response_len) if dense; kl, response_mask (batch,
    response_len). Returns: (batch, response_len), 0 in the padding. Source: InstructGPT, eq. 2."""
    check_same_shape(kl=kl, response_mask=response_mask)
    if scores.dim() == 1:
        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
        scores = torch.zeros_like(kl).scatter(1, last_token_idx, scores.unsqueeze(1))
    check_same_shape(scores=scores, kl=kl)
    return torch.where(response_mask, scores - kl_coef * kl, 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, computed from the last token backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·Vₜ₊₁ − Vₜ;  A and V are 0 after the last response token.
    The returns Aₜ + Vₜ are the critic's targets; with λ = 1 they are the discounted future rewards.

    Args: rewards, values, mask (batch, response_len). Returns: advantages and returns, the same
    shape, 0 in the padding. Source: PPO paper (1707.06347), eqs. 11-12; GAE (1506.02438)."""
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


def policy_loss(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated: −E[ min(ratio·A, clip(ratio, 1 − ε, 1 + ε)·A) ].

    ratio = π_new / π_old compares with the policy that sampled, not with the reference. If the
    ratio is outside [1 − ε, 1 + ε] and A would push it further out, the gradient is zero.

    Args: (batch, response_len) each; clip_coef is ε. Returns: loss; clipfrac, the share of tokens
    whose gradient is zero for this reason. Source: PPO paper, eq. 7."""
    check_same_shape(new=new_logprobs, old=old_logprobs, advantages=advantages, mask=mask)
    ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)
    return loss, masked_mean((clipped < unclipped).float(), mask)


def value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, vf_clip_coef: float
) -> tuple[Tensor, Tensor]:
    """½·E[ max((V − R)², (V_old + clip(V − V_old, ±c) − R)²) ].

    The clip limits how far a batch can move the critic. Most RLHF code has it; on control tasks it
    was found to be of no benefit. c is in units of the return: raise it if returns are far above 1.

    Args: (batch, response_len) each; vf_clip_coef is c. Returns: loss; clipfrac, the share of
    tokens whose clipped term is the larger one. Source: OpenAI baselines (ppo2), not the paper."""
    check_same_shape(new=new_values, old=old_values, returns=returns, mask=mask)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    # Use where before squaring: otherwise a NaN in the padding would reach the gradient.
    unclipped = torch.where(mask, new_values - returns, 0) ** 2
    clipped = torch.where(mask, old_values + change - returns, 0) ** 2
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float, kl_target: float, num_episodes: int, kl_horizon: int
) -> float:
    """Raise β (kl_coef) if the KL is above its target, lower it if it is below.

    β ← β·(1 + e·n/h),  e = clip(KL / target − 1, ±0.2), n episodes since the last call, horizon h.

    Args: observed_kl, kl_target in nats per response; num_episodes, kl_horizon in episodes.
    Source: Ziegler 2019 (1909.08593), section 2.2; n/h as in the code of lm-human-preferences."""
    error = max(-0.2, min(0.2, observed_kl / kl_target - 1))
    return kl_coef * (1 + error * num_episodes / kl_horizon)


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    returns, values = returns[mask], values[mask]
    unexplained = (returns - values).var(correction=0)
    return float(1 - unexplained / (returns.var(correction=0) + 1e-8))


# The policy: from text to log-probabilities -------------------------------------------------------


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
        rewards (kl is kl_coef · KL)                        -kl  -kl  -kl  -kl   -
                                                                        + score

    Response token t is chosen in the state one column before it. Its log-probability and value are
    read there, so the first value is computed from the prompt alone. Column 4 of this row is
    padding and enters no mean or sum. Prompts and demonstrations have only the first 3 fields."""

    sequence_ids: Tensor  # (batch, seq_len)
    sequence_mask: Tensor  # (batch, seq_len), bool
    response_mask: Tensor  # (batch, response_len), bool
    ended: Tensor | None = None  # (batch,), bool: ended by EOS, not by the length limit
    old_logprobs: Tensor | None = None  # (batch, response_len), nats
    ref_logprobs: Tensor | None = None  # (batch, response_len), nats
    entropies: Tensor | None = None  # (batch, response_len), nats
    old_values: Tensor | None = None  # (batch, response_len), in units of the normalised score
    scores: Tensor | None = None  # (batch,), or (batch, response_len) if dense; normalised
    score_stds: Tensor | None = None  # of an ensemble: standard deviation over its models
    rewards: Tensor | None = None  # (batch, response_len)
    advantages: Tensor | None = None  # (batch, response_len)
    returns: Tensor | None = None  # (batch, response_len)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, idx) -> "Rollout":
        """Some of the rows: idx is a slice or a list of row numbers."""
        return Rollout(*(None if x is None else x[idx] for x in vars(self).values()))


class Policy(nn.Module):
    """A causal language model that gives a distribution over responses, and its critic.

    Position ids are made in states() only; the temperature is applied and PAD is forbidden in
    logits() only. So sampler, old, new and reference log-probabilities belong to one distribution.
    Options of the generation config, such as top-p, would change it and are ignored."""

    def __init__(self, lm, tokenizer, args: Args):
        super().__init__()
        self.lm, self.tokenizer, self.args = lm, tokenizer, args
        self.trunk = self.value_head = None  # of the critic, see add_critic
        listed = lm.generation_config.eos_token_id  # an id, or in chat models a list of ids
        eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        self.register_buffer("eos_ids", torch.tensor(sorted(eos_ids - {None})))
        pad_id = tokenizer.pad_token_id
        self.pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
        # The mask would count a sampled PAD as a real token: forbid it, unless it is EOS as well.
        self.register_buffer("banned_ids", torch.tensor(list({self.pad_id} - eos_ids)).long())

    def autocast(self):
        """The context in which matrix products are computed in --dtype."""
        enabled = self.args.dtype == "bfloat16"
        return torch.autocast(self.eos_ids.device.type, torch.bfloat16, enabled=enabled)

    def encode(self, prompts: list, responses: list[str] | None = None) -> Rollout:
        """Encode prompts, and responses if given, as padded token ids (helpers: start of Part II).

        Prompt and response are tokenised separately, because in PPO the policy continues an encoded
        prompt. Responses get EOS, then are cut to --response-len; without EOS in the data the model
        would never learn to stop."""
        args, tokenizer = self.args, self.tokenizer
        prompt_rows = [cut_front(tokenizer, ids, args.max_prompt_len)
                       for ids in encode_prompts(tokenizer, prompts)]
        response_rows = [[] for _ in prompts]
        if responses is not None:
            encoded = tokenizer(responses, add_special_tokens=False)["input_ids"]
            # Text after a response: chat templates may close it by another EOS (<end_of_turn>).
            _, after = frame(tokenizer, prompts[0])
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            end = next((x for x in first if x in self.eos_ids), tokenizer.eos_token_id)
            banned_ids = self.banned_ids.tolist()  # data may contain the text [PAD]
            response_rows = [[x for x in ids if x not in banned_ids] for ids in encoded]
            response_rows = [[*ids, end][: args.response_len] for ids in response_rows]
        prompt_ids, prompt_mask = pad_rows(prompt_rows, self.pad_id, "left", args.device)
        response_ids, response_mask = pad_rows(response_rows, self.pad_id, "right", args.device)
        return Rollout(torch.cat([prompt_ids, response_ids], dim=1),
                       torch.cat([prompt_mask, response_mask], dim=1), response_mask)

    def collate(self, rows: list[dict]) -> Rollout:
        """Encode demonstrations for sft_loss."""
        return self.encode([row["prompt"] for row in rows], [row["chosen"] for row in rows])

    def decode(self, rollout: Rollout) -> tuple[list[str], list[list[str]]]:
        """Responses as texts without the final EOS, and as one string for each token.

        Special tokens stay in the texts, so that a scorer reads what the policy wrote."""
        response_ids = rollout.sequence_ids[:, -rollout.response_mask.shape[1] :]
        rows = [ids[mask].tolist()
                for ids, mask in zip(response_ids, rollout.response_mask, strict=True)]
        strings = {i: self.tokenizer.decode([i]) for ids in rows for i in set(ids)}
        eos_ids = self.eos_ids.tolist()
        texts = [ids[:-1] if ids[-1] in eos_ids else ids for ids in rows]
        texts = self.tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False)
        return texts, [[strings[i] for i in ids] for ids in rows]

    def states(self, trunk, ids: Tensor, mask: Tensor, cache=None) -> Tensor:
        """Hidden states (batch, columns, hidden) of ids. trunk: a model without its output layer.

        With a KV cache, ids are the columns that the cache does not have; mask has all columns."""
        # The first real token has position 0: left padding must not shift it.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.autocast():
            return trunk(input_ids=ids, attention_mask=mask, position_ids=positions,
                         past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def logits(self, states: Tensor, temperature: float) -> Tensor:
        """Logits (..., vocab) of the next token, from hidden states (..., hidden)."""
        with self.autocast():
            logits = self.lm.get_output_embeddings()(states).float()
        bound = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)
        if bound is not None:  # Gemma 2 does this in its own forward, which is not used here
            logits = bound * torch.tanh(logits / bound)
        if temperature != 1:
            logits = logits / temperature
        # PAD gets −1e30 and not −inf, because 0 · −inf in the entropy would be NaN.
        # Its gradient is 0 anyway; with detach, backward need not copy the gradient to set it to 0.
        logits.detach().index_fill_(-1, self.banned_ids, -1e30)
        return logits

    def forward(self, rows: Rollout, temperature: float) -> list[Tensor]:
        """Read prompts with responses, for the rollout and all losses.

        Returns: logprobs, entropies, values of the response tokens, each (batch, response_len), 0
        in the padding; without a critic, all values are 0."""
        used = rows.sequence_mask.any(dim=0)  # columns with a real token in at least one row
        ids, mask = rows.sequence_ids[:, used], rows.sequence_mask[:, used]
        row, column = rows.response_mask.nonzero(as_tuple=True)  # (tokens,) each: response tokens
        prompt_len = ids.shape[1] - 1 - column.max()  # columns before the longest response
        token = prompt_len + column  # its column in ids
        # A token is chosen in the state one column before it.
        hidden = self.states(self.lm.base_model, ids, mask)[row, token - 1]  # (tokens, hidden)
        # logprobs_and_entropy(self.logits(hidden), ids of the tokens), in less memory: Part II.
        logprobs, entropies = ChunkedLogprobs.apply(self, temperature, hidden, ids[row, token],
                                                    *self.lm.get_output_embeddings().parameters())
        values = torch.zeros_like(logprobs)
        if self.value_head is not None:
            if self.trunk is not None:
                hidden = self.states(self.trunk, ids, mask)[row, token - 1]
            values = self.value_head(hidden.float()).squeeze(-1)
        padded = torch.zeros_like(rows.response_mask, dtype=torch.float32)
        return [padded.index_put((row, column), x) for x in (logprobs, entropies, values)]

    def add_critic(self, score: "Score") -> None:
        """Add V(state): a linear head on the policy's hidden states, or on a trunk of its own.

        A separate critic starts as a copy of the (first) reward model if both use the same tokens:
        V is then the normalised score, (raw − offset) / scale, of the text so far (Stiennon 2020,
        2009.01325). In all other cases V starts at 0, and a trunk is a copy of the policy's."""
        trunk, weight, bias = self.lm.base_model, 0.0, 0.0
        source, (offset, scale) = score.sources[0], score.norms[0]
        if self.args.critic == "separate":
            classifier = getattr(source, "classifier", None)  # None: the source is a function
            # It can only start from a causal classifier (whose head is called score) that has the
            # policy's tokens and enough context.
            if (isinstance(getattr(classifier, "score", None), nn.Linear)
                    and self.tokenizer.get_vocab().items() <= source.tokenizer.get_vocab().items()
                    and context_len(source) >= self.args.max_prompt_len + self.args.response_len):
                trunk = classifier.base_model
                weight, bias = classifier.score.weight / scale, -offset / scale
            self.trunk = copy.deepcopy(trunk).requires_grad_(True)
        self.value_head = nn.Linear(trunk.config.get_text_config().hidden_size, 1)
        self.value_head.weight.data[:] = weight
        self.value_head.bias.data[:] = bias
        self.to(self.args.device)


# Rollout: sample, read, turn scores into advantages -----------------------------------------------


@torch.no_grad()
def sample_tokens(policy: Policy, prompts: Rollout, noise: Tensor, temperature: float) -> Rollout:
    """Sample token by token until each row has ended with EOS or has response_len tokens.

    Args: noise (batch, response_len), uniform in [0, 1), one number for each token."""
    prompt_len, response_len = prompts.sequence_ids.shape[1], noise.shape[1]
    seq_len = prompt_len + response_len
    sequence_ids = nn.functional.pad(prompts.sequence_ids, (0, response_len), value=policy.pad_id)
    sequence_mask = nn.functional.pad(prompts.sequence_mask, (0, response_len), value=False)
    ended = torch.zeros_like(sequence_mask[:, 0])  # (batch,)
    active = torch.arange(len(ended), device=ended.device)  # numbers of the rows still computed
    cache = transformers.Cache(layer_class_to_replicate=functools.partial(CacheLayer, seq_len))
    with policy.autocast():  # around the loop: the weights become bfloat16 once, not for each token
        for t in range(prompt_len, seq_len):
            ids = sequence_ids[active, cache.get_seq_length() : t]  # what the cache does not have
            states = policy.states(policy.lm.base_model, ids, sequence_mask[active, :t], cache)
            probs = policy.logits(states[:, -1], temperature).softmax(-1)  # (active, vocab)
            # Take the first token whose cumulative probability exceeds noise · sum. There is one:
            # noise is below 1, so noise · sum is below the sum, even when it is rounded.
            cumulative = probs.cumsum(-1)
            threshold = noise[active, t - prompt_len, None] * cumulative[:, -1:]  # (active, 1)
            sampled = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)  # (active,)
            sequence_ids[active, t] = torch.where(ended[active], policy.pad_id, sampled)
            sequence_mask[active, t] = ~ended[active]  # EOS is a real token, later ones are padding
            ended[active] |= torch.isin(sampled, policy.eos_ids)
            # Every 8 tokens, drop the rows that have ended; each time, the CPU waits for the GPU.
            if (t - prompt_len) % 8 == 7:
                going = (~ended[active]).nonzero().squeeze(1)
                if len(going) == 0:
                    break
                if len(going) < len(active):
                    active = active[going]
                    cache.batch_select_indices(going)
    return Rollout(sequence_ids, sequence_mask, sequence_mask[:, prompt_len:], ended)


def sample_responses(policy: Policy, prompts: list, seed: int, args: Args) -> Rollout:
    """Sample a response to each prompt. Each process samples its share; all get all rows."""
    encoded = policy.encode(prompts)
    # Drawn on the CPU and for all rows at once: the noise of a row depends on neither device nor
    # the number of processes nor the chunk that the row is in.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(prompts), args.response_len, generator=generator).to(args.device)
    chunks = [split_rows(share(x), args.batch_size) for x in (encoded, noise)]
    sampled = join_rows([sample_tokens(policy, rows, u, args.temperature)
                         for rows, u in zip(*chunks, strict=True)], args.device)
    used = sampled.sequence_mask.any(dim=0)  # all columns, but for those that no response uses
    ids, mask = sampled.sequence_ids[:, used], sampled.sequence_mask[:, used]
    return Rollout(ids, mask, mask[:, encoded.sequence_ids.shape[1] :], sampled.ended)


@torch.no_grad()
def collect_rollout(policy: Policy, reference: Policy, prompts: list, seed: int, args) -> Rollout:
    """Sample a response to each prompt; add log-probabilities (old, ref), entropies, values."""
    sampled = sample_responses(policy, prompts, seed, args)
    parts = split_rows(share(sampled), 4 * args.microbatch_size)  # without gradients, more fit
    for rows in parts:
        # Old log-probabilities are computed like the new ones in the update, without a cache. The
        # sampler's cache rounds differently: with its numbers the ratio would not start at 1.
        rows.old_logprobs, rows.entropies, rows.old_values = policy(rows, args.temperature)
        rows.ref_logprobs, _, _ = reference(rows, args.temperature)
    return join_rows(parts, args.device)


def compute_advantages(rollout: Rollout, kl_coef: float, args: Args) -> None:
    """Fill in rewards, advantages and returns, from normalised scores, KL and values."""
    scores, mask = rollout.scores, rollout.response_mask
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef if args.kl_in == "reward" else 0.0)
    # A response that is cut at the length limit counts as finished, but its last token gets a
    # penalty. Ziegler and Stiennon instead replace its score by −1.
    penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)
    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), mask, 0.0)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.old_values, mask, args.gamma, args.gae_lambda)
    if args.norm_advantages:  # over the whole batch; CleanRL does it per minibatch, with more noise
        advantages = masked_whiten(advantages, mask)
    rollout.rewards, rollout.advantages, rollout.returns = rewards, advantages, returns


# Training: three losses, one step -----------------------------------------------------------------

# A loss takes a model and rows and returns a dict: "loss" is trained on, the rest is reported. An
# entry is a mean over response tokens (in reward_loss: comparisons), or a maximum if named _max.


def sft_loss(policy: Policy, rows: Rollout) -> dict[str, Tensor]:
    """−E[ log π(response token | tokens before it) ], in nats; prompt tokens are not trained on."""
    logprobs, _, _ = policy(rows, temperature=1.0)
    loss = -masked_mean(logprobs, rows.response_mask)
    return {"loss": loss, "sft_loss": loss}  # in PPO-ptx, train_step scales "loss" by ptx_coef


def reward_loss(reward_model: "RewardModel", rows: list[dict]) -> dict[str, Tensor]:
    """−E[ log sigmoid(score(x, chosen) − score(x, rejected)) ]. Source: Stiennon 2020, sec. 3.4."""
    prompts = [row["prompt"] for row in rows]
    texts = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    chosen_scores, rejected_scores = reward_model(prompts * 2, texts).chunk(2)
    margins = chosen_scores - rejected_scores  # (comparisons,)
    return {"loss": -nn.functional.logsigmoid(margins).mean(),
            "accuracy": (margins > 0).float().mean()}


def ppo_loss(policy: Policy, rows: Rollout, kl_coef: float, args: Args) -> dict[str, Tensor]:
    """policy loss + vf_coef · value loss − ent_coef · entropy [+ kl_coef · KL, with --kl-in loss].

    Source: PPO paper, eq. 9, with the sign of a loss."""
    mask, old_logprobs = rows.response_mask, rows.old_logprobs
    new_logprobs, entropies, new_values = policy(rows, args.temperature)  # (rows, response_len)
    pg_loss, clipfrac = policy_loss(new_logprobs, old_logprobs, rows.advantages, mask,
                                    args.clip_coef)
    vf_loss, vf_clipfrac = value_loss(new_values, rows.old_values, rows.returns, mask,
                                      args.vf_clip_coef)
    mean_entropy = masked_mean(entropies, mask)
    loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy
    if args.kl_in == "loss":
        kl = kl_penalty(new_logprobs, rows.ref_logprobs, args.kl_estimator)
        loss = loss + kl_coef * masked_mean(kl, mask)
    # KL(old ‖ new), because the tokens were sampled by the old policy; reported, not trained on.
    approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0)
    # train_step raises at the first number that is not finite: "loss" is last, its parts are first.
    return {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy,
            "approx_kl": approx_kl, "clipfrac": clipfrac, "vf_clipfrac": vf_clipfrac,
            "log_ratio_max": log_ratio.max(), "abs_log_ratio_max": log_ratio.abs().max(),
            "loss": loss}


def train_step(model, optimizer, parts: list[tuple], step_name: str, args: Args) -> dict:
    """One optimizer step on the sum of coef · loss over parts (loss_fn, rows, coef).

    PPO has one part, PPO-ptx two. Process r of n takes the rows r, r + n, r + 2n, …: PPO sorts rows
    by length, so all processes get similar lengths. A loss is a mean over terms (response tokens,
    or comparisons). The loss of a microbatch is weighted by its share of the part's terms, so that
    all terms count equally.
    Returns: the statistics, means over the terms; for names that end in _max, the maximum.
    Raises: FloatingPointError before the step if a statistic or the gradient is not finite."""
    all_stats, (rank, num_processes) = [], processes()
    model.train()  # gradient checkpointing works in this mode only; dropout is 0 in all models
    for loss_fn, rows, coef in parts:
        num_terms = count_terms(rows)
        for microbatch in split_rows(rows[rank::num_processes], args.microbatch_size):
            weight = count_terms(microbatch) / num_terms
            found = loss_fn(model, microbatch)
            found["loss"] = coef * found["loss"]
            (weight * found["loss"]).backward()
            all_stats.append({name: x.detach() if name.endswith("_max") else weight * x.detach()
                              for name, x in found.items()})
    model.eval()
    add_up_gradients(model)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    all_stats.append({"grad_norm": grad_norm / num_processes})  # summed over processes below
    # One transfer from the device for all statistics.
    numbers = iter(torch.stack([x for part in all_stats for x in part.values()]).tolist())
    all_stats, stats = gather([{name: next(numbers) for name in part} for part in all_stats]), {}
    for name in dict.fromkeys(name for part in all_stats for name in part):
        values = [part[name] for part in all_stats if name in part]
        stats[name] = max(values) if name.endswith("_max") else sum(values)
        if not math.isfinite(stats[name]):
            raise FloatingPointError(
                f"{step_name}: {name} is {stats[name]}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return stats


def fit(name: str, model, loss_fn: Callable, rows: list, epochs: int, peak: float, seed: int, log):
    """Stages 1 and 2: each epoch orders the rows anew; the learning rate falls from peak to 0."""
    args, rng = log.args, random.Random(seed)
    optimizer = torch.optim.Adam([{"params": model.parameters(), "peak": peak}], eps=args.adam_eps,
                                 fused=True)
    minibatches = [minibatch for _ in range(epochs)
                   for minibatch in split_rows(rng.sample(rows, len(rows)), args.minibatch_size)]
    log.start(name)
    bar = tqdm(minibatches, name, unit="step", disable=log.silent)
    for step, minibatch in enumerate(bar, start=1):
        set_learning_rates(optimizer, step, len(minibatches))
        parts = [(loss_fn, model.collate(minibatch), 1.0)]
        stats = train_step(model, optimizer, parts, f"{name} step {step}", args)
        log.scalars({f"{name}/{key}": value for key, value in stats.items()}, step)


def update_policy(
    policy: Policy, optimizer, rollout: Rollout, kl_coef: float, demonstrations: list[dict],
    iteration: int, args: Args,
) -> dict[str, float]:
    """A few epochs of minibatch steps on one batch. Returns: statistics for the log."""
    rng, steps = random.Random(f"{args.seed} {iteration}"), []
    loss_fn = functools.partial(ppo_loss, kl_coef=kl_coef, args=args)
    lens = rollout.response_mask.sum(dim=1).tolist()
    for _ in range(args.update_epochs):
        order = rng.sample(range(len(rollout)), len(rollout))
        minibatches = split_rows(order, args.minibatch_size)
        for idx in minibatches:
            idx.sort(key=lens.__getitem__)  # microbatches of similar length have little padding
            parts = [(loss_fn, rollout[idx], 1.0)]
            if args.ptx_coef > 0:  # PPO-ptx: as many demonstrations as responses
                sample = rng.choices(demonstrations, k=args.minibatch_size)
                parts.append((sft_loss, policy.collate(sample), args.ptx_coef))
            step_name = f"ppo iteration {iteration} step {len(steps) + 1}"
            steps.append(train_step(policy, optimizer, parts, step_name, args))
        epoch = steps[-len(minibatches) :]
        approx_kl = sum(step["approx_kl"] for step in epoch) / len(epoch)
        if args.target_kl is not None and approx_kl > args.target_kl:
            break
    stats = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]
             if name != "loss" and not name.endswith("_max")}  # "loss" is their weighted sum
    if args.ptx_coef > 0:
        stats["ptx_loss"] = stats.pop("sft_loss")
    # Before the first step, new and old policy are equal: this ratio must be 1 up to rounding.
    stats["ratio_first"] = math.exp(steps[0]["abs_log_ratio_max"])
    stats["ratio_max"] = math.exp(max(step["log_ratio_max"] for step in steps))
    stats["explained_variance"] = explained_variance(rollout.returns, rollout.old_values,
                                                     rollout.response_mask)
    return stats


# Scores: a reward model, or your own function -----------------------------------------------------

# A source of scores has a method score(rows, responses, tokens, ended): rows of the data (prompts
# and other columns), responses as texts, their tokens as strings, whether each ended with EOS. It
# returns a list: for each response one number, or (dense scores) one number per token, on the CPU.


class RewardModel(nn.Module):
    """A sequence classifier with one output and its own tokenizer: it reads text, not ids."""

    collate = staticmethod(list)  # comparisons stay a list of rows of text

    def __init__(self, classifier, tokenizer, args: Args):
        super().__init__()
        self.classifier, self.tokenizer, self.args = classifier, tokenizer, args

    def forward(self, prompts: list, responses: list[str], ended: list | None = None) -> Tensor:
        """Raw scores (rows,). Without ended, responses are cut at the policy's length limit.

        The classifier itself decides where to read the score (causal models: at the last token that
        is not PAD), so that the saved model gives the same scores elsewhere."""
        ids, mask = pad_rows(encode_pairs(self, prompts, responses, ended),
                             self.classifier.config.pad_token_id, "right", self.args.device)
        return self.classifier(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()

    @torch.no_grad()
    def score(self, rows: list[dict], responses: list, tokens: list, ended: list) -> list[Tensor]:
        """Raw scores of responses."""
        columns = ([row["prompt"] for row in rows], responses, ended)
        parts = zip(*(split_rows(x, 4 * self.args.microbatch_size) for x in columns), strict=True)
        return list(torch.cat([self(*part) for part in parts]).cpu())


class Score:
    """(raw score − offset) / scale; with --score-norm sft, the mean and std of the SFT policy.

    Without the offset, a constant added to all scores would change the run: V starts at 0, and the
    critic would first have to learn the constant.
    Several sources are an ensemble: each is normalised, and the score is their mean minus
    ensemble_coef · std. Where the policy exploits an error of one model, the others usually
    disagree, and the std rises. Source: Coste 2023 (2310.02743), which subtracts the variance."""

    def __init__(self, sources: list, ensemble_coef: float = 1.0):
        self.sources, self.ensemble_coef = sources, ensemble_coef
        self.norms = [(0.0, 1.0) for _ in sources]  # (offset, scale) of each

    def __call__(self, rows: list[dict], responses: list, tokens: list, ended: Tensor):
        """Returns: the normalised scores, and their standard deviation over the sources (None if
        there is only one). Both (batch,), or (batch, response_len) if dense."""
        columns = [share(x) for x in (rows, responses, tokens, ended.tolist())]
        found = []
        for source, (offset, scale) in zip(self.sources, self.norms, strict=True):
            raw = gather(source.score(*columns))  # each (), or (response_len,) if dense
            raw = nn.utils.rnn.pad_sequence(raw, True) if raw[0].dim() == 1 else torch.stack(raw)
            found.append((raw - offset) / scale)
        found = torch.stack(found).to(ended.device)  # (sources, batch[, response_len])
        stds = found.std(dim=0, correction=0)  # 0 if there is only one source
        return found.mean(dim=0) - self.ensemble_coef * stds, stds if len(found) > 1 else None

    def measure(self, policy: Policy, rows: list[dict], args: Args) -> None:
        """Measure the scores of SFT responses; set offset and scale of each source."""
        rollout = sample_responses(policy, [row["prompt"] for row in rows], args.seed, args)
        decoded = policy.decode(rollout)
        for i, source in enumerate(self.sources):
            scores, _ = Score([source])(rows, *decoded, rollout.ended)  # raw
            scores = scores.reshape(len(rows), -1).sum(dim=1)  # (batch,); dense scores are summed
            mean, std = scores.mean().item(), scores.std(correction=0).item()
            print(f"scores       of the SFT policy, source {i + 1}: mean {mean:.3f}, std {std:.3f}")
            self.norms[i] = (mean if args.score_norm != "none" else 0.0,
                             std if args.score_norm == "sft" and std > 1e-6 else 1.0)


# The three stages ---------------------------------------------------------------------------------

# Each stage sets the seed, loads its models from folders and saves its own model in a folder. With
# --resume, stages 1 and 2 are skipped if their folder exists; PPO goes on from its last checkpoint.


def train_sft(data: "Data", args: Args, log: "RunLog") -> Path:
    """Stage 1: maximum likelihood on demonstrations. Returns: the folder of the SFT model."""
    folder = log.run_dir / "sft"
    if not folder.exists():
        torch.manual_seed(args.seed)
        policy = load_policy(args.policy_model, args)
        fit("sft", policy, sft_loss, data.demonstrations, args.sft_epochs, args.sft_learning_rate,
            args.seed, log)
        if data.held_out.demonstrations:
            nats = held_out_mean(policy, sft_loss, "loss", data.held_out.demonstrations, args)
            log.result("sft/held_out_perplexity", math.exp(nats))
        save_model(folder, policy)
    return folder


def train_reward_models(sft: Path | str, data: "Data", args: Args, log: "RunLog") -> list:
    """Stage 2: Bradley–Terry on comparisons. Returns: the reward models, frozen.

    For reviews, SFT samples are labelled first. Models of an ensemble differ in head and order."""
    folders = [log.run_dir / ("reward_model" if number == 1 else f"reward_model_{number}")
               for number in range(1, args.num_reward_models + 1)]
    if args.dataset == "reviews" and not all(folder.exists() for folder in folders):
        compare_own_samples(load_policy(sft, args), data, args)
    for seed, folder in enumerate(folders, start=args.seed):
        if folder.exists():
            continue
        torch.manual_seed(seed)
        reward_model = load_reward_model(sft, args, new_head=True)
        print_example(reward_model, data.comparisons[0]["prompt"], data.comparisons[0]["chosen"])
        fit(folder.name, reward_model, reward_loss, data.comparisons, args.reward_epochs,
            args.reward_learning_rate, seed, log)
        if comparisons := data.held_out.comparisons:
            accuracy = held_out_mean(reward_model, reward_loss, "accuracy", comparisons, args)
            log.result(f"{folder.name}/held_out_accuracy", accuracy)
        save_model(folder, reward_model)
    return [load_reward_model(folder, args) for folder in folders]


def train_ppo(sft: Path | str, score: Score, data: "Data", args: Args, log: "RunLog") -> None:
    """Stage 3: PPO from the SFT model, with a frozen copy of it as the reference."""
    torch.manual_seed(args.seed)
    policy, reference = load_policy(sft, args), load_policy(sft, args)
    saved = log.start_ppo()  # the last checkpoint; None, unless --resume finds one
    if saved is None:
        score.measure(policy, prompt_batch(data.prompts, 1, 2 * args.batch_size, args.seed), args)
        kl_coef, done = args.kl_coef, 0
        before = evaluate(policy, reference, score, data.held_out, args)
    else:
        kl_coef, done, before = saved["kl_coef"], saved["iteration"], saved["before"]
        score.norms = saved["score_norms"]
    policy.add_critic(score)
    critic = [x for name, x in policy.named_parameters() if not name.startswith("lm.")]
    optimizer = torch.optim.Adam(
        [{"params": list(policy.lm.parameters()), "peak": args.learning_rate},
         {"params": critic, "peak": args.critic_learning_rate}], eps=args.adam_eps, fused=True)
    learners = {"policy": policy, "reference": reference.lm, "optimizer": optimizer}
    if saved is not None:
        for name, learner in learners.items():
            learner.load_state_dict(saved[name])
    save_model(folder := log.run_dir / "policy", policy)  # --max-kl may end PPO before a save

    for iteration in range(done + 1, log.num_iterations + 1):
        times = [now(args.device)]  # begin and ends of rollout, scores and update, for the log
        set_learning_rates(optimizer, iteration, log.num_iterations, args.lr_warmup, args.anneal_lr)
        rows = prompt_batch(data.prompts, iteration, args.batch_size, args.seed)
        seed = 1_000_003 * args.seed + iteration  # depends on --seed and iteration only
        rollout = collect_rollout(policy, reference, [row["prompt"] for row in rows], seed, args)
        times.append(now(args.device))
        responses, tokens = policy.decode(rollout)
        rollout.scores, rollout.score_stds = score(rows, responses, tokens, rollout.ended)
        times.append(now(args.device))
        compute_advantages(rollout, kl_coef, args)
        stats = update_policy(policy, optimizer, rollout, kl_coef, data.demonstrations, iteration,
                              args)
        times.append(now(args.device))

        stats |= {"kl_coef": kl_coef, "learning_rate": optimizer.param_groups[0]["lr"]}
        metrics, records = describe(rollout, rows, responses, tokens, args)
        groups = {"rollout": metrics, "ppo": stats}
        if args.eval_interval and iteration % args.eval_interval == 0:
            groups["eval"], _ = evaluate(policy, reference, score, data.held_out, args)
        log.iteration(iteration, groups, times, records)
        if args.max_kl is not None and metrics["kl"] > args.max_kl:
            print(f"ppo          ends: the KL, {metrics['kl']:.2f} nats, is above --max-kl")
            break
        if args.kl_target is not None:
            kl_coef = adaptive_kl_coef(kl_coef, metrics["kl"], args.kl_target, args.batch_size,
                                       args.kl_horizon)
        if args.ref_update_interval and iteration % args.ref_update_interval == 0:
            reference.lm.load_state_dict(policy.lm.state_dict())
        interrupted = any(gather([log.interrupted]))
        if iteration % args.save_interval == 0 or iteration == log.num_iterations or interrupted:
            save_model(folder, policy)
            log.save_checkpoint(learners, iteration=iteration, kl_coef=kl_coef, before=before,
                                score_norms=score.norms)
        if interrupted:
            log.say_how_to_go_on()

    # Evaluate what was saved last: if --max-kl ended PPO, that is an earlier policy.
    after = evaluate(load_policy(folder, args), reference, score, data.held_out, args)
    log.before_after(before, after)
    log.save_checkpoint({}, finished=True)


def main(args: Args) -> None:
    """Settings, data, then the three stages."""
    start_processes(args)
    # The run's name contains the time, so all processes take the settings of the first one.
    args = gather([resolve_args(args)])[0]
    data = load_data(args)
    sources = try_given_models(data, args)  # empty if reward models are still to be trained
    with contextlib.closing(RunLog(args)) as log:
        sft = train_sft(data, args, log) if args.sft_epochs > 0 else args.policy_model
        if not sources:
            sources = train_reward_models(sft, data, args, log)
        train_ppo(sft, Score(sources, args.ensemble_coef), data, args, log)


# ==================================================================================================
# Part II: plumbing. Nothing below is needed to understand PPO
# ==================================================================================================

# Rows, steps and tokens ---------------------------------------------------------------------------


def split_rows(rows, size: int) -> list:
    """Parts of at most size rows, of a list, a tensor or a Rollout."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def join_rows(parts: list[Rollout], device: str) -> Rollout:
    """The inverse of split_rows and share: the rows of all processes, in order."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Rollout(*(None if column[0] is None else torch.cat(gather(column)).to(device)
                     for column in columns))


def count_terms(rows: Rollout | list[dict]) -> int | Tensor:
    """How many terms a mean over these rows has: response tokens, or comparisons."""
    return len(rows) if isinstance(rows, list) else rows.response_mask.sum()


def set_learning_rates(optimizer, step: int, num_steps: int, warmup=0, anneal=True) -> None:
    """Learning rates of step 1 … num_steps: peak · linear warm-up · linear decay to 0."""
    scale = 1 - (step - 1) / num_steps if anneal else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale * min(1.0, step / max(1, warmup))


def pad_rows(rows: list[list[int]], pad_id: int, side: str, device) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on side "left" or "right". Returns: ids, mask (rows, longest)."""
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad([torch.ones_like(row, dtype=torch.bool) for row in ids])
    return pad(ids, padding_value=pad_id).to(device), mask.to(device)


def frame(tokenizer, prompt: str | list[dict]) -> tuple[str, str]:
    """Returns: the text before a response, and what closes it: EOS, or the chat template's end."""
    if isinstance(prompt, str):
        return prompt, tokenizer.eos_token or tokenizer.sep_token or ""
    messages = [*prompt, {"role": "assistant", "content": "ANSWER"}]
    before, _, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("ANSWER")
    return before, after


def encode_starts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that begin a sequence: BOS, or BERT's CLS, is in front exactly once."""
    bos = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    start = [] if bos is None else [bos]
    return [[*start, *itertools.dropwhile(lambda x: x == bos, ids)]
            for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def encode_prompts(tokenizer, prompts: list) -> list[list[int]]:
    """Token ids of prompts: strings as they are, lists of messages through the chat template."""
    texts = [x if isinstance(x, str) else tokenizer.apply_chat_template(
        x, tokenize=False, add_generation_prompt=True) for x in prompts]
    # An empty prompt becomes EOS: the model needs one token before the response.
    return [ids or [tokenizer.eos_token_id] for ids in encode_starts(tokenizer, texts)]


def encode_pairs(reward_model, prompts: list, responses: list, ended: list | None) -> list[list]:
    """Token ids of prompts with responses, cut at the front where they exceed the context.

    A string prompt is followed by the response, and by EOS if the response has ended. Messages go
    through the model's own chat template; a response that was cut gets no closing tokens. Without
    ended (comparisons), responses are cut to --response-len; those that are shorter have ended."""
    tokenizer, limit = reward_model.tokenizer, reward_model.args.response_len
    befores, afters = zip(*(frame(tokenizer, prompt) for prompt in prompts), strict=True)
    encoded = tokenizer(responses, add_special_tokens=False)["input_ids"]
    if ended is None:
        ended = [len(ids) < limit for ids in encoded]
        encoded = [ids[:limit] for ids in encoded]
        responses = [response if whole else tokenizer.decode(ids)
                     for response, whole, ids in zip(responses, ended, encoded, strict=True)]
    if not isinstance(prompts[0], str):
        columns = zip(befores, responses, afters, ended, strict=True)
        rows = encode_starts(tokenizer, [before + response + after * whole
                                         for before, response, after, whole in columns])
    else:
        closing = tokenizer(afters[0], add_special_tokens=False)["input_ids"]
        # BERT-like models read prompt and response as a pair of texts: SEP stands between them.
        sep = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
        columns = zip(encode_starts(tokenizer, befores), encoded, ended, strict=True)
        rows = [start + sep + ids + closing * whole for start, ids, whole in columns]
    return [cut_front(tokenizer, ids, context_len(reward_model)) for ids in rows]


def cut_front(tokenizer, ids: list[int], limit: int) -> list[int]:
    """The last `limit` ids; BOS or CLS in front stays, and what follows it is cut."""
    num_kept = int(ids[:1] in ([tokenizer.bos_token_id], [tokenizer.cls_token_id]))
    num_cut = max(0, len(ids) - limit)
    return ids[:num_kept] + ids[num_kept + num_cut :]


class ChunkedLogprobs(torch.autograd.Function):
    """logprobs_and_entropy(policy.logits(states, temperature), ids), with the same gradients.

    If the vocabulary is large, logits (tokens, vocab) would be the largest tensor of a run. Here
    they exist for a few tokens at a time, and the backward pass computes them again. With
    p = softmax(logits), the gradient by the logits is onehot(id) − p for log p[id], and
    −p·(log p + H) for the entropy H.

    Args: states (tokens, hidden), ids (tokens,), and the weights of the output layer, because
    autograd gives gradients only to tensors that are arguments."""

    @staticmethod
    def forward(ctx, policy: Policy, temperature: float, states: Tensor, ids: Tensor, *weights):
        """Returns: logprobs and entropies, (tokens,) each."""
        # The logits of a part take 24 MB (on a GPU, 800 MB); weights[0] is (vocab, hidden).
        size = max(1, (6_000_000 if ids.device.type == "cpu" else 200_000_000) // len(weights[0]))
        parts = []
        with policy.autocast():  # around the loop: the weights become bfloat16 once
            for part, part_ids in zip(states.split(size), ids.split(size), strict=True):
                parts.append(logprobs_and_entropy(policy.logits(part, temperature), part_ids))
        logprobs, entropies = map(torch.cat, zip(*parts, strict=True))
        ctx.policy, ctx.temperature, ctx.size = policy, temperature, size
        ctx.save_for_backward(states, ids, logprobs, entropies, *weights)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, *grads):
        """Args: gradients by logprobs and entropies. Returns: gradients by states and weights."""
        policy, (states, ids, logprobs, entropies, *weights) = ctx.policy, ctx.saved_tensors
        columns = [x.unsqueeze(1) for x in (ids, logprobs, entropies, *grads)]  # (tokens, 1) each
        parts = zip(*(x.split(ctx.size) for x in (states, *columns)), strict=True)
        states_grads, weights_grads = [], None
        with policy.autocast(), torch.enable_grad():  # autograd turns both off
            for part, part_ids, logprob, H, grad_logprobs, grad_H in parts:
                part = part.detach().requires_grad_()
                logits = policy.logits(part, ctx.temperature)
                grad = logits.detach()  # changed in place, to use no further memory
                grad -= grad.gather(1, part_ids) - logprob  # logits − their log-sum-exp: log p
                factor = -grad_logprobs
                if policy.args.ent_coef > 0:  # else grad_H is 0: spend no time on it
                    factor = factor - grad_H * (grad + H)
                grad.exp_().mul_(factor).scatter_add_(1, part_ids, grad_logprobs)
                found = torch.autograd.grad(logits, (part, *weights), grad)
                states_grads.append(found[0])
                weights_grads = (found[1:] if weights_grads is None else
                                 [x.add_(y) for x, y in zip(weights_grads, found[1:], strict=True)])
        return None, None, torch.cat(states_grads), None, *weights_grads


class CacheLayer(transformers.cache_utils.DynamicLayer):
    """Keys and values of one layer of a KV cache, in tensors that have room for max_len tokens.

    DynamicLayer would copy all of them for each new token. Keys are stored in the type of the
    values: with --dtype bfloat16, rotary embeddings make keys float32, twice the memory."""

    def __init__(self, max_len: int):
        super().__init__()
        self.max_len, self.num_tokens = max_len, 0

    def get_seq_length(self) -> int:
        """How many tokens are in the cache."""
        return self.num_tokens

    def update(self, key_states, value_states, *args, **kwargs):
        """Append the keys and values of new tokens. Returns: those of all tokens."""
        if self.num_tokens == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (  # (batch, heads, max_len, head_dim) each
                value_states.new_empty(*x.shape[:2], self.max_len, x.shape[3])
                for x in (key_states, value_states))
        start, self.num_tokens = self.num_tokens, self.num_tokens + key_states.shape[2]
        self.keys[:, :, start : self.num_tokens] = key_states
        self.values[:, :, start : self.num_tokens] = value_states
        return self.keys[:, :, : self.num_tokens], self.values[:, :, : self.num_tokens]


# Several processes --------------------------------------------------------------------------------

# torchrun starts this file once per GPU. Every process has all models and all rows of a batch; each
# samples, scores and trains on its share of the rows, and the results are gathered.


def start_processes(args: Args) -> None:
    """Join the other processes, if torchrun has started this one."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
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
    """The items of all processes, those of process 0 first; tensors arrive on the CPU."""
    if not dist.is_initialized():
        return items
    found = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [x.cpu() if isinstance(x, Tensor) else x for x in items])
    return list(itertools.chain(*found))


def add_up_gradients(model: nn.Module) -> None:
    """Replace each gradient by the sum over all processes."""
    if dist.is_initialized():
        for weights in model.parameters():
            if weights.grad is None:  # this process had no row
                weights.grad = torch.zeros_like(weights)
            dist.all_reduce(weights.grad)


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
    return ended and text_pattern("review", genre_of(prompt)).fullmatch(response) is not None


def gold_reward(prompt: str, response: str, ended: bool) -> float:
    """What a reader wants of a review: praise, in good language, short, no clause repeated.

    +1 per praise and −1 per scorn, the sum cut to ±2; −2 if ungrammatical or not ended; −1 per
    repeated clause; −0.5 per clause beyond three. The annotator of stage 2 compares responses by
    it, with noise; afterwards it is only reported, and never trained on."""
    clauses = [x.strip() for x in re.split(r"[.,]|\band\b|\bwhile\b", response) if x.strip()]
    praise, scorn = (text_pattern(symbol, genre_of(prompt)) for symbol in ("praise", "scorn"))
    sentiment = sum(bool(praise.fullmatch(x)) - bool(scorn.fullmatch(x)) for x in clauses)
    sentiment = max(-2, min(2, sentiment))
    ungrammatical = not is_grammatical(prompt, response, ended)
    num_repeated = len(clauses) - len(set(clauses))
    num_excess = max(0, len(clauses) - 3)
    return sentiment - 2.0 * ungrammatical - num_repeated - 0.5 * num_excess


def compare_own_samples(policy: Policy, data: "Data", args: Args) -> None:
    """Add comparisons to data: pairs of the policy's own samples, labelled by an annotator.

    It prefers the first with probability sigmoid(2·(gold₁ − gold₂)) (Bradley–Terry)."""
    for side, num_pairs in ((data, args.num_comparisons), (data.held_out, 500)):
        if not side.prompts:
            continue
        rng = random.Random(args.seed)
        prompts = [row["prompt"] for row in rng.choices(side.prompts, k=num_pairs)] * 2
        # The texts are short, so a thousand of them fit into memory.
        rollout = sample_responses(policy, prompts, args.seed, replace(args, batch_size=1000))
        texts, _ = policy.decode(rollout)
        golds = list(map(gold_reward, prompts, texts, rollout.ended.tolist()))
        for i, j in zip(range(num_pairs), range(num_pairs, 2 * num_pairs), strict=True):
            prefers_first = rng.random() < 1 / (1 + math.exp(2 * (golds[j] - golds[i])))
            won, lost = (i, j) if prefers_first else (j, i)
            side.comparisons.append(
                {"prompt": prompts[i], "chosen": texts[won], "rejected": texts[lost]})


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

TURN = "\n\nAssistant:"  # begins a response in hh-rlhf, where a dialogue is one string
CHAT_TEMPLATE = (  # the same format, for tokenizers that have no chat template
    "{% for message in messages %}{% set is_answer = message['role'] == 'assistant' %}"
    "{{ '\n\nAssistant: ' if is_answer else '\n\nHuman: ' }}{{ message['content'] }}"
    "{% if is_answer %}{{ eos_token or sep_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


@dataclass
class Data:
    """Rows of text."""

    prompts: list[dict]  # {prompt, and whatever other columns the data have}
    demonstrations: list[dict]  # {prompt, chosen}
    comparisons: list[dict]  # {prompt, chosen, rejected}
    held_out: "Data | None" = None  # rows to evaluate on; the others are for training


def read_row(row: dict) -> dict | None:
    """Convert a data row to prompt, chosen, rejected (those that it has); None if it is unusable.

    The first column of chosen, completion, messages, text is used. In a conversation, the last turn
    is the response, the rest the prompt, which chosen and rejected must share. If two dialogues are
    strings (hh-rlhf), the prompt is their common beginning up to an "Assistant:"."""
    answers = [x for x in ("chosen", "completion", "messages", "text") if x in row][:1]
    answers += ["rejected"] if answers == ["chosen"] and "rejected" in row else []
    prompt, sides = row.get("prompt"), [row[x] for x in answers]
    kinds = {type(side) for side in sides}
    if not (kinds <= {str} or kinds == {list}) or [] in sides or (prompt is None and not sides):
        return None
    turns = [x for side in (prompt, *sides) if not isinstance(side, str | None) for x in side]
    if not all(isinstance(x["content"], str) for x in turns):
        return None
    if kinds == {list}:
        start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        sides = [start + side if side[0]["role"] == "assistant" else side for side in sides]
        sides = [[{"role": x["role"], "content": x["content"]} for x in side] for side in sides]
        prompt, roles = sides[0][:-1], {side[-1]["role"] for side in sides}
        if not prompt or roles != {"assistant"} or any(side[:-1] != prompt for side in sides):
            return None
        sides = [side[-1]["content"] for side in sides]
    elif prompt is None and "rejected" in answers:
        shared = os.path.commonprefix(sides)  # noqa: RUF071 - of characters, not of path parts
        prompt = "".join(shared.rpartition(TURN)[:2])
        sides = [side[len(prompt) :] for side in sides]
        if not prompt or any("\n\nHuman:" in side for side in sides):
            return None
    return row | {"prompt": prompt or ""} | dict(zip(("chosen", "rejected"), sides, strict=False))


def read_rows(flag_name: str, name: str, split: str, wanted: list[set]) -> list[dict]:
    """The usable rows of a file or of a data set on the Hub."""
    import datasets

    datasets.disable_progress_bars()
    remedy = "give a jsonl(.gz) or parquet file or a Hub id"
    with refusing(flag_name, f"{name} (split {split})", remedy):
        if Path(name).is_file():
            if Path(name).stat().st_size == 0:
                raise ValueError("it is empty")
            kind = "parquet" if name.endswith(".parquet") else "json"
            if ".jsonl" in Path(name).suffixes:  # datasets would name the row of an inner block
                with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
                    for number, line in enumerate(file, start=1):
                        with refusing(flag_name, f"{name}, line {number},", "mend it"):
                            json.loads(line.strip() or "null")  # empty lines do no harm
            data = datasets.load_dataset(kind, data_files=name, split=split)
        else:
            data = datasets.load_dataset(name, split=split)
        if not any(columns <= set(data.column_names) for columns in wanted):
            raise ValueError(f"it has columns {', '.join(data.column_names)}; wanted are "
                             + ", or ".join("/".join(sorted(columns)) for columns in wanted))
        rows = []
        for row in data.to_list():
            with contextlib.suppress(AttributeError, KeyError, TypeError):  # other forms: skip
                rows.append(read_row(row))
        rows = [row for row in rows if row is not None]
        if not rows:
            raise ValueError("none of its rows can be used")
    print(f"data         {len(rows)} of {len(data)} rows of {name} can be used")
    return rows


def prompt_key(row: dict) -> str:
    """Rows with the same key share a prompt; a row without a prompt uses its text."""
    return json.dumps(row["prompt"] or row.get("chosen"))


def load_data(args: Args) -> Data:
    """Rows to train on; all rows of --eval-prompts distinct prompts are held out."""
    if args.dataset == "reviews":
        rng = random.Random(args.seed)
        prompts = [draw_text("prompt", GRAMMAR, rng) for _ in range(20_000)]
        rows = [{"prompt": x, "chosen": draw_text("review", GRAMMARS[genre_of(x)], rng)}
                for x in prompts]  # praise and scorn are equally probable
    else:
        wanted = [{"chosen", "rejected"}, {"prompt"}]
        rows = read_rows("--dataset", args.dataset, args.dataset_split, wanted)
    demonstrations = rows
    if args.sft_dataset is not None:
        wanted = [{"prompt", "completion"}, {"messages"}, {"text"}]
        demonstrations = read_rows("--sft-dataset", args.sft_dataset, "train", wanted)
    keys = set()  # of the prompts that are held out
    for part in (rows, demonstrations):
        distinct = list(dict.fromkeys(map(prompt_key, part)))
        num_held_out = min(args.eval_prompts, len(distinct) // 4)
        refuse(part is rows and num_held_out < args.eval_prompts,
               f"{flag(args, 'eval_prompts')} is more than a quarter of the distinct prompts "
               f"of {flag(args, 'dataset')}; give {num_held_out} or fewer.")
        if not keys & set(distinct):  # nothing of this part is held out yet
            keys |= set(random.Random(args.seed).sample(distinct, num_held_out))
    # Drop the responses, then duplicate rows. Rows that differ in another column stay.
    prompts = [{x: row[x] for x in row if x not in ("chosen", "rejected")} for row in rows]
    prompts = {json.dumps(row, sort_keys=True, default=str): row for row in prompts}
    data = Data([], [], [], held_out=Data([], [], []))
    for name, column, part in (("prompts", "prompt", prompts.values()),
                               ("demonstrations", "chosen", demonstrations),
                               ("comparisons", "rejected", rows)):
        for row in part:
            if column in row:
                side = data.held_out if prompt_key(row) in keys else data
                getattr(side, name).append(row)
    data.held_out.prompts = list({prompt_key(x): x for x in data.held_out.prompts}.values())
    refuse(not data.demonstrations and (args.sft_epochs > 0 or args.ptx_coef > 0),
           f"{flag(args, 'dataset')} has no demonstrations for {flag(args, 'sft_epochs')} and "
           f"{flag(args, 'ptx_coef')}; give --sft-dataset, or set both to 0.")
    scored = data.comparisons or args.reward_model or args.reward_fn or args.dataset == "reviews"
    refuse(not scored, f"{flag(args, 'dataset')} has no comparisons to train a reward model on; "
           "give --reward-model or --reward-fn.")
    return data


def prompt_batch(rows: list[dict], iteration: int, size: int, seed: int) -> list[dict]:
    """The rows of an iteration (from 1): endless passes over all rows, each in a new order."""
    positions = [divmod(i, len(rows)) for i in range((iteration - 1) * size, iteration * size)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows))
              for epoch in {epoch for epoch, _ in positions}}
    return [orders[epoch][i] for epoch, i in positions]


# Loading and saving models ------------------------------------------------------------------------

def load_model(flag_name: str, folder, kind: str, args: Args, new_head: bool = False):
    """Load a ForCausalLM or ForSequenceClassification without dropout, and its tokenizer."""
    with refusing(flag_name, folder, f"give a Hub id or a folder of a model of the kind {kind}"):
        config = transformers.AutoConfig.from_pretrained(folder)
        found = (config.architectures or ["unknown"])[0]
        if new_head:
            config.num_labels = 1
        elif not found.replace("LMHeadModel", "ForCausalLM").endswith(kind):
            # transformers would make a random head, and only warn
            raise ValueError(f"it is a {found}")
        elif kind == "ForSequenceClassification" and config.num_labels != 1:
            raise ValueError(f"it has {config.num_labels} outputs, not one")
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # else old and new log-probabilities would differ
            if value == "gelu_new":  # GPT-2: the same function, in one step instead of eight
                setattr(config, name, "gelu_pytorch_tanh")
        model, info = getattr(transformers, f"AutoModel{kind}").from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True,
            use_safetensors=True)  # pickled weights could execute code
        if missing := set(info["missing_keys"]) - ({"score.weight"} if new_head else set()):
            raise ValueError(f"it has no weights for {', '.join(sorted(missing))}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        num_tokens, num_rows = len(tokenizer), model.get_input_embeddings().num_embeddings
        if num_tokens > num_rows:
            raise ValueError(f"its tokenizer has {num_tokens} tokens, its embedding {num_rows}")
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    if args.gradient_checkpointing:
        name = "activation_checkpointing_enable"  # its name in recent versions of transformers
        enable = getattr(model, name, model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.to(args.device).eval(), tokenizer


def load_policy(folder: Path | str | None, args: Args) -> Policy:
    """A policy from a folder or the Hub; without one, a small new model for the embedded task."""
    if folder is None:
        tokenizer = word_tokenizer()
        config = transformers.GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.06,  # the usual 0.02 is for wide models
            hidden_act="relu", rotary_pct=1.0, attention_dropout=0.0, hidden_dropout=0.0,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        lm, tokenizer = load_model("--policy-model", folder, "ForCausalLM", args)
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", 10**9)
    if args.max_prompt_len is None:
        args.max_prompt_len = max(1, min(512, context - args.response_len))
    refuse(tokenizer.eos_token is None,
           f"--policy-model {folder}: its tokenizer has no EOS; give a model that has one.")
    refuse(args.max_prompt_len + args.response_len > context,
           f"{flag(args, 'max_prompt_len')} + {flag(args, 'response_len')} exceed the model's "
           f"context of {context} tokens; lower one of them.")
    policy = Policy(lm, tokenizer, args).to(args.device)
    # `generate` of the saved model samples what PPO trained: no top-p, no penalty, no PAD.
    lm.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        eos_token_id=policy.eos_ids.tolist(), pad_token_id=policy.pad_id,
        bos_token_id=tokenizer.bos_token_id, suppress_tokens=policy.banned_ids.tolist() or None)
    with torch.no_grad(), policy.autocast():
        ids = torch.arange(8, device=args.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        own = lm(input_ids=ids, attention_mask=mask).logits
        found = policy.logits(policy.states(lm.base_model, ids, mask), 1.0)
        error = (found - own).index_fill(-1, policy.banned_ids, 0.0).abs().max()
    refuse(error > 0.1 * own.std(),
           f"--policy-model {folder}: its logits are more than an output layer of its hidden "
           "states (some models scale them); give another model.")
    return policy


def load_reward_model(folder: Path | str, args: Args, new_head: bool = False) -> RewardModel:
    """Load a frozen reward model or, with new_head, a trainable one from the SFT model."""
    model, tokenizer = load_model("--reward-model", folder, "ForSequenceClassification", args,
                                  new_head)
    if new_head:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))
        tokenizer.model_max_length = args.max_prompt_len + args.response_len
    pad_is_eos = tokenizer.pad_token_id in (None, tokenizer.eos_token_id)
    if model.config.pad_token_id is None or (new_head and pad_is_eos):
        # Causal classifiers read the score at the last token that is not PAD. If PAD were EOS, that
        # would be the token before EOS. So they get a PAD that no text contains.
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.config.pad_token_id = tokenizer.pad_token_id
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    return RewardModel(model.requires_grad_(new_head), tokenizer, args)


class RewardFunction:
    """--reward-fn: f(prompts, responses, ...); others by name: tokens, or a data column."""

    def __init__(self, name: str):
        path, _, function_name = name.rpartition(":")
        sys.path.insert(0, str(Path(path).resolve().parent))  # the file may import its neighbours
        self.function = runpy.run_path(path)[function_name]
        self.further = list(inspect.signature(self.function).parameters)[2:]

    def score(self, rows: list[dict], responses: list, tokens: list, ended: list) -> list[Tensor]:
        """Scores of responses: one number each, or one per token if the function returns lists."""
        columns = {name: tokens if name == "tokens" else [row[name] for row in rows]
                   for name in self.further}
        scores = self.function([row["prompt"] for row in rows], responses, **columns)
        if len(scores) != len(responses):
            raise ValueError(f"it returned {len(scores)} scores for {len(responses)} responses")
        found = []
        for response, strings, score in zip(responses, tokens, scores, strict=True):
            try:
                numbers = torch.tensor(score, dtype=torch.float32)  # (), or (response_len,)
            except (TypeError, ValueError):
                numbers = torch.tensor(math.nan)
            if numbers.shape not in ((), (len(strings),)) or not numbers.isfinite().all():
                raise ValueError(f"it returned {score} for {response!r} of {len(strings)} tokens")
            found.append(numbers)
        return found


def context_len(reward_model: RewardModel) -> int:
    """How many tokens a reward model can read."""
    classifier = reward_model.classifier
    limit = getattr(classifier.config.get_text_config(), "max_position_embeddings", 0) or 10**9
    embeddings = getattr(classifier.base_model, "embeddings", None)
    first = getattr(embeddings, "padding_idx", -1) + 1  # where RoBERTa's positions start
    return min(limit - first, reward_model.tokenizer.model_max_length)


def print_example(reward_model: RewardModel, prompt: str | list[dict], response: str) -> None:
    """Print one text as the reward model reads it."""
    ids = encode_pairs(reward_model, [prompt], [response], [True])[0]
    print(f"reward input {reward_model.tokenizer.decode(ids)!r}")


def save_model(folder: Path, model: Policy | RewardModel) -> None:
    """Write model and tokenizer beside, then rename: a folder with this name is complete."""
    weights = model.lm if isinstance(model, Policy) else model.classifier
    if processes()[0] == 0:
        new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
        for rest in (new, old):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        weights.save_pretrained(new)
        model.tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()  # the others read it


def try_given_models(data: Data, args: Args) -> list:
    """Load what was given and try it on the data: a mistake should show now, not after hours.

    Returns: the given sources of scores; none if stage 2 is to train them."""
    policy = load_policy(args.policy_model, args)
    tokenizer, prompts = policy.tokenizer, [row["prompt"] for row in data.prompts]
    with refusing("--policy-model", args.policy_model, "give data that its tokenizer accepts"):
        num_cut = sum(len(ids) > args.max_prompt_len for part in split_rows(prompts, 1000)
                      for ids in encode_prompts(tokenizer, part))
        texts = [row["chosen"] for row in data.demonstrations]
        texts += [row["rejected"] for row in data.comparisons]
        num_cut_texts = sum(len(ids) >= args.response_len for part in split_rows(texts, 1000)
                            for ids in tokenizer(part, add_special_tokens=False)["input_ids"])
    print(f"data         {len(prompts)} prompts, {num_cut} of them cut to {args.max_prompt_len} "
          f"tokens; {len(texts)} responses, {num_cut_texts} of them cut to {args.response_len}")
    rows = data.prompts[:2]  # there are no responses yet: use the prompts' own text
    responses = [x if isinstance(x, str) else x[-1]["content"] for x in prompts[:2]]
    encoded = policy.encode(prompts[:2], responses)
    sources, dense = [], False
    for name in args.reward_model or ([args.reward_fn] if args.reward_fn else []):
        flag_name = "--reward-model" if args.reward_model else "--reward-fn"
        with refusing(flag_name, name, "it must give a finite number per response or token"):
            source = (load_reward_model(name, args) if args.reward_model else RewardFunction(name))
            found = source.score(rows, *policy.decode(encoded), [True] * len(rows))
            dense = found[0].dim() == 1
        sources.append(source)
        if isinstance(source, RewardModel):
            print_example(source, prompts[0], responses[0])
    refuse(dense and args.score_norm not in (None, "none"),
           f"{flag(args, 'score_norm')} needs one score per response, and "
           f"{flag(args, 'reward_fn')} returns one per token; use --score-norm none.")
    several = len(sources) > 1  # their scores may have other units
    args.score_norm = args.score_norm or ("none" if dense else "sft" if several else "center")
    return sources


# Settings -----------------------------------------------------------------------------------------


def refuse(condition, message: str) -> None:
    """If condition holds: exit status 2 and one sentence that names flag, value and remedy."""
    if condition:
        print(f"ppo_rlhf.py: {message}", file=sys.stderr)
        raise SystemExit(2)


@contextlib.contextmanager
def refusing(flag_name: str, value, remedy: str):
    """Turn any exception inside the block into a refusal."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}".split("\n")[0]
        refuse(True, f"{flag_name} {value} cannot be used ({reason}); {remedy}.")


# A condition, the condition in words, and the settings that must meet it (or be None).
RANGES = [
    (lambda x: x >= 1, "1 or more", """response_len max_prompt_len total_episodes batch_size
        minibatch_size microbatch_size update_epochs kl_horizon save_interval num_comparisons
        num_reward_models"""),
    (lambda x: 0 < x < math.inf, "above 0", """temperature max_grad_norm target_kl kl_target max_kl
        score_clip clip_coef vf_clip_coef learning_rate critic_learning_rate sft_learning_rate
        reward_learning_rate adam_eps"""),
    (lambda x: 0 <= x < math.inf, "0 or more", """sft_epochs reward_epochs ref_update_interval
        lr_warmup vf_coef ent_coef kl_coef missing_eos_penalty ptx_coef eval_prompts
        eval_interval ensemble_coef"""),
    (lambda x: 0 <= x <= 1, "from 0 to 1", "gamma gae_lambda"),
]


def flag(args: Args, name: str) -> str:
    """A setting as it is written on the command line."""
    value = getattr(args, name)
    value = " ".join(value) if isinstance(value, tuple | list) else value
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {value}"


def resolve_args(args: Args) -> Args:
    """Refuse settings that cannot work, and fill in those that follow from others."""
    for holds, wanted, names in RANGES:
        for name in names.split():
            refuse(getattr(args, name) is not None and not holds(getattr(args, name)),
                   f"{flag(args, name)} is out of range; it must be {wanted}.")
    embedded, scratch = args.dataset == "reviews", args.policy_model is None
    given = args.reward_model or args.reward_fn  # then stage 2 has nothing to train
    learning_rate = args.learning_rate or (1e-4 if scratch else 3e-6)
    data_name, start = Path(args.dataset).name.split(".")[0], time.strftime("%Y%m%d-%H%M%S")
    defaults = {
        "response_len": 32 if embedded else 128,
        "max_prompt_len": 16 if embedded else None,  # else load_policy derives it from the context
        "sft_learning_rate": 3e-3 if scratch else 1e-5,
        "reward_learning_rate": 1e-3 if scratch else 1e-5,
        "learning_rate": learning_rate,
        # At the policy's rate the critic follows too slowly: explained_variance stays below 0.
        "critic_learning_rate": 10 * learning_rate,
        # Most gradients of a large model are below 1e-5: such an epsilon would shorten its steps.
        "adam_eps": 1e-5 if scratch else 1e-8,
        "score_norm": None if given else "sft",  # try_given_models decides for given ones
        "microbatch_size": -(-args.minibatch_size // processes()[1]),  # rounded up
        "run_name": None if args.resume else f"{data_name}__{args.seed}__{start}",
    }
    args = replace(args, **{x: y for x, y in defaults.items() if getattr(args, x) is None})
    num_processes, output_dir = processes()[1], Path(args.output_dir).resolve()
    run, run_dir = flag(args, "run_name"), Path(output_dir, args.run_name or "").resolve()
    for whole, part in (("total_episodes", "batch_size"), ("batch_size", "minibatch_size")):
        refuse(getattr(args, whole) % getattr(args, part),
               f"{flag(args, whole)} is not a multiple of {flag(args, part)}; change one.")
    refuse(scratch and not embedded, f"{flag(args, 'dataset')} needs a --policy-model; only "
           "reviews can start from a new one.")
    refuse(args.kl_target is not None and args.kl_coef == 0,
           f"{flag(args, 'kl_target')} scales --kl-coef, and 0 stays 0; set --kl-coef above 0.")
    refuse(args.kl_target is not None and args.batch_size > args.kl_horizon,
           f"{flag(args, 'kl_horizon')} is shorter than a batch; give at least --batch-size.")
    refuse(args.kl_in == "loss" and args.kl_estimator == "k1",
           "--kl-in loss with --kl-estimator k1 has zero gradient in expectation; use k2 or k3.")
    refuse(args.reward_model and args.reward_fn is not None,
           f"{flag(args, 'reward_fn')} and {flag(args, 'reward_model')}: drop one of them.")
    refuse(args.sft_epochs == 0 and scratch,
           "--sft-epochs 0 leaves a random policy; give the SFT model as --policy-model.")
    refuse(args.reward_epochs == 0 and not given,
           "--reward-epochs 0 leaves a random reward model; give --reward-model or --reward-fn.")
    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda: PyTorch finds no CUDA device; use --device cpu.")
    refuse(args.num_reward_models > 1 and given,
           f"{flag(args, 'num_reward_models')} trains them, and a --reward-model or --reward-fn is "
           "given; drop one of them.")
    smallest = min(args.minibatch_size, args.num_comparisons, args.eval_prompts or num_processes)
    refuse(smallest < num_processes, f"{flag(args, 'minibatch_size')}, "
           f"{flag(args, 'num_comparisons')} or {flag(args, 'eval_prompts')} is less than the "
           f"{num_processes} processes; start fewer.")
    refuse(args.resume and args.run_name is None, "--resume needs the --run-name to go on with.")
    refuse(args.run_name is not None and output_dir not in run_dir.parents,
           f"{run} is not a folder in {args.output_dir}; choose another name.")
    refuse(run_dir.exists() and not args.resume,
           f"{run} exists in {args.output_dir}; choose another, or --resume.")
    refuse(args.resume and not run_dir.exists(),
           f"{run} does not exist in {args.output_dir}; start it without --resume.")
    if args.resume and (read_checkpoint(run_dir) or {}).get("finished"):
        print(f"{run} is finished")
        raise SystemExit(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(args, device=device if args.device == "auto" else args.device)


# Evaluation and log -------------------------------------------------------------------------------


def describe(
    rollout: Rollout, rows: list[dict], responses: list[str], tokens: list, args: Args
) -> tuple[dict, list]:
    """Metrics of a batch, and a record of each response: text, score, KL in nats, gold."""
    mask = rollout.response_mask
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")
    kl = torch.where(mask, kl, 0).sum(dim=1)  # (batch,)
    scores = rollout.scores.reshape(len(rows), -1).sum(dim=1)  # (batch,); dense scores are summed
    lens = mask.sum(dim=1).float()  # (batch,)
    bigrams = [pair for row in tokens for pair in itertools.pairwise(row)]
    metrics = {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "score_len_corr": torch.corrcoef(torch.stack([scores, lens]))[0, 1].nan_to_num().item(),
        "kl": kl.mean().item(),
        "response_len": lens.mean().item(),
        "eos_share": rollout.ended.float().mean().item(),
        "entropy": masked_mean(rollout.entropies, mask).item(),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
    }
    columns = {"prompt": [row["prompt"] for row in rows], "response": responses,
               "ended": rollout.ended.tolist(), "score": scores.tolist(), "kl": kl.tolist()}
    if rollout.score_stds is not None:
        stds = rollout.score_stds.reshape(len(rows), -1).sum(dim=1)
        metrics["score_disagreement"] = stds.mean().item()
    if rollout.rewards is not None:
        metrics["rewards_mean"] = masked_mean(rollout.rewards, mask).item()
        columns["total"] = rollout.rewards.sum(dim=1).tolist()
    if args.dataset == "reviews":
        facts = columns["prompt"], columns["response"], columns["ended"]
        columns["gold"] = list(map(gold_reward, *facts))
        metrics["gold_mean"] = sum(columns["gold"]) / len(rows)
        metrics["grammatical"] = sum(map(is_grammatical, *facts)) / len(rows)
    records = [dict(zip(columns, x, strict=True)) for x in zip(*columns.values(), strict=True)]
    return metrics, records


@torch.no_grad()
def held_out_mean(model, loss_fn: Callable, key: str, rows: list[dict], args: Args) -> float:
    """The mean that loss_fn reports under key, over rows that the model was not trained on."""
    found = []
    for part in split_rows(share(rows), args.microbatch_size):
        microbatch = model.collate(part)
        num_terms = float(count_terms(microbatch))
        found.append((num_terms * float(loss_fn(model, microbatch)[key]), num_terms))
    totals, nums_terms = zip(*gather(found), strict=True)
    return sum(totals) / sum(nums_terms)


def evaluate(
    policy: Policy, reference: Policy, score: Score, held_out: Data, args: Args
) -> tuple[dict, list]:
    """Metrics and records on the held-out prompts, with the same random numbers every time."""
    if not held_out.prompts:
        return {}, []
    prompts = [row["prompt"] for row in held_out.prompts]
    rollout = collect_rollout(policy, reference, prompts, args.seed, args)
    responses, tokens = policy.decode(rollout)
    rollout.scores, rollout.score_stds = score(held_out.prompts, responses, tokens, rollout.ended)
    metrics, records = describe(rollout, held_out.prompts, responses, tokens, args)
    if held_out.demonstrations:  # has PPO unlearnt what SFT taught?
        nats = held_out_mean(policy, sft_loss, "loss", held_out.demonstrations, args)
        metrics["perplexity"] = math.exp(nats)
    return metrics, records


def sample_text(records: list[dict]) -> str:
    """Some responses, for the console and for TensorBoard."""
    return "\n".join(f"      {str(x['prompt'])[-60:]!r} -> {x['response']!r}\n      score "
                     f"{x['score']:.2f}, KL {x['kl']:.2f} nats, total {x['total']:.2f}"
                     for x in records)


def now(device: str) -> float:
    """Wall-clock time in seconds, when the device has finished its work."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def read_checkpoint(run_dir: Path) -> dict | None:
    """What save_checkpoint has written, or None if there is nothing yet."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return None
    with refusing("--resume", path, "delete it to start stage 3 again"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class RunLog:
    """The files of a run: args.json, checkpoint, TensorBoard events, metrics, samples, before and
    after. Of several processes only the first one writes; the others are silent."""

    def __init__(self, args: Args):
        self.args, self.run_dir, self.writer = args, Path(args.output_dir, args.run_name), None
        self.interrupted, self.handler = False, signal.getsignal(signal.SIGINT)
        self.silent, self.warned = processes()[0] > 0, False
        self.history = []  # [metrics, samples] of each iteration of PPO
        path, settings = self.run_dir / "args.json", json.loads(json.dumps(asdict(args)))
        if path.exists():
            first = json.loads(path.read_text())
            # What --resume may change; the microbatches change rounding only.
            safe = {"resume", "save_interval", "eval_interval", "output_dir", "microbatch_size"}
            changed = {name for name in settings if settings[name] != first.get(name)} - safe
            remedy = ", ".join(flag(Args(**first), name) for name in sorted(changed))
            refuse(changed, f"--resume: the run was started with other settings; give {remedy}.")
        elif not self.silent:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(settings, indent=1))
            path.with_suffix(".tmp").replace(path)
        settings = {name: x for name, x in asdict(args).items() if x != getattr(Args, name)}
        print(f"settings     {json.dumps(settings)}")
        self.num_iterations = args.total_episodes // args.batch_size
        num_steps = args.batch_size // args.minibatch_size
        print(f"plan         {self.num_iterations} iterations x {args.batch_size} responses, "
              f"trained on in {args.update_epochs} epochs x {num_steps} steps of "
              f"{args.minibatch_size}, in microbatches of {args.microbatch_size}")

    def start(self, stage: str) -> None:
        """Begin an event file for the curves of a stage; delete what a killed run has logged."""
        from torch.utils.tensorboard import SummaryWriter

        if not self.silent:
            self.close()
            for pattern in (f"events.*.{stage}", "metrics.jsonl", "samples.jsonl"):
                for path in self.run_dir.glob(pattern):
                    path.unlink()
            self.writer = SummaryWriter(str(self.run_dir), filename_suffix=f".{stage}")

    def close(self) -> None:
        """Complete the file of curves; restore the Ctrl-C handler of before start_ppo."""
        if self.writer is not None:
            self.writer.close()
        signal.signal(signal.SIGINT, self.handler)

    def start_ppo(self) -> dict | None:
        """Returns: the last checkpoint, or None. From now on Ctrl-C lets an iteration finish."""
        saved = read_checkpoint(self.run_dir)
        history = saved["history"] if saved else []
        self.start("ppo")
        for metrics, samples in history:
            self.write(metrics, samples)
        if self.handler is not signal.SIG_IGN:  # as in a script's background job (&)
            signal.signal(signal.SIGINT, self.interrupt)
        return saved

    def save_checkpoint(self, learners: dict, **state) -> None:
        """Write beside, then rename: at any moment the old file or the new one is complete."""
        if self.silent:
            return
        state |= {name: learner.state_dict() for name, learner in learners.items()}
        path = self.run_dir / "checkpoint.pt"
        with path.with_suffix(".tmp").open("wb") as file:
            torch.save(state | {"history": self.history}, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".tmp").replace(path)

    def interrupt(self, number: int, _frame) -> None:
        """Remember the first Ctrl-C; the second ends the run at once."""
        self.interrupted = True
        if not dist.is_initialized():  # torchrun sends a second one by itself
            signal.signal(number, signal.default_int_handler)

    def say_how_to_go_on(self) -> NoReturn:
        """Print the command that continues the run, and end it."""
        size = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
        launcher = f"torchrun --nproc-per-node {size}" if size else "python"
        words = [*sys.argv, "--run-name", self.args.run_name, "--resume"]
        print(f"ppo          saved; go on with: {launcher} {shlex.join(words)}")
        raise SystemExit(130)

    def scalars(self, values: dict[str, float], step: int, wall_time=None) -> None:
        """One point on each curve of TensorBoard."""
        if not self.silent:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step, wall_time)

    def result(self, key: str, value: float) -> None:
        """Print and log one number."""
        print(f"result       {key} {value:.3f}", flush=True)
        self.scalars({key: value}, 0)

    def write(self, metrics: dict, samples: list[dict]) -> None:
        """One iteration of PPO: an object in each jsonl file, and a point on each curve."""
        self.history.append([metrics, samples])
        self.scalars({key: x for key, x in metrics.items() if "/" in key}, metrics["episodes"],
                     metrics["wall_time"])
        if self.silent:
            return
        for name, records in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with open(self.run_dir / name, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        if samples:
            self.writer.add_text("samples", sample_text(samples), metrics["episodes"])

    def iteration(self, number: int, groups: dict, times: list[float], records: list[dict]) -> None:
        """One PPO iteration: curves over episodes, a jsonl object, a line on the console."""
        args, episodes = self.args, number * self.args.batch_size
        seconds = [end - start for start, end in itertools.pairwise(times)]
        groups["perf"] = dict(zip(("rollout_s", "score_s", "update_s"), seconds, strict=True))
        groups["perf"]["episodes_per_s"] = args.batch_size / sum(seconds)
        if args.device == "cuda":
            groups["perf"]["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        scalars = {f"{group}/{name}": x for group in groups for name, x in groups[group].items()}
        counters = {"iteration": number, "episodes": episodes}
        samples = records[:2] if number % args.save_interval == 0 else []
        self.write(counters | {"wall_time": time.time()} | scalars, [counters | x for x in samples])
        shown = {"score_mean": ".2f", "gold_mean": ".2f", "grammatical": ".0%", "kl": ".2f",
                 "response_len": ".1f", "eos_share": ".0%", "clipfrac": ".0%",
                 "explained_variance": ".2f", "episodes_per_s": ".0f"}
        values = groups["rollout"] | groups["ppo"] | groups["perf"]
        line = [f"{name} {values[name]:{form}}" for name, form in shown.items() if name in values]
        print(" | ".join([f"ppo {number:>4}/{self.num_iterations}", *line]), flush=True)
        if args.dtype == "float32" and values["ratio_first"] > 1.001:
            print(f"warning: the ratio starts at {values['ratio_first']}, not 1: old and new "
                  "log-probabilities are computed differently; is the model deterministic?")
        if samples:
            print(sample_text(samples))
        then = self.history[-11:][0][0]  # ten iterations ago
        if not self.warned and values["kl"] > 10 and len(self.history) > 10 and all(
                values[name] > then[f"rollout/{name}"] for name in ("kl", "score_mean")):
            self.warned = True
            print("warning: KL (above 10 nats) and score rise together, as they do when a reward "
                  "model is hacked: read the samples; if they got worse, raise --kl-coef, or set "
                  "--kl-target or --max-kl")

    def before_after(self, before: tuple, after: tuple) -> None:
        """Print the final table and two examples; write all pairs to a file."""
        (old_metrics, old_records), (new_metrics, new_records) = before, after
        if self.silent or not new_records:
            return
        key = "gold" if "gold" in new_records[0] else "score"
        pairs = list(zip(old_records, new_records, strict=True))
        wins = [0.5 if new[key] == old[key] else float(new[key] > old[key]) for old, new in pairs]
        old_metrics[f"win rate by {key}"] = 0.5
        new_metrics[f"win rate by {key}"] = sum(wins) / len(wins)
        print(f"\n{f'{len(pairs)} held-out prompts':<24}{'SFT':>9}{'PPO':>9}")
        for name, value in new_metrics.items():
            print(f"{name:<24}{old_metrics[name]:>9.3f}{value:>9.3f}")
        for old, new in pairs[:2]:
            print(f"\nprompt  {old['prompt']}\n  SFT   {old['response']}\n"
                  f"  PPO   {new['response']}")
        with open(self.run_dir / "before_after.jsonl", "w") as file:
            for old, new in pairs:
                file.write(json.dumps({"prompt": old["prompt"], "sft": old, "ppo": new}) + "\n")


if __name__ == "__main__":
    import tyro

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main(tyro.cli(Args))
    if dist.is_initialized():
        dist.destroy_process_group()
