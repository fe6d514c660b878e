from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.data import chat, packing
from jaxtrain.data.datasets import InstructionDataset, PairDataset, PromptDataset, TextDataset
from jaxtrain.data.loader import sequential_batches
from jaxtrain.data.tokenizer import SentencePieceBPE

ROWS = tuple(
    {
        "prompt": f"Describe what this does.\nadd{i}(first)",
        "completion": f"Return the {i}th number.",
        "chosen": f"Return the {i}th number.",
        "rejected": f"Jump over {i} dogs.",
        "margin": 0.25 * i,
        "extra": i,
    }
    for i in range(12)
)


def everything(dataset, source):
    return dataset.batch([source[i] for i in range(len(source))])


def test_text_rows_hold_every_document_once(tmp_path, tokenizer, texts):
    documents = tuple(f"Return the {i}th number.\n\tThe end.\r\n" for i in range(20))
    dataset = TextDataset(source=texts(documents, ("held out",)), seq_len=16)
    prepared = dataset.prepare(tokenizer, tmp_path / "data")
    tokens = everything(dataset, prepared.train)
    assert all(values.shape == (len(prepared.train), 16) for values in jax.tree.leaves(tokens))
    stream = tokens.targets[tokens.weights > 0].tolist()
    assert tokenizer.decode(stream) == "".join(documents)
    assert stream.count(tokenizer.eos_id) == 20 and tokenizer.bos_id not in stream
    assert prepared.info["train"] == {
        "documents": 20,
        "bytes": sum(len(text.encode()) for text in documents),
        "tokens": len(stream),
        "records": len(prepared.train),
    }
    held = everything(dataset, prepared.heldout)
    assert tokenizer.decode(held.targets[held.weights > 0]) == "held out"


def test_text_has_one_bos_per_document_and_none_inside(tmp_path, tokenizer, texts):
    dataset = TextDataset(source=texts(("one <|bos|> document", "and another")), seq_len=8)
    tokens = everything(dataset, dataset.prepare(tokenizer, tmp_path / "data").train)
    assert (tokens.ids == tokenizer.bos_id).sum() == 2
    assert (tokens.positions[tokens.ids == tokenizer.bos_id] == 0).all()


def test_instruction_rows_train_the_completion_and_its_end(tmp_path, tokenizer, table):
    dataset = InstructionDataset(source=table(ROWS), seq_len=128)
    prepared = dataset.prepare(tokenizer, tmp_path / "data")
    tokens = everything(dataset, prepared.train)
    found = []
    for row in range(len(prepared.train)):
        for segment in range(1, tokens.segments[row].max() + 1):
            there = tokens.segments[row] == segment
            targets, weights = tokens.targets[row][there], tokens.weights[row][there]
            assert np.flatnonzero(tokens.ids[row][there] == tokenizer.bos_id).tolist() == [0]
            assert weights[-1] == 1 and targets[-1] == tokenizer.end_id
            found.append(tokenizer.decode(targets[weights > 0]))
    assert sorted(found) == sorted(row["completion"] for row in ROWS)
    assert prepared.info["train"]["rows"] == 12 and prepared.info["train"]["dropped_untrained"] == 0
    assert prepared.info["train"]["tokens"] == tokens.weights.sum()


def test_rows_without_a_trained_token_are_dropped_and_counted(tmp_path, tokenizer, table):
    rows = (*ROWS, {"prompt": "word " * 200, "completion": "lost"})
    dataset = InstructionDataset(source=table(rows, ROWS), seq_len=96)
    info = dataset.prepare(tokenizer, tmp_path / "data").info
    assert (info["train"]["rows"], info["train"]["dropped_untrained"]) == (13, 1)
    with pytest.raises(ValueError, match="nothing is left of the train data"):
        InstructionDataset(source=table(rows), seq_len=4).prepare(tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pairs_line_up_with_their_texts(tmp_path, tokenizer, table):
    same = {"prompt": "p", "chosen": "equal", "rejected": "equal"}
    dataset = PairDataset(source=table((same, *ROWS), ROWS), seq_len=96)
    prepared = dataset.prepare(tokenizer, tmp_path / "data")
    assert prepared.info["train"]["dropped_identical"] == 1 and len(prepared.train) == 12
    pairs = everything(dataset, prepared.train)
    for index, text in enumerate(prepared.train.texts):
        assert text == ROWS[index]
        for side, tokens in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
            ids, mask = chat.conversation(tokenizer, text["prompt"], text[side])
            size = len(ids) - 1
            assert tokens.ids[index, :size].tolist() == ids[:-1].tolist()
            assert tokens.targets[index, :size].tolist() == ids[1:].tolist()
            assert tokens.weights[index].tolist() == [*mask[1:].tolist(), *[0.0] * (96 - size)]
            assert tokens.segments[index].tolist() == [1] * size + [0] * (96 - size)
    assert pairs.margin.tolist() == [0.25 * i for i in range(12)]
    assert pairs.weight.tolist() == [1.0] * 12
    assert pairs.reference_chosen.tolist() == pairs.reference_rejected.tolist() == [0.0] * 12
    assert pairs.margin.dtype == pairs.weight.dtype == pairs.reference_chosen.dtype == np.float32


def test_prompts_end_together_and_find_their_columns(tmp_path, tokenizer, table):
    rows = (*ROWS, {"prompt": "The quick brown fox " * 40, "extra": "long"})
    dataset = PromptDataset(source=table(rows), max_prompt_len=40)
    prepared = dataset.prepare(tokenizer, tmp_path / "data")
    prompts = everything(dataset, prepared.train)
    assert prompts.ids.shape == (13, 40) and prompts.rows.tolist() == list(range(13))
    texts = prepared.train.texts
    for ids, length, row in zip(prompts.ids, prompts.lengths, prompts.rows):
        shown = ids[40 - length :].tolist()
        expected = chat.prompt_ids(tokenizer, texts[row]["prompt"]).tolist()
        if texts[row]["extra"] != "long":
            assert shown == expected
        else:  # the start of the text, and both ends of the template
            assert length == 40 and shown[:-2] == expected[:38] and shown[-2:] == expected[-2:]
    assert prepared.info["train"]["truncated"] == 1


def test_the_last_batch_is_filled_with_rows_of_no_weight(tmp_path, tokenizer, table):
    dataset = PairDataset(source=table(ROWS), seq_len=96)
    heldout = dataset.prepare(tokenizer, tmp_path / "data").heldout
    last = list(sequential_batches(heldout, 8, dataset.batch))[-1]
    assert last.weight.tolist() == [1.0] * 4 + [0.0] * 4
    assert not last.chosen.weights[4:].any() and not last.rejected.segments[4:].any()
    prompts = PromptDataset(source=table(ROWS), max_prompt_len=64)
    heldout = prompts.prepare(tokenizer, tmp_path / "prompts").heldout
    last = list(sequential_batches(heldout, 8, prompts.batch))[-1]
    assert (last.lengths > 0).tolist() == [True] * 4 + [False] * 4


def stamp(folder):
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_second_prepare_reuses_the_folder(tmp_path, tokenizer, texts):
    dataset = TextDataset(source=texts(("some text here", "more")), seq_len=8)
    first = dataset.prepare(tokenizer, tmp_path / "data")
    before = stamp(tmp_path)
    second = dataset.prepare(tokenizer, tmp_path / "data")
    assert stamp(tmp_path) == before
    assert (second.fingerprint, second.info) == (first.fingerprint, first.info)


def test_every_input_moves_the_fingerprint_and_rewrites_the_folder(tmp_path, tokenizer, texts, corpus_source):
    documents = ("some text here", "more")

    def prepare(train, heldout=("h",), seq_len=8, tok=tokenizer):
        return TextDataset(source=texts(train, heldout), seq_len=seq_len).prepare(tok, tmp_path / "data")

    other = SentencePieceBPE(vocab_size=350, sources=(corpus_source,)).train(tmp_path / "tokenizer")
    variants = [
        {"train": documents},
        {"train": ("some text her", "emore")},  # the same characters, another boundary
        {"train": documents[::-1]},
        {"train": documents, "heldout": ("i",)},
        {"train": documents, "seq_len": 9},
        {"train": documents, "tok": other},
    ]
    found = []
    for variant in variants:
        prepared = prepare(**variant)
        found.append(prepared.fingerprint)
        assert prepared.fingerprint == prepared.train.fingerprint == prepared.heldout.fingerprint
        assert prepared.train[0]["ids"].shape == (variant.get("seq_len", 8),)
    assert len(set(found)) == 6
    again = prepare(documents)
    assert again.fingerprint == again.train.fingerprint == found[0]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "tokenizer"}


def test_empty_sources_are_named(tmp_path, tokenizer, texts, table):
    with pytest.raises(ValueError, match=r"Texts\(.* has no heldout data"):
        TextDataset(source=texts(("a",), ()), seq_len=8).prepare(tokenizer, tmp_path / "data")
    with pytest.raises(ValueError, match=r"Table\(.* has no train data"):
        PromptDataset(source=table((), ROWS), max_prompt_len=8).prepare(tokenizer, tmp_path / "data")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda self, chunk: [[3, 360] for _ in chunk])
    with pytest.raises(ValueError, match=r"Texts.*: id 360 at position 1 is outside the vocabulary of 360"):
        TextDataset(source=texts(("a",)), seq_len=8).prepare(tokenizer, tmp_path / "data")


def test_text_that_is_not_unicode_is_named(tmp_path, tokenizer, table):
    rows = (*ROWS, {"prompt": "half \ud83d", "completion": "c"})
    with pytest.raises(ValueError, match=r"Table.* \(train\): the text has a lone surrogate \(U\+D83D\)"):
        InstructionDataset(source=table(rows, ROWS), seq_len=64).prepare(tokenizer, tmp_path / "data")


def test_damage_is_named(tmp_path, tokenizer, texts):
    dataset = TextDataset(source=texts(("a",)), seq_len=8)
    dataset.prepare(tokenizer, tmp_path / "data")
    (tmp_path / "data" / "train" / "records.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        dataset.prepare(tokenizer, tmp_path / "data")
    (tmp_path / "data" / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match=r"prepared\.json is damaged"):
        dataset.prepare(tokenizer, tmp_path / "data")


def test_lengths_are_checked(texts, table):
    with pytest.raises(ValueError, match="seq_len is 1"):
        TextDataset(source=texts(("a",)), seq_len=1)
    with pytest.raises(ValueError, match="max_prompt_len is 4"):
        PromptDataset(source=table(ROWS), max_prompt_len=4)


def test_fields_are_those_of_the_records(tmp_path, tokenizer, texts):
    dataset = TextDataset(source=texts(("a",)), seq_len=8)
    record = dataset.prepare(tokenizer, tmp_path / "data").train[0]
    assert {name: values.dtype for name, values in record.items()} == packing.TOKEN_FIELDS


def test_data_sets_in_a_chat_template(tmp_path, table, texts, tiny_files):
    from jaxtrain.data.tokenizer_hf import HfTokenizer

    t = HfTokenizer(tiny_files())
    rows = [{"prompt": f"say {i}", "completion": f"{i}!", "chosen": "yes", "rejected": "no"} for i in range(6)]
    source = table(tuple(rows))
    instructions = InstructionDataset(source=source, seq_len=48).prepare(t, tmp_path / "i")
    row = instructions.train[0]
    trained = row["targets"][row["weights"] > 0]
    count = row["segments"].max()
    assert (trained == t.eos_id).sum() == t.decode(trained).count("!") == count > 1
    pairs = PairDataset(source=source, seq_len=48).prepare(t, tmp_path / "p")
    side = pairs.train[0]
    assert t.decode(side["rejected/targets"][side["rejected/weights"] > 0]) == "no"
    prompts = PromptDataset(source=table(({"prompt": "long " * 50},)), max_prompt_len=20).prepare(t, tmp_path / "q")
    ids = prompts.train[0]["ids"][-int(prompts.train[0]["lengths"]) :]
    assert prompts.info["train"]["truncated"] == 1 and t.decode(ids).endswith("\nassistant\n")
    with pytest.raises(ValueError, match=r"\(train\): the chat format alone takes"):
        PromptDataset(source=source, max_prompt_len=5).prepare(t, tmp_path / "r")
    documents = TextDataset(source=texts(("one two", "three")), seq_len=16).prepare(t, tmp_path / "t")
    first = documents.train[0]
    assert first["ids"][0] == t.eos_id and (first["targets"][first["weights"] > 0] == t.eos_id).sum() == 2
