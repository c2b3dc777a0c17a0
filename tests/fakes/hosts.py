"""The machines of the fake cloud: directories with the programs that the image of a TPU VM has, and no others.

What takes minutes on a real one (pip, venv, uv, apt-get, the installer of uv) is played by the scripts in image/. By
default an image is Ubuntu 22.04: Python 3.10 with pip, without venv. The plan may say otherwise, in a rule
{"at": "image", "do": {"python": ["3.10"], "pip": false, "venv": false, "curl": true, "sudo": true}}, with "host" for
one of them, and say what fails there: "fails": ["pip"], or "uv".
"""

from __future__ import annotations

import os

IMAGE = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'image')
# Of the packages that every Ubuntu has.
TOOLS = ('awk base64 basename bash cat chmod cksum cp cut date dirname du env false find getconf grep gunzip gzip head '
         'id kill ln ls mkdir mktemp mv nohup nproc printf ps pwd readlink realpath rm rmdir sed seq setsid sh sort '
         'stat stdbuf tac tail tar tee test timeout touch tr true uname uniq wc whoami xargs').split()


def make(root: str, number: int, devices: int) -> None:
  """Makes machine `number` of a slice, with `devices` TPU devices and an empty disk."""
  import shutil
  from tests.fakes import cloud
  rule = cloud.planned('image', host=number)
  image = {'python': ['3.10'], 'pip': True, 'venv': False, 'curl': True, 'sudo': True, 'fails': []}
  image |= (rule or {}).get('do', {})
  shutil.rmtree(root, ignore_errors=True)
  for name in ('home', 'bin', 'image'):
    os.makedirs(os.path.join(root, name))
  for name in TOOLS:
    there = f'/usr/bin/{name}' if os.path.exists(f'/usr/bin/{name}') else f'/bin/{name}'
    os.symlink(there, os.path.join(root, 'bin', name))
  for version in image['python']:
    python(os.path.join(root, 'bin', f'python{version}'), version)
  if image['python']:
    python(os.path.join(root, 'bin', 'python3'), image['python'][0])
  programs = ['sleep'] + ['curl'] * image['curl'] + ['sudo', 'apt-get', 'add-apt-repository'] * image['sudo']
  for program in programs:
    os.symlink(os.path.join(IMAGE, program), os.path.join(root, 'bin', program))
  notes = {'number': number, 'devices': devices}
  notes |= {name: '' for name in ('pip', 'venv') if image[name]} | {f'{name}_fails': '' for name in image['fails']}
  for name, text in notes.items():
    with open(os.path.join(root, 'image', name), 'w') as file:
      file.write(str(text))


def python(path: str, version: str) -> None:
  """Puts an interpreter there, as the image has it."""
  with open(path, 'w') as file:
    file.write(f'#!/bin/bash\nFAKE_SYSTEM=yes FAKE_VERSION={version} exec {IMAGE}/python "$@"\n')
  os.chmod(path, 0o755)


def number(root: str) -> int:
  with open(os.path.join(root, 'image', 'number')) as file:
    return int(file.read())


def environment(root: str) -> dict[str, str]:
  """What a command by ssh finds in its environment."""
  passed = {name: x for name, x in os.environ.items() if name.startswith(('FAKE_', 'JAX_', 'XLA_'))}
  return passed | {'HOME': os.path.join(root, 'home'), 'PATH': os.path.join(root, 'bin'), 'FAKE_HOST': root,
                   'FAKE_IMAGE': IMAGE, 'USER': 'user', 'LANG': 'C.UTF-8'}
