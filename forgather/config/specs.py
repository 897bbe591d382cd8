"""SPECs: how YAML names a Python object, and how that becomes the object.

`package.module:Symbol.attr`, `path/to/file.py:Symbol` (the path relative to the file that writes it), or the name of a
builtin. A Python file is imported once, whatever names it, and stays importable under one module name, so that what it
defines can be pickled and compared.
"""

import builtins
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from forgather.config.files import find_reference
from forgather.config.names import did_you_mean
from forgather.config.problems import problem
from forgather.config.tree import Place, shown_path


class Spec(NamedTuple):
    """A parsed SPEC. `module` is empty for a builtin; `file` is set for a Python file, `module` then being made up."""

    text: str
    module: str
    symbol: str
    file: str | None = None

    def __str__(self) -> str:
        return self.text


def parse_spec(text: str, place: Place, library: Iterable[Path]) -> Spec:
    """The SPEC that `text` writes. Raises Problems; nothing is imported."""
    before, colon, symbol = text.rpartition(":")
    example = "write package.module:Symbol, path/to/file.py:Symbol, or a builtin's name"
    if not colon:
        if not hasattr(builtins, text):
            fix = did_you_mean(text, [each for each in dir(builtins) if not each.startswith("_")])
            raise problem(place, f"{text!r} is no builtin", fix=fix if fix.startswith("did") else example)
        return Spec(text, "", text)
    if not all(part.isidentifier() for part in symbol.split(".")):
        raise problem(place, f"SPEC {text!r}: {symbol!r} names no symbol", fix=example)
    if before.endswith(".py"):
        file = find_reference(before, place, library)
        return Spec(text, module_name(file), symbol, str(file))
    if not all(part.isidentifier() for part in before.split(".")):
        raise problem(place, f"SPEC {text!r}: {before!r} names no module", fix=example)
    return Spec(text, before, symbol)


def module_name(file: Path) -> str:
    """One name for one file, however it was reached."""
    real = str(file.resolve())
    digest = hashlib.blake2b(real.encode(), digest_size=4).hexdigest()
    stem = "".join(c if c.isidentifier() or c.isdigit() else "_" for c in file.stem)
    return f"forgather_file_{stem}_{digest}"


def import_spec(spec: Spec, place: Place) -> Any:
    """The object that a SPEC names. Raises Problems with the nearest name."""
    if not spec.module:
        return getattr(builtins, spec.symbol)
    made: Any = _import_module(spec, place)
    done = spec.module
    for part in spec.symbol.split("."):
        parent = made
        try:
            made = getattr(parent, part)
        except AttributeError:
            # Below the module only: emitted code imports the first part, and reads the rest as attributes.
            made = _submodule(parent, done, part) if done == spec.module else None
            if made is None:
                names = [each for each in dir(parent) if not each.startswith("_")]
                where = shown_path(spec.file) if spec.file else done
                fix = did_you_mean(part, names, what="it has")
                raise problem(place, f"{where} has no {part!r} (SPEC {spec})", fix=fix) from None
        done = f"{done}.{part}"
    return made


def _submodule(parent: Any, name: str, part: str) -> Any:
    """`pkg:submodule`, as `from pkg import submodule` would find it."""
    if not hasattr(parent, "__path__") or importlib.util.find_spec(f"{name}.{part}") is None:
        return None
    return importlib.import_module(f"{name}.{part}")


def _import_module(spec: Spec, place: Place) -> Any:
    if spec.module in sys.modules:
        return sys.modules[spec.module]
    try:
        return load_file(spec.module, spec.file) if spec.file else importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name is not None and (spec.module == error.name or spec.module.startswith(f"{error.name}.")):
            fix = _module_fix(error.name)
            raise problem(place, f"no module {error.name!r} (SPEC {spec})", fix=fix) from None
        raise problem(place, f"importing {spec} failed: {error}", fix=f"install {error.name}") from error
    except Exception as error:
        fix = "mend the module; the traceback stands above this error in Python"
        raise problem(place, f"importing {spec} failed: {type(error).__name__}: {error}", fix=fix) from error


def load_file(name: str, file: str) -> Any:
    """The module of one Python file, under the name `name`."""
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None, "a .py file has a spec"
    assert found.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_fix(missing: str) -> str:
    parent, _, name = missing.rpartition(".")
    if not parent:
        near = did_you_mean(name, [each for each in sys.modules if "." not in each])
        return near if near.startswith("did") else f"install {name}, or name a file: path/to/file.py:Symbol"
    import pkgutil

    path = getattr(sys.modules.get(parent), "__path__", [])
    return did_you_mean(name, [each.name for each in pkgutil.iter_modules(path)], what=f"modules of {parent}")
