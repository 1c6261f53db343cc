"""Claim: sampling, the passes over a padded row, and scoring all read the same texts and policy.

Reference: the models' own unpadded forward pass; tables of probabilities small enough to see
through; the token ids that reach a reward model, read at its embedding layer.
Run: python -m pytest tests/test_rollout.py (20 seconds)
"""

import contextlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    FAMILIES,
    make_config,
    make_lm,
    make_policy,
    make_reward_model,
    make_tokenizer,
    run,
    save,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_rlhf import (
    Args,
    RewardModel,
    Rollout,
    Score,
    collect_rollout,
    compute_advantages,
    describe,
    encode_pairs,
    load_policy,
    load_reward_model,
    ppo_loss,
    sample_responses,
    sample_tokens,
    sft_loss,
    train_step,
)

PROMPTS = ["the", "plot was dull good", "bad a"]  # ids 4 | 5 6 7 8 | 9 10
RESPONSES = ["b c", "d", ". , the plot"]  # 11 12 EOS | 13 EOS | 14 15 4 5, cut before its EOS
ROWS = {"response_len": 4}  # with this setting the third response is cut
USER = {"role": "user", "content": "the plot"}


class Table(torch.nn.Module):
    """An output layer: row = current token, column = next token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, states):
        """The first number of a state is its token."""
        return self.table[states[..., 0].long()]


class TableModel(torch.nn.Module):
    """A language model whose logits are a table; its hidden states are token and position."""

    def __init__(self, table):
        super().__init__()
        from transformers import GenerationConfig

        self.head, self.passes = Table(table), 0
        self.table = self.head.table
        self.config = make_config("Llama", hidden_size=2, num_attention_heads=1)
        self.generation_config = GenerationConfig(eos_token_id=1)

    @property
    def base_model(self):
        """The trunk, as transformers' models name it."""
        return self

    def get_output_embeddings(self):
        """The output layer."""
        return self.head

    def forward(self, input_ids, position_ids, **_):
        """What Policy.states asks of a trunk."""
        self.passes += 1
        states = torch.stack([input_ids, position_ids], dim=-1).float()
        return type("Output", (), {"last_hidden_state": states})()


def chain(rows, **settings):
    """A policy with given probabilities: chain({"a": {"b": 1.0}}) writes b behind every a."""
    ids = make_tokenizer().get_vocab()
    table = torch.full((16, 16), -1e4)  # softmax makes 0 of it
    for word, following in rows.items():
        for other, probability in following.items():
            table[ids[word], ids[other]] = math.log(probability)
    return make_policy(TableModel(table), **settings)


def real_ids(rows, i):
    """Row i without padding: ids of the prompt, ids of the response."""
    response_len = int(rows.response_mask[i].sum())
    ids = rows.sequence_ids[i][rows.sequence_mask[i]]
    return ids[: len(ids) - response_len], ids[len(ids) - response_len :]


def own_logprobs(lm, prompt, response, temperature=1.0):
    """log softmax(logits / temperature) of the unpadded model; PAD (id 0) has probability zero."""
    logits = lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
    logits[:, 0] = -1e30
    return logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]


def with_value_head(policy):
    """A shared critic that adds up the hidden state, so that values are not all zero."""
    policy.add_critic(Score([None]))
    torch.nn.init.ones_(policy.value_head.weight)
    return policy


def delete_weight(folder, name):
    """Delete one tensor from a saved model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(folder, "model.safetensors"))
    del weights[name]
    save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})


# One padded row ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, folder):
    """Folders of a language model and of a classifier with other weights; both have dropout."""
    return [save(folder / f"{request.param}{i}", make(request.param, i, vocab_size=17),
                 make_tokenizer())  # 17, because transformers adds a token to Qwen2's tokenizer
            for i, make in enumerate((make_lm, make_reward_model))]


@pytest.fixture(scope="module")
def rows():
    """Three prompts padded on the left, three responses padded on the right."""
    return make_policy(**ROWS).encode(PROMPTS, RESPONSES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ragged_rows_have_the_logprobs_of_the_unpadded_model(models, rows, checkpointing):
    args = Args(gradient_checkpointing=checkpointing, max_prompt_len=8, device="cpu", **ROWS)
    policy = load_policy(models[0], args)
    logprobs, _, _ = policy.train(checkpointing)(rows, 1.0)
    for i in range(3):
        expected = own_logprobs(policy.lm.eval(), *real_ids(rows, i))
        assert torch.allclose(logprobs[i][rows.response_mask[i]], expected, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_critic_reads_the_unpadded_hidden_states(models, rows, checkpointing):
    args = Args(gradient_checkpointing=checkpointing, max_prompt_len=8, device="cpu", **ROWS)
    policy = with_value_head(load_policy(models[0], args))
    _, _, values = policy.train(checkpointing)(rows, 1.0)
    for i in range(3):
        prompt, response = real_ids(rows, i)
        output = policy.lm.eval()(torch.cat([prompt, response])[None], output_hidden_states=True)
        expected = output.hidden_states[-1][0, len(prompt) - 1 : -1].sum(-1)
        assert torch.allclose(values[i][rows.response_mask[i]], expected, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_separate_critic_starts_as_the_score_of_the_text_so_far(models, rows, checkpointing):
    args = Args(gradient_checkpointing=checkpointing, max_prompt_len=8, device="cpu",
                critic="separate", **ROWS)
    policy, reward_model = load_policy(models[0], args), load_reward_model(models[1], args)
    score = Score([reward_model])
    score.norms = [(0.5, 2.0)]  # offset and scale
    policy.add_critic(score)
    _, _, values = policy.train(checkpointing)(rows, 1.0)
    for i in range(3):
        prompt, response = real_ids(rows, i)
        for t in range(len(response)):
            text = torch.cat([prompt, response[:t]])[None]
            score = (reward_model.classifier(text).logits[0, 0] - 0.5) / 2
            assert abs(values[i, t] - score) < 1e-5


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_separate_critic_without_a_reward_model_starts_from_the_policys_trunk(rows, family):
    policy = make_policy(make_lm(family), critic="separate", **ROWS)
    shared = with_value_head(make_policy(policy.lm, **ROWS))
    policy.add_critic(Score([None]))
    torch.nn.init.ones_(policy.value_head.weight)
    assert torch.allclose(policy(rows, 1.0)[2], shared(rows, 1.0)[2], atol=1e-5)


@pytest.mark.parametrize("width", [16, 32])  # the policy's is 16
def test_a_separate_critic_has_the_width_of_its_reward_model(rows, width):
    policy = make_policy(critic="separate")
    reward_model = reward_model_of(make_reward_model(hidden_size=width))
    policy.add_critic(Score([reward_model]))
    prompt = real_ids(rows, 0)[0]
    score = reward_model.classifier(prompt[None]).logits[0, 0]
    assert abs(policy(rows, 1.0)[2][0, 0] - score) < 1e-5


def test_a_critic_does_not_start_from_a_reward_model_that_is_too_short_for_the_rows(rows):
    policy = make_policy(make_lm("GPT2"), critic="separate")
    policy.add_critic(Score([reward_model_of(make_reward_model("GPT2", n_positions=4))]))
    assert (policy(rows, 1.0)[2] == 0).all()  # as from the policy's own trunk


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_more_padding_on_either_side_changes_nothing(rows, family, critic):
    policy = with_value_head(make_policy(make_lm(family), critic=critic, **ROWS))
    pad = torch.nn.functional.pad
    padded = Rollout(pad(rows.sequence_ids, (8, 3)), pad(rows.sequence_mask, (8, 3)),
                     pad(rows.response_mask, (0, 3)))
    for narrow, wide in zip(policy(rows, 1.0), policy(padded, 1.0), strict=True):
        real = rows.response_mask
        assert torch.allclose(narrow[real], wide[:, :4][real], atol=1e-5)


def test_every_number_is_read_one_position_before_its_token():
    # Token t's log-probability is row (token t − 1) of the table; the value is its position.
    policy = make_policy(TableModel(torch.randn(16, 16)))
    rows = policy.encode(["a", "b c"], ["d", "a"])  # 10 | 13 EOS and 11 12 | 10 EOS
    with_value_head(policy).value_head.weight.data[0, 0] = 0  # add up the position alone
    logprobs, _, values = policy(rows, 1.0)
    logits = policy.lm.table.detach().clone()
    logits[:, 0] = -1e30  # PAD has probability zero
    table = logits.log_softmax(-1)
    expected = torch.stack([table[[10, 13], [13, 1]], table[[12, 10], [10, 1]]])
    assert torch.allclose(logprobs, expected, atol=1e-6)
    assert values.tolist() == [[0, 1], [1, 2]]


def test_behind_a_response_the_logprobs_are_zero(rows):
    assert (make_policy()(rows, 1.0)[0][~rows.response_mask] == 0).all()


def test_the_whole_model_with_a_softcap_is_read_not_only_its_head():
    policy = make_policy(make_lm("Gemma2"))
    rows = policy.encode(["the"], ["plot"])
    hidden = policy.lm(rows.sequence_ids, output_hidden_states=True).hidden_states[-1]
    bare = policy.lm.get_output_embeddings()(hidden)[0, 0].log_softmax(-1)[5]  # 5 is "plot"
    assert abs(policy(rows, 1.0)[0][0, 0] - bare) > 1e-3


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Llama"])
def test_a_loaded_policy_has_no_dropout_although_its_saved_config_has(family, rows, tmp_path):
    folder = save(tmp_path, make_lm(family), make_tokenizer())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert 0.1 in [value for name, value in saved.items() if "drop" in name]
    policy = load_policy(folder, Args(max_prompt_len=8, device="cpu", **ROWS)).train()
    assert all(not value for name, value in vars(policy.lm.config).items() if "drop" in name)
    assert all(x.p == 0 for x in policy.modules() if isinstance(x, torch.nn.Dropout))
    assert torch.equal(policy(rows, 1.0)[0], policy(rows, 1.0)[0])


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_loaded_reward_model_has_no_dropout_although_its_saved_config_has(family, tmp_path):
    folder = save(tmp_path, make_reward_model(family), make_tokenizer())
    model = load_reward_model(folder, Args(max_prompt_len=8, device="cpu", **ROWS)).train()
    config = vars(model.classifier.config)
    assert all(not value for name, value in config.items() if name.endswith(("pdrop", "dropout")))
    assert torch.equal(model(["the plot"], ["was"], [True]), model(["the plot"], ["was"], [True]))


def test_bfloat16_changes_the_products_but_returns_float32(rows):
    exact, rounded = (make_policy(dtype=x)(rows, 1.0)[0] for x in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 1


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def trained(request, rows, policy_folder):
    """A GPT-2 after one step of length 0, and how often the step computed its first attention."""
    args = Args(gradient_checkpointing=request.param, max_prompt_len=8, device="cpu")
    policy, passes = load_policy(policy_folder, replace(args, response_len=8)), []
    policy.lm.transformer.h[0].attn.register_forward_hook(lambda *_: passes.append(1))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    train_step(policy, optimizer, [(sft_loss, rows, 1.0)], "here", replace(args, microbatch_size=3))
    return policy, len(passes)


def test_gradient_checkpointing_computes_each_layer_once_more_in_the_backward_pass(trained):
    policy, passes = trained
    assert passes == 1 + policy.args.gradient_checkpointing


def test_after_a_step_with_gradient_checkpointing_the_sampler_still_has_its_cache(trained):
    # transformers drops the cache of a model that is in train() and checkpoints gradients.
    samples = [sample_responses(x, PROMPTS, 0, trained[0].args)
               for x in (trained[0], make_policy(make_lm("GPT2")))]
    assert samples[0].response_mask.sum() > 6
    assert torch.equal(samples[0].sequence_ids, samples[1].sequence_ids)


# Sampling ----------------------------------------------------------------------------------------

FOUR = {"the": {"[EOS]": 0.1, "a": 0.2, "b": 0.3, "c": 0.4}}  # cumulative: 0.1, 0.3, 0.6, 1.0


def first_tokens(policy, noise, temperature=1.0):
    """The tokens that follow "the", one for each number of noise."""
    prompts = policy.encode(["the"] * len(noise))
    rollout = sample_tokens(policy, prompts, torch.tensor(noise)[:, None], temperature)
    return [token for token, in policy.decode(rollout)[1]]


def test_a_uniform_number_selects_the_token_in_whose_interval_it_falls():
    drawn = first_tokens(chain(FOUR), [0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.99])
    assert drawn == ["[EOS]", "[EOS]", "a", "a", "b", "b", "c", "c"]


def test_the_intervals_are_those_of_the_temperature():
    # At temperature 1/2 probabilities are squared: 1 : 4 : 9 : 16, cumulative 0.03, 0.17, 0.47, 1.
    drawn = first_tokens(chain(FOUR), [0.02, 0.16, 0.46, 0.48], temperature=0.5)
    assert drawn == ["[EOS]", "a", "b", "c"]


def test_responses_are_sampled_at_the_temperature_of_the_settings():
    # At temperature 1/100, c is (0.4 / 0.3)^100 = 3·10¹² times as likely as b.
    policy = chain(FOUR, response_len=1, temperature=0.01)
    rows = sample_responses(policy, ["the"] * 50, 0, policy.args)
    assert set(policy.decode(rows)[0]) == {"c"}


def test_a_hundred_thousand_draws_follow_softmax_of_logits_over_temperature():
    policy = make_policy(TableModel(torch.randn(16, 16)), temperature=0.7, batch_size=100_000)
    policy.lm.table.data[4, 0] = 9.0  # PAD would be the favourite behind "the"
    noise = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0))
    ids = torch.full((100_000, 1), 4)
    prompts = Rollout(ids, ids > 0, ids[:, :0] > 0)
    drawn = sample_tokens(policy, prompts, noise, 0.7).sequence_ids[:, 1]
    expected = (policy.lm.table[4, 1:] / 0.7).softmax(-1)
    observed = drawn.bincount(minlength=16) / 100_000
    assert observed[0] == 0
    assert (observed[1:] - expected).abs().sum() / 2 < 0.01  # total variation


@pytest.mark.parametrize("pad_token", ["[PAD]", ","])  # the first id and the last one
@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])  # the least and the largest that is drawn
def test_pad_is_never_sampled_even_at_the_ends_of_the_vocabulary(pad_token, noise):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pad_token=pad_token)
    for _ in range(50):  # sums of 16 probabilities that round to below, to above, and to 1
        policy = make_policy(TableModel(torch.randn(16, 16)), tokenizer)
        policy.lm.table.data[:, tokenizer.pad_token_id] = 9.0
        assert first_tokens(policy, [noise]) != [pad_token]


def test_a_token_of_probability_zero_is_never_sampled():
    policy = chain({"the": {"was": 0.25, "dull": 0.25, "bad": 0.5}})  # ids 6, 7, 9; not 0 to 5, 8
    drawn = first_tokens(policy, [0.0, 0.25, 0.5, 1 - 2**-24])
    assert drawn == ["was", "dull", "bad", "bad"]


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_with_150_000_tokens_the_sampler_is_accurate_to_a_millionth(spread):
    # The token that is drawn at u contains u in its interval of a cumulative sum in float64.
    torch.manual_seed(0)
    logits = spread * torch.randn(150_000)
    policy = make_policy(TableModel(logits.expand(5, -1)))  # only "the", id 4, is looked up
    noise = torch.linspace(0, 1 - 2**-24, 100)
    drawn = sample_tokens(policy, policy.encode(["the"] * 100), noise[:, None], 1.0)
    tokens = drawn.sequence_ids[:, 1]
    logits[0] = -1e30  # PAD
    cumulative = logits.double().softmax(-1).cumsum(-1)
    below, above = cumulative[tokens - 1] - noise, noise - cumulative[tokens]
    assert torch.maximum(below, above).max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_with_its_cache_draws_what_the_unpadded_model_gives_for_the_noise(family):
    policy = make_policy(make_lm(family))
    noise = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    rows = sample_tokens(policy, policy.encode(PROMPTS * 4), noise, 2.0)
    lens = rows.response_mask.sum(dim=1)
    assert lens.min() < 8 and lens.max() == 20  # some rows leave while others go on
    for i in range(12):
        prompt, response = real_ids(rows, i)
        logits = policy.lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logits[:, 0] = -1e30
        cumulative = (logits / 2.0).softmax(-1).cumsum(-1)
        drawn = (cumulative <= noise[i, : len(response), None]).sum(-1)  # number of tokens below u
        assert torch.equal(drawn, response)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_chunks_in_which_prompts_are_sampled_change_no_response(batch_size):
    policy = make_policy(make_lm("GPT2"))
    whole = sample_responses(policy, PROMPTS * 4, 0, replace(policy.args, batch_size=12))
    parts = sample_responses(policy, PROMPTS * 4, 0, replace(policy.args, batch_size=batch_size))
    assert len(set(policy.decode(whole)[0])) > 6  # equal prompts have responses of their own
    assert torch.equal(whole.sequence_ids, parts.sequence_ids)
    assert torch.equal(whole.ended, parts.ended)


def test_another_seed_gives_other_responses():
    policy = make_policy()
    first, same, other = (sample_responses(policy, PROMPTS, i, policy.args) for i in (0, 0, 1))
    assert policy.decode(first) == policy.decode(same) != policy.decode(other)


ENDINGS = {"a": {"b": 1.0}, "b": {"[EOS]": 1.0}, "c": {"c": 1.0}}  # b, then EOS; c for ever


def test_a_sampled_row_ends_with_eos_and_has_nothing_but_padding_after_it():
    policy = chain(ENDINGS, response_len=4)
    rows = sample_responses(policy, ["a", "c", "b"], 0, policy.args)
    assert rows.sequence_ids[:, 1:].tolist() == [[11, 1, 0, 0], [12, 12, 12, 12], [1, 0, 0, 0]]
    assert rows.response_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows.ended.tolist() == [True, False, True]


def test_every_eight_tokens_rows_that_have_ended_leave_and_without_rows_sampling_stops():
    policy, rows = chain(ENDINGS, response_len=20), []
    policy.lm.register_forward_hook(lambda *call: rows.append(len(call[2].last_hidden_state)))
    responses = sample_responses(policy, ["a", "b"], 0, policy.args)
    assert responses.response_mask.shape == (2, 2) and rows == [2] * 8
    rows.clear()
    sample_responses(policy, ["a", "c", "b"], 0, policy.args)
    assert rows == [3] * 8 + [1] * 12


def test_an_eos_inside_the_prompt_ends_nothing():
    policy = chain(ENDINGS, response_len=3)
    rows = sample_responses(policy, ["[EOS] c"], 0, policy.args)
    assert rows.sequence_ids.tolist() == [[1, 12, 12, 12, 12]]
    assert rows.response_mask.all() and not rows.ended.any()


def test_each_of_several_eos_ids_ends_a_response():
    lm = chain({"a": {"[END]": 1.0}, "b": {"[EOS]": 1.0}, "c": {"c": 1.0}}).lm
    lm.generation_config.eos_token_id = [1, 2]  # as in chat models
    rows = sample_responses(make_policy(lm), ["a", "b", "c"], 0, make_policy(lm).args)
    assert rows.ended.tolist() == [True, True, False]
    assert rows.response_mask.sum(dim=1).tolist() == [1, 1, 8]


@pytest.mark.parametrize("pad_token", ["[EOS]", None])
def test_where_pad_is_eos_the_eos_stays_a_real_token(pad_token):
    policy = make_policy(tokenizer=make_tokenizer(pad_token=pad_token))
    rows = sample_responses(policy, PROMPTS * 20, 0, policy.args)
    assert rows.ended.any() and not rows.ended.all()
    for i, ended in enumerate(rows.ended):
        response = real_ids(rows, i)[1].tolist()
        assert (response[-1] == 1) == ended and 1 not in response[:-1]


def test_the_rollouts_logprobs_are_those_of_the_unpadded_model_over_temperature():
    policy = make_policy(make_lm("GPT2"), temperature=0.7)
    rows = collect_rollout(policy, policy, PROMPTS, 0, policy.args)
    for i in range(3):
        expected = own_logprobs(policy.lm, *real_ids(rows, i), temperature=0.7)
        assert torch.allclose(rows.old_logprobs[i][rows.response_mask[i]], expected, atol=1e-5)


def test_the_entropy_of_a_rollout_is_that_of_the_next_token():
    policy = chain(FOUR, response_len=1)
    rows = collect_rollout(policy, policy, ["the"], 0, policy.args)
    exact = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))  # 1.28
    assert rows.entropies.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_kv_cache_holds_bfloat16(family):
    policy, caches = make_policy(make_lm(family), dtype="bfloat16"), []
    policy.lm.base_model.register_forward_pre_hook(
        lambda lm, args, named: caches.append(named["past_key_values"]), with_kwargs=True)
    sample_responses(policy, PROMPTS, 0, policy.args)
    assert {x.dtype for layer in caches[-1].layers for x in (layer.keys, layer.values)} == {
        torch.bfloat16}


class CountCasts(TorchDispatchMode):
    """Counts the conversions of whole weight matrices to another type."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.casts = {x.data_ptr() for x in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.casts += args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


def test_in_bfloat16_the_weights_are_converted_once_and_not_for_each_token():
    policy, casts = make_policy(dtype="bfloat16"), []
    for num_tokens in (1, 2, 8):
        noise = torch.full((3, num_tokens), 0.9)
        with CountCasts(policy) as counter:
            rows = sample_tokens(policy, policy.encode(PROMPTS), noise, 1.0)
        assert rows.response_mask.all()  # no row has ended early
        casts.append(counter.casts)
    assert casts[0] == casts[1] == casts[2] > 10


# The integration test that matters most ----------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero(family, microbatch_size, tmp_path):
    folder = save(tmp_path, make_lm(family), make_tokenizer())
    args = replace(make_policy().args, temperature=0.7, microbatch_size=8)
    policy, reference = load_policy(folder, args), load_policy(folder, args)
    rollout = collect_rollout(with_value_head(policy), reference, PROMPTS * 8, 0, args)
    rollout.scores = torch.randn(24)
    compute_advantages(rollout, 0.1, args)
    args = replace(args, microbatch_size=microbatch_size)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    parts = [(lambda *x: ppo_loss(*x, 0.1, args), rollout, 1.0)]
    stats = train_step(policy, optimizer, parts, "here", args)
    assert stats["abs_log_ratio_max"] < 1e-5 and stats["clipfrac"] == 0
    assert abs(stats["approx_kl"]) < 1e-6
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() < 1e-5


# What a reward model reads -----------------------------------------------------------------------

MARKED = ("{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
          "{{ m['content'] }} [END]{% endfor %}")  # "<user> the plot [END]<bot> was good [END]"


def marked_tokenizer(**special):
    """A tokenizer whose own chat template marks the roles."""
    tokenizer = make_tokenizer(**special)
    tokenizer.add_tokens(["<user>", "<bot>", "[END]"])
    tokenizer.chat_template = MARKED
    return tokenizer


def encoder_tokenizer(first, last, **special):
    """Writes one token in front of a text and one behind it, as those of BERT and RoBERTa do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(**special)
    ids = [(x, tokenizer.convert_tokens_to_ids(x)) for x in (first, last)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ids)
    return tokenizer


def bert(**changes):
    """A small BERT classifier with 12 positions, and its tokenizer, which has no BOS and no EOS."""
    import transformers

    tokenizer = encoder_tokenizer("[CLS]", "[SEP]", eos_token=None, cls_token="[CLS]",
                                  sep_token="[SEP]")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, num_labels=1, **changes)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval(), tokenizer


def roberta():
    """A small RoBERTa classifier with 12 positions; it cannot use the first two. PAD is id 1."""
    import transformers

    tokenizer = encoder_tokenizer("<s>", "</s>", pad_token="[EOS]", eos_token="</s>",
                                  bos_token="<s>", cls_token="<s>", sep_token="</s>")
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, pad_token_id=1,
        num_attention_heads=2, max_position_embeddings=12, num_labels=1)
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval(), tokenizer


def reward_model_of(classifier=None, tokenizer=None, **settings):
    """A RewardModel: a small Llama unless classifier says otherwise."""
    classifier = classifier or make_reward_model(vocab_size=20)
    return RewardModel(classifier, tokenizer or make_tokenizer(), make_policy(**settings).args)


def read_by(reward_model, prompt, response, ended):
    """The text, special tokens included, that reaches the embedding layer of a reward model."""
    seen, embedding = [], reward_model.classifier.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    reward_model([prompt], [response], [ended])
    hook.remove()
    return reward_model.tokenizer.decode(seen[0][0])


def test_a_string_is_followed_by_the_response_and_by_eos_if_the_response_has_ended():
    reward_model = reward_model_of()
    assert read_by(reward_model, "the plot", "was good", True) == "the plot was good [EOS]"
    assert read_by(reward_model, "the plot", "was good", False) == "the plot was good"


def test_a_chat_reward_model_reads_its_own_role_markers():
    reward_model = reward_model_of(tokenizer=marked_tokenizer())
    assert read_by(reward_model, [USER], "was good", True) == (
        "<user> the plot [END] <bot> was good [END]")


def test_a_conversation_that_was_cut_has_no_closing_marker():
    reward_model = reward_model_of(tokenizer=marked_tokenizer())
    text = read_by(reward_model, [USER], "was good", False)
    assert text == "<user> the plot [END] <bot> was good"


def test_a_loaded_reward_model_has_its_own_template_or_plain_role_lines(tmp_path):
    texts = []
    for name, tokenizer in (("marked", marked_tokenizer()), ("plain", make_tokenizer())):
        tokenizer.add_tokens(["Human", "Assistant", ":"])
        folder = save(tmp_path / name, make_reward_model(vocab_size=24), tokenizer)
        reward_model = load_reward_model(folder, make_policy().args)
        texts.append(read_by(reward_model, [USER], "was good", True))
    assert texts == ["<user> the plot [END] <bot> was good [END]",
                     "Human : the plot Assistant : was good [EOS]"]


def spaced_tokenizer():
    """A space belongs to the word behind it, as in GPT-2: "bot: good" is "bot:" and " good"."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", "the", " plot", "bot:", " ", "good", " good"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+| +"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", chat_template=(
            "{% for m in messages %}{{ 'bot: ' if m['role'] == 'assistant' else '' }}"
            "{{ m['content'] }}{{ eos_token }}{% endfor %}"))


def test_a_chat_reward_model_reads_the_tokens_of_the_whole_conversation():
    reward_model, seen = reward_model_of(tokenizer=spaced_tokenizer()), []
    reward_model.classifier.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0].tolist()))
    reward_model([[USER]], ["good"], [True])
    assert seen == [[3, 4, 1, 5, 8, 1]]  # the, " plot", EOS, bot:, " good", EOS; not " " and good


def test_a_run_shows_how_the_reward_model_reads_an_answer(tiny_args, tmp_path, capsys):
    folder = save(tmp_path / "marked", make_reward_model(vocab_size=20), marked_tokenizer())
    answer = {"role": "assistant", "content": "was good"}
    row = json.dumps({"chosen": [USER, answer], "rejected": [USER, answer]})
    (tmp_path / "chat.jsonl").write_text("\n".join([row] * 8))
    run(tiny_args, dataset=str(tmp_path / "chat.jsonl"), eval_prompts=0, reward_model=(folder,),
        save_interval=100, max_prompt_len=16)
    assert "<user> the plot [END] <bot>" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["the plot", "<s> the plot", [USER]])
def test_a_reward_models_bos_stands_first_exactly_once(prompt):
    tokenizer = marked_tokenizer(bos_token="<s>")
    for template in (MARKED, "{{ bos_token }}" + MARKED):
        tokenizer.chat_template = template
        text = read_by(reward_model_of(tokenizer=tokenizer), prompt, "was", True)
        assert text.startswith("<s>") and text.count("<s>") == 1


def test_a_given_bert_reads_cls_and_sep_around_prompt_and_response():
    reward_model = reward_model_of(*bert())
    assert read_by(reward_model, "the plot", "was good", True) == (
        "[CLS] the plot [SEP] was good [SEP]")


def test_a_given_bert_without_a_template_reads_chats_behind_cls(tmp_path):
    classifier, tokenizer = bert()
    folder = save(tmp_path, classifier, tokenizer)
    reward_model = load_reward_model(folder, make_policy().args)
    text = read_by(reward_model, [USER], "was good", True)
    assert text.startswith("[CLS]") and text.count("[CLS]") == 1


LONG = "a b c d a b c d a b c d a b c d"  # 16 tokens


def test_a_text_too_long_for_the_reward_model_loses_its_beginning_behind_the_first_token():
    reward_model = reward_model_of(*bert())  # 12 tokens: [CLS], 9 of the response, [SEP]
    text = read_by(reward_model, "the plot", LONG, True)
    assert text == "[CLS] c d a b c d a b c d [SEP]"
    plain = reward_model_of(make_reward_model(max_position_embeddings=4))  # without BOS
    assert read_by(plain, "the plot", "a b c", True) == "a b c [EOS]"


def test_the_tokenizers_own_limit_counts_too():
    classifier, tokenizer = bert()
    tokenizer.model_max_length = 5
    text = read_by(reward_model_of(classifier, tokenizer), "the plot", LONG, True)
    assert text == "[CLS] b c d [SEP]"


def test_roberta_ends_two_positions_earlier():
    text = read_by(reward_model_of(*roberta()), "the plot", LONG, True)  # 12 - 2 = 10 tokens
    assert text == "<s> a b c d a b c d </s>"


@pytest.mark.parametrize("make", [bert, roberta])
def test_texts_of_any_length_get_a_finite_score(make):
    reward_model = reward_model_of(*make())
    texts = [" ".join(["a"] * n) for n in range(1, 30)]
    assert reward_model(["the plot"] * 29, texts, [True] * 29).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_texts_beside_it(family):
    reward_model, ended = reward_model_of(make_reward_model(family)), [True, True, False]
    together = reward_model(PROMPTS, RESPONSES, ended)
    alone = [reward_model([x], [y], [z]) for x, y, z in zip(PROMPTS, RESPONSES, ended, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_in_training_answers_to_messages_are_cut_where_the_policy_will_be_cut():
    reward_model = reward_model_of(tokenizer=marked_tokenizer(), response_len=4)
    long, short = encode_pairs(reward_model, [[USER]] * 2, ["a b c d a", "a b c"], None)
    assert reward_model.tokenizer.decode(long) == "<user> the plot [END] <bot> a b c d"
    assert reward_model.tokenizer.decode(short) == "<user> the plot [END] <bot> a b c [END]"


def test_in_training_responses_are_cut_where_the_policy_will_be_cut():
    # Of four tokens the last is EOS or, in a longer text, a word: then nothing says that it ended.
    reward_model = reward_model_of(response_len=4)
    for text, read, ended in (("b c", "b c", True), ("b c d", "b c d", True),
                              ("b c d a", "b c d a", False), ("b c d a b", "b c d a", False)):
        score = reward_model(["the"], [read], [ended])
        assert torch.equal(reward_model(["the"], [text]), score)


# Models on disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token", ["[PAD]", "[EOS]", None])
def test_our_reward_model_reads_the_eos_even_where_pad_is_eos(pad_token, tmp_path):
    folder = save(tmp_path, make_lm(), make_tokenizer(pad_token=pad_token))
    reward_model = load_reward_model(folder, make_policy().args, new_head=True)
    classifier = reward_model.classifier
    assert classifier.config.pad_token_id == reward_model.tokenizer.pad_token_id != 1
    with_eos, without = reward_model(["the plot"] * 2, ["was"] * 2, [True, False])
    hidden = classifier.base_model(torch.tensor([[4, 5, 6, 1]])).last_hidden_state[0, -1]
    assert torch.allclose(with_eos, classifier.score(hidden), atol=1e-5)
    assert with_eos != without


def test_a_new_reward_model_starts_from_the_policys_trunk(policy_folder):
    own = load_policy(policy_folder, make_policy().args).lm.base_model.state_dict()
    reward_model = load_reward_model(policy_folder, make_policy().args, new_head=True)
    copied = reward_model.classifier.base_model.state_dict()
    assert own.keys() == copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in own)


def refusal(capsys, load, folder):
    """The message with which loading a folder ends the run."""
    with pytest.raises(SystemExit) as end:
        load(str(folder), make_policy().args)
    message = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and message.startswith("ppo_rlhf.py: --") and str(folder) in message
    return message


@pytest.mark.parametrize("name", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_reward_model_with_a_missing_weight_is_refused(tmp_path, capsys, name):
    save(tmp_path, make_reward_model(), make_tokenizer())
    delete_weight(tmp_path, name)
    assert f"no weights for {name}" in refusal(capsys, load_reward_model, tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_policy_with_a_missing_weight_is_refused(tmp_path, capsys, name):
    save(tmp_path, make_lm(), make_tokenizer())
    delete_weight(tmp_path, name)
    assert f"no weights for {name}" in refusal(capsys, load_policy, tmp_path)


def test_a_policy_that_shares_its_embedding_with_its_head_misses_nothing(tmp_path):
    folder = save(tmp_path, make_lm(tie_word_embeddings=True), make_tokenizer())
    lm = load_policy(folder, make_policy().args).lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_pickled_weights_are_refused(tmp_path, capsys):
    save(tmp_path, make_lm(), make_tokenizer())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert "safetensors" in refusal(capsys, load_policy, tmp_path)


def test_a_language_model_is_refused_as_reward_model_and_the_other_way_round(tmp_path, capsys):
    save(tmp_path / "lm", make_lm(), make_tokenizer())
    save(tmp_path / "rm", make_reward_model(), make_tokenizer())
    assert "LlamaForCausalLM" in refusal(capsys, load_reward_model, tmp_path / "lm")
    assert "LlamaForSequenceClassification" in refusal(capsys, load_policy, tmp_path / "rm")


def test_a_classifier_with_two_outputs_is_refused(tmp_path, capsys):
    save(tmp_path, make_reward_model(num_labels=2), make_tokenizer())
    assert "2 outputs" in refusal(capsys, load_reward_model, tmp_path)


def test_a_policy_whose_tokenizer_is_too_big_is_refused(tmp_path, capsys):
    save(tmp_path, make_lm(vocab_size=10), make_tokenizer())
    message = refusal(capsys, load_policy, tmp_path)
    assert "its tokenizer has 16 tokens, its embedding 10" in message


def test_a_policy_that_scales_its_logits_is_refused(tmp_path, capsys):
    # Cohere multiplies its logits by logit_scale; Gemma 2's soft-capping is known.
    config = transformers.CohereConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=1, pad_token_id=0, initializer_range=0.5,
        logit_scale=0.5)
    save(tmp_path, transformers.CohereForCausalLM(config), make_tokenizer())
    assert "more than an output layer" in refusal(capsys, load_policy, tmp_path)


def test_gpt2s_activation_is_computed_in_one_step_and_stays_the_same_function(tmp_path):
    lm = make_lm("GPT2")
    policy = load_policy(save(tmp_path, lm, make_tokenizer()), make_policy().args)
    ids = torch.tensor([[4, 5, 6, 7]])
    assert policy.lm.config.activation_function != lm.config.activation_function == "gelu_new"
    assert torch.allclose(policy.lm(ids).logits, lm(ids).logits, atol=1e-5)


# From scores to rewards --------------------------------------------------------------------------


class Numbers:
    """A source of scores that knows its answers beforehand."""

    def __init__(self, *scores):
        self.scores = torch.tensor(scores)

    def score(self, rows, responses, tokens, ended):
        """The first scores, as many as there are rows."""
        return list(self.scores[: len(rows)])


def scored(*scores):
    """Two real tokens and one padded slot, ended; three real tokens, cut at the limit."""
    zeros, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    return Rollout(zeros, zeros, mask, torch.tensor([True, False]), zeros, zeros, zeros, zeros,
                   torch.tensor(scores))


def rewards(rollout, kl_coef=0.0, **settings):
    """The rewards that compute_advantages fills in."""
    compute_advantages(rollout, kl_coef, Args(**({"missing_eos_penalty": 0.0} | settings)))
    return rollout.rewards


def test_the_penalty_for_a_missing_eos_stands_at_the_last_token_of_a_cut_response():
    assert rewards(scored(1.0, 2.0), missing_eos_penalty=3.0).tolist() == [[0, 1, 0], [0, 0, -1]]


def test_scores_are_normalised_by_score():
    score = Score([Numbers(8.0, 2.0)])
    score.norms = [(2.0, 3.0)]  # offset and scale
    scores, disagreement = score([{}, {}], [], [], torch.ones(2))
    assert scores.tolist() == [2.0, 0.0] and disagreement is None


def test_an_ensemble_scores_the_mean_minus_coef_times_the_standard_deviation():
    score = Score([Numbers(1.0, 10.0), Numbers(3.0, 20.0)], ensemble_coef=0.5)
    scores, disagreement = score([{}, {}], [], [], torch.ones(2))
    assert disagreement.tolist() == [1.0, 5.0] and scores.tolist() == [1.5, 12.5]


def test_each_member_of_an_ensemble_is_normalised_by_itself():
    policy, score = chain(ENDINGS, score_norm="sft"), Score([Numbers(1.0, 5.0), Numbers(30., 10.)])
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    score.measure(policy, rows, policy.args)
    assert score.norms == [pytest.approx((3.0, 2.0)), pytest.approx((20.0, 10.0))]
    scores, disagreement = score(rows, [], [], torch.ones(2))  # -1 and 1 against 1 and -1
    assert disagreement.tolist() == [1.0, 1.0] and scores.tolist() == [-1.0, -1.0]


def test_normalised_scores_are_clipped_before_the_penalty():
    # 2 is clipped to 1.5; 0 stays, and 1 is subtracted for the missing EOS.
    rollout = scored(2.0, 0.0)
    found = rewards(rollout, missing_eos_penalty=1.0, score_clip=1.5)
    assert found.tolist() == [[0, 1.5, 0], [0, 0, -1]]
    assert rollout.scores.tolist() == [2.0, 0.0]  # what is reported stays as it was


@pytest.mark.parametrize(("score_norm", "scores", "offset", "scale"), [
    ("sft", [1.0, 5.0], 3.0, 2.0), ("center", [1.0, 5.0], 3.0, 1.0), ("none", [1.0, 5.0], 0.0, 1.0),
    ("sft", [4.0, 4.0], 4.0, 1.0),  # a sparse reward that is the same everywhere is only shifted
])
def test_score_norm_is_measured_on_responses_of_the_policy(score_norm, scores, offset, scale):
    policy, score = chain(ENDINGS, score_norm=score_norm), Score([Numbers(*scores)])
    score.measure(policy, [{"prompt": "a"}, {"prompt": "b"}], policy.args)
    assert score.norms[0] == pytest.approx((offset, scale))


def test_a_kl_in_the_reward_is_subtracted_at_every_token():
    rollout = scored(1.0, 2.0)
    rollout.ref_logprobs = torch.full((2, 3), -1.0)  # k1 is 1 at each token
    assert rewards(rollout, kl_coef=0.5).tolist() == [[-0.5, 0.5, 0], [-0.5, -0.5, 1.5]]


def test_a_kl_in_the_loss_is_not_in_the_reward_too():
    rollout = scored(1.0, 2.0)
    rollout.ref_logprobs = torch.full((2, 3), -1.0)
    found = rewards(rollout, kl_coef=0.5, kl_in="loss", kl_estimator="k2")
    assert found.tolist() == [[0, 1, 0], [0, 0, 2]]


def test_whitened_rewards_have_std_1_and_an_unchanged_mean():
    rollout = scored(1.0, 4.0)
    real = rewards(rollout, whiten_rewards=True)[rollout.response_mask]  # before: 0, 1, 0, 0, 4
    assert real.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert real.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_the_value_of_the_next_token_is_discounted_by_gamma_and_not_by_lambda():
    rollout = scored(1.0, 0.0)  # rewards of row 0: 0, 1
    rollout.old_values = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    rewards(rollout, gamma=0.5, gae_lambda=0.9, norm_advantages=False)
    # δ₁ = 1 − 1 = 0 and δ₀ = 0 + γ · 1 − 0 = 0.5
    assert rollout.advantages[0, :2].tolist() == [0.5, 0]


def test_advantages_are_whitened_and_returns_are_not():
    rollout = scored(1.0, 4.0)  # all values are 0, so returns are the rewards to come
    rewards(rollout, gae_lambda=1.0, norm_advantages=True)
    assert rollout.returns.tolist() == [[1, 1, 0], [4, 4, 4]]
    real = rollout.advantages[rollout.response_mask]
    assert real.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert real.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_the_penalty_for_a_missing_eos_is_whitened_with_the_other_rewards():
    rollout = scored(1.0, 4.0)  # the rewards are 0, 1 and 0, 0, 4 − 6
    rewards(rollout, whiten_rewards=True, missing_eos_penalty=6.0)
    real = rollout.rewards[rollout.response_mask]
    assert real.mean().item() == pytest.approx(-1 / 5, abs=1e-5)
    assert real.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


# What is reported and saved ----------------------------------------------------------------------


def save_chain(folder, rows):
    """A Llama on disk with given probabilities: both of its layers add 0 to the embedding."""
    lm = make_lm(tie_word_embeddings=False)
    for layer in lm.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    lm.model.embed_tokens.weight.data = torch.eye(16)  # the last norm multiplies by √16 = 4
    lm.lm_head.weight.data = chain(rows).lm.table.data.T / 4
    return save(folder, lm, make_tokenizer())


def test_the_metrics_of_three_responses_by_hand(tmp_path):
    # The responses are sure: a -> plot was plot was; b -> good [EOS]; c -> good [EOS].
    sure = [("a", "plot"), ("plot", "was"), ("was", "plot"), ("b", "good"), ("c", "good"),
            ("good", "[EOS]")]
    policy = save_chain(tmp_path / "policy", {x: {y: 1.0} for x, y in sure})
    (tmp_path / "data.jsonl").write_text("\n".join(f'{{"prompt": "{x}"}}' for x in "abc"))
    (tmp_path / "f.py").write_text(
        "def f(prompts, responses):\n    return [{'a': 1, 'b': 2, 'c': 6}[x] for x in prompts]\n")
    metrics, = run(Args(
        dataset=str(tmp_path / "data.jsonl"), policy_model=policy, reward_fn=f"{tmp_path}/f.py:f",
        score_norm="none", sft_epochs=0, eval_prompts=0, total_episodes=3, batch_size=3,
        minibatch_size=3, response_len=4, device="cpu", output_dir=str(tmp_path), run_name="run"))
    found = {name.removeprefix("rollout/"): value for name, value in metrics.items()}
    assert found["eos_share"] == pytest.approx(2 / 3) and found["score_mean"] == 3
    assert found["response_len"] == pytest.approx((4 + 2 + 2) / 3)
    assert found["distinct_2"] == 3 / 5  # plot was, was plot, plot was; good EOS; good EOS
    assert found["rewards_mean"] == pytest.approx((1 - 1 + 2 + 6) / 8)  # 1 less: no EOS


def test_the_logged_entropy_is_the_mean_over_real_tokens():
    rollout = scored(1.0, 2.0)
    rollout.entropies = torch.tensor([[1.0, 3.0, 100.0], [2.0, 2.0, 4.5]])
    metrics, _ = describe(rollout, [{"prompt": "a"}] * 2, ["", ""], [[], []], Args(dataset="file"))
    assert metrics["entropy"] == 2.5  # (1 + 3 + 2 + 2 + 4.5) / 5


@pytest.fixture(scope="module")
def finished(folder, pairs_file):
    """A short run at temperature 1/2 with two EOS ids: its folder, and what it printed."""
    lm = make_lm()
    lm.generation_config.eos_token_id = [1, 2]
    policy = save(folder / "two_eos", lm, make_tokenizer(unk_token="[UNK]"))
    path = folder / "long.py"
    path.write_text("def f(prompts, responses):\n    return [len(x) / 10 for x in responses]\n")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(Args(dataset=pairs_file, policy_model=policy, reward_fn=f"{path}:f", temperature=0.5,
                 max_prompt_len=4, response_len=6, eval_prompts=8, total_episodes=64, batch_size=16,
                 minibatch_size=8, learning_rate=1e-2, missing_eos_penalty=0.0, device="cpu",
                 output_dir=str(folder), run_name="finished"))
    return folder / "finished", printed.getvalue()


def test_the_win_rate_is_that_of_ppo_over_sft_and_a_tie_is_half_a_win(finished):
    lines = (finished[0] / "before_after.jsonl").read_text().splitlines()
    scores = [(x["sft"]["score"], x["ppo"]["score"]) for x in map(json.loads, lines)]
    wins = sum(old < new for old, new in scores) + 0.5 * sum(old == new for old, new in scores)
    shown = re.search(r"win rate by score +(\S+) +(\S+)", finished[1])
    assert len(scores) == 8 and wins != 4
    assert [float(x) for x in shown.groups()] == [0.5, pytest.approx(wins / 8, abs=1e-3)]


def test_the_kl_of_a_response_is_the_sum_over_its_tokens(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sft, ppo = (AutoModelForCausalLM.from_pretrained(finished[0] / x) for x in ("sft", "policy"))
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "sft")
    rows = map(json.loads, (finished[0] / "before_after.jsonl").read_text().splitlines())
    cut = [row for row in rows if not row["ppo"]["ended"]]  # else one of two EOS ids is missing
    assert len(cut) > 2
    for row in cut:
        prompt, response = (torch.tensor(tokenizer(x)["input_ids"])
                            for x in (row["prompt"], row["ppo"]["response"]))
        new, ref = (own_logprobs(x, prompt[-4:], response, 0.5) for x in (ppo, sft))
        assert abs((new - ref).sum() - row["ppo"]["kl"]) < 1e-4


def test_generate_of_the_saved_policy_has_its_temperature_and_every_eos(finished):
    config = json.loads((finished[0] / "policy" / "generation_config.json").read_text())
    assert config["temperature"] == 0.5 and config["eos_token_id"] == [1, 2]
