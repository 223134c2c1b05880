"""A family from outside the package: positions that travel with the tokens, and a bias for each pair and block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from given_inputs import centres_of
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import tokencut.adapters as outside  # nothing else of tokencut: this is how a stranger writes a family
from tokencut.adapters import base
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress, predicted_macs
from tokencut.profiling.counting import count_macs
from tokencut.search.probe import Probe


class NearTransformer(nn.Module):
    """Attention falls off with distance, in each block and head at its own rate; the class token is near to all."""

    num_classes = 5
    grad_checkpointing = False

    def __init__(self, depth: int = 4, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(32, 8, 3, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.rates = nn.Parameter(2 * torch.rand(depth, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, self.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), 1)

    def bias(self, number: int, positions: Tensor) -> Tensor:
        """`(B, H, 1 + N, 1 + N)` for image tokens at `(B, N, 2)`."""
        distance = nn.functional.pad(torch.cdist(positions, positions), (1, 0, 1, 0))
        return -self.rates[number - 1].view(1, -1, 1, 1) * distance.unsqueeze(1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, attn_mask=self.bias(number, grid(len(x))))
        return self.head(self.norm(x)[:, 0])


def grid(batch: int) -> Tensor:
    """Rows and columns of 4 x 4 patches, `(B, 16, 2)`."""
    return torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).expand(batch, -1, -1)


class NearAdapter(outside.Adapter):
    family = "Near"
    timm_modules = ()

    def accepts(self, model: nn.Module) -> bool:
        return type(model) is NearTransformer

    def check(self, model: outside.TimmModule) -> None:
        if len(model.blocks) < 2:
            raise outside.ModelError("one block alone has nothing to gain; build a deeper model")

    def num_prefix_tokens(self, model: outside.TimmModule) -> int:
        return 1

    def grid(self, model: outside.TimmModule, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def input_size(self, model: outside.TimmModule) -> tuple[int, int]:
        return 32, 32

    def patch_size(self, model: outside.TimmModule) -> tuple[int, int]:
        return 8, 8

    def classifier(self, model: outside.TimmModule) -> nn.Module:
        head: nn.Module = model.head
        return head

    def blocks(self, model: outside.TimmModule) -> nn.ModuleList:
        blocks: nn.ModuleList = model.blocks
        return blocks

    def embed(self, model: outside.TimmModule, images: Tensor) -> outside.Tokens:
        return outside.Tokens(model.embed(images), 1, positions=grid(len(images)))

    def context(self, model: outside.TimmModule, number: int, tokens: outside.Tokens) -> outside.Context:
        bias = model.bias(number, tokens.positions)
        return outside.Context(bias if tokens.bias is None else bias + tokens.bias)

    def run(self, block: outside.TimmModule, tokens: outside.Tokens, context: outside.Context) -> outside.Tokens:
        return tokens.with_features(block(tokens.features, attn_mask=context.bias))

    def attention_half(
        self, model: outside.TimmModule, block: outside.TimmModule, tokens: outside.Tokens, context: outside.Context
    ) -> tuple[outside.Tokens, outside.AttentionInfo]:
        y, maps = outside.self_attention(block.attn, block.norm1(tokens.features), context.bias)
        return tokens.with_features(tokens.features + y), outside.AttentionInfo((maps,), 1, (0,), context.bias)

    def mlp_half(self, block: outside.TimmModule, tokens: outside.Tokens) -> outside.Tokens:
        return tokens.with_features(tokens.features + block.mlp(block.norm2(tokens.features)))

    def pre_mlp_norm(self, block: outside.TimmModule, features: Tensor) -> Tensor:
        normed: Tensor = block.norm2(features)
        return normed

    def final_norm(self, model: outside.TimmModule, features: Tensor) -> Tensor:
        normed: Tensor = model.norm(features)
        return normed

    def head(self, model: outside.TimmModule, tokens: outside.Tokens) -> Tensor:
        logits: Tensor = model.head(model.norm(tokens.features)[:, 0])
        return logits

    def cost(self, model: outside.TimmModule) -> outside.ModelCost:
        width = model.norm.weight.numel()
        block = outside.BlockCost(
            outside.Macs(per_token=4 * width * width) + outside.fused_attention_macs(width, width),
            outside.Macs(per_token=8 * width * width),
            outside.Macs(per_token=width),
            width=width,
            key_width=width // model.blocks[0].attn.num_heads,
        )
        return outside.ModelCost(
            embed=16 * 3 * 8 * 8 * width,
            blocks=(block,) * len(model.blocks),
            head=outside.Macs(fixed=outside.linear_macs(model.head)),
            num_prefix_tokens=1,
            patches=16,
            head_prefix_tokens=0,
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is known within a test, and forgotten behind it."""
    monkeypatch.setattr(base, "_ADAPTERS", list(base._ADAPTERS))
    outside.register_adapter(NearAdapter)


@pytest.fixture
def model() -> NearTransformer:
    torch.manual_seed(0)
    return NearTransformer().eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def reducing(model: nn.Module, method: str = "bat", **settings: Any) -> CompressedModel:
    """16 to 8 image tokens in block 2, 8 to 4 in block 3."""
    return compress(model, keep=0.5, layers=[2, 3], method=method, **settings).eval()


def test_the_loop_without_a_stage_is_the_models_own_forward(model: NearTransformer) -> None:
    loop = compress(model, keep=1.0).loop
    with torch.no_grad():
        tokens = loop.run(loop.embed(images()), ())
        assert torch.equal(loop.head(tokens), model(images()))
    assert tokens.positions is not None and torch.equal(tokens.positions, grid(3))


@pytest.mark.parametrize("halves", [False, True])
def test_a_block_in_halves_is_the_whole_block(model: NearTransformer, halves: bool) -> None:
    loop, x = compress(model, keep=1.0).loop, images()
    with torch.no_grad():
        tokens = loop.embed(x)
        whole = model.blocks[2](tokens.features, attn_mask=model.bias(3, grid(3)))
        got = loop.mlp_half(3, loop.stage_input(3, tokens).tokens) if halves else loop.step(3, tokens)
        torch.testing.assert_close(got.features, whole)
        row = loop.stage_input(3, tokens).attention.class_attention()
    attn = model.blocks[2].attn
    with torch.no_grad():
        qkv = attn.qkv(model.blocks[2].norm1(tokens.features)).view(3, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
        logits = qkv[0] @ qkv[1].transpose(2, 3) * 8**-0.5 + model.bias(3, grid(3))
    torch.testing.assert_close(row, logits.softmax(3)[:, :, 0, 1:].mean(1))


def test_tokens_that_stay_keep_their_distances(model: NearTransformer) -> None:
    compressed = compress(model, keep=0.5, layers=[2], method="topk").eval()
    with torch.no_grad():
        logits, traces = compressed.trace(images())
        source = traces[0].tokens.source
        assert source is not None
        kept = torch.stack([(row >= 0).nonzero().squeeze(1) for row in source])
        positions = grid(3).gather(1, kept.unsqueeze(2).expand(-1, -1, 2))
        x = traces[0].tokens.features
        x = x + model.blocks[1].mlp(model.blocks[1].norm2(x))
        for number in (3, 4):
            x = model.blocks[number - 1](x, attn_mask=model.bias(number, positions))
        torch.testing.assert_close(logits, model.head(model.norm(x)[:, 0]))


@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
def test_tokens_are_where_their_patches_are_on_average(model: NearTransformer, method: str) -> None:
    compressed = reducing(model, method)
    with torch.no_grad():
        logits, traces = compressed.trace(images())
        assert torch.equal(compressed(images()), logits)
    for trace, count in zip(traces, (8, 4, 4), strict=True):
        tokens = trace.tokens
        assert tokens.source is not None and tokens.positions is not None
        torch.testing.assert_close(tokens.positions, centres_of(tokens.source, count, grid(1)[0]))


def test_the_closed_form_the_search_and_dense_outputs_work_too(model: NearTransformer) -> None:
    compressed = reducing(model, "tome")
    assert sum(row.macs for row in predicted_macs(compressed)) == count_macs(compressed, (3, 32, 32)).total
    probe = Probe(compressed, [images(), images()], None)
    outcome = probe.measure((16, 8, 4, 4))
    with torch.no_grad():
        expected = (model(images()).log_softmax(1).exp() * (
            model(images()).log_softmax(1) - compressed(images()).log_softmax(1))).sum(1)  # fmt: skip
        (features,) = compressed.forward_intermediates(images(), 1, intermediates_only=True, norm=True)
    assert outcome is not None
    torch.testing.assert_close(outcome.divergence, expected.double().repeat(2), rtol=1e-4, atol=1e-6)
    assert features.shape == (3, 24, 4, 4)


def test_a_model_that_its_adapter_refuses() -> None:
    with pytest.raises(outside.ModelError, match="one block alone has nothing to gain"):
        compress(NearTransformer(depth=1))
