"""Compiled blocks against plain ones, over whole steps; how often they are compiled; and without a
compiler.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cola_train.config.settings import UserError
from cola_train.training.parallel.blocks import check_compiler
from tests.helpers.programs import ROOT

CASES = ["joint-none", "joint-full", "joint-selective", "llada-none"]


def test_compiled_steps_equal_plain_ones_and_each_kind_of_block_compiles_once() -> None:
    program = [sys.executable, "-m", "tests.training.parallel.compiled_steps", *CASES]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, found in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["loss"] < 1e-5, case
        assert found["gradients"] < 1e-4, case
        first, later = found["graphs"]
        # At most: encoder, decoder and reference encoder; the DiT's blocks and its last.
        assert 0 < first == later <= 5, case
        assert found["breaks"] == 0, case


def test_without_a_compiler_the_run_says_so_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError,
        match=r"trainer\.compile=true needs a C\+\+ compiler on a CPU, and there is no g\+\+",
    ):
        check_compiler(True, on_gpu=False)
    check_compiler(True, on_gpu=True)
    check_compiler(False, on_gpu=False)
