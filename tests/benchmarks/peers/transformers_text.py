"""What transformers makes of templates and tokenizers: for tests/benchmarks/published_text.py.

    PYTHON transformers_text.py REQUEST.json ANSWER.json

REQUEST: {'day': of strftime_now, 'tokens': special tokens by name, 'templates': {name: text}, 'chats': messages of
each chat, 'tokenizers': {name: directory}, 'texts'}. ANSWER: {'templates': {name: the text of each chat, or
{'refused': why}}, 'tokenizers': {name: {'texts': tokens of each, 'chats': tokens of each, null without template}}}.
"""

import datetime
import json
import pathlib
import sys

import transformers
from transformers.utils import chat_template_utils


def rendered(template: str, chat: list[dict[str, str]], tokens: dict[str, str]) -> str | dict[str, str]:
  try:
    return chat_template_utils.render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=True, **tokens)[0][0]
  except Exception as error:  # whatever a template raises
    return {'refused': f'{type(error).__name__}: {error}'}


def tokenized(path: str, texts: list[str], chats: list[list[dict[str, str]]]) -> dict[str, list]:
  made = transformers.PreTrainedTokenizerFast.from_pretrained(path)

  def chat(messages):
    try:
      return made.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception:  # no template, or one that refuses
      return None

  return {'texts': [made.encode(text, add_special_tokens=False) for text in texts], 'chats': list(map(chat, chats))}


def main() -> None:
  request = json.loads(pathlib.Path(sys.argv[1]).read_text())

  class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls.fromisoformat(request['day'])

  chat_template_utils.datetime = Day
  pathlib.Path(sys.argv[2]).write_text(json.dumps({
      'templates': {name: [rendered(template, chat, request['tokens']) for chat in request['chats']]
                    for name, template in request['templates'].items()},
      'tokenizers': {name: tokenized(path, request['texts'], request['chats'])
                     for name, path in request['tokenizers'].items()}}))


if __name__ == '__main__':
  main()
