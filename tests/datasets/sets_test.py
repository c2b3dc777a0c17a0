"""The table of published problem sets: each on a small file of its schema, and the logic that some have."""

import dataclasses
import re

import pytest
from tensorflow_datasets.text.gsm8k import gsm8k as theirs

from kr_jax import knobs
from kr_jax.datasets import published
from kr_jax.datasets import sets
from tests.make_datasets import AFTER, BEFORE, DIRECTORY, FILES, dapo, gpqa, write

# By dataset and split, {the id, or for a task named by its prompt the first letters: (prompt's end, answer,
# solution)}.
TASKS = {
    'aime_2024': {'test': {
        '60': ('$2^{10}$ by $1000$.', '024', '$1024$, so 024.'),
        '61': ('squares below $1000$.', '031', '$31^2<1000<32^2$.')}},
    'aime_2025': {'test': {
        'Find the sum': ('of $28$.', '56', ''), 'Find the number': ('of $28$.', '6', '')}},
    'amc_2023': {'test': {
        'A train': ('How many remain?', '7', ''), 'What is half': ('as a decimal?', '2.5', '')}},
    'dapo_math_17k': {'train': {
        'How many even': ('in 1 to 21?', '10', ''), 'What is the sum': ('of 456?', '15', '')}},
    'gpqa_diamond': {'test': {
        'rec1': ('the most mass,\nof "these"?\n\n(A) a star\n(B) a planet\n(C) a comet\n(D) a moon', 'A', ''),
        'rec6': ('', 'C', ''), 'rec9': ('', 'B', '')}},
    'gsm8k': {'test': {'Ole had 9 nuts — and': ('are left?', '5', '9-4=5\n#### 5')}, 'train': {
        'Mina': ('has she?', '42', 'She has 6*7=42 eggs.\n#### 42'),
        'A mill': ('2 days?', '1200', 'It grinds 2 * 600 = 1,200 sacks.\n#### 1200')}},
    'math_500': {'test': {
        'test/prealgebra/1.json': ('Compute $3+\\frac12$.', '\\frac72', 'It is $\\boxed{\\frac72}$.'),
        'test/algebra/2.json': ('for $x>0$.', '1', 'Divide by $x$: $\\boxed{1}$.')}},
    'minerva_math': {'test': {'A lens': ('length in cm?', '25', ''), 'A gas': ('its work?', 'p V', '')}},
    'olympiad_bench': {'test': {
        '1606': ('Find all $x$ with $x^2=4$.', '$-2$,$2$', 'Both signs.'),
        '1610': ('Let $f(x)=x^2+1$.\n\nFind $f(2)$.', '5', 'Put $x=2$.')}},
}
DIFFICULTY = {'math_500/test/prealgebra/1.json': 1, 'math_500/test/algebra/2.json': 5}


def test_files_of_every_set_have_a_knob_and_a_fixture():
  fields = {field.name for field in dataclasses.fields(knobs.Files)}
  assert set(sets.SETS) == fields == set(TASKS) == {name.partition('/')[0] for name in FILES}


def test_its_tasks(stored):
  for dataset, expected in TASKS.items():
    found = stored(dataset, DIRECTORY / dataset / '*')
    assert {split: len(tasks) for split, tasks in found.items()} == {
        split: len(tasks) for split, tasks in expected.items()}, dataset
    for split, tasks in expected.items():
      for name, (end, answer, solution) in tasks.items():
        task, = [task for id, task in found[split].items()
                 if id == f'{dataset}/{name}' or task['prompt'].startswith(name)]
        assert task['prompt'].endswith(end) and (task['answer'], task['solution']) == (answer, solution), dataset
        assert task['verifier'] == ('choice' if dataset == 'gpqa_diamond' else 'math')
        assert task['difficulty'] == DIFFICULTY.get(task['id'], 0) and task['info'] == ''
        assert task['prompt'] == task['prompt'].strip() and task['id'].startswith(f'{dataset}/')


def test_a_schema_names_what_its_task_reads():
  for name, rows in FILES.items():
    problem_set = sets.SETS[name.partition('/')[0]]
    for row in rows:
      assert published.misfit(row, problem_set.schema) is None
      assert problem_set.task(only(row, problem_set.schema)) == problem_set.task(row)
    assert problem_set.about and problem_set.where


def only(x, schema):
  """Of a row the fields in its schema."""
  if isinstance(schema, dict):
    return {field: only(x[field], inner) for field, inner in schema.items()}
  return [only(y, schema[0]) for y in x] if isinstance(schema, list) else x


def test_ids_are_of_the_problem_alone(stored):
  both, one = (stored('aime_2025', DIRECTORY / 'aime_2025' / name)['test']
               for name in ('aime2025-*.jsonl', 'aime2025-II.jsonl'))
  assert one.items() < both.items() and set(one) == {'aime_2025/9f814a224ff4d0ad'}


def test_answers_of_amc_that_are_numbers():
  assert [sets.amc_answer(x) for x in (27.0, 2.5, 7, '27.0')] == ['27', '2.5', '7', '27.0']


def test_the_instructions_of_dapo():
  assert (sets.DAPO_BEFORE, sets.DAPO_AFTER) == (BEFORE.strip(), AFTER.strip())
  row = dapo('1+1?', '2', 'a')
  row['prompt'].insert(0, {'role': 'system', 'content': 'Be good.'})
  with pytest.raises(ValueError, match=r"prompt has the roles \['system', 'user'\], not one user"):
    sets.dapo_task(row)


def test_the_choices_of_gpqa():
  rows = [gpqa(f'rec{i}', f'Question {i}?', 'right ', 'a', 'b', 'c') for i in range(400)]
  answers = []
  for task in map(sets.gpqa_task, rows):
    choices = dict(re.findall(r'^\(([A-D])\) (.+)$', task['prompt'], re.MULTILINE))
    assert ''.join(choices) == 'ABCD' and set(choices.values()) == {'right', 'a', 'b', 'c'}
    assert choices[task['answer']] == 'right'
    answers.append(task['answer'])
  assert all(70 < answers.count(letter) < 130 for letter in 'ABCD')  # 100, standard deviation 8.7
  for question, choices, message in (
      (' ', 'abcd', 'the prompt is empty'), ('Which?', 'ab d', "'Incorrect Answer 2' is empty"),
      ('Which?', ('a', 'b', 'a ', 'd'), "the right choice 'a' stands among the wrong ones")):
    with pytest.raises(ValueError, match=message):
      sets.gpqa_task(gpqa('rec1', question, *choices))


def test_files_of_gsm8k(stored, tmp_path):
  assert list(stored('gsm8k', DIRECTORY / 'gsm8k' / 'test.jsonl')) == ['test']
  for name in ('train.jsonl', 'train_socratic.jsonl'):
    (tmp_path / name).write_bytes((DIRECTORY / 'gsm8k' / 'train.jsonl').read_bytes())
  assert len(stored('gsm8k', tmp_path / '*.jsonl')['train']) == 2
  (tmp_path / 'dev.jsonl').write_bytes((DIRECTORY / 'gsm8k' / 'test.jsonl').read_bytes())
  with pytest.raises(ValueError, match=r"names \['dev.jsonl'\]; their names must start with one of"):
    stored('gsm8k', tmp_path / '*.jsonl')


def test_answers_of_gsm8k():
  assert sets.gsm8k_task({'question': '?', 'answer': 'A #### b.\n#### -1,000,000 '})['answer'] == '-1000000'
  with pytest.raises(ValueError, match='the answer does not end in "#### NUMBER": \'It is 2\''):
    sets.gsm8k_task({'question': '1+1?', 'answer': 'It is 2'})
  with pytest.raises(ValueError, match='^line 1: the answer is empty'):
    published.read(sets.SETS['gsm8k'], [('line 1', {'question': '1+1?', 'answer': 'Add.\n#### '})])


def test_gsm8k_as_tfds_has_prepared_it(stored, tmp_path, monkeypatch):
  """Without files; the stock builder is only kept from the network."""
  class Local:
    def download_and_extract(self, urls):
      return {split: str(DIRECTORY / 'gsm8k' / f'{split.removesuffix("_socratic")}.jsonl') for split in urls}

  generate = theirs.Gsm8k._split_generators
  with monkeypatch.context() as patch:
    patch.setattr(theirs.Gsm8k, '_split_generators', lambda self, _: generate(self, Local()))
    theirs.Gsm8k(data_dir=tmp_path / 'stored', file_format='array_record').download_and_prepare()
  assert stored('gsm8k') == stored('gsm8k', DIRECTORY / 'gsm8k' / 't*')


def test_gsm8k_without_files_or_network(stored, monkeypatch):
  def offline(self, _):
    raise ConnectionError('no network')
  monkeypatch.setattr(theirs.Gsm8k, '_split_generators', offline)
  with pytest.raises(ValueError, match=r'(?s)gsm8k cannot be downloaded \(.*no network.*point with '
                                       r'--config.tasks.files.gsm8k=PATH to train.jsonl and test.jsonl'):
    stored('gsm8k')
