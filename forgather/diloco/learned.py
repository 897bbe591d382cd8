"""What a rank has learned since its anchor, of which parts of contributions are made."""

from collections.abc import Mapping
from dataclasses import dataclass

from forgather.diloco.local_fragment import LocalFragment, Numbers, Part
from forgather.diloco.messages import Content, Identity


@dataclass(frozen=True)
class Learned:
    """`sent` is what the parameters of `fragment` were after `steps` steps with so many `tokens`."""

    fragment: LocalFragment
    worker: str
    origin: str
    sent: Numbers
    tokens: int
    steps: int
    consumed: Mapping[str, int]

    def part(self, round: int, *, as_differences: bool) -> Part:
        """This rank's part for a round, whose payload is still to be written.

        As differences, whatever the codec would send, where asked for. TrainingError where a number is not finite.
        """
        fragment = self.fragment
        fragment.require_finite(self.sent)
        content: Content = "differences" if as_differences or fragment.upload != "fp32" else "values"
        identity = Identity(self.worker, round, fragment.number, fragment.part or 0)
        return fragment.part_of(
            identity, content, tokens=self.tokens, steps=self.steps, consumed=self.consumed, origin=self.origin
        )

    def write(self, part: Part) -> None:
        """Write its payload; what goes wrong is raised to whoever waits for its bytes."""
        self.fragment.write(part, self.sent)
