"""What claims.py does, in the order of what it is worth: a rerun goes on with what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Off the shelf: every keep rate, every method that needs no training, and the paper's own rule with its parts.
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
OURS, PAPER = "bat", "bat:preset=paper"
METHODS = (OURS, PAPER, "evit", "topk", "dpc", "kmedoids", "tome", "random")
PARTS = {
    "the whole rule": PAPER,
    "without matching": f"{PAPER}:pairs=0",
    "without clustering": f"{PAPER}:inattentive=drop",
    "importance only": f"{PAPER}:inattentive=drop:pairs=0",
    "diversity only": f"{PAPER}:clusters=1",
}
# Fine-tuned.
TUNED = (OURS, PAPER, "evit", "topk", "dpc", "dyvit", "tome")
TUNED_KEEPS = (0.7, 0.5)
WEIGHTS = ((0.1, 0.0), (1.0, 0.0), (0.0, 0.1), (0.0, 1.0), (0.1, 0.1))
# The paper's headline: how much cheaper, in percent of the multiply-adds, and the change of top-1 in points.
HEADLINE = {"deit_small": (35, -0.2), "deit_tiny": (40, 0.1)}
DENSE = "dense"

# One recipe for all: as it was trained (crops, flips, mixup, cutmix, smoothing), at a tenth of the learning rate.
RECIPE: dict[str, float] = {
    "lr": 1e-4, "warmup_epochs": 0.2, "hflip": 0.5, "crop_scale": 0.35, "mixup": 0.8, "cutmix": 1.0,
    "label_smoothing": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A model to be made, fine-tuned and judged.

    Attributes:
        label: The dense model's name.
        method: As `tokencut sweep --methods` takes it, settings behind colons; `dense` for the dense model.
        keep: A rate, or one a layer; `"-35%"` for the highest in hundredths that saves so many multiply-adds.
        seed: Of the fine-tune.
        epochs: Of the fine-tune; 0 to judge it as it is.
        alpha: Weight of the importance term.
        beta: Weight of the diversity term.
        layers: The blocks that reduce; the default where None.
    """

    label: str
    method: str = DENSE
    keep: float | str | tuple[float, ...] = 1.0
    seed: int = 1
    epochs: int = 0
    alpha: float = 0.0
    beta: float = 0.0
    layers: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """Its name among the results."""
        words = [self.label, self.method]
        if self.method != DENSE:
            words.append(f"keep={_joined(self.keep)}")
        if self.layers is not None:
            words.append(f"layers={','.join(map(str, self.layers))}")
        if self.epochs:
            words += [f"epochs={self.epochs}", f"seed={self.seed}"]
        words += [f"{name}={value:g}" for name, value in (("alpha", self.alpha), ("beta", self.beta)) if value]
        return " ".join(words)

    def reduction(self) -> dict[str, Any]:
        """The method's name, its settings, and proportional attention, which the paper's own rule does without."""
        if self.method == DENSE:
            return {"method": "bat", "method_options": {}, "prop_attn": None}
        name, *settings = self.method.split(":")
        options = dict(setting.split("=") for setting in settings)
        return {"method": name, "method_options": options, "prop_attn": False if "preset" in options else None}

    def command(self, folder: str, train: str, val: str, batch: int, recipe: Mapping[str, float] = RECIPE) -> str:
        """What to type for the same; a keep given as a saving is to be put in as the number it came to."""
        found = self.reduction()
        words = ["tokencut", "compress", f"local-dir:{folder}", "--method", found["method"]]
        for name, value in found["method_options"].items():
            words += ["--method-option", f"{name}={value}"]
        words += ["--no-prop-attn"] if found["prop_attn"] is False else []
        words += ["--keep", _joined(self.keep)]
        words += ["--layers", ",".join(map(str, self.layers))] if self.layers is not None else []
        if self.epochs:
            words += ["--finetune-epochs", str(self.epochs), "--train-data", train]
            terms = {"alpha": self.alpha, "beta": self.beta}
            settings = {**recipe, **{name: value for name, value in terms.items() if value}}
            for name, value in settings.items():
                words += [f"--{name.replace('_', '-')}", f"{value:g}"]
            words += ["--precision", "bf16", "-b", str(batch), "--seed", str(self.seed)]
        return shlex.join([*words, "--data", val, "-o", "out.safetensors"])


@dataclass(frozen=True)
class Sweep:
    """Methods and keep rates judged off the shelf, by `tokencut sweep`."""

    label: str
    name: str
    methods: tuple[str, ...]
    keeps: tuple[float, ...] = KEEPS
    prop_attn: bool | None = None

    @property
    def key(self) -> str:
        """Its name among the results."""
        return f"{self.label} {self.name}"

    def folder(self, work: Path) -> Path:
        """Where it stands while it is under way."""
        return work / self.key.replace(" ", "-")

    def complete(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether rows hold every method at every rate."""
        there = {(row["method"], row["keep"]) for row in rows}
        return there >= {(method, keep) for method in self.methods for keep in self.keeps}

    def words(self, folder: str, val: str, output: str) -> list[str]:
        """What to type."""
        keeps, methods = ",".join(map(str, self.keeps)), ",".join(self.methods)
        options = ["--no-prop-attn"] if self.prop_attn is False else []
        return ["tokencut", "sweep", f"local-dir:{folder}", "--keep", keeps, "--methods", methods, *options,
                "--no-latency", "--data", val, "-o", output]  # fmt: skip


@dataclass(frozen=True)
class Search:
    """A schedule searched for a model's headline, then judged off the shelf and fine-tuned."""

    label: str
    saved: int
    epochs: int

    @property
    def key(self) -> str:
        """Its name among the results."""
        return f"{self.label} searched -{self.saved}%"

    def gmacs(self, dense: float) -> float:
        """The multiply-adds to search for, of a dense model's: as one would type them, in units of 1e9."""
        return round((1 - self.saved / 100) * dense, 4)


Job = Task | Sweep | Search


@dataclass
class Plan:
    """Which models there are, and how much is done with them.

    Attributes:
        labels: The models, by the names of `HEADLINE`, where they are among them.
        epochs: Of a fine-tune.
        seeds: For the first model's fine-tunes; others get the first only.
        keeps: Rates of the sweep.
        methods: Methods of the sweep.
        tuned: Methods that are fine-tuned.
    """

    labels: Sequence[str]
    epochs: int = 3
    seeds: Sequence[int] = (1, 2, 3)
    keeps: tuple[float, ...] = KEEPS
    methods: tuple[str, ...] = METHODS
    tuned: tuple[str, ...] = TUNED
    weights: Sequence[tuple[float, float]] = field(default=WEIGHTS)

    def jobs(self) -> list[Job]:
        """Everything, the most telling first."""
        first = self.seeds[0]
        found: list[Job] = [Task(label) for label in self.labels]
        found += [Sweep(label, "methods", self.methods, self.keeps) for label in self.labels]
        for label in reversed(self.labels):
            found += self.headline(label, first)
        found += self.methods_tuned(self.labels[0], first)
        found += [Sweep(label, "parts", tuple(PARTS.values()), self.keeps, prop_attn=False) for label in self.labels]
        found += self.parts_tuned(self.labels[0], first)
        found += [Search(label, HEADLINE[label][0], self.epochs) for label in self.labels
                  if label in HEADLINE]  # fmt: skip
        found += [replace(task, alpha=alpha, beta=beta) for task in self._tuned(self.labels[0], (PAPER,), (0.5,), first)
                  for alpha, beta in self.weights]  # fmt: skip
        for seed in self.seeds[1:]:
            found += [*self.headline(self.labels[0], seed), *self.methods_tuned(self.labels[0], seed)]
        for label in self.labels[1:]:
            found += self.methods_tuned(label, first)
        return list({job.key: job for job in found}.values())

    def headline(self, label: str, seed: int) -> list[Task]:
        """The dense model fine-tuned alike, and the models of the paper's headline."""
        control = [Task(label, seed=seed, epochs=self.epochs)]
        if label not in HEADLINE:
            return control
        return control + self._tuned(label, (OURS, PAPER), (f"-{HEADLINE[label][0]}%",), seed)

    def methods_tuned(self, label: str, seed: int) -> list[Task]:
        """Every method with the one recipe."""
        return self._tuned(label, self.tuned, TUNED_KEEPS, seed)

    def parts_tuned(self, label: str, seed: int) -> list[Task]:
        """The paper's rule with its parts taken away."""
        return self._tuned(label, tuple(PARTS.values()), TUNED_KEEPS[::-1], seed)

    def _tuned(self, label: str, methods: Sequence[str], keeps: Sequence[float | str], seed: int) -> list[Task]:
        return [Task(label, method, keep, seed, self.epochs) for keep in keeps for method in methods]


def _joined(keep: float | str | tuple[float, ...]) -> str:
    return "/".join(f"{rate:g}" for rate in keep) if isinstance(keep, tuple) else str(keep)
