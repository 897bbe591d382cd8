"""DiLoCo in a training config: what `lib:train/causal_lm.yaml` builds from `--diloco-server` and its siblings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from forgather.checkpoint.run_folder import RunFolder
from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.data.tokenizers import tokenizer_digest
from forgather.diloco.address import ServerAddress, server_named
from forgather.diloco.joining import default_name
from forgather.diloco.lease_desk import LeaseDesk
from forgather.diloco.leased_order import LeasedOrder
from forgather.diloco.worker import DiLoCo
from forgather.distributed.collectives import failing_together
from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError
from forgather.metrics.meter import Meter

KEY_NAME = "diloco.key"  # in the run's folder


class PackageLike(Protocol):
    @property
    def digest(self) -> str: ...


def order_of(order: Permutation, leases: LeaseDesk, rows_per_step: int) -> Permutation | LeasedOrder:
    """`order`, or the rows of it that a server leases to this worker, where it is to do so."""
    return LeasedOrder(order, leases, rows_per_step=rows_per_step) if leases.is_open else order


def address_of_server(
    server: str | None,
    *,
    token_file: str | None = None,
    tls_ca: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> ServerAddress | None:
    """`server_named` for a run that may have none. Collective, as a file may be missing on one machine alone."""
    if server is None:
        return None
    with failing_together():
        return server_named(server, token_file=token_file, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)


def build_worker(
    model: nn.Module,
    optimizer: Optimizer,
    mesh: Mesh,
    data: Loader,
    run: RunFolder,
    meter: Meter,
    *,
    server: ServerAddress | str | None,
    worker: str | None = None,
    sync_every: int | None = None,
    patience_s: float = 30.0,
    package: PackageLike | None = None,
    tokenizer: object = None,
    leases: LeaseDesk | None = None,
    fuse_optimizer_with_backward: bool = False,
    is_stopping: Callable[[], bool] | None = None,
) -> DiLoCo | None:
    """The hook with which a run trains together with others; None where no server is given, so that it trains alone.

    The digests of package, tokenizer and data are told to the server: they must be equal on all machines. The order of
    the data is each machine's own, or leased.
    """
    if server is None:
        return None
    if fuse_optimizer_with_backward:
        raise ConfigError(
            "diloco hangs on the optimizer's steps, and fused with the backward each parameter has one of its own",
            fix="leave out --fuse-optimizer-with-backward",
        )
    is_leased = leases is not None and leases.is_open
    return DiLoCo(
        model,
        optimizer,
        server,
        worker,
        default_worker=default_name(run.dir.name),
        tokens_per_step=data.tokens_per_step,
        sync_every=sync_every,
        patience_s=patience_s,
        key_file=Path(run.dir) / KEY_NAME,
        mesh=", ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1) or "one process",
        package=None if package is None else package.digest,
        tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer),
        data=data.blocks.shards.digest,
        leases=leases if is_leased else None,
        num_rows=lambda: data.consumed,
        consumed=_consumed(data) if is_leased else None,
        is_stopping=is_stopping,
        waiting=lambda: meter.doing("exchange"),
        say=run.say,
    )


def _consumed(data: Loader) -> Callable[[int, int], Mapping[str, int]]:
    order = data.order
    assert isinstance(order, LeasedOrder), "rows that are leased are in a leased order"
    return order.consumed
