"""Fields of config.json: what is refused, and which rotations they say."""

import math

import numpy as np
import pytest

from kr_jax.model import attention
from kr_jax.model import config_json

LLAMA_3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
LONG = {'type': 'longrope', 'short_factor': [1, 2], 'long_factor': [3, 4]}


def read(family='llama', by_kind=False, length=0, **published):
  """What `rope` finds of heads of 4 numbers and a context of 128, and what it notes."""
  defaults = {'model_type': family, 'rope_theta': 1e4, 'rope_local_base_freq': 5e3}
  reader = config_json.Reader(published, defaults)
  return config_json.rope(reader, head_width=4, context=128, length=length, by_kind=by_kind), reader.wrong


def scaling(*args, **options):
  found, wrong = read(*args, **options)
  assert not wrong
  return found['rope_scaling']


@pytest.mark.parametrize('published, theta, factor', [
    ({}, 1e4, None),
    ({'rope_theta': 2e4}, 2e4, None),
    ({'rope_theta': 2e4, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 3e4}}, 3e4, None),
    ({'rope_theta': 2e4, 'rope_scaling': {'type': 'linear', 'factor': 2, 'rope_theta': 4e4}}, 4e4, 2),
    # rope_scaling stands for the whole of rope_parameters, whose theta is lost then.
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 3e4}, 'rope_scaling': YARN}, 1e4, 4),
    ({'rope_parameters': YARN | {'rope_theta': 3e4}, 'rope_scaling': None}, 3e4, 4),
    ({'rope_parameters': YARN | {'rope_theta': 3e4}, 'rope_scaling': {}}, 3e4, 4),
    ({'rope_scaling': {'type': 'linear', 'rope_type': 'yarn', 'factor': 2}}, 1e4, 2)])
def test_which_of_two_fields_holds(published, theta, factor):
  found, wrong = read(**published)
  assert not wrong and found['rope_theta'] == theta
  assert (found['rope_scaling'] and found['rope_scaling'].factor) == factor


def test_the_original_context():
  """Beside the scaling before inside it, and the whole context where neither is said."""
  of = lambda **others: scaling(rope_scaling=LLAMA_3 | others.pop('inside', {}), **others).context
  assert of() == 128
  assert of(inside={'original_max_position_embeddings': 64}) == 64
  assert of(inside={'original_max_position_embeddings': 64}, original_max_position_embeddings=32) == 32
  # Where rotations are by kind of layer, the field beside them is not read.
  by_kind = scaling('olmo3', True, rope_scaling=YARN, original_max_position_embeddings=64)
  assert by_kind.context == 32


@pytest.mark.parametrize('changed, want', [
    ({}, attention.Scaling('yarn', 4.0, 1.0, 32.0, 32.0, 0.1 * math.log(4) + 1)),
    ({'factor': None}, attention.Scaling('yarn', 4.0, 1.0, 32.0, 32.0, 0.1 * math.log(4) + 1)),
    ({'factor': 1.0}, attention.Scaling('yarn', 1.0, 1.0, 32.0, 32.0, 1.0)),
    ({'attention_factor': 1.5, 'beta_fast': 16, 'beta_slow': 2, 'truncate': False},
     attention.Scaling('yarn', 4.0, 2.0, 16.0, 32.0, 1.5, False)),
    ({'mscale': 2, 'mscale_all_dim': 1}, attention.Scaling(
        'yarn', 4.0, 1.0, 32.0, 32.0, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))),
    ({'mscale': 2}, attention.Scaling('yarn', 4.0, 1.0, 32.0, 32.0, 0.1 * math.log(4) + 1)),
    ({'beta_fast': 0, 'beta_slow': None}, attention.Scaling('yarn', 4.0, 1.0, 32.0, 32.0, 0.1 * math.log(4) + 1))])
def test_yarn(changed, want):
  found = scaling(rope_scaling=YARN | changed)
  assert found._replace(attention_factor=0) == want._replace(attention_factor=0)
  assert found.attention_factor == pytest.approx(want.attention_factor)


def test_longrope_has_one_list_for_the_sequences_of_a_run():
  """The short one up to the original context, the long one beyond."""
  of = lambda length: scaling('phi3', rope_scaling=LONG, original_max_position_embeddings=32, length=length)
  factor = math.sqrt(1 + math.log(4) / math.log(32))
  assert of(32) == attention.Scaling(
      'longrope', context=32.0, attention_factor=factor, divisors=(1.0, 2.0), long_divisors=(3.0, 4.0))
  assert of(33) == of(32)._replace(divisors=(3.0, 4.0), long_divisors=())
  for name in ('su', 'yarn'):  # Phi-3's other names of it
    assert scaling('phi3', rope_scaling=LONG | {'type': name}, original_max_position_embeddings=32) == of(0)


def test_a_part_of_a_head_rotates():
  found, wrong = read('phi3', partial_rotary_factor=0.5)
  assert not wrong and found['rope_width'] == 2
  assert read('phi3', rope_parameters={'partial_rotary_factor': 1.0})[0]['rope_width'] == 0
  assert read('llama', partial_rotary_factor=0.5)[1] == ['partial_rotary_factor=0.5 is not supported but of phi3']
  assert 'cannot rotate in pairs' in read('phi3', partial_rotary_factor=0.25)[1][0]


def test_rotations_by_kind_of_layer():
  both = {'full_attention': {'rope_type': 'linear', 'factor': 8, 'rope_theta': 1e6},
          'sliding_attention': {'rope_theta': 2e3}, 'truncate': False}
  found, wrong = read('gemma3_text', True, rope_parameters=both)
  assert not wrong
  assert (found['rope_theta'], found['local_rope_theta'], found['rope_scaling']) == (
      1e6, 2e3, attention.Scaling('linear', 8.0))
  # Of transformers 4; and both, of which rope_scaling changes what it says alone.
  four = read('gemma3_text', True, rope_theta=1e6, rope_scaling={'rope_type': 'linear', 'factor': 8})[0]
  assert (four['rope_theta'], four['local_rope_theta'], four['rope_scaling']) == (1e6, 5e3, found['rope_scaling'])
  mixed = read('gemma3_text', True, rope_parameters=both, rope_scaling={'factor': 2})[0]
  assert (mixed['rope_theta'], mixed['rope_scaling']) == (1e6, attention.Scaling('linear', 2.0))


@pytest.mark.parametrize('published, named', [
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2}}, "'dynamic' is not supported: .* take a checkpoint with an"),
    ({'rope_scaling': {'type': 'ntk'}}, "'ntk' is not one of \\['default', 'linear'"),
    ({'rope_scaling': {'rope_type': None, 'type': 'linear', 'factor': 2}}, 'the type None is not one of'),
    ({'rope_scaling': [1]}, 'rope_scaling is \\[1\\], not an object'),
    ({'rope_scaling': {'type': 'linear', 'factor': '2'}}, "factor is '2', not a number"),
    ({'rope_scaling': LLAMA_3 | {'low_freq_factor': 8.0}}, 'high_freq_factor=4.0 is not above low_freq_factor=8.0'),
    ({'rope_scaling': {'type': 'llama3', 'factor': 2}}, 'low_freq_factor is None.*; high_freq_factor is None'),
    ({'rope_scaling': {'type': 'yarn'}}, "'yarn' lacks factor"),
    ({'rope_scaling': YARN | {'truncate': 'no'}}, "truncate is 'no', not true or false"),
    ({'rope_scaling': LONG | {'short_factor': [1]}}, 'short_factor holds 1 values, not 2 numbers above 0'),
    ({'rope_scaling': LONG | {'long_factor': 3}}, 'long_factor holds 3, not 2 numbers'),
    ({'rope_theta': '1e4'}, "rope_theta is '1e4', not a number"),
    ({'rope_theta': -1.0}, 'rope_theta is -1.0, not above 0'),
    ({'rope_parameters': {'full_attention': {}}}, "by kind of layer are not supported of 'llama'"),
    ({'family': 'phi3', 'rope_scaling': {'type': 'linear', 'factor': 2}}, "'linear' is not supported of 'phi3'"),
    ({'family': 'olmo3', 'by_kind': True, 'rope_parameters': {'rope_type': 'default'}}, 'must hold an object for each'),
    ({'family': 'olmo3', 'by_kind': True, 'rope_scaling': {'type': 'linear', 'factor': 2}},
     'names its type as "type", which transformers 5 does not read here and 4 does; name it "rope_type"'),
    ({'family': 'olmo3', 'by_kind': True, 'rope_parameters': {'sliding_attention': {'type': 'yarn'}}},
     "of local layers that are scaled, by 'yarn'")])
def test_rotations_that_are_not_supported(published, named):
  with pytest.raises(AssertionError, match=named):
    assert not '; '.join(read(**published)[1])


@pytest.mark.parametrize('value', [True, '4', 4.0, None, 0, [4], 10 ** 400])
def test_a_whole_number(value):
  reader = config_json.Reader({'layers': value}, {})
  assert reader.number('layers', at_least=1) == 1 and reader.wrong[0].startswith(f'layers is {value!r}, not ')
  assert config_json.Reader({'layers': 4}, {}).number('layers', at_least=1) == 4


@pytest.mark.parametrize('value', [True, '1e-5', 0.0, -1, math.inf, math.nan, None, 10 ** 400])
def test_a_number(value):
  reader = config_json.Reader({'eps': value}, {})
  assert reader.number('eps') == 1 and reader.wrong
  assert config_json.Reader({}, {'eps': 1e-5}).number('eps') == 1e-5


def test_a_flag():
  reader = config_json.Reader({'a': 1, 'b': True, 'c': None}, {})
  assert [reader.flag(name) for name in 'abcd'] == [False, True, False, False]
  assert reader.wrong == ['a is 1, not true or false']


@pytest.mark.parametrize('of', [
    None, attention.Scaling('linear', 2.0), attention.Scaling('llama3', 8.0, 1.0, 4.0, 32.0),
    config_json.yarn(4, 32), attention.Scaling('yarn', 4.0, 2.0, 16.0, 32.0, 1.5, False)])
def test_what_is_written_is_read_in_both_forms(of):
  for theta, local_theta in ((2e4, 0.0), (2e4, 3e3)):
    published = config_json.published_rope(theta, of, context=128, local_theta=local_theta)
    # Where transformers looks for `truncate` by kind of layer, the older form has no place for it.
    may_be_older = not (local_theta and of and not of.truncate)
    for other in ({}, {'rope_scaling': None}, {'rope_parameters': None} if may_be_older else {}):
      found, wrong = read('olmo3' if local_theta else 'llama', bool(local_theta), **published | other)
      assert not wrong and found == {
          'rope_theta': theta, 'rope_scaling': of, 'rope_width': 0, 'local_rope_theta': local_theta}


def test_longrope_that_is_written():
  """Of a run beyond the original context both lists are the long one, which held for shorter sequences too."""
  short = scaling('phi3', rope_scaling=LONG, original_max_position_embeddings=32)
  long = scaling('phi3', rope_scaling=LONG, original_max_position_embeddings=32, length=64)
  for of, again in ((short, short), (long, long._replace(long_divisors=long.divisors))):
    published = config_json.published_rope(1e4, of, context=128)
    assert set(published['rope_scaling']) == {'type', 'short_factor', 'long_factor'}  # transformers 4 takes no others
    assert scaling('phi3', **published) == again
  changed = short._replace(attention_factor=1.5)
  assert scaling('phi3', **config_json.published_rope(1e4, changed, context=128)) == changed
  assert np.allclose(published['rope_parameters']['long_factor'], [3, 4])
