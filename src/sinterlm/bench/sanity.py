"""Are the answers answers? What would make a fast server's figures worthless."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sinterlm.bench.raw import RequestRecord


def failure_of(records: Sequence[RequestRecord]) -> str | None:
    """Why a point cannot be used: a failed request, or an output of another length than asked."""
    failed = [record for record in records if not record.is_success]
    if failed:
        return f"{len(failed)} of {len(records)} requests failed; the first: {failed[0].error}"
    wrong = [record for record in records if record.output_len != record.asked_len]
    if wrong:
        first = wrong[0]
        return (
            f"{len(wrong)} of {len(records)} outputs have another length than asked: "
            f"{first.output_len} instead of {first.asked_len} tokens ({first.finish_reason}); the "
            "server ignores ignore_eos, or its context is too short"
        )
    return None


def remarks_on(records: Sequence[RequestRecord]) -> tuple[str, ...]:
    """What is odd, though it may be right: random prompts make strange answers."""
    texts = [record.text for record in records]
    remarks = []
    empty = sum(not text.strip() for text in texts)
    if empty * 2 > len(texts):
        remarks.append(f"{empty} of {len(texts)} answers are blank")
    most = Counter(texts).most_common(1)
    if len(texts) > 1 and most[0][1] * 2 > len(texts):
        remarks.append(f"{most[0][1]} of {len(texts)} answers are the same, to different prompts")
    single = sum(len(set(text)) == 1 and len(text) > 4 for text in texts)
    if single * 2 > len(texts):
        remarks.append(f"{single} of {len(texts)} answers repeat one character")
    return tuple(remarks)
