"""The command line: all that is wrong at once, each in a line, and a short help."""

import io
import os
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags
import pytest

from kr_jax import arguments
from kr_jax import exits
from kr_jax.arguments import Mode

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
MODES = {'train': Mode('the loop', ('config', 'workdir'), ('hardware',), fills=('hardware',)),
         'report': Mode('a page', ('workdir',), ('hardware', 'target'))}
CONFIG = '''
import ml_collections


def get_config(variant=''):
  if variant not in ('', 'debug'):
    raise ValueError(f'{variant!r} is no variant')
  c = ml_collections.ConfigDict({'seed': 0, 'alloc': {'rule': 'knapsack', 'low': 2, 'on': True}})
  return c.lock()
'''


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
  """A function of a command line -> what is said on stderr, or the flags where nothing is wrong."""
  monkeypatch.chdir(tmp_path)
  for name in ('run.py', 'hardware.py'):
    (tmp_path / name).write_text(CONFIG)
  (tmp_path / 'broken.py').write_text('def get_config():\n  return int("a")\n')
  (tmp_path / 'syntax.py').write_text('def get_config(:\n')
  (tmp_path / 'typo.py').write_text('import run\n\ndef get_config():\n  c = run.get_config()\n  c.sed = 1\n')
  (tmp_path / 'empty.py').write_text('def get_config():\n  pass\n')
  (tmp_path / 'reads.py').write_text('def get_config():\n  open("nowhere.json")\n')
  (tmp_path / 'own.py').write_text(
      'from configs import common\n\ndef get_config():\n  return common.finish(common.base(), "debug")\n')

  def parse(line):
    argv, values = ['main', *line.split()], flags.FlagValues()
    monkeypatch.setattr('sys.argv', argv)
    for name in ('config', 'hardware'):
      config_flags.DEFINE_config_file(name, None, 'FILE', flag_values=values, sys_argv=argv)
    flags.DEFINE_multi_string('workdir', None, 'DIR', flag_values=values)
    flags.DEFINE_enum('mode', 'train', list(MODES), 'what', flag_values=values)
    flags.DEFINE_float('target', None, 'report: success', flag_values=values)
    try:
      arguments.parse(argv, MODES, configs=('config', 'hardware'), everywhere=('config', 'workdir', 'hardware'),
                      defaults={'hardware': 'hardware.py'}, flag_values=values)
    except SystemExit as ended:
      got = capsys.readouterr()
      assert ended.code == (0 if got.out else exits.WRONG_USAGE)
      return got.out or [line.removeprefix('error: ') for line in got.err.splitlines()[:-1]]
    return values

  return parse


@pytest.mark.parametrize('line, wrong', [
    ('', ['--mode=train needs --config and --workdir']),
    ('--config=run.py --workdir', ['Missing value for flag --workdir']),
    ('--config=rum.py --workdir=x', ["--config=rum.py: there is no file 'rum.py'; did you mean './run.py'?"]),
    ('--config rum.py --config.seed=1 --workdr=x', [
        "--config=rum.py: there is no file 'rum.py'; did you mean './run.py'?",
        "there is no flag --workdr; did you mean 'workdir'?", '--mode=train needs --workdir']),
    ('--config=kr_jax:arithmetc:debug --workdir=x', [
        "--config=kr_jax:arithmetc:debug: there is no config 'arithmetc' in kr_jax; did you mean 'arithmetic'?"]),
    ('--config=elsewhere/arithmetic.py --workdir=x', ["--config=elsewhere/arithmetic.py: there is no file "
                                                      "'elsewhere/arithmetic.py'; did you mean 'kr_jax:arithmetic'?"]),
    ('--config=run.py:debgu --workdir=x', ["--config=run.py:debgu: 'debgu' is no variant (line 7 of run.py)"]),
    ('--config=broken.py --workdir=x', [
        "--config=broken.py: invalid literal for int() with base 10: 'a' (line 2 of broken.py)"]),
    ('--config=empty.py --workdir=x', ['--config=empty.py: get_config returned NoneType; it must return a ConfigDict']),
    ('--config=syntax.py --workdir=x', ['--config=syntax.py: line 1 of syntax.py: invalid syntax']),
    ('--config=run.py --config.alloc.rul=a --config.aloc.low=1 --noconfig.alloc.of --config.seed.x=1 --workdir=x', [
        "--config.alloc.rul: there is no such knob; did you mean 'alloc.rule'?",
        "--config.aloc.low: there is no such knob; did you mean 'alloc'?",
        "--config.alloc.of: there is no such knob; did you mean 'alloc.on'?",
        '--config.seed.x: seed is a knob, not a section']),
    ('--config=run.py --config.alloc.low=two --workdir=x', [
        "flag --config.alloc.low=two: invalid literal for int() with base 10: 'two'"]),
    ('--config.seed=1 --workdir=x', ['--config.seed needs --config=FILE', '--mode=train needs --config']),
    ('--mode=tain --config=run.py more', ["--mode=tain is not one of train, report; did you mean 'train'?",
                                         "unexpected arguments ['more']; flags start with --"]),
    ('--config=run.py --workdir=x --target=1', ['--target is of --mode=report, not of train']),
    ('--confg run.py --workdir=x', ["there is no flag --confg; did you mean 'config'?", '--mode=train needs --config']),
    ('--mode=report --hardware.sed=1', ["--hardware.sed: there is no such knob; did you mean 'seed'?",
                                       '--mode=report needs --workdir'])])
def test_all_that_is_wrong_is_said(parse, line, wrong):
  assert parse(line) == wrong


@pytest.mark.parametrize('line, config, hardware', [
    ('--config=run.py:debug --workdir=x --workdir y --config.seed=1 --noconfig.alloc.on', 1, 0),
    ('--mode=train --config run.py -workdir x --config.seed 2 --hardware.seed=3', 2, 3),
    ('--mode=report --workdir=x --config=run.py', 0, None), ('--mode=report --workdir=x --hardware.seed=4', None, 4)])
def test_what_is_right(parse, line, config, hardware):
  """A train run has the default hardware; a report only where it is given, or a figure of it is."""
  values = parse(line)
  assert values.config and values.config.seed == config if config is not None else values.config is None
  assert values.hardware and values.hardware.seed == hardware if hardware is not None else values.hardware is None
  assert values.workdir[0] == 'x'
  if 'noconfig' in line:
    assert values.config.alloc.on is False and values.workdir == ['x', 'y']


def test_flags_in_a_file(parse, tmp_path):
  (tmp_path / 'flags').write_text('--mode=report\n--workdir=x\n')
  assert parse('--flagfile=flags').workdir == ['x']


@pytest.mark.parametrize('line, steps', [
    ('--config=kr_jax:arithmetic --workdir=x', 120), ('--config kr_jax:arithmetic:debug -workdir x', 4),
    ('--config=own.py --workdir=x --hardware=kr_jax:hardware:v5e', 4),
    ('-config kr_jax:arithmetic --config.num_steps=7 --workdir=x', 7)])
def test_shipped_configs_by_name(parse, monkeypatch, line, steps):
  """From any directory; a file of one's own finds them as `configs`."""
  monkeypatch.setattr(sys, 'path', [x for x in sys.path if not os.path.exists(os.path.join(x, 'configs'))])
  for name in [name for name in sys.modules if name.split('.')[0] == 'configs']:
    monkeypatch.delitem(sys.modules, name)
  values = parse(line)
  assert values.config.num_steps == steps and 'configs' not in sys.modules


@pytest.mark.parametrize('name, wrong', [
    ('typo', 'is locked. Did you mean "seed" instead of "sed"?\' (line 5 of typo.py)'), ('reads', 'nowhere.json')])
def test_an_error_in_the_code_of_a_config_is_a_line(parse, monkeypatch, tmp_path, name, wrong):
  monkeypatch.syspath_prepend(tmp_path)
  message, = parse(f'--config={name}.py --workdir=x')
  assert wrong in message


@pytest.mark.parametrize('flag', ['-h', '--help', '--workdir=x --help --nonsense'])
def test_help_is_short(parse, flag):
  text = parse(flag)
  assert 'train      the loop (--config --workdir)' in text and '--target' in text and len(text.splitlines()) < 20
  assert '  success [report]' in text  # without the mode a second time


def test_values():
  argv = ['main', '--a=1', '-a', '2', '--ab=3', '--a']
  assert arguments.values(argv, 'a') == ['1', '2'] and arguments.values(argv, 'b') == []


def test_when_a_process_began(monkeypatch):
  """To a hundredth of a second, and a second more for what takes the interpreter to start."""
  code = 'from kr_jax import arguments; print(arguments.began())'
  before = time.time()
  began = float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)
  assert before - 0.05 < began < time.time() and began - before < 5
  monkeypatch.setattr('builtins.open', lambda path: io.StringIO('1 (a b) S'))
  assert arguments.began() == pytest.approx(time.time(), abs=1)  # of another system


def test_steps_to_trace():
  assert arguments.profiled(None, 4) is None and arguments.profiled('0:0') == (0, 0)
  assert arguments.profiled('2:3', 4) == (2, 3)


@pytest.mark.parametrize('text, message', [
    ('3', 'is not FIRST:LAST, two steps such as 3:5'), ('-1:2', 'is not FIRST:LAST'), ('3:', 'is not FIRST:LAST'),
    ('5:3', 'ends before it begins; say --profile=3:5'), ('2:4', 'the last step is 3, as num_steps=4')])
def test_steps_that_cannot_be_traced(text, message):
  with pytest.raises(ValueError, match=f'^--profile={text}.*{message}'):
    arguments.profiled(text, 4)


def test_whether_a_config_file_is_given():
  for argv in (['--hardware=x'], ['-hardware', 'x'], ['--hardware.profiles.v5e.pue=1']):
    assert arguments.is_given(['main', '--mode=train', *argv], 'hardware')
  assert not arguments.is_given(['main', '--workdir=hardware', '--hardwar=x'], 'hardware')


def test_paths_are_looked_at_before_they_are_used(tmp_path):
  problems = lambda **given: arguments.path_problems(given, written=('workdir', 'json'))
  assert problems(workdir=['a', 'gs://b/c', str(tmp_path)], json=f'{tmp_path}/a.json', output=None) == []
  assert problems(checkpoint='https://host/a') == [] and problems(workdir=['']) == ['--workdir= is empty']
  assert problems(workdir=['gs://'], output='a/' + 'b' * 256) == [
      "--workdir='gs://' names no bucket; give 'gs://BUCKET/PATH'",
      f"--output='a/{'b' * 197}... has a part of more than the 255 bytes that the name of a file may have"]
  assert problems(workdir=['http://host/a']) == [
      "--workdir='http://host/a' cannot be written; name a directory, or gs://BUCKET/PATH"]
  assert 'UTF-8' in problems(output='\udcff')[0] and 'is a directory; name a file' in problems(json=str(tmp_path))[0]


def test_slices_are_looked_at_before_one_is_compiled_for():
  class Hardware:
    def of_topology(self, name):
      if name.startswith('v9'):
        raise ValueError('no figures')

  problems = lambda *names: arguments.topology_problems(names, Hardware())
  assert problems('v5e:4x4', 'v5p:2x2x4') == arguments.topology_problems(['v9:1'], None) == []
  assert problems() == ['the config names no topologies; say one: --topology=v5e:4x4']
  for name in ('', 'v5e', 'v5e:0x2', 'v5e:-1x2', 'v5e:10000x10000', 'v5e:2x', 'v5e:2x2 '):
    assert problems('v5e:4x4', name) == [f'--topology={name!r} is no slice of TPUs; write v5e:4x4 or v5p:2x2x4']
  assert problems('v9:2x2') == ['--topology=v9:2x2: no figures']


def test_an_error_is_no_longer_than_a_screen(parse):
  assert all(len(line) < 1100 for line in parse(f'--{"x" * 5000}=1'))
