"""Run lm-evaluation-harness on the players of a run."""
