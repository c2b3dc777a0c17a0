"""The dataset ciphers_hard."""

from kr_jax.datasets import ciphers
from kr_jax.datasets import ciphers_hard


def test_stored(stored):
  rows = stored('ciphers_hard')
  assert {split: len(tasks) for split, tasks in rows.items()} == ciphers.SPLITS | {'train': 128}
  letters = {row['prompt'][0] for row in rows['train'].values()}
  assert letters == set(ciphers.LETTERS[:len(ciphers_hard.SLIPS)])
  assert all(name == row['id'] and name.startswith('ciphers_hard/') for name, row in rows['test'].items())
