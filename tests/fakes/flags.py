"""Parses a gcloud command line by what `gcloud` documents (tests/data/gcloud_flags.json, make_gcloud_flags.py)."""

from __future__ import annotations

import json
import os

with open(os.path.join(os.path.dirname(__file__), '..', 'data', 'gcloud_flags.json')) as file:
  TABLE = json.load(file)


class UsageError(Exception):
  """What gcloud refuses before it does anything."""


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str | bool], list[str]]:
  """Reads a command line, without the word `gcloud`.

  Returns:
    The command, its positional arguments, its flags without the dashes, and the words after `--`.

  Raises:
    UsageError: an unknown command or flag, a value that is missing or none of the choices, an argument that is missing,
      flags that exclude each other.
  """
  words, rest = (words[:words.index('--')], words[words.index('--') + 1:]) if '--' in words else (words, [])
  command = _command(words)
  arguments, known = TABLE['commands'][command], dict(TABLE['wide'])
  _flags_of(arguments, known)
  for row in TABLE['added']:
    if row['command'] == command:
      known[row['flag']] = row['takes']
  positionals, flags = _split(command, words[len(command.split()):], known)
  given = {f'--{name}' for name in flags}
  names = [x['positional'] for x in _flat(arguments) if 'positional' in x]
  if positionals and not names:
    raise UsageError(f'{command}: unrecognized arguments: {" ".join(positionals)}')
  for name, _ in zip(names, positionals):
    given.add(name)
  _check(command, {'group': arguments, 'required': True}, given)
  return command, positionals, flags, rest


def _command(words: list[str]) -> str:
  known = [name for name in TABLE['commands'] if words[:len(name.split())] == name.split()]
  if not known:
    raise UsageError(f'Invalid choice: {" ".join(words[:4])!r} is no command of the table')
  return max(known, key=len)


def _flat(arguments: list[dict]) -> list[dict]:
  return [x for a in arguments for x in (_flat(a['group']) if 'group' in a else [a])]


def _flags_of(arguments: list[dict], known: dict) -> None:
  for x in _flat(arguments):
    if 'flag' in x:
      known[x['flag']] = x['takes']


def _split(command: str, words: list[str], known: dict) -> tuple[list[str], dict[str, str | bool]]:
  """Positional arguments and flags, each with a value that it may have."""
  positionals, flags, i = [], {}, 0
  while i < len(words):
    word, i = words[i], i + 1
    if not word.startswith('-'):
      positionals.append(word)
      continue
    name, has_value, value = word.partition('=')
    takes = known.get(name, known.get(name.replace('--no-', '--', 1)))
    if takes is None or (name not in known and takes is not False):  # --no-FLAG is of switches alone
      raise UsageError(f'{command}: unrecognized arguments: {name}')
    if takes is False:
      if has_value:
        raise UsageError(f'{command}: argument {name}: ignored explicit argument {value!r}')
      flags[name[2:]] = True
      continue
    if not has_value:
      if i == len(words) or words[i].startswith('--'):
        raise UsageError(f'{command}: argument {name}: expected one argument')
      value, i = words[i], i + 1
    if not value:
      raise UsageError(f'{command}: argument {name}: an empty value')
    if isinstance(takes, list) and value not in takes:
      raise UsageError(f'{command}: argument {name}: Invalid choice: {value!r}. Valid choices are {takes}')
    flags[name[2:]] = value
  return positionals, flags


def _check(command: str, argument: dict, given: set[str]) -> bool:
  """Raises where an argument is missing or too many are there. Returns whether any of it is given."""
  if 'group' not in argument:
    return (argument.get('flag') or argument['positional']) in given
  members = argument['group']
  used = [x for x in members if _check(command, x, given)]
  names = ' | '.join(x.get('flag') or x.get('positional') or '(group)' for x in members)
  if argument.get('mutex') and len(used) > 1:
    raise UsageError(f'{command}: At most one of {names} can be specified')
  if argument.get('mutex') and argument.get('required') and not used:
    raise UsageError(f'{command}: Exactly one of ({names}) must be specified')
  if not argument.get('mutex') and (used or argument.get('required')):
    for x in members:
      if x.get('required') and x not in used:
        raise UsageError(f'{command}: argument {x.get("flag") or x.get("positional") or "(group)"}: Must be specified')
  return bool(used)
