"""Answers to tasks of reasoning-gym: which forms are right, which texts are never evaluated, what a start refuses."""

import json
import time

import pytest

from kr_jax import types
from kr_jax.datasets import reasoning_gym as generated
from kr_jax.rewards import gym
from kr_jax.rewards import verdicts

SHOUT = 'The café-owner said: "Stop!"'


def task_of(dataset: str, answer: str | None, number: int = 0, **metadata) -> types.Task:
  entry = {'question': 'q', 'answer': answer, 'metadata': metadata}
  return types.Task(id=f'made/{dataset}/{number}', index=0, prompt='', answer=answer or '', difficulty=0, solution='',
                    tokens=(), source=dataset, info=json.dumps({'dataset': dataset, 'entry': generated.tagged(entry)}))


def right(task: types.Task, text: str) -> bool:
  return gym.verify(f'I think.\n<answer>{text}</answer>', task).right


@pytest.fixture
def scorer(monkeypatch):
  """A function that replaces the scorers of all datasets."""
  def replace(function):
    monkeypatch.setattr(gym, '_scorer', lambda dataset: function)
    monkeypatch.setattr(gym, '_evaluates', lambda dataset: False)
  return replace


def test_a_scorer_reads_what_is_written_then_what_says_the_same(scorer):
  read = []
  scorer(lambda text, entry: read.append(text) or 0.5 * (text == '7/2 * 3'))
  gym.verify('So <answer>$\\frac{7}{2} \\times 3$.</answer>', task_of('made', ''))
  assert read[0] == '$\\frac{7}{2} \\times 3$.' and '\\frac{7}{2} \\times 3' in read and '7/2 * 3' in read
  for gold in ('He sat down.', SHOUT, 'Was it?', '[["a"], ["b", "c"]]', "['-4', '2.5']", 'x = 3', 'a, b;', '7 * 3'):
    scorer(lambda text, entry: float(text == entry['answer']))
    task = task_of('made', gold)
    for form in ('<answer>{}</answer>', '<answer>\n{}\n</answer>', '<answer>\\boxed{{{}}}</answer>', '\\boxed{{{}}}',
                 '<answer>${}$</answer>', '<answer>**{}**</answer>', '<answer>`{}`</answer>', 'So\nThe answer is {}'):
      assert gym.verify(form.format(gold), task) == verdicts.Verdict(True), (form, gold)
    assert not right(task, gold[1:]) and not right(task, f'{gold} or not')


def test_answers_of_several_lines(scorer):
  scorer(lambda text, entry: float(text.strip() == entry['answer']))
  task = task_of('made', '1 2\n3 4')
  for form in ('{}', 'So\nAnswer:\n{}', 'The answer is:\n\n{}\n', '<answer>{}</answer>', '\\boxed{{{}}}'):
    assert gym.verify(form.format('1 2\n3 4'), task).right, form
  assert gym.verify('1 2\n3 5', task) == verdicts.Verdict(False, answered=False)
  assert gym.verify('<answer>1 2\n3 5</answer>', task) == verdicts.Verdict(False)
  assert gym.verify('<answer> </answer>', task) == verdicts.Verdict(False, answered=False)
  assert gym.answer('a\nb ') == 'a\nb' and gym.answer(' ') is None
  assert gym.answer('So <answer>$7 \\cdot 3$.</answer>') == gym.answer('7 * 3') == '7 * 3'


def test_what_a_scorer_returns(scorer):
  for returned, score in ((1, 1), (1.0, 1), (0.25, 0.25), (None, 0), (float('nan'), 0), (2.0, 0), (-1, 0), ('x', 0)):
    scorer(lambda text, entry: returned)
    assert gym.scored('7', task_of('made', '8')) == verdicts.Verdict(score == 1, score)
  scorer(lambda text, entry: 1 / 0)
  assert gym.scored('7', task_of('made', '8')) == verdicts.Verdict(False, 0.0)
  for fault in (MemoryError, FileNotFoundError):  # of the machine: nothing is known of the answer
    def raises(text, entry, fault=fault):
      raise fault
    scorer(raises)
    with pytest.raises(fault):
      gym.scored('7', task_of('made', '8'))
  read = []
  scorer(lambda text, entry: read.append(entry))
  gym.verify('7', task_of('made', '', board=(1, (), [2]), n=4))  # JSON has no tuples
  assert read[0]['metadata'] == {'board': (1, (), [2]), 'n': 4}
  for bad in ('', 'none', '{}', '[]', '{"dataset": "chain_sum"}'):
    with pytest.raises(ValueError, match='made/made/0 is not JSON with "dataset" and "entry"'):
      gym.verify('42', task_of('made', '')._replace(info=bad))


@pytest.mark.parametrize('dataset, gold, metadata, accepted, refused', [
    ('coin_flip', '0.0107421875', {'rational': {'numerator': 11, 'denominator': 1024}},
     ['11/1024', '0.0107421875', '.01074', '0.010742', '22/2048', '1.07421875e-2'],
     ['0', '0.0107', '0.010743', '0.01', '1', '0.0108', '11', 'nan']),
    ('countdown', '5*9 - 2', {'numbers': [9, 2, 5], 'target': 43},
     ['9*5 - 2', '5 × 9 − 2', '(9)(5)-2', '9*5 - 2 = 43', '-(2 - 9*5)'],
     ['43', '5*9 - 2 + 0', '5*9', '5*9 - 2 = 44', '59 - 2*8', '5*9 - 2 or 7']),
    ('puzzle24', '8*(5*1 - 2)', {'numbers': [5, 1, 2, 8]}, ['8*(5 - 2)*1', '8*(5*1 - 2) = 24'],
     ['6*4*1*1', '24', '8*(5*1 - 2) + 0', '(8*5 + 8)/2', '8*(5*1 - 2)*1/1']),
    ('number_sorting', "['-3', '1.5', '20']", {}, ['["-3", "1.5", "20"]', '[-3, 1.50, 20.0]'],
     ['[-3, 1.5, 20.5]', '[-3, 1.5]', '["nan", "nan", "nan"]', '[-3, 1.5, 20, 20]']),
    ('gsm_symbolic', '42', {}, ['42', '42 apples', '42.0'], ['-42', '42 or 43', '41, not 42', '4 2']),
    ('polynomial_equations', '', {}, ['', '""'], ['x', 'none', '0']),
    ('polynomial_equations', '1.5, 2.0', {}, ['2.0, 1.5', '1.50, 2'], ['1.5', '1.5, 2.0, x3', '1.5, 2.0, 3']),
    ('fraction_simplification', '$\\frac{3}{7}$', {}, ['3/7', '\\dfrac{3}{7}'], ['\\frac{3}{7} or 2', '3/7 * 2']),
    ('time_intervals', '27 days', {}, ['27 days', '27'], ['27 days or 28', '28 days']),
    ('game_of_life_halting', 'False', {}, ['False', 'false', '**False**'], ['True', '0', '', 'x']),
    ('letter_jumble', 'The cat sat', {}, ['the  cat sat'], ['The cat sat on', 'cat sat']),
    ('figlet_font', 'ABCDEFGHIJK', {}, ['abcdefghijk', 'A B C D E F G H I J K'], ['ABCDEFGHIJKLM', 'ABCDEFGHIJ'])])
def test_right_and_wrong_where_a_scorer_accepts_all(scorer, dataset, gold, metadata, accepted, refused):
  """As some do: what is asked of an answer besides decides."""
  scorer(lambda text, entry: 1.0)
  task = task_of(dataset, gold, **metadata)
  assert [text for text in accepted if not right(task, text)] == []
  assert [text for text in refused if right(task, text)] == []


HARMLESS = [
    '7*3 - 4', '-2*x**9/7 + x*sin(3*x) + C', 'x*asin(3*x) + sqrt(1 - 9*x**2)/3 + C', 'exp(-x)*log(x)', 'E**(2*x)',
    '[[1, 0], [0, 1]]', "['Q', '_ _ Q']", "['-4', '2.5', 7]", '_ _ Q _\n_ Q _ _', '0 1 1\n2 3 4', 'ABAB', '-0x94b4',
    'exp(-12*x**3) - exp(2*pi)', 'E**(I*pi)', '3*x', '120384*z**7 + 64448*z**6 - 30400*z', '1.5e3', "('a', 'b')"]
HARMFUL = [
    "__import__('os').system('id')", "open('f', 'w')", 'x.y', 'x()', "[open('f')]", '[x for x in y]', '(lambda: 1)()',
    "().__class__", "['f()']", "sin('f()')", "S('f()')", "['x.y()']", "x + '1'", 'f"{1}"', '{1: 2}', '(y := 3)', '*x',
    'integrate(x)', 'Integral(x, x)', 'x if y else z + 1', 'not x()', 'x[0]', 'x; y', 'x # y', "b'f'", 'a.b', '`x`',
    "[['f()']]", 'ｏｐｅｎ(1)', 'x\\\ny', "'a' 'b()'", 'sin(x, y)', 'sin(x=1)', '1j*x', 'factorial(9)', '9!', '__x__',
    # Bombs.
    '9**9**9', '(9**99)**99', '2**(2**(2**9))', '9**(10**9)', 'x**(9**9)', '9**sqrt(10**18)', '(x + y)**99', '[0]*9**9',
    "'a'*10**9", '1 << 9**9', 'tan(' * 9 + 'x' + ')' * 9, '(' * 3000 + '1' + ')' * 3000, '-' * 9000 + '1',
    '9' * 9000 + '+1', 'exp(exp(exp(99)))', 'sin(exp(9**99))', 'cosh(sinh(exp(pi)))', 'E**(E**(pi**E))', 'pi**exp(9)']


def test_texts_that_may_be_evaluated():
  assert [text for text in HARMLESS if not gym.is_harmless(text)] == []
  start = time.process_time()
  assert [text for text in HARMFUL if gym.is_harmless(text)] == []
  assert time.process_time() - start < 2


def test_no_scorer_runs_a_completion(tmp_path):
  """Those of reasoning-gym that evaluate an answer, and a new one that does."""
  path = tmp_path / 'written'
  write = f'open({str(path)!r}, "w")'
  for dataset in ('countdown', 'n_queens', 'simple_integration', 'spiral_matrix', 'string_insertion', 'puzzle24'):
    assert gym._evaluates(dataset)
    task = task_of(dataset, '1', numbers=[1], target=1, variable='x', integrand='1', valid_answers=['1'])
    for text in (write, f"__import__('os').system('touch {path}')", f'[x for x in [{write}]]', f'(lambda: {write})()',
                 f'["{write}"]', f'[{write!r}]', f'sin({write!r})', f'S({write!r})', f'$\\boxed{{{write}}}$'):
      for completion in (text, f'<answer>{text}</answer>', f'The answer is {text}'):
        assert gym.verify(completion, task) == verdicts.Verdict(False), (dataset, text)
    assert not path.exists()
  assert not gym._evaluates('propositional_logic') and not gym._evaluates('codeio')


def test_a_scorer_that_evaluates_is_found_by_its_source(monkeypatch):
  class New:
    def evaluates(self, answer, entry):
      return self.inner(answer)

    def inner(self, answer):
      import sympy
      return sympy.simplify(answer)

    def compares(self, answer, entry):
      return float(json.loads(answer) == entry['answer'])

  New.inner.__module__ = New.evaluates.__module__ = 'reasoning_gym.new'
  for name in ('evaluates', 'compares'):
    monkeypatch.setattr(gym, '_scorer', lambda dataset: getattr(New(), name))
    assert gym._evaluates(f'{name} of the test') is (name == 'evaluates')
  monkeypatch.setattr(gym, '_scorer', lambda dataset: len)  # without a source
  assert gym._evaluates('another of the test')


def test_a_start_refuses_scorers_that_mean_nothing(scorer):
  tasks = [task_of('made', str(number), number) for number in range(3, 60)]
  same = lambda text, entry: float(text == entry['answer'])
  for function, message in (
      (lambda text, entry: 1.0, r"accepts the wrong answer '' to made/made/3, a task of made whose answer is '3'"),
      (lambda text, entry: 0.0, r"refuses the answer '3' of made/made/3, a task of made; no completion could be"),
      (lambda text, entry: 1 / 0, 'refuses the answer'),
      (lambda text, entry: float(text.isdigit()), "accepts the wrong answer '0'"),
      (lambda text, entry: float(text != ''), "accepts the wrong answer '0'"),
      (lambda text, entry: float(same(text, entry) or text in ('True', 'False')), "accepts the wrong answer 'False'"),
      (lambda text, entry: float(text.isdigit() and 2 < int(text) < 60), r"accepts the wrong answer '\d+'"),
      (lambda text, entry: float(len(text) == len(entry['answer']) and text.isdigit()), 'accepts the wrong answer')):
    scorer(function)
    with pytest.raises(ValueError, match=message):
      gym.check(tasks)
  scorer(same)
  gym.check(tasks)
  scorer(lambda text, entry: float(text in (entry['answer'], '5')))  # many solutions: some tasks share one
  gym.check([task_of('made', text, i) for i, text in enumerate(('5', 'one', 'two', 'three'))])
  # A task without a gold answer may be solved by nothing, but not most.
  scorer(lambda text, entry: float(text == '' and entry['metadata']['easy']))
  without = lambda easy: [task_of('free', None, i, easy=i < easy) for i in range(8)]
  gym.check(without(2))
  with pytest.raises(ValueError, match="accepts the wrong answer '' to made/free/"):
    gym.check(without(8))


def test_a_start_takes_two_seconds_a_dataset(scorer, monkeypatch):
  monkeypatch.setattr(gym, '_CHECK_SECONDS', 0.1)
  scorer(lambda text, entry: time.sleep(0.02) or float(text == entry['answer']))
  start = time.monotonic()
  gym.check([task_of('made', str(number), number) for number in range(3, 60)])
  assert time.monotonic() - start < 1.5


def test_a_dataset_that_is_none():
  with pytest.raises(ValueError, match="has no scorer of 'sums': Dataset 'sums' not registered"):
    gym.check([task_of('sums', '3')])


@pytest.mark.exhaustive
@pytest.mark.filterwarnings('ignore')  # the package's own
def test_every_dataset(tmp_path, monkeypatch):
  """Its own answers are right in every form, injected code does not run, and a start takes it."""
  import reasoning_gym
  from reasoning_gym import factory
  monkeypatch.chdir(tmp_path)
  code = "open('written', 'w')"
  injected = [code, "__import__('os').system('touch written')", f'["{code}"]', f'sin({code!r})',
              f'[x for x in [{code}]]']
  for name in sorted(set(factory.DATASETS) - {'composite'}):
    entries = [*reasoning_gym.create_dataset(name, seed=21, size=6)]
    tasks = [types.Task(id=f'{name}/{i}', index=i, prompt='', answer='', difficulty=0, solution='', tokens=(),
                        source=name, info=json.dumps({'dataset': name, 'entry': generated.tagged(entry)}, default=str))
             for i, entry in enumerate(entries)]
    gym.check(tasks)
    for entry, task in zip(entries, tasks):
      gold = entry['answer']
      forms = ['<answer>{}</answer>', '<answer>\n{}\n</answer>', 'So\nAnswer:\n{}']
      forms += ['<answer>\\boxed{{{}}}</answer>', 'So \\boxed{{{}}}.'] if gold else []  # an empty box is no answer
      for form in forms if gold is not None else []:
        assert gym.verify(form.format(gold), task).right, (name, form, gold)
      assert not any(gym.verify(f'<answer>{text}</answer>', task).right for text in injected)
  assert not any(tmp_path.iterdir())


def test_the_package_s_scores():
  import reasoning_gym
  entry, = reasoning_gym.create_dataset('chain_sum', size=1, seed=1)
  entry['answer'] = '42'
  task = task_of('chain_sum', '42', **entry['metadata'])
  for text in ('The answer is 42.', '<answer>42</answer>', '42', '<answer>$42$</answer>', '\\boxed{42}'):
    assert gym.scored(text, task) == verdicts.Verdict(True, 1)
  assert gym.verify('41', task) == verdicts.Verdict(False)
  wrong, share, _, _ = gym.scored(r'\boxed{42 apples}', task)
  assert not wrong and 0 < share < 1 and gym.verify(r'\boxed{42 apples}', task).reward is None
