"""The model that a DiLoCo server begins with: its parameters in fp32, wherever they come from.

This is where conversion and DiLoCo meet: neither package knows the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from forgather.cli.terminal import print_warning
from forgather.conversion.model_folder import ModelFolder, tokenizer_in
from forgather.conversion.weight_sources import HUGGING_FACE_FILES
from forgather.conversion.weights_in import load_weights
from forgather.data.tokenizers import tokenizer_digest
from forgather.diloco.package_service import package_digest
from forgather.errors import ForgatherError, ModelError
from forgather.models.initialize import initialize
from forgather.models.names import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ServedModel:
    """A model that is known and has no values yet."""

    path: Path
    folder: ModelFolder
    shapes: Mapping[str, tuple[int, ...]]  # of its parameters, each under the name that it has first
    package_digest: str
    tokenizer_digest: str | None

    @property
    def is_drawn(self) -> bool:
        """Whether it has no weights of its own, and begins with those that its rules draw."""
        is_package = self.path.is_dir() and (self.path / "config.json").is_file()
        return is_package and not any((self.path / name).is_file() for name in HUGGING_FACE_FILES)

    def first_values(self, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Parameters by name, and buffers that are saved; what is drawn is as a plain run with `seed` draws it."""
        model = self.folder.construct("meta", dtype=torch.float32)
        if self.is_drawn:
            model.to_empty(device="cpu")
            initialize(model, self.folder.init_rules, seed)
        else:
            report = load_weights(model, self.path, strict=True, device="cpu")
            if (warning := report.warning()) is not None:
                print_warning(warning)
        values = {plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        buffers = {
            plain_name(name): tensor.detach() for name, tensor in model.state_dict().items() if name not in parameters
        }
        broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise ModelError(
                f"{self.path} has values that are not finite in {', '.join(broken[:4])}", fix="name another checkpoint"
            )
        return values, buffers


def served_model(path: Path) -> ServedModel:
    """The model in `path`: a package, a run, a checkpoint or a Hugging Face folder; an error that names the flag."""
    try:
        folder = ModelFolder(path)
        model = _on_meta(folder)
        tokenizer = tokenizer_in(path)
    except ForgatherError as error:
        raise type(error)(f"--model: {error.message}", fix=error.fix) from error
    except (OSError, ImportError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"--model: no model can be made of {path}: {error}",
            fix="name a folder that `forgather model construct` has written, a run, or a Hugging Face folder",
        ) from error
    return ServedModel(
        path,
        folder,
        {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()},
        package_digest(folder.dir),
        None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def _on_meta(folder: ModelFolder) -> "PreTrainedModel":
    return folder.construct("meta", dtype=torch.float32)
