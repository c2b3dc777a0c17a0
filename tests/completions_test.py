"""Rollouts that are joined, cut and kept by hand; tests/sample_test.py has those of a sampler."""

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import completions
from kr_jax import sharding
from kr_jax import types
from kr_jax.model.tokenizer import STOP
from tests import knobs

CONFIG = knobs.sampler(prompt_length=5, completion_length=6)
PROMPTS = types.Prompts(
    token_MP=np.array([[2, 3, 0, 0, 0], [4, 5, 6, 2, 3], [6, 6, 6, 0, 0]], np.int32),
    length_M=np.array([2, 5, 3], np.int32), index_M=np.array([10, 4, 7], np.int32))


def test_a_completion_is_cut_after_a_stop_string():
  """Of 'abcab': with 'ca' after 4 tokens, with 'b' after 2; of the second nothing, of the third all."""
  token_RC = np.array([[2, 3, 4, 2, 3, 0], [2, 2, STOP, 0, 0, 0], [0] * 6], np.int32)
  length_R = np.array([5, 3, 0], np.int32)
  rollouts = types.Rollouts(
      PROMPTS, np.array([0, 1, 3]), token_RC, np.where(token_RC > 0, -1.0, 0), length_R,
      np.array([types.ENDED_LENGTH, types.ENDED_STOP, types.NOT_SAMPLED]), 5)
  text = lambda token_C: ''.join('##abc'[t] for t in token_C)
  for stops, n, ended in ((('ca', 'x'), 4, types.ENDED_STOP), (('ca', 'b'), 2, types.ENDED_STOP),
                          (('abcab',), 5, types.ENDED_STOP), (('x',), 5, types.ENDED_LENGTH)):
    got = completions.apply_stop_strings(rollouts, text, CONFIG.replace(stop_strings=stops))
    assert got.length_R.tolist() == [n, 3, 0] and got.ended_R.tolist() == [ended, *rollouts.ended_R[1:]]
    np.testing.assert_array_equal(got.token_RC[0], [*token_RC[0, :n], *[0] * (6 - n)])
    np.testing.assert_array_equal(got.logp_RC[0], [-1] * n + [0] * (6 - n))
    np.testing.assert_array_equal(got.token_RC[1:], token_RC[1:])
  assert completions.apply_stop_strings(rollouts, text, CONFIG) is rollouts


# Four rollouts of two tasks, the third not sampled, and a row beyond them.
SAMPLED = types.Rollouts(
    PROMPTS, np.array([0, 0, 1, 1, 3], np.int32), np.array([[2, 3], [4, 0], [5, 6], [6, 0], [0, 0]], np.int32),
    np.full((5, 2), -1.0, np.float32), np.array([2, 1, 2, 1, 0], np.int32),
    np.array([types.ENDED_STOP, types.ENDED_LENGTH, types.ENDED_STOP, types.ENDED_STOP, types.NOT_SAMPLED], np.int32),
    5)


def test_texts_are_decoded_two_at_a_time_when_they_are_taken(monkeypatch):
  decoded = []
  monkeypatch.setattr(completions, '_AT_A_TIME', 2)

  def decode(token_C):
    decoded.append(token_C.tolist())
    return str(sum(token_C))

  row_X, texts = completions.texts(SAMPLED, decode)
  assert row_X.tolist() == [0, 1, 2, 3] and decoded == []
  assert next(texts) == '5' and decoded == [[2, 3], [4]]
  assert list(texts) == ['4', '11', '6'] and len(decoded) == 4


def test_what_is_not_kept_is_no_rollout_by_hand():
  got = completions.keep(SAMPLED, np.array([False, True, True, False, False]))
  assert got.task_R.tolist() == [3, 0, 1, 3, 3] and got.length_R.tolist() == [0, 1, 2, 0, 0]
  assert got.ended_R.tolist() == [0, types.ENDED_LENGTH, types.ENDED_STOP, 0, 0]
  for name in ('prompts', 'token_RC', 'logp_RC', 'decode_steps'):
    assert getattr(got, name) is getattr(SAMPLED, name)
  everything = completions.keep(SAMPLED, np.array([True] * 4 + [False]))
  jax.tree.map(np.testing.assert_array_equal, everything, SAMPLED)
  assert all(x.dtype == np.int32 for x in (got.task_R, got.length_R, got.ended_R))


# Tasks 1, 0 and nothing; tasks 0, 2 and nothing: of wave 0, and of wave 1.
OF_WAVES = [types.Rollouts(
    PROMPTS, np.array(task_R, np.int32), np.full((len(task_R), 2), 10 * w, np.int32) + np.arange(len(task_R))[:, None],
    np.zeros((len(task_R), 2), np.float32), np.array([2] * (len(task_R) - 1) + [0], np.int32),
    np.array([types.ENDED_STOP] * (len(task_R) - 1) + [0], np.int32), np.int32(4 + w), np.int32(1), np.int32(2 + w))
            for w, task_R in enumerate(([0, 0, 1, 3], [0, 2, 3]))]


def test_what_stop_strings_leave_is_whole_on_every_device():
  """All but the tokens, which stay divided: each process reads the lengths of all rollouts."""
  text = lambda token_C: ''.join('#' if t == 10 else '.' for t in token_C)
  config, joined = CONFIG.replace(stop_strings=('#',)), completions.join(OF_WAVES)
  rows = jax.tree.map(lambda x: jnp.concatenate([x, x[-1:]]), {  # as many as the shards
      name: getattr(joined, name) for name in ('task_R', 'token_RC', 'logp_RC', 'length_R', 'ended_R')})
  want = completions.apply_stop_strings(joined._replace(**rows), text, config)
  with jax.set_mesh(sharding.mesh(fsdp=8)):
    rows = jax.jit(lambda rows: rows | sharding.constrain_rows({
        name: rows[name] for name in ('token_RC', 'logp_RC')}))(rows)
    got = completions.apply_stop_strings(joined._replace(**rows), text, config)
  assert got.length_R.is_fully_replicated and got.ended_R.is_fully_replicated
  assert len({str(s.index) for s in got.token_RC.addressable_shards}) == 8
  assert got.length_R.tolist() == want.length_R.tolist() and got.ended_R.tolist() == want.ended_R.tolist()
  np.testing.assert_array_equal(got.token_RC, want.token_RC)


def test_waves_are_joined_by_hand():
  got = completions.join(OF_WAVES)
  assert got.task_R.tolist() == [0, 0, 0, 1, 2, 3, 3] and got.wave_R.tolist() == [0, 0, 1, 0, 1, 0, 1]
  assert got.token_RC[:, 0].tolist() == [0, 1, 10, 2, 11, 3, 12]
  assert got.length_R.tolist() == [2] * 5 + [0] * 2 and got.ended_R.tolist() == [types.ENDED_STOP] * 5 + [0] * 2
  assert (int(got.decode_steps), int(got.tail_steps), int(got.refills)) == (9, 2, 5)
  rows = completions.join_rows([[5, 6, 7, 0], [8, 9, 0]], [x.task_R for x in OF_WAVES])
  assert rows.tolist() == [5, 6, 8, 7, 9, 0, 0]
  assert completions.join(OF_WAVES[:1]) is OF_WAVES[0]


def test_rows_that_waves_round_up_are_left_out():
  got = completions.join(OF_WAVES, 5)
  assert got.task_R.tolist() == [0, 0, 0, 1, 2] and got.token_RC.shape == got.logp_RC.shape == (5, 2)
  assert completions.join_rows([[5, 6, 7, 0], [8, 9, 0]], [x.task_R for x in OF_WAVES], 5).tolist() == [5, 6, 8, 7, 9]


def test_what_is_kept_of_joined_waves_stays_of_its_wave():
  """Also by stop strings; and what is kept before is joined as what is kept after."""
  joined = completions.join(OF_WAVES)
  got = completions.keep(joined, np.array([True, False, True, True, True, True, True]))
  assert got.wave_R.tolist() == joined.wave_R.tolist() and got.task_R.tolist() == [0, 3, 0, 1, 2, 3, 3]
  text = lambda token_C: ''.join('#' if t == 10 else '.' for t in token_C)
  cut = completions.apply_stop_strings(joined, text, CONFIG.replace(stop_strings=('#',)))
  assert cut.length_R.tolist() == [2, 2, 1, 2, 2, 0, 0] and cut.wave_R.tolist() == joined.wave_R.tolist()
  before = completions.join([completions.keep(OF_WAVES[0], np.array([True, False, True, True])), OF_WAVES[1]])
  assert before.token_RC[:, 0].tolist() == [0, 10, 2, 11, 1, 3, 12] and before.task_R.tolist() == [0, 0, 1, 2, 3, 3, 3]
