"""Our formulas beside those of trl 1.12.0 and Stable-Baselines3 2.9, on the same random numbers.

    python benchmarks/cross_checks.py

The largest difference is printed and, where definitions do not agree, who does what. Both libraries
keep their losses inside long methods: those lines are cut out of the installed packages and
executed on our tensors, so that it is their code that we compare with. A few seconds; the table is
written to results/cross_checks.md and .json. Formulas that ppo_classic.py copies from ppo_rlhf.py
are held against it in tests/test_shared_math.py.
"""

import inspect
import textwrap
from importlib.metadata import version

import common  # benchmarks/common.py
import numpy as np
import torch

rlhf = common.import_ppo_rlhf()

import ppo_classic as classic  # noqa: E402 - it lies beside the other

TOLERANCE = 1e-6
ROWS, LEN, VOCAB = 6, 8, 11
RESPONSE_LENS = torch.tensor([8, 5, 1, 3, 8, 6])  # tokens; two responses fill the row


def draw(*shape):
    """Random numbers, a new block for each call, the same ones in every run."""
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.arange(LEN) < RESPONSE_LENS[:, None]  # (rows, len)
OLD, REF = (-draw(ROWS, LEN).abs() - 0.1 for _ in range(2))
NEW = OLD + 0.3 * draw(ROWS, LEN)
VALUES, NEW_VALUES, RETURNS, ADVANTAGES, REWARDS = (draw(ROWS, LEN) for _ in range(5))
SCORES = draw(ROWS)


def run_lines(method, first: str, last: str, names: dict) -> dict:
    """Execute the lines of an installed method from the one that contains first to the one that
    contains last, on our tensors. Returns: all names after it."""
    lines, names = inspect.getsource(method).splitlines(), dict(names)
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(start, len(lines)) if last in lines[i])
    exec(textwrap.dedent("\n".join(lines[start : end + 1])), names)
    return names


def masked(x: torch.Tensor) -> torch.Tensor:
    """0 in the padding, as both libraries and ours have it after their masks."""
    return torch.where(MASK, x, 0)


class Settings:
    """The settings that trl's lines read."""

    cliprange = cliprange_value = 0.2
    vf_coef, gamma, lam, kl_coef, whiten_rewards = 0.1, 0.97, 0.9, 0.05, False


def compare_with_trl() -> list[tuple]:
    """Rows: quantity, other, ours, theirs, reason where they differ."""
    from trl.experimental.ppo import ppo_trainer as trl

    train, rows = trl.PPOTrainer.train, []
    rows.append(("masked mean", rlhf.masked_mean(OLD, MASK), trl.masked_mean(OLD, MASK), ""))
    n = MASK.sum()
    rows.append(("whitening", masked(rlhf.masked_whiten(ADVANTAGES, MASK)),
                 masked(trl.masked_whiten(ADVANTAGES, MASK)),
                 f"trl divides the variance by n − 1, ours by n, as lm-human-preferences did; here "
                 f"n = {n} tokens, a factor of {(n / (n - 1)).sqrt():.3f}"))
    for estimator in ("k1", "k3"):
        settings = type("", (), {"args": type("", (Settings,), {"kl_estimator": estimator})})
        theirs = run_lines(train, "logr = ref_logprobs", "kl = -logr", {
            "ref_logprobs": REF, "logprobs": OLD, "args": settings.args})["kl"]
        rows.append((f"KL, {estimator}", rlhf.kl_penalty(OLD, REF, estimator), theirs, ""))
    ours = rlhf.gae(REWARDS, VALUES, MASK, Settings.gamma, Settings.lam)
    theirs = run_lines(train, "lastgaelam = 0", "returns = advantages + values", {
        "torch": torch, "args": Settings, "responses": MASK, "rewards": masked(REWARDS),
        "values": masked(VALUES)})
    rows.append(("GAE: advantages", ours[0], masked(theirs["advantages"]), ""))
    rows.append(("GAE: returns", ours[1], masked(theirs["returns"]), ""))
    rows += compare_rewards_with_trl(train)
    return rows + compare_losses_with_trl(train, trl)


def compare_rewards_with_trl(train) -> list[tuple]:
    """Where the score lands, and what that does to the advantages."""
    kl = masked(rlhf.kl_penalty(OLD, REF))
    names = {"torch": torch, "args": Settings, "scores": SCORES, "non_score_reward":
             -Settings.kl_coef * kl, "sequence_lengths": RESPONSE_LENS - 1,
             "sequence_lengths_p1": RESPONSE_LENS}
    theirs = run_lines(train, "rewards = non_score_reward.clone()", "+= scores", names)["rewards"]
    ours = rlhf.token_rewards(SCORES, kl, MASK, Settings.kl_coef)
    full = RESPONSE_LENS == LEN
    rows = [("rewards of responses that fill the row", ours[full], theirs[full], ""),
            ("rewards of shorter responses", ours[~full], theirs[~full],
             "trl adds the score one slot after the last token, ours to the last token")]
    # trl has a value in that slot too, for the state after EOS; its recursion has no mask.
    extra = torch.arange(LEN) == RESPONSE_LENS[:, None]  # (rows, len)
    random_value = torch.where(MASK | extra, VALUES, 0)
    for name, values, gae_lambda, reason in (
        ("λ = 1", random_value, 1.0, ""),
        ("λ = 0.9", random_value, 0.9, "where ours has the score, trl has λ·score + (1 − λ)·value "
                                       "of the state after EOS: a forecast of what is known"),
        ("λ = 0.9, that value = score", torch.where(extra, SCORES[:, None], random_value), 0.9, ""),
    ):
        advantages, _ = rlhf.gae(ours, masked(values), MASK, 1.0, gae_lambda)
        shifted, _ = rlhf.gae(theirs, values, torch.ones_like(MASK), 1.0, gae_lambda)
        rows.append((f"advantages from these rewards, γ = 1, {name}", advantages, masked(shifted),
                     reason))
    return rows


def compare_losses_with_trl(train, trl) -> list[tuple]:
    """Policy loss, value loss, clip fractions, log-probabilities."""
    names = {"torch": torch, "masked_mean": trl.masked_mean, "args": Settings, "padding_mask":
             ~MASK, "micro_batch_inds": slice(None), "mb_advantage": ADVANTAGES, "new_logprobs":
             masked(NEW), "mb_logprobs": masked(OLD), "mb_values": VALUES, "mb_return": RETURNS,
             "vpred": NEW_VALUES, "logits": torch.zeros(1, 2)}
    theirs = run_lines(train, "vpredclipped = torch.clamp", "loss = pg_loss +",
                       names | {"padding_mask_p1": ~MASK})
    loss, _ = rlhf.policy_loss(NEW, OLD, ADVANTAGES, MASK, 0.2)
    vf_loss, vf_clipfrac = rlhf.value_loss(NEW_VALUES, VALUES, RETURNS, MASK, 0.2)
    one_more = torch.arange(LEN) < RESPONSE_LENS[:, None] + 1  # trl's own mask for values
    wider = run_lines(train, "vpredclipped = torch.clamp", "loss = pg_loss +",
                      names | {"padding_mask_p1": ~one_more})
    weight, hidden, ids = draw(VOCAB, 5), draw(ROWS, 5), torch.arange(ROWS)
    layer = type("", (), {"output_layer": lambda _, temperature: (weight, torch.zeros(VOCAB))})()
    return [("policy loss", loss, theirs["pg_loss"], ""),
            ("value loss, the same mask", vf_loss, theirs["vf_loss"], ""),
            ("value loss, trl's mask", vf_loss, wider["vf_loss"],
             "trl also trains the value of the state after EOS; ours has no such state"),
            ("value clip fraction", vf_clipfrac, theirs["vf_clipfrac"], ""),
            ("log-probability of a token, temperature 0.7",
             rlhf.chunked_logprobs(layer, hidden, ids, 0.7),
             trl.selective_log_softmax(hidden @ weight.T / 0.7, ids), "")]


def compare_gae_with_sb3() -> tuple:
    """RolloutBuffer against gae, with episodes that terminate and that are truncated."""
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import RolloutBuffer

    rewards, values = REWARDS.T, VALUES.T  # time first: (len, rows)
    last_values, final_values = draw(ROWS), draw(LEN, ROWS)
    terminated = torch.rand(LEN, ROWS, generator=GENERATOR) < 0.2
    truncated = (torch.rand(LEN, ROWS, generator=GENERATOR) < 0.2) & ~terminated
    done = terminated | truncated
    next_values = torch.cat([values[1:], last_values[None]])
    next_values = torch.where(done, final_values, next_values)
    buffer = RolloutBuffer(LEN, Box(-1, 1, (1,)), Box(-1, 1, (1,)), gae_lambda=0.9, gamma=0.97,
                           n_envs=ROWS)
    # SB3 adds γ·V(final observation) to the reward of a truncated step, then treats it as terminal.
    buffer.rewards = (rewards + 0.97 * torch.where(truncated, final_values, 0)).numpy()
    buffer.values, starts = values.numpy(), np.zeros((LEN, ROWS), dtype=np.float32)
    starts[1:] = done[:-1].numpy()
    buffer.episode_starts = starts
    buffer.compute_returns_and_advantage(last_values, done[-1].numpy())
    ours, _ = classic.gae(rewards, values, next_values, terminated, truncated, 0.97, 0.9)
    return ("GAE with terminated and truncated episodes", ours, torch.tensor(buffer.advantages), "")


def compare_with_sb3() -> list[tuple]:
    """Advantages; and lines of PPO.train: losses, approximate KL, clip fraction."""
    from stable_baselines3 import PPO

    old, new, advantages = OLD.flatten(), NEW.flatten(), ADVANTAGES.flatten()
    old_values, new_values, returns = VALUES.flatten(), NEW_VALUES.flatten(), RETURNS.flatten()
    data = type("", (), {"old_log_prob": old, "returns": returns, "old_values": old_values})
    names = {"th": torch, "F": torch.nn.functional, "rollout_data": data, "log_prob": new,
             "advantages": advantages, "clip_range": 0.2, "values": new_values, "pg_losses": [],
             "clip_fractions": [], "clip_range_vf": 0.2}
    policy = run_lines(PPO.train, "ratio = th.exp(", "clip_fraction = ", names)
    kl = run_lines(PPO.train, "log_ratio = log_prob", "approx_kl_div = ", names)
    loss, clipfrac = classic.policy_loss(new, old, advantages, 0.2)
    unclipped, _ = classic.value_loss(new_values, old_values, returns, float("inf"))
    clipped, _ = classic.value_loss(new_values, old_values, returns, 0.2)
    mean_squares = torch.nn.functional.mse_loss(returns, new_values)
    their_pred = run_lines(PPO.train, "values_pred = rollout_data.old_values", ")", names | {
        "values": new_values})
    return [
        compare_gae_with_sb3(), ("policy loss", loss, policy["policy_loss"], ""),
        ("approximate KL", classic.kl_penalty(old, new).mean(), torch.tensor(kl["approx_kl_div"]),
         ""),
        ("clip fraction", clipfrac, torch.tensor(policy["clip_fraction"]),
         "SB3 counts every ratio outside 1 ± ε, ours those whose gradient is cut"),
        ("value loss, not clipped, twice ours", 2 * unclipped, mean_squares, ""),
        ("value loss, clipped, twice ours", 2 * clipped,
         torch.nn.functional.mse_loss(returns, their_pred["values_pred"]),
         "SB3 takes the clipped error, ours (and OpenAI's) the larger of the two; no ½ in SB3"),
    ]


def main():
    """Compare, print the table, write it."""
    records = []
    for library, rows in (("trl", compare_with_trl()), ("stable-baselines3", compare_with_sb3())):
        for quantity, ours, theirs, reason in rows:
            # relative to the largest number: float32 knows no 1e-6 of a number of 10
            difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
            records.append({"library": f"{library} {version(library)}", "quantity": quantity,
                            "difference": difference, "agree": difference < TOLERANCE,
                            "reason": reason})
            assert (difference < TOLERANCE) == (not reason), records[-1]
    common.publish("cross_checks", common.markdown(
        ["library", "quantity", "largest difference", "who does what"],
        [[x["library"], x["quantity"], f"{x['difference']:.1g}", x["reason"]] for x in records]))
    machine = common.hardware("torch", "trl", "stable-baselines3")
    common.write_results("cross_checks", {"hardware": machine, "rows": records})


if __name__ == "__main__":
    main()
