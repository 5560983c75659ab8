"""Asking a server whether it is there and what it serves; plain HTTP, no load."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from sinterlm.errors import RuntimeFault


def fetch(
    url: str,
    *,
    method: str = "GET",
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> tuple[int, bytes]:
    """(status, contents); no redirect through a proxy. Raises OSError where nothing answers."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data=data, headers=sent, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


def first_model(base_url: str, headers: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(name, root) of the first model that a server lists. Raises RuntimeFault."""
    url = base_url.rstrip("/") + "/v1/models"
    try:
        _, content = fetch(url, headers=headers)
        entry = json.loads(content)["data"][0]
        return str(entry["id"]), str(entry.get("root") or entry["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise RuntimeFault(
            f"{url} names no model ({exc}); is the server up? Give --model to skip this"
        ) from exc


def wait_ready(
    base_url: str, timeout_s: float, is_alive: Callable[[], bool] = lambda: True
) -> float:
    """Seconds until ``/v1/models`` answered 200. Raises RuntimeFault after ``timeout_s``, or as
    soon as ``is_alive`` is false."""
    url = base_url.rstrip("/") + "/v1/models"
    start = time.perf_counter()
    last = "no answer"
    while (waited := time.perf_counter() - start) < timeout_s:
        try:
            status, _ = fetch(url, timeout_s=5.0)
            if status == 200:
                return waited
            last = f"HTTP {status}"
        except OSError as exc:
            last = str(exc)
        if not is_alive():
            raise RuntimeFault(f"the server of {base_url} ended after {waited:.0f} s")
        time.sleep(0.05)
    raise RuntimeFault(f"{url} did not answer within {timeout_s:.0f} s ({last})")
