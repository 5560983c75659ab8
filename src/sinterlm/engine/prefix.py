"""Prefix caching: full pages of KV are found again by what is in them, and shared.

A page's name is a SHA-256 over the name of the page before it and its own token ids, so equal names
mean equal histories; the chain starts from the request's ``cache_salt``, so that requests of
different salts never share. Only what is in the page decides, never who computed it: that is safe
because position p has the same bits however it was computed (docs/numerics.md).
"""

from __future__ import annotations

import hashlib

from sinterlm.engine.pages import PagePool
from sinterlm.engine.request import Request
from sinterlm.engine.stats import Counters


def root_digest(cache_salt: str | None) -> bytes:
    """The name of the empty history, one per salt."""
    salt = b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"sinterlm prefix 1\0" + salt).digest()


class PrefixCache:
    """Looks up and names the pages of ``pool``. When not ``enabled`` it never finds any."""

    def __init__(self, pool: PagePool, counters: Counters, *, enabled: bool) -> None:
        self._pool = pool
        self._counters = counters
        self._enabled = enabled

    def find(self, request: Request) -> list[int]:
        """Pages that hold what follows the request's computed whole pages, in order.

        At least one token is left to compute, and every one whose prompt logprob is wanted.
        """
        if not self._enabled:
            return []
        size, unscored = self._pool.page_tokens, request.unscored
        most = (unscored.start if unscored else request.num_tokens - 1) // size
        pages = []
        for digest in self._digests(request, most)[request.num_computed // size :]:
            page_id = self._pool.find(digest)
            if page_id is None:
                break
            pages.append(page_id)
        return pages

    def adopt(self, request: Request, found: list[int]) -> None:
        """Give a request the pages of ``find`` in place of its own, and what is in them."""
        size = self._pool.page_tokens
        first = request.num_computed // size
        end = first + len(found)
        self._pool.share(found)
        self._pool.release(request.pages[first:end])
        request.pages[first:end] = found
        request.table_filled = min(request.table_filled, first)
        if request.num_preemptions == 0:
            request.num_cached += end * size - request.num_computed
            self._counters.prefix_hits += end * size - request.num_computed
        request.num_computed, request.num_named = end * size, end

    def count(self, request: Request) -> None:
        """Book the first start of a request."""
        if self._enabled:
            self._counters.prefix_queries += request.num_tokens

    def name_pages(self, request: Request, num_tokens: int) -> None:
        """Let the request's full pages among its first ``num_tokens`` tokens be found.

        Their KV must be computed, or be computed by the very next step: a step writes the KV of
        all its tokens, layer by layer, before any of them is read.
        """
        if not self._enabled:
            return
        full = num_tokens // self._pool.page_tokens
        if full > request.num_named:
            digests = self._digests(request, full)
            for i in range(request.num_named, full):
                self._pool.name(request.pages[i], digests[i])
            request.num_named = full

    def _digests(self, request: Request, num_pages: int) -> list[bytes]:
        """Names of the first ``num_pages`` pages; each page is hashed once in a request's life."""
        digests, size = request.page_digests, self._pool.page_tokens
        name = digests[-1] if digests else request.group.cache_root
        for i in range(len(digests), num_pages):
            tokens = request.tokens.slice(i * size, (i + 1) * size)
            name = hashlib.sha256(name + tokens.tobytes()).digest()
            digests.append(name)
        return digests[:num_pages]
