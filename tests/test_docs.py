"""Documentation that is printed from the code must be what the code prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_isa_page_is_what_spec_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "spec"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "isa.md").read_text(encoding="utf-8")
    assert printed in page, "docs/isa.md is out of date: run `python -m spec --write docs/isa.md`"
