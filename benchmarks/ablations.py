"""What the settings of ppo_rlhf.py do on the embedded task, in six groups, a change at a time.

    python benchmarks/ablations.py                               # runs what is missing, then plots
    python benchmarks/ablations.py --only group=beta,clip seed=1 # some of them

A run is `python ppo_rlhf.py FLAGS --seed S`, a minute or so on one core, one at a time.
Stages 1 and 2 do not depend on the flags of stage 3, so the models of an earlier run with the same
seed and comparisons are copied into a new run's folder, as a resumed run would find them. Runs with
no flag but --kl-coef 0, 0.05 or 0.2 are those of reward_hacking.json. "Last" is the mean of the
last ten iterations; "gold at KL x" that of the iterations whose KL is within 15 % of x.
"""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path

import common  # benchmarks/common.py
from reward_hacking import gold_at, last

BETAS = ["0", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "5"]
ROUND = "--kl-coef 0, second round"  # 6,000 further comparisons, of samples of the hacked policy
GROUPS = {
    "beta": [f"--kl-coef {x}" for x in BETAS],
    "clip": [f"--kl-coef {beta}{clip}" for beta in ("0", "0.05")
             for clip in ("", " --clip-coef 1e9")],
    "mitigation": ["--kl-coef 0", "--kl-coef 0.05", *(f"--kl-coef 0 {x}" for x in (
        "--ent-coef 0.01", "--ent-coef 0.1", "--clip-coef 0.05", "--learning-rate 3e-5",
        "--max-kl 4 --save-interval 1", "--num-reward-models 3", "--num-comparisons 12000",
        "--num-comparisons 24000")), ROUND],
    "critic": ["--kl-coef 0.05", *(f"--kl-coef 0.05 {x}" for x in (
        "--gae-lambda 0", "--gae-lambda 0.5", "--gae-lambda 0.9", "--gae-lambda 1",
        "--critic-learning-rate 1e-4", "--critic separate",
        "--critic separate --critic-learning-rate 1e-4", "--vf-clip-coef 1e9"))],
    "comparisons": ["--kl-coef 0.05", *(f"--kl-coef 0.05 --num-comparisons {x}"
                                        for x in (750, 1500, 3000, 12000))],
    "ptx": ["--kl-coef 0", "--kl-coef 0 --ptx-coef 0.1", "--kl-coef 0 --ptx-coef 1"],
}
EARLIER = ["--kl-coef 0", "--kl-coef 0.05", "--kl-coef 0.2"]  # in reward_hacking.json
SEEDS, KEYS = [1, 2, 3], ("group", "flags", "seed")
RECORDED = ["rollout/gold", "rollout/kl", "rollout/score", "rollout/grammatical",
            "ppo/explained_variance", "ppo/approx_kl", "ppo/log_ratio_max", "ppo/clipfrac"]
COLUMNS = {  # of the tables: a figure of a run, as a list that is empty if there is none
    "gold": lambda x: [last(x, "rollout/gold")],
    "saved policy's gold, held-out prompts": lambda x: [x["saved_gold"]],
    "KL, nats": lambda x: [last(x, "rollout/kl")],
    "proxy score": lambda x: [last(x, "rollout/score")],
    "grammatical": lambda x: [last(x, "rollout/grammatical")],
    "explained variance": lambda x: [last(x, "ppo/explained_variance")],
    "clipfrac": lambda x: [last(x, "ppo/clipfrac")] if "ppo/clipfrac" in x["curves"] else [],
    "largest abs log ratio": lambda x: [max(x["curves"]["ppo/log_ratio_max"])],
    "reward-model accuracy": lambda x: [x["accuracy"]],
    **{f"gold at KL {kl}": lambda x, kl=kl: gold_at(x, kl) for kl in (1, 2, 4, 8, 12)},
}


def train(job):
    """One run, in this process. Returns: its curves and figures."""
    ppo_rlhf = common.import_ppo_rlhf()
    flags, _, second = job["flags"].partition(", ")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        words = [*flags.split(), "--seed", str(job["seed"]), "--output-dir", folder]
        if second:
            ppo_rlhf.main(ppo_rlhf.parse_args([*words, "--run-name", "first"]))
            out.truncate(out.seek(0))
            sample, policy = ppo_rlhf.sample_comparisons, Path(folder, "first", "policy")
            ppo_rlhf.sample_comparisons = lambda sft, *x: sample(sft, *x) + sample(policy, *x)
        args, run = ppo_rlhf.parse_args([*words, "--run-name", "run"]), Path(folder, "run")
        kept = Path(tempfile.gettempdir(), "ablations", common.commit(), str(args.seed))
        models = kept / f"{args.num_comparisons} {args.num_reward_models}{second}"
        train_sft, train_ppo = ppo_rlhf.train_sft, ppo_rlhf.train_ppo

        def sft(*arguments):
            for path in (kept / "sft", *models.glob("*")):
                if path.exists():
                    shutil.copytree(path, run / path.name)
            return train_sft(*arguments)

        def ppo(*arguments):
            if not models.exists():
                (run / "reward_model" / "accuracy").write_text(
                    re.search(r"held-out accuracy ([\d.]+)", out.getvalue())[1])
                shutil.copytree(run / "sft", kept / "sft", dirs_exist_ok=True)
                for path in run.glob("reward_model*"):
                    shutil.copytree(path, models / path.name)
            train_ppo(*arguments)

        ppo_rlhf.train_sft, ppo_rlhf.train_ppo, stopped = sft, ppo, ""
        try:
            ppo_rlhf.main(args)
        except SystemExit as error:  # a number that is not finite
            stopped = str(error)
        metrics, saved = common.read_metrics(run), re.search(r"\ngold +\S+ +(\S+)", out.getvalue())
        return {"stopped": stopped, "accuracy": float((run / "reward_model/accuracy").read_text()),
                "saved_gold": float(saved[1]) if saved else None,
                "curves": {key: [x[key] and round(x[key], 4) for x in metrics]
                           for key in RECORDED}}


def one_run(job):
    """One run, in a process of its own."""
    return common.run_apart(__file__, job)


def earlier():
    """The runs of reward_hacking.py, in the form of those here."""
    for x in common.read_results("reward_hacking")["runs"]:
        yield {"flags": f"--kl-coef {x['kl_coef']:g}", "seed": x["seed"], "curves": x["curves"],
               "accuracy": x["reward_model_accuracy"],
               "saved_gold": float(re.search(r"\ngold +\S+ +(\S+)", x["table"])[1])}


def main():
    """Run what is missing; seed by seed, so that each group has a first figure soon."""
    jobs = [{"group": group, "flags": flags, "seed": seed} for seed in SEEDS
            for group in GROUPS for flags in GROUPS[group] if flags not in EARLIER]
    common.run_missing("ablations", jobs, KEYS, one_run,
                       ("torch", "transformers", "tokenizers", "numpy"), at_once=1)


if __name__ == "__main__":
    common.start(main, train)
