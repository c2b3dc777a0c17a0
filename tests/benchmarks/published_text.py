"""Published chat templates and tokenizers: what we make of them, and what transformers does.

    .venv/bin/python -m tests.benchmarks.published_text --templates DIR --tokenizers DIR --parity=PYTHON [--json]

--templates has files NAME.jinja, --tokenizers directories with tokenizer.json. Each template writes a chat with a
system message and one without; the chat is equal to transformers', or refused with the reason, or different. Each
tokenizer reads a corpus, and chats where it has a template. PYTHON has the [parity] extra.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import shutil
import subprocess
import tempfile

from kr_jax.model import chat as chat_lib
from kr_jax.model import tokenizer as tokenizer_lib
from tests.benchmarks import machine
from tests.benchmarks import parity

TOKENS = {'bos_token': '<|endoftext|>', 'eos_token': '<|im_end|>'}
SYSTEM = 'Count well.'
MESSAGES = ('What is 12 + 34?', 'Löse x² − 4 = 0;\n\n  <b>zwei</b> Fälle, 1 < 2.',
            '数学 🙂\tfor i in range(10):\n    pass')


def of_template(template: str, path: pathlib.Path, system: str, theirs: str | dict[str, str]) -> tuple[str, str]:
  """'equal', 'refused' or 'different', and why."""
  (path / 'chat_template.jinja').write_text(template)
  messages = [{'role': 'system', 'content': SYSTEM}] * bool(system) + [{'role': 'user', 'content': MESSAGES[0]}]
  try:
    tokenizer_lib.Subwords(path, system=system)
    ours = chat_lib.render(chat_lib.read(template), messages, TOKENS)
  except ValueError as error:
    why = str(error).removeprefix(f'{path}: ')
    return 'refused', f'{why}; transformers: {theirs["refused"] if isinstance(theirs, dict) else "writes a chat"}'
  return ('equal', '') if ours == theirs else ('different', f'{ours!r} where transformers writes {theirs!r}')


def of_tokenizer(path: pathlib.Path, texts: list[str], systems: list[str], theirs: dict[str, list]
                 ) -> dict[str, list[int]]:
  """[equal, all] of texts and chats."""
  bare = tokenizer_lib.Subwords(path, chat=False)
  found = {'texts': [sum(list(bare.encode(text)) == x for text, x in zip(texts, theirs['texts'])), len(texts)]}
  known = [(x, system, message) for x, (system, message) in zip(
      theirs['chats'], ((system, message) for system in systems for message in MESSAGES)) if x is not None]
  chats = {system: tokenizer_lib.Subwords(path, system=system) for system in {system for _, system, _ in known}}
  found['chats'] = [sum(list(chats[system].prompt(message)) == x for x, system, message in known), len(known)]
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--templates', type=pathlib.Path, required=True)
  parser.add_argument('--tokenizers', type=pathlib.Path, required=True)
  parser.add_argument('--parity', required=True, help='interpreter of an environment with transformers')
  parser.add_argument('--lines', type=int, default=500, help='of the corpus')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  templates = {path.stem: path.read_text() for path in sorted(args.templates.glob('*.jinja'))}
  paths = {path.parent.name: path.parent for path in sorted(args.tokenizers.glob('*/tokenizer.json'))}
  texts, systems = [*MESSAGES, *parity.corpus(args.lines)], ['', SYSTEM]
  chats = [[{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': message}]
           for system in systems for message in MESSAGES]
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    (root / 'request.json').write_text(json.dumps({
        'day': chat_lib.program.DAY.isoformat(), 'tokens': TOKENS, 'templates': templates, 'chats': chats,
        'tokenizers': {name: str(path) for name, path in paths.items()}, 'texts': texts}))
    peer = pathlib.Path(__file__).parent / 'peers' / 'transformers_text.py'
    subprocess.run([args.parity, peer, root / 'request.json', root / 'answer.json'], check=True)
    theirs = json.loads((root / 'answer.json').read_text())
    tiny = shutil.copytree(parity.FIXTURES / 'llama', root / 'tiny')
    renderings = {
        f'{name}, {"with" if system else "without"} a system message': of_template(
            template, tiny, system, theirs['templates'][name][i * len(MESSAGES)])
        for name, template in templates.items() for i, system in enumerate(systems)}
  found = {
      'machine': machine.describe(), 'templates': len(templates),
      'renderings': dict(collections.Counter(kind for kind, _ in renderings.values())),
      'not_equal': {name: ': '.join(x) for name, x in renderings.items() if x[0] != 'equal'},
      'tokenizers': {name: of_tokenizer(path, texts, systems, theirs['tokenizers'][name])
                     for name, path in paths.items()}}
  if args.json:
    print(json.dumps(found))
    return
  for name, why in found['not_equal'].items():
    print(f'{name}: {why}')
  print(f'{len(templates)} templates, {len(renderings)} renderings: {found["renderings"]}')
  for name, x in found['tokenizers'].items():
    print(f'{name}: equal are {x["texts"][0]} of {x["texts"][1]} texts, {x["chats"][0]} of {x["chats"][1]} chats')


if __name__ == '__main__':
  main()
