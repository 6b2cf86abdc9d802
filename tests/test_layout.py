"""The house keeps its shape: one stem an engine in every folder, and README's walk names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = (
    "tlmm", "lut_tensor_core", "mixpe", "multiplier", "dequant_multiplier", "norm", "epilogue", "attention",
)  # fmt: skip
STEPS = range(10)
"""Steps of the way from prompt to token."""


@pytest.mark.parametrize("folder", ["golden", "rtl", "tests"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_has_its_file_in_every_folder(engine: str, folder: str) -> None:
    name = f"test_{engine}.py" if folder == "tests" else f"{engine}.py"
    assert (ROOT / folder / name).is_file(), f"{folder}/{name} is missing"


@pytest.mark.parametrize("engine", ENGINES)
def test_rtl_engine_names_its_twins(engine: str) -> None:
    text = (ROOT / "rtl" / f"{engine}.py").read_text()
    for twin in (f"golden/{engine}.py", f"tests/test_{engine}.py"):
        assert twin in text, f"the Twins heading of rtl/{engine}.py must name {twin}"


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_has_a_page_that_names_its_files(engine: str) -> None:
    files = (f"golden/{engine}.py", f"rtl/{engine}.py", f"tests/test_{engine}.py")
    pages = {page.name: page.read_text() for page in (ROOT / "docs" / "engines").glob("*.md")}
    found = {name for name, text in pages.items() if all(f"`{file}`" in text for file in files)}
    assert found, f"no page of docs/engines names all of {', '.join(files)}"


def test_packages_have_init_and_golden_stays_empty() -> None:
    for package in ("spec", "golden", "rtl", "rtl/lib", "rtl/bus", "cosim", "host_driver"):
        assert (ROOT / package / "__init__.py").is_file(), f"{package}/__init__.py is missing"
    assert not (ROOT / "golden" / "__init__.py").read_text().strip(), "golden/__init__.py must not load torch"
    assert not (ROOT / "tests" / "__init__.py").exists(), "tests is no package"


def table_rows(text: str) -> list[list[str]]:
    """Cells of every Markdown table row."""
    rows = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_readme_walk_names_files_that_exist() -> None:
    """README's table from prompt to token: a row a step, and every path in backticks is a file or folder."""
    steps = {row[0]: row for row in table_rows((ROOT / "README.md").read_text()) if row[0].isdecimal()}
    assert sorted(steps, key=int) == [str(step) for step in STEPS], "README: one table row for each of the steps 0 to 9"
    for number, row in steps.items():
        paths = [path for cell in row[1:] for path in re.findall(r"`([\w./-]+/[\w./-]*)`", cell)]
        assert paths, f"README: step {number} names no file"
        for path in paths:
            assert (ROOT / path).exists(), f"README: step {number} names {path}, which does not exist"
