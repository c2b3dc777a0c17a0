"""Chat templates as checkpoints publish them: jinja2, compiled as transformers compiles it, in a process of its own.

A template comes out of a stranger's file, so it runs in a sandbox, within limits of time, memory and output
(template.py). `strftime_now` says one day on every day, so that a resumed run reads the same prompts. A variable that
is not set is not defined: templates have defaults of their own. Source: transformers' chat_template_utils (version 5),
by what it does. Differs: the day; named templates without a default are taken where there is one alone.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from kr_jax.model import template as program

_NEEDED = ('PATH', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH', 'PYTHONHOME')  # to start Python
_PATIENCE_S = 10
_FIX = 'change the template, or set tasks.chat=False'


class Template(NamedTuple):
  """A template that can be compiled."""

  text: str


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


def read(template: str) -> Template:
  """The template, once it has been compiled. Raises ValueError where it is broken."""
  reply = _child.ask({'template': template})
  if (why := reply.get('broken') or reply.get('fails')) is not None:
    raise ValueError(f'the chat template is broken: {why}; {_FIX}')
  return Template(template)


def render(template: Template, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *,
           thinking: bool | None = None, prompt: bool = True) -> str:
  """The text of a chat.

  Args:
    messages: each with 'role' and 'content'.
    tokens: special tokens by name: 'bos_token', 'eos_token', ...
    thinking: `enable_thinking` of templates that know it; None: the template's own default.
    prompt: whether the beginning of an assistant's message comes last.

  Raises:
    ValueError: the template refuses the messages, fails, or takes more than its limits of time, memory and output.
  """
  variables = {**tokens} | ({} if thinking is None else {'enable_thinking': thinking})
  variables |= {'messages': [dict(x) for x in messages], 'tools': None, 'documents': None,
                'add_generation_prompt': prompt}
  reply = _child.ask({'template': template.text, 'variables': variables})
  if 'text' in reply:
    return reply['text']
  fix = _FIX
  if any(x['role'] == 'system' for x in messages):
    fix += "; if it takes no system message, set tasks.system='' and put the text in tasks.template"
  raise ValueError(f'the chat template fails: {reply.get("fails") or reply.get("broken")}; {fix}')


class _Child:
  """The process that runs templates. It is started when it is needed, and again where a template ended it."""

  def __init__(self):
    self._lock, self._process, self._owner = threading.Lock(), None, 0

  def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
    """The reply to a request."""
    with self._lock:
      reply = self._reply(request)
      if reply is None and not (code := self._end()):  # it had ended by itself, as nobody asked for long
        reply = self._reply(request)
        code = self._end() if reply is None else 0
      return self._ended(code) if reply is None else reply

  def _reply(self, request: Mapping[str, Any]) -> dict[str, str] | None:
    """None where the process ends before it replies."""
    if self._process is None or self._owner != os.getpid():  # a fork has the pipes of its parent
      self._start()
    try:
      program.send(self._process.stdin, request)
      return program.receive(self._process.stdout)
    except BrokenPipeError:
      return None
    except BaseException:  # of a signal: half a message is on its way
      self._process.kill()
      self._end()
      raise

  def _start(self) -> None:
    # Of the environment it gets what it needs to find its packages, and no token.
    environment = {name: os.environ[name] for name in _NEEDED if name in os.environ}
    environment |= {'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'PYTHONDONTWRITEBYTECODE': '1'}
    self._process = subprocess.Popen(
        [sys.executable, '-P', '-s', program.__file__, str(program.PROCESSOR_S), str(program.IDLE_S)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True)
    self._owner = os.getpid()

  def _ended(self, code: int) -> dict[str, str]:
    """The reply to a request that the process did not survive. code: its exit status."""
    if code == -signal.SIGPROF:
      return {'fails': f'it takes more than {program.PROCESSOR_S} s'}
    return {'fails': f'its process ended with {code}; it may take more than {program.MEMORY_MB} MiB'}

  def _end(self) -> int:
    """Ends the process; its exit status."""
    process, self._process = self._process, None
    for pipe in (process.stdin, process.stdout):
      with contextlib.suppress(OSError):
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      return process.wait(_PATIENCE_S)  # it ends by itself, once nobody can ask
    process.kill()
    return process.wait()

  def close(self) -> None:
    if self._process is not None and self._owner == os.getpid():
      self._end()


_child = _Child()
atexit.register(_child.close)
