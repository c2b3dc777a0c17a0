"""TFDS builders, one file each: module NAME holds the dataset NAME, its `Builder` and, where a policy
from scratch can read it, its `ALPHABET`. published.py is what the datasets of published files share."""
