"""Episodes per second and peak memory of PPO: ppo_rlhf.py beside trl's PPOTrainer, and beside its
own second edition, on the same work.

    python benchmarks/throughput.py            # runs what is missing, one at a time; an hour
    python benchmarks/throughput.py --table    # the tables, from the committed results

All train the same random GPT-2 (4 layers of width 128) with a reward model of the same shape: 64
responses per iteration, 4 epochs of 4 optimizer steps (counted), 64 rows sampled at a time, 32 + 32
tokens, float32. trl's critic is a model of its own; ours is measured as that, and as a head on the
policy. The time is what passes between the starts of two iterations, everything counted; the figure
is its median. Both editions also run the default command with 6,400 episodes, all three stages; its
whole time counts. Memory is the most that the whole process ever held, and what it held when the
libraries had been imported. Only ratios within one round mean something, on a machine that does
nothing else; the order changes from round to round. OMP_NUM_THREADS (else 2) is part of a job; the
committed runs have 1. Lines: how many of ppo_rlhf.py run in an update, and in a whole iteration
without the log.
"""

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import common  # benchmarks/common.py

SECOND = "8711ab2"  # the last commit of the second edition
THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
SHAPE = {"vocab": 512, "batch": 64, "response_len": 32, "critic": "separate"}
KEYS = (*SHAPE, "episodes", "who", "round", "threads")
PROMPT_LEN, ITERATIONS = 32, 3


def save_models(folder, vocab):
    """A random policy, a random reward model, and prompts, as all sides read them."""
    import random

    import transformers

    words = [f"w{i}" for i in range(vocab - 2)]
    common.save_random_models(folder, words, transformers.GPT2Config(
        vocab_size=vocab, n_embd=128, n_layer=4, n_head=4, n_positions=1024, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0))
    rng = random.Random(1)
    rows = [{"prompt": " ".join(rng.choices(words, k=PROMPT_LEN))} for _ in range(1024)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def load(folder, who):
    """ppo_rlhf.py of today, or of the second edition."""
    if who == "second edition":
        common.edition("ppo_rlhf.py", SECOND, folder)
    return common.import_ppo_rlhf(folder if who == "second edition" else common.ROOT)


class Meter:
    """When iterations start, how many optimizer steps there are, and the peak of the memory."""

    def __init__(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.starts, self.steps, self.imported = [], [], common.memory("VmRSS")
        register_optimizer_step_post_hook(lambda *_: self.steps.append(time.perf_counter()))

    def start(self, *_args, **_kwargs):
        """An iteration starts; the first is warm-up."""
        self.starts.append(time.perf_counter())

    def memory(self):
        """In GB, of the whole process: the peak, and at first."""
        return {"peak_gb": common.memory("VmHWM"), "imported_gb": self.imported}

    def report(self, batch):
        """Figures, medians over the iterations that have an end."""
        spans = list(zip(self.starts[1:], self.starts[2:], strict=False))
        steps = [sum(start < x < end for x in self.steps) for start, end in spans]
        return {"episodes_per_s": batch / median(end - start for start, end in spans),
                "optimizer_steps": median(steps)} | self.memory()


def our_settings(folder, job):
    """Of today's and of the second edition."""
    return {"dataset": f"{folder}/prompts.jsonl", "policy_model": f"{folder}/policy",
            "reward_model": (f"{folder}/reward_model",), "sft_epochs": 0, "eval_prompts": 0,
            "total_episodes": job["batch"] * (ITERATIONS + 2), "batch_size": job["batch"],
            "minibatch_size": job["batch"] // 4, "max_prompt_len": PROMPT_LEN,
            "response_len": job["response_len"], "critic": job["critic"], "device": "cpu",
            "output_dir": str(folder), "run_name": "run", "save_interval": 1000}


def run_ours(folder, job):
    """main of ppo_rlhf.py, today's or the second edition's; an iteration starts where it sets the
    learning rates."""
    ppo_rlhf = load(folder, job["who"])
    meter, set_learning_rates = Meter(), ppo_rlhf.set_learning_rates
    save_models(folder, job["vocab"])

    def start(*args, **kwargs):
        meter.start()
        set_learning_rates(*args, **kwargs)

    ppo_rlhf.set_learning_rates = start
    ppo_rlhf.main(ppo_rlhf.Args(**our_settings(folder, job)))
    return meter.report(job["batch"])


def run_default(folder, job):
    """The default command with 6,400 episodes: seconds of the whole, and speed of PPO alone."""
    ppo_rlhf = load(folder, job["who"])
    meter, start = Meter(), time.perf_counter()
    ppo_rlhf.main(ppo_rlhf.Args(total_episodes=job["episodes"], seed=job["round"], device="cpu",
                                output_dir=str(folder), run_name="run"))
    rows = common.read_metrics(folder / "run")
    return {"runs_per_hour": 3600 / (time.perf_counter() - start),
            "episodes_per_s": median(row["perf/episodes_per_s"] for row in rows)} | meter.memory()


def run_trl(folder, job, **settings):
    """PPOTrainer with as many optimizer steps, and as many rows at a time, as ours. Its critic is a
    model of its own in any case. An iteration starts where the one before has ended."""
    import transformers
    import trl.experimental.ppo  # noqa: F401 - before the memory is looked at

    meter = Meter()
    if "vocab" in job:  # gpu.py has models and prompts of its own
        save_models(folder, job["vocab"])

    class Callback(transformers.TrainerCallback):
        on_train_begin = on_step_end = meter.start

    rows = [json.loads(x)["prompt"] for x in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = common.trl_trainer(folder / "policy", folder / "reward_model", rows, {
        "output_dir": str(folder / "trl"), "total_episodes": job["batch"] * (ITERATIONS + 2),
        "per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1,
        "response_length": job["response_len"], "missing_eos_penalty": 1.0,
        "local_rollout_forward_batch_size": job["batch"], **settings}, [Callback()])
    trainer.train()
    return meter.report(job["batch"])


def count_lines(folder, job):
    """Lines of ppo_rlhf.py that run in an update, and in an iteration from prompts to update."""
    ppo_rlhf = load(folder, job["who"])
    save_models(folder, job["vocab"])
    lines = {}

    def note(found, frame, *_):
        if frame.f_code.co_filename == ppo_rlhf.__file__:
            found.add(frame.f_lineno)
            return functools.partial(note, found)

    def watch(owner, name):
        function, found = getattr(owner, name), lines.setdefault(name, set())

        def traced(*args):
            sys.settrace(functools.partial(note, found))
            try:
                return function(*args)
            finally:
                sys.settrace(None)

        setattr(owner, name, traced)

    for name in ("collect_rollout", "decode", "compute_advantages", "update_policy"):
        watch(ppo_rlhf, name)
    watch(ppo_rlhf.Scorer, "__call__")
    ppo_rlhf.main(ppo_rlhf.Args(**our_settings(folder, job)))
    return {"update_lines": len(lines["update_policy"]),
            "iteration_lines": len(set().union(*lines.values()))}


RUNNERS = {"ours": run_ours, "second edition": run_ours, "trl": run_trl, "lines": count_lines}


def measure(job):
    """One contestant, in this process. Returns: its figures."""
    with tempfile.TemporaryDirectory() as name:
        found = (run_default if "episodes" in job else RUNNERS[job["who"]])(Path(name), job)
    return {key: round(x, 4) for key, x in found.items()}


def one_run(job):
    """One contestant, in a process of its own. Returns: its figures."""
    return common.run_apart(__file__, job, threads=job["threads"])


def jobs():
    """All contestants in turn, in three rounds."""
    usual = SHAPE | {"threads": THREADS}
    for number in (1, 2, 3):
        contestants = ["ours", "second edition", "trl"][:: (-1) ** (number - 1)]
        for vocab in (512, 50_257):
            for critic in ("separate", "shared"):
                for who in contestants:
                    if (who, critic) != ("trl", "shared"):  # its critic is always separate
                        yield usual | {"vocab": vocab, "critic": critic, "who": who,
                                       "round": number}
        for who in (x for x in contestants if x != "trl"):
            yield {"episodes": 6400, "who": who, "round": number, "threads": THREADS}
    yield usual | {"who": "lines", "round": 1}


def pick(runs, **chosen):
    """The runs that have the chosen settings."""
    return [x for x in runs if all(x.get(name) == value for name, value in chosen.items())]


def beside(runs, other):
    """A table: ours and another contestant."""
    tasks = [("default command: runs per hour", "runs_per_hour", {"episodes": 6400}),
             ("default command, PPO: episodes/s", "episodes_per_s", {"episodes": 6400})]
    tasks += [(f"{vocab:,} words, {critic} critic: episodes/s", "episodes_per_s",
               SHAPE | {"vocab": vocab, "critic": critic})
              for vocab in (512, 50_257) for critic in ("separate", "shared")]
    rows = []
    for name, key, chosen in tasks:
        theirs = chosen | ({"critic": "separate"} if other == "trl" else {})
        pair = pick(runs, who="ours", **chosen), pick(runs, who=other, **theirs)
        if all(pair):
            memory = [f"{median(x['peak_gb'] for x in part):.2f} "
                      f"({median(x['imported_gb'] for x in part):.2f})" for part in pair]
            speeds = ({x["round"]: x[key] for x in part} for part in pair)
            rows.append([name, *common.compare(*speeds), *memory])
    return common.markdown(["speed", "ours", other, "ratio", "in single rounds",
                            "ours, peak GB (imported)", f"{other}, peak GB (imported)"], rows)


def main():
    """Run what is missing, then the tables."""
    runs = pick(common.run_missing(
        "throughput", list(jobs()), KEYS, one_run, ("torch", "transformers", "trl"),
        ("episodes_per_s", "runs_per_hour", "peak_gb"), at_once=1)["runs"], threads=THREADS)
    lines = [*beside(runs, "second edition"), "", *beside(runs, "trl"), ""]
    lines += [f"{x['update_lines']} lines of ppo_rlhf.py run in an update, {x['iteration_lines']} "
              "in an iteration." for x in pick(runs, who="lines")]
    common.publish("throughput", lines)


if __name__ == "__main__":
    common.start(main, measure)
