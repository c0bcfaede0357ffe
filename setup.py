"""The C extension; everything else about the package is in pyproject.toml.

The extension is optional: without a C compiler the package installs and runs its slow twins, and
`runtime.describe()` says so.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "moe_runtime._C",
            sources=["csrc/binding.c", "csrc/plan.c"],
            depends=["csrc/plan.h"],
            include_dirs=["csrc"],
            extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
