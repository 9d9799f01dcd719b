"""Growth that is learned: a linear map of old weights, fitted on the loss of the grown model."""

from .fit import fit_growth

__all__ = ["fit_growth"]
