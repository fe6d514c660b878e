"""What the processes of these tests run: ``worker.py FUNCTION ARGUMENT ...`` within one job."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxtrain import distributed
from jaxtrain.sharding import MeshConfig, local_rows, make_mesh, put_batch


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def agree(out: str) -> None:
    """Everything that processes tell each other, and batches over meshes whose rows lie scattered."""
    number, count = distributed.process()
    seen = distributed.from_writer(lambda: {"who": number, "nan": float("nan"), "third": 1 / 3})
    distributed.check_same("value", "equal")
    distributed.check_shared(Path(out))
    read = distributed.writer_first(lambda: Path(out, "file").write_text("ready"), Path(out, "file").read_text)
    values = np.random.default_rng(0).normal(size=7)  # float64, and not divisible
    gathered = distributed.gather(values[distributed.share(7)], 7)

    # Every second device is another process's: a process's rows are not consecutive.
    devices = sorted(jax.devices(), key=lambda device: (device.id % 2, device.id))
    whole = {"x": np.arange(48, dtype=np.float32).reshape(16, 3), "y": np.arange(16, dtype=np.int32)}
    held, same = [], []
    for order, config in ((jax.devices(), {"data": 2, "fsdp": 2}), (devices, {"fsdp": 4}), (devices, {"tensor": 4})):
        mesh = make_mesh_of(order, config)
        rows = local_rows(16, mesh)
        own = jax.tree.map(lambda x, rows=rows: x[rows], whole)
        placed, all_of_it = put_batch(own, mesh, count=16), put_batch(whole, mesh)
        found = jax.tree.map(distributed.fetch, placed)
        held.append(rows.tolist())
        same.append(
            all(bool((found[name] == whole[name]).all()) for name in whole)
            and placed["x"].sharding == all_of_it["x"].sharding
        )
    say(
        number=number,
        count=count,
        seen=[seen["who"], seen["nan"] != seen["nan"], seen["third"] == 1 / 3],
        read=read,
        gathered=bool((gathered == values).all()),
        held=held,
        same=same,
    )


def make_mesh_of(devices, sizes):
    from jax.sharding import Mesh

    from jaxtrain.sharding import AXES

    return Mesh(np.array(devices).reshape([sizes.get(axis, 1) for axis in AXES]), AXES)


def differ(out: str) -> None:
    """Each process has another configuration."""
    distributed.check_same("configuration", str(distributed.process()[0]))


def unshared(out: str) -> None:
    """Each process has a folder of its own."""
    distributed.VISIBLE = 1.0
    distributed.check_shared(Path(out, str(distributed.process()[0])))


def raises(out: str, text: str) -> None:
    """Process 1 fails while process 0 waits for it in a collective."""
    distributed.gather(np.zeros(1), 2)  # connected, so that the end of one fails the other's collective at once
    if distributed.process()[0] == 1:
        raise ValueError(text)
    distributed.gather(np.zeros(1), 2)


def steps(out: str, hang: str) -> None:
    """Endless steps; process 1 hangs at the fifth where ``hang`` is 1."""
    mesh = make_mesh(MeshConfig(data=-1))
    total = jax.jit(lambda x: x.sum())
    with distributed.loop():
        for number in range(1, 10**6):
            total(put_batch(np.ones(8), mesh)).block_until_ready()
            distributed.beat(compiling=number == 1)
            if number == 5:
                say(step=number)
                if hang == "1" and distributed.process()[0] == 1:
                    time.sleep(1000)
            if distributed.preempted():
                say(preempted=number)
                raise distributed.Preempted("")


def train(out: str, start: str, until: str) -> None:
    """Steps ``start`` to ``until`` of a language model on a data=4, fsdp=2 mesh, continued from what ``out`` holds."""
    from jaxtrain.checkpoint import Checkpoints, read_meta
    from jaxtrain.data.loader import Loader
    from jaxtrain.models import DecoderConfig, build_model
    from jaxtrain.objectives import LM
    from jaxtrain.optim import AdamW, Constant
    from jaxtrain.train.loop import fit, from_trees, state_trees
    from jaxtrain.train.metrics import MetricLog
    from jaxtrain.train.state import abstract_state, init_state
    from jaxtrain.train.step import make_train_step
    from jaxtrain.types import Tokens

    class Rows:
        fingerprint = "rows"

        def __init__(self):
            self.read = []

        def __len__(self):
            return 50

        def __getitem__(self, index):
            self.read.append(int(index))
            return {"ids": np.random.default_rng(int(index)).integers(1, 24, 17).astype(np.int32)}

    def to_batch(rows):
        ids = np.stack([row["ids"] for row in rows])
        ones = np.ones((len(ids), 16))
        return Tokens(
            ids=ids[:, :-1],
            targets=ids[:, 1:],
            weights=ones.astype(np.float32),
            positions=np.broadcast_to(np.arange(16, dtype=np.int32), ones.shape),
            segments=ones.astype(np.int32),
        )

    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sizes = {"vocab_size": 24, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 32}
    model = build_model(DecoderConfig(**sizes, max_positions=16))
    tx = AdamW(schedule=Constant(peak=1e-2)).build(10, model.shapes(), model.axes)
    target = abstract_state(model, tx, mesh)
    step = make_train_step(model.apply, LM(), tx, mesh=mesh, shardings=jax.tree.map(lambda x: x.sharding, target))
    source = Rows()
    loader = Loader(source=source, batch_size=16, seed=3, to_batch=to_batch)
    rows = local_rows(16, mesh)
    folder = Path(out)
    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    found = checkpoints.restore_latest(state_trees(target), {})
    assert (found[0] if found else 0) == int(start), (found and found[0], start)
    state = from_trees(found[1]) if found else init_state(model, tx, mesh, 0)
    with MetricLog(folder, start=int(start), steps=int(until), title="lm") as log:
        fit(
            step=step,
            state=state,
            start=int(start),
            steps=int(until),
            load=lambda number: loader.batch(number, rows),
            place=lambda batch: put_batch(batch, mesh, count=16),
            checkpoints=checkpoints,
            meta={},
            log=log,
            checkpoint_every=2,
        )
    checkpoints.close()
    digests = read_meta(folder / "checkpoints")["digests"]
    say(rows=rows.tolist(), read=source.read, digests=digests)


def train_tests(name: str):
    """A module of tests/train: its tiny model, its meshes, its batches."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", Path(__file__).parents[1] / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def meshes(expected: str, *names: str) -> None:
    """Every objective on meshes over all processes' devices, beside one device's numbers in the file ``expected``.

    Says for each mesh and objective how far this process's parts of sums and gradients are from those, as a multiple of
    what is allowed; and the same, as a control, of one objective's gradients beside another's.
    """
    tools, cases = train_tests("conftest").make_tools(), train_tests("test_meshes")
    whole = pickle.loads(Path(expected).read_bytes())
    for name in names:
        found = cases.all_objectives(tools, cases.MESHES[name])
        far = {one: max(excess(tools, *pair) for pair in parts(found[one], whole[one])) for one in cases.NAMES}
        say(mesh=name, far=far, control=excess(tools, found["LM"][1], whole["SFT"][1]))


def parts(found, expected):
    """(found, expected) of what has a scale of its own: the loss, every metric, the gradients."""
    (loss, grads), (whole, whole_grads) = found, expected
    yield (loss.total, loss.weight), (whole.total, whole.weight)
    yield grads, whole_grads
    for name in whole.metrics:
        yield loss.metrics[name], whole.metrics[name]


def excess(tools, tree, whole) -> float:
    """The largest distance over what ``tools.assert_close`` allows, in the parts of arrays that lie here."""
    assert jax.tree.structure(tree) == jax.tree.structure(whole)
    scale, worst = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(whole)), 0.0
    for array, one in zip(jax.tree.leaves(tree), jax.tree.leaves(whole), strict=True):
        assert array.shape == np.shape(one) and array.addressable_shards
        for shard in array.addressable_shards:
            here, there = np.asarray(shard.data), np.asarray(one)[shard.index]
            assert np.isfinite(here).all()
            allowed = tools.tolerance * (scale + np.abs(there))
            worst = max(worst, float(np.max(np.abs(here - there) / np.maximum(allowed, 1e-30), initial=0.0)))
    return worst


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        with distributed.job():
            globals()[sys.argv[1]](*sys.argv[2:])
    except distributed.Preempted:
        sys.exit(distributed.PREEMPTED)
