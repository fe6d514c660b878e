"""Older forms of a tokenizer, written as a ``tokenizer.json``: vocabulary and merges, WordPiece's vocab.txt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxtrain.data.tokenizer_hf import CONFIG_JSON, TOKENIZER_JSON, json_object, named_tokens

Files = dict[str, bytes]

_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    return rf"{_LETTERS}{_UPPER}*{_LOWER}+{ending}|{_LETTERS}{_UPPER}+{_LOWER}*{ending}"


# How the makers of an encoding cut a text into words before merging (tiktoken's, tekken's and DeepSeek's patterns).
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
    "cl100k": (rf"{_ENDING}|{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}{_REST}",),
    "o200k": (
        _cased(rf"{_ENDING}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen": (rf"{_ENDING}|{_LETTERS}\p{{L}}+|\p{{N}}{_REST}",),
    "qwen35": (
        rf"{_ENDING}|{_LETTERS}[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (_cased("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}  # fmt: skip
# Those that compose characters first, as their makers' own tokenizers do.
_NFC = {"qwen", "qwen35"}


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    split: str,
    *,
    special: Iterable[str],
    user_defined: Iterable[str] = (),
    add_prefix_space: bool = False,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """A byte-level BPE; ``split`` is one of SPLITS, or "digits" for gpt2's after single digits."""
    tokenizer = tokenizers.Tokenizer(models.BPE(dict(vocab), list(merges), ignore_merges=ignore_merges))
    if split in ("gpt2", "digits"):
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)]
        if split == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[split]]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False))
    if split in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, special, user_defined)
    return tokenizer


def add_tokens(tokenizer: tokenizers.Tokenizer, special: Iterable[str], user_defined: Iterable[str] = ()) -> None:
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in user_defined])


def all_merges(ranks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to make a piece of ``ranks`` out of two others, in order of the rank of what is made."""
    merges = []
    for piece, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def folder_files(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], files: Mapping[str, bytes]) -> Files:
    """``files`` with the tokenizer, and with what ``config`` adds to their tokenizer_config.json.

    The class is the one that takes tokenizer.json as it is; another would build its own pre-tokenizer.
    """
    merged = {**config, **json_object(files, CONFIG_JSON), "tokenizer_class": "PreTrainedTokenizerFast"}
    merged.pop("auto_map", None)
    merged.setdefault("clean_up_tokenization_spaces", False)
    text = json.dumps(merged, indent=1, ensure_ascii=False)
    return {**files, TOKENIZER_JSON: tokenizer.to_str().encode(), CONFIG_JSON: text.encode()}


def byte_level_files(vocab_json: bytes, merges_txt: bytes, files: Mapping[str, bytes]) -> Files:
    """GPT-2's form: a vocabulary in JSON and a line for each merge.

    Raises ValueError for a tokenizer_class whose words are cut in a way that neither file tells.
    """
    vocab = json_object({"vocab": vocab_json}, "vocab")
    lines = merges_txt.decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bad = next((line for line in merges if len(line) != 2), None)
    if bad is not None:
        raise ValueError(f"the merges have a line of {len(bad)} words, where two are wanted: {' '.join(bad)[:60]!r}")
    config = json_object(files, CONFIG_JSON)
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast").removesuffix("Tokenizer")
    around = {"Roberta", "Bart", "Longformer"}
    splits = {"GPT2": "gpt2", "Qwen2": "qwen", **dict.fromkeys(around, "gpt2")}
    if kind not in splits:
        raise ValueError(
            f"tokenizer_class {config['tokenizer_class']!r} has only a vocabulary and merges, and how it cuts words is "
            f"not known for it (known: {sorted(splits)}); save it as tokenizer.json"
        )
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    if kind in around:
        roles = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        roles |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    elif kind == "Qwen2":
        roles = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    roles = {role: token for role, token in roles.items() if token in vocab}
    named = {**roles, **{role: t for role, t in named_tokens(files).items() if isinstance(t, str)}}
    prefix_space = bool(config.get("add_prefix_space", False))
    tokenizer = byte_level(
        vocab, merges, splits[kind], special=dict.fromkeys(named.values()), add_prefix_space=prefix_space
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind in around:
        sides = [(named[role], tokenizer.token_to_id(named[role])) for role in ("sep_token", "cls_token")]
        tokenizer.post_processor = processors.RobertaProcessing(*sides, add_prefix_space=prefix_space)
    return folder_files(tokenizer, roles, files)


def wordpiece_files(vocab_txt: bytes, files: Mapping[str, bytes]) -> Files:
    """BERT's form: a piece a line, ``##`` before those inside a word (Devlin et al. 2019)."""
    lines = vocab_txt.decode().split("\n")
    vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines[:-1] if not lines[-1] else lines)}
    config = json_object(files, CONFIG_JSON)
    roles = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    roles |= {"cls_token": "[CLS]", "mask_token": "[MASK]"}
    named = {**roles, **{role: t for role, t in named_tokens(files).items() if isinstance(t, str)}}
    missing = [named[role] for role in roles if role != "mask_token" and named[role] not in vocab]
    if missing:
        raise ValueError(f"vocab.txt lacks {missing}, so it is no vocabulary of BERT's WordPiece")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=named["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    add_tokens(tokenizer, [token for token in dict.fromkeys(named.values()) if token in vocab])
    first, last = named["cls_token"], named["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )
    return folder_files(tokenizer, roles, files)
