"""Figures of result files. matplotlib is imported by the modules that draw, not by this one."""

FORMATS = ("png", "svg")
KINDS = ("time", "branches", "roofline", "reads", "history")
