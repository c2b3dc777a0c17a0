"""Programs and their tests: right and wrong ones of each form, and programs that want to pass otherwise."""

import base64
import json
import os
import time
import zlib

import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.datasets import sets
from kr_jax.rewards import programs
from kr_jax.rewards import walls
from tests.make_datasets import FILES

TASK = types.Task(id='made/1', index=0, prompt='', answer='', difficulty=0, solution='', tokens=())
DOUBLED = ['assert f(1) == 2', 'assert f([1]) == [1, 1]', 'assert f("ab") == "abab"']
LINKED = ['assert abs(f(1.5) - 3) < 1e-6', 'for i in range(20):\n  assert f(i) == 2 * i']
LINES = [{'input': '1 2\n', 'output': '3\n'}, {'input': '5\n', 'output': '5\n'}]
PAIRS = [{'input': [[1, 2], 1], 'output': [2, 3]}, {'input': [[], 5], 'output': []}]


def task_of(form, tests, **info):
  return TASK._replace(info=json.dumps({'form': form, 'tests': tests, **info}))


def fenced(code):
  return f'Here it is:\n```python\n{code}\n```\nDone.'


def verdict(code, task):
  return programs.verify(fenced(code), task)


def outcomes(codes, task):
  """Whether each program is right; asserts that there is a verdict."""
  found = [verdict(code, task) for code in codes]
  assert all(x.right is not None and x.answered for x in found), found
  return [x.right for x in found]


@pytest.mark.parametrize('completion', ['', 'yes', 'I cannot.', '```rust\nfn f() {}\n```', '<think>f</think>'])
def test_a_completion_without_a_program_is_no_answer(completion):
  found = programs.verify(completion, task_of('asserts', DOUBLED))
  assert (found.right, found.answered) == (False, False)


def test_assertions_of_one_call():
  assert outcomes(['def f(x): return 2 * x', 'def f(x): return x + x', 'f = lambda x: 2 * x if x != 1 else 3',
                   'def f(x): return 2 * x if isinstance(x, int) else x', 'def g(x): return 2 * x', 'x = (',
                   'def f(x): raise ValueError', 'print(2)', 'raise KeyError\ndef f(x): return 2 * x',
                   'def f(x):\n  print("noise" * 99)\n  return 2 * x'], task_of('asserts', DOUBLED)) == [
                       True, True, False, False, False, False, False, False, False, True]


CONDITIONS = [  # of g(), what it returns if right, and if wrong; first those of one call
    ('assert g() == (1, 2)', '(1, 2)', '[1, 2]'), ('assert g() == [(1, 2)]', '[(1, 2)]', '[[1, 2]]'),
    ('assert g() == {1: "a", None: {2, 3}}', '{None: {3, 2}, 1: "a"}', '{1: "a"}'),
    ('assert g() == set()', 'set()', '[]'), ('assert g() == 0.1', '.1', '.1 + 1e-15'),
    ('assert g() == 1', 'True', '"1"'),
    ('assert g() == {"a": 2}', '__import__("collections").Counter("aa")', '{"a": 1}'),
    ('assert g() is True', 'True', '1'), ('assert g() is None', 'None', '0'), ('assert g()', '[0]', '[]'),
    ('assert not g()', '""', '"0"'), ('assert g() == 2, "no"', '2', 'None'),
    ('assert g() == -1.5e300', '-1.5e300', '0'),
    ('assert g() == [1] and True', '[1]', '[2]'), ('assert g() == 10 ** 20', '10 ** 20', '10 ** 20 + 1'),
    ('assert g() in (1, 2)', '2', '3'), ('assert g() != 2', '1', '2'),
    ('assert set(g()) == {1, 2}', '[2, 1, 2]', '[1]'),
    ('import math\nassert math.isclose(g(), .3, rel_tol=1e-3)', '.3 + 1e-9', '.31'),
    ('assert list(g()) == [0, 1]', 'range(2)', 'range(3)'),
    ('assert list(g()) == [0, 4]', '(4 * i for i in range(2))', 'map(str, [0, 4])'),
    ('assert len(g()) == 2 and all(x > 0 for x in g())', '[1, 2]', '[1, -2]'),
    ('assert g() == g() == 3', '3', 'object()'),
    ('try:\n  g()\n  raised = False\nexcept ValueError:\n  raised = True\nassert raised', 'int("x")', '1 / 0')]


@pytest.mark.parametrize('conditions', [CONDITIONS[:13], CONDITIONS[13:]], ids=['one call', 'others'])
def test_values_and_conditions(conditions):
  task = task_of('asserts', [test.replace('g()', f'g{i}()') for i, (test, _, _) in enumerate(conditions)])
  assert bool(programs._read(task.info).calls) == (conditions[0] == CONDITIONS[0])
  code = lambda which: '\n'.join(f'def g{i}(): return {x[which]}' for i, x in enumerate(conditions))
  assert verdict(code(1), task).right
  assert programs.scored(fenced(code(2)), task).reward == 0.0


def test_arguments_cross_and_come_back():
  tests = ['xs = [3, 1, 2]\nassert f(xs) is None\nassert xs == [1, 2, 3]']
  assert outcomes(['def f(xs): xs.sort()', 'def f(xs): return sorted(xs)'], task_of('asserts', tests)) == [True, False]
  named = task_of('asserts', ['assert f((1, "a"), key={2}, more=None) == ((1, "a"), {2}, None)'])
  assert outcomes(['def f(x, *, key, more): return x, key, more', 'def f(x, key, more): return list(x), key, more'],
                  named) == [True, False]
  types_ = task_of('asserts', ['assert f([1, "a", 2.5], int) == ["a", 2.5]'])
  assert outcomes(['def f(xs, kind): return [x for x in xs if not isinstance(x, kind)]', 'def f(xs, kind): return xs'],
                  types_) == [True, False]


def test_objects_of_the_program():
  """A test makes them, sets their attributes and gives them back."""
  task = task_of('asserts', ['assert total(pair) == 5', 'assert pair.b == 3'], setup='pair = Pair(2)\npair.b = 3')
  code = 'class Pair:\n  def __init__(self, a): self.a = a\ndef total(p): return p.a + p.b'
  assert outcomes([code, code.replace('p.b', 'p.a'), 'def total(p): return 5'], task) == [True, False, False]


def test_functions_of_the_program_are_arguments():
  task = task_of('asserts', ['print("a" * 10 ** 6)\nassert [twice(f, 2), twice(inner(), 3)] == [4, 5]'])
  code = 'def f(x): return x + 1\ndef twice(g, x): return g(g(x))\ndef inner(): return lambda x: x + 1'
  assert outcomes([code, code.replace('x + 1', 'x + 2')], task) == [True, False]


def test_a_test_may_use_modules_that_it_does_not_import():
  task = task_of('asserts', ['assert f(2) == sys.getsizeof([]) + math.floor(2.5)'])
  assert outcomes(['import sys\ndef f(x): return sys.getsizeof([]) + x', 'def f(x): return x'], task) == [True, False]


def test_the_process_of_tests_keeps_its_memory():
  """From the program, whose user is its own: PR_GET_DUMPABLE is 0."""
  task = task_of('asserts', ['import ctypes\nassert f() == ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)'])
  assert outcomes(['def f(): return 0', 'def f(): return 1'], task) == [True, False]


def test_stdin_and_stdout():
  task = task_of('stdin', LINES)
  assert outcomes([
      'print(sum(map(int, input().split())))', 'import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())), "")',
      'import sys\nfor line in sys.stdin:\n  print(sum(map(float, line.split())))\n\nexit()',
      'if __name__ == "__main__":\n  print(sum(int(x) for x in open(0).read().split()))',
      'print(3)', 'print("3\\n5")', 'input(); print("")', 'print(sum(map(int, input().split()))); 1 / 0',
      'print(sum(map(int, input().split()))); exit(1)'], task) == [True] * 4 + [False] * 5


@pytest.mark.parametrize('printed, expected, same', [
    ('3', '3\n', True), ('\n a \nb\t\n', 'a\nb', True), ('1 2', '1  2', True), ('1.50', '1.5', True),
    ('1e2', '100', True), ('a  b', 'a b', False), ('3\n\n4', '3\n4', False), ('0.3333', '0.33333', False),
    ('50000000000000001', '50000000000000000', False), ('', '0', False), ('3', '3 3', False), ('nan', 'nan', True),
    ('sNaN', '1', False), ('nan', 'NaN', False),
    ('x', '1', False), ('1e999999999', '1', False), ('YES', 'Yes', False), ('', '', True)])
def test_what_is_printed(printed, expected, same):
  assert programs.same_output(printed, expected) == same


def test_calls_of_a_function_or_of_a_method():
  task = task_of('calls', PAIRS, entry_point='f', imports=True)
  assert outcomes([
      'class Solution:\n  def f(self, xs: List[int], by: int) -> List[int]:\n    return [x + by for x in xs]',
      'def f(xs, by): return tuple(map(lambda x: x + by, xs))', 'def f(xs, by): return list(accumulate([], by)) or xs',
      'class Solution:\n  def g(self, xs, by): return [x + by for x in xs]'], task) == [True, True, False, False]
  objects = task_of('calls', [{'input': [{'a': [1]}], 'output': {'b': None}}], entry_point='f')
  codes = ['def f(x): return {"b": None} if x == {"a": [1]} else 0', 'def f(x): return x']
  assert outcomes(codes, objects) == [True, False]


def test_names_that_are_imported():
  code = 'c = Counter(input())\nd = datetime.timedelta(1)\nprint(max(c.values()), lcm(2, 3), d.days, pow(2, 3, 5))'
  tests = [{'input': 'abb', 'output': '2 6 1 3'}]
  assert verdict(code, task_of('stdin', tests, imports=True)).right
  assert not verdict(code, task_of('stdin', tests)).right


def test_a_share_of_the_tests():
  share = lambda code, task: programs.scored(fenced(code), task)
  for form, tests, code, right, expected in (
      ('asserts', DOUBLED, 'def f(x): return x * 2 if x != 1 else 0', False, 2 / 3),
      ('asserts', DOUBLED, 'def f(x): return 2 * x', True, 1.0), ('asserts', DOUBLED, 'x = 1', False, 0.0),
      ('asserts', ['assert True\nassert f(1) > 2', 'assert f(2)'], 'def f(x): return 0', False, 0.0),
      ('asserts', ['assert f(1) != 2', 'assert f(2) != 2', 'assert f(3) > 2', 'assert f(1) < f(2) / 0'],
       'def f(x): return x', False, 0.5),
      ('stdin', LINES, 'print(5)', False, 0.5), ('calls', PAIRS, 'def f(x, y): return []', False, 0.5)):
    found = share(code, task_of(form, tests, entry_point='f'))
    assert (found.right, found.reward) == (right, pytest.approx(expected)), (form, code)
  assert share('pass', task_of('stdin', LINES)).reward == 0.0


def test_solutions_of_the_published_sets():
  """Of made-up rows: what is published is right, by each of its forms, and something else is not."""
  seen = 0
  for name, rows in FILES.items():
    dataset = name.partition('/')[0]
    for fields in map(sets.SETS[dataset].task, rows) if dataset in ('mbpp', 'mbpp_sanitized', 'human_eval') else ():
      task = TASK._replace(info=fields['info'])
      assert programs.verify(fields['solution'], task).right, task
      seen += 1
  assert seen == 8 and not verdict('def nothing(): pass', task).right
  bodies = [(row['canonical_solution'], sets.human_eval_task(row)) for row in FILES['human_eval/HumanEval.jsonl.gz']]
  for (body, task), other in zip(bodies, reversed(bodies)):
    assert programs.verify(body, TASK._replace(info=task['info'])).right
    assert not programs.verify(other[0], TASK._replace(info=task['info'])).right
  solved = ['print(sum(map(int, input().split())))', 'class Solution:\n  def larger(self, a, b): return max(a, b)',
            'print(int(input()) / 2)']
  rows = [row for name in FILES if name.startswith('live_code') for row in FILES[name]]
  for i, row in enumerate(rows):
    task = TASK._replace(info=sets.live_code_task(row)['info'])
    assert [programs.verify(fenced(code), task).right for code in (solved[i], solved[i - 1])] == [True, False]


# Programs that want to pass otherwise. Each of them is right by one of the tests at the most.

FORGED = {
    'exits': 'import sys\nsys.exit(0)',
    'exits in a call': 'import os\ndef f(x): os._exit(0)',
    'exits at the end': 'import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0',
    'prints': '''
print("passed")
print('{"value": 2, "arguments": []}\\n' * 3)
print('{"passed": 9, "failed": 0, "fault": ""}')
''',
    'is equal to all': '''
class A:
  def __eq__(self, x): return True
  def __ne__(self, x): return False
  __hash__ = None
def f(x): return A()
''',
    'is an int that is equal to all': '''
class A(int):
  def __eq__(self, x): return True
  def __hash__(self): return 0
  def __lt__(self, x): return True
def f(x): return A(7)
''',
    'is a list that is equal to all': 'class A(list):\n  def __eq__(self, x): return True\ndef f(x): return A([7])',
    'is a text that is equal to all': '''
class A(str):
  def __eq__(self, x): return True
  def __hash__(self): return 0
def f(x): return A("z")
''',
    'has operators': '''
class A:
  def __sub__(self, x): return 0
  __abs__ = __rsub__ = __float__ = lambda self, *x: 0.0
  __lt__ = __gt__ = __eq__ = __bool__ = lambda self, *x: True
def f(x): return A()
''',
    'claims another class': '''
class A:
  __class__ = int
  def __eq__(self, x): return True
  def __index__(self): return 2
def f(x): return A()
''',
    'patches builtins': '''
import builtins
for name in ("AssertionError", "Exception", "compile", "exec", "eval", "repr"):
  setattr(builtins, name, lambda *x, **y: True)
def f(x): return 0
''',
    'patches json': '''
import json, ast
json.dumps = lambda *x, **y: '{"value": true}'
json.loads = ast.literal_eval = lambda *x: 1
def f(x): return 0
''',
    'patches os': '''
import os
os.write = lambda *x: 0
os.dup2 = os.close = lambda *x: None
def f(x): return 0
''',
    'patches its process': '''
import sys, gc
for m in list(sys.modules.values()):
  for n in ("pack", "unpack", "note_", "_exception"):
    if hasattr(m, n): setattr(m, n, lambda *x, **y: True)
for g in gc.get_objects():
  if isinstance(g, dict) and "pack" in g:
    g["pack"] = lambda *x, **y: True
def f(x): return 0
''',
    'looks through memory': '''
import gc, sys
seen = [x for x in gc.get_objects() if isinstance(x, (list, tuple, dict))]
frame = sys._getframe()
while frame:
  seen.append(dict(frame.f_locals)); frame = frame.f_back
found = [y for s in seen for y in (s.values() if isinstance(s, dict) else s)]
found = [y for y in found if isinstance(y, str) and ("assert" in y or "expected" in y)]
def f(x): return found[0]
''',
    'looks through files': '''
import os
found = ""
for folder in (".", "/tmp", os.environ.get("HOME", ".")):
  try:
    for n in os.listdir(folder)[:99]:
      if os.path.isfile(n): found += open(os.path.join(folder, n)).read(4096)
  except (OSError, ValueError): pass
def f(x): return found[:9]
''',
    'looks at what it was started with': '''
import os, sys
said = str(sys.argv) + str(dict(os.environ))
try:
  said += open("/proc/self/cmdline").read() + open("/proc/self/environ").read()
except OSError: pass
def f(x): return said[:99]
''',
    'looks at other processes': '''
import glob
said = ""
for p in glob.glob("/proc/[0-9]*/mem") + glob.glob("/proc/[0-9]*/cmdline"):
  try: said += open(p, errors="replace").read(99999)
  except (OSError, ValueError): pass
def f(x): return said[-9:]
''',
    'writes to all files': '''
import os
for fd in range(256):
  try: os.write(fd, b'{"value": 2, "arguments": []}\\n')
  except OSError: pass
def f(x): return 0
''',
    'answers tests': '''
import glob
for p in glob.glob("requests") + glob.glob("answers"):
  with open(p, "wb") as file:
    file.write(b'{"passed": 99, "failed": 0, "fault": ""}\\n\\n' * 9)
def f(x): return 0
''',
    'forks': 'import os\nfor _ in range(3): os.fork()\ndef f(x): return 0',
    'starts threads': '''
import threading, time
def g():
  while True: time.sleep(.01)
for _ in range(5): threading.Thread(target=g).start()
def f(x): return 0
''',
    'kills': '''
import os, signal
for pid in (os.getppid(), 0, -1):
  try: os.kill(pid, signal.SIGKILL)
  except OSError: pass
def f(x): return 0
''',
    'stops itself': 'import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return 0',
    'replaces its tests': '''
import glob
for p in glob.glob("*"):
  if p not in ("requests", "answers"): open(p, "w").write("raise SystemExit(0)")
def f(x): return 0
''',
    'ends loops': 'def f(x): raise StopIteration',
    'raises': 'def f(x): raise SystemExit(0)',
    'is too deep': 'def f(x):\n  y = []\n  for _ in range(10 ** 6): y = [y]\n  return y',
    'holds itself': 'def f(x):\n  y = []\n  y.append(y)\n  return y',
    'recurs': 'import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)',
    'is huge': 'def f(x): return "2" * 10 ** 8',
    'is a huge number': 'def f(x): return 1 << 10 ** 8',
    'is a range': 'def f(x): return range(10 ** 18)',
    'is slow to compare': 'def f(x): return {i * (2 ** 61 - 1) for i in range(9 ** 5)}',
    'takes memory': 'def f(x):\n  y = []\n  while True: y.append(bytearray(10 ** 8))',
}
SLOW = {
    'loops': 'while True: pass',
    'loops in a call': 'def f(x):\n  while True: pass',
    'prints for ever': 'while True: print("3\\n5" * 1000)',
    'has no end': 'def f(x):\n  while True: yield 2',
    'sleeps': 'import time\ntime.sleep(1e6)',
    'catches all': 'def f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass',
}


QUICK = ('exits', 'exits in a call', 'prints', 'is equal to all', 'is an int that is equal to all',
         'claims another class', 'patches json', 'writes to all files', 'ends loops', 'has operators')


def forms(**info):
  """Tasks of each form, which no program of these tables passes."""
  return {'calls': task_of('asserts', DOUBLED, **info), 'asserts': task_of('asserts', LINKED, **info),
          'stdin': task_of('stdin', LINES, **info)}


@pytest.mark.parametrize('name', QUICK)
def test_a_forged_verdict_is_wrong(name):
  task = forms(seconds=0.5, memory_mb=256)['asserts' if name in ('has operators', 'ends loops', 'prints') else 'calls']
  found = verdict(FORGED[name], task)
  assert found.right is False and found.answered


def forms_by_turns():
  """(name, form) of all programs; by default each in one form, so that each form has every third of them, the rest
  is exhaustive."""
  for i, name in enumerate(FORGED | SLOW):
    for k, form in enumerate(forms()):
      yield pytest.param(name, form, marks=pytest.mark.slow if i % 3 == k else pytest.mark.exhaustive)


@pytest.mark.parametrize('name, form', list(forms_by_turns()))
def test_a_forged_verdict_is_wrong_in_each_form(name, form):
  started = time.monotonic()
  found = programs.scored(fenced((FORGED | SLOW)[name]), forms(seconds=1.0, memory_mb=256)[form])
  assert found.right is False and found.reward < 1, found
  assert time.monotonic() - started < 5  # the limits hold


def test_nothing_is_left(tmp_path, monkeypatch):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  code = ('import os, subprocess, sys\nos.makedirs("a/" * 500)\nos.chmod("a", 0)\nopen("b", "w").write("x")\n'
          'if os.fork() == 0:\n  os.setsid()\n  import time\n  time.sleep(600)\ndef f(x): return 2 * x')
  assert verdict(code, task_of('asserts', DOUBLED)).right is not None
  assert not [*tmp_path.iterdir()]
  mine = [pid for pid in os.listdir('/proc') if pid.isdecimal() and _parent(pid) == os.getpid()]
  assert not any('sleep(600)' in _command(pid) for pid in mine)


def _parent(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return int(file.read().rpartition(')')[2].split()[1])
  except OSError:
    return 0


def _command(pid):
  try:
    with open(f'/proc/{pid}/cmdline') as file:
      return file.read()
  except OSError:
    return ''


def test_in_worker_processes():
  """Which are behind walls themselves, and share one step's programs."""
  tasks = [task._replace(id=f'made/{form}', verifier='python_tests', index=i)
           for i, (form, task) in enumerate(forms(seconds=1.0).items())]
  codes = ['def f(x): return 2 * x', 'def f(x): return 2 * x', 'print(sum(map(int, input().split())))']
  codes += [FORGED[name] for name in ('is equal to all', 'exits in a call', 'kills')]
  pairs = [(fenced(code), task) for code in codes for task in tasks]
  config = rewards.Config(verifier='python_tests', workers=2, timeout_s=5.0)
  with rewards.Workers(config) as workers:
    scores = workers.score([code for code, _ in pairs], [task for _, task in pairs])
  assert scores.verified_R.all(), scores.examples
  assert scores.verdict_R.tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 1] + [0] * 9


@pytest.mark.slow
def test_what_a_program_leaves_does_not_fail_others():
  """Files that fill the disk of the process, in a folder that may not be read, and below many folders."""
  leave = ('import os\nif %d: os.mkdir("a")\nelse:\n  for _ in range(1200): os.mkdir("a"); os.chdir("a")\n'
           'try:\n  for i in range(99): open("a/" * %d + str(i), "wb").write(bytes(15 << 20))\nexcept OSError: pass\n'
           'if %d: os.chmod("a", 0)\nos.chmod(".", 0)\ndef f(x): return 2 * x')
  codes = [leave % (1, 1, 1), 'def f(x): return 2 * x', leave % (0, 0, 0), 'def f(x): return x + x']
  task = forms()['calls']._replace(verifier='python_tests')
  with rewards.Workers(rewards.Config(verifier='python_tests', workers=1, timeout_s=5.0)) as workers:
    scores = workers.score(map(fenced, codes), [task] * 4)
    assert scores.verdict_R.all(), scores.examples


# Faults that are no program's.


def test_walls_that_fail_give_no_verdict(monkeypatch):
  task = task_of('asserts', DOUBLED)
  right = fenced('def f(x): return 2 * x')

  def fails(*_, **__):
    raise OSError('no more processes')

  monkeypatch.setattr(walls, 'run', fails)
  found = programs.verify(right, task)
  assert found.right is None and 'no more processes' in found.reason
  for form in forms().values():
    monkeypatch.setattr(walls, 'run', lambda *_, **__: walls.Finished(127, b'', b'cannot start', False))
    found = programs.verify(right, form)
    assert found.right is None and 'cannot start' in found.reason


def test_tests_that_cannot_be_run_give_no_verdict():
  found = verdict('def f(x): return x', task_of('asserts', ['assert f(lambda x: x) == 1']))
  assert found.right is None and 'cannot cross' in found.reason


@pytest.mark.parametrize('info, message', [
    ('', 'is not JSON with "form" and "tests"'), ('[]', 'is not JSON'), ('{"form": "asserts"}', 'is not JSON'),
    (dict(form='unit', tests=['x']), "form 'unit' is not one of"), (dict(form='stdin', tests=[]), 'no test'),
    (dict(form='stdin', tests=[{'input': '1'}]), 'is no test of the form'),
    (dict(form='calls', tests=['x'], entry_point='f'), 'is no test of the form'),
    (dict(form='calls', tests=PAIRS), "entry_point '' is not the name"),
    (dict(form='asserts', tests=['assert (']), 'a test is not Python'),
    (dict(form='stdin', tests=LINES, seconds=0), 'seconds=0 must be above 0'),
    (dict(form='stdin', tests=LINES, seconds='x'), 'is not JSON'),
    (dict(form='asserts', tests=DOUBLED, setup=1), 'is not JSON')])
def test_tasks_without_tests(info, message):
  task = TASK._replace(info=info if isinstance(info, str) else json.dumps(info))
  for function in (programs.check, programs.verify):
    with pytest.raises(ValueError, match='(?s)of made/1 is none of the verifier python_tests: .*' + message):
      function(*(([task], 5.0) if function is programs.check else ('x', task)))


def test_a_limit_above_that_of_verdicts():
  task = task_of('stdin', LINES, seconds=5)
  programs.check([task], 5.5)
  with pytest.raises(ValueError, match=r'the tests of made/1 may take 5 seconds, and rewards.timeout_s=5.0 would end'):
    programs.check([task], 5.0)


def test_packed_tests_are_the_same():
  packed = base64.b64encode(zlib.compress(json.dumps(LINES).encode())).decode()
  task = TASK._replace(info=json.dumps({'form': 'stdin', 'packed': packed}))
  assert programs._read(task.info).tests == tuple(LINES)
  task = task._replace(info=json.dumps({'form': 'stdin', 'packed': packed[:-8]}))
  programs.check([task], 5.0)  # which does not unpack the tests of all tasks
  with pytest.raises(ValueError, match='made/1 .*its tests cannot be read'):
    programs.verify(fenced('x = 1'), task)


@pytest.mark.slow
def test_a_program_that_is_too_long():
  started = time.monotonic()
  for text in ('x = 1\n', '`' * 99 + '\n', '(', '```python\n', '<answer>', '-', '    '):
    completion = text * (programs.LONGEST_ANSWER // len(text) + 1)
    assert programs.verify(completion, task_of('asserts', DOUBLED)) == (False, None, True, '')
    assert programs.verify(completion[:-len(text)], task_of('asserts', DOUBLED)).right is False
  assert time.monotonic() - started < 30


def test_calls_are_found_in_published_tests():
  found = lambda tests, **info: programs._read(task_of('asserts', tests, **info).info).calls
  check = ('METADATA = {"a": 1}\n\ndef check(candidate):\n  assert candidate(1, b=[2]) == (3,), "no"\n'
           '  assert True\ncheck(f)')
  call, = found([check], entry_point='f')
  assert (call.function, call.arguments, call.relation) == ('f', [1], 'equal')
  assert found(DOUBLED, setup='import math') and not found(DOUBLED, setup='x = 1')
  for test in LINKED + ['assert f(x) == 1', 'assert f(1) == x', 'assert f(1) > 0', 'assert f(*[1]) == 0', 'x = f(1)',
                        'assert f(1) == 1 == 1', 'assert a.f(1) == 1', 'assert f(1) is x', 'assert f(1) and f(2)']:
    assert found([test]) is None, test
