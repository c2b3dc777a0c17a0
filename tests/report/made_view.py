"""Views for tests: an empty one, a small one by hand, and one whose every text is hostile."""

from __future__ import annotations

import copy
from typing import Any

LISTS = ('missing', 'runs', 'verdicts', 'scorecard', 'curves', 'bands', 'difficulty', 'reliability', 'log_loss',
         'budgets', 'gradient', 'mixed', 'status', 'goodput', 'phases', 'memory', 'network', 'verification', 'alarms',
         'hardest', 'pareto', 'reproduce')
# What a browser, a script, Markdown or a reader could take for something else.
HOSTILE = ('</script><script>window.hit=1</script><!--<img src=x onerror="window.hit=1"> {{ 7*7 }} ${7} `code` |cell| '
           '[link](https://evil.example/) ![](//evil.example/x.png) <https://evil.example> www.evil.example @someone '
           '\u2028\u2029\u202e\x00\x1b[31m\ud800 ```\n~~~\n# heading\n" onclick="window.hit=1" \' '
           'javascript:window.hit=1')
# Words of the view's own, which no run writes.
_KEPT = {'generated', 'level', 'resource', 'provenance', 'axis', 'half', 'of', 'source', 'what'}


def empty(*runs: str, group: str = '') -> dict[str, Any]:
  """A view of runs, (run) or (group/run), of which nothing is known."""
  view: dict[str, Any] = {name: [] for name in LISTS}
  view |= {'title': 'made up', 'generated': '2026-01-02 03:04 UTC',
           'comparison': {'target': None, 'baseline': None, 'rows': []},
           'beside': {'said': '', 'name': '', 'rows': []}}
  for seed, run in enumerate(runs or ('a',)):
    view['runs'].append({'run': run, 'group': run.partition('/')[0], 'seed': seed, 'workdir': f'/w/{run}',
                         'header': [['commit', 'abc'], ['data', run]]})
  return view


def hostile(view: dict[str, Any]) -> dict[str, Any]:
  """The view with HOSTILE behind every text that a run, a config or a model may have written."""
  view = copy.deepcopy(view)

  def spoil(x, name=''):
    if isinstance(x, dict):
      return {k: x[k] if k in _KEPT or k == 'name' and x.keys() & {'nats', 'ratio', 'tasks'} else spoil(x[k], k)
              for k in x}
    if isinstance(x, list):
      return [spoil(y, name) for y in x]
    return f'{x}{HOSTILE}' if isinstance(x, str) else x

  productive = [row['kind'] for row in view['goodput']]
  view = spoil(view)
  for row, kind in zip(view['goodput'], productive):
    row['kind'] = kind
  return view
