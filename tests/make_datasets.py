"""Writes tests/data/datasets: small files of the published schemas, with invented problems.

    python -m tests.make_datasets
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import pathlib
import pickle
from typing import Any
import zlib

import pyarrow
from pyarrow import parquet

DIRECTORY = pathlib.Path(__file__).parent / 'data' / 'datasets'

BEFORE = ('Solve the following math problem step by step. The last line of your response should be of '
          'the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n')
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo(problem: str, answer: str, index: str) -> dict:
  """A row of DAPO-Math-17k."""
  return {'data_source': 'math_dapo',
          'prompt': [{'content': f'{BEFORE}{problem}{AFTER}', 'role': 'user'}], 'ability': 'MATH',
          'reward_model': {'ground_truth': answer, 'style': 'rule-lighteval/MATH_v2'},
          'extra_info': {'index': index}}


def olympiad(id: int, question: str, solution: list[str], answer: list[str], context: str | None = None
             ) -> dict:
  """A row of OlympiadBench."""
  return {'id': id, 'question': question, 'solution': solution, 'final_answer': answer,
          'context': context, 'image_1': None, 'modality': 'Text-only', 'difficulty': 'Competition',
          'is_multiple_answer': ',' in answer[0], 'unit': None, 'answer_type': 'Numerical',
          'error': None, 'question_type': 'Open-ended', 'subfield': 'Algebra', 'subject': 'Math',
          'language': 'English'}


def gpqa(id: str, question: str, right: str, *wrong: str) -> dict:
  """A row of GPQA."""
  return {'Record ID': id, 'Question': question, 'Correct Answer': right,
          **{f'Incorrect Answer {i}': x for i, x in enumerate(wrong, start=1)}, 'Explanation': '',
          'High-level domain': 'Physics'}


def mbpp(task_id: int, text: str, code: str, tests: list[str], setup: str = '') -> dict:
  """A row of MBPP."""
  return {'text': text, 'code': code, 'task_id': task_id, 'test_setup_code': setup, 'test_list': tests,
          'challenge_test_list': []}


def live_code(id: str, question: str, public: list[dict], private: list[dict], *, starter: str = '', name: str = '',
              difficulty: str = 'easy', pickled: bool = True) -> dict:
  """A row of LiveCodeBench; private tests are a pickle of a text, or JSON."""
  return {'question_title': id, 'question_content': question, 'platform': 'leetcode' if name else 'atcoder',
          'question_id': id, 'contest_id': 'c', 'contest_date': '2025-01-01T00:00:00', 'starter_code': starter,
          'difficulty': difficulty, 'public_test_cases': json.dumps(public),
          'private_test_cases': private_tests(json.dumps(private)) if pickled else json.dumps(private),
          'metadata': json.dumps({'func_name': name} if name else {})}


def private_tests(x: Any) -> str:
  """A pickle as LiveCodeBench has them in its files; stored, as compressors differ."""
  return base64.b64encode(zlib.compress(pickle.dumps(x, protocol=4), 0)).decode()


def case(input: str, output: str, testtype: str = 'stdin') -> dict:
  """A test of LiveCodeBench."""
  return {'input': input, 'output': output, 'testtype': testtype}


# By dataset and published name, the rows of a file.
FILES = {
    'gsm8k/train.jsonl': [
        {'question': 'Mina has 6 trays of 7 eggs. How many eggs has she?',
         'answer': 'She has 6*7=<<6*7=42>>42 eggs.\n#### 42'},
        {'question': 'A mill grinds 600 sacks a day. How many in 2 days?',
         'answer': 'It grinds 2 * 600 = <<2*600=1200>>1,200 sacks.\n#### 1,200'},
    ],
    'gsm8k/test.jsonl': [
        {'question': 'Ole had 9 nuts — and ate 4. How many are left?',
         'answer': '9-4=<<9-4=5>>5\n#### 5'},
    ],
    'dapo_math_17k/dapo-math-17k.parquet': [
        dapo('How many even numbers lie in 1 to 21?', '10', 'a1'),
        dapo('What is the sum of the digits of 456?', '15', 'b2'),
        dapo('How many even numbers lie in 1 to 21?', '10', 'a1'),
        dapo('How many primes lie below 12?', '5', 'c3'),
        dapo('How many  even numbers\nlie in 1 to 21?', '10', 'd4'),
        dapo('How many primes lie below 12?', '6', 'e5'),
    ],
    'math_500/test.jsonl': [
        {'problem': 'Compute $3+\\frac12$.', 'solution': 'It is $\\boxed{\\frac72}$.',
         'answer': '\\frac72', 'subject': 'Prealgebra', 'level': 1,
         'unique_id': 'test/prealgebra/1.json'},
        {'problem': 'Solve $x^2=x$ for $x>0$.', 'solution': 'Divide by $x$: $\\boxed{1}$.',
         'answer': '1', 'subject': 'Algebra', 'level': 5, 'unique_id': 'test/algebra/2.json'},
    ],
    'aime_2024/train-00000-of-00001.parquet': [
        {'id': 60, 'problem': 'Find the remainder of $2^{10}$ by $1000$.', 'solution': '$1024$, so 024.',
         'answer': '024', 'url': 'https://example.org/1', 'year': '2024'},
        {'id': 61, 'problem': 'Find the number of squares below $1000$.',
         'solution': '$31^2<1000<32^2$.', 'answer': '031', 'url': 'https://example.org/2',
         'year': '2024'},
    ],
    'aime_2025/aime2025-I.jsonl': [
        {'question': 'Find the sum of all divisors of $28$.', 'answer': '56'},
    ],
    'aime_2025/aime2025-II.jsonl': [
        {'question': 'Find the number of divisors of $28$.', 'answer': '6'},
    ],
    'amc_2023/test-00000-of-00001.parquet': [
        {'id': '0', 'question': 'A train of 9 cars loses 2. How many remain?', 'answer': '7',
         'url': 'https://example.org/3'},
        {'id': '1', 'question': 'What is half of 5, as a decimal?', 'answer': '2.5',
         'url': 'https://example.org/4'},
    ],
    'minerva_math/test.jsonl': [
        {'question': 'A lens has a power of 4 per metre. What is its focal length in cm?',
         'answer': '25'},
        {'question': 'A gas doubles its volume at constant pressure $p$, from $V$. What is its work?',
         'answer': 'p V'},
    ],
    'olympiad_bench/OE_TO_maths_en_COMP.parquet': [
        olympiad(1606, 'Find all $x$ with $x^2=4$.', ['Both signs.', 'Or factor.'], ['$-2$,$2$']),
        olympiad(1610, 'Find $f(2)$.', ['Put $x=2$.'], ['5'], 'Let $f(x)=x^2+1$.'),
    ],
    'human_eval/HumanEval.jsonl.gz': [
        {'task_id': 'HumanEval/0', 'entry_point': 'third',
         'prompt': 'from typing import List\n\n\ndef third(xs: List[int]) -> int:\n    """ The third of xs.\n'
                   '    >>> third([4, 5, 6])\n    6\n    """\n',
         'canonical_solution': '    return xs[2]\n',
         'test': "\n\nMETADATA = {\n    'author': 'nobody'\n}\n\n\ndef check(candidate):\n"
                 '    assert candidate([4, 5, 6]) == 6\n    assert candidate([0, 0, 1, 2]) == 1\n'},
        {'task_id': 'HumanEval/1', 'entry_point': 'unshift',
         'prompt': 'def shift(xs: list, by: int) -> list:\n    """ Rotates xs to the left. """\n'
                   '    return xs[by:] + xs[:by]\n\n\ndef unshift(xs: list, by: int) -> list:\n'
                   '    """ Undoes shift. """\n',
         'canonical_solution': '    return xs[len(xs) - by:] + xs[:len(xs) - by]\n',
         'test': 'def check(candidate):\n    import random\n\n    for n in range(3, 9):\n'
                 '        xs = [random.randint(0, 9) for _ in range(n)]\n'
                 '        assert candidate(shift(xs, 2), 2) == xs\n'},
    ],
    'live_code_bench/test.jsonl': [
        live_code('abc9_a', 'Print the sum of the line.', [case('1 2\n', '3\n')],
                  [case('5 6 7\n', '18\n'), case('-1\n', '-1\n')]),
        live_code('77', 'Return the larger.', [case('1\n2', '2', 'functional')],
                  [case('-3\n-4', '-3', 'functional')], difficulty='medium', name='larger',
                  starter='class Solution:\n    def larger(self, a: int, b: int) -> int:\n        '),
    ],
    'live_code_bench/test2.jsonl': [
        live_code('abc9_b', 'Print half of n.', [case('9', '4.5')], [case('4', '2.0')], difficulty='hard',
                  pickled=False),
    ],
    'mbpp/mbpp.jsonl': [
        mbpp(2, 'Write a function to double a number.', 'def double(x):\r\n  return 2 * x\r\n',
             ['assert double(3) == 6', 'assert double(-1) == -2', 'assert double("a") == "aa"']),
        mbpp(11, 'Write a function to sort words.', 'def in_order(xs):\n  return sorted(xs)',
             ['assert in_order(["b", "a"]) == ["a", "b"]', 'assert in_order([]) == []']),
        mbpp(600, 'Write a function to find the root of a tree.',
             'class Node:\n  def __init__(self, x):\n    self.x, self.up = x, None\ndef root(node):\n'
             '  return root(node.up) if node.up else node.x',
             ['assert root(leaf) == 1', 'assert root(top) == 1'], 'top = Node(1) \r\nleaf = Node(2)\r\nleaf.up = top'),
        mbpp(974, 'Write a function to swap a pair.', 'def swap(p):\n  return p[1], p[0]',
             ['assert swap((1, 2)) == (2, 1)', 'assert swap(("a", None)) == (None, "a")']),
    ],
    'mbpp_sanitized/sanitized-mbpp.json': [
        {'source_file': 'a.ipynb', 'task_id': 14, 'prompt': 'Write a function to find the area of a disc.',
         'code': 'import math\ndef area(r):\n  return math.pi * r ** 2', 'test_imports': ['import math'],
         'test_list': ['assert math.isclose(area(1), 3.14159, rel_tol=0.001)', 'assert area(0) == 0']},
        {'source_file': 'a.ipynb', 'task_id': 700, 'prompt': 'Write a function to count the vowels.',
         'code': 'def vowels(s):\n  return sum(c in "aeiou" for c in s)', 'test_imports': [],
         'test_list': ['assert vowels("tree") == 2', 'assert vowels("") == 0']},
    ],
    'gpqa_diamond/gpqa_diamond.csv': [
        gpqa('rec1', 'Which has the most mass,\nof "these"?', 'a star', 'a planet', 'a moon', 'a comet'),
        gpqa('rec6', 'Which is a noble gas?', 'neon', 'nitrogen', 'oxygen', 'chlorine\n'),
        gpqa('rec9', 'Which is not a lepton?', 'proton', 'muon', 'electron', 'tau'),
    ],
}


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """Writes rows in the format of the path's ending."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.gz':
    plain = write(path.with_suffix(''), rows)
    path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
  elif path.suffix == '.parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif path.suffix == '.csv':
    with path.open('w', encoding='utf-8', newline='') as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  elif path.suffix == '.json':
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding='utf-8')
  else:
    path.write_bytes(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode())
  return path


if __name__ == '__main__':
  for name, rows in FILES.items():
    write(DIRECTORY / name, rows)
