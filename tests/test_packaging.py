"""What an installation builds: wheels with and without the native libraries, sdist, editable, settings, failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "fastambient_kernels/libfastambient_cpu.so"
KEPT_OUT = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")

pytest.importorskip("setuptools", "77")
can_compile = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("cmake", "c++"))),
    reason="needs Linux, CMake and a C++ compiler",
)


def copy_of(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*KEPT_OUT))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources without anything built; the tests share its build folder, as a user's checkout would."""
    return copy_of(ROOT, tmp_path_factory.mktemp("packaging") / "fastambient")


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTAMBIENT_")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=1800
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(tree: Path, out: Path, *options: str, **environment: str) -> tuple[Path, str]:
    """(wheel, what pip printed) of a build against the torch that is installed here."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "-v",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        out,
        *options,
        ".",
    ]
    done = run(*command, cwd=tree, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def announcements(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if line.strip().startswith("fastambient: ")]


def build_ext(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, check=False, **environment)


def test_settings_are_checked(tree):
    for variable in ("FASTAMBIENT_NATIVE", "FASTAMBIENT_CUDA"):
        done = build_ext(tree, **{variable: "yes"})
        assert done.returncode and f"{variable} must be auto, on or off, got 'yes'" in done.stderr


def test_a_missing_tool_is_one_line_under_auto_and_an_error_under_on(tree, tmp_path):
    done = build_ext(tree, PATH=str(tmp_path))
    assert done.returncode == 0
    (line,) = announcements(done.stderr)
    assert line == "fastambient: no native libraries, everything runs without them: " + (
        "cmake is not installed" if sys.platform == "linux" else f"they are built on Linux only, this is {sys.platform}"
    )
    done = build_ext(tree, PATH=str(tmp_path), FASTAMBIENT_NATIVE="on")
    assert done.returncode and "FASTAMBIENT_NATIVE=on: cannot build the native libraries: " in done.stderr
    done = build_ext(tree, FASTAMBIENT_NATIVE="off", FASTAMBIENT_CUDA="on")
    assert done.returncode and "FASTAMBIENT_CUDA=on: cannot build the native libraries: " in done.stderr


def test_without_torch_the_wheel_is_pure_and_needs_no_network(tree, tmp_path):
    """What an isolated build sees: setuptools and nothing else."""
    import setuptools

    (tmp_path / "site").mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for entry in [packages / "setuptools", packages / "_distutils_hack", *packages.glob("setuptools-*.dist-info")]:
        (tmp_path / "site" / entry.name).symlink_to(entry)
    script = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    # -S leaves out every site-packages folder.
    done = run(sys.executable, "-S", "-c", script, cwd=tree, PYTHONPATH=str(tmp_path / "site"))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in contents(wheel))
    assert {"fastambient/cli/__init__.py", "fastambient_kernels/aot_report.json"} <= contents(wheel)
    (line,) = announcements(done.stderr)
    assert "torch is not installed in the build environment" in line or sys.platform != "linux"


def test_sdist_holds_what_a_native_build_needs(tree, tmp_path):
    (tree / "kernels" / LIBRARY).write_bytes(b"built for an editable install")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", script, cwd=tree)
    (tree / "kernels" / LIBRARY).unlink()
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(tree)) for path in (tree / "kernels" / "csrc").rglob("*") if path.is_file()}
    assert sources and sources <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@can_compile
@pytest.mark.slow
def test_native_wheel(tree, tmp_path):
    wheel, printed = build_wheel(tree, tmp_path, FASTAMBIENT_NATIVE="on")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert LIBRARY in contents(wheel) and announcements(printed) == []
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(LIBRARY, tmp_path)
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()
        libraries = [name for name in archive.namelist() if name.endswith(".so")]  # with nvcc, two
        code = b"".join(map(archive.read, libraries))
    for path in (tree, Path(sysconfig.get_path("purelib"))):
        assert str(path).encode() not in code
    run(sys.executable, "-c", f"import torch; torch.ops.load_library({library!r})", cwd=tmp_path)


@can_compile
@pytest.mark.slow
def test_a_second_build_compiles_what_changed_alone(tree, tmp_path):
    build_wheel(tree, tmp_path / "first")

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tree / "build" / "native").rglob("*.o")}

    before = compiled()
    build_wheel(tree, tmp_path / "second")
    assert before and compiled() == before
    os.utime(tree / "kernels" / "csrc" / "cpu" / "isa.cpp")
    build_wheel(tree, tmp_path / "third")
    assert {path.name for path, time in compiled().items() if time != before[path]} == {"isa.cpp.o"}


@can_compile
@pytest.mark.slow
def test_off_leaves_no_library_of_an_earlier_build(tree, tmp_path):
    build_wheel(tree, tmp_path / "on")
    wheel, printed = build_wheel(tree, tmp_path / "off", FASTAMBIENT_NATIVE="off")
    assert wheel.name.endswith("-py3-none-any.whl") and LIBRARY not in contents(wheel)
    assert announcements(printed) == [
        "fastambient: no native libraries, everything runs without them: FASTAMBIENT_NATIVE=off"
    ]


@can_compile
@pytest.mark.slow
def test_a_failed_compilation(tree, tmp_path):
    """Planted: a source that does not compile."""
    source = tree / "kernels" / "csrc" / "cpu" / "isa.cpp"
    text = source.read_text()
    source.write_text(text + "\n#error planted\n")
    try:
        wheel, printed = build_wheel(tree, tmp_path)
        with pytest.raises(AssertionError, match="FASTAMBIENT_NATIVE=on: cannot build the native libraries"):
            build_wheel(tree, tmp_path / "on", FASTAMBIENT_NATIVE="on")
    finally:
        source.write_text(text)
    assert wheel.name.endswith("-py3-none-any.whl") and LIBRARY not in contents(wheel)
    assert announcements(printed)[-1].endswith("the compilation failed, see its output above (pip shows it with -v)")


@can_compile
@pytest.mark.slow
def test_editable_install_of_a_moved_tree(tree, tmp_path):
    """A build folder that came along with a copy is of another path: CMake refuses it, setup.py starts it anew."""
    build_wheel(tree, tmp_path / "wheel")
    moved = copy_of(tree, tmp_path / "moved")
    shutil.copytree(tree / "build" / "native", moved / "build" / "native")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    # Everything that is installed here, except what .pth files in it add: another fastambient.
    Path(site, "installed.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--ignore-installed", "-e", moved]
    run(*install, cwd=tmp_path, FASTAMBIENT_NATIVE="on")
    assert (moved / "kernels" / LIBRARY).is_file()
    script = "import fastambient_kernels._native as n; print(n.__file__); assert n.load('cpu') is None, n.load('cpu')"
    assert str(moved) in run(python, "-c", script, cwd=tmp_path).stdout
    run(*install, cwd=tmp_path, FASTAMBIENT_NATIVE="off")
    assert not (moved / "kernels" / LIBRARY).exists()


@pytest.mark.slow
def test_isolated_build_downloads_no_torch(tree, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "-v",
        "wheel",
        "--no-deps",
        "--retries",
        "1",
        "--timeout",
        "20",
        "-w",
        tmp_path,
        ".",
    ]
    done = run(*command, cwd=tree, check=False)
    printed = done.stdout + done.stderr
    if done.returncode and "setuptools>=77" in printed:
        pytest.skip("no package index to take setuptools from")
    assert done.returncode == 0, printed
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    collected = [line.split()[1] for line in printed.splitlines() if line.strip().startswith("Collecting ")]
    assert {name.split(">")[0] for name in collected} <= {"setuptools", "wheel", "packaging"}
