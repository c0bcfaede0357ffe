"""The C extension; everything else about the package is in pyproject.toml.

The extension is optional: without a C compiler the package installs and runs its slow twins, and
`runtime.describe()` says so.
"""

from setuptools import Extension, setup

# No fused multiply-adds: torch rounds products before it adds them. Nothing here looks at floating-point exceptions,
# and compilers that may forget about them vectorise more loops; values stay the same.
SAME_BITS = ["-ffp-contract=off", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "moe_runtime._C",
            sources=[
                "csrc/binding.c",
                "csrc/plan.c",
                "csrc/exchange.c",
                "csrc/rows.c",
                "csrc/simd.c",
                "csrc/experts.c",
            ],
            depends=[
                "csrc/plan.h",
                "csrc/exchange.h",
                "csrc/rows.h",
                "csrc/simd.h",
                "csrc/simd_loops.h",
                "csrc/experts.h",
                "csrc/experts_tile.h",
            ],
            include_dirs=["csrc"],
            libraries=["m"],
            extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", *SAME_BITS],
            optional=True,
        )
    ]
)
