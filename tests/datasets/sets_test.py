"""The table of published problem sets: each on a small file of its schema, and the logic that some have."""

import base64
import dataclasses
import json
import os
import re
import zlib

import pytest
from tensorflow_datasets.text.gsm8k import gsm8k as theirs

from kr_jax import hub
from kr_jax import knobs
from kr_jax.datasets import published
from kr_jax.datasets import sets
from tests.make_datasets import (
    AFTER, BEFORE, DIRECTORY, FILES, dapo, gpqa, private_tests, case, write)

THIRD = FILES['human_eval/HumanEval.jsonl.gz'][0]['prompt'] + '    return xs[2]'
SHIFT = FILES['human_eval/HumanEval.jsonl.gz'][1]['prompt']
# By dataset and split, {the id, or for a task named by its prompt the first letters: (prompt's end, answer,
# solution)}; ... is anything.
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
    'human_eval': {'test': {
        'HumanEval/0': ('>>> third([4, 5, 6])\n    6\n    """', THIRD, f'```python\n{THIRD}\n```'),
        'HumanEval/1': ('""" Undoes shift. """', f'{SHIFT}    return xs[len(xs) - by:] + xs[:len(xs) - by]', ...)}},
    'live_code_bench': {'test': {
        'abc9_a': (f'{sets.LIVE_CODE_WITHOUT_STARTER}\n```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the '
                   'provided format with backticks)', '', ''),
        '77': ('self, a: int, b: int) -> int:\n        \n```\n\n### Answer: (use the provided format with backticks)',
               '', ''),
        'abc9_b': ('', '', '')}},
    'mbpp': {
        'prompt': {'2': ('task: Write a function to double a number. Your code should pass these tests:\n\n'
                         'assert double(3) == 6\nassert double(-1) == -2\nassert double("a") == "aa"',
                         'def double(x):\n  return 2 * x', '```python\ndef double(x):\n  return 2 * x\n```')},
        'test': {'11': ('assert in_order([]) == []', 'def in_order(xs):\n  return sorted(xs)', ...)},
        'validation': {'600': ('assert root(leaf) == 1\nassert root(top) == 1', ..., ...)},
        'train': {'974': ('assert swap(("a", None)) == (None, "a")', 'def swap(p):\n  return p[1], p[0]', ...)}},
    'mbpp_sanitized': {
        'test': {'14': ('the area of a disc. Your code should pass these tests:\n\n'
                        'assert math.isclose(area(1), 3.14159, rel_tol=0.001)\nassert area(0) == 0', ..., ...)},
        'train': {'700': ('assert vowels("") == 0', ..., ...)}},
    'math_500': {'test': {
        'test/prealgebra/1.json': ('Compute $3+\\frac12$.', '\\frac72', 'It is $\\boxed{\\frac72}$.'),
        'test/algebra/2.json': ('for $x>0$.', '1', 'Divide by $x$: $\\boxed{1}$.')}},
    'minerva_math': {'test': {'A lens': ('length in cm?', '25', ''), 'A gas': ('its work?', 'p V', '')}},
    'olympiad_bench': {'test': {
        '1606': ('Find all $x$ with $x^2=4$.', '$-2$,$2$', 'Both signs.'),
        '1610': ('Let $f(x)=x^2+1$.\n\nFind $f(2)$.', '5', 'Put $x=2$.')}},
}
DIFFICULTY = {'math_500/test/prealgebra/1.json': 1, 'math_500/test/algebra/2.json': 5, 'live_code_bench/abc9_a': 1,
              'live_code_bench/77': 2, 'live_code_bench/abc9_b': 3}
PROGRAMS = ('human_eval', 'live_code_bench', 'mbpp', 'mbpp_sanitized')
VERIFIERS = {'gpqa_diamond': 'choice', **dict.fromkeys(PROGRAMS, 'python_tests')}


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
        assert task['prompt'].endswith(end), dataset
        assert answer in (task['answer'], ...) and solution in (task['solution'], ...), dataset
        assert task['verifier'] == VERIFIERS.get(dataset, '')
        assert task['difficulty'] == DIFFICULTY.get(task['id'], 0) and bool(task['info']) == (dataset in PROGRAMS)
        assert task['prompt'] == task['prompt'].strip() and task['id'].startswith(f'{dataset}/')


def test_a_schema_names_what_its_task_reads():
  for name, rows in FILES.items():
    problem_set = sets.SETS[name.partition('/')[0]]
    for row in rows:
      assert published.misfit(row, problem_set.schema) is None
      assert problem_set.task(only(row, problem_set.schema)) == problem_set.task(row)
    assert problem_set.about and problem_set.where
    assert hub.parse(f'hf:{problem_set.hub}', '').path.endswith(published.ENDINGS)


def only(x, schema):
  """Of a row the fields in its schema."""
  if isinstance(schema, dict):
    return {field: only(x[field], inner) for field, inner in schema.items()}
  return [only(y, schema[0]) for y in x] if isinstance(schema, list) else x


def info_of(dataset, row):
  return json.loads(sets.SETS[dataset].task(row)['info'])


def test_the_tests_of_mbpp():
  whole, sanitized = FILES['mbpp/mbpp.jsonl'], FILES['mbpp_sanitized/sanitized-mbpp.json']
  assert info_of('mbpp', whole[0]) == {'form': 'asserts', 'tests': whole[0]['test_list'], 'setup': ''}
  assert info_of('mbpp', whole[2])['setup'] == 'top = Node(1) \nleaf = Node(2)\nleaf.up = top'
  assert info_of('mbpp_sanitized', sanitized[0])['setup'] == 'import math'


def test_a_row_of_mbpp_without_an_id_is_refused_by_its_place(stored, tmp_path):
  rows = FILES['mbpp/mbpp.jsonl']
  for changed, message in (({'task_id': '2'}, "task_id is '2' .str., not int"),
                           ({'test_list': []}, 'not a list of one')):
    path = write(tmp_path / 'mbpp.jsonl', [rows[0], rows[1] | changed])
    with pytest.raises(ValueError, match=f'^{re.escape(str(path))}, row 2: .*{message}'):
      stored('mbpp', path)
  write(tmp_path / 'mbpp.jsonl', []).write_text('[1]\n')
  with pytest.raises(ValueError, match='row 1: it is .1. .list., not an object'):
    stored('mbpp', tmp_path / 'mbpp.jsonl')


def test_mbpp_needs_files():
  with pytest.raises(ValueError, match="'mbpp' is fetched .* Or download mbpp.jsonl, .*--config.tasks.files.mbpp=PATH"):
    published.files(sets.SETS['mbpp'], '')


def test_the_tests_of_human_eval():
  row = FILES['human_eval/HumanEval.jsonl.gz'][0]
  assert info_of('human_eval', row) == {'form': 'asserts', 'tests': [f'{row["test"]}\ncheck(third)'],
                                        'prompt': row['prompt'], 'entry_point': 'third'}


def test_the_tests_of_live_code_bench():
  one, two = FILES['live_code_bench/test.jsonl']
  for row, expected in (
      (one, {'form': 'stdin', 'tests': [{'input': '1 2\n', 'output': '3\n'}, {'input': '5 6 7\n', 'output': '18\n'},
                                        {'input': '-1\n', 'output': '-1\n'}]}),
      (two, {'form': 'calls', 'entry_point': 'larger', 'tests': [{'input': [1, 2], 'output': 2},
                                                                {'input': [-3, -4], 'output': -3}]})):
    info = info_of('live_code_bench', row)
    info['tests'] = json.loads(zlib.decompress(base64.b64decode(info.pop('packed'))))
    assert info == expected | {'imports': True, 'seconds': sets.LIVE_CODE_SECONDS}


@pytest.mark.parametrize('changed, message', [
    ({'private_test_cases': '[]', 'public_test_cases': '[]'}, 'it has no test'),
    ({'public_test_cases': '{}'}, 'public_test_cases is JSON of dict, not of a list'),
    ({'public_test_cases': '[1]'}, 'a test is 1 .int., not an object'),
    ({'public_test_cases': '[{"input": "1"}]'}, 'a test.output is missing'),
    ({'public_test_cases': json.dumps([case('1', '2', 'functional')])}, "the testtypes .'functional', 'stdin'."),
    ({'private_test_cases': '['}, 'private_test_cases is not JSON'),
    ({'private_test_cases': 'x!'}, 'is neither JSON nor'), ({'difficulty': 'cruel'}, "difficulty is 'cruel'"),
    ({'private_test_cases': private_tests([1])}, 'it does more than hold a text: EMPTY_LIST'),
    ({'private_test_cases': private_tests('1')}, 'is JSON of int, not of a list')])
def test_rows_of_live_code_bench_that_are_no_tasks(changed, message):
  with pytest.raises(ValueError, match=message):
    sets.live_code_task(FILES['live_code_bench/test.jsonl'][0] | changed)


@pytest.mark.parametrize('changed, message', [
    ({'metadata': '{}'}, 'without the func_name'), ({'metadata': '{"func_name": "a b"}'}, 'without the func_name'),
    ({'metadata': 'x'}, 'metadata is not JSON'), ({'metadata': '[]'}, 'without the func_name'),
    ({'private_test_cases': json.dumps([case('x', '1', 'functional')])}, 'an input is not JSON'),
    ({'private_test_cases': json.dumps([case('1', '', 'functional')])}, 'an output is not JSON')])
def test_functions_of_live_code_bench_that_are_no_tasks(changed, message):
  with pytest.raises(ValueError, match=message):
    sets.live_code_task(FILES['live_code_bench/test.jsonl'][1] | changed)


class Evil:
  """Its pickle makes a folder when it is loaded."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_pickle_of_live_code_bench_runs_nothing(tmp_path):
  with pytest.raises(ValueError, match=r'neither JSON nor a pickle of a text: it does more than hold a text: STACK'):
    sets.live_code_private(private_tests(Evil(tmp_path / 'made')))
  assert not [*tmp_path.iterdir()]
  assert sets.live_code_private(private_tests('[1]')) == [1]


def test_a_pickle_of_live_code_bench_has_a_limit(monkeypatch):
  monkeypatch.setattr(sets, 'MOST_UNPACKED', 1000)
  with pytest.raises(ValueError, match='private_test_cases'):
    sets.live_code_private(private_tests('[' + ' ' * 2000 + ']'))


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
