"""How many of the reference answers Hugging Face transformers itself gives in bf16.

.venv-goldens/bin/python scripts/transformers_bf16.py     (after `make goldens`; needs torch)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sinterlm.frontend.source import find_smollm2

ANSWERS = Path(__file__).parent.parent / "tests/goldens/smollm2_answers.json"


def main() -> None:
    """Answer every prompt greedily; list where an answer parts from fp32, and by which margin."""
    gguf = find_smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.to(torch.bfloat16).eval()
    answers = json.loads(ANSWERS.read_text("utf-8"))["answers"]
    margins = []
    for answer in answers:
        prompt, want = torch.tensor([answer["prompt_token_ids"]]), answer["token_ids"]
        with torch.no_grad():
            out = model.generate(prompt, max_new_tokens=len(want), do_sample=False, pad_token_id=0)
        got = out[0, prompt.shape[1] :].tolist()
        if got != want:
            step = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            margins.append(answer["margins"][step])
            print(f"{answer['prompt']!r} at token {step}, margin {margins[-1]:.4f}", flush=True)
    wide = sum(m >= 0.1 for m in margins)
    print(f"{len(margins)} of {len(answers)} prompts part, {wide} at a margin of 0.1 or more")


if __name__ == "__main__":
    main()
