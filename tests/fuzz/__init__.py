"""Mutated inputs of every kind, by seed: each is read, or refused by a clear ValueError."""
