"""Generation: prompts read in batches, tokens sampled in slots that are refilled as rows finish.

Arrays have one of a few sizes (``bucket``, ``batch_bucket``), so that once each has been met nothing is compiled.

Letters: B slots, b prompts read together, P prompt positions, N likeliest ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.generate.programs import CHUNK, Sampled, Slots, programs
from jaxtrain.generate.requests import Request, Stats, Written, batch_bucket, bucket
from jaxtrain.generate.sampling import Sampling
from jaxtrain.sharding import ways
from jaxtrain.types import Params

STREAM_CHUNK = 4  # steps between two looks where somebody reads along
PREFILL_TOKENS = 8192  # prompts are read in groups of at most this many positions: a bound on activations


def prefill_rows(width: int, unit: int, slots: int) -> int:
    """How many prompts of ``width`` positions are read together where enough wait: the most that ``batch_bucket``
    allows within PREFILL_TOKENS, and at least ``unit``."""
    size = batch_bucket(1, unit, slots)
    while size < slots and (larger := batch_bucket(size + 1, unit, slots)) * width <= PREFILL_TOKENS:
        size = larger
    return size


class Engine:
    """Writes after prompts with one model and one way of sampling.

    slots: rows decoded together, at most.  top: how many of the likeliest ids to report of every step.
    refill: with prompts waiting, how many rows must have finished before their slots are filled again; 0: an eighth of
        the slots.  1 decodes the fewest steps; more reads prompts in larger batches.
    mesh: where the parameters live.  Slots are split over its row axes and heads over ``tensor``; their number is
        rounded up to a multiple of the row axes' devices.

    Raises ValueError for a model that cannot write, and for stop ids beyond its vocabulary.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        *,
        slots: int = 32,
        top: int = 0,
        refill: int = 0,
        int8: bool = False,
        mesh: Mesh | None = None,
    ):
        config = model.config
        if "lm" not in config.heads:
            raise ValueError(f"a model with the heads {config.heads} cannot write: it has no 'lm' head")
        beyond = [i for i in sampling.stop_ids if i >= config.vocab_size]
        if beyond:
            raise ValueError(f"Sampling.stop_ids {beyond} lie beyond the model's vocabulary of {config.vocab_size}")
        if slots < 1:
            raise ValueError(f"slots must be at least 1; got {slots}")
        self.model, self.sampling, self.top, self.int8, self.mesh = model, sampling, top, int8, mesh
        self.unit = 1 if mesh is None else ways(mesh, model.rules.spec(("batch",))[0])
        self.slots = -(-slots // self.unit) * self.unit
        self.refill = min(refill or max(1, self.slots // 8), self.slots)
        self.stats = Stats()
        self._programs = programs(model, sampling, top)

    def prepare(self, params: Params) -> Params:
        """Parameters for ``generate``: once after every update of the weights.  See ``prepare.prepare``."""
        return self._call("prepare", params, self.int8)[0]

    def generate(
        self,
        prepared: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        keys: np.ndarray,
        on_tokens: Callable[[int, np.ndarray], None] | None = None,
    ) -> list[Written]:
        """Writes after every prompt; what is written after one depends on it and its key alone.

        prepared: of ``prepare``.  prompts: ids, of any lengths from 1.
        keys: uint32 ``[len(prompts), *]``, of ``sequence_keys`` or ``split_keys``.
        on_tokens: called with a prompt's number and ids, as they come.

        Raises ValueError, before anything is computed, for an empty prompt, ids beyond the vocabulary, and prompts that
        leave fewer than ``max_new_tokens`` of the model's positions.
        """
        requests = [
            Request(i, self.check(prompt, max_new_tokens, f"prompt {i}"), max_new_tokens, key)
            for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
        ]
        if not requests:
            return []
        most = self.model.config.max_positions
        # The last sampled token is never read.
        length = bucket(max(len(r.prompt) for r in requests) + max_new_tokens - 1, most)
        B = batch_bucket(len(requests), self.unit, self.slots)
        waiting = deque(requests)
        owners: list[Request | None] = [None] * B
        told = on_tokens or (lambda number, ids: None)
        slots = self.new_slots(B, length)
        while waiting or any(owners):
            while waiting and None in owners:
                slots = self._admit(prepared, slots, owners, waiting, told)
            if any(owners):
                slots = self.decode(
                    prepared,
                    slots,
                    owners,
                    told,
                    budget=STREAM_CHUNK if on_tokens else CHUNK,
                    free=min(self.refill, len(waiting)) if waiting else B,
                )
        return [request.written() for request in requests]

    def check(self, prompt: Sequence[int], max_new_tokens: int, name: str) -> np.ndarray:
        """The prompt as an array.  Raises ValueError as ``generate`` does."""
        config = self.model.config
        ids = np.asarray(prompt, np.int32)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        if len(ids) == 0:
            raise ValueError(f"{name} has no tokens: give every prompt at least one token")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise ValueError(
                f"{name} has the id {wrong}, beyond the model's vocabulary of {config.vocab_size}: tokenizer and"
                " model do not belong together"
            )
        if len(ids) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"{name} of {len(ids)} tokens and {max_new_tokens} new ones make {len(ids) + max_new_tokens}, more"
                f" than the model's max_positions={config.max_positions}; shorten one of them"
            )
        return ids

    def new_slots(self, B: int, length: int) -> Slots:
        """Empty slots for B rows of up to ``length`` tokens."""
        return self._call("new", B, length)[0]

    def extend(
        self,
        prepared: Params,
        slots: Slots,
        kept: int,
        owners: list[Request | None],
        whole: Request,
        told: Callable[[int, np.ndarray], None],
    ) -> Slots:
        """Reads the owner's prompt after the first ``kept`` tokens of a single slot, which together make ``whole``."""
        (new,) = owners
        ids = np.zeros((1, bucket(len(new.prompt), self.model.config.max_positions)), np.int32)
        ids[0, : len(new.prompt)] = new.prompt
        columns = self._columns([new], [whole], 1)
        (slots, first), seconds = self._call("extend", prepared, slots, np.full(1, kept, np.int32), ids, *columns)
        self._finish_reading(owners, [0], [new], first, seconds, told)
        return slots

    def decode(
        self,
        prepared: Params,
        slots: Slots,
        owners: list[Request | None],
        told: Callable[[int, np.ndarray], None],
        *,
        budget: int,
        free: int,
    ) -> Slots:
        """At most ``budget`` steps, fewer once ``free`` rows are; takes the owners of finished rows off the list."""
        (slots, out, steps), seconds = self._call("decode", prepared, slots, np.int32(budget), np.int32(free))
        began = time.perf_counter()
        fields, steps = _fields(out), int(steps)
        self.stats.decode_seconds += time.perf_counter() - began + seconds
        self.stats.decode_steps += steps
        for row, request in enumerate(owners):
            if request is not None and steps:
                self._take(owners, row, request, {name: x[:steps, row] for name, x in fields.items()}, told)
        return slots

    def _take(self, owners, row, request, sampled, told) -> None:
        ids = request.take(sampled, self.sampling.stop_ids)
        self.stats.tokens += len(ids)
        told(request.number, ids)
        owners[row] = None if request.done else request

    def _admit(self, prepared, slots, owners, waiting, told) -> Slots:
        """Reads as many waiting prompts as there are free rows, within PREFILL_TOKENS."""
        rows = [row for row, owner in enumerate(owners) if owner is None]
        width = bucket(len(waiting[0].prompt), self.model.config.max_positions)
        taken: list[Request] = []
        while waiting and len(taken) < len(rows):
            wider = max(width, bucket(len(waiting[0].prompt), self.model.config.max_positions))
            if taken and batch_bucket(len(taken) + 1, self.unit, self.slots) * wider > PREFILL_TOKENS:
                break
            width = wider
            taken.append(waiting.popleft())
        b = batch_bucket(len(taken), self.unit, self.slots)
        ids = np.zeros((b, width), np.int32)
        for row, request in zip(ids, taken, strict=False):
            row[: len(request.prompt)] = request.prompt
        target = np.full(b, len(owners), np.int32)  # past the end: padding goes nowhere
        target[: len(taken)] = rows[: len(taken)]
        (fresh, first), seconds = self._call("read", prepared, ids, *self._columns(taken, taken, b))
        slots, more = self._call("put", slots, target, fresh)
        self._finish_reading(owners, rows, taken, first, seconds + more, told)
        return slots

    def _finish_reading(self, owners, rows, taken, first, seconds, told) -> None:
        """Waits for the first tokens, and hands them out."""
        began = time.perf_counter()
        fields = _fields(first)
        self.stats.prefill_seconds += time.perf_counter() - began + seconds
        self.stats.prefills += 1
        self.stats.prompt_tokens += sum(len(request.prompt) for request in taken)
        for i, (row, request) in enumerate(zip(rows, taken, strict=False)):
            self._take(owners, row, request, {name: x[i : i + 1] for name, x in fields.items()}, told)

    def _columns(self, read: Sequence[Request], whole: Sequence[Request], b: int) -> tuple[np.ndarray, ...]:
        """lengths, limits, keys and seen of ``programs``: of what is read now, after what was read before."""
        lengths, limits = np.zeros(b, np.int32), np.zeros(b, np.int32)
        keys = np.zeros((b, *read[0].key.shape), np.uint32)
        penalised = self.sampling.repetition_penalty != 1
        seen = np.zeros((b, self.model.config.vocab_size if penalised else 0), bool)
        for i, (request, full) in enumerate(zip(read, whole, strict=True)):
            lengths[i], limits[i], keys[i] = len(request.prompt), request.limit, request.key
            if penalised:
                seen[i, full.prompt] = True
        return lengths, limits, keys, seen

    def _call(self, name: str, *args: Any) -> tuple[Any, float]:
        """A program's results, and the seconds until it was under way, compiling apart."""
        program = self._programs[name]
        known, began = program._cache_size(), time.perf_counter()
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            results = program(*args)
        seconds = time.perf_counter() - began
        if program._cache_size() > known:
            self.stats.compilations += 1
            self.stats.compile_seconds += seconds
            seconds = 0.0
        return results, seconds


def sequence_keys(seeds: Sequence[int]) -> np.ndarray:
    """uint32 ``[n, *]``: the data of the PRNG key of each seed."""
    padded = np.zeros(batch_bucket(len(seeds), 16, 2**31), np.uint32)
    padded[: len(seeds)] = seeds
    return np.asarray(_seeded(padded))[: len(seeds)]


def split_keys(key: jax.Array, count: int) -> np.ndarray:
    """The same for ``count`` sequences of one key; the first ones do not depend on how many there are."""
    return np.asarray(_folded(key, np.arange(batch_bucket(count, 16, 2**31))))[:count]


_seeded = jax.jit(jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed))))
_folded = jax.jit(jax.vmap(lambda key, i: jax.random.key_data(jax.random.fold_in(key, i)), in_axes=(None, 0)))


def _fields(sampled: Sampled) -> dict[str, np.ndarray]:
    """On the host, by name."""
    named = {field.name: getattr(sampled, field.name) for field in dataclasses.fields(sampled)}
    return {name: np.asarray(values) for name, values in named.items() if values is not None}
