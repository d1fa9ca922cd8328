"""The documents' Python and shell blocks, run as they are written, from the repository's root."""

import os
import shutil
import subprocess

from conftest import ROOT
import pytest
from snippets import blocks
from test_record import LeRobot, OpenPI


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_blocks_run_as_written(document, binary, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    lerobot = LeRobot()
    # What docs/python.md presumes of the reader's own environment.
    names = {"reference": OpenPI(), "lerobot_policy": lerobot, "preprocessor": lerobot.preprocess,
             "postprocessor": lerobot.postprocess}  # fmt: skip
    made = [ROOT / "build/cases-openpi", ROOT / "build/cases-lerobot"] if document == "docs/python.md" else []
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    python = [(line, code, "python") for line, code in blocks(ROOT / document, "python")]
    shell = [(line, code, "sh") for line, code in blocks(ROOT / document, "sh")]
    assert python
    try:
        for line, code, language in sorted(python + shell):
            if language == "python":
                exec(compile("\n" * (line - 1) + code, document, "exec"), names)
            elif code.strip() != "pip install .":  # which the set-up of these tests does
                done = subprocess.run(["bash", "-eu", "-c", code], capture_output=True, text=True)
                assert done.returncode == 0, f"{document}:{line}: {done.stdout}{done.stderr}"
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
