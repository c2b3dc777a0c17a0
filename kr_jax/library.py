"""Training from Python, in a notebook or a script: the run of the command line, with its checks, record and resume.

    import kr_jax
    config = kr_jax.config('arithmetic:debug')
    config.alloc.rule = 'uniform'
    run = kr_jax.run(config, 'runs/uniform', on_step=lambda line: print(line['step']))
    print(run.steps['reward_mean'], run.is_complete)

What is heavy is loaded once the config was found right.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
import contextlib
import glob
import importlib.util
import logging
import os
import re
import sys
import threading
from typing import TYPE_CHECKING, Any

from kr_jax import files
from kr_jax import inputs
from kr_jax import knobs
from kr_jax import run_config
from kr_jax import shipped

if TYPE_CHECKING:
  from kr_jax import prepare
  from kr_jax import reader
  from kr_jax.costs import hardware as hardware_lib

# Of the extra `train`, modules that every mode needs.
_OF_TRAIN = ('etils', 'flax', 'jinja2', 'optax', 'orbax', 'pyarrow', 'tensorflow_datasets', 'tqdm')
_GUARD = "put the call under if __name__ == '__main__':"
_running = threading.Lock()


def run(config: Mapping[str, Any] | str, workdir: str | os.PathLike, *,
        on_step: Callable[[dict[str, Any]], None] | None = None, hardware: Any = None) -> reader.Run | None:
  """What kr_jax.run says. Returns None in a process that is not the first of several.

  In a thread that is not the main one no signal is heard.
  """
  _check_started()
  config = shipped.config(config) if isinstance(config, str) else config
  if absent := missing():
    raise ImportError(f'training needs more than is installed: {absent[0]}')
  wrong = [*_of_functions(config)] or problems(config) or unwritable(
      {'workdir': workdir, 'checkpoint.directory': config['checkpoint']['directory']})
  if wrong:
    raise ValueError('\n'.join(['the run cannot start:', *wrong] if len(wrong) > 1 else wrong))
  if not _running.acquire(blocking=False):
    raise ValueError('a run goes on in this process already; wait for its end, or start another process')
  try:
    return _run(config, os.fspath(workdir), on_step, None if hardware is None else _hardware(hardware))
  finally:
    _running.release()


def _run(config: Mapping[str, Any], workdir: str, on_step: Callable[[dict[str, Any]], None] | None,
         hardware: hardware_lib.Hardware | None) -> reader.Run | None:
  from kr_jax import mirror
  from kr_jax import phases
  from kr_jax import processes
  from kr_jax import progress
  from kr_jax import reader
  from kr_jax import train
  from kr_jax.record import log
  quiet_libtpu()
  keep(workdir, config['checkpoint']['directory'])
  with phases.running(), held(config, workdir), mirror.opened(workdir, create=True) as place, log.kept(place.path):
    hardware = hardware or priced(place.path) or _hardware(None)
    setup = begin(config, place.path)
    try:
      with processes.watch():
        train.train(setup, place.path, hardware, on_step=on_step)
    except SystemExit as stop:  # the run stopped in order; it must not end a notebook
      if processes.is_first():
        progress.say(str(stop.args[0] if stop.args else 'stopped'))
    else:
      if processes.is_first():
        summarize(place.path)
        say_closing(setup.config, place.path, hardware)
  return reader.read(workdir) if processes.is_first() else None


# What the command line does as well.


def problems(config: Mapping[str, Any]) -> list[str]:
  """What is wrong with the knobs of a config that is to be trained, or is not there of what it names; a line each."""
  try:
    c = knobs.read(config)
  except ValueError as error:
    return lines(error)
  found, longest = inputs.problems(c), c.sample.prompt_length + c.sample.completion_length - 1
  if c.pack.row_length < longest:
    found.append(f'pack.row_length={c.pack.row_length} is below sample.prompt_length + sample.completion_length - 1 = '
                 f'{longest}; set it to at least that')
  if c.record.beside:
    from kr_jax.record import beside
    found += beside.problems(c.record.beside)
  if c.record.wandb or c.record.goodput or c.record.codecarbon:
    from kr_jax.record import sinks
    try:
      sinks.check(c.record)
    except ValueError as error:
      found += lines(error)
  return found


def missing() -> list[str]:
  """Of what the extra `train` brings, what is not installed; said in one line."""
  absent = [name for name in _OF_TRAIN if importlib.util.find_spec(name) is None]
  verb = 'are' if len(absent) > 1 else 'is'
  return [f"{', '.join(absent)} {verb} not installed: pip install 'kr_jax[train]'"] if absent else []


def unwritable(directories: Mapping[str, str]) -> list[str]:
  """Which directories cannot be written, by flag or knob; they are made, and a small file is written."""
  return [f'cannot write to {name}={problem}; name a directory that can be written'
          for name, path in directories.items() if path and (problem := files.unwritable(path))]


def lines(error: ValueError) -> list[str]:
  """The error of a config, as a line a knob."""
  return re.split(r'; (?=(?:\w+\.)*\w+=\S|there is no )', str(error))


def quiet_libtpu(uses_tpu: bool = True) -> None:
  """Tells libtpu, where no TPU is used or none is there, what it would ask a TPU's host for.

  A preflight installs libtpu, and jax loads it in each later run; unless these are set, it complains.
  """
  if not uses_tpu or not (glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')):
    for name, value in (('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-16')):
      os.environ.setdefault(name, value)


def keep(*places: str) -> None:
  """Keeps what is compiled, as of compiled.keep; makes TFDS write lines where there is no terminal."""
  import tensorflow_datasets as tfds
  from kr_jax import compiled
  from kr_jax import progress
  compiled.keep(*places)
  if not progress.ERR.isatty():
    tfds.disable_progress_bar()


def held(config: Mapping[str, Any], workdir: str) -> contextlib.AbstractContextManager[None]:
  """While in it, no other run is in the workdir or in the directory of its checkpoints. Raises ValueError as of
  attempt.held."""
  from kr_jax import attempt
  return attempt.held(workdir, config['checkpoint']['directory'])


def begin(config: Mapping[str, Any], workdir: str) -> prepare.Setup:
  """The setup of a run, whose the workdir is from now on: all that can be refused was refused before.

  Raises ValueError as prepare.prepare and attempt.claim do, and for verifiers that their processes cannot import.
  """
  from kr_jax import attempt
  from kr_jax import mirror
  from kr_jax import phases
  from kr_jax import prepare
  from kr_jax import processes
  from kr_jax import progress
  from kr_jax import state
  from kr_jax.record import claim
  from kr_jax.record import unbegun
  if processes.is_first():
    url, asked = mirror.url(workdir), knobs.read(config)
    if run_config.changes(asked, workdir) and (changed := unbegun.forget(workdir, knobs.as_dict(asked), url)):
      progress.say(f'the run that {url} was claimed by made no step, and this one takes its place: '
                   f'{"; ".join(changed)}')
  with phases.phase('data'):
    setup = prepare.prepare(config, workdir)
  if claim.recorded(workdir, 'rewards.verifier') is None:  # a run that goes on finds out when it starts them
    with phases.phase('verify'):
      state.check_workers(setup)
  attempt.claim(setup, workdir)
  return setup


def say_closing(config: knobs.Config, workdir: str, hardware: hardware_lib.Hardware | None) -> None:
  """Says what was learnt and what it cost, of the record of a run that is complete."""
  from kr_jax import mirror
  from kr_jax import progress
  from kr_jax.record import terminal
  from kr_jax.report import paired
  from kr_jax.report import run as run_lib
  found = run_lib.read(workdir, hardware=hardware)
  score, page, entries = f'avg@{config.evaluate.rollouts}', os.path.join(workdir, 'report.html'), found.ledger.entries
  progress.say(terminal.closing(
      [record for record in found.evaluations if f'eval/{score}' in record], score, steps=config.num_steps,
      seconds=sum(entry['wall_s'] for entry in entries) if entries else None, entries=entries, price=found.price,
      beside=paired.of(found).said,
      page=files.join(mirror.url(workdir), 'report.html') if os.path.exists(page) else None))


def summarize(workdir: str) -> dict[str, Any] | None:
  """Writes the summary of a run, and returns it; None, and a line that says why, where its record is not enough."""
  from kr_jax.report import summary
  try:
    return summary.write(workdir)
  except (ValueError, LookupError, TypeError, OSError) as error:  # there is none, or it is of an older version
    print(f'no summary of {workdir}: {error!r}' if not isinstance(error, ValueError) else f'no summary: {error}',
          file=sys.stderr)
    return None


def _check_started() -> None:
  """Raises RuntimeError where this program only runs as another process imports it, to find functions in it."""
  if os.environ.get('KR_JAX_VERIFIER'):
    who = 'the processes of verifiers import'
  elif getattr(sys.modules.get('multiprocessing.process') and sys.modules['multiprocessing.process'].current_process(),
               '_inheriting', False):  # as multiprocessing knows of a process that it spawns
    who = 'a process of multiprocessing imports'
  else:
    return
  raise RuntimeError(f'{who} the file that calls kr_jax.run, which would run again in each: {_GUARD}')


def _would_run_again(path: str) -> bool:
  """Whether this program is the file at the path, and whoever imports the file runs this call as well."""
  frame = sys._getframe()
  while frame and (frame.f_code.co_name, frame.f_globals.get('__name__')) != ('<module>', '__main__'):
    frame = frame.f_back
  if not path or frame is None or os.path.realpath(frame.f_code.co_filename) != os.path.realpath(path):
    return False
  with open(path, encoding='utf-8') as file:
    tree = ast.parse(file.read())
  return not any(isinstance(node, ast.If) and '__name__' in ast.unparse(node.test)
                 and node.lineno <= frame.f_lineno <= node.end_lineno for node in tree.body)


def priced(workdir: str) -> hardware_lib.Hardware | None:
  """What the run in a workdir was priced by, which it goes on with unless another is given; None where that is not
  known."""
  from kr_jax.costs import hardware
  try:
    return hardware.load(workdir)
  except ValueError as error:
    logging.getLogger('absl').warning('%s; the run goes on with the profiles that it would begin with', error)
    return None


def _hardware(given: Any) -> hardware_lib.Hardware:
  """What a run is priced by."""
  from kr_jax.costs import hardware
  if isinstance(given, hardware.Hardware):
    return given
  return hardware.read(shipped.config(given or 'hardware') if given is None or isinstance(given, str) else given)


def _of_functions(config: Mapping[str, Any]) -> Iterator[str]:
  """What is wrong with functions and modules of this program in the place of names."""
  verifier = None
  with contextlib.suppress(KeyError, TypeError, AttributeError):  # which `problems` says
    verifier = config['rewards']['verifier']
  if isinstance(verifier, str) and _would_run_again(verifier.rpartition(':')[0]):
    yield (f'rewards.verifier={verifier!r} is in the file that calls kr_jax.run, which would run again in each process '
           f'of verifiers: {_GUARD}')
  name = getattr(verifier, '__name__', 'verify') if callable(verifier) else ''
  if isinstance(verifier, str) and verifier.startswith('__main__:'):
    name = verifier.partition(':')[2]
  if name:
    name = name if name.isidentifier() else 'verify'  # <lambda>
    yield (f'rewards.verifier={verifier!r} is of this program or notebook, and verifiers run in processes of their '
           'own, behind walls, which cannot import it. Write it to a file (in a notebook: a cell that begins with '
           f"%%writefile verifiers.py), and set rewards.verifier='verifiers.py:{name}'")
