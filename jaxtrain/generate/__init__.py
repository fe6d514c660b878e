"""Text from a model: one engine behind ``generate``, ``chat`` and the rollouts of reinforcement learning."""
