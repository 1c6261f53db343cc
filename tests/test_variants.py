"""Each patch of benchmarks/variants applies, trains, and does what it is named for."""

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_lm, make_tokenizer, read_metrics, read_rows, save
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["grpo", "rloo", "dpo", "lora"])
def test_a_patched_file_trains(name, tmp_path, pairs_file, capsys):
    shutil.copy(ROOT / "ppo_rlhf.py", tmp_path)
    patch = ROOT / "benchmarks" / "variants" / f"{name}.patch"
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location(name, tmp_path / "ppo_rlhf.py")
    sys.modules[name] = variant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(variant)
    args = variant.Args(**(TINY | {"minibatch_size": 8}), dataset=pairs_file, run_name="run",
                        policy_model=save(tmp_path / "llama", make_lm(), make_tokenizer()),
                        output_dir=str(tmp_path))
    compute_advantages, prompts = variant.compute_advantages, []

    def watched(rollout, *rest):
        """compute_advantages, of a rollout whose prompts are looked at."""
        prompts.append(rollout.sequence_ids[:, : -rollout.response_mask.shape[1]])
        return compute_advantages(rollout, *rest)

    variant.compute_advantages = watched
    args.group_size = 4  # of grpo and rloo
    variant.main(args)
    assert "held-out prompts" in capsys.readouterr().out
    if name in ("grpo", "rloo"):  # two groups of two tokens; in the second, a KL of 1 per token
        groups = prompts[0].view(2, 4, -1)  # of one prompt each
        assert groups.equal(groups[:, :1].expand_as(groups)) and not groups[0].equal(groups[1])
        args.group_size, mask = 2, torch.ones(4, 2, dtype=torch.bool)
        kl = torch.tensor([0.0, 0.0, 1.0, 0.0]).unsqueeze(1) * mask
        rollout = variant.Rollout(mask, mask, mask, mask[:, 0], kl, torch.zeros(4, 2),
                                  scores=torch.tensor([1.0, 3.0, 7.0, 6.0]))
        expected = {"grpo": [-1, 1, 1, -1], "rloo": [-2, 2, 0, 0]}[name]  # KL: loss, or reward
        found = compute_advantages(rollout, 0.5, args)
        assert (found - torch.tensor(expected).unsqueeze(1)).abs().max() < 1e-3
    elif name == "dpo":  # at first π is π_ref: all implicit scores are 0, each comparison a tie
        assert read_metrics(tmp_path / "run")[0]["ppo/loss"] == pytest.approx(math.log(2))
        policy, sft = (variant.load_policy(tmp_path / f"run/{x}", args) for x in ("policy", "sft"))
        after = [x["ppo"] for x in read_rows(tmp_path / "run" / "before_after.jsonl")]
        kl = torch.tensor([x["kl"] for x in after])  # the sum of log π − log π_ref of a response
        assert variant.dpo_scores(policy, sft, 0.5, after).allclose(0.5 * kl, atol=1e-4)
        assert kl.abs().max() > 0.1
    else:  # only weights with an adapter have changed, and the folder has no others
        sft, policy = (load_file(tmp_path / f"run/{x}/model.safetensors")
                       for x in ("sft", "policy"))
        changed = {x for x in policy if not policy[x].equal(sft[x])}
        assert changed == {x for x in sft if x.endswith("_proj.weight")}
        lm, args.lora_rank, args.lora_alpha = make_lm(), 2, 6.0
        linear, x = lm.model.layers[1].mlp.up_proj, torch.randn(lm.config.hidden_size)
        before = linear(x)
        variant.add_adapters(lm, args)
        layer = lm.model.layers[1].mlp.up_proj
        assert layer(x).equal(before)
        torch.nn.init.normal_(layer.lora_b)
        after = before + 6 / 2 * layer.lora_b @ (layer.lora_a @ x)
        assert layer(x).allclose(after, atol=1e-5) and not before.allclose(after, atol=0.1)
        assert variant.merge_adapters(lm).model.layers[1].mlp.up_proj(x).allclose(after, atol=1e-5)
