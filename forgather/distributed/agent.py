"""torchrun's agent with our manners: it hands stops on, ends what is stuck at once, and says why it starts again.

An agent watches the ranks of its host. When one of them fails it ends the others, and while restarts are left it meets
the agents of the other hosts again and starts all ranks anew. What differs from torchrun's own:

    a signal            SIGTERM, SIGINT and SIGHUP are handed on to the ranks, which save and leave by themselves,
                        however long it takes; torchrun kills them after 30 s. A second Ctrl-C kills.
    a failed rank       the others have `SETTLE_S` to leave by themselves, since what they wait for will not come
    what a user mends   is not tried again
    a host that joins   lets the ranks save before they are started anew
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SETTLE_S = 2.0  # what the ranks left by a failed one have to write down what they saw
JOIN_GRACE_S = 600  # what they have to finish a step and save when a host joins


class Agent(LocalElasticAgent):
    """Runs the ranks of this host.

    `on_start` is called before each start of the ranks. `on_failure(agent, result)` is called when they have failed,
    with torchrun's account; it says whether to start them again. `has_left()` says whether ranks that ended well did so
    before the run's end. `ended` are the local ranks that the agent itself has ended since the last start.
    """

    def __init__(
        self,
        *args: Any,
        on_start: Callable[[], None],
        on_failure: Callable[["Agent", RunResult], bool],
        has_left: Callable[[], bool],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.stopped_by: signal.Signals | None = None
        self._on_start = on_start
        self._on_failure = on_failure
        self._has_left = has_left
        self.ended: set[int] = set()
        self.starts = 0

    @property
    def restarts_left(self) -> int:
        return self._remaining_restarts

    @property
    def meeting(self) -> RendezvousHandler:
        """Where the agents of the hosts meet."""
        return self._rdzv_handler

    def handle_signals(self) -> None:
        """Take over the signals that stop a run; those that are ignored (`nohup`) stay ignored."""
        for number in HANDED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  what Python passes
        again = self.stopped_by is not None
        self.stopped_by = self.stopped_by or signal.Signals(number)
        self._remaining_restarts = 0
        alive = self._alive()
        if not alive or (again and number == signal.SIGINT):
            for pid in alive.values():
                os.kill(pid, signal.SIGKILL)
            raise SignalException(f"ended by {signal.Signals(number).name}", sigval=signal.Signals(number))
        if not again:
            name = signal.Signals(number).name
            hint = " (Ctrl-C again ends it at once)" if number == signal.SIGINT else ""
            os.write(sys.stderr.fileno(), f"\n{name}: the ranks end after their step, and save{hint}\n".encode())
        for pid in alive.values():
            os.kill(pid, signal.SIGTERM)

    def _alive(self) -> dict[int, int]:
        """The process of each local rank that still runs."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc.pid for rank, handler in handlers.items() if handler.proc.poll() is None}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.ended = set()
        self.starts += 1
        self._on_start()
        started: dict[int, Any] = super()._start_workers(worker_group)
        context = self._pcontext
        assert context is not None, "it was just made"
        close = context.close

        def close_soon(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            if death_sig is None and self._alive():  # a rank has failed, and the others wait for it
                _wait_until(lambda: not self._alive(), SETTLE_S)
                stuck = self._alive()
                self.ended |= set(stuck)
                for pid in stuck.values():
                    os.kill(pid, signal.SIGUSR1)  # it writes down where it is (distributed.rank_log)
                _wait_until(lambda: not self._alive(), 0.5)
                death_sig = signal.SIGKILL
            close(death_sig, timeout)

        context.close = close_soon  # type: ignore[method-assign]
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002  torchrun's signature
        self._shutdown(signal.SIGTERM, JOIN_GRACE_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY) and not self._on_failure(self, result):
            self._remaining_restarts = 0
        was_told_to_stop = result.state == WorkerState.SUCCEEDED and self.stopped_by is None and self._has_left()
        if was_told_to_stop and self._rdzv_handler.num_nodes_waiting() > 0:
            # A host joins, and the agent of another host has noticed it before this one.
            return RunResult(state=WorkerState.HEALTHY)
        return result


def _wait_until(is_true: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not is_true() and time.monotonic() < end:
        time.sleep(0.01)
