"""The kinds of thing are records: equal by their fields and kept in caches."""

from kr_jax.answers import kinds
from kr_jax.answers import notation


def test_records():
  tokens = notation.tokens('1')
  assert kinds.Quantity(tokens) == kinds.Quantity(tokens, None, 1) != kinds.Quantity(tokens, None, 2)
  group = kinds.Group('()', (kinds.Quantity(tokens),))
  assert len({group, kinds.Group('()', (kinds.Quantity(tokens),)), kinds.Group('[]', group.items)}) == 2
