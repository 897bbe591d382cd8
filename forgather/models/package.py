"""A model package: the folder from which transformers loads a model that a configuration has composed.

It holds the Python of the model, config.json, generation_config.json and the tokenizer, and needs nothing of Forgather.
Weights, runs and whatever else stands in the folder are never touched.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from forgather.durable import appearing, emptied, sync, sync_all
from forgather.errors import ModelError
from forgather.models.sources import MODULE, model_files
from forgather.models.vocabulary import vocab_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from forgather.models.parts.initializers import Initializer

MANIFEST = "forgather_package.json"
_WEIGHTS = r".*\.(safetensors|bin|pt|pth)(\.index\.json)?"


class Package:
    """What a model project's `package` target builds; the folder is written by `write`, or by the first `construct`.

    `name` becomes that of the classes (llama_4m: `Llama4mForCausalLM`). `source` and `init_source` are what `!code` has
    made of the targets `model` and `init_rules`, with `hf_config` given; `hf_config` holds the sizes; `plan` the
    parallelism plans in transformers' form, which become attributes of the config class.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        init_source: str,
        hf_config: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        plan: Mapping[str, Any],
        dir: str | Path,
    ) -> None:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ModelError(
                f"{name!r} is no model name: the package's folder and its classes are called by it",
                fix="choose one without / and \\, as --model-name mine; --output-dir says where the package goes",
            )
        self.name = name
        self.source = source
        self.init_source = init_source
        self.hf_config = dict(hf_config)
        self.tokenizer = tokenizer
        self.plan = dict(plan)
        self.dir = Path(dir).absolute()

    @property
    def digest(self) -> str:
        """Changes whenever anything in the generated files does."""
        return _digest(self._files)

    @cached_property
    def init_rules(self) -> dict[str, "Initializer"]:
        """Which initializer each parameter gets: an ordered mapping of patterns, for `initialize`."""
        from forgather.models.construct import load_classes

        return dict(load_classes(self.write()).init_rules)

    @property
    def is_there(self) -> bool:
        """Whether the folder holds a package, this one or a stale one."""
        return (self.dir / MANIFEST).exists()

    def write(self, refresh: bool = False, *, undrawn: bool = False) -> Path:
        """Make the folder say what the configuration says, and return it.

        Several processes may call it at once. An equal package is kept. A different one is an error unless `refresh`,
        which replaces the generated files and nothing else. With `undrawn` its rules need not fit its parameters.
        """
        if self.is_there and not self.differences():
            return self.dir  # needs no lock, so a read-only disk that holds it will do
        with self._locked():
            if not self.dir.is_dir():
                with appearing(self.dir, self._aside) as aside:
                    self._write_into(aside, undrawn)
            elif not self.is_there:
                self._refuse_foreign_files()
                self._move_in(undrawn)
            elif differences := self.differences():
                if not refresh:
                    raise self.stale(differences)
                self._move_in(undrawn)
        from forgather.models.construct import load_classes

        load_classes(self.dir)  # so that the Auto classes know it from here, and not from where it was tried
        return self.dir

    def differences(self) -> list[str]:
        """How the folder differs from what would be generated now; empty if it does not, or is not there yet."""
        path = self.dir / MANIFEST
        if not path.exists():
            return []
        content = _read(path)
        if "files" not in content:
            return [f"{MANIFEST} is damaged"]
        if content["digest"] is None:
            return ["a refresh of it was interrupted"]
        manifest: dict[str, str] = content["files"]
        found = []
        for name in sorted(manifest.keys() | self._files.keys()):
            on_disk = self.dir / name
            if name not in self._files:
                found.append(f"{name} is no longer part of it")
            elif name not in manifest:
                found.append(f"{name} is new")
            elif manifest[name] != _hash(self._files[name]):
                found.append(f"{name} would be different")
            elif not on_disk.exists():
                found.append(f"{name} is missing")
            elif name.endswith(".py") and manifest[name] != _hash(on_disk.read_bytes()):
                found.append(f"{name} was edited")
        edited = self._edited_sizes()  # says more than that the file would be different
        return [line for line in found if not (edited and line.startswith("config.json "))] + edited

    def stale(self, differences: list[str]) -> ModelError:
        """The error that says so."""
        return ModelError(
            f"the model package in {self.dir} is stale: {'; '.join(differences)}",
            fix="the same command with -r (--refresh-model) rebuilds it and leaves weights and runs alone; "
            "or choose another --model-name or --output-dir (in a run: model_project.args.model_name=NAME)",
        )

    def construct(
        self,
        device: "str | torch.device" = "meta",
        *,
        dtype: "torch.dtype | None" = None,
        attn_implementation: str | None = None,
        seed: int | None = 0,
    ) -> "PreTrainedModel":
        """A model from the written package, which is written first where it is not; see `construct.construct`."""
        from forgather.models.construct import construct

        package = self.write(undrawn=seed is None)
        return construct(package, device, dtype=dtype, attn_implementation=attn_implementation, seed=seed)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        vocab_size(self.tokenizer, self.hf_config.get("vocab_size"))  # a row for every token
        name = re.sub(r"\W", "_", self.name)
        title = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
        title = title if title[:1].isalpha() else f"Model{title}"
        # Two packages in one process must not answer to one model_type, so it carries a digest of the sources.
        make = partial(
            model_files,
            title,
            source=self.source,
            init_source=self.init_source,
            sizes=self.hf_config,
            plan=self.plan,
        )
        model_type = f"{name}-{_digest({key: text.encode() for key, text in make(name).items()})[:8]}"
        sources = make(model_type)
        auto_map = {
            "AutoConfig": f"{MODULE}.{title}Config",
            "AutoModel": f"{MODULE}.{title}Model",
            "AutoModelForCausalLM": f"{MODULE}.{title}ForCausalLM",
        }
        config = {
            "architectures": [f"{title}ForCausalLM"],
            "auto_map": auto_map,
            "model_type": model_type,
            **self.hf_config,
        }
        ids = {key: self.hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation_config = {key: value for key, value in ids.items() if value is not None}
        return {
            **{key: text.encode() for key, text in sources.items()},
            "config.json": _json(config),
            "generation_config.json": _json(generation_config),
            **_tokenizer_files(self.tokenizer),
        }

    def _edited_sizes(self) -> list[str]:
        """Values of config.json that were changed by hand; `save_pretrained` rewrites the file with more keys."""
        path = self.dir / "config.json"
        if not path.exists():
            return []
        on_disk = _read(path)
        if not on_disk:
            return ["config.json is damaged"]
        return [
            f"config.json says {key}: {on_disk[key]}, the configuration {value}"
            for key, value in self.hf_config.items()
            if key in on_disk and not _agree(on_disk[key], value)
        ]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, and errors of the file system with the path and what to do."""
        try:
            self.dir.parent.mkdir(parents=True, exist_ok=True)
            # A lock that cannot be made is waited for without end where the file system says that it is not there.
            tempfile.TemporaryFile(dir=self.dir.parent).close()
            with FileLock(self.dir.parent / f".{self.dir.name}.lock"):
                yield
        except OSError as error:
            raise ModelError(
                f"cannot write the model package {self.dir}: {error.strerror}", fix="choose another --output-dir"
            ) from error

    @property
    def _aside(self) -> Path:
        """Where the holder of the lock writes. Named by digest, as Python remembers what a folder has to import."""
        return self.dir.parent / f".{self.dir.name}-{self.digest[:16]}.partial"

    def _write_into(self, folder: Path, undrawn: bool) -> None:
        """The whole package, and try it: a model can be made from it."""
        from forgather.models.construct import construct

        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        files = {name: _hash(content) for name, content in self._files.items()}
        (folder / MANIFEST).write_bytes(_json({"digest": self.digest, "files": files}))
        # Every composition has eager attention, soft-capped scores too.
        construct(folder, attn_implementation="eager", seed=None if undrawn else 0)

    def _move_in(self, undrawn: bool) -> None:
        """Replace the generated files one by one; until the last, the manifest says that it is not finished."""
        manifest = self.dir / MANIFEST
        old = _read(manifest).get("files", {}) if manifest.exists() else {}
        with emptied(self._aside) as aside:
            self._write_into(aside, undrawn)
            unfinished = aside / "unfinished.json"
            unfinished.write_bytes(_json({"digest": None, "files": dict.fromkeys([*old, *self._files])}))
            sync_all(aside.iterdir())
            # Synced in between, so that a crash of the machine does not leave the new manifest with an old file.
            unfinished.replace(manifest)
            sync(self.dir)
            for name in self._files:
                (aside / name).replace(self.dir / name)
            for name in old.keys() - self._files.keys():
                (self.dir / name).unlink(missing_ok=True)
            sync(self.dir)
            (aside / MANIFEST).replace(manifest)
            sync(self.dir)

    def _refuse_foreign_files(self) -> None:
        there = [name for name in self._files if (self.dir / name).exists()]
        if there:
            raise ModelError(
                f"{self.dir} holds {', '.join(there)}, which Forgather has not written",
                fix="choose another --output-dir or --model-name, or move the folder away",
            )
        foreign = sorted(path.name for path in self.dir.iterdir() if not _may_stand_beside(path.name))
        if foreign:
            raise ModelError(
                f"{self.dir} is no folder of a model: it holds {', '.join(foreign[:3])}"
                + (f" and {len(foreign) - 3} more" if foreign[3:] else ""),
                fix=f"choose a folder of the package's own, as --output-dir {self.dir / self.name}",
            )


def _may_stand_beside(name: str) -> bool:
    """Whether a folder without a package may hold it: what is hidden, runs, and weights that came first."""
    return name.startswith(".") or name == "runs" or re.fullmatch(_WEIGHTS, name) is not None


def _tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    # transformers 5 no longer writes this file, but tools outside it still look for it.
    return {"special_tokens_map.json": _json(tokenizer.special_tokens_map), **files}


def _read(path: Path) -> dict[str, Any]:
    """The mapping of a JSON file; an empty one where it holds none, as after an edit that went wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _agree(on_disk: Any, value: Any) -> bool:
    """Whether a saved value is the configured one; transformers adds keys to mappings such as rope_parameters."""
    if isinstance(value, Mapping) and isinstance(on_disk, Mapping):
        return all(key in on_disk and _agree(on_disk[key], inner) for key, inner in value.items())
    return bool(on_disk == value)


def _json(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"hf_config can only hold what JSON can: {error}", fix="use numbers, text, lists, mappings"
        ) from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(files: Mapping[str, bytes]) -> str:
    return _hash("\n".join(f"{name} {_hash(content)}" for name, content in sorted(files.items())).encode())
