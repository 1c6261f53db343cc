"""Do the tests find the bugs that others had? Planted one at a time into copies of the two files.

    pip install -r requirements.txt
    python benchmarks/planted_bugs.py             # plants what is missing, two at a time
    python benchmarks/planted_bugs.py --table     # the table, from the committed results
    python benchmarks/planted_bugs.py --blind     # 30 bugs by somebody who had read no test

Each row of BUGS is a bug that happened in another project: issue or pull request on GitHub, what
was wrong, the line here, and the line with that bug. The tests run on the copy until the first
failure, those of the row's file before the others. Left out are tests that compare the text of
the files, their copies, or the README with results: they would fail after any change. First all
tests have to pass on the files as they are.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import common  # benchmarks/common.py
from common import ROOT

TESTS = {
    "ppo_rlhf.py": ["test_math.py", "test_rollout.py", "test_update.py", "test_data.py",
                    "test_boundary.py", "test_pipeline.py", "test_resume.py", "test_processes.py"],
    "ppo_classic.py": ["test_classic.py"],
}

# seen in, the bug, the test file to begin with (test_ and .py left out), the line, the bugged line
RLHF = [
    ("trlX #107", "old log-probabilities without the attention mask", "rollout",
     "part.old_logprobs, part.old_values, _ = policy(part, args.temperature)",
     "part.old_logprobs, part.old_values, _ = policy(\n"
     "            replace(part, sequence_mask=torch.ones_like(part.sequence_mask)), "
     "args.temperature)"),
    ("OpenRLHF #217", "position ids count the padding", "rollout",
     "positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]",
     "positions = torch.arange(mask.shape[1]).expand_as(mask)[:, -ids.shape[1] :]"),
    ("TransformerLens #1609", "no position ids are passed", "rollout",
     "return trunk(input_ids=ids, attention_mask=mask, position_ids=positions,",
     "return trunk(input_ids=ids, attention_mask=mask,"),
    ("verl #50", "values in the padding leak into GAE", "math",
     "rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)",
     "pass"),
    ("trlX #401", "the response mask leaves EOS out", "rollout",
     "        mask[:, t] = ~ended  # EOS is a real token, what follows it is padding\n"
     "        ended |= torch.isin(ids[:, t], eos_ids)\n",
     "        ended |= torch.isin(ids[:, t], eos_ids)\n        mask[:, t] = ~ended\n"),
    ("trl #734", "masks by comparing ids with PAD, which is EOS", "data",
     "mask = pad([torch.ones_like(ids, dtype=torch.bool) for ids in rows])",
     "mask = pad(rows, padding_value=tokenizer.pad_token_id) != tokenizer.pad_token_id"),
    ("DeepSpeedExamples #470", "EOS is never sampled", "rollout",
     "self.register_buffer(", "bias[self.eos_ids] = -torch.inf\n        self.register_buffer("),
    ("trl #2387", "every row runs to the limit", "rollout",
     "        ended |= torch.isin(ids[:, t], eos_ids)\n", ""),
    ("spinningup #50", "the score one token early", "math",
     "        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)\n"
     "        scores =",
     "        last_token_idx = (response_mask.sum(dim=1, keepdim=True) - 2).clamp(min=0)\n"
     "        scores ="),
    ("trl #3750", "the score one token late", "math",
     "        last_token_idx = response_mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)\n"
     "        scores =",
     "        last_token_idx = response_mask.sum(dim=1, keepdim=True).clamp(max=kl.shape[1] - 1)\n"
     "        scores ="),
    ("trlX #509", "log-probabilities shifted by one token", "rollout",
     "hidden = self.states(self.lm.base_model, ids, mask)[row, column - 1]",
     "hidden = self.states(self.lm.base_model, ids, mask)[row, column]"),
    ("verl #1758", "values read after the token instead of before it", "rollout",
     "values = self.critic.head(hidden.float()).squeeze(-1)",
     "hidden = self.states(self.lm.base_model, ids, mask)[row, column]\n"
     "            values = self.critic.head(hidden.float()).squeeze(-1)"),
    ("OpenRLHF #853", "old and reference log-probabilities at temperature 1", "rollout",
     "part.ref_logprobs, _, _ = reference(part, args.temperature)",
     "part.old_logprobs, part.old_values, _ = policy(part, 1.0)\n"
     "        part.ref_logprobs, _, _ = reference(part, 1.0)"),
    ("trl #4159", "the sampler has the temperature, the update has not", "rollout",
     "policy(batch, args.temperature, args.ent_coef > 0)", "policy(batch, 1.0, args.ent_coef > 0)"),
    ("trl #235", "the sampler is not the policy: greedy", "rollout",
     "sampled = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)",
     "sampled = policy.logits(hidden, temperature).argmax(-1)"),
    ("trl #6337", "the saved policy has the generation config of the given model", "rollout",
     "lm.generation_config = transformers.GenerationConfig(", "transformers.GenerationConfig("),
    ("trl #1540", "dropout stays on", "rollout",
     'if re.search("drop|jitter", name) and isinstance(value, float):',
     'if "dropout" in name and isinstance(value, float):'),
    ("trl #2057", "the reference is the policy itself", "pipeline",
     "policy, reference = load_policy(sft, args), load_policy(sft, args)",
     "policy = reference = load_policy(sft, args)"),
    ("trl #702", "the KL is exactly 0: the reference follows the policy", "pipeline",
     "if args.ref_update_interval and iteration % args.ref_update_interval == 0:", "if True:"),
    ("trl #1534", "the policy reads in place of the reference", "pipeline",
     "part.ref_logprobs, _, _ = reference(", "part.ref_logprobs, _, _ = policy("),
    ("transformers #35909", "scores are read at the padding", "rollout",
     '"right", self.tokenizer.model_max_length', '"left", self.tokenizer.model_max_length'),
    ("trl #937", "reward models read the token before EOS, as PAD is EOS", "rollout",
     "if pad_id is None or (new_head and pad_id == tokenizer.eos_token_id):",
     "if pad_id is None:"),
    ("trl #6805", "the penalty for a missing EOS never applies", "update",
     "args.missing_eos_penalty * (~rollout.ended)", "0.0 * (~rollout.ended)"),
    ("open-instruct #534", "k1 is accepted in the loss, where it has no gradient", "data",
     'refuse(args.kl_in == "loss" and args.kl_estimator == "k1",', "refuse(False,"),
    ("trlX #361", "kl_coef follows approx_kl instead of the KL to the reference", "pipeline",
     "kl_coef = adaptive_kl_coef(kl_coef, kl,",
     'kl_coef = adaptive_kl_coef(kl_coef, stats["approx_kl"],'),
    ("trlX #441", "the KL is a mean per token where a sum per response is meant", "pipeline",
     '"kl": torch.where(mask, kl, 0).sum(dim=1)', '"kl": masked_mean(kl, mask, dim=1)'),
    ("trl #1180", "the KL that is logged is another estimate", "pipeline",
     "kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs)\n",
     "kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)\n"),
    ("trl #407", "accumulation averages averages", "update",
     "weight = count_terms(part) / count_terms(batch) * bool(own_rows)",
     "weight = len(part) / len(batch) * bool(own_rows)"),
    ("verl #906", "gradients of microbatches are added without weights", "update",
     '(coef * weight * losses["loss"]).backward()', '(coef * losses["loss"]).backward()'),
    ("verl #2506", "another tensor of the same shape in place of the mask", "update",
     "gae(rewards, rollout.old_values, mask, args.gamma",
     "gae(rewards, rollout.old_values, rewards > 0, args.gamma"),
    ("verl #1440", "rows are put in another order, their old values are not", "update",
     "minibatch = rollout[torch.tensor(row_idx, device=args.device)]",
     "minibatch = rollout[torch.tensor(row_idx, device=args.device)]\n"
     "            minibatch.old_values = rollout.old_values[: len(row_idx)]"),
    ("CleanRL #337", "the critic's targets come from another buffer", "update",
     "value_loss(new_values, batch.old_values, batch.returns, mask,",
     "value_loss(new_values, batch.old_values, batch.advantages, mask,"),
    ("rlhf-book #216", "advantages are rewards minus values", "math",
     "    return advantages, advantages + values\n",
     "    return rewards - values, advantages + values\n"),
    ("OpenRLHF #1250", "whitening takes the mean along the wrong axis", "math",
     "    mean = masked_mean(x, mask)\n", "    mean = masked_mean(x, mask, 0)\n"),
    ("OpenRLHF #1240", "masking by multiplication, which leaves NaN", "math",
     "return torch.where(mask, x, 0).sum(dim) / mask.sum(dim)",
     "return (x * mask).sum(dim) / mask.sum(dim)"),
    ("OpenRLHF #634", "logits in bfloat16", "rollout",
     "with torch.autocast(hidden.device.type, enabled=False):\n",
     "with torch.autocast(hidden.device.type, torch.bfloat16):\n"),
    ("OpenRLHF, commit 1993228e", "the separate critic starts from a random head", "update",
     "trunk, weight = classifier.base_model, classifier.score.weight.detach().cpu() / scale",
     "trunk, weight = classifier.base_model, torch.randn_like(classifier.score.weight)"),
    ("trl #1783", "a part of the reward model's score is dropped", "update",
     "bias = -float(scorer.offset[0]) / scale", "pass"),
    ("trl #299", "the critic's gradient is not clipped", "update",
     "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)",
     "grad_norm = nn.utils.clip_grad_norm_(\n"
     '        [x for name, x in model.named_parameters() if "critic" not in name],\n'
     "        args.max_grad_norm)"),
    ("trlX #522", "an update stays on its first minibatch", "update",
     "for row_idx in split_rows(order, args.minibatch_size):",
     "for row_idx in [order[: args.minibatch_size]] * (len(order) // args.minibatch_size):"),
    ("trl #224", "a rollout is stored with its graph", "rollout",
     "@torch.no_grad()\ndef collect_rollout(", "def collect_rollout("),
    ("trl #1674", "reward models read with the policy's tokenizer", "pipeline",
     "    tokenizer = load_tokenizer(folder)\n    context",
     "    tokenizer = load_tokenizer(args.policy_model)\n    context"),
    ("trl #3853", "a second BOS in front of chats", "boundary",
     'if tokenizer("")["input_ids"][:1] == bos != ids[:1] else ids',
     'if tokenizer("")["input_ids"][:1] == bos else ids'),
    ("trl #2022", "log-probabilities of the padding are 1", "rollout",
     "padded = torch.zeros_like(batch.response_mask",
     "padded = torch.ones_like(batch.response_mask"),
    ("open-instruct #756", "approx_kl counts the padding", "update",
     'approx_kl = masked_mean(kl_penalty(old_logprobs, new_logprobs, "k3"), mask)',
     'approx_kl = kl_penalty(old_logprobs, new_logprobs, "k3").mean()'),
    ("trl #1643", "the wrong model is saved", "pipeline",
     'save_model(log.run_dir / "policy", policy.lm, policy.tokenizer)\n            state |=',
     'save_model(log.run_dir / "policy", reference.lm, policy.tokenizer)\n            state |='),
    ("NeMo-RL #3171", "a resumed run has a fresh optimizer", "resume",
     "for name in learned.keys() & state.keys():", 'for name in {"policy"} & state.keys():'),
    ("trl #5174", "a given model is trained at the rate of a new one", "data",
     "name: values[0 if new else 1]", "name: values[0]"),
    ("trl #546", "batches that do not divide are accepted", "data",
     "refuse(args.total_episodes % args.batch_size or args.batch_size % args.minibatch_size",
     "refuse(args.total_episodes % args.batch_size"),
    ("OpenRLHF #1219", "a score of 0 is taken as missing", "math",
     "if scores.dim() == 1:", "if scores.dim() == 1 and scores.all():"),
    ("Stable-Baselines3 #150", "the log has the statistics of the last step alone", "update",
     "(x[name] for x in steps)", "(x[name] for x in steps[-1:])"),
]
CLASSIC = [
    ("CleanRL #198", "truncation is treated as termination", "classic",
     "torch.where(terminated, 0, next_values)",
     "torch.where(terminated | truncated, 0, next_values)"),
    ("EmbodiChain #610", "bootstrap from the first observation of the next episode", "classic",
     'next_obs[i] = infos["final_obs"][i]', "pass"),
    ("CleanRL #494", "advantages run on over the end of an episode", "classic",
     "(~(terminated | truncated)).to(values.dtype)", "(~terminated).to(values.dtype)"),
    ("Stable-Baselines3 #105", "the end of an episode one step late", "classic",
     "(~(terminated | truncated)).to(values.dtype)",
     "(~(terminated | truncated).roll(1, 0)).to(values.dtype)"),
    ("CleanRL #499", "autoreset on the next step", "classic",
     "AutoresetMode.SAME_STEP)", "AutoresetMode.NEXT_STEP)"),
    ("Stable-Baselines3 #325", "advantages are divided by n − 1: NaN for one", "classic",
     "torch.rsqrt(x.var(correction=0) + 1e-8)", "torch.rsqrt(x.var(correction=1) + 1e-8)"),
    ("Stable-Baselines3 #227", "explained variance with its arguments swapped", "classic",
     "explained_variance(rollout.returns, rollout.old_values)",
     "explained_variance(rollout.old_values, rollout.returns)"),
    ("CleanRL #400", "the saved model lacks the observation statistics", "classic",
     'self.register_buffer("mean", torch.zeros(size))',
     'self.register_buffer("mean", torch.zeros(size), persistent=False)'),
    ("Stable-Baselines3, changelog", "the entropy is averaged over action dimensions", "classic",
     "0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)",
     "0.5 * math.log(2 * math.pi * math.e)).mean(dim=-1)"),
]
BUGS = [{"file": file_name, "bug": bug, "seen": seen, "first": f"test_{first}.py", "line": line,
         "bugged_line": bugged_line} for file_name, bugs in zip(TESTS, (RLHF, CLASSIC), strict=True)
        for seen, bug, first, line, bugged_line in bugs]


def first_failure(file_name, line, bugged_line, first):
    """Run the tests, beginning with those of a file, on a copy in which line is bugged_line.
    Returns: the first test that fails, or None. Raises: RuntimeError if the file cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(".git", "runs", "results", "__pycache__"))
        path = Path(folder, file_name)
        path.write_text(path.read_text().replace(line, bugged_line))
        names = [first, *(name for name in TESTS[file_name] if name != first)]
        for test_file in names:
            process = common.run_python("-m", "pytest", "-xqp", "no:cacheprovider",
                                        f"tests/{test_file}", cwd=folder, may_fail=True)
            if process.returncode != 0:
                break
    if process.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) tests/([\w.]+)::(\w+)", process.stdout, re.M)
    if not failed:
        raise RuntimeError(f"{bugged_line}: {process.stdout[-2000:]}")
    return f"{failed[1]}::{failed[2]}"


def plant(bug):
    """Plant one bug. Returns: what caught it, and where it was seen."""
    if (count := (ROOT / bug["file"]).read_text().count(bug["line"])) != 1:
        raise ValueError(f"{bug['bug']}: the line occurs {count} times in {bug['file']}")
    first = bug.get("first", TESTS[bug["file"]][0])
    return {"caught_by": first_failure(bug["file"], bug["line"], bug["bugged_line"], first),
            "seen": bug.get("seen", "")}


def publish(name, bugs):
    """Plant what is missing, two at a time; then a line per bug and the count."""
    runs = common.run_missing(name, bugs, ("file", "bug"), plant,
                              ("torch", "transformers", "gymnasium"), ("caught_by",))["runs"]
    lines = common.markdown(["file", "planted bug", "seen in", "caught first by"],
                            [[x["file"], x["bug"], x["seen"],
                              f"`{x['caught_by']}`" if x["caught_by"] else "no test"]
                             for x in runs])
    caught = [x["caught_by"] for x in runs if x["caught_by"]]
    lines.append(f"\n{len(caught)} of {len(runs)} caught, by {len(set(caught))} different tests")
    common.publish(name, lines)


def main():
    """The bugs of others, after the tests have passed on the files as they are."""
    if "--table" not in sys.argv:
        for file_name, (first, *_) in TESTS.items():
            if failure := first_failure(file_name, "", "", first):
                raise SystemExit(f"{failure} fails without any bug")
    publish("planted_bugs", BUGS)


if __name__ == "__main__":
    # The blind bugs are written down in results/blind_bugs.json, together with their results.
    blind = common.read_results("blind_bugs").get("planted", []) if "--blind" in sys.argv else None
    main() if blind is None else publish("blind_bugs", blind)
