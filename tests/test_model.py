"""compress(): the loop over blocks, on small timm models and, where present, on real checkpoints."""

from __future__ import annotations

import copy
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokencut.adapters import columnar
from tokencut.cost import total
from tokencut.errors import ModelError, UsageError
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress, predicted_macs
from tokencut.profiling.counting import count_macs
from tokencut.schedule import StagePlan

FIXTURES = ("test_vit", "test_vit2", "test_vit3")


def fixture_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def fixture_images(model: nn.Module, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(3))


def logits_and_sources(model: CompressedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and where each patch is after each stage, `(B, stages, patches)`."""
    logits, traces = model.trace(images)
    return logits, torch.stack([trace.tokens.source for trace in traces if trace.tokens.source is not None], 1)


def sources(model: CompressedModel, images: Tensor) -> Tensor:
    return logits_and_sources(model, images)[1]


def test_the_model_passed_in_stays_as_it_was() -> None:
    model = fixture_model("test_vit")
    before = copy.deepcopy(model.state_dict())
    compressed = compress(model, keep=0.5)
    with torch.no_grad():
        compressed.model.head.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_recipe_says_what_was_done() -> None:
    compressed = compress(fixture_model("test_vit"), keep=(0.5, 1.0), layers=(2, 5), method="topk")
    assert compressed.recipe.keep == [0.5, 1.0] and compressed.recipe.layers == [2, 5]
    assert compressed.recipe.stages == (StagePlan(2, 100, 50),)
    assert compressed.recipe.prop_attn is False and compressed.recipe.method_options == {}
    assert set(compressed.stages) == {"2", "5"}


def test_reduce_by_takes_the_place_of_keep() -> None:
    compressed = compress(fixture_model("test_vit"), reduce_by=13, method="tome")
    assert compressed.recipe.keep is None and compressed.recipe.layers == [1, 2, 3, 4, 5, 6]
    assert [plan.tokens_out for plan in compressed.recipe.stages] == [87, 74, 61, 48, 35, 22]


def test_a_stage_of_any_method_but_dyvit_has_no_parameter() -> None:
    model = fixture_model("test_vit")
    for method in methods(keeps_grid=False):
        compressed = compress(model, method=method)
        assert bool(list(compressed.stages.parameters())) == (method == "dyvit"), method


def test_unknown_settings_are_refused_before_the_model_is_copied() -> None:
    with pytest.raises(UsageError, match="unknown method 'bta', did you mean bat"):
        compress(fixture_model("test_vit"), method="bta")


def test_the_model_describes_itself_as_timms_does() -> None:
    compressed = compress(fixture_model("test_vit2"))
    assert compressed.num_classes == 10
    assert resolve_model_data_config(compressed)["input_size"] == (3, 160, 160)


def test_another_input_size_resolves_the_schedule_again() -> None:
    model = fixture_model("test_vit2")
    assert model.dynamic_img_size
    compressed = compress(model, keep=0.5).eval()
    with torch.no_grad():
        _, traces = compressed.trace(torch.randn(1, 3, 96, 96))
    assert [trace.tokens.count for trace in traces] == [18, 9, 5, 5]


@pytest.mark.parametrize(("built_for", "given", "counts"), [(16, 96, [18, 9, 5, 5]), (96, 16, [1])])
def test_logits_and_trace_agree_on_whether_anything_is_reduced(built_for: int, given: int, counts: list[int]) -> None:
    """The recipe of a single patch has no stage, that of 36 has three: the images at hand decide, not the recipe."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", img_size=built_for, dynamic_img_size=True, num_classes=10).eval()
    compressed, images = compress(model, keep=0.5).eval(), torch.randn(2, 3, given, given)
    assert bool(compressed.recipe.stages) == (built_for == 96)
    with torch.no_grad():
        logits, traces = compressed.trace(images)
        assert [trace.tokens.count for trace in traces] == counts
        assert torch.equal(compressed(images), logits)
        assert torch.equal(logits, model(images)) == (given == 16)


@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
@pytest.mark.parametrize("name", FIXTURES)
def test_an_image_alone_in_a_batch_and_in_another_order(name: str, method: str) -> None:
    model = fixture_model(name)
    compressed, images = compress(model, keep=0.5, method=method).eval(), fixture_images(model)
    with torch.no_grad():
        together, places = compressed(images), sources(compressed, images)
        alone = torch.cat([compressed(image.unsqueeze(0)) for image in images])
        alone_places = torch.cat([sources(compressed, image.unsqueeze(0)) for image in images])
        turned, turned_places = compressed(images.flip(0)).flip(0), sources(compressed, images.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned, together, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone_places, places) and torch.equal(turned_places, places)


def test_gradients_reach_the_weights_before_and_behind_a_stage() -> None:
    compressed = compress(fixture_model("test_vit"), keep=0.5).train()
    compressed(fixture_images(compressed.model, 2)).sum().backward()
    for block in compressed.model.blocks:
        assert block.attn.qkv.weight.grad is not None and block.attn.qkv.weight.grad.abs().sum() > 0


def real_images(archive: Path, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spread images of a tar of class folders, preprocessed, and their class numbers."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        classes = sorted({Path(m.name).parent.name for m in members})
        chosen = members[:: len(members) // count][:count]
        images = [transform(Image.open(tar.extractfile(m)).convert("RGB")) for m in chosen]  # type: ignore[arg-type]
    return torch.stack(images), torch.tensor([classes.index(Path(m.name).parent.name) for m in chosen])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "archive", "count"),
    [("cifar10_vit", "cifar10-val.tar", 100), ("tin100_deit_tiny", "tin100-val.tar", 20)],
)
def test_real_images_alone_and_in_a_batch(shared: Path, checkpoint: str, archive: str, count: int) -> None:
    model = timm.create_model(f"local-dir:{shared / 'checkpoints' / checkpoint}", pretrained=True).eval()
    compressed = compress(model, keep=0.7).eval()
    images, _ = real_images(shared / "data" / archive, model, count)
    with torch.no_grad():
        together, places = logits_and_sources(compressed, images)
        parts = [logits_and_sources(compressed, chunk) for chunk in images.split(7)]
    alone, alone_places = (torch.cat(part) for part in zip(*parts, strict=True))
    differ = [
        (number, float((one - other).abs().max()))
        for number, (one, other) in enumerate(zip(alone, together, strict=True))
        if not torch.equal(alone_places[number], places[number])
    ]
    # At most 0.1 % of images may meet a near-tie that rounding decides; of so few none.
    assert not differ, f"images whose tokens depend on their batch, with their logits' largest difference: {differ}"
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_cifar_checkpoint_at_keep_07_is_within_a_point_of_dense(shared: Path) -> None:
    model = timm.create_model(f"local-dir:{shared / 'checkpoints' / 'cifar10_vit'}", pretrained=True).eval()
    compressed = compress(model, keep=0.7).eval()
    images, labels = real_images(shared / "data" / "cifar10-val.tar", model, 300)
    with torch.no_grad():
        right = [torch.cat([m(chunk) for chunk in images.split(50)]).argmax(1) == labels for m in (model, compressed)]
    dense, reduced = (100 * float(answers.float().mean()) for answers in right)
    # 74.7 % of these either way; of 5,000 images 72.5 % and 72.4 %.
    assert dense > 70 and reduced > dense - 1


def test_the_closed_form_follows_a_model_to_another_size() -> None:
    model = compress(timm.create_model("test_vit", img_size=64), keep=0.5)
    model.model.set_input_size(img_size=128)
    assert total(predicted_macs(model)) == count_macs(model, (3, 128, 128)).total


def test_the_closed_form_counts_patches_that_padding_adds() -> None:
    kwargs = {"img_size": 70, "dynamic_img_size": True, "dynamic_img_pad": True}
    model = compress(timm.create_model("test_vit", **kwargs), keep=0.5)
    assert model.recipe.tokens == 25
    assert total(predicted_macs(model)) == count_macs(model, (3, 70, 70)).total
    with pytest.raises(ModelError, match="dynamic_img_pad works with dynamic_img_size only"):
        compress(timm.create_model("test_vit", img_size=70, dynamic_img_size=False, dynamic_img_pad=True))


def test_parts_keep_their_modes() -> None:
    model = timm.create_model("test_vit").train()
    model.blocks[0].eval()
    compressed = compress(model, keep=0.5)
    assert compressed.training
    assert all(stage.training for stage in compressed.stages.values())
    assert [block.training for block in compressed.model.blocks] == [block.training for block in model.blocks]


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(fixture_model("test_vit"), keep=0.5, layers=[2])
    images = fixture_images(model.model)
    calls: list[object] = []
    monkeypatch.setattr("tokencut.blocks.checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    assert not calls
    model.set_grad_checkpointing()
    kept = gradients()
    assert len(calls) == len(model.model.blocks) - 1
    torch.testing.assert_close(kept, plain)
    with torch.no_grad():
        model(images)
    assert len(calls) == len(model.model.blocks) - 1


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_average_pooling_does_not_overflow_in_half_precision(name: str) -> None:
    model = timm.create_model(name, img_size=64, patch_size=4, global_pool="avg", num_classes=0)
    features = torch.full((1, model.num_prefix_tokens + 100, model.embed_dim), 600.0, dtype=torch.float16)
    counts = torch.full((1, 100), 2.56)
    pooled = columnar.average_pool(model.global_pool, features, counts, model.num_prefix_tokens)
    assert pooled.dtype == torch.float16
    assert torch.equal(pooled, torch.full_like(pooled, 600.0))


SETTINGS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in sorted(methods(keeps_grid=False))),
    ("bat", {"preset": "paper"}),
    ("bat", {"inattentive": "drop"}),
    ("bat", {"window": 8, "weights": "attention"}),
    ("evit", {"extra_token": True}),
]


def tracing(test: Callable[..., None]) -> Callable[..., None]:
    """Lets pass what the tracer warns of: that it is deprecated, and plain numbers for sizes (timm's checks, ours)."""
    for warning in ("torch.jit.TracerWarning", "FutureWarning", "DeprecationWarning"):
        message = "" if warning.startswith("torch") else r".*torch\.jit\."
        test = pytest.mark.filterwarnings(f"ignore:{message}:{warning}")(test)
    return test


@pytest.mark.slow
@tracing
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_a_traced_model_is_the_model_for_other_images_and_batches_too(method: str, settings: dict[str, object]) -> None:
    # Keep 0.3 takes ToMe two rounds of matching.
    compressed = compress(fixture_model("test_vit"), keep=0.3, layers=[2, 4], method=method, method_options=settings)
    compressed.eval()
    images = fixture_images(compressed.model)
    traced = torch.jit.trace(compressed, images[:2])
    with torch.no_grad():
        for others in (images[2:], images[:3]):
            torch.testing.assert_close(traced(others), compressed(others), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_fvcores_own_analysis_of_a_model(method: str, settings: dict[str, object]) -> None:
    compressed = compress(fixture_model("test_vit"), keep=0.5, layers=[2, 4], method=method, method_options=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore's imports warn of `torch.jit.script`
        from fvcore.nn import FlopCountAnalysis
    analysis = FlopCountAnalysis(compressed.eval(), fixture_images(compressed.model, 1))
    found = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()["linear"]
    # A block's linear layers take `n` tokens before its stage and `m` behind it; the head takes the class token.
    shape, tokens, expected = compressed.adapter.cost(compressed.model), 100, 0
    stages = {plan.block: plan for plan in compressed.recipe.stages}
    for number, block in enumerate(shape.blocks, start=1):
        leaving = stages[number].tokens_out if number in stages else tokens
        expected += block.before.per_token * (1 + tokens) + block.after.per_token * (1 + leaving)
        if method == "dyvit" and number in stages:  # its predictor: 64 to 64, to 32, to 16, to 2 numbers
            expected += tokens * (64 * 64 + 64 * 32 + 32 * 16 + 16 * 2)
        tokens = leaving
    assert found == expected + shape.head.fixed


@tracing
@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
@pytest.mark.slow
def test_tensorboards_graph_of_a_model(method: str) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard._pytorch_graph import graph  # what `SummaryWriter.add_graph` writes

    compressed = compress(fixture_model("test_vit"), keep=0.5, layers=[2, 4], method=method).eval()
    drawn, _ = graph(compressed, fixture_images(compressed.model, 1))
    assert any("/Stage[2]/" in node.name for node in drawn.node), sorted(node.name for node in drawn.node)[:50]
