"""What a config names and is not there is said, all at once; what is there is not."""

import pytest

from kr_jax import files as files_lib
from kr_jax import hub
from kr_jax import inputs
from kr_jax import knobs
from kr_jax import rewards
from kr_jax.model import pretrained


def config(tasks=(), rewards=(), **policy):
  return knobs.Config(tasks=knobs.Tasks(**dict(tasks)), rewards=knobs.Rewards(**dict(rewards)),
                      policy=knobs.Policy(**policy))


def test_nothing_is_missing_of_what_is_made_here(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, 'is_installed', lambda: False)
  (tmp_path / 'set[1]-a.jsonl').touch()
  (tmp_path / 'prior.csv').touch()
  mixture = (('arithmetic', 1.0), ('math_500:test[:8]', 2.0), ('gsm8k', 1.0), ('reasoning_gym/chain_sum', 1.0))
  good = config({'mixture': mixture, 'files': knobs.Files(math_500=f'{tmp_path}/set[[]1]-*.jsonl'),
                 'prior': f'{tmp_path}/prior.csv:rate', 'test': ('champ:test[200:]', 'sums')},
                {'verifier': 'tests.inputs_test:config'}, checkpoint=str(tmp_path))
  assert inputs.problems(knobs.Config()) == inputs.problems(good) == []


def test_all_that_is_missing_is_said_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, 'is_installed', lambda: False)
  (tmp_path / 'Qwen3-4B').mkdir()
  bad = config({'dataset': 'math_500', 'test': ('aime_2024', 'gsmk', 'math_500'), 'prior': 'no.json',
                'files': knobs.Files(math_500=f'{tmp_path}/*.jsonl')}, {'verifier': 'nowhere.at:all'},
               checkpoint=f'{tmp_path}/Qwen3-4b')
  files, published, dataset, prior, verifier, checkpoint = inputs.problems(bad)
  assert files.startswith(f"tasks.files.math_500='{tmp_path}/*.jsonl' names no file; point to it with --config")
  assert published.startswith("dataset 'aime_2024' is read from published files: pip install 'kr_jax[hub]', to which")
  assert 'or point to them with --config.tasks.files.aime_2024=PATH' in published
  assert dataset.startswith("there is no dataset 'gsmk'; did you mean 'gsm8k'?; there are ['aime_2024', ")
  assert prior == "tasks.prior='no.json': there is no file 'no.json'"
  assert verifier == "rewards.verifier='nowhere.at:all': there is no module 'nowhere.at' to be imported from here"
  assert checkpoint == (f"policy.checkpoint: checkpoint '{tmp_path}/Qwen3-4b' is not there; did you mean "
                        f"'{tmp_path}/Qwen3-4B'?")
  assert inputs.problems(bad, of_data=False) == [checkpoint] and inputs.problems(
      bad, of_data=False, of_checkpoint=False) == []


def test_the_directory_of_data_is_there_or_can_be_made(tmp_path, monkeypatch):
  problems = lambda path: inputs.problems(config({'data_dir': str(path)}))
  (tmp_path / 'file').touch()
  (tmp_path / 'there').mkdir()
  assert problems(tmp_path / 'there') == problems(tmp_path / 'a' / 'b') == []
  assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'there']  # nothing is left
  for path, reason in ((tmp_path / 'file', 'it is no directory'), (tmp_path / 'file' / 'a', 'Not a directory'),
                       ('/proc/nowhere/a', 'No such file or directory')):
    assert problems(path) == [
        f"tasks.data_dir='{path}': {path} cannot be made: {reason}; name a directory that can be written"]
  monkeypatch.setattr(inputs.os, 'access', lambda path, mode: False)
  assert 'cannot be read; name another directory' in problems(tmp_path / 'there')[0]


def test_names_of_a_bucket_are_looked_up(bucket, storage):
  for name in ('part-1.jsonl', 'prior.csv', 'model/config.json'):
    files_lib.write(f'{bucket}/{name}', '')
  of = lambda end: config({'dataset': 'math_500', 'files': knobs.Files(math_500=f'{bucket}/part-*{end}.jsonl'),
                           'prior': f'{bucket}/prior{end}.csv:rate'}, checkpoint=f'{bucket}/model{end}')
  assert inputs.problems(of('')) == []
  assert [problem.partition(bucket)[2] for problem in inputs.problems(of('x'))] == [
      '/part-*x.jsonl is not there', f"/priorx.csv:rate': {bucket}/priorx.csv is not there", '/modelx is not there']
  storage.fail(403)
  assert all('no permission' in problem for problem in inputs.problems(of('')))


@pytest.mark.parametrize('name', ['hf:Qwen/Qwen3-4B@main', *pretrained.WHEELS])
def test_names_that_are_not_looked_up(name):
  assert inputs.checkpoint_problems(name, '--checkpoint') == []


@pytest.mark.parametrize('name, message', [
    ('mth', "rewards.verifier='mth' is not one of ['choice', 'ends_with', 'math', 'python_tests', 'reasoning_gym'], "
     "nor 'module:function' or 'PATH.py:function'; did you mean 'math'?"), ('a b:c', "nor 'module:function'"),
    ('no/file.py:near', "'no/file.py:near': there is no file '/"), ('file.py:', "nor 'module:function'")])
def test_a_verifier_that_there_is_not(name, message):
  assert message in inputs.problems(config(rewards={'verifier': name}))[0]


def test_a_module_is_found_and_not_imported(tmp_path, monkeypatch):
  (tmp_path / 'mine_of_a_test' / 'inner').mkdir(parents=True)
  (tmp_path / 'mine_of_a_test' / '__init__.py').write_text('raise SystemExit')
  (tmp_path / 'mine_of_a_test' / 'inner' / 'verifier.py').touch()
  monkeypatch.syspath_prepend(tmp_path)
  missing = lambda name: bool(inputs.problems(config(rewards={'verifier': f'{name}:f'})))
  assert [missing(f'mine_of_a_test{rest}') for rest in ('', '.inner', '.inner.verifier', '.verifier', '.inner.verify')
          ] == [False, False, False, True, True]
  assert missing('json.decoder.x') and not missing('json.decoder')


def test_names_are_those_of_the_parts_that_read_them():
  assert set(inputs.VERIFIERS) == set(rewards.VERIFIERS) and set(inputs.CHECKPOINTS) == set(pretrained.WHEELS)
  from kr_jax.datasets import sets
  assert set(inputs.FILES) == set(sets.SETS)
  assert set(inputs.WITHOUT_FILES) == {name for name, x in sets.SETS.items() if not x.needs_files}


def test_data_and_code_of_a_user(tmp_path, monkeypatch):
  for name in ('set.csv', 'my_set.py', 'my_verifiers.py'):
    (tmp_path / name).write_text('near = 1')
  monkeypatch.chdir(tmp_path)
  at = lambda name: config({'dataset': f'file:{name}.csv:train[:5]', 'test': (f'my_{name}.py:all', 'file:hf:org/set')},
                           {'verifier': f'{name}_verifiers.py:near'})
  file, module, verifier = inputs.problems(at('other'))
  assert file == "tasks.dataset=file:'other.csv' names no file; give the path of a file, or a pattern"
  assert module == f"tasks.dataset='my_other.py': there is no file '{tmp_path}/my_other.py'"
  assert verifier.startswith("rewards.verifier='other_verifiers.py:near': there is no file '/")
  good = config({'dataset': 'file:*.csv', 'test': ('my_set.py:all',)}, {'verifier': '~/my_verifiers.py:near'})
  monkeypatch.setenv('HOME', str(tmp_path))
  assert not inputs.problems(good) and inputs.code(knobs.Config()) == {}
  assert inputs.code(good) == dict.fromkeys(('my_set.py', '~/my_verifiers.py'), 'cfed4781e6fbe07f')
  monkeypatch.setattr(hub, 'is_installed', lambda: False)
  needs = "needs huggingface_hub: pip install 'kr_jax[hub]'"
  assert inputs.problems(at('set'))[0] == f"tasks.dataset=file:'hf:org/set' {needs}"
  assert inputs.checkpoint_problems('hf:org/model', '--checkpoint') == [f"--checkpoint='hf:org/model' {needs}"]


@pytest.mark.parametrize('package, name', [('reasoning_gym', 'reasoning_gym/chain_sum'), ('champ_dataset', 'champ')])
def test_a_package_that_is_missing(monkeypatch, package, name):
  find = inputs.importlib.util.find_spec
  monkeypatch.setattr(inputs.importlib.util, 'find_spec', lambda x: None if x == package else find(x))
  message, = inputs.problems(config({'dataset': name}))
  assert "needs a package" in message or "need a package" in message
  assert "pip install 'kr_jax[data]'" in message


@pytest.mark.parametrize('text, problem', [
    ('def near(a, b): pass', ''), ('from other import close as near', ''), ('from other import *', ''),
    ('near = lambda a, b: True', ''), ('def nera(a, b): pass', "has no function 'near'; did you mean 'nera'?"),
    ('def near(a, b) pass', 'cannot be read: expected')])
def test_a_file_without_the_verifier(tmp_path, text, problem):
  """It is refused before the run has a workdir, which would hold its name for good."""
  (tmp_path / 'mine.py').write_text(text)
  found = inputs.problems(config(rewards={'verifier': f'{tmp_path}/mine.py:near'}))
  assert (problem in found[0]) if problem else not found
