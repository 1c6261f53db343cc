"""Episodes per second and peak memory of PPO: ppo_rlhf.py and trl's PPOTrainer on the same work.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py            # runs what is missing, one at a time; 20 minutes
    python benchmarks/throughput.py --table    # tables and plot from the committed results

Both train the same random GPT-2 (4 layers of width 128) with a reward model of the same shape: 64
responses per iteration, 4 epochs of 4 steps, 32 + 32 tokens, float32. trl's critic is a model of
its own; ours is measured as that, and as a value head on the policy. The time is what passes
between the starts of two iterations, everything counted; the figure is its median.
Memory is the most that the process holds beyond what it held after loading. Only ratios within one
round mean something, on a machine that does nothing else.

How the cost grows: our iteration with longer responses, larger batches, larger vocabularies, and
with responses of which half end before the limit (2 % of the vocabulary then count as EOS).

Limits: reading all weights and the cache once for each token at the rate at which memory is copied;
the arithmetic of the update at the rate of a large matrix product. Both rates are measured in the
same process, before the run. Calls: how many operators (on a GPU each is a launch of some 5 µs) and
how many reads of a value (on a GPU each waits for the device) a decoded token and an optimizer step
take, counted at vocabulary 512.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import common  # benchmarks/common.py

SHAPE = {"vocab": 512, "batch": 64, "response_len": 32, "critic": "separate", "early": False}
GROWTH = {"response_len": [32, 128, 512], "batch": [16, 64, 256], "early": [False, True],
          "vocab": [512, 4096, 50_257, 150_000]}
PROMPT_LEN, ITERATIONS = 32, 3


def save_models(folder, vocab, early):
    """A random policy, a random reward model, and prompts, as both sides read them. early: so many
    tokens end a response that half of the responses of 32 tokens end before that."""
    import random

    import transformers

    words = [f"w{i}" for i in range(vocab - 2)]
    common.save_random_models(folder, words, transformers.GPT2Config(
        vocab_size=vocab, n_embd=128, n_layer=4, n_head=4, n_positions=1024, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0))
    if early:
        eos_ids = list(range(1, 2 + round(0.0214 * vocab)))
        transformers.GenerationConfig(eos_token_id=eos_ids).save_pretrained(folder / "policy")
    rng = random.Random(1)
    prompts = [" ".join(rng.choices(words, k=PROMPT_LEN)) for _ in range(1024)]
    lines = (json.dumps({"prompt": prompt}) for prompt in prompts)
    (folder / "prompts.jsonl").write_text("\n".join(lines))


class Meter:
    """Records when iterations start, and the most memory that the process holds meanwhile."""

    def __init__(self):
        self.starts, self.loaded, self.peak = [], None, 0
        threading.Thread(target=self.watch, daemon=True).start()

    def resident(self):
        """Memory of this process, in GB."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    def watch(self):
        """Look at the memory a hundred times a second."""
        while True:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.01)

    def start(self, *_args, **_kwargs):
        """An iteration starts; the first is warm-up."""
        if self.loaded is None:
            self.loaded = self.peak = self.resident()
        self.starts.append(time.perf_counter())

    def report(self, batch):
        """Episodes per second and peak memory above what was loaded."""
        seconds = [b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False)]
        return {"episodes_per_s": round(batch / median(seconds), 3),
                "peak_gb": round(self.peak - self.loaded, 3)}


def run_ours(folder, job, meter):
    """main of ppo_rlhf.py; an iteration starts where it sets the learning rates. decode_s: seconds
    that an iteration samples, without the passes that read the responses again."""
    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    set_learning_rates, sample = ppo_rlhf.set_learning_rates, ppo_rlhf.sample_responses
    seconds = []

    def start(*args, **kwargs):
        meter.start()
        set_learning_rates(*args, **kwargs)

    def timed_sample(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return sample(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begin)

    ppo_rlhf.set_learning_rates, ppo_rlhf.sample_responses = start, timed_sample
    ppo_rlhf.main(ppo_rlhf.Args(
        dataset=str(folder / "prompts.jsonl"), policy_model=str(folder / "policy"), sft_epochs=0,
        reward_model=(str(folder / "reward_model"),), eval_prompts=0, critic=job["critic"],
        total_episodes=job["batch"] * (ITERATIONS + 2), batch_size=job["batch"],
        minibatch_size=job["batch"] // 4, response_len=job["response_len"],
        max_prompt_len=PROMPT_LEN, output_dir=str(folder), run_name="run", save_interval=1000))
    rows = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    split = {key: median(row[f"perf/{key}"] for row in rows[1:])
             for key in ("rollout_s", "score_s", "update_s")}
    split["decode_s"] = median(seconds[2:])  # the first samples measure the scores
    split["mean_response_len"] = median(row["rollout/response_len"] for row in rows)
    return {key: round(x, 3) for key, x in split.items()}


def run_trl(folder, job, meter):
    """PPOTrainer; an iteration starts where the one before has ended. Its critic is a model of its
    own in any case."""
    import transformers

    class Callback(transformers.TrainerCallback):
        on_train_begin = on_step_end = meter.start

    rows = [json.loads(x)["prompt"] for x in (folder / "prompts.jsonl").read_text().splitlines()]
    common.trl_trainer(folder / "policy", folder / "reward_model", rows, {
        "output_dir": str(folder / "trl"), "total_episodes": job["batch"] * (ITERATIONS + 2),
        "per_device_train_batch_size": job["batch"] // 4, "gradient_accumulation_steps": 4,
        "response_length": job["response_len"], "missing_eos_penalty": 1.0,
        "local_rollout_forward_batch_size": job["batch"] // 4}, [Callback()]).train()
    return {}


def limits(job):
    """Least seconds that decoding and the update could take here, by measured rates."""
    import torch

    def rate(amount, work):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds)

    large, matrix = torch.randn(2**26), torch.randn(2048, 2048)
    bytes_per_s = rate(2 * 4 * 2**26, large.clone)  # each number is read and written
    flops_per_s = rate(2 * 2048**3, lambda: matrix @ matrix)
    width, layers, response_len = 128, 4, job["response_len"]
    trunk, head = 12 * layers * width**2, job["vocab"] * width
    cached = job["batch"] * layers * 2 * width * (PROMPT_LEN + response_len / 2)  # on average
    responses = 4 * job["batch"]  # four epochs
    trunks = 2 if job["critic"] == "separate" else 1
    flops = 6 * responses * (trunks * trunk * (PROMPT_LEN + response_len) + head * response_len)
    decode_limit_s = 4 * response_len * (trunk + head + cached) / bytes_per_s
    return {"decode_limit_s": round(decode_limit_s, 4),
            "update_limit_s": round(flops / flops_per_s, 4)}


def count_calls(folder, job):
    """Operators and reads of a value, per decoded token and per optimizer step."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    class Calls(TorchDispatchMode):
        operators = reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operators += not function.is_view
            name = function.overloadpacket.__name__
            by_mask = name == "index" and any(
                x is not None and x.dtype == torch.bool for x in args[1])  # calls nonzero inside
            self.reads += name in ("_local_scalar_dense", "nonzero") or by_mask
            return function(*args, **(kwargs or {}))

    calls, tolist = Calls(), torch.Tensor.tolist

    def counted_tolist(tensor):
        calls.reads += 1
        return tolist(tensor)

    args = ppo_rlhf.resolve_args(ppo_rlhf.Args(
        policy_model=str(folder / "policy"), critic=job["critic"], batch_size=job["batch"],
        total_episodes=job["batch"], minibatch_size=job["batch"] // 4, device="cpu",
        response_len=job["response_len"], max_prompt_len=PROMPT_LEN))
    policy = ppo_rlhf.load_policy(args.policy_model, args)
    policy.add_critic(ppo_rlhf.Score([None]))
    prompts = [json.loads(x)["prompt"] for x in (folder / "prompts.jsonl").open()][:job["batch"]]
    rollout = ppo_rlhf.collect_rollout(policy, policy, prompts, 1, args)
    rollout.scores = torch.randn(len(prompts))
    ppo_rlhf.compute_advantages(rollout, 0.05, args)
    encoded = policy.encode(prompts)
    noise = torch.rand(len(prompts), args.response_len)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    torch.Tensor.tolist = counted_tolist
    with calls:
        sampled = ppo_rlhf.sample_tokens(policy, encoded, noise, 1.0)
    tokens = int(sampled.response_mask.any(dim=0).sum())
    found = {"decode_operators": round(calls.operators / tokens),
             "decode_reads": round(calls.reads / tokens, 2)}
    calls.operators = calls.reads = 0
    with calls:
        ppo_rlhf.update_policy(policy, optimizer, rollout, 0.05, [], 1,
                               ppo_rlhf.replace(args, update_epochs=1))
    return found | {"step_operators": round(calls.operators / 4),
                    "step_reads": round(calls.reads / 4, 2)}


RUNNERS = {"ours": run_ours, "trl": run_trl}


def measure(job):
    """One contestant, in this process. Prints its figures as JSON."""
    with tempfile.TemporaryDirectory() as name:
        save_models(Path(name), job["vocab"], job["early"])
        if job["who"] == "calls":
            print(json.dumps(count_calls(Path(name), job)))
            return
        found, meter = limits(job), Meter()
        split = RUNNERS[job["who"]](Path(name), job, meter)
    print(json.dumps(meter.report(job["batch"]) | split | found))


def one_run(job):
    """One contestant, in a process of its own. Returns: its figures."""
    output = common.run_python(__file__, "--measure", json.dumps(job), threads=2).stdout
    return json.loads(output.splitlines()[-1])


def jobs():
    """Ours and trl in turn, twice; then how our cost grows."""
    for number in (1, 2):
        for vocab in (512, 50_257):
            for critic in ("separate", "shared"):
                for who in ("ours", "trl"):
                    if (who, critic) != ("trl", "shared"):  # its critic is always separate
                        yield SHAPE | {"vocab": vocab, "critic": critic, "who": who,
                                       "round": number}
    for name, values in GROWTH.items():
        for value in values:
            if value not in (SHAPE[name], 50_257):  # those are among the jobs above
                yield SHAPE | {name: value, "who": "ours", "round": 1}
    for critic in ("separate", "shared"):
        yield SHAPE | {"critic": critic, "who": "calls", "round": 1}


def figures(runs, key, **chosen):
    """One figure of each run that has the chosen settings."""
    return [x[key] for x in runs if all(x[name] == value for name, value in chosen.items())]


def main():
    """Run what is missing, then the tables."""
    runs = common.run_missing("throughput", list(jobs()), (*SHAPE, "who", "round"), one_run,
                              ("torch", "transformers", "trl"), ("episodes_per_s", "peak_gb"),
                              at_once=1)["runs"]
    rows = []
    for vocab in (512, 50_257):
        trl = figures(runs, "episodes_per_s", who="trl", vocab=vocab)
        for critic in ("separate", "shared"):
            same = SHAPE | {"vocab": vocab, "critic": critic}
            ours = figures(runs, "episodes_per_s", who="ours", **same)
            if not (ours and trl):
                continue
            peak = median(figures(runs, "peak_gb", who="ours", **same))
            trl_peak = median(figures(runs, "peak_gb", who="trl", vocab=vocab))
            ratios = [a / b for a, b in zip(ours, trl, strict=False)]
            rows.append([f"{vocab:,}", critic, f"{median(ours):.2f}", f"{median(trl):.2f}",
                         f"{median(ratios):.2f}", f"{peak:.2f}", f"{trl_peak:.2f}"])
    lines = common.markdown(["vocabulary", "our critic", "ours, episodes/s", "trl", "ratio",
                             "ours, GB above loaded", "trl"], rows)
    ours = [x for x in runs if x["who"] == "ours"]
    grown = [[*(x[name] for name in SHAPE), x["episodes_per_s"],
              round(x["episodes_per_s"] * x["mean_response_len"]), x["rollout_s"], x["score_s"],
              x["update_s"], f"{x['decode_limit_s'] / x['decode_s']:.0%}",
              f"{x['update_limit_s'] / x['update_s']:.0%}", x["peak_gb"]] for x in ours]
    lines += ["", *common.markdown(
        [*SHAPE, "episodes/s", "tokens/s", "rollout s", "score s", "update s",
         "decoding, of its limit", "update, of its limit", "GB"], grown)]
    calls = [x for x in runs if x["who"] == "calls"]
    if calls:
        keys = "decode_operators", "decode_reads", "step_operators", "step_reads"
        lines += ["", *common.markdown(["critic", *(key.replace("_", ", ") for key in keys)],
                                       [[x["critic"], *(x[key] for key in keys)] for x in calls])]
    common.publish("throughput", lines)
    plot(ours)


def plot(runs):
    """Seconds of an iteration by what makes it longer; each phase on top of the other."""
    with common.picture("throughput", 1, len(GROWTH), (13, 3)) as axes:
        for axis, (name, values) in zip(axes[0], GROWTH.items(), strict=True):
            bottom = [0.0] * len(values)
            for phase, colour in (("rollout_s", common.BLUE), ("score_s", common.GREY),
                                  ("update_s", common.GREEN)):
                heights = [median(figures(runs, phase, **SHAPE | {name: value}))
                           for value in values]
                axis.bar([str(x) for x in values], heights, bottom=bottom, color=colour,
                         label=phase[:-2])
                bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
            axis.set_xlabel({"response_len": "tokens of a response", "batch": "responses",
                             "early": "half end early", "vocab": "vocabulary"}[name])
        axes[0, 0].set_ylabel("seconds of an iteration")
        axes[0, 0].legend()


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(json.loads(sys.argv[sys.argv.index("--measure") + 1]))
    else:
        main()
