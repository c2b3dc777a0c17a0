"""The dataset ciphers_late."""

from kr_jax.datasets import ciphers
from kr_jax.datasets import ciphers_late


def test_stored(stored):
  rows = stored('ciphers_late')
  assert {split: len(tasks) for split, tasks in rows.items()} == ciphers.SPLITS | {'train': 64}
  letters = {row['prompt'][0] for row in rows['train'].values()}
  assert letters == set(ciphers.LETTERS[:len(ciphers_late.SLIPS)])
  assert all(name == row['id'] and name.startswith('ciphers_late/') for name, row in rows['test'].items())
