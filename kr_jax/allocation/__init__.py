"""How many rollouts each task gets: all that another trainer can use alone. README.md shows how."""

from kr_jax.allocation.allocate import budgets, expected_gradient_ratio, expected_mixed_tasks, objective
from kr_jax.allocation.estimate import init as init_stats
from kr_jax.allocation.estimate import observe, posterior, window
from kr_jax.allocation.estimate import tokens as expected_tokens
from kr_jax.allocation.value import Beta, Value, Window
from kr_jax.allocation.value import expected as expected_value
from kr_jax.allocation.value import prob_nonzero_gradient
