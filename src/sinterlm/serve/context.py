"""Context: what every endpoint works with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinterlm.options import ServeOptions
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.served import ServedModel

if TYPE_CHECKING:
    Numbers = itertools.count[int]


@dataclass(frozen=True)
class Context:
    """One served model and what stands around it; made once, by ``build_app``."""

    bridge: Bridge
    served: ServedModel
    options: ServeOptions
    metrics: Metrics
    numbers: Numbers  #: makes the engine's request ids unique where clients repeat theirs
