"""Knobs of where data come from: sections of the section `tasks` (knobs.py)."""

from __future__ import annotations

from kr_jax.sections import SEED, Section, knob, section


@section
class Files(Section):
  """Published files that datasets are read from (kr_jax/datasets/README.md); 'DIRECTORY/*.jsonl' is several.

  Also of buckets, 'gs://BUCKET/PATH', and of the Hugging Face hub, 'hf:ORG/NAME/PATH@REVISION'. '': where the hub has
  them, if huggingface_hub is installed; of gsm8k, TFDS's own.
  """

  SECTION = 'tasks.files'
  aime_2024: str = knob('', 'path', path='read')
  aime_2025: str = knob('', 'path', path='read')
  amc_2023: str = knob('', 'path', path='read')
  dapo_math_17k: str = knob('', 'path', path='read')
  gpqa_diamond: str = knob('', 'path', path='read')
  gsm8k: str = knob('', 'path', path='read')
  human_eval: str = knob('', 'path', path='read')
  live_code_bench: str = knob('', 'path', path='read')
  math_500: str = knob('', 'path', path='read')
  mbpp: str = knob('', 'path', path='read')
  mbpp_sanitized: str = knob('', 'path', path='read')
  minerva_math: str = knob('', 'path', path='read')
  olympiad_bench: str = knob('', 'path', path='read')


@section
class Columns(Section):
  """Columns of 'file:PATH' (kr_jax/datasets/README.md); '': the column is found by what it is commonly called."""

  SECTION = 'tasks.columns'
  problem: str = knob('', 'text of the problem')
  answer: str = knob('', 'what is right')
  after: str = knob('', "text in that column after which the answer stands: '####' as in GSM8K; '': it is the answer")
  id: str = knob('', 'of the task, which never changes; without the column a digest of the problem')
  difficulty: str = knob('', 'whole number')
  solution: str = knob('', 'worked completion, for a warm start')
  verifier: str = knob('', "name of a shipped verifier, of rows that need another; '': no column")
  info: str = knob('', "what the verifier reads as task.info, such as tests; '': no column")


@section
class ReasoningGym(Section):
  """What reasoning_gym/TASK generates."""

  SECTION = 'tasks.reasoning_gym'
  train: int = knob(4096, 'tasks to generate, at most', low=1)
  test: int = knob(512, 'tasks to generate, at most', low=1)
  seed: int = knob(0, 'of the tasks', low=0, high=SEED)
