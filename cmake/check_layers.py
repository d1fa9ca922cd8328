#!/usr/bin/env python3
"""Checks every #include of the tree against the ladder in cmake/layers.txt.

usage: check_layers.py [ROOT]

The rules, each with a planted violation in check_layers_test.py:
  ladder    a file includes only from its own layer or from layers below it
  sibling   layers on one line of layers.txt do not include each other
  stage     src/stages/<a> never includes src/stages/<b>, and src/stages itself includes none of them
  public    src/serve and src/capi include only "servoflow/..." and their own files
  vendor    CUDA headers only under src/ops/cuda; Highway and oneDNN only under src/ops/cpu and bench
  missing   a quoted include names a file of the tree
Files under tests/ may include anything; tests beside a source obey the ladder as their folder does.
"""

import pathlib
import re
import sys
from dataclasses import dataclass, field

FOLDERS = ("include", "src", "apps", "python", "tests", "bench")
SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".inc"}
PUBLIC_ONLY = ("src/serve", "src/capi")  # they offer the engine to others, by its public headers
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')

CUDA = re.compile(r"^(cuda\w*|cublas\w*|curand\w*|cusparse\w*|cudnn\w*|nvrtc|nvml|nvToolsExt\w*|device_launch_parameters"
                  r"|mma|cooperative_groups)\.h$|^(cuda|cub|thrust|cutlass|cute|cooperative_groups|nvtx3)/")
CPU = re.compile(r"^(hwy/|oneapi/|dnnl\w*\.hp?p?$)")
VENDORS = (("CUDA", CUDA, ("src/ops/cuda",)), ("Highway and oneDNN", CPU, ("src/ops/cpu", "bench")))


@dataclass
class Ladder:
    rank: dict[str, int] = field(default_factory=dict)  # layer folder -> line in layers.txt, 0 the lowest

    @staticmethod
    def read(path):
        ladder = Ladder()
        lines = (line.split("#")[0].split() for line in path.read_text().splitlines())
        for rank, layers in enumerate(filter(None, lines)):
            for layer in layers:
                ladder.rank[layer] = rank
        return ladder

    def layer_of(self, path):
        """The layer that holds `path` ("src/core/file.h" -> "src/core"), or None outside the ladder."""
        return next((layer for layer in self.rank if is_under(path, layer)), None)


def is_under(path, folder):
    return path == folder or path.startswith(folder + "/")


def stage_of(path):
    """src/stages/vision/x.cc -> "vision"; "" for files that lie in src/stages itself; None elsewhere."""
    parts = path.split("/")
    if parts[:2] != ["src", "stages"]:
        return None
    return parts[2] if len(parts) > 3 else ""


def includes(text):
    """(line number, "<" or quote, header) of every include directive."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := INCLUDE.match(line):
            yield number, match[1], match[2]


def resolve(root, source, header, quoted):
    """Path of `header` relative to the root, searched as the compiler does; None when it is not ours.

    A header that CMake makes from a template counts as the template, which lies beside the sources.
    """
    folders = ([source.parent] if quoted else []) + [root / "include", root / "src", root]
    for folder in folders:
        for found in (folder / header, folder / f"{header}.in"):
            if found.is_file() and found.resolve().is_relative_to(root):
                return found.resolve().relative_to(root).as_posix()
    return None


def judge(ladder, source, target):
    """Why `source` may not include `target` (both relative paths of ours), or None."""
    if is_under(source, "tests"):
        return None
    if is_under(target, "tests"):
        return "only tests/ includes from tests/"
    for layer in PUBLIC_ONLY:
        if is_under(source, layer):
            if not is_under(target, layer) and not is_under(target, "include/servoflow"):
                return f'{layer} includes only "servoflow/..." and its own files, not {target}'
            return None
    a, b = stage_of(source), stage_of(target)
    if a is not None and b and a != b:
        if a:
            return f"src/stages/{a} may not include src/stages/{b}; what crosses stages lies in stages/flow.h"
        return f"src/stages may not include src/stages/{b}: it holds what all stages share"
    here, there = ladder.layer_of(source), ladder.layer_of(target)
    if here is None or here == there:
        return None
    if there is None:
        return f"{target} is outside the ladder"
    if ladder.rank[there] > ladder.rank[here]:
        return f"{here} may not include {target}: {there} is above it in the ladder"
    if ladder.rank[there] == ladder.rank[here]:
        return f"{here} may not include {target}: they are siblings"
    return None


def judge_vendor(source, header):
    """Why `source` may not include a vendor's `header`, or None."""
    if is_under(source, "tests"):
        return None
    for name, pattern, folders in VENDORS:
        if pattern.match(header) and not any(is_under(source, folder) for folder in folders):
            return f"{name} headers belong under {' and '.join(folders)}, not here: {header}"
    return None


def check(root):
    """All violations under `root` as "file:line: message", in order."""
    root = root.resolve()
    ladder = Ladder.read(root / "cmake" / "layers.txt")
    files = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    errors = []
    for path in files:
        source = path.relative_to(root).as_posix()
        for line, mark, header in includes(path.read_text(encoding="utf-8", errors="replace")):
            reason = judge_vendor(source, header)
            target = resolve(root, path, header, mark == '"')
            if target is not None:
                reason = reason or judge(ladder, source, target)
            elif mark == '"' and not any(pattern.match(header) for _, pattern, _ in VENDORS):
                reason = f'"{header}" is not in the tree (other libraries are included with <>)'
            if reason:
                errors.append(f"{source}:{line}: {reason}")
    return len(files), errors


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent
    count, errors = check(root)
    print("\n".join(errors) if errors else f"ladder: {count} files, every include goes down")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
