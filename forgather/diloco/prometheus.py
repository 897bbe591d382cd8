"""What a server says of itself in Prometheus' text format; units are in the names, as its conventions have it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "forgather_diloco_"
Samples = Iterable[tuple[Mapping[str, object], float | None]]  # labels and value; None is left out


def exposition(status: Mapping[str, Any]) -> str:
    """All metrics, each with its type and meaning."""
    return "".join(f"{line}\n" for metric in _metrics(status) for line in _lines(*metric))


def _metrics(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, type, meaning, samples."""
    workers, history = status["workers"], status["history"]

    def once(value: float | None) -> Samples:
        return [({}, value)]

    def by_fragment(values: Iterable[float]) -> Samples:
        return [({"fragment": place}, value) for place, value in enumerate(values)]

    def by_worker(key: str) -> Samples:
        return [({"worker": name}, worker[key]) for name, worker in sorted(workers.items())]

    def of_last_round(key: str) -> Samples:
        last = {closed["fragment"]: closed for closed in history}
        return [({"fragment": fragment}, closed[key]) for fragment, closed in sorted(last.items())]

    states = [worker["state"] for worker in workers.values()]
    yield "uptime_seconds", "gauge", "Since this process started.", once(status["uptime_s"])
    yield "model_parameters", "gauge", "Parameters of the model.", once(status["model"]["parameters"])
    yield "model_bytes", "gauge", "Their size in fp32.", once(status["model"]["bytes"])
    yield "version", "gauge", "Outer steps made.", by_fragment(status["versions"])
    yield "durable_version", "gauge", "Outer steps that are on the disk.", by_fragment(status["durable"])
    yield "state", "gauge", "1 for the state that the server is in.", [({"state": status["state"]}, 1)]
    counted = [({"state": state}, states.count(state)) for state in dict.fromkeys(("live", "dead", "left", *states))]
    yield "workers", "gauge", "Workers by state.", counted
    yield "received_bytes_total", "counter", "Bytes of contributions.", once(status["bytes_up"])
    yield "sent_bytes_total", "counter", "Bytes of values and changes.", once(status["bytes_down"])
    yield "refused_contributions_total", "counter", "Contributions that were refused.", once(status["refused"])
    held = [({"fragment": each["fragment"]}, len(each["workers"])) for each in status["held"]]
    yield "held_contributions", "gauge", "Contributions of rounds that are open.", held
    opened = [({"fragment": each["fragment"]}, each["open_s"]) for each in status["held"]]
    yield "round_open_seconds", "gauge", "Since a round was opened, by the version before it.", opened
    yield "worker_heartbeat_age_seconds", "gauge", "Since a worker was heard of.", by_worker("last_heartbeat_s")
    yield "worker_steps_total", "counter", "Inner steps that a worker says it made.", by_worker("steps")
    yield "worker_steps_per_second", "gauge", "Its inner steps a second.", by_worker("steps_per_s")
    yield "worker_tokens_per_second", "gauge", "Its target tokens a second.", by_worker("tokens_per_s")
    yield "worker_loss_nats_per_token", "gauge", "Its loss.", by_worker("loss")
    yield "worker_sync_every_steps", "gauge", "Its inner steps to an exchange.", by_worker("sync_every")
    yield "worker_rounds_total", "counter", "Rounds that it was counted in.", by_worker("counted")
    yield "worker_received_bytes_total", "counter", "Bytes received from it.", by_worker("bytes_up")
    yield "worker_sent_bytes_total", "counter", "Bytes sent to it.", by_worker("bytes_down")
    yield "round_norm", "gauge", "Largest norm of a contribution to the last round.", of_last_round("norm")
    yield "round_seconds", "gauge", "How long the last round was open.", of_last_round("seconds")
    yield "round_tokens", "gauge", "Target tokens in the last round.", of_last_round("tokens")
    yield "round_loss_nats_per_token", "gauge", "Mean loss of the last round's workers.", of_last_round("loss")
    ledger = dict(status["ledger"] or {})
    yield "work_units", "gauge", "Units that an epoch is leased in.", once(ledger.pop("units", None))
    yield "epoch_rows", "gauge", "Rows of an epoch.", once(ledger.pop("rows", None))
    yield "trained_epochs", "gauge", "Epochs trained.", once(ledger.pop("epoch", None))
    rows = [({"state": name}, value) for name, value in ledger.items() if isinstance(value, int | float)]
    yield "ledger_rows", "gauge", "Rows of the global order by what became of them.", rows


def _lines(name: str, kind: str, meaning: str, samples: Samples) -> Iterator[str]:
    found = [(labels, value) for labels, value in samples if value is not None]
    if not found:
        return
    yield f"# HELP {_PREFIX}{name} {meaning}"
    yield f"# TYPE {_PREFIX}{name} {kind}"
    for labels, value in found:
        shown = ",".join(f'{key}="{_escaped(str(each))}"' for key, each in labels.items())
        yield f"{_PREFIX}{name}{f'{{{shown}}}' if shown else ''} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
