from __future__ import annotations

import json

import pytest

from jaxtrain.data.sources import JsonLines, JsonLinesText, TextFiles, split_of


def both(source):
    return {split: list(source.documents(split)) for split in ("train", "heldout")}


def test_split_share_is_the_fraction():
    held = sum(split_of(f"document {i}", 0.1) == "heldout" for i in range(5000))
    assert 420 < held < 580  # 500, standard deviation 21


def test_splits_are_nested_in_the_fraction():
    keys = [f"document {i}" for i in range(500)]
    small = {key for key in keys if split_of(key, 0.05) == "heldout"}
    large = {key for key in keys if split_of(key, 0.2) == "heldout"}
    assert small < large


def test_text_files_keep_every_byte_and_split_by_content(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(f"line {i}\r\n\tx  y\u2581\n".encode())
    found = both(TextFiles(pattern=str(tmp_path / "*.txt"), heldout_fraction=0.3))
    expected = sorted(f"line {i}\r\n\tx  y\u2581\n" for i in range(40))
    assert sorted(found["train"] + found["heldout"]) == expected
    assert found["train"] and found["heldout"]

    for i in range(40):  # other names, another order
        (tmp_path / f"{i:02}.txt").rename(tmp_path / f"renamed-{39 - i:02}.txt")
    again = both(TextFiles(pattern=str(tmp_path / "*.txt"), heldout_fraction=0.3))
    assert {split: sorted(texts) for split, texts in again.items()} == {
        split: sorted(texts) for split, texts in found.items()
    }


def test_one_large_file_has_a_heldout_part_and_loses_nothing(tmp_path):
    paragraphs = [f"Paragraph {i} has some words in it.\n\n" for i in range(300)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    found = both(TextFiles(pattern=str(tmp_path / "book.txt"), max_document_chars=200))
    assert len(found["train"]) > len(found["heldout"]) > 0
    documents = found["train"] + found["heldout"]
    assert all(len(document) <= 200 and document.endswith("\n\n") for document in documents)
    assert sorted("".join(documents)) == sorted("".join(paragraphs))


def test_a_file_without_line_ends_is_cut_all_the_same(tmp_path):
    (tmp_path / "one.txt").write_text("abcdefghij" * 10)
    found = both(TextFiles(pattern=str(tmp_path / "one.txt"), max_document_chars=33, heldout_fraction=0.5))
    assert sorted(map(len, found["train"] + found["heldout"])) == [1, 33, 33, 33]


def test_invalid_utf8_names_the_file_and_the_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.txt: invalid UTF-8 at byte 5 \(bytes ff fe"):
        both(TextFiles(pattern=str(tmp_path / "*.txt")))


@pytest.mark.parametrize("make", [TextFiles, JsonLinesText])
def test_no_match_and_nothing_but_empty_files_name_the_pattern(tmp_path, make):
    pattern = str(tmp_path / "nothing*")
    with pytest.raises(ValueError, match=r"no file matches the pattern '.*nothing\*'"):
        both(make(pattern=pattern))
    (tmp_path / "nothing.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pattern '.*nothing\*' is empty"):
        both(make(pattern=pattern))


def test_unknown_split_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="'test'"):
        list(TextFiles(pattern=str(tmp_path / "a.txt")).documents("test"))


def test_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"heldout_fraction is 1\.0"):
        TextFiles(pattern="x", heldout_fraction=1.0)


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_json_lines_text(tmp_path):
    rows = [{"body": f"text {i}"} for i in range(50)]
    found = both(JsonLinesText(pattern=write_lines(tmp_path / "a.jsonl", *rows, "\n"), field="body"))
    assert sorted(found["train"] + found["heldout"]) == sorted(row["body"] for row in rows)


def test_rows_of_a_prompt_stay_together_and_keep_their_columns(tmp_path):
    rows = [
        {"prompt": f"p{i % 20}", "chosen": f"c{i}", "rejected": f"r{i}", "margin": 0.5, "extra": i} for i in range(60)
    ]
    source = JsonLines(pattern=write_lines(tmp_path / "a.jsonl", *rows), heldout_fraction=0.4)
    columns = ("prompt", "chosen", "rejected")
    train, heldout = (list(source.rows(split, columns)) for split in ("train", "heldout"))
    assert sorted(row["extra"] for row in train + heldout) == list(range(60))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert heldout and heldout[0]["margin"] == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "p", "x": "a"},
            r"a\.jsonl:2: column 'completion' is missing; columns found: 'prompt', 'x'",
        ),
        ("{'prompt'\n", r"a\.jsonl:2: not valid JSON at column 2"),
        ("[1]\n", r"a\.jsonl:2: expected a JSON object, found list"),
        ({"prompt": ["p"], "completion": "c"}, r"a\.jsonl:2: column 'prompt' must be a string, found list"),
        ({"prompt": "p", "completion": ""}, r"a\.jsonl:2: column 'completion' is empty"),
        ({"prompt": "p", "completion": "c", "margin": "x"}, r"a\.jsonl:2: column 'margin' must be a finite"),
        ({"prompt": "p", "completion": "c", "margin": float("nan")}, r":2: column 'margin' must be a finite"),
    ],
)
def test_bad_rows_name_file_line_and_column(tmp_path, line, message):
    source = JsonLines(pattern=write_lines(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, line))
    with pytest.raises(ValueError, match=message):
        list(source.rows("train", ("prompt", "completion")))


def test_invalid_utf8_in_json_lines_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: invalid UTF-8 at byte 10"):
        both(JsonLinesText(pattern=str(tmp_path / "a.jsonl")))
