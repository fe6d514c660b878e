"""Weights in: onto one device and onto a mesh, in every dtype, into a folder that looks like a finished stage's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtrain.checkpoint import read_meta
from jaxtrain.config_json import hash_json, read_json
from jaxtrain.config_model import read_model_config
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.interop import importing
from jaxtrain.interop.exporting import export_model
from jaxtrain.interop.huggingface import open_source
from jaxtrain.interop.importing import fill, import_model, load_pretrained
from jaxtrain.interop.safetensors import SafetensorsWriter
from jaxtrain.interop.weights import linear, table
from jaxtrain.main import main
from jaxtrain.models.functional import Model
from jaxtrain.sharding import DEFAULT_RULES, MeshConfig, make_mesh, param_shardings
from jaxtrain.types import path_name


def equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize("small", [0, 2**24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_is_read_bit_for_bit(llama, hf_folder, dtype, small, monkeypatch):
    """Stacks put together on the host, and on the device."""
    monkeypatch.setattr(importing, "SMALL", small)
    wanted, params = llama(dtype=dtype)
    model, found, tokenizer = load_pretrained(hf_folder(dtype=dtype, shard_bytes=4000))
    assert model.config == wanted.config
    assert tokenizer is None
    equal(found, params)


@pytest.mark.parametrize("small", [0, 2**24])
def test_on_a_mesh_every_device_gets_its_part_alone(llama, hf_folder, small, monkeypatch):
    monkeypatch.setattr(importing, "SMALL", small)
    folder = hf_folder(tie_embeddings=False)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    made = []
    real = jax.make_array_from_callback

    def spy(shape, sharding, data):
        made.append(sharding)
        return real(shape, sharding, data)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    model, found, _ = load_pretrained(folder, mesh=mesh)
    shardings = param_shardings(model.axes, model.shapes(), mesh, model.rules)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, shardings))
    assert found["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 24 // 4, 40 // 2)
    equal(found, llama(tie_embeddings=False)[1])
    assert all(sharding.mesh == mesh for sharding in made)
    assert sum(sharding.is_fully_replicated for sharding in made) <= (2 * 3 + 1 if small == 0 else 3)  # norms


def test_experts_are_put_together_layer_by_layer(tmp_path, monkeypatch):
    """A stack [L, E, ...] whose experts are split over devices, from one tensor a layer and an expert."""
    monkeypatch.setattr(importing, "SMALL", 0)
    rng = np.random.default_rng(0)
    tensors = {f"l.{i + 1}.e.{e}": rng.normal(size=(6, 8)).astype(np.float32) for i in range(3) for e in range(4)}
    tensors |= {f"x.{e}": rng.normal(size=(2,)).astype(np.float32) for e in range(4)}
    writer = SafetensorsWriter(tmp_path, [(name, t.dtype, t.shape) for name, t in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    (tmp_path / "config.json").write_text("{}")
    rules = DEFAULT_RULES.__class__(table=(("layers", ()), ("experts", ("expert",)), ("in", ("fsdp",)), ("out", ())))
    model = Model(
        config=None,
        rules=rules,
        init=lambda key: {"w": jnp.zeros((3, 4, 8, 6)), "x": jnp.zeros((4, 2)), "fresh": jnp.ones(3)},
        apply=None,
        axes={"w": ("layers", "experts", "in", "out"), "x": ("experts", "out"), "fresh": ("out",)},
        dtypes=dict.fromkeys(("w", "x", "fresh"), ""),
    )
    table_rules = (
        linear("l.{layer}.e.{expert}", "w", layers=3, first_layer=1, experts=4),
        table("x.{expert}", "x", experts=4),
    )
    mesh = make_mesh(MeshConfig(expert=4, fsdp=2))
    found = fill(model, table_rules, open_source(tmp_path).reader, mesh)
    assert found["w"].addressable_shards[0].data.shape == (3, 1, 4, 6)
    for i in range(3):
        for e in range(4):
            np.testing.assert_array_equal(found["w"][i, e], tensors[f"l.{i + 1}.e.{e}"].T)
    np.testing.assert_array_equal(found["x"], np.stack([tensors[f"x.{e}"] for e in range(4)]))
    np.testing.assert_array_equal(found["fresh"], 1)  # no rule: as initialised


def rewrite(folder: Path, change) -> None:
    """``change(name, tensor)`` of every tensor of a folder."""
    reader = open_source(folder).reader
    tensors = {name: change(name, reader.read(name)) for name in sorted(reader.names())}
    writer = SafetensorsWriter(folder, [(name, t.dtype, t.shape) for name, t in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


@pytest.mark.parametrize(
    ("stored", "asked", "made"),
    [("float16", None, "float32"), ("float64", None, "float32"), ("float16", "bfloat16", "bfloat16"),
     ("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16")],
)  # fmt: skip
def test_dtypes(hf_folder, stored, asked, made):
    folder = hf_folder()
    kind = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    rewrite(folder, lambda name, tensor: tensor.astype(kind))
    model, params, _ = load_pretrained(folder, dtype=asked)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {made}
    assert model.config.param_dtype == model.config.compute_dtype == made
    tensor = open_source(folder).reader.read("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][1], tensor.T.astype(made))


def test_a_mixture_that_bfloat16_would_round_stays_float32(hf_folder):
    folder = hf_folder()
    kinds = {True: np.float32, False: ml_dtypes.bfloat16}
    rewrite(folder, lambda name, tensor: tensor.astype(kinds["norm" in name]))
    assert load_pretrained(folder)[0].config.param_dtype == "float32"


@pytest.fixture
def folders(hf_folder, tmp_path, tokenizer):
    """(a Hugging Face folder with a tokenizer, its import)."""
    source = hf_folder(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    import_model(source, tmp_path / "in")
    return source, tmp_path / "in"


@pytest.fixture
def tokenizer():
    """A byte-level one of 256 bytes and three control ids, with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    from jaxtrain.data.tokenizer_hf import HfTokenizer

    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
    }
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return HfTokenizer(files)


def test_an_import_looks_like_a_finished_stage(folders, llama, tokenizer):
    """What a stage that starts from it reads: config, parameters, tokenizer, and the record of where it came from."""
    _, out = folders
    wanted, _ = llama(vocab_size=tokenizer.vocab_size)
    assert read_model_config(out) == wanted.config
    result, meta = read_json(out / "result.json"), read_meta(out / "checkpoints")
    assert result["checkpoint"] == hash_json(meta["digests"])
    assert result["hash"] == meta["hash"]
    assert result["parents"] == []
    assert result["tokenizer"] == load_tokenizer(out / "tokenizer").digest
    assert load_tokenizer(out / "tokenizer").encode("für ✓") == tokenizer.encode("für ✓")
    assert result["chat"] is True
    assert result["parameters"] == wanted.num_params()


def test_a_stage_starts_from_an_import(folders, llama, tokenizer):
    """Through the very code that reads a parent."""
    from jaxtrain.recipe.runtime import Runtime

    class NoStages:
        stages = ()

    runtime = object.__new__(Runtime)
    runtime.recipe, runtime.tokenizer = NoStages(), load_tokenizer(folders[1] / "tokenizer")
    parent = runtime.parent(str(folders[1]))
    runtime.check_tokenizer(parent)
    model, params = runtime.load(parent, make_mesh(MeshConfig(fsdp=2)))
    wanted, expected = llama(vocab_size=tokenizer.vocab_size)
    assert model.config == wanted.config
    equal(params, expected)


def test_export_of_an_import_is_the_same_tensors(folders, tmp_path):
    """import(export(import(x))) is import(x), bit for bit, and so are the files."""
    source, out = folders
    done = export_model(out, tmp_path / "out")
    again = open_source(tmp_path / "out").reader
    reader = open_source(source).reader
    assert again.names() == reader.names()
    for name in reader.names():
        assert again.read(name).tobytes() == reader.read(name).tobytes(), name
    assert done.tokenizer and not done.left_out
    import_model(tmp_path / "out", tmp_path / "in again")
    assert read_meta(tmp_path / "in again" / "checkpoints")["digests"] == read_meta(out / "checkpoints")["digests"]


def test_our_own_checkpoint_is_a_source(folders, tmp_path):
    _, out = folders
    _, params, tokenizer = load_pretrained(out)
    found = load_pretrained(out, dtype="bfloat16", max_positions=16)
    assert found[0].config.max_positions == 16
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), found[1], params)
    import_model(out, tmp_path / "copy")
    _, copy, same = load_pretrained(tmp_path / "copy")
    equal(copy, params)
    assert same.digest == tokenizer.digest
    assert read_json(tmp_path / "copy" / "result.json")["chat"] is True


def test_a_folder_in_use_is_never_overwritten(folders, hf_folder, tmp_path):
    source, out = folders
    before = (out / "result.json").read_bytes()
    with pytest.raises(ValueError, match="--force makes it anew"):
        import_model(source, out)
    other = hf_folder("other", seed=1, num_layers=2)
    for force in (False, True):
        with pytest.raises(ValueError, match="or of other weights"):
            import_model(other, out, force=force)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an import"):
        import_model(source, tmp_path / "full", force=True)
    with pytest.raises(ValueError, match="is a file"):
        import_model(source, tmp_path / "full" / "thesis.txt")
    assert (out / "result.json").read_bytes() == before
    import_model(source, out, dtype="bfloat16", force=True)
    assert read_model_config(out).param_dtype == "bfloat16"


def test_an_interrupted_import_is_done_over(hf_folder, tmp_path, monkeypatch):
    source, out = hf_folder(), tmp_path / "in"
    with monkeypatch.context() as patch:
        patch.setattr(importing.Checkpoints, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_model(source, out)
    assert not (out / "result.json").exists()
    import_model(source, out)
    assert (out / "result.json").exists()


def test_fields_that_nobody_reads_are_told(hf_folder, caplog):
    load_pretrained(hf_folder(fields={"attention_sinks": 4, "torchscript": True, "nothing": None}))
    assert "attention_sinks" in caplog.text
    assert "torchscript" not in caplog.text and "'nothing'" not in caplog.text


def test_the_command_line(folders, tmp_path, capsys):
    source, _ = folders
    out, back = tmp_path / "cli", tmp_path / "back"
    assert main(["import", str(source), "--out", str(out), "--mesh", "fsdp=2", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "Llama from a Hugging Face folder" in told and "bfloat16" in told and "259 ids" in told and "MB" in told
    assert main(["export", str(out), "--out", str(back), "--shard_gb", "0.00001"]) == 0
    assert (back / "model.safetensors.index.json").exists()
    assert main(["import", str(source), "--out", str(out)]) == 43
    assert "--force" in capsys.readouterr().err
    assert main(["import", str(source), "--out", str(tmp_path / "x"), "--mesh", "fsdp"]) == 43
    assert "AXIS=N" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_stays_near_the_size_of_the_model(tmp_path):
    """A model of 820 MB: what an import needs beyond it is a fifth of it and a shard (50 MB), the checkpoint's writing
    included.  What the libraries take for themselves shows in the import of a small one before; 450 MB are for programs
    compiled for the large one's shapes and for what waits for a busy disk (measured: up to 400), whatever the size."""
    code = f"""
import json, pathlib, sys
import jax
import numpy as np
from jaxtrain.interop.exporting import export_params
from jaxtrain.interop.importing import import_model
from jaxtrain.models import LlamaConfig, build_model
def now(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024
sizes = dict(vocab_size=4096, d_model=1024, num_heads=8, num_kv_heads=8, d_ff=4096, max_positions=64)
models = {{"small": dict(sizes, d_model=64, d_ff=256, num_layers=6), "large": dict(sizes, num_layers=12)}}
folder, before = pathlib.Path({str(tmp_path)!r}), 0
for name, sizes in models.items():
    model = build_model(LlamaConfig(**sizes))
    if sys.argv[1] == "make":
        noise = np.random.default_rng(0).standard_normal(2**22, np.float32)  # does not compress
        params = jax.tree.map(lambda x: np.resize(noise, x.shape), model.shapes())
        export_params(model, params, folder / name, max_shard_bytes=5e7)
    else:
        before = now("VmRSS")
        import_model(folder / name, folder / f"{{name}} in")
size = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.shapes()))
print(json.dumps([size, now("VmHWM") - before]))
"""
    for what in ("make", "import"):
        done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    size, used = json.loads(done.stdout.splitlines()[-1])
    assert size > 800e6
    assert used < 1.2 * size + 500e6, f"{used / size:.2f} times the model"


def test_paths_of_every_array_are_filled(llama):
    """The rules name each array of the model once."""
    from jaxtrain.interop.families.llama import FAMILY

    for changes in ({}, {"tie_embeddings": False}, {"attention_bias": True, "mlp_bias": True}):
        model, params = llama(**changes)
        paths = [path for rule in FAMILY.weights(model.config) for path in rule.ours]
        assert sorted(paths) == sorted(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
