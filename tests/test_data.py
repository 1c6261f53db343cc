"""Claim: all formats of data give the same texts, texts become the ids that each model was trained
to read, no prompt is on both sides of the evaluation, and the embedded language is exact.

Reference: texts small enough to read; the grammar that wrote a text also has to accept it.
Run: python -m pytest tests/test_data.py (15 seconds)
"""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_lm, make_policy, make_tokenizer, run, save

from ppo_rlhf import (
    GENRE_NOUNS,
    Args,
    Rollout,
    cut_front,
    encode_prompts,
    gold_reward,
    is_grammatical,
    load_data,
    load_policy,
    pad_rows,
    prompt_batch,
    read_row,
    sft_loss,
    word_tokenizer,
)

USER, GOOD, BAD, MORE, RULES = ({"role": role, "content": text} for role, text in [
    ("user", "a"), ("assistant", "good"), ("assistant", "bad"), ("user", "b"), ("system", "c")])
PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}
COMEDY = "a new comedy about the war."


def write(path, rows):
    """A jsonl file. Returns: its name."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


# One row, in every format ------------------------------------------------------------------------


def read(row):
    """Prompt, chosen and rejected (if there is one) of a row, None if it cannot be used."""
    found = read_row(row)
    return found and tuple(found[x] for x in ("prompt", "chosen", "rejected") if x in found)


@pytest.mark.parametrize(("row", "prompt"), [
    (PAIR, "a"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),  # UltraFeedback
    ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, [USER]),
])
def test_every_format_gives_prompt_chosen_rejected(row, prompt):
    assert read(row) == (prompt, "good", "bad")


@pytest.mark.parametrize(("row", "prompt"), [
    ({"prompt": "a", "completion": "good"}, "a"),
    ({"text": "good"}, ""),
    ({"prompt": [USER], "completion": [GOOD]}, [USER]),
    ({"messages": [USER, GOOD]}, [USER]),
    ({"messages": [RULES, USER, BAD, MORE, GOOD]}, [RULES, USER, BAD, MORE]),
    ({"prompt": [RULES, USER, BAD, MORE], "completion": [GOOD]}, [RULES, USER, BAD, MORE]),
    ({"prompt": [USER], "completion": [BAD, MORE, GOOD]}, [USER, BAD, MORE]),
])
def test_the_prompt_of_a_demonstration_is_all_before_the_last_turn_of_the_assistant(row, prompt):
    assert read(row) == (prompt, "good")


def test_other_columns_stay_with_their_row():
    assert read_row(PAIR | {"answer": 7})["answer"] == 7


def test_hh_dialogues_part_at_the_last_shared_turn_of_the_assistant():
    shared = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
    row = {"chosen": shared + " I think so", "rejected": shared + " I do not"}
    assert read(row) == (shared, " I think so", " I do not")


def test_hh_dialogues_that_part_before_their_last_turn_are_not_used():
    start = "\n\nHuman: hi\n\nAssistant:"
    row = {"chosen": start + " yes\n\nHuman: why\n\nAssistant: so",
           "rejected": start + " no\n\nHuman: why\n\nAssistant: so"}
    assert read(row) is None


def test_conversations_that_differ_in_metadata_alone_are_used():
    chosen = [USER | {"id": 1}, GOOD | {"model": "x"}]
    rejected = [USER | {"id": 2, "source": None}, BAD]
    assert read({"chosen": chosen, "rejected": rejected}) == ([USER], "good", "bad")


@pytest.mark.parametrize("row", [
    {"chosen": [RULES, USER, GOOD], "rejected": [USER, BAD]},  # another system turn
    {"chosen": [RULES, USER, GOOD], "rejected": [RULES | {"content": "d"}, USER, BAD]},
    {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD, MORE, GOOD]},  # part early
    {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD, MORE], "rejected": [USER, GOOD, USER]},  # the user has the last word
    {"chosen": [], "rejected": []},
    {"chosen": [USER, GOOD | {"content": None}], "rejected": [USER, BAD]},  # calls a tool
    {"chosen": None, "rejected": None}, {"prompt": None},
    {"prompt": [USER | {"content": None}]},  # prompts alone have to be texts too
    {"prompt": [USER | {"content": [{"type": "text", "text": "a"}]}]},
])
def test_rows_without_one_common_prompt_and_two_answers_are_not_used(row):
    assert read(row) is None


# Files -------------------------------------------------------------------------------------------


def rows_of(path, **settings):
    """The comparisons of a file, all on the training side."""
    return load_data(Args(dataset=str(path), eval_prompts=0, **settings)).comparisons


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    import datasets

    rows, path = [{**PAIR, "prompt": f"a {i}"} for i in range(32)], tmp_path / f"data.{kind}"
    lines = "\n".join(json.dumps(row) for row in rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if kind == "jsonl.gz" else lines.encode())
    assert rows_of(path) == rows


def test_empty_lines_do_no_harm(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(PAIR)}\n  \n")
    assert rows_of(path) == [PAIR, PAIR]


def test_a_slice_of_a_split_gives_its_rows(tmp_path):
    path = write(tmp_path / "data.jsonl", [{**PAIR, "prompt": f"a {i}"} for i in range(9)])
    assert [row["prompt"] for row in rows_of(path, dataset_split="train[2:4]")] == ["a 2", "a 3"]


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, capsys):
    early = {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD, MORE, GOOD]}
    system = {"chosen": [RULES, USER, GOOD], "rejected": [USER, BAD]}
    fine = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    path = write(tmp_path / "data.jsonl", [fine, early, system, fine])
    assert len(rows_of(path)) == 2
    assert f"2 of 4 rows of {path} can be used" in capsys.readouterr().out


@pytest.mark.parametrize(("fine", "broken"), [
    (PAIR, {"chosen": None}), (PAIR, {"chosen": ["b"]}), (PAIR, {"rejected": None}),
    ({"chosen": [GOOD], "rejected": [BAD]}, {"chosen": [{"role": "assistant"}]}),
])
def test_one_broken_row_among_a_thousand_is_dropped_and_counted(tmp_path, capsys, fine, broken):
    rows = [{**fine, "prompt": f"a {i}"} for i in range(1000)]
    rows[500] |= broken
    path = write(tmp_path / "data.jsonl", rows)
    assert len(rows_of(path)) == 999
    assert f"999 of 1000 rows of {path} can be used" in capsys.readouterr().out


@pytest.mark.parametrize("row", [
    {"prompt": "", "chosen": "good", "rejected": "bad"},
    {"prompt": "the plot", "chosen": "", "rejected": "bad"},
    {"prompt": "ein Stück über 日本 🙂", "chosen": "schön\u2028\x00", "rejected": "ß" * 3000},
])
def test_rows_with_empty_or_strange_texts_are_used_as_they_are(tmp_path, row):
    assert rows_of(write(tmp_path / "data.jsonl", [row])) == [row]


@pytest.mark.parametrize(("content", "named"), [
    ('{"question": "a", "answer": "b"}', "has columns question, answer"),
    ('{"text": "a", "label": 1}', "has columns text, label"),  # demonstrations, but no prompts
    ('{"chosen": null, "rejected": null}', "no row can be used|none of its rows can be used"),
    ("", "cannot be used"), ('{"chosen": ', "line 1, cannot be used"),
    (json.dumps(PAIR) + '\n{"chosen": ', "line 2, cannot be used")])
def test_broken_or_foreign_data_are_refused_by_name(tmp_path, capsys, content, named):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        rows_of(path, reward_fn="f.py:f")
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"--dataset {path}" in message and re.search(named, message)


def test_an_sft_dataset_without_answers_is_refused_by_name(data_args, tmp_path, capsys):
    path = write(tmp_path / "sft.jsonl", [{"prompt": "a"}] * 4)
    with pytest.raises(SystemExit) as end:
        load_data(replace(data_args, sft_dataset=path))
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert f"--sft-dataset {path}" in message and "columns prompt" in message


# Training and evaluation -------------------------------------------------------------------------


def prompts_of(rows):
    """The distinct prompts of rows."""
    return {json.dumps(row["prompt"]) for row in rows}


@pytest.fixture
def data_args(tmp_path):
    """Args of a data set with 40 prompts, each in two comparisons from different sources."""
    rows = [{"prompt": f"a {i % 40}", "chosen": f"good {i}", "rejected": "bad", "source": i // 40}
            for i in range(80)]
    return Args(dataset=write(tmp_path / "data.jsonl", rows), eval_prompts=10)


def test_no_prompt_is_on_both_sides(data_args):
    data = load_data(data_args)
    held_out = data.held_out
    trained = prompts_of(data.prompts + data.demonstrations + data.comparisons)
    seen = prompts_of(held_out.prompts + held_out.demonstrations + held_out.comparisons)
    assert len(trained) == 30 and len(seen) == 10 and not trained & seen


def test_every_row_is_on_one_side_and_an_evaluation_prompt_is_asked_once(data_args):
    data = load_data(data_args)
    held_out = data.held_out
    assert len(data.comparisons) == len(data.demonstrations) == 60
    assert len(held_out.comparisons) == len(held_out.demonstrations) == 20
    assert len(data.prompts) == 60 and len(held_out.prompts) == 10


def test_demonstrations_for_sft_of_a_held_out_prompt_are_held_out_too(data_args, tmp_path):
    rows = [{"prompt": f"a {i}", "completion": "good"} for i in range(50)]
    args = replace(data_args, sft_dataset=write(tmp_path / "sft.jsonl", rows))
    data = load_data(args)
    held_out = data.held_out
    assert prompts_of(held_out.demonstrations) == prompts_of(held_out.prompts)
    assert len(data.demonstrations) == 40 and len(held_out.demonstrations) == 10


@pytest.mark.parametrize(("num_rows", "num_held_out"), [(40, 10), (39, 9)])
def test_demonstrations_with_prompts_of_their_own_are_held_out_too_at_most_a_quarter(
    data_args, tmp_path, num_rows, num_held_out
):
    rows = [{"prompt": f"b {i}", "completion": "good"} for i in range(num_rows)]
    data = load_data(replace(data_args, sft_dataset=write(tmp_path / "sft.jsonl", rows)))
    held_out = data.held_out
    assert len(held_out.demonstrations) == num_held_out
    assert len(data.demonstrations) == num_rows - num_held_out
    assert not prompts_of(data.demonstrations) & prompts_of(held_out.demonstrations)
    assert len(held_out.prompts) == 10
    assert not prompts_of(data.prompts) & prompts_of(held_out.prompts)


def test_the_split_of_the_comparisons_is_not_that_of_the_demonstrations(data_args, tmp_path):
    sft_dataset = write(tmp_path / "sft.jsonl", [{"text": f"the plot {i}"} for i in range(60)])
    args = replace(data_args, sft_dataset=sft_dataset, dataset_split="train[:50]", eval_prompts=0)
    data = load_data(args)
    assert (len(data.comparisons), len(data.demonstrations)) == (50, 60)


def test_texts_without_a_prompt_are_held_out_one_by_one(data_args, tmp_path):
    rows = [{"text": f"the plot {i}"} for i in range(40)]
    data = load_data(replace(data_args, sft_dataset=write(tmp_path / "sft.jsonl", rows)))
    held_out = data.held_out
    assert (len(data.demonstrations), len(held_out.demonstrations)) == (30, 10)


def test_too_few_distinct_prompts_are_refused_with_the_number_that_would_do(data_args, capsys):
    with pytest.raises(SystemExit) as end:
        load_data(replace(data_args, eval_prompts=11))  # 4 · 11 > 40
    message = capsys.readouterr().err
    assert end.value.code == 2 and "--eval-prompts 11" in message and " 10 " in message


def test_without_evaluation_prompts_nothing_is_held_out(data_args):
    data = load_data(replace(data_args, eval_prompts=0))
    held_out = data.held_out
    assert len(data.comparisons) == len(data.demonstrations) == len(data.prompts) == 80
    assert held_out.prompts == held_out.demonstrations == held_out.comparisons == []


def test_equal_prompts_stay_apart_if_another_column_differs(tmp_path):
    rows = [{"prompt": "a", "answer": i % 3} for i in range(9)]
    args = Args(dataset=write(tmp_path / "data.jsonl", rows), eval_prompts=0, sft_epochs=0,
                reward_fn="f.py:f")
    data = load_data(args)
    assert data.prompts == [{"prompt": "a", "answer": i} for i in range(3)]


def test_the_seed_chooses_the_evaluation_prompts(data_args):
    first, same, other = (prompts_of(load_data(replace(data_args, seed=seed)).held_out.prompts)
                          for seed in (1, 1, 2))
    assert first == same != other


def test_prompt_batches_pass_over_all_prompts_before_any_returns():
    batches = [prompt_batch(list(range(6)), i, 4, seed=0) for i in (1, 2, 3)]
    drawn = batches[0] + batches[1] + batches[2]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6)) and drawn[:6] != drawn[6:]


# From texts to ids and back ----------------------------------------------------------------------


def ids_of(policy, prompts, responses):
    """What Policy.encode makes of texts: ids of each prompt, ids of each response."""
    rows, num = policy.encode(prompts, responses), len(prompts)
    start = rows.sequence_ids.shape[1] - rows.response_mask.shape[1]
    ids, mask = rows.sequence_ids, rows.sequence_mask
    return [(ids[i, :start][mask[i, :start]].tolist(), ids[i, start:][mask[i, start:]].tolist())
            for i in range(num)]


def test_prompt_and_response_are_encoded_apart_and_eos_ends_the_response():
    assert ids_of(make_policy(), ["the plot"] * 2, ["was good", "was bad"]) == [
        ([4, 5], [6, 8, 1]), ([4, 5], [6, 9, 1])]


def test_long_prompts_have_their_end_and_long_responses_their_beginning():
    policy = make_policy(max_prompt_len=2, response_len=2)
    assert ids_of(policy, ["a b c d"], ["a b c"]) == [([12, 13], [10, 11])]  # no EOS: it goes on


def test_a_response_that_fills_the_length_limit_has_no_eos():
    assert ids_of(make_policy(response_len=3), ["a", "a"], ["a b", "a b c"]) == [
        ([10], [10, 11, 1]), ([10], [10, 11, 12])]


def test_how_many_prompts_and_responses_were_cut_is_printed(tiny_args, tmp_path, capsys):
    rows = [{"prompt": "the plot was", "chosen": "a b", "rejected": "a"},
            {"prompt": "the plot", "chosen": "a b c", "rejected": "b"}]
    run(tiny_args, dataset=write(tmp_path / "data.jsonl", rows), eval_prompts=0, max_prompt_len=2,
        response_len=3)
    printed = capsys.readouterr().out
    assert "2 prompts, 1 of them cut to 2 tokens; 4 responses, 1 of them cut to 3" in printed


def test_a_cut_prompt_still_begins_with_its_bos():
    tokenizer = make_tokenizer(bos_token="[END]")  # id 2
    assert cut_front(tokenizer, [2, 10, 11, 12], 3) == [2, 11, 12]
    assert cut_front(tokenizer, [10, 11, 12, 13], 3) == [11, 12, 13]
    assert ids_of(make_policy(tokenizer=tokenizer, max_prompt_len=3), ["a b c"], ["d"]) == [
        ([2, 11, 12], [13, 1])]


def test_an_empty_prompt_becomes_one_token():
    assert ids_of(make_policy(), [""], ["a"]) == [([1], [10, 1])]


def bos_tokenizer(template=None, bos_by_itself=False):
    """BOS is [BOS], id 16. As in Llama 2 and 3, the tokenizer may write it in front of any text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="[BOS]")
    if bos_by_itself:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", 16)])
    tokenizer.chat_template = template
    return tokenizer


CONTENTS = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("bos_by_itself", [False, True])
@pytest.mark.parametrize("prompt", ["the plot", "[BOS]the plot", "[BOS][BOS] the plot"])
def test_bos_stands_once_in_front_of_a_string(prompt, bos_by_itself):
    tokenizer = bos_tokenizer(bos_by_itself=bos_by_itself)
    assert encode_prompts(tokenizer, [prompt]) == [[16, 4, 5]]


@pytest.mark.parametrize("bos_by_itself", [False, True])
@pytest.mark.parametrize("template", [CONTENTS, "{{ bos_token }}" + CONTENTS])
def test_bos_stands_once_in_front_of_a_chat(template, bos_by_itself):
    tokenizer = bos_tokenizer(template, bos_by_itself)
    assert encode_prompts(tokenizer, [[USER, GOOD, MORE]]) == [[16, 10, 8, 11]]


def test_bos_stands_once_in_front_of_a_chat_without_a_template_of_its_own(tmp_path):
    folder = save(tmp_path, make_lm(vocab_size=17), bos_tokenizer())
    policy = load_policy(folder, make_policy().args)
    ids = policy.encode([[USER]]).sequence_ids[0].tolist()
    assert ids[0] == 16 and ids.count(16) == 1 and 10 in ids


def test_bos_stands_nowhere_in_a_response_and_eos_nowhere_in_a_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = bos_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 16), ("[EOS]", 1)])
    assert ids_of(make_policy(tokenizer=tokenizer), ["a"], ["b"]) == [([16, 10], [11, 1])]


def test_a_tokenizer_without_bos_writes_none():
    assert encode_prompts(make_tokenizer(), ["the plot"]) == [[4, 5]]


MARKED = "{% for m in messages %}{{ m['content'] }}[END]{% endfor %}"  # [END] closes each turn


@pytest.mark.parametrize(("eos_ids", "end"), [(1, 1), ([1, 2], 2)])
def test_an_answer_ends_with_the_templates_marker_if_that_is_an_eos_of_the_model(eos_ids, end):
    lm, tokenizer = make_lm(), make_tokenizer(extra_special_tokens=["[END]"])  # Gemma's end_of_turn
    lm.generation_config.eos_token_id, tokenizer.chat_template = eos_ids, MARKED
    policy = make_policy(lm, tokenizer)
    assert ids_of(policy, [[USER]], ["good"]) == [([10, 2], [8, end])]
    assert ids_of(policy, ["a"], ["good"]) == [([10], [8, 1])]  # strings end with EOS


def test_a_template_that_raises_is_refused_in_one_sentence(tiny_args, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{% if messages[0]['role'] == 'system' %}"
                               "{{ raise_exception('no system role') }}{% endif %}" + CONTENTS)
    policy = save(tmp_path / "policy", make_lm(), tokenizer)
    data = write(tmp_path / "data.jsonl", [{"chosen": [RULES, USER, GOOD], "rejected":
                                            [RULES, USER, BAD]}] * 8)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(tiny_args, dataset=data, policy_model=policy, eval_prompts=0)
    message = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and message.startswith("ppo_rlhf.py: --policy-model")
    assert "no system role" in message


def test_the_literal_text_of_pad_in_a_demonstration_gives_a_finite_loss():
    policy = make_policy()  # PAD has probability zero, so its loss would be 3e38
    loss = sft_loss(policy, policy.encode(["the plot"], ["was [PAD] good"]))["loss"]
    without = sft_loss(policy, policy.encode(["the plot"], ["was good"]))["loss"]
    assert 0 < loss < 100 and torch.equal(loss, without)


def test_masks_come_from_lengths_so_pad_as_a_token_survives():
    rows = [[1], [1, 1, 1], [2, 3]]  # EOS is 1, and so is PAD
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, 1, side, "cpu")
        assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == rows


def decoded(response, **special):
    """Text and tokens of a response with these ids, as Policy.decode gives them."""
    policy, ids = make_policy(tokenizer=make_tokenizer(**special)), torch.tensor([[10, *response]])
    texts, tokens = policy.decode(Rollout(ids, ids >= 0, ids[:, 1:] >= 0))
    return texts[0], tokens[0]


def test_a_text_has_no_final_eos_but_its_tokens_have():
    assert decoded([5, 6, 8, 1]) == ("plot was good", ["plot", "was", "good", "[EOS]"])


def test_the_text_of_a_cut_response_has_all_its_tokens():
    assert decoded([5, 6, 8]) == ("plot was good", ["plot", "was", "good"])


def test_special_tokens_stay_in_a_text_and_nothing_is_cleaned_up():
    text, tokens = decoded([5, 2, 14], extra_special_tokens=["[END]"],
                           clean_up_tokenization_spaces=True)
    assert text == "plot [END] ." and tokens == ["plot", "[END]", "."]


def test_a_response_of_eos_alone_is_the_empty_text():
    assert decoded([1]) == ("", ["[EOS]"])


# Whole runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"prompt": "the plot", "completion": "was good"}, {"text": "the plot was good"},
    {"messages": [USER, BAD, MORE, GOOD]}])
def test_sft_datasets_with_completions_texts_and_messages_train(tiny_args, tmp_path, row):
    path = write(tmp_path / "sft.jsonl", [row] * 20)
    assert run(tiny_args, sft_dataset=path) != run(tiny_args, run_name="without")


def test_prompts_alone_are_enough_where_models_are_given(tiny_args, tmp_path):
    reward = tmp_path / "reward.py"
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"the plot {x}"} for x in "abcd"])
    reward.write_text("def f(prompts, responses):\n    return [len(x) for x in responses]\n")
    metrics = run(tiny_args, dataset=data, sft_epochs=0, reward_fn=f"{reward}:f", eval_prompts=0)
    assert len(metrics) == 2


def test_chat_data_train(tiny_args, tmp_path):
    words = ["the", "plot", "was", "dull", "good", "bad", "a", "b"]
    users = [{"role": "user", "content": f"{x} {y}"} for x in words for y in words]
    rows = [{"chosen": [user, GOOD], "rejected": [user, BAD]} for user in users]
    metrics = run(tiny_args, dataset=write(tmp_path / "chat.jsonl", rows), max_prompt_len=16)
    assert abs(metrics[-1]["ppo/ratio_first"] - 1) < 1e-5


# The embedded language ---------------------------------------------------------------------------


def test_every_drawn_review_is_in_the_language_and_survives_the_tokenizer():
    tokenizer = word_tokenizer()
    for row in load_data(Args(eval_prompts=0)).demonstrations[:500]:
        assert is_grammatical(row["prompt"], row["chosen"], True)
        ids = tokenizer(row["chosen"])["input_ids"]
        assert tokenizer.decode(ids) == row["chosen"] and len(ids) < 32


def test_demonstrations_praise_and_scorn_alike():
    rows = load_data(Args(eval_prompts=0)).demonstrations
    golds = [gold_reward(row["prompt"], row["chosen"], True) for row in rows]
    signs = Counter((gold > 0) - (gold < 0) for gold in golds)
    assert min(signs[1], signs[-1]) > 5000 and abs(signs[1] - signs[-1]) < 1500  # 20,000 in all


@pytest.mark.parametrize("review", [
    "", "the plot was", "the plot dull.", "the plot was dull", "the plot was dull. .",
    "it made me dull.", "the duel was dull.",  # a comedy has no duel
])
def test_what_the_grammar_does_not_write_is_not_in_the_language(review):
    assert not is_grammatical(COMEDY, review, True)


def test_every_genre_has_nouns_of_its_own():
    assert is_grammatical(COMEDY, "the humour was dull.", True)
    assert len({noun for nouns in GENRE_NOUNS.values() for noun in nouns.split("|")}) == 12


@pytest.mark.parametrize(("review", "gold"), [
    ("the plot was clever.", 1),
    ("the plot was clever and i loved the cast.", 2),
    ("it made me laugh. i loved the cast. the music was fresh.", 2),  # 3, cut to 2
    ("the plot was dull.", -1),
    ("the plot was clever, while the cast was dull.", 0),
    ("the plot was clever. the plot was clever.", 2 - 1),  # once repeated
    ("the plot was clever and i loved the cast. it made me laugh and i liked the plot.", 2 - 0.5),
    ("the plot clever.", -2),  # no clause, not in the language
    ("i loved the cast the", -2),
])
def test_gold_rewards_by_hand(review, gold):
    assert gold_reward(COMEDY, review, True) == gold


def test_a_review_that_never_ended_loses_two():
    assert gold_reward(COMEDY, "the plot was clever.", False) == 1 - 2
