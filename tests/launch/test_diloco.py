"""What starts DiLoCo on other machines says words that `forgather` knows, and shows the token to nobody."""

import configparser
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from forgather.cli.options import read_options

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def lan(tmp_path):
    """Runs diloco_lan.sh with an ssh and a Python that only write down how they were called."""
    (tmp_path / "called").mkdir()
    record = f'{{ printf "%s\\n" "$@"; }} > {tmp_path}/called/$$'
    (tmp_path / "python3").write_text(
        f"""#!/bin/bash
{record}
case "$*" in
    *"diloco server"*)
        [ -z "$REFUSES" ] || exit 2
        mkdir -p {tmp_path}/out; echo the-token-of-the-server > {tmp_path}/out/token
        trap 'echo ended > {tmp_path}/ended; exit 75' TERM; while :; do sleep 0.05; done ;;
    *"diloco status"*) [ -z "$REFUSES" ] || sleep 0.3; [ -s {tmp_path}/out/token ] || exit 2 ;;
esac
"""
    )
    (tmp_path / "ssh").write_text(f"#!/bin/bash\n{record}\ncat >> {tmp_path}/piped\nexit ${{WORKER_CODE:-0}}\n")
    for name in ("python3", "ssh"):
        (tmp_path / name).chmod(0o755)

    def run(*words: str, **environ: str) -> tuple[int, list[list[str]], str]:
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3", "OUTPUT": str(tmp_path / "out")}
        done = subprocess.run(
            [str(LAUNCH / "diloco_lan.sh"), *words], env=known | environ, capture_output=True, text=True, timeout=60
        )
        called = [path.read_text().splitlines() for path in sorted((tmp_path / "called").iterdir())]
        return done.returncode, called, done.stderr

    return run


LAN = {"PROJECT": "configs/tiny_llama", "ADDRESS": "10.0.0.1", "HOSTS": "laptop2 box3", "FOLDER": "/srv/forgather"}


def test_a_server_here_and_workers_there(lan, tmp_path):
    code, called, _ = lan("--steps", "5", "model_project.args.name=a b", SERVER_FLAGS="--sync-every 50", **LAN)
    assert code == 0
    assert (tmp_path / "ended").exists()
    server = next(words for words in called if "server" in words)
    assert server[:4] == ["-m", "forgather", "-p", "configs/tiny_llama"]
    words = server[server.index("diloco") + 1 :]
    options = read_options("diloco", words, argv=[])
    assert (options.num_workers, options.host, options.port, options.sync_every) == (2, "10.0.0.1", 8512, 50)
    remote = [words[-1] for words in called if words[:1] == ["-tt"]]
    assert sorted(words[1] for words in called if words[:1] == ["-tt"]) == ["box3", "laptop2"]
    for line in remote:
        words = shlex.split(line)
        assert words[:4] == [
            "cd",
            "/srv/forgather",
            "&&",
            "FORGATHER_DILOCO_TOKEN_FILE=~/.config/forgather/diloco.token",
        ]
        train = ["-p", "configs/tiny_llama", "train", "--diloco-server", "10.0.0.1:8512"]
        assert words[7:] == [*train, "--steps", "5", "model_project.args.name=a b"]
    assert (tmp_path / "piped").read_text().splitlines() == ["the-token-of-the-server"] * 2
    assert not any("the-token-of-the-server" in word for words in called for word in words)


def test_a_workers_failure_is_the_scripts_and_the_server_is_ended(lan, tmp_path):
    code, _, _ = lan(WORKER_CODE="75", **LAN)
    assert code == 75
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("another_answers", [False, True])
def test_a_server_that_does_not_start_starts_no_workers(lan, tmp_path, another_answers):
    if another_answers:  # at the same address, and with the same token
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "token").write_text("the-token-of-the-server\n")
    code, called, _ = lan(REFUSES="1", **LAN)
    assert code == 2
    assert not any("-tt" in words for words in called)


@pytest.mark.parametrize("missing", ["PROJECT", "ADDRESS", "HOSTS"])
def test_what_is_not_said_is_asked_for(lan, missing):
    code, called, err = lan(**{name: text for name, text in LAN.items() if name != missing})
    assert (code != 0, called, missing in err) == (True, [], True)


@pytest.mark.parametrize("name", ["server", "worker"])
def test_units_of_systemd_start_what_there_is(name, monkeypatch):
    path = LAUNCH / f"forgather-diloco-{name}.service"
    unit = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
    unit.optionxform = str
    unit.read_string(path.read_text())
    service = dict(unit["Service"])
    assert (service["SuccessExitStatus"], service["RestartPreventExitStatus"]) == ("75", "2")
    shown = re.search(r"ARGUMENTS=([^'\\]+)", path.read_text())
    values = {"${PROJECT}": "configs/tiny_llama", "${SERVER}": "10.0.0.1:8512"}
    words = [values.get(word, word) for word in service["ExecStart"].replace("$ARGUMENTS", shown[1]).split()]
    monkeypatch.chdir(LAUNCH.parent)
    command = "diloco" if name == "server" else "train"
    place = words.index(command)
    options = read_options(command, [*words[1:place], *words[place + 1 :]], argv=[])
    if name == "server":
        assert (options.verb, options.num_workers, options.model) == ("server", 2, "my_package")
    else:
        assert options.nproc == 2


def test_scripts_can_be_started():
    assert stat.S_IMODE((LAUNCH / "diloco_lan.sh").stat().st_mode) & 0o111 == 0o111
