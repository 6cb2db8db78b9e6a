from __future__ import annotations

import os
import subprocess
import sys

from heliostat.ingestion.lease import Holder


def test_a_holder_that_was_killed_on_this_machine_is_gone() -> None:
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    assert Holder(pid=done.pid).is_gone


def test_a_holder_that_runs_or_that_nobody_here_can_see_is_not_gone() -> None:
    assert not Holder().is_gone
    assert not Holder(host="elsewhere", pid=os.getpid()).is_gone


def test_each_run_of_a_sink_is_told_from_any_other() -> None:
    assert Holder() != Holder()
