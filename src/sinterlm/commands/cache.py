"""``sinterlm cache ls | prune | verify``: the words around ``artifact.housekeeping``."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from sinterlm.commands.flags import HELP, parse_folder, parse_size
from sinterlm.errors import UsageError

if TYPE_CHECKING:
    from sinterlm.artifact.cache import Cache

_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument(
        "action",
        choices=("ls", "prune", "verify"),
        help="ls: what there is; prune: make room; verify: read and compare hashes "
        "(exit code 1 when something is damaged)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--cache-dir", type=parse_folder, metavar="DIR", help=HELP["cache_dir"])
    group = parser.add_argument_group(
        "prune", "without a limit only leftovers of killed processes are removed"
    )
    group.add_argument(
        "--older-than-days", type=float, metavar="N", help="remove what was not used for N days"
    )
    group.add_argument(
        "--max-bytes",
        type=parse_size,
        metavar="SIZE",
        help="then remove the least recently used beyond SIZE (2G, 500M)",
    )
    group.add_argument("--all", action="store_true", help="remove everything not in use")


def run(args: argparse.Namespace) -> int:
    """Do the action; 1 when ``verify`` found damage. Raises UsageError for misplaced limits."""
    from sinterlm.artifact.cache import Cache, locate_cache

    limits = (args.older_than_days, args.max_bytes, args.all or None)
    if args.action != "prune" and any(limit is not None for limit in limits):
        raise UsageError("--older-than-days, --max-bytes and --all belong to `cache prune`")
    if args.older_than_days is not None and not args.older_than_days >= 0:
        raise UsageError(f"--older-than-days {args.older_than_days} must be 0 or more")
    if args.max_bytes is not None and args.max_bytes < 0:
        raise UsageError(f"--max-bytes {args.max_bytes} must be 0 or more")
    cache = Cache.at(locate_cache(args.cache_dir))
    if cache.root.exists() and not cache.root.is_dir():
        raise UsageError(f"--cache-dir {cache.root} is a file; give the folder of a cache")
    if args.action == "ls":
        return _ls(cache, args.json)
    if args.action == "prune":
        return _prune(cache, args)
    return _verify(cache, args.json)


def _ls(cache: Cache, as_json: bool) -> int:
    from sinterlm.artifact.housekeeping import list_entries
    from sinterlm.artifact.storage import show_bytes
    from sinterlm.commands.ui import print_table

    entries = list_entries(cache)
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        print(
            json.dumps(
                {
                    "cache_dir": str(cache.root),
                    "bytes": total,
                    "entries": [asdict(entry) for entry in entries],
                }
            )
        )
        return 0
    if not entries:
        print(f"{cache.root} is empty")
        return 0
    rows = [(e.kind, e.key[:12], e.model, show_bytes(e.nbytes), _ago(e.last_used)) for e in entries]
    print_table(
        f"{cache.root}: {show_bytes(total)}",
        ["kind", "key", "model", "size", "last used"],
        rows,
        right=(3,),
    )
    return 0


def _ago(when: float) -> str:
    """``3 hours ago`` from seconds since 1970."""
    age = max(0.0, time.time() - when)
    for unit, seconds in _UNITS:
        if age >= 2 * seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return "just now"


def _prune(cache: Cache, args: argparse.Namespace) -> int:
    from sinterlm.artifact.housekeeping import prune
    from sinterlm.artifact.storage import show_bytes

    done = prune(cache, args.older_than_days, args.max_bytes, args.all)
    if args.json:
        print(json.dumps(asdict(done)))
        return 0
    print(f"removed {len(done.removed)} entries, freed {show_bytes(done.freed_bytes)}")
    for entry in done.in_use:
        print(f"kept {entry.kind}/{entry.key[:12]} ({entry.model}): in use by another process")
    return 0


def _verify(cache: Cache, as_json: bool) -> int:
    from sinterlm.artifact.housekeeping import list_entries, verify
    from sinterlm.commands.ui import TerminalProgress

    entries = list_entries(cache)
    with TerminalProgress() as progress:
        progress.stage("read every byte", sum(entry.nbytes for entry in entries), "B")
        problems = verify(cache, progress.advance)
    if as_json:
        rows = [{**asdict(problem), "path": str(problem.path)} for problem in problems]
        print(json.dumps({"checked": len(entries), "problems": rows}))
    else:
        for problem in problems:
            print(f"{problem.kind}/{problem.key[:12]}: {problem.message}")
        print(f"{len(entries)} entries checked, {len(problems)} damaged")
        if problems:
            print("a damaged entry is rebuilt at its next use")
    return 1 if problems else 0
