"""The command line in this process: what it prints and how it ends, without a start of Python."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from fifa.cli import main


def fifa(*arguments):
    """Run a command; gives what `subprocess.run` would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = ["fifa", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
