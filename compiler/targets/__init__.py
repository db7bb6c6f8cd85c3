"""Targets: who loads the result. They are found through the entry points ``qc.targets``."""
