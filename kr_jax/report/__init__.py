"""What people read of a run, or of several: a summary, a page, and the figures on it."""
