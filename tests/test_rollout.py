"""Claim: sampling, scoring and the two passes over a padded row all read the same policy.

Reference: the model's own unpadded forward pass; tables of logits small enough to see through.
Run: python -m pytest tests/test_rollout.py (25 seconds)
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_reward_model, make_tokenizer

from ppo_rlhf import (
    ActorCritic,
    Args,
    Policy,
    Rollout,
    ScoreNorm,
    backward_minibatch,
    collect_rollout,
    compute_advantages,
    compute_rewards,
    make_policy,
    model_scores,
    new_reward_model,
    pad_rows,
    print_before_after,
    response_kl,
    rollout_metrics,
    sample_responses,
    save_policy,
)

PROMPTS, RESPONSES = [[4], [5, 6, 7, 8], [9, 10]], [[11, 12, 1], [13, 1], [14, 15, 4, 5]]
FAMILIES = ["GPT2", "GPTNeoX", "Llama", "Qwen2", "Qwen3", "Gemma", "Gemma2"]
ARGS = Args(response_len=8, microbatch_size=4, minibatch_size=8, missing_eos_penalty=0.0)


def padded(prompts, responses):
    """Sequence ids and mask of left-padded prompts and right-padded responses."""
    left, right = pad_rows(prompts, 0, "left"), pad_rows(responses, 0, "right")
    return tuple(torch.cat(pair, dim=1) for pair in zip(left, right, strict=True))


def with_value_head(policy):
    """A critic that adds up the hidden state, so that values are not all zero."""
    actor_critic = ActorCritic(policy)
    torch.nn.init.ones_(actor_critic.value_head.weight)
    return actor_critic


class TableModel(torch.nn.Module):
    """A language model whose logits are a table: row = current token, column = next token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"hidden_size": 1})()

    def forward(self, input_ids, position_ids, logits_to_keep, **kwargs):
        hidden = position_ids[..., None].float()  # a value head on it reads the position
        return type("Output", (), {"logits": self.table[input_ids][:, -logits_to_keep:],
                                   "hidden_states": [hidden], "past_key_values": None})()


def table_policy(table, **settings):
    """The Policy of a table: PAD is 0, EOS is 1."""
    return Policy(TableModel(table), 0, [1], **settings)


# One padded row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_the_models_own_unpadded_forward(family):
    lm = make_lm(family)
    actor_critic = with_value_head(Policy(lm, 0, [1]))
    logprobs, _, values = actor_critic(*padded(PROMPTS, RESPONSES), 4)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = lm(torch.tensor([prompt + response]), output_hidden_states=True)
        logits, start, size = output.logits[0].clone(), len(prompt) - 1, len(response)
        logits[:, 0] = -1e30  # PAD has probability zero
        expected = logits.log_softmax(-1)[range(start, start + size), response]
        hidden = output.hidden_states[-1][0, start : start + size]
        assert torch.allclose(logprobs[i, :size], expected, atol=1e-5)
        assert torch.allclose(values[i, :size], hidden.sum(-1), atol=1e-5)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_more_padding_on_either_side_changes_nothing(family):
    actor_critic = with_value_head(Policy(make_lm(family), 0, [1]))
    ids, mask = padded(PROMPTS, RESPONSES)
    wide_ids = torch.nn.functional.pad(ids, (8, 3))
    wide_mask = torch.nn.functional.pad(mask, (8, 3))
    for narrow, wide in zip(actor_critic(ids, mask, 4), actor_critic(wide_ids, wide_mask, 7),
                            strict=True):
        real = mask[:, -4:]
        assert torch.allclose(narrow[real], wide[:, :4][real], atol=1e-5)


def test_every_number_is_read_one_position_before_its_token():
    # Token t's log-probability is row (token t-1) of the table; the value is its position.
    table = torch.randn(6, 6)
    policy = table_policy(table)
    actor_critic = with_value_head(policy)
    logprobs, _, values = actor_critic(*padded([[2], [3, 4]], [[5, 1], [2, 3]]), 2)
    table[:, 0] = -1e30
    log_softmax = table.log_softmax(-1)
    expected = torch.stack([log_softmax[[2, 5], [5, 1]], log_softmax[[4, 2], [2, 3]]])
    assert torch.allclose(logprobs, expected, atol=1e-6)
    assert values.tolist() == [[0, 1], [1, 2]]


def test_the_whole_model_with_a_softcap_is_read_not_only_its_head():
    lm = make_lm("Gemma2")
    ids, mask = padded(PROMPTS, RESPONSES)
    logits, output = Policy(lm, 0, [1]).logits(ids, mask, 1, output_hidden_states=True)
    bare = lm.get_output_embeddings()(output.hidden_states[-1][:, -1:])
    assert not torch.allclose(logits[..., 1:], bare[..., 1:], atol=1e-3)


def test_dropout_is_off_so_two_passes_agree(policy_folder):
    from ppo_rlhf import load_policy_model, resolve_args

    args = resolve_args(Args(policy_model=policy_folder, response_len=8, max_prompt_len=8))
    lm, _ = load_policy_model(args, [])
    assert lm.config.resid_pdrop > 0
    ids, mask = padded(PROMPTS, RESPONSES)
    policy = Policy(lm, 0, [1])
    assert torch.equal(policy(ids, mask, 4)[0], policy(ids, mask, 4)[0])


def test_bfloat16_changes_the_products_but_returns_float32():
    ids, mask = padded(PROMPTS, RESPONSES)
    exact = Policy(make_lm(), 0, [1])(ids, mask, 4)[0]
    rounded = Policy(make_lm(), 0, [1], dtype="bfloat16")(ids, mask, 4)[0]
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 1


# Sampling ----------------------------------------------------------------------------------------


def test_the_sampler_draws_from_softmax_of_logits_over_temperature():
    table = torch.zeros(6, 6)
    table[2] = torch.tensor([5.0, 0.0, 1.0, 2.0, 0.5, -1.0])  # PAD would be the favourite
    prompts = torch.full((100_000, 1), 2)
    generator = torch.Generator().manual_seed(0)
    policy = table_policy(table, temperature=0.7)
    ids, _, _ = sample_responses(policy, prompts, torch.ones_like(prompts).bool(), 1, generator)
    expected = torch.cat([torch.zeros(1), (table[2, 1:] / 0.7).softmax(-1)])
    observed = ids[:, 0].bincount(minlength=6) / 100_000
    assert (observed - expected).abs().sum() / 2 < 0.01  # total variation


def test_a_sampled_row_keeps_eos_and_nothing_after_it():
    # 2 -> 3 -> EOS surely; 4 -> 4 for ever.
    table = torch.full((6, 6), -50.0)
    table[2, 3] = table[3, 1] = table[4, 4] = 50.0
    prompts = torch.tensor([[2], [4], [3]])
    mask = torch.ones_like(prompts).bool()
    ids, real, ended = sample_responses(table_policy(table), prompts, mask, 4, torch.Generator())
    assert ids.tolist() == [[3, 1, 0, 0], [4, 4, 4, 4], [1, 0, 0, 0]]
    assert real.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]


def test_sampling_stops_when_every_row_has_ended():
    table = torch.full((6, 6), -50.0)
    table[:, 1] = 50.0
    ids, _, _ = sample_responses(table_policy(table), torch.tensor([[2]]), torch.ones(1, 1).bool(),
                                 100, torch.Generator())
    assert ids.shape == (1, 1)


def test_an_eos_inside_the_prompt_ends_nothing():
    table = torch.full((6, 6), -50.0)
    table[2, 4] = table[4, 4] = 50.0
    prompts = torch.tensor([[1, 2]])
    ids, real, ended = sample_responses(table_policy(table), prompts, torch.ones(1, 2).bool(), 3,
                                        torch.Generator())
    assert ids.tolist() == [[4, 4, 4]] and real.all() and not ended.any()


def test_each_of_several_eos_ids_ends_a_response():
    lm = make_lm()
    lm.generation_config.eos_token_id = [1, 2]
    policy = make_policy(lm, make_tokenizer(), 1.0, "float32")
    assert policy.eos_ids.tolist() == [1, 2]
    table = torch.full((6, 6), -50.0)
    table[3, 2] = 50.0
    policy = Policy(TableModel(table), 0, [1, 2])
    _, _, ended = sample_responses(policy, torch.tensor([[3]]), torch.ones(1, 1).bool(), 5,
                                   torch.Generator())
    assert ended.all()


@pytest.mark.parametrize("pad_token", ["[EOS]", None])
def test_where_pad_is_eos_the_eos_stays_a_real_token(pad_token):
    tokenizer = make_tokenizer(pad_token=pad_token)
    policy = make_policy(make_lm(), tokenizer, 1.0, "float32")
    assert policy.pad_id == 1 and policy.banned_ids.numel() == 0
    rollout = collect_rollout(ActorCritic(policy), policy, PROMPTS * 20, ARGS, seed=0)
    assert rollout.ended.any()
    for response, ended in zip(rollout.responses, rollout.ended, strict=True):
        assert (response[-1] == 1) == ended and 1 not in response[:-1]


def test_the_rollouts_logprobs_are_those_of_the_sampler(monkeypatch):
    # The KV cache sees left-padded prompts one token at a time; the scoring pass sees whole rows.
    drawn, multinomial = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, *others, **named: (
        drawn.append(probabilities) or multinomial(probabilities, *others, **named)))
    policy = Policy(make_lm("GPT2"), 0, [1], temperature=0.7)
    rollout = collect_rollout(ActorCritic(policy), policy, PROMPTS, ARGS, seed=0)
    response_ids = rollout.sequence_ids[:, -rollout.response_len :]
    sampled = torch.stack(drawn, dim=1).gather(-1, response_ids[..., None])[..., 0].log()
    mask = rollout.response_mask
    assert mask.sum() > 6 and torch.allclose(sampled[mask], rollout.old_logprobs[mask], atol=1e-5)


def test_the_rollouts_logprobs_are_log_softmax_of_the_models_logits_over_temperature():
    policy = Policy(make_lm("GPT2"), 0, [1], temperature=0.7)
    rollout = collect_rollout(ActorCritic(policy), policy, PROMPTS, ARGS, seed=0)
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = torch.tensor([prompt + response])
        logits = policy.lm(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        logits[:, 0] = -1e30
        expected = logits.log_softmax(-1)[range(len(response)), response]
        assert torch.allclose(rollout.old_logprobs[i, : len(response)], expected, atol=1e-5)


# The integration test that matters most ----------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_before_the_first_step_ratio_is_one_and_kl_zero(family, microbatch_size):
    policy = Policy(make_lm(family), 0, [1], temperature=0.7)
    actor_critic, reference = ActorCritic(policy), copy.deepcopy(policy)
    rollout = collect_rollout(actor_critic, reference, PROMPTS * 8, ARGS, seed=0)
    rollout.scores = torch.randn(24)
    rollout.rewards = compute_rewards(rollout, ScoreNorm(), 0.1, ARGS)
    rollout.advantages, rollout.returns = compute_advantages(rollout, ARGS)
    args = replace(ARGS, microbatch_size=microbatch_size)
    stats = backward_minibatch(actor_critic, rollout, 0.1, args)
    assert abs(stats["ratio_first"] - 1) < 1e-5
    assert stats["clipfrac"] == 0 and abs(stats["approx_kl"]) < 1e-6
    assert response_kl(rollout).abs().max() < 1e-4


# Reward model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_texts_beside_it(family):
    reward_model = make_reward_model(family)
    rows = [x + y for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    together = model_scores(reward_model, rows)
    alone = torch.cat([model_scores(reward_model, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_text_too_long_for_the_reward_model_keeps_its_end():
    reward_model, row = make_reward_model(max_position_embeddings=4), [4, 5, 6, 7, 8, 1]
    assert torch.equal(model_scores(reward_model, [row]), model_scores(reward_model, [row[-4:]]))


@pytest.mark.parametrize("pad_token", ["[PAD]", "[EOS]"])
def test_our_reward_model_reads_the_eos_even_where_pad_is_eos(pad_token):
    policy = make_policy(make_lm(), make_tokenizer(pad_token=pad_token), 1.0, "float32")
    reward_model, tokenizer = new_reward_model(policy, make_tokenizer(pad_token=pad_token))
    assert reward_model.config.pad_token_id == tokenizer.pad_token_id != 1
    with torch.no_grad():
        with_eos, without = model_scores(reward_model, [[4, 5, 1], [4, 5]])
        hidden = reward_model.base_model(torch.tensor([[4, 5, 1]])).last_hidden_state[0, -1]
        assert torch.allclose(with_eos, reward_model.score(hidden)[0], atol=1e-5)
    assert with_eos != without


def test_a_new_reward_model_starts_from_the_policys_trunk():
    policy = make_policy(make_lm(), make_tokenizer(), 1.0, "float32")
    reward_model, _ = new_reward_model(policy, make_tokenizer())
    own, copied = policy.lm.base_model.state_dict(), reward_model.base_model.state_dict()
    assert all(torch.equal(own[name], copied[name]) for name in own)
    assert all(own[name].data_ptr() != copied[name].data_ptr() for name in own)


def test_the_kl_of_a_response_is_the_sum_over_its_tokens():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]])
    rollout = Rollout(None, None, mask, None, logprobs, torch.full((2, 3), -2.5), None, None)
    # (−1 + 2.5) + (−2 + 2.5) = 2 and −3 + 2.5 = −0.5; the padding does not count
    assert response_kl(rollout).tolist() == [2.0, -0.5]


# Rewards from scores -----------------------------------------------------------------------------


def scored_rollout(scores):
    """Two real tokens and one padded slot; three real tokens in a row that never ended."""
    rollout = collect_rollout(ActorCritic(Policy(make_lm(), 0, [1])), Policy(make_lm(), 0, [1]),
                              PROMPTS[:2], ARGS, seed=0)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    zeros = torch.zeros(2, 3)
    return replace(rollout, response_mask=mask, old_logprobs=zeros, ref_logprobs=zeros,
                   ended=torch.tensor([True, False]), scores=torch.tensor(scores))


def test_a_response_cut_at_the_limit_pays_the_penalty_on_its_last_token():
    args = replace(ARGS, missing_eos_penalty=3.0)
    rewards = compute_rewards(scored_rollout([1.0, 2.0]), ScoreNorm(), 0.0, args)
    assert rewards.tolist() == [[0, 1, 0], [0, 0, -1]]


def test_scores_are_normalised_then_clipped_then_penalised():
    # (8 - 2) / 3 = 2 -> clipped to 1.5; (2 - 2) / 3 = 0 -> minus 1 for the missing EOS.
    args = replace(ARGS, missing_eos_penalty=1.0, score_clip=1.5)
    rewards = compute_rewards(scored_rollout([8.0, 2.0]), ScoreNorm(2.0, 3.0), 0.0, args)
    assert rewards.tolist() == [[0, 1.5, 0], [0, 0, -1]]


def test_running_normalisation_follows_three_batches_of_scores():
    norm, scores = ScoreNorm(running=True), 3 + 2 * torch.randn(30)
    normalised = [norm(part) for part in scores.split([10, 4, 16])]
    assert norm.mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert norm.std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert torch.allclose(normalised[2], (scores[14:] - norm.mean) / norm.std, atol=1e-5)


def test_a_kl_in_the_loss_is_not_in_the_reward_too():
    rollout = replace(scored_rollout([1.0, 2.0]), ref_logprobs=-torch.ones(2, 3))
    args = replace(ARGS, kl_in="loss", kl_estimator="k2")
    assert compute_rewards(rollout, ScoreNorm(), 0.5, args).tolist() == [[0, 1, 0], [0, 0, 2]]


def test_whitened_rewards_have_std_1_and_keep_their_mean():
    rewards = compute_rewards(scored_rollout([1.0, 4.0]), ScoreNorm(), 0.0,
                              replace(ARGS, whiten_rewards=True))
    real = rewards[scored_rollout([1.0, 4.0]).response_mask]  # before: 0, 1, 0, 0, 4
    assert real.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert real.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


# What is reported and saved -----------------------------------------------------------------------


def test_the_metrics_of_three_responses_by_hand():
    ids = torch.tensor([[4, 5, 6, 5, 6], [7, 8, 1, 0, 0], [7, 8, 1, 0, 0]])
    zeros = torch.zeros(3, 4)
    rollout = Rollout(ids, ids > 0, ids[:, 1:] > 0, torch.tensor([False, True, True]),
                      zeros, zeros, zeros, zeros, torch.tensor([1.0, 2.0, 6.0]))
    metrics = rollout_metrics(rollout, make_tokenizer(), replace(ARGS, dataset="mine"))
    assert metrics["eos_share"] == pytest.approx(2 / 3) and metrics["score_mean"] == 3
    assert metrics["response_len"] == pytest.approx(8 / 3)
    assert metrics["distinct_2"] == 3 / 5  # 5 6, 6 5, 5 6; 8 1; 8 1


def test_the_win_rate_is_that_of_ppo_over_sft(capsys):
    before, after = scored_rollout([1.0, 2.0]), scored_rollout([3.0, 2.0])  # a win and a tie
    for x in (before, after):
        x.sequence_ids, x.sequence_mask = (y[:, :4 + 3] for y in (x.sequence_ids, x.sequence_mask))
    args = replace(ARGS, dataset="mine")
    print_before_after(({}, before), ({}, after), make_tokenizer(), args)
    assert "win rate by score                   0.500    0.750" in capsys.readouterr().out


def test_generate_of_the_saved_policy_keeps_its_temperature_and_every_eos(tmp_path):
    lm = make_lm()
    lm.generation_config.eos_token_id = [1, 2]
    log = SimpleNamespace(run_dir=tmp_path, tokenizer=make_tokenizer())
    save_policy(make_policy(lm, log.tokenizer, 0.5, "float32"), log)
    config = type(lm.generation_config).from_pretrained(tmp_path / "policy")
    assert config.temperature == 0.5 and config.eos_token_id == [1, 2]
