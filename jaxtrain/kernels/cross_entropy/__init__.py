"""Cross-entropy without whole logits; models and objectives import ``jaxtrain.kernels.cross_entropy.api``."""
