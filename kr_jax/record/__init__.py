"""What a run leaves: metrics, report, checkpoints; and `read`, which gives it as numpy columns."""


def __getattr__(name: str):
  if name in ('read', 'Run', 'Columns'):
    from kr_jax import reader  # it stands above this folder, whose face shows it
    return getattr(reader, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
