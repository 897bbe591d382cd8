"""Expressions: `${...}` in a scalar.

Python's own parser reads them and a list of what is allowed keeps the rest out, so precedence, literals and messages
are the ones that everybody knows. An `Expression` does not know what its names mean: whoever evaluates or emits it
hands over the meaning of each *chain* (`hf_config.hidden_size`, `xs[0]`).
"""

import ast
import math
import os
from collections.abc import Callable
from typing import Any

from forgather.config.names import EXPRESSION_FUNCTIONS, did_you_mean
from forgather.config.paths import Step
from forgather.config.problems import problem
from forgather.config.tree import Place

_WORDS = {"null": None, "true": True, "false": False}
_ALLOWED = "allowed: arithmetic, comparison, and/or/not, a if c else b, in, indexing, literals, "
_ALLOWED += ", ".join(f"{name}()" for name in EXPRESSION_FUNCTIONS)
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: +a,
    ast.Not: lambda a: not a,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
# What each function is called in emitted Python, and the module that it needs. `env` and `path` do not get there.
PYTHON_FUNCTIONS = {
    **{name: (name, None) for name in ("min", "max", "abs", "round", "int", "float", "str", "bool", "len")},
    **{name: (name, "math") for name in ("ceil", "floor", "sqrt", "log2")},
    "join": ("join", "os.path"),
}
_CALLABLE: dict[str, Callable[..., Any]] = {
    **{function.__name__: function for function in (min, max, abs, round, len)},
    **{kind.__name__: kind for kind in (int, float, str, bool)},
    **{function.__name__: function for function in (math.ceil, math.floor, math.sqrt, math.log2)},
    "join": os.path.join,
}


class Chain:
    """A name and the constant steps behind it: `a.b["c"][0]`. One object for each place in the expression."""

    __slots__ = ("node", "parts", "steps")

    def __init__(self, steps: tuple[Step, ...], parts: tuple[ast.expr, ...]) -> None:
        self.steps = steps
        self.parts = parts  # parts[i] is the syntax of steps[: i + 1]
        self.node = parts[-1]

    def __str__(self) -> str:
        return ast.unparse(self.node)


class Expression:
    """The inside of one `${...}`, parsed and found to hold nothing but what is allowed."""

    __slots__ = ("calls", "chains", "place", "root", "text")

    def __init__(self, text: str, place: Place) -> None:
        self.text = text
        self.place = place
        self.chains: list[Chain] = []
        self.calls: list[tuple[str, ast.Call]] = []
        try:
            self.root = ast.parse(text.strip(), mode="eval").body
            self._admit(self.root)
        except (SyntaxError, ValueError) as error:
            said = error.msg if isinstance(error, SyntaxError) else str(error)
            raise problem(place, f"${{{text}}}: {said}", fix="write an expression as in Python") from None
        except (RecursionError, MemoryError):  # both are what Python's parser says of too much nesting
            shown = text if len(text) < 60 else f"{text[:57]}..."
            raise problem(
                place, f"${{{shown}}} is nested too deeply", fix="give its parts names of their own"
            ) from None

    def _admit(self, node: ast.expr) -> None:
        """Collects chains in the order in which they are written; refuses what is not allowed."""
        chain = _chain(node)
        if chain is not None:
            if not (len(chain.steps) == 1 and chain.steps[0].key in _WORDS):
                self.chains.append(chain)
            return
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return
            case ast.BinOp() if type(node.op) in _BINARY:
                children = [node.left, node.right]
            case ast.UnaryOp() if type(node.op) in _UNARY:
                children = [node.operand]
            case ast.BoolOp():
                children = node.values
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                children = [node.left, *node.comparators]
            case ast.IfExp():
                children = [node.body, node.test, node.orelse]
            case ast.Subscript(slice=ast.Slice()):
                raise self._refused("a slice")
            case ast.Subscript():
                children = [node.value, node.slice]
            case ast.Attribute():
                children = [node.value]
            case ast.List() | ast.Tuple():
                children = node.elts
            case ast.Dict():
                children = [part for pair in zip(node.keys, node.values, strict=True) for part in pair if part]
                if None in node.keys:
                    raise self._refused("**")
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                if name not in EXPRESSION_FUNCTIONS:
                    fix = did_you_mean(name, EXPRESSION_FUNCTIONS, what="the functions")
                    raise problem(self.place, f"${{{self.text}}}: unknown function {name!r}", fix=fix)
                self.calls.append((name, node))
                children = node.args
            case _:
                raise self._refused(type(node).__name__.lower())
        for child in children:
            self._admit(child)

    def _refused(self, what: str) -> Exception:
        return problem(self.place, f"${{{self.text}}}: {what} is not part of expressions", fix=_ALLOWED)

    def evaluate(
        self, meaning: Callable[[Chain], Any], path: Callable[[Place, str], str], *, is_late: bool = False
    ) -> Any:
        """The value, with `meaning` for each chain and for `path()`. Raises Problems when it has none."""
        by_node = {id(chain.node): chain for chain in self.chains}
        return _Evaluation(self, by_node, meaning, path, is_late).run()


class _Evaluation:
    def __init__(
        self,
        expression: Expression,
        chains: dict[int, Chain],
        meaning: Callable[[Chain], Any],
        path: Callable[[Place, str], str],
        is_late: bool,
    ) -> None:
        self.expression = expression
        self.chains = chains
        self.meaning = meaning
        self.path = path
        self.is_late = is_late

    def run(self) -> Any:
        try:
            return self.value(self.expression.root)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            MemoryError,
            RecursionError,
        ) as error:
            said = f"no key {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            place, text = self.expression.place, self.expression.text
            fix = "check the operands"
            if isinstance(error, AttributeError) and self.is_late:
                fix = 'a given target and a built object have attributes; write ["name"] for a key of a dict'
            raise problem(place, f"${{{text}}} has no value: {said}", fix=fix) from error

    def value(self, node: ast.expr) -> Any:
        chain = self.chains.get(id(node))
        if chain is not None:
            return self.meaning(chain)
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return _WORDS[node.id]
            case ast.BinOp():
                return _BINARY[type(node.op)](self.value(node.left), self.value(node.right))
            case ast.UnaryOp():
                return _UNARY[type(node.op)](self.value(node.operand))
            case ast.BoolOp(op=ast.And()):
                return self._last(node.values, stop=False)
            case ast.BoolOp():
                return self._last(node.values, stop=True)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
            case ast.Subscript():
                return self.value(node.value)[self.value(node.slice)]
            case ast.Attribute():
                base = self.value(node.value)
                return base[node.attr] if isinstance(base, dict) and not self.is_late else getattr(base, node.attr)
            case ast.List():
                return [self.value(each) for each in node.elts]
            case ast.Tuple():
                return tuple(self.value(each) for each in node.elts)
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return {self.value(key): self.value(value) for key, value in pairs if key is not None}
            case ast.Call(func=ast.Name(id=name)):
                return self._call(name, [self.value(each) for each in node.args])
        raise AssertionError(f"{type(node).__name__} was admitted but is not evaluated")

    def _last(self, nodes: list[ast.expr], *, stop: bool) -> Any:
        value = None
        for node in nodes:
            value = self.value(node)
            if bool(value) is stop:
                break
        return value

    def _compare(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for operator, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.value(comparator)
            if not _COMPARE[type(operator)](left, right):
                return False
            left = right
        return True

    def _call(self, name: str, arguments: list[Any]) -> Any:
        if name == "path":
            return self.path(self.expression.place, *arguments)
        if name == "env":
            return env_function(self.expression, *arguments)
        return _CALLABLE[name](*arguments)


# Set by launchers, different on each rank: a config that read them would not be the same on all.
_RUNTIME_VARIABLES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR "  # noqa: SIM905
    "MASTER_PORT NODE_RANK SLURM_PROCID SLURM_LOCALID SLURM_NODEID OMPI_COMM_WORLD_RANK PMI_RANK".split()
)


def env_function(expression: Expression, name: str, default: str | None = None) -> str | None:
    """`env("X", default)`: read while the config is resolved."""
    if name in _RUNTIME_VARIABLES:
        fix = "take it from an object when running: the environment or the mesh"
        raise problem(expression.place, f"env({name!r}) differs between ranks, and a config may not", fix=fix)
    return os.environ.get(name, default)


def late_path(place: Place, text: str) -> str:
    """`path(x)` of a value that only building knows: relative to the file that writes it."""
    return os.path.normpath(os.path.join(str(place.folder), text))  # noqa: PTH118  (what emitted code says)


def _chain(node: ast.expr) -> Chain | None:
    """The chain that `node` is, if it is a name with constant steps behind it."""
    steps: list[Step] = []
    parts: list[ast.expr] = []
    here = node
    while True:
        parts.append(here)
        match here:
            case ast.Name(id=name):
                steps.append(Step(name))
                return Chain(tuple(reversed(steps)), tuple(reversed(parts)))
            case ast.Attribute(value=value, attr=name):
                steps.append(Step(name))
            case ast.Subscript(value=value, slice=ast.Constant(value=str() | int() as key)) if not isinstance(
                key, bool
            ):
                steps.append(Step(key, is_dotted=False))
            case ast.Subscript(
                value=value, slice=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number))
            ):
                steps.append(Step(-number, is_dotted=False))
            case _:
                return None
        here = value


def split_template(text: str, place: Place) -> list[str | Expression]:
    """Text and expressions in turn; `$${` is the text `${`. Raises Problems when an expression does not end."""
    parts: list[str | Expression] = []
    literal = ""
    position = 0
    while (found := text.find("${", position)) >= 0:
        if found > 0 and text[found - 1] == "$":
            literal += text[position : found - 1] + "${"
            position = found + 2
            continue
        end = _closing_brace(text, found + 2)
        if end is None:
            raise problem(
                place,
                f"no }} ends {text[found : found + 40]!r}",
                fix="quote a value that holds ' #'; $${ is the text ${",
            )
        literal += text[position:found]
        if literal:
            parts.append(literal)
        literal = ""
        parts.append(Expression(text[found + 2 : end], place))
        position = end + 1
    literal += text[position:]
    return [*parts, literal] if literal or not parts else parts


def _closing_brace(text: str, start: int) -> int | None:
    depth, quote, position = 0, "", start
    while position < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            if depth == 0 and character == "}":
                return position
            depth -= 1
        position += 1
    return None
