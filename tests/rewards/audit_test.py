"""Opinions on completions in files: what is read, what parts, and what a fault looks like."""

import json
import sys

import pytest

from kr_jax.rewards import audit

DUMPS = [  # as evaluation tools write them: a line, its completions, answers and verdicts
    ({'prompt': '3 + 4', 'completion': 'It is 7.', 'answer': 7}, [('It is 7.', '7', None)]),
    ({'problem': '?', 'generations': ['a', 'b'], 'answer': 'x', 'correct': [True, False]},
     [('a', 'x', True), ('b', 'x', False)]),
    ({'question': '?', 'code': ['a'], 'gt': '1/2', 'score': [True], 'answer': '1/2'}, [('a', '1/2', True)]),
    ({'output': 'a', 'gts': '5', 'score': 1.0}, [('a', '5', None)]),
    ({'doc': {}, 'target': '9', 'resps': [['a']]}, [('a', '9', None)]),
    ({'response': 'a', 'answer': 'We add.\n#### 1,200'}, [('a', '1,200', None)]),
    ({'completions': [[{'role': 'user', 'content': '?'}, {'role': 'assistant', 'content': 'a'}]],
      'reward_model': {'ground_truth': '8'}}, [('a', '8', None)]),
    ({'outputs': [{'text': 'a'}], 'solution': r'So it is $\boxed{\frac{2}{5}}$.'}, [('a', r'\frac{2}{5}', None)]),
    ({'llm_output': 'a', 'answer': '', 'final_answer': ['1', '2'], 'expected': False}, [('a', '1, 2', False)]),
    ({'completion': '', 'answer': ''}, [('', '', None)])]


def write(path, rows):
  path.write_text('\n\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding='utf-8')
  return str(path)


def test_the_names_that_dumps_give_to_fields(tmp_path):
  path = write(tmp_path / 'dump.jsonl', [row for row, _ in DUMPS])
  found = list(audit.read(path))
  assert [line[1:] for line in found] == [line for _, lines in DUMPS for line in lines]
  assert [line.where for line in found[:3]] == [f'{path}:1', f'{path}:3', f'{path}:3']


def test_fields_that_are_named(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'completion': 'a', 'mine': 'b', 'answer': '7', 'other': 8}])
  assert next(audit.read(path, 'mine', 'other'))[1:3] == ('b', '8')


@pytest.mark.parametrize('row, message', [
    ('{"a": ', r'a.jsonl:1 is not JSON: .*one JSON object a line'), ('[1]', r'a.jsonl:1 is a list; .*object a line'),
    ({'completion': 'a', 'note': ''}, r':1 has no answer as a text in answer, .*are completion, note; .*--answer'),
    ({'answer': '7', 'completion': None}, r'a.jsonl:1 has no completion as a text in .*the one with --completion'),
    ({'answer': True, 'completion': 'a'}, 'has no answer'), ({'answer': '7', 'outputs': []}, 'has no completion'),
    ({'answer': [], 'completion': ['a', 3]}, 'has no completion')])
def test_bad_lines_are_named(tmp_path, row, message):
  with pytest.raises(ValueError, match=message):
    list(audit.read(write(tmp_path / 'a.jsonl', [row])))


def run(monkeypatch, capsys, *args):
  monkeypatch.setattr(sys, 'argv', ['audit', *args])
  audit.main()
  return capsys.readouterr().out


def test_errors_of_the_command(tmp_path, monkeypatch, capsys):
  path = write(tmp_path / 'a.jsonl', [{'answer': '7'}])
  for args, message in (((path,), r'a.jsonl:1 has no completion'), ((str(tmp_path / 'none.jsonl'),), 'No such file'),
                        ((path, '--verifier=maths'), "rewards.verifier='maths' is not one of"),
                        ((path, '--other=tests.rewards.hostile:missing'), 'cannot be imported')):
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
      run(monkeypatch, capsys, *args)


def test_opinions_that_part_are_listed(tmp_path, monkeypatch, capsys):
  """7 agrees; '14/2' parts; one opinion raises, on one line; the file has a verdict of its own."""
  rows = [{'completion': rf'\boxed{{{answer}}}', 'answer': '7'} for answer in ('7', '14/2', '8', 'raise')]
  rows[0]['expected'] = rows[2]['expected'] = True
  path = write(tmp_path / 'a.jsonl', rows)
  printed = run(monkeypatch, capsys, path, '--json', '--workers=1', '--other=tests.rewards.audit_test:literal')
  result = json.loads(printed.splitlines()[-1])
  assert result['completions'] == 4
  apart = {one['where'].rpartition(':')[2]: one for one in result['apart']}
  names = ('math', 'math-verify', 'tests.rewards.audit_test:literal', 'published')
  assert {at: tuple(map(one['opinions'].get, names)) for at, one in apart.items()} == {
      '3': ('right', 'right', 'wrong', None), '5': ('wrong', 'wrong', 'wrong', 'right'),
      '7': ('wrong', 'wrong', 'fault (raised)', None)}
  assert apart['3']['answer'] == '14/2' and apart['3']['reference'] == '7'
  assert sum(one['completions'] for one in result['counts']) == 4
  assert printed.startswith('4 completions, 3 on which opinions part\nmath ') and "reference  '7'" in printed


def literal(completion, task):
  """An opinion that compares texts."""
  if 'raise' in completion:
    raise ArithmeticError('as asked')
  return completion == rf'\boxed{{{task.answer}}}'


def test_math_verify_is_left_out_where_it_is_missing(monkeypatch):
  assert list(audit.opinions('math', ['a:b'])) == ['math', 'math-verify', 'a:b']
  monkeypatch.setattr(audit.importlib.util, 'find_spec', lambda name: None)
  assert audit.opinions('math') == {'math': 'math'}


def test_limits(tmp_path, monkeypatch, capsys):
  rows = [{'completion': f'{n}', 'answer': '7', 'expected': True} for n in range(5)]
  monkeypatch.setattr(audit.importlib.util, 'find_spec', lambda name: None)
  path = write(tmp_path / 'a.jsonl', rows)
  printed = run(monkeypatch, capsys, path, '--limit=3', '--show=1', '--workers=1', '--verifier=ends_with')
  assert 'math-verify is not installed' in printed and '3 completions, 3 on which' in printed
  assert printed.count('reference') == 1 and '2 more; --show=0 shows all' in printed
