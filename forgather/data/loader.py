"""Batches of a training step in the run's global order, the same for any number of ranks and workers.

The n-th step of a run is samples [n R, (n + 1) R) of the order, R = `rows_per_step`. Rank r of W takes the r-th of W
equal runs of them and cuts it into microbatches. So where a run stands is one integer, the samples consumed, and a
resume on another mesh goes on with exactly the next sample.
"""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from forgather.data.batch import NO_TARGET, Batch
from forgather.data.order import ReservedOrder, SampleOrder
from forgather.data.packing import PackedBlocks
from forgather.errors import DataError, DistributedError

# Small steps are read several at once, up to this many tokens of a rank (400 KB): to ask the order, gather blocks and
# hand over costs 0.3 ms each time, however little there is.
_TOKENS_AT_ONCE = 2**14


class Loader:
    """Gives one rank the microbatches of one step after another, without end.

    What comes next is read ahead while a step computes: by a thread when `workers` is 0 (reading packed blocks takes
    microseconds), otherwise by that many processes.
    """

    def __init__(
        self,
        blocks: PackedBlocks,
        order: SampleOrder,
        *,
        rows_per_step: int,
        rows_per_forward: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.blocks = blocks
        self.order = order
        self.rows_per_step = rows_per_step
        self.data_rank = data_rank
        self.data_ranks = data_ranks
        self.rows = _rows_per_rank(rows_per_step, data_ranks)
        self.rows_per_microbatch = _largest_divisor(self.rows, at_most=rows_per_forward)
        self.num_microbatches = self.rows // self.rows_per_microbatch
        self.workers = workers
        self.consumed = 0
        self._pin = pin
        # What is read must have been got before: no more of it, then, than the next steps need.
        self._reserved = order if isinstance(order, ReservedOrder) else None
        steps_at_once = max(1, _TOKENS_AT_ONCE // (self.rows * blocks.block_length))
        self._steps_at_once = steps_at_once if self._reserved is None else 1
        self._read: _Read | None = None
        self._reads: Iterator[_Read] | None = None
        self._ahead: Future[_Read] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def has_rows(self, steps_left: int) -> bool:
        """Whether the next step, of so many that are left, can be taken: not where its rows have yet to come.

        Only an order in which others have a say, as a server that leases rows, lets anyone wait: half a second at most,
        and then it is to be asked again. Collective.
        """
        if self._reserved is None:
            return True
        # The step, and what is read ahead: one more by a thread; two for each process, and one that is handed out.
        num_reads = 2 * self.workers + 1 if self.workers else 2
        stop = self.consumed + num_reads * self.rows_per_step
        return self._reserved.reserve(self.consumed, stop, self.consumed + steps_left * self.rows_per_step)

    def take(self) -> list[Batch]:
        """This rank's microbatches of the next step."""
        if self._read is None or self.consumed == self._read.first + self._read.num_steps * self.rows_per_step:
            self._read = self._next_read()
        number = (self.consumed - self._read.first) // self.rows_per_step
        assert 0 <= number < self._read.num_steps, "the order of data was left"
        first_of_rank = self.consumed + self.data_rank * self.rows
        self.consumed += self.rows_per_step
        size = self.rows_per_microbatch
        return [
            _batch(
                self._read, slice(number * self.rows + start, number * self.rows + start + size), first_of_rank + start
            )
            for start in range(0, self.rows, size)
        ]

    def peek(self) -> Batch:
        """The whole global batch of the next step, not consumed: the same on every rank, whatever their number."""
        share = _Share(self.consumed, 1, self.order.samples(self.consumed, self.rows_per_step))
        return _batch(_Reader(self.blocks)[share], slice(0, self.rows_per_step), self.consumed)

    @property
    def epoch(self) -> float:
        """How many times the data has been passed over."""
        return self.consumed / len(self.blocks)

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a step over all ranks."""
        return self.rows_per_step * self.blocks.block_length

    @property
    def fingerprint(self) -> str:
        """A hash of the data and its order, which must not change within a run."""
        return xxhash.xxh3_64_hexdigest(f"{self.blocks.describe()}; {self.order.describe()}".encode())

    def describe(self) -> str:
        """One line: how the rows of a step are cut over ranks and microbatches."""
        return (
            f"{self.rows_per_step} rows of {self.blocks.block_length} tokens a step = {self.data_ranks} data ranks x "
            f"{self.num_microbatches} microbatches x {self.rows_per_microbatch} rows"
        )

    def state_dict(self) -> dict[str, Any]:
        """The samples consumed, and what they were samples of."""
        return {
            "consumed": self.consumed,
            "fingerprint": self.fingerprint,
            "blocks": self.blocks.describe(),
            "order": self.order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the samples consumed, on any number of ranks; DataError when the data is not the same."""
        if state["blocks"] != self.blocks.describe():
            raise DataError(
                f"the run was started on other data: {state['blocks']}; this is {self.blocks.describe()}",
                fix="restore the dataset, tokenizer and block length of the run, or start a new one with --fresh",
            )
        self.order.load_state_dict(state["order"])
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the run's data has fingerprint {state['fingerprint']}, this has {self.fingerprint}",
                fix="restore the dataset and order of the run, or start a new one with --fresh",
            )
        self.close()
        self.consumed = int(state["consumed"])

    def close(self) -> None:
        """Ends the reading ahead; the next `take` starts it again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._read = self._reads = self._ahead = self._thread = None

    def _next_read(self) -> "_Read":
        if self._reads is None:
            self._reads = iter(self._dataloader())
            if self.workers == 0:
                # One thread only: the reads stay in order.
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="forgather-loader")
        if self._thread is None:
            return next(self._reads)
        read = self._ahead.result() if self._ahead is not None else next(self._reads)
        self._ahead = self._thread.submit(next, self._reads)
        return read

    def _dataloader(self) -> StatefulDataLoader:
        # Workers are forked, and a tokenizer that has used its threads before warns of that unless this is set.
        if self.workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with warnings.catch_warnings():
            # torchdata 0.11 calls what torch 2.13 deprecates, at each construction.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
            # Its own state is not used: it holds the number of workers, and a run may go on with another.
            return StatefulDataLoader(
                _Reader(self.blocks),
                batch_size=None,
                sampler=_Shares(self),
                num_workers=self.workers,
                collate_fn=_unchanged,
                pin_memory=self._pin,
                snapshot_every_n_steps=2**31,
            )


class EvaluationLoader:
    """Every block once, cut evenly: each rank gives the same number of batches, filled up with rows without targets.

    With `limit`, that many blocks spread evenly over the split, so that every source keeps its share.
    """

    def __init__(
        self,
        blocks: PackedBlocks,
        *,
        rows_per_forward: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        limit: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.num_blocks = len(blocks) if limit is None else min(limit, len(blocks))
        if self.num_blocks < 1 or rows_per_forward < 1:
            raise DataError(
                f"nothing to evaluate: {self.num_blocks} blocks, {rows_per_forward} rows a forward pass",
                fix="set both to 1 or more",
            )
        self.rows_per_forward = rows_per_forward
        self.data_rank = data_rank
        self.data_ranks = data_ranks

    def __len__(self) -> int:
        return -(-self.num_blocks // (self.rows_per_forward * self.data_ranks))

    def __iter__(self) -> Iterator[Batch]:
        chosen = np.arange(self.num_blocks, dtype=np.int64) * len(self.blocks) // self.num_blocks
        for number in range(len(self)):
            first = (number * self.data_ranks + self.data_rank) * self.rows_per_forward
            numbers = range(first, min(first + self.rows_per_forward, self.num_blocks))
            # Block 0 stands in for what is missing, without its targets: shapes stay equal and nothing is counted.
            indices = np.zeros(self.rows_per_forward, np.int64)
            indices[: len(numbers)] = chosen[first : first + len(numbers)]
            rows = torch.from_numpy(np.stack(self.blocks.gather(indices)))
            rows[1, len(numbers) :] = NO_TARGET
            num_targets = int(torch.count_nonzero(rows[1] != NO_TARGET))
            yield Batch(rows[0], rows[1], rows[2], num_targets, tuple(numbers))


class _Share(NamedTuple):
    """What one rank reads at once: its rows of `num_steps` steps."""

    first: int  # the first sample of the first step
    num_steps: int
    blocks: NDArray[np.int64]


class _Read(NamedTuple):
    first: int
    num_steps: int
    rows: Tensor  # [3, rows, L]: inputs, targets, positions; one tensor, so one hand-over between processes
    num_targets: list[int]  # of each row


class _Shares:
    """The sampler: one rank's shares from `consumed` on. The order is asked here, in the main process."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[_Share]:
        loader = self.loader
        first = loader.consumed
        num_steps = loader._steps_at_once
        while True:
            blocks = loader.order.samples(first, num_steps * loader.rows_per_step)
            of_rank = blocks.reshape(num_steps, loader.data_ranks, loader.rows)[:, loader.data_rank]
            yield _Share(first, num_steps, of_rank.ravel())
            first += num_steps * loader.rows_per_step


class _Reader(torch.utils.data.Dataset[_Read]):
    """The dataset of the workers: reads the blocks of a share."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self.blocks = blocks

    def __getitem__(self, share: _Share) -> _Read:
        packed = self.blocks.gather(share.blocks)
        num_targets = np.count_nonzero(packed.targets != NO_TARGET, axis=1).tolist()
        return _Read(share.first, share.num_steps, torch.from_numpy(np.stack(packed)), num_targets)


def _batch(read: _Read, rows: slice, first_sample: int) -> Batch:
    input_ids, targets, position_ids = read.rows[:, rows]
    samples = tuple(range(first_sample, first_sample + rows.stop - rows.start))
    return Batch(input_ids, targets, position_ids, sum(read.num_targets[rows]), samples)


def _unchanged(read: _Read) -> _Read:
    return read


def _rows_per_rank(rows_per_step: int, data_ranks: int) -> int:
    if rows_per_step < 1 or rows_per_step % data_ranks:
        below = rows_per_step // data_ranks * data_ranks
        works = [str(rows) for rows in (below, below + data_ranks) if rows > 0]
        raise DistributedError(
            f"{rows_per_step} rows a step cannot be divided among {data_ranks} data ranks",
            fix=f"set rows_per_step to {' or '.join(works)}, or use a number of ranks that divides {rows_per_step}",
        )
    return rows_per_step // data_ranks


def _largest_divisor(number: int, *, at_most: int) -> int:
    if at_most < 1:
        raise DataError(f"rows_per_forward is {at_most}", fix="set it to 1 or more")
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
