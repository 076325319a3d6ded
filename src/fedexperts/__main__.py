"""``python -m fedexperts``."""

from fedexperts.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
