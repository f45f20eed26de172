"""Builds xfast._C by driving CMakeLists.txt; everything else about the package is in pyproject.toml.

Environment: CXX (compiler), CMAKE_ARGS (more -D options), MAX_JOBS (parallel compilations, default: all CPUs),
XFAST_WERROR=1 (warnings are errors), XFAST_SANITIZE=1 (AddressSanitizer and UndefinedBehaviorSanitizer).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = (
    "xfast builds a C++17 extension and found no compiler: {what}. Install gcc >= 11 or clang >= 14 "
    "(Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++), "
    "or name one with the environment variable CXX."
)


def switch(name: str) -> str:
    return "OFF" if os.environ.get(name, "").lower() in ("", "0", "off", "false", "no") else "ON"


def tool(name: str, folder: str) -> str:
    """The executable that the PyPI package carries, else the system's."""
    found = shutil.which(name, path=folder) or shutil.which(name)
    if found is None:
        raise PlatformError(f"{name} was not found, neither in {folder} nor on PATH: pip install {name}")
    return found


def check_platform() -> None:
    if sys.platform != "linux":
        raise PlatformError(f"xfast builds on Linux (x86-64 and aarch64), not on {sys.platform}: use a container")


def check_compiler() -> None:
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and shutil.which(chosen[0]) is None:
        raise PlatformError(NO_COMPILER.format(what=f"CXX={chosen[0]} does not exist"))
    elsewhere = "CMAKE_CXX_COMPILER" in os.environ.get("CMAKE_ARGS", "")
    if not chosen and not elsewhere and not any(map(shutil.which, COMPILERS)):
        raise PlatformError(NO_COMPILER.format(what=f"none of {', '.join(COMPILERS)} is on PATH"))


class CMakeExtension(Extension):
    """An extension whose sources are listed in CMakeLists.txt alone."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_platform()
        check_compiler()
        cmake_exe = tool("cmake", cmake.CMAKE_BIN_DIR)
        build = Path(self.build_temp).resolve() / ext.name
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *(cmake_exe, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', ninja.BIN_DIR)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DXFAST_WERROR={switch('XFAST_WERROR')}",
            f"-DXFAST_SANITIZE={switch('XFAST_SANITIZE')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        self.start_afresh_if_changed(build, f"CXX={os.environ.get('CXX', '')} {shlex.join(configure)}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.cmake(configure)
        self.cmake([cmake_exe, "--build", str(build), "--parallel", jobs])
        self.cmake([cmake_exe, "--install", str(build), "--prefix", str(package.parent)])

    @staticmethod
    def start_afresh_if_changed(build: Path, settings: str) -> None:
        """CMake's cache would silently keep the compiler and the paths of an earlier run."""
        stamp = build / "settings.txt"
        if build.exists() and not (stamp.exists() and stamp.read_text() == settings):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(settings)

    @staticmethod
    def cmake(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            message = f"the C++ extension did not build; see the lines above. Failed: {shlex.join(command)}"
            raise CompileError(message) from error


setup(
    packages=[*find_packages(include=["xfast", "xfast.*"]), "xfast.benchmarks"],
    package_dir={"xfast.benchmarks": "benchmarks"},  # `xfast bench` runs from an installed wheel, too
    ext_modules=[CMakeExtension("xfast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
