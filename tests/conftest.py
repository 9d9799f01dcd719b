"""Deterministic mode for every test: uninitialised memory is NaN, so a forgotten write shows."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# waiting threads sleep: spinning ones make a busy machine several times slower for all
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
