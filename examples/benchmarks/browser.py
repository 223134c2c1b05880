"""Do exported files give torch's logits in a browser, and how fast? In headless Chromium, by onnxruntime-web (wasm).

    npm install --prefix web onnxruntime-web
    python examples/benchmarks/run.py browser local-dir:FOLDER --data val.tar --web web --methods bat tome topk

Every file is run on the same real images, one at a time and in turns with the dense one; by one thread, as on a page
that is served without special headers. `equal` says whether every logit is torch's to 1e-4 and every class the same.
examples/browser/index.html is run too, with the first method: it has to draw as many tokens as the recipe says.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from options import IMAGES
from PIL import Image
from tables import markdown
from torch import nn

from tokencut.data.image_set import images_for
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError
from tokencut.export.run import export_model
from tokencut.messages import one_line
from tokencut.model import CompressedModel, compress, predicted_gmacs
from tokencut.models.loading import load_model
from tokencut.runtime.compiling import in_batches
from tokencut.runtime.devices import describe_device

PAGE = Path(__file__).resolve().parents[1] / "browser"
TOLERANCE = 1e-4
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
# Runs every file on every image in turns, then the page on a photo; what it found goes back to the server.
RUNNER = """<!doctype html><iframe src="index.html"></iframe><script>
addEventListener("load", async () => {
  const found = {};
  try {
    const inside = document.querySelector("iframe").contentWindow;
    await inside.page.ready;
    const told = await (await fetch("told.json")).json();
    const values = new inside.Float32Array(await (await fetch("images.bin")).arrayBuffer());
    const size = values.length / told.images, sessions = {};
    for (const name of told.files) sessions[name] = await inside.ort.InferenceSession.create(name + ".onnx");
    found.files = Object.fromEntries(told.files.map((name) => [name, { logits: [], milliseconds: [] }]));
    for (let image = 0; image < told.images; image++) {
      const images = new inside.ort.Tensor("float32", values.slice(image * size, (image + 1) * size), told.shape);
      for (const name of told.files) {
        const start = performance.now();
        const { logits } = await sessions[name].run({ images });
        found.files[name].milliseconds.push(performance.now() - start);
        found.files[name].logits.push(Array.from(logits.data));
      }
    }
    const photo = await createImageBitmap(await (await fetch("photo.png")).blob());
    const { dense, compressed } = await inside.page.look(photo);
    found.page = {
      milliseconds: [dense.milliseconds, compressed.milliseconds],
      captions: [...inside.document.querySelectorAll("figcaption")].map((caption) => caption.textContent),
      rows: inside.document.querySelectorAll("#results tbody tr").length,
    };
  } catch (error) {
    found.error = String(error);
  }
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
});
</script>"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as every tokencut command takes it: a timm name, local-dir:FOLDER, digits")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, where only times matter")
    parser.add_argument("--data", required=True, help=IMAGES)
    parser.add_argument("--limit", type=int, default=32, help="an evenly spread sample of so many")
    parser.add_argument("--methods", nargs="+", default=["bat", "tome", "topk"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--opset", type=int, help="of the .onnx files")
    parser.add_argument("--web", type=Path, required=True, help="where npm installed onnxruntime-web")
    parser.add_argument("--browser", help="Chromium or Chrome; looked for where left out")
    parser.add_argument("--seconds", type=float, default=600, help="after so many the browser is ended")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file; on the screen alone where left out")
    return parser.parse_args()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page found."""

    def do_POST(self) -> None:
        """Keeps what the page sends, and says that it is there."""
        server: Any = self.server
        server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        server.done.set()

    def log_message(self, *_: object) -> None:
        """Nothing: requests are of no interest."""


def browsed(folder: Path, browser: str, seconds: float) -> dict[str, Any]:
    """What the runner found in a browser, which is ended then.

    Args:
        folder: What is served.
        browser: The program.
        seconds: How long it may take.

    Raises:
        TokencutError: It found nothing in time, or something failed on the page.
    """
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.found, server.done = None, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Root has no sandbox; a container's /dev/shm holds 64 MB.
    words = [browser, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words += [f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/runner.html"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            server.done.wait(seconds)
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
            server.server_close()
    if server.found is None:
        raise TokencutError(f"{browser} told nothing within {seconds:g} s; type more --seconds, or another --browser")
    if "error" in server.found:
        raise TokencutError(f"the page failed: {one_line(server.found['error'])}")
    found: dict[str, Any] = server.found
    return found


def prepare(folder: Path, models: dict[str, nn.Module], images: torch.Tensor, args: argparse.Namespace) -> None:
    """Writes all that is served: the page and its files, one file a model, the images, the runtime."""
    sys.path.insert(0, str(PAGE))
    import make

    first = next(model for model in models.values() if isinstance(model, CompressedModel))
    make.make(first, folder)
    shutil.copy(PAGE / "index.html", folder)
    (folder / "node_modules").symlink_to((args.web / "node_modules").resolve())
    for name, model in models.items():
        export_model(model, folder / f"{file_of(name)}.onnx", limit=2, batch_size=2, opset=args.opset)
    (folder / "images.bin").write_bytes(images.contiguous().numpy().tobytes())
    told = {"images": len(images), "shape": [1, *images.shape[1:]], "files": [file_of(name) for name in models]}
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "runner.html").write_text(RUNNER, encoding="utf-8")


def file_of(name: str) -> str:
    """What a model's file is called."""
    return f"file-{name.replace(' ', '-')}"


@torch.no_grad()
def main() -> None:
    """Writes the files, has them run, and prints the table."""
    args = parse()
    browser = args.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("error: no Chromium and no Chrome is found; install one, or name it by --browser")
    if not (args.web / "node_modules/onnxruntime-web").is_dir():
        sys.exit(f"error: {args.web} holds no onnxruntime-web; type npm install --prefix {args.web} onnxruntime-web")
    dense = load_model(args.model, pretrained=not args.no_pretrained).dense.eval()
    chosen = images_for(dense, open_source(args.data), limit=args.limit)
    decoded = [batch.images for batch in chosen.decoded(32, workers=0, otherwise="name other images") if len(batch)]
    pixels = torch.cat(decoded)
    images = chosen.prepared.normalise(pixels, torch.device("cpu"))
    models: dict[str, nn.Module] = {"dense": dense}
    models |= {f"{name} {args.keep:g}": compress(dense, keep=args.keep, method=name).eval() for name in args.methods}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, models, images, args)
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / "photo.png")
        found = browsed(folder, browser, args.seconds)
    rows, before = [], statistics.median(found["files"][file_of("dense")]["milliseconds"][1:])
    for name, model in models.items():
        told = found["files"][file_of(name)]
        logits, expected = torch.tensor(told["logits"]), in_batches(model, images, 1)
        difference = float((logits - expected).abs().max())
        same = 100 * float((logits.argmax(1) == expected.argmax(1)).float().mean())
        took = statistics.median(told["milliseconds"][1:])  # the first one prepares
        ratio = predicted_gmacs(dense) / predicted_gmacs(model)
        equal = "yes" if difference <= TOLERANCE and same == 100 else "no"
        rows.append([name, f"{difference:.1e}", f"{same:.1f}", equal, f"{took:.1f}", f"{before / took:.2f}",
                     f"{before / took / ratio:.2f}"])  # fmt: skip
    _check_page(found["page"], next(model for model in models.values() if isinstance(model, CompressedModel)))
    version = json.loads((args.web / "node_modules/onnxruntime-web/package.json").read_text(encoding="utf-8"))[
        "version"
    ]
    program = subprocess.run([browser, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    about = f"{args.model}, onnxruntime-web {version}, {program}, {describe_device(torch.device('cpu'))}, " \
            f"{len(images)} images, {time.strftime('%Y-%m-%d')}"  # fmt: skip
    head = ("model", "largest difference", "same class, %", "equal", "ms an image", "speed-up", "kept")
    times = " and ".join(f"{value:.1f}" for value in found["page"]["milliseconds"])
    text = f"{about}\n\n{markdown(head, rows)}\n\nThe page: {times} ms, dense and compressed.\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


def _check_page(page: dict[str, Any], model: CompressedModel) -> None:
    """Refuses a page that shows other things than it should.

    Raises:
        TokencutError: With what it shows.
    """
    wanted = [f"behind block {stage.block}: {stage.tokens_out} tokens" for stage in model.recipe.stages]
    if page["captions"][1:] != wanted or page["rows"] != 2:
        raise TokencutError(f"the page shows {page}, expected {wanted} under two rows")


if __name__ == "__main__":
    main()
