"""What the charts of a report are made of: themes, parts of Vega-Lite specifications, and pictures of these.

A specification holds no colour but a name in the `range` of a scale; `themed` puts the colours of a theme there, as the
page does in the browser, so that one specification serves light and dark. vl-convert-python has Vega for pictures and
for the page; without it nothing is drawn.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
import functools
import importlib.util
import json
import math
import struct
import subprocess
import sys
from typing import Any
import zlib

Spec = dict[str, Any]
# Colours that protanopes, deuteranopes and tritanopes tell apart too, at 3:1 or more with the background.
PALETTES = {
    'light': {'c0': '#044b9d', 'c1': '#d9760a', 'c2': '#3fa072', 'c3': '#620357', 'c4': '#6b5202', 'c5': '#861335',
              'muted': '#6f717e', 'text': '#1b1f24', 'on_heat': '#ffffff'},
    'dark': {'c0': '#529bee', 'c1': '#ea834b', 'c2': '#7df2d8', 'c3': '#deb4ec', 'c4': '#e6e07a', 'c5': '#ffa5a0',
             'muted': '#838c9a', 'text': '#e6e9ed', 'on_heat': '#10151b'},
}
COLORS = 6  # c0 to c5
BACKGROUNDS = {'light': '#ffffff', 'dark': '#151a20'}
_LINES = {'light': ('#d9dde2', '#5a6169'), 'dark': ('#323a44', '#a5adb8')}  # grid, axes' labels
_HEAT = {'light': ['#e0ebf6', '#b5d0ea', '#6aa5d8', '#2673b8', '#083c7a'],
         'dark': ['#1d2a38', '#1f4a78', '#2b78bd', '#69abe8', '#cbe4ff']}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif'

_SHAPES = ('circle', 'square', 'triangle-up', 'diamond', 'cross', 'triangle-down')
_HEIGHT = 260
_PICTURE = {1: 640, 2: 400}  # width of a chart, by columns
_MOST_S = 120  # seconds that drawing may take
_VEGA = """
import base64, json, sys
import vl_convert
found = [getattr(vl_convert, sys.argv[1])(**request) for request in json.load(sys.stdin)]
json.dump([base64.b64encode(x if isinstance(x, bytes) else x.encode()).decode() for x in found], sys.stdout)
"""


def config(theme: str) -> Spec:
  """Vega's config of a theme, 'light' or 'dark'."""
  palette, (grid, label) = PALETTES[theme], _LINES[theme]
  return {
      'background': BACKGROUNDS[theme], 'font': _FONT, 'padding': 4,
      'view': {'stroke': None, 'continuousHeight': _HEIGHT},
      'axis': {'gridColor': grid, 'domainColor': grid, 'tickColor': grid, 'labelColor': label, 'titleColor': label,
               'labelFontSize': 12, 'titleFontSize': 12, 'titleFontWeight': 'normal', 'titlePadding': 8,
               'labelPadding': 5, 'labelLimit': 130, 'labelOverlap': 'greedy', 'tickCount': 6},
      'legend': {'direction': 'vertical', 'labelColor': palette['text'], 'titleColor': label,
                 'labelFontSize': 12, 'titleFontSize': 12, 'titleFontWeight': 'normal', 'labelLimit': 260,
                 'symbolStrokeWidth': 2, 'symbolOpacity': 1, 'orient': 'top', 'offset': 8},
      'title': {'color': palette['text'], 'fontSize': 13, 'fontWeight': 600, 'anchor': 'start', 'offset': 8},
      'range': {'heatmap': _HEAT[theme], 'ramp': _HEAT[theme], 'category': [palette[f'c{i}'] for i in range(COLORS)]},
      'mark': {'color': palette['c0']}, 'bar': {'color': palette['c0'], 'height': {'band': 0.7}},
      'line': {'strokeWidth': 2}, 'text': {'fill': palette['text']},
      'style': {
          'reference': {'color': palette['muted'], 'stroke': palette['muted'], 'strokeDash': [3, 4],
                        'strokeWidth': 1.5},
          'cell': {'stroke': None}, 'outline': {'stroke': BACKGROUNDS[theme]}}}


def themed(spec: Any, theme: str) -> Any:
  """A specification whose ranges hold the theme's colours in place of their names."""
  palette = PALETTES[theme]
  if isinstance(spec, list):
    return [themed(x, theme) for x in spec]
  if not isinstance(spec, dict):
    return spec
  color = lambda c: palette.get(c, c) if isinstance(c, str) else c
  return {k: [color(c) for c in x] if k == 'range' and isinstance(x, list) else themed(x, theme)
          for k, x in spec.items()}


# ---- parts ----


def rounded(x: Any) -> Any:
  """Five digits are more than a screen shows."""
  return float(f'{x:.5g}') if isinstance(x, float) else x


def known(rows: Iterable[dict[str, Any]], *needed: str, keep: Sequence[str] = ()) -> list[dict[str, Any]]:
  """The rows whose needed fields are known, with these fields and those to keep."""
  return [{k: rounded(row.get(k)) for k in (*needed, *keep)} for row in rows
          if all(row.get(k) is not None for k in needed)]


def colored(domain: Sequence[str], colors: Sequence[str] = ()) -> Spec:
  """A scale of names to colours; by default those of PALETTES in their order."""
  return {'domain': list(domain), 'range': list(colors or [f'c{i % COLORS}' for i in range(len(domain))])}


def by(field: str, domain: Sequence[str], colors: Sequence[str] = (), *, columns: int = 1) -> Spec:
  """A colour a name; the legend is left out where there is one name only."""
  return {'field': field, 'type': 'nominal', 'scale': colored(domain, colors),
          'legend': None if len(domain) < 2 else {'title': None, 'columns': columns}}


def shapes(field: str, domain: Sequence[str]) -> Spec:
  """A shape a name, beside its colour."""
  return {'field': field, 'type': 'nominal', 'legend': None if len(domain) < 2 else {'title': None},
          'scale': {'domain': list(domain), 'range': [_SHAPES[i % len(_SHAPES)] for i in range(len(domain))]}}


def quantity(field: str, title: str | None, **more: Any) -> Spec:
  return {'field': field, 'type': 'quantitative', 'title': title, **more}


def share(field: str, title: str | None, **more: Any) -> Spec:
  """An axis from 0 to 1."""
  return quantity(field, title, scale={'domain': [0, 1], **more.pop('scale', {})}, axis={'format': '.1~f'}, **more)


def amount(field: str, title: str, form: str, logarithm_of: Sequence[float] = ()) -> Spec:
  """An axis of amounts, each tick in its own format (0, 500, 1k). logarithm_of: what stands on it, above 0."""
  axis: Spec = {'labelExpr': f"format(datum.value, '{form}')"}
  if not logarithm_of:
    return quantity(field, title, axis=axis, scale={'zero': True})
  return quantity(field, title, axis={**axis, 'values': log_ticks(min(logarithm_of), max(logarithm_of))},
                  scale={'type': 'log', 'nice': False, 'padding': 12})


def log_ticks(low: float, high: float) -> list[float]:
  """Round numbers within a range, as fine as at most eight allow: from tenths of each power of ten to powers alone."""
  powers = [10.0 ** k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
  for steps in ([1 + i / 10 for i in range(90)], (1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
    ticks = [float(f'{step * power:.3g}') for power in powers for step in steps
             if low <= step * power * (1 + 1e-9) and step * power * (1 - 1e-9) <= high]
    if len(ticks) <= 8:
      break
  return ticks


def tip(*fields: str, **formats: str) -> list[Spec]:
  """What a mark shows under the pointer: texts, and numbers with their formats."""
  return ([{'field': f, 'type': 'nominal'} for f in fields] +
          [{'field': f, 'type': 'quantitative', 'format': x, 'title': f.replace('_', ' ')}
           for f, x in formats.items()])


def chart(name: str, *layers: Spec, **more: Any) -> Spec:
  """A chart as wide as its box. name: of what it shows, for those who do not see it."""
  body = dict(layers[0]) if len(layers) == 1 else {'layer': list(layers)}
  return {'description': name, 'width': 'container', 'height': _HEIGHT,
          'autosize': {'type': 'fit-x', 'contains': 'padding'}, **body, **more}


def layer(rows: list[dict[str, Any]], mark: Any, **encoding: Spec) -> Spec:
  return {'data': {'values': rows}, 'mark': mark, 'encoding': encoding}


# ---- pictures ----


def beside(specs: Sequence[Spec], titles: Sequence[str], columns: int) -> Spec:
  """Several charts as one, of fixed widths, each under a title."""
  width = _PICTURE[columns]
  charts = [{k: x for k, x in spec.items() if k != 'autosize'} | {'width': width, 'title': title}
            for spec, title in zip(specs, titles, strict=True)]
  if len(charts) == 1:
    return charts[0]
  return {'concat': charts, 'columns': columns, 'spacing': 28,
          'resolve': {'scale': dict.fromkeys(('color', 'shape', 'size', 'strokeDash'), 'independent')}}


def pictures(specs: dict[str, Spec]) -> dict[str, bytes]:
  """PNG files of specifications, in light colours, by their names. Raises ImportError and RuntimeError as `bundle`
  does."""
  options = {'config': {**config('light'), 'padding': 12}, 'scale': 1.5, 'allowed_base_urls': []}
  found = _vega('vegalite_to_png', [{'vl_spec': themed(spec, 'light'), **options} for spec in specs.values()])
  return dict(zip(specs, map(smaller, found)))


def smaller(png: bytes) -> bytes:
  """The same picture, compressed: vl_convert leaves a PNG ten times as large as need be."""
  at, before, data, after = 8, png[:8], b'', b''
  while at < len(png):
    size, = struct.unpack('>I', png[at:at + 4])
    chunk = png[at:at + 12 + size]
    if chunk[4:8] == b'IDAT':
      data += chunk[8:-4]
    elif data:
      after += chunk
    else:
      before += chunk
    at += len(chunk)
  body = b'IDAT' + zlib.compress(zlib.decompress(data), 6)
  return before + struct.pack('>I', len(body) - 4) + body + struct.pack('>I', zlib.crc32(body)) + after


@functools.cache
def bundle() -> str:
  """Vega, Vega-Lite and Vega-Embed as one script that needs no network (0.9 MB).

  Raises:
    ImportError: vl-convert-python is not installed.
    RuntimeError: it fails.
  """
  return _vega('javascript_bundle', [{}])[0].decode()


def _vega(function: str, requests: list[dict[str, Any]]) -> list[bytes]:
  """What a function of vl_convert returns of each request.

  It runs in a process of its own: a run whose page this is neither holds the memory of a JavaScript engine (170 MB) nor
  ends when that engine does.
  """
  if importlib.util.find_spec('vl_convert') is None:
    raise ImportError('vl-convert-python is not installed')
  try:
    done = subprocess.run([sys.executable, '-c', _VEGA, function], input=json.dumps(requests).encode(), check=True,
                          capture_output=True, timeout=_MOST_S)
  except (OSError, subprocess.SubprocessError) as error:
    said = (getattr(error, 'stderr', None) or b'').decode(errors='replace').strip().splitlines()
    raise RuntimeError(said[-1] if said else str(error)) from error
  return [base64.b64decode(found) for found in json.loads(done.stdout)]
