"""CHAMP: its answers, made checkable."""

from kr_jax.datasets import champ


def test_its_tasks(stored):
  tasks = stored('champ')['test']
  assert len(tasks) == 270
  for name, task in tasks.items():
    assert name.startswith('champ/P_') and not task['verifier']  # the config's serves
    assert task['prompt'] and task['answer'] and task['solution'] and '@@' not in task['prompt']
  assert tasks['champ/P_Combinatorics_2']['answer'] == '252'
  assert not any('(i.e.' in t['answer'] or 'equivalent' in t['answer'] for t in tasks.values())


def test_answers_without_what_explains_them():
  for answer, plain in (
      ('239', '239'),
      ('C(10, 5), or equivalently 252', '252'),
      ('C(n, 4), or an equivalent form such as n(n-1)/4!', 'n(n-1)/4!'),
      ('5/14, or approximately 35.7%', '5/14'),
      ('100 (i.e., all values)', '100'),
      ('0 (none of the values)', '0'),
      ('-3 is the only possible value', '-3'),
      ('The limit exists and is equal to (1+sqrt(4a+1))/2', r'(1+\sqrt{4a+1})/2'),
      ('(n+1)^(n-1)', '(n+1)^{n-1}'),
      ('C(n+1, 2m+1)', r'\binom{n+1}{2m+1}'),
      ('(x=1, y=2) and (x=2, y=1)', '(x=1, y=2) and (x=2, y=1)'),
      ('No integer solutions', 'No integer solutions')):
    assert champ.plain(answer) == plain
