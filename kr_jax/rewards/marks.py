from kr_jax.answers.marks import extract, raw, trim, box  # moved to kr_jax/answers
