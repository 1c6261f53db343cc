"""Claim: both files keep the promises they make to whoever opens, imports or copies them.

Reference: their own syntax trees; a fresh interpreter.
Run: python -m pytest tests/test_style.py (5 seconds)
"""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from inspect import getsource
from pathlib import Path

import pytest
import torch

import ppo_classic
import ppo_rlhf

BOTH = pytest.mark.parametrize("module", [ppo_rlhf, ppo_classic], ids=lambda x: x.__name__)


@BOTH
def test_importing_seeds_nothing_and_loads_only_what_the_math_and_the_models_need(module):
    heavy = {"datasets", "tyro", "tensorboard", "gymnasium"}
    heavy |= {"transformers"} if module is ppo_classic else set()
    code = (f"import sys, torch; torch.manual_seed(5); import {module.__name__}; "
            f"print(torch.rand(1).item(), {heavy} & set(sys.modules))")
    said = subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parent, text=True,
                          check=True, capture_output=True).stdout
    first = torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert said == f"{first} set()\n"


@BOTH
def test_every_setting_is_read_by_name(module):
    unread = [x.name for x in fields(module.Args) if f"args.{x.name}" not in getsource(module)]
    assert not unread


@BOTH
def test_functions_are_short_documented_and_take_at_most_eight_arguments(module):
    assert max(map(len, getsource(module).splitlines())) <= 100
    for x in ast.walk(ast.parse(getsource(module))):
        if isinstance(x, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(x) or x.name.startswith("__"), x.name
        if isinstance(x, ast.FunctionDef):
            parameters = x.args.posonlyargs + x.args.args + x.args.kwonlyargs
            assert x.end_lineno - x.lineno < 70 and len(parameters) <= 8, x.name


def test_the_header_names_the_functions_of_an_iteration_in_the_order_of_its_loop():
    lines = ppo_rlhf.__doc__.split("this iteration:\n\n")[1].split("\n\n")[0].splitlines()
    header = [line.split()[0] for line in lines]
    [function] = ast.parse(getsource(ppo_rlhf.train_ppo)).body
    loop = next(x for x in function.body if isinstance(x, ast.For))
    calls = [(x.lineno, ast.unparse(x.func)) for x in ast.walk(loop) if isinstance(x, ast.Call)]
    assert len(header) == 8 and [x for _, x in sorted(calls) if x in header] == header


@BOTH
def test_nothing_of_this_repository_is_imported_left_to_do_or_commented_out(module):
    assert not re.search(r"^\s*(from|import) (ppo_|tests|benchmarks)", getsource(module), re.M)
    undone = r"TODO|FIXME|XXX|^\s*# (if|for|return|import|print)\b.*[:(]"
    assert not re.search(undone, getsource(module), re.M)


@BOTH
def test_the_math_takes_no_settings_and_touches_no_globals(module):
    math = getsource(module).split("\n# The PPO math")[1]
    math = re.split(r"\n# (?:=+\n# |[^\n]+ ---)", math)[0]
    assert "def gae(" in math and not re.search(r"\bargs\b|\bglobal\b|print\(|\.item\(\)", math)
