"""Claim: N processes do the work of one, each its share, and end with the same weights.

Reference: the same runs in one process, here. torchrun starts the others, with gloo on the CPU.
Run: python -m pytest tests/test_processes.py (25 seconds)
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import conftest
import pytest
from conftest import PAIRS, TINY, make_lm, make_reward_model, make_tokenizer, read_rows, save
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
RUNS = {
    "shared": {"reward_fn": "rewards.py:shares", "kl_target": 1.0, "whiten_rewards": True},
    "separate": {"reward_model": ("judge1", "judge2"), "critic": "separate", "ptx_coef": 0.5,
                 "ref_update_interval": 2, "microbatch_size": 2},
    # All three stages. Of six demonstrations one is held out, and a step has five.
    "loss": {"sft_epochs": 2, "sft_dataset": "six.jsonl", "sft_learning_rate": 1e-4,
             "reward_learning_rate": 1e-4, "norm_scores": False, "kl_in": "loss",
             "kl_estimator": "k3", "ent_coef": 0.1},
    # The embedded task. For 501 comparisons 2 · 501 responses are sampled, 1000 at a time.
    "reviews": {"dataset": "reviews", "policy_model": None, "sft_epochs": 1, "response_len": 8,
                "sft_dataset": "reviews.jsonl", "num_comparisons": 501, "batch_size": 40,
                "minibatch_size": 40, "total_episodes": 120, "reward_learning_rate": 1e-4},
    "fails": {"reward_fn": "rewards.py:fails_in_process_1"},
}
COMPLETED = list(RUNS)[:-1]
NUM_PROCESSES = {name: 3 if name == "reviews" else 2 for name in RUNS}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A policy, two reward models, data, and reward functions, in the folder of the runs."""
    folder = tmp_path_factory.mktemp("processes")
    six = [{"prompt": f"a {x['prompt']}", "completion": " the plot ."} for x in PAIRS[:6]]
    reviews = [{"prompt": f"a {genre} about {theme}.", "completion": f" the {noun} was {word}."}
               for genre, theme, noun, word in itertools.product(
                   ("comedy", "western"), ("the sea", "lost love"), ("plot", "cast"), ("dull",))]
    for name, rows in {"pairs": PAIRS, "six": six, "reviews": reviews}.items():
        conftest.write_rows(folder / f"{name}.jsonl", rows)
    (folder / "rewards.py").write_text(REWARDS)
    save(folder / "policy", make_lm(), make_tokenizer())
    for seed in (1, 2):
        save(folder / f"judge{seed}", make_reward_model(seed=seed), make_tokenizer())
    return folder


def settings(output_dir):
    """Runs of 3 iterations of 10 responses."""
    usual = TINY | {
        "dataset": "pairs.jsonl", "policy_model": "policy", "sft_epochs": 0, "total_episodes": 30,
        "batch_size": 10, "minibatch_size": 5, "eval_prompts": 5, "learning_rate": 1e-4,
        "sft_learning_rate": None, "temperature": 0.9, "output_dir": output_dir}
    return [Args(**usual | {"run_name": name} | changes) for name, changes in RUNS.items()]


@pytest.fixture(scope="module")
def one_process(places):
    """The folder of all runs but the one that fails, made in this process."""
    with pytest.MonkeyPatch.context() as context:
        context.chdir(places)
        for args in settings("one")[:-1]:
            main(args)
    return places / "one"


@pytest.fixture(scope="module")
def processes(places):
    """The folder of the same runs, made by 2 or 3 processes, and what these had to say."""
    said = {}
    for num in (2, 3):
        many = [asdict(x) for x in settings("many") if NUM_PROCESSES[x.run_name] == num]
        (places / "settings.json").write_text(json.dumps(many))
        said[num] = subprocess.run(  # --standalone: at a port that nobody uses
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num}",
             "--standalone", Path(__file__).with_name("run_many.py"), "settings.json"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=places,
            text=True, capture_output=True, timeout=300)
    return places / "many", said


@pytest.mark.parametrize("name", COMPLETED)
def test_all_stages_end_with_weights_metrics_and_answers_of_one_process(
        one_process, processes, name):
    one, other = one_process / name, processes[0] / name
    assert (other / "before_after.jsonl").exists(), processes[1][NUM_PROCESSES[name]].stderr
    for path in one.glob("*/model.safetensors"):
        mine, its = load_file(path), load_file(other / path.parent.name / path.name)
        assert mine.keys() == its.keys()
        assert max((mine[x] - its[x]).abs().max().item() for x in mine) < 1e-5, path
    expected, metrics = conftest.read_metrics(one), conftest.read_metrics(other)
    assert [row["iteration"] for row in metrics] == [1, 2, 3]  # each once
    for row, its in zip(metrics, expected, strict=True):
        assert row == pytest.approx(its, rel=1e-5, abs=1e-5)
    responses, others = ([row["ppo"]["response"] for row in read_rows(x / "before_after.jsonl")]
                         for x in (one, other))
    assert responses == others


def test_each_process_scores_its_share_of_the_rows(processes, places):
    shares = [read_rows(path) for path in sorted(places.glob("calls?.jsonl"))]
    assert len(shares) == NUM_PROCESSES["shared"]
    # The last calls are those of the three iterations and of the evaluation after them. The first
    # pass over the 27 prompts ends in iteration 3.
    for rows in zip(*(share[-4:-2] for share in shares), strict=True):
        assert len({x for share in rows for x in share}) == 10
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_process_that_fails_ends_the_others_and_says_why(processes):
    folder, said = processes
    assert said[2].returncode != 0 and "the judge has left" in said[2].stderr
    assert said[3].returncode == 0 and not (folder / "fails" / "before_after.jsonl").exists()
