"""What a launcher is told by an exit status."""

import pathlib
import re

import pytest

from kr_jax import exits

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('path', ['kr_jax/main.py', 'launch/README.md'])
def test_documents_name_all(path):
  said = re.search(r'Exit status: (0;.*?\.)', (ROOT / path).read_text(), re.DOTALL)[1]
  known = [exits.FAILED, exits.WRONG_USAGE, exits.AGAIN, exits.INTERRUPTED]
  assert list(map(int, re.findall(r'\d+', said))) == [0, *known]


def test_what_scripts_of_the_shell_take_them_for():
  judged = (ROOT / 'launch' / 'tpu' / 'hosts.sh').read_text()
  assert f'"$code" = {exits.AGAIN}' in judged and f'code > {exits.INTERRUPTED}' in judged
