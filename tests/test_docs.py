"""README and the pages: their links lead somewhere, their commands are spelt right, and the layers stand in order."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from test_layers import IMPORTS, LAYER, part, within

from tokencut.cli.app import app
from tokencut.sweeping.rows import read_variants

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
TOKENCUT = typer.main.get_command(app)
BENCHMARKS = ROOT / "examples" / "benchmarks"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page ends in, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "link"), [pytest.param(page, link, id=f"{name(page)} {link}") for page, link in LINKS if ":" not in link]
)
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def commands(page: Path) -> list[str]:
    """The command lines in the page's code blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shown = [text for kind, text in blocks if kind in ("", "bash") and not text.startswith("tokencut/")]
    lines = [line for text in shown for line in text.replace("\\\n", " ").splitlines()]
    return [command.strip() for line in lines for command in line.split("&&")]


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=f"{name(page)} {number}") for number, (page, line) in enumerate(COMMANDS)]
)
def test_a_command_is_spelt_right(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "python":
        assert (ROOT / words[1]) == BENCHMARKS / "run.py"
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", words[2:])
        path = next(BENCHMARKS.rglob(f"{words[2]}.py"))
        importlib.import_module(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts)).parse()
    elif words[0] == "tokencut":
        context = TOKENCUT.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]
        if words[1] == "sweep":
            assert read_variants(context.params["methods"].split(","))
    else:
        assert words[0] in ("pip", "pytest")


def test_the_page_on_layers_shows_every_folder_below_what_it_imports() -> None:
    tree = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8").split("```")[1]
    rows = [re.findall(r"(\w+)(?:/|\.py)", row.partition("     ")[0]) for row in re.findall(r"^  \S.*", tree, re.M)]
    place = {shown: number for number, names in enumerate(rows) for shown in names}
    assert set(place) == set(LAYER) - {"tokencut", "__main__"}
    wrong = {
        f"{part(module)} imports {part(other)}"
        for module, imported in IMPORTS.items()
        for other in imported
        if within(other, {"tokencut"}) and place.get(part(other), 0) > place.get(part(module), len(rows))
    }
    assert not wrong
