"""A learned predictor decides which tokens go: DynamicViT, arXiv 2106.02034, and the losses that train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.methods.base import Method, StageInput, StageShape, register
from tokencut.ops.grouping import Selection
from tokencut.ops.ranking import highest


@register
@dataclass(frozen=True)
class DynamicViT(Method):
    """The tokens with the highest predicted probability of being worth keeping stay, the others are dropped.

    While training every token goes on; Gumbel-softmax draws which of them later blocks cannot see.
    """

    name = "dyvit"
    source = "arXiv 2106.02034"
    prop_attn = False
    needs_training = True

    def make_module(self, width: int, seed: int) -> nn.Module:
        return Predictor(width, seed)

    def decide(self, stage_input: StageInput, budget: int) -> Selection:
        scores = _predictor(stage_input)(stage_input.tokens.image)[..., 0]
        return Selection(highest(scores, budget))

    def soft_policy(self, stage_input: StageInput) -> Tensor:
        before = stage_input.tokens.policy
        scores = _predictor(stage_input)(stage_input.tokens.image, before)
        drawn = F.gumbel_softmax(scores, hard=True, dim=2)[..., 0]
        return drawn if before is None else drawn * before

    def macs(self, shape: StageShape) -> int:
        half, quarter = shape.width // 2, shape.width // 4
        per_token = shape.width * shape.width + shape.width * half + half * quarter + quarter * 2
        return shape.tokens * per_token

    def reads_attention(self) -> bool:
        return False

    def merges(self) -> bool:
        return False


def _predictor(stage_input: StageInput) -> Predictor:
    if not isinstance(stage_input.learned, Predictor):
        raise TypeError("method dyvit decides by the predictor of its stage: give its input what make_module built")
    return stage_input.learned


class Predictor(nn.Module):
    """Scores each token by its own features and by the average of all tokens that are still there.

    One half of a token's embedding stays its own, the other half is averaged over the image. Computed in fp32 whatever
    the weights are stored in.
    """

    def __init__(self, width: int, seed: int) -> None:
        """Builds the predictor with the paper's initial weights, which are useless until trained.

        Args:
            width: Numbers in a token's features, at least 4.
            seed: Decides the initial weights alone: the global random state is neither used nor changed.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self.norm = nn.LayerNorm(width)
            self.embed = nn.Linear(width, width)
            self.mix = nn.Linear(width, width // 2)
            self.narrow = nn.Linear(width // 2, width // 4)
            self.score = nn.Linear(width // 4, 2)
            for layer in (self.embed, self.mix, self.narrow, self.score):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor, policy: Tensor | None = None) -> Tensor:
        """Log-probabilities that a token is kept, and that it is dropped.

        Args:
            image: Image tokens, `(B, N, D)`.
            policy: Which tokens earlier stages left, `(B, N)`; all where None.

        Returns:
            fp32 `(B, N, 2)`.
        """
        norm = self.norm
        x = F.layer_norm(image.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        x = F.gelu(_linear(self.embed, x))
        own, shared = x.split((x.shape[2] // 2, x.shape[2] - x.shape[2] // 2), dim=2)
        if policy is None:
            average = shared.mean(1, keepdim=True)
        else:
            left = policy.unsqueeze(2)
            # An image may have lost all its tokens to the draw; its average is then 0.
            average = (shared * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1.0)
        x = torch.cat((own, average.expand_as(shared)), dim=2)
        x = F.gelu(_linear(self.narrow, F.gelu(_linear(self.mix, x))))
        return _linear(self.score, x).log_softmax(dim=2)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


def ratio_loss(policies: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Holds the predictors to the schedule: squared error of the share kept (eq. 12; the paper's weight is 2).

    Args:
        policies: `Tokens.policy` behind each stage, `(B, N)` with `N` all patches.
        rates: Share of all patches that is to be left behind each stage.

    Returns:
        Mean over stages and images, a number.
    """
    errors = [(rate - policy.mean(1)).square().mean() for policy, rate in zip(policies, rates, strict=True)]
    return torch.stack(errors).mean()


def token_distillation_loss(features: Tensor, teacher: Tensor, policy: Tensor) -> Tensor:
    """Keeps the tokens that are left like those of the uncompressed model (eq. 10; the paper's weight is 0.5).

    Args:
        features: Image tokens behind the last block, `(B, N, D)`.
        teacher: The same of the uncompressed model.
        policy: Which tokens are left, `(B, N)`.

    Returns:
        Squared error, averaged over features and over the tokens left in the batch; 0 where none is.
    """
    errors = (features.float() - teacher.float()).square().mean(2)
    return (errors * policy).sum() / policy.sum().clamp(min=1.0)


def prediction_distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Keeps the predictions like those of the uncompressed model (eq. 11; the paper's weight is 0.5).

    Args:
        logits: `(B, classes)`.
        teacher: The same of the uncompressed model.

    Returns:
        Kullback-Leibler divergence from the teacher's probabilities to the model's, averaged over images.
    """
    log_probabilities = logits.float().log_softmax(1), teacher.float().log_softmax(1)
    return F.kl_div(*log_probabilities, reduction="batchmean", log_target=True)
