"""How many rollouts each task gets: all that another trainer can use alone. README.md shows how."""

from kr_jax.allocation.allocate import budgets, expected_gradient_ratio, expected_mixed_tasks, objective
from kr_jax.allocation.allocator import Allocator
from kr_jax.allocation.estimate import init as init_stats, observe, posterior, tokens as expected_tokens, window
from kr_jax.allocation.value import Beta, Group, Value, Window, expected as expected_value, prob_nonzero_gradient

Posterior = Beta  # what is known of success rates: Posterior(successes + 0.5, failures + 0.5)
