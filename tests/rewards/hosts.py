"""What this machine allows, asked of the kernel and not of the walls that are tested."""

import ctypes
import os
import platform
import sys


def allows_all_walls() -> bool:
  """Whether every wall must stand here: root who may make namespaces, and Landlock with scopes of signals."""
  if sys.platform != 'linux' or platform.machine() not in ('x86_64', 'aarch64') or os.geteuid() != 0:
    return False
  with open('/proc/self/status') as file:
    effective = next(int(line.split()[1], 16) for line in file if line.startswith('CapEff'))
  may_administer = effective >> 21 & 1
  landlock = ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1))
  return bool(may_administer) and landlock >= 6
