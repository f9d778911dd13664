"""One fault at a time in a source file, by its syntax tree.

A fault is a small change that still compiles: a comparison moved by one, a condition turned round,
an argument, a statement, a decorator or a `with` left out. Texts, annotations, assertions and what
an error says are left alone: no test should hold them word by word.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Change = Callable[[Any], Any]

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATIONS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}
#: Methods that give back something much like what they are called on.
PLAIN_METHODS = {"clamp", "clamp_min", "clamp_max", "clone", "contiguous", "copy", "cpu", "detach",
                 "expand", "float", "long", "masked_fill", "nonzero", "sort", "to"}  # fmt: skip
#: Decorators without which a definition is another thing, not a faulty one.
STRUCTURE = ("dataclass", "property", "cached_property", "classmethod", "contextmanager")


@dataclass(frozen=True, eq=False)
class Fault:
    """A changed source file.

    Attributes:
        name: `line:column kind: before -> after`.
        tree: The file without it.
        node: Where it is.
        change: What makes it of a copy of the node.
    """

    name: str
    tree: ast.AST
    node: ast.AST
    change: Change

    @cached_property
    def source(self) -> str:
        """The file with the fault."""
        changed = self.change(copy.deepcopy(self.node))
        return ast.unparse(_Exchange(self.node, changed).on(self.tree)) + "\n"


def _expressions(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Kinds of fault in an expression, and what makes them of a copy."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            other = COMPARISONS[type(operator)]
            yield "comparison", lambda n, i=i, other=other: _set(n.ops, i, other(), n)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        kind = OPERATIONS[type(node.op)]
        yield "operation", lambda n: _put(n, op=kind())
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield "and/or", lambda n: _put(n, op=other())
        for i in range(len(node.values)):
            yield "left out", lambda n, i=i: _one_or_all(n, i)
    if isinstance(node, ast.UnaryOp):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.IfExp):
        yield "condition", lambda n: _put(n, test=_negated(n.test))
    if isinstance(node, ast.comprehension):
        for i in range(len(node.ifs)):
            yield "condition", lambda n, i=i: _set(n.ifs, i, _negated(n.ifs[i]), n)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", lambda n: ast.Constant(not n.value)
        elif isinstance(node.value, int):
            yield "constant", lambda n: ast.Constant(n.value + 1)
            yield "constant", lambda n: ast.Constant(n.value - 1)
        elif isinstance(node.value, float):
            yield "constant", lambda n: ast.Constant(n.value * 2 + 1)
    if isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            yield "left out", lambda n, i=i: _without(n.keywords, i, n)
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield "swapped", lambda n: _put(n, func=ast.Name(NAMES[n.func.id], ast.Load()))
        if isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
            yield "swapped", lambda n: _put(n, func=_put(n.func, attr=NAMES[n.func.attr]))
        if isinstance(node.func, ast.Attribute) and node.func.attr in PLAIN_METHODS:
            yield "left out", lambda n: n.func.value


def _statements(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Kinds of fault in a statement, and what makes them of a copy."""
    if isinstance(node, (ast.If, ast.While)):
        yield "condition", lambda n: _put(n, test=_negated(n.test))
        yield "always", lambda n: _put(n, test=ast.Constant(True))
        yield "never", lambda n: _put(n, test=ast.Constant(False))
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise, ast.Continue)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield))
    ):
        yield "left out", lambda _: ast.Pass()
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "nothing", lambda n: _put(n, value=ast.Constant(None))
    if isinstance(node, ast.With):
        for i in range(len(node.items)):
            yield "left out", lambda n, i=i: _without(n.items, i, n) if len(n.items) > 1 else n.body
    if isinstance(node, ast.FunctionDef):
        for i, decorator in enumerate(node.decorator_list):
            if not ast.unparse(decorator).split(".")[-1].startswith(STRUCTURE):
                yield "left out", lambda n, i=i: _without(n.decorator_list, i, n)


def _places(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes in which a fault may be put."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "exc", "type_params") or isinstance(tree, ast.Assert):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_for_types(child):
                continue
            yield child
            yield from _places(child)


def faults(source: str) -> list[Fault]:
    """All faults of a file."""
    tree, found = ast.parse(source), []
    for node in _places(tree):
        line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
        for kind, change in [*_expressions(node), *_statements(node)]:
            changed = change(copy.deepcopy(node))
            name = f"{line}:{column} {kind}: {_short(node)} -> {_short(changed)}"
            found.append(Fault(name, tree, node, change))
    return found


class _Exchange(ast.NodeTransformer):
    """A tree with another node in the place of one."""

    def __init__(self, old: ast.AST, new: Any) -> None:
        self.old, self.new = old, new

    def on(self, tree: ast.AST) -> ast.AST:
        return ast.fix_missing_locations(self.visit(tree))

    def visit(self, node: ast.AST) -> Any:
        if node is self.old:
            return self.new
        changed = copy.copy(node)  # the tree itself stays as it is
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                parts: list[Any] = []
                for part in value:
                    made = self.visit(part) if isinstance(part, ast.AST) else part
                    parts += made if isinstance(made, list) else [made]
                setattr(changed, name, parts)
            elif isinstance(value, ast.AST):
                setattr(changed, name, self.visit(value))
        return changed


def _put(node: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(node, name, value)
    return node


def _set(parts: list[Any], index: int, value: Any, node: Any) -> Any:
    parts[index] = value
    return node


def _without(parts: list[Any], index: int, node: Any) -> Any:
    del parts[index]
    return node


def _one_or_all(node: ast.BoolOp, index: int) -> ast.expr:
    del node.values[index]
    return node.values[0] if len(node.values) == 1 else node


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "TypeVar")


def _short(node: Any) -> str:
    """A node in one line."""
    nodes = node if isinstance(node, list) else [node]
    lines = [line.strip() for part in nodes for line in ast.unparse(part).splitlines()]
    text = " ".join(line for line in lines if line)
    return text if len(text) <= 70 else text[:67] + "..."
