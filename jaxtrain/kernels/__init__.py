"""Hand-written operations: one folder each, with a reference, its backends and the ``api`` that models call."""
