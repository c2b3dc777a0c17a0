r"""Answers -> rewritings that mean the same, near misses that do not, and a judge of which is which.

A variant is a function of (answer, random.Random) that returns the new text, or None where it does not apply. Texts
are LaTeX as data sets publish it, inside of no `$` and no \boxed. The judge, `differ`, reads formulas by a parser of
its own and shares nothing with kr_jax.rewards.
"""

from __future__ import annotations

from collections.abc import Callable
import random
import re

from tests.benchmarks import formulas

Variant = Callable[[str, random.Random], str | None]

_NUMBER = r'-?\d+(?:\.\d+)?'
_FRACTION = r'-?\\[dt]?frac\{\d+\}\{\d+\}'
_END = r'(?![a-zA-Z])'  # of a control word
_UNIT = (rf'({_NUMBER}|{_FRACTION})\s*\\(?:text|mathrm|mbox)\{{\s*((?!and|or|to|mod|dozen|hundred|thousand|million|'
         r'billion|trillion|factorial|pm|am|[ap]\.m|base)[a-z]{2,}(?: [a-z]{2,})*)\s*\}(\^\{?[23]\}?|)')
_MONEY = r'\\?\$(\d[\d,]*(?:\.\d+)?)'
_TENS = r'([1-9])(0{5,})'


def is_formula(text: str) -> bool:
  """Whether a text has no words and no number as 1e-8, so that its spaces mean nothing."""
  return not re.search(
      r'\\(?:text|mathrm|mbox|textbf|operatorname|begin|quad)|\\ |(?<![\\a-zA-Z])[a-zA-Z]{2,}|\de[+-]?\d', text)


def is_value(text: str) -> bool:
  """Whether a text is one formula: no relation, list or word."""
  return is_formula(text) and not re.search(
      r'[=<>,;:|$]|\\(?:l|g|n)eq?q?(?![a-zA-Z])|\\(?:in|pm|mp|cup|to|ldots)(?!\w)', text)


def _substitution(pattern: str, to: str | Callable[[re.Match[str]], str],
                  where: str | Callable[[str], bool] = '') -> Variant:
  """Replaces a pattern in texts that `where`, a regex of whole texts or a test, lets pass."""
  passes = where if callable(where) else lambda text: not where or re.fullmatch(where, text)

  def substitute(text: str, _: random.Random) -> str | None:
    new = re.sub(pattern, to, text) if passes(text) else text
    return new if new != text else None

  return substitute


def _whole(pattern: str, *forms: str | Callable[[re.Match[str]], str | None]) -> Variant:
  """One of the forms, templates or functions of the match, for texts that match as a whole."""

  def write(text: str, rng: random.Random) -> str | None:
    found = re.fullmatch(pattern, text)
    form = rng.choice(forms)
    new = found and (form(found) if callable(form) else found.expand(form))
    return new if new != text else None

  return write


def _grouped(separator: str) -> Callable[[re.Match[str]], str]:
  return lambda found: f'{int(found[0]):,}'.replace(',', separator)


def _decimal(found: re.Match[str]) -> str | None:
  """The decimal of a fraction whose digits end."""
  sign, top, bottom = found[1], int(found[2]), int(found[3])
  places = next((k for k in range(7) if bottom and top * 10 ** k % bottom == 0), None)
  if not places:
    return None
  digits = str(top * 10 ** places // bottom).rjust(places + 1, '0')
  return f'{sign}{digits[:-places]}.{digits[-places:]}'


def _mixed(found: re.Match[str]) -> str | None:
  top, bottom = int(found[2]), int(found[3])
  whole, rest = divmod(top, bottom) if bottom else (0, 0)
  return rf'{found[1]}{whole}\frac{{{rest}}}{{{bottom}}}' if whole and rest else None


def _of_100(found: re.Match[str]) -> str:
  digits = found[1].replace('.', '').rjust(5, '0')
  point = len(digits) - len(found[1].partition('.')[2]) - 2
  return f'{int(digits[:point] or 0)}.{digits[point:]}'


def reversed_parts(text: str, _: random.Random) -> str | None:
  r"""The elements of \{a, b\} or of a list `a, b` without brackets, backwards."""
  inside = re.fullmatch(r'\\\{(.*)\\\}', text)
  if re.search(r'\\ldots|\||\\mid|\\!|\$|\.$', text) or not is_formula(text):
    return None
  parts = formulas.split(inside[1] if inside else text, ',')
  joined = ', '.join(reversed(parts))
  if len(parts) < 2 or re.search(r'\d,\d{3}(?!\d)', text) or joined == ', '.join(parts):
    return None
  return rf'\{{{joined}\}}' if inside else joined


def reversed_sum(text: str, _: random.Random) -> str | None:
  """The terms of a sum, backwards."""
  if not is_value(text) or not re.fullmatch(r'[\w\s+\-^{}\\()*]+', text) or not re.search(r'[a-z\\]', text):
    return None
  if re.search(r'\\(?:max|min|sup|inf|lim|sum|prod|int)(?![a-zA-Z])', text):  # how far do they reach?
    return None
  terms = formulas.split(re.sub(r'(?<=[\w})])\s*-', '+-', text), r'\+')
  return '+'.join(reversed(terms)).replace('+-', '-') if len(terms) > 1 and all(terms) else None


def sized(text: str, _: random.Random) -> str | None:
  r"""Brackets around the whole as \left( ... \right)."""
  found = re.fullmatch(r'([(\[])([^()\[\]]*)([)\]])', text)
  return rf'\left{found[1]} {found[2]} \right{found[3]}' if found and '\\right' not in text else None


def named(text: str, rng: random.Random) -> str | None:
  free = [x for x in 'xnkS' if x not in text]
  return f'{rng.choice(free)} = {text}' if is_value(text) and free else None


_FRAC = r'(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}'
REWRITINGS: dict[str, Variant] = {
    'dfrac': _substitution(rf'\\frac{_END}', r'\\dfrac'), 'tfrac': _substitution(rf'\\frac{_END}', r'\\tfrac'),
    'frac without braces': _substitution(r'\\frac\{(\d)\}\{(\d)\}', r'\\frac\1\2'),
    'spaced frac': _substitution(r'\\frac\{', r'\\frac {'),
    'slash': _whole(_FRAC, r'\1\2/\3'), 'frac of slash': _whole(r'(-?)(\d+)/(\d+)', r'\1\\frac{\2}{\3}'),
    'minus in the numerator': _whole(_FRAC.replace('-?', '-'), r'\\frac{-\2}{\3}', r'\\frac{\2}{-\3}'),
    'unreduced': _whole(_FRAC, lambda x: rf'{x[1]}\frac{{{2 * int(x[2])}}}{{{2 * int(x[3])}}}'),
    'decimal of a fraction': _whole(_FRAC, _decimal), 'mixed number': _whole(_FRAC, _mixed),
    'fraction of a decimal': _whole(r'(-?)(\d+)\.(\d+)', lambda x: (
        rf'{x[1]}\frac{{{int(x[2] + x[3])}}}{{{10 ** len(x[3])}}}')),
    'spaces around signs': _substitution(r'(?<=[\w})!])\s*([-+=])\s*(?=[\w\\({])', r' \1 ', is_formula),
    'no spaces': _substitution(r'(?<=[^a-zA-Z\\\s])\s+|\s+(?![a-zA-Z\s])', '', lambda text: (
        is_formula(text) and not re.search(r'\d\s+\d|\d,\s+\d{3}(?!\d)|\\\\', text))),
    'spaces in brackets': _whole(r'([(\[])([^()\[\]]*),([^()\[\]]*)([)\]])', r'\1 \2 , \3 \4'),
    'left and right': sized,
    'no left and right': _substitution(r'\\(?:left|right)(?=\s*(?:[()\[\]]|\\[{}]))', ''),
    'zeros': _whole(r'-?[1-9]\d{0,3}(\.\d+)?', lambda x: x[0] + ('0' if x[1] else '.0')),
    'thousands': _whole(r'-?[1-9]\d{3,}', *map(_grouped, (',', '{,}', r'\,', r',\!'))),
    'no thousands': _substitution(r'\{,\}|,(?:\\!)?\s*', '', r'-?[1-9]\d{0,2}(?:(?:\{,\}|,(?:\\!\s*)?)\d{3})+'),
    'dollars': _whole(r'[^$]+', r'$\g<0>$', r'$$\g<0>$$', r'\\(\g<0>\\)'), 'no dollars': _whole(r'\$([^$]+)\$', r'\1'),
    'text': _whole(r'[A-Za-z]{3,}(?: [A-Za-z]+)*', r'\\text{\g<0>}', r'\\textbf{\g<0>}', r'\\text{ \g<0> }'),
    'no text': _whole(r'\\(?:text|textbf|mbox)\{([A-Za-z ]+)\}', r'\1'),
    'text of a number': _whole(r'-?\d+', r'\\text{\g<0>}', r'\\mathbf{\g<0>}', r'\\mathrm{\g<0>}'),
    'reversed elements': reversed_parts, 'reversed sum': reversed_sum, 'name': named,
    'no name': _whole(r'([a-zA-Z])\s*=\s*([^=,;]*\d)', r'\2'),
    'unicode minus': _substitution('-', '−', is_formula), 'unicode pi': _substitution(rf'(?<!\\)\\pi{_END}', 'π'),
    'unicode infinity': _substitution(rf'\\infty{_END}', '∞'), 'unicode cup': _substitution(rf'\\cup{_END}', '∪'),
    'unicode root': _substitution(r'\\sqrt\{(\d+)\}(?![\w\\])', r'√\1'),
    'unicode square': _substitution(r'(?<=[a-z])\^2(?!\d)|(?<=[a-z])\^\{2\}', '²'),
    'unicode order': _substitution(rf'\\leq?{_END}', '≤', is_formula),
    'leq': _substitution(rf'\\(l|g)e{_END}', r'\\\1eq'), 'le': _substitution(rf'\\(l|g)eq{_END}', r'\\\1e'),
    'times': _substitution(rf'(?<=[\d}}])\s*\\cdot{_END}(?=\s*[\d(])', r' \\times ', is_formula),
    'cdot': _substitution(rf'(?<=[\d}}])\s*\\times{_END}(?=\s*[\d(])', r' \\cdot', is_formula),
    'star': _substitution(rf'(?<=[\d}}])\s*\\cdot{_END}(?=\s*[\d(])', '*', is_formula),
    'explicit product': _substitution(r'(?<![\d^_.])(\d+)(?=[a-z](?![a-z]))', r'\1\\cdot ', lambda text: (
        is_formula(text) and re.fullmatch(r'[\da-z+\-^{}\s]+', text))),
    'degrees': _whole(r'(-?[\d.]+)\s*\^\s*\{?\s*\\circ\s*\}?', r'\1', r'\1°', r'\1 degrees', r'\1^{\\circ}',
                      r'\1\\degree', r'\1\\text{ degrees}', r'\1^\\circ'),
    'percent': _whole(r'(\d+(?:\.\d+)?)\s*\\?%', r'\1', r'\1%', r'\1 \\%', r'\1 percent', r'\1\\text{ percent}',
                      _of_100),
    'no unit': _whole(_UNIT, r'\1'), 'plain unit': _whole(_UNIT, r'\1 \2\3'),
    'unit in mathrm': _substitution(r'\s*\\(?:text|mbox)\{\s*([a-z]+)\s*\}', r'~\\mathrm{\1}', _UNIT),
    'money': _whole(_MONEY, r'\1', r'\\$\1', r'$\1', r'\1 dollars', r'\1\\text{ dollars}'),
    'root without braces': _substitution(r'\\sqrt\{(\d)\}', r'\\sqrt\1'),
    'plain root': _whole(r'(-?\d*)\\sqrt\{(\d+)\}', lambda x: f'{x[1]}{"*" * x[1].isdigit()}sqrt({x[2]})'),
    'root before its factor': _whole(r'(\d+)\\sqrt\{(\d+)\}', r'\\sqrt{\2} \\cdot \1', r'\\sqrt{\2}\\cdot\1'),
    'factor in the root': _whole(r'(\d+)\\sqrt\{(\d+)\}', lambda x: rf'\sqrt{{{int(x[1]) ** 2 * int(x[2])}}}'),
    'no zero in front': _whole(r'(-?)0(\.\d+)', r'\1\2'), 'approximately': _whole(r'-?\d+\.\d+', r'\\approx \g<0>'),
    'wide digits': _whole(r'\d+', lambda x: x[0].translate({ord('0') + i: ord('\uff10') + i for i in range(10)})),
    'unicode power of ten': _whole(r'([\d.]+)\s*\\times\s*10\^\{?(-?\d+)\}?', lambda x: (
        f'{x[1]}×10{x[2].translate(dict(zip(map(ord, "-0123456789"), "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")))}')),
    'style': _whole(rf'{_NUMBER}|{_FRACTION}', *(form.replace('ANSWER', r'\g<0>') for form in (
        r'\\large ANSWER', r'\\color{blue}ANSWER', r'\\textcolor{red}{ANSWER}', r'\\underline{ANSWER}',
        r'\\boldsymbol{ANSWER}', r'\\displaystyle ANSWER', r'\\framebox{ANSWER}', r'{\\Large ANSWER}'))),
    'inequality': _whole(r'\((-?[\w\\{}]+),\s*(?:\\infty|\+\\infty)\)', r'x > \1', r'\1 < x'),
    'membership': _whole(r'[(\[]([^()\[\]]*),([^()\[\]]*\\infty\)|[^()\[\]]*\])', r'x \\in \g<0>'),
    'and': _whole(r'([^,()\[\]]+?),\s*([^,()\[\]]+)', lambda x: (
        rf'{x[1]} \text{{ and }} {x[2]}'
        if is_formula(x[0]) and not re.search(r',\s*\d{3}(?!\d)|[{$]|\\!', x[0]) else None)),
    'sign': _whole(r'[1-9]\d*', r'+\g<0>'), 'sum': _whole(r'[2-9]|[1-9]\d+', lambda x: f'{int(x[0]) - 1} + 1'),
    'exponent in braces': _substitution(r'\^([a-zA-Z\d])(?!\d)', r'^{\1}'),
    'exponent without braces': _substitution(r'\^\{(\w)\}(?!\w)', r'^\1'),
    'subscript in braces': _substitution(r'_([a-zA-Z\d])(?!\w)', r'_{\1}'),
    'subscript without braces': _substitution(r'_\{(\w)\}(?!\w)', r'_\1'),
    'scientific': _whole(_TENS, lambda x: rf'{x[1]} \times 10^{{{len(x[2])}}}', lambda x: f'{x[1]}e{len(x[2])}'),
    'bmatrix': _substitution('pmatrix', 'bmatrix'),
}


def _formatted(form: str, where: Callable[[str], bool] = lambda text: True) -> Callable[[str], str | None]:
  return lambda text: form.replace('ANSWER', text) if where(text) else None


_one_line = lambda text: '\n' not in text and '$' not in text
_sentence = lambda text: _one_line(text) and '. ' not in text
# How a completion marks its answer: answer -> completion, or None where the mark does not suit the answer.
MARKS: dict[str, Callable[[str], str | None]] = {
    'box in dollars': _formatted(r'Therefore, it is $\boxed{ANSWER}$.'),
    'box in a display': _formatted('Hence\n\\[\n\\boxed{ANSWER}\n\\]'), 'spaced box': _formatted(r'\boxed{ ANSWER }'),
    'full stop in the box': _formatted(r'\boxed{ANSWER.}'),
    'two boxes': _formatted('It was \\boxed{1}.\n\nNo: \\boxed{ANSWER}'),
    'after thoughts': _formatted('<think>\\boxed{17}?</think>\nIt is \\boxed{ANSWER}.'),
    'hashes': _formatted('We add.\n#### ANSWER', _one_line), 'tag': _formatted('<answer> ANSWER </answer>'),
    'answer is': _formatted('We add.\nThe answer is $ANSWER$.', _sentence),
    'hope': _formatted('Final Answer: The final answer is $ANSWER$. I hope it is correct.', _sentence),
    'words behind': _formatted('We add.\nThe answer is ANSWER, altogether.', lambda text: text.isdigit()),
    'bold answer': _formatted('**Answer:** $ANSWER$', _sentence),
    'all bold': _formatted('**Answer: ANSWER**', _sentence),
}



def box_each(text: str) -> str | None:
  """A box for each element of a list."""
  parts = formulas.split(text, ',') if is_formula(text) and not re.search(r'\d,\s*\d{3}(?!\d)|\\!|\$', text) else []
  boxes = [rf'$\boxed{{{part}}}$' for part in parts]
  return f'The roots are {", ".join(boxes[:-1])} and {boxes[-1]}.' if len(parts) > 1 and all(parts) else None


MARKS['a box for each element'] = box_each

_SPACES = r'\,', r'\;', r'\:', '\\ '
_PHYSICAL = ('J', 'N', 'V', 'W', 'K', r'\Omega', r'm\,s^{-1}', r'kg \cdot m/s^2')
_STYLES = '{0} {1}', r'{0}\ {1}', r'{0}\,\mathrm{{{1}}}', r'{0}~\mathrm{{{1}}}', r'{0}\text{{ {1}}}'


def with_unit(text: str, rng: random.Random) -> str | None:
  if not re.fullmatch(rf'{_NUMBER}|{_FRACTION}', text):
    return None
  unit = rng.choice(_PHYSICAL)
  return rng.choice(_STYLES if '\\' not in unit else _STYLES[:4]).format(text, unit)


def spaced(text: str, rng: random.Random) -> str:
  space, end = rng.choice(_SPACES), rng.randrange(3)
  return f'{space * (end != 0)}{text}{space * (end != 1)}'


# The forms that were refused most: answer -> completion.
BAD_FORMS: dict[str, Variant] = {
    'sentence with a box in the tag': lambda text, rng: rng.choice((
        '<answer>The remainder is \\(\\boxed{ANSWER}\\).</answer>',
        '<think>We add.</think>\n<answer>\nAll in all:\n\n**Final answer:** $\\boxed{ANSWER}$\n</answer>',
        '<answer>Thus the value is $\\boxed{ANSWER}$, as was to be found.</answer>')).replace('ANSWER', text),
    'box in the tag': lambda text, rng: rng.choice((
        '<answer>\\boxed{ANSWER}</answer>', '<answer>$\\boxed{ANSWER}$</answer>',
        '<answer>\n\\[\\boxed{ANSWER}\\]\n</answer>')).replace('ANSWER', text),
    'LaTeX spaces': lambda text, rng: rf'\boxed{{{spaced(text, rng)}}}',
    'braces': lambda text, rng: rf'\boxed{{{{{text}}}}}',
    'units': lambda text, rng: (new := with_unit(text, rng)) and rf'\boxed{{{new}}}',
}


def other_digit(text: str, rng: random.Random) -> str | None:
  places = [found.start() for found in re.finditer(r'\d', text)]
  if not places:
    return None
  at = rng.choice(places)
  return text[:at] + rng.choice([x for x in '123456789' if x != text[at]]) + text[at + 1:]


def other_sign(text: str, _: random.Random) -> str | None:
  return (text[1:] if text.startswith('-') else f'-{text}') if is_value(text) else None


def _with_parts(change: Callable[[list[str], random.Random], list[str] | None]) -> Variant:
  """Changes the elements of a list, a set or a tuple."""

  def write(text: str, rng: random.Random) -> str | None:
    start, inside, end = re.fullmatch(r'(\\\{|[(\[]|)(.*?)(\\\}|[)\]]|)', text, re.DOTALL).groups()
    parts = formulas.split(inside, ',') if is_formula(text) and not re.search(r'\d,\d{3}(?!\d)|\$|\\!', text) else []
    if len(parts) < 2 or bool(start) != bool(end):
      return None
    new = change(parts, rng)
    return f'{start}{", ".join(new)}{end}' if new and new != parts else None

  return write


def other_case(text: str, rng: random.Random) -> str | None:
  """One letter of a formula in the other case, not a lone one, which may name a choice, nor a unit."""
  places = [x.start() for x in re.finditer(r'(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])', text)]
  if not places or not is_value(text) or len(text) < 3 or re.fullmatch(
      rf'(?:{_NUMBER}|{_FRACTION}|)\s*\(?\w\)?', text):
    return None
  at = rng.choice(places)
  return text[:at] + text[at].swapcase() + text[at + 1:]


_CLOSED = {'(': '[', '[': '(', ')': ']', ']': ')'}
_HEDGES = ('{0} or {1}', r'{0} \text{{ or }} {1}', r'{0}, {1}', r'{0} \pm 1', 'not {0}', r'\ne {0}', '{0} factorial',
           '{0}!', r'\sqrt{{{0}}}', '{0}^2', '{0}^{{-1}}', '2x = {0}', 'x^2 = {0}', 'x > {0}', '{0}x', r'{0}\pi',
           '{0} dozen', '{0} million', '{0} squared', '{0} halves', '{0} thousandths', '{0}:{1}', r'\log {0}',
           '{0} or more', '{0} is not the answer', r'{0}\infty', '{0}i', '{1} = {0}', 'at most {0}', 'less than {0}',
           '{0} and a half', '{0} thirds', '{0} dozens', '{0} choose 2', '{0} + c', '({0}, {1})', '[{0}, {1}]',
           r'\{{{0}, {1}\}}', '{0} < x < {1}', r'\frac{{{0}}}{{{1}}}', '{0} plus n',
           'neither {0} nor {1}', '{0}n = {1}')


def hedged(text: str, rng: random.Random) -> str | None:
  """A number and something that makes it another answer."""
  if not re.fullmatch(r'[3-9]|[1-9]\d+', text):
    return None
  return rng.choice(_HEDGES).format(text, int(text) + rng.randint(1, 9))


_OTHER_UNITS = ('km', 'kg', 'seconds', 'cm', 'liters', 'mm', 'hours', 'miles', 'grams', 'dollars', 'degrees')


def other_unit(text: str, rng: random.Random) -> str | None:
  found = re.fullmatch(rf'({_NUMBER})\s*\\(?:text|mathrm|mbox)\{{\s*(cm|m|km|inches|feet|hours|minutes|seconds|miles|'
                       r'meters|grams|kg|dollars|cents)\s*\}', text)
  choices = [x for x in _OTHER_UNITS if found and x[:2] != found[2][:2] and (found[2], x) != ('cents', 'dollars')]
  return rf'{found[1]}\text{{ {rng.choice(choices)}}}' if found and float(found[1]) else None


NEAR_MISSES: dict[str, Variant] = {
    'another digit': other_digit, 'another sign': other_sign, 'another case': other_case, 'hedged': hedged,
    'another unit': other_unit,
    'another exponent': _substitution(r'\^(\d)(?!\d)|\^\{(\d)\}', lambda x: f'^{{{int(x[1] or x[2]) + 1}}}', is_value),
    'another operation': _substitution(r'(?<=[\w})])(\s*)([-+])', lambda x: x[1] + '+-'[x[2] == '+'], is_value),
    'another function': _substitution(rf'\\(sin|cos){_END}', lambda x: '\\' + {'sin': 'cos', 'cos': 'sin'}[x[1]]),
    'another radicand': _substitution(r'\\sqrt\{(\d+)\}', lambda x: rf'\sqrt{{{int(x[1]) + 1}}}', is_value),
    'inverted fraction': _whole(_FRAC, lambda x: rf'{x[1]}\frac{{{x[3]}}}{{{x[2]}}}' if x[2] != x[3] else None),
    'ten times': _whole(r'-?[1-9]\d*(?:\.\d+)?', lambda x: x[0] + '0' if '.' not in x[0] else re.sub(
        r'\.(\d)(?=\d)', r'\1.', x[0]) if re.search(r'\.\d\d', x[0]) else x[0].replace('.', '')),
    'a tenth': _whole(r'-?[1-9]\d*', lambda x: f'{x[0][:-1] or 0}.{x[0][-1]}'.replace('-.', '-0.')),
    'element changed': _with_parts(lambda parts, rng: (
        i := rng.randrange(len(parts)), new := other_digit(parts[i], rng)) and new and [
            *parts[:i], new, *parts[i + 1:]]),
    'element dropped': _with_parts(lambda parts, rng: parts[:-1] if len(parts) > 2 else None),
    'element added': _with_parts(lambda parts, rng: [*parts, str(rng.randint(1001, 1999))]),
    'elements swapped': lambda text, rng: _with_parts(lambda parts, rng: [parts[1], parts[0], *parts[2:]])(
        text, rng) if text[:1] in ('(', '[') else None,
    'another bracket': _whole(r'([(\[])([^()\[\],]*),([^()\[\],]*)([)\]])', lambda x: (
        f'{_CLOSED[x[1]]}{x[2]},{x[3]}{x[4]}' if formulas.differ(x[2], x[3]) else None), lambda x: (
        f'{x[1]}{x[2]},{x[3]}{_CLOSED[x[4]]}' if formulas.differ(x[2], x[3]) else None)),
    'another order': _substitution(r'<|>', lambda x: {'<': r'\ge ', '>': r'\le '}[x[0]], is_formula),
    'closed order': _substitution(r'<|>', lambda x: {'<': r'\le ', '>': r'\ge '}[x[0]], is_formula),
}
# Near misses that differ from their answer by the way they are made; `differ` decides on the others.
MADE_TO_DIFFER = ('hedged', 'another unit', 'another bracket', 'another order', 'closed order')
