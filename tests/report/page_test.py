"""The two forms of a page: whole, offline, and safe from what a run wrote."""

import html.parser
import json
import os
import re
import sys

import pytest

from kr_jax.report import charts
from kr_jax.report import contents
from kr_jax.report import drawing
from kr_jax.report import page
from kr_jax.report import run
from kr_jax.report import scorecard
from tests.report import browser
from tests.report import made_run
from tests.report import made_view

LIBRARY = 'window.vegaEmbed = "</scrip" + "t>"'  # in place of 0.9 MB


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Three runs: two of a group that differ by their seed, and one of another."""
  root = tmp_path_factory.mktemp('runs')
  return [made_run.make(root / f'{rule}{seed}', rule=rule, seed=seed, steps=24, tasks=12)
          for rule, seed in (('uniform', 0), ('knapsack', 0), ('knapsack', 1))]


@pytest.fixture(scope='module')
def view(workdirs):
  return page.cleaned(scorecard.view([run.read(workdir) for workdir in workdirs], target=0.4))


class Tags(html.parser.HTMLParser):
  """The tags of a page, and the text within them."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text.append(data)


def test_what_is_not_seen_is_written_out():
  assert page.clean('a\u202eb\x00\x1b[1m\ud800\u2028\r\n\tä') == 'a\\u202eb\\u0000\\u001b[1m\\ud800\\u2028\n\tä'
  assert page.cleaned({'a': [float('nan'), 1.5, None, ('x\x07',)]}) == {'a': [None, 1.5, None, ['x\\u0007']]}
  assert page.short('x' * 4000) == 'x' * 4000
  assert page.short('x' * 5001) == 'x' * 4000 + ' … (1,001 more characters)'


def test_json_ends_no_script():
  text = '</script><!--&\u2028'
  found = page.for_script({'a': text})
  assert not set('<>&\u2028') & set(found) and json.loads(found) == {'a': text}
  with pytest.raises(ValueError):
    page.for_script({'a': float('inf')})


@pytest.mark.parametrize('text, said', [
    ('a_b*c', 'a\\_b\\*c'), ('|x|\n`y`', '\\|x\\| \\`y\\`'), ('<b>&amp;', '\\<b\\>\\&amp;'), ('# x', '\\# x'),
    ('- x', '\\- x'), ('12. x', '12\\. x'), ('12.5', '12.5'), ('[a](https://b)', '\\[a\\](https&#58;//b)'),
    ('me@www.x', 'me&#64;www&#46;x'), (3, '3')])
def test_markdown_marks_are_escaped(text, said):
  assert page.for_markdown(text) == said
  assert page.for_markdown(page.for_markdown(text)) == said  # once


def test_a_fence_is_longer_than_any_within():
  assert page.fenced('a\n```\nb') == '````text\na\n```\nb\n````'


def test_a_table_in_markdown():
  table = contents.Table('k', 'A|B', ['x', 'y'], [
      contents.Row(['of'], is_heading=True), contents.Row(['a|b', '1'], notes={1: [1]})], numbers=(1,), notes=['why'])
  assert page.markdown_table(table) == (
      '**A\\|B**\n\n| x | y |\n| --- | ---: |\n| **of** |  |\n| a\\|b | 1<sup>1</sup> |\n\n1. why')


def test_the_page_has_every_section_and_chart(view):
  found = Tags(page.html(view, LIBRARY))
  ids = {attributes.get('id') for _, attributes in found.tags}
  assert {section.key for section in contents.sections(view)} <= ids
  specs, themes = (json.loads(text) for text in found.text if text.startswith('{"'))
  canvases = [a['data-chart'] for _, a in found.tags if 'data-chart' in a]
  assert len(canvases) == len(set(canvases)) > 20 and set(canvases) == set(specs)
  assert list(themes) == ['light', 'dark']
  assert list(specs['success']) == list(charts.AXES) == list(specs['pareto'])
  missing = page.html({**view, 'missing': ['no <b>ledger</b>']}, LIBRARY)
  assert 'no &lt;b&gt;ledger&lt;/b&gt;' in missing and 'Some records are not there' in missing
  assert 'Some records are not there' not in page.html({**view, 'missing': []}, LIBRARY)


def test_a_hostile_run_writes_no_markup(view):
  """The page has the tags of a page whose texts are harmless, every text is there, and scripts are named by hash."""
  spoilt = page.cleaned(made_view.hostile(view))
  plain, hostile = Tags(page.html(view, LIBRARY)), Tags(page.html(spoilt, LIBRARY))
  shape = lambda tags: sorted((tag, *sorted(a)) for tag, a in tags.tags if tag not in ('details', 'summary'))
  difference = {x for x in shape(hostile)} - {x for x in shape(plain)}
  assert not difference, difference
  assert not [a for _, a in hostile.tags if any(name.startswith('on') or name == 'style' for name in a)]
  assert {a['href'][0] for _, a in hostile.tags if 'href' in a} == {'#', 'd'}  # d: the empty icon, 'data:,'
  assert sum(tag == 'script' for tag, _ in hostile.tags) == 4
  text = ''.join(hostile.text)
  assert text.count(page.clean(made_view.HOSTILE)) > 100
  policy = next(a['content'] for tag, a in hostile.tags if 'http-equiv' in a)
  assert policy.startswith("default-src 'none'; script-src 'sha256-") and 'unsafe-eval' not in policy
  assert policy.count("'sha256-") == 2 and "script-src 'unsafe" not in policy


def test_a_hostile_run_writes_no_marks_of_markdown(view):
  """Outside fences no mark of a run's text is left; inside there are no more fences than there should be."""
  found = page.markdown(page.cleaned(made_view.hostile(view)), ['success'])
  outside = re.sub(r'(?ms)^(`{3,})text\n.*?^\1$', '', found)
  assert 'window.hit' in outside
  for mark in ('<script', '<img', '](http', '![](', '<https', 'www.', '@someone', '://', '{{ 7*7', '\n# heading'):
    assert not re.search(r'(?<!\\)' + re.escape(mark), outside), mark
  lines = [line for line in outside.splitlines() if line.startswith('|')]
  columns = {len(re.findall(r'(?<!\\)\|', line)) for line in lines if 'knapsack' in line}
  assert max(columns) < 12  # no cell was added
  assert '![Success and what it cost](plots/success.png)' in found


def test_without_vega_there_are_tables(workdirs, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'vl_convert', None)
  drawing.bundle.cache_clear()
  paths = page.write(workdirs[:1], output=str(tmp_path / 'out'))
  assert [os.path.relpath(path, tmp_path) for path in paths] == ['out/report.html', 'out/report.md']
  text = (tmp_path / 'out' / 'report.html').read_text()
  assert 'pip install vl-convert-python' in text and '<script' not in text and 'data-chart' not in text
  assert "script-src 'none'" in text and 'Seconds by category' in text
  with pytest.raises(ValueError, match='give --workdir'):
    page.write([])


def test_vega_that_fails_is_reported(workdirs, tmp_path, monkeypatch):
  """As an engine does that is killed: the page is written."""
  monkeypatch.setattr(drawing, '_VEGA', 'import os; os.kill(os.getpid(), 9)')
  monkeypatch.setattr(drawing, 'bundle', lambda: LIBRARY)
  paths = page.write(workdirs[:1], output=str(tmp_path))
  assert len(paths) == 2
  assert re.search('pictures: Vega failed: .*SIGKILL', (tmp_path / 'report.md').read_text())
  monkeypatch.setattr(drawing, '_VEGA', 'raise ValueError("no such chart")')
  with pytest.raises(RuntimeError, match='^ValueError: no such chart$'):
    drawing.pictures({'a': {}})


@pytest.mark.slow
def test_files(workdirs, tmp_path):
  paths = page.write(workdirs[:2], target=0.4, output=str(tmp_path))
  names = ['report.html', 'report.md', *(f'plots/{name}.png' for name in (
      'success', 'goodput', 'success_by_difficulty', 'budgets', 'gradient_ratio', 'calibration'))]
  assert [os.path.relpath(path, tmp_path) for path in paths] == names
  assert all((tmp_path / name).read_bytes()[:4] == b'\x89PNG' for name in names[2:])
  assert sorted(os.listdir(tmp_path)) == ['plots', 'report.html', 'report.md']  # nothing unfinished
  text = (tmp_path / 'report.md').read_text()
  assert all(f'](plots/{name}' in text for name in os.listdir(tmp_path / 'plots'))
  assert not re.search(r'(src|href)="(https?:)?//', (tmp_path / 'report.html').read_text())
  os.remove(tmp_path / 'plots' / 'budgets.png')
  assert len(page.write(workdirs[:1], output=str(tmp_path), pictures=False)) == 2
  text = (tmp_path / 'report.md').read_text()
  assert 'plots/success.png' in text and 'plots/budgets.png' not in text


DRAWN = """[...document.querySelectorAll('.canvas')].filter(box => !box.closest('details:not([open])')).map(box => [
    box.dataset.chart, box.querySelectorAll('svg').length, box.querySelectorAll('svg path, svg text').length])"""


LABEL = "document.querySelector('[data-chart=success] .role-axis-label text')"


@pytest.mark.slow
@pytest.mark.skipif(browser.PATH is None, reason='needs Chromium: apt-get install chromium')
def test_in_a_browser(workdirs, view, tmp_path):
  """At the widths of a phone and a desk, light and dark: drawn, nothing asked for, no complaint, nothing sticks out."""
  page.write(workdirs, target=0.4, output=str(tmp_path), pictures=False)
  hostile = tmp_path / 'hostile.html'
  hostile.write_text(page.html(page.cleaned(made_view.hostile(view)), drawing.bundle()))
  with browser.Browser(str(tmp_path / 'profile')) as chromium:
    for path in (hostile, tmp_path / 'report.html'):
      for n, (width, dark) in enumerate(((390, False), (390, True), (1440, True), (1440, False))):
        chromium.look(width=width, dark=dark)
        if not n:
          chromium.open(path)
          chromium.wait('document.documentElement.dataset.drawn == "yes"')
        chromium.wait(f'{LABEL}.getAttribute("fill") == "{"#a5adb8" if dark else "#5a6169"}"')
        drawn = chromium.evaluate(DRAWN)
        assert len(drawn) > 15 and all(svg == 1 and marks > 5 for _, svg, marks in drawn), drawn
        assert chromium.evaluate('document.documentElement.scrollWidth') == width
        background = 'rgb(21, 26, 32)' if dark else 'rgb(255, 255, 255)'
        assert chromium.evaluate('getComputedStyle(document.body).backgroundColor') == background
        assert chromium.evaluate('window.hit') is None
    _turn(chromium)
    assert not chromium.requests and not chromium.complaints


def _turn(chromium):
  """Switches the axis, which stays when the theme changes, and opens all details on a phone."""
  texts = "[...document.querySelectorAll('[data-chart=success] svg text')].map(x => x.textContent).join('|')"
  assert 'rollouts' in chromium.evaluate(texts) and 'kWh' not in chromium.evaluate(texts)
  chromium.evaluate("document.querySelector('input[name=success][value=kwh]').click()")
  chromium.wait(f"({texts}).includes('kWh')")
  chromium.look(width=390, dark=False)
  chromium.wait(f'{LABEL}.getAttribute("fill") == "#5a6169"')
  assert 'kWh' in chromium.evaluate(texts)
  chromium.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
  chromium.wait("[...document.querySelectorAll('.canvas')].every(box => box.querySelector('svg'))")
  chromium.wait('document.documentElement.scrollWidth == 390')
