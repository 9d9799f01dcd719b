"""Random numbers of a run: one seed for each stage, and torch's generators in a checkpoint."""

import hashlib

import torch
from torch import Tensor


def seed_of_stage(seed: int, stage: int) -> int:
    """Return a seed of 63 bits; stages and neighbouring seeds share no stream."""
    digest = hashlib.sha256(f"{seed}:{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def get_rng() -> dict[str, Tensor]:
    """Return the states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
