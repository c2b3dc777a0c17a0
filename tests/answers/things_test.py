"""What answers say."""

import pytest

from kr_jax.answers import notation
from kr_jax.answers import things
from kr_jax.answers.kinds import Based, Either, Group, Matrix, Named, Quantity, Ratio, Region, Relation, Time, Words


def written(thing) -> str:
  """A thing as a short text."""
  if isinstance(thing, Quantity):
    scale = f' x {thing.scale}' if thing.scale > 1 else ''
    return notation.written(thing.tokens) + (' [unit]' if thing.unit else '') + scale
  if isinstance(thing, Group):
    return f'{thing.kind or thing.joined}<{"; ".join(map(written, thing.items))}>'
  if isinstance(thing, Named):
    return f'{thing.label}: {written(thing.thing)}'
  if isinstance(thing, Either):
    return ' | '.join(map(written, thing.ways))
  if isinstance(thing, Region):
    less = f' - {written(thing.without[0])}' if thing.without else ''
    return f'region<{"; ".join(map(written, thing.parts))}>{less}'
  if isinstance(thing, Relation):
    return ' '.join(thing.signs)
  if isinstance(thing, Matrix):
    return ' / '.join(', '.join(map(written, row)) for row in thing.rows)
  return {Words: lambda: f'words {thing.text}', Time: lambda: f'time {thing.parts} {thing.half}',
          Based: lambda: f'based {thing}',
          Ratio: lambda: f'ratio {len(thing.parts)}'}.get(type(thing), lambda: thing.text if thing else str(thing))()


@pytest.mark.parametrize('text, says', [
    ('', 'None'), ('  ', 'None'), ('7', '7'), ('{{7}}', '7'), ('"7".', '7'), ('= 7', '7'), (r'\approx 7', '7'),
    ('about 7', '7'),
    ('7 (approximately)', '7'), ('7, which is the sum', '7'), (r'\boxed{7}', '7'), ('12 apples', '12'), ('5 cm',
    '5 [unit]'),
    (r'\$5', '5 [unit]'), ('$5', '5 [unit]'), ('-$5', '-5 [unit]'), ('USD 5', '5 [unit]'), ('2.5 million',
    '2.5 x 1000000'), ('3 dozen eggs', '3 x 12'),
    ('odd', 'words odd | odd'), ('Evelyn', 'words evelyn'), (r'\text{June 20}', 'June 20'), ('AB', 'words ab'), ('xy',
    'words xy | xy'), ('twelve', '12'),
    ('1, 2', ',<1; 2>'), ('1 and 2', 'and<1; 2>'), ('1, 2, or 3', ',<1; 2; 3>'), (r'\{1, 2\}', '{}<1; 2>'), ('(1, 2]',
    '(]<1; 2>'), (']1, 2[', '()<1; 2>'),
    (r'\langle 1, 2\rangle', '()<1; 2>'), ('1,234', '1234 | thousands<1; 234>'), ('0,245', ',<0; 245>'), ('12 345',
    '12345'), ('(1,234)', '()<1; 234>'),
    ('1,234 apples', '1234'), ('3 and 1/2', '3 1/2 | ,<3; 1/2>'), ('(C)', 'C'), (r'\text{(C)}', 'C'),
    (r'[1,2]\cup\{3\}', 'region<[]<1; 2>; {}<3>>'), (r'\mathbb{R}', 'region<reals>'), ('all real numbers',
    'region<reals>'),
    (r'\mathbb{R}\setminus\{0\}', 'region<region<reals>> - {}<0>'), (r'\emptyset', '{}<>'), ('no solution', '{}<>'),
    ('empty set', '{}<>'),
    (r'\{x \mid x > 2\}', '>'), (r'\{x\in\mathbb{R} : x \ne 2\}', 'ne'), ('x = 3', 'x: 3'), ('P(A) = 1/4',
    'P(A): 1/4'), ('m + n = 5', 'm+n: 5'),
    (r'\text{Area} = 5', 'area: 5'), (r'\angle ABC = 30^\circ', r'\angleABC: 30 [unit]'), ('AB = 5', 'ab: 5'),
    ('(x,y) = (1,2)', '(x,y): ()<1; 2>'),
    (r'x \in [1,2]', 'x: []<1; 2>'), ('2x = 42', '='), ('x^2 = 42', '='), ('41 = 42', '='), ('-x = 42', '='),
    ('1/x = 42', '='), ('40+2 = 42', '42 | 40+2'),
    ('x = 40+2 = 42', 'x: 42 | 40+2'), ('x = 41 = 42', '= ='), (r'x = \frac{10}{3} \approx 3.33',
    r'x: 3.33 | \frac10 3'), ('1 < x < 2', '< <'),
    ('4:30', 'time (4, 30, 0) '), ('4:30 p.m.', 'time (4, 30, 0) pm'), ('4 PM', 'time (4, 0, 0) pm'), ('3:4',
    'ratio 2'), ('1:2:3', 'ratio 3'),
    ('1011_2', "based Based(digits='1011', base='2')"), (r'17_{\text{eight}}', "based Based(digits='17', base='8')"),
    (r'\begin{pmatrix}1&2\\3&4\end{pmatrix}', '1, 2 / 3, 4'), (r'\left[\begin{array}{cc}1 & 2\end{array}\right]',
    '1, 2'), (r'\\frac{1}{2}', r'\frac1 2')])
def test_read_by_hand(text, says):
  assert written(things.read(text)) == says
