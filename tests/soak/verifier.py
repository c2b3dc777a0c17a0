"""The verifier of a soak: it does what the fault of the moment says."""

import os
import time

# The folder of faults, which the soak puts here, as workers know nothing of its environment.
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'faults')


def verify(completion, task):
  if os.path.exists(os.path.join(FOLDER, 'hang')):
    time.sleep(1e6)
  if os.path.exists(os.path.join(FOLDER, 'raise')):
    raise RuntimeError('a fault of the soak')
  return '1' in completion and int(task.answer) % 2 == 0
