"""Knobs of where data come from."""

import dataclasses

import pytest

from kr_jax import data_knobs
from kr_jax import knobs


def test_they_are_sections_of_the_section_of_tasks():
  for name, cls in (('files', data_knobs.Files), ('columns', data_knobs.Columns),
                    ('reasoning_gym', data_knobs.ReasoningGym)):
    assert getattr(knobs.Tasks(), name) == cls() and cls.SECTION == f'tasks.{name}'


@pytest.mark.parametrize('field', dataclasses.fields(data_knobs.Files), ids=lambda field: field.name)
def test_a_file_is_a_path(field):
  with pytest.raises(ValueError, match=f'tasks.files.{field.name}=.* names no bucket'):
    data_knobs.Files(**{field.name: 'gs://'})


def test_two_seeds_of_tasks_are_two_sets():
  with pytest.raises(ValueError, match='tasks.reasoning_gym.seed=-1'):  # of which random.Random makes 1
    data_knobs.ReasoningGym(seed=-1)
