#!/usr/bin/env python3
"""Tests of lmgateway, in the order of its sections.

`python3 test_lmgateway.py` runs them all; where pytest is missing it first makes a .venv beside this
file and installs it there.  No test sleeps to pace itself: PATIENCE_S only bounds a hang.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import datetime
import errno
import gzip
import hashlib
import http.client
import http.server
import io
import json
import logging
import math
import os
import plistlib
import queue
import random
import re
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from random import Random

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
from lmgateway import Event, Parser  # noqa: E402

PATIENCE_S = 10     # a limit for a hang, never a delay for a passing test
os.environ.pop("PYTHONUNBUFFERED", None)    # with it no test could tell whether a program flushes its lines

# === 2. CONFIG ===============================================================


@pytest.fixture(autouse=True)
def own_log():
    """Commands set the log up for a program of its own: the next test finds it as it was."""
    log = lmgateway.log
    before = list(log.handlers), log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def config_of(flags=(), environ=None, env_file=None):
    """(Config, warnings) of a command line, an environment and a `.env` file's path."""
    args = lmgateway.build_parser().parse_args(list(flags))
    config, warnings, errors = lmgateway.load_config(vars(args), environ or {}, env_file)
    if errors:
        raise lmgateway.ConfigError(errors[0])
    return config, warnings


@pytest.fixture
def stopped(monkeypatch):
    """A command that should never have begun ends at once."""
    monkeypatch.setattr(lmgateway, "Stop", lambda: types.SimpleNamespace(wait=lambda seconds=None: True, status=0))
    monkeypatch.setattr(lmgateway, "freeze_start_up", lambda: None)


@pytest.fixture
def env_file(tmp_path, monkeypatch):
    """A function that writes a `.env` file and gives its path; the working directory has none of its own."""
    monkeypatch.chdir(tmp_path)

    def write(text, encoding="utf-8"):
        path = tmp_path / "settings.env"
        path.write_bytes(text.encode(encoding))
        return str(path)
    return write


@pytest.mark.parametrize("flags, environ, text, port, source", [
    ([], {}, "", 8001, None), ([], {}, "GATEWAY_PORT=1", 1, "@ line 1"),
    ([], {"GATEWAY_PORT": "2"}, "GATEWAY_PORT=1", 2, "environment variable GATEWAY_PORT"),
    (["--port", "3"], {"GATEWAY_PORT": "2"}, "GATEWAY_PORT=1", 3, "--port"), (["--port=3"], {}, "", 3, "--port"),
    ([], {"GATEWAY_PORT": " "}, "GATEWAY_PORT=1", 1, "@ line 1"),
    ([], {}, "GATEWAY_PORT=\nGATEWAY_PORT=7\nGATEWAY_PORT=", 7, "@ line 2")])
def test_flag_beats_environment_beats_env_file_beats_default(env_file, flags, environ, text, port, source):
    path = env_file(text)
    config, warnings = config_of(flags, environ, path)
    assert (config.port, config.sources.get("port"), warnings) == (port, source and source.replace("@", path), [])


def test_the_working_directorys_env_file_is_read_and_need_not_be_there(env_file, tmp_path):
    assert config_of()[0].port == 8001
    (tmp_path / ".env").write_text("GATEWAY_PORT=9", encoding="utf-8")
    assert (config_of()[0].port, config_of()[0].sources["port"]) == (9, ".env line 1")


@pytest.mark.parametrize("line, value", [
    ("LOG_FILE=a b", "a b"), ("LOG_FILE = x", "x"), ("export LOG_FILE=x", "x"), ("LOG_FILE='x # y'", "x # y"),
    ('LOG_FILE="x # y" # why', "x # y"), ("LOG_FILE=x # why", "x"), ("LOG_FILE=x#y", "x#y"),
    ("  LOG_FILE=x  ", "x"),
    ("# comment\n\n  # another\nLOG_FILE=x", "x"), ("LOG_FILE=a=b", "a=b"),
    ("LOG_FILE=a\r\nLOG_LEVEL=warn\r\n", "a"),
    ("\ufeffLOG_FILE=x", "x"), ("LOG_FILE=d\u00e9j\u00e0", "d\u00e9j\u00e0"), ('LOG_FILE=""', None)])
def test_env_files_are_read_as_people_write_them(env_file, line, value):
    assert config_of(env_file=env_file(line))[0].log_file == value


@pytest.mark.parametrize("variable", [row.variable for row in lmgateway.OPTIONS if row.variable != "NO_AUTH"])
def test_a_slip_in_any_name_of_ours_is_a_warning(env_file, variable):
    [warning] = config_of(env_file=env_file(f"OTHERS_OPTION=2\n{variable}S=1"))[1]
    assert f"line 2: {variable}S is not a known option; did you mean {variable}?" in warning


WRONG = {       # command line, `.env` -> what the one line on stderr names
    "port": (["--port", "70000"], "", ["--port", "70000", "65535"]),
    "port, no number": ([], "GATEWAY_PORT=http", ["settings.env line 1", "GATEWAY_PORT", "http", "65535"]),
    "address of LM Studio": (["--upstream", "127.0.0.1:1234"], "", ["--upstream", "http://127.0.0.1:1234"]),
    "allowlist": (["--allow", "10.0.0.0/99"], "", ["--allow", "192.168.1.0/24"]),
    "a line of no form": ([], "GATEWAY_PORT 1", ["settings.env line 1", "NAME=value"]),
    "log directory": (["--log-dir", __file__], "", ["--log-dir", "directory"]),
    "`.env` that is not there": (["--env-file", "/nowhere/.env"], "", ["--env-file /nowhere/.env"]),
    "unknown flag": (["--prot", "1"], "", ["--prot", "--port"]),
    "shortened flag": (["--tail"], "", ["--tail is not", "--tail-only"]),
    "unknown flag, nothing near": (["--bogus"], "", ["--bogus is not a known option; see --help"]),
    "flag without a value": (["--port"], "", ["--port", "--help"]),
    "path without --tail-only": (["x.log"], "", ["x.log", "--tail-only"]),
    "path that is not there": (["--tail-only", "/nowhere/x.log"], "", ["/nowhere/x.log", "log"]),
    "event": (["--tail-only", "--events", "lmstudio_chat_strat"], "", ["--events", "lmstudio_chat_start"]),
    "no event": (["--tail-only", "--events", ","], "", ["--events"]),
    "a command without its dashes": (["demo"], "", ["demo: did you mean --demo?"]),
    "two commands": (["--tail-only", "--demo"], "", ["--tail-only", "--demo"]),
    "a flag of another command": (["--json"], "", ["--json", "--tail-only"]),
    "LAN without a key": (["--host", "0.0.0.0"], "", ["--host", "GATEWAY_API_KEY", "--no-auth"]),
    "certificate without its key": (["--tls-cert", "x.pem"], "", ["--tls-cert", "--tls-key"]),
    "log file": (["--tail-only", "--log-file", "/nowhere/x/y.log"], "", ["--log-file", "/nowhere/x/y.log"]),
    "log file of .env": (["--tail-only"], "LOG_FILE=/nowhere/x",
                         ["--log-file /nowhere/x", "LOG_FILE", "settings.env line 1"]),
    "certificate of .env": ([], "TLS_CERT=/nowhere/c\nTLS_KEY=/nowhere/k", [
        "/nowhere/c", "TLS_CERT", "settings.env line 1", "TLS_KEY", "settings.env line 2", "PEM"]),
    "history of .env": (["--port", "0"], "HISTORY_FILE=/nowhere/x",
                        ["HISTORY_FILE", "settings.env line 1", "name a file"]),
    "keys file of .env": (["--list-keys"], f"KEYS_FILE={HERE}",
                          ["KEYS_FILE", "settings.env line 1", "name a file"]),
    "LAN without a key by .env": ([], "GATEWAY_HOST=0.0.0.0",
                                 ["GATEWAY_HOST", "settings.env line 1", "--no-auth"]),
    "an empty key": (["--api-key", "anna=,bob=K"], "", ["--api-key", "NAME=KEY"]),
    "nobody allowed": (["--allow", ""], "", ["--allow", "192.168.1.0/24"]),
    "no rights": (["--new-key", "x", "--rights", ""], "", ["--rights", "infer"]),
    "no days": (["--prune", "0"], "", ["--prune 0", "days"]),
    "days that are no number": (["--prune=-1"], "", ["--prune -1", "days"]),
    "no logs to prune": (["--prune", "30", "--log-dir", "/nowhere"], "", ["--prune", "/nowhere", "--log-dir"]),
    "yes to nothing": (["--yes"], "", ["--yes", "--prune"]),
    "rights of nobody": (["--rights", "infer"], "", ["--rights", "--new-key"]),
    "an address that is none": (["--watch", "ftp://x"], "", ["--watch ftp://x", "http://"]),
}


@pytest.mark.parametrize("flags, text, named", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_with_option_source_and_remedy_and_status_2(env_file, capfd, stopped, flags, text, named):
    assert lmgateway.main(["--env-file", env_file(text), *flags]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "[info]" not in line]
    assert (out, len(lines)) == ("", 1), err
    for word in named:
        assert word in lines[0]


@pytest.mark.parametrize("options", [{"host": "localhost"}, {"host": "::1"}, {"host": "0.0.0.0", "no_auth": True},
                                     {"host": "0.0.0.0", "api_key": {"anna": "secret"}}], ids=str)
def test_a_gateway_on_loopback_with_a_key_or_without_auth_may_start(home, options):
    lmgateway.check_exposure(lmgateway.Config(**options))
    with pytest.raises(lmgateway.ConfigError, match="--no-auth"):
        lmgateway.check_exposure(lmgateway.Config(host="192.168.1.5"))


def test_an_env_file_in_another_encoding_is_read_as_far_as_it_goes(env_file):
    config = config_of(env_file=env_file("LOG_FILE=d\u00e9j\u00e0\nGATEWAY_PORT=7", "latin-1"))[0]
    assert (config.log_file, config.port) == ("d\ufffdj\ufffd", 7)


def test_rows_of_options_are_complete_and_their_names_unique(env_file):
    rows, config = lmgateway.OPTIONS, config_of()[0]
    for field in ("name", "variable"):
        assert len({getattr(row, field) for row in rows}) == len(rows)
    assert all(row.about and re.fullmatch(r"[A-Z][A-Z0-9_]+", row.variable) for row in rows)
    fixed = {"LMSTUDIO_BASE_URL": ("--upstream", "http://127.0.0.1:1234"), "GATEWAY_HOST": ("--host", "127.0.0.1"),
             "GATEWAY_PORT": ("--port", 8001), "GATEWAY_API_KEY": ("--api-key", {}), "IP_ALLOWLIST": ("--allow", None),
             "REQUIRE_AUTH_FOR_HEALTH": (None, False), "LOG_LEVEL": ("--log-level", "info"),
             "PROXY_TIMEOUT": (None, 600000), "PROXY_STREAM_TIMEOUT": (None, 0), "LMSTUDIO_LOG_DIR": ("--log-dir", None),
             "ENABLE_LOG_MONITORING": (None, True), "MAX_BODY_BYTES": (None, 256 * 1024 * 1024),
             "REQUESTS_KEPT": (None, 100)}
    assert fixed == {row.variable: (row.flag, getattr(config, row.name)) for row in rows if row.variable in fixed}


def nets(*texts):
    return tuple(map(lmgateway.ipaddress.ip_network, texts))


@pytest.mark.parametrize("variable, text", [
    *(("GATEWAY_PORT", text) for text in ("-1", "65536", "1.5", "x", "80_01", "\u0668\u0660")), ("MAX_CONNECTIONS", "7"),
    ("MAX_BODY_BYTES", "0"), ("REQUESTS_KEPT", "0"), ("HISTORY_DAYS", "-1"), ("NO_AUTH", "2"), ("LOG_LEVEL", "trace"),
    ("PROXY_TIMEOUT", "-1"), ("LOG_SOURCE", "file"),
    *(("LMSTUDIO_BASE_URL", text) for text in ("ftp://h:1", "//h:1", "http://", "http://h:0", "http://h:1/v1", "http://h?x",
                                               "http://u@h", "http://a b")),
    ("IP_ALLOWLIST", "localhost"), *(("CORS_ORIGINS", text) for text in ("chat.example", "https://x/y")),
    *(("GATEWAY_API_KEY", text) for text in ("a=1,a=2", "a b", "a\x07", "kl\u00e9bold", "==,bob=K", "=abc")),
    *(("UPSTREAM_TOKEN", text) for text in ("a b", "kl\u00e9", "a\x07"))])
def test_other_values_are_refused_with_the_form_and_secrets_are_not_shown(variable, text):
    with pytest.raises(lmgateway.ConfigError, match=variable) as refused:
        config_of(environ={variable: text})
    assert re.search(r"use |stands there twice|is made of", str(refused.value))
    assert (repr(text) in str(refused.value)) == (variable not in ("GATEWAY_API_KEY", "UPSTREAM_TOKEN"))


@pytest.mark.parametrize("host, alone", [
    *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "::1%lo", "::ffff:127.0.0.1",
                                "LocalHost", "a.localhost")),
    *((host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "::ffff:10.0.0.1", "localhost.example",
                                 "notlocalhost", ""))])
def test_loopback_is_what_only_this_machine_reaches(host, alone):
    assert lmgateway.loopback(host) is alone


@pytest.mark.parametrize("variable, text, value", [
    ("LOG_LEVEL", "WARN", "warn"), ("LMSTUDIO_BASE_URL", "http://a:1/", "http://a:1"),
    ("LMSTUDIO_BASE_URL", "https://[::1]", "https://[::1]"), ("IP_ALLOWLIST", "10.0.0.1, *", None),
    ("ENABLE_LOG_MONITORING", "No", False), ("CORS_ORIGINS", "https://A/, https://b", ("https://a", "https://b")),
    ("CORS_ORIGINS", "*", ("*",)), ("PROXY_TIMEOUT", " 0 ", 0), ("GATEWAY_PORT", "65535", 65535),
    ("HISTORY_DAYS", "0", 0), ("UPSTREAM_TOKEN", " x ", "x"),
    *(("NO_AUTH", text, True) for text in ("true", "1", "yes", "ON")),
    *(("NO_AUTH", text, False) for text in ("False", "0", "off")),
    ("IP_ALLOWLIST", "192.168.1.7/24, fd00::/8", nets("192.168.1.0/24", "fd00::/8")),
    ("IP_ALLOWLIST", "::ffff:192.168.1.0/120", nets("192.168.1.0/24")),
    ("IP_ALLOWLIST", "::ffff:0:0/95", nets("::fffe:0:0/95"))])
def test_values_are_taken_as_people_write_them(env_file, variable, text, value):
    name = next(row.name for row in lmgateway.OPTIONS if row.variable == variable)
    assert getattr(config_of(environ={variable: text})[0], name) == value


@pytest.mark.parametrize("flags, environ, line, said", [
    (["--host", "h"], {}, "", "--host h (GATEWAY_HOST)"), ([], {}, "", "--host 127.0.0.1 (GATEWAY_HOST)"),
    ([], {"GATEWAY_HOST": "h"}, "", "--host h (environment variable GATEWAY_HOST)"),
    ([], {}, "GATEWAY_HOST=h", "--host h (GATEWAY_HOST, @ line 1)")], ids=["flag", "default", "variable", "file"])
def test_an_option_is_named_with_its_value_and_where_that_comes_from(env_file, flags, environ, line, said):
    path = env_file(line)
    assert config_of(flags, environ, path)[0].named("host") == said.replace("@", str(path))
    assert config_of()[0].named("max_body", 1) == "MAX_BODY_BYTES 1 (MAX_BODY_BYTES)"     # it has no flag


@pytest.mark.parametrize("text, keys", [
    ("secret", {"default": "secret"}), ("a=1,b=2", {"a": "1", "b": "2"}),
    ("c2VjcmV0==", {"default": "c2VjcmV0=="}),
    ("a=x==", {"a": "x=="}), ("", {}), ("a=1 , b=2,", {"a": "1", "b": "2"}),
    ("one,two,three=3", {"default": "one", "key2": "two", "three": "3"}), ("abc=,", {"default": "abc="}),
    ("c2Vj==,YWJj==", {"default": "c2Vj==", "key2": "YWJj=="})])
def test_one_key_or_several_with_names(text, keys):
    assert lmgateway.api_keys(text) == keys


@pytest.mark.parametrize("settings, environ, upstream", [
    ('{"port": 4321}', {}, "http://127.0.0.1:4321"),
    ('{"port": 4321}', {"LMSTUDIO_BASE_URL": "http://x:1"}, "http://x:1"),
    *((settings, {}, "http://127.0.0.1:1234") for settings in ("{", "[]", '{"port": "x"}', '{"port": 99999}', None))])
def test_lm_studios_port_is_read_from_its_settings_if_none_is_given(home, settings, environ, upstream):
    if settings is not None:
        put(home / ".lmstudio/.internal/http-server-config.json", settings)
    assert lmgateway.find_upstream(config_of(environ=environ)[0]).upstream == upstream


# === 3. CORE =================================================================

SAMPLES = sorted((HERE / ".ci" / "samples").glob("*.log"))


def sample(name):
    """The path of a saved log; without it the test is skipped."""
    path = HERE / ".ci" / "samples" / f"{name}.log"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


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
    found += [(parser.entries, event) for event in parser.end()]
    assert parser.faults == 0
    return [(number, event) for number, event in found if event.name]  # else it is a fact for the join


def expected_of(log_path):
    text = log_path.with_name(log_path.stem + ".events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def bare(text):
    """Text without blanks at its line ends."""
    return "\n".join(line.rstrip() for line in text.split("\n"))


def fits(expected, event):
    """True when an event is what an expectation (a line of .ci/samples/*.events.jsonl) asks for: fields
    that are equal, near, one of several, absent or only contained; a time between two."""
    data = event.data
    if event.name != expected["event"]:
        return False
    for name, value in expected["data"].items():
        near = expected.get("tolerance", {}).get(name)
        if near is None and data.get(name) != value:
            return False
        if near is not None and not (isinstance(data.get(name), (int, float))
                                     and abs(data[name] - value) <= near):
            return False
    for name, value in expected.get("may", {}).items():
        allowed = value if isinstance(value, list) else [value]
        if data.get(name) is not None and data[name] not in allowed:
            return False
    if any(data.get(name) not in values for name, values in expected.get("either", {}).items()):
        return False
    if any(data.get(name) is not None for name in expected.get("absent", ())):
        return False
    if any(bare(part) not in bare(str(data.get(name))) for name,
           part in expected.get("contains", {}).items()):
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
    events, rows = [event for _, event in parsed(log_path.read_bytes(), size)], expected_of(log_path)
    assert unmet(rows, events) == []
    assert misplaced(rows, events) == []
    for event in events:
        assert json.loads(lmgateway.to_json(event.data), parse_constant=no_constant) == event.data


def last_entry(row):
    return row["entry"][1] if isinstance(row["entry"], list) else row["entry"]


def first_entry(row):
    return row["entry"][0] if isinstance(row["entry"], list) else row["entry"]


def misplaced(expectations, events):
    """Pairs of events that came in the wrong order: one whose last entry is smaller than another's first comes first."""
    rest = list(enumerate(events))
    places = []
    for row in expectations:
        found = next((pair for pair in rest if fits(row, pair[1])), None)
        if found:
            rest.remove(found)
            places.append((found[0], row))
    return [(one["event"], other["event"]) for place, one in places for later, other in places
            if last_entry(one) < first_entry(other) and place > later]


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def short(events, *names):
    """The typed events as words: name without lmstudio_, then the values of the fields that tell them apart."""
    fields = ("messages", "progress", "reused", "total", "totalPromptTokens", "promptTokensToDecode", "n_ctx",
              "completionTokens", "totalMs", "acceptedDraftTokens", "outcome", "model")
    return [" ".join([event.name[9:],
                      *(f"{name}={event.data[name]}" for name in fields if name in event.data)])
            for event in events if event.name != "lmstudio_log" and (not names or event.name[9:] in names)]


def told(*lines, size=None):
    """The typed events of entries, as short() has them."""
    return short(event for _, event in parsed(entries_as_log(*lines), size))


def entries_as_log(*lines):
    """A log's bytes from entries that are written as `LEVEL text` or `SECOND LEVEL text`."""
    text = ""
    for line in lines:
        second, _, rest = line.partition(" ") if line[0].isdigit() else ("0", "", line)
        level, _, message = rest.partition(" ")
        gap = "" if message.startswith("[") else " "
        text += f"[2026-05-01 10:00:{int(second):02}][{level}]{gap}{message}\n"
    return text.encode()


def entries_of(text):
    """[[stamp, level, [lines]]] of a log in the file's style."""
    found = []
    for line in text.split("\n")[:-1]:
        header = re.match(r"\[([\d-]{10} [\d:]{8})\]\[(\w+)\] ?(.*)$", line)
        if header:
            found.append([header[1], header[2], [header[3]]])
        else:
            found[-1][2].append(line)
    return found


def log_of(entries, panel=False):
    """The log of such entries, in the file's style or as the Developer Logs panel copies it."""
    text = ""
    for stamp, level, lines in entries:
        if panel:
            text += f"{stamp} {f'[{level}]':>7}\n {lines[0]}" + "".join(f"\n{line}" for line in lines[1:]) + "\n"
        else:
            gap = "" if lines[0].startswith("[") or lines == [""] else " "
            text += f"[{stamp}][{level}]{gap}" + "\n".join(lines) + "\n"
    return text.encode()


def by_engine(entry):
    return entry[1] == "DEBUG" and not entry[2][0].startswith(("Received", "[LMS", "[Client", "1 Error"))


def rechunked(entries, random, torn):
    """The same lines in other entries, as the engine's output arrives from run to run; some broken over two headers."""
    found, k = [], 0
    while k < len(entries):
        stamp, level, lines = entries[k]
        k += 1
        if not by_engine(entries[k - 1]):
            found.append([stamp, level, lines])
            continue
        while k < len(entries) and by_engine(entries[k]) and entries[k][0] == stamp:
            lines, k = lines + entries[k][2], k + 1
        for number, line in enumerate(lines):
            blanks = [found.start() for found in re.finditer(r"(?<=\S) ", line)]
            if number == 0 or random.random() < 0.3:
                found.append([stamp, level, []])
            if blanks and random.random() < torn:
                place = random.choice(blanks)
                found[-1][2].append(line[:place])
                found.append([stamp, level, [line[place + 1:]]])
            else:
                found[-1][2].append(line)
    return found


def shuffled(entries, random):
    """The engine's entries and the app's come over channels of their own: within a second their order is chance."""
    found = list(entries)
    for _ in range(8):
        k = random.randrange(len(found) - 1)
        pair = found[k:k + 2]
        if (pair[0][0] == pair[1][0] and by_engine(pair[0]) != by_engine(pair[1])
                and not any(re.search(r"^Received|Running chat", entry[2][0]) for entry in pair)):
            found[k:k + 2] = pair[::-1]
    return found


FILE_STYLE = [path for path in SAMPLES if path.stem not in ("gui-paste", "panel-one-line")]
VARIED = {"whole lines in other entries": lambda entries, random: rechunked(entries, random, 0),
          "broken lines": lambda entries, random: rechunked(entries, random, 0.2),
          "another order in a second": lambda entries,
          random: rechunked(shuffled(entries, random), random, 0.1)}


@pytest.mark.parametrize("vary", VARIED.values(), ids=VARIED)
@pytest.mark.parametrize("log_path", [path for path in FILE_STYLE if "answer-in-debug" not in path.stem],
                         ids=lambda path: path.stem)    # there all that follows in an entry counts
def test_events_do_not_depend_on_how_the_engines_lines_fell_into_entries(utc, log_path, vary):
    rows = [row for row in expected_of(log_path) if row["event"] != "lmstudio_log"]
    entries = entries_of(log_path.read_text(encoding="utf-8"))
    for seed in range(12):
        data = log_of(vary(entries, Random(seed)))
        events = [event for _, event in parsed(data) if event.name != "lmstudio_log"]
        assert unmet(rows, events) == [], data.decode()


STYLES = {"panel": lambda data: log_of(entries_of(data.decode()), panel=True),
          "crlf": lambda data: data.replace(b"\n", b"\r\n")}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("size", [None, 1, 7], ids=["whole", "bytes", "sevens"])
@pytest.mark.parametrize("log_path", FILE_STYLE, ids=lambda path: path.stem)
def test_samples_in_other_styles_give_the_same_events(utc, log_path, size, style):
    data = log_path.read_bytes()
    plain, other = ([(event.name, event.data) for _, event in parsed(written, size)
                     if event.name != "lmstudio_log"]
                    for written in (data, style(data)))
    assert plain == other
    assert not any("\r" in str(event.data) for _, event in parsed(style(data)))


@pytest.mark.parametrize("rule", lmgateway.RULES,
                         ids=lambda rule: f"{rule.engines} {rule.fact or rule.sample[:30]}")
def test_each_rules_sample_is_recognised_by_that_rule(rule):
    pattern, rows = {"app": (lmgateway.APP, lmgateway.APP_ROWS),
                     "error": (lmgateway.ERRORS, lmgateway.ERROR_ROWS),
                     "engine": (lmgateway.ENGINE, lmgateway.ENGINE_ROWS)}[rule.where]
    assert rows[pattern.match(rule.sample).lastgroup][0] is rule
    assert set(rule.engines.split()) <= {"App", "G1", "G2", "G3", "MLX", "Splash"}


def test_every_fact_has_a_rule_and_every_rule_its_fact():
    facts = {name[3:] for name in dir(lmgateway.ChatTracker) if name.startswith("on_")}
    assert {rule.fact for rule in lmgateway.RULES if rule.fact} == facts


START = "INFO [m] Running chat completion on conversation with 2 messages."
STREAM = "INFO [m] Streaming response..."
FINISH = "INFO [m] Finished streaming response"
LEFT = ("INFO [LM STUDIO SERVER] Client disconnected. Stopping generation... (If the model is busy processing the "
        "prompt, it will finish first.)")
PROMPT = ("DEBUG slot launch_slot_: id  1 | task 7 | processing task, is_child = 0\nslot update_slots: id  1 | task 7 | "
          "new prompt, n_ctx_slot = 4096, n_keep = 3, task.n_tokens = 100\n"
          "slot update_slots: id  1 | task 7 | n_tokens = 40, memory_seq_rm [40, end)")
TIMED = ("DEBUG slot print_timing: id  1 | task 7 | \nprompt eval time =  500.00 ms /    60 tokens (    8.33 ms per token,"
         "   120.00 tokens per second)\n       eval time =  1000.00 ms /    20 tokens (   50.00 ms per token,    20.00 "
         "tokens per second)\n      total time =  1500.00 ms /    80 tokens")
RELEASE = "DEBUG slot      release: id  1 | task 7 | stop processing: n_tokens = 119, truncated = 0"
ANSWER = 'INFO [m] Generated prediction: {\n  "usage": {\n    "prompt_tokens": 100,\n    "completion_tokens": 21\n  }\n}'
READ = ["processing_start model=m",
        "token_info totalPromptTokens=100 promptTokensToDecode=60 n_ctx=4096 model=m",
        "cache_stats reused=40 total=100 model=m"]
STATS = "prediction_stats completionTokens=20 totalMs=1500.0 model=m"
CRASH = "ERROR Error: The model has crashed without additional information. (Exit code: 6)"
CHANNEL = "ERROR [m] Error: Channel Error"
ERRORS = {"a crash": (CRASH, "error"), "a channel error": (CHANNEL, "error model=m"),
          "a prompt that cannot be rendered": ('ERROR [m] Error rendering prompt with jinja template: "x"',
                                               "error model=m")}
SPLASH = "DEBUG 10:00:00 {} · input 1,100 · cached 100 · output 1,092 · TTFT 0.5s · 92.9 tok/s"
SPLASH_STATS = ["token_info totalPromptTokens=1100 promptTokensToDecode=1000 model=m",
                "cache_stats reused=100 total=1100 model=m", "prediction_stats completionTokens=1092 model=m"]
G1_RUN = ("DEBUG Sampling params:\trepeat_last_n = 64, repeat_penalty = 1.100\n\tmirostat = 0, mirostat_ent = 5.000\n"
          "Generate: n_ctx = 4096, n_batch = 512, n_predict = -1, n_keep = 3\nTotal prompt tokens: 100\n"
          "Prompt tokens to decode: 100\nBeginProcessingPrompt")
G1_TIMED = ("DEBUG Target model llama_perf stats:\nllama_perf_context_print: prompt eval time =  500.00 ms /   100 tokens "
            "(    5.00 ms per token,   200.00 tokens per second)\nllama_perf_context_print:        eval time =  1000.00 ms "
            "/    20 runs   (   50.00 ms per token,    20.00 tokens per second)\n"
            "llama_perf_context_print:       total time =  1500.00 ms /   120 tokens")
G1_READ = ["sampling_params model=m",
           "token_info totalPromptTokens=100 promptTokensToDecode=100 n_ctx=4096 model=m",
           "cache_stats reused=0 total=100 model=m", "processing_start model=m"]
G1_TWO = ["sampling_params", "token_info totalPromptTokens=100 promptTokensToDecode=100 n_ctx=4096",
          "cache_stats reused=0 total=100", "processing_start"]
G1_HEAD, G1_PROMPT, G1_BEGIN = re.fullmatch(r"(.*)\n(Total.*\d)\n(\w+)", G1_RUN, re.S).groups()
G1_PROMPT, G1_BEGIN = f"DEBUG {G1_PROMPT}", f"DEBUG {G1_BEGIN}"
G1_READY = "DEBUG FinishedProcessingPrompt. Progress: 100"
G1_SHORT = G1_RUN.replace("100", "50")
G1_SHORT_TIMED = G1_TIMED.replace("   100 tokens",
                                  "    50 tokens").replace("   20 runs", "    9 runs").replace("1500", "700")
G1_SHORT_READ = ["sampling_params", "token_info totalPromptTokens=50 promptTokensToDecode=50 n_ctx=4096",
                 "cache_stats reused=0 total=50"]
BEGUN = ["chat_start messages=2 model=m"]
OTHER = ["chat_start messages=2 model=x"]


def at(percent, model="m"):
    return f"INFO [{model}] Prompt processing progress: {percent:.1f}%"


def its(line, task=9):
    """The same line of another model's chat, or of another task."""
    return line.replace("[m]", "[x]").replace("task 7", f"task {task}").replace("id  1", "id  2")


def seen(percent, model="m"):
    return f"prompt_progress progress={percent:.1f} model={model}"


def answer(prompt, completion, model="m"):
    return ANSWER.replace("21", str(completion)).replace("100", str(prompt)).replace("[m]", f"[{model}]")


def task_run(task, prompt):
    return its(PROMPT, task).replace("n_tokens = 100", f"n_tokens = {prompt}")


def task_timed(task, completion):
    return its(TIMED, task).replace(" 20 tokens", f" {completion} tokens"), its(RELEASE, task)


# What the sample logs do not show: (entries, events).
SITUATIONS = {
    "the client leaves while its prompt is read, the app repeats itself": (
        [START, STREAM, PROMPT, at(40), LEFT, at(40), FINISH, RELEASE],
        [*BEGUN, *READ, seen(40), "chat_end outcome=disconnected model=m", seen(40)]),
    "the client leaves, and the engine's timings come all the same": (
        [START, STREAM, PROMPT, at(100), LEFT, TIMED, RELEASE],
        [*BEGUN, *READ, seen(100), "generation_start model=m", "chat_end outcome=disconnected model=m",
         STATS]),
    "the client of a plain request leaves, no prediction follows, the next one comes": (
        [START, PROMPT, LEFT, TIMED, RELEASE, "5 " + START],
        [*BEGUN, *READ, "chat_end outcome=disconnected model=m", STATS, *BEGUN]),
    "the client of a plain request leaves, and its prediction comes a second later": (
        [START, PROMPT, LEFT, TIMED, RELEASE, "1 " + ANSWER],
        [*BEGUN, *READ, "chat_end outcome=disconnected model=m",
         "prediction_stats completionTokens=21 totalMs=1500.0 model=m"]),
    "an abandoned request does not take the prediction of the next": (
        [START, "1 " + LEFT, "6 " + START, "7 " + ANSWER],
        [*BEGUN, "chat_end outcome=disconnected model=m", *BEGUN,
         "prediction_stats completionTokens=21 model=m", "chat_end outcome=finished model=m"]),
    "a disconnect line within a second after the end says nothing new": (
        [START, STREAM, FINISH, LEFT, "9 " + START, "9 " + LEFT],
        [*BEGUN, "chat_end outcome=finished model=m", *BEGUN, "chat_end outcome=disconnected model=m"]),
    "a disconnect line a second after an end is that of a chat begun since": (
        [START, STREAM, FINISH, START, at(0), LEFT],
        [*BEGUN, "chat_end outcome=finished model=m", *BEGUN, "processing_start model=m", seen(0),
         "chat_end outcome=disconnected model=m"]),
    "timings that come after the app's last line": (
        [START, PROMPT, ANSWER, TIMED, RELEASE],
        [*BEGUN, *READ, "chat_end outcome=finished model=m",
         "prediction_stats completionTokens=21 totalMs=1500.0 model=m"]),
    "draft tokens come after the total": (
        [START, STREAM, PROMPT,
         TIMED + "\ndraft acceptance = 0.95455 (   63 accepted /    66 generated), mean len =  3.86",
         RELEASE, FINISH],
        [*BEGUN, *READ, "prediction_stats completionTokens=20 totalMs=1500.0 acceptedDraftTokens=63 model=m",
         "chat_end outcome=finished model=m"]),
    "a chat inside the app while one over HTTP waits": (
        [PROMPT, TIMED, RELEASE, START, STREAM, at(0), FINISH],
        [*(event.replace(" model=m", "") for event in READ), STATS.replace(" model=m", ""), *BEGUN,
         "processing_start model=m", seen(0), "chat_end outcome=finished model=m"]),
    "progress before BeginProcessingPrompt": (
        [START, STREAM, at(0), G1_RUN, at(100), G1_READY, G1_TIMED, FINISH],
        [*BEGUN, "processing_start model=m", seen(0), *G1_READ[:3], seen(100), "generation_start model=m",
         STATS,
         "chat_end outcome=finished model=m"]),
    "the end of the prompt is said twice while another request waits": (
        [START, STREAM, G1_RUN, START, STREAM, G1_READY, at(100), G1_TIMED, FINISH,
         G1_RUN, at(100), G1_TIMED, FINISH],
        [*BEGUN, *G1_READ, *BEGUN, "generation_start model=m", seen(100), STATS,
         "chat_end outcome=finished model=m",
         *G1_READ, seen(100), "generation_start model=m", STATS, "chat_end outcome=finished model=m"]),
    "an in-app run of G1 is told in its own second": (
        [G1_RUN, G1_TIMED, "3 " + START],
        ["sampling_params", *G1_TWO[1:], STATS.replace(" model=m", ""), *BEGUN]),
    "Splash, not streaming": (
        [START, at(100), SPLASH.format("Done"), ANSWER],
        [*BEGUN, "processing_start model=m", seen(100), "generation_start model=m", *SPLASH_STATS,
         "chat_end outcome=finished model=m"]),
    "Splash, cancelled": (
        [START, STREAM, at(100), LEFT, SPLASH.format("Cancelled"), FINISH],
        [*BEGUN, "processing_start model=m", seen(100), "generation_start model=m",
         "chat_end outcome=disconnected model=m",
         *SPLASH_STATS]),
    "a crash ends all that runs, and the next request is a new one": (
        [START, STREAM, PROMPT, START, STREAM, CRASH, "4 " + START, "4 " + STREAM, "4 " + FINISH],
        [*BEGUN, *READ, *BEGUN, "error", "chat_end outcome=error model=m", "chat_end outcome=error model=m",
         *BEGUN, "chat_end outcome=finished model=m"]),
    "crashes one after the other": ([CRASH, "1 " + CRASH], ["error", "error"]),
    "an end without a start": ([FINISH], ["chat_end outcome=finished model=m"]),
    "an end without a start, and the client leaves": ([FINISH, LEFT], ["chat_end outcome=finished model=m"]),
    "an end without a start, and another client leaves later": (
        [FINISH, "2 " + LEFT], ["chat_end outcome=finished model=m", "chat_end outcome=disconnected"]),
    "an end without a start, and two clients leave": (
        [FINISH, LEFT, LEFT], ["chat_end outcome=finished model=m", "chat_end outcome=disconnected"]),
    "progress without a start, and the client leaves": (
        [at(50), FINISH, LEFT, START], [seen(50), "chat_end outcome=finished model=m", *BEGUN]),
    **{f"{name}, and then the client leaves": (
        [START, STREAM, line, LEFT], [*BEGUN, error, "chat_end outcome=error model=m"])
       for name, (line, error) in ERRORS.items()},
    **{f"{name}, and its stream ends": (
        [START, STREAM, line, FINISH], [*BEGUN, error, "chat_end outcome=error model=m"])
       for name, (line, error) in ERRORS.items()},
    **{f"the client leaves, and then {name}": (
        [START, STREAM, LEFT, line], [*BEGUN, "chat_end outcome=disconnected model=m", error])
       for name, (line, error) in ERRORS.items()},
    "a channel error, and later another client leaves": (
        [START, STREAM, CHANNEL, "2 " + LEFT],
        [*BEGUN, "error model=m", "chat_end outcome=error model=m", "chat_end outcome=disconnected"]),
    "a channel error, and a stream of another model ends": (
        [START, STREAM, CHANNEL, its(FINISH)],
        [*BEGUN, "error model=m", "chat_end outcome=error model=m", "chat_end outcome=finished model=x"]),
    "a channel error, and two clients leave": (
        [START, STREAM, CHANNEL, LEFT, LEFT],
        [*BEGUN, "error model=m", "chat_end outcome=error model=m", "chat_end outcome=disconnected"]),
    "progress without a start": ([at(50), FINISH], [seen(50), "chat_end outcome=finished model=m"]),
    "the server stops while a chat runs": (
        [START, "INFO Server stopped.", "5 " + START, "5 " + STREAM, "5 " + FINISH],
        [*BEGUN, "chat_end outcome=error model=m", *BEGUN, "chat_end outcome=finished model=m"]),
    "plugins, clients and embeddings say nothing": (
        ["ERROR [Plugin(a/b)] stderr: Error: Channel Error\nBeginProcessingPrompt",
         "DEBUG [Client=plugin] Client disconnected.",
         "INFO Received request to embed: x\nBeginProcessingPrompt\nFinished streaming response",
         "DEBUG [LMSAuthenticator][Client=x] BeginProcessingPrompt"], []),
    "an ERROR that is no end": (
        [START, "ERROR Error in channel handler: x",
         "ERROR Unexpected endpoint or method. (GET /x). Returning 200 anyway"],
        [*BEGUN, "error", "error"]),
    "the model is loaded first": (
        ["DEBUG Received request: POST to /v1/chat/completions with body [Hidden]",
         'INFO [JIT] Requested model (m) is not loaded. Loading "m" now...', "4 " + START, "4 " + STREAM,
         "4 " + FINISH],
        [*BEGUN, "chat_end outcome=finished model=m"]),
    "a model's name with blanks and brackets": (
        [START.replace("[m]", "[my model [x]]"), FINISH.replace("[m]", "[my model [x]]")],
        ["chat_start messages=2 model=my model [x]", "chat_end outcome=finished model=my model [x]"]),
    "figures that cannot be": (
        [START, at(0).replace("0.0", "9" * 400 + ".0"), at(0).replace("0.0", "999.0"),
         PROMPT.replace("40", "9" * 400)],
        [*BEGUN, "processing_start model=m", seen(100), "generation_start model=m"]),
    "an app's words at another level": (["DEBUG Running chat completion on conversation with 7 messages."],
                                        []),
    "a cancelled task says that a disconnect line was its own, which seemed to be that of one that had ended": (
        [START, STREAM, PROMPT, its(START), its(STREAM), at(100, "x"), its(FINISH), LEFT,
         "DEBUG srv          stop: cancel task, id_task = 7", FINISH],
        [*BEGUN, *READ, *OTHER, "processing_start model=x", seen(100, "x"), "generation_start model=x",
         "chat_end outcome=finished model=x", "chat_end outcome=disconnected model=m"]),
    "of two chats of a model the one that ends first has begun to generate": (
        [START, START, PROMPT, its(PROMPT).replace("= 100", "= 70"), at(0), at(0), at(100),
         *task_timed(9, 20),
         answer(70, 20), at(100), *task_timed(7, 20), answer(100, 20)],
        [*BEGUN, *BEGUN, *READ, READ[0],
         "token_info totalPromptTokens=70 promptTokensToDecode=30 n_ctx=4096 model=m",
         "cache_stats reused=40 total=70 model=m", seen(0), seen(0), seen(100), "generation_start model=m",
         STATS, "chat_end outcome=finished model=m", seen(100), "generation_start model=m", STATS,
         "chat_end outcome=finished model=m"]),
    "G1, where the start of neither run was seen": (
        [G1_TIMED, G1_SHORT_TIMED], ["prediction_stats completionTokens=20 totalMs=1500.0",
                                     "prediction_stats completionTokens=9 totalMs=700.0"]),
    "what was left is read to its end first": (
        [START, at(0), its(START), LEFT, "3 " + at(100), "4 " + ANSWER],
        [*BEGUN, "processing_start model=m", seen(0), *OTHER, "chat_end outcome=disconnected", seen(100),
         "generation_start model=m", "prediction_stats completionTokens=21 model=m"]),
}


@pytest.mark.parametrize("size", [None, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("lines, events", SITUATIONS.values(), ids=SITUATIONS)
def test_situations(utc, lines, events, size):
    assert told(*lines, size=size) == events


# Runs at once, and which figures belong together: (entries, [(promptTokens, completionTokens, tokens/s, model)]).
FIGURES = {
    "figures that waited for an answer are told when none is left to come": (
        [START, START, STREAM, task_run(1, 168), task_run(2, 52), *task_timed(1, 135), *task_timed(2, 140),
         FINISH,
         answer(52, 140)],
        [(52, 140, 20.0, "m"), (168, 135, 20.0, "m")]),
    "timings of a task are never another's": (
        [START, STREAM, START, STREAM, task_run(1, 300), task_run(2, 70), *task_timed(2, 33),
         *task_timed(1, 44), FINISH, FINISH],
        [(70, 33, 20.0, "m"), (300, 44, 20.0, "m")]),
}


@pytest.mark.parametrize("lines, expected", FIGURES.values(), ids=FIGURES)
def test_runs_at_once_keep_their_own_figures(utc, lines, expected):
    stats = [event.data for _, event in parsed(entries_as_log(*lines))
             if event.name == "lmstudio_prediction_stats"]
    assert [tuple(map(data.get, ("promptTokens", "completionTokens", "tokensPerSecond", "model")))
            for data in stats
            ] == expected


def test_an_answer_that_is_read_long_before_its_engines_figures_waits_for_them(utc):
    parser, stats = Parser(), []
    for lines in ([START, PROMPT, ANSWER], [TIMED, RELEASE]):
        stats.append([event.data.get("totalMs") for event in parser.feed(entries_as_log(*lines)) + parser.quiet()
                      if event.name == "lmstudio_prediction_stats"])
    assert stats == [[], [1500.0]]


def test_one_request_of_two_is_plain_while_the_other_streams(utc):
    others = [line.replace("id  1 | task 7", "id  2 | task 9") for line in (PROMPT, TIMED, RELEASE)]
    events = told(START, STREAM, PROMPT, START, *others, ANSWER, TIMED, RELEASE, FINISH)
    assert events == [*BEGUN, *READ, *BEGUN, *READ,
                      "prediction_stats completionTokens=21 totalMs=1500.0 model=m",
                      "chat_end outcome=finished model=m", STATS, "chat_end outcome=finished model=m"]


HEADER = b"[2026-05-01 10:00:00][INFO] "
WORDS = [b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", "é🦊".encode(), b" ", b"{", b"}", b"\n}\n", b"\n]\n",
         b"\t", b"[m] ",
         HEADER, b"[2026-05-01 10:00:01][DEBUG] ", b"[2026-05-01 10:00:01][DEBUG]",
         b"2026-05-01 10:00:02  [INFO]\n ",
         b"2026-05-01 10:00:02 [DEBUG]\n", b"[2026-13-77 99:99:99][WARN] ",
         b"[2026-05-01 10:00:03][ERROR] ", b"inf", b"nan",
         *(rule.sample.encode() for rule in lmgateway.RULES)]


def told_and_logged(data, size=None):
    """(typed events, entries as logged) of any bytes; an entry that came in two events is one again."""
    typed_events, logged = [], []
    for _, event in parsed(data, size):
        text = re.sub("\n+", "\n", event.data.get("message", ""))
        if event.name != "lmstudio_log":
            typed_events.append((event.name, event.data))
        elif event.data.get("continued"):
            logged[-1] = (*logged[-1][:3], logged[-1][3].rstrip("\n") + "\n" + text)
        else:
            logged.append((event.data["timestamp"], event.data["level"], event.data["tags"], text))
    return typed_events, [(*entry[:3], entry[3].strip("\n")) for entry in logged]


@pytest.mark.parametrize("seed", range(80))
def test_any_bytes_give_the_same_events_wherever_they_are_split_and_never_raise(utc, seed):
    random = Random(seed)
    pieces = [random.choice(WORDS) if random.random() < 0.8
              else bytes(random.choices(range(256), k=random.randrange(12)))
              for _ in range(random.randrange(150))]
    data = b"".join(piece + (b"\n" if random.random() < 0.5 else b"") for piece in pieces)
    whole = told_and_logged(data)
    for name, fields in whole[0]:
        json.loads(lmgateway.to_json(fields), parse_constant=no_constant)
    for size in (1, random.randrange(2, 40), random.randrange(40, 400)):
        assert told_and_logged(data, size) == whole


BODY = b"[2026-05-01 10:00:00][DEBUG] Received request: POST to /v1/chat/completions with body {\n"
HUGE = {
    "a line of 5 MB": HEADER + b"x" * 5_000_000 + b"\n",
    "a line of 5 MB without an end": HEADER + b"x" * 5_000_000,
    "a line of 5 MB without a header": b"x" * 5_000_000,
    "an entry of 5 MB": HEADER + b"some words of a user\n" * 240_000,
    "a body of 5 MB": BODY + b'  "content": "x",\n' * 280_000 + b"}\n",
    "an engine's entry of 5 MB": b"[2026-05-01 10:00:00][DEBUG] srv  update_slots: all slots are idle\n" + b"words of nobody " * 20 + b"\n" * 2 + b"x" * 1000 + b"\n" * 5000 + b"word\n" * 1000 + b"x" * 4_900_000 + b"\n",
    "ten thousand braces": BODY + b"{" * 10_000 + b"\n" + b"}" * 10_000 + b"\n}\n",
    "ten thousand braces in a prediction": HEADER + b"Generated prediction: " + b'{"a":' * 10_000 + b"\n",
    "ten thousand headers": HEADER * 10_000 + b"\n",
    "ten thousand tags": HEADER.rstrip() + b"[m]" * 10_000 + b"\n",
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE)
def test_huge_entries_are_plain_events_in_bounded_memory(utc, data):
    with tracing() as peak:
        parser, events = Parser(), []
        for start in range(0, len(data), 65536):
            events += parser.feed(data[start:start + 65536])
        events += parser.end()
        assert peak() < 12_000_000
    assert {event.name for event in events} <= {"lmstudio_log", "lmstudio_prediction_stats",
                                                "lmstudio_chat_end"}
    logs = [event.data for event in events if event.name == "lmstudio_log"]
    assert len(logs) == (0 if data.startswith(b"x") else 1)
    for entry in logs:
        assert len(entry["message"]) <= lmgateway.Entry.LIMIT and len(entry["tags"]) <= 32
        assert entry.get("truncated", False) is (len(data) > lmgateway.Entry.LIMIT)


@pytest.mark.parametrize("time_text, ms", [("0.5s", 500.0), ("850ms", 850), ("1,200ms", 1200)])
def test_splash_tells_its_first_token_in_either_unit(utc, time_text, ms):
    data = entries_as_log(START, STREAM, SPLASH.format("Done").replace("0.5s", time_text), FINISH)
    (stats,) = [event.data for _, event in parsed(data) if event.name == "lmstudio_prediction_stats"]
    assert (stats["timeToFirstTokenMs"], stats["tokensPerSecond"]) == (ms, 92.9)


def test_a_sampling_line_is_read_in_one_way_only(utc):
    """With two ways for each pair this would take longer than anybody waits."""
    assert told("DEBUG sampler params: " + "a = 1e5" * 500 + "!") == []
    assert told("DEBUG sampler params: " + "a = 1e5," * 500 + "!") == []


@pytest.mark.parametrize("heading, line", [
    ("Sampling params:", "\ttop_k = 40, frequency_penalty = inf, min_p = -nan, top_p = 1e-03, temp = 0.5"),
    ("0.30.015.189 I slot launch_slot_: id  3 | task -1 | sampler params:",
     "top_k = 40, repeat_penalty = -inf, top_p = 1.0e-3, temp = 0.500"),
    ("Sampling params:", f"top_k = 40, frequency_penalty = inf, top_p = 0.{'0' * 40}, temp = 0.5")])
def test_sampling_parameters_may_be_infinite_or_have_exponents(utc, heading, line):
    data = entries_as_log(START, f"DEBUG {heading}\n{line}\n\tmirostat = 0, mirostat_ent = 5.000")
    (block,) = [event.data for _, event in parsed(data) if event.name == "lmstudio_sampling_params"]
    assert {name: value for name, value in block.items() if name not in ("timestamp", "model")} == {
        "top_k": 40, "top_p": 0.0 if "0" * 40 in line else 0.001, "temp": 0.5, "mirostat": 0,
        "mirostat_ent": 5.0}


def test_a_header_behind_a_huge_line_is_seen(utc):
    data = HEADER + b"x" * 1_000_000 + b"\n" + HEADER + b"[m] Finished streaming response\n"
    assert short(event for _, event in parsed(data, 65536)) == ["chat_end outcome=finished model=m"]


def test_lines_that_come_after_a_quiet_continue_their_entry(utc):
    parser = Parser()
    first = parser.feed(b"[2026-05-01 10:00:00][DEBUG] Total prompt tokens: 100\n")
    assert [event.name for event in [*first, *parser.quiet()] if event.name] == ["lmstudio_log"]
    later = parser.feed(b"Prompt tokens to decode: 60\n")
    assert short(later) == ["token_info totalPromptTokens=100 promptTokensToDecode=60"]
    [log] = parser.quiet()
    assert log.data == {"timestamp": "2026-05-01 10:00:00", "level": "DEBUG",
                        "message": "Prompt tokens to decode: 60",
                        "tags": [], "continued": True}


def test_a_sampling_block_goes_on_after_a_quiet(utc):
    parser, events = Parser(), []
    for text in ("Sampling params:", "repeat_last_n = 64, top_k = 40,", "mirostat = 0, mirostat_ent = 5.000"):
        events += parser.feed(f"[2026-05-01 10:00:00][DEBUG] {text}\n".encode()) + parser.quiet()
    [block] = [event.data for event in events if event.name == "lmstudio_sampling_params"]
    assert block == {"timestamp": "2026-05-01T10:00:00Z", "repeat_last_n": 64, "top_k": 40, "mirostat": 0,
                     "mirostat_ent": 5.0}


@pytest.mark.parametrize("cut", range(1, 66, 3))
def test_a_sampling_line_may_be_torn_anywhere(utc, cut):
    line = "repeat_last_n = 64, repeat_penalty = 1.100, dry_multiplier = 0.825"
    [block] = [event.data for _, event in parsed(entries_as_log(
        "DEBUG Sampling params:", f"DEBUG {line[:cut]}", f"DEBUG {line[cut:]}",
        "DEBUG mirostat = 0, mirostat_ent = 5.000"))
        if event.name == "lmstudio_sampling_params"]
    assert block == {"timestamp": "2026-05-01T10:00:00Z", "repeat_last_n": 64, "repeat_penalty": 1.1,
                     "dry_multiplier": 0.825, "mirostat": 0, "mirostat_ent": 5.0}


@pytest.mark.parametrize("text, at_once", [
    (f"{START}", True), (f"{FINISH}", True), (f"{ANSWER}", True),
    ("DEBUG Received request: GET to /v1/models", True),
    ("ERROR Error: Channel Error", False), ("INFO words that nobody knows", False), (f"{TIMED}", False)])
def test_only_entries_that_may_go_on_are_held_back(utc, text, at_once):
    level, _, message = text.partition(" ")
    parser = Parser()
    events = parser.feed(f"[2026-05-01 10:00:00][{level}] {message}\n".encode())
    assert ("lmstudio_log" in [event.name for event in events]) is at_once
    assert ("lmstudio_log" in [event.name for event in parser.quiet()]) is not at_once


@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_a_byte_order_mark_is_no_text(utc, size):
    data = b"\xef\xbb\xbf" + HEADER + b"[m] Finished streaming response\n"
    assert short(event for _, event in parsed(data, size)) == ["chat_end outcome=finished model=m"]


def test_a_fault_of_ours_costs_one_event_and_is_counted(utc, monkeypatch):
    parser = Parser()
    monkeypatch.setattr(lmgateway.ChatTracker, "_of", lambda self, entry: 1 / 0)
    assert short(parser.feed(HEADER + b"[m] Finished streaming response\n")) == []
    monkeypatch.undo()
    assert short(parser.feed(HEADER + b"[m] Finished streaming response\n")) == ["chat_end outcome=finished model=m"]
    assert parser.faults == 1


@pytest.mark.parametrize("text, tags", [
    ("[DEBUG][LMSAuthenticator][Client=lms-cli] Client created.", ["LMSAuthenticator", "Client=lms-cli"]),
    ("[ERROR][Plugin(acme/notes)] stderr: x", ["Plugin(acme/notes)"]),
    ("[INFO][JIT] Just-in-time model loading active.", ["JIT"]),
    ("[DEBUG][cache_wrapper][INFO]: Prompt cache: using 0/11 tokens from cache", ["cache_wrapper", "INFO"]),
    ("[INFO] words [not a tag]", [])])
def test_leading_tags_stand_in_tags_in_their_order(utc, text, tags):
    [log] = [event.data for _, event in parsed(f"[2026-05-01 10:00:00]{text}\n".encode())
             if event.name == "lmstudio_log"]
    assert log["tags"] == tags


def test_what_nobody_knows_is_counted_and_shown_without_its_words(utc):
    parser = Parser()
    parser.feed(b"before the first header\n[2026-05-01 10:00:00][DEBUG] sphinx: mystery 77 of 'my secret'\n" + HEADER
                + b"Somethingnew: happened\n")
    parser.end()
    assert (parser.headless, parser.unknown, parser.entries) == (1, 2, 2)
    assert parser.samples == ['sph~: mys~ 0 of "..."', "Som~: hap~"]


def test_engines_are_counted_by_generation(utc):
    sample("two-models-at-once")
    counts = {}
    for path in FILE_STYLE:
        parser = Parser()
        parser.feed(path.read_bytes())
        counts[path.stem] = set(+parser.by_engine)
        assert parser.unknown == 0 or path.stem in ("bystanders", "errors", "g1-crash"), parser.samples
    for name, found in counts.items():
        known = {"g1a": "G1", "g1": "G1", "g2": "G2", "g3": "G3", "mlx": "MLX", "splash": "Splash",
                 "api": "G3"}
        if name.partition("-")[0] in known:
            assert found == {known[name.partition("-")[0]]}, name
    assert counts["two-models-at-once"] == {"G3", "MLX"}


def test_an_end_of_a_chat_that_turned_out_to_be_none_is_no_fault(utc):
    events = told(
        "5 DEBUG FinishedProcessingPrompt. Progress: 100",
        "8 INFO [m/one] Running chat completion on conversation with 1 messages.",
        "9 INFO [m/two] Prompt processing progress: 100.0%",
        "13 INFO [LM STUDIO SERVER] Streaming response...",
        "13 DEBUG Sampling params:\trepeat_last_n = 64, repeat_penalty = 1.100, frequency_penalty = 0.000\n"
        "llama_perf_context_print:       total time =     509.59 ms /   217 tokens",
        "13 INFO Finished streaming response",
        "15 INFO [m/one] Streaming response...",
        "18 INFO [m/one] Prompt processing progress: 100.0%",
        "18 DEBUG 16:45:24 Done \u00b7 input 2,600 \u00b7 cached 2,187 \u00b7 output 7 \u00b7 TTFT 0.3s "
        "\u00b7 87.1 tok/s",
        "20 INFO [m/one] Finished streaming response",
        "22 DEBUG Target model llama_perf stats:\n"
        "llama_perf_context_print:       total time =     211.47 ms /    40 tokens")
    assert events[-1].startswith("prediction_stats")


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the system cannot change its time zone")
@pytest.mark.parametrize("zone, times, expected", [
    ("Europe/Berlin",
     ["2025-10-26 02:59:59", "2025-10-26 02:00:00", "2025-10-26 02:59:59", "2025-10-26 03:00:00"],
     ["00:59:59", "01:00:00", "01:59:59", "02:00:00"]),
    ("Europe/Berlin", ["2026-03-29 01:59:59", "2026-03-29 03:00:00"], ["00:59:59", "01:00:00"]),
    ("America/New_York",
     ["2025-11-02 01:59:58", "2025-11-02 01:59:57", "2025-11-02 01:00:10", "2025-11-02 02:00:00"],
     ["05:59:58", "05:59:57", "06:00:10", "07:00:00"]),
    ("Asia/Kathmandu", ["2026-01-01 00:00:00"], ["18:15:00"]),
    ("Europe/Berlin",
     ["2026-01-01 10:00:07", "2026-01-01 10:00:61", "2026-13-01 10:00:07", "2026-01-01 10:00:08"],
     ["09:00:07", "10:00:61", "10:00:07", "09:00:08"])])
def test_local_time_becomes_utc_in_file_order(monkeypatch, zone, times, expected):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        data = "".join(f"[{stamp}][INFO][m] Prompt processing progress: 1.0%\n" for stamp in times)
        events = [event for _, event in parsed(data.encode()) if event.name == "lmstudio_prompt_progress"]
        assert [event.data["timestamp"][11:19] for event in events] == expected
    finally:
        monkeypatch.undo()
        time.tzset()


# --- 3.4 to 3.6: dialects, meter, request bodies

def event(data, name=None):
    """The bytes of one streamed event."""
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(delta, finish=None, **more):
    return event({"id": "chatcmpl-a2", "object": "chat.completion.chunk", "model": "qwen/qwen3-8b", **more,
                  "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})


USAGE_CHUNK = event({"id": "chatcmpl-a2", "model": "qwen/qwen3-8b", "choices": [],
                     "usage": {"prompt_tokens": 21, "completion_tokens": 3, "total_tokens": 24}})
CHAT_STREAM = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hi"}), chunk({"content": "."}),
               chunk({}, "stop"), USAGE_CHUNK, b"data: [DONE]\n\n"]
CHAT_WHOLE = (b'{"id":"chatcmpl-a1","object":"chat.completion","created":1795400000,"model":"qwen/qwen3-8b","choices":'
              b'[{"index":0,"logprobs":null,"finish_reason":"stop","message":{"role":"assistant","content":"Hi."}}],'
              b'"usage":{"prompt_tokens":21,"completion_tokens":3,"total_tokens":24,"completion_tokens_details":'
              b'{"reasoning_tokens":2}},"stats":{}}')
V0_WHOLE = (b'{"model":"qwen/qwen3-8b","choices":[{"finish_reason":"stop","message":{"content":"Hi."}}],"usage":'
            b'{"prompt_tokens":21,"completion_tokens":3,"total_tokens":24},"stats":{"tokens_per_second":48.2,'
            b'"time_to_first_token":0.12,"generation_time":0.06,"stop_reason":"eosFound"}}')
COMPLETION_WHOLE = (b'{"model":"qwen/qwen3-8b","choices":[{"text":"Hi.","finish_reason":"length"}],'
                    b'"usage":{"prompt_tokens":21,"completion_tokens":3,"total_tokens":24}}')
NATIVE_WHOLE = (b'{"model_instance_id":"qwen/qwen3-8b","output":[{"type":"message","content":"Hi."}],"stats":'
                b'{"input_tokens":21,"total_output_tokens":3,"reasoning_output_tokens":2,"tokens_per_second":48.2,'
                b'"time_to_first_token_seconds":0.12},"response_id":"resp_0a1b"}')
RESPONSES_WHOLE = (b'{"id":"resp_0a1c","object":"response","status":"completed","model":"qwen/qwen3-8b","error":null,'
                   b'"output":[],"usage":{"input_tokens":21,"output_tokens":3,"total_tokens":24,'
                   b'"input_tokens_details":{"cached_tokens":20},"output_tokens_details":{"reasoning_tokens":2}}}')
MESSAGES_WHOLE = (b'{"id":"msg_1","type":"message","role":"assistant","model":"qwen/qwen3-8b","content":[{"type":"text",'
                  b'"text":"Hi."}],"stop_reason":"end_turn","usage":{"input_tokens":21,"output_tokens":3}}')


def typed(kind, **data):
    return event({"type": kind, **data}, kind)


MESSAGES_USAGE = typed("message_delta", delta={}, usage={"input_tokens": 21, "output_tokens": 3})
MESSAGES_START = typed("message_start", message={"model": "qwen/qwen3-8b", "content": [],
                                                 "usage": {"input_tokens": 21, "output_tokens": 0}})
COUNTS = {"promptTokens": 21, "completionTokens": 3, "totalTokens": 24}
THINKING = {**COUNTS, "reasoningTokens": 2}
CACHED = {**THINKING, "cachedTokens": 20}


def block_delta(kind, **delta):
    return typed("content_block_delta", index=0, delta={"type": f"{kind}_delta", **delta})


def text_chunk(text, finish=None):
    return event({"model": "qwen/qwen3-8b", "choices": [{"text": text, "finish_reason": finish}]})


METERED = {     # path, the answer's events or its whole body, tokenUsage, finishReason, which event is the first token
    "chat": ("/v1/chat/completions", CHAT_WHOLE, THINKING, "stop", None),
    "chat stream": ("/v1/chat/completions", CHAT_STREAM, COUNTS, "stop", 1),
    "chat reasoning": ("/v1/chat/completions", [
        chunk({"role": "assistant"}), chunk({"reasoning_content": "Hm"}), chunk({"content": "Hi"}, "length"), USAGE_CHUNK],
        COUNTS, "length", 1),
    "chat gpt-oss": ("/v1/chat/completions", [chunk({"content": None, "reasoning": "Hm"}), chunk({}, "stop"), USAGE_CHUNK],
                     COUNTS, "stop", 0),
    "chat tools": ("/v1/chat/completions", [
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}), chunk({}, "tool_calls"), USAGE_CHUNK],
        COUNTS, "tool_calls", 1),
    "chat usage with choices": ("/v1/chat/completions", [chunk({"content": "Hi"}), chunk({"content": "."}, "stop", usage={
        "prompt_tokens": 21, "completion_tokens": 3, "total_tokens": 24})], COUNTS, "stop", 0),
    "chat that quotes": ("/v1/chat/completions", [
        chunk({"content": ""}), chunk({"content": '{"usage": {"content": "x"}}'}), chunk({"content": '"error": 1'}),
        USAGE_CHUNK], COUNTS, None, 1),
    "chat cached": ("/v1/chat/completions", CHAT_WHOLE.replace(
        b'"completion_tokens_details"', b'"prompt_tokens_details":{"cached_tokens":20},"completion_tokens_details"'),
        CACHED, "stop", None),
    "chat over two lines": ("/v1/chat/completions", [CHAT_STREAM[1], USAGE_CHUNK.replace(b', "usage"', b',\ndata: "usage"')],
                            COUNTS, None, 0),
    "chat with a function": ("/v1/chat/completions", [
        chunk({"content": None}), chunk({"function_call": {"name": "f", "arguments": ""}}), USAGE_CHUNK], COUNTS, None, 1),
    "two choices": ("/v1/chat/completions", [
        event({"model": "qwen/qwen3-8b", "choices": [{"index": 0, "finish_reason": "length", "delta": {}},
                                                     {"index": 1, "finish_reason": "stop", "delta": {}}]}),
        USAGE_CHUNK], COUNTS, "length", None),
    "details that are not told again": ("/v1/chat/completions", [
        event({"model": "qwen/qwen3-8b", "choices": [], "usage": {
            "prompt_tokens": 21, "prompt_tokens_details": {"cached_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 2}}}),
        event({"choices": [], "usage": {"completion_tokens": 3, "total_tokens": 24, "prompt_tokens_details": {},
                                        "completion_tokens_details": {"audio_tokens": 0}}})], CACHED, None, None),
    "completions": ("/v1/completions", COMPLETION_WHOLE, COUNTS, "length", None),
    "completions stream": ("/v1/completions", [text_chunk(""), text_chunk("Hi"), text_chunk("", "stop"), USAGE_CHUNK],
                           COUNTS, "stop", 1),
    "embeddings": ("/v1/embeddings", b'{"model":"qwen/qwen3-8b","data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}',
                   {"promptTokens": 8, "completionTokens": 0, "totalTokens": 8}, None, None),
    "embeddings of LM Studio": ("/api/v0/embeddings", (
        b'{"data":[],"model":"qwen/qwen3-8b","usage":{"prompt_tokens":0,"total_tokens":0}}'),
        {"promptTokens": 0, "completionTokens": 0, "totalTokens": 0}, None, None),
    "v0": ("/api/v0/chat/completions", V0_WHOLE, COUNTS, "stop", None),
    "v0 without a reason of OpenAI's": ("/api/v0/completions", V0_WHOLE.replace(b'"finish_reason":"stop",', b""), COUNTS,
                                        "eosFound", None),
    "responses": ("/v1/responses", RESPONSES_WHOLE, CACHED, None, None),
    "responses cut short": ("/v1/responses", RESPONSES_WHOLE.replace(
        b'"completed"', b'"incomplete","incomplete_details":{"reason":"max_output_tokens"}'), CACHED,
        "max_output_tokens", None),
    "responses stream": ("/v1/responses", [
        typed("response.created", response={"id": "resp_1", "model": "qwen/qwen3-8b", "output": []}),
        typed("response.output_item.added", item={"content": []}), typed("response.output_text.delta", delta=""),
        typed("response.reasoning_text.delta", delta="Hm"), typed("response.output_text.delta", delta="Hi"),
        typed("response.output_text.done", text="Hi"),
        typed("response.completed", response=json.loads(RESPONSES_WHOLE))], CACHED, None, 3),
    "responses tools": ("/v1/responses", [
        typed("response.created", response={"model": "qwen/qwen3-8b"}),
        typed("response.function_call_arguments.delta", delta="{"),
        typed("response.completed", response=json.loads(RESPONSES_WHOLE))], CACHED, None, 1),
    "messages": ("/v1/messages", MESSAGES_WHOLE, COUNTS, "end_turn", None),
    "messages stream": ("/v1/messages", [
        MESSAGES_START, typed("ping"), typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        block_delta("text", text="Hi"), typed("content_block_stop", index=0),
        typed("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 3}), typed("message_stop")],
        COUNTS, "max_tokens", 3),
    "messages from a cache": ("/v1/messages", MESSAGES_WHOLE.replace(
        b'"input_tokens":21', b'"cache_creation_input_tokens":5,"cache_read_input_tokens":15,"input_tokens":1'),
        {**COUNTS, "cachedTokens": 15}, "end_turn", None),
    "messages stream from a cache": ("/v1/messages", [
        typed("message_start", message={"model": "qwen/qwen3-8b", "content": [], "usage": {
            "input_tokens": 6, "cache_read_input_tokens": 15, "output_tokens": 0}}),
        block_delta("text", text="Hi"),
        typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})],
        {**COUNTS, "cachedTokens": 15}, "end_turn", 1),
    "messages thinking": ("/v1/messages", [
        MESSAGES_START, block_delta("thinking", thinking="Hm"), typed(
            "message_delta", delta={"stop_reason": "tool_use"}, usage={"input_tokens": 21, "output_tokens": 3})],
        COUNTS, "tool_use", 1),
    "messages that count down": ("/v1/messages", [
        MESSAGES_START, typed("message_delta", delta={}, usage={"output_tokens": 3}),
        typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"input_tokens": 0, "output_tokens": 0})],
        COUNTS, "end_turn", None),
    "messages tools": ("/v1/messages", [
        MESSAGES_START, typed("content_block_start", index=0, content_block={"type": "tool_use", "name": "f", "input": {}}),
        MESSAGES_USAGE], COUNTS, None, 1),
    "messages tools, arguments": ("/v1/messages", [
        MESSAGES_START, block_delta("input_json", partial_json=""), block_delta("input_json", partial_json="{}"),
        MESSAGES_USAGE], COUNTS, None, 2),
    "native": ("/api/v1/chat", NATIVE_WHOLE, THINKING, None, None),
    "native stream": ("/api/v1/chat", [
        typed("chat.start", model_instance_id="qwen/qwen3-8b"), typed("prompt_processing.progress", progress=0.4),
        typed("reasoning.start"), typed("reasoning.delta", content="Hm"), typed("message.delta", content="Hi"),
        typed("chat.end", result=json.loads(NATIVE_WHOLE))], THINKING, None, 3),
    "native tools": ("/api/v1/chat", [
        typed("chat.start", model_instance_id="qwen/qwen3-8b"), typed("tool_call.start", tool="f"),
        typed("chat.end", result=json.loads(NATIVE_WHOLE))], THINKING, None, 1),
    "decisions": ("/v1/decisions", b'{"model":"qwen/qwen3-8b","usage":{"inputTokens":21}}', {"promptTokens": 21}, None,
                  None),
    "odd counts": ("/v1/chat/completions", (
        b'{"model":"qwen/qwen3-8b","usage":{"prompt_tokens":true,"completion_tokens":"3","total_tokens":null}}'),
        None, None, None),
    "counts that nobody can mean": ("/v1/chat/completions", (
        b'{"model":"qwen/qwen3-8b","usage":{"prompt_tokens":-1,"completion_tokens":' + b"9" * 400
        + b',"total_tokens":1e999}}'), None, None, None),
    "no usage": ("/v1/chat/completions", b'{"model":"qwen/qwen3-8b","choices":[{"finish_reason":"stop"}]}', None, "stop",
                 None),
}


@pytest.mark.parametrize("size", [None, 1, 7], ids=["events", "bytes", "sevens"])
@pytest.mark.parametrize("row", METERED.values(), ids=METERED)
def test_meter_reads_every_dialect(row, size):
    path, answer, usage, finish, first = row
    dialect, stream = lmgateway.DIALECTS[path], isinstance(answer, list)
    meter = lmgateway.Meter(dialect, stream)
    for number, part in enumerate(answer if stream else [answer]):
        pieces = [part[at:at + (size or len(part))] for at in range(0, len(part), size or len(part))]
        assert b"".join(meter.feed(piece, 10.0 + number) for piece in pieces) == part
    assert meter.end() == b""
    assert meter.usage.tokens(dialect) == usage
    assert (meter.usage.finish, meter.usage.model, meter.usage.error) == (finish, "qwen/qwen3-8b", None)
    assert meter.first == (None if first is None else 10.0 + first)


def test_meter_times_tokens_only_from_the_first_to_the_last():
    meter = lmgateway.Meter(lmgateway.CHAT, stream=True)
    for number, part in enumerate(CHAT_STREAM):
        meter.feed(part, 10.0 + number)
    assert (meter.first, meter.last, meter.pieces) == (11.0, 12.0, 2)   # neither role, finish, usage nor [DONE]


TOKEN = chunk({"content": "x"})


AFTER_TOKENS = {    # pieces that come after tokens of the same form
    "tokens": [TOKEN, TOKEN], "two at once": [TOKEN + TOKEN], "no text": [chunk({"content": ""}), TOKEN],
    "quotes": [chunk({"content": 'say "x"'}), TOKEN, chunk({"content": "\\"}), TOKEN],
    "a ping": [b"event: ping\ndata: {}\n\n"], "no token": [TOKEN, chunk({})], "halves": [TOKEN[:150], TOKEN[150:]],
    "a model": [chunk({}, model="other/model")], "the end": [TOKEN, chunk({"content": "x"}, "stop")],
    "an error": [TOKEN, b'event: error\ndata: {"message":"out of memory"}\n\n'],
    "an error in a token": [event({"choices": [{"delta": {"content": "x"}}], "error": {"message": "torn"}})],
    "a token that speaks of usage": [TOKEN.replace(b'"x"', b'"x","usage":{"prompt_tokens":7}')],
    "other line ends": [b"data: {}\r\n\r\ndata: {}\r\r" + TOKEN, TOKEN.replace(b"\n", b"\r\n"), TOKEN],
}


@pytest.mark.parametrize("pieces", AFTER_TOKENS.values(), ids=AFTER_TOKENS)
def test_meter_learns_the_same_from_whole_pieces_and_from_single_bytes(pieces):
    whole, bytewise = (lmgateway.Meter(lmgateway.CHAT, stream=True) for _ in range(2))
    for number, piece in enumerate([TOKEN, TOKEN, *pieces]):
        assert whole.feed(piece, 10.0 + number) == piece
        for at in range(len(piece)):
            bytewise.feed(piece[at:at + 1], 10.0 + number)
    assert whole.end() == bytewise.end() == b""
    assert (whole.pieces, whole.first, whole.last) == (bytewise.pieces, bytewise.first, bytewise.last)
    assert vars(whole.usage) == vars(bytewise.usage)


NO_ANSWERS = {  # how LM Studio says no inside an answer that looks fine
    "string": (False, b'{"error":"Unexpected endpoint or method. (POST /v1/x)"}',
               "Unexpected endpoint or method. (POST /v1/x)"),
    "object": (False, b'{"error":{"message":"No models loaded.","code":"model_not_found"}}',
               "No models loaded."),
    "event": (True, b'event: error\ndata: {"error":{"message":"too long"},"message":"too long"}\n\n',
              "too long"),
    "event without error": (True, b'event: error\ndata: {"message":"too long"}\n\n', "too long"),
    "event without json": (True, b"event:error\r\ndata: too long\r\n\r\n", "too long"),
    "in data": (True, b'data: {"error":{"message":"too long"}}\n\n', "too long"),
    "native": (True, typed("error", error={"type": "unknown", "message": "too long"}), "too long"),
    "responses": (True, typed("response.failed", response={"error": {"message": "too long"}}), "too long"),
    "after tokens": (True, CHAT_STREAM[1] + b'event: error\ndata: {"message":"crash"}\n\n', "crash"),
    "a token that speaks of errors": (True, chunk({"content": "event: error\n"}) + CHAT_STREAM[2], None),
}


@pytest.mark.parametrize("row", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_meter_finds_errors_in_answers_that_look_fine(row):
    stream, data, error = row
    meter = lmgateway.Meter(lmgateway.CHAT, stream)
    meter.feed(data, 1.0)
    meter.end()
    assert meter.usage.error == error


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 10**6])
def test_only_the_usage_that_we_asked_for_is_taken_out(size, newline):
    own = [chunk({"content": "Hi"}), b": keep-alive\n\n", chunk({"content": "."}, "stop",
                                                                usage={"prompt_tokens": 1}),
           event({"choices": [], "prompt_filter_results": []}), b"data: [DONE]\n\n", b"data: unended"]
    direct = b"".join(own).replace(b"\n", newline)
    asked = b"".join([*own[:4], USAGE_CHUNK, *own[4:]]).replace(b"\n", newline)
    meter = lmgateway.Meter(lmgateway.CHAT, True, True)
    got = b"".join(meter.feed(asked[at:at + size], 1.0) for at in range(0, len(asked), size)) + meter.end()
    assert got == direct
    assert meter.usage.tokens(lmgateway.CHAT) == COUNTS


def test_a_usage_chunk_at_the_very_end_is_ours_too():
    meter = lmgateway.Meter(lmgateway.CHAT, True, cut=True)
    assert meter.feed(CHAT_STREAM[1] + USAGE_CHUNK[:-1], 1.0) + meter.end() == CHAT_STREAM[1]


@pytest.mark.parametrize(("beginning", "held"), [
    ("d", True), ("data: ", True), ('data: {"id":"x"', True), ('data: {"choices": [', True),
    ('data: {"choices": []', True),
    ('data: {"choices":[{', False), ("data: [", False), (": keep", False), ("event: e", False),
    ("data: {" + " " * 70_000, False)])
def test_the_beginning_of_an_event_is_held_back_only_while_it_may_be_ours(beginning, held):
    meter, beginning = lmgateway.Meter(lmgateway.CHAT, True, cut=True), beginning.encode()
    assert meter.feed(beginning, 1.0) == (b"" if held else beginning)
    assert meter.feed(b"\n\n", 1.0) == (beginning if held else b"") + b"\n\n"
    assert meter.feed(CHAT_STREAM[1] + USAGE_CHUNK, 1.0) == CHAT_STREAM[1]


def test_an_endless_event_passes_unread_in_bounded_memory():
    meter, piece = lmgateway.Meter(lmgateway.CHAT, True, cut=True), b"x" * 65536
    got = sum(len(meter.feed(piece, 1.0)) for _ in range(120))
    assert len(meter._rest) <= lmgateway.STREAM_LIMIT and got + len(meter.end()) == 120 * len(piece)


def test_a_huge_body_passes_unread(monkeypatch):
    monkeypatch.setattr(lmgateway, "WHOLE_LIMIT", len(CHAT_WHOLE) + 9)
    for rest, usage in ((b" " * 9, THINKING), (b" " * 10, None)):
        meter = lmgateway.Meter(lmgateway.CHAT, stream=False)
        assert (meter.feed(CHAT_WHOLE, 1.0), meter.feed(rest, 1.0), meter.end()) == (CHAT_WHOLE, rest, b"")
        assert meter.usage.tokens(lmgateway.CHAT) == usage


def test_a_body_that_grows_beyond_measure_when_it_is_decoded_passes_unread(monkeypatch):
    monkeypatch.setattr(lmgateway, "WHOLE_LIMIT", 100_000)
    meter, bomb = lmgateway.Meter(lmgateway.CHAT, False, False, "gzip"), gzip.compress(bytes(20_000_000))
    with tracing() as peak:
        assert meter.feed(bomb, 1.0) == bomb and meter.feed(b"more", 1.0) == b"more"
        assert peak() < 1_000_000
    assert meter.end() == b"" and not meter._rest
    meter = lmgateway.Meter(lmgateway.CHAT, True, True, "gzip")     # where something was to be taken out, too
    assert meter.feed(bomb, 1.0) + meter.end() == bomb


STREAMED = b'{"model": "m", "stream": true, "messages": [{}, {}]}'
ASKING = b',"stream_options":{"include_usage": true}}'
REQUESTS = {    # dialect, body, what is sent instead (None: the same bytes), model, stream
    "plain": ("chat", b'{"model": "m"}', None, "m", False),
    "stream": ("chat", STREAMED, STREAMED[:-1] + ASKING, "m", True),
    "completions": ("completions", b'{"stream":true}\n', b'{"stream":true' + ASKING + b"\n", None, True),
    "blanks before": ("chat", b' \r\n\t{"stream":true }', b' \r\n\t{"stream":true ' + ASKING, None, True),
    "byte order mark": ("chat", b'\xef\xbb\xbf{"stream":true}', b'\xef\xbb\xbf{"stream":true' + ASKING, None,
                        True),
    "null options": ("chat", b'{"stream":true, "stream_options" : null}',
                     b'{"stream":true, "stream_options" : null' + ASKING, None, True),
    "not wanted": ("chat", b'{"stream_options":{"include_usage":false,"x":"\xc3\xa9"},"stream":true}',
                   b'{"stream_options":{"include_usage":false,"x":"\xc3\xa9"},"stream":true,'
                   b'"stream_options":{"include_usage": true, "x": "\\u00e9"}}', None, True),
    "spoken of": ("chat", b'{"x":"\\"stream_options\\":{}","y":{"stream_options":{}},"stream":true}',
                  b'{"x":"\\"stream_options\\":{}","y":{"stream_options":{}},"stream":true' + ASKING, None, True),
    "nested": ("chat", b'{"stream":true,"stream_options":{"x":{}}}',
               b'{"stream":true,"stream_options":{"x":{}},'
               b'"stream_options":{"x": {}, "include_usage": true}}', None, True),
    "wanted": ("chat", b'{"stream":true,"stream_options":{"include_usage":true}}', None, None, True),
    "twice": ("chat", b'{"stream":true,"stream":false,"model":"a","model":"b"}', None, "b", False),
    "wanted at last": ("chat", b'{"stream_options":null,"stream":true,"stream_options":{"include_usage":true}}', None, None,
                       True),
    "odd options": ("chat", b'{"stream":true,"stream_options":7}', None, None, True),
    "odd stream": ("chat", b'{"stream":"true"}', None, None, False),
    "other dialect": ("responses", b'{"stream":true}', None, None, True),
    "array": ("chat", b'[{"stream":true}]', None, None, False),
    "no json": ("chat", b'{"stream":true', None, None, False),
    "not a number": ("chat", b'{"stream":true,"x":NaN}', None, None, False),
    "deep": ("chat", b'{"stream":true,"x":' + b"[" * 100_000, None, None, False),
    "utf-16": ("chat", '{"stream":true}'.encode("utf-16"), None, None, False),
    "latin-1": ("chat", b'{"stream":true,"x":"\xe9"}', None, None, False),
    "empty": ("chat", b"", None, None, False),
    "compressed": ("chat", gzip.compress(STREAMED), None, None, False),
    "a number of 5,000 digits": ("chat", b'{"stream":true,"seed":%b}' % (b"7" * 5000), None, None, False),
    "options in options": ("chat", b'{"stream":true,"x":' + b'{"stream_options":' * 200 + b"{}" + b"}" * 201,
                           b'{"stream":true,"x":' + b'{"stream_options":' * 200 + b"{}" + b"}" * 200 + ASKING,
                           None, True),
    "many numbers": ("embeddings", b'{"model":"m","input":[[%b0],[1]]}' % (b"1," * 300_000), None, "m", False),
}


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("row", REQUESTS.values(), ids=REQUESTS)
def test_requests_are_amended_only_where_usage_has_to_be_asked_for(row, kind):
    dialect, body, sent, model, stream = row
    dialect = next(found for found in lmgateway.DIALECTS.values() if found.name == dialect)
    asked = lmgateway.parse_body(dialect, kind(body))
    assert bytes(asked.data) == (body if sent is None else sent)
    assert (asked.model, bool(asked.stream), asked.asks_usage) == (model, stream, sent is not None)
    if sent:
        assert json.loads(sent.decode("utf-8-sig"))["stream_options"]["include_usage"] is True


HOSTILE = {  # JSON that is small on the wire and large or slow in memory
    "many lists": b'{"stream":true,"x":[%b0]}' % (b"[]," * 10_000_000),
    "many numbers": b'{"stream":true,"x":[%b0]}' % (b"[%b1]," % (b"1," * 32) * 400_000),
    "many texts": b'{"stream":true,"x":[%b0]}' % (b'"",' * 10_000_000),
    "many names": b'{"stream":true%b}' % (b',"stream_options":0' * 1_600_000),
    "options in options": b'{"stream":true,"x":' + b'{"stream_options":' * 43_690 + b"{}" + b"}" * 43_691}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_body_costs_no_more_than_a_few_times_its_size(body):
    with tracing() as peak:
        started = time.thread_time()
        assert lmgateway.parse_body(lmgateway.CHAT, body).data is body
        assert time.thread_time() - started < 1.5 and peak() < 2.5 * len(body) + 5_000_000


# --- 3.11 wire formats

def test_json_is_utf_8_with_escapes_only_for_what_has_no_utf_8_and_what_some_readers_take_for_a_line_end():
    data = {"message": 'é "🦊"\n\\\x7f\ud800 \u2028\u2029\x85\x0c', "tags": [], "a": -0.5, "b": True, "c": None}
    line = lmgateway.to_utf8(lmgateway.json_line("e-1", Event("n", data)))
    assert json.loads(line, parse_constant=no_constant) == {"id": "e-1", "event": "n", "data": data}
    text = line.decode()
    assert len(text.splitlines()) == 1 and 'é \\"🦊\\"' in text and "\\ud800" in text
    fox = lmgateway.sse_frame("e-1", "n", lmgateway.to_json({"message": "🦊" * 1000}))
    assert len(fox) < 4100      # not 12 bytes a character


# --- 3.12 WebSocket

MASK = b"\x01\x7f\x80\xfe"


def fed(frames, data, size):
    """What Frames gives for the bytes in pieces of that size."""
    return [message for at in range(0, len(data), size) for message in frames.feed(data[at:at + size])]


@pytest.mark.parametrize("mask", [b"", MASK])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 300, 65535, 65536])
def test_a_frame_is_read_as_it_was_written(mask, length):
    payload = (b"\xc3\xa9x" * length)[:length // 3 * 3] + b"a" * (length % 3)
    data = lmgateway.frame(lmgateway.TEXT, payload, mask)
    whole = lmgateway.Message(lmgateway.TEXT, payload, data)
    for size in (1, 2, 7, 1000) if length < 1000 else (7777, 200_000):
        frames = lmgateway.Frames(bool(mask), 100_000)
        assert fed(frames, data + data[:1], size) == [whole] and not frames.between


def test_rfc_6455s_own_examples():
    hello, ping = bytes.fromhex("818537fa213d7f9f4d5158"), bytes.fromhex("898537fa213d7f9f4d5158")
    assert [message[:2] for message in lmgateway.Frames(True, 99).feed(hello + ping)] == [(1, b"Hello"), (9, b"Hello")]
    pieces = bytes.fromhex("010348656c") + bytes.fromhex("80026c6f")
    assert lmgateway.Frames(False, 99).feed(pieces) == [(1, b"Hello", pieces)]
    assert lmgateway.accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_a_control_frame_may_stand_between_the_pieces_of_a_message():
    first, ping, last = (lmgateway.frame(op, text, MASK) for op, text in ((1, b"a"), (9, b"p"), (0, b"b")))
    first = bytes([first[0] & 0x7F]) + first[1:]
    for size in (1, 3, 100):
        frames = lmgateway.Frames(True, 99)
        assert fed(frames, first + ping + last, size) == [(9, b"p", ping), (1, b"ab", first + last)]


@pytest.mark.parametrize(("code", "faulty"), [
    (1002, "8100"), (1002, "817e 0080" + 128 * "41"), (1002, "c180 00000000"), (1002, "9180 00000000"), (1002, "8380 00000000"), (1002, "8b80 00000000"),
    (1002, "0980 00000000"), (1002, "89fe 0080 00000000"), (1002, "8080 00000000"),
    (1002, "0180 00000000 8180 00000000"), (1002, "81fe 007d 00000000"), (1002, "81ff 000000000000ffff 00000000"),
    (1002, "81ff 8000000000000000 00000000"), (1002, "8881 00000000 03"), (1002, "8882 00000000 03ee"),
    (1002, "8882 00000000 0000"), (1002, "8882 00000000 0bb7"), (1002, "8882 00000000 1388"),
    (1007, "8181 00000000 ff"), (1007, "8883 00000000 03e8 ff"), (1007, "0181 00000000 c3 8081 00000000 41"),
    (1009, "82fe 0400 00000000"), (1009, "0281 00000000 41 80fe 03e8 00000000"),
    (1009, "82ff 7fffffffffffffff 00000000")])
def test_faulty_frames_have_their_close_code(code, faulty):
    data = bytes.fromhex(faulty)
    for size in (1, 2, 1000):
        with pytest.raises(lmgateway.FrameError) as fault:
            fed(lmgateway.Frames(True, 1000), data, size)
        assert fault.value.code == code


@pytest.mark.parametrize(("code", "data"), [(1002, lmgateway.frame(1, b"x", MASK)), (1009, b"\x81\x7e\x03\xe9")])
def test_a_servers_frame_has_no_mask_and_a_limit_too(code, data):
    with pytest.raises(lmgateway.FrameError) as fault:
        lmgateway.Frames(False, 1000).feed(data)
    assert fault.value.code == code


@pytest.mark.parametrize(("value", "found"), [
    (1, 1), (5.0, 5), (0, 0), (-3, -3), (2**53 - 1, 2**53 - 1), (2**53, None), (True, None), (1.5, None),
    ("1", None), (None, None), ([], None), ({}, None), (float("inf"), None)])
def test_ids_are_whole_numbers(value, found):
    assert lmgateway.call_of({"type": "rpcCall", "callId": value}) == ("callId", found)


# --- 3.8 the join


class Office:
    """Requests and a log, played in turn: ask(), log() and over() are what the gateway would see."""

    def __init__(self, at="2026-11-24 10:00:00"):
        self.requests, self.parser = lmgateway.Requests("e", 100), Parser()
        self.clock, self.stamp = 100.0, at
        self.events, self.asked = [], {}

    @property
    def epoch(self):
        return lmgateway.UtcClock().moment(self.stamp).epoch

    def ask(self, name, model="m/one", messages=1, body=None, **about):
        """A request goes to LM Studio; body is the JSON that it asks with."""
        about = {"dialect": "chat", "target": "/v1/chat/completions", "stream": True, **about}
        record = lmgateway.Record(name, self.epoch + 0.4, self.clock, model_asked=model, messages=messages,
                                  fingerprint=body and lmgateway.fingerprint(body), **about)
        self.requests.begin(record)
        self.asked[name] = record
        return record

    def pass_s(self, seconds, late_s=0.0):
        """Time goes on, and the join looks again, at a log that was read late_s before."""
        self.clock += seconds
        self.requests.see([], self.clock, self.clock - late_s)

    def first(self, name):
        """The first token of a stream."""
        self.asked[name].generated(1, self.clock)

    def leaves(self, record):
        """Its client leaves."""
        self.requests.over(record, self.clock, lmgateway.Outcome("abandoned", None, "the client left", "client_disconnected"))

    def log(self, *entries, level="INFO"):
        """Entries of one second; a line that names its level begins with [."""
        lines = [f"[{self.stamp}]{entry}" if entry.startswith("[") else f"[{self.stamp}][{level}] {entry}"
                 for entry in entries]
        events = self.parser.feed("".join(line + "\n" for line in lines).encode()) + self.parser.quiet()
        self.requests.see(events, self.clock)
        self.events += events
        return events

    def over(self, record, prompt=None, completion=5, state="done", status=200, **answer):
        """The answer is over; prompt and completion are its usage, without prompt it had none."""
        meter = lmgateway.Meter(lmgateway.DIALECTS["/v1/chat/completions"], False)
        usage = {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}} if prompt else {}
        meter.feed(json.dumps({**answer, **usage}).encode(), self.clock)
        meter.end()
        self.requests.over(record, self.clock, lmgateway.Outcome(state, status, meter=meter))

    def told(self, record):
        """Names of the typed events that carry a request's id, in order."""
        return [event.name for event in self.events
                if event.data.get("requestId") == record.id and event.name != "lmstudio_log"]

    def forget(self):
        """Somebody has taken what there is to take."""
        self.events.clear()
        self.requests.changed.clear()

    def claimed(self):
        """The ids that any event carries."""
        return {event.data["requestId"] for event in self.events if "requestId" in event.data}


def running(model, messages=1):
    return f"[INFO][{model}] Running chat completion on conversation with {messages} messages."


def streaming(model):
    return f"[INFO][{model}] Streaming response..."


def percent(model, done):
    return f"[INFO][{model}] Prompt processing progress: {done:.1f}%"


def finished(model):
    return f"[INFO][{model}] Finished streaming response"


def received(body, path="/v1/chat/completions"):
    return f"[DEBUG] Received request: POST to {path} with body {json.dumps(body, indent=2)}"


def engine_run(task, prompt, cached=0, at=62.003004):
    """What G3 writes before it reads a prompt; at: seconds of its own clock."""
    slot = (f"{int(at // 60)}.{int(at % 60):02d}.{int(at % 1 * 1000):03d}.004 I slot   operator(): "
            f"id  {task % 4} | task {task} | ")
    return (f"[DEBUG] {slot.replace('  operator()', 'launch_slot_')}processing task, is_child = 0\n"
            f"{slot}new prompt, n_ctx_slot = 8192, n_keep = 4, task.n_tokens = {prompt}\n"
            f"{slot}cached n_tokens = {cached}, memory_seq_rm [{cached}, end)")


def engine_end(task, prompt, completion):
    """What G3 writes when an answer is complete."""
    slot = f"1.02.003.004 I slot print_timing: id  {task % 4} | task {task} | "
    return (f"[DEBUG] {slot}prompt eval time =  500.00 ms / {prompt} tokens (0.5 ms per token, 1000.00 tokens per second)\n"
            f"{slot}       eval time = 1000.00 ms / {completion} tokens (20.0 ms per token, 50.00 tokens per second)\n"
            f"{slot}      total time = 1500.00 ms / {prompt + completion} tokens\n"
            f"1.02.003.004 I slot      release: id  {task % 4} | task {task} | stop processing: "
            f"n_tokens = {prompt + completion}, truncated = 0")


def chat_body(prompt, model="m/one"):
    return {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}


def g2_run(task, total, cached=0):
    """What G2 writes when a task begins and its prompt begins to be read."""
    slot = f"id  {task % 4} | task {task} | "
    return (f"[DEBUG] slot launch_slot_: {slot}processing task, is_child = 0\n"
            f"slot update_slots: {slot}new prompt, n_ctx_slot = 8192, n_keep = 4, task.n_tokens = {total}\n"
            f"slot update_slots: {slot}n_tokens = {cached}, memory_seq_rm [{cached}, end)")


def g2_at(task, position):
    return f"[DEBUG] slot update_slots: id  {task % 4} | task {task} | n_tokens = {position}, memory_seq_rm [{position}, end)"


def g2_end(task, total, written):
    """Timings and release of a task."""
    return (f"[DEBUG] slot print_timing: id  {task % 4} | task {task} | \n"
            f"prompt eval time = 500.00 ms / {total} tokens (0.5 ms per token, 1000.00 tokens per second)\n"
            f"       eval time = 1000.00 ms / {written} tokens (20.0 ms per token, 50.00 tokens per second)\n"
            f"      total time = 1500.00 ms / {total + written} tokens\n"
            f"slot      release: id  {task % 4} | task {task} | stop processing: n_tokens = {total + written - 1}, truncated = 0")


def g2_cancel(task):
    return (f"[DEBUG] srv          stop: cancel task, id_task = {task}\n"
            f"slot      release: id  {task % 4} | task {task} | stop processing: n_tokens = 7, truncated = 0")


GONE = "[INFO][LM STUDIO SERVER] Client disconnected. Stopping generation..."


def learned(office, ratio=0.25):
    """An answer from which the tokens of a character are known."""
    record = office.ask("before", size=6000)
    office.over(record, prompt=round(6000 * ratio))
    office.clock += 20
    office.log("[INFO] Server started.")


def test_a_run_that_fits_one_request_is_its_and_nothing_that_was_published_is_changed(utc):
    office = Office()
    office.log(g2_run(1, 40))   # a chat inside the app is at work, too
    record = office.ask("r1", size=8000)
    office.log(running("m/one"), streaming("m/one"), g2_run(7, 2000, 500))
    published = [(event, dict(event.data)) for event in office.events if event.run and event.run == office.events[-1].run
                 or event.name == "lmstudio_cache_stats"][-1:]
    assert record.run is None   # as yet it can be a chat inside the app
    office.clock += 0.2
    office.log(percent("m/one", 0), g2_at(7, 1012), percent("m/one", 50.6))
    assert (record.run.number, record.bound_by, record.cache["reused"], record.percent) == (
        published[0][0].run, "alone", 500, 50.6)
    assert all(event.data == data for event, data in published)
    office.clock += 1
    office.requests.told.clear()
    office.log(percent("m/one", 100), g2_end(7, 1500, 20), finished("m/one"))
    assert {"lmstudio_prompt_progress", "lmstudio_prediction_stats"} <= set(office.told(record))
    assert [name for _, name, _ in record.timeline][:4] == ["lmstudio_chat_start", "lmstudio_processing_start",
                                                             "lmstudio_token_info", "lmstudio_cache_stats"]
    assert (record.read_speed, record.context_size) == (1000.0, 8192)


TWO = {  # of two requests ("a" was sent first), what happens before and after a run -> whose it is, by which rule
    "one was sent after it": (
        lambda o: (o.log(g2_run(9, 40)), o.ask("a", size=4000), o.log(g2_run(1, 1000)), o.pass_s(0.1),
                   o.ask("b", size=4000)), "a", "1"),
    "one has ended before it": (
        lambda o: (o.over(o.ask("a", size=4000), 1000), o.pass_s(1.0), o.ask("b", size=4000), o.log(g2_run(1, 1000)),
                   o.pass_s(0.1)), "b", "2"),
    "one asked another model": (
        lambda o: (o.ask("a", model="m/two", size=4000), o.log(running("m/two")), o.ask("b", size=4000),
                   o.log(running("m/one"), g2_run(1, 1000))), "b", "3"),
    "one is longer": (
        lambda o: (learned(o), o.ask("a", size=8000), o.ask("b", size=4000), o.log(g2_run(1, 1000))), "b", "4"),
}


@pytest.mark.parametrize(("size", "total", "bound"), [
    (600, 20, False), (600, 100, True), (600, 1500, True), (600, 6000, False),  # a shorter one can be all template
    (60000, 300, False), (60000, 1500, True), (60000, 15000, True), (60000, 90000, False)])
def test_a_prompt_of_another_length_may_have_other_tokens_for_a_character_up_to_a_factor(utc, size, total, bound):
    office = Office()
    learned(office)     # 6,000 characters had 1,500 tokens
    record = office.ask("a", size=size)
    office.log(running("m/one"), g2_run(1, total), percent("m/one", 0))
    office.pass_s(0.1)
    assert (record.run is not None) == bound


@pytest.mark.parametrize(("happens", "owner", "rule"), TWO.values(), ids=TWO)
def test_a_hard_fact_rules_a_request_out(utc, happens, owner, rule):
    office = Office()
    happens(office)
    office.log(g2_at(1, 500), percent("m/one", 50.0))
    bound = {name: record for name, record in office.asked.items() if record.run}
    assert list(bound) == [owner] and bound[owner].bound_by == rule
    assert {event.data["requestId"] for event in office.events if event.name == "lmstudio_prompt_progress"} == {owner}


def test_of_two_that_are_alike_a_moment_decides_nothing(utc):
    office = Office()
    one, other = office.ask("a", size=4000), office.ask("b", size=4000)
    office.log(g2_run(1, 1000))
    office.first("b")
    office.pass_s(0.6)
    office.log(g2_at(1, 500), percent("m/one", 50.0))
    assert one.run is None is other.run


def test_two_that_are_alike_are_told_apart_by_their_usage_and_until_then_not_at_all(utc):
    office = Office()
    one, other = office.ask("a", size=4000), office.ask("b", size=4000)
    office.log(*[running("m/one"), streaming("m/one")] * 2, g2_run(1, 1000), g2_run(2, 1003),
               g2_at(1, 512), percent("m/one", 51.2), g2_at(2, 602), percent("m/one", 60.0))
    office.pass_s(0.4)
    assert one.run is None is other.run and office.claimed() == set()
    office.log(g2_end(2, 1003, 20))
    office.over(one, prompt=1003, completion=20)
    assert one.bound_by in ("7, 9", "7", "9") and one.cache["total"] == 1003 and one.read_speed == 1000.0
    office.pass_s(0.5)
    office.log(g2_end(1, 1000, 30))
    office.over(other, prompt=1000, completion=30)
    assert other.cache["total"] == 1000
    assert office.claimed() == {"b"}    # what was open when it was published carries no id for ever


def test_a_run_is_not_bound_before_a_line_of_the_app_is_about_it(utc):
    office = Office()
    learned(office)
    office.log(g2_run(9, 40))
    record = office.ask("a", size=4000)
    office.log(g2_run(1, 1000), g2_at(1, 512))      # a chat inside the app has as many tokens by chance
    assert record.run is None and office.requests.find("a").cache is None


def test_who_left_is_told_by_the_cancelled_task_and_by_the_order_of_the_lines(utc):
    office = Office()
    learned(office)
    one, other = office.ask("a", size=4000), office.ask("b", size=8000)
    office.log(*[running("m/one")] * 2, g2_run(1, 1000), g2_run(2, 2000), *[percent("m/one", 0)] * 2)
    office.pass_s(1.0)
    office.leaves(other)
    office.log(GONE, g2_cancel(2))
    office.pass_s(0.2)
    office.leaves(one)
    office.log(GONE)
    office.pass_s(0.2)
    office.log(g2_cancel(1))
    assert [(record.run.total, record.cache["total"]) for record in (one, other)] == [(1000, 1000), (2000, 2000)]
    assert all([name for _, name, _ in record.timeline].count("lmstudio_chat_end") == 1 for record in (one, other))


def test_what_no_request_can_have_caused_is_lm_studios_own(utc):
    office = Office()
    office.log(running("m/one", 3), streaming("m/one"), g2_run(1, 1000), g2_at(1, 512), percent("m/one", 51.2))
    office.log(g2_end(1, 1000, 20), finished("m/one"))
    office.log(g2_run(2, 500), g2_end(2, 500, 5))   # a chat inside the app has no line for its end
    records = office.requests.finished
    assert [(record.source, record.state, record.model, record.usage["promptTokens"]) for record in records] == [
        ("lmstudio", "done", "m/one", 1000), ("lmstudio", "done", None, 500)]
    assert office.claimed() == set() and not office.requests.running


def test_a_prediction_of_an_sdk_has_its_run_and_no_line_of_the_app(utc):
    office = Office()
    record = office.ask("sdk", dialect="socket", target="/llm/predict", messages=1)
    office.log(running("m/one"), streaming("m/one"))    # of somebody else
    office.log(engine_run(5, 300), engine_end(5, 300, 20))
    office.over(record, prompt=300, completion=20)
    office.pass_s(1)
    assert (record.binding, record.read_speed, record.begun) == ("exact", 1000.0, False)
    assert [one.source for one in (*office.requests.running.values(), *office.requests.finished)] == ["lmstudio", "gateway"]
    assert office.told(record) == []    # it was not certain while it ran


def test_a_chat_whose_last_line_went_to_another_is_over_with_its_run(utc):
    office = Office()
    office.log(running("m/one", 3), streaming("m/one"), g2_run(1, 1000), g2_at(1, 512), percent("m/one", 51.2))
    office.log(g2_end(1, 1000, 20))
    for _ in range(2):
        office.pass_s(11)
    assert [(record.source, record.state) for record in office.requests.finished] == [("lmstudio", "done")]
    assert not office.requests.running and office.requests.finished[0].total_ms < 5000


@pytest.mark.parametrize(("requests", "percents"), [(1, [0.0, 40.0, 100.0]), (2, [])])
def test_without_an_engines_lines_progress_is_that_of_the_only_request_of_its_model(utc, requests, percents):
    office = Office()
    records = [office.ask(f"r{number}") for number in range(requests)]
    office.log(*[running("m/one")] * requests)
    for done in (0, 40, 100):
        office.log(percent("m/one", done))
    told = [event.data["progress"] for event in office.events
            if event.name == "lmstudio_prompt_progress" and "requestId" in event.data]
    assert told == percents and [record.percent for record in records] == [100.0] if percents else [None, None]


def test_a_second_after_somebody_left_the_next_request_has_its_progress(utc):
    office = Office()
    gone = office.ask("a")
    office.log(running("m/one"), streaming("m/one"), percent("m/one", 0), percent("m/one", 30))
    office.leaves(gone)
    office.log(GONE)
    office.pass_s(0.5)
    here = office.ask("b")
    office.log(running("m/one"), streaming("m/one"), percent("m/one", 0), percent("m/one", 60), percent("m/one", 100))
    assert (gone.percent, here.percent, here.state) == (30.0, 100.0, "generating")


@pytest.mark.parametrize("told", [True, False])
def test_a_prompt_that_lm_studio_gave_up_before_it_began_is_not_read_later(utc, told):
    office = Office()
    gone, here = office.ask("a"), office.ask("b")
    office.log(running("m/one"), streaming("m/one"), running("m/one"), streaming("m/one"))
    office.leaves(gone)
    office.log(*[GONE] * told)
    office.pass_s(1.0)
    office.log(percent("m/one", 0), percent("m/one", 60))
    assert (gone.percent, here.percent) == (None, 60.0 if told else None)


def test_an_end_is_the_one_that_ended_then_and_an_answer_the_one_with_its_id(utc):
    office = Office()
    stream, whole = office.ask("a"), office.ask("b", stream=False)
    office.log(running("m/one"), streaming("m/one"), running("m/one"))
    office.log(f'[INFO][m/one] Generated prediction: {json.dumps({"id": "chatcmpl-1", "usage": {"prompt_tokens": 9}}, indent=2)}')
    office.over(whole, prompt=9, id="chatcmpl-1")
    office.log(finished("m/one"))
    office.over(stream, prompt=8)
    office.pass_s(0.3)
    assert [record.bound_by for record in (whole, stream)] == ["14", "13"]


def test_a_prompt_that_the_app_tells_of_at_its_begin_is_not_of_a_chat_inside_the_app(utc):
    told = {}
    for inside in (False, True):
        office = Office()
        learned(office)
        record = office.ask("a", size=4000)
        office.log(*[g2_run(9, 990)] * inside, g2_run(1, 1000), percent("m/one", 0))
        office.pass_s(0.1)
        told[inside] = record.run and record.run.total
    assert told == {False: 1000, True: None}


def test_a_first_token_that_is_old_has_a_run_and_if_only_one_fits_that_is_it(utc):
    office = Office()
    record, other = office.ask("a", size=4000), office.ask("b", size=9000, stream=False)
    office.log(g2_run(1, 1000))
    office.pass_s(0.5)
    office.first("a")
    office.pass_s(0.5)
    assert record.run is None
    office.pass_s(0.2)
    assert (record.run.total, record.progress(office.clock)["percent"], other.run) == (1000, 100, None)


MLX_LINE = "[DEBUG][coordinator][INFO]: Prompt cache restore: cached_tokens={} uncached_tokens={} lifetime_efficiency=50.00%"


@pytest.mark.parametrize("inside", [False, True])
def test_mlx_reads_one_prompt_of_a_model_from_its_0_percent_on(utc, inside):
    office = Office()
    learned(office)
    record = office.ask("a", size=4000)
    office.log(running("m/one"), *[MLX_LINE.format(0, 970)] * inside, MLX_LINE.format(200, 800), percent("m/one", 0))
    office.pass_s(0.1)
    office.log(percent("m/one", 60))
    office.log(percent("m/one", 100))
    told = [event.data["progress"] for event in office.events
            if event.name == "lmstudio_prompt_progress" and event.data.get("requestId") == "a"]
    assert told == ([] if inside else [0.0, 60.0, 100.0])
    assert (record.run and record.run.total) == (None if inside else 1000)


def test_a_late_half_of_an_announcement_is_not_taken_for_the_next_ones(utc):
    office = Office()
    learned(office)
    office.ask("a", size=4000), office.ask("b", size=8000)
    office.log(MLX_LINE.format(0, 999))
    office.pass_s(0.2)
    office.log(percent("m/one", 0), MLX_LINE.format(0, 1999))   # 0 % of the first, and the second begins
    office.pass_s(0.1)
    office.log(percent("m/one", 60))
    assert office.claimed() == set()


@pytest.mark.parametrize("reads", [2, 20])
def test_an_engines_own_clock_says_that_a_failed_request_was_over_before_a_run_began(utc, reads):
    office = Office()
    for number in range(reads):
        office.pass_s(0.1)
        office.log(engine_run(number, 40, at=office.clock))
    office.pass_s(1.0)
    failed = office.ask("a", size=4000)
    office.over(failed, state="failed", status=400)
    office.pass_s(0.3)
    office.log(engine_run(90, 1000, at=office.clock))
    office.log(percent("m/one", 0))
    office.pass_s(0.1)
    assert (failed.run is None) == (reads == 20)    # after a few reads all of them can have been late


def test_tasks_of_two_engines_with_one_number_and_slot_are_nobodys(utc):
    office = Office()
    learned(office)
    first = office.ask("a", size=4000)
    office.log(running("m/one"), g2_run(1, 1000), percent("m/one", 0))
    office.pass_s(0.1)
    second = office.ask("b", size=2000, model="m/two")
    office.log(running("m/two"), g2_run(1, 500), g2_end(1, 500, 14))
    office.over(second, prompt=500, completion=14)
    office.over(first, prompt=1000, completion=20)
    office.pass_s(0.1)
    assert (first.run.total, first.read_speed, second.run) == (1000, None, None)


def test_a_number_that_is_cancelled_can_be_of_another_engines_task(utc):
    office = Office()
    records = [office.ask("a", size=4000), office.ask("b", size=9000)]
    office.log(g2_run(1, 1000), "[DEBUG] srv          stop: cancel task, id_task = 1")
    office.log(g2_end(1, 1000, 20))
    office.over(records[0], prompt=1000, completion=20)
    assert (records[0].run.total, records[0].read_speed) == (1000, 1000.0)


def test_a_percent_is_of_the_batch_that_is_written_with_it(utc):
    office = Office()
    record = office.ask("a", size=4000)
    office.log(g2_run(9, 1000), g2_at(9, 512))    # a chat inside the app
    office.pass_s(0.3)
    office.log(percent("m/one", 51.2))
    assert record.run is None


def test_a_token_that_came_before_a_line_can_have_been_written_is_of_another_run(utc):
    """The log was read 0.1 s before without that line, so its prompt was not read by then."""
    office = Office()
    learned(office)
    early, late = office.ask("a", size=4000), office.ask("b", size=4400)
    office.log(g2_run(1, 1000))
    office.pass_s(0.3)
    office.first("a")
    office.pass_s(0.2)
    office.log(g2_run(2, 5000))
    office.pass_s(0.1)
    office.log(g2_at(1, 512), percent("m/one", 51.2))
    assert early.run is None and late.run.total == 1000 and late.bound_by == "5"


@pytest.mark.parametrize("late_s, rule", [(0.0, "2"), (0.3, None)])
def test_a_line_can_have_been_written_since_the_log_was_read_before(utc, late_s, rule):
    """Not since the join heard that nothing was read: a thread that is held up between the two is late."""
    office = Office()
    learned(office)
    early, late = office.ask("a", size=4000, stream=False), office.ask("b", size=4100, stream=False)
    office.log(g2_run(9, 40))
    office.pass_s(0.5)
    office.over(early, state="failed", status=500)
    office.pass_s(0.2, late_s)
    office.log(g2_at(9, 20))
    office.pass_s(0.1)
    office.log(g2_run(1, 1000), percent("m/one", 0))
    office.pass_s(0.1)
    assert (early.run, late.bound_by) == (None, rule)


@pytest.mark.parametrize("apart_s, lines, told, claimed", [
    (0.1, 2, [True, True], {"a", "b"}), (0.1, 1, [False, True], {"b"}),    # the first one's line was not seen
    (0.01, 2, [True, True], set())], ids=["in their order", "the nearest", "at once: one each, nobody can say which"])
def test_ends_are_told_in_the_order_of_the_answers(utc, apart_s, lines, told, claimed):
    office = Office()
    records = [office.ask(name) for name in "ab"]
    office.log(*[running("m/one"), streaming("m/one")] * 2)
    for record in records:
        office.pass_s(apart_s)
        office.over(record, prompt=8)
    for _ in range(lines):
        office.log(finished("m/one"))
    for _ in range(5):
        office.pass_s(0.1)
    assert [record.told_end and record.bound_by == "13" and record.timeline[-1][1] == "lmstudio_chat_end"
            for record in records] == told
    assert office.claimed() == claimed


@pytest.mark.parametrize("more, told", [(1, True), (2, False)])    # 2: one that nobody expects
def test_the_last_line_of_a_stream_whose_client_left_is_not_anothers(utc, more, told):
    office = Office()
    gone, record = office.ask("a"), office.ask("b")
    office.log(*[running("m/one"), streaming("m/one")] * 2)
    office.leaves(gone)
    office.log(GONE)
    office.pass_s(1)
    office.over(record, prompt=8)
    office.log(finished("m/one"), *[finished("m/one")] * more)
    for _ in range(7):
        office.pass_s(0.1)
    assert record.told_end is told


def test_of_two_failures_the_line_is_of_the_one_with_its_text(utc):
    office = Office()
    records = [office.ask(name) for name in "ab"]
    for record, text in zip(records, ("'max_tokens' field must be a number", "The model has crashed")):
        office.requests.over(record, office.clock, lmgateway.Outcome("failed", 400, text, "upstream_error"))
        office.pass_s(0.1)
    office.log("[ERROR][m/one] Engine protocol predict stream returned an error: The model has crashed")
    office.pass_s(0.5)
    assert [record.told_end for record in records] == [False, True]


def test_bindings_are_counted_and_what_is_over_is_forgotten(utc):
    office = Office()
    office.over(office.ask("a"), prompt=10)
    record = office.ask("b", size=4000)
    office.log(g2_run(1, 1000), g2_at(1, 512), percent("m/one", 51.2), g2_end(1, 1000, 20))
    office.over(record, prompt=1000, completion=20)
    office.pass_s(30)
    assert office.requests.bound() == {"exact": 1, "none": 1}
    assert not office.requests._open and not office.requests._runs


def test_eight_requests_at_once_cost_little(utc):
    """Joining takes less than 30 us an event; the bound is ten times that, for busy machines."""
    office = Office()
    for number in range(8):
        office.ask(f"r{number}", size=4000 + 4 * number)
    events = office.parser.feed("".join(f"[{office.stamp}]{g2_run(task, 1000 + task)}\n" for task in range(1, 9)).encode())
    for position in range(1, 40):
        events += office.parser.feed("".join(f"[{office.stamp}]{g2_at(task, 20 * position)}\n" for task in range(1, 9)).encode())
    started = time.process_time()
    office.requests.see(events, office.clock)
    assert time.process_time() - started < 300e-6 * len(events)


@pytest.mark.parametrize("text",
                         ["short", "x" * 100, "y" * 101, "ä" * 120, "z" * 121, "😀" * 70, "a" + "😀" * 70])
def test_a_prompt_and_its_logged_copy_have_one_fingerprint(text):
    units = text.encode("utf-16-le")
    cut = text if len(units) <= 240 else (units[:100].decode("utf-16-le",
                                                             "replace") + "... <Truncated in logs> ..."
                                          + units[-100:].decode("utf-16-le", "replace"))
    assert lmgateway.fingerprint(chat_body(text)) == lmgateway.fingerprint(chat_body(cut))
    assert lmgateway.fingerprint(chat_body(text)) != lmgateway.fingerprint(chat_body(text + "!"))


ONE_CHAT = [path for path in SAMPLES if path.read_bytes().count(b"Running chat completion") == 1
            and path.stem.startswith(("g1", "g2", "mlx-coordinator", "splash", "redacted"))
            and b'"finished"' in path.with_name(path.stem + ".events.jsonl").read_bytes()]


@pytest.mark.parametrize("one, other, same", [
    ({"temperature": 1.0, "n": 2}, {"n": 2, "temperature": 1}, True),
    ({"stop": ["a", "b"]}, {"stop": ["b", "a"]}, False),
    ({"n": 1}, {"n": True}, False), ({"n": 1}, {"n": "1"}, False), ({"n": None}, {"n": "None"}, False),
    ({"n": -1}, {"n": -2}, False), ({"n": 0.5}, {"n": 0.25}, False), ({"n": []}, {"n": {}}, False),
    ({"tools": [{"name": "x", "strict": True}]}, {"tools": [{"strict": True, "name": "x"}]}, True),
    ({"stop": "x" * 101}, {"stop": "x" * 50 + "... <Truncated in logs> ..." + "x" * 50}, True)])
def test_bodies_that_mean_the_same_have_one_fingerprint(one, other, same):
    one, other = (lmgateway.fingerprint({**chat_body("Hi"), **more}) for more in (one, other))
    assert (one == other) is same and one.prompt == other.prompt


def test_token_usage_has_its_three_counts_and_the_others_stand_beside_it(utc):
    office = Office()
    record = office.ask("r1")
    office.log(running("m/one"), engine_run(1, 500, 100))
    office.over(record, prompt=500, completion=7)
    data = record.end_event("now").data
    assert data["tokenUsage"] == {"promptTokens": 500, "completionTokens": 7, "totalTokens": 507}
    assert data["cachedTokens"] == 100


def test_embeddings_are_not_taken_for_chats(utc):
    office = Office()
    office.ask("r1", dialect="embeddings", target="/v1/embeddings", messages=None, stream=False)
    office.log(running("m/one"))
    assert office.claimed() == set()


def test_requests_and_names_that_are_remembered_are_bounded_also_where_no_log_is_followed():
    office = Office()
    for number in range(3 * lmgateway.OPEN_LIMIT):
        office.over(office.ask(f"r{number}", f"name-{number}"), model="m/one")
    assert len(office.requests._open) <= 2 * lmgateway.OPEN_LIMIT + 1
    assert len(office.requests._names) <= 1000
    office.clock += lmgateway.LATE_S + 1
    office.over(office.ask("last"))
    assert list(office.requests._open) == ["last"]


@pytest.mark.parametrize("log_path", ONE_CHAT, ids=lambda path: path.stem)
def test_one_request_through_us_gets_all_events_of_its_chat_whichever_engine_ran(utc, log_path):
    start = next(row["data"] for row in expected_of(log_path) if row["event"] == "lmstudio_chat_start")
    data = log_path.read_bytes()
    office = Office(start["timestamp"].replace("T", " ").rstrip("Z"))
    path = re.search(r"POST to (/\S+)", data.decode())
    model = re.search(r'with body +\{\n(?:[^}].*\n)*?  "model": "([^"]+)"', data.decode())
    record = office.ask("r1", model[1] if model else start.get("model"), start["messages"],
                        target=path[1] if path else "/v1/chat/completions",
                        stream=b"Streaming response..." in data)
    events = office.parser.feed(data) + office.parser.end()
    office.requests.see(events, office.clock)
    counts = {**{name: event.data[name] for event in events for name in ("totalPromptTokens", "promptTokens", "completionTokens")
                 if name in event.data}}
    office.over(record, prompt=counts.get("promptTokens", counts.get("totalPromptTokens", 1)),
                completion=counts.get("completionTokens", 1))
    office.pass_s(0.3)
    typed = {event.name for event in events if event.name not in ("", "lmstudio_log", "lmstudio_error")}
    assert typed - {name for _, name, _ in record.timeline} == set()


def test_hundreds_of_requests_at_once_hold_up_no_line_of_the_log():
    office, took = Office(), [0.0]
    for number in range(300):
        office.ask(f"r{number}", "m")
    log_bytes = b"".join(log_path.read_bytes() for log_path in SAMPLES) * 4
    for at in range(0, len(log_bytes), 20_000):
        office.clock += 0.1
        events, began = office.parser.feed(log_bytes[at:at + 20_000]), time.thread_time()
        office.requests.see(events, office.clock)
        took.append(time.thread_time() - began)
    assert sum(took) < 1.0 and max(took) < 0.03     # else each is compared with each for each line


# --- 3.7 the life of a request

TOKEN_TIMES = {   # path, the answer's events, their clocks after the request -> timeToFirstTokenMs, tokensPerSecond
    "first to last": ("/v1/chat/completions", CHAT_STREAM, (1, 2, 3.5, 4, 5, 6), 2000.0, 2.0),
    "one token": ("/v1/chat/completions", [CHAT_STREAM[1], USAGE_CHUNK], (2, 3), 2000.0, None),
    "no usage": ("/v1/chat/completions", CHAT_STREAM[:4], (1, 2, 3, 4), 2000.0, None),
    "LM Studio's own speed": ("/api/v1/chat", METERED["native stream"][1], (1, 2, 3, 4, 5, 6), 4000.0, 48.2),
    "LM Studio's own times": ("/api/v0/chat/completions", V0_WHOLE, (9,), 120.0, 48.2),
    "times that nobody can mean": ("/api/v0/chat/completions", V0_WHOLE.replace(b"48.2", b"1e999").replace(
        b"0.12", b"9" * 400), (9,), None, None),
    "nothing timed": ("/v1/chat/completions", CHAT_WHOLE, (9,), None, None),
}


@pytest.mark.parametrize("row", TOKEN_TIMES.values(), ids=TOKEN_TIMES)
def test_a_request_is_timed_by_its_tokens(row):
    path, answer, clocks, first_ms, speed = row
    meter = lmgateway.Meter(lmgateway.DIALECTS[path], isinstance(answer, list))
    for clock, piece in zip(clocks, answer if meter.stream else [answer]):
        meter.feed(piece, 100.0 + clock)
    meter.end()
    record = lmgateway.Record("r", 1_700_000_000.0, 100.0, method="POST", path=path)
    record.end(110.0, lmgateway.Outcome("done", 200, meter=meter))
    data = record.end_event("x").data
    assert (data["timeToFirstTokenMs"], data["tokensPerSecond"]) == (first_ms, speed)
    assert data["totalTimeMs"] == 10_000.0


def test_a_request_goes_through_its_phases_with_progress_and_time_left(utc):
    office = Office()
    record = office.ask("r1")
    office.log('[INFO][JIT] Requested model (m/one) is not loaded. Loading "m/one" now...')
    assert record.state == "loading"
    office.clock += 3
    office.log(running("m/one"), streaming("m/one"))
    assert record.state == "queued"
    office.clock += 0.5
    office.log(engine_run(1, 1000, 200), percent("m/one", 0))
    office.clock += 2
    office.log(percent("m/one", 60))
    assert record.progress(office.clock) == {
        "percent": 60.0, "promptTokens": 1000, "promptTokensRead": 600, "etaMs": 2000,
        "promptTokensPerSecond": 200.0}
    office.clock += 2
    office.log(percent("m/one", 100))
    record.generated(11, office.clock)
    office.clock += 0.2
    assert "outputTokensPerSecond" not in record.progress(office.clock)     # too early to say
    office.clock += 3.8
    assert record.progress(office.clock)["outputTokensPerSecond"] == 2.5
    office.over(record, prompt=1000, completion=24)
    assert [(phase["name"], phase["ms"], phase["slow"]) for phase in record.phases(office.clock)] == [
        ("waiting", 0, False), ("loading", 3000, False), ("queued", 500, False), ("prompt", 4000, False),
        ("generating", 4000, False)]
    assert record.context() == {"size": 8192, "used": 1024, "percentage": 12.5}


def test_progress_is_told_at_a_change_of_state_and_else_four_times_a_second(utc):
    office = Office()
    record = office.ask("r1")
    office.log(running("m/one"), percent("m/one", 0))
    record.progress_event("now", office.clock)
    told = []
    for step in range(1, 11):
        office.clock += 0.0625
        told += [step] if office.requests.see(office.parser.feed(
            f"[{office.stamp}]{percent('m/one', step)}\n".encode()), office.clock) else []
        told and told[-1] == step and record.progress_event("now", office.clock)
    assert told == [4, 8]
    office.clock += 0.01
    events = office.parser.feed(f"[{office.stamp}]{percent('m/one', 100)}\n".encode())
    assert office.requests.see(events, office.clock) == [record]    # it generates now


# --- 3.9 figures


def exposition(figures, **gauges):
    return figures.exposition({name: {(): value} for name, value in gauges.items()}).splitlines()


def test_no_client_can_invent_a_series():
    figures, most = lmgateway.Figures(), lmgateway.Figures.SERIES
    for number in range(most + 50):
        record = lmgateway.Record(f"r{number}", 0, 0, model_asked=f"invented-{number}", target="/v1/made-up")
        record.end(1, lmgateway.Outcome("failed", 404, "no", "upstream_error"))
        figures.count_request(record)
        figures.count_event(Event("lmstudio_cache_stats", {"model": f"tag-{number}", "reused": 1}))
        figures.add("lmstudio_log_rotations_total", f"reason {number}")
    lines = exposition(figures)
    assert [line for line in lines if line.startswith("lmstudio_gateway_requests_total{")] == [
        f'lmstudio_gateway_requests_total{{key="none",model="other",endpoint="other",code="404"}} {most + 50}']
    cached, rotations = ([line for line in lines if line.startswith(name)]
                         for name in ("lmstudio_cached_input_tokens_total{", "lmstudio_log_rotations_total{"))
    assert len(cached) == lmgateway.Figures.MODELS + 1
    assert len(rotations) == most + 1 and rotations[-1] == 'lmstudio_log_rotations_total{reason="other"} 50'
    assert exposition(lmgateway.Figures()) == [""]


def test_figures_of_the_engine_are_summed_in_seconds_and_by_kind_of_token():
    figures = lmgateway.Figures()
    figures.count_event(Event("lmstudio_prediction_stats", {
        "model": "m", "timeToFirstTokenMs": 500, "promptMs": 250, "reasoningTokens": 3, "acceptedDraftTokens": 4,
        "completionTokens": 60, "tokensPerSecond": 20.0, "promptTokensPerSecond": 800.0}))
    figures.count_event(Event("lmstudio_chat_end", {"model": "m"}, about={"requests": 1, "input": 7}))
    found = dict(line.rsplit(" ", 1) for line in exposition(figures) if "_sum" in line or "_total{" in line)
    assert found == {f'lmstudio_{name}{{model="m"}}': value for name, value in {
        "time_to_first_token_seconds_sum": "0.5", "prompt_eval_seconds_sum": "0.25", "generation_seconds_sum": "3.0",
        "prompt_tokens_per_second_sum": "800.0", "tokens_per_second_sum": "20.0", "output_tokens_total": "60",
        "reasoning_tokens_total": "3", "accepted_draft_tokens_total": "4", "requests_total": "1",
        "input_tokens_total": "7"}.items()}


def test_histograms_are_cumulative_and_labels_escaped():
    figures = lmgateway.Figures()
    for value in (0.05, 0.3, 9999):
        figures.add("lmstudio_time_to_first_token_seconds", 'a"b\\c\nd', amount=value)
    text, label = exposition(figures), r'model="a\"b\\c\nd"'
    for line in (f'bucket{{{label},le="0.05"}} 1', f'bucket{{{label},le="0.5"}} 2', f'bucket{{{label},le="+Inf"}} 3',
                 f"count{{{label}}} 3"):
        assert f"lmstudio_time_to_first_token_seconds_{line}" in text


def test_time_in_lm_studios_queue_is_counted_where_the_log_shows_it(utc):
    office, figures = Office(), lmgateway.Figures()
    shown, unseen = office.ask("r1"), office.ask("r2", model="m/two", messages=7)
    office.log(running("m/one"), running("m/two", 7))
    office.clock += 3
    office.log(percent("m/one", 0))
    for record in (shown, unseen):
        office.over(record)
        figures.count_request(record)
    assert 'lmstudio_gateway_queue_seconds_count{key_priority="normal",outcome="done"} 1' in exposition(figures)
    assert 'lmstudio_gateway_queue_seconds_sum{key_priority="normal",outcome="done"} 3.0' in exposition(figures)


@pytest.mark.parametrize(("state", "outcome", "line"), [
    *(("waiting", ("failed", status, "x", f"upstream_{operation}"), f'upstream_errors_total{{kind="{kind}"}} 1')
      for status, operation, kind in ((None, "unreachable", "refused"), (504, "timeout", "timeout"),
                                      (200, "reset", "reset"), (500, "error", "bad_status"), (200, "error", "error_in_200"))),
    *((state, ("abandoned", None, "x", "client_disconnected"), f'client_disconnects_total{{phase="{phase}"}} 1')
      for state, phase in (("waiting", "queued"), ("loading", "queued"), ("prompt", "prefill"), ("generating", "decode")))])
def test_a_request_that_fails_is_counted_by_its_cause_and_one_that_is_left_by_its_phase(state, outcome, line):
    figures, record = lmgateway.Figures(), lmgateway.Record("r1", 0, 0)
    record.enter(state, 0.5)
    record.end(1, lmgateway.Outcome(*outcome))
    figures.count_request(record)
    assert [row for row in exposition(figures) if "errors_total{" in row or "disconnects_total{" in row] == [
        f"lmstudio_gateway_{line}"]


def test_times_of_a_request_are_seconds_and_running_ones_are_gauges(utc):
    office, figures = Office(), lmgateway.Figures()
    record = office.ask("r1", overhead_s=0.002)
    office.log(running("m/one"), streaming("m/one"), engine_run(1, 500), percent("m/one", 40))
    waiting = office.ask("r2")
    office.log(running("m/one"), streaming("m/one"))
    figures.model("m/one")
    gauges = figures.gauges(office.requests)
    assert gauges["lmstudio_gateway_requests_in_flight"] == {("m/one",): 2}
    assert (waiting.state, gauges["lmstudio_gateway_requests_queued"]) == ("queued", {("m/one",): 1})
    assert list(gauges["lmstudio_prompt_progress_ratio"].values()) == [0.4]
    office.log(running("m/two", 7))       # not through us
    assert figures.gauges(office.requests)["lmstudio_gateway_requests_in_flight"] == {("m/one",): 2, ("m/two",): 0}
    office.clock += 2
    record.first_ms, record.speed = 500.0, 20.0
    office.over(record, prompt=500)
    figures.count_request(record)
    sums = dict(re.findall(r"lmstudio_gateway_(\w+)_seconds_sum\S* (\S+)", "\n".join(exposition(figures))))
    assert {name: float(value) for name, value in sums.items()} == {
        "request_duration": 2, "time_to_first_token": 0.5, "time_per_output_token": 0.05,
        "overhead": 0.002, "queue": 0}
    assert figures.gauges(office.requests)["lmstudio_gateway_correlated_total"] == {("exact",): 1, ("none",): 0}


def test_performance_is_of_the_requests_that_are_kept():
    records = [lmgateway.Record(f"r{number}", 0, 0, speed=speed, first_ms=first) for number, (speed, first) in enumerate(
        ((10.0, 100.0), (None, None), (30.0, 300.0), (None, 200.0)))]
    for number, record in enumerate(records, 1):
        record.end(number, lmgateway.Outcome("done", 200))
    tokens = Counter({"input": 7, "output": 5, "cached_input": 3, "reasoning": 2})
    counts = types.SimpleNamespace(total=40, errors=10, abandoned=3)
    assert lmgateway.performance(records, counts, tokens) == {
        "totalRequests": 40, "totalErrors": 10, "totalAbandoned": 3, "errorRate": 0.25, "keptRequests": 4,
        "avgResponseTimeMs": 2500.0, "minResponseTimeMs": 1000, "maxResponseTimeMs": 4000, "medianResponseTimeMs": 2000,
        "p95ResponseTimeMs": 4000, "p99ResponseTimeMs": 4000, "medianTimeToFirstTokenMs": 200.0,
        "p95TimeToFirstTokenMs": 300.0, "avgTokensPerSec": 20.0, "totalTokensProcessed": 12,
        "tokenStats": {"promptTokens": 7, "completionTokens": 5, "cachedTokens": 3, "reasoningTokens": 2}}
    nothing = lmgateway.performance([], lmgateway.Requests("", 1), Counter())
    assert (nothing["errorRate"], nothing["avgResponseTimeMs"], nothing["p95ResponseTimeMs"]) == (0, None, None)


def test_tokens_that_the_log_tells_later_are_counted_once():
    figures, record = lmgateway.Figures(), lmgateway.Record("r1", 0, 0)
    record.end(1, lmgateway.Outcome("abandoned", None, "left", "client_disconnected"))
    figures.count_request(record)
    record.usage = {"promptTokens": 7, "completionTokens": 2}
    figures.count_tokens(record)
    figures.count_tokens(record)
    assert figures.tokens() == {"input": 7, "output": 2}


@pytest.mark.parametrize("share, value", [(0, 1), (0.5, 5), (0.95, 10), (1, 10)])
def test_percentiles_are_values_that_occur(share, value):
    assert lmgateway.rank(list(range(1, 11)), share) == value
    assert lmgateway.rank([], share) is None


# === 4. HUB ==================================================================


def numbers(*wanted):
    return [Event("n", {"n": number}) for number in wanted]


def data_of(frames):
    return [json.loads(frame.partition(b"data: ")[2]) for frame in frames]


def names_of(hub):
    """The names of the events that a hub's ring holds."""
    with hub.listening("0") as listener:
        return [re.search(rb"\nevent: (.*)\n", frame)[1].decode() for frame in hub.read(listener)[0]]


def everything(hub, listener, most=math.inf):
    """(numbers of the frames behind a listener's place, gaps on the way)."""
    found, gaps = [], []
    while True:
        frames, gap = hub.read(listener, most=most)
        gaps += [gap] if gap else []
        if not frames:
            return found, gaps
        found += [data["n"] for data in data_of(frames)]


def test_ids_count_by_one_and_have_an_epoch_of_their_own():
    hub, other = lmgateway.Hub(), lmgateway.Hub()
    hub.publish(numbers(1, 2))
    hub.publish(numbers(3))
    with hub.listening("0") as listener:
        frames, _ = hub.read(listener)
    assert frames == [f'id: {hub.epoch}-{n}\nevent: n\ndata: {{"n": {n}}}\n\n'.encode() for n in (1, 2, 3)]
    assert hub.epoch != other.epoch
    assert len({hub.request_id(), hub.request_id(), other.request_id(), other.request_id()}) == 4


def test_a_request_ends_once_and_what_the_log_adds_later_reaches_history_and_figures(utc):
    rows, parser, stamp = [], Parser(), "2026-11-24 10:00:00"
    hub, started = lmgateway.Hub(keep=rows.extend), lmgateway.UtcClock().moment(stamp).epoch

    def log(*entries):
        hub.publish_log(parser.feed("".join(f"[{stamp}]{entry}\n" for entry in entries).encode()) + parser.quiet())

    record = lmgateway.Record(hub.request_id(), started, time.monotonic(), model_asked="m/one", messages=1,
                              dialect="chat",
                              target="/v1/chat/completions", stream=True)
    hub.begin(record)
    log(running("m/one"), streaming("m/one"), engine_run(1, 500, 100), percent("m/one", 0), percent("m/one", 100))
    while record.run is None:   # a moment later it is certain
        hub.publish_log([])
    for _ in range(2):
        hub.end(record, lmgateway.Outcome("abandoned", None, "it left", "client_disconnected"))
    hub.count()
    log(engine_end(1, 400, 12), finished("m/one"))
    log(running("m/two"), streaming("m/two"), engine_run(2, 70), percent("m/two", 100),
        engine_end(2, 70, 9), finished("m/two"))
    told = Counter(names_of(hub))
    assert (told["inference_start"], told["error"], told["inference_progress"] > 0) == (1, 1, True)
    by_name = [dict(zip([name for name, _, _ in lmgateway.HISTORY], row)) for row in rows]
    assert (by_name[0]["id"], by_name[0]["completion_tokens"]) == (record.id, None)
    ours, other = ({row["id"]: row for row in by_name}[name] for name in (record.id, by_name[-1]["id"]))
    assert (ours["prompt_tokens"], ours["completion_tokens"], ours["outcome"]) == (500, 12, "abandoned")
    assert (other["source"], other["model"], other["prompt_tokens"]) == ("lmstudio", "m/two", 70)
    figures = hub.performance()     # of what came through us
    assert (figures["keptRequests"], figures["tokenStats"]["promptTokens"],
            figures["totalErrors"], figures["totalAbandoned"]) == (1, 500, 0, 1)


def test_requests_are_shown_running_ones_first_and_each_newest_first():
    hub = lmgateway.Hub()
    records = [lmgateway.Record(f"r{number}", 0, 0, model_asked="m/old" if number == 1 else None) for number in range(5)]
    for record in records:
        hub.begin(record)
    for record in records[:3]:
        hub.end(record, lmgateway.Outcome("done", 200))
    assert [shown["requestId"] for shown in hub.shown()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [shown["requestId"] for shown in hub.shown(3)] == ["r4", "r3", "r2"]
    running, over, model = hub.overview(1)
    assert ([shown["requestId"] for shown in running], [shown["requestId"] for shown in over]) == (["r4", "r3"], ["r2"])
    assert model == "m/old"     # of the newest that has one


def test_nothing_is_told_of_the_progress_of_a_request_after_its_end(monkeypatch):
    """A request may end whenever the lock is free, so also between what its progress is and its telling."""
    hub, parser, encode = lmgateway.Hub(), Parser(), lmgateway.to_json
    stamp = "2026-11-24 10:00:00"
    started = lmgateway.UtcClock().moment(stamp).epoch
    record = lmgateway.Record(hub.request_id(), started, time.monotonic(), model_asked="m/one", messages=1,
                              dialect="chat", target="/v1/chat/completions", stream=True)
    hub.begin(record)

    def encoded(data):
        if not hub._lock.locked():
            hub.end(record, lmgateway.Outcome("done", 200))
        return encode(data)

    def log(*entries):
        hub.publish_log(parser.feed("".join(f"[{stamp}]{entry}\n" for entry in entries).encode()) + parser.quiet())

    log(running("m/one"), streaming("m/one"), percent("m/one", 0))
    monkeypatch.setattr(record, "_told", -math.inf)
    monkeypatch.setattr(lmgateway, "to_json", encoded)
    log(percent("m/one", 50))
    names = names_of(hub)
    assert "inference_progress" in names and record.ended is not None
    assert "inference_progress" not in names[names.index("inference_complete"):]


@pytest.mark.parametrize("since, missed",
                         [("{}-2", [3, 4]), ("{}-4", []), ("{}-0", [1, 2, 3, 4]), ("2", [3, 4]),
                                           (None, []), ("", []), ("nonsense", []), ("{}-99", [])])
def test_a_listener_that_comes_back_gets_what_it_missed(since, missed):
    hub = lmgateway.Hub()
    hub.publish(numbers(1, 2, 3, 4))
    with hub.listening(since and since.format(hub.epoch)) as listener:
        assert everything(hub, listener) == (missed, [])
        hub.publish(numbers(5))
        assert everything(hub, listener) == ([5], [])


@pytest.mark.parametrize("strange, last", [("0ther-7", 8), ("old_epoch-3", 4), ("a-b-3", 4)])
def test_an_id_of_another_start_is_a_gap_that_nobody_can_count(strange, last):
    hub = lmgateway.Hub()
    hub.publish(numbers(1, 2))
    with hub.listening(strange) as listener:
        gap = {"from": f"{strange[:-2]}-{last}", "to": hub.event_id(0), "count": None}
        assert everything(hub, listener) == ([1, 2], [gap])
    with hub.listening(strange) as listener:
        hub.publish(numbers(*range(3, 20_001)))      # the ring moves on before the first look: still one gap
        found, gaps = everything(hub, listener)
    assert gaps == [{**gap, "to": hub.event_id(found[0] - 1)}] and len(found) >= 10_000
    assert hub.replays == {"gap": 2}


def test_the_ring_holds_ten_thousand_and_tells_what_fell_out():
    hub = lmgateway.Hub()
    for start in range(1, 30_001, 500):
        hub.publish(numbers(*range(start, start + 500)))
    with hub.listening(f"{hub.epoch}-100") as listener:
        found, gaps = everything(hub, listener, 1000)
    assert 10_000 <= len(found) <= 13_000 and found == list(range(found[0], 30_001))
    assert gaps == [{"from": hub.event_id(101), "to": hub.event_id(found[0] - 1), "count": found[0] - 101}]
    for since in ("", f"{hub.epoch}-29999", "0ther-7"):
        with hub.listening(since):
            pass
    assert hub.replays == {"full": 1, "gap": 2}


def test_the_ring_holds_32_mb_of_large_events_and_tells_what_fell_out():
    hub, text = lmgateway.Hub(), "🦊" * 100_000
    with hub.listening() as slow, tracing() as peak:
        for number in range(300):      # 120 MB
            hub.publish([Event("n", {"n": number, "text": text})])
        assert peak() < 40_000_000
        frames, gap = hub.read(slow, most=1)
        found, gaps = everything(hub, slow)
    held = data_of(frames) + found
    assert 32_000_000 <= len(held) * 400_000 < 34_000_000 and not gaps
    assert gap["count"] == 300 - len(held) == hub.dropped and found[-1] == 299


def test_a_listener_reads_a_bounded_piece_and_holds_on_to_nothing_more():
    hub = lmgateway.Hub()
    with hub.listening() as listener:
        hub.publish([Event("n", {"n": number, "text": "x" * 30_000}) for number in range(50)])
        assert [len(hub.read(listener, most=65_536)[0]) for _ in range(2)] == [3, 3]
        hub.publish(numbers(*range(8000)))
        assert len(hub.read(listener)[0]) == hub.BATCH < 8000


def test_events_of_many_threads_have_one_order():
    hub = lmgateway.Hub()
    threads = [threading.Thread(target=lambda n=n: [hub.publish(numbers(n, n)) for _ in range(200)])
               for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    with hub.listening("0") as listener:
        found, gaps = everything(hub, listener)
    assert (len(found), gaps, hub.last) == (3200, [], 3200)
    assert found[::2] == found[1::2]        # what is published together stays together


def test_events_and_the_end_wake_a_listener_that_waits():
    hub, woken = lmgateway.Hub(), queue.Queue()

    def listen():
        with hub.listening() as listener:
            hub.wait(listener, -1)      # a time that is over already
            while not hub.closed:
                hub.wait(listener, PATIENCE_S)
                woken.put(len(hub.read(listener)[0]))

    thread = threading.Thread(target=listen)
    started = time.monotonic()
    thread.start()
    until(lambda: hub._waiting)
    hub.publish(numbers(1))
    assert woken.get(timeout=PATIENCE_S) == 1
    hub.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and time.monotonic() - started < PATIENCE_S


# --- 4.2 history


def finished_record(name="r1", started=1_700_000_000.0, **about):
    record = lmgateway.Record(name, started, 0.0, key="anna", client="192.168.1.7",
                              path="/v1/chat/completions",
                              model_asked="m/one", stream=True, **about)
    meter = lmgateway.Meter(lmgateway.DIALECTS["/v1/chat/completions"], False)
    meter.feed(json.dumps({"model": "m/one",
                           "usage": {"prompt_tokens": 70, "completion_tokens": 5}}).encode(), 1.0)
    meter.end()
    record.end(2.0, lmgateway.Outcome("done", 200, meter=meter))
    return record


def test_history_keeps_a_row_for_each_request_and_takes_the_later_word(tmp_path):
    history = lmgateway.History(str(tmp_path / "h.db"))
    record = finished_record()
    history.keep([lmgateway.history_row(record)])
    record.usage = {**record.usage, "cachedTokens": 40}
    history.keep([lmgateway.history_row(record),
                  lmgateway.history_row(finished_record("r2", 1_700_100_000.0))])
    history.close()
    assert history.usage("key") == [{"key": "anna", "requests": 2, "errors": 0, "promptTokens": 140,
                                     "cachedTokens": 40, "completionTokens": 10, "promptSeconds": 0.0,
                                     "generationSeconds": 0.0, "promptTokensPerSecond": None,
                                     "tokensPerSecond": None, "abandoned": 0}]
    assert history.usage("model", since=1_700_050_000.0)[0]["requests"] == 1
    assert [row["requests"] for row in history.usage("day")] == [1, 1]


def test_history_holds_no_prompt_and_no_answer(tmp_path, utc):
    office, secret = Office(), "the cat is under the piano"
    record = office.ask("r1", body=chat_body(secret))
    office.log(received(chat_body(secret)), running("m/one"), engine_run(1, 10))
    office.over(record, prompt=10, choices=[{"message": {"content": secret}, "finish_reason": "stop"}])
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep([lmgateway.history_row(done) for done in office.requests.changed])
    history.close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"m/one" in written
    assert b"piano" not in written


def usage_of(records, *groups):
    """Rows of usage of records that are over, their figures cut down to what a test names."""
    with lmgateway.open_history(":memory:") as connection:
        lmgateway.store_rows(connection, [lmgateway.history_row(record) for record in records])
        return lmgateway.usage_rows(connection, groups)


def test_usage_is_summed_by_key_model_and_day_whoever_asked(utc, monkeypatch):
    noon = 1_767_268_800.0      # 2026-01-01 12:00 UTC
    beside = finished_record("log_1", noon, source="lmstudio")
    keyless, failed = finished_record("r2", noon), finished_record("r3", noon + 86400)
    beside.key = keyless.key = None
    failed.end(3.0, lmgateway.Outcome("failed", 500, "x", "upstream_error"))
    failed.model = failed.usage = None
    failed.model_asked = "m/asked"
    records = [finished_record("r1", noon), beside, keyless, failed]
    assert {row["key"]: (row["requests"], row["errors"]) for row in usage_of(records, "key")} == {
        "anna": (2, 1), "not via gateway": (1, 0), "no key": (1, 0)}
    assert [(row["model"], row["requests"], row["promptTokens"]) for row in usage_of(records, "model")] == [
        ("m/one", 3, 210), ("m/asked", 1, 0)]       # the most tokens first
    assert [row["day"] for row in usage_of(records, "day")] == ["2026-01-02", "2026-01-01"]
    columns = dict(zip([name for name, _, _ in lmgateway.HISTORY], lmgateway.history_row(failed)))
    assert {name: columns[name] for name in ("source", "status", "outcome", "operation")} == {
        "source": "gateway", "status": 500, "outcome": "failed", "operation": "upstream_error"}
    if hasattr(time, "tzset"):
        monkeypatch.setenv("TZ", "Pacific/Kiritimati")      # 14 hours ahead
        time.tzset()
        assert [row["day"] for row in usage_of(records, "day")] == ["2026-01-03", "2026-01-02"]


def kept(history):
    """The ids in a history's file."""
    with lmgateway.open_history(history.path) as connection:
        return [name for name, in connection.execute("SELECT id FROM requests ORDER BY started, id")]


def rows_of(*names, started=1e9, **fields):
    found = []
    for name in names:
        record = finished_record(name, started)
        vars(record).update(fields)
        found.append(lmgateway.history_row(record))
    return found


def test_keeping_a_row_never_waits_and_old_ones_are_removed_once_an_hour(tmp_path, monkeypatch):
    go, calls, store = threading.Event(), Counter(), lmgateway.store_rows
    monkeypatch.setattr(lmgateway, "store_rows", lambda *args: (go.wait(PATIENCE_S), store(*args)))
    monkeypatch.setattr(lmgateway, "remove_rows", counting("removed", lmgateway.remove_rows, calls))
    history, started = lmgateway.History(str(tmp_path / "h.db"), days=30), time.monotonic()
    history.keep(rows_of("old", started=time.time() - 31 * 86400))
    history.keep(rows_of("new", started=time.time() - 29 * 86400))
    assert time.monotonic() - started < PATIENCE_S / 2
    go.set()
    history.close()
    assert kept(history) == ["new"] and calls["removed"] == 1
    with lmgateway.open_history(history.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("make", [lambda path: path.write_text("no database"), lambda path: path.mkdir()],
                         ids=["text", "directory"])
def test_what_is_no_history_is_refused_with_the_remedy(tmp_path, make):
    make(tmp_path / "h.db")
    config, cleanup = lmgateway.Config(history=str(tmp_path / "h.db")), contextlib.ExitStack()
    with pytest.raises(lmgateway.ConfigError, match="--history .*h.db .HISTORY_FILE.*; name a file"):
        lmgateway.open_history_file(config, cleanup)
    with pytest.raises(lmgateway.ConfigError, match="--history .*h.db .HISTORY_FILE.*; name a file"):
        lmgateway.report(types.SimpleNamespace(paths=[], json=False), config)


def test_a_report_of_another_programs_table_is_one_line_with_the_remedy(tmp_path):
    import sqlite3
    with contextlib.closing(sqlite3.connect(tmp_path / "h.db")) as connection, connection:
        connection.execute("CREATE TABLE requests (id TEXT, started REAL)")
    with pytest.raises(lmgateway.ConfigError, match="--history .*h.db .HISTORY_FILE.*; name a file"):
        lmgateway.report(types.SimpleNamespace(paths=[], json=False),
                         lmgateway.Config(history=str(tmp_path / "h.db")))


def test_any_text_and_any_number_can_be_kept_and_summed(tmp_path):
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep(rows_of("r1", model="\ud800") + rows_of("r2", "r3", prompt_tokens=2**70, first_ms=math.inf,
                                                         usage=None))
    history.close()
    assert kept(history) == ["r1", "r2", "r3"]
    assert sum(row["promptTokens"] for row in history.usage("model")) == 2 * 10**12 + 70


@pytest.fixture
def said(caplog, monkeypatch):
    """The messages of our log so far."""
    caplog.set_level("INFO", "lmgateway")
    monkeypatch.setattr(lmgateway.log, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def remove_history(path):
    for file in path.parent.glob(path.name + "*"):
        file.unlink()


@pytest.mark.parametrize("harm", [remove_history, lambda path: path.rename(path.with_name("away"))],
                         ids=["removed", "renamed"])
def test_a_history_that_is_no_longer_at_its_path_is_made_anew_and_that_is_said_once(tmp_path, said, harm):
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep(rows_of("r1"))
    until(lambda: not history._rows and kept(history))
    harm(tmp_path / "h.db")
    history.keep(rows_of("r2"))
    until(said)
    history.keep(rows_of("r3"))
    history.close()
    assert kept(history) == ["r2", "r3"]
    assert [text.partition(", ")[2] for text in said()] == ["a new one is begun"]


def lock_history(path):
    import sqlite3
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    return connection.close


def spoil_history(path):
    remove_history(path)
    path.mkdir()
    return path.rmdir


@pytest.mark.parametrize("harm", [lock_history, spoil_history], ids=["locked", "spoiled"])
def test_rows_wait_for_a_history_that_cannot_be_written_in_a_bounded_number(tmp_path, said, monkeypatch, harm):
    monkeypatch.setattr(lmgateway.History, "RETRY_S", 0.05)
    monkeypatch.setattr(lmgateway.History, "LOCK_S", 0.05)
    monkeypatch.setattr(lmgateway.History, "PAUSE_S", 0)
    monkeypatch.setattr(lmgateway.History, "ROWS", 3)
    history = lmgateway.History(str(tmp_path / "h.db"))
    heal = harm(tmp_path / "h.db")
    history.keep(rows_of("r1"))
    until(said)
    for name in ("r2", "r3", "r4", "r5"):
        history.keep(rows_of(name))
    heal()
    until(lambda: len(said()) == 2)
    history.close()
    assert kept(history) == ["r3", "r4", "r5"]
    begun, over, lost = said()
    assert "the latest 3 rows wait" in begun and "2 requests are missing" in lost
    assert "written again" in over if harm is lock_history else "a new one is begun" in over


def test_a_full_disk_is_said_once_and_a_row_that_waits_gives_way_to_its_later_word(tmp_path, said, monkeypatch):
    import sqlite3
    monkeypatch.setattr(lmgateway.History, "RETRY_S", 0.01)
    tries, store = [], lmgateway.store_rows

    def full(connection, rows):
        tries.append(rows)
        if len(tries) > 3:
            return store(connection, rows)
        history.keep(rows_of("r1", model=f"word {len(tries)}"))
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(lmgateway, "store_rows", full)
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep(rows_of("r1"))
    until(lambda: len(said()) > 1)
    history.close()
    assert [row["model"] for row in history.usage("model")] == ["word 3"]
    assert "disk is full" in said()[0] and "written again" in said()[1] and len(said()) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_history_is_for_its_owner_alone(tmp_path):
    for path in (tmp_path / "new.db", tmp_path / "old.db"):
        if path.stem == "old":
            with lmgateway.open_history(path):
                path.chmod(0o644)       # as an earlier version made it
        history = lmgateway.History(str(path))
        history.keep(rows_of("r1"))
        until(lambda: kept(history))    # noqa: B023
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        history.close()


def test_history_survives_a_killed_process(tmp_path):
    code = ("import sys, os, signal; sys.path.insert(0, sys.argv[1]); import lmgateway\n"
            "history = lmgateway.History(sys.argv[2])\n"
            "record = lmgateway.Record('r1', 1e9, 0.0); record.end(1.0, lmgateway.Outcome('done', 200))\n"
            "history.keep([lmgateway.history_row(record)])\n"
            "while not history.usage('key'): pass\n"
            "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n")
    subprocess.run([sys.executable, "-c", code, str(HERE), str(tmp_path / "h.db")], check=False,
                   timeout=PATIENCE_S)
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.close()
    assert history.usage("key")[0]["requests"] == 1


@pytest.mark.parametrize("text, epoch", [
    ("", 0.0), ("7d", 1e9 - 7 * 86400), ("24h", 1e9 - 86400), ("30m", 1e9 - 1800), ("1700000000", 1.7e9),
    ("2026-11-24T00:00:00Z", 1795478400.0)])
def test_since_takes_spans_dates_and_epochs(text, epoch):
    assert lmgateway.since_epoch(text, 1e9) == epoch


@pytest.mark.parametrize("text", ["yesterday", "7x", "2026-13-01", "-5d", "9" * 40])
def test_since_refuses_other_words_with_the_forms(text):
    with pytest.raises(ValueError, match="7d, 24h, 30m"):
        lmgateway.since_epoch(text, 1e9)


# === 5. TAIL =================================================================


class Logs:
    """A log directory and a Monitor that follows it, by a clock of its own: look() is one turn of the tail thread."""

    def __init__(self, directory, **how):
        self.directory, self.clock = Path(directory), 1000.0
        self.follower = lmgateway.Follower(str(directory), **how)
        self.monitor = lmgateway.Monitor(self.follower, clock=lambda: self.clock, now=lambda: 1_700_000_000.0)

    def path(self, name):
        path = self.directory / name[:7] / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name, *words, end=b"\n"):
        """Append entries to a log; each is one unknown word, so that only the next header or a quiet ends it."""
        with self.path(name).open("ab") as file:
            file.write(b"".join(HEADER + word.encode() + end for word in words))

    def look(self, seconds=0.11):
        """What is told within so many seconds: words of entries, `old > new` for files, both by their names."""
        end, told = self.clock + seconds, []
        while True:
            events, pause = self.monitor.step()
            told += [self.words(event) for event in events]
            if self.clock >= end and pause:
                return told
            self.clock += pause

    @staticmethod
    def words(event):
        data = event.data
        if event.name == "lmstudio_file_switch":
            return f"{Path(data['oldLogFile']).stem} > {Path(data['newLogFile']).stem}"
        if event.name == "lmstudio_month_transition":
            return f"{Path(data['oldDirectory']).name} >> {Path(data['newLogFile']).stem}"
        return data["message"] + " continued" * data.get("continued", False)


@pytest.fixture
def logs(tmp_path):
    """A directory whose newest log has an old entry, followed from its end."""
    logs = Logs(tmp_path / "server-logs")
    logs.write("2026-05-01.1", "old")
    assert logs.look() == []
    return logs


QUIET = 0.5     # what ends an open entry


def test_the_newest_log_is_read_from_its_end_and_numbers_are_numbers(tmp_path):
    logs = Logs(tmp_path)
    for name in ("2026-05-01.9", "2026-05-01.10", "2026-04-30.11", "2026-05-01.2"):
        logs.write(name, "old")
    (tmp_path / "2026-05" / "2026-06-01.1.log.bak").write_bytes(HEADER + b"not a log\n")
    (tmp_path / "2026-05" / "notes").mkdir()
    (tmp_path / "2026-06").write_bytes(b"no directory")
    (tmp_path / "2026-05-copy").mkdir()
    (tmp_path / "2026-05-copy" / "2026-05-30.1.log").write_bytes(HEADER + b"no month of LM Studio's\n")
    (tmp_path / "other").mkdir()
    assert logs.look() == []
    logs.write("2026-05-01.10", "a", "b")
    logs.write("2026-05-01.9", "nobody reads this")
    assert logs.look(QUIET) == ["a", "b"]
    assert logs.follower.file.number == 10


def test_from_start_begins_at_the_start_of_the_newest_file(tmp_path):
    logs = Logs(tmp_path, from_start=True)
    logs.write("2026-04-30.1", "old")
    logs.write("2026-05-01.1", "a", "b")
    assert logs.look(QUIET) == ["a", "b"]


@pytest.mark.parametrize(("mtimes", "told"),
                         [([5e8], []), ([2e9], ["1"]), ([5e8, 2e9, 2e9], ["2", "3"]), ([5e8, 6e8], [])])
def test_of_a_directory_that_appears_later_only_what_was_written_since_the_start_is_news(tmp_path, mtimes, told):
    logs = Logs(tmp_path / "server-logs", started=1e9)
    assert logs.look(1) == []
    for number, mtime in enumerate(mtimes, 1):
        logs.write(f"2026-05-01.{number}", str(number))
        os.utime(logs.path(f"2026-05-01.{number}"), (mtime, mtime))
    assert [word for word in logs.look(QUIET) if ">" not in word] == told
    logs.write(f"2026-05-01.{len(mtimes)}", "more")
    assert logs.look(QUIET) == ["more"]


def write_in_pieces(logs, data, size):
    told = []
    for start in range(0, len(data), size):
        with logs.path("2026-05-01.1").open("ab") as file:
            file.write(data[start:start + size])
        told += logs.look()
    return told + logs.look(QUIET)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_entries_lines_and_characters_split_over_writes_are_whole(logs, size):
    data = HEADER + "été 🦊 東京\nmore\n".encode() + HEADER + b"next\r\n" + HEADER + b"[m] Finished streaming response\n"
    assert write_in_pieces(logs, data, size) == ["été 🦊 東京\nmore", "next", "[m] Finished streaming response",
                                                 "Finished streaming response"][:2] + [
        "Finished streaming response", "[m] Finished streaming response"]


def test_an_open_entry_ends_at_200_ms_without_more_and_not_before(logs):
    logs.write("2026-05-01.1", "slow")
    assert logs.look(0.19) == []
    with logs.path("2026-05-01.1").open("ab") as file:
        file.write(b"more\n")
    assert logs.look(0.19) == []
    assert logs.look(0.03) == ["slow\nmore"]
    with logs.path("2026-05-01.1").open("ab") as file:
        file.write(b"late\n")
    assert logs.look(QUIET) == ["late continued"]


def test_a_line_without_an_end_waits_longer_and_goes_on(logs):
    logs.write("2026-05-01.1", "half", end=b"")
    assert logs.look(1.9) == []
    assert logs.look(0.3) == ["half"]


def test_whole_single_lines_are_not_held_back(logs):
    logs.write("2026-05-01.1", "[m] Prompt processing progress: 1.0%")
    assert "[m] Prompt processing progress: 1.0%" in logs.look(0)


def test_a_new_day_number_and_month_are_read_after_the_rest_of_the_old_file(logs):
    logs.write("2026-05-01.1", "a")
    logs.write("2026-05-01.2", "b")
    assert logs.look() == ["a", "2026-05-01.1 > 2026-05-01.2"]
    logs.write("2026-05-01.2", "c")
    logs.write("2026-05-02.1", "d")
    assert logs.look(QUIET) == ["b", "c", "2026-05-01.2 > 2026-05-02.1", "d"]
    logs.write("2026-06-01.1", "e")
    assert logs.look(QUIET) == ["2026-05 >> 2026-06-01.1", "e"]


def test_what_the_old_file_gets_while_the_new_one_appears_is_read_first(logs, monkeypatch):
    logs.write("2026-05-01.2")
    assert logs.look() == []

    def read(original=logs.follower._read):
        news = original()
        monkeypatch.undo()      # just after the look at the old file, both are written
        logs.write("2026-05-01.1", "last")
        logs.write("2026-05-01.2", "first")
        return news

    monkeypatch.setattr(logs.follower, "_read", read)
    assert logs.look(QUIET) == ["last", "2026-05-01.1 > 2026-05-01.2", "first"]


def test_an_entry_that_goes_on_in_the_next_file_is_lost_in_no_part(logs):
    logs.write("2026-05-01.1", "begun\nha", end=b"")
    logs.path("2026-05-01.2").write_bytes(b"lf\nrest\n" + HEADER + b"next\n")
    assert logs.look(QUIET) == ["begun\nha", "2026-05-01.1 > 2026-05-01.2", "lf\nrest continued", "next"]


def test_a_replaced_file_continues_nothing(logs):
    logs.write("2026-05-01.1", "half a li", end=b"")
    assert logs.look() == []
    logs.path("2026-05-01.1").write_bytes(b"x" * 99 + b"\n" + HEADER + b"new\n")
    assert logs.look(QUIET) == ["half a li", "new"]


def test_several_files_at_once_are_read_in_order_of_time(logs):
    logs.write("2026-05-01.1", "a")
    for name in ("2026-05-01.10", "2026-06-02.1", "2026-05-01.9", "2026-05-30.1"):
        logs.write(name, name)
    told = logs.look(QUIET)
    assert [word for word in told if ">" not in word] == ["a", "2026-05-01.9", "2026-05-01.10",
                                                          "2026-05-30.1", "2026-06-02.1"]
    assert [word for word in told if ">" in word] == [
        "2026-05-01.1 > 2026-05-01.9", "2026-05-01.9 > 2026-05-01.10", "2026-05-01.10 > 2026-05-30.1",
        "2026-05 >> 2026-06-02.1"]


def test_an_empty_newer_file_or_month_is_not_taken_before_something_stands_in_it(logs):
    logs.path("2026-05-01.2").write_bytes(b"")
    logs.path("2026-06-01.1")
    assert logs.look(QUIET) == []
    logs.write("2026-05-01.1", "still here")
    assert logs.look(QUIET) == ["still here"]
    logs.write("2026-06-01.1", "june")
    assert logs.look(0.15) == ["2026-05-01.1 > 2026-05-01.2", "2026-05 >> 2026-06-01.1"]
    assert logs.look(QUIET) == ["june"]


REPLACED = {
    "emptied and written anew": lambda path: path.write_bytes(HEADER + b"new\n"),
    "written anew, as long as before": lambda path: path.write_bytes(
        (HEADER + b"new").ljust(path.stat().st_size - 1, b".") + b"\n"),
    "written anew, longer": lambda path: path.write_bytes(HEADER + b"new" + b"." * 3000 + b"\n"),
    "renamed and made again": lambda path: (path.rename(path.with_suffix(".bak")),
                                            path.write_bytes(HEADER + b"new\n")),
    "deleted and made again, longer": lambda path: (path.unlink(),
                                                    path.write_bytes(HEADER + b"new" + b"." * 900 + b"\n")),
    "replaced by another, longer one": lambda path: (path.with_suffix(".tmp").write_bytes(HEADER + b"new" + b"." * 900 + b"\n"),
                                                     path.with_suffix(".tmp").replace(path)),
}


@pytest.mark.parametrize(("changed", "told"), [(b"old", ["new", "two", "x" * 300, "more"]),
                                               (b"two", ["old", "new", "x" * 300, "more"]),
                                               (b"none", ["more"])])
def test_another_file_is_told_by_its_beginning_where_the_rest_is_alike(logs, changed, told):
    path = logs.path("2026-05-01.1")
    for word in ("two", "x" * 300):
        logs.write("2026-05-01.1", word)
        assert logs.look(QUIET) == [word]
    other = path.with_suffix(".tmp")
    other.write_bytes(path.read_bytes().replace(changed, b"new") + HEADER + b"more\n")
    other.replace(path)
    assert logs.look(QUIET) == told


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_replaced_file_is_read_from_its_start(logs, replace):
    logs.write("2026-05-01.1", "before it")
    assert logs.look(QUIET) == ["before it"]
    replace(logs.path("2026-05-01.1"))
    assert [word.rstrip(".") for word in logs.look(QUIET)] == ["new"]
    logs.write("2026-05-01.1", "after")
    assert logs.look(QUIET) == ["after"]


@pytest.mark.parametrize("words", [["new", "x" * 300, "more"], ["new", "more" * 200]],
                         ids=["alike before the end", "all new"])
def test_a_file_that_is_replaced_before_anything_of_it_was_read_is_read_from_its_start(tmp_path, words):
    logs = Logs(tmp_path)
    logs.write("2026-05-01.1", "old", "x" * 300)
    assert logs.look() == []
    path = logs.path("2026-05-01.1")
    path.rename(path.with_suffix(".bak"))
    logs.write("2026-05-01.1", *words)
    assert logs.look(QUIET) == words


def test_a_file_cut_short_goes_on_where_it_ends_now(logs):
    path = logs.path("2026-05-01.1")
    logs.write("2026-05-01.1", "a", "b", "c")
    assert logs.look(QUIET) == ["a", "b", "c"]
    os.truncate(path, path.stat().st_size - len(HEADER) - 2)
    assert logs.look(QUIET) == []
    logs.write("2026-05-01.1", "d")
    assert logs.look(QUIET) == ["d"]
    os.truncate(path, 0)
    assert logs.look(QUIET) == []
    logs.write("2026-05-01.1", "e")
    assert logs.look(QUIET) == ["e"]


def test_a_directory_may_come_late_vanish_and_return(tmp_path, caplog):
    caplog.set_level("WARNING", "lmgateway")
    logs = Logs(tmp_path / "home" / "server-logs", started=0.0)
    assert logs.look(3) == []
    assert logs.follower.problem.startswith("cannot read the log directory")
    logs.write("2026-05-01.1", "first")
    assert logs.look(QUIET) == ["first"]
    assert logs.follower.problem is None
    logs.directory.rename(tmp_path / "away")
    assert logs.look(3) == []
    assert "server-logs" in logs.follower.problem
    (tmp_path / "away").rename(logs.directory)
    assert (logs.look(QUIET), logs.follower.problem) == ([], None)
    logs.write("2026-05-01.1", "second")
    assert logs.look(QUIET) == ["second"]
    assert len(caplog.records) == 2     # each said once
    for record in caplog.records:
        assert "--log-dir" in record.getMessage()


def test_an_emptied_directory_is_watched_until_something_comes(logs, caplog):
    logs.path("2026-05-01.1").unlink()
    assert logs.look(QUIET) == []
    logs.write("2026-05-01.1", "again")
    assert logs.look(QUIET) == ["again"]
    logs.path("2026-05-01.1").unlink()
    logs.write("2026-05-02.1", "next day")
    assert logs.look(QUIET) == ["2026-05-01.1 > 2026-05-02.1", "next day"]


def test_what_was_written_when_the_monitor_is_stopped_is_told_except_for_half_a_line(logs):
    left, told = ["c\nand more of it", "b"], []

    def wait(seconds):
        logs.write("2026-05-01.1", left.pop())
        if not left:
            logs.write("2026-05-01.1", "torn", end=b"")
        return not left

    logs.monitor.run(lambda events: told.extend(event.data["message"] for event in events), wait)
    assert told == ["b", "c\nand more of it"]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_file_that_cannot_be_read_for_a_while_is_said_once_and_read_later(tmp_path, monkeypatch, said,
                                                                            from_the_start):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    logs = Logs(tmp_path)
    logs.write("2026-05-01.1", "old")
    if not from_the_start:
        assert logs.look() == []
        logs.write("2026-05-01.1", "a")
    monkeypatch.setattr("builtins.open", refused)
    assert logs.look(3) == [] and (from_the_start or "Permission denied" in logs.follower.problem)
    monkeypatch.undo()
    logs.write("2026-05-01.1", "b")
    assert (logs.look(QUIET), logs.follower.problem) == (["b"] if from_the_start else ["a", "b"], None)
    assert len([text for text in said() if "Permission denied" in text]) == 1


def test_an_old_file_that_cannot_be_read_holds_up_the_newer_one_for_a_while_only(logs, monkeypatch):
    old = str(logs.path("2026-05-01.1"))

    def guarded(path, *args, original=open, **kwargs):
        if str(path) == old and refused:
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    refused = True
    monkeypatch.setattr("builtins.open", guarded)
    logs.write("2026-05-01.1", "a")
    logs.write("2026-05-01.2", "b")
    assert logs.look(8) == []
    refused = False
    assert logs.look(0) == [] and logs.follower.position == logs.follower.size
    refused = True
    logs.write("2026-05-01.1", "more")
    assert logs.look(8) == ["a"]        # patience began anew
    assert logs.look(4) == ["2026-05-01.1 > 2026-05-01.2", "b"]


def in_time(function, *args):
    """What a function returns that could wait for ever."""
    found = queue.Queue()
    threading.Thread(target=lambda: found.put(function(*args)), daemon=True).start()
    return found.get(timeout=PATIENCE_S)


ODD = {  # -> what stands at the path of a newer log, and its name
    "a directory": (lambda path: path.mkdir(), "2026-05-03.1"),
    "a directory with a log in it": (lambda path: (path.mkdir(), (path / "x.log").write_bytes(HEADER)), "2026-05-03.1"),
    "a month that is none": (lambda path: path.parent.rename(path.parents[1] / "2026-13") and (
        path.parents[1] / "2026-13" / "2026-12-31.1.log").write_bytes(HEADER + b"x\n"), "2026-12-31.1"),
    "a day that is none": (lambda path: path.write_bytes(HEADER + b"x\n"), "2026-05-32.1"),
    "digits of another script": (lambda path: path.write_bytes(HEADER + b"x\n"), "2026-05-03.\u0663"),
    "a FIFO": (lambda path: os.mkfifo(path), "2026-05-03.1"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "2026-05-03.1"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "2026-05-03.1"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO, and links only for some")
@pytest.mark.parametrize(("make", "name"), ODD.values(), ids=ODD)
def test_only_plain_files_of_real_days_are_logs(logs, make, name):
    make(logs.path(name))
    logs.write("2026-05-01.1", "a")
    assert in_time(logs.look, 13) == ["a"]
    logs.write("2026-05-01.1", "b")
    assert in_time(logs.look, QUIET) == ["b"] and logs.follower.problem is None
    assert in_time(Logs(logs.directory).look) == []
    assert [log_file.day for log_file in lmgateway.list_logs(str(logs.directory))] == ["2026-05-01"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO")
def test_a_log_that_becomes_a_fifo_stops_nothing_and_is_said(logs, caplog):
    path = logs.path("2026-05-01.1")
    path.rename(path.with_suffix(".away"))
    os.mkfifo(path)
    assert in_time(logs.look, 3) == [] and "no plain file" in logs.follower.problem
    path.unlink()
    path.with_suffix(".away").rename(path)
    logs.write("2026-05-01.1", "a")
    assert (in_time(logs.look, 3), logs.follower.problem) == (["a"], None)
    assert len([record for record in caplog.records if "no plain file" in record.getMessage()]) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO")
def test_what_lm_studios_home_holds_is_read_only_from_plain_files(tmp_path):
    (tmp_path / ".internal").mkdir()
    for name in (".lmstudio-home-pointer", ".internal/http-server-config.json", "x.log"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "y.log").write_bytes(HEADER)
    assert in_time(lmgateway.find_home, tmp_path) == tmp_path / ".lmstudio"
    with pytest.raises(OSError, match="no plain file"):
        lmgateway.read_settings(tmp_path)
    assert lmgateway.saved_logs([str(tmp_path)]) == [str(tmp_path / "y.log")]


def test_a_newest_log_of_the_future_is_said_while_an_older_one_grows(logs, caplog):
    logs.write("2099-01-01.1", "x")
    assert logs.look(3)[-1] == "x" and logs.follower.file.day == "2099-01-01"
    assert logs.follower.problem is None
    os.utime(logs.path("2099-01-01.1"), (1e9, 1e9))
    logs.write("2026-05-01.1", "a")
    logs.look(5)
    assert re.search("2099-01-01.1.log lies in the future .*2026-05-01.1.log", logs.follower.problem)
    logs.path("2026-05-01.1").unlink()
    logs.look(5)
    assert logs.follower.problem is None
    assert len([record for record in caplog.records if "future" in record.getMessage()]) == 1


def test_no_file_is_held_open_between_reads(logs):
    logs.write("2026-05-01.1", "a")
    assert logs.look(QUIET) == ["a"]
    if os.path.isdir("/proc/self/fd"):
        held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert not [path for path in held if path.startswith(str(logs.directory))]


def test_a_backlog_is_read_in_pieces_that_grow_with_it_in_bounded_memory(logs):
    with logs.path("2026-05-01.1").open("ab") as file:
        for _ in range(20):
            file.write((HEADER + b"words of a user " * 1000 + b"\n") * 60)
    told, pauses = [], []

    def wait(seconds):
        pauses.append(seconds)
        return logs.follower.behind == 0

    with tracing() as peak:
        logs.monitor.run(lambda events: told.extend(event.name for event in events), wait)
        assert peak() < 20_000_000
    assert len(told) == 1200 and len(pauses) < 19_200_000 / logs.follower.PIECE / 4
    assert logs.follower._piece == logs.follower.PIECE       # and back, once there is none


def test_a_piece_of_the_log_is_as_large_as_a_stream_may_be_late(tmp_path):
    follower, sizes = lmgateway.Follower(str(tmp_path)), []
    follower.size = 10_000_000
    assert follower.LATE_S <= sys.getswitchinterval() / 2
    for spent in (0.1, 0.4, 0.7, 2, 2, 2, *[0] * 9):
        follower.pace(spent * follower.LATE_S)
        sizes.append(follower._piece // 1024)
    assert sizes == [16, 32, 32, 16, 8, 8, 16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    follower.size = 20_000
    follower.pace(0.0)
    assert follower._piece == 20_000


def counting(name, function, calls):
    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)
    return counted


def test_the_pace_of_looking_follows_the_log(logs):
    logs.write("2026-05-01.1", "a")
    assert logs.monitor.step()[1] == logs.monitor.YIELD_S       # news: at once again
    assert logs.monitor.step()[1] <= 0.02           # while bytes flow
    logs.clock += 60
    logs.look(1)
    assert 0.02 < logs.monitor.step()[1] <= 0.2     # after a long quiet


def test_the_home_directory_is_found_as_lm_studio_finds_it(tmp_path):
    def found():
        return lmgateway.find_home(home=tmp_path)

    assert found() == tmp_path / ".lmstudio"
    (tmp_path / ".cache" / "lm-studio").mkdir(parents=True)
    assert found() == tmp_path / ".cache" / "lm-studio"
    for pointer, home in ((" /else/where \n", Path("/else/where")),
                          (" \n", tmp_path / ".cache" / "lm-studio"),
                          ("/a\0b", tmp_path / ".cache" / "lm-studio")):
        (tmp_path / ".lmstudio-home-pointer").write_text(pointer, encoding="utf-8")
        assert found() == home
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", ".lmstudio-home-pointer"]     # nothing is written


def test_the_log_directory_is_the_one_with_the_newest_log(tmp_path):
    app, bionic = tmp_path / "server-logs", tmp_path / "apps" / "bionic" / "server-logs"
    assert lmgateway.find_log_dir(tmp_path) == str(app)
    Logs(bionic).write("2026-05-01.1", "x")
    assert lmgateway.find_log_dir(tmp_path) == str(bionic)
    Logs(app).write("2026-05-01.1", "x")
    os.utime(app / "2026-05" / "2026-05-01.1.log", (2e9, 2e9))
    assert lmgateway.find_log_dir(tmp_path) == str(app)


@pytest.mark.parametrize("log_path", [path for path in SAMPLES if path.stem in (
    "g1-stream-partial-cache", "g2-nonstream-cache-hit", "g3-stream-split-lines", "traps",
    "two-models-at-once")],
    ids=lambda path: path.stem)
def test_a_growing_file_gives_the_samples_events_while_it_grows(utc, tmp_path, log_path):
    """Real threads and a real clock: entry after entry, as LM Studio writes them."""
    directory = tmp_path / "2026-05"
    directory.mkdir()
    path = directory / "2026-05-01.1.log"
    path.write_bytes(b"")
    monitor, news, stop = lmgateway.Monitor(lmgateway.Follower(str(tmp_path))), queue.Queue(), threading.Event()
    thread = threading.Thread(target=monitor.run,
                              args=(lambda events: list(map(news.put, events)), stop.wait))
    thread.start()
    try:
        while monitor.follower.file is None:
            assert not stop.wait(0.001)
        expected, events = expected_of(log_path), []
        for entry in re.split(rb"(?m)^(?=\[2)", log_path.read_bytes()):
            with path.open("ab", 0) as file:
                file.write(entry[:len(entry) // 2])
                file.write(entry[len(entry) // 2:])
        while sum(event.name == "lmstudio_log"
                  for event in events) < sum(row["event"] == "lmstudio_log" for row in expected):
            events.append(news.get(timeout=PATIENCE_S))
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    events += list(news.queue)
    assert unmet(expected, [event for event in events if event.name]) == []


def test_an_event_is_there_within_milliseconds_of_the_write(tmp_path):
    path = tmp_path / "2026-05" / "2026-05-01.1.log"
    path.parent.mkdir()
    path.write_bytes(HEADER + b"old\n")
    monitor, news, stop = lmgateway.Monitor(lmgateway.Follower(str(tmp_path))), queue.Queue(), threading.Event()
    thread = threading.Thread(target=monitor.run, args=(
        lambda events: [news.put(time.perf_counter()) for event in events if event.name == "lmstudio_log"],
        stop.wait))
    thread.start()
    try:
        while monitor.follower.file is None:
            assert not stop.wait(0.001)
        delays = [1.0] * 30
        while sorted(delays[-30:])[15] >= 0.025:    # a machine that is busy gets more tries
            assert len(delays) < 500, sorted(delays)
            written = time.perf_counter()
            with path.open("ab", 0) as file:
                file.write(HEADER + b"[m] Prompt processing progress: 1.0%\n")
            delays.append(news.get(timeout=PATIENCE_S) - written)
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_room_of_the_logs_is_measured_and_warned_of(tmp_path, monkeypatch):
    today = time.strftime("%Y-%m-%d")
    for name in (f"{today}.1.log", f"{today}.10.log"):
        path = tmp_path / today[:7] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 5000)
    (tmp_path / today[:7] / "other.txt").write_bytes(b"x" * 99)
    facts = lmgateway.LogVolume(str(tmp_path), 9000).facts()
    assert (facts["directoryBytes"], facts["growthBytesPerDay"]) == (10000, 10000)
    assert "take 10.0 kB" in facts["warnings"][0] and "--prune" in facts["warnings"][0]
    assert lmgateway.LogVolume(str(tmp_path), 0).facts()["warnings"] == facts["warnings"][1:]
    with monkeypatch.context() as growing:
        growing.setattr(lmgateway.LogVolume, "LOW_BYTES", 0)
        growing.setattr(lmgateway, "daily_growth", lambda sizes, today: 10**18)     # full within three days
        assert "free on the disk" in lmgateway.LogVolume(str(tmp_path), 0).facts()["warnings"][0]
    assert lmgateway.LogVolume(str(tmp_path / "none"), 1).facts() == {
        "directoryBytes": None, "growthBytesPerDay": None, "freeBytes": None, "warnings": []}
    monkeypatch.setattr(lmgateway.LogVolume, "LOW_BYTES", 10**18)
    volume = lmgateway.LogVolume(str(tmp_path), 0)
    assert "free on the disk" in volume.facts()["warnings"][0]
    monkeypatch.setattr(lmgateway.LogVolume, "LOW_BYTES", 0)
    assert volume.facts()["warnings"] and not volume.facts(max_age_s=0)["warnings"]


@pytest.mark.parametrize(("sizes", "growth"), [
    ({}, 0), ({"2026-09-10": 70}, 70), ({"2026-09-09": 50, "2026-09-10": 20}, 35),
    ({"2026-09-04": 70, "2026-09-10": 70}, 20),
    ({"2026-09-03": 10**9, "2026-09-10": 7}, 7), ({"2026-09-11": 10**9}, 0),
    ({"2026-09-31": 5, "2026-09-09": 4}, 2)])
def test_growth_is_bytes_a_day_over_the_last_week(sizes, growth):
    assert lmgateway.daily_growth(sizes, datetime.date(2026, 9, 10)) == growth


@pytest.mark.parametrize(("count", "shown"),
                         [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"),
                                              (4 * 10**11, "400.0 GB"), (5 * 10**15, "5000.0 TB")])
def test_sizes_are_shown_as_disks_are_sold(count, shown):
    assert lmgateway.shown_bytes(count) == shown


# === 6. UPSTREAM =============================================================


# A scripted LM Studio, a gateway before it, a client that speaks bytes

class Peer:
    """One request as the scripted LM Studio has it, and the connection to answer on."""

    def __init__(self, sock, head, body):
        self.sock, self.body = sock, body
        lines = head.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.headers = [tuple(line.split(": ", 1)) for line in lines[1:]]

    def header(self, name):
        return next((value for key, value in self.headers if key.lower() == name), None)

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_for_end(self):
        """Seconds until the other side closes the connection."""
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            self.sock.settimeout(PATIENCE_S)
            assert self.sock.recv(1) == b""
        return time.monotonic() - started


class Studio:
    """A server that plays script(peer) for each request and remembers what it was asked.

    It is strict: what is not one well-formed request after the other lands in faults."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset()
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self):
        self.peers, self.faults, self.connections = [], [], 0
        self.script = lambda peer: peer.send(plain(b'{"ok": true}'))

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError), sock:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    piece = sock.recv(65536)
                    if not piece:
                        self.faults += [data] if data else []
                        return
                    data += piece
                head, data = data.split(b"\r\n\r\n", 1)
                proper = re.fullmatch(
                    rb"[A-Z]+ /[!-~]* HTTP/1\.1(\r\n[\w.-]+: ?[^\x00-\x08\x0a-\x1f\x7f]*)+", head)
                if not proper or b"\r\nhost: " not in head.lower():
                    self.faults.append(head)
                length = int((re.findall(rb"(?i)\r\ncontent-length: (\d+)", head) or [0])[0])
                body = [data]
                have = len(data)
                while have < length:
                    body.append(sock.recv(1 << 20))
                    have += len(body[-1])
                data = b"".join(body)
                peer, data = Peer(sock, head, data[:length]), data[length:]
                self.peers.append(peer)
                self.script(peer)
                if peer.header("connection") == "close":
                    return

    def close(self):
        self.listener.close()


def plain(body, status="200 OK", *headers, kind="application/json; charset=utf-8"):
    """An answer of LM Studio's with a length."""
    lines = [f"HTTP/1.1 {status}", "X-Powered-By: Express", f"Content-Type: {kind}",
             f"Content-Length: {len(body)}",
             *headers, "Date: Mon, 17 Nov 2025 10:59:23 GMT", "Connection: keep-alive",
             "Keep-Alive: timeout=5", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nX-Powered-By: Express\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
               b"Date: Mon, 17 Nov 2025 10:59:23 GMT\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n")


def framed(*pieces, end=True):
    """Pieces as chunks on the wire."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece)
                    for piece in pieces) + (b"0\r\n\r\n" if end else b"")


LOOK_S = 0.03   # of a Front, which looks less often in the program


class Front:
    """A running gateway, and what its tests ask of it."""

    def __init__(self, upstream, tmp_path, monitor=None, hub=None, **options):
        options = {"keys_file": str(tmp_path / "no-keys.json"), "host": "127.0.0.1", "port": 0, **options}
        self.config = lmgateway.Config(upstream=upstream, **options)
        self.hub = hub or lmgateway.Hub()
        upstream = lmgateway.Upstream(self.config.upstream, self.config.upstream_token)
        self.gateway = lmgateway.Gateway(self.config, self.hub, upstream, monitor)
        self.server = lmgateway.open_server(self.gateway, lmgateway.tls_context(self.gateway.config))
        self.port, self.server.LOOK_S = self.server.port, LOOK_S
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.003,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.finish_requests(PATIENCE_S)
        self.server.server_close()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    @property
    def watched(self):
        """Connections whose client must not leave unnoticed."""
        return [connection for connection in self.server._all() if connection.leave]

    def events(self, mark, *names, count=1):
        """The data of the events of these names after the SEQ mark, once there are count of them."""
        deadline = time.monotonic() + PATIENCE_S
        with self.hub.listening(str(mark)) as listener:
            found = []
            while len(found) < count and time.monotonic() < deadline:
                self.hub.wait(listener, 0.5)
                found += data_of(self.hub.read(listener, names)[0])
            while frames := self.hub.read(listener, names)[0]:
                found += data_of(frames)
        assert len(found) == count, found
        return found


def dial(port):
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def rest_of(sock):
    """What comes until the connection ends."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def read_until(sock, mark, data=b""):
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, f"ended before {mark!r}: {data!r}"
        data += piece
    return data


def talk(port, *pieces):
    """Everything that is answered to these bytes until the connection ends."""
    with dial(port) as sock:
        for piece in pieces:
            sock.sendall(piece)
        return rest_of(sock)


def request(line="GET /v1/models", body=b"", *headers, close=True):
    """The bytes of a well-formed request; method and target in line."""
    lines = [f"{line} HTTP/1.1", "Host: localhost", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def split_answer(data):
    """(status line, [(name, value)], what follows)."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    return lines[0], [tuple(line.split(": ", 1)) for line in lines[1:]], body


def status_of(data):
    return int(data.split(b" ", 2)[1]) if data else None


def error_of(data):
    return json.loads(split_answer(data)[2])["error"]


POST_CHAT = "POST /v1/chat/completions"
HOPS = ("connection", "keep-alive", "transfer-encoding")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    studio = Studio()
    front = Front(studio.url, tmp_path_factory.mktemp("front"))
    yield studio, front
    front.close()
    studio.close()


@pytest.fixture
def studio(shared):
    shared[0].reset()
    yield shared[0]
    assert shared[0].faults == []


@pytest.fixture
def front(shared, studio, caplog):
    """The gateway that most tests share; it must never have had a fault of its own."""
    with caplog.at_level(logging.DEBUG):
        lmgateway.log.propagate = True
        yield shared[1]
    assert "a fault in lmgateway" not in caplog.text
    assert not shared[1].hub._requests.running
    until(lambda: not shared[1].watched)


@pytest.fixture
def fronts(studio, tmp_path):
    """Makes gateways with options of their own."""
    made = []

    def make(upstream=None, **options):
        made.append(Front(upstream or studio.url, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- what LM Studio is asked

def test_requests_reach_lm_studio_as_they_are(front, studio):
    sent = request("PATCH /api/x%2Fy;z/.../?a=1&&b=%20&a=2", b"\x00\xff\r\n", "X-Mixed-CASE: a",
                   "x-mixed-case:  b ",
                   "User-Agent:", "Accept-Encoding: gzip, br", "X-Latin: \xe9", "Cookie: a=1;b=2",
                   "Content-Type: multipart/form-data; boundary=x")
    talk(front.port, sent)
    (peer,) = studio.peers
    assert peer.line == "PATCH /api/x%2Fy;z/.../?a=1&&b=%20&a=2 HTTP/1.1"
    assert peer.body == b"\x00\xff\r\n"
    assert peer.headers == [
        ("Host", f"127.0.0.1:{studio.port}"), ("X-Mixed-CASE", "a"), ("x-mixed-case", "b"),
        ("User-Agent", ""),
        ("Accept-Encoding", "gzip, br"), ("X-Latin", "\xe9"), ("Cookie", "a=1;b=2"),
        ("Content-Type", "multipart/form-data; boundary=x"), ("Content-Length", "4")]


def test_hop_by_hop_headers_and_credentials_stop_here(front, studio):
    talk(front.port, request("GET /v1/models", b"", "Authorization: Bearer k", "X-API-Key: k", "TE: trailers",
                             "Keep-Alive: 5",
                             "Proxy-Authorization: x", "Proxy-Connection: x", "Upgrade: h2c",
                             "HTTP2-Settings: x",
                             "Connection: Upgrade, HTTP2-Settings", "Connection: X-Own", "X-Own: 1",
                             "Trailer: x", "X-Kept: 1",
                             "Cookie: lmgateway_session=abc; a=1", "Cookie: lmgateway_session=abc"))
    assert studio.peers[0].headers == [("Host", f"127.0.0.1:{studio.port}"), ("X-Kept", "1"),
                                       ("Cookie", "a=1")]
    for name in ("Upgrade", "TE", "Trailer", "Keep-Alive", "Proxy-Connection"):     # without Connection, too
        sent = f"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n{name}: x\r\n\r\n"
        talk(front.port, sent.encode() + request())
        assert [row[0] for row in studio.peers[-2].headers] == ["Host"]


@pytest.mark.parametrize("size", [1, 2, 7, 10**6])
def test_chunked_requests_arrive_whole(front, studio, size):
    body = bytes(range(256)) * 3
    data = request("POST /v1/audio", b"", "Transfer-Encoding: Chunked") + framed(body[:5], body[5:])
    talk(front.port, *(data[at:at + size] for at in range(0, len(data), size)))
    (peer,) = studio.peers
    assert peer.body == body and ("Content-Length", str(len(body))) in peer.headers
    assert peer.header("transfer-encoding") is None and peer.header("content-type") is None


def test_a_large_body_passes_and_is_not_copied_over_and_over(front, studio):
    body = os.urandom(1 << 20) * 40
    with tracing() as peak:
        assert status_of(talk(front.port, request("POST /v1/files", b"", f"Content-Length: {len(body)}"),
                              body)) == 200
    assert studio.peers[0].body == body
    assert peak() < 3.5 * len(body)     # what this test holds of it itself is two and a half times the body


def test_a_large_body_is_not_copied():
    body, pair = os.urandom(1 << 20) * 8, socket.socketpair()
    with pair[0], pair[1], tracing() as peak:
        threading.Thread(target=pair[1].sendall, args=(body,), daemon=True).start()
        lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        assert lmgateway.Wire(pair[0], lmgateway.BodyMemory(len(body))).body(
            lmgateway.parse_head(lines), len(body)) == body
        assert peak() < 1.3 * len(body)


def test_a_large_body_is_sent_as_it_lies_there():
    body, pair = os.urandom(1 << 20) * 8, socket.socketpair()
    call = lmgateway.Call(urllib.request.Request("http://x"), "POST", "/", [("Host", "x")], body)

    def read_and_answer():
        size = 0
        while size < len(body):
            size += len(pair[1].recv(65536))
        pair[1].sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with pair[0], pair[1], tracing() as peak:
        threading.Thread(target=read_and_answer, daemon=True).start()
        call.use(pair[0])
        call.send()
        assert lmgateway.Answer(call).begin().status == 204
        assert peak() < len(body) // 10


@contextlib.contextmanager
def tracing():
    """Yields a function that gives the most bytes that were in use."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("target", "seen"), [
    ("/chat/completions?x=1", "/v1/chat/completions?x=1"), ("/completions", "/v1/completions"),
    ("/models", "/v1/models"),
    ("/models/a%2Fb", "/v1/models/a%2Fb"), ("/embeddings/", "/v1/embeddings/"),
    ("/responses", "/v1/responses"),
    ("/messages?beta=true", "/v1/messages?beta=true"), ("/messages/count_tokens",
                                                        "/v1/messages/count_tokens"),
    ("/v1/models", "/v1/models"), ("/modelsx", "/modelsx"), ("//models", "//models"),
    ("/models/?", "/v1/models/?"),
    ("//evil.example/v1/models", "//evil.example/v1/models"), ("/@evil.example/", "/@evil.example/"),
    ("/http://evil.example/", "/http://evil.example/"), ("/debug/nothing", "/debug/nothing"),
    ("/v1/x?api_key=1", "/v1/x?api_key=1")])
def test_targets(front, studio, target, seen):
    for method in ("GET", "HEAD", "POST"):
        talk(front.port, request(f"{method} {target}"))
    assert [peer.line for peer in studio.peers] == [f"{method} {seen} HTTP/1.1"
                                                    for method in ("GET", "HEAD", "POST")]
    assert all(peer.header("host") == f"127.0.0.1:{studio.port}" for peer in studio.peers)


def test_expect_100_continue_is_answered_before_the_body(front, studio):
    with dial(front.port) as sock:
        sock.sendall(request("POST /v1/x", b"", "Expect: 100-Continue", "Content-Length: 2"))
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ok")
        assert status_of(rest_of(sock)) == 200
    assert studio.peers[0].body == b"ok" and studio.peers[0].header("expect") is None


def test_expect_100_continue_is_not_answered_where_none_is_to_come(front):
    old = request("POST /v1/x", b"", "Expect: 100-continue", "Content-Length: 2").replace(b"/1.1", b"/1.0")
    with dial(front.port) as sock:
        sock.sendall(old)
        assert not lmgateway.select.select([sock], [], [], 0.05)[0]
        sock.sendall(b"ok")
        assert status_of(rest_of(sock)) == 200
    assert b"100 Continue" not in talk(front.port, request("POST /v1/x", b"ok", "Expect: 100-continue"))
    assert b"100 Continue" not in talk(front.port, request("GET /v1/x", b"", "Expect: 100-continue"))
    assert status_of(talk(front.port, request("POST /v1/x", b"x", "Expect: 200-ok"))) == 417


@pytest.mark.parametrize("headers", [["Content-Length: 1001"], ["Transfer-Encoding: chunked"]],
                         ids=["length", "chunked"])
@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]], ids=["", "expect"])
def test_a_body_beyond_the_limit_is_refused_before_it_is_read(fronts, studio, headers, expect):
    front, body = fronts(max_body=1000), b"x" * 1001
    pieces = [request("POST /v1/x", b"", *headers, *expect)]
    if "chunked" in headers[0]:
        pieces += [b"3e9\r\n"]      # the size alone says it
        expect = expect and ["unknown until then"]
    answer = talk(front.port, *pieces) if expect else talk(front.port, *pieces, body)
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") if "chunked" in headers[0] else answer
    assert (status_of(answer), error_of(answer)["code"]) == (413, "body_too_large")
    assert "MAX_BODY_BYTES" in error_of(answer)["message"] and b"Connection: close" in answer
    assert status_of(talk(front.port, request("POST /v1/x", body[:1000]))) == 200
    assert len(studio.peers) == 1


@pytest.mark.parametrize("line", ["POST /login", "GET /health", "GET /debug/status"])
def test_pages_of_ours_take_no_large_body(front, line):
    limit = lmgateway.OWN_BODY
    assert limit <= 4096
    answer = talk(front.port, request(line, b"", f"Content-Length: {limit + 1}"))
    assert (status_of(answer), error_of(answer)["code"]) == (413, "body_too_large")
    assert "MAX_BODY_BYTES" not in error_of(answer)["message"]
    assert status_of(talk(front.port, request(line, b" " * limit))) != 413


def test_a_client_that_sends_on_can_read_why_it_was_refused(fronts):
    front = fronts(max_body=1000)
    size = 20_000_000
    with dial(front.port) as sock:
        sock.sendall(request("POST /v1/x", b"", f"Content-Length: {size}"))
        sock.sendall(b"x" * size)
        assert status_of(rest_of(sock)) == 413


# --- what the client gets

ANSWERS = {     # what LM Studio sends, and what a client gets of it, hop-by-hop headers apart
    "length": plain(b"\x00binary\r\n\xff"),
    "nothing": plain(b""),
    "reason and repeats": plain(b"x", "299 Own  Words \xe9", "Set-Cookie: a=1", "set-cookie: b=2",
                                "Set-Cookie: c=3", "X-EMPTY:",
                                "Server: lms/1"),
    "no reason": plain(b"x").replace(b"200 OK", b"200 "),
    "not even a blank": plain(b"x").replace(b"200 OK", b"200"),
    "redirect": plain(b"x", "302 Found", "Location: http://elsewhere.example/"),
    "client error": plain(b'{"error":"x"}', "404 Not Found"),
    "server error": plain(b"oops", "500 Internal Server Error", kind="text/html"),
    "encoded": plain(gzip.compress(b"x" * 1000), "200 OK", "Content-Encoding: gzip"),
    "no date": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
    "chunked": STREAM_HEAD + framed(b"data: 1\n\n", b"data: 2\n\n"),
    "chunked with trailers": STREAM_HEAD + framed(b"a", end=False) + b"0\r\nX-T: 1\r\n\r\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + plain(b"x"),
    "no content": b"HTTP/1.1 204 No Content\r\nETag: x\r\n\r\n",
    "not modified, no length": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 100\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX-Old: a\r\n  b\r\nContent-Length: 1\r\n\r\nx",
}


@pytest.mark.parametrize("method", ["GET", "HEAD", POST_CHAT.split()[0]])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_answers_come_back_as_lm_studio_sent_them(front, studio, answer, method):
    head, _, body = answer.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    if method == "HEAD":
        answer = answer[:len(answer) - len(body)]
    studio.script = lambda peer: peer.send(answer)
    target = "/v1/chat/completions" if method == "POST" else "/v1/models"
    line, headers, got = split_answer(talk(front.port, request(f"{method} {target}", b"{}"
                                                               if method == "POST" else b"")))
    wanted = [tuple(re.split(": ?", row, maxsplit=1))
              for row in head.decode("latin-1").replace("\r\n ", "").split("\r\n")[1:]]
    assert line == ("HTTP/1.1 " + head.decode("latin-1").split("\r\n")[0]).ljust(13 if "200" in line else 0)
    assert [row for row in headers if row[0].lower() not in HOPS] == [row for row in wanted
                                                                      if row[0].lower() not in HOPS]
    assert ("Connection", "close") in headers
    chunked = b"chunked" in head and method != "HEAD"
    assert (("Transfer-Encoding", "chunked") in headers) == chunked
    assert (unchunked(got) if chunked else got) == (b"" if method == "HEAD" else unchunked(body) if chunked
                                                    else body)


def test_hop_by_hop_and_cors_headers_of_an_answer_stop_here(front, studio):
    studio.script = lambda peer: peer.send(plain(
        b"x", "200 OK", "Access-Control-Allow-Origin: *", "access-control-allow-headers: *", "X-Kept: 1",
        "Connection: X-One", "X-One: 1", "connection: X-Two", "X-Two: 2", "Proxy-Authenticate: Basic",
        "Proxy-Connection: close", "TE: trailers", "Trailer: X", "Upgrade: h2c"))
    assert split_answer(talk(front.port, request()))[1] == [
        ("X-Powered-By", "Express"), ("Content-Type", "application/json; charset=utf-8"),
        ("Content-Length", "1"), ("X-Kept", "1"), ("Date", "Mon, 17 Nov 2025 10:59:23 GMT"),
        ("Connection", "close")]


def test_only_a_young_connection_is_used_again_and_for_a_prompt_only_one_that_has_proven_itself(
        fronts, studio, monkeypatch):
    front = fronts()

    def connections(line):
        assert status_of(talk(front.port, request(line, b"{}" if "POST" in line else b""))) == 200
        return studio.connections

    monkeypatch.setattr(lmgateway, "MATURE_S", PATIENCE_S)
    assert [connections("GET /v1/models"), connections(POST_CHAT)] == [1, 2]    # the server may close it yet
    monkeypatch.setattr(lmgateway, "MATURE_S", 0)
    assert connections(POST_CHAT) == 2
    monkeypatch.setattr(lmgateway, "REUSE_S", -1)
    assert [connections("GET /v1/models"), connections("GET /v1/models")] == [3, 4]


@pytest.mark.parametrize("said", ["Connection: close", "Connection: x\r\nConnection: close"])
def test_a_connection_that_lm_studio_does_not_keep_is_not_used_again(fronts, studio, said):
    studio.script = lambda peer: peer.send(plain(b"x").replace(b"Connection: keep-alive", said.encode()))
    front = fronts()
    for _ in range(3):
        assert status_of(talk(front.port, request())) == 200
    assert (len(studio.peers), studio.connections) == (3, 3)


def test_a_proxy_of_the_environment_is_not_asked(fronts, studio, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    front = fronts()
    assert status_of(talk(front.port, request())) == status_of(talk(front.port, request("GET /ready"))) == 200


@pytest.mark.parametrize(("line", "head", "pieces", "end"), [
    (POST_CHAT, STREAM_HEAD, [framed(b"data: %d\n\n" % number, end=False) for number in range(5)], b"0\r\n\r\n"),
    ("GET /v1/models", plain(b"abcd")[:-4], [b"a", b"b", b"c"], b"d")], ids=["chunks", "length"])
def test_each_piece_leaves_when_it_arrives(front, studio, line, head, pieces, end):
    turn = threading.Semaphore(0)

    def script(peer):
        peer.send(head)
        for piece in (*pieces, end):
            turn.acquire(timeout=PATIENCE_S)
            peer.send(piece)

    studio.script = script
    with dial(front.port) as sock:
        sock.sendall(request(line, b'{"stream":true}'))
        assert split_answer(read_until(sock, b"\r\n\r\n"))[2] == b""     # the head comes before the first piece
        for piece in pieces:
            turn.release()
            assert sock.recv(65536) == piece
        turn.release()
        assert rest_of(sock) == end


def test_a_large_answer_passes_whole_and_in_little_memory(front, studio):
    piece, count = os.urandom(1 << 20), 60
    head = plain(b"").replace(b"Length: 0", b"Length: %d" % (len(piece) * count))
    studio.script = lambda peer: peer.send(head, *[piece] * count)
    digest, size = hashlib.sha256(), 0
    with tracing() as peak, dial(front.port) as sock:
        sock.sendall(request("GET /v1/files/1"))
        data = split_answer(read_until(sock, b"\r\n\r\n"))[2] or sock.recv(1 << 20)
        while data:
            digest.update(data)
            size += len(data)
            data = sock.recv(1 << 20)
    assert size == len(piece) * count and digest.digest() == hashlib.sha256(piece * count).digest()
    assert peak() < 16 << 20


@pytest.mark.parametrize("keep", [False, True])
def test_http_1_0_clients_get_what_they_can_read(front, studio, keep):
    sent = b"GET /v1/models HTTP/1.0\r\n" + (b"Connection: keep-alive\r\n" if keep else b"") + b"\r\n"
    with dial(front.port) as sock:
        sock.sendall(sent)
        _, headers, body = split_answer(read_until(sock, b"true}"))
        assert ("Connection", "keep-alive" if keep else "close") in headers and body == b'{"ok": true}'
        if keep:
            sock.sendall(sent)
            assert status_of(read_until(sock, b"true}")) == 200
        else:
            assert sock.recv(1) == b""
    studio.script = lambda peer: peer.send(STREAM_HEAD + framed(b"a", b"b"))
    _, headers, body = split_answer(talk(front.port, sent))
    assert body == b"ab" and "transfer-encoding" not in [name.lower() for name, _ in headers]
    assert studio.peers[0].line.endswith("HTTP/1.1") and studio.peers[0].header("host")


def test_an_answer_that_ends_with_its_connection_is_chunked_for_the_client(front, studio):
    def script(peer):
        peer.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"abc")
        peer.sock.shutdown(socket.SHUT_WR)

    studio.script = script
    assert re.fullmatch(rb"(?:[1-3]\r\n[abc]+\r\n)+0\r\n\r\n", split_answer(talk(front.port, request()))[2])


@pytest.mark.parametrize(("method", "end"), [("GET", b"true}"), ("HEAD", b"\r\n\r\n")])
def test_connections_are_kept_on_both_sides(front, studio, method, end):
    answer = plain(b'{"ok": true}')
    studio.script = lambda peer: peer.send(answer if method == "GET" else answer.partition(b"{")[0])
    with dial(front.port) as sock:
        for _ in range(5):
            sock.sendall(request(f"{method} /v1/models", close=False))
            assert status_of(read_until(sock, end)) == 200
    assert len(studio.peers) == 5 and studio.connections <= 1


def test_an_answer_with_both_framings_leaves_with_one(front, studio):
    head = STREAM_HEAD.replace(b"Date", b"Content-Length: 3\r\nDate")
    studio.script = lambda peer: peer.send(head + framed(b"ab"))
    answer = talk(front.port, request())
    assert b"content-length" not in answer.lower() and unchunked(split_answer(answer)[2]) == b"ab"


FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
SURPLUS = {"length": plain(b"x"), "nothing": plain(b""), "chunked": STREAM_HEAD + framed(b"x"),
           "no content": b"HTTP/1.1 204 No Content\r\n\r\n"}


@pytest.mark.parametrize("answer", SURPLUS.values(), ids=SURPLUS)
def test_what_follows_an_answer_reaches_nobody(fronts, studio, answer, monkeypatch):
    monkeypatch.setattr(lmgateway, "MATURE_S", 0)
    front, mine = fronts(), plain(b"mine")
    studio.script = lambda peer: peer.send(mine if "mine" in peer.line else answer + FORGED)
    for _ in range(2):
        assert b"forged" not in talk(front.port, request("GET /v1/x"))
        assert talk(front.port, request("GET /v1/mine")).endswith(b"\r\n\r\nmine")
    assert studio.connections == 3      # one that brought more than its answer is not used again


def test_a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(fronts, studio, monkeypatch):
    monkeypatch.setattr(lmgateway, "MATURE_S", 0)
    front = fronts()
    studio.script = lambda peer: (peer.send(plain(b"x" * 10_000)[:-5000]), peer.wait_for_end())
    assert ask(front, "GET /ready")[0] == 200
    studio.script = lambda peer: peer.send(plain(b"mine"))
    assert ask(front, POST_CHAT, body=b"{}")[2] == b"mine" and studio.connections == 2


def test_each_request_to_lm_studio_goes_through_urllib(fronts, studio, monkeypatch):
    opened, opens = [], urllib.request.OpenerDirector.open

    def notes(opener, call, *rest):
        opened.append(f"{call.get_method()} {call.selector}")
        return opens(opener, call, *rest)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", notes)
    front = fronts(prefill_comments=True)
    for line, body in (POST_CHAT, b"{}"), (POST_CHAT, b'{"stream": true}'), ("GET /ready", b""), ("GET /debug/models", b""):
        ask(front, line, body=body)
    with pytest.raises(lmgateway.UpstreamError):
        front.gateway.upstream.upgrade("/llm")
    asked = [peer.line.rpartition(" ")[0] for peer in studio.peers]
    assert {"GET /lmstudio-greeting", "GET /api/v1/models", "GET /llm"} < set(asked) and asked.count(POST_CHAT) == 2
    assert not Counter(asked) - Counter(opened)


def test_only_so_many_idle_connections_are_kept():
    idle, pairs = lmgateway.KeptConnections("http://127.0.0.1:9"), [socket.socketpair() for _ in range(70)]
    for mine, _ in pairs:
        idle.put(mine, True, None)
    assert [mine.fileno() < 0 for mine, _ in pairs] == [True] * 6 + [False] * 64
    for pair in pairs:
        pair[0].close()
        pair[1].close()


def test_localhost_is_asked_over_ipv4_where_lm_studio_listens(fronts, studio, monkeypatch):
    front, asked, find = fronts(f"http://localhost:{studio.port}"), [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo",
                        lambda host, *rest, **how: asked.append(host) or find(host, *rest, **how))
    assert ask(front, "GET /v1/models")[0] == 200
    assert set(asked) == {"127.0.0.1"} and studio.peers[0].header("host") == f"localhost:{studio.port}"


def test_pipelined_requests_are_answered_in_order(front, studio):
    studio.script = lambda peer: peer.send(plain(peer.line.encode()))
    data = b"".join(request(f"GET /v1/{number}", close=False) for number in range(9)) + request("GET /v1/9")
    assert re.findall(rb"GET /v1/(\d)", talk(front.port, data)) == [b"%d" % number for number in range(10)]


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n"
                                     + framed(b"hello")], ids=["length", "chunked"])
def test_what_follows_a_body_is_the_next_request(front, studio, framing):
    sent = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n" + framing
    answer = talk(front.port, sent + sent + request("GET /v1/last"))
    assert len(re.findall(rb"HTTP/1\.1 200 OK", answer)) == 3
    assert [(peer.line.split()[1], peer.body) for peer in studio.peers] == [
        ("/v1/x", b"hello"), ("/v1/x", b"hello"), ("/v1/last", b"")]


def test_a_kept_connection_that_lm_studio_closed_costs_no_request(front, studio):
    closed = threading.Event()

    def script(peer):
        peer.send(plain(b"one"))
        if len(studio.peers) == 1:
            peer.sock.shutdown(socket.SHUT_RDWR)
            closed.set()

    studio.script = script
    for _ in range(3):
        assert talk(front.port, request(POST_CHAT, b"{}")).endswith(b"one")
        assert closed.wait(PATIENCE_S)
    assert len(studio.peers) == 3


@pytest.mark.parametrize(("method", "tries"), [("GET", 2), ("POST", 1)])
def test_only_what_may_be_repeated_is_tried_again_when_a_kept_connection_dies(front, studio, method, tries):
    calls = []

    def script(peer):
        calls.append(peer)
        if len(calls) == 3:
            peer.reset()
        else:
            peer.send(plain(b"fine"))

    studio.script = script
    with dial(front.port) as sock:
        for _ in range(2):      # now the connection to LM Studio has been used again
            sock.sendall(request("GET /v1/models", close=False))
            read_until(sock, b"fine")
        sock.sendall(request(f"{method} /v1/chat/completions", b"{}"))
        assert status_of(rest_of(sock)) == (200 if tries == 2 else 502)
    assert len(calls) == 2 + tries


def test_a_server_that_closes_after_each_answer_without_saying_so_costs_no_request(fronts, studio, monkeypatch):
    def script(peer):
        peer.send(plain(b"one"))
        peer.sock.shutdown(socket.SHUT_RDWR)

    front, studio.script = fronts(), script
    monkeypatch.setattr(lmgateway, "MATURE_S", PATIENCE_S)
    for _ in range(20):
        assert talk(front.port, request(POST_CHAT, b"{}")).endswith(b"one")
    assert (len(studio.peers), studio.connections) == (20, 20)


# --- the usage that the gateway asks for

@pytest.mark.parametrize("size", [1, 3, 50, 10**6])
def test_the_client_sees_the_bytes_of_a_direct_call(front, studio, size):
    def script(peer):
        asked = (json.loads(peer.body).get("stream_options") or {}).get("include_usage")
        data = b"".join(part for part in CHAT_STREAM if asked or part is not USAGE_CHUNK)
        peer.send(STREAM_HEAD + framed(*(data[at:at + size] for at in range(0, len(data), size))))

    studio.script = script
    for body in (b'{"stream":true}', b'{"stream":true,"stream_options":{"include_usage":true}}',
                 b'{"stream": true, "stream_options": {"include_usage": false}}'):
        mark = front.hub.last
        sent = request(POST_CHAT, body, "Accept-Encoding: gzip")
        direct, through = split_answer(talk(studio.port, sent)), split_answer(talk(front.port, sent))
        own = [row for row in through[1] if row[0].lower() not in HOPS]
        assert (through[0], own) == (direct[0], [row for row in direct[1] if row[0].lower() not in HOPS])
        assert unchunked(through[2]) == unchunked(direct[2])
        assert studio.peers[-1].header("accept-encoding") == ("gzip" if b"true}}" in body else "identity")
        (done,) = front.events(mark, "inference_complete")
        assert (done["tokenUsage"], done["finishReason"], done["model"]) == (COUNTS, "stop", "qwen/qwen3-8b")


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def members(data):
    return gzip.compress(data[:50]) + gzip.compress(data[50:])


PACKED = {  # Content-Encoding, what packs a body so, whether it can be read here
    "gzip": ("gzip", gzip.compress, True), "several members": ("x-gzip", members, True),
    "deflate": ("deflate", zlib.compress, True), "raw deflate": ("Deflate ", raw_deflate, True),
    "br": ("br", lambda data: b"\x00" + data, False), "two": ("gzip, br", gzip.compress, False),
    "no gzip": ("gzip", bytes, False), "torn": ("gzip", lambda data: gzip.compress(data)[:90], False)}


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("row", PACKED.values(), ids=PACKED)
def test_a_compressed_answer_passes_byte_for_byte_and_is_read_if_it_can_be(front, studio, row, stream, size):
    encoding, pack, known = row
    packed = pack(b"".join(CHAT_STREAM) if stream else CHAT_WHOLE)
    head = (STREAM_HEAD if stream else STREAM_HEAD.replace(b"text/event-stream", b"application/json")).replace(
        b"Date", b"Content-Encoding: %b\r\nDate" % encoding.encode())
    studio.script = lambda peer: peer.send(
        head + framed(*(packed[at:at + size] for at in range(0, len(packed), size))))
    mark, body = front.hub.last, b'{"stream":true,"stream_options":{"include_usage":true}}' if stream else b"{}"
    assert unchunked(split_answer(talk(front.port, request(POST_CHAT, body)))[2]) == packed
    (done,) = front.events(mark, "inference_complete")
    assert done["tokenUsage"] == (COUNTS if known else None)


def unchunked(data):
    chunks = lmgateway.Chunks()
    payload = chunks.feed(data)
    assert chunks.over
    return payload


def test_a_stream_is_known_however_its_type_is_written(front, studio):
    head = STREAM_HEAD.replace(b"text/event-stream", b"Text/Event-Stream;charset=UTF-8")
    studio.script, mark = lambda peer: peer.send(head + framed(*CHAT_STREAM)), front.hub.last
    got = split_answer(talk(front.port, request(POST_CHAT, b'{"stream":true}')))[2]
    assert unchunked(got) == b"".join(CHAT_STREAM[:4] + CHAT_STREAM[5:])
    assert front.events(mark, "inference_complete")[0]["tokenUsage"] == COUNTS


@pytest.mark.parametrize("answer", [plain(CHAT_WHOLE), STREAM_HEAD + framed(*CHAT_STREAM)], 
                         ids=["whole", "stream"])
def test_whoever_has_the_answer_finds_it_counted(front, studio, answer):
    studio.script = lambda peer: peer.send(answer)
    with dial(front.port) as sock:
        for _ in range(10):
            sock.sendall(request(POST_CHAT, b"{}", close=False))
            read_until(sock, answer[-9:])
            assert not front.hub._requests.running


def test_an_error_to_an_amended_request_keeps_its_length(front, studio):
    studio.script = lambda peer: peer.send(plain(b'{"error":"no"}', "400 Bad Request"))
    answer = talk(front.port, request(POST_CHAT, b'{"stream":true}'))
    assert b"Content-Length: 14\r\n" in answer and b"chunked" not in answer


INFERENCES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
              "/v1/decisions", "/v1/systemone", "/api/v0/chat/completions", "/api/v0/completions",
              "/api/v0/embeddings", "/api/v1/chat")


@pytest.mark.parametrize("path", INFERENCES)
def test_usage_is_asked_for_where_a_stream_has_none_of_its_own(front, studio, path):
    for body in (b'{"stream": true}', b'{"stream": false}'):
        mark = front.hub.last
        talk(front.port, request(f"POST {path}", body))
        front.events(mark, "inference_start")
        asked = b"include_usage" in studio.peers[-1].body
        assert asked == ("completions" in path and b"true" in body)


@pytest.mark.parametrize("row", METERED.values(), ids=METERED)
def test_every_dialect_is_metered_on_its_way(front, studio, row):
    path, answer, usage, finish, first = row
    stream, mark = isinstance(answer, list), front.hub.last
    studio.script = lambda peer: peer.send(STREAM_HEAD + framed(*answer) if stream else plain(answer))
    body = json.dumps({"model": "asked", "stream": stream,
                       "stream_options": {"include_usage": True}}).encode()
    got = split_answer(talk(front.port, request(f"POST {path}?beta=true", body)))[2]
    assert (unchunked(got) if stream else got) == (b"".join(answer) if stream else answer)
    (start,), (done,) = front.events(mark,
                                     "inference_start"), front.events(mark, "inference_complete", "error")
    assert start == {"timestamp": start["timestamp"], "requestId": done["requestId"], "method": "POST",
                     "path": path,
                     "model": "asked", "stream": stream, "client": "127.0.0.1", "key": None}
    beside = {name: done[name] for name in ("cachedTokens", "reasoningTokens") if name in done}
    assert (done["tokenUsage"] and lmgateway.without_none(**done["tokenUsage"], **beside)) == usage
    assert (done["status"], done["finishReason"], done["model"]) == (200, finish, "qwen/qwen3-8b")
    assert done["totalTimeMs"] > 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", done["timestamp"])
    if path.startswith("/api") and usage and usage["promptTokens"]:
        assert done["tokensPerSecond"] == 48.2
    if first is None and not path.startswith("/api"):
        assert (done["timeToFirstTokenMs"], done["tokensPerSecond"]) == (None, None)
    if first is not None:
        assert 0 < done["timeToFirstTokenMs"] <= done["totalTimeMs"]


def test_speed_is_tokens_over_the_time_from_the_first_to_the_last(front, studio):
    def script(peer):
        peer.send(STREAM_HEAD, framed(CHAT_STREAM[0], end=False))
        for part in CHAT_STREAM[1:3]:
            pause.wait(0.1)
            peer.send(framed(part, end=False))
        pause.wait(0.1)
        peer.send(framed(*CHAT_STREAM[3:]))

    pause, studio.script, mark = threading.Event(), script, front.hub.last
    talk(front.port, request(POST_CHAT, b'{"stream":true}'))
    (done,) = front.events(mark, "inference_complete")
    assert 90 <= done["timeToFirstTokenMs"] < done["totalTimeMs"] - 150
    assert 5 < done["tokensPerSecond"] < 32       # 3 tokens, 0.1 s from the first to the last


@pytest.mark.parametrize(("path", "sent", "prompt"), [
    (POST_CHAT, CHAT_STREAM[:3], None),
    ("POST /v1/messages", [METERED["messages stream"][1][place] for place in (0, 3, 3)], 21)], ids=["chat", "messages"])
def test_what_was_generated_before_the_end_is_an_estimate(front, studio, path, sent, prompt):
    """The first event of Anthropic's has counts already, and none of what is generated."""
    def script(peer):
        peer.send(STREAM_HEAD, framed(*sent, end=False))
        peer.reset()

    studio.script, mark = script, front.hub.last
    talk(front.port, request(path, b'{"stream":true}'))
    assert front.events(mark, "error")[0]["tokenUsage"] == {
        "promptTokens": prompt, "completionTokens": 2, "totalTokens": prompt and prompt + 2, "estimated": True}


def test_an_estimate_gives_way_to_the_log_and_what_was_known_beside_it_stays():
    record, meter = lmgateway.Record("r", 0.0, 0.0), lmgateway.Meter(lmgateway.MESSAGES, True)
    begin, piece = METERED["messages stream"][1][0], METERED["messages stream"][1][3]
    begin = begin.replace(b'"output_tokens": 0', b'"output_tokens": 1, "cache_read_input_tokens": 5')
    for number, data in enumerate([begin, *[piece] * 21]):
        meter.feed(data, float(number))
    meter.end()
    record.end(30.0, lmgateway.Outcome("abandoned", 200, "left", "client_disconnected", meter))
    assert (record.usage["completionTokens"], record.usage["estimated"], record.speed) == (21, True, 1.05)
    record.on_stats({"completionTokens": 22}, 31.0)
    assert record.usage == {"promptTokens": 26, "completionTokens": 22, "totalTokens": 48, "cachedTokens": 5}


ONE = framed(TOKEN, end=False)

def stream_in_turn(studio, front, count, end):
    """Lets the imitation stream count tokens, each once the one before it was seen; gives the client's socket."""
    turn = threading.Semaphore(0)

    def script(peer):
        peer.send(STREAM_HEAD)
        for _ in range(count):
            peer.send(ONE)
            turn.acquire(timeout=PATIENCE_S)
        end(peer)

    studio.script, sock = script, dial(front.port)
    sock.sendall(request(POST_CHAT, b'{"stream":true}'))
    for _ in range(count):
        read_until(sock, TOKEN)
        turn.release()
    return sock


def test_what_was_generated_before_the_client_left_is_an_estimate_and_one_line_of_the_log(front, studio, caplog):
    mark, lmgateway.log.propagate = front.hub.last, True
    with caplog.at_level(logging.DEBUG, "lmgateway"):
        stream_in_turn(studio, front, 6, lambda peer: peer.wait_for_end()).close()
        assert front.events(mark, "error")[0]["tokenUsage"]["completionTokens"] == 6
        lmgateway.wait_until(lambda: not front.server.connections, PATIENCE_S)
    assert len([record for record in caplog.records if "/v1/chat/completions" in record.getMessage()]) == 1


def test_listeners_hear_how_many_tokens_an_answer_has(front, studio, monkeypatch):
    monkeypatch.setattr(lmgateway, "COUNT_S", 0.0)
    monkeypatch.setattr(lmgateway, "TELL_S", 0.0)
    mark = front.hub.last
    with stream_in_turn(studio, front, 4, lambda peer: peer.send(framed())) as sock:
        read_until(sock, framed())
    told = front.events(mark, "inference_progress", count=4)
    assert [event["progress"]["outputTokens"] for event in told
            if event["state"] == "generating" and event["progress"]][:4] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["GET /v1/models", "POST /api/v1/models/load", "POST /api/v1/models/unload",
                                  "POST /v1/unknown",
                                  "GET /v1/chat/completions", "HEAD /v1/chat/completions",
                                  "OPTIONS /v1/chat/completions"])
def test_what_asks_no_model_is_no_inference(front, studio, line):
    mark = front.hub.last
    assert status_of(talk(front.port, request(line, b"" if "POST" not in line else b"{}"))) == 200
    assert front.hub.last == mark


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/V1/Chat/Completions", "/chat/completions",
                                  "/v1/messages?beta=true"])
def test_an_inference_is_known_however_lm_studio_would_know_it(front, studio, path):
    mark = front.hub.last
    talk(front.port, request(f"POST {path}", b"{}"))
    assert front.events(mark, "inference_start")[0]["path"] == path.partition("?")[0]


# --- failure

def test_lm_studio_that_is_not_there_is_said_at_once(fronts):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    front, started = fronts(f"http://127.0.0.1:{port}"), time.monotonic()
    answer = talk(front.port, request(POST_CHAT, b'{"model":"m"}'))
    assert (status_of(answer), error_of(answer)["code"]) == (502, "upstream_unreachable")
    assert time.monotonic() - started < 2 and "Start its server" in error_of(answer)["message"]
    (event,) = front.events(0, "error")
    assert (event["operation"], event["status"], event["model"]) == ("upstream_unreachable", None, "m")
    assert front.events(0, "inference_start")[0]["requestId"] == event["requestId"]


def reset(peer):
    peer.reset()


def garbage(peer):
    peer.send(b"220 smtp.example ESMTP\r\n\r\n")


def says(head):
    def script(peer):
        peer.send(b"HTTP/1.1 " + head + b"\r\n\r\nx")
    script.__name__ = repr(head[:40])
    return script


def half_a_head(peer):
    peer.send(b"HTTP/1.1 200 OK\r\nContent-")
    peer.sock.shutdown(socket.SHUT_RDWR)


def endless_head(peer):
    peer.send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000)


def endless_news(peer):
    with contextlib.suppress(OSError):
        while True:
            peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)


def silence(peer):
    peer.wait_for_end()


FAILURES = [reset, garbage, half_a_head, endless_head, endless_news, silence, *map(says, (
    b"101 Switching Protocols", b"000 OK", b"20 OK", b"200 a\x00b", b"200 OK\r\nX: a\rSet-Cookie: b",
    b"200 OK\r\nX: a\x00b", b"200 OK\r\nX y: a", b"200 OK\r\n: a", b"200 OK\r\nno colon", b"200 OK\r\n\xe9: a",
    b"200 OK\r\nTransfer-Encoding: gzip, chunked", b"200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
    b"200 OK\r\nContent-Length: " + b"1" * 5000, b"200 OK\r\nContent-Length: +1"))]


@pytest.mark.parametrize(("script", "path"), [
    *((script, "/v1/chat/completions") for script in FAILURES),
    *((silence, path) for path in ("/v1/messages?beta=true", "/messages", "/v1/models"))],
    ids=lambda part: getattr(part, "__name__", part))
def test_failures_before_the_answer(fronts, studio, script, path, caplog):
    front, studio.script = fronts(proxy_timeout=100), script
    status, code = (504, "upstream_timeout") if script is silence else (502, "upstream_reset")
    lmgateway.log.propagate = True
    with caplog.at_level(logging.INFO):
        answer = talk(front.port, request(f"POST {path}", b"{}"))
    assert (status_of(answer), error_of(answer)["code"]) == (status, code)
    assert (json.loads(split_answer(answer)[2]).get("type") == "error") == ("messages" in path)
    assert len(caplog.records) == 1 and caplog.records[0].levelname in ("WARNING", "warn")
    if "models" not in path:
        assert front.events(0, "error", "inference_complete")[0]["operation"] == code


def test_a_connection_that_nobody_takes_is_given_up_also_where_patience_is_endless(fronts, monkeypatch):
    monkeypatch.setattr(lmgateway, "CONNECT_S", 0.1)
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        for sock in hangs(listener):
            held.enter_context(sock)
        front = fronts(f"http://127.0.0.1:{listener.getsockname()[1]}", proxy_timeout=0)
        status, _, body = ask(front, POST_CHAT, body=b"{}")
    assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_unreachable")


def breaks_off(*pieces):
    def script(peer):
        peer.send(*pieces)
        peer.sock.shutdown(socket.SHUT_RDWR)
    return script


BREAKS = {
    "stream": breaks_off(STREAM_HEAD, framed(*CHAT_STREAM[:2], end=False)),
    "before the first token": breaks_off(STREAM_HEAD),
    "in a chunk": breaks_off(STREAM_HEAD, framed(CHAT_STREAM[1])[:-20]),
    "bad chunk": breaks_off(STREAM_HEAD, framed(CHAT_STREAM[1], end=False), b"zz\r\n"),
    "length": breaks_off(plain(CHAT_WHOLE)[:-5]),
}


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("script", BREAKS.values(), ids=BREAKS)
def test_an_unfinished_answer_never_looks_finished(front, studio, script, version):
    studio.script, mark = script, front.hub.last
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"stream":true}').replace(b"HTTP/1.1", version))
        data, broken = b"", False
        try:
            while piece := sock.recv(65536):
                data += piece
        except ConnectionResetError:
            broken = True
    _, headers, body = split_answer(data)
    if version == b"HTTP/1.0":
        assert broken
    elif ("Transfer-Encoding", "chunked") in headers:
        assert not body.endswith(b"0\r\n\r\n")
    else:
        assert len(body) == len(CHAT_WHOLE) - 5
    (event,) = front.events(mark, "error", "inference_complete")
    assert (event["operation"], event["status"]) == ("upstream_reset", 200)


def test_a_stream_that_breaks_off_in_an_event_gives_what_a_direct_call_gives(front, studio):
    studio.script = breaks_off(STREAM_HEAD, framed(CHAT_STREAM[1], CHAT_STREAM[2][:30], end=False))
    body = split_answer(talk(front.port, request(POST_CHAT, b'{"stream":true}')))[2]
    assert body == framed(CHAT_STREAM[1], CHAT_STREAM[2][:30], end=False)


@pytest.mark.parametrize(("stream", "option"), [(True, "proxy_stream_timeout"), (False, "proxy_timeout")])
def test_silence_in_mid_answer_ends_it_and_each_kind_has_its_own_patience(fronts, studio, stream, option):
    def script(peer):
        peer.send(STREAM_HEAD, framed(CHAT_STREAM[1], end=False))
        peer.wait_for_end()

    front, studio.script = fronts(**{"proxy_timeout": 0, "proxy_stream_timeout": 0, option: 100}), script
    body = split_answer(talk(front.port, request(POST_CHAT, json.dumps({"stream": stream}).encode())))[2]
    assert body == framed(CHAT_STREAM[1], end=False)
    (event,) = front.events(0, "error")
    assert (event["operation"], event["status"]) == ("upstream_timeout", 200)


@pytest.mark.parametrize(("stream", "option"), [(True, "PROXY_STREAM_TIMEOUT"), (False, "PROXY_TIMEOUT")])
def test_who_waits_in_vain_for_an_answer_is_told_which_patience_ended(fronts, studio, stream, option):
    studio.script = lambda peer: peer.wait_for_end()
    front = fronts(**{"proxy_timeout": 0, "proxy_stream_timeout": 0, option.lower(): 100})
    answer = talk(front.port, request(POST_CHAT, json.dumps({"stream": stream}).encode()))
    assert status_of(answer) == 504 and f"Raise {option}," in error_of(answer)["message"]


def test_a_large_body_that_nobody_reads_is_given_up_in_time(fronts):
    """Each part of it that found room must not begin the wait anew."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        front = fronts(f"http://127.0.0.1:{listener.getsockname()[1]}", proxy_timeout=200)
        started = time.monotonic()
        answer = talk(front.port, request("POST /v1/audio", bytes(20_000_000)))
        assert status_of(answer) == 504 and 0.15 < time.monotonic() - started < 0.6


def test_each_slice_of_a_large_body_has_the_timeout_for_itself():
    """So that one which is read slowly arrives, however long that takes."""
    done = []
    call = lmgateway.Call(urllib.request.Request("http://x"), "POST", "/", [], bytes(2_500_000))
    call.set_timeout(0.5)
    call.sock = types.SimpleNamespace(sendall=lambda data: done.append(len(data)), settimeout=done.append,
                                      setsockopt=lambda *args: None)
    call.send()
    assert done[:5] == [19, 0.5, 1048576, 1048576, 402848]


def test_a_length_that_is_said_twice_alike_is_one(front, studio):
    twice = b"Content-Length: 2\r\n" * 2
    studio.script = lambda peer: peer.send(b"HTTP/1.1 200 OK\r\n", twice, b"\r\nxy")
    assert split_answer(talk(front.port, request()))[2] == b"xy"


def test_a_connection_that_is_used_again_has_the_patience_of_its_new_request(fronts, studio, monkeypatch):
    monkeypatch.setattr(lmgateway, "MATURE_S", 0)
    front, answers = fronts(proxy_timeout=100, proxy_stream_timeout=0), [STREAM_HEAD + framed(CHAT_STREAM[1])]

    def script(peer):
        if answers:
            peer.send(answers.pop())
        else:
            peer.wait_for_end()

    studio.script = script
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"stream":true}', close=False))
        read_until(sock, b"0\r\n\r\n")
        before = studio.connections
        sock.sendall(request("GET /v1/models"))
        assert (status_of(rest_of(sock)), studio.connections) == (504, before)


def test_the_time_to_connect_is_not_the_time_to_answer(fronts, studio, monkeypatch):
    monkeypatch.setattr(lmgateway, "CONNECT_S", 0.05)
    asked, front = threading.Event(), fronts(proxy_timeout=0)

    def script(peer):
        asked.wait(PATIENCE_S)
        peer.send(plain(b"{}"))

    studio.script = script
    with dial(front.port) as sock:
        sock.settimeout(0.2)
        sock.sendall(request())
        with pytest.raises(socket.timeout):
            sock.recv(1)
        asked.set()
        assert status_of(sock.recv(65536)) == 200


@pytest.mark.parametrize("late", ["body", "reader"])
def test_a_head_that_came_in_pieces_leaves_what_follows_its_own_time(fronts, studio, monkeypatch, late):
    monkeypatch.setattr(lmgateway.Wire, "HEAD_S", 0.05)
    front, nothing = fronts(), threading.Event()
    studio.script = lambda peer: peer.send(plain(b"x" * 8_000_000))
    sent = request("POST /v1/audio", b"{}") if late == "body" else request()
    with dial(front.port) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        for part in (sent[:9], sent[9:-2], sent[-2:]):
            sock.sendall(part)
            until(lambda: front.server.connections or studio.peers)
            nothing.wait(0.1 if part == sent[9:-2] and late == "body" else 0.01)
        nothing.wait(0.15 if late == "reader" else 0.0)
        assert len(split_answer(rest_of(sock))[2]) == 8_000_000


UNREADABLE = {"compressed": gzip.compress(STREAMED), "utf-16": STREAMED.decode().encode("utf-16"),
              "deep": b'{"stream":true,"x":%b}' % (b"[" * 100_000 + b"]" * 100_000),
              "long number": b'{"stream":true,"seed":%b}' % (b"7" * 5000)}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_the_answer_to_a_body_that_we_cannot_read_shows_whether_it_is_a_stream(fronts, studio, body):
    silent = threading.Event()

    def script(peer):
        peer.send(STREAM_HEAD, framed(*CHAT_STREAM[:2], end=False))
        silent.wait(0.1)    # longer than an answer that is no stream may
        peer.send(framed(*CHAT_STREAM[2:]))

    front, studio.script = fronts(proxy_timeout=50, proxy_stream_timeout=0), script
    assert unchunked(split_answer(talk(front.port, request(POST_CHAT, body)))[2]) == b"".join(CHAT_STREAM)
    (done,) = front.events(0, "inference_complete", "error")
    assert (done.get("error"), done["tokenUsage"], done["model"]) == (None, COUNTS, "qwen/qwen3-8b")
    assert front.hub.shown()[0]["stream"] and studio.peers[0].body == body


@pytest.mark.parametrize("depth", [300, 600, 900])
def test_a_body_that_is_nested_as_deep_as_json_is_read_is_an_inference(front, studio, depth):
    body, mark = b'{"messages":%b}' % (b"[" * depth + b"]" * depth), front.hub.last
    assert status_of(talk(front.port, request(POST_CHAT, body))) == 200
    front.events(mark, "inference_complete")
    assert studio.peers[0].body == body


def test_what_no_answer_came_to_is_given_up_even_if_its_body_cannot_be_read(fronts, studio):
    front, studio.script = fronts(proxy_timeout=100), silence
    assert status_of(talk(front.port, request(POST_CHAT, UNREADABLE["utf-16"]))) == 504


def test_a_gateway_without_a_descriptor_left_does_not_say_that_lm_studio_is_away(fronts, monkeypatch):
    def refuse(address, timeout):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    front = fronts()
    with dial(front.port) as sock:
        monkeypatch.setattr(lmgateway.socket, "create_connection", refuse)
        sock.sendall(request(POST_CHAT, b"{}"))
        answer = rest_of(sock)
    assert (status_of(answer), error_of(answer)["code"]) == (503, "no_descriptors")
    assert "open files" in front.gateway.upstream.health()


def test_a_machine_that_went_off_is_noticed_while_nothing_is_said(front):
    upstream = front.gateway.upstream
    call = lmgateway.Call(upstream.origin, "GET", "/", [("Host", upstream.host)])
    upstream.send(call)
    with call.use(None) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


# --- one question for all

def drips(peer):
    """A byte at a time, each long before any read gives up."""
    with contextlib.suppress(OSError):
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
            peer.send(bytes([byte]))
            pace.wait(0.05)


pace = threading.Event()


def age(remembered, seconds):
    """Makes what is remembered so much older."""
    remembered._known = remembered._known[0] - seconds, remembered._known[1]


@pytest.mark.parametrize("script", [drips, endless_news, silence], ids=lambda script: script.__name__)
def test_a_question_ends_in_time_and_the_next_one_is_asked(fronts, studio, monkeypatch, script):
    monkeypatch.setattr(lmgateway, "QUESTION_S", 0.1)
    front, studio.script, started = fronts(), script, time.monotonic()
    assert ask(front, "GET /ready")[0] == 503
    assert front.gateway.upstream.models()[0] is None and time.monotonic() - started < 0.9
    studio.script, health = (lambda peer: peer.send(plain(b'{"lmstudio":true}'))), front.gateway.upstream._health
    health._known = -math.inf, health._known[1]
    assert ask(front, "GET /ready")[0] == 200


def test_an_asker_that_never_comes_back_is_not_waited_for_and_not_heard_later():
    stuck, heard, answers = threading.Event(), threading.Event(), iter(("late", "second"))

    def answer():
        mine = next(answers)
        if mine == "late":
            stuck.wait(PATIENCE_S)
            heard.set()
        return mine

    asked = lmgateway.Remembered(answer, 0.05, "silence")
    assert asked.value(0.0, 0.1) == "silence"
    assert asked.value(100.0, PATIENCE_S) == "second"
    stuck.set()
    assert heard.wait(PATIENCE_S) and not until(lambda: "question" not in [t.name for t in threading.enumerate()])
    assert asked.value(100.0, 0.0) == "second"


def test_a_question_for_which_no_thread_is_to_be_had_is_asked_at_once(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    numbers = iter(range(9))
    asked = lmgateway.Remembered(lambda: next(numbers), PATIENCE_S, None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert asked.value(0.0, 0.0) == 0
    assert asked.value(0.0, PATIENCE_S) == 1


# --- requests that are stopped

STOPS = {  # what LM Studio has sent by then -> path, request, what the client gets of the stop
    "before the answer": ((), "/v1/chat/completions", b'{"stream":true}', 503),
    "before the answer, Anthropic": ((), "/v1/messages", b"{}", 503),
    "in a stream": ((STREAM_HEAD, framed(CHAT_STREAM[1], end=False)), "/v1/chat/completions", b'{"stream":true}', 200),
    "in a stream, Anthropic": ((STREAM_HEAD, framed(MESSAGES_USAGE, end=False)), "/v1/messages", b'{"stream":true}',
                               200),
    "in an answer": ((plain(CHAT_WHOLE)[:-5],), "/v1/chat/completions", b"{}", 200),
}


@pytest.mark.parametrize("row", STOPS.values(), ids=STOPS)
def test_a_request_can_be_stopped_from_another_thread(front, studio, row):
    sent, path, body, status = row
    here, ended, mark = threading.Event(), queue.Queue(), front.hub.last
    studio.script = lambda peer: (peer.send(*sent), here.set(), ended.put(peer.wait_for_end()))
    with dial(front.port) as sock:
        sock.sendall(request(f"POST {path}", body))
        assert here.wait(PATIENCE_S)
        data = read_until(sock, sent[-1][-9:]) if sent else b""
        (running,) = front.gateway.inferences.values()
        running.stop(lmgateway.HttpError(503, "stopped", "stopped by anna"))
        data += rest_of(sock)
    assert ended.get(timeout=PATIENCE_S) < 1.0 and status_of(data) == status
    assert b"stopped by anna" in data or status == 200 and not body.endswith(b"true}")
    assert (b'"type": "error"' in data) == ("messages" in path) and not data.endswith(b"0\r\n\r\n")
    assert (b"event: error\ndata: {" in data) == (status == 200 and b"stream" in body)
    (event,) = front.events(mark, "error", "inference_complete")
    assert (event["operation"], event["error"]) == ("stopped", "stopped by anna")
    assert not front.gateway.inferences


@pytest.mark.parametrize("row", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_an_error_in_a_200_is_relayed_as_it_is_and_told(front, studio, row):
    stream, data, error = row
    studio.script, mark = lambda peer: peer.send(STREAM_HEAD + framed(data) if stream
                                                 else plain(data)), front.hub.last
    got = split_answer(talk(front.port, request(POST_CHAT, b"{}")))[2]
    assert (unchunked(got) if stream else got) == data
    (event,) = front.events(mark, "error" if error else "inference_complete")
    assert (event.get("error"), event.get("operation"),
            event["status"]) == (error, "upstream_error" if error else None, 200)


@pytest.mark.parametrize(("body", "error"), [(b'{"error":{"message":"No models loaded."}}',
                                              "No models loaded."),
                                             (b"<h1>oops", "LM Studio answered 404 Not Found"),
                                             (b"", "LM Studio answered 404 Not Found")])
def test_an_error_status_is_relayed_as_it_is_and_told(front, studio, body, error):
    studio.script, mark = lambda peer: peer.send(plain(body, "404 Not Found")), front.hub.last
    answer = talk(front.port, request(POST_CHAT, b"{}"))
    assert (status_of(answer), split_answer(answer)[2]) == (404, body)
    (event,) = front.events(mark, "error")
    assert (event["error"], event["operation"], event["status"]) == (error, "upstream_error", 404)


def test_an_answer_before_the_body_was_taken_is_passed_on(fronts):
    def serve(sock):
        with sock:      # closed with most of the body unread: a reset
            read_until(sock, b"\r\n\r\n")
            sock.sendall(plain(b"too large", "413 Payload Too Large"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        front, body = fronts(f"http://127.0.0.1:{listener.getsockname()[1]}"), b"x" * 30_000_000
        threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True).start()
        answer = talk(front.port, request("POST /v1/x", b"", f"Content-Length: {len(body)}"), body)
    assert status_of(answer) == 413 and answer.endswith(b"too large")


def test_a_fault_of_ours_ends_the_request_and_its_connection_unfinished(shared, studio, monkeypatch, caplog):
    front = shared[1]

    def feed(meter, piece, now):
        if b"Hi" in piece:
            raise ZeroDivisionError("planted")
        return piece

    def script(peer):
        peer.send(STREAM_HEAD + framed(CHAT_STREAM[0], end=False))
        go.wait(PATIENCE_S)
        peer.send(framed(*CHAT_STREAM[1:]))

    monkeypatch.setattr(lmgateway.Meter, "feed", feed)
    go, mark, studio.script = threading.Event(), front.hub.last, script
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b"{}"))
        read_until(sock, CHAT_STREAM[0])
        go.set()
        assert rest_of(sock) in (b"", b"\r\n")     # no second head, no end
    assert front.events(mark, "error", "inference_complete")[0]["operation"] == "internal_error"


def test_a_fault_of_ours_before_the_answer_ends_the_request_too(shared, studio, monkeypatch, caplog):
    front, mark, ended = shared[1], shared[1].hub.last, queue.Queue()
    studio.script = lambda peer: (peer.send(STREAM_HEAD), ended.put(peer.wait_for_end()))
    monkeypatch.setattr(lmgateway, "client_headers", lambda answer, cut: 1 / 0)
    assert status_of(talk(front.port, request(POST_CHAT, b"{}"))) == 500
    assert front.events(mark, "error", "inference_complete")[0]["operation"] == "internal_error"
    assert ended.get(timeout=PATIENCE_S) < 1.0


@pytest.mark.parametrize("end", [b"data: [DONE]", CHAT_STREAM[2][:-2], CHAT_STREAM[2][:-1], b": bye"])
def test_a_last_event_without_its_blank_line_is_passed_on(front, studio, end):
    studio.script, mark = lambda peer: peer.send(STREAM_HEAD + framed(CHAT_STREAM[1], end)), front.hub.last
    for body in (b'{"stream":true}', b"{}"):
        assert unchunked(split_answer(talk(front.port, request(POST_CHAT, body)))[2]) == CHAT_STREAM[1] + end
    assert len(front.events(mark, "inference_complete", count=2)) == 2


# --- clients that leave

def goes(sock):
    sock.close()


def resets(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def closes_one_side(sock):
    sock.shutdown(socket.SHUT_WR)


def goes_behind_another_request(sock):
    sock.sendall(request("GET /v1/unread"))
    sock.close()


PHASES = {  # what LM Studio has sent when the client goes, and what the event says
    "before the answer": (),
    "while the prompt was read": (STREAM_HEAD, framed(CHAT_STREAM[0], end=False)),
    "during the answer": (STREAM_HEAD, framed(*CHAT_STREAM[:3], end=False)),
    "during the answer ": (plain(CHAT_WHOLE)[:-5],),
}


LEAVES = [(phase, leave) for phase in PHASES for leave in (goes, closes_one_side)] + [
    (phase, leave) for phase in list(PHASES)[:2] for leave in (resets, goes_behind_another_request)]


@pytest.mark.parametrize(("phase", "leave"), LEAVES, ids=lambda part: getattr(part, "__name__", part))
def test_a_client_that_leaves_ends_the_request_within_a_second(front, studio, phase, leave):
    ended, mark = queue.Queue(), front.hub.last

    def script(peer):
        peer.send(*PHASES[phase])
        here.set()
        ended.put(peer.wait_for_end())

    studio.script, here = script, threading.Event()
    sock = dial(front.port)
    sock.sendall(request(POST_CHAT, b'{"stream":true}' if "while" in phase else b"{}"))
    assert here.wait(PATIENCE_S)
    if PHASES[phase]:
        read_until(sock, PHASES[phase][-1][-10:])
    leave(sock)
    assert ended.get(timeout=PATIENCE_S) < 1.0 - (lmgateway.Server.LOOK_S - LOOK_S)
    (event,) = front.events(mark, "error", "inference_complete")
    assert (event["operation"], event["error"]) == ("client_disconnected", f"the client left {phase.strip()}")
    assert len(studio.peers) == 1
    sock.close()


def test_a_client_that_leaves_a_plain_request_frees_lm_studio_too(front, studio, caplog):
    ended, here, mark = queue.Queue(), threading.Event(), front.hub.last
    studio.script = lambda peer: (here.set(), ended.put(peer.wait_for_end()))
    with dial(front.port) as sock:
        sock.sendall(request("POST /api/v1/models/load", b"{}"))
        assert here.wait(PATIENCE_S)
    assert ended.get(timeout=PATIENCE_S) < 1.0 and front.hub.last == mark
    until(lambda: not front.watched and not front.server.working)
    assert [record.getMessage() for record in caplog.records if "models/load" in record.getMessage()] == [
        "POST /api/v1/models/load: the client left before the answer"]


def test_a_request_whose_client_left_before_it_was_sent_is_not_sent(front, studio):
    upstream = front.gateway.upstream
    call = lmgateway.Call(upstream.origin, "POST", "/v1/chat/completions", [("Host", upstream.host)], b"{}")
    call.cancel()
    with pytest.raises(ConnectionAbortedError):
        upstream.open(call)
    upstream.done(call)
    assert not studio.peers


def test_waiting_requests_share_one_watcher(front, studio):
    here, go = threading.Semaphore(0), threading.Event()
    studio.script = lambda peer: (here.release(), go.wait(PATIENCE_S), peer.send(plain(b"{}")))
    before = set(threading.enumerate())
    with contextlib.ExitStack() as waiting:
        socks = [waiting.enter_context(dial(front.port)) for _ in range(5)]
        for sock in socks:
            sock.sendall(request(POST_CHAT, b"{}"))
            assert here.acquire(timeout=PATIENCE_S)
        assert len(set(threading.enumerate()) - before) <= 2 * len(socks)   # half of them are LM Studio's
        go.set()
        assert all(rest_of(sock) for sock in socks)


def test_a_client_that_stays_and_does_not_read_is_given_up(fronts, studio, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "CLIENT_S", 0.05)
    front, ended = fronts(), threading.Event()

    def script(peer):
        with contextlib.suppress(OSError):
            peer.send(plain(b"x" * 20_000_000))
        ended.set()

    studio.script = script
    with dial(front.port) as sock:
        sock.sendall(request())
        assert ended.wait(PATIENCE_S)


def test_a_client_that_leaves_an_answer_without_a_known_end(front, studio):
    ended, mark = queue.Queue(), front.hub.last

    def script(peer):
        peer.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", CHAT_STREAM[1])
        ended.put(peer.wait_for_end())

    studio.script = script
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b"{}"))
        read_until(sock, b'"Hi"')
    assert ended.get(timeout=PATIENCE_S) < 1.0
    assert front.events(mark, "error", "inference_complete")[0]["operation"] == "client_disconnected"


def test_a_client_that_leaves_while_it_sends_its_request_leaves_no_trace(front, studio):
    mark = front.hub.last
    for sent in (request(POST_CHAT, b'{"x": 1}')[:-3], request(POST_CHAT, b"{}")[:40],
                 request(POST_CHAT, b"", "Transfer-Encoding: chunked") + b"5\r\nab"):
        with dial(front.port) as sock:
            sock.sendall(sent)
    assert status_of(talk(front.port, request())) == 200
    assert front.hub.last == mark and [peer.line for peer in studio.peers] == ["GET /v1/models HTTP/1.1"]


def test_a_client_that_stays_is_not_taken_for_one_that_left(front, studio):
    go, mark = threading.Event(), front.hub.last

    def script(peer):
        go.wait(PATIENCE_S)
        peer.send(plain(CHAT_WHOLE))

    studio.script = script
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b"{}",
                             close=False) + request("GET /health"))     # the second waits unread
        go.wait(2.5 * LOOK_S)
        go.set()
        assert len(re.findall(rb"HTTP/1.1 200 OK", rest_of(sock))) == 2
    front.events(mark, "inference_complete")


STANDS = {   # what a client did -> is it gone, as systems with POLLRDHUP see it, and those without
    "waits": (lambda sock: None, False, False),
    "sends on": (lambda sock: sock.sendall(request()), False, False),
    "closes one side": (closes_one_side, True, True),
    "goes": (goes, True, True),
    "resets": (resets, True, True),
    "goes behind another request": (goes_behind_another_request, True, False),
}


@pytest.mark.parametrize("system", ["Linux", "macOS", "Windows"])
@pytest.mark.parametrize("row", STANDS.values(), ids=STANDS)
def test_who_left_is_seen_on_every_system(monkeypatch, system, row):
    act, gone, seen = row
    if system != "Linux":
        monkeypatch.delattr(lmgateway.select, "POLLRDHUP", raising=False)
        gone = seen
    if system == "Windows":
        monkeypatch.delattr(lmgateway.select, "poll", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, dial(listener.getsockname()[1]) as client:
        mine = listener.accept()[0]
        with mine:
            act(client)
            if act is not STANDS["waits"][0]:
                assert lmgateway.select.select([mine], [], [], PATIENCE_S)[0]
            assert lmgateway.those_left([mine]) == [mine] * gone
        assert lmgateway.those_left([mine]) == []       # closed by its handler in between


# === 7. HTTP =================================================================


# --- 7.1 wire

def test_a_body_in_chunks_of_a_byte_costs_time_in_proportion():
    chunks, data, started = lmgateway.Chunks(), b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n", time.thread_time()
    assert sum(len(chunks.feed(data[at:at + 65536])) for at in range(0, len(data), 65536)) == 200_000
    assert chunks.over and time.thread_time() - started < 0.6


CHUNKED = b"5;name=\"x\"\r\nhello\r\n1 \r\n!\r\n0\r\nTrailer: x\r\n\r\nNEXT"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunked_bodies_are_decoded_at_every_split(size):
    chunks, got = lmgateway.Chunks(), b""
    for at in range(0, len(CHUNKED), size):
        got += chunks.feed(CHUNKED[at:at + size])
    assert (got, chunks.over, chunks.rest) == (b"hello!", True, b"NEXT")


@pytest.mark.parametrize("data", [
    b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1\n", b"1\rx", b"1_0\r\n", b"\xb9\r\n",
    b"1;\x00\r\n",
    b"11111111111111111\r\n", b"1\r\nab", b"1\r\na\nb", b"1\r\na\rb", b"0\r\nno colon\r\n", b"0\r\n x: y\r\n",
    b"0\r\nx: y\n",
    b"0\r\na: b\rc", b"0\r\n" + b"x: y\r\n" * 3000, b"1;" + b"x" * 9000, b"0\r\nx:" + b"x" * 9000],
    ids=lambda data: repr(data[:20]))
def test_chunked_bodies_that_can_be_read_in_two_ways_are_refused(data):
    for size in (1 if len(data) < 5000 else 100, len(data)):
        with pytest.raises(ValueError, match="chunk|trailers"):     # noqa: PT012
            chunks = lmgateway.Chunks()
            for at in range(0, len(data), size):
                chunks.feed(data[at:at + size])


# --- what a waiting client may see (PREFILL_COMMENTS)


@pytest.fixture
def impatient(fronts, monkeypatch):
    monkeypatch.setattr(lmgateway.CommentedForward, "SILENCE_S", 0.02)
    return fronts(prefill_comments=True)


def streamed(front, path="/v1/chat/completions", after=b": waiting\n\n", act=lambda: None):
    """(head, body) of a streamed answer; act() is called once `after` has come."""
    with dial(front.port) as sock:
        sock.sendall(request(f"POST {path}", b'{"model":"m","stream":true}'))
        data = read_until(sock, after)
        act()
        data += rest_of(sock)
    body = unchunked(split_answer(data)[2])
    return status_of(data), data.partition(b"\r\n\r\n")[0], re.sub(rb"(: waiting\n\n)+", b"<waiting>", body)


def test_a_silent_prompt_is_filled_with_comments_and_the_answer_is_the_same(impatient, studio):
    go = threading.Event()

    def script(peer):
        peer.send(STREAM_HEAD)
        go.wait(PATIENCE_S)
        peer.send(framed(*CHAT_STREAM))

    studio.script = script
    _, head, body = streamed(impatient, act=go.set)
    assert (b"X-Powered-By: Express" in head) and body == b"<waiting>" + b"".join(CHAT_STREAM[:-2] + CHAT_STREAM[-1:])
    (done,) = impatient.events(0, "inference_complete", "error")
    assert done["tokenUsage"]["promptTokens"] == 21


@pytest.mark.parametrize("path, answer, told", [
    ("/v1/chat/completions", plain(b'{"error":"The number of tokens to keep"}', "400 Bad Request"),
     b'event: error\ndata: {"error": {"message": "The number of tokens to keep"}}\n\n'),
    ("/v1/messages", plain(b'{"error":{"message":"no"}}', "500 Oops"),
     b'event: error\ndata: {"type": "error", "error": {"message": "no"}}\n\n'),
    ("/v1/chat/completions", b"", b'event: error\ndata: {"error": {"message": "LM Studio closed'),
    ("/v1/chat/completions", STREAM_HEAD + framed(*CHAT_STREAM[:-2], CHAT_STREAM[-1]),
     b"".join(CHAT_STREAM[:-2] + CHAT_STREAM[-1:])),
], ids=["status", "anthropic", "refused", "late head"])
def test_what_comes_after_a_head_of_ours_travels_inside_the_stream(impatient, studio, path, answer, told):
    go = threading.Event()

    def script(peer):
        go.wait(PATIENCE_S)
        peer.send(answer)
        peer.sock.close()

    studio.script = script
    status, head, body = streamed(impatient, path, act=go.set)
    assert (status, b"text/event-stream" in head) == (200, True)
    assert body.startswith(b"<waiting>" + told)
    impatient.events(0, "inference_complete", "error")


def test_a_client_that_leaves_while_it_is_told_of_its_wait_frees_lm_studio(impatient, studio):
    ended = threading.Event()

    def script(peer):
        peer.wait_for_end()
        ended.set()

    studio.script = script
    with dial(impatient.port) as sock:
        sock.sendall(request("POST /v1/chat/completions", b'{"stream":true}'))
        read_until(sock, b": waiting\n\n")
    assert ended.wait(PATIENCE_S)
    (event,) = impatient.events(0, "error")
    assert event["operation"] == "client_disconnected"


@pytest.mark.parametrize("late", [False, True], ids=["before its head", "after a head of ours"])
def test_a_fault_of_ours_does_not_leave_a_client_with_comments_for_ever(impatient, studio, monkeypatch, late):
    def fail(meter, piece, now):
        raise RuntimeError("boom")

    go = threading.Event()
    monkeypatch.setattr(lmgateway.Meter, "feed", fail)
    if not late:
        monkeypatch.setattr(lmgateway.CommentedForward, "SILENCE_S", float(PATIENCE_S))
        go.set()
    studio.script = lambda peer: (go.wait(PATIENCE_S), peer.send(STREAM_HEAD, framed(*CHAT_STREAM)))
    with dial(impatient.port) as sock:
        sock.sendall(request("POST /v1/chat/completions", b'{"stream":true}'))
        data = read_until(sock, b": waiting\n\n" if late else b"\r\n\r\n")
        go.set()
        assert not (data + rest_of(sock)).endswith(b"0\r\n\r\n")
    (event,) = impatient.events(0, "inference_complete", "error")
    assert (event["operation"], "boom" in event["error"]) == ("internal_error", True)


def test_without_the_option_no_comment_is_sent(fronts, studio, monkeypatch):
    monkeypatch.setattr(lmgateway.CommentedForward, "SILENCE_S", 0.02)
    go = threading.Event()
    studio.script = lambda peer: (peer.send(STREAM_HEAD), go.wait(0.1), peer.send(framed(*CHAT_STREAM)))
    assert b": waiting" not in talk(fronts().port, request("POST /v1/chat/completions", b'{"stream":true}'))


# --- figures and usage


def fetched(front, path, *headers):
    data = talk(front.port, request(f"GET {path}", b"", *headers))
    return status_of(data), data.partition(b"\r\n\r\n")[0], split_answer(data)[2]


def test_metrics_for_prometheus_agree_with_those_in_json(fronts, studio):
    front = fronts()
    studio.script = lambda peer: peer.send(plain(CHAT_WHOLE) if peer.line.startswith("POST")
                                           else plain(b'{"lmstudio":true}'))
    for _ in range(3):
        talk(front.port, request("POST /v1/chat/completions", b'{"model":"qwen/qwen3-8b"}'))
    studio.script = lambda peer: peer.send(plain(b'{"error":"x"}', "500 Oops"))
    talk(front.port, request("POST /v1/chat/completions", b'{"model":"invented"}'))
    status, head, body = fetched(front, "/metrics")
    assert (status, b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in head) == (200, True)
    lines = body.decode().splitlines()
    labels = 'key="none",model="qwen/qwen3-8b",endpoint="/v1/chat/completions",code="200"'
    assert f"lmstudio_gateway_requests_total{{{labels}}} 3" in lines
    assert 'lmstudio_gateway_upstream_errors_total{kind="bad_status"} 1' in lines
    assert "lmstudio_gateway_overhead_seconds_count 4" in lines
    assert [line for line in lines if 'overhead_seconds_bucket{le="0.25"} 4' in line]
    assert 'lmstudio_gateway_tokens_total{key="none",model="qwen/qwen3-8b",type="input"} 63' in lines
    performance = json.loads(fetched(front, "/debug/metrics")[2])["performance"]
    assert (performance["totalRequests"], performance["totalErrors"],
            performance["errorRate"]) == (4, 1, 0.25)
    assert performance["totalTokensProcessed"] == 3 * 24
    assert performance["minResponseTimeMs"] <= performance["medianResponseTimeMs"] <= performance["p95ResponseTimeMs"]


def test_every_metric_has_its_help_and_type_once_and_a_known_name(front):
    text = fetched(front, "/metrics")[2].decode()
    names = re.findall(r"^# HELP (\S+) \S", text, re.M)
    assert names == re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", text, re.M)
    assert len(names) == len(set(names)) and set(names) <= set(lmgateway.METRIC)


@pytest.fixture
def logged(fronts, studio, tmp_path, utc):
    """A gateway whose monitor has read a saved log and gone on to a newer one, and is 3 bytes behind there."""
    studio.script = lambda peer: peer.send(plain(b'{"lmstudio":true}'))
    logs = Logs(tmp_path / "server-logs", from_start=True)
    logs.path("2026-08-08.1").write_bytes(sample("g2-nonstream-cache-hit").read_bytes())
    front = fronts(log_dir=str(logs.directory))
    front.gateway.monitor, front.gateway.volume = logs.monitor, lmgateway.LogVolume(str(logs.directory), 0)
    for end in (5, 10):
        while logs.clock < 1000 + end:
            events, pause = logs.monitor.step()
            front.hub.publish_log(events)
            logs.clock += pause
        logs.write("2026-08-09.1", "words of nobody")
    logs.follower.size += 3 - logs.follower.behind
    return front


def test_what_the_log_tells_is_in_the_metrics(logged):
    text = fetched(logged, "/metrics")[2].decode()
    (started,) = re.findall(r"^process_start_time_seconds (\S+)$", text, re.M)
    assert abs(float(started) - time.time()) < 100
    read = logged.gateway.monitor.read
    for line in ('lmstudio_requests_total{model="desk"} 1', 'lmstudio_input_tokens_total{model="desk"} 1900',
                 'lmstudio_output_tokens_total{model="desk"} 15',
                 'lmstudio_cached_input_tokens_total{model="desk"} 1899',
                 'lmstudio_prompt_eval_seconds_sum{model="desk"} 0.03',
                 'lmstudio_generation_seconds_sum{model="desk"} 0.206669',
                 'lmstudio_prompt_tokens_per_second_sum{model="desk"} 33.33',
                 'lmstudio_tokens_per_second_sum{model="desk"} 72.58',
                 'lmstudio_log_lines_total{dialect="G2"} 17',
                 'lmstudio_log_entries_total{event="lmstudio_prompt_progress"} 2',
                 "lmstudio_log_unparsed_entries_total 1", f"lmstudio_log_bytes_read_total {read}",
                 'lmstudio_log_rotations_total{reason="lmstudio_file_switch"} 1',
                 "lmstudio_log_read_lag_bytes 3",
                 "lmstudio_log_last_entry_timestamp_seconds 1777629600.0",
                 f"lmstudio_log_directory_bytes {read + len(HEADER) + 16}",
                 'lmstudio_gateway_sse_events_total{type="lmstudio_file_switch"} 1', "lmstudio_up 1",
                 f'lmstudio_gateway_build_info{{version="{lmgateway.VERSION}",python="{sys.version.split()[0]}"}} 1'):
        assert line in text.splitlines(), line
    assert 'dialect=""' not in text


def test_listeners_and_what_they_lost_are_in_metrics_and_status(logged):
    logged.hub.dropped, logged.hub.replays["gap"] = 7, 2
    logged.gateway.monitor.parser.story.resets["desk"] = 5
    with listening(logged, f"?since={logged.hub.event_id(1)}") as (_, _, frames):
        next(frames)
        text = fetched(logged, "/metrics")[2].decode().splitlines()
        assert json.loads(fetched(logged, "/debug/status")[2])["stream"]["clients"] == 1
    for line in ("sse_clients 1", 'sse_dropped_total{reason="slow"} 7', 'sse_replays_total{result="gap"} 2',
                 'sse_replays_total{result="full"} 1'):
        assert f"lmstudio_gateway_{line}" in text
    assert 'lmstudio_cache_resets_total{model="desk"} 5' in text


def test_the_status_says_which_engine_wrote_and_what_is_not_understood(logged):
    log = json.loads(fetched(logged, "/debug/status")[2])["log"]
    assert (log["position"], log["size"], log["problem"]) == (len(HEADER) + 16, len(HEADER) + 19, None)
    assert (log["generations"], log["events"]["lmstudio_log"],
            log["levels"]) == ({"G2": 17}, 15, {"DEBUG": 8, "INFO": 7})
    assert (log["unknownLines"], log["unknownSamples"], log["headlessLines"],
            log["faults"]) == (1, ["wor~ of nob~"], 0, 0)
    assert (log["lastEntryAt"], log["verbose"], log["bytesRead"]) == ("2026-05-01T10:00:00Z", True,
                                                                      logged.gateway.monitor.read)
    assert log["directoryBytes"] > 0 and log["warnings"] == []
    logged.gateway.monitor.follower.problem = "cannot read it"
    assert json.loads(fetched(logged, "/debug/status")[2])["log"]["problem"] == "cannot read it"
    logged.gateway.monitor = None
    assert json.loads(fetched(logged, "/debug/status")[2])["log"]["enabled"] is False


@pytest.mark.parametrize("entries, requests, read", [
    ([START, STREAM, PROMPT, TIMED, RELEASE, FINISH], 1, 100),
    ([START, STREAM, PROMPT, FINISH], 1, 100),
    ([START, STREAM, "DEBUG [cache_wrapper][INFO]: Prompt cache: using 4/11 tokens from cache", at(100),
      FINISH], 1, 11),
    ([START, STREAM, at(100), FINISH, START, STREAM, at(100), FINISH], 2, 0),
    ([START, ANSWER], 1, 100), ([START, STREAM, at(100), LEFT], 0, 0),
    ([TIMED, RELEASE, FINISH], 1, 100), ([FINISH, TIMED, RELEASE], 1, 100),
], ids=["stats", "no stats", "MLX", "two", "whole", "left", "middle", "middle, end first"])
def test_predictions_that_the_log_shows_finished_are_counted_once(entries, requests, read):
    hub, parser = lmgateway.Hub(), Parser()
    for piece in entries_as_log(*entries), b"":
        hub.publish_log(parser.feed(piece) + parser.quiet())
    text = hub.exposition({})
    assert [sum(map(int, re.findall(rf"^lmstudio_{name}_total.* (\d+)$", text, re.M)))
            for name in ("requests", "input_tokens")] == [requests, read]


def test_what_is_turned_away_is_counted(fronts):
    front = fronts(api_key={"anna": "secret"})
    assert fetched(front, "/metrics")[0] == 401
    text = fetched(front, "/metrics", "Authorization: Bearer secret")[2].decode()
    assert 'lmstudio_gateway_rejected_total{reason="no_key"} 1' in text


V1_MODELS = {"models": [
    {"key": "m/two", "type": "llm", "quantization": None, "loaded_instances": [], "size_bytes": "much"},
    {"key": "m/one", "type": "llm", "quantization": {"name": "Q4_K_M"}, "size_bytes": 5_000, "max_context_length": 32768,
     "loaded_instances": [{"id": "desk", "config": {"context_length": 8192}}]}, {"key": 7}, "x"]}
V0_MODELS = {"data": [
    {"id": "m/two", "type": "llm", "state": "not-loaded", "loaded_context_length": 1},
    {"id": "m/one", "type": "llm", "quantization": "Q4_K_M", "state": "loaded", "loaded_context_length": 8192,
     "max_context_length": 32768}], "object": "list"}
LOADED = {"id": "m/one", "state": "loaded", "type": "llm", "quantization": "Q4_K_M", "contextLength": 8192,
       "maxContextLength": 32768, "running": 0, "waiting": 0, "lastUsed": None}
IDLE = {"id": "m/two", "state": "not-loaded", "type": "llm", "running": 0, "waiting": 0, "lastUsed": None}


def lists(studio, answers, other=CHAT_WHOLE):
    """LM Studio lists its models on the paths of answers, and knows no other GET."""
    def script(peer):
        path = peer.line.split()[1]
        body = json.dumps(answers.get(path, {"error": "Unexpected endpoint or method."})).encode()
        peer.send(plain(body if peer.line.startswith("GET") else other))

    studio.script = script


def questions(studio):
    return [peer.line.split()[1] for peer in studio.peers if "models" in peer.line]


@pytest.mark.parametrize("answers, asked, one", [
    ({"/api/v1/models": V1_MODELS}, ["/api/v1/models"], {**LOADED, "sizeBytes": 5_000}),
    ({"/api/v0/models": V0_MODELS}, ["/api/v1/models", "/api/v0/models"], LOADED)])
def test_models_are_listed_as_lm_studio_has_them_and_asked_for_once_a_minute(fronts, studio, answers, asked, one):
    front = fronts(upstream_token="theirs")
    lists(studio, answers)
    for _ in range(2):
        found = page(front, "/debug/models")
        assert found["models"] == [one, IDLE] and abs(lmgateway.since_epoch(found["asOf"], 0) - time.time()) < 10
        text = fetched(front, "/metrics")[2].decode()
        assert 'lmstudio_loaded_models 1' in text
        assert 'lmstudio_model_context_length_tokens{model="m/one",type="llm"} 8192' in text
    assert questions(studio) == asked
    (peer, *_) = [peer for peer in studio.peers if "models" in peer.line]
    assert peer.header("authorization") == "Bearer theirs"
    age(front.gateway.upstream._models, 61)
    page(front, "/debug/models")
    assert questions(studio) == [*asked, asked[-1]]     # the one that answered
    studio.script = lambda peer: peer.send(plain(b'{"error":"no"}', "400 Bad Request"))
    for model in ("m/one", "m/none"):
        talk(front.port, request(POST_CHAT, b'{"model":"%b"}' % model.encode()))
    text = fetched(front, "/metrics")[2].decode()
    for model in ("m/one", "other"):     # what LM Studio lists is known, also where no answer has named it
        labels = f'key="none",model="{model}",endpoint="{POST_CHAT[5:]}",code="400"'
        assert f"lmstudio_gateway_requests_total{{{labels}}} 1" in text


@pytest.mark.parametrize("entry, again", [
    ("[INFO][JIT] Requested model (m/one) is not loaded. Loading \"m/one\" now...", True),
    ("[INFO][LMSAuthenticator][Client=lms-cli][Endpoint=loadModel] Loading model: m/one", True),
    ("[INFO][LMSAuthenticator][Client=lms-cli][Endpoint=unloadModel] Unloading model: m/one", True),
    ("[DEBUG] [model_kit][INFO]: Model loaded successfully", True),
    ("[DEBUG] LlamaV4::load called with model path: /m/one.gguf", True),
    ("[DEBUG] Received request: POST to /v1/chat/completions with body {\n  \"x\": \"Loading model: m\"\n}", False),
    ("[INFO][m/one] Finished streaming response", False)])
def test_models_are_asked_for_anew_when_the_log_tells_of_a_load(fronts, studio, entry, again):
    front, parser = fronts(), Parser()
    lists(studio, {"/api/v1/models": V1_MODELS})
    page(front, "/debug/models")
    front.hub.publish_log(parser.feed(f"[2026-05-01 10:00:00]{entry}\n".encode()) + parser.quiet())
    for _ in range(2):
        page(front, "/debug/models")
    assert len(questions(studio)) == 1 + again


def test_many_looks_at_the_models_are_one_question(fronts, studio):
    front, here, go = fronts(), threading.Event(), threading.Event()
    lists(studio, {"/api/v1/models": V1_MODELS})
    page(front, "/debug/status")        # so that it is known to be up
    answer = studio.script
    studio.script = lambda peer: (here.set(), go.wait(PATIENCE_S), answer(peer))
    found = []
    looks = [threading.Thread(target=lambda: found.append(page(front, "/debug/models"))) for _ in range(5)]
    for look in looks:
        look.start()
    assert here.wait(PATIENCE_S)
    go.set()
    for look in looks:
        look.join(PATIENCE_S)
    assert len(found) == 5 and questions(studio) == ["/api/v1/models"]


def test_what_runs_on_a_model_and_when_it_was_used_stands_beside_it(fronts, studio):
    front, here, go = fronts(), threading.Event(), threading.Event()
    lists(studio, {"/api/v1/models": V1_MODELS}, CHAT_WHOLE.replace(b"qwen/qwen3-8b", b"desk"))
    talk(front.port, request(POST_CHAT, b'{"model":"m/one"}'))
    one, two = page(front, "/debug/models")["models"]
    assert (one["running"], one["waiting"], two["lastUsed"]) == (0, 0, None)       # by the name of its instance
    assert abs(lmgateway.since_epoch(one["lastUsed"], 0) - time.time()) < 10
    answer = studio.script
    studio.script = lambda peer: (here.set(), go.wait(PATIENCE_S), answer(peer))
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"model":"m/two"}'))
        assert here.wait(PATIENCE_S)
        assert [row["running"] for row in page(front, "/debug/models")["models"]] == [0, 1]
        (record,) = front.hub._requests.running.values()
        record.enter("loading", time.monotonic())
        assert [row["state"] for row in page(front, "/debug/models")["models"]] == ["loaded", "loading"]
        record.enter("queued", time.monotonic())
        assert [row["waiting"] for row in page(front, "/debug/models")["models"]] == [0, 1]
        go.set()
        rest_of(sock)


def test_models_of_an_lm_studio_that_is_away_are_those_last_known(fronts, studio):
    front = fronts()
    lists(studio, {})
    status, _, body = fetched(front, "/debug/models")
    assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_unreachable")
    lists(studio, {"/api/v1/models": V1_MODELS})
    age(front.gateway.upstream._models, 4)      # no answer is remembered for a few seconds only
    known = page(front, "/debug/models")
    front.gateway.upstream._health._known, asked = (time.monotonic(), "LM Studio is gone"), len(studio.peers)
    age(front.gateway.upstream._models, 61)
    assert page(front, "/debug/models") == known and len(studio.peers) == asked
    assert fetched(fronts("http://127.0.0.1:9"), "/debug/models")[0] == 502


# --- figures over time

def ended(series, at, **about):
    """A request that ended at so many epoch seconds is counted; gives what counting it gave."""
    row = dict.fromkeys(lmgateway.HISTORY_NAMES)
    row.update({"source": "gateway", "started": at, "key": "anna", "model": "m/one", "outcome": "done", **about})
    return series.take(row, about.get("before"))


def series_of(series, step=60, by="", begin=0):
    return lmgateway.series_rows(series.cells(begin), step, by)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 3000])
def test_percentiles_of_a_series_are_right_to_ten_percent(count):
    source, series = Random(count), lmgateway.Series(0)
    values = [source.lognormvariate(6, 2) for _ in range(count)]
    for value in values:
        ended(series, 60, first_ms=value)
    (row,) = series_of(series)["rows"]
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        assert row["ttftMs"][name] == pytest.approx(lmgateway.rank(sorted(values), share), rel=0.1)
    assert row["requests"] == count and row["reading"] == row["writing"] == {"p50": None, "p95": None}


def test_a_series_sums_tokens_and_speeds_and_tells_failed_from_left():
    series = lmgateway.Series(0)
    ended(series, 50, total_ms=11_000, prompt_tokens=100, cached_tokens=20, completion_tokens=30, prompt_ms=400.0,
          generation_ms=1500.0)
    ended(series, 119, prompt_tokens=100, completion_tokens=10, generation_ms=1000.0)
    for outcome, operation in (("failed", "upstream_error"), ("abandoned", "client_disconnected"), ("failed", "stopped")):
        ended(series, 119, outcome=outcome, operation=operation, queued_ms=5)
    found = series_of(series)
    (row,) = found["rows"]
    wanted = {"t": "1970-01-01T00:01:00Z", "requests": 5, "errors": 1, "abandoned": 2, "promptTokens": 200, "gpuMs": 2900,
              "cachedTokens": 20, "completionTokens": 40, "promptTokensPerSecond": 200.0, "tokensPerSecond": 16.0}
    assert {name: row[name] for name in wanted} == wanted
    assert row["reading"]["p50"] == pytest.approx(200, rel=0.1) and row["queuedMs"]["p95"] == pytest.approx(5, rel=0.1)
    assert found["total"] == {name: value for name, value in row.items() if name != "t"}


def test_what_the_log_tells_later_takes_the_place_of_what_was_counted():
    series = lmgateway.Series(0)
    first = ended(series, 60, completion_tokens=3, generation_ms=50.0, model=None, model_asked="alias")
    for _ in range(2):
        first = ended(series, 60, completion_tokens=30, generation_ms=1000.0, before=first)
    (row,) = series_of(series)["rows"]
    assert (row["requests"], row["completionTokens"], row["tokensPerSecond"]) == (1, 30, 30.0)
    assert row["writing"]["p95"] == pytest.approx(30, rel=0.1)
    named = series_of(series, by="model")["rows"]
    assert named["m/one"][0]["requests"] == 1 and named.get("alias", []) == []


def test_a_series_is_told_apart_by_model_key_and_who_asked():
    series = lmgateway.Series(0)
    for about in ({}, {"user": "ben"}, {"key": None, "agent": "OpenAI/Python 2.1"}, {"key": None, "client": "::1"},
                  {"key": None, "source": "lmstudio", "model": None, "model_asked": "m/two"}):
        ended(series, 60, **about)
    counts = {by: {name: sum(row["requests"] for row in rows) for name, rows in series_of(series, by=by)["rows"].items()}
              for by in lmgateway.BY[1:]}
    assert counts == {"model": {"m/one": 4, "m/two": 1}, "key": {"anna": 2, "no key": 2, "not via gateway": 1},
                      "user": {"anna": 1, "ben": 1, "OpenAI/Python": 1, "::1": 1, "not via gateway": 1}}


def test_a_series_forgets_after_a_day_and_is_bounded_whoever_asks():
    series = lmgateway.Series(0)
    for minute in range(2000):
        ended(series, 60 * minute, client=str(minute), key=None)
    cells = series.cells(0)
    assert min(minute for minute, *_ in cells) == 2000 - 1440 and series.since == 60 * (2000 - 1440)
    assert [row["requests"] for row in series_of(series, 3600)["rows"]] == [40, *[60] * 23, 20]
    for number in range(500):
        ended(series, 60 * 1999, client=f"client {number}", key=None)
    assert len([1 for minute, *_ in series.cells(0) if minute == 1999]) == lmgateway.CELLS + 1
    assert sum(row["requests"] for row in series_of(series, 3600)["rows"]) == 1440 + 500
    assert len(series_of(series, by="user")["rows"]) <= lmgateway.MOST_NAMES + 1


@pytest.mark.parametrize("minutes, step", [(1, 60), (360, 60), (361, 300), (1800, 300), (1801, 3600), (10080, 3600)])
def test_the_step_of_a_series_is_the_smallest_that_fits(front, minutes, step):
    found = page(front, f"/debug/series?minutes={minutes}")
    begin, end = (lmgateway.since_epoch(found[name], 0) for name in ("from", "to"))
    assert (found["step"], end - begin) == (step, 60 * minutes) and abs(end - time.time()) < 10


@pytest.mark.parametrize("query", ["minutes=0", "minutes=10081", "minutes=1.5", "minutes=", "minutes=-1",
                                   "minutes=%D9%A3", "by=", "by=prompt", "minutes=5&by=key,model"])
def test_a_series_that_there_is_not_is_refused_by_name(front, query):
    status, _, body = fetched(front, f"/debug/series?{query}")
    assert (status, json.loads(body)["error"]["message"].split("=")[0]) == (400, query.split("&")[-1].split("=")[0])


def test_a_series_counts_every_request_and_the_history_those_before_this_start(fronts, studio, tmp_path):
    history = lmgateway.History(str(tmp_path / "h.db"))
    yesterday, week = time.time() - 23 * 3600, time.time() - 7 * 86400
    history.keep([lmgateway.history_row(finished_record(f"r{at}", at)) for at in (week - 7200, week + 7200, yesterday)])
    front = fronts(requests_kept=2)
    front.gateway.history, front.hub._keep, mark = history, history.keep, front.hub.last
    studio.script = lambda peer: peer.send(plain(CHAT_WHOLE))
    for _ in range(5):
        talk(front.port, request(POST_CHAT, b'{"model":"m/asked"}'))
    studio.script = lambda peer: peer.send(plain(b'{"error":"x"}', "500 Oops"))
    talk(front.port, request(POST_CHAT, b"{}"))
    front.events(mark, "error")
    history.close()
    for minutes, requests in ((60, 6), (1440, 7), (10080, 8)):
        found = page(front, f"/debug/series?minutes={minutes}")
        sums = [sum(row[name] for row in found["rows"]) for name in ("requests", "errors", "promptTokens")]
        assert sums == [requests, 1, 105 + 70 * (requests - 6)]
        assert all(lmgateway.since_epoch(row["t"], 0) % found["step"] == 0 for row in found["rows"])
    assert page(front, "/debug/series?by=model")["total"]["qwen/qwen3-8b"]["requests"] == 5
    history.path = str(tmp_path)
    assert fetched(front, "/debug/series?minutes=60")[0] == 503


def test_usage_comes_from_the_history_as_json_and_csv(fronts, studio, tmp_path):
    front, history = fronts(), lmgateway.History(str(tmp_path / "h.db"))
    assert fetched(front, "/debug/usage")[0] == 404
    front.gateway.history, front.hub._keep = history, history.keep
    studio.script = lambda peer: peer.send(plain(CHAT_WHOLE))
    talk(front.port, request("POST /v1/chat/completions", b'{"model":"=cmd"}'))
    front.hub.count()
    history.close()
    answer = json.loads(fetched(front, "/debug/usage?by=model&since=1h")[2])
    assert [(row["model"], row["requests"], row["promptTokens"])
            for row in answer["rows"]] == [("qwen/qwen3-8b", 1, 21)]
    status, head, body = fetched(front, "/debug/usage?by=day&format=csv")
    assert b"text/csv" in head and body.startswith(b"day,requests,errors,promptTokens,cachedTokens,completionTokens,")
    assert lmgateway.csv_text([{"model": "=cmd", "requests": 1}], "model").splitlines()[1] == "'=cmd,1"
    assert fetched(front, "/debug/usage?by=prompt")[0] == 400
    assert fetched(front, "/debug/usage?since=yesterday")[0] == 400


def test_an_unknown_request_is_not_found(front):
    assert fetched(front, "/debug/requests/req_none")[0] == 404


# --- the gateway's own pages

def page(front, path):
    """The JSON of one of the gateway's pages."""
    status, _, body = fetched(front, path)
    assert status == 200
    return json.loads(body)


def test_status_says_what_goes_on(fronts, studio):
    def script(peer):
        if peer.line.startswith("GET"):
            return peer.send(plain(b'{"lmstudio":true}'))
        asked = json.loads(peer.body)
        if asked["model"] == "slow":
            here.set()
            go.wait(PATIENCE_S)
        bad = asked["model"] == "bad"
        return peer.send(plain(b'{"error":"no"}', "500 Oops") if bad else plain(CHAT_WHOLE))

    front, here, go, studio.script = fronts(), threading.Event(), threading.Event(), script
    idle = page(front, "/debug/status")
    assert (idle["status"], idle["currentOperation"], idle["activeModel"]) == ("ok", "idle", None)
    assert (idle["recentRequests"], idle["running"]) == ([], [])
    assert (idle["totalRequests"], idle["totalErrors"]) == (0, 0)
    assert idle["log"] == {"enabled": False} and idle["lmstudio"] == {"up": True, "reason": None}
    for model in ("good", "bad"):
        talk(front.port, request(POST_CHAT, json.dumps({"model": model}).encode()))
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"model":"slow"}'))
        assert here.wait(PATIENCE_S)
        data = page(front, "/debug/status")
        assert (data["currentOperation"], data["activeModel"]) == ("waiting", "slow")
        assert [record["model"] for record in data["running"]] == ["slow"]
        assert [record["model"] for record in data["recentRequests"]] == ["bad", "qwen/qwen3-8b"]
        assert (data["totalRequests"], data["totalErrors"]) == (3, 1)
        go.set()
        rest_of(sock)
    assert not {"key", "token"} & set(data["gateway"]) and data["gateway"]["keyNeeded"] is False


def test_status_says_what_the_monitor_reads_and_how_far_behind_it_is(fronts, tmp_path):
    logs = Logs(tmp_path / "server-logs", from_start=True)
    logs.write("2026-05-01.1", "hello", "whatever")
    front = fronts(monitor=logs.monitor)
    assert page(front, "/debug/status")["log"]["enabled"] is True
    logs.look(1)
    found = page(front, "/debug/status")["log"]
    assert {name: found[name] for name in ("directory", "file", "entries")} == {
        "directory": str(logs.directory), "file": str(logs.path("2026-05-01.1")), "entries": 2}
    assert found["position"] == found["bytesRead"] == 2 * len(HEADER) + len("hello\nwhatever\n")
    assert found["lastEntryAt"] and found["unknownLines"] == 2 and found["behindBytes"] == 0
    with logs.path("2026-05-01.1").open("ab") as file:
        file.write(b" " * (lmgateway.PIECE + 7))
    logs.monitor.step()
    assert page(front, "/debug/status")["log"]["behindBytes"] == logs.follower.behind > 0


def test_status_without_lm_studio_says_why(fronts):
    port = 9    # discard: a free one of the system's choice may be another test's a moment later
    front = fronts(f"http://127.0.0.1:{port}")
    data = page(front, "/debug/status")
    assert (data["status"], data["lmstudio"]["up"]) == ("degraded", False)
    assert f"not reachable at http://127.0.0.1:{port}" in data["lmstudio"]["reason"]
    status, _, body = fetched(front, "/ready")
    assert status == 503 and json.loads(body)["error"]["message"] == data["lmstudio"]["reason"]
    assert "lmstudio_up 0" in fetched(front, "/metrics")[2].decode().splitlines()


def test_requests_are_shown_newest_first_and_one_with_its_timeline(fronts, studio):
    front, studio.script = fronts(requests_kept=3), lambda peer: peer.send(plain(CHAT_WHOLE))
    for number in range(5):
        talk(front.port, request(f"{POST_CHAT}?api_key=x", b'{"model":"m%d"}' % number, "User-Agent: test"))
    shown = page(front, "/debug/requests")["requests"]
    assert [record["modelAsked"] for record in shown] == ["m4", "m3", "m2"]
    newest = {"method": "POST", "path": "/v1/chat/completions", "model": "qwen/qwen3-8b", "state": "done",
              "status": 200, "client": "127.0.0.1", "key": None, "stream": False, "userAgent": "test",
              "tokenUsage": COUNTS, "finishReason": "stop", "error": None, "source": "gateway"}
    assert {name: shown[0][name] for name in newest} == newest
    one = page(front, f"/debug/requests/{shown[0]['requestId']}")
    assert {name: one[name] for name in newest} == newest
    assert [row["event"] for row in one["timeline"]] == ["inference_start", "inference_complete"]
    assert all(row["data"]["requestId"] == one["requestId"] and row["ms"] >= 0 for row in one["timeline"])


def test_metrics_are_those_of_the_requests_that_are_kept(fronts, studio):
    front = fronts()
    empty = page(front, "/debug/metrics")["performance"]
    assert (empty["totalRequests"], empty["errorRate"], empty["avgResponseTimeMs"]) == (0, 0, None)
    studio.script = lambda peer: peer.send(plain(V0_WHOLE))
    for _ in range(3):
        talk(front.port, request("POST /api/v0/chat/completions", b"{}"))
    times = sorted(record["totalTimeMs"] for record in page(front, "/debug/requests")["requests"])
    data = page(front, "/debug/metrics")
    wanted = {"totalRequests": 3, "totalErrors": 0, "errorRate": 0, "totalTokensProcessed": 3 * 24,
              "minResponseTimeMs": times[0], "medianResponseTimeMs": times[1], "p95ResponseTimeMs": times[2],
              "maxResponseTimeMs": times[2], "avgResponseTimeMs": round(sum(times) / 3, 2),
              "avgTokensPerSec": 48.2}
    assert {name: data["performance"][name] for name in wanted} == wanted
    assert data["performance"]["tokenStats"]["promptTokens"] == 3 * 21
    assert data["system"]["uptime"] >= 0 and data["system"]["threads"] > 1 and data["system"]["version"]


def json_of(data):
    return json.loads(split_answer(data)[2])


def ask(front, line, *headers, body=b""):
    """(status, [(name, value)], body) of one request."""
    first, found, rest = split_answer(talk(front.port, request(line, body, *headers)))
    return int(first.split()[1]), found, rest


def test_health_says_that_the_gateway_is_up(front):
    status, headers, body = ask(front, "GET /health")
    data = json.loads(body)
    assert (status, data["status"], data["version"]) == (200, "ok", lmgateway.VERSION) and data["uptime"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", data["timestamp"])
    assert dict(headers)["Content-Type"] == "application/json; charset=utf-8" and "Date" in dict(headers)


@pytest.mark.parametrize("route", lmgateway.ROUTES, ids=lambda route: route.path)
def test_each_route_knows_its_methods_and_head(front, studio, route):
    path = route.path.replace("/*", "/req_1")
    methods = [other.method for other in lmgateway.ROUTES if other.path == route.path]
    for method in set(lmgateway.METHODS) - {"HEAD", "OPTIONS", *methods}:
        status, headers, body = ask(front, f"{method} {path}")
        assert (status, json.loads(body)["error"]["code"]) == (405, "method_not_allowed")
        assert dict(headers)["Allow"] == ", ".join(methods).replace("GET", "GET, HEAD")
    status, _, body = ask(front, f"HEAD {path}")
    assert body == b"" and (status == 405) == ("GET" not in methods)
    assert not [peer for peer in studio.peers if "greeting" not in peer.line
                and "/models" not in peer.line]   # our own
    assert ask(front, f"OPTIONS {path}")[0] == 200 and studio.peers[-1].line.startswith("OPTIONS")


def hangs(listener):
    """Nobody accepts, and the queue is full: a connection attempt gets no answer."""
    listener.listen(0)
    for _ in range(4):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
        yield sock


def accepts_only(listener):
    listener.listen(8)
    yield


def is_closed(listener):
    listener.close()
    yield


@pytest.mark.parametrize("state", [hangs, accepts_only, is_closed], ids=lambda state: state.__name__)
def test_ready_and_greeting_answer_in_time_when_lm_studio_does_not(fronts, state, monkeypatch):
    monkeypatch.setattr(lmgateway, "QUESTION_S", 0.2)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    front = fronts(f"http://127.0.0.1:{listener.getsockname()[1]}")
    held = list(state(listener))
    for path in ("/lmstudio-greeting", "/ready"):
        started = time.monotonic()
        status, headers, body = ask(front, f"GET {path}")
        assert (status, json.loads(body)["error"]["code"]) == (503, "upstream_unreachable")
        assert time.monotonic() - started < 0.5 and "Retry-After" in dict(headers)
    listener.close()
    for sock in filter(None, held):
        sock.close()


@pytest.mark.parametrize(("answer", "up"), [
    (plain(b'{"lmstudio":true}'), True), (plain(b'{"error":"Unexpected endpoint"}'), True),
    (plain(b"no", "401 Unauthorized"), True),
    (plain(b"bad", "502 Bad Gateway"), False), (b"220 ftp\r\n\r\n", False)])
def test_ready_when_lm_studio_answers(fronts, studio, answer, up):
    front, studio.script = fronts(), lambda peer: peer.send(answer)
    assert ask(front, "GET /ready")[0] == (200 if up else 503)
    status, _, body = ask(front, "GET /lmstudio-greeting")
    assert status == (200 if up else 503) and (json.loads(body) == {"lmstudio": True}) == up
    assert len(studio.peers) == 1 and studio.peers[0].line == "GET /lmstudio-greeting HTTP/1.1"
    age(front.gateway.upstream._health, 4)      # remembered for a few seconds only
    assert ask(front, "GET /ready")[0] == (200 if up else 503) and len(studio.peers) == 2


def test_a_slow_lm_studio_is_ready_and_greets_from_what_is_known(fronts, studio, monkeypatch):
    assert lmgateway.GREETING_S < 0.5
    monkeypatch.setattr(lmgateway, "GREETING_S", 0.1)
    front, go, pause = fronts(), threading.Event(), threading.Event()
    go.set()
    studio.script = lambda peer: (pause.wait(0.15), go.wait(PATIENCE_S),
                                  peer.send(plain(b'{"lmstudio":true}')))
    assert ask(front, "GET /ready")[0] == 200
    front.gateway.upstream._health._known = (-1e9, "")
    go.clear()
    started = time.monotonic()
    assert ask(front, "GET /lmstudio-greeting")[0] == ask(front, "GET /lmstudio-greeting")[0] == 200
    assert time.monotonic() - started < 0.5 and len(studio.peers) == 2      # two answers, one question
    go.set()
    until(lambda: front.gateway.upstream._health._asking is None)


def test_names_are_kept_short_whatever_a_request_brings(front, studio):
    studio.script = lambda peer: peer.send(plain(b'{"model": "%b", "choices": []}' % (b"x" * 300_000)))
    mark = front.hub.last
    ask(front, POST_CHAT, body=json.dumps({"model": "y" * 300_000}).encode())
    assert len(json.loads(studio.peers[0].body)["model"]) == 300_000
    events = front.events(mark, "inference_start") + front.events(mark, "inference_complete")
    assert [len(event["model"]) for event in events] == [lmgateway.LONGEST_NAME] * 2
    ask(front, POST_CHAT, body=b'{"model": "a\\ud800"}')       # no text that a file could hold
    assert front.events(mark, "inference_start", count=2)[1]["model"] == "a?"


@pytest.mark.parametrize("header", ["Upgrade: WebSocket", "Host: other", "Content-Length: x", "Expect: a-miracle",
                                    "bare\rreturn: x"])
def test_errors_have_the_shape_of_the_api_that_was_called(front, header):
    """Also those of heads that are refused."""
    *anthropic, openai = (json_of(talk(front.port, request(f"POST {path}", b"", header)))
                          for path in ("/v1/messages?beta=true", "/messages", "/v1/chat/completions"))
    assert openai == {"error": {name: openai["error"][name] for name in ("message", "type", "code")}}
    assert anthropic == 2 * [{"type": "error", "error": openai["error"]}]


def test_other_upgrades_are_ignored(front, studio):
    assert ask(front, "GET /v1/models", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
               "HTTP2-Settings: x")[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/debug/stream", "/debug/status", "/debug/requests", "/debug/requests/x",
                                  "/debug/usage", "/debug/usage?by=x", "/debug/metrics", "/metrics", "/me", "/lmstudio-greeting"])
@pytest.mark.parametrize("key", [(), (f"X-API-Key: {'k' * 8}",)], ids=["stranger", "guest"])
def test_nothing_of_ours_is_stored_or_sniffed(fronts, path, key):
    with dial(fronts(api_key={"anna": "k" * 8}).port) as sock:
        sock.sendall(request(f"HEAD {path}", b"", *key))
        head = rest_of(sock)
    assert b"\r\nCache-Control: no-store\r\n" in head and b"\r\nX-Content-Type-Options: nosniff\r\n" in head


# --- /debug/stream

UTC_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@contextlib.contextmanager
def listening(front, query="", *headers, close=False):
    """A socket that listens to /debug/stream, and its decoded frames as an iterator of (id, name, data)."""
    before = front.hub.listeners
    with dial(front.port) as sock:
        sock.sendall(request(f"GET /debug/stream{query}", b"", *headers, close=close))
        head, _, data = read_until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")
        yield sock, head, frames_of(sock, data)
    deadline = time.monotonic() + PATIENCE_S
    while front.hub.listeners > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert front.hub.listeners == before, "a listener that left was not noticed"


def frames_of(sock, data):
    chunks = lmgateway.Chunks()
    text = chunks.feed(data)
    while True:
        while b"\n\n" in text:
            frame, text = text.split(b"\n\n", 1)
            fields = dict(line.split(": ", 1) for line in frame.decode().split("\n"))
            yield fields["id"], fields["event"], json.loads(fields["data"]), fields.get("retry")
        piece = b"" if chunks.over else sock.recv(65536)
        if not piece:
            return
        text += chunks.feed(piece)


def tell(hub, name, **data):
    hub.publish([Event(name, {"timestamp": hub.now(), **data})])


def test_the_stream_begins_with_connected_and_goes_on_with_events(front):
    with listening(front) as (_, head, frames):
        for header in (b"Content-Type: text/event-stream; charset=utf-8", b"Cache-Control: no-store",
                       b"X-Accel-Buffering: no"):
            assert header in head.split(b"\r\n")
        last, name, data, retry = next(frames)
        assert (last, name, retry) == (front.hub.event_id(front.hub.last), "connected",
                                       "2000") and data["message"]
        assert re.fullmatch(UTC_TIME, data["timestamp"])
        tell(front.hub, "one", text="\u2028\n\r\x00 \ud800")
        event_id, name, data, _ = next(frames)
        assert (event_id, name, data["text"]) == (front.hub.event_id(front.hub.last), "one",
                                                  "\u2028\n\r\x00 \ud800")


def test_a_listener_that_comes_back_gets_each_event_that_it_missed_once(front):
    """By its Last-Event-ID, which counts before the since of an EventSource's address."""
    mark, event_id = front.hub.last, front.hub.event_id
    for number in range(5):
        tell(front.hub, "even" if number % 2 == 0 else "odd", number=number)
    known, missed = event_id(mark + 2), [event_id(mark + seq) for seq in (3, 4, 5)]
    for query, header in (("", [f"Last-Event-ID: {known}"]), (f"?since={known}", []),
                          (f"?since={event_id(mark)}", [f"Last-Event-ID: {known}"])):
        with listening(front, query, *header) as (_, _, frames):
            assert next(frames)[:2] == (known, "connected")
            assert [next(frames)[0] for _ in missed] == missed
    with listening(front, f"?events=%20odd&events=gap,none&since={event_id(mark)}") as (_, _, frames):
        assert [next(frames)[1:3:2] for _ in range(3)] == [("connected",), ("odd",), ("odd",)]


@pytest.mark.parametrize("before", [0, 1])
def test_a_listener_of_another_start_is_told_at_once_that_nobody_knows_what_it_missed(fronts, before):
    front = fronts()
    for _ in range(before):
        tell(front.hub, "one")
    with listening(front, "?events=one,two", "Last-Event-ID: 0ther-41") as (_, _, frames):
        assert next(frames)[1] == "connected"
        _, name, data, _ = next(frames)
        assert (name, data["from"], data["to"], data["count"]) == ("gap", "0ther-42", front.hub.event_id(0), None)
        assert re.fullmatch(UTC_TIME, data["timestamp"])
        assert [next(frames)[:2] for _ in range(before)] == [(front.hub.event_id(1), "one")] * before
        tell(front.hub, "two")
        assert next(frames)[1] == "two"     # and no second gap


def test_what_the_ring_no_longer_holds_is_told_as_a_gap(fronts):
    front = fronts()
    front.hub.publish([Event("n", {"timestamp": "x"})] * 15_000)
    first = 5001
    for query in ("", "&events=n"):
        with listening(front, f"?since={front.hub.event_id(10)}{query}") as (_, _, frames):
            assert next(frames)[:2] == (front.hub.event_id(10), "connected")
            event_id, name, data, _ = next(frames)
            assert (event_id, name, data["from"], data["to"], data["count"]) == (
                front.hub.event_id(10), "gap", front.hub.event_id(11), front.hub.event_id(first - 1),
                first - 11)
            assert next(frames)[0] == front.hub.event_id(first)


def frames_for(hub, *names):
    """stream_frames() without a socket."""
    listener = types.SimpleNamespace(connection=types.SimpleNamespace(), identity=lmgateway.Identity(None))
    return contextlib.closing(lmgateway.stream_frames(hub, "", names, listener))


def test_what_is_published_while_a_listener_connects_is_not_lost():
    """Between its place in the stream and its first look at the ring."""
    hub = lmgateway.Hub()
    with frames_for(hub) as frames:
        assert b"event: connected" in next(frames)
        tell(hub, "between")
        assert bytes(next(frames)).startswith(f"id: {hub.event_id(1)}\nevent: between".encode())
        tell(hub, "last words")
        hub.close()
        assert [bytes(frame).splitlines()[1] for frame in frames] == [b"event: last words"]     # and then it ends


def test_listeners_that_read_nothing_cost_next_to_nothing():
    """As many as a browser's tabs, each in the middle of a write."""
    hub = lmgateway.Hub()
    with tracing() as peak, contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(frames_for(hub)) for _ in range(16)]
        for number, frames in enumerate(listeners):
            assert b"connected" in next(frames)
        for _ in range(600):
            hub.publish([Event("n", {"timestamp": "x", "text": "🦊" * 50_000})])        # 200 kB, 120 MB in all
            for frames in listeners[_ // 40:_ // 40 + 1]:
                assert len(next(frames)) <= lmgateway.PIECE
        assert peak() < 45_000_000


def test_a_client_that_does_not_read_holds_nobody_up_and_is_told_what_it_lost(fronts):
    front, filler = fronts(), "x" * 1000
    with listening(front, "?events=last") as (_, _, quick), contextlib.closing(socket.socket()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(PATIENCE_S)
        slow.connect(("127.0.0.1", front.port))
        slow.sendall(request("GET /debug/stream", close=False))
        first = read_until(slow, b"event: connected").partition(b"\r\n\r\n")[2]
        next(quick)
        for _ in range(36):
            front.hub.publish([Event("n", {"timestamp": "x", "text": filler})] * 500)
        tell(front.hub, "last")
        assert next(frame for frame in quick if frame[1] != "gap")[1] == "last"     # a busy machine may make one
        seqs, lost, name = [], [], ""
        frames = frames_of(slow, first)
        while name != "last":
            event_id, name, data, _ = next(frames)
            if name == "gap":
                first, last = (int(data[end].partition("-")[2]) for end in ("from", "to"))
                lost += range(first, last + 1)      # a busy machine may make two gaps
                assert data["count"] == last + 1 - first and event_id == front.hub.event_id(seqs[-1])
            elif name != "connected":
                seqs.append(int(event_id.partition("-")[2]))
        assert lost and sorted(seqs + lost) == list(range(1, 18_002))
        assert seqs == sorted(seqs)


def test_silence_is_broken_by_pings_that_repeat_the_id_of_the_listeners_latest_event(front, monkeypatch):
    assert lmgateway.PING_S == 15
    monkeypatch.setattr(lmgateway, "PING_S", 0.02)
    with listening(front, "?events=wanted") as (_, _, frames):
        last = next(frames)[0]
        for _ in range(2):
            event_id, name, data, _ = next(frames)
            assert (event_id, name, list(data)) == (last, "ping", ["timestamp"])
        front.hub.publish([Event(name, {"timestamp": "x"}) for name in ("other", "wanted", "other")])
        wanted = next(frame for frame in frames if frame[1] == "wanted")[0]
        assert (wanted, next(frames)[:2]) == (front.hub.event_id(front.hub.last - 1), (wanted, "ping"))


def test_events_that_a_listener_does_not_want_do_not_put_its_ping_off(front, monkeypatch):
    monkeypatch.setattr(lmgateway, "PING_S", 0.05)
    quiet = threading.Event()
    talker = threading.Thread(target=lambda: [tell(front.hub, "other") for _ in iter(lambda: quiet.wait(0.001), True)])
    with listening(front, "?events=wanted") as (_, _, frames):
        next(frames)
        talker.start()
        try:
            assert next(frames)[1] == "ping"
        finally:
            quiet.set()
            talker.join()


def test_the_stream_ends_in_order_when_the_gateway_stops(fronts):
    front = fronts()
    with listening(front) as (_, _, frames):
        next(frames)
        front.hub.close()
        assert list(frames) == []
    until(lambda: not front.watched)       # its connection is not looked after any more


def test_a_head_of_the_stream_has_no_end_to_wait_for(front):
    started = time.monotonic()
    status, headers, body = ask(front, "HEAD /debug/stream")
    assert (status, body) == (200, b"") and time.monotonic() - started < 5 and front.hub.listeners == 0


def test_a_listener_over_http_1_0_is_served(front):
    with dial(front.port) as sock:
        sock.sendall(b"GET /debug/stream HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert b"chunked" not in read_until(sock, b"event: connected")


# --- keys and walls

KEYS = {"anna": "sk-lm-abcdefgh:abcdefghijklmnopqrst", "ben": "other="}
ANNA = KEYS["anna"]


@pytest.fixture
def guarded(fronts, studio):
    return fronts(api_key=KEYS)


@pytest.mark.parametrize(("headers", "name"), [
    ([f"Authorization: Bearer {ANNA}"], "anna"), ([f"authorization: bearer   {ANNA}"], "anna"),
    ([f"X-API-Key: {ANNA}"], "anna"),
    (["x-api-key: other="], "ben"), (["Authorization: Bearer wrong", "X-API-Key: other="], "ben"),
    ([], None), (["Authorization: Bearer wrong"], None), ([f"Authorization: Basic {ANNA}"], None),
    (["X-API-Key: other"], None),
    ([f"Authorization: {ANNA}"], None), (["Authorization: Bearer "], None), (["X-API-Key: oth\xe9r="], None),
    ([f"Cookie: lmgateway_session={ANNA}"], None), ([f"X-API-Key: {ANNA}", f"X-API-Key: {ANNA}"], None)])
def test_keys(guarded, studio, headers, name):
    status, found, body = ask(guarded, POST_CHAT, *headers, body=b"{}")
    if name is None:
        assert (status, dict(found)["WWW-Authenticate"]) == (401, "Bearer") and not studio.peers
        assert json.loads(body)["error"]["type"] == "authentication_error"
        assert guarded.hub.last == 0
    else:
        assert status == 200 and guarded.events(0, "inference_start")[0]["key"] == name
        assert not [row for row in studio.peers[0].headers if ANNA in row[1] or "other" in row[1]]


@pytest.mark.parametrize("path", ["/debug/stream", "/debug/status", "/debug/requests", "/debug/metrics",
                                  "/metrics", "/v1/models", "/debug/requests/req_1", "/debug/usage",
                                  "/debug/nothing", "//debug/status"])
def test_what_asks_for_a_key(guarded, studio, path):
    assert ask(guarded, f"GET {path}")[0] == 401 and not studio.peers


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/lmstudio-greeting"])
def test_what_is_open(guarded, path):
    assert ask(guarded, f"GET {path}")[0] == 200


def test_health_can_ask_for_a_key_too(fronts):
    front = fronts(api_key=KEYS, require_auth_for_health=True)
    for path in ("/health", "/ready"):
        assert ask(front, f"GET {path}")[0] == 401
        assert ask(front, f"GET {path}", f"X-API-Key: {ANNA}")[0] == 200


def test_a_key_in_the_query_counts_on_debug_pages_only_and_is_told_to_nobody(guarded, studio, caplog):
    lmgateway.log.propagate = True
    with caplog.at_level(logging.DEBUG):
        for path, status in (("/debug/status", 200), ("/debug/requests", 200), ("/v1/models", 401),
                             ("/health", 200)):
            for method in ("GET", "HEAD"):
                assert ask(guarded, f"{method} {path}?a=1&api_key={ANNA}")[0] == status
        assert ask(guarded, f"POST /debug/status?api_key={ANNA}")[0] == 405
        assert ask(guarded, f"POST /debug/nothing?api_key={ANNA}")[0] == 401
        for query, left in ((f"?api_key={ANNA}", ""), (f"?a=1&api_key={ANNA}&b=2", "?a=1&b=2"),
                            ("?%61pi_key=x&a", "?a"), ("?", "?")):
            ask(guarded, f"GET /debug/nothing{query}", f"X-API-Key: {ANNA}")
            assert studio.peers[-1].line == f"GET /debug/nothing{left} HTTP/1.1"
    assert ANNA not in caplog.text


def session(front, key=ANNA):
    """The cookie of a new session."""
    answer = ask(front, "POST /login", body=json.dumps({"key": key}).encode())
    return dict(answer[1])["Set-Cookie"].split(";")[0]


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_login_gives_a_cookie_that_stops_here(guarded, studio, kind):
    def login(key):
        body = json.dumps({"key": key}) if "json" in kind else urllib.parse.urlencode({"key": key})
        return ask(guarded, "POST /login", f"Content-Type: {kind}; charset=utf-8", body=body.encode())

    assert login("wrong")[0] == 401
    status, headers, _ = login(ANNA)
    cookie, attributes = dict(headers)["Set-Cookie"].split("; ", 1)
    assert status == 200 and attributes == "Path=/; HttpOnly; SameSite=Strict" and ANNA not in cookie
    assert dict(headers)["Cache-Control"] == "no-store"
    assert ask(guarded, "GET /debug/status", f"Cookie: a=1; {cookie}; b=2")[0] == 200
    assert ask(guarded, POST_CHAT, f"Cookie: a=1; {cookie}", "Cookie: b=2", body=b"{}")[0] == 200
    assert [row for row in studio.peers[-1].headers
            if row[0] == "Cookie"] == [("Cookie", "a=1"), ("Cookie", "b=2")]
    assert guarded.events(0, "inference_start")[0]["key"] == "anna"
    assert ask(guarded, "GET /debug/status", f"Cookie: {cookie}x")[0] == 401


def test_each_key_has_so_many_sessions_and_puts_out_its_own(guarded):
    other, first, *more = session(guarded, "other="), *(
        session(guarded) for _ in range(lmgateway.AccessControl.SESSIONS + 1))
    known = [ask(guarded, "GET /debug/status", f"Cookie: {cookie}")[0] for cookie in (other, first, *more)]
    assert known == [200, 401, *[200] * len(more)]


def test_two_gateways_on_one_host_keep_their_cookies_apart(fronts, studio):
    one, other = fronts(api_key=KEYS), fronts(api_key=KEYS)
    both = f"Cookie: {session(one)}; {session(other)}; x=1"
    for front in (one, other):
        assert ask(front, "GET /v1/models", both)[0] == 200
        assert studio.peers[-1].header("cookie") == "x=1"


def test_logout_ends_the_session_here_and_in_the_browser(guarded):
    left, stays = session(guarded), session(guarded)
    status, headers, _ = ask(guarded, "POST /logout", f"Cookie: {left}")
    assert status == 200 and dict(headers)["Set-Cookie"].startswith(left.partition("=")[0] + "=; ")
    assert "; Max-Age=0" in dict(headers)["Set-Cookie"]
    assert [ask(guarded, "GET /debug/status", f"Cookie: {cookie}")[0] for cookie in (left, stays)] == [401, 200]
    assert ask(guarded, "POST /logout", "Origin: https://evil.example", f"Cookie: {stays}")[0] == 403
    assert ask(guarded, "POST /logout")[0] == 200       # twice is once


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"key": 7}', b'{"key": null}',
                                  b'{"key": "sk-\\ud800"}', b"\xff", b'{"key": ""}'])
def test_login_with_anything_else_is_401(guarded, body):
    assert ask(guarded, "POST /login", "Content-Type: application/json", body=body)[0] == 401
    assert ask(guarded, "POST /login", "Content-Type: application/x-www-form-urlencoded", body=body)[0] == 401


def test_a_guesser_waits_and_its_neighbours_do_not(fronts, monkeypatch):
    """They share an address: its NAT's.  A right key that is new there waits like a wrong one, and is answered."""
    monkeypatch.setattr(lmgateway.AccessControl, "LONGEST_PAUSE_S", 0.2)
    front, known, new = fronts(api_key=KEYS), f"X-API-Key: {ANNA}", "X-API-Key: other="

    def timed(*headers):
        started = time.monotonic()
        return ask(front, "GET /debug/status", *headers)[0], time.monotonic() - started

    cookie = f"Cookie: {session(front)}"
    assert timed(known)[0] == 200
    for _ in range(lmgateway.AccessControl.FREE_FAILURES):
        assert timed("X-API-Key: wrong")[1] < 0.1
    with contextlib.ExitStack() as guesses:
        for number in range(8):
            guesses.enter_context(dial(front.port)).sendall(
                request("GET /debug/status", b"", f"X-API-Key: wrong{number}"))
        until(lambda: front.gateway.access._failures["127.0.0.1"][0] > 8)
        for headers, status in ((known, 200), (cookie, 200), ("X: none", 401)):
            assert timed(headers) == (status, pytest.approx(0, abs=0.15))
        assert timed("X-API-Key: wrong") == (401, pytest.approx(0.3, abs=0.12))
        assert timed(new) == (200, pytest.approx(0.3, abs=0.12))
        assert timed(new) == (200, pytest.approx(0, abs=0.15))


@pytest.mark.parametrize(("one", "other", "same"), [
    ("192.0.2.1", "192.0.2.2", False), ("::ffff:192.0.2.1", "192.0.2.1", True),
    ("2001:db8:1:2:3::4", "2001:db8:1:2::9", True), ("2001:db8:1:2::4", "2001:db8:1:3::4", False),
    ("fe80::1%eth0", "fe80::2", True), ("garbage:", "garbage", False)])
def test_an_ipv6_network_is_one_address_because_a_host_has_all_of_it(one, other, same):
    assert (lmgateway.network_of(one) == lmgateway.network_of(other)) == same


@pytest.mark.parametrize("offered", [*KEYS.values(), "wrong"])
def test_each_key_is_compared_in_constant_time_whichever_is_offered(guarded, monkeypatch, offered):
    compared, compare = [], lmgateway.hmac.compare_digest
    monkeypatch.setattr(lmgateway.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    status = ask(guarded, "GET /debug/status", f"X-API-Key: {offered}")[0]
    assert status == (401 if offered == "wrong" else 200)
    assert compared == [lmgateway.digest(key) for key in KEYS.values()]


def test_guesses_are_forgotten_after_a_while_and_any_number_of_them_is_a_pause(guarded, monkeypatch):
    monkeypatch.setattr(lmgateway.AccessControl, "LONGEST_PAUSE_S", 0.1)
    guarded.gateway.access._failures["127.0.0.1"] = 5000, time.monotonic()
    for minimum in (0.1, 0):
        started = time.monotonic()
        assert ask(guarded, "POST /login", body=b'{"key":"wrong"}')[0] == 401
        assert minimum <= time.monotonic() - started < minimum + 0.1
        monkeypatch.setattr(lmgateway.AccessControl, "FAILURES_S", -1.0)


def test_what_is_remembered_of_addresses_is_bounded():
    table = {}
    for number in range(20):
        lmgateway.remember(table, number, True, limit=7)
    assert list(table) == list(range(13, 20))


def test_client_credentials_are_replaced_by_lm_studios_own_token(fronts, studio):
    front = fronts(upstream_token="sk-lm-theirs")
    ask(front, "GET /v1/models", "Authorization: Bearer mine", "X-API-Key: mine")
    assert [row for row in studio.peers[0].headers if "uthor" in row[0] or "Key" in row[0]] == [
        ("Authorization", "Bearer sk-lm-theirs")]


@pytest.fixture
def keys(tmp_path, capsys, monkeypatch):
    """Runs a command on a keys file of its own; gives (status, stdout, stderr).  Changes are seen soon."""
    assert lmgateway.KeyFile.LOOK_S <= 1
    monkeypatch.setattr(lmgateway.KeyFile, "LOOK_S", 0.05)

    def run(*args):
        status = lmgateway.main(["--keys-file", str(tmp_path / "keys.json"), *args])
        return (status, *capsys.readouterr())
    run.path = tmp_path / "keys.json"
    return run


def test_minted_keys_work_at_once_with_their_rights_and_until_they_are_revoked(keys, fronts, studio):
    front = fronts(keys_file=str(keys.path))
    assert ask(front, "GET /v1/models")[0] == 200       # no key is asked for
    status, key, said = keys("--new-key", "anna")
    key = key.strip()
    assert status == 0 and re.fullmatch(r"sk-lm-[A-Za-z0-9]{8}:[A-Za-z0-9]{20}", key) and key not in said
    viewer, admin = keys("--new-key", "eve", "--rights",
                         "view")[1].strip(), keys("--new-key", "root", "--rights", "admin,infer")[1].strip()
    assert key not in keys.path.read_text() and os.stat(keys.path).st_mode & 0o777 == 0o600
    assert re.findall(r"(?m)^(\w+) +([\w,]+) +\d{4}-\d\d-\d\d$", keys("--list-keys")[1]) == [
        ("anna", "infer"), ("eve", "view"), ("root", "admin,infer")]
    until(lambda: ask(front, "GET /v1/models")[0] == 401)
    table = {(key, "GET /v1/models"): 200, (key, "GET /debug/status"): 403, (viewer, "GET /v1/models"): 403,
             (viewer, "GET /debug/status"): 200, (admin, "GET /debug/status"): 200}
    line = "POST /api/v1/models/load"
    table.update({(key, line): 403, (admin, line): 200})
    for (offered, line), status in table.items():
        found, _, body = ask(front, line, f"Authorization: Bearer {offered}")
        assert found == status, (line, body)
        if status == 403:
            error = json.loads(body)["error"]
            assert error["code"] == "right_missing" and "--rights" in error["message"]
    assert keys("--revoke-key", "anna")[0] == 0
    until(lambda: ask(front, "GET /v1/models", f"X-API-Key: {key}")[0] == 401)
    assert ask(front, "GET /debug/status", f"X-API-Key: {viewer}")[0] == 200
    away = keys.path.rename(keys.path.with_name("away"))      # opens no door
    until(lambda: ask(front, "GET /debug/status", f"X-API-Key: {viewer}")[0] == 401)
    assert ask(front, "GET /v1/models")[0] == 401
    away.rename(keys.path)
    front.gateway.access._file._asked = -1e9
    assert ask(front, "GET /debug/status", f"X-API-Key: {viewer}")[0] == 200


INFER_MAY = """GET /v1/models, POST /v1/chat/completions, POST /V1/Completions, POST /v1/anything/new, POST /chat/completions,
GET /models/qwen/x, POST /messages, POST //v1//responses, POST /%76%31/embeddings, POST /api/v0/embeddings, GET /api/v0/models,
HEAD /api/v1/models, GET /api/v1/models/download/status/1, POST /api/v1/chat""".replace("\n", " ").split(", ")
INFER_MAY_NOT = """POST /api/v1/models/load, POST //api/v1/models/load, POST /API/V1/Models/unload, POST /api/v1/models/%64ownload,
POST /api/v1/models%2Fload, POST /api/v0/models, GET /api/v1/settings, POST /api/v1/new, POST /api/v2/chat, GET /debug/nothing,
DELETE /api/v1/models/x, POST /api/v1/chat/x, GET /v12/models, PUT /models2, OPTIONS /api/v1/x""".replace("\n", " ").split(", ")


@pytest.fixture
def guest(fronts, tmp_path):
    """(a gateway, the header with a key that may infer and no more)."""
    path = tmp_path / "keys.json"
    with lmgateway.KeyFile(path).changing() as rows:
        rows.append(lmgateway.key_row(lmgateway.Key("guest", lmgateway.digest("g"), frozenset(["infer"]))))
    return fronts(keys_file=str(path)), "X-API-Key: g"


def test_the_right_to_infer_is_a_list_of_what_is_allowed(guest, studio):
    front, key = guest
    for line in INFER_MAY:
        assert ask(front, line, key, body=b"")[0] == 200, line
    asked = len(studio.peers)
    for line in INFER_MAY_NOT:
        status, _, body = ask(front, line, key, body=b"{}")
        assert (status, json.loads(body)["error"]["code"]) == (403, "right_missing"), line
    assert len(studio.peers) == asked == len(INFER_MAY)


TOOLS = {   # body, headers, is it let pass
    "none": (b'{"input": "hi"}', (), True), "empty": (b'{"integrations": []}', (), True),
    "some": (b'{"integrations": ["mcp/x"]}', (), False), "in a prompt": (b'{"input": "integrations"}', (), True),
    "escaped": (b'{"\\u0069ntegrations": ["mcp/x"]}', (), False),
    "UTF-16": ('{"integrations": ["mcp/x"]}'.encode("utf-16"), ("Content-Type: application/json; charset=utf-16",), False),
    "gzip": (gzip.compress(b'{"integrations": ["mcp/x"]}'), ("Content-Encoding: gzip",), False),
    "too deep to read": (b'{"integrations": ["x"], "a": ' + b"[" * 3000 + b"]" * 3000 + b"}", (), False),
    "too long to read": (b'{"integrations": ["x"], "a": "' + b"x" * 5_000_000 + b'"}', (), False),
    "long": (b'{"input": "' + b"x" * 5_000_000 + b'"}', (), True)}


@pytest.mark.parametrize("row", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("path", ["/api/v1/chat", "//API/v1/chat/"])
def test_tools_on_lm_studios_machine_need_admin(guest, guarded, studio, row, path):
    body, headers, allowed = row
    assert ask(guest[0], f"POST {path}", guest[1], *headers, body=body)[0] == (200 if allowed else 403)
    assert ask(guarded, f"POST {path}", f"X-API-Key: {ANNA}", *headers, body=body)[0] == 200
    assert [peer.body for peer in studio.peers] == [body] * (1 + allowed)


def test_a_minted_key_has_lm_studios_form_and_only_its_hash_is_kept(keys):
    status, key, said = keys("--new-key", "anna", "--rights", "view")
    key = key.strip()
    assert status == 0 and re.fullmatch(r"sk-lm-[A-Za-z0-9]{8}:[A-Za-z0-9]{20}", key) and key not in said
    assert json.loads(keys.path.read_text()) == {"keys": [{
        "name": "anna", "sha256": hashlib.sha256(key.encode()).hexdigest(), "rights": ["view"],
        "created": time.strftime("%Y-%m-%d")}]}
    assert os.stat(keys.path).st_mode & 0o777 == 0o600
    listed = keys("--list-keys", "--api-key", "fixed=1")[1]
    assert re.search(r"(?m)^fixed +admin,infer,view +GATEWAY_API_KEY$", listed)
    assert len({lmgateway.mint_key() for _ in range(100)}) == 100


def test_a_keys_file_may_lie_in_a_new_directory_beside_what_a_crash_left(tmp_path, capsys):
    path = tmp_path / "new" / "keys.json"
    args = ["--keys-file", str(path), "--new-key"]
    assert lmgateway.main([*args, "anna"]) == 0
    path.with_name("keys.json.new").write_text("half")      # readable by all
    assert lmgateway.main([*args, "ben"]) == 0 and os.stat(path).st_mode & 0o777 == 0o600
    assert sorted(path.parent.iterdir()) == [path, path.with_name("keys.json.lock")]
    assert [key.name for key in lmgateway.KeyFile(path).keys()] == ["anna", "ben"]


def test_keys_that_are_minted_at_once_are_all_there_and_unknown_fields_stay(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"format": 2, "keys": [{"name": "new", "sha256": "00", "rights": ["infer"], "limits": {"rpm": 3}}]}')

    def mint(number):
        with lmgateway.KeyFile(path).changing() as rows:
            known = len(rows)
            time.sleep(0.01)    # others have read by now, if nothing keeps them from it
            rows.append({"name": f"k{known}", "sha256": f"{number:02x}", "rights": []})

    threads = [threading.Thread(target=mint, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["keys"]] == ["new", *(f"k{number}" for number in range(1, 13))]
    assert content["format"] == 2 and content["keys"][0]["limits"] == {"rpm": 3}


def test_on_windows_a_change_has_one_byte_locked_and_outlasts_readers(tmp_path, monkeypatch):
    path, calls = tmp_path / "keys.json", []

    class Windows:      # msvcrt, by its documentation: the region begins at the file's position
        LK_LOCK, LK_UNLCK = "lock", "unlock"

        @staticmethod
        def locking(number, mode, size):
            calls.append((mode, os.lseek(number, 0, os.SEEK_CUR), size, path.exists()))

    def replace(draft, target, original=os.replace):
        monkeypatch.setattr(os, "replace", original)
        raise PermissionError(13, "Permission denied")      # somebody reads the old file

    monkeypatch.setitem(sys.modules, "msvcrt", Windows)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "replace", replace)
    with lmgateway.KeyFile(path).changing() as rows:
        rows.append({"name": "anna", "sha256": "00", "rights": []})
    assert calls == [("lock", 0, 1, False), ("unlock", 0, 1, True)]
    assert [key.name for key in lmgateway.KeyFile(path).keys()] == ["anna"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_keys_file_that_could_block_is_not_waited_for(fronts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert ask(fronts(keys_file=str(tmp_path / "pipe")), "GET /v1/models", "X-API-Key: x")[0] == 401


def test_a_keys_file_of_the_same_size_and_time_is_another_file(tmp_path):
    file = lmgateway.KeyFile(tmp_path / "keys.json")
    for name in ("anna", "benn"):
        with file.changing() as rows:
            rows[:] = [{"name": name, "sha256": "00", "rights": []}]
        os.utime(file.path, (1, 1))
        file._asked = -math.inf
        assert [key.name for key in file.keys()] == [name]


def test_keys_that_cannot_be_written_leave_those_that_are_there(keys, monkeypatch):
    def half(value, file, **how):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    keys("--new-key", "anna")
    before = keys.path.read_text()
    monkeypatch.setattr(lmgateway.json, "dump", half)
    status, out, error = keys("--new-key", "ben")
    assert (status, out) == (2, "") and "can be written" in error
    assert keys.path.read_text() == before


def until(holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_session_ends_with_its_key(keys, fronts):
    key = keys("--new-key", "anna", "--rights", "view")[1].strip()
    front = fronts(keys_file=str(keys.path))
    cookie = session(front, key)
    assert ask(front, "GET /debug/status", f"Cookie: {cookie}")[0] == 200
    keys("--revoke-key", "anna")
    until(lambda: ask(front, "GET /debug/status", f"Cookie: {cookie}")[0] == 401)


def revoked(front, keys, cookie):
    keys("--revoke-key", "anna")


def weakened(front, keys, cookie):
    with lmgateway.KeyFile(keys.path).changing() as rows:
        rows[0]["rights"] = ["infer"]


def logged_out(front, keys, cookie):
    ask(front, "POST /logout", cookie)


@pytest.mark.parametrize(("how", "change", "ends"), [
    ("key", revoked, True), ("query", revoked, True), ("cookie", revoked, True), ("key", weakened, True),
    ("cookie", weakened, True), ("cookie", logged_out, True), ("key", logged_out, False)])
def test_a_right_that_is_used_for_long_is_asked_for_again(keys, fronts, monkeypatch, how, change, ends):
    assert lmgateway.Server.LOOK_S + 1 < 2
    key = keys("--new-key", "anna", "--rights", "infer,view")[1].strip()
    front = fronts(keys_file=str(keys.path))
    cookie = f"Cookie: {session(front, key)}"
    query = f"?api_key={key}" if how == "query" else ""
    with listening(front, query, f"X-API-Key: {key}" if how == "key" else cookie) as (sock, _, frames):
        next(frames)
        change(front, keys, cookie)
        tell(front.hub, "one")
        sock.settimeout(0.2 if not ends else PATIENCE_S)
        with contextlib.nullcontext() if ends else pytest.raises(socket.timeout):
            assert {frame[1] for frame in frames} <= {"one"}    # it ends in order, and then ...
            assert sock.recv(1) == b""      # ... so does the connection


def test_the_first_key_ends_the_streams_of_listeners_without_one(keys, fronts, monkeypatch):
    front = fronts(keys_file=str(keys.path))
    with listening(front) as (_, _, frames):
        next(frames)
        keys("--new-key", "anna")
        assert list(frames) == []


def test_a_listener_that_does_not_read_is_cut_when_its_key_is_revoked(keys, fronts, monkeypatch):
    monkeypatch.setattr(lmgateway.Server, "LEAVE_S", 0.1)
    key = keys("--new-key", "anna", "--rights", "view")[1].strip()
    front = fronts(keys_file=str(keys.path))
    with dial(front.port) as sock:
        sock.sendall(request("GET /debug/stream", b"", f"X-API-Key: {key}", close=False))
        read_until(sock, b"event: connected")
        for _ in range(30):
            front.hub.publish([Event("n", {"timestamp": "x", "text": "x" * 100_000})] * 10)
        keys("--revoke-key", "anna")
        started = time.monotonic()
        until(lambda: not front.server._connections)
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(("args", "said"), [
    (["--new-key", "a b"], "letters"), (["--new-key", "x", "--rights", "all"], "infer, view, admin"),
    (["--revoke-key", "x"], "no such key"),
    (["--new-key", "fixed", "--api-key", "fixed=1"], "choose another"),
    (["--new-key", "taken"], "choose another")])
def test_wrong_key_commands_say_what_to_do(keys, args, said):
    keys("--new-key", "taken")
    status, out, error = keys(*args)
    assert (status, out) == (2, "") and said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": [{"name": "x"}]}',
                                     '{"keys": [{"name": "x", "sha256": "zz", "rights": []}]}'])
def test_a_damaged_keys_file_opens_no_door(keys, fronts, content):
    keys.path.write_text(content)
    for args in (["--list-keys"], ["--new-key", "x"], ["--port", "0"]):
        status, _, error = keys(*args)
        assert status == 2 and "keys.json" in error and "damaged" in error
    assert ask(fronts(keys_file=str(keys.path)), "GET /v1/models")[0] == 401


def test_a_keys_file_that_becomes_damaged_is_said_once_and_leaves_the_keys_as_they_are(keys, fronts, caplog):
    key = keys("--new-key", "anna")[1].strip()
    front = fronts(keys_file=str(keys.path))
    assert ask(front, "GET /v1/models", f"X-API-Key: {key}")[0] == 200
    keys.path.write_text("{")
    lmgateway.log.propagate = True
    for _ in range(3):
        front.gateway.access._file._asked = -1e9
        assert (ask(front, "GET /v1/models", f"X-API-Key: {key}")[0],
                ask(front, "GET /v1/models")[0]) == (200, 401)
    assert caplog.text.count("damaged") == 1


def test_lm_studios_token_has_to_fit_into_a_header(keys, monkeypatch):
    monkeypatch.setenv("UPSTREAM_TOKEN", "sk-\u0142")
    status, _, error = keys("--port", "0")
    assert status == 2 and "UPSTREAM_TOKEN" in error and "sk-" not in error


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_the_lan_is_not_let_in_without_a_key(keys, host, monkeypatch):
    status, _, error = keys("--host", host, "--port", "0")
    assert status == 2 and "GATEWAY_API_KEY" in error and "--no-auth" in error and len(error.splitlines()) == 1


def test_the_lan_is_let_in_with_a_key_or_out_loud(keys):
    keys("--new-key", "anna")
    none = {"host": "0.0.0.0", "keys_file": str(keys.path.with_name("none"))}
    with pytest.raises(lmgateway.ConfigError):
        lmgateway.check_exposure(lmgateway.Config(**none))
    for options in ({"no_auth": True}, {"api_key": KEYS}, {"keys_file": str(keys.path)},
                    {"host": "127.0.0.1"}):
        lmgateway.check_exposure(lmgateway.Config(**{**none, **options}))


@pytest.mark.parametrize(("allowed", "address", "status"), [
    ("127.0.0.1", "127.0.0.1", 200), ("127.0.0.0/8", "127.0.0.1", 200), ("192.168.1.0/24", "127.0.0.1", 403),
    ("*", "127.0.0.1", 200),
    ("192.168.1.0/24,10.0.0.5", "10.0.0.5", 200), ("192.168.1.0/24", "192.168.2.1", 403),
    ("192.168.1.7/24", "192.168.1.1", 200),
    ("192.168.1.0/24", "::ffff:192.168.1.9", 200), ("::ffff:192.168.1.0/120", "192.168.1.9", 200),
    ("fd00::/8", "fd12::1", 200),
    ("fd00::/8", "fe80::1%eth0", 403), ("fe80::/10", "fe80::1%eth0", 200), ("::1", "::1", 200),
    ("192.168.1.0/24", "garbage", 403),
    ("10.0.0.0/8", "10.1.1.1:5555", 200), ("fd00::/8", "[fd12::1]:443", 200),
    ("192.168.1.0/24", "1.1.1.1, 192.168.1.1", 200),
    ("192.168.1.0/24", "192.168.1.1, 1.1.1.1", 403)])
def test_allowlist_and_forwarded_addresses(fronts, allowed, address, status):
    front = fronts(allow=lmgateway.networks(allowed), trusted_proxies=lmgateway.networks("127.0.0.1"))
    found, _, body = ask(front, "GET /v1/models", *([] if address == "127.0.0.1"
                                                    else [f"X-Forwarded-For: {address}"]))
    assert found == status and (status == 200 or json.loads(body)["error"]["code"] == "address_not_allowed")


def test_an_address_that_is_not_allowed_gets_nothing_at_all(fronts):
    front = fronts(allow=lmgateway.networks("192.0.2.1"), cors_origins=("*",))
    asks_first = ["Origin: https://chat.example", "Access-Control-Request-Method: POST"]
    for line in ("OPTIONS /v1/x", "GET /", "GET /health", "GET /debug/status", "GET /v1/models"):
        assert ask(front, line, *asks_first)[0] == 403


def test_forwarded_addresses_are_believed_from_named_proxies_only(fronts, studio):
    for trusted, client in (("127.0.0.1", "10.0.0.9"), ("127.0.0.1,10.0.0.9", "1.2.3.4"),
                            ("*", "6.6.6.6"), ("192.0.2.0/24", "127.0.0.1")):
        front = fronts(trusted_proxies=lmgateway.networks(trusted))
        ask(front, POST_CHAT, "X-Forwarded-For: 6.6.6.6, 1.2.3.4", "X-Forwarded-For: 10.0.0.9", body=b"{}")
        assert front.events(0, "inference_start")[0]["client"] == client
    assert studio.peers[-1].header("x-forwarded-for") == "6.6.6.6, 1.2.3.4"   # as they came


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("localhost:8001", 200), ("127.0.0.1:1", 200), ("127.9.9.9", 200),
    ("[::1]:8001", 200), ("LOCALHOST", 200), ("app.localhost:8001", 200),
    ("[::ffff:127.0.0.1]", 200), ("evil.example", 403), ("localhost.evil.example", 403),
    ("127.0.0.1.evil.example", 403),
    ("192.168.1.5:8001", 403), ("[fd00::1]", 403), ("0.0.0.0", 403), ("", 403), ("localhost:99:99", 400),
    ("localhost@evil", 400),
    ("[::1]evil.example", 400), ("local host", 400), ("localhost/x", 400), ("localhost:80x", 400)])
def test_without_a_key_a_page_cannot_reach_in_by_its_own_name(front, studio, fronts, host, status):
    data = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    assert status_of(talk(front.port, data)) == status
    assert len(studio.peers) == (status == 200)
    if status == 403:       # a key, or --no-auth beyond loopback, says that others are meant
        guarded = fronts(api_key=KEYS)
        assert status_of(talk(guarded.port, data.replace(b"\r\n\r\n",
                                                         f"\r\nX-API-Key: {ANNA}\r\n\r\n".encode()))) == 200
        assert status_of(talk(fronts(host="0.0.0.0", no_auth=True).port, data)) == 200


@pytest.mark.parametrize("route", [*lmgateway.ROUTES, lmgateway.FORWARD], ids=lambda route: route.path)
def test_no_page_of_ours_is_shown_to_another_name(front, studio, route):
    line = f"{route.method} {route.path}".replace("*", "x") if route.path != "*" else "GET /v1/models"
    answer = talk(front.port, request(line, b"{}").replace(b"Host: localhost", b"Host: evil.example"))
    assert (status_of(answer), error_of(answer)["code"]) == (403, "host_not_local") and not studio.peers


def test_old_clients_name_no_host(front):
    assert status_of(talk(front.port, b"GET /v1/models HTTP/1.0\r\n\r\n")) == 200


ORIGINS = {     # method, Origin, with a key header, status
    "none": ("POST", None, False, 200), "own": ("POST", "http://localhost", False, 200),
    "named": ("POST", "https://chat.example", False, 200),
    "other": ("POST", "https://evil.example", False, 403), "null": ("POST", "null", False, 403),
    "reading": ("GET", "https://evil.example", False, 200),
    "sub": ("POST", "https://chat.example.evil.example", False, 403),
    "other port": ("POST", "http://localhost:1", False, 403),
    "delete": ("DELETE", "https://evil.example", False, 403),
    "with a key": ("POST", "https://evil.example", True, 200)}


def test_a_session_is_not_a_pages_to_use_because_a_wrong_key_came_with_it(guarded):
    cookie = session(guarded)
    assert ask(guarded, "POST /v1/chat/completions", f"Cookie: {cookie}", "X-API-Key: wrong",
               "Origin: https://evil.example", body=b"{}")[0] in (401, 403)


@pytest.mark.parametrize("origin", ["null", "https://evil.example"])
def test_a_page_that_has_no_key_is_told_that_it_is_the_page(guarded, origin):
    assert ask(guarded, POST_CHAT, f"Origin: {origin}", body=b"{}")[0] == 403
    assert ask(guarded, POST_CHAT, f"Origin: {origin}", "X-API-Key: wrong", body=b"{}")[0] == 401
    assert ask(guarded, "POST /login", f"Origin: {origin}", "X-API-Key: wrong",
               body=json.dumps({"key": ANNA}).encode())[0] == 403       # where nobody looks at the key


@pytest.mark.parametrize("row", ORIGINS.values(), ids=ORIGINS)
@pytest.mark.parametrize("with_keys", [False, True])
def test_pages_change_something_only_where_they_are_let_in(fronts, studio, row, with_keys):
    method, origin, key, status = row
    front = fronts(cors_origins=("https://chat.example",), api_key=KEYS if with_keys else {})
    headers = [f"Origin: {origin}"] if origin else []
    if with_keys and not key:
        headers.append(f"Cookie: {session(front)}")
    elif key:
        headers.append(f"X-API-Key: {ANNA}")
        status = status if with_keys else 403       # a key that nobody asked for proves nothing
    found, answered, _ = ask(front, f"{method} /v1/x", *headers)
    assert found == status
    assert dict(answered).get("Access-Control-Allow-Origin") == (origin if origin == "https://chat.example"
                                                                 else None)


def test_pages_cannot_log_a_browser_in_from_elsewhere(guarded):
    assert ask(guarded, "POST /login", "Origin: https://evil.example",
               body=json.dumps({"key": ANNA}).encode())[0] == 403


def test_preflights_are_answered_here(fronts, studio):
    front = fronts(cors_origins=("https://chat.example",), api_key=KEYS)
    asked = ["Access-Control-Request-Method: POST",
             "Access-Control-Request-Headers: authorization, x-stainless-os",
             "Access-Control-Request-Private-Network: true"]
    status, headers, body = ask(front, "OPTIONS /v1/chat/completions", "Origin: https://chat.example", *asked)
    headers = dict(headers)
    assert (status, body) == (204, b"") and headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Private-Network"] == "true" and headers["Vary"] == "Origin"
    plain_asked = ask(front, "OPTIONS /x", "Origin: https://chat.example", *asked[:1])[1]
    assert "Access-Control-Allow-Private-Network" not in dict(plain_asked)
    assert dict(plain_asked)["Access-Control-Allow-Headers"] == "authorization, x-api-key, content-type"
    assert ask(front, "OPTIONS /v1/chat/completions", "Origin: https://evil.example", *asked)[0] == 403
    assert not studio.peers
    front = fronts(cors_origins=("*",))
    for origin, status in (("https://any.example", 204), ("null", 403)):    # null is a page of no origin
        assert ask(front, "OPTIONS /", f"Origin: {origin}", *asked)[0] == status
        assert (ask(front, "POST /v1/x", f"Origin: {origin}")[0] == 403) == (status == 403)


def test_pages_that_are_let_in_can_read_answers_and_errors_and_get_no_header_twice(fronts, studio):
    front = fronts(cors_origins=("https://chat.example",))
    studio.script = lambda peer: peer.send(plain(b"x", "200 OK", "Access-Control-Allow-Origin: *",
                                                 "Vary: Accept"))
    for path in ("/v1/models", "/health", "/debug/requests/none"):
        headers = ask(front, f"GET {path}", "Origin: https://chat.example")[1]
        assert [value for name, value in headers
                if name.lower() == "access-control-allow-origin"] == ["https://chat.example"]
        assert ("Vary", "Origin") in headers and ("Access-Control-Expose-Headers", "*") in headers
        assert not [name for name, _ in ask(front, f"GET {path}")[1] if "Access-Control" in name]


# --- 7.6 sockets

class Speaker:
    """One end of a WebSocket: a client's, whose frames are masked, or LM Studio's."""

    def __init__(self, sock, masks, data=b""):
        self.sock, self.mask = sock, MASK if masks else b""
        self.frames = lmgateway.Frames(not masks, 2**28)
        self.came = self.frames.feed(data)

    def say(self, value, opcode=1):
        spaces = None if self.mask else (",", ":")     # as Python's SDK and Node write JSON
        text = value if isinstance(value, bytes) else json.dumps(value, separators=spaces).encode()
        self.sock.sendall(lmgateway.frame(opcode, text, self.mask))

    def next(self):
        """The next Message; None at the end of the connection."""
        while not self.came:
            data = self.sock.recv(65536)
            if not data:
                return None
            self.came = self.frames.feed(data)
        return self.came.pop(0)

    def hear(self):
        """The next message as JSON."""
        message = self.next()
        assert message and message.opcode == 1, message
        return json.loads(message.payload)

    def closed(self):
        """The code of the close frame that comes next, None of an empty one; "end" for the bare end."""
        try:
            message = self.next()
        except ConnectionResetError:
            return "end"
        if message is None:
            return "end"
        assert message.opcode == 8, message
        return int.from_bytes(message.payload[:2], "big") if message.payload else None


HELLO = {"authVersion": 1, "clientIdentifier": "some-client", "clientPasskey": "its own"}


class Scripted:
    """LM Studio's side of the sockets that are opened: each Speaker, once it has let its client in."""

    def __init__(self, studio, answer=None):
        self.answer, self.paths, self.hellos = answer or {"success": True}, [], []
        self.met: queue.Queue = queue.Queue()
        studio.script = self.script

    def script(self, peer):
        self.paths.append(peer.line)
        peer.send((f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   f"Sec-WebSocket-Accept: {lmgateway.accept_key(peer.header('sec-websocket-key'))}\r\n\r\n").encode())
        peer.sock.settimeout(PATIENCE_S)
        speaker = Speaker(peer.sock, masks=False)
        hello = speaker.next()
        if hello is None:
            return
        self.hellos.append(json.loads(hello.payload))
        speaker.say(self.answer)
        speaker.over = threading.Event()
        self.met.put(speaker)
        speaker.over.wait(PATIENCE_S)
        raise OSError   # the connection is the test's: nothing is read here any more


def upgrade(path="/llm", *headers, **changed):
    fields = {"Host": "localhost", "Connection": "keep-alive, Upgrade", "Upgrade": "websocket",
              "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
              **{name.replace("_", "-"): value for name, value in changed.items()}}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, *headers, "", ""]).encode("latin-1")


def enter(front, path="/llm", hello=HELLO, *headers, secure=lambda sock: sock):
    """A client's Speaker whose first message has been sent."""
    sock = secure(dial(front.port))
    sock.sendall(upgrade(path, *headers))
    head, rest = read_until(sock, b"\r\n\r\n").split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), head
    assert b"\r\nsec-websocket-accept: s3ppLMBiTxaQ9kYGzzhZRbK+xOo=".lower() in head.lower()
    assert b"extensions" not in head.lower()
    speaker = Speaker(sock, masks=True, data=rest)
    speaker.say(hello)
    return speaker


@pytest.fixture
def scripted(studio):
    made = Scripted(studio)
    yield made
    while not made.met.empty():
        made.met.get().over.set()


@pytest.fixture
def joined(front, scripted):
    """Gives (client, LM Studio's side) of a new socket without keys."""
    ends = []

    def join(path="/llm", where=front, hello=HELLO):
        client = enter(where, path, hello)
        assert client.hear() == {"success": True}
        ends.extend([client, scripted.met.get(timeout=PATIENCE_S)])
        return ends[-2:]

    yield join
    for end in ends:
        end.sock.close()
        getattr(end, "over", threading.Event()).set()
    until(lambda: not front.gateway.inferences)


@pytest.mark.parametrize(("head", "status"), [
    (upgrade("/unknown"), 404), (upgrade("/LLM"), 404), (upgrade("/llm/"), 404), (upgrade("/v1/chat/completions"), 404),
    (upgrade("/"), 404), (upgrade(Sec_WebSocket_Version="8"), 426), (upgrade(Sec_WebSocket_Version=None), 426),
    (upgrade(Sec_WebSocket_Key="short"), 400), (upgrade(Sec_WebSocket_Key=None), 400),
    (upgrade(Connection="keep-alive"), 400), (upgrade().replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    (upgrade().replace(b"GET", b"POST"), 400), (upgrade(Origin="https://evil.example"), 403),
    (upgrade(Origin="null"), 403), (upgrade(Host="lan-name"), 403)])
def test_what_is_no_opening_handshake_never_reaches_lm_studio(front, studio, head, status):
    with dial(front.port) as sock:
        sock.sendall(head)
        answer = read_until(sock, b"\r\n\r\n")
    assert status_of(answer) == status and studio.peers == []
    assert (b"Sec-WebSocket-Version: 13" in answer) == (status == 426)


def test_a_page_of_an_allowed_origin_may_connect(fronts, scripted):
    client = enter(fronts(cors_origins=("https://chat.example",)), "/llm", HELLO, "Origin: https://chat.example")
    assert client.hear() == {"success": True}


def test_an_lm_studio_that_takes_no_socket_is_502(front, studio, monkeypatch):
    monkeypatch.setattr(lmgateway, "UPGRADE_S", 0.2)
    for script in (lambda peer: peer.send(plain(b"{}")), lambda peer: peer.sock.recv(1), lambda peer: peer.reset()):
        studio.script = script
        with dial(front.port) as sock:
            sock.sendall(upgrade())
            assert status_of(read_until(sock, b"\r\n\r\n")) == 502


def test_everything_else_passes_unchanged_both_ways(joined, scripted):
    client, studio = joined("/system?x=1")
    assert scripted.paths == ["GET /system HTTP/1.1"]
    pieces = [bytes.fromhex("01") + lmgateway.frame(1, b'{"type"', MASK)[1:], lmgateway.frame(9, b"in between", MASK),
              lmgateway.frame(0, b':"keepAlive"}', MASK)]
    for data in (lmgateway.frame(2, b'{"type":"keepAlive"}', MASK), lmgateway.frame(10, b"pong", MASK),
                 lmgateway.frame(1, b'{ "type": "who knows", "x": [1.0, "\xc3\xa9"] }', MASK)):
        client.sock.sendall(data)
        assert studio.next().raw == data
    for piece in pieces:
        client.sock.sendall(piece)
    assert [studio.next().raw, studio.next().raw] == [pieces[1], pieces[0] + pieces[2]]
    for data in (lmgateway.frame(1, b"no JSON"), lmgateway.frame(2, b"\xff"), lmgateway.frame(9, b"ping"),
                 b"\x01\x03abc", b"\x80\x00"):
        studio.sock.sendall(data)
        assert client.sock.recv(100) == data
    client.say((4000).to_bytes(2, "big") + b"bye", 8)
    assert studio.closed() == 4000
    studio.say((4000).to_bytes(2, "big"), 8)
    assert client.closed() == 4000 and client.closed() == "end"


@pytest.mark.parametrize("way", [0, 1])
def test_megabytes_pass_in_one_frame(joined, way):
    ends = joined("/files")
    value = {"type": "keepAlive", "x": "a" * 6_000_000}
    sender = threading.Thread(target=ends[way].say, args=(value,))
    sender.start()
    assert ends[1 - way].hear() == value
    sender.join(PATIENCE_S)


@pytest.mark.parametrize("way", [0, 1])
def test_who_does_not_read_holds_up_the_other_side(joined, way):
    ends = joined("/files")
    sender = ends[way]
    sender.sock.settimeout(0.2)
    data, sent = lmgateway.frame(2, b'{"x":"' + b"a" * 60_000 + b'"}', sender.mask), 0
    with pytest.raises(lmgateway.TIMEOUTS):
        while sent < 200_000_000:
            sent += sender.sock.send(data)
    assert sent < 60_000_000


def test_lm_studio_is_shown_a_guest_and_never_the_client(fronts, scripted):
    plain_front, keyed = fronts(), fronts(api_key={**KEYS, "carl": "sk-lm-12345678:12345678901234567890"})
    other = {**HELLO, "clientIdentifier": "another"}
    carl = {**HELLO, "clientIdentifier": "12345678", "clientPasskey": "12345678901234567890"}
    for front, path, hello in ((plain_front, "/llm", HELLO), (plain_front, "/files", HELLO),
                               (plain_front, "/llm", other), (keyed, f"/key/{ANNA}/llm", HELLO),
                               (keyed, "/key/other=/llm", HELLO), (keyed, "/llm", carl)):
        assert enter(front, path, hello).hear() == {"success": True}
    names = [hello["clientIdentifier"] for hello in scripted.hellos]
    assert names[0] == names[1] and len(set(names)) == 5
    assert all(name.startswith("guest:") for name in names) and len({str(h) for h in scripted.hellos}) == 5
    assert set(scripted.paths) == {"GET /llm HTTP/1.1", "GET /files HTTP/1.1"}
    assert "some-client" not in str(scripted.hellos) and "abcdefgh" not in str(scripted.hellos)


def test_lm_studio_is_shown_the_upstream_tokens_halves(fronts, scripted):
    enter(fronts(upstream_token="sk-lm-ABCDEFGH:ABCDEFGHIJKLMNOPQRST")).hear()
    assert scripted.hellos == [{"authVersion": 1, "clientIdentifier": "ABCDEFGH",
                                "clientPasskey": "ABCDEFGHIJKLMNOPQRST"}]


@pytest.mark.parametrize(("python", "path", "hello"), [
    (False, "/llm", HELLO), (True, "/llm", HELLO), (False, "/key/wrong/llm", HELLO), (True, "/llm", b"x"),
    (False, "/llm", {"clientIdentifier": [], "clientPasskey": {}}),
    (False, "/llm", {**HELLO, "clientIdentifier": "abcdefgh", "clientPasskey": "abcdefghijklmnopqrsT"})])
def test_without_a_right_key_nobody_is_let_in(guarded, scripted, path, hello, python, caplog):
    agent = ["User-Agent: python-httpx/0.28"] if python else []
    client = enter(guarded, path, hello, *agent)
    said = client.hear()
    text = said["error"]["title"] if python else said["error"]
    assert said["success"] is False and "/key/KEY" in text and "wrong" not in text
    assert client.closed() is None and scripted.hellos == []
    assert "wrong" not in caplog.text


def test_a_client_that_does_not_say_who_it_is_is_let_go(front, scripted, monkeypatch):
    monkeypatch.setattr(lmgateway, "INTRODUCTION_S", 0.2)
    with dial(front.port) as sock:
        sock.sendall(upgrade())
        speaker = Speaker(sock, True, read_until(sock, b"\r\n\r\n").split(b"\r\n\r\n", 1)[1])
        assert speaker.hear()["success"] is False and speaker.closed() is None


def test_lm_studios_own_refusal_reaches_the_client(front, scripted):
    scripted.answer = {"success": False, "error": "no guests today"}
    client = enter(front)
    assert client.hear() == {"success": False, "error": "no guests today"} and client.closed() is None


def test_a_key_may_lead_the_path_over_http_too(guarded, studio, caplog):
    with caplog.at_level(logging.DEBUG):
        for path, status in ((f"/key/{ANNA}/v1/models?x=1", 200), ("/key/wr%6fng/v1/models", 401), ("/key/wrong", 200),
                             (f"/key/{urllib.parse.quote(ANNA)}/v1/models", 200), ("/key//v1/models", 401)):
            assert ask(guarded, f"GET {path}")[0] == status, path
        assert ask(guarded, f"GET /key/{ANNA}/v1/models", "X-API-Key: wrong")[0] == 401
    assert [peer.line for peer in studio.peers] == ["GET /v1/models?x=1 HTTP/1.1", "GET /v1/models HTTP/1.1"]
    assert ANNA not in caplog.text and "wrong" not in caplog.text


def call(endpoint, number=1, **parameter):
    return {"type": "rpcCall", "endpoint": endpoint, "callId": number, "parameter": parameter}


def channel(endpoint, number=1, **parameter):
    return {"type": "channelCreate", "endpoint": endpoint, "channelId": number, "creationParameter": parameter}


@pytest.fixture
def limited(fronts, tmp_path):
    """A gateway with the key of somebody who may infer, and a function that takes it back."""
    path = tmp_path / "keys.json"
    key = lmgateway.Key("kid", lmgateway.digest(ANNA), frozenset(("infer",)), "")
    path.write_text(json.dumps({"keys": [lmgateway.key_row(key)]}), encoding="utf-8")
    front = fronts(keys_file=str(path))
    front.revoke = lambda: path.write_text('{"keys": []}', encoding="utf-8")
    return front


OPENED = {  # kind -> (id, refusal)
    "rpcCall": ("callId", "rpcError"), "channelCreate": ("channelId", "channelError"),
    "signalSubscribe": ("subscribeId", "signalError"), "writableSignalSubscribe": ("subscribeId", "writableSignalError")}


@pytest.mark.parametrize(("kind", "namespace", "endpoint", "right"), [
    ("rpcCall", "llm", "unloadModel", "admin"), ("channelCreate", "llm", "loadModel", "admin"),
    ("signalSubscribe", "llm", "not yet known", "admin"), ("writableSignalSubscribe", "embedding", "predict", "admin"),
    ("rpcCall", "system", "startHttpServer", "admin"), ("rpcCall", "files", "getLocalFileAbsolutePath", "admin"),
    ("channelCreate", "diagnostics", "streamLogs", "view"), ("rpcCall", "repository", "searchModels", "admin"),
    ("channelCreate", "plugins", "reportError", "admin"), ("rpcCall", "runtime", "listEngines", "admin"),
    ("channelCreate", "llm", ["predict"], "admin"), ("rpcCall", "llm", None, "admin")])
def test_a_call_without_its_right_is_refused_alone(joined, limited, kind, namespace, endpoint, right):
    client, studio = joined(f"/key/{ANNA}/{namespace}", limited)
    name, refusal = OPENED[kind]
    client.say({"type": kind, "endpoint": endpoint, name: 7})
    said = client.hear()
    assert (said["type"], said[name], list(said["error"])) == (refusal, 7, ["title"])
    assert f"no right to {right}" in said["error"]["title"]
    client.say({"type": "channelSend", "channelId": 7, "message": {}} if name == "channelId" else {"type": "keepAlive"})
    client.say({"type": "keepAlive"})
    assert studio.hear() == {"type": "keepAlive"}


def test_words_of_the_gateway_stand_between_two_messages_of_lm_studios(joined, limited):
    client, studio = joined(f"/key/{ANNA}/llm", limited)
    pieces = [b"\x01" + lmgateway.frame(1, b"[1")[1:], lmgateway.frame(0, b",2]")]
    for part in (pieces[0][:2], pieces[0][2:]):
        studio.sock.sendall(part)
        assert client.sock.recv(100) == part
        client.say(call("unloadModel"))
        client.say({"type": "keepAlive"})
        studio.hear()
    studio.sock.sendall(pieces[1])
    assert client.sock.recv(len(pieces[1])) == pieces[1]
    assert [client.hear()["type"] for _ in range(2)] == ["rpcError"] * 2


def test_a_call_with_its_right_and_a_proper_id_goes_on(joined, limited):
    for namespace, endpoint in (("llm", "listLoaded"), ("llm", "getOrLoad"), ("embedding", "countTokens"),
                                ("system", "listDownloadedModels"), ("files", "uploadFileBase64")):
        client, studio = joined(f"/key/{ANNA}/{namespace}", limited)
        for number in (True, "1", None, 1.5, 2**53, [1], {"a": 1}, 5.0):
            client.say(call(endpoint, number))
        assert studio.hear() == call(endpoint, 5)


@pytest.mark.parametrize("text", [b"x", b"[1]", b'{"a":' + b"9" * 5000 + b"}", b'{"a":' * 5000, b'{"a":NaN}'],
                         ids=["word", "list", "number", "nesting", "NaN"])
def test_what_cannot_be_read_is_not_passed_on_for_a_key_without_every_right(joined, limited, text):
    client, studio = joined(f"/key/{ANNA}/llm", limited)
    client.say(text)
    assert client.closed() == 1008 and studio.closed() == "end"
    client.sock.close()


def test_bytes_in_a_call_are_judged_as_lm_studio_reads_them(joined, limited):
    client, studio = joined(f"/key/{ANNA}/llm", limited)
    client.say(b'{"type":"rpcCall","endpoint":"unloadModel","callId":1,"x":"\xff"}', 2)
    assert client.hear()["type"] == "rpcError"


def test_the_number_of_a_refused_call_may_be_used_again(joined, limited):
    client, studio = joined(f"/key/{ANNA}/llm", limited)
    client.say(channel("loadModel", 1))
    assert client.hear()["type"] == "channelError"
    for said in (channel("getOrLoad", 1), sent(1, type="cancel")):
        client.say(said)
        assert studio.hear() == said


def test_a_revoked_keys_socket_ends(joined, limited):
    client, studio = joined(f"/key/{ANNA}/llm", limited)
    client.say(channel("predict"))
    studio.hear()
    limited.server.LOOK_S = 0.05
    limited.revoke()
    assert client.closed() == 1008 and studio.closed() == "end"
    assert limited.events(0, "error")[0]["operation"] == "key_revoked"
    client.sock.close()


SOCKET_STATS = {"stopReason": "eosFound", "promptTokensCount": 30, "predictedTokensCount": 5, "totalTokensCount": 35,
         "tokensPerSecond": 12.345, "timeToFirstTokenSec": 0.25}


def sent(number=1, **message):
    return {"type": "channelSend", "channelId": number, "message": message}


def fragment(number=1, tokens=1):
    return sent(number, type="fragment", fragment={"content": "a", "tokensCount": tokens})


def success(number=1, **stats):
    return sent(number, type="success", stats={**SOCKET_STATS, **stats}, modelInfo={"identifier": "m/one"},
                loadModelConfig={}, predictionConfig={})


BY_NAME = {"modelSpecifier": {"type": "query", "query": {"identifier": "m/one"}}}


@pytest.fixture
def begun(front, joined):
    """Gives (client, LM Studio's side, the latest event before it) of a prediction that has begun."""
    def begin(endpoint="predict", number=1, **asked):
        client, studio = joined()
        mark = front.hub.last
        client.say(channel(endpoint, number, **asked))
        studio.hear()
        return client, studio, mark

    return begin


def test_a_prediction_is_a_request_like_any_other(front, begun):
    client, studio, mark = begun(history={"messages": [{}, {}]}, **BY_NAME)
    (start,) = front.events(mark, "inference_start")
    assert (start["path"], start["model"], start["stream"], start["client"]) == ("/llm/predict", "m/one", True, "127.0.0.1")
    studio.say(sent(type="promptProcessingProgress", progress=0.41, details={
        "cachedTokenCount": 3, "totalPromptTokenCount": 30}))
    assert front.events(mark, "inference_progress")[0]["percent"] == 41
    for _ in range(5):
        studio.say(fragment())
    assert [client.hear()["message"]["type"] for _ in range(6)] == ["promptProcessingProgress"] + ["fragment"] * 5
    studio.say(success())
    assert client.hear() == success() and not front.gateway.inferences
    (over,) = front.events(mark, "inference_complete")
    assert over["tokenUsage"] == {"promptTokens": 30, "completionTokens": 5, "totalTokens": 35}
    assert (over["timeToFirstTokenMs"], over["tokensPerSecond"], over["finishReason"], over["model"]) == (
        250.0, 12.35, "eosFound", "m/one")
    assert over["cachedTokens"] == 3
    studio.say({"type": "channelClose", "channelId": 1})
    client.hear()
    assert front.events(mark, "error", count=0) == []


def test_tokens_are_counted_however_their_fragments_are_written_and_drafts_as_lm_studio_says(front, begun):
    client, studio, mark = begun()
    (inference,) = front.gateway.inferences.values()
    odd = {"type": "channelSend", "message": {"fragment": {"tokensCount": 3, "content": "x"}, "type": "fragment"}, "channelId": 1}
    for said in (fragment(tokens=2), odd, fragment(2), sent(type="fragment", fragment={
            "content": '","tokensCount":50,\\', "tokensCount": 1, "isStructural": False})):
        studio.say(said)
        assert client.hear() == said
    inference._due = 0
    studio.say(fragment())
    client.hear()
    assert front.hub.shown()[0]["progress"]["outputTokens"] == 7
    studio.say(success(totalDraftTokensCount=8, acceptedDraftTokensCount=6))
    front.events(mark, "inference_complete")
    row = front.hub.shown()[0]
    assert (row["draftTokens"], row["acceptedDraftTokens"]) == (8, 6)


def test_a_result_without_figures_has_none(front, begun):
    client, studio, mark = begun("completeRawText", rawPrompt="x")
    studio.say(fragment())
    studio.say(sent(type="success", stats={"stopReason": "eosFound"}))
    (over,) = front.events(mark, "inference_complete")
    assert (over["tokenUsage"], over["timeToFirstTokenMs"], over["tokensPerSecond"]) == (None, None, None)


def test_an_instance_is_known_by_its_name(front, joined):
    client, studio = joined()
    mark = front.hub.last
    client.say(channel("getOrLoad", 0, identifier="x"))
    studio.hear()
    studio.say(sent(0, type="alreadyLoaded", info={"identifier": "my-model", "instanceReference": "ref1"}))
    client.hear()
    client.say(channel("predict", 1, modelSpecifier={"type": "instanceReference", "instanceReference": "ref1"}))
    studio.hear()
    assert front.events(mark, "inference_start")[0]["model"] == "my-model"


def test_an_embedding_is_one_too(front, joined):
    client, studio = joined("/embedding")
    mark = front.hub.last
    client.say(call("embedString", inputString="x", **BY_NAME))
    client.say(call("embedString", inputString="the same id", **BY_NAME))
    client.say(call("listLoaded", 2))
    assert [studio.hear()["callId"] for _ in range(2)] == [1, 2]
    studio.say({"type": "rpcResult", "callId": 1, "result": {"embedding": [0.5] * 1000}})
    assert len(client.hear()["result"]["embedding"]) == 1000
    (over,) = front.events(mark, "inference_complete")
    assert over["tokenUsage"] is None
    assert [(e["path"], e["stream"]) for e in front.events(mark, "inference_start")] == [("/embedding/embedString", False)]


def test_a_call_that_lm_studio_does_not_know_in_this_form_is_no_inference(front, joined):
    for path, said in (("/llm", call("predict")), ("/embedding", channel("embedString"))):
        client, studio = joined(path)
        client.say(said)
        assert studio.hear() == said and not front.gateway.inferences


def leaves(client, studio):
    client.sock.close()


def says_goodbye(client, studio):
    client.say(b"", 8)


def cancels(client, studio):
    client.say(sent(type="cancel"))
    assert studio.hear() == sent(type="cancel")
    studio.say(success(stopReason="userStopped"))


@pytest.mark.parametrize(("ends", "operation"), [
    (leaves, "client_disconnected"), (says_goodbye, "client_disconnected"), (cancels, "client_disconnected"),
    (lambda client, studio: studio.say({"type": "channelError", "channelId": 1, "error": {"title": "no memory"}}),
     "upstream_error"),
    (lambda client, studio: studio.say({"type": "channelClose", "channelId": 1}), "upstream_error"),
    (lambda client, studio: studio.sock.shutdown(socket.SHUT_RDWR), "upstream_reset"),
    (lambda client, studio: studio.say(b"\x03\xe8", 8), "upstream_reset"),
    (lambda client, studio: client.sock.sendall(b"\x81\x00"), "protocol_error")])
def test_each_end_of_a_prediction_is_told_once(front, begun, ends, operation, monkeypatch):
    monkeypatch.setattr(lmgateway, "PARTING_S", 0.05)
    client, studio, mark = begun(**BY_NAME)
    for _ in range(3):
        studio.say(fragment())
        client.hear()
    ends(client, studio)
    (error,) = front.events(mark, "error")
    assert error["tokenUsage"]["completionTokens"] == (5 if ends is cancels else 3)
    assert error["operation"] == operation and front.events(mark, "inference_complete", count=0) == []
    assert operation != "upstream_error" or error["error"] in (
        "no memory", "LM Studio closed the channel without a result")


def test_an_lm_studio_that_dies_is_told_by_1011(joined):
    client, studio = joined()
    studio.sock.shutdown(socket.SHUT_RDWR)
    assert client.closed() == 1011


@pytest.mark.parametrize("goes", [lambda sock: sock.close(), lambda sock: resets(sock)])
def test_a_client_that_leaves_is_noticed_while_lm_studio_reads_nothing(front, joined, goes):
    client, studio = joined("/files")
    client.sock.sendall(lmgateway.frame(1, b'{"x":"' + b"a" * 20_000_000 + b'"}', MASK))
    goes(client.sock)
    began = time.monotonic()
    until(lambda: not front.server._all(lmgateway.TUNNELLING))  # nothing was read of LM Studio's side
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("data", "code"), [(b"\x81\x00", 1002), (lmgateway.frame(1, b"\xff", MASK), 1007),
                                            (b"\x81\xff" + (2**40).to_bytes(8, "big") + MASK, 1009)])
def test_faulty_frames_end_their_connection_alone(joined, data, code):
    client, studio = joined()
    other, others_studio = joined()
    client.sock.sendall(data)
    assert client.closed() == code and studio.closed() == "end"
    other.say({"type": "keepAlive"})
    assert others_studio.hear() == {"type": "keepAlive"}


def test_no_close_frame_stands_inside_a_frame_of_lm_studios(joined):
    client, studio = joined()
    studio.sock.sendall(b"\x81\x05ab")
    assert client.sock.recv(100) == b"\x81\x05ab"
    client.sock.sendall(b"\x81\x00")
    assert client.sock.recv(100) == b""


def test_a_message_that_is_coming_counts_in_the_budget_of_all_bodies(fronts, joined):
    front = fronts(max_body_memory=1_000_000)
    client, studio = joined("/files", front)
    data = lmgateway.frame(1, b'{"x":"' + b"a" * 900_000 + b'"}', MASK)
    client.sock.sendall(data[:800_000])
    until(lambda: front.server.memory.used == 800_000)
    client.sock.sendall(data[800_000:])
    assert studio.hear()
    until(lambda: front.server.memory.used == 0)
    client.sock.sendall(lmgateway.frame(1, b'{"x":"' + b"a" * 1_100_000 + b'"}', MASK)[:1_050_000])
    assert client.closed() == 1009
    client.sock.close()
    until(lambda: front.server.memory.used == 0)


def test_a_prediction_can_be_stopped_by_somebody_else(front, begun):
    client, studio, mark = begun(number=3, **BY_NAME)
    (prediction,) = front.gateway.inferences.values()
    prediction.stop(lmgateway.HttpError(503, "stopped", "stopped by ben"))
    assert client.hear() == {"type": "channelError", "channelId": 3, "error": {"title": "stopped by ben"}}
    assert studio.hear() == sent(3, type="cancel")
    assert front.events(mark, "error")[0]["operation"] == "stopped"


@pytest.fixture
def waiting(fronts, joined):
    """(gateway, a socket with the prediction that runs, one with the prediction 7 that waits for its turn)."""
    front = fronts(max_running=1)
    busy, queued = joined("/llm", front), joined("/llm", front)
    busy[0].say(channel("predict", **BY_NAME))
    busy[1].hear()
    queued[0].say(channel("predict", 7, **BY_NAME))
    until(lambda: [row["position"] for row in front.hub.shown() if row["state"] == "queued"] == [1])
    until(lambda: front.server.memory.used)     # what waits counts in the budget of all bodies
    yield front, busy, queued
    for client, _ in (busy, queued):
        client.sock.close()
    until(lambda: not front.server.memory.used)
    until(lambda: not front.gateway.inferences)
    assert not front.gateway.turns._scheduler._lines


def test_a_call_waits_for_its_turn_and_its_socket_for_nothing(waiting):
    front, (_, studio), (client, own) = waiting
    for said in ({"type": "keepAlive"}, call("listLoaded", 7)):
        client.say(said)
        assert own.hear() == said
    for said in (channel("predict", 7), sent(7, type="?"), {"type": "keepAlive"}):   # of the call that waits: no word
        client.say(said)
    assert own.hear() == {"type": "keepAlive"}
    assert len(front.events(0, "inference_start", count=2)) == 2
    studio.say(success())
    assert own.hear() == channel("predict", 7, **BY_NAME)
    until(lambda: [row["state"] for row in front.hub.shown() if row["totalTimeMs"] is None] == ["waiting"])
    own.say(success(7))
    assert client.hear() == success(7)
    row = front.hub.shown()[0]
    assert row["state"] == "done" and row["queuedMs"] > 0


def closes(front, client):
    client.sock.close()


def cancels_early(front, client):
    client.say(sent(7, type="cancel"))
    assert client.hear() == {"type": "channelError", "channelId": 7, "error": {
        "title": "it was cancelled while it waited for its turn"}}


def stops_it(front, client):
    (inference,) = [one for one in front.gateway.inferences.values() if one.turn.bell]
    inference.stop(lmgateway.Stopped("ben"))
    assert client.hear()["error"]["title"].startswith("stopped by ben")


@pytest.mark.parametrize(("ends", "operation"), [
    (closes, "client_disconnected"), (cancels_early, "client_disconnected"), (stops_it, "stopped")])
def test_a_call_that_ends_while_it_waits_never_reached_lm_studio(waiting, ends, operation):
    front, (_, studio), (client, own) = waiting
    ends(front, client)
    (error,) = front.events(0, "error")
    assert (error["operation"], error.get("by")) == (operation, "ben" if ends is stops_it else None)
    studio.say(success())
    if ends is not closes:
        client.say({"type": "keepAlive"})
        assert own.hear() == {"type": "keepAlive"}
    else:
        assert own.closed() == "end"


@pytest.mark.parametrize(("flags", "code", "says"), [
    (("--limits", "rpm=1"), "rate_limit_exceeded", "rpm: 1 of 1 requests in the last minute are used"),
    (("--models", "q*"), "model_not_allowed", "the key anna may ask q*; m/one is not among them")])
def test_a_call_beyond_its_keys_limits_is_refused_alone(household, scripted, studio, joined, flags, code, says):
    home = household(*flags)
    studio.script = scripted.script
    for namespace, opens, name, refusal in (("llm", channel("predict", **BY_NAME), "channelId", "channelError"),
                                            ("embedding", call("embedString", **BY_NAME), "callId", "rpcError")):
        client, own = joined(f"/key/{home.keys['anna']}/{namespace}", home.front)
        if code == "rate_limit_exceeded" and namespace == "llm":
            client.say(opens)
            assert own.hear() == opens
        other = "parameter" if "creationParameter" in opens else "creationParameter"
        allowed = {"modelSpecifier": {"type": "query", "query": {"identifier": "q"}}}   # LM Studio does not read it
        client.say({**opens, name: 9, other: allowed})
        said = client.hear()
        assert (said["type"], said[name]) == (refusal, 9) and says in said["error"]["title"]
        client.say({"type": "keepAlive"})
        assert own.hear() == {"type": "keepAlive"}
    assert home.me("anna")["minute"]["requests"] == len(home.rows()) == (code == "rate_limit_exceeded")


def test_each_prediction_of_a_socket_gives_its_slot_back_whatever_becomes_of_another(fronts, joined):
    front = fronts(max_running=2)
    client, studio = joined("/llm", front)
    for number in range(2):
        client.say(channel("predict", number))
        studio.hear()
    front.gateway.hub.end = lambda *args: 1 / 0
    client.sock.close()
    until(lambda: not front.gateway.turns._scheduler._lines)
    del front.gateway.hub.end


def test_at_the_end_idle_sockets_are_told_and_predictions_may_finish(fronts, joined):
    front = fronts()
    idle, _ = joined("/llm", front)
    busy, studio = joined("/llm", front)
    busy.say(channel("predict"))
    studio.hear()
    assert front.server.connections == 2
    ending = threading.Thread(target=front.server.finish_requests, args=(PATIENCE_S,))
    ending.start()
    assert idle.closed() == 1001
    for said in (fragment(), success()):
        studio.say(said)
        assert busy.hear() == said
    assert busy.closed() == 1001
    idle.sock.close()
    busy.sock.close()
    ending.join(PATIENCE_S)


def test_a_prediction_that_outlasts_the_end_is_cut(fronts, joined):
    front = fronts()
    client, studio = joined("/llm", front)
    client.say(channel("predict"))
    studio.hear()
    until(lambda: front.server.working)
    front.server.finish_requests(0)
    assert front.events(0, "error")[0]["operation"] == "gateway_stopped"


def test_a_system_without_poll_serves_sockets_too(joined, monkeypatch):
    monkeypatch.delattr(lmgateway.select, "POLLRDHUP", raising=False)
    monkeypatch.delattr(lmgateway.select, "poll")
    monkeypatch.delattr(lmgateway.selectors, "PollSelector")
    test_megabytes_pass_in_one_frame(joined, 0)
    client, studio = joined()
    studio.say({"a": 1})
    assert client.hear() == {"a": 1}
    client.sock.close()
    assert studio.closed() == "end"


# --- LOG_SOURCE

def logged_line(kind, stamp=1_700_000_000_000, **data):
    return {"type": "channelSend", "channelId": 0, "message": {"type": "log", "log": {
        "timestamp": stamp, "data": {"type": kind, **data}}}}


def until_news(stream):
    """The next bytes that the stream brings."""
    news = []
    until(lambda: news.append(stream.next_news(time.monotonic())) or news[-1])
    return news[-1]


@pytest.fixture
def diagnostics(studio, scripted, tmp_path):
    """(LogStream, LM Studio's side) without files here."""
    made = lmgateway.LogStream(lmgateway.Upstream(studio.url), lmgateway.Follower(str(tmp_path / "logs")), False)
    assert made.next_news(time.monotonic()) == b""
    side = scripted.met.get(timeout=PATIENCE_S)
    assert side.hear() == {"type": "channelCreate", "endpoint": "streamLogs", "channelId": 0}
    yield made, side
    made._leave()
    side.over.set()


@pytest.mark.parametrize(("line", "text"), [
    (logged_line("server.log", level="info", content="[2026-05-01 10:00:00][INFO] x\n"), b"[2026-05-01 10:00:00][INFO] x\n"),
    (logged_line("server.log", level="warn", content="plain"), b"[2023-11-14 22:13:20][WARN] plain\n"),
    (logged_line("runtime.log", level="debug", message="slot x\nsrv y"), b"[2023-11-14 22:13:20][DEBUG] slot x\nsrv y\n"),
    (logged_line("runtime.log", level=7, message="odd"), b"[2023-11-14 22:13:20][INFO] odd\n")])
def test_the_stream_gives_the_lines_of_a_log_file(diagnostics, utc, line, text):
    stream, side = diagnostics
    for other in ({"success": True}, logged_line("llm.prediction.input", input="secret"), logged_line("server.log"), []):
        side.say(other)
    side.say(line)
    assert until_news(stream) == text and stream.problem == ""


def test_the_figures_of_an_answer_fill_what_its_lines_leave_out(diagnostics, utc):
    stream, side = diagnostics
    parser, events = Parser(), []
    lines = [f"[2026-05-01 10:00:0{second}][INFO][m/one] {text}" for second, text in enumerate((
        "Running chat completion on conversation with 1 messages.", "Streaming response...", "Finished streaming response"))]
    output = {"output": "secret", "modelIdentifier": "m/one", "stats": {**SOCKET_STATS, "totalDraftTokensCount": 4}}
    chat = [*(logged_line("server.log", content=line) for line in lines), logged_line("llm.prediction.output", **output)]
    for packet in (*chat, *chat, logged_line("llm.prediction.output", **output),      # of no request
                   logged_line("llm.prediction.output", **{**output, "modelIdentifier": "a\n[2026-05-01 10:00:00][ERROR] b"})):
        side.say(packet)
    side.say(logged_line("server.log", content="[2026-05-01 10:00:09][INFO] last"))
    while not events or events[-1].data["message"] != "last":
        events += parser.feed(until_news(stream)) + parser.quiet()
    stats, again = [event.data for event in events if event.name == "lmstudio_prediction_stats"]
    assert stats == again
    assert {name: stats[name] for name in ("promptTokens", "completionTokens", "tokensPerSecond", "timeToFirstTokenMs",
                                           "draftTokens", "model")} == {
        "promptTokens": 30, "completionTokens": 5, "tokensPerSecond": 12.345, "timeToFirstTokenMs": 250.0,
        "draftTokens": 4, "model": "m/one"}
    assert [event.name for event in events].count("lmstudio_chat_end") == 2 and not parser.faults
    assert "secret" not in str(events) and not [event for event in events if event.name == "lmstudio_error"]


def test_a_stream_that_breaks_is_said_and_comes_back(diagnostics, scripted):
    stream, side = diagnostics
    side.sock.shutdown(socket.SHUT_RDWR)
    until(lambda: stream.next_news(time.monotonic()) or stream.problem)
    assert "closed the socket" in stream.problem
    assert stream.next_news(time.monotonic() + 6) == b"" and stream.problem == ""
    scripted.met.get(timeout=PATIENCE_S).over.set()


def test_files_that_grow_go_before_the_stream(studio, scripted, tmp_path):
    files = types.SimpleNamespace(next_news=lambda now: next(news), problem=None)
    for brought, by in (([b"", b"", b"line\n", b"more\n"], b"line\nmore\n"), ([b""] * 4, b"[2026-05-01 10:00:00][INFO] s\n")):
        news = iter(brought)
        stream = lmgateway.LogStream(lmgateway.Upstream(studio.url), files, True)
        assert stream.next_news(0.0) == b""
        side = scripted.met.get(timeout=PATIENCE_S)
        side.hear()
        side.say(logged_line("server.log", level="info", content="[2026-05-01 10:00:00][INFO] s"))
        assert lmgateway.readable(stream._side.sock, PATIENCE_S)
        found = stream.next_news(0.1)
        assert found == b""
        assert stream.next_news(1.0) + stream.next_news(3.0) == by
        stream._leave()
        side.over.set()


def test_a_source_is_chosen_once_it_speaks_and_files_for_good(studio, scripted):
    news = iter([b"", b"", b"line\n", b""])
    files = types.SimpleNamespace(next_news=lambda now: next(news), problem=None)
    stream = lmgateway.LogStream(lmgateway.Upstream(studio.url), files, True)
    assert [stream.next_news(now) for now in (0.0, 9.0, 18.0, 27.0)] == [b"", b"", b"line\n", b""]
    assert len(scripted.paths) == 1     # it is not asked again


# --- sharing one machine


def turn(name, clock=0.0, model="m", priority="normal", key=None):
    return lmgateway.Turn(model, key or name, name, priority, clock)


def order_of(slots, turns, clock=0.0, scheduler=None):
    """The names of turns in the order in which they run, each for no time."""
    scheduler, found = scheduler or lmgateway.Scheduler(slots), []
    begun = [one for each in turns for one in scheduler.join(each, each.since)]
    while begun:
        found.append(begun[0].who)
        begun = begun[1:] + scheduler.leave(begun[0], clock)
    assert not scheduler.waiting and not scheduler._lines and not scheduler._of_key
    return found


@pytest.mark.parametrize(("turns", "clock", "order"), [
    ([turn("a"), turn("b"), turn("c")], 0, "abc"),
    ([turn("x"), turn("l", priority="low"), turn("n"), turn("h", priority="high")], 0, "xhnl"),
    ([turn("x"), turn("l", priority="low"), turn("n", 59)], 59, "xln"),   # it was raised by one, and came first
    ([turn("x"), turn("l", priority="low"), turn("n", 61), turn("h", 61, priority="high")], 61, "xlhn"),
    ([turn("x"), turn("a"), turn("a"), turn("a"), turn("b"), turn("x")], 0, "xabxaa"),   # a flood has its turn
    ([turn("x", 100), turn("l", 100, priority="low"), turn("n", 100)], 0, "xnl")])  # no negative wait
def test_whose_turn_it_is(turns, clock, order):
    assert "".join(order_of(1, turns, clock)) == order


def test_whoever_has_the_fewest_running_comes_before_whoever_was_served_longest_ago():
    scheduler, turns = lmgateway.Scheduler(4), [turn(name) for name in "aabcab"]
    for each in turns:
        scheduler.join(each, 0)
    assert scheduler.leave(turns[3], 1) == [turns[5]] and scheduler.leave(turns[5], 2) == [turns[4]]


def test_slots_count_for_each_model_and_a_keys_own_limit_holds_nobody_up():
    scheduler = lmgateway.Scheduler(2)
    scheduler.limits["a"] = 1
    first, second, third, other = turn("a"), turn("a"), turn("b"), turn("c", model="n")
    assert [scheduler.join(each, 0) for each in (first, second, third, other)] == [[first], [], [third], [other]]
    fourth = turn("d")
    assert scheduler.join(fourth, 0) == [] and scheduler.counts("a") == (1, 1)
    assert scheduler.leave(third, 1) == [fourth]    # the one of a may not run yet
    elsewhere = turn("a", model="n")
    assert scheduler.join(elsewhere, 1) == []   # the limit is one of all models
    assert scheduler.leave(first, 1) == [second] and scheduler.leave(first, 1) == []
    assert scheduler.leave(second, 2) == [elsewhere]


def test_two_names_of_one_model_share_its_slots_once_that_is_known():
    scheduler = lmgateway.Scheduler(1)
    one, two, three, four = turn("a", model="x"), turn("b", model="y"), turn("c", model="x"), turn("d", model="y")
    assert [scheduler.join(each, 0) for each in (one, two, three, four)] == [[one], [two], [], []]
    scheduler.rename("x", "y")
    assert scheduler.leave(one, 1) == [] and scheduler.leave(two, 1) == [three]     # the name has one slot now
    assert [each["position"] for _, each in scheduler.places(1)] == [1]


def test_places_and_what_is_foretold():
    scheduler = lmgateway.Scheduler(1)
    assert order_of(1, [turn("a")] , 9.0, scheduler) == ["a"]
    running, waiting = turn("a", 10), [turn("b", 10), turn("c", 10)]
    for each in (running, *waiting):
        scheduler.join(each, 10)
    assert [place for _, place in scheduler.places(12)] == [{"position": 1, "waiting": 2}, {"position": 2, "waiting": 2}]
    scheduler._times["m"] = [10.0, 10.0, 20.0]
    assert [place["etaMs"] for _, place in scheduler.places(12)] == [8000, 18000]
    assert [place["etaMs"] for _, place in scheduler.places(22)] == [8000, 18000]   # it is one of the long ones
    assert [place["etaMs"] for _, place in scheduler.places(12, lambda turn: 30.0)] == [30000, 40000]
    assert "etaMs" not in scheduler.places(40)[0][1]    # it is longer than any


def test_a_choice_among_500_people_is_quick():
    scheduler, spent = lmgateway.Scheduler(4), []
    turns = [turn(f"k{number}") for number in range(504)]
    running = [begun for each in turns for begun in scheduler.join(each, 0)]
    for _ in range(200):
        began = time.perf_counter()
        running += scheduler.leave(running.pop(0), 1)
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[100] < 30e-6     # a fifth of that on a machine with nothing else to do


def test_a_minute_slides_and_a_day_ends():
    account, limits = lmgateway.Account(), {"rpm": 2, "tpm": 100, "tpd": 150}
    account.turn("mon")
    account.let_in(0.0)
    account.let_in(30.0)
    assert account.refusal(limits, 40.0, 500) == ("rpm", 2, 20.0) and account.refusal(limits, 60.0, 500) is None
    account.spend(60.0, 60, 40)
    assert account.refusal(limits, 61.0, 500) == ("tpm", 100, 59.0) and account.refusal({"rpm": 2}, 61.0, 500) is None
    assert dict(account.headers(limits, 61.0)) == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "29s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "59s"}
    account.spend(120.0, 0, 50)
    assert account.refusal(limits, 200.0, 500) == ("tpd", 150, 500)
    account.turn("tue")
    assert account.refusal(limits, 200.0, 500) is None and account.headers({"tpd": 1}, 0.0) == []
    assert [lmgateway.span(seconds) for seconds in (0, 0.25, 1, 59.2, 360)] == ["0s", "250ms", "1s", "1m0s", "6m0s"]


class Household:
    """A gateway before a scripted LM Studio that answers when it is told to, and keys that were minted."""

    def __init__(self, front, studio, keys, tickets):
        self.front, self.studio, self.keys = front, studio, tickets
        self.command, self.go = keys, threading.Semaphore(0)
        studio.script = lambda peer: (peer.line.startswith("POST") and self.go.acquire(timeout=PATIENCE_S),
                                      peer.send(plain(CHAT_WHOLE)))

    def ask(self, line, who, body=b"", *headers):
        status, found, data = ask(self.front, line, f"X-API-Key: {self.keys[who]}", *headers, body=body)
        return status, dict(found), json.loads(data)

    def chat(self, who, body=b'{"model":"m"}', path="/v1/chat/completions", *headers):
        """Ask in a thread; gives a queue for the answer."""
        def run():
            with contextlib.suppress(OSError, ValueError):  # it may be cut off
                answer.put(self.ask(f"POST {path}", who, body, *headers))

        answer = queue.Queue()
        threading.Thread(target=run, daemon=True).start()
        return answer

    def rows(self, who="root", **wanted):
        return [row for row in self.ask("GET /debug/requests", who)[2]["requests"]
                if all(row.get(name) == value for name, value in wanted.items())]

    def me(self, who):
        return self.ask("GET /me", who)[2]


@pytest.fixture
def household(keys, fronts, studio):
    def make(*flags, **options):
        tickets = {name: keys("--new-key", name, *flags)[1].strip() for name in ("anna", "ben")}
        tickets["root"] = keys("--new-key", "root", "--rights", "admin")[1].strip()
        front = fronts(keys_file=str(keys.path), **options)
        front.server.LOOK_S = 0.05
        return Household(front, studio, keys, tickets)
    return make


def test_inferences_wait_for_their_turn_are_told_and_then_answered(household):
    home = household(max_running=1)
    answers = [home.chat("anna")]
    until(lambda: len(home.studio.peers) == 1)
    for who, path, place in (("ben", "/v1/chat/completions", 1), ("anna", "/v1/embeddings", 2)):
        answers.append(home.chat(who, path=path))
        until(lambda: [row["position"] for row in home.rows(state="queued", key=who)] == [place])
    assert home.rows("ben", state="queued")[0]["waiting"] == 2 and home.me("ben")["waiting"] == 1
    assert home.ask("GET /v1/models", "ben")[0] == 200 and home.me("anna")["running"] == 1   # it never waits
    (told, *_) = home.front.events(0, "inference_progress", count=2)
    assert (told["state"], told["position"], told["key"]) == ("queued", 1, "ben")
    assert len(home.front.events(0, "inference_start", count=3)) == 3 and len(home.studio.peers) == 2
    text = ask(home.front, "GET /metrics", f"X-API-Key: {home.keys['root']}")[2].decode()
    assert 'lmstudio_gateway_queue_waiting{model="other"} 2' in text
    home.go.release(3)
    assert [answer.get(timeout=PATIENCE_S)[0] for answer in answers] == [200] * 3
    assert len([row for row in home.rows() if row.get("queuedMs", 0) > 0]) == 2 and home.me("anna")["running"] == 0
    assert not home.front.gateway.turns._scheduler.waiting


def test_people_behind_one_key_take_turns(household):
    home = household(max_running=1, users_from=("anna",))
    answers = [home.chat("anna", b'{"model":"m","user":"eva"}')]
    until(lambda: len(home.studio.peers) == 1)
    for count, user in enumerate(("eva", "eva", "fritz"), 1):
        answers.append(home.chat("anna", json.dumps({"model": "m", "user": user}).encode()))
        until(lambda: len(home.rows(state="queued")) == count)
    assert [row["position"] for row in home.rows(state="queued")] == [1, 3, 2]   # the newest first
    home.go.release(4)
    assert [answer.get(timeout=PATIENCE_S)[0] for answer in answers] == [200] * 4


def test_the_queue_has_an_end_and_a_client_that_leaves_it_never_reached_lm_studio(household):
    home = household(max_running=1, max_waiting=1)
    first = home.chat("anna")
    until(lambda: len(home.studio.peers) == 1)
    with dial(home.front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"model":"m"}', f"X-API-Key: {home.keys['ben']}"))
        until(lambda: home.rows(state="queued"))
        for path in ("/v1/chat/completions", "/v1/messages"):
            status, headers, body = home.ask(f"POST {path}", "anna", b'{"model":"m"}')
            assert (status, body["error"]["code"]) == (429, "queue_full") and int(headers["Retry-After"]) > 0
            assert ("type" in body) == ("messages" in path)
    until(lambda: home.rows(operation="client_disconnected"))
    home.go.release()
    assert first.get(timeout=PATIENCE_S)[0] == 200 and len(home.studio.peers) == 1
    assert not home.front.gateway.turns._scheduler._lines


def dies(home, row):
    """Its thread has a fault, with the answer in hand."""
    def fault(*args):
        lmgateway.framed_head = before
        raise ZeroDivisionError("planted")

    before, lmgateway.framed_head = lmgateway.framed_head, fault
    home.studio.peers[0].send(plain(b"{}"))


ENDINGS = {     # how a request that runs ends -> what does it
    "answered": lambda home, row: home.go.release(),
    "stopped": lambda home, row: home.ask(f"DELETE /debug/requests/{row['requestId']}", "anna"),
    "reset": lambda home, row: home.studio.peers[0].reset(),
    "fault": lambda home, row: (setattr(home.front.gateway.hub, "end", lambda *args: 1 / 0),
                                home.studio.peers[0].send(plain(b"{}"))),
    "dies": dies,
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_slot_is_free_whatever_way_a_request_ends(household, end):
    home = household(max_running=1)
    home.chat("anna")
    until(lambda: len(home.studio.peers) == 1)
    home.chat("ben")
    until(lambda: home.rows(state="queued"))
    end(home, home.rows(key="anna")[0])
    until(lambda: len(home.studio.peers) == 2)
    home.front.gateway.hub.__dict__.pop("end", None)
    home.go.release()
    home.go.release()
    until(lambda: not home.front.gateway.turns._scheduler._lines)
    home.front.hub._requests.running.clear()


def test_limits_are_told_as_openai_tells_them(household):
    home = household("--limits", "rpm=2")
    home.go.release(9)
    status, headers, _ = home.ask(POST_CHAT, "anna", b"{}")
    assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "1")
    assert home.ask("GET /v1/models", "anna")[0] == 200     # is none of them
    home.ask(POST_CHAT, "anna", b"{}")
    for _ in range(3):  # a refused one counts nowhere
        status, headers, body = home.ask(POST_CHAT, "anna", b"{}")
        assert (status, body["error"]["code"], body["error"]["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 0 < int(headers["Retry-After"]) <= 60 and headers["x-ratelimit-remaining-requests"] == "0"
        assert body["error"]["message"].startswith("rpm: 2 of 2 requests")
    assert home.ask("POST /v1/messages", "anna", b"{}")[2]["type"] == "error"
    assert home.me("anna") == {
        "name": "anna", "rights": ["infer"], "priority": "normal", "limits": {"rpm": 2}, "models": [], "expires": None,
        "running": 0, "waiting": 0, "minute": {"requests": 2, "tokens": home.me("anna")["minute"]["tokens"]},
        "day": {"requests": 2, **{name: home.me("anna")["day"][name] for name in ("promptTokens", "completionTokens")}}}
    assert home.me("anna")["minute"]["tokens"] > 0 and len(home.rows(key="anna")) == 2
    home.command("--set-key", "anna", "--limits", "none")
    until(lambda: home.ask(POST_CHAT, "anna", b"{}")[0] == 200)
    assert "x-ratelimit-limit-requests" not in home.ask(POST_CHAT, "anna", b"{}")[1]


def test_me_is_for_whoever_has_a_key_or_needs_none(front, guarded):
    assert json.loads(fetched(front, "/me")[2])["name"] is None and fetched(guarded, "/me")[0] == 401


def test_a_key_is_bound_to_models_and_ends_with_its_last_day(household):
    home = household("--models", "Qwen*,b")
    home.go.release(9)
    for model, status in (("qwen3-8b", 200), ("b", 200), ("bb", 403), (None, 403)):
        found, _, body = home.ask(POST_CHAT, "anna", json.dumps({"model": model}).encode())
        assert found == status and (found == 200 or body["error"]["code"] == "model_not_allowed")
    home.command("--set-key", "anna", "--expires", time.strftime("%Y-%m-%d"), "--models", "*")
    until(lambda: home.ask(POST_CHAT, "anna", b"{}")[0] == 200 and home.me("anna")["expires"])
    home.command("--set-key", "anna", "--expires", "2020-01-01")
    until(lambda: home.ask(POST_CHAT, "anna", b"{}")[0] == 401)
    assert home.ask(POST_CHAT, "anna", b"{}")[2]["error"]["code"] == "key_expired"
    home.command("--set-key", "anna", "--expires", "never")
    until(lambda: home.ask(POST_CHAT, "anna", b"{}")[0] == 200)


def test_a_keys_own_limit_makes_wait_and_a_new_one_or_none_counts_for_those_that_wait(household):
    home = household("--limits", "running=1")
    for who in ("anna", "ben"):
        home.chat(who)
        until(lambda: home.rows(key=who))
        answer = home.chat(who)
        until(lambda: home.rows(key=who, state="queued"))
    home.command("--set-key", "anna", "--limits", "running=2")
    until(lambda: not home.rows(key="anna", state="queued"))
    assert home.me("anna")["running"] == 2
    home.command("--revoke-key", "ben")
    assert answer.get(timeout=PATIENCE_S)[0] == 401
    home.go.release(9)
    until(lambda: not home.front.gateway.inferences)


def test_a_key_that_may_infer_sees_its_own_and_nothing_else(household):
    home = household()
    home.chat("ben"), home.chat("anna")
    until(lambda: len(home.rows(state="waiting")) == 2)
    theirs, own = home.rows(key="ben")[0]["requestId"], home.rows("anna")[0]["requestId"]
    assert [row["key"] for row in home.rows("anna")] == ["anna"]
    assert [home.ask(f"GET /debug/requests/{one}", "anna")[0] for one in (own, theirs, "req_x")] == [200, 404, 404]
    assert [home.ask(f"DELETE /debug/requests/{one}", "anna")[0] for one in (theirs, "req_x")] == [403, 404]
    for path in ("status", "metrics", "series", "models", "usage"):
        assert home.ask(f"GET /debug/{path}", "anna")[0] == 403
    tell = lambda name, one: home.front.hub.publish([lmgateway.Event(name, {"requestId": one, "message": "x"})])
    tell("lmstudio_log", own), tell("lmstudio_chat_end", theirs), tell("lmstudio_chat_end", own)
    for query in ("?since=1", "?since=0&events=inference_start,lmstudio_log,lmstudio_chat_end"):
        with dial(home.front.port) as sock:
            sock.sendall(request(f"GET /debug/stream{query}", b"", f"X-API-Key: {home.keys['anna']}"))
            seen = read_until(sock, b"event: lmstudio_chat_end")
            home.front.hub.publish([lmgateway.Event("lmstudio_chat_start", {"requestId": own})])
        assert theirs.encode() not in seen and b"lmstudio_log" not in seen
    home.go.release(2)
    until(lambda: not home.front.gateway.inferences)


def test_a_request_is_stopped_by_its_owner_or_an_admin(household):
    home = household(max_running=1)
    running = home.chat("anna")
    until(lambda: len(home.studio.peers) == 1)
    waiting = home.chat("ben", b'{"model":"m"}', "/v1/messages")
    until(lambda: home.rows(key="ben"))
    (row,) = home.rows(key="ben")
    status, _, record = home.ask(f"DELETE /debug/requests/{row['requestId']}", "root")
    assert (status, record["operation"], record["by"]) == (200, "stopped", "root")
    status, headers, body = waiting.get(timeout=PATIENCE_S)
    assert (status, body["type"], body["error"]["code"], headers["x-should-retry"]) == (503, "error", "stopped", "false")
    assert home.ask(f"DELETE /debug/requests/{row['requestId']}", "ben")[0] == 409
    (row,) = home.rows(key="anna")
    assert home.ask(f"DELETE /debug/requests/{row['requestId']}", "anna")[0] == 200
    assert running.get(timeout=PATIENCE_S)[0] == 503 and len(home.studio.peers) == 1
    assert [(event["operation"], event["by"]) for event in home.front.events(0, "error", count=2)] == [
        ("stopped", "root"), ("stopped", "anna")]
    home.go.release()


@pytest.mark.parametrize(("headers", "body", "user"), [
    (["X-OpenWebUI-User-Email: eva%40home", "X-OpenWebUI-User-Name: Eva"], {}, "eva@home"),
    (["X-OpenWebUI-User-Name: Eva%20B%C3%A4r", "X-OpenWebUI-User-Id: 7"], {"user": "x"}, "Eva B\u00e4r"),
    ([], {"user": "fritz"}, "fritz"), ([], {"user": 7}, None), ([], {}, None)])
def test_people_behind_a_shared_key(household, headers, body, user):
    home = household(users_from=("anna",))
    home.go.release(2)
    for who, known in (("anna", user), ("ben", None)):
        for line in ("GET /v1/models", POST_CHAT):
            home.ask(line, who, json.dumps(body).encode(), *headers)
            passed = [name for name, _ in home.studio.peers[-1].headers if "OpenWebUI" in name]
            assert len(passed) == (0 if who == "anna" else len(headers))
        assert home.rows(key=who)[0]["user"] == known
    start, other = home.front.events(0, "inference_start", count=2)
    assert (start.get("user"), "user" in other) == (user, False)


def test_a_waiting_stream_is_told_its_place_in_comments(household, monkeypatch):
    monkeypatch.setattr(lmgateway.CommentedForward, "SILENCE_S", 0.05)
    home = household(max_running=1, prefill_comments=True)
    home.chat("anna")
    until(lambda: len(home.studio.peers) == 1)
    with dial(home.front.port) as sock:
        sock.sendall(request(POST_CHAT, b'{"stream":true,"model":"m"}', f"X-API-Key: {home.keys['ben']}"))
        read_until(sock, b": queued 1 of 1\n\n")
        home.go.release(2)
        assert b"event: error" not in rest_of(sock)
    until(lambda: not home.front.gateway.turns._scheduler._lines)


def test_a_days_count_survives_a_restart(keys, fronts, studio, tmp_path):
    records = [lmgateway.Record(f"r{number}", time.time(), 0.0, key=key, stream=False, source=source) for number, key, source in
               ((1, "anna", "gateway"), (2, None, "lmstudio"))]
    for record in records:
        record.usage = {"promptTokens": 30, "completionTokens": 12}
        record.end(1.0, lmgateway.Outcome("done", 200))
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep([lmgateway.history_row(record) for record in records])
    history.close()
    config = lmgateway.Config(keys_file=str(keys.path))
    turns = lmgateway.Turns(config, lmgateway.AccessControl(config), lmgateway.Hub(), history)
    assert turns.used("anna")["day"] == {"requests": 1, "promptTokens": 30, "completionTokens": 12}
    assert turns.used(None)["day"]["requests"] == 0
    said = keys("--new-key", "anna", "--limits", "tpd=9,running=2", "--priority", "low", "--models", "q*", "--expires", "2099-01-31")[2]
    assert "anna may ask models and see its own requests; running=2,tpd=9  priority low  models q*  until 2099-01-31" in said
    listed = keys("--list-keys", "--history", history.path)[1]
    assert re.search(r"anna +infer .*tpd=9.*priority low  models q\*  until 2099-01-31  last used \d{4}", listed), listed


def test_a_history_of_an_earlier_version_gets_the_new_columns(tmp_path):
    path, kept = str(tmp_path / "h.db"), [row[:2] for row in lmgateway.HISTORY if row[0] not in ("user", "queued_ms")]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE requests ({', '.join(map(' '.join, kept))})")
        connection.execute("INSERT INTO requests (id, source, started, key) VALUES ('r0', 'gateway', 1.0, 'anna')")
    history, record = lmgateway.History(path), lmgateway.Record("r1", 2.0, 0.0, key="anna", user="eva")
    record.wait({"position": 1, "waiting": 1}, 0.0)
    record.send(1.5)
    record.end(2.0, lmgateway.Outcome("done", 200))
    history.keep([lmgateway.history_row(record)])
    history.close()
    assert {row["user"]: row["requests"] for row in history.usage("user")} == {"anna": 1, "eva": 1}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT queued_ms FROM requests ORDER BY id").fetchall() == [(None,), (1500.0,)]


@pytest.mark.parametrize("flags", ["--limits rpm", "--limits rpm=0", "--limits rpm=1,rpm=2", "--limits x=1", "--priority top",
                                   "--models a[", "--models ,", "--expires 31.12.", "--expires 0d", "--rights all"])
@pytest.mark.parametrize("command", ["--new-key", "--set-key"])
def test_wrong_terms_are_one_line(keys, flags, command):
    status, out, said = keys(command, "anna", *flags.split())
    assert (status, out, said.count("\n")) == (2, "", 1) and said.startswith("lmgateway: " + flags.split()[0])


def test_fields_of_a_newer_version_stay_when_a_key_is_changed(keys):
    keys("--new-key", "anna", "--limits", "rpm=3")
    content = json.loads(keys.path.read_text())
    content["keys"][0].update(colour="red", limits={"rpm": 3, "new": "x"})
    keys.path.write_text(json.dumps({**content, "version": 9}))
    status, _, said = keys("--set-key", "anna", "--priority", "low")
    assert status == 0 and "rpm=3  priority low" in said and "new" not in said
    row = json.loads(keys.path.read_text())["keys"][0]
    assert (row["colour"], row["limits"], row["priority"]) == ("red", {"rpm": 3, "new": "x"}, "low")
    assert keys("--set-key", "ben", "--priority", "low")[0] == 2 and keys("--set-key", "anna")[0] == 2


# --- TLS

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(certificate, key), made by the README's own line."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    folder = tmp_path_factory.mktemp("tls")
    line = re.search(r"`(openssl req [^`]+)`", (HERE / "README.md").read_text(encoding="utf-8"))[1]
    subprocess.run(line.replace("HOST", "localhost").split(), check=True, capture_output=True, cwd=folder)
    return [str(folder / name) for name in ("cert.pem", "key.pem")]


def secured(sock, pair):
    return ssl.create_default_context(cafile=pair[0]).wrap_socket(sock, server_hostname="localhost")


def test_https_serves_like_http_and_marks_its_cookie(fronts, studio, pair):
    front = fronts(tls_cert=pair[0], tls_key=pair[1], api_key=KEYS)
    with secured(dial(front.port), pair) as sock:
        sock.sendall(request("GET /v1/models", b"", f"X-API-Key: {ANNA}", close=False))
        assert status_of(read_until(sock, b"true}")) == 200
        sock.sendall(request("POST /login", json.dumps({"key": ANNA}).encode()))
        assert b"SameSite=Strict; Secure\r\n" in rest_of(sock)
    with dial(front.port), secured(dial(front.port),
                                   pair) as sock:     # who says nothing, or speaks no TLS, holds up nobody
        assert b"HTTP/1.1 200" not in talk(front.port, request())
        sock.sendall(request("GET /health"))
        assert status_of(rest_of(sock)) == 200


@pytest.mark.parametrize(("goodbye", "system"), [(True, "Linux"), (False, "Linux"), (True, "macOS")])
def test_a_client_that_leaves_over_tls_ends_the_request_within_a_second(
        fronts, studio, pair, monkeypatch, goodbye, system):
    if system != "Linux":
        monkeypatch.delattr(lmgateway.select, "POLLRDHUP", raising=False)
    front = fronts(tls_cert=pair[0], tls_key=pair[1])
    ended, here = queue.Queue(), threading.Event()
    studio.script = lambda peer: (here.set(), ended.put(peer.wait_for_end()))
    sock = secured(dial(front.port), pair)
    sock.sendall(request(POST_CHAT, b"{}"))
    assert here.wait(PATIENCE_S)
    if goodbye:
        sock.settimeout(0.01)
        with contextlib.suppress(OSError):
            sock.unwrap()
    if system == "Linux":       # elsewhere the goodbye alone has to tell
        sock.close()
    assert ended.get(timeout=PATIENCE_S) < 1.0
    sock.close()
    assert front.events(0, "error")[0]["operation"] == "client_disconnected"


def test_a_socket_over_tls_passes_megabytes_both_ways_at_once(fronts, scripted, pair):
    client = enter(fronts(tls_cert=pair[0], tls_key=pair[1]), secure=lambda sock: secured(sock, pair))
    assert client.hear() == {"success": True}
    studio, value = scripted.met.get(timeout=PATIENCE_S), {"type": "keepAlive", "x": "a" * 3_000_000}
    threading.Thread(target=studio.say, args=(value,), daemon=True).start()
    client.say(value)
    assert (client.hear(), studio.hear()) == (value, value)
    client.sock.close()
    assert studio.closed() == "end"
    studio.over.set()


def test_https_to_lm_studio_checks_its_certificate(fronts, pair):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with contextlib.suppress(OSError):
                context.wrap_socket(listener.accept()[0], server_side=True)

        threading.Thread(target=serve, daemon=True).start()
        front = fronts(f"https://127.0.0.1:{listener.getsockname()[1]}")
        status, _, body = ask(front, "GET /v1/models")
    assert status == 502 and "certificate" in json.loads(body)["error"]["message"].lower()


def test_a_bad_pair_is_said_clearly(pair, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    subprocess.run(["openssl", "rsa", "-aes128", "-passout", "pass:word", "-in", pair[1],
                    "-out", str(locked)], check=True, capture_output=True)
    for cert, key, said in ((pair[0], None, "go together"), (str(junk), pair[1], "a matching pair"),
                            (pair[0], pair[0], "a matching pair"),
                            (pair[0], str(locked), "asks for a password"),
                            (pair[0], str(tmp_path / "none"), "No such file")):
        with pytest.raises(lmgateway.ConfigError, match=said):
            lmgateway.tls_context(lmgateway.Config(tls_cert=cert, tls_key=key))
    sound = lmgateway.tls_context(lmgateway.Config(tls_cert=pair[0], tls_key=pair[1]))
    assert sound.minimum_version == ssl.TLSVersion.TLSv1_2


# --- hostile bytes

GET, POST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n", b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOSTILE_BYTES = {   # bytes, what may be answered first
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
    "two equal lengths": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    "list of lengths": (POST + b"Content-Length: 5, 5\r\n\r\nhello", 400),
    "signed length": (POST + b"Content-Length: +5\r\n\r\nhello", 400),
    "negative length": (POST + b"Content-Length: -5\r\n\r\nhello", 400),
    "hex length": (POST + b"Content-Length: 0x5\r\n\r\nhello", 400),
    "empty length": (POST + b"Content-Length: \r\n\r\n" + SMUGGLED, 400),
    "digits of elsewhere": (POST + b"Content-Length: \xb25\r\n\r\nhello", 400),
    "underscore": (POST + b"Content-Length: 1_0\r\n\r\nhello", 400),
    "huge length": (POST + b"Content-Length: 9999999999999999999999\r\n\r\nhello", 400),
    "large length": (POST + b"Content-Length: 999999999999\r\n\r\n", 413),
    "both framings": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
                      400),
    "both, hidden": (POST + b"Transfer-Encoding: chunked\r\nContent-length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
                     400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 501),
    "two codings": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED, 501),
    "unknown coding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 501),
    "empty coding": (POST + b"Transfer-Encoding: \r\n\r\n0\r\n\r\n" + SMUGGLED, 501),
    "coding behind a tab": (POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "coding in HTTP/1.0": (POST.replace(b"1.1",
                                        b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
                                        400),
    "blank before the colon": (POST + b"Content-Length : 5\r\n\r\nhello", 400),
    "blank before the name": (POST + b" Content-Length: 5\r\n\r\nhello", 400),
    "folded": (GET + b"X: a\r\n b\r\n\r\n", 400), "no name": (GET + b": a\r\n\r\n", 400),
    "no colon": (GET + b"X\r\n\r\n", 400),
    "NUL in a value": (GET + b"X: a\x00b\r\n\r\n", 400), "NUL in a name": (GET + b"X\x00: a\r\n\r\n", 400),
    "bare CR": (GET + b"X: a\rY: b\r\n\r\n", 400),
    "bare LF": (GET + b"X: a\nY: b\r\n\r\n", 400), "LF only": (GET.replace(b"\r\n", b"\n") + b"\n", 400),
    "CR only": (GET.replace(b"\r\n", b"\r") + b"\r\r\n\r\n", 400),
    "control character": (GET + b"X: a\x1bb\r\n\r\n", 400),
    "two hosts": (GET + b"Host: localhost\r\n\r\n", 400), "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "absolute form": (b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "at": (b"GET @evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "fragment": (b"POST /v1/chat\\completions# HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "no path": (b"GET evil.example HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "blank in target": (b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "tab in line": (b"GET\t/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "two blanks": (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "non-ASCII target": (b"GET /\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "NUL in target": (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "blank first": (b" GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 501),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "lower case": (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "odd method": (b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), "HTTP/3": (b"GET / HTTP/3\r\n\r\n", 505),
    "HTTP/1.10": (b"GET / HTTP/1.10\r\nHost: localhost\r\n\r\n", (400, 505)),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400), "http/1.1": (b"GET / http/1.1\r\n\r\n", 400),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\n\r\n", 505),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(200), (400, None)), "nothing": (b"", None),
    "empty lines": (b"\r\n" * 5, None), "endless empty lines": (b"\r\n" * 50_000, 400),
    "zeros": (bytes(10_000), (400, 414)), "garbage": (bytes(range(256)) * 60, (400, 414)),
    "long line": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "endless line": (b"G" * 100_000, 414),
    "long header": (GET + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "many headers": (GET + b"X: a\r\n" * 200 + b"\r\n", 431),
    "endless headers": (GET + b"X: a\r\n" * 20_000, 431),
    "long blanks": (GET + b"X: a" + b" " * 60_000 + b"b\r\n\r\n", 200),
    "blanks and a control": (GET + b"X:" + b" " * 60_000 + b"\x01\r\n\r\n", 400),
    "bad chunk size": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + SMUGGLED, 400),
    "long chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunk LF": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n" + SMUGGLED, 400),
    "endless chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 20_000, 400),
    "huge chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", 413),
    "bad trailer": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX\x00: a\r\n\r\n" + SMUGGLED, 400),
    "expectation": (POST + b"Expect: 200-maybe\r\nContent-Length: 5\r\n\r\nhello", 417),
    **{f"path {path}": (b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400)
       for path in ("/v1/../api", "/v1/.", "/./v1", "/..", "/v1/%2e%2E/api", "/v1/.%2e/x", "/v1/..%2fapi", "/v1/%2e", "/v1\\api", "/v1/%5Capi",
                    "/v1/%252e%252e/api", "/v1/%25252e%25252e/x", "/v1/%255c")},
    "dots elsewhere": (b"GET /v1/.../a..b?../.%2e/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200),
}


@pytest.mark.parametrize("row", HOSTILE_BYTES.values(), ids=HOSTILE_BYTES)
def test_hostile_bytes_are_refused_and_reach_nobody(front, studio, row):
    data, wanted = row
    with dial(front.port) as sock:
        sock.settimeout(PATIENCE_S)
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
            if wanted == 200:   # who closes one side before the answer has left
                answer = read_until(sock, b"}")
            sock.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        answer += rest_of(sock)
        assert time.monotonic() - started < 3
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]
    assert (statuses or [None])[0] in (wanted if isinstance(wanted, tuple) else (wanted,))
    assert len(statuses) <= 1
    assert [peer.line.encode() for peer in studio.peers] == ([data.partition(b"\r\n")[0]] if wanted == 200 else [])
    if wanted and wanted != 200 and answer:
        assert b"\r\nConnection: close\r\n" in answer and error_of(answer)["message"]
    assert status_of(talk(front.port, request("GET /health"))) == 200


@pytest.mark.parametrize("data", [b"\r\n" + request(), b"\r\n\r\n\r\n" + request(),
                                  request("GET /v1/models?x=\"<>\\^`{|}")])
def test_odd_but_proper_requests_are_served(front, studio, data):
    assert status_of(talk(front.port, data)) == 200 and len(studio.peers) == 1


def test_a_length_that_is_announced_takes_no_memory(front):
    with contextlib.ExitStack() as heads, tracing() as peak:
        for _ in range(8):
            heads.enter_context(dial(front.port)).sendall(POST + b"Content-Length: 268435456\r\n\r\nx")
        until(lambda: front.server.memory.used == 8)
        assert peak() < 20_000_000


def test_all_bodies_together_have_a_budget(fronts, studio):
    front = fronts(max_body_memory=150_000)
    with dial(front.port) as sock:
        sock.sendall(POST + b"Content-Length: 100000\r\nConnection: close\r\n\r\n" + b"x" * 99_999)
        until(lambda: front.server.memory.used == 99_999)
        for sent in (request("POST /v1/x", b"x" * 60_000),
                     request("POST /v1/x", b"", "Transfer-Encoding: chunked") + framed(b"x" * 60_000)):
            refused = talk(front.port, sent)
            assert (status_of(refused), error_of(refused)["code"]) == (503, "bodies_too_large")
            assert b"\r\nRetry-After: " in refused
        assert ask(front, "POST /v1/x", body=b"x" * 50_000)[0] == 200
        sock.sendall(b"x")
        assert status_of(rest_of(sock)) == 200
    until(lambda: front.server.memory.used == 0)
    assert ask(front, "POST /v1/x", body=b"x" * 150_000)[0] == 200 and len(studio.peers) == 3
    assert ask(front, "POST /v1/x", body=b"x" * 150_001)[0] == 413      # never, whatever others do


def test_a_body_that_drips_has_a_deadline_for_the_whole(front, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "BODY_S", 0.1)
    with dial(front.port) as sock:
        sock.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        while not lmgateway.select.select([sock], [], [], 0.02)[0] and time.monotonic() - started < 2:
            sock.sendall(b"x")
        assert time.monotonic() - started < 1 and status_of(rest_of(sock)) == 408


def test_slow_heads_end_in_408(front, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "HEAD_S", 0.1)
    with dial(front.port) as sock:
        sock.sendall(GET)
        answer = rest_of(sock)
    assert (status_of(answer), error_of(answer)["code"]) == (408, "head_timeout")


def test_a_head_that_drips_is_given_no_more_time(front, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "HEAD_S", 0.1)
    with dial(front.port) as sock:
        sock.sendall(GET)
        started = time.monotonic()
        while not lmgateway.select.select([sock], [], [], 0.02)[0] and time.monotonic() - started < 1:
            sock.sendall(b"X")
        assert time.monotonic() - started < 0.5 and status_of(rest_of(sock)) == 408


def test_a_refused_client_that_sends_on_for_ever_is_left(fronts, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "LINGER_S", 0.1)
    front, started = fronts(max_body=10), time.monotonic()
    with dial(front.port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request("POST /v1/x", b"", "Content-Length: 1000000000"))
        while time.monotonic() - started < 2:
            sock.sendall(b"x" * 1000)
    assert time.monotonic() - started < 1


def test_a_refused_request_without_a_body_costs_no_connection(guarded):
    answer = talk(guarded.port, request("GET /debug/status", close=False) + request("GET /health"))
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"401", b"200"]


@pytest.mark.parametrize("line", ["POST /v1/x", "POST /health", "POST /debug/status"])
def test_the_body_of_a_refused_request_is_no_request(guarded, studio, line):
    data = request(line, SMUGGLED, "X-API-Key: wrong", close=False) + request("GET /health")
    answer = talk(guarded.port, data)
    assert len(re.findall(rb"HTTP/1\.1 ", answer)) == 1 and b"Connection: close" in answer
    assert not studio.peers


def test_bodies_that_stop_coming_end_in_408_and_silent_clients_without_a_word(front, monkeypatch):
    monkeypatch.setattr(lmgateway.Wire, "CLIENT_S", 0.04)
    for framing in (b"Content-Length: 5\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"):
        with dial(front.port) as sock:
            sock.sendall(POST + framing)
            answer = rest_of(sock)
        assert (status_of(answer), error_of(answer)["code"]) == (408, "body_timeout")
    with dial(front.port) as sock:
        assert rest_of(sock) == b""


@pytest.mark.parametrize("sent", [b"", GET, POST + b"Content-Length: 1000\r\n\r\nx", request(close=False)],
                         ids=["silent", "head", "body", "kept"])
def test_a_flood_of_connections_does_not_keep_a_good_client_out(fronts, studio, sent):
    front = fronts(max_connections=8)
    with contextlib.ExitStack() as flood:
        for _ in range(40):
            sock = flood.enter_context(dial(front.port))
            with contextlib.suppress(ConnectionError):
                sock.sendall(sent)
        for _ in range(3):
            assert status_of(talk(front.port, request("GET /health"))) == 200
        until(lambda: front.server.connections <= 8)


STRANGERS = {"silent": b"", "head": GET, "page": request("GET /", close=False) * 20, "wrong key": request(b"", b"", "X-API-Key: no"),
             "half a login": b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx"}


@pytest.mark.parametrize("sent", STRANGERS.values(), ids=STRANGERS)
def test_strangers_put_out_no_guest(fronts, studio, sent):
    """A guest's upload, its resting connection and its new ones, beside strangers who do not even read."""
    front, key = fronts(api_key=KEYS, max_connections=16), f"X-API-Key: {ANNA}"
    with contextlib.ExitStack() as flood:
        resting, upload = (flood.enter_context(dial(front.port)) for _ in range(2))
        resting.sendall(request("GET /v1/models", b"", key, close=False))
        read_until(resting, b"true}")
        upload.sendall(request("POST /v1/x", b"x" * 1000, key)[:-500])
        until(lambda: front.server.memory.used == 500)
        for _ in range(40):
            sock = flood.enter_context(contextlib.closing(socket.socket()))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionError):
                sock.connect(("127.0.0.1", front.port))
                sock.sendall(sent)
        for _ in range(3):
            assert ask(front, "GET /v1/models", key)[0] == 200
        upload.sendall(b"x" * 500)
        assert status_of(rest_of(upload)) == 200
        resting.sendall(request("GET /v1/models", b"", key))
        assert status_of(rest_of(resting)) == 200
        assert len(front.server._connections) <= 16 + front.server.SPARE


def test_the_address_that_has_the_most_gives_way(fronts):
    front = fronts(max_connections=16, api_key=KEYS)
    with contextlib.ExitStack() as flood:
        try:
            other = flood.enter_context(socket.create_connection(("127.0.0.1", front.port), PATIENCE_S, ("127.0.0.2", 0)))
        except OSError:
            pytest.skip("this system has one loopback address")
        until(lambda: front.server.connections == 1)
        socks = [flood.enter_context(dial(front.port)) for _ in range(40)]
        assert socks[0].recv(1) == b""
        other.sendall(request("GET /health"))
        assert status_of(rest_of(other)) == 200


@pytest.mark.parametrize("sent", [STRANGERS["half a login"], request("GET /", close=False) * 200], ids=["half a login", "unread"])
def test_the_whole_answer_to_a_stranger_has_a_deadline(fronts, studio, monkeypatch, sent):
    monkeypatch.setattr(lmgateway.Connection, "ANSWER_S", 0.1)
    front = fronts(api_key=KEYS)
    with dial(front.port) as guest, contextlib.closing(socket.socket()) as stranger:
        guest.sendall(request("POST /v1/x", b"xx", f"X-API-Key: {ANNA}")[:-1])
        until(lambda: front.server.working == 1)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stranger.connect(("127.0.0.1", front.port))
        stranger.setblocking(False)
        stranger.send(sent)
        until(lambda: len(front.server._connections) == 2)
        until(lambda: len(front.server._connections) == 1)
        guest.sendall(b"x")
        assert status_of(rest_of(guest)) == 200


def test_guests_leave_room_for_others_to_show_their_keys(fronts, studio):
    front, key = fronts(api_key=KEYS, max_connections=16), f"X-API-Key: {ANNA}"
    with contextlib.ExitStack() as flood:
        socks = [flood.enter_context(dial(front.port)) for _ in range(40)]
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request("GET /v1/models", b"", key, close=False))
        for _ in range(3):
            assert ask(front, "GET /v1/models", key)[0] == 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts no descriptors")
@pytest.mark.parametrize(("wanted", "soft", "hard", "raised", "limit"), [
    (512, 1024, 1 << 20, 1152, 512), (512, 256, -1, 1152, 512), (512, 256, 256, 256, 64), (512, 2048, 4096, None, 512),
    (512, 256, 600, 600, 236), (8, 64, 64, 64, 8)])
def test_the_connections_follow_from_the_descriptors_that_the_system_grants(monkeypatch, wanted, soft, hard, raised, limit):
    import resource
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    assert lmgateway.connection_limit(wanted) == limit
    assert asked == ([(raised, hard)] if raised else [])


def test_without_descriptors_a_stranger_gives_way_and_nothing_spins(fronts, monkeypatch):
    front, calls = fronts(), []

    def no_descriptor(server):
        calls.append(server)
        raise OSError(errno.EMFILE, "Too many open files")

    with dial(front.port) as first:
        until(lambda: front.server.connections == 1)
        with monkeypatch.context() as patch:
            patch.setattr(socketserver.TCPServer, "get_request", no_descriptor)
            second = dial(front.port)
            assert first.recv(1) == b""
            until(lambda: len(calls) > 2)
            assert len(calls) < 20
        with second:
            second.sendall(request("GET /health"))
            assert status_of(rest_of(second)) == 200


def test_a_flood_does_not_end_requests_that_are_running(fronts, studio):
    go = threading.Event()
    studio.script = lambda peer: (go.wait(PATIENCE_S), peer.send(plain(b"done")))
    front = fronts(max_connections=8)
    with contextlib.ExitStack() as flood:
        running = [flood.enter_context(dial(front.port)) for _ in range(4)]
        for sock in running:
            sock.sendall(request())
        until(lambda: len(studio.peers) == 4)
        for _ in range(30):
            flood.enter_context(dial(front.port))
        go.set()
        assert all(rest_of(sock).endswith(b"done") for sock in running)


def test_a_flood_does_not_end_listeners_and_they_count(fronts):
    front = fronts(max_connections=8)
    with contextlib.ExitStack() as flood:
        listeners = [flood.enter_context(dial(front.port)) for _ in range(8)]
        for sock in listeners:
            sock.sendall(request("GET /debug/stream"))
            read_until(sock, b"event: connected")
        assert talk(front.port, request("GET /health")) == b""      # no room: nothing that may give way
        tell(front.hub, "one")
        for sock in listeners:
            read_until(sock, b"event: one")


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def test_a_machine_without_threads_closes_the_connection_and_goes_on(fronts, monkeypatch):
    front = fronts()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with dial(front.port) as sock:
            assert rest_of(sock) == b""
    assert status_of(talk(front.port, request("GET /health"))) == 200 and front.server.connections <= 1


def test_an_ipv6_address_is_listened_on(fronts, studio):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with socket.create_connection(("::1", fronts(host="::1").port), PATIENCE_S) as sock:
        sock.sendall(request())
        assert status_of(rest_of(sock)) == 200
    assert len(studio.peers) == 1


def test_random_bytes_never_end_in_a_fault(front, studio):
    source = random.Random(7)
    seed = [request(POST_CHAT, b'{"model":"m","stream":true}'),
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + framed(b"hello"),
            request("GET /debug/requests/x"), request("POST /login", b'{"key":"x"}'),
            request("OPTIONS /", b"", "Origin: http://x")]
    for _ in range(150):
        data = bytearray(source.choice(seed))
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(data))
            data[at:at + source.randrange(3)] = source.choice([b"\r", b"\n", b"\r\n", b"\x00", b":", b" ",
                                                               b"\xff", b"0", b","])
        with dial(front.port) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1 500" not in rest_of(sock)


# --- shutdown

@pytest.fixture
def process(tmp_path, studio):
    """A gateway as a process of its own; gives (Popen, port)."""
    environment = {**os.environ, "LMSTUDIO_BASE_URL": studio.url, "KEYS_FILE": str(tmp_path / "none.json"),
                   "LMSTUDIO_LOG_DIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, str(HERE / "lmgateway.py"), "--port", "0"], env=environment,
                           cwd=tmp_path,
                           stderr=subprocess.PIPE, text=True)
    lines = []
    try:
        for line in run.stderr:
            lines.append(line)
            if "Listening on" in line:
                break
        threading.Thread(target=lambda: lines.extend(run.stderr), daemon=True).start()
        yield run, int(re.search(r"Listening on http://127\.0\.0\.1:(\d+)", line)[1]), lines
    finally:
        run.kill()
        run.wait()


def refused(port):
    """True when nobody listens on a port.  A connection that a closing listener resets says nothing yet."""
    try:
        dial(port).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_a_signal_before_it_has_started_makes_no_traceback(tmp_path):
    """SIGINT is sent when the interpreter runs this file and has not come to main()."""
    hooked = tmp_path / "lmgateway.py"
    text, kill = (HERE / "lmgateway.py").read_text(encoding="utf-8"), "import os; os.kill(os.getpid(), signal.SIGINT)"
    hooked.write_text(text.replace("\nimport argparse\n", f"\n{kill}\nimport argparse\n", 1),
                      encoding="utf-8")
    run = subprocess.run([sys.executable, hooked, "--version"], capture_output=True, timeout=PATIENCE_S,
                         check=False, env=alone(tmp_path))
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_tells_listeners_and_lets_running_requests_finish(process, studio, how):
    run, port, lines = process
    go, here = threading.Event(), threading.Event()
    studio.script = lambda peer: (here.set(), go.wait(PATIENCE_S), peer.send(plain(b"done")))
    with dial(port) as listener, dial(port) as running, dial(port) as resting:
        listener.sendall(request("GET /debug/stream", close=False))
        read_until(listener, b"event: connected")
        running.sendall(request(POST_CHAT, b"{}", close=False))
        assert here.wait(PATIENCE_S)
        run.send_signal(how)
        assert resting.recv(1) == b"" and run.poll() is None
        until(lambda: refused(port))
        go.set()
        answer = rest_of(running)
        assert answer.endswith(b"done") and b"Connection: close" in answer
        told = rest_of(listener)
        assert b"event: inference_complete" in told and told.endswith(b"0\r\n\r\n")
    assert run.wait(PATIENCE_S) == 0
    assert not [line for line in lines if "Traceback" in line]
    until(lambda: any("1 requests are running" in line for line in lines))


def test_connections_are_those_that_rest_send_a_request_or_wait_for_an_answer(fronts):
    front = fronts()
    with dial(front.port), dial(front.port) as sock:
        until(lambda: front.server.connections == 2)
        sock.sendall(request(POST_CHAT, b"{}")[:-1])
        until(lambda: front.server.working)
        assert front.server.connections == 2


def test_two_servers_do_not_share_a_port(monkeypatch):
    """Some versions of http.server ask for it (allow_reuse_port)."""
    monkeypatch.setattr(http.server.HTTPServer, "allow_reuse_port", True, raising=False)
    with lmgateway.Server(None, "127.0.0.1", 0) as one, pytest.raises(OSError):
        lmgateway.Server(None, "127.0.0.1", one.port).server_close()


def test_a_clock_that_is_set_changes_no_uptime(fronts):
    front = fronts()
    front.gateway.started -= 86400
    for page in ("/health", "/debug/status"):
        assert 0 <= json.loads(fetched(front, page)[2])["uptime"] < 3600


def test_a_client_that_leaves_while_the_server_ends_is_noticed_too(fronts, studio):
    front, here, ended = fronts(), threading.Event(), threading.Event()
    studio.script = lambda peer: (here.set(), peer.wait_for_end(), ended.set())
    with dial(front.port) as sock:
        sock.sendall(request(POST_CHAT, b"{}"))
        assert here.wait(PATIENCE_S)
        front.server.shutdown()     # the accept thread is over
        end = threading.Thread(target=front.server.finish_requests, args=(PATIENCE_S,))
        end.start()
    assert ended.wait(1.0)
    end.join(PATIENCE_S)
    assert front.events(0, "error")[0]["operation"] == "client_disconnected"


def test_requests_that_take_too_long_are_cut_at_the_end_and_told(fronts, studio):
    front, here = fronts(), threading.Event()
    studio.script = lambda peer: (here.set(), peer.wait_for_end())
    with dial(front.port) as running, listening(front) as (_, _, frames):
        running.sendall(request(POST_CHAT, b"{}"))
        assert here.wait(PATIENCE_S)
        front.server.finish_requests(0.05)
        assert rest_of(running) == b""
        (told,) = [data for _, name, data, _ in frames if name == "error"]
        assert (told["operation"], told["error"]) == ("gateway_stopped",
                                                      "lmgateway stopped before the answer")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_a_second_signal_ends_at_once(process, studio):
    run, port, lines = process
    here = threading.Event()
    studio.script = lambda peer: (here.set(), peer.wait_for_end())
    with dial(port) as running:
        running.sendall(request(POST_CHAT, b"{}"))
        assert here.wait(PATIENCE_S)
        run.send_signal(signal.SIGTERM)
        until(lambda: any("Stopping" in line for line in lines))
        started = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 0 and time.monotonic() - started < 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timer signals")
def test_a_signal_at_any_moment_ends_the_wait():
    """A handler runs between two steps of what the main thread does, which may hold a lock just then."""
    code = textwrap.dedent("""\
        import random, signal, lmgateway
        for _ in range(200):
            stop = lmgateway.Stop()
            signal.signal(signal.SIGALRM, stop._signalled)
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001))
            while not stop.wait(0):
                pass
            assert stop.wait() and stop.signals == 1
        """)
    subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=PATIENCE_S, check=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_running_requests_have_ten_seconds_at_the_end_and_no_more(monkeypatch, studio, tmp_path):
    assert lmgateway.GRACE_S == 10
    monkeypatch.setattr(lmgateway, "GRACE_S", 0.05)
    monkeypatch.setattr(lmgateway, "freeze_start_up", lambda: None)
    monkeypatch.setenv("KEYS_FILE", str(tmp_path / "none.json"))
    here, before = threading.Event(), [(number, signal.getsignal(number))
                                       for number in (signal.SIGTERM, signal.SIGINT)]
    studio.script = lambda peer: (here.set(), peer.wait_for_end())

    def leave(port):
        with dial(port) as sock:
            sock.sendall(request(POST_CHAT, b"{}"))
            here.wait(PATIENCE_S)
            os.kill(os.getpid(), signal.SIGTERM)
            rest_of(sock)

    monkeypatch.setattr(lmgateway, "announce", lambda gateway, port,
                        lan: threading.Thread(target=leave, args=(port,)).start())
    started = time.monotonic()
    try:
        assert lmgateway.main(["--port", "0", "--upstream", studio.url, "--log-dir", str(tmp_path)]) == 0
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert time.monotonic() - started < PATIENCE_S - 2


# --- the log has a line for each request


def test_each_request_is_one_line_of_the_log_at_its_level_and_without_keys(fronts, caplog):
    front = fronts(api_key={"anna": "secret"})
    lmgateway.log.propagate = True
    with caplog.at_level(logging.DEBUG, "lmgateway"):
        for line, header in (("GET /v1/models?api_key=secret", "X-API-Key: secret"),
                             ("GET /v1/models/x", "X-API-Key: secret"),
                             ("GET /debug/status", "X-API-Key: wrong"), ("GET /health", "X-API-Key: secret")):
            talk(front.port, request(line, b"", header))
    lines = [(record.levelname.lower()[:4], re.sub(r"\d+ ms", "N ms", record.getMessage()))
             for record in caplog.records
             if " GET /" in record.getMessage()]
    assert lines == [("info", "127.0.0.1 anna GET /v1/models 200 N ms"),
                     ("info", "127.0.0.1 anna GET /v1/models/x 200 N ms"),
                     ("info", "127.0.0.1 - GET /debug/status 401 N ms"),
                     ("debu", "127.0.0.1 - GET /health 200 N ms")]
    assert "secret" not in caplog.text


def test_what_others_say_is_no_line_of_the_log(fronts, studio, capsys):
    front, error = fronts(), b'{"error":"no\\n2025-11-17 12:00:00 [info]: forged \\u001b[31m"}'
    lmgateway.set_up_logging(lmgateway.Config())
    studio.script = lambda peer: peer.send(plain(error))
    talk(front.port, request(POST_CHAT, b'{"model":"m\\r\\n2025-11-17 12:00:00 [info]: forged \\u001b[31m"}'))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.count("forged") == 1 and "\x1b" not in said


# === 8. DEMO =================================================================


@pytest.fixture
def demo(tmp_path):
    """A gateway beside the imitation, its log followed; both as fast as they can be."""
    studio = lmgateway.DemoServer(str(tmp_path / "logs"), batch_s=0.04, token_s=0.005)
    studio.answer_tokens, studio.batch = 8, 200
    studio.start()
    front, stop = Front(studio.url, tmp_path, log_dir=str(tmp_path / "logs")), threading.Event()
    monitor = lmgateway.Monitor(lmgateway.Follower(str(tmp_path / "logs"), started=time.time()))
    tail = threading.Thread(target=lmgateway.run_monitor, args=(monitor, front.hub, stop))
    tail.start()
    until(lambda: monitor.follower.file)    # it starts at the end of what it finds
    yield front, studio
    stop.set()
    tail.join(PATIENCE_S)
    front.close()
    studio.stop()


def ask_demo(front, number, model, messages=1):
    """Ask as client `number`; gives the tokens that the imitation makes of the prompt."""
    content = f"{number} " + "word " * 20 * (number + 1)
    body = {"model": model, "stream": number % 3 != 0,
            "messages": [{"role": "user", "content": content}] * messages}
    talk(front.port,
         request("POST /v1/chat/completions", json.dumps(body).encode(), f"User-Agent: client-{number}"))
    return 20 + 7 * len(content) * messages


def at_once(*calls):
    """The results of the calls, each in a thread of its own."""
    results = [None] * len(calls)

    def run(place):
        results[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return results


def of_client(front, number):
    """The record of client `number`, once the log has told all of it."""
    front.hub.publish_log([])
    [shown] = [record for record in front.hub.shown() if record["userAgent"] == f"client-{number}"]
    return front.hub.detail(shown["requestId"])


def test_clients_of_two_models_find_their_own_progress_cache_and_speed(demo):
    front, _ = demo

    def ask_as(number):
        if number:
            front.events(0, "lmstudio_processing_start")    # the other one's
        return ask_demo(front, number, lmgateway.DEMO_MODELS[number])

    tokens = at_once(lambda: ask_as(0), lambda: ask_as(1))
    front.events(0, "lmstudio_chat_end", count=2)
    for number, total in enumerate(tokens):
        record = of_client(front, number)
        assert (record["binding"], record["model"]) == ("exact", lmgateway.DEMO_MODELS[number])
        steps = [row["data"]["progress"] for row in record["timeline"]
                 if row["event"] == "lmstudio_prompt_progress"]
        assert steps == sorted(steps) and 0 < len(steps) <= 2 + (total - 1) // 200
        assert {row["data"]["requestId"] for row in record["timeline"] if "progress" in row["event"]} == {
            record["requestId"]}
        assert record["cache"] == {"reused": 0, "total": total, "percentage": 0}
        assert (record["tokenUsage"]["promptTokens"], record["cachedTokens"]) == (total, 0)
        assert record["promptTokensPerSecond"] > 0
        assert [phase["name"] for phase in record["phases"]][-2:] == ["prompt", "generating"]
        assert record["sampling"]["top_k"] == 40
        assert record["timeline"][0]["event"] == "inference_start"
        assert "inference_complete" in [row["event"] for row in record["timeline"]]
        assert [row["ms"] for row in record["timeline"]] == sorted(row["ms"] for row in record["timeline"])


def test_eight_clients_and_one_beside_us_are_bound_right_or_not_at_all(demo):
    front, studio = demo
    studio.batch_s = studio.token_s = 0.005
    beside = urllib.request.Request(studio.url + "/v1/chat/completions", json.dumps(
        {"model": lmgateway.DEMO_MODELS[0],
         "messages": [{"role": "user", "content": "not through us"}]}).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    tokens = at_once(*(lambda number=number: ask_demo(front, number, lmgateway.DEMO_MODELS[number % 2],
                                                      number % 4 + 1)
                       for number in range(8)), lambda: opener.open(beside, timeout=PATIENCE_S).read())
    front.events(0, "lmstudio_chat_end", count=9)
    records = [of_client(front, number) for number in range(8)]
    assert any(record["binding"] == "exact" for record in records)
    for number, (record, total) in enumerate(zip(records, tokens)):
        assert record["tokenUsage"]["promptTokens"] == total
        assert record["cache"] is None or record["cache"]["total"] == total
    claims = front.events(0, "lmstudio_chat_start", count=9)
    asked = {record["requestId"]: number for number, record in enumerate(records)}
    for claim in claims:
        if "requestId" in claim:
            number = asked[claim["requestId"]]
            assert (claim["model"], claim["messages"]) == (lmgateway.DEMO_MODELS[number % 2], number % 4 + 1)


@contextlib.contextmanager
def demonstration(**options):
    """(the demo, its Config) for a user's options."""
    with contextlib.ExitStack() as cleanup:
        demo = lmgateway.Demo(cleanup)
        yield demo, demo.config(lmgateway.Config(**options))


def furnished(demo, config):
    """A gateway that the demo has given its people and its past."""
    hub = lmgateway.Hub(100, None, demo.now, demo.clock)
    gateway = lmgateway.Gateway(config, hub, lmgateway.Upstream(config.upstream))
    demo.furnish(gateway)
    return gateway


def test_the_demo_needs_nothing_of_the_machine():
    with demonstration(upstream="http://127.0.0.1:9", log_dir="/nowhere", enable_log_monitoring=False) as (demo, made):
        models = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(made.upstream + "/v1/models", timeout=PATIENCE_S)
        assert [model["id"] for model in json.load(models)["data"]] == list(lmgateway.DEMO_MODELS)
        assert made.enable_log_monitoring and os.path.isdir(made.log_dir) and made.max_running == 1
        assert (made.keys_file, made.api_key) == (os.path.join(made.log_dir, "keys.json"), {})     # none of the user's
    assert not os.path.exists(made.log_dir)


@pytest.mark.parametrize(("options", "needed"), [({}, False), ({"api_key": {"mum": "a"}}, True), ({"keys_file": "k.json"}, True)])
def test_the_demo_asks_for_a_key_only_where_one_was_named(home, monkeypatch, options, needed):
    put(home / "k.json", '{"version": 1, "keys": []}')
    put(home / ".config/lmgateway/keys.json", '{"version": 1, "keys": []}')
    monkeypatch.chdir(home)
    with demonstration(**options) as (demo, config):
        access = furnished(demo, config).access
        assert access.need_key == needed
        for secret, name in [*((secret, name) for name, secret in demo._keys.items()), ("any text", None)]:
            asked = lmgateway.Request("POST", "/v1/models", (1, 1), [("X-API-Key", secret)])
            identity = access.recognize(asked)
            assert (identity and identity.name) == name and (identity is None) == (needed and name is None)
            assert needed or access.identify(asked, []) == identity     # as a request that is served
        assert {access.terms(name).priority for name in lmgateway.DEMO_KEYS} == set(lmgateway.PRIORITIES)


def test_the_demo_has_an_hour_behind_it():
    """An hour without an empty quarter, of five who ask and two models, told as if the gateway had been there."""
    with demonstration() as (demo, config):
        gateway = furnished(demo, config)
    cells, now = gateway.hub.series(0)[1], time.time()
    assert {minute * 60 // 900 * 900 for minute, *_ in cells} >= {(now - 900 * n) // 900 * 900 for n in (1, 2, 3)}
    assert min(minute for minute, *_ in cells) * 60 > now - 3700 and max(minute for minute, *_ in cells) * 60 <= now
    people = lmgateway.series_rows(cells, 60, "user")["total"]
    assert set(people) == set(lmgateway.DEMO_KEYS) and set(lmgateway.series_rows(cells, 60, "model")["total"]) == set(lmgateway.DEMO_MODELS)
    total = lmgateway.series_rows(cells, 60, "")["total"]
    assert total["errors"] and total["abandoned"] and total["queuedMs"]["p95"] > 1000 and total["cachedTokens"] > 10_000
    rows = gateway.hub.shown()
    assert len(rows) == 100 and all(row["state"] in ("done", "failed", "abandoned") for row in rows)
    assert all(sum(phase["ms"] for phase in row["phases"]) == pytest.approx(row["totalTimeMs"], abs=2) for row in rows)
    times = [json.loads(data.partition(b"data: ")[2])["timestamp"] for _, _, data in gateway.hub._frames]
    assert times == sorted(times) and abs(gateway.hub._clock() - time.monotonic()) < 1
    assert {model: len(known) >= 3 for model, known in gateway.turns._scheduler._times.items()} == dict.fromkeys(
        lmgateway.DEMO_MODELS, True)    # so that a place in the line has a time from the start


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", lmgateway.DEMO_SPEECH)
def test_the_imitation_speaks_the_readmes_dialects_and_its_log_agrees(demo, path, stream):
    front, studio = demo
    studio.batch_s = studio.token_s = 0.001
    sent = json.dumps({"model": "demo/wren-2b", "stream": stream,
                       "messages": [{"role": "user", "content": "Say something"}]}).encode()
    for reused in (0, 110):     # the second time all but one token is in the cache
        mark = front.hub.last
        answer = talk(front.port, request(f"POST {path}", sent))
        body = split_answer(answer)[2]
        words = re.findall(rb'"(?:content|text)": "(\w+) "', unchunked(body)) if stream else body.split()
        assert status_of(answer) == 200 and b"lamp" in words
        (done,) = front.events(mark, "inference_complete", "error")
        assert done["tokenUsage"] == {"promptTokens": 111, "completionTokens": 8, "totalTokens": 119}
        assert done["model"] == "demo/wren-2b" and (done["timeToFirstTokenMs"] is not None) == stream
        (stats,) = front.events(mark, "lmstudio_prediction_stats")
        assert (stats["promptTokens"], stats["completionTokens"]) == (111, 8)
        front.events(mark, "lmstudio_chat_end")
        record = front.hub.shown()[0]
        assert record["binding"] == "exact" and record["cache"]["reused"] == reused


def test_requests_are_found_by_who_sent_them(front, studio):
    mark = front.hub.last
    for number in (0, 1):
        talk(front.port, request(POST_CHAT, b"{}", f"User-Agent: who-{number}"))
    front.events(mark, "inference_complete", count=2)
    for sought, found in (("who-1", 1), ("127.0.0.1", None), ("", None), ("WHO-0", 1), ("anna", 0)):
        rows = json_of(talk(front.port, request(f"GET /debug/requests?client={sought}")))["requests"]
        assert len(rows) == (len(front.hub.shown()) if found is None else found), sought


def test_the_demos_own_traffic_tells_its_story(studio):
    pauses, story = iter([False] * len(lmgateway.DEMO_STORY)), lmgateway.DEMO_STORY
    with demonstration() as (demo, _):
        demo.traffic(studio.url, lambda seconds: next(pauses, True))
        until(lambda: len(studio.peers) == len(story) + 1 and all(peer.body for peer in studio.peers))
        heads, bodies = [dict(peer.headers) for peer in studio.peers], [json.loads(peer.body) for peer in studio.peers]
        assert {head["Authorization"] for head in heads} == {f"Bearer {secret}" for secret in demo._keys.values()}
    assert len({head["User-Agent"] for head in heads}) == 5 and {body["model"] for body in bodies} == set(lmgateway.DEMO_MODELS)
    assert {body["stream"] for body in bodies} == {True, False} and [] in [body["messages"] for body in bodies]
    assert any(client.read_bytes for client in story) and max(Counter((client.who, client.model) for client in story).values()) > 5
    engine = lmgateway.DemoEngine(None, 1)
    sizes = [(engine.cached(client.prompt, tokens), tokens) for client in story if len(client.prompt) > 3000
             for tokens in [20 + 7 * len(client.prompt)]]
    assert 23_000 < sizes[0][1] < 24_500 and 0.94 < sizes[1][0] / sizes[1][1] < 0.96


def test_the_imitation_answers_as_lm_studio_does(tmp_path):
    studio = lmgateway.DemoServer(str(tmp_path), batch_s=0.001, token_s=0.001)
    studio.start()
    port = studio.server_address[1]
    stream = {"model": "x", "stream": True, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}

    def asked(line, body=b""):
        return talk(port, request(line, body))

    def chunks(**more):
        events = lmgateway.Chunks().feed(asked(POST_CHAT, json.dumps({**stream, **more}).encode()).partition(b"\r\n\r\n")[2])
        *data, done = [event[6:] for event in events.strip().split(b"\n\n")]
        assert done == b"[DONE]"
        return [json.loads(chunk) for chunk in data]

    try:
        assert "usage" not in chunks()[-1]
        *words, last, usage = chunks(stream_options={"include_usage": True})
        assert (len(words), last["choices"][0]["finish_reason"], usage["choices"]) == (3, "stop", [])
        assert usage["usage"]["completion_tokens"] == 3
        at_once(chunks, chunks, chunks)
        (log,) = tmp_path.glob("*/*.log")
        turns = re.findall(r"processing task|Finished streaming", log.read_text(encoding="utf-8"))
        assert turns == ["processing task", "Finished streaming"] * 5       # one after the other
        assert status_of(asked("GET /v1/nothing")) == 200 and "Unexpected endpoint" in json_of(asked("GET /v1/nothing"))["error"]
        assert status_of(asked(POST_CHAT, b'{"messages": []}')) == 400

        def loaded():
            return [row["key"] for row in json_of(asked("GET /api/v1/models"))["models"] if row["loaded_instances"]]

        small, embedding = lmgateway.DEMO_MODELS[1], lmgateway.DEMO_EMBEDDING
        assert small in loaded() and embedding not in loaded()
        for change, name in (("unload", "instance_id"), ("load", "model")):
            for model in (small, embedding):
                assert status_of(asked(f"POST /api/v1/models/{change}", json.dumps({name: model}).encode())) == 200
            assert (small in loaded(), embedding in loaded()) == (change == "load",) * 2
        asked("POST /api/v1/models/unload", json.dumps({"instance_id": small}).encode())
        asked(POST_CHAT, json.dumps({**stream, "model": small}).encode())     # which loads it
        assert small in loaded()
        studio.batch_s, studio.batch = 0.02, 20
        with dial(port) as sock:
            sock.sendall(request(POST_CHAT, json.dumps(stream).encode()))
            read_until(sock, b"\r\n\r\n")
        until(lambda: "Client disconnected. Stopping generation" in log.read_text(encoding="utf-8"))
        studio.batch_s, left = PATIENCE_S, threading.Thread(target=asked,
                                                           args=(POST_CHAT, json.dumps(stream).encode()))
        left.start()
        until(lambda: log.read_text(encoding="utf-8").count("Running chat completion") == 8)
    finally:
        studio.stop()
    started = time.monotonic()
    left.join(PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S / 2      # a stop cuts what is running


def packets_until(client, kind):
    """The packets of a channel up to the one of that type."""
    found = []
    while not found or found[-1]["message"]["type"] != kind:
        found.append(client.hear())
    return [body["message"] for body in found]


def test_it_does_what_lm_studios_own_sdks_ask(demo):
    front = demo[0]
    client = enter(front)
    assert client.hear() == {"success": True}
    client.say(call("listLoaded"))
    names = [row["identifier"] for row in client.hear()["result"]]
    assert names == list(lmgateway.DEMO_MODELS)
    client.say(channel("loadModel", 1, modelKey=names[1], identifier="mine"))
    assert [row["type"] for row in packets_until(client, "success")] == ["resolved"] + ["progress"] * 5 + ["success"]
    assert client.hear()["type"] == "channelClose"
    client.say(call("unloadModel", 2, identifier="mine"))
    assert client.hear() == {"type": "rpcResult", "callId": 2}
    mark = front.hub.last
    limit = {"layers": [{"config": {"fields": [{"key": "llm.prediction.maxPredictedTokens",
                                                "value": {"checked": True, "value": 3}}]}}]}
    client.say(channel("predict", 3, predictionConfigStack=limit, modelSpecifier={
        "type": "instanceReference", "instanceReference": "instance of mine"}))
    assert [row["type"] for row in packets_until(client, "success")][-4:] == ["fragment"] * 3 + ["success"]
    (over,) = front.events(mark, "inference_complete")
    assert (over["model"], over["tokenUsage"]["completionTokens"], over["finishReason"]) == ("mine", 3, "eosFound")
    assert client.hear() == {"type": "channelClose", "channelId": 3}
    client.say(channel("completeRawText", 4, rawPrompt="x"))
    packets_until(client, "fragment")
    client.say(sent(4, type="cancel"))
    assert packets_until(client, "success")[-1]["stats"]["stopReason"] == "userStopped"
    client.hear()
    client.say(call("notKnown", 5))
    assert client.hear()["type"] == "communicationWarning"
    other = enter(front, "/embedding")
    other.hear()
    other.say(call("embedString", inputString="x"))
    assert len(other.hear()["result"]["embedding"]) == 128


# === 9. COMMAND ==============================================================

README = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", lmgateway.readme_tables(), ids=["options", "routes", "events"])
def test_readme_has_the_tables_of_the_code(table):
    assert table + "\n" in README, "the README's table is an old one: run .ci/readme"


def test_readme_has_the_two_commands_that_set_everything_up():
    assert "python3 lmgateway.py --demo" in README
    assert "python3 test_lmgateway.py" in README
    assert len(README.splitlines()) < 530


def test_readme_names_only_flags_and_variables_that_there_are():
    flags = {flag for action in lmgateway.build_parser()._actions for flag in action.option_strings}
    ours = re.findall(r"lmgateway\.py((?: [^\s`|>]+)*)", README)
    assert {flag for line in ours for flag in re.findall(r"--[a-z][a-z-]+", line)} <= flags
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", README))
    others = {"SSL_CERT_FILE", "LM_API_TOKEN", "OPENAI_API_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_MODEL"}
    others |= {"ENABLE_FORWARD_USER_INFO_HEADERS"}
    assert named - others <= {row.variable for row in lmgateway.OPTIONS}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_python_compiles(code):
    compile(code, "README.md", "exec")
    assert ":8001" in code


# --- 9.3 cards and the screen


def record_progress(request_id="req_1", **record):
    """An inference_progress with the fields of a record."""
    return Event("inference_progress", {"timestamp": "", "requestId": request_id, **record})


def cards_after(events, now=61.0, columns=120, rows=24, marks="#."):
    """The lines of cards that took events, one a second from second 0 on."""
    cards = lmgateway.Cards(marks)
    for second, event in enumerate(events):
        cards.take(event, float(second))
    return cards.lines(now, columns, rows)


STARTED = Event("inference_start", {"requestId": "req_1", "model": "m", "path": "/v1/chat/completions",
                                  "client": "10.0.0.7", "key": "anna"})
READING = record_progress(model="m", state="prompt", elapsedMs=61000, cache={"reused": 0, "total": 14906, "percentage": 0.0},
                   progress={"percent": 41.2, "promptTokens": 14906, "promptTokensRead": 6144,
                             "promptTokensPerSecond": 101.0, "etaMs": 87000},
                   context={"size": 32768, "used": 14906, "percentage": 45.5})
WRITING = record_progress(state="generating", elapsedMs=0, progress={"outputTokens": 1312, "outputTokensPerSecond": 17.84})
CARDS = [  # what happened, the lines of the cards at second 5
    ([STARTED], ["WAIT  elapsed 5s  m  anna  10.0.0.7  /v1/chat/completions"]),
    ([STARTED, Event("lmstudio_chat_end", {"outcome": "finished"})],
     ["WAIT  elapsed 5s  m  anna  10.0.0.7  /v1/chat/completions"]),
    ([STARTED, Event("inference_complete", {"requestId": "req_1"})], []),
    ([STARTED, Event("error", {"requestId": "req_1"})], []),
    ([READING], ["m", "PREFILL  ###.....  41 %  eta 1m22s  6,144/14,906  101 tok/s  elapsed 1m06s",
                 "cache    0 of 14,906 prompt tokens reused (0 %)  context 14,906 of 32,768"]),
    ([READING, WRITING], ["(model not named)", "WRITE  1,312 tok  17.8 tok/s  elapsed 4s"]),
    ([STARTED, record_progress(model="m", state="queued", position=2, waiting=5, etaMs=40000)],
     ["WAIT  queued  2 of 5  elapsed 4s  eta 36s  m"]),
    ([*(record_progress(f"req_{place}", model="m", state="queued", position=place, waiting=3) for place in (3, 1, 2)), WRITING],
     ["(model not named)", "WRITE  1,312 tok  17.8 tok/s  elapsed 2s",
      *(f"WAIT  queued  {place} of 3  elapsed {age}s  m" for place, age in ((2, 3), (3, 5)))]),
    ([record_progress("log_1", model="m", source="lmstudio", state="prompt"),
      record_progress("log_1", model="m", source="lmstudio", state="done")], []),
    ([record_progress(**{name: "x\x1b[2J" for name in READING.data if name not in ("requestId", "timestamp")})],
     ["x\\x1b[2J"]),
    ([record_progress(["odd"], **{name: 10 ** 400 for name in ("model", "progress", "cache", "elapsedMs")})],
     [str(10 ** 400)[:120]]),
    ([record_progress(model={"odd": []}, state=["odd"])], ["WAIT  ['odd']  elapsed 5s  {'odd': []}"]),
]


@pytest.mark.parametrize("number", range(len(CARDS)))
def test_cards_show_what_each_running_request_does(number):
    events, lines = CARDS[number]
    assert cards_after(events, now=5.0) == lines


def test_cards_never_need_more_room_than_the_terminal_has():
    events = [record_progress(f"req_{number}", model="界" * number + "\u202e") for number in range(9)]
    for rows in (-1, 0, 1, 2, 3, 7, 50):
        for columns in (-1, 1, 2, 9, 80):
            lines = cards_after(events, columns=columns, rows=rows)
            assert len(lines) <= max(0, rows)
            assert all(lmgateway.width_of(line) <= max(1, columns) and "\u202e" not in line for line in lines)
    assert cards_after(events, rows=7)[-1] == "and 3 more running"
    assert cards_after(events, now=lmgateway.Cards.STALE_S + 10) == []


class Terminal:
    """A terminal that knows what Printer writes: line feeds, going up, clearing below, colours."""

    encoding = "utf-8"

    def __init__(self):
        self.rows, self.at, self.written = [""], 0, ""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.written += text
        for part in re.findall(r"\x1b\[\d*[AJm]|[\r\n]|[^\x1b\r\n]+", text):
            if part == "\n":
                self.at += 1
                self.rows += [""] * (self.at == len(self.rows))
            elif part.endswith("A") and part[0] == "\x1b":
                self.at -= int(part[2:-1])
                assert self.at >= 0
            elif part == "\x1b[J":
                self.rows[self.at:] = [""]
            elif part[0] not in "\x1b\r":
                self.rows[self.at] += part


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"COLUMNS": "80", "LINES": "20", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def printer_on(out, as_json=False, events=None, live=True):
    return lmgateway.Printer(out, as_json, lmgateway.chosen_events(events), live)


def test_on_a_terminal_lines_scroll_above_cards_that_are_redrawn_in_place(terminal):
    printer = printer_on(terminal)
    for event in (STARTED, READING, Event("lmstudio_token_info", {"n_ctx": 4096})):
        printer([event])
    printer([Event("lmstudio_log", {"timestamp": "2026-09-01 10:00:00", "level": "INFO", "tags": [],
                                    "message": "[qwen3-8b] Prompt processing progress: 30.0%"})])
    assert [line[10:].split()[0] for line in terminal.rows[:2]] == ["inference_start", "token_info"]
    assert terminal.rows[2] == "m" and terminal.rows[3].startswith("PREFILL") and len(terminal.rows) == 6
    printer.finish()
    assert terminal.rows[2:] == [""]


COMPLETED = {"requestId": "req_e3ac6e55000001", "model": "m", "status": 200, "totalTimeMs": 3297.9,
          "tokensPerSecond": 33.53, "tokenUsage": {"promptTokens": 1645, "completionTokens": 39}}


@pytest.mark.parametrize(("name", "data", "line"), [
    ("inference_complete", COMPLETED, "200  3.3 s  1,645 + 39 tok  33.5 tok/s  m  req_e3ac6e55000001"),
    ("inference_complete", {**COMPLETED, "tokenUsage": None, "tokensPerSecond": None},
     "200  3.3 s  m  req_e3ac6e55000001"),
    ("inference_complete", {"requestId": "r", "status": 200, "totalTimeMs": 9, "tokenUsage": {"promptTokens": 1}},
     "200  0.0 s  1 + ? tok  r"),
    ("inference_progress", WRITING.data, "WRITE  1,312 tok  17.8 tok/s  elapsed 0s  req_1"),
    ("error", {"requestId": "r", "status": 502, "error": "refused"}, "status 502  what refused  r"),
    ("inference_complete", {"requestId": 0, "status": 1, "totalTimeMs": 10 ** 400, "message": ""},
     '{"requestId": 0, "status": 1, "totalTimeMs": 1' + "0" * 400 + ', "message": ""}'),
    ("lmstudio_prompt_progress", {"progress": 10 ** 400}, '{"progress": 1' + "0" * 400 + "}"),
    ("inference_complete", {"strange": "\x1b[2J\u202e"}, '{"strange": "\\u001b[2J\\u202e"}'),
    ("lmstudio_log", {"level": "INFO", "message": "a\x1b]0;x\x07\u202eb\x9b"},
     "INFO   a\\x1b]0;x\\x07\\u202eb\\x9b"),
    ("of another version", {"message": "hello\nthere"}, "hello | there")])
def test_an_event_is_one_line_with_its_figures_first_and_its_id_last(name, data, line):
    assert lmgateway.summary(Event(name, data)) == line


def test_no_figure_is_cut_on_a_narrow_terminal(terminal):
    printer_on(terminal)([Event("inference_complete", {**COMPLETED, "model": "words " * 20})])
    assert any("33.5 tok/s" in row and "req_e3ac6e55000001" in row for row in terminal.rows)


@pytest.mark.parametrize("text, printed", [
    (None, "abc"), ("a", "a"), ("a,c", "ac"), ("-a", "bc"), ("-a,-b", "c"), ("a,b,-b", "a")])
def test_events_are_chosen_or_left_out(text, printed):
    assert "".join(filter(lmgateway.chosen_events(text), "abc")) == printed


@pytest.mark.parametrize("live", [False, True])
def test_dumb_terminals_get_plain_lines(terminal, monkeypatch, live):
    monkeypatch.setenv("TERM", "dumb")
    printer_on(terminal, live=live)([STARTED, READING])
    assert len(terminal.rows) == 3 and "\x1b" not in terminal.written


def test_a_narrower_terminal_erases_all_rows_of_the_cards():
    size = os.terminal_size
    assert lmgateway.erasure([], size((80, 24))) == ""
    assert lmgateway.erasure(["x" * 60, ""], size((80, 24))) == "\r\x1b[2A\x1b[J"
    assert lmgateway.erasure(["x" * 60, ""], size((20, 24))) == "\r\x1b[4A\x1b[J"
    assert lmgateway.erasure(["界" * 30] * 9, size((20, 5))) == "\r\x1b[4A\x1b[J"


@pytest.mark.parametrize(("encoding", "marks"),
                         [("utf-8", "█░"), ("cp1252", "#."), ("ascii", "#."), (None, "#.")])
def test_bars_are_made_of_what_the_terminal_can_show(encoding, marks):
    assert lmgateway.bar_marks(encoding) == marks


# --- 9.4 --watch, --report

@contextlib.contextmanager
def stream_server(hub, port=0, **options):
    """A gateway that serves hub's events; gives its port."""
    front = Front("http://127.0.0.1:9", Path("/nowhere"), hub=hub, port=port, **options)
    try:
        yield front.port
    finally:
        hub.close()
        front.close()
        hub.closed = False


class Reached(Exception):
    """Ends a GatewayStream once it has brought what a test waits for."""


def brought(url, until, wait=lambda seconds: True, key=None, since=None):
    """What a GatewayStream hands over up to the first item for which until is true."""
    found = []

    def take(item):
        found.append(item)
        if until(item):
            raise Reached

    def body():
        with contextlib.suppress(Reached):
            lmgateway.GatewayStream(lmgateway.watched_address(url), key, since).run(take, wait)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), found
    return found


def named(name):
    return lambda item: isinstance(item, tuple) and item[1].name == name


def test_watch_resumes_by_id_after_a_gateway_was_away_and_tells_of_a_new_one():
    hub, pauses = lmgateway.Hub(), []
    with contextlib.ExitStack() as servers:
        port = servers.enter_context(stream_server(hub))

        def go_on(seconds):
            pauses.append(seconds)
            if len(pauses) == 1:
                tell(hub, "later")           # while nobody listens
            elif len(pauses) == 3:
                servers.enter_context(stream_server(hub, port))
            elif len(pauses) == 4:
                servers.close()
                new = lmgateway.Hub()
                tell(new, "end")
                servers.enter_context(stream_server(new, port))
            return len(pauses) > 9

        def seen(item):
            if named("connected")(item) and not pauses:
                tell(hub, "first")
            elif named("first")(item) or named("later")(item):
                servers.close()
            return named("end")(item)

        found = brought(f"127.0.0.1:{port}", seen, go_on)
    events = [item for item in found if isinstance(item, tuple)]
    assert [event.name for _, event in events] == ["connected", "first", "connected", "later", "connected",
                                                   "gap", "end"]
    assert [event_id for event_id, _ in events[:4]] == [hub.event_id(seq) for seq in (0, 1, 1, 2)]
    assert events[5][1].data["count"] is None
    assert pauses == [1, 2, 4, 1]
    assert all("trying again in" in item for item in found if isinstance(item, str))


def test_watch_from_the_start_brings_what_the_ring_holds_and_leaves_pings_out(monkeypatch):
    monkeypatch.setattr(lmgateway, "PING_S", 0.01)
    hub = lmgateway.Hub()
    tell(hub, "old")
    with stream_server(hub) as port:
        threading.Timer(0.1, tell, (hub, "new")).start()
        found = brought(f"http://127.0.0.1:{port}/debug/stream", named("new"), since="0")
    assert [event.name for _, event in found] == ["connected", "old", "new"]


@pytest.mark.parametrize(("key", "said"), [(None, "it asks for a key"), ("wrong", "is wrong")])
def test_watch_without_the_right_key_ends_with_the_remedy(key, said):
    with stream_server(lmgateway.Hub(), api_key={"anna": "right"}) as port:
        (error,) = brought(f"127.0.0.1:{port}", lambda item: True, key=key)
        assert (error.exit_status, said in str(error), "401" in str(error)) == (1, True, True)
        assert named("connected")(brought(f"127.0.0.1:{port}", lambda item: True, key="right")[0])


def test_watch_of_lm_studio_itself_is_a_wrong_address(studio):
    (error,) = brought(studio.url, lambda item: True)
    assert isinstance(error, lmgateway.ConfigError) and "no lmgateway" in str(error)


@pytest.mark.parametrize(("error", "said"), [
    (http.client.RemoteDisconnected("x"), "use https://"),
    (ssl.SSLError(1, "wrong version number"), "use http://"),
    (ConnectionRefusedError(111, "Connection refused"), "Connection refused"), (OSError(), "OSError"),
    (ssl.SSLCertVerificationError(1, "certificate verify failed"), "SSL_CERT_FILE")])
def test_watch_says_why_there_is_no_line(error, said):
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_message = "self-signed certificate"
    assert said in lmgateway.connection_problem(error)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_watch_prints_the_gateways_ids_and_ends_quietly_on_a_signal(tmp_path, number, status):
    hub = lmgateway.Hub()
    with stream_server(hub) as port, started(
            tmp_path, "--watch", f"127.0.0.1:{port}", "--json", "--events", "lmstudio_error") as process:
        until(lambda: hub.listeners)
        hub.publish([Event("lmstudio_log", {"timestamp": "t"}),
                     Event("lmstudio_error", {"timestamp": "t", "message": "ж"})])
        assert json.loads(process.stdout.readline()) == {
            "id": hub.event_id(2), "event": "lmstudio_error", "data": {"timestamp": "t", "message": "ж"}}
        process.send_signal(number)
        assert (process.wait(PATIENCE_S), process.stdout.read(), process.stderr.read()) == (status, b"", b"")


def test_watch_ends_quietly_when_nobody_reads_it_any_more(tmp_path):
    hub = lmgateway.Hub()
    with stream_server(hub) as port, started(
            tmp_path, "--watch", f"127.0.0.1:{port}", "--json", "--from-start") as process:
        assert json.loads(process.stdout.readline())["event"] == "connected"
        process.stdout.close()
        until(lambda: tell(hub, "more", message="x" * 65536) or process.poll() is not None)
        assert (process.wait(PATIENCE_S), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(("text", "url"), [
    *((text, None) for text in ("", "ftp://x", "http://", "http://h:0", "http://h:x", "http://a b", "http://h:1/\x07",
                                "http://[::1")),
    ("192.168.1.20:8001", "http://192.168.1.20:8001/debug/stream"), ("http://h/", "http://h/debug/stream"),
    ("https://h/llm/?x=1#y", "https://h/llm/debug/stream"), ("h:1/debug/stream", "http://h:1/debug/stream"),
    ("http://[::1]:8001", "http://[::1]:8001/debug/stream")])
def test_watch_takes_an_address_as_people_type_it(text, url):
    if url is None:
        with pytest.raises(lmgateway.ConfigError, match="--watch"):
            lmgateway.watched_address(text)
    else:
        assert lmgateway.watched_address(text).geturl() == url


def test_stream_events_are_the_same_however_their_bytes_arrive():
    data = (b'retry: 2000\nid: e-1\nevent: connected\ndata: {"message": "hi"}\n\n: a comment\n\n'
            b'id: e-2\r\nevent: lmstudio_log\r\ndata: {"a":\r\ndata: 1}\r\n\r\nid: e-2\nevent: ping\ndata: {}\n\n'
            b'data: no json\n\nid: "bad\nevent: <x>\ndata: {"b": 2}\n\nid: e-3\nevent: cut\ndata: {"c"')
    wanted = [("e-1", Event("connected", {"message": "hi"})), ("e-2", Event("lmstudio_log", {"a": 1})),
              ("", Event("message", {"b": 2}))]
    for size in (1, 7, len(data)):
        assert list(lmgateway.stream_events(data[at:at + size] for at in range(0, len(data), size))) == wanted
    with pytest.raises(ValueError, match="without an end"):
        list(lmgateway.stream_events([b"x" * (lmgateway.STREAM_LIMIT + 1)]))


# --- reports


def test_report_of_saved_logs_sums_by_day_and_model(tmp_path, capsys, utc):
    for name in ("g2-nonstream-cache-hit", "g3-stream-split-lines"):
        shutil.copy(sample(name), tmp_path)
    status, out, _ = run(capsys, "--report", str(tmp_path))
    lines = out.splitlines()
    assert status == 0 and [line.split()[:2] for line in lines] == [
        ["day", "model"], ["2026-08-08", "tundra/nimbus-14b-coder"], ["2026-04-08", "desk"], ["total", "2"]]
    assert lines[1].split()[2:] == ["1", "0", "1,500", "41", "%", "55", "737.9", "139.3"]
    assert len({len(line) for line in lines}) == 1


def test_report_of_a_history_as_json(tmp_path, capsys):
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep([lmgateway.history_row(finished_record())])
    history.close()
    assert lmgateway.main(["--report", "--json", "--history", str(tmp_path / "h.db")]) == 0
    assert json.loads(capsys.readouterr().out)["promptTokens"] == 70


def test_report_of_nothing_makes_no_history_and_says_so(home, capsys):
    assert run(capsys, "--report", "--history", str(home / "none.db"))[0] == 2
    assert not (home / "none.db").exists()
    put(home / "x.log", HEADER + b"Server started.\n")
    status, out, err = run(capsys, "--report", str(home / "x.log"))
    assert (status, out, err.startswith("lmgateway: no request in it")) == (0, "", True)


def test_report_shows_no_control_characters(capsys):
    with lmgateway.open_history(":memory:") as connection:
        row = {**lmgateway.usage_rows(connection, [])[0], "day": "2026-01-01", "model": "a\x1b[2J", "errors": 0}
    assert "a\\x1b[2J" in lmgateway.report_text([row])


@pytest.mark.parametrize("args, said", [
    ([], "--report: name saved logs"), (["--history", "/nowhere/h.db"], "--history /nowhere/h.db"),
    (["/nowhere.log"], "/nowhere.log: no such file")])
def test_report_of_nothing_says_what_it_needs(args, said, capsys):
    assert lmgateway.main(["--report", *args]) in (1, 2)
    assert said in capsys.readouterr().err


# --- 9.6 addresses of this machine

@pytest.mark.parametrize(("out", "named", "found"), [
    ("192.168.1.20", {"10.0.0.5"}, ["192.168.1.20"]), (None, {"10.0.0.5", "127.0.1.1", "fd00::5"}, ["10.0.0.5"]),
    (None, set(), [])])
def test_the_address_for_others_is_the_way_out_else_those_of_the_machines_name(monkeypatch, out, named, found):
    class Way(socket.socket):
        def connect(self, address):
            if out is None:
                raise OSError(errno.ENETUNREACH, "Network is unreachable")

        def getsockname(self):
            return out, 1

    monkeypatch.setattr(socket, "socket", Way)
    monkeypatch.setattr(lmgateway, "resolved", lambda host: named)
    assert lmgateway.lan_addresses() == found


def test_this_machine_is_asked_for_its_addresses_without_an_error():
    assert all(map(lmgateway.ipaddress.ip_address, lmgateway.lan_addresses()))
    assert "127.0.0.1" in lmgateway.resolved("localhost") and lmgateway.resolved("no such host") == set()


@pytest.mark.parametrize(("upstream", "options", "itself"), [
    ("http://127.0.0.1:81", {}, True), ("http://localhost:81", {}, True), ("http://127.0.0.1", {"port": 80}, True),
    ("http://127.0.0.1:81", {"host": "0.0.0.0"}, True), ("http://192.0.2.7:81", {}, False),
    ("http://127.0.0.1:82", {}, False), ("http://127.0.0.1:81", {"host": "192.0.2.77"}, False)])
def test_an_upstream_that_is_the_gateway_itself_is_refused(upstream, options, itself):
    with pytest.raises(lmgateway.ConfigError, match="--upstream .* is this gateway's own") if itself else (
            contextlib.nullcontext()):
        lmgateway.check_upstream(lmgateway.Config(upstream=upstream, **{"port": 81, **options}))


def test_a_port_in_use_is_one_line_also_without_a_log_directory(home, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=lambda: taken.accept()[0].close(), daemon=True).start()
        status, _, err = run(capsys, "--port", str(taken.getsockname()[1]), "--log-dir", "none")
    assert status == 1 and err.count("\n") == 1
    assert re.fullmatch(r"lmgateway: port \d+ is in use on 127\.0\.0\.1; stop .* or choose another with --port .*", err.strip())


def test_a_port_that_the_system_chose_is_printed_whatever_the_level(tmp_path):
    with started(tmp_path, "--port", "0", "--log-level", "error") as process:
        assert re.fullmatch(rb"Listening on http://127\.0\.0\.1:\d+\r?\n", process.stderr.readline())


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, ["Listening on http://127.0.0.1:81", "Dashboard: http://127.0.0.1:81/",
          "On the LAN: closed; --host 0.0.0.0",
          "clients: http://127.0.0.1:81/v1 (OpenAI", "Key: none"]),
    ({"host": "0.0.0.0", "api_key": {"a": "secret"}},
     ["Listening on http://0.0.0.0:81", "Dashboard: http://127.0.0.1:81/",
      "On the LAN: http://10.0.0.5:81\n",
      "clients: http://10.0.0.5:81/v1 (OpenAI", "Key: needed"]),
    ({"host": "192.168.7.7", "tls_cert": "c", "no_auth": True},
     ["Listening on https://192.168.7.7:81", "Dashboard: https://192.168.7.7:81/",
      "On the LAN: https://192.168.7.7:81",
      "clients: https://192.168.7.7:81/v1", "Key: none"]),
    ({"host": "::1"}, ["Listening on http://[::1]:81", "Dashboard: http://[::1]:81/", "On the LAN: closed"])])
def test_start_up_says_what_a_person_needs_next_and_never_a_key(caplog, monkeypatch, options, wanted):
    monkeypatch.setattr(lmgateway, "lan_addresses", lambda: ["10.0.0.5"])
    config = lmgateway.Config(port=81, upstream="http://u:1", **options)
    gateway = lmgateway.Gateway(config, lmgateway.Hub(), lmgateway.Upstream("http://u:1"))
    gateway.address = lmgateway.own_url(config, config.host, 81)
    gateway.lan_urls = [lmgateway.own_url(config, address, 81) for address in lmgateway.reachable(config)]
    lmgateway.log.propagate = True
    with caplog.at_level("INFO", "lmgateway"):
        lmgateway.announce(gateway, 81, demo=False)
    for text in (*wanted, f"lmgateway {lmgateway.VERSION}", "LM Studio: http://u:1",
                 "Log directory: not monitored"):
        assert text in caplog.text
    assert "secret" not in caplog.text


# --- 9.7 services

@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or sys.platform != "linux", reason="systemd is Linux")
@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_the_state(tmp_path, abstract):
    name = f"\0lmgateway-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.settimeout(PATIENCE_S)
        lmgateway.notify("READY=1", {"NOTIFY_SOCKET": name.replace("\0", "@")})
        assert sock.recv(100) == b"READY=1"
    lmgateway.notify("READY=1", {"NOTIFY_SOCKET": name.replace("\0", "@")})  # nobody is there
    lmgateway.notify("READY=1", {})


@pytest.mark.parametrize(("environ", "pause"), [
    ({}, None), ({"WATCHDOG_USEC": "30000000"}, 15), ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "7"}, 1),
    ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "8"}, None), ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "x"}, None)])
def test_the_watchdog_gets_a_sign_of_life_twice_in_its_time(environ, pause):
    assert lmgateway.watchdog_pause(environ, 7) == pause


def test_the_accept_loop_of_a_server_shows_that_it_goes_round(front):
    front.server.ticked, deadline = 0.0, time.monotonic() + PATIENCE_S
    while not front.server.ticked and time.monotonic() < deadline:
        talk(front.port, request("GET /health"))
    assert front.server.ticked


def test_the_watchdog_gets_no_sign_of_life_from_a_server_that_hangs(monkeypatch):
    told, states = [], [time.monotonic(), time.monotonic() - 2 * lmgateway.ALIVE_S]
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setattr(lmgateway, "notify", told.append)
    server = types.SimpleNamespace(ticked=0.0)

    def wait(seconds):
        if states:
            server.ticked = states.pop(0)
            return False
        return True

    lmgateway.keep_watchdog(types.SimpleNamespace(wait=wait), server)
    assert told == ["WATCHDOG=1"]


def test_launchd_agent_runs_this_file_as_it_was_called(tmp_path, home, capsys):
    shutil.copy(HERE / "lmgateway.py", tmp_path / "here.py")
    (tmp_path / "elsewhere").mkdir()
    made = subprocess.run([sys.executable, "../here.py", "--print-launchd", "--port", "9000", "--no-auth"],
                          cwd=tmp_path / "elsewhere", capture_output=True, timeout=PATIENCE_S, check=True)
    agent = plistlib.loads(made.stdout)
    assert agent["ProgramArguments"] == [sys.executable, "-m", "here", "--port", "9000", "--no-auth"]
    assert agent["WorkingDirectory"] == str(tmp_path / "elsewhere") and agent["KeepAlive"] == {"SuccessfulExit": False}
    environ = agent["EnvironmentVariables"]
    assert environ["PYTHONPATH"] == str(tmp_path) and environ["LOG_FILE"].endswith("lmgateway.log")
    assert environ["PYTHONPYCACHEPREFIX"].endswith("lmgateway")
    status, out, err = run(capsys, "--print-launchd", "--api-key", "s3cret")
    assert (status, out, "s3cret" in err, "GATEWAY_API_KEY" in err) == (2, "", False, True)


def test_service_files_are_what_their_systems_read():
    unit = (HERE / "lmgateway.service").read_text(encoding="ascii")
    assert "Type=notify" in unit and "WatchdogSec=" in unit and "python3 -m lmgateway" in unit
    script = (HERE / "lmgateway.ps1").read_bytes()
    assert script.isascii()  # Windows PowerShell 5.1 takes a file without a byte order mark for cp1252
    newer = re.findall(rb"\?\?|&&|\|\||\? [^{]*? : ", script)  # operators that 5.1 does not have
    assert newer == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_passes_systemds_own_tools():
    unit = str(HERE / "lmgateway.service")
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True,
                             timeout=PATIENCE_S, check=False)
    assert checked.stdout + checked.stderr == ""
    rated = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=25", unit],
                           capture_output=True,
                           timeout=PATIENCE_S, check=False)
    assert rated.returncode == 0


# --- 9.8 --check

@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory of its own, which is the working directory, and no option in the environment."""
    for row in lmgateway.OPTIONS:
        monkeypatch.delenv(row.variable, raising=False)
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv):
    """(exit status, stdout, stderr) of a command in this process, whose signals stay its own."""
    handlers = list(lmgateway.log.handlers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *args: None)
        patch.setattr(lmgateway, "freeze_start_up", lambda: None)
        try:
            status = lmgateway.main(list(map(str, argv)))
        finally:
            lmgateway.log.handlers = handlers
    return (status, *capsys.readouterr())


def findings(capsys, *argv):
    """(exit status, [(check, mark, what and remedy)]) of --check."""
    status, out, _ = run(capsys, "--check", "--json", *argv)
    report = json.loads(out)
    assert report["status"] == ("bad" if status else "ok")
    return status, [(row["check"], row["mark"], f"{row['what']} -> {row['remedy']}") for row in report["findings"]]


def put(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_settings(home, **settings):
    put(home / ".lmstudio/.internal/http-server-config.json", json.dumps(settings))


def put_log(home, text, name="2026-09/2026-09-01.1.log"):
    return put(home / ".lmstudio/server-logs" / name, text)


def stamped(message, level="INFO", seconds_ago=0.0):
    return f"[{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(time.time() - seconds_ago))}][{level}] {message}\n"


G1_LINES = stamped("BeginProcessingPrompt", "DEBUG") + stamped("[m] Prompt processing progress: 10.0%")


def nothing(home):
    """A home as it is."""


SICK = [  # what is broken, arguments, (check, mark, words) that must be found
    (nothing, (), ("Logs", "bad", "start LM Studio's server once")),
    (nothing, (), ("Settings", "warn", "http-server-config.json")),
    (lambda home: put(home / ".lmstudio/.internal/http-server-config.json", b"\xff{"), (),
     ("Settings", "warn", "no JSON object")),
    (lambda home: put(home / ".lmstudio/.internal/http-server-config.json/x"), (),
     ("Settings", "warn", "cannot be read")),
    (lambda home: put_settings(home, port="x", networkInterface=7, verbose="no", cors=None), (),
     ("Settings", "ok", "port not named, interface not named")),
    (lambda home: put(home / ".lmstudio/apps/bionic/.internal/http-server-config.json", '{"port": 4321}'), (),
     ("Settings", "ok", "port 4321")),
    (lambda home: put_settings(home, networkInterface="0.0.0.0"), (),
     ("Settings", "warn", "Serve on Local Network: off")),
    (lambda home: put_settings(home, networkInterface="127.0.0.1", port=1), (),
     ("Settings", "ok", "port 1, interface 127.0.0.1")),
    (lambda home: put_settings(home, cors=True), (), ("Settings", "warn", "Enable CORS: off")),
    (lambda home: put_settings(home, fileLoggingMode="off"), (),
     ("Settings", "bad", 'Developer Logs, "..." menu > File Logging Mode: Succinct')),
    (lambda home: put_settings(home, verbose=False), (), ("Settings", "warn", "Verbose Logging: on")),
    (lambda home: put_settings(home, logSensitiveData=True), (), ("Settings", "warn", "Redact Content: on")),
    (lambda home: put_settings(home, logSensitiveData=False), (), ("Settings", "ok", "redacted")),
    (lambda home: put_settings(home, logIncomingTokens=True), (), ("Settings", "warn", "Log Incoming Tokens: off")),
    (lambda home: put_settings(home, port=4321), ("--upstream", "http://127.0.0.1:9"),
     ("LM Studio", "bad", "its settings say http://127.0.0.1:4321")),
    (lambda home: put_settings(home, port=9), (), ("LM Studio", "bad", "127.0.0.1:9 (")),
    (lambda home: put_log(home, "", "x.log"), (), ("Logs", "bad", "no server logs (YYYY-MM")),
    (nothing, ("--log-dir", "nowhere"), ("Logs", "bad", "nowhere: ")),
    (lambda home: put_log(home, G1_LINES), (), ("Logs", "ok", "written 0s ago")),
    (lambda home: put_log(home, G1_LINES), (), ("Logs", "ok", "2 entries looked at, written by: G1")),
    (lambda home: put_log(home, stamped("hello")), (), ("Logs", "warn", "Verbose Logging: on")),
    (lambda home: put_log(home, b"\0\xff" * 99), (), ("Logs", "warn", "no log entry")),
    (lambda home: os.utime(put_log(home, G1_LINES), (1e9, 1e9)), (), ("Logs", "warn", "days ago")),
    (lambda home: (os.utime(put_log(home, G1_LINES), (1e9, 1e9)),
                   put(home / ".cache/lm-studio/server-logs/2026-09/2026-09-01.1.log", "x")),
     ("--log-dir", ".lmstudio/server-logs"), ("Logs", "warn", "holds a newer log")),
    (lambda home: put(home / ".env", "ENABLE_LOG_MONITORING=false"), (), ("Logs", "warn", "switched off")),
    (lambda home: (put_log(home, G1_LINES), put(home / ".env", "LOG_DIR_WARN_BYTES=10")), (),
     ("Room", "warn", "--prune 30")),
    (lambda home: put_log(home, "x" * 12345), (), ("Room", "ok", "12.3 kB")),
    (lambda home: put(home / ".env", "GATEWAY_PROT=1"), (), ("Options", "warn", "did you mean GATEWAY_PORT?")),
    (lambda home: put(home / ".env", "LOG_LEVEL=loud\nPROXY_TIMEOUT=soon"), (), ("Options", "bad", ".env line 2")),
    (lambda home: put(home / ".env", "what is this"), (), ("Options", "bad", ".env line 1")),
    (nothing, ("--env-file", "nowhere"), ("Options", "bad", "nowhere")),
    (lambda home: put(home / ".env", "GATEWAY_API_KEY=abc"), (),
     ("Options", "ok", "GATEWAY_API_KEY: set (from .env line 1)")),
    (nothing, ("--log-file", "nowhere/x.log"), ("Options", "bad", "cannot be written")),
    (nothing, ("--host", "192.0.2.77", "--no-auth"), ("Port", "bad", "--host")),
    (nothing, ("--host", "no host", "--no-auth"), ("Port", "bad", "--host")),
    (nothing, ("--host", "0.0.0.0"), ("Keys", "bad", "--new-key NAME")),
    (nothing, ("--host", "0.0.0.0", "--no-auth"), ("Keys", "warn", "open to the network")),
    (nothing, ("--host", "0.0.0.0", "--api-key", "k"), ("Network", "warn", "--tls-cert")),
    (nothing, ("--tls-cert", "nowhere", "--tls-key", "nowhere"), ("Network", "bad", "--tls-cert")),
    (lambda home: put(home / ".env", "GATEWAY_API_KEY=anna=a,ben=b"), (), ("Keys", "ok", "anna (all rights), ben")),
    (lambda home: put_log(home, stamped("hello", seconds_ago=7200)), (), ("Clock", "warn", "(environment variable TZ)")),
    (lambda home: put_log(home, stamped("hello")), (), ("Clock", "ok", "time zone")),
]


@pytest.mark.parametrize(("sicken", "argv", "wanted"), SICK, ids=[": ".join(row[-1]) for row in SICK])
def test_check_names_what_is_wrong_and_the_remedy(home, capsys, sicken, argv, wanted):
    sicken(home)
    status, found = findings(capsys, *argv)
    assert any(row[:2] == wanted[:2] and wanted[2] in row[2] for row in found), found
    assert status == any(mark == "bad" for _, mark, _ in found)
    assert all("->" in text and (mark == "ok" or text.rpartition("->")[2].strip()) for _, mark, text in found)
    assert not any("this check failed" in text for _, _, text in found)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_check_sees_secrets_that_others_can_read(home, capsys):
    path = put(home / ".env", "GATEWAY_API_KEY=abc")
    os.chmod(path, 0o644)
    assert ("Keys", "warn",
            ".env can be read by other users of this machine -> chmod 600 .env") in findings(capsys)[1]
    os.chmod(path, 0o600)
    assert not any("chmod" in text for _, _, text in findings(capsys)[1])


def test_check_finds_a_sound_installation_sound(home, capsys):
    put_log(home, G1_LINES)
    demo = lmgateway.DemoServer(str(home))
    demo.start()
    try:
        put_settings(home, port=demo.server_address[1], verbose=True, logSensitiveData=False,
                     networkInterface="127.0.0.1")
        status, found = findings(capsys, "--port", "0")
        assert (status, {mark for _, mark, _ in found}) == (0, {"ok"})
        assert {name for name, _, _ in found} == set(lmgateway.CHECKS)
        status, out, _ = run(capsys, "--check", "--port", str(demo.server_address[1]))
        assert status == 1 and re.search(r"^bad   Port .* is in use on .*  ->  stop the program", out, re.M)
    finally:
        demo.stop()


@pytest.mark.parametrize("options", [{}, {"api_key": {"anna": "a"}, "require_auth_for_health": True}], ids=["open", "closed"])
def test_another_lmgateway_is_known_on_the_port_and_at_the_upstream(home, capsys, options):
    with stream_server(lmgateway.Hub(), **options) as port:
        found = findings(capsys, "--port", str(port), "--upstream", f"http://127.0.0.1:{port}")[1]
        assert ("Port", "ok", f"a running lmgateway has it: http://127.0.0.1:{port} -> ") in found
        assert any(row[:2] == ("LM Studio", "bad") and "another lmgateway answers" in row[2] for row in found)
        status, _, err = run(capsys, "--port", str(port))
        assert status == 1 and f"lmgateway already runs there: http://127.0.0.1:{port}; " in err


def test_check_sees_that_every_key_was_revoked(home, capsys):
    assert run(capsys, "--new-key", "anna")[0] == 0
    assert any(text.startswith("keys: anna (infer)") for _, _, text in findings(capsys)[1])
    assert run(capsys, "--revoke-key", "anna")[0] == 0
    assert any(row[:2] == ("Keys", "warn") and "mint one with --new-key" in row[2] for row in findings(capsys)[1])


@pytest.mark.parametrize(("error", "warned"), [(PermissionError(13, "Permission denied"), True),
                                               (IsADirectoryError(21, "Is a directory"), False)])
def test_an_env_file_that_cannot_be_read_is_not_passed_over_in_silence(home, capsys, monkeypatch, error, warned):
    def refuse(path, **options):
        raise error

    monkeypatch.setattr(lmgateway.Path, "read_text", refuse)
    said = [text for name, mark, text in findings(capsys)[1] if (name, mark) == ("Options", "warn")]
    assert ["Permission denied" in text for text in said] == [True] * warned


@pytest.mark.parametrize("pointer", [b"\0", b"\n", b"/nowhere/\0x", b"\xff\xfe"])
def test_a_damaged_pointer_to_lm_studios_home_is_no_fault(home, capsys, pointer):
    put(home / ".lmstudio-home-pointer", pointer)
    status, found = findings(capsys)
    assert status == 1 and {name for name, _, _ in found} >= {"Settings", "Logs", "Keys", "Clock"}


def test_a_user_without_a_home_is_no_fault(home, capsys, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where there is none
    status, found = findings(capsys)
    assert status == 1 and any(name == "Logs" and f"~{os.sep}.lmstudio" in text for name, _, text in found)


def test_check_answers_also_where_nobody_can_read_it(home, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert lmgateway.main(["--check"]) == 1


def test_a_check_that_fails_is_a_finding():
    def fail(installation):
        yield "ok", "so far"
        raise RuntimeError("boom")

    found = lmgateway.findings_of(fail, None)
    assert [mark for mark, *_ in found] == ["ok", "bad"] and "boom" in found[1][1]


# --- 9.9 --prune and the room that logs take

def test_prune_shows_and_then_removes_only_old_server_logs(home, capsys):
    logs = home / ".lmstudio/server-logs"
    day, kept = ((datetime.date.today() - datetime.timedelta(days=days)).isoformat() for days in (31, 30))
    go = [put(logs / day[:7] / f"{day}.{number}.log", "x" * 1500) for number in (1, 2)]
    stay = [put(logs / day[:7] / name, "x")
            for name in (f"{day}.log", f"{day}.4.log.txt", "notes.txt", f"x{day}.1.log")]
    stay += [put(logs / name / f"{day}.1.log", "x") for name in ("backup", "2020-01", f"{day[:7]}x")]
    stay.append(put(logs / kept[:7] / f"{kept}.1.log", "30 days old, not more"))
    stay.append(put(logs / f"{datetime.date.today()}"[:7] / f"{datetime.date.today()}.1.log", "the newest"))
    status, out, _ = run(capsys, "--prune", "30")
    assert status == 0 and out.splitlines()[:2] == [f"would go     1.5 kB  {path}" for path in go]
    assert out.splitlines()[2].startswith("2 files, 3.0 kB older than 30 days in ") and "--yes" in out
    assert all(path.exists() for path in go)
    status, out, _ = run(capsys, "--prune", "30", "--yes")
    assert (status, out.splitlines()[-1]) == (0, "removed 2 files, 3.0 kB")
    assert not any(path.exists() for path in go) and all(path.exists() for path in stay)
    assert "nothing to do" in run(capsys, "--prune", "30")[1]


def test_prune_keeps_the_newest_however_old_it_is(home, capsys):
    paths = [put_log(home, "x", f"2020-01/2020-01-01.{number}.log") for number in (9, 10)]
    assert run(capsys, "--prune", "30", "--yes")[0] == 0
    assert [path.exists() for path in paths] == [False, True]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_prune_follows_no_links(home, capsys):
    elsewhere = put(home / "elsewhere/2020-01-01.1.log", "x")
    real = put_log(home, "x", "2020-03/2020-03-01.1.log")
    put_log(home, "new", "2030-01/2030-01-01.1.log")
    (home / ".lmstudio/server-logs/2020-01").symlink_to(elsewhere.parent)
    link = real.parent / "2020-03-02.1.log"
    link.symlink_to(elsewhere)
    assert run(capsys, "--prune", "30", "--yes")[0] == 0
    assert elsewhere.exists() and link.is_symlink() and not real.exists()


def test_prune_says_which_file_could_not_go_and_goes_on(home, capsys, monkeypatch):
    paths = [put_log(home, "x", f"2020-01/2020-01-0{number}.1.log") for number in (1, 2, 3)]
    remove = os.remove
    monkeypatch.setattr(os, "remove", lambda path: os.stat("/nowhere") if path.endswith("01.1.log") else remove(path))
    status, out, _ = run(capsys, "--prune", "1", "--yes")
    assert status == 1 and out.startswith("kept, No such file") and "removed 1 file, 1 bytes" in out
    assert [path.exists() for path in paths] == [True, False, True]


def test_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit) as end:
        lmgateway.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(lines) <= 51 and max(map(len, lines)) <= 100
    assert all(row.flag in "\n".join(lines) for row in lmgateway.OPTIONS if row.flag)
    with pytest.raises(SystemExit):
        lmgateway.main(["--version"])
    assert capsys.readouterr().out == f"lmgateway {lmgateway.VERSION}\n"


# --- 9.x the tail, the demo, and how they end


PROGRAM = [sys.executable, "-m", "lmgateway"]     # compiled once: a script takes twice as long to start
COMPILED = tempfile.TemporaryDirectory(prefix="lmgateway-")     # goes with the interpreter
PROGRESS_LOG = b"".join(HEADER + line.encode() + b"\n" for line in (
    "[m] Running chat completion on conversation with 1 messages.",
    *(f"[m] Prompt processing progress: {done}.0%" for done in (1, 2, 3))))


def alone(home, **more):
    """An environment in which no LM Studio, no `.env` and no option of this machine is found."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith((*lmgateway.PREFIXES, "PYTHONDONTWRITEBYTECODE"))}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "TZ": "UTC", "PYTHONPATH": str(HERE),
            "PYTHONPYCACHEPREFIX": COMPILED.name, **more}


def command(home, *args, **how):
    """A finished run of the program: its status, and what it printed."""
    how = {"capture_output": True, "timeout": PATIENCE_S, "env": alone(home, **how.pop("environ", {})),
           "cwd": home, **how}
    return subprocess.run([*PROGRAM, *map(str, args)], check=False, **how)


@contextlib.contextmanager
def started(home, *args, **how):
    """A running program; whatever happens it is gone afterwards."""
    process = subprocess.Popen([*PROGRAM, *map(str, args)], env=alone(home, **how.pop("environ", {})),
                               cwd=home,
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})
    limit = threading.Timer(3 * PATIENCE_S, process.kill)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        process.kill()
        process.wait(PATIENCE_S)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


def line_with(stream, words):
    """The next line of a stream that has the words."""
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"{words!r} did not come")


def json_lines(data):
    text = data if isinstance(data, str) else data.decode()
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["g1-full-cache-inf", "splash-stream"])
def test_a_saved_log_is_replayed_as_json_lines_from_a_file_or_standard_input(tmp_path, capsys, utc, name):
    if name == "splash-stream":
        found = command(tmp_path, "--tail-only", "--json", "-", input=sample(name).read_bytes())
        status, out, err = found.returncode, found.stdout, found.stderr.decode()
    else:
        status, out, err = run(capsys, "--tail-only", "--json", sample(name))
    lines = json_lines(out)
    assert (status, err) == (0, "")
    assert [line["id"].partition("-")[2] for line in lines] == [str(seq) for seq in range(1, len(lines) + 1)]
    assert len({line["id"].partition("-")[0] for line in lines}) == 1
    assert unmet(expected_of(sample(name)), [Event(line["event"], line["data"]) for line in lines]) == []


def test_events_are_filtered_and_keep_their_ids(capsys):
    lines = json_lines(run(capsys, "--tail-only", "--json", "--events", "lmstudio_chat_end,lmstudio_chat_start",
                           sample("errors"))[1])
    assert [line["event"] for line in lines] == ["lmstudio_chat_start", "lmstudio_chat_end"] * 2
    assert [line["id"].partition("-")[2] for line in lines] == ["2", "6", "11", "15"]


@pytest.mark.parametrize("start, status, said", [
    (b"\xff\xfew\0", 2, "UTF-16"), (b"\xfe\xff\0w", 2, "UTF-16"), (gzip.compress(b"words"), 2, "packed"),
    (b"PK\3\4\24\0", 2, "packed"), (b"\x28\xb5\x2f\xfd\4", 2, "packed"), (b"Buy milk\n", 0, "no entries in"), (b"", 0, "")])
def test_what_is_no_log_is_said(tmp_path, capsys, start, status, said):
    got, out, err = run(capsys, "--tail-only", put(tmp_path / "x.log", start))
    assert (got, out, err.count("\n")) == (status, "", bool(said)) and said in err and ("x.log" in err) == bool(said)


def test_directories_are_replayed_in_date_order_with_their_switches(tmp_path, capsys):
    logs = Logs(tmp_path / "server-logs")
    for name in ("2026-05-01.10", "2026-04-30.1", "2026-05-01.9", "2026-05-02.1"):
        logs.write(name, name)
    lines = json_lines(run(capsys, "--tail-only", "--json", logs.directory)[1])
    assert [Logs.words(Event(line["event"], line["data"])) for line in lines] == [
        "2026-04-30.1", "2026-04 >> 2026-05-01.9", "2026-05-01.9", "2026-05-01.9 > 2026-05-01.10", "2026-05-01.10",
        "2026-05-01.10 > 2026-05-02.1", "2026-05-02.1"]
    for name in ("2026-05-01.10.log", "2026-05-01.9.log", "b.txt"):
        put(tmp_path / "flat" / name, HEADER + name.encode() + b"\n")
    lines = json_lines(run(capsys, "--tail-only", "--json", "--events", "lmstudio_log", tmp_path / "flat",
                           put(tmp_path / "x.log", HEADER + b"x\n"))[1])
    assert [line["data"]["message"] for line in lines] == ["2026-05-01.9.log", "2026-05-01.10.log", "x"]
    assert lmgateway.saved_logs(["-", str(tmp_path / "flat"), __file__]) == [
        "-", *(str(tmp_path / "flat" / f"2026-05-01.{number}.log") for number in (9, 10)), __file__]
    (tmp_path / "empty").mkdir()
    assert run(capsys, "--tail-only", tmp_path / "empty")[0] == 2


@pytest.mark.parametrize(("names", "told"), [
    (("2026-05-01.9", "2026-05-01.10"), ["begun", "head continued", "next"]),
    (("2026-05-02.1", "2026-05-01.1"), ["begun", "next"]),
    (("a", "b"), ["begun", "next"])], ids=["in order", "not in order", "others"])
def test_a_saved_log_goes_on_with_the_entry_of_the_one_before_it_where_lm_studio_may_have_done_so(utc, tmp_path, names, told):
    paths, found = [tmp_path / f"{name}.log" for name in names], []
    for path, data in zip(paths, (HEADER + b"begun", b"head\n" + HEADER + b"next\n")):
        path.write_bytes(data)
    lmgateway.replay(map(str, paths), found.extend)
    assert [Logs.words(event) for event in found if event.name == "lmstudio_log"] == told
    (switch,) = [event.data for event in found if event.name == "lmstudio_file_switch"]
    assert (switch["timestamp"],
            switch["newLogFile"]) == (found[0].data["timestamp"].replace(" ", "T") + "Z", str(paths[1]))


def test_a_saved_directory_that_cannot_be_read_is_status_2_with_a_remedy(tmp_path, monkeypatch, capsys):
    def refused(directory):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lmgateway, "list_logs", refused)
    assert lmgateway.main(["--tail-only", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be read (Permission denied); name" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_in_the_middle_is_status_1_after_what_came_before(tmp_path, monkeypatch, capsys):
    def opened(path, *args, original=open, **kwargs):
        if str(path).endswith("2.log"):
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    paths = [put(tmp_path / name, HEADER + name.encode() + b"\n") for name in ("1.log", "2.log")]
    monkeypatch.setattr("builtins.open", opened)
    status, out, err = run(capsys, "--tail-only", *paths)
    assert (status, "1.log" in out, err.count("\n")) == (1, True, 1) and "2.log: Permission denied" in err


def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    with started(tmp_path, "--tail-only", "--json", put(tmp_path / "long.log", PROGRESS_LOG * 5000)) as process:
        assert process.stdout.readline().startswith(b'{"id": ')
        process.stdout.close()
        assert (process.wait(PATIENCE_S), process.stderr.read()) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("full, status, said", [(False, 0, rb""), (True, 1, rb"lmgateway: .*No space left on device\n")])
def test_output_that_cannot_be_written_is_no_traceback(tmp_path, full, status, said):
    reading, writing = os.pipe() if not full else (None, os.open("/dev/full", os.O_WRONLY))
    if reading:
        os.close(reading)
    run = command(tmp_path, "--tail-only", put(tmp_path / "x.log", PROGRESS_LOG), capture_output=False,
                  stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert run.returncode == status and re.fullmatch(said, run.stderr)


def test_a_process_without_standard_output_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert lmgateway.main(["--tail-only", str(put(tmp_path / "x.log", PROGRESS_LOG))]) == 1
    err = capsys.readouterr().err
    assert err.startswith("lmgateway: there is no standard output") and err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number, status, path", [("SIGINT", 130, []), ("SIGTERM", 0, []), ("SIGINT", 130, ["-"])])
def test_signals_end_the_tail_quietly(tmp_path, number, status, path):
    logs = Logs(tmp_path / "server-logs")
    logs.write("2026-05-01.1", "a", "b")
    with started(tmp_path, "--tail-only", "--json", *([] if path else ["--from-start"]), "--log-dir",
                 logs.directory, *path, stdin=subprocess.PIPE) as process:
        if path:
            process.stdin.write((HEADER + b"x" * 600 + b"\n") * 200)
            process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(getattr(signal, number))
        process.stdin = None if path else process.stdin     # left open: it is no end of file that ends the replay
        _, said = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, b"Traceback" in said) == (status, False)


def test_the_tail_says_once_that_the_directory_is_missing_and_waits_for_it(tmp_path):
    logs = Logs(tmp_path / "server-logs")
    with started(tmp_path, "--tail-only", "--json", "--log-dir", logs.directory) as process:
        said = line_with(process.stderr, b"[warn]")
        assert str(logs.directory).encode() in said and b"--log-dir" in said
        logs.write("2026-05-01.1", "[m] Prompt processing progress: 1.0%")
        line_with(process.stdout, b'"lmstudio_log"')
        assert b"Monitoring log file: " in process.stderr.readline()


def test_the_monitor_of_the_server_follows_from_now_on_survives_a_fault_and_can_be_switched_off(tmp_path, caplog, monkeypatch):
    hub, stop, config = lmgateway.Hub(), threading.Event(), lmgateway.Config(log_dir=str(tmp_path / "server-logs"))
    faults, take = [ZeroDivisionError()], hub.publish_log

    def publish(events, looked):
        take(events, looked)
        if faults:
            raise faults.pop()

    hub.publish_log = publish
    assert lmgateway.open_monitor(config.but(enable_log_monitoring=False)) is None
    monkeypatch.setattr(stop, "wait", lambda seconds, wait=stop.wait: wait(min(seconds, 0.01)))
    monitor, logs = lmgateway.open_monitor(config), Logs(tmp_path / "server-logs")
    threading.Thread(target=lmgateway.run_monitor, args=(monitor, hub, stop)).start()
    try:
        until(lambda: monitor.follower.problem)     # it has looked, and nothing was there
        logs.write("2026-05-01.1", "[m] Prompt processing progress: 1.0%")
        until(lambda: hub.counts["lmstudio_prompt_progress"] == 1 and not faults)
        logs.write("2026-05-01.1", "[m] Prompt processing progress: 2.0%")
        until(lambda: hub.counts["lmstudio_prompt_progress"] == 2)
    finally:
        stop.set()
    assert "a fault in lmgateway's log monitor" in caplog.text


@pytest.mark.parametrize("days, kept", [(365, 80), (1, 30)])
def test_what_came_before_the_end_is_in_the_history(tmp_path, days, kept):
    config = lmgateway.Config(history=str(tmp_path / "h.db"), history_days=days)
    with contextlib.ExitStack() as cleanup:
        history = lmgateway.open_history_file(config, cleanup)
        history.keep([lmgateway.history_row(finished_record(f"old{number}", time.time() - 5 * 86400))
                      for number in range(50)])
        for number in range(30):
            history.keep([lmgateway.history_row(finished_record(f"new{number}", time.time()))])
    assert sum(row["requests"] for row in history.usage("key")) == kept
    assert lmgateway.open_history_file(lmgateway.Config(), cleanup) is None


@pytest.mark.parametrize("command_flags", [["--tail-only"], ["--port", "0"]], ids=["tail", "server"])
def test_start_up_lines_have_the_form_of_the_contract(tmp_path, command_flags):
    logs = Logs(tmp_path / ".lmstudio" / "server-logs")      # where it is looked for when nothing names it
    logs.write("2026-05-01.1", "a")
    (tmp_path / ".env").write_text("GATEWAY_PROT=1\n", encoding="utf-8")
    wanted = {"warning": r"\[warn\]: \.env line 1: GATEWAY_PROT is not .*GATEWAY_PORT\?",
              "version": rf"\[info\]: lmgateway {re.escape(lmgateway.VERSION)}.*",
              "directory": rf"\[info\]: .*[Ll]og directory: {re.escape(str(logs.directory))}",
              "file": rf"\[info\]: Monitoring log file: {re.escape(str(logs.path('2026-05-01.1')))}"}
    if "--port" in command_flags:
        wanted.update(address=r"\[info\]: Listening on http://127\.0\.0\.1:[1-9]\d*",
                      upstream=r"\[info\]: LM Studio: http://127.0.0.1:1234")
    with started(tmp_path, *command_flags) as process:
        while wanted:
            line = process.stderr.readline().decode().rstrip("\r\n")
            stamp, _, rest = line[:19], line[19], line[20:]
            assert line and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp), line
            wanted = {name: form for name, form in wanted.items() if not re.fullmatch(form, rest)}


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc\u2066\u2028\x7f\r\b\0"


def test_control_characters_of_a_log_never_reach_the_terminal(tmp_path, capsys):
    log = put(tmp_path / "hostile.log", (
        f"[2026-05-01 10:00:00][INFO][{ESCAPES}] Running chat completion on conversation with 1 messages.\n"
        f"[2026-05-01 10:00:00][ERROR] {ESCAPES}\n{ESCAPES}\n[2026-05-01 10:00:00][INFO] {ESCAPES}\n").encode())
    out = run(capsys, "--tail-only", log)[1]
    assert not re.search("[\0-\t\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", out) and out.count("owned") >= 3


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_any_text_can_be_printed_whatever_the_output_can_show(tmp_path, encoding):
    log = put(tmp_path / "words.log", HEADER + "\u6771\u4eac \U0001f98a \xe9\n".encode() + HEADER + b"\xff\xfe\n")
    run = command(tmp_path, "--tail-only", log, environ={"PYTHONIOENCODING": encoding})
    assert (run.returncode, run.stderr, len(run.stdout.decode(encoding).splitlines())) == (0, b"", 2)


@pytest.mark.parametrize("names, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True),
                                             ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_only_and_can_be_refused(terminal, monkeypatch, names, coloured):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    printer_on(terminal, live=False)([Event("lmstudio_error", {"timestamp": "", "message": "x"})])
    assert ("\x1b[31m" in terminal.written) is coloured


@pytest.mark.parametrize("live", [False, True])
def test_json_on_a_terminal_is_json_alone(terminal, live):
    printer = printer_on(terminal, as_json=True, live=live)
    printer([STARTED, READING])
    printer.finish()
    assert [line["event"] for line in json_lines(terminal.written.encode())] == [STARTED.name, READING.name]


def test_names_and_times_of_another_gateways_events_are_shown_without_control_characters():
    out = io.StringIO()
    printer_on(out)([Event("a\x1b[2J", {"timestamp": "2026-05-01T\x1b[31m:00", "message": "m"})])
    assert out.getvalue().split() == ["\\x1b[31m:00", "a\\x1b[2J", "m"]


def test_progress_of_a_replay_is_one_line_until_something_else_comes(terminal):
    printer = printer_on(terminal, live=False)
    progress = [Event("lmstudio_prompt_progress", {"timestamp": "", "progress": float(done)})
                for done in (10, 20, 100)]
    log = Event("lmstudio_log", {"timestamp": "", "level": "INFO",
                                 "message": "Prompt processing progress: 20.0%", "tags": []})
    printer([progress[0], progress[1], log])
    printer([progress[2], Event("lmstudio_error", {"timestamp": "", "message": "x"}), progress[0]])
    printer.finish()
    assert [row.split()[:1] + row.split()[-2:-1] for row in terminal.rows] == [
        ["prompt_progress", "100.0"], ["error", "error"], ["prompt_progress", "10.0"], []]


@pytest.fixture
def on_terminal(terminal, monkeypatch):
    """A function that runs a command whose output goes to a terminal, until wait() is true."""
    monkeypatch.setattr(lmgateway, "freeze_start_up", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)

    def run(*argv, wait=None):
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(lmgateway, "Stop", lambda: types.SimpleNamespace(wait=wait, status=0))
        assert lmgateway.main(list(map(str, argv))) == 0
    return run


def test_a_replay_on_a_terminal_has_its_progress_in_place_and_no_cards(on_terminal, terminal, tmp_path):
    (tmp_path / "x.log").write_bytes(PROGRESS_LOG)
    on_terminal("--tail-only", tmp_path / "x.log")
    assert "PREFILL" not in terminal.written
    assert sum("prompt_progress" in row for row in terminal.rows) == 1


def test_a_tail_on_a_terminal_has_cards_and_takes_them_off_at_the_end(on_terminal, terminal, tmp_path):
    logs = Logs(tmp_path / "server-logs")
    logs.path("2026-05-01.1").write_bytes(PROGRESS_LOG)
    limit = time.monotonic() + PATIENCE_S
    on_terminal("--tail-only", "--from-start", "--log-dir", logs.directory,
                wait=lambda seconds: "PREFILL" in terminal.written or time.monotonic() > limit)
    assert "PREFILL" in terminal.written
    assert not [row for row in terminal.rows if "PREFILL" in row] and terminal.rows[-1] == ""


def test_our_log_takes_the_cards_off_the_screen_before_it_writes(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", terminal)
    lmgateway.set_up_logging(lmgateway.Config())
    with lmgateway.open_printer(types.SimpleNamespace(json=False, events=None), live=True) as printer:
        printer([READING])
        assert [row for row in terminal.rows if "PREFILL" in row]
        lmgateway.log.warning("beside them")
        assert not [row for row in terminal.rows if "PREFILL" in row]
    assert "beside them" in capsys.readouterr().err


def test_the_clocks_of_cards_go_on_in_silence_and_lines_are_never_wider_than_the_terminal(terminal, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    printer = printer_on(terminal)
    printer([STARTED, Event("lmstudio_log", {"timestamp": "", "level": "INFO", "message": "words " * 50})])
    clock[0] += 61
    printer.tick()
    assert [row for row in terminal.rows if "elapsed 1m01s" in row] and max(map(len, terminal.rows)) == 79
    printer.finish()


def test_the_demo_shows_everything_and_leaves_nothing_behind(tmp_path):
    with started(tmp_path, "--demo", "--port", "0",
                 environ={"TMPDIR": str(tmp_path), "TEMP": str(tmp_path)}) as process:
        address = re.search(rb"http://127\.0\.0\.1:\d+", line_with(process.stderr, b"Listening"))[0].decode()
        seen, wanted = set(), {"connected", "inference_start", "inference_complete", "lmstudio_chat_start",
                               "lmstudio_chat_end",
                               "lmstudio_prompt_progress", "lmstudio_prediction_stats",
                               "lmstudio_cache_stats"}
        with urllib.request.urlopen(address + "/debug/stream", timeout=PATIENCE_S) as stream:
            while not wanted <= seen:       # of the demo's own traffic
                line = stream.readline().decode()
                seen |= {line[7:].strip()} if line.startswith("event: ") else set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert b"Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_not_this_machines_is_one_line_with_the_remedy_and_status_1(home, capsys):
    status, _, err = run(capsys, "--host", "192.0.2.1", "--no-auth", "--port", "0")
    assert status == 1
    assert "cannot listen on 192.0.2.1:0" in err.splitlines()[-1] and "--host" in err.splitlines()[-1]


# --- our own log


@pytest.mark.parametrize("level", ["error", "warn", "info", "debug"])
def test_our_log_has_what_its_level_lets_through(capsys, level):
    lmgateway.set_up_logging(lmgateway.Config(log_level=level))
    for name, number in lmgateway.LEVELS.items():
        lmgateway.log.log(number, "of %s", name)
    assert re.findall(r"\[(\w+)\]: of \1\n", capsys.readouterr().err) == list(lmgateway.LEVELS)[:list(lmgateway.LEVELS).index(level) + 1]


class Stuck(io.StringIO):
    """A stream that takes nothing until go is set."""

    def __init__(self):
        super().__init__()
        self.here, self.go = threading.Event(), threading.Event()

    def write(self, text):
        self.here.set()
        assert self.go.wait(PATIENCE_S)
        return super().write(text)


def test_nobody_waits_for_our_log_and_the_lines_that_are_lost_are_counted(monkeypatch):
    monkeypatch.setattr(lmgateway.LogQueue, "MOST", 3)
    stream = Stuck()
    lmgateway.set_up_logging(lmgateway.Config())
    [handler] = lmgateway.log.handlers
    handler.setStream(stream)
    with lmgateway.LogWriter(handler):
        lmgateway.log.info("0")
        assert stream.here.wait(PATIENCE_S)
        for number in range(1, 9):
            lmgateway.log.info("%d", number)    # returns although nobody reads
        stream.go.set()
    told = re.findall(r"]: (\d)$|(\d) lines were lost", stream.getvalue(), re.M)
    assert told == [("0", ""), ("", "5"), ("1", ""), ("2", ""), ("3", "")] and lmgateway.log.handlers == [handler]


def test_lines_of_our_log_that_come_together_are_written_together():
    class Counted(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            return super().write(text)

    lmgateway.set_up_logging(lmgateway.Config())
    [handler] = lmgateway.log.handlers
    stream = handler.stream = Counted()
    with lmgateway.LogWriter(handler):
        for number in range(500):
            lmgateway.log.info("%d", number)
    assert [int(line.split()[-1]) for line in stream.getvalue().splitlines()] == list(range(500))
    assert stream.writes < 100
    lmgateway.log.info("after it")
    assert stream.getvalue().endswith("[info]: after it\n")


def test_lines_behind_the_end_of_our_log_are_written_too(capsys):
    lmgateway.set_up_logging(lmgateway.Config())
    writer = lmgateway.LogWriter(lmgateway.log.handlers[0])
    for line in ("one", "two", None, "three"):      # None: what stop() puts there
        writer._lines.put(line and logging.makeLogRecord({"msg": line}))
    lmgateway.log.handlers[0].setFormatter(None)
    writer.start()
    writer.stop()
    assert re.findall(r"\w+$", capsys.readouterr().err, re.M) == ["one", "two", "three"]


@pytest.mark.skipif(sys.platform != "linux", reason="makes the pipe small")
def test_a_server_whose_stderr_nobody_reads_answers_and_ends_on_one_signal(tmp_path, studio):
    studio.script = lambda peer: peer.send(plain(b"{}"))
    with started(tmp_path, "--port", "0", "--upstream", studio.url, "--log-level", "debug") as process:
        port = int(re.search(rb":(\d+)$", line_with(process.stderr, b"Listening").rstrip())[1])
        line_with(process.stderr, b"Log directory")
        import fcntl
        fcntl.fcntl(process.stderr, 1031, 4096)     # F_SETPIPE_SZ: full after some sixty lines
        status = [status_of(talk(port, request("GET /v1/models"))) for _ in range(90)]
        process.send_signal(signal.SIGTERM)
        assert (set(status), process.wait(PATIENCE_S)) == ({200}, 0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_a_hangup_opens_the_log_file_anew_and_the_file_is_its_owners(tmp_path):
    path = tmp_path / "our.log"
    with started(tmp_path, "--port", "0", "--log-file", path) as process:
        until(lambda: path.exists() and b"Log directory" in path.read_bytes())
        assert path.stat().st_mode & 0o777 == 0o600
        path.rename(tmp_path / "our.log.old")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert b"Stopping" in path.read_bytes() and path.stat().st_mode & 0o777 == 0o600


def test_our_log_file_is_turned_over_takes_any_text_and_is_never_the_end(tmp_path, capsys):
    path = tmp_path / "our.log"
    path.write_bytes(b"x" * 4_990_000)
    lmgateway.set_up_logging(lmgateway.Config(log_file=str(path)))
    for _ in range(3):
        lmgateway.log.info("\u6771\ud800" + "x" * 5_000)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["our.log", "our.log.1"]
    if os.path.exists("/dev/full"):
        lmgateway.set_up_logging(lmgateway.Config(log_file="/dev/full"))
        for _ in range(3):
            lmgateway.log.info("lost")
        with contextlib.suppress(OSError):
            lmgateway.log.handlers[0].close()
        assert re.fullmatch(r"lmgateway: /dev/full: No space left on device; .*\n", capsys.readouterr().err)


# --- how it is started


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_as_a_module_it_keeps_its_compiled_code_and_not_its_syntax_tree(tmp_path):
    """As the unit starts it: 31 MB in place of 57."""
    limit = 35_000 if sys.version_info < (3, 14) else 42_000
    environ = alone(tmp_path, PYTHONPYCACHEPREFIX=str(tmp_path / "cache"))
    subprocess.run([*PROGRAM, "--version"], env=environ, cwd=tmp_path, timeout=PATIENCE_S, check=True,
                   stdout=subprocess.DEVNULL)
    assert [*(tmp_path / "cache").rglob("lmgateway.*.pyc")]
    with subprocess.Popen([*PROGRAM, "--port", "0"], env=environ, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        line_with(process.stderr, b"Log directory")
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
        process.stderr.read()
    assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < limit and process.returncode == 0


# === 10. DASHBOARD ===========================================================

PAGE = lmgateway.DASHBOARD.decode("utf-8")
SCRIPT = "\n".join(re.findall(r"<script[^>]*>(.*?)</script>", PAGE, re.DOTALL))


class Elements(HTMLParser):
    """Every element of the page: (tag, {attribute: value})."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def css_tokens():
    """[{token: colour}] of the light theme and of the dark one."""
    blocks = re.findall(r":root(?:\[data-theme=\"dark\"\])? \{\s*color-scheme: (\w+);(.*?)\}", PAGE, re.DOTALL)
    assert [name for name, _ in blocks] == ["light", "dark"]
    return [dict(re.findall(r"--([\w-]+): (#[0-9A-F]{6})", block)) for _, block in blocks]


def luminance(colour):
    """Relative luminance of #RRGGBB (WCAG 2.2)."""
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXT_COLOURS = ("text", "muted", "queued", "prefill", "decode", "cached", "ok", "warn", "error", "focus")
MARK_COLOURS = ("fill-prefill", "fill-decode", "fill-cached", *(f"tone-{at}" for at in range(6)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme):
    """WCAG 2.2: text 4.5:1 (1.4.3), marks that carry meaning 3:1 (1.4.11), on both surfaces."""
    tokens = css_tokens()[theme]
    for ground in ("page", "panel"):
        low = [name for name in TEXT_COLOURS if contrast(tokens[name], tokens[ground]) < 4.5]
        assert low == [], ground
        low = [name for name in MARK_COLOURS if contrast(tokens[name], tokens[ground]) < 3]
        assert low == [], ground


def test_page_asks_only_for_its_own_routes():
    asked = set(re.findall(r"[\"`](/[a-z][\w/]*)", SCRIPT)) - {"/api/v1/models", "/api/v1/models/", "/v1"}      # LM Studio's
    asked |= {attributes["action"] for _, attributes in Elements().found if "action" in attributes}
    assert {"/debug/stream", "/debug/series", "/debug/models", "/debug/requests/", "/login"} < asked
    assert asked <= {route.path.rstrip("*") for route in lmgateway.ROUTES} | {"/me", "/logout"}


def test_page_listens_for_events_that_there_are():
    table = re.search(r"const EVENTS = \{(.*?)\n\};", SCRIPT, re.DOTALL)[1]
    names = set(re.findall(r"^  (\w+): \[", table, re.MULTILINE))
    assert "inference_progress" in names
    assert names - set(lmgateway.EVENTS) == set()


def test_page_makes_no_markup_of_what_it_shows():
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc",
                "createContextualFragment", "DOMParser", "setHTML", "javascript:"):
        assert way not in PAGE, way


def test_page_needs_nothing_from_elsewhere():
    addresses = set(re.findall(r"\w+://[^\s\"'`<>)]*", PAGE))
    assert {address for address in addresses if not address.startswith("http://www.w3.org/")} == set()
    assert re.findall(r"@import|url\(|\bsrc\s*=|import\(", PAGE) == []


@pytest.mark.parametrize("accepted, packed", [("gzip, deflate, br", True), ("br", False), ("", False)])
def test_page_is_packed_once_for_who_takes_that(front, monkeypatch, accepted, packed):
    assert ask(front, "GET /")[0] == 200
    monkeypatch.delattr(gzip, "compress")
    status, headers, body = ask(front, "GET /", f"Accept-Encoding: {accepted}")
    known, page = dict(headers), gzip.decompress(body) if packed else body
    assert (status, known["Vary"]) == (200, "Accept-Encoding")
    assert known.get("Content-Encoding") == ("gzip" if packed else None)
    assert page.startswith(b"<!doctype html>")
    assert not packed or len(body) < len(page) / 3


def test_page_keeps_to_its_content_security_policy():
    for tag, attributes in Elements().found:
        assert [name for name in attributes if name.startswith("on") or name == "style"] == []
        if tag in ("script", "style"):
            assert attributes == {}
    assert re.findall(r"setAttribute\(\"(?:style|on\w+)\"|\.style\.cssText|\.on(?!message)\w+ = ", SCRIPT) == []
    asked = lmgateway.Request("GET", "/", (1, 1), [])
    policy = dict(lmgateway.dashboard(None, asked).headers)["Content-Security-Policy"]
    for tag in ("script", "style"):     # each by its digest (CSP 3, 6.7.2.3), and no others
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert re.findall(rf"{tag}-src ([^;]+);", policy) == [" ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inside)]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_page_names_only_elements_that_it_has():
    ids = [attributes["id"] for _, attributes in Elements().found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\$\(\"([\w-]+)\"\)", SCRIPT)) - set(ids) == set()
    for _, attributes in Elements().found:
        for name in ("for", "aria-labelledby"):
            assert attributes.get(name, ids[0]) in ids


def test_page_is_small_and_plain():
    assert len(lmgateway.DASHBOARD) < 110_000 and PAGE.count("\n") < 2000
    assert lmgateway.DASHBOARD.isascii()
    assert PAGE.startswith("<!doctype html>") and PAGE.endswith("</html>\n")


# === What the one file keeps apart ===========================================


# What the sections may know besides what stands above them, and all that CORE may use from outside: it is pure.
SECTIONS = ["ERRORS", "CONFIG", "CORE", "HUB", "TAIL", "UPSTREAM", "HTTP", "DEMO", "COMMAND", "DASHBOARD"]
CORE_MAY_IMPORT = {"Any", "Callable", "Counter", "NamedTuple", "OrderedDict", "annotations", "bisect", "codecs", "datetime",
                   "defaultdict", "deque", "functools", "hashlib", "itertools", "json", "math", "re", "string", "time", "zlib"}
CORE_MAY_ASK_TIME = {"gmtime", "strftime"}      # how to write a moment, never which moment it is


def test_no_section_takes_another_ones_name():
    """One file is one namespace: a constant that is bound anew changes what stands above it."""
    bound = Counter()
    for node in ast.parse((HERE / "lmgateway.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound[node.name] += 1
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            bound.update(name.id for name in ast.walk(target or ast.Pass()) if isinstance(name, ast.Name))
    assert [name for name, count in bound.items() if count > 1] == []


def names_by_section(source):
    """{section: (names that it defines, names that it uses)} of the program's top-level statements."""
    starts = {0: "IMPORTS", **{source.count("\n", 0, found.start()): found[1]
                               for found in re.finditer(r"^# === \d+\. (\w+)", source, re.M)}}
    sections = {name: (set(), set()) for name in starts.values()}
    for node in ast.parse(source).body[:-1]:        # the last one starts main()
        defined, used = sections[starts[max(line for line in starts if line < node.lineno)]]
        names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        stored |= {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            continue
        defined |= {node.name} if hasattr(node, "name") else {name.id for name in names if isinstance(name.ctx, ast.Store)}
        used |= {name.id for name in names} - (stored if hasattr(node, "name") else set())
    return sections


def test_sections_know_only_what_they_may():
    source = (HERE / "lmgateway.py").read_text(encoding="utf-8")
    sections = names_by_section(source)
    imported, _ = sections.pop("IMPORTS")
    assert list(sections) == SECTIONS
    below = {name: SECTIONS[place + 1:-1] for place, name in enumerate(SECTIONS)}
    breaches = {name: sorted(sections[later][0] & used) for name, (_, used) in sections.items()
                for later in below[name] if sections[later][0] & used}
    assert breaches == {}
    assert sections["CORE"][1] & imported <= CORE_MAY_IMPORT
    core = source[source.index("# === 3. CORE"):source.index("# === 4. HUB")]
    assert set(re.findall(r"\btime\.(\w+)\(", core)) <= CORE_MAY_ASK_TIME
    assert not re.search(r"\bopen\(|\bprint\(|datetime\.now|\.today\(", core)


def test_only_the_standard_library_is_imported():
    known = getattr(sys, "stdlib_module_names", None)
    if known is None:
        pytest.skip("this Python has no list of its library")
    for node in ast.walk(ast.parse((HERE / "lmgateway.py").read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {module.partition(".")[0] for module in modules} <= known
