"""A leaky rectifier as an op of its own, and what qc needs to compile models that have it."""
