"""jaxtrain: raw text to an aligned model, every stage a pure function in one sharded train step."""

__version__ = "0.1.0"
