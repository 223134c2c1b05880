"""What a tokencut file says about its model, and its JSON form: written sorted, read back believing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokencut.errors import UsageError
from tokencut.models.alterations import Alterations
from tokencut.models.fields import (
    ALTERATIONS,
    LABEL_NAMES,
    MAX_LENGTH,
    MEASURED,
    ORIGIN,
    PREPROCESSING,
    PRETRAINED_CFG,
    QUANTIZED,
    LabelNames,
    as_tuples,
    labels_from_json,
    labels_to_json,
    named_by,
    per_block,
)  # fmt: skip
from tokencut.recipe import Recipe, recipe_from_json
from tokencut.schema import OBJECT, TEXT, Fields, Form, Rule, is_whole

FORM = Form(
    type="compressed-model",
    format=1,
    fields=Fields({
        "architecture": TEXT,
        "model_args": OBJECT,
        "alterations": ALTERATIONS,
        "quantized": QUANTIZED,
        "recipe": OBJECT,
        "keep_per_block": per_block(float),
        "tokens_per_block": per_block(int),
        "preprocessing": PREPROCESSING,
        "pretrained_cfg": PRETRAINED_CFG,
        "label_names": LABEL_NAMES,
        "origin": ORIGIN,
        "measured": MEASURED,
    }, partial=frozenset({"alterations", "quantized"})),
    called="metadata",
    otherwise="compress the model again",
    most=MAX_LENGTH,
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where weights came from; never a path.

    Attributes:
        kind: `hub`, `url`, `checkpoint` (a local file), `local-dir`, `bundled` with tokencut, `random`, or
            `unverified`: a model made elsewhere, whose weights need not be those that its description names.
        name: The hub's repository, the address, or the bundled model's name.
        sha256: SHA-256 of a local file of weights.
        seed: Seed of random weights.
        licence: Their licence, if timm knows it.
    """

    kind: str
    name: str | None = None
    sha256: str | None = None
    seed: int | None = None
    licence: str | None = None

    def __str__(self) -> str:
        what = {"sha256": self.sha256, "seed": None if self.seed is None else str(self.seed)}
        parts = [self.kind, self.name or "", *(f"{key} {value}" for key, value in what.items() if value)]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class ArtifactInfo:
    """A tokencut file without its tensors.

    Attributes:
        architecture: timm's name.
        model_args: timm's arguments: `timm.create_model(architecture, **model_args)` takes the file's tensors.
        recipe: What was done to the model.
        depth: The model's number of blocks.
        preprocessing: As timm resolves it: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`.
        pretrained_cfg: What else of timm's description belongs to these weights, its tag for one.
        label_names: The classes' names, in the order of the logits or by index, if known.
        origin: Where the weights came from, and their licence.
        alterations: What was changed after timm had built the model.
        quantized: What the weights of its blocks are quantised to, `int8` or `fp8`; None where they are not.
        measured: What was measured: `gmacs` and `dense_gmacs` per image; `top1`, `top5` and the same of the dense model
            in percent, on how many `images`.
        dtype: The type the weights are stored in; read from the tensors.
        parameters: How many numbers the tensors hold; read from the tensors.
    """

    architecture: str
    model_args: Mapping[str, Any]
    recipe: Recipe
    depth: int
    preprocessing: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    label_names: LabelNames | None = None
    origin: Origin = Origin("unverified")
    alterations: Alterations = Alterations()
    quantized: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "fp32"
    parameters: int = 0

    @property
    def keep_per_block(self) -> tuple[float, ...]:
        """The fraction of its image tokens that leaves each block; 1.0 where a block does not reduce."""
        schedule, stages = self.recipe.schedule, {stage.block: stage for stage in self.recipe.stages}
        rates = dict.fromkeys(range(1, self.depth + 1), 1.0)
        for position, block in enumerate(schedule.layers):
            if schedule.keep is not None:
                rates[block] = schedule.keep[position] if isinstance(schedule.keep, tuple) else schedule.keep
            elif block in stages:
                rates[block] = stages[block].tokens_out / stages[block].tokens_in
        return tuple(rates.values())

    @property
    def tokens_per_block(self) -> tuple[int, ...]:
        """The image tokens that leave each block, at the recipe's input size."""
        leaving = {stage.block: stage.tokens_out for stage in self.recipe.stages}
        tokens = leaving.get(0, self.recipe.tokens)  # of clips less what is static
        return tuple((tokens := leaving.get(block, tokens)) for block in range(1, self.depth + 1))

    def timm_description(self) -> dict[str, Any]:
        """A `pretrained_cfg` for timm: preprocessing, classes and tag, and no place to load weights from."""
        classes = self.model_args.get("num_classes")
        known = {"label_names": self.label_names, "license": self.origin.licence, "num_classes": classes}
        return {
            "architecture": self.architecture,
            **self.pretrained_cfg,
            **self.preprocessing,
            **{name: value for name, value in known.items() if value is not None},
        }

    def to_text(self) -> str:
        """Sorted JSON on one line: the same for the same model."""
        altered = self.alterations.to_json()
        return FORM.write({
            "architecture": self.architecture,
            "model_args": dict(self.model_args),
            **({"alterations": altered} if altered else {}),
            **({"quantized": self.quantized} if self.quantized else {}),
            "recipe": self.recipe.to_json(),
            "keep_per_block": self.keep_per_block,
            "tokens_per_block": self.tokens_per_block,
            "preprocessing": dict(self.preprocessing),
            "pretrained_cfg": dict(self.pretrained_cfg),
            "label_names": labels_to_json(self.label_names),
            "origin": asdict(self.origin),
            "measured": dict(self.measured),
        })  # fmt: skip


def info_from_text(text: str, *, as_written: bool = False) -> ArtifactInfo:
    """Reads the JSON of a file back.

    Args:
        text: The value of the file's one metadata key.
        as_written: Whether to take the architecture, its arguments and the method's settings as they stand there,
            without asking timm and the methods, for which torch is loaded.

    Raises:
        ArtifactError: Not JSON, too large or too deep, of another type or a newer format, or a field is missing,
            unknown, or does not hold what it should.
    """
    data = FORM.read(text)
    if not as_written:
        _check_architecture(data["architecture"], data["model_args"])
    depth = len(data["keep_per_block"])
    # Checked before a model is built: a depth of thousands would take minutes even without memory.
    if data["model_args"].get("depth", depth) != depth:
        raise FORM.damaged(
            f"its model_args say depth {data['model_args']['depth']}, its keep_per_block has {depth} blocks"
        )
    names, classes = labels_from_json(data["label_names"]), data["model_args"].get("num_classes")
    if names is not None and is_whole(classes) and not named_by(names, classes):
        raise FORM.damaged(f"its label_names name {len(names)} classes, and its model has {classes}")
    info = ArtifactInfo(
        architecture=data["architecture"],
        model_args=as_tuples(data["model_args"]),
        recipe=recipe_from_json(data["recipe"], depth, as_written=as_written),
        depth=depth,
        preprocessing=as_tuples(data["preprocessing"]),
        pretrained_cfg=as_tuples(data["pretrained_cfg"]),
        label_names=names,
        origin=Origin(**data["origin"]),
        alterations=Alterations(**data.get("alterations", {})),
        quantized=data.get("quantized"),
        measured=check_measured(data["measured"]),
    )
    if list(info.keep_per_block) != data["keep_per_block"] or list(info.tokens_per_block) != data["tokens_per_block"]:
        raise FORM.damaged("its keep_per_block or tokens_per_block is not what its recipe says")
    return info


def _check_architecture(name: str, args: Mapping[str, Any]) -> None:
    """Refuses what timm could not build, or what would have it do more than build."""
    from tokencut.models.model_args import check_model_args
    from tokencut.models.names import architectures

    problem = Rule(lambda value: value in architectures(), "a supported model's name").problem(name, "architecture")
    if problem:
        raise FORM.damaged(f"its metadata{problem}")
    try:
        check_model_args(args)
    except UsageError as error:
        raise FORM.damaged(str(error).partition(";")[0]) from error


def check_measured(measured: Mapping[str, Any]) -> dict[str, float]:
    """Lets through the known measurements that have a value.

    Raises:
        UsageError: An unknown name, or a value that is not a number.
    """
    problem = MEASURED.problem(dict(measured))
    if problem:
        raise UsageError(f"measured{problem}; give some of {', '.join(MEASURED.checks)}, in GMACs, percent or images")
    return {name: value for name, value in measured.items() if value is not None}
