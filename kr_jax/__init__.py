"""Reinforcement learning of language models with knapsack-allocated rollouts."""

__version__ = '0.1.0'
