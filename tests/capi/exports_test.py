"""The shared library shows exactly the functions of its header.

usage: exports_test.py LIBRARY HEADER
"""

import pathlib
import re
import subprocess
import sys

library, header = sys.argv[1:]
listed = subprocess.run(
    ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
).stdout
shown = {line.split()[2].split("@")[0] for line in listed.splitlines() if line.split()[1] != "A"}
text = re.sub(r"/\*.*?\*/", "", pathlib.Path(header).read_text(), flags=re.S)
declared = set(re.findall(r"\b(servoflow_\w+)\(", text))
print(f"{len(shown)} functions: " + ", ".join(sorted(shown)))
if shown != declared:
    sys.exit(
        f"only in the library: {sorted(shown - declared)}; only in the header: {sorted(declared - shown)}"
    )
