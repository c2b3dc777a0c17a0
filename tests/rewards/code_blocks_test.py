"""Which program a completion holds."""

import pytest

from kr_jax.rewards import code_blocks


def fenced(code):
  return f'Here it is:\n```python\n{code}\n```\nDone.'


@pytest.mark.parametrize('completion, code', [
    ('```python\nx = 1\n```', 'x = 1\n'), ('```\nx = 1\n```', 'x = 1\n'), ('```Py\nx = 1\n```\n', 'x = 1\n'),
    ('~~~python\nx = 1\n~~~', 'x = 1\n'), ('```python\nx = 1```', 'x = 1'), ('```python\nx = 1\n', 'x = 1\n'),
    ('```python\nx = 1\n```\nno:\n```python\nx = 2\n```', 'x = 2\n'),
    ('```python\nx = 1\n```\nIt prints:\n```\n5\n```', 'x = 1\n'),
    ('```python\nx = 1\n```\n```bash\nls\n```', 'x = 1\n'),
    ('1. So:\n   ```python\n   if x:\n     y\n   ```', 'if x:\n  y\n'),
    ('```python\ns = """\n```python\n"""\n```', 's = """\n```python\n"""\n'),
    ('<think>```python\nx = 1\n```</think>```python\nx = 2\n```', 'x = 2\n'),
    ('<think>```python\nx = 1\n```</think>None.', None),
    ('<answer>```python\nx = 1\n```</answer> or\n```python\nx = 2\n```', 'x = 1\n'),
    ('```python\nx = 1\n```\n<answer>yes</answer>', 'x = 1\n'), ('<answer>x = 1</answer>', 'x = 1'),
    ('def f():\n  return 1', 'def f():\n  return 1'), ('print(1)', 'print(1)'),
    ('', None), ('yes', None), ('42', None), ('I cannot.', None), ('```python\n\n```', None),
    ('```rust\nfn f() {}\n```', None), ('The answer is f(x) = 2.', None)])
def test_the_program_of_a_completion(completion, code):
  assert code_blocks.program(completion) == code


PROMPT = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef f(x):\n    """Twice."""\n'


@pytest.mark.parametrize('completion', [
    '    return int(half(x) * 4)\n', '    y = half(x)\n    return int(4 * y)\n\ndef g():\n  pass\nSo it is done.',
    '```python\n    return int(half(x) * 4)\n```', '```python\nreturn int(half(x) * 4)\n```',
    '```python\ny = half(x)\nif y:\n  return int(math.floor(4 * y))\nreturn 0\n```',
    fenced('def f(x):\n  return int(half(x) * 4)'), fenced('def half(x):\n  return 2 * x\ndef f(x):\n  return half(x)'),
    fenced('from __future__ import annotations\nf = lambda x: math.floor(half(x) * 4)'),
    'def f(x):\n    return int(half(x) * 4)', fenced(f'{PROMPT}    return 2 * x')])
def test_a_completion_of_a_function(completion):
  """By its body, or whole."""
  code = code_blocks.program(completion, PROMPT, 'f')
  names = {}
  exec(code, names)
  assert names['f'](3) == 6
  assert code_blocks.program('Sorry, I cannot.', PROMPT, 'f') is None


def test_imports_come_before_a_program():
  run = lambda code: (names := {}, exec(code_blocks.with_imports(code, code_blocks.parse(code)), names))[0]
  assert run('x = Counter("aab").most_common(1), datetime.timedelta(2).days, pow(2, 3, 5)')['x'] == ([('a', 2)], 2, 3)
  assert run('def gcd(a, b): return 7\nx = gcd(4, 6)')['x'] == 7  # its own comes last
  assert run('from __future__ import annotations\ndef f(x: Lost) -> None: pass\ny = sqrt(9)')['y'] == 3
  assert code_blocks.with_imports('x = 1', code_blocks.parse('x = 1')) == 'x = 1'


def test_texts_that_are_hard_to_parse():
  for text in ('(' * 10 ** 5, '1' * 10 ** 5, '\0', 'x = ('):
    assert code_blocks.parse(text) is None
  for text in ('-' * 10 ** 5 + '1', 'x' + '.x' * 10 ** 5):
    code_blocks.parse(text)  # which Python may read or not; it does not raise
