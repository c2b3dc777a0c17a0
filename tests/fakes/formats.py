"""What gcloud makes of a resource by --format, --filter and --sort-by, as far as launch/tpu.sh uses them."""

from __future__ import annotations

import json
import re


def value(thing, key: str):
  """The value of a key such as `state.state`, `networkInterfaces[0].networkIP` or `networkEndpoints[].ipAddress`."""
  for part in key.split('.'):
    name, _, index = part.partition('[')
    if isinstance(thing, list):
      thing = [x.get(name) for x in thing]
    else:
      thing = thing.get(name) if isinstance(thing, dict) else None
    if index and thing is not None and index != ']':
      thing = thing[int(index[:-1])] if len(thing) > int(index[:-1]) else None
  return thing


def _text(found) -> str:
  if isinstance(found, list):
    return ';'.join(map(_text, found))
  if isinstance(found, dict):
    return ';'.join(f'{k}={_text(x)}' for k, x in found.items())
  return '' if found is None else str(found)


def show(things: list[dict], form: str, of_many: bool) -> str:
  """The text of resources, by a --format (yaml, where it is empty, is written as JSON, which is YAML too)."""
  kind, _, keys = form.partition('(')
  if kind == 'value':
    return ''.join('\t'.join(_text(value(thing, key.strip())) for key in keys.rstrip(')').split(',')) + '\n'
                   for thing in things)
  if kind not in ('json', 'yaml', ''):
    raise ValueError(f'the fake gcloud has no --format={form}')
  return ''.join(json.dumps(x, indent=2) + '\n' for x in ([things] if of_many else things))


def matches(thing: dict, expression: str) -> bool:
  """Whether a resource passes a --filter of terms KEY=VALUE, KEY:VALUE or KEY~PATTERN, with AND between them."""
  for term in re.split(r'\s+AND\s+|\s+', expression.strip()):
    key, sign, wanted = re.fullmatch(r'([\w.\[\]-]+)([=:~])(.*)', term).groups()
    found, wanted = _text(value(thing, key)), wanted.strip('"\'')
    if not (re.search(wanted, found) if sign == '~' else found == wanted):
      return False
  return True
