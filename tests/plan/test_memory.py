"""Bytes and operations by hand, against what they must be, and against programs that XLA compiles for CPUs."""

from __future__ import annotations

import jax
import pytest

from jaxtrain.plan import hlo, moments
from jaxtrain.plan import memory as by_hand
from jaxtrain.plan.analytic import executed_flops, items_of
from jaxtrain.plan.chips import parse_topology
from jaxtrain.plan.hlo import flat
from jaxtrain.plan.memory import decode_memory, resident, stage_memory
from jaxtrain.plan.programs import abstract_mesh, programs
from jaxtrain.sharding import make_mesh

WHERE = parse_topology("v5e:2x4")
LAYERS, WIDTH, LENGTH, ROWS = 4, 256, 512, 16


def program_memory(program, mesh):
    """Its parts, at the moment that needs most."""
    return by_hand.program_memory(program, mesh)[0]


def saved_activations(program, mesh):
    """By the layers, after them, logits."""
    return moments.saved_activations(program, mesh, moments.Traces())


def moment(program, mesh, name):
    """One of a train step's moments."""
    return next(one for one in moments.moments(program, mesh, moments.Traces()) if name in one.name)


@pytest.fixture
def parts(recipe):
    """``parts(stage name, *bindings)``: (its programs by name, the mesh) on 8 chips."""

    def build(name, *bindings):
        config = recipe(*bindings)
        stage = next(stage for stage in config.stages if stage.name == name)
        mesh = abstract_mesh(stage.mesh, WHERE)
        return {program.name: program for program in programs(stage, config, mesh)}, mesh

    return build


def test_state_by_hand(parts):
    found, mesh = parts("lm")
    memory = program_memory(found["train"], mesh)
    embedding, attention, mlp = 512 * WIDTH, WIDTH * 128 * (4 + 2 + 2 + 4), 3 * WIDTH * 512
    norms = (2 * LAYERS + 1) * WIDTH  # on every device
    own = 4 * ((embedding + LAYERS * (attention + mlp)) // 8 + norms)
    assert memory["parameters"] == memory["gradients"] == own
    assert memory["optimizer"] == pytest.approx(2 * own, abs=16)  # and counters
    assert memory["batch"] == 5 * 4 * ROWS * LENGTH // 8


def test_shapes_of_other_rows_are_those_that_a_trace_gives(parts, monkeypatch):
    traces, traced = moments.Traces(), []
    real = moments.trace_residuals
    monkeypatch.setattr(moments, "trace_residuals", lambda *args: traced.append(args) or real(*args))
    for rows in (8, 16, 48):
        found, mesh = parts("lm", f"Stage.batch_size = {rows}", "DecoderConfig.remat = 'none'")
        shapes = traces.residuals(found["train"], mesh)
        assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in real(found["train"], mesh)]
    assert len(traced) == 2


@pytest.mark.parametrize(
    "changes", [("MeshConfig.fsdp = 4", "MeshConfig.tensor = 2"), ("MeshConfig.data = 2", "MeshConfig.fsdp = 4")]
)
def test_traces_of_one_mesh_serve_others_of_its_kind(parts, changes):
    """What ``Traces`` takes to be alike is."""
    found, mesh = parts("lm", *changes)
    other = ("MeshConfig.fsdp = 1", "MeshConfig.data = 4", "MeshConfig.tensor = 2") if "tensor" in changes[1] else ()
    again, wider = parts("lm", *other)
    one, two = (moments.trace_residuals(built["train"], on) for built, on in ((found, mesh), (again, wider)))
    assert [(x.shape, x.dtype) for x in one] == [(x.shape, x.dtype) for x in two]


def test_a_layers_input_is_what_full_remat_saves(parts):
    saved = {}
    for layers in (4, 8):
        found, mesh = parts("lm", f"DecoderConfig.num_layers = {layers}")
        saved[layers] = saved_activations(found["train"], mesh)[0]
    assert saved[8] - saved[4] == 4 * (ROWS // 8) * LENGTH * WIDTH * 2


def test_remat_orders_what_is_saved(parts):
    full, dots, none = (
        saved_activations((built := parts("lm", f"DecoderConfig.remat = '{remat}'"))[0]["train"], built[1])[0]
        for remat in ("full", "dots", "none")
    )
    assert full < dots < none


def test_accumulating_saves_a_microbatchs_activations(parts):
    whole, mesh = parts("lm")
    half, _ = parts("lm", "Stage.accumulate = 2")
    ratio = saved_activations(half["train"], mesh)[0] / saved_activations(whole["train"], mesh)[0]
    assert ratio == pytest.approx(0.5, rel=0.02)
    first, second = (program_memory(found["train"], mesh)["gradients"] for found in (whole, half))
    assert second == 2 * first


@pytest.mark.parametrize(("axis", "splits_state"), [("tensor", True), ("data", False), ("context", False)])
def test_tensor_splits_the_state_and_the_others_copy_it(parts, axis, splits_state):
    other, mesh = parts("lm", "MeshConfig.fsdp = 4", f"MeshConfig.{axis} = 2")
    memory = program_memory(other["train"], mesh)
    whole, whole_mesh = parts("lm")
    before = program_memory(whole["train"], whole_mesh)
    ratio = memory["parameters"] / before["parameters"]
    assert ratio == pytest.approx(1 if splits_state else 2, rel=0.02)  # norms are everywhere
    # Eight devices share one batch's activations in any case.
    assert memory["activations saved"] == pytest.approx(before["activations saved"], rel=0.15)


def test_dpo_keeps_its_reference_beside_the_step(parts):
    found, mesh = parts("dpo")
    peaks = {peak.program: peak for peak in stage_memory(list(found.values()), mesh)}
    frozen = peaks["reference"].parts["parameters"]
    assert peaks["train"].parts["reference and critic"] == frozen
    assert found["train"].rows == 2 * ROWS  # both sides of a pair


def test_ppo_keeps_four_models(parts):
    found, mesh = parts("ppo")
    assert list(found) == [
        "rollout: read",
        "rollout: write",
        *(f"score: {name}" for name in ("policy", "reference", "critic", "reward model")),
        "train: policy",
        "train: critic",
    ]
    kept = resident(list(found.values()))
    assert set(kept) == {"policy", "critic", "reference", "reward model"}
    peaks = {peak.program: peak for peak in stage_memory(list(found.values()), mesh)}
    beside = peaks["train: policy"].parts["reference and critic"]
    assert beside == kept["critic"] + kept["reference"] + kept["reward model"]
    assert found["train: policy"].calls == 2 * 2  # epochs x minibatches
    assert found["score: policy"].calls == 2


def test_the_cache_of_a_rollout(parts):
    found, mesh = parts("ppo")
    cache = decode_memory(found["rollout: write"], mesh)["kv cache"]
    # Keys and values of 2 heads of 128 in bfloat16, of 4 rows a device (32 prompts over 8).
    assert cache == pytest.approx(LAYERS * 2 * 2 * 128 * LENGTH * 2 * 32 / 8, rel=1e-3)


def test_operations_of_a_rollout(parts):
    """Prompts of 256 tokens, of which the last alone has logits, and 256 tokens more; all products, none twice."""
    found, mesh = parts("ppo")
    read, write = found["rollout: read"], found["rollout: write"]
    matrices = LAYERS * 2 * (WIDTH * 128 * (4 + 2 + 2 + 4) + 3 * WIDTH * 512)
    head = 2 * WIDTH * 512
    keys = [4 * LAYERS * 4 * 128 * sum(range(a + 1, b + 1)) for a, b in ((0, 256), (256, 512))]
    assert 8 * sum(executed_flops(read, mesh)) == read.model_flops == read.rows * (256 * matrices + head + keys[0])
    assert 8 * sum(executed_flops(write, mesh)) == write.model_flops == 32 * (256 * (matrices + head) + keys[1])
    planned = [work.flops * times for work, times in flat(items_of(write, mesh)) if isinstance(work, hlo.Work)]
    assert 8 * sum(planned) == pytest.approx(write.model_flops)


def test_a_mixture_has_room_for_all_tokens_that_could_come(recipe):
    """On its own a device keeps its own tokens' assignments; with four, those of all four."""
    needed = {}
    for expert in (1, 4):
        config = recipe(
            *("lm/Stage.model = @MixtralConfig()", "MixtralConfig.vocab_size = 512", "MixtralConfig.num_layers = 2"),
            *("MixtralConfig.d_model = 256", "MixtralConfig.num_heads = 4", "MixtralConfig.num_kv_heads = 2"),
            *("MixtralConfig.d_ff = 512", "MixtralConfig.num_experts = 8", "MixtralConfig.top_k = 2"),
            *("MixtralConfig.max_positions = 512", "MixtralConfig.remat = 'full'"),
            *("MixtralConfig.compute_dtype = 'bfloat16'", f"MeshConfig.expert = {expert}"),
        )
        mesh = abstract_mesh(config.stages[0].mesh, WHERE)
        (train,) = programs(config.stages[0], config, mesh)
        needed[expert] = moments.layer_activations(train, mesh).read
    tokens = ROWS * LENGTH // 8
    a_device = tokens * (2 * (3 * 512 + 7 * 256) + 2 * 256) * 2
    assert needed[4] - needed[1] == 3 * a_device


def test_zero_says_what_is_whole_while_a_step_runs(parts):
    found = {level: parts("lm", f"MeshConfig.zero = {level}") for level in (1, 2, 3)}
    memory = {level: program_memory(built["train"], mesh) for level, (built, mesh) in found.items()}
    sums = {level: moment(built["train"], mesh, "backward").gradients for level, (built, mesh) in found.items()}
    # Of the layers: float32 split over 8, bfloat16 split, bfloat16 whole.
    assert sums[1] - sums[2] == 7 * (sums[3] - sums[2]) > 0
    copies = {level: moment(built["train"], mesh, "lookup").working for level, (built, mesh) in found.items()}
    assert copies[1] == copies[2]
    layers = 2 * LAYERS * (WIDTH * 128 * (4 + 2 + 2 + 4) + 3 * WIDTH * 512)  # in bfloat16
    assert copies[2] - copies[3] == layers * 7 // 8
    assert len({memory[level]["optimizer"] for level in memory}) == 1
    sent = {}
    for level, (built, mesh) in found.items():
        starts = [
            (item, times) for item, times in hlo.flat(items_of(built["train"], mesh)) if hasattr(item, "collective")
        ]
        sent[level] = {(start.collective.kind, times) for start, times in starts}
    assert sent == {
        3: {("all-gather", LAYERS), ("reduce-scatter", LAYERS)},
        2: {("all-gather", 1), ("reduce-scatter", LAYERS)},
        1: {("all-gather", 1), ("reduce-scatter", 1)},
    }


def test_a_state_split_over_data_too(parts):
    both = ("MeshConfig.data = 2", "MeshConfig.fsdp = 4")
    (plain, mesh), (split, _) = parts("lm", *both), parts("lm", *both, "MeshConfig.zero_data = True")
    memory = [program_memory(found["train"], mesh) for found in (plain, split)]
    for part in ("parameters", "optimizer"):
        assert memory[1][part] == pytest.approx(memory[0][part] / 2, rel=0.02)
    # Gradients of copies in bfloat16.
    assert memory[1]["gradients"] < 0.5 * memory[0]["gradients"]
    # So is the copy that a step computes with, which layers gather; for microbatches it is made whole over data.
    several, _ = parts("lm", *both, "MeshConfig.zero_data = True", "Stage.accumulate = 2")
    copies = [moments.Weights(found["train"], mesh).copies for found in (plain, split, several)]
    assert copies[0] == 2 * copies[1] == copies[2] > 0
    over_data = [
        {item.collective.kind for item, _ in hlo.flat(items_of(found["train"], mesh)) if _axes(item) == ("data",)}
        for found in (plain, split)
    ]
    assert over_data == [{"all-reduce"}, {"all-gather", "reduce-scatter"}]


def _axes(item) -> tuple[str, ...]:
    return item.collective.axes if hasattr(item, "collective") else ()


def test_what_goes_to_the_host_is_not_on_the_device(parts):
    names = "('query', 'mlp_up')"
    saved = {}
    for field in (None, "remat_save", "remat_offload"):
        found, mesh = parts("lm", *(() if field is None else (f"DecoderConfig.{field} = {names}",)))
        saved[field] = saved_activations(found["train"], mesh)[0]
    tokens = ROWS // 8 * LENGTH
    assert saved["remat_offload"] == saved[None]
    assert saved["remat_save"] - saved[None] == pytest.approx(LAYERS * tokens * (4 * 128 + 512) * 2, rel=0.01)
    found, mesh = parts("lm", "DecoderConfig.remat_offload = ('stream',)")
    without = saved_activations(found["train"], mesh)[0]
    assert saved[None] - without == LAYERS * tokens * WIDTH * 2


def test_idle_stages_are_counted(parts):
    """Of two stages and four microbatches one tick in five is idle; with two rounds one in nine."""
    found, mesh = parts("lm", "MeshConfig.fsdp = 8")
    products, kernels = executed_flops(found["train"], mesh)
    split = ("MeshConfig.stage = 2", "MeshConfig.fsdp = 4", "DecoderConfig.pipeline_microbatches = 4")
    for rounds, ticks in ((1, 5 / 4), (2, 9 / 8)):
        found, mesh = parts("lm", *split, f"DecoderConfig.pipeline_rounds = {rounds}")
        more, of_kernels = executed_flops(found["train"], mesh)
        assert of_kernels == pytest.approx(ticks * kernels)
        assert products < more < ticks * products
        works = [work for work, times in flat(items_of(found["train"], mesh)) for _ in range(times)]
        done = sum(work.flops for work in works if isinstance(work, hlo.Work))
        assert done == pytest.approx(more + of_kernels)
        assert {start.collective.kind for start in works if isinstance(start, hlo.Start)} >= {"collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "remat", "kept"),
    [("lm", "none", ()), ("lm", "full", ()), ("dpo", "full", ()), ("lm", "full", ("query", "mlp_up"))],
)
def test_operations_are_those_of_the_compiled_step(recipe, stage, remat, kept):
    config = recipe(
        *("TextDataset.seq_len = 64", "PairDataset.seq_len = 64", "DecoderConfig.attention = 'xla'"),
        *(f"DecoderConfig.remat = '{remat}'", f"DecoderConfig.remat_save = {kept}"),
    )
    stage = next(one for one in config.stages if one.name == stage)
    mesh = make_mesh(stage.mesh)
    train = programs(stage, config, mesh)[-1]
    with jax.set_mesh(mesh):
        text = train.jitted.lower(*train.args).compile().as_text()
    found = hlo.walk(text, dict(mesh.shape))
    products, _ = executed_flops(train, mesh)
    # XLA's attention computes what the mask hides too: two products forward, again under remat, and four backward.
    attention = LAYERS * 4 * 4 * 128 * 64 * train.tokens / 8 * (4 if remat == "full" else 3)
    assert found.unknown == ()
    assert found.totals().flops == pytest.approx(products + attention, rel=0.01)
    assert {start.collective.axes for start, _ in found.collectives()} == {("fsdp",)}
