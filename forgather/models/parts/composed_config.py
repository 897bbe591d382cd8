"""The config of a composed model, which takes the model's code along when it is saved."""

import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


class ComposedConfig(PreTrainedConfig):
    """A config whose class stands in one file with that of its model."""

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers wants a plain list

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As of any transformers config; the code is copied beside it, unless it stands there already.

        transformers would copy each file onto itself then, which is an error.
        """
        code = sys.modules[type(self).__module__].__file__
        if code is not None and Path(code).resolve().parent == Path(save_directory).resolve():
            self._auto_class = None  # of this object alone, and until it is saved
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__dict__.pop("_auto_class", None)
