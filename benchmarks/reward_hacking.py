"""The README's picture: proxy, gold, KL and grammatical over episodes, for three values of kl_coef.

    python benchmarks/reward_hacking.py                # runs what is missing, then plots
    python benchmarks/reward_hacking.py --kl-target    # does --kl-target reach its target?

Runs of `python ppo_rlhf.py`, two at a time: nine (3 values of kl_coef, 3 seeds; 8 minutes on 2
cores), and 27 (3 targets, from 3 coefficients). With --table, tables and picture are made from
what is in results/reward_hacking.json and kl_target.json.
"""

import itertools
import re
import sys
import tempfile
from pathlib import Path
from statistics import mean

import common  # benchmarks/common.py

KL_COEFS, SEEDS = [0.0, 0.05, 0.2], [1, 2, 3]
KL_TARGETS, FROM_KL_COEFS = [1.0, 2.0, 4.0], [0.01, 0.05, 0.5]
CURVES = {
    "rollout/score": "proxy: reward-model score (SFT policy: mean 0, std 1)",
    "rollout/gold": "gold reward (never trained on)",
    "rollout/kl": "KL to the reference (nats per response)",
    "rollout/grammatical": "grammatical (share of responses)",
}
RECORDED = [*CURVES, "rollout/score_std", "rollout/entropy", "ppo/explained_variance",
            "ppo/log_ratio_max", "ppo/kl_coef"]


def one_run(settings):
    """Run ppo_rlhf.py once in a folder of its own. Returns: curves and what the console told."""
    with tempfile.TemporaryDirectory() as folder:
        output = common.run_python(common.ROOT / "ppo_rlhf.py", *common.flags_of(settings),
                                   "--output-dir", folder, "--run-name", "run").stdout
        metrics = common.read_metrics(Path(folder, "run"))
    return {
        "reward_model_accuracy": float(re.search(r"held-out accuracy ([\d.]+)", output)[1]),
        "table": output[re.search(r"\d+ held-out prompts", output).start() :],
        "max_log_ratio_first": max(x["ppo/log_ratio_first"] for x in metrics),
        "episodes": [x["episodes"] for x in metrics],
        "curves": {key: [round(x[key], 4) for x in metrics] for key in RECORDED
                   if key in metrics[0]},
    }


def last(run, key):
    """Mean of the last ten iterations."""
    return mean(run["curves"][key][-10:])


def summary(runs):
    """A line per run: the first iteration, which is the SFT policy's, and the last ten."""
    rows = []
    for x in sorted(runs, key=lambda x: (x["kl_coef"], x["seed"])):
        gold = x["curves"]["rollout/gold"]
        best = f"{max(gold):.2f}, {x['episodes'][gold.index(max(gold))]:,}"
        cells = [f"{x['curves'][key][0]:.2f} → {last(x, key):.2f}"
                 for key in ("rollout/gold", "rollout/grammatical", "rollout/score")]
        rows.append([f"{x['kl_coef']:g}", x["seed"], *cells, f"{last(x, 'rollout/kl'):.1f}",
                     f"{x['reward_model_accuracy']:.3f}", best, f"{x['max_log_ratio_first']:.1g}"])
    columns = ["kl_coef", "seed", "gold", "grammatical", "proxy score", "KL, nats",
               "reward-model accuracy", "best gold, at episode", "first log ratio, at most"]
    common.publish("reward_hacking", common.markdown(columns, rows))


def plot(runs):
    """Mean over seeds and the range between them, one picture per quantity."""
    colours = dict(zip(KL_COEFS, (common.RED, common.BLUE, common.GREY), strict=True))
    with common.picture("reward_hacking", 1, 4, (17, 3.6)) as axes:
        for axis, (key, title) in zip(axes[0], CURVES.items(), strict=True):
            for kl_coef, colour in colours.items():
                chosen = [x for x in runs if x["kl_coef"] == kl_coef]
                points = list(zip(*(x["curves"][key] for x in chosen), strict=True))
                episodes = chosen[0]["episodes"]
                axis.plot(episodes, [mean(p) for p in points], color=colour,
                          label=f"kl_coef {kl_coef:g}")
                axis.fill_between(episodes, [min(p) for p in points], [max(p) for p in points],
                                  color=colour, alpha=0.15, linewidth=0)
            axis.set_title(title)
            axis.set_xlabel("episodes")
        axes[0, 2].set_yscale("symlog", linthresh=10)
        axes[0, 0].legend()


def kl_targets():
    """Runs with --kl-target, and how far from it their last ten iterations are."""
    jobs = [{"kl_target": target, "kl_coef": kl_coef, "seed": seed}
            for seed, target, kl_coef in itertools.product(SEEDS, KL_TARGETS, FROM_KL_COEFS)]
    runs = common.run_missing("kl_target", jobs, list(jobs[0]), one_run,
                              ("torch", "transformers"))["runs"]
    rows = []
    for target, kl_coef in itertools.product(KL_TARGETS, FROM_KL_COEFS):
        chosen = [x for x in runs if (x["kl_target"], x["kl_coef"]) == (target, kl_coef)]
        figures = [[last(x, "rollout/kl"), max(x["curves"]["rollout/kl"]),
                    x["curves"]["ppo/kl_coef"][-1], last(x, "rollout/gold")] for x in chosen]
        rows.append([f"{target:g}", kl_coef, *map(common.spread, zip(*figures, strict=True))])
    columns = ["kl_target", "kl_coef at first", "KL, last ten iterations", "largest KL",
               "kl_coef at last", "gold, last ten iterations"]
    common.publish("kl_target", common.markdown(columns, rows))


def main():
    """Run what is missing, two at a time, then summarise and plot."""
    jobs = [{"kl_coef": kl_coef, "seed": seed} for seed in SEEDS for kl_coef in KL_COEFS]
    runs = common.run_missing("reward_hacking", jobs, list(jobs[0]), one_run,
                              ("torch", "transformers", "tokenizers", "numpy"))["runs"]
    summary(runs)
    plot(runs)


if __name__ == "__main__":
    kl_targets() if "--kl-target" in sys.argv else main()
