"""Whether answers are the same: a corpus, kinds of notation by hand, and what must not hang."""

import json
import time

import pytest

from kr_jax import answers
from tests import make_verifier_corpus

CORPUS = [json.loads(line) for line in make_verifier_corpus.PATH.read_text().splitlines()]
DECIDED = [line for line in CORPUS if line['right'] is not None]

# Answers that are the same: case, spaces, units, times, lists, names, equations, programs, texts.
EQUAL = [
    (r'\frac{A}{a}', r'\frac{A}{a}'), (r'\text{Yes}', 'yes'), (r'\,\frac{2}{7}\;', '2/7'), ('{{14}}', '14'),
    (r'\underline{\text{yes}}', 'yes'), (r'\color{blue}{12}', '12'), (r'{\color{blue} 12}', '12'),
    (r'\framebox{12}', '12'), (r'\boldsymbol{x+1}', 'x+1'), (r'\mathbf{12}', '12'), (r'3.2\ \mathrm{V}', '3.2'),
    ('3.2 K', '3.2'), (r'7 \Omega', '7'), (r'7\,\Omega', '7'), (r'9.8 m\,s^{-2}', '9.8'), (r'9.8\ m/s^2', '9.8'),
    (r'4 kg \cdot m/s^2', '4'), (r'4 kg\cdot m^2/s', '4'), (r'300\text{ K}', '300'), (r'5 \text{ V/m}', '5'),
    (r'2.5\times10^{-3}\ \mathrm{mol\,L^{-1}\,s^{-1}}', '2.5e-3'), (r'12\ \mathrm{W\,m^{-2}\,K^{-1}}', '12'),
    ('42 kHz', '42'), (r'3 \mathrm{~MeV}', '3'), ('3 km', '3000 m'), ('1 h', '60 min'), ('2 dozen', '24'),
    ('20 euros', '€20'), ('15 cookies', '15'), ('15 red cookies', '15'), ('3 cups of flour', '3'),
    ('7 years old', '7'), ('6 feet tall', '6'), ('40 minutes in total', '40'), ('7:05 AM', r'\text{7:05 a.m.}'),
    ('7:05', '7:05 AM'), ('12:30 p.m.', r'12:30 \text{ PM}'), ('0, 375', '0,375'), ('1 and 100', '1, 100'),
    ('1,234,567', '1234567'), ('30, 45', r'30^\circ, 45^\circ'), (r'30^\circ \text{ and } 45^\circ', '30, 45'),
    ('2 cm, 3 cm', '2, 3'), (r'[1,2]\cup[2,5]', '[1,5]'), (r'(0,1)\cup[1,3)', '(0,3)'),
    (r'\{x \mid x > 3\}', r'(3,\infty)'), (r'\{x : 1 \le x \le 2\}', '[1,2]'),
    (r'\{x \in \mathbb{R} \mid x \ne 0\}', r'(-\infty,0)\cup(0,\infty)'), (r'\mathbb{R}', r'(-\infty,\infty)'),
    (r'\text{all reals}', r'\mathbb{R}'), (r'\mathbb{R}\setminus\{2\}', r'(-\infty,2)\cup(2,\infty)'),
    (r'x \neq 2', r'(-\infty,2)\cup(2,\infty)'), (r'\text{empty set}', r'\emptyset'), (r'\varnothing', r'\{\}'),
    ('10⁵', '100000'), ('10⁻³', '0.001'), ('６', '6'), ('6。', '6'), ('－６', '-6'), ('x₁', 'x_1'), ('２／３', '2/3'),
    ('≈ 2.7', '2.7'), (r'\approx 2.7', '2.7'), (r'\text{approximately } 2.7', '2.7'), ('2.7 (approximately)', '2.7'),
    (r'72 \text{ which is the total}', '72'), ('72, which is the total', '72'), ('x = 8', '8'), ('f(2) = 8', '8'),
    (r'P(A) = \frac14', '1/4'), (r'P(A \cap B) = 0.3', '0.3'), ('AB = 5', '5'), ('|AB| = 5', '5'),
    (r'\angle ABC = 30^\circ', '30'), (r'\text{Area} = 12', '12'), ('Area = 12', '12'), ('x + y = 12', '12'),
    ('S_n = n^2', 'n^2'), ('a_n = 2n+1', '2n+1'), ("y''+y=0", r'y^{\prime\prime} + y = 0'),
    (r'\frac{dy}{dx} = 2x', r'\frac{dy}{dx}=2x'), (r'\angle PQR', r'\angle RQP'), ('-2./7', '-2/7'),
    ('np.sqrt(2)/2', r'\frac{\sqrt2}{2}'), ('2*np.pi', r'2\pi'), ('np.exp(-2)', 'e^{-2}'), ('math.log(3)', r'\ln 3'),
    ('1.5d0', '1.5d0'), ('3*x**2', '3x^2'), ('np.arctan(1/2)', r'\arctan\frac12'), ('f(x+1)', 'f(x+1)'),
    ('k(x+1)', 'kx+k'), ('C(s+2)', 'Cs+2C'), ('m(v^2+u^2)', 'mv^2+mu^2'), ('3, 5, 7', r'\{7,5,3\}'),
    ('2^{10}', '1024'), (r'50\%', r'\frac12'), (r'5 \times 10^3', '5000'), (r'3.0\times 10^8 m/s', '3e8'),
    (r'\$12.50', '12.5'), ('12.50 dollars', r'\$12.50'), ('USD 12.50', '12.50'), (r'1\frac34', '7/4'),
    (r'\frac{7}{4}', '1 3/4'), ('(x+2)(x-3)', 'x^2-x-6'), ('(3,4)', '(3, 4)'), (r'x\in(3,4)', '(3,4)'),
    ('x=1,y=2', '(1,2)'), ('1+2i', '2i+1'), (r'3\text{ or }-3', r'\pm 3'), (r'\pm 3', '3, -3'),
    (r'\sqrt{8}', r'2\sqrt2'), (r'\log_{2}8', '3'), ('5!', '120'), (r'\binom{6}{2}', '15'), ('C_6^2', 'C_6^2'),
    (r'\begin{bmatrix}1 & 2\end{bmatrix}', r'\begin{pmatrix}1&2\end{pmatrix}'), ('101_2', '101_{2}'),
    (r'101_{\text{two}}', '101_2'), (r'\frac{\pi}{6}', r'30^\circ'), ('1:2', '2:4'), ('3:2:1', '3:2:1'),
    ('2x+3', '3+2x'), ('y=2x+3', '2x+3'), ('6x-3y+9=0', 'y=2x+3'),
    (r'x>2 \text{ or } x<-2', r'(-\infty,-2)\cup(2,\infty)'), ('2<x', 'x>2'), ('1.333333', '4/3'),
    (r'3.14159\ldots', '3.14159...'), (r'\frac{2}{3}\text{ of the cake}', '2/3'), ('5:1', '5 : 1'),
    ('n(n+1)/2', r'\frac{n^2+n}{2}'), (r'\tan^{-1}(2)', r'\arctan 2'), (r'\text{Monday}', 'monday'),
    (r'\text{13 km}', '13'), (r'13~\text{km}', '13 km'), (r'1.2 \times 10^{-5} T', '1.2e-5'), (r'25 \mu C', '25'),
    ('25 μC', '25'), ('6.02 x 10^23', '6.02e23'), (r'5\cdot 10^{-6}\ \mathrm{C}', '5e-6'),
    (r'\left(\frac{1}{2}, \frac{3}{2}\right)', '(0.5, 1.5)'), (r'\{1\}', '1'), (r'8 \text{ sq units}', '8'),
    ('8 square units', '8'), ('90 degrees Celsius', '90'), (r'\dfrac{1}{2}\pi r^2', r'\frac{\pi r^2}{2}'),
    (r'e^{x}\sin(x)', r'\sin x\, e^x'), (r'\sin 2x', r'2 \sin x\cos x'), (r'\text{(B)}', 'B'), ('k=3,-1', 'k=-1,3'),
    ('1{,}000{,}000', '10^6'), ('1 000 000', '10^6'), (r'\frac{1}{2},\frac{1}{3}', '1/3, 1/2'),
    (r'10\%', '10 percent'), (r'\sqrt{x^2+1}', '(x^2+1)^{1/2}'),
    ('two hundred', '200'), (r'\text{twenty-five}', '25'), ('two hundred and five', '205'),
    ('three thousand', '3000'), ('24 dozens', '288'), (r'\mathbb R', r'(-\infty,\infty)'),
    (r'\sqrt{2} \approx 1.414', r'\sqrt2'), (r'\frac{22}{7} \approx 3.14', '22/7'),
    (r'3\sqrt{5} \approx 6.708', r'3\sqrt{5}'), (r'\cos 60^\circ', r'\frac12'),
    (r'2\begin{pmatrix}1\\3\end{pmatrix}', r'\begin{pmatrix}2\\6\end{pmatrix}'),
    (r'\frac{1}{2}\begin{pmatrix}1&3\end{pmatrix}', r'\begin{pmatrix}0.5&1.5\end{pmatrix}'), ('12 = x', '12'),
    (r'5 \text{ k}\Omega', '5'), (r'5\ \mathrm{k\Omega}', r'5 k\Omega'), (r'\colorbox{yellow}{5}', '5'),
    ('6 (buses)', '6'), ('6', '6 (buses)'), ('9{:}45', '9:45'), ('-221', '-221_3'),
    ('x^2 - 3x + 2 = 0', '2x^2-6x+4=0'), ('4 fifths', '4/5'), (r'\text{three quarters}', '0.75'), ('half', '1/2'),
    (r'(-\infty, 2] \cap [0, 5]', '[0,2]'), ('|x - 1| < 3', '(-2,4)'), (r'|x| \ge 2', r'(-\infty,-2]\cup[2,\infty)'),
    (r'\sqrt{1/n}', r'\frac{1}{\sqrt{n}}'), ('-2<x<2', '|x|<2'),
    # Chains of equal sides with units, and sums of parts.
    (r'\frac{1}{4} = 25\%', '1/4'), (r'\frac23 \approx 66.7\%', '2/3'), (r'\alpha = 45^\circ = \frac{\pi}{4}', '45'),
    (r'A = 2 \cdot 4 = 8 \text{ cm}^2', '8'), (r's = 2 \text{ km} = 2000 \text{ m}', '2 km'),
    ('2 hours 15 minutes', '135 minutes'), (r'2 \text{ hours and } 15 \text{ minutes}', '2.25 hours'),
    ('6 ft 2 in', '74 inches'), ('4 m and 7 m', '4 m, 7 m'),
    # Letters that are signs elsewhere; functions that change at whole numbers.
    (r'\frac{1}{2} L U^2', r'\frac{L U^2}{2}'), (r'[0,1]U[2,3]', r'[0,1]\cup[2,3]'), ('s = at', 's = ta'),
    ('12- m', '-m + 12'),
    (r'\gcd(a,b)', r'\gcd(b,a)'), ('z^31', 'z^{31}'), ('u^2_3', 'u_3^2'),
    (r'\lfloor \frac{k+1}{3} \rfloor', r'\lfloor (k+1)/3 \rfloor'),
    (r'-\lceil -t \rceil', r'\lfloor t \rfloor'), ('3, 3, 5', '5, 3'), ('3, 5, 3', '3, 3, 5'),
    (r'x=4 \text{ and } x=-4', r'\pm 4'), (r'x>1 \text{ and } x<6', '(1,6)')]
UNEQUAL = [
    ('(1,1]', '(1,1)'), ('[-\\infty, 0]', '(-\\infty, 0]'),
    (r'\frac{A}{a}', '1'), (r'\phi', r'\Phi'), ('2V', '2v'), (r'\gamma', r'\Gamma'), ('3 km', '3 m'), ('3 N', '3 J'),
    ('2 dozen', '2'), ('7 halves', '7'), ('4 thirds', '4'), ('4 factorial', '4'), ('6 is wrong', '6'),
    ("6 isn't right", '6'), ('9 times y', '9'), ('20 yuan', '20 dollars'), ('20 euros', '$20'),
    ('30 kilometers per hour', '30 mph'), ('30 m/s', '30 km/h'), ('8 less than x', '8'), ('5 or 6', '5'),
    ('not 5', '5'), (r'\frac{3}{0}', r'\frac{5}{0}'), ('3:00', '9:00'), ('1/0', r'\infty'), ('7:05 PM', '7:05 AM'),
    ('7/5', '7:05'), ('0375', '0,375'), (r'[1,2)\cup(2,5]', '[1,5]'), (r'\emptyset', '0'), ('3x = 12', '12'),
    ('x^3 = 8', '8'), ('7 = 8', '8'), ('x + y = 12', '13'), ('y = 3y', "y' = 3y"), ("y'' + y = 0", "y' + y = 0"),
    (r'\angle PQR', r'\angle PRQ'), ('f(x)', 'f(y)'), ('13/4', '1 3/4'), ('(3,4)', '(4,3)'), ('(3,4]', '[3,4)'),
    (r'\pm 3', '3'), (r'\begin{bmatrix}1 & 2\end{bmatrix}', r'\begin{pmatrix}2&1\end{pmatrix}'), ('1:2', '2:1'),
    ('y=2x+3', 'y=2x-3'), (r'x\ge2', 'x>2'), ('1.3333', '4/3'), (r'\text{Monday}', 'tuesday'),
    (r'\sin 2x', r'2 \sin x'), (r'\text{(B)}', 'b'),
    ('24 dozens', '24'), ('y > 2', 'x > 2'), ('3 is the answer', '3'), ('3 halves', '3'),
    # Two answers in one.
    (r'x = 2 = \{9\}', '2'), (r'x = 2 = \{9\}', r'\{9\}'), ('x = 2 = nine', '9'), ('x = nine = 2', '2'),
    ('x = 2 = (9, 9)', '2'), ('x = 2.0 = 2.05 = 2.1 = 2.15', '2.15'), (r'x = 2 \text{ m} = 2 \text{ cm}', '2'),
    (r'x = 2 \text{ m} = 2 \text{ kg}', '2'),
    # Two values in one: plus or minus.
    (r'y = \pm x', 'y - x = 0'), (r'a \pm b = 3', 'a + b = 3'), (r'(\pm 2, 5)', '2 < x < 5'), (r'\pm 4 : 1', '4 : 1'),
    # Constants, infinities and few points.
    ('f(1) + f(2) = 3', 'f(3) + f(4) = 8'), (r'x < \infty', 'x < 9'), (r'\infty^0', '1'),
    (r'\lfloor \frac{n}{5} \rfloor', r'\lfloor \frac{n}{6} \rfloor'), (r'\lfloor x/500 \rfloor', '0'),
    (r'\lfloor\sqrt{k-2}\rfloor', r'\lfloor\sqrt{k-1}\rfloor'), (r'\max(x, -70)', 'x'), ('|x + 90|', 'x + 90'),
    (r'\gcd(a, b)', '1'), (r'\lfloor x \rfloor > 3', 'x > 3'), ('|x| + 2 > 4', 'x > 2'), ('3|x| < 6', 'x < 2'),
    ('x^3 - 3x^2 + 3x > 5', 'x > 5'), (r'[-\infty, 0] \cup [1, 2]', r'(-\infty, 0] \cup [1, 2]'),
    # Solutions that nothing solves, and of several variables.
    ('x = 4 and x = 5', 'x = 6 and x = 7'), ('y > 4 and y = 3', 'y = 4 and y = 3'),
    # Words that are no products, lists, and two equations without anything between.
    (r'\frac{\sin t}{3} for 0', r'\frac{\cos t}{3} for 0'), ('8 mod 5', '5 mod 8'), ('2, 2, 7', '2, 7, 7'),
    ('1, 4, 9, ...', '1, 4, 9'), ('30,000', '30, 0'),
    ('z^14', 'z^4'), ('z^31', 'z^3'), ('z^20', '1'), (r'y = 4x \quad y = -x', r'y = 5x \quad y = -x'),
    ('$u=2t$\n$v=3t$', '$u=4t$\n$v=3t$'), ('1 hour 20 minutes', '1 hour'), ('20 minutes 1 hour', '80 minutes')]


@pytest.mark.parametrize('x, y', EQUAL)
def test_equal_by_hand(x, y):
  assert answers.same(x, y) and answers.same(y, x)


@pytest.mark.parametrize('x, y', UNEQUAL)
def test_unequal_by_hand(x, y):
  assert not answers.same(x, y) and not answers.same(y, x)


def test_an_answer_is_itself():
  """Whatever it is."""
  for text in {text for pair in EQUAL + UNEQUAL for text in pair} | {line['reference'] for line in CORPUS} - {''}:
    assert answers.same(text, text) and answers.same(f' {text} ', text), text


def test_the_corpus():
  """That its script writes it, and the verdict on each answer that has one."""
  assert CORPUS == make_verifier_corpus.lines()
  assert len(DECIDED) >= 700 and 0.4 < sum(line['right'] for line in DECIDED) / len(DECIDED) < 0.6
  misses = [line for line in DECIDED
            if answers.same(answers.extract(line['completion']) or '', line['reference']) is not line['right']]
  assert not misses


def test_conventions_by_hand():
  same = answers.same
  assert same('50%', '0.5') and same('50%', '50') and not same('50%', '5') and not same('50%', '0.5%')
  assert same('5 cm', '5') and not same('5 cm', '5 m') and same('5 m', '500 cm')
  assert same('0.333333', '1/3') and not same('0.33333', '1/3') and not same('0.333333', '0.3333333')
  assert same('2, 1, 1', r'\{1,2\}') and not same('(2,1)', '(1,2)')
  assert not same('', '') and not same('x', '') and not same('', 'x')
  assert same(r'\log 100', '2') and same(r'\log e', '1') and not same(r'\log 100', r'\log_5 100')
  assert not same('0', 'I(0)e^{-t}') and same('k(x+1)', 'kx+k')  # a product, but not with 0
  assert not same('y = 4 or x = 5', 'x = 4 or x = 5') and same('y = 4 or x = 5', '4, 5')
  assert same(r'x = \frac{10}{3} \approx 3.33', '10/3') and not same('x = 41 = 42', '42')


def test_numbers_are_exact():
  same = answers.same
  assert not same('0.00000001', '0.00000002') and not same('1.0000001', '1') and not same(r'10^{40}', r'10^{40}+1')
  # A decimal of six digits may be rounded; a fraction may not.
  assert same('1.41421', r'\sqrt{2}') and not same('1.4142', r'\sqrt{2}')
  assert not same(r'\frac{14142135623730950488}{10^{19}}', r'\sqrt{2}')
  assert same(r'\sqrt{3+2\sqrt{2}}', r'1+\sqrt{2}') and same('0.1', r'\frac{1}{10}')
  assert not same(r'\frac{\sqrt{4010}}{2^{2004}}', r'\frac{\sqrt{4009}}{2^{2004}}')


def test_what_has_no_value_is_equal_to_nothing():
  assert not answers.same(r'\frac{1}{0}', r'\frac{2}{0}') and not answers.same(r'\frac{0}{0}', '0')
  assert answers.same(r'\frac{1}{0}', r'\dfrac10')  # as written


@pytest.mark.parametrize('group', [
    ['1/2', '0.5', r'\frac{1}{2}', '.50', r'\frac{2}{4}', 'x=0.5', 'P(A) = 1/2', 'half'],
    ['2, 1', r'\{1,2\}', '1 and 2'],
    ['(1,2)', r'\left(1, 2\right)', r'(\frac{2}{2}, 2.0)'], ['Odd', r'\text{odd}'], ['1,234', '1234', '1234 apples'],
    [r'[1,2)', r'[\frac{3}{3},2.0)'], ['2.5 million', '2,500,000']])
def test_canonical_answers_of_one_object_are_one(group):
  texts = {answers.canonical(x) for x in group}
  assert len(texts) == 1 and texts.pop()
  others = {answers.canonical(x) for x in ('7', '1,3', r'\sqrt{5}', 'x^3', '(2,1)', 'even', '[1,2]')}
  assert len(others) == 7 and not others & {answers.canonical(group[0])}
  assert answers.canonical('') is None


def test_a_canonical_answer_stands_for_the_answer():
  """So that `same` can join what has several texts."""
  for text in {text for pair in EQUAL for text in pair} | {line['reference'] for line in CORPUS} - {''}:
    assert answers.same(answers.canonical(text), text), text
  for x, y in UNEQUAL:
    if answers.canonical(x) and answers.canonical(y):
      assert not answers.same(answers.canonical(x), answers.canonical(y)), (x, y)


def bombs() -> list[str]:
  """Texts that could take long to read or to compute: towers, factorials, nesting, repetition, size."""
  found = [line['completion'] for line in CORPUS if line['right'] is None]
  several = r'+f(x)/2y+\log x\sin x y+2e3'  # each of which can be read in two ways
  for n in (3, 30, 1000):
    nine, short = '9' * n, min(n, 9)
    found += [
        '^'.join(['9'] * n),
        '9' + '!' * n, '(' * n + '9' + ')!' * n, r'\sqrt{' * n + '2' + '}' * n, 'x^{' * n + 'x' + '}' * n,
        r'\frac{1}{' * n + 'x' + '}' * n, '2\\frac{' * n + '1' + '}{3}' * n, '|' * n + 'x' + '|' * n,
        r'\sin ' * n + 'x', '-' * n + '1',
        r'\pm' * n + '1',
        r'\{' * n + '1' + r'\}' * n, '1,' * n, '(1,' * n + '1' + ')' * n, r'\cup'.join(['(1,2)'] * n), 'x=' * n + '1',
        '<'.join('x' * n), '1:' * n + '1', r'\frac' * n, 'a_' * n + '1',
        "f'" * n, 'f(' * n + 'x' + ')' * n, '5 and ' * n + '5', r'\log' * n + '2',
        r'\binom{%s}{%s}' % (nine, nine[1:]),
        r'\left(' * n, '$' * n + '1' + '$' * n, '\\' * n, 'km ' * n, '5 ' + 'km ' * n, '5' + '/s' * n,
        '*'.join(['(x+y+z)^{99}'] * n), '0.1e' + '9' * short, 'x!' * n, f'gcd({nine},6)',
        r'\begin{pmatrix}' * n, '5 ' + 'dogs ' * n,
        r'\text{' * n, r'\overline{' * n + '3' + '}' * n, '10^{10^{%s}}' % nine, r'\sqrt[%s]{2}' % nine,
        r'\exp(' * n + '9' + ')' * n,
        r'\sin(10^{%s})' % nine, 'x^{%s}' % nine, several * n, (several * n)[:390], '1 h ' * n, '|x|!' * n,
        '2^{|x|}' * n]
  return found + [r'\boxed{' + ' ' * 10 ** 5 + '7', '# answer ' * 10 ** 5, '7' * 10 ** 6, 'x+' * 10 ** 5,
                  '(' * 10 ** 5, r'\boxed{' * 10 ** 5, ' ' * 10 ** 6 + '7', 'a ' * 10 ** 5, '1,' * 10 ** 5]


def test_nothing_takes_long():
  """Processor time, of which a bomb would take minutes."""
  texts = bombs()
  assert len(texts) >= 126
  for text in texts:
    start = time.process_time()
    answer = answers.extract(text) or ''
    for reference in ('7', r'\frac{1}{2}x+\sin x', r'\{1,2\}'):
      assert not answers.same(answer, reference) or '7' in answer, text[:50]
    answers.canonical(answer)
    answers.same(text, text + '1')
    assert time.process_time() - start < 5, text[:50]
