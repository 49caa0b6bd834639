"""From which lengths a backend pays on this machine: measured, judged, and written down as a profile."""

from nsa_routing.tuning._tune import COLUMNS, LEAST_REPEATS, LENGTHS, PREFILL_OPS, Tuned, TuningError, tune
from nsa_routing.tuning.findings import SPEEDUP

__all__ = ["COLUMNS", "LEAST_REPEATS", "LENGTHS", "PREFILL_OPS", "SPEEDUP", "Tuned", "TuningError", "tune"]
