"""Claim: a run that is stopped anywhere and resumed ends as if nothing had happened.

Reference: undisturbed runs, bit by bit. Processes are killed; other ends are imitated by Ctrl-C in
a reward function, and by taking away what a killed run would not have written yet.
Run: python -m pytest tests/test_resume.py (30 seconds)
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, TINY, make_lm, make_tokenizer, read_curves, read_metrics, save
from safetensors.torch import load_file

import ppo_rlhf
from ppo_rlhf import Args, main, parse_args

REWARDS = '''
import signal
from pathlib import Path

def letters(prompts, responses):
    """The length of a response. When a run has so many iterations as a file says, somebody presses
    Ctrl-C, or a folder stands where its checkpoint is to be written."""
    run, iterations, what = Path("plan").read_text().split()
    log = Path("runs", run, "metrics.jsonl")
    if log.exists() and len(log.read_text().splitlines()) == int(iterations):
        signal.raise_signal(signal.SIGINT) if what == "stop" else Path("runs", run, what).mkdir()
    return [len(x) / 10 for x in responses]
def too_large(prompts, responses): return [3e38 * (i % 2) for i in range(len(responses))]
'''
DATED = ("{{ 'it is 1 May . ' }}{% for turn in messages %}{{ turn['content'] + ' ' }}"
         "{% if turn['role'] == 'assistant' %}[EOS]{% endif %}{% endfor %}")

# Stage 1, then 5 iterations with a checkpoint after the second and the fourth and fifth.
USUAL = Args(
    **TINY | {"total_episodes": 40, "save_interval": 2}, dataset="chats.jsonl", output_dir="runs",
    policy_model="policy", reward_fn="rewards.py:letters", ref_update_interval=2, kl_target=0.5,
    critic="separate")
STAGES = replace(USUAL, reward_fn=None, reward_learning_rate=1e-3, num_reward_models=2,
                 sft_epochs=9, reward_epochs=9, total_episodes=80)  # long enough to be killed


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with data, a policy and reward functions, in which the tests run."""
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path_factory.mktemp("resume"))
        Path("rewards.py").write_text(REWARDS)
        chats = (x | {"prompt": [{"role": "user", "content": x["prompt"]}]} for x in PAIRS)
        Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = DATED
        save("policy", make_lm("GPT2"), tokenizer)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in background
        yield
        signal.signal(signal.SIGINT, handler)


def start(args, iterations=99, what="stop"):
    """main, with a reward function that does something after so many iterations."""
    Path("plan").write_text(f"{args.run_name} {iterations} {what}")
    main(args)


def left(run_dir):
    """What a run leaves, without times and places."""
    found = {str(x.relative_to(run_dir)): x.read_bytes() for x in run_dir.glob("*/*.safetensors")}
    for path in run_dir.glob("curves/*"):  # later points replace earlier ones of the same step
        found |= {(path.name, name): dict(points) for name, points in read_curves(path).items()
                  if "perf" not in name}
    found["metrics"] = read_metrics(run_dir)
    found["answers"] = (run_dir / "before_after.jsonl").read_text()
    assert not [x for x in run_dir.rglob("*") if x.suffix in (".new", ".old")]
    return found


@pytest.fixture(scope="module")
def undisturbed():
    """What an undisturbed run leaves."""
    start(replace(USUAL, run_name="undisturbed"))
    return left(Path("runs/undisturbed"))


def kill(words, begun):
    """A process that is killed as soon as something has begun. It prints only what is ours."""
    with open("printed", "w") as printed:
        process = subprocess.Popen([sys.executable, ppo_rlhf.__file__, *words], stdout=printed,
                                   stderr=printed, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not begun():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not re.search("it/s|Warn|[Ss]hards|Load|Generat|Token", Path("printed").read_text())


def test_a_run_that_is_killed_in_each_of_its_stages_ends_the_same():
    main(replace(STAGES, run_name="alive"))
    run_dir, resume = Path("runs/killed"), ["--resume", "runs/killed"]
    words = [f"--{name.replace('_', '-')}={x}" for name, x in asdict(STAGES).items()
             if x not in (None, False, ())]
    kill([*words, "--run-name=killed"], (run_dir / "curves/sft").exists)
    assert not (run_dir / "sft").exists()
    kill(resume, (run_dir / "curves/reward_model_2").exists)
    assert not (run_dir / "reward_model_2").exists() and (run_dir / "reward_model").exists()
    kill(resume, lambda: (run_dir / "metrics.jsonl").read_text().count("\n") >= 5)
    assert not (run_dir / "before_after.jsonl").exists()
    main(parse_args(resume))
    one, other = left(run_dir), left(Path("runs/alive"))
    assert one.keys() == other.keys() and not [x for x in one if one[x] != other[x]]


@pytest.mark.parametrize(("iterations", "what", "code"), [
    *((x, "stop", 130) for x in (0, 1, 3, 5)), (3, ".", 2)])  # "." exists: the function fails
def test_after_ctrl_c_or_a_failing_judge_the_command_that_is_printed_leads_to_the_same_end(
        undisturbed, capsys, iterations, what, code):
    run_dir = Path(f"runs/stopped{iterations}{code}")
    with pytest.raises(SystemExit) as end:
        start(replace(USUAL, run_name=run_dir.name), iterations, what)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert end.value.code == code and len(lines) == iterations
    command = re.search("--resume .*", capsys.readouterr().out)[0]
    start(parse_args(command.split()))
    assert left(run_dir) == undisturbed


def while_saving(run_dir):
    (run_dir / "policy").rename(run_dir / "policy.old")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "epis')


def between_sft_and_ppo(run_dir):
    for path in ("policy", "curves/ppo"):
        shutil.rmtree(run_dir / path)
    (run_dir / "checkpoint.pt").unlink()


def in_sft(run_dir):
    between_sft_and_ppo(run_dir)
    (run_dir / "sft").rename(run_dir / "sft.new")
    (run_dir / "sft.new/model.safetensors").write_text("half a mod")


@pytest.mark.parametrize("died", [while_saving, between_sft_and_ppo, in_sft])
def test_what_a_run_that_died_had_half_written_is_written_again(undisturbed, died):
    run_dir = Path("runs", died.__name__)
    with pytest.raises(SystemExit):
        start(replace(USUAL, run_name=run_dir.name), 3)
    sft = (run_dir / "sft").stat().st_ino
    died(run_dir)
    start(Args(resume=str(run_dir)))
    assert left(run_dir) == undisturbed
    assert died is in_sft or sft == (run_dir / "sft").stat().st_ino  # stage 1 is not repeated


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(undisturbed):
    with pytest.raises((OSError, RuntimeError)):
        start(replace(USUAL, run_name="blocked"), 3, "checkpoint.new")
    saved = torch.load("runs/blocked/checkpoint.pt", weights_only=True)  # executes nothing
    assert saved["iteration"] == 2 and saved["policy"].keys() > saved["reference"].keys()
    Path("runs/blocked/checkpoint.new").rmdir()
    start(Args(resume="runs/blocked"))
    assert left(Path("runs/blocked")) == undisturbed


def test_a_finished_run_says_so_and_ends_well(undisturbed, capsys):
    with pytest.raises(SystemExit) as end:
        main(parse_args(["--resume", "runs/undisturbed"]))
    assert not end.value.code and "runs/undisturbed is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("file", "old", "new"), [
    ("chats.jsonl", "plot", "cast"), ("rewards.py", "/ 10", "/ 20"),
    ("policy/chat_template.jinja", "1 May", "2 May")])
def test_a_run_is_not_resumed_on_other_data_or_scores_or_on_another_day(capsys, file, old, new):
    run_dir, text = f"runs/changed_{file[:5]}", Path(file).read_text()
    with pytest.raises(SystemExit):
        start(replace(USUAL, run_name=run_dir[5:]), 1)
    Path(file).write_text(text.replace(old, new))
    with pytest.raises(SystemExit) as end:
        start(Args(resume=run_dir))
    assert end.value.code == 2 and f"--resume {run_dir} needs the data" in capsys.readouterr().err
    Path(file).write_text(text)
    start(Args(resume=run_dir))  # as it was, it is resumed


@pytest.mark.parametrize(("stage", "changes"), [
    ("sft", {"sft_learning_rate": 1e30}),
    ("ppo", {"reward_fn": "rewards.py:too_large", "sft_epochs": 0, "sft_learning_rate": None})])
def test_what_is_not_finite_stops_with_stage_and_quantity_and_saves_nothing(stage, changes):
    run_dir = Path(f"runs/not_finite_{stage}")
    with pytest.raises(SystemExit, match=rf"^ppo_rlhf.py: {stage} .*\b\w*loss is (nan|inf)"):
        main(replace(USUAL, run_name=run_dir.name, **changes))
    assert not (run_dir / "sft").exists()
    if stage == "ppo":  # policy/ is as it was when the stage began
        after, before = (load_file(f"{x}/policy/model.safetensors") for x in (run_dir, "."))
        assert all(torch.equal(after[name], x) for name, x in before.items())
