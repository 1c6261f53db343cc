"""PPO beside GRPO, RLOO, REINFORCE, DPO, LoRA and best-of-n: the same models, data and seeds.

    python benchmarks/alternatives.py             # the embedded task, 3 seeds; an hour
    python benchmarks/alternatives.py --bandit    # which of them reach π*? (see optimum.py)
    python benchmarks/alternatives.py --alone     # seconds and memory; run nothing beside it

GRPO, RLOO, DPO and LoRA are ppo_rlhf.py with benchmarks/variants/*.patch. REINFORCE is flags: one
step per batch (nothing is clipped), λ = 1, a critic that does not learn. Its rate and DPO's were
picked with seed 4. All methods of a seed start from copies of one run folder, after stages 1 and 2.
"""

import functools
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import common  # benchmarks/common.py
import memory  # benchmarks/memory.py

GRPO = {"kl_in": "loss", "kl_estimator": "k3", "group_size": 8}
REINFORCE = {"update_epochs": 1, "gae_lambda": 1.0, "vf_coef": 0.0}
METHODS = {  # name: networks held, patch, settings (also the patch's defaults), colour
    "PPO": (3, "", {}, common.BLUE),
    "PPO separate critic": (4, "", {"critic": "separate"}, "#85c1e9"),
    "GRPO": (3, "grpo", GRPO, common.GREEN),
    "GRPO kl_coef 0.2": (3, "grpo", GRPO | {"kl_coef": 0.2}, "#82e0aa"),
    "RLOO": (3, "rloo", {"group_size": 4}, "#b7950b"),
    "REINFORCE": (3, "", REINFORCE | {"minibatch_size": 128, "learning_rate": 3e-3}, common.GREY),
    **{f"DPO β {beta}": (2, "dpo", {"kl_coef": beta, "learning_rate": 2e-4}, colour)
       for beta, colour in ((0.03, "#e59866"), (0.1, common.RED), (0.3, "#78281f"))},
    "LoRA": (3, "lora", {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "lora_rank": 8,
                         "lora_alpha": 16.0}, "#7d3c98"),
}
BANDIT = {"PPO": ("", {}), "RLOO": ("rloo", {}), "DPO": ("dpo", {}),
          "DPO four passes": ("dpo", {"total_episodes": 102_400}), "GRPO": ("grpo", {}),
          "GRPO KL in the reward": ("grpo", {"kl_in": "reward", "kl_estimator": "k1"}),
          "REINFORCE": ("", REINFORCE | {"minibatch_size": 256, "learning_rate": 1e-2})}
NUMBERS, KEYS = [1, 4, 16, 64], ["gold", "score", "kl", "grammatical"]
TABLES = {"bandit": ["share", "kl", "kl_optimum", "total_variation"], "alone": [
    "networks", "bytes_per_parameter", "peak_gb", "rollout_s", "score_s", "update_s"]}


def patched(patch, folder):
    """The committed ppo_rlhf.py with variants/PATCH.patch, in a folder outside the repository."""
    path = common.edition("ppo_rlhf.py", "HEAD", tempfile.mkdtemp(dir=folder))
    if patch:
        patch = common.ROOT / "benchmarks" / "variants" / f"{patch}.patch"
        subprocess.run(["git", "apply", patch], cwd=path.parent, check=True)
    return path


def embedded(job, folder):
    """One method on the embedded task: curves and held-out means, or seconds and peak memory."""
    if job["method"] == "best of n":
        return best_of(Path(job["stages"]), job["seed"])
    _, patch, settings, _ = METHODS[job["method"]]
    for name in ("sft", "reward_model"):
        shutil.copytree(Path(job["stages"], name), folder / "run" / name)
    saved = json.loads(Path(job["stages"], "args.json").read_text()) | {"total_episodes": 6400}
    (folder / "run" / "args.json").write_text(json.dumps(saved | settings))
    common.run_python(patched(patch, folder), "--resume", folder / "run")
    metrics = common.read_metrics(folder / "run")
    if job["kind"] == "alone":
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        return {part: round(sum(x[f"perf/{part}"] for x in metrics), 1) for part in (
            "rollout_s", "score_s", "update_s")} | {"peak_gb": round(peak, 3)}
    with open(folder / "run" / "before_after.jsonl") as file:
        after = [json.loads(line)["ppo"] for line in file]
    return {"held_out": {key: round(mean(x[key] for x in after), 3) for key in KEYS},
            "curves": {key: [round(x[f"rollout/{key}"], 3) for x in metrics] for key in KEYS}}


def best_of(stages, seed):
    """Gold of the best of each n, from 64 SFT samples per held-out prompt."""
    ppo_rlhf, groups = common.import_ppo_rlhf(), []
    saved = json.loads((stages / "args.json").read_text())
    args = ppo_rlhf.Args(**{key: x for key, x in saved.items() if key != "digest"})
    rows = ppo_rlhf.load_data(args).held_out.prompts
    policy = ppo_rlhf.load_policy(stages / "sft", args)
    reward_model = ppo_rlhf.load_reward_model(stages / "reward_model", args)
    for number, row in enumerate(rows):
        rollout = ppo_rlhf.collect_rollout(policy, None, [row] * 64, 1000 * seed + number, args)
        records = ppo_rlhf.decode(policy, rollout, [row] * 64)
        golds = [ppo_rlhf.gold_reward(x["prompt"], x["response"], x["ended"]) for x in records]
        groups.append(list(zip(reward_model(records).tolist(), golds, strict=True)))
    return {"gold": {str(n): round(mean(max(group[i : i + n])[1] for group in groups
                                        for i in range(0, 64, n)), 3) for n in NUMBERS}}


def alone(job, folder):
    """Seconds and peak memory of embedded, and bytes per parameter, as memory.py counts them."""
    networks, patch, settings, _ = METHODS[job["method"]]
    found = embedded(job, folder) | {"networks": networks}
    if patch != "dpo":  # memory.py has no comparisons
        common.import_ppo_rlhf(patched(patch, folder).parent)  # memory.py then measures this one
        memory.SETTINGS["this"] = {key: 2 if key == "group_size" else x  # of two responses
                                   for key, x in settings.items() if key != "minibatch_size"}
        found |= memory.measure({"setting": "this"})
    return found


def bandit(job, folder):
    """One method on optimum.py's first instance: 51,200 responses, or for DPO 25,600 pairs of the
    reference's, of which the first is preferred with probability sigmoid(r₁ − r₂)."""
    import optimum
    import torch

    patch, settings = BANDIT[job["method"]]
    instance, rows = folder / "instance", []
    optimum.make_instance(instance, 1)
    reference, rewards = optimum.read_instance(instance)
    texts = [" ".join(x) for n in range(5) for x in itertools.product(optimum.WORDS, repeat=n)]
    torch.manual_seed(job["seed"])
    for prompt, p, r in zip(optimum.TEXTS, optimum.response_probabilities(reference),
                            torch.cat(rewards, dim=1), strict=True):
        for a, b in torch.multinomial(p, 6400, replacement=True).view(-1, 2).tolist():
            a, b = (a, b) if torch.rand(()) < torch.sigmoid(r[a] - r[b]) else (b, a)
            rows.append({"prompt": prompt, "chosen": f" {texts[a]}", "rejected": f" {texts[b]}"})
    if patch == "dpo":
        (instance / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {"seed": job["seed"], "beta": 0.2, "flags": " ".join(common.flags_of(settings)),
           "episodes": len(rows) if patch == "dpo" else 51_200}
    common.run_python(patched(patch, folder), *optimum.our_flags(instance, folder, run))
    return optimum.report(folder / "run" / "policy", instance, run["beta"])


def one_run(job):
    """A run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return {"bandit": bandit, "alone": alone, "runs": embedded}[job["kind"]](job, Path(folder))


def apart(folder, job):
    """one_run in a process of its own; first, if they are missing, the two stages of the seed."""
    stages = Path(folder, f"stages_{job['seed']}")
    if job["kind"] != "bandit" and not stages.exists():
        common.run_python(common.ROOT / "ppo_rlhf.py", "--output-dir", folder, "--run-name",
                          stages.name, "--seed", job["seed"], "--total-episodes", 128)
    return common.run_apart(__file__, job | {"stages": str(stages)})


def main():
    """Run what is missing, one at a time; then tables, and gold over KL: means of 5 iterations."""
    kind = next((x for x in ("bandit", "alone") if f"--{x}" in sys.argv), "runs")
    names = list(BANDIT if kind == "bandit" else METHODS) + ["best of n"] * (kind == "runs")
    jobs = [{"kind": kind, "method": name, "seed": seed}
            for seed in ([1] if kind == "alone" else [1, 2, 3]) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        results = common.run_missing(
            "alternatives", jobs, list(jobs[0]), functools.partial(apart, folder),
            ("torch", "transformers"), ("held_out", "gold", "share"), kind, at_once=1)
    rows, of = [], {name: [x for x in results["runs"] if x["method"] == name]
                    for name in [*METHODS, "best of n"]}
    with common.picture("alternatives", 1, 1, (7, 5)) as axes:
        for name in (x for x in METHODS if of[x]):
            rows.append([name, *(common.spread([x["held_out"][key] for x in of[name]])
                                 for key in KEYS)])
            kl, gold = ([mean(y for x in of[name] for y in x["curves"][key][i : i + 5])
                         for i in range(46)] for key in ("kl", "gold"))
            axes[0, 0].plot(kl, gold, color=METHODS[name][3], label=name)
        for n in NUMBERS if of["best of n"] else []:
            golds, kl = [x["gold"][str(n)] for x in of["best of n"]], math.log(n) - (n - 1) / n
            rows.append([f"best of {n}", common.spread(golds), "", f"at most {kl:.2f}", ""])
            axes[0, 0].plot(kl, mean(golds), "k*", label="best of n" if n == 1 else None)
        axes[0, 0].set(xlabel="KL to the reference, nats per response", ylabel="gold reward")
        axes[0, 0].legend()
    lines = common.markdown(["held-out prompts", *KEYS], rows)
    for field, keys in TABLES.items():
        found, rows = results.get(field, []), []
        for name in dict.fromkeys(x["method"] for x in found):
            cells = [[x[key] for x in found if x["method"] == name and key in x] for key in keys]
            rows.append([name, *(common.spread(x, 3) if len(x) > 1 else
                                 "".join(f"{y:.3g}" for y in x) for x in cells)])
        lines += ["", *common.markdown([field, *keys], rows)]
    common.publish("alternatives", lines)


if __name__ == "__main__":
    common.start(main, one_run)
