"""The report of a compile: what it did and what came of it, as one page."""
