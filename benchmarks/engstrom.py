"""Do the details of PPO matter more than its clip? After Engstrom et al. 2020 (2005.12729).

    python benchmarks/engstrom.py                             # runs what is missing, then plots
    python benchmarks/engstrom.py --only env_id=CartPole-v1   # one environment
    python benchmarks/engstrom.py --table                     # from the committed results

The details are value clipping, observation and reward normalisation, orthogonal initialisation and
learning-rate annealing. Each is switched off alone, then all are off; all of this with the clipped
objective and with the bare surrogate (--policy-loss none). Then ε of 0.1 and 0.3. A figure is the
mean return of the last 100 training episodes. 96 runs of half a minute, 96 (MuJoCo) of two or so.
"""

import classic  # benchmarks/classic.py
import common  # benchmarks/common.py

ENVS = {"CartPole-v1": 200_000, "Acrobot-v1": 200_000, "HalfCheetah-v4": 300_000,
        "Hopper-v4": 300_000}
# Switched on for all: the defaults of discrete actions normalise neither observations nor rewards.
ON = "--clip-vloss --norm-obs=True --norm-reward=True --orthogonal-init --anneal-lr"
OFF = {"value clipping": "--no-clip-vloss", "observation normalisation": "--norm-obs=False",
       "reward normalisation": "--norm-reward=False", "orthogonal start": "--no-orthogonal-init",
       "annealing": "--no-anneal-lr"}
VARIANTS = {"all on": "", **{f"no {name}": flag for name, flag in OFF.items()},
            "all off": " ".join(OFF.values())}
KEYS = ("env_id", "objective", "variant", "seed", "flags")


def switches(off):
    """ON without what is switched off, then off."""
    gone = off.replace("--no-", "--").replace("=False", "=True").split()
    return " ".join([*(x for x in ON.split() if x not in gone), off])


def jobs():
    """Every run, seed by seed."""
    settings = [(objective, variant, f"--policy-loss {objective} {switches(off)}")
                for variant, off in VARIANTS.items() for objective in ("clip", "none")]
    settings += [("clip", f"clip_coef {x}", f"{ON} --clip-coef {x}") for x in (0.1, 0.3)]
    return [dict(zip(KEYS, (env_id, objective, variant, seed,
                            f"--total-timesteps {steps} {flags}"), strict=True))
            for seed in (1, 2, 3) for env_id, steps in ENVS.items()
            for objective, variant, flags in settings]


def main():
    """Run what is missing; then a table and a picture: return by variant, per environment."""
    results = common.run_missing("engstrom", jobs(), KEYS, classic.one_run,
                                 ("torch", "gymnasium", "mujoco", "numpy"), shown=("last_100",))
    names = [*VARIANTS, "clip_coef 0.1", "clip_coef 0.3"]
    found = {}  # returns of the seeds, by (environment, objective, variant)
    for x in results["runs"]:
        found.setdefault((x["env_id"], x["objective"], x["variant"]), []).append(x["last_100"])
    envs = [x for x in ENVS if any(key[0] == x for key in found)]
    rows = []
    for env_id in envs:
        for name in names:
            cells = [found.get((env_id, objective, name), []) for objective in ("clip", "none")]
            if any(cells):
                rows.append([env_id, name, *(common.spread(x, 0) for x in cells)])
    common.publish("engstrom", common.markdown(
        ["environment", "variant", "with the clip", "without: bare surrogate"], rows))
    with common.picture("engstrom", 1, len(envs), (4.2 * len(envs), 4)) as axes:
        for axis, env_id in zip(axes[0], envs, strict=True):
            for objective, colour in (("clip", common.BLUE), ("none", common.RED)):
                points = [(y, name) for name in names
                          for y in found.get((env_id, objective, name), [])]
                axis.plot([y for y, _ in points], [names.index(name) for _, name in points], "o",
                          color=colour, alpha=0.6, label=objective)
            axis.set_yticks(range(len(names)), names if env_id == envs[0] else [""] * len(names))
            axis.invert_yaxis()
            axis.set_title(f"{env_id}, return")
        axes[0, 0].legend()


if __name__ == "__main__":
    main()
