"""Attention over documents packed one after another, without padding."""

from .api import varlen_attention

__all__ = ["varlen_attention"]
