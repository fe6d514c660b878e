from __future__ import annotations

import ast

import pytest

from jaxtrain.data import stdlib
from jaxtrain.data.stdlib import StdlibInstructions, StdlibPairs, StdlibPrompts, StdlibText, first_sentence

SPLITS = ("train", "heldout")


def documents(domain):
    return {split: list(StdlibText(domain=domain).documents(split)) for split in SPLITS}


def rows(source):
    return {split: list(source.rows(split)) for split in SPLITS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return x.", "Return x."),
        ("Return\n    the x.  More here.\n\nBody.", "Return the x."),
        ("No full stop\n\nBody.", "No full stop"),
        ("Use e.g. The Thing. Then more.", "Use e.g. The Thing."),
        ("Return a.b if c. else d", "Return a.b if c. else d"),
        ("Really? Yes.", "Really?"),
        ("", ""),
    ],
)
def test_first_sentence(text, expected):
    assert first_sentence(text) == expected


def test_docstrings_are_found_with_names_signatures_and_spans():
    source = (
        '"""The módule."""\n'
        "if True:\n"
        "    class A(B, C):\n"
        "        '''A class.'''\n"
        "        async def f(self, x: int = 1, *, y):\n"
        '            """Do it.\n\n            Twice."""\n'
        "            def inner(): 'Inner.'\n"
        "def g(): return 'not a docstring'\n"
    )
    found = stdlib._docstrings("pkg.mod", source)
    assert [(d.name, d.title, d.kind, d.text) for d in found] == [
        ("pkg.mod", "pkg.mod", "module", "The módule."),
        ("pkg.mod.A", "class pkg.mod.A(B, C)", "class", "A class."),
        ("pkg.mod.A.f", "pkg.mod.A.f(self, x: int=1, *, y)", "function", "Do it.\n\nTwice."),
        ("pkg.mod.A.f.inner", "pkg.mod.A.f.inner()", "function", "Inner."),
    ]
    literals = [source.encode()[d.start : d.end].decode() for d in found]
    assert [ast.literal_eval(literal) for literal in literals][::3] == ["The módule.", "Inner."]


def test_both_domains_have_both_splits_and_nothing_twice():
    for domain in ("prose", "code"):
        found = documents(domain)
        assert not set(found["train"]) & set(found["heldout"])
        sizes = {split: sum(map(len, texts)) for split, texts in found.items()}
        assert sizes["train"] > 1_000_000  # enough to pretrain on
        assert 0.03 < sizes["heldout"] / sum(sizes.values()) < 0.15


def test_no_tests_no_packages_no_machine_paths():
    for module in stdlib.modules():
        parts = module.name.split(".")
        assert not {"site-packages", "test", "tests", "idle_test"} & set(parts), module.name
        assert not parts[0].startswith("_sysconfigdata")


def test_heldout_functions_are_held_out_of_every_domain():
    instructions, pairs, prompts = map(rows, (StdlibInstructions(), StdlibPairs(), StdlibPrompts()))
    held = {row["prompt"]: row["completion"] for row in instructions["heldout"]}
    assert len(held) > 200
    assert {row["prompt"] for row in pairs["heldout"]} <= set(held)
    assert {row["prompt"] for row in prompts["heldout"]} == set(held)

    trained = {row["prompt"] for kind in (instructions, pairs, prompts) for row in kind["train"]}
    assert not trained & set(held)
    answers = {row["completion"] for row in instructions["train"]}
    answers |= {row[side] for row in pairs["train"] for side in ("chosen", "rejected")}
    assert not answers & set(held.values())

    bodies = {document.split("\n\n", 1)[-1] for document in documents("prose")["train"]}
    assert not {first_sentence(body) for body in bodies} & set(held.values())


def test_heldout_docstrings_are_cut_out_of_training_code_which_still_parses():
    cut = 0
    for module in stdlib.modules():
        heldout = [d for d in module.docstrings if d.split == "heldout"]
        stripped = stdlib.without_heldout(module)
        left = stdlib._docstrings(module.name, stripped)  # parses
        assert [(d.title, d.text) for d in left] == [
            (d.title, d.text) for d in module.docstrings if d.split == "train"
        ], module.name
        cut += len(heldout)
    assert cut > 300
    found = documents("code")
    side = {m.name: stdlib.split_of(m.source, stdlib.HELDOUT_FRACTION) for m in stdlib.modules()}
    assert found["train"] == [stdlib.without_heldout(m) for m in stdlib.modules() if side[m.name] == "train"]
    assert found["heldout"] == [m.source for m in stdlib.modules() if side[m.name] == "heldout"]


def test_instructions_are_one_line_answers_of_moderate_length():
    found = rows(StdlibInstructions())
    everything = found["train"] + found["heldout"]
    assert len(everything) > 2000
    for key in ("prompt", "completion"):
        assert len({row[key] for row in everything}) == len(everything)
    for row in everything:
        instruction, title = row["prompt"].split("\n", 1)
        assert instruction in stdlib._INSTRUCTIONS and title
        assert "\n" not in row["completion"] and 3 <= len(row["completion"].split()) <= 60
    assert {row["prompt"].split("\n")[0] for row in everything} == set(stdlib._INSTRUCTIONS)


def test_pairs_reject_a_sentence_of_another_package():
    package = {entry.completion: entry.package for entry in stdlib._descriptions()}
    right = {entry.prompt: entry.completion for entry in stdlib._descriptions()}
    found = rows(StdlibPairs(negatives=3))
    for row in found["train"] + found["heldout"]:
        assert row["chosen"] == right[row["prompt"]] != row["rejected"]
        assert package[row["chosen"]] != package[row["rejected"]]
    counts = {split: len(items) / len({row["prompt"] for row in items}) for split, items in found.items()}
    assert counts == {"train": 3.0, "heldout": 1.0}
    assert len({(row["prompt"], row["rejected"]) for row in found["train"]}) == len(found["train"])
    assert list(StdlibPairs(negatives=1).rows("heldout")) == found["heldout"]


def test_a_second_look_gives_the_same(monkeypatch):
    first = (documents("prose"), documents("code"), rows(StdlibPairs()))
    for function in (stdlib.modules, stdlib.topics, stdlib._descriptions):
        function.cache_clear()
    assert (documents("prose"), documents("code"), rows(StdlibPairs())) == first


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"has no \.py files"):
        stdlib.modules.__wrapped__()
    assert stdlib.topics.__wrapped__() == ()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'poetry'"):
        StdlibText(domain="poetry")
    with pytest.raises(ValueError, match="'valid'"):
        StdlibText(domain="prose").documents("valid")
    with pytest.raises(ValueError, match="no column 'chosen'; it has 'prompt', 'completion'"):
        list(StdlibInstructions().rows("train", ("prompt", "chosen")))
    with pytest.raises(ValueError, match="negatives is 0"):
        StdlibPairs(negatives=0)
