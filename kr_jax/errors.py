"""Whose an error is: the user's, who is told it in one line, or ours, whose traceback is kept.

Checks raise ValueError, and so do numpy, JAX and the interpreter where this project uses them wrongly. The first are
the user's: a `raise` statement of this package raised them. So are errors of reading what is no text, no JSON or no
Parquet, and those of the system, such as a file that is not there. So is `Told`, wherever it is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dis
import os
import sys

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RAISE = dis.opmap['RAISE_VARARGS']
_READERS = 'json.', 'pyarrow.', 'tokenizers.'  # whose errors say that data are not what they should be


class Told(Exception):
  """An error whose message is for the user, at any time of a run: what it is, and what to do."""


def is_users(error: BaseException) -> bool:
  """Whether an error, which was caught, is the user's."""
  if isinstance(error, (Told, OSError, UnicodeError)) or f'{type(error).__module__}.'.startswith(_READERS):
    return True
  if not isinstance(error, ValueError) or error.__traceback__ is None:
    return False
  place = error.__traceback__
  while place.tb_next:
    place = place.tb_next
  code = place.tb_frame.f_code
  return os.path.abspath(code.co_filename).startswith(_PACKAGE) and code.co_code[place.tb_lasti] == _RAISE


@contextlib.contextmanager
def told() -> Iterator[None]:
  """Ends the process with one line where an error is `Told`, or says that devices have no memory left."""
  try:
    yield
  except Told as error:
    sys.exit(f'error: {error}')
  except RuntimeError as error:  # JAX's own class of it, which is not loaded here
    if not str(error).startswith('RESOURCE_EXHAUSTED'):
      raise
    text = ' '.join(str(error).partition('\n')[0].split())[:300]
    sys.exit(f'error: out of memory: {text} What a config takes, and which knobs take less, says --mode=preflight; '
             'first to lower are pack.microbatch_rows, sample.slots, and the sizes of policy')
