"""What a model family needs to be read from and written for Hugging Face: one record, and how its config is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtrain.interop.weights import Weight
from jaxtrain.models import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family's table.

    name: for messages ("Llama").  model_type: the key in config.json.
    architectures: the class names that are read; the first is what an export is called unless ``write_config`` says.
    config: our config class.
    read_config: config.json (a ``Fields``) -> our config.  Raises ValueError for what it cannot represent.
    write_config: the inverse.  ``model_type``, ``architectures`` and ``dtype`` are added by the caller where absent.
        Raises ValueError, naming the field, for what they cannot represent.
    weights: our config -> its rules.
    ignored: regexes (full match) of tensors that carry nothing, such as buffers of rotary frequencies.
    aliases: our config -> (alias, name) pairs of tied tensors: an alias may stand in a file, and must equal ``name``.
    as_stored: (our config, names of a file's tensors) -> the config of what the file holds, where config.json promises
        parts that files may lack.
    base_prefix: what the names of a checkpoint of the bare model (``BertModel``) lack ("bert.").
    old_endings: how names in old files end, and what stands there now.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    config: type
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any], tuple[Weight, ...]]
    ignored: tuple[str, ...] = ()
    aliases: Callable[[Any], tuple[tuple[str, str], ...]] = lambda config: ()
    as_stored: Callable[[Any, set[str]], Any] = lambda config, names: config
    base_prefix: str = ""
    old_endings: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Fields of a config.json that say nothing about what the model computes.
_NEUTRAL = """
    _attn_implementation _attn_implementation_autoset _name_or_path _commit_hash architectures auto_map dtype
    torch_dtype transformers_version use_cache model_type pad_token_id bos_token_id eos_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id sep_token_id cls_token_id mask_token_id
    unsloth_version unsloth_fixed is_llama_config transformers.js_config task_specific_params id2label label2id
    problem_type output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate
    torchscript use_bfloat16 finetuning_task tokenizer_class prefix initializer_range chunk_size_feed_forward
    gradient_checkpointing early_stopping num_beams max_length min_length no_repeat_ngram_size length_penalty
    add_cross_attention cross_attention_hidden_size pretraining_tp quantization_config is_decoder
    is_encoder_decoder pruned_heads tie_encoder_decoder tf_legacy_loss
"""
NEUTRAL = frozenset(_NEUTRAL.split())


class Fields(Mapping):
    """A config.json whose reader is watched: ``unread()`` names what no one asked for.

    transformers ignores what a class does not know; we do too, but say so.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        if name not in self._values:
            raise ValueError(f"config.json lacks {name!r}")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or ``default`` where it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def only(self, name: str, *accepted: Any, default: Any) -> Any:
        """A field that we can represent only where it has one of these values (absent: ``default``)."""
        value = self.get(name, default)
        if value not in accepted:
            raise ValueError(f"config.json has {name} = {value!r}; this family is supported with {_either(accepted)}")
        return value

    def unread(self) -> dict[str, Any]:
        """What was neither read nor is neutral, where it has a value."""
        return {
            name: value
            for name, value in self._values.items()
            if name not in self._read | NEUTRAL and value not in (None, False, 0, "", [], {})
        }


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)


ROPE_TYPES = {"default": "none", "none": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
LONGROPE = ("longrope", "su")


def read_rope(
    fields: Mapping[str, Any], *, theta: float = 10000.0, fraction: float | None = None, longrope: bool = False
) -> Rope:
    """The Rope of a config.json, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    theta: the family's default base.
    fraction: the share of a head that the family turns by default (``partial_rotary_factor``); None: always all.
    longrope: whether the family has it.

    Raises ValueError for a scaling that is not supported.
    """
    parameters = dict(fields.get("rope_parameters") or {})
    scaling = dict(fields.get("rope_scaling") or {})
    found = {"rope_theta": fields.get("rope_theta", theta), **scaling, **parameters}
    if "partial_rotary_factor" in fields:
        found.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
    most = fields.get("max_position_embeddings", 0)
    original = fields.get("original_max_position_embeddings", most)
    return rope_of(found, original=original, longest=most, fraction=fraction, longrope=longrope)


def rope_of(
    parameters: Mapping[str, Any],
    *,
    original: int = 0,
    longest: int = 0,
    fraction: float | None = None,
    longrope: bool = False,
) -> Rope:
    """The Rope of one dict of rope parameters: ``rope_theta``, ``rope_type`` and what belongs to the type.

    original: the context before stretching, where the dict does not say.  longest: the context after it.
    The rest as in ``read_rope``.
    """
    values = {name: value for name, value in parameters.items() if value is not None}
    kind = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    found_fraction = float(values.pop("partial_rotary_factor", fraction or 1.0))
    if found_fraction != 1.0 and fraction is None:
        raise ValueError("config.json turns only part of each head (partial_rotary_factor); this family turns all")
    common = {"theta": float(values.pop("rope_theta", 10000.0)), "fraction": found_fraction}
    if kind in ("default", "none"):
        return Rope(**common)
    if kind not in ROPE_TYPES and not (kind in LONGROPE and longrope):
        raise ValueError(
            f"config.json scales rotary positions by {kind!r}; this family is supported with "
            f"{', '.join([*sorted(ROPE_TYPES), *LONGROPE[:longrope]])}"
        )
    original = int(values.pop("original_max_position_embeddings", original))
    if kind in LONGROPE:
        common["factor"] = float(values.pop("factor", None) or max(1.0, longest / max(original, 1)))
    elif "factor" not in values:
        raise ValueError(f"config.json scales rotary positions by {kind!r}, but gives no factor")
    else:
        common["factor"] = float(values.pop("factor"))
    if kind != "linear":
        common["original_max_positions"] = original
    names = {
        "linear": {},
        "llama3": {"low_freq_factor": None, "high_freq_factor": None},
        "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
    }.get(kind, {"short_factor": None, "long_factor": None, "attention_factor": 0.0})
    for name, default in names.items():
        value = values.pop(name, default)
        if value is None:
            raise ValueError(f"config.json scales rotary positions by {kind!r}, but gives no {name}")
        common[name] = tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
    if kind == "yarn":
        if values.pop("truncate", True) is not True:
            raise ValueError("config.json has yarn without truncation (truncate), which is not supported")
        amplitude = 0.1 * math.log(common["factor"]) + 1.0
        if abs(values.get("attention_factor", amplitude) - amplitude) < 1e-6:
            values.pop("attention_factor", None)
    if values:
        raise ValueError(f"config.json scales rotary positions by {kind!r} with {values}, which is not supported")
    return Rope(scaling="longrope" if kind in LONGROPE else ROPE_TYPES[kind], **common)


def write_rope(rope: Rope, *own: str) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` (and ``partial_rotary_factor``), which old and new versions of transformers
    read.

    own: fields of Rope beyond these that the family's class has a meaning for, and the caller writes.
    Raises ValueError for what has no counterpart.
    """
    if rope.scaling == "ntk":
        raise ValueError("Rope.scaling = 'ntk' has no counterpart in config.json; write its theta as Rope.theta")
    if rope.scaling == "longrope":
        raise ValueError("Rope.scaling = 'longrope' can be written for Phi-3 alone: the others' classes ignore it")
    plain = Rope()
    for name in ("fraction", "mscale", "mscale_all_dim"):
        if name not in own and getattr(rope, name) != getattr(plain, name):
            raise ValueError(
                f"Rope.{name} = {getattr(rope, name)} cannot be written: this family's class would ignore it"
            )
    written: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        written["partial_rotary_factor"] = rope.fraction
    if rope.scaling == "none":
        return written
    values: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        values["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return {**written, "rope_scaling": values}
