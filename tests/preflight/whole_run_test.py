"""What a whole run takes, by hand, and how it is said."""

import pytest

from configs import common
from kr_jax import knobs
from kr_jax.costs import hardware
from kr_jax.preflight import whole_run

CHIP = hardware.Profile('x', watts_idle=100.0, watts_max=300.0, power_source='inferred', dollars_per_hour=2.0,
                        price_date='2025-02')
SITE = hardware.Site(pue=1.5, grams_per_kwh=500.0, region='here')


def config(**flat):
  c = common.base()
  c.update_from_flattened_dict({'num_steps': 100, 'evaluate.every': 40, 'evaluate.rollouts': 2, 'tasks.per_step': 8,
                                'alloc.rollouts_per_step': 64, 'evaluate.tasks_per_batch': 100} | flat)
  return knobs.read(c)


@pytest.mark.parametrize('test, most, tasks, assumed', [
    (('math_500', 'aime_2024'), 1000, 530, []), (('math_500', 'aime_2024'), 100, 130, []),
    (('math_500:test[:10%]', 'gsm8k:train[5:9]', 'gsm8k:test[-19:]'), 1000, 50 + 4 + 19, []),
    (('math_500:test[:1000]', 'math_500:test[7:3]'), 1000, 500, []), (('reasoning_gym/chain_sum',), 1000, 512, []),
    (('dapo_math_17k', 'math_500:train'), 1000, 2 * 500, ['dapo_math_17k/test', 'math_500/train']),
    ((), 1000, 384, [])], ids=str)
def test_held_out_tasks(test, most, tasks, assumed):
  assert whole_run.held_out(config(**{'tasks.test': test, 'evaluate.tasks': most})) == (tasks, assumed)


@pytest.mark.parametrize('steps, every, times', [
    (100, 40, 4), (100, 50, 3), (100, 0, 2), (0, 10, 1), (3, 10, 2), (3, 1, 4)])
def test_evaluations_of_a_run(steps, every, times):
  """Before step 0, every so many steps, and after the last."""
  assert whole_run.evaluations(config(**{'num_steps': steps, 'evaluate.every': every})) == times


def cost(c, **more):
  return whole_run.cost(c, **{'step_s': 36.0, 'batch_s': 9.0, 'reshard_s': 1.0, 'compile_s': 35.0, 'chips': 8,
                              'profile': CHIP, 'site': SITE} | more)


def test_a_run_by_hand():
  """100 steps of 36 s, 4 evaluations of 384 tasks in 4 batches of 9 s, and 35 s of compilation: 3783 s of 8 chips."""
  found = cost(config())
  assert (found['training_s'], found['evaluation_s'], found['held_out_tasks']) == (3600, 4 * 37, 384)
  assert found['evaluation_rollouts'] == 4 * 384 * 2 and found['evaluation_share_of_rollouts'] == 3072 / 6400
  assert found['chip_hours'] == pytest.approx(8 * 3783 / 3600) and found['dollars'] == pytest.approx(16 * 3783 / 3600)
  assert found['kwh'] == pytest.approx(8 * 1.5 * (300 * 3748 + 100 * 35) / 3.6e6)
  assert found['kg_co2'] == pytest.approx(found['kwh'] / 2)
  line = whole_run.verdict({'topology': 'v5e:2x4', 'fits': True, 'run': found})
  assert line == ('v5e:2x4: fits; 1.0 h of training + 2.5 min of evaluation + 35 s of compilation, $16.81 (8 chips at '
                  '$2 an hour, 2025-02), 3.76 kWh modelled')
  notes = '\n'.join(whole_run.notes(found))
  assert '100 steps and 4 evaluations of 384 held-out tasks: 3,072 rollouts, 48% of those' in notes
  # The last evaluation takes all tasks once more for each perturbation.
  perturbed = cost(config(**{'evaluate.perturb': ('typos', 'case')}))
  assert perturbed['evaluation_s'] == 6 * 36 + 4 and perturbed['evaluation_rollouts'] == 6 * 384 * 2
  assert 'inferred figures), 1.88 kg CO2e in here' in notes and 'assumed' not in notes


def test_what_is_not_known_is_said():
  found = cost(config(**{'tasks.test': ('dapo_math_17k',), 'num_steps': 0}), profile=hardware.Profile('y'))
  assert found['dollars'] is found['kwh'] is found['kg_co2'] is found['evaluation_share_of_rollouts'] is None
  line = whole_run.verdict({'topology': 'y:1', 'fits': True, 'run': found})
  assert 'money unknown (no price of the chip), energy unknown (no power of the chip)' in line
  assert 'the sizes of dapo_math_17k/test are not known; 500 tasks of each are assumed' in whole_run.notes(found)
  assert whole_run.verdict({'topology': 'y:1', 'fits': True, 'run': None}) == 'y:1: fits'
  phases = {'sample': {'fits': True}, 'update': {'fits': False}}
  assert whole_run.verdict({'topology': 'y:1', 'fits': False, 'phases': phases}) == 'y:1: does NOT fit: update'
