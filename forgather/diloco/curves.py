"""Curves as inline SVG, for a page that loads nothing from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 34
_COLOURS = 8  # --c0 to --c7 of the page's style

Point = tuple[float, float]


def curves(series: Mapping[str, Sequence[Point]], *, over: str) -> str:
    """One line for each series; what is not finite is left out, and a lone point is a dot."""
    drawn = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return "<p class=quiet>nothing yet</p>"
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6, whole=True), ticks(min(ys), max(ys), 4)
    left, right = min(xs), max(xs)
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img>']
    for value in y_ticks:
        y = place(left, value)[1]
        parts.append(f'<line class=grid x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor=end>{value:.4g}</text>')
    for value in (each for each in x_ticks if left <= each <= right):
        x = place(value, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor=middle>{value:.10g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor=end>{escape(over)}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        colour = f"var(--c{number % _COLOURS})"
        title = f"<title>{escape(name)}</title>"
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" style="fill:{colour}">{title}</circle>')
        elif points:
            path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
            parts.append(f'<polyline points="{path}" style="stroke:{colour}">{title}</polyline>')
    if len(drawn) > 1:
        for number, name in enumerate(list(drawn)[:_COLOURS]):
            x = _LEFT + 60 * number
            parts.append(f'<rect x="{x}" y="{HEIGHT - 11}" width="8" height="8" style="fill:var(--c{number})"/>')
            parts.append(f'<text x="{x + 11}" y="{HEIGHT - 3}">{escape(name.removeprefix("fragment "))}</text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers, at most about `most`, of which the first is not above `low` and the last not below `high`."""
    if not high > low:
        margin = 1.0 if whole else abs(low) * 0.1 or 1.0
        return [low] if whole else [low - margin, low, low + margin]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= most), 10)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]
