"""Kernels inside stock transformers models: in place, one instance at a time, reversible."""

from .._extras import require

require("transformers", extra="hf", what="apical.use_kernels")

from .patching import explain, use_kernels  # noqa: E402 - after the check above

__all__ = ["explain", "use_kernels"]
