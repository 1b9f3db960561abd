"""Build the native libraries with CMake where that is possible; otherwise the package is pure Python and works.

FASTAMBIENT_NATIVE=auto|on|off   build libfastambient_cpu.so (auto: if compiler, CMake and torch are there)
FASTAMBIENT_CUDA=auto|on|off     build libfastambient_cuda.so (auto: if nvcc is there, too)

torch is found, never imported, and is no build requirement: an isolated build would download it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if os.environ.get("FASTAMBIENT_NATIVE", "auto") == "off":
        return "FASTAMBIENT_NATIVE=off"
    if sys.platform != "linux":
        return f"native libraries are built on Linux, this is {sys.platform}"
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "there is no C++ compiler"
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    if not Path(found.submodule_search_locations[0], "include/torch/csrc/stable/library.h").is_file():
        return "torch is older than 2.10 or came without its headers"
    return None


class CMakeBuild(build_ext):
    """build_ext that drives CMake; a failure under "auto" leaves a pure Python package, and says so."""

    def run(self) -> None:
        wanted = os.environ.get("FASTAMBIENT_NATIVE", "auto")
        reason = missing()
        if reason is None:
            try:
                self.compile()
                return
            except (subprocess.CalledProcessError, OSError) as error:
                reason = f"the build failed: {error}"
        if wanted == "on":
            raise SystemExit(f"FASTAMBIENT_NATIVE=on: {reason}")
        print(f"fastambient: no native libraries: {reason}", file=sys.stderr)

    def compile(self) -> None:
        torch_spec = importlib.util.find_spec("torch")
        assert torch_spec is not None and torch_spec.submodule_search_locations
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # An editable install finds the libraries in the source tree, a wheel in its build folder.
        package = "kernels" if self.inplace or self.editable_mode else self.build_lib
        target = (HERE if package == "kernels" else Path()) / package / "fastambient_kernels"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        cuda = os.environ.get("FASTAMBIENT_CUDA", "auto")
        configure = ["cmake", "-S", str(HERE), "-B", str(build), *generator, f"-DFASTAMBIENT_CUDA={cuda}"]
        subprocess.run([*configure, f"-DTORCH_DIR={torch_spec.submodule_search_locations[0]}"], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target.resolve())], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("fastambient_kernels._native_libraries", sources=[])], cmdclass={"build_ext": CMakeBuild})
