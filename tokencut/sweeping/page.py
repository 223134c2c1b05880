"""A sweep's report as one page for a browser: tables, plots, and pictures of tokens with a slider over keep rates.

The page holds all that it shows and loads nothing; without scripts it shows the pictures of all keep rates at once.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from tokencut.evaluation.statistics import Difference
from tokencut.messages import printable
from tokencut.sweeping.report import TIMING, SweepReport, comparison_table, facts_of, result_table
from tokencut.sweeping.rows import DENSE, Keep, keep_text, mean_keep, pair_name
from tokencut.visualization.regions import Pixels
from tokencut.visualization.tiles import Tile, Tiles

PICTURED = "Tokens behind the last block that reduces. The images are evenly spread over those that were judged."
ASSETS = Path(__file__).resolve().parents[1] / "assets"
LEGEND = (
    "Differences are points of top-1, paired over the images, ± one standard error, as the bars in the plots are. "
    "Those in brackets may be chance: they are within two standard errors of none."
)
# By which a later sweep knows the page for one of ours.
GENERATOR = '<meta name="generator" content="tokencut">'
# Of WebP: borders stay sharp.
QUALITY = 82
# The plots' second form, for screens narrower than this, in px.
NARROW = 600


def page(report: SweepReport, plots: Mapping[str, tuple[str, str]], tiles: Tiles | None) -> str:
    """The page; the same report gives the same text.

    Args:
        report: What the sweep found.
        plots: What each plot shows, and the plot as SVG: for wide and for narrow screens.
        tiles: What is left of a few images in each row, by `pair_name`; None for no pictures.
    """
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("sweep.css", "sweep.js"))
    title = f"{report.model}: top-1 against cost"
    parts = [f"<h1>{_text(title)}</h1>", f"<p>{_text(facts_of(report))}</p>"]
    parts += [f'<p class="note">{_text(note)}</p>' for note in report.notes]
    parts += ["<h2>Accuracy and cost</h2>", _table(*result_table(report, _brief), names=2, caption="Accuracy and cost")]
    parts += [f"<p>{LEGEND}</p>"]
    if report.timed:
        parts.append(f"<p>{_text(TIMING.format(batch_size=report.batch_size))}</p>")
    parts += [_plot(name, *forms) for name, forms in plots.items()]
    if report.comparisons:
        heading = f"{report.comparisons[0].first} against the others"
        parts += [
            f"<h2>{_text(heading)}</h2>",
            _table(*comparison_table(report.comparisons, _brief), names=1, caption=heading),
        ]
        parts.append(f"<p>Positive where {_text(report.comparisons[0].first)} is ahead.</p>")
    if tiles is not None:
        parts += _pictures(report, tiles)
    parts.append(f"<footer>Made by tokencut {_text(report.versions.get('tokencut', ''))}.</footer>")
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', GENERATOR,
        f"<title>{_text(title)}</title>", f"<style>{style}</style>", "</head>", "<body>", "<main>", *parts, "</main>",
        f"<script>{script}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _text(text: str) -> str:
    """A text that came from anywhere, as text of the page and nothing else."""
    return escape(printable(text), quote=True)


def _digest(text: str) -> str:
    """By which a browser runs our own script and style, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _table(head: Sequence[str], body: Sequence[Sequence[str]], *, names: int, caption: str) -> str:
    """A table that scrolls sideways by itself where the screen is narrow; its first columns are names."""
    kinds = ["name" if column < names else "number" for column in range(len(head))]
    cells = zip(kinds, head, strict=True)
    heads = "".join(f'<th scope="col" class="{kind}">{_text(cell)}</th>' for kind, cell in cells)
    lines = [f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">', "<table>",
             f"<thead><tr>{heads}</tr></thead>", "<tbody>"]  # fmt: skip
    for row in body:
        first, *others = zip(kinds, map(_cell, row), strict=True)
        rest = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in others)
        lines.append(f'<tr><th scope="row" class="{first[0]}">{first[1]}</th>{rest}</tr>')
    return "\n".join([*lines, "</tbody>", "</table>", "</div>"])


def _brief(difference: Difference) -> str:
    return str(difference) if difference.is_clear else f"({difference})"


def _cell(text: str) -> str:
    """A cell, in which a line may break between settings of a method, and not within a difference and its error."""
    return _text(text).replace(":", ":<wbr>").replace(" \N{PLUS-MINUS SIGN} ", "&nbsp;\N{PLUS-MINUS SIGN}&nbsp;")


def _plot(name: str, wide: str, narrow: str) -> str:
    # As images of their own: two SVGs within one page would share the names of their parts.
    small, large = (f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" for svg in (narrow, wide))
    return (
        f'<figure class="plot"><picture><source media="(max-width: {NARROW}px)" srcset="{small}">'
        f'<img src="{large}" alt="Plot of {_text(name)}; the table above has its figures."></picture></figure>'
    )


def _pictures(report: SweepReport, tiles: Tiles) -> list[str]:
    methods = list(dict.fromkeys(row.method for row in report.rows if row.method != DENSE))
    keeps = sorted(dict.fromkeys(row.keep for row in report.rows if row.method != DENSE), key=mean_keep, reverse=True)
    parts = ["<h2>What is left of an image</h2>", f"<p>{PICTURED}</p>"]
    parts.append(_legend(tiles))
    if len(keeps) > 1:
        parts.append(_slider(keeps))
    for number, name in enumerate(tiles.names):
        heading = f"image-{number + 1}"
        parts += [f'<section aria-labelledby="{heading}">', f'<h3 id="{heading}">{_text(name)}</h3>']
        parts.append('<div class="tiles">')
        photo = f"{tiles.models[pair_name(methods[0], keeps[0])][number].tokens_in} patches"
        parts.append(_figure(tiles.photos[number], f"{name}: the image", "image", photo))
        for method in methods:
            shown = [tiles.models[pair_name(method, keep)][number] for keep in keeps]
            parts.append(_method(method, name, keeps, shown))
        parts += ["</div>", "</section>"]
    return parts


def _slider(keeps: Sequence[Keep]) -> str:
    """The slider, which the script shows; it starts where least is left, since there methods differ most."""
    last = len(keeps) - 1
    marks = "".join(f"<span>{_text(keep_text(keep))}</span>" for keep in keeps)
    return (
        f'<div class="slider" id="slider" data-keeps="{_text(",".join(keep_text(keep) for keep in keeps))}" hidden>'
        f'<label for="keep">Keep rate: <output id="shown" for="keep">{_text(keep_text(keeps[last]))}</output></label>'
        f'<input type="range" id="keep" min="0" max="{last}" step="1" value="{last}" autocomplete="off">'
        f'<div class="marks" aria-hidden="true">{marks}</div></div>'
    )


def _method(method: str, image: str, keeps: Sequence[Keep], shown: Sequence[Tile]) -> str:
    pictures = []
    for place, (keep, tile) in enumerate(zip(keeps, shown, strict=True)):
        left = f"{tile.tokens_out} of {tile.tokens_in} tokens"
        alt = f"{image}: what {method} leaves at keep {keep_text(keep)}"
        pictures.append(
            f'<div data-keep="{place}"><img src="{_webp(tile.pixels)}" alt="{_text(alt)}" {_size(tile.pixels)}>'
            f'<span class="kept">keep {_text(keep_text(keep))}: </span>{left}</div>'
        )
    return f"<figure><figcaption>{_cell(method)}</figcaption>{''.join(pictures)}</figure>"


def _figure(pixels: Pixels, alt: str, caption: str, below: str) -> str:
    return (
        f'<figure><figcaption>{_text(caption)}</figcaption><img src="{_webp(pixels)}" alt="{_text(alt)}" '
        f"{_size(pixels)}>{_text(below)}</figure>"
    )


def _legend(tiles: Tiles) -> str:
    samples = "".join(
        f'<li><img src="{_webp(panel.pixels)}" alt="" {_size(panel.pixels)}>{_text(panel.caption)}</li>'
        for panel in tiles.legend
    )
    return f'<ul class="legend">{samples}</ul>'


def _size(pixels: Pixels) -> str:
    return f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'


def _webp(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
