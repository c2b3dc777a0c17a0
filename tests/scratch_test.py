"""Temporary folders: whose they are, and when they go."""

import os
import pathlib
import subprocess
import sys

from kr_jax import scratch

MAKE = 'import sys; from kr_jax import scratch; print(scratch.folder(sys.argv[1]), flush=True); sys.stdin.read()'


def test_folders_of_the_dead_are_removed(tmp_path):
  mine, directory = scratch.folder(str(tmp_path)), str(tmp_path)
  with subprocess.Popen([sys.executable, '-c', MAKE, directory], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                        text=True, cwd=pathlib.Path(__file__).parents[1]) as other:
    theirs = other.stdout.readline().strip()
    pathlib.Path(theirs, 'data').write_text('x')
    assert scratch.sweep(directory=directory) == []
    other.kill()
  for name in ('kr_jax-new', 'kr_jax-old', 'kr_jax-full', 'another'):
    (tmp_path / name).mkdir()
  (tmp_path / 'kr_jax-full' / 'data').touch()
  for name in ('kr_jax-old', 'kr_jax-full'):
    os.utime(tmp_path / name, (1, 1))
  (tmp_path / 'kr_jax-link').symlink_to(tmp_path / 'another')
  assert scratch.sweep(directory=directory) == [theirs]
  assert sorted(os.listdir(tmp_path)) == sorted([
      os.path.basename(mine), 'another', 'kr_jax-full', 'kr_jax-link', 'kr_jax-new'])
  scratch.release(mine)
  assert scratch.sweep(directory=directory) == [mine] and scratch.sweep(directory=str(tmp_path / 'none')) == []
