"""Training: stages, the loop, the optimizer, exact resume. Knows nothing of evaluation."""
