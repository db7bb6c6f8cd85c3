"""Mutants: is what is done wrong on purpose caught?

``python -m benchmarks.mutants [--only WORDS]`` does every rewrite and every capture wrong in every way listed, on at
least three families where so many have what is lost, and prints how many the proofs caught. 1 when one got through.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from . import mutant_captures, mutant_rewrites
from .records import record, table

Kill = Callable[[], str]


def mutants() -> Iterator[tuple[str, str, Kill]]:
    """Name, family, and what says how it was caught (empty where it was not)."""
    for mutant in mutant_rewrites.MUTANTS:
        for family in mutant.families:
            yield mutant.name, family, lambda m=mutant, f=family: mutant_rewrites.killed_by(m, f)
    for capture in mutant_captures.MUTANTS:
        for family in capture.families:
            yield capture.name, family, lambda m=capture, f=family: mutant_captures.killed_by(m, f)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all, print the table; 1 when a mutant was let through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="mutants with these words in their name")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, bool]] = {}
    for name, family, kill in mutants():
        if options.only in name:
            found.setdefault(name, {})[family] = bool(kill())
    if not found:
        parser.error(f"no mutant has {options.only!r} in its name")
    table("mutants", [
        {"mutant": name, "families": " ".join(f if ok else f"{f.upper()}!" for f, ok in families.items()),
         "killed": f"{sum(families.values())}/{len(families)}"}
        for name, families in found.items()
    ])  # fmt: skip
    killed, count = sum(sum(f.values()) for f in found.values()), sum(map(len, found.values()))
    print(f"{killed} of {count} killed (bar: all)")
    record("mutants", {"mutants": len(found), "killed": killed, "of": count, "met": killed == count})
    return 0 if killed == count else 1


if __name__ == "__main__":
    raise SystemExit(main())
