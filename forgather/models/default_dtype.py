"""The dtype that new parameters have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors are `dtype`, and so are the models of `from_config`, unless told otherwise.

    transformers would go by the config, which names a dtype once its model was saved. TypeError when `dtype` is no
    floating-point dtype. In force for all threads until it ends.
    """
    before, from_config = torch.get_default_dtype(), vars(PreTrainedModel)["_from_config"]

    def in_dtype(cls: type[PreTrainedModel], /, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", dtype)
        return from_config.__func__(cls, config, **kwargs)

    torch.set_default_dtype(dtype)
    PreTrainedModel._from_config = classmethod(in_dtype)
    try:
        yield
    finally:
        PreTrainedModel._from_config = from_config
        torch.set_default_dtype(before)
