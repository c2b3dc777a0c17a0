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
  names: tuple = sections.knob((), 'of things', of=str)
  sizes: tuple = sections.knob((), 'of things', of=int)
  title: str = sections.knob('', 'of the whole')
  folder: str = sections.knob('', 'of things', path='written')
  steps: int = sections.knob(2, 'of a walk')
  every: int = sections.knob(2, 'steps', low=1, high=sections.ANY)
  weight: float = sections.knob(1.0, 'of things', above=0)
  shift: float = sections.knob(0.0, 'of things')
  told: bool | None = sections.knob(None, 'whether it was said')
  inner: Inner = Inner()

  def conflicts(self):
    if self.kind == 'green' and self.count > 1:
      yield f'outer.count={self.count} green things'


def test_values_in_their_bounds_are_taken():
  changed = {'count': 3, 'names': ['a'], 'told': False, 'inner': {'share': 0.25}}
  found = sections.read(sections.as_dict(Outer()) | changed, Outer)
  assert found == Outer(count=3, names=('a',), told=False, inner=Inner(0.25))
  assert sections.as_dict(found) == sections.as_dict(Outer()) | changed | {'names': ('a',)}
  assert Outer(steps=sections.MOST, every=sections.ANY, shift=-1e30, title='é\n', folder='gs://a/b', sizes=(1, 2))
  assert Outer.choices('kind') == ('red', 'green') and found.replace(count=1).count == 1


@pytest.mark.parametrize('values, message', [
    ({'count': 0}, r'outer.count=0 \(of things\) must be at least 1 and at most 3'),
    ({'count': True}, r'outer.count=True \(of things\) must be a whole number'),
    ({'kind': 'gren'}, r"outer.kind='gren' .* must be one of 'red', 'green'; did you mean 'green'\?"),
    ({'kind': 'green'}, 'outer.count=2 green things'),
    ({'told': 'yes'}, "outer.told='yes' .* must be None, True or False"),
    ({'names': 'abc'}, r"outer.names='abc' .* must be a tuple; \('abc',\) makes one"),
    ({'names': (5,)}, r'outer.names=\(5,\) .* must hold texts, none of them empty, not 5'),
    ({'names': (('a',),)}, r"must hold texts, none of them empty, not \('a',\)"), ({'names': ('',)}, "empty, not ''"),
    ({'names': ('a\0',)}, 'holds a text that holds a NUL character'),
    ({'sizes': (1, True)}, 'must hold whole numbers, not True'), ({'sizes': (1.0,)}, 'whole numbers, not 1.0'),
    ({'title': 'a\0'}, 'holds a NUL character'), ({'title': '\udcff'}, 'holds bytes that are not UTF-8'),
    ({'title': 'a' * 100_001}, r"a\.\.\. \(of the whole\) has 100,001 characters; the limit is 100,000"),
    ({'folder': 'gs://'}, 'names no bucket'), ({'folder': 'http://host/a'}, 'cannot be written; name a directory'),
    ({'steps': 2 ** 31}, 'must be at most 2147483647'),
    ({'every': 2 ** 63}, 'at least 1 and at most 9223372036854775807'),
    ({'every': 0}, r'outer.every=0 \(steps\) must be at least 1$'),
    ({'weight': 1e-31}, r'must be of a size in 1e-30\.\.1e\+30, as float32 holds it'),
    ({'weight': 1e31}, 'must be of a size'), ({'shift': -1e31}, 'must be 0, or of a size')])
def test_what_an_error_says(values, message):
  with pytest.raises(ValueError, match=message):
    Outer(**values)


@pytest.mark.parametrize('share', [0.0, 1.0, float('nan'), '1'])
def test_open_bounds(share):
  with pytest.raises(ValueError, match=r'outer.inner.share=.* \(of the whole\)'):
    Inner(share)


@pytest.mark.parametrize('value', [10 ** 400, -10 ** 400, 10 ** 5000], ids=['large', 'below', 'digits'])
def test_a_number_that_no_float_holds(value):
  with pytest.raises(ValueError, match='outer.shift=.* must be a finite number'):
    sections.read(sections.as_dict(Outer()) | {'shift': value}, Outer)
  with pytest.raises(ValueError, match='outer.every=.* must be at'):
    Outer(every=value)


def test_a_section_is_no_value():
  with pytest.raises(ValueError, match='outer.inner=5 must be a section, which holds knobs by name'):
    sections.read(sections.as_dict(Outer()) | {'inner': 5}, Outer)
  with pytest.raises(ValueError, match="outer.count={'a': 1} .* must be a whole number"):
    sections.read(sections.as_dict(Outer()) | {'count': {'a': 1}}, Outer)


def test_all_that_is_wrong_is_said_at_once():
  tree = {name: value for name, value in sections.as_dict(Outer()).items() if name != 'kind'}
  with pytest.raises(ValueError) as error:
    sections.read(tree | {'count': 9, 'kinds': 'red', 'inner': {'share': 2.0}}, Outer)
  for part in ("there is no knob outer.kinds; did you mean 'kind'?", 'outer.kind is missing', 'outer.count=9',
               'outer.inner.share=2.0'):
    assert part in str(error.value)
