"""The JSON files beside weights, each of which holds a mapping."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgather.errors import CheckpointError


def read_mapping(path: Path) -> dict[str, Any]:
    """What the file holds; CheckpointError when it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="bring back the file, or fetch it anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no mapping", fix="bring back the file, or fetch it anew")
    return content


def write_mapping(path: Path, content: Mapping[str, Any]) -> None:
    """Write it as transformers does, for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
