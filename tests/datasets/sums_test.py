"""Sums of two numbers."""

from kr_jax.datasets import sums


def test_splits():
  found = sums.splits()
  assert {split: len(pairs) for split, pairs in found.items()} == {'test': 192, 'train': 512}
  for split, pairs in found.items():
    assert len(set(pairs)) == len(pairs)
    digits = [len(f'{a}{b}') for a, b in pairs]
    assert {d: digits.count(d) for d in (2, 3, 4)} == sums.SPLITS[split]
  turned = {split: {frozenset(pair) for pair in pairs} for split, pairs in found.items()}
  assert not turned['test'] & turned['train']
  assert found == sums.splits()


def test_stored(stored):
  rows = stored('sums')
  assert set(rows) == {'test', 'train'} and len(rows['train']) == 512
  for name, row in rows['test'].items():
    a, b = row['prompt'].split(' + ')
    assert name == row['id'] == f'sums/{a}+{b}' and row['answer'] == str(int(a) + int(b))
    assert row['difficulty'] == len(a) + len(b) and not row['verifier']
