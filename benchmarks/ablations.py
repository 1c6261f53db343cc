"""What the settings of ppo_rlhf.py do on the embedded task, in nine groups, a change at a time.

    python benchmarks/ablations.py                                # runs what is missing, then plots
    python benchmarks/ablations.py --only group=beta,clip seed=1  # some of them

A run is `python ppo_rlhf.py FLAGS --seed S`, a minute or so on one core, one at a time. Stages 1
and 2 do not depend on the flags of stage 3, so the models of an earlier run with the same seed and
comparisons are copied into a new run's folder, as a resumed run would find them. Runs with no flag
but --kl-coef 0, 0.05 or 0.2 are those of reward_hacking.py. Figures: means of the last ten
iterations; "gold at KL x", of those whose KL is within 15 % of x; "saved gold" and "saved score",
of the held-out prompts and the saved policy. What stands behind a comma is no flag: "second round",
6,000 comparisons more, of a hacked policy's samples; "10% flipped", of the comparisons that train
the reward model; "V from 0", not from the mean return; "sums", another task: see make_sums.
"""

import contextlib
import io
import itertools
import json
import random
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
    "noise": [f"--kl-coef 0.05{x and f', {x}% flipped'}" for x in ("", 10, 20, 30, 40)],
    "reward": [f"--kl-coef 0.05 --reward-fn {x}" for x in (
        "gold_at_the_end", "gold_by_token", "gold_plus_10", "gold_plus_10, V from 0")],
    "sums": ["--kl-coef 0.02, sums", "--kl-coef 0, sums"],
    "ptx": ["--kl-coef 0", "--kl-coef 0 --ptx-coef 0.1", "--kl-coef 0 --ptx-coef 1"],
}
RECORDED = ["rollout/gold", "rollout/kl", "rollout/score", "rollout/grammatical",
            "ppo/explained_variance", "ppo/approx_kl", "ppo/log_ratio_max", "ppo/clipfrac"]
COLUMNS = {key.split("/")[1]: lambda x, key=key: [last(x, key)] if x["curves"].get(key) else []
           for key in RECORDED}  # figures of a run, as lists that are empty if there is none
COLUMNS |= {name: lambda x, key=key: [x[key]] if x.get(key) is not None else []
            for name, key in (("saved gold", "saved_gold"), ("saved score", "saved_score"),
                              ("held-out accuracy", "accuracy"))}
COLUMNS |= {
    "SFT score": lambda x: [x["curves"]["rollout/score"][0]],
    "largest log ratio": lambda x: [max(x["curves"]["ppo/log_ratio_max"])],
    **{f"gold at KL {kl}": lambda x, kl=kl: gold_at(x, kl) for kl in (1, 2, 4, 8, 12)}}
AT_KL = [x for x in COLUMNS if x.startswith("gold at")]
SHOWN = {"beta": AT_KL, "clip": ["log_ratio_max", "largest log ratio"], "mitigation": AT_KL,
         "critic": ["explained_variance"], "comparisons": ["held-out accuracy"], "ptx": AT_KL,
         "noise": ["held-out accuracy"], "reward": ["explained_variance"],
         "sums": ["SFT score", "saved score"]}
FIGURES = {"clip": "largest log ratio", "sums": "score"}  # in the picture, else gold


def gold_at(run, kl):
    """Mean gold of the iterations with about this KL, as a list; empty if there are none."""
    pairs = zip(run["curves"]["rollout/kl"], run["curves"]["rollout/gold"], strict=True)
    found = [gold for x, gold in pairs if abs(x / kl - 1) < 0.15]
    return [mean(found)] if found else []


def gold_at_the_end(prompts, responses, ended):
    """--reward-fn: the gold reward itself, once per response."""
    import ppo_rlhf

    return list(map(ppo_rlhf.gold_reward, prompts, responses, ended))


def gold_plus_10(prompts, responses, ended):
    """--reward-fn: the same with a constant, which changes no preference."""
    return [10 + x for x in gold_at_the_end(prompts, responses, ended)]


def gold_by_token(prompts, responses, ended, tokens):
    """--reward-fn: by how much each token changes the gold reward of the text so far, had it ended
    there. The sum over a response is its gold reward."""
    rows = []
    for prompt, response, end, pieces in zip(prompts, responses, ended, tokens, strict=True):
        texts = ["".join(pieces[:i]) for i in range(1, len(pieces))]
        golds = gold_at_the_end([prompt] * len(texts), texts, [True] * len(texts))
        golds = [0, *golds, *gold_at_the_end([prompt], [response], [end])]
        rows.append([after - before for before, after in itertools.pairwise(golds)])
    return rows


def correct(prompts, responses):
    """--reward-fn: 1 where the response is the sum that the prompt asks for, else 0."""
    wanted = [sum(map(int, x.replace(" ", "").rstrip("=").split("+"))) for x in prompts]
    return [float(x.replace(" ", "") == str(y)) for x, y in zip(responses, wanted, strict=True)]


def make_sums(folder, seed):
    """Additions such as "1 7 + 5 =", a token per digit, for a new policy as small as that of the
    embedded task; half of its demonstrations are random. Returns: the words of the command line."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=14, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.06, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    common.save_random_models(folder, [*"0123456789+="], config)
    rng, rows = random.Random(seed), []
    for _ in range(20_000):
        a, b = rng.randrange(100), rng.randrange(10)
        shown = a + b if rng.random() < 0.5 else rng.randrange(110)
        rows.append(json.dumps({"prompt": " ".join(f"{a}+{b}="),
                                "completion": " " + " ".join(str(shown))}))
    (folder / "sums.jsonl").write_text("\n".join(rows))
    return (f"--dataset {folder}/sums.jsonl --policy-model {folder}/policy "
            f"--reward-fn {__file__}:correct --sft-epochs 4 --sft-learning-rate 1e-3 "
            "--learning-rate 1e-4 --max-prompt-len 16 --response-len 8").split()


def change_parts(ppo_rlhf, change, hacked):
    """Replace the function of ppo_rlhf.py that a change which is no flag is about."""
    sample, make_critic = ppo_rlhf.sample_comparisons, ppo_rlhf.make_critic
    if change == "second round":
        ppo_rlhf.sample_comparisons = lambda sft, *x: sample(sft, *x) + sample(hacked, *x)
    if change == "V from 0":
        ppo_rlhf.make_critic = lambda policy, scorer, _, args: make_critic(policy, scorer, 0, args)
    if change.endswith("flipped"):
        def flipped(sft, rows, num_pairs, args):
            """The held-out pairs, of which there are 500, stay."""
            rng, pairs = random.Random(args.seed), sample(sft, rows, num_pairs, args)
            share = int(change.split("%")[0]) / 100 * (num_pairs == args.num_comparisons)
            return [x[::-1] if rng.random() < share else x for x in pairs]

        ppo_rlhf.sample_comparisons = flipped


def train(job):
    """One run, in this process. Returns: its curves and figures."""
    ppo_rlhf = common.import_ppo_rlhf()
    flags, _, change = job["flags"].partition(", ")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        words = flags.replace("--reward-fn ", f"--reward-fn {__file__}:").split()
        words += ["--seed", str(job["seed"]), "--output-dir", folder]
        if change == "sums":
            words += make_sums(Path(folder), job["seed"])
        if change == "second round":
            ppo_rlhf.main(ppo_rlhf.parse_args([*words, "--run-name", "first"]))
            out.truncate(out.seek(0))
        change_parts(ppo_rlhf, change, Path(folder, "first", "policy"))
        args, run = ppo_rlhf.parse_args([*words, "--run-name", "run"]), Path(folder, "run")
        kept = Path(tempfile.gettempdir(), "ablations", common.commit(), str(args.seed))
        models = kept / f"{args.num_comparisons} {args.num_reward_models}{change}"
        train_sft = ppo_rlhf.train_sft

        def copy_and_train_sft(*arguments):
            if args.dataset == "reviews":
                for path in (*kept.glob("sft"), *models.glob("*")):
                    shutil.copytree(path, run / path.name)
            return train_sft(*arguments)  # which skips what is there, as stage 2 does

        ppo_rlhf.train_sft = copy_and_train_sft
        ppo_rlhf.main(args)
        text, accuracy = out.getvalue(), run / "reward_model" / "accuracy"
        if not args.reward_fn and not models.exists():
            accuracy.write_text(re.search(r"held-out accuracy ([\d.]+)", text)[1])
            for path in run.glob("reward_model*"):
                shutil.copytree(path, models / path.name)
            shutil.copytree(run / "sft", kept / "sft", dirs_exist_ok=True)
        metrics = common.read_metrics(run)
        return {"accuracy": float(accuracy.read_text()) if accuracy.exists() else None,
                "saved_gold": saved("gold", text), "saved_score": saved("score", text),
                "curves": {key: [x[key] and round(x[key], 4) for x in metrics]
                           for key in RECORDED if key in metrics[0]}}


def saved(key, text):
    """What the final table says of the policy that was saved; None if the key is not there."""
    found = re.search(rf"\n{key} +\S+ +(\S+)", text)
    return float(found[1]) if found else None


def earlier():
    """The runs of reward_hacking.py, in the form of those here."""
    return [{"flags": f"--kl-coef {x['kl_coef']:g}", "seed": x["seed"], "curves": x["curves"],
             "accuracy": x["reward_model_accuracy"], "saved_gold": saved("gold", x["table"])}
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
    with common.picture("ablations", 3, 3, (18, 13)) as axes:
        for axis, (group, settings) in zip(axes.flat, GROUPS.items(), strict=True):
            columns = ["gold", "saved gold", "kl", "score", "grammatical", *SHOWN[group]]
            rows, figure = [], FIGURES.get(group, "gold")
            for flags in settings:
                chosen = [x for x in runs if x["flags"] == flags]
                label = flags.removeprefix("--kl-coef ")
                found = {name: [y for x in chosen for y in COLUMNS[name](x)] for name in columns}
                rows.append([flags, *map(common.spread, found.values())])
                if group == "beta":
                    kl, gold = ([y for x in chosen for y in x["curves"][f"rollout/{key}"]]
                                for key in ("kl", "gold"))
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
