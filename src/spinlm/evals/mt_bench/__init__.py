"""MT-Bench (arXiv 2306.05685): players answer two-turn questions, and a judge rates or compares the responses."""
