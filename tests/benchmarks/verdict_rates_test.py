"""The benchmark of verdicts on a small made-up sample, and the judge that it trusts."""

import json
import random

import pytest

from tests.benchmarks import formulas
from tests.benchmarks import variants
from tests.benchmarks import verdicts

EQUAL = [(r'\frac{3}{4}', '0.75'), (r'2\frac{1}{3}', r'\frac73'), (r'\sqrt{12}', r'2\sqrt 3'), ('x = 5', '5'),
         (r'\{1, 2\}', '2, 1'), (r'\sin^2 x', r'1-\cos^{2}(x)'), ('12,500', '12500'), (r'3\text{ cm}', '3'),
         ('1011_2', '11'), ('1e-3', '0.001'), ('5!', '120'), ('2x+y=3', '4x+2y=6'), (r'x \le 3', r'x \le \frac{6}{2}')]
APART = [(r'\frac{3}{4}', '0.74'), ('(1, 2)', '(2, 1)'), ('[1, 2)', '(1, 2)'), ('x^2', 'x^3'), ('x', 'X'),
         ('2x+y=3', '2x+y=4'), (r'\text{odd}', 'even'), ('1, 2', '1, 2, 3'), (r'50\%', '5'), ('12', '1,234'),
         ('odd', '3'), (r'\log_2 8', '2')]
DOUBT = [(r'50\%', '0.5'), ('1011_2', '1011'), (r'\int x', 'x'), ('x > 2', r'(2, \infty)')]


def test_the_judge_of_near_misses():
  for pairs, differ in ((APART, True), (DOUBT, None)):
    for a, b in pairs:
      assert formulas.differ(a, b) is differ and formulas.differ(b, a) is differ, (a, b)
  for a, b in EQUAL:
    assert formulas.differ(a, b) is not True and formulas.differ(b, a) is not True, (a, b)


def test_rewritings_have_the_same_value():
  rng, checked = random.Random(0), 0
  for answer in verdicts.made_up():
    for kind, rewrite in variants.REWRITINGS.items():
      new = rewrite(answer, rng)
      if new is not None:
        assert new != answer and formulas.differ(new, answer) is not True, (kind, answer, new)
        checked += formulas.differ(new, answer) is False
  assert checked > 500


def test_the_rates_on_a_made_up_sample(tmp_path):
  wrong = tmp_path / 'wrong.jsonl'
  result = verdicts.measure(verdicts.made_up(), limit=4, wrong=str(wrong))
  groups = result['groups']
  assert {name: group['wrong'] for name, group in groups.items()} == dict.fromkeys(groups, 0), wrong.read_text()
  assert groups.keys() == {'self', 'rewritings', 'bad_forms', 'near_misses', 'others'}
  assert len(groups['rewritings']['kinds']) > 50 and groups['near_misses']['cases'] > 40
  assert result['votes']['split'] == 0, wrong.read_text()
  assert 0 < result['ms']['mean'] < 100


def test_wrong_verdicts_are_counted_and_written(tmp_path, monkeypatch):
  answers = ['7', '12', r'\frac{1}{2}']
  for verifier, wrong_groups in ((lambda *_: False, verdicts.ACCEPTED), (lambda *_: True, ('near_misses', 'others'))):
    monkeypatch.setitem(verdicts.rewards.VERIFIERS, 'math', verifier)
    result = verdicts.measure(answers, limit=2, wrong=str(tmp_path / 'wrong.jsonl'))
    for name, group in result['groups'].items():
      assert group['wrong'] == (group['cases'] if name in wrong_groups else 0)
    rows = [json.loads(line) for line in (tmp_path / 'wrong.jsonl').read_text().splitlines()]
    assert len(rows) == sum(group['wrong'] for group in result['groups'].values()) + result['votes']['split']


def test_answers_are_read_from_files(tmp_path):
  rows = [{'answer': '7', 'n': 1}, {'answer': 8, 'n': 2}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'a.json').write_text(json.dumps(['7', '8']))
  (tmp_path / 'a.txt').write_text('7\n\n8\n')
  for name in ('a.jsonl', 'a.json', 'a.txt'):
    assert verdicts.read(str(tmp_path / name), 'answer') == ['7', '8']
  assert verdicts.read(str(tmp_path / 'a.jsonl'), 'n') == ['1', '2']
  with pytest.raises(ValueError, match=r"row 0 has no text in the field 'gold'.*\['answer', 'n'\]"):
    verdicts.read(str(tmp_path / 'a.jsonl'), 'gold')
