"""What a person sees: one live line on a real (pseudo-)terminal, plain lines in a pipe, nothing from other ranks."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
import time

import pytest
import torch.distributed as dist

from forgather.metrics.console import Console
from tests.ranks import run_ranks

METRICS = {
    "loss": 4.12345,
    "grad_norm": 0.951,
    "lr": 3e-4,
    "tokens_per_s": 12345.6,
    "peak_memory_bytes": 1.21e9,
    "data_wait_s": 0.01,
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def seen_on_a_terminal(act, *, columns: int = 200) -> str:
    """The bytes that `act(stream)` sends to a terminal that many columns wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        act(stream)
        stream.flush()
        os.set_blocking(ours, False)
        text = b""
        while chunk := _read(ours):
            text += chunk
    os.close(ours)
    return text.decode().replace("\r\n", "\n")  # the terminal's own translation of line ends


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def report_a_run(stream) -> None:
    console = Console(2000, stream)
    console.start(0)
    console.write(10, METRICS)
    console.write(10, {"loss": 4.0, "perplexity": 54.6}, kind="evaluation")
    console.write(20, METRICS | {"loss": 3.5})
    console.note("saved checkpoints/step-00000020 in 0.41 s")
    console.close()


def screen(text: str) -> list[str]:
    """What stays on a screen that was sent `text`: carriage return and erase-line applied."""
    return [line.split("\r\033[2K")[-1] for line in text.split("\n")]


def test_a_pipe_gets_plain_lines_in_fixed_columns_with_units():
    stream = io.StringIO()
    console = Console(2000, stream)
    console.start(0)
    console.tick(1)
    for step, loss in ((9, 11.5), (10, 4.12345), (2000, 0.5)):
        console.write(step, METRICS | {"loss": loss})
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "\033" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert re.fullmatch(
        r"step   10/2000 \| eta \d+:\d\d:\d\d \| loss   4\.1235 nats \|     12,346 tokens/s \| lr 3\.00e-04 "
        r"\| grad norm   0\.951 \|   1\.21 GB",
        lines[1],
    )
    bars = [[place for place, letter in enumerate(line) if letter == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]


def test_a_terminal_gets_one_live_line_and_rows_that_stay():
    lines = screen(seen_on_a_terminal(report_a_run))
    assert len(lines) == 4  # evaluation, note, the live line, and the cursor below it
    assert re.search(r"step   10/2000 \| .*evaluation.* \| loss 4\.0000 nats \| perplexity 54\.6", lines[0])
    assert lines[1] == "saved checkpoints/step-00000020 in 0.41 s"
    assert lines[2].startswith(
        "step 20/2000  eta -:--:--  loss 3.5000 nats  12,346 tokens/s  lr 3.00e-04  grad norm 0.951"
    )
    assert lines[3] == ""


def test_color_is_on_terminals_only_and_never_with_no_color(monkeypatch):
    assert "\033[36m" in seen_on_a_terminal(report_a_run)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\033\[\d*m", seen_on_a_terminal(report_a_run))
    monkeypatch.setenv("NO_COLOR", "")
    assert "\033[36m" in seen_on_a_terminal(report_a_run)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = seen_on_a_terminal(report_a_run)
    assert "\033" not in text
    assert len(text.splitlines()) == 4


def test_a_narrow_terminal_never_wraps_the_live_line():
    assert all(len(line) < 40 for line in screen(seen_on_a_terminal(report_a_run, columns=40))[2:])


def test_the_live_line_moves_between_log_steps_but_not_more_than_ten_times_a_second(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def act(stream) -> None:
        nonlocal now
        console = Console(1000, stream)
        console.start(0)
        for step in range(1, 101):
            now += 0.01
            console.tick(step)

    drawn = seen_on_a_terminal(act).count("step")
    assert 10 <= drawn <= 12
    # 10 ms a step, 900 or so to go.
    assert "eta 0:00:09" in screen(seen_on_a_terminal(act))[-1]


def test_the_pace_is_that_of_this_part_of_the_run_without_its_first_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    console = Console(1000, stream)
    console.start(500)
    console.write(500, METRICS)
    now = 60.0  # compiling
    console.tick(501)
    now = 80.0
    console.write(511, METRICS)
    assert re.findall(r"eta (\S+)", stream.getvalue()) == ["-:--:--", "0:16:18"]  # 489 steps of 2 s


def test_a_sample_is_shown_whole_and_cannot_command_the_terminal():
    stream = io.StringIO()
    Console(100, stream).write(50, {"prompt": "def", "text": "def \033[31mrun\x07():\n    return é"}, kind="sample")
    assert stream.getvalue().splitlines() == [
        "step  50/100 | sample | prompt def",
        "    def \ufffd[31mrun\ufffd():",
        "        return é",
    ]


def test_a_stream_that_cannot_write_a_character_replaces_it():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(100, stream).note("naïve")
    assert raw.getvalue() == b"na?ve\n"


def speak_on_a_rank() -> str:
    stream = io.StringIO()
    report_a_run(stream)
    return f"{dist.get_rank()}:{len(stream.getvalue().splitlines())}"


def test_only_rank_0_speaks():
    assert run_ranks(2, speak_on_a_rank) == ["0:4", "1:0"]
