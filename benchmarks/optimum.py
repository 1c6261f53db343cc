"""How close does ppo_rlhf.py come to the exact optimum of the KL-regularised objective?

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/optimum.py            # runs what is missing, two at a time, then plots
    python benchmarks/optimum.py --plot     # tables and plot from the committed results

A language bandit: 8 words and EOS, up to 4 tokens, 8 prompts of different lengths, a random
transformer as reference and another as reward model. All 37,448 responses can be enumerated, and
the optimum of  J(π) = E[r] − β·KL(π ‖ π_ref)  is known: π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β), with
J* = β·log E_ref[exp(r/β)]. A run's figure is its share of what can be gained,
(J(π) − J(π_ref)) / (J* − J(π_ref)): 0 for the reference, 1 for the optimum. Nothing in it is
sampled. Each finished run is written to results/optimum.json at once.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAD, EOS, NUM_WORDS, MAX_LEN = 0, 1, 8, 4
WORDS = [f"w{i}" for i in range(NUM_WORDS)]
PROMPTS = [[0], [1, 2], [3], [4, 5, 6], [7, 7], [2, 0, 1], [5], [6, 3]]  # numbers of words


# ==================================================================================================
# The bandit
# ==================================================================================================


def make_tokenizer():
    """One token per word: [PAD] 0, [EOS] 1, then the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]",
                                   padding_side="left")


def make_instance(folder: Path, seed: int, pad_logit: float = -30.0) -> None:
    """Write reference, reward model and prompts of instance number seed. pad_logit: bias of PAD
    under the reference; a trained model never writes PAD."""
    from transformers import PhiConfig, PhiForCausalLM, PhiForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"vocab_size": 2 + NUM_WORDS, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
             "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attention_dropout": 0.0}
    reference = PhiForCausalLM(PhiConfig(**sizes, initializer_range=0.15))  # its head has a bias
    reward_model = PhiForSequenceClassification(
        PhiConfig(**sizes, initializer_range=0.3, num_labels=1))
    with torch.no_grad():
        reference.lm_head.bias[PAD] = pad_logit
        scores = torch.cat([x.flatten() for x in reward_tables(reward_model.eval())])
        reward_model.score.weight /= scores.std()  # rewards of all responses: std 1
    for name, model in (("reference", reference), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": " ".join(WORDS[i] for i in prompt)} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def prefixes(length: int) -> torch.Tensor:
    """All strings of so many words, (8 ** length, length), as token ids."""
    words = torch.arange(2, 2 + NUM_WORDS)
    return torch.cartesian_prod(*[words] * length).reshape(-1, length) if length else (
        torch.zeros(1, 0, dtype=torch.long))


@torch.no_grad()
def policy_tables(lm) -> list[torch.Tensor]:
    """log π(next token | prompt, prefix) for every prefix of 0 to 3 words. Returns: for each length
    (prompts, 8 ** length, 9); the last column is EOS. PAD is excluded, as in ppo_rlhf.py."""
    tables = []
    for length in range(MAX_LEN):
        rows = []
        for prompt in PROMPTS:
            prefix = prefixes(length)
            start = torch.tensor([i + 2 for i in prompt]).expand(len(prefix), -1)
            logits = lm(torch.cat([start, prefix], dim=1)).logits[:, -1].double()
            rows.append(torch.cat([logits[:, 2:], logits[:, EOS : EOS + 1]], dim=1))
        tables.append(torch.stack(rows).log_softmax(dim=-1))
    return tables


@torch.no_grad()
def reward_tables(reward_model) -> list[torch.Tensor]:
    """r(x, y): for lengths 0 to 3 that of "prefix EOS", (prompts, 8 ** length); then that of the
    responses cut after 4 words."""
    tables = []
    for length in range(MAX_LEN + 1):
        rows = []
        for prompt in PROMPTS:
            prefix = prefixes(length)
            parts = [torch.tensor([i + 2 for i in prompt]).expand(len(prefix), -1), prefix]
            if length < MAX_LEN:
                parts.append(torch.full((len(prefix), 1), EOS))
            rows.append(reward_model(torch.cat(parts, dim=1)).logits[:, 0].double())
        tables.append(torch.stack(rows))
    return tables


def actions_values(next_value: torch.Tensor, end_value: torch.Tensor) -> torch.Tensor:
    """What follows each action, (prompts, nodes, 9): the child's value for a word, then EOS."""
    prompts, nodes = end_value.shape
    return torch.cat([next_value.view(prompts, nodes, NUM_WORDS), end_value.unsqueeze(-1)], dim=-1)


def objective(policy: list, reference: list, rewards: list, beta: float) -> torch.Tensor:
    """J(π) = E[r] − β·KL(π ‖ π_ref), mean over prompts; from the last token backwards."""
    value = rewards[MAX_LEN]
    for length in reversed(range(MAX_LEN)):
        kl = policy[length] - reference[length]  # per action; its mean under π is the KL
        gains = actions_values(value, rewards[length]) - beta * kl  # (prompts, nodes, 9)
        value = (policy[length].exp() * gains).sum(dim=-1)
    return value.mean()


def optimum(reference: list, rewards: list, beta: float) -> tuple[float, list]:
    """J* and π*, by the same recursion with β·log E_ref[exp(·/β)] in place of the mean."""
    value, policy = rewards[MAX_LEN], [torch.empty(0)] * MAX_LEN
    for length in reversed(range(MAX_LEN)):
        tilted = reference[length] + actions_values(value, rewards[length]) / beta
        value = beta * tilted.logsumexp(dim=-1)
        policy[length] = tilted.log_softmax(dim=-1)
    return value.mean().item(), policy


def response_probabilities(policy: list) -> torch.Tensor:
    """π(y|x) of all responses, (prompts, 4681)."""
    reach, ends = torch.ones(len(PROMPTS), 1, dtype=torch.double), []
    for table in policy:
        joint = reach.unsqueeze(-1) * table.exp()  # (prompts, nodes, 9)
        ends.append(joint[..., -1])
        reach = joint[..., :-1].flatten(1)
    return torch.cat([*ends, reach], dim=1)


def report(lm_folder: Path, instance: Path, beta: float) -> dict[str, float]:
    """Share, KL to the reference, and distance to π* of a policy on disk."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, reference = (policy_tables(AutoModelForCausalLM.from_pretrained(x).eval())
                         for x in (lm_folder, instance / "reference"))
    rewards = reward_tables(AutoModelForSequenceClassification.from_pretrained(
        instance / "reward_model").eval())
    best, best_policy = optimum(reference, rewards, beta)
    at_reference = objective(reference, reference, rewards, beta).item()
    reached = objective(policy, reference, rewards, beta).item()
    mean_reward = objective(policy, reference, rewards, 0.0).item()
    distance = (response_probabilities(policy) - response_probabilities(best_policy)).abs()
    best_kl = (objective(best_policy, reference, rewards, 0.0).item() - best) / beta
    return {"share": (reached - at_reference) / (best - at_reference), "J": reached,
            "J_reference": at_reference, "J_optimum": best, "kl": (mean_reward - reached) / beta,
            "kl_optimum": best_kl, "total_variation": 0.5 * distance.sum(-1).mean().item()}


# ==================================================================================================
# The contestants
# ==================================================================================================


def run_ours(instance: Path, folder: Path, beta: float, episodes: int, seed: int, flags: str = ""):
    """ppo_rlhf.py through its command line. Returns: the folder of its policy."""
    command = [
        sys.executable, str(HERE.parent / "ppo_rlhf.py"), "--dataset", f"{instance}/prompts.jsonl",
        "--policy-model", f"{instance}/reference", "--sft-epochs", "0", "--reward-model",
        f"{instance}/reward_model", "--response-len", str(MAX_LEN), "--max-prompt-len", "4",
        "--total-episodes", str(episodes), "--batch-size", "256", "--minibatch-size", "64",
        "--learning-rate", "1e-3", "--kl-coef", str(beta), "--missing-eos-penalty", "0",
        "--critic", "separate", "--seed", str(seed), "--log-samples-interval", "1000000",
        "--save-interval", "1000000", "--output-dir", str(folder), "--run-name", "run",
        *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise RuntimeError(process.stderr[-3000:])
    return folder / "run" / "policy"


def run_trl(instance: Path, folder: Path, beta: float, episodes: int, seed: int) -> Path:
    """PPOTrainer of trl with the same sizes and rates. Returns: the folder of its policy."""
    import copy

    import datasets
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(instance / "reference")
    rows = [json.loads(x)["prompt"] for x in (instance / "prompts.jsonl").read_text().splitlines()]
    prompts = [{"input_ids": tokenizer(x)["input_ids"]} for x in rows * 256]
    policy, reference = (AutoModelForCausalLM.from_pretrained(instance / "reference")
                         for _ in range(2))
    reward_model = AutoModelForSequenceClassification.from_pretrained(instance / "reward_model")
    config = PPOConfig(
        output_dir=str(folder / "trl"), total_episodes=episodes, per_device_train_batch_size=256,
        num_mini_batches=4, num_ppo_epochs=4, learning_rate=1e-3, lr_scheduler_type="linear",
        response_length=MAX_LEN, stop_token="eos", temperature=1.0, missing_eos_penalty=None,
        kl_coef=beta, whiten_rewards=False, gamma=1.0, lam=0.95, num_sample_generations=0,
        local_rollout_forward_batch_size=256, seed=seed, report_to="none", save_strategy="no",
        logging_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False)
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=reward_model, value_model=copy.deepcopy(reward_model),
        train_dataset=datasets.Dataset.from_list(prompts))
    trainer.train()
    policy.save_pretrained(folder / "trl_policy")
    return folder / "trl_policy"


def one_run(job: dict) -> dict:
    """One contestant on one instance, in a folder of its own."""
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_instance(folder / "instance", job["instance"])
        sizes = folder / "instance", folder / "runs", job["beta"], job["episodes"], job["seed"]
        policy = run_trl(*sizes) if job["who"] == "trl" else run_ours(*sizes, job["flags"])
        return job | report(policy, folder / "instance", job["beta"]) | {
            "seconds": round(time.time() - start)}


if __name__ == "__main__":
    job = {"instance": int(sys.argv[1]), "beta": 0.2, "episodes": int(sys.argv[2]), "seed": 1,
           "who": sys.argv[3], "flags": " ".join(sys.argv[4:])}
    print(json.dumps(one_run(job)), math.nan)
