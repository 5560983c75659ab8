"""Parsers of answers by vLLM's names, and which one a chat template asks for.

``auto`` looks at the template; ``none`` parses nothing. Refuses an unknown name with those known.
"""

from __future__ import annotations
