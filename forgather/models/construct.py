"""From a model package to a model; on the meta device, where no tensor has values, unless another is asked for."""

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from forgather.errors import ModelError
from forgather.models.attention_support import ATTENTIONS, attention_names
from forgather.models.initialize import InitRules, choose, initialize, make_whole
from forgather.models.sources import GENERATED, PARTS

_INITIALIZER = ("fill", "needs_whole", "may_match_nothing")
_RULES_FIX = "write rules as docs/reference/model-initialisation.md has them, or leave init_rules to the parent config"


@dataclass(frozen=True)
class Classes:
    """The model class of a package, and its config with the values of config.json."""

    model: Any
    config: PreTrainedConfig

    @property
    def init_rules(self) -> InitRules:
        """Patterns and initializers, for `initialize`; ModelError where the configuration has something else there."""
        rules = self.model.init_rules(self.config)
        if not isinstance(rules, Mapping):
            raise ModelError(f"init_rules is {rules!r}, not a mapping of patterns to initializers", fix=_RULES_FIX)
        for pattern, initializer in rules.items():
            if missing := [name for name in _INITIALIZER if not hasattr(initializer, name)]:
                raise ModelError(
                    f"init_rules: {pattern}: {initializer!r} is no initializer, it has no {', '.join(missing)}",
                    fix=_RULES_FIX,
                )
        return rules


def construct(
    package: Path,
    device: str | torch.device = "meta",
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    seed: int | None = 0,
) -> PreTrainedModel:
    """The causal language model of the package in folder `package`.

    On a device other than meta its weights are drawn from `seed` by the package's rules, as `initialize` draws them;
    on meta the rules are only checked. With `seed=None` weights are left undefined, for whoever loads others. `dtype`
    is the parameters'; without one it is torch's default, whatever weights were saved in the folder. Without an
    `attn_implementation` it is sdpa, or eager where a part knows no sdpa. Raises ModelError where sizes, names or rules
    do not fit together.
    """
    classes = load_classes(package)
    options: dict[str, Any] = {"dtype": torch.get_default_dtype() if dtype is None else dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with torch.device("meta"):
            model: PreTrainedModel = classes.model._from_config(classes.config, **options)
    except ImportError as error:
        if attn_implementation is None:
            raise
        raise ModelError(  # transformers looks for the library that computes it
            f"attention {attn_implementation} cannot be had here: {error}", fix="install what it needs, or use sdpa"
        ) from error
    except ValueError as error:  # parts know nothing of Forgather and its errors
        if attn_implementation is not None and attn_implementation not in attention_names():
            raise ModelError(
                f"nothing computes the attention {attn_implementation!r}",
                fix=f"use one of {', '.join(ATTENTIONS)}, or null for the model's own choice",
            ) from error
        raise ModelError(str(error), fix=_change(str(error), package)) from error
    except (TypeError, RuntimeError) as error:
        if not _is_about_values(error, package):
            raise
        raise ModelError(
            f"no model can be made of the values in hf_config: {error}", fix="let sizes be positive integers"
        ) from error
    model.generation_config = GenerationConfig.from_pretrained(package)
    rules = None if seed is None else classes.init_rules
    if rules is not None:
        choose(model, rules)  # before memory is taken, and on meta too
    if torch.device(device).type != "meta":
        model.to_empty(device=torch.device(device))
        if rules is None or seed is None:
            make_whole(model)
        else:
            initialize(model, rules, seed)
    return model


def _change(message: str, package: Path) -> str | None:
    """What to do about an error of a part or of transformers: change those of the sizes that it names."""
    named = [key for key in _settings(package) if re.search(rf"\b{re.escape(key)}\b", message)]
    return f"change {' or '.join(named)}" if named else None


def _is_about_values(error: BaseException, package: Path) -> bool:
    """Whether torch or a part of ours was given what it cannot take; an error of a project's own part is its bug."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    called = [file for file in files if file.parent == package.absolute()]  # the last of them called whoever refused
    is_ours = bool(called) and (called[-1].stem in GENERATED or find_spec(f"{PARTS}.{called[-1].stem}") is not None)
    return is_ours and (files[-1] == called[-1] or files[-1].is_relative_to(Path(torch.__file__).parent))


def load_classes(package: Path) -> Classes:
    """Import a package's model class and read its config.

    The module is imported from where it stands, under a name of its own, and not through transformers' cache of remote
    code, which ranks that start together would write at the same time.
    """
    settings = _settings(package)
    rope = settings.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):  # transformers would fail in the middle of its own code
        raise ModelError(
            f"rope_parameters is {rope!r}, not a mapping",
            fix="rope_parameters: {rope_type: default, rope_theta: 10000.0}",
        )
    module, _, name = settings["auto_map"]["AutoModelForCausalLM"].partition(".")
    model = getattr(_import(package, module), name)
    try:
        config = model.config_class.from_pretrained(package)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # as transformers happens to meet it
        raise ModelError(f"{package / 'config.json'}: {error}", fix=_change(str(error), package)) from error
    # `save_pretrained` then takes the code along: the config's, which the model calls, as one file has both classes.
    model.config_class.register_for_auto_class()
    return Classes(model, config)


def _settings(package: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((package / "config.json").read_text(encoding="utf-8"))
    return settings


def _import(package: Path, module: str) -> ModuleType:
    sources = sorted(package.glob("*.py"))
    identity = hashlib.sha256(str(package.resolve()).encode())
    for path in sources:
        identity.update(path.name.encode() + path.read_bytes())
    name = f"forgather_package_{identity.hexdigest()[:16]}"
    if name not in sys.modules:
        parent = ModuleType(name)
        parent.__path__ = [str(package)]
        sys.modules[name] = parent
    # A package is rewritten within a second and at equal size, which bytecode files would not notice.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return import_module(f"{name}.{module}")
    finally:
        sys.dont_write_bytecode = writes
