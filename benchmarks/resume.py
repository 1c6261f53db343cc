"""Does a run that is killed end as if nothing had happened? 20 kills, each followed by --resume.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/resume.py            # runs what is missing, two at a time; about 25 minutes
    python benchmarks/resume.py --table    # the table, from the committed results

A small run of all three stages on the embedded task is killed with SIGKILL: 12 times after a random
share of the seconds that an undisturbed run takes, and 8 times at a chosen place: in the middle of
SFT, of the reward model, of a rollout, of an update, and four times while files are being written.
Then it is started again with --resume. It is the same if all weights in policy/ are equal bit by
bit, every line of metrics.jsonl is (but for times), those written before the last checkpoint are
unchanged, before_after.jsonl is the same, and TensorBoard shows each iteration once.
"""

import json
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
    "SFT": ("train_step", 100),
    "reward model": ("train_step", 315),
    "rollout": ("sample_tokens", 9),
    "update": ("ppo_loss", 60),
    "checkpoint, not complete": ("os.fsync", 2),
    "checkpoint, not renamed": ("Path.replace", 3),
    "policy/, half written": ("tokenizer.save_pretrained", 4),
    "policy/, moved away": ("Path.rename", 5),
}


def killed_run(place):
    """main of ppo_rlhf.py, in a process that ends itself in the middle of a call."""
    import transformers
    import tyro

    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    name, fatal = PLACES[place]
    owners = {"os": os, "Path": Path, "tokenizer": transformers.PreTrainedTokenizerBase}
    owner = owners.get(name.split(".")[0], ppo_rlhf)
    name, calls = name.split(".")[-1], []
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    flags = sys.argv[sys.argv.index("--killed") + 2 :]
    ppo_rlhf.main(tyro.cli(ppo_rlhf.Args, args=flags))


def read_run(run_dir):
    """What has to be the same: weights, metrics without times, answers, steps of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    metrics = [{key: x for key, x in row.items() if key != "wall_time" and "perf/" not in key}
               for row in rows]
    events = EventAccumulator(str(run_dir)).Reload()
    steps = {key: [point.step for point in events.Scalars(key)]
             for key in ("rollout/kl", "ppo/policy_loss", "sft/loss", "reward_model/loss")}
    return {"weights": (run_dir / "policy" / "model.safetensors").read_bytes(), "metrics": metrics,
            "answers": (run_dir / "before_after.jsonl").read_text(), "curves": steps}


def start(folder, *more, wrapper=()):
    """Start a run in folder. Returns: its process."""
    flags = [*FLAGS.split(), "--output-dir", str(folder), "--run-name", "run", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [__file__, *wrapper] if wrapper else [str(common.ROOT / "ppo_rlhf.py")]
    return subprocess.Popen([sys.executable, *script, *flags], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stage_of(run_dir):
    """How far a killed run has come."""
    for name, stage in (("metrics.jsonl", "PPO"), ("sft", "reward model"), ("args.json", "SFT")):
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
        found = {"stage": stage_of(run_dir), "iterations": 0, "checkpoint": 0}
        metrics, checkpoint = run_dir / "metrics.jsonl", run_dir / "checkpoint.pt"
        before = metrics.read_bytes() if metrics.exists() else b""
        if checkpoint.exists():
            import torch

            saved = torch.load(checkpoint, weights_only=True)
            found["checkpoint"] = saved["iteration"]
            lines = before.splitlines(keepends=True)
            before_checkpoint = b"".join(lines[: saved["iteration"]])
        else:
            before_checkpoint = b""
        found["iterations"] = before.count(b"\n")
        resumed = start(folder, *(["--resume"] if run_dir.exists() else []))
        output, _ = resumed.communicate()
        if resumed.returncode != 0:
            raise RuntimeError(output[-2000:])
        after = read_run(run_dir)
        found["differs"] = [key for key in after if after[key] != UNDISTURBED["run"][key]]
        if metrics.read_bytes()[: len(before_checkpoint)] != before_checkpoint:
            found["differs"].append("lines before the checkpoint")
    return found | {"same": not found["differs"]}


UNDISTURBED = {}


def main():
    """An undisturbed run, 20 kills, and the table."""
    rng = random.Random(1)
    jobs = [{"kill": f"random {i}", "share": round(rng.random(), 3)} for i in range(1, 13)]
    jobs += [{"kill": place, "share": None} for place in PLACES]
    if "--table" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            begin, beside = time.time(), tempfile.TemporaryDirectory()
            other = start(beside.name)  # as the kills, two at a time: it takes as long as they do
            output, _ = start(folder).communicate()
            UNDISTURBED["seconds"] = time.time() - begin
            other.communicate()
            beside.cleanup()
            print(output[-1500:])
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
