"""The strict gin front end: what it builds, what its resolved text rebuilds, and each thing it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

import gin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain import gin_edge
from jaxtrain.config_json import from_json, to_json

component = dataclasses.dataclass(frozen=True, kw_only=True)


class Objective(Protocol):
    def __call__(self, batch: Any) -> float: ...


@component
class LM:
    z_loss: float = 0.0

    def __call__(self, batch):
        return self.z_loss


@component
class DPO:
    beta: float = 0.1
    loss: Literal["sigmoid", "hinge"] = "sigmoid"

    def __call__(self, batch):
        return self.beta


@component
class Rope:
    theta: float = 10000.0
    factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"theta must be positive, found {self.theta}")


@component
class Decoder:
    num_layers: int = 2
    rope: Rope = Rope()
    long_rope: Rope | None = None
    heads: tuple[str, ...] = ("lm",)
    shape: tuple[int, int] = (8, 1)
    tied: bool = True


@component
class Stage:
    objective: Objective
    model: Decoder = Decoder()
    steps: int = 100
    name: str = ""
    anything: Any = None
    rate: float | int | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@component
class Recipe:
    stages: tuple[Stage, ...]
    seed: int = 0


COMPONENTS = (LM, DPO, Rope, Decoder, Stage)
CHAIN = """\
Recipe.stages = [@pretrain/Stage(), @dpo/Stage()]
pretrain/Stage.objective = @LM()
dpo/Stage.objective = @DPO()
# four lines: what a test appends stands on line 5
"""


def load(text: str, tmp_path: Path, bindings=(), roots=()) -> gin_edge.Loaded:
    file = tmp_path / "recipe.gin"
    file.write_text(text, encoding="utf-8")
    return gin_edge.load(Recipe, COMPONENTS, [file], bindings, roots)


def refusal(text: str, tmp_path: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load(text, tmp_path, **options)
    return str(caught.value)


def test_builds_stages_from_scopes(tmp_path):
    config, _ = load(
        CHAIN + "Stage.steps = 7\ndpo/Stage.steps = 9\nDPO.beta = 1\npretrain/LM.z_loss = 1e-4\nRecipe.seed = 3\n",
        tmp_path,
    )
    expected = Recipe(
        seed=3,
        stages=(Stage(objective=LM(z_loss=1e-4), steps=7), Stage(objective=DPO(beta=1.0), steps=9)),
    )
    assert config == expected
    assert type(config.stages[1].objective.beta) is float  # the int 1 became a float
    assert type(config.stages) is tuple


def test_the_last_binding_wins_and_the_command_line_comes_last(tmp_path):
    config, _ = load(CHAIN + "Recipe.seed = 1\nRecipe.seed = 2\n", tmp_path)
    assert config.seed == 2
    config, _ = load(CHAIN + "Recipe.seed = 1\n", tmp_path, ["Recipe.seed = 5", "dpo/DPO.loss = 'hinge'"])
    assert config.seed == 5
    assert config.stages[1].objective.loss == "hinge"


def test_blocks_macros_and_nested_containers(tmp_path):
    text = """
Recipe:
  stages = (@a/Stage(),)  # a tuple as well as a list
  seed = %seed
seed = 11
sizes = [4, 2]
a/Stage.objective = @b/LM()
a/Stage.model = @Decoder()
a/Stage.weights = {'code': 1, 'prose': %share}
share = 0.5
Decoder.shape = %sizes
a/Decoder.long_rope = @Rope()
a/Rope.factors = [1, 2.5]
"""
    config, _ = load(text, tmp_path)
    assert config.seed == 11
    assert config.stages[0].model.shape == (4, 2)
    assert config.stages[0].model.long_rope == Rope(factors=(1.0, 2.5))
    assert config.stages[0].model.rope == Rope()
    assert config.stages[0].weights == {"code": 1.0, "prose": 0.5}


# What gin itself makes of scopes: a scoped reference replaces the scope, an unscoped one keeps it, and a
# macro's value is evaluated under the macro's name.
AS_GIN = {
    "inner sees the outer scope": CHAIN + "pretrain/LM.z_loss = 0.5\nLM.z_loss = 0.25\n",
    "scoped reference replaces": """
Recipe.stages = [@a/Stage(), @b/Stage()]
Stage.objective = @x/LM()
LM.z_loss = 0.125
x/LM.z_loss = 0.25
b/Stage.model = @Decoder()
b/Decoder.num_layers = 4
""",
    "nested scopes": """
Recipe.stages = [@a/b/Stage(), @a/Stage()]
Stage.objective = @LM()
LM.z_loss = 0.125
a/LM.z_loss = 0.25
a/b/LM.z_loss = 0.5
""",
    "macros are scopes": """
Recipe.stages = [@a/Stage()]
objective = @LM()
Stage.objective = %objective
objective/LM.z_loss = 0.5
LM.z_loss = 0.25
""",
}


@pytest.fixture(scope="module")
def gin_recipe():
    names = {cls: gin.external_configurable(cls, module="test_gin_edge") for cls in (*COMPONENTS, Recipe)}
    return names[Recipe]


@pytest.mark.parametrize("text", AS_GIN.values(), ids=AS_GIN)
def test_scopes_mean_what_they_mean_to_gin(text, tmp_path, gin_recipe):
    ours = load(text, tmp_path).config
    gin.parse_config(text)
    try:
        theirs = gin_recipe()
    finally:
        gin.clear_config()
    assert dataclasses.replace(theirs, stages=tuple(theirs.stages)) == ours


def test_loads_leave_nothing_behind_in_gin(tmp_path):
    first = load(CHAIN + "Recipe.seed = 4\n", tmp_path)
    assert gin.config_str() == ""
    assert load(CHAIN, tmp_path).config.seed == 0
    assert load(CHAIN + "Recipe.seed = 4\n", tmp_path) == first


def test_resolved_text_rebuilds_the_same(tmp_path):
    text = (
        CHAIN
        + """
unlimited = 1e999
pretrain/Stage.model = @Decoder()
pretrain/Decoder.rope = @Rope()
pretrain/Rope.theta = 5e5
dpo/Stage.model = @Decoder()
dpo/Stage.anything = @LM()
LM.z_loss = 1e-4
dpo/LM.z_loss = %unlimited
dpo/Stage.name = "it's \\\\ a\\ttab, a \\u00fcml\\u00e4ut\\nand more"
Decoder.num_layers = 3
Stage.rate = 3
Stage.weights = {'prose': 1}
"""
    )
    first = load(text, tmp_path)
    second = load(first.text, tmp_path)
    assert second.config == first.config
    assert to_json(second.config) == to_json(first.config)
    names = {cls.__name__: cls for cls in (*COMPONENTS, Recipe)}
    assert from_json(json.loads(json.dumps(to_json(first.config))), names) == first.config
    assert second.text == first.text
    assert type(first.config.stages[0].rate) is int  # of ``float | int``, the arm that changes nothing
    for default in ("dpo/DPO.beta = 0.1", "dpo/Rope.theta = 10000.0", "pretrain/Decoder.tied = True"):
        assert default in first.text.splitlines()
    assert "LM.z_loss = 0.0001" not in first.text.splitlines()  # shadowed bindings are gone
    assert "%" not in first.text


def test_resolved_text_keeps_two_defaults_of_one_class_apart(tmp_path):
    @component
    class Two:
        first: Rope = Rope(theta=1.0)
        second: Rope = Rope(theta=2.0)
        many: tuple[Rope, ...] = (Rope(theta=3.0), Rope(theta=1.0))

    globals()["Two"] = Two  # annotations are strings, looked up in the module
    first = gin_edge.load(Two, (Rope,), roots=())
    again = tmp_path / "again.gin"
    again.write_text(first.text)
    assert gin_edge.load(Two, (Rope,), [again], roots=()).config == first.config == Two()


floats = st.floats(allow_nan=False)
rope = st.builds(Rope, theta=floats.filter(lambda x: x > 0), factors=st.lists(floats, max_size=2).map(tuple))
decoders = st.builds(
    Decoder,
    num_layers=st.integers(),
    rope=rope,
    long_rope=st.none() | rope,
    heads=st.lists(st.text(), max_size=2).map(tuple),
    tied=st.booleans(),
)
objectives = st.builds(LM, z_loss=floats) | st.builds(DPO, loss=st.sampled_from(["sigmoid", "hinge"]))
stages = st.builds(
    Stage,
    objective=objectives,
    model=decoders,
    name=st.text(),
    anything=st.none() | rope,
    rate=st.none() | st.integers() | floats,
    weights=st.dictionaries(st.text().filter(lambda key: key != "@"), floats, max_size=2),
)


@settings(deadline=None, max_examples=25)
@given(st.builds(Recipe, stages=st.lists(stages, max_size=3).map(tuple)))
def test_any_tree_survives_its_own_text(tmp_path_factory, recipe):
    from jaxtrain import config_text

    text = config_text.write(recipe, {})
    rebuilt = load(text, tmp_path_factory.mktemp("gin"))
    assert to_json(rebuilt.config) == to_json(recipe)


TYPE_ERRORS = {
    "str for int": (
        "pretrain/Stage.steps = 'abc'",
        ["pretrain/Stage.steps: expected int, found 'abc' (str)"],
    ),
    "1e6 for int": ("pretrain/Stage.steps = 1e6", ["expected int, found 1000000.0 (float)", "write 1000000"]),
    "bool for int": ("Recipe.seed = True", ["Recipe.seed: expected int, found True (bool)"]),
    "bool for float": ("DPO.beta = True", ["dpo/DPO.beta: expected float, found True (bool)"]),
    "str for float": ("DPO.beta = '0.1'", ["expected float, found '0.1' (str)"]),
    "int for str": ("Stage.name = 3", ["pretrain/Stage.name: expected str, found 3 (int)"]),
    "int for bool": (
        "Stage.model = @Decoder()\nDecoder.tied = 1",
        ["pretrain/Decoder.tied: expected bool, found 1 (int)"],
    ),
    "not a choice": ("DPO.loss = 'sigmod'", ["expected 'sigmoid' or 'hinge', found 'sigmod' (str)"]),
    "item of a tuple": (
        "Stage.model = @Decoder()\nDecoder.heads = ['lm', 2]",
        ["pretrain/Decoder.heads[1]: expected str, found 2 (int)"],
    ),
    "length of a tuple": (
        "Stage.model = @Decoder()\nDecoder.shape = [1, 2, 3]",
        ["Decoder.shape: expected tuple[int, int] of length 2, found (1, 2, 3) (tuple)"],
    ),
    "not a tuple": (
        "Stage.model = @Decoder()\nDecoder.heads = 'lm'",
        ["Decoder.heads: expected tuple[str, ...], found 'lm' (str)"],
    ),
    "value of a mapping": (
        "Stage.weights = {'a': 'b'}",
        ["Stage.weights['a']: expected float, found 'b' (str)"],
    ),
    "union": ("Stage.rate = 'fast'", ["Stage.rate: expected float | int | None, found 'fast' (str)"]),
    "None for int": ("Recipe.seed = None", ["Recipe.seed: expected int, found None (NoneType)"]),
    "wrong component": ("Stage.model = @LM()", ["pretrain/Stage.model: expected Decoder, found LM"]),
    "literal for a protocol": (
        "dpo/Stage.objective = 'lm'",
        ["dpo/Stage.objective: expected Objective, found 'lm' (str)", "@Name()"],
    ),
    "component of another kind": (
        "pretrain/Stage.objective = @Rope()",
        ["expected Objective, found Rope", "__call__"],
    ),
    "literal for Any": ("Stage.anything = 3", ["Stage.anything: expected component, found 3 (int)"]),
    "reference that is not called": ("Stage.model = @Decoder", ["@Decoder refers to a class", "@Decoder()"]),
}


@pytest.mark.parametrize(("line", "parts"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_wrong_types_are_refused_with_field_value_and_line(line, parts, tmp_path):
    message = refusal(CHAIN + line + "\n", tmp_path)
    for part in parts:
        assert part in message
    last_line = len((CHAIN + line).splitlines())
    assert f"recipe.gin:{last_line}" in message


REFUSALS = {
    "unknown name": ("Stagee.steps = 3", ["recipe.gin:5: unknown name 'Stagee'; did you mean Stage?"]),
    "unknown field": (
        "Stage.step = 3",
        ["recipe.gin:5: Stage.step: Stage has no field 'step'; did you mean steps?"],
    ),
    "unknown reference": (
        "Stage.model = @Dcoder()",
        ["unknown name 'Dcoder'", "did you mean Decoder?", "gin:5"],
    ),
    "unknown name in a block": ("Stagee:\n  steps = 3", ["recipe.gin:5: unknown name 'Stagee'"]),
    "unknown macro": (
        "stps = 1\nStage.steps = %steps",
        ["unknown macro %steps; did you mean stps?", "gin:6"],
    ),
    "unused scope": (
        "pretran/Stage.steps = 3",
        ["pretran/Stage.steps has no effect: Stage is built as dpo/Stage, pretrain/Stage; bound at", "gin:5"],
    ),
    "unused component": (
        "Rope.theta = 3.0",
        ["Rope.theta has no effect: nothing refers to @Rope()", "gin:5"],
    ),
    "dead macro": ("steps = 3", ["macro steps is never used, bound at", "recipe.gin:5"]),
    "import": ("import os", ["recipe.gin:5: 'import os': a configuration cannot import"]),
    "dynamic registration": ("from __gin__ import dynamic_registration", ["recipe.gin:5", "cannot import"]),
    "reference cycle": (
        "Stage.model = @Decoder()\nDecoder.rope = @Stage()",
        ["reference cycle Recipe -> pretrain/Stage -> pretrain/Decoder -> pretrain/Stage", "gin:6"],
    ),
    "macro cycle": ("a = %b\nb = [%a]\nStage.steps = %a", ["macro cycle", "%a -> %b -> %a"]),
    "own check": (
        "dpo/Stage.model = @Decoder()\nDecoder.rope = @Rope()\ndpo/Rope.theta = -1",
        ["dpo/Rope: theta must be positive, found -1.0"],
    ),
    "bare word": (
        "Stage.name = pretrain",
        ["recipe.gin:5: not gin: 'pretrain' is no value (strings need quotes)"],
    ),
    "arithmetic": ("Stage.steps = 3 * 4", ["recipe.gin:5: not gin", "Stage.steps = 3 * 4"]),
    "unclosed bracket": ("Stage.name = [1,", ["recipe.gin", "not gin"]),
    "no statement": ("Stage.name", ["recipe.gin:5: not gin"]),
}


@pytest.mark.parametrize(("line", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_mistakes_are_refused_by_name_and_line(line, parts, tmp_path):
    message = refusal(CHAIN + line + "\n", tmp_path)
    for part in parts:
        assert part in message


def test_required_fields_are_named(tmp_path):
    message = refusal("Recipe.stages = [@a/Stage()]\n", tmp_path)
    assert "a/Stage.objective (Objective) is required and not bound" in message
    assert "recipe.gin:1" in message
    assert "Recipe.stages (tuple[Stage, ...]) is required" in refusal("", tmp_path)


def test_command_line_bindings_are_named(tmp_path):
    assert "bound at --gin \"Recipe.seed = 'x'\"" in refusal(CHAIN, tmp_path, bindings=["Recipe.seed = 'x'"])
    for binding in ("include 'x.gin'", "import os", "Recipe.seed", "Recipe.seed = 1\nRecipe.seed = 2", ""):
        assert f"--gin {binding!r}" in refusal(CHAIN, tmp_path, bindings=[binding])


def test_includes_come_from_the_roots_and_from_beside_the_file(tmp_path):
    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    (shipped / "models").mkdir(parents=True)
    mine.mkdir()
    (shipped / "models" / "tiny.gin").write_text("Decoder.num_layers = 1\ninclude 'rope.gin'\n")
    (shipped / "models" / "rope.gin").write_text("Stage.model = @Decoder()\n")
    (mine / "chain.gin").write_text(CHAIN)
    text = "include 'models/tiny.gin'\ninclude 'chain.gin'\nDecoder.num_layers = 5\n"
    config, _ = load(text, mine, roots=[shipped])
    assert [stage.model.num_layers for stage in config.stages] == [5, 5]
    named_in_root = gin_edge.load(Recipe, COMPONENTS, [mine / "chain.gin", "models/tiny.gin"], roots=[shipped])
    assert named_in_root.config.stages[0].model.num_layers == 1

    (tmp_path / "outside.gin").write_text("Recipe.seed = 1\n")
    (mine / "link.gin").symlink_to(tmp_path / "outside.gin")
    sibling = tmp_path / "mine_not" / "outside.gin"  # its path begins like that of an allowed folder
    sibling.parent.mkdir()
    sibling.write_text("Recipe.seed = 1\n")
    for outside in ("../outside.gin", str(tmp_path / "outside.gin"), "link.gin", "../mine_not/outside.gin"):
        message = refusal(CHAIN + f"include '{outside}'\n", mine, roots=[shipped])
        found = sibling if "not" in outside else tmp_path / "outside.gin"
        assert f"include {outside!r} leads to {found}, outside" in message
        assert "recipe.gin:5" in message


def test_a_missing_file_says_where_it_looked(tmp_path):
    message = refusal(CHAIN + "include 'models/tinny.gin'\n", tmp_path, roots=[tmp_path / "shipped"])
    assert "recipe.gin:5: no gin file 'models/tinny.gin'" in message
    assert str(tmp_path / "models/tinny.gin") in message
    assert str(tmp_path / "shipped/models/tinny.gin") in message
    with pytest.raises(ValueError, match=r"no gin file 'nowhere\.gin'; looked for nowhere\.gin, .*shipped"):
        gin_edge.load(Recipe, COMPONENTS, ["nowhere.gin"], roots=[tmp_path / "shipped"])


def test_include_cycles_are_refused_with_their_chain(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text("include 'a.gin'\n")
    message = refusal("include 'a.gin'\n", tmp_path)
    files = ["recipe.gin", "a.gin", "b.gin", "a.gin"]
    assert "include cycle: " + " -> ".join(str(tmp_path / file) for file in files) in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.gin").write_bytes("Stage.name = 'caf\xe9'\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.gin: not valid UTF-8 at byte 17"):
        gin_edge.load(Recipe, COMPONENTS, [tmp_path / "latin.gin"], roots=())


def test_config_roots_find_the_shipped_configs():
    roots = gin_edge.config_roots()
    assert roots
    assert any(list(root.rglob("*.gin")) for root in roots)


def test_json_keeps_types_apart_and_refuses_what_has_no_value():
    assert to_json(Stage(objective=LM(), rate=1, weights={"b": 1.0, "a": float("inf")})) == {
        "@": "Stage",
        "objective": {"@": "LM", "z_loss": 0.0},
        "model": to_json(Decoder()),
        "steps": 100,
        "name": "",
        "anything": None,
        "rate": 1,
        "weights": {"a": {"@": "float", "value": "inf"}, "b": 1.0},
    }
    assert repr(to_json(Stage(objective=LM(), rate=1))) != repr(to_json(Stage(objective=LM(), rate=1.0)))
    assert list(to_json(Decoder())["heads"]) == ["lm"]
    with pytest.raises(ValueError, match="NaN"):
        to_json(LM(z_loss=float("nan")))
    with pytest.raises(TypeError, match="object"):
        to_json(Stage(objective=LM(), anything=object()))
    with pytest.raises(ValueError, match=r"cannot rebuild a 'LM'; known: \['DPO'\]"):
        from_json(to_json(LM()), {"DPO": DPO})
    with pytest.raises(ValueError, match=r"a LM saved by another version of the code: .*'z'"):
        from_json({"@": "LM", "z": 1.0}, {"LM": LM})


def test_json_is_free_of_gin():
    code = "import sys, jaxtrain.config_json; sys.exit(any(name in sys.modules for name in ('gin', 'jax')))"
    subprocess.run([sys.executable, "-c", code], check=True)
