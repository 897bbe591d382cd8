"""`forgather checkpoint`: what a run has saved, whether it is whole, how two differ, and what may go."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgather.checkpoint.commit import DOCUMENT, whole_manifests
from forgather.checkpoint.folder import leftovers, remove, saved_steps, step_name
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.layout import StoredTensor, read_layout
from forgather.checkpoint.lock import RunLock
from forgather.checkpoint.manifest import MANIFEST, Manifest, ManifestError, OtherFormatError, UnreadableError
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.errors import EXIT_OK, CheckpointError

SUMMARY = "List, inspect, verify, compare or remove checkpoints"
NEEDS_CONFIG = False
EXIT_DIFFERENT = 1  # as diff has it


def configure(parser: CommandParser) -> None:
    """Five verbs; each takes runs or checkpoints by their folders."""
    listing = parser.add_verb("ls", "List the checkpoints of a run")
    listing.add_argument("run", metavar="RUN", help="a run folder")
    inspect = parser.add_verb("inspect", "Show what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, or a run for its newest")
    inspect.add_argument("--tensors", metavar="REGEX", help="list the tensors in whose names this is found")
    verify = parser.add_verb("verify", "Read every file and compare it with its digest")
    verify.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, or a run for all of its own")
    diff = parser.add_verb("diff", "Show how two checkpoints differ; exit code 1 if they do")
    diff.add_argument("left", metavar="A", help="a checkpoint folder, or a run for its newest")
    diff.add_argument("right", metavar="B", help="another")
    prune = parser.add_verb("prune", "Remove checkpoints that no rule keeps, and what interrupted saves have left")
    prune.add_argument("run", metavar="RUN", help="a run folder; nobody may be training there")
    prune.add_argument("--last", type=int, metavar="N", help="keep the N newest (default: 1)")
    prune.add_argument("--every", type=int, metavar="N", help="keep those of steps that N divides")
    prune.add_argument("--best", type=int, metavar="N", help="keep the N with the lowest metric")
    prune.add_argument("--metric", default="loss", metavar="NAME", help="the metric of --best (default: loss)")
    prune.add_argument("--highest", action="store_true", help="with --best: the highest are the best")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(options: Options) -> int:
    """Do what the verb says."""
    match options.verb:
        case "ls":
            _list(Path(options.run))
        case "inspect":
            _inspect(_one(Path(options.checkpoint)), options.tensors)
        case "verify":
            _verify(_all(Path(options.checkpoint)))
        case "diff":
            return _diff(_one(Path(options.left)), _one(Path(options.right)))
        case "prune":
            _prune(Path(options.run), options)
    return EXIT_OK


def _list(run: Path) -> None:
    checkpoints = _checkpoints_of(run)
    rows = [["step", "saved at", "size", "mesh", "evaluation", ""]]
    for step in saved_steps(checkpoints):
        folder = checkpoints / step_name(step)
        try:
            manifest = Manifest.read(folder)
            damage = manifest.damaged_sizes(folder)
        except (OtherFormatError, UnreadableError) as error:
            rows.append([str(step), "", "", "", "", error.line])
            continue
        except ManifestError as error:
            rows.append([str(step), "", "", "", "", f"damaged: {error.line}"])
            continue
        state = f"damaged: {'; '.join(damage)}" if damage else ""
        rows.append([str(step), manifest.saved_at, _size(manifest.size), _mesh(manifest), _metrics(manifest), state])
    _print_table(rows if len(rows) > 1 else [["no checkpoint yet"]])
    for leftover in leftovers(checkpoints):
        print(f"{leftover.name} is left of an interrupted save or removal")
    for aside in sorted(checkpoints.glob("step-*.damaged*")):
        print(f"{aside.name} was found damaged, and is set aside")


def _inspect(folder: Path, pattern: str | None) -> None:
    manifest = Manifest.read(folder)
    layout = read_layout(folder)
    print(f"{folder}")
    rows = [
        ["step", f"{manifest.step:,}"],
        ["saved at", manifest.saved_at],
        ["saved by", f"{manifest.world_size} process{'es' if manifest.world_size > 1 else ''}, mesh {_mesh(manifest)}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())],
        ["evaluation", _metrics(manifest) or "none at this step"],
        ["files", f"{len(manifest.files)}, {_size(manifest.size)}"],
    ]
    for kind in ("model", "optimizer", "extras", "random"):
        tensors = [stored for name, stored in layout.items() if name.startswith(f"{kind}/")]
        if tensors:
            elements = sum(stored.numel for stored in tensors)
            rows.append([kind, f"{len(tensors)} tensors, {elements:,} elements, {_dtypes(tensors)}"])
    document = json.loads((folder / DOCUMENT).read_bytes())
    for name, state in document["extras"].items():
        rows.append([f"state of {name}", _short(state)])
    _print_table(rows)
    if pattern is not None:
        _print_tensors(layout, pattern)


def _print_tensors(layout: dict[str, StoredTensor], pattern: str) -> None:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--tensors: {pattern!r} is no regular expression: {error}", fix="--tensors .") from error
    found = {name: stored for name, stored in layout.items() if wanted.search(name)}
    print()
    _print_table([[name, f"{list(s.shape)}", s.dtype, f"{len(s.chunks)} chunks"] for name, s in found.items()])
    print(f"{len(found)} of {len(layout)} tensors")


def _verify(folders: Sequence[Path]) -> None:
    damaged, foreign = [], []
    for folder in folders:
        try:
            manifest = Manifest.read(folder)
            damage = manifest.damaged_sizes(folder) or manifest.damaged_digests(folder, manifest.files)
        except (OtherFormatError, UnreadableError) as error:
            print(f"{folder}: {error.line}")
            foreign.append(error)
            continue
        except ManifestError as error:
            damage = [error.line]
        print(f"{folder}: {'; '.join(damage) if damage else f'whole, {_size(manifest.size)} read'}")
        damaged += [folder.name] if damage else []
    if damaged:
        raise CheckpointError(
            f"damaged: {', '.join(damaged)}",
            fix="bring back the files named above; a resume takes the newest that is whole",
        )
    if foreign:
        raise foreign[0]


def _diff(left: Path, right: Path) -> int:
    from forgather.checkpoint.comparison import compare
    from forgather.checkpoint.loading import Checkpoint
    from forgather.checkpoint.resume import differences

    ours, theirs = Checkpoint(left, Manifest.read(left)), Checkpoint(right, Manifest.read(right))
    print(f"A: {left}, step {ours.step:,}\nB: {right}, step {theirs.step:,}")
    for line in differences(ours, theirs):
        print(line)
    found = compare(left, right)
    for title, names in (("only in A", found.only_left), ("only in B", found.only_right)):
        for name in names:
            print(f"{title}: {name}")
    for name, one, other in found.kinds:
        print(f"{name}: {one} in A, {other} in B")
    print(f"{len(found.equal)} tensors are equal, {len(found.differing)} have other values")
    if found.differing:
        shown = found.differing[:20]
        head = ["tensor", "largest difference", "norm of it / norm in A"]
        _print_table([head, *([d.name, f"{d.largest:.3g}", f"{d.relative:.3g}"] for d in shown)])
        if len(found.differing) > len(shown):
            print(f"and {len(found.differing) - len(shown)} that differ less")
    return EXIT_OK if found.is_equal else EXIT_DIFFERENT


def _prune(run: Path, options: Options) -> None:
    if options.last is None and options.every is None and options.best is None:
        raise UsageError("prune is not told what to keep", fix="--last 2, --every 1000, --best 3, or several of them")
    for flag, count in (("--last", options.last), ("--every", options.every), ("--best", options.best)):
        if count is not None and count < 1:
            raise UsageError(f"{flag} is {count}", fix=f"give {flag} a whole number from 1")
    keep = Keep(
        1 if options.last is None else options.last, options.every, options.best, options.metric, options.highest
    )
    checkpoints = _checkpoints_of(run)
    lock = RunLock(run / ".lock")  # a live run removes its checkpoints itself
    try:
        whole = {step: manifest.metrics for step, manifest in whole_manifests(checkpoints).items()}
        if keep.best is not None and whole and not keep.ranked(whole):
            raise CheckpointError(
                f"no checkpoint of {run} has the metric {keep.metric!r}, so that none is the best",
                fix="name one that `forgather checkpoint ls` shows, or leave out --best",
            )
        doomed = [*leftovers(checkpoints), *(checkpoints / step_name(step) for step in keep.doomed(whole))]
        for folder in doomed:
            if not options.dry_run:
                remove(folder)
            print(f"{'would remove' if options.dry_run else 'removed'} {folder}")
    finally:
        lock.release()
    kept = [str(step) for step in whole if checkpoints / step_name(step) not in doomed]
    damaged = [str(step) for step in saved_steps(checkpoints) if step not in whole]
    left_alone = f"; damaged, which no rule counts or removes: {', '.join(damaged)}" if damaged else ""
    print(f"kept: {', '.join(kept) or 'none'}{left_alone}")


def _checkpoints_of(run: Path) -> Path:
    folder = run / "checkpoints"
    if not folder.is_dir():
        runs = sorted(str(found.parent) for found in run.glob("*/checkpoints")) if run.is_dir() else []
        fix = (
            f"name one of the runs in it: {', '.join(runs[:4])}" if runs else "name a run folder, such as runs/default"
        )
        if run.exists():
            raise CheckpointError(f"{run} is no run: it has no folder checkpoints", fix=fix)
        there = sorted(path.name for path in run.parent.glob("step-*"))
        raise CheckpointError(
            f"there is no {run}",
            fix=f"of this run there are {', '.join(there)}" if there else f"{fix}",
        )
    return folder


def _all(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or those of the run that it is, the newest last."""
    if (path / MANIFEST).exists():
        return [path]
    checkpoints = _checkpoints_of(path)
    found = [checkpoints / step_name(step) for step in saved_steps(checkpoints)]
    if not found:
        raise CheckpointError(f"the run {path} has saved no checkpoint yet", fix="wait for its first save")
    return found


def _one(path: Path) -> Path:
    return _all(path)[-1]


def _mesh(manifest: Manifest) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in manifest.mesh.items() if size > 1) or "one process"


def _metrics(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in manifest.metrics.items() if name != "targets")


def _dtypes(tensors: Sequence[StoredTensor]) -> str:
    return ", ".join(sorted({stored.dtype for stored in tensors}))


def _short(state: Any, most: int = 160) -> str:
    text = json.dumps(state)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
