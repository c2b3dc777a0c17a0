"""Calls from one process to another: how values cross, and what the processes of a program's tests run.

A program that is tested answers calls in a process of its own, the candidate. Who calls it, the verifier or a process
that runs published tests, gets plain values: numbers, texts, and lists, tuples, sets and dicts of them. Any other
object stays in the candidate, and is there a handle that is equal to nothing. So no object of the program, with an
`__eq__` of its own, is ever compared, and the program never holds what its answers are compared with.

    request  one line of JSON: [operation, target, ...], the operations of `_Candidate`
    answer   one line of JSON: {'value': ..., 'arguments': [...]} or {'raised': names of an exception's classes}

Imports the standard library alone: the processes start with nothing else, and run this file.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
import itertools
import os
import sys
import types

Any = object  # in annotations: `typing` takes as long to import as Python to start
READY = b'ready\n'  # on stderr before anything of the program is read: the process has started
ITEMS = 10_000  # of an iterator, how many cross
LONGEST_ANSWER = 2 ** 22  # bytes of a line
_SCALARS = {type(None), bool, int, float, str}
_CONTAINERS = {'tuple': tuple, 'set': set, 'frozenset': frozenset}


def pack(x: Any, keep: Callable[[Any], str | int] = lambda x: -1) -> Any:
  """A value as JSON can hold it; an object of a class that cannot cross is {'handle': keep(object)}.

  Of a subclass of a plain class only the plain part crosses. Raises RecursionError for a value that is too deep.
  """
  if type(x) in _SCALARS:
    return x
  if isinstance(x, list):
    return list(x) if set(map(type, x)) <= _SCALARS else [pack(y, keep) for y in x]
  for name, container in _CONTAINERS.items():
    if isinstance(x, container):
      return {name: pack(list(x), keep)}
  if isinstance(x, dict):
    return {'dict': [pack(list(x.keys()), keep), pack(list(x.values()), keep)]}
  for scalar in (int, float, str):
    if isinstance(x, scalar):
      return getattr(scalar, {int: '__int__', float: '__float__', str: '__str__'}[scalar])(x)
  if isinstance(x, complex):
    return {'complex': [x.real, x.imag]}
  if isinstance(x, (bytes, bytearray)):
    return {type(x).__name__: x.hex()}
  if isinstance(x, range):
    return {'range': [x.start, x.stop, x.step]}
  if isinstance(x, type) and getattr(builtins, x.__name__, None) is x:
    return {'class': x.__name__}
  if isinstance(x, Iterator):
    return {'iterator': pack(list(itertools.islice(x, ITEMS)), keep)}
  return {'handle': keep(x)}


def unpack(x: Any, held: Callable[[int], Any]) -> Any:
  """The value of what `pack` made; held: the object that stands for a handle.

  Raises ValueError, TypeError or LookupError for what `pack` did not make, RecursionError for what is too deep.
  """
  if type(x) in _SCALARS:
    return x
  if isinstance(x, list):
    return x if set(map(type, x)) <= _SCALARS else [unpack(y, held) for y in x]
  (name, inner), = x.items()
  if name in (*_CONTAINERS, 'iterator', 'dict') and not isinstance(inner, list):
    raise ValueError(f'{name} of no list')  # of a range it could have no end
  if name in _CONTAINERS:
    return _CONTAINERS[name](unpack(inner, held))
  if name == 'dict':
    keys, values = (unpack(part, held) for part in inner if isinstance(part, list))
    return dict(zip(keys, values, strict=True))
  if name == 'iterator':
    return iter(unpack(inner, held))
  if name == 'class':
    found = getattr(builtins, inner)
    return found if isinstance(found, type) else held(-1)
  if name in ('bytes', 'bytearray'):
    return getattr(builtins, name).fromhex(inner)
  return {'complex': lambda pair: complex(*pair), 'range': lambda three: range(*three), 'handle': held}[name](inner)


def dump(x: Any) -> str:
  """JSON of what `pack` made."""
  import json  # here and below: a program that is run as a script starts without
  return json.dumps(x)


def load(text: str | bytes) -> Any:
  """What JSON holds. Raises ValueError for another text, RecursionError for one that is too deep."""
  import json
  return json.loads(text)


class _Candidate:
  """A program that answers calls. Nothing here is secret, and nothing is safe from the program."""

  def __init__(self, path: str):
    self._objects = []
    self._namespace = types.ModuleType('program')
    sys.modules['program'] = self._namespace
    self._failure = None
    try:
      with open(path, encoding='utf-8') as file:
        exec(compile(file.read(), 'program.py', 'exec'), vars(self._namespace))
    except BaseException as error:  # SystemExit too: a program that ends before it is called answers nothing
      self._failure = error

  def _keep(self, x: Any) -> int:
    self._objects.append(x)
    return len(self._objects) - 1

  def _find(self, target: str | int) -> Any:
    """The object of a handle or a name; a name may be of a method of the class Solution, as LeetCode has them."""
    if isinstance(target, int):
      return self._objects[target]
    names = vars(self._namespace)
    if target not in names and 'Solution' in names:
      return getattr(names['Solution'](), target)
    return names[target] if target in names else getattr(builtins, target)

  def answer(self, request: str) -> str:
    try:
      if self._failure is not None:
        raise self._failure
      operation, target, *rest = load(request)
      return dump(getattr(self, f'_{operation}')(self._find(target), *rest))
    except BaseException as error:
      return dump({'raised': [kind.__name__ for kind in type(error).__mro__]})

  def _call(self, function: Any, arguments: Any, named: Any, back: bool) -> dict[str, Any]:
    """back: whether the arguments return too, as the call left them."""
    arguments, named = unpack(arguments, self._find), unpack(named, self._find)
    value = pack(function(*arguments, **named), self._keep)
    return {'value': value, 'arguments': pack(list(arguments), self._keep) if back else []}

  def _get(self, x: Any, name: str) -> dict[str, Any]:
    return {'value': pack(getattr(x, name), self._keep)}

  def _set(self, x: Any, name: str, value: Any) -> dict[str, Any]:
    setattr(x, name, unpack(value, self._find))
    return {'value': None}


def _open(folder: str, name: str, mode: str) -> Any:
  return open(os.path.join(folder, name), mode, buffering=0 if mode == 'wb' else -1)


def _answer_calls(folder: str, linked: bool) -> None:
  """Runs the program and answers calls: of the named pipes of its folder if linked, else of stdin on stdout."""
  if linked:
    requests, answers = _open(folder, 'requests', 'rb'), _open(folder, 'answers', 'wb')
  else:
    requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb', buffering=0)
  null = os.open(os.devnull, os.O_RDWR)
  for standard in range(3):  # what the program prints is no answer
    os.dup2(null, standard)
  candidate = _Candidate(os.path.join(folder, 'program.py'))
  for line in iter(requests.readline, b''):
    if line == b'\n':  # the caller has ended
      break
    rest = candidate.answer(line.decode()).encode() + b'\n'
    while rest:
      rest = rest[answers.write(rest):]
  os._exit(0)  # threads of the program do not keep the process


def _run_main(folder: str) -> None:
  """Runs the program as a script, whose stdin and stdout are those of the process."""
  sys.argv[:] = ['program.py']
  sys.set_int_max_str_digits(50_000)
  with open(os.path.join(folder, 'program.py'), encoding='utf-8') as file:
    code = compile(file.read(), 'program.py', 'exec')
  sys.modules['__main__'] = script = types.ModuleType('__main__')
  exec(code, vars(script))


class Ended(BaseException):
  """The candidate answers no more, or a test failed that ends the others."""


class _Link:
  """The calls to a candidate, over the named pipes of a folder."""

  def __init__(self, folder: str):
    self._requests, self._answers = _open(folder, 'requests', 'wb'), _open(folder, 'answers', 'rb')

  def ask(self, operation: str, target: str | int, *rest: Any) -> dict[str, Any]:
    """The answer. Raises Ended, what the program raised, or ValueError for an answer that is none."""
    text = dump([operation, target, *rest]).encode() + b'\n'
    while text:
      text = text[self._requests.write(text):]
    line = self._answers.readline(LONGEST_ANSWER)
    if not line.strip() or not line.endswith(b'\n'):
      raise Ended('the program ended, or answered too much')
    try:
      answer = load(line)
      return {'value': unpack(answer['value'], lambda n: _Remote(self, n)),
              'arguments': unpack(answer.get('arguments', []), lambda n: _Remote(self, n))}
    except KeyError:
      raise _exception(answer) from None
    except (TypeError, AttributeError, RecursionError) as error:
      raise ValueError(f'an answer that is none: {error!r}') from error


def _exception(answer: Any) -> Exception:
  """The nearest built-in exception of what a program raised. Those that end loops are not among them."""
  names = answer.get('raised') if isinstance(answer, dict) else None
  for name in names if isinstance(names, list) else ():
    found = getattr(builtins, str(name), None)
    if isinstance(found, type) and issubclass(found, Exception) and found not in (StopIteration, StopAsyncIteration):
      try:
        return found()
      except TypeError:  # UnicodeDecodeError has arguments
        continue
  return RuntimeError('the program raised')


class _Remote:
  """An object of the program, a name or a handle of it. It is equal to nothing, and has no operators."""

  __slots__ = ('_link', '_target')

  def __init__(self, link: _Link, target: str | int):
    object.__setattr__(self, '_link', link)
    object.__setattr__(self, '_target', target)

  def __call__(self, *arguments: Any, **named: Any) -> Any:
    answer = self._link.ask('call', self._target, pack(list(arguments), _handle), pack(named, _handle), True)
    for before, after in zip(arguments, answer['arguments']):  # a program may change its arguments in place
      if type(before) is type(after) and before != after:
        _refill(before, after)
    return answer['value']

  def __getattr__(self, name: str) -> Any:
    return self._link.ask('get', self._target, name)['value']

  def __setattr__(self, name: str, value: Any) -> None:
    self._link.ask('set', self._target, name, pack(value, _handle))

  def __eq__(self, other: Any) -> bool:
    return False

  __hash__ = object.__hash__


def _handle(x: Any) -> str | int:
  """The name or handle of an object of the program. Raises Uncallable for an object of the tests that cannot cross."""
  if isinstance(x, _Remote):
    return x._target
  raise Uncallable(f'an argument of a test is a {type(x).__name__}, which cannot cross to the program')


class Uncallable(BaseException):
  """Tests that cannot be run this way: a fault of the task, not of the program."""


def _refill(x: Any, content: Any) -> None:
  if isinstance(x, (list, bytearray)):
    x[:] = content
  elif isinstance(x, (dict, set)):
    x.clear()
    x.update(content)


class _Notes:
  """What came of the assertions that ran."""

  def __init__(self, all_of_them: bool):
    self._all_of_them, self.passed, self.failed = all_of_them, 0, 0

  def note(self, passed: Any = False) -> None:
    """Notes an assertion. Raises Ended if it failed and the others do not matter."""
    if passed:
      self.passed += 1
      return
    self.failed += 1
    if not self._all_of_them:
      raise Ended('a test failed')


def is_empty(assertion: Any) -> bool:
  """Whether the syntax tree of an assertion is 'assert True', which tells nothing of a program."""
  return getattr(assertion.test, 'value', None) is True


def noted(source: str) -> Any:
  """The syntax tree of tests whose assertions call note_(condition), or note_() where the condition raises."""
  import ast

  class Assertions(ast.NodeTransformer):
    """assert X, Y  ->  try: note_(X)  except Exception: note_()"""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
      if is_empty(node):
        return node
      note = ast.parse('try:\n  note_(0)\nexcept Exception:\n  note_()').body[0]
      note.body[0].value.args = [node.test]
      return note

  return ast.fix_missing_locations(Assertions().visit(ast.parse(source)))


def _run_tests(folder: str) -> None:
  """Runs tests, a JSON object on stdin, against the candidate; prints what came of them.

  The object has 'tests', sources of Python; 'setup', a source that runs before; 'entry_point', the function that
  tests may call `candidate`; 'program_names', which stand for the program's own; and 'all', whether a failed
  assertion leaves the others to run.
  """
  if sys.platform == 'linux':
    import ctypes
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the program, of the same user, cannot read its memory
  task = load(sys.stdin.buffer.read())
  notes, fault = _Notes(task['all']), ''
  sys.stdout = open(os.devnull, 'w')  # what tests print is no result
  try:
    link = _Link(folder)
    names = {'__name__': 'tests', 'note_': notes.note}
    names.update({name: _Remote(link, name) for name in task['program_names']})
    if task['entry_point']:
      names[task['entry_point']] = names['candidate'] = _Remote(link, task['entry_point'])
    sources = [task['setup'], *task['tests']]
    if any('random' in source for source in sources):
      import random
      random.seed(0)  # a program's verdict is the same each time
    for source in sources:
      try:
        exec(compile(noted(source), 'tests.py', 'exec'), names)
      except Exception:
        notes.note()
  except Ended:
    notes.failed = max(notes.failed, 1)
  except Uncallable as error:
    fault = str(error)
  print(dump({'passed': notes.passed, 'failed': notes.failed, 'fault': fault}), file=sys.__stdout__)


ROLES: Mapping[str, Callable[[str], None]] = {
    'answer_stdin': lambda folder: _answer_calls(folder, linked=False),
    'answer_pipes': lambda folder: _answer_calls(folder, linked=True),
    'main': _run_main,
    'tests': _run_tests,
}


def main() -> None:
  """What a process runs: arguments are its role and its folder, then the limit of recursion, 0 for Python's own."""
  role, folder, recursion = sys.argv[1:]
  os.write(2, READY)
  builtins.exit = builtins.quit = sys.exit  # which programs use, and Python's module `site` would set
  if int(recursion):
    sys.setrecursionlimit(int(recursion))
  ROLES[role](folder)


if __name__ == '__main__':
  main()
