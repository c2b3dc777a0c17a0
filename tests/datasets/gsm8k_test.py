"""GSM8K, from its own files and as TFDS has it."""

import pytest
from tensorflow_datasets.text.gsm8k import gsm8k as theirs

from tests.make_datasets import DIRECTORY

FILES = DIRECTORY / 'gsm8k'


def literal(tasks):
  return {(task['prompt'][:8], task['answer'], task['solution']) for task in tasks.values()}


TRAIN = {('Mina has', '42', 'She has 6*7=42 eggs.\n#### 42'),
         ('A mill g', '1200', 'It grinds 2 * 600 = 1,200 sacks.\n#### 1200')}
TEST = {('Ole had ', '5', '9-4=5\n#### 5')}


def test_its_tasks(stored):
  found = stored('gsm8k', FILES / 't*.jsonl')
  assert {split: literal(tasks) for split, tasks in found.items()} == {'train': TRAIN, 'test': TEST}
  assert {task['verifier'] for tasks in found.values() for task in tasks.values()} == {'math'}
  assert '—' in next(iter(found['test'].values()))['prompt']


def test_one_of_its_files(stored):
  assert list(stored('gsm8k', FILES / 'test.jsonl')) == ['test']


def test_socratic_files_are_passed_over(stored, tmp_path):
  for name in ('train.jsonl', 'train_socratic.jsonl'):
    (tmp_path / name).write_bytes((FILES / 'train.jsonl').read_bytes())
  assert literal(stored('gsm8k', tmp_path / '*.jsonl')['train']) == TRAIN


def test_what_tfds_has_prepared(stored, tmp_path, monkeypatch):
  """Without files; the stock builder is only kept from the network."""
  class Local:
    def download_and_extract(self, urls):
      return {split: str(FILES / f'{split.removesuffix("_socratic")}.jsonl') for split in urls}

  generate = theirs.Gsm8k._split_generators
  with monkeypatch.context() as patch:
    patch.setattr(theirs.Gsm8k, '_split_generators', lambda self, _: generate(self, Local()))
    theirs.Gsm8k(data_dir=tmp_path / 'stored', file_format='array_record').download_and_prepare()
  found = stored('gsm8k')
  assert {split: literal(tasks) for split, tasks in found.items()} == {'train': TRAIN, 'test': TEST}


def test_without_files_or_network(stored, monkeypatch):
  def offline(self, _):
    raise ConnectionError('no network')
  monkeypatch.setattr(theirs.Gsm8k, '_split_generators', offline)
  with pytest.raises(ValueError, match=r'(?s)gsm8k cannot be downloaded \(.*no network.*point with '
                                       r'--config.tasks.files.gsm8k=PATH to train.jsonl and test.jsonl'):
    stored('gsm8k')


def test_files_of_no_split(stored, tmp_path):
  (tmp_path / 'dev.jsonl').write_bytes((FILES / 'test.jsonl').read_bytes())
  with pytest.raises(ValueError, match=r"names \['dev.jsonl'\]; their names must start with one of"):
    stored('gsm8k', tmp_path / '*.jsonl')


def test_an_answer_without_its_mark(stored, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_text('{"question": "1+1?", "answer": "It is 2"}\n')
  with pytest.raises(ValueError, match=r'test.jsonl, row 1: the answer does not end in "#### NUMBER": '
                                       "'It is 2'"):
    stored('gsm8k', path)
