"""Does an ensemble of reward models help against reward hacking? One model against three.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/ensemble.py            # runs what is missing, two at a time; 30 minutes
    python benchmarks/ensemble.py --plot     # table and plot from the committed results

Twelve runs of `python ppo_rlhf.py`: kl_coef 0 and 0.02, 1 and 3 reward models (score = mean − std),
3 seeds. An ensemble can look better only because it goes less far; so the gold reward is compared
at equal KL to the reference: the mean over the iterations whose KL is within 15 % of a value.
"""

import json
import tempfile
from pathlib import Path
from statistics import mean

import common  # benchmarks/common.py

KL_COEFS, NUMBERS, SEEDS = [0.0, 0.02], [1, 3], [1, 2, 3]
KLS = [2, 4, 6, 8, 12, 16, 20]  # nats per response
KEYS = ["rollout/kl", "rollout/gold_mean", "rollout/score_mean", "rollout/grammatical",
        "rollout/score_disagreement"]


def one_run(job):
    """Run ppo_rlhf.py once in a folder of its own. Returns: its curves."""
    with tempfile.TemporaryDirectory() as folder:
        common.run_python(
            common.ROOT / "ppo_rlhf.py", "--kl-coef", job["kl_coef"], "--seed", job["seed"],
            "--num-reward-models", job["models"], "--output-dir", folder, "--run-name", "run")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return {"curves": {key: [round(m[key], 4) for m in metrics] for key in KEYS
                       if key in metrics[0]}}


def gold_at(run, kl):
    """Mean gold over the iterations with about this KL; None if there are none."""
    curves = run["curves"]
    found = [gold for x, gold in zip(curves["rollout/kl"], curves["rollout/gold_mean"], strict=True)
             if abs(x / kl - 1) < 0.15]
    return mean(found) if found else None


def shown(values):
    """Mean and range over seeds, and how many there are."""
    values = [x for x in values if x is not None]
    if not values:
        return ""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)})"


def main():
    """Run what is missing, two at a time, then table and plot."""
    jobs = [{"kl_coef": kl_coef, "models": number, "seed": seed}
            for seed in SEEDS for kl_coef in KL_COEFS for number in NUMBERS]
    runs = common.run_missing("ensemble", jobs, ("kl_coef", "models", "seed"), one_run,
                              ("torch", "transformers"))["runs"]
    rows = []
    with common.picture("ensemble", 1, 2, (9, 3.4)) as axes:
        for axis, kl_coef in zip(axes[0], KL_COEFS, strict=True):
            for number, colour in zip(NUMBERS, (common.GREY, common.BLUE), strict=True):
                chosen = [x for x in runs if (x["kl_coef"], x["models"]) == (kl_coef, number)]
                last = {key: [mean(x["curves"][key][-10:]) for x in chosen] for key in KEYS[:4]}
                rows.append([kl_coef, number, *(shown([gold_at(x, kl) for x in chosen])
                                                for kl in KLS), *map(shown, last.values())])
                for x in chosen:
                    axis.plot(x["curves"]["rollout/kl"], x["curves"]["rollout/gold_mean"], ".",
                              markersize=3, color=colour)
                axis.plot([], [], ".", color=colour,
                          label=f"{number} reward model{'s' * (number > 1)}")
            axis.set_title(f"kl_coef {kl_coef:g}")
            axis.set_xlabel("KL to the reference (nats per response)")
        axes[0, 0].set_ylabel("gold reward")
        axes[0, 0].legend()
    columns = ["kl_coef", "models", *(f"gold at KL {kl}" for kl in KLS), "last tenth: KL", "gold",
               "score", "grammatical"]
    common.publish("ensemble", common.markdown(columns, rows))


if __name__ == "__main__":
    main()
