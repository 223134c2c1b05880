"""JSON out of a file, read back believing nothing: what each value may be, and one clear line where it is not.

Rules say what a value may be, in a test and in words; objects and lists are made of rules. Each looks at its own value
only: what two fields must have in common is for whoever takes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokencut.errors import ArtifactError
from tokencut.messages import one_line, shorten

# Lists of a file are no longer than this, where a rule says no other: deeper models and wider statistics do not exist.
LONGEST = 1_000


class Check(Protocol):
    """What a value may be."""

    def problem(self, value: Any, where: str = "") -> str | None:
        """The end of a sentence that begins with what holds a value and says what is wrong with it; None where it fits.

        Args:
            value: What JSON gave.
            where: The name of the field, with those that it is in; empty for the whole.
        """


@dataclass(frozen=True)
class Rule:
    """A single value: the test, and what was expected in words."""

    holds: Callable[[Any], bool]
    expected: str

    def problem(self, value: Any, where: str = "") -> str | None:
        """See `Check`."""
        return None if self.holds(value) else _wrong(value, where, self.expected)


@dataclass(frozen=True)
class Fields:
    """An object with exactly these fields.

    Attributes:
        checks: What each may be.
        partial: Whether some may be missing: any of them, or those named.
    """

    checks: Mapping[str, Check]
    partial: bool | frozenset[str] = False

    def problem(self, value: Any, where: str = "") -> str | None:
        """See `Check`."""
        if not isinstance(value, dict):
            return _wrong(value, where, "an object")
        within = f"{where}." if where else ""
        for name in sorted(value.keys() - self.checks.keys()):
            return f" has an unknown field {within}{shorten(name)[1:-1]}"
        for name in sorted(self.checks.keys() - value.keys()):
            if not (self.partial if isinstance(self.partial, bool) else name in self.partial):
                return f" has no field {within}{name}"
        found = (check.problem(value[name], within + name) for name, check in self.checks.items() if name in value)
        return next(filter(None, found), None)


@dataclass(frozen=True)
class Items:
    """A list, or an object of any names, whose every item is the same kind of thing.

    Attributes:
        check: What each item may be.
        named: Whether it is an object.
        most: How many there may be; any number where None.
    """

    check: Check
    named: bool = False
    most: int | None = LONGEST

    def problem(self, value: Any, where: str = "") -> str | None:
        """See `Check`."""
        kind = "an object" if self.named else "a list"
        if not isinstance(value, dict if self.named else list):
            return _wrong(value, where, kind)
        if self.most is not None and len(value) > self.most:
            return _wrong(value, where, f"{kind} of up to {self.most}")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = (self.check.problem(item, f"{where}[{shorten(key)}]") for key, item in items)
        return next(filter(None, found), None)


def _wrong(value: Any, where: str, expected: str) -> str:
    field = f"'s {where}" if where else ""
    return f"{field} is {shorten(value)}, not {expected}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: Any, least: int | None = None, most: int | None = None) -> bool:
    """Whether a value is a whole number, from `least` to `most` where they are given."""
    return type(value) is int and (least is None or value >= least) and (most is None or value <= most)


def is_list_of(holds: Callable[[Any], bool], value: Any, least: int = 0, most: int = LONGEST) -> bool:
    """Whether a value is a list whose every item passes a test."""
    return isinstance(value, list) and least <= len(value) <= most and all(map(holds, value))


def optional(rule: Rule) -> Rule:
    """The same, or null."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.expected} or null")


TEXT = Rule(lambda value: isinstance(value, str), "a string")
TRUTH = Rule(lambda value: isinstance(value, bool), "true or false")
NUMBER = Rule(is_number, "a number")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "a positive number")
WHOLE = Rule(is_whole, "a whole number")
COUNT = Rule(lambda value: is_whole(value, 0), "a whole number of at least 0")
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")


@dataclass(frozen=True)
class Form:
    """One kind of file that tokencut writes, as JSON.

    Attributes:
        type: Its field `type`: what kind of file it is.
        format: Its field `format`: the number that grows when the form changes.
        fields: Its other fields.
        called: What it is called in messages.
        otherwise: What to do where it cannot be read; the end of the error.
        newer: What to do where it is of a newer format.
        most: How many characters it may have; any number where None.
    """

    type: str
    format: int
    fields: Fields
    called: str
    otherwise: str
    newer: str = "type pip install -U tokencut"
    most: int | None = None

    def write(self, values: Mapping[str, Any]) -> str:
        """Sorted JSON on one line: the same text for the same values."""
        return json.dumps({**values, "type": self.type, "format": self.format}, sort_keys=True, separators=(",", ":"),
                          allow_nan=False)  # fmt: skip

    def read(self, text: str) -> dict[str, Any]:
        """The fields out of a text, without its type and format.

        Raises:
            ArtifactError: Not JSON, too large or too deep, of another type or a newer format, or a field is missing,
                unknown, or does not hold what it should.
        """
        data = self._parsed(text)
        if not isinstance(data, dict):
            raise self._wrong(_wrong(data, "", "an object"))
        kind, version = data.pop("type", None), data.pop("format", None)
        if kind != self.type:
            raise self._wrong(_wrong(kind, "type", repr(self.type)))
        if is_whole(version, self.format + 1):
            require_format("the file", version, self.format, self.newer)
        if not is_whole(version, self.format, self.format):
            raise self._wrong(_wrong(version, "format", str(self.format)))
        problem = self.fields.problem(data)
        if problem:
            raise self._wrong(problem)
        return data

    def _parsed(self, text: str) -> Any:
        if self.most is not None and len(text) > self.most:
            raise self._wrong(f" has {len(text)} characters, more than {self.most}")
        try:
            return json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_small)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else one_line(error, 60)
            raise self._wrong(f" is not JSON that can be read ({why})") from error

    def _wrong(self, problem: str) -> ArtifactError:
        return self.damaged(f"its {self.called}{problem}")

    def damaged(self, what: str) -> ArtifactError:
        """The error for a file that is not what it should be.

        Args:
            what: What is wrong, such as that two of its fields contradict each other.
        """
        return ArtifactError(f"the file is damaged or was not written by tokencut: {what}; {self.otherwise}")


def require_format(what: object, found: object, known: int, otherwise: str) -> None:
    """Refuses a file of another format.

    Args:
        what: The file; the beginning of the error.
        found: Its format.
        known: The format that is read.
        otherwise: What to do instead; the end of the error.

    Raises:
        ArtifactError: They differ.
    """
    if not is_whole(found) or found != known:
        raise ArtifactError(f"{what} has format {shorten(found)}, and this tokencut reads up to {known}; {otherwise}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """JSON's grammar allows 1e999, which Python reads as an infinity, and JSON cannot be written of that."""
    if math.isinf(number := float(text)):
        raise ValueError(f"too large a number, {one_line(text, 20)}")
    return number


def _small(text: str) -> int:
    """No whole number of ours has over 64 bits; of longer ones, computing with floats raises OverflowError."""
    if len(text) > 20:
        raise ValueError(f"too large a number, {one_line(text, 20)}")
    return int(text)
