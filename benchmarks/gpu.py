"""What a GPU does with ppo_rlhf.py, in one command of about ten minutes.

    python benchmarks/gpu.py         # on a machine with a GPU; writes results/gpu.json and gpu.md
    python benchmarks/gpu.py --tiny  # the same at tiny sizes, also on a CPU; writes nothing

default: the default command on the GPU and on the CPU, means over held-out prompts after PPO.
large: PPO of a random Llama with the widths of Qwen2-0.5B, 50,000 words, in bfloat16, with a
separate critic. trl: the same by trl, whose update is in bfloat16 and its rollout in TF32. Both
need 48 GB or more. reading: responses sampled and read per second; how far log-probabilities in
bfloat16 and in TF32 are from float32's, in nats (a trained model's may be further).
"""

import gc
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import common  # benchmarks/common.py
import throughput  # benchmarks/throughput.py
import torch
import transformers

ppo_rlhf = common.import_ppo_rlhf()
TINY, GPU = "--tiny" in sys.argv, torch.cuda.is_available()
VOCAB, BATCH, LENGTH = (64, 16, 4) if TINY else (50_000, 64, 128)  # LENGTH of prompts and responses
WORDS = [f"w{i}" for i in range(VOCAB - 2)]
ROWS = [{"prompt": " ".join(random.Random(i).choices(WORDS, k=LENGTH))} for i in range(256)]


def default(device, folder, _):
    """The default command."""
    short = {"total_episodes": 128, "num_comparisons": 32} if TINY else {}
    ppo_rlhf.main(ppo_rlhf.Args(device=device, output_dir=folder, run_name=device, **short))
    lines = Path(folder, device, "before_after.jsonl").read_text().splitlines()
    return {name: round(fmean(json.loads(line)["ppo"][name] for line in lines), 3)
            for name in ("gold", "grammatical", "score", "kl")}


def large(_, folder, args):
    """PPO of the random model: medians over the iterations, without the first."""
    ppo_rlhf.save_checkpoint = lambda *_: None  # 12 GB, after what is measured
    ppo_rlhf.main(args)
    rows = common.read_metrics(f"{folder}/run")[1:]
    return {x: round(median(row[x] for row in rows), 3) for x in rows[0] if x.startswith("perf/")}


def trl(device, folder, _):
    """trl's PPOTrainer on the same work."""
    # accelerate launch sets this; without it trl 1.12 beside transformers 5.23 ignores bf16=True.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    found = throughput.run_trl(Path(folder), {"batch": BATCH, "response_len": LENGTH}, bf16=True,
                               use_cpu=device == "cpu")
    peak = torch.cuda.max_memory_allocated() if GPU else 0  # the other peaks are not trl's alone
    return {name: round(found[name], 3) for name in ("episodes_per_s", "optimizer_steps")} | {
        "gpu_peak_gb": round(peak / 1e9, 3)}


@torch.no_grad()
def reading(_device, _folder, args):
    """Sample a batch, read it in three precisions; the times are those of the second call."""
    policy = ppo_rlhf.load_policy(args.policy_model, args)
    for _ in range(2):
        torch.set_float32_matmul_precision("high")  # as ppo_rlhf.main does
        times = [time.perf_counter()]
        rollout = ppo_rlhf.collect_rollout(policy, None, ROWS[:BATCH], 1, args)
        times.append(time.perf_counter())
        found = []
        for dtype, precision in (("bfloat16", "high"), ("float32", "high"), ("float32", "highest")):
            torch.set_float32_matmul_precision(precision)
            policy.args = replace(args, dtype=dtype)
            found.append(policy(rollout, 1.0)[0][rollout.response_mask].cpu())
            times.append(time.perf_counter())
        policy.args = args
    speeds = zip(("sample", "bfloat16", "TF32", "float32"), times, times[1:], strict=False)
    return {f"{name}_per_s": round(BATCH / (end - start), 1) for name, start, end in speeds} | {
        f"{name}_{part.__name__}": round(float(part((x - found[2]).abs())), 7)
        for name, x in zip(("bfloat16", "TF32"), found, strict=False)
        for part in (torch.max, torch.mean)}


def attempt(part, *arguments):
    """One part, alone on the GPU: an exception would hold the models of its part there."""
    torch.set_float32_matmul_precision("high")  # as ppo_rlhf.main does; trl reads in it too
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    try:
        return part(*arguments)
    except (Exception, SystemExit) as error:
        words = f"{type(error).__name__}: {error}"
    raise RuntimeError(words)


def main():
    """All parts, one after the other."""
    parts = {"default": default, "large": large, "trl": trl, "reading": reading}
    devices = ["cuda", "cpu"][not GPU :]
    jobs = [{"part": "default", "device": x} for x in devices]
    jobs += [{"part": name, "device": devices[0]} for name in ("large", "trl", "reading")]
    jobs = [job | {"gpu": torch.cuda.get_device_name() if GPU else "none"} for job in jobs]
    hidden, inner, layers, heads = (32, 64, 2, 2) if TINY else (896, 4864, 24, 14)
    with tempfile.TemporaryDirectory() as folder:
        if TINY or not GPU:
            common.RESULTS = Path(folder)
        common.save_random_models(Path(folder), WORDS, transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_labels=1,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
            pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True))
        Path(folder, "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        args = ppo_rlhf.resolve_args(ppo_rlhf.Args(
            dataset=f"{folder}/prompts.jsonl", policy_model=f"{folder}/policy", sft_epochs=0,
            reward_model=(f"{folder}/reward_model",), eval_prompts=0, total_episodes=5 * BATCH,
            batch_size=BATCH, minibatch_size=BATCH // 4, max_prompt_len=LENGTH, critic="separate",
            response_len=LENGTH, dtype="bfloat16", output_dir=folder, run_name="run"))
        runs = common.run_missing(
            "gpu", jobs, ("part", "device", "gpu"),
            lambda x: attempt(parts[x["part"]], x["device"], folder, args),
            ("torch", "transformers", "trl", "accelerate"), at_once=1)["runs"]
        common.publish("gpu", [f"- {json.dumps(run)}" for run in runs])


if __name__ == "__main__":
    main()
