"""Rewards -> advantages -> a packed, fused update."""
