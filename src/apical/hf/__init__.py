"""Kernels inside stock transformers models: in place, one instance at a time, reversible."""

from .._extras import require

require("transformers", extra="hf", what="apical.use_kernels")

# ruff: noqa: E402 - after the check above
from .masked_rows import last_layer_rows
from .patching import explain, use_kernels
from .prefill import prepack

__all__ = ["explain", "last_layer_rows", "prepack", "use_kernels"]
