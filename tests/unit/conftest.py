"""Fixtures of the unit tests."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture to a folder with its tiny model. Tests must not write to the folder."""
    from models import save_tiny_model

    @functools.cache
    def save(architecture: str) -> Path:
        return save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)

    return save
