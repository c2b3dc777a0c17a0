"""Sinks: names in groups, what each is told, and that none of them can stop a run."""

import sys
import threading
import time
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from kr_jax import knobs
from kr_jax.record import metrics
from kr_jax.record import sinks


def events(directory):
  """The events of TensorBoard's files: length (8 bytes), its check (4), the event, its check (4)."""
  found = []
  for path in sorted(directory.glob('events.out.tfevents.*')):
    data = path.read_bytes()
    while data:
      n = int.from_bytes(data[:8], 'little')
      found.append(event_pb2.Event.FromString(data[12:12 + n]))
      data = data[16 + n:]
  return found


@pytest.mark.parametrize('name, tag', [
    ('loss', 'train/loss'), ('learning_rate', 'train/learning_rate'), ('reward_mean', 'train/reward_mean'),
    ('budget_min', 'alloc/budget_min'), ('length_mean', 'sample/length_mean'), ('unverified_timeout',
    'verify/unverified_timeout'), ('step_s', 'time/step_s'), ('device_s', 'cost/device_s'), ('time_verify',
    'time/verify'), ('eval/avg@8', 'eval/avg@8'), ('what_is_this', 'other/what_is_this')])
def test_names_have_groups(name, tag):
  assert sinks.tag(name) == tag


@pytest.mark.slow
def test_every_scalar_of_a_run_has_a_group(finished):
  records = metrics.read(f'{finished}/metrics.jsonl')
  tags = {tag for record in records for tag in sinks.scalars(record)}
  groups = {tag.partition('/')[0] for tag in tags}
  assert {tag for tag in tags if tag.startswith('other/')} == set()
  assert groups <= set(sinks.GROUPS) and {'train', 'alloc', 'sample', 'verify', 'eval', 'time'} <= groups


def test_scalars_are_finite_numbers():
  record = {'step': 3, 'loss': 0.5, 'reward_mean': None, 'brier': float('nan'), 'refills': 2, 'alarms': ['x'],
            'verification': {}, 'flag': True, 'grad_norm': float('inf')}
  assert sinks.scalars(record) == {'train/loss': 0.5, 'sample/refills': 2.0}


@pytest.mark.parametrize('x_X, expected', [
    ([2, 2, 4], [1.5, 2.5, 3.5, 4.5]), ([3], [2.5, 3.5]), ([0.5, 0.5], [0.0, 1.0])])
def test_edges_of_a_histogram(x_X, expected):
  np.testing.assert_array_equal(sinks.edges(np.array(x_X, float)), expected)


def test_edges_hold_every_number():
  for x_X in (np.arange(1000.0), np.linspace(-1, 1, 7)):
    counts, edges = np.histogram(x_X, sinks.edges(x_X))
    assert len(counts) == 32 and counts.sum() == len(x_X) and edges[0] == x_X.min()


def test_tensorboard(tmp_path):
  with metrics.Writer(str(tmp_path), keep=lambda record: True, first_step=0) as writer:
    writer.write({'step': 5, 'loss': 1.5, 'success_rate': None},
                 {'budgets': np.array([2, 2, 4]), 'rewards': [np.nan], 'lengths': []})
  summaries = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
  assert summaries.keys() == {'train/loss', 'alloc/budgets'}
  assert summaries['train/loss'][0] == 5 and summaries['train/loss'][1].simple_value == 1.5
  histogram = summaries['alloc/budgets'][1].histo
  assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 2, 4, 8)
  assert [n for n in histogram.bucket if n] == [2, 1]


def test_a_run_that_goes_on_hides_the_events_of_steps_it_repeats(tmp_path):
  sinks.of_run(str(tmp_path), 7, knobs.Record(), {}).close()
  assert [event.step for event in events(tmp_path) if event.session_log.status == 1] == [7]


class Fake:
  """Notes what it is told; fails where it is asked to."""

  def __init__(self, fails=''):
    self.told, self._fails = [], fails

  def _note(self, name, *arguments):
    if name == self._fails:
      raise OSError(28, 'No space left on device')
    self.told.append((name, *arguments))

  def write(self, step, scalar_by_tag, histogram_by_tag):
    self._note('write', step, scalar_by_tag)

  def event(self, name, step, at):
    self._note('event', name, step, at)

  def close(self):
    self._note('close')


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(sinks.logging, 'warning', lambda text, *arguments: said.append(text % arguments))
  return said


@pytest.mark.parametrize('fails', ['begin', 'write', 'event', 'close'])
def test_a_sink_that_fails_is_dropped_with_one_warning(warnings, fails):
  good, bad = Fake(), Fake(fails)

  def begin():
    if fails == 'begin':
      raise SystemExit('no network')
    return bad

  both = sinks.Sinks({'good': lambda: good, 'bad': begin})
  for step in range(3):
    both.event('step', step, 1.0)
    both.write({'step': step, 'loss': 2.0})
  both.close()
  assert good.told == [x for step in range(3) for x in (
      ('event', 'step', step, 1.0), ('write', step, {'train/loss': 2.0}))] + [('close',)]
  assert len(warnings) == 1 and warnings[0].startswith('bad is left out from now on, as it failed: ')
  assert ('No space left' if fails != 'begin' else 'no network') in warnings[0]


def test_a_sink_that_stands_still_is_dropped(warnings, monkeypatch):
  monkeypatch.setattr(sinks, '_MOST_WAITING', 2)
  monkeypatch.setattr(sinks, '_CLOSE_S', 0.1)
  ends = threading.Event()
  stuck = types.SimpleNamespace(write=lambda *_: ends.wait(), close=lambda: None)
  both = sinks.Sinks({'stuck': lambda: stuck})
  started = time.monotonic()
  for step in range(5):
    both.write({'step': step, 'loss': 2.0})
  both.close()
  assert time.monotonic() - started < 2
  assert warnings == ['stuck is left out from now on, as it stands still: 2 calls wait; the run goes on, and '
                      'metrics.jsonl has all figures']
  ends.set()


def test_a_sink_that_does_not_end_is_left_behind(warnings, monkeypatch):
  monkeypatch.setattr(sinks, '_CLOSE_S', 0.05)
  ends = threading.Event()
  both = sinks.Sinks({'slow': lambda: types.SimpleNamespace(close=ends.wait)})
  both.close()
  assert len(warnings) == 1 and 'it has not ended within 0.05' in warnings[0]
  ends.set()


def test_a_sink_whose_package_is_missing_is_an_error_before_the_run(monkeypatch):
  monkeypatch.setattr(sinks.importlib.util, 'find_spec', lambda name: None)
  sinks.check(knobs.Record())
  with pytest.raises(ValueError, match=r"record.wandb=True needs a package: pip install 'kr_jax\[wandb\]'.*; "
                     r"record.goodput=True needs a package"):
    sinks.check(knobs.Record(wandb=True, goodput=True))


def test_the_name_of_a_run_is_kept(tmp_path):
  name = sinks.run_id(str(tmp_path / 'a'))
  assert len(name) == 12 and sinks.run_id(str(tmp_path / 'a')) == name != sinks.run_id(str(tmp_path / 'b'))


class FakeWandb(types.ModuleType):
  """wandb, as far as it is called."""

  def __init__(self, key=True):
    super().__init__('wandb')
    self.key, self.given, self.logged, self.finished = key, None, [], 0
    self.login = lambda prompt: self.key
    self.Settings = lambda **settings: settings
    self.Histogram = lambda np_histogram: np_histogram

  def init(self, **given):
    self.given = given
    return types.SimpleNamespace(define_metric=lambda *_, **__: None, log=self.logged.append, finish=self._finish)

  def _finish(self):
    self.finished += 1


@pytest.mark.parametrize('mode', ['offline', 'online'])
def test_wandb(tmp_path, monkeypatch, mode):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  monkeypatch.setenv('WANDB_MODE', mode)
  for first_step in (0, 1):  # and the run goes on
    with metrics.Writer(str(tmp_path), keep=lambda record: record['step'] < first_step, first_step=first_step,
                        record=knobs.Record(wandb=True), config={'seed': 3}) as writer:
      for step in range(first_step, 2):
        writer.write({'step': step, 'loss': 1.0 + step}, {'budgets': [2, 2]})
  assert [(x['step'], x['train/loss']) for x in fake.logged] == [(0, 1.0), (1, 2.0), (1, 2.0)]
  assert fake.logged[0]['alloc/budgets'][0].tolist() == [2]
  assert fake.finished == 2 and fake.given['id'] == sinks.run_id(str(tmp_path)) and fake.given['config'] == {'seed': 3}
  assert fake.given['resume'] == ('allow' if mode == 'online' else None) and fake.given['dir'] == str(tmp_path)


def test_wandb_without_a_key_asks_nobody(tmp_path, monkeypatch, warnings):
  fake = FakeWandb(key=False)
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  sinks.of_run(str(tmp_path), 0, knobs.Record(wandb=True), {}).close()
  assert fake.given is None and 'run `wandb login`, or set WANDB_MODE=offline' in warnings[0]


def test_goodput(tmp_path, monkeypatch):
  told = []

  class Recorder:
    def __init__(self, job_name, logger_name, logging_enabled):
      told.append((job_name, logger_name, logging_enabled))

    def __getattr__(self, name):
      return lambda *arguments, **named: told.append((name, *arguments, *named.values()))

  goodput = types.SimpleNamespace(GoodputRecorder=Recorder)
  monkeypatch.setitem(sys.modules, 'ml_goodput_measurement', types.SimpleNamespace(goodput=goodput))
  both = sinks.of_run(str(tmp_path / 'run'), 0, knobs.Record(goodput=True), {})
  for name, step in (('start', None), ('ready', None), ('evaluation', 0), ('evaluated', 0), ('step', 0), ('end', 1)):
    both.event(name, step, 0.0)
  both.write({'step': 0, 'loss': 1.0})
  both.close()
  job = f'run-{sinks.run_id(str(tmp_path / "run"))}'
  epoch = '1970-01-01T00:00:00+00:00'
  assert told[0] == (job, f'goodput_{job}', True)
  assert [(name, *(x.isoformat() if hasattr(x, 'isoformat') else x for x in rest)) for name, *rest in told[1:]] == [
      ('record_job_start_time', epoch), ('record_training_preparation_start_time', epoch),
      ('record_training_preparation_end_time', epoch),
      ('record_custom_badput_event_start_time', epoch, 'evaluation'),
      ('record_custom_badput_event_end_time', epoch, 'evaluation'), ('record_step_start_time', 0, epoch),
      ('record_job_end_time', epoch)]
