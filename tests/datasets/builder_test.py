"""What every dataset shares."""

import pytest
import tensorflow_datasets as tfds

from kr_jax.datasets import builder


class Colours(builder.TaskBuilder):
  """Colours of things."""

  name = 'colours'

  def splits(self):
    sky = {'id': 'colours/sky', 'prompt': 'The sky?', 'answer': 'blue'}
    return {'test': [sky], 'train': [
        sky | {'id': 'colours/é', 'difficulty': 2, 'solution': 's', 'verifier': 'math', 'info': '{}'}]}


def rows(stored, split):
  return [{name: x.decode() if isinstance(x, bytes) else int(x) for name, x in row.items()}
          for row in stored.as_data_source(split)]


def test_tasks_are_stored_with_what_they_leave_out(tmp_path):
  stored = Colours(data_dir=tmp_path, file_format='array_record')
  stored.download_and_prepare()
  sky = {'id': 'colours/sky', 'prompt': 'The sky?', 'answer': 'blue', 'difficulty': 0, 'solution': '', 'verifier': '',
         'info': ''}
  assert rows(stored, 'test') == [sky]
  assert rows(stored, 'train') == [
      sky | {'id': 'colours/é', 'difficulty': 2, 'solution': 's', 'verifier': 'math', 'info': '{}'}]
  assert stored.info.description == 'Colours of things.'  # not the folder's README.md
  assert [p.name for p in (tmp_path / 'colours').iterdir()] == ['1.0.0']


def test_a_digest_is_of_the_text_alone():
  """Ids of tasks: they stay as they are for good."""
  assert builder.digest('Find the number of divisors of $28$.') == '9f814a224ff4d0ad'
  assert builder.digest('') != builder.digest(' ')


def test_a_subclass_says_its_splits():
  with pytest.raises(TypeError, match='splits'):
    builder.TaskBuilder()
  assert issubclass(builder.TaskBuilder, tfds.core.GeneratorBasedBuilder)
