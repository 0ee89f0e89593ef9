"""Fixtures of the command line' tests."""

from model_files import make_model

__all__ = ["make_model"]
