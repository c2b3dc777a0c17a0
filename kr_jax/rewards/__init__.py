"""Completion text -> verdict and reward."""

from kr_jax.rewards.workers import (
    ANSWERS, VERIFIERS, Answers, Config, Scores, Workers, check, names)
