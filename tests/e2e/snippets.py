"""Prints the code of a document, so that what it shows can be run.

usage: snippets.py DOCUMENT LANGUAGE     all ```LANGUAGE blocks, one after the other
"""

import pathlib
import re
import sys


def blocks(document, language):
    """[(line of the first line of code, code)] of the document's blocks in this language."""
    text = pathlib.Path(document).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in found]


if __name__ == "__main__":
    found = blocks(*sys.argv[1:])
    print("".join(code for _, code in found), end="")
    sys.exit(0 if found else 1)
