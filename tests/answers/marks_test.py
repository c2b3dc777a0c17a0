"""The answer that a completion marks."""

import pytest

from kr_jax.answers import marks


@pytest.mark.parametrize('completion, answer', [
    # Nothing there.
    ('', None), (' \n', None), ('Two lines\nwithout a mark', None), (r'\boxed{}', r'\boxed{}'),
    ('####\nx', None),
    # A line without a mark is the answer.
    ('7', '7'), (' 7. \n', '7'),
    # Boxes: the last that closes, whatever is nested.
    (r'\boxed{7}', '7'), (r'a \boxed{3} b \boxed{7} c', '7'), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{7} and \boxed{\frac{1}{', '7'), (r'\boxed{\boxed{7}}', '7'), (r'\boxed {7}', '7'),
    (r'\fbox{7}', '7'), (r'\framebox{7}', '7'), ('So\n\\boxed 7$', '7'),
    (r'\boxed{\{1,2\}}', r'\{1,2\}'), (r'\boxed{\left\{x\right.}', r'\left\{x\right.'), (r'\boxed{7}}', '7'),
    ('x\n' + r'\boxed{7', None), (r'\boxed{7} then \boxed{}', '7'), ('\\boxed{\n7\n}', '7'),
    # Boxes that are one list, or the same answer twice.
    (r'They are $\boxed{2}$, $\boxed{-5}$ and $\boxed{9}$.', '2, -5, 9'),
    (r'\boxed{a} \text{ or } \boxed{b}', 'a, b'), (r'\boxed{8}, again \boxed{8}', '8'),
    (r'First \boxed{4}; then $\boxed{5}$ and $\boxed{6}$', '5, 6'), (r'\boxed{1} so \boxed{2}', '2'),
    # GSM8K.
    ('Ann has 3.\n#### 7', '7'), ('#### 3\n#### 7 \nmore', '7'), ('#### 1,234.', '1,234'), ('####7', '7'),
    ('\\boxed{3} of them.\n#### 7\n', '7'), ('#### 3\n\\boxed{7}', '7'), ('\\boxed{7}\nx ###### y', '7'),
    # In words.
    ('The answer is 7.', '7'), ('the answer is: 3.5. Or not?', '3.5'), ('So\nAnswer: 7\nDone', '7'),
    ('The answer is 3. No, the final answer is 7!', '7!'), ('The answer is $\\frac{1}{2}$.', r'\frac{1}{2}'),
    ('**Answer:** 7', '7'), ('The answer is **7**.', '7'), ('The answer is\n\n$$\n7\n$$\nso', '7'),
    ('The answer is \\[x=7\\], so', 'x=7'), ('Answer: $5$ and $6$.', '$5$ and $6$'),
    ('The answer is \\(7\\)', '7'), ('So\nAnswer = 7', '7'),
    ('An answerer isolated 7\nlines', None),
    # With a clause after the answer.
    ('So\nThe answer is 30, all in all.', '30'), ('So\nThe answer is 30 because 5 is 6.', '30'),
    ('So\nThe answer is $x = 4$, which we knew.', 'x = 4'), ('So\nThe answer is 3, 4, and 5.', '3, 4, and 5'),
    ('So\nThe answer is red, as roses are.', 'red, as roses are'), ('So\nThe answer is 31, not 30.', '31'),
    # A heading.
    ('Steps\n\n## Final answer\n\n**12**\n', '12'), ('# The answer\n$x$', 'x'), ('# Answers are hard\nx\ny', None),
    # Several kinds: in the order of the docstring.
    ('#### 3\n\\boxed{7}\nThe answer is 4.', '7'), ('The answer is 3.\n#### 7', '7'),
    ('\\boxed{3} <answer>7</answer>', '7'), ('<answer>3</answer> <answer>\n7\n</answer>', '7'),
    ('<answer>3 <answer>7</answer>', '7'),
    # Marks inside the tag.
    (r'<answer>\boxed{7}</answer>', '7'), (r'<answer>We have $\boxed{\frac37}$ here.</answer>', r'\frac37'),
    ('<answer>Sum\n#### 7</answer>', '7'), ('<answer>So\nFinal answer: 7</answer>', '7'),
    (r'\boxed{3} <answer>It is 7</answer>', 'It is 7'),
    # Thoughts.
    (r'<think>\boxed{3}</think>7', '7'), (r'<think>\boxed{3}</think>', None),
    (r'\boxed{3}</think>#### 7', '7'),
    # Punctuation, spaces and formulas around it.
    ('$7$', '7'), (r'\(7\)', '7'), ('`7`;', '7'), ('$$7$$.', '7'), ('$7', '$7'), ('5!', '5!'),
    ('**7.**', '7'), (r'\boxed{\,7\;}', '7'), (r'\boxed{\quad 7~}', '7'), (r'\boxed{$7\,$}', '7'), ('7。', '7'),
    (r'\boxed{\ \text{no}\:}', r'\text{no}'), (r'\boxed{x\right.}', r'x\right.'),
])
def test_extract_by_hand(completion, answer):
  assert marks.extract(completion) == answer


def test_raw_is_the_text_as_written():
  assert marks.raw('<answer> A dog, sat down. </answer>') == ' A dog, sat down. '
  assert marks.raw(r'\boxed{$7$.}') == '$7$.'
  assert marks.raw('#### 7.\n') == '7.'
  assert marks.raw('one\ntwo') is None and marks.raw('7. ') == '7. '


def test_trim():
  assert marks.trim(r' $\,7\,$. ') == '7'
  assert marks.trim('$5$ and $6$') == '$5$ and $6$'
  assert marks.trim('') == ''
  assert marks.trim('2, 4, 6, ...') == '2, 4, 6, ...'  # which is not 2, 4, 6


def test_dollars():
  assert marks.without_dollars('$5$, $6$').split() == ['5', ',', '6']
  assert marks.without_dollars('costs $5') == r'costs \$5' and marks.without_dollars(r'\$5') == r'\$5'
  assert marks.without_dollars('$x=1$\n$y=2$') == ' x=1, y=2 '
