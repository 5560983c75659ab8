"""Refuses by name the models that no GPU kernel fits."""

from __future__ import annotations

from sinterlm.backends.gpu.operands import unsupported
from sinterlm.errors import UnsupportedModelError
from sinterlm.ir.plan import Plan


def check_shape(plan: Plan) -> None:
    """Raises UnsupportedModelError where the kernels' tiles do not fit the model."""
    c = plan.graph.config
    rules = (
        (c.head_dim in (32, 64, 128), f"head_dim {c.head_dim}", "32, 64 or 128"),
        (c.hidden_size % 64 == 0, f"hidden_size {c.hidden_size}", "a multiple of 64"),
        (c.num_heads * c.head_dim % 64 == 0, f"{c.num_heads} heads of {c.head_dim}",
         "a multiple of 64 together"),
        (c.group_size <= 64, f"{c.group_size} query heads per KV head", "at most 64"),
    )  # fmt: skip
    for holds, have, need in rules:
        if not holds:
            raise UnsupportedModelError(
                f"{have} is not supported on a GPU; it must be {need}. `--target cpu` takes it"
            )
    for name, form in plan.graph.formats.items():
        wrong = unsupported(form)
        if wrong is not None:
            raise UnsupportedModelError(
                f"{name} has {wrong}, which no GPU kernel reads; give --quantization int4 to store "
                "it anew, or --target cpu"
            )
