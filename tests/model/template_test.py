"""The program that runs chat templates, in this process; what it takes in its own is tests/model/chat_test.py."""

import io

import pytest

from kr_jax.model import template


def test_messages_between_processes():
  """Any text, and half a message is none."""
  pipe = io.BytesIO()
  template.send(pipe, {'text': 'ü\ud800\n'})
  whole = pipe.getvalue()
  assert template.receive(io.BytesIO(whole)) == {'text': 'ü\ud800\n'}
  assert [template.receive(io.BytesIO(whole[:n])) for n in (0, 3, 8, len(whole) - 1)] == [None] * 4


@pytest.mark.parametrize('request_, reply', [
    ({'template': '{{ x }}'}, {'text': ''}),  # it is compiled alone
    ({'template': '{{ x }}', 'variables': {'x': 'a'}}, {'text': 'a'}),
    ({'template': '{% for'}, {'broken': "unexpected 'end of template'"}),
    ({'template': '{{ x.y }}', 'variables': {}}, {'fails': "'x' is undefined"}),
    ({'template': '{% include "/etc/passwd" %}', 'variables': {}},
     {'fails': 'no loader for this environment specified'})])
def test_replies(request_, reply):
  assert template.answer(request_) == reply


def test_a_text_that_grows_is_not_written_to_its_end(monkeypatch):
  monkeypatch.setattr(template, 'MOST_CHARACTERS', 100)
  endless = '{% for i in range(99999) %}{% for j in range(99999) %}{{ "ab" }}{% endfor %}{% endfor %}'
  assert template.answer({'template': endless, 'variables': {}}) == {'fails': 'it writes more than 100 characters'}
