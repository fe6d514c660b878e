"""From sampled ids to the rows a policy-gradient update reads, and the gate between sampler and trainer.

B rows, P prompt slots, N sampled tokens at most, T = P + N.  A row is padding, prompt, completion, padding.
Position t reads id t and is about the action ``targets[t]``, the id after it; so the actions of a completion
of n tokens stand at positions P - 1 to P + n - 2, and position P + n - 1 has read the whole of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.distributed import fetch
from jaxtrain.generate.engine import Engine, split_keys
from jaxtrain.generate.sampling import Sampling
from jaxtrain.objectives.common import kl_estimate, token_logps, weighted_total
from jaxtrain.rl.advantages import end_scores, gae, token_rewards, whiten
from jaxtrain.rl.config import PPOConfig
from jaxtrain.types import Array, Params, Rollout, Tokens, record

Place = Callable[[Any], Any]  # puts a pytree of NumPy arrays on the devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """The prompts of one iteration.

    ids: int32 ``[B, P]``, padded on the left.  lengths: int32 ``[B]``, at least 1.
    rows: the prompts' other columns, for the rewards; ``{}`` for each where there are none.
    """

    ids: Array
    lengths: Array
    rows: Sequence[Mapping[str, Any]] | None = None


@record
class Generated:
    """Sampled completions, as NumPy arrays.

    ids: int32 ``[B, N]``; 0 after the end.
    logps: float32 ``[B, N]``, of each id under the distribution it was sampled from; 0 after the end.
    lengths: int32 ``[B]``, the number of sampled tokens, the stop token included.
    stopped: bool ``[B]``, whether the last of them is a stop token; the others were cut off at N.
    """

    ids: Array
    logps: Array
    lengths: Array
    stopped: Array


def completion_ids(generated: Generated) -> list[list[int]]:
    """The sampled ids of every row, the stop token included, without what follows the end."""
    return [row[:length].tolist() for row, length in zip(generated.ids, generated.lengths, strict=True)]


def prompt_lists(ids: Array, lengths: Array) -> list[list[int]]:
    """Rows padded on the left, without their padding."""
    ids, lengths = np.asarray(ids), np.asarray(lengths)
    return [row[len(row) - length :].tolist() for row, length in zip(ids, lengths, strict=True)]


def make_sampler(
    model: Any, sampling: Sampling, max_new_tokens: int, *, slots: int = 0, mesh: Mesh | None = None
) -> Callable[[Params, Array, Array, Array], Generated]:
    """Builds ``sampler(params, prompt_ids, prompt_lengths, key) -> Generated`` for samples to train on.

    prompt_ids: int32 ``[B, P]``, padded on the left; row b's prompt is its last ``prompt_lengths[b]`` ids.
    key: row b samples with ``fold_in(key, b)``, so that its completion depends on that, its prompt and the parameters.
    slots: rows sampled together, the next prompt taking the place of a finished one; 0: all.

    Nothing computed with older parameters is kept.  Refuses, with ValueError, what the trainer could not score: its
    log-probabilities are those of the whole softmax at the sampling temperature; ids that a filter excludes or a
    penalty moves would have another probability in the one than in the other, and greedy decoding has no distribution.
    """
    if sampling.temperature == 0:
        raise ValueError("cannot train on greedy samples (temperature 0): set a temperature above 0")
    if not sampling.plain:
        raise ValueError(
            f"cannot train on samples of top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p},"
            f" repetition_penalty={sampling.repetition_penalty}: the update's probability ratios would be taken against"
            " another distribution than the one sampled from. Use top_k=0, top_p=1, min_p=0 and repetition_penalty=1"
        )
    engines: dict[int, Engine] = {}

    def sampler(params: Params, prompt_ids: Array, prompt_lengths: Array, key: Array) -> Generated:
        rows = prompt_lists(prompt_ids, prompt_lengths)
        together = min(slots or len(rows), len(rows))
        if together not in engines:
            engines[together] = Engine(model, sampling, slots=together, mesh=mesh)
        engine = engines[together]
        written = engine.generate(
            engine.prepare(params), rows, max_new_tokens=max_new_tokens, keys=split_keys(key, len(rows))
        )
        ids = np.zeros((len(rows), max_new_tokens), np.int32)
        logps = np.zeros(ids.shape, np.float32)
        for row, one in enumerate(written):
            ids[row, : len(one.ids)], logps[row, : len(one.ids)] = one.ids, one.logps
        return Generated(
            ids=ids,
            logps=logps,
            lengths=np.array([len(one.ids) for one in written], np.int32),
            stopped=np.array([one.stopped for one in written]),
        )

    return sampler


def completion_tokens(prompts: PromptBatch, generated: Generated) -> Tokens:
    """Prompts and completions as rows of NumPy arrays ``[B, P + N]``; weights are 1 on the sampled tokens."""
    prompt_ids, prompt_lengths = np.asarray(prompts.ids), np.asarray(prompts.lengths)
    ids, lengths = generated.ids, generated.lengths
    width, total = prompt_ids.shape[1], prompt_ids.shape[1] + ids.shape[1]
    slots = np.arange(total, dtype=np.int32)
    starts, ends = width - prompt_lengths[:, None], width + lengths[:, None]
    valid = (slots >= starts) & (slots < ends)
    rows = np.where(valid, np.concatenate([prompt_ids, ids], axis=1), 0).astype(np.int32)
    return Tokens(
        ids=rows,
        targets=np.pad(rows[:, 1:], ((0, 0), (0, 1))),
        weights=((slots >= width - 1) & (slots < ends - 1)).astype(np.float32),
        positions=np.where(valid, slots - starts, 0).astype(np.int32),
        segments=valid.astype(np.int32),
    )


@partial(jax.jit, static_argnames=("apply", "temperature"))
def score_rows(apply, temperature: float, params: Params, tokens: Tokens) -> tuple[Array | None, Array | None]:
    """What ``score`` computes of the rows of one call, on the devices."""
    outputs = apply(params, tokens)
    logps = None
    if outputs.lm is not None:
        logps = token_logps(outputs.lm, tokens.targets, temperature) * tokens.weights
    return logps, outputs.values


def score(
    model: Any,
    params: Params,
    tokens: Tokens,
    *,
    temperature: float,
    rows: int,
    place: Place = lambda batch: batch,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The model's log-probabilities of the sampled tokens, 0 elsewhere, and its values: float32 ``[B, T]``.

    ``rows`` at a time: give the update's minibatch, so that old and new log-probabilities come from programs
    of the same shapes.  None for a head the model lacks.
    """
    parts = [
        score_rows(model.apply, temperature, params, place(take_rows(tokens, chunk, rows)))
        for chunk in chunks(np.arange(len(tokens.ids)), rows)
    ]
    logps, values = (None if one[0] is None else [fetch(x) for x in one] for one in zip(*parts, strict=True))
    count = len(tokens.ids)
    return tuple(None if one is None else np.concatenate(one)[:count] for one in (logps, values))


def chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    """``order`` in pieces of ``size``, the last one perhaps smaller."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def take_rows(batch: Rollout | Tokens, chosen: np.ndarray, size: int) -> Any:
    """The chosen rows of every array, and copies of the first of them with weight 0 up to ``size`` rows."""
    assert 0 < len(chosen) <= size
    index = np.concatenate([chosen, np.repeat(chosen[:1], size - len(chosen))])
    taken = jax.tree.map(lambda x: x[index], batch)
    real = (np.arange(size) < len(chosen)).astype(np.float32)[:, None]
    if isinstance(taken, Tokens):
        return dataclasses.replace(taken, weights=taken.weights * real)
    return dataclasses.replace(taken, tokens=dataclasses.replace(taken.tokens, weights=taken.tokens.weights * real))


def sampler_logps(generated: Generated, tokens: Tokens) -> np.ndarray:
    """The sampler's log-probabilities in the rows' places, float32 ``[B, T]``."""
    logps = generated.logps
    before = tokens.ids.shape[1] - logps.shape[1] - 1
    return np.pad(logps, ((0, 0), (before, 1))) * tokens.weights


def gate_difference(sampler: np.ndarray, trainer: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Mean and maximum of |sampler - trainer| over the sampled tokens, in nats."""
    difference = np.abs(sampler.astype(np.float64) - trainer)[weights > 0]
    return float(difference.mean()), float(difference.max())


def check_gate(mean: float, maximum: float, threshold: float) -> None:
    """Raises ValueError unless the mean difference is at most ``threshold`` (NaN never is)."""
    if mean <= threshold:
        return
    raise ValueError(
        f"sampler and trainer disagree on the log-probabilities of the first rollout: {mean:.3g} nats a"
        f" token on average, at most {maximum:.3g}, above gate_threshold={threshold:g}. Probability ratios"
        " would be wrong from the first update on. Likely causes: another temperature, or top-k or top-p,"
        " in one of the two; parameters or a cached prefix that are not the trainer's current ones; wrong"
        " positions or visible padding; ids that were decoded and encoded again; bfloat16 or a lower matmul"
        " precision in one of the two (float32 differs by about 1e-6, bfloat16 by about 1e-2: only there"
        " may the threshold be raised)"
    )


@partial(jax.jit, static_argnames="config")
def estimate_advantages(
    config: PPOConfig,
    scores: Array,
    stopped: Array,
    weights: Array,
    old_logps: Array,
    reference_logps: Array,
    values: Array,
    end_values: Array,
    kl_coef: Array,
) -> tuple[Array, Array, dict[str, Array]]:
    """Advantages and returns, ``[B, T]``, and the ``objective/`` metrics, means over the trained rows.

    scores, stopped, end_values: ``[B]``, the last being the critic's value once the whole completion is read.
    weights, old_logps, reference_logps, values: ``[B, T]``.
    """
    in_reward = config.kl_placement == "reward"
    marked = end_scores(
        scores,
        stopped,
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_score=config.missing_eos_score,
    )
    rewards, mask = token_rewards(
        marked,
        old_logps,
        reference_logps,
        weights,
        kl_coef=kl_coef if in_reward else 0.0,
        kl_estimator=config.kl_estimator,
    )
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    bootstrap = jnp.where(stopped, 0.0, end_values) if config.truncation == "bootstrap" else None
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)

    trained_B = (weights.sum(axis=1) > 0).astype(jnp.float32)
    kl_B = weighted_total(kl_estimate(old_logps, reference_logps, config.kl_estimator), weights, axis=1)
    penalty_B = kl_coef * kl_B if in_reward else jnp.zeros_like(kl_B)

    def mean(x_B):
        return weighted_total(x_B, trained_B) / jnp.maximum(trained_B.sum(), 1.0)

    metrics = {
        "objective/scores": mean(marked),
        "objective/kl": mean(kl_B),
        "objective/non_score_reward": -mean(penalty_B),
        "objective/rlhf_reward": mean(marked - penalty_B),
        "objective/entropy": -mean(weighted_total(old_logps, weights, axis=1)),
    }
    return advantages, returns, metrics
