"""The letter that a completion marks: other words than a policy would use are not a choice."""

import time

import pytest

from kr_jax import types
from kr_jax.rewards import choice
from kr_jax.rewards import verdicts

BEFORE = 'Let us see: A is near, and C does not fit.\n\n'


def task_of(answer: str) -> types.Task:
  return types.Task(id='made/0', index=0, prompt='', answer=answer, difficulty=1, solution='', tokens=(2,))


@pytest.mark.parametrize('phrase', [
    'The answer is {}', 'The correct answer is {}.', 'The correct option is {}.', 'The best choice is: {}',
    '**Answer:** {}', 'FINAL ANSWER: {}', 'Hence the answer would be option {}', 'So I choose {}', '### Answer\n{}',
    'Answer:\n\n{}', '<answer>{}</answer>', '<answer>\nThe answer is {}\n</answer>', '#### {}', '{{"answer": "{}"}}',
    'Option {} is correct.', 'Therefore, {} is the right choice.', '{}', '\\boxed{{10^{{-4}}}}, so the answer is {}',
    '\\boxed{{}}\n\n{}', '<answer>10 eV</answer> which is option {}', 'The answer is {}: \\boxed{{5}}'])
def test_a_phrase_marks_a_letter(phrase):
  for letter in 'BD':
    for form in ('{}', '({})', '**{}**', '"{}"', '$\\text{{{}}}$', '\\mathsf{{{}}}', '{{\\rm {}}}', '[{}]', '__{}__'):
      assert choice.answer(BEFORE + phrase.format(form.format(letter))) == letter, form


@pytest.mark.parametrize('inside', [
    '{}', '({})', r'\text{{{}}}', r'\textsf{{{}}}', r'\ {}\ ', r'\,{}\,', '{}: text', '{} - text', '{} – text',
    '{}. text', '{})~10^{{-4}}', r'\text{{{}}}. 10^{{-4}} \text{{ eV}}', r'\text{{Option {}}}', r'{{{}}}',
    r'\left({}\right)',
    r'\text{{({}) The field}}', '{} because it is', '{}, since it is', r'{} \quad 5', 'The answer is {}'])
def test_a_box_or_tag_holds_a_letter_and_text(inside):
  for around in ('{}', 'So ${}$.\nA further note: A and D are off.', r'\boxed{{C}} at first, but {}',
                 '<answer>{}</answer>', '<answer>A is near, but it is {}.</answer>'):
    assert choice.answer(BEFORE + around.format(r'\boxed{' + inside.format('E') + '}')) == 'E', around
  assert choice.answer(f'{BEFORE}<answer>{inside.format("E")}</answer>') == 'E'


@pytest.mark.parametrize('several', [
    '{} or {}', '({}) or ({})', '{} and {}', '{}, {}', '({}), ({})', '{}/{}', '{}) {})', '({}) ({})', '{}. {}.',
    'either {} or {}', 'both ({}) and ({})', r'\text{{{}}} \text{{ or }} \text{{{}}}', '[{}] and [{}]', '{} & {}'])
def test_several_letters_are_no_choice_but_an_answer(several):
  for a, b in ('AB', 'DC'):
    for phrase in (r'\boxed{{{}}}', 'The answer is {}.', '<answer>{}</answer>', '### Answer\n{}', '{}'):
      text = phrase.format(several.format(a, b))
      assert choice.answer(text) is None, text
      assert choice.verify(text, task_of(a)) == verdicts.Verdict(False), text


@pytest.mark.parametrize('text', [
    '', 'I cannot tell the answer.', 'Actually, it is hard.', 'A riddle', 'The answer is a riddle.', 'Error: no reply',
    'The answer is not B.', 'The wrong answer is A.', 'Option A is wrong', 'The answer is 5', 'C-14 tells the age',
    r'\boxed{10^{-4}}', r'\boxed{\text{None}}', r'\boxed{E = mc^2}', r'\boxed{AB}', r'\boxed{A + B}',
    'The answer is Bo', 'If B is correct, then D is not.', 'A and its inverse', 'Vitamin C', 'i.e. nothing',
    'A (small) part', 'A is near.'])
def test_no_letter(text):
  for before in ('', 'We see.\n'):
    assert choice.verify(before + text, task_of('B')) == verdicts.Verdict(False, answered=False)


def test_a_verdict_and_the_task_s_letter():
  assert choice.verify('The answer is B.', task_of('(B)')) == verdicts.Verdict(True)
  assert choice.verify('The answer is B.</think> It is C.\n\n(D)', task_of('B. 5 m')) == verdicts.Verdict(False)
  assert choice.answer('The answer is B.</think> I am unsure') is None
  choice.check([task_of('B'), task_of('D) a comet')])
  for bad in ('none', '', 'A or B', '7'):
    for use in (lambda task: choice.verify('B', task), lambda task: choice.check([task_of('B'), task])):
      with pytest.raises(ValueError, match=f"the answer '{bad}' of made/0 is not the letter of a choice"):
        use(task_of(bad))


@pytest.mark.parametrize('piece', [
    'answer is ', 'A or ', '<answer>', r'\boxed{', r'\boxed{A} ', 'if A is ', 'answer\n', '\n', ' ', '**answer ',
    '(A) '])
def test_time_grows_with_the_length_alone(piece):
  text = piece * (100_000 // len(piece))
  start = time.process_time()
  choice.answer(text + '}' * 20_000)
  assert time.process_time() - start < 2
