"""What a sweep is made of: the pairs of a method and a keep rate, the rows that come of them, and their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tokencut.errors import UsageError
from tokencut.evaluation.statistics import Difference, if_known, paired_difference
from tokencut.methods import make_method, methods

DENSE = "dense"
ALL = "all"
# Of all methods, the one that the others are compared with: the default of `compress`.
FIRST = "bat"

Keep = float | tuple[float, ...]


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own, as typed: `bat`, or `bat:preset=paper:neighbours=3`."""

    label: str
    method: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A model of a sweep, measured.

    Attributes:
        method: Its method, with settings as typed; `dense` for the dense model.
        keep: As typed: one number, or one a layer; 1.0 for the dense model.
        gmacs: Multiply-adds per image, in units of 1e9.
        top1: Percent of the images whose class has the highest logit.
        top5: Percent of them whose class is among the 5 highest.
        images_per_second: By the median of rounds in which all models of the sweep take turns; None if not timed.
        images: How many images were judged.
        loss: Mean cross-entropy, in nats.
        correct: For each judged image whether top-1 is right.
        to_dense: How far it is ahead of the dense model; None for the dense model itself.
        images_per_second_quartiles: Between them lie half of the rounds.
    """

    method: str
    keep: Keep
    gmacs: float
    top1: float
    top5: float
    images_per_second: float | None
    images: int
    loss: float
    correct: tuple[bool, ...] = field(repr=False)
    to_dense: Difference | None = None
    images_per_second_quartiles: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON and CSV, without the image-by-image results."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)[:8]}
        plain["keep"] = list(self.keep) if isinstance(self.keep, tuple) else self.keep
        low, high = self.images_per_second_quartiles or (None, None)
        return {
            **plain,
            **_difference("to_dense", self.to_dense),
            "images_per_second_low": low,
            "images_per_second_high": high,
        }


@dataclass(frozen=True)
class Comparison:
    """How far one method is ahead of another at equal keep; `keep` is None for the average over all of them."""

    first: str
    second: str
    keep: Keep | None
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """The comparison for JSON."""
        keep = list(self.keep) if isinstance(self.keep, tuple) else self.keep
        return {"first": self.first, "second": self.second, "keep": keep, **_difference("points", self.difference)}


def _difference(name: str, difference: Difference | None) -> dict[str, float | None]:
    if difference is None:
        return {name: None, f"{name}_se": None}
    return {name: difference.points, f"{name}_se": if_known(difference.standard_error)}


def pair_name(method: str, keep: Keep) -> str:
    """A method and a keep rate in words."""
    return "the dense model" if method == DENSE else f"{method}, keep {keep_text(keep)}"


def keep_text(keep: Keep) -> str:
    """A keep rate as typed: `0.7`, or `0.9/0.7/0.5`."""
    return "/".join(map(str, keep if isinstance(keep, tuple) else (keep,)))


def mean_keep(keep: Keep) -> float:
    """The mean of a keep rate's layers."""
    rates = keep if isinstance(keep, tuple) else (keep,)
    return sum(rates) / len(rates)


def read_variants(
    labels: Sequence[str], *, parameter: str = "methods", keeps_grid: bool = False
) -> tuple[Variant, ...]:
    """Reads the methods of a sweep, or of another comparison.

    Args:
        labels: Method names, each with settings behind colons where wanted; or `all`, for every method that needs no
            training.
        parameter: What they were given by.
        keeps_grid: Whether `all` are those for hierarchical models.

    Raises:
        UsageError: There is none, one stands twice, is unknown, or needs training first.
    """
    named = [label.strip() for label in labels]
    if named == [ALL]:
        ready = [name for name, method in methods(keeps_grid=keeps_grid).items() if not method.needs_training]
        named = sorted(ready, key=lambda name: name != FIRST)
    if not any(named):
        raise UsageError(f"no method given; type `{parameter}=['bat', 'evit', 'tome']`, or `{parameter}=['all']`")
    refuse_repeats(parameter, "method", named)
    return tuple(_read_variant(label, parameter) for label in named)


def _read_variant(label: str, parameter: str) -> Variant:
    name, *settings = label.split(":")
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or key in options:
            raise UsageError(f"`{parameter}` {label}: {setting!r} is not one setting of the form key=value; "
                             f"type `{parameter}=['bat', 'bat:pairs=0.25']`")  # fmt: skip
        options[key] = value
    if name == DENSE:
        raise UsageError(f"the dense model is there without being named; leave dense out of `{parameter}`")
    if name == ALL:
        raise UsageError(f"`{parameter}=['all']` is every method, and stands alone; give it alone, or name them")
    make_method(name, dict(options))
    if methods()[name].needs_training:
        raise UsageError(f"method {name} means nothing before it is fine-tuned, so it cannot be compared; leave it out "
                         f"of `{parameter}`, and type `tokencut.evaluate` where its stages are trained")  # fmt: skip
    return Variant(label, name, options)


def refuse_repeats(parameter: str, what: str, values: Sequence[str | Keep]) -> None:
    """Refuses a list in which something stands twice.

    Raises:
        UsageError: With a list in which it stands once.
    """
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        text = twice[0] if isinstance(twice[0], str) else keep_text(twice[0])
        raise UsageError(f"{what} {text} is given twice; type `{parameter}={list(dict.fromkeys(values))}`")


def compare(rows: Sequence[Row]) -> tuple[Comparison, ...]:
    """Compares the first method of a sweep with each of the others, keep by keep and, of several, on average.

    Args:
        rows: All rows of a sweep, its dense model among them.
    """
    correct = {(row.method, row.keep): row.correct for row in rows if row.method != DENSE}
    labels, keeps = list(dict.fromkeys(key[0] for key in correct)), list(dict.fromkeys(key[1] for key in correct))
    found = []
    for other in labels[1:]:
        mine, theirs = [[correct[label, keep] for keep in keeps] for label in (labels[0], other)]
        differences = [paired_difference(*pair) for pair in zip(mine, theirs, strict=True)]
        found += [Comparison(labels[0], other, *pair) for pair in zip(keeps, differences, strict=True)]
        if len(keeps) > 1:
            found.append(Comparison(labels[0], other, None, paired_difference(mine, theirs)))
    return tuple(found)
