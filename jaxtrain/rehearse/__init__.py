"""A recipe in miniature on virtual CPU devices: whether every stage of it runs, before a pod is rented."""
