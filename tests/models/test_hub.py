"""The hub: asked once and in time, or not at all. Here it is a local server, or an address where nobody answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from model_files import random_weights, same_weights, write_model_folder, write_transformers_folder
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from tokencut.errors import ModelError
from tokencut.models import hub
from tokencut.models.loading import load_model
from tokencut.models.metadata import Origin
from tokencut.models.names import list_supported

NAME, REPOSITORY = "test_vit.r160_in1k", "timm/test_vit.r160_in1k"
OTHER_WAYS = "give `checkpoint='FILE'`, `pretrained=False` for random weights, or the bundled model 'digits'"


def refusal(spec: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's caches; the hub's address is one where nobody listens."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder / "torch"))
    set_hub(monkeypatch, "http://127.0.0.1:9")
    return folder


def set_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture
def folder(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "saved", weights)


class FakeHub(BaseHTTPRequestHandler):
    """Serves one repository's files as the hub does, or a status alone."""

    files: dict[str, bytes] = {}
    status = 200
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path.removeprefix(f"/{REPOSITORY}/resolve/main/"))
        status = self.status if content is not None or self.status != 200 else 404
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "abcd")
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keeps the test's stderr clean."""


@pytest.fixture
def fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    served = type("Served", (FakeHub,), {"asked": [], "files": {p.name: p.read_bytes() for p in folder.iterdir()}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    set_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


def test_a_hub_that_nobody_answers_for_fails_at_once() -> None:
    start = time.monotonic()
    message = refusal("deit_tiny")
    assert time.monotonic() - start < 5
    assert message.startswith(
        "the weights of deit_tiny_patch16_224 are not in the cache, and 127.0.0.1:9 does not answer ("
    )
    assert message.endswith(f"; {OTHER_WAYS}")


def test_a_hub_that_takes_the_call_and_says_nothing_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        start = time.monotonic()
        assert "does not answer (" in refusal(f"hf-hub:{REPOSITORY}")
        assert time.monotonic() - start < 2


def test_a_proxy_that_refuses_is_told_of_and_not_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(OSError):
        """As httpx and requests call it."""

    class Refused:
        def head(self, *_: Any, **__: Any) -> None:
            raise ProxyError("404 Not Found")

    monkeypatch.setattr(hub, "get_session", Refused)
    assert "and the proxy on the way to 127.0.0.1:9 answers (404 Not Found); " in refusal("deit_tiny")


def test_a_name_look_up_that_hangs_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Hanging:
        def head(self, *_: Any, **__: Any) -> None:
            released.wait(10)
            raise OSError("too late")

    monkeypatch.setattr(hub, "get_session", Hanging)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    assert "127.0.0.1:9 does not answer (nothing within 0.2 s)" in refusal("deit_tiny")
    released.set()


def test_offline_by_the_user_asks_nobody(fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for spec in ("test_vit", f"hf-hub:{REPOSITORY}"):
        assert "is not asked, as HF_HUB_OFFLINE is set; give `checkpoint='FILE'`" in refusal(spec)
    assert fake_hub.asked == []


def test_a_hub_out_of_order_is_named_with_its_status(fake_hub: type[FakeHub]) -> None:
    fake_hub.status = 503
    assert f"answers with status 503; {OTHER_WAYS}" in refusal("test_vit")
    assert len(fake_hub.asked) == 1


@pytest.mark.parametrize("spec", ["test_vit", f"hf-hub:{REPOSITORY}"])
def test_an_answering_hub_is_downloaded_from_and_then_not_asked_again(
    spec: str, fake_hub: type[FakeHub], weights: dict[str, Tensor]
) -> None:
    loaded = load_model(spec)
    assert same_weights(loaded.model, weights)
    assert loaded.origin.kind == "hub"
    assert loaded.origin.name == REPOSITORY
    assert loaded.name == (NAME if spec == "test_vit" else spec)
    assert any(line.startswith("GET") for line in fake_hub.asked)
    fake_hub.asked.clear()
    again = load_model(spec)
    assert same_weights(again.model, weights)
    assert again.origin == loaded.origin
    assert fake_hub.asked == []
    assert str(constants.HF_HUB_CACHE) not in str(again.model.pretrained_cfg)


def test_where_weights_do_not_matter_nobody_is_asked(fake_hub: type[FakeHub]) -> None:
    assert load_model("test_vit", weights_needed=False).origin.kind == "random"
    assert load_model(f"hf-hub:{REPOSITORY}", weights_needed=False).name == "test_vit"
    message = refusal("hf-hub:someone/model", weights_needed=False)
    assert "hf-hub:someone/model is not in the cache, and where weights do not matter nothing is downloaded" in message
    assert fake_hub.asked == []


def test_a_repository_without_what_is_needed(fake_hub: type[FakeHub], weights: dict[str, Tensor]) -> None:
    content = fake_hub.files.pop("model.safetensors")
    spec = f"hf-hub:{REPOSITORY}"
    assert f"the hub's repository {REPOSITORY} has none of model.safetensors, " in refusal(spec)
    assert "the weights of test_vit could not be downloaded (" in refusal("test_vit")
    assert load_model(spec, pretrained=False).origin.kind == "random"
    del fake_hub.files["config.json"]
    fake_hub.files["model.safetensors"] = content
    assert "could not be downloaded (" in refusal("hf-hub:timm/other")


def test_a_damaged_file_in_the_cache_is_named(fake_hub: type[FakeHub]) -> None:
    fake_hub.files["model.safetensors"] = fake_hub.files["model.safetensors"][:-9]
    assert "the weights of test_vit could not be downloaded (" in refusal("test_vit")
    message = refusal("test_vit")
    assert message.startswith("cannot load test_vit from the cache (")
    assert message.endswith("model.safetensors")


def test_weights_that_have_an_address_only(
    weights: dict[str, Tensor], empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_pretrained_cfg(NAME)
    cfg.hf_hub_id, cfg.url = None, "http://127.0.0.1:9/files/vit-ab12.pth"
    monkeypatch.setattr("tokencut.models.opening.get_pretrained_cfg", lambda _: cfg)
    assert "the weights of test_vit are not in the cache, and 127.0.0.1:9 does not answer (" in refusal("test_vit")
    (empty_caches / "torch" / "checkpoints").mkdir(parents=True)
    torch.save(weights, empty_caches / "torch" / "checkpoints" / "vit-ab12.pth")
    loaded = load_model("test_vit")
    assert same_weights(loaded.model, weights)
    assert (loaded.origin.kind, loaded.origin.name) == ("url", cfg.url)


def test_a_model_that_timm_has_no_weights_for() -> None:
    name = next(model.name for model in list_supported() if not model.tags)
    assert refusal(name) == f"timm has no weights for {name}; {OTHER_WAYS}"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_repository_of_transformers(sharded: bool, fake_hub: type[FakeHub], tmp_path: Path) -> None:
    model, _ = write_transformers_folder(tmp_path / "transformers")
    (tmp_path / "transformers" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "size": 32}')
    if sharded:
        tensors = load_file(tmp_path / "transformers" / "model.safetensors")
        names = {name: f"model-{name.count('weight')}.safetensors" for name in tensors}
        for part in set(names.values()):
            chosen = {name: tensor for name, tensor in tensors.items() if names[name] == part}
            save_file(chosen, tmp_path / "transformers" / part)
        (tmp_path / "transformers" / "model.safetensors").unlink()
        (tmp_path / "transformers" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    fake_hub.files = {path.name: path.read_bytes() for path in (tmp_path / "transformers").iterdir()}
    spec = f"hf-hub:{REPOSITORY}"
    loaded = load_model(spec)
    assert same_weights(loaded.model, dict(model.state_dict()))
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert (loaded.name, loaded.origin) == (spec, Origin("hub", REPOSITORY))
    fake_hub.asked.clear()
    assert same_weights(load_model(spec).model, dict(model.state_dict()))
    assert load_model(spec, weights_needed=False).model.num_classes == 3
    assert fake_hub.asked == []
