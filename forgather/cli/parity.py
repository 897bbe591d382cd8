"""`forgather parity`: two meshes of one config, run beside each other and compared step by step."""

import math
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

if TYPE_CHECKING:
    from forgather.trainers.comparison import Difference, StepComparison

SUMMARY = "Run two meshes of one config beside each other, and say where they differ"
NEEDS_CONFIG = True
TARGETS = ("environment", "mesh", "model", "optimizer", "data", "step")
PLAIN = 2

EXIT_DIFFERENT = 1
_SHOWN = 10  # values that differ in the first such step


def configure(parser: CommandParser) -> None:
    """Two plans, how far to run them, and how close they have to be."""
    parser.add_argument("plan_a", metavar="PLAN_A", help="single, or as shard=2,pipeline=2; see below")
    parser.add_argument("plan_b", metavar="PLAN_B", help="the plan to compare it with")
    parser.add_argument("--first", type=_count, default=20, metavar="N", help="steps to compare (default: 20)")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-5,
        metavar="X",
        help="relative difference allowed in losses and gradient norms (default: 1e-5)",
    )
    parser.add_argument(
        "--tensor-tolerance",
        type=_tolerance,
        default=1e-3,
        metavar="X",
        help="the same in each gradient and parameter, relative to its norm (default: 1e-3)",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="go on behind the first step that differs, to see how it grows"
    )
    parser.epilog = (
        "A plan is a list without blanks of axes of the mesh and any other key=value of the config, such as\n"
        "shard=2,tensor=2 or pipeline=2,rows_per_forward=4; axes that it does not name have size 1.\n"
        "All computes in fp32 unless `precision` is given. Nothing is written.\n"
        "Exit codes: 0 the plans agree, 1 they differ, 2 one of them cannot run."
    )


def run(options: Options) -> int:
    """Print a line for each step, and what differs."""
    project = options.project
    from forgather.trainers.comparison import Comparison
    from forgather.trainers.parity import Plan, compare_plans

    if "precision" not in options.arguments:
        exact: dict[str, str] = {
            name: "fp32" for name in ("precision", "parameter_dtype") if name in project.parameters
        }
        project = project.replaced(args=exact) if exact else project
    a, b = Plan.parse(options.plan_a), Plan.parse(options.plan_b)
    steps = project.plain_arguments("main").get("steps") if project.has("main") else None
    first = min(options.first, steps) if isinstance(steps, int) else options.first
    comparison = Comparison(options.tolerance, options.tensor_tolerance)
    compared = compare_plans(project, a, b, steps=first, comparison=comparison)
    print(f"config {project.config_name}: the first {first} steps of")
    width = max(len(a.text), len(b.text))
    for letter, plan in (("A", a), ("B", b)):
        print(f"  {letter}  {plan.text:<{width}}  {plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}")
    print(_HEADER, flush=True)
    done: list[StepComparison] = []
    for step in compared:
        print(_line(step), flush=True)
        done.append(step)
        if step.beyond and not options.keep_going:
            break
    differing = next((step for step in done if step.beyond), None)
    if differing is not None:
        _print_differences(differing)
        return EXIT_DIFFERENT
    largest = {
        kind: max((step.worst[kind].size for step in done if kind in step.worst), default=0.0) for kind in _KINDS
    }
    print("equal: " + ", ".join(f"{name} within {largest[kind]:.1e}" for kind, name in _KINDS.items()))
    noise = done[-1].noise
    if noise:
        print(f"not judged, as their gradients are rounding alone: {_list(noise)}")
    return EXIT_OK


_KINDS = {"loss": "losses", "gradient": "gradients", "grad_norm": "gradient norms", "parameter": "parameters"}
_HEADER = "step      loss A      loss B  differs by   norm differs   gradient differs   parameter differs"


def _line(step: "StepComparison") -> str:
    losses = "".join(f"{value:12.6f}" for value in step.scalars.get("loss", ())) or " " * 24
    cells = [
        _size(step, kind, width)
        for kind, width in (("loss", 12), ("grad_norm", 15), ("gradient", 19), ("parameter", 20))
    ]
    return f"{step.step:4}{losses}{''.join(cells)}"


def _size(step: "StepComparison", kind: str, width: int) -> str:
    worst = step.worst.get(kind)  # type: ignore[call-overload]
    return " " * width if worst is None else f"{worst.size:{width}.1e}"


def _print_differences(step: "StepComparison") -> None:
    first = step.beyond[0]
    when = "before the first step" if first.step == 0 else f"at step {first.step}"
    print(f"different: first {when}, in {first.what}, by {_told(first)}")
    largest = sorted(step.beyond, key=lambda difference: -difference.size)
    for difference in largest[:_SHOWN]:
        print(f"  {_told(difference):>8}  {difference.what}")
    if len(largest) > _SHOWN:
        print(f"  and {len(largest) - _SHOWN} more of that step that differ by less")


def _told(difference: "Difference") -> str:
    size = "all of it" if math.isinf(difference.size) else f"{difference.size:.1e}"
    return f"{size} ({difference.note})" if difference.note else size


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number of steps; write 1 or more")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is no tolerance; write a number such as 1e-5")
    return value
