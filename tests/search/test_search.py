"""Finding a schedule for a target, on a small model with random weights: what is promised of any model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import Seen
from search_models import calibration, small_model

from tokencut import compress
from tokencut.cost import total
from tokencut.errors import TokencutError, UsageError
from tokencut.evaluation.statistics import mean_and_error
from tokencut.model import predicted_macs
from tokencut.observers import Observer
from tokencut.profiling.latency import Timing
from tokencut.runtime.devices import versions
from tokencut.search import run as search
from tokencut.search import timing
from tokencut.search.latency_table import BlockTimes, LatencyTable
from tokencut.search.probe import Probe
from tokencut.search.run import SearchReport, SearchSettings, find_schedule, memorisation_note
from tokencut.search.targets import Target
from tokencut.search.timing import Measured

__all__ = ["calibration"]

SETTINGS = SearchSettings(images=12, effort=8, batch_size=4, workers=0, device="cpu")


def find(where: Path | str, target: Target, **options: Any) -> SearchReport:
    return find_schedule(options.pop("model", None) or small_model(), str(where), target,
                         **{"settings": SETTINGS, **options})  # fmt: skip


def dense_gmacs() -> float:
    return total(predicted_macs(compress(small_model(), keep=1.0))) / 1e9


def test_multiply_adds_are_held(calibration: Path) -> None:
    target = 0.6 * dense_gmacs()
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = find(calibration, Target(gmacs=target), model=model)
    made = compress(small_model(), keep=report.found.keep, layers=report.found.layers)
    assert total(predicted_macs(made)) / 1e9 == report.found.gmacs
    assert 0.95 * target < report.found.gmacs <= target
    assert report.found.divergence == min(point.divergence for point in report.front if point.gmacs <= target)
    assert report.metric == "top1"
    assert report.images == 12
    assert report.dense_gmacs == dense_gmacs()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_on_the_front_more_multiply_adds_always_do_less_damage(calibration: Path) -> None:
    # A head of zeros: no schedule does any damage, so that one of all is enough, the cheapest.
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    report = find(calibration, Target(gmacs=0.6 * dense_gmacs()), model=model)
    assert report.tried > 1
    assert [point.divergence for point in report.front] == [0.0]
    front = find(calibration, Target(gmacs=0.6 * dense_gmacs())).front
    assert (
        all(one.gmacs < more.gmacs and one.divergence > more.divergence for one, more in pairwise(front))
        and len(front) > 1
    )


def test_the_same_seed_finds_the_same(calibration: Path) -> None:
    first, second = (find(calibration, Target(gmacs=0.6 * dense_gmacs())) for _ in range(2))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    assert first.front == second.front


def test_it_is_as_good_as_fixed_stages_of_its_price(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[Probe] = []
    monkeypatch.setattr(search, "Probe", lambda *args, **more: probes.append(Probe(*args, **more)) or probes[0])
    model = compress(small_model(), keep=0.5)
    gmacs = total(predicted_macs(model)) / 1e9
    report = find(calibration, Target(gmacs=gmacs))
    assert [(stage.block, stage.tokens_out) for stage in model.recipe.stages] == [(2, 8), (4, 4), (5, 2)]
    fixed = probes[0].measure((16, 8, 8, 4, 2, 2))
    assert fixed is not None and report.found.divergence <= fixed.mean
    assert len({point.gmacs for point in report.front}) > 1  # there are others to choose


def test_only_the_layers_named_reduce(calibration: Path) -> None:
    report = find(calibration, Target(gmacs=0.8 * dense_gmacs()), layers=[3, 5])
    assert set(report.found.layers) <= {3, 5}


def test_a_drop_is_held_with_its_error(calibration: Path) -> None:
    report = find(calibration, Target(max_drop=60.0))
    assert report.sure_drop <= 60
    assert report.expected_drop <= report.sure_drop
    assert report.found.gmacs < report.dense_gmacs


def test_a_generous_drop_goes_on_down(calibration: Path) -> None:
    # No schedule can lose more than 100 points, so that the cheapest are within; nothing may stop half way.
    dense, least = dense_gmacs(), 1e-9 * total(predicted_macs(compress(small_model(), keep=0.01, layers="all")))
    report = find(calibration, Target(max_drop=100.0))
    assert report.found.gmacs < least + 0.3 * (dense - least)


def test_labels_that_do_not_map_leave_agreement(calibration: Path) -> None:
    report = find(calibration, Target(max_drop=80.0), model=small_model(num_classes=5))
    assert report.metric == "agreement"
    assert report.dense_top1 is None
    assert report.found.top1 is None
    assert "calibration labels are not used: 3 class folders for the model's 5 classes" in report.notes[0]


def test_a_model_that_answers_the_same_to_everything_can_lose_nothing(calibration: Path) -> None:
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    report = find(calibration, Target(max_drop=1.0), model=model)
    assert report.drop == 0
    assert report.found.gmacs < 0.7 * report.dense_gmacs


def test_a_model_without_a_head_is_compared_by_features(calibration: Path) -> None:
    report = find(calibration, Target(max_drop=5.0), model=small_model(num_classes=0))
    assert report.metric == "cosine"
    assert report.found.cosine == pytest.approx(100 - report.drop)
    assert report.drop <= 5


def test_an_impossible_drop_says_what_can_be_had(calibration: Path) -> None:
    with pytest.raises(
        TokencutError, match=r"^`max_drop=1e-09` cannot be met: \S+ is the least .* type `max_drop=\S+`, "
    ):
        find(calibration, Target(max_drop=1e-9))


def test_stages_that_save_nothing_are_told_of(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.Costs, "gmacs", lambda self, counts: 2 - sum(counts) / 1000)
    with pytest.raises(
        TokencutError, match=r"^`max_drop=5` cannot be met cheaper than by the dense model, .*`layers='all'`"
    ):
        find(calibration, Target(max_drop=5))


def test_labels_that_tell_of_more_are_told_of() -> None:
    # Five of ten images lost: 50 points, with an error of 100 * sqrt(0.25 * 10 / 9 / 10) = 16.67.
    half = mean_and_error([100.0, 0.0] * 5)
    [note] = memorisation_note(*half, sure=16)
    assert note.startswith(
        "calibration labels tell of 50.00 ± 16.67 points lost where 16.00 are expected on other images"
    )
    assert memorisation_note(*half, sure=17) == ()
    assert memorisation_note(*mean_and_error([100.0]), sure=0) == ()  # one image tells of no other


def test_one_image_tells_no_drop_but_finds_a_budget(calibration: Path) -> None:
    one = replace(SETTINGS, images=1)
    with pytest.raises(TokencutError, match=r"^`max_drop=5` cannot be told from a single image"):
        find(calibration, Target(max_drop=5), settings=one)
    report = find(calibration, Target(gmacs=0.7 * dense_gmacs()), settings=one)
    assert (report.images, report.drop_error) == (1, math.inf)
    assert (report.to_dict()["drop_error"], report.to_dict()["sure_drop"]) == (None, None)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_drop_is_sought_among_late_blocks_too(calibration: Path) -> None:
    report = find(calibration, Target(max_drop=60.0), layers=[5, 6])
    assert set(report.found.layers) <= {5, 6}
    assert report.found.gmacs < report.dense_gmacs


def test_too_few_multiply_adds_say_what_can_be_had(calibration: Path) -> None:
    with pytest.raises(TokencutError, match=r"cannot be met: (\S+) GMACs is the least .* type `gmacs=(\S+)`$") as told:
        find(calibration, Target(gmacs=1e-6))
    offered = float(str(told.value).rpartition("=")[2].rstrip("`"))
    assert find(calibration, Target(gmacs=offered)).found.gmacs <= offered


def test_what_the_dense_model_meets_is_said(calibration: Path) -> None:
    with pytest.raises(TokencutError, match=r"^`gmacs=9` is met by the dense model, which has .* type less"):
        find(calibration, Target(gmacs=9))


# Times that can be foretold by hand: a token costs 1 ms a block, a stage and the ends nothing.
COUNTS = (1, 16)
BLOCK = BlockTimes(block=(0.001, 0.016), staged=(0.0005, 0.008), mlp_half=(0.0005, 0.008), fresh=0.016)
TABLE = LatencyTable(COUNTS, (BLOCK,) * 6, 0.0)


def dearer(stage: float) -> LatencyTable:
    """The same where a stage takes so many seconds."""
    return replace(TABLE, blocks=(replace(BLOCK, staged=(0.0005 + stage, 0.008 + stage)),) * 6)


def test_a_table_adds_up() -> None:
    assert TABLE.dense == pytest.approx(0.096)
    # 16 in, 8 out of block 2: half of 16 and half of 8 ms, then 4 blocks of 8 ms.
    assert TABLE.seconds((16, 8, 8, 8, 8, 8)) == pytest.approx(0.016 + 0.012 + 4 * 0.008)
    assert TABLE.speedup((16,) * 6) == 1


def timed_by_table(monkeypatch: pytest.MonkeyPatch, bias: float = 1.0, table: LatencyTable = TABLE) -> None:
    """A machine with such a table, on which every schedule is `bias` times as fast as that foretells."""
    monkeypatch.setattr(search, "latency_table", lambda *args, **kwargs: table)
    monkeypatch.setattr(
        search._Run,
        "_timed",
        lambda self, counts: Measured(1000 * table.dense, 1000 * table.seconds(counts) / bias),
    )


@pytest.mark.parametrize("bias", [1.0, 0.85, 1.2])
def test_a_speedup_is_met_when_measured(calibration: Path, monkeypatch: pytest.MonkeyPatch, bias: float) -> None:
    timed_by_table(monkeypatch, bias)
    report = find(calibration, Target(speedup=1.6))
    assert report.speedup == pytest.approx(1.6, rel=0.05)
    assert report.found.speedup == pytest.approx(1.6 / bias, rel=0.05)
    assert not any("instead of" in note for note in report.notes)


@pytest.mark.parametrize("bias", [1.0, 0.85])
def test_milliseconds_are_met_when_measured(calibration: Path, monkeypatch: pytest.MonkeyPatch, bias: float) -> None:
    timed_by_table(monkeypatch, bias)
    report = find(calibration, Target(latency_ms=60))
    assert report.clock is not None and report.clock.measured is not None
    assert report.clock.measured.found_ms == pytest.approx(60, rel=0.05)
    assert report.speedup == report.clock.measured.speedup == pytest.approx(1.6, rel=0.05)


@pytest.mark.slow
def test_the_same_table_finds_the_same(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by_table(monkeypatch)
    first, second = (find(calibration, Target(speedup=1.6)) for _ in range(2))
    assert (first.found, first.front) == (second.found, second.front)
    assert first.found == find(calibration, Target(latency_ms=60)).found  # 96 ms at 1.6 times the speed


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        (0.7, "measured 1.12 times as fast instead of 1.6: either this machine has other work, or stages take what"),
        (1.3, "measured 2.08 times as fast instead of 1.6, which loses more than there was need of"),
    ],
)
def test_a_machine_that_misses_it_is_told_of(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, reached: float, told: str
) -> None:
    timed_by_table(monkeypatch)
    timed: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        search._Run, "_timed", lambda self, counts: timed.append(counts) or Measured(1.6 * reached, 1.0)
    )
    report = find(calibration, Target(speedup=1.6))
    assert any(note.startswith(told) for note in report.notes)
    # A table is not so wrong: with what is measured the search goes no further than to 1.5 times as fast or slow.
    assert len(timed) > 1
    assert all(1.6 / 1.5 < TABLE.speedup(counts) < 1.25 * 1.6 * 1.5 for counts in timed)


def test_milliseconds_that_are_missed_are_told_of(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by_table(monkeypatch)
    monkeypatch.setattr(search._Run, "_timed", lambda self, counts: Measured(96.0, 80.0))
    notes = find(calibration, Target(latency_ms=60)).notes
    assert any(note.startswith("measured 80 ms a batch instead of 60: either") for note in notes)


def test_seconds_out_of_reach_say_what_can_be_had(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by_table(monkeypatch)
    # One token from the first stage on: 8 + 0.5 ms, then 5 blocks of 1 ms; 96 / 13.5 is 7.11.
    with pytest.raises(TokencutError, match=r"cannot be met: 7\.11 times as fast .* type `speedup=6\.76`$"):
        find(calibration, Target(speedup=20))
    with pytest.raises(
        TokencutError,
        match=r"^`latency_ms=2` cannot be met: 13\.5 ms a batch is the least \(dense 96 ms\) .* `latency_ms=14\.2`$",
    ):
        find(calibration, Target(latency_ms=2))


def test_milliseconds_that_the_dense_model_takes_are_told_of(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_by_table(monkeypatch)
    with pytest.raises(
        TokencutError, match=r"^`latency_ms=96` is met by the dense model, which takes 96 ms a .* `latency_ms=62\.4`$"
    ):
        find(calibration, Target(latency_ms=96))


@pytest.mark.parametrize("target", [Target(speedup=1.2), Target(latency_ms=80)])
def test_a_machine_on_which_nothing_is_faster(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    monkeypatch.setattr(search, "latency_table", lambda *args, **kwargs: dearer(1.0))
    with pytest.raises(TokencutError, match=r"cannot be met: .* reach here; type a larger `timing_batch_size`$"):
        find(calibration, target)


@pytest.mark.parametrize(("stage", "most"), [(0.0, 6), (0.012, 2), (0.020, 1)])
def test_there_are_no_more_stages_than_pay(
    calibration: Path, monkeypatch: pytest.MonkeyPatch, stage: float, most: int
) -> None:
    # Of 96 ms 64 may be left. Two stages of 12 ms leave 8 ms for what they are for, two of 20 nothing.
    timed_by_table(monkeypatch, table=dearer(stage))
    report = find(calibration, Target(speedup=1.5))
    assert 1 <= len(report.found.layers) <= most
    assert report.speedup == pytest.approx(1.5, rel=0.05)


def test_a_stage_that_gains_nothing_is_dropped(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A head of zeros: no schedule does any damage, so that one stage does as well as many.
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    timed_by_table(monkeypatch)
    assert len(find(calibration, Target(speedup=1.6), model=model).found.layers) == 1


@pytest.mark.slow
def test_tokens_leave_in_whole_steps(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by_table(monkeypatch, table=replace(TABLE, step=4))
    report = find(calibration, Target(speedup=1.6))
    assert {(point.tokens[block - 1] + 1) % 4 for point in report.front for block in point.layers} == {0}
    assert report.speedup == pytest.approx(1.6, rel=0.05)


@pytest.mark.slow
def test_seconds_are_those_of_the_form_asked_for(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_model(model: torch.nn.Module, mode: str) -> Any:
        compiled.append(f"{type(model).__name__} {mode}")
        return lambda images: model(images)

    def compile_calls(calls: dict[str, Any], mode: str, observer: Observer) -> dict[str, Any]:
        compiled.append(f"{len(calls)} parts {mode}")
        return calls

    def clock(models: dict[str, Any], images: torch.Tensor, **_: object) -> dict[str, Timing]:
        assert images.shape == (3, 3, 64, 64)
        took = {"dense": 96.0, "compressed": 60.0, "embed": 0.0, "head": 0.0}
        kinds = {"block": 1.0, "fresh": 1.0, "mlp_half": 0.5, "staged": 0.5}
        times = {name: took[name] if name in took else kinds[name.split()[0]] * float((name.split() + ["16"])[2])
                 for name in models}  # fmt: skip
        return {name: Timing(ms, (ms, ms), 1.0) for name, ms in times.items()}

    monkeypatch.setattr(timing, "measure", clock)
    monkeypatch.setattr(timing, "compile_model", compile_model)
    monkeypatch.setattr(timing, "compile_calls", compile_calls)
    settings = replace(SETTINGS, timing_batch_size=3, compile_mode="max-autotune")
    report = find(calibration, Target(latency_ms=60), settings=settings)
    assert compiled == [
        "VisionTransformer max-autotune", "15 parts max-autotune-no-cudagraphs", "CompressedModel max-autotune",
    ]  # fmt: skip
    told = report.to_dict()["clock"]
    assert (told["form"], told["batch_size"], told["precision"]) == ("compiled (max-autotune)", 3, "fp32")
    assert (told["dense_ms"], told["found_ms"], told["versions"]) == (96.0, 60.0, versions())
    assert told["table"]["kinds"][0]["block_ms"] == [2.0, 5.0, 10.0, 16.0]
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_cannot_be_captured_is_timed_as_it_is_and_told(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by_table(monkeypatch)
    report = find(calibration, Target(speedup=1.6), settings=replace(SETTINGS, capture=True))
    assert report.clock is not None and report.clock.conditions.form == "eager"
    assert "images on cpu are not captured: CUDA graphs need an NVIDIA GPU" in report.notes


def test_a_form_that_there_is_not_is_refused(calibration: Path) -> None:
    both = replace(SETTINGS, capture=True, compile_mode="default")
    with pytest.raises(UsageError, match="`capture` and `compile_mode` are two ways to run a model"):
        find(calibration, Target(speedup=1.6), settings=both)


def test_stopped_it_keeps_the_best_so_far(calibration: Path) -> None:
    target = 0.6 * dense_gmacs()
    report = find(calibration, Target(gmacs=target), observer=Seen(lambda seen: any(now.values for now in seen.told)))
    assert report.interrupted
    assert report.found.gmacs <= target
    assert report.front


def test_stopped_before_there_is_anything_it_is_an_interrupt(calibration: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        find(calibration, Target(gmacs=0.6 * dense_gmacs()), observer=Seen(lambda seen: True))


def test_progress_begins_while_parts_are_timed(calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*args: object, observer: Observer, **kwargs: object) -> LatencyTable:
        observer.progress("timing the model's parts", 1, 15, {})
        return TABLE

    timed_by_table(monkeypatch, 1.0)
    monkeypatch.setattr(search, "latency_table", timed)
    seen = Seen()
    find(calibration, Target(speedup=1.6), observer=seen)
    tasks = list(dict.fromkeys(now.task for now in seen.told))
    assert tasks == ["reading the images", "timing the model's parts", "trying schedules"]
    assert [now for now in seen.told if now.task == tasks[1]] == [(tasks[1], 1, 15, {})]
    with pytest.raises(KeyboardInterrupt):
        find(calibration, Target(speedup=1.6), observer=Seen(lambda seen: True))


def test_progress_shows_the_best(calibration: Path) -> None:
    seen = Seen()
    report = find(calibration, Target(gmacs=0.6 * dense_gmacs()), observer=seen)
    done = [now.done for now in seen.told if now.task == "trying schedules"]
    assert done == sorted(done)
    assert done[-1] <= seen.told[-1].total
    divergences = [now.values["divergence"] for now in seen.told if now.values]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] == report.found.divergence


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (Target(), "no target is given; type one of `gmacs=2.6`, `speedup=1.6`, `latency_ms=20`, `max_drop=0.5`"),
        (
            Target(gmacs=1, max_drop=1),
            "`gmacs` and `max_drop` exclude each other; type one of `gmacs=2.6`",
        ),
        (Target(max_drop=101), "`max_drop=101` is not a number above 0 and up to 100; type `max_drop=0.5`"),
        (Target(speedup=2, latency_ms=5), "`speedup` and `latency_ms` exclude each other; type one of"),
        (Target(latency_ms=0), "`latency_ms=0` is not a number above 0 and up to 10000000; type `latency_ms=20`"),
        (Target(speedup=1), "`speedup=1` is not a number above 1 and up to 1000; type `speedup=1.6`"),
        (Target(gmacs=float("nan")), "`gmacs=nan` is not a number above 0 and up to 1000000; type `gmacs=2.6`"),
    ],
)
def test_targets_that_mean_nothing(calibration: Path, target: Target, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        find(calibration, target)
    assert str(raised.value).startswith(told)


def test_untrained_stages_cannot_be_searched(calibration: Path) -> None:
    with pytest.raises(UsageError, match=r"^the stages of method dyvit mean nothing .* type `keep=0\.7` instead"):
        find(calibration, Target(gmacs=0.1), method="dyvit")


def test_no_effort_finds_nothing(calibration: Path) -> None:
    with pytest.raises(UsageError, match="`effort=0` is not a number above 0 and up to 10000; type `effort=40`"):
        find(calibration, Target(gmacs=0.1), settings=replace(SETTINGS, effort=0))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"no image")
    with pytest.raises(TokencutError, match=r"^none of 3 images in .* can be decoded, such as .*give another `calibra"):
        find(tmp_path, Target(gmacs=0.1))
