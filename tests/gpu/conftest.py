"""The small corpus and run of the training tests."""

from tests.training.conftest import config_file, corpus

__all__ = ["config_file", "corpus"]
