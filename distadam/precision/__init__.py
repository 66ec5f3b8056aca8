"""How numbers are stored: what the update computes in, and how the result reaches the parameter."""

from distadam.precision.weights import MasterWeights, OwnWeights, Weights, compute_dtype, select_weights

__all__ = ["MasterWeights", "OwnWeights", "Weights", "compute_dtype", "select_weights"]
