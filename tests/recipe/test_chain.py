"""A recipe from text to PPO: run, skipped, rerun where something changed, and used."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxtrain.checkpoint import read_meta
from jaxtrain.config_json import read_json, write_json
from jaxtrain.recipe.chain import shortfalls
from jaxtrain.recipe.workspace import claim_folder, locked

STAGES = ("lm", "sft", "reward", "dpo", "ppo")


def stamps(out):
    """When and what every file of the stages was written."""
    return {p.relative_to(out): p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}


@pytest.fixture
def copied(chain, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(chain.out, tmp_path / "out")


def test_five_stages_in_one_go(chain):
    assert "skipped" not in chain.first.err
    summary = json.loads((chain.out / "summary.json").read_text())
    assert list(dict.fromkeys(row["stage"] for row in summary)) == list(STAGES)
    for row in summary:
        assert list(row) == ["stage", "metric", "before", "after", "better", "seconds"]
        assert row["better"] in ("lower", "higher", "none")
        assert all(isinstance(row[name], float) for name in ("before", "after", "seconds"))
    assert [r["metric"] for r in summary if r["stage"] == "ppo"][:2] == [
        "held-out mean reward",
        "held-out KL to the reference (nats)",
    ]
    # Before the first update, a policy is its own reference.
    assert abs(next(r["before"] for r in summary if "KL" in r["metric"])) < 1e-6
    for name in STAGES:
        folder = chain.stage(name)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 3 if name == "ppo" else 4))
        assert list((folder / "events").iterdir())
        samples = json.loads((folder / "samples.json").read_text())
        assert bool(samples["samples"]) == bool(samples["next_tokens"]) == (name != "reward")  # which cannot write
    html = (chain.out / "report.html").read_text()
    assert all(name in html for name in STAGES) and "http://" not in html.replace("http://www.w3.org", "")
    for name in ("config.gin", "config.json", "tokenizer", "stages/untrained/samples.json"):
        assert (chain.out / name).exists()
    table = chain.first.out
    assert "held-out bits per byte" in table and str(chain.out / "report.html") in table


def test_every_checkpoint_names_its_ancestry(chain):
    results = {name: read_json(chain.stage(name) / "result.json") for name in STAGES}
    parents = {
        "lm": [],
        "sft": ["lm"],
        "reward": ["lm", "sft"],
        "dpo": ["lm", "sft"],
        "ppo": ["lm", "sft", "reward"],
    }
    for name, wanted in parents.items():
        ancestry = results[name]["parents"]
        assert [record["stage"] for record in ancestry] == wanted
        assert [record["hash"] for record in ancestry] == [results[parent]["hash"] for parent in wanted]
        assert read_meta(chain.stage(name) / "checkpoints")["ancestry"] == ancestry


def test_a_second_run_changes_nothing(chain, copied, jaxtrain):
    before = stamps(copied)
    # The mesh, and how often to save, change no number: they are not part of what a stage is.
    again = jaxtrain(
        "run", chain.recipe, "--out", copied, "--gin", "Stage.mesh = @MeshConfig()", "--gin", "MeshConfig.data = 8",
        "--gin", "Stage.checkpoint_every = 1",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert [line for line in again.err.splitlines() if "skipped" in line] == [
        f"{name}: unchanged, skipped" for name in STAGES
    ]
    assert stamps(copied) == before
    assert json.loads((copied / "summary.json").read_text()) == json.loads((chain.out / "summary.json").read_text())


@pytest.mark.parametrize(
    ("binding", "rerun"),
    [("dpo/DPO.beta = 0.2", ["dpo"]), ("sft/Stage.steps = 2", ["sft", "reward", "dpo", "ppo"])],
)
def test_a_change_reruns_its_stage_and_what_comes_from_it(binding, rerun, chain, copied, jaxtrain):
    before = stamps(copied)
    again = jaxtrain("run", chain.recipe, "--out", copied, "--gin", binding)
    assert again.code == 0, again.err
    kept = [name for name in STAGES if name not in rerun]
    assert [line for line in again.err.splitlines() if "skipped" in line] == [
        f"{name}: unchanged, skipped" for name in kept
    ]
    after = stamps(copied)
    for path, stamp in before.items():
        if path.parts[1] in kept:
            assert after[path] == stamp
    old = {path.name.rpartition("-")[0]: path for path in (copied / "stages" / "superseded").iterdir()}
    assert sorted(old) == sorted(rerun)
    for name in rerun:
        was, now = read_json(old[name] / "result.json"), read_json(copied / "stages" / name / "result.json")
        assert was == read_json(chain.stage(name) / "result.json") and was["hash"] != now["hash"]
        assert old[name].name == f"{name}-{was['hash'][:12]}"


def test_generate_continues_a_finished_stage(chain, jaxtrain):
    words = [
        "generate",
        "--checkpoint",
        chain.stage("dpo"),
        "--prompt",
        "Is the cat red?",
        "--max_new_tokens",
        5,
    ]
    done = jaxtrain(*words, "--temperature", 0)
    assert done.code == 0 and done.out == jaxtrain(*words, "--temperature", 0).out
    assert "tokens/s" in done.err
    sampled = [jaxtrain(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for folder, message in [
        (chain.stage("reward"), "heads ('reward',): it cannot write"),
        (chain.out, "is a whole run: name one of its stages"),
    ]:
        failed = jaxtrain("generate", "--checkpoint", folder, "--prompt", "x")
        assert failed.code == 43 and message in failed.err and str(folder) in failed.err


@pytest.mark.smoke
def test_a_dry_run_counts_and_trains_nothing(jaxtrain, recipe_text, tmp_path):
    """By hand: d 16, 2 heads and 1 key head of 8, f 32, 1 layer, vocabulary 300, 32 tokens, tied."""
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(recipe_text, encoding="utf-8")
    done = jaxtrain("train", "--gin_file", recipe, "--out", tmp_path / "out", "--dry_run")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    trunk = 300 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    forward = 2 * 16 * 8 * (2 * 2 + 2) + 2 * 2 * 16 * 33 / 2 + 2 * 3 * 16 * 32 + 2 * 16 * 300
    # AdamW: two moments a parameter and its count; then step, skipped, streak and the key's two words.
    state = 4 * (3 * trunk + 2 + 3 + 2)
    line = next(line for line in done.out.splitlines() if line.startswith("# lm model"))
    assert line.startswith(
        f"# lm model: {trunk:,} parameters, {3 * forward:,.0f} training FLOPs per token at 32 tokens"
    )
    assert int(line.split(", ")[-1].split()[0].replace(",", "")) == pytest.approx(state, abs=16)
    assert f"# ppo critic: {trunk + 16:,} parameters" in done.out
    assert "lm/Stage.steps = 3" in done.out or "steps = 3" in done.out


def test_check_judges_the_first_directed_figure_and_what_is_required():
    def row(metric, before, after, better, required=None):
        return {"metric": metric, "before": before, "after": after, "better": better, "required": required}

    assert shortfalls("s", [row("shown", 1, 9, "none"), row("loss", 2, 1, "lower"), row("other", 1, 2, "lower")]) == []
    assert shortfalls("s", [row("loss", 1, 2, "lower")]) == ["s: loss went from 1 to 2; it should be lower"]
    assert len(shortfalls("s", [row("loss", 1, 1, "lower")])) == 1
    assert len(shortfalls("s", [row("loss", 1, float("nan"), "lower")])) == 1
    assert shortfalls("s", [row("accuracy", 0.5, 0.7, "higher", 0.8)]) == ["s: accuracy is 0.7, and 0.8 is required"]
    assert shortfalls("s", [row("accuracy", 0.5, 0.8, "higher", 0.8)]) == []


def test_a_folder_in_use_is_refused_and_what_lies_in_the_way_is_kept(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match="run is in use by another jaxtrain process"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
    stage = tmp_path / "run" / "stages" / "a"
    for key in ("k1", "k2", "k2", "k1", "k2"):
        claim_folder(stage, key)
        write_json(stage / "inputs.json", {"hash": key})
    assert sorted(p.name for p in (stage.parent / "superseded").iterdir()) == ["a-k1", "a-k1-1", "a-k2"]
    (stage / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json is damaged .* delete it"):
        claim_folder(stage, "k1")
