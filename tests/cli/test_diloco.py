"""`forgather diloco`: a server starts from any model, is asked and told things, and goes on where it stopped."""

import json
import os
import re
import shutil
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forgather.cli.diloco_model import served_model
from forgather.cli.diloco_serving import addresses
from forgather.cli.main import main
from forgather.diloco.package_service import package_digest
from forgather.distributed.network import interfaces
from forgather.models.construct import construct
from forgather.models.package import Package
from tests.conversion.small_llama import llama
from tests.models.example import package as example_package


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Package:
    """A package without weights."""
    built = example_package(tmp_path_factory.mktemp("models") / "tiny")
    built.write()
    return built


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    """Runs `forgather diloco ...` in a folder of its own; returns its code, out and err."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "FORGATHER_DILOCO_TOKEN", "FORGATHER_DILOCO_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["diloco", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --- what is refused before anything is bound or written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "'0' is not a number of 1 or more"),
        ([], "how many workers"),
        (["-n", "2", "--min-workers", "3"], "--min-workers 3 is more than -n 2"),
        (["-n", "2", "--sync-every", "2", "--fragments", "3"], "3 fragments"),
        (["-n", "2", "--fragments", "50"], "fragments"),
        (["-n", "2", "--fragments", "0"], "'0' is not a number"),
        (["-n", "2", "--delay", "500"], "--delay 500 is as long as"),
        (["-n", "2", "--sync-every", "9", "--fragments", "3", "--delay", "3"], "--delay 3 is as long as the 3 steps"),
        (["-n", "2", "--upload", "fp8"], "invalid choice: 'fp8'"),
        (["-n", "2", "--outer-lr", "nan"], "'nan' is not a number"),
        (["-n", "2", "--alpha", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["-n", "2", "--alpha", "0.5"], "--alpha 0.5 is a part of the progress made in the steps of --delay"),
        (["-n", "2", "--delayed-nesterov", "3"], "--delayed-nesterov needs --async"),
        (["-n", "2", "--outer", "Adamm"], "Adamm"),
        (["-n", "2", "--outer", "AdamW [1]"], "is no optimizer"),
        (["-n", "2", "--outer", "AdamW {bettas: 1}"], "bettas"),
        (["-n", "2", "--outer", "AdamW", "--no-nesterov"], "exclude each other"),
        (["-n", "2", "--dylu", "--round-seconds", "60"], "exclude each other"),
        (["-n", "2", "--async", "--min-workers", "2"], "--async and --min-workers exclude each other"),
        (["-n", "2", "--async", "--norm-guard", "clip"], "--async and --norm-guard exclude each other"),
        (["-n", "2", "--host", "0.0.0.0", "--no-auth"], "whoever reaches this machine"),
        (["-n", "2", "--host", "192.0.2.77"], "cannot listen on 192.0.2.77"),
        (["-n", "2", "--port", "99999"], "is not a port"),
        (["-n", "2", "--tls-cert", "absent.pem"], "--tls-cert needs --tls-key"),
        (["-n", "2", "--tls-cert", "absent.pem", "--tls-key", "absent.pem"], "absent.pem cannot be read"),
        (["-n", "2", "--client-ca", "absent.pem"], "--client-ca needs"),
        (["-n", "2", "--token-file", "/etc/passwd"], "others than its owner may read"),
        (["-n", "2", "--save-every", "0"], "'0' is not a number"),
        (["-n", "2", "hidden_size=8"], "overrides a config, and the model is that of -m"),
        (["-n", "2", "fast"], "takes no word 'fast'"),
    ],
)
def test_what_cannot_be_served_is_told_and_leaves_nothing(said, package, tmp_path, monkeypatch, words, message):
    def never(coroutine):
        coroutine.close()
        raise AssertionError("it is about to serve")

    monkeypatch.setattr("asyncio.run", never)
    code, _, err = said("server", "-m", package.dir, "--port", 0, *words)
    assert code == 2
    assert message in err
    assert "fix:" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_load_is_told(said, package, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for path in (empty, broken, tmp_path / "absent"):
        code, _, err = said("server", "-m", path, "-n", 1, "--port", 0)
        assert code == 2, err
        assert str(path) in err
        assert "Traceback" not in err
    code, _, err = said("server", "-n", 1, "--port", 0)
    assert (code, "-m PATH" in err) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_is_told_before_the_model_is_loaded(said, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code, _, err = said("server", "-m", tmp_path / "absent", "-n", 1, "--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in err


def test_a_token_that_cannot_be_made_leaves_no_folder(said, package, tmp_path):
    code, _, err = said("server", "-m", package.dir, "-n", 1, "--port", 0, "--token-file", "/proc/absent/token")
    assert (code, "the token cannot be written to /proc/absent/token" in err) == (2, True)
    assert not (tmp_path / "runs" / "diloco").exists()


@pytest.mark.parametrize("below", ["", "below"])
def test_a_folder_that_cannot_be_made_is_no_server_to_be_ended(said, package, tmp_path, below):
    (tmp_path / "file").touch()
    code, _, err = said("server", "-m", package.dir, "-n", 1, "--port", 0, "-o", tmp_path / "file" / below)
    assert (code, "cannot open the run folder" in err, "make the folder writable" in err) == (2, True, True)
    assert "shutdown" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "--server", "127.0.0.1:1"], "no DiLoCo server at 127.0.0.1:1"),
        (["status", "--server", "http://a b"], "is no address of a server"),
        (["status", "--server", "127.0.0.1:70000"], "is no address of a server"),
        (["status", "--token-file", "absent"], "the token file absent cannot be read"),
        (["status", "--tls-cert", "a.pem"], "a certificate and its key are given together"),
        (["control", "stop"], "unknown action 'stop'"),
        (["control", "kick"], "cannot make anything of no argument"),
        (["control", "save", "now"], "cannot make anything of now"),
        (["control", "command", "decay"], "cannot make anything of decay"),
        (["control", "set", "outer_lr=fast"], "'outer_lr=fast' is not NAME=NUMBER"),
        (["plan", "--mbit", "100", "--server", "127.0.0.1:1"], "either measured or given"),
        (["plan", "--step-seconds", "1", "--parameters", "1M"], "either measured or given"),
        (["plan", "--mbit", "fast"], "'fast' is not a number above 0"),
        (["plan", "--mbit", "9", "--parameters", "30Q"], "'30Q' is not a number of parameters"),
        (["plan", "--mbit", "9", "--step-seconds", "1", "--step-seconds", "2", "-n", "3"], "-n multiplies one"),
        (["plan", "--server", "127.0.0.1:1", "--step-seconds", "1", "--parameters", "1M"], "no DiLoCo server"),
        (["cert", "made", "--days", "0"], "'0' is not a number of days"),
        (["cert", "made", "--host", "a b"], "neither the name nor the address"),
    ],
)
def test_what_cannot_be_asked_is_told(said, tmp_path, words, message):
    code, _, err = said(*words)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


# --- what a server begins with


def test_a_package_without_weights_begins_as_a_plain_run_with_that_seed(package):
    values, _ = served_model(package.dir).first_values(seed=7)
    plain = dict(construct(package.dir, "cpu", seed=7).named_parameters())
    assert values.keys() == plain.keys()
    assert all(torch.equal(values[name], plain[name]) for name in plain)
    other, _ = served_model(package.dir).first_values(seed=8)
    assert not torch.equal(other["model.embed_tokens.weight"], values["model.embed_tokens.weight"])


def test_a_hugging_face_folder_begins_with_its_weights(tmp_path):
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    served = served_model(tmp_path)
    values, _ = served.first_values(seed=0)
    assert served.shapes == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert "lm_head.weight" not in values  # tied: under its first name alone
    assert all(torch.equal(values[name], value.float()) for name, value in model.named_parameters())


def test_the_model_of_a_config_begins_with_what_a_run_of_it_begins_with(package, tmp_path):
    model = construct(package.dir, "cpu", seed=9)
    model.save_pretrained(tmp_path / "weights")
    values, _ = served_model(package.dir, tmp_path / "weights").first_values(seed=0)
    assert all(torch.equal(values[name], value) for name, value in model.named_parameters())
    assert served_model(package.dir, tmp_path / "weights").package_digest == package.digest


def test_values_that_are_not_finite_are_no_beginning(said, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    model.save_pretrained(tmp_path / "model")
    code, _, err = said("server", "-m", tmp_path / "model", "-n", 1, "--port", 0)
    assert code == 2
    assert "not finite in model.norm.weight" in err


def test_where_workers_find_a_server_that_listens_everywhere():
    found = addresses("0.0.0.0")
    outside = {str(each.address): each.name for each in interfaces() if not each.address.is_loopback}
    assert found
    if outside:
        assert {address for address, _ in found} <= set(outside)
    assert addresses("127.0.0.1")[0][0] == "127.0.0.1"
    assert addresses("box.example.org") == [("box.example.org", "")]


# --- a server that lives


@pytest.fixture
def serve(said):
    """Runs `forgather diloco server`, on a free port of loopback, and a script beside it that is given the address.

    When the script has ended, SIGTERM ends the server, unless the script has done so, and says it by True. Returns the
    exit code.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(folder: Path, script: Callable[[str], bool | None], *words: object) -> int:
        log = folder / "logs" / "run.log"
        known = len(log.read_text()) if log.exists() else 0
        problems: list[BaseException] = []
        ended = threading.Event()

        def beside() -> None:
            is_ended: bool | None = False
            while not ended.wait(0.02):
                text = log.read_text()[known:] if log.exists() else ""
                found = re.search(r"workers: --diloco-server (\S+)\n(.*\n)*.*token", text)
                if found:
                    break
            else:
                return
            try:
                is_ended = script(found[1])
            except BaseException as error:  # noqa: BLE001  told in the test's own thread
                problems.append(error)
            if not is_ended:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=beside)
        thread.start()
        try:
            code = main(["diloco", "server", "-n", "2", "--port", "0", "-o", str(folder), *map(str, words)])
        finally:
            ended.set()
            thread.join()
        if problems:
            raise problems[0]
        return code

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_server_is_asked_and_told_and_ended(said, serve, package, tmp_path, monkeypatch):
    folder = tmp_path / "served"

    def script(address: str) -> None:
        token = (folder / "token").read_text().strip()
        at = ("--server", address)
        assert said("status", *at)[0] == 2
        monkeypatch.setenv("FORGATHER_DILOCO_TOKEN", "x" * 30)
        code, _, err = said("status", *at)
        assert (code, "has another token" in err, "x" * 30 in err) == (2, True, False)
        monkeypatch.setenv("FORGATHER_DILOCO_TOKEN_FILE", str(folder / "token"))

        status = json.loads(said("status", *at, "--json")[1])
        assert (status["state"], status["versions"], status["num_workers"]) == ("waiting", [0, 0], 2)
        assert status["model"]["parameters"] == construct(package.dir).num_parameters()
        shown = said("status", *at)[1]
        assert shown.startswith("waiting, sync, up ")
        assert "0 live workers; waits for 2 more workers: -n 2\n" in shown

        said_set = said("control", *at, "set", "outer_lr=0.5", "min_workers=2")
        assert said_set[1] == "from the next round on: outer_lr 0.5, min_workers 2\n"
        assert json.loads(said("status", *at, "--json")[1])["min_workers"] == 2
        code, _, err = said("control", *at, "set", "outer_lrr=1")
        assert (code, "cannot set outer_lrr" in err) == (2, True)
        code, _, err = said("control", *at, "kick", "nobody")
        assert (code, "no worker 'nobody'" in err) == (2, True)
        assert said("control", *at, "command", "save")[1].endswith("nobody, as nobody is there\n")
        assert said("control", *at, "save")[1] == "saved step 0\n"
        for path, kind in (("/", "text/html"), ("/metrics", "text/plain"), ("/v1/package", "application/x-tar")):
            request = urllib.request.Request(f"http://{address}{path}", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.headers.get_content_type() == kind
                assert token.encode() not in answer.read()
            with pytest.raises(urllib.error.HTTPError, match="401") as refused:
                urllib.request.urlopen(f"http://{address}{path}", timeout=30)
            refused.value.close()
        measured = ("--step-seconds", 0.5, "-n", 3, "--parameters", "1M", "--probe-seconds", 0.3, "--json")
        plan = json.loads(said("plan", *at, *measured)[1])
        assert len(plan["machines"]) == 3
        assert 0 < plan["server"]["latency_s"] < 1
        assert plan["server"]["up_bytes_per_s"] > 1e5
        code, _, err = said("package", tmp_path / "fetched", *at)
        assert (code, "--trust-server-code" in err, (tmp_path / "fetched").exists()) == (2, True, False)
        code, out, _ = said("package", tmp_path / "fetched", *at, "--trust-server-code")
        assert package_digest(Path(out.strip())) == package.digest
        code, _, err = said("server", "-m", package.dir, "-n", 1, "--port", 0, "-o", folder)
        assert (code, "is used by a live run" in err, "control shutdown" in err) == (2, True, True)

    assert serve(folder, script, "-m", package.dir, "--fragments", 2, "--seed", 3) == 75
    token = (folder / "token").read_text().strip()
    assert "SIGTERM: the server saves and ends" in (folder / "logs" / "run.log").read_text()
    kept = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert kept == [folder / "token"]

    # What it has saved is a checkpoint as any other, and a model to begin with.
    values, _ = served_model(folder).first_values(seed=0)
    plain = construct(package.dir, "cpu", seed=3)
    assert all(torch.equal(values[name], value) for name, value in plain.named_parameters())
    assert main(["export", str(folder), str(tmp_path / "exported")]) == 0


def test_a_server_goes_on_without_its_model_and_with_tls(said, serve, package, tmp_path):
    folder, made = tmp_path / "served", tmp_path / "certificates"
    assert serve(folder, lambda address: False, "-m", package.dir) == 75
    token = (folder / "token").read_text()
    code, out, _ = said("cert", made, "--host", "127.0.0.1", "--client", "worker")
    assert (code, f"wrote {made}/ca.pem" in out) == (0, True)

    def script(address: str) -> bool:
        at = ("--server", address)
        known = ("--tls-ca", made / "ca.pem")
        assert said("status", *at, *known, "--token-file", folder / "token")[0] == 0
        assert said("status", *at, *known)[0] == 2
        mine = (*known, "--tls-cert", made / "worker.pem", "--tls-key", made / "worker-key.pem")
        assert said("status", *at, *mine)[0] == 0
        code, _, err = said("status", *at)
        assert (code, "--tls-ca" in err) == (2, True)
        said("cert", tmp_path / "foreign", "--host", "127.0.0.1", "--client", "worker")
        code, _, err = said("status", *at, "--tls-ca", tmp_path / "foreign" / "ca.pem")
        assert (code, "is not one to trust" in err) == (2, True)
        strange = ("--tls-cert", tmp_path / "foreign" / "worker.pem")
        strange = (*strange, "--tls-key", tmp_path / "foreign" / "worker-key.pem")
        code, _, err = said("status", *at, *known, *strange, "--token-file", folder / "token")
        assert (code, "accept this certificate" in err, "--client-ca" in err) == (2, True, True)
        return said("control", *at, *mine, "shutdown")[0] == 0

    tls = ("--tls-cert", made / "server.pem", "--tls-key", made / "server-key.pem", "--client-ca", made / "ca.pem")
    assert serve(folder, script, *tls) == 0
    assert "going on from" in (folder / "logs" / "run.log").read_text()
    assert (folder / "token").read_text() == token


CONFIG = """
package: !singleton:tests.models.example:package
  folder: !singleton:pathlib:Path [FOLDER]
  hidden_size: 64
"""


def test_a_folder_with_a_model_is_told_of_another_and_says_what_has_no_effect(
    said, serve, tmp_path, capsys, monkeypatch
):
    folder, project = tmp_path / "served", tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    (project / "project.yaml").write_text("default: small\n")
    (project / "configs" / "small.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path / "models" / "small")))
    other = example_package(tmp_path / "other", hidden_size=32)
    other.write()
    again = ("server", "-n", 1, "--port", 0, "-o", folder)

    def log() -> str:
        return (folder / "logs" / "run.log").read_text()

    def last_start(*words: object) -> str:
        before = len(log())
        assert serve(folder, lambda address: False, *words) == 75
        return log()[before:]

    assert serve(folder, lambda address: False, "-p", project, "--seed", 7) == 75
    assert "drawn with seed 7" in log()
    assert "without effect" not in log()
    assert "without effect" not in last_start()
    assert "without effect: the config that is given and --seed 8," in last_start("-p", project, "--seed", 8)
    written = log()
    for words, named in (
        (("-p", project, "package.hidden_size=32"), "the config that is given"),
        (("-m", other.dir), f"-m {other.dir}"),
    ):
        with monkeypatch.context() as never:
            never.setattr("asyncio.run", None)  # it is not to serve
            code, _, err = said(*again, *words)
        assert (code, f"made before, is not that of {named}" in err, "-o ANOTHER" in err) == (2, True, True), err
    assert log() == written
    # Nothing but the folder is needed to go on.
    shutil.rmtree(project)
    capsys.readouterr()
    assert "without effect: the config that is given," in last_start("-p", project)
    assert "warning: the config that is given cannot be compared" in capsys.readouterr().err
    values, _ = served_model(folder).first_values(seed=0)
    plain = dict(construct(tmp_path / "models" / "small", "cpu", seed=7).named_parameters())
    assert all(torch.equal(values[name], value) for name, value in plain.items())


def test_a_plan_of_given_numbers(said):
    words = ["plan", "--mbit", 100, "--step-seconds", 0.5, "--step-seconds", 0.8, "--parameters", "30M"]
    code, out, _ = said(*words, "--json")
    plan = json.loads(out)
    assert (code, plan["parameters"], [each["step_s"] for each in plan["machines"]]) == (0, 30_000_000, [0.5, 0.8])
    assert plan["server"]["up_bytes_per_s"] == 12.5e6
    text = said(*words)[1]
    assert "--sync-every" in text
    assert "DDP" in text


def test_watching_goes_on_until_it_is_interrupted(said, monkeypatch):
    from tests.diloco.status_example import example

    rounds = []

    def ask(*_: object, **__: object) -> object:
        rounds.append(1)
        return example()

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("forgather.diloco.address.ServerAddress.ask", ask)
    monkeypatch.setattr("time.sleep", sleep)
    code, out, _ = said("status", "-w", "--interval", "0.5", "--json")
    assert code == 0
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["training"] * 3
