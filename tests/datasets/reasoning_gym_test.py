"""Tasks of reasoning-gym: splits that share nothing, entries that its own scorer reads."""

import json

import pytest
import reasoning_gym

from kr_jax import rewards
from kr_jax import types
from kr_jax.datasets import reasoning_gym as generated

SIZES = {'train': 60, 'test': 20, 'seed': 3}


@pytest.fixture
def tasks(stored):
  return lambda name, **sizes: stored(f'reasoning_gym/{name}', reasoning_gym=SIZES | sizes)


@pytest.mark.slow
def test_its_tasks(tasks):
  for name in ('chain_sum', 'countdown', 'propositional_logic', 'rearc'):
    found = tasks(name)
    score = reasoning_gym.get_score_answer_fn(name)
    assert 55 <= len(found['train']) <= 60 and len(found['test']) == 20
    for task in (task for rows in found.values() for task in rows.values()):
      info, entry = json.loads(task['info']), generated.restored(task['info'])
      assert info['dataset'] == name and task['verifier'] == 'reasoning_gym'
      assert task['prompt'] == info['entry']['question'] == entry['question']
      assert task['id'].startswith(f'reasoning_gym/{name}/')
      if name != 'propositional_logic':  # it has a scorer but no answers
        assert score(task['answer'], entry) == 1
        one = types.Task(id='', index=0, prompt='', answer='', difficulty=0, solution='', tokens=(),
                         info=task['info'])
        assert rewards.VERIFIERS['reasoning_gym'](task['answer'], one).right is True


def test_splits_share_no_problem_and_more_training_leaves_the_test(tasks, caplog):
  few, many = tasks('coin_flip'), tasks('coin_flip', train=300)
  count = len(many['train'])
  assert (f'reasoning_gym/coin_flip/train has {count} tasks: of 300, {300 - count} repeat others, 0 have'
          in caplog.text)
  assert not few['train'].keys() & few['test'].keys()
  assert few['test'] == many['test'] and few['train'].items() < many['train'].items()
  assert count < 300
  assert len({task['prompt'] for rows in many.values() for task in rows.values()}) == sum(
      map(len, many.values()))


def test_arguments_and_seeds(tasks):
  terms = lambda found: {json.loads(task['info'])['entry']['metadata']['num_terms']
                         for task in found['train'].values()}
  assert terms(tasks('chain_sum(min_terms=2, max_terms=3)')) == {2, 3}
  assert terms(tasks('chain_sum(min_terms=5,max_terms=5)')) == {5}
  assert tasks('chain_sum')['test'] != tasks('chain_sum', seed=4)['test']
  assert list(tasks('chain_sum')['test'].values()) == list(tasks('chain_sum')['test'].values())


def test_names_that_are_none(tasks):
  for name, message in (
      ('sums', r"reasoning-gym has no 'sums', only \['ab', "),
      ('chain_sum(terms=3)', r"chain_sum takes no \['terms'\]; it takes \['min_terms', "),
      ('chain_sum(seed=3)', r"takes no \['seed'\].* tasks.reasoning_gym has sizes and seed"),
      ('chain_sum(min_terms=3, max_terms=2)', 'refuses its arguments: .*max_terms must be >= min_terms'),
      ('chain_sum(3)', r'is neither reasoning_gym/TASK nor reasoning_gym/TASK\(NAME=VALUE'),
      ('chain_sum(min_terms=x)', 'is neither'), ('chain_sum(', 'is neither'), ('3', 'is neither'),
      ('composite', 'refuses its arguments')):
    with pytest.raises(ValueError, match=message):
      tasks(name)


def test_the_alphabet_has_its_problems(tasks):
  found = tasks('chain_sum')['train'].values()
  assert set(''.join(t['prompt'] + t['answer'] for t in found)) <= set(generated.ALPHABET)
  assert len(set(generated.ALPHABET)) == len(generated.ALPHABET) == 96


def test_answers_that_their_scorer_refuses(tasks, monkeypatch):
  monkeypatch.setattr(reasoning_gym, 'get_score_answer_fn', lambda name: lambda answer, entry: 0.5)
  with pytest.raises(ValueError, match='has no task: of 20, 0 repeat others, 20 have an answer that their'):
    tasks('rearc')


def test_tuples_stay_tuples():
  entry = {'question': 'q', 'metadata': {'board': ((1, 2), [3, (4,)]), 'n': 5, 'tuple': [6]}}
  assert generated.tagged(((1,), [2])) == {'tuple': [{'tuple': [1]}, [2]]}
  assert generated.restored(json.dumps({'entry': generated.tagged(entry)})) == entry
