"""The container of llama.cpp: tensors by part, split files, and files that are broken or lie about their lengths."""

import pathlib
import struct

import gguf
import numpy as np
import pytest

from kr_jax.model import gguf_file
from kr_jax.model import llama_cpp
from tests import make_gguf

DATA = pathlib.Path(__file__).parents[1] / 'data'
QWEN_3 = DATA / 'families' / 'qwen3_kv1'


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_K', 'Q6_K'])
def test_part_of_a_tensor_of_each_kind(kind, monkeypatch):
  """Rows and columns that begin and end inside blocks are those of the whole tensor, dequantised."""
  kind = gguf.GGMLQuantizationType[kind]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  monkeypatch.setattr(gguf_file, '_AT_ONCE', 2 * size)
  rng = np.random.default_rng(0)
  data = rng.integers(0, 60, (3, 5, 4 * size), np.uint8)  # small enough that no 16-bit scale is infinite
  tensor = gguf_file.Tensor((3, 5, 4 * block), kind, data)
  want = gguf.dequantize(data.reshape(15, -1), kind).reshape(3, 5, -1)
  columns = slice(block // 2, 3 * block - block // 4)
  np.testing.assert_array_equal(gguf_file.part(tensor, (1, slice(2, 4)), columns), want[1, 2:4, columns])
  np.testing.assert_array_equal(
      gguf_file.part(tensor, (slice(None), np.array([4, 0])), slice(None)), want[:, [4, 0]])
  assert gguf_file.part(tensor, (0, slice(2, 2)), columns).shape == (0, len(range(4 * block)[columns]))


def test_a_split_file_is_read_from_any_of_its_parts(tmp_path):
  make_gguf.write(tmp_path / 'one.gguf', QWEN_3)
  make_gguf.write(tmp_path / 'split.gguf', QWEN_3, parts=3)
  fields, tensors = gguf_file.read(tmp_path / 'one.gguf')
  paths = sorted(tmp_path.glob('split-*.gguf'))
  assert [path.name for path in paths] == [f'split-0000{k}-of-00003.gguf' for k in (1, 2, 3)]
  for path in paths:
    of_parts, found = gguf_file.read(path)
    assert {key: x for key, x in of_parts.items() if not key.startswith('split.')} == fields
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
      assert (found[name].shape, found[name].data.tobytes()) == (tensor.shape, tensor.data.tobytes())


def test_a_split_file_that_is_not_whole(tmp_path):
  make_gguf.write(tmp_path / 'split.gguf', QWEN_3, parts=3)
  first, second, third = sorted(tmp_path.glob('split-*.gguf'))
  content = second.read_bytes()
  second.unlink()
  for path in (first, third):
    with pytest.raises(ValueError, match=r"part of a split file of which \['split-00002-of-00003.gguf'\] are missing"):
      gguf_file.read(path)
  second.write_bytes(third.read_bytes())
  with pytest.raises(ValueError, match=r'split-00002-of-00003.gguf says that it is part 2 \(from 0\) of 3, not part 1'):
    gguf_file.read(first)
  second.write_bytes(content)
  content = first.read_bytes()
  first.write_bytes(content.replace(b'split.tensors.count' + struct.pack('<Ii', 5, 24),
                                    b'split.tensors.count' + struct.pack('<Ii', 5, 99)))
  with pytest.raises(ValueError, match='the 3 parts of .* hold 24 tensors, not 99 as they say'):
    gguf_file.read(third)
  first.write_bytes(content)
  renamed = first.rename(tmp_path / 'model.gguf')
  with pytest.raises(ValueError, match=r'model.gguf is part 0 \(from 0\) of 3 .* NAME-00001-of-00002.gguf'):
    gguf_file.read(renamed)


def test_paths_that_are_no_file_of_llama_cpp(tmp_path):
  path = tmp_path / 'a.gguf'
  for content, error in ((b'', 'cannot mmap an empty file'), (b'not a model', "begins with b'not ', not with b'GGUF'"),
                         (b'GGU', 'takes 4 bytes at 0, and the file ends at 3'),
                         (b'GGUF' + struct.pack('<I', 1), 'says version 1, not 2 or 3: convert the model'),
                         (b'GGUF' + struct.pack('>I', 3), 'written for big-endian machines')):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'a.gguf is no GGUF file, or a broken one: .*{error}.*; fetch it again'):
      gguf_file.read(path)
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
  with pytest.raises(ValueError, match='a.gguf is a pointer of Git LFS, not the file; run `git lfs pull`'):
    gguf_file.read(path)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path):
  content = (DATA / 'checkpoints' / 'qwen3.gguf').read_bytes()
  path = tmp_path / 'a.gguf'
  cuts = {*range(0, 200, 7), *np.random.default_rng(0).integers(0, len(content) - 64, 40).tolist(), len(content) - 64}
  for cut in cuts:
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError, match='a.gguf is no GGUF file, or a broken one'):
      gguf_file.read(path)


def test_bytes_that_are_wrong_give_an_error_or_a_file(tmp_path):
  """Whatever the header says: no other error, and no more memory than the file has bytes for."""
  content = bytearray((DATA / 'checkpoints' / 'qwen2.gguf').read_bytes())
  path, rng = tmp_path / 'a.gguf', np.random.default_rng(1)
  path.write_bytes(content)
  refused = 0
  for _ in range(60):
    at = int(rng.integers(0, 1500))
    broken = content[:at] + bytes(rng.integers(0, 256, 8, np.uint8)) + content[at + 8:]
    path.write_bytes(broken)
    try:
      file = llama_cpp.Gguf(path)
      _ = file.config, file.shapes, file.tokenizer_json, file.generation_config
    except ValueError as error:
      assert 'a.gguf' in str(error)
      refused += 1
  assert refused > 30


def header(*fields: bytes, tensors: int = 0, count: int | None = None) -> bytes:
  return b'GGUF' + struct.pack('<IQQ', 3, tensors, len(fields) if count is None else count) + b''.join(fields)


def text(x: str | bytes) -> bytes:
  x = x if isinstance(x, bytes) else x.encode()
  return struct.pack('<Q', len(x)) + x


HUGE = 1 << 60


@pytest.mark.parametrize('content, error', [
    (header(count=HUGE), 'field 0 of 1152921504606846976 takes 8 bytes'),
    (header(tensors=HUGE), 'the description of tensor 0 of 1152921504606846976 takes 8 bytes'),
    (header(struct.pack('<Q', HUGE)), 'field 0 of 1 takes 1152921504606846976 bytes'),
    (header(text('a') + struct.pack('<IQ', 8, HUGE)), 'the field a takes 1152921504606846976 bytes'),
    (header(text('a') + struct.pack('<IIQ', 9, 0, HUGE)), 'the field a says that it has 1152921504606846976 elements'),
    (header(text('a') + struct.pack('<IIQ', 9, 8, HUGE)), 'the field a says that it has 1152921504606846976 elements'),
    (header(text('a') + struct.pack('<IIQ', 9, 9, 1) + b'x' * 99), 'the field a is of the type 9'),
    (header(text('a') + struct.pack('<I', 77)), 'the field a is of the type 77, which is not known'),
    (header(text('a') + struct.pack('<I', 8) + text(b'\xff\xfe')), 'the field a holds a text that is not UTF-8'),
    (header(text('a') + struct.pack('<IIQ', 9, 8, 2) + text('x') + text(b'\xc3')), 'the field a holds a text that'),
    (header(*[text('a') + struct.pack('<IB', 0, 1)] * 2), 'the field a stands twice'),
    (header(text('a' * 5000) + struct.pack('<I', 77)), 'the field a{99} is of the type 77'),
    (header(text('general.alignment') + struct.pack('<II', 4, 0)), 'the field general.alignment is 0, not a number'),
    (header(tensors=1) + text('t') + struct.pack('<I', 9), 'the tensor t has 9 dimensions, not 1 to 4'),
    (header(tensors=1) + text('t') + struct.pack('<IQIQ', 1, 8, 999, 0), 'the tensor t is of the type 999'),
    (header(tensors=1) + text('t') + struct.pack('<IQIQ', 1, 8, 8, 0), r'the tensor t has the shape \[8\]; rows of'),
    (header(tensors=1) + text('t') + struct.pack('<IQQIQ', 2, HUGE, HUGE, 0, 0), 'the tensor t takes .* bytes'),
    (header(tensors=1) + text('t') + struct.pack('<IQIQ', 1, 8, 0, HUGE), 'the tensor t takes 32 bytes at')],
                         ids=range(18))
def test_what_a_header_must_not_say(content, error, tmp_path):
  (tmp_path / 'a.gguf').write_bytes(content)
  with pytest.raises(ValueError, match=f'a.gguf is no GGUF file, or a broken one: {error}'):
    gguf_file.read(tmp_path / 'a.gguf')


@pytest.mark.parametrize('content, error, limit', [
    (header(text('a') + struct.pack('<IIQ', 9, 0, 9) + b'x' * 9), 'the field a has 9 elements, above the limit of 8',
     '_MOST_ELEMENTS'),
    (header(text('a') + struct.pack('<I', 8) + text('x' * 9)), 'the field a has a text of 9 bytes', '_MOST_TEXT'),
    (header(*[text(f'{i}') + struct.pack('<IB', 0, 1) for i in range(9)]), 'field 8 of 9 is above the limit of 8 fi',
     '_MOST_FIELDS'),
    (header(tensors=9) + b''.join(text(f'{i}') + struct.pack('<IQIQ', 1, 8, 0, 0) for i in range(9)),
     'the description of tensor 8 of 9 is above the limit of 8 tensors', '_MOST_TENSORS')])
def test_what_has_a_limit_whatever_the_size_of_the_file(content, error, limit, tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_file, limit, 8)
  (tmp_path / 'a.gguf').write_bytes(content)
  with pytest.raises(ValueError, match=f'a.gguf is no GGUF file, or a broken one: {error}'):
    gguf_file.read(tmp_path / 'a.gguf')


def test_tensors_of_types_that_are_not_read(tmp_path):
  content = header(tensors=1) + text('t') + struct.pack('<IQIQ', 1, 8, gguf.GGMLQuantizationType.F64, 0) + b'\0' * 128
  (tmp_path / 'a.gguf').write_bytes(content)
  with pytest.raises(ValueError, match=r"tensors of the types \['F64'\] are not read, such as t; take another"):
    gguf_file.read(tmp_path / 'a.gguf')
