"""Does a run that is killed end as if nothing had happened? 20 kills, each followed by --resume.

    python benchmarks/resume.py            # runs what is missing, two at a time; about 25 minutes
    python benchmarks/resume.py --table    # the table, from the committed results

A small run of all three stages on the embedded task is killed with SIGKILL: 12 times after a random
share of the seconds that an undisturbed run takes, and 8 times at a chosen place: in the middle of
SFT, of the reward model, of a rollout, of an update, and four times while files are being written.
Then it goes on with --resume (or from the start, if it had not begun). It is the same if all
weights in policy/ are equal bit by bit, every line of metrics.jsonl is (but for times), the lines
of before the last checkpoint are unchanged, before_after.jsonl is the same, and TensorBoard shows
each step of each stage once.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common  # benchmarks/common.py

FLAGS = ("--num-comparisons 300 --total-episodes 2560 --batch-size 128 --minibatch-size 64 "
         "--eval-prompts 16 --save-interval 3 --ref-update-interval 4 --kl-target 2 "
         "--critic separate --device cpu")
# A function of ppo_rlhf.py, or of a library that it calls, and the number of the fatal call.
PLACES = {
    "SFT": ("sft_loss", 200),
    "reward model": ("reward_loss", 6),
    "rollout": ("sample_tokens", 9),
    "update": ("ppo_loss", 60),
    "checkpoint half written": ("torch.save", 2),
    "checkpoint not renamed": ("Path.replace", 3),
    "policy/ half written": ("tokenizer.save_pretrained", 4),
    "policy/ moved away": ("Path.rename", 5),
}


def killed_run(place):
    """main of ppo_rlhf.py, in a process that ends itself in the middle of a call."""
    import torch
    import transformers

    ppo_rlhf = common.import_ppo_rlhf()
    name, fatal = PLACES[place]
    owners = {"torch": torch, "Path": Path, "tokenizer": transformers.PreTrainedTokenizerBase}
    owner = owners.get(name.split(".")[0], ppo_rlhf)
    name, calls = name.split(".")[-1], []
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == fatal:
            if name == "save":
                args[1].write_bytes(b"half of a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    flags = sys.argv[sys.argv.index("--killed") + 2 :]
    ppo_rlhf.main(ppo_rlhf.parse_args(flags))


def read_run(run_dir):
    """What has to be the same: weights, metrics without times, answers, steps of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = [{key: x for key, x in row.items() if "perf/" not in key}
               for row in common.read_metrics(run_dir)]
    steps = {}
    for stage, key in (("sft", "sft/loss"), ("reward_model", "reward_model/loss"),
                       ("ppo", "rollout/kl"), ("ppo", "ppo/policy_loss")):
        events = EventAccumulator(str(run_dir / "curves" / stage)).Reload()
        steps[key] = [point.step for point in events.Scalars(key)]
    return {"weights": (run_dir / "policy" / "model.safetensors").read_bytes(), "metrics": metrics,
            "answers": (run_dir / "before_after.jsonl").read_text(), "curves": steps}


def start(folder, resume=False, wrapper=()):
    """Start a run in folder, or go on with it. Returns: its process."""
    flags = ["--resume", f"{folder}/run"] if resume else [
        *FLAGS.split(), "--output-dir", str(folder), "--run-name", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [__file__, *wrapper] if wrapper else [str(common.ROOT / "ppo_rlhf.py")]
    return subprocess.Popen([sys.executable, *script, *flags], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stage_of(run_dir):
    """How far a killed run has come."""
    for name, stage in (("policy", "PPO"), ("policy.old", "PPO"), ("sft", "reward model"),
                        ("args.json", "SFT")):
        if (run_dir / name).exists():
            return stage
    return "before training"


def one_run(job):
    """Kill a run, resume it, and compare it with an undisturbed one beside it."""
    with tempfile.TemporaryDirectory() as name:
        folder, run_dir = Path(name), Path(name, "run")
        if job["kill"] in PLACES:
            killed = start(folder, wrapper=("--killed", job["kill"]))
        else:
            killed = start(folder)
            time.sleep(job["share"] * UNDISTURBED["seconds"])
            killed.kill()
        killed.communicate()
        if killed.returncode != -signal.SIGKILL:
            raise RuntimeError(f"not killed, but ended with {killed.returncode}")
        metrics, checkpoint = run_dir / "metrics.jsonl", run_dir / "checkpoint.pt"
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        found = {"stage": stage_of(run_dir), "iterations": len(lines), "checkpoint": 0}
        if checkpoint.exists():
            import torch

            found["checkpoint"] = torch.load(checkpoint, weights_only=True)["iteration"]
        before = b"".join(lines[: found["checkpoint"]])
        resumed = start(folder, resume=run_dir.exists())
        output, _ = resumed.communicate()
        if resumed.returncode != 0:
            raise RuntimeError(output[-2000:])
        after = read_run(run_dir)
        found["differs"] = [key for key in after if after[key] != UNDISTURBED["run"][key]]
        if not metrics.read_bytes().startswith(before):
            found["differs"].append("lines before the checkpoint")
    return found | {"same": not found["differs"]}


UNDISTURBED = {}


def main():
    """An undisturbed run, 20 kills, and the table."""
    rng = random.Random(1)
    jobs = [{"kill": f"random {i}", "share": round(rng.random(), 3)} for i in range(1, 13)]
    jobs += [{"kill": place, "share": None} for place in PLACES]
    if "--table" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as beside:
            begin, other = time.time(), start(beside)  # the kills will be two at a time, too
            print(start(folder).communicate()[0][-1500:])
            UNDISTURBED["seconds"] = time.time() - begin
            other.communicate()
            UNDISTURBED["run"] = read_run(Path(folder, "run"))
    runs = common.run_missing("resume", jobs, ("kill", "share"), one_run,
                              ("torch", "transformers"), ("stage", "iterations", "same"))["runs"]
    rows = [[x["kill"], x["share"] or "", x["stage"], x["iterations"], x["checkpoint"],
             "the same" if x["same"] else ", ".join(x["differs"])] for x in runs]
    lines = common.markdown(["killed in", "share of the run", "stage", "iterations logged",
                             "of them in the checkpoint", "after --resume"], rows)
    lines.append(f"\n{sum(x['same'] for x in runs)} of {len(runs)} the same")
    common.publish("resume", lines)


if __name__ == "__main__":
    if "--killed" in sys.argv:
        killed_run(sys.argv[sys.argv.index("--killed") + 1])
    else:
        main()
