"""Builds the package's C, where there is a compiler; without one the same is done by numpy and Python, more slowly.

One file a module, Python's own headers and nothing else: `sysconfig` knows the compiler that Python was built with.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = (
    "platform/heliostat/experiments/_slots.c",
    "platform/heliostat/models/_trees.c",
    "platform/heliostat/online/_compiled.c",
    "platform/heliostat/serving/_writing.c",
    "platform/heliostat/storage/_packing.c",
)
# Sums are the same bits as numpy's: nothing is reordered, and no product is fused with a sum.
FLAGS = ("-O2", "-fno-fast-math", "-ffp-contract=off")


class CompiledHook(BuildHookInterface):
    """Called by hatchling for wheels and for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's interface
        """Compile beside the sources, which is where an editable install looks, and add the results to a wheel."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
        for source in SOURCES:
            module = Path(self.root, source)
            built = module.with_name(module.stem + suffix)
            try:
                _compile(module, built)
            except (OSError, subprocess.CalledProcessError) as error:
                built.unlink(missing_ok=True)
                self.app.display_warning(f"{source} isn't compiled, Python does its work: {error}")
                continue
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            inside = built.relative_to(Path(self.root, "platform")).as_posix()
            build_data["force_include"][str(built)] = inside


def _compile(source: Path, built: Path) -> None:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    shared = shlex.split(sysconfig.get_config_var("LDSHARED") or "cc -shared")[1:]
    headers = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    aside = built.with_name(f"{built.name}.{os.getpid()}")
    command = [*compiler, *shared, "-fPIC", *FLAGS, *headers, str(source), "-o", str(aside), "-lm"]
    try:
        subprocess.run(command, check=True, timeout=120)
        aside.replace(built)  # a process that has the old one loaded keeps it
    finally:
        aside.unlink(missing_ok=True)
