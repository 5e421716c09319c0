"""Shared by all tests: the repository on the path, no network, a fixed seed, and every device this machine has."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1",
                  OMP_NUM_THREADS="1")  # models this small are no faster by two, and wait for one that has no core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

import pytest
import torch
from lab import Lab, write_rows

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The folder of the tiny data."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder)
    return folder


@pytest.fixture
def one_thread():
    """What a run sets for the whole process is put back."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def lab(data, tmp_path, one_thread) -> Callable[[str], Lab]:
    return lambda name="run": Lab(data, tmp_path / name)
