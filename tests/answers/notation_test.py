"""Tokens of answers, and one text for all ways to write them."""

import pytest

from kr_jax.answers import notation
from kr_jax.answers.notation import Token


def kinds(text: str) -> list[tuple[str, str]]:
  return [(token.kind, token.text) for token in notation.tokens(text)]


def test_tokens_by_hand():
  assert kinds(r'3.5x_1 + \sin \alpha') == [
      ('number', '3.5'), ('name', 'x'), ('op', '_'), ('number', '1'), ('op', '+'), ('command', 'sin'), ('name',
      'alpha')]
  assert kinds(r'5\text{ cm}') == [('number', '5'), ('text', 'cm')]
  assert kinds(r'\$3') == [('op', '$'), ('number', '3')]
  assert kinds(r'\{1\}') == [('op', '\\{'), ('number', '1'), ('op', '\\}')]
  assert kinds(r'\left[1,2\right)') == [('op', '['), ('number', '1'), ('op', ','), ('number', '2'), ('op', ')')]
  assert kinds('x<=2') == [('name', 'x'), ('command', 'le'), ('number', '2')]
  assert kinds(r'\begin{pmatrix}1\end{pmatrix}') == [('begin', 'pmatrix'), ('number', '1'), ('end', 'pmatrix')]
  assert kinds('2 x 10^3')[1] == ('command', 'times') and kinds('2 x')[1] == ('name', 'x')
  assert notation.tokens('') == ()


def test_space_before_a_token():
  assert [token.spaced for token in notation.tokens(r'5 m\,s~t')] == [False, True, True, True]
  assert notation.tokens(r'5\mathrm{~cm}')[1] == Token('text', 'cm', True)


@pytest.mark.parametrize('group', [
    [r'\frac{1}{2}', r'\dfrac12', r'\tfrac 1 2', r'\frac 12', r'\displaystyle\frac{1}2'],
    ['x^{2}', 'x^2', 'x²', 'x ^ 2'], ['x_{1}', 'x_1', 'x₁'], [r'\sqrt{2}', r'\sqrt2', '√2', r'\sqrt 2'],
    ['1,234', '1{,}234', r'1,\!234', r'1\,234', '１，２３４'], ['-3', '−3', '－３', '–3'],
    [r'\left(1, 2\right)', '(1,2)', '（1，2）', r'\bigl( 1,2 \bigr)'], [r'\pi', 'π'], [r'x \le 2', 'x<=2', r'x \leq 2',
    'x≤2'],
    [r'\mathbf{x}', 'x', r'\boldsymbol{x}', r'\color{red}x', r'\large x', r'\underline{x}', r'\textcolor{red}{x}'],
    [r'\mathbb{R}', 'ℝ'], [r'45^\circ', '45°', r'45^{\circ}']])
def test_written_is_one_text(group):
  assert len({notation.written(notation.tokens(text)) for text in group}) == 1


def test_written_keeps_apart_what_differs():
  texts = [r'\frac{12}{3}', r'\frac{1}{23}', r'\frac{1}{2}3', 'x^{12}', 'x^1', '1 2', '12', 'ab', 'a b',
           r'\Theta', r'\theta',
           r'\text{a b}', r'\{1\}', '(1)', '[1]']
  assert len({notation.written(notation.tokens(text)) for text in texts}) == len(texts) - 1  # ab is a b
  assert notation.written(notation.tokens('4 dogs')) == '4 dogs'


def test_split():
  parts = lambda text: [notation.written(x) for x in notation.split(notation.tokens(text), lambda x: x.is_op(','))]
  assert parts('1,(2,3),4') == ['1', '(2,3)', '4'] and parts('1') == ['1']
  assert parts('1,)2,(') == ['1,)2,('] and parts('(1,2') == ['(1,2']  # brackets that do not match


def test_texts_in_one_another_end():
  assert notation.tokens(r'\text{' * 3000)
  assert kinds(r'\text{\text{a}}') == [('text', 'a')]
