r"""Writes tests/data/verifier_corpus.jsonl: references, completions, and whether these are right.

    python -m tests.make_verifier_corpus

Verdicts are by mathematics, under the conventions of kr_jax/answers/equality.py: a unit that one side leaves out
is not missed, decimals are exact. Each line is {"kind", "reference", "completion", "right"}; right is
null where there is no right verdict, and it only matters that one comes in time.
"""

import json
import pathlib

PATH = pathlib.Path(__file__).parent / 'data' / 'verifier_corpus.jsonl'

# kind: [(reference, right answers, wrong answers), ...]
PAIRS = {
  'integer': [
    ('42', ['42', '42.', '042', '42.0', '+42', '$42$', r'\(42\)', r'6 \cdot 7', '84/2'],
     ['24', '43', '-42', '4 2 1', '42 + 1', '', '420', '4.2']),
    ('-7', ['-7', '- 7', '−7', '-7.0', '-14/2', '3-10'], ['7', '--7', '-0.7', '-17']),
    ('1,000,000', ['10^6', '1000000', '1 million', '10^{6}', '1000 thousand'],
     ['1,000', '100000', '1', '10^5']),
    ('2^{2023}', ['2^{2023}', r'2\cdot2^{2022}', r'4^{1011}\cdot 2', '2^2023'],
     ['2^{2022}', '2^{2024}', '2023^2', '2^20230']),
    ('1011_2', ['1011_2', '1011_{2}', '1011'], ['1011_3', '1101_2', '11_2', '11']),
    ('3:4', ['3:4', '3 : 4'], ['4:3', '3:5', '34']),
    ('0', ['0', '-0', '0.0', '1-1', r'\frac{0}{5}'], ['1', r'\emptyset', '10', 'none']),
    ('120', ['5!', '120', r'\binom{10}{3}'], ['5', '5!!', '4!', '1200']),
    ('1024', ['2^{10}', '2^10', '4^5', '1,024'], ['2^{11}', '210', '20', '1.024'])],
  'fraction': [
    (r'\frac{1}{2}',
     ['1/2', '0.5', '.5', r'\frac12', r'\dfrac{1}{2}', r'\tfrac 1 2', r'\frac{2}{4}', '½', r'50\%'],
     ['2', '1/3', '0.05', r'\frac{2}{1}', '-1/2', '12']),
    (r'-\frac{3}{4}', ['-3/4', '-0.75', r'\frac{-3}{4}', r'\frac{3}{-4}', r'-\dfrac{6}{8}'],
     ['3/4', '-4/3', r'-\frac{3}{5}', '-0.74']),
    ('7/3', [r'\frac{7}{3}', r'2\frac{1}{3}', '2 1/3', r'\frac{14}{6}', r'2.\overline{3}', '2.333333'],
     ['2.3', '2.33', r'\frac{3}{7}', '1 2/3', r'2\frac{2}{3}', '2 + 1/4']),
    (r'\frac{x+1}{2}', [r'\frac{1}{2}(x+1)', r'\frac{x}{2}+\frac{1}{2}', '(x+1)/2', r'\dfrac{1+x}{2}'],
     [r'x+\frac{1}{2}', r'\frac{x-1}{2}', r'\frac{y+1}{2}', r'\frac{x+1}{3}']),
    (r'3\frac{1}{2}', ['7/2', '3.5', '3 1/2', r'\frac{7}{2}'], [r'\frac{3}{2}', '31/2', '3.12'])],
  'decimal': [
    ('0.25', ['1/4', '.25', '0.250', r'\frac{25}{100}', '25%'], ['0.2', '0.52', '2.5', '1/3']),
    ('3.14', ['3.14', r'\frac{157}{50}', '3.140'], [r'\pi', '3.141', '3.15', '22/7']),
    ('0.000001', ['1/1000000', '10^{-6}', '1e-6'], ['0', '0.000002', '10^{-7}', '1e-5']),
    (r'0.\overline{3}', ['1/3', r'\frac{1}{3}'], ['0.3', '3/10', r'0.\overline{6}']),
    ('12.5', ['25/2', '12.50', '12 1/2'], ['12', '125', '12.05']),
    ('2.0000001', ['2.0000001'], ['2', '2.0000002'])],
  'radical': [
    (r'2\sqrt{3}',
     [r'\sqrt{12}', '2sqrt(3)', r'2\sqrt3', r'\frac{6}{\sqrt{3}}', '2√3', r'\sqrt{3}\cdot 2',
      '2*sqrt(3)'],
     [r'\sqrt{6}', r'3\sqrt{2}', '3.4', r'2\sqrt{3}+1', r'-2\sqrt{3}', '6']),
    (r'\frac{\sqrt{2}}{2}',
     [r'\frac{1}{\sqrt{2}}', r'\sqrt{\frac{1}{2}}', r'\frac12\sqrt2', r'\sin\frac{\pi}{4}'],
     [r'\sqrt{2}', r'\frac{\sqrt{2}}{4}', r'\frac{1}{2}', '0.7']),
    (r'1+\sqrt{5}', [r'\sqrt{5}+1', r'\sqrt5 + 1', r'\frac{2+2\sqrt5}{2}'],
     [r'\sqrt{6}', r'1-\sqrt{5}', '3.2']),
    (r'\sqrt[3]{16}', [r'2\sqrt[3]{2}', '16^{1/3}', r'2^{\frac{4}{3}}'],
     [r'\sqrt{16}', '4', r'\sqrt[4]{16}'])],
  'pi': [
    (r'\frac{\pi}{4}', ['pi/4', 'π/4', r'\frac{1}{4}\pi', r'0.25\pi'],
     [r'\pi', '0.78', r'\frac{4}{\pi}', '45']),
    (r'25\pi', ['25 pi', r'\pi \cdot 5^2', '25π', r'25\pi\text{ cm}^2'],
     ['25', r'5\pi', '78.5', r'25\pi^2'])],
  'thousands': [
    ('1234567',
     ['1,234,567', '1{,}234{,}567', r'1\,234\,567', '1 234 567', r'1,\!234,\!567', '1234567.00'],
     ['1234', '567', '1,234,568', '1.234567', '(1,234,567)']),
    ('12,500', ['12500', '12{,}500', '12,500.00', '$12,500$'],
     ['12', '500', '12.5', '125,00', '12,501'])],
  'money': [
    ('18', [r'\$18', '$18', '18 dollars', '$18.00', '18.00', r'18\text{ dollars}'],
     ['$81', '$1.8', '19 dollars']),
    (r'\$1,250.50', ['1250.50', '$1250.5', '1,250.50 dollars', r'\$1250.50'],
     ['1250.05', '$125', '1,250']),
    ('$0.75', ['75 cents', '0.75', r'\$.75'], ['75 dollars', '$7.5', '57 cents'])],
  'percent': [
    (r'25\%', ['25%', '25 percent', '0.25', '1/4', '25', r'25\text{ percent}', '25.0%'],
     ['2.5%', '75%', '0.5', '0.0025']),
    ('0.5', ['50%', r'50\%'], ['5%', '0.05%', '500%']),
    ('50', ['50%', r'50\%', '50 percent'], ['5%', '0.5%', '0.5']),
    (r'12.5\%', ['12.5', '1/8', '0.125'], ['12', '125%', '1.25'])],
  'units': [
    (r'5\text{ cm}', ['5 cm', '5', r'5\,\mathrm{cm}', r'5~\text{centimeters}', '5.0 cm'],
     ['5 m', '50 cm', '5 km', '6 cm']),
    ('12', ['12 apples', r'12\text{ square units}', '12 hours', r'12\text{ m}^2', '12 students'],
     ['13 apples', '1 dozen 2', '21 m']),
    (r'9\text{ m}^2', ['9 square meters', '9', '9 m^2', r'9\text{ m}^{2}', '9 m²'],
     ['9 m', '9 m^3', '81 m^2']),
    (r'\frac{3}{2}\text{ hours}', ['1.5 hours', '3/2', '1.5 h', '1 1/2 hours'],
     ['1.5 minutes', '2/3 hours', '3 hours']),
    ('50 km/h', ['50', '50 kmh', '50 kilometers per hour', r'50\text{ km/h}'],
     ['50 m/s', '5 km/h', '50 mph']),
    ('3 hours', ['3 h', '3 hrs', '3', r'3\text{ hours}'],
     ['3 minutes', '180 hours', '4 hours', '3 days']),
    ('60 mph', ['60', '60 mph', r'60\text{ mph}'], ['6 mph', '61', '60 km/h'])],
  'degrees': [
    (r'45^\circ', ['45', '45°', r'45^{\circ}', '45 degrees', r'45\degree', r'45.0^\circ'],
     ['54', '135°', '4.5', '45 radians']),
    ('90', [r'90^\circ', '90 degrees'], [r'180^\circ', r'9^\circ'])],
  'interval': [
    ('[1,2)', ['[1, 2)', r'\left[1,2\right)', '[1.0,2)', r'x \in [1,2)'],
     ['(1,2]', '[1,2]', '(1,2)', '[1,3)', '1']),
    (r'(-\infty,3]',
     [r'(-\infty, 3]', '(-inf, 3]', r'x \in (-\infty,3]', r'\left(-\infty,3\right]', r'x \le 3'],
     [r'(-\infty,3)', r'[3,\infty)', '3', r'x \ge 3']),
    (r'(-\infty,-1)\cup(1,\infty)',
     [r'(1,\infty)\cup(-\infty,-1)', '(-∞,-1)∪(1,∞)', r'(-\infty,-1) \cup (\frac{2}{2},\infty)'],
     [r'(-\infty,-1)\cap(1,\infty)', '(-1,1)', r'(-\infty,-1]\cup[1,\infty)', r'(-\infty,-1)']),
    ('(3,5)', ['(3, 5)', r'\left(3,5\right)', '(6/2, 5)'], ['(5,3)', '[3,5]', '(3,5,7)', '3', '35'])],
  'set': [
    (r'\{1,2,3\}', [r'\{3,2,1\}', '1, 2, 3', '3, 1, 2', r'\left\{1,2,3\right\}', r'\{1, 2, 3, 3\}'],
     [r'\{1,2\}', r'\{1,2,4\}', '(3,2,1)', '6', r'\{1,2,3,4\}']),
    ('-1, 0, 1', [r'\{-1,0,1\}', '0, 1, -1', '-1,0,1'], ['-1,0', '0,1', '-1,1', '-101', '(-1,1)']),
    ('(2,3), (4,5)', ['(4,5), (2,3)', '(2, 3) and (4, 5)', r'\{(2,3),(4,5)\}'],
     ['(3,2),(4,5)', '(2,3)', '2,3,4,5']),
    ('2, -3',
     ['-3, 2', r'\{-3,2\}', '2 and -3', 'x=2 or x=-3', '-3; 2', r'x \in \{2,-3\}', r'2\text{ or }-3'],
     ['2, 3', '2', '-3', '-2, 3', '-1']),
    (r'\emptyset', [r'\varnothing', '∅', r'\{\}'], ['0', r'\{0\}', r'\{1\}', '1']),
    (r'\{5\}', ['5', r'\{5\}', 'x=5'], [r'\{5,6\}', '6', r'\{-5\}']),
    (r'1\pm\sqrt{2}', [r'1+\sqrt{2}, 1-\sqrt{2}', r'1 \pm \sqrt2', r'\{1-\sqrt{2},1+\sqrt{2}\}'],
     [r'1+\sqrt{2}', r'\sqrt{2}\pm 2', r'1\pm\sqrt{3}'])],
  'tuple': [
    ('(1,2,3)', ['(1, 2, 3)', r'\left(1,2,3\right)', r'(\frac{2}{2}, 2, 3.0)', '(x,y,z)=(1,2,3)'],
     ['(3,2,1)', '(1,2)', '(1,2,3,4)', '6', '(1,3,2)']),
    (r'(3,\frac{\pi}{2})', [r'(3, \frac{\pi}{2})', r'\left( 3, \frac{\pi}{2} \right)', '(3, pi/2)'],
     [r'(\frac{\pi}{2},3)', r'(3,\pi)', r'(-3,\frac{\pi}{2})']),
    ('(0,-4)', ['(0, -4)', '(0,−4)', '(0,-4.0)'], ['(-4,0)', '(0,4)', '0,4'])],
  'equation': [
    ('x=3', ['3', 'x = 3', 'x=3.0', 'x = 6/2', '$x=3$'], ['x=4', 'y=3', 'x=-3', '33']),
    ('3', ['x=3', 'n = 3', 'x = 1+2 = 3'], ['x=2', 'x=3y', 'x=33']),
    ('y=2x+1', ['y = 2x + 1', '2x+1', 'y=1+2x', 'y - 2x = 1'], ['y=2x-1', 'y=x+1', '2x', 'y=2x']),
    ('x^2+y^2=4', ['x^2 + y^2 = 4', 'y^2+x^2=4', 'x^2+y^2-4=0'],
     ['x^2+y^2=2', 'x^2-y^2=4', '4', 'x+y=4'])],
  'inequality': [
    (r'x \ge 2', ['x >= 2', r'x \geq 2', r'2 \le x', r'[2,\infty)', 'x ≥ 2'],
     ['x > 2', r'x \le 2', 'x=2', '2']),
    ('1<x<4', ['1 < x < 4', '(1,4)', r'x \in (1,4)'], ['1<x<5', r'1 \le x \le 4', '(4,1)', '[1,4]'])],
  'algebra': [
    ('x^2+2x+1', ['(x+1)^2', 'x^2 + 2x + 1', '1+2x+x^2', 'x(x+2)+1', '(1+x)(x+1)'],
     ['x^2+1', '(x-1)^2', 'x^2+2x', 'x^2+2x+2']),
    (r'\frac{1}{x}-\frac{1}{y}', [r'\frac{y-x}{xy}', r'-\frac{1}{y}+\frac{1}{x}'],
     [r'\frac{x-y}{xy}', r'\frac{1}{x-y}', r'\frac1x+\frac1y']),
    (r'\frac{n(n+1)}{2}', [r'\frac{n^2+n}{2}', 'n(n+1)/2', r'\frac{1}{2}n(n+1)'],
     [r'\frac{n(n-1)}{2}', 'n(n+1)', 'n^2/2']),
    ('f(x)=2x', ['2x', 'f(x) = 2x', 'f(x)=x+x', 'f(x)=2*x'], ['f(x)=x', 'f(x)=2x+1', 'x^2']),
    (r'\frac{3}{2}x', ['3x/2', '1.5x', r'x\cdot\frac32', r'\frac{3x}{2}'],
     [r'\frac{3}{2}', r'\frac{3}{2x}', r'\frac23x']),
    ('2n', ['2n', 'n+n', r'2 \cdot n', '2*n'], ['n^2', '2', '2m', 'n']),
    (r'\sin^2 x', [r'1-\cos^2 x', r'\sin^{2}(x)', r'(\sin x)^2'],
     [r'\sin x^2', r'\cos^2 x', r'\sin x']),
    ('e^{2x}', ['(e^x)^2', r'e^{x} \cdot e^{x}', 'e^{x+x}'], ['e^{x^2}', '2e^x', 'e^x'])],
  'logarithm': [
    (r'\log_2 8', ['3'], ['8', '2', '4']),
    (r'\ln 2', [r'\ln(2)', r'\frac{1}{2}\ln 4', r'-\ln\frac{1}{2}'],
     [r'\ln 4', '0.69', '2', r'-\ln 2'])],
  'complex': [
    ('3+4i', ['4i+3', '3 + 4i', '3+4 i'], ['3-4i', '4+3i', '7', '5']),
    ('-2i', ['-2i', '- 2 i', '0-2i'], ['2i', '-2', 'i'])],
  'scientific': [
    (r'1.2\times 10^5',
     ['120000', '1.2e5', '1.2*10^5', '1.2 × 10^5', r'12\times10^4', '120,000', r'1.2 \cdot 10^{5}'],
     ['1.2', '12000', '1.2e6', r'1.2\times 10^{-5}']),
    ('3e-8', [r'3 \times 10^{-8}', '0.00000003', '3E-8'], ['4e-8', '3e-7', '0', '-3e-8']),
    ('2.5 million', ['2500000', '2,500,000', r'2.5\times10^6'], ['2.5', '25 million', '250000'])],
  'words': [
    (r'\text{odd}', ['odd', 'Odd', r'\text{odd}', '**odd**', r'\mathrm{odd}'],
     ['even', 'o', '1', 'odder']),
    ('Evelyn', ['Evelyn', 'evelyn', r'\text{Evelyn}', 'Evelyn.'],
     ['Eve', 'Evelyn and Bob', 'Carla', '3']),
    ('yes', ['Yes', r'\text{yes}'], ['no', 'not yes', 'ye']),
    ('(C)', ['C', '(C)', r'\text{(C)}', r'\textbf{(C)}'], ['A', '(B)', 'D', '3'])],
  'matrix': [
    (r'\begin{pmatrix}1&2\\3&4\end{pmatrix}',
     [r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\begin{bmatrix}1&2\\3&4\end{bmatrix}',
      r'\left(\begin{matrix}1&2\\3&4\end{matrix}\right)',
      r'\begin{pmatrix}1&\frac{4}{2}\\3&4\end{pmatrix}'],
     [r'\begin{pmatrix}1&3\\2&4\end{pmatrix}', r'\begin{pmatrix}1&2\end{pmatrix}', '10',
      r'\begin{pmatrix}1&2\\3&5\end{pmatrix}']),
    (r'\begin{pmatrix}-1\\5\end{pmatrix}',
     [r'\begin{pmatrix} -1 \\ 5 \end{pmatrix}', r'\begin{bmatrix}-1\\5\end{bmatrix}'],
     [r'\begin{pmatrix}5\\-1\end{pmatrix}', r'\begin{pmatrix}-1&5&0\end{pmatrix}', '-5'])],
  'malformed': [
    (r'\frac{1}{2}', [r'\frac 1 2', r'{1 \over 2}', r'\left(\frac{1}{2}\right)', '\\frac{1}{2}\\\\'],
     [r'\frac{1}', r'\frac', '{', '}', '\\', r'\sqrt', '^', '1/', r'\left(', r'\begin{pmatrix}1', '_',
      '&', '1//2//', '$', '$$$', r'\text{'])],
  'mixed': [
    (r'\frac{5}{13}', ['5/13'], ['5.13']), ('(-3,4)', [r'\left(-3, 4\right)'], ['(4,-3)']),
    (r'\frac{\sqrt{3}}{3}', [r'1/\sqrt{3}'], []), (r'10\sqrt{5}', [r'10 \sqrt 5'], []),
    ('x^3-3x', ['x(x^2-3)'], []), ('4:30', ['4:30'], []), (r'\text{June 20}', ['June 20'], []),
    ('27', ['3^3'], ['3^2']), (r'\frac{a}{b}', ['a/b'], []), (r'-\frac{1}{2}, 3', ['3, -0.5'], ['3']),
    (r'\frac{1+\sqrt{5}}{2}', ['(1+sqrt(5))/2'], []), ('6 - 5i', ['6-5i'], []),
    (r'2+\sqrt{3}i', [r'2+i\sqrt{3}'], []), (r'\$32,348', ['32348'], []), (r'11,\! 111', ['11111'], []),
    ('(6,31,-1)', ['(6, 31, -1)'], []), ('y^4-2y^3+7y^2+y-5', ['y^4 - 2y^3 + 7y^2 + y - 5'], []),
    ('[-2,7]', [r'x \in [-2,7]'], ['(-2,7)']), (r'\frac{3\pi}{4}', [r'3\pi/4'], []),
    (r'150^\circ', ['150'], []),
    (r'\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}',
     [r'\begin{pmatrix} \frac15 \\ -\frac{18}5 \end{pmatrix}'], []),
    ('3R^2', ['3 R^2'], ['3r']), (r'1 \frac{1}{4}', ['1.25'], []),
    ('0.0000672', [r'6.72 \times 10^{-5}'], [r'6.72\times10^{-4}']), ('-2 < x < 3', ['(-2,3)'], []),
    (r'x \in (-\infty, 0) \cup (1, \infty)', [r'(-\infty,0)\cup(1,\infty)'], []),
    ('72', ['72 degrees'], []), (r'8\text{ inches}', ['8 in'], []), (r'\text{Navin}', ['Navin'], []),
    ('14000', ['14,000 people'], []), ('5x - 7y + 11z + 4 = 0', ['5x-7y+11z+4=0'], []),
    (r'y = \frac{1}{2}x + 3', ['y = 0.5x+3'], []), (r'\log_{10} 2', [r'\log 2'], []), ('e', ['e'], []),
    (r'\frac{3}{4}', ['0.75'], []), (r'30\%', ['0.3'], []), ('1/6', [r'\frac16'], []),
    ('2004', ['2004.0'], []), (r'(2, \infty)', ['x > 2'], []), ('-5', ['x=-5'], []),
    ('a=2, b=3', ['a = 2, b = 3'], ['a=3, b=2']),
    (r'\sqrt{2}+\sqrt{3}', [r'\sqrt3+\sqrt2'], [r'\sqrt5']), (r'12\pi \text{ cm}^3', [r'12\pi'], []),
    ('n!', ['n!'], ['n']), ('2^n-1', ['2^{n}-1'], ['2^{n-1}']),
    (r'\cos\theta', [r'\cos(\theta)'], [r'\sin\theta']), (r'\frac{\pi}{2}', [r'\pi/2 radians'], []),
    (r'\overline{AB}', [r'\overline{AB}'], []), ('120', ['$$120$$'], []),
    ('3,4,5', ['5, 4 and 3'], ['3,4']), (r'\infty', ['infinity'], [r'-\infty']),
    (r'2k\pi', [r'2\pi k'], [r'k\pi']), ('k=4', ['4'], []), ('|x|', ['|x|'], ['x']),
    (r'\frac{x}{y}', ['x/y'], []), ('65', ['65 miles per hour'], []), ('1.5', ['3/2'], []),
    ('12', ['twelve'], ['1 2']), ('6-5i', [], ['5-6i']), ('150', [], ['1500']), ('-2<x<3', [], ['x<3']),
    ('(1,5)', [], ['1.5']), ('1,5', [], ['15']), ('x>2', [], ['x<2']), (r'x\ne 3', [], ['x=3']),
    ('5', [], ['5x', '-5', '|5|-1']), ('x^2', [], ['2x']), (r'\frac{1}{2}', [], [r'\frac{1}{2}x']),
    (r'\sqrt{x}', [], ['x']), ('10', [], ['ten10']), ('100', [], ['1e3']), ('2', [], ['2 or 3']),
    ('7', [], ['7, 8', 'not 7', '7 or maybe 8', 'I do not know']), ('no solution', [], ['0']),
    (r'\text{even}', [], ['odd']), ('2^{10}', [], ['2^{10}+1']), ('10^{50}', [], ['10^{50}+1']),
    ('0', [], ['1e-30']), (r'\pi', [], ['3.14', '22/7']), ('3', [], ['3.0000001'])],
}

# Completions as policies write them: (kind, reference, completion, right).
COMPLETIONS = [
  ('completion', '7', r'First \boxed{3}, no: \boxed{7}.', True),
  ('completion', '7', r'First \boxed{7}, no: \boxed{3}.', False),
  ('completion', '7', 'Seven is 7.\n#### 7', True),
  ('completion', '7', 'It costs 7 each.\n#### 14', False),
  ('completion', '7', 'The answer is 7. I am sure, as 3 + 4 = 7.', True),
  ('completion', '7', 'The answer is 8. I am sure, though 7 is close.', False),
  ('completion', '7', '**Answer:** 7', True),
  ('completion', '7', 'Final answer: $7$', True),
  ('completion', r'\frac{1}{2}', r'So we get $$\boxed{\frac{1}{2}}$$', True),
  ('completion', r'\frac{1}{2}', 'The answer is:\n\\[\n\\frac{1}{2}\n\\]', True),
  ('completion', r'\frac{1}{2}', r'\boxed{\frac{1}{2}', False),
  ('completion', '7', r'<think>\boxed{3}</think> The answer is 7.', True),
  ('completion', '7', r'<think>\boxed{7}</think> I do not know.', False),
  ('completion', '7', r'<answer> 7 </answer>', True),
  ('completion', '7', r'\boxed{\boxed{7}}', True),
  ('completion', '7', 'There are\nmany numbers\nlike 7', False),
  ('completion', '', '', False),
  ('completion', '7', '', False),
  ('completion', '7', r'\boxed{}', False),
  ('completion', '18', r'She makes \$18. The answer is \$18 every day.', True),
]

HOSTILE = [
  '9^9^9^9', '9^{9^{9^{9}}}', r'10^{10^{10}}', '2^{2^{2^{2^{2^{2}}}}}', '99999999!', '((9!)!)!',
  r'(10^{10})!', '9**9**9**9', r'\binom{10^{12}}{5\cdot10^{11}}', r'0.5^{10^{12}}',
  r'\sqrt[10^{10}]{2}', r'(x+1)^{100000}', r'(x+y+z)^{200}', r'\sum_{n=1}^{10^9} \sin(n^n)',
  r'\prod_{n=1}^{10^9} n!', r'\int_0^1 x^{x^{x}} dx', r'\int e^{\sin(x^5)\cos(e^x)} dx',
  r'\lim_{n\to\infty} \frac{n!}{n^n}', '1' * 100_000, '7' * 3000 + '!', '(' * 5000 + '7' + ')' * 5000,
  '{' * 5000, r'\frac{' * 2000 + '1', r'\sqrt{' * 500 + '2' + '}' * 500, '1+' * 20_000 + '1',
  '-' * 5000 + '7', '7\x00', '\x00\x1b[2J\x07', '\ud800'.encode('utf-8', 'replace').decode(), '\u202e7',
  '7\u200b', '🦜' * 500, r'\boxed{' * 3000, '####' * 5000, 'answer is ' * 3000, '<answer>' * 3000,
  '__import__("os").abort()', 'exec("while 1: pass")', r'\input{/dev/zero}', r'\def\x{\x\x}\x',
  '$' * 5000, ' ' * 50_000 + '7', '\n' * 50_000, ',' * 5000,
  r'\{' + ','.join(map(str, range(3000))) + r'\}', r'\begin{pmatrix}' + r'1&' * 400 + r'1\end{pmatrix}',
  r'\frac{1}{0}', r'\frac{0}{0}', '1e999999999', '0^{-1}', r'\log 0', r'\infty-\infty',
  r'\tan\frac{\pi}{2}', r'x^{x^{x^{x^{x}}}}=x', r'\gcd(10^{300}+1, 10^{200}+7)', '=' * 3000, '<' * 300,
  r'\pm' * 30 + '1', '1,' * 2000, r'\cup' * 1000,
]


def wrapped(i: int, answer: str) -> str:
  forms = (r'So it is $\boxed{%s}$.', 'We add them up.\n#### %s', 'Thus the answer is %s.', '%s')
  if '$' in answer:
    forms = (r'\boxed{%s}', 'We add them up.\n#### %s', 'Thus the answer is %s.', '%s')
  return forms[i % 4] % answer


def lines() -> list[dict]:
  found = []
  for kind, groups in PAIRS.items():
    for reference, right, wrong in groups:
      for verdict, answers in ((True, right), (False, wrong)):
        for answer in answers:
          found.append((kind, reference, wrapped(len(found), answer), verdict))
  found += COMPLETIONS
  for i, answer in enumerate(HOSTILE):
    reference = ('7', r'\frac{1}{2}', r'x^2+1', r'\{1,2\}')[i % 4]
    found.append(('hostile', reference, rf'\boxed{{{answer}}}' if i % 2 else answer, None))
  return [dict(zip(('kind', 'reference', 'completion', 'right'), line)) for line in found]


if __name__ == '__main__':
  PATH.parent.mkdir(exist_ok=True)
  PATH.write_text(''.join(json.dumps(line) + '\n' for line in lines()))
