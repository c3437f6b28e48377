"""Small changes to a rule: a boundary, a sign, a factor, a condition, an assignment that is left out."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
CALLS = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor"}


@dataclass(frozen=True)
class Mutant:
    """One change to one function."""

    module: str  # trader_lib.rules.checks
    function: str
    line: int
    before: str  # the condition or statement as it stands, whole
    after: str
    code: CodeType  # of the changed function

    @property
    def key(self) -> str:
        """How a list of survivors names it, whatever line it has moved to."""
        return f"{self.module.removeprefix('trader_lib.')}.{self.function}: {self.before}  =>  {self.after}"


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Return what a node may be changed to, a change at a time."""
    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                for other in COMPARISONS.get(type(op), ()):
                    yield ast.Compare(
                        node.left, [other() if at == place else it for at, it in enumerate(node.ops)], node.comparators
                    )
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            yield ast.BinOp(node.left, ARITHMETIC[type(op)](), node.right)
        case ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield ast.AugAssign(node.target, ARITHMETIC[type(op)](), node.value)
        case ast.BoolOp(op=op):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield ast.Call(ast.Name(CALLS[name], ast.Load()), node.args, node.keywords)
        case ast.Call(func=ast.Attribute(attr=name)) if name in CALLS:
            yield ast.Call(ast.Attribute(node.func.value, CALLS[name], ast.Load()), node.args, node.keywords)
        case ast.Call(func=ast.Name(id="abs"), args=[inner]):
            yield inner
        case ast.Assign(targets=[ast.Subscript()]) | ast.Continue() | ast.Break():
            yield ast.Pass()


# What compiles the rules and keeps their machine code decides no number.
COMPILER = ("compiled", "_compiled", "rules_digest", "machine_code_folder", "has_machine_code")


def rules(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Return the rules of a module: its functions, compiled or plain, without those that compile them."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(COMPILER):
            yield node


def _places(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Return what may change in a function, each node with the statement or the condition that it belongs to."""
    for statement in function.body:
        yield from _places_below(statement, statement)


def _places_below(node: ast.AST, whole: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    if isinstance(node, ast.stmt) or isinstance(whole, ast.If | ast.While | ast.For):
        whole = node
    if not isinstance(node, ast.AnnAssign):
        yield node, whole
    for child in ast.iter_child_nodes(node):
        yield from _places_below(child, whole)


def _code_of(function: ast.FunctionDef, filename: str) -> CodeType:
    bare = copy.copy(function)
    bare.decorator_list = []
    module = ast.fix_missing_locations(ast.Module([bare], []))
    compiled = compile(module, filename, "exec", dont_inherit=True)
    return next(const for const in compiled.co_consts if isinstance(const, CodeType) and const.co_name == function.name)


def mutants_of(module: str, path: Path) -> Iterator[Mutant]:
    """Return every mutant of a module's functions, in the order of the source."""
    for function in rules(ast.parse(path.read_text(encoding="utf-8"))):
        for place, (node, whole) in enumerate(_places(function)):
            for number, _ in enumerate(replacements(node)):
                changed = copy.deepcopy(function)
                target, around = list(_places(changed))[place]
                replacement = list(replacements(target))[number]
                ast.copy_location(replacement, target)
                _put(changed, target, replacement)
                yield Mutant(
                    module,
                    function.name,
                    getattr(node, "lineno", 0),
                    ast.unparse(whole),
                    ast.unparse(replacement if around is target else around),
                    _code_of(changed, str(path)),
                )


def _put(root: ast.AST, target: ast.AST, replacement: ast.AST) -> None:
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, replacement)
                return
            if isinstance(value, list):
                for at, item in enumerate(value):
                    if item is target:
                        value[at] = replacement
                        return
    raise AssertionError("a node without a parent")
