"""Hierarchical models: one stage on a smaller grid, all else as timm runs it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hierarchies import SMALL, images, small
from torch import nn

import tokencut
from tokencut.adapters import BareContext, adapter_for
from tokencut.errors import ModelError, UsageError
from tokencut.evaluation.accuracy import EvaluationReport
from tokencut.evaluation.unusual_loss import unusual_loss
from tokencut.export.run import export_model
from tokencut.export.runtimes import open_exported
from tokencut.methods import make_method
from tokencut.model import compress, predicted_gmacs, predicted_macs
from tokencut.models.loading import load_model
from tokencut.ops.grid_clusters import GridClusters
from tokencut.profiling.counting import count_macs
from tokencut.runtime.devices import inference_state
from tokencut.search.latency_table import latency_table
from tokencut.search.timing import Bench
from tokencut.tokens import apply_decision
from tokencut.training.objective import Objective, ObjectiveSettings
from tokencut.training.step import warmed
from tokencut.visualization.drawing import draw

QUICK = ("swin padded", "swin one window", "swin v2 padded")
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in SMALL]
)
TOMESD: dict[str, Any] = {"method": "tomesd"}
FORMS: list[dict[str, Any]] = [
    {},
    TOMESD,
    {"method_options": {"reconstruct": "softmax", "rounds": 0}},
    {"method_options": {"reconstruct": "copy"}},
    {"method_options": {"clustering": "pool"}},
    {"method_options": {"clustering": "pool", "reconstruct": "copy"}},
]
BOTH = pytest.mark.parametrize("method", ["tomesd", "window"])


@EVERY
def test_keep_one_is_timm_bit_for_bit(case: str) -> None:
    model = small(case)
    with torch.no_grad():
        assert torch.equal(compress(model, keep=1.0).eval()(images(model)), model(images(model)))


@EVERY
def test_an_image_has_the_same_logits_alone_and_in_any_batch(case: str) -> None:
    model, pixels = small(case), images(small(case))
    with torch.no_grad():
        dense = model(pixels)
        # timm's own products sum in another order for another number of images; what enters a stage differs by that.
        own = float((model(pixels[1:2]) - dense[1:2]).abs().max())
        close = {"rtol": 1e-5, "atol": max(1e-5, 10 * own)}
        assert own < 5e-6
        for form in FORMS:
            compressed = compress(model, keep=0.5, **form).eval()
            logits = compressed(pixels)
            assert (logits - dense).abs().max() > 1e-3, "nothing was reduced"
            torch.testing.assert_close(compressed(pixels.flip(0)).flip(0), logits, **close)
            torch.testing.assert_close(compressed(pixels[1:2]), logits[1:2], **close)


@pytest.mark.slow
@EVERY
def test_the_closed_form_is_what_fvcore_counts(case: str) -> None:
    model = small(case)
    form = FORMS[1 + list(SMALL).index(case) % 5]
    ways = [compress(model, keep=0.6), compress(model, keep=0.6, **TOMESD), compress(model, keep=0.2, **form)]
    assert all(compressed.recipe.stages for compressed in ways)
    for each in (model, *ways):
        counted = count_macs(each, (3, *images(model, 1).shape[2:]))
        assert sum(row.macs for row in predicted_macs(each)) == counted.total
        assert not counted.uncounted


@BOTH
@EVERY
def test_the_loop_is_the_forward(case: str, method: str) -> None:
    model = small(case)
    compressed, pixels = compress(model, keep=0.5, method=method).eval(), images(model)
    loop = compressed.loop
    with torch.no_grad():
        tokens = loop.run(loop.embed(pixels), compressed.recipe.stages)
        assert torch.equal(loop.head(tokens), compressed(pixels))
        assert torch.equal(compressed.forward_head(compressed.forward_features(pixels)), compressed(pixels))


@BOTH
@EVERY
def test_maps_have_timms_shapes_and_change_from_the_third_on(case: str, method: str) -> None:
    model = small(case)
    compressed, pixels = compress(model, keep=0.5, method=method).eval(), images(model)
    with torch.no_grad():
        ours, theirs = (each.forward_intermediates(pixels, intermediates_only=True) for each in (compressed, model))
        assert [each.shape for each in ours] == [each.shape for each in theirs]
        assert [torch.equal(*pair) for pair in zip(ours, theirs, strict=True)] == [True, True, False, False]
        maps = tokencut.features_only(compressed, out_indices=(1, 2))(pixels)
        assert all(torch.equal(*pair) for pair in zip(maps, ours[1:3], strict=True))
        early = tokencut.features_only(compressed, out_indices=(0, 1))(pixels)
        assert all(torch.equal(*pair) for pair in zip(early, theirs[:2], strict=True))


@BOTH
@EVERY
def test_a_training_step_reaches_every_weight(case: str, method: str) -> None:
    model = small(case).train()
    model(images(model)).square().sum().backward()
    reached = {label for label, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    compressed = compress(model, keep=0.5, method=method).train()
    gradients = []
    for checkpoints in (False, True):
        compressed.zero_grad()
        compressed.set_grad_checkpointing(checkpoints)
        torch.manual_seed(0)  # Swin V2 CR drops out
        compressed(images(model)).square().sum().backward()
        gradients.append({label: weight.grad for label, weight in compressed.model.named_parameters()})
    assert {label for label, gradient in gradients[0].items() if gradient is not None and gradient.any()} == reached
    for label, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][label], gradient)


def test_the_scale_of_features_changes_no_cluster() -> None:
    model = small("swin")
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    loop = compressed.loop
    with torch.no_grad():
        tokens = loop.embed(pixels)
        found = [
            loop.stages[2](loop.stage_input(2, tokens.with_features(scale * tokens.features)), 36)
            for scale in (1.0, 1000.0, 1e-3)
        ]
    for other in found[1:]:
        torch.testing.assert_close(other.clustered.clusters.average, found[0].clustered.clusters.average)
        torch.testing.assert_close(other.clustered.clusters.spread, found[0].clustered.clusters.spread)


@BOTH
@EVERY
def test_the_modules_are_called_that_timm_calls(case: str, method: str) -> None:
    """So a hook on any of them runs, on the module itself; and only inside the stage are there fewer tokens."""
    model = small(case)
    compressed, pixels = compress(model, keep=0.5, method=method).eval(), images(model)
    model = compressed.model
    names = {id(part): re.sub("^stages", "layers", name) for name, part in model.named_modules()}
    seen: list[tuple[str, int]] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        seen.append((names[id(module)], output.numel()))

    for part in model.modules():
        part.register_forward_hook(note)
    found = []
    with torch.no_grad():
        for run in (model, compressed, compressed.trace, model.forward_intermediates, compressed.forward_intermediates):
            run(pixels)
            found.append(seen.copy())
            seen.clear()
    dense, reduced, traced, maps, reduced_maps = found
    assert traced == reduced
    assert [name for name, _ in reduced] == [name for name, _ in dense]
    fewer = {name for (name, size), (_, whole) in zip(reduced, dense, strict=True) if size < whole}
    stage = "layers.2"
    inner = {"tomesd": {f"{stage}.blocks.{number}.mlp.fc2" for number in (1, 2, 3)},
             "window": {f"{stage}.blocks.1", f"{stage}.blocks.3.attn"}}  # fmt: skip
    assert inner[method] <= fewer
    assert method == "window" or not {f"{stage}.blocks.{number}" for number in (1, 2, 3)} & fewer
    # Of a PVT attention asks by cells from the first block on, where a stage is to group tokens.
    asked = [f"{stage}.blocks.0.attn"] if case.startswith("pvt") and method == "tomesd" else []
    within = (*asked, *(f"{stage}.blocks.{number}" for number in (1, 2, 3)))
    assert all(name.startswith(within) for name in fewer)
    assert [name for name, _ in reduced_maps] == [name for name, _ in maps]


def test_what_has_a_forward_of_its_own_is_refused() -> None:
    for place in ("", "layers.2", "layers.2.blocks.2", "layers.2.blocks.3.attn"):
        model = small("swin")
        part = model.get_submodule(place)
        part.forward = type(part).forward.__get__(part).__call__
        with pytest.raises(ModelError, match="has a forward of its own"):
            compress(model, keep=0.5)
    compressed = compress(small("swin"))
    with pytest.raises(UsageError, match="has no class attention over all its tokens; leave out `attention`"):
        compressed.trace(torch.zeros(1, 3, 128, 128), attention=True)


def test_a_block_on_a_grid_of_its_own_size_is_timms() -> None:
    """So what is resized for smaller windows is right where it is not."""
    for case in ("swin", "swin padded", "swin oblong", "swin v2", "swin v2 padded", "swin v2 cr"):
        model = small(case)
        adapter = adapter_for(model)
        with torch.no_grad():
            tokens = adapter.embed(model, images(model))
            windows = tokens.windows
            assert windows is not None
            whole = torch.eye(windows.places).expand(3, windows.number, -1, -1)
            same = apply_decision(tokens, GridClusters(windows, windows, whole, whole, change=False))
            assert torch.equal(same.features, tokens.features)
            same = adapter.prepare(model, same)
            for block in adapter.blocks(model):
                expected = adapter.run(block, tokens, BareContext()).features
                torch.testing.assert_close(
                    adapter.run(block, same, BareContext()).features, expected, rtol=1e-5, atol=1e-5
                )


def test_other_sizes_and_their_own_keep() -> None:
    model = small("swin any size")
    dense, compressed = compress(model, keep=1.0).eval(), compress(model, keep=0.5).eval()
    with torch.no_grad():
        for height, width in ((96, 96), (112, 64), (160, 100)):
            pixels = torch.randn(2, 3, height, width)
            assert torch.equal(dense(pixels), model(pixels))
            assert (compressed(pixels) - model(pixels)).abs().max() > 1e-3
    other = compress(small("swin"), keep=0.5)
    with warnings.catch_warnings():  # of torch, about how timm resizes its tables
        warnings.simplefilter("ignore")
        other.set_input_size(img_size=96)
    assert (other.recipe.tokens, [plan.tokens_out for plan in other.recipe.stages]) == (36, [16])
    assert other.eval()(torch.randn(1, 3, 96, 96)).isfinite().all()


@pytest.mark.parametrize("form", [{}, TOMESD], ids=["window", "tomesd"])
@pytest.mark.parametrize("case", ["swin padded", "pvt oblong"])
def test_a_file_keeps_it(case: str, form: dict[str, Any], tmp_path: Path) -> None:
    model = small(case)
    options = {} if form else {"method_options": {"reach": 1}}
    compressed, pixels = compress(model, keep=0.5, **form, **options).eval(), images(model)
    tokencut.save(compressed, tmp_path / "out.safetensors")
    loaded = tokencut.load(tmp_path / "out.safetensors")
    assert loaded.recipe == compressed.recipe
    name, args = SMALL[case]
    plain = timm.create_model(name, checkpoint_path=str(tmp_path / "out.safetensors"), **args).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels), compressed(pixels))
        assert torch.equal(plain(pixels), model(pixels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "keep", "layers", "saved"),
    [("window", "swin_small_patch4_window7_224", 0.75, [2], 18.4),
     ("window", "swin_small_patch4_window7_224", 0.5, [3], 32.0),
     ("window", "swin_base_patch4_window12_384", 0.5, [5], 31.7),
     ("window", "swin_tiny_patch4_window7_224", 0.5, [2], 19.3),
     ("window", "pvt_v2_b3", 0.5, [2], 29.1), ("window", "pvt_v2_b5", 0.5, [2], 39.4),
     ("tomesd", "swin_small_patch4_window7_224", 0.5, None, 29.9),
     ("tomesd", "swin_base_patch4_window12_384", 0.5, None, 26.6),
     ("tomesd", "swinv2_small_window16_256", 0.5, None, 28.0), ("tomesd", "pvt_v2_b2", 0.5, None, 13.8),
     ("tomesd", "pvt_v2_b3", 0.5, None, 26.4), ("tomesd", "pvt_v2_b5", 0.5, None, 33.9)],
)  # fmt: skip
def test_what_is_saved(method: str, name: str, keep: float, layers: list[int] | None, saved: float) -> None:
    """Of all multiply-adds, in percent, with what grouping or clustering and giving back take."""
    with torch.device("meta"):
        model = timm.create_model(name)
    found = 100 * (
        1 - predicted_gmacs(compress(model, keep=keep, layers=layers, method=method)) / predicted_gmacs(model)
    )
    assert found == pytest.approx(saved, abs=0.1)


def test_pvt_clusters_in_windows_that_leave_even_grids() -> None:
    with torch.device("meta"):
        model = timm.create_model("pvt_v2_b2")
    adapter = adapter_for(model)
    windows = [adapter.windows(model, *grid) for grid in ((14, 14), (24, 50), (6, 7), (2, 58))]
    # The even numbers of windows that 24 and 50 are made of: 4 of 6, 10 of 5. 7 is odd itself; 58 is 8 of 8, less 6.
    assert [(each.height, each.width) for each in windows] == [(7, 7), (6, 5), (3, 7), (1, 8)]
    assert all(each.rows % 2 == each.columns % 2 == 0 for each in (*windows[0].smaller(), *windows[1].smaller()))
    # 800 x 1333 px: convolutions of 7 with a stride of 4, then twice of 3 with a stride of 2.
    assert [adapter.stage_grid(model, stage, 800, 1333) for stage in range(3)] == [(200, 334), (100, 167), (50, 84)]


def test_what_is_not_worth_it_is_said() -> None:
    with torch.device("meta"):
        small_one, larger = (timm.create_model(name) for name in ("pvt_v2_b0", "pvt_v2_b2"))
    adapter = adapter_for(small_one)
    method = make_method("window")
    assert adapter.keep_note(small_one, 0.5, method) == (
        "of each 7 x 7 tokens 5 x 5 stay, 0.51 of them, the nearest to `keep=0.5`; with 2 blocks in the third stage "
        "that saves next to nothing, take pvt_v2_b2 or larger"
    )
    assert "next to nothing" not in str(adapter.keep_note(larger, 0.5, method))


def test_pvt_has_its_size_from_timms_description() -> None:
    loaded = load_model("pvt_v2_b2", pretrained=False, img_size=96, model_kwargs={"depths": (1, 1, 4, 1)})
    assert adapter_for(loaded.dense).grid(loaded.dense, 96, 96) == (6, 6)
    assert compress(loaded.dense, keep=0.5).recipe.tokens == 36
    with pytest.raises(UsageError, match="takes no argument 'size'"):
        load_model("pvt_v2_b2", pretrained=False, model_kwargs={"size": 96})


def test_the_nearest_window_is_taken() -> None:
    model = small("swin")  # 8 x 8 tokens in windows of 4 x 4: 1, 4 or 9 of 16 stay
    stages = [compress(model, keep=keep).recipe.stages for keep in (0.8, 0.7, 0.39, 0.1)]
    assert [sum(plan.tokens_out for plan in plans) for plans in stages] == [0, 36, 16, 4]
    # Their MLPs have two thirds of the work: what is left of it all is a third, and two thirds of their share.
    stages = [compress(model, keep=keep, **TOMESD).recipe.stages for keep in (0.9, 0.7, 0.5, 0.3)]
    assert [sum(plan.tokens_out for plan in plans) for plans in stages] == [0, 36, 16, 4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "bat"}, "method bat leaves tokens in no grid, and Swin needs one between its stages; type "
                            "`method='window'`, or leave it out"),
        ({"reduce_by": 8}, "Swin keeps a regular grid, from which not any 8 tokens can go; type a share that stays, "
                           "such as `keep=0.5`, instead of `reduce_by`"),
        ({"layers": "all"}, "layers 'all' are several, and Swin is reduced once; type the block of its third stage "
                            "where that begins, such as `layers=[2]`"),
        ({"prop_attn": True}, "method window leaves clusters of equal weight, and no proportional attention; leave out "
                              "`prop_attn`"),
        ({"layers": [99]}, "layer 99 does not exist: the third stage, which is reduced, has blocks 1 to 4; type that "
                           "where it begins, such as `layers=[2]`"),
        ({"layers": [2, 3]}, "layers 2,3 are several, and Swin is reduced once; type the block of its third stage "
                             "where that begins, such as `layers=[2]`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        compress(small("swin"), **arguments)
    assert str(refused.value) == told


def test_windows_are_for_hierarchies_alone() -> None:
    with pytest.raises(UsageError) as refused:
        compress(timm.create_model("test_vit"), method="window")
    assert str(refused.value) == (
        "method window is for hierarchical models, whose blocks need tokens in a grid, and ViT / DeiT is none; type "
        "another, such as `method='bat'`"
    )
    short = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1), num_heads=(1, 1))
    with pytest.raises(ModelError, match="has 2 stages with blocks, and it is the third"):
        adapter_for(short)
    with pytest.raises(UsageError, match="whose stage gives each token back"):
        compress(small("swin")).forward_intermediates(torch.zeros(1, 3, 128, 128), unmerge="copy")


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("ending", "case"), [(".onnx", "swin padded"), (".onnx", "pvt"), (".pt2", "swin v2")])
def test_an_exported_file_gives_the_same_for_any_batch(case: str, ending: str, method: str, tmp_path: Path) -> None:
    model = small(case, depths=(1, 1, 3, 1))
    compressed, pixels = compress(model, keep=0.5, method=method).eval(), images(model, 5)
    report = export_model(compressed, tmp_path / f"model{ending}")
    assert report.agreement is not None and report.agreement.differing == 0
    run = open_exported(report.output)
    with torch.no_grad():
        for batch in (1, 5):
            # Sharp clusters take rounding up: 1.1e-4 was seen.
            torch.testing.assert_close(run(pixels[:batch]), compressed(pixels[:batch]), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("case", ["swin", "swin v2 padded", "pvt"])
def test_it_compiles_without_a_break(case: str, method: str) -> None:
    model = small(case, depths=(1, 1, 3, 1))
    compressed, pixels = compress(model, keep=0.5, method=method).eval(), images(model)
    compiled = torch.compile(compressed, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), compressed(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [pytest.param(None, marks=pytest.mark.slow), [3]])
def test_a_search_tries_blocks_and_windows(layers: list[int] | None) -> None:
    model = small("swin")
    dense = predicted_gmacs(model)
    settings = tokencut.SearchSettings(images=24, effort=4, workers=0, device="cpu")
    report = tokencut.find_schedule(
        model, "digits", tokencut.Target(gmacs=0.93 * dense), layers=layers, settings=settings
    )
    made = compress(model, keep=report.found.keep, layers=report.found.layers)
    assert report.found.gmacs == pytest.approx(predicted_gmacs(made)) and predicted_gmacs(made) <= 0.93 * dense
    assert len(report.found.layers) == 1 and (layers is None or list(report.found.layers) == layers)
    assert {point.layers for point in report.front} <= {(), *((block,) for block in (layers or range(1, 5)))}


@pytest.mark.slow
def test_a_search_by_time_times_grids_that_there_are() -> None:
    model = small("swin v2")
    with inference_state(compressed := compress(model, keep=1.0), torch.device("cpu"), None):
        table = latency_table(compressed, Bench(compressed, batch_size=1, device=torch.device("cpu")), rounds=3,
                              max_seconds=1.0)  # fmt: skip
    assert table.counts == (4, 16, 36, 64)
    assert table.seconds((64, 16, 16, 16)) > 0


def test_pictures_show_the_clusters_of_each_window() -> None:
    model = small("swin")
    compressed, pixels = compress(model, keep=0.5).eval(), images(model)
    with torch.no_grad():
        source = compressed.trace(pixels)[1][0].tokens.source
    assert source is not None
    places, clusters = (torch.arange(64).view(8, 8), torch.arange(36).view(6, 6))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inside = places[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        own = clusters[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].flatten()
        assert set(source[:, inside].flatten().tolist()) <= set(own.tolist())
    ((stage,),) = (view.stages for view in draw(compressed, pixels[:1].clamp(0, 1).mul(255).byte(), device="cpu").views)
    assert (stage.block, stage.tokens_in, stage.tokens_out) == (2, 64, 36)


def test_pictures_show_the_groups_of_the_first_block_that_has_any() -> None:
    compressed, pixels = compress(small("swin"), keep=0.5, **TOMESD).eval(), images(small("swin"))
    with torch.no_grad():
        first, last = (trace.tokens for trace in compressed.trace(pixels)[1])
    assert first.source is not None and last.source is not None
    for tokens in (first, last):
        assert [len(set(groups)) for groups in tokens.source.tolist()] == [16] * 3
    assert not torch.equal(first.source, last.source), "they are found anew for each block"
    ((stage,),) = (view.stages for view in draw(compressed, pixels[:1].clamp(0, 1).mul(255).byte(), device="cpu").views)
    assert (stage.block, stage.tokens_in, stage.tokens_out) == (2, 64, 16)


@BOTH
@pytest.mark.parametrize("distill", ["soft", "features"])
def test_a_fine_tune_is_taught_by_the_whole_model(distill: str, method: str) -> None:
    model = small("swin padded")
    compressed = compress(model, keep=0.5, method=method).train()
    objective = Objective(compressed, ObjectiveSettings(distill=distill, beta=0.1))
    losses = objective(images(model), torch.tensor([0, 1, 2]))
    losses.total.backward()
    assert losses.terms["distillation"] > 0 and losses.terms["diversity"] > 0
    assert objective.teacher is not None and objective.teacher.recipe.stages == ()


def test_a_warm_up_of_the_keep_rate_takes_windows_that_there_are() -> None:
    compressed = compress(small("swin padded"), keep=0.1)  # 6 x 9 in windows of 4 x 4: 6, 15 or 35 of 54
    left = [
        [plan.tokens_out for plan in warmed(compressed.recipe, share, compressed.possible_counts()).stages]
        for share in (0.0, 0.3, 0.8, 1.0)
    ]
    assert left == [[], [35], [15], [6]]


def test_what_is_unusual_is_judged_by_plain_averages() -> None:
    compressed, asked = compress(small("swin"), keep=0.5), list[tuple[str, Any]]()

    def report(wrong: int) -> EvaluationReport:
        correct = tuple(index >= wrong for index in range(400))
        return EvaluationReport("m", "d", 400, 100 - wrong / 4, 100.0, 0.1, None, 1.0, 1.0, correct=correct)

    def judge(model: nn.Module, name: str) -> EvaluationReport:
        asked.append((name, model))
        return report(8)

    told = unusual_loss(compressed, report(0), report(40), judge)
    assert told is not None and told.endswith("on 400 images, where averages of cells lose 2.00")
    ((name, plain),) = asked
    assert name == "the same with window"
    assert plain.recipe.method_options["clustering"] == "pool" and plain.recipe.stages == compressed.recipe.stages
    assert unusual_loss(plain, report(0), report(8), judge) is None and len(asked) == 1
