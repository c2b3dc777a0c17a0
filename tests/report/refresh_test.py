"""A page that is written while its run goes on, and never in its way."""

import logging
import time

import pytest

from kr_jax.report import page
from kr_jax.report import refresh


@pytest.fixture
def now(monkeypatch):
  moment = [0.0]
  monkeypatch.setattr(time, 'monotonic', lambda: moment[0])

  def move(seconds):
    moment[0] += seconds

  return move


def test_pages_take_a_small_share_of_the_time(monkeypatch, now):
  written = []

  def write(workdirs, *, pictures):
    written.append((workdirs, pictures))
    now(2)

  monkeypatch.setattr(page, 'write', write)
  refresher = refresh.Refresher('runs/one')
  now(50)
  refresher.refresh()
  assert written == [(['runs/one'], False)]
  now(40)
  refresher.refresh()  # 2 of 92 seconds are more than 2 %
  assert len(written) == 1
  now(10)
  refresher.refresh()
  assert len(written) == 2
  refresher.refresh(last=True)
  assert written[2:] == [(['runs/one'], True)]
  refresh.Refresher('runs/one', is_on=False).refresh(last=True)
  assert len(written) == 3


def test_a_page_that_fails_is_said_once(monkeypatch, caplog):
  def write(_, *, pictures):
    del pictures
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(page, 'write', write)
  refresher = refresh.Refresher('runs/one')
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      refresher.refresh(last=True)
  assert caplog.text.count('the report is not written: OSError: [Errno 28] No space left on device') == 1
