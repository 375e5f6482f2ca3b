"""Package metadata and the optional C++ extension ``megatron_nucleus._C`` (csrc/README.md)."""
from setuptools import setup
setup()
