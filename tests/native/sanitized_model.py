"""Every path of a model's library; run by test_sanitized.py with a sanitizer preloaded."""

from __future__ import annotations

import pickle
import sys

import numpy as np

from sinterlm.errors import RuntimeFault
from sinterlm.runtime.batch import RowSampling
from tests.native.tiny import Tiny, prefill, step_batch


def main(path: str) -> None:
    with open(path, "rb") as file:
        tiny: Tiny = pickle.load(file)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 130, 90)]
    sampling = (
        RowSampling(num_logprobs=3),
        RowSampling(temperature=0.7, top_p=0.9, seed=1),
        RowSampling(temperature=0.7, top_k=5, repetition_penalty=1.1, output_tokens=np.int32([1])),
    )
    with tiny.open(num_threads=3, num_slots=2) as model:
        whole = prefill(model, ids, [9, 8, 7, 6, 5, 63], 64)
        assert prefill(model, ids, [0, 1, 2, 3, 4, 5], 13).tobytes() == whole.tobytes()
        batch = step_batch(
            ([0, 1], 16, ids[:3]), ([2], 0, ids[3:9]), rows=[0, 2, 8],
            sampling=sampling, max_logprobs=3, slots=[1, -1],
        )  # fmt: skip
        assert (model.step(batch).tokens >= 0).all()
        model.step(step_batch(([0, 1], 19, [-1]), slots=[1]))
        model.head(np.ones((70, tiny.config.hidden_size), np.float32))
        model.describe()
        try:
            model.step(step_batch(([64], 0, [1])))
        except RuntimeFault:
            model.alloc_kv(8, 32)


if __name__ == "__main__":
    main(sys.argv[1])
    print("done")
