"""The tables of the fine-tuning benchmark, from whatever results there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from results import Results
from tables import ahead, markdown
from tuning import DENSE, Task

from tokencut.evaluation.statistics import Difference

COLUMNS = ("keep", "method", "GMACs", "off the shelf", "fine-tuned", "against dense", "against dense fine-tuned",
           "recovered")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A variant at a keep rate: its result off the shelf, and those fine-tuned, by seed."""

    variant: str
    keep: float
    shelf: Mapping[str, Any]
    tuned: Mapping[int, Mapping[str, Any]]

    @property
    def method(self) -> str:
        """The variant without its changes to the recipe."""
        return self.variant.partition(" ")[0]

    @property
    def top1(self) -> float:
        """Fine-tuned, in percent, averaged over the seeds."""
        return mean([row["top1"] for row in self.tuned.values()])


def lines(results: Results, tasks: Sequence[Task]) -> list[Line]:
    """All that has been fine-tuned at least once, in the order of the tasks."""
    found: dict[tuple[str, float], Line] = {}
    shelf = {(task.method, task.keep): results.rows.get(task.key) for task in tasks if task.seed is None}
    for task in tasks:
        row, before = results.rows.get(task.key), shelf[task.method, task.keep]
        if task.seed is None or row is None or before is None:
            continue
        line = found.setdefault((task.variant, task.keep), Line(task.variant, task.keep, before, {}))
        found[task.variant, task.keep] = Line(line.variant, line.keep, before, {**line.tuned, task.seed: row})
    return list(found.values())


def lead(first: Iterable[Line], second: Iterable[Line]) -> Difference | None:
    """How far the first lines are ahead of the second, one by one, over the seeds that both have."""
    return ahead([(one.tuned[seed], other.tuned[seed]) for one, other in zip(first, second, strict=True)
                  for seed in one.tuned if seed in other.tuned])  # fmt: skip


def recovered(line: Line, dense: float) -> str:
    """The share won back of what was lost; nothing to say where nothing was lost."""
    lost = dense - line.shelf["top1"]
    return f"{100 * (line.top1 - line.shelf['top1']) / lost:.0f} % of {lost:.2f}" if lost > 0 else "nothing was lost"


def spread(line: Line) -> str:
    """Top-1 on average, and from the worst seed to the best."""
    values = [row["top1"] for row in line.tuned.values()]
    return f"{line.top1:.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def report(results: Results, tasks: Sequence[Task]) -> str:
    """The tables in Markdown, with what they were measured on."""
    found = lines(results, tasks)
    cut = [line for line in found if line.method != DENSE]
    if not cut:
        return "nothing has been fine-tuned yet"
    controls = {line.variant.removeprefix(DENSE): line for line in found if line.method == DENSE}
    dense = next(results.rows[task.key] for task in tasks if task.method == DENSE)
    untouched = Line(DENSE, 1.0, dense, {seed: dense for line in found for seed in line.tuned})
    best = cut[0].variant
    rows = [[*_facts(control), lead([control], [untouched]), "", "", ""] for control in controls.values()]
    rows = rows or [[*_facts(untouched, tuned=False), "", "", "", ""]]
    for line in cut:
        control = controls.get(line.variant.removeprefix(line.method))
        first = next((other for other in cut if (other.variant, other.keep) == (best, line.keep)), None)
        rows.append([
            *_facts(line), lead([line], [untouched]),
            "" if control is None else lead([line], [control]), recovered(line, dense["top1"]),
            "" if first is None or first is line else lead([first], [line]),
        ])  # fmt: skip
    parts = [markdown([*COLUMNS, f"{best} ahead by"], rows), _averages(cut, best), _measured(results, cut)]
    return "\n\n".join(part for part in parts if part)


def _facts(line: Line, *, tuned: bool = True) -> list[str]:
    before = line.shelf
    return [f"{line.keep:g}", line.variant, f"{before['gmacs']:.4f}", f"{before['top1']:.2f}",
            spread(line) if tuned else ""]  # fmt: skip


def _averages(cut: Sequence[Line], best: str) -> str:
    """The variants over all keep rates; nothing where there is only one of either."""
    by_variant: dict[str, dict[float, Line]] = {}
    for line in cut:
        by_variant.setdefault(line.variant, {})[line.keep] = line
    if len(by_variant) == 1 or len(by_variant[best]) == 1:
        return ""
    rows = []
    for variant, at in by_variant.items():
        keeps = [keep for keep in by_variant[best] if keep in at]
        first, these = [by_variant[best][keep] for keep in keeps], [at[keep] for keep in keeps]
        average = mean([line.top1 for line in these])
        rows.append([variant, "/".join(f"{keep:g}" for keep in keeps), f"{average:.2f}",
                     "" if variant == best else lead(first, these)])  # fmt: skip
    return markdown(["method", "mean of keep", "fine-tuned", f"{best} ahead by"], rows)


def _measured(results: Results, found: Sequence[Line]) -> str:
    settings, versions = results.content["settings"], results.content["versions"]
    row = next(iter(found[0].tuned.values()))
    images = settings["data"] or "training images held out"
    steps = row["history"][-1]
    rates = [entry["images_per_second"] for line in found for row in line.tuned.values() for entry in row["history"]]
    return (
        f"{settings['model']}: {steps['epoch']:.0f} epochs, {steps['updates']:.0f} updates of {settings['batch_size']} "
        f"images, recipe {settings['recipe']}; judged by {len(row['correct']):,} images of {images}. {row['device']}, "
        f"{settings['precision']}, trained at {min(rates):.0f} to {max(rates):.0f} images/s a job; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
