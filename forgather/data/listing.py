"""Files below a folder by glob, in order of name, without walking into what is excluded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from forgather.errors import DataError

# Who writes a config may have set the path by a parameter, and who reads the error knows that alone.
_WHERE = "the path given to the source (TextFiles, JsonLines, Parquet), a parameter such as --text-path"


def list_files(path: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The files that match; a path that is a file is that file. DataError when nothing is there or matches.

    Patterns are relative to `path`: `*` and `?` stay within a folder, `**/` is any number of folders. An excluded
    `folder/**` is not walked into, nor is a link to a folder. What matches but cannot be read is a DataError too.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}", fix=f"make it, or change {_WHERE}")
    wanted = [_regex(pattern) for pattern in include]
    unwanted = [_regex(pattern) for pattern in exclude]
    pruned = [_regex(pattern.removesuffix("/**")) for pattern in exclude if pattern.endswith("/**")]
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        relative = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not _matches(pruned, relative / name))
        for name in names:
            if _matches(wanted, relative / name) and not _matches(unwanted, relative / name):
                found.append(Path(folder) / name)
    if not found:
        raise DataError(
            f"empty corpus: no file below {path} matches include {list(include)} and not exclude {list(exclude)}; "
            f"there {_shown(path)}",
            fix=f"put files there, change {_WHERE}, or the patterns, for example include ['**/*.txt']",
        )
    for file in found:
        if not file.is_file():
            raise DataError(
                f"{file} is {'a link to nothing' if file.is_symlink() else 'no file to read'}",
                fix=f"remove it, or leave it out with `exclude: ['**/{file.name}']`",
            )
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _shown(folder: Path) -> str:
    """What a folder holds, in a few words."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "is nothing"
    return f"are {', '.join(names[:5])}" + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would silently be missing from the corpus."""
    raise DataError(
        f"cannot list {error.filename}: {error.strerror}", fix="grant access, or leave it out with `exclude`"
    ) from error


def _matches(patterns: Sequence[re.Pattern[str]], path: Path) -> bool:
    name = path.as_posix()
    return any(pattern.fullmatch(name) for pattern in patterns)


def _regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        parts.append({"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token))
    return re.compile("".join(parts))
