"""What a server says of itself: the same facts as a table, a page and metrics, whatever a worker calls itself."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from forgather.diloco.curves import curves, ticks
from forgather.diloco.page import HEADERS, page
from forgather.diloco.prometheus import exposition
from forgather.diloco.status import duration, size, table
from tests.diloco.status_example import closed, example, worker

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\n"


class Reader(HTMLParser):
    """The tags of a page, the text of all but style and script, and the script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.is_script = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.is_script = tag == "script"

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        (self.scripts if self.is_script else self.texts).append(data)


def test_the_table():
    lines = list(table(example()))
    assert lines[0] == "training, sync, up 2 h 10 min"
    assert lines[1] == "version 4 to 5 of 2 fragments, on disk 4; outer optimizer SGD lr 0.7, Nesterov momentum 0.9"
    assert lines[2] == "1 live worker; rounds of 2, or 1 after 10 min 0 s"
    assert (
        lines[4] == "work units: units 64, rows 9,000, epoch 0.91, leased 32, trained 8,192, repeated 16, taken back 0"
    )
    first = next(line for line in lines if line.startswith("box1"))
    assert re.split(r"  +", first) == [
        *("box1", "live", "box1", "shard 2", "1.2 s ago", "1,200", "2.5", "10,240", "3.1416"),
        *("500", "4", "120 MB", "130 MB"),
    ]
    assert "fragment 1, round 4: in 12 s box1, waits for box2" in lines
    assert [line.split()[1] for line in lines[-5:]] == ["3", "3", "4", "4", "5"]
    head = next(number for number, line in enumerate(lines) if line.startswith("worker "))
    place = lines[head].index("heartbeat")
    assert [line[place:].partition(" ago")[0] for line in lines[head + 1 : head + 3]] == ["1.2 s", "1 min 35 s"]


def test_a_server_that_has_just_started():
    status = example() | {"workers": {}, "held": [], "history": [], "ledger": None, "versions": [0], "durable": [0]}
    status["round_timeout_s"] = None
    lines = list(table(status))
    assert lines[1:3] == [
        "version 0; outer optimizer SGD lr 0.7, Nesterov momentum 0.9",
        "0 live workers; rounds of 2",
    ]
    assert len(lines) == 4
    assert "nobody has come yet" in page(status)
    assert "forgather_diloco_version" in exposition(status)


def test_who_is_still_to_come_is_said():
    status = example() | {"state": "waiting", "versions": [0], "durable": [0], "num_workers": 3, "num_awaited": 1}
    status["held"] = [{"fragment": 0, "round": 0, "workers": ["box1"], "expected": ["box1", "box2"], "open_s": 52.0}]
    lines = list(table(status))
    assert lines[2] == "1 live worker; waits for 1 more worker: -n 3"
    assert "fragment 0, round 0: in 52 s box1, waits for box2, 1 more worker" in lines
    assert "box2, 1 more worker" in Reader(page(status)).texts
    later = status | {"num_workers": 4, "num_awaited": 0, "min_workers": 4}
    assert list(table(later))[2] == "1 live worker; waits for 3 more workers: --min-workers 4"


def test_in_an_asynchronous_training_nobody_is_waited_for_once_all_have_come():
    status = example() | {"mode": "async", "round_timeout_s": None}
    lines = list(table(status))
    assert lines[2] == "1 live worker; each contribution makes a version"
    assert "fragment 1: version 4, 12 s old, in box1" in lines
    assert "box2" not in Reader(page(status)).texts[Reader(page(status)).texts.index("waits for") :][:6]
    status |= {"num_awaited": 2, "num_workers": 3}
    begun = table(status | {"versions": [0, 0]})
    assert "fragment 1: version 4, 12 s old, in box1, waits for box2, 2 more workers" in list(begun)
    lines = list(table(status))
    assert lines[2] == "1 live worker; waits for 2 more workers: -n 3"
    assert "fragment 1: version 4, 12 s old, in box1, waits for 2 more workers" in lines


def test_what_is_wrong_and_what_to_do_are_lines_of_their_own():
    trouble = "cannot write /x: No space left on device\n  fix: free space where /x is\x1b[2J"
    lines = list(table(example() | {"trouble": trouble}))
    place = lines.index("TROUBLE: cannot write /x: No space left on device")
    assert lines[place + 1] == "  fix: free space where /x is?[2J"


def test_a_terminal_gets_no_control_characters():
    status = example()
    status["workers"]["box1"] = worker(host=HOSTILE, mesh="\x1b]0;title\x07" + "x" * 200)
    lines = list(table(status))
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 240


def test_what_was_left_out_and_what_is_wrong_is_said():
    status = example() | {"trouble": "no space left"}
    status["history"][-1] |= {"refused": ["box2"], "clipped": ["box1"]}
    lines = list(table(status))
    assert "box1 (clipped), box2 (left out)" in lines[-1]
    assert "TROUBLE: no space left" in lines
    assert "TROUBLE: no space left" in page(status)


def test_a_page_shows_what_workers_say_and_does_nothing_of_it():
    status = example()
    status["workers"][HOSTILE] = worker(host=HOSTILE, mesh=HOSTILE)
    status["history"][-1]["workers"] = [HOSTILE]
    status["held"][0]["workers"] = [HOSTILE]
    status["outer"] = HOSTILE
    read = Reader(page(status))
    assert read.tags.count("script") == len(read.scripts) == 1
    assert "alert" not in read.scripts[0]
    assert sum("<script>alert(1)</script>" in text for text in read.texts) == 6
    assert not {"img", "iframe", "link", "object", "a", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "href")]


def test_a_page_loads_nothing_and_runs_its_own_script_alone():
    text = page(example())
    assert "//" not in text
    digest = base64.b64encode(hashlib.sha256(Reader(text).scripts[0].encode()).digest()).decode()
    policy = dict(part.strip().partition(" ")[::2] for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_a_page_has_its_curves_without_its_script():
    drawings = re.findall(r"<svg.*?</svg>", page(example()))
    assert len(drawings) == 3
    lines = re.findall(r'<polyline points="([^"]*)"[^>]*><title>([^<]*)', drawings[0])
    assert [(name, len(points.split())) for points, name in lines] == [("fragment 0", 5), ("fragment 1", 4)]


def points(text: str) -> list[tuple[float, float]]:
    found = re.search(r'<polyline points="([^"]*)"', text)
    assert found
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]


def test_curves_rise_where_values_do():
    (x0, y0), (x1, y1), (x2, y2) = points(curves({"a": [(0, 1.0), (1, 3.0), (2, 2.0)]}, over="version"))
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 > y2 > y1  # downwards on a page
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)


@pytest.mark.parametrize(
    "values",
    [
        {"a": []},
        {"a": [(1, 2.0)]},
        {"a": [(1, 2.0), (2, 2.0)]},
        {"a": [(1, 0.0), (2, float("nan")), (3, float("inf"))]},
        {"a": [(1, 1e-300), (2, 1e300)], "<b>": [(5, -1.0)]},
        {f"fragment {number}": [(0, 1.0), (1, number)] for number in range(20)},
    ],
)
def test_any_values_make_a_drawing(values):
    text = curves(values, over="<x>")
    if text.startswith("<svg"):
        assert "nan" not in text
        assert "inf" not in text
        sound = re.sub(r"(\w+)=([\w.-]+)(?=[ />])", r'\1="\2"', text)
        ElementTree.fromstring(sound)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.9), (-5, 12345), (1e-9, 2e-9), (7, 7)])
def test_ticks_are_round_and_hold_the_values(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert all(value == int(value) for value in ticks(round(low), round(high), 4, whole=True))


def test_metrics_in_the_text_format():
    status = example()
    status["workers"] = {'a"\\\n': worker(loss=float("nan"))}
    text = exposition(status)
    sample = re.compile(r'forgather_diloco_(\w+)(\{(\w+="([^"\\\n]|\\.)*",?)*\})? (-?[\d.e+-]+|NaN|[+-]Inf)')
    named: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            named[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            assert sample.fullmatch(line), line
            assert line.split("{")[0].split()[0] in named
    assert all((kind == "counter") == name.endswith("_total") for name, kind in named.items())
    assert 'forgather_diloco_worker_loss_nats_per_token{worker="a\\"\\\\\\n"} NaN' in text
    assert 'forgather_diloco_workers{state="live"} 1' in text
    assert 'forgather_diloco_durable_version{fragment="1"} 4' in text
    assert "forgather_diloco_received_bytes_total 240000000" in text
    assert 'forgather_diloco_ledger_rows{state="trained"} 8192' in text
    assert "forgather_diloco_trained_epochs 0.91" in text


def test_what_is_not_known_is_left_out():
    status = example()
    status["history"] = [closed(0, loss=None)]
    text = exposition(status)
    assert "round_loss" not in text
    assert 'worker_loss_nats_per_token{worker="box2"}' not in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.44, "0.4 s"),
        (12, "12 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7800, "2 h 10 min"),
        (3e5, "3 d 11 h"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_sizes():
    assert [size(value) for value in (0, 999, 1000, 1.2e9, 5e13)] == ["0 B", "999 B", "1 kB", "1.2 GB", "50 TB"]
