"""Claim: all formats of data give the same texts, a bad line costs one line and says why, no prompt
is on both sides, the embedded language is exact, bad input is refused before any training.

Reference: texts small enough to read; the grammar that wrote a text also has to accept it.
Run: python -m pytest tests/test_data.py (15 seconds)
"""

import gzip
import json
import math
import re
from collections import Counter
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import make_lm, make_reward_model, make_tokenizer, run, save, write_rows

import ppo_rlhf as ppo

USER, GOOD, BAD, MORE, RULES = ({"role": role, "content": text} for role, text in [
    ("user", "a"), ("assistant", "good"), ("assistant", "bad"), ("user", "b"), ("system", "c")])
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
PAIR = {"prompt": "a", "chosen": " good", "rejected": " bad"}
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
COMEDY = "a new comedy about the war."


@pytest.fixture
def load(tmp_path, policy_folder):
    """A function that loads rows, by default all on the training side."""
    def load_rows(rows, **settings):
        return ppo.load_data(ppo.Args(**({
            "dataset": write_rows(tmp_path / "data.jsonl", rows), "policy_model": policy_folder,
            "eval_prompts": 0, "reward_model": ("given",), "sft_epochs": 0} | settings)))
    return load_rows


def texts(rows):
    """Prompt, chosen and rejected of each row."""
    return [tuple(row.get(x) for x in ("prompt", "chosen", "rejected")) for row in rows]


# Rows, in every format ----------------------------------------------------------------------------

@pytest.mark.parametrize(("row", "prompt", "sides"), [
    (PAIR, "a", [" good", " bad"]),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], ["good", "bad"]),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ["good", "bad"]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ["good", "bad"]),
    ({"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ["good", "bad"]),
    ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, [USER], ["good", "bad"]),
    ({"chosen": HH + " I do", "rejected": HH + " I do not"}, HH, [" I do", " I do not"]),
    ({"prompt": "a", "completion": " good"}, "a", [" good"]),
    (PAIR | {"rejected": None}, "a", [" good"]), ({"prompt": "a", "chosen": None}, "a", []),
    ({"prompt": "a", "chosen": " good", "label": False}, "a", [" good"]),
    ({"messages": [RULES, USER, BAD, MORE, GOOD]}, [RULES, USER, BAD, MORE], ["good"]),
    ({"prompt": [USER], "completion": [BAD, MORE, GOOD]}, [USER, BAD, MORE], ["good"]),
    ({"messages": [USER | {"id": 1}, GOOD | {"name": None}]}, [USER | {"id": 1}], ["good"]),
    ({"prompt": "a", "system": "c", "tools": []}, "a", []),
    ({"prompt": [USER, GOOD, MORE]}, [USER, GOOD, MORE], []),
    # What is empty or strange is used as it is; two words do not become one.
    ({"prompt": "a", "chosen": "", "rejected": " bad"}, "a", ["", " bad"]),
    ({"prompt": "ü 日本 🙂", "chosen": " ß\u2028\x00" * 999}, "ü 日本 🙂", [" ß\u2028\x00" * 999]),
    ({"prompt": "a", "chosen": "good", "rejected": "bad"}, "a", [" good", " bad"]),
    ({"prompt": "a ", "chosen": "good"}, "a ", ["good"]),
    ({"prompt": "a:", "chosen": "good"}, "a:", ["good"]),
    ({"prompt": "a", "chosen": ". good"}, "a", [". good"]),
    ({"prompt": "да", "chosen": "нет"}, "да", [" нет"]),
    ({"prompt": "日本", "chosen": "語"}, "日本", ["語"])])
def test_every_format_gives_prompt_and_answers_and_other_columns_stay_and_are_named(
        load, capsys, row, prompt, sides):
    data = load([row | {"answer": 7}])
    found = (data.prompts, data.demonstrations, data.comparisons)
    assert [len(rows) for rows in found] == [1, len(sides) > 0, len(sides) > 1]
    assert found[0][0]["answer"] == 7
    assert texts(found[len(sides)]) == [(prompt, *sides, *[None] * (2 - len(sides)))]
    unread = {"answer", *(x for x in row if x in ("label", "system", "tools") or row[x] is None)}
    assert f"that no model reads: {', '.join(sorted(unread))}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "reason"), [
    ('{"prompt": "a", "chos', "no JSON"), (r'{"prompt": "why \ud83d"}', "no JSON"),
    ("[1, 2]", ""), ('"text"', ""), ("7", ""),
    (PAIR | {"chosen": None}, ""), (PAIR | {"chosen": ["b"]}, ""),
    (PAIR | {"chosen": " \ud83d"}, ""), ({"prompt": "a", "rejected": " b"}, ""),
    ({"prompt": ""}, "no prompt"), ({"prompt": None}, "no prompt"), ({"answer": 1}, "no prompt"),
    ({"prompt": [USER | {"content": None}]}, ""), ({"chosen": [], "rejected": []}, ""),
    ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
    ({"prompt": [USER], "chosen": [USER, CALL], "rejected": [USER, BAD]}, "such as tool calls"),
    ({"messages": [USER, GOOD | {"content": None}]}, "no text"),
    ({"messages": [USER, {"role": "assistant"}]}, ""),
    ({"prompt": [RULES, USER], "chosen": [USER, GOOD]}, "do not begin with its prompt"),
    *(({"chosen": chosen, "rejected": rejected}, "before the assistant's last turn")
      for chosen, rejected in [
        ([RULES, USER, GOOD], [USER, BAD]),  # another system turn
        ([RULES, USER, GOOD], [RULES | {"content": "d"}, USER, BAD]),
        ([USER, GOOD, MORE, GOOD], [USER, BAD, MORE, GOOD]),  # part early
        ([USER, GOOD, MORE, GOOD], [USER, BAD]),
        ([USER, GOOD, MORE], [USER, GOOD, USER]),  # the user has the last word
        (HH + " so\n\nHuman: b\n\nAssistant: so", HH + " no\n\nHuman: b\n\nAssistant: so")])])
def test_one_bad_line_costs_one_line_and_is_named_by_number_and_reason(load, capsys, line, reason):
    data = load([PAIR, "", line, "  ", PAIR], sft_epochs=1)
    assert texts(data.comparisons) == texts(data.demonstrations) == texts([PAIR, PAIR])
    printed = capsys.readouterr().out.replace("\n", " ")
    assert re.search(rf"2 of 3 rows of \S+ are used; 1 dropped, such as row 3: .*{reason}", printed)


def test_a_column_of_two_types_or_one_that_comes_late_costs_nothing(load):
    odd = [{"prompt": "a", "meta": x} for x in (1, "x", [1], {"a": None}, "\ud83d", None)]
    rows = load([{"prompt": "a"}] * 3000 + odd).prompts
    assert [row["meta"] for row in rows[2999:]] == [None, *(row["meta"] for row in odd)]


@pytest.mark.parametrize(("split", "part"), [
    ("train", slice(8)), ("train[2:4]", slice(2, 4)), ("train[:25%]", slice(2)),
    ("train[-3:]", slice(5, 8))])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_rows_and_slices(load, tmp_path, kind, split, part):
    import datasets

    rows, path = [PAIR | {"prompt": f"a {i}"} for i in range(8)], tmp_path / f"file.{kind}"
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    data = load([], dataset=str(path), dataset_split=split, sft_dataset=str(path))
    assert texts(data.comparisons) == texts(rows[part])
    assert texts(data.demonstrations) == texts(rows)


def test_pairs_that_are_equal_after_the_cut_are_dropped_and_counted(tiny_args, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": " a b c", "rejected": x} for x in (" a b d", " a", " a b c")]
    path = write_rows(tmp_path / "data.jsonl", rows)
    run(tiny_args, dataset=path, eval_prompts=0, response_len=2)
    assert "comparisons  1 of 3 differ" in capsys.readouterr().out


def test_chats_train_in_all_three_stages_and_may_have_times(tiny_args, tmp_path):
    import datasets

    asked = [USER | {"content": x, "at": datetime(2026, 12, 1)} for x in "abcd" * 3]
    rows = [{"chosen": [x, GOOD], "rejected": [x, BAD]} for x in asked]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": [USER, BAD, MORE, GOOD]}] * 9)
    metrics = run(tiny_args, dataset=str(tmp_path / "pairs.parquet"), sft_dataset=chats,
                  max_prompt_len=16, eval_prompts=4, total_episodes=8)
    assert metrics[-1]["ppo/log_ratio_first"] < 1e-5
    assert len((tmp_path / "run/before_after.jsonl").read_text().splitlines()) == 1


# Training and evaluation --------------------------------------------------------------------------

ROWS = [{"prompt": f"a {i % 40}", "chosen": f" good {i}", "rejected": " bad", "source": i // 40}
        for i in range(80)]  # 40 prompts, each in two comparisons from different sources


def prompts_of(data):
    """The distinct prompts in prompts, demonstrations and comparisons."""
    return {row["prompt"] for row in data.prompts + data.demonstrations + data.comparisons}


def sizes(data):
    """Numbers of prompts, demonstrations, comparisons."""
    return len(data.prompts), len(data.demonstrations), len(data.comparisons)


@pytest.mark.parametrize(("wanted", "held_out"), [(10, 10), (7, 7), (0, 0), (11, 10)])
def test_no_prompt_is_on_both_sides_and_at_most_a_quarter_is_held_out(load, wanted, held_out):
    data, other = (load(ROWS, eval_prompts=wanted, seed=seed) for seed in (1, 2))
    trained, seen = prompts_of(data), prompts_of(data.held_out)
    assert (len(trained), len(seen)) == (40 - held_out, held_out) and not trained & seen
    assert sizes(data) == (2 * (40 - held_out),) * 3
    assert sizes(data.held_out) == (held_out, 2 * held_out, 2 * held_out)
    assert prompts_of(load(ROWS, eval_prompts=wanted).held_out) == seen  # the seed chooses them
    assert not held_out or prompts_of(other.held_out) != seen


@pytest.mark.parametrize(("letter", "number", "held_out"), [
    ("a", 50, 10), ("b", 40, 10), ("b", 39, 9)])
def test_demonstrations_of_held_out_prompts_are_held_out_and_of_others_at_most_a_quarter(
        load, tmp_path, letter, number, held_out):
    rows = [{"prompt": f"{letter} {i}", "completion": " good"} for i in reversed(range(number))]
    data = load(ROWS, sft_dataset=write_rows(tmp_path / "sft.jsonl", rows), eval_prompts=10)
    assert not prompts_of(data) & prompts_of(data.held_out)
    assert sizes(data) == (60, number - held_out, 60) and sizes(data.held_out) == (10, held_out, 20)


@pytest.mark.parametrize("size", [4, 12])
def test_prompt_batches_pass_over_all_prompts_before_any_returns(size):
    drawn = [x for i in range(12 // size) for x in ppo.prompt_batch("abcdef", i + 1, size, seed=0)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list("abcdef") and drawn[:6] != drawn[6:]


# The embedded language ----------------------------------------------------------------------------

def test_drawn_reviews_are_in_the_language_and_praise_as_often_as_they_scorn():
    reviews = ppo.load_data(ppo.Args(eval_prompts=0)).demonstrations
    tokenizer = ppo.word_tokenizer()
    for row in reviews[:500]:
        assert ppo.is_grammatical(row["prompt"], row["chosen"], True)
        ids = tokenizer(row["chosen"])["input_ids"]
        assert " " + tokenizer.decode(ids) == row["chosen"] and len(ids) < 32
    golds = [ppo.gold_reward(row["prompt"], row["chosen"], True) for row in reviews]
    signs = Counter((gold > 0) - (gold < 0) for gold in golds)
    assert min(signs[1], signs[-1]) > 5000 and abs(signs[1] - signs[-1]) < 1500  # 20,000 in all
    assert len({x for nouns in ppo.GENRE_NOUNS.values() for x in nouns.split("|")}) == 12


@pytest.mark.parametrize(("review", "gold", "grammatical"), [
    ("the plot was clever.", 1, True), ("the humour was dull.", -1, True),
    ("the plot was clever and i loved the cast.", 2, True),
    ("it made me laugh. i loved the cast. the music was fresh.", 2, True),  # 3, cut to 2
    ("the plot was clever, while the cast was dull.", 0, True),
    ("the plot was clever. the plot was clever.", 2 - 1, True),  # once repeated
    ("the plot shines and the cast shines. it made me smile and it made me laugh.", 2 - 0.5, True),
    ("", -2, False), ("the plot was", -2, False), ("the plot clever.", -2, False),
    ("the plot was dull", -1 - 2, False), ("the plot was dull. .", -1 - 2, False),
    ("it made me dull.", -2, False), ("i loved the cast the", -2, False),
    ("the duel was dull.", -2, False)])  # a comedy has no duel
def test_gold_rewards_by_hand_and_a_review_that_never_ended_loses_two(review, gold, grammatical):
    assert ppo.is_grammatical(COMEDY, review, True) is grammatical
    assert ppo.gold_reward(COMEDY, review, True) == gold
    assert ppo.gold_reward(COMEDY, review, False) == gold - 2 * grammatical


REWARDS = '''
import json
from pathlib import Path

def recorded(questions, texts, answer, tokens, missing=7, *more, ended, grade="none", **rest):
    with open(Path(__file__).with_name("calls"), "a") as file:
        json.dump([questions, texts, answer, tokens, ended, missing, grade, more, rest], file)
        file.write("\\n")
    return letters(questions, texts)

letters = lambda prompts, responses: [len(x) / 10 for x in responses]
raises = lambda prompts, responses: [1 / 0 for _ in responses]
wrong_count = lambda prompts, responses: [1.0]
wrong_type = lambda prompts, responses: ["high"] * len(responses)
nothing = lambda prompts, responses: None
not_a_number = lambda prompts, responses: [float("nan")] * len(responses)
too_many = lambda prompts, responses, tokens: [[0.0] * (len(x) + 1) for x in tokens]
asks_for_more = lambda prompts, responses, colour: colour
swapped = lambda completions, prompts: [1.0] * len(prompts)
which = lambda prompts, responses, response: [1.0] * len(response)
'''


@pytest.mark.parametrize("prompt", ["the plot was {dull} good bad a b", [USER, BAD, MORE]])
def test_a_reward_function_gets_whole_prompts_and_what_it_names(tiny_args, tmp_path, prompt):
    (tmp_path / "f.py").write_text(REWARDS)
    rows = [{"prompt": prompt, "answer": {"grade": i}} for i in range(16)]
    run(tiny_args, dataset=write_rows(tmp_path / "data.jsonl", rows), eval_prompts=0, sft_epochs=0,
        sft_learning_rate=None, reward_learning_rate=None, reward_fn=f"{tmp_path}/f.py:recorded")
    prompts, answers, expected, tokens, ended, *others = json.loads(
        (tmp_path / "calls").read_text().splitlines()[-1])
    assert others == [7, "none", [], {}]  # defaults stay, * and ** get nothing
    assert prompts == [prompt] * 8  # not cut to --max-prompt-len 4
    assert expected == [row["answer"] for row in ppo.prompt_batch(rows, 2, 8, seed=1)]
    for answer, words, has_ended in zip(answers, tokens, ended, strict=True):
        assert "".join(words[: len(words) - has_ended]).strip() == answer.strip()
        assert has_ended is (words[-1].strip() == "[EOS]") and 1 <= len(words) <= 6


# Settings, and everything that is refused ---------------------------------------------------------

@pytest.fixture(scope="module")
def places(folder, policy_folder, pairs_file):
    """Models, data and files on disk, by name."""
    rejects, no_system = make_tokenizer(), make_tokenizer()
    rejects.chat_template = "{{ raise_exception('no chats') }}"
    no_system.chat_template = ("{% for m in messages %}{{ raise_exception('no system role') if "
                               "m.role == 'system' else m.content }} {% endfor %}")
    chats = [PAIR | {"prompt": prompt} for prompt in ([USER], [USER], [USER], [RULES, USER])]
    files = {"rewards.py": REWARDS, "broken.py": "def f(:\n", "bytes.parquet": "PAR1 and no more",
             "half.jsonl": '{"prompt": "a", "chos', "empty.jsonl": "", "a_run/args.json": "{}",
             "columns.jsonl": '{"question": "a", "reply": "b"}', "prompts.jsonl": '{"prompt": "a"}',
             "taken.jsonl": json.dumps(PAIR | {"response": "b"}),
             "equal.jsonl": json.dumps(PAIR | {"rejected": PAIR["chosen"]}),
             "chats.jsonl": "\n".join(map(json.dumps, chats))}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "utf16.jsonl").write_text(json.dumps(PAIR), encoding="utf-16")
    models = {"rm": (make_reward_model(), make_tokenizer()), "no_chats": (make_lm(), rejects),
              "no_system": (make_reward_model(), no_system),
              "no_eos": (make_lm(), make_tokenizer(eos_token=None)),
              "two_outputs": (make_reward_model(num_labels=2), make_tokenizer()),
              "more_tokens": (make_lm(vocab_size=12), make_tokenizer())}
    return {"policy": policy_folder, "pairs": pairs_file, "dir": str(folder),
            **{name: save(folder / name, *both) for name, both in models.items()}}


@pytest.fixture
def args(places, tmp_path):
    """Settings that are fine."""
    return ppo.Args(dataset=places["pairs"], policy_model=places["policy"], response_len=6,
                    total_episodes=16, batch_size=8, minibatch_size=4, max_prompt_len=16,
                    eval_prompts=4, output_dir=str(tmp_path), run_name="refused", device="cpu")


def refusal(capsys, action, argument):
    """The one sentence, with a remedy, that a refused action ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        action(argument)
    sentence, = (x for x in capsys.readouterr().err.splitlines() if x.startswith("ppo_rlhf.py: "))
    assert end.value.code == 2 and re.search(r"(; | must ).*\.$", sentence)
    return sentence


MAY_BE_0 = {"eval_prompts", "ensemble_coef", "sft_epochs", "lr_warmup", "gamma", "gae_lambda",
            "vf_coef", "ent_coef", "kl_coef", "ref_update_interval", "missing_eos_penalty",
            "ptx_coef"}


@pytest.mark.parametrize("name", [x.name for x in fields(ppo.Args) if x.name != "seed" and re.match(
    "int|float", str(getattr(x.type, "__name__", x.type)))])
def test_negative_and_infinite_numbers_and_senseless_zeros_are_refused(args, name, capsys):
    flag = f"--{name.replace('_', '-')}"
    for value in (-1, math.nan, math.inf, *([] if name in MAY_BE_0 else [0])):
        sentence = refusal(capsys, ppo.resolve_args, replace(args, **{name: value}))
        assert re.search(f": {flag} {value} (is out of range; it must be|has no effect)", sentence)
    if name in MAY_BE_0:
        args = replace(args, num_reward_models=2, **{name: 0})
        assert getattr(ppo.resolve_args(args), name) == 0


FUNCTION = {"reward_fn": "{dir}/rewards.py:letters"}
NO_SFT = {"dataset": "{dir}/prompts.jsonl", "sft_epochs": 0}


@pytest.mark.parametrize(("changes", "named"), [
    ({"gamma": 1.5}, "--gamma 1.5 .* at most 1"), ({"gae_lambda": 1.01}, "--gae-lambda 1.01"),
    ({"total_episodes": 12}, "--total-episodes 12 must be a multiple of --batch-size 8"),
    ({"batch_size": 6, "total_episodes": 18}, "--batch-size 6, that one of --minibatch-size 4"),
    ({"kl_in": "loss"}, "--kl-in loss with --kl-estimator k1 .*; use k2 or k3"),
    ({"kl_target": 1.0, "kl_coef": 0.0}, "--kl-target 1.0 .*; set it above 0"),
    (FUNCTION | {"reward_model": ("{rm}",)}, "--reward-fn .* --reward-model {rm} .*; drop one"),
    ({"policy_model": None}, "--dataset {pairs} .* needs a --policy-model"),
    ({"dataset": "reviews", "policy_model": None, "sft_epochs": 0}, "--sft-epochs 0 needs"),
    ({"response_len": 100}, r"--max-prompt-len 16 \+ --response-len 100 exceed the 64 tokens of"),
    ({"reward_fn": "{dir}/rewards.py"}, "--reward-fn {dir}/rewards.py names no function; give"),
    ({"resume": "nowhere"}, "--resume nowhere cannot be used"),
    ({"resume": "{dir}/a_run"}, "--resume {dir}/a_run cannot be used"),
    ({"output_dir": "{dir}", "run_name": "a_run"}, "--run-name a_run cannot be used"),
    *([] if torch.cuda.is_available() else [({"device": "cuda"}, "--device cuda .*--device cpu")]),
    # Settings without an effect; data; models; functions.
    *((others | {name: value}, f"--{name.replace('_', '-')} {value} has no effect")
      for others, name, value in [
        ({}, "num_comparisons", 7), ({}, "ensemble_coef", 0.5), (FUNCTION, "reward_epochs", 2),
        (FUNCTION, "reward_learning_rate", 0.1), (FUNCTION, "num_reward_models", 2),
        ({"reward_model": ("{rm}",)}, "num_reward_models", 2),
        ({"sft_epochs": 0}, "sft_learning_rate", 0.1), ({"sft_epochs": 0}, "sft_dataset", "x"),
        ({"dataset": "reviews"}, "dataset_split", "test")]),
    *(({"dataset": path}, f"--dataset {path} .*{reason}") for path, reason in [
        ("nowhere.jsonl", "cannot be used"), ("{dir}/empty.jsonl", "none of its rows can be used"),
        ("{dir}/half.jsonl", "1 dropped, such as row 1: its characters are no JSON"),
        ("{dir}/columns.jsonl", "it has columns question, reply"), ("{dir}/rewards.py", "cannot"),
        ("{dir}/bytes.parquet", "cannot"), ("{dir}/utf16.jsonl", "in UTF-16; save it in UTF-8"),
        ("{dir}/prompts.jsonl", "has no demonstrations; give --sft-dataset")]),
    ({"dataset_split": "test"}, '--dataset {pairs} cannot be used .*"test"'),
    ({"sft_dataset": "nowhere.jsonl"}, "--sft-dataset nowhere.jsonl cannot be used"),
    ({"sft_dataset": "{dir}/columns.jsonl"}, "--sft-dataset .* it has columns question, reply"),
    (NO_SFT | {"ptx_coef": 1.0}, "no demonstrations"), (NO_SFT, "no comparisons; give --reward-"),
    ({"dataset": "{dir}/equal.jsonl"}, "--response-len 6 leaves no difference .*; raise it"),
    *(({"policy_model": path}, f"--policy-model {path} cannot be used .*{why}") for path, why in [
        *((x, "") for x in ("nowhere", "{rm}", "{dir}", "{more_tokens}")), ("{no_eos}", "no EOS")]),
    *(({"reward_model": ("{rm}", path)}, f"--reward-model {path} cannot be used")
      for path in ("nowhere", "{policy}", "{two_outputs}", "{pairs}")),
    ({"dataset": "{dir}/chats.jsonl", "policy_model": "{no_chats}"}, "4 dropped, .*: no chats"),
    ({"dataset": "{dir}/chats.jsonl", "reward_model": ("{no_system}",)}, "{no_system} .*no system"),
    *(({"reward_fn": path}, f"--reward-fn {path} cannot be used .*{why}") for path, why in [
        ("nowhere.py:f", ""), ("{dir}/rewards.py:missing", "missing"),
        ("{dir}/broken.py:f", ""), ("{dir}/rewards.py:raises", "division by zero"),
        ("{dir}/rewards.py:wrong_count", "1 scores for 2 responses"),
        ("{dir}/rewards.py:wrong_type", ""), ("{dir}/rewards.py:nothing", ""),
        ("{dir}/rewards.py:not_a_number", "nan for '"), ("{dir}/rewards.py:too_many", " for '"),
        ("{dir}/rewards.py:asks_for_more", "colour"), ("{dir}/rewards.py:swapped", "this order")]),
    ({"reward_fn": "{dir}/rewards.py:which", "dataset": "{dir}/taken.jsonl"}, "rename the column")])
def test_bad_input_is_refused_in_one_sentence_before_training(args, places, changes, named, capsys):
    def fill(value):
        return value.format(**places) if isinstance(value, str) else (
            tuple(map(fill, value)) if isinstance(value, tuple) else value)

    args = replace(args, **{name: fill(value) for name, value in changes.items()})
    before = sorted(Path(args.output_dir).rglob("*"))
    assert re.search(fill(named), refusal(capsys, ppo.main, args))
    assert sorted(Path(args.output_dir).rglob("*")) == before


@pytest.mark.parametrize(("given", "defaults"), [
    ({}, (16, 32, 1e-4, 3e-3, 1e-3, True)),
    ({"policy_model": "given"}, (256, 128, 3e-6, 1e-5, 1e-5, True)),
    ({"policy_model": "given", "reward_fn": "f.py:f"}, (256, 128, 3e-6, 1e-5, 1e-5, False))])
def test_defaults_follow_from_the_models(given, defaults):
    args = ppo.resolve_args(ppo.Args(**given))
    assert (args.max_prompt_len, args.response_len, args.learning_rate, args.sft_learning_rate,
            args.reward_learning_rate, args.norm_scores) == defaults
    assert args.critic_learning_rate == 10 * args.learning_rate and args.device in ("cpu", "cuda")


def test_norm_scores_has_three_states():
    words = (["--norm-scores"], ["--no-norm-scores"], [])
    assert [ppo.parse_args(x).norm_scores for x in words] == [True, False, None]


@pytest.mark.parametrize("words", [["--resume", "runs/x"], ["--resume=runs/x"]])
def test_resume_takes_no_other_flag(words, capsys):
    assert ppo.parse_args(words) == ppo.Args(resume="runs/x")
    for others in (["--seed=2"], ["--kl-coef", "0"], ["--no-norm-scores"]):
        for both in (words + others, others + words):
            assert "--resume takes" in refusal(capsys, ppo.parse_args, both)
