"""`tokencut models`: what works, and with which methods."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.options import JsonFlag
from tokencut.errors import ModelError, UsageError


def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Part of a name, or a shell pattern such as 'vit_*_dinov2'.")
    ] = None,
    *,
    methods: Annotated[bool, typer.Option("--methods", help="List the reduction methods and their settings.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Lists the models that can be compressed, or the methods.

    Examples:
      tokencut models deit
      tokencut models 'vit_*_dinov2'
      tokencut models --methods
    """
    if methods and pattern is not None:
        raise UsageError(f"PATTERN {pattern} picks models, --methods lists methods; type tokencut models --methods")
    if methods:
        _list_methods(as_json)
    else:
        _list_models(pattern, as_json)


def _list_models(pattern: str | None, as_json: bool) -> None:
    from tokencut.models.names import list_supported

    found = list_supported(pattern)
    if not found:
        raise ModelError(f"no supported model matches {pattern!r}; type tokencut models for all of them")
    if as_json:
        render.write_json({"models": [dataclasses.asdict(model) for model in found]})
        return
    rows = [
        (
            model.name,
            model.alias or "",
            "x".join(map(str, model.input_size)),
            model.method,
            model.tags[0] if model.tags else "",
            model.licence or "",
        )
        for model in found
    ]
    render.show(render.table(("model", "alias", "pixels", "method", "weights", "licence"), rows, left=6))
    render.note(f"{len(found)} models; digits is bundled with tokencut")


def _list_methods(as_json: bool) -> None:
    from tokencut.methods import methods

    described = [_describe_method(method) for method in methods().values()]
    if as_json:
        render.write_json({"methods": described})
        return
    for method in described:
        on = "on" if method["prop_attn"] else "off"
        render.show(f"{method['name']}  ({method['source']}; proportional attention {on} by default)", method["help"])
        if method["settings"]:
            rows = [(setting["name"], _plain(setting["default"]), _values(setting)) for setting in method["settings"]]
            rows += [("preset", "", f"{name}: {' '.join(values)}") for name, values in _presets(method).items()]
            render.show(render.table(("--method-option", "default", "meaning"), rows, left=3))
        render.write("")


def _describe_method(method: Any) -> dict[str, Any]:
    return {
        "name": method.name,
        "source": method.source,
        "help": (inspect.getdoc(method) or "").partition("\n\n")[0].replace("\n", " "),
        "prop_attn": method.prop_attn,
        "presets": {name: dict(preset) for name, preset in method.presets.items()},
        "settings": [
            {"name": field.name, "default": field.default, **field.metadata} for field in dataclasses.fields(method)
        ],
    }


def _presets(method: dict[str, Any]) -> dict[str, list[str]]:
    """Each preset's settings as they would be typed."""
    return {
        name: [f"{key}={_plain(value)}" for key, value in preset.items()] for name, preset in method["presets"].items()
    }


def _values(setting: dict[str, Any]) -> str:
    """What a setting means, and what it may be."""
    if setting["choices"]:
        return f"{setting['help']}: {', '.join(setting['choices'])}"
    low, high = setting["low"], setting["high"]
    if low is None and high is None:
        return str(setting["help"])
    limits = f"{low} to {high}" if low is not None and high is not None else f"at least {low}"
    return f"{setting['help']} ({limits})"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
