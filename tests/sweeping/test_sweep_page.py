"""A sweep's page for a browser: all that the report has, nothing from outside, and text that stays text."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tokencut.evaluation.statistics import Difference
from tokencut.sweeping.page import page
from tokencut.sweeping.report import SweepReport
from tokencut.sweeping.rows import Row, compare, pair_name
from tokencut.visualization.grid import Panel
from tokencut.visualization.tiles import Tile, Tiles

KEEPS = (0.5, (0.9, 0.8), 0.7)
SVG = ("<svg>wide</svg>", "<svg>narrow</svg>")


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def report(model: str = "tiny", methods: tuple[str, str] = ("bat", "evit"), notes: tuple[str, ...] = ()) -> SweepReport:
    rows = [Row("dense", 1.0, 4.6, 75.0, 100.0, 1000.0, 4, 0.5, (True, True, True, False))]
    rows += [
        Row(method, keep, 2.0, 50.0, 100.0, 2000.0, 4, 0.75, (True, True, False, False), Difference(-25.0, error))
        for keep in KEEPS
        for method, error in zip(methods, (20.0, 0.5), strict=True)
    ]
    return SweepReport(model, "val", 4, tuple(rows), compare(rows), (2, 4), "fp32", "a chip", 64, {"torch": "2"}, notes)


def tiles(found: SweepReport, names: tuple[str, ...] = ("ant/1.jpg", "bee/2.jpg")) -> Tiles:
    """For every row and image a tile of another grey, and as many tokens."""
    greys = iter(range(10, 250, 5))
    models = {
        pair_name(row.method, row.keep): tuple(Tile(grey(shade), 196, shade) for shade in (next(greys), next(greys)))
        for row in found.rows[1:]
    }
    return Tiles(names, (grey(0), grey(1)), models, (Panel(grey(2), "dark: dropped"),))


def grey(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, np.uint8)


def test_a_page_has_the_figures_the_plots_and_every_picture() -> None:
    found = report(notes=("a note",))
    html = page(found, {"top-1 against multiply-adds": SVG}, tiles(found))
    read = Reader(html)
    for text in ("a note", "4 images of val; blocks 2,4 reduce; fp32 on a chip; torch 2.", "2,000", "dark: dropped",
                 "bat against the others", "ant/1.jpg", "bee/2.jpg", "196 patches"):  # fmt: skip
        assert text in read.texts, text
    # What may be chance is in brackets.
    assert "(-25.00\xa0±\xa020.00)" in read.texts
    assert "-25.00\xa0±\xa00.50" in read.texts
    plot = next(image for image in read.all("img") if str(image["alt"]).startswith("Plot of top-1 against"))
    assert base64.b64decode(str(plot["src"]).partition(",")[2]).decode() == SVG[0]
    [narrow] = read.all("source")
    assert base64.b64decode(str(narrow["srcset"]).partition(",")[2]).decode() == SVG[1]
    shown = [str(image["alt"]) for image in read.all("img")]
    for image in ("ant/1.jpg", "bee/2.jpg"):
        assert f"{image}: the image" in shown
        for method in ("bat", "evit"):
            for keep in ("0.5", "0.7", "0.9/0.8"):
                assert f"{image}: what {method} leaves at keep {keep}" in shown


def test_the_slider_goes_from_most_to_least_and_each_place_has_its_pictures() -> None:
    found = report()
    read = Reader(page(found, {}, tiles(found)))
    [slider] = read.all("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    box = next(attributes for attributes in read.all("div") if attributes.get("id") == "slider")
    assert box["data-keeps"] == "0.9/0.8,0.7,0.5"
    assert "hidden" in box  # until a script shows it: without, all pictures are there
    assert any(label["for"] == slider["id"] for label in read.all("label"))
    places = [attributes["data-keep"] for attributes in read.all("div") if "data-keep" in attributes]
    assert places == ["0", "1", "2"] * 4
    # The first tiles are those of bat at 0.9/0.8, of the first image.
    html = page(found, {}, tiles(found))
    first = html[html.index('data-keep="0"') :]
    assert first.index("keep 0.9/0.8") < first.index("keep 0.7") < first.index("keep 0.5")
    assert "</span>30 of 196 tokens" in first.partition("</div>")[0]


def test_one_keep_rate_needs_no_slider() -> None:
    found = report()
    one = replace(found, rows=tuple(row for row in found.rows if row.keep in (1.0, 0.7)))
    read = Reader(page(one, {}, tiles(found)))
    assert not read.all("input")
    assert len([1 for attributes in read.all("div") if "data-keep" in attributes]) == 4


def test_nothing_is_loaded_and_nothing_but_our_own_script_runs() -> None:
    found = report()
    html = page(found, {"x": SVG}, tiles(found))
    read = Reader(html)
    assert all(str(image["src"]).startswith("data:image/") for image in read.all("img"))
    assert not [1 for _, attributes in read.elements if "href" in attributes or "style" in attributes]
    assert not [1 for _, attributes in read.elements if any(name.startswith("on") for name in attributes)]
    policy = next(str(meta["content"]) for meta in read.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        [text] = [part.partition(f"</{tag}>")[0] for part in html.split(f"<{tag}>")[1:]]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '" onload="alert(1)', "</title><b>&amp;", "a\nb\x1b[2J", "猫 \udcff.jpg"]
)
def test_text_from_files_stays_text(text: str) -> None:
    plain, found = report(), report(text, (text, "evit"), (text,))
    honest = Reader(page(plain, {"x": SVG}, tiles(plain)))
    odd = Reader(page(found, {"x": SVG}, tiles(found, (text, text))))
    # One more element for the note, and the same attributes everywhere.
    assert [(tag, set(attributes)) for tag, attributes in odd.elements if tag not in ("p", "wbr")] == [
        (tag, set(attributes)) for tag, attributes in honest.elements if tag not in ("p", "wbr")
    ]
    shown = "".join(odd.texts)
    assert "\x1b" not in shown
    page(found, {}, tiles(found, (text, text))).encode()  # is valid UTF-8


def test_the_same_report_gives_the_same_page() -> None:
    found = report()
    assert page(found, {"x": SVG}, tiles(found)) == page(found, {"x": SVG}, tiles(found))


def test_without_pictures_the_rest_is_there() -> None:
    html = page(report(), {}, None)
    assert "What is left" not in html
    assert "bat against the others" in html
