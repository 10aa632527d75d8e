"""Puts `tests/` on the path, so that tests can import `tiny` and `models`, and keeps every test off the network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are slower with more
sys.path.insert(0, str(Path(__file__).parent))
