"""Runs kr_jax on a fresh machine of Colab, by Colab's command line (pip install google-colab-cli):

    colab run --tpu v5e1 -s kr --keep --timeout 86400 launch/colab.py --config=kr_jax:arithmetic --workdir=runs/first
    colab download -s kr /content/runs/first/report.html report.html && colab stop -s kr

The arguments are those of kr_jax.main. --keep keeps the machine after the run, so that the workdir can be fetched; the
machine costs until it is stopped. The command line gives up on a script that is silent for --timeout seconds.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys

REPOSITORY = 'https://github.com/OWNER/kr_jax'


def run(*command: str) -> int:
  """Runs a command of Python, and prints its lines as they come: a notebook's kernel shows no other output."""
  with subprocess.Popen([sys.executable, '-u', '-m', *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True, errors='replace', env=os.environ | {'GIT_TERMINAL_PROMPT': '0'}) as process:
    for line in process.stdout:
      print(line, end='', flush=True)
  return process.returncode


def extra() -> str:
  """The extra of kr_jax for the accelerator that is there."""
  if glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'):
    return 'tpu'
  return 'cuda' if shutil.which('nvidia-smi') else 'train'


if __name__ == '__main__':
  status = 0
  if not importlib.util.find_spec('kr_jax'):
    status = run('pip', 'install', '-q', f'kr_jax[{extra()}] @ git+{REPOSITORY}')
  sys.exit(status or run('kr_jax.main', *sys.argv[1:]))
