"""Device code. Importing it imports triton, which nothing else here does: the operators do so when first called.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16 unless it is listed in `do_not_specialize`:
numbers that change with every batch are.
"""
