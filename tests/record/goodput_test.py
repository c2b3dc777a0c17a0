"""Goodput of a made-up run, worked out by hand."""

import pytest

from kr_jax.record import goodput
from kr_jax.record import ledger


def entry(attempt, step, phase, wall_s, busy_s=0.0, **more):
  return {'attempt': attempt, 'step': step, 'phase': phase, 'wall_s': wall_s, 'busy_s': busy_s, **more}


# Killed in step 3, whose last checkpoint is of step 2; then stopped in order, and gone on with.
RUN = ledger.Ledger(
    attempts=[{'attempt': 0, 'first_step': 0, 'started': 1000.0}, {'attempt': 1, 'first_step': 2, 'started': 1200.0},
              {'attempt': 2, 'first_step': 4, 'started': 5000.0}],
    entries=[
        entry(0, 0, 'start', 5.0), entry(0, 0, 'data', 2.0), entry(0, 0, 'compile', 20.0),
        entry(0, 0, 'evaluate', 8.0, 7.0), entry(0, 1, 'sample', 10.0, 10.0), entry(0, 1, 'verify', 1.0),
        entry(0, 1, 'update', 6.0, 6.0), entry(0, 1, 'checkpoint', 0.5),
        entry(0, 2, 'evaluate', 8.0, 7.0),  # before step 2: kept
        entry(0, 2, 'sample', 9.0, 9.0), entry(0, 2, 'compile', 0.5), entry(0, 3, 'sample', 3.0, 3.0, cut=True),
        entry(1, 2, 'start', 4.0), entry(1, 2, 'data', 1.0), entry(1, 2, 'restore', 3.0), entry(1, 2, 'compile', 19.0),
        entry(1, 2, 'sample', 9.0, 9.0), entry(1, 3, 'sample', 9.5, 9.5), entry(1, 3, 'record', 0.5, 0.25),
        entry(2, 4, 'start', 4.0), entry(2, 4, 'reshard', 1.0, 1.0), entry(2, 4, 'wait', 0.125),
        entry(2, 5, 'other', 0.25), entry(2, 5, 'report', 1.0)],
    ends=[], problems=[])


def test_goodput():
  found = goodput.goodput(RUN)
  badput = {'init': 5.0, 'data': 2.0, 'compile': 39.0, 'checkpoint_save': 0.5, 'checkpoint_restore': 3.0,
            'verification': 1.0, 'evaluation': 16.0, 'wasted_progress': 12.5, 'recovery': 9.0, 'record': 1.5,
            'wait': 0.125, 'other': 0.25}
  assert found['badput'] == badput and tuple(found['badput']) == goodput.KINDS
  assert found['productive_s'] == 10 + 6 + 9 + 9.5 + 1
  assert found['wall_s'] == sum(e['wall_s'] for e in RUN.entries) == found['productive_s'] + sum(badput.values())
  assert found['goodput'] == found['productive_s'] / found['wall_s']
  assert found['attempts'] == 3
  # 73 seconds of attempt 0, 46 of attempt 1.
  assert found['between_attempts_s'] == (200 - 73) + (3800 - 46)
  busy = 7 + 10 + 6 + 7 + 9 + 3 + 9 + 9.5 + 0.25 + 1
  of_steps = 8 + 10 + 1 + 6 + .5 + 8 + 9 + 3 + 9 + 9.5 + .5 + 1 + .125 + .25 + 1
  assert found['device_wait_share'] == pytest.approx(1 - busy / of_steps)


def test_what_is_kept_of_the_step_that_an_attempt_ends_before():
  """The evaluation before step 2 is stopped twice and then whole; the page of the last attempt but one stays."""
  attempts = [{'attempt': n, 'first_step': 2, 'started': 100.0 * n} for n in range(4)]
  entries = [entry(0, 2, 'evaluate', 1.0), entry(1, 2, 'evaluate', 2.0, cut=True), entry(2, 2, 'evaluate', 4.0),
             entry(2, 2, 'report', 8.0), entry(2, 2, 'sample', 16.0), entry(3, 2, 'sample', 32.0)]
  found = goodput.goodput(ledger.Ledger(attempts, entries, [], []))
  assert found['badput'] == dict.fromkeys(goodput.KINDS, 0.0) | {
      'wasted_progress': 1.0 + 2 + 16, 'evaluation': 4.0, 'record': 8.0}


def test_a_step_that_a_stop_left_is_wasted_but_for_what_it_saved():
  attempts = [{'attempt': n, 'first_step': step, 'started': 100.0 * n} for n, step in enumerate((0, 2, 2))]
  entries = [entry(0, 2, 'sample', 1.0), entry(0, 2, 'checkpoint', 2.0), entry(1, 2, 'sample', 4.0),
             entry(1, 2, 'checkpoint', 8.0, cut=True), entry(2, 2, 'sample', 16.0), entry(2, 2, 'checkpoint', 32.0)]
  found = goodput.goodput(ledger.Ledger(attempts, entries, [], []))
  assert found['productive_s'] == 16 and found['badput'] == dict.fromkeys(goodput.KINDS, 0.0) | {
      'wasted_progress': 1.0 + 4 + 8, 'checkpoint_save': 2.0 + 32}


def test_nothing():
  found = goodput.goodput(ledger.Ledger([], [], [], []))
  assert found['wall_s'] == 0 and found['goodput'] is None and found['device_wait_share'] is None


def test_every_phase_has_a_place():
  from kr_jax import phases
  assert set(goodput.PRODUCTIVE) | set(goodput._BADPUT) == set(phases.PHASES)
