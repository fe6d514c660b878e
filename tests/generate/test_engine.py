from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtrain.generate.engine import Engine, sequence_keys, split_keys
from jaxtrain.generate.requests import batch_bucket, bucket
from jaxtrain.generate.sampling import Sampling
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.models.cache import cache_bytes, init_cache
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings

N = 9
PROMPTS = [[5, 3, 9], [7], [1, 2, 3, 4, 5, 6], [9, 9], [8, 1, 4, 2], [3], [11, 12, 13, 14, 15], [2, 20]]
KEYS = sequence_keys(range(len(PROMPTS)))


def write(model, params, prompts=PROMPTS, keys=KEYS, *, limit=N, sampling=None, **settings):
    engine = Engine(model, sampling or Sampling(stop_ids=(4, 17)), **settings)
    return engine.generate(engine.prepare(params), prompts, max_new_tokens=limit, keys=keys[: len(prompts)])


def ids_of(written):
    return [one.ids.tolist() for one in written]


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "slots"), [("model", 8), ("model", 1), ("windowed", 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_equals_teacher_forcing_also_after_a_weight_update(
    name, slots, temperature, params, perturbed, teacher_forced, request
):
    model = request.getfixturevalue(name)
    engine = Engine(model, Sampling(temperature=temperature, stop_ids=(4, 17)), slots=slots)
    logps = []
    for weights in (params, perturbed):
        written = engine.generate(engine.prepare(weights), PROMPTS, max_new_tokens=16, keys=KEYS)
        assert len({len(one.ids) for one in written}) > 1, "the rows must end at different steps"
        expected = teacher_forced(model, weights, PROMPTS, ids_of(written), temperature)
        for one, (logp, _) in zip(written, expected, strict=True):
            np.testing.assert_allclose(one.logps, logp, atol=1e-5)
        logps.append(written[0].logps[0])
    assert abs(logps[0] - logps[1]) > 1e-3, "the update must matter"


def test_a_sequence_depends_on_its_prompt_and_key_alone(model, params):
    """Whatever the batch, the slot, the order, the padding and the other prompts are."""
    together = write(model, params)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    others = [
        write(model, params, [PROMPTS[i] for i in order], KEYS[order], slots=3, refill=1),
        write(model, params, [PROMPTS[i] for i in order], KEYS[order], slots=2, refill=2),
    ]
    alone = [write(model, params, [PROMPTS[i]], KEYS[i : i + 1])[0] for i in order]
    for written in (*others, alone):
        for i, one in zip(order, written, strict=True):
            np.testing.assert_array_equal(one.ids, together[i].ids)
            np.testing.assert_allclose(one.logps, together[i].logps, atol=1e-5)
            assert one.stopped == together[i].stopped
    longer = write(model, params, [*PROMPTS[:2], [1] * 20], KEYS[[0, 1, 7]])
    assert ids_of(longer)[:2] == ids_of(together)[:2]
    assert ids_of(write(model, params, PROMPTS, KEYS[::-1])) != ids_of(together)


def test_split_keys_do_not_depend_on_their_number():
    key = jax.random.key(3)
    np.testing.assert_array_equal(split_keys(key, 7)[:3], split_keys(key, 3))
    assert len(np.unique(split_keys(key, 100), axis=0)) == 100
    np.testing.assert_array_equal(sequence_keys([5, 9])[1], jax.random.key_data(jax.random.key(9)))


def test_greedy_is_the_argmax_of_the_full_forward_pass(model, params, teacher_forced):
    written = write(model, params, sampling=Sampling(temperature=0.0), limit=20)
    for one, (logps, logits) in zip(written, teacher_forced(model, params, PROMPTS, ids_of(written)), strict=True):
        assert logits.argmax(axis=-1).tolist() == one.ids.tolist()
        np.testing.assert_allclose(one.logps, logps, atol=1e-5)


def test_stop_ids_and_limits(model, params):
    free = write(model, params, sampling=Sampling())
    assert all(len(one.ids) == N and not one.stopped for one in free)
    stop = tuple(np.argsort(-np.bincount(np.concatenate([one.ids for one in free])), stable=True)[:2].tolist())
    seen = set()
    for whole, one in zip(free, write(model, params, sampling=Sampling(stop_ids=stop)), strict=True):
        ends = [i for i, token in enumerate(whole.ids.tolist()) if token in stop]
        length = ends[0] + 1 if ends else N
        assert one.ids.tolist() == whole.ids[:length].tolist() and one.stopped == bool(ends)
        assert len(one.logps) == length
        seen.add(int(one.ids[-1]) if ends else None)
    assert seen == {*stop, None}, "the seed must exercise both stop ids and a row cut off"


def test_decoding_ends_when_every_row_has_stopped(model, params):
    engine = Engine(model, Sampling(stop_ids=tuple(range(24))))
    written = engine.generate(engine.prepare(params), PROMPTS, max_new_tokens=N, keys=KEYS)
    assert all(one.stopped and len(one.ids) == 1 for one in written) and engine.stats.decode_steps == 0
    engine = Engine(model, Sampling())
    engine.generate(engine.prepare(params), PROMPTS, max_new_tokens=N, keys=KEYS)
    assert engine.stats.decode_steps == N - 1 and engine.stats.tokens == N * len(PROMPTS)


@pytest.fixture(scope="module")
def counting():
    """A model that writes its prompt's number down to 0: prompt n takes n tokens after it, whatever is sampled."""
    model = build_model(
        DecoderConfig(
            vocab_size=32, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, d_ff=8, max_positions=40,
            tie_embeddings=False,
        )
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    still = {"out": {"kernel": 0.0 * params["layers"]["attention"]["out"]["kernel"]}}
    params["layers"]["attention"] |= still
    params["layers"]["mlp"]["down"] = {"kernel": 0.0 * params["layers"]["mlp"]["down"]["kernel"]}
    params["embed"]["embedding"] = np.eye(32, dtype=np.float32)
    params["lm_head"]["kernel"] = 10.0 * np.roll(np.eye(32, dtype=np.float32), -1, axis=1)
    return model, params


def test_refilling_takes_the_steps_it_should(counting):
    """Two slots.  One long text beside many short ones: as many steps as the long one takes, not one long batch after
    another; and with two long ones, no more than a schedule by hand."""
    model, params = counting

    def steps(numbers, refill=1):
        engine = Engine(model, Sampling(temperature=0.0, stop_ids=(0,)), slots=2, refill=refill)
        prompts = [[number] for number in numbers]
        keys = sequence_keys(range(len(prompts)))
        written = engine.generate(engine.prepare(params), prompts, max_new_tokens=32, keys=keys)
        assert ids_of(written) == [list(range(number - 1, -1, -1)) for number in numbers]
        return engine.stats.decode_steps

    # A text of n tokens takes n - 1 steps: its first token comes of reading the prompt.
    assert steps([31, 6, 6, 6, 6, 6, 6]) == 30  # 6 x 5 = 30 steps in the other slot, at the same time
    assert steps([31, 6, 6, 6, 6, 6, 6], refill=2) > 30
    assert steps([11, 3, 11, 3, 11, 3]) == 10 + 10 + 2  # one slot 10, 2, 10; the other 2, 10, ...: 22
    batch_by_batch = 3 * 10
    assert steps([11, 3, 11, 3, 11, 3]) < batch_by_batch
    assert steps([1, 1, 1]) == 0


def test_nothing_compiles_in_steady_state(model, params):
    """Prompts and batches of many sizes, once their buckets have been met; new weights and another engine as well."""
    compiled = []

    def listen(name: str, seconds: float, **_) -> None:
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    rng = np.random.default_rng(0)
    updated = jax.tree.map(lambda x: x * 1.5, params)

    def run(engine, weights, count):
        # 10 to 16 tokens and 8 new ones: one bucket of prompts, one of caches.
        prompts = [rng.integers(0, 24, rng.integers(10, 17)).tolist() for _ in range(count)]
        engine.generate(engine.prepare(weights), prompts, max_new_tokens=8, keys=sequence_keys(range(count)))

    def engine():
        return Engine(model, Sampling(stop_ids=(4,), temperature=0.9), slots=2, refill=1)

    first = engine()
    for count in (1, 2, 3):  # one row, two, and a third in the place of one of them
        run(first, params, count)
    before, second = first.stats.compilations, engine()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for count in (5, 2, 1, 7, 3, 2, 4):
            run(first, params, count)
            run(second, updated, count)
        assert compiled == []
        assert first.stats.compilations == before and second.stats.compilations == 0
        first.generate(first.prepare(params), [[1] * 30], max_new_tokens=8, keys=sequence_keys([0]))
        assert compiled and first.stats.compilations > before, "another bucket must be seen to compile"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_buckets():
    assert [bucket(n, 100) for n in (1, 16, 17, 24, 25, 33, 48, 49, 64, 65, 97, 100)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 64, 96, 100, 100,
    ]  # fmt: skip
    assert all(n <= bucket(n, 5000) <= max(16, 1.5 * n) for n in range(1, 5000))
    assert [batch_bucket(n, 1, 6) for n in (1, 2, 3, 5, 6, 9)] == [1, 2, 4, 6, 6, 6]
    assert [batch_bucket(n, 8, 32) for n in (1, 8, 9, 40)] == [8, 8, 16, 32]


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_writes_the_same(axes):
    model = build_model(
        DecoderConfig(
            vocab_size=32, num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, d_ff=48, max_positions=32,
            init_std=0.3,
        )
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    expected = write(model, params, slots=4, sampling=Sampling(stop_ids=(4,)))
    mesh = make_mesh(MeshConfig(**axes))
    shared = jax.device_put(params, param_shardings(model.axes, model.shapes(), mesh, model.rules))
    engine = Engine(model, Sampling(stop_ids=(4,)), slots=4, refill=1, mesh=mesh)
    prepared = engine.prepare(shared)
    kernel = prepared["layers"][0]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == 32 // axes.get("fsdp", 1)
    slots = engine.new_slots(8, 16)
    keys = slots.cache.layers[0]["keys"]
    rows = axes.get("fsdp", 1) * axes.get("data", 1)
    assert keys.sharding.shard_shape(keys.shape) == (8 // rows, 4 // axes.get("tensor", 1), 16, 8)
    written = engine.generate(prepared, PROMPTS, max_new_tokens=N, keys=KEYS)
    assert ids_of(written) == ids_of(expected)
    for one, other in zip(written, expected, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_a_windowed_cache_is_as_large_as_its_windows(windowed, model):
    """Half of the layers keep 6 of 48 tokens: 2 heads of 8 numbers of 4 bytes, for keys and for values."""
    one = 2 * 8 * 4 * 2
    assert cache_bytes(init_cache(model.config, 3, 48).layers) == 3 * 2 * 48 * one
    assert cache_bytes(init_cache(windowed.config, 3, 48).layers) == 3 * (48 + 6) * one
    slots = Engine(windowed, Sampling(), slots=3).new_slots(3, 48)
    assert cache_bytes(slots.cache.layers) == 3 * (48 + 6) * one


def test_repetition_penalty_counts_prompt_and_completion(model, params, teacher_forced):
    """Every greedy step is the argmax of logits penalised by all ids before it, in refilled slots too."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1.8)
    plain = ids_of(write(model, params, sampling=Sampling(temperature=0.0)))
    for slots in (8, 2):
        written = write(model, params, sampling=sampling, slots=slots)
        scored = teacher_forced(model, params, PROMPTS, ids_of(written))
        for prompt, one, (_, logits) in zip(PROMPTS, written, scored, strict=True):
            for step, token in enumerate(one.ids.tolist()):
                seen = sorted({*prompt, *one.ids[:step].tolist()})
                row = logits[step].astype(np.float64)
                row[seen] = np.where(row[seen] > 0, row[seen] / 1.8, row[seen] * 1.8)
                assert row.argmax() == token
                np.testing.assert_allclose(one.logps[step], row[token] - np.log(np.exp(row).sum()), atol=1e-5)
        assert ids_of(written) != plain


def test_the_likeliest_of_every_step_are_the_models_own(model, params, teacher_forced):
    written = write(model, params, top=5, sampling=Sampling(temperature=2.0, top_k=9, stop_ids=(4,)))
    for one, (_, logits) in zip(written, teacher_forced(model, params, PROMPTS, ids_of(written)), strict=True):
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(one.probs, p[np.arange(len(p)), one.ids], atol=1e-5)
        order = np.argsort(-p, axis=-1)[:, :5]
        np.testing.assert_allclose(one.top_probs, np.take_along_axis(p, order, axis=-1), atol=1e-5)
        np.testing.assert_array_equal(one.top_ids, order)


def test_tokens_are_told_as_they_come(model, params):
    told = {i: [] for i in range(len(PROMPTS))}
    engine = Engine(model, Sampling(stop_ids=(4,)), slots=2)
    written = engine.generate(
        engine.prepare(params),
        PROMPTS,
        max_new_tokens=12,
        keys=KEYS,
        on_tokens=lambda number, ids: told[number].append(ids.tolist()),
    )
    assert [[i for part in parts for i in part] for parts in told.values()] == ids_of(written)
    assert max(len(part) for parts in told.values() for part in parts) <= 4


def test_mistakes_are_named(model, params):
    engine = Engine(model, Sampling())
    prepared = engine.prepare(params)

    def run(prompt, limit=2):
        return engine.generate(prepared, [[1], prompt], max_new_tokens=limit, keys=KEYS[:2])

    before = engine.stats.compilations
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        run([])
    with pytest.raises(ValueError, match=r"prompt 1 has the id 24, beyond.*vocabulary of 24"):
        run([3, 24])
    with pytest.raises(ValueError, match=r"prompt 1 of 30 tokens and 19 new ones make 49.*max_positions=48"):
        run([1] * 30, 19)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        run([1], 0)
    assert engine.stats.compilations == before, "nothing may be computed first"
    assert len(run([1] * 30, 18)[1].ids) == 18
    assert engine.generate(prepared, [], max_new_tokens=3, keys=KEYS[:0]) == []
    with pytest.raises(ValueError, match=r"stop_ids \[24\].*vocabulary of 24"):
        Engine(model, Sampling(stop_ids=(3, 24)))
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Engine(model, Sampling(), slots=0)
    reward = DecoderConfig(
        vocab_size=8, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, d_ff=8, max_positions=8, heads=("reward",)
    )
    with pytest.raises(ValueError, match="cannot write: it has no 'lm' head"):
        Engine(build_model(reward), Sampling())
