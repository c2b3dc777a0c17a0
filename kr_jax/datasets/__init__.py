"""Datasets of tasks, as TFDS stores them: README.md has the list.

Problem sets that are published as files are rows of sets.py. A dataset that generates its tasks is a module of
its name, which has a `Builder` and, where a policy from scratch can read its tasks, an `ALPHABET`.
"""

# Modules of datasets; of `reasoning_gym` a task is named as well.
GENERATED = ('arithmetic', 'champ', 'reasoning_gym', 'sums')
