"""Checking without building: SPECs, signatures, plain types, private names, unused parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Optional

import pytest

from forgather import Project
from forgather.config import files
from forgather.errors import ConfigError

Load = Callable[..., Project]
Refused = Callable[..., str]
HERE = "tests.config.test_check"


def plain(a: int, b: float = 1.0, *, c: str = "x", d: bool = True) -> None: ...


def loose(a: "int | None" = None, b: Optional[str] = None, c: int = None, **rest: int) -> None: ...  # type: ignore[assignment]  # noqa: RUF013,UP045


def shapes(
    a: list[int], b: tuple[int, int], c: dict[str, int], d: Literal["x", 1] = "x", e: Path | str = ""
) -> None: ...


def only(a: int, /, b: int, *more: int) -> None: ...


def unresolvable(a: "NoSuchType", b: int = 1) -> None: ...  # type: ignore[name-defined]  # noqa: F821


NUMBER = 5


@pytest.mark.parametrize(
    "call",
    [
        "plain {a: 1, b: 2, c: z, d: false}",
        "plain [1, 2.5]",
        "loose {a: null, b: null, c: null, anything: 1}",
        "shapes {a: [1], b: [1, 2], c: {x: 1}, d: 1, e: path}",
        "shapes {a: [1], b: !tuple [1, 2], c: {}, d: x}",
        "only [1, 2, 3, 4]",
        'only {"*": [1], b: 2}',
        "unresolvable {a: 5}",
    ],
)
def test_calls_that_fit(load: Load, call: str):
    load(f"main: !singleton:{HERE}:{call}").check()
    load(f"main: !partial:{HERE}:{call}").check()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("plain {a: 1, bb: 2}", ":2:8: unknown argument 'bb' of tests.config.test_check:plain\n  fix: did you mean"),
        ("plain {b: 2}", "lacks a\n  fix: write a: VALUE"),
        ("plain", "lacks a"),
        ("plain [1, 2, 3]", "takes 2 positional arguments, not 3"),
        ('plain {"*": [1], a: 2}', "'a' of tests.config.test_check:plain is given by position, too"),
        ("plain {a: 1.5}", "the argument 'a' of tests.config.test_check:plain is int, not 1.5"),
        ("plain {a: true}", "is int, not True"),
        ("plain {a: 1, b: fast}", "is float, not 'fast'"),
        ("plain {a: 1, d: 1}", "is bool, not 1"),
        ("plain {a: null}", "is int, not None"),
        ("plain [text]", "is int, not 'text'"),
        ("loose {a: x}", "is int or null, not 'x'"),
        ("shapes {a: 1, b: 1, c: 1, d: z}", "is 'x', 1, not 'z'"),
        ("shapes {a: {}, b: [], c: []}", "is list, not {}"),
        ("only {a: 1, b: 2}", "unknown argument 'a'"),
        ("unresolvable {c: 1}", "unknown argument 'c'"),
        ("NUMBER", "is of type int, which cannot be called\n  fix: write !symbol:"),
        ("NUMBR", "has no 'NUMBR'"),
    ],
)
def test_calls_that_do_not_fit(load: Load, call: str, said: str):
    name, _, rest = call.partition(" ")
    text = f"main: !singleton:{HERE}:{name} " + (rest.replace("{", "{\n ", 1) if "bb" in rest else rest)
    project = load(text.replace("a: 1, bb", "a: 1, bb"))
    with pytest.raises(ConfigError) as caught:
        project.check()
    assert said.replace(":2:8: ", ":2:8: ") in str(caught.value)
    with pytest.raises(ConfigError) as built:  # building binds first, and says the same
        project.build("main")
    assert str(built.value) == str(caught.value)


def test_a_partial_may_lack_arguments_but_not_invent_them(load: Load, refused: Refused):
    load(f"main: !partial:{HERE}:plain {{b: 1}}").check()
    assert "unknown argument 'e'" in refused(f"main: !partial:{HERE}:plain {{e: 1}}")


def test_the_example_of_the_issue(refused: Refused):
    said = refused("main: !partial:torch.optim:AdamW\n  learing_rate: 1e-3")
    assert said == (
        "configs/main.yaml:2:3: unknown argument 'learing_rate' of torch.optim:AdamW\n  fix: did you mean 'lr'?"
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("collectoins:X", "no module 'collectoins' (SPEC collectoins:X)\n  fix: did you mean 'collections'?"),
        ("forgather.confg:X", "no module 'forgather.confg' (SPEC forgather.confg:X)\n  fix: did you mean 'config'?"),
        ("collections:OrderedDct", "collections has no 'OrderedDct'"),
        (
            "collections:OrderedDict.frmkeys",
            "collections.OrderedDict has no 'frmkeys' (SPEC collections:OrderedDict.frmkeys)\n"
            "  fix: did you mean 'fromkeys'?",
        ),
        ("../broken.py:X", "importing ../broken.py:X failed: ZeroDivisionError"),
        ("../lacking.py:X", "importing ../lacking.py:X failed: No module named 'no_such_module'"),
    ],
)
def test_specs_that_cannot_be_imported(refused: Refused, spec: str, said: str):
    found = refused(f"main: !symbol:{spec}", {"broken.py": "1 / 0\n", "lacking.py": "import no_such_module\n"})
    assert f"configs/main.yaml:1:7: {said}" in found


def test_a_submodule_is_found_as_import_finds_it(load: Load):
    assert (
        load("main: !symbol:xml:etree.ElementTree".replace("etree.ElementTree", "sax")).build("main").__name__
        == "xml.sax"
    )


def test_shipped_yaml_names_no_private_module(
    refused: Refused, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    text = "main: !symbol:collections.abc:Mapping\nother: !symbol:_collections_abc:Mapping"
    Project(write(main=text)).check()
    monkeypatch.setattr("forgather.config.check.shipped_configs", Path.cwd)
    assert refused(text).startswith("configs/main.yaml:2:8: shipped YAML names the private _collections_abc:Mapping")
    assert files.shipped_configs() != Path.cwd()


def test_unused_parameters_are_listed(load: Load):
    project = load(
        "args: {a: 1, b: '${a}', c: 2, d: 3}\nmain: !code {target: x}\nx: {c: '${c}'}".replace("!code {target: x}", "1")
    )
    notes = project.check()
    assert ["'b' is never used" in notes[0], "'d' is never used" in notes[1], len(notes)] == [True, True, 2]


def test_unreferenced_projects_are_checked_too(refused: Refused):
    assert "no project 'nowhere'" in refused("_p: !project {dir: nowhere}\nmain: 1")


def test_projects_to_choose_from_are_checked(load: Load, refused: Refused):
    files = {"other/project.yaml": "", "other/configs/m.yaml": "args: {n: 1}\nmain: '${n}'\n"}
    text = "args: {kind: a}\n_p:\n  a: !project {dir: ../other}\n  b: !project {dir: ../other, args: {n: 2}}\n"
    text += "main: !ref _p.${kind}.main\n"
    project = load(text, files, args={"kind": "b"})
    assert project.build("main") == 2
    assert project.check() == []
    assert "has no parameter 'm'" in refused(text.replace("n: 2", "m: 2"), files)


def test_code_is_checked_where_it_is_asked_for(load: Load):
    """Where the code runs, nobody knows the file and line of an argument that does not fit."""
    text = "main: !code {target: x, inputs: given}\ngiven: 1\n"
    text += "x: !singleton:tests.config.test_check:plain {a: !ref given, b: 2, e: 2}\n"
    with pytest.raises(ConfigError, match=r"configs/main\.yaml:3:\d+: unknown argument 'e' of"):
        load(text).build("main")
    assert "plain(" in load(text.replace(", e: 2", "")).build("main")
