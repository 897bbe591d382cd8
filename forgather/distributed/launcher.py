"""Starts the ranks of a run on this host with torchrun, and ends with one message when they fail.

torchrun's agent runs in this process (`distributed.agent`), so a signal to the launcher is a signal to the agent, which
hands it on. Its own report goes to a log: what a person needs is the error of the rank that failed first.
"""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.elastic.rendezvous.utils import (
    _matches_machine_hostname,
    _parse_rendezvous_config,
    parse_rendezvous_endpoint,
)

from forgather.distributed.agent import Agent
from forgather.distributed.devices import count_cores
from forgather.distributed.failure import FOLDER_VARIABLE, Failure, clear_failures, code_left, read_failures
from forgather.distributed.network import is_this_host, route_to
from forgather.distributed.timeouts import check_timeouts
from forgather.distributed.verdict import first_failure, first_of_hosts
from forgather.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_RESUMABLE,
    DistributedError,
    ForgatherError,
)

# With any of these the ranks meet as the user says, not on a free port of this host.
_RENDEZVOUS = ("--nnodes", "--rdzv", "--master", "--node-rank", "--node_rank", "--standalone")

# Of a meeting of several hosts, unless `--rdzv-conf` says otherwise. A host that is lost is noticed after 6 s
# (torchrun: 15), and a smaller world waits 5 s for more hosts (torchrun: 30).
_MEETING = {"keep_alive_interval": 2, "keep_alive_max_attempt": 3, "last_call_timeout": 5, "join_timeout": 900}
_EXIT_BARRIER_S = 60.0  # for ranks of other hosts, which end the same step


def launch(
    module: str, arguments: Sequence[str], processes: int, extra: Sequence[str] = (), *, timeout_s: float = 0.0
) -> int:
    """Run `python -m module arguments` on `processes` ranks of this host; return the exit code of the run.

    `extra` are further arguments of torchrun; `timeout_s` is how long a collective of the ranks may take. Raises the
    error of the first rank that failed, and DistributedError for timeouts that cannot work together.
    """
    settings = _parse(_command(module, processes, extra))
    # Not parsed with the rest: argparse looks for torchrun's flags among the program's own, `--nproc` for one.
    settings.training_script_args = list(arguments)
    meeting = _meeting(settings, timeout_s)
    folder = Path(tempfile.mkdtemp(prefix="forgather-"))
    os.environ[FOLDER_VARIABLE] = str(folder)
    # Otherwise a restart may meet the dead ranks' addresses in the agent's store, and hang (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # torchrun would say 1 whatever the machine; this shares it out.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
    # The agent takes over the signals that stop a run; to torchrun it leaves the one that asks for a core dump.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    _log_to(folder / "torchrun.log")
    watch = _Watch(folder)
    try:
        with _meeting_errors(settings):
            agent = watch.make_agent(settings, meeting)
            code = _run(agent, watch)
    except ForgatherError as error:
        if error.exit_code != EXIT_INTERNAL:  # what the message of a defect leads to stays
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return code


def _run(agent: Agent, watch: "_Watch") -> int:
    """Let the agent run its ranks to their end; the exit code of the run. Raises the first failure."""
    agent.handle_signals()
    closes = True
    try:
        result = agent.run()
    except SignalException as stopped:
        closes = False  # other hosts may go on without this one
        return 128 + stopped.sigval
    finally:
        if closes:
            with contextlib.suppress(RendezvousError):
                agent.meeting.shutdown()
    if not result.is_failed():
        return code_left(watch.folder) or EXIT_OK
    if agent.stopped_by is not None and not read_failures(watch.folder):
        return code_left(watch.folder) or 128 + agent.stopped_by  # it came before there was anything to save
    return watch.end(result)


@contextlib.contextmanager
def _meeting_errors(settings: Namespace) -> Iterator[None]:
    """Say what it means when the hosts of a run do not meet."""
    place = settings.rdzv_endpoint or f"{settings.master_addr}:{settings.master_port}"
    try:
        yield
    except RendezvousClosedError:
        raise DistributedError("the other hosts have ended this run", fix="start it again on all; it goes on") from None
    except RendezvousError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        lost = DistributedError(
            f"the hosts of this run cannot meet at {place}: {reason}",
            fix=f"see that every host reaches {place} and that the host it names runs the same command",
        )
        lost.exit_code = EXIT_RESUMABLE
        raise lost from None


class _Watch:
    """What the launcher of a host knows of its ranks; `folder` takes what they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure: Failure | None = None

    def make_agent(self, settings: Namespace, meeting: dict[str, int]) -> Agent:
        """The agent as `torchrun` with these settings would make it."""
        config, entrypoint, arguments = torchrun.config_from_args(settings)
        parameters = RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **{**config.rdzv_configs, **meeting},
        )
        is_static = config.rdzv_backend == "static"
        address, port = parse_rendezvous_endpoint(config.rdzv_endpoint, 29500) if is_static else (None, None)
        spec = WorkerSpec(
            role=config.role,
            local_world_size=config.nproc_per_node,
            entrypoint=entrypoint,
            args=tuple(arguments),
            rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
            max_restarts=config.max_restarts,
            monitor_interval=config.monitor_interval,
            master_addr=address,
            master_port=port,
            local_addr=config.local_addr,
            numa_options=config.numa_options,
            virtual_local_rank=config.virtual_local_rank,
        )
        return Agent(
            spec=spec,
            logs_specs=config.logs_specs,
            start_method=config.start_method,
            exit_barrier_timeout=_EXIT_BARRIER_S,
            shutdown_timeout=config.shutdown_timeout,
            on_start=lambda: clear_failures(self.folder),
            on_failure=self.judge,
            has_left=lambda: code_left(self.folder) is not None,
        )

    def judge(self, agent: Agent, result: RunResult) -> bool:
        """Find the first failure; whether it is worth another start, which is then said."""
        killed = {
            rank: -end.exitcode
            for rank, end in result.failures.items()
            if end.exitcode < 0 and end.local_rank not in agent.ended
        }
        group: Any = agent.get_worker_group()  # torchrun gives its fields no types
        found = first_failure(read_failures(self.folder), killed, group.workers[0].world_size)
        if group.group_world_size > 1:
            found = first_of_hosts(found, group.store, group.group_rank, group.group_world_size, agent.starts)
        self.failure = found
        if agent.restarts_left == 0:
            return False
        if found is None:
            what = "ranks ended and said nothing"
        elif found.can_be_mended:
            return False
        else:
            what = found.error().message
        left = agent.restarts_left - 1
        print(f"{what}; starting again ({left} restart{'s' if left != 1 else ''} left)", file=sys.stderr, flush=True)
        return True

    def end(self, result: RunResult) -> int:
        """Raise the first failure, or return the exit code of a rank that left without an error."""
        if self.failure is None:
            rank, first = min(result.failures.items(), key=lambda item: item[1].timestamp)
            if first.exitcode == EXIT_RESUMABLE:
                return EXIT_RESUMABLE
            raise _left(rank, first.exitcode)
        if self.failure.exit_code == EXIT_INTERNAL:
            raise _internal(self.failure, self.folder)
        if self.failure.exit_code == EXIT_BROKEN_PIPE:
            return EXIT_BROKEN_PIPE
        raise self.failure.error()


def _command(module: str, processes: int, extra: Sequence[str]) -> list[str]:
    meeting = [] if any(word.startswith(_RENDEZVOUS) for word in extra) else ["--standalone"]
    return [*meeting, f"--nproc-per-node={processes}", *extra, "-m", module]


def _parse(command: list[str]) -> Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            settings = torchrun.get_args_parser().parse_args(command)
    except SystemExit as stopped:
        if stopped.code == EXIT_OK:  # `-- --help`
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise DistributedError(f"torchrun: {reason}", fix="see `torchrun --help` for what may follow `--`") from None
    return settings


def _meeting(settings: Namespace, timeout_s: float) -> dict[str, int]:
    """Complete `settings` as torchrun does: where the hosts meet; how long they wait for one another.

    Raises DistributedError when the waiting times cannot work together.
    """
    _, most = torchrun.parse_min_max_nnodes(settings.nnodes)
    has_place = settings.rdzv_endpoint or settings.master_port is not None
    if settings.standalone or (settings.rdzv_backend == "static" and most == 1 and not has_place):
        settings.rdzv_backend, settings.rdzv_endpoint = "c10d", "localhost:0"
        settings.rdzv_id = str(uuid.uuid4())
        settings.local_addr = settings.local_addr or "127.0.0.1"
    settings.master_port = settings.master_port or 29500
    if settings.rdzv_backend != "c10d":
        return {}
    asked = _parse_rendezvous_config(settings.rdzv_conf)
    meeting = {name: int(asked.get(name, default)) for name, default in _MEETING.items()}
    if most > 1:
        check_timeouts(meeting, timeout_s)
        host, _ = parse_rendezvous_endpoint(settings.rdzv_endpoint, default_port=29400)
        # torchrun compares names: where a host's own leads to 127.0.1.1, it does not know itself by its address. Where
        # it is right it is left to its own: then the second of two agents on one host goes to the first.
        if "is_host" not in asked and is_this_host(host) != _matches_machine_hostname(host):
            meeting["is_host"] = int(is_this_host(host))
        settings.local_addr = settings.local_addr or str(route_to(host).address)
    return meeting


def _log_to(path: Path) -> None:
    """Send what torchrun's agent says to a file instead of the terminal, which belongs to the ranks."""
    top = logging.getLogger("torch")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    top.handlers = [logging.FileHandler(path)]
    top.propagate = False


def _left(rank: int, exit_code: int) -> ForgatherError:
    how = f"left with exit code {exit_code}" if exit_code > 0 else f"was ended by {signal.Signals(-exit_code).name}"
    error = ForgatherError(f"rank {rank} {how} and said nothing")
    error.exit_code = exit_code if exit_code > 0 else 128 - exit_code
    return error


def _internal(failure: Failure, folder: Path) -> ForgatherError:
    if failure.traceback is not None:
        print(failure.traceback, file=sys.stderr)
    error = failure.error()
    where = f"the other ranks' errors and torchrun's log are in {folder}"
    if failure.log is not None:
        where += f", what each rank has said in {Path(failure.log).parent}"
    error.fix = f"{error.fix}; {where}" if error.fix else where
    return error
