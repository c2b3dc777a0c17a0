r"""The verifier `python_tests`: whether a completion's program passes all tests of its task.

The program runs in a process of its own, behind the walls of walls.py. The verdict does not rest on what the program
says of itself: it gets arguments or its stdin, and never what is expected. What it returns or prints is compared
elsewhere, as plain data (calls.py). The tests of a task are of one of three forms, in its info, which is JSON:

    {"form": "calls", "entry_point": "f", "tests": [{"input": [1, 2], "output": 3}, ...]}       f(1, 2) returns 3
    {"form": "stdin", "tests": [{"input": "1 2\n", "output": "3\n"}, ...]}                    its stdout is this
    {"form": "asserts", "tests": ["assert f(1, 2) == 3", ...], "setup": "import math"}        none fails

and may have "seconds", of all tests together (4.0), "memory_mb" of a process (1024), "prompt", the code that the
completion goes on with, "imports", whether names of the standard library are imported for the program as
LiveCodeBench does, and instead of "tests" the same "packed": JSON, by zlib, in base64.

Sources: the comparisons of Chen et al. 2021, arXiv 2107.03374 (HumanEval); Austin et al. 2021, arXiv 2108.07732
(MBPP); Jain et al. 2024, arXiv 2403.07974 (LiveCodeBench). Differs: tests never run in the program's process; a
program has the standard library alone; one that exits with another code than 0 has failed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
from collections.abc import Callable, Iterable
import concurrent.futures
import contextlib
import decimal
import functools
import json
import marshal
import math
import os
import pathlib
import sys
import tempfile
import time
from typing import Any, NamedTuple
import zlib

from kr_jax.rewards import calls
from kr_jax.rewards import code_blocks
from kr_jax.rewards import walls
from kr_jax.rewards.verdicts import Verdict
from kr_jax.types import Task

FORMS = ('calls', 'stdin', 'asserts')
LONGEST_ANSWER = 200_000  # characters of a completion after its thoughts; a longer one is wrong
MOST_UNPACKED = 2 ** 29  # bytes of a task's tests
_RECURSION = 50_000  # limit of programs whose names are imported, as LiveCodeBench sets it


class _Tests(NamedTuple):
  """The tests of a task, from its info."""

  form: str
  tests: tuple[Any, ...]
  entry_point: str
  setup: str
  prompt: str
  seconds: float
  memory_mb: int
  imports: bool
  calls: tuple[_Call, ...] | None = None  # the same tests as calls; None: they are no calls


class _Fault(Exception):
  """The tests could not be run, whatever the program."""


def _head(info: str) -> dict[str, Any]:
  """What an info holds, but for its tests checked. Raises ValueError that says what is wrong with it."""
  try:
    found = {'entry_point': '', 'setup': '', 'prompt': '', 'seconds': 4.0, 'memory_mb': 1024, 'imports': False,
             **json.loads(info)}
    if not {'tests', 'packed'} & found.keys():
      raise LookupError('tests')
    form, is_name = found['form'], found['entry_point'].isidentifier()
    if not all(isinstance(found[name], str) for name in ('setup', 'prompt')):
      raise TypeError('setup or prompt is no text')
    holds = 0 < found['seconds'] < math.inf and found['memory_mb'] >= 64
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise ValueError(f'it is not JSON with "form" and "tests": {error!r}') from error
  if form not in FORMS:
    raise ValueError(f'its form {form!r} is not one of {FORMS}')
  if not holds:
    raise ValueError(f'seconds={found["seconds"]} must be above 0, memory_mb={found["memory_mb"]} at least 64')
  if form == 'calls' and not is_name:
    raise ValueError(f'its entry_point {found["entry_point"]!r} is not the name of a function')
  return found


@functools.lru_cache(maxsize=16)  # a step has many completions of a task
def _read(info: str) -> _Tests:
  """The tests of an info. Raises ValueError that says what is wrong with it."""
  found = _head(info)
  try:
    if 'packed' in found:
      unpacker = zlib.decompressobj()
      unpacked = unpacker.decompress(base64.b64decode(found['packed'], validate=True), MOST_UNPACKED)
      if not unpacker.eof:
        raise ValueError(f'"packed" is cut, or above {MOST_UNPACKED} bytes')
      found['tests'] = json.loads(unpacked)
    tests = _Tests(**{name: found[name] for name in _Tests._fields if name != 'calls'})
    tests = tests._replace(tests=tuple(tests.tests))
  except (ValueError, TypeError, zlib.error) as error:
    raise ValueError(f'its tests cannot be read: {error!r}') from error
  if not tests.tests:
    raise ValueError('it has no test')
  kind = str if tests.form == 'asserts' else dict
  for test in tests.tests:
    if not isinstance(test, kind) or kind is dict and not test.keys() >= {'input', 'output'}:
      raise ValueError(f'{test!r:.100} is no test of the form {tests.form!r}')
  if tests.form == 'asserts' and any(code_blocks.parse(source) is None for source in (tests.setup, *tests.tests)):
    raise ValueError('a test is not Python')
  if tests.form == 'calls':
    return tests._replace(calls=tuple(
        _Call(tests.entry_point, calls.pack(x['input']), calls.pack({}), 'equal', calls.pack(x['output']))
        for x in tests.tests))
  return tests._replace(calls=_calls_of(tests)) if tests.form == 'asserts' else tests


def _of_task(read: Callable[[str], Any], task: Task) -> Any:
  """What is read of a task's info. Raises ValueError that names the task."""
  try:
    return read(task.info)
  except ValueError as error:
    raise ValueError(f'the info {task.info[:100]!r} of {task.id} is none of the verifier python_tests: '
                     f'{error}') from error


def check(tasks: Iterable[Task], timeout_s: float) -> None:
  """Raises ValueError for a task without tests, or one whose tests may take as long as a verdict, timeout_s."""
  for task in tasks:
    head = _of_task(_head, task)
    if 'packed' not in head:  # the tests of all tasks of a competition are gigabytes
      _of_task(_read, task)
    if head['seconds'] >= timeout_s:
      raise ValueError(f'the tests of {task.id} may take {head["seconds"]} seconds, and rewards.timeout_s={timeout_s} '
                       f'would end the verdict first; set rewards.timeout_s above {head["seconds"]}')


def verify(completion: str, task: Task) -> Verdict:
  """Whether the completion's program passes all tests of the task.

  The verdict is without an answer where there is no program, and None where the tests could not be run, which is no
  fault of the program. Raises ValueError where the task's info holds no tests.
  """
  return _verdict(completion, _of_task(_read, task), share=False)


def scored(completion: str, task: Task) -> Verdict:
  """As `verify`; the reward is the share of the tests that the program passes, in 0..1."""
  return _verdict(completion, _of_task(_read, task), share=True)


def _verdict(completion: str, tests: _Tests, share: bool) -> Verdict:
  if len(completion.rpartition('</think>')[2]) > LONGEST_ANSWER:
    return Verdict(False)
  try:
    code = code_blocks.program(completion, tests.prompt, tests.entry_point)
    if code is None:
      return Verdict(False, answered=False)
    if (tree := code_blocks.parse(code)) is None:
      return Verdict(False)
    if tests.imports:
      code = code_blocks.with_imports(code, tree)
  except RecursionError:  # it is too deep to be written anew
    return Verdict(False)
  try:
    with _folder() as folder:
      path = pathlib.Path(folder, 'program.py')
      path.write_text(code, encoding='utf-8', errors='replace')
      run = _Run(tests, folder, share)
      passed, total = run.stdin() if tests.form == 'stdin' else run.calls() if tests.calls else run.asserts()
  except (_Fault, OSError) as error:
    return Verdict(None, reason=f'the tests could not be run: {error}')
  return Verdict(passed == total, passed / total if share else None)


@contextlib.contextmanager
def _folder():
  folder = tempfile.mkdtemp(prefix='program-')
  try:
    _open_to_all(folder)
    yield folder
  finally:
    walls.remove(folder)


def _open_to_all(path: str) -> None:
  """Lets the processes of a verdict use a path where they are other users than this one."""
  with contextlib.suppress(OSError):  # a walled process may not, and need not: they are its own user
    os.chmod(path, 0o777)


@functools.cache
def _start() -> str:
  """What starts calls.py: compiled, and no file, as a program could change a file in its folder."""
  path = pathlib.Path(calls.__file__)
  code = binascii.b2a_base64(marshal.dumps(compile(path.read_bytes(), 'calls.py', 'exec')), newline=False).decode()
  return f"import binascii, marshal; exec(marshal.loads(binascii.a2b_base64('{code}')))"


class _Run:
  """One program and its tests. Each form returns the numbers of tests that passed, and of all.

  share: whether a failed test leaves the others to run.
  """

  def __init__(self, tests: _Tests, folder: str, share: bool):
    self._tests, self._folder, self._share = tests, folder, share
    self._end = time.monotonic() + tests.seconds

  def _process(self, role: str, stdin: bytes = b'', output_kb: int = 256) -> walls.Finished | None:
    """What a process in a role of calls.py has written; None: time is up. Raises _Fault if it did not start."""
    seconds = self._end - time.monotonic()
    if seconds <= 0:
      return None
    finished = walls.run(
        [sys.executable, '-I', '-S', '-E', '-c', _start(), role, self._folder,
         str(_RECURSION if self._tests.imports else 0)], stdin=stdin, folder=self._folder,
        limits=walls.Limits(seconds=seconds, memory_mb=self._tests.memory_mb, output_kb=output_kb))
    if not finished.stderr.startswith(calls.READY):
      raise _Fault(f'a process ended with {finished.code} before it started: {finished.stderr[-300:]!r}')
    return finished

  def calls(self) -> tuple[int, int]:
    """Calls, whose answers are compared here."""
    tests = self._tests.calls
    lines = [json.dumps(['call', test.function, test.arguments, test.named, False]) for test in tests]
    longest = [4 * len(json.dumps(test.expected)) + 4096 for test in tests]
    finished = self._process('answer_stdin', '\n'.join([*lines, '']).encode(), sum(longest) // 1024 + 1)
    answers = finished.stdout.split(b'\n')[:-1] if finished else []
    passed = [_passes(answer, test, as_list=self._tests.form == 'calls')
              for answer, test, limit in zip(answers, tests, longest)
              if len(answer) <= limit]  # what is much longer is not equal, and need not be read
    return sum(passed), len(tests)

  def stdin(self) -> tuple[int, int]:
    passed = 0
    for test in self._tests.tests:
      finished = self._process('main', test['input'].encode(), len(test['output'].encode()) // 512 + 64)
      right = finished is not None and not finished.timed_out and finished.code == 0 and same_output(
          finished.stdout.decode(errors='replace'), test['output'])
      passed += right
      if not right and not self._share:
        break
    return passed, len(self._tests.tests)

  def asserts(self) -> tuple[int, int]:
    """Assertions, in a process that calls the program's process; named pipes of the folder link both."""
    tests, pipes = json.dumps(_harness(self._tests, self._share)).encode(), {}
    for name in ('requests', 'answers'):
      path = os.path.join(self._folder, name)
      os.mkfifo(path)
      _open_to_all(path)
      pipes[name] = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # open for both, so that no process waits for the other
    try:
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        candidate = pool.submit(self._then_end, pipes['answers'], 'answer_pipes')
        finished = self._then_end(pipes['requests'], 'tests', tests)
    finally:
      for pipe in pipes.values():
        os.close(pipe)
    notes = {'passed': 0, 'failed': 1, 'fault': ''}  # where time was up, or what the program answered was too much
    with contextlib.suppress(ValueError):
      notes = json.loads(finished.stdout) if finished else notes
    if notes['fault']:
      raise _Fault(notes['fault'])
    nodes = (node for test in self._tests.tests for node in ast.walk(code_blocks.parse(test)))
    total = max(1, sum(isinstance(node, ast.Assert) and not calls.is_empty(node) for node in nodes))
    if not notes['failed']:
      return total, total
    candidate.result()  # raises _Fault if the program's process did not start
    total = max(total, notes['passed'] + notes['failed'])
    return min(notes['passed'], total - 1), total

  def _then_end(self, pipe: int, role: str, stdin: bytes = b'') -> walls.Finished | None:
    """Runs a process, then tells the one at the other end of a pipe that it ended, by an empty line."""
    try:
      return self._process(role, stdin)
    finally:
      with contextlib.suppress(BlockingIOError):  # a pipe that is full has no reader
        os.write(pipe, b'\n')


# Tests of one call each, whose answers are compared here.


class _Call(NamedTuple):
  """function(*arguments, **named), as `calls.pack` writes values; what is returned must be ... expected."""

  function: str
  arguments: Any
  named: Any
  relation: str  # 'equal' or 'is' to what is expected, or 'truth': its truth is the expected one
  expected: Any


def _passes(answer: bytes, test: _Call, as_list: bool) -> bool:
  """Whether an answer of the program, any bytes, is the expected one."""
  try:
    found = calls.unpack(json.loads(answer)['value'], lambda n: _Opaque())
    expected = calls.unpack(test.expected, lambda n: _Opaque())
    if as_list and isinstance(found, tuple):
      found = list(found)
    if test.relation == 'truth':
      return bool(found) is expected
    return found is expected if test.relation == 'is' else bool(found == expected)
  except Exception:  # what the program wrote is no answer; RecursionError too
    return False


class _Opaque:
  """An object of the program: equal to nothing."""

  def __eq__(self, other: Any) -> bool:
    return False

  __hash__ = object.__hash__


def _calls_of(tests: _Tests) -> tuple[_Call, ...] | None:
  """Assertions that are of one call each, with literals; None: some are not."""
  if not all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in code_blocks.parse(tests.setup).body):
    return None
  found = []
  for statement in (x for test in tests.tests for x in _statements(code_blocks.parse(test), tests.entry_point)):
    if not isinstance(statement, ast.Assert):
      return None
    try:
      if not calls.is_empty(statement):
        found.append(_call_of(statement.test, tests.entry_point))
    except (ValueError, TypeError, SyntaxError, RecursionError):
      return None
  return tuple(found) or None


def _statements(tree: ast.Module, entry_point: str) -> list[ast.stmt]:
  """The statements of tests; of 'def check(candidate): ...' and 'check(f)', as HumanEval has them, those inside."""
  body = [x for x in tree.body if not (isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == 'METADATA')]
  if (len(body) == 2 and isinstance(body[0], ast.FunctionDef) and body[0].name == 'check'
      and ast.unparse(body[0].args) == 'candidate' and ast.unparse(body[1]) == f'check({entry_point})'):
    return body[0].body
  return body


def _call_of(test: ast.expr, entry_point: str) -> _Call:
  """The call of f(...) == x, f(...) is True, f(...), not f(...). Raises ValueError for another condition."""
  relation, call, expected = 'truth', test, True
  if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
    call, expected = test.operand, False
  elif isinstance(test, ast.Compare) and len(test.ops) == 1:
    call, expected = test.left, ast.literal_eval(test.comparators[0])
    relation = {ast.Eq: 'equal', ast.Is: 'is'}.get(type(test.ops[0]), '')
    if not relation or relation == 'is' and not any(expected is x for x in (None, True, False)):
      raise ValueError('another comparison')
  if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
    raise ValueError('no call')
  function = entry_point if call.func.id == 'candidate' else call.func.id
  if any(keyword.arg is None for keyword in call.keywords):
    raise ValueError('arguments that are not written out')
  literal = lambda node: calls.pack(ast.literal_eval(node))
  return _Call(function, [literal(x) for x in call.args],
               calls.pack({x.arg: ast.literal_eval(x.value) for x in call.keywords}), relation, calls.pack(expected))


def _harness(tests: _Tests, share: bool) -> dict[str, Any]:
  """What a process that runs tests reads (calls.py)."""
  head = code_blocks.parse(f'{tests.prompt}\n    pass\n') if tests.prompt else None
  helpers = [ast.unparse(x) for x in head.body if getattr(x, 'name', '') != tests.entry_point] if head else []
  setup = '\n'.join([*helpers, tests.setup])
  trees = [code_blocks.parse(source) for source in (setup, *tests.tests)]
  used, bound = set(), {'candidate', tests.entry_point}
  for node in (x for tree in trees for x in ast.walk(tree)):
    if isinstance(node, ast.Name):
      (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      bound.add(node.name)
    elif isinstance(node, ast.arg):
      bound.add(node.arg)
    elif isinstance(node, ast.alias):
      bound.add((node.asname or node.name).partition('.')[0])
  free = {name for name in used - bound if not hasattr(builtins, name)}
  modules = free & sys.stdlib_module_names
  return {'tests': tests.tests, 'setup': '\n'.join([*(f'import {x}' for x in sorted(modules)), setup]),
          'entry_point': tests.entry_point, 'program_names': sorted(free - modules), 'all': share}


# Comparing what is printed.


def same_output(printed: str, expected: str) -> bool:
  """Whether a program printed what is expected: the same lines up to blanks at their ends, or the same numbers.

  Blank lines at either end do not count. In a line that differs, both must be numbers, which are equal one by one
  as decimals, exactly; so LiveCodeBench compares.
  """
  lines, others = ([line.strip() for line in text.strip().split('\n')] for text in (printed, expected))
  return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(line: str, other: str) -> bool:
  if line == other:
    return True
  try:
    return [*map(decimal.Decimal, line.split())] == [*map(decimal.Decimal, other.split())]
  except decimal.InvalidOperation:  # one is no number
    return False
