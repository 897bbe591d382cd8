"""`forgather model --help` against the usage text that was promised: each flag, the name of its value, its meaning."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from forgather import Project
from forgather.cli.main import main
from forgather.config.files import shipped_configs

PROMISED = (Path(__file__).parent / "model_usage.txt").read_text()
# What says more, or other, than was promised: the departures, and what the words would not tell.
IN_OTHER_WORDS = {
    "--help",
    "--dtype",
    "--no-init-weights",
    "--refresh-model",
    "--save-checkpoint",
    "--safetensors",
    "--edit",
}
OURS = {"--json", "--project", "--config"}
LLAMA = shipped_configs() / "models" / "llama"


class Flag(NamedTuple):
    names: frozenset[str]
    value: str
    meaning: str


def read_flags(text: str) -> dict[str, Flag]:
    """The options that a help text of argparse describes, by long name."""
    found: dict[str, Flag] = {}
    last = ""
    for line in text.splitlines():
        if match := re.match(r"^ {2}(-\S.*?)(?: {2,}(\S.*))?$", line):
            words = [word.partition(" ") for word in match[1].split(", ")]
            names = frozenset(name for name, _, _ in words)
            last = min((name for name in names if name.startswith("--")), key=len)
            found[last] = Flag(names, words[-1][2], match[2] or "")
        elif last and re.match(r"^ {10,}\S", line):
            flag = found[last]
            found[last] = flag._replace(meaning=f"{flag.meaning} {line.strip()}".strip())
        else:
            last = ""
    return found


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Flag]]:
    monkeypatch.setenv("COLUMNS", "200")  # no value's name is broken over lines

    def show(*words: str) -> dict[str, Flag]:
        assert main(["-p", str(LLAMA), "model", *words, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Dynamic arguments" in text
        return read_flags(text)

    return show


def promised() -> tuple[dict[str, Flag], dict[str, Flag]]:
    """The flags of the command, and those of its verb `test`."""
    command, _, test = PROMISED.partition("# Additional arguments")
    both = read_flags(command), read_flags(test)
    assert (len(both[0]), len(both[1])) == (25, 8), "the text was not read as a person would"
    return both


@pytest.mark.parametrize("verb", ["", "construct", "test"])
def test_each_flag_of_the_reference_is_there(verb: str, shown: Callable[..., dict[str, Flag]]) -> None:
    command, test = promised()
    there = shown(verb) if verb else shown()
    for name, flag in {**command, **(test if verb == "test" else {})}.items():
        assert name in there
        assert flag.names <= there[name].names
        assert flag.value == there[name].value
        if name not in IN_OTHER_WORDS:
            assert there[name].meaning.startswith(flag.meaning)
    declared = {f"--{name.replace('_', '-')}" for name in Project(LLAMA).parameters}
    besides = there.keys() - command.keys() - declared - (test.keys() if verb == "test" else set())
    assert besides == OURS | ({"--explain-init"} if verb == "construct" else set())


def test_the_departures_are_said(shown: Callable[..., dict[str, Flag]]) -> None:
    flags = shown()
    assert "weights, checkpoints and runs beside it are never deleted" in flags["--refresh-model"].meaning
    assert "weights are always safetensors" in flags["--safetensors"].meaning
    assert "$VISUAL, $EDITOR or vi; an error without a terminal" in flags["--edit"].meaning


def test_declared_parameters_are_shown_only_where_a_config_declares_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--hidden-size" not in text
    assert "Dynamic arguments are missing here, because the config cannot be read" in text


@pytest.mark.parametrize("flag", sorted(promised()[0].keys() - {"--help"}))
def test_a_flag_stands_before_or_after_the_verb(flag: str) -> None:
    from forgather.cli.options import read_options

    value = {"--attn-implementation": ["eager"], "--rope-parameters": ["{}"], "--rms-norm-eps": ["1"]}.get(
        flag, ["1"] if promised()[0][flag].value else []
    )
    selection = ["-p", str(LLAMA)]
    parsed = []
    for words in ([flag, *value, "construct"], ["construct", flag, *value]):
        options = read_options("model", [*selection, *words], argv=words)
        assert options is not None
        parsed.append({name: each for name, each in vars(options).items() if name not in ("argv", "command")})
    assert parsed[0] == parsed[1]
    assert parsed[0]["verb"] == "construct"
