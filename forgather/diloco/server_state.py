"""What of a server survives it: a checkpoint as of any run. (`journal` has the rounds since.)

    model/<parameter>                  the published values, which all workers have: what `forgather export` takes
    optimizer/<key>                    the outer optimizer's tensors
    extras/diloco/master/<name>        what the outer optimizer moves, where it is not what was published
    extras/diloco/change/<fragment>    the change that leads to the last version, so that it can still be sent
    extras of the document             versions, lineages, members, who was counted when, the ledger of work units

It is written between outer steps: a server that comes back stands before or after a version, never within.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from forgather.checkpoint.document import Json, join, split
from forgather.checkpoint.layout import Layout
from forgather.checkpoint.storage import dtype_of
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.messages import Version
from forgather.diloco.outer import Outer
from forgather.errors import CheckpointError

EXTRA = "diloco"
FORMAT = 3  # of the document; nothing reads another


class ServerState:
    """The live objects of a server, as `CheckpointStore` saves and loads them.

    `document` is the state that is no tensor, as it is to be found after a restart, set by whoever saves;
    `require_document` raises where it is of a server with other settings, `accept_document` takes what was saved.
    """

    mesh: Mapping[str, int] = {}

    def __init__(
        self,
        fragments: Sequence[FragmentValues],
        outer: Outer,
        constants: Mapping[str, Tensor],
        require_document: Callable[[Mapping[str, Any]], None],
        accept_document: Callable[[Mapping[str, Any]], None],
        extras: Mapping[str, Stateful],
    ) -> None:
        self.fragments = fragments
        self.outer = outer
        self.constants = dict(constants)
        self.extras: dict[str, Any] = {EXTRA: None, **extras}
        self._others = extras
        self.document: dict[str, Any] = {}
        self._require_document = require_document
        self._accept_document = accept_document

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Json]]:
        """The live tensors by name, and the document of the rest."""
        tensors = self._model()
        tensors |= {f"optimizer/{key}": tensor for key, tensor in self.outer.state_tensors().items()}
        tensors |= self._master()
        changes = {}
        for number, fragment in enumerate(self.fragments):
            if fragment.change is not None and fragment.changed_from is not None:
                tensors[f"extras/{EXTRA}/change/{number}"] = fragment.change.data
                changes[str(number)] = fragment.changed_from.to_json()
        own = self.document | {"format": FORMAT, "changes": changes}
        extras, others = split({name: extra.state_dict() for name, extra in self._others.items()}, "extras")
        assert isinstance(extras, dict), "a dict of states becomes a dict"
        return tensors | others, {"optimizer": {}, "extras": {EXTRA: own, **extras}, "random": {}}

    def targets(self, saved: Layout, document: Mapping[str, Any]) -> dict[str, Tensor]:
        """The live values, and room for what is not there before the first step.

        CheckpointError for a run that is no server's, for the state of another version of forgather, and of a server
        with other settings or another model.
        """
        self._require(saved, document["extras"].get(EXTRA) or {})
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
            for name, tensor in fragment.master.items():
                if f"extras/{EXTRA}/master/{name}" in saved:
                    targets[f"extras/{EXTRA}/master/{name}"] = tensor
            if fragment.change is not None and str(number) in changes:
                targets[f"extras/{EXTRA}/change/{number}"] = fragment.change.data
        return targets

    @torch.no_grad()
    def accept(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take what was read into `targets`."""
        own = document["extras"][EXTRA]
        for fragment in self.fragments:
            for name, values in fragment.master.items():
                if f"extras/{EXTRA}/master/{name}" not in tensors:
                    values.copy_(fragment.published[name])
        self._accept_document(own)
        for key, before in own["changes"].items():
            fragment = self.fragments[int(key)]
            fragment.moved(fragment.version, Version.from_json(before))
        self.outer.load({key.partition("/")[2]: each for key, each in tensors.items() if key.startswith("optimizer/")})
        for name, extra in self._others.items():
            if name in document["extras"]:
                extra.load_state_dict(join(document["extras"][name], tensors))

    def _require(self, saved: Layout, own: Mapping[str, Any]) -> None:
        if "members" not in own:  # which servers of all formats have, and workers have not
            raise CheckpointError(
                "the checkpoints in this folder are of a training run, and not of a server",
                fix="give another folder: -o DIR, with -m RUN to begin with the model of this run",
            )
        if own.get("format") != FORMAT:
            raise CheckpointError(
                f"this state of a server has format {own.get('format', 1)}, and this version of forgather writes and "
                f"reads {FORMAT}",
                fix="go on with the version that wrote it; or `forgather export` its model, and begin with that in "
                "another folder: -m EXPORTED -o ANOTHER",
            )
        self._require_document(own)
        for key, tensor in self._model().items():
            if key in saved and tuple(saved[key].shape) != tuple(tensor.shape):
                name, there, here = key.partition("/")[2], list(saved[key].shape), list(tensor.shape)
                raise CheckpointError(
                    f"the state in this folder is of another model: {name} is {there} there, and {here} in the one "
                    "that the server was started with",
                    fix="leave out -m, so that it is the folder's own; or give another folder: -o DIR",
                )

    def _model(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.constants.items()}
        for fragment in self.fragments:
            tensors |= {f"model/{name}": tensor for name, tensor in fragment.published.items()}
        return tensors

    def _master(self) -> dict[str, Tensor]:
        """The master values that are not the published ones: none with fp32, and none before the first step."""
        return {
            f"extras/{EXTRA}/master/{name}": tensor
            for fragment in self.fragments
            if fragment.change is not None and fragment.version.number + fragment.change_generation > 0
            for name, tensor in fragment.master.items()
        }


def _room(saved: Layout, key: str) -> Tensor:
    return torch.empty(saved[key].shape, dtype=dtype_of(saved[key]))
