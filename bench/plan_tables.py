#!/usr/bin/env python3
"""plan_tables.py SERVOFLOW [--check]: fills in the tables of docs/planning.md from committed results and profiles.

In the document each table stands between two comments, and the first one says where it comes from:

    <!-- table 2 of: servoflow plan --device h200 -->
    <!-- end -->

--check writes nothing and fails if a table is not what its command gives now.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "planning.md"
BLOCK = re.compile(r"(<!-- table (\d+) of: servoflow (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def row(cells: list[str], columns: int) -> str:
    return "| " + " | ".join([*cells, *[""] * (columns - len(cells))]) + " |\n"


def markdown(table: dict[str, list[list[str]]]) -> str:
    header: list[str] = [str(cell) for cell in table["header"]]
    lines = row(header, len(header)) + "|" + "---|" * len(header) + "\n"
    return lines + "".join(row(cells, len(header)) for cells in table["rows"])


def main() -> int:
    if (
        len(sys.argv) not in (2, 3)
        or sys.argv[1] in ("-h", "--help")
        or sys.argv[2:] not in ([], ["--check"])
    ):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    binary = str(Path(sys.argv[1]).resolve())
    made: dict[str, list[dict[str, list[list[str]]]]] = {}

    def tables(arguments: str) -> list[dict[str, list[list[str]]]]:
        if arguments not in made:
            command = [binary, *shlex.split(arguments), "--json", "-", "--log-level", "error"]
            done = subprocess.run(
                command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            made[arguments] = json.loads(done.stdout)["tables"]
        return made[arguments]

    text = DOCUMENT.read_text(encoding="utf-8")
    count = len(BLOCK.findall(text))
    filled = BLOCK.sub(lambda m: m[1] + markdown(tables(m[3])[int(m[2]) - 1]) + m[5], text)
    if count == 0:
        print(f"{DOCUMENT}: holds no tables", file=sys.stderr)
        return 1
    if "--check" in sys.argv:
        if filled != text:
            print(
                "docs/planning.md: its tables are not those of the results; run `make plan-tables`",
                file=sys.stderr,
            )
            return 1
        return 0
    DOCUMENT.write_text(filled, encoding="utf-8")
    print(f"docs/planning.md: {count} tables, {'as they were' if filled == text else 'changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
