"""KV pages: who holds which, which are free, and what is in them. Pure bookkeeping over page ids.

Pages are reference-counted. A full page may be given a digest, the name of its content; a free page
keeps its content, and can be found by that name, until it is handed out again. Pages without a name
are handed out first, then those least recently freed.
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
    digest: bytes | None = None  #: of its content and all before it; None = cannot be found


class PagePool:
    """``num_pages`` pages of ``page_tokens`` tokens each."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages >= 1 and page_tokens >= 1
        self.page_tokens = page_tokens
        self._pages = [Page(i) for i in range(num_pages)]
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_pages))
        self._found_by: dict[bytes, int] = {}
        self._num_cached = 0

    @property
    def num_pages(self) -> int:
        """All pages, free or held."""
        return len(self._pages)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Free pages whose content can still be found."""
        return self._num_cached

    def pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` cached tokens take."""
        return -(-num_tokens // self.page_tokens)

    def can_allocate(self, num_pages: int) -> bool:
        """Whether ``allocate(num_pages)`` would succeed."""
        return num_pages <= len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Take ``num_pages`` free pages, each with one reference; what was in them is forgotten.

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
            if page.digest is not None:
                del self._found_by[page.digest]
                page.digest = None
                self._num_cached -= 1
            page.ref_count = 1
            taken.append(page_id)
        return taken

    def share(self, page_ids: Iterable[int]) -> None:
        """Take one more reference to each page; a free page leaves the free list as it is."""
        for page_id in page_ids:
            page = self._pages[page_id]
            if page.ref_count == 0:
                del self._free[page_id]
                self._num_cached -= page.digest is not None
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
                if page.digest is None:
                    self._free.move_to_end(page_id, last=False)
                else:
                    self._num_cached += 1

    def ref_count(self, page_id: int) -> int:
        """Current number of holders of a page."""
        return self._pages[page_id].ref_count

    # -- content ---------------------------------------------------------------------------------

    def find(self, digest: bytes) -> int | None:
        """The page, held or free, whose content has that name."""
        return self._found_by.get(digest)

    def name(self, page_id: int, digest: bytes) -> None:
        """Say what is in a page that somebody holds. A name that another page has stays there."""
        page = self._pages[page_id]
        assert page.ref_count > 0 and page.digest is None, f"page {page_id} cannot be named"
        if digest not in self._found_by:
            self._found_by[digest] = page_id
            page.digest = digest

    def forget(self) -> None:
        """No page can be found any more; who holds which stays as it is."""
        for page_id in self._found_by.values():
            self._pages[page_id].digest = None
        self._found_by.clear()
        self._num_cached = 0
