"""Do the tests notice? One-line bugs, planted one at a time into copies of the two files.

    pip install -r requirements.txt
    python benchmarks/planted_bugs.py             # runs what is missing, two at a time
    python benchmarks/planted_bugs.py --table     # the table, from the committed results (.json)
    python benchmarks/planted_bugs.py --blind     # 30 bugs by somebody who had seen no test

Each bug happened to somebody (the table says where; numbers are issues and pull requests on
GitHub), is a near relative of one that did, or was planted blind, by a helper that had not seen the
tests. For each, the behavioural tests run until the first failure, fastest file first; tests that
compare the text of the files, their copies, or the README with results are left out: they would
notice any change. First the files as they are have to pass. A bug that no test catches is a missing
test. Each result is written to results/planted_bugs.json at once. A bug is planted again if the
code of its file (comments and docstrings do not count), the bug or the test that caught it has
changed, or if no test has caught it; the test that caught it the last time then runs before all
others, to save time.
"""

import ast
import functools
import hashlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

import common  # benchmarks/common.py
from common import ROOT

TESTS = {
    "ppo_rlhf.py": ["test_math.py", "test_rollout.py", "test_update.py", "test_data.py",
                    "test_pipeline.py", "test_resume.py", "test_processes.py", "test_optimum.py"],
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
     "rows.old_logprobs, rows.entropies, rows.old_values = policy(rows, args.temperature)",
     "rows.old_logprobs, rows.entropies, rows.old_values = policy(\n"
     "            replace(rows, sequence_mask=torch.ones_like(rows.sequence_mask)), "
     "args.temperature)"),
    (2, "position ids count the padding",
     "positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]",
     "positions = torch.arange(mask.shape[1]).expand_as(mask)[:, -ids.shape[1] :]"),
    (2, "position ids cut from the wrong end",
     "(mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]",
     "(mask.long().cumsum(-1) - 1).clamp(min=0)[:, : ids.shape[1]]"),
    (2, "a trunk without position ids",
     "return trunk(input_ids=ids, attention_mask=mask, position_ids=positions,",
     "return trunk(input_ids=ids, attention_mask=mask,"),
    (None, "a separate critic reads with the policy's trunk",
     "hidden = self.states(self.trunk, ids, mask)[row, token - 1]",
     "hidden = self.states(self.lm.base_model, ids, mask)[row, token - 1]"),
    (None, "prompts are cut on the left and the columns of tokens are not moved",
     "token = prompt_len + column  # its column in ids",
     "token = rows.sequence_ids.shape[1] - rows.response_mask.shape[1] + column"),
    (None, "the last response column is left out",
     "used = rows.sequence_mask.any(dim=0)  # columns",
     "used = rows.sequence_mask.any(dim=0).clone()\n        used[-1] = False  # columns"),
    (None, "soft-capping left out",
     "if bound is not None:", "if bound is None:"),
    (None, "an output layer that scales its logits is accepted",
     "refuse(error > 0.1 * own.std(),",
     "refuse(error > 10 * own.std(),"),
    (None, "GPT-2's activation becomes another function",
     'setattr(config, name, "gelu_pytorch_tanh")', 'setattr(config, name, "relu")'),
    (None, "a row that goes on gets the noise of another one",
     "threshold = noise[active, t - prompt_len, None] * cumulative[:, -1:]",
     "threshold = noise[: len(active), t - prompt_len, None] * cumulative[:, -1:]"),
    (None, "rows leave the batch and stay in the cache",
     "                    cache.batch_select_indices(going)\n", ""),
    (None, "the cache forgets how many tokens it has",
     "        return self.num_tokens\n", "        return self.keys.shape[2]\n"),
    (None, "sampling ends when the first row has ended",
     "                if len(going) == 0:", "                if len(going) < len(active):"),
    (None, "the cache writes each token over the first one",
     "self.keys[:, :, start : self.num_tokens] = key_states",
     "self.keys[:, :, : self.num_tokens - start] = key_states"),
    (None, "the output layer gets the gradient of the last chunk alone",
     "weights_grads = (found[1:] if weights_grads is None else",
     "weights_grads = (found[1:] if True else"),
    (None, "the gradient of the entropy without H",
     "factor = factor - grad_H * (grad + H)",
     "factor = factor - grad_H * grad"),
    (None, "the gradient of a logprob without its own token",
     ".scatter_add_(1, part_ids, grad_logprobs)", ""),
    (None, "the backward pass reads at temperature 1",
     "logits = policy.logits(part, ctx.temperature)", "logits = policy.logits(part, 1.0)"),
    (None, "the entropy bonus has no gradient",
     "if policy.args.ent_coef > 0:  # else", "if False:  # else"),
    (3, "GAE without its mask",
     "rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)",
     "rewards, values = rewards, values"),
    (5, "the response mask forgets EOS",
     "sequence_mask[active, t] = ~ended[active]  # EOS is a real token, later ones are padding\n"
     "            ended[active] |= torch.isin(sampled, policy.eos_ids)\n",
     "ended[active] |= torch.isin(sampled, policy.eos_ids)\n"
     "            sequence_mask[active, t] = ~ended[active]\n"),
    (5, "masks from token identity instead of lengths",
     "    mask = pad([torch.ones_like(row, dtype=torch.bool) for row in ids])\n",
     "    mask = pad(ids, padding_value=pad_id) != pad_id\n"),
    (6, "only the first of several EOS ids ends a response",
     "ended[active] |= torch.isin(sampled, policy.eos_ids)",
     "ended[active] |= sampled == policy.eos_ids[0]"),
    (6, "a response goes on after its EOS",
     "ended[active] |= torch.isin(sampled, policy.eos_ids)",
     "ended[active] = torch.isin(sampled, policy.eos_ids)"),
    (6, "the saved policy forgets all EOS ids but one",
     "eos_token_id=policy.eos_ids.tolist(), pad",
     "eos_token_id=tokenizer.eos_token_id, pad"),
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
     "hidden = self.states(self.lm.base_model, ids, mask)[row, token - 1]",
     "hidden = self.states(self.lm.base_model, ids, mask)[row, token]"),
    (8, "values read after the token instead of before it",
     "        values = torch.zeros_like(logprobs)\n",
     "        hidden = self.states(self.lm.base_model, ids, mask)[row, token]\n"
     "        values = torch.zeros_like(logprobs)\n"),
    (8, "a separate critic read one position late",
     "hidden = self.states(self.trunk, ids, mask)[row, token - 1]",
     "hidden = self.states(self.trunk, ids, mask)[row, token]"),
    (9, "temperature forgotten",
     "            logits = logits / temperature\n", "            logits = logits * 1\n"),
    (9, "the sampler at temperature 1",
     "sample_tokens(policy, rows, u, args.temperature)",
     "sample_tokens(policy, rows, u, 1.0)"),
    (9, "the reference at temperature 1",
     "rows.ref_logprobs, _, _ = reference(rows, args.temperature)",
     "rows.ref_logprobs, _, _ = reference(rows, 1.0)"),
    (9, "new log-probabilities at temperature 1",
     "new_logprobs, entropies, new_values = policy(rows, args.temperature)",
     "new_logprobs, entropies, new_values = policy(rows, 1.0)"),
    (9, "SFT, PPO-ptx and perplexity at PPO's temperature",
     "logprobs, _, _ = policy(rows, temperature=1.0)",
     "logprobs, _, _ = policy(rows, policy.args.temperature)"),
    (10, "greedy instead of sampled",
     "sampled = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)",
     "sampled = logits.argmax(-1)"),
    (10, "PAD may be sampled",
     "        logits.detach().index_fill_(-1, self.banned_ids, -1e30)\n", ""),
    (11, "dropout left on",
     "setattr(config, name, 0.0)",
     "pass"),
    (11, "dropout left on where its name is short, as in GPT-2",
     'if "drop" in name and isinstance(value, float):',
     'if "dropout" in name and isinstance(value, float):'),
    (11, "the reward model keeps its dropout",
     'if "drop" in name and isinstance(value, float):',
     'if "drop" in name and isinstance(value, float) and kind == "ForCausalLM":'),
    (12, "the reference is the policy itself",
     "policy, reference = load_policy(sft, args), load_policy(sft, args)",
     "policy = reference = load_policy(sft, args)"),
    (12, "the reference follows the policy",
     "if args.ref_update_interval and iteration % args.ref_update_interval == 0:",
     "if True:"),
    (12, "the reference is refreshed an iteration early",
     "if args.ref_update_interval and iteration % args.ref_update_interval == 0:",
     "if args.ref_update_interval and (iteration + 1) % args.ref_update_interval == 0:"),
    (12, "the refreshed reference is the policy's own language model",
     "reference.lm.load_state_dict(policy.lm.state_dict())",
     "reference.lm = policy.lm"),
    (12, "the separate critic is the reward model itself",
     "self.trunk = copy.deepcopy(trunk).requires_grad_(True)",
     "self.trunk = trunk.requires_grad_(True)"),
    (12, "the separate critic shares the policy's trunk",
     "self.trunk = copy.deepcopy(trunk).requires_grad_(True)",
     "self.trunk = copy.deepcopy(trunk).requires_grad_(True)\n"
     "            if trunk is self.lm.base_model:\n"
     "                self.trunk = trunk"),
    (13, "texts for the reward model padded on the left",
     'self.classifier.config.pad_token_id, "right", self.args.device)',
     'self.classifier.config.pad_token_id, "left", self.args.device)'),
    (13, "scores read at the padding",
     'self.classifier.config.pad_token_id, "right", self.args.device)',
     '3, "right", self.args.device)'),
    (13, "long texts lose their end for the reward model",
     "return [cut_front(tokenizer, ids, context_len(reward_model)) for ids in rows]",
     "return [ids[: context_len(reward_model)] for ids in rows]"),
    (14, "the penalty for a missing EOS falls on those that ended",
     "penalty = args.missing_eos_penalty * (~rollout.ended).float()  # (batch,)",
     "penalty = args.missing_eos_penalty * rollout.ended.float()"),
    (15, "k2 without the square",
     "return 0.5 * log_ratio**2",
     "return 0.5 * log_ratio.abs()"),
    (15, "k3 with the ratio upside down",
     "return torch.exp(-log_ratio) - 1 + log_ratio",
     "return torch.exp(log_ratio) - 1 - log_ratio"),
    (15, "the KL is in reward and loss",
     'kl_coef if args.kl_in == "reward" else 0.0)',
     "kl_coef)"),
    (16, "KL with the wrong sign in the reward",
     "return torch.where(response_mask, scores - kl_coef * kl, 0)",
     "return torch.where(response_mask, scores + kl_coef * kl, 0)"),
    (16, "the adaptive coefficient moves the wrong way",
     "error = max(-0.2, min(0.2, observed_kl / kl_target - 1))",
     "error = max(-0.2, min(0.2, 1 - observed_kl / kl_target))"),
    (16, "the logged KL is a mean per token",
     "kl = torch.where(mask, kl, 0).sum(dim=1)  # (batch,)",
     "kl = masked_mean(kl, mask, 1)"),
    (16, "the adaptive coefficient is not used in the reward",
     "compute_advantages(rollout, kl_coef, args)\n        stats",
     "compute_advantages(rollout, args.kl_coef, args)\n"
     "        stats"),
    (16, "the adaptive coefficient is not used in the loss",
     "update_policy(policy, optimizer, rollout, kl_coef, data.demonstrations, iteration,",
     "update_policy(policy, optimizer, rollout, args.kl_coef, data.demonstrations, iteration,"),
    (16, "the adaptive coefficient always starts anew",
     'kl_coef = adaptive_kl_coef(kl_coef, metrics["kl"],',
     'kl_coef = adaptive_kl_coef(args.kl_coef, metrics["kl"],'),
    (16, "the adaptive coefficient follows the KL of the update, not the one to the reference",
     'kl_coef = adaptive_kl_coef(kl_coef, metrics["kl"],',
     'kl_coef = adaptive_kl_coef(kl_coef, stats["approx_kl"],'),
    (17, "accumulation averages averages",
     "weight = count_terms(microbatch) / num_terms",
     "weight = len(microbatch) / len(rows)"),
    (17, "gradients of microbatches are summed without weights",
     '(weight * found["loss"]).backward()',
     'found["loss"].backward()'),
    (17, "statistics of microbatches are summed without weights",
     'x.detach() if name.endswith("_max") else weight * x.detach()',
     "x.detach()"),
    (20, "advantages and returns swapped",
     "    return advantages, advantages + values\n",
     "    return advantages + values, advantages\n"),
    (21, "returns without the values",
     "    return advantages, advantages + values\n",
     "    return advantages, advantages\n"),
    (21, "the critic's targets from the wrong buffer",
     "vf_loss, vf_clipfrac = value_loss(new_values, rows.old_values, rows.returns, mask,",
     "vf_loss, vf_clipfrac = value_loss(new_values, rows.old_values, rows.advantages, mask,"),
    (21, "λ forgotten in the recursion",
     "next_advantage = delta + gamma * gae_lambda * next_advantage",
     "next_advantage = delta + gamma * next_advantage"),
    (21, "discount forgotten in the TD error",
     "delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + next_value - values[:, t]"),
    (22, "whitening counts the padding",
     "variance = masked_mean((x - mean) ** 2, mask)",
     "variance = ((x - mean) ** 2).mean()"),
    (22, "returns are whitened too",
     "        advantages = masked_whiten(advantages, mask)\n",
     "        advantages = masked_whiten(advantages, mask)\n"
     "        returns = masked_whiten(returns, mask)\n"),
    (22, "whitened rewards lose their mean",
     "rewards = masked_whiten(rewards, mask, shift_mean=False)",
     "rewards = masked_whiten(rewards, mask)"),
    (22, "rewards are whitened before the penalty for a missing EOS",
     "    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), mask, 0.0)\n"
     "    if args.whiten_rewards:\n"
     "        rewards = masked_whiten(rewards, mask, shift_mean=False)\n",
     "    if args.whiten_rewards:\n"
     "        rewards = masked_whiten(rewards, mask, shift_mean=False)\n"
     "    rewards = rewards - token_rewards(penalty, torch.zeros_like(kl), mask, 0.0)\n"),
    (23, "masking by multiplication",
     "return torch.where(mask, x, 0).sum(dim) / mask.sum(dim)",
     "return (x * mask).sum(dim) / mask.sum(dim)"),
    (24, "log-probabilities in the precision of the model",
     "logits = self.lm.get_output_embeddings()(states).float()",
     "logits = self.lm.get_output_embeddings()(states)"),
    (25, "the separate critic starts from a random head",
     "weight, bias = classifier.score.weight / scale, -offset / scale",
     "weight, bias = torch.randn_like(classifier.score.weight), -offset / scale"),
    (26, "the value head starts at random",
     "        self.value_head.weight.data[:] = weight\n",
     "        if self.trunk is not None:\n"
     "            self.value_head.weight.data[:] = weight\n"),
    (27, "minibatches drawn with replacement",
     "order = rng.sample(range(len(rollout)), len(rollout))",
     "order = rng.choices(range(len(rollout)), k=len(rollout))"),
    (27, "no epoch but the first",
     "for _ in range(args.update_epochs):\n",
     "for _ in range(1):\n"),
    (28, "a rollout with its graph",
     "@torch.no_grad()\ndef collect_rollout(",
     "def collect_rollout("),
    (28, "the KL in the loss has no gradient",
     "kl = kl_penalty(new_logprobs, rows.ref_logprobs, args.kl_estimator)",
     "kl = kl_penalty(old_logprobs, rows.ref_logprobs, args.kl_estimator)"),
    (29, "a second BOS before chats",
     "*itertools.dropwhile(lambda x: x == bos, ids)",
     "*ids"),
    (29, "responses to learn from do not end",
     "[[*ids, end][: args.response_len] for ids in response_rows]",
     "[ids[: args.response_len] for ids in response_rows]"),
    (29, "the critic starts from a reward model with other tokens",
     "and self.tokenizer.get_vocab().items() <= source.tokenizer.get_vocab().items()",
     ""),
    (29, "a second EOS for the reward model",
     "texts = [ids[:-1] if ids[-1] in eos_ids else ids for ids in rows]",
     "texts = rows"),
    (29, "the same words with other ids taken as the same tokens",
     "self.tokenizer.get_vocab().items() <= source.tokenizer.get_vocab().items()",
     "self.tokenizer.get_vocab().keys() <= source.tokenizer.get_vocab().keys()"),
    (30, "the clip fraction counts the padding",
     "return loss, masked_mean((clipped < unclipped).float(), mask)",
     "return loss, (clipped < unclipped).float().mean()"),
    (30, "approx_kl counts the padding",
     'approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)',
     'approx_kl = kl_penalty(old_logprobs, new_logprobs, "k3").mean()'),
    (31, "the reference is saved as the policy",
     "            save_model(folder, policy)\n",
     "            save_model(folder, reference)\n"),
    (31, "what generates is not what was trained: top-p of the given model",
     "lm.generation_config = transformers.GenerationConfig(",
     "transformers.GenerationConfig("),
    (31, "the saved policy forgets its temperature",
     "do_sample=True, temperature=args.temperature,",
     "do_sample=True, temperature=1.0,"),
    (32, "gradients are not clipped",
     "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)",
     "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)"),
    (32, "the gradient of the value head is not clipped",
     "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)",
     "grad_norm = nn.utils.clip_grad_norm_(\n"
     '        [x for name, x in model.named_parameters() if "value_head" not in name], '
     "args.max_grad_norm)"),
    (33, "batches that do not divide are accepted",
     "refuse(getattr(args, whole) % getattr(args, part),",
     "refuse(False,"),
    (34, "a score of 0 is taken as missing",
     "if scores.dim() == 1:",
     "if scores.dim() == 1 and scores.all():"),
    (35, "explained variance with its arguments swapped",
     'stats["explained_variance"] = explained_variance(rollout.returns, rollout.old_values,',
     'stats["explained_variance"] = explained_variance(rollout.old_values, rollout.returns,'),
    (35, "entropy with the wrong sign",
     "entropies = -(log_probs.exp() * log_probs).sum(-1)",
     "entropies = (log_probs.exp() * log_probs).sum(-1)"),
    (35, "the win rate of SFT over PPO",
     "float(new[key] > old[key])",
     "float(old[key] > new[key])"),
    (35, "the columns SFT and PPO of the final table swapped",
     "{old_metrics[name]:>9.3f}{value:>9.3f}",
     "{value:>9.3f}{old_metrics[name]:>9.3f}"),
    (None, "the clip on the wrong side",
     "loss = -masked_mean(torch.min(unclipped, clipped), mask)",
     "loss = -masked_mean(torch.max(unclipped, clipped), mask)"),
    (None, "the ratio upside down",
     "ratio = torch.exp(torch.where(mask, new_logprobs - old_logprobs, 0))",
     "ratio = torch.exp(torch.where(mask, old_logprobs - new_logprobs, 0))"),
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
     "margins = chosen_scores - rejected_scores",
     "margins = rejected_scores - chosen_scores"),
    (None, "SFT trains on the prompt too",
     "logprobs, _, _ = policy(rows, temperature=1.0)",
     "rows = replace(rows, response_mask=rows.sequence_mask[:, 1:])\n"
     "    logprobs, _, _ = policy(rows, temperature=1.0)"),
    (None, "SFT trains on the rejected response",
     '[row["prompt"] for row in rows], [row["chosen"] for row in rows])',
     '[row["prompt"] for row in rows],\n'
     '                           [row.get("rejected", row["chosen"]) for row in rows])'),
    (None, "the learning rate is not annealed",
     "scale = 1 - (step - 1) / num_steps if anneal else 1.0",
     "scale = 1.0"),
    (None, "the schedule is one step behind and starts above its peak",
     "scale = 1 - (step - 1) / num_steps if anneal else 1.0",
     "scale = 1 - (step - 2) / num_steps if anneal else 1.0"),
    (None, "the schedule is one step ahead and ends at rate 0",
     "scale = 1 - (step - 1) / num_steps if anneal else 1.0",
     "scale = 1 - step / num_steps if anneal else 1.0"),
    # found by a helper that was asked for bugs which no test catches
    (None, "PPO-ptx always draws the same demonstrations",
     "sample = rng.choices(demonstrations, k=args.minibatch_size)",
     "sample = demonstrations[: args.minibatch_size]"),
    (None, "gradients pile up from step to step",
     "    optimizer.step()\n    optimizer.zero_grad()\n",
     "    optimizer.step()\n"),
    (None, "the rate of stages 1 and 2 is not annealed",
     "set_learning_rates(optimizer, step, len(minibatches))",
     "set_learning_rates(optimizer, step, len(minibatches), anneal=False)"),
    (None, "equal scores are divided by almost 0",
     'std if args.score_norm == "sft" and std > 1e-6 else 1.0',
     'std if args.score_norm == "sft" else 1.0'),
    (None, "scores are only shifted",
     'std if args.score_norm == "sft" and std > 1e-6 else 1.0',
     "1.0"),
    (None, "the separate critic's trunk is frozen",
     "self.trunk = copy.deepcopy(trunk).requires_grad_(True)",
     "self.trunk = copy.deepcopy(trunk)"),
    (None, "the critic's trunk is not in the optimizer",
     'if not name.startswith("lm.")]',
     'if name.startswith("value_head.")]'),
    (None, "the schedule moves the policy's rate alone",
     "for group in optimizer.param_groups:",
     "for group in optimizer.param_groups[:1]:"),
    (None, "the KL in the loss pushes away",
     "loss = loss + kl_coef * masked_mean(kl, mask)",
     "loss = loss - kl_coef * masked_mean(kl, mask)"),
    (None, "--target-kl means 1.5 times as much",
     "approx_kl > args.target_kl:",
     "approx_kl > 1.5 * args.target_kl:"),
    (None, "the same random numbers in every iteration",
     "seed = 1_000_003 * args.seed + iteration",
     "seed = 1_000_003 * args.seed"),
    (None, "the same order of minibatches in every iteration",
     'rng, steps = random.Random(f"{args.seed} {iteration}"), []',
     "rng, steps = random.Random(args.seed), []"),
    (None, "evaluation on training prompts",
     "data.held_out.prompts = list({prompt_key(x): x for x in data.held_out.prompts}.values())",
     "data.held_out.prompts = data.prompts[: len(data.held_out.prompts)]"),
    (None, "evaluation demonstrations are trained on",
     "                getattr(side, name).append(row)\n",
     "                getattr(side, name).append(row)\n"
     '                if side is not data and name == "demonstrations":\n'
     "                    data.demonstrations.append(row)\n"),
    (None, "the annotator prefers the worse response",
     "math.exp(2 * (golds[j] - golds[i]))",
     "math.exp(2 * (golds[i] - golds[j]))"),
    (None, "reward-model accuracy on the comparisons of its training",
     "if comparisons := data.held_out.comparisons:",
     "if comparisons := data.comparisons:"),
    (None, "the EOS share upside down",
     '"eos_share": rollout.ended.float()',
     '"eos_share": (~rollout.ended).float()'),
    (None, "distinct bigrams over the number of responses",
     "len(set(bigrams)) / max(1, len(bigrams))",
     "len(set(bigrams)) / len(responses)"),
    (None, "perplexity per response",
     "return sum(totals) / sum(nums_terms)",
     "return sum(totals) / len(rows)"),
    (None, "accuracy counts the wrong side",
     '"accuracy": (margins > 0).float().mean()',
     '"accuracy": (margins < 0).float().mean()'),
    (None, "γ and λ change places",
     "gae(rewards, rollout.old_values, mask, args.gamma, args.gae_lambda)",
     "gae(rewards, rollout.old_values, mask, args.gae_lambda, args.gamma)"),
    (None, "a sample's total is a mean",
     'columns["total"] = rollout.rewards.sum(dim=1).tolist()',
     'columns["total"] = rollout.rewards.mean(dim=1).tolist()'),
    (None, "policy and critic swap their rates",
     '"peak": args.learning_rate},\n'
     '         {"params": critic, "peak": args.critic_learning_rate}]',
     '"peak": args.critic_learning_rate},\n'
     '         {"params": critic, "peak": args.learning_rate}]'),
    (None, "--max-kl ends the run below it",
     'metrics["kl"] > args.max_kl:',
     'metrics["kl"] < args.max_kl:'),
    (None, "the weight of PPO-ptx ignored",
     '            found["loss"] = coef * found["loss"]\n',
     ""),
    (None, "warm-up starts at rate 0",
     "min(1.0, step / max(1, warmup))",
     "min(1.0, (step - 1) / warmup if warmup else 1.0)"),
    (None, "scores are not normalised",
     "found.append((raw - offset) / scale)",
     "found.append(raw)"),
    (None, "the mean of the scores is subtracted after the scaling",
     "found.append((raw - offset) / scale)",
     "found.append(raw / scale - offset)"),
    (None, "every pass over the prompts in the same order",
     'random.Random(f"{seed} {epoch}").sample(rows, len(rows))',
     'random.Random(f"{seed}").sample(rows, len(rows))'),
    (None, "score statistics of demonstrations instead of samples",
     "    score.measure(policy, prompt_batch(data.prompts, 1, 2 * args.batch_size, "
     "args.seed), args)\n",
     "    score.measure(policy, prompt_batch(data.prompts, 1, 2 * args.batch_size, "
     "args.seed), args)\n"
     '    if args.score_norm == "sft" and data.demonstrations:\n'
     "        rows = data.demonstrations[: 2 * args.batch_size]\n"
     "        rollout = policy.collate(rows)\n"
     "        ended = torch.ones(len(rows), dtype=torch.bool, device=args.device)\n"
     "        score.offset, score.scale = 0.0, 1.0\n"
     "        raw = score(rows, *policy.decode(rollout), ended)\n"
     "        std = raw.std(correction=0).item()\n"
     "        score.offset, score.scale = raw.mean().item(), std if std > 1e-6 else 1.0\n"),
    # planted blind: by a helper that had not seen the tests
    (None, "every epoch of stages 1 and 2 in the same order",
     "in split_rows(rng.sample(rows, len(rows)), args.minibatch_size)]",
     "in split_rows(random.Random(args.seed).sample(rows, len(rows)),\n"
     "                                            args.minibatch_size)]"),
    (None, "the new reward head depends on what ran before it",
     "        torch.manual_seed(seed)\n"
     "        reward_model = load_reward_model",
     "        reward_model = load_reward_model"),
    (None, "args.json is written before the derived settings are known",
     "    sources = try_given_models(data, args)  # empty if reward models are still to be "
     "trained\n"
     "    with contextlib.closing(RunLog(args)) as log:\n",
     "    with contextlib.closing(RunLog(args)) as log:\n"
     "        sources = try_given_models(data, args)\n"),
    (None, "the adaptive coefficient counts the episodes since the start",
     'metrics["kl"], args.kl_target, args.batch_size,\n',
     'metrics["kl"], args.kl_target,\n'
     "                                       iteration * args.batch_size,\n"),
    (None, "the policy that exceeded --max-kl is saved",
     '        if args.max_kl is not None and metrics["kl"] > args.max_kl:\n',
     "        if iteration % args.save_interval == 0:\n"
     "            save_model(folder, policy)\n"
     '        if args.max_kl is not None and metrics["kl"] > args.max_kl:\n'),
    (None, "the evaluation after PPO takes the policy in memory, not the saved one",
     "after = evaluate(load_policy(folder, args), reference,",
     "after = evaluate(policy, reference,"),
    (None, "PPO-ptx draws held-out demonstrations",
     "update_policy(policy, optimizer, rollout, kl_coef, data.demonstrations, iteration,",
     "update_policy(policy, optimizer, rollout, kl_coef, data.held_out.demonstrations, iteration,"),
    (None, "--target-kl looks at the mean over all epochs, not the last",
     '        approx_kl = sum(step["approx_kl"] for step in epoch) / len(epoch)\n',
     '        approx_kl = sum(step["approx_kl"] for step in steps) / len(steps)\n'),
    (None, "the critic is added before offset and scale of the scores are measured",
     "    policy.add_critic(score)\n",
     "    policy.add_critic(Score(score.sources))\n"),
    (None, "the logged KL follows --kl-estimator",
     'kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")',
     "kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)"),
    (None, "the perplexity is that of the reference",
     'nats = held_out_mean(policy, sft_loss, "loss", held_out.demonstrations, args)',
     'nats = held_out_mean(reference, sft_loss, "loss", held_out.demonstrations, args)'),
    (None, "prompts held out of --dataset are forgotten with --sft-dataset",
     "keys |= set(random.Random(args.seed)",
     "keys = set(random.Random(args.seed)"),
    (None, "the derived score_norm stays in a copy of the settings",
     'args.score_norm = args.score_norm or ("none" if dense else "sft" if several else "center")',
     'args = replace(args, score_norm=args.score_norm or (\n'
     '        "none" if dense else "sft" if several else "center"))'),
    (None, "the critic's rate follows the default instead of --learning-rate",
     '"critic_learning_rate": 10 * learning_rate,',
     '"critic_learning_rate": 10 * (1e-4 if scratch else 3e-6),'),
    (None, "held-out means weigh rows instead of tokens",
     "num_terms = float(count_terms(microbatch))",
     "num_terms = float(len(part))"),
    (None, "--sft-dataset is read with the split of --dataset",
     'read_rows("--sft-dataset", args.sft_dataset, "train", wanted)',
     'read_rows("--sft-dataset", args.sft_dataset, args.dataset_split,\n'
     "                                   wanted)"),
    (None, "the times of sampling and scoring change names",
     '("rollout_s", "score_s", "update_s")',
     '("score_s", "rollout_s", "update_s")'),
    (None, "long answers to messages reach the reward model uncut in training",
     "        responses = [response if whole else tokenizer.decode(ids)\n"
     "                     for response, whole, ids in zip(responses, ended, encoded, "
     "strict=True)]\n",
     "        responses = list(responses)\n"),
    (None, "--score-clip clips the reported scores too",
     "scores = scores.clamp(-args.score_clip, args.score_clip)",
     "scores = scores.clamp_(-args.score_clip, args.score_clip)"),
    # resume
    (None, "a resumed run forgets the optimizer's moments",
     "            learner.load_state_dict(saved[name])\n",
     '            if name != "optimizer":\n'
     "                learner.load_state_dict(saved[name])\n"),
    (None, "a resumed run has the first kl_coef again",
     'kl_coef, done, before = saved["kl_coef"], saved["iteration"], saved["before"]',
     'done, before = saved["iteration"], saved["before"]'),
    (None, "a resumed run repeats an iteration",
     'saved["kl_coef"], saved["iteration"], saved["before"]',
     'saved["kl_coef"], saved["iteration"] - 1, saved["before"]'),
    (None, "a resumed run has the SFT model as its reference, although it was refreshed",
     '"reference": reference.lm, "optimizer": optimizer}',
     '"optimizer": optimizer}'),
    (None, "a resumed run measures the scores of the SFT policy again, on other prompts",
     '        score.norms = saved["score_norms"]\n',
     "        score.measure(policy, prompt_batch(data.prompts, 2, 2 * args.batch_size, args.seed), "
     "args)\n"),
    (None, "lines after the checkpoint stay in metrics.jsonl",
     '(f"events.*.{stage}", "metrics.jsonl", "samples.jsonl"):',
     '(f"events.*.{stage}",):'),
    (None, "the curves of a killed stage stay beside the new ones",
     '(f"events.*.{stage}", "metrics.jsonl", "samples.jsonl"):',
     '("metrics.jsonl", "samples.jsonl"):'),
    (None, "after resume the logs of PPO begin at the checkpoint",
     "            self.write(metrics, samples)\n",
     "            self.history.append([metrics, samples])\n"),
    (None, "after a second resume the logs lack what the first one had",
     "        self.history.append([metrics, samples])\n        self.scalars",
     "        self.scalars"),
    (None, "SFT is repeated by --resume",
     '    folder = log.run_dir / "sft"\n    if not folder.exists():\n',
     '    folder = log.run_dir / "sft"\n    if True:\n'),
    (None, "a half-written model counts as a finished stage",
     "        weights.save_pretrained(new)\n        model.tokenizer.save_pretrained(new)\n",
     "        folder.mkdir(exist_ok=True)\n        weights.save_pretrained(new)\n"
     "        model.tokenizer.save_pretrained(new)\n"),
    (None, "the checkpoint is written in place",
     'with path.with_suffix(".tmp").open("wb") as file:',
     'path.unlink(missing_ok=True)\n        with path.with_suffix(".tmp").open("wb") as file:'),
    (None, "--resume accepts other settings",
     "if settings[name] != first.get(name)",
     "if name not in first"),
    (None, "a finished run is not marked as finished",
     "    log.save_checkpoint({}, finished=True)\n",
     ""),
    (None, "Ctrl-C ends without a checkpoint",
     " or iteration == log.num_iterations or interrupted:",
     " or iteration == log.num_iterations:"),
    (None, "a run name may lead out of the output folder",
     "output_dir not in run_dir.parents",
     "False"),
    # several processes
    (None, "each process samples its share with the noise of the first rows",
     "chunks = [split_rows(share(x), args.batch_size) for x in (encoded, noise)]",
     "chunks = [split_rows(x, args.batch_size) for x in (share(encoded),\n"
     "                                                       noise[: len(share(noise))])]"),
    (None, "the gradients of the processes are averaged",
     "            dist.all_reduce(weights.grad)\n",
     "            dist.all_reduce(weights.grad)\n"
     "            weights.grad /= dist.get_world_size()\n"),
    (None, "gradients are not added up over processes",
     "    add_up_gradients(model)\n",
     ""),
    (None, "a microbatch is weighed by the terms of its own process",
     "        num_terms = count_terms(rows)\n        for microbatch",
     "        num_terms = count_terms(rows[rank::num_processes])\n        for microbatch"),
    (None, "every process trains on all rows",
     "split_rows(rows[rank::num_processes], args.microbatch_size)",
     "split_rows(rows, args.microbatch_size)"),
    (None, "each process scores all rows",
     "columns = [share(x) for x in (rows, responses, tokens, ended.tolist())]",
     "columns = [rows, responses, tokens, ended.tolist()]"),
    (None, "the statistics of one process are logged",
     "gather([{name: next(numbers) for name in part} for part in all_stats]), {}",
     "[{name: next(numbers) for name in part} for part in all_stats], {}"),
    (None, "every process writes the log",
     "self.silent, self.warned = processes()[0] > 0, False",
     "self.silent, self.warned = False, False"),
    # ensembles
    (None, "all reward models of an ensemble start from the same head",
     "        torch.manual_seed(seed)\n        reward_model = load_reward_model",
     "        torch.manual_seed(args.seed)\n        reward_model = load_reward_model"),
    (None, "all reward models of an ensemble see the data in the same order",
     "            args.reward_learning_rate, seed, log)",
     "            args.reward_learning_rate, args.seed, log)"),
    (None, "an ensemble adds its disagreement to the score",
     "return found.mean(dim=0) - self.ensemble_coef * stds, stds",
     "return found.mean(dim=0) + self.ensemble_coef * stds, stds"),
    (None, "the members of an ensemble share the offset and scale of the first",
     "in zip(self.sources, self.norms, strict=True):",
     "in zip(self.sources, self.norms[:1] * len(self.norms), strict=True):"),
    (None, "only the first of several given reward models is used",
     "    for name in args.reward_model or ([args.reward_fn] if args.reward_fn else []):",
     "    for name in args.reward_model[:1] or ([args.reward_fn] if args.reward_fn else []):"),
    (None, "--ensemble-coef is ignored",
     "train_ppo(sft, Score(sources, args.ensemble_coef), data, args, log)",
     "train_ppo(sft, Score(sources), data, args, log)"),
]
CLASSIC = [
    (18, "truncated treated as terminated",
     "torch.where(terminated, 0, next_values)",
     "torch.where(terminated | truncated, 0, next_values)"),
    (18, "terminated treated as truncated",
     "torch.where(terminated, 0, next_values)",
     "next_values"),
    (18, "bootstrap from the first observation of the next episode",
     'next_obs[i] = infos["final_obs"][i]',
     "pass"),
    (18, "values of the next states are those of the states",
     "agent.values(next_obs)",
     "agent.values(obs)"),
    (4, "advantages run on over the end of an episode",
     "(~(terminated | truncated)).to(values.dtype)",
     "(~terminated).to(values.dtype)"),
    (4, "the end of an episode one step late",
     "decays = gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)",
     "decays = gamma * gae_lambda * (~(terminated | truncated).roll(1, 0)).to(values.dtype)"),
    (19, "autoreset on the next step",
     "AutoresetMode.SAME_STEP)",
     "AutoresetMode.NEXT_STEP)"),
    (21, "returns without the values",
     "    return advantages, advantages + values\n",
     "    return advantages, advantages\n"),
    (22, "returns are whitened too",
     "        advantages = whiten(advantages)\n",
     "        advantages, returns = whiten(advantages), whiten(returns)\n"),
    (27, "minibatches drawn with replacement",
     "order = torch.randperm(args.batch_size)",
     "order = torch.randint(args.batch_size, (args.batch_size,))"),
    (28, "the entropy of a Gaussian has no gradient",
     "gaussian_entropy(self.log_std)",
     "gaussian_entropy(self.log_std.detach())"),
    (32, "only the actor's gradient is clipped",
     "nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)",
     "nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm)"),
    (35, "explained variance with its arguments swapped",
     "explained_variance(rollout.returns, rollout.old_values)",
     "explained_variance(rollout.old_values, rollout.returns)"),
    (36, "observation statistics that never move",
     "agent.obs_norm.update(rollout.obs.flatten(0, 1))",
     "pass"),
    (36, "observation statistics from environment 0 alone",
     "agent.obs_norm.update(rollout.obs.flatten(0, 1))",
     "agent.obs_norm.update(rollout.obs[:, 0])"),
    (36, "evaluation samples its actions",
     "agent.act(envs.obs, greedy=True)",
     "agent.act(envs.obs)"),
    (36, "evaluation starts where training did",
     "Envs([lambda: env], args.seed + 1_000_000, args.gamma)",
     "Envs([lambda: env], args.seed, args.gamma)"),
    (36, "statistics are not saved",
     'self.register_buffer("mean", torch.zeros(size))',
     'self.register_buffer("mean", torch.zeros(size), persistent=False)'),
    (37, "log-probabilities averaged over action dimensions",
     "0.5 * math.log(2 * math.pi)).sum(dim=-1)",
     "0.5 * math.log(2 * math.pi)).mean(dim=-1)"),
    (37, "entropies averaged over action dimensions",
     "0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)",
     "0.5 * math.log(2 * math.pi * math.e)).mean(dim=-1)"),
    (37, "unbounded actions reach the environment",
     "np.clip(actions, space.low, space.high).astype(space.dtype)",
     "actions.astype(space.dtype)"),
    (None, "reward statistics run on over the end of an episode",
     "self.returns[i] = self.lengths[i] = self.reward_sums[i] = 0",
     "self.returns[i] = self.lengths[i] = 0"),
    (None, "reward statistics without discount",
     "reward_sums = self.gamma * self.reward_sums + rewards",
     "reward_sums = self.reward_sums + rewards"),
    (None, "β moves the wrong way",
     "if observed_kl < kl_target / 1.5:",
     "if observed_kl > kl_target / 1.5:"),
    (None, "β always starts anew",
     "kl_beta = adaptive_kl_beta(kl_beta,",
     "kl_beta = adaptive_kl_beta(args.kl_beta,"),
    (None, "KL(new, old) instead of KL(old, new)",
     "kl_beta * kl_penalty(old_logprobs, new_logprobs).mean()",
     "kl_beta * kl_penalty(new_logprobs, old_logprobs).mean()"),
    (None, "a KL penalty beside the clip",
     'kl_beta = args.kl_beta if args.policy_loss in ("kl-fixed", "kl-adaptive") else 0.0',
     "kl_beta = args.kl_beta"),
    (None, "the learning rate is not annealed",
     "progress = (iteration - 1) / num_iterations if args.anneal_lr else 0.0",
     "progress = 0.0"),
    (None, "the value loss takes the smaller error",
     "loss = 0.5 * torch.max(unclipped, clipped).mean()",
     "loss = 0.5 * torch.min(unclipped, clipped).mean()"),
    (None, "the clip on the wrong side",
     "loss = -torch.min(unclipped, clipped).mean()",
     "loss = -torch.max(unclipped, clipped).mean()"),
    (None, "gradients of the update pile up",
     "            optimizer.zero_grad()\n",
     ""),
    # found by a helper that was asked for bugs which no test catches
    (None, "hidden layers start with gain 1",
     "(math.sqrt(2), math.sqrt(2), output_gain)",
     "(1.0, 1.0, output_gain)"),
    (None, "the curve of returns shows lengths",
     'add_scalar("charts/episodic_return", episode_return, step)',
     'add_scalar("charts/episodic_return", length, step)'),
    (None, "observations are clipped on one side",
     "((rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)",
     "((rows - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(max=10)"),
    (None, "scaled rewards are clipped on one side",
     "(rewards * torch.rsqrt(reward_stats.var + 1e-8)).clamp(-10, 10)",
     "(rewards * torch.rsqrt(reward_stats.var + 1e-8)).clamp(max=10)"),
    (None, "the last iterations are not saved",
     "due = iteration % max(1, num_iterations // 20) == 0 or iteration == num_iterations",
     "due = iteration % max(1, num_iterations // 20) == 0"),
    (None, "the clip fraction counts actions that are not cut",
     "return loss, (clipped < unclipped).float().mean()",
     "return loss, (clipped != unclipped).float().mean()"),
    (None, "the flag for value clipping upside down",
     "vf_clip_coef = args.clip_coef if args.clip_vloss else math.inf",
     "vf_clip_coef = math.inf if args.clip_vloss else args.clip_coef"),
    # planted blind: by a helper that had not seen the tests
    (None, "rewards are divided by the std of single rewards",
     "reward_stats.update(reward_sums.reshape(-1, 1))",
     "reward_stats.update(rewards.reshape(-1, 1))"),
    (None, "the saved model lacks the observation statistics of the last rollout",
     "        if args.norm_obs:  # after the update: old and new log-probabilities need "
     "the same inputs\n"
     "            agent.obs_norm.update(rollout.obs.flatten(0, 1))\n"
     "        due = iteration % max(1, num_iterations // 20) == 0 or iteration == num_iterations\n"
     '        log.iteration(envs, stats | {"kl_beta": kl_beta}, learning_rate, due)\n'
     "        if due:  # write, then rename: a run that is killed leaves no half-written file\n"
     '            saved = {"args": asdict(args), "agent": agent.state_dict()}\n'
     '            torch.save(saved, log.run_dir / "model.tmp")\n'
     '            (log.run_dir / "model.tmp").replace(log.run_dir / "model.pt")\n',
     "        due = iteration % max(1, num_iterations // 20) == 0 or iteration == "
     "num_iterations\n"
     '        log.iteration(envs, stats | {"kl_beta": kl_beta}, learning_rate, due)\n'
     "        if due:  # write, then rename: a run that is killed leaves no half-written file\n"
     '            saved = {"args": asdict(args), "agent": agent.state_dict()}\n'
     '            torch.save(saved, log.run_dir / "model.tmp")\n'
     '            (log.run_dir / "model.tmp").replace(log.run_dir / "model.pt")\n'
     "        if args.norm_obs:  # after the update: old and new log-probabilities need "
     "the same inputs\n"
     "            agent.obs_norm.update(rollout.obs.flatten(0, 1))\n"),
    (None, "the log shows the β of the next update",
     '        log.iteration(envs, stats | {"kl_beta": kl_beta}, learning_rate, due)\n'
     "        if due:  # write, then rename: a run that is killed leaves no half-written file\n"
     '            saved = {"args": asdict(args), "agent": agent.state_dict()}\n'
     '            torch.save(saved, log.run_dir / "model.tmp")\n'
     '            (log.run_dir / "model.tmp").replace(log.run_dir / "model.pt")\n'
     '        if args.policy_loss == "kl-adaptive":\n'
     '            kl_beta = adaptive_kl_beta(kl_beta, stats["approx_kl"], args.kl_target)\n',
     '        if args.policy_loss == "kl-adaptive":\n'
     '            kl_beta = adaptive_kl_beta(kl_beta, stats["approx_kl"], args.kl_target)\n'
     '        log.iteration(envs, stats | {"kl_beta": kl_beta}, learning_rate, due)\n'
     "        if due:  # write, then rename: a run that is killed leaves no half-written file\n"
     '            saved = {"args": asdict(args), "agent": agent.state_dict()}\n'
     '            torch.save(saved, log.run_dir / "model.tmp")\n'
     '            (log.run_dir / "model.tmp").replace(log.run_dir / "model.pt")\n'),
    (None, "--eval-only ignores --eval-episodes",
     "args = replace(trained_args, eval_only=args.eval_only, eval_episodes=args.eval_episodes,\n",
     "args = replace(trained_args, eval_only=args.eval_only,\n"),
    (None, "every epoch of an update with the same minibatches",
     "    for _ in range(args.update_epochs):\n"
     "        order = torch.randperm(args.batch_size)\n",
     "    order = torch.randperm(args.batch_size)\n"
     "    for _ in range(args.update_epochs):\n"),
    (None, "the agent acts on the final observation of the episode before",
     "self.reward_sums, next_obs = reward_sums.copy(), self.obs.copy()",
     "self.reward_sums, next_obs = reward_sums.copy(), self.obs"),
    (None, "every episode is plotted at the end of its rollout",
     'self.writer.add_scalar("charts/episodic_return", episode_return, step)',
     'self.writer.add_scalar("charts/episodic_return", episode_return, envs.steps_done)'),
    (None, "--no-orthogonal-init does not reach the critic",
     "self.critic = mlp(obs_size, 1, 1.0, args.orthogonal_init)",
     "self.critic = mlp(obs_size, 1, 1.0, True)"),
]
FIELDS = ("seen", "bug", "line", "bugged_line")
BUGS = [{"file": name} | dict(zip(FIELDS, bug, strict=True))
        for name, bugs in (("ppo_rlhf.py", RLHF), ("ppo_classic.py", CLASSIC)) for bug in bugs]


def source_of(test):
    """The text of a test FILE::FUNCTION; empty if there is no such test today."""
    file_name, _, function = (test or "").partition("::")
    path = ROOT / "tests" / file_name
    if not path.is_file():
        return ""
    found = re.search(rf"^def {function}\(.*?(?=^[^\s)]|\Z)", path.read_text(), re.M | re.S)
    return found[0] if found else ""


@functools.cache
def code_of(file_name):
    """A file without its comments and docstrings."""
    tree = ast.parse((ROOT / file_name).read_text())
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def fingerprint(bug, test):
    """Changes with the code of the file, the bug and the test that caught it."""
    text = code_of(bug["file"]) + bug["line"] + bug["bugged_line"] + source_of(test)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def first_failure(file_name, line, bugged_line, hint=None):
    """Run the tests on a copy in which line is bugged_line. Returns: the first test that fails, or
    None. Errors outside a test (a file that cannot be imported) are no catch: they raise. A hint is
    a test that runs before all others."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(".git", "runs", "results", "__pycache__"))
        path = Path(folder, file_name)
        path.write_text(path.read_text().replace(line, bugged_line))
        selections = [[f"tests/{test}" for test in TESTS[file_name]]]
        if source_of(hint):
            selections.insert(0, [f"tests/{hint}"])
        for tests in selections:
            process = common.run_python("-m", "pytest", "-xqp", "no:cacheprovider", *tests,
                                        cwd=folder, timeout=1800, may_fail=True)
            if process.returncode != 0:
                break
    if process.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) tests/([\w.]+)::(\w+)", process.stdout, re.M)
    if not failed:
        raise RuntimeError(f"{bugged_line}: {process.stdout[-2000:]}")
    return f"{failed[1]}::{failed[2]}"


def plant(bug):
    """Plant one bug. Returns: where it was seen, and what caught it."""
    if (count := (ROOT / bug["file"]).read_text().count(bug["line"])) != 1:
        raise ValueError(f"{bug['bug']}: the line occurs {count} times in {bug['file']}")
    test = first_failure(bug["file"], bug["line"], bug["bugged_line"], bug["hint"])
    return {"seen": SEEN.get(bug["seen"], ""), "caught_by": test,
            "fingerprint": fingerprint(bug, test)}


def table(bugs):
    """A line per bug, then how many different tests did the catching; printed and written."""
    order = {(bug["file"], bug["bug"]): i for i, bug in enumerate(BUGS)}
    lines = common.markdown(
        ["file", "planted bug", "seen in", "caught first by"],
        [[x["file"], x["bug"], x["seen"], f"`{x['caught_by']}`"]
         for x in sorted(bugs, key=lambda x: order[x["file"], x["bug"]])])
    caught = {x["caught_by"] for x in bugs} - {None}
    lines.append(f"\n{len(bugs)} bugs, {sum(x['caught_by'] is None for x in bugs)} not caught, "
                 f"{len(caught)} different tests caught one first")
    common.publish("planted_bugs", lines)


def blind():
    """Plant the bugs of results/blind_bugs.json, a list by somebody who had read the two files but
    no test; each is planted once, on the commit that its row names. Prints and writes a table."""
    found = common.read_results("blind_bugs")
    bugs = [bug | {"hint": None, "seen": None} for bug in found["planted"]]
    rows = common.run_missing("blind_bugs", bugs, ("file", "bug"), plant,
                              ("torch", "transformers", "gymnasium"), ("caught_by",))["runs"]
    lines = common.markdown(["file", "bug planted blind", "caught first by", "commit"],
                            [[x["file"], x["bug"], x["caught_by"] and f"`{x['caught_by']}`",
                              x["commit"]] for x in rows])
    lines.append(f"\n{sum(x['caught_by'] is not None for x in rows)} of {len(rows)} caught")
    common.publish("blind_bugs", lines)


def main():
    """Plant what is missing, two at a time, then print the table."""
    results = common.read_results("planted_bugs")
    known = {(x["file"], x["bug"]): x for x in results.get("bugs", [])}
    valid, bugs = [], []
    for bug in BUGS:
        row = known.get((bug["file"], bug["bug"]), {})
        test = row.get("caught_by")
        bugs.append(bug | {"hint": test})
        if test and row["fingerprint"] == fingerprint(bug, test):
            valid.append(row)
    if "--table" not in sys.argv and len(valid) < len(BUGS):
        for file_name in TESTS:
            if failure := first_failure(file_name, "", ""):
                raise SystemExit(f"{failure} fails without any bug")
        common.write_results("planted_bugs", results | {"bugs": valid})
    table(common.run_missing("planted_bugs", bugs, ("file", "bug"), plant,
                             ("torch", "transformers", "gymnasium"), ("caught_by",),
                             field="bugs")["bugs"])


if __name__ == "__main__":
    blind() if "--blind" in sys.argv else main()
