"""The exact multiple-choice knapsack."""

from kr_jax.kernels.knapsack.ops import knapsack
