"""Plants one violation of every rule of the ladder in a small tree and expects exactly that error."""

import pathlib
import tempfile
import unittest

import check_layers

LAYERS = """# lowest first
include/servoflow
src/core
src/ops
src/stages
src/policy
src/toolkit src/serve src/capi
apps python
"""
HEADERS = (
    "include/servoflow/status.h", "src/core/file.h", "src/ops/ops.h", "src/ops/cpu/kernel.h", "src/stages/flow.h",
    "src/stages/vision/vision.h", "src/stages/prefix/prefix.h", "src/policy/network.h", "src/toolkit/probe.h",
    "src/serve/server.h", "src/capi/handles.h", "apps/commands.h", "python/bindings.h", "tests/golden.h", "src/cudalike/x.h",
)


class LadderTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.write("cmake/layers.txt", LAYERS)
        for header in HEADERS:
            self.write(header, "#pragma once\n")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def errors(self, name, *headers):
        """What the check says while `name` includes `headers`; afterwards the file is gone again."""
        self.write(name, "".join(f"#include {header}\n" for header in headers))
        found = check_layers.check(self.root)[1]
        (self.root / name).unlink()
        return found

    def refused(self, name, header, part):
        """`name` may not include `header`; the message names file and line and contains `part`."""
        found = self.errors(name, "<vector>", header)
        self.assertEqual(len(found), 1, found)
        self.assertTrue(found[0].startswith(f"{name}:2: "), found[0])
        self.assertIn(part, found[0])

    def allowed(self, name, *headers):
        self.assertEqual(self.errors(name, *headers), [])

    def test_own_and_lower_layers_are_allowed(self):
        self.allowed("src/core/file.cc", '"core/file.h"', '"file.h"', '"servoflow/status.h"', "<vector>")
        self.allowed("src/policy/policy.cc", '"stages/vision/vision.h"', '"stages/prefix/prefix.h"', '"ops/ops.h"')
        self.allowed("apps/main.cc", '"toolkit/probe.h"', '"serve/server.h"', '"servoflow/status.h"')

    def test_upwards(self):
        self.refused("src/core/file.cc", '"ops/ops.h"', "src/ops is above it")
        self.refused("include/servoflow/policy.h", '"core/file.h"', "src/core is above it")

    def test_upwards_in_angle_brackets_and_relative(self):
        self.refused("src/core/a.cc", "<ops/ops.h>", "src/ops is above it")
        self.refused("src/core/a.cc", '"../ops/ops.h"', "src/ops is above it")

    def test_a_unit_test_obeys_its_folder(self):
        self.refused("src/core/file_test.cc", '"ops/ops.h"', "src/ops is above it")

    def test_siblings(self):
        self.refused("src/toolkit/probe.cc", '"serve/server.h"', "siblings")
        self.refused("apps/main.cc", '"python/bindings.h"', "siblings")

    def test_stages(self):
        self.refused("src/stages/prefix/prefix.cc", '"stages/vision/vision.h"', "stages/flow.h")
        self.refused("src/stages/flow.cc", '"stages/vision/vision.h"', "what all stages share")
        self.allowed("src/stages/prefix/prefix.cc", '"stages/flow.h"', '"stages/prefix/prefix.h"', '"ops/ops.h"')

    def test_serve_sees_only_the_public_headers(self):
        self.refused("src/serve/server.cc", '"core/file.h"', "src/serve includes only")
        self.allowed("src/serve/server.cc", '"serve/server.h"', '"servoflow/status.h"', "<string>")

    def test_the_c_interface_sees_only_the_public_headers(self):
        self.refused("src/capi/capi.cc", '"core/file.h"', "src/capi includes only")
        self.refused("src/capi/capi.cc", '"serve/server.h"', "src/capi includes only")
        self.allowed("src/capi/capi.cc", '"capi/handles.h"', '"servoflow/status.h"', "<string>")

    def test_vendor_headers(self):
        self.refused("src/ops/ops.cc", "<cuda_runtime.h>", "CUDA")
        self.refused("src/ops/cpu/kernel.cc", '"cublasLt.h"', "CUDA")
        self.refused("src/ops/cuda/norm.cu", '"hwy/highway.h"', "Highway")
        self.refused("src/policy/policy.cc", "<oneapi/dnnl/dnnl.hpp>", "oneDNN")

    def test_vendor_headers_where_they_belong(self):
        self.allowed("src/ops/cuda/norm.cu", "<cuda_runtime.h>", "<cub/cub.cuh>", "<cuda_bf16.h>")
        self.allowed("src/ops/cpu/kernel.cc", '"hwy/highway.h"', "<dnnl.hpp>")
        self.allowed("bench/peers/gemm.cc", "<oneapi/dnnl/dnnl.hpp>", '"ops/ops.h"')
        self.assertIn("CUDA", "".join(self.errors("bench/cuda_bench.cc", "<cuda_runtime.h>")))

    def test_tests_may_include_anything(self):
        self.allowed("tests/e2e/run_test.cc", '"../golden.h"', '"apps/commands.h"',
                     '"stages/vision/vision.h"', '"serve/server.h"', '"hwy/highway.h"')
        self.refused("src/core/file_test.cc", '"tests/golden.h"', "only tests/")

    def test_missing(self):
        self.refused("src/core/file.cc", '"core/gone.h"', "is not in the tree")

    def test_generated_from_a_template(self):
        self.write("src/core/build.h.in", "")
        self.allowed("src/core/file.cc", '"build.h"')
        self.refused("src/core/file.cc", '"../ops/gone.h"', "is not in the tree")

    def test_outside(self):
        self.refused("src/core/file.cc", '"cudalike/x.h"', "outside the ladder")

    def test_comments_are_not_includes(self):
        self.write("src/core/file.cc", '// #include "ops/ops.h"\nint x;\n')
        self.assertEqual(check_layers.check(self.root)[1], [])


if __name__ == "__main__":
    unittest.main()
