"""What machines and network were found, what DDP, FSDP and DiLoCo would make of them, and which setting to take."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Self

from forgather.diloco.codec import codec
from forgather.diloco.forecast import (
    CODECS,
    Forecast,
    Link,
    Machine,
    Setting,
    choose,
    forecast_ddp,
    forecast_diloco,
    forecast_fsdp,
)

_SYNC_EVERY = (30, 100, 500)  # the rows that are always shown
_STREAMED = 4  # fragments of the rows with streaming
_HEADINGS = ("", "H", "fragments", "delay", "codec", "bits", "utilisation", "MB a step", "exchange")


@dataclass(frozen=True)
class Plan:
    """Forecasts for these machines, the chosen one last."""

    machines: Sequence[Machine]
    server: Link
    parameters: int
    wished: float
    forecasts: Sequence[Forecast]
    choice: Forecast

    @classmethod
    def make(
        cls,
        machines: Sequence[Machine],
        server: Link,
        parameters: int,
        *,
        num_blocks: int = 1,
        wished: float = 0.95,
    ) -> Self:
        """Forecast all methods for these machines, and choose; streaming where the model has blocks enough."""
        choice = choose(machines, server, parameters, wished=wished, num_blocks=num_blocks)
        forecasts = [forecast_ddp(machines, parameters), forecast_fsdp(machines, parameters)]
        for setting in _shown(num_blocks):
            forecasts.append(forecast_diloco(machines, server, parameters, setting))
        return cls(machines, server, parameters, wished, forecasts, choice)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; a rate that was not measured is null."""
        return {
            "parameters": self.parameters,
            "wished": self.wished,
            "machines": [{"step_s": each.step_s, "link": _link_json(each.link)} for each in self.machines],
            "server": _link_json(self.server),
            "forecasts": [asdict(each) for each in self.forecasts],
            "choice": asdict(self.choice),
        }

    def text(self) -> str:
        """A table for people, and the flags of the choice."""
        return "\n".join([*self._found(), "", *_table([*self.forecasts, self.choice]), "", *self._advice()])

    def _found(self) -> Iterator[str]:
        yield f"{self.parameters:,} parameters, {len(self.machines)} workers"
        for number, machine in enumerate(self.machines):
            yield f"worker {number}: {machine.step_s * 1e3:,.1f} ms a step, {_link_text(machine.link)}"
        yield f"server, for all workers together: {_link_text(self.server)}"

    def _advice(self) -> Iterator[str]:
        setting = self.choice.setting
        assert setting is not None, "what is chosen is a setting of DiLoCo"
        yield f"choice, for {self.wished:.0%} of what these machines can reach (the last row):"
        yield f"  {flags(setting)}"
        slowest_s = max(machine.step_s for machine in self.machines)
        reachable = sum(machine.step_s for machine in self.machines) / (len(self.machines) * slowest_s)
        if self.choice.utilisation < self.wished * reachable:
            yield "  no setting reaches it; this one comes nearest: a faster network or fewer parameters would help"
        if reachable < 0.9:
            yield f"  unequal machines wait for the slowest ({reachable:.0%} at best): --dylu gives each its own steps"
        if forecast_ddp(self.machines, self.parameters).utilisation >= self.wished * reachable:
            yield "  plain data parallel reaches it on this network too, and needs no server"


def flags(setting: Setting) -> str:
    """What `forgather diloco server` is given for this setting."""
    words = f"--sync-every {setting.sync_every} --upload {setting.upload} --download {setting.download}"
    if setting.num_fragments > 1:
        words += f" --fragments {setting.num_fragments}"
    return words if not setting.delay else f"{words} --delay {setting.delay}"


def _shown(num_blocks: int) -> list[Setting]:
    """Settings from which one sees what steps, fragments and bits each bring."""
    found = []
    for sync_every in _SYNC_EVERY:
        for name in CODECS:
            found.append(Setting(sync_every, 1, name, name))
            if num_blocks >= _STREAMED:
                streamed = Setting(sync_every, _STREAMED, name, name)
                found.append(Setting(sync_every, _STREAMED, name, name, streamed.most_delay))
    return found


def _table(forecasts: Sequence[Forecast]) -> list[str]:
    rows = [_HEADINGS, *(_row(forecast) for forecast in forecasts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    aligned = (
        [text.ljust(width) if column in (0, 4) else text.rjust(width) for column, (text, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    )
    return ["  ".join(row).rstrip() for row in aligned]


def _row(forecast: Forecast) -> tuple[str, ...]:
    setting = forecast.setting
    measured = (
        f"{forecast.utilisation:.1%}",
        f"{forecast.bytes_per_step / 1e6:,.2f}",
        f"{forecast.exchange_s:,.2f} s",
    )
    if setting is None:
        return (forecast.method, "1", "", "", "fp32", "32", *measured)
    bits = 8 * codec(setting.upload).encoded_bytes(1 << 20) / (1 << 20)
    return (
        forecast.method,
        str(setting.sync_every),
        str(setting.num_fragments),
        str(setting.delay),
        setting.upload if setting.upload == setting.download else f"{setting.upload}/{setting.download}",
        f"{bits:g}",
        *measured,
    )


def _link_text(link: Link) -> str:
    up, down = (_rate_text(rate) for rate in (link.up_bytes_per_s, link.down_bytes_per_s))
    return f"{up} up, {down} down, {link.latency_s * 1e3:.2f} ms there and back"


def _rate_text(rate: float) -> str:
    return f"{rate * 8 / 1e6:,.0f} Mbit/s" if isfinite(rate) else "no limit"


def _link_json(link: Link) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in asdict(link).items()}
