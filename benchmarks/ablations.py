"""What the settings of ppo_rlhf.py do on the embedded task, in six groups, a change at a time.

    python benchmarks/ablations.py                                # runs what is missing, then plots
    python benchmarks/ablations.py --only group=beta,clip seed=1  # some of them

A run is `python ppo_rlhf.py FLAGS --seed S`, a minute or so on one core, one at a time. Stages 1
and 2 do not depend on the flags of stage 3, so the models of an earlier run with the same seed and
comparisons are copied into a new run's folder, as a resumed run would find them. Runs with no flag
but --kl-coef 0, 0.05 or 0.2 are those of reward_hacking.py. Figures: means of the last ten
iterations; "gold at KL x", of those whose KL is within 15 % of x; "saved gold", of the held-out
prompts and the saved policy. "second round": 6,000 comparisons more, of a hacked policy's samples.
"""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path
from statistics import mean

import common  # benchmarks/common.py
from reward_hacking import last

GROUPS = {
    "beta": [f"--kl-coef {x}" for x in (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)],
    "clip": [f"--kl-coef {x}" for x in ("0", "0 --clip-coef 1e9", "0.05", "0.05 --clip-coef 1e9")],
    "mitigation": ["--kl-coef 0", "--kl-coef 0.05", *(f"--kl-coef 0 {x}" for x in (
        "--ent-coef 0.01", "--ent-coef 0.1", "--clip-coef 0.05", "--learning-rate 3e-5",
        "--max-kl 4 --save-interval 1", "--num-reward-models 3", "--num-comparisons 12000",
        "--num-comparisons 24000")), "--kl-coef 0, second round"],
    "critic": ["--kl-coef 0.05", *(f"--kl-coef 0.05 {x}" for x in (
        "--gae-lambda 0", "--gae-lambda 0.5", "--gae-lambda 0.9", "--gae-lambda 1",
        "--critic-learning-rate 1e-4", "--critic separate",
        "--critic separate --critic-learning-rate 1e-4", "--vf-clip-coef 1e9"))],
    "comparisons": [f"--kl-coef 0.05{x and f' --num-comparisons {x}'}"
                    for x in (750, 1500, 3000, "", 12000)],
    "ptx": ["--kl-coef 0", "--kl-coef 0 --ptx-coef 0.1", "--kl-coef 0 --ptx-coef 1"],
}
GOLD = re.compile(r"\ngold +\S+ +(\S+)")  # in the final table, of the policy that was saved
RECORDED = ["rollout/gold", "rollout/kl", "rollout/score", "rollout/grammatical",
            "ppo/explained_variance", "ppo/approx_kl", "ppo/log_ratio_max", "ppo/clipfrac"]
COLUMNS = {key.split("/")[1]: lambda x, key=key: [last(x, key)] if key in x["curves"] else []
           for key in RECORDED}  # figures of a run, as lists that are empty if there is none
COLUMNS |= {
    "saved gold": lambda x: [x["saved_gold"]], "held-out accuracy": lambda x: [x["accuracy"]],
    "largest log ratio": lambda x: [max(x["curves"]["ppo/log_ratio_max"])],
    **{f"gold at KL {kl}": lambda x, kl=kl: gold_at(x, kl) for kl in (1, 2, 4, 8, 12)}}
AT_KL = [x for x in COLUMNS if x.startswith("gold at")]
SHOWN = {"beta": AT_KL, "clip": ["log_ratio_max", "largest log ratio"], "mitigation": AT_KL,
         "critic": ["explained_variance"], "comparisons": ["held-out accuracy"], "ptx": AT_KL}


def gold_at(run, kl):
    """Mean gold of the iterations with about this KL, as a list; empty if there are none."""
    pairs = zip(run["curves"]["rollout/kl"], run["curves"]["rollout/gold"], strict=True)
    found = [gold for x, gold in pairs if abs(x / kl - 1) < 0.15]
    return [mean(found)] if found else []


def train(job):
    """One run, in this process. Returns: its curves and figures."""
    ppo_rlhf = common.import_ppo_rlhf()
    flags, _, second = job["flags"].partition(", ")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        words = [*flags.split(), "--seed", str(job["seed"]), "--output-dir", folder]
        if second:
            ppo_rlhf.main(ppo_rlhf.parse_args([*words, "--run-name", "first"]))
            out.truncate(out.seek(0))
            sample, hacked = ppo_rlhf.sample_comparisons, Path(folder, "first", "policy")
            ppo_rlhf.sample_comparisons = lambda sft, *x: sample(sft, *x) + sample(hacked, *x)
        args, run = ppo_rlhf.parse_args([*words, "--run-name", "run"]), Path(folder, "run")
        kept = Path(tempfile.gettempdir(), "ablations", common.commit(), str(args.seed))
        models = kept / f"{args.num_comparisons} {args.num_reward_models}{second}"
        train_sft = ppo_rlhf.train_sft

        def copy_and_train_sft(*arguments):
            for path in (*kept.glob("sft"), *models.glob("*")):
                shutil.copytree(path, run / path.name)
            return train_sft(*arguments)  # which skips what is there, as stage 2 does

        ppo_rlhf.train_sft = copy_and_train_sft
        ppo_rlhf.main(args)
        text, accuracy = out.getvalue(), run / "reward_model" / "accuracy"
        if not models.exists():
            accuracy.write_text(re.search(r"held-out accuracy ([\d.]+)", text)[1])
            for path in run.glob("reward_model*"):
                shutil.copytree(path, models / path.name)
            shutil.copytree(run / "sft", kept / "sft", dirs_exist_ok=True)
        return {"accuracy": float(accuracy.read_text()), "saved_gold": float(GOLD.search(text)[1]),
                "curves": {key: [x[key] and round(x[key], 4) for x in common.read_metrics(run)]
                           for key in RECORDED}}


def earlier():
    """The runs of reward_hacking.py, in the form of those here."""
    return [{"flags": f"--kl-coef {x['kl_coef']:g}", "seed": x["seed"], "curves": x["curves"],
             "accuracy": x["reward_model_accuracy"],
             "saved_gold": float(GOLD.search(x["table"])[1])}
            for x in common.read_results("reward_hacking")["runs"]]


def gao(kl, gold):
    """Least squares of gold = g + d·(alpha − b·log d), d = √KL (2210.10760; there g is 0, but here
    gold does not start at 0). Returns: g, alpha, b, and what remains, root mean squared."""
    import numpy as np

    kl, gold = np.array([x for x in zip(kl, gold, strict=True) if x[0] > 0.1]).T
    terms = np.stack([kl**0, kl**0.5, -(kl**0.5) * np.log(kl) / 2], axis=1)
    found = np.linalg.lstsq(terms, gold)[0]
    return [f"{x:.2f}" for x in (*found, np.sqrt(np.mean((terms @ found - gold) ** 2)))]


def main():
    """Run what is missing, seed by seed; a table per group, mean (range, runs); the picture."""
    runs, lines = earlier(), []
    jobs = [{"group": group, "flags": flags, "seed": seed} for seed in (1, 2, 3)
            for group in GROUPS for flags in GROUPS[group] if flags not in {
                x["flags"] for x in runs}]
    runs += common.run_missing(
        "ablations", jobs, list(jobs[0]), lambda job: common.run_apart(__file__, job),
        ("torch", "transformers", "tokenizers", "numpy"), at_once=1)["runs"]
    with common.picture("ablations", 2, 3, (18, 9)) as axes:
        for axis, (group, settings) in zip(axes.flat, GROUPS.items(), strict=True):
            columns = ["gold", "saved gold", "kl", "score", "grammatical", *SHOWN[group]]
            rows, figure = [], "largest log ratio" if group == "clip" else "gold"
            for flags in settings:
                chosen = [x for x in runs if x["flags"] == flags]
                label = flags.removeprefix("--kl-coef ")
                found = {name: [y for x in chosen for y in COLUMNS[name](x)] for name in columns}
                rows.append([flags, *(
                    f"{mean(x):.2f} ({f'{min(x):.2f} to {max(x):.2f}, ' * (len(x) > 1)}{len(x)})"
                    if x else "" for x in found.values())])
                kl, gold = ([y for x in chosen for y in x["curves"][f"rollout/{key}"]]
                            for key in ("kl", "gold"))
                if group == "beta":
                    axis.plot([abs(x) ** 0.5 for x in kl], gold, ".", markersize=3, label=label)
                    rows[-1] += gao(kl, gold) if max(kl) > 2 else []
                else:
                    axis.plot(found[figure], [label] * len(chosen), "o", color=common.BLUE)
            columns += ["g", "alpha", "b", "error of the fit"] * (group == "beta")
            axis.set_title(f"{group}: {figure}{' over √KL' * (group == 'beta')}, by --kl-coef")
            axis.legend() if group == "beta" else axis.invert_yaxis()
            lines += [f"{group}:", "", *common.markdown(["flags", *columns], rows), ""]
    common.publish("ablations", lines)


if __name__ == "__main__":
    common.start(main, train)
