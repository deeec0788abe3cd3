"""Compiles the libraries into the package, for any x86 with AVX2 or any GPU since sm_75.

Where that fails the package installs all the same, and compiles on first use or never.
"""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
import build as kernel_build  # noqa: E402


class BuildKernels(build_py):
    def run(self):
        super().run()
        for backend in kernel_build.SOURCES:
            output = Path(self.build_lib).resolve() / "cauchy_kernel" / f"kernel_{backend}.so"
            try:
                if not self.editable_mode:
                    kernel_build.compile_library(backend, output, portable=True)
            except (kernel_build.BuildError, OSError) as error:
                print(f"cauchy_kernel: no {backend} library: {error}")


class BinaryDistribution(Distribution):
    def has_ext_modules(self):  # a wheel for this platform only
        return True


setup(cmdclass={"build_py": BuildKernels}, distclass=BinaryDistribution)
