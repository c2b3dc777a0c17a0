"""AIME 2024."""

from tests.make_datasets import DIRECTORY


def test_its_tasks(stored):
  tasks = stored('aime_2024', DIRECTORY / 'aime_2024' / '*.parquet')['test']
  assert {name: (task['answer'], task['solution']) for name, task in tasks.items()} == {
      'aime_2024/60': ('024', '$1024$, so 024.'), 'aime_2024/61': ('031', '$31^2<1000<32^2$.')}
  assert tasks['aime_2024/60']['prompt'] == 'Find the remainder of $2^{10}$ by $1000$.'
