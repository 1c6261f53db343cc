"""PPO for RLHF in one file: supervised fine-tuning, reward model, PPO. On CUDA or CPU.

    python ppo_rlhf.py                        # all three stages on the embedded task, about 2 minutes on 2 cores
    python ppo_rlhf.py --kl-coef 0            # the same without the leash: watch the reward model being hacked
    python ppo_rlhf.py --dataset Anthropic/hh-rlhf --policy-model Qwen/Qwen2.5-0.5B --dtype bfloat16

What is optimised, over prompts x and responses y (InstructGPT, eq. 2, without the pretraining term):

    J(π) = E_{x, y ~ π(·|x)} [ score(x, y) ] − kl_coef · E_x [ KL( π(·|x) ‖ π_ref(·|x) ) ]

Stage 1  SFT           π_ref = the language model after maximum likelihood on demonstrations
Stage 2  reward model  score(x, y), fitted to comparisons: P(y₁ ≻ y₂) = sigmoid(score(x, y₁) − score(x, y₂))
Stage 3  PPO           repeat: sample a batch of responses from the policy, score them, turn scores and KL into one
                       reward per token, estimate advantages (GAE), take a few clipped gradient steps

One response is one episode, one token is one action, the tokens so far are the state. Shapes are written in words:

    batch         responses of one iteration                prompt_len    columns that hold prompts, padded on the left
    response_len  columns that hold responses, padded on    seq_len       prompt_len + response_len
                  the right                                 vocab, hidden of the language model

    logprobs      log π(token | tokens before), in nats: old_ when sampled, new_ during the update, ref_ under π_ref
    values        V: the critic's forecast of the rewards still to come, made before the token is chosen
    scores        one number per response, from the reward model or function; rewards: one number per token
    response_mask True on the real tokens of a response, its EOS included; every mean over tokens goes through it

Departures. From Ziegler 2019 (arXiv 1909.08593): responses end at EOS; rewards are not whitened; kl_coef is fixed unless
--kl-target is given; gradients are clipped. From Stiennon 2020 (2009.01325): the value head shares the policy's trunk
(--critic separate is theirs). From InstructGPT (2203.02155): 4 epochs per batch, not 1; the pretraining mix is off
(--ptx-coef). From all three: a response cut at the length limit pays --missing-eos-penalty; PAD has probability zero.
Left out on purpose: fp16, LoRA, reward-model updates during PPO (README: "What is left out").
"""

import copy
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

# transformers, tokenizers, datasets and tyro are imported by the functions that use them: whoever imports this file
# for its math needs torch alone.


# ======================================================================================================================
# Settings
# ======================================================================================================================


@dataclass
class Args:
    """Every setting of a run. Where the default is None, the value follows from data and model and is printed."""

    # Data -------------------------------------------------------------------------------------------------------------
    dataset: str = "reviews"
    """`reviews` (embedded), or preference data from the Hub or from disk: jsonl, jsonl.gz, parquet, save_to_disk"""
    dataset_split: str = "train"
    """split of --dataset, slices such as train[:1000] included"""
    sft_dataset: str | None = None
    """demonstrations with columns prompt/completion, or text; default: the chosen responses of --dataset"""
    max_prompt_len: int | None = None
    """tokens; longer prompts keep their last ones (default: 16 for reviews, else 512)"""
    response_len: int | None = None
    """tokens, the limit of every response (default: 32 for reviews, else 128)"""
    vocab_size: int = 4096
    """tokens of the BPE trained on --dataset when no --policy-model brings a tokenizer"""
    eval_prompts: int = 128
    """prompts held out for the before/after table; fewer than 4 times as many in the data: none are held out"""

    # Models -----------------------------------------------------------------------------------------------------------
    policy_model: str | None = None
    """Hub id or folder of a causal language model; default: a small one, from scratch"""
    reward_model: str | None = None
    """Hub id or folder of a sequence classifier with one output; default: stage 2 trains one"""
    reward_fn: str | None = None
    """FILE.py:FUNCTION, f(prompts, responses) -> one float per response; replaces the reward model. With a third
    parameter it also gets each response's token strings, and may return one list per response: a reward per token"""
    sft_epochs: int = 1
    """passes over the demonstrations; 0: --policy-model already is the SFT model"""
    sft_learning_rate: float | None = None
    """peak of stage 1, linear to 0 (default: 3e-3 from scratch, else 1e-5)"""
    reward_epochs: int = 1
    """passes over the comparisons"""
    reward_learning_rate: float | None = None
    """peak of stage 2, linear to 0 (default: 1e-3 from scratch, else 1e-5)"""
    critic: Literal["shared", "separate"] = "shared"
    """value head on the policy's trunk, or a network of its own, started from the reward model where it fits"""
    critic_learning_rate: float | None = None
    """of the value head, and of the separate critic's trunk (default: --learning-rate)"""
    score_norm: Literal["none", "sft", "running"] | None = None
    """scores as they are; shifted and scaled to mean 0, std 1 on the SFT policy's responses, measured once before PPO;
    or by running statistics (default: sft for a reward model trained in this run, else none)"""
    ref_update_interval: int = 0
    """iterations after which the reference becomes a copy of the policy; 0: never"""

    # PPO --------------------------------------------------------------------------------------------------------------
    total_episodes: int = 12_800
    """responses in all"""
    batch_size: int = 128
    """responses per iteration (one rollout and one update)"""
    minibatch_size: int = 32
    """responses per optimizer step; examples per step in stages 1 and 2"""
    microbatch_size: int | None = None
    """responses per forward/backward: lower it to fit memory, the result is the same (default: --minibatch-size)"""
    update_epochs: int = 4
    """passes over each batch"""
    learning_rate: float | None = None
    """of the policy in PPO (default: 1e-3 from scratch, else 3e-6)"""
    lr_warmup: int = 0
    """iterations of linear warm-up"""
    anneal_lr: bool = True
    """decay the learning rate of PPO linearly to 0"""
    temperature: float = 1.0
    """of the sampler, and of every log-probability in PPO"""
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """GAE: 0 trusts the critic (one-step TD error), 1 trusts the sampled rewards"""
    clip_coef: float = 0.2
    """policy ratio is clipped to 1 ± this"""
    vf_clip_coef: float = 0.2
    """new values are clipped to the old ones ± this, in units of the return"""
    vf_coef: float = 0.1
    """weight of the value loss, which carries the factor ½"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, per nat"""
    max_grad_norm: float = 1.0
    """global norm to which gradients are clipped"""
    target_kl: float | None = None
    """end the epochs of an iteration once approx_kl (old to new policy, nats per token) passes this"""
    kl_coef: float = 0.05
    """weight of the KL to the reference, in score units per nat"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL enters: each token's reward, or a term of the loss, next to advantages as they are normalised"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """per-token estimate of the KL to the reference (joschu.net/blog/kl-approx.html); k1 in the loss is refused"""
    kl_target: float | None = None
    """nats per response that an adaptive kl_coef steers to; default: fixed kl_coef"""
    kl_horizon: int = 10_000
    """episodes over which the adaptive kl_coef reacts"""
    max_kl: float | None = None
    """nats per response of KL to the reference at which the run ends: PPO peaks early, then hacks"""
    norm_advantages: bool = True
    """shift and scale advantages to mean 0, std 1 over the valid tokens of the batch"""
    whiten_rewards: bool = False
    """scale token rewards to std 1 over the batch, without shifting their mean"""
    score_clip: float | None = None
    """clip scores, after --score-norm, to ± this"""
    missing_eos_penalty: float = 1.0
    """subtracted from the (normalised) score of a response cut at the length limit"""
    ptx_coef: float = 0.0
    """weight of the SFT loss mixed into each optimizer step (InstructGPT's PPO-ptx)"""

    # Run --------------------------------------------------------------------------------------------------------------
    seed: int = 1
    """of data, weights, sampling and shuffling"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products (autocast); weights, optimizer state and log-probabilities stay float32"""
    output_dir: str = "runs"
    """folder of all runs"""
    run_name: str | None = None
    """folder of this run inside --output-dir; must not exist (default: data set, seed, time)"""
    save_interval: int = 20
    """iterations between two saves of policy/, which is also saved after SFT and at the end"""
    log_samples_interval: int = 20
    """iterations between two looks at sampled responses"""


def refuse(message: str) -> None:
    """End the run with exit status 2 and one sentence that names flag, value and remedy."""
    print(f"ppo_rlhf.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def resolve_args(args: Args) -> Args:
    """Fill in the defaults that depend on data and model, and refuse what cannot work."""
    embedded, scratch = args.dataset == "reviews", args.policy_model is None
    given_reward = args.reward_model is not None or args.reward_fn is not None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    defaults = {
        "max_prompt_len": 16 if embedded else 512,
        "response_len": 32 if embedded else 128,
        "sft_learning_rate": 3e-3 if scratch else 1e-5,
        "reward_learning_rate": 1e-3 if scratch else 1e-5,
        "learning_rate": 1e-3 if scratch else 3e-6,
        "score_norm": "none" if given_reward else "sft",
        "microbatch_size": args.minibatch_size,
        "run_name": f"{Path(args.dataset).name.split('.')[0]}__{args.seed}__{stamp}",
    }
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.critic_learning_rate is None:
        args = replace(args, critic_learning_rate=args.learning_rate)
    check_args(args)
    return args


def check_args(args: Args) -> None:
    """Refuse numbers out of range and combinations that contradict each other."""
    at_least_one = ("response_len", "max_prompt_len", "total_episodes", "batch_size", "minibatch_size",
                    "microbatch_size", "update_epochs", "kl_horizon", "save_interval", "log_samples_interval")
    positive = ("temperature", "max_grad_norm", "target_kl", "kl_target", "max_kl", "score_clip", "clip_coef",
                "vf_clip_coef", "learning_rate", "critic_learning_rate", "sft_learning_rate", "reward_learning_rate")
    not_negative = ("eval_prompts", "sft_epochs", "reward_epochs", "ref_update_interval", "lr_warmup", "vf_coef",
                    "ent_coef", "kl_coef", "missing_eos_penalty", "ptx_coef")
    for names, holds, wanted in (
        (at_least_one, lambda x: x >= 1, "at least 1"),
        (positive, lambda x: 0 < x < math.inf, "above 0"),
        (not_negative, lambda x: 0 <= x < math.inf, "0 or more"),
        (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "from 0 to 1"),
        (("vocab_size",), lambda x: x >= 258, "at least 258 (256 bytes, PAD and EOS)"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                refuse(f"--{name.replace('_', '-')} {value} is out of range; give a number {wanted}.")
    for whole, part in (("total_episodes", "batch_size"), ("batch_size", "minibatch_size"),
                        ("minibatch_size", "microbatch_size")):
        if getattr(args, whole) % getattr(args, part):
            flags = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in (whole, part)]
            refuse(f"{flags[0]} is not a multiple of {flags[1]}; choose sizes that divide.")
    if args.kl_in == "loss" and args.kl_estimator == "k1":
        refuse("--kl-in loss with --kl-estimator k1 has zero gradient in expectation; use k2 or k3.")
    if args.reward_model is not None and args.reward_fn is not None:
        refuse(f"--reward-fn {args.reward_fn} would replace --reward-model {args.reward_model}; give one of them.")
    if args.sft_epochs == 0 and args.policy_model is None:
        refuse("--sft-epochs 0 leaves a random policy; give the SFT model as --policy-model.")
    if args.reward_epochs == 0 and args.reward_model is None and args.reward_fn is None:
        refuse("--reward-epochs 0 leaves a random reward model; give --reward-model or --reward-fn.")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: PyTorch finds no CUDA device; use --device cpu.")
    if (run_dir := Path(args.output_dir) / args.run_name).exists():
        refuse(f"--run-name {args.run_name} exists in {run_dir.parent}; choose another name or remove it.")


# ======================================================================================================================
# Tensor helpers
# ======================================================================================================================


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is True.

    Args: x and mask (bool), the same shape; dim: reduce this dimension, default all.
    Raises: ValueError if the shapes differ or a mean would be taken over nothing.
    """
    check_same_shape(x=x, mask=mask)
    total, count = torch.where(mask, x, 0).sum(dim), mask.sum(dim)  # where, not x * mask: NaN times 0 is still NaN
    if not (count > 0).all():
        raise ValueError(f"masked_mean: the mask of shape {tuple(mask.shape)} selects nothing")
    return total / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / std over the entries where mask is True; with shift_mean=False only the scale changes.

    The variance is the biased one, as in lm-human-preferences. Entries outside the mask come back as 0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree: (batch,) against (batch, 1) would broadcast without a word."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{k} {tuple(x.shape)}" for k, x in tensors.items()))


def logprobs_from_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at the given ids: logits[id] − logsumexp(logits), in nats.

    Args: logits (..., vocab); ids (...). Returns: (...). Does not materialise the (..., vocab) log-softmax.
    """
    check_same_shape(logits=logits[..., 0], ids=ids)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), in nats: H = logsumexp(z) − Σ softmax(z)·z, over (..., vocab). Returns: (...).

    This is the entropy of the distribution. −log p of the one token sampled is only an estimate of it.
    """
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def pad_rows(rows: list[list[int]], pad_id: int, side: Literal["left", "right"], device=None) -> tuple[Tensor, Tensor]:
    """Stack rows of ids to (rows, longest), padded on one side. Returns: ids and bool mask, True on real tokens.

    The mask comes from the lengths: comparing with pad_id would lose EOS in models whose PAD is their EOS.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row, dtype=torch.long), True
    return ids.to(device), mask.to(device)


def unpad_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The inverse of pad_rows."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]


# ======================================================================================================================
# Data: the embedded task. Short film reviews from a small grammar, and a gold reward that only an annotator sees
# ======================================================================================================================

# A {name} stands for any entry of that name. The same table writes the demonstrations and, read as a regular
# expression, decides exactly whether a text belongs to the language.
GRAMMAR = {
    "prompt": ["a {genre} about {theme}.", "a {country} {genre} about {theme}.", "a {age} {genre} about {theme}.",
               "a {age} {country} {genre} about {theme}."],
    "genre": ["comedy", "thriller", "western", "musical", "romance", "mystery"],
    "country": ["french", "british", "korean", "mexican", "swedish", "japanese"],
    "age": ["new", "recent", "classic", "silent", "forgotten", "famous", "long", "short"],
    "theme": ["two sisters", "a wedding", "the war", "a robbery", "lost love", "a small town", "growing old", "the sea"],
    "review": ["{sentence}", "{sentence} {sentence}", "{clause}. {clause}. {clause}."],
    "sentence": ["{clause}.", "{praise} and {praise}.", "{scorn} and {scorn}.", "{praise}, but {scorn}.",
                 "{scorn}, but {praise}."],
    "clause": ["{praise}", "{scorn}"],
    "praise": ["the {noun} was {good}", "the {noun} was {very} {good}", "the {noun} was never {bad}", "the {noun} {shines}",
               "i {liked} the {noun}", "it made me {smile}"],
    "scorn": ["the {noun} was {bad}", "the {noun} was {very} {bad}", "the {noun} was never {good}", "the {noun} {drags}",
              "i {hated} the {noun}", "it made me {yawn}"],
    "very": ["very", "rather", "truly"],
    "good": ["clever", "moving", "brilliant", "charming", "fresh", "superb"],
    "bad": ["dull", "clumsy", "awful", "tired", "hollow", "silly"],
    "shines": ["shines", "delights", "surprises"],
    "drags": ["drags", "annoys", "disappoints"],
    "liked": ["loved", "liked", "enjoyed", "admired"],
    "hated": ["hated", "disliked", "regretted", "endured"],
    "smile": ["smile", "laugh", "cheer", "think"],
    "yawn": ["yawn", "sigh", "leave", "sleep"],
}  # fmt: skip
NOUNS = ["plot", "acting", "script", "ending", "cast", "camera", "music", "story"]
GENRE_NOUNS = {  # a review may only speak of what its film has
    "comedy": ["humour", "timing"], "thriller": ["chase", "twist"], "western": ["duel", "scenery"],
    "musical": ["dancing", "singing"], "romance": ["kiss", "courtship"], "mystery": ["murder", "detective"],
}  # fmt: skip


def review_rules(genre: str) -> dict[str, list[str]]:
    """The grammar for one genre."""
    return GRAMMAR | {"noun": NOUNS + GENRE_NOUNS[genre]}


def draw_text(symbol: str, rules: dict[str, list[str]], rng: random.Random) -> str:
    """Draw a text of the grammar: choose a production, expand the names in it."""
    return re.sub(r"{(\w+)}", lambda name: draw_text(name[1], rules, rng), rng.choice(rules[symbol]))


@functools.cache
def text_pattern(symbol: str, genre: str) -> re.Pattern:
    """The regular expression that matches exactly the texts of the grammar (it has no recursion)."""
    rules = review_rules(genre)
    productions = [re.sub(r"{(\w+)}", lambda name: text_pattern(name[1], genre).pattern, text.replace(".", r"\."))
                   for text in rules[symbol]]  # fmt: skip
    return re.compile("(?:" + "|".join(productions) + ")")


def genre_of(prompt: str) -> str:
    """The genre that a prompt names."""
    return next(word for word in re.findall(r"\w+", prompt) if word in GENRE_NOUNS)


def is_grammatical(prompt: str, response: str, ended: bool) -> bool:
    """Whether the response is a finished text of the grammar that fits its prompt."""
    return ended and text_pattern("review", genre_of(prompt)).fullmatch(response) is not None


def gold_reward(prompt: str, response: str, ended: bool) -> float:
    """What a reader wants of a review: praise, in good language, short, without repetition.

    Sentiment summed over clauses and cut to ±2; −2 if ungrammatical or not ended; −1 per repeated clause; −0.5 per
    clause beyond three. The annotator of stage 2 sees it through noise. After that it is only reported: never trained on.
    """
    genre = genre_of(prompt)
    clauses = [text.strip() for text in re.split(r"[.,]|\band\b|\bbut\b", response) if text.strip()]
    sentiment = sum((text_pattern("praise", genre).fullmatch(clause) is not None)
                    - (text_pattern("scorn", genre).fullmatch(clause) is not None) for clause in clauses)  # fmt: skip
    return (
        max(-2, min(2, sentiment))
        - 2 * (not is_grammatical(prompt, response, ended))
        - (len(clauses) - len(set(clauses)))
        - 0.5 * max(0, len(clauses) - 3)
    )


def draw_reviews(num_reviews: int, rng: random.Random) -> list[tuple[str, str]]:
    """Demonstrations (prompt, review), drawn neutrally: praise and scorn alike."""
    prompts = [draw_text("prompt", GRAMMAR, rng) for _ in range(num_reviews)]
    return [(prompt, draw_text("review", review_rules(genre_of(prompt)), rng)) for prompt in prompts]


def prefers_first(gold_first: float, gold_second: float, rng: random.Random) -> bool:
    """The simulated annotator's noisy verdict: P(first ≻ second) = sigmoid(gold₁ − gold₂) (Bradley–Terry)."""
    return rng.random() < 1 / (1 + math.exp(gold_second - gold_first))


def word_tokenizer():
    """A tokenizer with one token per word or punctuation mark of the grammar."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [text for productions in GRAMMAR.values() for text in productions]
    texts += NOUNS + [noun for nouns in GENRE_NOUNS.values() for noun in nouns]
    words = sorted(set(re.findall(r"\w+|[.,]", re.sub(r"{\w+}", "", " ".join(texts)))))
    # UNK is an ordinary word here: as a special token, decode would drop it, and hide it from the gold reward.
    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # "dull ." -> "dull."
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


# ======================================================================================================================
# Data: your own. Preferences, demonstrations and prompts from disk or Hub
# ======================================================================================================================

TURN = "\n\nAssistant:"  # where hh-rlhf's dialogues, kept as one string, hand over to the assistant
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '\n\nAssistant: ' if message['role'] == 'assistant' else '\n\nHuman: ' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def read_rows(flag: str, name: str, split: str) -> list[dict]:
    """Read a data set from a file, a save_to_disk folder or the Hub."""
    import datasets

    path = Path(name)
    try:
        if path.is_file():
            file_format = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(file_format, data_files=str(path), split=split)
        elif (path / "state.json").exists():
            data = datasets.load_from_disk(name)
        elif (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)[split]
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever datasets raises, the user needs flag, value and reason
        reason = str(error).split("\n")[0]
        refuse(f"{flag} {name} (split {split}) cannot be read ({type(error).__name__}: {reason}); give a jsonl, jsonl.gz "
               "or parquet file, a save_to_disk folder or a Hub id.")  # fmt: skip
    known = ({"chosen", "rejected"}, {"prompt"}, {"text"})
    if len(data) == 0 or not any(columns <= set(data.column_names) for columns in known):
        refuse(f"{flag} {name} has {len(data)} rows with the columns {', '.join(data.column_names) or 'none'}; it needs "
               "rows with prompt/chosen/rejected, chosen/rejected, prompt/completion, text, or prompt.")  # fmt: skip
    return data.to_list()


def split_pair(row: dict) -> tuple:
    """Prompt (a string, or a list of messages), chosen text and rejected text of one preference row.

    Where the prompt is not a column of its own, it is what both sides share, up to the assistant turn in which they part.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        if prompt is not None:
            return prompt, chosen, rejected
        end = os.path.commonprefix([chosen, rejected]).rfind(TURN)
        if end < 0:
            refuse(f"--dataset: chosen and rejected share no {TURN!r} in {chosen[:60]!r}; add a prompt column.")
        end += len(TURN)
        return chosen[:end], chosen[end:], rejected[end:]
    if chosen[0]["role"] == "assistant":  # only the answer: the conversation so far is the prompt column
        return prompt, chosen[0]["content"], rejected[0]["content"]
    shared = len(os.path.commonprefix([chosen[:-1], rejected[:-1]]))
    while shared > 0 and chosen[shared]["role"] != "assistant":
        shared -= 1
    return chosen[:shared], chosen[shared]["content"], rejected[shared]["content"]


def bpe_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on the texts, for a model from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[PAD]", "[EOS]"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]",
                                   chat_template=CHAT_TEMPLATE)  # fmt: skip


@dataclass
class Data:
    """What the stages train on, as token ids. An example is (prompt, response, ...); eval_ ones are never trained on."""

    prompts: list[list[int]]
    demonstrations: list[tuple[list[int], ...]]  # prompt, response
    comparisons: list[tuple[list[int], ...]]  # prompt, chosen, rejected
    eval_prompts: list[list[int]]
    eval_demonstrations: list[tuple[list[int], ...]]
    eval_comparisons: list[tuple[list[int], ...]]


def encode_examples(examples: list[tuple], tokenizer, max_prompt_len: int, response_len: int, name: str) -> list[tuple]:
    """Token ids of (prompt, response, ...) texts. Prompts keep their last tokens, responses their first.

    Every stage gets its ids from here: prompt and response are encoded apart, as PPO will meet them. EOS ends each
    response, else the model could not learn to stop.
    """
    if not examples:
        return []
    prompts, *responses = zip(*examples, strict=True)
    chat = isinstance(prompts[0], list)
    if chat:  # the template writes BOS itself: the tokenizer must not add a second one
        prompts = [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in prompts]
    prompts = tokenizer(list(prompts), add_special_tokens=not chat)["input_ids"]
    responses = [tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in responses]
    responses = [[[*ids, tokenizer.eos_token_id] for ids in column] for column in responses]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = [ids or [start] for ids in prompts]  # an empty prompt still needs one token to predict the next from
    long_prompts = sum(len(ids) > max_prompt_len for ids in prompts)
    long_responses = sum(len(ids) > response_len for column in responses for ids in column)
    print(f"data       {len(examples)} {name}; {long_prompts} prompts cut to their last {max_prompt_len} tokens"
          + (f", {long_responses} responses to their first {response_len}" if responses else ""))  # fmt: skip
    columns = [[ids[-max_prompt_len:] for ids in prompts], *[[ids[:response_len] for ids in x] for x in responses]]
    return list(zip(*columns, strict=True))


def decode_texts(tokenizer, prompts: list[list[int]], responses: list[list[int]]) -> list[tuple[str, str]]:
    """(prompt, response) as texts, without special tokens."""
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, responses)]
    return [(prompt, response.strip()) for prompt, response in zip(*texts, strict=True)]


def load_data(args: Args, tokenizer, prompts: list, demonstrations: list[tuple], comparisons: list[tuple]) -> Data:
    """Encode the texts and hold out the evaluation prompts, with every example that belongs to them."""
    encode = functools.partial(encode_examples, tokenizer=tokenizer, max_prompt_len=args.max_prompt_len,
                               response_len=args.response_len)  # fmt: skip
    prompts = [example[0] for example in encode([(prompt,) for prompt in prompts], name="prompts")]
    demonstrations, comparisons = encode(demonstrations, name="demonstrations"), encode(comparisons, name="comparisons")
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    random.Random(args.seed).shuffle(distinct)
    num_held_out = args.eval_prompts if len(distinct) >= 4 * args.eval_prompts else 0
    held_out = set(map(tuple, distinct[:num_held_out]))
    train = [[x for x in examples if tuple(x[0]) not in held_out] for examples in (demonstrations, comparisons)]
    if num_held_out:
        print(f"data       {num_held_out} of {len(distinct)} distinct prompts are held out for evaluation")
        evaluation = [[x for x in examples if tuple(x[0]) in held_out] for examples in (demonstrations, comparisons)]
    else:
        print(f"data       {len(distinct)} distinct prompts are too few to hold out {args.eval_prompts}: "
              "evaluation uses training data")  # fmt: skip
        evaluation = [examples[: args.eval_prompts] for examples in train]
    return Data(distinct[num_held_out:], *train, distinct[: args.eval_prompts], *evaluation)


# ======================================================================================================================
# Models
# ======================================================================================================================


def new_language_model(tokenizer, hidden: int, num_layers: int, context: int):
    """A small Llama-style transformer with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def position_ids(mask: Tensor) -> Tensor:
    """0, 1, 2, … over the real tokens of each row (batch, seq_len): left padding must not shift positions."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    """A causal language model, read as a distribution over responses.

    Temperature, position ids, precision and the ban on PAD live here once, so that sampling, old, new and reference
    log-probabilities cannot disagree. The sampler is this distribution: whatever top-p or repetition penalty the model's
    own generation config asks for is ignored, since a ratio or KL to another distribution would be meaningless.
    """

    def __init__(self, lm: nn.Module, pad_id: int, eos_ids: list[int], temperature: float = 1.0, dtype: str = "float32"):
        super().__init__()
        self.lm, self.pad_id, self.temperature, self.bf16 = lm, pad_id, temperature, dtype == "bfloat16"
        self.register_buffer("eos_ids", torch.tensor(eos_ids))
        # PAD must never be sampled, or rows would seem to go on after their end. If PAD is EOS, it is a real token.
        self.register_buffer("banned_ids", torch.tensor([] if pad_id in eos_ids else [pad_id], dtype=torch.long))

    def logits(self, ids: Tensor, mask: Tensor, num_last: int, **kwargs) -> tuple[Tensor, object]:
        """Float32 logits of the last num_last positions, (batch, num_last, vocab), and the model's whole output.

        mask covers cached tokens and ids; ids are its last columns.
        """
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.lm(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)[:, -ids.shape[1] :],
                             logits_to_keep=num_last, **kwargs)  # fmt: skip
        logits = output.logits.float() / self.temperature
        # The lowest finite number, not −inf: 0 · −inf in the entropy would be NaN.
        return logits.index_fill(-1, self.banned_ids, torch.finfo(torch.float32).min), output

    def forward(self, sequence_ids: Tensor, sequence_mask: Tensor, response_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and hidden state for each response token.

        Args: sequence_ids and sequence_mask (batch, seq_len), whose last response_len columns are the response.
        Returns: logprobs and entropies (batch, response_len), hidden states (batch, response_len, hidden). Column t is
        read at the position before response token t: it is the state in which that token is chosen.
        """
        logits, output = self.logits(sequence_ids, sequence_mask, response_len + 1, use_cache=False,
                                     output_hidden_states=True)  # fmt: skip
        logits = logits[:, :-1]  # (batch, response_len, vocab): logits at position t score token t + 1
        hidden = output.hidden_states[-1][:, -response_len - 1 : -1]  # (batch, response_len, hidden)
        response_ids, response_mask = sequence_ids[:, -response_len:], sequence_mask[:, -response_len:]
        # A banned PAD has log-probability −1e38; put 0 into the padding, so that nothing extreme exists to leak.
        logprobs = torch.where(response_mask, logprobs_from_logits(logits, response_ids), 0)
        return logprobs, entropy(logits), hidden


class ActorCritic(nn.Module):
    """The policy and its critic: V(state) = a linear head on the policy's hidden states, or on a trunk of its own."""

    def __init__(self, policy: Policy, trunk: nn.Module | None = None, head_weight: Tensor | None = None):
        super().__init__()
        self.policy, self.trunk = policy, trunk
        self.value_head = nn.Linear(policy.lm.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # V = 0 at first: the critic starts without an opinion [N details, P2]
        nn.init.zeros_(self.value_head.bias)
        if head_weight is not None:  # (1, hidden): start from the reward model's opinion [N+ details, 22]
            self.value_head.weight.data.copy_(head_weight)

    def forward(self, sequence_ids: Tensor, sequence_mask: Tensor, response_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: logprobs, entropies, values, each (batch, response_len). Arguments as in Policy.forward."""
        logprobs, entropies, hidden = self.policy(sequence_ids, sequence_mask, response_len)
        if self.trunk is not None:
            with torch.autocast(sequence_ids.device.type, torch.bfloat16, enabled=self.policy.bf16):
                output = self.trunk(input_ids=sequence_ids, attention_mask=sequence_mask, use_cache=False,
                                    position_ids=position_ids(sequence_mask))  # fmt: skip
            hidden = output.last_hidden_state[:, -response_len - 1 : -1]
        return logprobs, entropies, self.value_head(hidden.float()).squeeze(-1)


def load_policy_model(args: Args, texts: list[str]):
    """The policy's language model and tokenizer: given, or new ones for the embedded task or for the given texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.policy_model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.policy_model)
            lm = AutoModelForCausalLM.from_pretrained(args.policy_model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            refuse(f"--policy-model {args.policy_model} cannot be loaded ({str(error).splitlines()[0]}); "
                   "give a Hub id or a folder with a causal language model and its tokenizer.")  # fmt: skip
    elif args.dataset == "reviews":
        tokenizer = word_tokenizer()
        lm = new_language_model(tokenizer, hidden=96, num_layers=2, context=args.max_prompt_len + args.response_len)
    else:
        tokenizer = bpe_tokenizer(texts, args.vocab_size)
        lm = new_language_model(tokenizer, hidden=256, num_layers=4, context=2048)
    context = getattr(lm.config, "max_position_embeddings", math.inf)
    if args.max_prompt_len + args.response_len > context:
        refuse(f"--max-prompt-len {args.max_prompt_len} + --response-len {args.response_len} is more than the model's "
               f"context of {context} tokens; lower one of them.")  # fmt: skip
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        refuse(f"--policy-model {args.policy_model}: its tokenizer has {len(tokenizer)} tokens, its embedding only "
               f"{lm.get_input_embeddings().num_embeddings}; give a model with its own tokenizer.")  # fmt: skip
    # eval() for good, here and for every other model: dropout would make old and new log-probabilities disagree before
    # any update. Gradients flow all the same.
    return lm.eval(), tokenizer


def end_token_ids(lm, tokenizer) -> list[int]:
    """Every id that ends a response: chat models often list several in their generation config."""
    listed = lm.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return sorted({tokenizer.eos_token_id, *listed})


def new_reward_model(lm, tokenizer):
    """A sequence classifier with one output on a copy of the SFT model's trunk, and the tokenizer it is saved with."""
    from transformers import AutoModelForSequenceClassification

    tokenizer, config = copy.deepcopy(tokenizer), copy.deepcopy(lm.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    reward_model = AutoModelForSequenceClassification.from_config(config)
    reward_model.base_model.load_state_dict(lm.base_model.state_dict())
    nn.init.normal_(reward_model.score.weight, std=1 / math.sqrt(config.hidden_size + 1))  # [N details, R2]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_token_ids(lm, tokenizer):
        give_own_pad_token(reward_model, tokenizer)
    return reward_model.eval(), tokenizer


def load_reward_model(path: str):
    """A given reward model and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        # transformers would load a causal model too, put a random head on it, and only warn.
        if not (config.architectures or [""])[0].endswith("ForSequenceClassification") or config.num_labels != 1:
            raise ValueError(f"it is a {config.architectures} with {config.num_labels} outputs")
        tokenizer = AutoTokenizer.from_pretrained(path)
        reward_model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        refuse(f"--reward-model {path} cannot be used ({str(error).splitlines()[0]}); give a Hub id or a folder with a "
               "sequence classifier with one output, or wrap it in a --reward-fn.")  # fmt: skip
    if config.pad_token_id is None:
        give_own_pad_token(reward_model, tokenizer)
    return reward_model.eval(), tokenizer


def give_own_pad_token(reward_model, tokenizer) -> None:
    """Add a PAD token that no text contains: transformers reads the score at the last token that is not PAD."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id >= reward_model.get_input_embeddings().num_embeddings:
        reward_model.resize_token_embeddings(tokenizer.pad_token_id + 1)


def freeze(model: nn.Module) -> nn.Module:
    """No gradients, ever: for the reference and the reward model."""
    return model.requires_grad_(False)


# ======================================================================================================================
# Stages 1 and 2: supervised fine-tuning and the reward model share one training loop
# ======================================================================================================================


def sft_loss_sum(policy: Policy, examples: list[tuple]) -> Tensor:
    """−Σ log π(response token | prompt, tokens before), in nats, over all responses; prompts are not trained on."""
    device = policy.eos_ids.device
    prompts, responses = zip(*examples, strict=True)
    prompt_ids, prompt_mask = pad_rows(prompts, policy.pad_id, "left", device)
    response_ids, response_mask = pad_rows(responses, policy.pad_id, "right", device)
    sequence_ids = torch.cat([prompt_ids, response_ids], dim=1)  # (examples, seq_len)
    sequence_mask = torch.cat([prompt_mask, response_mask], dim=1)
    logprobs, _, _ = policy(sequence_ids, sequence_mask, response_ids.shape[1])
    return -torch.where(response_mask, logprobs, 0).sum()


def count_response_tokens(examples: list[tuple]) -> int:
    """The number of terms in sft_loss_sum."""
    return sum(len(response) for _, response in examples)


def reward_model_scores(reward_model, sequences: list[list[int]]) -> Tensor:
    """score(x, y) of whole sequences, prompt and response in one. Returns: (sequences,), raw.

    The model's own forward reads it at the last token, so what is saved and loaded elsewhere gives the same scores.
    """
    context = getattr(reward_model.config, "max_position_embeddings", None)
    rows = [ids[-context:] if context else ids for ids in sequences]
    ids, mask = pad_rows(rows, reward_model.config.pad_token_id, "right", reward_model.device)
    return reward_model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


def reward_loss_sum(reward_model, comparisons: list[tuple]) -> Tensor:
    """−Σ log sigmoid(score(x, chosen) − score(x, rejected)): Bradley–Terry (Stiennon 2020, section 3.4)."""
    sequences = [prompt + chosen for prompt, chosen, _ in comparisons]
    sequences += [prompt + rejected for prompt, _, rejected in comparisons]
    chosen_scores, rejected_scores = reward_model_scores(reward_model, sequences).chunk(2)
    return -nn.functional.logsigmoid(chosen_scores - rejected_scores).sum()


def accumulate_gradients(loss_sum: Callable, model, examples: list, num_terms: int, microbatch_size: int, coef=1.0):
    """Add the gradient of coef · loss_sum / num_terms in microbatches. Returns: that mean loss, a float.

    Each part is divided by the number of terms of the whole minibatch. Averaging the averages of the parts would give
    the tokens of short microbatches more weight.
    """
    mean_loss = 0.0
    for start in range(0, len(examples), microbatch_size):
        loss = loss_sum(model, examples[start : start + microbatch_size]) / num_terms
        (coef * loss).backward()
        mean_loss += loss.item()
    return mean_loss


def lr_scale(step: int, num_steps: int, warmup: int = 0, anneal: bool = True) -> float:
    """Factor on the learning rate at step 1 … num_steps: linear warm-up, then linear decay to 0."""
    scale = 1 - (step - 1) / num_steps if anneal else 1.0
    return scale * min(1.0, step / warmup) if warmup else scale


def shuffled_minibatches(examples: list, epochs: int, size: int, rng: random.Random) -> list[list]:
    """Every example once per epoch, in a new order each time."""
    shuffled = [rng.sample(examples, len(examples)) for _ in range(epochs)]
    return [epoch[start : start + size] for epoch in shuffled for start in range(0, len(epoch), size)]


def fit(
    name: str, model, minibatches: list, loss_sum: Callable, count_terms: Callable, learning_rate: float, args: Args, log
) -> None:
    """Minimise the mean loss, one optimizer step per minibatch: Adam, learning rate linear to 0."""
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5)  # eps: [37 details, core #3]
    start_time = time.perf_counter()
    for step, minibatch in enumerate(minibatches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate * lr_scale(step, len(minibatches))
        loss = accumulate_gradients(loss_sum, model, minibatch, count_terms(minibatch), args.microbatch_size)
        require_finite(loss, f"{name} step {step}: loss")
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.scalars({f"{name}/loss": loss}, step)
        if step % max(1, len(minibatches) // 8) == 0:
            print(f"{name:<12} step {step:>5}/{len(minibatches)} | loss {loss:.3f} nats | "
                  f"{time.perf_counter() - start_time:.0f} s", flush=True)  # fmt: skip


def require_finite(value: float, name: str) -> None:
    """Stop the run before a NaN reaches the weights; what was saved last stays intact."""
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}; lower the learning rate, or check rewards and dtype")


@torch.no_grad()
def perplexity(policy: Policy, demonstrations: list[tuple], microbatch_size: int) -> float:
    """exp of the mean loss per response token."""
    parts = [demonstrations[i : i + microbatch_size] for i in range(0, len(demonstrations), microbatch_size)]
    return math.exp(sum(sft_loss_sum(policy, x).item() for x in parts) / count_response_tokens(demonstrations))


@torch.no_grad()
def reward_model_accuracy(reward_model, comparisons: list[tuple], microbatch_size: int) -> float:
    """Share of comparisons in which the chosen response scores higher; a coin has 0.5, the annotator's noise a limit."""
    correct = 0
    for start in range(0, len(comparisons), microbatch_size):
        prompts, chosen, rejected = zip(*comparisons[start : start + microbatch_size], strict=True)
        chosen_scores = reward_model_scores(reward_model, [x + y for x, y in zip(prompts, chosen, strict=True)])
        rejected_scores = reward_model_scores(reward_model, [x + y for x, y in zip(prompts, rejected, strict=True)])
        correct += (chosen_scores > rejected_scores).sum().item()
    return correct / len(comparisons)


def compare_own_samples(policy: Policy, prompts: list[list[int]], num_pairs: int, tokenizer, args: Args) -> list[tuple]:
    """Pairs of the SFT model's own samples, labelled by the simulated annotator of the embedded task."""
    rng, generator = random.Random(args.seed), torch.Generator(policy.eos_ids.device).manual_seed(args.seed)
    comparisons = []
    for start in range(0, num_pairs, args.batch_size):
        chunk = rng.choices(prompts, k=min(args.batch_size, num_pairs - start))
        pair = []
        for _ in range(2):
            prompt_ids, prompt_mask = pad_rows(chunk, policy.pad_id, "left", policy.eos_ids.device)
            ids, mask, ended = sample_responses(policy, prompt_ids, prompt_mask, args.response_len, generator)
            responses = unpad_rows(ids, mask)
            texts = decode_texts(tokenizer, chunk, responses)
            golds = [gold_reward(*text, end) for text, end in zip(texts, ended.tolist(), strict=True)]
            pair.append((responses, golds))
        (first, gold_first), (second, gold_second) = pair
        for prompt, x, y, gold_x, gold_y in zip(chunk, first, second, gold_first, gold_second, strict=True):
            comparisons.append((prompt, x, y) if prefers_first(gold_x, gold_y, rng) else (prompt, y, x))
    return comparisons


# ======================================================================================================================
# The PPO math: pure functions of tensors
# ======================================================================================================================


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled from π, in nats.

    With d = logprobs − ref_logprobs:  k1 = d (unbiased; may be negative),  k2 = ½·d²,  k3 = exp(−d) − 1 + d (unbiased,
    never negative). A good estimate is not yet a good gradient: in the reward, which is not differentiated, k1 gives the
    gradient of the KL; differentiated in the loss, k2 does for the tokens at hand, k1 gives zero and k3 another direction.

    Args and result: (batch, response_len). Source: Schulman, "Approximating KL divergence" (2020).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"kl_penalty: estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """rₜ = −kl_coef·klₜ, plus the score at the last real token of the response.

    The score belongs to the token that completes the response (EOS, or the last one before the length limit). trl adds
    it one slot later, where λ < 1 dilutes it. Dense scores are added token by token.

    Args: scores (batch,), or (batch, response_len) if dense; kl and response_mask (batch, response_len).
    Returns: (batch, response_len), 0 in the padding. Source: Ziegler 2019, eq. 2; InstructGPT, eq. 2.
    """
    check_same_shape(kl=kl, response_mask=response_mask)
    if scores.dim() == 1:
        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
        scores = torch.zeros_like(kl).scatter(1, last_token_idx, scores.unsqueeze(1))
    check_same_shape(scores=scores, kl=kl)
    return torch.where(response_mask, scores - kl_coef * kl, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last token backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·Vₜ₊₁ − Vₜ,  where A and V are 0 after the last response token.
    Returns are the critic's targets: Aₜ + Vₜ. With λ = γ = 1 they are the sums of the rewards still to come.

    Args: rewards, values, mask (batch, response_len). Returns: advantages, returns (batch, response_len), 0 in padding.
    Source: Schulman et al. 2015 (1506.02438), eq. 16; PPO paper (1707.06347), eqs. 11-12.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)  # padding must not bootstrap into tokens
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])  # (batch,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0)
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float):
    """The clipped surrogate, negated:  L = −E[ min( ratio·A, clip(ratio, 1 − ε, 1 + ε)·A ) ].

    ratio = π_new / π_old, against the policy that sampled, not the reference. Once it has left [1 − ε, 1 + ε] in the
    direction that A rewards, the gradient is zero: the step is far enough.

    Args: all (batch, response_len); clip_coef is ε. Returns: loss; clipfrac, the share of tokens whose gradient is cut.
    Source: PPO paper, eq. 7.
    """
    check_same_shape(new_logprobs=new_logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
    return -masked_mean(torch.min(unclipped, clipped), mask), masked_mean((clipped < unclipped).float(), mask)


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, vf_clip_coef: float):
    """½·E[ max( (V − R)², (clip(V, V_old ± c) − R)² ) ].

    Clipping keeps one batch from dragging the critic far; control studies see no gain in it, RLHF codes keep it
    [37 details, core #9]. c is in units of the return: with returns far above 1, raise it or normalise the scores.

    Args: all (batch, response_len). Returns: loss; clipfrac, the share of tokens for which the clipped term counts.
    """
    check_same_shape(new_values=new_values, old_values=old_values, returns=returns, mask=mask)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    unclipped = torch.where(mask, new_values - returns, 0) ** 2  # where before the square: padding sends no gradient
    clipped = torch.where(mask, old_values + change - returns, 0) ** 2
    return 0.5 * masked_mean(torch.max(unclipped, clipped), mask), masked_mean((clipped > unclipped).float(), mask)


def adaptive_kl_coef(kl_coef: float, observed_kl: float, kl_target: float, num_episodes: int, kl_horizon: int) -> float:
    """Raise the coefficient where KL is above target, lower it below:  β ← β·(1 + e·n/h),  e = clip(KL/target − 1, ±0.2).

    Args: observed_kl and kl_target in nats per response; num_episodes n since the last call, kl_horizon h in episodes.
    Source: Ziegler 2019, section 2.2.
    """
    error = max(-0.2, min(0.2, observed_kl / kl_target - 1))
    return kl_coef * (1 + error * num_episodes / kl_horizon)


# ======================================================================================================================
# Stage 3: scoring. One function score(prompts, responses) of token ids, chosen once; PPO does not know which it is
# ======================================================================================================================


@torch.no_grad()
def score_by_ids(prompts: list[list[int]], responses: list[list[int]], *, reward_model, microbatch_size: int) -> Tensor:
    """Scores (batch,) of a reward model that shares the policy's tokenizer."""
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    parts = [sequences[i : i + microbatch_size] for i in range(0, len(sequences), microbatch_size)]
    return torch.cat([reward_model_scores(reward_model, part) for part in parts])


def score_by_text(
    prompts: list[list[int]], responses: list[list[int]], *, reward_model, reward_tokenizer, tokenizer, eos_ids, microbatch_size
) -> Tensor:
    """Scores (batch,) of a reward model with a tokenizer of its own, fed with re-tokenised text."""
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    rows = reward_tokenizer(texts)["input_ids"]
    eos_id = reward_tokenizer.eos_token_id
    for row, response in zip(rows, responses, strict=True):
        if response[-1] in eos_ids and eos_id is not None and row[-1:] != [eos_id]:
            row.append(eos_id)  # a finished response is finished in the other language too
    return score_by_ids([[]] * len(rows), rows, reward_model=reward_model, microbatch_size=microbatch_size)


def score_by_function(prompts: list[list[int]], responses: list[list[int]], *, function, name, tokenizer) -> Tensor:
    """Scores (batch,), or (batch, longest response) if dense, of a Python function of texts."""
    prompt_texts, response_texts = map(list, zip(*decode_texts(tokenizer, prompts, responses), strict=True))
    inputs = [prompt_texts, response_texts]
    if len(inspect.signature(function).parameters) > 2:
        inputs.append([[tokenizer.decode([token]) for token in response] for response in responses])
    try:
        scores = function(*inputs)
        if len(scores) != len(responses):
            raise ValueError(f"it returned {len(scores)} scores for {len(responses)} responses")
        for text, ids, score in zip(response_texts, responses, scores, strict=True):
            wanted = len(ids) if isinstance(score, list | tuple) else 1
            numbers = score if isinstance(score, list | tuple) else [score]
            if len(numbers) != wanted or not all(math.isfinite(x) for x in numbers):
                raise ValueError(f"it returned {score!r} for the {len(ids)} tokens of {text!r}")
    except Exception as error:  # the function is the user's: anything may go wrong in it
        refuse(f"--reward-fn {name} failed on responses such as {response_texts[0]!r} ({type(error).__name__}: {error}); "
               "return one finite number per response, or one list with a number per token.")  # fmt: skip
    if isinstance(scores[0], list | tuple):
        return nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=torch.float32) for x in scores], batch_first=True)
    return torch.tensor([float(x) for x in scores])


def load_reward_fn(name: str) -> Callable:
    """The function FUNCTION of FILE.py, for --reward-fn FILE.py:FUNCTION."""
    path, _, function_name = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward_fn", path)
    if spec is None or not Path(path).is_file():
        refuse(f"--reward-fn {name}: there is no Python file {path!r}; give FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function_name, None)):
        refuse(f"--reward-fn {name}: {path} defines no function {function_name!r}; give FILE.py:FUNCTION.")
    return getattr(module, function_name)


# ======================================================================================================================
# Stage 3: rollout
# ======================================================================================================================


@dataclass
class Rollout:
    """Everything known about one batch of episodes. A row, with a prompt of 3 tokens and a response of 4:

        column of sequence_ids    0    1    2    3    4  |   5    6    7    8    9
                                 PAD  PAD  the  plot  :  |  was  dull   .   EOS  PAD
        sequence_mask             -    -    1    1    1  |   1    1    1    1    -
        column of the fields below                       |   0    1    2    3    4
        response_mask                                    |   1    1    1    1    -
        read at sequence column                          |   4    5    6    7    -     logprobs and values: made before
        rewards                                          |  -kl  -kl  -kl  -kl   -     the token they stand for is seen
                                                                      + score

    Token t of the response is scored by the logits one column earlier: V₀ is read at the last prompt token. The value
    after EOS is 0: the episode is over. PAD slots hold nothing; every mean goes through response_mask.
    """

    sequence_ids: Tensor  # (batch, seq_len)
    sequence_mask: Tensor  # (batch, seq_len), bool
    response_mask: Tensor  # (batch, response_len), bool
    ended: Tensor  # (batch,), bool: by EOS, not by the length limit
    old_logprobs: Tensor  # (batch, response_len), nats
    ref_logprobs: Tensor  # (batch, response_len), nats
    entropies: Tensor  # (batch, response_len), nats
    old_values: Tensor  # (batch, response_len), units of the normalised score
    scores: Tensor | None = None  # (batch,) or (batch, response_len), raw
    rewards: Tensor | None = None  # (batch, response_len), normalised score and KL
    advantages: Tensor | None = None  # (batch, response_len)
    returns: Tensor | None = None  # (batch, response_len)

    @property
    def response_len(self) -> int:
        """Columns of the response part: the longest response of this batch."""
        return self.response_mask.shape[1]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        length = self.sequence_ids.shape[1] - self.response_len
        return unpad_rows(self.sequence_ids[:, :length], self.sequence_mask[:, :length])

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        return unpad_rows(self.sequence_ids[:, -self.response_len :], self.response_mask)

    def rows(self, index: Tensor) -> "Rollout":
        """The rollout of some episodes only."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{name: None if x is None else x[index] for name, x in picked.items()})


@torch.no_grad()
def sample_responses(
    policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, response_len: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample token by token with a KV cache until every row has met EOS or response_len.

    Args: prompt_ids and prompt_mask (batch, prompt_len), padded on the left.
    Returns: response_ids and response_mask (batch, longest response), padded on the right; ended (batch,).
    """
    ids, mask, cache = prompt_ids, prompt_mask, None
    ended = torch.zeros_like(prompt_mask[:, 0])  # (batch,)
    response_ids, response_mask = [], []
    for _ in range(response_len):
        logits, output = policy.logits(ids, mask, num_last=1, past_key_values=cache, use_cache=True)
        sampled = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator).squeeze(1)  # (batch,)
        response_ids.append(torch.where(ended, policy.pad_id, sampled))
        response_mask.append(~ended)
        ids, cache = response_ids[-1].unsqueeze(1), output.past_key_values
        mask = torch.cat([mask, response_mask[-1].unsqueeze(1)], dim=1)
        ended = ended | torch.isin(sampled, policy.eos_ids)
        if ended.all():
            break
    return torch.stack(response_ids, dim=1), torch.stack(response_mask, dim=1), ended


@torch.no_grad()
def collect_rollout(
    actor_critic: ActorCritic, reference: Policy, prompts: list[list[int]], args: Args, generator: torch.Generator
) -> Rollout:
    """Sample one response per prompt, then read log-probabilities, values and reference log-probabilities."""
    policy = actor_critic.policy
    prompt_ids, prompt_mask = pad_rows(prompts, policy.pad_id, "left", policy.eos_ids.device)
    response_ids, response_mask, ended = sample_responses(policy, prompt_ids, prompt_mask, args.response_len, generator)
    sequence_ids = torch.cat([prompt_ids, response_ids], dim=1)  # (batch, seq_len)
    sequence_mask = torch.cat([prompt_mask, response_mask], dim=1)
    read = []
    for rows in torch.arange(len(prompts)).split(args.microbatch_size):
        inputs = sequence_ids[rows], sequence_mask[rows], response_ids.shape[1]
        # Old log-probabilities come from the update's forward pass, not from the sampler's: its KV cache rounds
        # differently, and the ratio would start away from 1.
        old_logprobs, entropies, old_values = actor_critic(*inputs)
        ref_logprobs, _, _ = reference(*inputs)
        read.append((old_logprobs, ref_logprobs, entropies, old_values))
    read = [torch.cat(parts) for parts in zip(*read, strict=True)]
    return Rollout(sequence_ids, sequence_mask, response_mask, ended, *read)


class ScoreNorm:
    """Shift and scale of the scores that PPO sees: fixed, or following the running mean and variance."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, running: bool = False):
        self.mean, self.std, self.running = mean, std, running
        self.count = 0

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalise scores, after taking them into the running statistics (parallel variance, Chan et al. 1979)."""
        if self.running:
            total, delta = self.count + len(scores), scores.mean().item() - self.mean
            m2 = self.std**2 * self.count + scores.var(correction=0).item() * len(scores)
            m2 += delta**2 * self.count * len(scores) / total
            self.mean += delta * len(scores) / total
            self.count, self.std = total, math.sqrt(m2 / total)
        return (scores - self.mean) / (self.std + 1e-8)


def compute_rewards(rollout: Rollout, score_norm: ScoreNorm, kl_coef: float, args: Args) -> Tensor:
    """Per-token rewards from raw scores and KL. Returns: (batch, response_len)."""
    scores = score_norm(rollout.scores)
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    # A response cut at the length limit ends its episode there (nothing is bootstrapped) and pays for it. Rivals: put a
    # fixed −1 in place of its score (Ziegler, Stiennon), or bootstrap from the critic as control tasks do.
    penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = token_rewards(scores, kl, rollout.response_mask, kl_coef if args.kl_in == "reward" else 0.0)
    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), rollout.response_mask, 0.0)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.response_mask, shift_mean=False)
    return rewards


def compute_advantages(rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (batch, response_len) each. Returns are never whitened: the critic needs their scale."""
    advantages, returns = gae(rollout.rewards, rollout.old_values, rollout.response_mask, args.gamma, args.gae_lambda)
    if args.norm_advantages:  # over the whole batch; per minibatch (CleanRL) is noisier, since few tokens share a scale
        advantages = masked_whiten(advantages, rollout.response_mask)
    return advantages, returns


# ======================================================================================================================
# Stage 3: update
# ======================================================================================================================


def update_policy(
    actor_critic: ActorCritic, optimizer, rollout: Rollout, kl_coef: float, args: Args, rng: random.Random, backward_ptx: Callable
) -> dict[str, float]:
    """Several epochs of minibatch steps on one batch. Returns: each statistic, as its mean over the steps taken."""
    steps = []
    for _ in range(args.update_epochs):
        epoch = []
        for rows in shuffled_minibatches(range(len(rollout.ended)), 1, args.minibatch_size, rng):
            stats = backward_minibatch(actor_critic, rollout.rows(torch.tensor(rows)), kl_coef, args)
            if args.ptx_coef > 0:
                stats["ptx_loss"] = backward_ptx(rng)
            stats["grad_norm"] = nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm).item()
            for name, value in stats.items():
                require_finite(value, f"update step {len(steps) + len(epoch) + 1}: {name}")
            optimizer.step()
            optimizer.zero_grad()
            epoch.append(stats)
        steps += epoch
        if args.target_kl is not None and sum(x["approx_kl"] for x in epoch) / len(epoch) > args.target_kl:
            break
    ratio_first = steps[0]["ratio_first"]  # before any step of this iteration: must be 1
    return {name: sum(x[name] for x in steps) / len(steps) for name in steps[0]} | {"ratio_first": ratio_first}


def backward_ptx(rng: random.Random, *, sft_policy: Policy, demonstrations: list[tuple], args: Args) -> float:
    """Add the gradient of the SFT loss on as many demonstrations as a minibatch has responses (InstructGPT's PPO-ptx)."""
    sample = rng.choices(demonstrations, k=args.minibatch_size)
    num_terms = count_response_tokens(sample)
    return accumulate_gradients(sft_loss_sum, sft_policy, sample, num_terms, args.microbatch_size, args.ptx_coef)


def backward_minibatch(actor_critic: ActorCritic, minibatch: Rollout, kl_coef: float, args: Args) -> dict[str, float]:
    """Add the gradient of the PPO loss on one minibatch, in microbatches weighted by their tokens. Returns: statistics.

    loss = policy loss + vf_coef · value loss − ent_coef · entropy (+ kl_coef · KL with --kl-in loss): PPO paper, eq. 9.
    """
    num_tokens = minibatch.response_mask.sum()
    totals, ratio_first = {}, 1.0
    for rows in torch.arange(len(minibatch.ended)).split(args.microbatch_size):
        batch = minibatch.rows(rows)
        mask = batch.response_mask
        outputs = actor_critic(batch.sequence_ids, batch.sequence_mask, batch.response_len)
        new_logprobs, entropies, new_values = outputs  # (microbatch, response_len) each
        pg_loss, clipfrac = policy_loss(new_logprobs, batch.old_logprobs, batch.advantages, mask, args.clip_coef)
        vf_loss, vf_clipfrac = value_loss(new_values, batch.old_values, batch.returns, mask, args.vf_clip_coef)
        mean_entropy = masked_mean(entropies, mask)
        loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy
        if args.kl_in == "loss":
            loss = loss + kl_coef * masked_mean(kl_penalty(new_logprobs, batch.ref_logprobs, args.kl_estimator), mask)
        share = mask.sum() / num_tokens
        (share * loss).backward()
        with torch.no_grad():
            approx_kl = masked_mean(kl_penalty(batch.old_logprobs, new_logprobs, "k3"), mask)
            ratio = torch.exp(torch.where(mask, new_logprobs - batch.old_logprobs, 0))
            ratio_first = max(ratio_first, ratio.flatten()[(ratio - 1).abs().argmax()].item(), key=lambda x: abs(x - 1))
        stats = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy, "approx_kl": approx_kl,
                 "clipfrac": clipfrac, "vf_clipfrac": vf_clipfrac}  # fmt: skip
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + (share * value).item()
    return totals | {"ratio_first": ratio_first}


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns): 1 is a perfect critic, 0 a constant one, below 0 worse than that."""
    residual = returns - values
    unexplained = masked_mean((residual - masked_mean(residual, mask)) ** 2, mask)
    return 1 - unexplained / (masked_mean((returns - masked_mean(returns, mask)) ** 2, mask) + 1e-8)


# ======================================================================================================================
# From here on, bookkeeping: metrics, evaluation, files
# ======================================================================================================================


def response_scores(rollout: Rollout) -> Tensor:
    """Raw score of each response (batch,); dense ones are summed over its tokens."""
    return rollout.scores if rollout.scores.dim() == 1 else rollout.scores.sum(dim=1)


def response_golds(rollout: Rollout, tokenizer) -> Tensor:
    """Gold reward of each response of the embedded task (batch,)."""
    texts = decode_texts(tokenizer, rollout.prompts, rollout.responses)
    return torch.tensor([gold_reward(*text, end) for text, end in zip(texts, rollout.ended.tolist(), strict=True)])


def rollout_metrics(rollout: Rollout, tokenizer, embedded: bool) -> dict[str, float]:
    """What the sampled responses are like: raw scores, KL in nats per response, lengths in tokens, shares."""
    mask, scores, ended = rollout.response_mask, response_scores(rollout), rollout.ended.tolist()
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")
    bigrams = [pair for response in rollout.responses for pair in zip(response, response[1:], strict=False)]
    metrics = {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "kl": torch.where(mask, kl, 0).sum(dim=1).mean().item(),
        "response_len": mask.sum(dim=1).float().mean().item(),
        "eos_share": sum(ended) / len(ended),
        "entropy": masked_mean(rollout.entropies, mask).item(),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
    }
    if embedded:
        texts = decode_texts(tokenizer, rollout.prompts, rollout.responses)
        metrics["gold_mean"] = response_golds(rollout, tokenizer).mean().item()
        metrics["grammatical"] = sum(is_grammatical(*text, end) for text, end in zip(texts, ended, strict=True)) / len(ended)
    return metrics


def evaluate(actor_critic, reference, score: Callable, data: Data, tokenizer, args: Args) -> tuple[dict, Rollout]:
    """Metrics on the evaluation prompts, sampled with the same seed before and after PPO; and perplexity."""
    device = actor_critic.policy.eos_ids.device
    generator = torch.Generator(device).manual_seed(args.seed)
    rollout = collect_rollout(actor_critic, reference, data.eval_prompts, args, generator)
    rollout.scores = score(rollout.prompts, rollout.responses).to(device)
    metrics = rollout_metrics(rollout, tokenizer, args.dataset == "reviews")
    if data.eval_demonstrations:
        metrics["perplexity"] = perplexity(actor_critic.policy, data.eval_demonstrations, args.microbatch_size)
    return metrics, rollout


def print_before_after(before: tuple[dict, Rollout], after: tuple[dict, Rollout], tokenizer, embedded: bool) -> None:
    """The table that a run ends with, and two responses side by side."""
    quality = [response_golds(x, tokenizer) if embedded else response_scores(x) for _, x in (before, after)]
    wins = (quality[1] > quality[0]).float() + 0.5 * (quality[1] == quality[0]).float()
    rows = {
        "score_mean": "score (raw)", "gold_mean": "gold reward", "grammatical": "grammatical",
        "kl": "KL to the reference, nats", "response_len": "response, tokens", "eos_share": "ended by EOS",
        "distinct_2": "distinct bigrams", "perplexity": "perplexity of demonstrations",
    }  # fmt: skip
    print(f"\n{'on ' + str(len(wins)) + ' evaluation prompts':<34}{'SFT':>10}{'PPO':>10}")
    for key, label in rows.items():
        if key in before[0]:
            print(f"{label:<34}{before[0][key]:>10.3f}{after[0][key]:>10.3f}")
    print(f"{'win rate by ' + ('gold' if embedded else 'score'):<34}{0.5:>10.3f}{wins.mean().item():>10.3f}")
    texts = [decode_texts(tokenizer, x.prompts[:2], x.responses[:2]) for _, x in (before, after)]
    for (prompt, old), (_, new) in zip(*texts, strict=True):
        print(f"\nprompt  {prompt}\n  SFT   {old}\n  PPO   {new}")


class RunLog:
    """The files of one run: TensorBoard events, metrics.jsonl, samples.jsonl."""

    def __init__(self, run_dir: Path, args: Args):
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True)
        self.run_dir, self.writer = run_dir, SummaryWriter(str(run_dir))
        self.writer.add_text("args", "\n".join(f"    {key}: {value}" for key, value in asdict(args).items()))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points of curves."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def append(self, file: str, record: dict) -> None:
        """One line of a jsonl file."""
        with open(self.run_dir / file, "a") as lines:
            lines.write(json.dumps(record) + "\n")

    def iteration(self, iteration: int, num_iterations: int, metrics: dict[str, float]) -> None:
        """One PPO iteration: a line on the console, points in TensorBoard at this number of episodes, a jsonl object."""
        self.scalars({key: value for key, value in metrics.items() if "/" in key}, metrics["episodes"])
        self.append("metrics.jsonl", metrics)
        m = {key.split("/")[-1]: value for key, value in metrics.items()}
        gold = f"gold {m['gold_mean']:6.2f} | grammatical {m['grammatical']:4.0%} | " if "gold_mean" in m else ""
        print(f"ppo {iteration:>5}/{num_iterations} | score {m['score_mean']:6.2f} | {gold}KL {m['kl']:5.2f} nats | "
              f"{m['response_len']:4.1f} tokens | EOS {m['eos_share']:4.0%} | clipped {m['clipfrac']:3.0%} | "
              f"{m['episodes_per_s']:.0f} episodes/s", flush=True)  # fmt: skip

    def samples(self, metrics: dict[str, float], rollout: Rollout, tokenizer) -> None:
        """The first two responses of a batch, with score, KL and what PPO maximises (normalised score less KL)."""
        kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")
        texts = decode_texts(tokenizer, rollout.prompts[:2], rollout.responses[:2])
        for i, (prompt, response) in enumerate(texts):
            record = {"iteration": metrics["iteration"], "episodes": metrics["episodes"], "prompt": prompt, "response": response,
                      "score": response_scores(rollout)[i].item(), "kl": kl[i][rollout.response_mask[i]].sum().item(),
                      "total": rollout.rewards[i].sum().item()}  # fmt: skip
            self.append("samples.jsonl", record)
            print(f"    score {record['score']:.2f}, KL {record['kl']:.2f} nats, total {record['total']:.2f}: "
                  f"{prompt[-60:]!r} -> {response!r}")  # fmt: skip
            self.writer.add_text("samples", f"{prompt}\n\n**{response}**", metrics["episodes"])


def save_policy(policy: Policy, tokenizer, run_dir: Path) -> None:
    """Write policy/, for AutoModelForCausalLM. Its generation config samples what was trained: no top-p, no penalty."""
    from transformers import GenerationConfig

    eos_ids, banned_ids = policy.eos_ids.tolist(), policy.banned_ids.tolist()
    policy.lm.generation_config = GenerationConfig(
        do_sample=True, temperature=policy.temperature, top_k=0, top_p=1.0, eos_token_id=eos_ids,
        pad_token_id=policy.pad_id, bos_token_id=tokenizer.bos_token_id, suppress_tokens=banned_ids or None,
    )  # fmt: skip
    policy.lm.save_pretrained(run_dir / "policy")
    tokenizer.save_pretrained(run_dir / "policy")


# ======================================================================================================================
# main: the table of contents
# ======================================================================================================================


def prepare_data(args: Args):
    """Read the texts, load or make the policy's language model, encode. Returns: language model, tokenizer, Data."""
    demonstrations, comparisons = [], []
    if args.dataset == "reviews":
        demonstrations = draw_reviews(6000, random.Random(args.seed))
        prompts = [prompt for prompt, _ in demonstrations]
    else:
        rows = read_rows("--dataset", args.dataset, args.dataset_split)
        if "rejected" in rows[0]:
            comparisons = [split_pair(row) for row in rows]
            demonstrations = [(prompt, chosen) for prompt, chosen, _ in comparisons]
        prompts = [x[0] for x in comparisons] or [row["prompt"] for row in rows]
    if args.sft_dataset is not None:
        rows = read_rows("--sft-dataset", args.sft_dataset, "train")
        demonstrations = [(row.get("prompt") or "", row.get("completion", row.get("text"))) for row in rows]
    lm, tokenizer = load_policy_model(args, [str(text) for example in comparisons for text in example])
    return lm, tokenizer, load_data(args, tokenizer, prompts, demonstrations, comparisons)


def choose_score(args: Args, tokenizer, eos_ids: list[int], reward_model, reward_tokenizer) -> Callable:
    """The function score(prompts, responses) of this run."""
    size = args.microbatch_size
    if args.reward_fn is not None:
        function = load_reward_fn(args.reward_fn)
        return functools.partial(score_by_function, function=function, name=args.reward_fn, tokenizer=tokenizer)
    if tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items():
        return functools.partial(score_by_ids, reward_model=reward_model, microbatch_size=size)
    return functools.partial(score_by_text, reward_model=reward_model, reward_tokenizer=reward_tokenizer,
                             tokenizer=tokenizer, eos_ids=eos_ids, microbatch_size=size)  # fmt: skip


def make_actor_critic(args: Args, policy: Policy, reward_model) -> ActorCritic:
    """Policy and critic; a separate critic starts from the reward model if that reads the policy's tokens."""
    if args.critic == "shared":
        return ActorCritic(policy)
    head = getattr(reward_model, "score", None)
    if isinstance(head, nn.Linear):
        return ActorCritic(policy, copy.deepcopy(reward_model.base_model).requires_grad_(True), head.weight)
    return ActorCritic(policy, copy.deepcopy(policy.lm.base_model))


def prompt_batch(prompts: list, iteration: int, batch_size: int, seed: int) -> list:
    """Batch number iteration (from 1) of an endless pass over the prompts, in a new order each time round."""
    batch = []
    for i in range((iteration - 1) * batch_size, iteration * batch_size):
        epoch, idx = divmod(i, len(prompts))
        batch.append(prompts[shuffled_indices(len(prompts), f"{seed} {epoch}")[idx]])
    return batch


@functools.lru_cache(maxsize=2)
def shuffled_indices(length: int, seed: str) -> list[int]:
    """A permutation of range(length), a function of its arguments alone."""
    return random.Random(seed).sample(range(length), length)


def main(args: Args) -> None:
    """The whole run."""
    args = resolve_args(args)
    device = torch.device("cuda" if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()) else "cpu")
    embedded, run_dir = args.dataset == "reviews", Path(args.output_dir) / args.run_name
    torch.manual_seed(args.seed)

    lm, tokenizer, data = prepare_data(args)
    eos_ids = end_token_ids(lm, tokenizer)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    policy = Policy(lm, pad_id, eos_ids, args.temperature, args.dtype).to(device)
    sft_policy = Policy(lm, pad_id, eos_ids, 1.0, args.dtype).to(device)  # same weights; demonstrations are at temperature 1
    reward_model = reward_tokenizer = None
    if args.reward_model is not None:
        reward_model, reward_tokenizer = load_reward_model(args.reward_model)
        reward_model.to(device)
    log = RunLog(run_dir, args)
    num_iterations = args.total_episodes // args.batch_size

    if args.sft_epochs > 0:
        minibatches = shuffled_minibatches(data.demonstrations, args.sft_epochs, args.minibatch_size, random.Random(args.seed))
        fit("sft", sft_policy, minibatches, sft_loss_sum, count_response_tokens, args.sft_learning_rate, args, log)
        print(f"sft          perplexity {perplexity(sft_policy, data.eval_demonstrations, args.microbatch_size):.2f}")
        save_policy(policy, tokenizer, run_dir)

    if args.reward_model is None and args.reward_fn is None:
        if embedded:
            data.comparisons = compare_own_samples(policy, data.prompts, 2000, tokenizer, args)
            data.eval_comparisons = compare_own_samples(policy, data.eval_prompts, 256, tokenizer, args)
        reward_model, reward_tokenizer = new_reward_model(lm, tokenizer)
        minibatches = shuffled_minibatches(data.comparisons, args.reward_epochs, args.minibatch_size, random.Random(args.seed))
        fit("reward_model", reward_model, minibatches, reward_loss_sum, len, args.reward_learning_rate, args, log)
        accuracy = reward_model_accuracy(reward_model, data.eval_comparisons, args.microbatch_size)
        print(f"reward_model accuracy {accuracy:.3f} on {len(data.eval_comparisons)} held-out comparisons")
        log.scalars({"reward_model/accuracy": accuracy}, len(minibatches))
        reward_model.save_pretrained(run_dir / "reward_model")
        reward_tokenizer.save_pretrained(run_dir / "reward_model")
    if reward_model is not None:
        freeze(reward_model)

    reference = freeze(copy.deepcopy(policy))
    score = choose_score(args, tokenizer, eos_ids, reward_model, reward_tokenizer)
    actor_critic = make_actor_critic(args, policy, reward_model).to(device)
    critic_parameters = [x for name, x in actor_critic.named_parameters() if not name.startswith("policy.")]
    optimizer = torch.optim.Adam(
        [{"params": list(policy.parameters()), "peak": args.learning_rate},
         {"params": critic_parameters, "peak": args.critic_learning_rate}], eps=1e-5)
    before = evaluate(actor_critic, reference, score, data, tokenizer, args)
    score_norm = ScoreNorm(running=args.score_norm == "running")
    if args.score_norm == "sft":
        scores = before[1].scores
        score_norm = ScoreNorm(scores.mean().item(), scores.std().item())

    kl_coef = args.kl_coef
    generator = torch.Generator(device)
    for iteration in range(1, num_iterations + 1):
        times = [time.perf_counter()]
        scale = lr_scale(iteration, num_iterations, args.lr_warmup, args.anneal_lr)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        generator.manual_seed(args.seed * 1_000_003 + iteration)
        prompts = prompt_batch(data.prompts, iteration, args.batch_size, args.seed)
        rollout = collect_rollout(actor_critic, reference, prompts, args, generator)
        times.append(time.perf_counter())
        rollout.scores = score(rollout.prompts, rollout.responses).to(device)
        times.append(time.perf_counter())
        rollout.rewards = compute_rewards(rollout, score_norm, kl_coef, args)
        rollout.advantages, rollout.returns = compute_advantages(rollout, args)
        stats = update_policy(actor_critic, optimizer, rollout, kl_coef, args, random.Random(f"{args.seed} {iteration}"),
                              functools.partial(backward_ptx, sft_policy=sft_policy, demonstrations=data.demonstrations, args=args))
        times.append(time.perf_counter())
        metrics = {"iteration": iteration, "episodes": iteration * args.batch_size, "wall_time": time.time()}
        metrics |= {f"rollout/{k}": v for k, v in rollout_metrics(rollout, tokenizer, embedded).items()}
        metrics["rollout/rewards_mean"] = masked_mean(rollout.rewards, rollout.response_mask).item()
        metrics |= {f"ppo/{k}": v for k, v in stats.items()}
        metrics["ppo/explained_variance"] = explained_variance(rollout.returns, rollout.old_values, rollout.response_mask).item()
        metrics |= {"ppo/kl_coef": kl_coef, "ppo/learning_rate": args.learning_rate * scale}
        metrics |= {"perf/rollout_s": times[1] - times[0], "perf/score_s": times[2] - times[1], "perf/update_s": times[3] - times[2]}
        metrics["perf/episodes_per_s"] = args.batch_size / (time.perf_counter() - times[0])
        log.iteration(iteration, num_iterations, metrics)
        if iteration % args.log_samples_interval == 0:
            log.samples(metrics, rollout, tokenizer)
    after = evaluate(actor_critic, reference, score, data, tokenizer, args)
    save_policy(policy, tokenizer, run_dir)
    print_before_after(before, after, tokenizer, embedded)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
