"""Fields of a published config.json: checked numbers and flags, and rotary positions <-> attention.Scaling.

Of two fields that say the same, and of absent ones, transformers 5 decides what holds (modeling_rope_utils.py):
rope_scaling before rope_parameters, as a whole; rope_theta inside of either before rope_theta beside them;
original_max_position_embeddings beside them before the one inside.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

from kr_jax.model import attention

_BY_KIND = ('full_attention', 'sliding_attention')  # kinds of layers with rotations of their own
_ORIGINAL = 'original_max_position_embeddings'
_MOST, _MOST_WHOLE = 1e300, 2 ** 31  # what a float holds, and an axis of an array


class Reader:
  """The fields of a config.json, with defaults for absent ones. Collects what is wrong with fields that are read."""

  def __init__(self, published: Mapping[str, Any], defaults: Mapping[str, Any]):
    self.of, self.wrong = dict(defaults) | dict(published), []

  def number(self, name: str, of: Mapping[str, Any] | None = None, *, at_least: int | None = None) -> Any:
    """A number above 0, or with at_least a whole number; 1 where it is noted as wrong."""
    value = (self.of if of is None else of).get(name)
    kind = (int, float) if at_least is None else int
    if isinstance(value, bool) or not isinstance(value, kind):
      self.wrong.append(f'{name} is {value!r}, not a {"whole number" if kind is int else "number"}')
    elif value >= (most := _MOST if at_least is None else _MOST_WHOLE):
      self.wrong.append(f'{name} is {value!r}, not below {most}')
    elif not value > 0 if at_least is None else value < at_least:
      self.wrong.append(f'{name} is {value!r}, not {"above 0" if at_least is None else f"at least {at_least}"}')
    else:
      return value
    return 1

  def flag(self, name: str, of: Mapping[str, Any] | None = None) -> bool:
    """Whether a field is true; null is false."""
    value = (self.of if of is None else of).get(name)
    if not isinstance(value, bool | None):
      self.wrong.append(f'{name} is {value!r}, not true or false')
    return value is True

  def mapping(self, name: str, of: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy of an object; {} where it is absent or null."""
    value = (self.of if of is None else of).get(name)
    if not isinstance(value, Mapping | None):
      self.wrong.append(f'{name} is {value!r}, not an object')
      return {}
    return dict(value or {})

  def divisors(self, name: str, of: Mapping[str, Any], pairs: int) -> tuple[float, ...]:
    """A list of numbers above 0, one of each pair that rotates."""
    value = of.get(name)
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < _MOST
    if not isinstance(value, list) or len(value) != pairs or not all(map(is_number, value)):
      held = f'{len(value)} values' if isinstance(value, list) else repr(value)
      self.wrong.append(f'{name} holds {held}, not {pairs} numbers above 0, one of each pair that rotates')
      return (1.0,) * pairs
    return tuple(map(float, value))


def rope(read: Reader, *, head_width: int, context: int, length: int, by_kind: bool) -> dict[str, Any]:
  """rope_theta, rope_scaling, rope_width and local_rope_theta of policy.Config.

  Args:
    read: notes what is not supported.
    context: max_position_embeddings.
    length: as families.fields takes it.
    by_kind: whether the family has rotations for each kind of layer.
  """
  is_phi = read.of['model_type'] == 'phi3'
  full, local = _by_kind(read) if by_kind else (_of_all(read), None)
  # Phi-3's other names of it.
  kind = 'longrope' if _kind(full) == 'su' or is_phi and _kind(full) == 'yarn' else _kind(full)
  if is_phi and kind not in ('default', 'longrope'):
    read.wrong.append(f"rope scaling of the type {kind!r} is not supported of 'phi3', but 'default' and 'longrope'")
    kind = 'default'
  width = head_width
  share = full.get('partial_rotary_factor', read.of.get('partial_rotary_factor'))
  if share not in (None, 1):
    if is_phi:
      width = int(head_width * read.number('partial_rotary_factor', {'partial_rotary_factor': share}))
    else:
      read.wrong.append(f'partial_rotary_factor={share!r} is not supported but of phi3')
  if not 2 <= width <= head_width or width % 2:
    read.wrong.append(f'{width} numbers of a head of head_dim={head_width} cannot rotate in pairs')
    width = 2
  scaling = _scaling(read, kind, full, context, width // 2, may_stand_beside=not by_kind)
  if scaling and scaling.long_divisors and length > scaling.context:
    scaling = scaling._replace(divisors=scaling.long_divisors, long_divisors=())
  return {'rope_theta': float(read.number('rope_theta', {'rope_theta': read.of['rope_theta']} | full)),
          'rope_scaling': scaling, 'rope_width': width % head_width,
          'local_rope_theta': float(read.number('rope_theta', local)) if local else 0.0}


def _of_all(read: Reader) -> dict[str, Any]:
  """The rotations of all layers."""
  found = read.mapping('rope_scaling') or read.mapping('rope_parameters')
  if any(kind in found for kind in _BY_KIND):
    read.wrong.append(f'rope_parameters by kind of layer are not supported of {read.of["model_type"]!r}')
  return found


def _by_kind(read: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
  """The rotations of layers that read all, and of local layers, which have a rope_theta."""
  both = read.mapping('rope_parameters')
  if both and not any(kind in both for kind in _BY_KIND):
    read.wrong.append(f'rope_parameters={both} must hold an object for each of {_BY_KIND}')
  full, local = (read.mapping(kind, both) for kind in _BY_KIND)
  scaling = read.mapping('rope_scaling')
  if not both and 'rope_type' not in scaling and scaling.get('type', 'default') != 'default':
    read.wrong.append(f'rope_scaling={scaling} of {read.of["model_type"]!r} names its type as "type", which '
                      'transformers 5 does not read here and 4 does; name it "rope_type", or set rope_scaling to null')
  # As in transformers 5, which looks for `truncate` beside the kinds.
  full |= scaling | {'truncate': both.get('truncate', True)}
  if _kind(local) != 'default':
    read.wrong.append(f'rotations of local layers that are scaled, by {_kind(local)!r}, are not supported')
  return full, {'rope_theta': read.of['rope_local_base_freq']} | local


def _kind(scaling: Mapping[str, Any]) -> Any:
  return scaling.get('rope_type', scaling.get('type', 'default'))


def _scaling(read: Reader, kind: Any, full: Mapping[str, Any], context: int, pairs: int, *, may_stand_beside: bool
             ) -> attention.Scaling | None:
  """The scaling of a kind. may_stand_beside: whether the original context is also looked for beside it."""
  if kind == 'default':
    return None
  if kind == 'dynamic':
    read.wrong.append("rope scaling of the type 'dynamic' is not supported: it changes the rotation of keys that are "
                      'cached as a sequence grows; take a checkpoint with another type, or none')
    return None
  if kind not in ('linear', 'llama3', 'longrope', 'yarn'):
    read.wrong.append(f'rope scaling of the type {kind!r} is not one of '
                      "['default', 'linear', 'llama3', 'longrope', 'yarn']")
    return None

  def number(name: str, usual: float | None = None) -> float:
    return usual if usual is not None and full.get(name) is None else float(read.number(name, full))

  bound = lambda name, usual: usual if full.get(name) == 0 else number(name, usual)  # as in transformers
  if kind == 'linear':
    return attention.Scaling(kind, number('factor'))
  beside = read.of.get(_ORIGINAL) if may_stand_beside else None
  original = {_ORIGINAL: full.get(_ORIGINAL, context) if beside is None else beside}
  original = float(read.number(_ORIGINAL, original))
  if kind == 'llama3':
    low, high = number('low_freq_factor'), number('high_freq_factor')
    if high <= low:
      read.wrong.append(f'high_freq_factor={high} is not above low_freq_factor={low}')
    return attention.Scaling(kind, number('factor'), low, high, original)
  factor = number('factor', context / original)
  if kind == 'yarn':
    if 'factor' not in full:
      read.wrong.append("rope scaling of the type 'yarn' lacks factor")
    usual = _yarn_attention(factor)
    if full.get('mscale') and full.get('mscale_all_dim'):
      usual = _yarn_attention(factor, number('mscale')) / _yarn_attention(factor, number('mscale_all_dim'))
    return attention.Scaling(
        kind, factor, bound('beta_slow', 1.0), bound('beta_fast', 32.0), original,
        number('attention_factor', usual), read.flag('truncate', {'truncate': True} | full))
  return attention.Scaling(
      kind, context=original, attention_factor=number('attention_factor', _longrope_attention(factor, original)),
      divisors=read.divisors('short_factor', full, pairs), long_divisors=read.divisors('long_factor', full, pairs))


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
  """Peng et al. 2023, arXiv 2309.00071, eq. 22."""
  return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope_attention(factor: float, original: float) -> float:
  """Ding et al. 2024, arXiv 2402.13753, as published with Phi-3."""
  return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def yarn(factor: float, context: int) -> attention.Scaling:
  """The scaling that stretches a context by a factor, as Qwen's model cards set it."""
  return attention.Scaling('yarn', float(factor), 1.0, 32.0, float(context), _yarn_attention(factor))


def published_rope(theta: float, scaling: attention.Scaling | None, *, share: float = 1.0, context: int = 0,
                   local_theta: float = 0.0) -> dict[str, Any]:
  """The rotary fields, as transformers 4 and as 5 writes them; both read both.

  Args:
    share: of a head's numbers that rotate.
    context: max_position_embeddings, for longrope.
    local_theta: rope_theta of local layers, of families with rotations for each kind of layer; else 0.
  """
  four = None if scaling is None else _published_scaling(scaling, context)
  five = {'rope_type': 'default'} | (four or {}) | {'rope_theta': theta}
  if scaling and scaling.kind == 'longrope':
    five = five | {'rope_type': 'longrope', _ORIGINAL: int(scaling.context)}
    del five['type']
  found = {'rope_theta': theta, 'rope_scaling': four, 'rope_parameters': five}
  if local_theta:
    of_local = {'rope_type': 'default', 'rope_theta': local_theta}
    found |= {'rope_local_base_freq': local_theta, 'rope_parameters': dict(zip(_BY_KIND, (five, of_local)))}
    if scaling and not scaling.truncate:
      found['rope_parameters']['truncate'] = False
  if share != 1:
    found['partial_rotary_factor'] = five['partial_rotary_factor'] = share
  if scaling and scaling.kind == 'longrope':
    found[_ORIGINAL] = int(scaling.context)
  return found


def _published_scaling(s: attention.Scaling, context: int) -> dict[str, Any]:
  """rope_scaling."""
  if s.kind == 'longrope':
    # transformers 4 takes these three fields and no others of Phi-3.
    found = {'type': 'longrope', 'short_factor': list(s.divisors), 'long_factor': list(s.long_divisors or s.divisors)}
    usual = _longrope_attention(context / s.context, s.context)
    return found if s.attention_factor == usual else found | {'attention_factor': s.attention_factor}
  found = {'rope_type': s.kind, 'factor': s.factor}
  if s.kind == 'linear':
    return found
  found[_ORIGINAL] = int(s.context)
  if s.kind == 'llama3':
    return found | {'low_freq_factor': s.low, 'high_freq_factor': s.high}
  if s.attention_factor != _yarn_attention(s.factor):
    found['attention_factor'] = s.attention_factor
  return found | {'beta_slow': s.low, 'beta_fast': s.high} | ({} if s.truncate else {'truncate': False})
