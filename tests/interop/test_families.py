"""Every family against transformers, and against itself: cached, split over devices, packed.

Generated from ``cases/``: another file there is another row of every test, and of the table with which
``pytest -q tests/interop/test_families.py`` ends.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import NEUTRAL, Fields
from jaxtrain.interop.importing import load_pretrained
from jaxtrain.models import init_cache
from jaxtrain.models.cache import insert
from jaxtrain.models.seq2seq_cache import init_seq2seq_cache
from jaxtrain.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from jaxtrain.types import Seq2Seq, Tokens, path_name


@pytest.fixture
def imported(case, tmp_path):
    """(our config, our parameters, their tensors) of what a transformers model wrote."""
    if not hasattr(case, "imported"):
        from safetensors.numpy import load_file

        case.theirs.save_pretrained(tmp_path)
        model, params, _ = load_pretrained(tmp_path)
        fields = Fields(json.loads((tmp_path / "config.json").read_text()))
        case.family.read_config(fields)
        assert fields.unread() == {}, "fields of config.json that nobody looked at"
        case.imported = model.config, jax.device_get(params), load_file(tmp_path / "model.safetensors")
    return case.imported


def test_every_family_has_a_case(case_files):
    assert {fields["model_type"] for fields in case_files.values()} == set(FAMILIES)


@pytest.mark.parity
@pytest.mark.column("import")
def test_import(case, imported):
    """Every tensor of theirs is somewhere in ours, unchanged; the new config.json says what the old one said."""
    config, params, tensors = imported
    assert config == case.config
    ours = case.to_theirs(params)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parity
@pytest.mark.column("logits")
def test_logits(case, imported):
    found, _ = case.run(imported[1], case.batch)
    case.compare(found, case.outputs_of(case.theirs), 1e-4)


@pytest.mark.parity
@pytest.mark.column("gradients")
def test_gradients(case, imported):
    _, grads = case.run(imported[1], case.batch)
    found, wanted = case.to_theirs(grads), case.gradients_of(case.theirs)
    assert found.keys() == wanted.keys()
    norms = {name: np.linalg.norm(grad) for name, grad in wanted.items()}
    for name, grad in wanted.items():
        # Some gradients are zero but for rounding: a bias on keys moves all logits of a query alike.
        size = max(norms[name], 1e-3 * max(norms.values()))
        assert np.linalg.norm(found[name] - grad) <= 1e-4 * size, f"{name}: {found[name].shape}"


@pytest.mark.parity
@pytest.mark.column("export")
def test_export(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
    from safetensors import safe_open

    export_params(case.model, case.params, tmp_path)
    [architecture] = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architecture == case.fields["architectures"][0]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == case.to_theirs(case.params).keys()
    model, said = getattr(transformers, architecture).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(said.values()), said
    found, _ = case.run(case.params, case.batch)
    case.compare(found, case.outputs_of(model.eval()), 1e-4)


@pytest.mark.parity
@pytest.mark.column("config")
def test_what_we_write_says_what_we_read(case):
    names = {"model_type": case.family.model_type, "architectures": case.fields["architectures"]}
    written = case.their_config(names | case.family.write_config(case.config)).to_dict()
    wanted = case.their_config(case.fields).to_dict()
    for values in (written, wanted):
        if "type" in (values.get("rope_parameters") or {}):
            del values["rope_parameters"]["type"]  # transformers keeps the old name beside the new one
    differ = {
        name: (written.get(name), wanted.get(name))
        for name in written.keys() | wanted.keys()
        if written.get(name) != wanted.get(name)
    }
    assert differ.keys() - NEUTRAL == case.forgets, differ


@pytest.mark.column("config")
def test_what_it_cannot_represent_is_refused(case):
    """Unknown activations, and ways to stretch positions."""

    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            case.family.read_config(Fields(case.fields | changes))

    activations = [name for name in case.fields if name.startswith("hidden_act") or name == "activation_function"]
    assert activations or case.kind_name == "seq2seq"
    for name in activations:
        refuses("quux", **{name: "quux"})
    if any(name.startswith("rope") for name in case.fields):
        scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        refuses("dynamic", rope_parameters=None, rope_scaling=scaling)
        refuses("dynamic", rope_parameters=scaling, rope_scaling=None)


def close(found, wanted, what, rtol=1e-5):
    """Two trees of arrays: equal but for rounding, by the norm of the difference."""
    norms = [float(np.linalg.norm(x)) for x in jax.tree.leaves(wanted)]
    for (path, got), want, norm in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), norms, strict=True
    ):
        size = max(norm, 1e-2 * max(norms))
        assert np.linalg.norm(np.asarray(got) - want) <= rtol * size, f"{what}: {path_name(path)}"


@pytest.mark.column("sharded")
def test_sharded(case):
    """Outputs and gradients of a mesh of eight devices are those of one."""
    model = case.model
    outputs, grads = jax.device_get(case.run(case.params, case.batch))
    mesh = make_mesh(MeshConfig(**case.mesh))
    shardings = param_shardings(model.axes, model.shapes(), mesh, model.rules)
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
    with jax.set_mesh(mesh):
        params, batch = jax.device_put(case.params, shardings), put_batch(case.batch, mesh, model.rules)
        found, found_grads = jax.device_get(case.run(params, batch))
    for name, valid in case.valid.items():
        np.testing.assert_allclose(found[name][valid], outputs[name][valid], atol=1e-5, err_msg=name)
    close(found_grads, grads, "gradients")


@pytest.mark.column("causal", "decoder")
def test_nothing_depends_on_a_later_token_or_another_segment(case):
    """A changed token changes what stands after it in its segment and nothing else."""
    batch = case.batch
    T = batch.ids.shape[1]
    cut, changed = T // 2 - 1, T - 3
    segments = np.where(np.arange(T) < cut, 1, 2) * np.ones_like(batch.ids)
    positions = np.arange(T) - np.where(segments == 1, 0, cut)
    rng = case.rng()
    ids = rng.integers(3, case.config.vocab_size, batch.ids.shape)

    def logits(ids, segments, positions):
        arrays = {"ids": ids, "targets": ids, "segments": segments, "positions": positions}
        arrays = {name: np.broadcast_to(x, ids.shape).astype(np.int32) for name, x in arrays.items()}
        return np.asarray(case.run(case.params, Tokens(**arrays, weights=batch.weights))[0]["logits"])

    packed = logits(ids, segments, positions)
    for at, until in ((1, cut), (changed, T)):
        other = ids.copy()
        other[:, at] = (ids[:, at] - 3 + 1) % (case.config.vocab_size - 3) + 3
        difference = np.abs(logits(other, segments, positions) - packed).max(axis=(0, 2))
        assert np.all(difference[:at] <= 1e-6) and np.all(difference[until:] <= 1e-6), difference
        assert np.all(difference[at : at + 3] > 1e-4), difference
    # The second document on its own, moved to the start of the row.
    alone = logits(np.roll(ids, -cut, axis=1), np.arange(T) < T - cut, np.arange(T))
    np.testing.assert_allclose(alone[:, : T - cut], packed[:, cut:], atol=1e-5)


def decode(case, params, ids, lengths, steps):
    """Prompts read at once (right-padded), then ``steps`` tokens one by one.

    Returns log-probabilities ``[B, 1 + steps, V]``, and how much every row of the cache has read.
    """
    model = case.model
    B, prompt = ids.shape[0], ids.shape[1] - steps
    columns = jnp.arange(prompt)
    segments = (columns < lengths[:, None]).astype(jnp.int32)

    def tokens(ids, positions, segments):
        return Tokens(ids=ids, targets=ids, weights=segments * 1.0, positions=positions, segments=segments)

    read = tokens(ids[:, :prompt] * segments, columns * segments, segments)
    out = model.apply(params, read, cache=init_cache(case.config, B, 0))
    first = jnp.take_along_axis(out.logits, lengths[:, None, None] - 1, axis=1)
    # Rows of the cache are filled in another order than the prompts have.
    rows = jnp.arange(B)[::-1]
    cache = insert(init_cache(case.config, B, ids.shape[1]), rows, out.cache)

    def step(cache, _):
        position = cache.lengths[rows][:, None]
        token = jnp.take_along_axis(ids, position, axis=1)
        here = tokens(token[rows], position[rows], jnp.ones((B, 1), jnp.int32))
        out = model.apply(params, here, cache=cache)
        return out.cache, out.logits[rows, 0]

    cache, rest = jax.lax.scan(step, cache, length=steps)
    logits = jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], axis=1)
    return jax.nn.log_softmax(logits), cache.lengths


@pytest.mark.column("decode", "decoder")
def test_decode(case):
    """Log-probabilities of a cache are those of the whole text: ragged prompts, batch 8 and 1, other weights."""
    rng = case.rng()
    B, prompt, steps = 8, 7, 6
    ids = rng.integers(3, case.config.vocab_size, (B, prompt + steps)).astype(np.int32)
    lengths = np.array([7, 1, 5, 7, 3, 2, 6, 4], np.int32)
    ones = np.ones_like(ids)
    positions = np.arange(ids.shape[1], dtype=np.int32) * ones
    tokens = Tokens(ids=ids, targets=ids, weights=ones.astype(np.float32), positions=positions, segments=ones)
    run = case.jit(lambda params, ids, lengths: decode(case, params, ids, lengths, steps))
    where = lengths[:, None] - 1 + np.arange(1 + steps)
    for params in (case.params, jax.tree.map(lambda x: np.float32(1.1) * x + np.float32(0.01), case.params)):
        found, read = run(params, ids, lengths)
        assert np.asarray(read).tolist() == (lengths[::-1] + steps).tolist()
        whole = jax.nn.log_softmax(case.run(params, tokens)[0]["logits"])
        wanted = np.take_along_axis(np.asarray(whole), where[..., None], axis=1)
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
        alone, _ = run(params, ids[2:3], lengths[2:3])
        np.testing.assert_allclose(alone, wanted[2:3], atol=1e-5, rtol=0)


@pytest.mark.column("decode", "seq2seq")
def test_decode_after_an_encoder(case):
    """Ragged targets, the first tokens read at once and the rest one by one, see what whole targets see."""
    batch, start = case.batch, 3
    B, T = batch.decoder.ids.shape
    wanted = jax.device_get(case.run(case.params, batch)[0])

    @case.jit
    def run(params, batch):
        def part(at, length):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, length, axis=1), batch.decoder)

        cache = init_seq2seq_cache(case.config, B, T)
        first = case.model.apply(params, Seq2Seq(encoder=batch.encoder, decoder=part(0, start)), cache=cache)

        def step(cache, at):
            out = case.model.apply(params, Seq2Seq(encoder=None, decoder=part(at, 1)), cache=cache)
            return out.cache, (out.hidden[:, 0], None if out.logits is None else out.logits[:, 0])

        cache, rest = jax.lax.scan(step, first.cache, jnp.arange(start, T))
        whole = jax.tree.map(
            lambda a, b: jnp.concatenate([a, jnp.swapaxes(b, 0, 1)], axis=1), (first.hidden, first.logits), rest
        )
        return whole, cache.lengths

    (hidden, logits), read = run(case.params, batch)
    assert np.asarray(read).tolist() == batch.decoder.segments.sum(1).tolist()
    valid = case.valid["hidden"]
    for name, found in (("hidden", hidden), ("logits", logits)):
        if name in wanted:
            np.testing.assert_allclose(np.asarray(found)[valid], wanted[name][valid], atol=1e-5, err_msg=name)
