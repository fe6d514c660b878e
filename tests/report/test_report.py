"""The page: well formed, offline, escaped, complete, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from jaxtrain.report import write_report

from .conftest import EVIL, HASHES, PROMPTS, STAGES, write_json

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page, checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, name: str = "") -> int:
        return sum(t == tag and name in ["", *(a.get("class") or "").split()] for t, a in self.tags)


def report(directory) -> tuple[str, Page]:
    path = write_report(directory)
    assert path == directory / "report.html"
    assert [p.name for p in directory.glob("report*")] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_whole_run(make_run):
    html, page = report(make_run())
    assert html.startswith("<!doctype html>")
    assert "This report is partial" not in page.text
    headings = re.findall(r'<section id="stage-\d+">\s*<h2>(.*?)</h2>', html)
    assert headings == list(STAGES), "every stage, in the recipe's order"
    assert "my run" in page.text
    # The summary.
    assert page.text.count("better lower is better") == 3
    assert page.text.count("better higher is better") == 3
    assert "▼ -0.07 worse higher is better" in page.text
    assert re.search(r'class="num shown">▲ \+0.16<', html)
    # Charts: held-out dots, smoothed lines, notes on NaN and outliers.
    assert page.count("circle", "dot") >= 4 * 4
    assert page.count("path", "raw") > 20
    assert "2 not finite, 2 outside the frame" in page.text
    for title in ("objective/kl", "objective/scores", "rewards: chosen and rejected", "accuracy", "loss"):
        assert f"<figcaption><b>{title}</b>" in html
    assert "<b>weight</b>" not in html and "<b>skipped</b>" not in html
    # Ancestry, facts, config, environment.
    chain = re.findall(r'<span class="chip.*?">(\w+) <code>(\w+)</code>', html)[-5:]
    assert chain == [(s, HASHES[s][:12]) for s in ("pretrain", "midtrain", "sft", "reward", "ppo")]
    assert "3.215M" in page.text and "11.43k" in page.text and "3 min 32 s" in page.text
    assert "pretrain/Stage.objective = @LM()" in page.text
    assert "0.10.2" in page.text


def test_samples_stand_side_by_side(make_run):
    html, _page = report(make_run())
    table = re.search(r'<table class="samples">(.*?)</table>', html, re.DOTALL)[1]
    assert re.findall(r"<th>(\w+)</th>", table) == [
        "prompt", "untrained", "pretrain", "midtrain", "sft", "dpo", "ppo"
    ]  # fmt: skip
    rows = table.split("<tr>")[2:]
    assert len(rows) == len(PROMPTS)
    assert all(row.count("<td>") == 6 for row in rows)
    assert rows[0].index("vir@@") < rows[0].index("following functions") < rows[0].index("absolute one")


def test_next_tokens_of_every_stage(make_run):
    html, page = report(make_run())
    section = re.search(r'<section id="next-tokens">(.*?)</section>', html, re.DOTALL)[1]
    assert len(re.findall(r'<svg class="bars"', section)) == 2 * 6
    assert "⏎" in section and "␣a" in section and "&lt;em&gt;" in section and "<em>" not in section
    assert "33%" in page.text, "untrained: 0.31 - 0.02 * -1"


def test_nothing_comes_from_elsewhere(make_run):
    html, page = report(make_run())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action", "style"):
                assert value.startswith("#"), (name, value)
    assert not re.search(r"https?://|url\(|@import", html)


def test_untrusted_text_is_escaped(make_run):
    run = make_run()
    path = run / "stages" / "ppo" / "samples.json"
    value = json.loads(path.read_text())
    value["samples"] = [{"prompt": PROMPTS[0], "completion": EVIL}, {"prompt": EVIL, "completion": ""}]
    value["next_tokens"] = [{"prompt": EVIL, "tokens": [[EVIL, 0.5]]}]
    write_json(path, value)
    (run / "config.gin").write_text(f"# {EVIL[:60]}\n", encoding="utf-8")
    shutil.move(run / "stages" / "dpo", run / "stages" / "<script>x")
    metrics = run / "stages" / "sft" / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "<script>y": 1.0, "loss": 2.0}) + "\n")
    html, page = report(run)
    assert "script" not in {tag for tag, _ in page.tags} and "img" not in {tag for tag, _ in page.tags}
    assert "<script" not in html and "&lt;script&gt;alert(" in html
    assert "<script>alert('owned')" in page.text
    assert "\x00" not in html and "\x1b" not in html and "␛[31m" in html


def test_an_empty_run(tmp_path):
    _, page = report(tmp_path)
    for line in (
        "summary.json is missing",
        "config.gin is missing",
        "stages/untrained/samples.json is missing",
    ):
        assert line in page.text
    assert "no stage has left anything" in page.text


def test_a_partial_run_says_what_is_missing(make_run):
    run = make_run()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "stages" / "reward")
    shutil.rmtree(run / "stages" / "untrained")
    (run / "stages" / "ppo" / "result.json").unlink()
    (run / "stages" / "dpo" / "result.json").write_text("{")
    with (run / "stages" / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "lo')
    (run / "stages" / "midtrain" / "metrics.jsonl").write_text("")
    html, page = report(run)
    for line in (
        "summary.json is missing",
        "stages/ppo/result.json is missing",
        "stages/dpo/result.json is not valid JSON",
        "stages/sft/metrics.jsonl line 155 is not valid JSON",
        "stages/untrained/samples.json is missing",
    ):
        assert line in page.text, line
    assert re.findall(r'<section id="stage-\d+">\s*<h2>(.*?)</h2>', html) == [
        "pretrain", "midtrain", "sft", "dpo", "ppo"
    ]  # fmt: skip
    assert "at step 40" in page.text
    assert "This stage logged no metrics" in page.text
    # The table comes from what each stage recorded itself.
    assert "bits per byte, prose" in page.text and "completion loss" in page.text


def test_a_named_but_absent_stage_is_reported(make_run):
    run = make_run()
    shutil.rmtree(run / "stages" / "reward")
    _, page = report(run)
    assert "stages/reward is named by the summary, but is missing" in page.text


def test_a_wrong_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        write_report(tmp_path / "nowhere")


def test_nulls_and_odd_values_do_not_break_it(make_run):
    run = make_run()
    write_json(
        run / "summary.json",
        [
            {
                "stage": "sft",
                "metric": "loss",
                "before": None,
                "after": 1.0,
                "better": "lower",
                "seconds": None,
            }
        ],
    )
    write_json(run / "stages" / "sft" / "result.json", {"stage": "sft", "seconds": None, "parents": None})
    (run / "stages" / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "note": "text"}\n[]\n')
    _, page = report(run)
    assert "unknown lower is better" in page.text
    assert "no finite values" in page.text
