"""Claim: the README is true: its commands, names, line counts and figures.

Reference: the repository itself and the committed raw results.
Run: python -m pytest tests/test_readme.py (20 seconds)
"""

import ast
import itertools
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import tyro

import ppo_classic
import ppo_rlhf

ROOT = Path(ppo_rlhf.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
README = (ROOT / "README.md").read_text()
LONG = (ROOT / "benchmarks" / "README.md").read_text()  # the long tables
BOTH = README + LONG


def result(name):
    """The raw results of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_it_has_at_most_3000_words_and_lines_of_120_columns():
    assert len([x for x in README.split() if re.search(r"\w", x)]) <= 3000
    for text in (README, LONG):
        assert not [x for x in text.splitlines() if len(x) > 120 and not x.startswith("|")]


def test_no_sentence_has_more_than_two_numbers():
    text = re.sub(r"```.*?```|^\|.*?$|`[^`]*`", "", README, flags=re.S | re.M)
    for sentence in re.split(r"\n\n|(?<=[.:;?)])\s+", text):
        assert len(re.findall(r"(?<![\w.-])[+−]?\d[\d,.]*(?![\w-])", sentence)) <= 2, sentence


def test_the_last_lines_that_it_shows_are_those_of_a_default_run():
    run, = (x for x in result("reward_hacking")["runs"]
            if (x["kl_coef"], x["seed"]) == (0.05, 1))
    shown = re.search(r"```\n(128 held-out prompts.*?)```", README, re.S)[1]
    for line in shown.splitlines():
        assert line in run["table"].splitlines(), line


def test_the_lines_of_part_1_and_of_the_functions_that_it_counts():
    path = Path(ppo_rlhf.__file__)
    lines = path.read_text().splitlines()
    part_1 = next(i for i, line in enumerate(lines) if line.startswith("# Part II: plumbing")) - 1
    assert f"Part I of `ppo_rlhf.py` is RLHF: {part_1} lines" in README

    def size(name):
        """Lines of code of a function, without docstring, comments and checks of shapes."""
        node = next(x for x in ast.walk(ast.parse("\n".join(lines)))
                    if isinstance(x, ast.FunctionDef) and x.name == name)
        found = [lines[i] for x in node.body[1:] for i in range(x.lineno - 1, x.end_lineno)]
        return len([x for x in found if x.strip() and not x.strip().startswith("#")
                    and not x.strip().startswith("check_same_shape")])

    four = ["token_rewards", "gae", "policy_loss", "value_loss"]
    more = ["masked_mean", "masked_whiten", "kl_penalty", "states", "output_layer", "logits",
            "forward", "chunked_logprobs", "sample_tokens", "collect_rollout",
            "compute_advantages", "ppo_loss", "accumulate_gradients", "optimizer_step",
            "update_policy", "train_ppo"]
    said = re.search(r"have (\d+) lines of code.*?it\s+is (\d+)\.", README, re.S)
    assert [int(x) for x in said.groups()] == [sum(map(size, four)), sum(map(size, four + more))]


def test_the_lines_of_each_section_are_right():
    lines = Path(ppo_rlhf.__file__).read_text().splitlines()
    heads = ("The PPO math", "Settings ", "The policy: ", "One iteration: ", "The update: ",
             "Stages 1 and 2: ", "Part II: ")
    starts = [1, *(next(i for i, line in enumerate(lines, 1) if line.startswith(f"# {head}"))
                   for head in heads)]
    starts[-2:] = [x - 1 for x in starts[-2:]]  # a rule stands above these headings
    said = re.findall(r"^\| .* \| (\d+)-(\d+) \|", README, re.M)
    assert [(int(x), int(y)) for x, y in said] == [
        (x, y - 1) for x, y in itertools.pairwise(starts)]


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
    flags = set(re.findall(r"`--([\w-]+)", BOTH))
    known = set(vars(ppo_rlhf.Args())) | set(vars(ppo_classic.Args())) | {
        "logdir", "same", "blind", "alone", "bandit"}
    assert {flag.replace("-", "_").removeprefix("no_") for flag in flags} <= known


def test_files_that_it_shows_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)|`(benchmarks/[\w/.]+)`", README):
        assert (ROOT / "".join(path)).exists(), path
    for path in re.findall(r"\]\(([\w/.]+)\)|`(results/[\w/.]+)`|`(\w+\.py)`", LONG):
        path = "".join(path)
        assert (ROOT / "benchmarks" / path).exists() or (ROOT / path).exists(), path
    for name in re.findall(r"[(`](\w+\.py)`\)", README):
        assert list(ROOT.glob(f"*/{name}")) or (ROOT / name).exists(), name


def commands():
    """Every call of one of the two files that the README shows, as a list of words."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", BOTH, re.S)).replace("\\\n", " ")
    found = re.findall(r"(?:python|torchrun --nproc-per-node \d+) (ppo_\w+\.py[^\n&|]*)", blocks)
    return [shlex.split(x, comments=True) for x in [*found, *re.findall(
        r"`python (ppo_\w+\.py [^`]*)`", BOTH)]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_its_commands_have_arguments_that_the_files_know(words):
    module = {"ppo_rlhf.py": ppo_rlhf, "ppo_classic.py": ppo_classic}[words[0]]
    tyro.cli(module.Args, args=words[1:])


def test_its_reward_functions_do_what_they_say():
    code = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        if "def " in block:
            exec(re.sub(r"judge = .*|from transformers.*", "", block), code)
    code["judge"] = lambda pairs, truncation: [{"score": len(x["text_pair"])} for x in pairs]
    assert code["deberta"](["p", "q"], ["ab", "c"]) == [2, 1]
    code["ask"] = lambda questions: [str(len(x.splitlines())) for x in questions]
    assert code["judged"](["p", "q"], ["a", "b"]) == [4.0, 4.0]
    assert code["correct"](["17 + 5 =", "1 + 1 ="], ["It is 22", "3"]) == [1.0, 0.0]
    assert code["filtered"](["p", "p"], ["a b", "awful b"], [["a", "b"], ["awful", "b"]]) == [
        [0.0, 1.0], [-1.0, 0.0]]


def test_talking_to_the_policy_takes_three_lines(tmp_path, monkeypatch, capsys):
    args = ppo_rlhf.resolve_args(ppo_rlhf.Args(device="cpu"))
    (tmp_path / "runs" / "NAME").mkdir(parents=True)
    ppo_rlhf.torch.manual_seed(1)
    policy = ppo_rlhf.load_policy(None, args)
    ppo_rlhf.save_model(tmp_path / "runs/NAME/policy", policy.lm, policy.tokenizer)
    monkeypatch.chdir(tmp_path)
    block, = (x for x in re.findall(r"```python\n(.*?)```", README, re.S) if "generation" in x)
    exec(block, {})
    assert len(capsys.readouterr().out.split()) > 1


def test_what_it_says_of_reward_hacking_is_what_the_raw_results_say():
    results, text = result("reward_hacking"), " ".join(README.split()).replace("−", "-")
    hacked, kept = ([x["curves"]["rollout/gold"] for x in results["runs"] if x["kl_coef"] == y]
                    for y in (0, 0.05))
    peaks = [max(x) for x in hacked]
    assert f"gold peaks at {min(peaks):.2f} to {max(peaks):.2f}, within the first third" in text
    assert all(x.index(max(x)) < 50 / 3 for x in hacked)
    for who, curves in (("the runs", hacked), ("they", kept)):
        ends = [statistics.mean(x[-10:]) for x in curves]
        assert f"{who} end at {min(ends):.2f} to {max(ends):.2f}." in text
    assert len(results["runs"]) == 9 and {"cpu", "torch"} <= set(results["hardware"])
    table = (ROOT / "benchmarks/results/reward_hacking.md").read_text().split("\n\n")[0].strip()
    assert table.replace(" -0", " −0") in LONG


def test_what_it_says_of_kl_targets_is_what_the_raw_results_say():
    off = [(x["kl_coef"], statistics.mean(x["curves"]["rollout/kl"][-10:]) / x["kl_target"] - 1)
           for x in result("kl_target")["runs"]]
    near = [abs(y) < 0.15 for x, y in off if x >= 0.05]
    assert len(off) == 27 and 6 * sum(near) == 5 * len(near)
    assert "five of six runs end within 15 %" in " ".join(README.split())
    text, least = " ".join(LONG.split()), min(y for x, y in off if x < 0.05)
    assert f"{sum(near)} of {len(near)} runs end within 15 % of their target" in text
    assert f"all lie {100 * least:.0f} % or more above" in text
    assert least > 0.5 and "From 0.01 all end above it" in README


def test_the_tables_of_control_tasks_are_what_the_raw_results_say():
    results = result("classic")
    assert {"cpu", "torch", "gymnasium"} <= set(results["hardware"])
    figures, weights = {}, {}
    for run in results["runs"]:
        if run["group"] != "same":
            figures.setdefault((run["group"], run["env_id"]), []).append(run["last_100"])
        elif run["flags"] == " --total-timesteps 6144":
            weights.setdefault(run["env_id"], []).append(run["weights"])
    assert len(weights) == 6 and all(x == y for x, y in weights.values())
    for (group, env_id), returns in figures.items():
        if group == "published":
            assert len(returns) >= 3
            line = f"{statistics.mean(returns):.1f} ± {statistics.stdev(returns):.1f} |"
            assert f"| {env_id} |" in LONG and line.replace("-", "−") in LONG, env_id


def test_what_it_says_of_optima_is_what_the_raw_results_say():
    runs, text = result("optimum")["runs"], " ".join(README.split())
    assert {"cpu", "torch", "trl"} <= set(result("optimum")["hardware"])

    def shares(group, who="ours"):
        """Mean over the seeds, of each instance."""
        found = [[x["share"] for x in runs if (x["group"], x["who"], x["instance"])
                  == (group, who, i)] for i in range(1, 6)]
        return [statistics.mean(x) for x in found]

    ours, trl, long = shares("third edition"), shares("peers", "trl"), shares(
        "third edition, long")
    assert f"reaches {min(ours):.3f} to {max(ours):.3f} of the possible gain" in text
    assert "trl up to a hundredth more" in text
    assert all(-0.001 < y - x < 0.0105 for x, y in zip(ours, trl, strict=True))
    assert f"single runs reach {min(long):.3f} to {max(long):.3f}." in text
    one, four = (next(x["share"] for x in runs if x["flags"] == flags and x["who"] == "ours")
                 for flags in ("--update-epochs 1", ""))
    assert f"One epoch per batch reaches {one:.3f} on the first, four {four:.3f}." in text


def test_every_planted_bug_is_caught_and_the_counts_are_right():
    from planted_bugs import BUGS

    bugs = result("planted_bugs")["runs"]
    catchers = {x["caught_by"] for x in bugs}
    assert None not in catchers and {x["bug"] for x in bugs} == {x["bug"] for x in BUGS}
    for bug in BUGS:  # today's files have the line that the bug changes
        assert (ROOT / bug["file"]).read_text().count(bug["line"]) == 1, bug["bug"]
    for text in (README, LONG):
        assert re.search(rf"{len(bugs)} small bugs.*all\s+are\s+caught, by {len(catchers)}\s+"
                         "different tests", text, re.S)


def test_of_30_bugs_planted_blind_so_many_were_caught_at_first_look():
    caught = [x["caught_by"] is not None for x in result("blind_bugs")["runs"]]
    assert len(caught) == 30
    assert f"{sum(caught)} were caught at first look" in " ".join(README.split())


def test_every_killed_run_ended_the_same_after_resume():
    runs = result("resume")["runs"]
    assert len(runs) == 20 and all(x["same"] for x in runs)
    assert "20 of 20" in README


@pytest.mark.parametrize("name", ["memory", "alternatives", "pretrained", "ablations", "optimum",
                                  "kl_target", "credit", "throughput", "engstrom", "speed"])
def test_the_tables_of_studies_are_what_the_benchmarks_wrote(name):
    for block in (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().split("\n\n"):
        assert not block.startswith("|") or block.strip() in LONG


def test_what_it_says_of_alternatives_is_what_the_raw_results_say():
    runs, text = result("alternatives")["runs"], " ".join(README.split())

    def held_out(method, key="gold"):
        found = [x["held_out"][key] for x in runs if x["method"] == method]
        assert len(found) == 3
        return f"{statistics.mean(found):.2f}" if key == "gold" else statistics.mean(found)

    assert f"gold is {held_out('PPO')} for PPO, {held_out('RLOO')} for RLOO. A separate " \
        f"critic has {held_out('PPO separate critic')}." in text
    assert f"reaches {held_out('REINFORCE')} at a larger KL" in text
    assert held_out("REINFORCE", "kl") > held_out("PPO", "kl")
    assert held_out("DPO β 0.1") == held_out("DPO β 0.3") == "1.41"
    share = 100 * held_out("DPO β 0.1", "kl") / held_out("PPO", "kl")
    assert f"DPO ends at 1.41 with {share:.0f} % of PPO's KL or less" in text
    assert held_out("DPO β 0.3", "kl") < held_out("DPO β 0.1", "kl")
    assert f"GRPO ends at {held_out('GRPO')} (one seed far lower), with a larger kl_coef at " \
        f"{held_out('GRPO kl_coef 0.2')}." in text
    size = {x["method"]: x.get("bytes_per_parameter") for x in result("alternatives")["alone"]}
    assert size["PPO"] == size["GRPO"] and (
        f"{size['GRPO']:.0f} bytes per parameter, not {size['PPO separate critic']:.0f}" in text)
    found = {}
    for x in result("alternatives")["bandit"]:
        found.setdefault(x["method"], []).append(x["share"])
    assert all(len(x) == 3 for x in found.values())
    shares = {name: f"{statistics.mean(x):.3f}" for name, x in found.items()}
    assert "PPO's share is {PPO}, RLOO's {RLOO}".format(**shares) in text
    assert f"GRPO's is {shares['GRPO']}, with the KL in the reward " \
        f"{shares['GRPO KL in the reward']}." in text
    assert f"REINFORCE's is {shares['REINFORCE']}, untuned here; from noisy pairs, " \
        f"DPO's {shares['DPO']}" in text
    best = [x["gold"]["16"] for x in runs if x["method"] == "best of n"]
    assert f"best of 16 samples, without training, has {statistics.mean(best):.2f}" in text
    patch = (ROOT / "benchmarks/variants/grpo.patch").read_text()
    sizes = [len(re.findall(rf"^\{sign}(?!\{sign})", patch, re.M)) for sign in "+-"]
    assert "GRPO adds {} lines and removes {}".format(*sizes) in text


def test_what_it_says_of_clipping_and_of_a_public_model_is_what_the_raw_results_say():
    text, ends = " ".join(README.split()).replace("−", "-"), {}
    for x in (x for x in result("ablations")["runs"] if x["group"] != "sums"):
        gold = statistics.mean(x["curves"]["rollout/gold"][-10:])
        ends.setdefault((x["group"], x["flags"]), []).append(gold)
    unclipped, bare = (ends["clip", f"--kl-coef {x} --clip-coef 1e9"] for x in (0.05, 0))
    assert f"three seeds end at {min(unclipped):.2f} to {max(unclipped):.2f}" in text
    hacked = [statistics.mean(x["curves"]["rollout/gold"][-10:])
              for x in result("reward_hacking")["runs"] if x["kl_coef"] == 0]
    assert all(x < y for x, y in zip(sorted(bare), sorted(hacked), strict=True))
    more, again = (ends["mitigation", f"--kl-coef 0{x}"] for x in (
        " --num-comparisons 24000", ", second round"))
    assert len(more) == len(again) == 3 and max(more) < -1
    assert f"helped: gold {statistics.mean(again):.2f}" in text
    sums = [x["curves"]["rollout/score"] for x in result("ablations")["runs"]
            if x["flags"] == "--kl-coef 0, sums"]
    right = [(x[0], statistics.mean(x[-10:])) for x in sums]
    assert len(sums) == 3 and "from {:.2f} to {:.2f} right ones in training batches".format(
        *map(statistics.mean, zip(*right, strict=True))) in text
    held_out = statistics.mean(x["saved_score"] for x in result("ablations")["runs"]
                               if x["flags"] == "--kl-coef 0, sums")
    assert f"Held-out sums end at {held_out:.2f}" in text
    runs = [x for x in result("pretrained")["runs"] if x["kl_coef"] == 0.02]
    before, after = (statistics.mean(x["score"][i] for x in runs) for i in (0, 1))
    assert f"rises from {before:.2f} to {after:.2f}." in text and len(runs) == 3
    assert all(x["score"][1] > 0.995 for x in result("pretrained")["runs"] if x["kl_coef"] == 0)


def test_what_it_says_of_details_and_the_clip_is_what_the_raw_results_say():
    found = {}
    for x in result("engstrom")["runs"]:
        found.setdefault((x["env_id"], x["objective"], x["variant"]), []).append(x["last_100"])
    assert len(found) == 4 * 16 and all(len(x) == 3 for x in found.values())
    returns = {key: statistics.mean(x) for key, x in found.items()}
    for env_id in ("CartPole-v1", "Acrobot-v1"):  # the clip makes no difference, one detail does
        assert returns[env_id, "clip", "all on"] == pytest.approx(
            returns[env_id, "none", "all on"], abs=5)
        for objective in ("clip", "none"):
            assert max(found[env_id, objective, "no reward normalisation"]) < min(
                found[env_id, objective, "all on"]) - 15
    # On Hopper no run without the clip reaches the mean with it. On HalfCheetah the means are near,
    # until annealing is off. On both, all off costs runs with the clip much, and others more.
    assert max(y for (env_id, objective, _), x in found.items() for y in x
               if (env_id, objective) == ("Hopper-v4", "none")) < returns[
                   "Hopper-v4", "clip", "all on"]
    clip, none = (returns["HalfCheetah-v4", x, "no annealing"] for x in ("clip", "none"))
    assert none < clip / 5
    for env_id in ("Hopper-v4", "HalfCheetah-v4"):
        clip, none = (found[env_id, x, "all off"] for x in ("clip", "none"))
        assert max(none) < min(clip) <= max(clip) < 0.75 * returns[env_id, "clip", "all on"]


def test_what_it_says_of_throughput_is_what_the_raw_results_say():
    runs, ratios = result("throughput")["runs"], []
    for vocab in (512, 50_257):
        ours, trl = (statistics.median(
            x["episodes_per_s"] for x in runs if x.get("vocab") == vocab and x["who"] == who
            and x["critic"] == "separate" and "episodes_per_s" in x) for who in ("ours", "trl"))
        ratios.append(f"{ours / trl:.2f}")
    assert "makes {} times the episodes per second, with a large vocabulary {}.".format(
        *ratios) in " ".join(README.split())


def test_the_count_of_cross_checks_is_right():
    rows = result("cross_checks")["rows"]
    agree = [x["difference"] < 1e-6 for x in rows]
    assert f"{sum(agree)} of {len(rows)} quantities" in " ".join(README.split())
    assert all(x["reason"] for x in rows if not x["agree"])


def test_control_tasks_reach_what_cleanrl_published_within_its_spread():
    """CleanRL's mean minus its standard deviation, on the mean over three seeds."""
    results = result("classic")
    floors = {"CartPole-v1": 483.9, "Acrobot-v1": -87.7, "HalfCheetah-v4": 1396.6,
              "Hopper-v4": 2111.1, "Walker2d-v4": 1716.2, "InvertedPendulum-v4": 940.9}
    for env_id, floor in floors.items():
        runs = [x for x in results["runs"] if (x["group"], x["env_id"]) == ("published", env_id)]
        assert statistics.mean(x["last_100"] for x in runs) >= floor, env_id


def test_the_default_run_meets_its_goals_on_every_seed():
    runs = result("reward_hacking")["runs"]
    last = {(run["kl_coef"], run["seed"]): {
        key: statistics.mean(curve[-10:]) for key, curve in run["curves"].items()} for run in runs}
    for run in runs:
        seed, gold = run["seed"], run["curves"]["rollout/gold"]
        assert gold[0] <= 0.1 and run["max_log_ratio_first"] <= 1e-5
        if run["kl_coef"] == 0.05:
            end = last[0.05, seed]
            assert end["rollout/gold"] >= 1.5 and end["rollout/kl"] <= 6
            assert end["rollout/grammatical"] >= 0.89
        if run["kl_coef"] == 0:  # hacked: the score is higher, and gold is lost again
            end = last[0.0, seed]
            assert end["rollout/gold"] < max(gold) - 0.2
            assert end["rollout/gold"] < last[0.05, seed]["rollout/gold"] - 0.4
            assert end["rollout/score"] > last[0.05, seed]["rollout/score"]
    assert statistics.mean(last[0.05, seed]["rollout/gold"] for seed in (1, 2, 3)) >= 1.6
