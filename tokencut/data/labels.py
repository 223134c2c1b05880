"""Which of a model's classes each class folder stands for."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from tokencut.data.listing import natural_order
from tokencut.data.sources import Source
from tokencut.errors import DataError
from tokencut.messages import QUOTED, index_in, quoted
from tokencut.models.fields import LabelNames
from tokencut.models.pretrained_cfg import label_names, require_head

# What is mapped; of a list, its labels.
FOLDER = "folder"


@dataclass(frozen=True)
class ClassMap:
    """How class folders map to a model's classes.

    Attributes:
        targets: The class, an index into the model's logits, of each folder.
        class_names: What each of the model's classes is called, in the words that the folders matched.
        notes: What a user should know about the match: a subset, or a match by order alone.
    """

    targets: tuple[int, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def classes_for(model: nn.Module, source: Source) -> ClassMap:
    """Finds the class of a classifier that each folder of a source stands for, as `map_classes` does.

    Raises:
        ModelError: The model has no classification head.
        DataError: The folders do not fit its classes.
    """
    classes = require_head(model)
    if source.wrapper:
        return _in_wrapper(source, label_names(model), classes)
    if source.class_order:
        return _in_given_order(source.classes, source.class_order, classes, source.called)
    return map_classes(source.classes, label_names(model), classes, source.called)


def _in_wrapper(source: Source, labels: LabelNames | None, num_classes: int) -> ClassMap:
    """Maps folders in an only folder: it may wrap the class folders, or be the one class folder that there is."""
    if source.class_order:
        known = [{name: index for index, name in enumerate(source.class_order)}]
        names = dict(enumerate(source.class_order))
    else:
        vocabularies = _vocabularies(labels, num_classes)
        known = [_lookup(names) for names in vocabularies]
        names = vocabularies[0] if vocabularies else {}

    def class_of(folder: str) -> int | None:
        spelled = folder if source.class_order else _folded(folder)
        return next((lookup[spelled] for lookup in known if spelled in lookup), None)

    only = next((folder for folder in reversed(source.wrapper) if class_of(folder) is not None), None)
    if only is None or None not in map(class_of, source.classes):
        if source.class_order:
            mapped = _in_given_order(source.classes, source.class_order, num_classes)
        else:
            mapped = map_classes(source.classes, labels, num_classes)
        note = f"the class folders are those in {'/'.join(source.wrapper)!r}, the only folder with images"
        return replace(mapped, notes=(note, *mapped.notes))
    target = class_of(only)
    assert target is not None
    note = f"the only folder with images, {only!r}, is a class of the model: all images in it are of that class"
    return ClassMap((target,) * len(source.classes), _class_names(names, num_classes),
                    (note, *_subset_note((target,), num_classes)))  # fmt: skip


def _in_given_order(
    folder_names: Sequence[str], order: Sequence[str], num_classes: int, called: str = FOLDER
) -> ClassMap:
    """Maps folders by the order of classes that the user told."""
    number = {name: index for index, name in enumerate(order)}
    strangers = [name for name in folder_names if name not in number]
    if strangers:
        raise DataError(
            f"the class map lacks the {what_classes_are(called)} {quoted(strangers)}; it holds {quoted(order)}"
        )
    _check_order(order, num_classes)
    targets = tuple(number[name] for name in folder_names)
    return ClassMap(targets, _class_names(dict(enumerate(order)), num_classes), _subset_note(targets, num_classes))


def _check_order(order: Sequence[str], num_classes: int) -> None:
    if len(order) > num_classes:
        raise DataError(f"the class map has {len(order)} classes and the model's head {num_classes}; give the map that "
                        "the model was trained with")  # fmt: skip


def map_classes(
    folder_names: Sequence[str], labels: LabelNames | None, num_classes: int, called: str = FOLDER
) -> ClassMap:
    """Finds the class of the model that each folder stands for.

    All folders must match the model's label names, or the wnids of ImageNet where the head has its number of classes
    (or ImageNet's descriptions, where the model has no label names of its own); case and `_` for a space do not count,
    and of a comma list of synonyms any one that no other class shares will do. Failing that, fewer folders than classes
    may be called by the numbers of their classes, and as many folders as classes are taken in timm's natural order.

    Args:
        folder_names: The class folders.
        labels: The model's label names, in the order of its logits or by index, if it has any.
        num_classes: How many classes the model tells apart.
        called: What they are: a `folder`, or a `label` in a list.

    Returns:
        The mapping, with a target for each of `folder_names`.

    Raises:
        DataError: The folders match no names, and are not as many as the classes.
    """
    vocabularies = _vocabularies(labels, num_classes)
    for names in vocabularies:
        lookup = _lookup(names)
        targets = [lookup.get(_folded(folder)) for folder in folder_names]
        if all(target is not None for target in targets):
            matched = tuple(target for target in targets if target is not None)
            return ClassMap(matched, _class_names(names, num_classes), _subset_note(matched, num_classes))
    numbered = _numbered(folder_names, num_classes, called)
    if numbered is not None:
        return numbered
    unmatched = _closest_misses(folder_names, vocabularies)
    if len(folder_names) == num_classes:
        return _natural_order(folder_names, labels, unmatched, called)
    raise DataError(_mismatch(folder_names, vocabularies, unmatched, num_classes, called))


def names_for_people(model: nn.Module, order: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a classifier's classes are called, where no folders are matched.

    Args:
        model: The classifier.
        order: The classes' names in its order, where the user told them.

    Returns:
        A name for each class: as told; the model's own label names; ImageNet's descriptions, where these are wnids or
        there are none and the head has the size of ImageNet's; else the classes' numbers. And notes on what is assumed.

    Raises:
        ModelError: The model has no classification head.
        DataError: More names were told than the model has classes.
    """
    classes = require_head(model, lacking="class to predict")
    if order:
        _check_order(order, classes)
        return _class_names(dict(enumerate(order)), classes), ()
    labels = label_names(model)
    own = dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels or ()))
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset and set(own.values()) <= set(ImageNetInfo(subset).label_names()):
        assumed = f"the model has no label names: its {classes} classes are taken for ImageNet's, by their number"
        return tuple(ImageNetInfo(subset).label_descriptions()), () if own else (assumed,)
    unknown = "the model has no label names, so classes are numbers, the first of which is 0; give a `class_map`"
    return _class_names(own, classes), () if own else (unknown,)


def _vocabularies(labels: LabelNames | None, num_classes: int) -> list[dict[int, str]]:
    """The names that folders may match, the model's own first, each by class index."""
    own = dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels or ()))
    vocabularies = [own] if own else []
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset:
        imagenet = ImageNetInfo(subset)
        wnids = imagenet.label_names()
        vocabularies.append(dict(enumerate(wnids)))
        # A model that names other classes is no ImageNet model: that a folder `cup` is in ImageNet says nothing then.
        if set(own.values()) <= set(wnids):
            vocabularies.append(dict(enumerate(imagenet.label_descriptions())))
    return vocabularies


def _folded(name: str) -> str:
    """A name without what does not count: case, `_` for a space, and how accents are encoded (macOS splits them)."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def _lookup(names: Mapping[int, str]) -> dict[str, int]:
    """The class for every spelling that only one class has.

    A whole name goes before a synonym: ImageNet's `cardigan` is a garment, though a Welsh corgi is called so as well.
    """
    whole: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for index, name in names.items():
        whole.setdefault(_folded(name), set()).add(index)
        for synonym in name.split(","):
            synonyms.setdefault(_folded(synonym), set()).add(index)
    return {spelling: min(indices) for spelling, indices in {**synonyms, **whole}.items() if len(indices) == 1}


def _class_names(names: Mapping[int, str], num_classes: int) -> tuple[str, ...]:
    return tuple(names.get(index, str(index)) for index in range(num_classes))


def _subset_note(targets: Sequence[int], num_classes: int) -> tuple[str, ...]:
    present = len(set(targets))
    return (
        ()
        if present == num_classes
        else (f"{present} of the model's {num_classes} classes {'is' if present == 1 else 'are'} present",)
    )


def _closest_misses(folder_names: Sequence[str], vocabularies: Sequence[Mapping[int, str]]) -> list[str]:
    """The folders that fail to match, under the vocabulary that the fewest fail to match."""
    lookups = [_lookup(names) for names in vocabularies]
    misses = [[name for name in folder_names if _folded(name) not in lookup] for lookup in lookups]
    return min(misses, key=len, default=list(folder_names))


def _numbered(folder_names: Sequence[str], num_classes: int, called: str) -> ClassMap | None:
    """Maps some of the classes, in folders called by their numbers; None where the folders are no such."""
    if len(folder_names) >= num_classes or not all(
        name.isascii() and index_in(name) is not None for name in folder_names
    ):
        return None
    targets = tuple(map(int, folder_names))
    if max(targets) >= num_classes or len(set(targets)) < len(targets):
        return None
    names = dict(zip(targets, folder_names, strict=True))
    note = (f"{_names_of(called)} are taken for the numbers of the model's classes, the first of which is 0: "
            f"{quoted(folder_names)}")  # fmt: skip
    return ClassMap(targets, _class_names(names, num_classes), (note, *_subset_note(targets, num_classes)))


def _natural_order(
    folder_names: Sequence[str], labels: LabelNames | None, unmatched: Sequence[str], called: str
) -> ClassMap:
    """Maps the i-th folder in timm's natural order to class i, and says so."""
    ordered = sorted(folder_names, key=lambda name: (natural_order(name), name))
    rank = {name: index for index, name in enumerate(ordered)}
    why = f"{called}s {quoted(unmatched)} match no label name" if labels else "the model has no label names"
    notes = [f"{why}: the {len(ordered)} {called}s stand for the model's classes in natural order"]
    by_string = sorted(folder_names)
    if not labels and by_string != ordered:
        other = next(name for name in by_string if by_string.index(name) != rank[name])
        notes.append(
            f"in the order of strings, by which torchvision, fastai and Keras train, they are {quoted(by_string)}: "
            f"{other!r} would be class {by_string.index(other)}, not {rank[other]}; if the model was trained so, give "
            f"a class map, a text file with {_names_of(called)} in that order"
        )
    if labels:
        own = dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels))
        lookup = _lookup(own)
        crossed = [name for name in ordered if lookup.get(_folded(name), rank[name]) != rank[name]]
        if crossed:
            label = own.get(rank[crossed[0]], str(rank[crossed[0]]))
            notes.append(
                f"the natural order contradicts the model's label names: it puts {called} {crossed[0]!r} on class "
                f"{label!r}; {_rename(called)} the label names for a true accuracy"
            )
    return ClassMap(tuple(rank[name] for name in folder_names), tuple(ordered), tuple(notes))


def _mismatch(
    folder_names: Sequence[str],
    vocabularies: Sequence[Mapping[int, str]],
    unmatched: Sequence[str],
    num_classes: int,
    called: str,
) -> str:
    counts = f"{len(folder_names)} {what_classes_are(called, len(folder_names))} for the model's {num_classes} classes"
    if not vocabularies:
        return (
            f"{counts}, such as {quoted(sorted(unmatched, key=natural_order))}: the model has no label names to match, "
            f"so exactly {num_classes} {called}s are expected, in the order of its classes"
        )
    expected, strangers = quoted(list(vocabularies[0].values())[:QUOTED]), quoted(sorted(unmatched, key=natural_order))
    return (
        f"{counts}, and {strangers} match none of its label names: {_rename(called)} "
        f"label names (such as {expected}), or give one {called} for each of the {num_classes} classes"
    )


def what_classes_are(called: str, count: int = 2) -> str:
    """What stands for a model's classes in a source, such as `class folders`, or `labels` in a list."""
    return ("class " if called == FOLDER else "") + called + ("s" if count != 1 else "")


def _names_of(called: str) -> str:
    return "the folders' names" if called == FOLDER else f"the {called}s"


def _rename(called: str) -> str:
    return "rename the folders to" if called == FOLDER else f"replace the {called}s in the list by"
