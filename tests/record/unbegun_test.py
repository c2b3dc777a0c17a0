"""Whether a workdir is free again after a start that failed."""

import json

import pytest

from kr_jax.record import claim
from kr_jax.record import unbegun

CONFIG = {'seed': 1, 'rewards': {'verifier': 'mine:wrong'}, 'checkpoint': {'directory': ''}}
OTHER = CONFIG | {'rewards': {'verifier': 'mine:right'}}


@pytest.fixture
def workdir(tmp_path):
  workdir = tmp_path / 'run'
  claim.claim(str(workdir), CONFIG)
  for name in ('tasks.jsonl.zst', 'task_digests.npz', 'ledger.jsonl'):
    (workdir / name).write_text('x')
  (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 0, 'eval/avg@2': 0.5}) + '\n')
  return workdir


def test_a_run_without_a_step_is_forgotten(workdir):
  assert unbegun.forget(str(workdir), CONFIG) == []  # the same config goes on
  with pytest.raises(ValueError, match='holds a run of another config'):
    claim.claim(str(workdir), OTHER)
  assert unbegun.forget(str(workdir), OTHER) == ["rewards.verifier was 'mine:wrong', is 'mine:right'"]
  assert sorted(path.name for path in workdir.iterdir()) == ['ledger.jsonl']  # what it cost was paid
  claim.claim(str(workdir), OTHER)
  assert unbegun.forget(str(workdir.parent), OTHER) == []  # there is no record


@pytest.mark.parametrize('name, content', [
    ('metrics.jsonl', '{"step": 0, "reward_mean": 0.5}\n'), ('metrics.jsonl', '{"step": 0, "rew'),
    ('metrics.jsonl', 'what is this\n'), ('checkpoints/4/state', 'x'), ('warm_start/checkpoints/20/state', 'x')])
def test_a_run_that_has_begun_is_kept(workdir, name, content):
  (workdir / name).parent.mkdir(parents=True, exist_ok=True)
  (workdir / name).write_text(content)
  assert unbegun.forget(str(workdir), OTHER) == [] and (workdir / 'config.json').exists()


@pytest.mark.parametrize('has_checkpoint', [False, True])
def test_checkpoints_elsewhere(tmp_path, has_checkpoint):
  workdir, elsewhere = str(tmp_path / 'run'), tmp_path / 'elsewhere'
  config = CONFIG | {'checkpoint': {'directory': str(elsewhere)}}
  claim.claim(workdir, config, directory=str(elsewhere / 'checkpoints'))
  if has_checkpoint:
    (elsewhere / 'checkpoints' / '3').mkdir(parents=True)
    (elsewhere / 'checkpoints' / '3' / 'state').touch()
  assert (elsewhere / 'config.json').exists()
  assert bool(unbegun.forget(workdir, OTHER | {'checkpoint': {'directory': str(elsewhere)}})) != has_checkpoint
  assert (elsewhere / 'config.json').exists() == has_checkpoint
