"""Which tasks a step takes, and how they are read."""

import random

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import tasks
from kr_jax import types
from kr_jax.datasets import arithmetic
from kr_jax.tokenizer import Characters

TOKENIZER = Characters(arithmetic.ALPHABET)


def some(count: int, lengths=(3,)) -> list[types.Task]:
  """Tasks of made-up prompts, whose lengths go round."""
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer='7', difficulty=1, solution='',
                     tokens=tuple(range(2, 2 + lengths[i % len(lengths)]))) for i in range(count)]


@st.composite
def sizes(draw):
  I = draw(st.integers(1, 30))
  return I, draw(st.integers(1, I))


@settings(deadline=None, max_examples=50)
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


def test_a_batch_of_the_whole_split_is_the_split():
  assert sorted(tasks.batch(some(7), 3, per_step=7, seed=0)) == sorted(some(7))


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


def test_more_tasks_a_step_than_there_are():
  with pytest.raises(ValueError, match=r'tasks.per_step=6 is more than the 5 tasks of the split'):
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


def test_read_a_sub_split(data_dir):
  whole = tasks.read('arithmetic', 'test', TOKENIZER, data_dir=data_dir)
  part = tasks.read('arithmetic', 'test[5:9]', TOKENIZER, data_dir=data_dir)
  assert [task.id for task in part] == [task.id for task in whole[5:9]]
  assert [task.index for task in part] == [0, 1, 2, 3]  # rows of what is read, not of the file
  assert len(tasks.read('arithmetic', 'test[:25%]', TOKENIZER, data_dir=data_dir)) == 96


def test_an_unknown_dataset(data_dir):
  for name in ('arithmetics', '__init__', ''):
    with pytest.raises(ValueError, match=rf"tasks.dataset='{name}' is not one of \['arithmetic'"):
      tasks.read(name, 'train', TOKENIZER, data_dir=data_dir)


@pytest.mark.parametrize('split', ['dev', 'dev[:5]'])
def test_an_unknown_split(data_dir, split):
  with pytest.raises(ValueError, match=r"dataset 'arithmetic' has no split 'dev'; it has "
                                       r"\['test', 'train', 'warm_start'\]"):
    tasks.read('arithmetic', split, TOKENIZER, data_dir=data_dir)


def test_a_split_that_cannot_be_parsed(data_dir):
  with pytest.raises(ValueError, match=r'test\[five\]'):
    tasks.read('arithmetic', 'test[five]', TOKENIZER, data_dir=data_dir)


@pytest.mark.parametrize('split', ['test[:0]', 'test[7:7]'])
def test_an_empty_sub_split_is_named(data_dir, split):
  with pytest.raises(ValueError) as error:
    tasks.read('arithmetic', split, TOKENIZER, data_dir=data_dir)
  assert f'arithmetic/{split} holds no task' in str(error.value)


def test_a_tokenizer_without_the_characters(data_dir):
  with pytest.raises(ValueError, match=r"'=', which is not in the alphabet '0123456789\+- '"):
    tasks.read('arithmetic', 'test', Characters('0123456789+- '), data_dir=data_dir)
