"""Attention over documents packed one after another, without padding."""

from ._layout import PackedLayout
from .api import varlen_attention
from .compat import flash_attn_varlen_func

__all__ = ["PackedLayout", "flash_attn_varlen_func", "varlen_attention"]
