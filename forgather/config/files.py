"""Where things are: projects, workspaces, the standard library, and what `lib:` finds.

A project is a folder with `project.yaml`, a workspace a folder above with `workspace.yaml`. `lib:NAME` is looked up in
the folders that the project, then the workspace name, then in the standard library: `configs/lib`, then `configs`.
"""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from forgather.config.names import did_you_mean
from forgather.config.problems import Collector, Problems, problem
from forgather.config.read import read_file
from forgather.config.tree import ListValue, MappingValue, Place, Scalar, Value, shown_path

PROJECT_FILE = "project.yaml"
WORKSPACE_FILE = "workspace.yaml"
_PROJECT_KEYS = ("name", "description", "default", "configs", "library")


@cache
def shipped_configs() -> Path:
    """The folder of the configs that come with Forgather, in a checkout and in an installed wheel alike."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


class ProjectFolder(NamedTuple):
    """What `project.yaml` says. `library` holds every folder that `lib:` looks in, the standard library last."""

    dir: Path
    name: str
    description: str
    default: str | None
    configs: Path
    library: tuple[Path, ...]


class ConfigSummary(NamedTuple):
    """One row of `forgather ls`. `error` says why a config cannot be read."""

    name: str
    description: str
    path: Path
    is_default: bool
    error: str | None


def named_folder(name: str | Path) -> Path:
    """The folder that the command line names: a path, or `lib:NAME` of the shipped configs, `lib:` for all."""
    if not str(name).startswith("lib:"):
        return Path(name)
    below = str(name).removeprefix("lib:")
    inner = shipped_configs() / "lib" / below
    return inner if below and inner.is_dir() else shipped_configs() / below


def find_project(start: str | Path = ".") -> Path:
    """The nearest folder, from `start` upwards, that holds a project.yaml; `lib:NAME` is shipped. Raises Problems."""
    folder = Path(os.path.abspath(named_folder(start)))  # noqa: PTH100  (a link to a project is that project, under its own name)
    fix = "run inside a project, name one with -p DIR, or make one: forgather project new DIR"
    if not folder.exists():
        siblings = [each.name for each in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = did_you_mean(folder.name, siblings)
        raise problem(None, f"no folder {shown_path(folder)}", fix=near if near.startswith("did") else fix)
    if folder.suffix == ".yaml" and folder.name != PROJECT_FILE and folder.is_file():
        chosen = f"-p {shown_path(folder.parent)} -t {folder.stem}"
        raise problem(None, f"{shown_path(folder)} is a file, and a project is a folder", fix=f"write {chosen}")
    for each in (folder, *folder.parents):
        if (each / PROJECT_FILE).is_file():
            return each
    if str(start).startswith("lib:"):
        fix = "name one of those that `forgather ls -r -p lib:` lists"
    raise problem(None, f"no {PROJECT_FILE} in {shown_path(folder)} or any folder above", fix=fix)


def read_project(folder: Path) -> ProjectFolder:
    """The project in `folder`. Raises Problems."""
    path = folder / PROJECT_FILE
    problems = Collector()
    root = _settings(path, _PROJECT_KEYS, problems)
    library = [*_folders(root.get("library"), path, problems)]
    for above in (folder, *folder.parents):
        workspace = above / WORKSPACE_FILE
        if workspace.is_file():
            settings = _settings(workspace, ("library",), problems)
            library += _folders(settings.get("library"), workspace, problems)
            break
    library += [shipped_configs() / "lib", shipped_configs()]
    texts = {key: _text(root, key, problems) for key in ("name", "description", "default", "configs")}
    problems.raise_any()
    configs = folder / (texts["configs"] or "configs")
    name = texts["name"] or folder.name
    return ProjectFolder(folder, name, texts["description"] or "", texts["default"], configs, tuple(library))


def list_configs(project: str | Path) -> list[ConfigSummary]:
    """The selectable configs of a project, by name. A broken one is listed with its error. Raises Problems."""
    folder = read_project(Path(os.path.abspath(project)))  # noqa: PTH100
    rows = []
    for path in sorted(folder.configs.rglob("*.yaml")):
        name = path.relative_to(folder.configs).as_posix()
        description, error = "", None
        try:
            root = read_file(path)
            text = root.get("description") if isinstance(root, MappingValue) else None
            description = str(text.content) if isinstance(text, Scalar) and text.content is not None else ""
        except Problems as problems:
            error = str(problems)
        is_default = folder.default is not None and name in (folder.default, f"{folder.default}.yaml")
        rows.append(ConfigSummary(name, description, path, is_default, error))
    return rows


def config_file(project: ProjectFolder, name: str | None, place: Place | None = None) -> Path:
    """The file of the config `name`, or of the default one. Raises Problems with the nearest name."""
    known = [path.relative_to(project.configs).as_posix() for path in sorted(project.configs.rglob("*.yaml"))]
    short = [each.removesuffix(".yaml") for each in known]
    if name is None:
        name = project.default or (known[0] if len(known) == 1 else None)
        place = Place(str(project.dir / PROJECT_FILE), 1, 1) if project.default else None
    if name is None:
        fix = f"choose one with -t: {', '.join(short)}" if known else f"put a YAML file into {project.configs}"
        raise problem(place, f"the project {project.name!r} has no default config", fix=fix)
    for candidate in (name, f"{name}.yaml"):
        if candidate in known:
            return project.configs / candidate
    fix = did_you_mean(name.removesuffix(".yaml"), short, what="its configs")
    raise problem(place, f"the project {project.name!r} has no config {name!r}", fix=fix)


def find_reference(text: str, place: Place, library: Iterable[Path], *, is_project: bool = False) -> Path:
    """The file (or project folder) that `text` names where it was written: a path, or `lib:NAME`. Raises Problems."""
    candidates = list(reference_candidates(text, place, library))
    for path in candidates:
        if (path / PROJECT_FILE).is_file() if is_project else path.exists():
            return path
    what = "project" if is_project else "file"
    shown = [shown_path(path) for path in candidates]
    if is_project and any(path.is_dir() for path in candidates):
        near: str | None = f"a project is a folder with a {PROJECT_FILE}"
    else:
        near = _near_file(candidates, text)
    fix = near or f"looked for {', '.join(shown) or 'nothing: no folder of the library lies behind this file'}"
    raise problem(place, f"no {what} {text!r}", fix=fix)


def reference_candidates(text: str, place: Place, library: Iterable[Path]) -> Iterable[Path]:
    """Where `text` may lie, best first. A library file that names its own `lib:` name means the next one behind it."""
    if not text.startswith("lib:"):
        return [_normal(place.folder / text)]
    found = [_normal(folder / text.removeprefix("lib:")) for folder in library]
    return found[found.index(Path(place.file)) + 1 :] if Path(place.file) in found else found


def output_folder(project: Path) -> Path:
    """Where a project's outputs go: under it when it is writable and no part of an installation, else here."""
    return project if not is_installed(project) and os.access(project, os.W_OK) else Path.cwd()


def is_installed(project: Path) -> bool:
    """Whether the folder is part of an installed package."""
    package = Path(__file__).resolve().parent.parent
    return project.is_relative_to(package) or bool({"site-packages", "dist-packages"} & set(project.parts))


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _near_file(candidates: list[Path], text: str) -> str | None:
    for path in candidates:
        if path.parent.is_dir():
            fix = did_you_mean(path.name, [each.name for each in path.parent.iterdir()])
            if fix.startswith("did"):
                return fix
    suffixed = any(path.with_name(path.name + ".yaml").exists() for path in candidates)
    return f"write {text}.yaml" if suffixed else None


def _settings(path: Path, keys: tuple[str, ...], problems: Collector) -> MappingValue:
    root = read_file(path)
    if root is None:
        root = MappingValue({}, Place(str(path), 1, 1))
    if not isinstance(root, MappingValue) or root.tag is not None:
        raise problem(root.place, f"{path.name} must be a mapping", fix=f"its keys: {', '.join(keys)}")
    for key in root:
        if key not in keys:
            problems.add(key.place, f"unknown key {str(key)!r}", fix=did_you_mean(key, keys, what="its keys"))
    return root


def _text(root: MappingValue, key: str, problems: Collector) -> str | None:
    value = root.get(key)
    if value is None or (isinstance(value, Scalar) and value.content is None):
        return None
    if not isinstance(value, Scalar) or value.tag is not None or isinstance(value.content, bool):
        problems.add(value.place, f"{key!r} must be text")
        return None
    return str(value.content)


def _folders(value: Value | None, file: Path, problems: Collector) -> list[Path]:
    """The existing folders that a `library` key lists, relative to its file."""
    if value is None:
        return []
    items = value.items if isinstance(value, ListValue) else [value]
    folders = []
    for item in items:
        if not isinstance(item, Scalar) or not isinstance(item.content, str) or item.tag is not None:
            problems.add(item.place, "library names folders, as text")
            continue
        folder = _normal(file.parent / item.content)
        if not folder.is_dir():
            problems.add(item.place, f"no folder {shown_path(folder)}", fix="make it, or remove it from library")
        folders.append(folder)
    return folders
