"""What the README files say can be done: snippets run, commands are ones that there are, links lead somewhere."""

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
CLOUD = ('gcloud', 'hf', 'gsutil')
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
    block = block.replace('checkpoints/Qwen3-4B', str(TINY)).replace("'export'", repr(str(tmp_path / 'export')))
    if '>>>' in block:
      code.append(f'test = doctest.DocTestParser().get_doctest({block!r}, globals(), "snippet", None, 0)\n'
                  'sys.exit(1) if doctest.DocTestRunner().run(test, clear_globs=False).failed else None\n'
                  'globals().update(test.globs)')
    else:
      code.append(block)
  done = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr


def known_flags(module):
  """The flags that a module's help names."""
  done = subprocess.run([sys.executable, '-m', module, '--helpfull' if module == 'kr_jax.main' else '--help'],
                        cwd=ROOT, text=True, capture_output=True)
  return set(re.findall(r'--(?:\[no\])?(\w+)', done.stdout)), done.stdout


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


@pytest.mark.slow
def test_commands_are_ones_that_there_are():
  lines, help_of = commands(), {}
  assert len(lines) > 20
  for line in lines:
    words = shlex.split(line)
    words = [word for word in words if not re.fullmatch(r'PYTHON=\S+', word)]
    flags = {name: value for name, _, value in (word.partition('=') for word in words if word.startswith('--'))}
    script = words[0]
    if script == 'launch/test.sh':
      paths = [word for word in words[1:] if word.startswith('tests')]
      assert all((ROOT / path).exists() for path in paths), line
      continue
    if script == '.venv/bin/python':
      module = words[2]
    else:
      assert script == 'launch/local.sh', line
      module = 'kr_jax.main'
      config = words[1] if len(words) > 1 and not words[1].startswith('--') else 'configs/arithmetic.py'
      check_config(config, flags)
    if module not in help_of:
      help_of[module] = known_flags(module)
    known, text = help_of[module]
    assert known, (line, text)
    for flag in flags:
      name = flag.removeprefix('--')
      if name.startswith('hardware.'):
        name = 'hardware'  # a figure of it
      if not name.startswith('config.'):
        assert name in known or any(name in known_flags_of for known_flags_of in _subcommands(module, words)), line


def _subcommands(module, words):
  """The flags of the first word behind a module that is a subcommand of it."""
  for word in words[3:4]:
    done = subprocess.run([sys.executable, '-m', module, word, '--help'], cwd=ROOT, text=True, capture_output=True)
    yield set(re.findall(r'--(\w+)', done.stdout))


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
