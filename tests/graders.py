"""Verifiers for tests. A worker imports this module, so it imports nothing that takes seconds."""


def has_a_one(completion, task):
  """A reward that a policy of a few steps can earn: any completion with a 1 in it, on half the tasks."""
  return '1' in completion and int(task.answer) % 2 == 0


def shaped(completion, task):
  """A verdict, and a reward that is never above 0."""
  return has_a_one(completion, task), -1 - len(completion)


def abstains(completion, task):
  """No verdict on some tasks."""
  return None if int(task.answer) % 4 else has_a_one(completion, task)


def abstains_at_times(completion, task):
  """No verdict on some completions."""
  return None if len(completion) % 3 == 0 else has_a_one(completion, task)


def right_or_nothing(completion, task):
  """Right, or on half of the completions nothing."""
  return True if len(completion) % 2 else None


def never(completion, task):
  """A verifier of tasks that are too hard: what it reads is an answer, and is never right."""
  return False


def even(completion, task):
  return len(completion) % 2 == 0


def even_or_nothing(completion, task):
  """A verdict that every fifth length has none of."""
  return None if len(completion) % 5 == 0 else even(completion, task)
