"""The README's plot: proxy, gold, KL and grammatical over episodes, for three values of kl_coef.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/reward_hacking.py            # runs what is missing, then plots
    python benchmarks/reward_hacking.py --plot     # plots from the committed results

Nine runs of `python ppo_rlhf.py` (3 values of kl_coef, 3 seeds), two at a time, about 10 minutes on
2 cores. Each finished run is written to results/reward_hacking.json at once, so an interrupted
benchmark continues where it stopped.
"""

import json
import re
import tempfile
from pathlib import Path

import common  # benchmarks/common.py

KL_COEFS, SEEDS = [0.0, 0.05, 0.2], [1, 2, 3]
CURVES = {
    "rollout/score_mean": "proxy: reward-model score (SFT policy: mean 0, std 1)",
    "rollout/gold_mean": "gold reward (never trained on)",
    "rollout/kl": "KL to the reference (nats per response)",
    "rollout/grammatical": "grammatical (share of responses)",
}
CRITIC = "ppo/explained_variance"  # recorded for the README, not plotted


def one_run(job):
    """Run ppo_rlhf.py once in a folder of its own. Returns: curves and what the console told."""
    with tempfile.TemporaryDirectory() as folder:
        output = common.run_python(
            common.ROOT / "ppo_rlhf.py", "--kl-coef", job["kl_coef"], "--seed", job["seed"],
            "--output-dir", folder, "--run-name", "run").stdout
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
    return {
        "reward_model_accuracy": float(re.search(r"_accuracy ([\d.]+)", output)[1]),
        "table": output[output.index("held-out prompts") - 4 :],
        "worst_ratio_first": max((m["ppo/ratio_first"] for m in metrics), key=lambda x: abs(x - 1)),
        "episodes": [m["episodes"] for m in metrics],
        "curves": {key: [round(m[key], 4) for m in metrics] for key in [*CURVES, CRITIC]},
    }


def summary(runs):
    """A line per run: the first iteration (the SFT policy) and the last tenth, as README quotes."""
    print("kl_coef seed |  gold SFT -> PPO | grammatical | KL nats | proxy SFT -> PPO | "
          "RM accuracy | critic explains | seconds")
    for r in sorted(runs, key=lambda r: (r["kl_coef"], r["seed"])):
        first = {key: values[0] for key, values in r["curves"].items()}
        tenth = len(r["episodes"]) // 10
        last = {key: sum(values[-tenth:]) / tenth for key, values in r["curves"].items()}
        print(f"{r['kl_coef']:7} {r['seed']:4} | {first['rollout/gold_mean']:6.2f} -> "
              f"{last['rollout/gold_mean']:5.2f} | {last['rollout/grammatical']:11.2f} | "
              f"{last['rollout/kl']:7.1f} | {first['rollout/score_mean']:7.2f} -> "
              f"{last['rollout/score_mean']:5.2f} | {r['reward_model_accuracy']:11.3f} | "
              f"{sum(r['curves'][CRITIC][75:]) / 25:.2f} | "
              f"{r['seconds']}")


def plot(runs):
    """Mean and range over seeds."""
    colours = dict(zip(KL_COEFS, (common.RED, common.BLUE, common.GREY), strict=True))
    with common.picture("reward_hacking", 1, 4, (17, 3.6)) as axes:
        for axis, (key, title) in zip(axes[0], CURVES.items(), strict=True):
            for kl_coef, colour in colours.items():
                curves = [r["curves"][key] for r in runs if r["kl_coef"] == kl_coef]
                points = list(zip(*curves, strict=True))
                episodes = next(r["episodes"] for r in runs if r["kl_coef"] == kl_coef)
                axis.plot(episodes, [sum(p) / len(p) for p in points], color=colour,
                          label=f"kl_coef {kl_coef:g}")
                axis.fill_between(episodes, [min(p) for p in points], [max(p) for p in points],
                                  color=colour, alpha=0.15, linewidth=0)
            axis.set_title(title)
            axis.set_xlabel("episodes")
        axes[0, 2].set_yscale("symlog", linthresh=10)
        axes[0, 0].legend()


def main():
    """Run what is missing, two at a time, then summarise and plot."""
    jobs = [{"kl_coef": kl_coef, "seed": seed} for seed in SEEDS for kl_coef in KL_COEFS]
    runs = common.run_missing("reward_hacking", jobs, ("kl_coef", "seed"), one_run,
                              ("torch", "transformers", "tokenizers", "numpy"))["runs"]
    summary(runs)
    plot(runs)


if __name__ == "__main__":
    main()
