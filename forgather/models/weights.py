"""Puts a model's weights beside the code that loads them."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

WEIGHTS = "model*.safetensors*"  # the files of save_pretrained: one or several shards, and their index


def save_weights(model: PreTrainedModel, package: Path) -> list[Path]:
    """Write safetensors into a model package, over the weights that it may hold; a tied weight is written once.

    They are written aside and renamed, the index last, and what is left of older weights goes after that.
    """
    with tempfile.TemporaryDirectory(dir=package, prefix=".weights-") as folder:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        model.save_pretrained(folder)
        if shown:
            logging.enable_progress_bar()
        written = sorted(Path(folder).glob(WEIGHTS), key=lambda path: (path.suffix == ".json", path.name))
        saved = [path.replace(package / path.name) for path in written]
    for path in package.glob(WEIGHTS):
        if path not in saved:
            path.unlink()
    return saved
