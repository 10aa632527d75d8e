"""Puts `tests/` on the path, so that tests can import `tiny` and `models`, and keeps every test off the network."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are slower with more
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))  # `default` draws other examples each time
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """A test that is skipped says why, whatever the command line asks for. Noise of libraries is left out."""
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"
    for warning in (
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT asks transformers
        "ignore:fan_in_fan_out is set to False:UserWarning",  # PEFT, of gpt2
        "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",  # PEFT, of mixtral
    ):
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(scope="session")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for NLTK_DATA with a sentence splitter of a few words, trained here in NLTK's format punkt_tab."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    folder = tmp_path_factory.mktemp("nltk_data")
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    nltk.data.path.append(str(folder))  # NLTK writes nowhere else
    text = "It rains. It is red. There are three. Is it? It is the answer. Dr. Who said no."
    save_punkt_params(PunktTrainer(text).get_params(), dir=str(english))
    nltk.data.path.remove(str(folder))
    return folder
