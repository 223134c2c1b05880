"""What a transformers `config.json` describes, as timm's name and arguments: one small function a kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.models import get_pretrained_cfg

from tokencut.errors import ModelError
from tokencut.messages import one_line, shorten
from tokencut.models.alterations import CLASS_AND_MEAN, Alterations
from tokencut.models.names import architectures
from tokencut.schema import is_number, is_whole

# transformers' names of activations, by timm's.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python", "gelu_accurate"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}
_ACTIVATION = {theirs: ours for ours, names in _ACTIVATIONS.items() for theirs in names}

# timm's word for a width, a depth and a number of heads.
_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
    (1152, 27, 16): "so400m",
    (1536, 40, 24): "giant",
    (1280, 32, 20): "huge_plus",
    (4096, 40, 32): "7b",
}

# What transformers takes for a field that a config leaves out; it leaves out what equals its own default, at times.
_VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True,
}  # fmt: skip
_DINOV2 = {**_VIT, "layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": False}
_DINOV3 = {
    **_VIT, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "layer_norm_eps": 1e-5,
    "rope_theta": 100.0, "query_bias": True, "key_bias": False, "value_bias": True, "use_gated_mlp": False,
    "num_register_tokens": 0,
}  # fmt: skip
_BEIT = {
    **_VIT, "use_absolute_position_embeddings": False, "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False, "layer_scale_init_value": 0.1, "use_mean_pooling": True,
}  # fmt: skip
_CLIP = {**_VIT, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}
_VIDEOMAE = {**_VIT, "qkv_bias": None, "num_frames": 16, "tubelet_size": 2, "qv_bias": True, "use_mean_pooling": True}
_VIVIT = {
    **_VIT, "num_frames": 32, "tubelet_size": (2, 16, 16), "hidden_act": "gelu_fast", "layer_norm_eps": 1e-6,
}  # fmt: skip
_SIGLIP = {**_VIT, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


@dataclass(frozen=True)
class Head:
    """What is behind a model's last norm.

    Attributes:
        kind: `none`, `classes` (a classifier), `teacher` (two classifiers, DeiT's with a teacher) or `projection`.
        classes: How many numbers come out; 0 for none.
    """

    kind: str = "none"
    classes: int = 0


@dataclass(frozen=True)
class Architecture:
    """timm's words for a model.

    Attributes:
        name: timm's name.
        args: Arguments beside the name's own.
        image_size: Height and width in px that the weights were made for.
        alterations: What to change once it is built.
        resizes: Whether transformers takes images of any size, so that the preprocessing decides on it.
        antialias: Whether transformers resizes positions with antialiasing.
        folded: Whether timm's model adds the class token's position to the token itself.
        unused: How timm's names of tensors begin that transformers keeps and never uses.
        names: How timm calls what its families name differently: `vit`, `eva`, `beit` or `videomae`.
        tubelets: Tubelets along the frames of a clip; None for images.
    """

    name: str
    args: dict[str, Any]
    image_size: tuple[int, int]
    alterations: Alterations = Alterations()
    resizes: bool = False
    antialias: bool = False
    folded: bool = False
    unused: tuple[str, ...] = ()
    names: str = "vit"
    tubelets: int | None = None


@dataclass(frozen=True)
class Kind:
    """One of transformers' model types.

    Attributes:
        describe: Makes an `Architecture` of a config, complete, and a head.
        defaults: Fields of the config.
        processor: Fields of the preprocessor's config.
    """

    describe: Callable[[Mapping[str, Any], Head], Architecture]
    defaults: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)


def read_config(config: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """Finds the kind of a model, and the config of its image tower with nothing left out.

    Args:
        config: The content of `config.json`.

    Raises:
        ModelError: A kind that is not known, or a field that holds what it cannot.
    """
    model_type = config.get("model_type")
    kind = _KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        raise ModelError(_unknown(config))
    tower = {**kind.defaults, **_given(config)}
    for name in ("vision_config", "vision_config_dict"):  # the second, in old files, is the one that counts
        tower |= _given(config.get(name))
    if "tubelet_size" in tower:
        _split_tubelets(tower)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
        if not is_whole(tower[name], 1, 1 << 16):
            raise _wrong(name, tower[name], "a whole number")
    for name in ("image_size", "patch_size"):
        if not all(is_whole(side, 1, 1 << 16) for side in pair(tower[name])):
            raise _wrong(name, tower[name], "a number of pixels")
    if not is_number(tower["layer_norm_eps"]) or tower["layer_norm_eps"] <= 0:
        raise _wrong("layer_norm_eps", tower["layer_norm_eps"], "a positive number")
    return kind, tower


def head_of(config: Mapping[str, Any], tensors: Mapping[str, Any] | None) -> Head:
    """What is behind the last norm: as the tensors show or, without them, as the name of the class promises.

    Args:
        config: The content of `config.json`.
        tensors: The model's, by transformers' names; None where there are none at hand.
    """
    if tensors is not None:
        for kind, name in (("teacher", "cls_classifier.weight"), ("classes", "classifier.weight"),
                           ("projection", "visual_projection.weight")):  # fmt: skip
            found = next((tensor for key, tensor in tensors.items() if key.endswith(name)), None)
            if found is not None:
                return Head(kind, int(found.shape[0]))
        return Head()
    name = class_name(config)
    if name.endswith("ForImageClassificationWithTeacher"):
        return Head("teacher", classes_of(config))
    if name.endswith(("ForImageClassification", "ForVideoClassification")):
        return Head("classes", classes_of(config))
    if name in ("CLIPModel", "CLIPVisionModelWithProjection", "MetaClip2Model", "MetaClip2VisionModelWithProjection"):
        return Head("projection", int(config.get("projection_dim") or 512))
    return Head()


def class_name(config: Mapping[str, Any]) -> str:
    """transformers' class, such as `ViTForImageClassification`; else the model's type."""
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    return one_line(named or config.get("model_type") or "model", 60)


def classes_of(config: Mapping[str, Any]) -> int:
    """How many classes a config counts; transformers' own default is two."""
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and labels:
        return len(labels)
    number = config.get("num_labels")
    return int(number) if number is not None and is_whole(number, 0) else 2


def pair(size: Any) -> tuple[Any, Any]:
    """Height and width, of a number or of both."""
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)


def _given(fields: Any) -> dict[str, Any]:
    """The fields of a config that hold something."""
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, Mapping) else {}


def _vit(config: Mapping[str, Any], head: Head) -> Architecture:
    return _built(config, head, ("vit_{size}_patch{patch}_{image}", "vit_{size}_patch{patch}_224"))


def _deit(config: Mapping[str, Any], head: Head) -> Architecture:
    if head.kind == "teacher":
        names = ("deit_{size}_distilled_patch{patch}_{image}", "deit_{size}_distilled_patch{patch}_224")
        return _built(config, head, names, otherwise="deit_base_distilled_patch16_224")
    # Without a teacher the distillation token has no head of its own: it is a register.
    return _built(config, head, ("deit_{size}_patch{patch}_{image}", "deit_{size}_patch{patch}_224"),
                  args={"reg_tokens": 1})  # fmt: skip


def _dinov2(config: Mapping[str, Any], head: Head) -> Architecture:
    registers = config.get("num_register_tokens", 0)
    if not is_whole(registers, 0, 1 << 10) or not is_number(config["mlp_ratio"]):
        raise _wrong("num_register_tokens or mlp_ratio", [registers, config["mlp_ratio"]], "a number")
    gated, width = bool(config["use_swiglu_ffn"]), config["hidden_size"]
    hidden = int(width * config["mlp_ratio"])
    if gated:
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # timm counts both halves
    marked = "_reg4" if registers else ""
    found = _built(
        {**config, "intermediate_size": hidden, "hidden_act": "gelu" if gated else config["hidden_act"]},
        head,
        ("vit_{size}_patch{patch}" + marked + "_dinov2",),
        otherwise=f"vit_{'giant' if gated else 'base'}_patch14{marked}_dinov2",
        usual_width=8192 / 1536 if gated else 4,
        wanted=lambda name: gated == ("_giant_" in name),
        args={"reg_tokens": registers} if registers not in (0, 4) else {},
    )
    changed = Alterations(found.alterations.norm_eps, CLASS_AND_MEAN if head.kind == "classes" else None)
    return replace(found, alterations=changed, resizes=True, antialias=bool(registers), folded=bool(registers))


def _dinov3(config: Mapping[str, Any], head: Head) -> Architecture:
    registers, theta = config["num_register_tokens"], config["rope_theta"]
    if not is_whole(registers, 0, 1 << 10) or not is_number(theta) or theta <= 0:
        raise _wrong("num_register_tokens or rope_theta", [registers, theta], "a number")
    if config["key_bias"]:
        raise _wrong("key_bias", True, "false, as timm has it")
    gated, biased = bool(config["use_gated_mlp"]), bool(config["query_bias"] or config["value_bias"])
    plus, end = "_plus" if gated else "", "_qkvb" if biased else ""
    args = {"global_pool": "token", **({"num_reg_tokens": registers} if registers != 4 else {})}
    args |= {"rope_temperature": float(theta)} if theta != 100 else {}
    args |= {"swiglu_align_to": 1} if gated and config["intermediate_size"] % 64 else {}
    found = _built(
        {**config, "hidden_act": "gelu" if gated else config["hidden_act"]},
        head,
        ("vit_{size}_patch{patch}_dinov3" + end, "vit_{size}" + plus + "_patch{patch}_dinov3" + end),
        otherwise=f"vit_{'small_plus' if gated else 'base'}_patch16_dinov3{end}",
        usual_width=2 if config["hidden_size"] == 4096 else 4,
        wanted=lambda name: gated == ("_plus" in name or "7b" in name),
        args=args,
    )
    return replace(found, resizes=True, names="eva")


def _beit(config: Mapping[str, Any], head: Head) -> Architecture:
    mean = bool(config["use_mean_pooling"])
    args: dict[str, Any] = {} if mean else {"global_pool": "token"}
    for theirs, ours, usual in (("use_absolute_position_embeddings", "use_abs_pos_emb", False),
                                ("use_relative_position_bias", "use_rel_pos_bias", True),
                                ("use_shared_relative_position_bias", "use_shared_rel_pos_bias", False)):  # fmt: skip
        if bool(config[theirs]) != usual:
            args[ours] = not usual
    if not config["layer_scale_init_value"]:
        args["init_values"] = 0.0
    found = _built(config, head, ("beit_{size}_patch{patch}_{image}", "beit_{size}_patch{patch}_224"), args=args)
    return replace(found, names="beit")


def _clip(config: Mapping[str, Any], head: Head) -> Architecture:
    quick = "_quickgelu" if config["hidden_act"] == "quick_gelu" else ""
    names = tuple("vit_{size}_patch{patch}_clip" + quick + "_" + image for image in ("{image}", "224"))
    # Its classifier reads the mean of the patches, which no norm has seen.
    pool = {"global_pool": "avg", "final_norm": False} if head.kind == "classes" else {}
    usual = "quick_gelu" if quick else "gelu"
    found = _built(config, head, names, otherwise=f"vit_base_patch32_clip{quick}_224", usual_act=usual, args=pool)
    return replace(found, unused=("norm.",) if pool else ())


def _split_tubelets(tower: dict[str, Any]) -> None:
    """Has `tubelet_size` be a number of frames, and `patch_size` the rest of it where one holds both, in place."""
    size = tower["tubelet_size"]
    if isinstance(size, (list, tuple)) and len(size) == 3:
        tower["tubelet_size"], tower["patch_size"] = size[0], list(size[1:])
    for name in ("tubelet_size", "num_frames"):
        if not is_whole(tower[name], 1, 1 << 16):
            raise _wrong(name, tower[name], "a number of frames")
    if tower["num_frames"] < tower["tubelet_size"]:
        raise _wrong("num_frames", tower["num_frames"], f"one of its tubelets, of {tower['tubelet_size']} frames")


def _videomae(config: Mapping[str, Any], head: Head) -> Architecture:
    mean = bool(config["use_mean_pooling"])
    if head.kind == "classes" and not mean:
        raise _wrong("use_mean_pooling", False, "what a model without a class token can be classified by")
    # Without a classifier there is no norm behind the pooling, and one behind the blocks where nothing is pooled.
    args = {} if head.kind == "classes" else {"final_norm": False} if mean else {"fc_norm": False}
    biased = config["qv_bias"] if config["qkv_bias"] is None else config["qkv_bias"]  # its name before version 5
    return _of_clips({**config, "qkv_bias": bool(biased)}, head, "videomae_{size}_patch{patch}_224", args)


def _vivit(config: Mapping[str, Any], head: Head) -> Architecture:
    return _of_clips(config, head, "vivit_{size}_patch{patch}x2_224", {}, usual_act="gelu_tanh")


def _of_clips(config: Mapping[str, Any], head: Head, name: str, args: Mapping[str, Any], **usual: Any) -> Architecture:
    """A model of clips; its norms' epsilon is an argument, since the one behind the pooling may have another."""
    frames, tubelet, eps = config["num_frames"], config["tubelet_size"], float(config["layer_norm_eps"])
    defaults = _VIDEOMAE if "use_mean_pooling" in config else _VIVIT
    args = dict(args)
    args |= {} if frames == defaults["num_frames"] else {"num_frames": frames}
    args |= {} if tubelet == 2 else {"tubelet_size": tubelet}
    args |= {} if eps == defaults["layer_norm_eps"] else {"norm_eps": eps}
    found = _built(config, head, (name,), args=args, **usual)
    names = "videomae" if "use_mean_pooling" in config else "vit"
    return replace(found, alterations=Alterations(), names=names, tubelets=frames // tubelet)


def _siglip(config: Mapping[str, Any], head: Head) -> Architecture:
    pooled = head.kind == "none" and config.get("vision_use_head", True)
    gap = "" if pooled else "_gap"
    names = tuple("vit_{size}_patch{patch}_siglip" + gap + "_" + image for image in ("{image}", "224", "256"))
    found = _built(config, head, names, otherwise=f"vit_base_patch16_siglip{gap}_224")
    return replace(found, unused=("attn_pool.",) if gap else ())


def _siglip2(config: Mapping[str, Any], head: Head) -> Architecture:
    side = round(config.get("num_patches", 256) ** 0.5)
    return _siglip({**config, "image_size": side * config["patch_size"]}, head)


def _built(
    config: Mapping[str, Any],
    head: Head,
    names: tuple[str, ...],
    *,
    otherwise: str = "",
    usual_width: float = 4,
    usual_act: str = "gelu",
    wanted: Callable[[str], bool] = lambda name: "_giant_" not in name,
    args: Mapping[str, Any] | None = None,
) -> Architecture:
    """The first of timm's names that has the config's sizes, or another with all of them as arguments.

    Args:
        config: Complete.
        head: What is behind the last norm.
        names: With places for the size's word, the patch and the image in px; the last is the one to fall back on.
        otherwise: The name for sizes that timm has no word for; by default the last one's base.
        usual_width: How much wider the named models' MLPs are.
        usual_act: The named models' activation.
        wanted: Whether a name will do.
        args: Further arguments.
    """
    width, depth, heads = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    (rows, columns), (high, wide) = pair(config["image_size"]), pair(config["patch_size"])
    size = _SIZES.get((width, depth, heads), "")
    filled = [name.format(size=size, patch=high, image=rows) for name in names]
    known = architectures().keys()
    args = dict(args or {})
    name = next((name for name in filled if size and wanted(name) and high == wide and name in known), None)
    if name is None:
        name = otherwise or names[-1].format(size="base", patch=16, image=224)
        args = {"embed_dim": width, "depth": depth, "num_heads": heads, **args}
        args["patch_size"] = high if high == wide else (high, wide)
    usual = get_pretrained_cfg(name)
    assert usual is not None
    if (rows, columns) != tuple(usual.input_size[1:]):
        args["img_size"] = rows if rows == columns else (rows, columns)
    if int(width * usual_width) != config["intermediate_size"]:
        args["mlp_ratio"] = _ratio(config["intermediate_size"], width)
    act = _ACTIVATION.get(config["hidden_act"]) if isinstance(config["hidden_act"], str) else None
    if act is None:
        raise _wrong("hidden_act", config["hidden_act"], f"one of {', '.join(_ACTIVATION)}")
    if act != usual_act:
        args["act_layer"] = act
    if not config["qkv_bias"]:
        args["qkv_bias"] = False
    if config["num_channels"] != 3:
        args["in_chans"] = config["num_channels"]
    if head.classes != usual.num_classes:
        args["num_classes"] = head.classes
    return Architecture(name, args, (rows, columns), Alterations(norm_eps=float(config["layer_norm_eps"])))


def _ratio(hidden: int, width: int) -> float:
    """What timm multiplies a width by, and rounds down, to have an MLP of so many numbers."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _processor(statistics: str, size: Any, resample: int, **more: Any) -> dict[str, Any]:
    mean, std = {
        "half": ((0.5,) * 3, (0.5,) * 3),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    }[statistics]
    return {"image_mean": mean, "image_std": std, "size": size, "resample": resample, **more}


_CROPPED = {"do_center_crop": True, "crop_size": 224}
_KINDS: dict[str, Kind] = {
    "vit": Kind(_vit, _VIT, _processor("half", None, 2)),
    "vit_mae": Kind(_vit, _VIT, _processor("imagenet", None, 2)),
    "vit_msn": Kind(_vit, {**_VIT, "layer_norm_eps": 1e-6}, _processor("imagenet", None, 2)),
    "deit": Kind(_deit, _VIT, _processor("imagenet", {"height": 256, "width": 256}, 3, **_CROPPED)),
    "dinov2": Kind(_dinov2, _DINOV2, _processor("imagenet", {"shortest_edge": 256}, 3, **_CROPPED)),
    "dinov2_with_registers": Kind(_dinov2, {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
                                  _processor("imagenet", {"shortest_edge": 256}, 3, **_CROPPED)),
    "dinov3_vit": Kind(_dinov3, _DINOV3, _processor("imagenet", None, 2)),
    **dict.fromkeys(("beit", "data2vec-vision"),
                    Kind(_beit, _BEIT, _processor("half", {"height": 256, "width": 256}, 3, **_CROPPED))),
    **dict.fromkeys(("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
                    Kind(_clip, _CLIP, _processor("clip", {"shortest_edge": 224}, 3, **_CROPPED))),
    "videomae": Kind(_videomae, _VIDEOMAE, _processor("half", {"shortest_edge": 224}, 2, **_CROPPED)),
    "vivit": Kind(_vivit, _VIVIT, _processor("half", {"shortest_edge": 256}, 2, rescale_factor=1 / 127.5, offset=True,
                                             **_CROPPED)),
    **dict.fromkeys(("siglip", "siglip_vision_model"), Kind(_siglip, _SIGLIP, _processor("half", None, 3))),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), Kind(_siglip2, _SIGLIP, _processor("half", None, 2))),
}  # fmt: skip


def _unknown(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    named = f"{class_name(config)} of transformers' type {shorten(kind)}"
    text = "vocab_size" in config and "vision_config" not in config
    what = "a model of text" if text else "not supported"
    known = ", ".join(name for name in _KINDS if not name.endswith("_vision_model"))
    return (f"it holds a {named}, which is {what}; supported are the types {known}, timm_wrapper, and what "
            "'tokencut models' lists")  # fmt: skip


def _wrong(name: str, value: Any, expected: str) -> ModelError:
    return ModelError(f"its config.json says {name} {shorten(value)}, which is not {expected}; save the model again "
                      "with save_pretrained")  # fmt: skip
