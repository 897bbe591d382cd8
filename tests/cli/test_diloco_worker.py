"""`forgather diloco worker ... train ...` is `forgather train --diloco-server`, and refuses what it cannot be."""

import pytest

from forgather.cli.diloco_worker import as_train
from forgather.cli.parser import UsageError


def test_a_worker_is_a_train_command_with_a_server():
    line = "-p here diloco worker --server 10.0.0.1:8512 --worker=alpha -t small train --steps 5 -- --nnodes 2"
    same = "-p here train --diloco-server 10.0.0.1:8512 --diloco-worker alpha --config small --steps 5 -- --nnodes 2"
    assert as_train(line.split(), {}) == same.split()


def test_the_h_that_is_expected_is_a_word_of_the_config():
    line = "diloco worker --server a --sync-every 20 train"
    assert as_train(line.split(), {}) == ["train", "--diloco-server", "a", "--diloco-sync-every", "20"]


def test_secrets_go_into_the_environment_and_not_into_the_line(tmp_path):
    environ: dict[str, str] = {}
    line = ["diloco", "worker", "--server", "a", "--token-file", str(tmp_path / "token"), "train"]
    assert as_train(line, environ) == ["train", "--diloco-server", "a"]
    assert environ == {"FORGATHER_DILOCO_TOKEN_FILE": str(tmp_path / "token")}


@pytest.mark.parametrize("line", ["train --steps 3", "diloco status", "diloco server -p train", "diloco worker --help"])
def test_other_lines_are_left_alone(line):
    assert as_train(line.split(), {}) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("diloco worker train", "needs a server"),
        ("diloco worker --server a --steps train", "--steps is no flag"),
    ],
)
def test_what_is_missing_or_misplaced_is_said(line, said):
    with pytest.raises(UsageError, match=said):
        as_train(line.split(), {})
