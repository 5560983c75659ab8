"""The page pool's invariants under any sequence of allocations, shares and releases."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sinterlm.engine.pages import PagePool
from sinterlm.errors import ResourceError

NUM_PAGES = 7


class Pool(RuleBasedStateMachine):
    """A pool beside a plain count of who holds what, and a plain list of what is in each page."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 16)
        self.model = [0] * NUM_PAGES
        self.names: list[bytes | None] = [None] * NUM_PAGES
        self.nameless: list[int] = list(range(NUM_PAGES))  # free pages, the next one first
        self.named: list[int] = []  # free pages, least recently freed first

    @rule(target=holdings, count=st.integers(0, NUM_PAGES + 1))
    def allocate(self, count: int) -> list[int]:
        free = self.nameless + self.named
        if count > len(free):
            assert not self.pool.can_allocate(count)
            with pytest.raises(ResourceError, match=str(count)):
                self.pool.allocate(count)
            return []
        assert self.pool.can_allocate(count)
        pages = self.pool.allocate(count)
        assert pages == free[:count], "nameless first, then least recently freed"
        self.nameless, self.named = self.nameless[count:], free[max(count, len(self.nameless)) :]
        for page in pages:
            self.model[page] += 1
            self.names[page] = None
        return pages

    @rule(target=holdings, pages=holdings)
    def share(self, pages: list[int]) -> list[int]:
        # The pages may have been freed meanwhile: then they are revived, content and all.
        self.pool.share(pages)
        for page in pages:
            self.model[page] += 1
            for free in (self.nameless, self.named):
                if page in free:
                    free.remove(page)
        return pages

    @rule(pages=consumes(holdings))
    def release(self, pages: list[int]) -> None:
        pages = [p for p in pages if self.model[p] > 0]
        self.pool.release(pages)
        for page in reversed(pages):
            self.model[page] -= 1
            if self.model[page] == 0 and self.names[page] is None:
                self.nameless.insert(0, page)
            elif self.model[page] == 0:
                self.named.append(page)

    @rule(pages=holdings, name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, pages: list[int], name: bytes) -> None:
        for page in pages:
            if self.model[page] and self.names[page] is None:
                self.pool.name(page, name)
                if name not in self.names:
                    self.names[page] = name

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.names = [None] * NUM_PAGES
        self.nameless, self.named = self.nameless + self.named, []

    @invariant()
    def counts_agree(self) -> None:
        assert [self.pool.ref_count(i) for i in range(NUM_PAGES)] == self.model
        assert self.pool.num_free == len(self.nameless + self.named) == self.model.count(0)
        assert self.pool.num_cached == len(self.named)

    @invariant()
    def content_is_found(self) -> None:
        for name in (b"a", b"b", b"c", b"d"):
            found = self.pool.find(name)
            assert (found is None) == (name not in self.names)
            assert found is None or self.names[found] == name


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def test_releasing_too_often_is_our_own_bug() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(1, 16).pages_for(tokens) == pages
