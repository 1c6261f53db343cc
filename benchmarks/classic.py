"""The control results of the README: ppo_classic.py by CleanRL's protocol, and the paper's table 1.

    python benchmarks/classic.py            # runs what is missing, two at a time, then plots
    python benchmarks/classic.py --table    # tables and picture from the committed results
    python benchmarks/classic.py --only group=same    # does today's file do what was measured?

67 runs of `python ppo_classic.py`, about 100 minutes on 2 cores. A run's figure is the mean return
of its last 100 training episodes: noisy actions, running statistics. The committed runs are those
of the first edition. Group "same", 40 short runs, compares its file with today's: after 6,144 steps
with the flags of each run, are all weights the same, bit by bit?
"""

import hashlib
import tempfile
from pathlib import Path
from statistics import mean, stdev

import common  # benchmarks/common.py
import torch

FIRST = "4de10bd"  # its ppo_classic.py made the committed runs
KEYS = ("group", "env_id", "variant", "seed", "flags")
SEEDS = [1, 2, 3]
MORE_SEEDS = range(4, 11)  # of Acrobot: its spread is as large as its distance to CleanRL

# Mean and standard deviation over 3 seeds that CleanRL publishes (docs/benchmark/ppo.md and
# ppo_continuous_action.md) for the same environments, steps and statistic.
PUBLISHED = {
    "CartPole-v1": (490.04, 6.12), "Acrobot-v1": (-86.36, 1.32), "HalfCheetah-v4": (1442.64, 46.03),
    "Hopper-v4": (2382.86, 271.74), "Walker2d-v4": (2287.95, 571.78),
    "InvertedPendulum-v4": (963.09, 22.20),
}

# Two tasks that need other flags than the defaults; the README shows the same commands.
FLAGS = {
    "Pendulum-v1": "--total-timesteps 200000 --num-envs 4 --num-steps 512 --gamma 0.95 "
                   "--learning-rate 1e-3",
    "MountainCarContinuous-v0": "--total-timesteps 200000 --num-envs 4 --num-steps 512 "
                                "--gamma 0.999 --ent-coef 0.01",
}

TASKS = [("published", x) for x in PUBLISHED] + [("flags", x) for x in FLAGS]

# Table 1 of the paper: mean over 7 environments of the return, 0 for a random policy, 1 for the
# best result of any variant.
VARIANTS = {
    "none": ("--policy-loss none", -0.39),
    "clip 0.2": ("--policy-loss clip", 0.82),
    "adaptive KL 0.01": ("--policy-loss kl-adaptive --kl-target 0.01", 0.74),
    "fixed KL 1": ("--policy-loss kl-fixed --kl-beta 1", 0.71),
}
TABLE1_ENVS = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"]


def measured():
    """Every run whose return is measured, in the order of KEYS."""
    for seed in SEEDS:
        for env_id in PUBLISHED:
            yield "published", env_id, "clip 0.2", seed, ""
        for env_id in TABLE1_ENVS:
            for variant, (flags, _) in VARIANTS.items():
                yield "table1", env_id, variant, seed, f"--total-timesteps 300000 {flags}"
        for env_id, flags in FLAGS.items():
            yield "flags", env_id, "clip 0.2", seed, flags
    for seed in MORE_SEEDS:
        yield "published", "Acrobot-v1", "clip 0.2", seed, ""


def jobs():
    """These, and the pairs of group "same"."""
    yield from measured()
    for env_id, flags in {(x[1], x[4]): 0 for x in measured()}:
        for variant in ("first edition", "today"):
            yield "same", env_id, variant, 1, f"{flags} --total-timesteps 6144"


def read_returns(run_dir):
    """Steps and returns of all training episodes, from the TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    points = events.Reload().Scalars("charts/episodic_return")
    return [point.step for point in points], [point.value for point in points]


def one_run(job):
    """Run ppo_classic.py once in a folder of its own. Returns: its figure and its curve, or a hash
    of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = common.ROOT / "ppo_classic.py"
        if job["variant"] == "first edition":
            path = common.edition("ppo_classic.py", FIRST, folder)
        common.run_python(path, "--env-id", job["env_id"], "--seed", job["seed"], "--output-dir",
                          folder, "--run-name", "run", *job["flags"].split(), cwd=folder)
        if job.get("group") == "same":
            weights = torch.load(Path(folder, "run", "model.pt"))["agent"].values()
            found = b"".join(sorted(x.numpy().tobytes() for x in weights))  # names have changed
            return {"weights": hashlib.sha256(found).hexdigest()[:16]}
        steps, returns = read_returns(Path(folder, "run"))
    # The curve: 50 means over equal spans of steps; empty spans are left out.
    span, spans = max(steps) / 50, [[] for _ in range(50)]
    for step, value in zip(steps, returns, strict=True):
        spans[min(49, int(step / span))].append(value)
    curve = [[round((i + 0.5) * span), round(mean(x), 2)] for i, x in enumerate(spans) if x]
    return {"last_100": mean(returns[-100:]), "episodes": len(returns), "curve": curve}


def random_return(env_id):
    """Mean return of 20 episodes of uniformly random actions: the zero of table 1."""
    import gymnasium

    env, returns = gymnasium.make(env_id), []
    env.action_space.seed(1)
    for episode in range(20):
        env.reset(seed=episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return mean(returns)


def main():
    """Run what is missing, two at a time, then summarise and plot."""
    results = common.run_missing(
        "classic", [dict(zip(KEYS, job, strict=True)) for job in jobs()], KEYS, one_run,
        ("torch", "gymnasium", "mujoco", "numpy"), shown=("last_100",))
    if "random_returns" not in results:
        results["random_returns"] = {env_id: random_return(env_id) for env_id in TABLE1_ENVS}
        common.write_results("classic", results)
    summary(results)
    plot(results)


def pick(results, group, env_id, variant="clip 0.2"):
    """The runs of one cell of a table."""
    return [r for r in results["runs"]
            if (r["group"], r["env_id"], r["variant"]) == (group, env_id, variant)]


def summary(results):
    """The tables: control tasks, tasks with flags of their own, the paper's table 1."""
    rows = []
    for group, env_id in TASKS:
        runs = sorted(pick(results, group, env_id), key=lambda r: r["seed"])
        figures = [r["last_100"] for r in runs]
        published = "{:.1f} ± {:.1f}".format(*PUBLISHED[env_id]) if env_id in PUBLISHED else ""
        if len(figures) > 1:
            rows.append([env_id, published, f"{mean(figures):.1f} ± {stdev(figures):.1f}",
                         ", ".join(f"{x:.1f}" for x in figures)])
    lines = common.markdown(["environment", "CleanRL, 3 seeds", "ours", "each seed"], rows)
    rows = []
    for variant, scores in table1(results).items():
        returns = [mean(r["last_100"] for r in pick(results, "table1", env_id, variant))
                   for env_id in TABLE1_ENVS]
        rows.append([variant, f"{VARIANTS[variant][1]:.2f}", f"{scores:.2f}",
                     *(f"{x:.0f}" for x in returns)])
    lines += ["", *common.markdown(["objective", "paper", "ours", *TABLE1_ENVS], rows)]
    common.publish("classic", lines)


def table1(results):
    """Score of each variant as in the paper: for each run (return − random) / (best − random), the
    best being the best mean over seeds of any variant; then the mean over all runs."""
    scores = {variant: [] for variant in VARIANTS}
    for env_id in TABLE1_ENVS:
        runs = {variant: pick(results, "table1", env_id, variant) for variant in VARIANTS}
        random = results["random_returns"][env_id]
        best = max(mean(r["last_100"] for r in x) for x in runs.values())
        for variant, x in runs.items():
            scores[variant] += [(r["last_100"] - random) / (best - random) for r in x]
    return {variant: mean(x) for variant, x in scores.items() if x}


def plot(results):
    """Learning curves, one line per seed, with the published mean and spread drawn in."""
    with common.picture("classic", 2, 4, (15, 6)) as axes:
        for axis, (group, env_id) in zip(axes.flat, TASKS, strict=True):
            for r in pick(results, group, env_id):
                steps, returns = zip(*r["curve"], strict=True)
                axis.plot([x / 1000 for x in steps], returns, linewidth=1.2, color=common.BLUE,
                          alpha=0.8)
            if group == "published":
                mid, spread = PUBLISHED[env_id]
                axis.axhline(mid, color=common.RED, linewidth=1, label="CleanRL, published")
                axis.axhspan(mid - spread, mid + spread, color=common.RED, alpha=0.15)
            axis.set_title(env_id)
            axis.set_xlabel("thousand steps")
        axes[0, 0].set_ylabel("return of training episodes")
        axes[0, 0].legend()


if __name__ == "__main__":
    main()
