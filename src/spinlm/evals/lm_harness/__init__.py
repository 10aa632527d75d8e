"""lm-evaluation-harness, the real one, on the players of a run."""
