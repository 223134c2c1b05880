"""What fine-tuning minimises: the task, distillation from the uncompressed model, and the terms on the stages.

`L = L_task + alpha * L_imp + beta * L_div` (method of arXiv 2211.11315). `L_task` is the cross-entropy with the
distillation; `dyvit` takes the losses of its own paper in the place of the two stage terms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.errors import UsageError
from tokencut.methods import methods
from tokencut.methods.dyvit import prediction_distillation_loss, ratio_loss, token_distillation_loss
from tokencut.model import CompressedModel, Trace, compress

DISTILL_KINDS = ("soft", "hard", "features", "none")
# Distillation on logits stands for the label; that on features has no label in it, and is added.
LOGIT_KINDS = ("soft", "hard")

# The weights of arXiv 2106.02034, equation 13.
DYVIT_RATIO, DYVIT_PREDICTIONS, DYVIT_TOKENS = 2.0, 0.5, 0.5


@dataclass(frozen=True)
class ObjectiveSettings:
    """How the terms are weighed.

    Attributes:
        label_smoothing: Share of a label that goes to all classes alike.
        distill: `soft` (the teacher's probabilities), `hard` (its first choice), `features` (its pooled tokens) or
            `none`.
        distill_weight: On logits, the share of `L_task` that is distillation; the weight of the term for `features`.
        temperature: Of the soft probabilities.
        alpha: Weight of the importance term.
        beta: Weight of the diversity term.
    """

    label_smoothing: float = 0.0
    distill: str = "soft"
    distill_weight: float = 0.5
    temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, each averaged over its images.

    Attributes:
        total: What is minimised.
        terms: Each term by name, unweighted and without gradient.
    """

    total: Tensor
    terms: dict[str, Tensor]


def soft_distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened probabilities, times the squared temperature.

    Args:
        logits: `(B, classes)`.
        teacher: The same of the teacher.
        temperature: Divides both.

    Returns:
        Mean over images.
    """
    found, taught = ((scores.float() / temperature).log_softmax(1) for scores in (logits, teacher))
    return F.kl_div(found, taught, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's first choice as the label, averaged over images (DeiT, arXiv 2012.12877)."""
    return F.cross_entropy(logits.float(), teacher.argmax(1))


def feature_distillation(pooled: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between pooled tokens `(B, D)` and the teacher's, averaged over images."""
    return (1 - F.cosine_similarity(pooled.float(), teacher.float(), dim=1)).mean()


def importance_loss(attention: Tensor, attentive: int) -> Tensor:
    """`L_imp` of one stage: how little of the class attention the attentive tokens hold.

    Args:
        attention: Class attention of the image tokens entering, fp32 `(B, N)`.
        attentive: `K`, how many of them are attentive: those of highest attention.

    Returns:
        `-log` of their share, averaged over images.
    """
    tiny = torch.finfo(torch.float32).tiny
    held = attention.topk(attentive, dim=1).values.sum(1)
    return (attention.sum(1).clamp(min=tiny).log() - held.clamp(min=tiny).log()).mean()


def diversity_loss(tokens: Tensor) -> Tensor:
    """`L_div` of one stage: how alike the image tokens are that leave it.

    Args:
        tokens: Their features, `(B, M, D)`.

    Returns:
        Squared cosine similarity, averaged over the pairs of different tokens and over images; 0 for a single token.
    """
    count = tokens.shape[1]
    unit = F.normalize(tokens.float(), dim=2)
    squares = torch.matmul(unit, unit.transpose(1, 2)).square()
    pairs = squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)
    return (pairs / max(1, count * (count - 1))).mean()


class Objective:
    """The losses of a compressed model on a batch.

    Holds the teacher, which is the model as it is when the objective is made, without its stages.
    """

    def __init__(self, model: CompressedModel, settings: ObjectiveSettings, *, compile_mode: str | None = None) -> None:
        """Prepares a model for training: its two heads give separate logits where one of them is distilled to.

        Args:
            model: The model to be trained; copied as the teacher where one is needed.
            settings: The weights.
            compile_mode: The mode in which model and teacher run through `torch.compile`; None for not at all.

        Raises:
            UsageError: The settings contradict each other or the method.
        """
        self.model = model
        self.settings = settings
        self.own_losses = methods()[model.recipe.method].needs_training
        if self.own_losses and (settings.alpha or settings.beta):
            raise UsageError(f"method {model.recipe.method} trains with its own losses, without `alpha` and `beta`; "
                             "leave them out")  # fmt: skip
        if self.own_losses and settings.distill not in ("soft", "none"):
            raise UsageError(f"method {model.recipe.method} distils softly, as published; type "
                             f"`distill='soft'` or none, not {settings.distill}")  # fmt: skip
        if compile_mode is not None and settings.distill == "features":
            raise UsageError("`distill='features'` reads pooled tokens from inside the model, which `compiled` hides; "
                             "type `distill='soft'`, or leave out `compiled`")  # fmt: skip
        self.teacher: CompressedModel | None = None
        if settings.distill != "none":
            teacher = compress(model.model, keep=1.0).eval()
            self.teacher = teacher.requires_grad_(requires_grad=False)
        self.two_heads = self._separate_heads(settings.distill in LOGIT_KINDS)
        self._traced = bool(self.own_losses or settings.alpha or settings.beta)
        self._student, self._taught = self._run_student, self._run_teacher
        self._recorded = compile_mode not in (None, "default")
        if compile_mode is not None:
            self._student = torch.compile(self._run_student, mode=compile_mode)
            self._taught = torch.compile(self._run_teacher, mode=compile_mode)

    def close(self) -> None:
        """Makes the model what it was for use: one prediction."""
        self._separate_heads(False)

    def _separate_heads(self, apart: bool) -> bool:
        """Whether the model has two heads that give separate logits from now on."""
        return self.model.adapter.separate_heads(self.model.model, apart) and apart

    def __call__(self, images: Tensor, targets: Tensor) -> Losses:
        """The losses of a batch.

        Args:
            images: `(B, C, H, W)`.
            targets: The class of each image, int64 `(B,)`, or its share of each class, `(B, classes)`.
        """
        if self._recorded:  # what model and teacher give holds until the next batch
            torch.compiler.cudagraph_mark_step_begin()
        output, traces, pooled = self._forward(images)
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        task = F.cross_entropy(logits.float(), targets, label_smoothing=self._smoothing(targets))
        terms = {"task": task}
        if self.own_losses:
            total = self._dyvit(terms, traces, distilled, images)
        else:
            total = self._distil(terms, distilled, pooled, images)
            total = total + self._stage_terms(terms, traces)
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def _smoothing(self, targets: Tensor) -> float:
        return self.settings.label_smoothing if targets.dim() == 1 else 0.0  # mixed labels come smoothed

    def _forward(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], list[Trace], Tensor | None]:
        with _pooled_tokens(self.model, wanted=self.settings.distill == "features") as pooled:
            output, traces = self._student(images)
        return output, traces, pooled[0] if pooled else None

    def _run_student(self, images: Tensor) -> tuple[Tensor, list[Trace]]:
        if self._traced:
            return self.model.trace(images, source=False, attention=bool(self.settings.alpha))
        return self.model(images), []

    def _run_teacher(self, images: Tensor) -> tuple[Tensor, list[Trace]]:
        assert self.teacher is not None
        return self.teacher.trace(images, source=False) if self.own_losses else (self.teacher(images), [])

    def _distil(self, terms: dict[str, Tensor], logits: Tensor, pooled: Tensor | None, images: Tensor) -> Tensor:
        """Adds the distillation to the terms, and gives `L_task`."""
        settings = self.settings
        if self.teacher is None:
            return terms["task"]
        with torch.no_grad(), _pooled_tokens(self.teacher, wanted=pooled is not None) as seen:
            taught, _ = self._taught(images)
        if pooled is not None:
            terms["distillation"] = feature_distillation(pooled, seen[0])
            return terms["task"] + settings.distill_weight * terms["distillation"]
        if settings.distill == "hard":
            terms["distillation"] = hard_distillation(logits, taught)
        else:
            terms["distillation"] = soft_distillation(logits, taught, settings.temperature)
        return (1 - settings.distill_weight) * terms["task"] + settings.distill_weight * terms["distillation"]

    def _stage_terms(self, terms: dict[str, Tensor], traces: Sequence[Trace]) -> Tensor:
        """Adds `L_imp` and `L_div` to the terms where they count, and gives their weighted sum."""
        settings, stages = self.settings, [trace for trace in traces if trace.attentive]
        total = terms["task"].new_zeros(())
        if settings.alpha and stages:
            rows = [importance_loss(t.attention, t.attentive) for t in stages if t.attention is not None]
            terms["importance"] = torch.stack(rows).mean()
            total = total + settings.alpha * terms["importance"]
        if settings.beta and stages:
            terms["diversity"] = torch.stack([diversity_loss(trace.tokens.image) for trace in stages]).mean()
            total = total + settings.beta * terms["diversity"]
        return total

    def _dyvit(self, terms: dict[str, Tensor], traces: Sequence[Trace], logits: Tensor, images: Tensor) -> Tensor:
        """The objective of arXiv 2106.02034, equation 13."""
        total, last = terms["task"], traces[-1].tokens
        recipe = self.model.recipe
        left = {plan.block: plan.tokens_out / recipe.tokens for plan in recipe.stages}
        hiding = [(t.tokens.policy, left[t.block]) for t in traces[:-1] if t.tokens.policy is not None]
        if hiding:
            terms["ratio"] = ratio_loss([policy for policy, _ in hiding], [rate for _, rate in hiding])
            total = total + DYVIT_RATIO * terms["ratio"]
        if self.teacher is None:
            return total
        with torch.no_grad():
            taught, seen = self._taught(images)
        policy = last.policy if last.policy is not None else last.known_sizes()
        terms["distillation"] = prediction_distillation_loss(logits, taught)
        terms["tokens"] = token_distillation_loss(last.image, seen[-1].tokens.image, policy)
        return total + DYVIT_PREDICTIONS * terms["distillation"] + DYVIT_TOKENS * terms["tokens"]


@contextlib.contextmanager
def _pooled_tokens(model: CompressedModel, *, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects what the class head is given, `(B, D)`, during the forwards inside the block."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return

    def collect(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = model.adapter.classifier(model.model).register_forward_pre_hook(collect)
    try:
        yield seen
    finally:
        hook.remove()


def without_teacher_logits(settings: ObjectiveSettings) -> ObjectiveSettings:
    """The settings for a model whose head is new: no distillation on logits."""
    return replace(settings, distill="none") if settings.distill in LOGIT_KINDS else settings
