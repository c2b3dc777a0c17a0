r"""The program that a completion holds, as a text, and what is added to it before it runs. Imports nothing heavy."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import re
import textwrap
import warnings

# The modules whose names LiveCodeBench imports before a program; a later one has the last word.
_IMPORTED = ('string', 're', 'datetime', 'collections', 'heapq', 'bisect', 'copy', 'math', 'random', 'statistics',
             'itertools', 'functools', 'operator', 'io', 'sys', 'json', 'typing')
_FENCE = re.compile(r'^[ \t]*(`{3,16}|~{3,16})[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:\1[ \t]*$|\Z)', re.MULTILINE | re.DOTALL)
_ANSWER = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_PYTHON = ('python', 'python3', 'py')


def program(completion: str, prompt: str = '', entry_point: str = '') -> str | None:
  """The program that a completion holds; None: it holds none.

  It is the last block of code, ```python before ```, in <answer>...</answer> if there is one in it; a block without
  its end goes to the end. Without a block, the whole is the program if it is Python that does something. Thoughts up
  to </think> are not read.

  Args:
    prompt: code that ends in the head of the function `entry_point`, which the completion may go on with: its body,
      or the whole function, to which the imports and functions of the prompt are added.
  """
  text = completion.rpartition('</think>')[2]
  for region in (*_ANSWER.findall(text)[-1:], text):
    blocks = [(language.lower(), code) for _, language, code in _FENCE.findall(region)]
    for languages in (_PYTHON, ('',)):
      if found := [code for language, code in blocks if language in languages and code.strip()]:
        return _completed(_dedent(found[-1]), prompt, entry_point)
  region = (_ANSWER.findall(text) or [text])[-1]
  if prompt and parse(region) is None:  # a body goes on after the function, where nothing is indented
    body = re.split(r'\n(?=[^\s)\]}])', region.rstrip(), maxsplit=1)[0]
    return prompt + body if body.strip() and parse(prompt + body) is not None else None
  if (tree := parse(_dedent(region))) is None or not any(map(_does_something, tree.body)):
    return None
  return _completed(_dedent(region), prompt, entry_point)


def _dedent(code: str) -> str:
  return textwrap.dedent(code.expandtabs() if '\t' in code and parse(code) is None else code)


def _does_something(statement: ast.stmt) -> bool:
  """Whether a statement is more than words that happen to be Python, such as 'yes' or '42'."""
  return not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call)


def _completed(code: str, prompt: str, entry_point: str) -> str:
  """The code with what the prompt has before its function, or the prompt with the code as the function's body."""
  if not prompt:
    return code
  tree = parse(code)
  if tree is None or entry_point not in _defined(tree):
    return f'{prompt}\n{textwrap.indent(code, "    ")}'
  head = parse(f'{prompt}\n    pass\n')
  before = [node for node in head.body if getattr(node, 'name', '') != entry_point] if head else []
  return _preceded(code, tree, before)


def _preceded(code: str, tree: ast.Module, before: list[ast.stmt]) -> str:
  """The code, whose syntax tree is given, after other statements; imports from __future__ stay first."""
  is_future = lambda node: isinstance(node, ast.ImportFrom) and node.module == '__future__'
  if not any(map(is_future, [*before, *tree.body])):
    return '\n'.join([*map(ast.unparse, before), code])
  return ast.unparse(ast.Module(sorted([*before, *tree.body], key=lambda node: not is_future(node)), []))


def _defined(tree: ast.Module) -> set[str]:
  """The names that a module binds at its top."""
  names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
  return names | {node.id for top in tree.body if isinstance(top, (ast.Assign, ast.AnnAssign))
                  for node in ast.walk(top) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def parse(code: str) -> ast.Module | None:
  """The syntax tree of a text; None: it is not Python."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes
      return ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


@functools.cache
def _sources_of_names() -> dict[str, str]:
  """By name the line that imports it, as LiveCodeBench imports names."""
  lines = {}
  for module in _IMPORTED:
    found = importlib.import_module(module)
    public = getattr(found, '__all__', None) or [name for name in vars(found) if not name.startswith('_')]
    lines.update({name: f'from {module} import {name}' for name in public})
  lines.update({module: f'import {module}' for module in _IMPORTED if module != 'typing'})
  return {name: line for name, line in lines.items() if not hasattr(builtins, name)}


def with_imports(code: str, tree: ast.Module) -> str:
  """The code after imports of the names that it reads; those that it defines itself replace them."""
  names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  lines = _sources_of_names()
  return _preceded(code, tree, ast.parse('\n'.join(lines[name] for name in sorted(names & lines.keys()))).body)
