"""What a config is refused for before anything is computed, and what a checked one holds."""

import importlib
import pathlib
import shutil

import pytest

from kr_jax import attempt
from kr_jax import files as storage_files
from kr_jax import hub as hub_client
from kr_jax import knobs
from kr_jax import prepare
from kr_jax import state
from kr_jax import tasks
from kr_jax import warm_start
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.record import claim as claim_lib
from kr_jax.record import metrics
from tests import hub as hub_lib
from tests.knobs import debug_config
from tests.knobs import run

SPLITS = 'tasks__train_split', 'tasks__test_split'
CHECKPOINTS = pathlib.Path(__file__).parent / 'data' / 'checkpoints'


@pytest.mark.parametrize('changed, message', [
    ({'alloc__rollouts_per_step': 15}, 'total must lie in 16..512'),
    ({'alloc__rollouts_per_step': 513}, 'total must lie in 16..512'),
    ({'alloc__rule': 'knapsac'}, "alloc.rule='knapsac' .*; did you mean 'knapsack'"),
    ({'alloc__cost': 'tokens'}, 'alloc.tokens_per_step=0 is not in 16..704'),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 705}, 'tokens_per_step=705 is not in 16..704'),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 99, 'alloc__solver': 'greedy'},
     "solver='greedy' is exact for equal costs only"),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 99, 'alloc__estimate': 'window'},
     "the paper's rule knows no costs"),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 21, 'alloc__low': 0, 'alloc__rule': 'uniform'},
     'alloc.tokens_per_step=21 pays for no rollout of the first step, .* sample.completion_length=22 tokens'),
    ({'tasks__candidates_per_step': 9}, 'tasks.candidates_per_step=9 is more than tasks.per_step=8.*set alloc.low=0'),
    ({'tasks__candidates_per_step': 9000, 'alloc__low': 0}, 'a step of 9000 tasks is more than the 1024 tasks'),
    ({'sample__prompt_length': 20}, r'has 21 tokens, not 1..sample.prompt_length=20; .* at least 21'),
    ({'sample__completion_length': 19}, 'sample.completion_length=19'),
    ({'rewards__length_buffer': 23}, r'rewards.length_buffer=23 is not in 0..sample.completion_length=22'),
    ({'rewards__verifier': 'none'}, "rewards.verifier='none' is not one of"),
    ({'policy__lora_rank': 33}, 'policy.lora_rank=33 is more than the width 32 of the policy'),
    ({'pack__row_length': 41}, 'pack.row_length=41 is below the 42 tokens'),
    ({'policy__vocab_size': 99}, r'has not the declared sizes: policy.vocab_size=99 where there is 16'),
    ({'tasks__dataset': 'none'}, "tasks.dataset='none' is not one of"),
    ({'tasks__mixture': (('arithmetic', 1.0), ('none', 1.0))}, "tasks.dataset='none' is not one of"),
    ({'tasks__mixture': (('arithmetic', 0.0),)}, 'with a weight above 0'),
    ({'tasks__mixture': (('arithmetic', 1), ('champ:test', 1))}, "'champ' has no alphabet"),
    ({'tasks__test': ('arithmetic:dev',)}, "dataset 'arithmetic' has no split 'dev'"),
    ({'tasks__test': ('arithmetic', 'arithmetic:test[:5]')}, 'and arithmetic/test.* share'),
    ({'tasks__template': 'Think.'}, "tasks.template='Think.' is no text around {problem}"),
    ({'tasks__train_split': 'train[:500%]'}, r'arithmetic/train\[:500%\]: is no split'),
    ({'tasks__test': ('arithmetic:test[x]',)}, r"arithmetic/test\[x\]: is no split; write 'train'"),
    ({'tasks__train_split': 'train['}, r"tasks.train_split='train\[' is no split; write 'train'"),
    ({'tasks__train_split': 'training'}, "has no split 'training'"),
    ({'tasks__warm_start_split': 'solved'}, "has no split 'solved'.*tasks.warm_start_split.*warm_start.num_steps=0"),
    ({'tasks__train_split': 'train[:0]'}, 'holds no task'),
    ({'tasks__test_split': 'test[:0]'}, 'holds no task'),
    ({'tasks__train_split': 'train[:7]'}, 'a step of 8 tasks is more than the 7 tasks'),
    ({'evaluate__maj_at': (8,)}, r"evaluate.maj_at=\(8,\) votes on answers, and the verifier 'tests.graders:has_a_one"),
    ({'warm_start__per_step': 257}, 'warm_start.per_step=257 is more than the 256 tasks of its split')])
def test_bad_input_is_refused_before_anything_is_computed(tmp_path, data_dir, monkeypatch, changed, message):
  for module, name in ((policy, 'init'), (warm_start, 'run')):
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail('something was computed'))
  with pytest.raises(ValueError, match=message):
    run(tmp_path / 'run', data_dir, **changed)
  assert not (tmp_path / 'run').exists()


def test_duplicate_ids_are_refused(data_dir, monkeypatch):
  read = tasks.read
  monkeypatch.setattr(tasks, 'read', lambda *args, **kwargs: read(*args, **kwargs)[:9] * 2)
  with pytest.raises(ValueError, match='share the id'):
    prepare.prepare(debug_config(data_dir))


@pytest.mark.parametrize('split, answer', [('train_split', 'A or B'), ('test_split', '')])
def test_tasks_that_their_verifier_cannot_serve_are_refused(data_dir, monkeypatch, split, answer):
  read, refused = tasks.read, debug_config('').tasks[split]
  one_bad = lambda found, answer: [found[0]._replace(verifier='choice', answer=answer), *found[1:]]
  monkeypatch.setattr(tasks, 'read', lambda dataset, split, *args, **kwargs: one_bad(
      read(dataset, split, *args, **kwargs), answer if split == refused else '(C)'))
  with pytest.raises(ValueError, match=f"the answer '{answer}' of arithmetic/.* is not the letter of a choice"):
    prepare.prepare(debug_config(data_dir))


def test_what_a_setup_holds(data_dir):
  setup = prepare.prepare(debug_config(
      data_dir, optimizer__epochs=2, pack__microbatch_rows=4, grpo__clip_low=0.1, sample__temperature=0.7,
      evaluate__temperature=0.5, evaluate__top_k=5, policy__lora_rank=3))
  assert isinstance(setup.config, knobs.Config) and setup.config.tasks.per_step == 8
  u = setup.update
  assert (u.epochs, u.microbatch_rows, u.grpo.clip_low, u.temperature) == (2, 4, 0.1, 0.7)
  assert (setup.sft.schedule, setup.sft.decay_steps, setup.sft.temperature) == ('linear', 4, 1.0)
  assert setup.sft.learning_rate == setup.config.warm_start.learning_rate != u.learning_rate
  assert (setup.sample.temperature, setup.sample.top_k, setup.sample.stop_ids) == (0.7, 0, (1,))
  assert (setup.evaluate.temperature, setup.evaluate.top_k, setup.evaluate.slots) == (0.5, 5, 16)
  assert (setup.policy.lora_rank, setup.trained.lora_rank, setup.needs_base) == (0, 3, True)
  assert setup.learn_mesh is setup.sample_mesh is None
  assert (len(setup.train_tasks), len(setup.test_tasks), len(setup.warm_start_tasks)) == (1024, 16, 256)


@pytest.mark.parametrize('changed, needs', [
    ({}, False), ({'grpo__kl_coef': 0.1}, True), ({'policy__lora_rank': 2}, True)])
def test_who_needs_the_initial_policy(changed, needs):
  assert prepare.abstract(debug_config('', **changed), devices=[None]).needs_base is needs


def test_a_mixture_and_several_test_sets(data_dir):
  bits = 'reasoning_gym/count_bits'
  config = debug_config(
      data_dir, tasks__mixture=(('arithmetic:train[:40]', 3.0), (bits, 1.0)), warm_start__num_steps=0,
      tasks__test=(f'{bits}:test[:3]', 'arithmetic'), evaluate__tasks=5, sample__prompt_length=128,
      pack__row_length=150)
  config.tasks.reasoning_gym.update(train=30, test=10)
  setup = prepare.prepare(config)
  assert setup.shares == {'arithmetic': 3.0, bits: 1.0}
  assert [t.source for t in setup.train_tasks] == ['arithmetic'] * 40 + [bits] * 30
  assert [t.index for t in setup.train_tasks] == list(range(70))  # the rows of the statistics
  assert [t.source for t in setup.test_tasks] == [bits] * 3 + ['arithmetic'] * 5
  assert setup.tokenizer.decode(setup.train_tasks[69].tokens) == setup.train_tasks[69].prompt


def test_held_out_tasks_that_are_trained_on_are_told(tmp_path, data_dir, caplog):
  own = sums_file(tmp_path / 'my.csv')
  prepare.prepare(debug_config(data_dir, tasks__dataset=own, warm_start__num_steps=0))
  assert 'trained on as well' not in caplog.text
  prepare.prepare(debug_config(data_dir, tasks__dataset=f'{own}:all', warm_start__num_steps=0))
  assert '4 of the 4 held-out tasks are trained on as well' in caplog.text


def test_a_declared_checkpoint_need_not_be_there():
  """Its sizes stand in the config; shapes are all that a preflight needs."""
  config = importlib.import_module('configs.qwen3_4b').get_config()
  config.policy.num_layers = 2
  setup = prepare.abstract(config, devices=[None] * 16)
  assert (setup.policy.num_layers, setup.policy.width, setup.tokenizer) == (2, 2560, None)
  config.policy.vocab_size, config.policy.checkpoint = 0, 'nowhere'
  with pytest.raises(ValueError, match="'nowhere' is not there"):
    prepare.abstract(config, devices=[None] * 16)


def test_sequences_beyond_the_context_of_a_checkpoint(monkeypatch):
  """They are warned of, and yarn stretches the context."""
  said = []
  for name in ('_read_tasks', '_check_tasks'):
    monkeypatch.setattr(prepare, name, lambda *_, **__: [])
  monkeypatch.setattr(prepare.logging, 'warning', lambda text, *args: said.append(text % args))

  def of(name, completion_length, **changed):
    said.clear()
    return prepare.prepare(debug_config(
        '', policy__checkpoint=str(CHECKPOINTS / name), warm_start__num_steps=0, sample__prompt_length=64,
        sample__completion_length=completion_length, pack__row_length=1088, **changed)).policy

  assert of('llama', 448).rope_scaling is None and not said
  of('llama', 449)
  assert 'make sequences of up to 513 tokens, and' in said[0]
  assert 'was made to read 512' in said[0] and 'sum is at most 512, or set policy.yarn=2,' in said[0]
  of('llama3', 449)  # which scales its rotations already
  assert said and 'yarn' not in said[0]
  stretched = of('llama', 449, policy__yarn=2.0).rope_scaling
  assert not said and (stretched.kind, stretched.factor, stretched.context) == ('yarn', 2.0, 512.0)
  of('llama', 961, policy__yarn=2.0)
  assert 'was made to read 1024' in said[0] and 'sum is at most 1024, or set policy.yarn=3,' in said[0]
  with pytest.raises(ValueError, match="policy.yarn=2: the checkpoint scales its rotations itself, by 'llama3'"):
    of('llama3', 449, policy__yarn=2.0)


def test_a_setup_without_data_or_a_mesh():
  setup = prepare.without_tasks(debug_config('/nowhere', mesh__devices=64, mesh__fsdp=64))
  assert setup.learn_mesh is setup.sample_mesh is None and not setup.train_tasks
  assert (setup.tokenizer.vocab_size, setup.policy.num_layers) == (setup.policy.vocab_size, 1)


def sums_file(path, count=40):
  """A file of problems and answers that a policy from scratch can read."""
  rows = ''.join(f'{i:>19}+{i % 7}=,{(i + i % 7) % 100:02d}\n' for i in range(count))
  path.write_text(f'problem,answer\n{rows}')
  return f'file:{path}'


def test_the_verifier_of_a_config_serves_tasks_that_name_none(tmp_path, data_dir):
  """Where there is none, the dataset's does, and datasets of a mixture each have their own."""
  own = sums_file(tmp_path / 'my.csv')
  setup = lambda verifier, *datasets: prepare.prepare(debug_config(
      data_dir, tasks__mixture=tuple((name, 1.0) for name in datasets), rewards__verifier=verifier,
      warm_start__num_steps=0))
  found = lambda setup: {(task.source, task.verifier) for task in (*setup.train_tasks, *setup.test_tasks)}
  for verifier, datasets, serves, others in (
      ('', ('arithmetic', own), 'ends_with', {'arithmetic': '', own: 'math'}),
      ('', (own, 'arithmetic'), 'math', {'arithmetic': 'ends_with', own: ''}),
      ('tests.graders:even', (own, 'arithmetic'), 'tests.graders:even', {'arithmetic': '', own: ''})):
    made = setup(verifier, *datasets)
    assert made.config.rewards.verifier == made.rewards.verifier == serves and found(made) == set(others.items())
  assert prepare.without_tasks(debug_config(data_dir, rewards__verifier='')).rewards.verifier == 'ends_with'


def test_the_record_has_the_digests_of_files_of_python(tmp_path, data_dir, monkeypatch, caplog):
  """A run goes on with a verifier that has changed, and says so."""
  monkeypatch.chdir(tmp_path)
  workdir = str(tmp_path / 'run')
  setup = prepare.prepare(debug_config(
      data_dir, rewards__verifier='./mine.py:even', tasks__dataset=sums_file(tmp_path / 'a.csv'),
      warm_start__num_steps=0))
  for text, began in (('1', None), ('1', '6b86b273ff34fce1'), ('2', '6b86b273ff34fce1'), ('2', 'd4735e3a265e16ee')):
    (tmp_path / 'mine.py').write_text(text)
    assert claim_lib.recorded(workdir, 'code../mine.py') == began
    attempt.claim(setup, workdir)
    assert claim_lib.recorded(workdir, 'rewards.verifier') == './mine.py:even'
    assert ('./mine.py has changed since the run in' in caplog.text) == (text == '2')


@pytest.mark.exhaustive
def test_a_run_on_a_file_with_a_verifier_of_a_file(tmp_path, data_dir, monkeypatch, caplog):
  """From scratch; it goes on with the verifier as it then is."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine.py').write_text('def even(completion, task):\n  return len(completion) % 2 == 0\n')
  of = lambda steps: {
      'tasks__dataset': sums_file(tmp_path / 'my.csv'), 'rewards__verifier': 'mine.py:even', 'warm_start__num_steps': 0,
      'evaluate__rollouts': 2, 'num_steps': steps}
  workdir = run(tmp_path / 'run', data_dir, **of(1))
  (tmp_path / 'mine.py').write_text('def even(completion, task):\n  return True\n')
  rows = lambda: [row['reward_mean'] for row in metrics.read(f'{workdir}/metrics.jsonl') if 'reward_mean' in row]
  run(workdir, data_dir, **of(2))
  assert rows()[0] < 1 == rows()[1] and 'mine.py has changed since the run in' in caplog.text


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, monkeypatch, data_dir):
  """Of the hub: the record names the commit, and what tasks say that they are from does not hang on it."""
  sums_file(tmp_path / 'a.csv')
  config = debug_config(data_dir, tasks__dataset='file:hf:org/set/a.csv', tasks__test=('file:hf:org/set/a.csv:test',),
                        warm_start__num_steps=0)
  workdir = str(tmp_path / 'run')
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as hub:
    first = hub.push('datasets/org/set', {'a.csv': (tmp_path / 'a.csv').read_bytes()})
    setup = prepare.prepare(config, workdir)
    assert setup.config.tasks.dataset == f'file:hf:org/set/a.csv@{first}'
    assert setup.config.tasks.test == (f'file:hf:org/set/a.csv@{first}:test',)
    assert setup.shares == {'file:hf:org/set/a.csv': 1.0} and setup.train_tasks[0].source == 'file:hf:org/set/a.csv'
    attempt.claim(setup, workdir)
    hub.push('datasets/org/set', {'a.csv': b'problem,answer\n' + b''.join(b'%d=,1\n' % i for i in range(99))})
    assert prepare.prepare(config, workdir).config == setup.config
    assert prepare.without_tasks(config, workdir).config.tasks == setup.config.tasks
    other = prepare.prepare(config)
    assert len(other.train_tasks) == 90
    with pytest.raises(ValueError, match='tasks.dataset was'):
      attempt.claim(other, workdir)


def test_files_of_published_sets_are_recorded_with_their_commit(tmp_path, monkeypatch):
  """Those that are read: of the hub unless the config says other files, and unless its client is not there."""
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as served:
    commit = served.push('datasets/HuggingFaceH4/MATH-500', {'test.jsonl': b'{}'})
    config = lambda c: prepare._pinned(knobs.Config(tasks=c), '')[0].tasks
    c = knobs.Tasks(mixture=(('gsm8k', 1.0), ('champ', 1.0)), test=('math_500', 'amc_2023', 'math_500:test[:5]'),
                    files=knobs.Files(amc_2023='data/amc.parquet', mbpp='hf:no/set/a.csv'))
    files = config(c).files
    assert files == c.files.replace(math_500=f'hf:HuggingFaceH4/MATH-500/test.jsonl@{commit}')
    monkeypatch.setattr(hub_client, 'is_installed', lambda: False)
    assert config(c).files == c.files


def test_a_run_goes_on_with_the_commits_of_what_its_config_says(tmp_path, monkeypatch):
  """Also of a branch that it names, which may have moved; another branch is another commit."""
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as served:
    first = [served.push(name, {'a.csv': b'1'}) for name in ('org/x', 'datasets/org/x')]
    pinned = lambda revision='@main': prepare._pinned(knobs.Config(
        policy=knobs.Policy(checkpoint=f'hf:org/x{revision}'), tasks=knobs.Tasks(dataset=f'file:hf:org/x{revision}')),
        str(tmp_path))
    names = lambda commits: [f'hf:org/x@{commit}' for commit in commits]
    of = lambda c: [c.policy.checkpoint, c.tasks.dataset.removeprefix('file:')]
    config, found = pinned()
    assert of(config) == names(first)
    claim_lib.claim(str(tmp_path), {'hub': found}, may_change=())
    moved = [served.push(name, {'a.csv': b'2'}) for name in ('org/x', 'datasets/org/x')]
    served.branches = {name: branches | {'v2': branches['main']} for name, branches in served.branches.items()}
    asked = len(served.asked)
    assert pinned() == (config, found) and len(served.asked) == asked
    assert of(pinned('@v2')[0]) == names(moved)


@pytest.mark.slow
def test_a_run_begins_and_goes_on_with_one_commit_of_the_hub(tmp_path, monkeypatch, data_dir):
  """The record names it. Where the branch has moved, a run goes on with the commit that it began with; of a config that
  names another one the run is refused."""
  files = {p.name: p.read_bytes() for p in (CHECKPOINTS / 'llama').iterdir()}
  prepared = lambda name, *workdir: prepare.prepare(debug_config(
      data_dir, policy__checkpoint=name, warm_start__num_steps=0, sample__prompt_length=64, pack__row_length=128),
      *workdir)
  workdir = str(tmp_path / 'run')
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as hub:
    first = hub.push('org/model', files)
    setup = prepared('hf:org/model')
    assert setup.config.policy.checkpoint == f'hf:org/model@{first}'
    attempt.claim(setup, workdir)
    assert claim_lib.recorded(workdir, 'policy.checkpoint') == f'hf:org/model@{first}'
    moved = hub.push('org/model', files | {'generation_config.json': b'{"eos_token_id": 2}'})
    other = prepared('hf:org/model')
    with pytest.raises(ValueError, match=f"policy.checkpoint was 'hf:org/model@{first}', is 'hf:org/model@{moved}'"):
      attempt.claim(other, workdir)
    with pytest.raises(ValueError, match=f"began with hf:org/model@{first}, .* set policy.checkpoint='hf:org/mo"):
      state.start(other, workdir, None)
    assert prepared(f'hf:org/model@{first}').config == prepared('hf:org/model', workdir).config == setup.config


@pytest.mark.slow
def test_a_run_with_adapters_needs_the_checkpoint_of_the_bucket_that_it_began_with(tmp_path, bucket, data_dir):
  def put():
    for path in (CHECKPOINTS / 'llama').iterdir():
      storage_files.send(str(path), f'{bucket}/source/{path.name}')

  put()
  setup = prepare.prepare(debug_config(
      data_dir, policy__checkpoint=f'{bucket}/source', warm_start__num_steps=0, sample__prompt_length=64,
      pack__row_length=128, grpo__kl_coef=.1))
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  began = claim_lib.recorded(workdir, state.SOURCE_VERSION)
  put()
  attempt.claim(setup, workdir)
  assert claim_lib.recorded(workdir, state.SOURCE_VERSION) == began != pretrained.version(f'{bucket}/source')
  with pytest.raises(ValueError, match=f"policy.checkpoint='{bucket}/source' has been overwritten since the run"):
    state.start(setup, workdir, None)


def test_a_new_run_begins_with_a_checkpoint_that_can_be_read(tmp_path, data_dir):
  """Or leaves no workdir. A run that goes on needs the tensors of the checkpoint no more."""
  source = tmp_path / 'source'
  shutil.copytree(CHECKPOINTS / 'llama', source)
  tensors = (source / 'model.safetensors').rename(tmp_path / 'tensors')
  setup = prepare.prepare(debug_config(
      data_dir, policy__checkpoint=str(source), warm_start__num_steps=0, sample__prompt_length=64,
      pack__row_length=128))
  workdir = str(tmp_path / 'run')
  with pytest.raises(ValueError, match=r"source lacks \['model.safetensors'\]"):
    attempt.claim(setup, workdir)
  assert not (tmp_path / 'run').exists()
  shutil.copy(tensors, source / 'model.safetensors')
  attempt.claim(setup, workdir)
  (source / 'model.safetensors').unlink()
  attempt.claim(setup, workdir)
