"""How close does ppo_rlhf.py come to the exact optimum of the KL-regularised objective?

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/optimum.py            # runs what is missing, two at a time, then plots
    python benchmarks/optimum.py --plot     # tables and plot from the committed results

A language bandit: 8 words and EOS, up to 4 tokens, 8 prompts of different lengths, a random
transformer as reference and another as reward model; an instance is a seed of their weights. All
37,448 responses can be enumerated, and the optimum of  J(π) = E[r] − β·KL(π ‖ π_ref)  is known:
π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β), with J* = β·log E_ref[exp(r/β)]. A run's figure is its share of
what can be gained, (J(π) − J(π_ref)) / (J* − J(π_ref)): 0 for the reference, 1 for the optimum. A
run samples; its figure does not. Each finished run is written to results/optimum.json at once.
"""

import contextlib
import inspect
import json
import statistics
import sys
import tempfile
from pathlib import Path

import common  # benchmarks/common.py
import torch

INSTANCES = [1, 2, 3, 4, 5]
# For 204,800 episodes: the best of seven settings tried on instance 1 with seed 1.
LONG = ("--batch-size 1024 --minibatch-size 512 --update-epochs 8 --clip-coef 0.1 "
        "--learning-rate 5e-3 --critic-learning-rate 5e-3")
LIMITS = ["--gae-lambda 1", "--no-norm-advantages", "--update-epochs 1", "--learning-rate 3e-3",
          "--critic-learning-rate 1e-3"]  # the last: one rate for policy and critic, as trl
TUNED = "--learning-rate 2e-3 --critic-learning-rate 3e-3"  # chosen on instance 1, seed 1
PAD, EOS, NUM_WORDS, MAX_LEN = 0, 1, 8, 4
WORDS = [f"w{i}" for i in range(NUM_WORDS)]
PROMPTS = [[0], [1, 2], [3], [4, 5, 6], [7, 7], [2, 0, 1], [5], [6, 3]]  # numbers of words
TEXTS = [" ".join(WORDS[i] for i in prompt) for prompt in PROMPTS]


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


def make_instance(folder: Path, seed: int, pad_logit: float = -30.0, constant=None) -> None:
    """Write reference, reward model and prompts of instance number seed. pad_logit: bias of PAD
    under the reference; a trained model never writes PAD. With a constant, each prompt also lists
    the reward of each response plus the constant, for listed_scores."""
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
    rows = [{"prompt": text} for text in TEXTS]
    if constant is not None:
        rewards = torch.cat(reward_tables(reward_model), dim=1) + constant  # (prompts, 4681)
        rows = [row | {"listed": x.tolist()} for row, x in zip(rows, rewards, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def prefixes(length: int) -> torch.Tensor:
    """All strings of so many words, (8 ** length, length), as token ids."""
    words = torch.arange(2, 2 + NUM_WORDS)
    return torch.cartesian_prod(*[words] * length).reshape(-1, length) if length else (
        torch.zeros(1, 0, dtype=torch.long))


def policy_tables(lm, with_pad: bool = False) -> list[torch.Tensor]:
    """log π(next token | prompt, prefix) for every prefix of 0 to 3 words. Returns: for each length
    (prompts, 8 ** length, 9); the last column is EOS. PAD is excluded, as in ppo_rlhf.py, or, with
    with_pad, takes its share, and the nine probabilities sum to less than 1."""
    longest = prefixes(MAX_LEN - 1)  # one pass over these reads the shorter ones too
    tables = [[] for _ in range(MAX_LEN)]
    for prompt in PROMPTS:
        start = torch.tensor([i + 2 for i in prompt]).expand(len(longest), -1)
        logits = lm(torch.cat([start, longest], dim=1)).logits[:, len(prompt) - 1 :].double()
        logits = logits[..., [*range(2, 2 + NUM_WORDS), EOS, PAD]]
        for length, table in enumerate(tables):
            table.append(logits[:: NUM_WORDS ** (MAX_LEN - 1 - length), length])
    logits = [torch.stack(table) for table in tables]
    if with_pad:
        return [x.log_softmax(dim=-1)[..., :-1] for x in logits]
    return [x[..., :-1].log_softmax(dim=-1) for x in logits]


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


def state_values(policy: list, reference: list, rewards: list, beta: float) -> list:
    """V(prompt, prefix) under π: what reward, minus β times KL, is still to come. From the last
    token backwards. Returns: for each length (prompts, 8 ** length)."""
    value, values = rewards[MAX_LEN], [torch.empty(0)] * MAX_LEN
    for length in reversed(range(MAX_LEN)):
        kl = policy[length] - reference[length]  # per action; its mean under π is the KL
        gains = actions_values(value, rewards[length]) - beta * kl  # (prompts, nodes, 9)
        value = values[length] = (policy[length].exp() * gains).sum(dim=-1)
    return values


def objective(policy: list, reference: list, rewards: list, beta: float) -> torch.Tensor:
    """J(π) = E[r] − β·KL(π ‖ π_ref), mean over prompts."""
    return state_values(policy, reference, rewards, beta)[0].mean()


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


def loss_fixed_point(reference: list, rewards: list, beta: float, estimator: str) -> list:
    """Where PPO comes to rest with the KL in the loss. No state then answers for the KL that it
    causes later: each maximises Σₐ π(a)·Q(a) − β·KL of its own next token, where Q counts rewards
    alone. For KL(π ‖ π_ref), which k2 pulls towards, π ∝ π_ref·exp(Q/β); for KL(π_ref ‖ π), k3's,
    π = β·π_ref / (μ − Q) with the μ at which π sums to 1."""
    value, policy = rewards[MAX_LEN], [torch.empty(0)] * MAX_LEN
    for length in reversed(range(MAX_LEN)):
        q = actions_values(value, rewards[length])  # (prompts, nodes, 9)
        if estimator == "k2":
            policy[length] = (reference[length] + q / beta).log_softmax(dim=-1)
        else:
            low, high = q.amax(dim=-1), q.amax(dim=-1) + beta  # μ lies between: bisect
            for _ in range(60):
                middle = (low + high) / 2
                total = (beta * reference[length].exp() / (middle.unsqueeze(-1) - q)).sum(dim=-1)
                low = torch.where(total > 1, middle, low)
                high = torch.where(total > 1, high, middle)
            policy[length] = (beta * reference[length].exp() / (high.unsqueeze(-1) - q)).log()
        value = (policy[length].exp() * q).sum(dim=-1)
    return policy


def eos_share(policy: list) -> float:
    """Probability that a response ends by EOS before the length limit, mean over prompts."""
    return response_probabilities(policy)[:, : -(NUM_WORDS**MAX_LEN)].sum(dim=1).mean().item()


def distance(policy: list, other: list) -> float:
    """Total variation between two policies over whole responses, mean over prompts."""
    difference = response_probabilities(policy) - response_probabilities(other)
    return 0.5 * difference.abs().sum(dim=-1).mean().item()


def read_instance(instance: Path) -> tuple:
    """The reference as a model, its table, and the reward of every response."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    lm = AutoModelForCausalLM.from_pretrained(instance / "reference").eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(instance / "reward_model")
    with torch.no_grad():
        return lm, policy_tables(lm), reward_tables(reward_model.eval())


@torch.no_grad()
def report(lm_folder: Path, instance: Path, beta: float, estimator: str | None) -> dict[str, float]:
    """Share, KL to the reference, and distance to π* of a policy on disk; with the estimator of a
    KL in the loss also the share of its fixed point, and the distance to that."""
    from transformers import AutoModelForCausalLM

    _, reference, rewards = read_instance(instance)
    lm = AutoModelForCausalLM.from_pretrained(lm_folder).eval()
    policy = policy_tables(lm)
    best, best_policy = optimum(reference, rewards, beta)
    at_reference = objective(reference, reference, rewards, beta).item()
    reached = objective(policy, reference, rewards, beta).item()
    mean_reward = objective(policy, reference, rewards, 0.0).item()
    best_kl = (objective(best_policy, reference, rewards, 0.0).item() - best) / beta
    gain = best - at_reference
    without_pad = response_probabilities(policy_tables(lm, with_pad=True)).sum(dim=1).mean()
    found = {"share": (reached - at_reference) / gain, "J": reached, "J_reference": at_reference,
             "J_optimum": best, "kl": (mean_reward - reached) / beta, "kl_optimum": best_kl,
             "total_variation": distance(policy, best_policy), "pad": 1 - without_pad.item(),
             "eos": eos_share(policy), "eos_optimum": eos_share(best_policy)}
    if estimator is not None:
        resting = loss_fixed_point(reference, rewards, beta, estimator)
        found["share_of_fixed_point"] = (
            objective(resting, reference, rewards, beta).item() - at_reference) / gain
        found["distance_to_fixed_point"] = distance(policy, resting)
    return found


# ==================================================================================================
# The contestants
# ==================================================================================================


def listed_scores(prompts: list, responses: list[str], listed: list) -> list[float]:
    """The --reward-fn of runs with a constant: looks each response up in its prompt's list."""
    scores = []
    for response, rewards in zip(responses, listed, strict=True):
        words = [WORDS.index(word) for word in response.split()]
        shorter = sum(NUM_WORDS**length for length in range(len(words)))  # they come first
        digits = sum(x * NUM_WORDS**i for i, x in enumerate(reversed(words)))
        scores.append(rewards[shorter + digits])
    return scores


def our_flags(instance: Path, folder: Path, run: dict) -> list[str]:
    """The command line of ppo_rlhf.py for one run."""
    source = ["--reward-model", f"{instance}/reward_model"]
    if run.get("constant") is not None:
        source = ["--reward-fn", f"{Path(__file__).resolve()}:listed_scores"]
    flags = (f"--run-name run --device cpu --seed {run['seed']} --sft-epochs 0 --eval-prompts 0 "
             f"--save-interval 1000000 --max-prompt-len 4 --response-len {MAX_LEN} "
             f"--total-episodes {run['episodes']} --kl-coef {run['beta']} "
             "--batch-size 256 --minibatch-size 64 "
             "--learning-rate 1e-3 --critic separate --score-norm none --missing-eos-penalty 0")
    return ["--dataset", f"{instance}/prompts.jsonl", "--policy-model", f"{instance}/reference",
            *source, "--output-dir", str(folder), *flags.split(), *run["flags"].split()]


def our_result(folder: Path, run: dict) -> tuple[Path, float]:
    """The folder of our policy, and the objective that the run itself reported at its end."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-10:]
    rows = [json.loads(line) for line in lines]
    reported = [x["rollout/score_mean"] - run["beta"] * x["rollout/kl"] for x in rows]
    return folder / "run" / "policy", sum(reported) / len(reported)


def run_ours(instance: Path, folder: Path, run: dict) -> tuple[Path, float]:
    """ppo_rlhf.py through its command line. Returns: as our_result."""
    common.run_python(common.ROOT / "ppo_rlhf.py", *our_flags(instance, folder, run))
    return our_result(folder, run)


def run_exact_critic(instance: Path, folder: Path, run: dict) -> tuple[Path, float]:
    """ppo_rlhf.py with the enumerated V in place of the critic's. Returns: as our_result."""
    import tyro

    sys.path.insert(0, str(common.ROOT))
    import ppo_rlhf

    _, reference, rewards = read_instance(instance)
    collect_rollout = ppo_rlhf.collect_rollout

    @torch.no_grad()
    def collect_with_exact_values(*arguments, **named):
        rollout = collect_rollout(*arguments, **named)
        call = inspect.signature(collect_rollout).bind(*arguments, **named).arguments
        tables = policy_tables(call["policy"].lm)
        values = state_values(tables, reference, rewards, run["beta"])
        rows = torch.tensor([TEXTS.index(prompt) for prompt in call["prompts"]])  # (batch,)
        nodes = torch.zeros_like(rows)  # numbers of the prefixes among those of their length
        response_ids = rollout.sequence_ids[:, -rollout.response_mask.shape[1] :]
        for t, mask in enumerate(rollout.response_mask.unbind(dim=1)):
            rollout.old_values[:, t] = torch.where(mask, values[t][rows, nodes], 0)
            goes_on = mask & (response_ids[:, t] > EOS)
            nodes = torch.where(goes_on, NUM_WORDS * nodes + response_ids[:, t] - 2, 0)
        return rollout

    ppo_rlhf.collect_rollout = collect_with_exact_values
    with contextlib.redirect_stdout(None):
        ppo_rlhf.main(tyro.cli(ppo_rlhf.Args, args=our_flags(instance, folder, run)))
    return our_result(folder, run)


def run_exact_gradient(instance: Path, folder: Path, run: dict) -> tuple[Path, float]:
    """Gradient ascent on the enumerated J: PPO's steps (16 for 256 episodes), rate and gradient
    clipping, without any noise. Returns: the folder of the policy, and its J."""
    lm, reference, rewards = read_instance(instance)
    optimizer = torch.optim.Adam(lm.parameters(), eps=1e-5)
    steps, value = run["episodes"] // 16, torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        value = objective(policy_tables(lm), reference, rewards, run["beta"])
        optimizer.zero_grad()
        (-value).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
    lm.save_pretrained(folder / "policy")
    return folder / "policy", value.item()


def run_trl(instance: Path, folder: Path, run: dict) -> tuple[Path, float]:
    """PPOTrainer of trl with the same sizes, epochs, clipping, λ and policy rate. What differs: it
    has one rate for policy and critic, and no gradient clipping. Returns: the folder of its policy,
    and the objective that it reported at its end."""
    rows = [json.loads(x)["prompt"] for x in (instance / "prompts.jsonl").read_text().splitlines()]
    trainer = common.trl_trainer(instance / "reference", instance / "reward_model", rows * 256, {
        "output_dir": str(folder / "trl"), "total_episodes": run["episodes"],
        "per_device_train_batch_size": 256, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
        "response_length": MAX_LEN, "gamma": 1.0, "lam": 0.95, "missing_eos_penalty": None,
        "kl_coef": run["beta"], "whiten_rewards": False, "seed": run["seed"],
        "local_rollout_forward_batch_size": 256})
    trainer.train()
    trainer.policy_model.save_pretrained(folder / "trl_policy")
    reported = [x["objective/rlhf_reward"] for x in trainer.state.log_history
                if "objective/rlhf_reward" in x][-10:]
    return folder / "trl_policy", sum(reported) / len(reported)


RUNNERS = {"ours": run_ours, "trl": run_trl, "exact critic": run_exact_critic,
           "exact gradient": run_exact_gradient}


def one_run(run: dict) -> dict:
    """One contestant on one instance, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_instance(folder / "instance", run["instance"], run["pad_logit"], run.get("constant"))
        policy, reported = RUNNERS[run["who"]](folder / "instance", folder / "runs", run)
        words = run["flags"].split()
        estimator = words[words.index("--kl-estimator") + 1] if "--kl-in" in words else None
        found = report(policy, folder / "instance", run["beta"], estimator)
        return found | {"J_reported": reported}


# ==================================================================================================
# Runs, table, plot
# ==================================================================================================


def job(group: str, who: str, instance=1, episodes=51_200, **changes) -> dict:
    """One run."""
    usual = {"beta": 0.2, "flags": "", "seed": 1, "pad_logit": -30.0}
    run = {"group": group, "who": who, "instance": instance, "episodes": episodes}
    return run | usual | changes


def jobs() -> list[dict]:
    """Every run of the tables, the most wanted first."""
    found = []
    for seed in (1, 2, 3):
        for instance in INSTANCES:
            found += [job("peers", who, instance, seed=seed) for who in ("ours", "trl")]
    found += [job("second edition", "ours", instance, seed=seed)
              for seed in (1, 2, 3) for instance in (1, 3, 5)]
    found += [job("vf_coef", "ours", 5, seed=seed, flags="--vf-coef 0.1") for seed in (1, 2, 3)]
    found += [job("tuned", "ours", instance, flags=TUNED) for instance in INSTANCES]
    found += [job("long", "ours", instance, 204_800, flags=LONG) for instance in INSTANCES[:2]]
    found.append(job("longest", "ours", 1, 819_200, flags=LONG))
    # J_reported counts the centred scores; the share counts the rewards without the constant.
    found += [job(f"scores {constant:+d}", "ours", flags="--score-norm center", constant=constant)
              for constant in (0, 10, -10)]
    for beta in (0.05, 0.2, 1.0):
        for critic in ("separate", "shared"):
            for microbatch in (64, 16):
                flags = f"--critic {critic} --microbatch-size {microbatch}"
                found.append(job("grid", "ours", 5, beta=beta, flags=flags))
    for estimator in ("k2", "k3"):
        flags = f"--kl-in loss --kl-estimator {estimator} --no-norm-advantages"
        found += [job("loss", "ours", instance, flags=flags) for instance in (1, 5)]
        found.append(job("loss", "ours", 1, 204_800, flags=f"{LONG} {flags}"))
        fresh = "--update-epochs 1 --learning-rate 3e-3 --critic-learning-rate 3e-3"
        flags = f"{fresh} {flags}"  # each sample serves one step
        found += [job("loss", "ours", instance, 204_800, flags=flags) for instance in (1, 5)]
    found += [job("pad", who, pad_logit=0.0) for who in ("ours", "trl")]
    found += [job("limits", "exact gradient"),
              job("limits", "exact critic", flags="--vf-coef 0"),
              job("limits", "exact critic", flags="--vf-coef 0 --gae-lambda 0")]
    return found + [job("limits", "ours", flags=x) for x in LIMITS]


def main():
    """Run what is missing, two at a time, then print and plot."""
    runs = common.run_missing("optimum", jobs(), (*job("", ""), "constant"), run_apart,
                              ("torch", "transformers", "numpy", "trl"), ("share",))["runs"]
    table(runs)
    plot(runs)


def run_apart(run: dict) -> dict:
    """one_run in a process of its own: two runs at a time share no state."""
    output = common.run_python(__file__, "--run", json.dumps(run)).stdout
    return json.loads(output.splitlines()[-1])


def table(runs: list[dict]) -> None:
    """One line per run, then the mean share and its standard deviation over seeds."""
    columns = ["group", "who", "instance", "episodes", "beta", "flags", "seed", "share", "kl",
               "kl_optimum", "total_variation", "eos", "eos_optimum", "pad", "J_reported", "J",
               "J_optimum", "share_of_fixed_point", "distance_to_fixed_point", "seconds"]
    rows = []
    for x in sorted(runs, key=lambda x: (x["group"], x["instance"], x["beta"], x["flags"])):
        cells = [x.get(column, "") for column in columns]
        rows.append([f"{y:.4f}" if type(y) is float else y for y in cells])
    common.publish("optimum", common.markdown(columns, rows))
    for instance in INSTANCES:
        shares = {who: [x["share"] for x in runs if x["group"] == "peers" and x["who"] == who
                        and x["instance"] == instance] for who in ("ours", "trl")}
        if all(len(x) > 1 for x in shares.values()):
            cells = [f"{who} {statistics.mean(x):.4f} ± {statistics.stdev(x):.4f} ({len(x)} seeds)"
                     for who, x in shares.items()]
            print(f"instance {instance}: {', '.join(cells)}")


def plot(runs: list[dict]) -> None:
    """What is missing of the possible gain: ours and trl's on each instance, then the long runs."""
    bars = [("trl", "peers", "trl", common.GREY), ("ours", "peers", "ours", common.BLUE),
            ("ours, 4 times the episodes", "long", "ours", common.GREEN)]
    with common.picture("optimum", 1, 1, (7, 3)) as axes:
        axis = axes[0, 0]
        for i, (label, group, who, colour) in enumerate(bars):
            missing = {}
            for x in runs:
                if x["group"] == group and x["who"] == who:
                    missing.setdefault(x["instance"], []).append(100 * (1 - x["share"]))
            places = [instance + 0.27 * (i - 1) for instance in missing]
            axis.bar(places, [statistics.mean(x) for x in missing.values()], 0.25, label=label,
                     color=colour)
            for place, values in zip(places, missing.values(), strict=True):  # each seed
                axis.plot([place] * len(values), values, "_", color="black", markersize=8)
        axis.set_xlabel("instance")
        axis.set_ylabel("missing to the optimum,\n% of the possible gain")
        axis.legend()


if __name__ == "__main__":
    if "--run" in sys.argv:
        print(json.dumps(one_run(json.loads(sys.argv[sys.argv.index("--run") + 1]))))
    else:
        main()
