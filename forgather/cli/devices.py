"""What `--device` and `--dtype` name; torch is imported when they are looked up."""

from typing import TYPE_CHECKING

from forgather.errors import ModelError

if TYPE_CHECKING:
    import torch

# Names that everybody uses and torch has not; and what of torch's a model can be made of.
SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
USABLE = ("float32", "float", "float64", "double", "float16", "half", "bfloat16", *SHORT)


def device_named(name: str) -> "torch.device":
    """`meta`, `cpu`, `cuda`, `cuda:1`; ModelError when there is none such on this machine."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device: unknown device {name!r}", fix="meta, cpu, cuda or cuda:0") from error
    if device.type not in ("meta", "cpu"):
        kind = getattr(torch, device.type, None)  # torch.cuda, torch.mps: a module for each kind that this torch knows
        if kind is None or not kind.is_available():
            raise ModelError(
                f"--device: this machine has no {device.type.upper()} device that torch can use", fix="--device cpu"
            )
        if (device.index or 0) >= kind.device_count():
            raise ModelError(
                f"--device: there is no {device}; {device.type} devices here: {kind.device_count()}",
                fix=f"--device {device.type}",
            )
    return device


def dtype_named(name: str) -> "torch.dtype":
    """A floating-point type of at least two bytes by torch's name or a usual short one; ModelError for any other."""
    import torch

    plain = name.removeprefix("torch.")
    dtype = getattr(torch, SHORT.get(plain, plain), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"--dtype: unknown dtype {name!r}", fix=f"one of: {', '.join(USABLE)}")
    if plain not in USABLE:
        raise ModelError(
            f"--dtype: parameters cannot be {plain}: torch multiplies and differentiates no such matrices",
            fix=f"one of: {', '.join(USABLE)}",
        )
    return dtype
