"""Files of JSON lines that were damaged."""

import errno
import os

import pytest

from kr_jax.record import lines


def test_what_can_be_read(tmp_path):
  """Garbage, NULs around and within, no UTF-8, a list, a number, too deep, blank lines, and a last line without end."""
  good = [b'{"a": 1}', b'\0\0\0{"a": 2}\0', b' {"a": "\xc3\xbc"} \r']
  bad = [b'garbage', b'{"a": \0 3}', b'{"a": "\xff"}', b'[{"a": 4}]', b'5', b'[' * 100_000,
         b'{"a": 1' + b'0' * 5000 + b'}']
  (tmp_path / 'x').write_bytes(b'\n'.join([good[0], *bad[:3], b'', b'\0', good[1], *bad[3:], good[2], b'{"a": 9}']))
  found = lines.read(str(tmp_path / 'x'))
  assert [record['a'] for record in found.records] == [1, 2, 'ü'] and found.numbers == [1, 7, 12]
  assert found.unread == [2, 3, 4, 8, 9, 10, 11] and found.is_cut
  found = lines.read(str(tmp_path / 'x'), lambda record: record['a'] == 2)
  assert found.numbers == [7] and found.unread == [1, 2, 3, 4, 8, 9, 10, 11, 12]


def test_a_huge_line_is_not_held_in_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(lines, '_LONGEST', 10)
  (tmp_path / 'x').write_text(f'{{"a": 1}}\n{{"a": "{"x" * 95}"}}\n{{"a": 2}}\n')
  assert lines.read(str(tmp_path / 'x'))[1:] == ([1, 3], [2], False)
  (tmp_path / 'x').write_text('x' * 100)
  assert lines.read(str(tmp_path / 'x')) == ([], [], [1], False)


def test_a_damaged_file_is_kept_beside(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  for n in (1, 2):
    path.write_text(str(n))
    assert lines.set_aside(str(path)) == f'{path}.unreadable-{n}'
    path.unlink()
    path.write_text('new')
  monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links here')))
  assert lines.set_aside(str(path)) == f'{path}.unreadable-3'
  assert [(tmp_path / f'x.unreadable-{n}').read_text() for n in (1, 2, 3)] == ['1', '2', 'new']
  monkeypatch.setattr(lines.shutil, 'copyfile', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
  with pytest.raises(OSError, match='no links here'):
    lines.set_aside(str(path))


def test_numbers_of_lines():
  assert [lines.numbered(range(1, n + 1)) for n in (1, 2, 7)] == [
      'line 1', 'lines 1, 2', 'lines 1, 2, 3, 4, 5 and 2 more']
