"""GSM8K: 8.5 thousand word problems of grade school, with worked solutions.

Read from the published files that the user points to, 'train*' and 'test*' by name, the Socratic ones
left out. Without them, from the dataset of this name that TFDS itself has: from `data_dir`, where it is
prepared there as array_record; else TFDS downloads it.

Solutions lose the marks of a calculator ('<<6*7=42>>') and keep their end, '#### 42'; answers lose the
commas of thousands.

Source: Cobbe et al. 2021, arXiv 2110.14168.
"""

from __future__ import annotations

import re

from kr_jax.datasets import published

SPLITS = ('test', 'train')


class Builder(published.Builder, skip_registration=True):  # TFDS has one of this name
  """TFDS builder of `gsm8k`. Its rows have no ids: a task is named by its problem."""

  name = 'gsm8k'
  PUBLISHED = ('train.jsonl and test.jsonl, in grade_school_math/data/ of openai/grade-school-math on '
               'GitHub, or the files of main/ of openai/gsm8k on the Hugging Face hub '
               "(both: 'DIRECTORY/t*')")
  SCHEMA = {'question': str, 'answer': str}

  @classmethod
  def config(cls, pattern):
    return super().config(pattern) if pattern else published.Files(name='tfds')

  def task(self, row):
    steps, mark, answer = row['answer'].rpartition('####')
    if not mark:
      raise ValueError(f'the answer does not end in "#### NUMBER": {row["answer"][-60:]!r}')
    answer = answer.strip().replace(',', '')
    return {'prompt': row['question'], 'answer': answer,
            'solution': f'{re.sub("<<[^>]*>>", "", steps)}#### {answer}'}

  def rows(self):
    paths = self.builder_config.paths
    if not paths:
      return {split: self._tfds_rows(split) for split in SPLITS}
    if other := [path.name for path in paths if not path.name.startswith(SPLITS)]:
      raise ValueError(f'tasks.files.gsm8k names {other}; their names must start with one of {SPLITS}')
    of = {split: [path for path in paths if path.name.startswith(split) and 'socratic' not in path.name]
          for split in SPLITS}
    return {split: published.rows(of[split]) for split in SPLITS if of[split]}

  def _tfds_rows(self, split):
    from tensorflow_datasets.text.gsm8k import gsm8k
    theirs = gsm8k.Gsm8k(data_dir=self.data_dir_root, file_format='array_record')
    try:
      theirs.download_and_prepare()
    except Exception as error:  # of the network, of many kinds
      raise ValueError(f'gsm8k cannot be downloaded ({error}); point with '
                       f'--config.tasks.files.gsm8k=PATH to {self.PUBLISHED}') from error
    for number, row in enumerate(theirs.as_data_source(split), start=1):
      yield f'{split} of {theirs.data_dir}, row {number}', {k: x.decode() for k, x in row.items()}
