"""What of a server survives it: a checkpoint as of any run, and a journal of the rounds since.

    model/<parameter>                  the master values, which `forgather export` takes
    optimizer/<key>                    the outer optimizer's tensors
    extras/diloco/published/<name>     what workers have, where it is not the master's
    extras/diloco/change/<fragment>    the change that leads to the last version, so that it can still be sent
    extras of the document             versions, lineages, members, who was counted when, the ledger of work units

It is written between outer steps: a server that comes back stands before or after a version, never within.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from forgather.checkpoint.document import Json, join, split
from forgather.checkpoint.layout import Layout
from forgather.checkpoint.part import write_all
from forgather.checkpoint.storage import dtype_of
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.messages import Version, parse_json
from forgather.durable import sync
from forgather.errors import CheckpointError

EXTRA = "diloco"


class OuterState(Protocol):
    """What is saved of an outer optimizer."""

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def describe(self) -> str: ...


class ServerState:
    """The live objects of a server, as `CheckpointStore` saves and loads them.

    `document` is the state that is no tensor, as it is to be found after a restart, set by whoever saves;
    `accept_document` takes what was saved.
    """

    mesh: Mapping[str, int] = {}

    def __init__(
        self,
        fragments: Sequence[FragmentValues],
        outer: OuterState,
        constants: Mapping[str, Tensor],
        accept_document: Callable[[Mapping[str, Any]], None],
        extras: Mapping[str, Stateful],
    ) -> None:
        self.fragments = fragments
        self.outer = outer
        self.constants = dict(constants)
        self.extras: dict[str, Any] = {EXTRA: None, **extras}
        self._others = extras
        self.document: dict[str, Any] = {}
        self._accept_document = accept_document

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        """The live tensors by name, and the document of the rest."""
        tensors = self._model()
        tensors |= {f"optimizer/{key}": tensor for key, tensor in self.outer.state_tensors().items()}
        tensors |= self._published()
        changes = {}
        for number, fragment in enumerate(self.fragments):
            if fragment.change is not None and fragment.changed_from is not None:
                tensors[f"extras/{EXTRA}/change/{number}"] = fragment.change.data
                changes[str(number)] = fragment.changed_from.to_json()
        own = self.document | {"changes": changes, "outer": self.outer.describe()}
        extras, others = split({name: extra.state_dict() for name, extra in self._others.items()}, "extras")
        assert isinstance(extras, dict), "a dict of states becomes a dict"
        return tensors | others, {"optimizer": {}, "extras": {EXTRA: own, **extras}, "random": {}}

    def targets(self, saved: Layout, document: Mapping[str, Any]) -> dict[str, Tensor]:
        """The live values, and room for what is not there before the first step."""
        targets = self._model()
        live = self.outer.state_tensors()
        for key in saved:
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                targets[key] = live[rest] if rest in live else _room(saved, key)
            elif kind == "extras" and rest.split("/")[0] in self._others:
                targets[key] = _room(saved, key)
        changes = document["extras"][EXTRA]["changes"]
        for number, fragment in enumerate(self.fragments):
            for name, tensor in fragment.published.items():
                if f"extras/{EXTRA}/published/{name}" in saved:
                    targets[f"extras/{EXTRA}/published/{name}"] = tensor
            if fragment.change is not None and str(number) in changes:
                targets[f"extras/{EXTRA}/change/{number}"] = fragment.change.data
        return targets

    @torch.no_grad()
    def accept(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take what was read into `targets`."""
        own = document["extras"][EXTRA]
        for fragment in self.fragments:
            for name, values in fragment.published.items():
                if f"extras/{EXTRA}/published/{name}" not in tensors:
                    values.copy_(fragment.master[name])
        self._accept_document(own)
        for key, before in own["changes"].items():
            fragment = self.fragments[int(key)]
            fragment.moved(fragment.version, Version.from_json(before))
        self.outer.load({key.partition("/")[2]: each for key, each in tensors.items() if key.startswith("optimizer/")})
        for name, extra in self._others.items():
            if name in document["extras"]:
                extra.load_state_dict(join(document["extras"][name], tensors))

    def _model(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.constants.items()}
        for fragment in self.fragments:
            tensors |= {f"model/{name}": tensor for name, tensor in fragment.master.items()}
        return tensors

    def _published(self) -> dict[str, Tensor]:
        """The published values that are not the master's; with fp32 they are, and soon will be where they are not."""
        return {
            f"extras/{EXTRA}/published/{name}": tensor
            for fragment in self.fragments
            if fragment.change is not None and fragment.version.number + fragment.change_generation > 0
            for name, tensor in fragment.published.items()
        }


class Journal:
    """One line for each version that is published before it is saved: who made it, fsynced before anybody hears of it.

    A server that comes back from an older state lets the same contributions close the same rounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, fragment: int, version: Version, contributors: Sequence[tuple[str, int]]) -> None:
        """Return when it is on the disk. OSError when that cannot be; then there is no such line."""
        line = json.dumps([fragment, version.to_json(), [list(each) for each in contributors]]) + "\n"
        is_new = not self.path.exists()
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                write_all(file.fileno(), memoryview(line.encode()))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        if is_new:
            sync(self.path.parent)

    def clear(self) -> None:
        """All of its rounds are in a checkpoint."""
        self.path.unlink(missing_ok=True)

    def after(self, versions: Sequence[Version]) -> list[list[list[tuple[str, int]]]]:
        """For each fragment the contributors of the rounds that these versions do not have, in order.

        Lines that are of other values than these are of no use, and passed over.
        """
        rounds: list[list[list[tuple[str, int]]]] = [[] for _ in versions]
        if not self.path.exists():
            return rounds
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was not finished
        for line in lines:
            try:
                fragment, version, contributors = parse_json(line)
                number = Version.from_json(version).number
                found = [(str(worker), int(round)) for worker, round in contributors]
            except Exception as error:
                raise CheckpointError(
                    f"{self.path} is damaged: {line[:60]!r}", fix=f"remove it, to go on without: {self.path}"
                ) from error
            place = number - versions[fragment].number - 1
            if 0 <= place <= len(rounds[fragment]) and rounds[fragment][place : place + 1] != [found]:
                # What was made again as it was is nothing new; if others made it, what came after is not to come again.
                rounds[fragment][place:] = [found]
        return rounds


def _room(saved: Layout, key: str) -> Tensor:
    return torch.empty(saved[key].shape, dtype=dtype_of(saved[key]))
