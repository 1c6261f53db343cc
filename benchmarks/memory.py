"""How much memory a run holds: bytes per parameter by flags, and whether 200 iterations leak.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/memory.py            # 5 minutes; results/memory.json, .md and .png

Bytes per parameter: all tensors alive in the middle of an optimizer step (weights, gradients,
Adam's two moments, reference, reward model, critic), over the policy's parameters, with a policy so
wide and rows so few that activations hardly count; policy and reward model have one shape. What
comes on top on a GPU: activations, the cache of the sampler, and the logits of one chunk.
Memory over time: what the process holds (resident set) after each of 200 iterations.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import common  # benchmarks/common.py

SETTINGS = {
    "shared critic, --reward-fn": {"reward_fn": "LENGTHS"},
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


def start(folder, iterations, batch, **settings):
    """main of ppo_rlhf.py on the saved models."""
    import ppo_rlhf

    number, fn = settings.pop("models", 1), settings.pop("reward_fn", None)
    given = {"reward_fn": f"{folder}/rewards.py:lengths"} if fn else {
        "reward_model": (str(folder / "reward_model"),) * number}
    ppo_rlhf.main(ppo_rlhf.Args(
        dataset=str(folder / "prompts.jsonl"), policy_model=str(folder / "policy"), sft_epochs=0,
        eval_prompts=0, total_episodes=iterations * batch, batch_size=batch, device="cpu",
        minibatch_size=max(1, batch // 2), response_len=8, max_prompt_len=4, run_name="run",
        output_dir=str(folder), save_interval=20, **given, **settings))


def measure(settings):
    """Bytes per parameter with these settings."""
    import torch

    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    found, add_up = [], ppo_rlhf.add_up_gradients

    def watched(model):
        add_up(model)
        params = sum(x.numel() for x in model.lm.parameters())
        found.append(tensor_bytes() / params)

    ppo_rlhf.add_up_gradients = watched
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)
        save_models(Path(name))
        start(Path(name), 2, 2, **settings)
    return {"bytes_per_parameter": round(max(found), 2)}


def over_time():
    """Resident memory in MB after each of many iterations."""
    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    found, iteration = [], ppo_rlhf.RunLog.iteration

    def watched(*args):
        iteration(*args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))

    ppo_rlhf.RunLog.iteration = watched
    with tempfile.TemporaryDirectory() as name:
        save_models(Path(name))
        start(Path(name), ITERATIONS, 16)
    return {"resident_mb": found}


def one_run(job):
    """A measurement in a process of its own."""
    output = common.run_python(__file__, "--measure", job["setting"]).stdout
    return json.loads(output.splitlines()[-1])


def main():
    """Measure what is missing, then table and plot."""
    jobs = [{"setting": name} for name in [*SETTINGS, "over time"]]
    runs = common.run_missing("memory", jobs, ("setting",), one_run, ("torch", "transformers"),
                              ("bytes_per_parameter",))["runs"]
    found = {x["setting"]: x for x in runs}
    rows = []
    for name in SETTINGS:
        size = found[name]["bytes_per_parameter"]
        fits = (f"{0.8 * gpu / size / 1e9:.1f}" for gpu in GPUS.values())
        rows.append([name, f"{size:.1f}", *fits])
    lines = common.markdown(["flags", "bytes per parameter",
                             *(f"billions of parameters on {gpu}" for gpu in GPUS)], rows)
    resident = found["over time"]["resident_mb"]
    lines += ["", "Sizes: a fifth of the GPU is left for activations, cache and logits; they were "
              "not tried on a GPU.", "", f"Resident memory after iteration 20: {resident[19]:.0f} "
              f"MB, after iteration {len(resident)}: {resident[-1]:.0f} MB."]
    common.publish("memory", lines)
    with common.picture("memory", 1, 1, (5, 3)) as axes:
        axes[0, 0].plot(range(1, len(resident) + 1), resident, color=common.BLUE)
        axes[0, 0].set_ylim(0, None)
        axes[0, 0].set_xlabel("iteration")
        axes[0, 0].set_ylabel("resident memory, MB")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        setting = sys.argv[sys.argv.index("--measure") + 1]
        print(json.dumps(over_time() if setting == "over time" else measure(SETTINGS[setting])))
    else:
        main()
