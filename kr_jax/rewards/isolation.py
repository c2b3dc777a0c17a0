"""What the kernel offers to keep a process in: limits, namespaces, an unprivileged user, Landlock and seccomp.

A process cannot take down these walls once it is behind them. A wall that the platform does not allow is left out;
`confine` and `enter` say which stand, and WALLS what each keeps.

Sources: Linux man pages setrlimit(2), namespaces(7), capabilities(7), landlock(7), seccomp(2), prctl(2).
This file is also the program that walls.run starts: it imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

WALLS = {
    'memory': 'the address space of each process is limited',
    'processes': 'the number of processes is limited',
    'descendants': 'no process outlives the process that is behind the walls (a PID namespace)',
    'signals': 'processes outside get no signal',
    'privileges': 'no process runs as root, nor can become root',
    'files': 'files outside the allowed folders cannot be read or written (Landlock)',
    'mounts': 'file systems are read-only outside the writable folder (a mount namespace)',
    'network': 'no socket can be opened',
    'calls': 'ptrace, bpf, io_uring, mount, unshare and other system calls of no use are refused (seccomp)',
}

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_ANY_NAMESPACE = 0x7E020080
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SECCOMP, _CAPBSET_DROP, _SECUREBITS = 1, 4, 8, 22, 24, 28
_CHILD_SUBREAPER, _NO_NEW_PRIVS, _CAP_AMBIENT = 36, 38, 47
_DAC_READ_SEARCH = 2
_STRANGERS = 0x70000000  # users from this number on own nothing
_LANDLOCK, _MOUNT_SETATTR = 444, 442  # numbers that all machines share; Landlock has three from 444 on
# Of the machines that Linux runs on, those of TPU hosts: the number of the machine in seccomp, and the column below.
_MACHINES = {'x86_64': (0xC000003E, 0), 'aarch64': (0xC00000B7, 1)}
# System calls that are refused, by their numbers on x86_64 and aarch64; None: there is none.
_REFUSED = (
    (101, 117), (310, 270), (311, 271), (312, 272), (438, 438), (440, 440),  # ptrace, process_vm_*, kcmp, pidfd_getfd
    (321, 280), (298, 241), (323, 282), (300, 262), (425, 425), (426, 426), (427, 427),  # bpf ... fanotify, io_uring
    (248, 217), (249, 218), (250, 219), (303, 264), (304, 265),  # keys, handles of files
    (165, 40), (166, 39), (155, 41), (161, 51), (272, 97), (308, 268),  # mount ... chroot, unshare, setns
    (428, 428), (429, 429), (430, 430), (431, 431), (432, 432), (433, 433), (442, 442),  # open_tree ... mount_setattr
    (175, 105), (313, 273), (176, 106), (246, 104), (320, 294), (169, 142),  # modules, kexec, reboot
    (167, 224), (168, 225), (163, 89), (179, 60), (103, 116), (172, None), (173, None),  # swapon ... iopl, ioperm
    (170, 161), (171, 162), (164, 170), (227, 112), (159, 171), (305, 266),  # names of the host, clocks
    (141, 140), (251, 30), (256, 238), (279, 239),  # setpriority, ioprio_set, migrate_pages, move_pages
    (29, 194), (64, 190), (68, 186), (240, 180), (319, 279), (135, 92),  # shmget ... mq_open, memfd_create, personality
    (200, 130), (129, 138), (297, 240), (424, 424))  # tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal
_SOCKET, _CLONE, _CLONE3, _IOCTL = (41, 198), (56, 220), 435, (16, 29)
_OF_ANOTHER = ((302, 261), (203, 122), (144, 119), (142, 118), (314, 274))  # prlimit64, sched_set*: not 0 is refused
_KILLS = ((62, 129), (234, 131))  # kill, tgkill
# chmod ... fchmodat2, chown ... fchownat, utime ... utimensat, setxattr ... fremovexattr
_MODES = ((90, None), (91, 52), (268, 53), (452, 452), (92, None), (93, 55), (94, None), (260, 54), (132, None),
          (235, None), (261, None), (280, 88), (188, 5), (189, 6), (190, 7), (197, 14), (198, 15), (199, 16))
_libc = ctypes.CDLL(None, use_errno=True)
_standing: frozenset[str] | None = None  # the walls that this process is behind; None: it did not `enter`
_is_stranger = False  # whether this process left root for a user that nothing else belongs to


class Limits(NamedTuple):
  """What a process may take."""

  seconds: float = 5.0  # of a program, by the clock and by its processors
  memory_mb: int = 1024  # MiB of address space of each process; of `enter`, beyond what it has
  processes: int = 64  # processes and threads
  file_mb: int = 16  # MiB of each file
  output_kb: int = 256  # KiB that are kept of stdout, and of stderr


def _call(name: str, *arguments: int | bytes | None) -> int:
  """A function of libc. Raises OSError."""
  found = getattr(_libc, name)(*(ctypes.c_long(x) if isinstance(x, int) else x for x in arguments))
  if found < 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{name}: {os.strerror(number)}')
  return found


def _prctl(option: int, *arguments: int) -> None:
  _call('prctl', option, *arguments, *(0,) * (4 - len(arguments)))


def _stands(wall: Callable[[], bool | None]) -> bool:
  """Puts up a wall; whether it stands."""
  try:
    return wall() is not False
  except (OSError, ValueError, AttributeError):  # AttributeError: libc has no such function
    return False


def _make_namespaces(network: bool) -> bool:
  """Makes namespaces for the processes to come, System V objects and the network."""
  own = _NEWPID | _NEWIPC | (0 if network else _NEWNET)
  if os.geteuid() == 0:
    _call('unshare', own)
  else:  # whoever is not root needs to be root of a namespace of users
    user, group = os.geteuid(), os.getegid()
    _prctl(_DUMPABLE, 1)  # else the files below belong to root, if this process changed its user
    _call('unshare', own | _NEWUSER)
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1'), ('gid_map', f'{group} {group} 1')):
      with open(f'/proc/self/{name}', 'w') as file:
        file.write(text)
  return True


def _make_mounts(folder: str, disk_mb: int) -> None:
  """Makes all file systems read-only but for the folder, which is a new one in memory if disk_mb."""
  _call('unshare', _NEWNS)
  _call('mount', None, b'/', None, 0x44000, None)  # MS_REC | MS_PRIVATE: nothing reaches the mounts outside
  place = os.fsencode(folder)
  if disk_mb:
    _call('mount', b'kr_jax', place, b'tmpfs', 6, f'size={disk_mb}m,nr_inodes=10000,mode=700'.encode())
  else:
    _call('mount', place, place, None, 0x1000, None)  # MS_BIND: a mount of its own
  for path, recursive, add, clear in ((b'/', 0x8000, 1, 0), (place, 0, 0, 1)):  # 1: read-only
    _call('syscall', _MOUNT_SETATTR, -100, path, recursive, struct.pack('4Q', add, clear, 0, 0), 32)


def confine(start: Callable[[tuple[str, ...]], int], *, lifeline: int, folder: str, disk_mb: int = 0,
            network: bool = False) -> int:
  """Runs start(walls that stand) in a child with namespaces of its own, where they are allowed.

  The caller has one thread, and no children. It waits for the child to end, or for the file `lifeline` to be
  readable or at its end, which ends the child.

  Args:
    folder: the folder that the child may write in.
    disk_mb: MiB of a file system in memory that is the folder for the child; 0: the folder itself.
    network: whether the child may use the network.

  Returns:
    The exit status that start returned, or 128 plus the signal that ended it. All descendants are dead.
  """
  linux = sys.platform == 'linux'
  if linux:
    _prctl(_PDEATHSIG, signal.SIGKILL)
    _prctl(_CHILD_SUBREAPER, 1)  # orphans become children of this process, so that it can end them
    with contextlib.suppress(OSError), open('/proc/self/oom_score_adj', 'w') as file:
      file.write('1000')  # where the memory of the host is out, the kernel ends these processes before others
  woken, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  standing = ()
  if linux and _stands(lambda: _make_namespaces(network)):
    standing = ('descendants', 'signals', *(() if network else ('network',)))
  elif linux:  # nothing but this process ends the descendants: it is woken when its parent dies
    signal.signal(signal.SIGRTMIN, lambda *_: None)
    _prctl(_PDEATHSIG, signal.SIGRTMIN)
  child = os.fork()
  if not child:
    code = 1
    try:
      signal.set_wakeup_fd(-1)
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      os.close(woken)
      os.close(wake)
      os.setsid()
      if linux:
        _prctl(_PDEATHSIG, signal.SIGKILL)
      if standing and _stands(lambda: _make_mounts(folder, disk_mb)):
        standing += ('mounts',)
      code = start(standing)
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(code)
  select.select([lifeline, woken], [], [])
  os.kill(child, signal.SIGKILL)  # it is not reaped, so its number is still its own
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  end_descendants()
  return exit_status(code)


def exit_status(code: int) -> int:
  """A shell's exit status of a return code of subprocess, which is negative for a signal."""
  return code if code >= 0 else 128 - code


def end_descendants(seconds: float = 10.0) -> None:
  """Kills and reaps all children, and those of theirs that come to this process; gives up after so many seconds.

  It takes microseconds where there are no children.
  """
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    except ChildProcessError:
      return
    for child in [-1] if os.getpid() == 1 else _children():  # -1: all in the namespace but its first process
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(child, signal.SIGKILL)
    time.sleep(0.001)


def _children() -> list[int]:
  """The children of this process."""
  try:
    found = []
    for thread in os.listdir('/proc/self/task'):
      with open(f'/proc/self/task/{thread}/children') as file:
        found += file.read().split()
  except OSError:  # neither macOS nor all kernels have it
    done = subprocess.run(['ps', '-A', '-o', 'ppid=,pid='], capture_output=True, text=True, check=False)
    found = [pid for parent, pid in map(str.split, done.stdout.splitlines()) if int(parent) == os.getpid()]
  return [int(pid) for pid in found]


def _lower(limit: int, value: int) -> None:
  """Sets a limit of this process, and what it may raise it to, unless it is lower already."""
  _, hard = resource.getrlimit(limit)
  value = value if hard == resource.RLIM_INFINITY else min(value, hard)
  resource.setrlimit(limit, (value, value))


def _limit(limits: Limits) -> None:
  _lower(resource.RLIMIT_CORE, 0)
  _lower(resource.RLIMIT_FSIZE, limits.file_mb << 20)
  _lower(resource.RLIMIT_NOFILE, 256)
  if math.isfinite(limits.seconds):
    _lower(resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1)


def _limit_memory(limits: Limits) -> None:
  with open('/proc/self/statm') as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
  _lower(resource.RLIMIT_AS, used + (limits.memory_mb << 20))


def _limit_processes(limits: Limits, counted_alone: bool) -> bool:
  """Limits the processes; False: the kernel does not count those of root."""
  user, others = os.getuid(), 0
  if not counted_alone:  # the kernel counts all threads of the user
    for pid in filter(str.isdecimal, os.listdir('/proc')):
      with contextlib.suppress(OSError):
        others += len(os.listdir(f'/proc/{pid}/task')) if os.stat(f'/proc/{pid}').st_uid == user else 0
  _lower(resource.RLIMIT_NPROC, others + limits.processes)
  return user != 0


def _is_open_to_all(path: str, needed: int = 0o5) -> bool:
  """Whether the mode of a path has the bits `needed` for others, and whether others may search what is above it."""
  path = os.path.realpath(path)
  is_open = not needed & ~os.stat(path).st_mode & (0o4 if os.path.isfile(path) else 0o5)
  while is_open and path != '/':
    path = os.path.dirname(path)
    is_open = os.stat(path).st_mode & 0o1 > 0
  return is_open


def _leave_root(readable: Sequence[str], writable: Sequence[str], guarded: bool) -> bool:
  """Becomes a user that nothing else belongs to, without capabilities; whether this is no longer root.

  Where that user may not reach what it must, it keeps the capability to read any file, and Landlock restricts it to
  `readable`; without Landlock it stays root. guarded: whether Landlock and seccomp are there.
  """
  opened = all(_is_open_to_all(path) for path in readable if os.path.exists(path)) and all(
      _is_open_to_all(path, needed=0) for path in writable)
  for capability in range(64):
    if opened or capability != _DAC_READ_SEARCH:  # what is not in this set cannot be kept below
      with contextlib.suppress(OSError):
        _prctl(_CAPBSET_DROP, capability)
  with contextlib.suppress(OSError):
    _prctl(_SECUREBITS, 0b1111)  # programs of root get no capabilities, for good
  # The user of the program before it in the folder; else one that no other worker is, by its number outside.
  owners = [owner for path in writable if (owner := os.stat(path).st_uid) >= _STRANGERS]
  users = (*owners, _STRANGERS + int(os.readlink('/proc/self')), 65534)
  for user in users if opened or guarded else ():
    with contextlib.suppress(OSError):
      _prctl(_KEEPCAPS, 1)
      for path in writable:
        os.chown(path, user, user)
      os.setgroups([])
      os.setresgid(user, user, user)
      os.setresuid(user, user, user)
      break
  keeps = not opened and os.geteuid() != 0
  _set_capabilities(1 << _DAC_READ_SEARCH if keeps else 0)
  if keeps:
    _prctl(_CAP_AMBIENT, 2, _DAC_READ_SEARCH)  # programs that it starts keep it
  return os.geteuid() != 0


def _set_capabilities(kept: int) -> None:
  _call('capset', struct.pack('II', 0x20080522, 0), struct.pack('6I', kept, kept, kept, 0, 0, 0))


def _landlock_version() -> int:
  """0: there is none."""
  try:
    return _call('syscall', _LANDLOCK, None, 0, 1) if sys.platform == 'linux' else 0
  except OSError:
    return 0


def _restrict_files(readable: Sequence[str], writable: Sequence[str], network: bool) -> bool:
  """Allows reading and running of some files, all else in writable folders, by Landlock; False: there is none."""
  version = _landlock_version()
  if not version:
    return False
  every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
  read, of_files = 0b1101, 0b111 | 0b11 << 14
  scoped = 0 if version < 6 else 0b10 if network else 0b11  # signals, and connections to abstract sockets, stay inside
  ruleset = _call('syscall', _LANDLOCK, struct.pack('3Q', every, 0 if network else 0b11, scoped), 8 if version < 4 else
                  16 if version < 6 else 24, 0)
  for paths, access in ((readable, read), (writable, every), (['/dev/null'], 0b110)):
    for path in paths:
      with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = access if os.path.isdir(path) else access & of_files
        _call('syscall', _LANDLOCK + 1, ruleset, 1, struct.pack('=Qi', allowed & every, file), 0)
        os.close(file)
  _call('syscall', _LANDLOCK + 2, ruleset, 0)
  os.close(ruleset)
  return True


def _filter(network: bool, guarded: Sequence[int], guards_modes: bool) -> bytes:
  """The program of seccomp, in the machine of BPF. guarded: processes that get no signal; none of a group, then."""
  machine, column = _MACHINES[platform.machine()]
  refuse, allow = 0x00050000 | 1, 0x7FFF0000  # an error: EPERM
  step = lambda code, k, yes=0, no=0: struct.pack('HBBI', code, yes, no, k & 0xFFFFFFFF)
  load, equal, greater, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
  number, argument = 0, lambda i: 16 + 8 * i  # places in seccomp_data
  of = lambda calls: [pair[column] for pair in calls if pair[column] is not None]
  program = [step(load, 4), step(equal, machine, 1), step(end, 0x80000000), step(load, number)]
  if column == 0:
    program += [step(any_bit, 0x40000000, 0, 1), step(end, refuse)]  # the x32 names of the same calls
  refused = of(_REFUSED) + ([] if network else of([_SOCKET])) + (of(_MODES) if guards_modes else [])
  for call in refused:
    program += [step(equal, call, 0, 1), step(end, refuse)]
  program += [step(equal, _CLONE3, 0, 1), step(end, 0x00050000 | 38)]  # clone3: ENOSYS, and libc uses clone

  def check(calls, i, *tests):
    """Refuses calls if one of the tests (code, value) holds for the lower half of their argument i."""
    for call in of(calls):
      steps = [step(load, argument(i))]
      for code, value in tests:
        steps += [step(code, value, 0, 1), step(end, refuse)]
      program.extend([step(equal, call, 0, len(steps) + 1), *steps, step(load, number)])

  check([_CLONE], 0, (any_bit, _ANY_NAMESPACE))
  check([_IOCTL], 1, (equal, 0x5412), (equal, 0x541C))  # ioctl: typing into a terminal
  for calls in _OF_ANOTHER:  # all but 0 is another process
    check([calls], 0, (0x25, 0))
  if guarded:
    check(_KILLS, 0, (greater, 0x80000000), (equal, 0), *((equal, pid) for pid in guarded))
  program.append(step(end, allow))
  return b''.join(program)


def _ancestors() -> list[int]:
  found, pid = [1], os.getppid()
  while pid > 1:
    found.append(pid)
    pid = 0
    with contextlib.suppress(OSError), open(f'/proc/{found[-1]}/stat') as file:  # it is behind walls: they hold
      pid = int(file.read().rpartition(')')[2].split()[1])
  return found


def _refuse_calls(program: bytes) -> None:
  kept = ctypes.create_string_buffer(program, len(program))
  header = struct.pack('HxxxxxxQ', len(program) // 8, ctypes.addressof(kept))
  _call('prctl', _SECCOMP, 2, header, 0, 0)


def enter(limits: Limits, *, writable: Sequence[str], readable: Sequence[str], network: bool = False,
          standing: Sequence[str] = ()) -> tuple[str, ...]:
  """Puts the calling process, which has one thread, behind walls: walls.enter, where `readable` is all that is."""
  global _standing, _is_stranger
  found, is_first = set(standing) | (_standing or set()), _standing is None
  _limit(limits)
  if sys.platform == 'linux':
    has_filters, version, ancestors = platform.machine() in _MACHINES, _landlock_version(), _ancestors()
    _prctl(_CHILD_SUBREAPER, 1)
    if _stands(lambda: _limit_memory(limits)):
      found.add('memory')
    if os.geteuid() == 0:
      _is_stranger = _stands(lambda: _leave_root(readable, writable, has_filters and version > 0))
    if _is_stranger or os.geteuid() and (not is_first or _stands(lambda: _set_capabilities(0))):
      found.add('privileges')  # set_capabilities: those of a namespace of users
    _prctl(_DUMPABLE, 0)
    _prctl(_PDEATHSIG, signal.SIGKILL)  # again, as a change of the user clears it
    _prctl(_NO_NEW_PRIVS, 1)
    if _stands(lambda: _limit_processes(limits, _is_stranger or 'descendants' in found)):
      found.add('processes')
    if _stands(lambda: _restrict_files(readable, writable, network)):
      found |= {'files', 'signals'} if version >= 6 else {'files'}
    if _is_stranger:
      found.add('signals')
    if has_filters and _stands(lambda: _refuse_calls(
        _filter(network, () if 'signals' in found else ancestors, not _is_stranger and 'mounts' not in found))):
      found |= {'calls'} if network else {'calls', 'network'}
  _standing = frozenset(found)
  return tuple(name for name in WALLS if name in found)


def is_behind() -> bool:
  """Whether this process is behind walls."""
  return _standing is not None


def enter_program(limits: Limits, folder: str, readable: Sequence[str], standing: Sequence[str] = ()) -> None:
  """Puts the calling process behind walls, in a folder, just before it becomes another program."""
  enter(limits, writable=(folder,), readable=readable, standing=standing)
  if sys.platform == 'linux':
    _lower(resource.RLIMIT_AS, limits.memory_mb << 20)  # a program begins with no memory


def _main() -> int:
  """The program that walls.run starts: it confines the command of its arguments."""
  lifeline, limits, folder, readable = json.loads(sys.argv[1])
  os.set_inheritable(lifeline, False)

  def start(standing: tuple[str, ...]) -> int:
    # The first process of a namespace ignores most signals; the program is its child.
    program = os.fork()
    if not program:
      try:
        os.chdir(folder)  # again: there may be a mount on it
        enter_program(Limits(*limits), folder, readable, standing)
        os.execvp(sys.argv[2], sys.argv[2:])
      except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(127)
    return exit_status(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]))

  return confine(start, lifeline=lifeline, folder=folder)


if __name__ == '__main__':
  sys.exit(_main())
