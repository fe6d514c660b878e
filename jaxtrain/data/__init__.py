"""From raw text to fixed rows of token ids, on the host: sources, tokenizer, packing, storage, loading.

Everything here deals in NumPy; the order of examples is a pure function of a seed and a step.
"""
