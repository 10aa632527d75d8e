"""MT-Bench (arXiv 2306.05685): players answer questions of two turns, and a judge marks or compares the answers."""
