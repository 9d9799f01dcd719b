"""Training: recipes, data, the loop, checkpoints and the report."""
