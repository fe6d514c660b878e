"""Scaled dot-product attention; models import ``jaxtrain.kernels.attention.api``."""
