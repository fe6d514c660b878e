"""What a rehearsal reads in the place of data."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jaxtrain.data.sources import JsonLines, TextFiles
from jaxtrain.data.stdlib import StdlibText
from jaxtrain.rehearse.sources import HELDOUT_ROWS, TRAIN_ROWS, MadeUp, Sample, cut, is_here


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows whose sides begin alike, without end."""

    def rows(self, split, columns=()):
        number = 0
        while True:
            number += 1
            yield {"prompt": f"p{number}", "chosen": "x" * 50 + "good", "rejected": "x" * 50 + "bad", "answer": 7}


def test_a_sample_is_a_few_short_rows_that_still_differ():
    rows = list(Sample(source=Pairs(), size=10).rows("train"))
    assert len(rows) == TRAIN_ROWS
    assert rows[0] == {"prompt": "p1", "chosen": "xgood", "rejected": "xbad", "answer": 7}
    assert len(list(Sample(source=Pairs()).rows("heldout"))) == HELDOUT_ROWS
    assert next(Sample(source=Pairs()).rows("train"))["chosen"] == "x" * 50 + "good"


def test_one_side_may_be_the_beginning_of_the_other():
    class Prefix(Pairs):
        def rows(self, split, columns=()):
            yield {"prompt": "p", "chosen": "yes", "rejected": "yes, and more"}

    (row,) = Sample(source=Prefix(), size=8).rows("train")
    assert (row["chosen"], row["rejected"]) == ("s", "s, and m")


def test_texts_are_cut_between_characters():
    assert cut("héllo", 2) == "h" and cut("héllo", 3) == "hé" and cut("你好", 1) == "你" and cut("whole", 0) == "whole"


def test_what_is_wrong_with_a_source_is_said_by_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n' * 3)
    source = Sample(source=JsonLines(pattern=str(tmp_path / "*.jsonl")), size=10)
    with pytest.raises(ValueError, match=r"a.jsonl:1: column 'completion' is missing"):
        list(source.rows("train", ("prompt", "completion")))


def test_made_up_rows_are_the_same_every_time_and_differ_from_each_other():
    source = MadeUp(size=20)
    rows = list(source.rows("train"))
    assert rows == list(MadeUp(size=20).rows("train")) and len(rows) == TRAIN_ROWS
    assert len({json.dumps(row) for row in rows}) == TRAIN_ROWS
    assert all(row["chosen"] != row["rejected"] and row["completion"] for row in rows)
    assert all(0 < len(text.encode()) <= 20 for row in rows for text in row.values())
    assert set(source.documents("heldout")).isdisjoint(source.documents("train"))


def test_whether_a_source_is_here(tmp_path):
    assert is_here(StdlibText(domain="prose"))
    assert not is_here(TextFiles(pattern="gs://bucket/*.txt"))
    assert not is_here(TextFiles(pattern=str(tmp_path / "*")))
    (tmp_path / "folder").mkdir()
    assert not is_here(TextFiles(pattern=str(tmp_path / "*")))
    (tmp_path / "a.txt").write_text("text")
    assert is_here(TextFiles(pattern=str(tmp_path / "*")))
