"""RESULTS.md and its plots, from results.json: of whatever is in it, with what is missing named."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tables import markdown

from reference import verdicts
from reference.verdicts import Book, Verdict
from reference.worklist import DENSE, OURS, PAPER, PARTS, TUNED_KEEPS, Job, Search, Sweep, Task
from tokencut.files import atomic_write
from tokencut.visualization.plots import Point, Series, accuracy_plot

TITLE = "# The paper's claims, measured on a stand-in"
INTRO = """\
"Beyond Attentive Tokens" ([arXiv 2211.11315](https://arxiv.org/abs/2211.11315)) reports DeiT on ImageNet. This page
tests its claims on {classes} classes of Tiny-ImageNet, with models of the very same geometry: images of 56 px in
patches of 4 are 14 x 14 = 196 image tokens, so token counts, depth, width and multiply-adds per block are DeiT's own.
What small models on small images say about ImageNet is limited: they are weaker, and they were trained on {images}
than ImageNet's 1.28 million images. `bat` is tokencut's default rule, `{paper}` with `--no-prop-attn` the paper's own.

Every difference is in points of top-1, paired over the same validation images, with its standard error over the images;
with several seeds it is averaged over them first. *Yes* and *no* are said where two standard errors allow it.
"""

SHELF = """\
Nothing is trained. Top-1 in percent; equal keep means equal tokens for every method. Proportional attention is each
method's default, so on for both rows of `bat`; the paper's own rule, without it, stands under the parts.
"""


@dataclass(frozen=True)
class Page:
    """A page in the making: what was found, and the jobs that there are."""

    book: Book
    jobs: Sequence[Job]

    def text(self, plots: Mapping[str, str]) -> str:
        """The whole page."""
        if not self.labels:
            return f"{TITLE}\n\nNothing has been measured yet.\n"
        claims = verdicts.claims(self.book, self.labels)
        parts = [
            TITLE, self.intro(), "## What does not reproduce", negatives(claims), "## The claims", claim_table(claims),
            "## The models", self.models(), "## Off the shelf",
            SHELF,
            *(self.swept(label, plots.get(label)) for label in self.labels),
            "## Fine-tuned", self.recipe(), *(self.tuned(label) for label in self.labels),
            "## The parts of the paper's rule", self.parts(), "## The loss terms", self.weights(),
            "## Searched schedules", self.searched(), "## What was cut", self.cut(), "## Commands", self.commands(),
        ]  # fmt: skip
        return "\n\n".join(part.strip() for part in parts if part) + "\n"

    @property
    def labels(self) -> list[str]:
        """The models that were judged."""
        names = dict.fromkeys(job.label for job in self.jobs)
        return [name for name in names if self.book.found.get(Task(name).key)]

    def intro(self) -> str:
        dense = self.book.found[Task(self.labels[0]).key]
        judged = f"{dense['images']:,} validation images"
        runs = "; ".join(dict.fromkeys(f"{run['device']}, torch {run['torch']}, timm {run['timm']}, {run['date']}"
                                       for run in self.book.data["runs"]))  # fmt: skip
        said = INTRO.format(classes=dense["classes"], images=f"{dense['train_images']:,} rather", paper=PAPER)
        return f"{said}\nJudged in fp32 on {judged}. Machine: {runs}."

    def models(self) -> str:
        head = ("model", "GMACs", "trained, epochs", "top-1, %", "fine-tuned alike, minus as trained")
        rows, trained = [], self.book.data.get("trained", {})
        for label in self.labels:
            dense = self.book.found[Task(label).key]
            control = self.book.difference(self.control(label), Task(label))
            epochs = trained[label]["epochs"] if label in trained else "not noted"
            rows.append((label, f"{dense['gmacs']:.4f}", epochs, f"{dense['top1']:.2f}", control or "not measured"))
        said = [f"{label}, as trained: {_settings(told['recipe'])}; {_settings(told['augmentation'])}"
                for label, told in trained.items()]  # fmt: skip
        said += self.book.data.get("notes", [])
        return markdown(head, rows) + ("\n\n" + lines(said) if said else "")

    def control(self, label: str) -> Task:
        """The dense model fine-tuned alike."""
        return Task(label, epochs=self.book.epochs)

    def swept(self, label: str, plot: str | None) -> str:
        by_key, keeps = self.book.sweep(f"{label} methods")
        if not by_key:
            return f"{label}: not measured."
        methods = list(dict.fromkeys(method for method, _ in by_key if method != DENSE))
        dense = by_key[DENSE, 1.0]
        lines = []
        for method in methods:
            cells = [by_key.get((method, keep)) for keep in keeps]
            lines.append((f"`{method}`", *(f"{cell['top1']:.2f}" if cell else "" for cell in cells)))
        first = [by_key.get((methods[0], keep)) for keep in keeps]
        lines.append((f"`{methods[0]}`, GMACs", *(f"{cell['gmacs']:.3f}" if cell else "" for cell in first)))
        lines.append((f"`{methods[0]}` minus dense",
                      *(str(verdicts.of_rows(cell, dense)) if cell else "" for cell in first)))  # fmt: skip
        head = (f"{label} (dense {dense['top1']:.2f})", *(f"keep {keep:g}" for keep in keeps))
        picture = f"\n\n![Top-1 against multiply-adds, {label}]({plot})" if plot else ""
        return markdown(head, lines) + picture

    def recipe(self) -> str:
        held = self.book.data["settings"]
        words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in held["recipe"].items())
        return (f"One recipe for all: epochs {held['epochs']}, batch {held['batch']}, {held['precision']}, {words}, "
                "half of the loss distilled from the dense model. *Minus control*: against the dense model fine-tuned "
                f"alike, and *`{OURS}` minus this* at the same keep rate or saving, both seed by seed.")  # fmt: skip

    def tuned(self, label: str) -> str:
        tasks = [job for job in self.jobs if isinstance(job, Task) and job.label == label and job.epochs]
        tasks = [job for job in tasks if not job.alpha and not job.beta and job.method.split(":inatt")[0] == job.method
                 and job.method not in tuple(PARTS.values())[1:]]  # fmt: skip
        rows = []
        for task in dict.fromkeys(replace(task, seed=1) for task in tasks):
            found = self.book.seeds(task)
            if not found:
                continue
            tops, sample = [entry["top1"] for entry in found.values()], next(iter(found.values()))
            spread = f" ± {stdev(tops):.2f}" if len(tops) > 1 else ""
            saved = 100 * (1 - sample["gmacs"] / sample["dense_gmacs"])
            keep = "" if task.method == DENSE else f"{sample['keep']:g}"
            control = "" if task.method == DENSE else self.book.difference(task, self.control(label)) or "no control"
            behind = "" if task.method in (DENSE, OURS) else self.book.difference(replace(task, method=OURS), task)
            rows.append((f"`{task.method}`", keep, f"{saved:.1f}", str(len(tops)), f"{mean(tops):.2f}{spread}",
                         self.book.difference(task, Task(label)), control, behind or ""))  # fmt: skip
        head = (label, "keep", "fewer GMACs, %", "seeds", "top-1, % (± over seeds)", "minus dense as trained",
                "minus control", f"`{OURS}` minus this")  # fmt: skip
        # A saving may come to a keep rate that is in the list anyway.
        return markdown(head, list(dict.fromkeys(rows))) if rows else f"{label}: not measured."

    def parts(self) -> str:
        said = []
        for label in self.labels:
            by_key, keeps = self.book.sweep(f"{label} parts")
            lines: list[tuple[Any, ...]] = []
            for name, method in list(PARTS.items()) if by_key else []:
                pairs = [(by_key.get((method, keep)), by_key.get((PAPER, keep))) for keep in keeps]
                whole = method == PAPER
                lines.append((name, *("" if not (mine and all_) else f"{mine['top1']:.2f}" if whole
                                      else verdicts.of_rows(mine, all_) for mine, all_ in pairs)))  # fmt: skip
            if lines:
                said.append(markdown((f"{label}, off the shelf", *(f"keep {keep:g}" for keep in keeps)), lines))
            tuned: list[tuple[Any, ...]] = []
            tasks = {(method, keep): Task(label, method, keep, epochs=self.book.epochs)
                     for method in PARTS.values() for keep in TUNED_KEEPS}  # fmt: skip
            found = {cell: seeds for cell, task in tasks.items() if (seeds := self.book.seeds(task))}
            # What all have: the whole rule has more seeds than its parts.
            common = set.intersection(*map(set, found.values())) if found else set()
            for name, method in PARTS.items():
                cells = []
                for keep in TUNED_KEEPS:
                    against = self.book.difference(tasks[method, keep], tasks[PAPER, keep])
                    tops = [found[method, keep][seed]["top1"] for seed in common if (method, keep) in found]
                    cells.append(f"{mean(tops):.2f}" if tops and method == PAPER else against or "")
                if any(cells):
                    tuned.append((name, *cells))
            if len(tuned) > 1:
                counted = f"{len(common)} seed{'s' * (len(common) > 1)}"
                rates = (f"keep {keep:g}" for keep in TUNED_KEEPS)
                said.append(markdown((f"{label}, fine-tuned, {counted}", *rates), tuned))
        return "\n\n".join(said) if said else "Not measured."

    def weights(self) -> str:
        tasks = [job for job in self.jobs if isinstance(job, Task) and (job.alpha or job.beta)]
        rows = [(f"{task.label}, `{task.method}`, keep {task.keep}", f"{task.alpha:g}", f"{task.beta:g}", difference)
                for task in tasks
                if (difference := self.book.difference(task, replace(task, alpha=0.0, beta=0.0)))]  # fmt: skip
        head = ("model", "alpha (importance)", "beta (diversity)", "minus the same without")
        return markdown(head, rows) if rows else "Not measured."

    def searched(self) -> str:
        rows = []
        for job in self.jobs:
            found = self.book.found.get(job.key) if isinstance(job, Search) else None
            if found is None:
                continue
            dense, control = self.book.found[Task(job.label).key], self.book.found.get(self.control(job.label).key)
            keep = "/".join(f"{rate:g}" for rate in found["keep"]) if isinstance(found["keep"], list) else found["keep"]
            tuned = found["tuned"]
            rows.append((job.label, f"{100 * (1 - tuned['gmacs'] / tuned['dense_gmacs']):.1f}", keep,
                         ",".join(map(str, found["layers"])), verdicts.of_rows(found["shelf"], dense),
                         verdicts.of_rows(tuned, dense), verdicts.of_rows(tuned, control) if control else "",
                         f"{found['searching']:.0f} s"))  # fmt: skip
        head = ("model", "fewer GMACs, %", "keep", "layers", "off the shelf, minus dense", "fine-tuned, minus dense",
                "minus control", "search")  # fmt: skip
        return markdown(head, rows) if rows else "Not measured."

    def cut(self) -> str:
        left = [job.key for job in self.jobs if not self.book.whole(job.key)]
        failed = [f"`{key}`: {told['reason']}" for key, told in self.book.data["failed"].items()]
        if not left:
            return "Nothing of the list is left."
        said = [
            f"{len(left)} of {len(self.jobs)} jobs of worklist.py were not done:",
            lines(f"`{key}`" for key in left),
        ]
        return "\n\n".join([*said, *(["Of these, tried and failed:", lines(failed)] if failed else [])])

    def commands(self) -> str:
        held = self.book.data["settings"]
        label, epochs = self.labels[0], self.book.epochs
        sweeps = [job for job in self.jobs if isinstance(job, Sweep)][:1]
        folder, data = f"runs/{label}", (held["train"], held["val"], held["batch"], held["recipe"])
        tasks = [*(Task(label, method, 0.5, epochs=epochs) for method in (OURS, PAPER)), Task(label, epochs=epochs)]
        shown = [
            "\n".join(run["command"] for run in self.book.data["runs"]),
            *(shlex.join(sweep.words(folder, held["val"], "report/")) for sweep in sweeps),
            *(task.command(folder, *data) for task in tasks),
        ]
        blocks = [f"```\n{command}\n```" for command in shown]
        return "\n\n".join(
            [
                "All of it, in pieces; the models come from train.py beside it, but for what is said above:",
                blocks[0],
                "Single rows, as one would type them: a sweep, fine-tunes of `bat` and the paper's rule, the control:",
                *blocks[1:],
            ]
        )


def negatives(claims: Sequence[Verdict]) -> str:
    """What fails, what cannot be told, what was not measured."""
    failing = [claim for claim in claims if claim.fails]
    no = [f"{claim.letter} {claim.what}: {claim.found}. **{claim.verdict}**" for claim in failing if claim.refuted]
    open_ = [f"{claim.letter} {claim.what}: {claim.found}; {claim.verdict}" for claim in failing if not claim.refuted]
    missing = [f"{claim.letter} {claim.what}" for claim in claims if claim.verdict == verdicts.MISSING]
    said = [lines(no) if no else "Of what was measured, nothing is clearly otherwise."]
    said += ["Neither shown nor refuted, within two standard errors:", lines(open_)] if open_ else []
    said += ["Not measured:", lines(missing)] if missing else []
    return "\n\n".join(said)


def claim_table(claims: Sequence[Verdict]) -> str:
    """The paper's claims beside ours."""
    head = ("", "claim", "the paper, on ImageNet", "here", "reproduces")
    return markdown(head, [(claim.letter, claim.what, claim.paper, claim.found, claim.verdict) for claim in claims])


def _settings(values: Mapping[str, Any]) -> str:
    shown = {name: "/".join(f"{part:.3g}" for part in value) if isinstance(value, (list, tuple)) else f"{value:g}"
             for name, value in values.items()}  # fmt: skip
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def lines(texts: Any) -> str:
    """A Markdown list."""
    return "\n".join(f"- {text}" for text in texts)


def write(data: dict[str, Any], jobs: Sequence[Job], folder: Path) -> str:
    """Writes the page and its plots; gives the page's text."""
    made = Page(Book(data), jobs)
    plots = {}
    for label in made.labels:
        rows, keeps = made.book.sweep(f"{label} methods")
        if not keeps:
            continue
        dense, points = rows[DENSE, 1.0], dict[str, list[Point]]()
        for (method, keep), row in rows.items():
            name = "/".join(map(str, keep)) if isinstance(keep, tuple) else str(keep)
            points.setdefault(method, []).append(Point(row["gmacs"], row["top1"], name))
        series = [Series(method, tuple(found)) for method, found in points.items() if method != DENSE]
        start = Point(dense["gmacs"], dense["top1"])
        figure = accuracy_plot(series, start, "multiply-adds per image (G)", less_is_better=True)
        plots[label] = f"{label}-off-the-shelf.png"
        with atomic_write(folder / plots[label]) as temporary:
            figure.savefig(temporary, format="png", dpi=160)
    text = made.text(plots)
    with atomic_write(folder / "RESULTS.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
