"""The library's messages in the words of the command line: one table of what users type for a parameter.

The library speaks to Python callers. Where a message, a note or a report names an argument, it does so as code between
backticks (`` `batch_size=64` ``, `` `limit` ``, `` `tokencut.save(model, 'out.safetensors')` ``), of which `typed`
makes what stands for it here: `--batch-size 64`, `--limit`, `tokencut compress MODEL -o out.safetensors`.
"""

from __future__ import annotations

import ast

# Parameters whose option is their own name behind two dashes.
_SAME = """
    accumulate allow_drop alpha attention auto_augment batch_size beta calibration capture checkpoint class_map
    clip_grad color_jitter compare compile_mode crop_pct crop_scale cutmix data dense device distill distill_weight
    dtype ema_decay force frame_stride frames hflip img_size interpolation keep keep_warmup label_smoothing
    layer_decay layers levels limit lr lr_scaling max_drop mean method methods min_lr mixup model_kwargs num_classes
    opset precision predictions prop_attn quantize random_erasing recipe reduce_by seed select static_keep std
    temperature tensorboard top train_data views warmup_epochs weight_decay workers
"""
OPTIONS = {name: "--" + name.replace("_", "-") for name in _SAME.split()} | {
    "calibration_limit": "--calibration-limit",
    "compiled": "--compile",
    "dynamic_batch": "--dynamic-batch",
    "effort": "--search-effort",
    "epochs": "--finetune-epochs",
    "folder": "-o",
    "format": "--format",
    "front": "--front",
    "gmacs": "--target-gmacs",
    "image_root": "--image-root",
    "images": "--calibration-limit",
    "keeps": "--keep",
    "latency": "--latency",  # there is only its opposite, --no-latency
    "latency_ms": "--target-latency",
    "path": "-o",
    "pretrained": "--pretrained",  # there is only its opposite, --no-pretrained
    "speedup": "--target-speedup",
    "target_form": "--target-form",
    "timing_batch_size": "--batch-size",
    "with_preprocessing": "--with-preprocessing",
}
# Where the bare name means something else than the option that takes a value.
BARE = OPTIONS | {"compile_mode": "--compile"}
# timm's own arguments, which all stand behind one option.
TIMM = ("depth", "dynamic_img_size", "global_pool", "in_chans", "num_frames")
COMMANDS = {
    "compress": "compress", "evaluate": "eval FILE", "export_model": "export", "finetune": "compress",
    "predict": "predict", "profile": "profile", "save": "compress",
}  # fmt: skip
_MODELS = {"model": "MODEL", "dense": "MODEL --dense"}


def typed(message: str) -> str:
    """A message as users of the command line read it.

    Args:
        message: What the library says; code between backticks that names none of its parameters stays as it is.
    """
    first, *pieces = message.split("`")
    text, closing = first, False
    for number, piece in enumerate(pieces, 1):
        # Every piece is tried, not every second one: what a message quotes may be cut off behind a backtick.
        words = None if closing or number == len(pieces) else as_typed(piece)
        text += words or ("" if closing else "`") + piece
        closing = words is not None
    return text


def as_typed(code: str) -> str | None:
    """What is typed for arguments as Python has them, such as `keep=[0.9, 0.7], layers=[4, 7]`; None for other code."""
    try:
        call = ast.parse(f"f({code})", mode="eval").body
    except SyntaxError:
        return None
    assert isinstance(call, ast.Call)
    return _joined([*map(_named, call.args), *map(_given, call.keywords)])


def _named(node: ast.expr) -> str | None:
    """A parameter without its value, or one of tokencut's functions with what it is called with."""
    if isinstance(node, ast.Name):
        return BARE.get(node.id)
    function = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    package, _, name = function.partition(".")
    if package != "tokencut" or name not in COMMANDS:
        return None
    words: list[str | None] = ["tokencut", COMMANDS[name]]
    if not isinstance(node, ast.Call):
        return _joined(words)
    first, *others = node.args
    words += [_MODELS.get(ast.unparse(first)), *(f"-o {_value(other)}" for other in others)]
    line = _joined([*words, *map(_given, node.keywords)])
    return None if line is None else f"'{line}'"


def _joined(words: list[str | None]) -> str | None:
    """The words; None where one of them is."""
    known = [word for word in words if word is not None]
    return " ".join(known) if known and len(known) == len(words) else None


def _given(argument: ast.keyword) -> str | None:
    """A parameter with its value."""
    name = str(argument.arg)
    if name in TIMM:
        return f"--model-kwargs {name}={_value(argument.value)}"
    option, value = OPTIONS.get(name), argument.value
    if option is None:
        return None
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        return option if value.value else "--no-" + option.removeprefix("--")
    return f"{option} {_value(value, '/' if name == 'keep' else ',')}"


def _value(node: ast.expr, joint: str = ",") -> str:
    """A value as options are read: strings without quotes, lists joined."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return joint.join(_value(entry, "/") for entry in node.elts)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    text = ast.unparse(node)
    return text.lower() if text in ("True", "False") else text
