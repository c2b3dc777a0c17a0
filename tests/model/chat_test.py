"""Chat templates."""

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
