"""RankLink: one rank's way to the others, for models that are shared out among several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sinterlm.runtime.batch import Float32
from sinterlm.runtime.library import REDUCE

#: Replaces an array [n] float32 by the sum over all ranks' arrays, in place; the same bits on each.
AllReduce = Callable[[Float32], None]


class _Borrowed:
    """``count`` floats at an address, for NumPy. ``ctypes`` would keep a type for every count."""

    def __init__(self, address: int, count: int) -> None:
        self.__array_interface__ = {
            "data": (address, False), "shape": (count,), "typestr": np.dtype(np.float32).str,
            "version": 3,
        }  # fmt: skip


class RankLink:
    """``sl_reduce`` of abi.h over a Python function, and what that function raised."""

    def __init__(self, rank: int, all_reduce: AllReduce) -> None:
        """``rank`` in [0, number of ranks); 0 brings the residual stream into the sums.

        ``all_reduce`` runs in the thread that runs the step, twice a layer. A Model keeps its link.
        """
        self.rank = rank
        self.error: BaseException | None = None  #: what ended the last step that failed
        self._all_reduce = all_reduce
        self.callback = REDUCE(self._reduce)

    def _reduce(self, context: int | None, data: int, count: int) -> int:
        """Nothing may be raised through C: a failure is kept, and 1 returned."""
        try:
            self._all_reduce(np.asarray(_Borrowed(data, count)))
        except BaseException as exc:  # KeyboardInterrupt as well: it ends the step
            self.error = exc
            return 1
        return 0
