"""examples/check_recordings.py, the second half of `make demo`: it passes on what is right and on nothing else."""

import json
import pathlib
import shutil
import subprocess
import sys

from conftest import OPENPI, ROOT
import pytest


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples/check_recordings.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_recording_of_openpi_is_within_its_gate():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" pass\n") == 10
    assert done.stdout.endswith("10 passed, 0 failed\n")


@pytest.fixture
def cases(tmp_path):
    folder = tmp_path / "cases"
    folder.mkdir()
    shutil.copy(OPENPI / "cases/gap.safetensors", folder)
    return folder


def changed(path: pathlib.Path, tensor: str, offset: int) -> bytes:
    """The file with the highest byte of one float32 made another."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[8 + length + begin + 4 * offset + 3] ^= 0x80
    return bytes(data)


@pytest.mark.parametrize("tensor", ["expect/actions_normalized", "input/noise"])
def test_a_number_of_another_sign_fails(cases, tensor):
    file = cases / "gap.safetensors"
    file.write_bytes(changed(file, tensor, 3))
    done = run("--cases", cases)
    assert done.returncode == 1
    assert "FAIL" in done.stdout and done.stdout.endswith("0 passed, 1 failed\n")


def test_what_cannot_be_read_is_told(cases, tmp_path):
    file = cases / "gap.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    done = run("--cases", cases)
    assert done.returncode == 1 and "gap: cannot be recomputed" in done.stdout
    done = run("--cases", tmp_path)
    assert done.returncode == 2 and "no recordings" in done.stderr
    done = run(tmp_path, "--cases", cases)
    assert done.returncode == 2 and str(tmp_path) in done.stderr


def test_the_demo_says_what_is_missing(tmp_path):
    for arguments, said in (([tmp_path], "run `make demo`"), ([sys.prefix, tmp_path, tmp_path], "")):
        done = subprocess.run(
            [ROOT / "examples/demo.sh", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert said in done.stderr and "demo: " in done.stderr
