"""What a config takes on a TPU slice, by the TPU compiler, and the knobs with which it fits."""

from kr_jax.preflight.preflight import Assumed, programs, run, setup, table
from kr_jax.preflight.suggest import advice, overridden, suggest
