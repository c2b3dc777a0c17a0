"""How many rollouts each task gets: what another trainer can use alone."""

from kr_jax.allocation.allocate import budgets, expected_gradient_ratio, expected_mixed_tasks, objective
from kr_jax.allocation.value import Beta, Window
