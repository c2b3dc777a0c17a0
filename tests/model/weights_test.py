"""Reading published checkpoints: what transformers computes with them, in whatever form their tensors lie."""

import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from tests import hub as hub_lib
from tests import knobs
from tests import make_sparse_checkpoint
from tests.benchmarks import load as load_benchmark

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'  # tests/make_checkpoints.py
FAMILIES = ('gemma3', 'llama', 'llama3', 'qwen2', 'qwen3')
LENGTHS = np.array((3, 14, 25), np.int32)  # of the prompts of greedy_B64
logits = jax.jit(policy.logits, static_argnums=0)
families = pytest.mark.parametrize('name', FAMILIES)


def expected(name):
  return np.load(ROOT / name / 'expected.npz')


def assert_same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


@families
def test_logits(name):
  """Of the directory and of the GGUF file, which is another checkpoint where its matrices are quantised."""
  of_file = np.load(ROOT / f'{name}.npz')
  for source, want in ((ROOT / name, expected(name)), (ROOT / f'{name}.gguf', of_file)):
    config, params = weights.load(source)
    rows = len(want['token_BT'])
    found = logits(config, params, np.resize(want['token_BT'], (3, want['token_BT'].shape[1])))
    np.testing.assert_allclose(found[:rows], want['logits_BTV'], atol=1e-4)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if name == 'gemma3' else pytest.mark.exhaustive) for name in FAMILIES])
def test_greedy_tokens(name):
  """64 after each of three prompts of different lengths, sampled together."""
  config, params = weights.load(ROOT / name)
  want, P = expected(name), int(LENGTHS.max())
  prompts = types.Prompts(np.where(np.arange(P)[None] < LENGTHS[:, None], want['token_BT'], 0), LENGTHS,
                          np.arange(3, dtype=np.int32))
  rollouts = sample.rollouts(
      config, decode.sampling_params(config, params), prompts, np.ones(3, int), jax.random.key(0),
      knobs.sampler(slots=3, prompt_length=P, completion_length=64, temperature=0.0, stop_ids=(-1,)),
      total=3)
  np.testing.assert_array_equal(rollouts.token_RC, want['greedy_B64'])


def test_a_checkpoint_of_the_hub(tmp_path, monkeypatch):
  """Its config is read without a file of safetensors; each file is then fetched once, and none that is not read."""
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as hub:
    hub.push('org/model', {p.name: p.read_bytes() for p in (ROOT / 'llama3').iterdir()} | {'other.safetensors': b'x'})
    fetched = lambda: [name for name in hub.fetched() if name.endswith('.safetensors')]
    config = weights.config('hf:org/model')
    weights.check('hf:org/model', config)
    assert config == weights.config(ROOT / 'llama3') and not fetched()
    assert_same(weights.params('hf:org/model', config), weights.load(ROOT / 'llama3')[1])
    assert sorted(fetched()) == [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]


def test_what_a_process_reads():
  """Of layers and experts those of its devices: files that hold no tensor of them are not fetched."""
  made = policy.Config(vocab_size=8, num_layers=3, width=4, num_heads=2, num_kv_heads=1, head_width=4, hidden_width=8,
                       num_experts=4, experts_per_token=2)
  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: policy.init(made, jax.random.key(0))))
  named = type('Named', (dict,), {'__missing__': lambda self, name: weights._Source(name, ())})()
  path, leaf = next((path, leaf) for path, leaf in leaves if len(leaf.shape) == 4)
  rest = (slice(None),) * 2
  of = lambda *indices: weights._read_of(named, made, [(path, leaf, indices)])
  found = of((slice(1, 2), slice(2, 4), *rest))
  assert {re.sub(r'(gate|up|down)_proj', 'x', name) for name in found} == {
      f'model.layers.1.mlp.experts.{e}.x.weight' for e in (2, 3)}
  assert len(of((slice(None), slice(None), *rest))) == 12 and of() == set()


def test_parameters_come_to_their_shards():
  """Of a file's bytes each device's part alone, and once for all that have the same part."""
  config, params = weights.load(ROOT / 'qwen2')
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  read, tensor = [], pretrained.Directory.tensor

  def counted(self, name, index):
    x = tensor(self, name, index)
    read.append((name, x.size))
    return x

  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
    patch.setattr(pretrained.Directory, 'tensor', counted)
    found = weights.params(ROOT / 'qwen2', config)
  assert_same(found, params)
  jax.tree.map(lambda x, want: x.sharding.is_equivalent_to(want, x.ndim) or pytest.fail(str(x.sharding)),
               found, sharding.of(mesh, params))
  of_q = [size for name, size in read if name == 'model.layers.0.self_attn.q_proj.weight']
  assert of_q == [32 * 32 // 4] * 4


@pytest.mark.parametrize('block', [1, 40, 100])
def test_blocks(block, monkeypatch):
  """Tensors are read in blocks of whole rows or heads, as many as there are."""
  for name in ('qwen2', 'llama.gguf'):
    config, params = weights.load(ROOT / name)
    with monkeypatch.context() as patch:
      patch.setattr(weights, '_BLOCK', block)
      assert_same(weights.params(ROOT / name, config), params)


# Forms in which the same tensors lie.


def tensors_of(name) -> dict[str, np.ndarray]:
  return {tensor: x for file in sorted((ROOT / name).glob('*.safetensors'))
          for tensor, x in safetensors.numpy.load_file(file).items()}


def written(directory, like, tensors, **fields) -> pathlib.Path:
  """A checkpoint of these tensors, with the config of another one but for some fields."""
  directory.mkdir(parents=True, exist_ok=True)
  config = json.loads((ROOT / like / 'config.json').read_text()) | fields
  (directory / 'config.json').write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
  return directory


def test_an_output_matrix_beside_tied_embeddings(tmp_path, capfd, monkeypatch):
  """Is kept where it differs, be it in one number, and is none where it is a copy."""
  monkeypatch.setattr(weights, '_BLOCK', 1000)
  tensors = tensors_of('qwen3')
  embedding = tensors['model.embed_tokens.weight']
  config, params = weights.load(ROOT / 'qwen3')
  assert config.tie_embeddings
  copy = written(tmp_path / 'copy', 'qwen3', tensors | {'lm_head.weight': embedding.astype(np.float32)})
  assert weights.load(copy)[0] == config
  assert 'lm_head' not in capfd.readouterr().err
  for name, at in (('all', np.s_[:]), ('one', np.s_[-1, -1])):
    output = embedding.copy()
    output[at] = -output[at] - 1
    other = written(tmp_path / name, 'qwen3', tensors | {'lm_head.weight': output})
    found, untied = weights.load(other)
    assert found == config.replace(tie_embeddings=False)
    assert 'lm_head.weight is kept' in capfd.readouterr().err
    np.testing.assert_array_equal(untied['output_DV'], output.astype(np.float32).T)
    np.testing.assert_array_equal(untied['embed_VD'], params['embed_VD'])
  # transformers ties in both directions.
  del tensors['model.embed_tokens.weight']
  alone = written(tmp_path / 'alone', 'qwen3', tensors | {'lm_head.weight': embedding})
  assert_same(weights.load(alone)[1], params)


def test_a_config_without_tensors(tmp_path):
  shutil.copy(ROOT / 'qwen3' / 'config.json', tmp_path)
  assert weights.config(tmp_path) == weights.config(ROOT / 'qwen3')
  with pytest.raises(ValueError, match=r"lacks \['model.safetensors'\]"):
    weights.load(tmp_path)


@pytest.mark.parametrize('old, new', [
    ('model.', 'language_model.model.'), ('model.', 'model.language_model.'), ('model.', '')])
def test_names_of_a_text_tower(old, new, tmp_path, capfd):
  """In both spellings, beside other towers; and of a model that was saved without its output matrix."""
  tensors = {new + name.removeprefix(old): x for name, x in tensors_of('gemma3').items()}
  fields = {}
  if new:
    vision = 'model.' * new.startswith('model.')
    tensors |= {f'{vision}vision_tower.layers.{i}.weight': np.zeros(3, np.float32) for i in range(4)}
    tensors[f'{vision}multi_modal_projector.weight'] = np.zeros((3, 3), np.float32)
    fields = {'model_type': 'gemma3', 'text_config': json.loads((ROOT / 'gemma3' / 'config.json').read_text())}
  config, params = weights.load(written(tmp_path, 'gemma3', tensors, **fields))
  want_config, want = weights.load(ROOT / 'gemma3')
  assert config == want_config
  assert_same(params, want)
  if new:
    said = f'{vision}multi_modal_projector.weight, {vision}vision_tower.* (4 tensors) left out'
    assert said in capfd.readouterr().err


def test_two_tensors_of_one_name(tmp_path):
  tensors = tensors_of('gemma3')
  path = written(tmp_path, 'gemma3', tensors | {'norm.weight': tensors['model.norm.weight']})
  with pytest.raises(ValueError, match='model.norm.weight and norm.weight both are model.norm.weight; save it again'):
    weights.check(path, weights.config(path))


def test_fused_matrices(tmp_path):
  """Phi-3's, on a mesh that divides each part."""
  tensors = tensors_of('llama')
  for i in range(2):
    layer = f'model.layers.{i}.'
    for fused, parts in (('self_attn.qkv_proj', ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')),
                         ('mlp.gate_up_proj', ('mlp.gate_proj', 'mlp.up_proj'))):
      tensors[f'{layer}{fused}.weight'] = np.concatenate([tensors.pop(f'{layer}{part}.weight') for part in parts])
  path = written(tmp_path, 'llama', tensors, model_type='phi3', rope_parameters=None, rope_theta=1e4)
  config, want = weights.load(ROOT / 'llama')
  found, params = weights.load(path)
  assert found.family == 'phi3' and found.tie_embeddings == config.tie_embeddings
  assert_same(params, want)
  with jax.set_mesh(sharding.mesh(fsdp=4, model=2)):
    assert_same(weights.params(path, found), want)


def test_experts(tmp_path):
  """Each in tensors of its own or all in two, on one device and on a mesh that divides them."""
  rng, E, F, D, L = np.random.default_rng(0), 4, 6, 32, 2
  tensors = tensors_of('qwen3')
  alone, stacked = dict(tensors), dict(tensors)
  want = {name: np.zeros(shape, np.float32) for name, shape in (
      ('gate_EDF', (L, E, D, F)), ('up_EDF', (L, E, D, F)), ('down_EFD', (L, E, F, D)))}
  for i in range(L):
    layer = f'model.layers.{i}.mlp.'
    of_all = {}
    for name, part in (('gate_proj', 'gate_EDF'), ('up_proj', 'up_EDF'), ('down_proj', 'down_EFD')):
      x = rng.normal(size=(E, *want[part].shape[:1:-1])).astype(np.float32)
      want[part][i], of_all[name] = x.swapaxes(1, 2), x
      alone |= {f'{layer}experts.{e}.{name}.weight': x[e].copy() for e in range(E)}
      del alone[f'{layer}{name}.weight'], stacked[f'{layer}{name}.weight']
    stacked |= {f'{layer}experts.gate_up_proj': np.concatenate([of_all['gate_proj'], of_all['up_proj']], axis=1),
                f'{layer}experts.down_proj': of_all['down_proj']}
    alone[f'{layer}gate.weight'] = stacked[f'{layer}gate.weight'] = rng.normal(size=(E, D)).astype(np.float32)
  fields = dict(model_type='qwen3_moe', num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F)
  for form, tensors in (('alone', alone), ('stacked', stacked)):
    path = written(tmp_path / form, 'qwen3', tensors, **fields)
    config, params = weights.load(path)
    layers = params['layers']
    assert_same({name: layers[name] for name in want}, want)
    np.testing.assert_array_equal(layers['router_DE'][1], alone['model.layers.1.mlp.gate.weight'].T)
    with jax.set_mesh(sharding.mesh(expert=4, fsdp=2)):
      assert_same(weights.params(path, config), params)


def test_dtypes_that_are_read(tmp_path):
  tensors = {name: x.astype(np.float32).astype(np.float16) for name, x in tensors_of('llama').items()}
  want = weights.load(written(tmp_path / 'float16', 'llama', tensors))[1]
  for dtype in (np.float32, np.float64):
    path = written(tmp_path / dtype.__name__, 'llama', {name: x.astype(dtype) for name, x in tensors.items()})
    assert_same(weights.load(path)[1], want)


# What does not fit.


def raw(path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
  """Writes a file of safetensors whose dtypes are said, not looked at."""
  header, end = {}, 0
  for name, (dtype, x) in tensors.items():
    header[name] = {'dtype': dtype, 'shape': x.shape, 'data_offsets': (end, end := end + x.nbytes)}
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + b''.join(x.tobytes() for _, x in tensors.values()))


def test_dtypes_that_are_not_read_are_named_once(tmp_path):
  """Of weights quantised without a word in the config."""
  path, tensors = written(tmp_path, 'llama', {}), tensors_of('llama')
  stored = {name: ('BF16', x) for name, x in tensors.items()}
  stored |= {name: (('F8_E5M2', x.astype(ml_dtypes.float8_e5m2)) if 'down_proj' in name else
                    ('F8_E4M3', x.astype(ml_dtypes.float8_e4m3fn)))
             for name, x in tensors.items() if '_proj' in name}
  stored['model.norm.weight'] = 'I8', np.zeros(32, np.int8)
  raw(path / 'model.safetensors', stored)
  with pytest.raises(ValueError) as error:
    weights.load(path)
  said = str(error.value).split('asks for: ')[1].split('; ')
  assert len(said) == 6  # three dtypes, each with what to do about it
  assert 'model.layers.0.mlp.gate_proj.weight and 11 others of dtype F8_E4M3 cannot be read, only BF16, F16' in str(
      error.value)
  assert 'model.norm.weight of dtype I8 cannot be read' in str(error.value)
  assert 'take the checkpoint that is not quantised' in str(error.value)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
  tensors = tensors_of('llama')
  del tensors['model.norm.weight']
  for i in range(2):
    del tensors[f'model.layers.{i}.mlp.down_proj.weight']
    name = f'model.layers.{i}.mlp.up_proj.weight'
    tensors[name] = tensors[name][:, :-1].copy()
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(32, np.float32)
  tensors |= {f'model.visual.blocks.{i}.weight': np.zeros(2, np.float32) for i in range(30)}
  tensors |= {f'{name}.weight': np.zeros(2, np.float32) for name in ('_orig_mod.norm', '_orig_mod.head', 'score')}
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']  # tied: a copy
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(4, np.float32)
  with pytest.raises(ValueError) as error:
    weights.load(written(tmp_path, 'llama', tensors))
  assert str(error.value).endswith(
      'does not hold the tensors that its config asks for: '
      'model.layers.*.mlp.down_proj.weight (2 tensors) is missing; model.norm.weight is missing; '
      '_orig_mod.* (2 tensors) is unknown; model.layers.0.self_attn.q_proj.bias [32] is unknown; '
      'model.visual.* (30 tensors) is unknown; score.weight [2] is unknown; '
      'model.layers.*.mlp.up_proj.weight has the shape [64, 31], not [64, 32] (2 tensors). '
      'Take the checkpoint that save_pretrained of the whole model writes')


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'data': 2, 'model': 4}])
def test_a_host_holds_little_more_than_its_shards(axes, tmp_path):
  """All shards are this process's here; tests/benchmarks/load.py measures one of several processes."""
  make_sparse_checkpoint.write(tmp_path, 0.1)
  found = load_benchmark.measure(tmp_path, sharding.mesh(**axes))
  assert found['shard_bytes'] > 100e6
  assert found['ratio'] < 1.2  # less than 1 where memory of earlier tests is taken again
