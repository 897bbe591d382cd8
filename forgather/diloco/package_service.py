"""A server's model package and tokenizer on their way to a worker: one tar, its digest, and how it is put in place.

A package holds Python, and whoever loads its model runs that. So a worker that takes one from a server must say that it
trusts the server (`trust_code`); a package without code, as stock Hugging Face folders are, is data and needs no trust.
Two workers are of one model when `package_digest` of their folders is equal.
"""

import hashlib
import http.client
import io
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from forgather.diloco.address import ServerAddress
from forgather.diloco.frame import ProtocolError
from forgather.diloco.security import SecurityError
from forgather.durable import appearing
from forgather.errors import DistributedError, ModelError

DIGEST_HEADER = "X-Package-Digest"
MAX_BYTES = 256 << 20  # the largest tokenizers have some 40 MB
_MAX_FILES = 4096
_MANIFEST = "forgather_package.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
# What transformers writes anew on every save, and what says nothing of the model.
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


class PackageArchive:
    """The package in `folder` as the bytes that `GET /v1/package` answers: the same for the same files."""

    def __init__(self, folder: Path) -> None:
        self.content = pack(_files(folder))
        self.digest = _hash(self.content)


def pack(files: Iterable[Path]) -> bytes:
    """A tar of these files under their own names, without times and owners."""
    packed = io.BytesIO()
    # As much as PAX needs for names, and no more: the header of a file is then a function of its name and size.
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(files, key=lambda each: each.name):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if len(packed.getvalue()) > MAX_BYTES:
        raise ModelError(
            f"the package has {len(packed.getvalue()):,} bytes without its weights; the most is {MAX_BYTES:,}",
            fix="take out of its folder what is not the model's",
        )
    return packed.getvalue()


def stage(content: bytes, digest: str, parent: Path, *, trust_code: bool, expected: str | None = None) -> Path:
    """Put the package in `content` into a folder of `parent` and return it; it is whole or not there.

    The folder is named by `digest`, which the content must have, so that another package gets another folder and one
    that is there is kept. SecurityError where it holds Python and `trust_code` is false; ProtocolError where what came
    is no package, would be written elsewhere, or is not the one `expected` (the server's `settings.package`).
    """
    if _hash(content) != digest:
        raise ProtocolError("the package was damaged on its way: its digest is another", fix="ask for it again")
    files = _unpack(content)
    code = sorted(name for name in files if name.endswith(".py"))
    if code and not trust_code:
        raise SecurityError(
            f"the server's package holds code that loading the model would run: {', '.join(code[:4])}",
            fix="if you trust the server and whoever can reach it, say --trust-server-code; "
            "or make the package here, from the same config",
        )
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"package-{digest[:16]}"
    with FileLock(parent / f".{folder.name}.lock"):  # ranks of one host stage at once
        if not (folder.is_dir() and _hash(pack(_files(folder))) == digest):
            if folder.exists():
                raise DistributedError(f"{folder} was changed since it came", fix="remove it; it is fetched again")
            with appearing(folder) as aside:
                for name, data in files.items():
                    (aside / name).write_bytes(data)
    if expected is not None and package_digest(folder) != expected:
        raise ProtocolError("the server's package is not the one that its settings name", fix="restart the server")
    return folder


def fetch(address: ServerAddress, parent: Path, *, trust_code: bool, timeout_s: float = 60.0) -> Path:
    """Ask the server for its package, and stage it in `parent`; see `stage`."""
    expected = address.ask("GET", "/v1/settings").get("package")
    connection = address.connection(timeout_s)
    try:
        connection.request("GET", "/v1/package", headers=address.headers)
        answer = connection.getresponse()
        content = answer.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise address.unreachable(error) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise address.refused(answer.status, content)
    return stage(content, answer.headers.get(DIGEST_HEADER, ""), parent, trust_code=trust_code, expected=expected)


def package_digest(folder: Path) -> str:
    """Names the model that the package in `folder` defines; for one that Forgather has made it is `Package.digest`.

    Of what Forgather has generated every file counts, as it is now; of another folder its code and its config.json,
    without what transformers changes by itself.
    """
    try:
        manifest = folder / _MANIFEST
        if manifest.exists():
            names = sorted(json.loads(manifest.read_text(encoding="utf-8"))["files"])
            hashes = {name: _hash((folder / name).read_bytes()) for name in names if _NAME.fullmatch(name)}
        else:
            hashes = {path.name: _hash(path.read_bytes()) for path in sorted(folder.glob("*.py"))}
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            deciding = {key: value for key, value in config.items() if key not in _INCIDENTAL}
            hashes["config.json"] = _hash(json.dumps(deciding, sort_keys=True).encode())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} is no model package: {error}", fix="name a folder that `forgather model construct` has written"
        ) from error
    return _hash("\n".join(f"{name} {digest}" for name, digest in sorted(hashes.items())).encode())


def _files(folder: Path) -> list[Path]:
    """The package's own files: not hidden, no weights, no folders such as its runs."""
    found = [
        path
        for path in folder.iterdir()
        if path.is_file() and _NAME.fullmatch(path.name) and not path.name.endswith(_WEIGHTS)
    ]
    if not any(path.name == "config.json" for path in found):
        raise ModelError(f"{folder} has no config.json", fix="name a model package or a Hugging Face folder")
    return sorted(found)


def _unpack(content: bytes) -> dict[str, bytes]:
    """The files by name. Nothing is extracted by tarfile: a tar can name any place, and links to any."""
    if len(content) > MAX_BYTES:
        raise ProtocolError(f"a package of {len(content):,} bytes; the most is {MAX_BYTES:,}", status=413)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                if not member.isreg() or not _NAME.fullmatch(member.name) or member.name in files:
                    raise ProtocolError(
                        f"a package must be plain files in one folder, and this has {member.name[:60]!r}"
                    )
                opened = archive.extractfile(member)
                assert opened is not None, "it is a regular file"
                data = opened.read()
                if len(data) != member.size or len(files) >= _MAX_FILES:
                    raise ProtocolError("the package ends too early, or has too many files")
                files[member.name] = data
    except tarfile.TarError as error:
        raise ProtocolError(f"the package is no tar: {error}") from None
    if "config.json" not in files:
        raise ProtocolError("the package has no config.json")
    return files


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
