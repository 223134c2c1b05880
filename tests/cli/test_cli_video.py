"""The commands on models of clips and on video files."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import Run
from video_files import tiny_videomae, write_videos

import tokencut


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "clips", {"a": [8, 8], "b": [8]})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tokencut.save(tokencut.compress(tiny_videomae(), keep=0.5, layers=[1, 2]), tmp_path / "out.safetensors")
    return tmp_path / "out.safetensors"


@pytest.mark.slow
def test_eval_predict_and_visualize(run: Run, file: Path, clips: Path, tmp_path: Path) -> None:
    done = run("eval", file, "--data", clips, "--frame-stride", "2", "--views", "2", "-j", "0", "--json")
    assert (done.code, done.json["images"]) == (0, 3)
    assert not [note for note in done.json["notes"] if "short" in note]
    assert done.json["gmacs"] == run("profile", file, "--no-latency", "--json").json["compressed"]["gmacs"]
    done = run("predict", file, clips / "a" / "1.mp4", "--frame-stride", "2", "-j", "0", "--json")
    assert done.code == 0 and len(done.json["predictions"]) == 1
    picture = tmp_path / "tokens.png"
    done = run("visualize", file, clips / "a" / "1.mp4", "--frame-stride", "2", "-o", picture, "--json")
    assert done.code == 0 and picture.exists()
    assert [stage["tokens_out"] for stage in done.json["rows"][0]["stages"]] == [4, 2]


@pytest.mark.slow
def test_a_model_of_images_on_frames(run: Run, compressed: Path, clips: Path) -> None:
    """Whose classes are three."""
    for number in (1, 2):
        (clips / "c").mkdir(exist_ok=True)
        (clips / "c" / f"{number}.mp4").write_bytes((clips / "a" / f"{number}.mp4").read_bytes())
    cost = run("profile", compressed, "--no-latency", "--json").json["compressed"]["gmacs"]
    done = run("eval", compressed, "--data", clips, "--frames", "4", "--frame-stride", "2", "-j", "0", "--json")
    assert (done.code, done.json["images"], done.json["keep"]) == (0, 5, 0.5)
    assert done.json["gmacs"] == pytest.approx(4 * cost)
    done = run("eval", compressed, "--data", clips, "-j", "0")
    assert done.code == 1 and "eval and predict have one of images see frames by --frames 8" in done.err
    done = run("predict", compressed, clips / "a" / "1.mp4", "--frames", "4", "-j", "0", "--json")
    assert done.code == 0 and len(done.json["predictions"]) == 1
    done = run("profile", compressed, "--frames", "3", "--no-latency", "--by-block", "--json")
    assert done.json["compressed"]["gmacs"] == pytest.approx(3 * cost) and done.json["notes"] == []
    assert sum(row["macs"] for row in done.json["blocks"]) == pytest.approx(3e9 * cost)


@pytest.mark.slow
def test_static_tubelets_are_left_out(run: Run, file: Path, clips: Path, tmp_path: Path) -> None:
    done = run("eval", file, "--data", clips, "--static-keep", "0.75", "--keep", "0.5", "--layers", "2", "-j", "0",
               "--json")  # fmt: skip
    assert (done.code, done.json["static_keep"], done.json["keep"]) == (0, 0.75, 0.5)
    out = tmp_path / "static.safetensors"
    small = ("--model-kwargs", "img_size=16,patch_size=8,num_frames=4,embed_dim=16,depth=2,num_heads=2")
    made = run("compress", "videomae_small_patch16_224", "--no-pretrained", *small, "--static-keep", "0.75", "-o", out)
    assert made.code == 0
    assert "static keep             0.75" in run("info", out).out
    profiled = run("profile", out, "--no-latency", "--json").json
    assert profiled["stages"][0] == {"block": 0, "tokens_in": 8, "tokens_out": 6} and profiled["notes"] == []


def test_what_does_not_go_together(run: Run, file: Path, clips: Path, pictures: Path) -> None:
    done = run("eval", file, "--data", pictures, "-j", "0")
    assert done.code == 1 and "holds images, and the model takes clips of 4 frames" in done.err
    done = run("eval", file, "--data", pictures, "--frame-stride", "2", "-j", "0")
    assert done.code == 2 and "--frame-stride says how clips are taken from videos" in done.err
    done = run("profile", file, "--frames", "4", "--no-latency")
    assert done.code == 2 and "this model takes clips of 4 frames by itself; leave --frames out" in done.err
    done = run("profile", "test_vit", "--static-keep", "0.5", "--no-latency")
    assert done.code == 2 and "--static-keep is for models of clips" in done.err
    done = run("profile", file, "--static-keep", "0.5", "--target-gmacs", "1", "--calibration", clips)
    assert done.code == 2 and "--target-gmacs finds a schedule for all tubelets, and --static-keep" in done.err
    done = run("eval", file, "--data", clips, "--views", "0")
    assert done.code == 2 and "0 is not a whole number from 1 to 100" in done.err
