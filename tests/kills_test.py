"""Kills at seeded moments of a run lose nothing."""

import collections

import pytest

from tests import kills


def test_a_share_of_the_kills_is_in_each_phase_that_needs_one():
  assert sum(kills.SHARES.values()) >= 30
  assert {name: kills.SHARES[name] for name in ('checkpoint', 'verify', 'warm_start', 'evaluate')} == {
      'checkpoint': 8, 'verify': 4, 'warm_start': 4, 'evaluate': 4}


@pytest.mark.exhaustive
@pytest.mark.parametrize('count, number', [(1, 30), (2, 10)])
def test_kills_lose_nothing(tmp_path, data_dir, count, number):
  """Parameters, the optimiser's state, statistics and metrics are bit for bit those of a run that was left alone."""
  phases = collections.Counter()
  for moment, wrong in kills.kills(kills.Runs(tmp_path, count, data_dir), number, seed=0):
    print(moment)
    assert not wrong, (moment, wrong)
    phases[moment.phase] += 1
  assert phases.total() == number
