"""The command: every stage runs, is stopped and continued; what is wrong is told with its stage."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import jax
import pytest

from jaxtrain import main as command_line
from jaxtrain.data.tokenizer import SentencePieceBPE
from jaxtrain.rehearse import command
from jaxtrain.rehearse.sources import MadeUp

# Of a size that no laptop trains, from data, a tokenizer and a model that are elsewhere.
SFT = """
BASE = 'released/model'
Recipe.tokenizer = @SavedTokenizer()
SavedTokenizer.directory = %BASE
Recipe.stages = (@Stage(),)
Stage.name = 'sft'
Stage.init = %BASE
Stage.model = @Qwen3Config()
Qwen3Config.vocab_size = 151936
Qwen3Config.num_layers = 36
Qwen3Config.d_model = 4096
Qwen3Config.num_heads = 32
Qwen3Config.num_kv_heads = 8
Qwen3Config.d_ff = 12288
Qwen3Config.max_positions = 40960
Qwen3Config.compute_dtype = 'bfloat16'
Qwen3Config.remat = 'full'
Stage.data = @InstructionDataset()
InstructionDataset.source = @JsonLines()
InstructionDataset.seq_len = 4096
JsonLines.pattern = 'rows/*.jsonl'
Stage.objective = @SFT()
Stage.optimizer = @AdamW()
AdamW.schedule = @WarmupCosine()
WarmupCosine.peak = 1e-3
WarmupCosine.warmup_steps = 100
Stage.steps = 2000
Stage.batch_size = 64
Stage.accumulate = 4
Stage.checkpoint_every = 500
Stage.mesh = @MeshConfig()
MeshConfig.data = 4
MeshConfig.fsdp = 8
MeshConfig.zero_data = True
Stage.evaluation = (@HeldOut(),)
HeldOut.measures = (@Measure(),)
Measure.metric = 'loss'
Measure.label = 'held-out loss'
Measure.better = 'lower'
"""


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """What is compiled before a stage is stopped need not be after."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    assert jax.device_count() == 8  # before a rehearsal makes devices of its own
    environment = dict(os.environ)
    jax.config.update(names[0], str(tmp_path_factory.mktemp("xla")))
    jax.config.update(names[1], 0.05)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """``rehearse(gin, *arguments)``: (exit code, what it printed, what it said), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "set_environment", lambda: None)
    monkeypatch.delenv("JAXTRAIN_TRACEBACK", raising=False)

    def call(text: str, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "recipe.gin").write_text(text, encoding="utf-8")
        shown, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
            code = command_line.main(["rehearse", "recipe.gin", *arguments])
        return code, shown.getvalue(), said.getvalue()

    return call


@pytest.mark.slow
def test_a_stage_whose_data_and_weights_are_elsewhere(rehearse, tmp_path):
    code, shown, said = rehearse(SFT, "--devices", "4", "--out", "kept")
    assert code == 0, said
    rows = [line.split() for line in shown.splitlines() if "SFT, Qwen3, data=2 fsdp=2" in line]
    assert len(rows) == 1 and rows[0][0] == "sft" and "->" in rows[0]
    assert "sft: continuing after step 2" in said
    assert said.count("NOT THE REAL THING") == 3
    for line in ("rows/*.jsonl", "released/model, the init of sft", "the SavedTokenizer"):
        assert line in said and line in shown.split("Made up:")[1].split("Shrunk:")[0]
    changes = shown.split("Shrunk:")[1].split("Not tested:")[0]
    for line in (
        "Qwen3Config.num_layers: 36 -> 2",
        "Stage.steps: 2,000 -> 4",
        "Stage.accumulate: 4 -> 2",
        "MeshConfig.fsdp: 8 -> 2",
        "WarmupCosine.warmup_steps: 100 -> 1",
    ):
        assert line in changes
    assert "remat" not in changes and "zero_data" not in changes and "compute_dtype" not in changes
    # The run is there to look at, and nothing else is.
    logged = [json.loads(line) for line in (tmp_path / "kept/stages/sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    saved = {path.name for path in (tmp_path / "kept/stages/sft/checkpoints").iterdir() if path.name.isdigit()}
    assert saved == {"3", "4"}  # the one at the stop has been the third from the end
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.gin", "kept"}
    code, _, said = rehearse(SFT, "--devices", "4", "--out", "kept")
    assert code == 43 and "is not empty" in said


def test_a_mistake_in_local_data_names_the_stage_and_the_line(rehearse, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [json.dumps({"prompt": f"p {i}", "answer": "a"}) for i in range(50)]
    (tmp_path / "rows/a.jsonl").write_text("\n".join(rows))
    code, shown, said = rehearse(SFT.replace("Stage.init = %BASE\n", "Stage.init = None\n"), "--devices", "4")
    assert code == 43 and not shown
    assert "stage sft failed in its rehearsal" in said and "a.jsonl:1: column 'completion' is missing" in said


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        ("Qwen3Config.num_kv_heads = 6", "is not a multiple of num_kv_heads=6"),
        ("Stage.batch_size = 48", "batch_size=48 is not divisible by the 32 devices"),
        ("Qwen3Config.d_model = 4112", "is not divisible by the 32 devices"),
        ("WarmupCosine.warmup_steps = 3000", "more than the run's 2000 steps"),
        ("AdamW.frozen = ('emebd.*',)", "emebd"),
        ("Stage.init = 'sfft'", "did you mean 'sft'?"),
        ("Stage.stepz = 1", "stepz"),
    ],
)
def test_what_a_miniature_would_hide_is_found_at_full_size(binding, complaint, rehearse, monkeypatch):
    monkeypatch.setattr(command, "rehearse", lambda *_: pytest.fail("a stage ran"))
    text = SFT if "d_model" not in binding else SFT + "Qwen3Config.head_dim = 128\n"
    code, shown, said = rehearse(text, "--gin", binding)
    assert code == 43 and complaint in said and not shown


CHAIN = (
    SFT.replace("Stage.init = %BASE", "Stage.init = None")
    + """
two/Stage.name = 'two'
two/Stage.init = 'sft'
two/Qwen3Config.d_ff = 8192
"""
)


def test_stages_of_other_sizes_do_not_follow_from_each_other(rehearse):
    text = CHAIN.replace("(@Stage(),)", "(@Stage(), @two/Stage())")
    code, _, said = rehearse(text)
    assert code == 43
    assert "stage two: the checkpoint sft is of another model" in said


def test_our_own_bugs_are_told_with_the_stage_too(rehearse, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(command, "run_recipe", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        rehearse(SFT, "--devices", "4")


def test_a_stage_that_begins_anew_has_not_rehearsed_its_checkpoints(rehearse, monkeypatch):
    monkeypatch.setattr(command, "run_recipe", lambda *_: None)
    code, _, said = rehearse(SFT, "--devices", "4")
    assert code == 43 and "stage stand-in-1" not in said and "stage sft began anew" in said


@pytest.mark.slow
def test_a_loss_that_is_no_number_fails(rehearse):
    code, _, said = rehearse(SFT, "--devices", "4", "--gin", "WarmupCosine.peak = 1e30")
    assert code == 43 and "some are no numbers" in said and "stage sft" in said


def test_several_processes_are_refused(rehearse, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_COORDINATOR", "localhost:1")
    code, _, said = rehearse(SFT)
    assert code == 43 and "a rehearsal is one process" in said


def test_a_tokenizer_and_data_that_are_here_are_looked_at_in_full_length(rehearse, tmp_path, monkeypatch):
    """The miniature has a tokenizer of its own; whether the real one can write this chat is asked of the real one."""
    monkeypatch.setattr(command, "rehearse", lambda *_: pytest.fail("a stage ran"))
    SentencePieceBPE(vocab_size=400, sources=(MadeUp(size=2000),)).train(tmp_path / "tokenizer")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i} " + "long " * 40, "completion": "a"}) for i in range(50))
    )
    text = SFT.replace("SavedTokenizer.directory = %BASE", "SavedTokenizer.directory = 'tokenizer'")
    text = text.replace("seq_len = 4096", "seq_len = 64")
    code, _, said = rehearse(text)
    assert code == 43 and "stage sft: nothing is left of the train data" in said, said
    code, _, said = rehearse(text, "--gin", "Qwen3Config.vocab_size = 300")
    assert code == 43 and "smaller than the tokenizer's 400" in said


@pytest.mark.slow
def test_every_stage_of_a_chain_split_in_every_way(rehearse):
    """LM, SFT, reward model, DPO and PPO, on meshes of more than one axis."""
    text = (Path(__file__).parents[1] / "plan" / "conftest.py").read_text().split('RECIPE = """')[1].split('"""')[0]
    code, shown, said = rehearse(text, "--gin", "MeshConfig.tensor = 2", "--devices", "4")
    assert code == 0, said
    names = ["lm", "sft", "reward", "dpo", "ppo"]
    table = [line.split() for line in shown.split("\n\n")[0].splitlines()[2:]]
    assert [row[0] for row in table] == names
    assert all("fsdp=2 tensor=2" in line for line in shown.split("\n\n")[0].splitlines()[2:])
    assert [f"{name}: continuing after " in said for name in names] == [True] * 5
