"""Steps per second, training included: ppo_classic.py, its first edition, Stable-Baselines3, the
environment alone.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py [--cleanrl PATH/TO/cleanrl/ppo.py]

Only ratios mean something, on a machine that does nothing else: in each of 5 rounds all contestants
run one after the other, and a ratio is the median of the 5 ratios within a round. All learners do
the same work on one thread: environments, rollout length, epochs, minibatches, two networks of
64-64 tanh units, value clipping, TensorBoard. About 5 minutes; results in results/speed.json.
"""

import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import common  # benchmarks/common.py

PACKAGES = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
TASKS = {  # environments, steps per rollout, minibatch size, epochs, steps to measure
    "CartPole-v1": (4, 128, 128, 4, 51_200),
    "HalfCheetah-v5": (1, 2048, 64, 10, 12_288),
}


def environment_alone(env_id):
    """Random actions in the same vector environment: the limit of any learner."""
    import gymnasium

    num_envs, steps = TASKS[env_id][0], TASKS[env_id][4] // TASKS[env_id][0]
    make = [lambda: gymnasium.make(env_id, disable_env_checker=True)] * num_envs
    envs = gymnasium.vector.SyncVectorEnv(
        make, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    envs.reset(seed=1)
    actions = [envs.action_space.sample() for _ in range(steps)]
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    return steps * num_envs / (time.perf_counter() - start)


def ours(env_id, path=common.ROOT / "ppo_classic.py"):
    """ppo_classic.py through its command line; its own figure, charts/SPS, at the end."""
    with tempfile.TemporaryDirectory() as folder:
        output = common.run_python(path, "--env-id", env_id, "--total-timesteps", TASKS[env_id][4],
                                   "--output-dir", folder, "--eval-episodes", 0).stdout
    return float(re.findall(r"([\d,]+) steps/s", output)[-1].replace(",", ""))


def first_edition(env_id):
    """ppo_classic.py as it was before it was rewritten, taken from git."""
    with tempfile.TemporaryDirectory() as folder:
        return ours(env_id, common.first_edition("ppo_classic.py", folder))


def stable_baselines3(env_id):
    """PPO of Stable-Baselines3; the time of learn()."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    num_envs, num_steps, minibatch_size, epochs, total = TASKS[env_id]
    envs = make_vec_env(env_id, num_envs, seed=1)
    envs = VecNormalize(envs) if env_id == "HalfCheetah-v5" else envs
    with tempfile.TemporaryDirectory() as folder:
        model = PPO("MlpPolicy", envs, n_steps=num_steps, batch_size=minibatch_size, device="cpu",
                    n_epochs=epochs, clip_range_vf=0.2, tensorboard_log=folder, seed=1)
        start = time.perf_counter()
        model.learn(total)
        return model.num_timesteps / (time.perf_counter() - start)


def cleanrl(env_id):
    """A copy of CleanRL's ppo.py of your own, with its own figure: the last SPS it prints."""
    path = sys.argv[sys.argv.index("--cleanrl") + 1]
    with tempfile.TemporaryDirectory() as folder:
        output = common.run_python(Path(path).resolve(), "--total-timesteps", TASKS[env_id][4],
                                   "--no-cuda", cwd=folder).stdout
    return float(re.findall(r"SPS: (\d+)", output)[-1])


CONTESTANTS = {x.__name__: x for x in (environment_alone, ours, first_edition, stable_baselines3,
                                       cleanrl)}


def measure(name, env_id):
    """One contestant in a process of its own. Returns: steps per second."""
    output = common.run_python(__file__, "--measure", name, env_id, *sys.argv[1:]).stdout
    return float(output.splitlines()[-1])


def main():
    """Five rounds of all contestants, then medians and ratios."""
    results = {"hardware": common.hardware(*PACKAGES), "rounds": []}
    for number in range(1, 6):
        for env_id in TASKS:
            names = list(CONTESTANTS)
            if "--cleanrl" not in sys.argv or env_id != "CartPole-v1":
                names.remove("cleanrl")
            speeds = {name: round(measure(name, env_id)) for name in names}
            results["rounds"].append({"round": number, "env_id": env_id} | speeds)
            print(results["rounds"][-1], flush=True)
    for env_id in TASKS:
        rounds = [x for x in results["rounds"] if x["env_id"] == env_id]
        for name in [x for x in rounds[0] if x in CONTESTANTS]:
            speeds = [x[name] for x in rounds]
            ratio = median(x["ours"] / x[name] for x in rounds)
            print(f"{env_id:15} {name:18} {median(speeds):8,.0f} steps/s "
                  f"({min(speeds):,}-{max(speeds):,}) | ours is {ratio:.2f} times as fast")
    common.write_results("speed", results)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        position = sys.argv.index("--measure")
        print(CONTESTANTS[sys.argv[position + 1]](sys.argv[position + 2]))
    else:
        main()
