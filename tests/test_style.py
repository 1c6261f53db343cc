"""Claim: the file keeps the promises it makes to whoever opens, imports or copies it.

Reference: its own syntax tree; a fresh interpreter.
Run: python -m pytest tests/test_style.py (5 seconds)
"""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import ppo_rlhf

ROOT = Path(ppo_rlhf.__file__).parent
SOURCE = Path(ppo_rlhf.__file__).read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [x for x in ast.walk(TREE) if isinstance(x, ast.FunctionDef)]


def python(code):
    """Standard output of a fresh interpreter that runs code."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                          capture_output=True).stdout.strip()


def test_importing_the_math_needs_torch_alone_and_prints_nothing():
    heavy = "{'transformers', 'tokenizers', 'datasets', 'tyro', 'tensorboard'}"
    assert python(f"import sys, ppo_rlhf; print({heavy} & set(sys.modules))") == "set()"


def test_importing_seeds_nothing():
    code = "import torch; torch.manual_seed(5); {}; print(torch.rand(1).item())"
    assert python(code.format("import ppo_rlhf")) == python(code.format("pass"))


def test_the_file_imports_nothing_of_this_repository():
    assert not re.search(r"^\s*(from|import) (ppo_classic|tests|benchmarks)", SOURCE, re.M)


def test_every_setting_is_read_by_name():
    body = SOURCE.split("def refuse")[1]
    unread = [x.name for x in fields(ppo_rlhf.Args) if f"args.{x.name}" not in body]
    assert not unread


def test_functions_are_short_documented_and_take_at_most_eight_arguments():
    for function in FUNCTIONS:
        lines = function.end_lineno - function.lineno + 1
        arguments = len(function.args.args) + len(function.args.kwonlyargs)
        documented = ast.get_docstring(function) or function.name.startswith("__")
        assert lines <= 60 and arguments <= 8 and documented, function.name


def test_nothing_is_left_to_do_and_nothing_is_commented_out():
    assert not re.search(r"TODO|FIXME|XXX|^\s*# (if|for|return|import|print)\b.*[:(]", SOURCE, re.M)


def test_the_math_takes_no_settings_and_touches_no_globals():
    math = SOURCE.split("# The PPO math")[1].split("# Stage 3: scoring")[0]
    assert not re.search(r"\bargs\b|\bglobal\b|print\(|\.item\(\)", math)
