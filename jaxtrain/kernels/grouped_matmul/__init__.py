"""Products of consecutive groups of rows, each with a matrix of its own."""
