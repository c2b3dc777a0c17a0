"""Whether an answer is right: the answer that a text marks, and whether two mathematical answers are the same."""

from kr_jax.answers.equality import canonical, same
from kr_jax.answers.marks import extract, raw, trim
