"""A program that runs chat templates for another process: chat.py starts it, and talks to it over its pipes.

A template comes out of a stranger's file. The sandbox of jinja2 keeps it from files and from Python, but not from
taking time and memory: 'a' * 10 ** 12, loops in loops. So it runs in a process of its own, which a timer of the kernel
ends, and which gets no more memory than MEMORY_MB.

    request: {"template": text, "variables": {...}}, or without variables to compile it alone
    reply: {"text": what it writes} or {"broken" or "fails": why}

Each is its length in 8 bytes and JSON. Source of what templates find: transformers' chat_template_utils (version 5).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import select
import signal
import sys
from typing import IO, Any

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox

DAY = datetime.datetime(2024, 7, 26)  # which Llama 3's template falls back to
MEMORY_MB = 256
PROCESSOR_S = 3  # for one request
IDLE_S = 60  # after which it ends, if nobody asks; another is started when somebody does
MOST_CHARACTERS = 2 ** 23  # of what a template writes


class _Generation(ext.Extension):
  """{% generation %}TEXT{% endgeneration %} marks what an assistant writes; it renders as TEXT."""

  tags = {'generation'}

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
  """Raises an exception of any kind where the template is broken."""
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
  environment.filters['tojson'] = _to_json
  environment.globals |= {'raise_exception': _refuse, 'strftime_now': DAY.strftime}
  return environment.from_string(template)


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  """JSON without the HTML escapes of jinja2's own filter."""
  return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def answer(request: dict[str, Any]) -> dict[str, str]:
  """The reply to a request."""
  what = 'broken'
  try:
    template = compiled(request['template'])
    if 'variables' not in request:
      return {'text': ''}
    what, size, found = 'fails', 0, []
    for part in template.generate(**request['variables']):
      size += len(part)
      if size > MOST_CHARACTERS:
        return {'fails': f'it writes more than {MOST_CHARACTERS} characters'}
      found.append(part)
    return {'text': ''.join(found)}
  except MemoryError:
    return {what: f'it takes more than {MEMORY_MB} MiB'}
  except Exception as error:  # the template is a stranger's: whatever it raises
    return {what: str(error)[:2000] or type(error).__name__}


def receive(pipe: IO[bytes]) -> Any:
  """What the other side sent; None where it has gone."""
  head = pipe.read(8)
  size = int.from_bytes(head, 'little')
  body = pipe.read(size) if len(head) == 8 else b''
  return json.loads(body) if body and len(body) == size else None


def send(pipe: IO[bytes], message: Any) -> None:
  body = json.dumps(message).encode()
  pipe.write(len(body).to_bytes(8, 'little') + body)
  pipe.flush()


def serve(requests: IO[bytes], replies: IO[bytes], seconds: float, idle: float) -> None:
  """Answers requests, each within these seconds of a processor, until there is none for `idle` seconds."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side says when it is over
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a program that ignores a signal hands that down
  with contextlib.suppress(OSError, ValueError):  # not all systems have it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20,) * 2)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  while select.select([requests], [], [], idle)[0] and (request := receive(requests)) is not None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # it ends the process, whatever that is doing
    reply = answer(request)
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(replies, reply)


if __name__ == '__main__':
  serve(sys.stdin.buffer, sys.stdout.buffer, *map(float, sys.argv[1:]))
