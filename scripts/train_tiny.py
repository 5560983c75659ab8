"""Train the small Llama in ``tests/assets/tiny-llama`` that quantisation is judged on.

``make train-tiny`` runs it: one thread, resumed from its last checkpoint when it was stopped. The
text is the King James Bible in ``text.txt.xz``; four of its books are held out, in ``heldout.txt``.
Needs torch and transformers; nothing at run time does.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent / "tests" / "assets" / "tiny-llama"
#: Never seen in training: what perplexity and KL are measured on.
HELD_OUT = ("Ruth", "Ecclesiastes", "Jonah", "James")
VOCAB, END = 2048, "<|endoftext|>"
WINDOW, BATCH = 256, 8  #: tokens of a training window; windows of a step
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 40, 0.1


def main() -> None:
    """Tokenizer, training, weights and the record of how they came about."""
    args = _arguments()
    torch.set_num_threads(1)  # one thread, one order of sums
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    training, held_out = split_books(lzma.decompress(args.text.read_bytes()).decode())
    tokenizer = train_tokenizer(training)
    windows = cut(encode(tokenizer, training))
    model = LlamaForCausalLM(config())
    losses = train(model, windows, args)
    if args.until is not None:
        return
    test = cut(encode(tokenizer, held_out))
    write(args.out, tokenizer, model, held_out)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": windows.numel(),
        "steps": args.steps,
        "tokens_per_step": WINDOW * BATCH,
        "last_training_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "heldout_tokens": test.numel(),
        "heldout_loss": round(loss_on(model, test), 4),
        "heldout_unigram_loss": round(unigram_loss(windows, test), 4),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=ROOT / "text.txt.xz")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("build/train-tiny"), help="checkpoints")
    parser.add_argument("--steps", type=int, default=370, help="that the learning rate is for")
    parser.add_argument("--until", type=int, help="stop at the checkpoint of this step")
    return parser.parse_args()


def config() -> LlamaConfig:
    """5.2 million parameters; widths that groups of 32, 64 and 128 divide, and tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def split_books(text: str) -> tuple[str, str]:
    """The text without and with the held-out books. A chapter begins with a line ``Ruth 1``."""
    parts = re.split(r"(?m)^((?:\d )?[A-Z][A-Za-z ]+) (\d+)$", text)
    training: list[str] = []
    held_out: list[str] = []
    for book, chapter, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        chosen = held_out if book in HELD_OUT else training
        chosen.append(f"{book} {chapter}\n\n{body.strip()}\n\n")
    return "".join(training), "".join(held_out)


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE of VOCAB tokens, END first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Token ids [n]; END between chapters."""
    chapters = re.split(r"(?m)(?=^(?:\d )?[A-Z][A-Za-z ]+ \d+$)", text)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([chapter for chapter in chapters if chapter]):
        ids += [0, *encoding.ids]
    return torch.tensor(ids)


def cut(ids: torch.Tensor) -> torch.Tensor:
    """[n, WINDOW + 1]: neighbours share a token, which one predicts and the next one reads."""
    return ids.unfold(0, WINDOW + 1, WINDOW)


def train(model: Any, windows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """AdamW over shuffled windows; returns the loss of every step."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY},
              {"params": others, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    epochs = -(-args.steps * BATCH // len(windows))
    order = torch.cat([torch.randperm(len(windows)) for _ in range(epochs)])
    losses: list[float] = []
    saved = args.work / "checkpoint.pt"
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    began = time.monotonic()
    for step in range(len(losses), args.until or args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        batch = windows[order[step * BATCH : (step + 1) * BATCH]]
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 49:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"losses": losses}, saved)
            mean = sum(losses[-50:]) / 50
            print(f"step {step + 1}: {mean:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return losses


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    along = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean −log p of the tokens after the first of each window [n, WINDOW + 1], nats."""
    logits = model(batch[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def loss_on(model: Any, windows: torch.Tensor) -> float:
    """The same over all windows, each by itself."""
    with torch.no_grad():
        losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(BATCH)]
    return float(sum(losses)) / len(windows)


def unigram_loss(training: torch.Tensor, test: torch.Tensor) -> float:
    """Mean −log of each token's share of the training text (add-one), nats."""
    counts = torch.bincount(training.reshape(-1), minlength=VOCAB).double() + 1
    return float(-torch.log(counts / counts.sum())[test.reshape(-1)].mean())


def write(folder: Path, tokenizer: Tokenizer, model: Any, held_out: str) -> None:
    """The model as a Hugging Face directory in bf16, and the held-out text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)  # what is left is what was written
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
