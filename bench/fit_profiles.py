#!/usr/bin/env python3
"""fit_profiles.py SERVOFLOW [DEVICE …]: writes the [engine] blocks of profiles/*.toml anew.

Each block is what `servoflow plan --fit DEVICE` makes of the bench results that the profile names. Profiles without
a block of their own borrow one and are left alone. The binary has to be built again afterwards.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "\n[engine]\n"


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    wanted = sys.argv[2:]
    for profile in sorted((ROOT / "profiles").glob("*.toml")):
        text = profile.read_text(encoding="utf-8")
        if HEADER not in text or (wanted and profile.stem not in wanted):
            continue
        command = [sys.argv[1], "plan", "--fit", profile.stem, "--results", str(ROOT / "bench" / "results")]
        block = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        fitted = text[: text.index(HEADER) + 1] + block
        print(f"{profile.relative_to(ROOT)}: {'as it was' if fitted == text else 'changed'}")
        profile.write_text(fitted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
