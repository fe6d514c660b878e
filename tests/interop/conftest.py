"""The parity suite's parts: one case a file in ``cases/``, what its kind of model reads and returns, and the table.

A case is a Hugging Face config.json of a tiny model, and besides:
``_comment``  which peculiarity it exercises,
``_kind``     how the model is called, one of ``KINDS`` ("decoder" by default),
``_mesh``     the mesh of eight devices that it is split over,
``_forgets``  fields that matter nothing to what the model computes, and that an import does not keep.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.family import Fields
from jaxtrain.models import build_model
from jaxtrain.types import Seq2Seq, Tokens, path_name

CASES = {path.stem: path for path in sorted((Path(__file__).parent / "cases").glob("*.json"))}
COLUMNS = ("import", "export", "logits", "gradients", "decode", "sharded")
LENGTHS = (13, 8, 3, 13, 1, 11, 5, 13)  # of the rows; longer than every case's window
# Nothing here runs more than a few times: compiling is what takes time.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__[:2] == (0, 10):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later versions have no such option
jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def read(name: str) -> dict[str, Any]:
    return json.loads(CASES[name].read_text())


class Decoder:
    """How decoders are called: rows of tokens, padded on the right."""

    def batch(self, case: Case) -> Any:
        """What ours reads: a pytree of arrays with rows in front."""
        rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        B, T = len(LENGTHS), max(LENGTHS)
        segments = (np.arange(T) < np.array(LENGTHS)[:, None]).astype(np.int32)
        ids = np.where(segments, rng.integers(3, case.config.vocab_size, (B, T)), 0).astype(np.int32)
        positions = np.arange(T, dtype=np.int32) * segments
        return Tokens(ids=ids, targets=ids, weights=segments.astype(np.float32), positions=positions, segments=segments)

    def ours(self, model: Any, params: Any, batch: Any) -> dict[str, Any]:
        """Named outputs ``[..., n]``."""
        return {"logits": model.apply(params, batch).logits}

    def theirs(self, model: Any, batch: Any) -> dict[str, Any]:
        """The same of a transformers model, as torch tensors."""
        import torch

        ids, mask = (torch.from_numpy(np.asarray(x)).long() for x in (batch.ids, batch.segments))
        return {"logits": model(input_ids=ids, attention_mask=mask, use_cache=False).logits}

    def valid(self, case: Case) -> dict[str, np.ndarray]:
        """By output, bool ``[...]``: where it means something."""
        return {"logits": np.asarray(case.batch.segments) > 0}


class Encoder(Decoder):
    """Rows of tokens, some of a second text; every head's outputs and the hidden states."""

    def batch(self, case: Case) -> Any:
        tokens = super().batch(case)
        if case.config.type_vocab_size < 2:
            return tokens
        return dataclasses.replace(tokens, types=tokens.positions // 4 % 2)

    def ours(self, model: Any, params: Any, batch: Any) -> dict[str, Any]:
        out = model.apply(params, batch)
        found = {"hidden": out.hidden, "logits": out.logits}
        if out.pooled is not None:
            found["pooled"] = out.pooled[:, 0]
        if out.next_sentence is not None:
            # transformers shows what its pooler says only where nothing else reads it.
            del found["pooled"]
            found["next_sentence"] = out.next_sentence[:, 0]
        if out.replaced is not None:
            found["replaced"] = jnp.stack([jnp.zeros_like(out.replaced), out.replaced], axis=-1)
        return {name: array for name, array in found.items() if array is not None}

    def theirs(self, model: Any, batch: Any) -> dict[str, Any]:
        import torch

        ids, mask = (torch.from_numpy(np.asarray(x)).long() for x in (batch.ids, batch.segments))
        more = {} if batch.types is None else {"token_type_ids": torch.from_numpy(np.asarray(batch.types)).long()}
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **more)
        found = {"hidden": out.hidden_states[-1]}
        kind = type(model).__name__
        if kind == "ElectraForPreTraining":
            found["replaced"] = torch.stack([torch.zeros_like(out.logits), out.logits], dim=-1)
        names = {"prediction_logits": "logits", "seq_relationship_logits": "next_sentence", "pooler_output": "pooled"}
        if kind.endswith("ForMaskedLM"):
            names["logits"] = "logits"
        if kind.endswith("ForNextSentencePrediction"):
            names["logits"] = "next_sentence"
        return found | {ours: out[name] for name, ours in names.items() if name in out}

    def valid(self, case: Case) -> dict[str, np.ndarray]:
        everywhere = np.asarray(case.batch.segments) > 0
        places = {"logits": everywhere, "replaced": everywhere, "hidden": everywhere}
        shapes = jax.eval_shape(functools.partial(self.ours, case.model), case.model.shapes(), case.batch)
        return {name: places.get(name, everywhere[:, 0]) for name in shapes}


class EncoderDecoder(Decoder):
    """Sources and targets of different lengths; logits, and the hidden states of both sides."""

    def batch(self, case: Case) -> Any:
        target = super().batch(case)
        source = jax.tree.map(lambda x: x[::-1, :-2], super().batch(case))
        return Seq2Seq(encoder=dataclasses.replace(source, ids=(source.ids * 7 + 5) % 90 + 3), decoder=target)

    def ours(self, model: Any, params: Any, batch: Any) -> dict[str, Any]:
        out = model.apply(params, batch)
        found = {"hidden": out.hidden, "encoded": out.encoded, "logits": out.logits}
        return {name: array for name, array in found.items() if array is not None}

    def theirs(self, model: Any, batch: Any) -> dict[str, Any]:
        import torch

        fields = {"input_ids": batch.encoder.ids, "attention_mask": batch.encoder.segments}
        fields |= {"decoder_input_ids": batch.decoder.ids, "decoder_attention_mask": batch.decoder.segments}
        fields = {name: torch.from_numpy(np.array(x)).long() for name, x in fields.items()}
        out = model(**fields, output_hidden_states=True, use_cache=False)
        found = {"hidden": out.decoder_hidden_states[-1], "encoded": out.encoder_last_hidden_state}
        return found | ({"logits": out.logits} if "logits" in out else {})

    def valid(self, case: Case) -> dict[str, np.ndarray]:
        sides = {"encoded": case.batch.encoder}
        shapes = jax.eval_shape(functools.partial(self.ours, case.model), case.model.shapes(), case.batch)
        return {name: np.asarray(sides.get(name, case.batch.decoder).segments) > 0 for name in shapes}


KINDS = {"decoder": Decoder(), "encoder": Encoder(), "seq2seq": EncoderDecoder()}


class Case:
    """One case and what its tests share; everything is made when first asked for."""

    def __init__(self, name: str):
        self.name = name
        fields = dict(read(name))
        own = {key: fields.pop(key) for key in list(fields) if key.startswith("_")}
        assert own.keys() <= {"_comment", "_kind", "_mesh", "_forgets"} and own.get("_comment"), f"{name}: {own}"
        self.fields = fields
        self.kind_name = own.get("_kind", "decoder")
        self.kind = KINDS[self.kind_name]
        self.mesh = own.get("_mesh", {"data": 2, "fsdp": 2, "tensor": 2})
        self.forgets = set(own.get("_forgets", ()))
        self.family = FAMILIES[fields["model_type"]]
        self.config = self.family.read_config(Fields(fields))
        self.model = build_model(self.config)
        self.jit = jit

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    @functools.cached_property
    def batch(self):
        return self.kind.batch(self)

    @functools.cached_property
    def valid(self):
        return self.kind.valid(self)

    @functools.cached_property
    def params(self):
        """Ours, fresh from ``init`` but with nothing left at 0 or 1."""
        fresh = jax.device_get(jit(self.model.init)(jax.random.key(0)))
        rng = self.rng()

        def one(path, x):
            if path_name(path).endswith("kernel"):
                return x
            if path_name(path).endswith("embedding"):
                return (rng.normal(size=x.shape) * x.shape[-1] ** -0.5).astype(x.dtype)
            return (x + 0.3 * rng.normal(size=x.shape)).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(one, fresh)

    # What a loss compares with: a class for every output, drawn at random.
    def weights(self, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """``[...]``, 1 / count where valid, and one-hot targets ``[..., size]``, both float32."""
        valid = self.valid[name]
        targets = np.eye(size, dtype=np.float32)[self.rng().integers(0, size, valid.shape)]
        return (valid / valid.sum()).astype(np.float32), targets

    @functools.cached_property
    def run(self):
        """(params, batch) -> (outputs, gradients of their cross-entropy), compiled once."""

        def loss(params, batch):
            outputs = self.kind.ours(self.model, params, batch)
            total = 0.0
            for name, out in outputs.items():
                weights, targets = self.weights(name, out.shape[-1])
                per_row = jax.nn.logsumexp(out, axis=-1) - jnp.sum(out * targets, axis=-1)
                total += jnp.sum(jnp.where(weights > 0, per_row * weights, 0))
            return total, outputs

        def both(params, batch):
            grads, outputs = jax.grad(loss, has_aux=True)(params, batch)
            return outputs, grads

        return jit(both)

    def fresh_theirs(self):
        """A transformers model with random weights in which every tensor matters."""
        torch = pytest.importorskip("torch", reason="parity needs torch (the 'parity' extra)")
        transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
        torch.set_num_threads(1)
        config = self.their_config(self.fields)
        config._attn_implementation = "eager"
        model = getattr(transformers, self.fields["architectures"][0])(config).eval().float()
        if not getattr(self.config, "tie_embeddings", True) and self.kind_name == "seq2seq":
            # transformers 5 ties T5's whatever its config says, and unties them where a file has both.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        rng = self.rng()
        for tensor in model.state_dict().values():
            if not tensor.is_floating_point():
                continue
            noise = torch.from_numpy(rng.normal(size=tuple(tensor.shape)).astype(np.float32))
            if tensor.ndim == 1:
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        return model

    def their_config(self, fields: dict[str, Any]) -> Any:
        """transformers' config of a config.json."""
        transformers = pytest.importorskip("transformers", reason="parity needs transformers (the 'parity' extra)")
        return transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)

    @functools.cached_property
    def theirs(self):
        return self.fresh_theirs()

    def outputs_of(self, model) -> dict[str, np.ndarray]:
        """Of a transformers model, without gradients."""
        import torch

        with torch.no_grad():
            return {name: out.numpy() for name, out in self.kind.theirs(model, self.batch).items()}

    def gradients_of(self, model) -> dict[str, np.ndarray]:
        """Of a transformers model's loss (the same as ``run``'s), by tensor."""
        import torch

        total = 0.0
        for name, out in self.kind.theirs(model, self.batch).items():
            weights, targets = (torch.from_numpy(x) for x in self.weights(name, out.shape[-1]))
            total = total + (weights * (torch.logsumexp(out, -1) - (out * targets).sum(-1))).sum()
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        found = {
            name: np.zeros(tuple(parameters[name].shape), np.float32) if grad is None else grad.numpy()
            for name, grad in zip(parameters, grads)
        }
        # What a file holds beside parameters is not trained.
        constants = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
        found |= {name: np.zeros(tuple(buffer.shape), np.float32) for name, buffer in constants.items()}
        if not any(".experts." in name for name in found):
            return found
        # In memory transformers has all experts of a layer in one tensor; in files each has its own.
        from transformers.core_model_loading import revert_weight_conversion

        tensors = revert_weight_conversion(model, {name: torch.from_numpy(grad) for name, grad in found.items()})
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def compare(self, found: dict[str, Any], wanted: dict[str, Any], atol: float) -> None:
        """Outputs, where they mean something."""
        assert found.keys() == wanted.keys()
        for name, valid in self.valid.items():
            got, want = np.asarray(found[name])[valid], np.asarray(wanted[name])[valid]
            assert np.isfinite(want).all() and want.std() > 0.1, f"{name} of transformers is no test: {want.std()}"
            np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=f"{self.name}: {name}")

    def to_theirs(self, params: Any) -> dict[str, np.ndarray]:
        """Our parameters (or their gradients) as tensors of theirs, by the family's table."""
        flat = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
        found: dict[str, np.ndarray] = {}
        # A bare model (BertModel, but not GPT2LMHeadModel) is saved without its part's name.
        bare = self.family.base_prefix if re.fullmatch(r".*(?<!LMHead)Model", self.fields["architectures"][0]) else ""
        for rule in self.family.weights(self.config):
            for index, names in rule.slices():
                values = rule.to_theirs([flat[path][index] for path in rule.ours])
                names = tuple(name.removeprefix(bare) for name in names)
                assert not found.keys() & set(names), f"two rules give {names}"
                found |= zip(names, map(np.ascontiguousarray, values), strict=True)
        return found


case_of = functools.cache(Case)


@pytest.fixture
def case(request) -> Case:
    return case_of(request.param)


@pytest.fixture
def case_files() -> dict[str, dict[str, Any]]:
    """What every file of ``cases/`` says."""
    return {name: read(name) for name in CASES}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "column(name, *kinds): a test of every case of these kinds (all by default), shown in that column"
    )


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("column")
    if mark:
        kinds = {name: json.loads(path.read_text()).get("_kind", "decoder") for name, path in CASES.items()}
        metafunc.parametrize(
            "case", [n for n in CASES if not mark.args[1:] or kinds[n] in mark.args[1:]], indirect=True
        )


def pytest_itemcollected(item):
    mark = item.get_closest_marker("column")
    if mark and hasattr(item, "callspec"):
        item.user_properties.append(("cell", (item.callspec.params["case"], mark.args[0])))


def pytest_terminal_summary(terminalreporter):
    """Families (a row for each case) by what was compared."""
    cells: dict[tuple[str, str], set[str]] = defaultdict(set)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            cell = dict(getattr(report, "user_properties", ())).get("cell")
            if cell and outcome in ("passed", "failed", "error", "skipped"):
                cells[cell].add({"passed": "ok", "skipped": "skip"}.get(outcome, "FAIL"))
    if not cells:
        return
    terminalreporter.section("families")
    families = {name: FAMILIES[read(name)["model_type"]].name for name, _ in cells}
    width = max(map(len, families))
    terminalreporter.write_line(" ".join(["case".ljust(width), "family".ljust(14), *(c.rjust(9) for c in COLUMNS)]))
    for name, family in sorted(families.items(), key=lambda item: item[::-1]):
        line = [name.ljust(width), family.ljust(14)]
        for column in COLUMNS:
            found = cells.get((name, column), {"-"})
            line.append(next(word for word in ("FAIL", "skip", "ok", "-") if word in found).rjust(9))
        terminalreporter.write_line(" ".join(line))


@pytest.fixture(scope="session")
def llama():
    """(model, parameters) of a tiny Llama with everything in it that is not a multiple of anything else."""
    from jaxtrain.models import LlamaConfig

    def make(dtype: str = "float32", seed: int = 0, **changes: Any) -> tuple[Any, Any]:
        sizes = dict(vocab_size=48, num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, d_ff=40, max_positions=64)
        model = build_model(LlamaConfig(**{**sizes, **changes}, param_dtype=dtype, compute_dtype=dtype))
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        return model, jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape, jnp.float32).astype(x.dtype) * 0.2, model.shapes()
        )

    return make


@pytest.fixture
def hf_folder(tmp_path, llama):
    """Writes a tiny Llama as a Hugging Face folder and returns it; ``fields`` are changed in its config.json after."""
    from jaxtrain.interop.exporting import export_params

    def write(
        name: str = "hf", fields: dict | None = None, tokenizer: Any = None, shard_bytes: float = 5e9, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        export_params(*llama(**changes), folder, tokenizer=tokenizer, max_shard_bytes=shard_bytes)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **(fields or {})}))
        return folder

    return write
