"""What is shown of a server: by `forgather diloco status`, on its page, and to Prometheus."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgather.diloco.coordinator import Coordinator


def server_status(coordinator: "Coordinator", now: float) -> dict[str, Any]:
    """All of it, as JSON; every key is always there. `now` is on the coordinator's clock."""
    rounds, publisher = coordinator.rounds, coordinator.publisher
    num_parameters = sum(fragment.numel for fragment in coordinator.fragments)
    state = "draining" if coordinator.draining else "waiting" if rounds.is_waiting else "training"
    return {
        "mode": coordinator.settings.mode,
        "state": state,
        "versions": [fragment.version.number for fragment in coordinator.fragments],
        "durable": [fragment.durable for fragment in coordinator.fragments],
        "num_workers": rounds.num_workers,
        "num_awaited": rounds.num_awaited,
        "min_workers": rounds.min_workers,
        "round_timeout_s": rounds.round_timeout_s,
        "sync_every": coordinator.settings.sync_every,
        "workers": {
            member.name: {
                "host": member.host,
                "mesh": member.mesh,
                "state": "left" if member.state == "kicked" else member.state,
                "last_heartbeat_s": round(now - member.renewed_at, 3),
                "steps": member.steps,
                "steps_per_s": member.steps_per_s,
                "tokens_per_s": member.tokens_per_s,
                "loss": member.loss,
                "counted": member.num_counted,
                "bytes_up": member.bytes_up,
                "bytes_down": member.bytes_down,
                "sync_every": coordinator.sync_every(member),
            }
            for member in coordinator.members
        },
        "held": [
            {
                "fragment": number,
                "round": there.version.number,
                "workers": sorted(worker for worker, _ in there.complete),
                "expected": sorted(rounds.expected(number)),
                "open_s": round(now - there.opened_at, 3),
            }
            for number, there in enumerate(rounds.rounds)
        ],
        "outer": coordinator.outer.describe(),
        "model": {"parameters": num_parameters, "bytes": 4 * num_parameters},
        "uptime_s": round(now - coordinator.started_at, 3),
        "bytes_up": coordinator.bytes_up,
        "bytes_down": coordinator.bytes_down,
        "refused": coordinator.num_refused + publisher.num_refused,
        "trouble": coordinator.trouble,
        "spool": {"memory_bytes": coordinator.spool.memory_used, "disk_bytes": coordinator.spool.disk_used},
        "history": list(publisher.history),
        "ledger": None if coordinator.ledger is None else coordinator.ledger.status,
    }
