"""Sinks in processes of their own, and their ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from heliostat.settings import Settings


def start_sink(drain_for_ever: Callable[[str], None], settings: Settings) -> BaseProcess:
    """A sink that runs at once: it is forked off a process that has imported everything.

    Args:
        drain_for_ever: A test module's own; is given the settings as JSON.
        settings: Which project.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([drain_for_ever.__module__])
    process = context.Process(target=drain_for_ever, args=(settings.model_dump_json(),), daemon=True)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """End a process that still runs, without a word."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
