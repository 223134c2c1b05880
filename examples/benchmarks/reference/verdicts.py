"""The paper's four claims, held against what was found: by differences paired over the images, with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tables import ahead, hits

from reference.worklist import DENSE, HEADLINE, OURS, PAPER, PARTS, TUNED_KEEPS, Task
from tokencut.evaluation.statistics import CLEAR, Difference, paired_difference

MISSING = "not measured"
# Importance only: the paper's rule without its parts, and the two methods by others that keep the attentive tokens.
IMPORTANCE = (PARTS["importance only"], "evit", "topk")


@dataclass(frozen=True)
class Verdict:
    """A claim, and what became of it.

    Attributes:
        letter: Of the claim.
        what: The claim.
        paper: What the paper reports.
        found: What was found here.
        verdict: Whether it reproduces.
    """

    letter: str
    what: str
    paper: str
    found: str
    verdict: str

    @property
    def fails(self) -> bool:
        """Whether it was measured and does not clearly hold."""
        return (not self.verdict.startswith("yes") or "though" in self.verdict) and self.verdict != MISSING

    @property
    def refuted(self) -> bool:
        """Whether it clearly does not hold."""
        return self.verdict.startswith("no") and not self.verdict.startswith("not")


@dataclass(frozen=True)
class Book:
    """What results.json holds."""

    data: dict[str, Any]

    @property
    def found(self) -> dict[str, Any]:
        """The results by the keys of their jobs."""
        found: dict[str, Any] = self.data["rows"]
        return found

    @property
    def epochs(self) -> int:
        """Of a fine-tune."""
        return int(self.data["settings"]["epochs"])

    def whole(self, key: str) -> bool:
        """Whether a job is done."""
        return key in self.found and bool(self.found[key].get("whole", True))

    def sweep(self, key: str) -> tuple[dict[tuple[str, float], dict[str, Any]], list[float]]:
        """The rows of a sweep by method and keep rate, and its rates from the highest down, without the dense row's."""
        rows = {(row["method"], row["keep"]): row for row in self.found.get(key, {}).get("rows", [])}
        return rows, sorted({keep for method, keep in rows if method != DENSE}, reverse=True)

    def seeds(self, task: Task) -> dict[int, dict[str, Any]]:
        """The results of a task by seed."""
        seeds = sorted({entry["seed"] for entry in self.found.values() if entry.get("epochs")})
        keys = {seed: replace(task, seed=seed).key for seed in seeds or [task.seed]}
        return {seed: self.found[key] for seed, key in keys.items() if key in self.found}

    def difference(self, first: Task, second: Task) -> Difference | None:
        """How far one is ahead of the other, over the seeds that both have; what is not trained has them all."""
        mine, theirs = self.seeds(first), self.seeds(second)
        return ahead([(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())])


def of_rows(first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """How far one result is ahead of another."""
    return paired_difference(hits(first), hits(second))


def judged(difference: Difference, least: float) -> str:
    """Whether a difference is at least so large, as far as two standard errors tell."""
    error = CLEAR * difference.standard_error
    if difference.points >= least:
        return "yes" if difference.points - error >= least else "yes, though the error allows less"
    return "not told apart: the error allows it" if difference.points + error >= least else "no"


def claims(book: Book, labels: Sequence[str]) -> list[Verdict]:
    """All claims, for the models that there are."""
    found = []
    for letter, label in (("(a)", "deit_small"), ("(b)", "deit_tiny")):
        found += headline(book, letter, label)
    for label in labels:
        found += importance(book, label)
    for label in labels:
        found += parts(book, label)
    return found


def headline(book: Book, letter: str, label: str) -> list[Verdict]:
    """(a) and (b): so many percent fewer multiply-adds at such a change of top-1."""
    saved, change = HEADLINE[label]
    said = "top-1 79.8, at most 0.2 lost" if change < 0 else "top-1 72.2, 0.1 gained"
    found = []
    for method in (PAPER, OURS):
        task = Task(label, method, f"-{saved}%", epochs=book.epochs)
        for name, other in (("as trained", Task(label)), ("fine-tuned alike", Task(label, epochs=book.epochs))):
            difference = book.difference(task, other)
            what = f"{label}, `{method}`, {saved} % fewer multiply-adds, against dense {name}"
            if difference is None:
                found.append(Verdict(letter, what, said, "", MISSING))
                continue
            gmacs = next(iter(book.seeds(task).values()))
            real = 100 * (1 - gmacs["gmacs"] / gmacs["dense_gmacs"])
            here = f"{difference} at {real:.1f} % fewer (keep {gmacs['keep']:g})"
            found.append(Verdict(letter, what, said, here, judged(difference, change)))
    return found


def importance(book: Book, label: str) -> list[Verdict]:
    """(c): ahead of importance only at every keep, most at a low one."""
    said = "ahead at every keep; against EViT +0.1 at keep 0.7, +0.5 at 0.5 (DeiT-S)"
    plain = f"{label}, off the shelf, both without proportional attention"
    found = [_every_keep(book, f"{label} parts", PAPER, IMPORTANCE[0], plain, said)]
    found += [_every_keep(book, f"{label} methods", OURS, other, f"{label}, off the shelf", said)
              for other in IMPORTANCE[1:]]  # fmt: skip
    for method in (PAPER, OURS):
        for other in IMPORTANCE[1:] if method == OURS else IMPORTANCE:
            tasks = [(Task(label, method, keep, epochs=book.epochs), Task(label, other, keep, epochs=book.epochs))
                     for keep in TUNED_KEEPS]  # fmt: skip
            differences = {keep: difference for keep, pair in zip(TUNED_KEEPS, tasks, strict=True)
                           if (difference := book.difference(*pair))}  # fmt: skip
            found.append(_everywhere(differences, f"{label}, fine-tuned: `{method}` over `{other}`", said))
    return found


def _every_keep(book: Book, key: str, mine: str, other: str, what: str, said: str) -> Verdict:
    rows, keeps = book.sweep(key)
    pairs = {keep: (rows.get((mine, keep)), rows.get((other, keep))) for keep in keeps}
    differences = {keep: of_rows(one, two) for keep, (one, two) in pairs.items() if one and two}
    return _everywhere(differences, f"{what}: `{mine}` over `{other}`", said)


def _everywhere(differences: dict[float, Difference], what: str, said: str) -> Verdict:
    """Ahead everywhere, and most at the lowest keep."""
    if not differences:
        return Verdict("(c)", f"{what}, at every keep, most at the lowest", said, "", MISSING)
    keeps = sorted(differences, reverse=True)
    here = "; ".join(f"{keep:g}: {differences[keep]}" for keep in keeps)
    behind = [keep for keep in keeps if differences[keep].points < 0 and differences[keep].is_clear]
    unclear = [keep for keep in keeps if not differences[keep].is_clear]
    most = max(keeps, key=lambda keep: differences[keep].points)
    if behind:
        verdict = f"no: behind at {', '.join(f'{keep:g}' for keep in behind)}"
    elif unclear:
        verdict = f"not told apart at {', '.join(f'{keep:g}' for keep in unclear)}, ahead elsewhere"
        verdict = "not told apart at any" if len(unclear) == len(keeps) else verdict
    else:
        verdict = "yes, ahead at every keep"
    growing = "" if len(keeps) < 2 else "; most at the lowest" if most == keeps[-1] else f"; most at {most:g}"
    return Verdict("(c)", f"{what}, at every keep, most at the lowest", said, here, verdict + growing)


def parts(book: Book, label: str) -> list[Verdict]:
    """(d): the whole rule is better than either part of it."""
    found, said = [], "both are needed"
    for name, method in list(PARTS.items())[1:]:
        differences = {}
        rows, rates = book.sweep(f"{label} parts")
        keeps = [keep for keep in rates if (PAPER, keep) in rows and (method, keep) in rows]
        if keeps:
            mine, theirs = ([hits(rows[which, keep]) for keep in keeps] for which in (PAPER, method))
            differences[f"off the shelf, mean of keep {keeps[0]:g} to {keeps[-1]:g}"] = paired_difference(mine, theirs)
        for keep in TUNED_KEEPS:
            task = Task(label, PAPER, keep, epochs=book.epochs)
            difference = book.difference(task, replace(task, method=method))
            if difference is not None:
                differences[f"fine-tuned, keep {keep:g}"] = difference
        what = f"{label}, the whole rule over {f'it {name}' if name.startswith('without') else name}"
        if not differences:
            found.append(Verdict("(d)", what, said, "", MISSING))
        for where, difference in differences.items():
            verdict = "yes" if difference.points > 0 and difference.is_clear else judged(difference, 0.0)
            verdict = "not told apart" if not difference.is_clear else verdict
            found.append(Verdict("(d)", f"{what}, {where}", said, str(difference), verdict))
    return found
