"""Small models, tokenizers and data that the tests share. Everything is made here, offline."""

import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)

WORDS = ["the", "plot", "was", "dull", "good", "bad", "a", "b", "c", "d", ".", ","]


def make_tokenizer(words=WORDS, **special):
    """One token per word; [PAD] is 0, [EOS] is 1 and [END] 2 is special, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[END]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    usual = {"pad_token": "[PAD]", "eos_token": "[EOS]", "extra_special_tokens": ["[END]"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(usual | special))


FAMILIES = ["GPT2", "GPTNeoX", "Llama", "Qwen2", "Qwen3", "Gemma", "Qwen3Next"]


def make_config(family, **changes):
    """A model of about 10,000 parameters; dropout is on wherever the family knows it."""
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1,
             "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.5}
    grouped = sizes | {"num_key_value_heads": 1, "head_dim": 8}
    own = {
        "GPT2": sizes, "GPTNeoX": sizes | {"hidden_dropout": 0.1},
        "Llama": sizes | {"num_key_value_heads": 1}, "Qwen2": sizes | {"num_key_value_heads": 1},
        "Gemma2": grouped | {"final_logit_softcapping": 3.0},
        "Qwen3Next": grouped | {  # a hybrid: a layer of linear attention, then a usual one
            "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1],
            "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8},
    }
    return getattr(transformers, f"{family}Config")(**(own.get(family, grouped) | changes))


def make_lm(family="Llama", seed=0, kind="CausalLM", **changes):
    """A random language model."""
    import transformers

    torch.manual_seed(seed)
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    return auto_class.from_config(make_config(family, **changes)).eval()


def make_reward_model(*which, **changes):
    """A random sequence classifier with one output."""
    return make_lm(*which, **({"kind": "SequenceClassification", "num_labels": 1} | changes))


def make_policy(lm=None, tokenizer=None, **settings):
    """A Policy without critic, as load_policy makes it: a small Llama unless lm says otherwise."""
    from ppo_rlhf import Args, Policy

    usual = {"max_prompt_len": 8, "response_len": 8, "batch_size": 8, "minibatch_size": 4,
             "microbatch_size": 4, "learning_rate": 1e-2, "device": "cpu"}
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Policy(lm or make_lm(), tokenizer, Args(**(usual | settings)))


def save(folder, model, tokenizer):
    """Write model and tokenizer as users have them on disk. Returns: the folder's name."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A place for models and data that tests only read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def policy_folder(folder):
    """A GPT-2 on disk, with dropout and a generation config that PPO must ignore."""
    model = make_lm("GPT2")
    model.generation_config.update(do_sample=True, top_p=0.3, repetition_penalty=2.0)
    return save(folder / "policy", model, make_tokenizer())


# 32 comparisons of short texts with ragged prompts, and a column for reward functions.
PAIRS = [{"prompt": " ".join((WORDS * 2)[i % 9 : i % 9 + 1 + i % 4]), "answer": i,
          "chosen": " the plot was good .", "rejected": " bad bad bad"} for i in range(32)]


@pytest.fixture(scope="session")
def pairs_file(folder):
    """A file of them."""
    return write_rows(folder / "pairs.jsonl", PAIRS)


# Settings of a run of two iterations that takes a second; tests replace what they are about.
TINY = {"total_episodes": 16, "batch_size": 8, "minibatch_size": 4, "update_epochs": 2,
        "response_len": 6, "max_prompt_len": 4, "eval_prompts": 4, "learning_rate": 1e-2,
        "sft_learning_rate": 1e-3, "save_interval": 1, "device": "cpu"}
ALONE = {"reward_learning_rate": None, "sft_epochs": 0, "sft_learning_rate": None}  # stage 3 alone


@pytest.fixture
def tiny_args(tmp_path, policy_folder, pairs_file):
    """Args of such a run of all three stages."""
    from ppo_rlhf import Args

    return Args(**TINY, dataset=pairs_file, policy_model=policy_folder, output_dir=str(tmp_path),
                run_name="run", reward_learning_rate=1e-3)


def write_rows(path, rows):
    """A jsonl file of rows, or of lines. Returns: its name."""
    lines = (x if isinstance(x, str) else json.dumps(x) for x in rows)
    Path(path).write_text("\n".join(lines))
    return str(path)


def read_rows(path):
    """The rows of a jsonl file; none if there is no such file."""
    return [json.loads(x) for x in Path(path).open()] if Path(path).exists() else []


def read_curves(folder):
    """What TensorBoard has of a run, oldest file first: {name: [(step, value), …]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = defaultdict(list)
    for path in sorted(Path(folder).rglob("events*"), key=lambda x: x.stat().st_mtime_ns):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            curves[name] += [(point.step, point.value) for point in events.Scalars(name)]
    return dict(curves)


def read_metrics(folder):
    """metrics.jsonl of a run, without what the clock and the machine decide."""
    return [{key: x for key, x in row.items() if "perf" not in key}
            for row in read_rows(Path(folder, "metrics.jsonl"))]


def run(args, **changes):
    """Run the pipeline. Returns: its metrics, one dict per iteration."""
    from ppo_rlhf import main

    args = replace(args, **changes)
    main(args)
    return read_metrics(Path(args.output_dir, args.run_name))
