"""Which rollouts are kept, in how many bytes, and how they are shown."""

import collections
import json
import os

import numpy as np
import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import rollouts
from kr_jax.record import rollouts_text
from kr_jax.rewards import verdicts
from tests import knobs

STOP, LENGTH = types.ENDED_STOP, types.ENDED_LENGTH
NUMBER = {name: i for i, name in enumerate(verdicts.OUTCOMES)}
TEXTS = ('17', '7', '9 so', 'x', '5', '6', '7', '')
# Three tasks with 3, 3 and 1 rollouts, and a place without one.
TASK_R = np.array([0, 0, 0, 1, 1, 1, 2, 3])
OUTCOME_R = np.array([NUMBER[x] for x in ('right', 'wrong', 'no_answer', 'timeout', 'wrong', 'wrong', 'right', 'none')],
                     np.int8)
ENDED_R = np.array([STOP, STOP, STOP, LENGTH, STOP, LENGTH, STOP, types.NOT_SAMPLED])
BUDGET_M = np.array([3, 3, 1])
TASKS = [types.Task(id=f'sums/{m}', index=m, prompt=f'{m} + 7 = ', answer='17', difficulty=2, solution='', tokens=(),
                    source='sums') for m in range(3)]


def decode(token_C):
  return ''.join(map(chr, token_C))


def a_step(texts=TEXTS):
  """The arguments of Sampler.step after its stats."""
  token_RC = np.zeros((8, max(map(len, texts))), np.int32)
  for token_C, text in zip(token_RC, texts):
    token_C[:len(text)] = [ord(x) for x in text]
  sampled = types.Rollouts(
      types.Prompts(None, None, np.arange(3)), TASK_R, token_RC, None, np.array([*map(len, texts)]), ENDED_R, 8)
  return TASKS, BUDGET_M, sampled, rewards.Scores(OUTCOME_R, np.float32(OUTCOME_R == verdicts.RIGHT))


def stats_of(right_I, wrong_I):
  return estimate.init(3)._replace(successes_I=np.array(right_I, float), failures_I=np.array(wrong_I, float),
                                   rollouts_I=np.add(right_I, wrong_I))


def sampler(workdir, **knobs):
  return rollouts.Sampler(str(workdir), decode, verifier='ends_with', **knobs)


def write(kept, *step):
  kept.step(*step)
  kept.flush()


def choose(most, row_X=np.arange(7), seed=0, new_M=(False, False, True)):
  return rollouts.choose(OUTCOME_R, np.isin(OUTCOME_R, verdicts.VERIFIED), ENDED_R, TASK_R, BUDGET_M,
                         np.array(new_M), most=most, row_X=row_X, rng=np.random.default_rng(seed))


def test_who_is_chosen_by_hand():
  """Of the first turn: the new success, the fault, the mixed pair of task 0, and one that was cut."""
  assert {why for reasons in choose(5).values() for why in reasons} >= {'new_success', 'fault', 'mixed', 'truncated'}
  for seed in range(8):
    kept = choose(7, seed=seed)
    assert sorted(kept) == [*range(7)]
    of = {why: {r for r in kept if why in kept[r]} for why in rollouts.WHY}
    assert of['new_success'] == {6} and of['fault'] == {3} and of['truncated'] and of['truncated'] <= {3, 5}
    assert 0 in of['mixed'] and len(of['mixed']) == 2 and of['mixed'] < {0, 1, 2}
    assert TASK_R[min(of['largest_budget'])] < 2  # not the task with one rollout alone
  assert len({tuple(choose(4, seed=seed)) for seed in range(8)}) > 1
  assert choose(0) == {} and choose(5, row_X=np.zeros(0, int)) == {} and len(choose(1)) == 1


def test_no_more_than_asked_for_and_every_reason_where_there_is_room():
  rng = np.random.default_rng(0)
  task_R, outcome_R = np.arange(64).repeat(8), rng.choice(len(verdicts.OUTCOMES) - 1, 512).astype(np.int8) + 1
  for most in (1, 2, 7, 8, 32, 600):
    kept = rollouts.choose(outcome_R, np.isin(outcome_R, verdicts.VERIFIED), rng.choice([STOP, LENGTH], 512), task_R,
                           np.full(64, 8), rng.random(64) < .5, most=most, row_X=np.arange(512), rng=rng)
    assert len(kept) == min(most, 512)
    if most >= 7:
      assert {why for reasons in kept.values() for why in reasons} == set(rollouts.WHY)
    pairs = collections.Counter(task_R[r] for r in kept if 'mixed' in kept[r])
    assert set(pairs.values()) <= {2}


def test_a_record_by_hand(tmp_path):
  stats = stats_of([2, 0, 0], [2, 0, 3])
  kept = sampler(tmp_path, answers=lambda texts, tasks: rewards.Answers(tuple(x[-2:] for x in texts), 0, 0),
                 stop_strings=('so',))
  write(kept, 12, stats, *a_step(), np.float32([1.5, np.nan, -1, 0, 0, 0, 0, 0]))
  assert os.listdir(tmp_path / 'rollouts') == ['000012.jsonl.zst'] and rollouts.steps(str(tmp_path)) == [12]
  found = [*rollouts.read(str(tmp_path))]
  assert [record['completion'] for record in found] == [*TEXTS[:7]]
  first, belief = found[0], estimate.posterior(stats, np.arange(3))
  assert 'mixed' in first['why'] and found[6]['why'][0] == 'new_success' and 'fault' in found[3]['why']
  before = first['estimate']
  assert before['mean'] == pytest.approx(belief.mean_M[0], abs=1e-4) and 0 < before['low'] < before['mean'] < before[
      'high'] < 1
  assert {name: x for name, x in first.items() if name not in ('why', 'estimate')} == {
      'step': 12, 'task': 'sums/0', 'source': 'sums', 'verifier': 'ends_with', 'difficulty': 2, 'prompt': '0 + 7 = ',
      'completion': '17', 'answer': '17', 'extracted': '17', 'verdict': 'right', 'reward': 1.0, 'advantage': 1.5,
      'budget': 3, 'right_in_group': 1, 'verified_in_group': 3, 'status': 'mixed', 'ended': 'stop', 'length': 2}
  assert [record['status'] for record in found] == 3 * ['mixed'] + 3 * ['all_wrong'] + ['all_right']
  assert [record['ended'] for record in found] == ['stop', 'stop', 'stop_string', 'length', 'stop', 'length', 'stop']
  assert [found[r]['advantage'] for r in (1, 2, 3)] == [None, -1, None]  # not finite; without a verdict
  assert ['new_success' in record['why'] for record in found] == 6 * [False] + [True]


@pytest.mark.parametrize('right, wrong, new', [(0, 3, True), (0, 0, False), (1, 3, False)])
def test_a_success_is_new_only_after_failures(tmp_path, right, wrong, new):
  write(sampler(tmp_path), 0, stats_of([1, 1, right], [0, 0, wrong]), *a_step())
  assert [record['task'] for record in rollouts.read(str(tmp_path), status='new_success')] == new * ['sums/2']


def test_the_sample_hangs_on_seed_and_step_alone(tmp_path):
  for name, seed in (('a', 0), ('b', 0), ('c', 1)):
    kept = sampler(tmp_path / name, rollouts=3, seed=seed)
    for step in range(6) if name != 'b' else (5, 3, 4, 0, 1, 2):
      write(kept, step, stats_of([1, 1, 1], [1, 1, 1]), *a_step())
  a, b, c = ([*rollouts.read(str(tmp_path / name))] for name in 'abc')
  assert a == b != c and len(a) == 18
  assert len({json.dumps([record['completion'] for record in a if record['step'] == step]) for step in range(6)}) > 1


def test_what_is_read_is_chosen_by_step_task_and_status(tmp_path):
  kept = sampler(tmp_path)
  for step in (3, 4):
    write(kept, step, stats_of([1, 1, 1], [1, 1, 1]), *a_step())
  read = lambda **which: [(x['step'], x['completion']) for x in rollouts.read(str(tmp_path), **which)]
  assert read(step=3, task='sums/2') == [(3, '7')] and read(task='sums/9') == read(step=5) == []
  assert read(status='timeout') == read(status='fault') == [(3, 'x'), (4, 'x')]
  assert [x for _, x in read(step=4, status='all_wrong')] == ['x', '5', '6']


def test_the_oldest_steps_are_thinned_by_hand():
  kept, dropped = [*range(9)], []
  for _ in range(5):
    dropped.append(rollouts.to_drop(kept))
    kept.remove(dropped[-1])
  assert dropped == [1, 3, 2, 5, 4] and kept == [0, 6, 7, 8]
  assert rollouts.to_drop([7]) == 7


def test_all_steps_stay_below_the_bound(tmp_path):
  size = len(rollouts.packed([{'step': 100, 'task': 'x' * 2000}]))
  kept = sampler(tmp_path, megabytes=20.5 * size / 2 ** 20)
  for step in range(200):
    if step == 120:  # as a run that is resumed, with a file that a kill left
      (tmp_path / 'rollouts' / '000120.jsonl.zst.tmp').write_bytes(b'half')
      kept = sampler(tmp_path, megabytes=20.5 * size / 2 ** 20)
    kept._write(step, [{'step': step, 'task': 'x' * 2000}])
  steps = rollouts.steps(str(tmp_path))
  held = sum(entry.stat().st_size for entry in os.scandir(tmp_path / 'rollouts'))
  assert len(os.listdir(tmp_path / 'rollouts')) == len(steps) and 19 * size < held <= 20.5 * size
  assert steps[0] == 0 and steps[-10:] == [*range(190, 200)] and all(step % 8 == 0 for step in steps[:-12])


def test_long_texts_lose_their_middle(tmp_path):
  assert rollouts.cut('abcdef', 6) == 'abcdef'
  assert rollouts.cut('abcdefg', 4) == 'ab\n[... 3 characters are left out ...]\nfg'
  texts = ['y' * 50_000] * 7 + ['']
  write(sampler(tmp_path), 0, stats_of([1] * 3, [1] * 3), *a_step(texts))
  assert {len(record['completion']) for record in rollouts.read(str(tmp_path))} == {8041}


@pytest.mark.parametrize('broken', [
    lambda data: data[:len(data) // 2], lambda data: b'no zstd', lambda data: b'',
    lambda data: rollouts.packed(['text']), lambda data: rollouts.packed([{'step': 4, 'task': 'of another step'}])])
def test_a_broken_file_is_said_and_left_out(tmp_path, broken):
  kept = sampler(tmp_path)
  for step in range(2):
    write(kept, step, stats_of([1] * 3, [1] * 3), *a_step())
  path = tmp_path / 'rollouts' / '000000.jsonl.zst'
  path.write_bytes(broken(path.read_bytes()))
  problems = []
  assert {record['step'] for record in rollouts.read(str(tmp_path), problems=problems)} == {1}
  assert len(problems) == 1 and '000000.jsonl.zst cannot be read' in problems[0]
  assert next(iter(rollouts_text.show(str(tmp_path)))) == problems[0]


def test_a_full_disk_warns_once_and_leaves_nothing(tmp_path, monkeypatch, caplog):
  kept = sampler(tmp_path)
  write(kept, 0, stats_of([1] * 3, [1] * 3), *a_step())

  def full(source, target):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patched:
    patched.setattr(os, 'replace', full)
    for step in (1, 2):
      write(kept, step, stats_of([1] * 3, [1] * 3), *a_step())
  write(kept, 3, stats_of([1] * 3, [1] * 3), *a_step())
  assert [x.getMessage() for x in caplog.records] == [
      'rollouts of this step, and maybe of later ones, are not kept: [Errno 28] No space left on device']
  assert sorted(os.listdir(tmp_path / 'rollouts')) == ['000000.jsonl.zst', '000003.jsonl.zst']
  blocked = tmp_path / 'file'
  blocked.write_text('')
  write(sampler(blocked), 0, stats_of([1] * 3, [1] * 3), *a_step())  # no folder can be made there


@pytest.mark.parametrize('answers', [
    lambda texts, tasks: rewards.Answers((None,) * len(texts), 1, 0),
    lambda texts, tasks: (_ for _ in ()).throw(RuntimeError('no process can be started'))])
def test_extraction_that_fails_is_given_up(tmp_path, caplog, answers):
  calls = []
  kept = sampler(tmp_path, answers=lambda *arguments: calls.append(1) or answers(*arguments))
  for step in range(3):
    write(kept, step, stats_of([1] * 3, [1] * 3), *a_step())
  assert len(calls) == 1 and len(caplog.records) == 1 and 'not extracted any more' in caplog.text
  assert {record['extracted'] for record in rollouts.read(str(tmp_path))} == {None}


def test_verifiers_without_an_extraction_are_not_asked(tmp_path):
  kept = rollouts.Sampler(str(tmp_path), decode, verifier='python_tests', answers=lambda *_: pytest.fail('asked'))
  write(kept, 0, stats_of([1] * 3, [1] * 3), *a_step())
  with rewards.Workers(knobs.verifiers('ends_with')) as pool:
    write(sampler(tmp_path, answers=pool.answers), 1, stats_of([1] * 3, [1] * 3), *a_step())
  found = [record['extracted'] for record in rollouts.read(str(tmp_path), step=1)]
  assert found == ['17', '7', 'so', 'x', '5', '6', '7']


def test_short_steps_are_written_together_and_long_ones_at_once(tmp_path, monkeypatch):
  kept, now = sampler(tmp_path), 100.0
  monkeypatch.setattr('time.monotonic', lambda: now)
  for step in range(9):
    kept.step(step, stats_of([1] * 3, [1] * 3), *a_step())
    assert rollouts.steps(tmp_path) == [*range(8)] * (step >= 7)
  now += 10  # the ninth has waited
  kept.step(9, stats_of([1] * 3, [1] * 3), *a_step())
  assert rollouts.steps(tmp_path) == [*range(10)]
  kept.step(10, stats_of([1] * 3, [1] * 3), *a_step())
  kept.flush()
  assert rollouts.steps(tmp_path) == [*range(11)]
