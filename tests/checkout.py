"""Where this checkout lies, for tests that run its files in another process."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
