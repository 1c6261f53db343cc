"""Claim: N processes do the work of one, each its share, and end with the same weights.

Reference: the same runs in one process, here. torchrun starts the others, with gloo on the CPU.
Run: python -m pytest tests/test_processes.py (60 seconds)
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import make_lm, make_reward_model, make_tokenizer, save
from safetensors.torch import load_file

from ppo_rlhf import Args, main

REWARDS = '''
import json
import os
from pathlib import Path


def shares(prompts, responses, answer):
    """Scores, and a line in a file of this process: which rows of the data it was given."""
    with open(Path(__file__).with_name(f"calls{os.environ.get('RANK', '')}.jsonl"), "a") as file:
        file.write(json.dumps(answer) + "\\n")
    return [len(x) / 10 for x in responses]


def fails_in_process_1(prompts, responses):
    if os.environ.get("RANK") == "1" and len(prompts) > 3:
        raise RuntimeError("the judge has left")
    return [0.0 for _ in responses]
'''

# Ragged prompts, and responses of which many end early, are in all of them.
SETTINGS = {
    "shared": {"kl_target": 1.0, "whiten_rewards": True},
    "separate": {"critic": "separate", "ptx_coef": 0.5, "microbatch_size": 2},
    "loss": {"kl_in": "loss", "kl_estimator": "k3", "ent_coef": 0.1, "score_norm": "none"},
    "ensemble": {"ensemble_coef": 0.5, "ref_update_interval": 2},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, pairs_file):
    """A policy, two reward models, comparisons with a number each, and reward functions."""
    folder = tmp_path_factory.mktemp("processes")
    lines = Path(pairs_file).read_text().splitlines()
    rows = [json.loads(line) | {"answer": i} for i, line in enumerate(lines)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    policy = make_lm("GPT2")
    policy.generation_config.eos_token_id = [1, 4, 5, 6]  # many responses end early
    save(folder / "policy", policy, make_tokenizer())
    for seed in (1, 2):
        save(folder / f"judge{seed}", make_reward_model(seed=seed), make_tokenizer())
    return folder


def settings(places, output_dir):
    """Four runs of PPO alone, 3 iterations of 10 responses, and one of all three stages."""
    judges = [str(places / "judge1"), str(places / "judge2")]
    usual = Args(
        dataset=str(places / "pairs.jsonl"), policy_model=str(places / "policy"), sft_epochs=0,
        reward_model=judges[:1], total_episodes=30, adam_eps=1e-5, batch_size=10, minibatch_size=5,
        update_epochs=2, response_len=6, max_prompt_len=4, eval_prompts=5, learning_rate=1e-4,
        sft_learning_rate=1e-4, reward_learning_rate=1e-4, temperature=0.9, device="cpu",
        output_dir=str(output_dir))
    runs = [replace(usual, run_name=name, **changes) for name, changes in SETTINGS.items()]
    runs[-1] = replace(runs[-1], reward_model=judges)
    stages = replace(usual, run_name="stages", sft_epochs=1, reward_model=(), minibatch_size=10)
    called = replace(usual, run_name="called", reward_model=(), score_norm="none",
                     reward_fn=f"{places / 'rewards.py'}:shares")
    return [*runs, stages, called]


def torchrun(number, script, *arguments):
    """Start a script in so many processes. Returns: the finished torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:  # the system chooses a port that nobody uses
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number),
         "--master-port", str(port), str(script), *arguments],
        env=environment, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def one_process(places):
    """The folder of all runs, made in this process."""
    for args in settings(places, places / "1"):
        main(args)
    return places / "1"


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, places, one_process):
    """The folder of the same runs, made by 2 and by 3 processes, and how many there were."""
    number = request.param
    (places / "calls.jsonl").unlink(missing_ok=True)
    for path in places.glob("calls?.jsonl"):
        path.unlink()
    many = [asdict(x) for x in settings(places, places / str(number))]
    (places / "settings.json").write_text(json.dumps(many))
    done = torchrun(number, Path(__file__).with_name("run_many.py"), str(places / "settings.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return places / str(number), number


def difference(folder, other):
    """The largest difference between the weights of two saved models."""
    mine, its = (load_file(x / "model.safetensors") for x in (folder, other))
    assert mine.keys() == its.keys()
    return max((mine[name] - its[name]).abs().max().item() for name in mine)


@pytest.mark.parametrize("name", SETTINGS)
def test_ppo_ends_with_the_weights_of_one_process(one_process, processes, name):
    folder, _ = processes
    assert difference(one_process / name / "policy", folder / name / "policy") < 1e-5


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_stages_1_and_2_end_with_the_weights_of_one_process(one_process, processes, stage):
    folder, _ = processes
    assert difference(one_process / "stages" / stage, folder / "stages" / stage) < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_the_log_is_that_of_one_process_and_has_each_iteration_once(one_process, processes, name):
    rows, others = ([{key: x for key, x in json.loads(line).items()
                      if "perf" not in key and key != "wall_time"}
                     for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
                    for folder in (one_process, processes[0]))
    assert [row["iteration"] for row in others] == [1, 2, 3]
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_answers_are_written_once_and_are_those_of_one_process(one_process, processes, name):
    rows, others = ([json.loads(line)["ppo"]["response"] for line in
                     (folder / name / "before_after.jsonl").read_text().splitlines()]
                    for folder in (one_process, processes[0]))
    assert rows == others


def test_each_process_scores_its_share_of_the_rows(processes, places):
    _, number = processes
    shares = [list(map(json.loads, (places / f"calls{rank}.jsonl").read_text().splitlines()))
              for rank in range(number)]
    # The last call is that of the final evaluation, the three before it those of the iterations.
    for rows in zip(*(share[-4:-1] for share in shares), strict=True):
        assert len({x for share in rows for x in share}) == 10
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_process_that_fails_ends_the_others_and_says_why(places):
    args = replace(settings(places, places / "failing")[-1],
                   reward_fn=f"{places / 'rewards.py'}:fails_in_process_1")
    (places / "settings.json").write_text(json.dumps([asdict(args)]))
    done = torchrun(2, Path(__file__).with_name("run_many.py"), str(places / "settings.json"))
    assert done.returncode != 0 and "RuntimeError: the judge has left" in done.stderr
