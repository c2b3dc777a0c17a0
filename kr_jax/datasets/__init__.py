"""TFDS builders, one file each: module NAME holds the dataset NAME, its `Builder` and `ALPHABET`."""
