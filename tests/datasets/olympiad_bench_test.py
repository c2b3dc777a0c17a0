"""OlympiadBench."""

from tests.make_datasets import DIRECTORY


def test_its_tasks(stored):
  tasks = stored('olympiad_bench', DIRECTORY / 'olympiad_bench' / '*.parquet')['test']
  assert {name: (task['prompt'], task['answer'], task['solution']) for name, task in tasks.items()} == {
      'olympiad_bench/1606': ('Find all $x$ with $x^2=4$.', '$-2$,$2$', 'Both signs.'),
      'olympiad_bench/1610': ('Let $f(x)=x^2+1$.\n\nFind $f(2)$.', '5', 'Put $x=2$.')}
