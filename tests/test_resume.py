"""Claim: a run that is interrupted anywhere and resumed ends as if nothing had happened.

Reference: an undisturbed run. Kills are imitated by errors that a reward function raises, and by
taking away what a killed run would not have written yet; benchmarks/resume.py kills processes.
Run: python -m pytest tests/test_resume.py (30 seconds)
"""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_metrics

from ppo_rlhf import Args, RunLog, main, resolve_args

REWARDS = '''
import os
import signal
from pathlib import Path

HERE = Path(__file__).parent


def letters(prompts, responses):
    """The length of a response. Counts its calls in a file, and does at one of them what another
    file says."""
    calls = len((HERE / "calls").read_text()) + 1
    (HERE / "calls").write_text("x" * calls)
    number, what = (HERE / "plan").read_text().split(" ", 1)
    if calls == int(number):
        exec(what)
    return [len(x) / 10 for x in responses]
'''
# A reward function is called twice before PPO (tried, measured), then for the evaluation before,
# in each iteration, and for the evaluation after.
TRIED, MEASURED, BEFORE, FIRST = 1, 2, 3, 4
DIE = "raise RuntimeError('the power has failed')"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A reward function, and the runs."""
    home = tmp_path_factory.mktemp("resume")
    (home / "rewards.py").write_text(REWARDS)
    return home


@pytest.fixture
def usual(home, policy_folder, pairs_file):
    """Stage 1, then 5 iterations with a checkpoint after the second and the fourth and fifth."""
    return Args(
        dataset=pairs_file, policy_model=policy_folder, output_dir=str(home),
        reward_fn=f"{home}/rewards.py:letters", total_episodes=40, batch_size=8,
        minibatch_size=4, update_epochs=2, response_len=6, max_prompt_len=4, eval_prompts=4,
        learning_rate=1e-2, sft_learning_rate=1e-3, save_interval=2, ref_update_interval=3,
        kl_target=0.5, critic="separate", device="cpu")


def start(home, args, call=0, what="pass"):
    """main, with a reward function that does something at one of its calls."""
    (home / "calls").write_text("")
    (home / "plan").write_text(f"{call} {what}")
    main(args)


def left(args):
    """What a run leaves, without times and places."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = Path(args.output_dir, args.run_name)
    events = EventAccumulator(str(run_dir)).Reload()
    return {
        "weights": (run_dir / "policy" / "model.safetensors").read_bytes(),
        "metrics": read_metrics(args),
        "samples": (run_dir / "samples.jsonl").read_text(),
        "answers": (run_dir / "before_after.jsonl").read_text(),
        "curves": {key: [(x.step, x.value) for x in events.Scalars(key)]
                   for key in events.Tags()["scalars"] if "perf" not in key},
        "texts": [(x.step, x.tensor_proto.string_val[0])
                  for x in events.Tensors("samples/text_summary")],
    }


@pytest.fixture
def undisturbed(usual, home):
    """What an undisturbed run leaves."""
    args = replace(usual, run_name="undisturbed")
    if not (home / "undisturbed").exists():
        start(home, args)
    return left(args)


@pytest.mark.parametrize("call", [MEASURED, BEFORE, *range(FIRST, FIRST + 6)])
def test_a_run_that_dies_anywhere_in_ppo_ends_the_same_after_resume(
    usual, home, undisturbed, call
):
    args = replace(usual, run_name=f"dies at call {call}")
    with pytest.raises(RuntimeError, match="the power has failed"):
        start(home, args, call, DIE)
    metrics = home / args.run_name / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    assert len(lines) == max(0, min(5, call - FIRST))
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed
    kept = len(lines) // 2 * 2 if len(lines) < 5 else 5  # those before the last checkpoint
    assert metrics.read_text().splitlines()[:kept] == lines[:kept]


def killed(usual, home, name, *missing):
    """A copy of the undisturbed run as a kill leaves it: without what is written later."""
    args = replace(usual, run_name=name)
    shutil.copytree(home / "undisturbed", home / name)
    for pattern in ("before_after.jsonl", "checkpoint.pt", *missing):
        for path in (home / name).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    settings = json.loads((home / name / "args.json").read_text())
    (home / name / "args.json").write_text(json.dumps(settings | {"run_name": name}))
    return args


PPO_FILES = ["policy", "metrics.jsonl", "samples.jsonl", "events*.ppo"]


def test_a_run_that_dies_in_sft_starts_it_again_and_draws_its_curves_once(
    usual, home, undisturbed
):
    args = killed(usual, home, "in sft", "sft", *PPO_FILES)
    (home / "in sft" / "sft.new").mkdir()  # half written
    (home / "in sft" / "sft.new" / "model.safetensors").write_text("half a mod")
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed
    assert not list((home / "in sft").glob("*.new"))


def test_a_run_that_dies_between_sft_and_ppo_does_not_repeat_sft(usual, home, undisturbed):
    args = killed(usual, home, "after sft", *PPO_FILES)
    curves, = (home / "after sft").glob("events*.sft")
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed and curves.exists()


def test_a_run_that_dies_while_policy_is_replaced_has_it_again_after_resume(
    usual, home, undisturbed
):
    args = replace(usual, run_name="moved away")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    (home / args.run_name / "policy").rename(home / args.run_name / "policy.old")
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed
    assert not list((home / args.run_name).glob("*.old"))


def test_a_line_that_was_half_written_is_gone_after_resume(usual, home, undisturbed):
    args = replace(usual, run_name="half a line")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (home / args.run_name / name).open("a") as file:
            file.write('{"iteration": 4, "epis')
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed


def test_a_model_that_was_not_written_whole_is_no_finished_stage(
    usual, home, undisturbed, monkeypatch
):
    def full(*_args, **_kwargs):
        raise OSError("no space left")

    args = replace(usual, run_name="full disk in sft")
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        start(home, args)
    monkeypatch.undo()
    assert not (home / args.run_name / "sft").exists()
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed


def test_a_second_stage_is_not_repeated_and_another_one_is(tiny_args, tmp_path):
    main(replace(tiny_args, num_reward_models=2))
    run_dir = tmp_path / "run"
    before = {name: (run_dir / name / "model.safetensors").read_bytes()
              for name in ("reward_model", "reward_model_2", "policy")}
    first = (run_dir / "reward_model").stat().st_ino
    for path in [run_dir / "checkpoint.pt", *run_dir.glob("events*.reward_model_2")]:
        path.unlink()
    shutil.rmtree(run_dir / "reward_model_2")
    main(replace(tiny_args, num_reward_models=2, resume=True))
    assert (run_dir / "reward_model").stat().st_ino == first
    for name, weights in before.items():
        assert (run_dir / name / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(usual, home, undisturbed):
    args = replace(usual, run_name="full disk")
    blocked = home / args.run_name / "checkpoint.tmp"
    with pytest.raises(IsADirectoryError):
        start(home, args, FIRST + 2, f"Path({str(blocked)!r}).mkdir()")
    saved = torch.load(home / args.run_name / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == 2
    blocked.rmdir()
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed


def test_ctrl_c_finishes_the_iteration_saves_and_says_how_to_go_on(
    usual, home, undisturbed, capsys, monkeypatch
):
    args = replace(usual, run_name="ctrl-c")
    monkeypatch.setattr("sys.argv", ["ppo_rlhf.py", "--kl-coef", "0.1"])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in a background job
    with pytest.raises(SystemExit) as end:
        start(home, args, FIRST + 2, "os.kill(os.getpid(), signal.SIGINT)")
    signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130 and [row["iteration"] for row in read_metrics(args)] == [1, 2, 3]
    saved = torch.load(home / "ctrl-c" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == 3  # not only the one of the second iteration
    command = "python ppo_rlhf.py --kl-coef 0.1 --run-name ctrl-c --resume"
    assert command in capsys.readouterr().out
    start(home, replace(args, resume=True))
    expected = undisturbed["weights"], undisturbed["metrics"], undisturbed["answers"]
    found = left(args)
    assert (found["weights"], found["metrics"], found["answers"]) == expected


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_after_a_run_ctrl_c_works_as_before(usual, home, before):
    usual_handler = signal.signal(signal.SIGINT, before)
    start(home, replace(usual, run_name=f"handler {before}", total_episodes=8))
    assert signal.signal(signal.SIGINT, usual_handler) == before


def test_a_finished_run_says_so_and_ends_well(usual, home, undisturbed, capsys):
    with pytest.raises(SystemExit) as end:
        main(replace(usual, run_name="undisturbed", resume=True))
    assert end.value.code == 0 and "undisturbed is finished" in capsys.readouterr().out


def test_a_broken_checkpoint_is_refused_by_name(usual, home, undisturbed, capsys):
    args = replace(usual, run_name="broken")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    (home / "broken" / "checkpoint.pt").write_bytes(b"PK no")
    with pytest.raises(SystemExit) as end:
        start(home, replace(args, resume=True))
    assert end.value.code == 2 and "checkpoint.pt cannot be used" in capsys.readouterr().err


def test_logs_that_were_lost_are_written_again(usual, home, undisturbed):
    args = replace(usual, run_name="lost")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (home / "lost" / name).unlink()
    start(home, replace(args, resume=True))
    assert left(args) == undisturbed


@pytest.mark.parametrize(("changes", "named"), [
    ({"kl_coef": 0.3, "anneal_lr": False}, "--anneal-lr, --kl-coef 0.05"),
    ({"run_name": "never started"}, "--run-name never started does not exist"),
    ({"run_name": None}, "--resume needs the --run-name"),
])
def test_what_cannot_be_resumed_is_refused(usual, home, undisturbed, capsys, changes, named):
    if not (home / "open").exists():
        killed(usual, home, "open", *PPO_FILES)
    with pytest.raises(SystemExit) as end:
        start(home, replace(usual, **({"run_name": "open", "resume": True} | changes)))
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_intervals_of_saving_and_evaluating_may_change(usual, home, undisturbed):
    args = replace(usual, run_name="intervals")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    start(home, replace(args, resume=True, save_interval=1, eval_interval=5))
    found = left(args)
    assert found["weights"] == undisturbed["weights"] and "eval/kl" in found["metrics"][-1]


def test_a_checkpoint_can_be_read_without_executing_anything(usual, home, undisturbed):
    args = replace(usual, run_name="read")
    with pytest.raises(RuntimeError):
        start(home, args, FIRST + 3, DIE)
    saved = torch.load(home / "read" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == 2
    assert saved["policy"].keys() > {f"lm.{name}" for name in saved["reference"]}


def log_of(tmp_path, points):
    """The console of a log that is given points (KL, score), one per iteration."""
    args = resolve_args(Args(output_dir=str(tmp_path), run_name="log", eval_prompts=0))
    log = RunLog(args)
    log.start("ppo")
    for number, (kl, score) in enumerate(points, start=1):
        groups = {"rollout": {"kl": kl, "score_mean": score}, "ppo": {"ratio_first": 1.0}}
        log.iteration(number, groups, [0.0, 1.0, 2.0, 3.0], [])
    log.close()


def test_kl_and_score_that_rise_together_are_warned_of_once(tmp_path, capsys):
    log_of(tmp_path, [(i, i / 10) for i in range(1, 31)])
    lines = capsys.readouterr().out.splitlines()
    warned, = [i for i, line in enumerate(lines) if line.startswith("warning: KL")]
    assert "--kl-coef" in lines[warned]
    number = int(re.match(r"ppo +(\d+)/", lines[warned - 1])[1])
    assert number == 11  # the first with a KL above 10 and ten iterations before it


@pytest.mark.parametrize("points", [
    [(i / 10, i / 10) for i in range(1, 31)],  # the KL stays small
    [(i, -i / 10) for i in range(1, 31)],  # the score falls
    [(20 - i / 10, i / 10) for i in range(1, 31)],  # the KL falls
])
def test_otherwise_nothing_is_warned_of(tmp_path, capsys, points):
    log_of(tmp_path, points)
    assert "warning" not in capsys.readouterr().out


def test_the_home_of_a_run_lies_in_the_output_dir(tiny_args, capsys):
    for name in ("../elsewhere", "/tmp/elsewhere", "."):
        with pytest.raises(SystemExit):
            main(replace(tiny_args, run_name=name))
        assert f"--run-name {name} is not a folder in" in capsys.readouterr().err


def test_output_dirs_may_be_nested(tiny_args, tmp_path):
    main(replace(tiny_args, run_name="a/b"))
    assert (tmp_path / "a" / "b" / "policy").exists()
    assert os.listdir(tmp_path) == ["a"]
