"""Fixtures of the targets' tests."""

from model_files import make_model

__all__ = ["make_model"]
