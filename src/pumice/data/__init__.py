"""Training data: rows in files, how they are mixed, and the batches of every step."""
