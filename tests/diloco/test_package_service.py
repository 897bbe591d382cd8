"""A worker gets a package whole or not at all, nothing of it elsewhere, and no code that it did not ask for."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from forgather.diloco.frame import ProtocolError
from forgather.diloco.package_service import PackageArchive, package_digest, stage
from forgather.diloco.security import SecurityError
from forgather.errors import DistributedError, ForgatherError, ModelError

FILES = {"config.json": b'{"hidden_size": 8}', "tokenizer.json": b"{}", "modeling.py": b"print('loaded')\n"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A package with what stands beside one: weights, runs, hidden files."""
    folder = tmp_path / "model"
    (folder / "runs").mkdir(parents=True)
    for name, content in {**FILES, "model.safetensors": b"w", ".lock": b""}.items():
        (folder / name).write_bytes(content)
    return folder


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> tuple[bytes, str]:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as opened:
        for member, content in members:
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return packed.getvalue(), hashlib.sha256(packed.getvalue()).hexdigest()


CONFIG = (tarfile.TarInfo("config.json"), b"{}")


def test_what_arrives_is_the_package_and_nothing_else(folder, tmp_path):
    sent = PackageArchive(folder)
    staged = stage(sent.content, sent.digest, tmp_path / "worker", trust_code=True, expected=package_digest(folder))
    assert {path.name: path.read_bytes() for path in staged.iterdir()} == FILES
    assert package_digest(staged) == package_digest(folder)


def test_the_digest_is_of_the_content_alone(folder):
    first = PackageArchive(folder)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    (folder / "config.json").chmod(0o600)
    (folder / "model.safetensors").write_bytes(b"other")
    assert PackageArchive(folder).digest == first.digest
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert PackageArchive(folder).digest != first.digest


def test_code_comes_only_to_those_who_ask_for_it(folder, tmp_path):
    sent = PackageArchive(folder)
    with pytest.raises(SecurityError, match=r"holds code.*modeling\.py") as caught:
        stage(sent.content, sent.digest, tmp_path / "worker", trust_code=False)
    assert "--trust-server-code" in str(caught.value.fix)
    assert not (tmp_path / "worker").exists()
    (folder / "modeling.py").unlink()
    sent = PackageArchive(folder)
    assert stage(sent.content, sent.digest, tmp_path / "worker", trust_code=False).is_dir()


def test_a_package_that_is_there_is_kept_and_one_that_was_changed_is_told(folder, tmp_path):
    sent = PackageArchive(folder)
    staged = stage(sent.content, sent.digest, tmp_path, trust_code=True)
    inode = staged.stat().st_ino
    assert stage(sent.content, sent.digest, tmp_path, trust_code=True).stat().st_ino == inode
    (staged / "modeling.py").write_bytes(b"print('mine')")
    with pytest.raises(DistributedError, match="was changed"):
        stage(sent.content, sent.digest, tmp_path, trust_code=True)
    (folder / "config.json").write_bytes(b'{"hidden_size": 9}')
    other = PackageArchive(folder)
    assert stage(other.content, other.digest, tmp_path, trust_code=True) != staged


def test_damage_on_the_way_is_seen(folder, tmp_path):
    sent = PackageArchive(folder)
    damaged = bytearray(sent.content)
    damaged[600] ^= 1
    with pytest.raises(ProtocolError, match="damaged on its way"):
        stage(bytes(damaged), sent.digest, tmp_path / "worker", trust_code=True)
    with pytest.raises(ProtocolError, match="not the one"):
        stage(sent.content, sent.digest, tmp_path / "worker", trust_code=True, expected="0" * 64)


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil", "a/b.py", "..", ".", ".hidden", "a\\b", "", "config.json", "x" * 300]
)
def test_nothing_is_written_elsewhere(tmp_path, name):
    content, digest = archive(CONFIG, (tarfile.TarInfo(name), b"x"))
    with pytest.raises(ProtocolError):
        stage(content, digest, tmp_path / "worker", trust_code=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_nothing_but_files_is_taken(tmp_path, kind):
    member = tarfile.TarInfo("innocent")
    member.type = kind
    member.linkname = "/etc/passwd"
    content, digest = archive(CONFIG, (member, b""))
    with pytest.raises(ProtocolError, match="plain files"):
        stage(content, digest, tmp_path / "worker", trust_code=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 100, 512, 700])
def test_what_is_no_tar_or_half_of_one_is_refused(folder, tmp_path, cut):
    content = PackageArchive(folder).content[:cut]
    with pytest.raises(ForgatherError):
        stage(content, hashlib.sha256(content).hexdigest(), tmp_path / "worker", trust_code=True)
    assert not (tmp_path / "worker").exists()


def test_a_package_without_a_model_is_none(tmp_path):
    content, digest = archive((tarfile.TarInfo("tokenizer.json"), b"{}"))
    with pytest.raises(ProtocolError, match=r"no config\.json"):
        stage(content, digest, tmp_path, trust_code=True)
    with pytest.raises(ModelError, match=r"no config\.json"):
        PackageArchive(tmp_path)


def test_which_folders_are_of_one_model(folder):
    before = package_digest(folder)
    (folder / "tokenizer.json").write_bytes(b"[]")  # has a digest of its own in the settings
    (folder / "config.json").write_text(json.dumps({"transformers_version": "9", "hidden_size": 8}))
    assert package_digest(folder) == before
    (folder / "config.json").write_text(json.dumps({"hidden_size": 9}))
    assert package_digest(folder) != before
    (folder / "config.json").write_bytes(FILES["config.json"])
    (folder / "modeling.py").write_bytes(b"pass")
    assert package_digest(folder) != before
    (folder / "config.json").write_bytes(b"{")
    with pytest.raises(ModelError, match="no model package"):
        package_digest(folder)


def test_of_a_generated_package_every_file_counts_as_it_is_now(folder):
    """Also against `Package.digest`, which names what the configuration generates."""
    names = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    (folder / "forgather_package.json").write_text(json.dumps({"digest": "whatever it says", "files": names}))
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(names.items()))
    assert package_digest(folder) == hashlib.sha256(lines.encode()).hexdigest()
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert package_digest(folder) != hashlib.sha256(lines.encode()).hexdigest()
