"""``python -m sinterlm`` is the command ``sinterlm``."""

from sinterlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
