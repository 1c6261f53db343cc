"""Claim: all formats of preference data give the same examples; the embedded language is exact.

Reference: texts small enough to read; the grammar that wrote the text also has to accept it.
Run: python -m pytest tests/test_data.py (10 seconds)
"""

import gzip
import json
import random

import pytest
from conftest import make_lm, make_tokenizer, run, save

from ppo_rlhf import (
    GENRE_NOUNS,
    Args,
    bpe_tokenizer,
    cut_prompt,
    draw_reviews,
    encode_examples,
    gold_reward,
    hold_out,
    is_grammatical,
    pad_rows,
    prompt_batch,
    prompt_text,
    read_rows,
    split_pair,
    unpad_rows,
    word_tokenizer,
)

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   [("user", "a"), ("assistant", "good"), ("assistant", "bad")])
PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}
COMEDY = "a new comedy about the war."
COLUMNS = ({"chosen", "rejected"}, {"prompt"})


# Formats of preference data ----------------------------------------------------------------------


@pytest.mark.parametrize(("row", "prompt"), [
    (PAIR, "a"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),  # UltraFeedback
    ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, [USER]),
])  # fmt: skip
def test_every_format_gives_prompt_chosen_rejected(row, prompt):
    assert split_pair(row) == (prompt, "good", "bad")


def test_hh_dialogues_part_at_the_last_shared_assistant_turn():
    shared = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
    row = {"chosen": shared + " I think so", "rejected": shared + " I do not"}
    assert split_pair(row) == (shared, " I think so", " I do not")


def test_conversations_that_part_early_are_compared_where_they_part():
    first = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD]}
    assert split_pair(first) == ([USER], "good", "bad")


def write(kind, path):
    """32 rows on disk, in one of the ways that users have them."""
    import datasets

    rows = [{**PAIR, "prompt": f"a {i}"} for i in range(32)]
    lines = "\n".join(json.dumps(row) for row in rows)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder", "folder of splits"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    rows = write(kind, path)
    assert read_rows("--dataset", str(path), "train", COLUMNS) == rows


@pytest.mark.parametrize(("content", "named"), [
    ('{"question": "a", "answer": "b"}', "has columns question, answer"),
    ('{"chosen": null, "rejected": null}', "no row with chosen/rejected"),
    ("", "cannot be read"), ('{"chosen": ', "cannot be read")])
def test_broken_or_foreign_data_are_refused_by_name(tmp_path, capsys, content, named):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit) as end:
        read_rows("--dataset", str(path), "train", COLUMNS)
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"--dataset {path}" in message and named in message


@pytest.mark.parametrize("row", [
    {"prompt": "the plot", "completion": "was good"}, {"text": "the plot was good"},
    {"prompt": [USER], "completion": [GOOD]}])
def test_sft_datasets_with_completions_texts_and_messages_train(tiny_args, tmp_path, row):
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 20))
    assert run(tiny_args, sft_dataset=str(path)) != run(tiny_args, run_name="without")


def test_prompts_alone_are_enough_where_models_are_given(tiny_args, tmp_path):
    data, reward = tmp_path / "prompts.jsonl", tmp_path / "reward.py"
    data.write_text("\n".join(json.dumps({"prompt": f"the plot {x}"}) for x in "abcd"))
    reward.write_text("def f(prompts, responses):\n    return [len(x) for x in responses]\n")
    metrics = run(tiny_args, dataset=str(data), sft_epochs=0, reward_fn=f"{reward}:f")
    assert len(metrics) == 2


def test_chat_data_and_a_model_from_scratch_train(tiny_args, tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"chosen": [{"role": "user", "content": f"say {i}"}, GOOD],
             "rejected": [{"role": "user", "content": f"say {i}"}, BAD]} for i in range(24)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    metrics = run(tiny_args, dataset=str(path), policy_model=None, max_prompt_len=32)
    assert abs(metrics[-1]["ppo/ratio_first"] - 1) < 1e-5


# From texts to ids -------------------------------------------------------------------------------


def test_prompt_and_response_are_encoded_apart_and_eos_ends_the_response():
    args = Args(max_prompt_len=8, response_len=8)
    pair = ("the plot", "was good", "was bad")
    encoded = encode_examples([pair], "pairs", make_tokenizer(), args)
    assert encoded == [([4, 5], [6, 8, 1], [6, 9, 1])]


def test_long_prompts_keep_their_end_and_long_responses_their_beginning(capsys):
    args = Args(max_prompt_len=2, response_len=2, dataset="mine")
    encoded = encode_examples([("a b c d", "a b c")], "pairs", make_tokenizer(), args)
    assert encoded == [([12, 13], [10, 11])]  # c d; a b, and no EOS: it goes on
    assert "1 prompts cut to their last 2 tokens, 1 responses" in capsys.readouterr().out


def test_a_cut_prompt_keeps_its_bos():
    assert cut_prompt([9, 1, 2, 3], 3, bos_id=9) == [9, 2, 3]
    assert cut_prompt([1, 2, 3, 4], 3, bos_id=9) == [2, 3, 4]


def test_an_empty_prompt_becomes_one_token():
    args = Args(max_prompt_len=8, response_len=8)
    assert encode_examples([("", "a")], "pairs", make_tokenizer(), args) == [([1], [10, 1])]


def test_chat_templates_bring_the_only_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="[END]")
    bos_first = TemplateProcessing(single="[END] $A", special_tokens=[("[END]", 2)])
    tokenizer.backend_tokenizer.post_processor = bos_first  # as Llama's
    tokenizer.chat_template = "[END]{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert prompt_text([USER], tokenizer) == "[END]a"
    args = Args(max_prompt_len=8, response_len=8)
    for prompt in ([USER], "a"):  # strings get their BOS from the tokenizer
        assert encode_examples([(prompt, "b")], "pairs", tokenizer, args)[0][0].count(2) == 1


def test_bpe_of_any_text_decodes_to_that_text():
    tokenizer = bpe_tokenizer(["the plot was dull"] * 10, 300)
    text = "naïve 映画 plot\n\nHuman:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_masks_come_from_lengths_so_pad_as_a_token_survives():
    rows = [[1], [1, 1, 1], [2, 3]]  # EOS is 1, and so is PAD
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, 1, side)
        assert unpad_rows(ids, mask) == rows and mask.sum() == 6


def test_prompt_batches_pass_over_all_prompts_before_any_returns():
    batches = [prompt_batch(list(range(6)), i, 4, seed=0) for i in (1, 2, 3)]
    drawn = batches[0] + batches[1] + batches[2]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6)) and drawn[:6] != drawn[6:]


def test_evaluation_prompts_are_never_trained_on(tiny_args, monkeypatch):
    import ppo_rlhf

    kept, original = [], ppo_rlhf.prepare_data
    monkeypatch.setattr(ppo_rlhf, "prepare_data", lambda x: kept.append(original(x)) or kept[0])
    run(tiny_args)
    data = kept[0][2]
    trained = data.prompts + [x[0] for x in data.demonstrations + data.comparisons]
    assert len(data.eval_prompts) == 4
    assert not {tuple(x) for x in trained} & {tuple(x) for x in data.eval_prompts}


def test_demonstrations_with_prompts_of_their_own_are_held_out_where_there_are_enough():
    examples = [([i], [1]) for i in range(8)]
    assert hold_out(examples, set(), 2) == (examples[2:], examples[:2])
    assert hold_out(examples[:7], set(), 2) == (examples[:7], examples[:2])


def test_a_policy_whose_tokenizer_is_too_big_is_refused(tiny_args, tmp_path, capsys):
    folder = save(tmp_path / "small", make_lm("Llama", vocab_size=10), make_tokenizer())
    with pytest.raises(SystemExit):
        run(tiny_args, policy_model=folder)
    assert "tokenizer has 16 tokens, its embedding 10" in capsys.readouterr().err


# The embedded language ---------------------------------------------------------------------------


def test_every_drawn_review_is_in_the_language_and_survives_the_tokenizer():
    tokenizer = word_tokenizer()
    for prompt, review in draw_reviews(500, random.Random(0)):
        assert is_grammatical(prompt, review, True)
        ids = tokenizer(review)["input_ids"]
        assert tokenizer.decode(ids) == review and len(ids) < 32


@pytest.mark.parametrize("review", [
    "", "the plot was", "the plot dull.", "the plot was dull", "the plot was dull. .",
    "it made me dull.", "the duel was dull.",  # a comedy has no duel
])  # fmt: skip
def test_what_the_grammar_does_not_write_is_not_in_the_language(review):
    assert not is_grammatical(COMEDY, review, True)


def test_every_genre_has_nouns_of_its_own():
    assert is_grammatical(COMEDY, "the humour was dull.", True)
    assert len({noun for nouns in GENRE_NOUNS.values() for noun in nouns}) == 12


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
])  # fmt: skip
def test_gold_rewards_by_hand(review, gold):
    assert gold_reward(COMEDY, review, True) == gold


def test_a_review_that_never_ended_loses_two():
    assert gold_reward(COMEDY, "the plot was clever.", False) == 1 - 2
