"""What a pipeline is to be, decided and checked before any of it is built: schedule, stages of each rank, microbatches.

A stage is a run of neighbouring blocks. Stages lie over the pipeline's ranks in a loop (0 1 2 0 1 2) or in a V
(0 1 2 2 1 0); a schedule is the order in which a rank computes the microbatches of its stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from forgather.distributed.mesh import Mesh
from forgather.errors import DistributedError

Auto = Literal["auto"]


@dataclass(frozen=True)
class Schedule:
    """A schedule of torch.distributed.pipelining, and what it can take."""

    name: str
    make: Callable[..., Any]
    source: str
    num_stages: tuple[int, ...] = ()  # stages of a rank: one of these; empty for any number from 2
    is_v: bool = False
    splits_backward: bool = False  # gradients of inputs and of weights are computed at different times
    whole_rounds: bool = False  # microbatches go in equal rounds of about as many as there are ranks
    at_least_stages: bool = False  # no fewer microbatches than stages

    @property
    def takes_one_stage(self) -> bool:
        return self.num_stages == (1,)

    @property
    def default_stages(self) -> int:
        return self.num_stages[0] if self.num_stages else 2

    def takes_stages(self, stages_per_rank: int) -> bool:
        return stages_per_rank in self.num_stages if self.num_stages else stages_per_rank >= 2

    def takes_microbatches(self, microbatches: int, num_ranks: int) -> bool:
        if self.at_least_stages and microbatches < num_ranks:
            return False
        return not self.whole_rounds or microbatches % max(1, microbatches // num_ranks) == 0


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", ScheduleGPipe, "Huang et al. 2018, arXiv:1811.06965", (1,)),
        Schedule("1f1b", Schedule1F1B, "Harlap et al. 2018, arXiv:1806.03377", (1,), at_least_stages=True),
        Schedule(
            "interleaved_1f1b", ScheduleInterleaved1F1B, "Narayanan et al. 2021, arXiv:2104.04473", whole_rounds=True
        ),
        Schedule("looped_bfs", ScheduleLoopedBFS, "Lamy-Poirier 2022, arXiv:2211.05953"),
        Schedule(
            "interleaved_zero_bubble",
            ScheduleInterleavedZeroBubble,
            "Qi et al. 2023, arXiv:2401.10241",
            whole_rounds=True,
            splits_backward=True,
        ),
        Schedule(
            "zbv",
            ScheduleZBVZeroBubble,
            "Qi et al. 2023, arXiv:2401.10241, section 6",
            (2,),
            is_v=True,
            splits_backward=True,
        ),
    )
}


class PipelinePlan:
    """How a model is to be pipelined over `mesh`; over a mesh without a pipeline it changes nothing.

    schedule: a name in `SCHEDULES`.
    stages_per_rank: auto is what the schedule needs.
    cuts: the blocks at which a new stage begins, in order; auto balances what the stages compute.
    microbatches: into how many parts a rank's rows of a step are cut. auto takes the fewest that keep every stage busy
        and have at most `rows_per_forward` rows; a number is taken as it is.
    rows: rows of a step on each data rank, of `length` tokens.

    Raises DistributedError, naming what would work, for what the schedule cannot take.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        rows: int,
        rows_per_forward: int,
        length: int,
        schedule: str = "1f1b",
        stages_per_rank: int | Auto = "auto",
        cuts: Sequence[int] | Auto = "auto",
        microbatches: int | Auto = "auto",
    ) -> None:
        if schedule not in SCHEDULES:
            raise DistributedError(
                f"pipeline.schedule is {schedule!r}", fix=f"use one of {', '.join(SCHEDULES)} (default 1f1b)"
            )
        self.mesh = mesh
        self.schedule = SCHEDULES[schedule]
        self.num_ranks = mesh.pipeline
        self.rows = rows
        self.length = length
        self.rows_per_forward = rows_per_forward
        self.rows_per_microbatch = rows_per_forward  # at most; of a pipeline, exactly
        self.cuts = cuts
        self.stages_per_rank = 1
        self.microbatches = 0  # of no pipeline: the loader's affair
        if self.num_ranks > 1:
            self.stages_per_rank = self._choose_stages(stages_per_rank)
            self._check_cuts()
            self.microbatches = self._choose_microbatches(microbatches)
            self.rows_per_microbatch = rows // self.microbatches

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """Which rank of the pipeline has `stage`."""
        lap, position = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - position if self.schedule.is_v and lap % 2 else position

    @property
    def local_stages(self) -> list[int]:
        """The stages of this rank, in order."""
        here = self.mesh.coordinate("pipeline")
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == here]

    @property
    def last_rank(self) -> int:
        """Which rank of the pipeline has the last stage, and with it the loss."""
        return self.rank_of(self.num_stages - 1)

    def _choose_stages(self, asked: int | Auto) -> int:
        number = self.schedule.default_stages if asked == "auto" else asked
        if not _is_number(number) or not self.schedule.takes_stages(number):
            works = str(self.schedule.num_stages[0]) if self.schedule.num_stages else "2 or more"
            others = ", ".join(s.name for s in SCHEDULES.values() if _is_number(number) and s.takes_stages(number))
            raise DistributedError(
                f"pipeline.stages_per_rank is {number!r}, and schedule {self.schedule.name} takes {works}",
                fix=f"use {works}, or auto" + (f"; {number} is what these take: {others}" if others else ""),
            )
        return number

    def _check_cuts(self) -> None:
        if self.cuts == "auto":
            return
        wanted = self.num_stages - 1
        numbers = list(self.cuts)
        if not all(map(_is_number, numbers)) or len(numbers) != wanted:
            raise DistributedError(
                f"pipeline.cuts is {numbers}; {self.num_stages} stages need {wanted} numbers of blocks",
                fix=f"give the {wanted} blocks at which a new stage begins, or auto",
            )
        if numbers != sorted(set(numbers)) or numbers[0] < 1:
            raise DistributedError(
                f"pipeline.cuts is {numbers}: every stage must have a block",
                fix="give rising numbers from 1, such as " + str([2 * number for number in range(1, wanted + 1)]),
            )

    def _choose_microbatches(self, asked: int | Auto) -> int:
        if asked != "auto":
            if not _is_number(asked) or asked not in self._possible():
                raise DistributedError(
                    f"pipeline.microbatches is {asked!r}, and {self._for_whom()} cannot take that", fix=self._fix()
                )
            return asked
        # Fewer than there are stages would leave some idle all the time.
        busy = [count for count in self._possible() if count >= self.num_ranks]
        fitting = [count for count in busy if self.rows // count <= self.rows_per_forward]
        if not fitting:
            raise DistributedError(
                f"no number of microbatches suits {self._for_whom()} and {self.rows_per_forward} rows a forward",
                fix=self._fix(),
            )
        return fitting[0]

    def _possible(self) -> list[int]:
        return [
            count
            for count in range(1, self.rows + 1)
            if self.rows % count == 0 and self.schedule.takes_microbatches(count, self.num_ranks)
        ]

    def _for_whom(self) -> str:
        return f"schedule {self.schedule.name} over {self.num_ranks} ranks with {self.rows} rows on each data rank"

    def _fix(self) -> str:
        possible = self._possible()
        if not possible:
            return f"raise rows_per_step: a rank of data needs {self.num_ranks} rows or a multiple"
        return f"use pipeline.microbatches {' or '.join(map(str, possible))}"


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
