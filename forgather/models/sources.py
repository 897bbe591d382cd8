"""The Python files of a model package: what the configuration composed, and the parts it is made of."""

import ast
import keyword
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgather.errors import ModelError

PARTS = "forgather.models.parts"
MODULE = "modeling"  # config and model classes, the file that config.json's auto_map names
ARCHITECTURE = "architecture"
INITIALIZATION = "initialization"
GENERATED = (MODULE, ARCHITECTURE, INITIALIZATION)

# How an emitted source gets at a Python file that the configuration names by its path.
OWN_FILE = re.compile(r"^(\w+) = _load_file\('\w+', '(.*)'\)\.(\w+)$", re.MULTILINE)

# The composed classes and the rules' place in a package; {..} are filled in by `model_files`.
MODELING = '''"""{title}: a causal language model, generated from a Forgather project.

It loads with transformers alone. Sizes are in config.json, the architecture in {architecture}.py, and how weights begin
in {initialization}.py; the other files are the parts that the architecture is made of.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .{architecture} import {build_model} as build_model
from .causal_lm import CausalLM
from .composed_config import ComposedConfig
from .decoder import Decoder
from .{initialization} import {build_rules} as init_rules


class {title}Config(ComposedConfig):
    model_type = "{model_type}"
{plan}{fields}

class {title}Model(Decoder):
    config_class = {title}Config
    init_rules = staticmethod(init_rules)

    def __init__(self, config: {title}Config, composed: Decoder | None = None) -> None:
        composed = build_model(config).model if composed is None else composed
        super().__init__(config, **dict(composed.named_children()))
        self.post_init()


class {title}ForCausalLM(CausalLM):
    config_class = {title}Config
    init_rules = staticmethod(init_rules)

    def __init__(self, config: {title}Config) -> None:
        composed = build_model(config)
        super().__init__(config, model={title}Model(config, composed.model), lm_head=composed.lm_head)
        self.post_init()


# Loading this file once is enough: the Auto classes then know the model without trust_remote_code.
AutoConfig.register("{model_type}", {title}Config, exist_ok=True)
AutoModel.register({title}Config, {title}Model, exist_ok=True)
AutoModelForCausalLM.register({title}Config, {title}ForCausalLM, exist_ok=True)
'''


def model_files(
    title: str, model_type: str, *, source: str, init_source: str, sizes: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, str]:
    """All files by name: the generated ones, and every part that they need, directly or through other parts.

    `source` builds the model and `init_source` its rules, each with a function of the config, as `!code` writes them.
    Of `sizes` only the names and types are used: the config class declares them.
    """
    source, own = _own_files(source)
    generated = MODELING.format(
        title=title,
        model_type=model_type,
        architecture=ARCHITECTURE,
        initialization=INITIALIZATION,
        build_model=_function(source, ARCHITECTURE),
        build_rules=_function(init_source, INITIALIZATION),
        plan="".join(f"    {name} = {value!r}\n" for name, value in plan.items()),
        fields="".join(f"    {name}: {_annotation(value)} = None\n" for name, value in sizes.items()),
    )
    files = {MODULE: generated, ARCHITECTURE: source, INITIALIZATION: init_source, **own}
    parts = {"causal_lm", "composed_config", "decoder"}.union(*map(_parts_of, files.values()))
    while missing := sorted(parts - files.keys()):
        for part in missing:
            files[part] = _part(part)
            parts |= _parts_of(files[part])
    return {f"{name}.py": _standalone(name, text) for name, text in sorted(files.items())}


def _annotation(value: Any) -> str:
    if value is None:
        return "Any"
    if isinstance(value, Mapping):
        return "dict[str, Any] | None"
    return "int | float | None" if isinstance(value, float) else f"{type(value).__name__} | None"


def _function(source: str, where: str) -> str:
    """The name of the function that an emitted source defines for others: its last one."""
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert functions, f"the source for {where}.py defines no function"
    return functions[-1]


def _own_files(source: str) -> tuple[str, dict[str, str]]:
    """The source with the project's own Python files imported from beside it, and those files."""
    if not (loads := OWN_FILE.findall(source)):
        return source, {}
    loader = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "_load_file")
    lines = source.splitlines()
    source = "\n".join([*lines[: loader.lineno - 1], *lines[loader.end_lineno :], ""])
    source = OWN_FILE.sub(lambda load: f"from .{Path(load[2]).stem} import {load[3]} as {load[1]}", source)
    paths = {Path(file) for _, file, _ in loads}
    for path in paths:
        if not path.stem.isidentifier() or keyword.iskeyword(path.stem):
            raise ModelError(
                f"{path} cannot be part of a model package: {path.stem!r} is no name of a Python module",
                fix="rename the file, with letters, digits and underscores",
            )
    files = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    taken = [stem for stem in files if stem in GENERATED or find_spec(f"{PARTS}.{stem}")]
    if taken or len(files) < len(paths):
        raise ModelError(
            f"the files of a model package would have the same name: {', '.join(taken or sorted(map(str, paths)))}",
            fix="rename the project's own file",
        )
    return source, files


def _parts_of(source: str) -> set[str]:
    return {name.removeprefix(PARTS + ".") for name in _imports(source) if name.startswith(PARTS + ".")}


def _part(name: str) -> str:
    spec = find_spec(f"{PARTS}.{name}")
    if name in GENERATED or spec is None or spec.origin is None:
        raise ModelError(f"there is no part {PARTS}.{name}", fix=f"see `ls {Path(__file__).parent / 'parts'}`")
    return Path(spec.origin).read_text(encoding="utf-8")


def _standalone(name: str, source: str) -> str:
    """The source with parts imported from beside it, and no need of Forgather left."""
    source = re.sub(rf"^(\s*)from {re.escape(PARTS)}\.(\w+) import", r"\1from .\2 import", source, flags=re.MULTILINE)
    foreign = [module for module in _imports(source) if module.split(".")[0] == "forgather"]
    if foreign:
        raise ModelError(
            f"the model package's {name}.py would import {', '.join(foreign)}, which is not there where the model runs",
            fix=f"compose models of what stands in {PARTS}, in torch or in transformers",
        )
    return source


def _imports(source: str) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules.extend(alias.name for alias in node.names)
    return modules
