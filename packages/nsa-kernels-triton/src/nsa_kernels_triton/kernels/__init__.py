"""Device code. Importing it imports triton, which nothing else here does: the operators do so when first called."""
