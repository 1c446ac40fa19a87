"""The tiny base of the training tests serves here too."""

from tests.diffusion.conftest import tiny_base

__all__ = ["tiny_base"]
