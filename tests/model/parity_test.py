"""Tiny checkpoints of each family: what transformers computes with them in float64, and back again."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from kr_jax import sample
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import export
from kr_jax.model import policy
from kr_jax.model import weights
from tests import knobs

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'families'  # tests/make_families.py
NAMES = sorted(path.name for path in ROOT.iterdir())
CHANGED = [name for name in NAMES if (ROOT / name / 'changes.json').exists()]
# Between them they have each part that only some families have. The others take the same time each.
QUICK = ('gemma3_published', 'mistral_window', 'olmo3_wide_yarn', 'phi3_long', 'qwen2_window', 'qwen3_moe_wide',
         'smollm3_window')
# With them each family is there, and each kind of rope, head and width; the rest is exhaustive.
SLOW = ('gemma3_text_all_full', 'gemma3_kv1', 'llama_kv1', 'llama_linear', 'llama_wide_llama3', 'olmo2_tied',
        'olmo3_yarn_factor', 'phi3_short', 'phi3_window', 'qwen2_yarn', 'qwen3_moe_window', 'qwen3_wide_yarn')
# One of each family: what is saved has the family's names and shapes.
SAVED = ('gemma3_published', 'gemma3_text_wide', 'llama_kv1', 'mistral_wide', 'olmo2_tied', 'olmo3_wide_yarn',
         'phi3_long', 'qwen2_window', 'qwen3_wide_yarn', 'qwen3_moe_wide', 'smollm3_window')
TOLERANCE = 1e-4  # of the standard deviation of logits
logits = jax.jit(policy.logits, static_argnums=0)


def each(names, quick=(), slow=()):
  """A test of each of these checkpoints, exhaustive but for those that are named."""
  mark = lambda name: () if name in quick else pytest.mark.slow if name in slow else pytest.mark.exhaustive
  return pytest.mark.parametrize('name', [pytest.param(name, marks=mark(name)) for name in names])


def expected(name):
  return np.load(ROOT / name / 'expected.npz')


def length_of(want) -> int:
  """Tokens of the longest sequence, by which a checkpoint of Phi-4-mini rotates."""
  return int(want['length_B'].max()) + 64


def assert_close(found_BTV, want_BTV):
  np.testing.assert_allclose(found_BTV, want_BTV, rtol=0, atol=TOLERANCE * want_BTV.std())


def changed(path, name: str, value) -> None:
  """Another value of a field of config.json; 'a.b' is b inside a."""
  of_json = json.loads(path.read_text())
  *outer, last = name.split('.')
  inner = of_json
  for part in outer:
    inner = inner[part]
  inner[last] = value
  path.write_text(json.dumps(of_json))


def test_each_family_is_there():
  families = {json.loads((ROOT / name / 'config.json').read_text())['model_type'] for name in NAMES}
  assert families == {'llama', 'mistral', 'qwen2', 'qwen3', 'qwen3_moe', 'gemma3_text', 'gemma3', 'phi3', 'smollm3',
                      'olmo2', 'olmo3'}


@each(NAMES, QUICK, slow=SLOW)
def test_logits(name):
  want = expected(name)
  config, params = weights.load(ROOT / name, length=length_of(want))
  assert_close(logits(config, params, want['token_BT']), want['logits_BTV'])


@pytest.mark.slow
def test_logits_of_sequences_in_the_original_context():
  want = expected('phi3_long')
  config, params = weights.load(ROOT / 'phi3_long', length=8)
  assert_close(logits(config, params, want['token_BT'][:, :8]), want['short_logits_BTV'])


@each(CHANGED, slow=('qwen3_moe_wide',))
def test_each_field_of_a_config_counts(name, tmp_path):
  """Logits of the first sequence with another value of each field."""
  want = expected(name)
  copy = shutil.copytree(ROOT / name, tmp_path / name)
  length, published = length_of(want), (copy / 'config.json').read_text()
  params, differ = weights.load(copy, length=length)[1], []
  for (field, value), logits_TV in zip(json.loads((copy / 'changes.json').read_text()).items(), want['changed_CTV'],
                                       strict=True):
    (copy / 'config.json').write_text(published)
    changed(copy / 'config.json', field, value)
    found_BTV = logits(weights.config(copy, length=length), params, want['token_BT'][:1])
    error = np.abs(found_BTV[0] - logits_TV).max() / logits_TV.std()
    if error > TOLERANCE:
      differ.append(f'{field}={value}: {error:.1e}')
  assert not differ


@each(NAMES, slow=('gemma3_kv1', 'phi3_long'))
def test_greedy_tokens(name):
  """64 after each of three prompts of different lengths, sampled together."""
  want = expected(name)
  config, params = weights.load(ROOT / name, length=length_of(want))
  length_B, P = want['length_B'], int(want['length_B'].max())
  token_BP = np.where(np.arange(P)[None] < length_B[:, None], want['token_BT'][:, :P], 0)
  rollouts = sample.rollouts(
      config, decode.sampling_params(config, params), types.Prompts(token_BP, length_B, np.arange(3, dtype=np.int32)),
      np.ones(3, int), jax.random.key(0),
      knobs.sampler(slots=3, prompt_length=P, completion_length=64, temperature=0.0, stop_ids=(-1,)), total=3)
  np.testing.assert_array_equal(rollouts.token_RC, want['greedy_B64'])


@each(NAMES, slow=SAVED)
def test_what_is_saved_is_read_bit_for_bit(name, tmp_path):
  length = length_of(expected(name))
  config, params = weights.load(ROOT / name, length=length)
  params = jax.tree.map(lambda x: x * 1.2345678, params)  # as many bits as training leaves
  export.save(tmp_path / 'export', config, params, source=ROOT / name, dtype='float32')
  found, again = weights.load(tmp_path / 'export', length=length)
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
