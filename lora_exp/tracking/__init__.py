"""W&B and its siblings: where a run's numbers are shown beside those of other runs."""
