"""Small faults in a program, found in its syntax tree.

A mutant is the code with one of them: a comparison shifted, a constant off by one, a
`raise` that is not reached, `and` for `or`, a union for an intersection. What does nothing
at run time is left alone: annotations, decorators, messages, docstrings, lists of names.

Each mutant knows the function it is in, by the line that Python calls the first of that
function: a test that never enters it cannot notice.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitAnd,
}  # fmt: skip
BOOLEANS = {ast.And: ast.Or, ast.Or: ast.And}
Edit = tuple[ast.AST, str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        path: File, relative to the root.
        source: What it holds without the fault.
        line: Where.
        entry: First line of the innermost function around it; None if it runs on import.
        start: First byte that is replaced.
        end: The byte after the last one.
        new: What stands there instead.
    """

    path: Path
    source: bytes = field(repr=False)
    line: int
    entry: int | None
    start: int
    end: int
    new: str

    @property
    def key(self) -> str:
        """A name that holds as long as the file is the same."""
        digest = hashlib.sha256(self.source).hexdigest()[:8]
        return f"{self.path}@{digest}:{self.start}-{self.end}:{self.new}"

    def applied(self) -> bytes:
        """Return the faulty file."""
        source = self.source
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self) -> str:
        """Return the lines that differ."""
        source = self.source
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        old = source[first:last].decode()
        new = (source[first : self.start] + self.new.encode() + source[self.end : last]).decode()
        lines = [f"    - {line.strip()}" for line in old.splitlines()]
        return "\n".join(lines + [f"    + {line.strip()}" for line in new.splitlines()])


def mutants_of(house: Path, path: Path) -> list[Mutant]:
    """Return all mutants of the file `path` in the tree `house`."""
    source = (house / path).read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(source) if byte == ord("\n"))]
    return [
        Mutant(
            path,
            source,
            node.lineno,
            entry,
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
            new,
        )
        for node, new, entry in edits(ast.parse(source))
    ]


def edits(tree: ast.AST, entry: int | None = None) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yield what may be replaced in `tree`, by what, and in which function."""
    if _is_silent(tree):
        return
    for node, new in _faults(tree):
        yield node, new, entry
    for name, value in ast.iter_fields(tree):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        inside = entry
        if isinstance(tree, ast.FunctionDef) and name == "body":
            inside = min([tree.lineno, *(line.lineno for line in tree.decorator_list)])
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from edits(child, inside)


def _is_silent(node: ast.AST) -> bool:
    """Whether a fault in `node` could only change a text or a type."""
    match node:
        case (
            ast.Assign(targets=[ast.Name("msg" | "__all__" | "__slots__")])
            | ast.Import()
            | ast.ImportFrom()
        ):
            return True
        case ast.AnnAssign(annotation=ast.Name("TypeAlias")) | ast.JoinedStr():
            return True
        case ast.Call(func=ast.Name("TypeVar" | "cast")):
            return True
    return False


def _faults(node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.Raise():
            yield node, "pass"
        case ast.If(body=body) if not any(isinstance(line, ast.Raise) for line in body):
            first, last = body[0], body[-1]
            block = ast.copy_location(ast.Pass(), first)
            block.end_lineno, block.end_col_offset = last.end_lineno, last.end_col_offset
            yield block, "pass"
        case ast.Constant(bool() as value):
            yield node, repr(not value)
        case ast.Constant(int() | float() as value):
            yield node, f"({value + 1!r})"
            yield node, f"({value - 1!r})"
        case ast.expr():
            for other in _faulty(node):
                yield node, f"({ast.unparse(other)})"


def _faulty(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left, ops, comparators):
            for at, operator in enumerate(ops):
                other = [*ops[:at], COMPARISONS[type(operator)](), *ops[at + 1 :]]
                yield ast.Compare(left, other, comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(BOOLEANS[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(ast.Name("sorted"), [argument], _):
            yield ast.Call(ast.Name("list"), [argument], [])
