#!/usr/bin/env python3
"""Tests of lmgateway, in the order of its sections.

`python3 test_lmgateway.py` runs them all; where pytest is missing it first makes a .venv beside this
file and installs it there.  No test sleeps to pace itself: PATIENCE_S only bounds a hang.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_suite(arguments):
    """Run pytest on this file, in a virtual environment where this Python has none.  Returns its status."""
    python = sys.executable
    if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        home = HERE / ".venv" / version
        python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if not os.path.exists(python) or subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest"], check=True)
    return subprocess.run([python, "-m", "pytest", "-q", str(Path(__file__).resolve()), *arguments], cwd=HERE).returncode


if __name__ == "__main__":
    sys.exit(run_suite(sys.argv[1:]))

import lmgateway  # noqa: E402


def test_version():
    assert lmgateway.VERSION
