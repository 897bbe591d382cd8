"""Weights of a model in and out of a folder that Hugging Face reads too.

load_checkpoint(model_path, model, device=device)
save_checkpoint(model_path, model)
"""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from forgather.conversion.shards import MAX_SHARD_BYTES
from forgather.conversion.weights_in import LoadReport, load_weights
from forgather.conversion.weights_out import save_weights


def load_checkpoint(
    model_path: str | os.PathLike[str],
    model: nn.Module,
    device: str | torch.device | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load the weights in `model_path` into `model`, which is on `device` afterwards where that is given.

    `model_path` is whatever `load_weights` reads. What the checkpoint lacks is an error, and a warning where not
    `strict`; what it holds beyond the model is ignored and stands in the report.
    """
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    if device is not None and not on_meta:
        model.to(device)
    report = load_weights(model, Path(model_path), strict=strict, device=device)
    if report.missing and (warning := report.warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    return report


def save_checkpoint(
    model_path: str | os.PathLike[str],
    model: nn.Module,
    *,
    safetensors: bool = True,
    max_shard_size: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Save the weights of `model` into `model_path`, over those there; see `save_weights`. Returns the files."""
    return save_weights(model, Path(model_path), max_shard_bytes=max_shard_size, safetensors=safetensors)
