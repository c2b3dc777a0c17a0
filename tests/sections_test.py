"""A section of knobs: what is taken, and what an error says."""

import pytest

from kr_jax import sections


@sections.section
class Inner(sections.Section):
  SECTION = 'outer.inner'
  share: float = sections.knob(0.5, 'of the whole', above=0, below=1)


@sections.section
class Outer(sections.Section):
  SECTION = 'outer'
  count: int = sections.knob(2, 'of things', low=1, high=3)
  kind: str = sections.knob('red', 'of things', choices=('red', 'green'))
  names: tuple = sections.knob((), 'of things')
  told: bool | None = sections.knob(None, 'whether it was said')
  inner: Inner = Inner()

  def conflicts(self):
    if self.kind == 'green' and self.count > 1:
      yield f'outer.count={self.count} green things'


def test_values_in_their_bounds_are_taken():
  found = sections.read({'count': 3, 'kind': 'red', 'names': ['a'], 'told': False, 'inner': {'share': 0.25}}, Outer)
  assert found == Outer(count=3, names=('a',), told=False, inner=Inner(0.25))
  assert sections.as_dict(found) == {
      'count': 3, 'kind': 'red', 'names': ('a',), 'told': False, 'inner': {'share': 0.25}}
  assert Outer.choices('kind') == ('red', 'green') and found.replace(count=1).count == 1


@pytest.mark.parametrize('values, message', [
    ({'count': 0}, r'outer.count=0 \(of things\) must be at least 1 and at most 3'),
    ({'count': True}, r'outer.count=True \(of things\) must be a whole number'),
    ({'kind': 'gren'}, r"outer.kind='gren' .* must be one of 'red', 'green'; did you mean 'green'\?"),
    ({'kind': 'green'}, 'outer.count=2 green things'),
    ({'told': 'yes'}, "outer.told='yes' .* must be None, True or False")])
def test_what_an_error_says(values, message):
  with pytest.raises(ValueError, match=message):
    Outer(**values)


@pytest.mark.parametrize('share', [0.0, 1.0, float('nan'), '1'])
def test_open_bounds(share):
  with pytest.raises(ValueError, match=r'outer.inner.share=.* \(of the whole\)'):
    Inner(share)


def test_all_that_is_wrong_is_said_at_once():
  with pytest.raises(ValueError) as error:
    sections.read({'count': 9, 'kinds': 'red', 'names': (), 'told': None, 'inner': {'share': 2.0}}, Outer)
  for part in ("there is no knob outer.kinds; did you mean 'kind'?", 'outer.kind is missing', 'outer.count=9',
               'outer.inner.share=2.0'):
    assert part in str(error.value)
