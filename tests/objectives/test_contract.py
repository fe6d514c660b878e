"""What every objective of the table must keep: sums that add up, padding without a say, purity."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import OBJECTIVES
from jaxtrain.types import Loss, Outputs, Sum, Tokens


def add(trees):
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *trees)


def rows(batch, chosen):
    return jax.tree.map(lambda x: x[chosen], batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_a_documented_frozen_dataclass(name):
    cls, _ = OBJECTIVES[name]
    assert cls.__name__ == name
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    text = cls.__doc__
    assert re.search(r"\bL = ", text), "no formula"
    assert re.search(r"Source: .*\d{4}\.\d{5}", text, re.DOTALL), "no source"
    assert "Metrics" in text
    for field in dataclasses.fields(cls):
        assert field.name in text, f"{field.name} is not explained"


def test_returns_sums(any_objective, tools, evaluate):
    loss, _ = evaluate(any_objective, tools.batch(any_objective))
    assert isinstance(loss, Loss)
    assert all(isinstance(metric, Sum) for metric in loss.metrics.values())
    for leaf in jax.tree.leaves(loss):
        assert leaf.shape == () and leaf.dtype == np.float32
    assert loss.weight > 1, "a mean instead of a sum"


def test_metrics_are_documented(any_objective, tools, evaluate):
    loss, _ = evaluate(any_objective, tools.batch(any_objective))
    documents = type(any_objective).__doc__ + "".join(
        type(value).__doc__ for value in vars(any_objective).values() if dataclasses.is_dataclass(value)
    )
    assert [name for name in loss.metrics if f"``{name}``" not in documents] == []


def test_weight_and_metrics_have_no_gradient(any_objective, tools, lookup):
    apply, params = lookup
    batch = tools.batch(any_objective)

    def rest(params):
        loss = any_objective(apply, params, batch, None)
        return sum(jax.tree.leaves((loss.weight, loss.metrics)))

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(rest)(params)))


def test_nothing_to_learn_gives_zero(any_objective, tools, evaluate):
    loss, grads = evaluate(any_objective, tools.unweighted(tools.batch(any_objective)))
    for leaf in jax.tree.leaves((loss, grads)):
        assert not np.any(leaf)


def test_splits_and_order_add_up(any_objective, tools, evaluate, assert_close):
    """T5: 1×8 = 8×1 = 2×4 = permuted, with an empty microbatch thrown in."""
    batch = tools.batch(any_objective)
    loss, grads = evaluate(any_objective, batch)
    order = np.random.default_rng(1).permutation(8)
    splits = {
        "one by one": [rows(batch, [i]) for i in range(8)],
        "halves": [rows(batch, slice(0, 4)), rows(batch, slice(4, 8))],
        "permuted halves": [rows(batch, order[:4]), rows(batch, order[4:])],
    }
    for parts in splits.values():
        results = [evaluate(any_objective, part) for part in [*parts, tools.unweighted(parts[0])]]
        total, gradient = add([each[0] for each in results]), add([each[1] for each in results])
        for key, metric in loss.metrics.items():
            assert_close(total.metrics[key], metric)
        assert_close((total.total, total.weight), (loss.total, loss.weight))
        assert_close(gradient, grads)


@pytest.mark.parametrize(("left", "right"), [(40, 1), (1, 40)])
def test_padding_changes_nothing(any_objective, left, right, tools, evaluate, assert_close):
    """T3, with padding of the end-of-sequence id and rubbish in the rollout's padded entries."""
    batch = tools.batch(any_objective)
    loss, grads = evaluate(any_objective, batch)
    padded_loss, padded_grads = evaluate(any_objective, tools.pad(batch, left, right))
    assert_close((padded_loss.total, padded_loss.weight), (loss.total, loss.weight))
    for name, metric in loss.metrics.items():
        assert_close(padded_loss.metrics[name], metric)
    assert_close(padded_grads, grads)


def packed(batch, row_of):
    """Moves whole one-example rows of a batch, in order, into the rows ``row_of`` names."""
    tokens = batch if isinstance(batch, Tokens) else batch.tokens
    lengths = tokens.segments.sum(axis=1)
    T = max(sum(n for n, r in zip(lengths, row_of, strict=True) if r == row) for row in set(row_of))

    def move(x, number=None):
        out = np.zeros((len(set(row_of)), T), x.dtype)
        at, count = [0] * len(out), [0] * len(out)
        for i, (n, row) in enumerate(zip(lengths, row_of, strict=True)):
            count[row] += 1
            out[row, at[row] : at[row] + n] = count[row] if number else x[i, :n]
            at[row] += n
        return out

    moved = jax.tree.map(move, batch)
    segments = move(tokens.segments, number=True)
    if isinstance(batch, Tokens):
        return dataclasses.replace(moved, segments=segments)
    return dataclasses.replace(moved, tokens=dataclasses.replace(moved.tokens, segments=segments))


def test_packed_equals_unpacked(packable, tools, evaluate, assert_close):
    """T4, in loss, metrics and gradients; positions matter to this model, see the fixture."""
    batch = tools.batch(packable)
    together = packed(batch, row_of=(0, 1, 1, 0, 1, 2, 1, 2))
    tokens = together if isinstance(together, Tokens) else together.tokens
    assert tokens.segments.max() == 4
    starts = (np.diff(tokens.segments, axis=1, prepend=0) != 0) & (tokens.segments > 0)
    assert starts.sum() == 8 and not tokens.positions[starts].any()
    assert (np.diff(tokens.positions, axis=1)[(~starts & (tokens.segments > 0))[:, 1:]] == 1).all()

    loss, grads = evaluate(packable, batch)
    packed_loss, packed_grads = evaluate(packable, together)
    assert_close((packed_loss.total, packed_loss.weight), (loss.total, loss.weight))
    for name, metric in loss.metrics.items():
        assert_close(packed_loss.metrics[name], metric)
    assert_close(packed_grads, grads)


def test_a_missing_head_is_named(any_objective, tools):
    def headless(params, tokens, *, cache=None, rng=None):
        return Outputs(hidden=jnp.zeros((*tokens.ids.shape, 1)))

    with pytest.raises(ValueError, match=r"no '(lm|reward|value)' head: add"):
        any_objective(headless, {}, tools.batch(any_objective), None)
