"""Trees of formulas."""

from fractions import Fraction

import pytest

from kr_jax.answers import notation
from kr_jax.answers import syntax
from kr_jax.answers.syntax import Reading


def written(node) -> str:
  """A tree as a text with all brackets."""
  operation, *rest = node
  if operation in ('number', 'name'):
    return str(rest[0])
  return f'({" ".join([operation, *(x if isinstance(x, str) else written(x) for x in rest)])})'


def tree(text: str, **reading) -> str:
  return written(syntax.parse(notation.tokens(text), Reading(**reading)))


@pytest.mark.parametrize('text, expected', [
    ('1+2*3', '(add 1 (multiply 2 3))'), ('1-2-3', '(subtract (subtract 1 2) 3)'), ('-x^2', '(subtract 0 (power x 2))'),
    ('2^3^2', '(power 2 (power 3 2))'), ('2^10', '(power 2 10)'), ('x^-1', '(power x (subtract 0 1))'),
    ('ab', '(multiply a b)'), ('2x', '(multiply 2 x)'), ('1/2x', '(multiply (divide 1 2) x)'),
    (r'\frac{a}{b}', '(divide a b)'), (r'{a \over b}', '(divide a b)'), (r'a \over b', '(divide a b)'),
    (r'\sqrt{x}', '(root x 2)'), (r'\sqrt[3]{x}', '(root x 3)'), (r'\sqrt51', '(root 51 2)'), ('3!', '(factorial 3)'),
    ('5!!', '(double_factorial 5)'), (r'{n \choose k}', '(apply binom n k)'), ('|x|', '(apply abs x)'),
    ('|x|y|z|', '(multiply (multiply (apply abs x) y) (apply abs z))'), (r'\lfloor x\rfloor', '(apply floor x)'),
    (r'\sin 2x', '(apply sin (multiply 2 x))'), (r'\sin(x)y', '(multiply (apply sin x) y)'),
    (r'\sin x\cos y', '(multiply (apply sin x) (apply cos y))'), (r'\sin^2 x', '(power (apply sin x) 2)'),
    (r'\sin^{-1} x', '(apply asin x)'), (r'\log_2 8', '(log 8 2)'), (r'\ln x', '(apply ln x)'), ('e^{2x}',
    '(power e (multiply 2 x))'),
    ('np.arcsin(x)', '(apply asin x)'), ("y'", "y'"), (r'y^{\prime\prime}', "y''"), ('v^2_0', '(power v_0 2)'),
    (r'R_{\text{eq}}', 'R_eq'), (r'\vec{a}', 'vec a'), (r'30^\circ', '(degrees 30)'), ('2.5 10^3',
    '(multiply 5/2 (power 10 3))'),
    ('f(x, 2)', '(call f x 2)'), ('f(3)', '(call f 3)'), (r'1 \pm 2', '(pm 1 2)'), (r'\infty', '(infinity)'),
    ('2e3', '(multiply 2 (power 10 3))')])
def test_trees_by_hand(text, expected):
  assert tree(text) == expected


def test_readings():
  assert tree('a(x+1)') == '(call a (add x 1))' and tree('a(x+1)', calls=False) == '(multiply a (add x 1))'
  assert tree('a(3)', calls=False) == '(call a 3)'  # 3a would be written so
  assert tree(r'\log x') == '(apply ln x)' and tree(r'\log x', log_base=10) == '(log x 10)'
  assert tree('1/2x', tight=True) == '(divide 1 (multiply 2 x))'
  assert tree('2e3', euler=True) == '(multiply (multiply 2 e) 3)'
  assert tree(r'\sin x y', far=False) == '(multiply (apply sin x) y)'
  assert tree(r'\sin x y') == '(apply sin (multiply x y))'


def test_points_of_an_angle():
  assert tree(r'\angle ABC') == tree(r'\angle CBA') != tree(r'\angle ACB')
  assert tree(r'\triangle ABC') == tree(r'\triangle CAB') and tree(r'\overline{AB}') == tree(r'\overline{BA}')


@pytest.mark.parametrize('text', [
    '', '1+', '(1', '1)', '1 2', r'\frac{1}', '^', 'apples', r'\text{five}', r'\int x', '1=1', '(1,2)', '(1]', '|x',
    r'\begin{pmatrix}1\end{pmatrix}', '+' * 700, '(' * 40 + '1' + ')' * 40, r'\ldots'])
def test_what_is_no_formula(text):
  assert syntax.node(notation.tokens(text)) is None
  with pytest.raises((syntax.NotAFormula, RecursionError)):
    syntax.parse(notation.tokens(text))


def test_names():
  node = syntax.parse(notation.tokens(r'e^{i\pi x} + f(y) + 3'))
  assert syntax.names(node) == {'x', 'f', 'y'}
  assert syntax.parse(notation.tokens('2')) == ('number', Fraction(2))
