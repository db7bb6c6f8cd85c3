"""Shapes of dataflow, one per file."""
