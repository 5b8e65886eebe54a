"""Processes that are there at once: copies of one that has loaded everything and run nothing."""

import multiprocessing
import os
import re
import signal
import sys
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path

import pytest


@cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
        forkserver.ensure_running()
    return context


def start(function, *arguments, said=None, **environment):
    """Start a process in which ``function``, of any test's module, runs.

    ``said`` is a file for what it prints, on either stream.
    """
    process = _context().Process(target=_run, args=(function, arguments, said, environment))
    process.start()
    return process


def _run(function, arguments, said, environment):
    os.environ.update(environment)
    if said is not None:
        with Path(said).open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    function(*arguments)


def without_fifa():
    """The package as a new process imports it: nothing in it is loaded yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fifa"]:
        del sys.modules[name]
    return import_module("fifa")


def finish(process, code=0):
    """Wait for a process that must end with ``code``: well, or killed by a signal (negative)."""
    process.join(600)
    assert process.exitcode == code


def die_at(event, path, nth=1):
    """Let SIGKILL end this process just before the ``nth`` ``event`` on a ``path``.

    ``event`` is an audit event of Python such as ``open`` or ``os.rename``; ``path`` is a pattern
    which one of its arguments must match to the end. What is on the disk is then what a kill at
    any moment since the event before would leave.
    """
    left = nth

    def hook(name, arguments):
        nonlocal left
        if name == event and any(re.search(f"{path}$", str(one)) for one in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
