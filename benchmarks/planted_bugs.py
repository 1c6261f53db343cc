"""Do the tests notice? One-line bugs, planted one at a time into copies of the two files.

    pip install -r requirements.txt
    python benchmarks/planted_bugs.py             # runs what is missing, two at a time
    python benchmarks/planted_bugs.py --table     # the table, from the committed results (.json)

Each bug happened to somebody (the table says where; numbers are issues and pull requests on GitHub)
or is a near relative of one that did. For each, the behavioural tests run until the first failure,
fastest file first; tests that compare the text of the files, their copies, or the README with
results are left out: they would notice any change. First the files as they are have to pass. A bug
that no test catches is a missing test. Each result is written to results/planted_bugs.json at once;
a change of files, tests or bugs starts the list anew.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from classic import hardware  # benchmarks/classic.py

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "planted_bugs.json"
TESTS = {
    "ppo_rlhf.py": ["test_math.py", "test_rollout.py", "test_update.py", "test_data.py",
                    "test_pipeline.py", "test_optimum.py"],
    "ppo_classic.py": ["test_classic.py"],
}
SEEN = {
    1: "trlX #107, NeMo-Aligner #68", 2: "OpenRLHF #217, TransformerLens #1609",
    3: "verl #50, ROLL #447", 4: "Stable-Baselines3 #105, RoboVerse #814",
    5: "trlX #401, trl #734", 6: "DeepSpeedExamples #470, trl #2387",
    7: "trl #3750, spinningup #50", 8: "verl #1758, trlX #509", 9: "OpenRLHF #853, trl #4159",
    10: "trl #235, MedicalGPT #374", 11: "trl #1540, reef #536", 12: "trl #2057, #702",
    13: "transformers #35909, trl #937", 14: "trl #6805, OpenRLHF #238",
    15: "open-instruct #534, verl #2953", 16: "trlX #361, #441", 17: "trl #407, verl #906",
    18: "CleanRL #198, Stable-Baselines3 #633", 19: "CleanRL #499", 20: "verl #2506",
    21: "CleanRL #337, #494, rlhf-book #216", 22: "Stable-Baselines3 #325, OpenRLHF #1250",
    23: "OpenRLHF #1240", 24: "OpenRLHF #634", 25: "trl #1783, #1650",
    26: "Stable-Baselines3 #1533, trlX #203", 27: "trlX #522", 28: "trl #224, tianshou #742",
    29: "trl #1674, #3853", 30: "trl #2022, open-instruct #756", 31: "trl #1643, #2657",
    32: "trl #5174", 33: "trl #546, verl #1524", 34: "OpenRLHF #1219",
    35: "Stable-Baselines3 #150, #227", 36: "CleanRL #400", 37: "Stable-Baselines3, changelog",
}

# (key of SEEN or None, what the bug is, the line, the line with the bug)
RLHF = [
    (1, "old log-probabilities without the attention mask",
     "inputs = sequence_ids[idx], sequence_mask[idx], response_ids.shape[1]",
     "inputs = sequence_ids[idx], torch.ones_like(sequence_mask[idx]), response_ids.shape[1]"),
    (2, "position ids count the padding",
     "return (mask.long().cumsum(-1) - 1).clamp(min=0)",
     "return torch.arange(mask.shape[1]).expand_as(mask)"),
    (3, "GAE without its mask",
     "rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)",
     "rewards, values = rewards, values"),
    (5, "the response mask forgets EOS",
     "column_masks.append(~ended)  # EOS itself is real, what follows it is padding\n"
     "        ended = ended | torch.isin(sampled, policy.eos_ids)",
     "ended = ended | torch.isin(sampled, policy.eos_ids)\n        column_masks.append(~ended)"),
    (5, "masks from token identity instead of lengths",
     "    return ids.to(device), mask.to(device)\n",
     "    return ids.to(device), (ids != pad_id).to(device)\n"),
    (6, "only the first of several EOS ids ends a response",
     "ended = ended | torch.isin(sampled, policy.eos_ids)",
     "ended = ended | (sampled == policy.eos_ids[0])"),
    (7, "the score one slot early",
     "last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)",
     "last_token_idx = (response_mask.sum(dim=1, keepdim=True) - 2).clamp(min=0)"),
    (7, "the score one slot late",
     "last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)",
     "last_token_idx = response_mask.sum(dim=1, keepdim=True).clamp(max=kl.shape[1] - 1)"),
    (7, "the score in the last column, padding or not",
     "last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)",
     "last_token_idx = torch.full_like(response_mask[:, :1].long(), kl.shape[1] - 1)"),
    (8, "log-probabilities shifted by one",
     "logits = logits[:, :-1]  # (batch, response_len, vocab): position t scores token t + 1",
     "logits = logits[:, 1:]"),
    (8, "values read after the token instead of before it",
     "hidden = output.hidden_states[-1][:, -response_len - 1 : -1]",
     "hidden = output.hidden_states[-1][:, -response_len:]"),
    (8, "a separate critic read one position late",
     "hidden = output.last_hidden_state[:, -response_len - 1 : -1]",
     "hidden = output.last_hidden_state[:, -response_len:]"),
    (9, "temperature forgotten",
     "logits = output.logits.float() / self.temperature", "logits = output.logits.float()"),
    (10, "greedy instead of sampled",
     "sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (batch,)",
     "sampled = probabilities.argmax(-1)"),
    (10, "PAD may be sampled",
     "return logits.index_fill(-1, self.banned_ids, lowest), output", "return logits, output"),
    (11, "dropout left on", "return lm.eval(), tokenizer", "return lm.train(), tokenizer"),
    (12, "the reference is the policy itself",
     "reference = copy.deepcopy(policy).requires_grad_(False)", "reference = policy"),
    (12, "the reference follows the policy",
     "if args.ref_update_interval and iteration % args.ref_update_interval == 0:", "if True:"),
    (13, "texts for the reward model padded on the left",
     'ids, mask = pad_rows(rows, reward_model.config.pad_token_id, "right", reward_model.device)',
     'ids, mask = pad_rows(rows, reward_model.config.pad_token_id, "left", reward_model.device)'),
    (13, "scores read at the padding",
     'ids, mask = pad_rows(rows, reward_model.config.pad_token_id, "right", reward_model.device)',
     'ids, mask = pad_rows(rows, 3, "right", reward_model.device)'),
    (14, "the penalty for a missing EOS falls on those that ended",
     "penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)",
     "penalty = args.missing_eos_penalty * rollout.ended.float()"),
    (15, "k2 without the square",
     "return 0.5 * log_ratio**2", "return 0.5 * log_ratio.abs()"),
    (15, "k3 with the ratio upside down",
     "return torch.exp(-log_ratio) - 1 + log_ratio", "return torch.exp(log_ratio) - 1 - log_ratio"),
    (16, "KL with the wrong sign in the reward",
     "return torch.where(response_mask, scores - kl_coef * kl, 0)",
     "return torch.where(response_mask, scores + kl_coef * kl, 0)"),
    (16, "the adaptive coefficient moves the wrong way",
     "error = max(-0.2, min(0.2, observed_kl / kl_target - 1))",
     "error = max(-0.2, min(0.2, 1 - observed_kl / kl_target))"),
    (16, "the logged KL is a mean per token",
     "return torch.where(rollout.response_mask, kl, 0).sum(dim=1)",
     "return masked_mean(kl, rollout.response_mask, 1)"),
    (17, "accumulation averages averages in the update",
     "share = mask.sum() / minibatch.response_mask.sum()",
     "share = torch.tensor(len(mask) / len(minibatch.response_mask))"),
    (17, "accumulation averages averages in SFT",
     "loss = loss_sum(model, part) / num_terms",
     "loss = loss_sum(model, part) / sum(len(x[1]) for x in part) * len(part) / len(examples)"),
    (20, "advantages and returns swapped",
     "    return advantages, advantages + values\n",
     "    return advantages + values, advantages\n"),
    (21, "returns without the values",
     "    return advantages, advantages + values\n", "    return advantages, advantages\n"),
    (21, "the critic's targets from the wrong buffer",
     "vf_loss, vf_clipfrac = value_loss(new_values, microbatch.old_values, microbatch.returns,",
     "vf_loss, vf_clipfrac = value_loss(new_values, microbatch.old_values, microbatch.advantages,"),
    (21, "λ forgotten in the recursion",
     "next_advantage = delta + gamma * gae_lambda * next_advantage",
     "next_advantage = delta + gamma * next_advantage"),
    (21, "discount forgotten in the TD error",
     "delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + next_value - values[:, t]"),
    (22, "whitening counts the padding",
     "variance = masked_mean((x - mean) ** 2, mask)", "variance = ((x - mean) ** 2).mean()"),
    (22, "returns are whitened too",
     "        advantages = masked_whiten(advantages, mask)\n",
     "        advantages = masked_whiten(advantages, mask)\n"
     "        returns = masked_whiten(returns, mask)\n"),
    (23, "masking by multiplication",
     "total, count = torch.where(mask, x, 0).sum(dim), mask.sum(dim)",
     "total, count = (x * mask).sum(dim), mask.sum(dim)"),
    (24, "log-probabilities in the precision of the model",
     "logits = output.logits.float() / self.temperature",
     "logits = output.logits / self.temperature"),
    (25, "the separate critic starts from a random head",
     "actor_critic.value_head.weight.copy_(head.weight / score_norm.std)",
     "nn.init.normal_(actor_critic.value_head.weight)"),
    (26, "the value head starts at random",
     "nn.init.zeros_(self.value_head.weight)  # V = 0: at first no opinion [N details, P2]",
     "nn.init.normal_(self.value_head.weight)"),
    (27, "minibatches drawn with replacement",
     "for part in split_list(rng.sample(rows, len(rows)), size)]",
     "for part in split_list(rng.choices(rows, k=len(rows)), size)]"),
    (27, "no epoch but the first",
     "    for _ in range(args.update_epochs):\n        epoch = []",
     "    for _ in range(1):\n        epoch = []"),
    (28, "a rollout with its graph",
     "@torch.no_grad()\ndef collect_rollout(", "def collect_rollout("),
    (29, "a second BOS before chats",
     "prompts = tokenizer(texts, add_special_tokens=not is_chat)",
     "prompts = tokenizer(texts, add_special_tokens=True)"),
    (29, "responses to learn from do not end", "[[[*ids, eos] for ids in column]",
     "[[[*ids] for ids in column]"),
    (29, "the policy's ids for a reward model with other tokens",
     "retokenise=None if same_tokens else translate,", "retokenise=None,"),
    (31, "the reference is saved as the policy",
     "    save_policy(policy, log)\n    after =", "    save_policy(reference, log)\n    after ="),
    (31, "what generates is not what was trained: top-p of the given model",
     "policy.lm.generation_config = GenerationConfig(", "GenerationConfig("),
    (33, "batches that do not divide are accepted",
     "if getattr(args, whole) % getattr(args, part):", "if False:"),
    (6, "a response goes on after its EOS",
     "ended = ended | torch.isin(sampled, policy.eos_ids)\n        if ended.all():",
     "ended = torch.isin(sampled, policy.eos_ids)\n        if ended.all():"),
    (30, "the clip fraction counts the padding",
     "return loss, masked_mean((clipped < unclipped).float(), mask)",
     "return loss, (clipped < unclipped).float().mean()"),
    (30, "approx_kl counts the padding",
     'approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)',
     'approx_kl = kl_penalty(old_logprobs, new_logprobs, "k3").mean()'),
    (32, "gradients are not clipped",
     "norm = nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm)",
     "norm = nn.utils.clip_grad_norm_(actor_critic.parameters(), 1e9)"),
    (34, "a score of 0 is taken as missing",
     "if scores.dim() == 1:", "if scores.dim() == 1 and scores.all():"),
    (35, "explained variance with its arguments swapped",
     'means["explained_variance"] = explained_variance(rollout.returns, rollout.old_values,',
     'means["explained_variance"] = explained_variance(rollout.old_values, rollout.returns,'),
    (35, "entropy with the wrong sign",
     "return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)",
     "return (logits.softmax(-1) * logits).sum(-1) - logits.logsumexp(-1)"),
    (None, "the clip on the wrong side",
     "loss = -masked_mean(torch.min(unclipped, clipped), mask)",
     "loss = -masked_mean(torch.max(unclipped, clipped), mask)"),
    (None, "the ratio upside down",
     "ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0))\n    unclipped",
     "ratio = torch.exp(torch.where(mask, old_logprobs - new_logprobs, 0))\n    unclipped"),
    (None, "the policy loss with the wrong sign",
     "loss = -masked_mean(torch.min(unclipped, clipped), mask)",
     "loss = masked_mean(torch.min(unclipped, clipped), mask)"),
    (None, "the value loss takes the smaller error",
     "loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)",
     "loss = 0.5 * masked_mean(torch.min(unclipped, clipped), mask)"),
    (None, "the value loss without its weight",
     "loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy",
     "loss = pg_loss + vf_loss - args.ent_coef * mean_entropy"),
    (None, "the entropy bonus punishes entropy",
     "loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * mean_entropy",
     "loss = pg_loss + args.vf_coef * vf_loss + args.ent_coef * mean_entropy"),
    (None, "the reward model prefers the rejected response",
     "return chosen_scores - rejected_scores", "return rejected_scores - chosen_scores"),
    (None, "SFT trains on the prompt too",
     "return -torch.where(response_mask, logprobs, 0).sum()",
     "return -policy(sequence_ids, sequence_mask, sequence_ids.shape[1] - 1)[0].sum()"),
    (None, "the learning rate is not annealed",
     "scale = 1 - (step - 1) / num_steps if anneal else 1.0", "scale = 1.0"),
    # found by a helper that was asked for bugs which no test catches
    (None, "PPO-ptx always draws the same demonstrations",
     "sample = rng.choices(demonstrations, k=args.minibatch_size)",
     "sample = demonstrations[: args.minibatch_size]"),
    (None, "gradients of stages 1 and 2 pile up",
     "        optimizer.step()\n        optimizer.zero_grad()\n        log.scalars",
     "        optimizer.step()\n        log.scalars"),
    (None, "gradients of stages 1 and 2 are not clipped",
     "        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)\n",
     ""),
    (None, "the rate of stages 1 and 2 is not annealed",
     "optimizer.param_groups[0][\"lr\"] = learning_rate * lr_scale(step, num_steps)",
     "optimizer.param_groups[0][\"lr\"] = learning_rate"),
    (None, "equal scores are divided by almost 0",
     "return ScoreNorm(mean, std if std > 1e-6 else 1.0)",
     "return ScoreNorm(mean, std)"),
    (None, "scores are only shifted",
     "return ScoreNorm(mean, std if std > 1e-6 else 1.0)",
     "return ScoreNorm(mean)"),
    (12, "the separate critic is the reward model itself",
     "ActorCritic(policy, copy.deepcopy(reward_model.base_model).requires_grad_(True))",
     "ActorCritic(policy, reward_model.base_model.requires_grad_(True))"),
    (None, "the separate critic's trunk is frozen",
     "copy.deepcopy(reward_model.base_model).requires_grad_(True))",
     "copy.deepcopy(reward_model.base_model))"),
    (None, "the critic's trunk is not in the optimizer",
     "if not name.startswith(\"policy.\")]",
     "if name.startswith(\"value_head.\")]"),
    (None, "the rate is annealed in the log alone",
     "group[\"lr\"] = scale * peak",
     "group[\"lr\"] = peak"),
    (28, "the KL in the loss has no gradient",
     "kl = kl_penalty(new_logprobs, microbatch.ref_logprobs, args.kl_estimator)",
     "kl = kl_penalty(old_logprobs, microbatch.ref_logprobs, args.kl_estimator)"),
    (None, "the KL in the loss pushes away",
     "loss = loss + kl_coef * masked_mean(kl, mask)",
     "loss = loss - kl_coef * masked_mean(kl, mask)"),
    (15, "the KL is in reward and loss",
     "kl_coef if args.kl_in == \"reward\" else 0.0)",
     "kl_coef)"),
    (16, "the adaptive coefficient is not used",
     "rollout.rewards = compute_rewards(rollout, score_norm, kl_coef, args)",
     "rollout.rewards = compute_rewards(rollout, score_norm, args.kl_coef, args)"),
    (16, "the adaptive coefficient always starts anew",
     "kl_coef = adaptive_kl_coef(kl_coef,",
     "kl_coef = adaptive_kl_coef(args.kl_coef,"),
    (22, "whitened rewards lose their mean",
     "masked_whiten(rewards, mask, shift_mean=False) if",
     "masked_whiten(rewards, mask) if"),
    (None, "--target-kl means 1.5 times as much",
     "approx_kl > args.target_kl:",
     "approx_kl > 1.5 * args.target_kl:"),
    (None, "the same random numbers in every iteration",
     "seed = args.seed * 1_000_003 + iteration",
     "seed = args.seed * 1_000_003"),
    (None, "evaluation on training prompts",
     "collect_rollout(actor_critic, reference, data.eval_prompts, args, args.seed)",
     "collect_rollout(actor_critic, reference, data.prompts[: len(data.eval_prompts)], "
     "args, args.seed)"),
    (35, "the win rate of SFT over PPO",
     "wins = (quality[1] > quality[0])",
     "wins = (quality[0] > quality[1])"),
    (9, "perplexity at PPO's temperature",
     "perplexity(sft_policy, data.eval_demonstrations,\n",
     "perplexity(actor_critic.policy, data.eval_demonstrations,\n"),
    (9, "SFT at PPO's temperature",
     "train_sft(sft_policy, data, args, log)",
     "train_sft(policy, data, args, log)"),
    (9, "PPO-ptx at PPO's temperature",
     "sft_loss_sum, sft_policy, sample,",
     "sft_loss_sum, actor_critic.policy, sample,"),
    (None, "evaluation demonstrations are trained on",
     "train[:num_held], train[num_held:] if enough else train",
     "train[:num_held], train"),
    (None, "the annotator prefers the worse response",
     "math.exp(2 * (gold[1] - gold[0]))",
     "math.exp(2 * (gold[0] - gold[1]))"),
    (None, "reward-model accuracy on training prompts",
     "rng.choices(data.eval_prompts, k=500)",
     "rng.choices(data.prompts, k=500)"),
    (29, "a second EOS for the reward model",
     "and end is not None and row[-1:] != [end] else row",
     "and end is not None else row"),
    (29, "the same words with other ids taken as the same tokens",
     "tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()",
     "tokenizer.get_vocab().keys() <= reward_tokenizer.get_vocab().keys()"),
    (31, "the saved policy forgets its temperature",
     "do_sample=True, temperature=policy.temperature,",
     "do_sample=True, temperature=1.0,"),
    (6, "the saved policy forgets all EOS ids but one",
     "eos_token_id=policy.eos_ids.tolist(), pad_token_id=policy.pad_id,",
     "eos_token_id=log.tokenizer.eos_token_id, pad_token_id=policy.pad_id,"),
    (None, "the EOS share upside down",
     "ended.float().mean().item()",
     "(~ended).float().mean().item()"),
    (None, "distinct bigrams over the number of responses",
     "len(set(bigrams)) / max(1, len(bigrams))",
     "len(set(bigrams)) / len(responses)"),
    (None, "perplexity per response",
     "math.exp(sum(losses) / count_response_tokens(demonstrations))",
     "math.exp(sum(losses) / len(demonstrations))"),
    (None, "accuracy counts the wrong side",
     "[score_margins(reward_model, x) > 0 for x in parts]",
     "[score_margins(reward_model, x) < 0 for x in parts]"),
    (13, "long texts lose their end for the reward model",
     "rows = [ids[-context:] for ids in sequences]",
     "rows = [ids[:context] for ids in sequences]"),
    (None, "γ and λ change places",
     "gae(rewards, values, mask, args.gamma, args.gae_lambda)",
     "gae(rewards, values, mask, args.gae_lambda, args.gamma)"),
    (None, "a sample's total is a mean",
     "\"total\": rollout.rewards[i].sum().item()",
     "\"total\": rollout.rewards[i].mean().item()"),
    (None, "gradients of the update pile up",
     "            optimizer.step()\n            optimizer.zero_grad()\n",
     "            optimizer.step()\n"),
    (None, "running statistics forget how many they have seen",
     "self.mean, self.count = self.mean + delta * count / total, total",
     "self.mean, self.count = self.mean + delta * count / total, count"),
    (None, "policy and critic swap their rates",
     "(args.learning_rate, args.critic_learning_rate), strict=True)",
     "(args.critic_learning_rate, args.learning_rate), strict=True)"),
    (None, "--max-kl ends the run below it",
     "metrics[\"kl\"] > args.max_kl:",
     "metrics[\"kl\"] < args.max_kl:"),
    (None, "the weight of PPO-ptx ignored",
     "(coef * loss).backward()",
     "loss.backward()"),
    (None, "warm-up starts at rate 0",
     "min(1.0, step / warmup)",
     "min(1.0, (step - 1) / warmup)"),
    (None, "scores are not normalised",
     "scores, mask = score_norm(rollout.scores), rollout.response_mask",
     "scores, mask = rollout.scores, rollout.response_mask"),
    (12, "the separate critic shares the policy's trunk",
     "return ActorCritic(policy, copy.deepcopy(policy.lm.base_model)).to",
     "return ActorCritic(policy, policy.lm.base_model).to"),
    (17, "statistics of microbatches are summed without weights",
     "totals[name] = totals.get(name, 0.0) + (share * value).item()",
     "totals[name] = totals.get(name, 0.0) + value.item()"),
    (2, "position ids cut from the wrong end",
     "position_ids=position_ids(mask)[:, -ids.shape[1] :], **kwargs)",
     "position_ids=position_ids(mask)[:, : ids.shape[1]], **kwargs)"),
    (None, "every pass over the prompts in the same order",
     "shuffled_indices(len(prompts), f\"{seed} {epoch}\")",
     "shuffled_indices(len(prompts), f\"{seed}\")"),
    (11, "the reward model keeps its dropout",
     "return reward_model.eval(), tokenizer",
     "return reward_model, tokenizer"),
]
CLASSIC = [
    (18, "truncated treated as terminated",
     "torch.where(terminated, 0, next_values)",
     "torch.where(terminated | truncated, 0, next_values)"),
    (18, "terminated treated as truncated",
     "torch.where(terminated, 0, next_values)", "next_values"),
    (18, "bootstrap from the first observation of the next episode",
     'next_obs[i] = infos["final_obs"][i]', "pass"),
    (4, "advantages run on over the end of an episode",
     "(~(terminated | truncated)).to(values.dtype)", "(~terminated).to(values.dtype)"),
    (4, "the end of an episode one step late",
     "decays = gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)",
     "decays = gamma * gae_lambda * (~(terminated | truncated).roll(1, 0)).to(values.dtype)"),
    (19, "autoreset on the next step", "AutoresetMode.SAME_STEP)", "AutoresetMode.NEXT_STEP)"),
    (21, "returns without the values",
     "    return advantages, advantages + values\n", "    return advantages, advantages\n"),
    (27, "minibatches drawn with replacement",
     "torch.randperm(batch_size).split(",
     "torch.randint(batch_size, (batch_size,)).split("),
    (36, "observation statistics that never move",
     "agent.obs_norm.update(rollout.obs.flatten(0, 1))", "pass"),
    (36, "evaluation samples its actions",
     "agent.act(obs[None], greedy=True)", "agent.act(obs[None])"),
    (36, "statistics are not saved",
     'self.register_buffer("mean", torch.zeros(size))',
     'self.register_buffer("mean", torch.zeros(size), persistent=False)'),
    (37, "log-probabilities averaged over action dimensions",
     "0.5 * math.log(2 * math.pi)).sum(dim=-1)", "0.5 * math.log(2 * math.pi)).mean(dim=-1)"),
    (37, "entropies averaged over action dimensions",
     "0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)",
     "0.5 * math.log(2 * math.pi * math.e)).mean(dim=-1)"),
    (37, "unbounded actions reach the environment",
     "return np.clip(actions, space.low, space.high)", "return actions"),
    (None, "reward statistics run on over the end of an episode",
     "self.discounted = torch.where(ended, 0, rows[-1])", "self.discounted = rows[-1]"),
    (None, "β moves the wrong way", "if observed_kl < kl_target / 1.5:",
     "if observed_kl > kl_target / 1.5:"),
    (None, "KL(new, old) instead of KL(old, new)",
     "kl_beta * kl_penalty(old_logprobs, new_logprobs).mean()",
     "kl_beta * kl_penalty(new_logprobs, old_logprobs).mean()"),
    (None, "the learning rate is not annealed",
     "scale = 1 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0",
     "scale = 1.0"),
    # found by the same helper
    (None, "hidden layers start with gain 1",
     "(math.sqrt(2), math.sqrt(2), output_gain)",
     "(1.0, 1.0, output_gain)"),
    (36, "evaluation starts where training did",
     "env.reset(seed=args.seed * 1_000_003 + episode)",
     "env.reset(seed=args.seed + episode)"),
    (None, "the curve of returns shows lengths",
     "add_scalar(\"charts/episodic_return\", episode_return, step)",
     "add_scalar(\"charts/episodic_return\", length, step)"),
    (None, "observations are clipped on one side",
     "(rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)",
     "(rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(max=10)"),
    (None, "scaled rewards are clipped on one side",
     "(rewards * torch.rsqrt(self.stats.var + 1e-8)).clamp(-10, 10)",
     "(rewards * torch.rsqrt(self.stats.var + 1e-8)).clamp(max=10)"),
    (None, "β always starts anew",
     "kl_beta = adaptive_kl_beta(kl_beta,",
     "kl_beta = adaptive_kl_beta(args.kl_beta,"),
    (35, "explained variance with its arguments swapped",
     "explained_variance(rollout.returns, rollout.old_values)",
     "explained_variance(rollout.old_values, rollout.returns)"),
    (None, "the value loss takes the smaller error",
     "loss = 0.5 * torch.max(unclipped, clipped).mean()",
     "loss = 0.5 * torch.min(unclipped, clipped).mean()"),
    (None, "the clip on the wrong side",
     "loss = -torch.min(unclipped, clipped).mean()",
     "loss = -torch.max(unclipped, clipped).mean()"),
    (None, "the last iterations are not saved",
     "\n    save_model(log.run_dir / \"model.pt\", agent, reward_norm, args)\n    "
     "log.writer.close()",
     "\n    log.writer.close()"),
    (22, "returns are whitened too",
     "return whiten(advantages) if args.norm_advantages else advantages, returns",
     "return whiten(advantages) if args.norm_advantages else advantages, whiten(returns)"),
    (None, "the clip fraction counts actions that are not cut",
     "return loss, (clipped < unclipped).float().mean()",
     "return loss, (clipped != unclipped).float().mean()"),
    (None, "the flag for value clipping upside down",
     "vf_clip_coef = args.clip_coef if args.clip_vloss else math.inf",
     "vf_clip_coef = math.inf if args.clip_vloss else args.clip_coef"),
    (18, "values of the next states are those of the states",
     "agent.values(next_obs))",
     "agent.values(obs))"),
    (None, "a KL penalty beside the clip",
     "args.kl_beta if args.policy_loss.startswith(\"kl\") else 0.0",
     "args.kl_beta"),
    (None, "reward statistics without discount",
     "rows.append(self.gamma * self.discounted + reward)",
     "rows.append(self.discounted + reward)"),
    (None, "gradients of the update pile up",
     "            optimizer.zero_grad()\n",
     ""),
]
BUGS = [("ppo_rlhf.py", *bug) for bug in RLHF] + [("ppo_classic.py", *bug) for bug in CLASSIC]


def fingerprint():
    """Changes with the files, the tests that run and the list of bugs."""
    names = ["conftest.py", *TESTS["ppo_rlhf.py"], *TESTS["ppo_classic.py"]]
    paths = [ROOT / name for name in TESTS] + [ROOT / "tests" / name for name in names]
    text = repr(BUGS).encode() + b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(text).hexdigest()[:12]


def first_failure(file_name, line, bugged_line):
    """Run the tests on a copy in which line is bugged_line. Returns: the first test that fails, or
    None. Errors outside a test (a file that cannot be imported) are no catch: they raise."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(".git", "runs", "results", "__pycache__"))
        path = Path(folder, file_name)
        path.write_text(path.read_text().replace(line, bugged_line))
        tests = [f"tests/{test}" for test in TESTS[file_name]]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
    if process.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) tests/([\w.]+)::(\w+)", process.stdout, re.M)
    if not failed:
        raise RuntimeError(f"{bugged_line}: {process.stdout[-2000:]}")
    return f"{failed[1]}::{failed[2]}"


def plant(bug):
    """Plant one bug. Returns: its record."""
    file_name, seen, name, line, bugged_line = bug
    if (count := (ROOT / file_name).read_text().count(line)) != 1:
        raise ValueError(f"{name}: the line occurs {count} times in {file_name}")
    return {"bug": name, "file": file_name, "seen": SEEN.get(seen, ""),
            "caught_by": first_failure(file_name, line, bugged_line)}


def table(bugs):
    """A line per bug, then how many different tests did the catching; printed and written."""
    order = {(bug[0], bug[2]): i for i, bug in enumerate(BUGS)}
    lines = ["| file | planted bug | seen in | caught first by |", "|---|---|---|---|"]
    for x in sorted(bugs, key=lambda x: order[x["file"], x["bug"]]):
        lines.append(f"| {x['file']} | {x['bug']} | {x['seen']} | `{x['caught_by']}` |")
    caught = {x["caught_by"] for x in bugs} - {None}
    lines.append(f"\n{len(bugs)} bugs, {sum(x['caught_by'] is None for x in bugs)} not caught, "
                 f"{len(caught)} different tests caught one first")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    """Plant what is missing, two at a time, then print the table."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "--table" not in sys.argv:
        if results.get("fingerprint") != fingerprint():
            for file_name in TESTS:
                if failure := first_failure(file_name, "", ""):
                    raise SystemExit(f"{failure} fails without any bug")
            results = {"hardware": hardware("torch", "transformers", "gymnasium"),
                       "fingerprint": fingerprint(), "bugs": []}
        done = {(x["file"], x["bug"]) for x in results["bugs"]}
        missing = [bug for bug in BUGS if (bug[0], bug[2]) not in done]
        with ThreadPoolExecutor(2) as pool:
            for future in as_completed([pool.submit(plant, bug) for bug in missing]):
                results["bugs"].append(future.result())
                RESULTS.write_text(json.dumps(results, indent=0))
                print(future.result(), flush=True)
    table(results["bugs"])


if __name__ == "__main__":
    main()
