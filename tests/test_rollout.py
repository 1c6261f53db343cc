"""Claim: sampling, the passes over a padded row, and scoring all read the same texts and policy.

Reference: the models' own unpadded forward pass; tables of probabilities small enough to see
through; arithmetic in the comments.
Run: python -m pytest tests/test_rollout.py (25 seconds)
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, make_lm, make_policy, make_reward_model, make_tokenizer, run, save
from safetensors.torch import load_file, save_file

import ppo_rlhf as ppo

PROMPTS = ["the", "plot was dull good", "bad a"]  # ids 4 | 5 6 7 8 | 9 10
RESPONSES = [" b c", " d", " . , the plot"]  # 11 12 EOS | 13 EOS | 14 15 4 5, cut before its EOS
ROWS = [{"prompt": x, "chosen": y} for x, y in zip(PROMPTS, RESPONSES, strict=True)]
MANY_WORDS = make_tokenizer([f"w{i}" for i in range(4, 150_000)])
USER = {"role": "user", "content": "the plot"}


def args_of(**settings):
    """Settings with which the third of RESPONSES is cut."""
    return make_policy(**({"response_len": 4} | settings)).args


def table_lm(table):
    """A Llama without layers whose logits are a table: row = current token, column = next token."""
    lm = make_lm(num_hidden_layers=0, rms_norm_eps=0.0, vocab_size=table.shape[1])
    lm.model.embed_tokens.weight.data = torch.eye(table.shape[1], 16)
    lm.lm_head.weight.data = table.T / 4  # the norm multiplies one-hot vectors by √16 = 4
    return lm


def chain(rows):
    """A language model of given probabilities: chain({"a": {"b": 1.0}}) writes b behind every a."""
    ids = make_tokenizer().get_vocab()
    table = torch.full((16, 16), -1e4)  # softmax makes 0 of it
    for word, following in rows.items():
        for other, probability in following.items():
            table[ids[word], ids[other]] = math.log(probability)
    return table_lm(table)


def real_ids(batch, i):
    """Row i without padding: ids of the prompt, ids of the response."""
    response_len = int(batch.response_mask[i].sum())
    ids = batch.sequence_ids[i][batch.sequence_mask[i]]
    return ids[: len(ids) - response_len], ids[len(ids) - response_len :]


def own_logprobs(lm, prompt, response, temperature, num_words):
    """log softmax(logits / temperature) of the unpadded model over the tokenizer's words, before
    each response token: of these tokens (response_len,), of all words (response_len, vocab)."""
    logits = lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
    logits[:, num_words:] = -torch.inf
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, response[:, None])[:, 0], logprobs


def with_critic(policy, trunk=None):
    """A critic that adds up the hidden state, so that values are not all equal."""
    policy.critic = ppo.Critic(policy.lm.get_output_embeddings().in_features, trunk)
    policy.critic.head.weight.data[:], policy.critic.head.bias.data[:] = 1.0, 0.0
    return policy


# One padded row ----------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=FAMILIES)
def models(request, folder):
    """Folders of a language model and of a classifier with other weights. Both have dropout, and an
    output row more than the tokenizer has words (but Qwen2, whose tokenizer grows)."""
    tokenizer = make_tokenizer(pad_token=None)
    return [save(folder / f"{request.param}{i}", make(request.param, i, vocab_size=17), tokenizer)
            for i, make in enumerate((make_lm, make_reward_model))]


@pytest.fixture(scope="module")
def batch():
    """Three prompts padded on the left, three responses padded on the right."""
    return ppo.encode(make_policy(response_len=4), ROWS, "chosen")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ragged_rows_are_read_as_the_unpadded_model_reads_them(models, batch, checkpointing):
    policy = with_critic(ppo.load_policy(models[0], args_of(gradient_checkpointing=checkpointing)))
    logprobs, values, entropies = policy.train(checkpointing)(batch, 0.7, with_entropies=True)
    assert torch.allclose(policy(batch, 0.7)[0], logprobs, atol=1e-5)
    assert all((x[~batch.response_mask] == 0).all() for x in (logprobs, values, entropies))
    policy.eval()
    for i, real in enumerate(batch.response_mask):
        ids = real_ids(batch, i)
        own, dist = own_logprobs(policy.lm, *ids, 0.7, len(policy.tokenizer))
        output = policy.lm(torch.cat(ids)[None], output_hidden_states=True)
        own_values = output.hidden_states[-1][0, len(ids[0]) - 1 : -1].sum(-1)
        assert torch.allclose(logprobs[i][real], own, atol=1e-5)
        assert torch.allclose(values[i][real], own_values, atol=1e-5)
        assert torch.allclose(entropies[i][real], torch.special.entr(dist.exp()).sum(-1), atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_separate_critic_starts_as_the_score_of_the_text_so_far(models, batch, checkpointing):
    args = args_of(gradient_checkpointing=checkpointing, critic="separate")
    policy, reward_model = ppo.load_policy(models[0], args), ppo.load_reward_model(models[1], args)
    scorer = ppo.Scorer([reward_model], args)
    scorer.offset, scorer.scale = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    policy.critic = ppo.make_critic(policy, scorer, 7.0, args)
    _, values, _ = policy.train(checkpointing)(batch, 1.0)
    for i in range(3):
        ids, classifier = real_ids(batch, i), reward_model.classifier
        for t in range(len(ids[1])):
            score = classifier(torch.cat(ids)[None, : len(ids[0]) + t]).logits[0, 0]
            assert abs(values[i, t] - (score - 0.5) / 2) < 1e-5


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("source", [{"reward_model": ("given",)}, {"reward_fn": "f.py:f"}])
def test_without_a_reward_model_of_stage_2_the_critic_starts_at_the_mean_return(
        batch, critic, source):
    args, policy = args_of(critic=critic, **source), make_policy(make_lm("GPT2"))
    policy.critic = ppo.make_critic(policy, ppo.Scorer([None], args), -1.5, args)
    assert (policy(batch, 1.0)[1] == torch.where(batch.response_mask, -1.5, 0)).all()
    policy.critic.head.weight.data[:], policy.critic.head.bias.data[:] = 1.0, 0.0
    shared = with_critic(make_policy(make_lm("GPT2")))  # it reads the trunk of the policy
    assert torch.allclose(policy(batch, 1.0)[1], shared(batch, 1.0)[1], atol=1e-5)


def test_log_probability_and_entropy_by_hand():
    policy = make_policy(chain({"the": {"a": 0.9, "b": 0.1},
                                "a": {"[EOS]": 0.25, "a": 0.25, "b": 0.5}}))
    batch = ppo.encode(policy, [{"prompt": "the", "chosen": " a"}], "chosen")
    logprobs, _, entropies = policy(batch, 1.0, with_entropies=True)
    # -log 0.9 = 0.105 is that of the sampled token; -0.9·log 0.9 - 0.1·log 0.1 = 0.325.
    assert logprobs[0].tolist() == pytest.approx([-0.10536, -math.log(4)], abs=1e-5)
    assert entropies[0].tolist() == pytest.approx([0.32508, 1.5 * math.log(2)], abs=1e-5)


@pytest.mark.parametrize("num_tokens", [3, 50])  # 50 rows of logits are too many for one chunk
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the hidden states
def test_log_probabilities_and_gradients_in_chunks_are_those_of_log_softmax(
        num_tokens, with_bias, dtype):
    lm, ids = make_lm(vocab_size=150_000), torch.randint(150_000, (1, num_tokens + 1))
    lm.lm_head.bias = torch.nn.Parameter(torch.randn(150_000)) if with_bias else None
    policy, real = make_policy(lm, MANY_WORDS), ids >= 0
    lm.model.to(dtype)
    found, _, _ = policy(ppo.Rollout(ids, real, real[:, 1:], real[:, 0]), 0.7)
    hidden = policy.states(lm.model, ids, real)[:, :-1].float()
    own = (lm.lm_head(hidden) / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert found.dtype == torch.float32 and torch.allclose(found, own, atol=1e-5)
    for x in (*lm.lm_head.parameters(), lm.model.norm.weight):
        first, second = (torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0].float()
                         for y in (found, own))
        assert (first - second).norm() < (1e-5 if x.dtype == torch.float32 else 1e-2) * first.norm()


def test_loaded_models_have_no_dropout_although_their_saved_configs_have(models, batch):
    for folder, load, read in zip(models, (ppo.load_policy, ppo.load_reward_model), (
            (batch, 1.0), ([record("the", " was")],)), strict=True):
        model = load(folder, args_of()).train()
        saved, loaded = json.loads(Path(folder, "config.json").read_text()), vars(
            next(model.children()).config)
        assert 0.1 in [value for name, value in saved.items() if "drop" in name]
        assert not any(loaded[name] for name in saved if name.endswith(("drop", "dropout")))
        assert torch.equal(model(*read)[0], model(*read)[0])


def test_bfloat16_changes_the_products_but_returns_float32(batch):
    exact, rounded = (make_policy(dtype=x)(batch, 1.0)[0] for x in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 1


def filled(policy, reference, rows):
    """A rollout with random scores, and its advantages."""
    rollout = ppo.collect_rollout(policy, reference, rows, 0, policy.args)
    rollout.scores = torch.randn(len(rows))
    rollout.advantages, rollout.returns = ppo.compute_advantages(rollout, 0.1, policy.args)
    return rollout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_each_layer_once_more_in_the_backward_pass(
        policy_folder, checkpointing):
    args = args_of(gradient_checkpointing=checkpointing, response_len=8, update_epochs=1)
    policy, passes = with_critic(ppo.load_policy(policy_folder, args)), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    assert policy.lm.lm_head.weight is policy.lm.transformer.wte.weight  # tied, nothing is missing
    rollout = filled(policy, policy, ROWS)
    policy.lm.transformer.h[0].attn.register_forward_hook(lambda *_: passes.append(1))
    ppo.update_policy(policy, optimizer, rollout, 0.1, [], 0, args)
    assert len(passes) == 1 + checkpointing
    # transformers drops the cache of a model that is in train() and checkpoints gradients.
    again = ppo.collect_rollout(policy, None, ROWS, 0, args)
    assert again.response_mask.sum() > 6
    assert torch.equal(again.sequence_ids, rollout.sequence_ids)


# Sampling ----------------------------------------------------------------------------------------

FOUR = {"the": {"[EOS]": 0.1, "a": 0.2, "b": 0.3, "c": 0.4}}  # cumulative: 0.1, 0.3, 0.6, 1.0
THREE = {"the": {"was": 0.25, "dull": 0.25, "bad": 0.5}}  # other tokens stand between these


def first_ids(policy, noise, temperature=1.0):
    """The ids that follow "the" (id 4), one for each number of noise."""
    ids = torch.full((len(noise), 1), 4)
    prompts = ppo.Rollout(ids, ids > 0, ids[:, :0] > 0, ids[:, 0] < 0)
    return ppo.sample_tokens(policy, prompts, torch.as_tensor(noise)[:, None],
                         temperature).sequence_ids[:, 1]


@pytest.mark.parametrize(("rows", "temperature", "noise", "words"), [
    (FOUR, 1.0, [0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.99], "[EOS] [EOS] a a b b c c"),
    # At temperature 1/2 probabilities are squared: 1 : 4 : 9 : 16, cumulative 0.03, 0.17, 0.47, 1.
    (FOUR, 0.5, [0.02, 0.16, 0.46, 0.48], "[EOS] a b c"),
    # Tokens of probability 0 are never drawn, at no edge; 1 - 2**-24 is the largest noise.
    (THREE, 1.0, [0.0, 0.25, 0.5, 1 - 2**-24], "was dull bad bad"),
])
def test_a_uniform_number_selects_the_token_in_whose_interval_it_falls(
        rows, temperature, noise, words):
    policy = make_policy(chain(rows))
    assert policy.tokenizer.decode(first_ids(policy, noise, temperature)) == words


@pytest.mark.parametrize(("noise", "drawn"), [(0.0, 0), (1 - 2**-24, 15)])
def test_no_id_without_a_text_is_sampled_even_at_the_end_of_the_vocabulary(noise, drawn):
    for seed in range(50):  # sums of 16 probabilities that round to below, to above, and to 1
        table = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
        table[:, 16:] = 9.0
        assert first_ids(make_policy(table_lm(table)), [noise]) == drawn


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_with_150_000_tokens_the_sampler_is_accurate_to_a_millionth(spread):
    # The token that is drawn at u contains u in its interval of a cumulative sum in float64.
    torch.manual_seed(0)
    logits, noise = spread * torch.randn(150_000), torch.linspace(0, 1 - 2**-24, 100)
    tokens = first_ids(make_policy(table_lm(logits.expand(16, -1)), MANY_WORDS), noise)
    cumulative = torch.cat([logits.double().softmax(-1).cumsum(-1), torch.zeros(1)])
    below, above = cumulative[tokens - 1] - noise, noise - cumulative[tokens]
    assert torch.maximum(below, above).max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_with_a_cache_has_the_tokens_and_logprobs_of_the_unpadded_models(family):
    policy, reference = (make_policy(  # id 16 has no text, and only EOS, which is PAD, ends
        make_lm(family, seed, vocab_size=17), make_tokenizer(pad_token=None), response_len=20,
        temperature=2.0) for seed in (10, 3))
    rows = ppo.collect_rollout(policy, reference, ROWS * 4, 0, policy.args)
    noise = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    lens = rows.response_mask.sum(dim=1)
    assert lens.min() < 8 and lens.max() == 20  # some rows end while others go on
    for i, real in enumerate(rows.response_mask):
        ids = real_ids(rows, i)
        own, dist = own_logprobs(policy.lm, *ids, 2.0, 16)
        drawn = (dist.exp().cumsum(-1) <= noise[i][real][:, None]).sum(-1)  # number of tokens below
        assert torch.equal(drawn, ids[1])
        assert (drawn == 1).nonzero().tolist() == [[len(drawn) - 1]] * bool(rows.ended[i])  # EOS
        assert torch.allclose(rows.old_logprobs[i][real], own, atol=1e-5)
        ref, _ = own_logprobs(reference.lm, *ids, 2.0, 16)
        assert torch.allclose(rows.ref_logprobs[i][real], ref, atol=1e-5)


def sample(policy, prompts, seed=0):
    """Sampled responses to prompts."""
    return ppo.collect_rollout(policy, None, [{"prompt": x} for x in prompts], seed, policy.args)


ENDINGS = {"a": {"b": 1.0}, "b": {"[EOS]": 1.0}, "c": {"c": 1.0}}  # b, then EOS; c for ever


def test_a_row_ends_with_eos_and_has_nothing_but_padding_after_it():
    policy, passes = make_policy(chain(ENDINGS), response_len=4), []
    rows = sample(policy, ["a", "[EOS] c", "b"])  # an EOS in a prompt ends nothing
    assert rows.sequence_ids[:, 2:].tolist() == [[11, 1, 0, 0], [12, 12, 12, 12], [1, 0, 0, 0]]
    assert rows.response_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows.sequence_mask[:, :2].tolist() == [[0, 1], [1, 1], [0, 1]]
    assert rows.ended.tolist() == [True, False, True]
    policy.lm.model.register_forward_hook(lambda *_: passes.append(1))
    sample(policy, ["a", "b"])
    assert len(passes) == 2  # when all rows have ended, sampling stops


@pytest.mark.parametrize("listed", [2, [1, 2], [2, 12], [12, 1, 2]])  # 12 is the ordinary word c
def test_each_special_token_of_the_generation_config_and_pad_end_a_response(listed):
    lm = chain({"a": {"[END]": 1.0}, "b": {"[EOS]": 1.0}, "d": {"[PAD]": 1.0}, "c": {"c": 1.0}})
    lm.generation_config.eos_token_id = listed  # a list in chat models
    rows = sample(make_policy(lm), ["a", "b", "d", "c"])
    assert rows.ended.tolist() == [True, True, True, False]
    assert rows.response_mask.sum(dim=1).tolist() == [1, 1, 1, 8]
    assert rows.sequence_ids[:3, 1].tolist() == [2, 1, 0]


def test_generate_of_the_saved_policy_samples_what_ppo_trained(tmp_path):
    lm = make_lm(vocab_size=18)
    lm.generation_config.update(eos_token_id=[1, 2, 5], do_sample=True, top_p=0.3,
                                repetition_penalty=2.0)
    folder = save(tmp_path, lm, make_tokenizer())
    ppo.load_policy(folder, args_of(temperature=0.5)).lm.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert config["do_sample"] and config["temperature"] == 0.5
    assert config["top_p"] == 1.0 and config["top_k"] == 0 and "repetition_penalty" not in config
    assert config["eos_token_id"] == [0, 1, 2]  # PAD and both ends; 5 is an ordinary word
    assert config["suppress_tokens"] == [16, 17]  # they have no text


@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen3Next"])
def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero(family, microbatch_size, tmp_path):
    # The integration test that matters most.
    folder = save(tmp_path, make_lm(family), make_tokenizer())
    args = args_of(temperature=0.7, response_len=8, microbatch_size=8, update_epochs=1)
    policy, reference = with_critic(ppo.load_policy(folder, args)), ppo.load_policy(folder, args)
    rollout = filled(policy, reference, ROWS * 8)
    args = replace(args, microbatch_size=microbatch_size, minibatch_size=24)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    stats = ppo.update_policy(policy, optimizer, rollout, 0.1, [], 0, args)
    assert stats["log_ratio_max"] < 1e-5 and stats["clipfrac"] == 0
    assert abs(stats["approx_kl"]) < 1e-6
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() < 1e-5


# What a reward model reads, and a reward function gets -------------------------------------------

MARKED = ("{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
          "{{ m['content'] }} [END]{% endfor %}")  # "<user> the plot [END]<bot> was good [END]"


def chat_tokenizer(chat_template, bos):
    """A tokenizer that knows the words of two chat templates, and puts <s> first if bos."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=chat_template, bos_token="<s>")
    tokenizer.add_tokens(["<user>", "<bot>", "Human", "Assistant", ":"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A" if bos else "$A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return tokenizer


def load_rm(folder, tokenizer, classifier=None):
    """A reward model that was saved and loaded: a small Llama unless it is another."""
    classifier = classifier or make_reward_model(vocab_size=24)
    return ppo.load_reward_model(save(folder, classifier, tokenizer), args_of())


def record(prompt, response, ended=True):
    """What is scored."""
    return {"prompt": prompt, "response": response, "ended": ended}


def read_by(reward_model, prompt, response, ended=True):
    """The text, special tokens included, that a reward model reads."""
    ids, mask = reward_model.encode([record(prompt, response, ended)])
    return reward_model.tokenizer.decode(ids[0][mask[0]])


@pytest.mark.parametrize(("template", "bos", "prompt", "text", "closing"), [
    (None, False, [USER], "Human : the plot Assistant : was good", " [EOS]"),
    (MARKED, True, "<s> the plot", "<s> the plot was good", " [EOS]"),  # <s> is there exactly once
    ("<s>" + MARKED, True, [USER], "<s> <user> the plot [END] <bot> was good", " [END]"),
])
def test_a_reward_model_reads_its_template_and_a_closing_marker_if_the_response_has_ended(
        tmp_path, template, bos, prompt, text, closing):
    reward_model = load_rm(tmp_path, chat_tokenizer(template, bos))
    assert read_by(reward_model, prompt, " was good", ended=True) == text + closing
    assert read_by(reward_model, prompt, " was good", ended=False) == text


@pytest.mark.parametrize(("bos", "text"), [(None, "a b c [EOS]"), ("the", "the b c [EOS]")])
def test_a_text_too_long_for_the_model_or_its_tokenizer_loses_its_beginning_but_bos(
        tmp_path, bos, text):
    short_model = make_reward_model(max_position_embeddings=4)
    for reward_model in (
            load_rm(tmp_path, make_tokenizer(bos_token=bos), short_model),
            load_rm(tmp_path, make_tokenizer(bos_token=bos, model_max_length=4))):
        assert read_by(reward_model, "the plot", " a b c") == text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_texts_beside_it(tmp_path, family):
    reward_model = load_rm(tmp_path, make_tokenizer(), make_reward_model(family, vocab_size=20))
    records = [record(*x) for x in zip(PROMPTS, RESPONSES, [True, True, False], strict=True)]
    alone = torch.cat([reward_model([x]) for x in records])
    assert torch.allclose(reward_model(records), alone, atol=1e-5)
    assert len(alone.unique()) == 3


@pytest.mark.parametrize("in_tokenizer", ["[PAD]", "[EOS]", None])
@pytest.mark.parametrize("in_config", [None, 0, 1, -1])  # early Llamas have -1, which is no PAD
def test_our_reward_model_reads_eos_a_given_one_keeps_its_pad(in_tokenizer, in_config, tmp_path):
    lm = make_lm(pad_token_id=in_config)
    folder = save(tmp_path, lm, make_tokenizer(pad_token=in_tokenizer))
    reward_model = ppo.load_reward_model(folder, args_of(), new_head=True)
    scores = reward_model([record("the plot", " was"), record("the plot", " was", ended=False),
                           record("the plot", " was a b c d")])
    hidden = lm.base_model(torch.tensor([[4, 5, 6, 1]])).last_hidden_state[0]
    expected = reward_model.classifier.score(hidden[[3, 2]])[:, 0]
    assert torch.allclose(scores[:2], expected, atol=1e-5) and scores[0] != scores[1]
    classifier = make_reward_model(pad_token_id=in_config)  # with PAD 1 it is blind to EOS
    reward_model = load_rm(tmp_path, make_tokenizer(pad_token=in_tokenizer), classifier)
    records = [record("the plot", " was"), record("the plot", " was a b c d")]
    alone = [classifier(torch.tensor([ids])).logits[0, 0]
             for ids in ([4, 5, 6, 1], [4, 5, 6, 10, 11, 12, 13, 1])]
    assert torch.allclose(reward_model(records), torch.stack(alone), atol=1e-5)


def test_the_tokens_that_a_reward_function_gets_join_to_the_response(tmp_path):
    # One token per byte: é has two and ☺ three. A token that ends within a character adds nothing.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["[PAD]", "[EOS]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = save(tmp_path, make_lm(vocab_size=258), transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]"))
    policy = ppo.load_policy(folder, args_of(response_len=8, policy_model=folder))
    rows = [{"prompt": "a", "chosen": " né☺"}, {"prompt": "a", "chosen": " né☺ é☺"}]
    records = ppo.decode(policy, ppo.encode(policy, rows, "chosen"), rows)
    (tmp_path / "f.py").write_text("def f(prompts, responses, tokens):\n"
                                   "    assert [''.join(x) for x in tokens] == [\n"
                                   "        responses[0] + '[EOS]', responses[1]]\n"
                                   "    return [[len(x) for x in row] for row in tokens]\n")
    lens = ppo.load_reward_fn(f"{tmp_path}/f.py:f", policy.args, {})(records)
    assert [x["response"] for x in records] == [" né☺", " né☺ "]  # the second is cut at its limit
    assert lens.tolist() == [[1, 1, 0, 1, 0, 0, 1, 5], [1, 1, 0, 1, 0, 0, 1, 1]]


def test_a_padding_token_that_also_stands_for_unknown_words_ends_no_response(tmp_path):
    folder = save(tmp_path, make_lm(), make_tokenizer(pad_token="[UNK]", unk_token="[UNK]"))
    policy = ppo.load_policy(folder, args_of(policy_model=folder))
    assert policy.eos_ids == [1]
    assert ppo.encode(policy, [{"prompt": "the", "chosen": " Plot was"}], "chosen").ended.all()


def test_templates_may_refuse_empty_answers_not_change_letters_and_functions_get_copies(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content or raise_exception('empty') }}"
                               " [END] {% endfor %}")
    assert ppo.render(tokenizer, [USER], "") == "the plot [END]  [END] "
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | title }} [END] {% endfor %}"
    with pytest.raises(ValueError, match="letter by letter"):
        ppo.frame(tokenizer, [USER])
    (tmp_path / "f.py").write_text("f = lambda prompts, responses: [len(x.pop()) for x in prompts]")
    row = record([USER], "") | {"response_ids": [1]}
    assert ppo.load_reward_fn(f"{tmp_path}/f.py:f", args_of(), row)([row]) == 2
    assert row["prompt"] == [USER]


def test_a_reward_function_may_use_processes_and_an_error_in_them_is_named(tmp_path, capsys):
    (tmp_path / "pooled.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "def one(response): return 1 / len(response)\n"
        "def f(prompts, responses):\n"
        "    with ProcessPoolExecutor(1) as pool: return list(pool.map(one, responses))\n")
    scores_of = ppo.load_reward_fn(f"{tmp_path}/pooled.py:f", args_of(), {})
    assert scores_of([record("a", " b") | {"response_ids": [1]}]).tolist() == [0.5]
    with pytest.raises(SystemExit):
        scores_of([record("a", "") | {"response_ids": [1]}])
    assert "(ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_models_that_also_read_images_and_a_token_that_no_text_has_are_accepted(tmp_path):
    # As in Gemma 3: settings of the text model in a config of their own, a token without a vector.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=sizes | {"vocab_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 1,
                             "head_dim": 8, "attention_dropout": 0.1, "pad_token_id": 0},
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=10, boi_token_index=11, eoi_token_index=12)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"])  # id 16 of 16
    folder = save(tmp_path, transformers.Gemma3ForConditionalGeneration(config), tokenizer)
    policy = ppo.load_policy(folder, args_of())
    assert policy.lm.config.text_config.attention_dropout == 0
    assert real_ids(ppo.encode(policy, ROWS, "chosen"), 1)[1].tolist() == [13, 1]
    reward_model = ppo.load_reward_model(folder, args_of(), new_head=True)
    records = [record(*x) for x in zip(PROMPTS, RESPONSES, [True, True, False], strict=True)]
    alone = torch.cat([reward_model([x]) for x in records])
    assert torch.allclose(reward_model(records), alone, atol=1e-5)
    tokenizer.pad_token = "<image>"  # now it is needed
    with pytest.raises(ValueError, match="more tokens than the model"):
        ppo.load_policy(save(tmp_path / "pad", policy.lm, tokenizer), args_of())


TRIAL = ppo.Data([{"prompt": [USER]}], [], [], held_out=ppo.Data([], [], []))
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("flag", "make", "lost", "reason"), [
    ("policy_model", make_lm, "lm_head.weight", "no weights for lm_head.weight"),
    ("policy_model", make_lm, UP, f"no weights for {UP}"),
    ("policy_model", make_lm, "model.safetensors", "safetensors"),  # pickled weights
    ("policy_model", lambda: make_lm("Gemma2"), None, "more than an output layer"),  # it caps
    ("policy_model", lambda: make_lm("Gemma2", final_logit_softcapping=30.0), None, "cap logits"),
    ("policy_model", lambda: make_lm("Cohere"), None, "more than an output layer"),  # it scales
    ("policy_model", lambda: make_lm("Mamba", state_size=4), None, "cannot be used"),  # no KV cache
    ("reward_model", make_reward_model, "score.weight", "no weights for score.weight"),
    ("reward_model", make_reward_model, UP, f"no weights for {UP}"),
    ("reward_model", lambda: make_lm(num_labels=1), None, "no weights for score.weight"),
])
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(
        tmp_path, policy_folder, capsys, flag, make, lost, reason):
    folder, path = save(tmp_path, make(), make_tokenizer()), tmp_path / "model.safetensors"
    torch.save(weights := load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    if lost != path.name:
        weights.pop(lost, None)
        save_file(weights, path, {"format": "pt"})
    given = {flag: folder if flag == "policy_model" else (folder,)}
    with pytest.raises(SystemExit) as end:
        ppo.try_models(TRIAL, replace(args_of(), **({"policy_model": policy_folder} | given)))
    message = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and reason in message and message.endswith(".")
    assert message.startswith(f"ppo_rlhf.py: --{flag.replace('_', '-')} {folder} cannot be used (")


def test_the_trial_shows_how_the_reward_model_reads_an_answer(tmp_path, policy_folder, capsys):
    folder = save(tmp_path, make_reward_model(vocab_size=24), chat_tokenizer(MARKED, bos=False))
    ppo.try_models(TRIAL, replace(args_of(), policy_model=policy_folder, reward_model=(folder,)))
    assert "reward input '<user> the plot [END] <bot> " in capsys.readouterr().out


# Scores and metrics ------------------------------------------------------------------------------

def test_an_ensemble_scores_the_mean_minus_coef_times_the_standard_deviation():
    sources = [lambda records, x=x: torch.tensor(x) for x in ([1.0, 10.0], [3.0, 20.0])]
    scores, std = ppo.Scorer(sources, args_of(ensemble_coef=0.5))([{}, {}])
    assert std.tolist() == [1.0, 5.0] and scores.tolist() == [1.5, 12.5]
    alone, none = ppo.Scorer(sources[:1], args_of())([{}, {}])
    assert alone.tolist() == [1.0, 10.0] and none.tolist() == [0.0, 0.0]


def run_chain(folder, rows, scores, **settings):
    """PPO on a policy of given probabilities, which it hardly changes. Returns: its metrics. scores
    are those of a reward function for each prompt (a letter)."""
    (folder / "data.jsonl").write_text("\n".join(f'{{"prompt": "{x}"}}' for x in scores))
    (folder / "f.py").write_text(f"def f(prompts, _):\n    return [{scores}[x] for x in prompts]")
    policy = save(folder / "policy", chain(rows), make_tokenizer())
    usual = {"total_episodes": 2, "batch_size": 1, "minibatch_size": 1,
             "reward_fn": f"{folder}/f.py:f"}
    return run(ppo.Args(
        dataset=str(folder / "data.jsonl"), policy_model=policy, sft_epochs=0, eval_prompts=0,
        max_prompt_len=4, response_len=4, learning_rate=1e-9, device="cpu", run_name="run",
        output_dir=str(folder), **(usual | settings)))


@pytest.mark.parametrize(("values", "settings", "scores"), [
    ([1.0, 5.0], {"norm_scores": True}, [-1, 1]),  # mean 3, std 2
    ([1.0, 5.0], {}, [1, 5]),  # a function's scores are raw
    ([4.0, 4.0], {"norm_scores": True}, [0, 0]),  # a sparse reward that is equal is only shifted
    ([[0.5, 0.5], [1.5, 3.5]], {"norm_scores": True}, [0.5, 2.5]),  # per token: only scaled
])
def test_scores_are_normalised_on_responses_of_the_sft_policy(tmp_path, values, settings, scores):
    # Both responses are "b [EOS]"; a batch has one.
    metrics = run_chain(tmp_path, ENDINGS | {"c": {"b": 1.0}},
                        dict(zip("ac", values, strict=True)), **settings)
    assert sorted(x["rollout/score"] for x in metrics) == pytest.approx(scores, abs=1e-5)


def test_each_model_of_an_ensemble_is_normalised_by_itself(tmp_path):
    # Of two responses one has score 1 and the other -1: where models disagree, mean 0 and std 1.
    folders = [save(tmp_path / str(i), make_reward_model(seed=i), make_tokenizer()) for i in (0, 1)]
    records = [record("a", " b"), record("d", " b")]
    raw = [ppo.load_reward_model(x, args_of())(records) for x in folders]
    agree = (raw[0][0] > raw[0][1]) == (raw[1][0] > raw[1][1])
    metrics = run_chain(tmp_path, ENDINGS | {"d": {"b": 1.0}}, {"a": 0, "d": 0},
                        reward_fn=None, reward_model=tuple(folders))
    expected = ([-1, 1], [0, 0]) if agree else ([-1, -1], [1, 1])
    for name, values in zip(("rollout/score", "rollout/score_std"), expected, strict=True):
        assert sorted(x[name] for x in metrics) == pytest.approx(values, abs=1e-4)


def test_the_metrics_of_three_responses_by_hand(tmp_path):
    # a -> plot was plot was, or was plot was plot; b -> good [EOS]; c -> good [EOS].
    sure = [("plot", "was"), ("was", "plot"), ("b", "good"), ("c", "good"), ("good", "[EOS]")]
    rows = {x: {y: 1.0} for x, y in sure} | {"a": {"plot": 0.5, "was": 0.5}}
    metrics, = run_chain(tmp_path, rows, {"a": 1, "b": 2, "c": 6}, total_episodes=3, batch_size=3,
                         minibatch_size=3)
    found = {name.removeprefix("rollout/"): value for name, value in metrics.items()}
    assert found["ended"] == pytest.approx(2 / 3) and found["score"] == 3
    assert found["response_len"] == pytest.approx((4 + 2 + 2) / 3)
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    # Of sampled tokens, -log π is log 2, 0, 0, 0 | 0, 0 | 0, 0: the mean of three means.
    assert found["entropy"] == pytest.approx(math.log(2) / 4 / 3, abs=1e-5)
