"""Datasets of tasks, as TFDS stores them: README.md has the list, and how one is added."""

# Modules of datasets; of `reasoning_gym` a task is named as well.
GENERATED = ('arithmetic', 'champ', 'ciphers_hard', 'ciphers_late', 'reasoning_gym', 'sums')
