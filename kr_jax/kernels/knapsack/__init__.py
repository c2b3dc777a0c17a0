"""The exact multiple-choice knapsack."""

from kr_jax.kernels.knapsack.ops import knapsack
from kr_jax.kernels.knapsack.reference import NEG as FORBIDDEN
