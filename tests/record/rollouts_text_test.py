"""How kept rollouts are shown."""

import os

import numpy as np
import pytest

from kr_jax import rewards
from kr_jax.record import rollouts
from kr_jax.record import rollouts_text
from tests.record.rollouts_test import TEXTS, a_step, sampler, stats_of, write


def test_hostile_text_is_kept_and_does_not_steer_the_terminal(tmp_path):
  hostile = '\x1b[2J\x1b]0;t\x07 a\u202eb\x00\r\ud800\u2028\x9b\tc'
  assert rollouts_text.visible(hostile) == r'\x1b[2J\x1b]0;t\x07 a\u202eb\x00\r\ud800\u2028\x9b    c'
  write(sampler(tmp_path), 0, stats_of([1] * 3, [1] * 3), *a_step([hostile] * 7 + ['']))
  assert {record['completion'] for record in rollouts.read(str(tmp_path))} == {hostile}
  shown = '\n'.join(rollouts_text.show(str(tmp_path), colour=False))
  assert all(x.isprintable() or x == '\n' for x in shown) and r'\x1b[2J' in shown


def test_what_a_person_reads(tmp_path):
  kept = sampler(tmp_path, rollouts=7, answers=lambda texts, tasks: rewards.Answers(('17',) * len(texts), 0, 0))
  texts = ['first\n  and then ' + 'word ' * 20, *TEXTS[1:]]
  write(kept, 2, stats_of([2, 0, 0], [2, 0, 3]), *a_step(texts), np.linspace(-1, 1, 8))
  shown = [*rollouts_text.show(str(tmp_path), task='sums/0', status='right', width=60)]
  assert shown[0] == 'step 2  sums/0' and shown[-1] == '1 rollout'
  assert '  > 0 + 7 =' in shown and '  expected: 17' in shown and '    answer read: 17' in shown
  text = ' '.join(line.strip() for line in shown)
  assert 'budget 3' in text and 'mixed: 1 of 3 verified are right' in text
  assert 'right: reward 1, advantage -1.00; 117 tokens, ended by itself; kept: ' in text
  at = shown.index('      first')
  assert shown[at + 1].startswith('        and then word') and shown[at + 2].startswith('        word')
  assert max(map(len, shown[at:])) <= 60 and 'word' in shown[at + 3]
  painted = '\n'.join(rollouts_text.show(str(tmp_path), colour=True))
  assert '\x1b[32mright\x1b[0m' in painted and '\x1b' not in '\n'.join(rollouts_text.show(str(tmp_path)))


def test_the_newest_rollouts_are_shown_where_there_are_many(tmp_path):
  kept = sampler(tmp_path)
  for step in range(3):
    write(kept, step, stats_of([1] * 3, [1] * 3), *a_step())
  shown = [*rollouts_text.show(str(tmp_path), limit=9)]
  assert [line for line in shown if line.startswith('step')] == ['step 1  sums/0', *(
      f'step 2  sums/{m}' for m in range(3))]
  assert shown[-1] == '9 rollouts; more are kept: choose by --step, --task and --status'


@pytest.mark.parametrize('which, says', [
    (dict(step=5), r'--step=5: .* those of 0 to 2, 7 were'),
    (dict(task='sums/11'), r"--task='sums/11': no rollout .* of 3 tasks .* did you mean 'sums/1'"),
    (dict(status='rigth'), r"'rigth' is not one of mixed, .*timeout.* did you mean 'right'"),
    (dict(status='raised'), 'no rollout that was kept is --status=raised')])
def test_what_is_not_there_is_an_error(tmp_path, which, says):
  kept = sampler(tmp_path)
  for step in (0, 1, 2, 7):
    write(kept, step, stats_of([1] * 3, [1] * 3), *a_step())
  with pytest.raises(ValueError, match=says):
    rollouts_text.show(str(tmp_path), **which)


def test_a_run_without_rollouts_says_so(tmp_path):
  write(sampler(tmp_path, rollouts=0), 0, stats_of([1] * 3, [1] * 3), *a_step())
  assert not os.listdir(tmp_path)
  with pytest.raises(ValueError, match='there are no rollouts in .*record.rollouts=0'):
    rollouts_text.show(str(tmp_path))
