"""Lets the tests find the helpers beside them."""

from __future__ import annotations

import sys
from pathlib import Path

# Test modules are imported by path.
sys.path.insert(0, str(Path(__file__).parent))
