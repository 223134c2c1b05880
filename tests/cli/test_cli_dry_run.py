"""`compress --dry-run`: the figures by hand, that nothing is written, and that what would be refused is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outcome import FINETUNE, TINY, Run
from training_runs import CPU, model, setup, weights

from tokencut import cost
from tokencut.data.sources import Source
from tokencut.model import predicted_macs
from tokencut.training.recipe import SHORT
from tokencut.training.run import finetune, plan_finetune


@pytest.mark.slow
def test_a_fine_tune_is_told_and_nothing_is_written(run: Run, tmp_path: Path, train: Path, compressed: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = (
        "compress",
        compressed,
        *FINETUNE,
        "--train-data",
        train,
        "--tensorboard",
        tmp_path / "curves",
        "-o",
        output,
    )
    told = run(*words, "--dry-run", "--json").json
    plan = told["finetune"]
    # 3 classes of 8 images in batches of 4.
    assert (plan["images"], plan["held_out"], plan["epochs"], plan["updates"]) == (24, 0, 2, 12)
    costs = run("compress", compressed, "--keep", "0.5", "-o", tmp_path / "x.safetensors", "--json").json
    (tmp_path / "x.safetensors").unlink()
    assert plan["gmacs"] == pytest.approx(48 * (3 * costs["gmacs"] + costs["dense_gmacs"]))
    assert 0 < plan["seconds"] < 600
    assert told["writes"] == [
        str(output), str(tmp_path / "out.log.csv"), str(tmp_path / "curves" / "out"), f"{output}.resume",
    ]  # fmt: skip
    assert (told["dry_run"], told["search"]) == (True, None)
    done = run(*words, "--dry-run")
    assert "2 epochs, 12 updates, on 24 images" in done.out
    assert done.notes[-1] == "nothing was written; type the same command without --dry-run"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_is_told_and_nothing_is_written(run: Run, tmp_path: Path, train: Path) -> None:
    output = tmp_path / "out.safetensors"
    words = ("compress", *TINY, "--target-gmacs", "0.001", "--calibration", train, "--search-effort", "10", "-j", "0")
    told = run(*words, "-o", output, "--dry-run", "--json").json
    found = told["search"]
    assert (found["images"], found["effort"]) == (24, 10)
    dense = run("profile", *TINY, "--no-latency", "--dense", "--json").json["dense"]["gmacs"]
    assert found["gmacs"] == pytest.approx(240 * dense, rel=1e-3)
    assert found["seconds"] > 0
    assert told["writes"] == [str(output), str(tmp_path / "out.front.json")]
    assert told["finetune"] is None
    done = run(*words, "-o", output, "--dry-run", "--train-data", train, "-b", "4")
    assert "reduction    found by the search" in done.out
    assert "at most about" in done.out
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_refused_is_refused(run: Run, tmp_path: Path, compressed: Path) -> None:
    (tmp_path / "out.safetensors").write_text("mine")
    done = run("compress", compressed, "-o", tmp_path / "out.safetensors", "--dry-run")
    assert done.code == 1
    assert "exists; add --force" in done.err
    done = run("compress", compressed, "-o", tmp_path / "new.safetensors", "--dry-run")
    assert done.code == 0
    assert str(tmp_path / "new.safetensors") in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_plan_leaves_the_model_and_the_run_after_it_as_they_were(few: Source) -> None:
    recipe = SHORT.changed(epochs=1)
    planned, plain = model(), model()
    before, states = weights(planned), torch.get_rng_state()
    plan = plan_finetune(planned, few, recipe=recipe, setup=setup(), group=CPU)
    assert all(torch.equal(value, before[name]) for name, value in weights(planned).items())
    assert torch.equal(states, torch.get_rng_state())
    assert (plan.images, plan.updates) == (40, 5)
    macs = 3 * cost.total(predicted_macs(planned)) + cost.total(predicted_macs(planned.model))
    assert plan.gmacs == pytest.approx(40 * macs / 1e9)
    for one in (planned, plain):
        finetune(one, few, recipe=recipe, setup=setup(), group=CPU)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(planned).items())
