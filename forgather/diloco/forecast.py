"""How much of their time machines would spend training: with DDP, with FSDP, and with DiLoCo, over a given network.

Utilisation is the time that all machines compute, over the time that passes for all of them. Sizes are in bytes, and
rates in bytes a second: 1 Gbit/s is 125e6. A link carries both directions at once.

Predictions are kind to the alternatives: a collective needs one latency for each of its rings' hops and no more, DDP
sends while the backward pass runs, FSDP while any of the step does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

from forgather.diloco.codec import codec

BACKWARD = 2 / 3  # the part of a step that the backward pass takes, in which DDP sends gradients
FP32_BYTES = 4
# What is tried, in this order. H of 30 costs almost no quality (docs/explain/diloco-quality.md); more costs more.
SYNC_EVERY = (30, 50, 100, 200, 300, 500, 1000, 2000)
CODECS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Link:
    """What a machine's network gives, in both directions as seen from the machine; `latency_s` is there and back."""

    up_bytes_per_s: float = inf
    down_bytes_per_s: float = inf
    latency_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A worker: how long one of its optimizer steps takes, and its link."""

    step_s: float
    link: Link = Link()


@dataclass(frozen=True)
class Setting:
    """How DiLoCo is run. A `delay` is the steps that are made while an exchange is under way, up to `most_delay`."""

    sync_every: int
    num_fragments: int = 1
    upload: str = "bf16"
    download: str = "bf16"
    delay: int = 0

    @property
    def most_delay(self) -> int:
        """With one step more the next fragment would be due before the one before it has come."""
        return max(0, self.sync_every // self.num_fragments - 1)


@dataclass(frozen=True)
class Forecast:
    """What would come of it. `exchange_s` is how long one is under way: of all parameters, or of a fragment."""

    method: str
    utilisation: float
    bytes_per_step: float  # that the busiest worker sends and receives
    exchange_s: float
    setting: Setting | None = None


def forecast_ddp(machines: Sequence[Machine], parameters: int) -> Forecast:
    """Gradients in fp32, all-reduced in a ring each step, as far as can be while the backward pass runs."""
    ranks = len(machines)
    each_way = 2 * (ranks - 1) / ranks * FP32_BYTES * parameters
    exchange_s = _ring_s(machines, each_way, passes=2)
    slowest_s = max(machine.step_s for machine in machines)
    passed_s = (1 - BACKWARD) * slowest_s + max(BACKWARD * slowest_s, exchange_s)
    return Forecast("DDP", _computing_s(machines) / (ranks * passed_s), 2 * each_way, exchange_s)


def forecast_fsdp(machines: Sequence[Machine], parameters: int) -> Forecast:
    """Parameters gathered for forward and again for backward, gradients reduce-scattered; in fp32, each step."""
    ranks = len(machines)
    each_way = 3 * (ranks - 1) / ranks * FP32_BYTES * parameters
    exchange_s = _ring_s(machines, each_way, passes=3)
    passed_s = max(max(machine.step_s for machine in machines), exchange_s)
    return Forecast("FSDP", _computing_s(machines) / (ranks * passed_s), 2 * each_way, exchange_s)


def forecast_diloco(
    machines: Sequence[Machine], server: Link, parameters: int, setting: Setting, *, outer_s: float = 0.0
) -> Forecast:
    """Both legs, up and down, through the server's link, which all workers share; `outer_s`: the server's own work.

    A round waits for the slowest. Fragments are taken for equal; what of an exchange lasts longer than `delay` steps of
    the fastest machine is waited for.
    """
    steps_s = setting.sync_every * max(machine.step_s for machine in machines)
    exchange_s = _exchange_s(machines, server, parameters, setting, outer_s)
    hidden_s = min(setting.delay, setting.most_delay) * min(machine.step_s for machine in machines)
    passed_s = steps_s + setting.num_fragments * max(0.0, exchange_s - hidden_s)
    computing_s = setting.sync_every * _computing_s(machines)
    up, down = _sizes(parameters, setting)
    return Forecast(
        "DiLoCo",
        computing_s / (len(machines) * passed_s),
        (up + down) / setting.sync_every,
        exchange_s,
        setting,
    )


def choose(
    machines: Sequence[Machine],
    server: Link,
    parameters: int,
    *,
    wished: float = 0.95,
    num_blocks: int = 1,
    outer_s: float = 0.0,
) -> Forecast:
    """The gentlest setting that reaches `wished` of what these machines can reach, or the best where none does.

    Unequal machines wait for the slowest, whatever the network; that share is not counted against a setting. First the
    fewest steps between exchanges, then classic before streaming, then the finest codec. Streaming has up to
    `num_blocks` fragments, and the shortest delay that hides an exchange.
    """
    slowest_s = max(machine.step_s for machine in machines)
    reachable = _computing_s(machines) / (len(machines) * slowest_s)
    best: Forecast | None = None
    for setting in _settings(machines, server, parameters, num_blocks, outer_s):
        forecast = forecast_diloco(machines, server, parameters, setting, outer_s=outer_s)
        if forecast.utilisation >= wished * reachable:
            return forecast
        if best is None or forecast.utilisation > best.utilisation:
            best = forecast
    assert best is not None, "there are settings"
    return best


def _settings(
    machines: Sequence[Machine], server: Link, parameters: int, num_blocks: int, outer_s: float
) -> list[Setting]:
    """All that are tried, the gentlest first."""
    found = []
    fastest_s = min(machine.step_s for machine in machines)
    counts = [1, *(count for count in (2, 4, 8, 16) if count <= num_blocks)]
    for sync_every in SYNC_EVERY:
        for num_fragments in counts:
            for name in CODECS:
                setting = Setting(sync_every, num_fragments, name, name)
                if num_fragments > 1:
                    needed = _exchange_s(machines, server, parameters, setting, outer_s) / fastest_s
                    delay = setting.most_delay if needed > setting.most_delay else ceil(needed)
                    setting = replace(setting, delay=delay)
                found.append(setting)
    return found


def _computing_s(machines: Sequence[Machine]) -> float:
    return sum(machine.step_s for machine in machines)


def _ring_s(machines: Sequence[Machine], each_way: float, passes: int) -> float:
    """How long a ring takes in which each sends and receives as many bytes, at the slowest link's rate."""
    if len(machines) == 1:
        return 0.0
    rate = min(min(machine.link.up_bytes_per_s, machine.link.down_bytes_per_s) for machine in machines)
    # One hop is one way: half of there and back.
    hops_s = passes * (len(machines) - 1) * max(machine.link.latency_s for machine in machines) / 2
    return each_way / rate + hops_s


def _sizes(parameters: int, setting: Setting) -> tuple[int, int]:
    return codec(setting.upload).encoded_bytes(parameters), codec(setting.download).encoded_bytes(parameters)


def _exchange_s(machines: Sequence[Machine], server: Link, parameters: int, setting: Setting, outer_s: float) -> float:
    """From the end of a step to the new values of one fragment: up from all, the outer step, down to all."""
    up, down = (size / setting.num_fragments for size in _sizes(parameters, setting))
    links = [machine.link for machine in machines]
    up_s = max(*(up / link.up_bytes_per_s for link in links), len(links) * up / server.down_bytes_per_s)
    down_s = max(*(down / link.down_bytes_per_s for link in links), len(links) * down / server.up_bytes_per_s)
    latency_s = server.latency_s + max(link.latency_s for link in links)
    return up_s + down_s + outer_s / setting.num_fragments + 2 * latency_s  # a request for each leg
