from kr_jax.answers import canonical, same, extract, raw, trim  # moved to kr_jax/answers
