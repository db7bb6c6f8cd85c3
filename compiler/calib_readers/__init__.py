"""Readers of data sets whose questions calibrate: one published format per file."""
