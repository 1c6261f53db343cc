"""Which tokens get the credit, which ones pay the KL, and where the time of an iteration goes.

    python benchmarks/credit.py    # runs what is missing; --alone: for time, with nothing beside

Picture: responses of lowest, middle and highest score in batches of seed 1. Table, by kind of word
in a batch: number, mean advantage, mean KL; variance of (whitened) advantages within a response.
"""

import sys
import tempfile
import time
from collections import Counter
from statistics import fmean

import common  # benchmarks/common.py

JOBS = [{"kl_coef": kl_coef, "seed": seed} for seed in (1, 2, 3) for kl_coef in (0.05, 0.0)]
KINDS = {"praise": "good shines liked smile", "scorn": "bad drags hated yawn", "EOS": "[EOS]"}
PARTS = {"sample_tokens": "sampling", "collect_rollout": "reading: policy", "forward": "reference",
         "decode": "text", "__call__": "scoring", "ppo_loss": "update: forward",
         "accumulate_gradients": "backward", "optimizer_step": "step"}


def describe(ppo, rollout, advantages):
    """Tokens, advantages, KL and values of three responses; numbers of each kind of token."""
    mask, tokenizer, kinds = rollout.response_mask, ppo.word_tokenizer(), {}
    ids, kl = rollout.sequence_ids[:, -mask.shape[1] :], rollout.old_logprobs - rollout.ref_logprobs
    for kind, names in KINDS.items():
        words = [word for name in names.split() for word in ppo.GRAMMAR.get(name, name).split("|")]
        words = ids.new_tensor(tokenizer.convert_tokens_to_ids(words))
        chosen = mask & (ids.unsqueeze(2) == words).any(dim=2)
        means = [ppo.masked_mean(x, chosen).item() for x in (advantages, kl)]
        kinds[kind] = [chosen.sum().item(), *(round(x, 2) for x in means)]
    off = advantages - ppo.masked_mean(advantages, mask, 1).unsqueeze(1)  # the response's mean
    kinds["within"] = [round(ppo.masked_mean(off**2, mask).item(), 2)]
    columns, shown = (advantages, kl, rollout.old_values), []
    for i in rollout.scores.argsort()[[0, 64, 127]]:
        shown.append([tokenizer.convert_ids_to_tokens(ids[i][mask[i]].tolist()),
                      *([round(y, 2) for y in x[i][mask[i]].tolist()] for x in columns)])
    return {"kinds": kinds, "shown": shown}


def one_run(job):
    """Stages 1 to 3. Returns: what describe says, by iteration; or, alone, milliseconds by part."""
    ppo, clocks, snapshots, found = common.import_ppo_rlhf(), Counter(), [], {}
    alone, compute_advantages = job.pop("field") == "alone", ppo.compute_advantages

    def clocked(name, function):
        def call(*words, **named):
            start, inside = time.perf_counter(), clocks.total()
            result = function(*words, **named)
            if name != "forward" or words[0].critic is None:  # only the reference has no critic
                clocks[PARTS[name]] += time.perf_counter() - start - (clocks.total() - inside)
            return result
        return call

    def recorded(rollout, *words):
        result = compute_advantages(rollout, *words)
        snapshots.append(clocks | Counter(iteration=time.perf_counter()))
        if len(snapshots) in (2, 50):
            found[len(snapshots)] = describe(ppo, rollout, result[0])
        return result
    for name in PARTS:
        owner = {"__call__": ppo.Scorer, "forward": ppo.Policy}.get(name, ppo)
        setattr(owner, name, clocked(name, getattr(owner, name)))
    ppo.compute_advantages = recorded
    with tempfile.TemporaryDirectory() as folder:
        ppo.main(ppo.Args(output_dir=folder, run_name="run", device="cpu", **job))
    ms = {x: round(1000 / 49 * (snapshots[-1][x] - snapshots[0][x]), 1) for x in snapshots[-1]}
    return {"ms": ms} if alone else found


def main():
    """Run what is missing; then a line per batch, and the picture."""
    field = "alone" if "--alone" in sys.argv else "runs"
    found = common.run_missing(
        "credit", [x | {"field": field} for x in JOBS], list(JOBS[0]),
        lambda job: common.run_apart(__file__, job), ["torch"], field=field, at_once=1)
    batches = [(x["kl_coef"], x["seed"], i, x[i]) for x in found["runs"] for i in ("2", "50")]
    rows = [[*x, *(str(y)[1:-1] for y in batch["kinds"].values())] for *x, batch in batches]
    columns = ["kl_coef", "seed", "iteration", *batches[0][3]["kinds"]]
    common.publish("credit", common.markdown(columns, rows))
    with common.picture("credit", 5, 1, (14, 11)) as axes:
        for axis, x in zip(axes[:4, 0], [x for x in batches if x[1] == 1], strict=True):
            axis.set(xlim=(0, 150), xticks=[], yticks=[], title=f"kl_coef {x[0]}, iteration {x[2]}")
            for y, response in enumerate(x[3]["shown"]):
                left = 0
                for word, advantage, kl, _ in zip(*response, strict=True):
                    for value, place, height in ((advantage, -y, 0.5), (kl, -y - 0.4, 0.2)):
                        axis.barh(place, len(word) + 1, height, left, alpha=min(1, abs(value) / 3),
                                  color=common.BLUE if value > 0 else common.RED)
                    axis.text(left + 0.5, -y, word, va="center", family="monospace")
                    left += len(word) + 1
        for part in PARTS.values() if "alone" in found else ():
            axes[4, 0].barh(part, fmean(x["ms"][part] for x in found["alone"]), color=common.GREY)
        axes[4, 0].set_title("above: advantages, KL below them; red < 0 < blue. here: milliseconds")


if __name__ == "__main__":
    common.start(main, one_run)
