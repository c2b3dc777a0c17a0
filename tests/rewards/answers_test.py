"""Marks of answers by hand; a corpus of answers whose verdicts are known, and of what must not hang."""

import json
import time

import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import answers
from kr_jax.rewards import marks
from kr_jax.rewards import verifiers
from tests import knobs
from tests import make_verifier_corpus

CORPUS = [json.loads(line) for line in make_verifier_corpus.PATH.read_text().splitlines()]
DECIDED = [line for line in CORPUS if line['right'] is not None]
HOSTILE = [line for line in CORPUS if line['right'] is None]


@pytest.mark.parametrize('completion, answer', [
    # Nothing there.
    ('', None), (' \n', None), ('Two lines\nwithout a mark', None), (r'\boxed{}', r'\boxed{}'),
    ('####\nx', None),
    # A line without a mark is the answer.
    ('7', '7'), (' 7. \n', '7'),
    # Boxes: the last that closes, whatever is nested.
    (r'\boxed{7}', '7'), (r'a \boxed{3} b \boxed{7} c', '7'), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{7} and \boxed{\frac{1}{', '7'), (r'\boxed{\boxed{7}}', '7'), (r'\boxed {7}', '7'),
    (r'\fbox{7}', '7'),
    (r'\boxed{\{1,2\}}', r'\{1,2\}'), (r'\boxed{\left\{x\right.}', r'\left\{x\right.'), (r'\boxed{7}}', '7'),
    ('x\n' + r'\boxed{7', None), (r'\boxed{7} then \boxed{}', '7'), ('\\boxed{\n7\n}', '7'),
    # GSM8K.
    ('Ann has 3.\n#### 7', '7'), ('#### 3\n#### 7 \nmore', '7'), ('#### 1,234.', '1,234'), ('####7', '7'),
    # In words.
    ('The answer is 7.', '7'), ('the answer is: 3.5. Or not?', '3.5'), ('So\nAnswer: 7\nDone', '7'),
    ('The answer is 3. No, the final answer is 7!', '7!'), ('The answer is $\\frac{1}{2}$.', r'\frac{1}{2}'),
    ('**Answer:** 7', '7'), ('The answer is **7**.', '7'), ('The answer is\n\n$$\n7\n$$\nso', '7'),
    ('The answer is \\[x=7\\], so', 'x=7'), ('Answer: $5$ and $6$.', '$5$ and $6$'),
    ('The answer is \\(7\\)', '7'),
    ('An answerer isolated 7\nlines', None),
    # Several kinds: in the order of the docstring.
    ('#### 3\n\\boxed{7}\nThe answer is 4.', '7'), ('The answer is 3.\n#### 7', '7'),
    ('\\boxed{3} <answer>7</answer>', '7'), ('<answer>3</answer> <answer>\n7\n</answer>', '7'),
    ('<answer>3 <answer>7</answer>', '7'),
    # Thoughts.
    (r'<think>\boxed{3}</think>7', '7'), (r'<think>\boxed{3}</think>', None),
    (r'\boxed{3}</think>#### 7', '7'),
    # Punctuation and formulas around it.
    ('$7$', '7'), (r'\(7\)', '7'), ('`7`;', '7'), ('$$7$$.', '7'), ('$7', '$7'), ('5!', '5!'),
    ('**7.**', '7'),
])
def test_extract_by_hand(completion, answer):
  assert marks.extract(completion) == answer


@pytest.mark.parametrize('text, letter', [
    ('B', 'B'), ('b', 'B'), ('(B)', 'B'), ('(b)', 'B'), ('B.', 'B'), ('B)', 'B'), ('B: 5 m', 'B'),
    ('(B) 5 m', 'B'),
    (r'\text{(B)}', 'B'), (r'\mathbf{B}', 'B'), ('**B**', 'B'), ('option B', 'B'), ('choice (B)', 'B'),
    ('B because it is', 'B'), ('', None), ('Bob', None), ('a mystery', None), ('5', None), ('AB', None),
    ('B or C', None)])
def test_letter_by_hand(text, letter):
  assert answers.letter(text) == letter


@pytest.mark.parametrize('text, normal', [
    (r'\$1,234', ('1234', 'dollar')), ('1{,}234', ('1234', '')), (r'5\text{ cm}^2', ('5', 'cm^2')),
    ('5 square meters', ('5', 'm^2')), ('12 apples', ('12', '')), (r'25\%', ('25', '%')),
    ('45°', ('45', 'deg')),
    ('2 1/3', (r'(2+\frac{1}{3})', '')), (r'\dfrac12', (r'\frac{1}{2}', '')),
    ('2.5 million', (r'2.5\times10^{6}', '')),
    ('1.2e5', (r'1.2\times10^{5}', '')), ('2sqrt(3)', (r'2\sqrt{3}', '')),
    (r'\left[1,2\right)', ('[1,2)', '')),
    ('(1,234)', ('(1,234)', '')), ('−7', ('-7', '')), ('007', ('7', '')), ('2 pi', (r'2 \pi', '')),
    ('', ('', ''))])
def test_normal_by_hand(text, normal):
  assert answers.normal(text) == normal


def test_conventions_by_hand():
  assert answers.same('50%', '0.5') and answers.same('50%', '50') and not answers.same('50%', '5')
  assert answers.same('5 cm', '5') and not answers.same('5 cm', '5 m')
  assert answers.same('0.333333', '1/3') and not answers.same('0.33333', '1/3')
  assert not answers.same('0.333333', '0.3333333')
  assert answers.same('2, 1, 1', r'\{1,2\}') and not answers.same('(2,1)', '(1,2)')
  assert not answers.same('', '') and not answers.same('x', '')


def test_numbers_are_exact():
  """Where math-verify rounds to six decimals."""
  assert not answers.same('0.00000001', '0.00000002')
  assert not answers.same('1.0000001', '1') and not answers.same(r'10^{40}', r'10^{40}+1')
  # A decimal of six digits may be rounded; a fraction may not.
  assert answers.same('1.41421', r'\sqrt{2}') and not answers.same('1.4142', r'\sqrt{2}')
  assert not answers.same(r'\frac{14142135623730950488}{10^{19}}', r'\sqrt{2}')
  assert answers.same(r'\sqrt{3+2\sqrt{2}}', r'1+\sqrt{2}') and answers.same('0.1', r'\frac{1}{10}')


@pytest.mark.parametrize('group', [
    ['1/2', '0.5', r'\frac{1}{2}', '.50', r'\frac{2}{4}', 'x=0.5'], ['2, 1', r'\{1,2\}', '1 and 2'],
    [r'2\sqrt{3}', r'\sqrt{12}', '2sqrt(3)'], ['(x+1)^2', 'x^2+2x+1'], ['(1,2)', r'\left(1, 2\right)'],
    ['Odd', r'\text{odd}'], ['1,234', '1234', r'1234\text{ m}'], [r'25\%', '25'], [r'[1,2)', r'[\frac{3}{3},2.0)'],
    ['9^{9^{9^{9}}}', '9^{9^{9^9}}']])
def test_canonical_answers_of_one_object_are_one(group):
  texts = {answers.canonical(x) for x in group}
  assert len(texts) == 1 and texts.pop()
  others = {answers.canonical(x) for x in ('7', '1,3', r'\sqrt{5}', 'x^3', '(2,1)', 'even', '[1,2]')}
  assert len(others) == 7 and not others & {answers.canonical(group[0])}
  assert answers.canonical('') is None


def test_what_is_huge_is_text():
  for text in ('9' * 1000, '(' * 20 + '7' + ')' * 20, '9^{9^{9^{9}}}', '99999999!', '7\x00'):
    start = time.monotonic()
    assert answers.same(text, text) and not answers.same(text, '7') and not answers.same('7', text)
    assert answers.canonical(text)
    assert time.monotonic() - start < 3


def task_of(i: int, line: dict) -> types.Task:
  return types.Task(id=f'corpus/{i}', index=i, prompt='', answer=line['reference'], difficulty=1, solution='',
                    tokens=())


def test_the_corpus():
  """That its script writes it, and the verdict on each answer that has one."""
  assert CORPUS == make_verifier_corpus.lines()
  assert len(DECIDED) >= 700 and len(HOSTILE) >= 40
  assert 0.4 < sum(line['right'] for line in DECIDED) / len(DECIDED) < 0.6
  misses = [line for i, line in enumerate(DECIDED)
            if verifiers.mathematics(line['completion'], task_of(i, line)) != line['right']]
  assert [line['completion'] for line in misses] == ['twelve']  # numbers in words are not read


@pytest.mark.slow
def test_answers_that_could_hang():
  """Each has a verdict or runs into the limits, and only a few do."""
  with rewards.Workers(knobs.verifiers('math', workers=2, timeout_s=1.0)) as pool:
    scores = pool.score([line['completion'] for line in HOSTILE],
                        [task_of(i, line) for i, line in enumerate(HOSTILE)])
  assert scores.timeouts + scores.errors < 12
  assert scores.verdict_R.sum() == 0
