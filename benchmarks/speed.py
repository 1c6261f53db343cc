"""Steps per second, training included: ppo_classic.py and Stable-Baselines3, on the same work.

    python benchmarks/speed.py            # runs what is missing, one at a time; about 5 minutes
    python benchmarks/speed.py --table    # the table, from the committed results

Only ratios mean something, on a machine that does nothing else: in each of 5 rounds both run one
after the other. The table has medians over the rounds, the ratio of these medians, and the range of
the ratios within single rounds. Both do the same work on one thread: environments, rollout length,
epochs, minibatches, two networks of 64-64 tanh units, value clipping, TensorBoard.
"""

import functools
import re
import tempfile
import time

import common  # benchmarks/common.py

TASKS = {  # environments, steps per rollout, minibatch size, epochs, steps to measure
    "CartPole-v1": (4, 128, 128, 4, 51_200),
    "HalfCheetah-v5": (1, 2048, 64, 10, 12_288),
}


def ours(env_id):
    """ppo_classic.py through its command line; its own figure, charts/SPS, at the end."""
    with tempfile.TemporaryDirectory() as folder:
        output = common.run_python(
            common.ROOT / "ppo_classic.py", "--env-id", env_id, "--total-timesteps",
            TASKS[env_id][4], "--output-dir", folder, "--eval-episodes", 0, cwd=folder).stdout
    return float(re.findall(r"([\d,]+) steps/s", output)[-1].replace(",", ""))


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


CONTESTANTS = {x.__name__: x for x in (ours, stable_baselines3)}


def one_run(job):
    """One contestant, in this process. Returns: steps per second."""
    return {"steps_per_s": round(CONTESTANTS[job["who"]](job["env_id"]))}


def main():
    """Run what is missing of five rounds, then the table."""
    jobs = [{"round": number, "env_id": env_id, "who": who}
            for number in range(1, 6) for env_id in TASKS for who in CONTESTANTS]
    runs = common.run_missing(
        "speed", jobs, list(jobs[0]), functools.partial(common.run_apart, __file__),
        ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3"), ("steps_per_s",),
        at_once=1)["runs"]
    rows = []
    for env_id in TASKS:
        found = {who: {x["round"]: x["steps_per_s"] for x in runs
                       if (x["env_id"], x["who"]) == (env_id, who)} for who in CONTESTANTS}
        rows.append([env_id, *common.compare(*found.values(), digits=0)])
    common.publish("speed", common.markdown(
        ["steps per second", "ours", "Stable-Baselines3", "ratio", "in single rounds"], rows))


if __name__ == "__main__":
    common.start(main, one_run)
