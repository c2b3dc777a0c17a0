"""Exit statuses of kr_jax.main, for whoever starts it. 0 is a run that is complete."""

FAILED = 1  # an error that a new start does not mend; a preflight of what does not fit
WRONG_USAGE = 2  # flags
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a new start of the same command mends it
INTERRUPTED = 130  # Ctrl-C
