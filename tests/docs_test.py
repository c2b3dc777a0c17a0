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
CLOUD = ('gcloud', 'hf', 'gsutil', 'colab', 'pip')
INTERPRETERS = ('.venv/bin/python', 'python')
# Those with a help that is not a module's of Python.
SCRIPTS = ('launch/tpu.sh', 'launch/sweep.py', 'launch/soak.sh', 'launch/proof.sh')
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
        "'runs/python'", repr(str(tmp_path / 'run'))).replace(
        # What takes seconds to draw, to compile and to read is left out.
        "'uniform'\n", "'uniform'; config.record.page, config.mesh.devices, config.policy.num_layers = False, 1, 1; "
        "config.tasks.warm_start_split = 'warm_start[:256]'\n")
    if '>>>' in block:
      code.append(f'test = doctest.DocTestParser().get_doctest({block!r}, globals(), "snippet", None, 0)\n'
                  'sys.exit(1) if doctest.DocTestRunner().run(test, clear_globs=False).failed else None\n'
                  'globals().update(test.globs)')
    else:
      code.append(block)
  done = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr


def flags_of(module):
  """The flags that a module defines, those of its subcommands among them."""
  # These set up .venv before they say anything.
  module = {'launch/soak.sh': 'tests.soak', 'launch/proof.sh': 'tests.benchmarks.proof'}.get(module, module)
  if module in SCRIPTS:
    interpreter = [sys.executable] * module.endswith('.py')
    text = subprocess.run([*interpreter, ROOT / module, '--help'], text=True, capture_output=True, check=True).stdout
    found = re.findall(r'--(?:\[no\])?([\w-]+)', text)
  else:
    path = ROOT / (module.replace('.', '/') + '.py')
    text = (path if path.exists() else path.with_suffix('') / '__main__.py').read_text()
    found = re.findall(r"'--([\w-]+)'|DEFINE_\w+\(\s*'(\w+)'", text)
    found = [name for names in found for name in names if name] + ['help']
    if "f'--" in text:  # flags that are made of the fields of settings
      found += re.findall(r'(\w+)=', text)
  return {name.replace('-', '_') for name in found}


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


def test_commands_are_ones_that_there_are():
  lines = [[word for word in shlex.split(line) if not re.fullmatch(r'PYTHON=\S+', word)] for line in commands()]
  assert len(lines) > 20
  known = {}
  for script, *words in lines:
    if script == 'launch/test.sh':
      assert all((ROOT / word).exists() for word in words if word.startswith('tests')), words
    elif script.startswith('launch/') and not words:
      assert (ROOT / script).exists(), script
    else:
      check_command(script, words, known)


def check_command(script, words, known):
  """known: flags_of by module, which grows."""
  words = words[:words.index('--')] if '--' in words else words  # behind it stand flags of another program
  flags = {name: value for name, _, value in (word.partition('=') for word in words if word.startswith('--'))}
  module = script if script in SCRIPTS else words[1] if script in INTERPRETERS else 'kr_jax.main'
  if script not in (*INTERPRETERS, *SCRIPTS):
    assert script == 'launch/local.sh', script
    check_config(words[0] if words and not words[0].startswith('--') else 'configs/ciphers.py', flags)
  if module not in known:
    known[module] = flags_of(module)
  of_module = known[module]
  assert of_module, module
  if script == 'launch/tpu.sh':
    assert words[0] in re.search(r'\b(up [|][^)]*)\)', (ROOT / script).read_text())[1].split(' | '), words
  for flag in flags:
    name = flag.removeprefix('--').replace('-', '_')
    name = 'hardware' if name.startswith('hardware.') else name  # a figure of it
    assert name.startswith('config.') or name in of_module, (module, flag)


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
