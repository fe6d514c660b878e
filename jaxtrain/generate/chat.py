"""A conversation with a model, which reads every turn once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.data.chat import chat_ids
from jaxtrain.data.tokenizer_base import StreamDecoder
from jaxtrain.generate.engine import STREAM_CHUNK, Engine, sequence_keys
from jaxtrain.generate.requests import Request, bucket
from jaxtrain.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """text: without the stop token.  tokens: sampled, in ``seconds``, of which ``compile_seconds`` were compiling.

    read: tokens of the conversation that had to be read for it.  stopped: whether it ended by itself.
    """

    text: str
    tokens: int
    read: int
    stopped: bool
    seconds: float
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds - self.compile_seconds, 1e-9)


class Conversation:
    """Turns between a user and a model.

    engine: of one slot, without a mesh.  prepared: of ``engine.prepare``.  system: the first message, if any.

    Raises ValueError for a tokenizer that cannot write a conversation, or has no place for a system message.
    """

    def __init__(self, engine: Engine, prepared: Params, tokenizer: Any, *, system: str | None = None):
        assert engine.slots == 1, "a conversation takes one slot"
        self.engine, self.prepared, self.tokenizer = engine, prepared, tokenizer
        self.system = [] if system is None else [{"role": "system", "content": system}]
        chat_ids(tokenizer, [*self.system, {"role": "user", "content": ""}])  # may it be written at all?
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages: list[dict[str, str]] = list(self.system)
        self._slots: Any = None
        self._length, self._read = 0, np.zeros(0, np.int32)

    def ask(self, text: str, *, max_new_tokens: int, seed: int, show: Callable[[str], None]) -> Reply:
        """Answers ``text``, handing whole characters to ``show`` as they come.

        Of the conversation only what the model has not read yet is read.  An answer ends at the model's last position.

        Raises ValueError, with the conversation as it was, where that leaves no room for one.
        """
        began, stats = time.perf_counter(), dataclasses.replace(self.engine.stats)
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = np.array(chat_ids(self.tokenizer, asked), np.int32)
        most = self.engine.model.config.max_positions
        if len(ids) >= most:
            raise ValueError(
                f"the conversation has {len(ids)} tokens with this turn, and the model reads no more than"
                f" max_positions={most}; begin a new one with /reset, or say less"
            )
        limit = min(max_new_tokens, most - len(ids))
        self.engine.check(ids, limit, "the conversation")
        whole = Request(0, ids, limit, sequence_keys([seed])[0])
        kept = self._kept(ids, len(ids) + limit - 1)
        new = Request(0, ids[kept:], limit, whole.key)

        decoder = StreamDecoder(self.tokenizer)
        stop_ids = self.engine.sampling.stop_ids

        def told(_: int, tokens: np.ndarray) -> None:
            for token in tokens.tolist():
                if token not in stop_ids and (piece := decoder.push(token)):
                    show(piece)

        slots, self._slots = self._slots, None  # donated: gone if anything fails
        self._read = np.zeros(0, np.int32)
        owners: list[Request | None] = [new]
        slots = self.engine.extend(self.prepared, slots, kept, owners, whole, told)
        while any(owners):
            slots = self.engine.decode(self.prepared, slots, owners, told, budget=STREAM_CHUNK, free=1)
        if rest := decoder.finish():
            show(rest)
        written = new.written()
        # The last token was sampled, but not read.
        self._slots, self._read = slots, np.concatenate([ids, written.ids[:-1]])
        answer = self.tokenizer.decode(written.ids[:-1] if written.stopped else written.ids)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return Reply(
            text=answer,
            tokens=len(written.ids),
            read=len(new.prompt),
            stopped=written.stopped,
            seconds=time.perf_counter() - began,
            compile_seconds=self.engine.stats.compile_seconds - stats.compile_seconds,
        )

    def _kept(self, ids: np.ndarray, needed: int) -> int:
        """How many of ``ids`` the cache holds, in a cache of at least ``needed`` positions."""
        if self._slots is None or needed > self._length:
            self._length = bucket(needed, self.engine.model.config.max_positions)
            self._slots = self.engine.new_slots(1, self._length)
            return 0
        both = min(len(ids) - 1, len(self._read))  # the last one is read in any case: it says what comes next
        differ = np.flatnonzero(ids[:both] != self._read[:both])
        kept = int(differ[0]) if len(differ) else both
        # A layer with a window has overwritten what lay before it, and cannot go back to it.
        slots = min(
            shape[1]
            for layer in self.engine.model.config.spec().layers()
            for shape in layer.attention.cache_shapes(self._length).values()
        )
        return kept if kept == len(self._read) or len(self._read) <= slots else 0
