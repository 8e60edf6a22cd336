"""The tests of this folder share `onnx_models` and the table of equations in `test_equations`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
