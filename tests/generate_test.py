"""Texts of a checkpoint, against a loop over its logits."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from kr_jax import generate
from kr_jax.model import policy
from kr_jax.model import tokenizer
from kr_jax.model import weights

PATH = pathlib.Path(__file__).parent / 'data' / 'checkpoints' / 'llama'
PROMPTS = ['The sum of', 'x', 'What is the sum of 7 and 9?']


@pytest.mark.slow
def test_greedy_texts():
  subwords = tokenizer.Subwords(PATH, chat=False)
  config, params = weights.load(PATH)
  logits = jax.jit(policy.logits, static_argnums=0)
  wanted = []
  for prompt in PROMPTS:
    tokens = list(subwords.prompt(prompt))
    first = len(tokens)
    while len(tokens) < first + 6 and tokens[-1] not in subwords.stop_ids:
      padded = np.array([tokens + [0] * (64 - len(tokens))])
      tokens.append(int(logits(config, params, padded)[0, len(tokens) - 1].argmax()))
    wanted.append(subwords.decode(tokens[first:]))
  assert generate.texts(PATH, PROMPTS, max_tokens=6, chat=False) == wanted
  assert len(set(wanted)) == 3 and all(wanted)


@pytest.mark.slow
def test_sampled_texts_follow_the_seed():
  texts = lambda seed: generate.texts(PATH, PROMPTS, temperature=1.0, max_tokens=8, seed=seed)
  assert texts(0) == texts(0) != texts(1)


@pytest.mark.parametrize('options, named', [
    (dict(max_tokens=0), 'completion_length=0 .* must be at least 1'),
    (dict(temperature=-1.0), 'temperature=-1.0 .* must be at least 0'),
    (dict(prompts=['a', ''], chat=False), r"prompts \['a', ''\] hold one without a token")])
def test_bad_arguments(options, named):
  with pytest.raises(ValueError, match=named):
    generate.texts(PATH, **{'prompts': ['a'], **options})


@pytest.mark.slow
def test_more_tokens_than_the_checkpoint_reads(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(generate.logging, 'warning', lambda text, *args: said.append(text % args))
  shutil.copytree(PATH, tmp_path / 'model')
  path = tmp_path / 'model' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'max_position_embeddings': 8}))
  generate.texts(path.parent, ['x'], max_tokens=7, chat=False)
  assert not said
  generate.texts(path.parent, ['x'], max_tokens=8, chat=False)
  assert said[0].startswith('9 tokens of a prompt and of max_tokens are more than the 8 that')
