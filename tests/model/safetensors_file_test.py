"""Heads of files of safetensors that say what cannot be."""

import json
import struct

import pytest

from kr_jax.model import safetensors_file

TENSOR = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def written(tmp_path, head, data=bytes(8), size=None):
  head = head if isinstance(head, bytes) else json.dumps(head).encode()
  path = tmp_path / 'a.safetensors'
  path.write_bytes(struct.pack('<Q', len(head) if size is None else size) + head + data)
  return path


def test_a_whole_file(tmp_path):
  assert safetensors_file.opened(written(tmp_path, {'a': TENSOR})).get_tensor('a').tolist() == [0, 0]


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(TENSOR).encode(),) * 2)


@pytest.mark.parametrize('head, more, said', [
    (TWICE, {}, "its head names 'a' twice"),
    ({'a': TENSOR}, {'size': 2 ** 62}, 'its head has 4611686018427387904 bytes'),
    ({'a': TENSOR}, {'size': 2 ** 24}, 'incomplete|header length|too large'), (b'[' * 9999, {}, 'invalid JSON'),
    (b'\xff', {}, 'invalid UTF-8'), ({'a': TENSOR}, {'data': b''}, 'not fully covered'),
    ({'a': TENSOR | {'shape': [2 ** 40, 2 ** 40]}}, {}, 'overflow'), ({'a': TENSOR | {'shape': [-2]}}, {}, '-2'),
    ({'a': TENSOR | {'dtype': 'Q9'}}, {}, 'Q9'), ({'a': TENSOR | {'data_offsets': [8, 0]}}, {}, 'invalid offset'),
    ({'a': TENSOR, 'b': TENSOR | {'data_offsets': [4, 12]}}, {'data': bytes(12)}, 'invalid offset')])
def test_broken_heads(tmp_path, head, more, said):
  path = written(tmp_path, head, **more)
  with pytest.raises(ValueError, match=rf'a.safetensors is broken: .*({said}).*; fetch it again'):
    safetensors_file.opened(path)


def test_an_empty_file(tmp_path):
  (tmp_path / 'a.safetensors').write_bytes(b'')
  with pytest.raises(ValueError, match='a.safetensors is broken'):
    safetensors_file.opened(tmp_path / 'a.safetensors')
