"""How much memory a run holds: bytes per parameter by flags, and whether 200 iterations leak.

    python benchmarks/memory.py            # 15 minutes; results/memory.json and .md

Bytes per parameter: all tensors alive before an optimizer step (weights, gradients, Adam's two
moments, reference, reward model, critic), over the policy's parameters, with a policy so wide and
rows so few that activations hardly count; policy and reward model have one shape. What comes on top
on a GPU: activations, the cache of the sampler, and the logits of one chunk.
Memory over time: what the process holds (resident set) after each of 200 iterations.
"""

import functools
import gc
import json
import tempfile
from pathlib import Path

import common  # benchmarks/common.py

SETTINGS = {
    "shared critic, --reward-fn": {"reward_fn": "rewards.py:lengths"},
    "shared critic, reward model": {},
    "separate critic, reward model": {"critic": "separate"},
    "separate critic, 3 reward models": {"critic": "separate", "models": 3},
    "shared critic, reward model, --dtype bfloat16": {"dtype": "bfloat16"},
}
GPUS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
ITERATIONS = 200


def save_models(folder):
    """A policy and a reward model of 3.4 million parameters each, prompts, a reward function."""
    import transformers

    words = list("abcdefghijklmnop")
    common.save_random_models(folder, words, transformers.LlamaConfig(
        vocab_size=len(words) + 2, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1))
    rows = [{"prompt": f"{a} {b} {c}"} for a in words for b in words for c in words[:4]]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(
        "def lengths(prompts, responses):\n    return [float(len(x)) for x in responses]\n")


def tensor_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    import torch

    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run(ppo_rlhf, iterations, batch, models=1, reward_fn=None, **settings):
    """main of ppo_rlhf.py on models that are saved first."""
    with tempfile.TemporaryDirectory() as name:
        save_models(Path(name))
        given = {"reward_fn": f"{name}/{reward_fn}"} if reward_fn else {
            "reward_model": (f"{name}/reward_model",) * models}
        ppo_rlhf.main(ppo_rlhf.Args(
            dataset=f"{name}/prompts.jsonl", policy_model=f"{name}/policy", sft_epochs=0,
            eval_prompts=0, total_episodes=iterations * batch, batch_size=batch, device="cpu",
            minibatch_size=max(1, batch // 2), response_len=8, max_prompt_len=4, run_name="run",
            output_dir=name, **given, **settings))


def measure(job):
    """Bytes per parameter with some settings, or memory over time."""
    if job["setting"] == "over time":
        return over_time()
    ppo_rlhf = common.import_ppo_rlhf()
    found, optimizer_step = [], ppo_rlhf.optimizer_step

    def watched(model, *args):
        found.append(tensor_bytes() / sum(x.numel() for x in model.lm.parameters()))
        return optimizer_step(model, *args)

    ppo_rlhf.optimizer_step = watched
    run(ppo_rlhf, 2, 2, **SETTINGS[job["setting"]])
    return {"bytes_per_parameter": round(max(found), 2)}


def over_time():
    """Resident memory in MB after each of many iterations."""
    ppo_rlhf = common.import_ppo_rlhf()
    found, iteration = [], ppo_rlhf.RunLog.iteration

    def watched(*args):
        iteration(*args)
        found.append(round(1000 * common.memory("VmRSS"), 1))

    ppo_rlhf.RunLog.iteration = watched
    run(ppo_rlhf, ITERATIONS, 16)
    return {"resident_mb": found}


def main():
    """Measure what is missing, then the table."""
    runs = common.run_missing(
        "memory", [{"setting": name} for name in [*SETTINGS, "over time"]], ("setting",),
        functools.partial(common.run_apart, __file__), ("torch", "transformers"),
        ("bytes_per_parameter",))["runs"]
    found, rows = {x["setting"]: x for x in runs}, []
    for name in SETTINGS:
        size = found[name]["bytes_per_parameter"]
        rows.append([name, f"{size:.1f}", *(f"{0.8 * x / size / 1e9:.1f}" for x in GPUS.values())])
    lines = common.markdown(["flags", "bytes per parameter",
                             *(f"billions of parameters on {gpu}" for gpu in GPUS)], rows)
    resident = found["over time"]["resident_mb"]
    lines += ["", "Sizes: a fifth of the GPU is left for activations, cache and logits; they were "
              "not tried on a GPU.", "", f"Resident memory after iteration 20: {resident[19]:.0f} "
              f"MB, after iteration {len(resident)}: {resident[-1]:.0f} MB."]
    common.publish("memory", lines)


if __name__ == "__main__":
    common.start(main, measure)
