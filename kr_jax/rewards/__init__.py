"""Completion text -> verdict and reward."""

from kr_jax.rewards.verdicts import OUTCOMES, Verdict
from kr_jax.rewards.verifiers import ANSWERS, VERIFIERS, Config, check, check_tasks, names
from kr_jax.rewards.workers import Answers, Scores, Workers
