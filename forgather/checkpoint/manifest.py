"""What a checkpoint is made of, so that damage shows before anything is loaded.

`manifest.json` stands in every checkpoint folder. It lists each file with its size and xxh3 digest, and is itself
digested. A digest is needed because nothing below us checks one: the file system returns what the disk returns, and
`torch.load` never compares the checksums that it writes.
"""

import errno
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

import forgather
from forgather.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 4 << 20


class ManifestError(CheckpointError):
    """The manifest of a checkpoint cannot be used; `line` says why and names the file alone, for lists of damage."""

    def __init__(self, folder: Path, why: str, fix: str | None = None) -> None:
        super().__init__(f"{folder / MANIFEST} {why}", fix=fix or "bring that file back, or use another checkpoint")
        self.line = f"{MANIFEST} {why}"


class OtherFormatError(ManifestError):
    """Another version of Forgather wrote the checkpoint; nothing says that it is damaged."""

    def __init__(self, folder: Path, format: object) -> None:
        why = f"has format {format}, and this version of Forgather reads format {FORMAT}"
        super().__init__(folder, why, fix="use the version that wrote it, which stands there under `versions`")


class UnreadableError(CheckpointError):
    """The system did not let us read a file of a checkpoint; nothing says that it is damaged. `line` as above."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be read now: {error.strerror or error}; nothing says that it is damaged",
            fix=_FIX_OF.get(error.errno or 0, "see to the disk or the network that it is on, and start again"),
        )
        self.line = f"{path.name} cannot be read now: {error.strerror or error}"


# What says something of the file: it is not there, something else is in its place, or the disk has lost its bytes.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)}
_FIX_OF = {
    errno.EACCES: "let the user that trains read it (chmod, chown)",
    errno.EPERM: "let the user that trains read it (chmod, chown)",
    errno.EMFILE: "let the process open more files (ulimit -n), and start again",
    errno.ENFILE: "let the machine open more files (sysctl fs.file-max), and start again",
}


def require_damage(path: Path, error: OSError) -> None:
    """Raise UnreadableError unless `error`, met in reading `path`, says that the file itself is not what it was.

    A run that took every refusal for damage would go back to an older checkpoint, and set this one aside, because a
    server was away for a moment.
    """
    if error.errno not in _DAMAGE:
        raise UnreadableError(path, error) from error


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3 digest of one file."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Step, where it was saved, and every file.

    `mesh` maps the mesh's axes to their sizes; `metrics` are those of the evaluation at this step, if there was one.
    """

    step: int
    world_size: int
    mesh: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    saved_at: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))

    @property
    def size(self) -> int:
        """Bytes of all files that it lists."""
        return sum(record.size for record in self.files.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        content = {
            "format": FORMAT,
            "step": self.step,
            "saved_at": self.saved_at,
            "metrics": dict(self.metrics),
            "world_size": self.world_size,
            "mesh": dict(self.mesh),
            "versions": dict(self.versions),
            "files": {name: {"size": file.size, "xxh3": file.xxh3} for name, file in sorted(self.files.items())},
        }
        content["digest"] = _digest_of(content)
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in `folder`; ManifestError when it is missing or altered.

        Two errors tell of no damage: OtherFormatError of another version, UnreadableError of a passing refusal.
        """
        try:
            content = json.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise ManifestError(folder, "is missing") from None
        except OSError as error:
            require_damage(folder / MANIFEST, error)
            raise ManifestError(folder, f"cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ManifestError(folder, "is no JSON") from error
        if not isinstance(content, dict) or "digest" not in content:
            raise ManifestError(folder, "is not a manifest: it has no digest of its own")
        digest = content.pop("digest")
        if content.get("format") != FORMAT:  # before the digest, whose making may be another there
            raise OtherFormatError(folder, content.get("format"))
        if digest != _digest_of(content):
            raise ManifestError(folder, "was altered: it does not match its own digest")
        try:
            return cls(
                step=content["step"],
                world_size=content["world_size"],
                mesh=content["mesh"],
                versions=content["versions"],
                files={name: FileRecord(**record) for name, record in content["files"].items()},
                metrics=content.get("metrics", {}),
                saved_at=content.get("saved_at", "unknown"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ManifestError(folder, "is not a manifest: it lacks what each has") from error

    def damaged_sizes(self, folder: Path) -> list[str]:
        """One line for each file that is missing or has another size, or for a folder that is gone; reads no file.

        UnreadableError when the system does not tell.
        """
        damage = []
        missing: dict[str, list[str]] = {}
        for name, record in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except FileNotFoundError:
                missing.setdefault(name.rpartition("/")[0], []).append(name)
                continue
            except OSError as error:
                require_damage(folder / name, error)
                damage.append(f"{name}: {error.strerror}")
                continue
            if size != record.size:
                damage.append(f"{name}: {size:,} bytes instead of {record.size:,}")
        for inner, names in missing.items():
            if inner and not (folder / inner).exists():
                damage.append(f"{inner}/: missing, with its {len(names)} files")
            else:
                damage += [f"{name}: missing" for name in names]
        return damage

    def damaged_digests(self, folder: Path, names: Iterable[str]) -> list[str]:
        """One line for each of `names` whose bytes are not those that were saved; reads them whole.

        UnreadableError when the system does not let them be read.
        """
        damage = []
        for name in names:
            try:
                record = record_of(folder / name)
            except OSError as error:
                require_damage(folder / name, error)
                damage.append(f"{name}: {error.strerror}")
                continue
            if record != self.files[name]:
                damage.append(
                    f"{name}: other bytes than were saved (xxh3 {record.xxh3}, saved {self.files[name].xxh3})"
                )
        return damage


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file, read in blocks."""
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1)))  # most files are small
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def versions() -> dict[str, str]:
    """Versions of what decides how a run goes on."""
    return {
        "forgather": forgather.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _digest_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
