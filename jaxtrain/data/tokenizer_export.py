"""SentencePiece models, our own and others, as a ``tokenizer.json`` with the same ids; and any tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, processors

from jaxtrain.data.tokenizer_base import TextTokenizer
from jaxtrain.data.tokenizer_convert import add_tokens, all_merges, folder_files

_SPACE_MARK = "\u2581"
_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('this chat format has the roles user and assistant, and no ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def export_files(tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face folder, by name, which ``transformers`` loads as this tokenizer."""
    return tokenizer.export_files()


def lossless_files(model: bytes) -> dict[str, bytes]:
    """The model of our own Tokenizer as ``tokenizer.json``, with our chat format as its template.

    Its pieces are spelled with plain spaces: SentencePiece's mark for a space, U+2581, would come out of a text that
    has that character, which our tokenizer spells in bytes.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    byte = [processor.is_byte(i) for i in range(len(pieces))]
    control = [processor.is_control(i) or processor.is_unknown(i) for i in range(len(pieces))]
    spelled = [p if c or b else p.replace(_SPACE_MARK, " ") for p, b, c in zip(pieces, byte, control, strict=True)]
    learned = [i for i in range(len(pieces)) if not byte[i] and not control[i]]
    merges = all_merges({spelled[i]: -processor.get_score(i) for i in learned})
    vocab = {piece: i for i, piece in enumerate(spelled)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    add_tokens(tokenizer, [piece for piece, is_control in zip(pieces, control, strict=True) if is_control])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", vocab["<|bos|>"])]
    )
    roles = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return folder_files(tokenizer, {**roles, "chat_template": _TEMPLATE}, {})


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol-buffer message: bytes, or an integer."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, message[at : at + size]
        at += size


def _normalizer(spec: Mapping[int, Any]) -> normalizers.Normalizer:
    """From a model's NormalizerSpec: 2 charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces."""
    steps: list[normalizers.Normalizer] = []
    if spec.get(2):
        steps.append(normalizers.Precompiled(spec[2]))
    if spec.get(4, 1):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.get(3, 1):
        steps.append(normalizers.Prepend(_SPACE_MARK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE_MARK)])


def sentencepiece_json(model: bytes) -> tokenizers.Tokenizer:
    """Somebody's SentencePiece model in the ``tokenizers`` library, without special tokens.

    The ids are the same, but for a mark or joiner after a character that the model's normalization rewrites ("²" and
    U+200D): that library's normalizer loses it.

    Raises ValueError for a model that is neither BPE nor unigram.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    parts = dict(_fields(model))
    trainer, normalizer = dict(_fields(parts[2])), dict(_fields(parts[3]))
    ids = range(processor.vocab_size())
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in ids}
    unknown, byte = processor.unk_id(), any(map(processor.is_byte, ids))
    if trainer.get(3, 1) == 1:
        inner: models.Model = models.Unigram(list(scores.items()), unk_id=unknown, byte_fallback=byte)
    elif trainer[3] == 2:
        learned = [i for i in ids if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))]
        merges = all_merges({processor.id_to_piece(i): -processor.get_score(i) for i in learned})
        vocab = {processor.id_to_piece(i): i for i in ids}
        name = processor.id_to_piece(unknown)
        inner = models.BPE(vocab, merges, unk_token=name, fuse_unk=True, byte_fallback=byte)
    else:
        raise ValueError("the SentencePiece model is neither a BPE nor a unigram model")
    tokenizer = tokenizers.Tokenizer(inner)
    tokenizer.normalizer = _normalizer(normalizer)
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.get(3, 1) else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
