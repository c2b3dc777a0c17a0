"""Chat templates as checkpoints publish them: jinja2, compiled as transformers compiles it.

A template comes out of a stranger's file, so it runs in a sandbox. `strftime_now` says DAY on every day, so that a
resumed run reads the same prompts. A variable that is not set is not defined: templates have defaults of their own.
Source: transformers' chat_template_utils (version 5), by what it does. Differs: the day; named templates without a
default are taken where there is one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import json
from typing import Any

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox

DAY = datetime.datetime(2024, 7, 26)  # which Llama 3's template falls back to
_FIX = 'change the template, or set tasks.chat=False'


class _Generation(ext.Extension):
  """{% generation %}TEXT{% endgeneration %} marks what an assistant writes; it renders as TEXT."""

  tags = {'generation'}

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True), lineno=line)


def choose(stored: Any) -> str | None:
  """The template for chats without tools, of what tokenizer_config.json stores: a text, or texts by name.

  None where there is none. Raises ValueError where no name is 'default' and there are several, or where what is
  stored is of another form.
  """
  if not stored or isinstance(stored, str):
    return stored or None
  try:
    named = dict(stored) if isinstance(stored, Mapping) else {x['name']: x['template'] for x in stored}
  except (TypeError, KeyError, ValueError):
    named = {}
  if not named or not all(isinstance(x, str) for pair in named.items() for x in pair):
    raise ValueError(f'chat_template is neither a text nor texts by name: {str(stored)[:99]}; correct it in '
                     'tokenizer_config.json, or set tasks.chat=False')
  if 'default' not in named and len(named) > 1:
    raise ValueError(f'there are the chat templates {sorted(named)}, and none of them is named default; name one of '
                     'them so in tokenizer_config.json, or set tasks.chat=False')
  return named.get('default', next(iter(named.values())))


def read(template: str) -> jinja2.Template:
  """The compiled template. Raises ValueError where it is broken."""
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
  environment.filters['tojson'] = _to_json
  environment.globals |= {'raise_exception': _refuse, 'strftime_now': DAY.strftime}
  try:
    return environment.from_string(template)
  except Exception as error:  # the template is a stranger's: whatever it raises
    raise ValueError(f'the chat template is broken: {error}; {_FIX}') from error


def render(template: jinja2.Template, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *,
           thinking: bool | None = None, prompt: bool = True) -> str:
  """The text of a chat.

  Args:
    messages: each with 'role' and 'content'.
    tokens: special tokens by name: 'bos_token', 'eos_token', ...
    thinking: `enable_thinking` of templates that know it; None: the template's own default.
    prompt: whether the beginning of an assistant's message comes last.

  Raises:
    ValueError: the template refuses the messages, or fails.
  """
  variables = {**tokens} | ({} if thinking is None else {'enable_thinking': thinking})
  try:
    return template.render(messages=[dict(x) for x in messages], tools=None, documents=None,
                           add_generation_prompt=prompt, **variables)
  except Exception as error:  # as above
    fix = _FIX
    if any(x['role'] == 'system' for x in messages):
      fix += "; if it takes no system message, set tasks.system='' and put the text in tasks.template"
    raise ValueError(f'the chat template fails: {error}; {fix}') from error


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  """JSON without the HTML escapes of jinja2's own filter."""
  return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)
