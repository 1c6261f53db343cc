"""Claim: on a GPU nothing stays behind on the CPU, and the CPU seldom waits for the GPU.

Reference: the same runs on the CPU, bit by bit. The GPU is a pretended one (pretend_gpu.py), which
refuses what a GPU refuses and counts its reads; it is in a process of its own, because it has to
be imported before the first backward pass.
Run: python -m pytest tests/test_device.py (20 seconds)
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, make_lm, make_tokenizer, read_metrics, read_rows, save

ROOT = Path(__file__).parent.parent
RUNS = {  # the second takes the paths that the first does not take
    "usual": {},
    "other": {"critic": "separate", "ptx_coef": 0.5, "ent_coef": 0.1, "kl_in": "loss",
              "kl_estimator": "k3", "num_reward_models": 2, "ref_update_interval": 1,
              "whiten_rewards": True, "minibatch_size": 8, "microbatch_size": 4,
              "total_episodes": 16},
}


def measure(folder):
    """Runs on the CPU and on the pretended GPU. Writes how often which line reads from the GPU: in
    each run, in one with an epoch more, and in sampling 8 and 24 tokens."""
    from pretend_gpu import DEVICE, pretend_gpu

    from ppo_rlhf import Args, collect_rollout, load_policy, main, resolve_args

    settings, counts = json.loads((folder / "settings.json").read_text()), {}
    runs = settings.pop("runs")

    def count(name, function, *arguments):
        """What function returns; the reads are written down."""
        with pretend_gpu() as report:
            found = function(*arguments)
        counts[name] = {f"{place} {what}": n for (what, place), n in report.reads.items()}
        return found

    for name, changes in runs.items():
        args = Args(**settings | changes)
        main(replace(args, device="cpu", run_name=f"{name}_cpu"))
        count(name, main, replace(args, device=DEVICE, run_name=f"{name}_gpu"))
    args = resolve_args(replace(Args(**settings), device=DEVICE, run_name="longer"))
    count("an epoch more", main, replace(args, update_epochs=args.update_epochs + 1))
    for args in (replace(args, response_len=num_tokens) for num_tokens in (8, 24)):
        policy = load_policy(args.policy_model, args)
        rollout = count(f"sampling {args.response_len}", collect_rollout, policy, None,
                        [{"prompt": "a"}] * 64, 1, args)
        assert rollout.response_mask.any(dim=0).all()  # some rows have not ended
    (folder / "counts.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, policy_folder, pairs_file):
    """The folder of all runs, and the counts."""
    folder = tmp_path_factory.mktemp("device")
    settings = TINY | {
        "dataset": pairs_file, "dataset_split": "train[:12]", "policy_model": policy_folder,
        "total_episodes": 8, "eval_prompts": 2, "reward_learning_rate": 1e-3,
        "output_dir": str(folder)}
    RUNS["other"]["policy_model"] = save(folder / "llama", make_lm("Llama"), make_tokenizer())
    settings["runs"] = RUNS
    (folder / "settings.json").write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, __file__, str(folder)], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]  # DeviceMistake: what a GPU would refuse
    return folder, json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_ends_with_the_metrics_and_weights_of_the_cpu_bit_by_bit(measured, name):
    folder, _ = measured
    one, other = folder / f"{name}_cpu", folder / f"{name}_gpu"
    for stage in ("sft", "reward_model", "policy"):
        weights, others = ((x / stage / "model.safetensors").read_bytes() for x in (one, other))
        assert weights == others, stage
    assert read_metrics(one) == read_metrics(other) and read_metrics(one)
    # Texts are equal. Scores of two texts may differ in the last bit: in memory, the pretended GPU
    # has the hidden states of GPT-2 in another order.
    for row, expected in zip(*(read_rows(x / "before_after.jsonl") for x in (other, one)),
                             strict=True):
        for side in ("sft", "ppo"):
            assert row[side] == {key: pytest.approx(x, abs=1e-6) if isinstance(x, float) else x
                                 for key, x in expected[side].items()}


@pytest.mark.parametrize(("more", "less", "limit"), [
    ("sampling 24", "sampling 8", 1.2 * 16),
    ("an epoch more", "usual", 6 * 2)])  # two optimizer steps more, with a shared critic
def test_the_cpu_waits_at_most_6_times_per_step_and_1_point_2_times_per_sampled_token(
        measured, more, less, limit):
    reads = Counter(measured[1][more]) - Counter(measured[1][less])
    assert 0 < sum(reads.values()) <= limit, reads


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
