"""What a server begins with: the values of a model, in fragments, and how much memory is left beside them."""

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.messages import Version
from forgather.diloco.settings import Settings
from forgather.errors import ConfigError

_LEAST_BYTES = 64 << 20


def fragments_of(values: Mapping[str, Tensor], settings: Settings) -> list[FragmentValues]:
    """The fragments of a model with these values, in fp32. ConfigError unless they are those of the settings."""
    _require_parameters(values, settings)
    return [_fragment(values, names, settings.download) for names in settings.fragments]


def _fragment(values: Mapping[str, Tensor], names: Sequence[str], download: str) -> FragmentValues:
    mine = {name: values[name].detach().to("cpu", torch.float32).contiguous() for name in names}
    digest = xxhash.xxh3_64()
    for tensor in mine.values():
        digest.update(raw_bytes(tensor))
    return FragmentValues(mine, Version(0, digest.hexdigest()), download)


def _require_parameters(values: Mapping[str, Tensor], settings: Settings) -> None:
    named = [name for names in settings.fragments for name in names]
    missing = sorted(set(settings.parameters) - set(values)) + sorted(set(settings.parameters) - set(named))
    extra = sorted(set(values) - set(settings.parameters)) + sorted(set(named) - set(settings.parameters))
    if missing or extra or len(named) != len(set(named)):
        raise ConfigError(
            "values, settings and fragments are not of the same parameters: "
            f"missing {', '.join(missing[:5]) or 'none'}; not wanted {', '.join(extra[:5]) or 'none'}",
            fix="make the settings from the model that is given",
        )


def spool_budget(fragments: Sequence[FragmentValues], num_states: int) -> int:
    """Bytes of memory for contributions, so that a server takes no more than four models and half a GB.

    The rest of it are master and published values, the `num_states` of the outer optimizer, the change, and room for
    one parameter. Where that is all of it, contributions go to files but for 64 MiB.
    """
    model = sum(4 * fragment.numel for fragment in fragments)
    change = sum(fragment.change.data.nbytes for fragment in fragments if fragment.change is not None)
    largest = max(tensor.nbytes for fragment in fragments for tensor in fragment.master.values())
    return max(_LEAST_BYTES, (2 - num_states) * model - change - largest)
