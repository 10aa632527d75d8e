"""Self-play fine-tuning (SPIN, arXiv 2401.01335) of language models."""

__version__ = "0.1.0"
