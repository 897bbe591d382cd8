"""What a server says of itself (`GET /v1/status`) as a table for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Status = Mapping[str, Any]


def table(status: Status) -> Iterator[str]:
    """The lines: the server, its open rounds, its workers, its last rounds."""
    yield from headline(status)
    workers = status["workers"]
    if workers:
        yield ""
        yield from aligned([WORKER_COLUMNS, *(worker_row(name, workers[name]) for name in sorted(workers))])
    yield from (_open_round(status, held) for held in status["held"])
    if status["history"]:
        yield ""
        yield from aligned([ROUND_COLUMNS, *(round_row(each) for each in status["history"][-5:])])


def headline(status: Status) -> Iterator[str]:
    """A few lines on the server as a whole."""
    live = sum(worker["state"] == "live" for worker in status["workers"].values())
    versions, durable = status["versions"], status["durable"]
    saved = "" if versions == durable else f", on disk {_spread(durable)}"
    fragments = f" of {len(versions)} fragments" if len(versions) > 1 else ""
    yield f"{status['state']}, {status['mode']}, up {duration(status['uptime_s'])}"
    yield f"version {_spread(versions)}{fragments}{saved}; outer optimizer {status['outer']}"
    yield f"{live} live worker{'s' if live != 1 else ''}; {_rounds(status, live)}"
    for number, line in enumerate((status.get("trouble") or "").splitlines()):  # why, and what to do
        yield f"{'  ' if number else 'TROUBLE: '}{printable(line.strip(), 200)}"
    model = status["model"]
    yield (
        f"{model['parameters']:,} parameters, {size(model['bytes'])}; received {size(status['bytes_up'])}, "
        f"sent {size(status['bytes_down'])}; {status['refused']} refused"
    )
    ledger = status["ledger"]
    if ledger:
        # How many rows there are is known when the first worker has come.
        known = {name.replace("_", " "): value for name, value in ledger.items() if value is not None}
        yield "work units: " + ", ".join(f"{name} {_plain(value)}" for name, value in known.items())


def _rounds(status: Status, live: int) -> str:
    """Who is still to come before any round closes; once all are there, what a round is made of."""
    if status["num_awaited"]:
        return f"waits for {_more(status['num_awaited'])}: -n {status['num_workers']}"
    if status["mode"] == "async":
        return "each contribution makes a version"
    if status["state"] == "waiting" and live < status["min_workers"]:
        return f"waits for {_more(status['min_workers'] - live)}: --min-workers {status['min_workers']}"
    timeout = status["round_timeout_s"]
    quorum = f", or {status['min_workers']} after {duration(timeout)}" if timeout else ""
    return f"rounds of {status['num_workers']}{quorum}"


def _open_round(status: Status, held: Mapping[str, Any]) -> str:
    who, missing = ", ".join(held["workers"]), waited_for(status, held)
    waits = f", waits for {', '.join(missing)}" if missing else ""
    where, age = f"fragment {held['fragment']}", duration(held["open_s"])
    if status["mode"] == "async":
        return f"{where}: version {held['round']}, {age} old{f', in {who}' if who else ''}{waits}"
    return f"{where}, round {held['round']}: in {age} {who or 'nobody'}{waits}"


def waited_for(status: Status, held: Mapping[str, Any]) -> list[str]:
    """Whom an open round waits for: workers by name, and how many that are still to come."""
    missing = sorted(set(held["expected"]) - set(held["workers"]))
    # In an asynchronous training nobody waits for another, once it has begun with all.
    named = [] if status["mode"] == "async" and any(status["versions"]) else missing
    return [*named, _more(status["num_awaited"])] if status["num_awaited"] else named


def _more(count: int) -> str:
    return f"{count} more worker{'s' if count != 1 else ''}"


WORKER_COLUMNS = (
    "worker",
    "state",
    "host",
    "mesh",
    "heartbeat",
    "steps",
    "steps/s",
    "tokens/s",
    "loss",
    "H",
    "rounds",
    "sent",
    "received",
)


def worker_row(name: str, worker: Mapping[str, Any]) -> list[str]:
    """The cells of one worker, in the order of WORKER_COLUMNS."""
    return [
        printable(name),
        worker["state"],
        printable(worker["host"]),
        printable(worker["mesh"]),
        f"{duration(worker['last_heartbeat_s'])} ago",
        _count(worker["steps"]),
        number(worker["steps_per_s"]),
        _count(worker["tokens_per_s"]),
        "" if worker["loss"] is None else f"{worker['loss']:.4f}",
        _count(worker["sync_every"]),
        _count(worker["counted"]),
        size(worker["bytes_up"]),
        size(worker["bytes_down"]),
    ]


ROUND_COLUMNS = ("fragment", "version", "workers", "tokens", "norm", "loss", "took")


def round_row(closed: Mapping[str, Any]) -> list[str]:
    """The cells of one closed round, in the order of ROUND_COLUMNS."""
    loss = closed["loss"]
    return [
        str(closed["fragment"]),
        str(closed["version"]),
        ", ".join(_contributors(closed)),
        _count(closed["tokens"]),
        number(closed["norm"]),
        "" if loss is None else f"{loss:.4f}",
        duration(closed["seconds"]),
    ]


def _contributors(closed: Mapping[str, Any]) -> Iterator[str]:
    for name in closed["workers"]:
        is_left_out, is_clipped = (name in closed.get(key, ()) for key in ("refused", "clipped"))
        yield f"{printable(name)}{' (left out)' if is_left_out else ' (clipped)' if is_clipped else ''}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines with columns of one width."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def printable(text: str, most: int = 40) -> str:
    """What a worker says of itself, without what would move a terminal's cursor."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def size(num_bytes: float) -> str:
    """A number of bytes with three digits: `1.21 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB" if num_bytes < 1000 else f"{num_bytes:,.0f} TB"


def duration(seconds: float) -> str:
    """Seconds as people say them: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if whole < 60:
        return f"{whole} s"
    if minutes < 60:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def number(value: float | None) -> str:
    """Three digits; nothing for what nobody has measured."""
    return "" if value is None else f"{value:.3g}" if math.isfinite(value) else str(value)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)


def _spread(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
