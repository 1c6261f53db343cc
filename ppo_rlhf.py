"""PPO for RLHF in one file: supervised fine-tuning, reward model, PPO. On CUDA or CPU.

    python ppo_rlhf.py                # three stages on the embedded task, 2 minutes on 2 cores
    python ppo_rlhf.py --kl-coef 0    # without the leash: watch the reward model being hacked
    python ppo_rlhf.py --dataset Anthropic/hh-rlhf --policy-model Qwen/Qwen2.5-0.5B

What is optimised, over prompts x and responses y (InstructGPT, eq. 2, without the pretraining):

    J(π) = E[ score(x, y) ] − kl_coef · E[ KL( π(·|x) ‖ π_ref(·|x) ) ],   y ~ π(·|x)

Stage 1  SFT           π_ref: the language model after maximum likelihood on demonstrations
Stage 2  reward model  score(x, y), such that P(y₁ ≻ y₂) = sigmoid(score(x, y₁) − score(x, y₂))
Stage 3  PPO           again and again: sample responses, score them, make score and KL into one
                       reward per token, estimate advantages (GAE), take a few clipped steps

A response is an episode, a token is an action, the tokens so far are the state. Shapes, in words:

    batch     responses per iteration      prompt_len     columns of prompts, padded on the left
    seq_len   prompt_len + response_len    response_len   columns of responses, padded on the right
    vocab     tokens of the model          hidden         width of its hidden states

    logprobs      log π(token | tokens before), in nats: old_ when sampled, new_ during the update,
                  ref_ under the frozen reference
    values        the critic's forecast of the rewards to come, made before the token is chosen
    scores        one number per response, from the reward model; rewards: one number per token
    response_mask True on the real tokens of a response, EOS included; every mean goes through it

Departures. From Ziegler 2019 (arXiv 1909.08593): responses end at EOS, rewards are not whitened,
kl_coef is fixed unless --kl-target is given, gradients are clipped. From Stiennon 2020
(2009.01325): the value head shares the policy's trunk; --critic separate is theirs. From
InstructGPT (2203.02155): 4 epochs per batch, not 1; no pretraining mix (--ptx-coef). From all
three: a response cut at the length limit pays --missing-eos-penalty; PAD has probability zero;
the critic learns at 10 times the policy's rate. Left out: see the README. Tags such as [N+
details, 22] number the lists of implementation details in "The 37 implementation details of PPO",
"The N implementation details of RLHF with PPO" and "The N+ implementation details of RLHF".
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

# transformers, tokenizers, datasets and tyro are imported by the functions that use them: whoever
# imports this file for its math needs torch alone.


# ==================================================================================================
# Settings
# ==================================================================================================


@dataclass
class Args:
    """Every setting of a run. A default of None follows from the others; the plan prints it."""

    # Data -----------------------------------------------------------------------------------------
    dataset: str = "reviews"
    """`reviews` (embedded), or preference data: Hub id, jsonl(.gz), parquet, save_to_disk folder"""
    dataset_split: str = "train"
    """split of --dataset, slices such as train[:1000] included"""
    sft_dataset: str | None = None
    """demonstrations with prompt/completion, or text (default: chosen responses of --dataset)"""
    max_prompt_len: int | None = None
    """tokens; longer prompts keep their last ones (default: 16 for reviews, else 512)"""
    response_len: int | None = None
    """tokens, the limit of every response (default: 32 for reviews, else 128)"""
    vocab_size: int = 4096
    """tokens of the BPE trained on --dataset when no --policy-model brings a tokenizer"""
    eval_prompts: int = 128
    """prompts held out for the before/after table; none if the data has fewer than 4 times that"""

    # Models ---------------------------------------------------------------------------------------
    policy_model: str | None = None
    """Hub id or folder of a causal language model; default: a small one, from scratch"""
    reward_model: str | None = None
    """Hub id or folder of a sequence classifier with one output (default: stage 2 trains one)"""
    reward_fn: str | None = None
    """FILE.py:FUNCTION with f(prompts, responses) -> one float per response, instead of a reward
    model. With a third parameter it also gets each response's token strings, and may return one
    list per response: a reward for every token"""
    sft_epochs: int = 1
    """passes over the demonstrations; 0: --policy-model already is the SFT model"""
    sft_learning_rate: float | None = None
    """peak of stage 1, linear to 0 (default: 3e-3 from scratch, else 1e-5)"""
    reward_epochs: int = 1
    """passes over the comparisons"""
    reward_learning_rate: float | None = None
    """peak of stage 2, linear to 0 (default: 1e-3 from scratch, else 1e-5)"""
    critic: Literal["shared", "separate"] = "shared"
    """value head on the policy's trunk, or a network of its own, started from the reward model if
    that reads the policy's tokens, else from the policy"""
    critic_learning_rate: float | None = None
    """of the value head and of a separate critic's trunk (default: 10 times --learning-rate)"""
    score_norm: Literal["none", "sft", "running"] | None = None
    """scores as they are; to mean 0 and std 1 on the SFT policy's responses, measured once before
    PPO; or by running statistics (default: sft for a reward model trained here, else none)"""
    ref_update_interval: int = 0
    """iterations after which the reference becomes a copy of the policy; 0: never"""

    # PPO ------------------------------------------------------------------------------------------
    total_episodes: int = 12_800
    """responses in all"""
    batch_size: int = 128
    """responses per iteration (one rollout and one update)"""
    minibatch_size: int = 32
    """responses per optimizer step; examples per step in stages 1 and 2"""
    microbatch_size: int | None = None
    """responses per forward and backward pass (sampling takes the whole batch); lower it to fit
    memory, the result stays the same (default: --minibatch-size)"""
    update_epochs: int = 4
    """passes over each batch"""
    learning_rate: float | None = None
    """of the policy in PPO (default: 1e-4 from scratch, else 3e-6)"""
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
    """approx_kl (old to new policy, nats per token) that ends the epochs of an iteration"""
    kl_coef: float = 0.05
    """weight of the KL to the reference, in score units per nat"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL enters: each token's reward, or the loss, beside advantages as normalised"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """per-token KL estimate: k1 for the reward (k2, k3 hardly hold there), k2 or k3 for the loss"""
    kl_target: float | None = None
    """nats per response that an adaptive kl_coef steers to; default: fixed kl_coef"""
    kl_horizon: int = 10_000
    """episodes over which the adaptive kl_coef reacts"""
    max_kl: float | None = None
    """nats per response of KL to the reference at which the run ends: PPO peaks, then hacks"""
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

    # Run ------------------------------------------------------------------------------------------
    seed: int = 1
    """of data, weights, sampling and shuffling"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the policy's and critic's matrix products (autocast); all that is stored stays float32"""
    output_dir: str = "runs"
    """folder of all runs"""
    run_name: str | None = None
    """folder of this run inside --output-dir; must not exist (default: data set, seed, time)"""
    save_interval: int = 20
    """iterations between two saves of policy/, which is also saved after SFT and at the end"""
    log_samples_interval: int = 20
    """iterations between two looks at sampled responses"""


def refuse(message: str) -> NoReturn:
    """End the run with exit status 2 and one sentence that names flag, value and remedy."""
    print(f"ppo_rlhf.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error.__cause__ or error}".split("\n")[0]


def resolve_args(args: Args) -> Args:
    """Fill in the defaults that depend on other settings, then refuse what cannot work."""
    embedded, scratch = args.dataset == "reviews", args.policy_model is None
    trains_reward_model = args.reward_model is None and args.reward_fn is None
    data_name, now = Path(args.dataset).name.split(".")[0], time.strftime("%Y%m%d-%H%M%S")
    defaults = {
        "max_prompt_len": 16 if embedded else 512,
        "response_len": 32 if embedded else 128,
        "sft_learning_rate": 3e-3 if scratch else 1e-5,
        "reward_learning_rate": 1e-3 if scratch else 1e-5,
        "learning_rate": 1e-4 if scratch else 3e-6,
        "score_norm": "sft" if trains_reward_model else "none",
        "microbatch_size": args.minibatch_size,
        "run_name": f"{data_name}__{args.seed}__{now}",
    }
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = replace(args, **missing)
    if args.critic_learning_rate is None:
        # At the policy's rate the critic follows too slowly: explained_variance stays below 0, and
        # the first noisy updates cost more grammar than 100 iterations of PPO repair.
        args = replace(args, critic_learning_rate=10 * args.learning_rate)
    check_args(args)
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    return args


# What numbers must satisfy, the condition in words, and the settings concerned (None is allowed).
RANGES = [
    (lambda x: x >= 1, "1 or more", """response_len max_prompt_len total_episodes batch_size
        minibatch_size microbatch_size update_epochs kl_horizon save_interval log_samples_interval
        eval_prompts"""),
    (lambda x: 0 < x < math.inf, "above 0", """temperature max_grad_norm target_kl kl_target max_kl
        score_clip clip_coef vf_clip_coef learning_rate critic_learning_rate sft_learning_rate
        reward_learning_rate"""),
    (lambda x: 0 <= x < math.inf, "0 or more", """sft_epochs reward_epochs ref_update_interval
        lr_warmup vf_coef ent_coef kl_coef missing_eos_penalty ptx_coef"""),
    (lambda x: 0 <= x <= 1, "from 0 to 1", "gamma gae_lambda"),
    (lambda x: x >= 258, "258 or more: 256 bytes, PAD and EOS", "vocab_size"),
]


def check_args(args: Args) -> None:
    """Refuse numbers out of range and settings that contradict each other."""
    for holds, wanted, names in RANGES:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                refuse(f"--{name.replace('_', '-')} {value} is out of range; it must be {wanted}.")
    sizes = ["total_episodes", "batch_size", "minibatch_size", "microbatch_size"]
    for whole, part in itertools.pairwise(sizes):
        if getattr(args, whole) % getattr(args, part):
            flags = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in (whole, part)]
            refuse(f"{flags[0]} is not a multiple of {flags[1]}; choose sizes that divide.")
    for contradiction, message in (
        (args.kl_target is not None and args.kl_coef == 0,
         f"--kl-target {args.kl_target} only multiplies --kl-coef, which is 0; start above 0."),
        (args.kl_target is not None and args.batch_size > args.kl_horizon,
         f"--kl-horizon {args.kl_horizon} is shorter than a batch; give at least --batch-size."),
        (args.kl_in == "loss" and args.kl_estimator == "k1",
         "--kl-in loss with --kl-estimator k1 has zero gradient in expectation; use k2 or k3."),
        (args.reward_model is not None and args.reward_fn is not None,
         f"--reward-fn {args.reward_fn} and --reward-model {args.reward_model}: drop one of them."),
        (args.sft_epochs == 0 and args.policy_model is None,
         "--sft-epochs 0 leaves a random policy; give the SFT model as --policy-model."),
        (args.reward_epochs == 0 and args.reward_model is None and args.reward_fn is None,
         "--reward-epochs 0 leaves a random reward model; give --reward-model or --reward-fn."),
        (args.device == "cuda" and not torch.cuda.is_available(),
         "--device cuda: PyTorch finds no CUDA device; use --device cpu."),
        ((Path(args.output_dir) / args.run_name).exists(),
         f"--run-name {args.run_name} exists in {args.output_dir}; choose another name."),
    ):
        if contradiction:
            refuse(message)


# ==================================================================================================
# Tensor helpers
# ==================================================================================================


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is True.

    Args: x and mask (bool), the same shape; dim: reduce this dimension, default all.
    Raises: ValueError if the shapes differ or a mean would be taken over nothing.
    """
    check_same_shape(x=x, mask=mask)
    # where, not x * mask: NaN times 0 is still NaN.
    total, count = torch.where(mask, x, 0).sum(dim), mask.sum(dim)
    if not (count > 0).all():
        raise ValueError(f"masked_mean: the mask of shape {tuple(mask.shape)} selects nothing")
    return total / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / std over the entries where mask is True; without shift_mean, + mean again.

    The variance is the biased one [N details, P9]. Entries outside the mask come back as 0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes agree: (batch,) minus (batch, 1) would just broadcast."""
    if len({x.shape for x in tensors.values()}) > 1:
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"shapes differ: {shapes}")


def logprobs_from_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at the given ids, in nats: logits[id] − logsumexp(logits).

    Args: logits (..., vocab); ids (...). Returns: (...). A full log_softmax would hold a second
    (..., vocab) tensor, the largest of the whole run.
    """
    check_same_shape(logits=logits[..., 0], ids=ids)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), in nats: H = logsumexp(z) − Σ softmax(z)·z. (..., vocab) -> (...)

    The entropy of the distribution; −log p of the one sampled token is only an estimate of it.
    """
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def pad_rows(rows: list[list[int]], pad_id: int, side: str, device=None) -> tuple[Tensor, Tensor]:
    """Stack rows of ids to (rows, longest), padded on side "left" or "right".

    Returns: ids; mask, True on real tokens. It comes from the lengths: `ids != pad_id` would lose
    EOS in models whose PAD is their EOS.
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


# ==================================================================================================
# Data: the embedded task. Film reviews from a grammar, and a gold reward that only annotators see
# ==================================================================================================

# A {name} stands for any entry of that name. This table writes the demonstrations; read as a
# regular expression it decides exactly whether a text belongs to the language.
GRAMMAR = {
    "prompt": ["a {genre} about {theme}.", "a {country} {genre} about {theme}.",
               "a {age} {genre} about {theme}.", "a {age} {country} {genre} about {theme}."],
    "genre": ["comedy", "thriller", "western", "musical", "romance", "mystery"],
    "country": ["french", "british", "korean", "mexican", "swedish", "japanese"],
    "age": ["new", "recent", "classic", "silent", "forgotten", "famous", "long", "short"],
    "theme": ["two sisters", "a wedding", "the war", "a robbery", "lost love", "a small town",
              "growing old", "the sea"],
    "review": ["{sentence}", "{sentence} {sentence}", "{clause}. {clause}. {clause}."],
    "sentence": ["{clause}.", "{clause} and {clause}.", "{clause}, while {clause}."],
    "clause": ["{praise}", "{scorn}"],
    "praise": ["the {noun} was {good}", "the {noun} was {very} {good}", "the {noun} {shines}",
               "i {liked} the {noun}", "it made me {smile}"],
    "scorn": ["the {noun} was {bad}", "the {noun} was {very} {bad}", "the {noun} {drags}",
              "i {hated} the {noun}", "it made me {yawn}"],
    "noun": ["plot", "acting", "script", "ending", "cast", "camera", "music", "story"],
    "very": ["very", "rather", "truly"],
    "good": ["clever", "moving", "brilliant", "charming", "fresh", "superb"],
    "bad": ["dull", "clumsy", "awful", "tired", "hollow", "silly"],
    "shines": ["shines", "delights", "surprises"],
    "drags": ["drags", "annoys", "disappoints"],
    "liked": ["loved", "liked", "enjoyed", "admired"],
    "hated": ["hated", "disliked", "regretted", "endured"],
    "smile": ["smile", "laugh", "cheer", "think"],
    "yawn": ["yawn", "sigh", "leave", "sleep"],
}
GENRE_NOUNS = {  # a review may only speak of what its film has
    "comedy": ["humour", "timing"], "thriller": ["chase", "twist"],
    "western": ["duel", "scenery"], "musical": ["dancing", "singing"],
    "romance": ["kiss", "courtship"], "mystery": ["murder", "detective"],
}


def review_rules(genre: str) -> dict[str, list[str]]:
    """The grammar for one genre."""
    return GRAMMAR | {"noun": GRAMMAR["noun"] + GENRE_NOUNS[genre]}


def draw_text(symbol: str, rules: dict[str, list[str]], rng: random.Random) -> str:
    """Draw a text of the grammar: choose one entry of symbol, expand the names in it."""
    text = rng.choice(rules[symbol])
    return re.sub(r"{(\w+)}", lambda match: draw_text(match[1], rules, rng), text)


@functools.cache
def text_pattern(symbol: str, genre: str) -> re.Pattern:
    """The regular expression of exactly the texts of symbol; finite, since no entry recurs."""
    texts = [text.replace(".", r"\.") for text in review_rules(genre)[symbol]]
    texts = [re.sub(r"{(\w+)}", lambda match: text_pattern(match[1], genre).pattern, text)
             for text in texts]
    return re.compile("(?:" + "|".join(texts) + ")")


def genre_of(prompt: str) -> str:
    """The genre that a prompt names."""
    return next(word for word in re.findall(r"\w+", prompt) if word in GENRE_NOUNS)


def is_grammatical(prompt: str, response: str, ended: bool) -> bool:
    """Whether the response is a finished text of the grammar that fits its prompt."""
    return bool(ended) and text_pattern("review", genre_of(prompt)).fullmatch(response) is not None


def gold_reward(prompt: str, response: str, ended: bool) -> float:
    """What a reader wants of a review: praise, in good language, short, never the same twice.

    Sentiment summed over clauses and cut to ±2; −2 if ungrammatical or not ended; −1 per repeated
    clause; −0.5 per clause beyond three. The annotator of stage 2 sees it through noise; from then
    on it is only reported, and never trained on.
    """
    genre = genre_of(prompt)
    clauses = [x.strip() for x in re.split(r"[.,]|\band\b|\bwhile\b", response) if x.strip()]
    praise, scorn = (
        sum(text_pattern(symbol, genre).fullmatch(clause) is not None for clause in clauses)
        for symbol in ("praise", "scorn")
    )
    sentiment = max(-2, min(2, praise - scorn))
    ungrammatical = not is_grammatical(prompt, response, ended)
    repeated, excess = len(clauses) - len(set(clauses)), max(0, len(clauses) - 3)
    return sentiment - 2.0 * ungrammatical - repeated - 0.5 * excess


def gold_rewards(texts: list[tuple[str, str]], ended: Tensor) -> list[float]:
    """Gold reward of each (prompt, response)."""
    return [gold_reward(*text, end) for text, end in zip(texts, ended.tolist(), strict=True)]


def draw_reviews(num_reviews: int, rng: random.Random) -> list[tuple[str, str]]:
    """Demonstrations (prompt, review), drawn neutrally: praise and scorn alike."""
    prompts = [draw_text("prompt", GRAMMAR, rng) for _ in range(num_reviews)]
    return [(x, draw_text("review", review_rules(genre_of(x)), rng)) for x in prompts]


def word_tokenizer():
    """A tokenizer with one token per word or punctuation mark of the grammar."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [text for entries in [*GRAMMAR.values(), *GENRE_NOUNS.values()] for text in entries]
    words = sorted(set(re.findall(r"\w+|[.,]", re.sub(r"{\w+}", "", " ".join(texts)))))
    # UNK is no special token here: decoding would drop it, and hide it from the gold reward.
    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # "dull ." -> "dull."
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


# ==================================================================================================
# Data: your own. Preferences, demonstrations and prompts from disk or Hub
# ==================================================================================================

TURN = "\n\nAssistant:"  # where hh-rlhf's dialogues, kept as one string, hand over to the assistant
CHAT_TEMPLATE = (  # the same format for chat messages, where a tokenizer made here meets them
    "{% for message in messages %}"
    "{{ '\n\nAssistant:' if message['role'] == 'assistant' else '\n\nHuman: ' }}"
    "{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def read_rows(flag: str, name: str, split: str, wanted: tuple[set, ...]) -> list[dict]:
    """Read rows that have wanted columns from a file, a save_to_disk folder or the Hub."""
    import datasets

    path = Path(name)
    try:
        if path.is_file():
            file_format = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(file_format, data_files=str(path), split=split)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            data = (data if isinstance(data, datasets.DatasetDict) else {"train": data})[split]
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever datasets raises, the user needs flag, value and reason
        refuse(f"{flag} {name}: split {split} cannot be read ({first_line(error)}); give a jsonl, "
               "jsonl.gz or parquet file, a save_to_disk folder or a Hub id.")
    columns = next((x for x in wanted if x <= set(data.column_names)), None)
    if columns is None:
        refuse(f"{flag} {name} has columns {', '.join(data.column_names)}; it needs "
               f"{', or '.join('/'.join(sorted(x)) for x in wanted)}.")
    rows = [row for row in data.to_list() if all(row[column] is not None for column in columns)]
    if not rows:
        refuse(f"{flag} {name} has no row with {'/'.join(sorted(columns))}; give one that has.")
    return rows


def shared_len(first, second) -> int:
    """How many leading elements two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
                min(len(first), len(second)))


def split_pair(row: dict) -> tuple:
    """Prompt (a string, or messages), chosen text and rejected text of one preference row.

    A prompt that has no column of its own is what both sides share, up to the assistant's turn in
    which they part.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and prompt is not None:
        return prompt, chosen, rejected
    if isinstance(chosen, str):
        end = chosen[: shared_len(chosen, rejected)].rfind(TURN) + len(TURN)
        if end < len(TURN):
            refuse(f"--dataset: chosen and rejected share no {TURN!r} in {chosen[:60]!r}; "
                   "add a column named prompt.")
        return chosen[:end], chosen[end:], rejected[end:]
    if chosen[0]["role"] == "assistant":  # the answer alone: the prompt column is what came before
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return messages, chosen[0]["content"], rejected[0]["content"]
    turn = shared_len(chosen[:-1], rejected[:-1])
    while turn > 0 and chosen[turn]["role"] != "assistant":
        turn -= 1
    return chosen[:turn], chosen[turn]["content"], rejected[turn]["content"]


def bpe_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on the texts, for a model from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes: no text is unknown
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]"}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()),
                                  show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE,
                                   **special)


@dataclass
class Data:
    """What the stages train on, as token ids; what begins with eval_ is held out."""

    prompts: list[list[int]]
    demonstrations: list[tuple[list[int], ...]]  # (prompt, response)
    comparisons: list[tuple[list[int], ...]]  # (prompt, chosen, rejected)
    eval_prompts: list[list[int]]
    eval_demonstrations: list[tuple[list[int], ...]]
    eval_comparisons: list[tuple[list[int], ...]]


def prompt_text(prompt, tokenizer) -> str:
    """A prompt as the policy reads it: a string as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_examples(examples: list[tuple], name: str, tokenizer, args: Args) -> list[tuple]:
    """Token ids of examples (prompt, response, ...). Long prompts keep their BOS and their last
    tokens, long responses their first.

    All stages get their ids here, prompt and response encoded apart, as PPO will meet them. EOS
    ends each whole response: from nothing else could the model learn to stop.
    """
    if not examples:
        return []
    prompts, *responses = map(list, zip(*examples, strict=True))
    is_chat = not isinstance(prompts[0], str)  # templates write BOS: no second one, please
    texts = [prompt_text(prompt, tokenizer) for prompt in prompts]
    prompts = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = [ids or [eos if bos is None else bos] for ids in prompts]  # a first state is needed
    responses = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in responses]
    responses = [[[*ids, eos] for ids in column] for column in responses]

    longest, limit = args.max_prompt_len, args.response_len
    cut = sum(len(ids) > longest for ids in prompts)
    cut_responses = sum(len(ids) > limit for column in responses for ids in column)
    print(f"data         {len(examples)} {name}; {cut} prompts cut to their last {longest} "
          f"tokens, {cut_responses} responses to their first {limit}")
    if cut and args.dataset == "reviews":
        refuse(f"--max-prompt-len {longest} cuts prompts of --dataset reviews, and with them the "
               f"genre; raise it to {max(map(len, prompts))}.")
    prompts = [cut_prompt(ids, longest, bos) for ids in prompts]
    return list(zip(prompts, *[[ids[:limit] for ids in x] for x in responses], strict=True))


def cut_prompt(ids: list[int], longest: int, bos_id: int | None) -> list[int]:
    """The last tokens of a prompt, behind its BOS, which some models cannot do without."""
    if len(ids) <= longest or ids[0] != bos_id:
        return ids[-longest:]
    return [bos_id, *ids[len(ids) - longest + 1 :]]


def decode_texts(tokenizer, prompts: list, responses: list) -> list[tuple[str, str]]:
    """(prompt, response) as texts, without special tokens."""
    texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, responses))
    return list(zip(*texts, strict=True))


def hold_out(examples: list[tuple], held_prompts: set, num_held: int) -> tuple[list, list]:
    """Training and evaluation examples: those of held-out prompts, or else the first ones."""
    train = [x for x in examples if tuple(x[0]) not in held_prompts]
    evaluation = [x for x in examples if tuple(x[0]) in held_prompts]
    if not evaluation:  # demonstrations with prompts of their own, or too little data
        enough = len(train) >= 4 * num_held
        evaluation, train = train[:num_held], train[num_held:] if enough else train
    return train, evaluation


def read_texts(args: Args) -> tuple[list, list[tuple], list[tuple]]:
    """Prompts, demonstrations (prompt, response) and comparisons (prompt, chosen, rejected).

    The embedded task gets its comparisons in stage 2.
    """
    demonstrations, comparisons = [], []
    if args.dataset == "reviews":
        demonstrations = draw_reviews(20_000, random.Random(args.seed))
        prompts = [prompt for prompt, _ in demonstrations]
    else:
        wanted = {"chosen", "rejected"}, {"prompt"}
        rows = read_rows("--dataset", args.dataset, args.dataset_split, wanted)
        if "rejected" in rows[0]:
            comparisons = [split_pair(row) for row in rows]
            demonstrations = [(prompt, chosen) for prompt, chosen, _ in comparisons]
        prompts = [x[0] for x in comparisons] or [row["prompt"] for row in rows]
    if args.sft_dataset is not None:
        wanted = {"prompt", "completion"}, {"text"}
        rows = read_rows("--sft-dataset", args.sft_dataset, "train", wanted)
        pairs = [(x["prompt"], x["completion"]) if "completion" in x else ("", x["text"])
                 for x in rows]
        demonstrations = [(prompt, x if isinstance(x, str) else x[-1]["content"])  # messages
                          for prompt, x in pairs]
    return prompts, demonstrations, comparisons


def prepare_data(args: Args):
    """Read the texts, load or make the language model, encode, hold out the evaluation prompts.

    Returns: language model, tokenizer, Data.
    """
    prompts, demonstrations, comparisons = read_texts(args)
    parts = [part for x in [(p,) for p in prompts] + demonstrations + comparisons for part in x]
    texts = [x if isinstance(x, str) else "\n".join(m["content"] for m in x) for x in parts]
    lm, tokenizer = load_policy_model(args, texts)

    prompts = [x for (x,) in encode_examples([(x,) for x in prompts], "prompts", tokenizer, args)]
    demonstrations = encode_examples(demonstrations, "demonstrations", tokenizer, args)
    comparisons = encode_examples(comparisons, "comparisons", tokenizer, args)
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]  # each once
    random.Random(args.seed).shuffle(prompts)
    num_held = args.eval_prompts if len(prompts) >= 4 * args.eval_prompts else 0
    print(f"data         {num_held} of {len(prompts)} distinct prompts held out for evaluation"
          + ("" if num_held else f" (fewer than 4 x {args.eval_prompts}): training prompts serve"))
    held_prompts = set(map(tuple, prompts[:num_held]))
    demonstrations, eval_demonstrations = hold_out(demonstrations, held_prompts, args.eval_prompts)
    comparisons, eval_comparisons = hold_out(comparisons, held_prompts, args.eval_prompts)
    return lm, tokenizer, Data(prompts[num_held:], demonstrations, comparisons,
                               prompts[: args.eval_prompts], eval_demonstrations, eval_comparisons)


# ==================================================================================================
# Models
# ==================================================================================================


def new_language_model(tokenizer, hidden: int, num_layers: int, context: int):
    """A small Llama-style transformer with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=context, tie_word_embeddings=True,
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, initializer_range=0.06,  # the usual 0.02 is for wide models
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def load_policy_model(args: Args, texts: list[str]):
    """The language model to start from and its tokenizer: given, or new, with a BPE of texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.policy_model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.policy_model)
            lm = AutoModelForCausalLM.from_pretrained(args.policy_model, dtype=torch.float32)
            kind = (lm.config.architectures or ["unknown"])[0]
            if not kind.endswith(("ForCausalLM", "LMHeadModel")) or tokenizer.eos_token is None:
                raise ValueError(f"a {kind} with EOS token {tokenizer.eos_token}")
        except Exception as error:  # missing, broken, or of another kind
            refuse(f"--policy-model {args.policy_model} cannot be used ({first_line(error)}); "
                   "give a Hub id or folder of a causal language model with EOS in its tokenizer.")
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    elif args.dataset == "reviews":
        tokenizer = word_tokenizer()
        context = args.max_prompt_len + args.response_len
        lm = new_language_model(tokenizer, hidden=96, num_layers=2, context=context)
    else:
        tokenizer = bpe_tokenizer(texts, args.vocab_size)
        lm = new_language_model(tokenizer, hidden=256, num_layers=4, context=2048)
    context = getattr(lm.config, "max_position_embeddings", math.inf)
    if args.max_prompt_len + args.response_len > context:
        refuse(f"--max-prompt-len {args.max_prompt_len} + --response-len {args.response_len} "
               f"exceed the model's context of {context} tokens; lower one of them.")
    num_embeddings = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        refuse(f"--policy-model {args.policy_model}: its tokenizer has {len(tokenizer)} tokens, "
               f"its embedding {num_embeddings}; give a model with its own tokenizer.")
    # eval() for good, here and for every model below: dropout would make old and new
    # log-probabilities disagree before any update. Gradients flow all the same.
    return lm.eval(), tokenizer


def position_ids(mask: Tensor) -> Tensor:
    """0, 1, 2, … over the real tokens of each row: left padding must not shift positions.

    Args and result: (batch, seq_len). `generate` does this by itself, a plain forward does not.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    """A causal language model, read as a distribution over responses.

    Temperature, position ids, precision and the ban on PAD live here, once, so that sampling, old,
    new and reference log-probabilities agree. The sampler is this distribution: top-p or repetition
    penalties in the model's generation config are ignored, since ratio and KL would then be those
    of a policy that nobody samples from.
    """

    def __init__(self, lm, pad_id: int, eos_ids: list[int], temperature=1.0, dtype="float32"):
        super().__init__()
        self.lm, self.pad_id, self.temperature = lm, pad_id, temperature
        self.bf16 = dtype == "bfloat16"
        self.register_buffer("eos_ids", torch.tensor(eos_ids))
        # A sampled PAD would be an end that no mask knows. Where PAD is EOS, it is a real token.
        banned_ids = torch.tensor([] if pad_id in eos_ids else [pad_id], dtype=torch.long)
        self.register_buffer("banned_ids", banned_ids)

    @property
    def device(self) -> torch.device:
        """Where the model is, and its inputs have to be."""
        return self.eos_ids.device

    def logits(self, ids: Tensor, mask: Tensor, num_last: int, **kwargs) -> tuple[Tensor, object]:
        """Float32 logits (batch, num_last, vocab) of the last positions, and the model's output.

        ids are the last columns of the sequence that mask covers; with a KV cache, the new ones.
        """
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.lm(input_ids=ids, attention_mask=mask, logits_to_keep=num_last,
                             position_ids=position_ids(mask)[:, -ids.shape[1] :], **kwargs)
        logits = output.logits.float() / self.temperature
        lowest = torch.finfo(torch.float32).min  # not −inf: 0 · −inf in the entropy would be NaN
        return logits.index_fill(-1, self.banned_ids, lowest), output

    def forward(self, sequence_ids: Tensor, sequence_mask: Tensor, response_len: int):
        """Log-probability and entropy of each response token, and the hidden state it came from.

        Args: sequence_ids, sequence_mask (batch, seq_len); the last response_len columns are the
        responses. Returns: logprobs, entropies (batch, response_len); hidden states (batch,
        response_len, hidden). All are read one position before their token: the state in which it
        is chosen. logprobs are 0 in the padding.
        """
        logits, output = self.logits(sequence_ids, sequence_mask, response_len + 1,
                                     use_cache=False, output_hidden_states=True)
        logits = logits[:, :-1]  # (batch, response_len, vocab): position t scores token t + 1
        hidden = output.hidden_states[-1][:, -response_len - 1 : -1]
        response_ids = sequence_ids[:, -response_len:]
        response_mask = sequence_mask[:, -response_len:]
        # The banned PAD has log-probability −3e38 there: nothing so extreme should exist to leak.
        logprobs = torch.where(response_mask, logprobs_from_logits(logits, response_ids), 0)
        return logprobs, entropy(logits), hidden


def make_policy(lm, tokenizer, temperature: float, dtype: str) -> Policy:
    """A Policy with every EOS of the model: chat models list several in their generation config."""
    listed = lm.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    eos_ids = sorted({tokenizer.eos_token_id, *listed} - {None})
    has_pad = tokenizer.pad_token_id is not None
    pad_id = tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id
    return Policy(lm, pad_id, eos_ids, temperature, dtype)


class ActorCritic(nn.Module):
    """The policy and its critic V(state): a linear head on the policy's hidden states, or on a
    trunk of its own."""

    def __init__(self, policy: Policy, trunk=None):
        super().__init__()
        self.policy, self.trunk = policy, trunk
        config = (policy.lm if trunk is None else trunk).config
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # V = 0: at first no opinion [N details, P2]
        nn.init.zeros_(self.value_head.bias)

    def forward(self, sequence_ids: Tensor, sequence_mask: Tensor, response_len: int):
        """logprobs, entropies and values, each (batch, response_len). Args as in Policy.forward."""
        logprobs, entropies, hidden = self.policy(sequence_ids, sequence_mask, response_len)
        if self.trunk is not None:
            with torch.autocast(sequence_ids.device.type, torch.bfloat16, enabled=self.policy.bf16):
                output = self.trunk(input_ids=sequence_ids, attention_mask=sequence_mask,
                                    position_ids=position_ids(sequence_mask), use_cache=False)
            hidden = output.last_hidden_state[:, -response_len - 1 : -1]
        return logprobs, entropies, self.value_head(hidden.float()).squeeze(-1)


def make_actor_critic(
    args: Args, policy: Policy, reward_model, same_tokens: bool, score_norm: "ScoreNorm"
) -> ActorCritic:
    """Policy and critic, shared or separate; see --critic."""
    if args.critic == "shared":
        return ActorCritic(policy).to(policy.device)
    head = getattr(reward_model, "score", None)  # what transformers calls it in causal models
    if not (same_tokens and isinstance(head, nn.Linear)):
        return ActorCritic(policy, copy.deepcopy(policy.lm.base_model)).to(policy.device)
    actor_critic = ActorCritic(policy, copy.deepcopy(reward_model.base_model).requires_grad_(True))
    with torch.no_grad():  # V is at first the score so far, normalised as at the start of PPO
        actor_critic.value_head.weight.copy_(head.weight / score_norm.std)
        actor_critic.value_head.bias.fill_(-score_norm.mean / score_norm.std)
    return actor_critic.to(policy.device)


def new_reward_model(policy: Policy, tokenizer):
    """A sequence classifier with one output, on a copy of the SFT model's trunk; its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    tokenizer, config = copy.deepcopy(tokenizer), copy.deepcopy(policy.lm.config)
    config.num_labels, config.pad_token_id = 1, policy.pad_id
    reward_model = AutoModelForSequenceClassification.from_config(config).to(policy.lm.device)
    reward_model.base_model.load_state_dict(policy.lm.base_model.state_dict())
    nn.init.normal_(reward_model.score.weight, std=1 / math.sqrt(config.hidden_size + 1))  # N, R2
    if policy.pad_id in policy.eos_ids:
        give_own_pad_token(reward_model, tokenizer)
    return reward_model.eval(), tokenizer


def load_reward_model(path: str, device: torch.device):
    """A given reward model, frozen, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        # A causal model would load too: transformers puts a random head on it and only warns.
        kind = (config.architectures or ["unknown"])[0]
        if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
            raise ValueError(f"a {kind} with {config.num_labels} outputs")
        tokenizer = AutoTokenizer.from_pretrained(path)
        reward_model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # missing, broken, or of another kind
        refuse(f"--reward-model {path} cannot be used ({first_line(error)}); give a Hub id or "
               "folder of a sequence classifier with one output, or wrap it in a --reward-fn.")
    if config.pad_token_id is None:
        give_own_pad_token(reward_model, tokenizer)
    return reward_model.to(device).eval().requires_grad_(False), tokenizer


def give_own_pad_token(reward_model, tokenizer) -> None:
    """Add a PAD that no text contains: transformers reads the score at the last token that is not
    PAD, which would be the one before EOS if PAD were EOS."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id >= reward_model.get_input_embeddings().num_embeddings:
        reward_model.resize_token_embeddings(tokenizer.pad_token_id + 1)


# ==================================================================================================
# Stages 1 and 2: supervised fine-tuning and the reward model, by one training loop
# ==================================================================================================


def sft_loss_sum(policy: Policy, examples: list[tuple]) -> Tensor:
    """−Σ log π(response token | tokens before), in nats; prompts are read, not trained on."""
    prompts, responses = zip(*examples, strict=True)
    prompt_ids, prompt_mask = pad_rows(prompts, policy.pad_id, "left", policy.device)
    response_ids, response_mask = pad_rows(responses, policy.pad_id, "right", policy.device)
    sequence_ids = torch.cat([prompt_ids, response_ids], dim=1)  # (examples, seq_len)
    sequence_mask = torch.cat([prompt_mask, response_mask], dim=1)
    logprobs, _, _ = policy(sequence_ids, sequence_mask, response_ids.shape[1])
    return -torch.where(response_mask, logprobs, 0).sum()


def count_response_tokens(examples: list[tuple]) -> int:
    """The number of terms in sft_loss_sum."""
    return sum(len(response) for _, response in examples)


def model_scores(reward_model, sequences: list[list[int]]) -> Tensor:
    """Raw scores (sequences,) of prompt and response in one.

    They are read by the model's own forward (at the last token that is not PAD), so that the saved
    model gives the same scores elsewhere.
    """
    context = getattr(reward_model.config, "max_position_embeddings", None) or 0
    rows = [ids[-context:] for ids in sequences]
    ids, mask = pad_rows(rows, reward_model.config.pad_token_id, "right", reward_model.device)
    return reward_model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


def score_margins(reward_model, comparisons: list[tuple]) -> Tensor:
    """score(x, chosen) − score(x, rejected) of each comparison: (comparisons,)."""
    chosen = [prompt + response for prompt, response, _ in comparisons]
    rejected = [prompt + response for prompt, _, response in comparisons]
    chosen_scores, rejected_scores = model_scores(reward_model, chosen + rejected).chunk(2)
    return chosen_scores - rejected_scores


def reward_loss_sum(reward_model, comparisons: list[tuple]) -> Tensor:
    """−Σ log sigmoid(score(x, chosen) − score(x, rejected)), nats (Stiennon 2020, section 3.4)."""
    return -nn.functional.logsigmoid(score_margins(reward_model, comparisons)).sum()


def split_list(rows: list, size: int) -> list[list]:
    """Consecutive parts of at most size rows."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def accumulate_gradients(
    loss_sum: Callable, model, examples: list, num_terms: int, microbatch_size: int, coef=1.0
) -> float:
    """Add the gradient of coef · loss_sum / num_terms, in microbatches. Returns: the mean loss.

    Each part is divided by the terms of the whole minibatch; an average of the parts' averages
    would give tokens in short microbatches more weight.
    """
    mean_loss = 0.0
    for part in split_list(examples, microbatch_size):
        loss = loss_sum(model, part) / num_terms
        (coef * loss).backward()
        mean_loss += loss.item()
    return mean_loss


def lr_scale(step: int, num_steps: int, warmup: int = 0, anneal: bool = True) -> float:
    """Factor on the learning rate in step 1 … num_steps: linear warm-up, linear decay to 0."""
    scale = 1 - (step - 1) / num_steps if anneal else 1.0
    return scale * min(1.0, step / warmup) if warmup else scale


def shuffled_minibatches(rows: list, epochs: int, size: int, rng: random.Random) -> list[list]:
    """Every row once per epoch, in a new order each time."""
    return [part for _ in range(epochs) for part in split_list(rng.sample(rows, len(rows)), size)]


def fit(
    name: str, model, minibatches: list, loss_sum: Callable, count_terms: Callable,
    learning_rate: float, args: Args, log: "RunLog",
) -> None:
    """Minimise the mean loss, one Adam step per minibatch, learning rate linear to 0."""
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5)  # [37 details, core #3]
    start_time, num_steps = time.perf_counter(), len(minibatches)
    for step, minibatch in enumerate(minibatches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate * lr_scale(step, num_steps)
        loss = accumulate_gradients(loss_sum, model, minibatch, count_terms(minibatch),
                                    args.microbatch_size)
        require_finite(loss, f"{name} step {step}: loss")
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.scalars({f"{name}/loss": loss}, step)
        if step % max(1, num_steps // 8) == 0:
            seconds = time.perf_counter() - start_time
            print(f"{name:<12} step {step:>5}/{num_steps} | loss {loss:.3f} nats | {seconds:.0f} s",
                  flush=True)


def require_finite(value: float, name: str) -> None:
    """Stop before a NaN reaches the weights; what was saved last stays intact."""
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}; lower the learning rate, check the rewards")


@torch.no_grad()
def perplexity(policy: Policy, demonstrations: list[tuple], microbatch_size: int) -> float:
    """exp of the mean SFT loss per token."""
    losses = [sft_loss_sum(policy, x).item() for x in split_list(demonstrations, microbatch_size)]
    return math.exp(sum(losses) / count_response_tokens(demonstrations))


@torch.no_grad()
def accuracy(reward_model, comparisons: list[tuple], microbatch_size: int) -> float:
    """Share of comparisons whose chosen response scores higher: 0.5 for a coin."""
    parts = split_list(comparisons, microbatch_size)
    return torch.cat([score_margins(reward_model, x) > 0 for x in parts]).float().mean().item()


def compare_own_samples(policy: Policy, prompts: list, tokenizer, args: Args) -> list[tuple]:
    """Two of the SFT model's own samples per prompt, labelled by a simulated annotator.

    Noisily, by Bradley–Terry on the gold rewards: P(first ≻ second) = sigmoid(2·(gold₁ − gold₂)).
    """
    rng, generator = random.Random(args.seed), make_generator(policy, args.seed)
    comparisons = []
    for chunk in split_list(prompts, 500):
        samples, golds = [], []
        for _ in range(2):
            responses, ended = sample_ids(policy, chunk, args.response_len, generator)
            samples.append(responses)
            golds.append(gold_rewards(decode_texts(tokenizer, chunk, responses), ended))
        for prompt, first, second, *gold in zip(chunk, *samples, *golds, strict=True):
            prefers_first = rng.random() < 1 / (1 + math.exp(2 * (gold[1] - gold[0])))
            pair = (first, second) if prefers_first else (second, first)
            comparisons.append((prompt, *pair))
    return comparisons


def train_sft(policy: Policy, data: Data, args: Args, log: "RunLog") -> None:
    """Stage 1."""
    minibatches = shuffled_minibatches(data.demonstrations, args.sft_epochs, args.minibatch_size,
                                       random.Random(args.seed))
    fit("sft", policy, minibatches, sft_loss_sum, count_response_tokens, args.sft_learning_rate,
        args, log)
    value = perplexity(policy, data.eval_demonstrations, args.microbatch_size)
    print(f"sft          perplexity {value:.3f} on {len(data.eval_demonstrations)} "
          "evaluation demonstrations")
    log.scalars({"sft/perplexity": value}, len(minibatches))


def train_reward_model(policy: Policy, data: Data, tokenizer, args: Args, log: "RunLog"):
    """Stage 2. Returns: score, and the reward model behind it, saved and frozen."""
    if args.dataset == "reviews":
        rng = random.Random(args.seed)
        prompts = rng.choices(data.prompts, k=6000)
        data.comparisons = compare_own_samples(policy, prompts, tokenizer, args)
        eval_prompts = rng.choices(data.eval_prompts, k=500)
        data.eval_comparisons = compare_own_samples(policy, eval_prompts, tokenizer, args)
    reward_model, reward_tokenizer = new_reward_model(policy, tokenizer)
    minibatches = shuffled_minibatches(data.comparisons, args.reward_epochs, args.minibatch_size,
                                       random.Random(args.seed))
    fit("reward_model", reward_model, minibatches, reward_loss_sum, len, args.reward_learning_rate,
        args, log)
    share = accuracy(reward_model, data.eval_comparisons, args.microbatch_size)
    print(f"reward_model accuracy {share:.3f} on {len(data.eval_comparisons)} "
          "evaluation comparisons")
    log.scalars({"reward_model/accuracy": share}, len(minibatches))
    reward_model.save_pretrained(log.run_dir / "reward_model")
    reward_tokenizer.save_pretrained(log.run_dir / "reward_model")
    score = functools.partial(score_by_model, reward_model=reward_model, retokenise=None,
                              microbatch_size=args.microbatch_size)
    return score, reward_model.requires_grad_(False)


# ==================================================================================================
# The PPO math: pure functions of tensors
# ==================================================================================================


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref), in nats, from tokens sampled by π.

    With d = logprobs − ref_logprobs:  k1 = d  (unbiased, may be negative),  k2 = ½·d²  (biased),
    k3 = exp(−d) − 1 + d  (unbiased, never negative).
    A good estimate need not have a good gradient. In the reward, only k1 gives ∇KL(π ‖ π_ref); k2
    and k3 give almost none while π ≈ π_ref. As a loss, on the sampling policy, k2 gives ∇KL of each
    token, k3 that of the forward KL(π_ref ‖ π), and k1 nothing.

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
    raise ValueError(f"estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """rₜ = −kl_coef · klₜ, plus the score at the last token of the response.

    The score belongs to the token that completes the response: EOS, or the last one before the
    length limit. (trl adds it one slot later, to a state after EOS with a value of its own.) Dense
    scores are added token by token.

    Args: scores (batch,), or (batch, response_len) if dense; kl, response_mask (batch,
    response_len). Returns: (batch, response_len), 0 in the padding. Source: InstructGPT, eq. 2.
    """
    check_same_shape(kl=kl, response_mask=response_mask)
    if scores.dim() == 1:
        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
        scores = torch.zeros_like(kl).scatter(1, last_token_idx, scores.unsqueeze(1))
    check_same_shape(scores=scores, kl=kl)
    return torch.where(response_mask, scores - kl_coef * kl, 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last token backwards.

    Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·Vₜ₊₁ − Vₜ;  A and V are 0 after the last response token.
    The returns, Aₜ + Vₜ, are the critic's targets; with λ = 1, the discounted rewards to come.

    Args: rewards, values, mask (batch, response_len). Returns: advantages, returns, the same shape,
    0 in the padding. Source: PPO paper (1707.06347), eqs. 11-12; Schulman et al. 2015 (1506.02438).
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    # Mask before the recursion: a value in the padding would bootstrap into real tokens.
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

    ratio = π_new / π_old: against the policy that sampled, not against the reference. Once it has
    left [1 − ε, 1 + ε] the way A wants it to go, the gradient is zero.

    Args: (batch, response_len) each; clip_coef is ε. Returns: loss; clipfrac, the share of tokens
    whose gradient is cut. Source: PPO paper, eq. 7.
    """
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

    Clipping keeps one batch from dragging the critic far. Control studies see no gain in it, RLHF
    codes keep it [37 details, core #9]. c is in units of the return: raise it where returns are far
    above 1, or normalise the scores.

    Args: (batch, response_len) each; vf_clip_coef is c. Returns: loss; clipfrac, the share of
    tokens for which the clipped term counts.
    """
    check_same_shape(new=new_values, old=old_values, returns=returns, mask=mask)
    change = (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
    # where before the square: squaring first would send NaN from the padding into the gradient.
    unclipped = torch.where(mask, new_values - returns, 0) ** 2
    clipped = torch.where(mask, old_values + change - returns, 0) ** 2
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float, kl_target: float, num_episodes: int, kl_horizon: int
) -> float:
    """Raise β where the KL is above its target, lower it below.

    β ← β·(1 + e·n/h),  e = clip(KL / target − 1, ±0.2), n episodes since the last call, horizon h.

    Args: observed_kl, kl_target in nats per response; num_episodes, kl_horizon in episodes.
    Source: Ziegler 2019, section 2.2, with the n/h of lm-human-preferences.
    """
    error = max(-0.2, min(0.2, observed_kl / kl_target - 1))
    return kl_coef * (1 + error * num_episodes / kl_horizon)


# ==================================================================================================
# Stage 3: scoring. One function score(prompts, responses) of token ids; PPO does not know which
# ==================================================================================================


@torch.no_grad()
def score_by_model(
    prompts: list, responses: list, *, reward_model, retokenise: Callable | None,
    microbatch_size: int,
) -> Tensor:
    """Scores (batch,) of a reward model, whose own tokens retokenise makes of the policy's."""
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    if retokenise is not None:
        sequences = retokenise(sequences)
    parts = split_list(sequences, microbatch_size)
    return torch.cat([model_scores(reward_model, part) for part in parts])


def retokenise(sequences: list, *, tokenizer, eos_ids: list[int], reward_tokenizer) -> list:
    """The same texts in another tokenizer's ids; what has ended in one ends in the other."""
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    rows, end = reward_tokenizer(texts)["input_ids"], reward_tokenizer.eos_token_id
    return [[*row, end] if ids[-1] in eos_ids and end is not None and row[-1:] != [end] else row
            for row, ids in zip(rows, sequences, strict=True)]


def score_by_function(prompts: list, responses: list, *, function, name: str, tokenizer) -> Tensor:
    """Scores (batch,), or (batch, response_len) if dense, of a Python function of the texts."""
    texts = decode_texts(tokenizer, prompts, responses)
    arguments = [list(column) for column in zip(*texts, strict=True)]
    parameters = inspect.signature(function).parameters.values()
    if sum(x.default is x.empty for x in parameters) > 2:
        arguments.append([[tokenizer.decode([token]) for token in x] for x in responses])
    try:
        scores = function(*arguments)
        if len(scores) != len(responses):
            raise ValueError(f"{len(scores)} scores for {len(responses)} responses")
        scores = [x.tolist() if hasattr(x, "tolist") else x for x in scores]  # numpy and torch
        dense = isinstance(scores[0], list | tuple)
        rows = [torch.tensor(x if dense else [x], dtype=torch.float32) for x in scores]
        for row, ids, (_, text) in zip(rows, responses, texts, strict=True):
            if len(row) != (len(ids) if dense else 1) or not row.isfinite().all():
                raise ValueError(f"{row.tolist()} for the {len(ids)} tokens of {text!r}")
    except Exception as error:  # the function is the user's: anything may go wrong in it
        refuse(f"--reward-fn {name} failed on a batch that begins with {texts[0][1]!r} "
               f"({first_line(error)}); return one finite number per response, or for each "
               "response a list with one per token.")
    return nn.utils.rnn.pad_sequence(rows, batch_first=True) if dense else torch.cat(rows)


def load_reward_fn(name: str) -> Callable:
    """The function that --reward-fn FILE.py:FUNCTION names."""
    path, _, function_name = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("reward_fn", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["reward_fn"] = module  # dataclasses in the file look themselves up there
        spec.loader.exec_module(module)
        return getattr(module, function_name)
    except Exception as error:  # the file is the user's
        refuse(f"--reward-fn {name} cannot be loaded ({first_line(error)}); give FILE.py:FUNCTION.")


def load_given_reward(args: Args, policy: Policy, tokenizer, data: Data) -> tuple:
    """What --reward-fn or --reward-model names, tried on two responses before anything is trained.

    Returns: score, reward model, and whether it reads the policy's token ids; or (None, None,
    False), where the run has to train its own.
    """
    if args.reward_fn is None and args.reward_model is None:
        return None, None, False
    reward_model, same_tokens = None, False
    if args.reward_fn is not None:
        score = functools.partial(score_by_function, function=load_reward_fn(args.reward_fn),
                                  name=args.reward_fn, tokenizer=tokenizer)
    else:
        reward_model, reward_tokenizer = load_reward_model(args.reward_model, policy.device)
        same_tokens = tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()
        translate = functools.partial(retokenise, tokenizer=tokenizer,
                                      eos_ids=policy.eos_ids.tolist(),
                                      reward_tokenizer=reward_tokenizer)
        score = functools.partial(score_by_model, reward_model=reward_model,
                                  retokenise=None if same_tokens else translate,
                                  microbatch_size=args.microbatch_size)
    examples = data.demonstrations[:2] or [(prompt, prompt) for prompt in data.prompts[:2]]
    scores = score([x[0] for x in examples], [x[1] for x in examples])
    if scores.dim() == 2 and args.score_norm != "none":
        refuse(f"--score-norm {args.score_norm} needs one score per response, and --reward-fn "
               f"{args.reward_fn} returns one per token; use --score-norm none.")
    return score, reward_model, same_tokens


# ==================================================================================================
# Stage 3: rollout
# ==================================================================================================


@dataclass
class Rollout:
    """All that is known of one batch of episodes. One row, 3 tokens of prompt, 4 of response:

        column of sequence_ids    0    1    2    3    4      5    6    7    8    9
                                 PAD  PAD   a   war  film   very dull  .   EOS  PAD
        sequence_mask             -    -    1    1    1      1    1    1    1    -
                                 '---- prompt_len -----'    '--- response_len ----'
        column of the fields below                           0    1    2    3    4
        response_mask                                        1    1    1    1    -
        logprobs, values read at sequence column             4    5    6    7    -
        rewards                                             -kl  -kl  -kl  -kl   -
                                                                        + score

    Response token t is chosen in the state one column earlier: its log-probability and V are read
    there, so the first V sees the prompt alone. After EOS the episode is over and V is 0. The last
    column is padding: whatever stands there, no mean and no sum may see it.
    """

    sequence_ids: Tensor  # (batch, seq_len)
    sequence_mask: Tensor  # (batch, seq_len), bool
    response_mask: Tensor  # (batch, response_len), bool
    ended: Tensor  # (batch,), bool: by EOS, not by the length limit
    old_logprobs: Tensor  # (batch, response_len), nats
    ref_logprobs: Tensor  # (batch, response_len), nats
    entropies: Tensor  # (batch, response_len), nats
    old_values: Tensor  # (batch, response_len), units of the normalised score
    scores: Tensor | None = None  # (batch,) or, dense, (batch, response_len): raw
    rewards: Tensor | None = None  # (batch, response_len): normalised score, KL
    advantages: Tensor | None = None  # (batch, response_len)
    returns: Tensor | None = None  # (batch, response_len)

    @property
    def response_len(self) -> int:
        """Columns of the response part: the longest response of the batch."""
        return self.response_mask.shape[1]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        prompt_len = self.sequence_ids.shape[1] - self.response_len
        return unpad_rows(self.sequence_ids[:, :prompt_len], self.sequence_mask[:, :prompt_len])

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        return unpad_rows(self.sequence_ids[:, -self.response_len :], self.response_mask)

    def select(self, idx: Iterable[int]) -> "Rollout":
        """The rollout of some episodes."""
        tensors, idx = vars(self).items(), torch.tensor(list(idx))
        return Rollout(**{name: None if x is None else x[idx] for name, x in tensors})


@torch.no_grad()
def sample_responses(
    policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, response_len: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample token by token, with a KV cache, until each row has met EOS or response_len.

    Args: prompt_ids, prompt_mask (batch, prompt_len), padded on the left. Returns: response_ids,
    response_mask (batch, longest response), padded on the right; ended (batch,), True after EOS.
    """
    ids, mask, cache = prompt_ids, prompt_mask, None
    ended = torch.zeros_like(prompt_mask[:, 0])  # (batch,)
    columns, column_masks = [], []
    for _ in range(response_len):
        logits, output = policy.logits(ids, mask, 1, past_key_values=cache, use_cache=True)
        probabilities = logits[:, 0].softmax(-1)  # (batch, vocab)
        sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (batch,)
        columns.append(torch.where(ended, policy.pad_id, sampled))
        column_masks.append(~ended)  # EOS itself is real, what follows it is padding
        ended = ended | torch.isin(sampled, policy.eos_ids)
        if ended.all():
            break
        ids, cache = columns[-1].unsqueeze(1), output.past_key_values
        mask = torch.cat([mask, column_masks[-1].unsqueeze(1)], dim=1)
    return torch.stack(columns, dim=1), torch.stack(column_masks, dim=1), ended


def sample_ids(
    policy: Policy, prompts: list, response_len: int, generator: torch.Generator
) -> tuple[list[list[int]], Tensor]:
    """sample_responses for lists of token ids. Returns: responses, and ended (batch,)."""
    prompt_ids, prompt_mask = pad_rows(prompts, policy.pad_id, "left", policy.device)
    ids, mask, ended = sample_responses(policy, prompt_ids, prompt_mask, response_len, generator)
    return unpad_rows(ids, mask), ended


def make_generator(policy: Policy, seed: int) -> torch.Generator:
    """Random numbers for sampling, on the policy's device."""
    return torch.Generator(policy.device).manual_seed(seed)


@torch.no_grad()
def collect_rollout(
    actor_critic: ActorCritic, reference: Policy, prompts: list[list[int]], args: Args, seed: int
) -> Rollout:
    """Sample a response to each prompt; read log-probabilities, entropies, values, reference."""
    policy = actor_critic.policy
    prompt_ids, prompt_mask = pad_rows(prompts, policy.pad_id, "left", policy.device)
    response_ids, response_mask, ended = sample_responses(
        policy, prompt_ids, prompt_mask, args.response_len, make_generator(policy, seed))
    sequence_ids = torch.cat([prompt_ids, response_ids], dim=1)  # (batch, seq_len)
    sequence_mask = torch.cat([prompt_mask, response_mask], dim=1)
    parts = []
    for idx in torch.arange(len(prompts)).split(args.microbatch_size):
        inputs = sequence_ids[idx], sequence_mask[idx], response_ids.shape[1]
        # Old log-probabilities come from the forward pass that the update will use, not from the
        # sampler's: its cache rounds differently, and the ratio would start away from 1.
        old_logprobs, entropies, old_values = actor_critic(*inputs)
        ref_logprobs, _, _ = reference(*inputs)
        parts.append((old_logprobs, ref_logprobs, entropies, old_values))
    read = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Rollout(sequence_ids, sequence_mask, response_mask, ended, *read)


class ScoreNorm:
    """(score − mean) / std, with fixed statistics or with those of all scores seen so far."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, running: bool = False):
        self.mean, self.std, self.running, self.count = mean, std, running, 0

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalise scores (batch,), which running statistics take in first."""
        if self.running:
            count, mean, var = len(scores), scores.mean().item(), scores.var(correction=0).item()
            total, delta = self.count + count, mean - self.mean
            between = delta**2 * self.count * count / total  # parallel variance, Chan et al. 1979
            self.std = math.sqrt((self.std**2 * self.count + var * count + between) / total)
            self.mean, self.count = self.mean + delta * count / total, total
        return (scores - self.mean) / (self.std + 1e-8)


def compute_rewards(rollout: Rollout, score_norm: ScoreNorm, kl_coef: float, args: Args) -> Tensor:
    """Rewards per token (batch, response_len) from raw scores, missing EOS, and KL."""
    scores, mask = score_norm(rollout.scores), rollout.response_mask
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef if args.kl_in == "reward" else 0.0)
    # A response cut at the length limit ends there, and pays. Rivals: replace its score by −1
    # (Ziegler, Stiennon), or take it as unfinished and bootstrap from the critic (control tasks).
    penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)
    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), mask, 0.0)
    return masked_whiten(rewards, mask, shift_mean=False) if args.whiten_rewards else rewards


def compute_advantages(rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (batch, response_len) each. Returns keep their scale: the critic
    has to learn it."""
    mask = rollout.response_mask
    rewards, values = rollout.rewards, rollout.old_values
    advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    if args.norm_advantages:  # over the batch; CleanRL's per minibatch is noisier
        advantages = masked_whiten(advantages, mask)
    return advantages, returns


# ==================================================================================================
# Stage 3: update
# ==================================================================================================


def update_policy(
    actor_critic: ActorCritic, optimizer, rollout: Rollout, kl_coef: float, args: Args, seed: int,
    sft_policy: Policy, demonstrations: list,
) -> dict[str, float]:
    """A few epochs of minibatch steps on one batch. Returns: statistics, means over the steps."""
    rng, num_episodes, steps = random.Random(seed), len(rollout.ended), []
    for _ in range(args.update_epochs):
        epoch = []
        for idx in shuffled_minibatches(range(num_episodes), 1, args.minibatch_size, rng):
            stats = backward_minibatch(actor_critic, rollout.select(idx), kl_coef, args)
            if args.ptx_coef > 0:  # PPO-ptx: as many demonstrations as responses
                sample = rng.choices(demonstrations, k=args.minibatch_size)
                stats["ptx_loss"] = accumulate_gradients(
                    sft_loss_sum, sft_policy, sample, count_response_tokens(sample),
                    args.microbatch_size, args.ptx_coef)
            norm = nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm)
            stats["grad_norm"] = norm.item()
            for name, value in stats.items():
                require_finite(value, f"step {len(steps) + len(epoch) + 1} of the update: {name}")
            optimizer.step()
            optimizer.zero_grad()
            epoch.append(stats)
        steps += epoch
        approx_kl = sum(step["approx_kl"] for step in epoch) / len(epoch)
        if args.target_kl is not None and approx_kl > args.target_kl:
            break
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    means["ratio_first"] = steps[0]["ratio_first"]  # no mean: before the first step it must be 1
    means["explained_variance"] = explained_variance(rollout.returns, rollout.old_values,
                                                     rollout.response_mask)
    return means


def backward_minibatch(
    actor_critic: ActorCritic, minibatch: Rollout, kl_coef: float, args: Args
) -> dict[str, float]:
    """Add the gradient of the PPO loss of one minibatch, microbatch by microbatch, each weighted by
    its tokens. Returns: statistics.

    loss = policy loss + vf_coef · value loss − ent_coef · entropy [+ kl_coef · KL, --kl-in loss]
    Source: PPO paper, eq. 9.
    """
    totals, ratio_first = {}, 1.0
    for idx in split_list(range(len(minibatch.ended)), args.microbatch_size):
        microbatch = minibatch.select(idx)
        mask, old_logprobs = microbatch.response_mask, microbatch.old_logprobs
        new_logprobs, entropies, new_values = actor_critic(  # (microbatch, response_len) each
            microbatch.sequence_ids, microbatch.sequence_mask, microbatch.response_len)
        pg_loss, clipfrac = policy_loss(new_logprobs, old_logprobs, microbatch.advantages,
                                        mask, args.clip_coef)
        vf_loss, vf_clipfrac = value_loss(new_values, microbatch.old_values, microbatch.returns,
                                          mask, args.vf_clip_coef)
        mean_entropy = masked_mean(entropies, mask)
        loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy
        if args.kl_in == "loss":
            kl = kl_penalty(new_logprobs, microbatch.ref_logprobs, args.kl_estimator)
            loss = loss + kl_coef * masked_mean(kl, mask)
        share = mask.sum() / minibatch.response_mask.sum()
        (share * loss).backward()

        with torch.no_grad():  # statistics: nothing below is trained on
            approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)
            ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0)).flatten()
            farthest = ratio[(ratio - 1).abs().argmax()].item()
            ratio_first = max(ratio_first, farthest, key=lambda x: abs(x - 1))
        stats = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy,
                 "approx_kl": approx_kl, "clipfrac": clipfrac, "vf_clipfrac": vf_clipfrac}
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + (share * value).item()
    return totals | {"ratio_first": ratio_first}


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    returns, values = returns[mask], values[mask]
    unexplained = (returns - values).var(correction=0)
    return (1 - unexplained / (returns.var(correction=0) + 1e-8)).item()


def prompt_batch(prompts: list, iteration: int, batch_size: int, seed: int) -> list:
    """Batch number iteration (from 1) of an endless pass over the prompts, reshuffled each time."""
    batch = []
    for i in range((iteration - 1) * batch_size, iteration * batch_size):
        epoch, idx = divmod(i, len(prompts))
        batch.append(prompts[shuffled_indices(len(prompts), f"{seed} {epoch}")[idx]])
    return batch


@functools.lru_cache(maxsize=2)
def shuffled_indices(length: int, seed: str) -> list[int]:
    """A permutation of range(length) that depends on nothing else."""
    return random.Random(seed).sample(range(length), length)


# ==================================================================================================
# From here on, bookkeeping: metrics, evaluation, files
# ==================================================================================================


def response_scores(rollout: Rollout) -> Tensor:
    """Raw score of each response (batch,); dense ones are summed over its tokens."""
    return rollout.scores if rollout.scores.dim() == 1 else rollout.scores.sum(dim=1)


def response_kl(rollout: Rollout) -> Tensor:
    """KL to the reference of each response (batch,), nats: its tokens' k1, summed."""
    kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")
    return torch.where(rollout.response_mask, kl, 0).sum(dim=1)


def rollout_metrics(rollout: Rollout, tokenizer, args: Args) -> dict[str, float]:
    """What the responses are like: raw scores, nats per response, tokens, shares."""
    scores, responses, ended = response_scores(rollout), rollout.responses, rollout.ended
    bigrams = [pair for ids in responses for pair in itertools.pairwise(ids)]
    metrics = {
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "kl": response_kl(rollout).mean().item(),
        "response_len": sum(len(ids) for ids in responses) / len(responses),
        "eos_share": ended.float().mean().item(),
        "entropy": masked_mean(rollout.entropies, rollout.response_mask).item(),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
    }
    if rollout.rewards is not None:
        metrics["rewards_mean"] = masked_mean(rollout.rewards, rollout.response_mask).item()
    if args.dataset == "reviews":
        texts = decode_texts(tokenizer, rollout.prompts, responses)
        golds = gold_rewards(texts, ended)
        grammatical = [is_grammatical(*x, end) for x, end in zip(texts, ended, strict=True)]
        metrics["gold_mean"] = sum(golds) / len(golds)
        metrics["grammatical"] = sum(grammatical) / len(grammatical)
    return metrics


def evaluate(
    actor_critic: ActorCritic, reference: Policy, score: Callable, data: Data, tokenizer,
    args: Args, sft_policy: Policy,
) -> tuple[dict[str, float], Rollout]:
    """Metrics and responses on the evaluation prompts, with the same random numbers every time."""
    rollout = collect_rollout(actor_critic, reference, data.eval_prompts, args, args.seed)
    rollout.scores = score(rollout.prompts, rollout.responses).to(rollout.old_logprobs.device)
    metrics = rollout_metrics(rollout, tokenizer, args)
    if data.eval_demonstrations:  # has it unlearnt what SFT taught?
        metrics["perplexity"] = perplexity(sft_policy, data.eval_demonstrations,
                                           args.microbatch_size)
    return metrics, rollout


def print_before_after(before: tuple, after: tuple, tokenizer, args: Args) -> None:
    """The table that a run ends with, and two prompts answered before and after PPO."""
    (old_metrics, old), (new_metrics, new) = before, after
    gold = args.dataset == "reviews"
    texts = [decode_texts(tokenizer, x.prompts, x.responses) for x in (old, new)]
    quality = [torch.tensor(gold_rewards(y, x.ended)) if gold else response_scores(x)
               for x, y in zip((old, new), texts, strict=True)]
    wins = (quality[1] > quality[0]).float() + 0.5 * (quality[1] == quality[0]).float()
    labels = {
        "score_mean": "score (raw)", "gold_mean": "gold reward", "grammatical": "grammatical",
        "kl": "KL to the reference, nats", "response_len": "response, tokens",
        "eos_share": "ended by EOS", "distinct_2": "distinct bigrams",
        "perplexity": "perplexity of demonstrations",
    }
    print(f"\n{f'{len(wins)} evaluation prompts':<32}{'SFT':>9}{'PPO':>9}")
    for key, label in labels.items():
        if key in old_metrics:
            print(f"{label:<32}{old_metrics[key]:>9.3f}{new_metrics[key]:>9.3f}")
    print(f"{'win rate by ' + ('gold reward' if gold else 'score'):<32}{0.5:>9.3f}"
          f"{wins.mean().item():>9.3f}")
    for (prompt, old_response), (_, new_response) in list(zip(*texts, strict=True))[:2]:
        print(f"\nprompt  {prompt}\n  SFT   {old_response}\n  PPO   {new_response}")


class RunLog:
    """The files of a run: TensorBoard events, metrics.jsonl, samples.jsonl."""

    def __init__(self, tokenizer, args: Args):
        from torch.utils.tensorboard import SummaryWriter

        self.tokenizer, self.args = tokenizer, args
        self.run_dir = Path(args.output_dir) / args.run_name
        self.run_dir.mkdir(parents=True)
        self.writer = SummaryWriter(str(self.run_dir))
        lines = [f"    {key}: {value}" for key, value in asdict(args).items()]
        self.writer.add_text("args", "\n".join(lines))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point on each curve."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def append(self, file_name: str, record: dict) -> None:
        """One line of a jsonl file."""
        with open(self.run_dir / file_name, "a") as file:
            file.write(json.dumps(record) + "\n")

    def iteration(self, number: int, metrics: dict, stats: dict, perf: dict, rollout: Rollout):
        """One PPO iteration: curves over episodes, a jsonl object, a line on the console."""
        args, num_iterations = self.args, self.args.total_episodes // self.args.batch_size
        seconds = time.perf_counter() - perf.pop("start")
        perf |= {"episodes_per_s": args.batch_size / seconds, "peak_memory_gb": peak_memory_gb()}
        counters = {"iteration": number, "episodes": number * args.batch_size}
        groups = {"rollout": metrics, "ppo": stats, "perf": perf}
        scalars = {f"{group}/{name}": x for group in groups for name, x in groups[group].items()}
        self.scalars(scalars, counters["episodes"])
        self.append("metrics.jsonl", counters | {"wall_time": time.time()} | scalars)
        gold = "gold {gold_mean:5.2f} | grammatical {grammatical:4.0%} | "
        print(f"ppo {number:>4}/{num_iterations} | score {metrics['score_mean']:5.2f} | "
              f"{gold.format(**metrics) if 'gold_mean' in metrics else ''}"
              f"KL {metrics['kl']:5.2f} nats | {metrics['response_len']:4.1f} tokens | "
              f"EOS {metrics['eos_share']:4.0%} | clipped {stats['clipfrac']:3.0%} | "
              f"{perf['episodes_per_s']:.0f} episodes/s", flush=True)
        if args.dtype == "float32" and abs(stats["ratio_first"] - 1) > 1e-3:
            print(f"warning: the ratio starts at {stats['ratio_first']}, not 1: old and new "
                  "log-probabilities are computed differently; is the model deterministic?")
        if number % args.log_samples_interval == 0:
            self.samples(counters, rollout)

    def samples(self, counters: dict, rollout: Rollout) -> None:
        """Two responses, with raw score, KL, and total: the sum of what PPO rewards."""
        texts = decode_texts(self.tokenizer, rollout.prompts[:2], rollout.responses[:2])
        for i, (prompt, response) in enumerate(texts):
            score, kl = response_scores(rollout)[i].item(), response_kl(rollout)[i].item()
            numbers = {"score": score, "kl": kl, "total": rollout.rewards[i].sum().item()}
            record = counters | {"prompt": prompt, "response": response} | numbers
            self.append("samples.jsonl", record)
            self.writer.add_text("samples", f"{prompt}\n\n**{response}**", counters["episodes"])
            print(f"      {prompt[-60:]!r} -> {response!r}\n      score {score:.2f}, "
                  f"KL {kl:.2f} nats, total {numbers['total']:.2f}")


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the wall time of a with-block into seconds[name]."""
    start_time = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start_time


def peak_memory_gb() -> float:
    """Most memory in use so far: of the GPU, or of the process where no GPU was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes


def save_policy(policy: Policy, log: RunLog) -> None:
    """Write policy/ for AutoModelForCausalLM. Its `generate` samples what PPO trained: no top-p,
    no penalty, no PAD."""
    from transformers import GenerationConfig

    policy.lm.generation_config = GenerationConfig(
        do_sample=True, temperature=policy.temperature, top_k=0, top_p=1.0,
        eos_token_id=policy.eos_ids.tolist(), pad_token_id=policy.pad_id,
        bos_token_id=log.tokenizer.bos_token_id, suppress_tokens=policy.banned_ids.tolist() or None,
    )
    policy.lm.save_pretrained(log.run_dir / "policy")
    log.tokenizer.save_pretrained(log.run_dir / "policy")


def print_plan(args: Args, policy: Policy) -> None:
    """Sizes and settings that follow from others, once, before any training."""
    device, size = policy.device, sum(x.numel() for x in policy.lm.parameters()) / 1e6
    num_steps = args.batch_size // args.minibatch_size
    reward = args.reward_fn or args.reward_model or "a reward model trained here"
    print(f"run          {args.output_dir}/{args.run_name} on {device}, {args.dtype}\n"
          f"policy       {args.policy_model or 'from scratch'}, {size:.2f} M parameters, "
          f"critic {args.critic}\n"
          f"rates        SFT {args.sft_learning_rate}, reward model {args.reward_learning_rate}, "
          f"PPO {args.learning_rate}, critic {args.critic_learning_rate}\n"
          f"rewards      scores of {reward}, normalised: {args.score_norm}\n"
          f"plan         {args.total_episodes} episodes = {args.total_episodes // args.batch_size} "
          f"iterations x {args.batch_size} responses of up to {args.response_len} tokens\n"
          f"             an iteration = {args.update_epochs} epochs x {num_steps} steps of "
          f"{args.minibatch_size} responses, in microbatches of {args.microbatch_size}")


# ==================================================================================================
# main: the table of contents
# ==================================================================================================


def check_data(args: Args, data: Data) -> None:
    """Refuse a run whose data lack what a stage needs."""
    if not data.demonstrations and (args.sft_epochs > 0 or args.ptx_coef > 0):
        refuse(f"--dataset {args.dataset} has no demonstrations for --sft-epochs {args.sft_epochs} "
               f"and --ptx-coef {args.ptx_coef}; give --sft-dataset, or set both to 0.")
    own_reward_model = args.reward_model is None and args.reward_fn is None
    if own_reward_model and not data.comparisons and args.dataset != "reviews":
        refuse(f"--dataset {args.dataset} has no comparisons to train a reward model on; give "
               "--reward-model or --reward-fn.")


def measure_score_norm(policy: Policy, score: Callable, data: Data, args: Args) -> ScoreNorm:
    """The normalisation that --score-norm asks for; sft measures it on two batches of prompts."""
    if args.score_norm != "sft":
        return ScoreNorm(running=args.score_norm == "running")
    prompts = prompt_batch(data.prompts, 1, 2 * args.batch_size, args.seed)
    generator = make_generator(policy, args.seed)
    scores = score(prompts, sample_ids(policy, prompts, args.response_len, generator)[0])
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    print(f"rewards      raw scores of the SFT policy: mean {mean:.3f}, std {std:.3f}")
    return ScoreNorm(mean, std if std > 1e-6 else 1.0)  # all the same: only shift


def make_optimizer(actor_critic: ActorCritic, args: Args) -> torch.optim.Optimizer:
    """Adam with one group for the policy and one for what belongs to the critic alone."""
    critic = [x for name, x in actor_critic.named_parameters() if not name.startswith("policy.")]
    policy = list(actor_critic.policy.parameters())
    groups = [{"params": policy, "lr": args.learning_rate},
              {"params": critic, "lr": args.critic_learning_rate}]
    return torch.optim.Adam(groups, eps=1e-5)  # [37 details, core #3]


def set_learning_rates(optimizer: torch.optim.Optimizer, iteration: int, args: Args) -> float:
    """Learning rates of an iteration, for policy and critic. Returns: the policy's."""
    num_iterations = args.total_episodes // args.batch_size
    scale = lr_scale(iteration, num_iterations, args.lr_warmup, args.anneal_lr)
    for group, peak in zip(optimizer.param_groups,
                           (args.learning_rate, args.critic_learning_rate), strict=True):
        group["lr"] = scale * peak
    return scale * args.learning_rate


def main(args: Args) -> None:
    """The whole run."""
    args = resolve_args(args)
    torch.manual_seed(args.seed)
    lm, tokenizer, data = prepare_data(args)
    policy = make_policy(lm, tokenizer, args.temperature, args.dtype).to(args.device)
    sft_policy = make_policy(lm, tokenizer, 1.0, args.dtype).to(args.device)  # the same weights
    score, reward_model, same_tokens = load_given_reward(args, policy, tokenizer, data)
    check_data(args, data)
    print_plan(args, policy)
    log = RunLog(tokenizer, args)

    # Stage 1: supervised fine-tuning
    if args.sft_epochs > 0:
        train_sft(sft_policy, data, args, log)
        save_policy(policy, log)

    # Stage 2: reward model
    if score is None:
        score, reward_model = train_reward_model(policy, data, tokenizer, args, log)
        same_tokens = True

    # Stage 3: PPO
    reference = copy.deepcopy(policy).requires_grad_(False)
    score_norm, kl_coef = measure_score_norm(policy, score, data, args), args.kl_coef
    actor_critic = make_actor_critic(args, policy, reward_model, same_tokens, score_norm)
    optimizer = make_optimizer(actor_critic, args)
    before = evaluate(actor_critic, reference, score, data, tokenizer, args, sft_policy)
    for iteration in range(1, args.total_episodes // args.batch_size + 1):
        perf = {"start": time.perf_counter()}
        learning_rate = set_learning_rates(optimizer, iteration, args)
        seed = args.seed * 1_000_003 + iteration  # the same numbers, whatever came before
        prompts = prompt_batch(data.prompts, iteration, args.batch_size, args.seed)
        with timed(perf, "rollout_s"):
            rollout = collect_rollout(actor_critic, reference, prompts, args, seed)
        with timed(perf, "score_s"):
            rollout.scores = score(rollout.prompts, rollout.responses).to(policy.device)
        rollout.rewards = compute_rewards(rollout, score_norm, kl_coef, args)
        rollout.advantages, rollout.returns = compute_advantages(rollout, args)
        metrics = rollout_metrics(rollout, tokenizer, args)
        if args.max_kl is not None and metrics["kl"] > args.max_kl:
            print(f"ppo          ends: KL {metrics['kl']:.2f} nats > --max-kl {args.max_kl}")
            break
        with timed(perf, "update_s"):
            stats = update_policy(actor_critic, optimizer, rollout, kl_coef, args, seed,
                                  sft_policy, data.demonstrations)
        stats |= {"kl_coef": kl_coef, "learning_rate": learning_rate}
        log.iteration(iteration, metrics, stats, perf, rollout)
        if args.kl_target is not None:
            kl_coef = adaptive_kl_coef(kl_coef, metrics["kl"], args.kl_target, args.batch_size,
                                       args.kl_horizon)
        if args.ref_update_interval and iteration % args.ref_update_interval == 0:
            reference.load_state_dict(policy.state_dict())
        if iteration % args.save_interval == 0:
            save_policy(policy, log)

    save_policy(policy, log)
    after = evaluate(actor_critic, reference, score, data, tokenizer, args, sft_policy)
    print_before_after(before, after, tokenizer, args)
    log.writer.close()


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
