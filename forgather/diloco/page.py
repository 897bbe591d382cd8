"""The page that a server shows at `/`: its state, its workers, and curves of its rounds.

The server draws it whole, so that it needs no script to be read; a few lines of script put the newer page in its place.
Nothing is fetched from elsewhere, and `HEADERS` let a browser run nothing but that script. What workers say of
themselves is escaped like everything else.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape

from forgather.diloco.curves import curves
from forgather.diloco.status import ROUND_COLUMNS, WORKER_COLUMNS, Status, headline, round_row, waited_for, worker_row

_SHOWN_ROUNDS = 20

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #6b7280; --good: #15803d; --bad: #b91c1c;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #db2777;
  --c4: #7c3aed; --c5: #0891b2; --c6: #65a30d; --c7: #dc2626; }
@media (prefers-color-scheme: dark) { :root { --quiet: #9ca3af; --good: #4ade80; --bad: #f87171;
  --c0: #60a5fa; --c1: #fbbf24; --c2: #34d399; --c3: #f472b6;
  --c4: #a78bfa; --c5: #22d3ee; --c6: #a3e635; --c7: #f87171; } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .5rem } h2 { font-size: 1rem; margin: 1.5rem 0 .4rem }
p { margin: .1rem 0 } .quiet { color: var(--quiet) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } .text { text-align: left } .live { color: var(--good) } .dead, .kicked { color: var(--bad) }
.charts { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 24rem; max-width: 38rem }
figcaption { font-weight: 600 } svg { width: 100%; height: auto; font: 11px system-ui, sans-serif }
svg text { fill: var(--quiet) } svg .grid { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.6 }
"""

_SCRIPT = """
setInterval(async () => {
  if (document.hidden) return;
  const note = document.getElementById('note');
  try {
    const answer = await fetch(location.href, {cache: 'no-store'});
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
    document.querySelector('main').replaceWith(page.querySelector('main'));
    note.textContent = '';
  } catch (error) {
    note.textContent = 'the server does not answer: this is what it last said';
  }
}, 3000);
"""

HEADERS: Mapping[str, str] = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    + "'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def page(status: Status) -> str:
    """The page as HTML; to be sent with HEADERS."""
    return "".join(
        [
            "<!doctype html>\n<html lang=en><meta charset=utf-8><title>Forgather DiLoCo</title>",
            '<meta name=viewport content="width=device-width">',
            f"<style>{_STYLE}</style><body><h1>Forgather DiLoCo</h1><p id=note class=dead></p>",
            f"<main>{''.join(_content(status))}</main>",
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _content(status: Status) -> Iterator[str]:
    for line in headline(status):
        yield f"<p>{escape(line)}</p>"
    workers = status["workers"]
    yield "<h2>Workers</h2>"
    if workers:
        yield _table(WORKER_COLUMNS, [worker_row(name, workers[name]) for name in sorted(workers)], text=(0, 1, 2, 3))
    else:
        yield "<p class=quiet>nobody has come yet</p>"
    if status["held"]:
        yield "<h2>Open rounds</h2>"
        yield _table(("fragment", "round", "open", "in", "waits for"), list(_open_rounds(status)), text=(3, 4))
    history = status["history"]
    if history:
        yield "<h2>Rounds</h2><div class=charts>"
        for title, key in (
            ("Loss, nats/token", "loss"),
            ("Largest norm of a contribution", "norm"),
            ("Time of a round, s", "seconds"),
        ):
            yield f"<figure><figcaption>{title}</figcaption>{curves(_series(history, key), over='version')}"
            yield "</figure>"
        yield "</div>"
        rows = [[_clock(each["time"]), *round_row(each)] for each in reversed(history[-_SHOWN_ROUNDS:])]
        yield _table(("closed", *ROUND_COLUMNS), rows, text=(0, 3))


def _open_rounds(status: Status) -> Iterator[list[str]]:
    for held in status["held"]:
        yield [
            str(held["fragment"]),
            str(held["round"]),
            f"{held['open_s']:.0f} s",
            ", ".join(held["workers"]),
            ", ".join(waited_for(status, held)),
        ]


def _series(history: Iterable[Mapping[str, object]], key: str) -> dict[str, list[tuple[float, float]]]:
    """For each fragment the value of each of its versions."""
    found: dict[str, list[tuple[float, float]]] = {}
    for closed in history:
        version, value = closed["version"], closed[key]
        points = found.setdefault(f"fragment {closed['fragment']}", [])
        if isinstance(version, int) and isinstance(value, int | float):
            points.append((version, value))
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A table whose columns `text` hold words; cells that are the name of a state have it as their class."""

    def cell(tag: str, place: int, content: str) -> str:
        classes = [*(["text"] if place in text else []), *([content] if content in ("live", "dead", "kicked") else [])]
        kind = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{kind}>{escape(content)}</{tag}>"

    lines = [("th", columns), *(("td", row) for row in rows)]
    body = "".join(
        f"<tr>{''.join(cell(tag, place, each) for place, each in enumerate(row))}</tr>" for tag, row in lines
    )
    return f"<div class=wide><table>{body}</table></div>"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%m-%d %H:%M:%S UTC")
