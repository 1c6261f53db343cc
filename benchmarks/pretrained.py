"""A pretrained model and a scorer that nobody here made: PPO makes a small Lewis Carroll cheerful.

    python benchmarks/pretrained.py            # runs what is missing, then plots; or --table

Both are pip packages. glassllm has a Llama of 0.85 M weights, trained on books of Lewis Carroll;
vaderSentiment scores a response, without its prompt, between -1 and 1. The model never ends a text:
responses have 48 tokens, --missing-eos-penalty is 0. The learning rate is that of small new models;
nothing was tuned. The price: the perplexity of 64 texts that the model wrote before PPO.
"""

import json
import re
import tempfile
from pathlib import Path

import common  # benchmarks/common.py
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = {0.0: common.RED, 0.02: common.BLUE, 0.1: common.GREY}  # of kl_coef
JOBS = [{"kl_coef": kl_coef, "seed": seed} for seed in (1, 2, 3) for kl_coef in COLOURS]
CURVES = ["rollout/score", "rollout/kl", "rollout/response_len", "ppo/explained_variance"]
NAMES = ("Alice|The Queen|The King|The Hatter|The Duchess|The White Rabbit|The Gryphon|The Knight|"
         "The Mock Turtle|The March Hare|The Dormouse|Humpty Dumpty|Sylvie|Bruno|Arthur|The Dodo")
VERBS = "said|thought|cried|replied|looked at|went on|was|had|began to|asked if|felt|heard|came to"
PROMPTS = [f"{name} {verb}" for name in NAMES.split("|") for verb in VERBS.split("|")]
REWARD_FN = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
analyzer = SentimentIntensityAnalyzer()
def sentiment(prompts, responses):
    return [analyzer.polarity_scores(response)["compound"] for response in responses]"""
LAYER = ("input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
         "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj")


def write_model(folder):
    """glassllm as a folder of transformers. Returns: the model, the largest error of its logits."""
    import glassllm
    source, words = glassllm.load_pretrained("en")
    weights = {"embed_tokens.weight": source.E, "norm.weight": source.norm_f.gamma} | {
        f"layers.{i}.{name}.weight": weight for i, block in enumerate(source.blocks)
        for name, weight in zip(LAYER.split(), block.parameters(), strict=True)}
    for name, x in weights.items():
        x = torch.tensor(x.data.T if "proj" in name else x.data)
        if "q_proj" in name or "k_proj" in name:  # rotary pairs: neighbours there, here halves
            x = x.unflatten(0, (-1, 16, 2)).transpose(1, 2).flatten(0, 2)  # of a head of 32
        weights[name] = x
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=341, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=3)).eval()
    lm.model.load_state_dict(weights)
    bpe = Tokenizer(models.BPE(words.token_to_id, words.merges, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("\n|▁*[^▁\n]+|▁+"), "isolated")
    bpe.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    for text in ("\n\n  “Oh!”  \n said\n the Queen; 10 × é", *PROMPTS):
        assert tokenizer(text).input_ids == words.encode(text), text
    ids = words.encode(" ".join(PROMPTS))[:128]
    error = (lm(torch.tensor([ids])).logits - torch.tensor(source(ids).data)).abs().max().item()
    assert error < 1e-4, error
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm, error


@torch.no_grad()
def one_run(job):
    """PPO once, in a folder of its own. Returns: curves, pairs (before, after), 20 samples."""
    with tempfile.TemporaryDirectory() as folder:
        lm, error = write_model(f"{folder}/model")
        Path(folder, "reward.py").write_text(REWARD_FN)
        Path(folder, "prompts.jsonl").write_text("\n".join(f'{{"prompt": "{x}"}}' for x in PROMPTS))
        output = common.run_python(common.ROOT / "ppo_rlhf.py", *common.flags_of(job | {
            "policy_model": f"{folder}/model", "reward_fn": f"{folder}/reward.py:sentiment",
            "dataset": f"{folder}/prompts.jsonl", "max_prompt_len": 32, "response_len": 48,
            "sft_epochs": 0, "missing_eos_penalty": 0, "learning_rate": 1e-4,
            "output_dir": folder, "run_name": "run"})).stdout.split("held-out prompts  ")[1]
        metrics = common.read_metrics(f"{folder}/run")
        rows = [json.loads(x) for x in open(f"{folder}/run/before_after.jsonl")]  # noqa: SIM115
        lms = lm, LlamaForCausalLM.from_pretrained(f"{folder}/run/policy")
    torch.manual_seed(0)  # the same 64 texts for all runs; 4 is the newline
    ids = lm.generate(torch.full((64, 1), 4), do_sample=True, top_k=0, max_new_tokens=100)
    return {key: [float(x) for x in re.search(rf"\n{key} +(\S+) +(\S+)", output).groups()]
            for key in ("score", "win rate by score", "kl", "entropy")} | {
        "perplexity": [round(float(x(ids, labels=ids).loss.exp()), 2) for x in lms],
        "logits_differ_by": error,
        "curves": {key: [round(x[key], 4) for x in metrics] for key in CURVES},
        "samples": [[x["prompt"], x["sft"]["response"], x["ppo"]["response"]] for x in rows[:20]]}


def main():
    """Run what is missing; write a line per run, three samples of each first seed, the picture."""
    runs = common.run_missing("pretrained", JOBS, ["kl_coef", "seed"], one_run, [
        "torch", "transformers", "glassllm", "vaderSentiment"], ["score"], at_once=1)["runs"]
    keys = ["score", "win rate by score", "kl", "entropy", "perplexity"]
    rows = [[x["kl_coef"], x["seed"], *("{} → {}".format(*x[key]) for key in keys)] for x in runs]
    samples = [f"- kl_coef {x['kl_coef']}: `{json.dumps(sample, ensure_ascii=False)}`"
               for x in runs[:3] for sample in x["samples"][:3]]
    common.publish("pretrained", [*common.markdown(["kl_coef", "seed", *keys], rows), "", *samples])
    with common.picture("pretrained", 1, 3, (13, 3.4)) as axes:
        for i, x in enumerate(runs):
            look = {"color": COLOURS[x["kl_coef"]], "label": "" if i > 2 else f"β = {x['kl_coef']}"}
            for axis, key in zip(axes[0], CURVES[:2], strict=False):
                axis.plot(range(128, 6401, 128), x["curves"][key], **look)
            axes[0, 2].plot(["before", "after"], x["perplexity"], **look)
        axes[0, 0].set(title="score: sentiment of the response", xlabel="episodes")
        axes[0, 1].set(title="KL, nats per response", xlabel="episodes", yscale="symlog")
        axes[0, 2].set(title="perplexity of what it wrote before PPO")
        axes[0, 2].legend()


if __name__ == "__main__":
    main()
