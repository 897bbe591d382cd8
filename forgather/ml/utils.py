"""`with default_dtype(torch.bfloat16):` constructs models with such parameters."""

from forgather.models.default_dtype import default_dtype

__all__ = ["default_dtype"]
