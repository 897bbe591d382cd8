"""flex_attention without a compiler and, which torch refuses on a CPU, with gradients."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as integration


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and masks are then computed by the functions that a kernel would be made of."""
    create_block_mask = masking_utils.create_block_mask

    def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow so, and what torch says to itself on the way
            return function(*args, **kwargs)

    def uncompiled_mask(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return quietly(create_block_mask, *args, **kwargs)

    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_mask)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)

    def attend(*args: Any, **kwargs: Any) -> Any:
        # Only traced does it give gradients to what scores are computed with; without gradients it need not be.
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", not torch.is_grad_enabled())
        return quietly(flex_attention.flex_attention, *args, **kwargs)

    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: attend)
