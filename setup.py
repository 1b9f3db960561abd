"""Build the native libraries with CMake where that is possible; otherwise the package is pure Python and works.

FASTAMBIENT_NATIVE=auto|on|off   build libfastambient_cpu.so (auto: if compiler, CMake and torch are there)
FASTAMBIENT_CUDA=auto|on|off     build libfastambient_cuda.so (auto: if nvcc is there, too)

torch is found, never imported, and is no build requirement: an isolated build would download it. The libraries use its
stable ABI and no Python, so one wheel (py3-none-<platform>) serves every Python and every torch from 2.10 on.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
BUILD = HERE / "build" / "native"  # kept between builds, so that only what changed is compiled again
LIBRARIES = ("libfastambient_cpu.so", "libfastambient_cuda.so")


class BuildError(Exception):
    """Why there are no native libraries, in a few words."""


class ToolFailed(BuildError):
    """A tool was there and failed; without CUDA it may not."""


def setting(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{variable} must be auto, on or off, got {value!r}")
    return value


def torch_folder() -> str:
    """Folder of the torch package that the libraries are compiled against."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError("torch is not installed in the build environment (install it, then use --no-build-isolation)")
    folder = found.submodule_search_locations[0]
    text = Path(folder, "version.py").read_text(encoding="utf-8")
    stated = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    version, major, minor = stated.groups() if stated else ("of no version", 0, 0)
    if (int(major), int(minor)) < (2, 10):
        raise BuildError(f"torch is {version}, its stable ABI needs 2.10 or newer")
    if not Path(folder, "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch {version} came without its headers")
    return folder


def call(what: str, *command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise ToolFailed(f"{what} failed, see its output above (pip shows it with -v)") from error


def compile_into(folder: Path, cuda: str) -> None:
    """Configure, build and install the libraries into `folder`; `cuda` is auto, on or off."""
    if sys.platform != "linux":
        raise BuildError(f"they are built on Linux only, this is {sys.platform}")
    if shutil.which("cmake") is None:
        raise BuildError("cmake is not installed")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise BuildError("there is no C++ compiler")
    definitions = [f"-DTORCH_DIR={torch_folder()}", f"-DFASTAMBIENT_CUDA={cuda}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(HERE), "-B", str(BUILD), *generator, *definitions]
    try:
        call("CMake's configuration", *configure)
    except BuildError:
        if not BUILD.exists():
            raise
        shutil.rmtree(BUILD)  # of a copied tree, another generator or another compiler
        call("CMake's configuration", *configure)
    call("the compilation", "cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1))
    call("CMake's installation", "cmake", "--install", str(BUILD), "--prefix", str(folder), "--strip")
    if cuda == "on" and not (folder / LIBRARIES[1]).is_file():
        raise BuildError(f"{LIBRARIES[1]} was not built")


class CMakeBuild(build_ext):
    """build_ext that drives CMake; a failure under "auto" leaves a pure Python package, and says so."""

    def run(self) -> None:
        for name in LIBRARIES:  # what an earlier build left must not pass for this one
            (self.folder() / name).unlink(missing_ok=True)
        native, cuda = setting("FASTAMBIENT_NATIVE"), setting("FASTAMBIENT_CUDA")
        try:
            if native == "off":
                raise BuildError("FASTAMBIENT_NATIVE=off")
            self.compile(cuda)
        except BuildError as error:
            for variable, value in (("FASTAMBIENT_NATIVE", native), ("FASTAMBIENT_CUDA", cuda)):
                if value == "on":
                    raise SystemExit(f"{variable}=on: cannot build the native libraries: {error}") from error
            print(f"fastambient: no native libraries, everything runs without them: {error}", file=sys.stderr)
            self.distribution.ext_modules = []  # a pure Python wheel

    def compile(self, cuda: str) -> None:
        try:
            compile_into(self.folder(), cuda)
        except ToolFailed as error:
            if cuda != "auto" or not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
                raise
            print(f"fastambient: once more without CUDA: {error}", file=sys.stderr)
            compile_into(self.folder(), "off")

    def folder(self) -> Path:
        """An editable install finds the libraries in the source tree, a wheel in the build folder."""
        if self.inplace or self.editable_mode:
            return HERE / "kernels" / "fastambient_kernels"
        return Path(self.build_lib).resolve() / "fastambient_kernels"

    def get_outputs(self) -> list[str]:
        built = [name for name in LIBRARIES if (self.folder() / name).is_file()]
        return [str(Path(self.build_lib, "fastambient_kernels", name)) for name in built]

    def get_output_mapping(self) -> dict[str, str]:
        if not (self.inplace or self.editable_mode):
            return {}
        return {output: str(self.folder() / Path(output).name) for output in self.get_outputs()}


class Wheel(bdist_wheel):
    """Tagged py3-none-<platform> with native libraries, py3-none-any without."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("fastambient_kernels._native_libraries", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
