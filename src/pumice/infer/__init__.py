"""The room that answers: requests in, results out, through one batched engine with a cache."""
