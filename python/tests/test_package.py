"""What is installed: typed, NumPy alone, and the stubs tell the truth."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

from conftest import ROOT
import servoflow

PACKAGE = pathlib.Path(servoflow.__file__).parent


def test_is_the_installed_package():
    assert ROOT / "python" not in PACKAGE.parents
    version = re.search(r"project\(servoflow VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert servoflow.__version__ == importlib.metadata.version("servoflow") == version


def test_needs_numpy_alone():
    (only,) = [r for r in importlib.metadata.requires("servoflow") if "extra ==" not in r]
    assert only.startswith("numpy")
    code = (
        "import sys; before = set(sys.modules)\n"
        "import servoflow, servoflow.lerobot, servoflow.record\n"
        "new = [(m, getattr(sys.modules[m], '__file__', None) or '') for m in set(sys.modules) - before]\n"
        "print(sorted({m.split('.')[0] for m, file in new if 'site-packages' in file}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy', 'servoflow']"


def test_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir=/dev/null", ROOT / "python/servoflow",
         ROOT / "python/tests/typed_use.py"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stub_lists_what_the_extension_has():
    from servoflow import _core

    stub = (PACKAGE / "_core.pyi").read_text()
    told = set(re.findall(r"^(?:class|def) (\w+)", stub, re.M)) | {"version"}
    assert told == {name for name in vars(_core) if not name.startswith("_")}
    for name in ("Policy", "Session"):
        body = re.search(rf"^class {name}:\n((?:    .*\n|\n)+)", stub, re.M)[1]
        methods = set(re.findall(r"def (\w+)", body))
        assert methods == {m for m in vars(getattr(_core, name)) if not m.startswith("_")}


def test_every_public_name_is_documented():
    import servoflow.lerobot
    import servoflow.record

    for module in (servoflow, servoflow.lerobot, servoflow.record):
        assert module.__doc__
    for owner in (servoflow.Policy, servoflow.Session, servoflow.lerobot.LeRobotPolicy,
                  servoflow.record.OpenPIRecorder, servoflow.record.LeRobotRecorder):  # fmt: skip
        assert owner.__doc__
        for name, member in vars(owner).items():
            if not name.startswith("_") and (
                callable(member) or isinstance(member, (property, staticmethod))
            ):
                assert member.__doc__, f"{owner.__name__}.{name}"
