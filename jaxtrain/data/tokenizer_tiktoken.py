"""tiktoken's ranks (a token in base64 and its rank, a line each) as a byte-level BPE with the same ids."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping, Sequence

from jaxtrain.data.tokenizer_convert import all_merges, byte_level, folder_files
from jaxtrain.data.tokenizer_hf import HfTokenizer, byte_alphabet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a file of ranks does not say.

    ranks: how many the encoding has, by which it is known.
    split: a name of tokenizer_convert.SPLITS.
    special: ids by name; ids between them are reserved.
    eos, bos: names of ``special``.
    """

    ranks: int
    split: str
    special: Mapping[str, int]
    eos: str
    bos: str | None = None


def _numbered(start: int, names: Sequence[str]) -> dict[str, int]:
    return {name: start + i for i, name in enumerate(names)}


def _llama3() -> dict[str, int]:
    known = {0: "begin_of_text", 1: "end_of_text", 2: "reserved_special_token_0", 3: "reserved_special_token_1"}
    known |= {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 6: "start_header_id", 7: "end_header_id"}
    known |= {8: "eom_id", 9: "eot_id", 10: "python_tag"}
    return _numbered(128000, [f"<|{known.get(i, f'reserved_special_token_{i - 8}')}|>" for i in range(256)])


_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS = {
    "gpt2": Encoding(ranks=50256, split="gpt2", special={"<|endoftext|>": 50256}, eos="<|endoftext|>"),
    "cl100k": Encoding(
        ranks=100256,
        split="cl100k",
        special={"<|endoftext|>": 100257, **_FIM, "<|endofprompt|>": 100276},
        eos="<|endoftext|>",
    ),
    "o200k": Encoding(
        ranks=199998,
        split="o200k",
        special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        eos="<|endoftext|>",
    ),
    "llama3": Encoding(ranks=128000, split="cl100k", special=_llama3(), eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "qwen": Encoding(
        ranks=151643,
        split="qwen",
        special=_numbered(151643, [*_QWEN, *(f"<|extra_{i}|>" for i in range(205))]),
        eos="<|endoftext|>",
    ),
    "qwen35": Encoding(ranks=248044, split="qwen35", special=_numbered(248044, _QWEN), eos="<|endoftext|>"),
}


def is_ranks(data: bytes) -> bool:
    """Does a file hold ranks?  Llama 3 has them in a ``tokenizer.model``."""
    try:
        token, rank = data.split(b"\n", 1)[0].split()
        return bool(base64.b64decode(token, validate=True)) and int(rank) >= 0
    except ValueError:
        return False


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Rank by token.  Raises ValueError, with the line, for a damaged file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number} of the tiktoken ranks is not a token in base64 and a rank: {line[:60]!r}"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the {len(ranks)} tiktoken ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the tiktoken ranks lack the single bytes {missing[:8]}, so not every text could be spelled")
    return ranks


def tiktoken_tokenizer(
    data: bytes,
    encoding: str | Encoding | None = None,
    *,
    files: Mapping[str, bytes] | None = None,
    stop_ids: Sequence[int] = (),
) -> HfTokenizer:
    """The tokenizer of a file of ranks, with the ids of the ``tiktoken`` library.

    encoding: a name of ENCODINGS; None: the one with as many ranks.
    files: what a folder has beside it (tokenizer_config.json, a chat template).

    Raises ValueError for a damaged file, and for an encoding that is not known.
    """
    ranks = read_ranks(data)
    if encoding is None:
        encoding = next((name for name, known in ENCODINGS.items() if known.ranks == len(ranks)), f"{len(ranks)} ranks")
    if isinstance(encoding, str) and encoding not in ENCODINGS:
        known = {name: known.ranks for name, known in ENCODINGS.items()}
        raise ValueError(f"no tiktoken encoding is known as {encoding!r}; known, with their numbers of ranks: {known}")
    found = ENCODINGS[encoding] if isinstance(encoding, str) else encoding
    if found.ranks != len(ranks):
        raise ValueError(f"the encoding {encoding!r} has {found.ranks} ranks, and the file {len(ranks)}")
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = all_merges(vocab)
    names = {i: name for name, i in found.special.items()}
    special = [names.get(i, f"<|reserved_{i}|>") for i in range(len(ranks), max(names, default=-1) + 1)]
    # tiktoken looks a whole word up before it merges.
    tokenizer = byte_level(vocab, merges, found.split, special=special, ignore_merges=True)
    roles = {"eos_token": found.eos, "pad_token": found.eos}
    config: dict[str, str | bool] = {**roles, "bos_token": found.bos, "add_bos_token": True} if found.bos else {**roles}
    return HfTokenizer(folder_files(tokenizer, config, files or {}), stop_ids)
