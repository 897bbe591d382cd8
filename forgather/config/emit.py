"""Writes Python that builds what the graph builds: the reference semantics of the language.

The source is one function, `construct`, whose parameters are the given targets. It constructs in the same order as
`build`: each argument in written order, depth first. An expression stays inline until a later sibling needs a
statement; then those before it are put into variables first, so that nothing overtakes.
"""

import ast
import builtins
import keyword
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from forgather.config.expressions import PYTHON_FUNCTIONS, Expression
from forgather.config.layout import INDENT, Bracket, Item, Layout, constant, flat, write
from forgather.config.nodes import (
    Argument,
    Call,
    Constant,
    Container,
    Entries,
    Function,
    Given,
    Node,
    NodeKey,
    Part,
    Reference,
    Symbol,
    Template,
    walk,
)
from forgather.config.problems import too_deep
from forgather.config.specs import Spec

FUNCTION_NAME = "construct"

_LOAD_FILE = '''
def _load_file(name, file):
    """The module of one Python file, imported once under `name`."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

'''


class Code(NamedTuple):
    """An expression. Pure ones may be moved past constructions: names and plain data."""

    layout: Layout
    is_pure: bool = True


class Block:
    """The statements of one function body. `captured` and `variables` say what is already at hand."""

    def __init__(self, captured: dict[NodeKey, Code] | None = None) -> None:
        self.lines: list[str] = []
        self.num_ordered = 0
        self.captured = captured or {}
        self.variables: dict[NodeKey, str] = {}

    def assign(self, name: str, layout: Layout, at: int | None = None, *, is_ordered: bool = True) -> None:
        text = f"{name} = {write(layout, 0, len(name) + 3 + len(INDENT))}"
        self.lines.insert(len(self.lines) if at is None else at, text)
        self.num_ordered += is_ordered


def emit(roots: list[Node], inputs: Iterable[str] = ()) -> str:
    """The source of a module whose `construct(*inputs)` returns the roots' objects (one, or a list of several).

    Raises Problems when the graph is too deep for Python to read.
    """
    try:
        return _Emitter(roots, tuple(inputs)).module()
    except RecursionError:
        raise too_deep(roots[0].place) from None


class _Emitter:
    def __init__(self, roots: list[Node], inputs: tuple[str, ...]) -> None:
        self.roots = roots
        self.inputs = inputs
        params = {name for node in walk(roots) if isinstance(node, Function) for name in node.body.params}
        self.bound = params | set(inputs)
        self.names = {*dir(builtins), *keyword.kwlist, *self.bound, FUNCTION_NAME, "functools", "math", "os"}
        self.names |= {"sys", "importlib", "builtins", "_load_file", "value"}
        self.modules: dict[str, str] = {}
        self.symbols: dict[tuple[str, str], str] = {}
        self.import_lines: list[str] = []
        self.file_lines: list[str] = []
        self.num_uses: dict[NodeKey, int] = {}
        for root in roots:
            self._count(root)

    def module(self) -> str:
        block = Block()
        codes = self._sequence([(root, str(root.key.path[-1])) for root in self.roots], block)
        layouts = [code.layout for code in codes]
        result = layouts[0] if len(layouts) == 1 else Bracket("[", tuple(Item("", each) for each in layouts), "]")
        if self.file_lines:
            self.modules |= {name: f"import {name}" for name in ("sys", "importlib.util")}
        parts = [self.modules[name] for name in sorted(self.modules)]
        imports = [*parts, *([""] if parts and self.import_lines else []), *sorted(self.import_lines)]
        head = "\n".join(imports) + ("\n\n" if imports else "")
        files = f"{_LOAD_FILE}\n" + "\n".join(self.file_lines) + "\n\n" if self.file_lines else ""
        return f"{head}{files}\n{self._definition(FUNCTION_NAME, self.inputs, block, result)}\n".lstrip("\n")

    def _definition(self, name: str, params: Iterable[str], block: Block, result: Layout) -> str:
        lines = [*block.lines, f"return {write(result, 0, len('return ') + len(INDENT))}"]
        text = ""
        for index, line in enumerate(lines):
            is_apart = index > 0 and (line.startswith("def ") or lines[index - 1].startswith("def "))
            text += ("\n" if is_apart else "") + _indented(line) + "\n"
        return f"def {name}({', '.join(params)}):\n{text.rstrip()}"

    # How often a shared object is referred to

    def _count(self, node: Node) -> None:
        if isinstance(node, Reference):
            self._count(node.target)
            return
        if (isinstance(node, Call) and node.kind != "factory") or isinstance(node, Function):
            self.num_uses[node.key] = self.num_uses.get(node.key, 0) + 1
            if self.num_uses[node.key] > 1:
                return
        if isinstance(node, Function):
            for capture in node.captures:
                self._count(capture)
        for child in node.children():
            self._count(child)

    # Nodes

    def _sequence(self, nodes: list[tuple[Node, str]], block: Block, *, in_variables: bool = False) -> list[Code]:
        """The nodes' expressions, evaluated in this order whatever statements the later ones need."""
        codes: list[Code] = []
        hints: list[str] = []
        for node, hint in nodes:
            mark, num_ordered = len(block.lines), block.num_ordered
            code = self._visit(node, block, hint)
            if block.num_ordered > num_ordered:
                for index, earlier in enumerate(codes):
                    if not earlier.is_pure:
                        codes[index] = Code(self._name(hints[index]))
                        block.assign(flat(codes[index].layout), earlier.layout, mark)
                        mark += 1
            if in_variables and not code.is_pure:
                name = self._name(hint)
                block.assign(name, code.layout)
                code = Code(name)
            codes.append(code)
            hints.append(hint)
        return codes

    def _visit(self, node: Node, block: Block, hint: str) -> Code:
        match node:
            case Constant():
                return Code(constant(node.value, self._builtin("float")))
            case Reference():
                if node.key in block.captured:
                    return block.captured[node.key]
                return self._visit(node.target, block, _hint(node.target, hint))
            case Call(kind="factory"):
                return self._call(node, block)
            case Call() | Function():
                return self._shared(node, block, hint)
            case Container():
                return self._container(node, block)
            case Entries():
                codes = self._sequence([(item, name) for name, item in node.items], block)
                items = zip(node.items, codes, strict=True)
                layout = Bracket("{", tuple(Item(f"{name!r}: ", code.layout) for (name, _), code in items), "}")
                return Code(layout, all(code.is_pure for code in codes))
            case Symbol():
                return Code(self._symbol(node.spec))
            case Template():
                return self._template(node, block)
            case Given() | Argument():
                return Code(node.name)
            case Part():
                base = flat(self._visit(node.base, block, hint).layout)
                steps = (f".{step.key}" if step.is_dotted else f"[{step.key!r}]" for step in node.steps)
                return Code(base + "".join(steps), is_pure=False)
        raise AssertionError(f"no rule emits a {type(node).__name__}")

    def _shared(self, node: Call | Function, block: Block, hint: str) -> Code:
        known = block.variables.get(node.key)
        if known is not None:
            return Code(known)
        if isinstance(node, Function):
            return self._function(node, block, hint)
        code = self._call(node, block)
        if self.num_uses[node.key] > 1 or (len(node.key.path) == 1 and node not in self.roots):
            block.variables[node.key] = self._name(hint)
            block.assign(block.variables[node.key], code.layout)
            return Code(block.variables[node.key])
        return code

    def _call(self, node: Call, block: Block) -> Code:
        names = [name for name, _ in node.arguments]
        # Python takes positionals before keywords: where they are written behind one, variables keep the order.
        is_mixed = any(name not in (None, "*") for name in names[: _last_positional(names)])
        nodes = [(argument, name if name and name != "*" else _tail(argument)) for name, argument in node.arguments]
        codes = self._sequence(nodes, block, in_variables=is_mixed)
        positional: list[Item] = []
        keywords: list[Item] = []
        for name, code in zip(names, codes, strict=True):
            if name is None:
                positional.append(Item("", code.layout))
            elif name == "*":
                positional.append(Item("*", code.layout))
            elif _is_keyword_argument(name):
                keywords.append(Item(f"{name}=", code.layout))
            else:
                keywords.append(Item(f"**{{{name!r}: ", code.layout, "}"))
        callee = self._symbol(node.spec)
        items = (*positional, *keywords)
        if node.kind == "partial":
            partial = f"{self._module('functools')}.partial("
            return Code(Bracket(partial, (Item("", callee), *items), ")"), is_pure=False)
        return Code(Bracket(f"{callee}(", items, ")"), is_pure=False)

    def _container(self, node: Container, block: Block) -> Code:
        codes = self._sequence([(item, _tail(item)) for item in node.items], block)
        items = tuple(Item("", code.layout) for code in codes)
        is_pure = all(code.is_pure for code in codes)
        if node.kind == "tuple":
            return Code(Bracket("(", items, ")", ends_with_comma=len(items) == 1), is_pure)
        layout = Bracket("[", items, "]")
        if node.kind == "values" and items:
            layout = Bracket("[", (Item("value for value in ", layout, " if value is not None"),), "]")
        return Code(layout, is_pure)

    def _function(self, node: Function, block: Block, hint: str) -> Code:
        captured: dict[NodeKey, Code] = {}
        for each in node.captures:
            code = self._visit(each, block, _hint(each.target, _tail(each)))
            if not isinstance(code.layout, str) or not code.is_pure:
                name = self._name(_hint(each.target, _tail(each)))
                block.assign(name, code.layout, is_ordered=not code.is_pure)
                code = Code(name)
            captured[each.key] = code
        body = Block(captured)
        result = self._visit(node.result, body, "result")
        name = self._name(hint)
        block.variables[node.key] = name
        # No construction happens in a definition: it may stand anywhere before its use.
        block.lines.append(self._definition(name, node.body.params, body, result.layout))
        return Code(name)

    def _template(self, node: Template, block: Block) -> Code:
        operands = [(operand, _tail(operand)) for _, operand, _ in node.operands]
        codes = self._sequence(operands, block)
        replaced: dict[int, ast.expr] = {}
        for chain, value in node.values.items():
            replaced[id(chain.node)] = _parsed(flat(constant(value, self._builtin("float"))))
        for (chain, operand, length), code in zip(node.operands, codes, strict=True):
            layout = code.layout
            if not isinstance(layout, str) or not code.is_pure:
                name = self._name(_tail(operand))
                block.assign(name, layout, is_ordered=not code.is_pure)
                layout = name
            replaced[id(chain.parts[length - 1])] = _parsed(layout)
        texts = [
            part if isinstance(part, str) else ast.unparse(self._rebuilt(part, part.root, replaced))
            for part in node.parts
        ]
        if len(texts) == 1:
            return Code(texts[0], is_pure=False)
        pairs = list(zip(node.parts, texts, strict=True))
        pattern = "".join(
            text.replace("{", "{{").replace("}", "}}") if isinstance(part, str) else "{}" for part, text in pairs
        )
        arguments = ", ".join(text for part, text in pairs if isinstance(part, Expression))
        return Code(f"{pattern!r}.format({arguments})", is_pure=False)

    def _rebuilt(self, expression: Expression, node: Any, replaced: dict[int, ast.expr]) -> Any:
        """A copy of the syntax with chains replaced, and names as Python has them."""
        if id(node) in replaced:
            return replaced[id(node)]
        if isinstance(node, list):
            return [self._rebuilt(expression, each, replaced) for each in node]
        if not isinstance(node, ast.AST):
            return node
        if isinstance(node, ast.Name):
            return ast.Constant({"null": None, "true": True, "false": False}[node.id])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = [self._rebuilt(expression, each, replaced) for each in node.args]
            return self._function_call(expression, node.func.id, arguments)
        fields = {name: self._rebuilt(expression, value, replaced) for name, value in ast.iter_fields(node)}
        return type(node)(**fields)

    def _function_call(self, expression: Expression, name: str, arguments: list[ast.expr]) -> ast.expr:
        if name == "path":
            paths = self._module("os.path")
            folder = ast.Constant(str(expression.place.folder))
            joined = ast.Call(_parsed(f"{paths}.join"), [folder, *arguments], [])
            return ast.Call(_parsed(f"{paths}.normpath"), [joined], [])
        python, module = PYTHON_FUNCTIONS[name]
        called = self._builtin(python) if module is None else f"{self._module(module)}.{python}"
        return ast.Call(_parsed(called), arguments, [])

    # Names

    def _builtin(self, name: str) -> str:
        return f"{self._module('builtins')}.{name}" if name in self.bound else name

    def _module(self, name: str) -> str:
        """What a module is called in the code: its own name, unless a parameter has it."""
        head = name.partition(".")[0]
        if head not in self.bound:
            self.modules[name] = f"import {name}"
            return name
        if name not in self.modules:
            self.modules[name] = f"import {name} as {self._name(head)}"
        return self.modules[name].rpartition(" ")[2]

    def _symbol(self, spec: Spec) -> str:
        head, dot, tail = spec.symbol.partition(".")
        if not spec.module:
            return self._builtin(spec.symbol)
        if (spec.module, head) not in self.symbols:
            local = self._name(head)
            self.symbols[spec.module, head] = local
            if spec.file is None:
                renamed = "" if local == head else f" as {local}"
                self.import_lines.append(f"from {spec.module} import {head}{renamed}")
            else:
                self.file_lines.append(f"{local} = _load_file({spec.module!r}, {spec.file!r}).{head}")
        return f"{self.symbols[spec.module, head]}{dot}{tail}"

    def _name(self, hint: str) -> str:
        """A new name like the hint."""
        base = re.sub(r"\W", "_", hint, flags=re.ASCII).strip("_") or "made"
        base = f"made_{base}" if base[0].isdigit() else base
        name, number = base, 2
        while name in self.names:
            name, number = f"{base}_{number}", number + 1
        self.names.add(name)
        return name


def _indented(text: str) -> str:
    """The lines of a statement one step in. Emitted literals hold no line breaks, so every line is code."""
    return "\n".join(f"{INDENT}{line}" if line else line for line in text.split("\n"))


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _is_keyword_argument(name: str) -> bool:
    """Whether `f(name=...)` hands over that very name. Python normalises others, and refuses its own words."""
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name != "__debug__"


def _tail(node: Node) -> str:
    """A name for what a node makes, from where it is written."""
    if isinstance(node, Reference):
        return _tail(node.target)
    names = [part for part in node.key.path if isinstance(part, str) and part not in ("result", "*")]
    return names[-1] if names else "made"


def _hint(target: Node, hint: str) -> str:
    """A target's own name, unless it says nothing."""
    name = str(target.key.path[-1])
    return name if len(target.key.path) == 1 and name != "main" else hint


def _last_positional(names: list[str | None]) -> int:
    return max((index for index, name in enumerate(names) if name in (None, "*")), default=0)
