"""Runs IEC 61131-3 structured text: blark reads it, and what it read is put into Python, for as much as examples use.

Stricter than a PLC: what overflows an integer or a text, and an index out of range, end the run instead of being cut.
As on a PLC, both sides of AND and OR are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

blark = pytest.importorskip("blark", reason="blark, which reads structured text, is not installed (pip install blark)")

WHOLE = {"BYTE": (0, 2**8 - 1), "INT": (-(2**15), 2**15 - 1), "LINT": (-(2**63), 2**63 - 1), "TIME": (0, 2**32 - 1)}
OPERATORS = {"=": "==", "<>": "!=", "AND": "&", "OR": "|", "NOT": "not "}
LONGEST = 255
"""Characters that the standard functions for texts take and give."""


class _Return(Exception):  # noqa: N818 -- no error, a statement
    """RETURN."""


class Timer:
    """The standard's TON, by a clock in milliseconds that the test winds."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._since: int | None = None
        self.Q = False

    def __call__(self, *, IN: bool, PT: int) -> None:  # noqa: N803 -- the standard's names
        self._since = (self._clock() if self._since is None else self._since) if IN else None
        self.Q = self._since is not None and self._clock() - self._since >= PT


class Program:
    """A file of structured text: its functions, and its blocks to make instances of."""

    def __init__(self, file: Path) -> None:
        parsed = blark.parse_source_code(file.read_text())
        if parsed.exception is not None:
            raise parsed.exception
        self.units = {str(item.name): Unit(item, self) for item in parsed.transform().items}
        self.now_ms = 0

    def block(self, name: str) -> "Instance":
        return Instance(self.units[name])


class Unit:
    """A function or function block: what it declares, and its body as Python."""

    def __init__(self, item: Any, program: Program) -> None:
        self.name = str(item.name)
        self.program = program
        self.types: dict[str, Any] = {}
        self.initial: dict[str, Any] = {}
        self.inputs: list[str] = []
        if isinstance(item, blark.transform.Function):
            self._declare(self.name, item.return_type.type, None)
        for section in item.declarations:
            for one in section.items:
                spec = one.init.spec
                for declared in one.variables:
                    name = str(getattr(declared, "variable", declared).name)
                    self._declare(name, getattr(spec, "type", spec), one.init.value, spec)
                    if type(section).__name__ in {"InputDeclarations", "InputOutputDeclarations"}:
                        self.inputs.append(name)
        lines = ["def run(v, keep, call):", *(f"    {line}" for line in ["pass", *self._block(item.body)])]
        scope: dict[str, Any] = {"_Return": _Return}
        exec("\n".join(lines), scope)  # noqa: S102 -- our own file, for a test
        self.run: Callable[..., None] = scope["run"]

    def values(self) -> dict[str, Any]:
        """A fresh set of variables."""
        fresh: dict[str, Any] = {}
        for name, type_ in self.types.items():
            keep = self.initial[name]
            if type_ == "TON":
                fresh[name] = Timer(lambda: self.program.now_ms)
            elif isinstance(type_, tuple) and type_[0] == "ARRAY":
                fresh[name] = bytearray(type_[1])
            elif keep is not None:
                fresh[name] = self.keep(name, eval(keep, {"v": fresh}))  # noqa: S307 -- our own file, for a test
            else:
                fresh[name] = b"" if isinstance(type_, tuple) else False if type_ == "BOOL" else 0
        return fresh

    def keep(self, name: str, value: Any) -> Any:
        """The value, if the variable can hold it."""
        match self.types[name]:
            case "BOOL":
                assert isinstance(value, bool), f"{self.name}.{name} is no {value!r}"
            case ("STRING", longest):
                assert isinstance(value, bytes), f"{self.name}.{name} is no {value!r}"
                assert len(value) <= longest, f"{self.name}.{name} cuts {value!r}"
            case ("ARRAY", length):
                assert len(value) == length
            case type_:
                least, most = WHOLE[type_]
                assert type(value) is int, f"{self.name}.{name} is no {value!r}"
                assert least <= value <= most, f"{self.name}.{name} overflows by {value}"
        return value

    def _declare(self, name: str, type_: Any, value: Any, spec: Any = None) -> None:
        kind = type(type_).__name__
        if kind == "StringTypeSpecification":
            self.types[name] = ("STRING", int(str(type_.length.length.expr.value)))
        elif hasattr(spec, "subranges"):
            self.types[name] = ("ARRAY", int(str(spec.subranges[0].stop.value)) + 1)
        else:
            self.types[name] = str(type_)
        self.initial[name] = None if value is None else self._value(value)

    def _block(self, statements: Any) -> Iterator[str]:
        for statement in statements.statements if statements is not None else ():
            yield from self._statement(statement)

    def _inner(self, statements: Any) -> Iterator[str]:
        yield "    pass"
        yield from (f"    {line}" for line in self._block(statements))

    def _statement(self, node: Any) -> Iterator[str]:  # noqa: C901 -- one arm for each kind of statement
        match type(node).__name__:
            case "AssignmentStatement":
                [target] = node.variables
                yield f"v[{str(target.name)!r}] = keep({str(target.name)!r}, {self._value(node.expression)})"
            case "IfStatement":
                yield f"if {self._value(node.if_expression)}:"
                yield from self._inner(node.statements)
                for other in node.else_ifs:
                    yield f"elif {self._value(other.if_expression)}:"
                    yield from self._inner(other.statements)
                if node.else_clause:
                    yield "else:"
                    yield from self._inner(node.else_clause.statements)
            case "CaseStatement":
                for place, case in enumerate(node.cases):
                    matches = ", ".join(map(self._value, case.matches))
                    yield f"{'el' if place else ''}if {self._value(node.expression)} in ({matches},):"
                    yield from self._inner(case.statements)
            case "ForStatement":
                yield f"for i in range({self._value(node.from_)}, {self._value(node.to)} + 1):"
                yield f"    v[{str(node.control.name)!r}] = keep({str(node.control.name)!r}, i)"
                yield from self._inner(node.statements)
            case "WhileStatement":
                yield f"while {self._value(node.expression)}:"
                yield from self._inner(node.statements)
            case "FunctionCallStatement":
                yield self._value(node)
            case "ExitStatement":
                yield "break"
            case "ReturnStatement":
                yield "raise _Return"
            case kind:
                raise NotImplementedError(kind)

    def _value(self, node: Any) -> str:  # noqa: C901, PLR0911 -- one arm for each kind of expression
        match type(node).__name__:
            case "Boolean":
                return str(node.value).capitalize()
            case "Integer":
                return str(node.value)
            case "String":
                return repr(str(node.value)[1:-1].encode())
            case "Duration":
                return str(1000 * int(node.seconds or 0) + int(node.milliseconds or 0))
            case "SimpleVariable" | "EnumeratedValue":
                return f"v[{str(node.name)!r}]"
            case "MultiElementVariable":
                [element] = node.elements
                if type(element).__name__ == "FieldSelector":
                    return f"{self._value(node.name)}.{element.field.name}"
                [index] = element.subscripts
                return f"call('AT', {self._value(node.name)}, {self._value(index)})"
            case "ParenthesizedExpression":
                return f"({self._value(node.expr)})"
            case "UnaryOperation":
                return f"({OPERATORS.get(str(node.op), str(node.op))}{self._value(node.expr)})"
            case "BinaryOperation":
                op = OPERATORS.get(str(node.op), str(node.op))
                return f"({self._value(node.left)} {op} {self._value(node.right)})"
            case "FunctionCall" | "FunctionCallStatement":
                given = ", ".join(
                    (f"{parameter.name.name}=" if parameter.name else "") + self._value(parameter.value)
                    for parameter in node.parameters
                )
                name = str(node.name.name)
                return f"v[{name!r}]({given})" if name in self.types else f"call({name!r}, {given})"
            case kind:
                raise NotImplementedError(kind)


class Instance:
    """A function block with its memory, or a function for the time of a call."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self.values = unit.values()

    def __call__(self, *given: Any, **named: Any) -> None:
        """Set the inputs, and let the body run once."""
        for name, value in {**dict(zip(self._unit.inputs, given, strict=False)), **named}.items():
            assert name in self._unit.inputs, f"{name} is no input of {self._unit.name}"
            self.values[name] = self._unit.keep(name, value)
        with suppress(_Return):
            self._unit.run(self.values, self._unit.keep, self._call)

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def _call(self, name: str, *given: Any) -> Any:
        match name:
            case "AT":
                assert 0 <= given[1] < len(given[0]), f"{given[1]} is out of range"
                return given[0][given[1]]
            case "CONCAT":
                assert len(given[0]) + len(given[1]) <= LONGEST, "CONCAT cuts"
                return given[0] + given[1]
            case "LEN":
                return len(given[0])
            case "BYTE_TO_LINT" | "LINT_TO_INT":
                return given[0]
            case "LINT_TO_STRING":
                return str(given[0]).encode()
            case _:
                return self._function(name, *given)

    def _function(self, name: str, *given: Any) -> Any:
        function = Instance(self._unit.program.units[name])
        assert len(given) == len(function._unit.inputs), name
        function(*given)
        return function.values[name]
