"""SinterLM: compile a language model into one fused native library, and run it."""

__version__ = "0.1.0"
