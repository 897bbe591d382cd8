"""Whether an attention implementation can run where it is asked for, said before transformers or a compiler fails."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from forgather.errors import ModelError

FLASH_DTYPES = (torch.bfloat16, torch.float16)
# Those that our pages name; transformers knows more, and others can be given to it.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def attention_names() -> set[str]:
    """The implementations that transformers knows now."""
    return {*ATTENTIONS, *ALL_ATTENTION_FUNCTIONS.valid_keys()}


def require_construction(implementation: str | None) -> None:
    """Raise ModelError unless a model can be made with this implementation on this machine; None is the model's own."""
    if implementation != "flash_attention_2":
        return
    if not torch.cuda.is_available():
        raise ModelError(
            "flash_attention_2 needs a CUDA GPU, and torch sees none on this machine",
            fix="choose --attn-implementation sdpa, which uses a flash kernel of torch's own where there is one",
        )
    if not is_flash_attn_2_available():
        raise ModelError(
            "flash_attention_2 needs the library flash_attn (2.3.3 or later), which is not installed",
            fix="pip install flash-attn --no-build-isolation, or choose --attn-implementation sdpa",
        )


def require_training(implementation: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError unless forward and backward with this implementation work on `device` in `dtype`."""
    require_construction(implementation)
    if implementation == "flex_attention" and device.type == "cpu":
        raise ModelError(
            "flex_attention has no backward on a CPU: torch compiles its forward only",
            fix="add --device cuda, or choose --attn-implementation sdpa",
        )
    if implementation in ("flex_attention", "flash_attention_2") and device.type == "meta":
        raise ModelError(
            f"{implementation} is compiled for a device, and the meta device computes nothing",
            fix="add --device cuda, or choose --attn-implementation sdpa: the shapes are the same",
        )
    if implementation == "flash_attention_2" and device.type != "cuda":
        raise ModelError(f"flash_attention_2 runs on CUDA, not on {device.type}", fix="add --device cuda")
    if implementation == "flash_attention_2" and dtype not in FLASH_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"flash_attention_2 computes in bfloat16 or float16, and the model is in {name}", fix="add --dtype bfloat16"
        )
