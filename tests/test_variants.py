"""Each patch of benchmarks/variants applies, trains, and does what it is named for."""

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_lm, make_tokenizer, read_metrics, save
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
    variant.main(args)
    assert "held-out prompts" in capsys.readouterr().out
    if name in ("grpo", "rloo"):  # two groups of two tokens; in the second, a KL of 1 per token
        args.group_size, mask = 2, torch.ones(4, 2, dtype=torch.bool)
        kl = torch.tensor([0.0, 0.0, 1.0, 0.0]).unsqueeze(1) * mask
        rollout = variant.Rollout(mask, mask, mask, mask[:, 0], kl, torch.zeros(4, 2),
                                  scores=torch.tensor([1.0, 3.0, 7.0, 6.0]))
        expected = {"grpo": [-1, 1, 1, -1], "rloo": [-2, 2, 0, 0]}[name]  # KL: loss, or reward
        found = variant.compute_advantages(rollout, 0.5, args)
        assert (found - torch.tensor(expected).unsqueeze(1)).abs().max() < 1e-3
    elif name == "dpo":  # at first π is π_ref: all implicit scores are 0, each comparison a tie
        assert read_metrics(tmp_path / "run")[0]["ppo/loss"] == pytest.approx(math.log(2))
    else:  # only weights with an adapter have changed, and the folder has no others
        sft, policy = (load_file(tmp_path / f"run/{x}/model.safetensors")
                       for x in ("sft", "policy"))
        changed = {x for x in policy if not policy[x].equal(sft[x])}
        assert changed == {x for x in sft if x.endswith("_proj.weight")}
