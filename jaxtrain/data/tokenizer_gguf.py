"""The tokenizer in a GGUF file's metadata, as a Hugging Face tokenizer with the ids of the model's original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from jaxtrain.data.tokenizer_convert import add_tokens, all_merges, byte_level, folder_files
from jaxtrain.data.tokenizer_hf import HfTokenizer

_KEY = "tokenizer.ggml."
# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

# How words are cut: tokenizer.ggml.pre -> a split of tokenizer_convert.byte_level.
_PRE = {
    # A file without the key, or "default", is from before there was one: GPT-2's.
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe", "lfm2"), "cl100k"),
    **dict.fromkeys(("chatglm-bpe", "glm4"), "cl100k"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), "qwen"),
    **dict.fromkeys(("gpt-4o", "llama4"), "o200k"),
    "qwen35": "qwen35",
    "tekken": "tekken",
    "deepseek-v3": "deepseek-v3",
}
_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken", "gpt-4o", "llama4"}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> HfTokenizer:
    """The tokenizer that ``metadata`` (of a GGUF file, as Python values) describes.

    Raises ValueError where keys are missing or damaged, and for a kind of tokenizer, or of pre-tokenizer, that is not
    known.
    """

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(_KEY + name, default)

    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = get("model")
    if kind not in builders:
        raise ValueError(f"{_KEY}model is {kind!r}; supported are {sorted(builders)}")
    tokens = [str(token) for token in get("tokens") or ()]
    types = list(get("token_type") or [1] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise ValueError(
            f"the GGUF has {len(tokens)} {_KEY}tokens and {len(types)} {_KEY}token_type; want one for each"
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens) - len(set(tokens))} of the GGUF's {_KEY}tokens are there twice")
    tokenizer = builders[kind](metadata, tokens, types)
    config: dict[str, Any] = {"add_bos_token": bool(get("add_bos_token", kind == "llama" or _adds_bos(get("pre"))))}
    config["add_eos_token"] = bool(get("add_eos_token", False))
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, key in keys.items():
        i = get(f"{key}_token_id")
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            raise ValueError(f"{_KEY}{key}_token_id is {i}, and there are {len(tokens)} tokens")
        config[role] = tokens[i]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    stops = [i for i in (get("eot_token_id"), get("eom_token_id")) if i is not None]
    return HfTokenizer(folder_files(tokenizer, config, {}), stops)


def _adds_bos(pre: str | None) -> bool:
    return pre in ("llama-bpe", "llama3", "llama-v3")


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    pre = metadata.get(f"{_KEY}pre", "default")
    if pre not in _PRE:
        raise ValueError(f"{_KEY}pre is {pre!r}, a way to cut words that is not known; supported are {sorted(_PRE)}")
    merges = [tuple(str(merge).split(" ")) for merge in metadata.get(f"{_KEY}merges") or ()]
    vocab = {token: i for i, token in enumerate(tokens)}
    bad = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()), None)
    if not merges or bad is not None:
        raise ValueError(f"{_KEY}merges are damaged or missing: {bad}")
    by_type = {
        wanted: [t for t, found in zip(tokens, types) if found == wanted] for wanted in (_CONTROL, _USER_DEFINED)
    }
    return byte_level(
        vocab,
        merges,
        _PRE[pre],
        special=by_type[_CONTROL],
        user_defined=by_type[_USER_DEFINED],
        ignore_merges=pre in _IGNORE_MERGES,
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """A SentencePiece BPE: pieces by score, bytes for what has no piece."""
    scores = list(metadata.get(f"{_KEY}scores") or ())
    if len(scores) != len(tokens):
        raise ValueError(f"the GGUF has {len(scores)} {_KEY}scores and {len(tokens)} tokens; want one for each")
    ranked = {t: -score for t, score, kind in zip(tokens, scores, types) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    unknown = next((token for token, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            all_merges(ranked),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = bool(metadata.get(f"{_KEY}add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    control = [t for t, kind in zip(tokens, types) if kind in (_CONTROL, _UNKNOWN)]
    add_tokens(tokenizer, control, [t for t, kind in zip(tokens, types) if kind == _USER_DEFINED])
    return tokenizer
