"""Completions of a batch of prompts with a key-value cache, as one compiled function.

B rows, P prompt slots, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtrain.generate.sampling import Sampling, sample
from jaxtrain.models.cache import init_cache
from jaxtrain.types import Array, Params, Tokens, record


@record
class Generated:
    """Sampled completions.

    ids: int32 ``[B, N]``; 0 after the end.
    logps: float32 ``[B, N]``, of each id under the distribution it was sampled from; 0 after the end.
    lengths: int32 ``[B]``, the number of sampled tokens, the stop token included.
    stopped: bool ``[B]``, whether the last of them is a stop token; the others were cut off at N.
    """

    ids: Array
    logps: Array
    lengths: Array
    stopped: Array


def make_generator(
    model, sampling: Sampling, max_new_tokens: int
) -> Callable[[Params, Array, Array, Array], Generated]:
    """Builds ``generate(params, prompt_ids, prompt_lengths, key) -> Generated``, jitted, once a shape.

    prompt_ids: int32 ``[B, P]``, padded on the left; row b's prompt is its last ``prompt_lengths[b]`` ids.
    prompt_lengths: int32 ``[B]``, at least 1.
    key: the token at step t of row b is drawn with a key folded from t and b alone, and padding is never
        attended to, so a row's completion is the same in any batch that holds it at the same place.

    The cache starts empty in every call: nothing computed with older parameters is kept.  Decoding ends early
    once every row has sampled a stop id.

    Raises ValueError, before anything is compiled, if P + ``max_new_tokens`` exceeds the model's positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    config = model.config
    beyond = [i for i in sampling.stop_ids if i >= config.vocab_size]
    if beyond:
        raise ValueError(f"Sampling.stop_ids {beyond} lie beyond the model's vocabulary of {config.vocab_size}")
    stop_ids = jnp.asarray(sampling.stop_ids, jnp.int32)

    def forward(params, ids_BT, positions_BT, segments_BT, cache):
        tokens = Tokens(
            ids=ids_BT,
            targets=jnp.zeros_like(ids_BT),
            weights=jnp.zeros(ids_BT.shape, jnp.float32),
            positions=positions_BT,
            segments=segments_BT,
        )
        outputs = model.apply(params, tokens, cache=cache)
        return outputs.logits[:, -1], outputs.cache

    def generate(params: Params, prompt_ids: Array, prompt_lengths: Array, key: Array) -> Generated:
        batch, width = prompt_ids.shape
        if width + max_new_tokens > config.max_positions:
            raise ValueError(
                f"a prompt of up to {width} tokens and {max_new_tokens} new ones make"
                f" {width + max_new_tokens}, more than the model's max_positions={config.max_positions};"
                " shorten one of them"
            )

        def draw(t, logits_BV, going_B):
            ids_B, logps_B = sample(jax.random.fold_in(key, t), logits_BV, sampling)
            return jnp.where(going_B, ids_B, 0), jnp.where(going_B, logps_B, 0.0)

        positions_BP = jnp.arange(width, dtype=jnp.int32) - (width - prompt_lengths[:, None])
        logits_BV, cache = forward(
            params,
            prompt_ids.astype(jnp.int32),
            jnp.maximum(positions_BP, 0),
            (positions_BP >= 0).astype(jnp.int32),
            # The last sampled token is never read.
            init_cache(config, batch, width + max_new_tokens - 1),
        )
        everyone = jnp.ones((batch,), bool)
        ids_B, logps_B = draw(0, logits_BV, everyone)
        generated = Generated(
            ids=jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(ids_B),
            logps=jnp.zeros((batch, max_new_tokens), jnp.float32).at[:, 0].set(logps_B),
            lengths=jnp.ones((batch,), jnp.int32),
            stopped=jnp.isin(ids_B, stop_ids),
        )

        def unfinished(carry):
            t, _, _, generated = carry
            return (t < max_new_tokens) & ~jnp.all(generated.stopped)

        def step(carry):
            t, ids_B, cache, generated = carry
            going_B = ~generated.stopped
            logits_BV, cache = forward(
                params,
                ids_B[:, None],
                (prompt_lengths + t - 1)[:, None].astype(jnp.int32),
                going_B[:, None].astype(jnp.int32),
                cache,
            )
            ids_B, logps_B = draw(t, logits_BV, going_B)
            generated = Generated(
                ids=generated.ids.at[:, t].set(ids_B),
                logps=generated.logps.at[:, t].set(logps_B),
                lengths=generated.lengths + going_B,
                stopped=generated.stopped | (going_B & jnp.isin(ids_B, stop_ids)),
            )
            return t + 1, ids_B, cache, generated

        return jax.lax.while_loop(unfinished, step, (jnp.int32(1), ids_B, cache, generated))[3]

    return jax.jit(generate)
