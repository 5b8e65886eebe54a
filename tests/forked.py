"""Processes that are there at once: forked from one that has loaded everything, run nothing."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest


def forked(function, *loaded):
    """A function that starts a process in which ``function`` runs, given its arguments.

    ``loaded`` are the modules that the process forks with, beside the function's own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", *loaded, function.__module__])
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(function.__code__.co_filename).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
        forkserver._forkserver._stop()  # another module's, which has loaded other things
        forkserver.ensure_running()

    def start(*arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def finish(process):
    """Wait for a process that must end well."""
    process.join(600)
    assert process.exitcode == 0
