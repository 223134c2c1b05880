"""What the library says to Python callers, in the words of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import typer
from test_layers import TREES, within

from tokencut.cli.app import app
from tokencut.cli.wording import BARE, COMMANDS, OPTIONS, TIMM, as_typed, typed

COMMAND_LINE = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KNOWN = {option for command in COMMAND_LINE.values() for parameter in command.params
         for option in (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("type `batch_size=64`", "type --batch-size 64"),
        ("leave out `data`", "leave out --data"),
        ("such as `keep=0.7`", "such as --keep 0.7"),
        ("`keep=[0.9, 0.7], layers=[4, 7]`", "--keep 0.9/0.7 --layers 4,7"),
        ("`keeps=[(0.9, 0.7), 0.5]`", "--keep 0.9/0.7,0.5"),
        ("`methods=['bat', 'bat:pairs=0.25']`", "--methods bat,bat:pairs=0.25"),
        ("`compare=['all']`", "--compare all"),
        ("`lr=5e-05`, `lr=nan`", "--lr 5e-05, --lr nan"),
        ("`num_classes=-1`", "--num-classes -1"),
        ("`num_classes=N, train_data='DIR'`", "--num-classes N --train-data DIR"),
        ("add `force=True`", "add --force"),
        ("`pretrained=False`", "--no-pretrained"),
        ("`prop_attn=False`", "--no-prop-attn"),
        ("`compile_mode='default'`, or leave out `compile_mode`", "--compile-mode default, or leave out --compile"),
        ("`path='a b.onnx'`", "-o a b.onnx"),
        ("`dynamic_img_size=True`", "--model-kwargs dynamic_img_size=true"),
        ("`tokencut.profile`", "tokencut profile"),
        ("`tokencut.save(model, 'a.safetensors')`", "'tokencut compress MODEL -o a.safetensors'"),
        ("`tokencut.export_model(dense, 'a.onnx', force=True)`", "'tokencut export MODEL --dense -o a.onnx --force'"),
        # Not the library's own words.
        ("in `a b`, `layers.0`, `unknown=3`, `f(x)`, `tokencut.other`, `", "in `a b`, `layers.0`, `unknown=3`, `f(x)`, "
         "`tokencut.other`, `"),
        # Quoted from elsewhere, and cut off.
        ("`torch.load` with `wei...; type `force=True`", "`torch.load` with `wei...; type --force"),
        ("`tokencut.save(other, 'a')` and ``", "`tokencut.save(other, 'a')` and ``"),
    ],
)  # fmt: skip
def test_arguments_are_read_as_options(said: str, read: str) -> None:
    assert typed(said) == read


def test_every_option_of_the_table_exists() -> None:
    named = {*OPTIONS.values(), *BARE.values(), "--no-pretrained", "--dense", "--model-kwargs"} - {
        "--pretrained",
        "--latency",
    }
    assert not named - KNOWN
    assert {words.split()[0] for words in COMMANDS.values()} <= set(COMMAND_LINE)
    assert not set(TIMM) & set(OPTIONS)


def messages() -> Iterator[tuple[str, str]]:
    """The texts of the library that are no docstrings, by module; what they are formatted with is `x`."""
    for module, tree in TREES.items():
        if within(module, {"tokencut.cli"}):
            continue
        strings = [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant))]
        inside = {id(part) for node in strings if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in strings:
            if isinstance(node, ast.JoinedStr):
                yield (
                    module,
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values),
                )
            elif isinstance(node.value, str) and id(node) not in inside | docs:
                yield module, node.value


CODES = sorted({(module, code) for module, text in messages() for code in re.findall(r"`([^`]+)`", text)})


def test_whatever_the_library_names_can_be_typed() -> None:
    assert len(CODES) > 80
    # A name that is filled in, a filter of warnings, and a word of the report's Markdown.
    other = {r"torch\.jit\.script", "none beyond chance"}
    # What only a Python program can come to: attributes, calls, and torch's own words for wrappers.
    python = re.compile(r"[a-z_]\.[a-zA-Z_]|\(\)$|fully_shard$|features_only$|max_graphs=")
    assert not [pair for pair in CODES if not re.match("x(=|$)", pair[1]) and pair[1] not in other
                and not python.search(pair[1]) and as_typed(pair[1]) is None]  # fmt: skip
