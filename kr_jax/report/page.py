"""The page of a report: one HTML file that needs no network, and one in Markdown beside it.

Everything that a run holds is hostile: a policy writes what it likes, and so does whoever wrote a dataset. In HTML it
stands escaped (Jinja escapes whatever a template prints), in scripts as JSON without `<`, `>` and `&`, in Markdown with
every mark escaped or inside a fence that is longer than any within; and characters that are not seen, or turn text
around, are written out. The policy of the page (Content-Security-Policy) lets its own scripts run, which it names by
their hashes, and no request leave it; Vega interprets its expressions and compiles none.

The page does not refresh itself, as readers would lose their place: during a run it is written anew, and reloading
shows it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from typing import Any

import jinja2
from markupsafe import Markup

from kr_jax import files
from kr_jax.costs import hardware as hardware_lib
from kr_jax.report import charts
from kr_jax.report import contents
from kr_jax.report import drawing
from kr_jax.report import run as run_lib
from kr_jax.report import scorecard

_FILES = os.path.dirname(os.path.abspath(__file__))
_MOST_TEXT = 4000  # characters of a text that is shown
# Controls, marks of direction, characters without a width, line ends of JavaScript, half surrogates.
_HIDDEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]')
_MARKS = re.compile(r'([\\`*_\[\]<>|~$&])')
_BEGINNINGS = re.compile(r'([#+=-]|\d+(?=[.)](?:\s|$)))')  # of headings, lists and rules
_LEVELS = {'good': '✓', 'warn': '!', 'bad': '✕', 'unknown': '?'}
_UNDRAWN = ('charts: vl-convert-python is not installed; pip install vl-convert-python, and write the report again '
            'with --mode=report')


def write(workdirs: Sequence[str], *, hardware: hardware_lib.Hardware | None = None,
          target: float | None = None, output: str | None = None, pictures: bool = True) -> list[str]:
  """Writes report.html, report.md and plots/*.png, each of them whole or not at all.

  Args:
    workdirs: of the runs.
    hardware: to price them by; None: what each of them holds.
    target: held-out success to compare the costs of; it is fixed beforehand.
    output: a directory; None: the first workdir.
    pictures: False leaves plots/ as it is, which is most of the time that a page takes.

  Returns:
    Their paths, that of report.html first.

  Raises:
    ValueError: there is no run, a workdir cannot be read, or the target is no success.
  """
  view = cleaned(scorecard.view([run_lib.read(x, hardware=hardware) for x in workdirs], target=target))
  output, drawn, script = pathlib.Path(output or workdirs[0]), {}, None
  try:
    script = drawing.bundle()
    drawn = drawing.pictures(contents.pictures(view)) if pictures else {}
  except ImportError:
    view['missing'].append(_UNDRAWN)
  except RuntimeError as error:
    view['missing'].append(f'{"charts" if script is None else "pictures"}: Vega failed: {clean(str(error))}')
  there = list(drawn) if pictures else [path.stem for path in (output / 'plots').glob('*.png')]
  made = {'report.html': html(view, script).encode(), 'report.md': markdown(view, there).encode(),
           **{f'plots/{name}.png': picture for name, picture in drawn.items()}}
  for name, content in made.items():
    files.write(output / name, content)
  return [str(output / name) for name in made]


# ---- what a run wrote ----


def cleaned(x: Any) -> Any:
  """A view without numbers that are not finite, and with characters that are not seen written out."""
  if isinstance(x, dict):
    return {clean(str(k)): cleaned(v) for k, v in x.items()}
  if isinstance(x, (list, tuple)):
    return [cleaned(v) for v in x]
  if isinstance(x, float) and not math.isfinite(x):
    return None
  return clean(x) if isinstance(x, str) else x


def clean(text: str) -> str:
  r"""Text whose characters are seen: controls, marks of direction and the like are written out, as \u202e."""
  return _HIDDEN.sub(lambda found: f'\\u{ord(found[0]):04x}', text.replace('\r\n', '\n'))


def short(text: str) -> str:
  more = len(text) - _MOST_TEXT
  return text if more <= 0 else f'{text[:_MOST_TEXT]} … ({more:,} more characters)'


def for_script(x: Any) -> Markup:
  """JSON that ends no script: in ASCII, without <, > and &."""
  text = json.dumps(x, allow_nan=False, separators=(',', ':'))
  return Markup(text.replace('&', '\\u0026').replace('<', '\\u003c').replace('>', '\\u003e'))


def for_markdown(x: Any) -> Markup:
  """Text within a line of Markdown: no mark of it is one, and no address becomes a link. Markup is Markdown already."""
  if isinstance(x, Markup):
    return x
  text = _MARKS.sub(r'\\\1', ' '.join(str(x).split()))
  begins = _BEGINNINGS.match(text)
  if begins:
    at = begins.end() if begins[0].isdigit() else 0
    text = f'{text[:at]}\\{text[at:]}'
  return Markup(text.replace('@', '&#64;').replace('://', '&#58;//').replace('www.', 'www&#46;'))


def fenced(text: str) -> Markup:
  """A block of code that the text cannot end."""
  fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
  return Markup(f'{fence}text\n{text}\n{fence}')


def markdown_table(table: contents.Table) -> Markup:
  """A table in Markdown, and its notes."""
  lines = [['---:' if i in table.numbers else '---' for i in range(len(table.columns))]]
  for row in table.rows:
    if row.is_heading:
      lines.append([Markup(f'**{for_markdown(row.cells[0])}**'), *[''] * (len(table.columns) - 1)])
      continue
    lines.append([for_markdown(text) + Markup(''.join(f'<sup>{n}</sup>' for n in row.notes.get(i, ())))
                  for i, text in enumerate(row.cells)])
  lines.insert(0, [for_markdown(column) for column in table.columns])
  text = '\n'.join(['| ' + ' | '.join(line) + ' |' for line in lines])
  notes = ''.join(f'{i + 1}. {for_markdown(note)}\n' for i, note in enumerate(table.notes))
  return Markup(f'**{for_markdown(table.title)}**\n\n{text}\n\n{notes}'.strip())


# ---- the two forms ----


def html(view: charts.View, library: str | None) -> str:
  """The page.

  Args:
    view: cleaned.
    library: what draws the charts (drawing.bundle); None: there are none.
  """
  found = contents.sections(view)
  if library is None:
    found = [section.without_charts() for section in found]
  figures = [f for s in found for group in s.charts for f in (*group.shown, *group.more)]
  scripts = [] if library is None else [library, _file('page.js')]
  return _environment('html').get_template('page.html.jinja').render(
      **_given(view), sections=found, groups=charts.groups(view), hardest=contents.hardest(view),
      css=Markup(_file('page.css')), scripts=[Markup(script) for script in scripts],
      hashes=Markup(' '.join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"),
      charts_json=for_script({figure.key: figure.specs for figure in figures}),
      themes_json=for_script({theme: {'palette': drawing.PALETTES[theme], 'config': drawing.config(theme)}
                              for theme in drawing.PALETTES}))


def markdown(view: charts.View, pictures: Sequence[str]) -> str:
  """The page in Markdown; pictures: which ones of plots/ there are."""
  text = _environment('md').get_template('page.md.jinja').render(
      **_given(view), sections=contents.sections(view), pictures=pictures)
  return text.strip() + '\n'


def _given(view: charts.View) -> dict[str, Any]:
  """What both templates are given."""
  return {'view': view, 'facts': contents.facts(view), 'differences': contents.differences(view),
          'examples': [row for row in view['verification'] if row['examples']]}


@functools.cache
def _environment(form: str) -> jinja2.Environment:
  """Whatever a template prints is escaped for its form, unless it is marked as being of the form already (Markup)."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(_FILES), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True, finalize=for_markdown if form == 'md' else None)
  environment.filters |= {
      'number': contents.number, 'estimate': contents.estimate, 'words': charts.words, 'short': short, 'fenced': fenced,
      'table': markdown_table, 'file': Markup, 'axis': charts.AXES.__getitem__, 'alarm': _alarm,
      'mark': _LEVELS.__getitem__}
  return environment


def _alarm(row: dict[str, Any]) -> str:
  """An alarm with its step, which most alarms begin with."""
  return row['text'] if row['text'].startswith('step ') else f'step {row["step"]}: {row["text"]}'


@functools.cache
def _file(name: str) -> str:
  with open(os.path.join(_FILES, name), encoding='utf-8') as file:
    return file.read()


@functools.lru_cache(2)
def _hash(script: str) -> str:
  return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
