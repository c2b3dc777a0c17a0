"""The table of what may change, and the same in the docs."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from kr_jax import knobs
from kr_jax.learning import update
from kr_jax.record import claim
from kr_jax.record import resume

ROOT = pathlib.Path(__file__).parents[2]
NAMES = set(claim.flat(knobs.as_dict(knobs.Config())))


def is_known(name: str) -> bool:
  return any(f'{knob}.'.startswith(f'{name}.') for knob in NAMES)


def test_every_row_is_a_knob_or_a_section():
  for name in (*resume.FREE, *resume.WARNED, *resume.OF_TRAINING, *resume.OF_EVALUATION):
    assert is_known(name), name
  assert not {*resume.FREE} & {*resume.WARNED} and not any(map(is_known, resume.FACTS))


def test_knobs_of_the_policy_and_its_data_are_in_no_row():
  free = lambda name: any(f'{name}.'.startswith(f'{row}.') for row in (*resume.FREE, *resume.WARNED))
  for name in ('seed', 'policy.norm_eps', 'policy.dtype', 'policy.lora_alpha', 'tasks.dataset', 'tasks.test_split',
               'sample.completion_length', 'sample.cache', 'rewards.verifier', 'rewards.pattern', 'grpo.advantage',
               'alloc.rule', 'checkpoint.directory', 'evaluate.temperature'):
    assert name in NAMES and not free(name), name


def test_the_docs_have_the_same_table():
  text = (ROOT / 'kr_jax' / 'record' / 'README.md').read_text()
  section = text.partition('## What may change when a run goes on')[2].partition('\n## ')[0]
  free, warned = (part.partition('|---|---|\n')[2] for part in section.split('\n\n| knob |')[1:3])
  for rows, table in ((free, resume.FREE), (warned, resume.WARNED)):
    found = {}
    for names, why in re.findall(r'^\| (.*?) \| (.*) \|$', rows.partition('\n\n')[0], re.M):
      found |= dict.fromkeys(re.findall('`(.*?)`', names), why)
    assert found == dict(table)


@pytest.mark.parametrize('name', [name for name in resume.WARNED if name.startswith('optimizer.')])
def test_the_state_of_the_optimizer_is_of_one_form_whatever_changes(name):
  """Else a checkpoint could not be restored."""
  others = {'schedule': 'cosine', 'decay_steps': 9, 'warmup_steps': 3, 'weight_decay': .1}
  field = name.partition('.')[2]
  config = dict(decay_steps=50)
  params = {'w': jnp.ones((2, 2)), 'norm': jnp.ones(2)}
  form = lambda c: jax.eval_shape(lambda: update.init(params, jax.random.key(0), c))
  base = update.Config(**config)
  now = getattr(base, field)
  other = dataclasses.replace(base, **{field: others.get(field, .5)})
  assert getattr(other, field) != now
  assert jax.tree.structure(form(other)) == jax.tree.structure(form(base))
