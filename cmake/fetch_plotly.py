#!/usr/bin/env python3
"""fetch_plotly.py FOLDER: prints the path of FOLDER/plotly-VERSION.min.js.z, and makes it first if it is not there.

The file is plotly.min.js of the Python package `plotly`, compressed by zlib. pip downloads the package with its hash
given, so that nothing else can get into a build; the script inside is checked once more before and after it was kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
import zlib
from pathlib import Path

VERSION = "7.1.0"
WHEEL_SHA256 = "dbb7fa18afce40d0a8e80d1bf162eceb3faa0ce5a77fe741ad09a74cf78f53f3"
SCRIPT_SHA256 = "3b6e15d45dbb7fca5bd2094291e961ddc5472cd887009e6009a56dab668d721f"
MEMBER = "plotly/package_data/plotly.min.js"


def is_the_script(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SCRIPT_SHA256


def is_kept(path: Path) -> bool:
    try:
        return is_the_script(zlib.decompress(path.read_bytes()))
    except (OSError, zlib.error):
        return False


def pip_command(folder: Path) -> list[str]:
    """pip of this interpreter, or one in a folder of its own where there is none (Debian without python3-pip)."""
    here = [sys.executable, "-m", "pip"]
    if subprocess.run([*here, "--version"], capture_output=True, check=False).returncode == 0:
        return here
    venv.create(folder, with_pip=True)
    return [str(folder / "bin" / "python"), "-m", "pip"]


def fetch(folder: Path) -> bytes:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"plotly=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="ascii")
    command = [
        *pip_command(folder / "venv"),
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary", ":all:", "--require-hashes", "--retries", "1", "--timeout", "20"]
    done = subprocess.run(
        [*command, "--dest", str(folder), "-r", str(requirement)], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("plotly-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "pip left no file").splitlines()[-1]
        raise RuntimeError(f"pip could not download plotly {VERSION}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        script = wheel.read(MEMBER)
    if not is_the_script(script):
        raise RuntimeError(f"{wheels[0].name}: {MEMBER} is not the file this tree was tested with")
    return script


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(sys.argv[1]).resolve() / f"plotly-{VERSION}.min.js.z"
    if not is_kept(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                half = Path(folder) / "half"
                half.write_bytes(zlib.compress(fetch(Path(folder)), 9))
                os.replace(half, target)
        except (OSError, RuntimeError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            print(f"{error}", file=sys.stderr)
            return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
