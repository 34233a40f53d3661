"""Triton's kernels where there is no GPU: computed by its interpreter, and compiled for devices that are not there.

Each in a process of its own: the interpreter's switch is set before Triton is imported, and cannot be taken back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `cuda`)")
WITHOUT_INTERPRETER = ("3.5", "3.6")  # theirs takes no loop bound that is an argument from today's NumPy


def run_file(name: str, **environment: str) -> None:
    """Its tests, with these variables, and without the interpreter's unless it is among them."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    if version("triton").startswith(WITHOUT_INTERPRETER):
        pytest.skip("this Triton's interpreter does not run with today's NumPy")
    run_file("triton_checks.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_cuda_devices(tmp_path: Path) -> None:
    run_file("triton_targets.py", TRITON_CACHE_DIR=str(tmp_path))
