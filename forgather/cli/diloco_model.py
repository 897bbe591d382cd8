"""The model that a DiLoCo server begins with: its parameters in fp32, wherever they come from.

This is where conversion and DiLoCo meet: neither package knows the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from forgather.cli.options import Options
from forgather.cli.parser import UsageError
from forgather.cli.terminal import print_warning
from forgather.conversion.model_folder import ModelFolder, tokenizer_in
from forgather.conversion.weight_sources import HUGGING_FACE_FILES
from forgather.conversion.weights_in import load_weights
from forgather.data.tokenizers import tokenizer_digest
from forgather.diloco.package_service import package_digest
from forgather.errors import ConfigError, ForgatherError, ModelError
from forgather.models.initialize import initialize
from forgather.models.names import plain_name


@dataclass(frozen=True)
class ServedModel:
    """A model that is known and has no values yet."""

    path: Path  # where its weights are; that of its package where they are to be drawn
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


def served_model(path: Path, weights: Path | None = None) -> ServedModel:
    """The model in `path`: a package, a run, a checkpoint or a Hugging Face folder; its weights may be elsewhere."""
    try:
        folder = ModelFolder(path)
        model = folder.construct("meta", dtype=torch.float32)
        tokenizer = tokenizer_in(path)
    except (OSError, ImportError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"no model can be made of {path}: {error}",
            fix="name a folder that `forgather model construct` has written, a run, or a Hugging Face folder",
        ) from error
    return ServedModel(
        path if weights is None else weights,
        folder,
        {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()},
        package_digest(folder.dir),
        None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def model_of_folder(folder: Path, options: Options) -> ServedModel:
    """The model that was served from `folder` before. ConfigError where -m, or the config, is of another."""
    digest = _digest_of_config(options) if options.model is None else _digest_of_model(Path(options.model))
    if digest is not None and digest != package_digest(ModelFolder(folder).dir):
        raise ConfigError(
            f"the model in {folder}, made before, is not that of {_source(options)}",
            fix=f"-o ANOTHER begins with that one; started without {_source(options)}, the server goes on with its own",
        )
    return served_model(folder)


def passed_over(options: Options) -> list[str]:
    """What was given that makes first values, which a folder that has values does not look at."""
    return [
        *([_source(options)] if options.model is not None or _names_config(options) else []),
        *([f"--seed {options.seed}"] if options.seed is not None else []),
    ]


def _source(options: Options) -> str:
    return f"-m {options.model}" if options.model is not None else "the config that is given"


def _names_config(options: Options) -> bool:
    """Whether the command line says which, and does not just stand in a project's folder."""
    return bool(options.overrides) or options.project_dir != "." or options.config_name is not None


def _digest_of_model(path: Path) -> str | None:
    """Of a model by its path; None where there is none any more."""
    try:
        return package_digest(ModelFolder(path).dir)
    except ForgatherError as error:
        print_warning(f"{path} cannot be compared with the model that is served: {error.message}")
        return None


def _digest_of_config(options: Options) -> str | None:
    """Of the model package that the config makes; None where none is named, or it makes none any more."""
    if not _names_config(options):
        return None
    try:
        source = options.project.build("package")
        return package_digest(source.dir) if isinstance(source, ModelFolder) else str(source.digest)
    except ForgatherError as error:
        # A server goes on whatever has become of what it began with: nothing but its folder is needed.
        print_warning(f"the config that is given cannot be compared with the model that is served: {error.message}")
        return None


def model_of_config(options: Options) -> ServedModel:
    """The model that the selected config trains, with the weights that it begins with."""
    project_dir = Path(options.project_dir)
    if options.project_dir == "." and options.config_name is None and not (project_dir / "project.yaml").exists():
        raise UsageError(
            "the server is not told which model",
            fix="-m PATH: a package, a run or a Hugging Face folder; or -p and -t as the workers have them",
        )
    project = options.project
    if not project.has("package"):
        raise ConfigError(
            f"config {project.config_name!r} of {project.dir} describes no model package", fix="name one with -m PATH"
        )
    source = project.build("package")
    begins_with = project.build("init_from_weights").path if project.has("init_from_weights") else None
    if begins_with is None and isinstance(source, ModelFolder):
        return served_model(source.path)
    return served_model(source.write(), begins_with)
