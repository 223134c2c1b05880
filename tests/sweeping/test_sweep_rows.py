"""What a sweep is made of: how methods are typed, how rows become JSON, and which rows are compared."""

from __future__ import annotations

import json

import pytest

from tokencut.errors import UsageError
from tokencut.evaluation.statistics import Difference, paired_difference
from tokencut.sweeping.rows import DENSE, Keep, Row, compare, keep_text, pair_name, read_variants


def row(method: str, keep: Keep, *correct: bool) -> Row:
    return Row(method, keep, 0.5, 50.0, 90.0, None, len(correct), 1.25, correct)


def test_methods_with_and_without_settings() -> None:
    plain, changed = read_variants(["bat", " bat:preset=paper:neighbours=7"])
    assert (plain.label, plain.method, plain.options) == ("bat", "bat", {})
    assert (changed.label, changed.method) == ("bat:preset=paper:neighbours=7", "bat")
    assert changed.options == {"preset": "paper", "neighbours": "7"}


def test_all_is_every_method_that_needs_no_training() -> None:
    labels = [variant.label for variant in read_variants(["all"])]
    assert labels[0] == "bat"
    assert {"dpc", "evit", "kmedoids", "random", "tome", "topk"} <= set(labels)
    assert "dyvit" not in labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no method given; type `methods=['bat', 'evit', 'tome']`, or `methods=['all']`"),
        ([""], "no method given; type `methods=['bat', 'evit', 'tome']`, or `methods=['all']`"),
        (["evit", "bat", "evit"], "method evit is given twice; type `methods=['evit', 'bat']`"),
        (["bat", "all"], "`methods=['all']` is every method, and stands alone; give it alone, or name them"),
        (["dense"], "the dense model is there without being named; leave dense out of `methods`"),
        (["bat:pairs"], "`methods` bat:pairs: 'pairs' is not one setting of the form key=value; type "
                        "`methods=['bat', 'bat:pairs=0.25']`"),
        (["bat:pairs=0:pairs=1"], "`methods` bat:pairs=0:pairs=1: 'pairs=1' is not one setting of the form key=value; "
                                  "type `methods=['bat', 'bat:pairs=0.25']`"),
        (["dyvit"], "method dyvit means nothing before it is fine-tuned, so it cannot be compared; leave it out of "
                    "`methods`, and type `tokencut.evaluate` where its stages are trained"),
    ],
)  # fmt: skip
def test_methods_that_are_refused(labels: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_variants(labels)
    assert str(caught.value) == message


@pytest.mark.parametrize(("label", "near"), [("evti", "evit"), ("bat:pears=1", "pairs"), ("bat:preset=papr", "paper")])
def test_the_nearest_name_is_offered(label: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {near}"):
        read_variants([label])


def test_a_row_becomes_json() -> None:
    made = row("bat", (0.9, 0.5), True, False)
    assert list(made.to_dict()) == [
        *("method", "keep", "gmacs", "top1", "top5", "images_per_second", "images", "loss"),
        *("to_dense", "to_dense_se", "images_per_second_low", "images_per_second_high"),
    ]
    assert made.to_dict()["keep"] == [0.9, 0.5]
    assert made.to_dict()["to_dense"] is None


def test_an_unknown_standard_error_is_null_in_json() -> None:
    lonely = Row("bat", 0.5, 0.5, 100.0, 100.0, 9.0, 1, 0.0, (True,), paired_difference([True], [False]), (8.0, 10.0))
    values = json.loads(json.dumps(lonely.to_dict(), allow_nan=False))
    assert (values["to_dense"], values["to_dense_se"]) == (100.0, None)
    assert (values["images_per_second_low"], values["images_per_second_high"]) == (8.0, 10.0)


def test_names_of_rows() -> None:
    assert keep_text((0.9, 0.7)) == "0.9/0.7"
    assert keep_text(1.0) == "1.0"
    assert pair_name(DENSE, 1.0) == "the dense model"
    assert pair_name("bat", 0.07) == "bat, keep 0.07"


def test_the_first_method_is_compared_with_each_other_and_on_average() -> None:
    rows = [
        row(DENSE, 1.0, True, True, True, True),
        row("bat", 0.7, True, True, True, False),
        row("evit", 0.7, False, True, True, False),
        row("bat", 0.5, True, True, False, False),
        row("evit", 0.5, True, False, False, False),
    ]
    found = compare(rows)
    assert [(one.first, one.second, one.keep) for one in found] == [
        ("bat", "evit", 0.7), ("bat", "evit", 0.5), ("bat", "evit", None),
    ]  # fmt: skip
    assert [one.difference.points for one in found] == [25.0, 25.0, 25.0]
    # By image: 1, 0, 0, 0 at each keep; on average 0.5, 0.5, 0, 0.
    assert found[0].difference == Difference(25.0, 25.0)
    assert found[2].difference.standard_error == pytest.approx(100 * (1 / 12 / 4) ** 0.5)
    assert found[2].to_dict()["keep"] is None


def test_one_keep_needs_no_average_and_one_method_no_comparison() -> None:
    rows = [row(DENSE, 1.0, True), row("bat", 0.7, True), row("evit", 0.7, False)]
    assert [one.keep for one in compare(rows)] == [0.7]
    assert compare(rows[:2]) == ()
