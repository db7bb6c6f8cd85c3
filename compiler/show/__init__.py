"""Renderings of one list of rows."""
