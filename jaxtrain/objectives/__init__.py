"""Objectives: pure functions of a model and a batch, one file each.

To add one, write its file and give it a line in ``OBJECTIVES``; the contract test picks it up from there.
"""

from __future__ import annotations

from jaxtrain.objectives.dpo import DPO
from jaxtrain.objectives.lm import LM
from jaxtrain.objectives.ppo import PPOCritic, PPOPolicy, PPOShared
from jaxtrain.objectives.reward import RewardModel
from jaxtrain.objectives.sft import SFT
from jaxtrain.types import Pairs, Rollout, Tokens

# name -> (the objective, the record its batch is)
OBJECTIVES = {
    "LM": (LM, Tokens),
    "SFT": (SFT, Tokens),
    "RewardModel": (RewardModel, Pairs),
    "DPO": (DPO, Pairs),
    "PPOPolicy": (PPOPolicy, Rollout),
    "PPOCritic": (PPOCritic, Rollout),
    "PPOShared": (PPOShared, Rollout),
}

__all__ = ["DPO", "LM", "OBJECTIVES", "SFT", "PPOCritic", "PPOPolicy", "PPOShared", "RewardModel"]
