"""Themes, ticks and pictures."""

import itertools
import struct
import zlib

import numpy as np
import pytest

from kr_jax.report import drawing

# Machado et al. 2009: how protanopes, deuteranopes and tritanopes see linear RGB.
EYES = np.array([
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]])
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1, 1.089])


def linear(color):
  c = np.array([int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)])
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
  """Of the Web Content Accessibility Guidelines: 21 of black and white."""
  low, high = sorted(float(linear(c) @ TO_XYZ[1]) for c in (a, b))
  return (high + 0.05) / (low + 0.05)


def lab(color, eye):
  x = TO_XYZ @ np.clip(EYES[eye] @ linear(color), 0, 1) / WHITE
  f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
  return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize('theme', drawing.PALETTES)
def test_colours_can_be_told_apart(theme):
  assert contrast('#000000', '#ffffff') == pytest.approx(21)
  palette, background = drawing.PALETTES[theme], drawing.BACKGROUNDS[theme]
  colors = [palette[f'c{i}'] for i in range(drawing.COLORS)] + [palette['muted']]
  assert min(contrast(color, background) for color in colors) >= 3
  assert contrast(palette['text'], background) >= 7
  for eye in range(len(EYES)):
    apart = [np.linalg.norm(lab(a, eye) - lab(b, eye)) for a, b in itertools.combinations(colors, 2)]
    assert min(apart) > 15, eye  # a difference of 2 is just seen


def test_a_theme_colours_ranges_alone():
  """Data that say 'c0' stay."""
  spec = {'data': {'values': [{'name': 'c0'}]}, 'encoding': {'color': {'scale': drawing.colored(['c0', 'b'])},
                                                              'dash': {'scale': {'range': [[1, 0], [2, 3]]}}}}
  found = drawing.themed(spec, 'dark')
  assert found['data'] == spec['data'] and found['encoding']['dash'] == spec['encoding']['dash']
  assert found['encoding']['color']['scale'] == {'domain': ['c0', 'b'], 'range': ['#529bee', '#ea834b']}
  with pytest.raises(KeyError):
    drawing.themed(spec, 'sepia')


@pytest.mark.parametrize('low, high, ticks', [
    (1, 1.45, [1, 1.1, 1.2, 1.3, 1.4]), (0.5, 4, [0.5, 0.7, 1, 1.2, 1.5, 2, 3]),
    (100, 9000, [100, 200, 500, 1000, 2000, 5000]), (2e3, 3e9, [1e4, 1e5, 1e6, 1e7, 1e8, 1e9]), (10, 10, [10])])
def test_ticks_of_a_logarithm(low, high, ticks):
  assert drawing.log_ticks(low, high) == ticks


def test_known_rows():
  rows = [{'a': 1.23456789, 'b': 'x', 'c': 1}, {'a': None, 'b': 'y'}, {'b': 'z'}]
  assert drawing.known(rows, 'a', 'b', keep=('d',)) == [{'a': 1.2346, 'b': 'x', 'd': None}]


def chunk(name, data):
  return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def test_a_smaller_picture_has_the_same_pixels():
  pixels = bytes(1000)
  stored = zlib.compress(pixels, 0)
  head, end = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', b'what it is'), chunk(b'IEND', b'')
  found = drawing.smaller(head + chunk(b'IDAT', stored[:500]) + chunk(b'IDAT', stored[500:]) + end)
  assert found == head + chunk(b'IDAT', zlib.compress(pixels, 6)) + end
