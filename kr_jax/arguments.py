"""The command line, read so that all that is wrong with it is said at once, each in one line; and a short help.

Flags are absl's; those of configs (`--config=FILE[:VARIANT]`, `--config.SECTION.KNOB=VALUE`) are ml_collections'. A
config may be a shipped one, `kr_jax:NAME[:VARIANT]` (shipped.py).
Imports nothing heavy: a misspelt flag is an error of a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import glob
import os
import re
import sys
import textwrap
import time
import traceback
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

from kr_jax import checks
from kr_jax import exits
from kr_jax import shipped
from kr_jax.sections import nearest


_LINE = 1000  # characters of an error


class Mode(NamedTuple):
  """What can be done, and its flags."""

  doc: str
  needs: tuple[str, ...]
  takes: tuple[str, ...] = ()  # as well
  fills: tuple[str, ...] = ()  # those of them that have their default where they are not given
  of_run: bool = False  # whether it is of a run, whose own config is taken where none is given


def began() -> float:
  """The unix time at which this process began; now, where the system does not tell."""
  try:
    with open('/proc/self/stat') as file:
      ticks = int(file.read().rpartition(')')[2].split()[19])  # since the system began; 0 in some sandboxes
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    return time.time() - (max(age_s, 0.0) if ticks else 0.0)
  except (OSError, ValueError, LookupError, AttributeError):
    return time.time()


def values(argv: Sequence[str], name: str) -> list[str]:
  """What a command line gives a flag, each time that it does."""
  found = []
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if re.fullmatch(rf'--?{name}', flag):
      found += [value] if equals else argv[i + 1:i + 2]
  return found


def is_given(argv: Sequence[str], name: str) -> bool:
  """Whether a command line gives a config file, or sets knobs of it."""
  return bool(values(argv, name) or _overrides(argv, name))


def profiled(text: str | None, num_steps: int | None = None) -> tuple[int, int] | None:
  """The first and the last step of --profile=FIRST:LAST. Raises ValueError for what is no such pair, and for steps that
  a run of num_steps does not have."""
  if text is None:
    return None
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found:
    raise ValueError(f'--profile={text} is not FIRST:LAST, two steps such as 3:5')
  first, last = int(found[1]), int(found[2])
  if last < first:
    raise ValueError(f'--profile={text} ends before it begins; say --profile={last}:{first}')
  if num_steps is not None and last >= num_steps:
    raise ValueError(f'--profile={text}: the last step is {num_steps - 1}, as num_steps={num_steps}')
  return first, last


def parse(argv: list[str], modes: Mapping[str, Mode], *, configs: Sequence[str], everywhere: Sequence[str],
          defaults: Mapping[str, str], run_config: str = '', flag_values: flags.FlagValues = flags.FLAGS
          ) -> list[str]:
  """Parses the flags, or prints the help, or all that is wrong, and ends the process.

  Args:
    argv: as of sys.argv, which holds the same.
    modes: by value of --mode.
    configs: names of the flags that are config files.
    everywhere: flags that every mode takes, also where it makes no use of them.
    defaults: of config files that are not given, where the mode fills them or knobs of them are set.
    run_config: a config file whose variant is a workdir: the config of the run in it. For modes that are of a run.
    flag_values: all flags, as they are defined.

  Returns:
    What is no flag, the program's name first.
  """
  known = _own(modes, everywhere)
  if any(re.fullmatch('--?(h|help|helpshort)', argument) for argument in argv[1:]):
    print(_help(modes, known, flag_values))
    sys.exit(0)
  try:
    argv = argv[:1] + flag_values.read_flags_from_files(argv[1:], force_gnu=False)  # --flagfile=FILE
  except flags.Error as error:
    _end([str(error)])
  mode = (values(argv, 'mode') or [flag_values['mode'].default])[-1]
  wrong = [] if mode in modes else [f'--mode={mode} is not one of {", ".join(modes)}{nearest(mode, modes)}']
  argv = argv[:1] + [f'--{name}={path}' for name, path in defaults.items() if not values(argv, name) and (
      mode in modes and name in modes[mode].fills or _overrides(argv, name))] + argv[1:]
  if mode in modes and modes[mode].of_run and not values(argv, 'config') and (workdirs := values(argv, 'workdir')):
    argv = [*argv[:1], f'--config={run_config}:{workdirs[-1]}', *argv[1:]]
  bad = ['mode'] * len(wrong)  # what absl is not shown
  for name in configs:
    if found := _config_problems(argv, name, run_config):
      wrong += found
      bad.append(name)
  rest, left = [], iter(argv)
  for argument in left:
    if not any(re.match(rf'--?(no)?{name}(\.|=|$)', argument) for name in bad):
      rest.append(argument)
    elif argument.lstrip('-') in bad:
      next(left, None)  # its value
  rest = _located(rest, configs)
  with shipped.importable(next((path for name in configs for path in values(rest, name)[-1:]), '').partition(':')[0]):
    unknown, others = _absl(rest, flag_values, wrong)
  wrong += [f'there is no flag --{name}{nearest(name, known)}' for name in unknown]
  if others[1:]:
    wrong.append(f'unexpected arguments {others[1:]}; flags start with --')
  if mode in modes:
    given = {name for name in known if any(re.match(rf'--?(no)?{name}(=|$)', argument) for argument in argv)}
    wrong += _of_mode(mode, modes, given, everywhere)
  if wrong:
    _end(wrong)
  return others


def _end(wrong: Sequence[str]) -> NoReturn:
  for problem in dict.fromkeys(wrong):
    text = ' '.join(problem.split())
    print(f'error: {text}' if len(text) <= _LINE else f'error: {text[:_LINE // 2]} ... {text[-_LINE // 2:]}',
          file=sys.stderr)
  print('-h shows the modes and their flags', file=sys.stderr)
  sys.exit(exits.WRONG_USAGE)


def _own(modes: Mapping[str, Mode], everywhere: Sequence[str]) -> list[str]:
  """The names of the project's own flags."""
  return sorted({'mode', *everywhere, *(name for mode in modes.values() for name in mode.needs + mode.takes)})


def _absl(argv: list[str], flag_values: flags.FlagValues, wrong: list[str]) -> tuple[list[str], list[str]]:
  """Parses with absl; what it finds wrong is added to `wrong`. Returns names that are no flags, and what is none."""
  try:
    left = flag_values(argv, known_only=True)
  except flags.Error as error:
    wrong.append(str(error))
    return [], argv[:1]
  unknown, others = [], left[:1]
  for argument, before in zip(left[1:], left):
    if argument.startswith('-') and len(argument) > 1:
      unknown.append(argument.lstrip('-').partition('=')[0])
    elif before is left[0] or not before.startswith('-') or '=' in before:  # else it may be a value
      others.append(argument)
  return list(dict.fromkeys(unknown)), others


def _of_mode(mode: str, modes: Mapping[str, Mode], given: set[str], everywhere: Sequence[str]) -> list[str]:
  """What is wrong with the flags of a mode: those that it needs and that are not given, and those of other modes."""
  missing = [f'--{name}' for name in modes[mode].needs if name not in given]
  wrong = [f'--mode={mode} needs {" and ".join(missing)}'] if missing else []
  for name in sorted(given - {'mode', *everywhere, *modes[mode].needs, *modes[mode].takes}):
    of = [other for other, x in modes.items() if name in x.needs + x.takes]
    wrong.append(f'--{name} is of --mode={" and ".join(of)}, not of {mode}')
  return wrong


# Paths and slices.


def path_problems(given: Mapping[str, str | Sequence[str] | None], written: Sequence[str] = ()) -> list[str]:
  """What is wrong with flags that are paths, before anything is looked for there.

  Args:
    given: their values, by name.
    written: those of them that are written to.
  """
  found = []
  for name, paths in given.items():
    for path in [paths] if isinstance(paths, str) else paths or ():
      problem = 'is empty' if not path else checks.text_problem(path) or checks.path_problem(
          path, written=name in written)
      if not problem and name == 'json' and os.path.isdir(path):
        problem = 'is a directory; name a file'
      found += [f'--{name}={path and checks.shown(path)} {problem}'] if problem else []
  return found


def topology_problems(topologies: Sequence[str], hardware: Any) -> list[str]:
  """What is wrong with the slices of a preflight, of which each takes minutes. hardware: a costs.hardware.Hardware."""
  if not topologies:
    return ['the config names no topologies; say one: --topology=v5e:4x4']
  found = []
  for name in topologies:
    try:
      if not re.fullmatch(r'\w+:[1-9]\d{0,3}(x[1-9]\d{0,3})*', name):
        found.append(f'--topology={checks.shown(name)} is no slice of TPUs; write v5e:4x4 or v5p:2x2x4')
      elif hardware:
        hardware.of_topology(name)
    except ValueError as error:
      found.append(f'--topology={name}: {error}')
  return found


# Config files.


def _overrides(argv: Sequence[str], name: str) -> list[str]:
  """The knobs that are set of a config: 'alloc.rule'."""
  return [m[1] for argument in argv if (m := re.match(rf'--?(?:no)?{name}\.([^=]+)', argument))]


def _located(argv: Sequence[str], names: Sequence[str]) -> list[str]:
  """A command line with files in place of shipped configs' names, which are known."""
  found = list(argv)
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag.lstrip('-') in names and flag.startswith('-'):
      if equals:
        found[i] = f'{flag}={shipped.located(value)}'
      elif i + 1 < len(argv):
        found[i + 1] = shipped.located(argv[i + 1])
  return found


def _config_problems(argv: Sequence[str], name: str, run_config: str = '') -> list[str]:
  """What is wrong with a config file, its variant and the knobs that are set of it. run_config: as of `parse`."""
  given = values(argv, name)
  overrides = _overrides(argv, name)
  if not given:
    return [f'--{name}.{overrides[0]} needs --{name}=FILE'] if overrides else []
  is_of_run = bool(run_config) and given[-1].startswith(f'{run_config}:')
  flag = f'--workdir={given[-1].removeprefix(f"{run_config}:")}' if is_of_run else f'--{name}={given[-1]}'
  try:
    place = shipped.located(given[-1])
  except ValueError as error:
    return [f'{flag}: {error}']
  path = place.partition(':')[0]
  if not os.path.isfile(path):
    return [f'{flag}: there is no file {path!r}{_near(path)}']
  try:
    with shipped.importable(path):
      config = config_flags.config_flags.ConfigFileFlagParser(name).parse(place)
  except (TypeError, ValueError) as error:
    if is_of_run:  # whose record cannot be read: no wrong flag
      sys.exit(f'error: {" ".join(str(error.__context__ or error).split())}')
    return [f'{flag}: {_short(error.__context__ or error, path)}']
  except SyntaxError as error:
    return [f'{flag}: line {error.lineno} of {error.filename}: {error.msg}']
  except Exception as error:  # whatever its code does
    return [f'{flag}: {type(error).__name__}: {_short(error, path)}']
  if not isinstance(config, config_dict.ConfigDict):
    error = getattr(config, '_error', None)  # an OSError, which ml_collections keeps for later
    return [f'{flag}: ' + (_short(error, path) if isinstance(error, OSError) else
                           f'get_config returned {type(config).__name__}; it must return a ConfigDict')]
  return [problem for override in overrides if (problem := _knob_problem(config, override, name))]


def _near(path: str) -> str:
  """'; did you mean FILE?' for a config file that there is not."""
  name = os.path.basename(path).removesuffix('.py')
  near = nearest(path, [*glob.glob(f'{os.path.dirname(path) or "."}/*.py'), *glob.glob('configs/*.py')])
  return near or (f"; did you mean '{shipped.PREFIX}{name}'?" if name in shipped.names() else '')


def _short(error: BaseException, path: str) -> str:
  """An error in a line, and the line of the file where it was raised in the file itself."""
  places = [place.lineno for place in traceback.extract_tb(error.__traceback__)
            if os.path.abspath(place.filename) == os.path.abspath(path)]
  where = f' (line {places[-1]} of {path})' if places else ''
  text = re.sub(r' Other fields present:.*?(?=Did you mean|$)', ' ', ' '.join(str(error).split()))  # the whole config
  return f'{text.strip()}{where}'


def _knob_problem(config: Any, override: str, name: str) -> str | None:
  """What is wrong with the name of a knob; None where it is known, or not for us to say ('tuple[0]')."""
  node, done = config, ''
  for part in override.split('.'):
    if '[' in part:
      return None
    if not isinstance(node, config_dict.ConfigDict):
      return f'--{name}.{override}: {done} is a knob, not a section'
    if part not in node:
      near = [f'{done}.{other}'.lstrip('.') for other in node]
      return f'--{name}.{override}: there is no such knob{nearest(f"{done}.{part}".lstrip("."), near)}'
    node, done = node[part], f'{done}.{part}'.lstrip('.')
  return None


# The help.


def _help(modes: Mapping[str, Mode], names: Sequence[str], flag_values: flags.FlagValues) -> str:
  """The modes and the project's own flags, of these names."""
  wrap = lambda name, text, width: textwrap.fill(
      text, 100, initial_indent=f'  {name:<{width}}', subsequent_indent=' ' * (width + 2))
  lines = ['usage: python -m kr_jax.main [--mode=MODE] [--FLAG=VALUE ...]', '', 'Modes, and the flags that they need:']
  for name, mode in modes.items():
    needs = ' '.join(f'--{flag}' for flag in mode.needs)
    lines.append(wrap(name, f'{mode.doc} ({needs})', 11))
  lines += ['', 'Flags:']
  for flag in (flag_values[name] for name in names):
    of = [name for name, mode in modes.items() if flag.name in mode.needs + mode.takes]
    text = re.sub(r';\s+repeat this option.*', '', re.sub(rf'(^|>: )(?:{"|".join(modes)}): ', r'\1', flag.help))
    default = f'; default {flag.default}' if flag.default not in (None, False, 0, -1) else ''
    lines.append(wrap(f'--{flag.name}', f'{text}{default}' + (f' [{", ".join(of)}]' if of else ''), 19))
  shown = f'Shipped configs, as --config={shipped.PREFIX}NAME: {", ".join(shipped.names())}.'
  lines += ['', textwrap.fill(shown, 100)]
  lines += ['', 'Every knob of a config, with its meaning and bounds: kr_jax/knobs.py. Flags of libraries: --helpfull.']
  return '\n'.join(lines)
