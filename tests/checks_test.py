"""What values are refused, whatever their knob is, and how an error shows them."""

import pytest

from kr_jax import checks


def test_a_value_is_shown_and_not_at_length():
  assert checks.shown('a') == "'a'" and len(checks.shown('a' * 10**6)) < 300
  assert checks.shown(10 ** 5000) == 'a number of thousands of digits'


@pytest.mark.parametrize('value', [True, '1', None, float('nan'), float('inf'), 10 ** 400, 1j])
def test_what_is_no_finite_number(value):
  assert not checks.is_finite(value)
  assert checks.is_finite(3) and checks.is_finite(-0.5)


@pytest.mark.parametrize('path, problem', [
    ('gs://', "names no bucket; give 'gs://BUCKET/PATH'"), ('gs:///', 'names no bucket'), ('gs:/', 'names no bucket'),
    ('a/' + 'b' * 256, 'more than the 255 bytes'), ('é' * 128, 'more than the 255 bytes')])
def test_what_is_no_path(path, problem):
  assert problem in checks.path_problem(path)


@pytest.mark.parametrize('path', ['', '/', 'a/b', 'gs://bucket', 'hf:org/name@main', '~/x', 'é' * 127])
def test_a_path(path):
  assert checks.path_problem(path) is None


def test_what_is_no_text():
  assert 'NUL' in checks.text_problem('a\0b') and 'UTF-8' in checks.text_problem('\udcff')
  assert checks.text_problem('a' * 100_001) == 'has 100,001 characters; the limit is 100,000'
  assert checks.text_problem('é\n') is None


@pytest.mark.parametrize('template, problem', [
    ('{problem:>1000000000}', '(it has {problem:>1000000000})'), ('{problem!r}', '(it has {problem!r})'),
    ('{problem.__class__}', '(it has {problem.__class__})'), ('{problem[0]}', '(it has {problem[0]})'),
    ('{problem:{problem}}', 'it has {problem:{problem}}'), ('{}', 'it has {}'), ('Think.', 'it has no {problem}'),
    ('{problem', "expected '}'"), ('{problem}' * 17, 'has {problem} 17 times; the limit is 16')])
def test_what_is_no_template(template, problem):
  assert problem in checks.template_problem(template)
  assert checks.template_problem('{problem} \\boxed{{}}') is None


@pytest.mark.parametrize('split', ['', 'train[', 'train[:5%', 'train[a:b]', 'train]', 'train[]', 'train[:5', 'a b',
                                   'x' * 1000, 'train+', 'train[5:6:7]', '../x'])
def test_what_is_no_split(split):
  assert "is no split; write 'train'" in checks.split_problem(split)


@pytest.mark.parametrize('split', ['train', 'all', 'train[:100]', 'train[:5%]', 'test[200:]', 'train[-5:]',
                                   'a-b+c[1:2]', 'train[3shard]', 'train[1_000:] + test'])
def test_a_split(split):
  assert checks.split_problem(split) is None


@pytest.mark.parametrize('pair', [
    'gsm8k', ('gsm8k',), ('gsm8k', True), ('gsm8k', 0), ('gsm8k', float('nan')), (5, 1.0), ('', 1.0), ('gsm8k', 1e9),
    (('gsm8k', 1.0),), ('gsm8k', '1'), ('gsm8k', 1.0, 1.0), ('a\0', 1.0)])
def test_what_is_no_pair_of_a_mixture(pair):
  assert checks.pair_problem(pair)
  assert checks.pair_problem(('gsm8k', 1)) is None
