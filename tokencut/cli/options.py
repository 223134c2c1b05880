"""The options that commands share: each is written down once, in a group, and read into what the library takes.

A command takes a whole group as one parameter, and `with_groups` spells the group out for typer:

    @with_groups
    def profile(model: ModelName = "deit_tiny", *, source: ModelOptions, reduction: ReductionOptions) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokencut.cli.help import HelpAllFlag
from tokencut.errors import UsageError
from tokencut.files import user_path
from tokencut.limits import LIMITS
from tokencut.messages import nearest_known, one_line, shorten
from tokencut.schedule import NEED_A_RATE, PLACEMENTS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_MODEL = "deit_tiny"
DEFAULT_KEEP = 0.7

MODEL_HELP = (
    "A tokencut file, digits (bundled), a timm name such as deit_small, a folder that transformers or timm saved, "
    "hf-hub:NAME or local-dir:PATH."
)

Precision = Literal["fp32", "bf16", "fp16"]


def bounded(name: str, metavar: str = "N") -> dict[str, Any]:
    """An option that takes a number, which is checked before anything is loaded.

    Args:
        name: The argument that it is for, as `tokencut.limits.LIMITS` has it.
        metavar: What stands for it in the help.
    """
    limits = LIMITS[name]

    # typer's own words on what is wrong with a number change from release to release.
    def read(text: str) -> Any:
        try:
            value = int(text) if limits.whole else float(text)
        except ValueError:
            raise typer.BadParameter(f"{shorten(text)} is not {limits.expected}, such as {limits.example}") from None
        if not limits.allow(value):
            raise typer.BadParameter(f"{one_line(text, 40)} is not {limits.expected}, such as {limits.example}")
        return value

    return {"metavar": metavar, "parser": read}


def precision_name(text: str) -> Precision:
    """Parser of an option: a type that weights can be stored or computed in.

    Raises:
        typer.BadParameter: There is no such type.
    """
    for name in typing.get_args(Precision):
        if text == name:
            return name
    raise typer.BadParameter(f"{text!r} is not one of {', '.join(typing.get_args(Precision))}")


reduction_option = functools.partial(typer.Option, rich_help_panel="Reduction")
model_option = functools.partial(typer.Option, rich_help_panel="Model")
running_option = functools.partial(typer.Option, rich_help_panel="Running")
data_option = functools.partial(typer.Option, rich_help_panel="Data")

PRECISION = {"metavar": "fp32|bf16|fp16", "parser": precision_name}

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
DenseFlag = Annotated[bool, reduction_option("--dense", help="The untouched model, of a tokencut file too.")]

KEEP_HELP = (
    "Share of the image tokens that stay at each stage, in (0, 1]. One number, or one per layer joined by /, as in "
    "0.9/0.7/0.5."
)
LAYERS_HELP = (
    "Blocks that reduce, from 1 on, as in 4,7,10 or 4-10. Or late (6,8,10 of 12); or, beside --keep or --reduce-by, "
    "gradual (4 to 10 of 12) or all."
)
METHOD_HELP = "How tokens are reduced: see tokencut models --methods."
OPTION_HELP = "A setting of the method; may be repeated."
REDUCE_BY_HELP = "Instead of --keep: N fewer tokens in each layer. Then --layers is all."
STATIC_KEEP_HELP = "Of clips: the share of tubelets, those that change most, that enters the first block."
PROP_ATTN_HELP = "Whether merged tokens weigh by their size in later attention."


@dataclass(frozen=True)
class ReductionOptions:
    """How tokens are reduced, as typed. Beside a tokencut file these replace its recipe."""

    keep: Annotated[str | None, reduction_option("--keep", metavar="F", help=KEEP_HELP)] = None
    layers: Annotated[str | None, reduction_option("--layers", metavar="4,7,10", help=LAYERS_HELP)] = None
    method: Annotated[str | None, reduction_option("--method", metavar="NAME", help=METHOD_HELP)] = None
    method_option: Annotated[
        list[str] | None, reduction_option("--method-option", metavar="KEY=VALUE", help=OPTION_HELP)
    ] = None
    reduce_by: Annotated[int | None, reduction_option("--reduce-by", **bounded("reduce_by"), help=REDUCE_BY_HELP)] = (
        None
    )
    prop_attn: Annotated[bool | None, reduction_option("--prop-attn/--no-prop-attn", help=PROP_ATTN_HELP)] = None
    static_keep: Annotated[
        float | None, reduction_option("--static-keep", **bounded("static_keep", "F"), help=STATIC_KEEP_HELP)
    ] = None

    def given(self) -> tuple[str, ...]:
        """The options that were typed, such as `("--keep", "--layers")`."""
        typed = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return tuple(
            ("--no-" if value is False else "--") + name.replace("_", "-")
            for name, value in typed.items() if value not in (None, [])
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """What was typed, as arguments of `tokencut.compress`.

        Raises:
            UsageError: An option cannot be read, or two contradict each other.
        """
        if self.keep is not None and self.reduce_by is not None:
            raise UsageError("--keep and --reduce-by exclude each other; type one of them")
        if self.layers in NEED_A_RATE and self.keep is None and self.reduce_by is None:
            raise UsageError(
                f"--layers {self.layers} needs an explicit rate, since 0.7 in so many blocks leaves next to nothing; "
                "add --keep 0.95 or --reduce-by 8"
            )
        keep = None if self.keep is None else read_keep(self.keep)
        return {
            "keep": DEFAULT_KEEP if keep is None and self.reduce_by is None else keep,
            "layers": None if self.layers is None else read_layers(self.layers),
            "method": self.method,
            "reduce_by": self.reduce_by,
            "prop_attn": self.prop_attn,
            "method_options": read_pairs("--method-option", self.method_option or (), "clusters=0.25"),
            "static_keep": self.static_keep,
        }


SWEEP_KEEP_HELP = (
    "Shares of the image tokens that stay, joined by commas. Each one number, or one per layer joined by /."
)
METHODS_HELP = (
    "Methods joined by commas, or all. The first is compared with each other one; settings stand behind colons, as in "
    "bat,bat:preset=paper."
)


@dataclass(frozen=True)
class SweepOptions:
    """The reductions that a sweep tries, as typed."""

    keep: Annotated[str | None, reduction_option("--keep", metavar="F,F,...", help=SWEEP_KEEP_HELP)] = None
    methods: Annotated[str | None, reduction_option("--methods", metavar="NAME,...", help=METHODS_HELP)] = None
    layers: Annotated[str | None, reduction_option("--layers", metavar="4,7,10", help=LAYERS_HELP)] = None
    prop_attn: Annotated[bool | None, reduction_option("--prop-attn/--no-prop-attn", help=PROP_ATTN_HELP)] = None

    def arguments(self) -> dict[str, Any]:
        """What was typed, as arguments of `tokencut.sweeping.run.SweepPlan`; what was not typed is not there.

        Raises:
            UsageError: An option cannot be read, or two contradict each other.
        """
        if self.layers in NEED_A_RATE and self.keep is None:
            raise UsageError(
                f"--layers {self.layers} needs explicit rates, since 0.5 in so many blocks leaves next to nothing; add "
                "--keep 0.97,0.95"
            )
        read = {
            "keeps": None if self.keep is None else [read_keep(part.strip()) for part in self.keep.split(",")],
            "methods": None if self.methods is None else self.methods.split(","),
            "layers": None if self.layers is None else read_layers(self.layers),
            "prop_attn": self.prop_attn,
        }
        return {name: value for name, value in read.items() if value is not None}


CHECKPOINT_HELP = (
    "Local weights instead of pretrained ones. Safetensors, .pth, .ckpt, .bin or .npz, an index of several, or a "
    "folder with one."
)
KWARGS_HELP = "An argument for timm; may be repeated."


MEAN_HELP = "Mean of the pixels, from 0 to 1, that the weights were trained with, instead of the one that is assumed."
CROP_HELP = "Share of the resized image that is kept, as for the weights."
INTERPOLATION_HELP = "How images are resized, as for the weights: bicubic, bilinear, ..."


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers joined by commas."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        example = "0.485,0.456,0.406" if option == "--mean" else "0.229,0.224,0.225"
        raise UsageError(f"{option} {text} is no list of numbers joined by commas; type {option} {example}") from error


@dataclass(frozen=True)
class ModelOptions:
    """Where a model's weights come from, and how timm builds it."""

    checkpoint: Annotated[Path | None, model_option("--checkpoint", metavar="FILE", help=CHECKPOINT_HELP)] = None
    no_pretrained: Annotated[bool, model_option("--no-pretrained", help="Random weights: no download.")] = False
    model_kwargs: Annotated[list[str] | None, model_option("--model-kwargs", metavar="KEY=VALUE", help=KWARGS_HELP)] = (
        None
    )
    num_classes: Annotated[
        int | None, model_option("--num-classes", **bounded("num_classes"), help="Classes of the head.")
    ] = None
    img_size: Annotated[
        int | None, model_option("--img-size", **bounded("img_size"), help="Side of the images, in px.")
    ] = None
    mean: Annotated[str | None, model_option("--mean", metavar="R,G,B", help=MEAN_HELP)] = None
    std: Annotated[str | None, model_option("--std", metavar="R,G,B", help="Likewise the standard deviation.")] = None
    crop_pct: Annotated[float | None, model_option("--crop-pct", **bounded("crop_pct", "F"), help=CROP_HELP)] = None
    interpolation: Annotated[str | None, model_option("--interpolation", metavar="NAME", help=INTERPOLATION_HELP)] = (
        None
    )

    def preprocessing(self) -> dict[str, Any]:
        """What was typed of the preprocessing.

        Raises:
            UsageError: A mean or standard deviation is no list of numbers.
        """
        typed = {"mean": _numbers("--mean", self.mean), "std": _numbers("--std", self.std), "crop_pct": self.crop_pct,
                 "interpolation": self.interpolation}  # fmt: skip
        return {name: value for name, value in typed.items() if value is not None}


@dataclass(frozen=True)
class RunOptions:
    """Where and how a model runs."""

    device: Annotated[str, running_option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    precision: Annotated[Precision, running_option("--precision", **PRECISION, help="What it computes in.")] = "fp32"
    batch_size: Annotated[
        int, running_option("-b", "--batch-size", **bounded("batch_size"), help="Images a batch.")
    ] = 64
    seed: Annotated[int, running_option("--seed", **bounded("seed"), help="Decides random weights.")] = 0


@dataclass(frozen=True)
class TimingOptions(RunOptions):
    """The same where forwards are timed."""

    batch_size: Annotated[
        int, running_option("-b", "--batch-size", **bounded("batch_size"), help="Images a forward.")
    ] = 16


CAPTURE_HELP = "Run it from a CUDA graph: no wait for kernels to be started one by one."
MODE_HELP = "default, reduce-overhead (CUDA graphs) or max-autotune; implies --compile."


@dataclass(frozen=True)
class CompileOptions:
    """Whether and how the model goes through `torch.compile`, or into a CUDA graph."""

    compiled: Annotated[
        bool, running_option("--compile", help="Run it through torch.compile; the first batch takes minutes.")
    ] = False
    compile_mode: Annotated[str | None, running_option("--compile-mode", metavar="MODE", help=MODE_HELP)] = None
    capture: Annotated[bool, running_option("--capture", help=CAPTURE_HELP)] = False

    @property
    def mode(self) -> str | None:
        """torch's name for how to compile; None for not at all."""
        return self.compile_mode or ("default" if self.compiled else None)


DATA_HELP = (
    "A folder with one sub-folder a class, or digits. Also a .tar, .tar.gz or .zip of one, or a .csv list of images."
)
LIMIT_HELP = "Judge an evenly spread sample of N images."
CLASS_MAP_HELP = "The order of the model's classes: a text file, a class folder's name in each line."
IMAGE_ROOT_HELP = "The folder that the paths of a list are relative to."
FRAME_STRIDE_HELP = "Of videos: frames from one of a clip to the next; 4 by default."
FRAMES_HELP = "A model of images on clips of N frames: it sees each by itself, and its logits are averaged."
VIEWS_HELP = "Of videos: clips that are taken from each, whose probabilities are averaged; 1 by default."
WORKERS_HELP = "Processes that load images."


Workers = Annotated[int | None, data_option("-j", "--workers", **bounded("workers"), help=WORKERS_HELP)]
ClassMapFile = Annotated[Path | None, data_option("--class-map", metavar="FILE", help=CLASS_MAP_HELP)]
ImageRoot = Annotated[Path | None, data_option("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)]
FrameStride = Annotated[int | None, data_option("--frame-stride", **bounded("frame_stride"), help=FRAME_STRIDE_HELP)]
Frames = Annotated[int | None, data_option("--frames", **bounded("frames"), help=FRAMES_HELP)]
Views = Annotated[int | None, data_option("--views", **bounded("views"), help=VIEWS_HELP)]


@dataclass(frozen=True)
class DataOptions:
    """The images that an accuracy is measured on, and how all images of the command are read."""

    data: Annotated[str | None, data_option("--data", metavar="DIR", help=DATA_HELP)] = None
    limit: Annotated[int | None, data_option("--limit", **bounded("limit"), help=LIMIT_HELP)] = None
    workers: Workers = None
    class_map: ClassMapFile = None
    image_root: ImageRoot = None
    frame_stride: FrameStride = None
    views: Views = None

    def reading(self) -> dict[str, Any]:
        """How the images are to be read, for `open_source`."""
        return {"class_map": self.class_map, "image_root": self.image_root, "frame_stride": self.frame_stride,
                "views": self.views}  # fmt: skip


def read_keep(text: str) -> float | list[float]:
    """Reads `--keep`: one number, or one per layer joined by `/`.

    Raises:
        UsageError: It holds commas, a word, or a number outside (0, 1].
    """
    if re.fullmatch(r"0,\d+", text):
        raise UsageError(f"--keep {text} has a comma; type --keep {text.replace(',', '.')}")
    if "," in text:
        raise UsageError(
            f"--keep {text} has commas, which only sweep takes; for one rate per layer join them by /: "
            f"--keep {'/'.join(part.strip() for part in text.split(',') if part.strip()) or '0.9/0.7/0.5'}"
        )
    rates = [_read_rate(part, text) for part in text.split("/")]
    return rates[0] if len(rates) == 1 else rates


def _read_rate(part: str, text: str) -> float:
    try:
        rate = float(part)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:  # nan is neither
        inside = f" in --keep {text}" if part != text else ""
        raise UsageError(
            f"keep {part or 'nothing'}{inside} is not a number in (0, 1]; it is the fraction of the image tokens that "
            "stay, such as --keep 0.7"
        )
    return rate


def read_layers(text: str) -> list[int] | str:
    """Reads `--layers`: block numbers and ranges of them joined by commas, or the name of a placement.

    Raises:
        UsageError: It is neither.
    """
    names = ("all", *PLACEMENTS)
    if text in names:
        return text
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        # No model has blocks of seven digits; a range of them would be made before it is refused.
        if not all(re.fullmatch("[0-9]{1,6}", end) for end in ((first, last) if dash else (first,))):
            near = nearest_known(text, names).rstrip(";")
            raise UsageError(f"--layers {text} is not a list of block numbers, such as --layers 4,7,10 or 4-10, nor "
                             f"one of {', '.join(names)}{near}")  # fmt: skip
        layers += range(int(first), int(last if dash else first) + 1)
    if not layers:
        raise UsageError(f"--layers {text} names no block: a range goes upwards, such as --layers 4-10")
    return layers


def read_pairs(option: str, texts: Iterable[str], example: str) -> dict[str, str]:
    """Reads a repeated `key=value` option.

    Raises:
        UsageError: A text has no `=` or no key, or a key stands twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {text} is not of the form key=value, such as {option} {example}")
        if key.strip() in pairs:
            raise UsageError(f"{option} gives {key.strip()} twice; type it once, such as {option} {text}")
        pairs[key.strip()] = value.strip()
    return pairs


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: spells out the parameters that are option groups, since typer wants every option as a parameter.

    Args:
        command: A function; those of its parameters whose annotation is a dataclass of options get an instance of it.

    Returns:
        The same with all options as keyword parameters of their own.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    groups = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _spelled_out(groups[name]) if name in groups else [parameter]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("help_all", keyword, default=False, annotation=HelpAllFlag))

    @functools.wraps(command)
    def run(*, help_all: bool = False, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
        command(**values)

    # Options without default would have to stand first in a signature; none has.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def with_home_folders(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: has `~` and `~somebody` expanded in all paths that a command takes, which shells leave to it.

    Args:
        command: A function whose options are spelled out.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        paths = {name: user_path(value) for name, value in values.items() if isinstance(value, Path)}
        command(**{**values, **paths})

    return run


def _spelled_out(group: type[DataclassInstance]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            entry.name,
            keyword,
            default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
            annotation=hints[entry.name],
        )
        for entry in fields(group)
    ]
