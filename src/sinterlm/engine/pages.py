"""KV pages: who holds which, and which are free. Pure bookkeeping over page ids.

Built for prefix caching: pages are reference-counted, free pages keep their content until they are
handed out again (least recently freed first), and each page has a slot for the hash of its content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from sinterlm.errors import ResourceError


@dataclass(slots=True, eq=False)
class Page:
    """One page of the pool."""

    page_id: int
    ref_count: int = 0  #: requests whose page table names it
    content_hash: int | None = None  #: set by prefix caching; None = content not shareable


class PagePool:
    """``num_pages`` pages of ``page_tokens`` tokens each."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages >= 1 and page_tokens >= 1
        self.page_tokens = page_tokens
        self._pages = [Page(i) for i in range(num_pages)]
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_pages))

    @property
    def num_pages(self) -> int:
        """All pages, free or held."""
        return len(self._pages)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` cached tokens take."""
        return -(-num_tokens // self.page_tokens)

    def can_allocate(self, num_pages: int) -> bool:
        """Whether ``allocate(num_pages)`` would succeed."""
        return num_pages <= len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Take ``num_pages`` free pages, least recently freed first, each with one reference.

        Raises ResourceError when there are not that many; nothing is taken then.
        """
        if not self.can_allocate(num_pages):
            raise ResourceError(
                f"{num_pages} KV pages asked for, {self.num_free} of {self.num_pages} are free"
            )
        taken = []
        for _ in range(num_pages):
            page_id, _ = self._free.popitem(last=False)
            page = self._pages[page_id]
            page.ref_count, page.content_hash = 1, None
            taken.append(page_id)
        return taken

    def share(self, page_ids: Iterable[int]) -> None:
        """Take one more reference to each page; a free page leaves the free list as it is."""
        for page_id in page_ids:
            page = self._pages[page_id]
            if page.ref_count == 0:
                del self._free[page_id]
            page.ref_count += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """Give one reference back per page; the last one frees the page.

        Freed from the tail of the sequence: its head, the part another prompt is likelier to
        share, is then reused last.
        """
        for page_id in reversed(list(page_ids)):
            page = self._pages[page_id]
            assert page.ref_count > 0, f"page {page_id} released more often than taken"
            page.ref_count -= 1
            if page.ref_count == 0:
                self._free[page_id] = None

    def ref_count(self, page_id: int) -> int:
        """Current number of holders of a page."""
        return self._pages[page_id].ref_count
