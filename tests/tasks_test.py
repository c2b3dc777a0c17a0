"""Which tasks a step takes, and how they are read."""

import inspect
import json
import random

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import hub
from kr_jax import tasks
from kr_jax import types
from kr_jax.datasets import arithmetic
from kr_jax.datasets import builder as builder_lib
from kr_jax.datasets import sums
from kr_jax.model.tokenizer import Characters
from tests import hub as hub_lib
from tests.make_datasets import DIRECTORY

TOKENIZER = Characters(arithmetic.ALPHABET)


def some(count: int, lengths=(3,)) -> list[types.Task]:
  """Tasks of made-up prompts, whose lengths go round."""
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer='7', difficulty=1, solution='',
                     tokens=tuple(range(2, 2 + lengths[i % len(lengths)]))) for i in range(count)]


@st.composite
def sizes(draw):
  I = draw(st.integers(1, 30))
  return I, draw(st.integers(1, I))


@given(sizes(), st.integers(0, 5), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_an_epoch_takes_each_task_once_and_any_step_can_be_asked(size, epoch, seed, rng):
  I, M = size
  split = some(I)
  steps = list(range(epoch * (I // M), (epoch + 1) * (I // M)))
  in_order = {step: tasks.batch(split, step, per_step=M, seed=seed) for step in steps}
  rng.shuffle(steps)
  for step in steps:
    assert tasks.batch(some(I), step, per_step=M, seed=seed) == in_order[step]
  taken = [task for step in in_order for task in in_order[step]]
  assert all(len(batch) == M for batch in in_order.values())
  assert len(taken) == len({task.id for task in taken}) == I - I % M
  assert set(taken) <= set(split)


def test_batches_do_not_touch_the_global_generator():
  np.random.seed(0)
  first = tasks.batch(some(50), 2, per_step=10, seed=0)
  np.random.seed(1)
  random.seed(1)
  assert tasks.batch(some(50), 2, per_step=10, seed=0) == first


def test_epochs_and_seeds_differ():
  orders = {tuple(task.index for step in range(10 * epoch, 10 * epoch + 10)
                  for task in tasks.batch(some(100), step, per_step=10, seed=seed))
            for epoch in range(4) for seed in range(4)}
  assert len(orders) == 16


def test_the_tasks_left_over_change_with_the_epoch():
  taken = [{task.index for step in (2 * epoch, 2 * epoch + 1)
            for task in tasks.batch(some(10), step, per_step=4, seed=0)} for epoch in range(20)]
  assert all(len(indices) == 8 for indices in taken)
  assert set.union(*taken) == set(range(10))


def test_an_epoch_is_one_permutation_of_seed_and_epoch():
  """As in every version: a run may go on with a newer one."""
  for seed in (5, 2**62):
    order = np.random.default_rng((seed, 2)).permutation(10)
    assert [[t.index for t in tasks.batch(some(10), step, per_step=4, seed=seed)] for step in (4, 5)] == [
        list(order[:4]), list(order[4:8])]


def test_steps_of_a_mixture_literal():
  """As in every version."""
  split, weights = mixed(a=11, b=7, c=3), {'a': 5, 'b': 2.0, 'c': 1}
  assert [[task.index for task in tasks.batch(split, step, per_step=6, seed=7, weights=weights)]
          for step in (0, 1, 9)] == [
              [4, 13, 6, 10, 14, 0], [1, 3, 15, 18, 8, 7], [5, 1, 15, 18, 6, 4]]


def mixed(**counts) -> list[types.Task]:
  """So many tasks of each source."""
  return tasks.join([[t._replace(id=f'{source}/{t.id}', source=source) for t in some(count)]
                     for source, count in counts.items()], 'mixed')


def counts(step, weights, split, per_step, seed=0):
  batch = tasks.batch(split, step, per_step=per_step, seed=seed, weights=weights)
  assert len(batch) == len({task.id for task in batch}) == per_step
  return [sum(task.source == source for task in batch) for source in weights]


def test_a_mixture_has_its_weights():
  """Weights 5, 2, 1 of a step of 6: 3.75, 1.5 and 0.75 tasks, each rounded up or down."""
  split, weights = mixed(a=11, b=7, c=3), {'a': 5, 'b': 2.0, 'c': 1}
  found = np.array([counts(step, weights, split, 6) for step in range(2000)])
  assert [set(column) for column in found.T] == [{3, 4}, {1, 2}, {0, 1}]
  # Standard errors of at most .5 / sqrt(2000) = .011.
  np.testing.assert_allclose(found.mean(axis=0), [3.75, 1.5, 0.75], atol=0.05)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**31))
def test_any_mixture_is_rounded_up_or_down(weights, per_step, step):
  weights = {f'{k}': weight for k, weight in enumerate(weights)}
  split = mixed(**dict.fromkeys(weights, per_step))
  found = counts(step, weights, split, per_step)
  for count, weight in zip(found, weights.values()):
    assert abs(count - per_step * weight / sum(weights.values())) < 1 + 1e-6


def test_a_mixture_of_whole_shares_is_the_same_in_every_step():
  split = mixed(a=30, b=20, c=10)
  weights = {'a': 0.1, 'b': 0.2, 'c': 0.3}
  assert {tuple(counts(step, weights, split, 12)) for step in range(50)} == {(2, 4, 6)}


def test_every_task_of_a_dataset_has_an_equal_chance():
  split, weights = mixed(a=5, b=9), {'a': 1, 'b': 2}
  taken = np.zeros(14)
  for step in range(3000):
    for task in tasks.batch(split, step, per_step=4, seed=1, weights=weights):
      taken[task.index] += 1
  np.testing.assert_allclose(taken / 3000, [4 / 3 / 5] * 5 + [8 / 3 / 9] * 9, atol=0.04)


def test_an_epoch_of_a_mixture_repeats_no_task():
  split = mixed(a=12, b=8)
  weights = {'a': 2, 'b': 1}  # 4 and 2 of 6: epochs of 3 and of 4 steps
  taken = [[t.id for step in steps for t in tasks.batch(split, step, per_step=6, seed=0, weights=weights)
            if t.source == source] for source, steps in (('a', range(3, 6)), ('b', range(4, 8)))]
  assert [len(set(x)) for x in taken] == [12, 8]


def test_any_step_of_a_mixture_can_be_asked_and_seeds_differ():
  split, weights = mixed(a=50, b=50), {'a': 1, 'b': 1.5}
  batch = lambda step, seed=0: tasks.batch(split, step, per_step=8, seed=seed, weights=weights)
  in_order = [batch(step) for step in range(20)]
  assert [batch(step) for step in reversed(range(20))] == in_order[::-1]
  assert len({tuple(t.index for t in x) for x in (*in_order, batch(3, seed=1))}) == 21


def test_datasets_take_turns_within_a_step():
  batch = tasks.batch(mixed(a=8, b=4), 0, per_step=6, seed=0, weights={'a': 2, 'b': 1})
  assert ''.join(task.source for task in batch) == 'abaaba'


def test_a_mixture_of_one_is_its_dataset():
  split = mixed(a=10)
  for step in range(7):
    assert tasks.batch(split, step, per_step=4, seed=3, weights={'a': 0.3}) == tasks.batch(
        split, step, per_step=4, seed=3)


def test_a_dataset_too_small_for_its_weight():
  with pytest.raises(ValueError, match="a step takes up to 3 tasks of 'b', which has 2; lower its "
                                       'weight in tasks.mixture, tasks.per_step or tasks.candidates_per_step'):
    tasks.batch(mixed(a=50, b=2), 0, per_step=8, seed=0, weights={'a': 2, 'b': 1})


def test_mixtures():
  tasks.check_mixture(())
  tasks.check_mixture((('a', 1), ['b:test[:5]', 0.5], ('reasoning_gym/gcd', 2)))
  for pair in ('a', ('a', 0.0), ('a', -1), ('a', float('inf')), ('a', float('nan')), ('a', '1'), (1, 'a'),
               ('a', 1, 2)):
    with pytest.raises(ValueError, match=r'^tasks.mixture holds .*, which is not \(DATASET, WEIGHT\) with a weight '
                                         'above 0'):
      tasks.check_mixture((pair,))
  with pytest.raises(ValueError, match='names a dataset twice; weights are of datasets'):
    tasks.check_mixture((('a:train', 1), ('a:test', 2)))


def test_a_dataset_and_its_split():
  for name, found in (
      ('champ', ('champ', 'train')), ('champ:test', ('champ', 'test')),
      ('a:test[:25%]', ('a', 'test[:25%]')), ('reasoning_gym/gcd', ('reasoning_gym/gcd', 'train')),
      ("reasoning_gym/x(a='b:c', d={1: 2}):test[5:7]",
       ("reasoning_gym/x(a='b:c', d={1: 2})", 'test[5:7]')),
      ('', ('', 'train'))):
    assert tasks.part(name, 'train') == found


def test_joined_splits_are_rows_of_one():
  joined = mixed(a=2, b=3)
  assert [(task.id, task.index) for task in joined] == [
      ('a/made/0', 0), ('a/made/1', 1), ('b/made/0', 2), ('b/made/1', 3), ('b/made/2', 4)]
  with pytest.raises(ValueError, match="one and two: rows 0 and 2 share the id 'made/0'"):
    tasks.join([some(2), some(1)], 'one and two')


def test_more_tasks_a_step_than_there_are():
  with pytest.raises(ValueError, match='a step of 6 tasks is more than the 5 tasks of the split; lower tasks.per_step'):
    tasks.batch(some(5), 0, per_step=6, seed=0)


def test_prompts_literal():
  prompts = tasks.prompts([some(3, (2, 1, 4))[i] for i in (2, 0, 1)], 5)
  np.testing.assert_array_equal(
      prompts.token_MP, [[2, 3, 4, 5, 0], [2, 3, 0, 0, 0], [2, 0, 0, 0, 0]])
  np.testing.assert_array_equal(prompts.length_M, [4, 2, 1])
  np.testing.assert_array_equal(prompts.index_M, [2, 0, 1])
  assert {x.dtype for x in prompts} == {np.dtype(np.int32)}


def test_prompts_that_fit_exactly():
  split = some(4, (3, 5))
  tasks.check_prompts(split, 5, 'made/train')
  assert tasks.prompts(split, 5).token_MP.shape == (4, 5)


def test_a_prompt_too_long():
  with pytest.raises(ValueError, match=r"made/train: the prompt of 'made/1' has 5 tokens, not "
                                       r'1\.\.sample.prompt_length=4; .* at least 6'):
    tasks.check_prompts(some(3, (4, 5, 6)), 4, 'made/train')


def test_an_empty_prompt():
  with pytest.raises(ValueError, match=r"'made/1' has 0 tokens"):
    tasks.check_prompts(some(2, (4, 0)), 4, 'made/train')


def test_ids_are_unique():
  split = some(4)
  tasks.check(split, 'made/train')
  split[3] = split[3]._replace(id='made/1')
  with pytest.raises(ValueError, match=r"made/train: rows 1 and 3 share the id 'made/1'"):
    tasks.check(split, 'made/train')


def test_a_split_holds_a_task():
  with pytest.raises(ValueError, match=r'made/train holds no task; name a split'):
    tasks.check([], 'made/train')


def test_read(data_dir):
  read = tasks.read('arithmetic', 'test', TOKENIZER, data_dir=data_dir)
  generated = {example['id']: example for example in arithmetic.splits()['test']}
  assert len(read) == len(generated) == 384
  assert [task.index for task in read] == list(range(384))
  for task in read:
    text = task._asdict()
    assert {name: text[name] for name in generated[task.id]} == generated[task.id]
    assert task.tokens == TOKENIZER.encode(task.prompt)
  assert tasks.read('arithmetic', 'test', TOKENIZER, data_dir=data_dir) == read


def test_runs_that_start_together_write_one_dataset(tmp_path, monkeypatch):
  """A second one has written everything when the first is about to."""
  splits = sums.splits

  def other_first():
    monkeypatch.setattr(sums, 'splits', splits)
    tasks.builder('sums', str(tmp_path))
    return splits()

  monkeypatch.setattr(sums, 'splits', other_first)
  read = tasks.read('sums', 'test', TOKENIZER, data_dir=str(tmp_path))
  assert {task.id for task in read} == {f'sums/{a}+{b}' for a, b in splits()['test']}
  copy, = (tmp_path / 'sums').iterdir()
  assert [p.name for p in copy.iterdir()] == ['1.0.0']


def test_read_says_where_a_task_is_from_and_what_verifies_it(data_dir):
  assert {(task.source, task.verifier, task.info) for task in tasks.read(
      'arithmetic', 'test', TOKENIZER, data_dir=data_dir)} == {('arithmetic', '', '')}
  wide = Characters(arithmetic.ALPHABET + 'abcdefghijklmnopqrstuvwxyz{}:.')
  read = tasks.read('reasoning_gym/count_bits', 'test', Bytes(), data_dir=data_dir,
                    reasoning_gym={'train': 1, 'test': 3, 'seed': 0})
  assert {(task.source, task.verifier) for task in read} == {
      ('reasoning_gym/count_bits', 'reasoning_gym')}
  assert all(json.loads(task.info)['entry']['answer'] == task.answer for task in read)
  bare = tasks.read('arithmetic', 'test[:3]', TOKENIZER, data_dir=data_dir)
  put = tasks.read('arithmetic', 'test[:3]', wide, data_dir=data_dir, template='find {problem}{{}}.')
  assert [task.prompt for task in put] == [f'find {task.prompt}{{}}.' for task in bare]
  assert [task.tokens for task in put] == [wide.encode(task.prompt) for task in put]
  assert [task.id for task in put] == [task.id for task in bare]


class Bytes:
  """A tokenizer of any text."""

  def prompt(self, text):
    return tuple(text.encode())


def test_templates():
  tasks.check_template('{problem}')
  tasks.check_template('{problem}\nPut your final answer within \\boxed{{}}.')
  for template in ('', 'Solve.', '{}', '{0}', '{question}', '{problem.x}', '{problem[x]}',
                   '{problem} in \\boxed{}', '{problem', '{problem:d}', '{{problem}}'):
    with pytest.raises(ValueError, match='tasks.template=.* is no text around {problem} .*are doubled'):
      tasks.check_template(template)


def test_the_alphabet_of_several_datasets():
  both = tasks.alphabet(['arithmetic', 'reasoning_gym/gcd', 'arithmetic'])
  assert both.startswith(arithmetic.ALPHABET) and len(set(both)) == len(both) == 96
  assert tasks.alphabet(['arithmetic']) == arithmetic.ALPHABET
  with pytest.raises(ValueError, match="'champ' has no alphabet, which a policy from scratch needs"):
    tasks.alphabet(['arithmetic', 'champ'])


def test_read_a_sub_split(data_dir):
  whole = tasks.read('arithmetic', 'test', TOKENIZER, data_dir=data_dir)
  part = tasks.read('arithmetic', 'test[5:9]', TOKENIZER, data_dir=data_dir)
  assert [task.id for task in part] == [task.id for task in whole[5:9]]
  assert [task.index for task in part] == [0, 1, 2, 3]  # rows of what is read, not of the file
  assert len(tasks.read('arithmetic', 'test[:25%]', TOKENIZER, data_dir=data_dir)) == 96


MODULE = """
from kr_jax.datasets import builder

ALPHABET = '0123456789*='
VERIFIER = 'math'


class Builder(builder.TaskBuilder):
  \"\"\"Products.\"\"\"

  name = 'products'

  def splits(self):
    return {'train': [{'id': f'products/{a}', 'prompt': f'{a}*2=', 'answer': str(a * 2)} for a in range(3)]}
"""


def test_a_dataset_of_a_module(tmp_path, monkeypatch, caplog):
  """By its path; edited, it is made anew, and what was made before stays."""
  caplog.set_level('INFO')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my_set.py').write_text(MODULE)
  read = lambda: [task.answer for task in sorted(tasks.read(
      './my_set.py', 'train', Characters(tasks.alphabet(['./my_set.py'])), data_dir=str(tmp_path / 'stored')))]
  assert read() == read() == ['0', '2', '4'] and tasks.verifier('./my_set.py') == 'math'
  (tmp_path / 'my_set.py').write_text(MODULE.replace('str(a * 2)', 'str(a + a + 1)'))
  assert 'made anew' not in caplog.text
  assert read() == read() == ['1', '3', '5']
  assert len([*(tmp_path / 'stored' / 'products').iterdir()]) == 2
  assert caplog.text.count('is made anew, of other files, arguments or code than 1 copies in') == 1
  (tmp_path / 'my_set.py').write_text('Builder = 3')
  with pytest.raises(ValueError, match="tasks.dataset='./my_set.py' has no class Builder that is a kr_jax.dat"):
    read()


def test_edited_code_makes_the_data_anew(tmp_path, monkeypatch):
  """Of shipped datasets too: of generated ones, and of the table's rows."""
  get, mark = inspect.getsource, []
  monkeypatch.setattr(builder_lib.TaskBuilder, 'download_and_prepare', lambda self: None, raising=False)
  monkeypatch.setattr(inspect, 'getsource', lambda x: get(x) + ''.join(mark) * (x.__name__ in edited))
  for dataset, module in (('sums', 'sums'), ('minerva_math', 'sets'), ('minerva_math', 'published'),
                          ('reasoning_gym/count_bits', 'reasoning_gym'), ('sums', 'builder')):
    edited = f'kr_jax.datasets.{module}',
    files = {'minerva_math': str(DIRECTORY / 'minerva_math' / '*')}
    of = lambda: tasks.builder(dataset, str(tmp_path), files=files, reasoning_gym={'train': 1, 'test': 1, 'seed': 0})
    before = of().data_dir
    mark[:] = [f'# {module}']
    after = of().data_dir
    mark.clear()
    assert before != after and of().data_dir == before, module


def test_what_a_published_set_is_read_from(monkeypatch):
  """What a user says; else the hub, where its client is there."""
  assert tasks.files_of('math_500', {'math_500': 'a.jsonl'}) == 'a.jsonl'
  assert tasks.files_of('math_500', {'math_500': ''}) == 'hf:HuggingFaceH4/MATH-500/test.jsonl'
  assert tasks.files_of('gsm8k', {}) == tasks.files_of('sums', {}) == tasks.files_of('file:a.csv', {}) == ''
  monkeypatch.setattr(hub, 'is_installed', lambda: False)
  assert tasks.files_of('math_500', {}) == ''


def test_a_published_set_of_the_hub(tmp_path, monkeypatch):
  rows = (DIRECTORY / 'math_500' / 'test.jsonl').read_bytes()
  read = lambda name: [task.id for task in tasks.read(
      'math_500', 'test', Bytes(), data_dir=str(tmp_path / 'stored'), files={'math_500': name})]
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as served:
    served.push('datasets/HuggingFaceH4/MATH-500', {'test.jsonl': rows, 'README.md': b'#'})
    commit = served.push('datasets/org/mine', {'data/math.jsonl': rows.splitlines()[0]}, branch='v2')
    assert len(read('')) == len(read('hf:HuggingFaceH4/MATH-500')) == 2 and served.fetched() == ['test.jsonl']
    assert read('hf:org/mine/data/*.jsonl@v2') == read(f'hf:org/mine@{commit}') == ['math_500/test/prealgebra/1.json']
    with pytest.raises(ValueError, match="tasks.files.math_500='hf:org/mine': org/mine has no revision 'main'"):
      read('hf:org/mine')


def test_verifiers_of_datasets():
  """Where neither a task nor the config names one."""
  assert {name: tasks.verifier(name) for name in ('sums', 'champ', 'gsm8k', 'file:a.csv', 'reasoning_gym/gcd')} == {
      'sums': 'ends_with', 'champ': 'math', 'gsm8k': 'math', 'file:a.csv': 'math', 'reasoning_gym/gcd': 'ends_with'}


def test_an_unknown_dataset(data_dir):
  for name in ('arithmetics', '__init__', 'published', '', 'reasoning_gym', 'champ/gcd', 'gsm8k/x', 'champ:test'):
    with pytest.raises(ValueError, match=rf"tasks.dataset='{name}' is not one of \['aime_2024', "):
      tasks.read(name, 'train', TOKENIZER, data_dir=data_dir)


def test_splits_that_are_none(data_dir):
  no_split = r"dataset 'arithmetic' has no split 'dev'; it has \['test', 'train', 'warm_start'\]"
  for split, message in (
      ('dev', no_split), ('dev[:5]', no_split), ('test[five]', r'test\[five\]'),
      ('test[:0]', r'arithmetic/test\[:0\] holds no task; name a split with at least one'),
      ('test[7:7]', r'arithmetic/test\[7:7\] holds no task')):
    with pytest.raises(ValueError, match=message):
      tasks.read('arithmetic', split, TOKENIZER, data_dir=data_dir)


def test_a_tokenizer_without_the_characters(data_dir):
  with pytest.raises(ValueError, match=r"'=', which is not in the alphabet '0123456789\+- '"):
    tasks.read('arithmetic', 'test', Characters('0123456789+- '), data_dir=data_dir)


def test_a_prompt_that_is_too_long_is_not_read(data_dir, monkeypatch):
  """Tokenizers take long for it."""
  monkeypatch.setattr(tasks, '_MOST_CHARACTERS', 3)
  with pytest.raises(ValueError, match=r"sums/train: the prompt of 'sums/.*' has \d characters, above the limit of 3"):
    tasks.read('sums', 'train', None, data_dir=data_dir)
