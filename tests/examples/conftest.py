"""The examples are scripts, not packages: their folders are put where Python looks for modules."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in sorted((Path(__file__).resolve().parents[2] / "examples").iterdir()):
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
