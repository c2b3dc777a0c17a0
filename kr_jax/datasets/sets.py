"""The published problem sets: where their files are, which fields a row has, and which task a row is.

A row with another name for its fields is one expression; logic of a set's own is a function above the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import re

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


def olympiad_task(row: published.Row) -> published.Task:
  """A problem after its context. Several answers are one text with commas; tolerance and unit are not used."""
  return {'id': str(row['id']), 'prompt': f'{row["context"] or ""}\n\n{row["question"]}',
          'answer': ', '.join(row['final_answer']), 'solution': row['solution'][0]}


SETS = {problem_set.name: problem_set for problem_set in (
    published.ProblemSet(
        name='aime_2024', about='The 30 problems of both papers; the answers are whole numbers in 0..999.',
        where='data/train-00000-of-00001.parquet of HuggingFaceH4/aime_2024 on the Hugging Face hub',
        schema={'id': int, 'problem': str, 'solution': str, 'answer': str},
        task=lambda row: {'id': str(row['id']), 'prompt': row['problem'], 'answer': row['answer'],
                          'solution': row['solution']}),
    published.ProblemSet(
        name='aime_2025', about='The 30 problems of both papers, 15 a file; the answers are whole numbers in 0..999.',
        where='aime2025-I.jsonl and aime2025-II.jsonl of opencompass/AIME2025 on the Hugging Face hub '
                  "(both: 'aime2025-*.jsonl')",
        schema={'question': str, 'answer': str}, task=question_and_answer),
    published.ProblemSet(
        name='amc_2023', about='40 problems of AMC 12, without their choices; the answers are numbers.',
        where='test-00000-of-00001.parquet of math-ai/amc23 on the Hugging Face hub',
        schema={'question': str, 'answer': str | int | float},
        task=lambda row: {'prompt': row['question'], 'answer': amc_answer(row['answer'])}),
    published.ProblemSet(
        name='dapo_math_17k', source='Yu et al. 2025, arXiv 2503.14476',
        about='17 thousand problems, each about a hundred times in 1.79 million rows; the answers are whole numbers.',
        where='data/dapo-math-17k.parquet of BytedTsinghua-SIA/DAPO-Math-17k on the Hugging Face hub',
        schema={'prompt': [{'role': str, 'content': str}], 'reward_model': {'ground_truth': str}},
        task=dapo_task, split='train', merged=True),
    published.ProblemSet(
        name='gpqa_diamond', source='Rein et al. 2023, arXiv 2311.12022',
        about='198 questions of physics, chemistry and biology with four choices.',
        where='gpqa_diamond.csv of Idavidrein/gpqa on the Hugging Face hub',
        schema={'Record ID': str, 'Question': str, **dict.fromkeys(GPQA_CHOICES, str)}, task=gpqa_task),
    published.ProblemSet(
        name='gsm8k', source='Cobbe et al. 2021, arXiv 2110.14168',
        about='8.5 thousand word problems of grade school, with worked solutions.', where=GSM8K_WHERE,
        schema={'question': str, 'answer': str}, task=gsm8k_task, rows_by_split=gsm8k_rows),
    published.ProblemSet(
        name='math_500', source='Lightman et al. 2023, arXiv 2305.20050; Hendrycks et al. 2021, arXiv 2103.03874',
        about='500 competition problems of MATH, with worked solutions; the difficulty is the level, 1..5.',
        where='test.jsonl of HuggingFaceH4/MATH-500 on the Hugging Face hub',
        schema={'unique_id': str, 'problem': str, 'solution': str, 'answer': str, 'level': int},
        task=lambda row: {'id': row['unique_id'], 'prompt': row['problem'], 'answer': row['answer'],
                          'difficulty': row['level'], 'solution': row['solution']}),
    published.ProblemSet(
        name='minerva_math', source='Lewkowycz et al. 2022, arXiv 2206.14858, section 2.5 (OCWCourses)',
        about='272 problems of university courses in science, with short answers.',
        where='test.jsonl of math-ai/minervamath on the Hugging Face hub',
        schema={'question': str, 'answer': str}, task=question_and_answer),
    published.ProblemSet(
        name='olympiad_bench', source='He et al. 2024, arXiv 2402.14008',
        about='The 674 open-ended mathematical problems in English without pictures.',
        where='OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet, in OlympiadBench/ of Hothan/OlympiadBench on the '
                  'Hugging Face hub',
        schema={'id': int, 'question': str, 'context': str | None, 'solution': [str], 'final_answer': [str]},
        task=olympiad_task),
)}
