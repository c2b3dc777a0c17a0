"""Chat templates."""

import pathlib

import pytest

from kr_jax.model import chat

USER = [{'role': 'user', 'content': 'A'}, {'role': 'user', 'content': 'B'}]


def written(template, messages=USER, **options):
  return chat.render(chat.read(template), messages, {'bos_token': '<s>'}, **options)


@pytest.mark.parametrize('template, text', [
    # An assistant's part is only marked; what is set in it is set in it alone.
    ('{% generation %}x{% endgeneration %}', 'x'),
    ('{%- generation -%}\n  x\n {%- endgeneration -%}\n y', 'xy'),
    ('{% for m in messages %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}{% endfor %}', 'A1B2'),
    ('{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}', '21'),
    ('{% set ns = namespace(a=1) %}{% generation %}{% set ns.a = 2 %}{% endgeneration %}{{ ns.a }}', '2'),
    ('{{ {"b": "<ü> & \'"} | tojson }}', '{"b": "<ü> & \'"}'),
    ('{{ {"b": "ü"} | tojson(ensure_ascii=False) }}', '{"b": "ü"}'),
    ('{{ {"b": "ü"} | tojson(ensure_ascii=True) }}', '{"b": "\\u00fc"}'),
    ('{{ {"b": 1, "a": [1, 2]} | tojson(separators=(",", ":"), sort_keys=True) }}', '{"a":[1,2],"b":1}'),
    ('{{ [1] | tojson(indent=2) }}{{ [1] | tojson(false, 1) }}', '[\n  1\n][\n 1\n]'),
    # The same day on all days.
    ('{{ strftime_now("%d %b %Y") }}, {{ strftime_now("%Y-%m-%d %H:%M") }}', '26 Jul 2024, 2024-07-26 00:00'),
    # What transformers passes where there is nothing, and what it does not pass.
    ('{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}', 'TrueTrueTrue'),
    ('{{ enable_thinking is defined }}{{ date_string is defined }}', 'FalseFalse'),
    ('{{ bos_token }}{{ eos_token }}', '<s>'),
    ('{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}', 'B'),
    # White space of blocks.
    ('{% if true %}\n  a\n  {% endif %}\n  b', '  a\n  b')])
def test_what_a_template_writes(template, text):
  assert written(template) == text


def test_thinking_is_passed_where_it_is_set_alone():
  """A published default holds, which may be off."""
  template = ('{% if not enable_thinking is defined %}{% set enable_thinking = false %}{% endif %}'
              '{{ "think" if enable_thinking else "answer" }}')
  assert [written(template, thinking=x) for x in (None, True, False)] == ['answer', 'think', 'answer']
  assert written('{{ "think" if enable_thinking is not defined or enable_thinking }}') == 'think'


def test_the_beginning_of_an_answer_is_left_out():
  assert written('{{ add_generation_prompt }}', prompt=False) == 'False'


@pytest.mark.parametrize('template, named', [
    ('{% for', 'the chat template is broken: '),
    ('{% generation %}x', 'the chat template is broken: '),
    ('{% endgeneration %}', 'the chat template is broken: '),
    ('{{ x | nothing }}', "the chat template is broken: No filter named 'nothing'")])
def test_a_broken_template(template, named):
  with pytest.raises(ValueError, match=named):
    chat.read(template)


@pytest.mark.parametrize('template, named', [
    ('{{ raise_exception("no such role") }}', '^the chat template fails: no such role; .* set tasks.chat=False$'),
    ('{{ messages[0].content.__class__.__mro__ }}', 'unsafe'),
    ('{{ messages.append(1) }}', 'the chat template fails: '),
    ('{{ messages[0].update(role="x") }}', 'the chat template fails: '),
    ('{{ nothing.of.this }}', "the chat template fails: 'nothing' is undefined"),
    ('{{ 1 / 0 }}', 'the chat template fails: division by zero')])
def test_a_template_that_fails(template, named):
  with pytest.raises(ValueError, match=named):
    written(template)


@pytest.mark.parametrize('template, named', [
    ("{{ 'a' * 10 ** 12 }}", 'it takes more than 256 MiB'), ("{{ '%1000000000000d' % 1 }}", 'more than 256 MiB'),
    ('{% for i in range(10 ** 9) %}{% endfor %}', 'Range too big'),
    ('{% for i in range(99999) %}{{ "a" * 1000 }}{% endfor %}', 'it writes more than 8388608 characters'),
    ('{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}', 'recursion'),
    ("{% include '/etc/passwd' %}", 'no loader'), ("{% import 'os' as os %}", 'no loader'),
    ("{{ cycler.__init__.__globals__ }}", 'unsafe')])
def test_a_template_that_takes_too_much(template, named):
  """And the next one is rendered."""
  with pytest.raises(ValueError, match=f'the chat template fails: .*{named}'):
    written(template)
  assert written('{{ messages[0].content }}') == 'A'


@pytest.mark.slow  # it takes its seconds
def test_a_template_that_never_ends(monkeypatch):
  monkeypatch.setattr(chat.program, 'PROCESSOR_S', 1)
  chat._child.close()  # the next one has this limit
  loops = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
  with pytest.raises(ValueError, match='the chat template fails: it takes more than 1 s; change the template, or'):
    written(loops)
  assert written('{{ messages[0].content }}') == 'A'
  chat._child.close()


def test_a_template_sees_neither_files_nor_secrets(monkeypatch):
  """Its process gets no environment of ours, and ends with its pipes."""
  monkeypatch.setenv('HF_TOKEN', 'secret')
  child = chat._Child()
  assert child.ask({'template': 'x'}) == {'text': ''}
  process = child._process
  assert b'secret' not in pathlib.Path(f'/proc/{process.pid}/environ').read_bytes()
  child.close()
  assert process.returncode == 0 and child._process is None


def test_a_process_that_nobody_asks_ends_and_the_next_request_has_another(monkeypatch):
  monkeypatch.setattr(chat.program, 'IDLE_S', 0.01)
  child = chat._Child()
  assert child.ask({'template': 'x'}) == {'text': ''}
  first = child._process
  assert first.wait() == 0
  assert child.ask({'template': '{{ x', 'variables': {}}).keys() == {'broken'} and child._process is not first
  child.close()


def test_a_refused_system_message_comes_with_a_fix():
  template = '{% if messages[0].role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}x'
  assert written(template) == 'x'
  with pytest.raises(ValueError, match=r"System role not supported; .* tasks.system='' and put the text in tasks.tem"):
    written(template, [{'role': 'system', 'content': 'Hi'}, *USER])


@pytest.mark.parametrize('stored, chosen', [
    (None, None), ('', None), ([], None), ({}, None), ('x', 'x'),
    ([{'name': 'tool_use', 'template': 'y'}, {'name': 'default', 'template': 'x'}], 'x'),
    ({'default': 'x', 'rag': 'y'}, 'x'), ([{'name': 'chat', 'template': 'x'}], 'x')])
def test_the_template_of_several(stored, chosen):
  assert chat.choose(stored) == chosen


@pytest.mark.parametrize('stored, named', [
    ([{'name': 'tool_use', 'template': 'y'}, {'name': 'rag', 'template': 'x'}],
     r"the chat templates \['rag', 'tool_use'\], and none of them is named default; .*tasks.chat=False"),
    ([{'name': 'default'}], 'neither a text nor texts by name'), (5, 'neither a text'), (['x'], 'neither a text'),
    ({'default': None}, 'neither a text'), ([{'name': ['x'], 'template': 'y'}], 'neither a text')])
def test_templates_of_another_form(stored, named):
  with pytest.raises(ValueError, match=named):
    chat.choose(stored)
