#!/usr/bin/env python3
"""Tests of lmgateway, in the order of its sections.

`python3 test_lmgateway.py` runs them all; where pytest is missing it first makes a .venv beside this
file and installs it there.  No test sleeps to pace itself: PATIENCE_S only bounds a hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def has_pytest(python):
    return subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False).returncode == 0


def run_suite(arguments):
    """Run pytest on this file, in a virtual environment where this Python has none.  Returns its status."""
    python = sys.executable
    if not has_pytest(python):
        home = HERE / ".venv" / f"{sys.version_info[0]}.{sys.version_info[1]}"
        python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if not os.path.exists(python) or not has_pytest(python):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "pytest"],
                           check=True)
    suite = [python, "-m", "pytest", "-q", str(Path(__file__).resolve()), *arguments]
    return subprocess.run(suite, cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_suite(sys.argv[1:]))

import pytest  # noqa: E402

import lmgateway  # noqa: E402
from lmgateway import Parser  # noqa: E402

PATIENCE_S = 10     # a limit for a hang, never a delay for a passing test

# === 2. CONFIG ===============================================================


# === 3. CORE =================================================================

SAMPLES = sorted((HERE / ".ci" / "samples").glob("*.log"))


@pytest.fixture
def utc(monkeypatch):
    """The samples' expectations are computed for UTC."""
    monkeypatch.setenv("TZ", "UTC")
    if hasattr(time, "tzset"):
        time.tzset()
    yield
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


def parsed(data, size=None):
    """[(number of the header at which it became known, event)] of a log's bytes, fed in pieces of size."""
    parser, found = Parser(), []
    for start in range(0, len(data), size or len(data)):
        found += [(parser.entries, event) for event in parser.feed(data[start:start + (size or len(data))])]
    return found + [(parser.entries, event) for event in parser.end()]


def expected_of(log_path):
    text = log_path.with_name(log_path.stem + ".events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def bare(text):
    """Text without blanks at its line ends."""
    return "\n".join(line.rstrip() for line in text.split("\n"))


def fits(expected, event):
    """True when an event is what an expectation (../shared/samples/README.md) asks for."""
    data = event.data
    if event.name != expected["event"]:
        return False
    for name, value in expected["data"].items():
        near = expected.get("tolerance", {}).get(name)
        if near is None and data.get(name) != value:
            return False
        if near is not None and not (isinstance(data.get(name), (int, float)) and abs(data[name] - value) <= near):
            return False
    for name, value in expected.get("may", {}).items():
        allowed = value if isinstance(value, list) else [value]
        if data.get(name) is not None and data[name] not in allowed:
            return False
    if any(data.get(name) not in values for name, values in expected.get("either", {}).items()):
        return False
    if any(data.get(name) is not None for name in expected.get("absent", ())):
        return False
    if any(bare(part) not in bare(str(data.get(name))) for name, part in expected.get("contains", {}).items()):
        return False
    between = expected.get("between")
    return between is None or between[0] <= data["timestamp"] <= between[1]


def unmet(expectations, events):
    """What events lack of the expectations, or have beyond them; empty when they fit.

    Events of one type come in order; each expected one is met once."""
    problems = []
    for name in {event.name for event in events} | {row["event"] for row in expectations}:
        rows = [row for row in expectations if row["event"] == name]
        rest = [event for event in events if event.name == name]
        for row in rows:
            if rest and fits(row, rest[0]):
                rest.pop(0)
            elif not row.get("optional"):
                problems.append(f"expected {row}, got {rest[0] if rest else 'nothing'}")
                break
        else:
            problems += [f"not expected: {event}" for event in rest]
    return problems


@pytest.mark.parametrize("size", [None, 1, 7], ids=["whole", "bytes", "sevens"])
@pytest.mark.parametrize("log_path", SAMPLES, ids=lambda path: path.stem)
def test_samples_give_their_events(utc, log_path, size):
    events = [event for _, event in parsed(log_path.read_bytes(), size)]
    assert unmet(expected_of(log_path), events) == []


# === 4. HUB ==================================================================


# === 5. TAIL =================================================================


# === 6. UPSTREAM =============================================================


# === 7. HTTP =================================================================


# === 8. DEMO =================================================================


# === 9. COMMAND ==============================================================

README = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", lmgateway.readme_tables(), ids=["options", "routes", "events"])
def test_readme_has_the_tables_of_the_code(table):
    assert table + "\n" in README, "the README's table is an old one: run .ci/readme"


def test_readme_has_the_two_commands_that_set_everything_up():
    assert "python3 lmgateway.py --demo" in README
    assert "python3 test_lmgateway.py" in README
    assert len(README.splitlines()) < 420


# === 10. DASHBOARD ===========================================================


# === What the one file keeps apart ===========================================
