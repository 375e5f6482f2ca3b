"""The small run of the training tests."""

from tests.training.conftest import config_file, corpus  # noqa: F401
