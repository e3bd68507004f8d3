"""Models as Hugging Face directories."""

from pathlib import Path

import pytest

from tests.support.hf_folder import write_default_model


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as the Hugging Face directory of two golden files: its weights rounded to bfloat16."""
    return write_default_model(tmp_path_factory.mktemp("smollm2"))
