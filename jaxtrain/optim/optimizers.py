"""Optimizer configs: frozen dataclasses that build optax transformations for a model's parameters.

Each is a direction (Adam's, Lion's …), then decoupled weight decay on the masked parameters, then the
learning rate, which multiplies both (arXiv 1711.05101).  The rate follows the optimizer's own count of
updates: a step that is skipped does not advance it.  Clipping by global norm is the train step's job.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim.adafactor import Factoring, clip_by_rms, scale_by_factored_rms, scale_by_parameter_rms
from jaxtrain.optim.masks import DEFAULT_DECAY_RULES, decay_mask, frozen_mask
from jaxtrain.optim.master import with_master
from jaxtrain.optim.matrices import Matrix, as_matrix, batch_axes
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.schedules import Schedule
from jaxtrain.types import path_name

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BFLOAT16_STEP = float(jnp.finfo(jnp.bfloat16).eps) / 2  # rounding moves a number by at most this part of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has.

    schedule: the learning rate.
    weight_decay: decoupled; a decayed parameter shrinks by ``learning_rate * weight_decay`` an update.
    decay_rules: ordered (pattern, decays) rules over parameter paths, see ``masks``; they must cover all.
    frozen: patterns of parameters that are not updated and have no optimizer state.
    master: parameters kept in bfloat16 get a float32 copy in the optimizer's state, to which updates are added, and are
        that copy, rounded (see ``master``).  Without it, 4 bytes a parameter are saved, and updates below a 512th of a
        parameter lost.  It changes nothing for float32 parameters.
    offload: the state lives in the host's memory, and comes to the device for the update, a layer at a time (see
        ``train.offload``).  It changes neither results nor checkpoints: of AdamW, 8 bytes a parameter of the device's
        memory are given back for twice as many sent each step (12, with masters).

    Raises ValueError for values out of range, and in ``build`` for rules that do not fit the parameters.
    """

    schedule: Schedule
    weight_decay: float = 0.0
    decay_rules: tuple[tuple[str, bool], ...] = DEFAULT_DECAY_RULES
    frozen: tuple[str, ...] = ()
    master: bool = True
    offload: bool = False

    def __post_init__(self):
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")

    def _check(self, field: str, good: bool, must: str) -> None:
        if not good:
            name = type(self).__name__
            raise ValueError(f"{name}.{field} is {getattr(self, field)!r}; it must be {must}.")

    def _check_moment(self, field: str, decay: str) -> None:
        """Of a moment that is kept in the type ``field`` and multiplied by ``decay`` every update."""
        self._check(field, getattr(self, field) in DTYPES, f"one of {sorted(DTYPES)}")
        beta = getattr(self, decay)
        if getattr(self, field) == "bfloat16" and 1 - beta < BFLOAT16_STEP:
            name = type(self).__name__
            raise ValueError(
                f"{name}.{field} is 'bfloat16' with {decay}={beta}: a moment would shrink by less than a 256th an "
                f"update, which rounding to 8 bits undoes, so that it never would; keep it in float32, or lower {decay}"
            )

    def learning_rate(self, step: Any, total_steps: int):
        """The rate of the update made after ``step`` others, float32: pass attempted minus skipped steps."""
        return self.schedule.build(total_steps)(step)

    def build(self, total_steps: int, shapes: Any, axes: Any) -> optax.GradientTransformation:
        """The transformation for parameters of these shapes.

        total_steps: updates in the run, for the schedule.
        shapes: tree of ``jax.ShapeDtypeStruct`` (or arrays) like the parameters.
        axes: tree like it with a tuple of logical axis names, one a dimension, in place of each array.
        """
        name = type(self).__name__
        decay = decay_mask(shapes, self.decay_rules, where=f"{name}.decay_rules")
        frozen = frozen_mask(shapes, self.frozen, where=f"{name}.frozen")
        jax.tree_util.tree_map_with_path(_check_axes, shapes, axes)
        whole = shapes
        # optax hides the parameters a transformation does not see; every tree that goes with them must match.
        shapes, axes, decay = (_hide(frozen, tree) for tree in (shapes, axes, decay))
        parts = [self._direction(shapes, axes)]
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, decay))
        tx = optax.chain(*parts, optax.scale_by_learning_rate(self.schedule.build(total_steps)))
        if self.frozen:
            labels = jax.tree.map(lambda hidden: "frozen" if hidden else "trained", frozen)
            tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
        low = jax.tree.map(lambda hidden, leaf: not hidden and leaf.dtype != jnp.float32, frozen, whole)
        return with_master(tx, low) if self.master and any(jax.tree.leaves(low)) else tx

    def _direction(self, shapes: Any, axes: Any) -> optax.GradientTransformation:
        """The update before decay and learning rate, pointing uphill."""
        raise NotImplementedError


def _hide(mask: Any, tree: Any) -> Any:
    return jax.tree.map(lambda hidden, leaf: optax.MaskedNode() if hidden else leaf, mask, tree)


def _check_axes(path: tuple, shape: Any, names: Any) -> None:
    if not isinstance(names, tuple) or len(names) != len(shape.shape):
        raise ValueError(
            f"The parameter {path_name(path)!r} has shape {tuple(shape.shape)} and logical axes {names!r}; "
            "there must be one name a dimension."
        )


def _scale_by_adam(config: Any) -> optax.GradientTransformation:
    """optax's, with the second moment computed in float32 whatever the parameters are, and kept in ``nu_dtype``."""
    tx = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=DTYPES[config.mu_dtype])

    def cast(state, dtype):
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def update(updates, state, params=None):
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, DTYPES[config.nu_dtype])

    return optax.GradientTransformation(lambda params: cast(tx.init(params), DTYPES[config.nu_dtype]), update)


def _factorings(shapes: Any, axes: Any) -> Any:
    """A tree of Factoring: the matrix (or None) and the batch axes of each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _, names: Factoring(as_matrix(names, path_name(path)), batch_axes(names)), shapes, axes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1412.6980, 1711.05101).

    b1, b2: decay of the first and second moments.  eps: added to the root of the second.
    mu_dtype, nu_dtype: storage of the first and second moments, 'float32' or 'bfloat16'.  The second is then off by
        up to a part ``2^-8 / (1 - b2)`` (8% of it, 4% of an update, with b2 = 0.95; 39% with 0.99): smaller changes are
        rounded away.
    """

    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    mu_dtype: str = "float32"
    nu_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        self._check("b1", 0 <= self.b1 < 1, "in [0, 1)")
        self._check("b2", 0 <= self.b2 < 1, "in [0, 1)")
        self._check("eps", self.eps > 0, "positive")
        self._check_moment("mu_dtype", "b1")
        self._check_moment("nu_dtype", "b2")

    def _direction(self, shapes, axes):
        return _scale_by_adam(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (arXiv 2302.06675): a rate 3 to 10 times below AdamW's suits it.

    b1: interpolation between momentum and gradient for the update.  b2: decay of the momentum.
    mu_dtype: storage of the momentum, 'float32' or 'bfloat16'.
    """

    b1: float = 0.9
    b2: float = 0.99
    mu_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        self._check("b1", 0 <= self.b1 < 1, "in [0, 1)")
        self._check("b2", 0 <= self.b2 < 1, "in [0, 1)")
        self._check_moment("mu_dtype", "b2")

    def _direction(self, shapes, axes):
        return optax.scale_by_lion(b1=self.b1, b2=self.b2, mu_dtype=DTYPES[self.mu_dtype])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (arXiv 1804.04235) without momentum, each layer factored on its own, see ``adafactor``.

    decay_exponent: the second moment decays by ``1 - t^-decay_exponent``.
    clip_rms: each layer's update is scaled down to at most this RMS.
    parameter_scale: multiply each layer's update by its parameter's RMS, so that the rate is relative.
    min_size_to_factor: a matrix with a smaller side keeps its whole second moment.
    """

    decay_exponent: float = 0.8
    clip_rms: float = 1.0
    parameter_scale: bool = False
    min_size_to_factor: int = 128

    def __post_init__(self):
        super().__post_init__()
        self._check("decay_exponent", 0 < self.decay_exponent <= 1, "in (0, 1]")
        self._check("clip_rms", self.clip_rms > 0, "positive")
        self._check("min_size_to_factor", self.min_size_to_factor >= 1, "at least 1")

    def _direction(self, shapes, axes):
        def restrict(shape, found):
            small = found.matrix and min(found.matrix.fans(shape.shape)) < self.min_size_to_factor
            return found._replace(matrix=None) if small else found

        factorings = jax.tree.map(restrict, shapes, _factorings(shapes, axes))
        parts = [
            scale_by_factored_rms(factorings, decay_exponent=self.decay_exponent),
            clip_by_rms(factorings, self.clip_rms),
        ]
        if self.parameter_scale:
            parts.append(scale_by_parameter_rms(factorings))
        return optax.chain(*parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for the matrices inside the layers, Adam for all else, at one learning rate (see ``muon``).

    Adam takes the parameters with a vocabulary axis (embeddings, the language-model head), vectors (norms,
    biases), and matrices with a side of size 1 (scalar heads).

    beta: decay of the momentum.  newton_schulz_steps: iterations of the orthogonalisation.
    rms: root mean square of a matrix's update at rate 1; 0.2 is AdamW's usual one (arXiv 2502.16982).
    b1, b2, eps: Adam's.
    mu_dtype: storage of both first moments, nu_dtype: of Adam's second, see ``AdamW``.
    """

    weight_decay: float = 0.1
    beta: float = 0.95
    newton_schulz_steps: int = 5
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    mu_dtype: str = "float32"
    nu_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        for field in ("beta", "b1", "b2"):
            self._check(field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        self._check("newton_schulz_steps", self.newton_schulz_steps >= 1, "at least 1")
        self._check("rms", self.rms > 0, "positive")
        self._check("eps", self.eps > 0, "positive")
        self._check_moment("mu_dtype", "beta")
        self._check_moment("mu_dtype", "b1")
        self._check_moment("nu_dtype", "b2")

    def uses_muon(self, shape: Any, names: tuple[str | None, ...], path: str) -> Matrix | None:
        """The matrix to orthogonalise in a parameter, or None if Adam takes it."""
        matrix = None if "vocab" in names else as_matrix(names, path)
        return matrix if matrix and min(matrix.fans(shape.shape)) > 1 else None

    def _direction(self, shapes, axes):
        dtype = DTYPES[self.mu_dtype]

        def find(path, shape, names):
            return self.uses_muon(shape, names, path_name(path)) or optax.MaskedNode()

        matrices = jax.tree_util.tree_map_with_path(find, shapes, axes)
        labels = jax.tree.map(lambda _, m: "muon" if isinstance(m, Matrix) else "adam", shapes, matrices)
        muon = scale_by_muon(
            matrices, beta=self.beta, steps=self.newton_schulz_steps, rms=self.rms, momentum_dtype=dtype
        )
        return optax.partition({"muon": muon, "adam": _scale_by_adam(self)}, labels)
