"""How the flags of benchmarks are spelled: counts, lists of counts, lists of batch sizes."""

from __future__ import annotations

import argparse

_MOST = 4096  #: sequences an engine takes


def parse_count(text: str) -> int:
    """A whole number, 1 or more, of at most nine digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers from ``128,512``, each once."""
    counts = tuple(parse_count(part) for part in text.split(","))
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return counts


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Numbers of sequences from ``1,8,32``."""
    sizes = parse_counts(text)
    if max(sizes) > _MOST:
        raise argparse.ArgumentTypeError(f"{max(sizes)} is more than {_MOST} sequences")
    return sizes
