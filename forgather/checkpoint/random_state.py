"""The generators of random numbers of one rank: Python's, NumPy's, torch's, and its device's.

Each rank has its own. A resume on the same number of ranks continues every stream at the very number it had come to. On
another number there is no such thing as the same streams: every rank then starts new ones, seeded from rank 0's saved
state, the rank and the number of ranks, so that they differ from each other and are the same at every such resume.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from forgather.checkpoint.storage import raw_bytes


def capture_random(device: torch.device) -> dict[str, Any]:
    """The state of this rank's generators, as plain values and CPU tensors."""
    version, words, next_gauss = random.getstate()
    mersenne: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "next_gauss": next_gauss},
        "numpy": {
            "words": torch.from_numpy(mersenne["state"]["key"].astype(np.int64)),
            "position": int(mersenne["state"]["pos"]),
            "has_gauss": int(mersenne["has_gauss"]),
            "gauss": float(mersenne["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue where `capture_random` was called."""
    python, mersenne = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["next_gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": mersenne["words"].numpy().astype(np.uint32), "pos": mersenne["position"]},
            "has_gauss": mersenne["has_gauss"],
            "gauss": mersenne["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    # A run that moves from a CPU to another device finds no state for it; its stream then starts from torch's seed.
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def reseed_random(state_of_rank_0: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Start new streams on a number of ranks that has no saved ones."""
    digest = xxhash.xxh3_64(raw_bytes(state_of_rank_0["torch"]))
    digest.update(f"{rank} of {world_size}".encode())
    seed = digest.intdigest()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)  # also the devices' generators
