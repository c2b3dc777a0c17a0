"""What `python -m kr_jax.main` is on a machine of the fake cloud: a stand-in of a training, or the real one.

The stand-in has the same face (its flags, the record, checkpoints, exit status), and learns nothing: `value` of a step
follows from that of the step before, so that a run that was resumed wrongly shows it. It runs for eight steps and
saves after each second one. $FAKE_TRAINING=real is the real one.

Rules of the plan: {"at": "step", "step": N, "host": I, "do": "preempt"}; or "exit", with a "code"; or "wait", which
ends by SIGTERM alone, and is of the stand-in.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.fakes import cloud

PORT = ':8476'


def flags_of(words: list[str]) -> dict[str, str]:
  return dict(word[2:].partition('=')[::2] for word in words)


def preempt() -> None:
  """Has the slice taken away, from outside of it, once somebody follows the run: this process does not survive."""
  while ' follow ' not in pathlib.Path(cloud.path('calls.jsonl')).read_text():
    time.sleep(0.02)
  environment = {name: x for name, x in os.environ.items() if name != 'FAKE_HOST'}
  code = (f'import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.fakes import cloud\n'
          'with cloud.opened() as there: cloud.preempt(there)')
  subprocess.Popen([sys.executable, '-S', '-E', '-c', code], env=environment, start_new_session=True)
  time.sleep(600)


def happens(step: int, process: int) -> None:
  """What the plan has for this step."""
  rule = cloud.planned('step', step=step, host=process)
  match rule['do'] if rule else '':
    case 'preempt':
      preempt()
    case 'exit':
      print(f'error: what the plan has for step {step}', flush=True)
      sys.exit(rule['code'])
    case 'wait':
      while not stopping:
        time.sleep(0.02)


def save(path: pathlib.Path, *x: int) -> None:
  path.with_suffix('.new').write_text(json.dumps(x))
  path.with_suffix('.new').replace(path)


stopping: list[int] = []


def train(flags: dict[str, str]) -> int:
  """Returns the exit status."""
  signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
  workdir, steps = pathlib.Path(flags['workdir']), 8
  process = int(flags.get('process', 0))
  if not workdir.is_absolute():
    print(f'error: --workdir={workdir}', flush=True)
    return 1
  workdir.mkdir(parents=True, exist_ok=True)
  metrics, saved = workdir / 'metrics.jsonl', workdir / 'checkpoint.json'
  step, value = json.loads(saved.read_text()) if saved.exists() else (0, 1)
  lines = metrics.read_text().splitlines(True)[:step] if metrics.exists() else []
  if not process:
    metrics.write_text(''.join(lines))
  while step < steps and not stopping:
    happens(step, process)
    value = (value * 31 + step) % 1009
    step += 1
    if not process:
      with metrics.open('a') as file:
        file.write(json.dumps({'step': step - 1, 'value': value}) + '\n')
      if step % 2 == 0:
        save(saved, step, value)
      print(f'train: {step} of {steps} steps, 0.1 s/step', file=sys.stderr, flush=True)
    else:  # in step with the first process, as collectives keep it
      while not stopping and (len(metrics.read_text().splitlines()) if metrics.exists() else 0) < step:
        time.sleep(0.01)
  if not process and stopping:
    save(saved, step, value)
  print('stopped, and saved' if stopping else f'done: {steps} steps', flush=True)
  return 75 if stopping else 0


def train_really(words: list[str]) -> None:
  """The main job, whose steps the plan may end. All machines are this one, so $FAKE_PORT stands for the usual port."""
  from absl import app
  from kr_jax import main
  from kr_jax import train as loop
  words = [word.replace(PORT, f':{os.environ["FAKE_PORT"]}') for word in words]
  process, original = int(flags_of(words).get('process', 0)), loop.train
  loop.train = lambda *given, **named: original(*given, **named | {
      'on_step': lambda line: 'loss' in line and happens(line['step'], process)})
  app.run(main.main, ['kr_jax', *words], flags_parser=main.parse)


if __name__ == '__main__':
  print(' '.join(sys.argv[1:]), flush=True)
  if os.environ.get('FAKE_TRAINING') == 'real':
    train_really(sys.argv[1:])
  sys.exit(train(flags_of(sys.argv[1:])))
