"""What comes up from a worker is checked, whoever wrote it."""

import json
import os
import sys

from hypothesis import given
from hypothesis import strategies as st
import pytest

from kr_jax import types
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers
from kr_jax.rewards import worker
from tests import knobs
from tests.rewards import hostile

VERIFY = worker.Request(3, 'ab', worker.VERIFY, 'ends_with', 'x', 0)
ANSWER = VERIFY._replace(kind=worker.ANSWER)
JOIN = VERIFY._replace(kind=worker.JOIN, texts=('1', '2', '1.0'))
TASK = types.Task(id='made/0', index=0, prompt='', answer='7', difficulty=1, solution='', tokens=(2,))


@pytest.mark.parametrize('request_, reply', [
    (VERIFY, worker.Reply(verdicts.RIGHT, 0.5)), (VERIFY, worker.Reply(verdicts.RAISED, 0.0, 'why "\n\u2028 \ud800')),
    (VERIFY, worker.Reply(verdicts.ABSTAINED, -1.0)), (ANSWER, worker.Reply(verdicts.NONE, value='é\ud800\n')),
    (ANSWER, worker.Reply(verdicts.NONE)), (ANSWER, worker.Reply(verdicts.INVALID, note='x')),
    (ANSWER, worker.Reply(verdicts.NONE, value='\U0001f600' * worker.MAX_ANSWER)),
    (JOIN, worker.Reply(verdicts.NONE, value=[0, 1, 0])), (JOIN, worker.Reply(verdicts.RAISED))])
def test_a_reply_comes_as_it_was_sent(request_, reply):
  line = worker.line(request_, reply)
  assert line.count(b'\n') == 1 and line.endswith(b'\n') and len(line) <= worker.MAX_LINE
  assert worker.read_reply(line[:-1], request_) == reply


@pytest.mark.parametrize('request_, reply', [
    (VERIFY, reply) for reply in (
        [3, 'ac', 1, 1.0, '', None], [2, 'ab', 1, 1.0, '', None], [3, 'ab', 1, 1.0, ''], {'outcome': 1}, 1,
        [3, 'ab', 0, 1.0, '', None], [3, 'ab', 9, 1.0, '', None], [3, 'ab', -1, 1.0, '', None],
        [3, 'ab', True, 1.0, '', None], [3, 'ab', 1.0, 1.0, '', None], [3, 'ab', 1, 1e300, '', None],
        [3, 'ab', 1, '1', '', None], [3, 'ab', 1, True, '', None], [3, 'ab', 1, 10 ** 400, '', None],
        [3, 'ab', 1, 1.0, 'x' * 301, None], [3, 'ab', 1, 1.0, None, None], [3, 'ab', 1, 1.0, '', 'x'])] + [
    (ANSWER, reply) for reply in (
        [3, 'ab', 1, 1.0, '', 'x'], [3, 'ab', 0, 0.0, '', 7], [3, 'ab', 0, 0.0, '', ['x']],
        [3, 'ab', 0, 0.0, '', 'x' * (worker.MAX_ANSWER + 1)])] + [
    (JOIN, [3, 'ab', 0, 0.0, '', value]) for value in (
        None, [0, 1], [0, 2, 2], [0, 0, 1], [0, 1, -1], [0, 1, 0.0], [0, 1, False])])
def test_what_is_no_reply(request_, reply):
  with pytest.raises(ValueError):
    worker.read_reply(json.dumps(reply).encode(), request_)


@pytest.mark.parametrize('text', [
    b'', b'[', b'\xff', b'[3, "ab", 1, NaN, "", null]', b'[3, "ab", 1, Infinity, "", null]'])
def test_what_is_no_json(text):
  with pytest.raises(ValueError):
    worker.read_reply(text, VERIFY)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=2), inner)))
def test_no_text_without_the_nonce_is_a_reply(made):
  with pytest.raises(ValueError):
    worker.read_reply(json.dumps(made).encode(), VERIFY)


@pytest.mark.parametrize('completion, outcome, note', [
    ('7', verdicts.RIGHT, ''), ('8', verdicts.WRONG, ''), ('raise it', verdicts.RAISED, 'ZeroDivisionError: raise it'),
    ('exit', verdicts.RAISED, 'SystemExit: 3'), ('recursion', verdicts.RAISED, 'RecursionError: maximum recursion '),
    ('silent', verdicts.RAISED, 'tests.rewards.hostile.Silent: <exception str() failed>'),
    ('wide', verdicts.INVALID, "TypeError: a verifier returned {'score': 0.0} (dict); it must"),
    ('abstain', verdicts.ABSTAINED, 'the verifier returned None'), ('reason', verdicts.ABSTAINED, 'not mine')])
def test_what_a_verifier_does_has_an_outcome(completion, outcome, note):
  function = lambda text, task: verifiers.verify(hostile.hostile, knobs.verifiers('ends_with'), text, task)
  reply = worker._reply(function, VERIFY._replace(completion=completion), TASK)
  assert reply.outcome == outcome and reply.note[:len(note) or 1] == note
  assert worker.read_reply(worker.line(VERIFY, reply)[:-1], VERIFY) == reply


def test_a_verifier_whose_own_code_raises_a_type_error_raised():
  """It is no sign of what it returned."""
  function = lambda text, task: verifiers.verify(lambda *_: len(None), knobs.verifiers('ends_with'), text, task)
  assert worker._reply(function, VERIFY, TASK).outcome == verdicts.RAISED


def test_answers():
  function = lambda text, task: verifiers.answer(hostile.whole_answer, knobs.verifiers('ends_with'), text, task)
  of = lambda text: worker._reply(function, ANSWER._replace(completion=text), TASK)
  assert of('x') == (verdicts.NONE, 0.0, '', 'x') and of('') == (verdicts.NONE, 0.0, '', None)
  assert of('x' * 100_001) == (verdicts.INVALID, 0.0, 'an answer of 100001 characters; at most 100000', None)
  assert worker._join(hostile.same_digit, ('1', '2', '12', '21', '3', '1')) == [0, 1, 0, 1, 4, 0]


def test_the_environment_is_what_python_needs(monkeypatch, tmp_path):
  for name, text in (('AWS_SECRET_ACCESS_KEY', 'x'), ('LC_ALL', 'C.UTF-8'), ('HOME', '/home/x'), ('PATH', '/bin')):
    monkeypatch.setenv(name, text)
  monkeypatch.setattr(sys, 'path', ['', '/a', '/a', 'b'])
  found = worker.environment(str(tmp_path))
  assert 'AWS_SECRET_ACCESS_KEY' not in found and found['LC_ALL'] == 'C.UTF-8' and found['PATH'] == '/bin'
  assert found['HOME'] == found['TMPDIR'] == str(tmp_path)
  assert found['PYTHONPATH'] == os.pathsep.join([os.getcwd(), '/a', os.path.join(os.getcwd(), 'b')])
