"""Claim: the README is true: its commands, names, line counts and figures.

Reference: the repository itself and the committed raw results.
Run: python -m pytest tests/test_readme.py (20 seconds)
"""

import json
import re
import statistics
from pathlib import Path

import pytest

import ppo_classic
import ppo_rlhf

ROOT = Path(ppo_rlhf.__file__).parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("module", [ppo_rlhf, ppo_classic])
def test_the_line_counts_are_right(module):
    path = Path(module.__file__)
    said = re.search(rf"`{path.name}` \| ([\d,]+) \|", README)[1].replace(",", "")
    assert int(said) == len(path.read_text().splitlines())


def test_functions_and_tests_that_it_names_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"\| `(\w+)` \| `test_", README):
        assert hasattr(ppo_rlhf, name), name


def test_flags_that_it_names_exist():
    flags = set(re.findall(r"`--([\w-]+)", README))
    known = set(vars(ppo_rlhf.Args())) | set(vars(ppo_classic.Args())) | {"logdir"}
    assert {flag.replace("-", "_").removeprefix("no_") for flag in flags} <= known


def test_files_that_it_shows_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)|`(benchmarks/[\w/.]+)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_its_reward_functions_do_what_they_say():
    code = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, code)
    assert code["correct"](["17 + 5 =", "1 + 1 ="], ["It is 22", "3"]) == [1.0, 0.0]
    assert code["filtered"](["p", "p"], ["a b", "awful b"], [["a", "b"], ["awful", "b"]]) == [
        [0.0, 1.0], [-1.0, 0.0]]


def test_the_table_of_results_is_what_the_raw_results_say():
    results = json.loads((ROOT / "benchmarks/results/reward_hacking.json").read_text())
    assert len(results["runs"]) == 9 and {"cpu", "torch"} <= set(results["hardware"])
    for run in results["runs"]:
        tenth = len(run["episodes"]) // 10
        gold = run["curves"]["rollout/gold_mean"]
        after = sum(gold[-tenth:]) / tenth
        line = f"| {run['kl_coef']:g} | {run['seed']} | {gold[0]:.2f} → {after:.2f} |"
        assert line.replace("-", "−") in README, line


def test_the_tables_of_control_tasks_are_what_the_raw_results_say():
    results = json.loads((ROOT / "benchmarks/results/classic.json").read_text())
    assert {"cpu", "torch", "gymnasium"} <= set(results["hardware"])
    figures = {}
    for run in results["runs"]:
        figures.setdefault((run["group"], run["env_id"]), []).append(run["last_100"])
    for (group, env_id), returns in figures.items():
        if group == "published":
            assert len(returns) >= 3
            line = f"{statistics.mean(returns):.1f} ± {statistics.stdev(returns):.1f} |"
            assert f"| {env_id} |" in README and line.replace("-", "−") in README, env_id


def test_the_table_of_speeds_is_what_the_raw_results_say():
    rounds = json.loads((ROOT / "benchmarks/results/speed.json").read_text())["rounds"]
    for env_id in ("CartPole-v1", "HalfCheetah-v5"):
        chosen = [x for x in rounds if x["env_id"] == env_id]
        ratio = statistics.median(x["ours"] / x["stable_baselines3"] for x in chosen)
        line = next(x for x in README.splitlines() if x.startswith(f"| {env_id}, "))
        assert f"{ratio:.1f} times" in line


def test_the_table_of_optima_is_what_the_raw_results_say():
    results = json.loads((ROOT / "benchmarks/results/optimum.json").read_text())
    assert {"cpu", "torch", "trl"} <= set(results["hardware"])
    for instance in range(1, 6):
        def shares(group, who, instance=instance):
            return [x["share"] for x in results["runs"]
                    if (x["group"], x["who"], x["instance"]) == (group, who, instance)]

        cells = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in
                 (shares("peers", "trl"), shares("peers", "ours"))]
        cells += [f"{x:.3f}" for x in shares("tuned", "ours") + shares("long", "ours")]
        assert f"| {instance} | {' | '.join(cells)} |" in README, (instance, cells)


def test_the_optima_of_the_second_edition_are_what_the_raw_results_say():
    runs = json.loads((ROOT / "benchmarks/results/optimum.json").read_text())["runs"]
    means = [statistics.mean(x["share"] for x in runs if x["group"] == "second edition"
                             and x["instance"] == instance) for instance in (1, 3, 5)]
    assert "reaches {:.3f}, {:.3f} and {:.3f} on average".format(*means) in README


def test_every_planted_bug_is_caught_and_the_counts_are_right():
    bugs = json.loads((ROOT / "benchmarks/results/planted_bugs.json").read_text())["bugs"]
    catchers = {x["caught_by"] for x in bugs}
    assert None not in catchers and len(bugs) >= 40 and len(catchers) >= 25
    assert f"{len(bugs)} one-line bugs" in README and f"{len(catchers)} different tests" in README


def test_the_table_of_throughput_is_what_the_raw_results_say():
    table = (ROOT / "benchmarks/results/throughput.md").read_text().split("\n\n")[0]
    assert table.startswith("| vocabulary | our critic |") and table in README
    runs = json.loads((ROOT / "benchmarks/results/throughput.json").read_text())["runs"]
    trl = [x["episodes_per_s"] for x in runs if (x["who"], x["vocab"]) == ("trl", 512)]
    assert f"| {statistics.median(trl):.2f} |" in table


def test_the_count_of_cross_checks_is_right():
    rows = json.loads((ROOT / "benchmarks/results/cross_checks.json").read_text())["rows"]
    agree = [x["difference"] < 1e-6 for x in rows]
    assert f"{sum(agree)} of {len(rows)} quantities" in README
    assert all(x["reason"] for x in rows if not x["agree"])


def test_control_tasks_reach_what_cleanrl_published_within_its_spread():
    """CleanRL's mean minus its standard deviation, on the mean over three seeds."""
    results = json.loads((ROOT / "benchmarks/results/classic.json").read_text())
    floors = {"CartPole-v1": 483.9, "Acrobot-v1": -87.7, "HalfCheetah-v4": 1396.6,
              "Hopper-v4": 2111.1, "Walker2d-v4": 1716.2, "InvertedPendulum-v4": 940.9}
    for env_id, floor in floors.items():
        runs = [x for x in results["runs"] if (x["group"], x["env_id"]) == ("published", env_id)]
        assert statistics.mean(x["last_100"] for x in runs) >= floor, env_id


def test_the_default_run_meets_its_goals_on_every_seed():
    results = json.loads((ROOT / "benchmarks/results/reward_hacking.json").read_text())
    last = {(run["kl_coef"], run["seed"]): {
        key: sum(curve[-10:]) / 10 for key, curve in run["curves"].items()
    } for run in results["runs"]}
    for run in results["runs"]:
        first = {key: curve[0] for key, curve in run["curves"].items()}
        end, seed = last[run["kl_coef"], run["seed"]], run["seed"]
        assert first["rollout/gold_mean"] <= 0 and abs(run["worst_ratio_first"] - 1) < 1e-5
        if run["kl_coef"] == 0.05:
            assert end["rollout/gold_mean"] >= 1.3 and end["rollout/kl"] <= 8
            assert end["rollout/grammatical"] >= 0.9
        if run["kl_coef"] == 0:
            assert end["rollout/gold_mean"] < first["rollout/gold_mean"]
            assert end["rollout/score_mean"] > last[0.05, seed]["rollout/score_mean"]
    golds = [end["rollout/gold_mean"] for (kl_coef, _), end in last.items() if kl_coef == 0.05]
    assert statistics.mean(golds) >= 1.6
