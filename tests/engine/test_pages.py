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
    """A pool beside a plain count of who holds what."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 16)
        self.model = [0] * NUM_PAGES
        self.freed: list[int] = list(range(NUM_PAGES))  # free pages, least recently freed first

    @rule(target=holdings, count=st.integers(0, NUM_PAGES + 1))
    def allocate(self, count: int) -> list[int]:
        if count > len(self.freed):
            assert not self.pool.can_allocate(count)
            with pytest.raises(ResourceError, match=str(count)):
                self.pool.allocate(count)
            return []
        assert self.pool.can_allocate(count)
        pages = self.pool.allocate(count)
        assert pages == self.freed[:count], "least recently freed first"
        del self.freed[:count]
        for page in pages:
            self.model[page] += 1
        return pages

    @rule(target=holdings, pages=holdings)
    def share(self, pages: list[int]) -> list[int]:
        # The pages may have been freed meanwhile: then they are revived, content and all.
        pages = [p for p in pages if self.model[p] or p in self.freed]
        self.pool.share(pages)
        for page in pages:
            self.model[page] += 1
            if page in self.freed:
                self.freed.remove(page)
        return pages

    @rule(pages=consumes(holdings))
    def release(self, pages: list[int]) -> None:
        pages = [p for p in pages if self.model[p] > 0]
        self.pool.release(pages)
        for page in reversed(pages):
            self.model[page] -= 1
            if self.model[page] == 0:
                self.freed.append(page)

    @invariant()
    def counts_agree(self) -> None:
        assert [self.pool.ref_count(i) for i in range(NUM_PAGES)] == self.model
        assert self.pool.num_free == len(self.freed) == self.model.count(0)


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
