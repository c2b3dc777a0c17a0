"""Operations with a kernel for TPUs, one folder each; they import nothing else of kr_jax."""
