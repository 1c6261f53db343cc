"""Claim: the prompt that PPO continues, the demonstration that SFT learns and what a reward model
reads are one token sequence.

Reference: W, transformers' own ids of the whole: tokenizer.apply_chat_template(prompt + answer) or,
for strings, tokenizer(prompt + answer) + EOS; BOS in front once if the tokenizer puts it there.
For 4 tokenizers × 16 dialogues, either all of these hold, or W does not begin with the prompt's ids
and the row is not used:

    P  the prompt that PPO continues is the beginning of W
    S  a demonstration is P and the rest of W up to its first EOS, which is added if W has none
    R  if the policy has sampled the response of S, a reward model reads W
    C  if the response was cut at the length limit, it reads P and the tokens that were sampled

Run: python -m pytest tests/test_boundary.py (11 seconds)
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_reward_model, save, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from ppo_rlhf import Args, Rollout, decode, encode, load_data, load_policy, load_reward_model

# What is called of ppo_rlhf.py -------------------------------------------------------------------

REASON = "begin"  # what the console says about rows whose W does not begin with their prompt


def settings(**changes):
    """Args with room for every dialogue; the model counts as a given one."""
    return Args(**({"max_prompt_len": 32, "response_len": 32, "device": "cpu"} | changes))


def real(ids, mask):
    """The ids that are not padding, row by row."""
    return [x[kept].tolist() for x, kept in zip(ids, mask, strict=True)]


def prompts_of(policy, rows):
    """P: what the policy continues, row by row."""
    batch = encode(policy, rows)
    return real(batch.sequence_ids, batch.sequence_mask)


def demonstrations_of(policy, rows):
    """S: what SFT reads, and the last tokens of it, on which its loss is, row by row."""
    batch = encode(policy, rows, "chosen")
    response_ids = batch.sequence_ids[:, -batch.response_mask.shape[1] :]
    return list(zip(real(batch.sequence_ids, batch.sequence_mask),
                    real(response_ids, batch.response_mask), strict=True))


def read_by(reward_model, policy, rows, responses, ended):
    """R and C: what a reward model reads after the policy has sampled responses, row by row."""
    prompts = encode(policy, rows)
    longest = max(map(len, responses))
    ids = torch.tensor([x + [0] * (longest - len(x)) for x in responses])
    mask = torch.tensor([[True] * len(x) + [False] * (longest - len(x)) for x in responses])
    rollout = Rollout(torch.hstack([prompts.sequence_ids, ids]),
                      torch.hstack([prompts.sequence_mask, mask]), mask, ended=torch.tensor(ended))
    return real(*reward_model.encode(decode(policy, rollout, rows)))


def answers_used(policy_folder, path, rows):
    """The answers of those rows of a file that are used."""
    data = load_data(settings(dataset=write_rows(path, rows), policy_model=policy_folder,
                              eval_prompts=0, reward_model=("unused",)))
    return [row["chosen"] for row in data.demonstrations]


# Four tokenizers ---------------------------------------------------------------------------------

TEXTS = ["A: why not? B: Sure: yes we can no <think> </think>"] * 9


def train(pre_tokenizer, special, alphabet=()):
    """A BPE that knows every word of TEXTS, with the space in front of it, as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def pieces():
    """Vocabulary and merges over text in which ▁ stands for a space."""
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    model = json.loads(train(pre_tokenizers.Metaspace(), special).to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level():
    """As in GPT-2: BOS is EOS and not put in front. As in Qwen3: thoughts are set in marks."""
    eos, pad, alphabet = "<|endoftext|>", "<|pad|>", pre_tokenizers.ByteLevel.alphabet()
    tokenizer = train(pre_tokenizers.ByteLevel(add_prefix_space=False), [eos, pad], alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=eos,
                                   eos_token=eos)


def llama():
    """Puts BOS, and a space if there is no mark, in front of a text; decoding takes it away."""
    return LlamaTokenizer(*pieces(), pad_token="<pad>", add_bos_token=True)


def prepend():
    """As in Phi-3: puts a space in front of a text and behind every mark in it."""
    tokenizer = Tokenizer(models.BPE(*pieces(), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def word_level():
    """One token per word: spaces and newlines have none, decoding puts a space between all."""
    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *TEXTS[0].split()]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]",
                                   bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]")


TOKENIZERS = {make.__name__: make for make in (byte_level, llama, prepend, word_level)}


# Sixteen dialogues -------------------------------------------------------------------------------

def template(start, turn, first=""):
    """A chat template: how the prompt ends, how a turn of the assistant is written."""
    return (f"{first}{{% for m in messages %}}{{% if m.role == 'user' %}}A: {{{{ m.content }}}}\n"
            f"{{% else %}}{turn}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{start}{{% endif %}}")


CLOSED = "B: {{ m.content }}{{ eos_token }}"
THOUGHT = "<think>\nno\n</think>\n\nyes we can"
ANSWER = "{{ m.content.split('</think>')[-1] | trim }}"  # without its thought
CHATS = {  # answer in the data, how the prompt ends, turn of the assistant, how all begins
    "ends in a newline": ("yes we can", "<bot>\n", "<bot>\n{{ m.content }}<end>\n"),
    "ends in a mark": ("yes we can", "<bot>", "<bot>{{ m.content }}<end>"),
    "ends in B:": ("yes we can", "B:", CLOSED),
    "ends in a space": ("yes we can", "B: ", CLOSED),
    "closes with a newline and a mark": ("yes we can", "B:", "B: {{ m.content }}\n<end>"),
    "does not close": ("yes we can", "B:", "B: {{ m.content }}"),
    "trims": (" yes we can\n", "<bot>\n", "<bot>\n{{ m.content | trim }}<end>{{ eos_token }}"),
    "drops a thought": (THOUGHT, "B:", f"B: {ANSWER}{{{{ eos_token }}}}"),
    "adds a thought": ("yes we can", "<bot>\n", f"<bot>\n<think>\n\n</think>\n\n{ANSWER}<end>\n"),
    "begins the answer": ("Sure: yes we can", "B: Sure:", CLOSED),
    "begins a thought": (THOUGHT, "<bot>\n<think>\n", "<bot>\n{{ m.content }}<end>\n"),
    "begins a thought, drops it": (THOUGHT, "<bot>\n<think>\n", f"<bot>\n{ANSWER}<end>\n"),
    "begins with BOS": ("yes we can", "B:", CLOSED, "{{ bos_token }}"),
}
STRINGS = {  # prompt, answer
    "string, no space": ("why not?", "yes we can"),
    "string, answer begins with a space": ("why not?", " yes we can"),
    "string, prompt ends in a space": ("why not? ", "yes we can"),
}
TEMPLATES = {name: template(*how) for name, (_, *how) in CHATS.items()}
ANY_TEMPLATE = "{% set kind = messages[0].kind %}" + "".join(  # all in one: each row says which
    f"{{% if kind == '{name}' %}}{written}{{% endif %}}" for name, written in TEMPLATES.items()
) + "{% if not kind %}" + TEMPLATES["ends in a newline"] + "{% endif %}"

ALL = [(name, dialogue) for name in TOKENIZERS for dialogue in (*CHATS, *STRINGS)]
DROPPED = {("word_level", "string, no space"): "'not?yes' is one word"}
DROPPED |= {(name, "begins a thought, drops it"): "the whole has no thought, the prompt begins one"
            for name in TOKENIZERS}
RIGHT = [x for x in ALL if x not in DROPPED]


# What is right, by transformers alone ------------------------------------------------------------

def ids_of_whole(tokenizer, prompt, answer):
    """Ids of the whole dialogue: W."""
    if isinstance(prompt, str):
        return [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}])
    bos = tokenizer("")["input_ids"]  # not empty if the tokenizer puts BOS in front
    return ids["input_ids"] if ids["input_ids"][: len(bos)] == bos else bos + ids["input_ids"]


def ids_of_prompt(tokenizer, prompt):
    """Ids of the prompt. Spaces at its end belong to the first token of the answer."""
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text.rstrip(" "), add_special_tokens=False)["input_ids"]
    bos = tokenizer("")["input_ids"]
    return ids if ids[: len(bos)] == bos else bos + ids


def expected(tokenizer, dialogue):
    """Row, W, prompt and response of a dialogue; cuts: the response before "we" and "can"."""
    message = {"role": "user", "content": "why not?", "kind": dialogue}  # for ANY_TEMPLATE
    prompt, answer = STRINGS.get(dialogue) or ([message], CHATS[dialogue][0])
    start, whole = ids_of_prompt(tokenizer, prompt), ids_of_whole(tokenizer, prompt, answer)
    response = [*whole[len(start) :], tokenizer.eos_token_id]
    eos_ids = tokenizer.convert_tokens_to_ids(["<end>", tokenizer.eos_token])
    del response[next(i for i, x in enumerate(response) if x in eos_ids) + 1 :]
    cuts = [response[:i] for i, x in enumerate(response)
            if tokenizer.decode([x]).strip() in ("we", "can")]
    return SimpleNamespace(row={"prompt": prompt, "chosen": answer}, whole=whole, start=start,
                           response=response, cuts=cuts)


def make_tokenizer(name, chat_template):
    """One of the four with two marks, which are special, but not by name as EOS is."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(["<bot>", "<end>"], special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_folders(folder, tokenizer):
    """A policy and a reward model with this tokenizer on disk."""
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
    sizes |= {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    return (save(folder / "policy", make_lm(**sizes), tokenizer),
            save(folder / "reward_model", make_reward_model(**sizes), tokenizer))


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """One of the 64: what is right, the folder of a policy, and both models."""
    name, dialogue = request.param
    tokenizer = make_tokenizer(name, TEMPLATES.get(dialogue))
    folder, reward_folder = make_folders(tmp_path_factory.mktemp("case"), tokenizer)
    return SimpleNamespace(
        **vars(expected(tokenizer, dialogue)), folder=folder, tokenizer=tokenizer,
        text=tokenizer.convert_ids_to_tokens, policy=load_policy(folder, settings()),
        reward_model=load_reward_model(reward_folder, settings()))


def each_of(cases):
    """Parametrize by cases: (tokenizer, dialogue)."""
    return pytest.mark.parametrize("case", cases, indirect=True, ids=map(", ".join, cases))


# The matrix --------------------------------------------------------------------------------------

def test_the_table_of_dropped_dialogues_is_what_transformers_says():
    right = {x: expected(make_tokenizer(x[0], TEMPLATES.get(x[1])), x[1]) for x in ALL}
    dropped = {x for x in ALL if right[x].whole[: len(right[x].start)] != right[x].start}
    assert len(ALL) == 64 and dropped == set(DROPPED)


@each_of(RIGHT)
def test_prompt_demonstration_and_what_a_reward_model_reads_are_one_sequence(case, tmp_path):
    assert answers_used(case.folder, tmp_path / "data.jsonl", [case.row]) == [case.row["chosen"]]
    [prompt] = prompts_of(case.policy, [case.row])
    assert case.text(prompt) == case.text(case.start) == case.text(case.whole[: len(prompt)])
    [(found, response)] = demonstrations_of(case.policy, [case.row])
    assert case.text(found) == case.text(case.start + case.response)
    assert case.text(response) == case.text(case.response)
    [found] = read_by(case.reward_model, case.policy, [case.row], [case.response], [True])
    assert case.text(found) == case.text(case.whole)


@each_of(RIGHT)
def test_over_the_limit_a_response_is_cut_and_not_closed_and_a_prompt_keeps_bos_and_its_end(case):
    policy = load_policy(case.folder, settings(response_len=len(case.cuts[1])))
    assert demonstrations_of(policy, [case.row]) == [(case.start + case.cuts[1], case.cuts[1])]
    found = read_by(case.reward_model, policy, [case.row] * 2, case.cuts, [False] * 2)
    assert [case.text(x) for x in found] == [case.text(case.start + cut) for cut in case.cuts]
    policy = load_policy(case.folder, settings(max_prompt_len=4))
    bos = case.start[: case.start[0] == case.tokenizer.bos_token_id]
    kept = bos + case.start[len(bos) :][-(4 - len(bos)) :]
    assert prompts_of(policy, [case.row]) == [kept]
    assert demonstrations_of(policy, [case.row]) == [(kept + case.response, case.response)]
    assert read_by(case.reward_model, policy, [case.row], [case.response], [True]) == [case.whole]


@each_of([(name, "drops a thought") for name in TOKENIZERS])
def test_a_sampled_thought_that_the_template_drops_is_not_scored_and_a_cut_one_raises_nothing(case):
    ids = case.tokenizer(THOUGHT, add_special_tokens=False)["input_ids"]
    cuts = [ids[: i + 1] for i in range(len(ids))]
    found = read_by(case.reward_model, case.policy, [case.row] * len(ids), cuts, [False] * len(ids))
    assert all(x[: len(case.start)] == case.start for x in found)
    assert case.text(found[-1]) == case.text(case.whole[:-1])  # without EOS


# Rows of a file, and a batch of all dialogues ----------------------------------------------------

@each_of(DROPPED)
def test_rows_whose_whole_begins_otherwise_are_dropped_counted_and_named(case, tmp_path, capsys):
    # No answer, or a thought that does not end, is written behind these prompts as it is.
    fine = "<think>\nyes we can" if "<think>" in case.row["chosen"] else ""
    rows = [case.row, {**case.row, "chosen": fine}, case.row]
    assert answers_used(case.folder, tmp_path / "data.jsonl", rows) == [fine]
    said = capsys.readouterr().out
    assert "1 of 3 rows" in said and REASON in said


@pytest.mark.parametrize("name", TOKENIZERS)
def test_dialogues_of_all_kinds_in_one_batch_are_encoded_as_each_alone(name, tmp_path):
    tokenizer = make_tokenizer(name, ANY_TEMPLATE)
    policy_folder, reward_folder = make_folders(tmp_path, tokenizer)
    policy = load_policy(policy_folder, settings())
    right = [expected(tokenizer, dialogue) for x, dialogue in RIGHT if x == name]
    rows = [x.row for x in right]
    assert prompts_of(policy, rows) == [x.start for x in right]
    assert demonstrations_of(policy, rows) == [(x.start + x.response, x.response) for x in right]
    reward_model, num = load_reward_model(reward_folder, settings()), len(rows)
    responses = [x.response for x in right] + [x.cuts[1] for x in right]
    found = read_by(reward_model, policy, rows * 2, responses, [True] * num + [False] * num)
    assert found == [x.whole for x in right] + [x.start + x.cuts[1] for x in right]
