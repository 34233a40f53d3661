"""One thread, no path that somebody chose or measured on this machine, and fixtures; builders lie in pipelines.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline

# Tensors this small gain nothing from a second thread, and lose much where its core is taken: two processes test.
THREADS = os.environ.get("ACCUQUANT_TEST_THREADS", "1")  # tools/test_matrix.py tests with more, which add otherwise
torch.set_num_threads(int(THREADS))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = THREADS  # for programs that tests start
os.environ["ACCUQUANT_CACHE"] = "/nonexistent"  # what somebody had measured on this machine
os.environ.pop("ACCUQUANT_PATH", None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random-dit"
    make_pipeline().save_pretrained(folder)
    return folder
