"""Device code. Imports triton: nothing outside this folder does, and nothing imports this folder before a first call."""
