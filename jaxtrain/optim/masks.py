"""Masks over parameters, as ordered rules on their paths, checked to cover every parameter.

A path joins the keys of the parameter tree with '/': ``layers/attention/query/kernel``.  A rule is
``(pattern, value)``: ``pattern`` is a regular expression searched for anywhere in the path (anchor it with
``^`` and ``$`` to be exact), and the first rule that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxtrain.types import path_name

Rules = Sequence[tuple[str, bool]]

# Matrices decay; gains and biases do not: pulling a norm's scale to zero only fights the norm.
DEFAULT_DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(scale|bias)$", False),
)


def parameter_paths(params: Any) -> list[str]:
    """The path of every leaf, in the tree's order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _compile(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: the pattern {pattern!r} is not a valid regular expression: {error}.") from error


def rule_mask(params: Any, rules: Rules, *, where: str, every_rule_matches: bool = True) -> Any:
    """A tree like ``params`` holding the value of the first rule that matches each parameter's path.

    where: what the rules are for (such as 'AdamW.decay_rules'), named in errors.
    every_rule_matches: also refuse a rule whose pattern matches no parameter, most likely a misspelling.

    Raises ValueError naming the first parameter that no rule covers, or the rule that matches nothing.
    """
    paths = parameter_paths(params)
    compiled = [(_compile(pattern, where), bool(value)) for pattern, value in rules]
    if every_rule_matches:
        for pattern, _ in compiled:
            if not any(pattern.search(path) for path in paths):
                raise ValueError(
                    f"{where}: the pattern {pattern.pattern!r} matches no parameter. Parameters are {', '.join(paths)}."
                )

    def decide(path, _):
        name = path_name(path)
        for pattern, value in compiled:
            if pattern.search(name):
                return value
        raise ValueError(
            f"{where}: no rule covers the parameter {name!r}; add one. Patterns in order: "
            f"{[pattern.pattern for pattern, _ in compiled]}."
        )

    return jax.tree_util.tree_map_with_path(decide, params)


def decay_mask(params: Any, rules: Rules = DEFAULT_DECAY_RULES, *, where: str = "decay_rules") -> Any:
    """Which parameters decay: a tree of bool like ``params``.  Errors as in ``rule_mask``.

    The default rules may match nothing (not every model has both kinds of parameter); a user's may not.
    """
    own = tuple(map(tuple, rules)) != DEFAULT_DECAY_RULES
    return rule_mask(params, rules, where=where, every_rule_matches=own)


def frozen_mask(params: Any, patterns: Sequence[str], *, where: str = "frozen") -> Any:
    """Which parameters are frozen: those whose path matches any of ``patterns``.  A tree of bool.

    Raises ValueError naming a pattern that matches nothing, or if leave at least one to train.
    """
    paths = parameter_paths(params)
    for pattern in patterns:
        rule_mask(params, [(pattern, True), ("", False)], where=where)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), params
    )
    if paths and all(jax.tree.leaves(mask)):
        raise ValueError(f"{where}: the patterns {list(patterns)} freeze every parameter; leave at least one to train.")
    return mask
