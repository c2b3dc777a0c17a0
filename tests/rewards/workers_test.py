"""Verdicts from worker processes, whatever the completions do to the verifier."""

import os
import pathlib
import socket
import time

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import errors
from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers
from kr_jax.rewards import workers
from tests import knobs
from tests.rewards import hostile
from tests.rewards import sleepers

LIMIT_S = 1.0
OWN = 'tests.rewards.hostile:reads_info'
RIGHT, WRONG, ABSTAINED, TIMEOUT, RAISED, DIED, INVALID = (
    verdicts.RIGHT, verdicts.WRONG, verdicts.ABSTAINED, verdicts.TIMEOUT, verdicts.RAISED, verdicts.DIED,
    verdicts.INVALID)


def tasks(*answers: str, verifier: str = '', info: str = '') -> list[types.Task]:
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer=answer, difficulty=1, solution='', tokens=(2,),
                     verifier=verifier, info=info) for i, answer in enumerate(answers)]


@pytest.fixture(scope='module')
def pool():
  """Two processes for all tests that do not change the config."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('hostile', 'shaping'):
      patch.setitem(rewards.VERIFIERS, name, getattr(hostile, name))
    patch.setitem(rewards.ANSWERS, 'hostile', hostile.hostile_answer)
    names = ['hostile', 'shaping', 'choice', OWN]
    config = knobs.verifiers('ends_with', workers=2, timeout_s=LIMIT_S, format='^<t>|^(o+)+$', format_weight=0.25,
                             length_buffer=4, max_faulty_steps=10 ** 6)
    with rewards.Workers(config, verifiers=names, completion_length=10) as workers:
      yield workers


def score(pool: rewards.Workers, *completions: str, verifier: str = 'hostile') -> list[int]:
  """Outcomes of completions of tasks whose answer is '7'."""
  scores = pool.score(completions, tasks(*'7' * len(completions), verifier=verifier))
  assert scores.reward_R.dtype == scores.verdict_R.dtype == np.float32
  np.testing.assert_array_equal(scores.reward_R, scores.verdict_R)
  return scores.outcome_R.tolist()


def own(verifier: str) -> str:
  return f'tests.rewards.hostile:{verifier}'


@given(st.lists(st.tuples(st.text('67', max_size=3), st.sampled_from('67')), max_size=40))
def test_verdicts_are_those_of_the_verifier(pool, pairs):
  scores = pool.score([c for c, _ in pairs], tasks(*[a for _, a in pairs], verifier='hostile'))
  assert scores.reward_R.tolist() == scores.verdict_R.tolist() == [c == a for c, a in pairs]
  assert scores.verdict_R.shape == (len(pairs),) and scores.verified_R.all() and not scores.examples


def test_tasks_name_their_verifiers(pool):
  one, two, three = tasks('7', 'B', '7')
  two, three = two._replace(verifier='choice'), three._replace(verifier=OWN, info='8')
  assert pool.score(['17', '(B)', '8'], [one, two, three]).verdict_R.tolist() == [1, 1, 1]
  assert pool.score(['(B)', '17', '7'], [one, two, three]).verdict_R.tolist() == [0, 0, 0]
  assert pool.answers(['17', 'b.'], [one, two]).answer_R == ('7', 'B')
  with pytest.raises(ValueError, match='reads_info.* no extraction of answers; see rewards.ANSWERS'):
    pool.answers(['B', '8'], [two, three])
  with pytest.raises(ValueError, match="'reasoning_gym' of a task is not among the verifiers"):
    pool.score(['7'], [one._replace(verifier='reasoning_gym')])


@pytest.mark.parametrize('pattern', ['', '.+'])
def test_an_answer_of_last_characters_needs_no_process(pattern):
  """Unless a pattern is looked for, which a text can make slow."""
  with rewards.Workers(knobs.verifiers('ends_with', pattern=pattern)) as workers:
    assert workers.answers(['17', ''], tasks('7', '7')) == (('7', None), 0, 0)
    assert (workers._pool.standing is None) == (not pattern)
    with pytest.raises(ValueError, match='not among the verifiers'):
      workers.answers(['7'], tasks('7', verifier='math'))


def test_as_many_completions_as_tasks(pool):
  for completions, answers in ((['7'], []), (['7'], ['7', '7'])):
    with pytest.raises(ValueError):
      pool.score(completions, tasks(*answers))
  assert score(pool, '7') == [RIGHT]  # what was begun then does not come out now


def test_equal_completions_of_a_task_are_verified_once():
  """The reward is the number of verdicts that the process had given."""
  first, second = tasks('1', '2')
  with rewards.Workers(knobs.verifiers(own('process_of'))) as pool:
    scores = pool.score(['b', 'a', 'b', 'c', 'b', 'a'], [first, first, first._replace(), first, second, first])
    assert scores.reward_R.tolist() == [1, 2, 1, 3, 4, 2]


def test_a_verifier_may_set_the_reward_beside_its_verdict(pool):
  scores = pool.score(['7', '8', 'nan', '77', ''], tasks(*'77777', verifier='shaping'))
  assert scores.outcome_R.tolist() == [RIGHT, WRONG, INVALID, RIGHT, WRONG]
  assert scores.reward_R.tolist() == [-0.25, -0.5 / 2, 0, -0.5, 0]
  assert len(scores.examples) == 1 and scores.examples[0].startswith(
      "shaping: invalid (1 of 5): made/2, 'nan' - ValueError: a verifier returned the reward nan")


def test_shaping_changes_rewards_and_no_verdict(pool):
  """C = 10, the last 4 tokens are the buffer."""
  completions, sevens = ['<t>7', '7', '<t>7', '8', 'raise'], tasks('<t>7', '7', '8', '7', '7', verifier='hostile')
  scores = pool.score(completions, sevens, np.array([10, 8, 9, 6, 10]))
  assert scores.verdict_R.tolist() == [1, 1, 0, 0, 0]
  assert scores.reward_R.tolist() == [0.25, 0.5, -0.5, 0, 0]
  assert pool.score(completions, sevens).reward_R.tolist() == [1.25, 1, 0.25, 0, 0]


def test_what_fails_is_unverified_and_its_neighbours_keep_their_verdicts(pool):
  bad = ['raise', 'local', 'exit', 'interrupt', 'two', 'timeout', 'memory', 'recursion', 'silent']
  others = ['wide', 'abstain', 'reason']
  outcomes = [RAISED] * len(bad) + [INVALID, ABSTAINED, ABSTAINED]
  try:
    assert score(pool, '7', *bad, *others, '8', *bad, '7') == [RIGHT, *outcomes, WRONG, *[RAISED] * len(bad), RIGHT]
    assert score(pool, '8', '7') == [WRONG, RIGHT]
  except (SystemExit, KeyboardInterrupt) as error:  # these would end the test run
    pytest.fail(f'{error!r} of the verifier came out of score')


def test_examples_say_what_was_not_verified(pool):
  completions = ['raise ' + 'x' * 300, 'abstain', 'raise', 'reason', '7']
  scores = pool.score(completions, tasks(*'77777', verifier='hostile'))
  assert scores.verified_R.tolist() == [False] * 4 + [True]
  raised, abstained = scores.examples
  assert raised.startswith("hostile: raised (2 of 5): made/0, 'raise xxx") and len(raised) < 600
  assert raised.endswith('xxx') and "xx...' - ZeroDivisionError: raise xx" in raised
  assert abstained == "hostile: abstained (2 of 5): made/1, 'abstain' - the verifier returned None"


def test_what_fails_has_no_answer_and_its_neighbours_keep_theirs(pool):
  found = pool.answers(['8', 'raise', 'none', '9', 'seven', 'raise'], tasks(*'777777', verifier='hostile'))
  assert found.answer_R == ('8', None, None, '9', None, None)
  assert (found.timeouts, found.errors) == (0, 3)
  assert pool.answers([], []) == ((), 0, 0)


@pytest.mark.slow
def test_what_hangs_or_dies_is_unverified_and_its_neighbours_keep_their_verdicts(pool):
  """There are more completions than a process takes at once, so that good ones wait behind bad ones."""
  many, bad = [*map(str, range(100))], ['sleep', 'loop', 'die', 'o' * 50 + '!', 'segfault']
  outcomes = score(pool, *many[:50], *bad, *many[50:])
  assert outcomes[50:55] == [TIMEOUT, TIMEOUT, DIED, TIMEOUT, DIED]
  assert outcomes[:50] + outcomes[55:] == [RIGHT if text == '7' else WRONG for text in many]
  found = pool.answers([*many, 'sleep'], tasks(*['-'] * 101, verifier='hostile'))
  assert found == ((*(x[0] for x in many), None), 1, 0)


def test_a_pattern_without_end_is_named():
  """It runs in a worker alone, and what it is asked of is unverified."""
  config = knobs.verifiers('ends_with', workers=1, timeout_s=0.4, pattern='(a+)+$')
  with rewards.Workers(config) as pool:
    scores = pool.score(['a' * 40 + '!', '7'], tasks(*'77'))
    assert pool.answers(['a' * 40 + '!'], tasks('7')).timeouts == 1
  assert verdicts.OUTCOMES[scores.outcome_R[0]] == 'timeout' and not scores.verified_R[0] and scores.verified_R[1]
  assert scores.examples[0].endswith("none in 0.4 s; rewards.pattern='(a+)+$' may take as long")


def test_the_limit_is_of_one_verdict():
  """All together they take longer than the limit."""
  with rewards.Workers(knobs.verifiers(own('slow'), workers=1, timeout_s=0.4)) as pool:
    scores = pool.score(map(str, range(25)), tasks(*['7'] * 25))
  assert scores.verified_R.all() and scores.verdict_R.sum() == 1


def test_a_completion_whose_process_dies_is_tried_alone_in_a_new_one():
  """'crowded' dies unless it is the first that its process sees."""
  with rewards.Workers(knobs.verifiers(own('process_of'), workers=1)) as pool:
    scores = pool.score([*'abcdef', 'crowded 1', 'crowded 2', *'ghij'], tasks(*['7'] * 12))
    assert scores.verified_R.all()
    assert scores.reward_R[6:8].tolist() == [1, 1]


def test_processes_that_die_between_steps_are_replaced():
  with rewards.Workers(knobs.verifiers(own('hostile'), workers=2)) as pool:
    for _ in range(2):
      assert score(pool, '7', '8', '9', verifier='') == [RIGHT, WRONG, WRONG]
      for process in pool._pool._processes:
        process.errors.shutdown(1)  # its keeper ends it
    pool._pool._server.kill()
    assert score(pool, '8', '7', verifier='') == [WRONG, RIGHT]


def test_completions_are_taken_as_processes_have_room():
  taken = []

  def texts():
    for i in range(20):
      taken.append(time.monotonic())
      yield f'{i}'

  with rewards.Workers(knobs.verifiers(own('slow'), workers=1)) as pool:
    pool.score(['7'], tasks('7'))
    start = time.monotonic()
    assert pool.score(texts(), tasks(*['7'] * 20)).verdict_R.sum() == 1
  assert taken[-1] - start > 0.2  # of four tenths of a second that the verdicts take


@pytest.mark.parametrize('fault, outcome', [('raise', 'raised'), ('abstain', 'abstained'), ('wide', 'invalid')])
def test_a_verifier_without_any_verdict_ends_the_run_after_some_steps(fault, outcome):
  with rewards.Workers(knobs.verifiers(own('hostile'), max_faulty_steps=2), verifiers=['choice']) as pool:
    two = [*tasks('7'), *tasks('B', verifier='choice')]
    assert pool.score([fault, 'B'], two).verified_R.tolist() == [False, True]
    assert pool.score(['7', 'B'], two).verified_R.all()  # which begins the count anew
    assert pool.score([fault, 'B'], two).verified_R.tolist() == [False, True]
    assert pool.score(['B'], two[1:]).verified_R.all()  # which says nothing of it
    with pytest.raises(RuntimeError, match=(
        rf"hostile:hostile gave no verdict on any completion, 2 times in a row \(rewards.max_faulty_steps=2\); the "
        rf"last time on 4: {outcome}: made/0, '{fault} 1'.*; {outcome}: made/1, '{fault} 2'")) as error:
      pool.score([f'{fault} {i}' for i in (1, 2, 3, 4)], tasks(*'7777'))
    assert isinstance(error.value, errors.Told)
    assert f'{fault} 3' in str(error.value) and f'{fault} 4' not in str(error.value)


def test_faulty_steps_of_several_calls():
  with rewards.Workers(knobs.verifiers(own('hostile'), max_faulty_steps=1), calls_a_step=2) as pool:
    assert not pool.score(['raise'], tasks('7')).verified_R.any()
    with pytest.raises(RuntimeError, match=r'no verdict on any completion, 2 times in a row'):
      pool.score(['raise'], tasks('7'))


def test_an_extraction_without_any_answer_ends_the_run_too(monkeypatch):
  monkeypatch.setitem(rewards.ANSWERS, own('hostile'), hostile.hostile_answer)
  with rewards.Workers(knobs.verifiers(own('hostile'), max_faulty_steps=1)) as pool:
    assert pool.answers(['none'], tasks('7')).answer_R == (None,)  # which is no fault
    with pytest.raises(RuntimeError, match='hostile:hostile gave no answer on any completion, 1 times.*TypeError'):
      pool.answers(['seven', 'raise'], tasks(*'77'))


def test_answers_that_are_the_same_are_one(monkeypatch):
  """The same: those with the same first character. The first stands for all, by length and then by text."""
  name = own('slow')
  monkeypatch.setitem(rewards.ANSWERS, name, hostile.whole_answer)
  monkeypatch.setitem(rewards.ANSWERS, own('share'), hostile.whole_answer)
  monkeypatch.setitem(verifiers.SAME, name, hostile.same_digit)
  config = knobs.verifiers(name, workers=2, timeout_s=0.5)
  with rewards.Workers(config, verifiers=[own('share')]) as pool:
    one, two, three, other = (*tasks(*'123'), *tasks('4', verifier=own('share')))
    found = pool.answers(['3bc', '3ab', '4', '3b', '', '3bc', 'xa', 'xb', 'xa', '5a', '5'],
                         [one, one, one, one, one, two, three, three, three, other, other])
  assert found.answer_R == ('3b', '3b', '4', '3b', None, '3bc', 'xa', 'xb', 'xa', '5a', '5')
  assert (found.timeouts, found.errors) == (0, 0)


def test_the_children_of_a_verdict_end_with_it():
  seconds = 10 ** 6 + os.getpid()
  with rewards.Workers(knobs.verifiers(own('leaving'))) as pool:
    for kind in ('child', 'daemon'):
      assert pool.score([kind], tasks('7', info=f'{seconds}')).verified_R.all()
      assert not sleepers.sleepers(seconds)


def test_a_worker_knows_nothing_of_the_run(monkeypatch, tmp_path):
  monkeypatch.setenv('HF_TOKEN', 'secret')
  secret = tmp_path / 'secret'
  secret.write_text('7')
  with rewards.Workers(knobs.verifiers(own('environment')), verifiers=[own('reading')]) as pool:
    (example,) = pool.score(['x'], tasks('7')).examples
    names = set(example.rpartition(' - ')[2].split())
    assert {name for name in names if not name.startswith('LC_')} <= {
        'PATH', 'LANG', 'HOME', 'TMPDIR', 'PYTHONPATH', 'PYTHONHASHSEED', 'LD_LIBRARY_PATH', 'JAX_PLATFORMS',
        'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'KR_JAX_VERIFIER'}
    assert pool.score([str(secret)], tasks('7', verifier=own('reading'))).outcome_R.tolist() == [RAISED]
  with rewards.Workers(knobs.verifiers(own('reading'), readable=(str(tmp_path),))) as pool:
    assert pool.score([str(secret)], tasks('7')).outcome_R.tolist() == [RIGHT]


def test_the_network_is_a_switch():
  with socket.create_server(('127.0.0.1', 0)) as server:
    attempt = f'import socket; socket.create_connection(("127.0.0.1", {server.getsockname()[1]})); right = True'
    for network, outcome in ((False, RAISED), (True, RIGHT)):
      with rewards.Workers(knobs.verifiers(own('executing'), network=network, timeout_s=10.0)) as pool:
        assert pool.score([attempt], tasks('7')).outcome_R.tolist() == [outcome]


def test_close_ends_the_processes():
  with rewards.Workers(knobs.verifiers('ends_with', workers=0)) as pool:
    assert pool._pool._count == min(len(os.sched_getaffinity(0)), workers.MOST_WORKERS)
    score(pool, '17', '8', verifier='ends_with')
    server, folder = pool._pool._server, pathlib.Path(pool._pool._folder)
    assert server.poll() is None and folder.exists()
  assert server.poll() is not None and not folder.exists()


def test_scores_are_rewards_only_where_they_are_asked_for(monkeypatch):
  monkeypatch.setitem(verifiers.PARTIAL_CREDIT, 'ends_with', hostile.share)
  for partial_credit, rewards_R in ((False, [1, 0]), (True, [0, 0.5])):
    with rewards.Workers(knobs.verifiers('ends_with', partial_credit=partial_credit)) as pool:
      scores = pool.score(['7', '44'], tasks(*'77'))
      assert scores.verdict_R.tolist() == [1, 0] and scores.reward_R.tolist() == rewards_R


def test_a_function_of_the_user_is_checked_at_the_start(monkeypatch):
  with pytest.raises(ValueError, match='missing.* cannot be imported: AttributeError'):
    rewards.Workers(knobs.verifiers('ends_with'), verifiers=['tests.rewards.hostile:missing'])
  with pytest.raises(ValueError, match='length_buffer=11 is not in 0..sample.completion_length=10'):
    rewards.Workers(knobs.verifiers('ends_with', length_buffer=11), completion_length=10)
  monkeypatch.setitem(rewards.VERIFIERS, 'mine', lambda completion, task: True)
  with pytest.raises(ValueError, match="verifier mine cannot be sent to worker processes.*put it in a module"):
    rewards.Workers(knobs.verifiers('mine'))
  in_main = type(own)(hostile.shaping.__code__, {}, 'shaping')
  in_main.__module__ = '__main__'
  with pytest.raises(ValueError, match='verifier __main__:shaping .* defined in __main__; put it in a module'):
    rewards.Workers(knobs.verifiers('ends_with'), verifiers=[in_main])


@pytest.mark.slow
def test_a_function_of_a_file(tmp_path, monkeypatch):
  """It is found from where the run starts, read once, and behind the walls it reads nothing that lies beside it."""
  path = tmp_path / 'my-verifiers.v2.py'
  path.write_text('import os\n\n\ndef near(completion, task):\n  return abs(int(completion) - int(task.answer)) < 2\n\n\n'
                  'def snoops(completion, task):\n  return open(os.path.join(os.path.dirname(__file__), completion))\n')
  (tmp_path / 'secret').touch()
  monkeypatch.chdir(tmp_path)
  near, snoops = './my-verifiers.v2.py:near', f'{path}:snoops'
  with rewards.Workers(knobs.verifiers(near, timeout_s=20), verifiers=[snoops]) as pool:
    assert pool.score('69', tasks('7', '7')).outcome_R.tolist() == [RIGHT, WRONG]
    path.write_text('def near(completion, task):\n  return True\n')
    monkeypatch.chdir('/')
    assert pool.score('5', tasks('7')).outcome_R.tolist() == [WRONG]
    scores = pool.score(['secret'], tasks('7', verifier=snoops))
    if 'files' in pool._pool.standing:
      assert scores.outcome_R.tolist() == [RAISED] and 'PermissionError' in scores.examples[0]
      assert scores.examples[0].startswith(snoops)
  for name, said in ((f'{path}:far', 'has no attribute'), (f'{tmp_path}/none.py:near', 'cannot be read: No such file')):
    with pytest.raises(ValueError, match=said):
      rewards.Workers(knobs.verifiers(name))


def test_two_thousand_trivial_verdicts_take_little():
  """Processor time of this process: a twentieth of a millisecond each, where a tenth is promised; at the best, as a
  busy machine makes it longer."""
  seconds = []
  with rewards.Workers(knobs.verifiers('ends_with', workers=2)) as pool:
    pool.score(['7'], tasks('7'))
    for _ in range(5):
      start = time.process_time()
      scores = pool.score(map(str, range(2048)), tasks('7') * 2048)
      seconds.append(time.process_time() - start)
      assert scores.verdict_R.sum() == 205
  assert min(seconds) < 0.2


def test_overlong_by_hand():
  """C = 100, buffer 20."""
  np.testing.assert_allclose(
      workers.overlong(np.array([0, 79, 80, 81, 90, 99, 100]), 100, 20),
      [0, 0, 0, -0.05, -0.5, -0.95, -1], rtol=1e-6)
  assert workers.overlong(np.array([1, 100]), 100, 0).tolist() == [0, 0]
  assert workers.overlong(np.array([], int), 100, 20).shape == (0,)
