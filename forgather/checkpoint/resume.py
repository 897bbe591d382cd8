"""What changed between a checkpoint and the run that continues it, in words."""

from collections.abc import Mapping
from typing import Any

import yaml

from forgather.checkpoint.loading import Checkpoint
from forgather.checkpoint.manifest import Manifest


def changes(checkpoint: Checkpoint, *, config: str, world_size: int, mesh: Mapping[str, int]) -> list[str]:
    """One line for each change: configuration keys as `key: old -> new`, ranks, mesh, versions. Today's values win."""
    return _changes(checkpoint, config, Manifest(checkpoint.step, world_size, mesh))


def differences(left: Checkpoint, right: Checkpoint) -> list[str]:
    """The same for two checkpoints, from the first to the second."""
    return _changes(left, right.config, right.manifest)


def _changes(before: Checkpoint, config: str | None, after: Manifest) -> list[str]:
    lines = []
    saved = before.manifest
    if before.config is not None and config is not None:
        lines += changed_keys(before.config, config)
    if saved.world_size != after.world_size:
        lines.append(f"ranks: {saved.world_size} -> {after.world_size}")
    if _mesh(saved.mesh) != _mesh(after.mesh):
        lines.append(f"mesh: {_mesh(saved.mesh)} -> {_mesh(after.mesh)}")
    for name, version in after.versions.items():
        if saved.versions.get(name) != version:
            lines.append(f"version of {name}: {saved.versions.get(name, 'unknown')} -> {version}")
    return lines


def changed_keys(old: str, new: str) -> list[str]:
    """`key.path: old -> new` for each value that differs between two resolved configurations.

    An argument stands in every place that it reaches, so keys that changed in the same way share a line.
    """
    before, after = _flat(old), _flat(new)
    keys: dict[str, list[str]] = {}  # by what happened to them
    for key in [*after, *(key for key in before if key not in after)]:
        if key not in before:
            keys.setdefault(f"added, {after[key]}", []).append(key)
        elif key not in after:
            keys.setdefault(f"removed, was {before[key]}", []).append(key)
        elif before[key] != after[key]:
            keys.setdefault(f"{before[key]} -> {after[key]}", []).append(key)
    return [f"{', '.join(changed)}: {change}" for change, changed in keys.items()]


class _AnyTag(yaml.SafeLoader):
    """Reads a configuration as a document: constructs nothing, keeps a tag as a value beside what it tags."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {"": f"!{suffix}", **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return {"": f"!{suffix}", "items": loader.construct_sequence(node, deep=True)}
    return f"!{suffix} {node.value}"


_AnyTag.add_multi_constructor("!", _tagged)


def _flat(text: str) -> dict[str, str]:
    flat: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, part in value.items():
                visit(part, f"{path}.{key}" if path and str(key) else f"{path}{key}")
        elif isinstance(value, list) and value:
            for number, part in enumerate(value):
                visit(part, f"{path}[{number}]")
        else:
            flat[path] = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()

    visit(yaml.load(text, Loader=_AnyTag), "")
    return flat


def _mesh(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
