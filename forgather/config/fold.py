"""Folds the expressions of a scalar, or keeps them for building when they name what only building makes."""

from typing import TYPE_CHECKING

from forgather.config.expressions import Chain, Expression, split_template
from forgather.config.names import did_you_mean
from forgather.config.nodes import Constant, Node, NodeKey, Reference, Scope, Template, Used
from forgather.config.plain import NotPlainError, is_plain, plain_value
from forgather.config.problems import Problems, problem
from forgather.config.tree import Place, Plain, Scalar

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace


def fold(namespace: "Namespace", key: NodeKey, value: Scalar, scope: Scope | None) -> Node:
    """The node of a scalar: a constant when all that its expressions name is plain, else one for building."""
    if not value.is_template:
        return Constant(key, value.place, scope, value.content)
    parts = split_template(str(value.content), value.place)
    used: set[Used] = set()
    values: dict[Chain, Plain] = {}
    failed: dict[Chain, Problems] = {}
    operands: list[tuple[Chain, Node, int]] = []
    for part in parts:
        for chain in part.chains if isinstance(part, Expression) else ():
            try:
                _read_chain(namespace, key, chain, value.place, scope, values, operands, used)
            except Problems as error:
                failed[chain] = error  # told when the expression needs it: not from a branch that is not taken
    if operands:
        if failed:
            raise Problems([each for error in failed.values() for each in error.problems])
        for part in parts:
            if isinstance(part, Expression) and any(name == "env" for name, _ in part.calls):
                fix = "read it in a parameter's default, and name the parameter here"
                raise problem(value.place, "env() is early, and this expression is evaluated while building", fix=fix)
        return Template(key, value.place, scope, tuple(parts), tuple(operands), values, frozenset(used))

    def meaning(chain: Chain) -> Plain:
        if chain in failed:
            raise failed[chain]
        return values[chain]

    folded = [part if isinstance(part, str) else part.evaluate(meaning, namespace.resolve_path) for part in parts]
    for each in folded:
        if not is_plain(each):
            kind = "dict with keys that are no text" if isinstance(each, dict) else type(each).__name__
            raise problem(value.place, f"the expression gave a {kind}", fix="an expression computes plain data")
    try:
        whole = folded[0] if len(folded) == 1 else "".join(str(each) for each in folded)
    except ValueError as error:  # an int of more digits than Python writes
        raise problem(value.place, f"the expression gave no text: {error}", fix="give a smaller number") from None
    return Constant(key, value.place, scope, whole, frozenset(used))


def _read_chain(
    namespace: "Namespace",
    key: NodeKey,
    chain: Chain,
    place: Place,
    scope: Scope | None,
    values: dict[Chain, Plain],
    operands: list[tuple[Chain, Node, int]],
    used: set[Used],
) -> None:
    if chain.steps[0].key in ("project", "config"):
        values[chain] = _context_value(namespace, chain, place)
        return
    reached = namespace.reach(chain.steps, place, scope, in_expression=True)
    used |= reached.used
    if not reached.remaining:
        try:
            values[chain] = plain_value(reached.node, used)
            return
        except NotPlainError:
            pass
    operand_key = NodeKey(key.namespace, (*key.path, f"({len(operands)})"))
    reference = Reference(operand_key, place, scope, reached.node, reached.used)
    operands.append((chain, reference, len(chain.steps) - reached.remaining))


def _context_value(namespace: "Namespace", chain: Chain, place: Place) -> str:
    known = {
        "project.dir": str(namespace.project.dir),
        "project.name": namespace.project.name,
        "project.output": str(namespace.context.output),
        "config.name": namespace.config.path.relative_to(namespace.project.configs).as_posix().removesuffix(".yaml"),
    }
    name = str(chain)
    if name not in known:
        raise problem(place, f"nothing is called {name!r}", fix=did_you_mean(name, known))
    return known[name]
