"""Where outside reference data lies: made by other software, kept outside the repository."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

REFERENCE = Path(os.environ.get("LUTRA_REFERENCE", _ROOT.parent / "shared" / "reference"))
"""llama.cpp's results on SmolLM2: the folder named by LUTRA_REFERENCE, or `shared/reference` beside the repository."""
