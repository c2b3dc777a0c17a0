"""The notebooks: what they are made of, and that they run from the first cell to the last, at the sizes of debug."""

import ast
import base64
import builtins
import fnmatch
import glob
import html
import importlib.util
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import struct
import subprocess
import sys
import types

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = ('colab', 'analysis')
CHECKPOINT = ROOT / 'tests' / 'data' / 'checkpoints' / 'qwen3'  # in SmolLM2's place
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.stdin, 4)
try:
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
finally:
  nbformat.write(notebook, sys.argv[1])
"""


def read(name):
  return nbformat.read(ROOT / 'launch' / f'{name}.ipynb', 4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_is_valid_short_and_without_outputs(name):
  notebook, text = read(name), (ROOT / 'launch' / f'{name}.ipynb').read_text()
  nbformat.validate(notebook)
  assert len(notebook.cells) <= 15
  assert not any(cell.outputs or cell.execution_count for cell in code_cells(notebook))
  assert notebook.metadata.keys() <= {'accelerator', 'colab', 'kernelspec', 'language_info'}
  for before, cell in itertools.pairwise([None, *notebook.cells]):
    assert all(len(line) <= 120 for line in cell.source.splitlines() if not line.startswith('[![')), cell.id
    if cell.cell_type == 'code':  # what to look at is said before it, or in the lines that Colab shows beside it
      assert before.cell_type == 'markdown' or '# @markdown ' in cell.source, cell.id
  assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + '\n'  # changes are seen by line


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_the_badges_open_this_notebook_of_the_repository_that_is_installed(name):
  first, code = read(name).cells[0].source, '\n'.join(cell.source for cell in code_cells(read(name)))
  owner, project = re.search(r"^REPOSITORY = 'https://github\.com/([\w.-]+)/([\w.-]+)'", code, re.M).groups()
  path = f'{owner}/{project}/blob/main/launch/{name}.ipynb'
  assert f'(https://colab.research.google.com/github/{path})' in first
  assert f'(https://kaggle.com/kernels/welcome?src=https://github.com/{path})' in first
  assert f"'https://github.com/{owner}/{project}'" in (ROOT / 'launch' / 'colab.py').read_text()


def bound(nodes):
  """The names that nodes give something to."""
  for node in nodes:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      yield from ((alias.asname or alias.name).partition('.')[0] for alias in node.names)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      yield node.name
    elif isinstance(node, ast.arg):
      yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id


def module_names(name):
  """What a module of the project holds, by its source, as an import takes seconds; None where it is no module."""
  path = ROOT.joinpath(*name.split('.'))
  path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
  body = ast.parse(path.read_text()).body if path.exists() else []
  return {*bound(x for node in body for x in (ast.walk(node) if isinstance(node, ast.Assign) else [node]))} or None


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_every_name_in_a_cell_is_there(name):
  """Names are set in a cell, and what is read of a module of the project is in it."""
  nodes = [node for cell in code_cells(read(name)) for node in ast.walk(ast.parse(cell.source, cell.id))]
  used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
  assert used <= {*bound(nodes), *dir(builtins)}
  holds = {}  # by the name in the notebook
  for node in nodes:
    for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
      path = '.'.join(filter(None, (getattr(node, 'module', ''), alias.name)))
      if path.partition('.')[0] == 'kr_jax':
        holds[alias.asname or alias.name] = module_names(path)
  missing = [f'{node.value.id}.{node.attr}' for node in nodes if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.attr not in (holds.get(node.value.id) or {node.attr})]
  assert 'kr_jax' in holds and None not in holds.values() and not missing


@pytest.fixture
def install(monkeypatch):
  """A function that runs the installation of colab.ipynb on a machine without kr_jax; it returns pip's command."""
  def install(devices='', driver=None, returncode=0):
    called = []
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(glob, 'glob', lambda pattern: [devices] if fnmatch.fnmatch(devices, pattern) else [])
    monkeypatch.setattr(shutil, 'which', lambda name: driver)
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: called.append(command) or types.SimpleNamespace(
        returncode=returncode, stderr='pip: no such repository'))
    exec(code_cells(read('colab'))[0].source.partition('\nimport html')[0], {})
    return called[0]

  return install


@pytest.mark.parametrize('devices, driver, extra', [
    ('/dev/accel0', None, 'tpu'), ('/dev/vfio/0', None, 'tpu'), ('/dev/vfio/vfio', '/usr/bin/nvidia-smi', 'cuda'),
    ('', None, 'train')])
def test_what_is_installed_follows_from_the_runtime(install, devices, driver, extra):
  assert f'kr_jax[{extra}] @ git+https://' in install(devices, driver)[-1]
  assert runpy.run_path(str(ROOT / 'launch' / 'colab.py'))['extra']() == extra


def test_an_installation_that_failed_and_one_that_needs_a_restart_say_so(install, monkeypatch):
  with pytest.raises(RuntimeError, match='no such repository'):
    install(returncode=1)
  monkeypatch.setitem(sys.modules, 'pyarrow', types.SimpleNamespace(__version__='0.1'))
  with pytest.raises(RuntimeError, match='pyarrow were in use before: Runtime > Restart session'):
    install()


def test_the_script_for_colabs_command_line_hands_on_flags_output_and_status():
  done = subprocess.run([sys.executable, ROOT / 'launch' / 'colab.py', '--workdr=x'], text=True, capture_output=True)
  assert done.returncode == 2 and '--workdr' in done.stdout


def execute(name, folder, data_dir, **parameters):
  """The outputs of a notebook's cells, by their ids, of a run with other parameters than its own."""
  notebook = read(name)
  assert all(re.search(rf'^{key} = ', code_cells(notebook)[0].source, re.M) for key in parameters)
  lines = '\n'.join(f'{key} = {value!r}' for key, value in parameters.items())
  notebook.cells.insert(notebook.cells.index(code_cells(notebook)[0]) + 1, nbformat.v4.new_code_cell(lines))
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', EXECUTE, folder / f'{name}.ipynb'], cwd=ROOT, text=True,
                        input=nbformat.writes(notebook), capture_output=True,
                        env=os.environ | {'TFDS_DATA_DIR': data_dir, 'KR_JAX_CACHE': str(folder / 'cache')})
  assert done.returncode == 0, done.stderr[-5000:]
  return {cell.id: cell.outputs for cell in nbformat.read(folder / f'{name}.ipynb', 4).cells
          if cell.cell_type == 'code'}


def data(outputs, kind):
  return [output.data[kind] for output in outputs if kind in output.get('data', {})]


def size(png):
  """Width and height of a picture."""
  return struct.unpack('>II', base64.b64decode(png)[16:24])


@pytest.mark.exhaustive
def test_both_notebooks_run(tmp_path, data_dir):
  workdir = str(tmp_path / 'run')
  cells = execute('colab', tmp_path, data_dir, CONFIG='arithmetic:debug', WORKDIR=workdir, CHECKPOINT=str(CHECKPOINT))
  pictures = {name: data(outputs, 'image/png') for name, outputs in cells.items()}
  drawn = {name for name, found in pictures.items() if found}
  assert drawn >= {'budgets', 'verdicts', 'advantages', 'rows', 'update', 'statistics', 'train', 'written', 'smollm2'}
  assert all(min(size(png)) > 100 for found in pictures.values() for png in found)
  assert len(data(cells['rollouts'], 'text/html')) == 3
  (page,) = data(cells['report'], 'text/html')
  assert 'Content-Security-Policy' in html.unescape(re.search(r'srcdoc="([^"]*)"', page)[1])
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert sum('reward_mean' in line for line in lines) == 4  # the run of the notebook is whole

  cells = execute('analysis', tmp_path, data_dir, WORKDIR=workdir, OTHER=workdir)
  assert all(data(cells[name], 'image/png') for name in ('status', 'history', 'compare', 'spent'))
  assert 'less' in ''.join(output.text for output in cells['compare'] if output.output_type == 'stream')
