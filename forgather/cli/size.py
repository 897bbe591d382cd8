"""The number of parameters that the model of a config has; the one part of `forgather ls` that imports torch."""

import tempfile
from pathlib import Path

from forgather.config.project import Project
from forgather.models.report import count_parameters

_KIND = ("hf_config", "tokenizer", "package")


def num_parameters(project: Project) -> int | None:
    """Parameters of the model that the config composes, shared ones counted once; None if it composes none.

    The model is constructed on the meta device from a package of its own, aside: the project's is left as it is.
    """
    if not all(project.has(target) for target in _KIND):
        return None
    package = project.build("package")
    with tempfile.TemporaryDirectory() as folder:
        package.dir = Path(folder) / "model"
        return count_parameters(package.construct("meta")).total
