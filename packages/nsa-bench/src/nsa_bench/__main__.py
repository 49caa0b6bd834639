"""`python -m nsa_bench` is the command `nsa-bench`."""

from nsa_bench.cli import app

app()
