"""The arithmetic problems against a solver of the test's own."""

import collections
import hashlib
import random
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from kr_jax.datasets import arithmetic

TERMS = st.tuples(st.integers(), st.sampled_from(arithmetic.DIFFICULTIES)).map(
    lambda drawn: arithmetic.problem(random.Random(drawn[0]), drawn[1]))


class Script(random.Random):
  """A generator whose random() gives these numbers, the last one for ever."""

  def __init__(self, *numbers):
    super().__init__()
    self.numbers = list(numbers)

  def random(self):
    return self.numbers.pop(0) if len(self.numbers) > 1 else self.numbers[0]


@pytest.fixture(scope='module')
def splits():
  return arithmetic.splits()


def parse(prompt: str) -> list[int]:
  terms = re.fullmatch(r'((?:[+-][1-9])+) *=', prompt)[1]
  return [int(terms[i:i + 2]) for i in range(0, len(terms), 2)]


def solve(prompt: str) -> list[int]:
  """The total after each term, as Python works them out."""
  terms = parse(prompt)
  return [eval(''.join(f'{term:+d}' for term in terms[:i + 1])) for i in range(len(terms))]


def numbers(solution: str) -> list[int]:
  assert len(solution) % 2 == 0
  return [int(solution[i:i + 2]) for i in range(0, len(solution), 2)]


def slips(terms: list[int], totals: list[int]) -> list[bool]:
  """For each term with a carry or a borrow: was it forgotten? Fails where aught else is wrong."""
  forgotten, before = [], 0
  for term, total in zip(terms, totals, strict=True):
    right, units = before + term, before % 10 + term
    if 0 <= units <= 9:
      assert total == right
    else:
      kept = before - before % 10 + units % 10  # the tens were left as they were
      assert total in (right % 100, kept)
      forgotten.append(total == kept)
    before = total
  return forgotten


def test_the_solver():
  assert solve('+3+8-5              =') == [3, 11, 6]
  assert solve('+9-9=') == [9, 0]
  assert slips([3, 8, -5], [3, 11, 6]) == [False, False]
  assert slips([3, 8, -5], [3, 1, 6]) == [True, True]
  assert slips([3, 8, -5], [3, 11, 16]) == [False, True]
  with pytest.raises(AssertionError):
    slips([3, 8, -5], [3, 11, 7])


def test_solution_literal():
  assert arithmetic.solution([3, 8, -5]) == '031106'
  assert arithmetic.solution([9] * 11) == '0918273645546372819099'


def test_the_careless_pupil_literal():
  assert arithmetic.add(7, 5) == 12
  assert arithmetic.add(7, 5, forget=True) == 2
  assert arithmetic.add(12, -5, forget=True) == 17
  assert arithmetic.add(13, 4, forget=True) == 17  # there is nothing to forget
  always, never = 0.0, 0.999
  assert arithmetic.solution([3, 8, -5], rng=Script(always)) == '030106'
  assert arithmetic.solution([3, 8, -5], rng=Script(never)) == '031106'
  assert arithmetic.solution([3, 8, -5], rng=Script(never, never, always)) == '031116'
  assert arithmetic.solution([9, 5, -8], rng=Script(never, always, never)) == '090496'  # 4 - 8


def test_the_examples_of_the_docstring():
  for text in ("'+3+8-5              ='", "'031106'", "'06'", "'030106'", "'031116'"):
    assert text in arithmetic.__doc__


def test_every_answer_and_solution_is_what_the_solver_finds(splits):
  for split, examples in splits.items():
    for example in examples:
      totals = solve(example['prompt'])
      assert split == 'warm_start' or numbers(example['solution']) == totals
      assert all(0 <= total <= 99 for total in totals)
      assert example['answer'] == f'{totals[-1]:02d}'
      assert example['difficulty'] == len(totals)
      assert example['id'] == f'arithmetic/{example["prompt"].rstrip("= ")}'


def test_solutions_of_warm_start_slip_at_half_of_their_carries_and_nowhere_else(splits):
  forgotten, right = [], 0
  for example in splits['warm_start']:
    forgotten += slips(parse(example['prompt']), numbers(example['solution']))
    right += example['solution'].endswith(example['answer'])
  assert 0.47 < sum(forgotten) / len(forgotten) < 0.53  # of about 25 thousand
  assert 0.1 < right / len(splits['warm_start']) < 0.6


@given(TERMS, st.integers())
def test_any_problem(terms, seed):
  prompt = ''.join(f'{term:+d}' for term in terms) + '='
  assert numbers(arithmetic.solution(terms)) == solve(prompt)
  assert all(0 <= total <= 99 for total in solve(prompt))
  slips(terms, numbers(arithmetic.solution(terms, rng=random.Random(seed))))


def test_totals_stay_within_two_digits_where_they_would_leave():
  class Upwards(random.Random):
    """Draws nines, and adds where it may."""

    def randint(self, low, high):
      return high

    def choice(self, terms):
      return max(terms)

  assert arithmetic.problem(Upwards(), 15) == [9] * 11 + [-9, 9, -9, 9]


def test_prompts_have_one_length_and_the_alphabet_every_character(splits):
  assert len(set(arithmetic.ALPHABET)) == len(arithmetic.ALPHABET) == 14
  for examples in splits.values():
    assert {len(example['prompt']) for example in examples} == {21}
    assert set(''.join(example['prompt'] for example in examples)) == set('123456789+-= ')
    assert set(''.join(e['solution'] + e['answer'] for e in examples)) == set('0123456789')


def test_nothing_is_shared_between_or_within_splits(splits):
  for field in ('id', 'prompt'):
    values = [example[field] for examples in splits.values() for example in examples]
    assert len(set(values)) == len(values)


def test_counts_by_difficulty(splits):
  counts = {split: collections.Counter(example['difficulty'] for example in examples)
            for split, examples in splits.items()}
  assert counts == {split: dict.fromkeys((3, 4, 5, 6, 7, 8, 9, 10), count)
                    for split, count in (('test', 48), ('train', 128), ('warm_start', 1024))}


def test_difficulties_are_mixed_within_a_split(splits):
  for examples in splits.values():
    assert len({example['difficulty'] for example in examples[:48]}) > 4


def test_the_same_twice_whatever_the_global_generator(splits):
  state = random.getstate()
  try:
    random.seed(1)
    assert arithmetic.splits() == splits
  finally:
    random.setstate(state)


def test_the_problems_of_this_version(splits):
  """Written data is found again by its version: with other problems, raise Builder.VERSION."""
  text = '\n'.join(f'{split} {example["id"]} {example["answer"]} {example["solution"]}'
                   for split in sorted(splits) for example in splits[split])
  assert (str(arithmetic.Builder.VERSION), hashlib.sha256(text.encode()).hexdigest()[:16]) == (
      '1.1.0', '1887c23f6c10431e')


@pytest.mark.slow
def test_written_data_reads_back_as_it_was_generated(splits, data_dir):
  builder = arithmetic.Builder(data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare()
  assert set(builder.info.splits) == set(splits)
  by_id = lambda example: example['id']
  for split, examples in splits.items():
    read = [{name: x.decode() if isinstance(x, bytes) else int(x) for name, x in row.items()}
            for row in builder.as_data_source(split)]
    rest = {'verifier': '', 'info': ''}
    assert sorted(read, key=by_id) == [example | rest for example in sorted(examples, key=by_id)]
