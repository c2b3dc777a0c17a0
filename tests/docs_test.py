"""What the README files say can be done: snippets run, commands are ones that there are, links lead somewhere."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import common
from kr_jax import knobs

ROOT = pathlib.Path(__file__).parents[1]
READMES = sorted(path for path in ROOT.rglob('README.md')
                 if not any(part.startswith('.') or part == 'runs' for part in path.relative_to(ROOT).parts))
CLOUD = ('gcloud', 'hf', 'gsutil', 'colab', 'pip')
INTERPRETERS = ('.venv/bin/python', 'python')
# Those with a help that is not a module's of Python.
SCRIPTS = ('launch/tpu.sh', 'launch/sweep.py')
# What stands in a checkpoint's place in snippets.
TINY = ROOT / 'tests' / 'data' / 'checkpoints' / 'qwen3'


def blocks(path, language):
  return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), re.M | re.S)


def commands():
  """Of blocks and of text and tables: lines that a reader may type."""
  found = {}
  for path in READMES:
    lines = [line for block in blocks(path, 'bash') for line in block.replace('\\\n', ' ').splitlines()]
    lines += re.findall(r'`((?:launch/|\.venv/bin/python -m )[^`]+)`', path.read_text())
    found |= {line.partition(' #')[0].strip(): path for line in lines if line.strip()}
  return sorted(line for line in found if line and shlex.split(line)[0] not in CLOUD)


@pytest.mark.slow
@pytest.mark.parametrize('path', [p for p in READMES if blocks(p, 'python')], ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_run(path, tmp_path):
  """Blocks of one file run one after the other; where they show >>>, they print what is shown."""
  code = ['import doctest, sys']
  for block in blocks(path, 'python'):
    block = block.replace('checkpoints/Qwen3-4B', str(TINY)).replace("'export'", repr(str(tmp_path / 'export'))).replace(
        "'runs/python'", repr(str(tmp_path / 'run')))
    if '>>>' in block:
      code.append(f'test = doctest.DocTestParser().get_doctest({block!r}, globals(), "snippet", None, 0)\n'
                  'sys.exit(1) if doctest.DocTestRunner().run(test, clear_globs=False).failed else None\n'
                  'globals().update(test.globs)')
    else:
      code.append(block)
  done = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr


# Helps of modules, each in a fork of a process that has loaded what most of them load.
HELPS = """
import json, os, runpy, sys
import absl.app, flax, jax, numpy, orbax.checkpoint, pyarrow, scipy.special, tensorflow_datasets

for i, words in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    output = os.open(f'{sys.argv[1]}/{i}', os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = words
    try:
      runpy.run_module(words[0], run_name='__main__', alter_sys=True)
    finally:
      sys.stdout.flush()
      os._exit(0)
  os.waitpid(child, 0)
"""


def helps(folder, lines):
  """The help of each of these lines of words: a module, and the subcommand that it may have."""
  asked = [[*words, '--helpfull' if words == ('kr_jax.main',) else '--help'] for words in lines]
  subprocess.run([sys.executable, '-W', 'ignore', '-c', HELPS, folder], cwd=ROOT, text=True, input=json.dumps(asked),
                 check=True, capture_output=True)
  return {words: (folder / str(i)).read_text() for i, words in enumerate(lines)}


def check_config(config, flags):
  """A config with its overrides is read as a run would read it."""
  path, _, variant = config.partition(':')
  namespace = {}
  exec(compile((ROOT / path).read_text(), path, 'exec'), namespace)
  made = namespace['get_config'](variant)
  overrides = {name.removeprefix('--config.'): value for name, value in flags.items() if name.startswith('--config.')}
  for name, value in overrides.items():
    section, _, knob = name.rpartition('.')
    tree = made[section] if section else made
    default = (common.base()[section] if section else common.base())[knob]
    tree[knob] = (value if isinstance(default, str) else eval(value, {}))
  knobs.read(made)


def asked_for(words):
  """The words whose help names the flags of a line: of its module, and of the first word behind it, which may be a
  subcommand."""
  if words[0] in SCRIPTS:
    return {(words[0],)}
  module = words[2] if words[0] in INTERPRETERS else 'kr_jax.main'
  behind = words[3:4] if words[0] in INTERPRETERS else []
  return {(module,), *((module, word) for word in behind if not word.startswith('-') and word != '...')}


@pytest.mark.slow
def test_commands_are_ones_that_there_are(tmp_path):
  lines = [[word for word in shlex.split(line) if not re.fullmatch(r'PYTHON=\S+', word)] for line in commands()]
  assert len(lines) > 20
  for words in lines:
    if words[0] == 'launch/test.sh':
      assert all((ROOT / word).exists() for word in words[1:] if word.startswith('tests')), words
    elif words[0].startswith('launch/') and len(words) == 1:
      assert (ROOT / words[0]).exists(), words
  lines = [words for words in lines if words[0] != 'launch/test.sh' and (words[0] not in SCRIPTS or len(words) > 1)
           and not re.fullmatch(r'launch/.*\.(yaml|ipynb)', words[0])]
  asked = set().union(*map(asked_for, lines))
  help_of = helps(tmp_path, sorted(asked - {(script,) for script in SCRIPTS})) | {
      (script,): subprocess.run([ROOT / script, '--help'], text=True, capture_output=True, check=True).stdout
      for script in SCRIPTS}
  for words in lines:
    if words[0] == 'launch/tpu.sh':
      assert re.search(rf'\b{words[1]} ', help_of[words[0],]), words
    words = words[:words.index('--')] if '--' in words else words  # behind it stand flags of another program
    flags = {name: value for name, _, value in (word.partition('=') for word in words if word.startswith('--'))}
    if words[0] not in (*INTERPRETERS, *SCRIPTS):
      assert words[0] == 'launch/local.sh', words
      check_config(words[1] if len(words) > 1 and not words[1].startswith('--') else 'configs/arithmetic.py', flags)
    known = {name.replace('-', '_') for of in asked_for(words)
             for name in re.findall(r'--(?:\[no\])?([\w-]+)', help_of[of])}
    assert known, (words, help_of)
    for flag in flags:
      name = flag.removeprefix('--').replace('-', '_')
      if name.startswith('hardware.'):
        name = 'hardware'  # a figure of it
      assert name.startswith('config.') or name in known, words


@pytest.mark.exhaustive
@pytest.mark.parametrize('line', [line for line in commands() if line.startswith('launch/test.sh') and ' -k ' in line])
def test_names_of_tests_are_of_some(line):
  done = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '-q', *shlex.split(line)[1:]], cwd=ROOT,
                        text=True, capture_output=True)
  assert done.returncode == 0, done.stdout[-2000:]


def test_links_lead_somewhere():
  for path in READMES:
    for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
      if '://' not in link:
        assert (path.parent / link).exists(), (path, link)


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 160
