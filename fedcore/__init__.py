"""Federated learning for edge devices whose privacy holds end to end."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedcore")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
