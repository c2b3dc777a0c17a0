"""The published problem sets: where their files are, which fields a row has, and which task a row is.

A row with another name for its fields is one expression; logic of a set's own is a function above the table.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
import json
import pickletools
import re
from typing import Any
import zlib

from etils import epath

from kr_jax.datasets import builder
from kr_jax.datasets import published

# DAPO wraps every problem in these instructions; here tasks.template says how a problem is put.
DAPO_BEFORE = ('Solve the following math problem step by step. The last line of your response should be of the form '
               'Answer: $Answer (without quotes) where $Answer is the answer to the problem.')
DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'
GPQA_CHOICES = ('Correct Answer', 'Incorrect Answer 1', 'Incorrect Answer 2', 'Incorrect Answer 3')
GSM8K_SPLITS = ('test', 'train')
GSM8K_WHERE = (
    'train.jsonl and test.jsonl, in grade_school_math/data/ of openai/grade-school-math on GitHub, or the files of '
    "main/ of openai/gsm8k on the Hugging Face hub (both: 'DIRECTORY/t*')")

# The prompt of Austin et al. 2021, section 3, up to where the program begins.
MBPP_PROMPT = 'You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}'
MBPP_SPLITS = {'prompt': range(1, 11), 'test': range(11, 511), 'validation': range(511, 601),
               'train': range(601, 975)}  # by task_id, as the paper has them
# LiveCodeBench's own prompt for a model without a format of its own.
LIVE_CODE_WITH_STARTER = ('You will use the following starter code to write the solution to the problem and enclose '
                          'your code within delimiters.')
LIVE_CODE_WITHOUT_STARTER = (
    'Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample '
    'inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the '
    'inputs, runs the algorithm and writes output to STDOUT.')
LIVE_CODE_DIFFICULTY = {'easy': 1, 'medium': 2, 'hard': 3}
LIVE_CODE_SECONDS = 30.0  # of all tests; the published limit is 6 seconds of each
MOST_UNPACKED = 2 ** 29  # bytes of the tests of a problem


def amc_answer(answer: str | int | float) -> str:
  """The text of an answer. Copies of the set have 27.0 where 27 is meant."""
  return str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)


def question_and_answer(row: published.Row) -> published.Task:
  return {'prompt': row['question'], 'answer': row['answer']}


def dapo_task(row: published.Row) -> published.Task:
  """The problem of a row, without the instructions around it."""
  roles = [message['role'] for message in row['prompt']]
  if roles != ['user']:
    raise ValueError(f'prompt has the roles {roles}, not one user')
  problem = row['prompt'][0]['content'].strip().removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
  return {'prompt': problem, 'answer': row['reward_model']['ground_truth']}


def gpqa_task(row: published.Row) -> published.Task:
  """A question with its choices, in an order that the id alone decides; the answer is a letter."""
  question, *choices = (row[name].strip() for name in ('Question', *GPQA_CHOICES))
  if not question:
    raise ValueError('the prompt is empty')
  if '' in choices:
    raise ValueError(f'{GPQA_CHOICES[choices.index("")]!r} is empty')
  if choices[0] in choices[1:]:
    raise ValueError(f'the right choice {choices[0]!r} stands among the wrong ones')
  order = sorted(range(4), key=lambda i: builder.digest(f'{row["Record ID"]}/{i}'))
  listed = '\n'.join(f'({letter}) {choices[i]}' for letter, i in zip('ABCD', order))
  return {'id': row['Record ID'], 'prompt': f'{question}\n\n{listed}', 'answer': 'ABCD'[order.index(0)],
          'verifier': 'choice'}


def gsm8k_task(row: published.Row) -> published.Task:
  """A problem, whose answer loses the commas of thousands, and its solution the calculator's '<<6*7=42>>'."""
  steps, mark, answer = row['answer'].rpartition('####')
  if not mark:
    raise ValueError(f'the answer does not end in "#### NUMBER": {row["answer"][-60:]!r}')
  answer = answer.strip().replace(',', '')
  steps = re.sub('<<[^>]*>>', '', steps)
  return {'prompt': row['question'], 'answer': answer, 'solution': f'{steps}#### {answer}'}


def gsm8k_rows(paths: Sequence[epath.Path], data_dir: str) -> Mapping[str, published.LocatedRows]:
  """The rows of files that are named after their splits, but for the Socratic ones; without files, TFDS's own."""
  if not paths:
    return {split: _gsm8k_of_tfds(split, data_dir) for split in GSM8K_SPLITS}
  if other := [path.name for path in paths if not path.name.startswith(GSM8K_SPLITS)]:
    raise ValueError(f'tasks.files.gsm8k names {other}; their names must start with one of {GSM8K_SPLITS}')
  main = [path for path in paths if 'socratic' not in path.name]
  by_split = {split: [path for path in main if path.name.startswith(split)] for split in GSM8K_SPLITS}
  return {split: published.rows(some) for split, some in by_split.items() if some}


def _gsm8k_of_tfds(split: str, data_dir: str) -> Iterator[tuple[str, published.Row]]:
  """The rows of TFDS's own dataset, from data_dir where TFDS has prepared it there, else downloaded."""
  from tensorflow_datasets.text.gsm8k import gsm8k
  stored = gsm8k.Gsm8k(data_dir=data_dir, file_format='array_record')
  try:
    stored.download_and_prepare()
  except Exception as error:  # of the network, of many kinds
    raise ValueError(f'gsm8k cannot be downloaded ({error}); point with --config.tasks.files.gsm8k=PATH to '
                     f'{GSM8K_WHERE}') from error
  for number, row in enumerate(stored.as_data_source(split), start=1):
    yield f'{split} of {stored.data_dir}, row {number}', {field: text.decode() for field, text in row.items()}


def programs_task(prompt: str, code: str, /, **info: Any) -> published.Task:
  """A task whose verifier runs a program; code is the published program, '' where there is none."""
  code = code.replace('\r\n', '\n').strip()
  return {'prompt': prompt, 'answer': code, 'solution': f'```python\n{code}\n```' if code else '',
          'verifier': 'python_tests', 'info': json.dumps(info)}


def mbpp_task(row: published.Row) -> published.Task:
  """A row of either file: the whole set has 'text' and 'test_setup_code', the sanitized one others in their place."""
  setup = row['test_setup_code'] if 'test_setup_code' in row else '\n'.join(row['test_imports'])
  text = row['text'] if 'text' in row else row['prompt']
  return {'id': str(row['task_id']), **programs_task(
      MBPP_PROMPT.format(text, '\n'.join(row['test_list'])), row['code'], form='asserts',
      tests=row['test_list'], setup=setup.replace('\r\n', '\n'))}


def mbpp_rows(paths: Sequence[epath.Path], data_dir: str) -> Mapping[str, published.LocatedRows]:
  """The rows of each split, which the id of a row decides."""
  del data_dir
  by_split = {}
  for place, row in published.rows(paths):
    number = row.get('task_id') if isinstance(row, dict) else None
    split = next((split for split, ids in MBPP_SPLITS.items() if number in ids), 'test')  # to be refused there
    by_split.setdefault(split, []).append((place, row))
  return by_split


def human_eval_task(row: published.Row) -> published.Task:
  """A function to complete, by its body or whole."""
  return {'id': row['task_id'], **programs_task(
      row['prompt'], row['prompt'] + row['canonical_solution'], form='asserts',
      tests=[f'{row["test"]}\ncheck({row["entry_point"]})'], prompt=row['prompt'], entry_point=row['entry_point'])}


def live_code_task(row: published.Row) -> published.Task:
  """A problem of a competition, with its public and its private tests."""
  tests = [*_json_list('public_test_cases', row['public_test_cases']), *live_code_private(row['private_test_cases'])]
  if not tests:
    raise ValueError('it has no test')
  for test in tests:
    if problem := published.misfit(test, {'input': str, 'output': str, 'testtype': str}, 'a test'):
      raise ValueError(problem)
  kinds = {test['testtype'] for test in tests}
  if len(kinds) > 1 or kinds - {'stdin', 'functional'}:
    raise ValueError(f"the tests have the testtypes {sorted(kinds)}, not 'stdin' or 'functional' alone")
  if row['difficulty'] not in LIVE_CODE_DIFFICULTY:
    raise ValueError(f'difficulty is {row["difficulty"]!r}, not one of {list(LIVE_CODE_DIFFICULTY)}')
  info = {'form': 'stdin'}
  if kinds == {'functional'}:
    info = {'form': 'calls', 'entry_point': _function_name(row['metadata'])}
    tests = [{'input': [_json_value('an input', line) for line in test['input'].split('\n')],
              'output': _json_value('an output', test['output'])} for test in tests]
  packed = zlib.compress(json.dumps([{'input': test['input'], 'output': test['output']} for test in tests]).encode())
  form = (f'{LIVE_CODE_WITH_STARTER}\n```python\n{row["starter_code"]}' if row['starter_code'] else
          f'{LIVE_CODE_WITHOUT_STARTER}\n```python\n# YOUR CODE HERE')
  prompt = (f'### Question:\n{row["question_content"]}\n\n### Format: {form}\n```\n\n'
            '### Answer: (use the provided format with backticks)')
  return {'id': row['question_id'], 'difficulty': LIVE_CODE_DIFFICULTY[row['difficulty']], **programs_task(
      prompt, '', **info, imports=True, seconds=LIVE_CODE_SECONDS, packed=base64.b64encode(packed).decode())}


def live_code_private(text: str) -> list[Any]:
  """The private tests: JSON, or in base64 and zlib a pickle of JSON, of which nothing but a text is read.

  Raises ValueError for anything else.
  """
  if text.lstrip().startswith('['):
    return _json_list('private_test_cases', text)
  try:
    unpacker = zlib.decompressobj()
    pickled = unpacker.decompress(base64.b64decode(text, validate=True), MOST_UNPACKED)
    unpacked = _pickled_text(pickled)
  except Exception as error:  # what is no pickle raises errors of many kinds
    raise ValueError(f'private_test_cases is neither JSON nor a pickle of a text: {error}') from error
  if unpacker.unconsumed_tail:
    raise ValueError(f'private_test_cases is above {MOST_UNPACKED} bytes')
  return _json_list('private_test_cases', unpacked)


def _pickled_text(data: bytes) -> str:
  """The text that a pickle is of. It is read, and not loaded: no operation of it runs.

  Raises ValueError for a pickle of anything else.
  """
  texts = []
  for operation, argument, _ in pickletools.genops(data):
    if operation.name in ('UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'):
      texts.append(argument)
    elif operation.name not in ('PROTO', 'FRAME', 'MEMOIZE', 'PUT', 'BINPUT', 'LONG_BINPUT', 'STOP'):
      raise ValueError(f'it does more than hold a text: {operation.name} {str(argument or "")[:60]}'.strip())
  if len(texts) != 1:
    raise ValueError(f'it holds {len(texts)} texts')
  return texts[0]


def _json_value(what: str, text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{what} is not JSON ({error})') from error


def _json_list(what: str, text: str) -> list[Any]:
  found = _json_value(what, text)
  if not isinstance(found, list):
    raise ValueError(f'{what} is JSON of {type(found).__name__}, not of a list')
  return found


def _function_name(metadata: str) -> str:
  found = _json_value('metadata', metadata)
  if not isinstance(found, dict) or not str(found.get('func_name', '')).isidentifier():
    raise ValueError(f'metadata is {metadata[:60]!r}, without the func_name of a function')
  return found['func_name']


def olympiad_task(row: published.Row) -> published.Task:
  """A problem after its context. Several answers are one text with commas; tolerance and unit are not used."""
  return {'id': str(row['id']), 'prompt': f'{row["context"] or ""}\n\n{row["question"]}',
          'answer': ', '.join(row['final_answer']), 'solution': row['solution'][0]}


SETS = {problem_set.name: problem_set for problem_set in (
    published.ProblemSet(
        name='aime_2024', about='The 30 problems of both papers; the answers are whole numbers in 0..999.',
        where='data/train-00000-of-00001.parquet of HuggingFaceH4/aime_2024 on the Hugging Face hub',
        hub='HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet',
        schema={'id': int, 'problem': str, 'solution': str, 'answer': str},
        task=lambda row: {'id': str(row['id']), 'prompt': row['problem'], 'answer': row['answer'],
                          'solution': row['solution']}),
    published.ProblemSet(
        name='aime_2025', about='The 30 problems of both papers, 15 a file; the answers are whole numbers in 0..999.',
        where='aime2025-I.jsonl and aime2025-II.jsonl of opencompass/AIME2025 on the Hugging Face hub '
                  "(both: 'aime2025-*.jsonl')",
        hub='opencompass/AIME2025/aime2025-*.jsonl',
        schema={'question': str, 'answer': str}, task=question_and_answer),
    published.ProblemSet(
        name='amc_2023', about='40 problems of AMC 12, without their choices; the answers are numbers.',
        where='test-00000-of-00001.parquet of math-ai/amc23 on the Hugging Face hub',
        hub='math-ai/amc23/test-00000-of-00001.parquet',
        schema={'question': str, 'answer': str | int | float},
        task=lambda row: {'prompt': row['question'], 'answer': amc_answer(row['answer'])}),
    published.ProblemSet(
        name='dapo_math_17k', source='Yu et al. 2025, arXiv 2503.14476',
        about='17 thousand problems, each about a hundred times in 1.79 million rows; the answers are whole numbers.',
        where='data/dapo-math-17k.parquet of BytedTsinghua-SIA/DAPO-Math-17k on the Hugging Face hub',
        hub='BytedTsinghua-SIA/DAPO-Math-17k/data/dapo-math-17k.parquet',
        schema={'prompt': [{'role': str, 'content': str}], 'reward_model': {'ground_truth': str}},
        task=dapo_task, split='train', merged=True, version='1.1.0'),
    published.ProblemSet(
        name='gpqa_diamond', source='Rein et al. 2023, arXiv 2311.12022',
        about='198 questions of physics, chemistry and biology with four choices.',
        where='gpqa_diamond.csv of Idavidrein/gpqa on the Hugging Face hub',
        hub='Idavidrein/gpqa/gpqa_diamond.csv',
        schema={'Record ID': str, 'Question': str, **dict.fromkeys(GPQA_CHOICES, str)}, task=gpqa_task),
    published.ProblemSet(
        name='gsm8k', source='Cobbe et al. 2021, arXiv 2110.14168',
        about='8.5 thousand word problems of grade school, with worked solutions.', where=GSM8K_WHERE,
        hub='openai/gsm8k/main/*.parquet',
        schema={'question': str, 'answer': str}, task=gsm8k_task, rows_by_split=gsm8k_rows, needs_files=False),
    published.ProblemSet(
        name='human_eval', source='Chen et al. 2021, arXiv 2107.03374',
        about='164 functions to complete in Python, by their description.',
        where='HumanEval.jsonl.gz, in data/ of openai/human-eval on GitHub, or '
                  'openai_humaneval/test-00000-of-00001.parquet of openai/openai_humaneval on the Hugging Face hub',
        hub='openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet',
        schema={'task_id': str, 'prompt': str, 'canonical_solution': str, 'test': str, 'entry_point': str},
        task=human_eval_task),
    published.ProblemSet(
        name='live_code_bench', source='Jain et al. 2024, arXiv 2403.07974',
        about='Problems of programming competitions, of LeetCode, AtCoder and Codeforces; the difficulty is 1..3.',
        where='test.jsonl and test2.jsonl to test6.jsonl, one for each release, of '
                  "livecodebench/code_generation_lite on the Hugging Face hub (all: 'test*.jsonl')",
        hub='livecodebench/code_generation_lite/test*.jsonl',
        schema={'question_id': str, 'question_content': str, 'starter_code': str, 'difficulty': str,
                'public_test_cases': str, 'private_test_cases': str, 'metadata': str},
        task=live_code_task),
    published.ProblemSet(
        name='math_500', source='Lightman et al. 2023, arXiv 2305.20050; Hendrycks et al. 2021, arXiv 2103.03874',
        about='500 competition problems of MATH, with worked solutions; the difficulty is the level, 1..5.',
        where='test.jsonl of HuggingFaceH4/MATH-500 on the Hugging Face hub',
        hub='HuggingFaceH4/MATH-500/test.jsonl',
        schema={'unique_id': str, 'problem': str, 'solution': str, 'answer': str, 'level': int},
        task=lambda row: {'id': row['unique_id'], 'prompt': row['problem'], 'answer': row['answer'],
                          'difficulty': row['level'], 'solution': row['solution']}),
    published.ProblemSet(
        name='mbpp', source='Austin et al. 2021, arXiv 2108.07732',
        about='974 basic programs in Python, each with three tests, which the prompt shows.',
        where="mbpp.jsonl, in mbpp/ of google-research/google-research on GitHub, or the files of full/ of "
                  "google-research-datasets/mbpp on the Hugging Face hub ('full/*.parquet')",
        hub='google-research-datasets/mbpp/full/*.parquet',
        schema={'task_id': int, 'text': str, 'code': str, 'test_list': [str], 'test_setup_code': str},
        task=mbpp_task, rows_by_split=mbpp_rows),
    published.ProblemSet(
        name='mbpp_sanitized', source='Austin et al. 2021, arXiv 2108.07732',
        about='427 of MBPP, whose authors checked and mended them by hand.',
        where="sanitized-mbpp.json, in mbpp/ of google-research/google-research on GitHub, or the files of sanitized/ "
                  "of google-research-datasets/mbpp on the Hugging Face hub ('sanitized/*.parquet')",
        hub='google-research-datasets/mbpp/sanitized/*.parquet',
        schema={'task_id': int, 'prompt': str, 'code': str, 'test_list': [str], 'test_imports': list},
        task=mbpp_task, rows_by_split=mbpp_rows),
    published.ProblemSet(
        name='minerva_math', source='Lewkowycz et al. 2022, arXiv 2206.14858, section 2.5 (OCWCourses)',
        about='272 problems of university courses in science, with short answers.',
        where='test.jsonl of math-ai/minervamath on the Hugging Face hub',
        hub='math-ai/minervamath/test.jsonl',
        schema={'question': str, 'answer': str}, task=question_and_answer),
    published.ProblemSet(
        name='olympiad_bench', source='He et al. 2024, arXiv 2402.14008',
        about='The 674 open-ended mathematical problems in English without pictures.',
        where='OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet, in OlympiadBench/ of Hothan/OlympiadBench on the '
                  'Hugging Face hub',
        hub='Hothan/OlympiadBench/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet',
        schema={'id': int, 'question': str, 'context': str | None, 'solution': [str], 'final_answer': [str]},
        task=olympiad_task),
)}
