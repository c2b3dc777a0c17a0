"""Completions of prompts by a published checkpoint: a quick look at whether it works."""

from __future__ import annotations

from collections.abc import Sequence
import os

from absl import logging
import jax
import numpy as np

from kr_jax import completions
from kr_jax import memory
from kr_jax import sample
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import families
from kr_jax.model import tokenizer as tokenizer_lib
from kr_jax.model import weights


def texts(path: str | os.PathLike, prompts: Sequence[str], *, temperature: float = 0.0, max_tokens: int = 64,
          seed: int = 0, chat: bool = True, system: str = '', thinking: bool | None = None, dtype: str = 'float32'
          ) -> list[str]:
  """The completion of each prompt, until the checkpoint stops or has written max_tokens tokens.

  Args:
    path: as pretrained.find takes it.
    prompts: texts, none empty; where the checkpoint has a chat template, messages of a user.
    temperature: 0 is greedy.
    chat, system, thinking: as tokenizer.Subwords takes them.
    dtype: of the computation: 'float32' or 'bfloat16'.

  Raises:
    ValueError: path is no checkpoint, a prompt has no token, or an argument is out of its range.
  """
  tokenizer = tokenizer_lib.Subwords(path, chat=chat, system=system, thinking=thinking)
  tokens = [tokenizer.prompt(prompt) for prompt in prompts]
  if not all(tokens):
    raise ValueError(f'prompts {list(prompts)!r} hold one without a token; give each a text')
  config = sample.Config(
      slots=64, refill=1, prefill=8, prompt_length=-(-max(map(len, tokens)) // 64) * 64,
      completion_length=max_tokens, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, cache='',
      stop_strings=(), stop_ids=tokenizer.stop_ids)
  longest = max(map(len, tokens)) + max_tokens
  memory.check_generation(weights.config(path, dtype=dtype, length=longest), len(tokens), config.prompt_length,
                          max_tokens, config.slots, memory.machine(jax.devices()[:1]))
  policy_config, params = weights.load(path, dtype=dtype, length=longest)
  if 0 < (context := families.longest(policy_config)) < longest:
    logging.warning('%d tokens of a prompt and of max_tokens are more than the %d that %s was made to read '
                    '(max_position_embeddings): what it writes beyond them is likely to be bad', longest, context, path)
  tasks = [types.Task(id=prompt, index=i, prompt=prompt, answer='', difficulty=0, solution='', tokens=t)
           for i, (prompt, t) in enumerate(zip(prompts, tokens))]
  rollouts = sample.rollouts(
      policy_config, decode.sampling_params(policy_config, params), tasks_lib.prompts(tasks, config.prompt_length),
      np.ones(len(tasks), int), jax.random.key(seed), config, total=len(tasks))
  return list(completions.texts(rollouts, tokenizer.decode)[1])
