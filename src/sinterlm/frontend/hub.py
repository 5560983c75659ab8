"""Fetching a checkpoint from the Hugging Face Hub: config, text files and safetensors only.

Pickle files are never downloaded. ``HF_HUB_OFFLINE`` and the other Hub variables are respected.
"""

from __future__ import annotations

import re
from pathlib import Path

from sinterlm.artifact.progress import Progress
from sinterlm.errors import CheckpointError

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: Not every ``*.safetensors``: some repositories hold the same weights twice, under other names.
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


def looks_like_hub_id(model: str) -> bool:
    """Whether ``model`` has the form ``org/name``."""
    part = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
    return re.fullmatch(f"{part}/{part}", model) is not None


def fetch_from_hub(
    model: str, revision: str | None, *, weights: bool = True, progress: Progress | None = None
) -> Path:
    """Directory of the snapshot of ``model``, downloaded where it is not cached yet.

    ``weights=False`` leaves the safetensors out. Raises CheckpointError.
    """
    import huggingface_hub  # here: no other source needs it, and it is slow to import
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if progress is not None:
        progress.stage(f"fetch {model}")
    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())]
    try:
        snapshot = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns
        )
    except GatedRepoError as exc:
        raise CheckpointError(
            f"{model}: access to this model must be granted; accept its terms on "
            f"https://huggingface.co/{model}, then `hf auth login`"
        ) from exc
    except RevisionNotFoundError as exc:
        raise CheckpointError(f"{model}: there is no revision {revision!r} on the Hub") from exc
    except RepositoryNotFoundError as exc:
        raise CheckpointError(
            f"{model}: no such model on the Hub, and no such directory; check the name, or "
            "`hf auth login` if it is private"
        ) from exc
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as exc:
        raise CheckpointError(
            f"{model}: not in the local Hub cache, and the Hub cannot be reached (or "
            f"HF_HUB_OFFLINE is set); connect, or `hf download {model}` where there is a network"
        ) from exc
    except Exception as exc:  # whatever its HTTP stack raises must not end as a traceback
        message = str(exc).strip().splitlines()
        raise CheckpointError(
            f"{model}: the Hub download failed ({type(exc).__name__}: "
            f"{message[0][:200] if message else 'no message'}); try again, or give a directory"
        ) from exc
    return Path(str(snapshot))
