#!/usr/bin/env python3
"""lmgateway: a gateway, log monitor and dashboard for LM Studio, in one file.

It forwards every request to LM Studio unchanged, with keys and metering; it follows LM Studio's
log files and turns them into typed events, whichever engine wrote them; and it hands those, joined
with the requests that caused them, to /debug/stream, a dashboard, a terminal and Prometheus.

Words used throughout:

    chunk      bytes that one look at a log file brought
    entry      one log record: a header line and the lines that continue it
    rule       one wording of LM Studio's log, and the fact that it states
    fact       what a line states, in words that no engine owns ("prompt is read", "client left")
    chat       one run of a model as the log shows it
    event      what listeners receive: a name and JSON
    request    one HTTP request of a client; a record is what is kept of it
    dialect    one of the APIs that LM Studio speaks: where it puts usage, tokens and errors
    meter      what reads a dialect's answer while it passes
    view       a function (gateway, request) -> Response
    card       one running request on a terminal
    finding    what a check of --check has to say, with its remedy
    upstream   LM Studio's server

Threads, and what each may write:

    main       nothing after start-up; it waits for a signal
    accept     takes connections in, and closes them where there are too many
    tail       the parser, whose figures others only read; Hub.publish_log
    http       one per connection: its own sockets, its own meter; Hub.begin, Hub.generated, Hub.end
    watcher    shuts down the upstream sockets of clients that left, wakes listeners that did
    health     asks LM Studio whether it is there, while a view waits a little for the answer
    history    the SQLite file, fed through a queue
    commented  with PREFILL_COMMENTS: one per waiting stream; what LM Studio says, into a queue
    watch      with --watch only: the line to another gateway; a queue to main
    demo-*     the imitation of LM Studio, with --demo only

Hub is the only object that holds what requests and log have in common; it has one lock.  What else
several threads use (keys, walls, kept connections, our own log) guards itself and says how.  CORE is
pure: no file, no socket, no clock, no thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main() can say so better than with a traceback

# CPython keeps the syntax tree of a script for as long as it runs: 20 MB of this file, which nobody reads
# once it is compiled.  On Linux a fresh interpreter takes this one's place (the same process, the same
# arguments) and runs the compiled code, which it finds in memory as a .pyc (PEP 552).  Where that cannot
# be had, or the interpreter's own options are not understood here, things go on in this one.
if __name__ == "__main__" and sys.platform == "linux":
    if "script" in sys._xoptions:
        os.close(int(os.path.basename(__file__)))
        __file__ = sys.argv[0] = str(sys._xoptions["script"])
    else:
        with contextlib.suppress(OSError, ValueError), open("/proc/self/cmdline", "rb") as cmdline:
            python, *flags, script = cmdline.read().split(b"\0")[:-len(sys.argv)]
            if script == os.fsencode(sys.argv[0]) and all(flag.startswith(b"-") for flag in flags):
                memory = os.memfd_create("lmgateway", 0)
                with open(memory, "wb", closefd=False) as pyc:
                    pyc.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
                own = ("-X", f"script={os.path.abspath(__file__)}", f"/proc/self/fd/{memory}", *sys.argv[1:])
                os.execv(sys.executable, [python, *flags, *map(os.fsencode, own)])

import argparse
import base64
import bisect
import codecs
import csv
import datetime
import difflib
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import platform
import plistlib
import queue
import random
import re
import secrets
import select
import shutil
import socket
import socketserver
import ssl
import stat
import struct
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1.0.0"
log = logging.getLogger("lmgateway")

# === 1. ERRORS ===============================================================
# One class per remedy.  The message tells the user what to do.


class GatewayError(Exception):
    """Base of every error this program raises on purpose.  exit_status is for main()."""

    exit_status = 1


class ConfigError(GatewayError):
    """An option, a variable or a file has a value that cannot be used.  Remedy: change it."""

    exit_status = 2


class StartError(GatewayError):
    """The machine does not let us start: a port in use, a file that cannot be written."""


class HttpError(GatewayError):
    """An answer of the gateway's own with a status of 400 or more.

    code is for programs, message for people; headers are sent along; close ends the connection
    because what follows on it cannot be trusted."""

    def __init__(self, status, code, message, headers=(), close=False):
        super().__init__(message)
        self.status, self.code, self.headers, self.close = status, code, list(headers), close


class HistoryError(GatewayError):
    """The history file cannot be read or written.  Remedy: name another, or make room."""


class ClientLeft(GatewayError):
    """The client's connection is gone: there is nobody to answer."""


# === 2. CONFIG ===============================================================
# A row of OPTIONS is the whole declaration of an option.  Its flag, environment variable, `.env`
# name, place in --help and line in the README's table are derived from it.


class Option(NamedTuple):
    """One option.  parse turns text into the value or raises ValueError with the remedy."""

    name: str
    variable: str
    flag: str | None
    default: Any
    parse: Callable[[str], Any]
    about: str
    group: str = "Gateway"
    value: str = "VALUE"  # what --help shows for it


def text(value):
    return value


def boolean(value):
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False,
             "off": False}
    if value.strip().lower() not in known:
        raise ValueError("use true or false")
    return known[value.strip().lower()]


def whole(low, high, hint):
    """A parser of whole numbers from low to high."""

    def parse(value):
        if not re.fullmatch(r"\s*\d{1,20}\s*", value, re.ASCII) or not low <= int(value) <= high:
            raise ValueError(hint)
        return int(value)

    return parse


def base_url(value):
    """http://HOST[:PORT], without a path."""
    parts = urllib.parse.urlsplit(value.strip().rstrip("/"))
    try:
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or parts.path or parts.query or parts.fragment or parts.username or " " in parts.netloc:
        raise ValueError("use the form http://127.0.0.1:1234")
    return f"{parts.scheme}://{parts.netloc}"


def folder(value):
    """A directory; it may still have to come."""
    if os.path.isfile(value):
        raise ValueError("that is a file; name LM Studio's server-logs directory")
    return value


def header_word(value):
    if not value.strip().isascii() or not value.strip().isprintable() or " " in value.strip():
        raise ValueError("use printable ASCII without blanks")
    return value.strip()


def level(value):
    if value.strip().lower() not in LEVELS:
        raise ValueError("use error, warn, info or debug")
    return value.strip().lower()


def networks(value):
    """A tuple of networks from addresses and CIDR ranges; None for `*`, which is every address."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if "*" in parts:
        return None
    try:
        if not parts:
            raise ValueError
        return tuple(unmapped(ipaddress.ip_network(part, strict=False)) for part in parts)
    except ValueError:
        raise ValueError("use addresses and ranges such as 192.168.1.0/24,fd00::/8, or *") from None


def unmapped(network):
    """An IPv4 network that is written as IPv6 (::ffff:192.168.1.0/120) as IPv4, any other as it is."""
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.ip_network((mapped,
                                 network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def api_keys(value):
    """{name: key} from one key, or from name=key,name=key.  A lone key may end in `=`, one of several without
    a name in the `==` of base64; NAME= is neither."""
    keys: dict[str, str] = {}
    for part in (part.strip() for part in value.split(",")):
        if not part:
            continue
        name, equals, key = part.partition("=")
        padded = "=" not in part.rstrip("=") and (part.endswith("==") or "," not in value.strip(" ,"))
        if not equals or padded:
            name, key = ("default" if not keys else f"key{len(keys) + 1}"), part
        if not key.strip("=") or not name.strip():
            raise ValueError("use KEY, or NAME=KEY,NAME=KEY; in a list, a key that ends in = needs a name")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("a key is made of printable ASCII without blanks")
        if name.strip() in keys:
            raise ValueError(f"the name {name.strip()} stands there twice")
        keys[name.strip()] = key
    return keys


def origins(value):
    """Origins as a browser writes them: in lower case, without a path; or `*`."""
    found = words(value.lower())
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
            raise ValueError("use origins such as https://chat.example,http://localhost:3000, or *")
    return found


def words(value):
    return tuple(word.strip().rstrip("/") for word in value.split(",") if word.strip())


LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
MILLISECONDS = whole(0, 10**9, "use milliseconds, 0 for never")


OPTIONS = (
    Option("upstream", "LMSTUDIO_BASE_URL", "--upstream", "http://127.0.0.1:1234", base_url,
           "LM Studio's server; its port is found in its settings", value="URL"),
    Option("host", "GATEWAY_HOST", "--host", "127.0.0.1", text, "address to listen on; 0.0.0.0 for the LAN",
           value="HOST"),
    Option("port", "GATEWAY_PORT", "--port", 8001, whole(0, 65535, "use a port from 0 to 65535"),
           "port to listen on; 0 lets the system choose", value="PORT"),
    Option("tls_cert", "TLS_CERT", "--tls-cert", None, text, "certificate (PEM), to serve HTTPS",
           value="FILE"),
    Option("tls_key", "TLS_KEY", "--tls-key", None, text, "its private key (PEM)", value="FILE"),
    Option("upstream_token", "UPSTREAM_TOKEN", None, None, header_word,
           "LM Studio's own API token, where its server asks for one"),
    Option("max_body", "MAX_BODY_BYTES", None, 256 * 1024 * 1024, whole(1, 10**12, "use a number of bytes"),
           "largest request body; 413 beyond it"),
    Option("max_connections", "MAX_CONNECTIONS", None, 512,
           whole(8, 100000, "use a number from 8 to 100000"),
           "connections at once; beyond them the one that has rested longest is closed"),
    Option("prefill_comments", "PREFILL_COMMENTS", None, False, boolean,
           "tell a streaming client that waits how far its prompt is, in SSE comments"),
    Option("proxy_timeout", "PROXY_TIMEOUT", None, 600000, MILLISECONDS,
           "ms without a byte from LM Studio on a plain request; 0 never"),
    Option("proxy_stream_timeout", "PROXY_STREAM_TIMEOUT", None, 0, MILLISECONDS,
           "the same for a streaming request"),
    Option("api_key", "GATEWAY_API_KEY", "--api-key", {}, api_keys,
           "one key, or several as name=key,name=key", "Access", "KEY"),
    Option("keys_file", "KEYS_FILE", "--keys-file", None, text,
           "minted keys, hashed; in the user's configuration directory if not given",
           "Access", "FILE"),
    Option("no_auth", "NO_AUTH", "--no-auth", False, boolean, "listen beyond loopback without a key",
           "Access"),
    Option("allow", "IP_ALLOWLIST", "--allow", None, networks,
           "addresses and CIDR ranges that may connect, IPv4 and IPv6", "Access", "LIST"),
    Option("cors_origins", "CORS_ORIGINS", "--cors-origins", (), origins,
           "origins whose pages may call, such as https://chat.example, or *", "Access", "LIST"),
    Option("trusted_proxies", "TRUSTED_PROXIES", None, (), networks,
           "proxies (addresses and ranges, or * for all) whose X-Forwarded-For is believed", "Access"),
    Option("require_auth_for_health", "REQUIRE_AUTH_FOR_HEALTH", None, False, boolean,
           "ask for a key on /health and /ready, too", "Access"),
    Option("requests_kept", "REQUESTS_KEPT", None, 100, whole(1, 100000, "use a number from 1 to 100000"),
           "finished requests that /debug/requests keeps"),
    Option("history", "HISTORY_FILE", "--history", None, text,
           "SQLite file that keeps a row for each request; no prompts, no answers", "Logs", "FILE"),
    Option("history_days", "HISTORY_DAYS", None, 365, whole(0, 36500, "use a number of days, 0 for ever"),
           "days after which its rows are removed; 0 never", "Logs"),
    Option("log_dir", "LMSTUDIO_LOG_DIR", "--log-dir", None, folder,
           "LM Studio's server-logs directory; found under the home if not given", "Logs",
           "DIR"),
    Option("enable_log_monitoring", "ENABLE_LOG_MONITORING", None, True, boolean, "follow LM Studio's logs",
           "Logs"),
    Option("log_dir_warn", "LOG_DIR_WARN_BYTES", None, 5_000_000_000,
           whole(0, 10**15, "use a number of bytes"),
           "size of LM Studio's log directory from which /debug/status, the dashboard and --check warn; "
           "0 never", "Logs"),
    Option("log_level", "LOG_LEVEL", "--log-level", "info", level, "error, warn, info or debug", "Logs",
           "LEVEL"),
    Option("log_file", "LOG_FILE", "--log-file", None, text,
           "write our own log there and not to stderr; turned over at 5 MB", "Logs", "FILE"),
)


class Config:
    """The value of every option, by the option's name, and in sources where each that is set comes from.
    Nothing changes it once it is made."""

    def __init__(self, **values):
        defaults = {option.name: option.default for option in OPTIONS}
        self.__dict__.update({**defaults, "sources": {}, **values})

    def __getattr__(self, name: str) -> Any:    # so that a type checker knows that it has attributes
        raise AttributeError(name)

    def but(self, **changes):
        """This Config with other values for some options."""
        return Config(**{**self.__dict__, **changes})

    def named(self, name, value=None):
        """An option with its value and source, for an error: `--host 0.0.0.0 (GATEWAY_HOST, .env line 2)`."""
        row, source = next(row for row in OPTIONS if row.name == name), self.sources.get(name)
        if source in (None, row.flag):
            source = row.variable
        elif row.variable not in source:
            source = f"{row.variable}, {source}"
        return f"{row.flag or row.variable} {value or getattr(self, name)} ({source})"


# Not NO_AUTH's: NO_PROXY and NO_COLOR are others'.
PREFIXES = tuple({row.variable.partition("_")[0] + "_" for row in OPTIONS} - {"NO_"})


class Setting(NamedTuple):
    """An option's text and where it came from."""

    text: str
    source: str


def load_config(args, environ, env_file=None):
    """(Config, warnings) from flags, else environment, else `.env`, else defaults.

    args maps option names to the text of their flags.  Raises ConfigError."""
    config, warnings, errors = load_leniently(args, environ, env_file)
    if errors:
        raise ConfigError(errors[0])
    return config, warnings


def load_leniently(args, environ, env_file):
    """(Config, warnings, errors): load_config that gathers mistakes and does not stop at one."""
    values, sources, errors = {}, {}, []    # sources: {option name: source}
    try:
        from_file, warnings = read_env_file(env_file)
    except ConfigError as error:
        from_file, warnings, errors = {}, [], [str(error)]
    for row in OPTIONS:
        setting = find_setting(row, args.get(row.name), environ, from_file)
        if setting:
            sources[row.name] = setting.source
            try:
                values[row.name] = parse_setting(row, setting)
            except ConfigError as error:
                errors.append(str(error))
    return Config(**values, sources=sources), warnings, errors


def find_setting(row, from_flag, environ, from_file):
    """The Setting of an option, or None for its default.  An empty variable counts as not set."""
    if from_flag is not None:
        return Setting(from_flag, row.flag)
    if environ.get(row.variable, "").strip():
        return Setting(environ[row.variable], f"environment variable {row.variable}")
    return from_file.get(row.variable)


def parse_setting(row, setting):
    """An option's value.  Raises ConfigError that says where the text stands and what would do."""
    try:
        return row.parse(setting.text)
    except ValueError as error:
        shown = "..." if row.variable in SECRET else repr(setting.text)
        raise ConfigError(f"{setting.source}: {shown} is no value for {row.variable}: {error}") from None


SECRET = ("GATEWAY_API_KEY", "UPSTREAM_TOKEN")
ENV_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*"
                      r"(?:\"([^\"]*)\"|'([^']*)'|(.*?))\s*(?:(?<=\s)#.*)?$")


def read_env_file(path):
    """({variable: Setting}, warnings) of a `.env` file; without a path, of the working directory's.

    Raises ConfigError when a named file cannot be read or a line is no NAME=value."""
    try:
        content = Path(path or ".env").read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        if path is None:
            unread = isinstance(error, PermissionError)
            return {}, [f".env cannot be read ({error.strerror}): what stands in it does not count"] * unread
        raise ConfigError(f"--env-file {path}: {error.strerror}; name a file that can be read") from None
    variables = [row.variable for row in OPTIONS]
    found, warnings = {}, []
    for line_number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        source, match = f"{path or '.env'} line {line_number}", ENV_LINE.match(line)
        if not match:
            raise ConfigError(f"{source}: not of the form NAME=value; mend the line or put # before it")
        name, value = match[1], next((part for part in match.groups()[1:] if part is not None), "")
        if name in variables:
            if value.strip():
                found[name] = Setting(value, source)
        elif name.startswith(PREFIXES):
            nearest = difflib.get_close_matches(name, variables, 1, 0.5)
            warnings.append(f"{source}: {name} is not a known option"
                            + (f"; did you mean {nearest[0]}?" if nearest else ""))
    return found, warnings


def shown_default(row):
    """A default as a person would write it."""
    if row.name == "allow":
        return "*"
    if isinstance(row.default, bool):
        return str(row.default).lower()
    return "none" if row.default in (None, (), {}) else str(row.default)


def options_table():
    """The README's table of options; a test holds the README to it."""
    lines = [f"| `{row.variable}` | {f'`{row.flag}`' if row.flag else ''} | `{shown_default(row)}` | "
             f"{row.about} |"
             for row in OPTIONS]
    return "\n".join(["| variable | flag | default | meaning |", "|---|---|---|---|", *lines])


@functools.lru_cache(maxsize=256)
def loopback(host):
    """True for localhost and the addresses that only this machine reaches."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


# === 3. CORE: bytes in, events out ===========================================
# Pure: no file, no socket, no clock, no thread.  The time zone database of the system is
# the only thing asked for, to turn the log's local time into UTC.


class Event(NamedTuple):
    """What every listener receives.  data is strict JSON.  One without a name is a fact for the join alone."""

    name: str
    data: dict
    run: int | None = None  # number of the run that its line surely is about
    chat: int | None = None  # number of the chat that the tracker takes it for
    about: Any = None  # what the join and the figures want to know beyond it: {name: value}


# --- 3.1 log rules: the only place that knows a wording of LM Studio's log ---
# A new wording is one new row: write down the fact that the line states, its pattern and a
# sample line.  Facts are methods of ChatTracker (3.3), on_<fact>; "" is a known line that states
# nothing we use.  A line that fits no row is counted as unknown and shown in /debug/status.


class Rule(NamedTuple):
    """One wording.  The pattern is matched where the line's tags, clock and slot have been cut off."""

    fact: str  # what it states: on_<fact> takes the pattern's named groups (engine) or the Entry
    where: str  # "app": first line of an entry; "error": all of an ERROR entry; "engine": any line of a DEBUG entry
    shape: str  # "line", "json" (goes on to a brace in column 1), "text" (so does all of its entry), "half" (a line)
    engines: str  # who writes it: App, or the engine generations named below
    pattern: str
    sample: str


NUMBER = r"(?:-?[\d.]{1,50}(?:e[+-]?\d{1,3})?|-?inf|-?nan)"  # as printf writes it
TIMING = r" *(?:\( *{n} ms per token, +(?P<rate>{n}) tokens per second\)|\([^)\n]*\))".format(n=NUMBER)
PAIRS = rf"(?P<pairs>[ \t]*(?:[a-z]\w* = {NUMBER}(?!\w),? *)*)$"     # (?!): 1e5b = is one way of reading it

RULES = (
    # --- the app's own lines: every engine, since 04-2025 unless a date says otherwise
    Rule("progress", "app", "line", "App", r"Prompt processing progress: (?P<percent>\d+(?:[.,]\d+)?)%",
         "Prompt processing progress: 36.6%"),
    Rule("start", "app", "line", "App",
         r"Running chat completion on conversation with (?P<messages>\d+) messages?\.",
         "Running chat completion on conversation with 2 messages."),
    Rule("stream", "app", "line", "App", r"Streaming response\.\.\.", "Streaming response..."),
    Rule("first_token", "app", "line", "App", r"First token generated\. Continuing to stream response",
         "First token generated. Continuing to stream response.."),
    Rule("finish", "app", "line", "App", r"Finished streaming response", "Finished streaming response"),
    Rule("prediction", "app", "json", "App", r"Generated prediction: ", "Generated prediction: {"),
    Rule("response", "app", "json", "App", r"Generated synchronous v1/responses response: ",
         "Generated synchronous v1/responses response: {"),
    Rule("disconnect", "app", "line", "App", r"Client disconnected\. Stopping generation",
         "Client disconnected. Stopping generation... (If the model is busy processing the prompt, it "
         "will finish first.)"),
    Rule("stopped", "app", "line", "App", r"Server stopped\.", "Server stopped."),
    Rule("received", "app", "json", "App", r"Received request: POST to (?P<path>/v1/(?:responses|messages)|"
         r"/api/v1/chat|/(?:api/v0|v1)/chat/completions)(?![\w/])",
         "Received request: POST to /v1/chat/completions with body {"),
    Rule("", "app", "json", "App", r"Received request: [A-Z]+ to ", "Received request: GET to /v1/models"),
    Rule("", "app", "json", "App", r"Model generated tool calls: ", "Model generated tool calls: []"),
    Rule("", "app", "text", "App", r"Generated packet: ", "Generated packet: {"),
    Rule("", "app", "text", "App", r"Accumulat(?:ed|ing) ", "Accumulated 5 tokens in response  first line"),
    Rule("", "app", "text", "App", r"Received request to embed: ",
         "Received request to embed: BeginProcessingPrompt"),
    Rule("", "app", "text", "App", r"Received request for .* with invalid JSON",
         "Received request for /v1/models with invalid JSON"),
    Rule("", "app", "line", "App", r"Start thinking\.\.\.|Done (?:thinking|reasoning)\.|Start to generate a tool call"
         r"|Tool name generated: |Model generated a tool call\.", "Done reasoning. Reasoned for 6.13 seconds."),
    Rule("respond", "app", "line", "App", r"Generating synchronous v1/responses response",
         "Generating synchronous v1/responses response..."),
    Rule("", "app", "line", "App", r"Returning \d+ models", "Returning 5 models from v1 API"),
    Rule("", "app", "text", "App", r"Returning \{", "Returning {"),
    Rule("", "app", "line", "App",
         r"A value was passed to the 'Authorization' header|Developer role detected|Received OPTIONS request"
         r"|At least one tool has 'strict' set to true|Client disconnected: Error|Failed to generate a tool call",
         "Developer role detected - replacing it with system role."),
    Rule("load", "app", "line", "App", r"Requested model \((?P<asked>.*)\) is not loaded\. Loading ",
         'Requested model (quillon/moraine-30b) is not loaded. Loading "quillon/moraine-30b" now...'),
    Rule("", "app", "line", "App", r"Just-in-time model loading (?:in)?active",
         "Just-in-time model loading active."),
    Rule("", "app", "line", "App",
         r"Server started\.|Success! HTTP server listening|Logs are saved into |The server can be reached"
         r"|Server accepting connections from the local network",
         "Success! HTTP server listening on port 1234"),
    Rule("", "app", "line", "App", r"Supported endpoints:|  OpenAI-compatible|  LM Studio API| *->\s+[A-Z]+ +http",
         "   ->  GET  http://localhost:1234/v1/models"),
    # --- errors: the whole text of an ERROR entry, 02-2025 to 09-2026.  Most stream errors end in "Error Data".
    Rule("", "error", "text", "App", r"Failed to generate a tool call",
         "Failed to generate a tool call (this tool call will be omitted from the response):  no end"),
    Rule("", "error", "text", "App", r"Model Output: ", "Model Output:  <tool_call>{, Additional Data: n/a"),
    Rule("render_error", "error", "text", "App", r"Error rendering prompt with jinja template",
         'Error rendering prompt with jinja template: "No user turn to render".'),
    Rule("crash", "error", "text", "App", r"(?:Error: )?The model has crashed(?!.*Error Data: )",
         "Error: The model has crashed without additional information. (Exit code: 18446744072635812000)"),
    Rule("chat_error", "error", "text", "App", r"Error: (?:Channel Error|received prediction-error)|Engine protocol predict "
         r"|The number of tokens to keep from the initial prompt", "Error: Channel Error"),
    Rule("chat_error", "error", "text", "App", r"(?s:.*)Error Data: [^\n]*, Additional Data: [^\n]*\Z",
         "Model unloaded.. Error Data: n/a, Additional Data: n/a"),
    Rule("empty_error", "error", "text", "App", r"\Z", ""),
    # --- G3 (06-2026 on, every line with its clock) and G2 "LlamaV4" (03 to 06-2026)
    Rule("cached", "engine", "line", "G2 G3", r"(?:cached )?n_tokens = (?P<reused>\d+), memory_seq_rm",
         "1.02.003.004 I slot   operator(): id  3 | task 241 | cached n_tokens = 609, memory_seq_rm [609, "
         "end)"),
    Rule("read", "engine", "line", "G2",
         r"prompt processing progress, n_tokens = +(?P<tokens>\d+), batch\.n_tokens = \d+, progress = "
         r"(?P<share>\d+\.\d+)$",
         "slot update_slots: id  3 | task 302 | prompt processing progress, n_tokens = 512, "
         "batch.n_tokens = 512, progress = 0.17"),
    Rule("read", "engine", "line", "G3",
         r"prompt processing, n_tokens = +(?P<tokens>\d+), progress = (?P<share>\d+\.\d+)(?:, t = +[\d.]+ s "
         r"/ (?P<rate>[\d.]+))?",
         "1.02.003.004 I slot print_timing: id  2 | task 9 | prompt processing, n_tokens =   1024, "
         "progress = 0.39, t =   0.44 s / 2337.12 tokens per second"),
    Rule("decoded", "engine", "line", "G3", r"n_(?:decoded|gen) = +(?P<tokens>\d+), tg = +(?P<rate>[\d.]+) t/s",
         "1.02.003.004 I slot print_timing: id  2 | task 9 | n_decoded =    197, tg =  32.55 t/s, tg_3s = "
         " 32.18 t/s"),
    Rule("prompt_eval", "engine", "line", "G1 G2 G3",
         r"prompt eval time = +(?P<ms>" + NUMBER + r") ms / +(?P<tokens>\d+) tokens" + TIMING,
         "llama_perf_context_print: prompt eval time =     335.72 ms /    78 tokens (    4.30 ms per "
         "token,   232.34 tokens per second)"),
    Rule("eval", "engine", "line", "G1 G2 G3", r"eval time = +(?P<ms>" + NUMBER
         + r") ms / +(?P<tokens>\d+) (?:tokens|runs)\b" + TIMING,
         "       eval time =   13307.75 ms /   299 tokens (   44.51 ms per token,    22.47 tokens per "
         "second)"),
    Rule("total", "engine", "line", "G1 G2 G3", r"total time = +(?P<ms>" + NUMBER + r") ms / +\d+ tokens",
         "      total time =   17671.75 ms /  4096 tokens"),
    Rule("draft", "engine", "line", "G2 G3",
         r"draft acceptance(?: rate)? = +\S+ \( *(?P<accepted>\d+) accepted / +(?P<generated>\d+) "
         r"generated\)",
         "1.02.003.004 I slot print_timing: id  0 | task 9 | draft acceptance = 0.95455 (   63 accepted / "
         "   66 generated), mean len =  3.86"),
    Rule("timings", "engine", "half", "G2", r"(?<=\| )$", "slot print_timing: id  1 | task 3416 | "),
    Rule("prompt", "engine", "line", "G2 G3",
         r"new prompt, n_ctx_slot = (?P<n_ctx>\d+), n_keep = (?P<n_keep>-?\d+), task\.n_tokens = "
         r"(?P<total>\d+)",
         "slot update_slots: id  1 | task 3416 | new prompt, n_ctx_slot = 4096, n_keep = 1571, "
         "task.n_tokens = 3797"),
    Rule("launch", "engine", "line", "G2 G3", r"processing task\b",
         "slot launch_slot_: id  3 | task 302 | processing task, is_child = 0"),
    Rule("sampler", "engine", "line", "G2 G3", r"init sampler, took .*total = (?P<total>\d+)",
         "slot init_sampler: id  1 | task 302 | init sampler, took 0.33 ms, tokens: text = 900, total = 900"),
    Rule("release", "engine", "line", "G2 G3",
         r"stop processing: n_tokens = (?P<context>\d+), truncated = (?P<truncated>\d)",
         "slot      release: id  1 | task 3416 | stop processing: n_tokens = 4095, truncated = 1"),
    Rule("cancel", "engine", "line", "G2 G3", r"cancel task, id_task = (?P<cancelled>\d+)",
         "srv          stop: cancel task, id_task = 21"),
    Rule("reset", "engine", "line", "G2 G3", r"forcing full prompt re-processing",
         "slot update_slots: id  1 | task 7 | forcing full prompt re-processing due to lack of cache data"),
    Rule("", "engine", "text", "G3", r"common_chat_peg_parse: unparsed peg-native output:",
         "0.55.924.848 W common_chat_peg_parse: unparsed peg-native output: <answer>"),
    Rule("", "engine", "line", "G2 G3",
         r"prompt processing done|selected slot by|sampler chain:|updating prompt cache|prompt cache "
         r"update took|all slots are idle|cache reuse is not supported|n_past = |restored context|created context"
         r"|erased invalidated|checking checkpoint|- cache state: |- prompt [0-9A-F]+:|saving idle slot"
         r"|- saving prompt|clearing prompt|chat format: |graphs reused|loading model|initializing, n_slots"
         r"|prompt_save: |statistics |- looking for better prompt|- skipping",
         "0.30.013.273 I slot get_availabl: id  3 | task -1 | selected slot by LRU, t_last = -1"),
    Rule("", "engine", "line", "G2 G3", r"LlamaV4(?:::|: server assigned slot \d+ to task)",
         "LlamaV4: server assigned slot 1 to task 3416"),
    Rule("", "engine", "half", "G2 G3", r"[IWED]?(?<=[\dIWED|])$",    # the rest is under the next header
         "0.30.015.244 I"),
    # --- what a model load, the app's planning and errors told elsewhere write: whole classes, by their beginning
    Rule("", "engine", "text", "App", r"\[LM Studio\]|1 Error predicting: |\[LLMProcess\]|\[SamplingSwitch\]"
         r"|lmstudio-llama-cpp: failed to load model|SpeculativeDecodingNotSupportedError|CUDA error",
         "1 Error predicting: Error: the prompt does not fit."),
    Rule("", "engine", "line", "App", r"llama_model_load|llama_context|llama_kv_cache|llama_memory|print_info:|load_tensors:"
         r"|load_hparams:|load:|validate_override:|ggml_|common_init|GgmlThreadpools:|Metal :|warning: failed to mlock"
         r"|Try increasing RLIMIT_MEMLOCK|Prompt successfully formatted with Harmony|Failed to remove tokens from cache"
         r"|\[(?:batched_model_kit|ModelKit|CacheWrapper|transformers)\]|\[\d+:\d{4}/\d{6}",
         "llama_model_loader: loaded meta data with 33 key-value pairs"),
    # --- sampling parameters: G1 writes the first on the heading's line, G3 on lines of their own
    Rule("sampling", "engine", "line", "G1", r"[Ss]ampling params:" + PAIRS,
         "Sampling params:\trepeat_last_n = 64, repeat_penalty = 1.100"),
    Rule("sampling", "engine", "line", "G3", "sampler params:" + PAIRS,
         "0.30.015.189 I slot launch_slot_: id  3 | task -1 | sampler params:"),
    Rule("params", "engine", "line", "G1 G3",
         rf"(?P<pairs>[a-z]\w* = {NUMBER}(?:, +[a-z]\w* = {NUMBER})*,? *)$",
         "\ttop_k = 40, top_p = 0.950, temp = 0.700"),
    # --- G1 (mid-2025 to 01-2026) and its early wording (up to 04-2025)
    Rule("generate", "engine", "line", "G1",
         r"[Gg]enerate: n_ctx = (?P<n_ctx>-?\d+), n_batch = (?P<n_batch>-?\d+), n_predict = "
         r"(?P<n_predict>-?\d+), n_keep = (?P<n_keep>-?\d+)",
         "Generate: n_ctx = 4096, n_batch = 512, n_predict = 512, n_keep = 42"),
    Rule("reuse", "engine", "line", "G1",
         r"Cache reuse summary: (?P<reused>\d+)/(?P<total>\d+) of prompt \(\S+\), (?P<prefix>\d+) prefix, "
         r"(?P<other>\d+) non-prefix",
         "Cache reuse summary: 69/147 of prompt (46.9388%), 69 prefix, 0 non-prefix"),
    Rule("prompt_total", "engine", "line", "G1", r"Total prompt tokens: (?P<total>\d+)",
         "Total prompt tokens: 147"),
    Rule("to_decode", "engine", "line", "G1", r"Prompt tokens to decode: (?P<tokens>\d+)",
         "Prompt tokens to decode: 78"),
    Rule("begin", "engine", "line", "G1", r"BeginProcessingPrompt$", "BeginProcessingPrompt"),
    Rule("early_progress", "engine", "line", "G1", r"PromptProcessing: (?P<percent>\d+(?:\.\d+)?)$",
         "PromptProcessing: 73.6691"),
    Rule("finished_prompt", "engine", "line", "G1", r"FinishedProcessingPrompt\b",
         "FinishedProcessingPrompt. Progress: 100"),
    Rule("", "engine", "line", "G1",
         r"[Ss]ampling: *$|logits ->|[Tt]arget model llama_perf stats:|load time = |graphs reused|sampling "
         r"time = "
         r"|llama_memory_breakdown_print|Incomplete UTF-8 character|Looking for non-prefix contiguous"
         r"|memory breakdown", "Target model llama_perf stats:"),
    # --- MLX: cache_wrapper since 04-2025, its "using" since 04-2026, coordinator since 05-2026
    Rule("mlx_cache", "engine", "line", "MLX",
         r"\[\w+\]\[INFO\]: Prompt cache: using (?P<reused>\d+)/(?P<total>\d+) tokens from cache",
         "[cache_wrapper][INFO]: Prompt cache: using 0/11 tokens from cache"),
    Rule("mlx_cache", "engine", "line", "MLX",
         r"\[\w+\]\[INFO\]: Prompt cache restore: cached_tokens=(?P<reused>\d+) "
         r"uncached_tokens=(?P<fresh>\d+)",
         "[coordinator][INFO]: Prompt cache restore: cached_tokens=14336 uncached_tokens=113 "
         "lifetime_efficiency=47.94%"),
    Rule("", "engine", "line", "MLX",
         r"\[(?:cache_wrapper|coordinator|cache_store|model_kit|INFO|WARNING)\]",
         "[cache_wrapper][INFO]: Trimmed 41 tokens from the prompt cache"),
    # --- Splash (2026)
    Rule("splash", "engine", "line", "Splash",
         r"\d\d:\d\d:\d\d (?:Done(?=.* tok/s)|Cancelled|Error) · input (?P<total>\d[\d,]{0,18}) · "
         r"cached (?P<reused>\d[\d,]{0,18})(?: · output (?P<output>\d[\d,]{0,18}))?"
         r"(?: · TTFT (?P<ttft>[\d.,]+)(?P<milli>m?)s)?(?: · (?P<rate>[\d.,]+) tok/s)?",
         "00:54:42 Done · input 26 · cached 0 · output 1,092 · TTFT 0.5s · 92.9 tok/s"),
    # --- the last row: llama.cpp's server in any other wording
    Rule("", "engine", "half", "G2 G3", r"(?(task)\S|(?(server)\S|(?!)))",
         "slot   operator(): id  3 | task 202 | n_past was set to 1534"),
)

PLUGIN = re.compile(r"\[Plugin\(")
STRANGER = re.compile(r"\[(?:Plugin\(|Client=|LMSAuthenticator)")  # entries of plugins and SDK clients
TAG = re.compile(r"\[(?!\])([^\[\]\n]{0,200}(?:\[[^\[\]\n]*\][^\[\]\n]{0,200}){0,9})\] ?")
SERVER_TAG = "LM STUDIO SERVER"  # stands where later versions name the model, or before it; never a model
SERVER_ERROR = "Server Error"  # its JSON may quote any other error; it ends no chat


def compile_rules(where, prefix="", suffix=""):
    """The rules of one place as one pattern, and {last group: (rule, [(field, group index)])}.

    A figure has at most 15 digits, so that int and float take every one."""
    parts, rows = [], {}
    for number, rule in enumerate(RULES):
        if rule.where == where:
            bounded = rule.pattern.replace("(?P<", f"(?P<r{number}_").replace(r"\d+", r"\d{1,15}")
            parts.append(f"(?:{bounded})(?P<r{number}>)")  # re passes over what begins with another letter
            rows[f"r{number}"] = rule
    pattern = re.compile(prefix + "(?:" + "|".join(parts) + ")" + suffix, re.MULTILINE)
    return pattern, {name: (rule, fields_of(pattern, name)) for name, rule in rows.items()}


def fields_of(pattern, name):
    """[(field, group index)] of one rule inside a compiled alternation: its own, and what the prefix has."""
    return [(group.rpartition(f"{name}_")[2], index) for group, index in pattern.groupindex.items()
            if group.startswith(f"{name}_") or group in ("slot", "task", "clock")]


# G3 puts its clock (minutes.seconds.ms.us since the engine started) and a level before each line;
# G2 and G3 say which slot and task a line is about; G1 says which printer wrote it.
ENGINE_PREFIX = (r"(?P<clock>\d+\.\d\d\.\d{3}\.\d{3} ?)?(?:[IWED] )?"
                 r"(?:slot +[^:\n]*: +id +(?P<slot>\d+) \| +task +(?P<task>-?\d+) \| *|(?P<server>srv) +[^:\n]*: *"
                 r"|(?P<printer>llama_perf\w*): *|[ \t]+)?")

APP, APP_ROWS = compile_rules("app")
ERRORS, ERROR_ROWS = compile_rules("error")
ENGINE, ENGINE_ROWS = compile_rules("engine", "^(?:" + ENGINE_PREFIX, r")[^\n]*|^(?P<unknown>[^\n]*\S[^\n]*)")


HALVES = frozenset(["unknown", *(group for group, (rule, _) in ENGINE_ROWS.items() if rule.shape == "half")])
GROWING = frozenset(group for group, (rule, _) in ENGINE_ROWS.items()  # torn in a number, they are told again
                    if rule.fact == "params")
ANY_WORDING = next(group for group, (rule, _) in ENGINE_ROWS.items() if rule is RULES[-1])


def number(text):
    """int or float of the log's text; None for inf, nan and what is no number at all."""
    if text is not None and text.isdecimal():
        return int(text)
    try:
        value = float(text.replace(",", ""))
    except (ValueError, AttributeError):
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and "." not in text and "e" not in text else value


def without_none(**values):
    """values without those that the log never gave."""
    return {name: value for name, value in values.items() if value is not None}


# --- 3.2 entries: bytes to log records ---------------------------------------

ENTRY_LIMIT = 256 * 1024  # characters; what an entry has beyond them is read and not kept
UNENDED_LIMIT = 1024 * 1024  # bytes; the same for a line that does not end
# The file's header, or the one that the Developer Logs panel copies (both seen from 04-2025 to 09-2026).
HEADER = re.compile(rb"\n(?:\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]\[(DEBUG|INFO|WARN|ERROR)\] ?"
                    rb"|(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ?\[(DEBUG|INFO|WARN|ERROR)\] ?(?=\n|\Z))")
# The panel's header with its text on the same line; inside a log of another look it is a plugin's text.
ONE_LINE_HEADER = re.compile(rb"\n(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ?\[(DEBUG|INFO|WARN|ERROR)\] ?(?=\S)()()")
CLOSED = ("\n}", "\n]")  # the end of pretty-printed JSON
PANEL_GAP = re.compile(r"(?<=[^ \n])  (?=[{\[](?:\n|$))")  # the panel's second blank before JSON
UNKNOWN_SAMPLES = 8
TORN_S = 1  # a line broken over two headers goes on within this
NO_MODEL = frozenset(("JIT", SERVER_ERROR, "INFO", "WARNING"))


class Moment(NamedTuple):
    """When an entry was written: the log's own text, the same in UTC, and epoch seconds."""

    text: str
    utc: str
    epoch: float


class Calendar:
    """The log's local time to UTC, in file order.

    The log has no zone, so the hour that a change to winter time repeats is told
    apart by order: a time that would run back by more than a minute is the second one."""

    def __init__(self):
        self._last = Moment("", "", 0.0)
        self._minute = Moment("", "", 0.0)  # how that and its minute begin
        self._repeats = False  # the hour is being repeated

    def moment(self, text):
        """The Moment of a header's time; a time that no calendar has keeps its text."""
        if text != self._last.text:
            self._last = self._resolve(text)
        return self._last

    def _resolve(self, text):
        minute, second = text[:17], text[17:]
        try:
            if minute != self._minute.text or second > "59":
                self._minute = self._minute_of(minute, text)
            _, utc, epoch = self._minute
            return Moment(text, f"{utc}{second}Z", epoch + int(second))
        except (ValueError, OverflowError, OSError):
            return Moment(text, text.replace(" ", "T") + "Z", self._last.epoch)

    def _minute_of(self, minute, text):
        local = datetime.datetime.fromisoformat(text)
        epoch, second = local.timestamp(), local.replace(fold=1).timestamp()
        self._repeats = second > epoch and (self._repeats or epoch < self._last.epoch - 60)
        epoch = (second if self._repeats else epoch) - local.second
        return Moment(minute, utc_text(epoch)[:17], epoch)


def utc_text(epoch):
    """Epoch seconds as 2025-11-17T10:59:23Z."""
    return utc_second(int(epoch // 1))


@functools.lru_cache(maxsize=16)
def utc_second(epoch):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))


class Entry:
    """One log record while its lines come in."""

    text = ""
    line = ""  # its first line that has any text, without the tags before it
    shape = None  # "line", "json", "text", "engine", "foreign"; None before its first text
    model = None
    row = fields = None  # the app rule that it fits, and that rule's fields
    listener = None  # what of ChatTracker is to hear of it once it is whole
    sent = -1  # characters of text that events have carried; -1 before the first event
    cut = False  # lines were left out
    told = loads = None  # the events of its first line; the model whose loading it announces

    def __init__(self, moment, level, panel):
        self.moment, self.level, self.panel = moment, level, panel
        self.tags = []


class Parser:
    """Bytes of one log, in any pieces, to events.

    feed() takes news and gives the events that are certain; quiet() says that nothing was added
    for a while, so that the last entry is complete; end() says that nothing will follow the
    bytes so far (end of a file, a replaced file)."""

    def __init__(self):
        self._rest = b"\n"  # the unfinished last line, after the "\n" that ends the one before
        self._cut = False  # it was longer than a line may be
        self._first = True  # the next line is the first of its file
        self._header = HEADER
        self._entry = None
        self._last_line = None  # (text, rule's group, epoch) of the engine's latest line
        self._engine = ""  # the generation that wrote it
        self._calendar = Calendar()
        self._events: list[Event] = []
        self.story = ChatTracker(self._events)
        self.entries = self.lines = self.unknown = self.headless = self.faults = 0
        self.by_event: Counter[str] = Counter()
        self.by_engine: Counter[str] = Counter()
        self.by_level: Counter[str] = Counter()
        self._strange: deque[str] = deque(maxlen=UNKNOWN_SAMPLES)  # how the latest unknown lines begin
        self.last_moment = None

    def feed(self, chunk):
        """The events that the bytes complete, in order."""
        data = self._rest + chunk
        end = data.rfind(b"\n")
        if end > 0:
            self._rest = data[end:]
            self._block(data[:end])
        else:
            self._rest, self._cut = data[:UNENDED_LIMIT], self._cut or len(data) > UNENDED_LIMIT
        return self._taken()

    def quiet(self):
        """The events of the entry that was open.  A line that has not ended stays open."""
        if len(self._rest) == 1:
            self._complete()
            self._tell(self.story.quiet)
        return self._taken()

    def end(self, torn=True):
        """The events of all that is there, the unfinished line included unless torn is False."""
        rest, self._rest = self._rest, b"\n"
        if len(rest) > 1 and torn:
            self._block(rest)
        self._first = True
        self._complete(final=True)
        self._tell(self.story.later, None)
        return self._taken()

    def forget(self):
        """The bytes that follow are another file's: lines before its first header continue nothing."""
        self._entry = self._last_line = None

    @property
    def waiting(self):
        """True while an entry or a line is open."""
        return len(self._rest) > 1 or (self._entry is not None and self._entry.sent < len(self._entry.text))

    @property
    def midline(self):
        """True while the last line has not ended."""
        return len(self._rest) > 1

    @property
    def samples(self):
        """What the latest unknown lines look like, without their words."""
        return [redacted(line) for line in tuple(self._strange)]

    def _taken(self):
        events, self._events[:] = self._events[:], []
        self.by_event.update([event.name for event in events if event.name])
        return events

    def _block(self, block):
        """Bytes of whole lines, the first after its "\n"."""
        if self._first:
            block, self._first = b"\n" + block[1:].removeprefix(codecs.BOM_UTF8), False
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").removesuffix(b"\r")
        self.lines += block.count(b"\n")
        if self.entries == 0 and ONE_LINE_HEADER.match(block):
            self._header = ONE_LINE_HEADER
        before, *pieces = self._header.split(block)
        if before:
            self._add(before)
        for stamp, level, panel_stamp, panel_level, lines in zip(*[iter(pieces)] * 5):
            self._complete(final=True)
            self._open((stamp or panel_stamp).decode(), (level or panel_level).decode(), stamp is None)
            if lines:
                self._add(lines)

    def _tell(self, listener, *what):
        """Tell the tracker something.  A fault there costs these events, is counted, and stops nothing else."""
        try:
            listener(*what)
        except Exception:  # lines that nobody foresaw; CORE has no log to say it in, the status shows it
            self.faults += 1

    def _open(self, stamp, level, panel):
        self.entries += 1
        self.by_level[level] += 1
        moment = self._calendar.moment(stamp)
        if moment is not self.last_moment:
            self.last_moment = moment
            self._tell(self.story.later, moment)
        self._entry = Entry(moment, level, panel)

    def _add(self, data):
        """More lines of the open entry."""
        entry = self._entry
        if entry is None:
            self.headless += data.count(b"\n")
            return
        lines = data.decode("utf-8", "replace")
        room = ENTRY_LIMIT - len(entry.text)
        entry.cut, self._cut = entry.cut or self._cut or len(lines) > room, False
        entry.text += lines[:room] if entry.cut else lines
        torn = None
        if entry.shape is None:
            lines, torn = self._begin(entry), self._last_line
        if entry.shape == "engine":
            self._engine_lines(lines, entry.moment, torn)
        elif entry.shape == "line" and entry.sent < 0 or entry.shape == "json" and lines.endswith(CLOSED):
            self._conclude(entry)

    def _begin(self, entry):
        """Learn the entry's kind from its first line that has text.  Gives the lines there are."""
        if entry.panel and entry.text:
            entry.text = PANEL_GAP.sub(" ", entry.text[2 if entry.text.startswith("\n ") else 1 :], count=1)
            entry.panel = False
        text = entry.text.lstrip("\n")
        if text:
            entry.line = text.partition("\n")[0]
            stranger = entry.line.startswith("[") and STRANGER.match(entry.line)
            self._cut_tags(entry)
            if stranger:
                told = entry.level == "ERROR" and not PLUGIN.match(stranger[0])
                entry.shape, entry.listener = ("text", self.story.error) if told else ("foreign", None)
            else:
                entry.shape = self._recognise(entry)
            entry.line = entry.line.strip()
        return text

    def _cut_tags(self, entry):
        while entry.line.startswith("[") and (match := TAG.match(entry.line)):
            entry.tags.append(match[1])
            entry.line = entry.line[match.end():]

    def _recognise(self, entry):
        """The shape of an entry of LM Studio's own, by its first line."""
        level, tags = entry.level, [tag for tag in entry.tags if tag != SERVER_TAG]
        if len(tags) == 1 and level != "DEBUG" and tags[0] not in NO_MODEL:
            entry.model = tags[0]  # the only other tag of an app line is its model
        if level == "ERROR":
            entry.listener = self.story.error
            return "text"
        match = APP.match(entry.line) if len(tags) < 2 else None
        if match:
            row, fields = APP_ROWS[match.lastgroup]
            if level != "DEBUG" or row.fact in ("", "received"):
                entry.row, entry.fields = row, {name: match[index] for name, index in fields}
                entry.listener = self.story.app if row.fact else None
                whole = row.shape == "json" and not entry.line.endswith(("{", "["))
                return "line" if whole else row.shape
        if level == "DEBUG":
            return "engine"
        self._unknown_line(entry.line)
        return "text"

    def _engine_lines(self, lines, moment, torn):
        """Facts from lines of a DEBUG entry; torn is the line before its header, if they are its first."""
        match, entry = None, self._entry
        for found in ENGINE.finditer(lines):
            match = self._mended(torn, found, moment) if torn else found
            torn = None
            if match.lastgroup == "unknown":
                self._unknown_line(match[0])
                continue
            rule, fields = ENGINE_ROWS[match.lastgroup]
            engine = self._engine = engine_of(rule, match, self._engine)
            if engine:
                self.by_engine[engine] += 1
            if rule.shape == "text":
                entry.shape, self._last_line = "text", None
                return
            if rule.fact:
                facts = {name: match[index] for name, index in fields}
                self._tell(self.story.engine, rule.fact, facts, engine, moment)
        if match:
            self._last_line = match[0], match.lastgroup, moment.epoch

    def _mended(self, torn, match, moment):
        """The match of a line, joined with the one before its header where the two are one line.

        A rule's pattern begins where the line does.  So one that fits both together and not the first half
        alone says that they belong together, and what the second half looks like alone is chance.  A line of
        parameters fits at any of its numbers' digits."""
        line, group, epoch = torn
        if moment.epoch - epoch > TORN_S or group not in HALVES and match.lastgroup != "unknown":
            return match
        blank = line.endswith(" ") or match[0].startswith(" ")
        for glue in ("",) if blank else (" ", ""):
            joined = ENGINE.match(line + glue + match[0])
            if joined.lastgroup not in ("unknown", ANY_WORDING, group) or group == joined.lastgroup in GROWING or (
                    group == ANY_WORDING and match.lastgroup == "unknown"):
                if group == "unknown":
                    self.unknown -= 1
                return joined
        return match

    def _unknown_line(self, line):
        self.unknown += 1
        self._strange.append(line[:160])

    def _conclude(self, entry):
        """An entry is whole: tell what it states and send it, without waiting for the next header."""
        if entry.listener:
            listener, entry.listener, before = entry.listener, None, len(self._events)
            self._tell(listener, entry)
            entry.told = self._events[before:]
        self._send(entry)

    def _complete(self, final=False):
        """Nothing has been added for a while, or (final) nothing will be."""
        entry = self._entry
        if entry is None:
            return
        if final or entry.level == "ERROR":
            if entry.level == "ERROR" and not entry.text.strip():
                entry.listener = self.story.error
            self._conclude(entry)
        else:
            self._send(entry)

    def _send(self, entry):
        """One lmstudio_log with the text that no event has carried yet."""
        if entry.sent == len(entry.text):
            return
        data = {"timestamp": entry.moment.text, "level": entry.level,
                "message": entry.text if entry.sent <= 0 else entry.text[entry.sent:].lstrip("\n"),
                "tags": entry.tags}
        if entry.sent >= 0:
            data["continued"] = True
        if entry.cut:
            data["truncated"] = True
        entry.sent = len(entry.text)
        about = {"told": entry.told, "loads": entry.loads} if entry.told or entry.loads else None
        self._events.append(Event("lmstudio_log", data, about=about))


def engine_of(rule, match, before):
    """The engine generation that wrote a line: what the line shows, else before, that of the line before
    it; "" where neither tells."""
    if " " not in rule.engines:
        return rule.engines
    clock, printer, task = match.group("clock", "printer", "task")
    shown = "G3" if clock else "G1" if printer else "G2" if task else ""
    return shown or (before if before in rule.engines else "")


QUOTED = re.compile(r'"[^"]*"?|\'[^\']*\'?')
WORD = re.compile(r"[^\W\d_]{4,}|\d+")


def redacted(line):
    """A line as a specimen without what a user may have written: quotes emptied, words cut, digits to 0."""
    line = QUOTED.sub('"..."', line)
    return WORD.sub(lambda word: "0" if word[0].isdigit() else word[0][:3] + "~", line)[:100]


# --- 3.3 tracker: facts to events ---------------------------------------------
# The app (INFO) writes of chats and names at best a model; an engine (DEBUG) writes of runs and names at
# best a task.  No line says which run is which chat's.
#
#  1. A line that has a task is about that task's run.  Without a task it is about the engine's latest run
#     that has not had such a line yet.
#  2. A run that begins is taken for the oldest chat that has none; if no chat waits, for one inside the app.
#  3. A percent that is n_tokens/total of one run alone is that run's, so the run is of the line's model.
#  4. An app line means the chat of its model that fits best; each line is told once, whichever it was.
#  5. Figures of a run and of its chat's answer are one event: when both have come, or a second after one.
#
# 2 and 4 are guesses as soon as two chats run.  They settle only what is told once or together, never whose
# a request is: an event carries the number of its run if 1 or 3 says it, and the join (3.8) decides.


class Run:
    """What an engine's lines tell of one prediction.  G2 and G3 number it, G1 begins one with its sampling
    block, MLX has a cache line for each, Splash a line when it is over."""

    def __init__(self, number, engine, task, born):
        self.number, self.engine, self.task, self.born = number, engine, task, born  # born: epoch of its first line
        self.chat: Any = None  # the Chat that it is taken for
        self.model = None  # once an app line has named it (3)
        self.tokens = {}  # of lmstudio_token_info
        self.total = self.cached = None  # tokens of the prompt; those of them that were cached
        self.positions = {}  # tokens read after each of the latest batches, of which the app has not told: epoch
        self.begun = self.read = False  # its prompt has begun to be read, has been read
        self.waiting = None  # (Moment, percent) of the engine's progress while the app's own can follow
        self.stats = {}  # of lmstudio_prediction_stats
        self.told = self.claimed = False  # the app has written 100 % for it; a last line
        self.over = None  # the Moment of its last figures
        self.said = set()  # names of the events that it gave and that come once

    def takes(self, percent, epoch):
        """True if the app writes this percent for one of its latest positions, of which it tells once."""
        for position, written in list(self.positions.items()) if self.total else ():
            if epoch - written > TORN_S:
                del self.positions[position]
            elif abs(100 * position / self.total - percent) < 0.06:
                return True
        return False

    def drop(self, percent):
        self.positions = {position: epoch for position, epoch in self.positions.items()
                          if abs(100 * position / self.total - percent) >= 0.06}


class Chat:
    """A chat as the app's lines tell it; one inside the app (api False) has no line of its own."""

    def __init__(self, number, moment, model, api=True):
        self.number, self.started, self.model, self.api = number, moment, model, api
        self.messages: int | None = None
        self.stream: bool | None = False  # None if we came in its middle or no line tells
        self.run: Any = None  # the Run that is taken for its
        self.percent = None  # of the app's latest progress line
        self.first_token = False
        self.counts, self.speeds = {}, {}  # of its answer
        self.answered = False  # its last line has come
        self.left = False  # a disconnect line after its end was its own
        self.ended: Any = None  # the Moment of its end
        self.outcome = None
        self.said = set()  # names of the events that it gave and that come once
        self.counted = False

    def has_said(self, name):
        return name in self.said or self.run is not None and name in self.run.said

    @property
    def works(self):
        """The engine has taken it up."""
        return self.run is not None or self.percent is not None

    def began(self, created):
        """True if an answer's "created" (UTC) is the second of its start; the log's zone can be another."""
        apart = (created - self.started.epoch + 450) % 900 - 450 if isinstance(created, int) and self.started else None
        return apart is not None and abs(apart) <= 1

    def may_be_answer_of(self, run):
        """True if its answer has the counts of a run.  MLX counts one token less, G1 writes one more or less."""
        slack = run.engine not in ("G2", "G3")
        pairs = ((self.counts.get("promptTokens"), run.total),
                 (self.counts.get("completionTokens"), run.stats.get("completionTokens")))
        return not any(None not in pair and abs(pair[0] - pair[1]) > slack for pair in pairs)

    @property
    def abandoned(self):
        """Its client has left, and its last line can still come."""
        return self.outcome == "disconnected" and not self.answered


CHATS_KEPT = 64  # running chats that are remembered; one that never ends is forgotten at last
ENDED_KEPT = 8  # ended chats that late lines can still mean
RUNS_KEPT = 64
LOGGED_KEPT = 8  # requests whose chat has not begun
SETTLING_S = 120  # an abandoned chat can still write lines for so long
HELD_S = 1  # the engine's timings and the app's last line come within this, in either order
SWALLOW_S = 1  # a disconnect line this soon after an end says nothing new
LEFT_S = 2  # the app writes the last line of a client that left within this, unless the engine is busy
UNTIMED = frozenset(("MLX", "Splash"))  # engines that write no timings of llama.cpp's


def pick(rows, *preferences):
    """The oldest of the rows that fit the most preferences, taken in order; None of none."""
    for prefers in preferences if len(rows) > 1 else ():
        rows = [row for row in rows if prefers(row)] or rows
    return rows[0] if rows else None


def shared_model(chats):
    """The model that all chats have in common, else None."""
    models = {chat.model for chat in chats}
    return models.pop() if len(models) == 1 else None


class LoggedRequest(NamedTuple):
    """A request as the log has it, before its chat begins.  text holds the body, long strings cut."""

    moment: Moment
    path: str
    text: str

    def fits(self, messages):
        """True if the body has so many messages or does not tell.  They are counted without reading the
        JSON: inside a string the second quote of "role" has a backslash before it."""
        return self.text.count('"role": ') in (0, messages)


class Emitter:
    """Puts events into a list, each thing of a chat once."""

    def __init__(self, news):
        self._news = news
        self.clock = None  # G3: the engine's own time of the line at hand

    def emit(self, name, moment, chat=None, run=None, model=None, about=None, **data):
        """One event.  run is given if its line is surely about that run."""
        data = {"timestamp": moment.utc, **data}
        if model:
            data["model"] = model
        self._news.append(Event(name, data, run and run.number, chat and chat.number, about))

    def fact(self, name, run, **about):
        """What the join needs to know of a run and no event tells."""
        chat = run.chat
        self._news.append(Event("", {}, run.number, chat and chat.number, {"fact": name, "clock": self.clock, **about}))

    def once(self, name, moment, chat, run=None, model=None, **data):
        """An event that a run and its chat give once together."""
        if not (chat and chat.has_said(name) or run and name in run.said):
            (run or chat).said.add(name)
            self.emit(name, moment, chat, run, model, **data)

    def processing(self, moment, chat, run=None, model=None):
        self.once("lmstudio_processing_start", moment, chat, run, model, message="BeginProcessingPrompt")

    def generation(self, moment, chat, run=None, model=None):
        self.once("lmstudio_generation_start", moment, chat, run, model,
                  message="The prompt is read, the first token is next")

    def progress(self, moment, chat, run, model, percent, message=None):
        self.emit("lmstudio_prompt_progress", moment, chat, run, model, progress=percent,
                  message=message or f"Prompt processing progress: {percent:.1f}%")

    def cache(self, moment, run, model, reused, prefix, other):
        total, run.cached = run.total, reused
        share = min(100.0, 100 * reused / total) if total else 0.0
        self.once("lmstudio_cache_stats", moment, run.chat, run, model, reused=reused, total=total,
                  percentage=round(share, 2), prefix=prefix, nonPrefix=other,
                  message=f"Cache reuse summary: {reused}/{total} of prompt ({share:g}%), {prefix} prefix, "
                          f"{other} non-prefix")

    def token_info(self, moment, run, model):
        if run.total is not None:
            run.tokens["totalPromptTokens"] = run.total
        if run.tokens:
            self.once("lmstudio_token_info", moment, run.chat, run, model, **run.tokens)

    def stats(self, moment, chat, run, model):
        """lmstudio_prediction_stats of a run with what its chat's answer adds, or of one of the two."""
        run = run if run and (run.over or run.engine in UNTIMED) else None
        mine = run is None or chat.may_be_answer_of(run)
        stats = {**chat.speeds, **(run.stats if run else {}), **chat.counts} if mine else run.stats
        prompt = stats.get("promptTokens") or run and run.total or stats.get("evaluated")
        known = without_none(promptTokens=prompt, **{name: stats.get(name) for name in STATS})
        if known.keys() - {"promptTokens"}:
            self.once("lmstudio_prediction_stats", moment, chat if mine else None, run if run and run.stats else None, model,
                      about=countable(chat, known.get("promptTokens")), **known)


def countable(chat, prompt_tokens):
    """What figures count of a chat at its stats or its end, whichever comes first."""
    if chat is None or chat.counted:
        return None
    chat.counted = True
    return without_none(requests=1, input=prompt_tokens)


class EngineLines:
    """Facts of the engines' lines, on_<fact>."""

    def __init__(self, news):
        self._emit = Emitter(news)
        self._facts = {rule.fact: getattr(self, "on_" + rule.fact) for rule in RULES if rule.fact}
        self._numbers = itertools.count(1)  # of runs and chats
        self.running: list[Chat] = []  # the chats that have not ended, oldest first
        self._ended: deque[Chat] = deque(maxlen=ENDED_KEPT)  # late lines can still mean them
        self._tasks: dict[str, Run] = {}  # task -> run
        self._launching: dict[str, Run] = {}  # slot -> run whose task is not known yet
        self._latest: dict[str, Run] = {}  # engine -> the run that its lines were about last
        self._runs: deque[Run] = deque(maxlen=RUNS_KEPT)
        self._engines: dict[str, str] = {}  # model -> the engine that runs it, once that was certain
        self._sampling: Any = None  # (run, Moment, parameters so far) while the block is open
        self._timing = None  # G2: the task that bare timing lines belong to
        self._timed_run: Any = None  # G1: (run, Moment) whose figures are whole unless a timing line follows
        self._early = None  # MLX: the model of a prompt whose first progress has come, its cache line has not
        self._held: list[tuple] = []  # (Moment, chat) whose stats wait for their other half (5)
        self._unmatched: deque[tuple] = deque(maxlen=8)  # (model, percent, epoch) of the app that no run was at
        self._engine, self._now = "", 0.0  # engine and epoch of the line at hand
        self.resets: Counter[str] = Counter()  # prompts that were read wholly anew, by model

    def engine(self, fact, fields, engine, moment):
        """A recognised line of an engine."""
        self._engine, self._now, self._emit.clock = engine, moment.epoch, fields.get("clock")
        if fact not in TIMINGS:
            self._timing = None
            self._close_timings()
        if fact != "params":
            self._close_sampling()
        self._facts[fact](fields, moment)

    def _close_sampling(self):
        if self._sampling:
            (run, moment, values), self._sampling = self._sampling, None
            if values:
                self._emit.once("lmstudio_sampling_params", moment, run.chat, run, self._model(run), **values)

    def _model(self, run):
        """The model of a run, None unless it is certain."""
        chats = [*self.running, *(chat for chat in self._ended if chat is run.chat or chat.abandoned)]
        return run.model or (shared_model([chat for chat in chats if chat.api]) if run.chat.api else None)

    # --- runs

    def _begin(self, task=None, chat=None):
        """A new run, taken for the oldest chat that can have it (2)."""
        waiting = [other for other in self.running if other.api and other.run is None
                   and self._engines.get(other.model, self._engine) == self._engine]
        left = [other for other in self._ended if other.abandoned and other.run is None and other.percent is None]
        run = Run(next(self._numbers), self._engine, task, self._now)
        chat = chat or pick(waiting, lambda c: c.percent is None) or pick(left) or self._new_chat(None, None, api=False)
        run.chat, chat.run = chat, run
        if chat.model and sum(other.api for other in self.running) == 1:
            self._engines[chat.model] = self._engine
        self._runs.append(run)
        self._latest[self._engine] = run
        self._emit.fact("launch", run, engine=run.engine, epoch=run.born)
        return run

    def _launch(self, fields):
        """The run that an engine's line begins with: a slot is set up before its task is known."""
        slot, task = fields["slot"], fields["task"]
        run = self._launching.pop(slot, None) or self._begin()
        self._latest[self._engine] = run
        if task in (None, "-1"):
            if slot is not None:
                self._launching[slot] = run
            return run
        if task in self._tasks:  # of another model's engine: no line with this number can be told apart
            self._tasks[task].task = None
        run.task, self._tasks[task] = task, run
        while len(self._tasks) > RUNS_KEPT:
            del self._tasks[next(iter(self._tasks))]
        return run

    def _run(self, fields=None, lacks=None):
        """The run that a line is about (1)."""
        task = fields and fields["task"]
        if task and task != "-1":
            run = self._tasks.get(task) or self._launch(fields)
            if run.waiting:  # the next line of its task is no app line: it is a chat inside the app
                (moment, percent), run.waiting = run.waiting, None
                self._emit.progress(moment, run.chat, run, None, percent)
            return run
        run = self._latest.get(self._engine)
        if run is None or lacks and not lacks(run):
            others = [run for run in self._runs if run.engine == self._engine and not run.task and not run.over
                      and lacks and lacks(run)]
            run = self._latest[self._engine] = others[0] if others else self._begin()
        return run

    def _close_timings(self):
        if self._timed_run:
            (run, moment), self._timed_run = self._timed_run, None
            self._end_run(run, moment)

    def _end_run(self, run, moment):
        """No figures of it will follow."""
        self._tasks.pop(run.task, None)
        run.over = moment
        self._emit.fact("over", run, total=run.total, written=run.stats.get("completionTokens"), api=run.chat.api)
        self._settle(run.chat, moment)
        if run.chat in self.running and not run.chat.api:
            self._close(run.chat, moment, "finished")

    def _new_chat(self, moment, model, api=True):
        chat = Chat(next(self._numbers), moment, model, api)
        self.running.append(chat)
        if len(self.running) > CHATS_KEPT:
            self._close(self.running[0], moment, "forgotten")
        return chat

    def _close(self, chat, moment, outcome):
        self.running.remove(chat)
        self._ended.append(chat)
        chat.ended, chat.outcome = moment, outcome

    # --- figures that come in two halves (5)

    def _settle(self, chat, moment):
        """Tell a chat's stats if both halves are there, else hold them once one is."""
        run = chat.run
        if (run is None or run.over or run.engine in UNTIMED) and (not chat.api or chat.stream is not False
                                                                  or chat.answered):
            self._tell_stats(chat, moment)
        elif chat.ended or chat.answered or run and run.over:
            self._held.append((moment, chat))

    def _tell_stats(self, chat, moment):
        self._emit.stats(moment, chat, chat.run, self._model(chat.run) if chat.run else chat.model)

    def _release(self, moment=None, final=False):
        """Tell the stats that have waited long enough, by default those whose answer cannot come any more."""
        held, self._held = self._held, []
        for since, chat in held:
            if final or (moment.epoch - since.epoch > HELD_S if moment else chat.ended or chat.answered):
                self._tell_stats(chat, since)
            else:
                self._held.append((since, chat))

    # --- G1

    def on_sampling(self, fields, moment):
        run = self._launch(fields) if fields["slot"] else self._begin()
        self._sampling = (run, moment, {})
        if fields["pairs"]:
            self.on_params(fields, moment)

    def on_params(self, fields, moment):
        if self._sampling is None:
            if "repeat_last_n" not in fields["pairs"]:
                return
            self._sampling = (self._begin(), moment, {})  # the heading was not seen
        pairs = fields["pairs"].strip()
        self._sampling[2].update(parameters(pairs))
        if "mirostat_ent" in pairs and not pairs.endswith(","):
            self._close_sampling()

    def on_generate(self, fields, moment):
        run = self._run(lacks=lambda r: "n_ctx" not in r.tokens)
        run.tokens.update(without_none(**{name: number(fields[name]) for name in
                                          ("n_ctx", "n_batch", "n_predict", "n_keep")}))

    def on_reuse(self, fields, moment):
        run = self._run(lacks=lambda r: r.cached is None)
        run.total = int(fields["total"])
        self._emit.fact("prompt", run, total=run.total)
        self._emit.cache(moment, run, self._model(run), *(int(fields[name]) for name in ("reused", "prefix", "other")))

    def on_prompt_total(self, fields, moment):
        self._run(lacks=lambda r: "promptTokensToDecode" not in r.tokens).total = int(fields["total"])

    def on_to_decode(self, fields, moment):
        run = self._run(lacks=lambda r: "promptTokensToDecode" not in r.tokens)
        run.tokens["promptTokensToDecode"] = int(fields["tokens"])
        self._emit.token_info(moment, run, self._model(run))
        if run.total == run.tokens["promptTokensToDecode"]:
            self._emit.cache(moment, run, self._model(run), 0, 0, 0)

    def on_begin(self, fields, moment):
        run = self._run(lacks=lambda r: not r.begun)
        run.begun = True
        self._emit.token_info(moment, run, self._model(run))
        self._emit.processing(moment, run.chat, run, self._model(run))

    def on_early_progress(self, fields, moment):
        run = self._run()
        if run.chat.percent is None:
            self._emit.progress(moment, run.chat, run, self._model(run), number(fields["percent"]))

    def on_finished_prompt(self, fields, moment):
        run = self._run(lacks=lambda r: r.begun and not r.read)
        run.read = True
        self._emit.token_info(moment, run, self._model(run))
        self._emit.generation(moment, run.chat, run, self._model(run))

    # --- G2 and G3

    def on_launch(self, fields, moment):
        if fields["task"] not in self._tasks or fields["slot"] in self._launching:
            self._launch(fields)

    def on_prompt(self, fields, moment):
        run = self._run(fields)
        run.total = int(fields["total"])
        run.tokens.update(n_ctx=int(fields["n_ctx"]), n_keep=int(fields["n_keep"]))
        self._emit.fact("prompt", run, total=run.total, slot=fields["slot"])
        self._emit.processing(moment, run.chat, run, self._model(run))

    def on_cached(self, fields, moment):
        run, reused = self._run(fields), int(fields["reused"])
        if "n_ctx" in run.tokens and run.cached is None:  # later ones tell how far the prompt has been read
            run.tokens["promptTokensToDecode"] = run.total - reused
            self._emit.token_info(moment, run, self._model(run))
            self._emit.cache(moment, run, self._model(run), reused, reused, 0)
        else:
            self._reach(run, reused)
            self._emit.fact("reading", run)

    def _reach(self, run, position):
        """So many tokens are read.  The app's line about it can have come before."""
        run.positions[position] = self._now
        for row in [row for row in self._unmatched if run.takes(*row[1:])]:
            run.model, run.positions = row[0], {}
            self._emit.fact("model", run, model=row[0])
            self._unmatched.remove(row)

    def on_read(self, fields, moment):
        run = self._run(fields)
        percent = round(100 * float(fields["share"]), 4)
        if not run.chat.api:
            run.waiting = (moment, percent)

    def on_reset(self, fields, moment):
        self.resets[self._model(self._run(fields)) or "unknown"] += 1

    def on_decoded(self, fields, moment):
        self._emit.fact("read", self._run(fields))

    def on_sampler(self, fields, moment):
        run = self._run(fields)
        run.total = int(fields["total"])
        self._emit.fact("read", run, total=run.total)

    def on_cancel(self, fields, moment):
        run = self._tasks.get(fields["cancelled"])
        if run:
            run.positions = {}
            self._emit.fact("cancel", run)

    def on_release(self, fields, moment):
        run = self._tasks.get(fields["task"])
        if run is None:
            return
        written = run.stats.get("completionTokens")
        if run.total is None and written and fields["truncated"] == "0":  # terse G3 tells the total nowhere else
            run.total = int(fields["context"]) - written + 1
        self._end_run(run, moment)

    # --- timings, in every generation of llama.cpp

    def on_timings(self, fields, moment):
        self._timing = fields["task"]

    def on_prompt_eval(self, fields, moment):
        run, tokens = self._timed(fields), int(fields["tokens"])
        if not run.task:  # G1: the one that had so many to decode
            fitting = [other for other in self._runs if other.engine == self._engine and not other.over
                       and other.tokens.get("promptTokensToDecode") == tokens]
            if fitting and run not in fitting:
                run = self._latest[self._engine] = fitting[0]
        run.stats.update(evaluated=tokens, promptMs=number(fields["ms"]), promptTokensPerSecond=rate(fields))

    def on_eval(self, fields, moment):
        self._timed(fields).stats.update(completionTokens=int(fields["tokens"]), evalMs=number(fields["ms"]),
                                         tokensPerSecond=rate(fields))

    def on_total(self, fields, moment):
        run = self._timed(fields)
        run.stats["totalMs"] = number(fields["ms"])
        if not run.task:
            self._close_timings()
            self._timed_run = run, moment

    def on_draft(self, fields, moment):
        self._timed(fields).stats.update(draftTokens=int(fields["generated"]),
                                         acceptedDraftTokens=int(fields["accepted"]))

    def _timed(self, fields):
        """The run that a timing line is about.  G2's have their task on a line before them."""
        return self._run({"slot": None, "task": fields["task"] or self._timing}, lambda r: "totalMs" not in r.stats)

    # --- MLX and Splash

    def on_mlx_cache(self, fields, moment):
        run, reused = self._begin(), int(fields["reused"])
        run.begun, run.model, self._early = bool(self._early), self._early, None
        run.total = int(fields["total"]) if "total" in fields else reused + int(fields["fresh"])
        self._emit.fact("prompt", run, total=run.total)
        self._tell_prompt(moment, run, reused)
        self._emit.processing(moment, run.chat, run, self._model(run))

    def on_splash(self, fields, moment):
        waiting = [chat for chat in (*self._ended, *self.running) if chat.api and chat.run is None
                   and (chat.ended is None or chat.abandoned)]
        run = self._begin(chat=pick(waiting, lambda c: self._engines.get(c.model, "Splash") == "Splash",
                                    lambda c: c.has_said("lmstudio_generation_start"), lambda c: c.percent is not None))
        run.total = number(fields["total"])
        self._tell_prompt(moment, run, number(fields["reused"]))
        first = number(fields["ttft"])
        run.stats.update(completionTokens=number(fields["output"]), tokensPerSecond=number(fields["rate"]),
                         timeToFirstTokenMs=first and round(first * (1 if fields["milli"] else 1000), 3))
        self._end_run(run, moment)

    def _tell_prompt(self, moment, run, reused):
        self._emit.cache(moment, run, self._model(run), reused, reused, 0)
        run.tokens["promptTokensToDecode"] = run.total - reused
        self._emit.token_info(moment, run, self._model(run))


class ChatTracker(EngineLines):
    """What the log says about chats, told once each.  Facts come in as on_<fact>, events go to a list."""

    def __init__(self, news):
        super().__init__(news)
        self._logged: deque[LoggedRequest] = deque(maxlen=LOGGED_KEPT)  # requests whose chat has not begun
        self._unseen_end = -math.inf  # epoch at which a chat ended whose beginning we did not see

    def app(self, entry):
        """A recognised entry of the app."""
        if entry.row.fact in ("received", "start"):
            self._release()
        self._facts[entry.row.fact](entry)

    def error(self, entry):
        """An ERROR entry of LM Studio's own, complete."""
        self._emit.emit("lmstudio_error", entry.moment, model=entry.model, message=entry.text.strip())
        match = ERRORS.match(entry.text[entry.text.find(entry.line):].rstrip())
        if match and SERVER_ERROR not in entry.tags and ERROR_ROWS[match.lastgroup][0].fact:
            self._facts[ERROR_ROWS[match.lastgroup][0].fact](entry)

    def later(self, moment):
        """The log's time has gone on, or (None) nothing will follow: what waited for a line is told."""
        if self._sampling and (moment is None or moment.epoch - self._sampling[1].epoch > TORN_S):
            self._close_sampling()
        self._close_timings()
        self._release(moment, final=moment is None)
        for run in self._runs if moment is None else ():
            if run.waiting:
                self._emit.progress(run.waiting[0], run.chat, run, None, run.waiting[1])
                run.waiting = None

    def quiet(self):
        """Nothing has come for a while.  A block that is torn can still go on."""
        self._close_timings()
        self._release()

    # --- which chat a line means (4)

    def _of(self, entry, *more):
        """The chats that an app line can mean: those of its model, or all if it names none."""
        return [chat for chat in (*more, *self.running)
                if chat.api and (None in (entry.model, chat.model) or chat.model == entry.model)]

    def _left(self, entry):
        """Chats of its model whose client has left and whose last line can still come."""
        return [chat for chat in self._of(entry, *self._ended)
                if chat.abandoned and entry.moment.epoch - chat.ended.epoch < SETTLING_S]

    def _run_at(self, percent, model):
        """The run that alone can be meant by a percent of its model (3)."""
        if 0 < percent < 100:
            runs = [run for run in self._runs if run.task and not run.over and run.takes(percent, self._now)]
            if not runs:
                self._unmatched.append((model, percent, self._now))
        elif percent:
            runs = [run for run in self._runs if run.task and not run.over and run.read and not run.told]
        else:
            runs = []
        runs = [run for run in runs if run.model in (None, model)]
        return runs[0] if len(runs) == 1 else self._mlx_run(percent, model)

    def _mlx_run(self, percent, model):
        """MLX reads one prompt of a model at a time, from its 0.0% on.  The cache line stands beside that, before or
        after it."""
        run = self._latest.get("MLX")
        if self._engines.get(model, "MLX") != "MLX":
            return None
        if any(chat.api and chat.model not in (None, model) for chat in self.running):
            for each in self._runs:
                each.told = each.told or each.engine == "MLX"  # nobody can say any more what belongs to it
            return None
        if percent == 0:
            mine = run and not run.begun and self._now - run.born <= TORN_S
            self._early = None if mine else model
        else:
            mine = run and run.begun
        if not mine or run.told or run.model not in (None, model):
            return None
        run.begun = True
        return run

    def _pair(self, run, chat):
        """Take a run for a chat's; the chat's former one is taken for the other's."""
        before, other = run.chat, chat.run
        if before is not chat:
            run.chat, chat.run, before.run = chat, run, other
            if other:
                other.chat = before
            elif not before.api and before in self.running:
                self.running.remove(before)  # there was none inside the app

    # --- facts of the app's lines

    def on_received(self, entry):
        self._logged.append(LoggedRequest(entry.moment, entry.fields["path"], entry.text))

    def on_load(self, entry):
        entry.loads = entry.fields["asked"]

    def on_start(self, entry):
        chat = self._new_chat(entry.moment, entry.model)
        chat.messages = int(entry.fields["messages"])
        fitting = [row for row in self._logged if entry.moment.epoch - row.moment.epoch < SETTLING_S
                   and row.fits(chat.messages)]
        for row in fitting:  # if there are several, nobody can say any more whose they are
            self._logged.remove(row)
        self._emit.emit("lmstudio_chat_start", entry.moment, chat, model=entry.model, message=entry.line,
                        messages=chat.messages, about={"logged": fitting[0]} if len(fitting) == 1 else None)

    def on_respond(self, entry):
        self._new_chat(entry.moment, entry.model)

    def on_stream(self, entry):
        found = self._of(entry)
        chat = pick([chat for chat in found if not (chat.stream or chat.run)][-1:] or found[-1:])
        if chat:
            chat.stream = True

    def on_progress(self, entry):
        percent, self._now = min(100.0, number(entry.fields["percent"].replace(",", "."))), entry.moment.epoch
        run = self._run_at(percent, entry.model)
        found = [chat for chat in self._of(entry) if chat.percent != 100]
        chat = (run.chat if run and run.chat in found else
                pick(found, lambda c: (c.percent or 0) <= percent, lambda c: (c.percent is None) == (percent == 0),
                     lambda c: c.run)
                or pick([chat for chat in self._left(entry) if chat.percent != 100]) or self._adopt(entry, percent))
        if run:
            self._pair(run, chat)
            run.model, run.told = entry.model or run.model, percent == 100
            run.drop(percent)
        if chat.run:
            chat.run.waiting = None
        if chat.run is None or chat.run.engine in UNTIMED:  # else a line of the engine tells its start
            self._emit.processing(entry.moment, chat, model=entry.model)
        self._emit.progress(entry.moment, chat, run if percent else None, entry.model, percent, entry.line)
        chat.percent = percent
        if percent == 100:
            self._emit.generation(entry.moment, chat, run, entry.model)

    def _adopt(self, entry, percent):
        """A chat whose start was not seen: /v1/responses writes none, or we came in its middle."""
        runs = [run for run in self._runs if not (run.chat.api or run.over)]
        chat = self._new_chat(entry.moment, entry.model)
        chat.stream = None
        if len(runs) == 1:
            self._pair(runs[0], chat)
        elif percent:
            chat.said.add("lmstudio_processing_start")
        return chat

    def on_first_token(self, entry):
        chat = pick([chat for chat in self._of(entry) if not chat.first_token], lambda c: c.stream, lambda c: c.works)
        if chat:
            chat.first_token = True
            self._emit.generation(entry.moment, chat, model=entry.model)

    # --- ends

    def _end(self, chat, entry, outcome, model, message=None, answer=None):
        if chat:
            chat.answered = outcome == "finished"
            run = chat.run
            if run and "n_ctx" in run.tokens:
                self._emit.token_info(entry.moment, run, self._model(run))
            self._close(chat, entry.moment, outcome)
            self._settle(chat, entry.moment)
        about = {**(answer or {}), **(countable(chat, chat.run and chat.run.total) or {} if outcome == "finished" and chat
                                      else {})}
        self._emit.emit("lmstudio_chat_end", entry.moment, chat, model=model, about=about, outcome=outcome,
                        message=message or entry.line)

    def _has_ended(self, entry, *outcomes):
        """True if the line can be the last one of a chat that has just ended so.  Each chat is asked once."""
        for chat in self._of(entry, *self._ended):
            if chat.outcome in outcomes and not chat.answered and (
                    entry.moment.epoch - chat.ended.epoch <= SWALLOW_S):
                chat.answered = True
                return True
        return False

    def on_finish(self, entry):
        running = self._of(entry)
        found = [chat for chat in running if chat.stream] or [chat for chat in running if chat.stream is None]
        left = [chat for chat in self._left(entry) if chat.stream is not False]
        chat = pick(found, lambda c: c.run and c.run.over, lambda c: c.works,
                    lambda c: c.has_said("lmstudio_generation_start"))
        whole = [run for run in self._runs if run.over and not run.claimed and "totalMs" in run.stats
                 and run.model in (None, entry.model) and (run.model or run.chat.api)]
        if left and not whole and (chat is None or not (chat.run and chat.run.over)
                                   and entry.moment.epoch - left[0].ended.epoch <= LEFT_S):
            left[0].answered = True  # it finished because its client had left
            return
        for run in [run for run in whole if chat and run is chat.run][:1] or whole[:1]:
            run.claimed = True
        if chat is None:
            if self._has_ended(entry, "error"):
                return
            self._unseen_end = entry.moment.epoch
        self._end(chat, entry, "finished", entry.model or shared_model(found))

    def on_prediction(self, entry):
        self._answer(entry, "Generated prediction")

    def on_response(self, entry):
        self._answer(entry, entry.line)

    def _answer(self, entry, message):
        """A whole answer.  A client that has left gets one, too."""
        body = prediction_of(entry.text)
        counts, speeds = prediction_figures(body)
        running = [chat for chat in self._of(entry) if not (chat.answered or chat.stream)]
        left = [chat for chat in self._left(entry) if not chat.stream]
        created = body.get("created", body.get("created_at")) if not body.get("runtime") else None
        total, working = counts.get("promptTokens"), any(chat.works for chat in running)
        chat = pick([*left, *running], lambda c: c.run and total and c.run.total == total,
                    lambda c: (c in left) == ("usage" in body and total is None), lambda c: c.began(created),
                    lambda c: c.ended is None or not working, lambda c: c.run and c.run.over, lambda c: c.works)
        model = entry.model or body.get("model") or shared_model([*left, *running])
        chat = chat or self._new_chat(entry.moment, model)
        chat.counts, chat.speeds = counts, speeds
        runs = [run for run in self._runs if run.over and "lmstudio_prediction_stats" not in run.said
                and chat.may_be_answer_of(run)]
        other = runs[0].chat if runs else chat
        for run in runs[:1]:
            run.claimed = True
        if runs and chat.run not in runs:
            self._pair(runs[0], chat)
        if chat.ended is None:
            answer = {"answer_id": body.get("id"), "counts": counts}
            chat.answered = True
            self._end(chat, entry, "finished", model, message, answer)
        else:
            chat.answered = True
            self._settle(chat, entry.moment)
        if other is not chat and other.run and other.run.over:
            self._settle(other, entry.moment)

    def on_disconnect(self, entry):
        now, found = entry.moment.epoch, self._of(entry)
        for chat in self._ended:
            began = any(other.works and other.started.epoch >= chat.ended.epoch for other in found)
            if chat.outcome == "finished" and chat.api and not (chat.left or began) and now - chat.ended.epoch <= SWALLOW_S:
                chat.left = True  # the connection of an answer that is whole
                return
        chat = pick(found, lambda c: not (c.run and c.run.over), lambda c: c.works)
        if chat is None and (self._has_ended(entry, "error") or now - self._unseen_end <= SWALLOW_S):
            self._unseen_end = -math.inf
            return
        self._end(chat, entry, "disconnected", shared_model(found) if found else None)

    def on_stopped(self, entry):
        for chat in self.running[:]:
            if chat.api:
                self._end(chat, entry, "error", chat.model)
            else:
                self._close(chat, entry.moment, "stopped")

    # --- errors that end chats

    def on_chat_error(self, entry):
        """Of two chats it is the one that the engine works on, not the one that waits."""
        found = self._of(entry)
        if found or not self._has_ended(entry, "disconnected", "error"):
            self._end(pick(found, lambda c: c.works, lambda c: not (c.run and c.run.over)), entry, "error",
                      entry.model or shared_model(found))

    def on_render_error(self, entry):
        """The engine has never heard of its chat."""
        found = self._of(entry)
        if found or not self._has_ended(entry, "disconnected"):
            self._end(pick(found[::-1], lambda c: not c.run), entry, "error", entry.model or shared_model(found))

    def on_empty_error(self, entry):
        found = [chat for chat in self._of(entry) if chat.model is None]
        if found:
            self._end(pick(found, lambda c: c.works), entry, "error", None)

    def on_crash(self, entry):
        for chat in self._of(entry):
            self._end(chat, entry, "error", chat.model)


TIMINGS = frozenset(("timings", "prompt_eval", "eval", "total", "draft", "release"))
STATS = ("completionTokens", "promptTokensPerSecond", "tokensPerSecond", "timeToFirstTokenMs", "promptMs",
         "evalMs", "totalMs", "draftTokens", "acceptedDraftTokens", "reasoningTokens")


@functools.lru_cache(maxsize=64)
def parameters(pairs):
    """{name: number} of a line of a sampling block.  Most requests have the same ones as those before."""
    values = {name.strip(): number(text.strip()) for name, _, text in
              (pair.partition(" = ") for pair in pairs.split(","))}
    return without_none(**values)


def rate(fields):
    """Tokens per second of a timing line; worked out where the line does not give it."""
    if fields["rate"]:
        return number(fields["rate"])
    ms = number(fields["ms"])
    return round(1000 * int(fields["tokens"]) / ms, 2) if ms else None


LENIENT = json.JSONDecoder()


def prediction_of(text):
    """The JSON of a Generated prediction, {} where it is hidden or cut."""
    try:
        body, _ = LENIENT.raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def numbers(body, *path):
    """The members of an object in parsed JSON that are numbers; {} where the path leads to no object."""
    for name in path:
        body = body.get(name) if isinstance(body, dict) else None
    return {name: value for name, value in body.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
            and abs(value) < 1e15} if isinstance(body, dict) else {}


def prediction_figures(body):
    """(counts, speeds) of a prediction: /v1 has usage, /api/v0 also stats in s, /api/v1/chat only stats."""
    usage, stats = numbers(body, "usage"), numbers(body, "stats")
    detail = numbers(body, "usage", "completion_tokens_details")
    first = stats.get("time_to_first_token", stats.get("time_to_first_token_seconds"))
    both = {**stats, **usage}
    if not (usage.get("prompt_tokens", 1) or usage.get("completion_tokens")):   # cancelled: no figures
        both = {}
    counts = without_none(promptTokens=both.get("prompt_tokens", both.get("input_tokens")),
                     completionTokens=both.get("completion_tokens",
                                               both.get("total_output_tokens", both.get("output_tokens"))),
                     timeToFirstTokenMs=None if first is None else round(first * 1000, 3),
                     reasoningTokens=stats.get("reasoning_output_tokens", detail.get("reasoning_tokens")),
                     draftTokens=both.get("total_draft_tokens_count"),
                     acceptedDraftTokens=both.get("accepted_draft_tokens_count"))
    return counts, without_none(tokensPerSecond=stats.get("tokens_per_second"))


# --- 3.4 dialects: where each API of LM Studio puts model, tokens and usage ---


class Dialect(NamedTuple):
    """One inference API."""

    name: str
    asks_usage: bool  # a stream carries usage only with stream_options.include_usage
    token: re.Pattern  # found in a streamed event that holds content, reasoning or a tool call
    joined: bool = False    # the log shows its requests as chats
    counts_messages: bool = False   # and says how many messages each has


# Keys of an event can be told by their bytes: inside a JSON string each quote stands behind a backslash.
OPENAI_TOKEN = re.compile(rb'"(?:content|reasoning|reasoning_content|text)"\s*:\s*"(?!")'
                          rb'|"(?:tool_calls"\s*:\s*\[|function_call"\s*:)\s*\{')
RESPONSES_TOKEN = re.compile(rb'"delta"\s*:\s*"(?!")')
MESSAGES_TOKEN = re.compile(rb'"(?:text|thinking|partial_json)"\s*:\s*"(?!")|"type"\s*:\s*"tool_use"')
NATIVE_TOKEN = re.compile(rb'"type"\s*:\s*"(?:(?:message|reasoning)\.delta|tool_call\.(?:start|arguments))"')

CHAT = Dialect("chat", True, OPENAI_TOKEN, joined=True, counts_messages=True)
COMPLETIONS = Dialect("completions", True, OPENAI_TOKEN)
EMBEDDINGS = Dialect("embeddings", False, OPENAI_TOKEN)
RESPONSES = Dialect("responses", False, RESPONSES_TOKEN, joined=True)
MESSAGES = Dialect("messages", False, MESSAGES_TOKEN, joined=True)
NATIVE = Dialect("native", False, NATIVE_TOKEN, joined=True)
OTHER = Dialect("other", False, OPENAI_TOKEN)

DIALECTS = {  # POST to these paths is an inference (LM Studio 0.4 and Bionic 1.1)
    "/v1/chat/completions": CHAT,
    "/api/v0/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/api/v0/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
    "/api/v0/embeddings": EMBEDDINGS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/api/v1/chat": NATIVE,
    "/v1/decisions": OTHER,
    "/v1/systemone": OTHER,
}
JOINED = frozenset(dialect.name for dialect in DIALECTS.values() if dialect.joined)


def listed(value):
    """The dicts of a list, [] for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(parse_constant=refuse_constant)  # no NaN, no Infinity: LM Studio knows none


def json_object(data):
    """The JSON object in UTF-8 bytes; None for anything else.  Never raises."""
    try:
        value = STRICT.decode(str(data[3:] if data[:3] == codecs.BOM_UTF8 else data, "utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# --- 3.5 meter: what an answer cost, read while it passes --------------------

WHOLE_LIMIT = 32 * 1024 * 1024  # a JSON body beyond this is passed on unread
STREAM_LIMIT = 4 * 1024 * 1024  # one event of a stream beyond this, too
LONGEST_NAME, LONGEST_ERROR = 256, 500  # of a model or an id, of a message, as they are kept
HOLD_LIMIT = 64 * 1024  # a usage chunk is smaller
EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")
SOME_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*[^\]\s]')  # never in a chunk that carries only usage
ERROR_EVENT = re.compile(rb"^event: ?error\s*$", re.MULTILINE)
# What tells more than a token.
TELLING = re.compile(rb'"(?:usage|stats|error|response|(?:finish|stop)_reason"\s*:\s*")')


class Usage:
    """What is known of an answer.  Token counts that LM Studio did not give are None."""

    def __init__(self):
        self.prompt = self.completion = self.total = None
        self.cached = self.reasoning = None
        self.finish = self.model = self.error = None
        self.speed = None  # tokens a second and ms to the first token, as LM Studio reports them
        self.first_ms = None
        self.created = self.answer_id = None

    def take(self, body):
        """Learn from a body or a streamed event, and from the answer inside one."""
        for name in ("response", "result", "message"):
            if isinstance(body.get(name), dict):
                self._take_part(body[name])
        self._take_part(body)

    def _take_part(self, part):
        if part.get("error"):
            self._take_error(part["error"])
        self._take_identity(part)
        self._take_finish(part)
        usage, stats = part.get("usage"), part.get("stats")
        if isinstance(usage, dict):
            self._take_usage(usage)
        if isinstance(stats, dict):
            self._take_stats(stats)

    def _take_error(self, error):
        message = error.get("message") if isinstance(error, dict) else error
        self.error = tidy(str(message or error), LONGEST_ERROR)

    def _take_identity(self, body):
        model = body.get("model") or body.get("model_instance_id")
        if isinstance(model, str) and model:
            self.model = tidy(model)
        if isinstance(body.get("created"), int):
            self.created = body["created"]
        if isinstance(body.get("id"), str):
            self.answer_id = tidy(body["id"])

    def _take_finish(self, body):
        """Why it ended.  /v1/responses says so only where something cut it short."""
        reasons = [choice.get("finish_reason") for choice in listed(body.get("choices"))]
        reasons.append(body.get("stop_reason"))
        for name, field in (("delta", "stop_reason"), ("incomplete_details", "reason")):
            if isinstance(body.get(name), dict):
                reasons.append(body[name].get(field))
        for reason in reasons:
            if isinstance(reason, str):
                self.finish = tidy(reason)
                return

    def _take_usage(self, usage):
        """/v1/messages counts up: what it says last is the most."""
        prompt = count(usage, "prompt_tokens", "input_tokens", "inputTokens")
        if prompt is not None and "input_tokens" in usage and "total_tokens" not in usage:
            # Anthropic counts apart what comes from a cache and goes into it
            prompt += count(usage, "cache_read_input_tokens", default=0)
            prompt += count(usage, "cache_creation_input_tokens", default=0)
        completion = count(usage, "completion_tokens", "output_tokens", "outputTokens")
        self.prompt = prompt if self.prompt is None else max(self.prompt, prompt or 0)
        self.completion = completion if self.completion is None else max(self.completion, completion or 0)
        self.total = count(usage, "total_tokens", "totalTokens", default=self.total)
        self.cached = count(usage, "cache_read_input_tokens", default=self.cached)
        for name in ("prompt_tokens_details", "input_tokens_details"):
            if isinstance(usage.get(name), dict):
                self.cached = count(usage[name], "cached_tokens", default=self.cached)
        for name in ("completion_tokens_details", "output_tokens_details"):
            if isinstance(usage.get(name), dict):
                self.reasoning = count(usage[name], "reasoning_tokens", default=self.reasoning)

    def _take_stats(self, stats):
        """/api/v0 gives speeds in stats, /api/v1/chat its counts as well; times are in seconds."""
        self.prompt = count(stats, "input_tokens", default=self.prompt)
        self.completion = count(stats, "total_output_tokens", default=self.completion)
        self.reasoning = count(stats, "reasoning_output_tokens", default=self.reasoning)
        speed = usable(stats.get("tokens_per_second"))
        if speed is not None:
            self.speed = round(speed, 2)
        first = usable(stats.get("time_to_first_token", stats.get("time_to_first_token_seconds")))
        if first is not None:
            self.first_ms = round(1000 * first, 1)
        if isinstance(stats.get("stop_reason"), str) and not self.finish:
            self.finish = tidy(stats["stop_reason"])

    def tokens(self, dialect):
        """tokenUsage of the events; None when LM Studio gave no count.  Embeddings complete nothing."""
        if self.prompt is None and self.completion is None:
            return None
        completion, total = self.completion, self.total
        if completion is None and dialect is EMBEDDINGS:
            completion = 0
        if total is None and self.prompt is not None and completion is not None:
            total = self.prompt + completion
        return without_none(promptTokens=self.prompt, completionTokens=completion, totalTokens=total,
                       cachedTokens=self.cached, reasoningTokens=self.reasoning)


UNSAFE = 2**53  # from here on JavaScript and others round


def count(values, *names, default=None):
    """The first whole number among the values of those names."""
    for name in names:
        value = values.get(name)
        if type(value) is int and 0 <= value < UNSAFE:
            return value
    return default


def usable(value):
    """A figure of an answer; None for what is none, or so large that others would not read it as it is."""
    return value if type(value) in (int, float) and 0 <= value < UNSAFE else None


def tidy(text, length=LONGEST_NAME):
    """A text that a request or an answer brought, as it is kept: short, and such as UTF-8 can hold."""
    text = text[:length]
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class Meter:
    """Reads an answer while it passes.  feed() gives the bytes for the client, at once.

    With cut, the chunk that carries only the usage we asked for is taken out again; the beginning of an
    event is then held back as long as it may be that of such a chunk.  Once the first token is known, whole
    events without usage are read some at a time: a thread that was just woken takes several times as long for
    each.  All figures but first are right after settle() and end()."""

    PUT_OFF = 32  # pieces that may wait to be read

    def __init__(self, dialect, stream, cut=False, encoding=""):
        self.usage = Usage()
        self.stream, self.dialect = stream, dialect
        self._rest = bytearray()  # of a stream the event that has not ended, else the whole body
        self._decode = decoder(encoding)
        self._readable = self._decode is not None
        self._given = 0  # bytes of _rest that the client has, where it can no longer be what is cut out
        self._cut = cut and self._readable
        self._encode = encoder(encoding) if self._cut else None
        self.first = self.last = self._now = None  # clocks: first, latest token, piece
        self.pieces = 0  # events with a token
        self.waiting: list[tuple[bytes, float]] = []  # pieces that the client has, unread, with their clocks

    @property
    def can_wait(self):
        """True when a piece without usage that ends where an event ends may be passed on and put into
        waiting."""
        return self.first is not None and self._readable and not self._rest and self._decode is identity

    def feed(self, piece, now):
        """The bytes to pass on for the bytes that came at the clock reading now."""
        if not self._readable:
            return piece
        if self.can_wait and b'"usage"' not in piece and whole_event(piece):
            self.waiting.append((piece, now))
            if len(self.waiting) >= self.PUT_OFF:
                self.settle()
            return piece
        self.settle()
        self._now = now
        data = self._decode(piece) if self._decode is not identity else piece
        if data is None:
            self._readable = self._cut = False  # not what its Content-Encoding says: pass it on unread
            return piece
        if self.stream:
            kept = self._events(data)
            return self._encoded(kept) if self._cut else piece
        self._rest += data
        if len(self._rest) > WHOLE_LIMIT:
            self._readable = False
            self._rest.clear()
        return piece

    def settle(self):
        """Read the pieces that wait."""
        if not self.waiting:
            return
        data = b"".join([piece for piece, _ in self.waiting])
        clocks = []
        if self.usage.model and b"\r" not in data and not TELLING.search(data):
            search = self.dialect.token.search
            clocks = [clock for piece, clock in self.waiting if search(piece)]
        if len(clocks) == len(self.waiting) == data.count(b"\n\n"):     # a token each, and nothing else
            self.pieces += len(clocks)
            self.last = clocks[-1]
        else:
            for piece, clock in self.waiting:
                self._now = clock
                self._events(piece)
        self.waiting.clear()

    def end(self):
        """The answer is over.  Gives the bytes that were held back."""
        self.settle()
        rest = bytes(self._rest)
        self._rest.clear()
        ours = False
        if rest and self._readable and self.stream:
            ours = self._event(rest)
        elif rest and self._readable:
            self.usage.take(json_object(rest) or {})
        return self._encoded(b"" if ours else rest[self._given:], over=True) if self._cut else b""

    def _encoded(self, data, over=False):
        """What the client gets for data: compressed anew where LM Studio compresses."""
        if self._encode is None:
            return data
        return self._encode.compress(data) + self._encode.flush(zlib.Z_FINISH if over else zlib.Z_SYNC_FLUSH)

    def _events(self, data):
        """Read the events that data completes; give their bytes without those that were ours alone."""
        if not self._rest and whole_event(data):
            return b"" if self._event(data) and self._cut else data
        start, buffer = 0, data
        if self._rest:
            start = max(0, len(self._rest) - 4)     # what was searched is not searched again
            self._rest += data
            buffer = self._rest
        kept, position = [], 0
        for end in EVENT_END.finditer(buffer, start):
            event = bytes(buffer[position:end.end()])
            position = end.end()
            ours = self._event(event) and self._cut
            if not ours or self._given:
                kept.append(event[self._given:])
            self._given = 0
        if position or buffer is data:
            self._rest = bytearray(buffer[position:])
        if self._cut and self._rest and (self._given or not maybe_ours(self._rest)):
            kept.append(bytes(self._rest[self._given:]))
            self._given = len(self._rest)
        if len(self._rest) > STREAM_LIMIT:
            self._readable = False
            kept.append(bytes(self._rest[self._given:]))
            self._rest.clear()
        return b"".join(kept)

    def _event(self, event):
        """Learn from one event.  True when it is the usage-only chunk that a client may not have asked
        for."""
        if self.dialect.token.search(event):
            self.pieces += 1
            self.first, self.last = self.first or self._now, self._now
            if self.usage.model and not TELLING.search(event):
                return False    # most events of an answer: a token, and nothing else that is new
        data = event_data(event)
        body = json_object(data) or {}
        self.usage.take(body)
        if ERROR_EVENT.search(event) and not self.usage.error:
            self.usage.error = tidy(str(body.get("message") or str(data, "utf-8", "replace")), LONGEST_ERROR)
        return isinstance(body.get("usage"), dict) and body.get("choices") == []


def whole_event(data):
    """True for bytes that are one event from its beginning to its end, as most pieces of a stream are."""
    return data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data


def maybe_ours(beginning):
    """True while an event that begins so may become the chunk that carries only usage."""
    data = bytes(beginning[:HOLD_LIMIT])
    return (len(beginning) < HOLD_LIMIT and (b"data:".startswith(data) or data.startswith(b"data:"))
            and data[5:].lstrip()[:1] in (b"", b"{") and not SOME_CHOICE.search(data))


def event_data(event):
    """The data of one SSE event: its data lines, joined (WHATWG HTML, 9.2.6)."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def identity(data):
    return data


ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}     # zlib's wbits


def decoder(encoding):
    """A function that decodes pieces of a body of that Content-Encoding and gives None for one that
    is broken; None for an encoding that the standard library cannot read."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return identity
    if name not in ENCODINGS:
        return None
    inflater = zlib.decompressobj(ENCODINGS[name])

    def decode(data):
        try:
            decoded = inflater.decompress(data, WHOLE_LIMIT)
        except zlib.error:
            return None
        return None if inflater.unconsumed_tail else decoded    # nothing honest grows so much

    return decode


def encoder(encoding):
    """What compresses for that Content-Encoding; None where nothing is to be compressed."""
    bits = ENCODINGS.get(encoding.strip().lower())
    return zlib.compressobj(wbits=bits) if bits else None


# --- 3.6 request bodies: what LM Studio is asked -----------------------------

FINGERPRINT_LIMIT = 1024 * 1024  # bytes of a body; the log's copy of a longer one is cut itself
LOG_CUT = "... <Truncated in logs> ..."  # stands for the middle of a string of over about 120 UTF-16 units
LOG_KEEPS = 50  # UTF-16 units before and after it
PROMPT = ("messages", "input", "prompt", "system", "system_prompt", "instructions", "tools")
MEDIA = frozenset(("image_url", "source", "input_audio", "file", "data_url"))


class Asked(NamedTuple):
    """What a request body says."""

    model: str | None = None
    stream: bool = False
    messages: int | None = None
    fingerprint: Fingerprint | None = None
    size: int | None = None  # characters of its prompt; None if it has more than text
    tools: bool = False
    cut: bool = False  # usage was asked for on the client's behalf
    body: Any = None  # the bytes to send: the client's, or with the question for usage


def read_request(dialect, data):
    """The Asked of a request body.  A body that is not a JSON object is passed on untouched."""
    body = json_object(data) if data and len(data) <= WHOLE_LIMIT else None
    if body is None:
        return Asked(body=data)
    model, stream = body.get("model"), body.get("stream") is True
    options, messages = body.get("stream_options"), body.get("messages")
    amend = (stream and dialect.asks_usage
             and (options is None or isinstance(options, dict) and options.get("include_usage") is not True))
    return Asked(tidy(model) if isinstance(model, str) else None, stream,
                 len(messages) if dialect.counts_messages and isinstance(messages, list) else None,
                 fingerprint(body) if dialect.joined and len(data) <= FINGERPRINT_LIMIT else None,
                 text_size([body.get(name) for name in PROMPT]) if dialect.joined else None, bool(body.get("tools")),
                 amend, ask_usage(data, options) if amend else data)


def text_size(value):
    """Characters of all texts in JSON, roles and types aside; None if there are pictures or files."""
    sizes = [len(value)] if isinstance(value, str) and not value.startswith("data:") else []
    if isinstance(value, dict):
        sizes = [None if name in MEDIA else text_size(item) for name, item in value.items() if name not in ("role", "type")]
    elif isinstance(value, list):
        sizes = [text_size(item) for item in value]
    return None if None in sizes else sum(sizes)


def mark(value):
    """A hash of JSON in which each long string counts as the log shows it, so that a request and its logged
    copy have the same."""
    kind = type(value)
    if kind is str:
        return hash(shortened(value) if len(value) >= len(LOG_CUT) else value)
    if kind is dict:
        return hash(frozenset([(name, mark(item)) for name, item in value.items()]))
    if kind is list:
        return hash(tuple([mark(item) for item in value]))
    return hash(f"\0{int(value) if kind is float and value.is_integer() else value}")  # like no string


def shortened(text):
    """A string of a request body as the log shows it."""
    head, cut, tail = text.partition(LOG_CUT)
    if cut:
        return head + tail
    units = text.encode("utf-16-le", "surrogatepass")
    if len(units) <= 4 * LOG_KEEPS:
        return text
    return (units[:2 * LOG_KEEPS].decode("utf-16-le", "replace")
            + units[-2 * LOG_KEEPS:].decode("utf-16-le", "replace"))


class Fingerprint(NamedTuple):
    """Hashes of a request body: of what it asks, and of all its other members."""

    prompt: int
    rest: int


def fingerprint(body):
    """The Fingerprint of a request body; its copy in LM Studio's log has the same.  None where it asks
    nothing."""
    asked = {name: body[name] for name in ("messages", "input", "prompt", "system") if body.get(name)}
    rest = {name: value for name, value in body.items() if name not in asked and name != "stream_options"}
    try:
        return Fingerprint(mark(asked), mark(rest)) if asked else None
    except RecursionError:
        return None


def ask_usage(data, options):
    """The request with stream_options.include_usage, its other bytes as they are.  A bytearray is amended in
    place."""
    amended = data if isinstance(data, bytearray) else bytearray(data)
    asked = json.dumps({**(options or {}), "include_usage": True}).encode()
    place = place_of(amended)
    if place:
        amended[place] = asked
    else:
        end = amended.rindex(b"}")
        amended[end:end] = b',"stream_options":' + asked
    return amended


def place_of(data):
    """The slice where stream_options stand in a request that has them; None for none.  A text may hold the
    same words: the place is right where the request without the value lacks just that."""
    wanted = json_object(data) or {}
    if "stream_options" not in wanted:
        return None
    for match in re.finditer(rb'"stream_options"\s*:\s*', data):
        start = match.end()
        found = re.compile(rb"null|\{[^{}]*\}").match(data, start)
        if found and json_object(data[:start] + b"0" + data[found.end():]) == {**wanted, "stream_options": 0}:
            return slice(start, found.end())
    return None     # nested ones: what stands last in an object wins


# --- 3.7 records: the life of a request --------------------------------------

TIMELINE = 400  # events of one request that are kept
WAITING_SLOW_MS = 10_000  # a wait longer than this is marked; another phase if it takes twice its model's usual
OWN_EVENTS = frozenset(("inference_start", "inference_complete", "error"))
TELL_S = 0.25  # between two inference_progress of one request
SPEED_S = 0.25  # before that nothing can be said of how fast an answer is written
COUNT_S = 1.0  # between two that say how many tokens its answer has: each costs as much as ten pieces of it
STATES = ("waiting", "loading", "queued", "prompt", "generating")  # in the order in which they come
OUTCOMES = {"finished": "done", "disconnected": "abandoned", "error": "failed", "stopped": "failed",
            "forgotten": "failed"}  # of a chat -> state of its record


class Outcome(NamedTuple):
    """How a request ended.  state: done, failed or abandoned; meter: what read its answer."""

    state: str
    status: int | None = None
    error: str | None = None
    operation: str | None = None
    meter: Meter | None = None


class Record:
    """One request, from its arrival to its end: an HTTP request of a client, or (source "lmstudio") a chat
    that the log shows and that did not come through us.

    Hub's lock guards it once it has begun.  Clock readings are monotonic seconds."""

    def __init__(self, request_id, epoch, clock, **about):
        self.id, self.started, self.clock = request_id, epoch, clock
        self.source = "gateway"
        self.method = self.path = self.target = self.dialect = self.client = self.key = self.agent = None
        self.model_asked = self.messages = self.fingerprint = None
        self.stream = False
        self.model = None  # what answered, once an answer or the log has named it
        self.answer_id = None
        self.state, self.entered = "waiting", {"waiting": clock}  # state -> clock when it began
        self.status = self.ended = None
        self.usage = None  # tokenUsage
        self.first_ms = self.total_ms = self.speed = self.read_speed = self.overhead_s = None
        self.finish = self.error = self.operation = None
        self.percent = self.prompt_tokens = self.cache = self.context_size = self.sampling = None
        self.drafted = self.accepted = None  # tokens of a draft model, and those of them that were taken
        self.output = 0  # tokens so far
        self.output_since = None  # clock of the first of them
        self.timeline = []  # (ms after the start, event name, data)
        self.sent, self.heard = clock, clock  # when it went to LM Studio; the latest event of the log for it
        self.size, self.tools = None, False  # characters of its prompt; its answer can be a call of tools
        self.run: Any = None  # the OpenRun that it caused
        self.binding, self.bound_by = "none", None  # or "exact", and the numbers of the rules (3.8)
        self.begun = self.told_end = False  # its first and last line of the app have been found
        self.silent = False  # another prompt of its model has begun: if its client has left, it is read no further
        self.passed = None  # a request that was sent later has had its run since this clock
        self.usual = {}  # phase -> what it took lately on its model (ms)
        self.counted = {}  # tokens that the figures have, by kind
        self._base = None  # (clock, percent) from which the prompt's speed is measured
        self._told = -math.inf  # clock of the last inference_progress
        self.__dict__.update(about)

    # --- what happens to it

    first = property(lambda self: self.output_since)  # clock of its first token

    def enter(self, state, clock):
        """A phase begins, or is known later to have begun.  True if its state is another now."""
        later = STATES[STATES.index(state) + 1:]
        if self.ended is not None and clock >= self.ended or any(
                self.entered.get(name, math.inf) <= clock for name in later):
            return False
        self.entered[state] = min(clock, self.entered.get(state, clock))
        if self.ended is None and self.state not in (state, *later):
            self.state = state
            return True
        return False

    def note(self, event, clock):
        """One more event for its timeline."""
        if len(self.timeline) < TIMELINE or event.name in OWN_EVENTS:
            self.timeline.append((round(1000 * (clock - self.clock), 1), event.name, event.data))

    def take(self, event, clock):
        """An event of its chat.  True when listeners should hear of its progress."""
        self.note(event, clock)
        self.heard = clock
        before, lesson = self.state, LESSONS.get(event.name)
        if lesson is None:
            return False
        lesson(self, event.data, clock)
        return self.ended is None and (self.state != before or self.due(clock))

    def due(self, clock):
        """True when the last inference_progress is long enough ago."""
        return clock - self._told >= TELL_S

    def generated(self, tokens, first):
        """The answer has so many tokens now; the first came at the clock reading first."""
        self.enter("generating", first)
        self.output, self.output_since = tokens, first

    def on_start(self, data, clock):
        self.enter("queued", clock)

    def on_processing(self, data, clock):
        self.enter("prompt", clock)

    def on_generation(self, data, clock):
        self.enter("generating", clock)

    def on_sampling(self, data, clock):
        self.sampling = {name: value for name, value in data.items()
                         if name not in ("timestamp", "model", "requestId")}

    def on_progress(self, data, clock):
        self.enter("generating" if data["progress"] == 100 else "prompt", clock)
        self.percent = data["progress"]
        if self._base is None:
            cached = self.cache["percentage"] if self.cache else 0
            self._base = (clock, max(self.percent, cached if self.percent < 100 else 0))

    def on_cache(self, data, clock):
        self.cache = {name: data[name] for name in ("reused", "total", "percentage")}
        self.prompt_tokens = data["total"]
        if self.usage:
            self.usage = {**self.usage, "cachedTokens": data["reused"]}

    def on_tokens(self, data, clock):
        self.prompt_tokens = data.get("totalPromptTokens", self.prompt_tokens)
        self.context_size = data.get("n_ctx", self.context_size)

    def on_stats(self, data, clock):
        """The engine's own figures; where no answer brought usage, they are what the request has cost."""
        self.read_speed = data.get("promptTokensPerSecond", self.read_speed)
        self._split(data, clock)
        self.drafted, self.accepted = data.get("draftTokens"), data.get("acceptedDraftTokens")
        self.prompt_tokens = data.get("promptTokens", self.prompt_tokens)
        if self.speed is None or self.source == "lmstudio":
            self.speed = data.get("tokensPerSecond", self.speed)
        if self.first_ms is None:
            self.first_ms = data.get("timeToFirstTokenMs")
        if self.usage is None or self.usage.get("estimated"):
            known = {name: value for name, value in (self.usage or {}).items() if name != "estimated"}
            prompt = data.get("promptTokens", known.get("promptTokens"))
            completion = data.get("completionTokens")
            if completion is not None or "promptTokens" in data:
                self.usage = {**known, "promptTokens": prompt, "completionTokens": completion or 0,
                              "totalTokens": (prompt or 0) + (completion or 0), **self.cached_usage()}

    def _split(self, data, clock):
        """The engine's own times say when the prompt was read and the answer written."""
        if data.get("promptMs") is None or data.get("evalMs") is None:
            return
        over = min(clock, self.ended or clock)
        written = self.first if self.stream and self.first else over - data["evalMs"] / 1000
        read = max(written - data["promptMs"] / 1000, self.clock)
        self.entered.update(prompt=read, generating=max(written, read))
        if self.ended is None:
            self.state = "generating"

    def on_chat_end(self, data, clock):
        if self.source == "lmstudio" and self.ended is None:
            failed = data["outcome"] == "error"
            self.end(clock,
                     Outcome(OUTCOMES[data["outcome"]],
                             error=data["message"][:LONGEST_ERROR] if failed else None))

    def cached_usage(self):
        """The cached part of tokenUsage, {} where the log has not told it."""
        return {"cachedTokens": self.cache["reused"]} if self.cache else {}

    def end(self, clock, outcome):
        """It is over."""
        self.total_ms = round(1000 * (clock - self.clock), 1)
        self.status, self.error, self.operation = outcome.status, outcome.error, outcome.operation
        if outcome.meter:
            self._take_answer(outcome.meter, outcome.state == "done")
        self.ended, self.state = clock, outcome.state
        if self.usage is not None and self.usage.get("cachedTokens") is None:
            self.usage = {**self.usage, **self.cached_usage()}

    def _take_answer(self, meter, whole):
        """What the answer says goes before what the log said, and what was measured before an estimate.  An
        answer that broke off may have counted up to where it began (/v1/messages)."""
        usage = meter.usage
        self.model, self.finish = usage.model or self.model, usage.finish
        self.answer_id = usage.answer_id
        self.usage = usage.tokens(meter.dialect) or self.usage
        begun = not whole and usage.completion is not None and usage.completion < meter.pieces
        self.first_ms = self.first_ms if usage.first_ms is None else usage.first_ms
        if meter.first is not None:
            self.first_ms = round(1000 * (meter.first - self.clock), 1)
            self.generated(meter.pieces, meter.first)
            spent = meter.last - meter.first
            if usage.speed is None and usage.completion and spent > 0:
                self.speed = round((meter.pieces if begun else usage.completion) / spent, 2)
        self.speed = usage.speed or self.speed
        if meter.pieces and (self.usage is None or begun):
            prompt = {"totalTokens": usage.prompt + meter.pieces} if usage.prompt is not None else {}
            self.usage = {**(self.usage or {}), "completionTokens": meter.pieces, **prompt, "estimated": True}

    # --- what is shown of it

    def progress(self, clock):
        """What is known of a running request's progress, {} of nothing; speeds per second, etaMs in ms."""
        known: dict[str, Any] = {}
        if self.percent is not None:
            known["percent"] = self.percent
        if self.prompt_tokens is not None:
            known["promptTokens"] = self.prompt_tokens
            if self.percent is not None:
                known["promptTokensRead"] = round(self.prompt_tokens * self.percent / 100)
        percent, (since, base) = self.percent or 0, self._base or (clock, 0)
        if self.state == "prompt" and percent > base and clock > since:
            a_second = (percent - base) / (clock - since)  # percent
            known["etaMs"] = round(1000 * (100 - percent) / a_second)
            if self.prompt_tokens:
                known["promptTokensPerSecond"] = round(a_second * self.prompt_tokens / 100, 1)
        if self.output:
            known["outputTokens"] = self.output
            spent = clock - self.output_since   # since the first of them
            if self.output > 1 and spent >= SPEED_S:
                known["outputTokensPerSecond"] = round((self.output - 1) / spent, 1)
        return known

    def told(self, clock):
        """Where it is, in words: `prompt 41% eta 87s`."""
        known = self.progress(clock)
        percent = f" {known['percent']:.0f}%" if "percent" in known else ""
        left = f" eta {known['etaMs'] / 1000:.0f}s" if "etaMs" in known else ""
        return f"{self.state}{percent}{left}"

    def progress_event(self, now, clock):
        """inference_progress: its state for listeners."""
        self._told = clock
        return Event("inference_progress", {
            "timestamp": now, "requestId": self.id, **self.shown(clock), **self.progress(clock), **self.cached_usage(),
            **without_none(contextSize=self.context_size, contextUsed=self.context_used())})

    def context_used(self):
        """Tokens in the context, None when the prompt's are unknown."""
        prompt = self.used("promptTokens") or self.prompt_tokens
        return prompt and prompt + (self.used("completionTokens") or self.output)

    def context(self):
        used = self.context_used()
        if not self.context_size or not used:
            return None
        return {"size": self.context_size, "used": used,
                "percentage": round(100 * used / self.context_size, 1)}

    def phases(self, clock):
        """[{name, ms, slow}] in the order in which they were entered.  What nobody saw the parts of is answering."""
        starts = sorted(self.entered.items(), key=lambda item: (item[1], STATES.index(item[0])))
        ends = [start for _, start in starts[1:]] + [clock if self.ended is None else self.ended]
        spans = [(name, round(1000 * max(0.0, end - start), 1)) for (name, start), end in zip(starts, ends)]
        if self.ended is not None and "generating" not in self.entered and self.state == "done":
            spans[-1] = ("answering", spans[-1][1])
        return [{"name": name, "ms": ms, "slow": ms > (
            WAITING_SLOW_MS if name in ("waiting", "queued") else 2 * self.usual.get(name, math.inf))}
                for name, ms in spans]

    def used(self, field, otherwise=None):
        """A count of tokenUsage; where LM Studio gave none, what else is known."""
        found = (self.usage or {}).get(field)
        return otherwise if found is None else found

    def prompt_ms(self):
        """How long the prompt was read: from the engine's speed where it is known, else as it was seen."""
        fresh = (self.used("promptTokens") or 0) - (self.used("cachedTokens") or 0)
        return round(1000 * fresh / self.read_speed, 1) if self.read_speed else self._phase_ms("prompt")

    def generation_ms(self):
        """How long the answer was generated, in the same way."""
        tokens = self.used("completionTokens")
        return round(1000 * tokens / self.speed, 1) if self.speed and tokens else self._phase_ms("generating")

    def queued_ms(self):
        """How long it waited in LM Studio's queue; None where the log did not show that."""
        return self._phase_ms("queued")

    def _phase_ms(self, name):
        if name not in self.entered:
            return None
        return next((phase["ms"] for phase in self.phases(self.clock) if phase["name"] == name), None)

    def shown(self, clock):
        """The record as /debug/requests shows it."""
        elapsed = round(1000 * (clock - self.clock), 1) if self.total_ms is None else self.total_ms
        return {"requestId": self.id, "source": self.source, "method": self.method, "path": self.path,
                "model": self.model or self.model_asked, "modelAsked": self.model_asked,
                "stream": self.stream, "client": self.client, "key": self.key, "userAgent": self.agent,
                "state": self.state, "startedAt": utc_text(self.started), "elapsedMs": elapsed,
                "status": self.status, "totalTimeMs": self.total_ms, "timeToFirstTokenMs": self.first_ms,
                "tokensPerSecond": self.speed, "promptTokensPerSecond": self.read_speed,
                **self.token_usage(), "finishReason": self.finish, "error": self.error,
                "operation": self.operation, "binding": self.binding, "boundBy": self.bound_by,
                "progress": self.progress(clock) if self.ended is None else {}, "cache": self.cache,
                "context": self.context(), "phases": self.phases(clock),
                **without_none(draftTokens=self.drafted, acceptedDraftTokens=self.accepted)}

    def token_usage(self):
        """tokenUsage with its three counts, None where one is unknown; beside it those that only some answers
        and logs have."""
        if self.usage is None:
            return {"tokenUsage": None}
        beside = without_none(**{name: self.usage.get(name) for name in ("cachedTokens", "reasoningTokens")})
        counts = {name: self.usage.get(name) for name in ("promptTokens", "completionTokens", "totalTokens")}
        return {"tokenUsage": {**counts, **without_none(estimated=self.usage.get("estimated"))}, **beside}

    def start_event(self, now):
        return Event("inference_start", {
            "timestamp": now, "requestId": self.id, "method": self.method, "path": self.path,
            "model": self.model_asked, "stream": self.stream, "client": self.client, "key": self.key})

    def end_event(self, now):
        """The one event that ends it."""
        common = {"timestamp": now, "requestId": self.id, "status": self.status, "totalTimeMs": self.total_ms,
                  **self.token_usage(), "model": self.model or self.model_asked}
        if self.error is not None:
            return Event("error", {**common, "error": self.error, "operation": self.operation})
        return Event("inference_complete", {**common, "timeToFirstTokenMs": self.first_ms,
                                            "tokensPerSecond": self.speed, "finishReason": self.finish})


LESSONS = {  # what a record learns from the events of its chat
    "lmstudio_chat_start": Record.on_start,
    "lmstudio_sampling_params": Record.on_sampling,
    "lmstudio_token_info": Record.on_tokens,
    "lmstudio_cache_stats": Record.on_cache,
    "lmstudio_processing_start": Record.on_processing,
    "lmstudio_prompt_progress": Record.on_progress,
    "lmstudio_generation_start": Record.on_generation,
    "lmstudio_prediction_stats": Record.on_stats,
    "lmstudio_chat_end": Record.on_chat_end,
}


# --- 3.8 join: whose run and whose line it is ---------------------------------

LAG_S = 0.6  # a line is read at most so long after what it tells of, and an HTTP moment noted
FLUSH_S = 0.45  # a line is read at most so long after it was due
AT_ONCE_S = 0.06  # two lines that tell of one moment are read so close to each other
EXACT_S = 0.08  # how far a time can be off if the engine wrote it, and ...
SURE_READS = 6  # ... one of so many reads of its lines was not late
ITERATION_S = 0.003  # llama.cpp writes the lines of one batch within this
DRIFT = 2e-4  # seconds a second between two clocks
HTTP_S = 0.3  # what happens to an answer is noted here at most so much later
CLEAR_S = 0.3  # of two requests sent so far apart the first reaches the engine first ...
CLEAR_S_PER_CHARACTER = 1e-6  # ... and so much later if it is longer, for its template and its tokens
LATE_S = 10.0  # a request that is over can still be bound, and learn from its run, for so long
LEFT_LINE_S = 1.0  # LM Studio writes that a client has left within this
TWINS_S = 0.01  # ends so close to each other can be written in either order
OPEN_LIMIT = 512  # requests that are over and can still be bound
NAMES_KEPT = 1000  # models by the names that clients gave them
RUNS_OPEN = 200  # runs that are not bound, and their events
USUAL_KEPT = 50  # of each phase on a model, from which its usual time is known
SAME_SIZE = 1.2  # prompts of one kind have as many tokens for a character up to this factor
SIZES_KEPT = 20  # answers of a model from which its tokens for a character are learned
FORGOTTEN_S = 3600.0  # LM Studio's own is taken for over when the log has said nothing of it for so long
LINES_KEPT = 200  # last lines of chats that wait for their request's end
RESPONSES = "/v1/responses"  # it writes no start


class Logged(NamedTuple):
    """What the log's copy of a request tells; None where it does not."""

    path: str | None = None
    model: str | None = None
    stream: bool | None = None
    fingerprint: Fingerprint | None = None

    def may_be(self, record):
        """False if the copy is of another request."""
        prompts = [found and found.prompt for found in (self.fingerprint, record.fingerprint)]
        return (self.path in (None, record.target) and self.model in (None, record.model_asked)
                and self.stream in (None, record.stream) and (None in prompts or prompts[0] == prompts[1]))


def logged_request(logged):
    """The Logged of a LoggedRequest.  A body that is hidden or cut tells nothing beyond its path."""
    if logged is None:
        return Logged()
    body = prediction_of(logged.text)
    model = body.get("model")
    return Logged(logged.path.rstrip("/"), model if isinstance(model, str) else None,
                  body.get("stream") is True if body else None, fingerprint(body))


class Process:
    """An engine's process, known by its clock (G3).  offset turns that into ours; a line read late makes it too
    large for a while, and clocks may drift apart."""

    def __init__(self, offset, clock):
        self.offset, self.reads, self._latest = offset, 0, clock
        self.model: Any = None  # False once two were seen
        self._unread = []  # runs whose last batch is being read

    def see(self, run, fact, time):
        """A line of one run shows that the last batch of others, which were written before it, has been read."""
        for other in self._unread[:]:
            if other is not run and time > other.sampled + ITERATION_S:
                other.read_by = time
                self._unread.remove(other)
        if fact == "read" and run.read_by is None and run not in self._unread:
            self._unread.append(run)

    def takes(self, apart, clock):
        """True if a line is its own, by how far its clock is apart from ours."""
        if not -0.1 < apart - self.offset < 1.0:
            return False
        self.offset = min(apart, self.offset + DRIFT * (clock - self._latest))
        self.reads, self._latest = self.reads + (clock > self._latest), clock
        return True

    def learn(self, model):
        self.model = model if self.model in (None, model) else False


class OpenRun:
    """What the join knows of a run.  Its times are the process's if that is known, else those at which lines were
    read."""

    def __init__(self, number, chat):
        self.number, self.chat = number, chat
        self.process: Any = None
        self.launched: Any = None  # its first line
        self.active = self.reading = None  # the latest line that shows it at work, reading its prompt
        self.began = self.read = None  # its prompt began to be read, was read
        self.sampled = self.read_by = None  # its last batch is about to be read; it surely has been
        self.over = self.cancelled = None
        self.engine = self._model = self.total = self.written = self.epoch = self.slot = None
        self.in_app = False
        self.record: Any = None
        self.held = []  # [(event, clock)] until it is bound

    is_of_api = property(lambda self: self._model is not None)  # lines of the app are about it
    base = property(lambda self: self.process.offset if self.process else 0.0)  # its time to ours
    slack = property(lambda self: EXACT_S if self.process and self.process.reads >= SURE_READS else FLUSH_S)

    @property
    def model(self):
        return self._model or self.process and self.process.model or None

    @model.setter
    def model(self, model):
        self._model = model
        if self.process:
            self.process.learn(model)

    def learn(self, fact, about, time):
        """Take in one fact of its engine, of its own time."""
        self.total, self.slot = about.get("total") or self.total, about.get("slot", self.slot)
        if fact == "launch":
            self.engine, self.epoch, self.launched = about["engine"], about["epoch"], time
        elif fact == "over":
            self.over, self.written, self.in_app = time, about["written"], not about["api"]
        elif fact == "cancel":
            self.cancelled = time
        elif fact == "model":
            self.model = about["model"]
        if self.launched is None:
            self.launched = time
        if fact in ("launch", "prompt", "reading", "read"):
            self.active = time
        if fact == "prompt":
            self.began = time
        if fact in ("prompt", "reading") or fact == "read" and about.get("total"):  # before its last batch
            self.reading = time
        if fact == "read":
            self.sampled = self.sampled or time
        if self.process:
            self.process.see(self, fact, time)

    def phases(self, readings):
        """(state, clock of ours) that its lines show; readings: those of its model, one of which can be its."""
        same = next((end for begin, end in readings if self.engine == "MLX" and self.began is not None
                     and -AT_ONCE_S < begin - self.began < FLUSH_S), None)
        for state, time in (("prompt", self.began), ("generating", self.read or self.sampled or same)):
            if time is not None:
                yield state, time + self.base


class Requests:
    """Every request, the runs and lines of the log, and which belong together.

    A run is bound to a request if it fits no other request and that request fits no other run.  These hard
    facts rule a request out for a run:

      1. It was sent after the run's first line was read.
      2. The run was seen at work well after its answer had ended.
      3. LM Studio serves its model under another name than the run's.
      4. Its prompt is too long or too short for the run's tokens, by what answers of its model have shown.
      5. Its first token came while the run still read its prompt, or not when the run had read it.
      6. Its usage has other counts.
      7. It goes on although the run is over, or the run is over well before or after it.
      8. The run was cancelled and its client did not leave, nor did it fail.
      9. A request of its model that was clearly sent before it has no run yet; or a later one has been bound.

    A run also is a request's if both counts of its usage and its end are the run's, and no other's (10).
    A run that no request fits is LM Studio's own: a chat inside the app or of a client beside us.

    A line of the app that surely is a run's (3.3) goes with the run.  Other lines:

     11. A chat's start: the one request with that fingerprint, else the one that has no start yet.
     12. Progress: the one request of its model that can go on to this percent.
     13. An end: the request that ended in that way then; of several the first, as LM Studio writes them in order.
     14. An answer: the request whose answer has that id, or alone has these counts.

    What is open is published without an id and held; once it is certain the request's record takes it in with
    its own clocks.  Nothing that was published is taken back.  Hub's lock guards all of it."""

    def __init__(self, epoch, keep):
        self._epoch = epoch
        self.running = {}  # id -> Record, of both sources, oldest first
        self.finished: deque[Record] = deque(maxlen=keep)
        self.total = self.errors = 0  # requests that came through us
        self.bindings: Counter[str] = Counter()  # of requests that are over for good: exact, none
        self.changed = []  # records that changed after their end, until somebody takes them
        self.told = {}  # id -> Record of which listeners should hear
        self._open = {}  # id -> Record that can still be bound, or learn
        self._runs: dict[int, OpenRun] = {}
        self._own = {}  # chat number -> Record of LM Studio's own
        self._lines: deque[tuple] = deque(maxlen=LINES_KEPT)  # (event, clock): ends that wait for their request's
        self._names = {}  # model asked for -> model that answered
        self._sizes = {}  # model asked for -> tokens for a character, of its latest answers
        self._usual = {}  # model -> phase -> deque of ms
        self._processes: deque[Process] = deque(maxlen=8)
        self._readings = {}  # model -> [[clock of 0 %, clock of 100 %]] of its latest prompts
        self._numbers = itertools.count(1)
        self._swept = 0.0  # clock of the last _expire

    # --- the HTTP side

    def begin(self, record):
        """A request goes to LM Studio."""
        self.running[record.id] = record
        record.usual = {name: median(times) for name, times in
                        self._usual.get(record.model_asked, {}).items()}
        if record.dialect in JOINED:
            self._open[record.id] = record
        self.total += 1

    def over(self, record, clock, outcome):
        """A request is over.  False when it was over before."""
        if self.running.pop(record.id, None) is None:
            return False
        record.end(clock, outcome)
        self.finished.append(record)
        self.changed.append(record)
        self.errors += record.error is not None
        self._learn(record)
        self.settle(clock)
        return True

    def _learn(self, record):
        if record.model and record.model_asked and len(self._names) < NAMES_KEPT:
            self._names.setdefault(record.model_asked, record.model)
        if record.state == "done" and len(self._usual) < NAMES_KEPT:
            usual = self._usual.setdefault(record.model_asked, {})
            for phase in record.phases(0.0):
                usual.setdefault(phase["name"], deque(maxlen=USUAL_KEPT)).append(phase["ms"])
        if has_counts(record) and record.run is None:
            self._learn_size(record, record.used("promptTokens"))

    def _learn_size(self, record, total):
        if total and record.size and len(self._sizes) < NAMES_KEPT:
            for model in (record.model_asked, None):  # None: of all models
                self._sizes.setdefault(model, deque(maxlen=SIZES_KEPT)).append(total / record.size)

    def bound(self):
        """How the requests that are over were bound, as far as is known by now."""
        late = Counter(record.binding for record in self._open.values() if record.ended is not None)
        return {binding: self.bindings[binding] + late[binding] for binding in ("exact", "none")}

    def find(self, request_id):
        """A record by its id, or None."""
        return self.running.get(request_id) or next(
            (record for record in self.finished if record.id == request_id), None)

    # --- the log's side

    def see(self, events, clock):
        """Take the log's events in, and write requestId into those that surely are a request's of ours.

        Gives the records of which listeners should hear; clock: monotonic seconds."""
        for event in events:
            if event.name == "lmstudio_prompt_progress":
                self._see_reading(event.data, clock)
            if event.name == "lmstudio_log":
                self._see_entry(event, clock)
            elif event.run is not None:
                self._see_run(event, clock)
            elif event.name in LINES:
                self._give(LINES[event.name](self, event, clock), event, clock)
        self.settle(clock)
        told, self.told = list(self.told.values()), {}
        return told

    def _see_entry(self, event, clock):
        """An entry carries the id that an event of its line has, and may announce the loading of a model."""
        about = event.about or {}
        found = next((told.data["requestId"] for told in about.get("told") or ()
                      if told.name in LINES_OF_ENTRIES and "requestId" in told.data), None)
        if found:
            event.data["requestId"] = found
        for record in self._open.values() if about.get("loads") else ():
            if record.model_asked == about["loads"]:
                record.enter("loading", clock)

    def _see_reading(self, data, clock):
        if len(self._readings) < NAMES_KEPT:
            readings = self._readings.setdefault(data.get("model"), deque(maxlen=SIZES_KEPT))
            if data["progress"] == 0:
                readings.append([clock, None])
            elif data["progress"] == 100 and readings:
                readings[-1][1] = clock

    def _see_run(self, event, clock):
        run = self._runs.get(event.run) or self._runs.setdefault(event.run, OpenRun(event.run, event.chat))
        run.chat = event.chat
        if event.name == "":
            run.learn(event.about["fact"], event.about, self._time_of(run, event.about["clock"], clock))
            if run.record is None:
                self.settle(clock)
            else:
                self._enter(run)
            self._end_own(run, clock)
            return
        if event.name == "lmstudio_generation_start":
            run.read = run.read or clock - run.base
        elif event.name == "lmstudio_prompt_progress" and event.data["progress"] < 100:
            run.reading = run.active = clock - run.base
        if "model" in event.data:
            run.model = event.data["model"]
        if run.record:
            self._give(run.record, event, clock)
        else:
            run.held.append((event, clock))

    def _time_of(self, run, stamp, clock):
        """The time of an engine's line: by the engine's own clock (minutes.seconds.ms.us) if it wrote one."""
        if not stamp:
            return clock - run.base
        minutes, *parts = map(int, stamp.split("."))
        time = 60 * minutes + parts[0] + parts[1] / 1e3 + parts[2] / 1e6
        if run.process is None or not run.process.takes(clock - time, clock):
            run.process = next((known for known in self._processes if known.takes(clock - time, clock)), None)
            if run.process is None:
                run.process = Process(clock - time, clock)
                self._processes.append(run.process)
        return time

    def _enter(self, run):
        """The phases of a request that its run's lines show; a stream's first token is seen better here."""
        for state, clock in run.phases(self._readings.get(run.record.model, ())):
            if state == "prompt" or not run.record.stream:
                self._show(run.record, run.record.enter(state, clock))

    def _give(self, record, event, clock):
        """An event is a record's."""
        if record is None:
            return
        if record.source == "gateway":
            event.data["requestId"] = record.id
        self._show(record, record.take(event, clock))
        if record.ended is not None:
            self.changed.append(record)
            if record.id in self.running:  # LM Studio's own, and over
                self._own_over(record)

    def _show(self, record, news):
        if news and record.ended is None:
            self.told[record.id] = record

    # --- runs

    def settle(self, clock):
        """Bind what has become certain by now."""
        again = True
        while again:
            again = False
            open_runs = [run for run in self._runs.values() if run.record is None and (
                run.total or run.over is not None or run.cancelled is not None)]
            free = [record for record in self._open.values() if record.run is None]
            fits = {run: [record for record in free if not self._ruled_out(run, record, clock)] for run in open_runs}
            self._compare_sizes(fits)
            wanted = Counter(record.id for records in fits.values() for record in records)
            for run, records in fits.items():
                records = [record for record in records if not self._overtakes(run, record, clock)]
                record = self._proven(run, records, fits) or only([
                    record for record in records if self._is_certain(run, record, len(records), wanted[record.id])])
                if record:
                    self._bind(run, record, free, clock)
                    again = True
                    break
                if not fits[run]:
                    self._take_as_own(run, clock)
        self._match_lines(clock)
        if clock - self._swept > 1.0 or len(self._open) > 2 * OPEN_LIMIT:  # also when no log is followed
            self._expire(clock)

    @staticmethod
    def _is_certain(run, record, records, runs):
        """True if a run fits so many requests, and this one so many runs, that it is this one's.  Before its usage is
        known a line of the app has to be about the run, which it can't be for a chat inside the app."""
        if runs == 1 and has_counts(record):
            return True
        near = run.cancelled is not None and abs(run.cancelled + run.base - (record.ended or 0)) < FLUSH_S
        return records == 1 and (near or runs == 1 and run.is_of_api)

    def _ruled_out(self, run, record, clock):
        """The number of the rule by which a run is not a request's; 0 if it can be."""
        done, left = record.state == "done", record.state in LEFT
        now, slack = clock - run.base, run.slack
        ended = None if record.ended is None else record.ended - run.base
        if record.sent - run.base > run.launched:
            return 1
        if ended is not None and not left and ended < run.active - slack:
            return 2
        served = record.model or self._names.get(record.model_asked)
        if run.model and served and run.model != served:
            return 3
        if self._other_size(run, record):
            return 4
        if record.stream and self._other_first(run, record, now):
            return 5
        if self._other_usage(run, record):
            return 6
        if run.cancelled:
            before = run.cancelled - (now if ended is None else ended)
            return 8 if done or before < (-0.3 if ended is None else -0.1) or not left and before > slack else 0
        if run.over and (now > run.over + LAG_S if ended is None else
                         ended > run.over + HTTP_S or not left and ended < run.over - slack - AT_ONCE_S):
            return 7
        if run.over is None and done and run.engine not in UNTIMED and now > ended + LAG_S:
            return 7
        return 9 if record.passed is not None and run.launched + run.base > record.passed else 0

    def _other_size(self, run, record):
        """4: learned from answers; how far they lie apart says how far a run's tokens may."""
        known, slack = self._sizes.get(record.model_asked), 1.05
        if not known:  # by those of other models, whose tokens can be longer or shorter
            known, slack = self._sizes.get(None), 1.3
        if not known or not run.total or not record.size:
            return False
        usual = median(known)
        slack *= max(1.07, max(known) / usual, usual / min(known)) * (1 + 0.1 / len(known))
        return not 1 / slack < run.total / (usual * record.size) < slack

    def _compare_sizes(self, fits):
        """4, if nothing has been learned yet: by the ratio of a pair each other prompt has a request, too."""
        runs = [run for run in fits if run.total and run.is_of_api]
        if self._sizes or not 1 < len(runs) <= 8:
            return

        def is_possible(ratio, rest, taken):
            return not rest or any(
                1 / SAME_SIZE < rest[0].total / (ratio * record.size) < SAME_SIZE and
                is_possible(ratio, rest[1:], {*taken, record.id})
                for record in fits[rest[0]] if record.size and record.id not in taken)

        kept = {run: [record for record in fits[run] if record.size and is_possible(
            run.total / record.size, [other for other in runs if other is not run], {record.id})] for run in runs}
        if all(kept.values()):
            fits.update(kept)

    @staticmethod
    def _other_first(run, record, now):
        """5: an answer of tool calls begins late, so its first token says less."""
        slack = run.slack
        read_by = [time + HTTP_S for time in (run.read, run.read_by) if time is not None]
        if record.first is None:
            return read_by and not record.tools and now > min(read_by) + LAG_S
        first = record.first - run.base
        return (first < max(run.launched, run.reading or 0, (run.sampled or 0)) - slack
                or run.read is not None and first < run.read - FLUSH_S
                or read_by and not record.tools and first > min(read_by))

    @staticmethod
    def _other_usage(run, record):
        """MLX counts one token of the prompt less, G1 one of the answer more or less."""
        if not has_counts(record):
            return False
        counts = ((run.total, record.used("promptTokens"), run.engine not in ("G2", "G3")),
                  (run.written, record.used("completionTokens"), run.engine == "G1"))
        return any(None not in (told, used) and abs(told - used) > slack for told, used, slack in counts)

    def _overtakes(self, run, record, clock):
        """9: a request that was clearly sent before this one has no run yet."""
        for other in self._open.values():
            if (other is not record and other.run is None and other.ended is None
                    and other.model_asked == record.model_asked and self._is_clearly_before(other, record)
                    and not any(earlier.record is None and earlier.number < run.number
                                and not self._ruled_out(earlier, other, clock) for earlier in self._runs.values())):
                return True
        return False

    @staticmethod
    def _is_clearly_before(one, other):
        longer = max(0, (one.size or 0) - (other.size or 0))
        return one.sent < other.sent - CLEAR_S - CLEAR_S_PER_CHARACTER * longer

    @staticmethod
    def _proven(run, records, fits):
        """10: both counts and the end are the request's, and no other's."""
        def same(one, record):
            return one.over and has_counts(record) and (one.total, one.written) == (record.used("promptTokens"), record.used("completionTokens"))
        mine = [record for record in records if same(run, record)]
        if len(mine) != 1 or sum(bool(same(other, mine[0])) for other in fits if mine[0] in fits[other]) != 1:
            return None
        return mine[0]

    def _bind(self, run, record, free, clock):
        others = [other for other in self._open.values() if other is not record]
        rules = {self._ruled_out(run, other, clock) or 9 for other in others if other in free}
        run.record, record.run, record.binding = record, run, "exact"
        record.bound_by = ", ".join(map(str, sorted(rules))) or "alone"
        for other in others:
            if other.run is None and other.ended is not None and self._is_clearly_before(other, record):
                other.passed = run.launched + run.base
        if run.model:
            record.model = record.model or run.model
        self._learn_size(record, run.total)
        self._enter(run)
        before = record.state
        for event, seen in run.held:
            self._show(record, record.take(event, seen))
        run.held = []
        record.timeline.sort(key=lambda row: row[0])
        self._show(record, record.state != before)
        if record.ended is not None:
            self.changed.append(record)

    # --- LM Studio's own

    def _take_as_own(self, run, clock):
        chat = run.chat if run.chat in self._own else -run.number
        run.record = self._own_record(chat, run.launched + run.base, run.epoch)
        if run.record.run is None:
            run.record.run = run
        for event, seen in run.held:
            self._give(run.record, event, seen)
        run.held = []
        self._end_own(run, clock)

    def _own_record(self, chat, clock, started, **about):
        record = self._own.get(chat)
        if record is None:
            record = self._own[chat] = Record(f"log_{self._epoch}{next(self._numbers):06x}", started, clock,
                                              source="lmstudio", **about)
            self.running[record.id] = record
        return record

    def _end_own(self, run, clock):
        """A chat inside the app has no line for its end."""
        record = run.record
        if record and record.source == "lmstudio" and record.ended is None and (run.in_app and run.over or run.cancelled):
            record.end(clock, Outcome("abandoned" if run.cancelled else "done"))
            self._own_over(record)

    def _own_over(self, record):
        if self.running.pop(record.id, None):
            self.finished.append(record)
        self.changed.append(record)

    # --- lines of the app that name no run

    def _of_model(self, event):
        """The requests that a line of its model can mean, as far as the model tells."""
        model = event.data.get("model")
        for record in self._open.values():
            served = record.model or self._names.get(record.model_asked)
            if None in (model, served) or model == served:
                yield record

    def _line_of_start(self, event, clock):
        """11."""
        data, logged = event.data, (event.about or {}).get("logged")
        copy = logged_request(logged)
        if data.get("model"):
            self._names.setdefault(data["model"], data["model"])
        found = [record for record in self._of_model(event) if not record.begun and record.target != RESPONSES
                 and record.messages in (None, data["messages"])
                 and (record.ended is None or clock - record.ended < LAG_S) and copy.may_be(record)]
        same = [record for record in found if copy.fingerprint and record.fingerprint == copy.fingerprint]
        record = same[0] if len(same) == 1 else found[0] if len(found) == 1 else None
        if record:
            record.begun = True
            record.model = record.model or data.get("model")
        elif not found:
            record = self._own_record(event.chat, clock, epoch_of(data["timestamp"]), messages=data["messages"],
                                      model=data.get("model"))
        return record

    def _line_of_progress(self, event, clock):
        """12."""
        percent = event.data.get("progress", 0 if event.name == "lmstudio_processing_start" else 100)
        own = self._own.get(event.chat)
        found = [record for record in self._of_model(event) if not (record.silent and record.state in LEFT)
                 and (record.percent is None or record.percent < percent or record.percent == percent < 100
                      or event.name == "lmstudio_generation_start" and record.heard == clock)
                 and (record.ended is None or record.state == "abandoned" or clock - record.ended < LAG_S)
                 and not (record.first and percent < 100 and record.first < clock - LAG_S)
                 and not (record.run and (record.run.over or record.run.cancelled))]
        model = event.data.get("model")
        if own or any(record.model == model and record.ended is None and clock - record.heard < LATE_S
                      for record in self._own.values()):
            return own if own and not found else None
        if model and not any(self._of_model(event)):
            return self._own_record(event.chat, clock, epoch_of(event.data["timestamp"]), model=model)
        others = [run for run in self._runs.values() if run.over is None and run.cancelled is None
                  and run.engine not in UNTIMED and (len(found) != 1 or run is not found[0].run)]
        if len(found) != 1 or model is None or len(others) > (found[0].run is None):
            return None  # a percent of its own names its run (3.3)
        for record in self._of_model(event) if percent == 0 else ():
            record.silent = record is not found[0]  # another prompt begins
        self._mark(found[0], "12")
        return found[0]

    def _line_of_end(self, event, clock):
        """13 and 14, when the request's own end is known."""
        if event.chat in self._own:
            return self._own[event.chat]
        self._lines.append((event, clock))
        self._match_lines(clock)
        return None

    def _match_lines(self, clock):
        lines, self._lines = self._lines, deque(maxlen=LINES_KEPT)
        while lines:
            event, seen = lines.popleft()
            alike = 1 + sum(other.data == event.data for other, _ in (*lines, *self._lines))
            record = self._match_line(event, seen, clock, alike)
            if record:
                record.told_end = record.told_end or event.name == "lmstudio_chat_end"
                self._mark(record, "13" if event.name == "lmstudio_chat_end" and "counts" not in event.about else "14")
                self._give(record, event, seen)
            elif clock - seen < LAG_S:
                self._lines.append((event, seen))

    def _match_line(self, event, seen, clock, alike):
        """The request that a last line is of, None while that is open.  Of requests that ended at once each can have
        any of as many lines that are alike."""
        about, data = event.about or {}, event.data
        if event.name == "lmstudio_prediction_stats":  # 14, of an answer without a run
            counts = data.get("promptTokens"), data.get("completionTokens")
            return only([record for record in self._of_model(event) if record.state == "done" and record.run is None
                         and counts == (record.used("promptTokens"), record.used("completionTokens"))
                         and abs(record.ended - seen) < LAG_S])
        answer, wanted = "counts" in about, ENDS[data["outcome"]]
        found = [record for record in self._of_model(event) if not record.told_end
                 and (record.state in wanted or record.ended is None)
                 and (record.ended is None or seen - max(LAG_S, LEFT_LINE_S * (wanted is LEFT)) < record.ended < seen + 0.1)
                 and (data["outcome"] != "finished" or record.stream != answer)]
        if answer:
            same = [record for record in self._open.values()
                    if about["answer_id"] and record.answer_id == about["answer_id"]]
            counts = about["counts"].get("promptTokens"), about["counts"].get("completionTokens")
            found = same or [record for record in found if record.ended is None or counts == (None, None)
                             or counts == (record.used("promptTokens"), record.used("completionTokens"))]
        ended = sorted((record for record in found if record.ended is not None), key=lambda record: record.ended)
        if len(found) == 1 and (ended or clock - seen < 0.1):
            return ended[0] if ended else None
        twins = [record for record in ended if record.ended - ended[0].ended < TWINS_S]
        return ended[0] if clock - seen > 0.15 and 0 < len(twins) <= alike else None

    def _mark(self, record, rule):
        if record.binding == "none":
            record.binding, record.bound_by = "exact", rule

    # --- afterwards

    def _expire(self, clock):
        """Requests that are over for good are counted and forgotten, and runs with them."""
        self._swept = clock
        surplus = len(self._open) - OPEN_LIMIT
        for number, record in enumerate(list(self._open.values())):
            if record.ended is not None and (clock - record.ended > LATE_S or number < surplus):
                del self._open[record.id]
                self.bindings[record.binding] += 1
                record.run = None
        for number, run in list(self._runs.items()):
            if (run.over or run.cancelled) and clock - run.base - max(run.over or 0, run.cancelled or 0) > LATE_S or (
                    len(self._runs) > RUNS_OPEN):
                del self._runs[number]
        for chat, record in list(self._own.items()):
            if record.ended is None and clock - record.heard > FORGOTTEN_S:
                record.end(clock, Outcome("done"))
                self._own_over(record)
            if record.ended is not None and clock - record.ended > LATE_S:
                del self._own[chat]


def epoch_of(text):
    """Epoch seconds of a time such as 2025-11-17T10:59:23Z."""
    return datetime.datetime.fromisoformat(text[:-1] + "+00:00").timestamp()


def has_counts(record):
    """True for an answer whose usage LM Studio has told."""
    return record.state == "done" and record.usage is not None and not record.usage.get("estimated")


def median(values):
    """The value in the middle, of an even number the larger one."""
    return sorted(values)[len(values) // 2]


def only(rows):
    """The one row, None of none or several."""
    return rows[0] if len(rows) == 1 else None


LEFT = ("abandoned", "stopped")
ENDS = {"finished": ("done",), "disconnected": LEFT, "error": ("failed",)}  # of a chat -> states of its request
LINES_OF_ENTRIES = frozenset(("lmstudio_chat_start", "lmstudio_prompt_progress"))
LINES = {"lmstudio_chat_start": Requests._line_of_start, "lmstudio_prompt_progress": Requests._line_of_progress,
         "lmstudio_processing_start": Requests._line_of_progress, "lmstudio_generation_start": Requests._line_of_progress,
         "lmstudio_chat_end": Requests._line_of_end, "lmstudio_prediction_stats": Requests._line_of_end}


# --- 3.9 figures: what is counted --------------------------------------------

DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640,
              1280)  # a home prefill takes minutes
A_SECOND = (1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 5000)
A_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
OVERHEAD_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
SERIES = 500  # of one metric; what comes beyond them is counted as "other"
MODELS = 100  # names of models that become labels


class Metric(NamedTuple):
    """One Prometheus metric.  A counter's name ends in _total; buckets are a histogram's."""

    name: str
    kind: str
    labels: tuple
    about: str
    buckets: tuple = ()


# Names and meanings: lmstudio_* is all that the log or LM Studio's REST API tells, whoever asked, with
# lmstudio-exporter's names; lmstudio_gateway_* is what passed through us.  Base units, ratios from 0 to 1.
METRICS = (
    Metric("lmstudio_up", "gauge", (), "1 when LM Studio answered when last asked"),
    Metric("lmstudio_loaded_models", "gauge", (), "Models that are loaded; absent when unknown"),
    Metric("lmstudio_model_loaded", "gauge", ("model", "type"), "1 for a model that is loaded"),
    Metric("lmstudio_model_context_length_tokens", "gauge", ("model", "type"),
           "Context with which it is loaded"),
    Metric("lmstudio_requests_total", "counter", ("model",), "Predictions that the log shows finished"),
    Metric("lmstudio_input_tokens_total", "counter", ("model",), "Prompt tokens of them"),
    Metric("lmstudio_output_tokens_total", "counter", ("model",), "Generated tokens of them"),
    Metric("lmstudio_reasoning_tokens_total", "counter", ("model",), "Those of them that are reasoning"),
    Metric("lmstudio_accepted_draft_tokens_total", "counter", ("model",), "Draft tokens that were taken"),
    Metric("lmstudio_cached_input_tokens_total", "counter", ("model",),
           "Prompt tokens reused from the cache"),
    Metric("lmstudio_cache_resets_total", "counter", ("model",),
           "Prompts read wholly anew although a part was cached"),
    Metric("lmstudio_time_to_first_token_seconds", "histogram", ("model",), "As the log has it", DURATION_S),
    Metric("lmstudio_prompt_eval_seconds", "histogram", ("model",), "Time to read the prompt", DURATION_S),
    Metric("lmstudio_generation_seconds", "histogram", ("model",), "Time to generate the answer", DURATION_S),
    Metric("lmstudio_prompt_tokens_per_second", "histogram", ("model",), "Speed of reading", A_SECOND),
    Metric("lmstudio_tokens_per_second", "histogram", ("model",), "Speed of generating", A_SECOND),
    Metric("lmstudio_prompt_progress_ratio", "gauge", ("model", "slot"),
           "How much of a prompt has been read"),
    Metric("lmstudio_log_lines_total", "counter", ("dialect",),
           "Engine lines recognised, by engine generation"),
    Metric("lmstudio_log_entries_total", "counter", ("event",), "Events made of the log"),
    Metric("lmstudio_log_unparsed_entries_total", "counter", (), "Lines that no rule knows"),
    Metric("lmstudio_log_bytes_read_total", "counter", (), "Bytes of log read"),
    Metric("lmstudio_log_rotations_total", "counter", ("reason",), "Changes to another log file"),
    Metric("lmstudio_log_read_lag_bytes", "gauge", (), "Bytes written and not yet read"),
    Metric("lmstudio_log_last_entry_timestamp_seconds", "gauge", (), "Time of the latest log entry"),
    Metric("lmstudio_log_directory_bytes", "gauge", (), "Size of the log directory"),
    Metric("lmstudio_log_filesystem_free_bytes", "gauge", (), "Room left on its file system"),
    Metric("lmstudio_gateway_requests_total", "counter", ("key", "model", "endpoint", "code"),
           "Inference requests that are over; code 0 without an answer"),
    Metric("lmstudio_gateway_tokens_total", "counter", ("key", "model", "type"),
           "Their tokens: input, output, cached_input, reasoning"),
    Metric("lmstudio_gateway_request_duration_seconds", "histogram", ("endpoint", "model", "stream"),
           "From arrival to end", DURATION_S),
    Metric("lmstudio_gateway_time_to_first_token_seconds", "histogram", ("model",),
           "From arrival to the first content, reasoning or tool call", DURATION_S),
    Metric("lmstudio_gateway_time_per_output_token_seconds", "histogram", ("model",),
           "Between tokens of a stream, at the mean", A_TOKEN_S),
    Metric("lmstudio_gateway_queue_seconds", "histogram", ("key_priority",),
           "Time in LM Studio's queue, where the log shows it; keys have one priority", DURATION_S),
    Metric("lmstudio_gateway_overhead_seconds", "histogram", (),
           "From a request's last byte to its first byte to LM Studio", OVERHEAD_S),
    Metric("lmstudio_gateway_requests_in_flight", "gauge", ("model",), "Requests that are running"),
    Metric("lmstudio_gateway_requests_queued", "gauge", ("model",), "Those that wait in LM Studio's queue"),
    Metric("lmstudio_gateway_client_disconnects_total", "counter", ("phase",),
           "Clients that left: queued, prefill, decode"),
    Metric("lmstudio_gateway_rejected_total", "counter", ("reason",), "Requests turned away here"),
    Metric("lmstudio_gateway_upstream_errors_total", "counter", ("kind",),
           "refused, timeout, reset, bad_status, error_in_200"),
    Metric("lmstudio_gateway_sse_clients", "gauge", (), "Listeners of /debug/stream"),
    Metric("lmstudio_gateway_sse_events_total", "counter", ("type",), "Events published"),
    Metric("lmstudio_gateway_sse_dropped_total", "counter", ("reason",), "Events that slow listeners lost"),
    Metric("lmstudio_gateway_sse_replays_total", "counter", ("result",),
           "Listeners that came back: full, gap"),
    Metric("lmstudio_gateway_correlated_total", "counter", ("result",),
           "Requests joined with the log: exact, likely, none"),
    Metric("lmstudio_gateway_build_info", "gauge", ("version", "python"), "1"),
    Metric("process_start_time_seconds", "gauge", (), "When this gateway started"),
)
METRIC = {metric.name: metric for metric in METRICS}
PHASES = {"waiting": "queued", "loading": "queued", "queued": "queued", "prompt": "prefill",
          "generating": "decode"}
UPSTREAM_KINDS = {"upstream_unreachable": "refused", "upstream_timeout": "timeout", "upstream_reset": "reset"}
TOKEN_KINDS = {"input": "promptTokens", "output": "completionTokens", "cached_input": "cachedTokens",
               "reasoning": "reasoningTokens"}
REJECTIONS = {  # code of our own error -> reason
    "key_needed": "no_key", "key_wrong": "bad_key", "right_missing": "scope", "address_not_allowed": "host",
    "host_not_local": "host", "origin_not_allowed": "host", "body_too_large": "body_size"}


class Figures:
    """Counters and histograms since the start.  Pure; Hub's lock guards them."""

    def __init__(self):
        self._values: dict[str, dict] = {metric.name: {} for metric in METRICS}
        self._models: set[str] = set()

    def add(self, name, *labels, amount=1):
        series = self._values[name]
        labels = self._bounded(series, labels)
        series[labels] = series.get(labels, 0) + amount

    def observe(self, name, value, *labels):
        """One more value of a histogram; None is none."""
        if value is None:
            return
        series, buckets = self._values[name], METRIC[name].buckets
        labels = self._bounded(series, labels)
        row = series.setdefault(labels, [0] * (len(buckets) + 1) + [0.0])  # counts by bucket, then the sum
        row[bisect.bisect_left(buckets, value)] += 1
        row[-1] += value

    @staticmethod
    def _bounded(series, labels):
        return labels if labels in series or len(series) < SERIES else ("other",) * len(labels)

    def model(self, name):
        """A label for a model that LM Studio has named: no client can invent one."""
        if name and name not in self._models and len(self._models) < MODELS:
            self._models.add(name)
        return name if name in self._models else "other" if name else "unknown"

    def model_of(self, record):
        """A label for a request's model: what answered, or what was asked for where LM Studio knows
        the name."""
        if record.model:
            return self.model(record.model)
        return record.model_asked if record.model_asked in self._models else "other"

    def count_request(self, record):
        """A request through us is over."""
        model, key = self.model_of(record), record.key or "none"
        endpoint = record.target if record.target in DIALECTS else "other"
        self.add("lmstudio_gateway_requests_total", key, model, endpoint, str(record.status or 0))
        self.observe("lmstudio_gateway_overhead_seconds", record.overhead_s)
        queued = record.queued_ms()
        self.observe("lmstudio_gateway_queue_seconds", queued and queued / 1000, "default")
        stream = "true" if record.stream else "false"
        self.observe("lmstudio_gateway_request_duration_seconds", record.total_ms / 1000, endpoint, model,
                     stream)
        first = record.first_ms and record.first_ms / 1000
        self.observe("lmstudio_gateway_time_to_first_token_seconds", first, model)
        if record.stream and record.speed:
            self.observe("lmstudio_gateway_time_per_output_token_seconds", 1 / record.speed, model)
        if record.operation == "client_disconnected":
            self.add("lmstudio_gateway_client_disconnects_total",
                     PHASES[max(record.entered, key=STATES.index)])
        elif record.error is not None:
            kind = UPSTREAM_KINDS.get(record.operation) or (
                "error_in_200" if record.status == 200 else "bad_status")
            self.add("lmstudio_gateway_upstream_errors_total", kind)

    def count_tokens(self, record):
        """The tokens of a request that is over, as far as they have not been counted: the log can tell
        later."""
        usage, key, model = record.usage or {}, record.key or "none", self.model_of(record)
        for kind, field in TOKEN_KINDS.items():
            fresh = (usage.get(field) or 0) - record.counted.get(kind, 0)
            if fresh > 0:
                record.counted[kind] = usage[field]
                self.add("lmstudio_gateway_tokens_total", key, model, kind, amount=fresh)

    def tokens(self):
        """{kind: tokens} of all requests through us since the start."""
        sums: Counter[str] = Counter()
        for (_, _, kind), amount in self._values["lmstudio_gateway_tokens_total"].items():
            sums[kind] += amount
        return sums

    def of_requests(self, requests):
        """{metric: {labels: value}} of what is running now, and of the join."""
        flight: Counter[tuple] = Counter()
        queued: Counter[tuple] = Counter()
        prompts = {}
        for record in requests.running.values():
            labels = (self.model_of(record),)
            flight[labels] += record.source == "gateway"
            queued[labels] += record.state == "queued"
            if record.state == "prompt" and record.percent is not None:
                prompts[(*labels, record.run and record.run.slot or "")] = round(record.percent / 100, 4)
        return {"lmstudio_gateway_requests_in_flight": flight, "lmstudio_gateway_requests_queued": queued,
                "lmstudio_prompt_progress_ratio": prompts,
                "lmstudio_gateway_correlated_total": {(name,): n for name, n in requests.bound().items()}}

    def count_event(self, event):
        """An event of the log."""
        data, lesson = event.data, COUNTED.get(event.name)
        if lesson:
            lesson(self, data, self.model(data.get("model")))
        for name, amount in (event.about or {}).items() if lesson else ():
            if name in CHAT_COUNTS:
                self.add(CHAT_COUNTS[name], self.model(data.get("model")), amount=amount)

    def on_chat_end(self, data, model):
        """Its request and its prompt are counted by what the event says about itself."""

    def on_stats(self, data, model):
        for name, field in (("output", "completionTokens"), ("reasoning", "reasoningTokens"),
                            ("accepted_draft", "acceptedDraftTokens")):
            if data.get(field):
                self.add(f"lmstudio_{name}_tokens_total", model, amount=data[field])
        first, speed = data.get("timeToFirstTokenMs"), data.get("tokensPerSecond")
        self.observe("lmstudio_time_to_first_token_seconds", first and first / 1000, model)
        self.observe("lmstudio_tokens_per_second", speed, model)
        if speed and data.get("completionTokens"):
            self.observe("lmstudio_generation_seconds", data["completionTokens"] / speed, model)
        self.observe("lmstudio_prompt_tokens_per_second", data.get("promptTokensPerSecond"), model)
        read = data.get("promptMs")
        self.observe("lmstudio_prompt_eval_seconds", read and read / 1000, model)

    def on_cache(self, data, model):
        self.add("lmstudio_cached_input_tokens_total", model, amount=data["reused"])

    def exposition(self, gauges):
        """All of it as Prometheus text 0.0.4.  gauges: {metric: {labels: value}} as of now."""
        for name, _ in gauges.get("lmstudio_model_loaded", ()):
            self.model(name)    # LM Studio has listed it
        lines = []
        for metric in METRICS:
            series = {**self._values[metric.name], **gauges.get(metric.name, {})}
            if series:
                lines.append(f"# HELP {metric.name} {metric.about}")
                lines.append(f"# TYPE {metric.name} {metric.kind}")
            for labels, value in series.items():
                lines += metric_lines(metric, labels, value)
        return "\n".join(lines) + "\n"


CHAT_COUNTS = {"requests": "lmstudio_requests_total", "input": "lmstudio_input_tokens_total"}  # of Event.about
COUNTED = {"lmstudio_prediction_stats": Figures.on_stats, "lmstudio_cache_stats": Figures.on_cache,
           "lmstudio_chat_end": Figures.on_chat_end}


def metric_lines(metric, labels, value):
    """The lines of one series."""
    pairs = [f'{name}="{escaped(label)}"' for name, label in zip(metric.labels, labels)]

    def line(suffix, more, number):
        inside = ",".join([*pairs, *more])
        return f"{metric.name}{suffix}{{{inside}}} {number}" if inside else f"{metric.name}{suffix} {number}"

    if metric.kind != "histogram":
        return [line("", [], value)]
    counts = list(itertools.accumulate(value[:-1]))
    bounds = [*map(str, metric.buckets), "+Inf"]
    return [*(line("_bucket", [f'le="{bound}"'], number) for bound, number in zip(bounds, counts)),
            line("_sum", [], round(value[-1], 6)), line("_count", [], counts[-1])]


def escaped(label):
    """A label's value as Prometheus wants it."""
    return str(label).replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


def rank(values, share):
    """The nearest-rank percentile of sorted values; None of none."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def performance(records, total, errors, tokens):
    """`performance` of /debug/metrics: totals since the start, times (ms) over the requests that are kept."""
    times = sorted(record.total_ms for record in records)
    firsts = sorted(record.first_ms for record in records if record.first_ms is not None)
    return {"totalRequests": total, "totalErrors": errors, "errorRate": round(errors / total, 4) if total
            else 0,
            "keptRequests": len(times), "avgResponseTimeMs": mean(times), "minResponseTimeMs": rank(times, 0),
            "maxResponseTimeMs": rank(times, 1), "medianResponseTimeMs": rank(times, 0.5),
            "p95ResponseTimeMs": rank(times, 0.95), "p99ResponseTimeMs": rank(times, 0.99),
            "medianTimeToFirstTokenMs": rank(firsts, 0.5), "p95TimeToFirstTokenMs": rank(firsts, 0.95),
            "avgTokensPerSec": mean([record.speed for record in records if record.speed]),
            "totalTokensProcessed": tokens["input"] + tokens["output"],
            "tokenStats": {field: tokens[kind] for kind, field in TOKEN_KINDS.items()}}


def mean(values):
    return round(sum(values) / len(values), 2) if values else None


# --- 3.10 wire formats of events ----------------------------------------------

quote = json.encoder.encode_basestring_ascii


def data_json(event):
    """The event's data as one line of strict JSON, ASCII only."""
    data = event.data
    if event.name == "lmstudio_log" and len(data) == 4:  # most events are these
        tags = f"[{', '.join(map(quote, data['tags']))}]"
        return (f'{{"timestamp": "{data["timestamp"]}", "level": "{data["level"]}", '
                f'"message": {quote(data["message"])}, "tags": {tags}}}')
    return json_members(data)


def json_members(data):
    """A dict with str keys as strict JSON, in less than half of the time that json.dumps takes."""
    return "{%s}" % ", ".join([f"{quote(name)}: {JSON_OF.get(type(value), json.dumps)(value)}"
                               for name, value in data.items()])


JSON_OF: dict[type, Any] = {
    str: quote, int: int.__repr__, float: float.__repr__, dict: json_members,
    bool: {True: "true", False: "false"}.get, type(None): {None: "null"}.get}


def sse_frame(event_id, name, data, retry=""):
    """One frame of a text/event-stream (WHATWG HTML, 9.2)."""
    return f"{retry}id: {event_id}\nevent: {name}\ndata: {data}\n\n".encode()


def json_line(event_id, event):
    """The event as --json prints it."""
    return f'{{"id": "{event_id}", "event": "{event.name}", "data": {data_json(event)}}}\n'


# === 4. HUB: the shared state ================================================

RING = 10_000  # events that a client can still be given after the fact
RETRY_MS = 2000  # what a browser waits before it connects again
BATCH = 512  # frames that one wake-up writes


class Gap(NamedTuple):
    """Events that a client will never get.  Ids, both included; events None when nobody knows how many."""

    first: str
    last: str
    events: int | None


class Hub:
    """Hands every event to every listener, remembers the latest, and keeps the records of requests.

    A listener is a cursor and a bell: publish appends to one ring and rings the bells; each listener
    then takes the frames behind its cursor.  Publishing never waits, and a frame is made once.
    keep, where given, takes the history rows of requests that are over."""

    def __init__(self, kept=100, keep=None, now=time.time, clock=time.monotonic):
        # Guards every field below; the counts and closed may be read without it.  Held for memory work only,
        # never across I/O.
        self._lock = threading.Lock()
        self.epoch = secrets.token_hex(4)
        self._frames = []  # (event name, frame) of the events _first.. _first + len - 1
        self._first = 1  # SEQ of _frames[0]
        self._bells = set()  # a queue.Queue(1) for each listener
        self._closed = False
        self._now, self._clock, self._keep = now, clock, keep
        self.counts: Counter[str] = Counter()  # events published, by name
        self.replays: Counter[str] = Counter()  # listeners that came back: full, gap
        self.dropped = 0  # events that slow listeners lost
        self._requests = Requests(self.epoch, kept)
        self._figures = Figures()
        self._ids = itertools.count(1)

    @property
    def last(self):  # lock held
        """SEQ of the latest event; 0 before the first."""
        return self._first + len(self._frames) - 1

    @property
    def last_id(self):
        """Any thread.  The id of the latest event."""
        with self._lock:
            return self.event_id(self.last)

    def request_id(self):
        """Any thread.  A new id, like no other of this or another start."""
        return f"req_{self.epoch}{next(self._ids):06x}"

    def event_id(self, seq):
        return f"{self.epoch}-{seq}"

    def now(self):
        """This moment as the events have it."""
        return utc_text(self._now())

    # --- events

    def publish(self, events):
        """Any thread.  Appends the events in order and wakes the listeners.  Never blocks."""
        encoded = [(event.name, data_json(event)) for event in events if event.name]
        with self._lock:
            bells = self._append(encoded)
        wake(bells)

    def _append(self, encoded):  # lock held
        """Puts frames into the ring.  Gives the bells that are to be rung once the lock is free."""
        seq = self.last
        for name, data in encoded:
            seq += 1
            self._frames.append((name, sse_frame(f"{self.epoch}-{seq}", name, data)))
            self.counts[name] += 1
        if len(self._frames) > RING + RING // 4:    # cut in one go, so that a publish costs no shift
            surplus = len(self._frames) - RING
            del self._frames[:surplus]
            self._first += surplus
        return tuple(self._bells)

    def _append_event(self, event):  # lock held
        return self._append([(event.name, data_json(event))])

    # --- requests

    def begin(self, record):
        """Any thread.  A request goes to LM Studio."""
        start = record.start_event(self.now())
        with self._lock:
            self._requests.begin(record)
            record.note(start, record.clock)
            bells = self._append_event(start)
        wake(bells)

    def generated(self, record, tokens, first):
        """Any thread.  The answer of a running request has so many tokens; the first came at clock first."""
        with self._lock:
            clock = self._clock()
            record.generated(tokens, first)
            bells = self._append_event(record.progress_event(self.now(), clock)) if record.due(clock) else ()
        wake(bells)

    def comment(self, record):
        """Any thread.  Where a running request is, as an SSE comment."""
        with self._lock:
            return f": {record.told(self._clock())}\n\n".encode()

    def end(self, record, outcome):
        """Any thread.  A request is over.  Later calls do nothing."""
        with self._lock:
            clock = self._clock()
            if not self._requests.over(record, clock, outcome):
                return
            end = record.end_event(self.now())
            record.note(end, clock)
            self._figures.count_request(record)
            rows = self._changed_rows()
            bells = self._append_event(end)
        wake(bells)
        self._give(rows)

    def publish_log(self, events):
        """Tail thread.  Joins the log's events with requests, then publishes them and the progress made.

        The lock is free between the two, because a batch takes long to encode: a request can end there, and
        nothing may be told of its progress then."""
        with self._lock:
            clock = self._clock()
            told = self._requests.see(events, clock)
            for event in events:
                self._figures.count_event(event)
            rows = self._changed_rows()
        self.publish(events)
        for record in told:
            with self._lock:
                running = record.ended is None
                bells = self._append_event(record.progress_event(self.now(), clock)) if running else ()
            wake(bells)
        self._give(rows)

    def _changed_rows(self):  # lock held
        changed, self._requests.changed = self._requests.changed, []
        for record in changed:
            if record.source == "gateway":
                self._figures.count_tokens(record)
        return {record.id: history_row(record) for record in changed} if self._keep else {}

    def _give(self, rows):
        if rows:
            self._keep(list(rows.values()))

    def shown(self, limit=None):
        """Any thread.  The requests as /debug/requests shows them: running ones first, each newest first."""
        with self._lock:
            clock = self._clock()
            records = [*reversed(self._requests.running.values()), *reversed(self._requests.finished)]
            return [record.shown(clock) for record in records[:limit]]

    def overview(self, count):
        """Any thread.  (running requests, the latest count that are over, the model of the newest request
        that has one)."""
        with self._lock:
            clock = self._clock()
            running, over = [*reversed(self._requests.running.values())], self._requests.finished
            models = (record.model or record.model_asked
                      for record in itertools.chain(running, reversed(over)))
            return ([record.shown(clock) for record in running],
                    [record.shown(clock) for record in itertools.islice(reversed(over), count)],
                    next(filter(None, models), None))

    def detail(self, request_id):
        """Any thread.  One request with its timeline and sampling parameters; None when it is not known."""
        with self._lock:
            record = self._requests.find(request_id)
            if record is None:
                return None
            timeline = [{"ms": ms, "event": name, "data": data} for ms, name, data in record.timeline]
            return {**record.shown(self._clock()), "sampling": record.sampling, "timeline": timeline}

    def totals(self):
        """Any thread.  (requests through us, those of them that ended in error, bindings so far)."""
        with self._lock:
            return self._requests.total, self._requests.errors, self._requests.bound()

    def performance(self):
        """Any thread.  `performance` of /debug/metrics."""
        with self._lock:
            ours = [record for record in self._requests.finished if record.source == "gateway"]
            tokens = self._figures.tokens()
            return performance(ours, self._requests.total, self._requests.errors, tokens)

    def exposition(self, gauges):
        """Any thread.  All figures as Prometheus text; gauges are those that others know."""
        with self._lock:
            return self._figures.exposition({**gauges, **self._figures.of_requests(self._requests)})

    def reject(self, code):
        """Any thread.  A request was turned away here; code is our error's."""
        if code in REJECTIONS:
            with self._lock:
                self._figures.add("lmstudio_gateway_rejected_total", REJECTIONS[code])

    # --- listeners

    @contextlib.contextmanager
    def listening(self):
        """Any thread.  Yields a queue.Queue that holds an item whenever there may be news."""
        bell: queue.Queue[bool] = queue.Queue(1)
        with self._lock:
            self._bells.add(bell)
        try:
            yield bell
        finally:
            with self._lock:
                self._bells.discard(bell)

    def cursor(self, since):
        """Any thread.  (SEQ after which to read, Gap or None) for the id that a client saw last."""
        match = re.fullmatch(r"(?:([!-~]{1,64})-)?(\d{1,18})", since or "", re.ASCII)
        with self._lock:
            if match is None:
                return self.last, None
            epoch, seq = match[1] or self.epoch, int(match[2])
            full = epoch == self.epoch and min(seq, self.last) >= self._first - 1
            self.replays["full" if full else "gap"] += 1
            if epoch != self.epoch:
                return self._first - 1, Gap(f"{epoch}-{seq + 1}", self.event_id(self._first - 1), None)
            return min(seq, self.last), None

    def read(self, cursor):
        """Any thread.  (frames after the cursor, new cursor, Gap or None), at most BATCH frames."""
        with self._lock:
            gap = None
            if cursor < self._first - 1:
                gap = Gap(self.event_id(cursor + 1), self.event_id(self._first - 1), self._first - 1 - cursor)
                self.dropped += self._first - 1 - cursor
                cursor = self._first - 1
            start = cursor - self._first + 1
            frames = self._frames[start:start + BATCH]
        return frames, cursor + len(frames), gap

    @property
    def closed(self):
        return self._closed

    @property
    def listeners(self):
        return len(self._bells)

    def close(self):
        """Any thread.  Wakes every listener; closed is True from now on."""
        with self._lock:
            self._closed = True
            bells = tuple(self._bells)
        wake(bells)


def wake(bells):
    for bell in bells:
        ring(bell)


def ring(bell):
    """Wake a listener.  One that has not yet come for the last time is awake already."""
    with contextlib.suppress(queue.Full):
        bell.put_nowait(True)


def gap_data(gap, now):
    return json.dumps({"timestamp": now, "from": gap.first, "to": gap.last, "count": gap.events})


# --- 4.2 history: finished requests in an SQLite file ------------------------

HISTORY = (  # column, type, what it holds; no prompt and no answer
    ("id", "TEXT PRIMARY KEY", lambda record: record.id),
    ("source", "TEXT", lambda record: record.source),
    ("started", "REAL", lambda record: record.started),  # epoch seconds
    ("key", "TEXT", lambda record: record.key),
    ("client", "TEXT", lambda record: record.client),
    ("path", "TEXT", lambda record: record.path),
    ("model_asked", "TEXT", lambda record: record.model_asked),
    ("model", "TEXT", lambda record: record.model),
    ("stream", "INTEGER", lambda record: int(record.stream)),
    ("status", "INTEGER", lambda record: record.status),
    ("outcome", "TEXT", lambda record: record.state),
    ("operation", "TEXT", lambda record: record.operation),
    ("finish_reason", "TEXT", lambda record: record.finish),
    ("prompt_tokens", "INTEGER", lambda record: record.used("promptTokens", record.prompt_tokens)),
    ("cached_tokens", "INTEGER",
     lambda record: record.used("cachedTokens", (record.cache or {}).get("reused"))),
    ("completion_tokens", "INTEGER", lambda record: record.used("completionTokens")),
    ("first_ms", "REAL", lambda record: record.first_ms),
    ("total_ms", "REAL", lambda record: record.total_ms),
    ("prompt_ms", "REAL", lambda record: record.prompt_ms()),
    ("generation_ms", "REAL", lambda record: record.generation_ms()),
    ("binding", "TEXT", lambda record: record.binding),
)
GROUPS = {  # what usage can be summed by
    "key": "COALESCE(key, CASE source WHEN 'lmstudio' THEN 'not via gateway' ELSE 'no key' END)",
    "model": "COALESCE(model, model_asked, 'unknown')",
    "day": "date(started, 'unixepoch', 'localtime')",
}
SUMS = (  # name in the answer, SQL
    ("requests", "COUNT(*)"), ("errors", "SUM(outcome <> 'done')"),
    ("promptTokens", "COALESCE(SUM(prompt_tokens), 0)"), ("cachedTokens", "COALESCE(SUM(cached_tokens), 0)"),
    ("completionTokens", "COALESCE(SUM(completion_tokens), 0)"),
    ("promptSeconds", "ROUND(COALESCE(SUM(prompt_ms), 0) / 1000, 1)"),
    ("generationSeconds", "ROUND(COALESCE(SUM(generation_ms), 0) / 1000, 1)"),
    ("promptTokensPerSecond",
     "ROUND(1000 * SUM(fresh_tokens) / SUM(CASE WHEN fresh_tokens > 0 THEN prompt_ms END), 1)"),
    ("tokensPerSecond",
     "ROUND(1000 * SUM(timed_tokens) / SUM(CASE WHEN timed_tokens > 0 THEN generation_ms END), 1)"))
TIMED = ("(SELECT *, CASE WHEN prompt_ms > 0 THEN prompt_tokens - COALESCE(cached_tokens, 0) END AS "
         "fresh_tokens, CASE WHEN generation_ms > 0 THEN completion_tokens END AS timed_tokens "
         "FROM requests)")
PRUNE_S = 3600.0  # between two looks for rows that are too old


def history_row(record):
    return tuple(value(record) for _, _, value in HISTORY)


def since_epoch(text, now):
    """Epoch seconds of 7d, 24h, 30m, a date (2026-11-24), a UTC time or epoch seconds; 0 for nothing.

    Raises ValueError with the forms."""
    span = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if span:
        return now - int(span[1]) * {"d": 86400, "h": 3600, "m": 60}[span[2]]
    if not text or re.fullmatch(r"\d{9,11}", text):
        return float(text or 0)
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError("use 7d, 24h, 30m, or a date such as 2026-11-24") from None


def usage_rows(connection, groups, since=0.0):
    """Sums by GROUPS as a list of dicts, newest day or most tokens first; without groups one row, of all."""
    columns = [*(f"{GROUPS[group]} AS {group}_" for group in groups),
               *(f"{sql} AS {name}" for name, sql in SUMS)]
    order = "day_ DESC" if "day" in groups else "promptTokens + completionTokens DESC"
    grouped = f"GROUP BY {', '.join(f'{group}_' for group in groups)} ORDER BY {order}" if groups else ""
    query = f"SELECT {', '.join(columns)} FROM {TIMED} WHERE started >= ? {grouped}"
    names = [*groups, *(name for name, _ in SUMS)]
    return [dict(zip(names, row)) for row in connection.execute(query, (since,))]


class History:
    """Keeps one row for each request that is over.  Any thread may call keep() and usage().

    Rows are committed by a thread of its own as they come; WAL lets a process die at any moment without
    harm to what is committed.  Raises HistoryError where the file is no database or cannot be written."""

    def __init__(self, path, days=0):
        self.path, self._days = path, days
        self._rows: queue.SimpleQueue = queue.SimpleQueue()  # lists of rows; None ends the thread
        open_history(path).close()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def keep(self, rows):
        """Have rows written; a row with a known id takes the place of the old one.  Never waits."""
        self._rows.put(rows)

    def close(self):
        """Write what is left; waits for it, 5 s at most."""
        self._rows.put(None)
        self._thread.join(5.0)

    def usage(self, group, since=0.0):
        """Sums by key, model or day.  Raises HistoryError."""
        with contextlib.closing(open_history(self.path)) as connection, history_errors(connection.Error):
            return usage_rows(connection, [group], since)

    def _run(self):
        """Body of the history thread.  What cannot be written is lost and said; the gateway goes on."""
        connection, pruned = open_history(self.path), -math.inf
        with contextlib.closing(connection):
            while (rows := self._rows.get()) is not None:
                due = self._days and time.monotonic() - pruned > PRUNE_S
                try:
                    with history_errors((connection.Error, ValueError, OverflowError)):
                        store_rows(connection, rows)
                        if due:
                            pruned = time.monotonic()
                            remove_rows(connection, time.time() - 86400 * self._days)
                except HistoryError as error:
                    log.error("history %s: %s; %d requests are missing in it", self.path, error, len(rows))


@contextlib.contextmanager
def history_errors(kind):
    """Errors of SQLite as HistoryError."""
    try:
        yield
    except kind as error:
        raise HistoryError(f"{error}; name a file that can be written and is a history or new") from None


def open_history(path):
    """A connection to a history, its table made where it was missing.  Raises HistoryError."""
    import sqlite3  # here, because it takes 2 MB that only --history and --report need

    with history_errors(sqlite3.Error), contextlib.ExitStack() as stack:
        connection = stack.enter_context(contextlib.closing(sqlite3.connect(path, timeout=10.0)))
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        columns = ", ".join(f"{name} {kind}" for name, kind, _ in HISTORY)
        with connection:
            connection.execute(f"CREATE TABLE IF NOT EXISTS requests ({columns})")
            connection.execute("CREATE INDEX IF NOT EXISTS requests_started ON requests (started)")
        stack.pop_all()     # it stays open
    return connection


def remove_rows(connection, before):
    with connection:
        connection.execute("DELETE FROM requests WHERE started < ?", (before,))


def store_rows(connection, rows):
    with connection:
        marks = ", ".join("?" * len(HISTORY))
        connection.executemany(f"INSERT OR REPLACE INTO requests VALUES ({marks})", rows)


# === 5. TAIL: files to chunks ================================================

PIECE = 64 * 1024  # bytes of one read of a saved log, or of a socket
LIVE_PIECE = 8 * 1024  # of a live log: parsing them holds the GIL for about half a millisecond
YIELD_S = 0.0005  # between two pieces of a live log, so that a backlog does not hold up the proxy
BUSY_S, IDLE_S = 0.01, 0.1  # pauses between looks while bytes flow, and after QUIET_S .. CALM_S without any
CALM_S = 5.0
QUIET_S = 0.2  # an entry without a next header is complete after this
PATIENCE_S = 10.0  # an old file that cannot be read holds up a newer one for so long
MIDLINE_S = 2.0  # a line without an end is taken as it is after this
LOOK_S, SCAN_S = 0.1, 2.0  # between glances at the directories' times, and between full listings
ANCHOR = 64  # bytes before our position that must still be there
HEAD = 1024  # first bytes that tell a file from its replacement
SETTINGS_NAME = "http-server-config.json"
LOW_DISK_BYTES = 2_000_000_000  # a disk with less room than this is worth a warning
MONTH = re.compile(r"\d{4}-\d\d")
LOG_NAME = re.compile(r"(\d{4}-\d\d-\d\d)\.(\d+)\.log")


class LogFile(NamedTuple):
    """A server log by its place in time.  N is a number: 10 follows 9."""

    month: str
    day: str
    number: int
    path: str


def list_months(directory, since=None):
    """The paths of the months in a log directory, oldest first; only since's and later ones.  Raises
    OSError."""
    return [os.path.join(directory, name) for name in sorted(os.listdir(directory))
            if MONTH.fullmatch(name) and (since is None or name >= since.month)]


def list_logs(directory, since=None):
    """The server logs of a log directory, oldest first; only those after since.

    Raises OSError when the directory itself cannot be listed."""
    found = []
    for path in list_months(directory, since):
        with contextlib.suppress(OSError):
            found += [LogFile(os.path.basename(path), match[1], int(match[2]), os.path.join(path, match[0]))
                      for match in map(LOG_NAME.fullmatch, os.listdir(path)) if match]
    return sorted(log_file for log_file in found if since is None or log_file > since)


def switch_event(old, new, utc):
    """The event for the way from one log file to the next; old and new are LogFile or plain paths."""
    old_path, new_path = getattr(old, "path", old), getattr(new, "path", new)
    months = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in (old_path, new_path)]
    if months[0] != months[1] and all(map(MONTH.fullmatch, months)):
        return Event("lmstudio_month_transition",
                     {"timestamp": utc, "oldDirectory": os.path.dirname(old_path),
                      "newDirectory": os.path.dirname(new_path), "newLogFile": new_path})
    return Event("lmstudio_file_switch", {"timestamp": utc, "oldLogFile": old_path, "newLogFile": new_path})


def own_home():
    """The user's home directory; for a user without one, as containers have them, a `~` that is not there."""
    return Path(os.path.expanduser("~"))


def find_home(home=None):
    """LM Studio's home directory, as its own SDK finds it: the pointer file, else ~/.cache/lm-studio,
    else ~/.lmstudio (lmstudio-js, findLMStudioHome.ts).  Never writes the pointer."""
    home = Path(home) if home else own_home()
    with contextlib.suppress(OSError):
        pointed = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8", errors="replace").strip()
        if pointed and "\0" not in pointed:
            return Path(pointed)
    cache = home / ".cache" / "lm-studio"
    return cache if os.path.isdir(cache) else home / ".lmstudio"


def find_log_dir(home):
    """The log directory under LM Studio's home: of the app and of Bionic (since 07-2026), the one
    that holds the newest file; the app's when neither holds any."""
    places = [home / "server-logs", home / "apps" / "bionic" / "server-logs"]
    return str(max(places, key=newest_write))


def log_dir_of(config):
    """The log directory that is configured, else the one that is found."""
    return config.log_dir or find_log_dir(find_home())


def settings_path(home):
    """Where LM Studio keeps its server's settings; the app's place when there is none."""
    places = [home / ".internal" / SETTINGS_NAME, home / "apps" / "bionic" / ".internal" / SETTINGS_NAME]
    return next((path for path in places if os.path.exists(path)), places[0])


def read_settings(home):
    """LM Studio's settings as a dict.  Raises OSError where there are none, ValueError for no JSON object."""
    settings = json_object(settings_path(home).read_bytes())
    if settings is None:
        raise ValueError("it is no JSON object")
    return settings


def settings_port(settings):
    """The port of LM Studio's server by its settings, else None."""
    port = settings.get("port")
    return port if isinstance(port, int) and 0 < port < 65536 else None


def newest_write(directory):
    """When the newest server log below a directory was written; 0 without one."""
    with contextlib.suppress(OSError):
        logs = list_logs(directory)
        if logs:
            return os.stat(logs[-1].path).st_mtime
    return 0


def file_state(path):
    """os.stat_result of a file, by opening it where the directory's figures can be stale (Windows)."""
    if os.name != "nt":
        return os.stat(path)
    with open(path, "rb") as file:
        return os.fstat(file.fileno())


class Follower:
    """Follows the newest log of a directory.  next_news() gives what there is; it never waits.

    Only the tail thread calls methods; other threads may read the fields."""

    def __init__(self, directory, from_start=False, started=0.0):
        self.directory = directory
        self._started = started  # epoch seconds: files that were written before are history
        self.file: Any = None  # LogFile that is read, None before the first
        self.position = 0  # bytes of it that have been read
        self.size = 0  # its size when last looked at
        self.problem = None  # why nothing can be read, in words for a person
        self._seen = None  # (device, inode, mtime) of the file when last read
        self._unread_since = None  # when reading it began to fail
        self._head = self._anchor = b""
        self._from_start = from_start
        self._first_look = True
        self._glanced = self._scanned = -math.inf
        self._months = []  # paths of its month and those after it
        self._times = None  # modification times of the directories when last glanced at
        self._newer = []  # log files after self.file, oldest first

    @property
    def behind(self):
        """Bytes that are written and not yet read."""
        return max(0, self.size - self.position)

    def next_news(self, now):
        """A chunk (bytes), a LogFile to which reading went on, None for a file that was replaced or
        ended, or b"" for nothing new.  now: seconds of a clock that does not jump."""
        self._look_around(now)
        if self.file is None:
            return self._advance() if self._newer else b""
        try:
            finished = self._may_advance()  # asked first: what the old file holds by then is all of it
            news = self._read()
            self._unread_since = None
            return self._advance() if news == b"" and finished else news
        except FileNotFoundError:
            return self._advance() if self._newer else b""  # its directory tells what is wrong
        except OSError as error:
            self._complain(f"cannot read {self.file.path}: {error.strerror or error}")
            self._unread_since = self._unread_since or now
            late = now - self._unread_since > PATIENCE_S
            return self._advance() if late and self._may_advance() else b""

    def _look_around(self, now):
        """Notice newer files.  Directory times are looked at often, all names now and then."""
        if now - self._glanced < LOOK_S:
            return
        self._glanced = now
        try:
            times = self.file and [os.stat(path).st_mtime_ns for path in (self.directory, *self._months)]
        except OSError:
            times = None
        if times is None or times != self._times or now - self._scanned >= SCAN_S:
            self._times, self._scanned = times, now
            self._scan()

    def _scan(self):
        try:
            logs, self._months = list_logs(self.directory, self.file), list_months(self.directory, self.file)
        except OSError as error:
            self._newer, self._first_look = [], False
            self._complain(f"cannot read the log directory {self.directory}: {error.strerror or error}")
            return
        if self.file is None and not logs:
            self._complain(f"no log files in {self.directory} yet")
        elif self._unread_since is None:
            self.problem = None
        self._newer = self._begin(logs) if self.file is None and logs else logs
        self._first_look = False

    def _begin(self, logs):
        """The files to read when none has been read yet.  What is there at start-up is history."""
        if self._first_look and self._from_start:
            return logs[-1:]
        if not self._first_look:
            with contextlib.suppress(OSError):
                logs = [log_file for log_file in logs
                        if file_state(log_file.path).st_mtime >= self._started] or logs[-1:]
                if file_state(logs[0].path).st_mtime >= self._started:
                    return logs
        self._start_at_end(logs[-1])
        return []

    def _start_at_end(self, log_file):
        self.file = log_file
        try:
            found = file_state(log_file.path)
            self.position = self.size = found.st_size
            self._seen = (found.st_dev, found.st_ino, found.st_mtime_ns)
            with open(log_file.path, "rb") as file:
                self._head = file.read(min(HEAD, self.size))
                file.seek(max(0, self.size - ANCHOR))
                self._anchor = file.read(min(ANCHOR, self.size))
        except OSError as error:
            self._complain(f"cannot read {log_file.path}: {error.strerror or error}")
        log.info("Monitoring log file: %s", log_file.path)

    def _may_advance(self):
        """True when a newer file has bytes, so that the old one will get no more."""
        for log_file in self._newer:
            with contextlib.suppress(OSError):
                if file_state(log_file.path).st_size:
                    return True
        return False

    def _advance(self):
        self.file, self._newer = self._newer[0], self._newer[1:]
        self.position = self.size = 0
        self._seen, self._head, self._anchor = None, b"", b""
        self.problem = self._unread_since = None
        log.info("Monitoring log file: %s", self.file.path)
        return self.file

    def _read(self):
        """The next piece of the file; b"" at its end; None when it is not the file we knew."""
        found = file_state(self.file.path)
        self.size, seen = found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns)
        if self.size == self.position and seen == self._seen:
            return b""
        with open(self.file.path, "rb") as file:
            if (self._seen and (self.size < self.position or seen[:2] != self._seen[:2])
                    and not self._still_ours(file)):
                return None
            file.seek(self.position - len(self._anchor))
            data = file.read(len(self._anchor) + LIVE_PIECE)
            if len(self._head) < HEAD and data:
                file.seek(0)
                self._head = file.read(min(HEAD, self.position + len(data) - len(self._anchor)))
        if not data.startswith(self._anchor):
            self._start_over()
            return None
        self._seen, self.problem = seen, None
        chunk = data[len(self._anchor):]
        self._anchor = data[-ANCHOR:]
        self.position += len(chunk)
        return chunk

    def _still_ours(self, file):
        """True when a file that shrank or changed identity still has the bytes that we read.

        One that was cut short goes on where it ends now; another is read from its start."""
        head = file.read(len(self._head))
        if self.size >= self.position and head == self._head:
            return True
        if 0 < self.size < self.position and head == self._head[: self.size]:
            self.position, self._head = self.size, head
            file.seek(max(0, self.size - ANCHOR))
            self._anchor = file.read(ANCHOR)[: self.size]
        else:
            self._start_over()
        return False

    def _start_over(self):
        self.position, self._head, self._anchor, self._seen = 0, b"", b"", None

    def _complain(self, problem):
        if problem != self.problem:
            self.problem = problem
            log.warning("%s; I keep looking. Start LM Studio's server, or name its log directory with "
                        "--log-dir (LMSTUDIO_LOG_DIR)", problem)


class LogVolume:
    """How much room a log directory takes and its disk has left.  Any thread; looked at once a minute."""

    def __init__(self, directory, warn_bytes):
        self.directory, self._warn_bytes = directory, warn_bytes
        self._lock = threading.Lock()  # guards _asked and _facts
        self._asked, self._facts = -math.inf, {}

    def facts(self, max_age_s=60.0):
        """{directoryBytes, growthBytesPerDay, freeBytes (None: unknown), warnings (what to do)}"""
        with self._lock:
            if time.monotonic() - self._asked < max_age_s:
                return self._facts
        facts = self._look()
        with self._lock:
            self._asked, self._facts = time.monotonic(), facts
        return facts

    def _look(self):
        sizes: Counter[str] = Counter()
        total = growth = free = None
        with contextlib.suppress(OSError):
            for log_file in list_logs(self.directory):
                with contextlib.suppress(OSError):
                    sizes[log_file.day] += os.stat(log_file.path).st_size
            total, growth = sum(sizes.values()), daily_growth(sizes, datetime.date.today())
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.directory).free
        return {"directoryBytes": total, "growthBytesPerDay": growth, "freeBytes": free,
                "warnings": [*self._warnings(total, growth, free)]}

    def _warnings(self, total, growth, free):
        remedy = "lmgateway.py --prune 30 shows what is older than 30 days, and with --yes removes it"
        if total and self._warn_bytes and total > self._warn_bytes:
            yield f"LM Studio's logs take {shown_bytes(total)} in {self.directory}: {remedy}"
        if free is not None and free < max(LOW_DISK_BYTES, 3 * (growth or 0)):
            yield (f"only {shown_bytes(free)} are free on the disk of {self.directory}: make room there; "
                   + remedy)


def daily_growth(sizes, today):
    """Bytes a day over the last week: sizes maps days such as 2026-09-01 to bytes.  0 without any."""
    first = today - datetime.timedelta(days=6)
    days = [day for day in sizes if first.isoformat() <= day <= today.isoformat() and is_date(day)]
    if not days:
        return 0
    span = today - datetime.date.fromisoformat(min(days))
    return round(sum(sizes[day] for day in days) / (span.days + 1))


def is_date(text):
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def shown_bytes(count):
    """12.3 MB, as disks are sold."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class Monitor:
    """The tail thread's work: a Follower's news through a Parser, as lists of events."""

    def __init__(self, follower, clock=time.monotonic, now=time.time):
        self.follower, self.parser = follower, Parser()
        self._clock, self._now = clock, now
        self._last_news = -math.inf  # when bytes came last
        self._settled = True  # quiet() has been told since then
        self.read = 0  # bytes
        self.switches: Counter[str] = Counter()

    def run(self, publish, wait):
        """Until wait(seconds) returns True; what is there by then is told, too.  publish takes a list of
        events."""
        over = False
        while not over:
            events, pause = self.step()
            publish(events)  # none, too: the join looks again
            over = wait(pause)
        last = [*self.step()[0], *self.parser.end(torn=False)]
        if last:
            publish(last)

    def step(self):
        """(events, seconds to wait before the next step)."""
        now, follower = self._clock(), self.follower
        old = follower.file
        news = follower.next_news(now)
        if news:
            return self._take(news, old, now), YIELD_S
        if news is None:
            events = self.parser.end()
            self.parser.forget()
            return events, 0
        since = now - self._last_news
        if not self._settled and since >= (MIDLINE_S if self.parser.midline else QUIET_S):
            self._settled = True
            return (self.parser.end() if self.parser.midline else self.parser.quiet()), BUSY_S
        return [], BUSY_S if since < CALM_S else IDLE_S

    def _take(self, news, old, now):
        if isinstance(news, bytes):
            self._last_news, self._settled = now, False
            self.read += len(news)
            return self.parser.feed(news)
        if old is None:
            return []
        events = self.parser.end()  # and not forget(): LM Studio may go on with an entry in the next file
        event = switch_event(old, news, utc_text(self._now()))
        self.switches[event.name] += 1
        return [*events, event]


def replay(paths, publish):
    """Every event of saved logs, file after file.  Raises StartError for a path that cannot be read,
    ConfigError for one that holds something else."""
    parser, old = Parser(), None
    for path in paths:
        if old is not None:
            publish(parser.end())
            if not ("", 0) < log_place(old) < log_place(path):  # else LM Studio may go on with an entry in it
                parser.forget()
            moment = parser.last_moment
            publish([switch_event(old, path, moment.utc if moment else utc_text(0))])
        old = path
        try:
            for piece in saved_pieces(path):
                publish(parser.feed(piece))
        except StartError:
            publish(parser.end())
            raise
    publish(parser.end())
    if parser.lines and not parser.entries:
        log.warning("no entries in %s: those of LM Studio begin like [2026-05-01 10:00:00][INFO]",
                    ", ".join(map(str, paths)))
    return parser


def saved_pieces(path):
    """The bytes of a saved log, in pieces.  Raises StartError where it cannot be read, ConfigError where it
    begins like no log."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            piece = file.read(PIECE)
            check_text(path, piece)
            while piece:
                yield piece
                piece = file.read(PIECE)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror or error}") from None


def check_text(path, start):
    """Raises ConfigError where a file begins like no log: as PowerShell writes text, or packed."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: it is UTF-16; save it as UTF-8 (PowerShell: Out-File -Encoding utf8)")
    if start.startswith((b"\x1f\x8b", b"PK\3\4", b"\x28\xb5\x2f\xfd")):
        raise ConfigError(f"{path}: it is packed; unpack it first")


def saved_logs(paths):
    """The files that paths name, each directory's in date order.  Raises ConfigError where there is none to
    read."""
    files = []
    for path in paths:
        if path != "-" and not os.path.exists(path):
            raise ConfigError(f"{path}: no such file or directory; name a saved log or a log directory")
        if path == "-" or not os.path.isdir(path):
            files.append(path)
            continue
        try:
            inside = [log_file.path for log_file in list_logs(path)] or flat_logs(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); name a directory that "
                              "can") from None
        if not inside:
            raise ConfigError(f"{path}: no log files in it; name a directory with "
                              "YYYY-MM/YYYY-MM-DD.N.log or *.log files")
        files += inside
    return files


def flat_logs(directory):
    """The logs that lie directly in a directory, server logs by date and number, others by name."""
    names = sorted(os.listdir(directory), key=lambda name: (*log_place(name), name))
    return [os.path.join(directory, name) for name in names if name.endswith(".log")]


def log_place(path):
    """(day, number) of a server log by its name; ("", 0) for any other file."""
    match = LOG_NAME.fullmatch(os.path.basename(path))
    return (match[1], int(match[2])) if match else ("", 0)


# === 6. UPSTREAM: requests to LM Studio ======================================

REUSE_S = 2.0  # LM Studio closes a kept connection after 5 s without a request
MATURE_S = 0.01  # a server that closes after each answer has closed by then
REPEATABLE = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")  # idempotent methods (RFC 9110, 9.2.2)
CONNECT_S = 10.0
HEALTH_S = 2.0  # to connect, and again to answer: a prompt that is read on the CPU makes LM Studio slow
GREETING_S = 0.3  # what `lms`, which waits 500 ms in all, can be kept waiting
ANSWER_HEAD_LIMIT = 256 * 1024
SMALL_BODY = 64 * 1024  # travels in one packet with its head
SLICE = 1024 * 1024     # of a large body, which has the timeout for itself
HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-authenticate", "proxy-authorization",
                        "proxy-connection", "te",
                        "trailer", "transfer-encoding", "upgrade"))  # RFC 9110, 7.6.1
BROKEN = (OSError, http.client.HTTPException)  # how a connection to LM Studio fails


class UpstreamError(GatewayError):
    """LM Studio gave no answer.  kind is refused, timeout or reset."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class Chunks:
    """Decodes a chunked body (RFC 9112, 7.1), strictly: a size that two readers could read in two ways is
    how requests are smuggled.  left: bytes of a chunk that are still to come."""

    SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
    TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")
    LINE_LIMIT = 8 * 1024

    def __init__(self):
        self.left, self.over = 0, False
        self.rest = b""  # what is not read yet; once over, what follows the body
        self._room = self.LINE_LIMIT  # for trailers
        self._step = self._size_line
        self.between = True  # the next byte begins a chunk

    def feed(self, data):
        """The payload in data.  Raises ValueError for what is not a chunked body."""
        if self.between and (match := self.SIZE.match(data)):
            size = int(match[1], 16)
            if size and len(data) == match.end() + size + 2 and data.endswith(b"\r\n"):
                return data[match.end():-2]     # one whole chunk, as most pieces of a stream are
        self.rest = self.rest + data if self.rest else data
        parts: list[bytes] = []
        while not self.over and self._step(parts):
            pass
        self.between = not self.rest and self._step == self._size_line
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # Each step below takes its share of rest, and gives False when that is not there yet.

    def _size_line(self, parts):
        match = self.SIZE.match(self.rest)
        if not match:
            if len(self.rest) > self.LINE_LIMIT or b"\n" in self.rest or b"\r" in self.rest[:-1]:
                raise ValueError("a chunk's size line is malformed")
            return False
        self.left = int(match[1], 16)
        self.rest = self.rest[match.end():]
        self._step = self._payload if self.left else self._trailers
        return True

    def _payload(self, parts):
        part = self.rest[:self.left]
        self.left -= len(part)
        self.rest = self.rest[len(part):]
        if part:
            parts.append(part)
        if self.left:
            return False
        self._step = self._line_end
        return True

    def _line_end(self, parts):
        if not b"\r\n".startswith(self.rest[:2]):
            raise ValueError("a chunk does not end where its size says")
        if len(self.rest) < 2:
            return False
        self.rest, self._step = self.rest[2:], self._size_line
        return True

    def _trailers(self, parts):
        """Trailers are read and dropped."""
        line, end, rest = self.rest.partition(b"\r\n")
        self._room -= len(line) if end else 0
        if (len(line) > self._room or b"\n" in line or not end and b"\r" in line[:-1]
                or end and line and not self.TRAILER.fullmatch(line)):
            raise ValueError("the trailers are malformed or too long")
        if not end:
            return False
        self.rest, self.over = rest, not line
        return True


class Call(urllib.request.Request):
    """A request with its headers as the client sent them: order, case and repeats kept."""

    def __init__(self, base, method, target, headers, body, timeout_s, patience):
        self.__dict__.update(base.__dict__)  # a Request of the server's address, which is parsed once
        self.method, self.selector = method, target
        self.raw_headers, self.body, self.timeout_s, self.patience = headers, body, timeout_s, patience
        self._lock = threading.Lock()  # guards the two below: a socket given back is not ours to shut
        self._sock = None  # while the exchange runs
        self.cancelled = False
        self.reuses = False  # it runs over a connection that was used before

    def cancel(self):
        """Any thread.  Ends the exchange, so that LM Studio stops working for it."""
        with self._lock:
            self.cancelled = True
            if self._sock:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # below TLS: at once

    def use(self, sock):
        """Run over this socket, or over none.  Gives the one used before.  Raises ConnectionAbortedError."""
        with self._lock:
            before, self._sock = self._sock, sock
            if self.cancelled and sock:
                raise ConnectionAbortedError("the client left")
        return before

    def head(self):
        lines = [f"{self.get_method()} {self.selector} HTTP/1.1",
                 *[f"{name}: {value}" for name, value in self.raw_headers], "", ""]
        return "\r\n".join(lines).encode("latin-1")


SMALL_PIECE = 2048  # bytes; the event of one token has 200 to 400


def size_lines():
    """For each number of bytes up to SMALL_PIECE, the size line of the one chunk that fills them (RFC 9112,
    7.1); () where none does, with which no bytes start."""
    lines: list[Any] = [()] * (SMALL_PIECE + 1)
    for size in range(1, SMALL_PIECE - 6):
        line = b"%x\r\n" % size
        lines[len(line) + size + 2] = line
    return lines


SIZE_LINES = size_lines()


class Answer:
    """What LM Studio answers: the head, read when it is made, then the body, as it comes.

    http.client's own response reads heads through the email parser, which costs more than all else here.
    Informational forerunners (1xx, RFC 9110, 15.2) are skipped.  Raises OSError and HTTPException."""

    STATUS_LINE = re.compile(r"HTTP/1\.(\d) (\d{3})(?: (.*))?")

    def __init__(self, sock, method):
        self._sock, self._buffer = sock, b""
        self._fault: Any = None  # how the connection failed, for pieces() to tell
        self.over = False  # the body has been read to its end
        self.status = 100
        while 100 <= self.status < 200:
            self._read_head()
        self._frame(method)

    def _read_head(self):
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            piece = self._sock.recv(PIECE)
            if not piece:
                raise http.client.RemoteDisconnected("in the middle of its head" if self._buffer
                                                     else "without a word")
            self._buffer += piece
            if len(self._buffer) > ANSWER_HEAD_LIMIT:
                raise http.client.LineTooLong("response head")
        head, self._buffer = self._buffer[:end], self._buffer[end + 4:]
        lines = head.decode("latin-1").split("\r\n")
        first = self.STATUS_LINE.fullmatch(lines[0])
        if not first or first[2] == "101" or head.count(b"\r") + head.count(b"\n") > 2 * (len(lines) - 1):
            raise http.client.BadStatusLine(lines[0][:80])
        self._minor, self.status, self.reason = int(first[1]), int(first[2]), first[3] or ""
        self.headers: list[tuple[str, str]] = []
        self._named: dict[str, str] = {}
        for line in lines[1:]:
            if line[:1] in (" ", "\t") and self.headers:    # an old form that may still come (RFC 9112, 5.2)
                self.headers[-1] = self.headers[-1][0], f"{self.headers[-1][1]} {line.strip()}"
            else:
                name, _, value = line.partition(":")
                self.headers.append((name.rstrip(), value.strip(" \t")))

    def _frame(self, method):
        """How the end of the body is known (RFC 9112, 6.3)."""
        for name, value in self.headers:
            key = name.lower()
            before = self._named.get(key, value)
            joined = key in self._named and (key != "content-length" or before != value)
            self._named[key] = f"{before}, {value}" if joined else value
        coding, length = self.header("transfer-encoding").lower(), self.header("content-length")
        if coding not in ("", "chunked") or length and not coding and not length.isdecimal():
            raise http.client.HTTPException("the length of its answer is not clear")
        self.chunks = Chunks() if coding else None
        options = self.header("connection").lower()
        self.length = int(length) if length and not coding else None
        if method == "HEAD" or self.status in (204, 304):
            self.length, self.chunks = 0, None
        self.over = self.length == 0
        self.keeps = (self.length is not None or bool(coding)) and (
            "close" not in options if self._minor
            else "keep-alive" in options) and not (self.over and self._buffer)

    def header(self, name):
        """The header's values, joined as RFC 9110, 5.3 has it; "" without one."""
        return self._named.get(name, "")

    @property
    def ready(self):
        """True when the first piece of the body, or its end, is already here."""
        return self.over or bool(self._buffer)

    def pieces(self):
        """The body as it comes, without its framing.  over is True as soon as its last piece is there."""
        while not self.over:
            if self._fault:
                raise self._fault
            data, self._buffer = self._buffer or self._sock.recv(PIECE), b""
            if not data and (self.chunks or self.length is not None):
                raise http.client.IncompleteRead(b"", self.length)
            if piece := self._payload(data):
                yield piece

    def relay(self, send, waiting, limit, due):
        """While pieces() rests: send on, framing and all, pieces that are one whole small chunk which ends
        as an event of JSON does and has no usage; put each into waiting, with its clock.  True after limit
        of them or when the clock reading due has come; False before a piece of another kind, or the end,
        which pieces() will give.

        It holds what each piece needs and no more, in one frame: a thread that was just woken takes
        microseconds for every function and object that it touches."""
        if not (self.chunks and self.chunks.between):
            return False
        recv, monotonic = self._sock.recv, time.monotonic
        for _ in range(limit):
            try:
                data = recv(SMALL_PIECE)
            except BROKEN as error:
                self._fault = error
                return False
            size_line = SIZE_LINES[len(data)]
            if not (data.endswith(b"}\n\n\r\n") and data.startswith(size_line) and b'"usage"' not in data):
                self._buffer = data
                return False
            now = monotonic()
            waiting.append((data[len(size_line):-2], now))
            send(data)
            if now >= due:
                break
        return True

    def _payload(self, data):
        if self.chunks:
            try:
                piece = self.chunks.feed(data)
            except ValueError as error:
                raise http.client.HTTPException(str(error)) from None
            self.over = self.chunks.over
            self.keeps = self.keeps and not (self.over and self.chunks.rest)
            return piece
        if self.length is None:
            self.over = not data
            return data
        if len(data) > self.length:     # more than it announced: what follows belongs to no request
            data, self.keeps = data[:self.length], False
        self.length -= len(data)
        self.over = not self.length
        return data

    def read(self, limit):
        """The whole body, at most limit bytes of it."""
        data = b""
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                break
        return data[:limit]


class KeptConnections(urllib.request.BaseHandler):
    """Opens http and https for an OpenerDirector over connections that are used again.

    One is used again only if it has been idle for less than REUSE_S and is not readable (readable
    means closed); if it then fails before the first byte of an answer, a repeatable request is tried once
    on a fresh one.  Others are not, because LM Studio may have begun to work (RFC 9110, 9.2.2); they take a
    connection that was never used again only once it is older than MATURE_S.  No redirects, no proxies, no
    error handling: the answer is passed on as it is."""

    def __init__(self):
        # (socket, monotonic seconds, used again before, timeout), the longest idle first; append and pop
        # are atomic
        self._idle: deque[tuple] = deque()
        self._tls = None  # an ssl.SSLContext, once it is needed

    def http_open(self, call):
        return self._exchange(call, None)

    def https_open(self, call):
        self._tls = self._tls or ssl.create_default_context()
        return self._exchange(call, self._tls)

    def keep(self, call, sock):
        """Any thread.  An answer was read to its end and its connection may serve another request."""
        self._idle.append((sock, time.monotonic(), call.reuses, call.timeout_s))
        with contextlib.suppress(IndexError):
            while len(self._idle) > 64:
                self._idle.popleft()[0].close()

    def _exchange(self, call, tls):
        repeatable = call.get_method() in REPEATABLE
        sock, timeout_s = self._kept(repeatable)
        if sock:
            call.reuses = True
            try:
                if timeout_s != call.timeout_s:
                    set_timeout(sock, call.timeout_s)
                return self._send(call, sock)
            except BROKEN as error:
                hang_up(call.use(None))
                if call.cancelled or isinstance(error, TIMEOUTS):
                    raise
                if not repeatable:
                    hang_up(self._connect(call, tls))   # a server that is gone is said to be gone
                    raise
        call.reuses = False
        return self._send(call, self._connect(call, tls))

    @staticmethod
    def _connect(call, tls):
        """A new connection.  localhost is asked as 127.0.0.1: LM Studio listens on IPv4 only."""
        parts = urllib.parse.urlsplit(f"//{call.host}")
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
        address = host, parts.port or (443 if tls else 80)
        try:
            sock = socket.create_connection(address, min(CONNECT_S, call.timeout_s or CONNECT_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = tls.wrap_socket(sock, server_hostname=parts.hostname) if tls else sock
            set_timeout(sock, call.timeout_s)
            return sock
        except OSError as error:
            why = "the connection timed out" if isinstance(error, TIMEOUTS) else error_text(error)
            raise UpstreamError("refused",
                                f"LM Studio is not reachable at {call.full_url} ({why}). Start its server "
                                "(Developer > Start server, or: lms server start), or give its address with "
                                "--upstream") from None

    def _kept(self, repeatable):
        with contextlib.suppress(IndexError):
            while True:
                sock, since, proven, timeout_s = kept = self._idle.popleft()
                age = time.monotonic() - since
                if age > REUSE_S or readable(sock):
                    sock.close()
                elif repeatable or proven or age > MATURE_S:
                    return sock, timeout_s
                else:
                    self._idle.appendleft(kept)
                    break
        return None, None

    @staticmethod
    def _send(call, sock):
        try:
            call.use(sock)
            head, body = call.head(), call.body or b""
            if len(body) <= SMALL_BODY:
                sock.sendall(head + body)
            else:
                sock.sendall(head)
                sock.settimeout(call.timeout_s)     # for each slice; the kernel's begins anew with any byte
                with memoryview(body) as whole:
                    for at in range(0, len(body), SLICE):
                        sock.sendall(whole[at:at + SLICE])
                set_timeout(sock, call.timeout_s)
        except (BrokenPipeError, ConnectionResetError) as error:
            try:    # a server that refuses a body may answer before it has read all of it
                return Answer(sock, call.get_method())
            except BROKEN:
                raise error from None
        return Answer(sock, call.get_method())


TIMEOUTS = (TimeoutError, socket.timeout, BlockingIOError)   # the last one is the kernel's: set_timeout()


def hang_up(sock):
    """Close a socket, if there is one."""
    if sock:
        sock.close()


def readable(sock):
    """True when a socket has something to read or has ended."""
    if hasattr(select, "poll"):
        look = select.poll()
        look.register(sock, select.POLLIN)
        return bool(look.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def set_timeout(sock, seconds):
    """Each read and each write waits at most so long, without end for None.

    Where the kernel keeps the time (socket(7), SO_RCVTIMEO), each is one system call and not two, and lets
    go of the GIL once.  It tells TLS nothing, and Windows counts in another unit: there Python keeps it."""
    sock.settimeout(seconds)
    if os.name == "posix" and not isinstance(sock, ssl.SSLSocket):
        kept = struct.pack("ll", *divmod(int(1e6 * (seconds or 0)), 1_000_000))
        with contextlib.suppress(OSError):  # a system that has another form of it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, kept)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, kept)
            sock.settimeout(None)


class Upstream:
    """LM Studio's server.  Any thread may call."""

    def __init__(self, base, token=None):
        self.base, self.token = base, token
        self.host = base.partition("://")[2]
        self._request = urllib.request.Request(base)
        self._connections = KeptConnections()
        self._opener = urllib.request.OpenerDirector()  # bare: none of urllib's own handlers
        self._opener.add_handler(self._connections)
        self._lock = threading.Lock()  # guards the two below
        self._health = (-math.inf, f"LM Studio at {base} has not answered yet")  # clock, reason or ""
        self._asking: threading.Event | None = None  # set once the question that is under way is answered
        self._models = (-math.inf, None)  # monotonic seconds, rows of loaded_models

    def call(self, method, target, headers, body, timeout_s, patience="PROXY_TIMEOUT"):
        """A Call ready for open(); headers are sent as they are.  patience is the option behind timeout_s."""
        return Call(self._request, method, target, headers, body, timeout_s or None, patience)

    def open(self, call):
        """The Answer, its body unread.  Raises UpstreamError."""
        try:
            return self._opener.open(call)
        except TIMEOUTS:
            raise UpstreamError("timeout",
                                f"LM Studio was silent for too long. Raise {call.patience}, or look at its "
                                "log for what it is doing") from None
        except BROKEN as error:
            raise UpstreamError("reset",
                                f"LM Studio closed the connection before it answered ({error_text(error)}). "
                                "Try again; its log may say why") from None

    def done(self, call, answer):
        """An answer was read to its end: keep its connection if it allows that."""
        sock = call.use(None)
        if answer.keeps and answer.over and not call.cancelled:
            self._connections.keep(call, sock)
        else:
            hang_up(sock)

    @staticmethod
    def drop(call):
        """Close a call's connection, whatever its state."""
        hang_up(call.use(None))

    def health(self, max_age_s=3.0, wait_s=2 * HEALTH_S):
        """Why LM Studio does not answer; empty when it does.  Remembered for max_age_s; what was known last
        where a new answer takes longer than wait_s."""
        with self._lock:
            asked, reason = self._health
            if time.monotonic() - asked < max_age_s:
                return reason
            asking = self._asking
            if asking is None:
                asking = self._asking = threading.Event()
                threading.Thread(target=self._refresh, args=(asking,), name="health",
                                 daemon=True).start()
        asking.wait(wait_s)
        with self._lock:
            return self._health[1]

    def _refresh(self, asking):
        """Body of the thread that asks for all who wait."""
        try:
            reason = self._ask()
            with self._lock:
                self._health = (time.monotonic(), reason)
        finally:
            with self._lock:
                self._asking = None
            asking.set()

    def loaded_models(self, max_age_s=60.0):
        """[(name, type, context length or None)] of the models that are loaded; None when LM Studio does not
        tell.  Remembered for max_age_s."""
        with self._lock:
            asked, models = self._models
        if time.monotonic() - asked < max_age_s:
            return models
        models = loaded_rows(self._get_json("/api/v0/models", 2.0))
        with self._lock:
            self._models = (time.monotonic(), models)
        return models

    def _get_json(self, path, timeout_s):
        """The JSON object at a path of LM Studio's; {} where there is none."""
        headers = [("Host", self.host), ("Accept", "application/json")]
        headers += [("Authorization", f"Bearer {self.token}")] if self.token else []
        call = self.call("GET", path, headers, None, timeout_s)
        try:
            answer = self.open(call)
            body = json_object(answer.read(4 * 1024 * 1024))
            self.done(call, answer)
            return body or {}
        except (UpstreamError, *BROKEN):
            self.drop(call)
            return {}

    def _ask(self):
        """Any answer but a server's failure counts: not every LM Studio may greet without its token."""
        call = self.call("GET", "/lmstudio-greeting", [("Host", self.host), ("Accept", "application/json")],
                         None, HEALTH_S)
        try:
            answer = self.open(call)
            answer.read(4096)
            self.done(call, answer)
        except UpstreamError as error:
            self.drop(call)
            silent = f"LM Studio at {self.base} takes connections but does not answer. Look at its log"
            return silent if error.kind == "timeout" else str(error)
        except BROKEN:
            self.drop(call)
            return f"what answers at {self.base} breaks off. Look at LM Studio's log"
        return "" if answer.status < 500 else f"{self.base} answers {answer.status} {answer.reason}"


def loaded_rows(body):
    """The loaded models in an answer of /api/v0/models (LM Studio since 0.3.6); None where it is no
    such answer."""
    if not isinstance(body.get("data"), list):
        return None
    return [(str(model.get("id")), str(model.get("type")), count(model, "loaded_context_length"))
            for model in listed(body["data"]) if model.get("state") == "loaded"]


def error_text(error):
    """An exception in a few words for a person."""
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was closed"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# === 7. HTTP: wire, walls, views, routes =====================================

HEAD_LIMIT = 64 * 1024  # bytes of a request's head
LINE_LIMIT = 8 * 1024  # bytes of its first line (RFC 9112, section 3: at least 8000)
HEADERS_LIMIT = 128
OWN_LIMIT = 16 * 1024  # bytes of a body for our own pages, which come before any key
HEAD_S = 30.0  # for a head to arrive; then 408
CLIENT_S = 60.0     # for the next request, for a byte of a body, for room in a client's socket
PING_S = 15.0
STATUS_REQUESTS = 10    # that are over, in /debug/status
LINGER_S, LINGER_BYTES = 2.0, 64 * 1024 * 1024  # what is read of a request that was refused
GRACE_S = 10.0  # for running requests at the end
STREAM_MARKS = ("text/event-stream", "application/x-ndjson")
FIRST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,40}) ([!-~]+) HTTP/(\d)\.(\d)")
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
LENGTH = re.compile(r"[0-9]{1,18}")
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[\w.\-]*)(?::\d{0,5})?", re.ASCII)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Request:
    """One request as it stood on the wire.  What stands below the line is filled in on its way to a view."""

    def __init__(self, method, target, version, headers):
        self.method, self.target = method, target  # the target in origin form, as sent
        self.version = version  # (1, 0) or (1, 1)
        self.headers = headers  # [(name, value)], order, case and repeats kept
        self.path, _, self.query_text = target.partition("?")
        self._named: dict[str, str] = {}
        for name, value in headers:
            key = name.lower()
            self._named[key] = f"{self._named[key]}, {value}" if key in self._named else value
        self.length, self.chunked = framing(self)  # of the body
        # --
        self.client = ""  # address
        self.encrypted = False
        self.body: Any = b""  # bytes-like
        self.arrived = 0.0  # clock when its last byte had come
        self.identity: Any = None  # whose key it carried, once it has been checked
        self.forwarded = False  # it goes on to LM Studio
        self.told = False  # the log has its line
        self.connection: Any = None  # the client's socket

    @property
    def query(self):
        return dict(urllib.parse.parse_qsl(self.query_text, keep_blank_values=True))

    def header(self, name, default=""):
        """The header's values, joined as RFC 9110, 5.3 has it."""
        return self._named.get(name, default)

    @property
    def has_body(self):
        return bool(self.length or self.chunked)


class Response(NamedTuple):
    """What a view gives.  body: bytes, or an iterable of bytes that is written as it comes and whose
    close(), where it has one, is called in every case.  It may have ready (True when the first piece need not
    be waited for) and relay(send), which is called between two pieces and may send some itself."""

    status: int
    headers: list
    body: Any = b""  # None where HTTP has none: HEAD, 204, 304
    reason: str | None = None
    date: bool = True  # add a Date where there is none; what LM Studio sent is left as it is


def json_response(value, status=200, headers=()):
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(status, [("Content-Type", "application/json; charset=utf-8"), *headers], body)


# --- 7.1 wire: bytes of a socket to requests ---------------------------------


class Wire:
    """The reading side of a client's connection, strict where leniency lets requests be smuggled
    (RFC 9112, section 11.2).  Raises HttpError for what is no proper HTTP, ClientLeft at its end."""

    def __init__(self, sock):
        self.sock = sock
        self.buffer = bytearray()
        self._timeout_s = 0.0  # of the socket

    def _set_timeout(self, seconds):
        """For each read and write from now on, the Handler's writes included."""
        if seconds != self._timeout_s:
            self._timeout_s = seconds
            set_timeout(self.sock, seconds)

    def _more(self, timeout_s):
        self._set_timeout(max(0.001, timeout_s))
        piece = self.sock.recv(PIECE)
        if not piece:
            raise ClientLeft
        self.buffer += piece

    def head(self):
        """The lines of the next request's head.  A client that says nothing gets ClientLeft."""
        self._skip_empty_lines()
        end = self.buffer.find(b"\r\n\r\n")
        deadline = time.monotonic() + HEAD_S if end < 0 else 0.0
        while end < 0:
            self._check_size()
            try:
                self._more(deadline - time.monotonic())
            except TIMEOUTS:
                raise HttpError(408, "head_timeout",
                                f"the head of the request did not arrive within {HEAD_S:.0f} s; "
                                "send it at once", close=True) from None
            finally:
                self._set_timeout(CLIENT_S)     # for what follows, our answer included
            end = self.buffer.find(b"\r\n\r\n")
        self._check_size(end)
        head = self.buffer[:end].decode("latin-1")
        del self.buffer[: end + 4]
        return head.split("\r\n")

    def _skip_empty_lines(self):
        """Empty lines before a request are skipped (RFC 9112, 2.2)."""
        try:
            while True:
                while self.buffer[:2] == b"\r\n":
                    del self.buffer[:2]
                if self.buffer not in (b"", b"\r"):
                    return
                self._more(CLIENT_S)
        except TIMEOUTS:
            raise ClientLeft from None

    def _check_size(self, end=None):
        line = self.buffer.find(b"\r\n", 0, LINE_LIMIT + 2)
        if line < 0 and len(self.buffer) > LINE_LIMIT:
            raise HttpError(414, "target_too_long", f"the request line is longer than {LINE_LIMIT} bytes",
                            close=True)
        if line < 0 and b"\n" in self.buffer:
            raise bad("a line ends in a bare LF")
        if (len(self.buffer) if end is None else end) > HEAD_LIMIT:
            raise HttpError(431, "head_too_large",
                            f"the head of the request is larger than {HEAD_LIMIT} bytes", close=True)

    def body(self, request, limit):
        """The body of a request, whole.  Raises HttpError 413 before more than limit is read."""
        if (request.length or 0) > limit:
            raise too_large(limit)
        if (request.header("expect") and request.version >= (1, 1) and request.has_body
                and not self.buffer):
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if request.chunked:
                return self._chunks(limit)
            return self._exactly(request.length) if request.length else b""
        except TIMEOUTS:
            raise HttpError(408, "body_timeout", "the body of the request stopped coming",
                            close=True) from None

    def _exactly(self, length):
        """length bytes, read into one buffer: a large body is not copied."""
        data = bytearray(length)
        have = min(length, len(self.buffer))
        data[:have] = self.buffer[:have]
        del self.buffer[:have]
        with memoryview(data) as view:
            while have < length:
                got = self.sock.recv_into(view[have:])
                if not got:
                    raise ClientLeft
                have += got
        return data

    def _chunks(self, limit):
        """A chunked body, decoded."""
        data, chunks = bytearray(), Chunks()
        while True:
            piece = bytes(self.buffer)
            self.buffer.clear()
            try:
                data += chunks.feed(piece)
            except ValueError as error:
                raise bad(error) from None
            if len(data) + chunks.left > limit:
                raise too_large(limit)
            if chunks.over:
                self.buffer += chunks.rest
                return data
            self._more(CLIENT_S)

    def linger(self):
        """Read what a refused client still sends, for a moment: closing at once would destroy the answer
        on its way (RFC 9112, 9.6)."""
        deadline, dropped = time.monotonic() + LINGER_S, 0
        with contextlib.suppress(OSError, ValueError):
            self.sock.shutdown(socket.SHUT_WR)
            while dropped < LINGER_BYTES and time.monotonic() < deadline:
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))
                got = len(self.sock.recv(PIECE))
                if not got:
                    return
                dropped += got


def bad(what):
    return HttpError(400, "bad_request", f"this is not proper HTTP: {what}", close=True)


def too_large(limit):
    remedy = "send less" if limit == OWN_LIMIT else "raise MAX_BODY_BYTES or send less"
    return HttpError(413, "body_too_large", f"the body is larger than {limit} bytes; {remedy}", close=True)


def parse_head(lines):
    """The Request of a head's lines, body not yet read.  Raises HttpError."""
    first = FIRST_LINE.fullmatch(lines[0])
    version = (int(first[3]), int(first[4])) if first else (0, 0)
    if first and version[0] != 1 or not first and re.search(r" HTTP/(?![01]\.\d$)\d+(?:\.\d+)?$",
                                                            lines[0][-20:]):
        raise HttpError(505, "http_version", "use HTTP/1.1", close=True)
    if not first:
        raise bad("the request line is malformed")
    method, target = first[1], first[2]
    if len(lines) - 1 > HEADERS_LIMIT:
        raise HttpError(431, "head_too_large", f"more than {HEADERS_LIMIT} headers", close=True)
    headers = headers_of(lines[1:])
    if method not in METHODS:
        raise HttpError(501, "method_unknown", f"the method {method} is not supported", close=True)
    if not target.startswith("/") or "#" in target:     # behind # Express reads a path otherwise
        raise bad("the request target must be a path, without a fragment")
    request = Request(method, target, min(version, (1, 1)), headers)
    host = request.header("host", None)  # of several, a list, which is none
    if host is None and version >= (1, 1) or host and not HOST.fullmatch(host):
        raise bad("exactly one Host header is needed")
    return request


def headers_of(lines):
    """[(name, value)] of header lines.  Raises HttpError."""
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN(name):
            raise bad("a header line is malformed")
        headers.append((name, value.strip(" \t")))
    if CONTROLS.search("".join(lines)):
        raise bad("a header holds a control character")
    return headers


def framing(request):
    """(Content-Length or None, True for a chunked body), one way of framing only (RFC 9112, 6.3)."""
    length, coding = request.header("content-length", None), request.header("transfer-encoding", None)
    if coding is not None and (length is not None or request.version < (1, 1)):
        raise bad("Transfer-Encoding goes with HTTP/1.1 and without Content-Length")
    if coding is not None and coding.lower() != "chunked":
        raise HttpError(501, "coding_unknown", "the only Transfer-Encoding supported is chunked", close=True)
    if length is not None and not LENGTH.fullmatch(length):     # a repeated one has a comma
        raise bad("Content-Length must be one number")
    if request.header("expect", "100-continue").lower() != "100-continue":
        raise HttpError(417, "expectation_unknown", "the only expectation supported is 100-continue",
                        close=True)
    return (None if length is None else int(length)), coding is not None


def keeps_alive(request):
    """True when the client wants the connection for further requests (RFC 9112, 9.3)."""
    options = listing(request.header("connection"))
    return "close" not in options and (request.version >= (1, 1) or "keep-alive" in options)


def listing(value):
    """The members of a header that is a list, in lower case."""
    return [part.strip().lower() for part in value.split(",")] if value else []


def head_bytes(status, reason, headers):
    """A response's head."""
    lines = [f"HTTP/1.1 {status} {reason}", *[f"{name}: {value}" for name, value in headers], "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace")


def reason_of(status):
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


# --- 7.2 watcher: clients that leave while nobody reads from them ------------


class Watcher:
    """One thread that notices when a client leaves while its handler waits for something else.

    Watching costs a request two dictionary operations; the thread looks at all sockets four times a
    second, so that a client that left is known within half a second.  A client that only closes its sending
    side has left, too: nginx and Node see it so, and a browser or an SDK that gives up looks like that."""

    TICK_S = 0.25

    def __init__(self):
        # socket -> callback.  No lock: what matters is who pops an item, and a dict's pop is atomic.
        self._watched = {}
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def watch(self, sock, callback):
        """Any thread.  Until forget(), callback() is called once if the client leaves."""
        self._watched[sock] = callback

    def forget(self, sock):
        """Any thread.  The client may leave as it likes."""
        self._watched.pop(sock, None)

    def _run(self):
        while True:
            time.sleep(self.TICK_S)
            for sock in those_left(list(self._watched)):
                callback = self._watched.pop(sock, None)
                if callback:
                    callback()


def those_left(sockets):
    """Those of the sockets whose clients left, also where bytes that nobody read come before the end.

    Linux says so by POLLRDHUP; elsewhere a look at the first bytes tells, unless a client has sent more."""
    mask = getattr(select, "POLLRDHUP", None)
    if mask is None:
        return [sock for sock in sockets if has_left(sock)]
    look, known = select.poll(), {}
    for sock in sockets:
        number = sock.fileno()
        if number >= 0:     # else its handler has closed it
            known[number] = sock
            look.register(number, mask)
    return [known[number] for number, _ in look.poll(0)]


def has_left(sock):
    """True when a client socket has ended; False when it holds bytes of a request or none, and when its
    handler has closed it.

    TLS says goodbye by an alert: a record of type 21, or in TLS 1.3 an encrypted one of 19 bytes."""
    try:
        if not readable(sock):
            return False
        first = socket.socket.recv(sock, 5, socket.MSG_PEEK)  # of the plain socket, below TLS
    except (BlockingIOError, ValueError):   # ValueError is readable's, for what is closed
        return False
    except OSError:
        return True
    goodbye = first[:1] == b"\x15" or first == b"\x17\x03\x03\x00\x13"
    return not first or isinstance(sock, ssl.SSLSocket) and goodbye


# --- 7.3 walls: who may do what ----------------------------------------------

SESSION = "lmgateway_session"
LOCAL_ONLY = "without a key only this machine is served: use http://127.0.0.1, or set GATEWAY_API_KEY"


class Identity(NamedTuple):
    """Whose request it is.  name is the key's; None where no key is asked for."""

    name: str | None
    rights: frozenset = frozenset(("infer", "view", "admin"))
    by_cookie: bool = False


class Key(NamedTuple):
    """A key that is accepted.  Only its digest is kept."""

    name: str
    digest: bytes
    rights: frozenset
    created: str = ""


KEYS_S = 0.5  # between two looks at the keys file


class KeyFile:
    """Minted keys: JSON of names, SHA-256 digests, rights and dates, readable by its owner only.

    A minted key has 160 random bits, so that a plain hash does not give it away."""

    def __init__(self, path):
        self.path = Path(path)
        self._lock = threading.Lock()  # held to read the file
        self._seen = None  # modification time and size when last read
        self._keys = None  # the Keys, None without a file
        self._asked = -math.inf  # clock when they were last looked at, set once they are there
        self._problem = ""  # that was said last

    def keys(self):
        """Any thread.  The Keys, read again when the file has changed; None when there is no file."""
        if time.monotonic() - self._asked >= KEYS_S:
            with self._lock:
                if time.monotonic() - self._asked >= KEYS_S:
                    self._refresh()
                    self._asked = time.monotonic()
        return self._keys

    def _refresh(self):
        try:
            found = os.stat(self.path)
            if (found.st_mtime_ns, found.st_size) != self._seen:
                self._keys = self.read()
                self._seen = (found.st_mtime_ns, found.st_size)
                self._problem = ""
        except FileNotFoundError:
            self._keys = self._seen and []  # a file that vanished opens no door
            self._seen = self._seen and (0, 0)      # it may come back as it was
        except (OSError, ConfigError) as error:
            if str(error) != self._problem:
                log.error("%s; the keys known so far go on", error)
            self._problem = str(error)
            self._keys = self._keys or []   # a file that cannot be read opens no door either

    def read(self):
        """The file's Keys.  Raises OSError, and ConfigError when it is damaged."""
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["keys"]
            return [Key(row["name"], bytes.fromhex(row["sha256"]), frozenset(row["rights"]),
                        row.get("created", "")) for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--keys-file {self.path}: damaged; mend it, or move it away and mint keys "
                              "anew") from None

    def write(self, keys):
        """Replace the file in one step.  Raises OSError."""
        rows = [{"name": key.name, "sha256": key.digest.hex(), "rights": sorted(key.rights),
                 "created": key.created} for key in keys]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".new")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()      # one that was left behind may have another mode
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w",
                  encoding="utf-8") as file:
            json.dump({"keys": rows}, file, indent=2)
        os.replace(draft, self.path)


RIGHTS = ("infer", "view",
          "admin")  # to ask models; to see /debug, /metrics; to load, unload, download models
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def mint_key():
    """A key in the form of LM Studio's own tokens, which its SDKs insist on (lmstudio-js,
    lmstudioAPIToken.ts)."""
    letters = "".join(secrets.choice(ALPHANUMERIC) for _ in range(28))
    return f"sk-lm-{letters[:8]}:{letters[8:]}"


def keys_path(config):
    """Where minted keys are kept."""
    if config.keys_file:
        return Path(config.keys_file)
    if os.name == "nt" and os.environ.get("APPDATA"):
        return Path(os.environ["APPDATA"], "lmgateway", "keys.json")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "lmgateway", "keys.json")


FREE_FAILURES = 3  # wrong keys an address may offer before it is made to wait
MOST_WAITING = 4  # wrong keys of one address that wait at once; then it is told to come later
FAILURES_S = 60.0  # after this they are forgotten
LONGEST_WAIT_S = 3.0


class Walls:
    """Addresses, origins and keys.  Any thread may call."""

    def __init__(self, config):
        self._config = config
        self._fixed = [Key(name, digest(key), frozenset(RIGHTS)) for name, key in config.api_key.items()]
        self._file = KeyFile(keys_path(config))
        # Methods of a dict are atomic, and nothing in the first two depends on two of them.
        self._sessions: dict = {}  # digest of the cookie -> Key
        self._proven: dict = {}  # (address, digest) of keys that were right
        self._lock = threading.Lock()  # guards the two below
        self._failures: dict = {}  # address -> (how many, monotonic seconds of the last)
        self._waiting: Counter[str] = Counter()  # address -> wrong keys that are made to wait

    @property
    def need_key(self):
        """True when a key is asked for: one is set, or a keys file is there."""
        return bool(self._fixed) or self._file.keys() is not None

    def _keys(self):
        return [*self._fixed, *(self._file.keys() or ())]

    def client_of(self, request):
        """The client's address; behind trusted proxies, the last that they name and that is not one of
        them."""
        address, trusted = request.client, self._config.trusted_proxies
        if trusted == ():   # None are all addresses
            return address
        named = [part.strip() for part in request.header("x-forwarded-for").split(",") if part.strip()]
        while named and within(address, trusted):
            address = re.sub(r"^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$", r"\1\2", named.pop())    # some add a port
        return address

    def admit_address(self, address):
        """Raises HttpError 403 for an address that the allowlist does not name."""
        if not within(address, self._config.allow):
            raise HttpError(403, "address_not_allowed",
                            f"{address} is not in IP_ALLOWLIST; add it there to let it in", close=True)

    def identify(self, request, query_key=False):
        """The Identity of a request.  Raises HttpError 401 and 429."""
        if not self.need_key:
            return Identity(None)
        offered = credentials(request, query_key)
        found = self._check(offered, request.client)
        if found:
            return Identity(found.name, found.rights)
        cookie = session_of(request)
        session = self._sessions.get(digest(cookie)) if cookie else None
        if session and session in self._keys():  # a revoked key's sessions end with it
            return Identity(session.name, session.rights, by_cookie=True)
        raise HttpError(401, "key_wrong" if offered else "key_needed",
                        "send a valid key as Authorization: Bearer KEY or X-API-Key: KEY",
                        [("WWW-Authenticate", "Bearer")])

    def _check(self, offered, address):
        """The Key among those offered; None after a pause where they are wrong.  Raises HttpError 429.

        While an address has its fill of wrong keys only those are looked at that were right from there."""
        given = [digest(key) for key in offered]
        if self._waiting[address] >= MOST_WAITING and not any((address, one) in self._proven
                                                              for one in given):
            raise HttpError(429, "too_many_attempts",
                            "too many wrong keys came from this address; wait a few seconds",
                            [("Retry-After", f"{LONGEST_WAIT_S:.0f}")])
        for one in given:
            found = self._find(one)
            if found:
                remember(self._proven, (address, one), True)
                return found
        if given:
            self._slow_down(address)
        return None

    def _find(self, given):
        """The Key of that digest, or None.  Every key is compared, in constant time."""
        found = None
        for key in self._keys():
            if hmac.compare_digest(given, key.digest):
                found = key
        return found

    def _slow_down(self, address):
        """Make an address that offers wrong keys wait, in its own thread; others go on."""
        now = time.monotonic()
        with self._lock:
            failures, last = self._failures.pop(address, (0, now))
            failures = 1 if now - last > FAILURES_S else failures + 1
            remember(self._failures, address, (failures, now))
            self._waiting[address] += 1
        if failures > FREE_FAILURES:
            time.sleep(min(LONGEST_WAIT_S, 0.1 * 2 ** (failures - FREE_FAILURES)))
        with self._lock:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    def open_session(self, key, address):
        """The cookie for a key; None for a wrong one.  Raises HttpError 429."""
        found = self._check([key], address)
        if found is None:
            return None
        cookie = secrets.token_urlsafe(32)
        remember(self._sessions, digest(cookie), found)
        return cookie

    def check_origin(self, request):
        """Raises HttpError 403 where a web page could be using this browser's reach (CSRF, DNS rebinding)."""
        host, config = host_of(request), self._config
        local_only = not self.need_key and (loopback(config.host) or not config.no_auth)
        if local_only and not loopback(host) and (host or request.version >= (1, 1)):
            raise HttpError(403, "host_not_local", LOCAL_ONLY)
        origin = request.header("origin")
        if request.method in ("GET", "HEAD") or not origin:
            return
        if origin.partition("://")[2] != request.header("host") and not self.allows_origin(origin):
            raise HttpError(403, "origin_not_allowed",
                            f"pages of {origin[:100]} may not do this; CORS_ORIGINS can let them in")

    def allows_origin(self, origin):
        """True when pages of this origin may call."""
        allowed = self._config.cors_origins
        return bool(origin) and origin != "null" and (origin in allowed or "*" in allowed)


def remember(table, name, value, limit=10_000):
    """table[name] = value, in a table that forgets its oldest beyond the limit."""
    table[name] = value
    while len(table) > limit:
        table.pop(next(iter(table)), None)


def within(address, ranges):
    """True when an address lies in one of the networks.  One that maps IPv4 into IPv6 counts as IPv4."""
    if ranges is None:
        return True
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in ranges)
    return False


def cors_headers(walls, request):
    """What lets pages of an allowed origin read an answer (Fetch, 3.3)."""
    origin = request.header("origin")
    if not walls.allows_origin(origin):
        return []
    return [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"),
            ("Access-Control-Expose-Headers", "*")]


def preflight(walls, request):
    """The answer to a browser that asks before it sends; Private Network Access included."""
    if not walls.allows_origin(request.header("origin")):
        raise HttpError(403, "origin_not_allowed",
                        "pages of this origin may not call; CORS_ORIGINS can let them in")
    asked = request.header("access-control-request-headers") or "authorization, x-api-key, content-type"
    headers = [*cors_headers(walls, request), ("Access-Control-Allow-Methods", ", ".join(METHODS)),
               ("Access-Control-Allow-Headers", asked), ("Access-Control-Max-Age", "600")]
    if request.header("access-control-request-private-network").lower() == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return Response(204, headers, None)


def digest(secret):
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def credentials(request, query_key=False):
    """The keys that a request offers, in the forms of the OpenAI SDKs, the Anthropic SDKs and EventSource."""
    scheme, _, token = request.header("authorization").partition(" ")
    offered = [token.strip()] if scheme.lower() == "bearer" else []
    offered.append(request.header("x-api-key"))
    if query_key and request.method in ("GET", "HEAD"):
        offered.append(request.query.get("api_key", ""))
    return [key for key in offered if key]


def host_of(request):
    """The host name of the Host header, without its port."""
    host = request.header("host")
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def cookies(value):
    """The name=value parts of a Cookie header."""
    return [part.strip() for part in value.split(";") if part.strip()]


def session_of(request):
    prefix = SESSION + "="
    return next((part[len(prefix):] for name, value in request.headers if name.lower() == "cookie"
                 for part in cookies(value) if part.startswith(prefix)), None)


# --- 7.4 forwarding ----------------------------------------------------------

ALIASES = re.compile(r"/(?:(?:chat/completions|completions|embeddings)/?"
                     r"|(?:models|responses|messages)(?:/.*)?)")
WITHHELD = HOP_BY_HOP | {"authorization", "x-api-key", "expect"}  # what stops here, credentials included
UPSTREAM_CODES = {"refused": "upstream_unreachable", "reset": "upstream_reset", "timeout": "upstream_timeout"}


class Unfinished(GatewayError):
    """An answer broke off: the client's connection is closed so that it cannot look complete."""


class Gateway:
    """What views may reach.  Built once in main()."""

    def __init__(self, config, hub, upstream, monitor=None, history=None):
        self.config, self.hub, self.upstream, self.monitor = config, hub, upstream, monitor
        self.history, self.server = history, None
        self.walls = Walls(config)
        self.watcher = Watcher()
        self.started, self._started = time.time(), time.monotonic()
        self.address = ""
        self.lan_urls = []
        self.volume = LogVolume(monitor.follower.directory, config.log_dir_warn) if monitor else None
        self.stopping = False  # the end has come: connections are not kept
        self.cutting_off = False    # running requests are cut: they had their time

    @property
    def uptime(self):
        """Seconds since it was built, whatever became of the clock since."""
        return round(time.monotonic() - self._started, 1)


def upstream_target(target, keys_are_set):
    """The target to forward: short OpenAI paths under /v1, and without our own ?api_key=."""
    path, mark, query = target.partition("?")
    if ALIASES.fullmatch(path):
        path = "/v1" + path
    if mark and keys_are_set:
        parts = [part for part in query.split("&")
                 if urllib.parse.unquote_plus(part.partition("=")[0]) != "api_key"]
        query, mark = "&".join(parts), "?" if parts else ""
    return path + mark + query


def upstream_headers(request, body, host, token=None):
    """The end-to-end headers of a request in their order, without the client's credentials."""
    dropped = WITHHELD.union(listing(request.header("connection")))
    headers = [] if request.header("host", None) is not None else [("Host", host)]
    for name, value in request.headers:
        key = name.lower()
        if key == "host":
            headers.append((name, host))
        elif key in ("content-length", "transfer-encoding"):    # one of the two, at most
            headers.append((name if key == "content-length" else "Content-Length", str(len(body))))
        elif key == "cookie" and SESSION in value:
            others = [part for part in cookies(value) if not part.startswith(SESSION + "=")]
            headers += [(name, "; ".join(others))] if others else []
        elif key not in dropped:
            headers.append((name, value))
    return [*headers, ("Authorization", f"Bearer {token}")] if token else headers


def client_headers(answer, cut):
    """The end-to-end headers of an answer, in order.  CORS is ours to say."""
    dropped = HOP_BY_HOP.union(listing(answer.header("connection")),
                               ("content-length",) if cut or answer.chunks else ())
    return [(name, value) for name, value in answer.headers
            if (key := name.lower()) not in dropped and not key.startswith("access-control-")]


def forward(gateway, request):
    """Any other path: LM Studio's answer, unchanged, metered where it is an inference."""
    upstream, target = gateway.upstream, upstream_target(request.target, gateway.walls.need_key)
    path = target.partition("?")[0].rstrip("/").lower()     # as Express compares paths
    dialect = DIALECTS.get(path) if request.method == "POST" else None
    asked = read_request(dialect, request.body) if dialect else Asked(body=request.body)
    patience = "PROXY_STREAM_TIMEOUT" if asked.stream else "PROXY_TIMEOUT"
    call = upstream.call(request.method, target,
                         upstream_headers(request, asked.body, upstream.host, upstream.token), asked.body,
                         getattr(gateway.config, patience.lower()) / 1000, patience)
    passage = Exchange(gateway, request, call, dialect, asked) if dialect else Passage(gateway, request, call)
    if dialect and asked.stream and gateway.config.prefill_comments:
        call.raw_headers = [row for row in call.raw_headers if row[0].lower() != "accept-encoding"]
        return Commented(passage, path == "/v1/messages").response()
    try:
        answer = passage.open()
        bodiless = request.method == "HEAD" or answer.status in (204, 304)
        if bodiless:
            passage.finish()
        headers = client_headers(answer, passage.cuts)
        return Response(answer.status, headers, None if bodiless else passage, answer.reason, date=False)
    except BaseException:
        passage.close()
        raise


class Passage:
    """One request on its way through, without metering: open() it, iterate over the answer's pieces as they
    come, and close() it in any case."""

    cuts = False  # True when the answer's bytes may become fewer

    def __init__(self, gateway, request, call):
        self._gateway, self._request, self._call = gateway, request, call
        self._answer: Any = None
        self._over = False

    def open(self):
        """LM Studio's Answer.  Raises HttpError 502 or 504, ClientLeft."""
        self._gateway.watcher.watch(self._request.connection, self._call.cancel)
        try:
            self._answer = self._gateway.upstream.open(self._call)
        except UpstreamError as error:
            if self._call.cancelled:
                self.close()
                raise ClientLeft from None
            self._stop()
            self.failed(str(error), UPSTREAM_CODES[error.kind])
            raise HttpError(504 if error.kind == "timeout" else 502, UPSTREAM_CODES[error.kind],
                            str(error)) from None
        return self._answer

    @property
    def ready(self):
        """True when the first piece will not have to be waited for."""
        return self._answer.ready

    def __iter__(self):
        """The pieces.  A request is over before its last piece leaves, so that whoever has the answer finds
        it counted.  Raises Unfinished where it breaks off, ClientLeft."""
        answer = self._answer
        try:
            for piece in answer.pieces():
                out = self.passed(piece)
                yield out + self.finish() if answer.over else out
        except BROKEN as error:
            if not self._call.cancelled:
                yield self.broke(error)
                raise Unfinished from None
        if self._call.cancelled:
            self.close()
            raise ClientLeft
        if not self._over:
            yield self.finish()

    def finish(self):
        """The answer is complete.  Gives bytes that were held back."""
        self._over = True
        self._gateway.watcher.forget(self._request.connection)
        self._gateway.upstream.done(self._call, self._answer)
        return b""

    def close(self):
        """Nobody wants more of it: unless it is over, the client left, or we failed it."""
        if not self._over:
            self._stop()
            fault = sys.exc_info()[1]
            if fault is None or isinstance(fault, (OSError, GatewayError, GeneratorExit)):
                self.left()
            else:
                self.failed(f"a fault in lmgateway ({error_text(fault)})", "internal_error")

    def cancel(self):
        """Any thread.  Ends the exchange with LM Studio, unless it is over."""
        self._call.cancel()

    def _stop(self):
        self._over = True
        self._gateway.watcher.forget(self._request.connection)
        self._gateway.upstream.drop(self._call)

    def passed(self, piece):
        return piece

    def broke(self, error):
        """The answer broke off.  Gives bytes that were held back."""
        self._stop()
        if isinstance(error, TIMEOUTS):
            self.failed("LM Studio was silent for too long", "upstream_timeout")
        else:
            self.failed(f"LM Studio's answer broke off before its end ({error_text(error)})",
                        "upstream_reset")
        return b""

    def failed(self, error, code):
        self._request.told = True
        log.warning("%s %s: %s", self._request.method, self._request.path, error)

    def left(self):
        self._request.told = True
        log.info("%s %s: the client left", self._request.method, self._request.path)


class Exchange(Passage):
    """One inference: a Passage with a record, a meter and the events of its beginning and end."""

    def __init__(self, gateway, request, call, dialect, asked):
        super().__init__(gateway, request, call)
        self._dialect, self._asked = dialect, asked
        self._meter: Any = None
        self.record = Record(gateway.hub.request_id(), time.time(), time.monotonic(), method=request.method,
                             path=request.path, target=call.selector.partition("?")[0].rstrip("/"),
                             dialect=dialect.name, client=request.client, key=request.identity.name,
                             agent=request.header("user-agent")[:200] or None, model_asked=asked.model,
                             messages=asked.messages, fingerprint=asked.fingerprint, stream=asked.stream,
                             size=asked.size, tools=asked.tools)
        self._told = -math.inf  # clock when listeners heard of its tokens

    def open(self):
        self._gateway.hub.begin(self.record)
        self.record.overhead_s = time.monotonic() - self._request.arrived
        answer = super().open()
        stream = answer.header("content-type").lower().startswith(STREAM_MARKS)
        self.cuts = self._asked.cut and stream
        self._meter = Meter(self._dialect, stream, self.cuts, answer.header("content-encoding"))
        return answer

    def passed(self, piece):
        now = time.monotonic()
        out = self._meter.feed(piece, now)
        self._tell(now)
        return out

    def relay(self, send):
        """Between two pieces: send on those that can be metered later, chunked as they come."""
        meter = self._meter
        while (meter.can_wait
               and self._answer.relay(send, meter.waiting, meter.PUT_OFF, self._told + COUNT_S)):
            meter.settle()
            self._tell(time.monotonic())

    def _tell(self, now):
        """Listeners hear of its tokens, COUNT_S after the last time."""
        meter = self._meter
        if meter.first is not None and now - self._told >= COUNT_S:
            self._told = now
            meter.settle()
            self._gateway.hub.generated(self.record, meter.pieces, meter.first)

    def finish(self):
        super().finish()
        held, answer = self._meter.end(), self._answer
        error = self._meter.usage.error
        if answer.status >= 400 and not error:
            error = f"LM Studio answered {answer.status} {answer.reason}"
        self._end(error, "upstream_error" if error else None)
        return held

    def broke(self, error):
        held = self._meter.end()
        super().broke(error)
        return held

    def comment(self):
        """Any thread.  What is known of a silent request, as an SSE comment (WHATWG HTML, 9.2.6)."""
        return self._gateway.hub.comment(self.record)

    def failed(self, error, code):
        self._end(error, code)

    def left(self):
        silent = self._meter and self._meter.stream and self._meter.first is None
        phase = ("before the answer" if self._answer is None
                 else "while the prompt was read" if silent else "during the answer")
        if self._gateway.cutting_off:
            self._end(f"lmgateway stopped {phase}", "gateway_stopped")
        else:
            self._end(f"the client left {phase}", "client_disconnected")

    def _end(self, error, operation):
        """Publish the end, and log it: once."""
        record, status = self.record, self._answer.status if self._answer else None
        if self._meter:
            self._meter.settle()
        state = ("done" if error is None else "abandoned" if operation == "client_disconnected" else "failed")
        self._gateway.hub.end(record, Outcome(state, status, error, operation, self._meter))
        usage, self._request.told = record.usage or {}, True
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s %s: %s, %.0f ms, %s + %s tokens%s",
                record.client, record.key or "-", record.path, record.model or record.model_asked or "-",
                record.status or "-", record.total_ms, usage.get("promptTokens", "?"),
                usage.get("completionTokens", "?"), f": {error}" if error else "")


class Commented:
    """A streaming Exchange that speaks while LM Studio is silent (PREFILL_COMMENTS): SSE comments, which
    every client ignores and which keep idle timers awake.

    LM Studio is spoken to in a thread of its own, whose pieces come through a queue.  Who has had no byte
    for SILENCE_S gets a head of ours; what fails after that is told inside the stream."""

    SILENCE_S = 5.0  # before each comment
    END, SILENCE = object(), object()

    def __init__(self, exchange, anthropic):
        self._exchange, self._anthropic = exchange, anthropic
        self._news: queue.Queue = queue.Queue(64)  # the Answer, its pieces, at last END or an exception
        self._closed = threading.Event()
        self._answer: Any = None
        self.ready = False
        threading.Thread(target=self._run, name="commented", daemon=True).start()

    def _run(self):
        """Body of the thread.  What goes wrong is raised where the connection is served."""
        try:
            with contextlib.closing(self._exchange) as exchange:
                self._put(exchange.open())
                for piece in exchange:
                    self._put(piece)
                self._put(self.END)
        except Exception as error:
            with contextlib.suppress(ClientLeft):
                self._put(error)

    def _put(self, item):
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._news.put(item, timeout=1.0)
        raise ClientLeft

    def close(self):
        """The client has all, or wants no more."""
        self._closed.set()
        self._exchange.cancel()

    def response(self):
        """LM Studio's own head where it comes in time, else one of ours.  Raises HttpError, ClientLeft."""
        news = self._next()
        if news is self.SILENCE:
            return Response(200, [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")], self)
        self._answer = news
        return Response(news.status, client_headers(news, True), self, news.reason, date=False)

    def _next(self):
        """The next item, SILENCE where none came.  Raises what the thread put in: ClientLeft, Unfinished,
        HttpError."""
        try:
            news = self._news.get(timeout=self.SILENCE_S)
        except queue.Empty:
            return self.SILENCE
        if isinstance(news, Exception):
            raise news
        return news

    def __iter__(self):
        """Comments until the first piece, then the pieces."""
        late, begun, other = self._answer is None, False, b""
        try:
            while (news := self._next()) is not self.END:
                if news is self.SILENCE:
                    yield b"" if begun else self._exchange.comment()
                elif isinstance(news, Answer):
                    self._answer = news
                elif late and not self._answer.header("content-type").startswith(STREAM_MARKS):
                    other += news   # no stream: it has to become an event of ours
                else:
                    begun = begun or bool(news)
                    yield news
        except HttpError as error:
            other = error_response(error, self._anthropic).body
        if other:
            yield stream_event(other, self._anthropic)


def stream_event(body, anthropic):
    """A body that is no stream as an event of one; errors as LM Studio and Anthropic send them in streams."""
    value = json_object(body) or {"error": str(body, "utf-8", "replace")[:LONGEST_ERROR]}
    if isinstance(value.get("error"), str):
        value = {**value, "error": {"message": value["error"]}}
    kind = {"type": "error"} if anthropic and "error" in value else {}
    name = b"event: error\n" if "error" in value else b""
    return name + b"data: " + json.dumps({**kind, **value}).encode() + b"\n\n"


# --- 7.5 views: the gateway's own pages --------------------------------------


def dashboard(gateway, request):
    nonce = secrets.token_urlsafe(16)
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
              "frame-ancestors 'none'")
    headers = [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store"),
               ("Vary", "Accept-Encoding"), ("Content-Security-Policy", policy),
               ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    page = DASHBOARD.replace(b"@NONCE@", nonce.encode())
    if "gzip" not in listing(request.header("accept-encoding")):
        return Response(200, headers, page)
    return Response(200, [*headers, ("Content-Encoding", "gzip")], gzip.compress(page, 6))


def health(gateway, request):
    return json_response({"status": "ok", "timestamp": gateway.hub.now(),
                          "uptime": gateway.uptime,
                          "version": VERSION})


def require_upstream(reason):
    """Raises HttpError 503 for a reason why LM Studio does not answer."""
    if reason:
        raise HttpError(503, "upstream_unreachable", reason, [("Retry-After", "5")])


def ready(gateway, request):
    require_upstream(gateway.upstream.health())
    return json_response({"status": "ready", "timestamp": gateway.hub.now()})


def greeting_page(gateway, request):
    """What LM Studio's own SDKs and `lms` look for before they connect (lms, createClient.ts: within
    500 ms)."""
    require_upstream(gateway.upstream.health(1.0, GREETING_S))
    return json_response({"lmstudio": True})


def event_stream(gateway, request):
    """Events as Server-Sent Events; ?events= filters, Last-Event-ID or ?since= resumes."""
    asked = [value for name, value in urllib.parse.parse_qsl(request.query_text) if name == "events"]
    names = frozenset(words(",".join(asked)))
    since = request.header("last-event-id") or request.query.get("since", "")
    return Response(200,
                    [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store"),
                     ("X-Accel-Buffering", "no")],
                    stream_frames(gateway.hub, since, names, gateway.watcher, request))


def stream_frames(hub, since, names, watcher, request):
    """Frames for one listener until the hub closes: connected, what it missed, what comes, pings."""
    with hub.listening() as bell, watching(watcher, request, bell) as left:
        cursor, gap = hub.cursor(since)
        last = hub.event_id(cursor)  # the id that the listener holds: repeated by what is no event
        message = json.dumps({"timestamp": hub.now(), "message": "Connected to lmgateway"})
        yield sse_frame(last, "connected", message, retry=f"retry: {RETRY_MS}\n")
        heard = time.monotonic()    # when the listener last had a byte
        while True:
            over = hub.closed or left.is_set()  # asked first: what was published before the end is still sent
            frames, cursor, lost = hub.read(cursor)
            wanted = [(seq, frame) for seq, (name, frame) in enumerate(frames, cursor - len(frames) + 1)
                      if not names or name in names]
            parts = [frame for _, frame in wanted]
            for missed in (gap, lost):
                if missed and frames:
                    parts.insert(0, sse_frame(last, "gap", gap_data(missed, hub.now())))
            if gap and not frames:
                parts.append(sse_frame(last, "gap", gap_data(gap, hub.now())))
            gap = None
            if parts:
                last = hub.event_id(wanted[-1][0]) if wanted else last
                yield b"".join(parts)
                heard = time.monotonic()
            if len(frames) == BATCH:
                continue
            if over:
                return
            if time.monotonic() - heard >= PING_S:
                yield sse_frame(last, "ping", json.dumps({"timestamp": hub.now()}))
                heard = time.monotonic()
            with contextlib.suppress(queue.Empty):
                bell.get(timeout=max(0.0, heard + PING_S - time.monotonic()))


@contextlib.contextmanager
def watching(watcher, request, bell):
    """Ring the bell when the listener leaves, so that its thread ends at once and not with the next ping."""
    left = threading.Event()

    def leave():
        left.set()
        ring(bell)

    watcher.watch(request.connection, leave)
    try:
        yield left
    finally:
        watcher.forget(request.connection)


def status_page(gateway, request):
    """What is going on, what the monitor reads and how far behind it is."""
    hub = gateway.hub
    running, over, model = hub.overview(STATUS_REQUESTS)
    total, errors, bindings = hub.totals()
    reason = gateway.upstream.health(10.0, GREETING_S)
    return json_response({"status": "degraded" if reason else "ok", "version": VERSION,
                          "timestamp": hub.now(), "uptime": gateway.uptime,
                          "currentOperation": operation_of(running), "activeModel": model,
                          "recentRequests": over, "running": running,
                          "totalRequests": total, "totalErrors": errors,
                          "bindings": bindings,
                          "gateway": {"address": gateway.address, "upstream": gateway.upstream.base,
                                      "lanUrls": gateway.lan_urls, "keyNeeded": gateway.walls.need_key,
                                      "history": gateway.history is not None},
                          "lmstudio": {"up": not reason, "reason": reason or None},
                          "log": {**log_status(gateway.monitor),
                                  **(gateway.volume.facts() if gateway.volume else {})},
                          "stream": {"clients": hub.listeners, "lastId": hub.last_id,
                                     "dropped": hub.dropped}})


def operation_of(running):
    """The furthest state of the running requests, in a word."""
    return max((record["state"] for record in running), key=STATES.index, default="idle")


def log_status(monitor):
    """The monitor's state.  Only the tail thread writes it; what is read here is a number or copied whole."""
    if monitor is None:
        return {"enabled": False}
    follower, parser = monitor.follower, monitor.parser
    moment = parser.last_moment
    return {"enabled": True, "directory": follower.directory,
            "file": follower.file.path if follower.file else None, "position": follower.position,
            "size": follower.size, "behindBytes": follower.behind, "bytesRead": monitor.read,
            "lastEntryAt": moment.utc if moment else None, "entries": parser.entries, "lines": parser.lines,
            "events": dict(parser.by_event), "generations": dict(parser.by_engine),
            "levels": dict(parser.by_level), "unknownLines": parser.unknown,
            "unknownSamples": parser.samples, "headlessLines": parser.headless, "faults": parser.faults,
            "verbose": bool(parser.by_level["DEBUG"]) if parser.entries else None,
            "problem": follower.problem}


def requests_list(gateway, request):
    return json_response({"requests": gateway.hub.shown(gateway.config.requests_kept)})


def request_detail(gateway, request):
    found = gateway.hub.detail(request.path.rpartition("/")[2])
    if found is None:
        raise HttpError(404, "request_unknown", "no such request among the latest; see /debug/requests")
    return json_response(found)


def metrics_json(gateway, request):
    """Figures for people and scripts; those of /metrics agree with them."""
    return json_response({"timestamp": gateway.hub.now(), "performance": gateway.hub.performance(),
                          "system": system_figures(gateway)})


def system_figures(gateway):
    """What this process takes; sizes in bytes, times in s.  A figure that the system does not tell is
    None."""
    return {"uptime": gateway.uptime, "version": VERSION,
            "python": platform.python_version(), "platform": platform.platform(), "pid": os.getpid(),
            "cpuSeconds": round(time.process_time(), 2), "memoryBytes": resident_bytes(),
            "threads": threading.active_count(), "streamClients": gateway.hub.listeners,
            "connections": gateway.server and gateway.server.connections}


def resident_bytes():
    """Memory of this process that is in RAM; None where /proc does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


def prometheus(gateway, request):
    """Text for Prometheus.  A scrape asks LM Studio for its models at most once a minute, because each
    question stands in the user's log."""
    text = gateway.hub.exposition(gauges_of(gateway))
    return Response(200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8"),
                          ("Cache-Control", "no-store")], text.encode("utf-8", "replace"))


def by_name(counts):
    """A Counter as a metric with one label.  It is copied whole first: its own thread may be counting."""
    return {(name,): count for name, count in sorted(dict(counts).items())}


def gauges_of(gateway):
    """{metric: {labels: value}} of what is as it is now, or counted elsewhere."""
    hub, monitor = gateway.hub, gateway.monitor
    up = not gateway.upstream.health(10.0, GREETING_S)
    models = gateway.upstream.loaded_models() if up else None
    gauges = {"lmstudio_up": {(): int(up)}, "lmstudio_gateway_sse_clients": {(): hub.listeners},
              "lmstudio_gateway_sse_events_total": by_name(hub.counts),
              "lmstudio_gateway_sse_dropped_total": {("slow",): hub.dropped},
              "lmstudio_gateway_sse_replays_total": by_name(hub.replays),
              "lmstudio_gateway_build_info": {(VERSION, platform.python_version()): 1},
              "process_start_time_seconds": {(): round(gateway.started, 3)}}
    if models is not None:
        gauges["lmstudio_loaded_models"] = {(): len(models)}
        gauges["lmstudio_model_loaded"] = {(name, kind): 1 for name, kind, _ in models}
        gauges["lmstudio_model_context_length_tokens"] = {
            (name, kind): context for name, kind, context in models if context}
    volume = gateway.volume.facts() if gateway.volume else {}
    for name, fact in (("lmstudio_log_directory_bytes", "directoryBytes"),
                       ("lmstudio_log_filesystem_free_bytes", "freeBytes")):
        gauges[name] = {(): volume[fact]} if volume.get(fact) is not None else {}
    return {**gauges, **(log_gauges(monitor) if monitor else {})}


def log_gauges(monitor):
    """The monitor's own figures.  Only the tail thread writes them; each is a number or copied whole."""
    parser, moment = monitor.parser, monitor.parser.last_moment
    return {"lmstudio_log_lines_total": by_name(parser.by_engine),
            "lmstudio_log_entries_total": by_name(parser.by_event),
            "lmstudio_cache_resets_total": by_name(parser.story.resets),
            "lmstudio_log_unparsed_entries_total": {(): parser.unknown},
            "lmstudio_log_bytes_read_total": {(): monitor.read},
            "lmstudio_log_rotations_total": by_name(monitor.switches),
            "lmstudio_log_read_lag_bytes": {(): monitor.follower.behind},
            "lmstudio_log_last_entry_timestamp_seconds": {(): moment.epoch} if moment else {}}


def usage_page(gateway, request):
    """What was used, by key, model or day, from the history; ?since=, ?format=csv."""
    if gateway.history is None:
        raise HttpError(404, "no_history", "no history is kept; start with --history FILE (HISTORY_FILE)")
    group = request.query.get("by", "key")
    if group not in GROUPS:
        raise HttpError(400, "by_unknown", f"by={group[:50]}: use one of {', '.join(GROUPS)}")
    try:
        since = since_epoch(request.query.get("since", ""), time.time())
    except ValueError as error:
        raise HttpError(400, "since_unknown", f"since: {error}") from None
    try:
        rows = gateway.history.usage(group, since)
    except HistoryError as error:
        raise HttpError(503, "history_unreadable", str(error)) from None
    if request.query.get("format") == "csv":
        return Response(200, [("Content-Type", "text/csv; charset=utf-8"), ("Cache-Control", "no-store")],
                        csv_text(rows, group).encode())
    return json_response({"by": group, "since": utc_text(since) if since else None, "rows": rows})


def csv_text(rows, group):
    """Rows as RFC 4180 has them; a cell that a spreadsheet would take for a formula begins with '."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([group, *(name for name, _ in SUMS)])
    for row in rows:
        writer.writerow([f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@") else value
                         for value in row.values()])
    return out.getvalue()


def login(gateway, request):
    """A session cookie for what a browser's EventSource reads."""
    kind = request.header("content-type").partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        key = dict(urllib.parse.parse_qsl(bytes(request.body).decode("utf-8", "replace"))).get("key", "")
    else:
        key = (json_object(bytes(request.body)) or {}).get("key", "")
    cookie = gateway.walls.open_session(key, request.client) if isinstance(key, str) else None
    if cookie is None:
        raise HttpError(401, "key_wrong", "that is no key of this gateway")
    attributes = f"{SESSION}={cookie}; Path=/; HttpOnly; SameSite=Strict" + (
        "; Secure" if request.encrypted else "")
    return json_response({"status": "ok"},
                         headers=[("Set-Cookie", attributes), ("Cache-Control", "no-store")])


class Route(NamedTuple):
    method: str
    path: str  # ending in /*: one more part
    view: Callable[[Gateway, Request], Response]
    access: str  # "open", "health", or the right that it needs
    about: str


ROUTES = (
    Route("GET", "/", dashboard, "open", "the dashboard"),
    Route("GET", "/health", health, "health", "this gateway is up"),
    Route("GET", "/ready", ready, "health", "LM Studio answers, else 503 with the reason"),
    Route("GET", "/lmstudio-greeting", greeting_page, "open",
          "LM Studio's own sign of life, while it answers"),
    Route("GET", "/debug/stream", event_stream, "view", "events as Server-Sent Events"),
    Route("GET", "/debug/status", status_page, "view", "what is going on, and how the log monitor does"),
    Route("GET", "/debug/requests", requests_list, "view", "the latest requests, newest first"),
    Route("GET", "/debug/requests/*", request_detail, "view", "one request with its timeline"),
    Route("GET", "/debug/metrics", metrics_json, "view", "figures as JSON: performance and system"),
    Route("GET", "/debug/usage", usage_page, "view", "what was used, by key, model or day (with --history)"),
    Route("GET", "/metrics", prometheus, "view", "figures for Prometheus"),
    Route("POST", "/login", login, "open", "a session cookie for a key"),
)
FOLDERS = frozenset(route.path.rpartition("/")[0] for route in ROUTES)
FORWARD = Route("*", "*", forward, "infer", "LM Studio's answer, unchanged")


def routes_table():
    """The README's table of routes; a test holds the README to it."""
    return "\n".join(["| route | needs | answer |", "|---|---|---|",
                      *(f"| `{row.method} {row.path.replace('*', 'ID')}` | {row.access} | {row.about} |"
                        for row in ROUTES),
                      f"| every other | {FORWARD.access} | {FORWARD.about} |"])


def find_route(request):
    """The Route of a request; FORWARD where no path of ours fits.  Raises HttpError 405."""
    folder, slash, last = request.path.rpartition("/")
    ours = [route for route in ROUTES if route.path in (request.path, folder + slash + "*") and last != "*"
            and (last or route.path == "/")] if folder in FOLDERS else []
    for route in ours:
        if request.method == route.method or (request.method == "HEAD" and route.method == "GET"):
            return route
    if ours and request.method != "OPTIONS":
        methods = ", ".join(route.method.replace("GET", "GET, HEAD") for route in ours)
        raise HttpError(405, "method_not_allowed", f"use {methods} here", [("Allow", methods)])
    return FORWARD


def error_response(error, anthropic=False):
    """An error of ours as JSON, in OpenAI's shape or in Anthropic's."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    detail = {"message": str(error), "type": kind, "code": error.code}
    body = {"type": "error", "error": detail} if anthropic else {"error": detail}
    return json_response(body, error.status, error.headers)


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               413: "request_too_large", 429: "rate_limit_error"}

# --- 7.6 server: connections to views ----------------------------------------


ADMIN = re.compile(r"/api/v1/models/(?:load|unload|download)\b")  # these change the machine, they ask nothing
RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER: close() sends no FIN but a RST


class Handler(socketserver.BaseRequestHandler):
    """One connection: its requests to views, their responses to the socket.  Nothing else is decided here."""

    server: Server

    def handle(self):
        threading.current_thread().name = "http"
        self.wire = Wire(self.request)
        with contextlib.suppress(ClientLeft, OSError, Unfinished):
            while self._serve_one():
                pass

    def _serve_one(self):
        """Answer one request.  True when the connection can take another."""
        self.target = ""  # what the request line asks for
        self.seen = None  # the Request, once its head is understood
        self.unread = True  # its body is still on the wire
        self.begun = False  # its answer is on the wire
        try:
            lines = self.wire.head()
            self.came = time.monotonic()
            self.target = (lines[0].split(" ") + [""])[1]
            self.server.reads(self.request)
            self.seen = parse_head(lines)
            return self._write(self._respond(self.server.gateway, self.seen), self.seen)
        except HttpError as error:
            return self._refuse(error)
        except (ClientLeft, Unfinished, OSError):
            raise
        except Exception:  # the end of the line for one request: a fault of ours must not end the server
            log.exception("a fault in lmgateway: please report it")
            return self._refuse(HttpError(500, "internal_error", "a fault in lmgateway; its log says more",
                                          close=True))
        finally:
            self.server.rests(self.request)

    def _refuse(self, error):
        """Send an error of ours.  True when the connection can take another request."""
        request: Any = self.seen
        if self.begun:
            raise Unfinished
        self.server.gateway.hub.reject(error.code)
        response = error_response(error, upstream_target(self.target, False).startswith("/v1/messages"))
        close = error.close or request is None or self.unread and request.has_body
        if request:
            response.headers.extend(cors_headers(self.server.gateway.walls, request))
        alive = self._write(response, request, close)
        if close:
            self.wire.linger()
        return alive

    def _respond(self, gateway, request):
        """The Response to a request after all walls."""
        walls = gateway.walls
        request.client, request.connection = self.client_address[0], self.request
        request.client = walls.client_of(request)
        request.encrypted = isinstance(self.request, ssl.SSLSocket)
        walls.admit_address(request.client)
        if request.method == "OPTIONS" and request.header("access-control-request-method"):
            return preflight(walls, request)
        if "websocket" in listing(request.header("upgrade")):   # before any key: those SDKs cannot send one
            raise HttpError(501, "upgrade_unsupported",
                            "WebSocket connections (LM Studio's SDKs and lms) are not passed on: "
                            "use the REST API, or connect to LM Studio itself")
        route = find_route(request)
        request.forwarded = route is FORWARD
        keyed = walls.need_key and credentials(request)
        if not keyed:
            walls.check_origin(request)
        request.identity = self._identify(request, route)
        if keyed and (request.identity.name is None or request.identity.by_cookie):     # by no key of these
            walls.check_origin(request)
        limit = gateway.config.max_body if request.forwarded else OWN_LIMIT
        request.body, request.arrived = self.wire.body(request, limit), time.monotonic()
        self.unread = False
        self.server.works(self.request, route.view)
        response = route.view(gateway, request)
        response.headers.extend(cors_headers(walls, request))
        return response

    def _identify(self, request, route):
        """Whose request it is.  Raises HttpError 401, and 403 for a key without the right."""
        gateway = self.server.gateway
        if route.access == "open" or route.access == "health" and not gateway.config.require_auth_for_health:
            return Identity(None)
        identity = gateway.walls.identify(request, query_key=request.path.startswith("/debug/"))
        right = route.access
        if right == "infer" and "admin" not in identity.rights and changes_machine(request):
            right = "admin"
        if right in RIGHTS and right not in identity.rights:
            raise HttpError(403, "right_missing",
                            f"the key {identity.name} has no right to {right}; mint one with "
                            f"--new-key NAME --rights {right}")
        return identity

    def _write(self, response, request, close=False):
        """Send a response.  True when the connection can take another request."""
        body, headers = response.body, list(response.headers)
        alive = bool(request) and keeps_alive(request) and not close and not self.server.gateway.stopping
        whole, no_body = isinstance(body, (bytes, bytearray)), bool(request) and request.method == "HEAD"
        chunked = False
        if response.date:
            headers.append(("Date", http_date()))
        if whole:
            headers.append(("Content-Length", str(len(body))))
        elif body is not None and "content-length" not in [name.lower() for name, _ in headers]:
            chunked = request.version >= (1, 1)
            alive = alive and chunked
            headers += [("Transfer-Encoding", "chunked")] if chunked else []
        if not alive:
            headers.append(("Connection", "close"))
        elif request.version < (1, 1):
            headers.append(("Connection", "keep-alive"))
        reason = response.reason if response.reason is not None else reason_of(response.status)
        head = head_bytes(response.status, reason, headers)
        self.begun = True
        try:
            if whole or body is None:
                self.request.sendall(head if no_body else head + (body or b""))
            else:
                self._send_iterable(head, body, chunked, no_body)
        finally:
            self._note(request, response.status)
        return alive

    def _note(self, request, status):
        """One line a request: at info what was forwarded or refused, at debug what we answer ourselves."""
        if request and not request.told:
            level = logging.INFO if request.forwarded or status >= 400 else logging.DEBUG
            name = request.identity.name if request.identity else None
            log.log(level, "%s %s %s %s %d %.0f ms", request.client or self.client_address[0], name or "-",
                    request.method, request.path[:200], status, 1000 * (time.monotonic() - self.came))

    def _send_iterable(self, head, body, chunked, no_body):
        try:
            if no_body:
                self.request.sendall(head)
            else:
                self._write_pieces(head, body, chunked)
        finally:
            if hasattr(body, "close"):
                body.close()

    def _write_pieces(self, head, pieces, chunked):
        """The head, then each piece in one write the moment it comes.  The head waits for the first piece
        only where that is there already."""
        sock, relay = self.request, chunked and getattr(pieces, "relay", None)
        if not getattr(pieces, "ready", False):
            sock.sendall(head)
            head = b""
        try:
            for piece in pieces:
                if piece or head:
                    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece
                    sock.sendall(head + framed)
                    head = b""
                    if relay:
                        relay(sock.sendall)
        except Unfinished:
            if not chunked:     # a connection that ends in peace could be taken for the end of the body
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()
            raise
        if chunked:
            sock.sendall(head + b"0\r\n\r\n")
        elif head:
            sock.sendall(head)


def changes_machine(request):
    """True when it loads, unloads or downloads a model, however its path is spelled."""
    path = re.sub("/+", "/", urllib.parse.unquote(request.path)).lower()
    return request.method not in ("GET", "HEAD") and bool(ADMIN.match(path))


def http_date():
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())


class Server(http.server.ThreadingHTTPServer):
    """Carries the gateway to its handlers, and bounds how many connections there are."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"   # there it would let two servers share a port,
    allow_reuse_port = False                # which this would do elsewhere

    def __init__(self, gateway, host, port, context=None):
        self.gateway, self._context = gateway, context  # an ssl.SSLContext, or None for plain HTTP
        # No lock: each step is one operation of a dict, which is atomic, and each socket is in one of them.
        self._resting: dict = {}        # sockets without a request, the longest resting first
        self._reading: dict = {}        # those whose request is still coming
        self._working: dict = {}
        self.ticked = time.monotonic()  # when the accept loop last came round
        self._streaming: dict = {}      # those that listen to events
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)    # HTTPServer's asks the DNS for our name

    def service_actions(self):
        self.ticked = time.monotonic()

    def get_request(self):
        """A new connection.  A TLS handshake is left to its handler: a slow one must not hold up others."""
        sock, address = super().get_request()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that went off says no goodbye
        if self._context:
            sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    @property
    def port(self):
        return self.server_address[1]

    @property
    def working(self):
        return len(self._working) + len(self._reading)

    @property
    def connections(self):
        return len(self._resting) + self.working

    def process_request(self, request, client_address):
        """A connection was accepted.  When there are too many, the one that has rested longest gives way, or
        the one that has been sending its request for longest; where all work, the new one."""
        if self.connections + len(self._streaming) >= self.gateway.config.max_connections:
            for sock in [*self._resting, *self._reading][:1] or [request]:
                self._resting.pop(sock, None)   # so that the next one takes another
                self._reading.pop(sock, None)
                shut(sock)
        self._resting[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        for state in (self._resting, self._reading, self._working, self._streaming):
            state.pop(request, None)
        super().shutdown_request(request)

    def reads(self, request):
        """The head of a request is there: its connection no longer rests."""
        self._resting.pop(request, None)
        self._reading[request] = None

    def works(self, request, view):
        """Its request has been read whole."""
        self._reading.pop(request, None)
        (self._streaming if view is event_stream else self._working)[request] = None

    def rests(self, request):
        """Its request has been answered."""
        self._reading.pop(request, None)
        self._working.pop(request, None)
        self._streaming.pop(request, None)
        self._resting[request] = None

    def handle_error(self, request, client_address):
        log.debug("connection from %s ended: %s", client_address[0], sys.exc_info()[1])

    def finish_requests(self, seconds):
        """The end: running requests may finish for that long, then they are cut, then the event streams,
        which have told of them, end.  Connections without a request are closed at once."""
        self.gateway.stopping = True
        self.server_close()     # the port is free for the next one
        for sock in list(self._resting):
            shut(sock)
        wait_until(lambda: not self.working, seconds)
        self.gateway.cutting_off = True
        for sock in [*self._reading, *self._working]:
            shut(sock)
        wait_until(lambda: not self.working, 1.0)
        self.gateway.hub.close()
        wait_until(lambda: not self._streaming, 1.0)


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


def shut(sock):
    """Any thread.  Ends a connection; its handler notices.  Below TLS, whose objects are the handler's."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


# === 8. DEMO: an imitation of LM Studio ======================================
# Answers inferences in each dialect as LM Studio does and writes the log that the newest llama.cpp engine
# writes.  It serves --demo and the tests; nothing here is used beside the real LM Studio.

DEMO_MODELS = ("demo/kestrel-8b", "demo/wren-2b")
DEMO_TEXT = ("The lamp on the harbour wall turns slowly and the boats come home one by one while somebody "
             "upstairs reads aloud from a letter about copper, rivers and the price of bread.")
DEMO_WORDS = DEMO_TEXT.split()
DEMO_PROMPTS = ("Summarise the minutes of the garden club.", "Why is the sky dark at night?",
                "Write a haiku about a patient printer.", "Which of these invoices is overdue?")


class DemoLog:
    """LM Studio's log directory, written as LM Studio writes it: whole entries, the file opened for each."""

    def __init__(self, directory):
        self.directory = directory
        self._lock = threading.Lock()  # entries do not mix
        self._started = time.monotonic()
        self._tasks = itertools.count(1)

    def task(self):
        return next(self._tasks)

    def write(self, level, text, tag=""):
        """Append one entry; its continuation lines are in text."""
        now = time.localtime()
        path = Path(self.directory, time.strftime("%Y-%m", now), time.strftime("%Y-%m-%d.1.log", now))
        space = "" if tag or text.startswith("[") else " "
        label = f"[{tag}] " if tag else ""
        entry = f"[{time.strftime('%Y-%m-%d %H:%M:%S', now)}][{level}]{space}{label}{text}\n"
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(entry)

    def request(self, path, body):
        shown = json.dumps(body, indent=2, ensure_ascii=False)
        self.write("DEBUG", f"Received request: POST to {path} with body {shown}")

    def engine(self, *lines):
        """One entry of engine lines, each after the engine's clock."""
        us = int(1e6 * (time.monotonic() - self._started))
        clock = f"{us // 60_000_000}.{us // 1_000_000 % 60:02}.{us // 1000 % 1000:03}.{us % 1000:03} I "
        self.write("DEBUG", "\n".join(clock + line for line in lines))


class NoLog(DemoLog):
    """Of a completion that is no chat, the log has the request alone."""

    def write(self, level, text, tag=""):
        pass


def demo_texts(body):
    """What a request of any dialect asks, as a list of texts."""
    asked = body.get("messages") or body.get("input") or body.get("prompt")
    asked = [asked] if isinstance(asked, str) else asked if isinstance(asked, list) else []
    return [str(item.get("content") if isinstance(item, dict) else item) for item in asked]


class DemoRun:
    """One answer in the imitation: the same figures in it and in its log."""

    def __init__(self, server, path, body):
        self.log = server.demo_log if DIALECTS[path].joined else NoLog(server.demo_log.directory)
        self.server, self.path, self.body = server, path, body
        self.model = body.get("model") if body.get("model") in DEMO_MODELS else DEMO_MODELS[0]
        self.stream = body.get("stream") is True
        self.created = int(time.time())
        self.id = "chatcmpl-" + secrets.token_hex(12)
        self.texts = demo_texts(body)
        self.prompt = max(40, server.prompt_tokens or 400 + 7 * sum(map(len, self.texts)))
        self.cached = int(self.prompt * server.cached_share)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("max_output_tokens")
        self.completion = (min(server.answer_tokens, limit) if isinstance(limit, int) and limit > 0
                           else server.answer_tokens)
        self.task = server.demo_log.task()
        self.slot = f"id  {self.task % 4} | task {self.task} | "

    def received(self):
        self.server.demo_log.request(self.path, self.body)
        self.log.write("INFO", f"Running chat completion on conversation with {len(self.texts)} messages.",
                       self.model)
        if self.stream:
            self.log.write("INFO", "Streaming response...", self.model)
        elif self.path == "/v1/responses":
            self.log.write("INFO", "Generating synchronous v1/responses response...", self.model)

    def read_prompt(self, alive):
        """The prompt phase, in steps of a batch; stops when alive() is False."""
        self.log.engine(f"slot launch_slot_: id  {self.task % 4} | task -1 | sampler params:\n"
                        " repeat_last_n = 64, repeat_penalty = 1.000, presence_penalty = 0.000\n"
                        " top_k = 40, top_p = 0.950, min_p = 0.050, temp = 0.700\n"
                        " mirostat = 0, mirostat_lr = 0.100, mirostat_ent = 5.000")
        self.log.engine(f"slot launch_slot_: {self.slot}processing task, is_child = 0",
                        f"slot   operator(): {self.slot}new prompt, n_ctx_slot = 8192, n_keep = 20, "
                        f"task.n_tokens = {self.prompt}",
                        f"slot   operator(): {self.slot}cached n_tokens = {self.cached}, memory_seq_rm "
                        f"[{self.cached}, end)")
        self.progress(0)
        steps = self.server.prompt_steps
        for step in range(1, steps + 1):
            if not alive() or self.server.pause(self.server.step_s):
                return False
            self.progress(100 * (self.cached + (self.prompt - self.cached) * step / steps) / self.prompt)
        self.log.engine(f"slot init_sampler: {self.slot}init sampler, took 0.33 ms, "
                        f"tokens: text = {self.prompt}, total = {self.prompt}")
        return True

    def progress(self, percent):
        self.log.write("INFO", f"Prompt processing progress: {percent:.1f}%", self.model)

    def tokens(self, alive):
        """The words of the answer, one after the other at the imitation's speed."""
        for count in range(self.completion):
            if not alive() or self.server.pause(self.server.token_s):
                return
            yield DEMO_WORDS[count % len(DEMO_WORDS)] + " "

    def timing(self, name, spent_ms, tokens):
        each_ms, speed = spent_ms / max(1, tokens), 1000 * tokens / spent_ms
        return (f"slot print_timing: {self.slot}{name} = {spent_ms:10.2f} ms / {tokens:5} tokens "
                f"({each_ms:8.2f} ms per token, {speed:8.2f} tokens per second)")

    def finished(self):
        """The engine's timings and the app's last line."""
        fresh = self.prompt - self.cached
        read_ms = max(0.01, 1000 * self.server.step_s * self.server.prompt_steps)
        write_ms = max(0.01, 1000 * self.server.token_s * self.completion)
        self.log.engine(self.timing("prompt eval time", read_ms, fresh),
                        self.timing("       eval time", write_ms, self.completion),
                        f"slot print_timing: {self.slot}      total time = {read_ms + write_ms:10.2f} ms / "
                        f"{fresh + self.completion:5} tokens",
                        f"slot      release: {self.slot}stop processing: n_tokens = "
                        f"{self.prompt + self.completion - 1}, truncated = 0",
                        "srv  update_slots: all slots are idle")
        if self.stream:
            self.log.write("INFO", "Finished streaming response", self.model)
        elif self.path == "/v1/responses":
            shown = json.dumps(response_whole(self, ""), indent=2)
            self.log.write("INFO", f"Generated synchronous v1/responses response: {shown}", self.model)
        else:
            self.log.write("INFO", "Model generated tool calls: []", self.model)
            whole = native_whole if self.path == "/api/v1/chat" else chat_whole
            shown = json.dumps(whole(self, ""), indent=2)
            self.log.write("INFO", f"Generated prediction: {shown}", self.model)

    def abandoned(self):
        self.log.write("INFO",
                       "Client disconnected. Stopping generation... (If the model is busy processing the "
                       "prompt, it will finish first.)", SERVER_TAG)
        self.log.engine(f"srv          stop: cancel task, id_task = {self.task}",
                        f"slot      release: {self.slot}stop processing: n_tokens = {self.prompt}, "
                        "truncated = 0")

    def usage(self, prompt="prompt_tokens", completion="completion_tokens"):
        return {prompt: self.prompt, completion: self.completion,
                "total_tokens": self.prompt + self.completion}

    def choice(self, kind, finish, **said):
        """A body of OpenAI's with one choice."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.model,
                "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}

    def last_chunk(self, kind, **said):
        """The end of a stream of OpenAI's."""
        yield "", self.choice(kind, "stop", **said)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield "", {**self.choice(kind, None), "choices": [], "usage": self.usage()}
        yield "", None


# How each dialect says an answer: as a body, and as a stream's events, (name, data), the words as they come.

def chat_whole(run, text):
    message = {"role": "assistant", "content": text, "tool_calls": []}
    return {**run.choice("chat.completion", "stop", message=message), "usage": run.usage(), "stats": {}}


def chat_events(run, words):
    kind = "chat.completion.chunk"
    for word in words:
        yield "", run.choice(kind, None, delta={"role": "assistant", "content": word})
    yield from run.last_chunk(kind, delta={})


def completion_whole(run, text):
    return {**run.choice("text_completion", "stop", text=text), "usage": run.usage(), "stats": {}}


def completion_events(run, words):
    for word in words:
        yield "", run.choice("text_completion", None, text=word)
    yield from run.last_chunk("text_completion", text="")


def response_whole(run, text, over=True):
    item = {"id": f"msg_{run.task}", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}]}
    return {"id": f"resp_{run.id[9:]}", "object": "response", "created_at": run.created, "model": run.model,
            "status": "completed" if over else "in_progress", "error": None, "output": [item] if over else [],
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
            "usage": run.usage("input_tokens", "output_tokens") if over else None}


def response_events(run, words):
    numbers, text = itertools.count(), ""

    def event(name, **data):
        return f"response.{name}", {"sequence_number": next(numbers), **data}

    def part(name, **data):
        return event(name, item_id=f"msg_{run.task}", output_index=0, content_index=0, **data)

    yield event("created", response=response_whole(run, "", over=False))
    (item,) = response_whole(run, "")["output"]
    yield event("output_item.added", output_index=0, item={**item, "status": "in_progress", "content": []})
    yield part("content_part.added", part=item["content"][0])
    for word in words:
        text += word
        yield part("output_text.delta", delta=word)
    whole = response_whole(run, text)
    yield part("output_text.done", text=text)
    yield part("content_part.done", part=whole["output"][0]["content"][0])
    yield event("output_item.done", output_index=0, item=whole["output"][0])
    yield event("completed", response=whole)


def message_whole(run, text):
    return {"id": f"msg_{run.id[9:]}", "type": "message", "role": "assistant", "model": run.model,
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": run.prompt, "output_tokens": run.completion}}


def message_events(run, words):
    yield "message_start", {"message": {**message_whole(run, ""), "content": [], "stop_reason": None,
                                        "usage": {"input_tokens": run.prompt, "output_tokens": 0}}}
    yield "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
    for word in words:
        yield "content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": word}}
    yield "content_block_stop", {"index": 0}
    yield "message_delta", {"delta": {"stop_reason": "end_turn", "stop_sequence": None},
                            "usage": {"output_tokens": run.completion}}
    yield "message_stop", {}


def native_whole(run, text):
    return {"model_instance_id": run.model, "output": [{"type": "message", "content": text}],
            "stats": {"input_tokens": run.prompt, "total_output_tokens": run.completion,
                      "reasoning_output_tokens": 0, "tokens_per_second": round(1 / run.server.token_s, 2),
                      "time_to_first_token_seconds": run.server.step_s * run.server.prompt_steps},
            "response_id": f"resp_{run.id[9:]}"}


def native_events(run, words):
    text = ""
    yield "chat.start", {"model_instance_id": run.model}
    yield "message.start", {}
    for word in words:
        text += word
        yield "message.delta", {"content": word}
    yield "message.end", {}
    yield "chat.end", {"result": native_whole(run, text)}


DEMO_SPEECH = {  # path -> (body, events)
    "/v1/chat/completions": (chat_whole, chat_events),
    "/api/v0/chat/completions": (chat_whole, chat_events),
    "/v1/completions": (completion_whole, completion_events),
    "/v1/responses": (response_whole, response_events),
    "/v1/messages": (message_whole, message_events),
    "/api/v1/chat": (native_whole, native_events),
}


def demo_embeddings(body):
    """A vector for each text, always the same; as base64 where the client wants it (OpenAI's SDK does)."""
    vectors = []
    for text in demo_texts(body):
        source = random.Random(text)
        vector = [source.uniform(-0.1, 0.1) for _ in range(128)]
        packed = base64.b64encode(struct.pack("<128f", *vector)).decode()
        vectors.append(packed if body.get("encoding_format") == "base64" else vector)
    tokens = sum(len(text) // 4 + 1 for text in demo_texts(body))
    return {"object": "list", "model": DEMO_MODELS[0],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(vectors)]}


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """The imitation's answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    server: DemoServer

    def do_GET(self):
        if self.path == "/lmstudio-greeting":
            return self._json({"lmstudio": True})
        if self.path in ("/v1/models", "/api/v0/models"):
            self.server.demo_log.write("DEBUG", f"Received request: GET to {self.path}")
            self.server.demo_log.write("INFO", f"Returning {len(DEMO_MODELS)} models from v1 API")
            models = [{"id": name, "object": "model", "owned_by": "organization_owner"}
                      for name in DEMO_MODELS]
            return self._json({"data": models, "object": "list"})
        return self._unexpected()

    def do_POST(self):
        body = json_object(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        path = self.path.partition("?")[0]
        if path not in DEMO_SPEECH and path != "/v1/embeddings":
            return self._unexpected()
        if body is None or not demo_texts(body):
            return self._json({"error": "a field is required: 'messages', 'input' or 'prompt'"}, 400)
        if path == "/v1/embeddings":
            self.server.demo_log.request(path, body)
            return self._json(demo_embeddings(body))
        run = DemoRun(self.server, path, body)
        run.received()
        whole, events = DEMO_SPEECH[path]
        with self.server.engine:  # one at a time, the others wait
            return self._stream(run, events) if run.stream else self._whole(run, whole)

    def _whole(self, run, whole):
        if run.read_prompt(self._alive):
            content = "".join(run.tokens(self._alive))
            if self._alive():
                run.finished()
                return self._json(whole(run, content.strip()))
        return self._abandon(run)

    def _stream(self, run, events):
        self.send_response(200)
        self.send_header("X-Powered-By", "Express")
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        try:
            if not run.read_prompt(self._alive):
                return self._abandon(run)
            for name, data in events(run, run.tokens(self._alive)):
                if not self._alive():
                    return self._abandon(run)
                self._event(name, data)
            run.finished()
            self.wfile.write(b"0\r\n\r\n")
            return None
        except OSError:
            return self._abandon(run)

    def _event(self, name, data):
        """An event as a chunk; one with a name has it inside, too; no data are OpenAI's [DONE]."""
        text = "[DONE]" if data is None else json.dumps({"type": name, **data} if name else data)
        event = (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
        self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
        self.wfile.flush()

    def _alive(self):
        if self.server.stopping.is_set():
            return False
        return not has_left(self.connection)

    def _abandon(self, run):
        run.abandoned()
        self.close_connection = True

    def _json(self, value, status=200):
        data = json.dumps(value, indent=2).encode()
        self.send_response(status)
        self.send_header("X-Powered-By", "Express")
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _unexpected(self):
        """LM Studio's answer to a path that it does not know: 200 with an error (all versions up to
        1.1.7)."""
        what = f"Unexpected endpoint or method. ({self.command} {self.path})"
        self.server.demo_log.write("ERROR", what + ". Returning 200 anyway")
        self._json({"error": what})

    def log_message(self, format, *args):
        pass


class DemoServer(http.server.ThreadingHTTPServer):
    """The imitation on a port of its own.  Its speed is set by the fields; it serves from start to stop()."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory, step_s=0.35, token_s=0.03):
        super().__init__(("127.0.0.1", 0), DemoHandler)
        self.demo_log = DemoLog(directory)
        self.engine = threading.Semaphore(1)
        self.stopping = threading.Event()
        self.pause = self.stopping.wait
        self.step_s, self.token_s = step_s, token_s
        self.prompt_steps, self.prompt_tokens, self.answer_tokens, self.cached_share = 6, 0, 60, 0.3

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self):
        self.demo_log.write("INFO", f"Success! HTTP server listening on port {self.server_address[1]}",
                            SERVER_TAG)
        threading.Thread(target=self.serve_forever, args=(0.05,), name="demo-server", daemon=True).start()

    def stop(self):
        self.stopping.set()
        self.shutdown()
        self.server_close()


def demo_traffic(address, key, pause):
    """Thread body: a little traffic of its own, until pause(seconds) returns True.  It begins at once with
    a short answer; some clients leave."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for number in itertools.count():
        if pause(random.uniform(1.5, 4.0) if number else 0.3):
            return
        body = {"model": DEMO_MODELS[number % 2], "stream": number % 3 != 2,
                "max_tokens": random.randrange(20, 90) if number else 20,
                "messages": [{"role": "system", "content": "You are brief."} for _ in range(number % 2)]
                + [{"role": "user", "content": random.choice(DEMO_PROMPTS) * random.randrange(1, 5)}]}
        sent = urllib.request.Request(address + "/v1/chat/completions", json.dumps(body).encode(),
                                      {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        with contextlib.suppress(*BROKEN), opener.open(sent, timeout=60) as answer:
            answer.read(700 if number % 7 == 6 else None)


# === 9. COMMAND ==============================================================

# --- 9.1 output, and our own log ----------------------------------------------


def lenient_streams():
    """Whatever a log holds can be printed: Windows' cp1252 has no place for much of it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def closed_pipe():
    """Output went into a closed pipe: end quietly, and keep Python from complaining at exit."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class OneLine(logging.Formatter):
    """A message is one line, whatever names and errors others put into it; a fault's traceback follows."""

    _second, _text = -1, ""  # of the latest line; one thread at a time writes

    def formatTime(self, record, datefmt=None):
        if int(record.created) != self._second:
            self._second, self._text = int(record.created), super().formatTime(record, datefmt)
        return self._text

    def formatMessage(self, record):
        record.message = record.message.translate(CONTROL)
        return super().formatMessage(record)


class Together(logging.Handler):
    """Who logs while another thread writes leaves the line to that one: nobody waits for the log, and under
    load one write takes many lines.  Comes before a Handler of the standard library's that writes them.
    Where the log is taken so slowly that MOST lines wait, who logs waits, too."""

    MOST = 10_000

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._waiting: deque[logging.LogRecord] = deque()
        self._writing = threading.Lock()

    def handle(self, record):
        self._waiting.append(record)
        while self._waiting and self._writing.acquire(blocking=len(self._waiting) > self.MOST):
            self._write()
        return True

    def _write(self):  # lock held; it is given back
        try:
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if batch:
                super().handle(logging.makeLogRecord({"batch": batch}))
        finally:
            self._writing.release()

    def format(self, record):
        form: Any = self.formatter
        return "\n".join(map(form.format, record.batch))

    def close(self):
        """At the end of the program: what a thread has left to another one is written."""
        if self._writing.acquire(timeout=1.0):
            self._write()
        super().close()


class StreamLog(Together, logging.StreamHandler):
    pass


class FileLog(Together, logging.handlers.RotatingFileHandler):
    pass


def set_up_logging(config):
    """2025-11-17 12:00:00 [info]: message, on stderr or in LOG_FILE.  Raises ConfigError."""
    for number, name in ((10, "debug"), (20, "info"), (30, "warn"), (40, "error")):
        logging.addLevelName(number, name)
    handler: logging.Handler = StreamLog()
    if config.log_file:
        try:
            handler = FileLog(
                config.log_file, maxBytes=5_000_000, backupCount=3, encoding="utf-8",
                errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"{config.named('log_file')}: {error_text(error)}; name a file that "
                              "can be written") from None
    handler.setFormatter(OneLine("%(asctime)s [%(levelname)s]: %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(LEVELS[config.log_level])
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback
    # No line of ours says where it was made: that would be a third of its cost (Python's Logging HOWTO,
    # "Optimization").
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


# --- 9.2 keys ----------------------------------------------------------------


def new_key(args, config):
    """--new-key NAME: mint a key, keep its hash, print it once."""
    name, rights = args.new_key.strip(), words("infer,view" if args.rights is None else args.rights)
    wrong = [right for right in rights if right not in RIGHTS]
    if wrong or not rights:
        raise ConfigError(f"--rights {args.rights}: choose from {', '.join(RIGHTS)}")
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise ConfigError("--new-key: a name is made of up to 64 letters, digits and . _ - @")
    file, keys = open_key_file(config)
    if any(key.name == name for key in keys) or name in config.api_key:
        raise ConfigError(f"--new-key {name}: there is a key of that name; choose another, or "
                          f"--revoke-key {name} first")
    key = mint_key()
    save_keys(file, [*keys, Key(name, digest(key), frozenset(rights), time.strftime("%Y-%m-%d"))])
    print(key)
    print(f"lmgateway: this is the only time the key of {name} is shown; its hash is in {file.path}",
          file=sys.stderr)
    return 0


def list_keys(args, config):
    """--list-keys: names, rights and dates."""
    file, keys = open_key_file(config)
    rows = [(key.name, ",".join(sorted(key.rights)), key.created) for key in keys]
    rows += [(name, ",".join(sorted(RIGHTS)), "GATEWAY_API_KEY") for name in config.api_key]
    for name, rights, created in rows:
        print(f"{name:24}  {rights:18}  {created}")
    if not rows:
        print(f"lmgateway: no keys in {file.path}; --new-key NAME mints one", file=sys.stderr)
    return 0


def revoke_key(args, config):
    """--revoke-key NAME: a running gateway notices within a second."""
    file, keys = open_key_file(config)
    left = [key for key in keys if key.name != args.revoke_key]
    if len(left) == len(keys):
        raise ConfigError(f"--revoke-key {args.revoke_key}: no such key in {file.path}; --list-keys "
                          "shows them")
    save_keys(file, left)
    print(f"lmgateway: {args.revoke_key} is revoked", file=sys.stderr)
    return 0


def open_key_file(config):
    """(KeyFile, its Keys).  Raises ConfigError when it cannot be read."""
    file = KeyFile(keys_path(config))
    try:
        return file, file.read() if file.path.exists() else []
    except OSError as error:
        raise ConfigError(f"{config.named('keys_file', file.path)}: {error_text(error)}; name a file that "
                          "can be read") from None


def save_keys(file, keys):
    try:
        file.write(keys)
    except OSError as error:
        raise ConfigError(f"--keys-file {file.path}: {error_text(error)}; name a file that can be "
                          "written") from None


# --- 9.3 the terminal view: events as lines, running requests as cards -------

UNSEEN = (*range(32), *range(127, 160), 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F),
          *range(0x2066, 0x206A))
CONTROL = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
           for code in UNSEEN}  # and marks that turn text round
COLOURS = {"lmstudio_error": "31", "error": "31", "lmstudio_chat_start": "36", "inference_start": "36",
           "lmstudio_chat_end": "32", "inference_complete": "32", "lmstudio_prompt_progress": "33",
           "inference_progress": "33", "lmstudio_log": "2", "gap": "35"}
PROGRESS = ("lmstudio_prompt_progress", "inference_progress")  # on a terminal the cards show these
TICK_S = 0.5  # the cards' clocks are redrawn so often


def printable(text):
    """Text without control characters."""
    return str(text).translate(CONTROL)



class Printer:
    """Events as JSON lines, or as aligned lines for people.  Flushes after each batch.

    On a terminal with live, the running requests stand below the lines as cards, redrawn in place."""

    def __init__(self, out, as_json, names, live):
        self._out, self._json, self._names = out, as_json, frozenset(names)
        self._epoch, self._seq = secrets.token_hex(4), 0
        capable = is_terminal(out) and not as_json
        if capable and os.name == "nt":
            os.system("")  # Windows' console understands escape sequences from here on
        self._colour = capable and not os.environ.get("NO_COLOR")
        self._cards: Any = Cards(bar_marks(out.encoding)) if capable and live else None
        self._inline = capable and not live     # progress is redrawn in its line
        self._unended = False  # such a line stands there
        self._drawn = []  # the lines of the cards that stand on the screen
        self._ticked = 0.0

    def __call__(self, events):
        numbers = range(self._seq + 1, self._seq + 1 + len(events))
        self._seq += len(events)
        self.write([(f"{self._epoch}-{number}", event) for number, event in zip(numbers, events)])

    def write(self, identified):
        """Print (id, event) pairs."""
        parts = []
        for event_id, event in identified:
            if self._cards:
                self._cards.take(event, time.monotonic())
            if not self._names or event.name in self._names:
                parts.append(json_line(event_id, event) if self._json else self._line(event))
        text = "".join(parts)
        if self._cards:
            text = self._screen(text)
        if text:
            self._out.write(text)
            self._out.flush()

    def tick(self):
        """To be called often: redraws the cards now and then, for their clocks."""
        if self._cards and time.monotonic() - self._ticked >= TICK_S:
            self.write([])

    def finish(self):
        """Take the cards off the screen."""
        if self._drawn or self._unended:
            self._out.write(rubbed_out(self._drawn, shutil.get_terminal_size()) + "\n" * self._unended)
            self._out.flush()
            self._drawn, self._unended = [], False

    def _screen(self, text):
        """What the terminal needs to show text above the cards; empty when nothing changed."""
        size, self._ticked = shutil.get_terminal_size(), time.monotonic()
        cards = self._cards.lines(self._ticked, size.columns - 1, size.lines - 1)
        if not text and cards == self._drawn:
            return ""
        text = rubbed_out(self._drawn, size) + text + "".join(
            self._painted(line, CARD_COLOURS.get(line.partition(" ")[0], "0")) for line in cards)
        self._drawn = cards
        return text

    def _line(self, event):
        if self._cards and shown_on_cards(event):
            return ""
        time_of_day = printable(str(event.data.get("timestamp", ""))[11:19])
        name = printable(event.name.replace("lmstudio_", ""))
        line = f"{time_of_day:8}  {name:18}  {summary(event)}".rstrip()
        if self._cards or self._inline:
            line = clipped(line, shutil.get_terminal_size().columns - 1)
        painted = self._painted(line, COLOURS.get(event.name, "0"))
        return self._in_place(event, painted) if self._inline else painted

    def _in_place(self, event, painted):
        """A line of a replay: one of progress takes the place of the one before it."""
        before, self._unended = self._unended, shown_on_cards(event)
        if not self._unended:
            return "\n" * before + painted
        if event.name not in PROGRESS:
            self._unended = before
            return ""
        return "\r\x1b[J" * before + painted[:-1]

    def _painted(self, line, colour):
        return f"\x1b[{colour}m{line}\x1b[0m\n" if self._colour and colour != "0" else line + "\n"


def is_terminal(out):
    """True when a stream shows escape sequences to a person.  A process without a console has no
    stream at all."""
    return bool(out) and out.isatty() and os.environ.get("TERM") != "dumb"


def shown_on_cards(event):
    """True for progress, and for the log's line that says the same."""
    if event.name == "lmstudio_log":
        return "Prompt processing progress: " in str(event.data.get("message"))[:200]
    return event.name in PROGRESS


def rubbed_out(lines, size):
    """The escape sequence that removes lines just above the cursor, also once the terminal is narrower."""
    rows = sum(max(1, -(-width_of(line) // max(1, size.columns))) for line in lines)
    return f"\r\x1b[{min(rows, max(1, size.lines - 1))}A\x1b[J" if lines else ""


def width_of(line):
    """Columns that a line takes on a terminal."""
    return len(line) if line.isascii() else sum(map(character_width, line))


def character_width(character):
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clipped(line, columns):
    """As much of a line as fits into so many columns."""
    if len(line) <= columns and line.isascii():
        return line
    widths = itertools.accumulate(map(character_width, line))
    return "".join(character for character, width in zip(line, widths) if width <= columns)


def bar_marks(encoding):
    """The characters for the full and the empty part of a bar that an encoding has."""
    try:
        "\u2588\u2591".encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return "#."
    return "\u2588\u2591"


CARD_FACTS = {  # event -> {the card's name of a fact: the event's}
    "inference_start": {name: name for name in ("model", "path", "client", "key")},
    "inference_progress": {name: name for name in (
        "model", "state", "percent", "promptTokens", "promptTokensRead", "promptTokensPerSecond", "etaMs",
        "outputTokens", "outputTokensPerSecond", "cachedTokens", "contextSize", "elapsedMs")},
    "lmstudio_chat_start": {"model": "model", "messages": "messages"},
    "lmstudio_token_info": {"promptTokens": "totalPromptTokens", "contextSize": "n_ctx"},
    "lmstudio_cache_stats": {"cachedTokens": "reused", "promptTokens": "total"},
    "lmstudio_prompt_progress": {"model": "model", "percent": "progress"},
    "lmstudio_prediction_stats": {"outputTokens": "completionTokens",
                                  "outputTokensPerSecond": "tokensPerSecond"},
}
CARD_STATES = {"inference_start": "waiting", "lmstudio_chat_start": "waiting",
               "lmstudio_processing_start": "prompt",
               "lmstudio_prompt_progress": "prompt", "lmstudio_generation_start": "generating"}
CARD_COLOURS = {"PREFILL": "33", "WRITE": "32", "WAIT": "36", "cache": "2"}
STALE_S = 3600  # a request of which nothing was heard for so long is taken off the screen


class Card:
    """What the events have told of one running request.  Times are readings of the caller's clock."""

    def __init__(self, key, now):
        self.key, self.began, self.heard = key, now, now
        self.facts: dict[str, Any] = {"state": "waiting"}
        self.first: Any = None  # (time, percent) of the first progress
        self.latest: Any = None  # and of the latest
        self.spoken: Any = None  # when it began to generate

    def take(self, event, now):
        self.heard, data = now, event.data
        self.facts.update({ours: data[theirs] for ours, theirs in CARD_FACTS.get(event.name, {}).items()
                           if usable_fact(ours, data.get(theirs))})
        state = CARD_STATES.get(event.name)
        if state and not (self.facts["state"] == "generating" and data.get("progress") == 100):
            self.facts["state"] = state
        if event.name in PROGRESS and "percent" in self.facts:
            self.latest = (now, self.facts["percent"])
            if self.first is None or self.first[1] > self.latest[1]:
                self.first = self.latest
        if event.name == "inference_progress" and "elapsedMs" in self.facts:
            self.began = now - self.facts["elapsedMs"] / 1000
        if self.facts["state"] == "generating":
            self.spoken = self.spoken or now

    def speed(self):
        """Percent of the prompt that are read in a second, by the events' own times; None when unknown."""
        if not self.latest or self.latest[0] <= self.first[0] or self.latest[1] <= self.first[1]:
            return None
        return (self.latest[1] - self.first[1]) / (self.latest[0] - self.first[0])

    def lines(self, now, marks):
        """The card: who, what it does, and what its cache and context hold."""
        facts, total = self.facts, self.facts.get("promptTokens")
        who = [facts.get("model") or "(model not named)",
               *(facts[name] for name in ("key", "client", "path") if facts.get(name))]
        elapsed = f"elapsed {duration(now - self.began)}"
        if facts["state"] == "prompt":
            doing = self._prefill(now, marks, elapsed)
        elif facts["state"] == "generating":
            doing = ["WRITE", counted(facts.get("outputTokens"), "tok"),
                     per_second(facts.get("outputTokensPerSecond")), f"for {duration(now - self.spoken)}",
                     elapsed]
        else:
            doing = ["WAIT", "" if facts["state"] == "waiting" else facts["state"], elapsed]
        held = []
        if total and facts.get("cachedTokens") is not None:
            held.append(f"cache    {facts['cachedTokens']:,} of {total:,} prompt tokens reused "
                        f"({100 * facts['cachedTokens'] / total:.0f} %)")
            if facts.get("contextSize"):
                used = total + (facts.get("outputTokens") or 0)
                held.append(f"context {used:,} of {facts['contextSize']:,}")
        rows = ["  ".join(who), "  ".join(filter(None, doing)), "  ".join(held)]
        return [printable(row) for row in rows if row]

    def _prefill(self, now, marks, elapsed):
        facts, speed = self.facts, self.speed()
        percent, total = facts.get("percent") or 0, facts.get("promptTokens")
        full = max(0, min(20, round(percent / 5)))
        read = facts.get("promptTokensRead", round(total * percent / 100) if total else None)
        rate = facts.get("promptTokensPerSecond", speed * total / 100 if speed and total else None)
        eta = facts.get("etaMs")
        if eta is None and speed:
            eta = 1000 * (100 - self.latest[1]) / speed
        left = eta and f"eta {duration(max(0, eta / 1000 - (now - self.heard)))}"
        return ["PREFILL", marks[0] * full + marks[1] * (20 - full), f"{percent:3.0f} %",
                total and read is not None and f"{read:,}/{total:,} tok", per_second(rate), elapsed, left]


def usable_fact(name, value):
    """True when a card can show it: events may come from another version, or from no gateway at all."""
    if name in ("model", "state", "path", "client", "key"):
        return isinstance(value, str) and value != ""
    return isinstance(value, (int, float)) and abs(value) < 1e15  # false for nan


class Cards:
    """The running requests, from the events of a gateway or of a log.  Pure: lines() is what to show."""

    def __init__(self, marks):
        self._marks = marks
        self._cards = {}  # key -> Card, in order of arrival
        self._ended: deque[Any] = deque(maxlen=64)  # keys whose late lines begin nothing

    def take(self, event, now):
        """Learn from one event."""
        data = event.data
        chat = event.chat if event.chat else f"log of {data.get('model')}"
        key = str(data.get("requestId") or chat)
        card = self._cards.get(key)
        if self._ends(event, card):
            self._cards.pop(key, None)
            self._ended.append(key)
            return
        if event.name in ("inference_start", "lmstudio_chat_start",
                          "lmstudio_processing_start") and key in self._ended:
            self._ended.remove(key)
        if card is None and (event.name in CARD_STATES
                             or event.name == "inference_progress") and key not in self._ended:
            card = self._cards[key] = Card(key, now)
        if card:
            card.take(event, now)

    @staticmethod
    def _ends(event, card):
        """A request ends with its answer, a chat of the log with its end line, one inside the app with
        figures."""
        if event.name in ("inference_complete", "error"):
            return True
        of_log = "requestId" not in event.data
        return of_log and (event.name == "lmstudio_chat_end" or (
            event.name == "lmstudio_prediction_stats" and card is not None and "messages" not in card.facts))

    def lines(self, now, columns, rows):
        """At most rows lines of at most so many columns; the oldest requests first."""
        self._cards = {key: card for key, card in self._cards.items() if now - card.heard < STALE_S}
        blocks = [card.lines(now, self._marks) for card in self._cards.values()]
        shown: list[str] = []
        for number, block in enumerate(blocks):
            more = len(blocks) - number
            if len(shown) + len(block) + (more > 1) > rows:
                shown.append(f"and {more} more running")
                break
            shown += block
        return [clipped(line, max(1, columns)) for line in shown[:max(0, rows)]]


def duration(seconds):
    """9s, 1m01s, 1h02m."""
    minutes, rest_s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s}s"
    return f"{minutes // 60}h{minutes % 60:02}m"


def counted(value, unit):
    return "" if value is None else f"{value:,} {unit}"


def per_second(rate):
    return "" if rate is None else f"{rate:,.0f} tok/s" if rate >= 100 else f"{rate:.1f} tok/s"


def summary(event):
    """An event's data in one line for a person, without control characters."""
    data = event.data
    model = f"{data['model']}  " if data.get("model") else ""
    try:
        shown = model + (SUMMARIES[event.name](data) if event.name in SUMMARIES
                         else str(data.get("message", "")))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):  # another version's
        shown = json.dumps(data)
    return printable(shown.replace("\n", " | ").replace("\t", " "))


def percent_bar(data):
    done = max(0, min(20, round(data["progress"] / 5)))
    return f"[{'#' * done}{'.' * (20 - done)}] {data['progress']:5.1f} %"


def fields_of_data(**labels):
    """A summary from fields: label=field for those that are there."""
    return lambda data: "  ".join(f"{label} {data[field]}" for label, field in labels.items()
                                  if data.get(field) is not None)


def used_tokens(usage):
    """645 + 39 tok: what was read and what was written."""
    counts = [usage.get(name) for name in ("promptTokens", "completionTokens")]
    return " + ".join("?" if count is None else f"{count:,}" for count in counts) + " tok" if usage else ""


SUMMARIES: dict[str, Callable[[dict], str]] = {
    "lmstudio_log": lambda data: f"{data['level']:5}  " + data["message"].strip().partition("\n")[0][:400],
    "lmstudio_chat_start": lambda data: f"{data['messages']} messages",
    "lmstudio_prompt_progress": percent_bar,
    "lmstudio_cache_stats": lambda data: (f"{data['reused']} of {data['total']} tokens from the cache "
                                          f"({data['percentage']} %)"),
    "lmstudio_token_info": fields_of_data(prompt="totalPromptTokens", fresh="promptTokensToDecode",
                                          context="n_ctx", limit="n_predict"),
    "lmstudio_sampling_params": fields_of_data(
        temp="temp", top_k="top_k", top_p="top_p", min_p="min_p", repeat="repeat_penalty"),
    "lmstudio_prediction_stats": fields_of_data(
        prompt="promptTokens", output="completionTokens", read="promptTokensPerSecond",
        wrote="tokensPerSecond", first_ms="timeToFirstTokenMs", total_ms="totalMs"),
    "lmstudio_chat_end": lambda data: f"{data['outcome']}: {data['message'][:200]}",
    "lmstudio_generation_start": lambda data: "prompt read, generating",
    "lmstudio_month_transition": fields_of_data(to="newLogFile"),
    "lmstudio_file_switch": fields_of_data(to="newLogFile"),
    "inference_start": fields_of_data(id="requestId", path="path", client="client", key="key"),
    "inference_progress": fields_of_data(id="requestId", state="state", percent="percent", left_ms="etaMs",
                                         tokens="outputTokens"),
    "inference_complete": lambda data: "  ".join(filter(None, (
        f"id {data['requestId']}  status {data['status']}  {data['totalTimeMs'] / 1000:.1f} s",
        used_tokens(data.get("tokenUsage") or {}), per_second(data.get("tokensPerSecond"))))),
    "error": fields_of_data(id="requestId", what="error"),
    "gap": fields_of_data(first="from", last="to", count="count")}
EVENTS = {  # every event of the stream, and what it says; a test holds the README's table to it
    "connected": "you are listening",
    "inference_start": "a client's request goes to LM Studio",
    "inference_progress": "how far it is, at most four times a second, once while it answers",
    "inference_complete": "it was answered: status, times, tokens",
    "error": "it was not: refused, failed, broken off or abandoned",
    "lmstudio_log": "one entry of LM Studio's log, as it stands there",
    "lmstudio_chat_start": "LM Studio took a chat on",
    "lmstudio_sampling_params": "how the engine samples",
    "lmstudio_token_info": "context size, prompt tokens and how many of them are to be read",
    "lmstudio_cache_stats": "how much of the prompt was in the cache",
    "lmstudio_processing_start": "the engine begins to read the prompt",
    "lmstudio_prompt_progress": "how much of the prompt has been read, in percent",
    "lmstudio_generation_start": "the prompt is read, the first token is next",
    "lmstudio_prediction_stats": "tokens and speeds of the finished run",
    "lmstudio_chat_end": "finished, disconnected or error",
    "lmstudio_error": "an ERROR entry of LM Studio's own",
    "lmstudio_file_switch": "the log goes on in a new file of the same month",
    "lmstudio_month_transition": "the log goes on in a new month",
    "gap": "events that this listener will never get",
    "ping": "15 s of silence",
}


def events_table():
    """The README's table of events; a test holds the README to it."""
    return "\n".join(["| event | says |", "|---|---|",
                      *(f"| `{name}` | {about} |" for name, about in EVENTS.items())])


def readme_tables():
    """The tables that the README takes from this file; .ci/readme writes them into it."""
    return [options_table(), routes_table(), events_table()]


# --- 9.4 commands that print events: --tail-only and --watch -----------------


def open_printer(args, live):
    """A Printer on stdout that makes room for what the log says on the same terminal.  Raises StartError."""
    if sys.stdout is None:
        raise StartError("there is no standard output to print to: send it to a file or a pipe")
    printer = Printer(sys.stdout, args.json, words(args.events or ""), live)
    for handler in log.handlers:
        handler.addFilter(lambda record: printer.finish() or True)
    return printer


def tail_only(args, config):
    """--tail-only: replay PATHs, or follow the live log until a signal.  Returns the exit status."""
    printer = open_printer(args, live=not args.paths)
    try:
        if args.paths:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
            freeze_start_up()
            replay(saved_logs(args.paths), printer)
            return 0
        stop = Stop()
        directory = log_dir_of(config)
        follower = Follower(directory, args.from_start, time.time())
        log.info("lmgateway %s, log directory: %s", VERSION, directory)
        freeze_start_up()
        Monitor(follower).run(printer, lambda seconds: printer.tick() or stop.wait(seconds))
        return stop.status
    finally:
        with contextlib.suppress(OSError):
            printer.finish()


@contextlib.contextmanager
def naming_history(config):
    """A HistoryError as a ConfigError that names --history and where it was said."""
    try:
        yield
    except HistoryError as error:
        raise ConfigError(f"{config.named('history')}: {error}") from None


def report(args, config):
    """--report: what was used by day and model, from PATHs or from the history.  Returns the exit status."""
    if not args.paths and not config.history:
        raise ConfigError("--report: name saved logs or a log directory, or a history with --history FILE "
                          "(HISTORY_FILE)")
    if config.history and not args.paths and not os.path.exists(config.history):
        raise ConfigError(f"{config.named('history')}: no such file; name one that a gateway keeps")
    file = ":memory:" if args.paths else config.history
    with naming_history(config), contextlib.closing(open_history(file)) as kept, history_errors(kept.Error):
        if args.paths:
            freeze_start_up()
            replay(saved_logs(args.paths), LogUsage(kept))
        rows, total = usage_rows(kept, ["day", "model"]), usage_rows(kept, [])
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    elif rows:
        print(report_text([*rows, {"day": "total", "model": "", **total[0]}]))
    else:
        print("lmgateway: no request in it; name LM Studio's log directory, or a history that has been "
              "kept for a while",
              file=sys.stderr)
    return 0


class LogUsage:
    """Puts a row into a history for each chat of a replayed log."""

    def __init__(self, connection):
        self._connection, self._requests = connection, Requests("", keep=0)

    def __call__(self, events):
        self._requests.see(events, 0.0)
        over, self._requests.changed = self._requests.changed, []
        if over:
            store_rows(self._connection, list({record.id: history_row(record) for record in over}.values()))


REPORT = (  # heading, format, value of a row
    ("day", "{:10}", lambda row: row["day"]), ("model", "{:32.32}", lambda row: printable(row["model"])),
    ("requests", "{:>8,}", lambda row: row["requests"]), ("failed", "{:>6,}", lambda row: row["errors"]),
    ("prompt tok", "{:>12,}", lambda row: row["promptTokens"]),
    ("cached", "{:>6}", lambda row: share_text(row["cachedTokens"], row["promptTokens"])),
    ("output tok", "{:>12,}", lambda row: row["completionTokens"]),
    ("read tok/s", "{:>10}", lambda row: row["promptTokensPerSecond"] or "-"),
    ("write tok/s", "{:>11}", lambda row: row["tokensPerSecond"] or "-"))


def report_text(rows):
    """Rows as a table for people."""
    heads = [re.sub(r"[,.]\d*", "", form).format(head) for head, form, _ in REPORT]
    return "\n".join(["  ".join(heads),
                      *("  ".join(form.format(value(row)) for _, form, value in REPORT) for row in rows)])


def share_text(part, whole):
    return f"{100 * part / whole:.0f} %" if whole else "-"


def watch(args, config):
    """--watch URL: print the events of another gateway until a signal.  Returns the exit status."""
    stop, printer = Stop(), open_printer(args, live=True)
    news: queue.Queue[Any] = queue.Queue(1000)
    line = StreamLine(watched_address(args.watch), next(iter(config.api_key.values()), None),
                      "0" if args.from_start else None)
    threading.Thread(target=line.run, args=(news.put, stop.wait), name="watch", daemon=True).start()
    freeze_start_up()
    try:
        while not stop.wait(0):
            for said in drain(news, 0.1):
                if isinstance(said, GatewayError):
                    raise said
                if isinstance(said, str):
                    log.warning(said)
                else:
                    printer.write(said)
            printer.tick()
        return stop.status
    finally:
        with contextlib.suppress(OSError):
            printer.finish()


def drain(news, timeout_s):
    """What a queue holds, in order: runs of pairs as lists, all else as it is.  Waits for the first."""
    found: list[Any] = []
    with contextlib.suppress(queue.Empty):
        found.append(news.get(timeout=timeout_s))
        while len(found) < 500:
            found.append(news.get_nowait())
    for pairs, run in itertools.groupby(found, lambda item: isinstance(item, tuple)):
        items = list(run)
        yield from [items] if pairs else items


def watched_address(text):
    """The URL of a gateway's stream from what a person types.  Raises ConfigError."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and (parts.hostname
                                                        or "").encode("idna") and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--watch {text}: no address of a gateway; use the form http://192.168.1.20:8001")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/debug/stream") else path + "/debug/stream",
                          query="", fragment="")


class StreamLine:
    """A line to another gateway's /debug/stream that comes back by itself and misses nothing."""

    def __init__(self, address, key, since):
        self._address, self._key = address, key
        self._last = since  # id of the latest event that was handed over
        self._known = False  # a gateway has answered there
        self._pause = FIRST_PAUSE_S

    def run(self, hand_over, wait):
        """Thread body, until wait(seconds) returns True.  Hands over (id, Event), text for a person, and
        at last a GatewayError."""
        while True:
            try:
                self._listen(hand_over)
                problem = "the connection was closed"
            except GatewayError as error:
                return hand_over(error)
            except (*BROKEN, ValueError) as error:
                problem = trouble(error)
            hand_over(f"{self._address.netloc}: {problem}; trying again in {self._pause:.0f} s")
            if wait(self._pause):
                return None
            self._pause = min(LAST_PAUSE_S, self._pause * 2)

    def _listen(self, hand_over):
        """One connection, from request to end.  Raises GatewayError where trying again is of no use."""
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        headers = {"Accept": "text/event-stream", "User-Agent": f"lmgateway/{VERSION}"}
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        if self._key:
            headers["X-API-Key"] = self._key
        with contextlib.closing(kind(self._address.hostname, self._address.port,
                                     timeout=LINE_SILENCE_S)) as connection:
            connection.request("GET", self._address.path, headers=headers)
            answer = connection.getresponse()
            self._check(answer)
            for event_id, event in stream_events(iter(lambda: answer.read1(65536), b"")):
                self._known, self._pause = True, FIRST_PAUSE_S
                self._last = event_id
                hand_over((event_id, event))

    def _check(self, answer):
        status, url = answer.status, self._address.geturl()
        if status in (401, 403):
            said = (json_object(answer.read(65536)) or {}).get("error")
            said = str(said.get("message", "")) if isinstance(said, dict) else ""
            remedy = "name " + ("another key with --api-key" if self._key
                                else "a key of it with --api-key KEY (GATEWAY_API_KEY)")
            shown = f" ({printable(said)[:200]})" if said else ""
            raise GatewayError(f"{url} answers {status}: {remedy}{shown}")
        if status in (429, 500, 502, 503, 504) or self._known and status != 200:
            raise http.client.HTTPException(f"it answers {status}")
        if status != 200 or not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise ConfigError(f"--watch: what answers at {url} ({status}) is no lmgateway; give the address "
                              "that lmgateway prints when it starts")


FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0  # before the next try; doubled from one to the other
LINE_SILENCE_S = 40  # a gateway sends a ping every 15 s: without any for so long, the line is dead


def trouble(error):
    """Why there is no line to a gateway, with the remedy where one is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"its certificate is not trusted ({error.verify_message}); name it in the environment "
                "variable SSL_CERT_FILE")
    if isinstance(error, ssl.SSLError):
        return f"no TLS there ({error_text(error)}); does its address begin with http://?"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without a word; does its address begin with https://?"
    return error_text(error)


def stream_events(pieces):
    """(id, Event) of a text/event-stream's bytes, as they become complete.  Pings are left out: no news."""
    rest = b""
    for piece in pieces:
        *frames, rest = EVENT_END.split(rest + piece)
        if len(rest) > STREAM_LIMIT:
            raise ValueError("an event without an end")
        for frame in frames:
            fields = dict(re.findall(r"^(id|event): ?([\w.-]+)\r?$", frame.decode("utf-8", "replace"), re.M))
            data = json_object(event_data(frame))
            if data is not None and fields.get("event") != "ping":
                yield fields.get("id", ""), Event(fields.get("event", "message"), data)


class Stop:
    """Signals as one question: wait(seconds) is True once the program shall end.

    A handler runs between two steps of the main thread, which may hold any lock just then, that of a
    threading.Event included: so it takes none, and only lets go of the gate that wait() stands before."""

    def __init__(self):
        self._gate = threading.Lock()
        self._gate.acquire()
        self._over = False
        self.status = 0
        self.signals = 0
        signal.signal(signal.SIGTERM, self._signalled)
        signal.signal(signal.SIGINT, self._signalled)

    def _signalled(self, number, frame):
        self.signals += 1
        self.status = 130 if number == signal.SIGINT else 0
        if self.signals > 1:
            os._exit(self.status)
        self._over = True
        self._gate.release()

    def wait(self, seconds=None):
        if not self._over and self._gate.acquire(timeout=-1 if seconds is None else seconds):
            self._gate.release()
        return self._over


def freeze_start_up():
    """Start-up is over: what it made stays out of later garbage collections, and what compiling this file
    took goes back to the system (7 MB with glibc, which would keep it)."""
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes
            ctypes.CDLL(None).malloc_trim(0)


# --- 9.5 the server ----------------------------------------------------------


def serve(args, config):
    """The gateway until a signal.  Returns the exit status."""
    stop = Stop()
    with contextlib.ExitStack() as cleanup:
        config = start_demo(config, cleanup) if args.demo else find_upstream(config)
        check_exposure(config)
        context = tls_context(config)
        history = open_history_file(config, cleanup)
        hub = Hub(config.requests_kept, history and history.keep)
        upstream = Upstream(config.upstream, config.upstream_token)
        monitor = open_monitor(config)
        gateway = Gateway(config, hub, upstream, monitor, history)
        server = gateway.server = open_server(gateway, context)
        if monitor:     # only now: a port in use is said in one line
            threading.Thread(target=run_monitor, args=(monitor, hub, stop), name="tail", daemon=True).start()
        gateway.address = own_url(config, config.host, server.port)
        lan = reachable(config, lan_addresses)
        gateway.lan_urls = [own_url(config, address, server.port) for address, _ in lan]
        threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
        announce(gateway, server.port, lan)
        freeze_start_up()
        if args.demo:
            key = config.api_key.get("demo", "")
            threading.Thread(target=demo_traffic, args=(f"http://127.0.0.1:{server.port}", key, stop.wait),
                             name="demo-traffic", daemon=True).start()
        notify("READY=1")
        keep_watchdog(stop, server)
        notify("STOPPING=1")
        log.info("Stopping: %d requests are running, they have %.0f s", server.working, GRACE_S)
        server.shutdown()
        server.finish_requests(GRACE_S)
    return 0


def open_history_file(config, cleanup):
    """The History of --history; None without one.  Raises ConfigError."""
    if not config.history:
        return None
    with naming_history(config):
        history = History(config.history, config.history_days)
    cleanup.callback(history.close)
    return history


def start_demo(config, cleanup):
    """Start the imitation; gives the Config that points to it, with a key for the demo's own traffic where
    keys are asked for.  Minted keys count only when their file is named: trying it must not need one."""
    directory = tempfile.mkdtemp(prefix="lmgateway-demo-")
    cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
    demo = DemoServer(directory)
    cleanup.callback(demo.stop)
    demo.start()
    keys = {"demo": mint_key(), **config.api_key} if config.api_key or config.keys_file else {}
    return config.but(upstream=demo.url, log_dir=directory, enable_log_monitoring=True, api_key=keys,
                      keys_file=config.keys_file or os.path.join(directory, "keys.json"))


def find_upstream(config):
    """The Config with LM Studio's port from its own settings file, where no address was given."""
    if "upstream" in config.sources:
        return config
    with contextlib.suppress(OSError, ValueError):
        port = settings_port(read_settings(find_home()))
        if port:
            return config.but(upstream=f"http://127.0.0.1:{port}")
    return config


def check_exposure(config):
    """Raises ConfigError where the LAN could come in without a key, and where a keys file cannot be read."""
    open_key_file(config)
    if not loopback(config.host) and not Walls(config).need_key and not config.no_auth:
        raise ConfigError(f"{config.named('host')} listens beyond this machine, and no key "
                          "is set: mint one with --new-key NAME, set GATEWAY_API_KEY, or say --no-auth to "
                          "let everybody in")


def open_monitor(config):
    """The Monitor of LM Studio's log directory; None when it is switched off."""
    if not config.enable_log_monitoring:
        return None
    return Monitor(Follower(log_dir_of(config), started=time.time()))


def run_monitor(monitor, hub, stop):
    """Body of the tail thread.  A fault of ours costs the events of one step, not the monitor."""
    while True:
        try:
            return monitor.run(hub.publish_log, stop.wait)
        except Exception:  # the end of the line for the thread: it says so and goes on
            log.exception("a fault in lmgateway's log monitor: please report it")
            if stop.wait(1.0):
                return None


def open_server(gateway, context):
    """The Server, bound.  Raises StartError with who to ask."""
    config = gateway.config
    try:
        return Server(gateway, config.host, config.port, context)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            who = port_holder(config.port) or f"what holds it ({port_question(config.port)} tells)"
            raise StartError(f"port {config.port} is in use on {config.host}: stop {who} or choose "
                             "another with --port (GATEWAY_PORT)") from None
        raise StartError(f"cannot listen on {config.host}:{config.port}: {error_text(error)}; choose "
                         "another address with --host (GATEWAY_HOST) and --port") from None
    except OverflowError as error:
        raise StartError(f"cannot listen on {config.host}:{config.port}: {error}") from None


def tls_context(config):
    """The SSLContext of --tls-cert and --tls-key; None without them.  Raises ConfigError."""
    if not config.tls_cert and not config.tls_key:
        return None
    if not config.tls_cert or not config.tls_key:
        raise ConfigError("--tls-cert (TLS_CERT) and --tls-key (TLS_KEY) go together: name both files")
    pair = f"{config.named('tls_cert')}, {config.named('tls_key')}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password=refuse_password)
    except ssl.SSLError as error:
        raise ConfigError(f"{pair}: no matching pair of PEM files ({error.reason or error}); see the README "
                          "for a line that makes one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pair}: {error_text(error)}; name two PEM files that can be read, see the "
                          "README") from None
    return context


def refuse_password():
    raise ValueError("the private key asks for a password; store it without one, readable by this user only")


def port_question(port):
    """The command that tells who holds a port."""
    if os.name == "nt":
        return f"netstat -ano | findstr :{port}"
    return f"lsof -i :{port}" if sys.platform == "darwin" else f"ss -ltnp 'sport = :{port}'"


def shown_host(host):
    return f"[{host}]" if ":" in host else host


def own_url(config, host, port):
    return f"http{'s' if config.tls_cert else ''}://{shown_host(host)}:{port}"


def announce(gateway, port, lan):
    """What a person needs to know first.  Never a key.  lan: the machine's addresses that others can use."""
    config, monitor = gateway.config, gateway.monitor
    everywhere = config.host in ANYWHERE
    here = own_url(config, "127.0.0.1", port) if everywhere else gateway.address
    there = ", ".join(f"{url} (VPN or virtual adapter)" if virtual else url
                      for url, (_, virtual) in zip(gateway.lan_urls, lan))
    base = gateway.lan_urls[0] if gateway.lan_urls else here
    log.info("lmgateway %s on Python %s", VERSION, platform.python_version())
    log.info("Listening on %s", gateway.address)
    if not config.port and not log.isEnabledFor(logging.INFO):
        print(f"Listening on {gateway.address}", file=sys.stderr, flush=True)   # nobody could know it
    log.info("Dashboard: %s/", here)
    closed = "closed; --host 0.0.0.0 opens it, to those who have a key (--new-key NAME)"
    log.info("On the LAN: %s", there or ("no address found" if everywhere else closed))
    log.info("Base URL for clients: %s/v1 (OpenAI SDKs), %s (Anthropic SDKs)", base, base)
    log.info("Key: %s", "needed" if gateway.walls.need_key
             else "none is asked for; clients that insist take any text")
    log.info("LM Studio: %s", config.upstream)
    log.info("Log directory: %s",
             monitor.follower.directory if monitor else "not monitored (ENABLE_LOG_MONITORING=false)")


# --- 9.6 addresses of this machine -------------------------------------------

ANYWHERE = ("", "0.0.0.0", "::")
VIRTUAL = re.compile(  # adapters that lead to no LAN
    r"tun|tap|utun|wg|ppp|ipsec|gpd|tailscale|zt|nord|proton|docker|podman|br-|veth|virbr|vmnet|vbox|vnic|"
    r"lxc|lxd|cni|flannel|bridge|awdl|llw", re.I)
UNLIKELY = tuple(map(ipaddress.ip_network, ("172.16.0.0/12", "192.168.56.0/24")))  # WSL, Hyper-V, VirtualBox
TAILNET = ipaddress.ip_network("100.64.0.0/10")
NOWHERE = ("192.0.2.1", 9)  # kept for documentation (RFC 5737); to connect UDP there sends nothing


def reachable(config, addresses):
    """[(address, virtual?)] at which others reach this gateway; addresses() gives all of the machine's."""
    if loopback(config.host):
        return []
    return addresses() if config.host in ANYWHERE else [(config.host, False)]


def lan_addresses():
    """[(address, virtual?)] of this machine, IPv4: the way out first, VPN and virtual adapters last."""
    return ranked(adapter_addresses() or named_addresses(), outgoing_address())


def ranked(found, outgoing):
    """Sort (adapter name or "", address) pairs as lan_addresses says."""
    usable = {}
    for adapter, text in found:
        address = ipaddress.ip_address(text)
        if not address.is_loopback and not address.is_link_local and not address.is_unspecified:
            guessed = not adapter and text != outgoing and any(address in network for network in UNLIKELY)
            usable[text] = bool(VIRTUAL.match(adapter)) or address in TAILNET or guessed
    return sorted(usable.items(), key=lambda item: (item[1], item[0] != outgoing))


def adapter_addresses():
    """[(adapter, IPv4 address)] from the kernel of Linux and macOS (SIOCGIFADDR); empty elsewhere."""
    found = []
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import fcntl
        request = 0x8915 if sys.platform == "linux" else 0xC0206921
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an adapter without an IPv4 address
                    answer = fcntl.ioctl(sock.fileno(), request, name.encode()[:15].ljust(32, b"\0"))
                    found.append((name, socket.inet_ntoa(answer[20:24])))
    return found


def named_addresses():
    """[("", IPv4 address)] that this machine's own name stands for: Windows has all of them there."""
    with contextlib.suppress(OSError):
        rows = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
        return [("", str(row[4][0])) for row in rows]
    return []


def outgoing_address():
    """The address from which this machine reaches other networks; empty when it reaches none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(NOWHERE)
        return sock.getsockname()[0]
    return ""


# --- 9.7 services: systemd and launchd ---------------------------------------

ALIVE_S = 5.0  # an accept loop that has not come round for so long hangs


def notify(state, environ=os.environ):
    """Tell systemd a state (sd_notify(3)), where it asked for that."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sock.send(state.encode())


def watchdog_pause(environ, pid):
    """Seconds between signs of life for systemd's watchdog (sd_watchdog_enabled(3)); None: it wants none."""
    limit, asked = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(pid))
    return max(0.05, int(limit) / 2e6) if limit.isdecimal() and int(limit) and asked == str(pid) else None


def keep_watchdog(stop, server):
    """Until a signal: signs of life for as long as the server takes connections."""
    pause = watchdog_pause(os.environ, os.getpid())
    while not stop.wait(pause):
        if time.monotonic() - server.ticked < ALIVE_S:
            notify("WATCHDOG=1")


def print_launchd(args, config):
    """--print-launchd: an agent for macOS that runs this file as it was called here (launchd.plist(5))."""
    given = [row for row in OPTIONS if row.flag and getattr(args, row.name) is not None]
    secret = [row for row in given if row.variable in SECRET]
    if secret:
        raise ConfigError(f"{secret[0].flag}: a plist is no place for a secret; put {secret[0].variable} "
                          f"into {os.path.join(os.getcwd(), '.env')}, or mint a key with --new-key")
    flags = itertools.chain.from_iterable(
        [row.flag] if row.default is False else [row.flag, getattr(args, row.name)] for row in given)
    log_file = config.log_file or str(own_home() / "Library" / "Logs" / "lmgateway.log")
    agent = {"Label": "lmgateway", "ProgramArguments": [sys.executable, os.path.abspath(__file__), *flags],
             "WorkingDirectory": os.getcwd(), "EnvironmentVariables": {"LOG_FILE": log_file},
             "RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 10,
             "ProcessType": "Interactive"}  # else launchd holds back its processor time
    sys.stdout.write(plistlib.dumps(agent, sort_keys=False).decode())
    return 0


# --- 9.8 --check, the doctor -------------------------------------------------
# A check is one row of CHECKS: a function that looks at one thing and yields its findings.


class Finding(NamedTuple):
    mark: str  # "ok", "warn" or "bad"
    what: str
    remedy: str = ""


class Check(NamedTuple):
    """find gives the Findings about one thing."""

    name: str
    find: Callable[[Patient], Iterator[Finding]]


class Patient:
    """What the checks look at, each part looked at once, when a check first asks for it."""

    def __init__(self, args, environ):
        self.config, self.warnings, self.errors = load_leniently(vars(args), environ, args.env_file)
        self.env_file = args.env_file or ".env"
        self.home = find_home()
        self.log_dir = self.config.log_dir or find_log_dir(self.home)

    @functools.cached_property
    def settings(self):
        """LM Studio's settings, or the exception that says why there are none."""
        try:
            return read_settings(self.home)
        except (OSError, ValueError) as error:
            return error

    @functools.cached_property
    def upstream(self):
        """LM Studio's address as the gateway would use it."""
        return find_upstream(self.config).upstream

    @functools.cached_property
    def newest(self):
        """The newest LogFile, None without any, or the OSError of the directory."""
        try:
            return next(reversed(list_logs(self.log_dir)), None)
        except OSError as error:
            return error

    @functools.cached_property
    def parser(self):
        """A Parser that has read the end of the newest log.  Raises OSError."""
        parser = Parser()
        with open(self.newest.path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - CHECKED_BYTES))
            parser.feed(file.read(CHECKED_BYTES))
        parser.end()
        return parser

    @property
    def exposed(self):
        return not loopback(self.config.host)


CHECKED_BYTES = 4_000_000  # of the newest log
SETTINGS_MENU = "LM Studio: Developer > Server settings"
LOGS_MENU = 'LM Studio: Developer Logs, "..." menu'


def check_python(patient):
    version = (f"Python {platform.python_version()} on {platform.system()} {platform.release()}, "
               f"lmgateway {VERSION}")
    if sys.version_info < (3, 9):
        yield Finding("bad", version, "install Python 3.9 or newer from https://www.python.org")
    else:
        yield Finding("ok", version)


def refused(error):
    """The Finding of an error of ours, whose remedy stands behind its last semicolon."""
    what, _, remedy = str(error).rpartition("; ")
    return Finding("bad", what or remedy, remedy if what else "see --help and the README")


def check_options(patient):
    for error in patient.errors:
        yield refused(error)
    for warning in patient.warnings:
        yield Finding("warn", warning, "mend it, or take it away")
    for row in OPTIONS:
        if row.name in patient.config.sources:
            value = "set" if row.variable in SECRET else getattr(patient.config, row.name)
            yield Finding("ok", f"{row.variable}: {value} (from {patient.config.sources[row.name]})")
    if not patient.config.sources and not patient.errors:
        yield Finding("ok", "each has its default")
    log_file = patient.config.log_file
    if log_file and not os.access(os.path.dirname(os.path.abspath(log_file)), os.W_OK):
        yield Finding("bad", f"LOG_FILE {log_file} cannot be written", "name a file in a directory of yours")


def check_port(patient):
    config = patient.config
    own = f"port {config.port} of {config.host}"
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if os.name != "nt":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((config.host, config.port))
        yield Finding("ok", f"{own} is free" if config.port else "the system will choose one")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            yield Finding("bad", f"cannot listen on {own}: {error_text(error)}",
                          "choose others with --host and --port")
        elif b"<title>lmgateway" in fetch(config.host, config.port, "/", bool(config.tls_cert)):
            yield Finding("ok", f"{own} is held by a running lmgateway")
        else:
            yield Finding("bad", f"{own} is held by {port_holder(config.port) or 'another program'}",
                          f"stop it ({port_question(config.port)} tells which it is), or choose another "
                          "with --port")


def fetch(host, port, path, encrypted=False):
    """The body that answers a GET with 200; empty when there is none within a second."""
    host = "127.0.0.1" if host in ANYWHERE else host
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whose it is, is what we want to know
    with contextlib.suppress(*BROKEN, ValueError):
        asked = (http.client.HTTPSConnection(host, port, timeout=1.0, context=context) if encrypted
                 else http.client.HTTPConnection(host, port, timeout=1.0))
        with contextlib.closing(asked):
            asked.request("GET", path)
            answer = asked.getresponse()
            return answer.read(65536) if answer.status == 200 else b""
    return b""


def port_holder(port):
    """Who listens on a TCP port, as far as Linux tells this user; empty when nobody knows."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        sockets = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            sockets |= {f"socket:[{row[9]}]" for row in rows  # 0A: it listens
                        if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and sockets & opened(entry.path):
                command = Path(entry.path, "cmdline").read_bytes().split(b"\0")[:2]  # the rest may hold a key
                shown = printable(b" ".join(command).decode("utf-8", "replace").strip())
                return f"process {entry.name} ({shown[:80]})"
    return ""


def opened(process):
    """What the descriptors of a process in /proc point to; nothing where we may not look."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{process}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"{process}/fd/{name}"))
    return found


def check_lmstudio(patient):
    reason = Upstream(patient.upstream).health()
    if not reason:
        yield Finding("ok", f"LM Studio answers at {patient.upstream}")
        return
    what, _, remedy = reason.partition(". ")
    port = settings_port(patient.settings) if isinstance(patient.settings, dict) else None
    if port and not patient.upstream.endswith(f":{port}"):
        remedy = f"its settings say port {port}: give that to --upstream (LMSTUDIO_BASE_URL). {remedy}"
    if app_runs(patient.home):
        what += ", though LM Studio itself runs: its server is stopped, or on another port"
    yield Finding("bad", what, remedy)


def app_runs(home):
    """True when LM Studio's internal server answers, which is there also while its API server is stopped."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        port = json.loads((home / ".internal" / "http-server.json").read_bytes())["port"]
        return b'"version"' in fetch("127.0.0.1", int(port), "/lms-status")
    return False


def check_settings(patient):
    settings, path = patient.settings, settings_path(patient.home)
    if not isinstance(settings, dict):
        yield Finding("warn", f"LM Studio's settings {path} cannot be read: {error_text(settings)}",
                      "start LM Studio's server once, and run lmgateway as the user who runs LM Studio")
        return
    port, network = settings_port(settings), settings.get("networkInterface")
    network = network if isinstance(network, str) else ""
    yield Finding("ok", f"{path}: port {port or 'not named'}, interface {network or 'not named'}")
    if network and not loopback(network):
        yield Finding("warn", f"LM Studio itself listens on the network ({network}): whoever goes there goes "
                      "round this gateway, its keys and its figures",
                      f"{SETTINGS_MENU} > Serve on Local Network: off")
    if settings.get("cors") is True:
        yield Finding("warn", "LM Studio allows every web page to call it (CORS)",
                      f"{SETTINGS_MENU} > Enable CORS: off; name the origins that may call the gateway with "
                      "--cors-origins")
    for name, value, mark, what, remedy in LOG_SETTINGS:
        if settings.get(name) == value and type(settings.get(name)) is type(value):
            yield Finding(mark, what, f"{LOGS_MENU} > {remedy}" if remedy else "")


LOG_SETTINGS = (  # (setting, value, mark, what that means, remedy)
    ("fileLoggingMode", "off", "bad", "LM Studio writes no log files: there is nothing to monitor",
     "File Logging Mode: Succinct"),
    ("verbose", False, "warn", "verbose logging is off: no cache, token and speed figures of streams",
     "Verbose Logging: on"),
    ("verbose", True, "ok", "verbose logging is on", ""),
    ("logSensitiveData", True, "warn", "prompts and answers stand in LM Studio's logs in clear text",
     "Redact Content: on, where others can read this disk (figures of plain requests then go, too)"),
    ("logSensitiveData", False, "ok", "prompts and answers are redacted in LM Studio's logs", ""),
    ("logIncomingTokens", True, "warn",
     "every token is logged: the files grow with the square of an answer's length",
     "Log Incoming Tokens: off"),
)


def check_logs(patient):
    newest, directory = patient.newest, patient.log_dir
    if not patient.config.enable_log_monitoring:
        yield Finding("warn", "the log monitor is switched off", "ENABLE_LOG_MONITORING=true")
    if isinstance(newest, OSError):
        yield Finding("bad", f"log directory {directory}: {error_text(newest)}",
                      "start LM Studio's server once; name another directory with --log-dir "
                      "(LMSTUDIO_LOG_DIR); run as the user who runs LM Studio")
    elif newest is None:
        yield Finding("bad", f"no server logs (YYYY-MM/YYYY-MM-DD.N.log) in {directory}",
                      f"{LOGS_MENU} > File Logging Mode: Succinct, and send LM Studio a request")
    else:
        yield from check_newest_log(patient)
    for other in other_log_dirs(patient.home, directory):
        yield Finding("warn", f"{other} holds a newer log than {directory}",
                      f"--log-dir {other} (LMSTUDIO_LOG_DIR)")


def check_newest_log(patient):
    path = patient.newest.path
    try:
        parser, state = patient.parser, os.stat(path)
    except OSError as error:
        yield Finding("bad", f"{path}: {error_text(error)}",
                      "let this user read it, or run as the user who runs LM Studio")
        return
    age_s = time.time() - state.st_mtime
    written = f"{path}: {shown_bytes(state.st_size)}, written {shown_age(age_s)} ago"
    yield Finding("ok", written) if age_s <= 86400 else Finding(
        "warn", written, "see that LM Studio's server runs under this user and gets requests")
    if not parser.entries:
        yield Finding("warn", "no log entry in it that lmgateway knows",
                      "send LM Studio a request and look again")
        return
    engines = ", ".join(sorted(name for name in parser.by_engine if name != "App")) or "the app alone"
    yield Finding("ok", f"{parser.entries:,} entries looked at, written by: {engines}")
    if not parser.by_level["DEBUG"]:
        yield Finding("warn", "no DEBUG lines: no cache, token and speed figures of streams",
                      f"{LOGS_MENU} > Verbose Logging: on")
    if parser.unknown > parser.lines / 10:
        yield Finding("warn",
                      f"{parser.unknown:,} of {parser.lines:,} lines have a wording that this version "
                      "does not know", "look for a newer lmgateway; /debug/status shows samples")


def shown_age(seconds):
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else duration(max(0, seconds))


def other_log_dirs(home, directory):
    """Log directories at LM Studio's usual places that were written more than an hour after this one."""
    bases = {home, own_home() / ".lmstudio", own_home() / ".cache" / "lm-studio"}
    places = {str(base / below) for base in bases for below in ("server-logs", "apps/bionic/server-logs")}
    ours = newest_write(directory)
    return sorted(place for place in places if newest_write(place) > ours + 3600
                  and os.path.realpath(place) != os.path.realpath(directory))


def check_room(patient):
    facts = LogVolume(patient.log_dir, patient.config.log_dir_warn).facts()
    if facts["directoryBytes"] is not None:
        free = "unknown" if facts["freeBytes"] is None else shown_bytes(facts["freeBytes"])
        yield Finding("ok", f"logs take {shown_bytes(facts['directoryBytes'])}, grow by "
                      f"{shown_bytes(facts['growthBytesPerDay'])} a day; {free} are free on that disk")
    for warning in facts["warnings"]:
        yield Finding("warn", *warning.split(": ", 1))


def check_keys(patient):
    config = patient.config
    try:
        _, minted = open_key_file(config)
        keys = Walls(config).need_key
    except (GatewayError, OSError) as error:
        yield refused(error)
        return
    rows = [f"{key.name} ({', '.join(sorted(key.rights))})" for key in minted]
    rows += [f"{name} (all rights)" for name in config.api_key]
    if keys and not rows:
        yield Finding("warn", f"a key is asked for, and there is none: all of {keys_path(config)} "
                              "were revoked",
                      "mint one with --new-key NAME, or remove that file")
    else:
        yield Finding("ok", f"keys: {', '.join(rows)}" if rows else "no keys: none is asked for")
    if patient.exposed and not keys:
        mark, more = ("warn", "") if config.no_auth else ("bad", ", or say --no-auth to let everybody in")
        yield Finding(mark, f"{config.host} is open to the network, and no key is set",
                      f"mint one with --new-key NAME{more}")
    for path in (keys_path(config), Path(patient.env_file)):
        if os.name != "nt" and os.path.exists(path) and os.stat(path).st_mode & 0o044:
            yield Finding("warn", f"{path} can be read by other users of this machine", f"chmod 600 {path}")


def check_network(patient):
    config = patient.config
    try:
        encrypted = tls_context(config) is not None
    except ConfigError as error:
        yield refused(error)
        return
    if not patient.exposed:
        yield Finding("ok", f"{config.host}: only this machine can connect")
        return
    firewall = FIREWALL.get(platform.system(), "").format(port=config.port)
    urls = [own_url(config, address, config.port) for address, _ in reachable(config, lan_addresses)]
    yield Finding("ok", f"others reach it at {', '.join(urls)}" if urls else "no LAN address found",
                  f"if they do not: {firewall}" if firewall else "")
    if not encrypted:
        yield Finding("warn", "keys and prompts pass over the LAN in clear text",
                      "--tls-cert and --tls-key (see the README)")
    if config.allow is None:
        yield Finding("ok", "every address may connect; IP_ALLOWLIST (--allow) can narrow that")


FIREWALL = {"Windows": "lmgateway.ps1 -OpenFirewall",
            "Linux": "let the port through the firewall (sudo ufw allow {port}/tcp)",
            "Darwin": "System Settings > Network > Firewall: allow Python"}


def check_clock(patient):
    now = time.time()
    zone = time.strftime("%Z %z")
    if now < BUILT:
        yield Finding("bad", f"the clock says {utc_text(now)}",
                      "set it, best by NTP: times and certificates depend on it")
        return
    yield Finding("ok", f"{time.strftime('%Y-%m-%d %H:%M:%S')}, time zone {zone}")
    with contextlib.suppress(OSError, AttributeError):
        moment, written = patient.parser.last_moment, os.stat(patient.newest.path).st_mtime
        if moment and abs(moment.epoch - written) > 900:
            yield Finding("warn", f"the newest log's last entry says {moment.utc}, its file "
                          f"{utc_text(written)}",
                          "give lmgateway LM Studio's time zone (environment variable TZ), or mend the clock")


BUILT = 1_750_000_000  # June 2025: no clock is right that says less
CHECKS = (
    Check("Python", check_python),          # version and system
    Check("Options", check_options),        # values, where each comes from, mistakes in .env
    Check("Port", check_port),              # ours is free, or who holds it
    Check("LM Studio", check_lmstudio),     # its server answers, and it is LM Studio
    Check("Settings", check_settings),      # LM Studio's own: port, interface, CORS, logging
    Check("Logs", check_logs),              # directory, newest file, engine, verbose lines
    Check("Room", check_room),              # size and growth of the logs, free disk
    Check("Keys", check_keys),              # who may do what, and whether a key is needed
    Check("Network", check_network),        # who can connect, TLS
    Check("Clock", check_clock),            # time, time zone, and whether the log agrees
)


def doctor(args, config=None):
    """--check: every finding in one line; 1 when something is bad, else 0.  Works whatever is broken."""
    patient = Patient(args, os.environ)
    found = [(check.name, finding) for check in CHECKS for finding in examine(check, patient)]
    bad = any(finding.mark == "bad" for _, finding in found)
    if args.json:
        rows = [{"check": name, **finding._asdict()} for name, finding in found]
        print(json.dumps({"status": "bad" if bad else "ok", "version": VERSION, "findings": rows}))
        return int(bad)
    colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    for name, (mark, what, remedy) in found:
        shown = f"\x1b[{MARKS[mark]}m{mark:4}\x1b[0m" if colour else f"{mark:4}"
        print(f"{shown}  {name:9}  " + printable(what + (f"  ->  {remedy}" if remedy else "")))
    return int(bad)


MARKS = {"ok": "32", "warn": "33", "bad": "31"}


def examine(check, patient):
    """A check's findings; a check that fails is a finding, too."""
    found = []
    try:
        found.extend(check.find(patient))
    except Exception as error:  # the end of the line: what is broken here is what the doctor is for
        what = f"this check failed: {type(error).__name__}: {error}"
        found.append(Finding("bad", what, "please report it"))
    return found


# --- 9.9 --prune -------------------------------------------------------------


def prune(args, config):
    """--prune DAYS: LM Studio's logs that are older; with --yes they go.  Status 1 when one could not go."""
    directory = log_dir_of(config)
    try:
        old = old_logs(directory, int(args.prune), datetime.date.today())
    except OSError as error:
        raise ConfigError(f"--prune: log directory {directory}: {error_text(error)}; name LM Studio's with "
                          "--log-dir (LMSTUDIO_LOG_DIR)") from None
    total = failed = 0
    for log_file, size in old:
        problem = remove_log(log_file.path) if args.yes else None
        failed += problem is not None
        total += size if problem is None else 0
        fate = f"kept, {problem}" if problem else "removed" if args.yes else "would go"
        print(f"{fate}  {shown_bytes(size):>9}  {log_file.path}")
    count = f"{len(old) - failed} file{'s' * (len(old) - failed != 1)}, {shown_bytes(total)}"
    print(f"removed {count}" if args.yes else f"{count} older than {args.prune} days in {directory}"
          + ("; add --yes to remove them" if old else "; nothing to do"))
    return int(failed > 0)


def old_logs(directory, days, today):
    """[(LogFile, bytes)] of the logs whose names are more than so many days old.

    Never the newest, and never the one that LM Studio's own note calls its last.  Only plain files, in plain
    directories, whose names are those of server logs.  Raises OSError when the directory cannot be listed."""
    first_kept = (today - datetime.timedelta(days=days)).isoformat()
    found = list_logs(directory)
    in_use = {(log_file.day, log_file.number) for log_file in found[-1:]} | last_written(directory)
    old = [(log_file, os.lstat(log_file.path)) for log_file in found
           if log_file.day < first_kept and log_file.day[:7] == log_file.month
           and not os.path.islink(os.path.dirname(log_file.path))]
    return [(log_file, state.st_size) for log_file, state in old
            if stat.S_ISREG(state.st_mode) and (log_file.day, log_file.number) not in in_use]


def last_written(directory):
    """{(day, number)} of the file that LM Studio wrote last, by its own note (server-logs-state.json);
    often empty."""
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        note = json.loads(Path(directory, "..", ".internal", "server-logs-state.json").read_bytes())
        last = note["lastWrittenFile"]
        return {(re.split(r"[\\/]", last["filePathBase"])[-1], int(last["index"]))}
    return set()


def remove_log(path):
    """Remove a file.  Gives the reason why it stays, else None."""
    try:
        os.remove(path)
    except OSError as error:
        return error_text(error)
    return None


# --- 9.10 main ---------------------------------------------------------------


class Command(NamedTuple):
    """One command.  run takes (args, config) and gives the exit status."""

    name: str  # of its flag, with _ for -
    run: Callable[[Any, Any], int]
    about: str
    value: str | None = None  # what its flag takes
    companions: tuple = ()  # flags that go with it
    paths: bool = False


COMMANDS = (
    Command("tail_only", tail_only, "print this machine's events; PATH ...: replay saved logs",
            companions=("json", "events", "from_start"), paths=True),
    Command("watch", watch, "print the events of a gateway elsewhere", "URL",
            ("json", "events", "from_start")),
    Command("report", report, "usage by day and model, of --history FILE or of saved logs (PATH)",
            companions=("json",), paths=True),
    Command("demo", serve, "try it all, beside a built-in imitation of LM Studio"),
    Command("check", doctor, "look for what commonly goes wrong, and say the remedy", companions=("json",)),
    Command("prune", prune, "show which of LM Studio's logs are older; --yes removes them", "DAYS", ("yes",)),
    Command("new_key", new_key, "mint a key; --rights infer,view,admin [infer,view]", "NAME", ("rights",)),
    Command("list_keys", list_keys, "names, rights and dates of minted keys"),
    Command("revoke_key", revoke_key, "take a minted key away", "NAME"),
    Command("print_launchd", print_launchd, "a launchd agent for macOS; see the README"),
)
COMPANIONS = tuple(dict.fromkeys(name for command in COMMANDS for name in command.companions))
USAGE = """\
lmgateway.py [options]              gateway, log monitor and dashboard beside LM Studio
       lmgateway.py COMMAND [options]      one of the commands below"""


def build_parser():
    """The ArgumentParser: commands from COMMANDS, options from OPTIONS."""
    parser = Arguments(
        prog="lmgateway.py", usage=USAGE, allow_abbrev=False, add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26, width=100),
        epilog="Flags count before the environment, that before .env, that before defaults. "
               f"Only as variables: {', '.join(row.variable for row in OPTIONS if not row.flag)}. "
               "The README says more.")
    commands = parser.add_argument_group("Commands")
    for command in COMMANDS:
        kind: dict[str, Any] = {"metavar": command.value} if command.value else {"action": "store_true"}
        commands.add_argument(flag_of(command.name), help=command.about, **kind)
    commands.add_argument("--yes", action="store_true", help=argparse.SUPPRESS)
    commands.add_argument("--rights", metavar="LIST", help=argparse.SUPPRESS)
    commands.add_argument("--help", "-h", action="help", help="show this and exit")
    commands.add_argument("--version", action="version", version=f"lmgateway {VERSION}",
                          help="show the version and exit")
    commands.add_argument("paths", nargs="*", metavar="PATH", help=argparse.SUPPRESS)
    printing = parser.add_argument_group("Printing (--tail-only, --watch; --report, --check: --json)")
    printing.add_argument("--json", action="store_true", help="one JSON object a line")
    printing.add_argument("--events", metavar="LIST", help="only these events, comma-separated")
    printing.add_argument("--from-start", action="store_true",
                          help="begin at the start of the newest file, not at its end")
    add_options(parser)
    return parser


def add_options(parser):
    """A flag for each row of OPTIONS that has one, in the row's group."""
    groups = {row.group: parser.add_argument_group(row.group)
              for row in {row.group: row for row in OPTIONS if row.flag}.values()}
    for row in OPTIONS:
        if row.flag:
            kind = ({"action": "store_const", "const": "true"} if row.default is False
                    else {"metavar": row.value})
            default = "" if row.default in (None, False, {}) else f" [{shown_default(row)}]"
            about = row.about.replace("%", "%%") + default
            groups[row.group].add_argument(row.flag, dest=row.name, help=about, **kind)
    groups["Gateway"].add_argument("--env-file", metavar="FILE", help="read options from FILE [.env]")


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ConfigErrors with a remedy."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            near = difflib.get_close_matches(
                unknown[1].partition("=")[0], self._option_string_actions, 1, 0.6)
            message = f"{unknown[1]} is not a known option" + (f"; did you mean {near[0]}?" if near else "")
        raise ConfigError(message if message.endswith("?") else f"{message}; see --help")


def flag_of(name):
    return "--" + name.replace("_", "-")


def chosen_command(args):
    """The Command that args name, None for the gateway.  Raises ConfigError for flags that do not go
    together."""
    chosen = [command for command in COMMANDS if getattr(args, command.name) not in (None, False)]
    if args.paths and not any(command.paths for command in chosen):
        raise ConfigError(f"{args.paths[0]}: a path goes with --tail-only or --report; see --help")
    if len(chosen) > 1:
        raise ConfigError(f"{flag_of(chosen[0].name)} and {flag_of(chosen[1].name)} do not go together; "
                          "choose one")
    for name in COMPANIONS:
        hosts = [command for command in COMMANDS if name in command.companions]
        if getattr(args, name) and not set(hosts) & set(chosen):
            raise ConfigError(f"{flag_of(name)} goes with "
                              f"{' or '.join(flag_of(command.name) for command in hosts)}")
    return chosen[0] if chosen else None


def check_values(args):
    """Raises ConfigError for a command's value that cannot be used."""
    if args.prune is not None and not re.fullmatch(r"[1-9]\d{0,4}", args.prune):
        raise ConfigError(f"--prune {args.prune}: use a number of days from 1")
    if args.events is not None and not words(args.events):
        raise ConfigError("--events: name the events to print, comma-separated; see the README")
    unknown = [name for name in words(args.events or "") if name not in EVENTS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], EVENTS, 1)
        raise ConfigError(f"--events: {unknown[0]} is not an event"
                          + (f"; did you mean {near[0]}?" if near else "; see the README"))


def main(argv=None):
    """Run a command.  Returns its exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    lenient_streams()
    try:
        args = build_parser().parse_args(argv)
        command = chosen_command(args)
        check_values(args)
        if args.check:
            return doctor(args)     # before anything that can be wrong
        config, warnings = load_config(vars(args), os.environ, args.env_file)
        set_up_logging(config)
        for warning in warnings:
            log.warning(warning)
        return (command.run if command else serve)(args, config)
    except GatewayError as error:
        print(f"lmgateway: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        return closed_pipe()
    except OSError as error:    # above all a full disk, where the output goes
        closed_pipe()
        print(f"lmgateway: {error.filename or 'standard output'}: {error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# === 10. DASHBOARD ===========================================================
# One complete HTML document, served as it is.  Raw, so that JavaScript keeps its backslashes;
# never formatted, so that CSS and JavaScript keep their braces.  @NONCE@ is filled in for each view.

DASHBOARD = rb"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lmgateway</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
%3E%3Cpath fill='%23F0B429' d='M2 2h4v12H2z'/%3E%3Cpath fill='%235CB8F2' d='M8 6h6v8H8z'/%3E%3C/svg%3E">
<style nonce="@NONCE@">
/* Colours.  Amber is the prompt being read, blue the answer being written; a test computes the contrast. */
:root {
  color-scheme: light;
  --page: #F6F7F9; --panel: #FFFFFF; --line: #DDE1E7; --track: #E6E9EE;
  --text: #1A1F26; --muted: #5A6472; --queued: #6B7280; --prefill: #9A6200; --decode: #0067A8;
  --cached: #00775A; --ok: #1B7F3B; --warn: #8A5A00; --error: #B3261E; --focus: #0B57D0;
  --fill-prefill: #CE7C00; --fill-decode: #2F8FD0; --fill-cached: #23987A;
  --model-0: #5B5BD6; --model-1: #A0448F; --model-2: #00778A; --model-3: #A5541B; --model-4: #5C7A12;
  --model-5: #6B7280;
}
:root[data-theme="dark"] {
  color-scheme: dark;
  --page: #0F1216; --panel: #171B21; --line: #2A313B; --track: #262D36;
  --text: #E6E9EE; --muted: #9AA5B4; --queued: #8B95A5; --prefill: #F0B429; --decode: #5CB8F2;
  --cached: #3CCB9B; --ok: #5FD38A; --warn: #F5C451; --error: #FF8A80; --focus: #8AB4F8;
  --fill-prefill: #F0B429; --fill-decode: #5CB8F2; --fill-cached: #3CCB9B;
  --model-0: #9C9CF5; --model-1: #E08FD0; --model-2: #4FC3D9; --model-3: #E8A06A; --model-4: #B2CC5F;
  --model-5: #9AA5B4;
}
@media (prefers-contrast: more) {
  :root, :root[data-theme="dark"] { --line: var(--muted); --muted: var(--text); }
}

/* The page */
* { box-sizing: border-box; }
html { font-size: 87.5%; scroll-padding-top: 4.5rem; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1, h2, h3, p, dl, dd, ol, ul, figure { margin: 0; padding: 0; }
ol, ul { list-style: none; }
h2, h3 { font-size: 1rem; font-weight: 600; }
a { color: var(--decode); }
code, pre, .mono {
  font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .857rem; }
.muted { color: var(--muted); }
.small { font-size: .857rem; }
.isolate { unicode-bidi: isolate; }
[hidden] { display: none !important; }
.unseen { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; z-index: 9; padding: .5rem 1rem; background: var(--panel); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
svg.mark { width: .95em; height: .95em; flex: none; fill: currentColor; vertical-align: -.1em; }
.ok { color: var(--ok); }
.warn { color: var(--warn); }
.error { color: var(--error); }
.queued { color: var(--queued); }
.prefill { color: var(--prefill); }
.decode { color: var(--decode); }
.cached { color: var(--cached); }
button, select, input { font: inherit; color: inherit; }
button, select, input[type="search"], input[type="password"] { min-height: 2rem; padding: .2rem .65rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
button { cursor: pointer; }
button:hover, select:hover { border-color: var(--muted); }
button[aria-pressed="true"] { border-color: var(--text); box-shadow: inset 0 0 0 1px var(--text); }
button.plain { min-height: 0; padding: 0; border: 0; background: none; color: inherit;
  text-align: inherit; }
button.plain:hover { text-decoration: underline; }
button.strong { background: var(--text); border-color: var(--text); color: var(--panel); }
input[type="search"] { width: 15rem; max-width: 100%; }

/* Header: who and how it is */
.top { position: sticky; top: 0; z-index: 5; display: flex; align-items: center; gap: .25rem 1.5rem;
  min-height: 48px; padding: 0 1.5rem; background: var(--panel); border-bottom: 1px solid var(--line); }
.top h1 { display: flex; align-items: center; gap: .5rem; font-size: 1.07rem; font-weight: 650;
  white-space: nowrap; }
.top h1 small { font-weight: 400; font-size: .857rem; }
.top nav { display: flex; gap: 1rem; }
.top nav a { color: var(--muted); text-decoration: none; }
.top nav a:hover { color: var(--text); text-decoration: underline; }
.states { display: flex; gap: .25rem 1.5rem; margin-left: auto; min-width: 0; }
.states li { display: flex; align-items: center; gap: .4rem; min-width: 0; white-space: nowrap; }
.states .detail { overflow: hidden; text-overflow: ellipsis; max-width: 16rem; color: var(--muted); }
.tools { display: flex; gap: .5rem; }
.tools button { min-width: 5.2rem; }
.banner { display: flex; gap: .6rem; align-items: baseline; padding: .5rem 1.5rem;
  border-bottom: 1px solid var(--line); background: var(--panel); }
.banner strong { font-weight: 600; }
main { max-width: 108rem; margin: 0 auto; padding: 1.25rem 1.5rem 4rem; display: grid; gap: 1.5rem;
  grid-template-columns: minmax(0, 1fr); }
.panel-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem;
  margin-bottom: .6rem; }
.panel-head .push { margin-left: auto; }
.box { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }

/* Now */
.cards { display: grid; gap: .75rem; align-content: start; min-height: 9.4rem; }
#first-run:not([hidden]) + .cards { min-height: 0; }
.card { display: grid; gap: .55rem; padding: .8rem 1rem .9rem; border-left: 4px solid var(--queued);
  color: var(--text); }
.card.prefill { border-left-color: var(--fill-prefill); }
.card.decode { border-left-color: var(--fill-decode); }
.card.ok, .card.error, .card.warn { border-left-color: var(--line); }
.row { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between;
  gap: .15rem 1.25rem; }
.row > * { min-width: 0; }
.card h3 { display: flex; flex-wrap: wrap; align-items: baseline; gap: .15rem .7rem; font-size: 1.07rem;
  min-width: 0; }
.card h3 .muted { font-weight: 400; font-size: 1rem; }
.clip { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 100%; }
.headline { font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
.steps { display: flex; flex-wrap: wrap; gap: .1rem 0; }
.steps li { color: var(--muted); white-space: nowrap; }
.steps li + li::before { content: "\2192"; margin: 0 .5rem; color: var(--muted); }
.steps li[aria-current] { font-weight: 600; }
.steps li.prefill[aria-current] { color: var(--prefill); }
.steps li.decode[aria-current] { color: var(--decode); }
.steps li.queued[aria-current] { color: var(--text); }
.steps li.ok[aria-current] { color: var(--ok); }
.steps li.error[aria-current] { color: var(--error); }
.meters { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .4rem 2.5rem; }
.meter { display: grid; grid-template-columns: 4rem minmax(4rem, 1fr) 19rem; align-items: center;
  gap: 0 .75rem; }
.meter dt { color: var(--muted); }
.meter .value { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.bar { height: 8px; border-radius: 4px; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; width: 100%; transform-origin: 0 50%;
  transform: scaleX(var(--share, 0)); background: var(--queued); }
.bar.cached i { background: var(--fill-cached); }
.bar.decode i { background: var(--fill-decode); }
.bar.prefill i { background: var(--fill-prefill); }
.bar.warn i { background: var(--warn); }
.bar.error i { background: var(--error); }
svg.trace { display: block; width: 100%; height: 18px; overflow: visible; }
.trace-box { border-bottom: 1px solid var(--line); }
svg.trace path { fill: none; stroke: var(--fill-decode); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
@media (prefers-reduced-motion: no-preference) { body.live .bar i { transition: transform .25s linear; } }
.empty { padding: 1.5rem 1rem; color: var(--muted); }

/* First run and login */
.guide { padding: 1.25rem 1.5rem 1.5rem; display: grid; gap: 1rem; }
.guide h3 { font-size: 1.25rem; }
.copy-line { display: flex; align-items: stretch; gap: .5rem; max-width: 62rem; }
.copy-line code { flex: 1; min-width: 0; padding: .45rem .7rem; background: var(--page);
  border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.checks li { display: grid; grid-template-columns: 1.2rem minmax(0, 1fr); gap: .1rem .5rem;
  padding: .2rem 0; }
.checks p { grid-column: 2; }
.login { width: min(34rem, 100%); justify-self: center; padding: 1.25rem 1.5rem 1.5rem; display: grid;
  gap: .8rem; }
.login div { display: flex; flex-wrap: wrap; gap: .5rem; }
.login input { flex: 1; min-width: 12rem; }

/* Tiles */
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .75rem; }
.tile { padding: .7rem .9rem .6rem; display: grid; grid: auto auto auto 1fr / minmax(0, 1fr);
  min-height: 8.6rem; }
.tile dt { color: var(--muted); white-space: nowrap; }
.tile dd.figure { font-size: 1.5rem; font-weight: 600; line-height: 1.35; white-space: nowrap; }
.tile dd.figure small { font-size: .93rem; font-weight: 400; color: var(--muted); }
.tile dd.note { color: var(--muted); font-size: .857rem; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.tile dd.spark { align-self: end; height: 26px; margin-top: .35rem; }
.tile svg { display: block; width: 100%; height: 26px; }
svg rect, rect.fill { fill: var(--muted); }
rect.prefill, path.prefill { fill: var(--fill-prefill); }
rect.decode, path.decode { fill: var(--fill-decode); }
rect.cached, path.cached { fill: var(--fill-cached); }
rect.error { fill: var(--error); }
rect.ground { fill: var(--line); }

/* Charts */
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem; }
.chart { padding: .8rem 1rem; min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .2rem .75rem; align-items: baseline;
  min-height: 2.2rem; }
.chart figcaption button { margin-left: auto; min-height: 1.75rem; padding: .05rem .55rem;
  font-size: .857rem; }
.plot { height: 200px; position: relative; }
.plot svg { display: block; width: 100%; height: 200px; }
.plot text { fill: var(--muted); font-size: 11px; paint-order: stroke; stroke: var(--panel);
  stroke-width: 3px; }
.plot line { stroke: var(--line); stroke-width: 1; }
.plot line.mean { stroke: var(--text); stroke-dasharray: 4 3; }
.plot .none { position: absolute; inset: 0; display: grid; place-items: center; color: var(--muted); }
.plot .dot { cursor: pointer; }
.plot .dot:hover { stroke: var(--text); stroke-width: 1; }
.model-0 { fill: var(--model-0); color: var(--model-0); }
.model-1 { fill: var(--model-1); color: var(--model-1); }
.model-2 { fill: var(--model-2); color: var(--model-2); }
.model-3 { fill: var(--model-3); color: var(--model-3); }
.model-4 { fill: var(--model-4); color: var(--model-4); }
.model-5 { fill: var(--model-5); color: var(--model-5); }
.twin { height: 200px; overflow: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; min-height: 1.4rem; font-size: .857rem;
  color: var(--muted); }
.legend li { display: flex; align-items: center; gap: .35rem; min-width: 0; }
.legend svg { width: 10px; height: 10px; flex: none; }

/* Tables */
table { border-collapse: collapse; width: 100%; }
th, td { padding: .32rem .6rem; text-align: left; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; color: var(--muted); font-size: .857rem; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
.num { text-align: right; }
.wide { overflow-x: auto; }
#requests-table { table-layout: fixed; }
.c-time { width: 6.1rem; }
.c-status { width: 10.1rem; }
.c-who { width: 8.6rem; }
.c-path { width: 11.4rem; }
.c-queue { width: 5rem; }
.c-first { width: 6.9rem; }
.c-prompt { width: 9.6rem; }
.c-prefill { width: 6.4rem; }
.c-output { width: 5.2rem; }
.c-decode { width: 6.6rem; }
.c-total { width: 5.6rem; }
.c-finish { width: 5.2rem; }
#requests-table td, #requests-table th { overflow: hidden; text-overflow: ellipsis; }
#requests-table tbody tr { cursor: pointer; }
#requests-table tbody tr:hover, #requests-table tbody tr:focus-visible { background: var(--page); }
#requests-table tbody tr:focus-visible { outline-offset: -2px; }
th button.plain { font-weight: 600; }
#requests-table th { position: sticky; top: 48px; z-index: 2; background: var(--panel); }
th[aria-sort="ascending"] button::after { content: " \2191"; }
th[aria-sort="descending"] button::after { content: " \2193"; }
.toolbar { display: flex; flex-wrap: wrap; gap: .4rem .5rem; align-items: center; margin-bottom: .6rem; }
.toolbar button, .toolbar select, .toolbar input { min-height: 1.9rem; font-size: .93rem; }
.toolbar select { max-width: 15rem; }
.newer { position: sticky; top: 56px; z-index: 3; display: flex; justify-content: center; height: 0; }
.newer button { height: 2rem; background: var(--text); color: var(--panel); border-color: var(--text);
  border-radius: 1rem; }
.more { padding: .6rem; text-align: center; border-top: 1px solid var(--line); }

/* Event log */
.log-box { position: relative; }
#log-lines { height: 24rem; overflow: auto; padding: .4rem 0; overflow-anchor: none;
  overscroll-behavior: contain;
  font: .857rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
#log-lines li { display: grid; grid-template-columns: 5.2rem 15.5rem minmax(0, 1fr); gap: 0 .75rem;
  padding: 0 .9rem; content-visibility: auto; contain-intrinsic-height: auto 1.5em; }
#log-lines li > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#log-lines button { margin-right: .75rem; color: var(--muted); font-size: inherit; }
#log-lines.wrap li { content-visibility: visible; }
#log-lines.wrap li > :last-child { white-space: pre-wrap; overflow-wrap: anywhere; }
#log-lines li.WARN > :last-child { color: var(--warn); }
#log-lines li.ERROR > :last-child { color: var(--error); }
#log-lines li.cut { display: block; text-align: center; color: var(--warn); padding: .3rem .9rem; }
#log-lines.large { font-size: 1rem; }
.log-box > button { position: absolute; right: 1.25rem; bottom: .8rem; border-radius: 1rem;
  background: var(--text); color: var(--panel); border-color: var(--text); }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; }
.chips button { min-height: 1.75rem; padding: .05rem .55rem; font-size: .857rem; border-radius: 1rem;
  color: var(--muted); }
.chips button[aria-pressed="true"] { color: var(--text); box-shadow: none; border-color: var(--muted); }
.chips button[aria-pressed="false"] { text-decoration: line-through; background: none; }

/* Facts, usage, dialogs */
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 0 2rem;
  padding: .6rem 1rem; }
.facts > div { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: .75rem;
  padding: .28rem 0; }
.facts dt { color: var(--muted); }
.facts dd { overflow-wrap: anywhere; }
.facts .whole { grid-column: 1 / -1; }
dialog { color: inherit; background: var(--panel); border: 1px solid var(--line); padding: 0; }
dialog::backdrop { background: rgba(10, 14, 20, .35); }
dialog.drawer { width: min(46rem, 100vw); max-width: none; height: 100vh; max-height: none;
  margin: 0 0 0 auto; border-width: 0 0 0 1px; overflow: auto; overscroll-behavior: contain; }
dialog.help { border-radius: 8px; max-width: 34rem; padding: 1.25rem 1.5rem; }
.drawer-head { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .3rem .75rem;
  align-items: center; min-height: 48px; padding: .5rem 1.25rem; background: var(--panel);
  border-bottom: 1px solid var(--line); z-index: 1; }
.drawer-head .push { margin-left: auto; }
.drawer-body { padding: 1rem 1.25rem 3rem; display: grid; gap: 1.4rem;
  grid-template-columns: minmax(0, 1fr); }
.drawer-body h3 { margin-bottom: .4rem; }
.drawer-body .facts { padding: 0; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
.drawer-body .facts > div { grid-template-columns: 6rem minmax(0, 1fr); }
.drawer-body .names > div { grid-template-columns: 9.5rem minmax(0, 1fr); }
.phase-bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--track);
  gap: 1px; }
.phase-bar i { flex: var(--share) 1 0; min-width: 2px; background: var(--queued); }
.phase-bar i.prefill { background: var(--fill-prefill); }
.phase-bar i.decode { background: var(--fill-decode); }
.phase-bar i.loading { background: var(--line); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em;
  background: var(--queued); }
.swatch.prefill { background: var(--fill-prefill); }
.swatch.decode { background: var(--fill-decode); }
.swatch.cached { background: var(--fill-cached); }
.swatch.loading { background: var(--line); }
.timeline td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.timeline td:nth-child(-n+2) { white-space: nowrap; }
kbd { font: inherit; border: 1px solid var(--line); border-radius: 4px; padding: 0 .4rem; }
.keys { display: grid; grid-template-columns: 5rem 1fr; gap: .4rem; margin: .8rem 0; }
footer { padding: 0 1.5rem 2rem; text-align: center; color: var(--muted); }

/* Smaller screens: states in a word, fewer columns, then cards for rows */
@media (max-width: 1400px) { #requests-table .c-path { display: none; } }
@media (max-width: 1280px) { .top nav { display: none; } }
@media (max-width: 1240px) { #requests-table .c-queue, #requests-table .c-finish { display: none; } }
@media (max-width: 1060px) {
  .states .detail { display: none; }
  .meters { grid-template-columns: minmax(0, 1fr); }
  #requests-table .c-prefill, #requests-table .c-decode { display: none; }
}
@media (max-width: 880px) {
  .top h1 small { display: none; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  #requests-table, #requests-table tbody { display: block; }
  #requests-table thead, #requests-table .c-total { display: none; }
  #requests-table tr { display: grid; grid-template-columns: 5rem minmax(0, 1.6fr) minmax(0, 1fr);
    gap: .1rem .75rem; padding: .55rem .8rem; border-bottom: 1px solid var(--line); }
  #requests-table td { width: auto; padding: 0; border: 0; text-align: left; }
  #requests-table td[data-label]::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: .857rem; }
  #requests-table .c-status { grid-column: 2; }
  #requests-table .c-who { text-align: right; }
  #requests-table .c-model { grid-column: 1 / -1; color: var(--muted); }
}
@media (max-width: 640px) {
  html { scroll-padding-top: 7rem; }
  .top { flex-wrap: wrap; top: -3rem; padding: .4rem 1rem; }
  .tools { margin-left: auto; }
  .tools button { min-width: 0; }
  .states { order: 3; flex-wrap: wrap; justify-content: space-between; gap: 0 .4rem; width: 100%; margin: 0;
    min-height: 2rem; font-size: .93rem; }
  .banner { padding: .5rem 1rem; }
  main { padding: 1rem 1rem 3rem; }
  .headline, .card h3 { width: 100%; }
  .steps .ahead, .chart figcaption .muted { display: none; }
  .meter { grid-template-columns: 4rem minmax(0, 1fr); }
  .meter .value { grid-area: 1 / 2; text-align: right; font-size: .857rem; }
  .meter .gauge { grid-area: 2 / 1 / auto / -1; margin-top: .2rem; }
  svg.trace { height: 12px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: .6rem .7rem; }
  .tile:last-child { grid-column: 1 / -1; }
  .tile dd.figure { font-size: 1.25rem; }
  .chips { flex-wrap: nowrap; overflow-x: auto; }
  .chips button { flex: none; }
  #log-lines li { grid-template-columns: 5rem minmax(0, 1fr); padding: .15rem .6rem;
    content-visibility: visible; }
  #log-lines li > :last-child { grid-column: 1 / -1; white-space: pre-wrap; overflow-wrap: anywhere; }
  .facts, .drawer-body .facts { grid-template-columns: minmax(0, 1fr); }
  .facts > div { grid-template-columns: 7.5rem minmax(0, 1fr); }
  .copy-line { flex-wrap: wrap; }
  .copy-line code { flex-basis: 100%; }
  input[type="search"] { width: 100%; }
}
@media (pointer: coarse) {
  button, select, input[type="search"], input[type="password"], .toolbar button, .toolbar select,
    .toolbar input, .chips button, .chart figcaption button { min-height: 44px; }
  button.plain { min-height: 32px; }
}
@media (forced-colors: active) {
  .card { border-left-width: 6px; }
  .bar, .phase-bar { border: 1px solid CanvasText; }
  .bar i, .phase-bar i, .swatch { background: Highlight !important; forced-color-adjust: none; }
  button[aria-pressed="true"] { border: 2px solid Highlight; }
}
@media print {
  .top { position: static; }
  .tools, .toolbar, .skip { display: none; }
}
</style>
<script nonce="@NONCE@">
function stored(name, otherwise) {
  try { return localStorage.getItem(name) ?? otherwise; } catch { return otherwise; }
}

/* Light, dark, or (auto) as the system has it.  Here, before the first paint, so that nothing flashes. */
function applyTheme(chosen) {
  const dark = chosen === "dark" || chosen === "auto" && matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
applyTheme(stored("theme", "auto"));
</script>
</head>
<body>
<a class="skip" href="#now">Skip to what is running</a>
<svg hidden>
  <symbol id="mark-ok" viewBox="0 0 16 16"><path
    d="M8 0a8 8 0 100 16A8 8 0 008 0zM7 11.6L3.4 8l1.4-1.4L7 8.8l4.2-4.2L12.6 6z"/></symbol>
  <symbol id="mark-warn" viewBox="0 0 16 16"><path d="M8 1L0 15h16zM7 6h2v4H7zm0 5h2v2H7z"/></symbol>
  <symbol id="mark-error" viewBox="0 0 16 16"><path
    d="M5 0h6l5 5v6l-5 5H5l-5-5V5zm1 4.5L4.5 6l2 2-2 2L6 11.5l2-2 2 2 1.5-1.5-2-2 2-2L10 4.5l-2 2z"/></symbol>
  <symbol id="mark-queued" viewBox="0 0 16 16"><path
    d="M8 0a8 8 0 100 16A8 8 0 008 0zm0 2a6 6 0 110 12A6 6 0 018 2zM7 4h2v3.6l2.7 1.6-1 1.7L7 8.7z"/></symbol>
  <symbol id="mark-left" viewBox="0 0 16 16"><path d="M8 0a8 8 0 100 16A8 8 0 008 0zM4 7h8v2H4z"/></symbol>
  <symbol id="mark-prefill" viewBox="0 0 16 16"><path
    d="M2 1h12v2H2zm0 4h12v2H2zm0 4h8v2H2zm0 4h5v2H2z"/></symbol>
  <symbol id="mark-decode" viewBox="0 0 16 16"><path d="M11.5 0L16 4.5 5.5 15 0 16l1-5.5z"/></symbol>
  <symbol id="mark-0" viewBox="0 0 10 10"><circle cx="5" cy="5" r="4"/></symbol>
  <symbol id="mark-1" viewBox="0 0 10 10"><path d="M1 1h8v8H1z"/></symbol>
  <symbol id="mark-2" viewBox="0 0 10 10"><path d="M5 0l5 9H0z"/></symbol>
  <symbol id="mark-3" viewBox="0 0 10 10"><path d="M5 0l5 5-5 5-5-5z"/></symbol>
  <symbol id="mark-4" viewBox="0 0 10 10"><path d="M0 1h10L5 10z"/></symbol>
  <symbol id="mark-5" viewBox="0 0 10 10"><path
    d="M3.5 0h3v3.5H10v3H6.5V10h-3V6.5H0v-3h3.5z"/></symbol>
</svg>

<header class="top">
  <h1><svg class="mark" viewBox="0 0 16 16" aria-hidden="true"><path class="prefill" d="M1 1h6v14H1z"/><path
    class="decode" d="M9 6h6v9H9z"/></svg>lmgateway <small class="muted" id="host"></small></h1>
  <nav aria-label="Panels">
    <a href="#now">Now</a><a href="#trends">Trends</a><a href="#requests">Requests</a><a href="#log">Log</a>
    <a href="#usage" id="usage-link" hidden>Usage</a><a href="#server">Server</a>
  </nav>
  <ul class="states" aria-label="State">
    <li id="state-lmstudio"></li>
    <li id="state-log"></li>
    <li id="state-stream"></li>
  </ul>
  <div class="tools">
    <button type="button" id="theme"
      title="Colours: as the system has them, light or dark">&#9680; Auto</button>
    <button type="button" id="pause" aria-pressed="false"
      title="Stop painting; nothing is lost (p)">Pause</button>
  </div>
</header>
<div id="banners"></div>
<p class="unseen" role="status" aria-live="polite" id="live"></p>
<noscript><p class="banner">This page needs JavaScript.  The same figures as JSON: /debug/status and
  /debug/requests.</p></noscript>

<main id="main">
  <form class="box login" id="login" action="/login" method="post" hidden>
    <h2>This gateway asks for a key</h2>
    <p class="muted" id="login-why">The key that your clients use, with the right to view. It is sent once,
      answered with a cookie, and not kept on this page.</p>
    <div><label class="unseen" for="key">Key</label>
      <input type="password" id="key" name="key" placeholder="Key" autocomplete="current-password" required>
      <button class="strong">Log in</button></div>
    <p class="error" id="login-error" role="alert" hidden></p>
  </form>

  <section id="now" aria-labelledby="now-title">
    <div class="panel-head"><h2 id="now-title">Now</h2><p class="muted" id="now-note"></p>
      <p class="muted push" id="as-of"></p></div>
    <div id="first-run" class="box guide" hidden></div>
    <div class="cards" id="cards"></div>
    <p class="muted small" id="more-running"></p>
  </section>

  <section id="trends" aria-labelledby="tiles-title">
    <div class="panel-head"><h2 id="tiles-title">Last 15 minutes</h2>
      <p class="muted" id="tiles-note"></p></div>
    <dl class="tiles" id="tiles"></dl>
  </section>

  <section id="charts" aria-labelledby="charts-title">
    <div class="panel-head"><h2 id="charts-title">Last hour</h2><p class="muted" id="charts-note"></p></div>
    <div class="charts" id="chart-list"></div>
  </section>

  <section id="requests" aria-labelledby="requests-title">
    <div class="panel-head"><h2 id="requests-title">Requests</h2>
      <p class="muted" id="requests-note"></p></div>
    <div class="toolbar" role="group" aria-label="Filter requests">
      <label class="unseen" for="filter">Text</label>
      <input type="search" id="filter" placeholder="Filter by text ( / )" autocomplete="off"
        spellcheck="false">
      <label class="unseen" for="by-status">Outcome</label><select id="by-status"></select>
      <label class="unseen" for="by-key">Key</label><select id="by-key"></select>
      <label class="unseen" for="by-model">Model</label><select id="by-model"></select>
      <button type="button" id="clear" hidden>Clear</button>
    </div>
    <div class="newer" id="requests-newer" hidden><button type="button"></button></div>
    <div class="box"><table id="requests-table" aria-labelledby="requests-title">
      <thead><tr id="requests-head"></tr></thead>
      <tbody id="requests-rows"></tbody></table>
      <p class="empty" id="requests-empty" hidden></p>
      <p class="more" id="requests-more" hidden><button type="button">Show more</button></p></div>
  </section>

  <section id="log" aria-labelledby="log-title">
    <div class="panel-head"><h2 id="log-title">Event log</h2><p class="muted" id="log-note"></p></div>
    <div class="toolbar chips" id="log-types" role="group" aria-label="Types of events"></div>
    <div class="toolbar" role="group" aria-label="Filter events">
      <label class="unseen" for="log-filter">Text</label>
      <input type="search" id="log-filter" placeholder="Text, or /pattern/" autocomplete="off"
        spellcheck="false">
      <label class="unseen" for="log-level">Level</label><select id="log-level"></select>
      <label class="unseen" for="log-model">Model</label><select id="log-model"></select>
      <button type="button" id="log-follow" aria-pressed="true">Follow</button>
      <button type="button" id="log-wrap" aria-pressed="false">Wrap</button>
      <button type="button" id="log-large" aria-pressed="false">Larger</button>
      <button type="button" id="log-save">Download JSONL</button>
    </div>
    <div class="box log-box"><ol id="log-lines" tabindex="0" aria-labelledby="log-title"></ol>
      <button type="button" id="log-newer" hidden></button></div>
  </section>

  <section id="usage" aria-labelledby="usage-title" hidden>
    <div class="panel-head"><h2 id="usage-title">Usage</h2><p class="muted">from the history file</p></div>
    <div class="toolbar" role="group" aria-label="What to add up">
      <label class="unseen" for="usage-by">By</label><select id="usage-by"></select>
      <label class="unseen" for="usage-since">Since</label><select id="usage-since"></select>
      <a id="usage-csv" download>CSV</a>
    </div>
    <div class="box wide"><div id="usage-table"></div></div>
  </section>

  <section id="server" aria-labelledby="server-title">
    <div class="panel-head"><h2 id="server-title">Server</h2></div>
    <dl class="box facts" id="facts"></dl>
  </section>
</main>
<footer class="small"><p><span id="version">lmgateway</span> &middot; keys: <kbd>?</kbd></p></footer>

<dialog class="drawer" id="drawer" aria-labelledby="drawer-title">
  <div class="drawer-head"><h2 id="drawer-title" class="isolate"></h2>
    <span class="push"></span><button type="button" id="drawer-copy">Copy as JSON</button>
    <button type="button" id="drawer-close" autofocus>Close</button></div>
  <div class="drawer-body" id="drawer-body"></div>
</dialog>

<dialog class="help" id="help" aria-labelledby="help-title">
  <h2 id="help-title">Keys</h2>
  <dl class="keys"><dt><kbd>/</kbd></dt><dd>filter the requests</dd>
    <dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next, previous request; <kbd>Enter</kbd> opens it</dd>
    <dt><kbd>p</kbd></dt><dd>pause and go on</dd><dt><kbd>Esc</kbd></dt><dd>close what is open</dd>
    <dt><kbd>?</kbd></dt><dd>this list</dd></dl>
  <p><label><input type="checkbox" id="keys-on" checked> single keys act</label></p>
  <p><button type="button" id="help-close">Close</button></p>
</dialog>

<template id="card-template"><article class="box card">
  <div class="row">
    <h3><span class="isolate clip" data-part="who"></span>
      <span class="muted isolate clip" data-part="model"></span></h3>
    <p class="headline isolate" data-part="headline"></p>
  </div>
  <div class="row">
    <ol class="steps" data-part="steps"></ol>
    <p class="muted"><span data-part="elapsed"></span> &middot;
      <button type="button" class="plain mono" data-part="id" title="Open this request"></button></p>
  </div>
  <dl class="meters">
    <div class="meter"><dt>Prompt</dt>
      <dd class="gauge"><div class="bar prefill" data-part="promptBar" role="progressbar" aria-valuemin="0"
        aria-valuemax="100" aria-label="Prompt read"><i></i></div></dd>
      <dd class="value" data-part="prompt"></dd></div>
    <div class="meter"><dt>Output</dt>
      <dd class="gauge trace-box" aria-hidden="true"><svg class="trace" viewBox="0 0 60 18"
        preserveAspectRatio="none"><path data-part="trace"/></svg></dd>
      <dd class="value" data-part="output"></dd></div>
    <div class="meter"><dt>Cache</dt>
      <dd class="gauge" aria-hidden="true"><div class="bar cached" data-part="cacheBar"><i></i></div></dd>
      <dd class="value" data-part="cache"></dd></div>
    <div class="meter"><dt>Context</dt>
      <dd class="gauge" aria-hidden="true"><div class="bar context" data-part="contextBar"><i></i></div></dd>
      <dd class="value" data-part="context"></dd></div>
  </dl>
</article></template>
<script nonce="@NONCE@">
"use strict";
/* How the page works: events of /debug/stream and answers of /debug/status, /debug/requests and /debug/usage
   change `page`; whatever they changed is touched; touched panels are painted together, four times a second
   at most.  All that is shown came from a client or a log and is hostile: it becomes text, never markup. */

// --- 1. words and numbers

const NONE = "\u2014";
const known = value => typeof value === "number" && Number.isFinite(value);
const words = value => value === null || value === undefined || value === "" ? NONE : String(value);
const whole = n => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const tenth = (n, digits) => n.toFixed(digits).replace(/\.0$/, "");
const two = n => String(n).padStart(2, "0");
const plural = (n, word) => whole(n) + " " + word + (n === 1 ? "" : "s");
const tokens = n => known(n) ? whole(n) : NONE;
const rate = n => known(n) ? n < 100 ? n.toFixed(1) : whole(n) : NONE;
const speed = n => known(n) ? rate(n) + " tok/s" : NONE;
const percent = n => known(n) ? Math.round(n) + " %" : NONE;
const listed = parts => parts.filter(Boolean).join(" \u00b7 ");

/* A duration that is over: 0.42 s, 12.3 s, 2m 05s, 1h 02m. */
function span(ms) {
  if (!known(ms)) return NONE;
  const s = ms / 1000;
  if (s >= 59.95) return longSpan(Math.round(s));
  return (s < 0.005 ? "0" : s.toFixed(s < 9.995 ? 2 : 1)) + " s";
}

/* A duration that runs: whole seconds, so that it does not flicker. */
function running(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 60 ? s + " s" : longSpan(s);
}

function longSpan(s) {
  if (s < 3600) return Math.floor(s / 60) + "m " + two(s % 60) + "s";
  if (s < 86400) return Math.floor(s / 3600) + "h " + two(Math.floor(s % 3600 / 60)) + "m";
  return Math.floor(s / 86400) + "d " + Math.floor(s % 86400 / 3600) + "h";
}

/* A count in few letters: 6 144, 14.9 k, 2.1 M. */
function short(n) {
  if (n < 10000) return whole(n);
  return n < 999500 ? tenth(n / 1000, n < 99950 ? 1 : 0) + "\u202fk" : tenth(n / 1e6, 1) + "\u202fM";
}

function bytes(n) {
  if (!known(n)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1024 && at < units.length - 1) { n /= 1024; at += 1; }
  return (at && n < 100 ? n.toFixed(1) : whole(n)) + " " + units[at];
}

function clockTime(ms, seconds = true) {
  const t = new Date(ms);
  return two(t.getHours()) + ":" + two(t.getMinutes()) + (seconds ? ":" + two(t.getSeconds()) : "");
}

/* The moment of an ISO text in this place's own words. */
function dateTime(iso) {
  const ms = Date.parse(iso ?? "");
  return known(ms) ? new Date(ms).toLocaleString() : NONE;
}

/* The share-th quantile of sorted numbers, between neighbours; undefined of none. */
function quantile(sorted, share) {
  if (!sorted.length) return undefined;
  const at = (sorted.length - 1) * share, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const sortedNumbers = values => values.filter(known).sort((a, b) => a - b);
const sum = values => values.reduce((total, value) => total + (known(value) ? value : 0), 0);
const different = values => [...new Set(values)].sort();

// --- 2. nodes

const $ = id => document.getElementById(id);

/* el("td.num", "text", node): an element with its classes; strings become text, null becomes nothing. */
function el(spec, ...content) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  node.append(...content.filter(part => part !== null && part !== undefined));
  return node;
}

function draw(tag, attributes = {}, ...content) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content);
  return node;
}

const mark = (name, tone = "") =>
  draw("svg", {class: "mark " + tone, "aria-hidden": "true"}, draw("use", {href: "#mark-" + name}));

/* Text into a node, and nothing where it stands there already: a write costs a layout. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/* The same for an attribute; null and undefined take it away. */
function attribute(node, name, value) {
  if (value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/* True when what a node shows is not what key stands for; from then on it is. */
function outdated(node, key) {
  if (node.dataset.key === key) return false;
  node.dataset.key = key;
  return true;
}

function button(text, act, spec = "button") {
  const node = el(spec, text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

const fact = (term, ...about) => el("div", el("dt", term), el("dd.isolate", ...about));

function options(select, rows, chosen) {
  select.replaceChildren(...rows.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function heading(text, spec = "th") {
  const cell = el(spec, text);
  cell.scope = "col";
  return cell;
}

/* A table of texts: the first column is a name, the others are numbers. */
function table(head, rows) {
  const kind = (tag, at) => tag + (at ? ".num" : ".isolate");
  return el("table", el("thead", el("tr", ...head.map((text, at) => heading(text, kind("th", at))))),
    el("tbody", ...rows.map(row => el("tr", ...row.map((text, at) => el(kind("td", at), text))))));
}

function store(name, value) {
  try { localStorage.setItem(name, value); } catch { /* storage may be forbidden */ }
}

async function copy(text, from) {
  const label = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {         // without https there is no clipboard, save on this machine
    const area = el("textarea", text);
    from.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  put(from, "Copied");
  setTimeout(() => put(from, label), 1500);
}

// --- 3. what the page knows

const REQUESTS_KEPT = 2000, EVENTS_KEPT = 2000, TEXT_KEPT = 4000, ROWS = 500;

const page = {
  status: null,         // the last answer of /debug/status
  fresh: false,         // the last question for it was answered
  asked: 0,             // when, ms of this browser's clock
  ahead: 0,             // the gateway's clock less ours, ms
  requests: new Map(),  // id -> request, as /debug/requests has them
  loaded: false,        // /debug/requests has been read
  events: [],           // the latest, {n, id, name, data, level}
  counts: new Map(),    // event name -> how many came
  total: 0,
  missed: 0,            // events that gaps told of
  paused: false,
  signedOut: false,
};

/* This moment by the gateway's clock. */
const now = () => Date.now() + page.ahead;

const STATES = {        // word, mark and colour
  waiting: ["waiting", "queued", "queued"],
  queued: ["queued", "queued", "queued"],
  loading: ["loading model", "queued", "queued"],
  prompt: ["reading prompt", "prefill", "prefill"],
  generating: ["writing", "decode", "decode"],
  done: ["done", "ok", "ok"],
  failed: ["failed", "error", "error"],
  abandoned: ["client left", "left", "warn"],
  lost: ["end not seen", "warn", "warn"],       // the page's own: it ran, and then nobody knew of it
};
const stateOf = r => STATES[r.state] ?? [words(r.state), "queued", "queued"];
const ended = r => ["done", "failed", "abandoned", "lost"].includes(r.state);
const who = r => r.key || (r.source === "lmstudio" ? "not via gateway" : r.client) || NONE;
const modelOf = r => words(r.model);
const usageOf = r => r.tokenUsage ?? {};
const promptOf = r => usageOf(r).promptTokens ?? r.progress?.promptTokens ?? r.cache?.total;
const cachedOf = r => r.cachedTokens ?? r.cache?.reused;
const outputOf = r => usageOf(r).completionTokens ?? r.progress?.outputTokens;
const outputTokens = r => (usageOf(r).estimated ? "~" : "") + tokens(outputOf(r));
const firstOf = r => r.timeToFirstTokenMs;
const prefillOf = r => r.promptTokensPerSecond ?? r.progress?.promptTokensPerSecond;
const decodeOf = r => r.tokensPerSecond ?? (ended(r) ? undefined : r.progress?.outputTokensPerSecond);
const queueOf = r => r.queueMs ?? r.phases?.find(phase => phase.name === "queued")?.ms;
const phasesOf = r => (r.phases ?? []).filter(phase => STATES[phase.name] && phase.ms >= 50);
const endOf = r => r.started + (r.totalTimeMs ?? r.elapsedMs ?? 0);

/* How long it took, or runs; while the stream is down, how long it had run when we last heard. */
function elapsedOf(r) {
  if (ended(r)) return r.totalTimeMs ?? r.elapsedMs;
  return (live() ? now() : stream.heard + page.ahead) - r.started;
}

/* Take what is news about a request.  One that has ended stays so, whichever answer comes late. */
function learn(id, news) {
  let r = page.requests.get(id);
  if (!r) {
    r = {requestId: id, state: "waiting", trace: [], version: 0};
    page.requests.set(id, r);
    forget();
  }
  const over = ended(r) && r.state !== "lost", state = over ? r.state : news.state ?? r.state;
  if (state !== r.state) wantRequests();
  Object.assign(r, news, {state});
  if (news.phases) r.phasesIn = state;      // the phase that was not over when they were measured
  r.version += 1;
  r.started = startOf(r, news);
  if (!over && ended(r)) r.seenEnd = Date.now();
  touch("now", "tiles", "charts", "requests", "title");
  return r;
}

/* When it started, by the gateway's clock.  How long it runs comes in ms, its start in whole seconds. */
function startOf(r, news) {
  if (known(news.elapsedMs) && !ended(r)) return now() - news.elapsedMs;
  if (known(r.started)) return r.started;
  const said = Date.parse(r.startedAt ?? news.timestamp ?? "");
  return known(said) && (ended(r) || now() - said > 2000) ? said : now();
}

/* The oldest that have ended make room. */
function forget() {
  if (page.requests.size <= REQUESTS_KEPT) return;
  for (const [id, r] of page.requests) {
    if (page.requests.size <= REQUESTS_KEPT) return;
    if (ended(r)) page.requests.delete(id);
  }
}

const allRequests = () => [...page.requests.values()];
const newestFirst = () => allRequests().sort((a, b) =>
  b.started - a.started || (b.requestId > a.requestId ? 1 : -1));
const runningOnes = () => allRequests().filter(r => !ended(r)).sort((a, b) => a.started - b.started);

// --- 4. events

const ELSEWHERE = new Set(["timestamp", "requestId", "message", "level", "tags"]);

/* An event's data in a line; what stands elsewhere in its row is left out. */
function fields(data) {
  const shown = Object.entries(data).filter(([name, value]) =>
    !ELSEWHERE.has(name) && value !== null && value !== undefined);
  return shown.map(([name, value]) =>
    name + " " + (typeof value === "object" ? JSON.stringify(value) : value)).join("  ");
}
const message = data => words(data.message);
const said = data => listed([data.outcome, data.message, data.model]) || NONE;

/* Each event that the stream sends: how its line in the log reads, and what it changes. */
const EVENTS = {
  connected: [message, () => { wantRequests(); wantStatus(); }],
  ping: [() => "the stream is quiet and alive"],
  gap: [gapText, data => { page.missed += data.count ?? 0; wantRequests(); }],
  inference_start: [fields, started],
  inference_progress: [fields, progressed],
  inference_complete: [fields, data => finished(data, "done")],
  error: [fields, data => finished(data, data.operation === "client_disconnected" ? "abandoned" : "failed")],
  lmstudio_log: [message],
  lmstudio_chat_start: [said],
  lmstudio_sampling_params: [fields],
  lmstudio_token_info: [fields],
  lmstudio_cache_stats: [said],
  lmstudio_processing_start: [message],
  lmstudio_prompt_progress: [said],
  lmstudio_generation_start: [message],
  lmstudio_prediction_stats: [fields],
  lmstudio_chat_end: [said, () => wantRequests()],
  lmstudio_error: [message],
  lmstudio_file_switch: [fields, () => wantStatus()],
  lmstudio_month_transition: [fields, () => wantStatus()],
};
const textOf = (name, data) => (EVENTS[name]?.[0] ?? fields)(data);
const LEVEL_OF = {error: "ERROR", lmstudio_error: "ERROR", gap: "WARN"};

function gapText({from, to, count}) {
  return known(count) ? `${plural(count, "event")} missed while disconnected (${from} to ${to})`
    : "the gateway was restarted; events in between are not known";
}

function receive(name, data, id) {
  page.counts.set(name, (page.counts.get(name) ?? 0) + 1);
  page.total += 1;
  EVENTS[name]?.[1]?.(data);
  if (name === "ping") return;
  if (typeof data.message === "string") data.message = bounded(data.message);
  page.events.push({n: page.total, id, name, data, level: data.level ?? LEVEL_OF[name] ?? "INFO"});
  if (page.events.length > EVENTS_KEPT * 1.25) page.events.splice(0, page.events.length - EVENTS_KEPT);
  touch("log");
}

/* The beginning of a text.  Through JSON, because a slice would keep the whole of it in memory. */
function bounded(text) {
  if (text.length <= TEXT_KEPT) return text;
  return JSON.parse(JSON.stringify(`${text.slice(0, TEXT_KEPT)} ... (${whole(text.length)} characters)`));
}

function started(data) {
  learn(data.requestId, {...data, source: "gateway", modelAsked: data.model});
}

function progressed(data) {
  const {requestId, timestamp, source, state, model, elapsedMs, cachedTokens, contextSize, contextUsed,
    ...progress} = data;
  const news = {state, elapsedMs, progress}, before = page.requests.get(requestId);
  if (source) news.source = source;
  if (model) news.model = model;
  if (known(contextSize)) news.context = {size: contextSize, used: contextUsed};
  if (known(cachedTokens)) {
    news.cache = {total: progress.promptTokens, ...before?.cache, reused: cachedTokens};
  }
  const r = learn(requestId, news);
  r.heard = Date.now();
  if (known(progress.outputTokensPerSecond)) {
    r.trace.push(progress.outputTokensPerSecond);
    if (r.trace.length > 60) r.trace.shift();
  }
}

function finished(data, state) {
  const r = learn(data.requestId, {...data, state});
  const took = known(r.totalTimeMs) ? " after " + span(r.totalTimeMs) : "";
  if (page.loaded) tell(`Request of ${who(r)}: ${stateOf(r)[0]}${took}`);
}

// --- 5. the stream: reads /debug/stream, comes back by itself and goes on where it was

const STALE_MS = 20000, DEAD_MS = 60000;    // the gateway breaks a silence after 15 s

/* Text of an event stream to frames (WHATWG HTML, 9.2): give(event, data, id) for each complete one. */
class Frames {
  constructor(give) {
    this.give = give;
    this.rest = "";
  }

  feed(text) {
    const blocks = (this.rest + text).split("\n\n");
    this.rest = blocks.pop();
    for (const block of blocks) this.frame(block);
  }

  frame(block) {
    const found = {};
    for (const line of block.split("\n")) {
      const colon = line.indexOf(": ");
      if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 2);
    }
    if (found.data) this.give(found.event, JSON.parse(found.data), found.id);
  }
}

const channel = new MessageChannel();

/* Let the browser paint and take clicks.  A timer would wait longer, in a hidden tab a second. */
const breathe = () => new Promise(go => { channel.port1.onmessage = go; channel.port2.postMessage(0); });

const stream = {
  state: "connecting",  // live, waiting (until .next), connecting, out
  begun: 0,             // when this attempt began
  heard: 0,             // when the last byte came
  next: 0,              // when the next attempt is due
  last: "",             // id of the last event
  failures: 0,          // since it was live
  breaks: 0,
  attempt: null,        // AbortController of the connection
  wake: null,           // ends the pause before the next attempt

  async run() {
    for (;;) {
      if (!page.signedOut) await this.connect();
      const pause = 1000 * Math.min(30, 2 ** this.failures) * (0.5 + Math.random() / 2);
      this.failures += 1;
      this.next = Date.now() + pause;
      this.become(page.signedOut ? "out" : "waiting");
      await new Promise(go => {
        this.wake = go;
        if (!page.signedOut) setTimeout(go, pause);
      });
    }
  },

  async connect() {
    this.become("connecting");
    this.begun = Date.now();
    this.attempt = new AbortController();
    try {
      const answer = await fetch("/debug/stream", {signal: this.attempt.signal, cache: "no-store",
        headers: this.last ? {"Last-Event-ID": this.last} : {}});
      if (refused(answer)) await signOut(answer);
      else if (answer.ok) await this.read(answer.body.getReader());
    } catch { /* a broken connection: run() tries again */ }
  },

  async read(reader) {
    const decoder = new TextDecoder(), frames = new Frames((...frame) => this.take(...frame));
    let since = performance.now();
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      this.heard = Date.now();
      frames.feed(decoder.decode(value, {stream: true}));
      if (performance.now() - since > 30) {
        await breathe();
        since = performance.now();
      }
    }
  },

  take(name, data, id) {
    if (name === "connected") {
      this.failures = 0;
      this.become("live");
    }
    if (id) this.last = id;
    receive(name, data, id);
  },

  become(state) {
    if (this.state === state) return;
    if (state === "live" && this.breaks) tell("The stream is live again");
    if (this.state === "live") {
      this.breaks += 1;
      tell("The stream is interrupted");
      wantStatus();
    }
    this.state = state;
    document.body.classList.toggle("live", state === "live");
    touch("header", "now");
  },

  /* Waiting may be over: the network is back, the page is seen again, a key was taken. */
  hurry() {
    if (live() && Date.now() - this.heard > STALE_MS) this.attempt.abort();
    this.wake?.();
  },

  /* Once a second: no byte and no ping for a minute is a dead link, as after a laptop's sleep. */
  watch() {
    const quiet = Date.now() - (live() ? this.heard : this.begun);
    if (quiet > DEAD_MS && ["live", "connecting"].includes(this.state)) this.attempt.abort();
    if (!live() || quiet > STALE_MS) touch("header");
  },
};
const live = () => stream.state === "live";

// --- 6. questions: /debug/status, /debug/requests, and the key

const refused = answer => answer.status === 401 || answer.status === 403;

async function reasonOf(answer) {
  try { return (await answer.json()).error.message; } catch { return "The gateway says no."; }
}

/* The JSON of one of our routes; null where there is no answer or no such route. */
async function get(address) {
  try {
    const answer = await fetch(address, {cache: "no-store", signal: AbortSignal.timeout?.(20000)});
    if (refused(answer)) return await signOut(answer);
    return answer.ok ? await answer.json() : null;
  } catch { return null; }
}

/* A question: asked once in so many ms at most, however often it is wanted, and not by a hidden page. */
function question(every, ask) {
  let due = 0, planned = false, asking = false, again = false;
  return async function want() {
    if (asking) again = true;       // the answer may be older than what made us ask
    if (planned || page.signedOut) return;
    planned = true;
    await new Promise(go => setTimeout(go, Math.max(0, due - Date.now())));
    asking = true;
    again = false;
    if (!document.hidden) await ask();
    due = Date.now() + every;
    planned = asking = false;
    if (again) want();
  };
}

const wantStatus = question(1000, async () => {
  const status = await get("/debug/status");
  page.fresh = Boolean(status?.version);
  touch("header");
  if (!page.fresh) return;
  page.status = status;
  page.asked = Date.now();
  const ahead = Date.parse(status.timestamp) - Date.now();
  page.ahead = Math.abs(ahead) > 2000 ? ahead : 0;      // the stamp has whole seconds
  if (status.gateway?.history && $("usage").hidden) openUsage();
  touch("banners", "now", "server", "usage");
});

const wantRequests = question(2000, async () => {
  const asked = now(), rows = (await get("/debug/requests"))?.requests;
  if (!Array.isArray(rows)) return;
  for (const r of [...rows].reverse()) learn(r.requestId, r);
  page.loaded = true;
  if (rows.some(ended) || rows.length < 10) {       // those that run stand first, so all of them are in it
    const seen = new Set(rows.map(r => r.requestId));
    for (const r of runningOnes()) {
      if (!seen.has(r.requestId) && r.started < asked - 2000) learn(r.requestId, {state: "lost"});
    }
  }
  touch("now", "tiles", "charts", "requests");
});

/* A key is needed (401), or one that may look (403).  What the page has stays. */
async function signOut(answer) {
  const first = !page.signedOut;
  page.signedOut = true;
  if (answer.status === 403) put($("login-why"), await reasonOf(answer));
  else if (page.loaded) put($("login-why"), "Log in again to go on; what you see stays.");
  lock(true);
  if (first) $("key").focus();
  return null;
}

/* The login form: above what the page has; before it has anything, alone. */
function lock(on) {
  $("login").hidden = !on;
  for (const id of ["now", "trends", "charts", "requests", "log", "server"]) {
    $(id).hidden = on && !page.loaded;
  }
  touch("header", "banners", "now");
}

async function logIn(event) {
  event.preventDefault();
  const key = $("key").value.trim(), error = $("login-error");
  $("key").value = "";
  let answer = null;
  try {
    answer = await fetch("/login", {method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({key})});
  } catch { /* said below */ }
  error.hidden = Boolean(answer?.ok);
  if (!answer?.ok) {
    put(error, answer ? await reasonOf(answer) : "The gateway does not answer.");
    $("key").focus();
    return;
  }
  page.signedOut = false;
  lock(false);
  wantStatus();
  wantRequests();
  stream.failures = 0;
  stream.hurry();
}

// --- 7. painting

const PANELS = {};          // name -> {paint, every, node, due, seen}
const touched = new Set();
let planned = 0;

/* A panel: painted when touched, once in so many ms at most; one with a node only while that is in sight. */
function panel(name, every, paint, node = null) {
  PANELS[name] = {paint, every, node, due: 0, seen: !node};
}

function touch(...names) {
  for (const name of names) touched.add(name);
  if (!planned && !page.paused && !document.hidden) plan();
}

function plan() {
  const ready = [...touched].map(name => PANELS[name]).filter(one => one?.seen);
  if (!ready.length) return;
  const wait = Math.min(...ready.map(one => one.due)) - performance.now();
  planned = setTimeout(() => requestAnimationFrame(paintTouched), Math.max(0, wait));
}

function paintTouched() {
  const moment = performance.now();
  for (const name of page.paused ? [] : [...touched]) {
    const one = PANELS[name];
    if (!one.seen || one.due > moment + 5) continue;
    touched.delete(name);
    one.due = moment + one.every;
    try { one.paint(); } catch (error) { console.error(name, error); }
  }
  planned = 0;
  touch();
}

const touchAll = () => touch(...Object.keys(PANELS));

function watchSight() {
  const panels = Object.values(PANELS).filter(one => one.node);
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) {
      panels.find(one => one.node === entry.target).seen = entry.isIntersecting;
    }
    touch();
  }, {rootMargin: "200px"});
  for (const one of panels) observer.observe(one.node);
}

let told = 0, telling = 0;

/* To a screen reader: one message in five seconds, the latest. */
function tell(text) {
  clearTimeout(telling);
  telling = setTimeout(() => {
    told = Date.now();
    put($("live"), text);
  }, Math.max(0, told + 5000 - Date.now()));
}

// --- 8. header and banners

function showState(id, label, tone, word, detail = "") {
  const node = $(id);
  if (!outdated(node, [tone, word, detail].join("|"))) return;
  node.replaceChildren(mark(tone === "muted" ? "queued" : tone, tone), el("span", label + " " + word),
    el("span.detail.isolate", detail));
  node.title = detail;
}

function paintHeader() {
  const unknown = ["muted", "not known"], {lmstudio, log} = page.fresh ? page.status : {};
  put($("host"), location.host);
  showState("state-lmstudio", "LM Studio", ...!lmstudio ? unknown
    : lmstudio.up ? ["ok", "up", lmstudio.version ?? ""] : ["error", "not answering"]);
  showState("state-log", "Log", ...log ? logState(log) : unknown);
  showState("state-stream", "Stream", ...streamState());
}

/* LM Studio's verbose logging is off: so many entries, and none from its engine. */
const terse = log => log.verbose === false && log.entries > 20;

function logState(log) {
  if (log.enabled === false) return ["muted", "off"];
  if (log.problem) return ["error", "not readable", log.problem];
  if (!log.file) return ["warn", "no file yet"];
  const name = String(log.file).split(/[\\/]/).pop();
  if (terse(log)) return ["warn", "not verbose", name];
  return log.behindBytes > 1e6 ? ["warn", "behind", bytes(log.behindBytes)] : ["ok", "reading", name];
}

function streamState() {
  if (page.signedOut) return ["warn", "signed out"];
  if (page.paused) return ["muted", "paused"];
  const quiet = Date.now() - stream.heard, wait = Math.ceil((stream.next - Date.now()) / 1000);
  if (live()) return quiet > STALE_MS ? ["warn", "stale " + running(quiet)] : ["ok", "live"];
  if (stream.state === "waiting" && wait > 0) return ["warn", `reconnecting in ${wait} s`];
  return ["muted", "connecting"];
}

const DEVELOPER = "In LM Studio: Developer \u25b8 ";
const START = DEVELOPER + "switch Status to Running. On a machine without a screen: lms server start.";
const VERBOSE = DEVELOPER + "Developer Logs \u25b8 \u2026 \u25b8 Verbose Logging.";
const FILE_LOGGING = DEVELOPER + "Developer Logs \u25b8 \u2026 \u25b8 File Logging Mode must not be off. "
  + "LMSTUDIO_LOG_DIR names another directory.";
const MONITORING = "Set ENABLE_LOG_MONITORING=true to see prompts being read and what was cached.";

/* What is wrong and how to mend it, the worst first: [colour, what, remedy]. */
function problems() {
  const {lmstudio = {}, log = {}} = page.status ?? {};
  const warnings = Array.isArray(log.warnings) ? log.warnings.map(text => String(text).split(/: (.*)/s)) : [];
  const rows = [
    [lmstudio.up === false, "error", "LM Studio is not answering",
      (lmstudio.reason ? lmstudio.reason + ". " : "") + START],
    [log.problem, "error", "The log cannot be followed", log.problem],
    [log.enabled === false, "warn", "The log is not followed", MONITORING],
    [terse(log), "warn", "LM Studio writes no DEBUG lines, so most figures of its engine are missing",
      VERBOSE],
    ...warnings.map(([what, remedy = ""]) => [true, "warn", what, remedy]),
  ];
  return rows.filter(([is]) => is).map(row => row.slice(1));
}

function paintBanners() {
  const told = page.signedOut || !$("first-run").hidden;      // the first run says the same in its own way
  const found = told ? [] : problems().slice(0, 2), box = $("banners");
  if (!outdated(box, JSON.stringify(found))) return;
  box.replaceChildren(...found.map(([tone, what, remedy]) =>
    el("p.banner", mark(tone, tone), el("span", el("strong", what + ". "), remedy))));
}

// --- 9. now: a card for each running request, in a place that it keeps

const LINGER_MS = 60000, CARDS = 12;
const seats = [];           // the requests of the cards, in their order
const cards = new Map();    // request id -> {node, part, spoken}

/* A new request takes the card of the one that ended first, else a new one, so that no card moves while it is
   read.  The last card stays when nothing runs. */
function seat() {
  for (const r of runningOnes().filter(one => !seats.includes(one))) {
    const free = seats.filter(ended).sort((a, b) => a.seenEnd - b.seenEnd)[0];
    if (free) seats[seats.indexOf(free)] = r;
    else if (seats.length < CARDS) seats.push(r);
  }
  if (!seats.length) seats.push(...newestFirst().slice(0, 1));
  const old = seats.findIndex(r => ended(r) && Date.now() - r.seenEnd > LINGER_MS);
  if (old >= 0 && seats.length > 1) seats.splice(old, 1);
}

function paintNow() {
  seat();
  const box = $("cards"), active = runningOnes().length;
  const wanted = seats.map(r => cards.get(r.requestId) ?? makeCard(r));
  for (const [id, card] of cards) {
    if (wanted.includes(card)) continue;
    card.node.remove();
    cards.delete(id);
  }
  arrange(box, wanted.map(card => card.node));
  seats.forEach(paintCard);
  put($("now-note"), !page.loaded ? "connecting" : active ? `${active} running` : seats.length ? "idle" : "");
  put($("more-running"), active > CARDS ? `and ${active - CARDS} more, in the table below` : "");
  put($("as-of"), page.loaded && !live() ? "as of " + clockTime(stream.heard) : "");
  paintFirstRun();
}

/* Children in this order; one that is in its place is not touched. */
function arrange(box, nodes) {
  nodes.forEach((node, at) => {
    if (box.children[at] !== node) box.insertBefore(node, box.children[at] ?? null);
  });
}

function makeCard(r) {
  const node = $("card-template").content.cloneNode(true).firstElementChild, part = {};
  for (const one of node.querySelectorAll("[data-part]")) part[one.dataset.part] = one;
  part.id.addEventListener("click", () => openDrawer(r.requestId));
  const card = {node, part, spoken: 0};
  cards.set(r.requestId, card);
  return card;
}

function paintCard(r) {
  const card = cards.get(r.requestId), {node, part} = card;
  node.className = "box card " + stateOf(r)[2];
  put(part.who, who(r));
  part.who.title = HINTS.who(r);
  put(part.model, modelOf(r));
  put(part.headline, headline(r));
  part.headline.title = r.state === "prompt" ? "Estimated from the speed at which it was read so far" : "";
  put(part.elapsed, ended(r) ? `ended ${running(now() - endOf(r))} ago` : running(elapsedOf(r)) + " elapsed");
  part.elapsed.title = HINTS.time(r);
  put(part.id, r.requestId);
  paintSteps(part.steps, r);
  paintPrompt(card, r);
  paintCache(part, r);
  put(part.output, known(outputOf(r)) ? listed([outputTokens(r) + " tok",
    known(decodeOf(r)) && speed(decodeOf(r)), r.finishReason]) : NONE);
  part.output.title = HINTS.output(r);
  attribute(part.trace, "d", tracePath(r.trace));
  paintContext(part, r);
}

/* What a person at the door wants to know. */
function headline(r) {
  const took = span(r.totalTimeMs), left = leftOf(r), read = r.progress?.percent;
  switch (r.state) {
    case "waiting": return "waiting for LM Studio";
    case "queued": return "queued" + placeOf(r);
    case "prompt": return known(left) ? `~${running(left)} left to read`
      : known(read) ? percent(read) + " read" : "reading the prompt";
    case "generating": return known(decodeOf(r)) ? speed(decodeOf(r)) : "writing";
    case "done": return "done in " + took;
    case "failed": return words(r.error).slice(0, 120);
    case "abandoned": return "the client left after " + took;
    default: return stateOf(r)[0];
  }
}

function placeOf(r) {
  const queue = runningOnes().filter(one => one.state === "queued");
  return queue.length > 1 ? ` ${queue.indexOf(r) + 1} of ${queue.length}` : "";
}

/* Ms until the prompt is read, as far as anybody can tell. */
function leftOf(r) {
  const left = r.progress?.etaMs;
  return known(left) ? Math.max(0, left - (live() && r.heard ? Date.now() - r.heard : 0)) : undefined;
}

/* The phases that were, with their durations, the one that is, and those to come. */
function paintSteps(list, r) {
  if (!outdated(list, r.version + r.state)) return;
  const past = phasesOf(r).filter(phase => ended(r) || phase.name !== r.state).map(phase => {
    const [word, , tone] = STATES[phase.name];
    return el("li." + tone, phase.name === r.phasesIn ? word : word + " " + span(phase.ms));
  });
  const [word, icon, tone] = stateOf(r), present = el("li." + tone, mark(icon), " " + word);
  present.setAttribute("aria-current", "step");
  const skip = ended(r) ? 3 : {prompt: 1, generating: 2}[r.state] ?? 0;
  const ahead = ["prompt", "generating", "done"].slice(skip);
  list.replaceChildren(...past, present, ...ahead.map(name => el("li.ahead", STATES[name][0])));
}

function fill(bar, share) {
  bar.firstElementChild.style.setProperty("--share", Math.min(100, share ?? 0) / 100);
}

function paintPrompt(card, r) {
  const {percent: read, promptTokensRead, promptTokens = promptOf(r)} = r.progress ?? {};
  const {prompt, promptBar: bar} = card.part;
  const over = r.state === "generating" || r.state === "done", share = over ? 100 : read;
  const so = !over && known(promptTokensRead) ? tokens(promptTokensRead) + " / " : "";
  fill(bar, share);
  put(prompt, listed([!over && known(share) && percent(share),
    known(promptTokens) && so + tokens(promptTokens) + " tok",
    known(prefillOf(r)) && speed(prefillOf(r))]) || NONE);
  if (Date.now() - card.spoken < 5000) return;      // a screen reader is not to be hurried
  card.spoken = Date.now();
  const left = leftOf(r), rest = r.state === "prompt" && known(left) ? `, about ${running(left)} left` : "";
  attribute(bar, "aria-valuenow", known(share) ? Math.round(share) : null);
  attribute(bar, "aria-valuetext", known(share) ? Math.round(share) + " percent" + rest : "not known");
}

function paintCache(part, r) {
  const {reused, total} = r.cache ?? {}, share = total > 0 ? 100 * reused / total : undefined;
  fill(part.cacheBar, share);
  put(part.cache, known(share) ? `${tokens(reused)} of ${tokens(total)} tok reused (${percent(share)})`
    : known(cachedOf(r)) ? tokens(cachedOf(r)) + " tok reused" : NONE);
}

function paintContext(part, r) {
  const {size, used} = r.context ?? {}, share = size > 0 && known(used) ? 100 * used / size : undefined;
  const tone = share >= 95 ? " error" : share >= 85 ? " warn" : "";
  part.contextBar.className = "bar context" + tone;
  part.context.className = "value" + tone;
  fill(part.contextBar, share);
  put(part.context, known(size) ? `${tokens(used)} / ${tokens(size)} tok`
    + (known(share) ? ` (${percent(share)})` : "") + (tone ? " \u25b2 nearly full" : "") : NONE);
}

/* The output speed of this request so far, as a line across the box. */
function tracePath(values) {
  if (values.length < 3) return null;
  const top = Math.max(...values) || 1, step = 60 / (values.length - 1);
  const points = values.map((value, at) => `${(at * step).toFixed(1)} ${(17 - 15 * value / top).toFixed(1)}`);
  return "M" + points.join("L");
}

// --- 10. first run: what to do next, in place of empty panels

function paintFirstRun() {
  const {totalRequests, gateway = {}, lmstudio = {}, log = {}} = page.status ?? {}, box = $("first-run");
  const first = Boolean(page.loaded && page.status && !page.requests.size && !totalRequests);
  if (!page.signedOut) for (const id of ["trends", "charts", "requests"]) $(id).hidden = first;
  if (box.hidden === first) touch("banners");
  box.hidden = !first;
  const shown = JSON.stringify([gateway, lmstudio.up, log.file, log.problem, log.verbose, terse(log)]);
  if (!first || !outdated(box, shown)) return;
  const here = location.origin, secret = gateway.keyNeeded ? ' -H "Authorization: Bearer YOUR_KEY"' : "";
  const lan = (Array.isArray(gateway.lanUrls) ? gateway.lanUrls : []).filter(url => url !== here);
  const key = gateway.keyNeeded ? ", with a key of this gateway. " : "; any API key will do. ";
  box.replaceChildren(
    el("div", el("h3", "No request yet"),
      el("p.muted", "Point a client at this base URL" + key + "The first request appears here by itself.")),
    copyLine(here + "/v1"), ...lan.map(url => copyLine(url + "/v1", "From other machines")),
    copyLine(`curl ${here}/v1/chat/completions${secret} -H "Content-Type: application/json" -d `
      + '\'{"messages": [{"role": "user", "content": "Say hello."}], "stream": true}\'',
      "Or from a terminal"),
    el("ul.checks", ...checks(lmstudio, log).map(checkLine)));
}

function copyLine(text, label = "") {
  return el("div", label ? el("p.muted", label) : null,
    el("div.copy-line", el("code", text), button("Copy", event => copy(text, event.currentTarget))));
}

/* What the page needs of LM Studio: [is it so, null while nobody knows; what; what not; remedy]. */
function checks(lmstudio, log) {
  const followed = Boolean(log.file) && !log.problem, why = log.problem ? log.problem + ". " : "";
  return [
    [lmstudio.up, "LM Studio answers", "LM Studio does not answer", START],
    log.enabled === false ? [false, "", "Its log is not followed", MONITORING]
      : [followed, "Its log is followed", "No log file was found", why + FILE_LOGGING],
    [terse(log) ? false : log.verbose || null,
      log.verbose ? "It writes DEBUG lines" : "Whether it writes DEBUG lines shows later",
      "It writes no DEBUG lines", VERBOSE],
  ];
}

function checkLine([good, fine, wrong, remedy]) {
  const tone = good ? "ok" : good === null ? "queued" : "warn";
  return el("li", mark(tone, tone), el("span", tone === "warn" ? wrong : fine),
    tone === "warn" ? el("p.muted", remedy) : null);
}

// --- 11. tiles: the last quarter of an hour in figures

const BUCKETS = 60, WINDOW_MS = 15 * 60000;
const middle = (rows, of, share = 0.5) => quantile(sortedNumbers(rows.map(of)), share);
const countOf = (rows, of) => whole(rows.filter(r => known(of(r))).length);
const oks = rows => rows.filter(r => r.state === "done").length;
const some = (rows, of) => rows.some(r => known(of(r)));

/* figure, unit and note of the window's requests; height of a bucket's bar, and of its failed part */
const TILES = [
  {label: "Requests", tone: "fill", figure: rows => whole(rows.length),
    note: rows => rows.length ? `${whole(oks(rows))} ok \u00b7 ${whole(rows.length - oks(rows))} not`
      : page.loaded ? "no finished request yet" : NONE,
    bar: rows => rows.length, bad: rows => rows.length - oks(rows)},
  {label: "Time to first token", tone: "fill", figure: rows => span(middle(rows, firstOf)),
    note: rows => "median \u00b7 p95 " + span(middle(rows, firstOf, 0.95)),
    bar: rows => middle(rows, firstOf)},
  {label: "Prompt speed", tone: "prefill", figure: rows => rate(middle(rows, prefillOf)), unit: " tok/s",
    note: rows => "median of " + countOf(rows, prefillOf), bar: rows => middle(rows, prefillOf)},
  {label: "Generation speed", tone: "decode", figure: rows => rate(middle(rows, decodeOf)), unit: " tok/s",
    note: rows => "median of " + countOf(rows, decodeOf), bar: rows => middle(rows, decodeOf)},
  {label: "Tokens in and out", tone: "fill", figure: rows => some(rows, promptOf)
    ? short(sum(rows.map(promptOf))) + " \u2192 " + short(sum(rows.map(outputOf))) : NONE,
    note: rows => some(rows, cachedOf) ? short(sum(rows.map(cachedOf))) + " of them cached" : NONE,
    bar: rows => sum(rows.map(promptOf)) + sum(rows.map(outputOf))},
  {label: "Cache hits", tone: "cached", figure: rows => percent(cacheShare(rows)),
    note: () => "of prompt tokens", bar: cacheShare},
  {label: "Wait in the queue", tone: "fill", figure: rows => span(middle(rows, queueOf, 0.95)),
    note: rows => "p95 of " + countOf(rows, queueOf), bar: rows => middle(rows, queueOf)},
];

/* Cached of all prompt tokens in percent, of the requests that say both. */
function cacheShare(rows) {
  const telling = rows.filter(r => known(cachedOf(r)) && promptOf(r) > 0);
  return telling.length ? 100 * sum(telling.map(cachedOf)) / sum(telling.map(promptOf)) : undefined;
}

/* The requests that ended within the last so many ms. */
function recent(ms) {
  const since = now() - ms;
  return allRequests().filter(r => ended(r) && r.state !== "lost" && endOf(r) >= since);
}

/* From when on the page knows every request, where that is later than the window's begin. */
function sinceNote(ms) {
  const all = allRequests(), ours = all.filter(r => r.source === "gateway").length;
  if (!all.length || ours >= (page.status?.totalRequests ?? 0)) return "";
  const first = Math.min(...all.map(r => r.started));
  return first > now() - ms ? "requests since " + clockTime(first) : "";
}

function makeTiles() {
  for (const tile of TILES) {
    tile.value = el("dd.figure");
    tile.about = el("dd.note");
    tile.spark = draw("svg", {viewBox: "0 0 240 26", preserveAspectRatio: "none", "aria-hidden": "true"});
    $("tiles").append(el("div.box.tile", el("dt", tile.label), tile.value, tile.about,
      el("dd.spark", tile.spark)));
  }
}

function paintTiles() {
  const rows = recent(WINDOW_MS), step = WINDOW_MS / BUCKETS, end = Math.ceil(now() / step) * step;
  const buckets = Array.from({length: BUCKETS}, () => []);
  for (const r of rows) buckets[BUCKETS - 1 - Math.floor((end - endOf(r)) / step)]?.push(r);
  for (const tile of TILES) {
    const value = tile.figure(rows);
    tile.value.replaceChildren(value, ...tile.unit && value !== NONE ? [el("small", tile.unit)] : []);
    put(tile.about, tile.note(rows));
    paintSpark(tile, buckets);
  }
  put($("tiles-note"), sinceNote(WINDOW_MS));
}

function paintSpark({spark, tone, bar, bad}, buckets) {
  const values = buckets.map(bar), top = Math.max(...values.map(value => value ?? 0)) || 1;
  const column = (at, value, kind) => {
    const height = Math.max(1.5, 24 * value / top);
    return draw("rect", {x: at * 4, y: 25 - height, width: 3, height, class: kind});
  };
  const parts = [draw("rect", {y: 25, width: 240, height: 1, class: "ground"})];
  values.forEach((value, at) => {
    const failed = value && bad ? bad(buckets[at]) : 0;
    if (value) parts.push(column(at, value, tone));
    if (failed) parts.push(column(at, failed, "error"));
  });
  spark.replaceChildren(...parts);
}

// --- 12. charts: each draws into an SVG, and its figures are a table, too

const HOUR_MS = 3600000, HEIGHT = 200, LEFT = 48, RIGHT = 12, TOP = 10, BASE = 178;     // px of a plot
const inner = width => width - LEFT - RIGHT;
const label = (x, y, anchor, text) => draw("text", {x, y, "text-anchor": anchor}, text);
const dashed = ends => draw("line", {class: "mean", ...ends});

/* A chart: what it is called, and make(requests) -> {legend, summary, head, rows, draw(svg, width)}. */
const CHARTS = [
  {title: "Time to first token", about: "a mark a request", make: firstTokens},
  {title: "Tokens per 5 minutes", about: "by the end of the request", make: tokenBars},
  {title: "Prompt speed", about: "requests by tok/s", make: rows => histogram(rows, prefillOf, "prefill")},
  {title: "Generation speed", about: "requests by tok/s", make: rows => histogram(rows, decodeOf, "decode")},
];

function makeCharts() {
  for (const chart of CHARTS) {
    chart.plot = el("div.plot");
    chart.twin = el("div.twin");
    chart.legend = el("ul.legend");
    chart.twin.hidden = true;
    chart.twin.tabIndex = 0;
    const toggle = button("Show as table", () => {
      const drawn = chart.plot.hidden;
      chart.plot.hidden = !drawn;
      chart.twin.hidden = drawn;
      put(toggle, drawn ? "Show as table" : "Show as chart");
      PANELS.charts.due = 0;
      touch("charts");
    });
    $("chart-list").append(el("figure.box.chart",
      el("figcaption", el("h3", chart.title), el("span.muted", chart.about), toggle),
      chart.plot, chart.twin, chart.legend));
  }
}

function paintCharts() {
  const rows = recent(HOUR_MS), said = page.loaded ? "no finished request says so yet" : "";
  for (const {title, plot, twin, legend, make} of CHARTS) {
    const made = make(rows), width = Math.max(240, plot.clientWidth);
    legend.replaceChildren(...made.legend);
    if (plot.hidden) {
      twin.replaceChildren(made.rows.length ? table(made.head, made.rows) : el("p.empty", said));
      continue;
    }
    const svg = draw("svg", {role: "img", "aria-label": `${title}: ${made.summary}`});
    if (made.rows.length) made.draw(svg, width);
    plot.replaceChildren(made.rows.length ? svg : el("p.none", said));
  }
  put($("charts-note"), sinceNote(HOUR_MS));
}

/* Entries of a legend from [sign, text, class]. */
const legendOf = rows => rows.map(([sign, text, tone = ""]) =>
  el("li", draw("svg", {viewBox: "0 0 10 10", class: tone, "aria-hidden": "true"}, sign),
    el("span.isolate.clip", text)));
const square = tone => draw("path", {d: "M0 0h10v10H0z", class: tone});

/* Horizontal lines at [value, text], by a scale from value to px. */
function grid(svg, width, ticks, y) {
  for (const [value, text] of ticks) {
    svg.append(draw("line", {x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}),
      label(LEFT - 8, y(value) + 4, "end", text));
  }
}

/* A round number at or above n. */
function round(n) {
  const power = 10 ** Math.floor(Math.log10(n || 1));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * power >= n - 1e-9) * power;
}

const modelSeats = [];      // model names by the number of their colour

/* The number of a model's colour: from its name, so that it stays the same; 5 is for all others. */
function modelTone(name) {
  let at = modelSeats.indexOf(name);
  if (at < 0 && modelSeats.filter(Boolean).length < 5) {
    at = [...name].reduce((hash, letter) => (hash * 31 + letter.codePointAt(0)) % 5, 7);
    while (modelSeats[at]) at = (at + 1) % 5;
    modelSeats[at] = name;
  }
  return at < 0 ? 5 : at;
}

const FIRST_TICKS = [[100, "0.1 s"], [1000, "1 s"], [10000, "10 s"], [60000, "1 min"], [600000, "10 min"]];

function firstTokens(all) {
  const rows = all.filter(r => known(firstOf(r))).sort((a, b) => a.started - b.started).slice(-ROWS);
  const means = [["p50", middle(rows, firstOf), 12], ["p95", middle(rows, firstOf, 0.95), -4]];
  const tones = new Map(different(rows.map(modelOf)).map(name => [name, modelTone(name)]));
  const named = [...tones].filter(([, tone]) => tone < 5), others = tones.size > named.length;
  const y = ms => {         // 0.1 s to 10 min, logarithmic
    const s = Math.min(600, Math.max(0.1, ms / 1000));
    return BASE - Math.log(s / 0.1) / Math.log(6000) * (BASE - TOP);
  };
  return {
    legend: legendOf([...named, ...others ? [["other models", 5]] : []].map(([name, tone]) =>
      [draw("use", {href: "#mark-" + tone}), name, "model-" + tone])),
    summary: means.map(([name, ms]) => name + " " + span(ms)).join(", "),
    head: ["Request", "Started", "Model", "First token"],
    rows: rows.map(r => [r.requestId, clockTime(r.started), modelOf(r), span(firstOf(r))]).reverse(),
    draw(svg, width) {
      const begin = now() - HOUR_MS, x = t => LEFT + Math.max(0, t - begin) / HOUR_MS * inner(width);
      grid(svg, width, FIRST_TICKS, y);
      const step = width < 400 ? 1200000 : 600000;
      for (let t = Math.ceil(begin / step) * step; x(t) < width - RIGHT - 16; t += step) {
        svg.append(label(x(t), HEIGHT - 6, "middle", clockTime(t, false)));
      }
      for (const r of rows) svg.append(dot(r, tones.get(modelOf(r)), x(r.started), y(firstOf(r))));
      for (const [name, ms, lower] of means) {
        svg.append(dashed({x1: LEFT, x2: width - RIGHT, y1: y(ms), y2: y(ms)}),
          label(LEFT + 4, y(ms) + lower, "start", name + " " + span(ms)));
      }
    },
  };
}

function dot(r, tone, x, y) {
  const title = draw("title", {}, `${clockTime(r.started)}  ${span(firstOf(r))}  ${modelOf(r)}`);
  return draw("use", {href: "#mark-" + tone, class: "dot model-" + tone, x: x - 4, y: y - 4, width: 8,
    height: 8, "data-id": r.requestId}, title);
}

const LAYERS = [["cached", "cached"], ["fresh", "prefill"], ["output", "decode"]];     // from the ground up

function tokenBars(all) {
  const step = 300000, end = Math.ceil(now() / step) * step;
  const bars = Array.from({length: 12}, (_, at) =>
    ({from: clockTime(end - HOUR_MS + at * step, false), requests: 0, cached: 0, fresh: 0, output: 0}));
  for (const r of all) {
    const bar = bars[11 - Math.floor((end - endOf(r)) / step)], cached = cachedOf(r) ?? 0;
    if (!bar) continue;
    bar.requests += 1;
    bar.cached += cached;
    bar.fresh += Math.max(0, (promptOf(r) ?? 0) - cached);
    bar.output += outputOf(r) ?? 0;
  }
  const sums = bars.map(bar => bar.cached + bar.fresh + bar.output), top = round(Math.max(10, ...sums));
  const y = value => BASE - value / top * (BASE - TOP);
  return {
    legend: legendOf([[square("decode"), "output"], [square("prefill"), "prompt, read"],
      [square("cached"), "prompt, cached"]]),
    summary: whole(sum(sums)) + " tokens",
    head: ["From", "Requests", "Prompt, cached", "Prompt, read", "Output"],
    rows: !all.length ? [] : bars.map(bar =>
      [bar.from, ...[bar.requests, bar.cached, bar.fresh, bar.output].map(whole)]).reverse(),
    draw(svg, width) {
      const slot = inner(width) / 12;
      grid(svg, width, [0, top / 2, top].map(value => [value, short(value)]), y);
      bars.forEach((bar, at) => {
        let below = 0;
        for (const [name, tone] of LAYERS.filter(([one]) => bar[one])) {
          const title = `${bar.from}  ${name} ${whole(bar[name])}`, from = y(below);
          below += bar[name];
          svg.append(column(LEFT + at * slot + 2, slot - 4, y(below), from, tone, title));
        }
        if (at % 2 === 0) svg.append(label(LEFT + at * slot + 2, HEIGHT - 6, "start", bar.from));
      });
    },
  };
}

const column = (x, width, top, bottom, tone, title) => draw("rect",
  {x, width: Math.max(1, width), y: top, height: bottom - top, class: tone}, draw("title", {}, title));

function histogram(all, of, tone) {
  const sorted = sortedNumbers(all.map(of)), top = round(sorted[sorted.length - 1] || 1), step = top / 20;
  const means = [0.5, 0.95, 0.99].map(share => ["p" + 100 * share, quantile(sorted, share)]);
  const said = means.map(([name, value]) => name + " " + rate(value)), bins = Array(20).fill(0);
  for (const value of sorted) bins[Math.min(19, Math.floor(value / step))] += 1;
  const most = Math.ceil(round(Math.max(2, ...bins)));
  const range = at => `${rate(at * step)} to ${rate((at + 1) * step)}`;
  return {
    legend: [el("li", sorted.length ? listed(said) + " tok/s" : "\u00a0")],
    summary: said.join(", ") + " tok/s",
    head: ["tok/s", "Requests"],
    rows: bins.map((n, at) => [range(at), whole(n)]).filter((_, at) => bins[at]),
    draw(svg, width) {
      const x = value => LEFT + value / top * inner(width), y = n => BASE - n / most * (BASE - TOP - 10);
      grid(svg, width, (most % 2 ? [0, most] : [0, most / 2, most]).map(n => [n, whole(n)]), y);
      bins.forEach((n, at) => {
        const title = `${range(at)} tok/s: ${n}`;
        if (n) svg.append(column(x(at * step) + 1, inner(width) / 20 - 2, y(n), BASE, tone, title));
      });
      for (let at = 0; at <= 4; at += 1) {
        svg.append(label(x(at * top / 4), HEIGHT - 6, at < 4 ? "middle" : "end", tenth(at * top / 4, 1)));
      }
      svg.append(...means.map(([, value]) => dashed({x1: x(value), x2: x(value), y1: TOP, y2: BASE})));
      let free = 0;         // px up to which there is a label already
      for (const [name, value] of means) {
        if (x(value) < free) continue;
        svg.append(label(x(value) + 3, TOP + 6, "start", name));
        free = x(value) + 26;
      }
    },
  };
}

// --- 13. the table of requests

/* name, heading, class of the cell, what it sorts by, what it shows where that is another thing */
const COLUMNS = [
  ["time", "Time", "", r => r.started, r => clockTime(r.started)],
  ["status", "Status", "", r => stateOf(r)[0], statusOf],
  ["who", "Key or client", "isolate", who],
  ["model", "Model", "isolate", modelOf],
  ["path", "Path", "isolate", r => words(r.path)],
  ["queue", "Queue", "num", queueOf, r => span(queueOf(r))],
  ["first", "First token", "num", firstOf, r => span(firstOf(r))],
  ["prompt", "Prompt (cached)", "num", promptOf, promptText],
  ["prefill", "Read tok/s", "num", prefillOf, r => rate(prefillOf(r))],
  ["output", "Output", "num", outputOf, outputTokens],
  ["decode", "Write tok/s", "num", decodeOf, r => rate(decodeOf(r))],
  ["total", "Total", "num", elapsedOf, r => ended(r) ? span(r.totalTimeMs) : running(elapsedOf(r))],
  ["finish", "Finish", "isolate", r => words(r.finishReason)],
];
const HINTS = {             // what a cell says when one points to it
  time: r => "started " + new Date(r.started).toLocaleString(),
  who: r => listed([r.key, r.client, r.userAgent]),
  model: modelOf,
  path: r => words(r.path),
  output: r => usageOf(r).estimated ? "Counted from the pieces of the answer, which gave no figure" : "",
  finish: r => words(r.finishReason),
};
const OUTCOMES = {
  running: r => !ended(r),
  ok: r => r.state === "done",
  failed: r => r.state === "failed" || r.state === "lost",
  left: r => r.state === "abandoned",
};
const FILTERS = ["text", "status", "key", "model"];
const PAGE_ROWS = innerWidth <= 880 ? 20 : 50;

const view = {
  text: "", status: "", key: "", model: "",
  sort: "time", down: true,
  rows: PAGE_ROWS,          // that are shown at most
  since: null,              // requests that started later wait, because the reader is below the first rows
};
const rowNodes = new Map(); // request id -> {node, cells, version}

function statusOf(r) {
  const [word, icon, tone] = stateOf(r);
  return [mark(icon, tone), " " + word + (r.state === "failed" && r.status ? " " + r.status : "")];
}

function promptText(r) {
  return tokens(promptOf(r)) + (known(cachedOf(r)) ? ` (${tokens(cachedOf(r))})` : "");
}

/* Filters and order live in the address, so that a view can be kept and sent. */
function readAddress() {
  const given = new URLSearchParams(location.search);
  for (const name of FILTERS) view[name] = given.get(name) ?? "";
  if (COLUMNS.some(([name]) => name === given.get("sort"))) view.sort = given.get("sort");
  view.down = given.get("order") !== "up";
  $("filter").value = view.text;
}

function writeAddress() {
  const given = new URLSearchParams();
  for (const name of FILTERS) if (view[name]) given.set(name, view[name]);
  if (view.sort !== "time") given.set("sort", view.sort);
  if (!view.down) given.set("order", "up");
  const query = String(given) ? "?" + given : "";
  history.replaceState(null, "", location.pathname + query + location.hash);
}

function makeTable() {
  $("requests-head").append(...COLUMNS.map(([name, text, kind]) => {
    const sort = () => refilter({sort: name, down: view.sort !== name || !view.down});
    return heading(button(text, sort, "button.plain"), `th.c-${name}${kind === "num" ? ".num" : ""}`);
  }));
}

function refilter(changes) {
  Object.assign(view, {since: null}, changes);
  writeAddress();
  PANELS.requests.due = 0;
  touch("requests");
}

/* The requests that the filters let through, in order. */
function chosenRequests() {
  const needle = view.text.toLowerCase(), value = COLUMNS.find(([name]) => name === view.sort)[3];
  const texts = r => [r.requestId, r.key, r.client, r.model, r.modelAsked, r.path, r.userAgent, r.error,
    r.finishReason, r.status].join("\n").toLowerCase();
  const rows = newestFirst().filter(r => (OUTCOMES[view.status]?.(r) ?? true)
    && (!view.key || who(r) === view.key) && (!view.model || modelOf(r) === view.model)
    && (!needle || texts(r).includes(needle)));
  if (view.sort === "time") return view.down ? rows : rows.reverse();
  const lacks = r => [undefined, null, NONE].includes(value(r)), sign = view.down ? -1 : 1;
  const sorted = rows.filter(r => !lacks(r)).sort((a, b) =>
    value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0);
  return [...sorted, ...rows.filter(lacks)];
}

/* True while the reader looks at rows below the first: new ones would push them down. */
function below() {
  const box = $("requests-table").getBoundingClientRect();
  return view.sort === "time" && view.down && box.top < 0 && box.bottom > 200;
}

function paintRequests() {
  let rows = chosenRequests();
  view.since = below() ? view.since ?? rows[0]?.started ?? null : null;
  const newer = view.since === null ? 0 : rows.filter(r => r.started > view.since).length;
  $("requests-newer").hidden = !newer;
  put($("requests-newer").firstElementChild, newer + " new \u2191");
  rows = rows.slice(newer);
  const shown = rows.slice(0, view.rows), nodes = shown.map(paintRow);
  const keep = new Set(shown.map(r => r.requestId));
  arrange($("requests-rows"), nodes);
  for (const [id, {node}] of rowNodes) {
    if (keep.has(id)) continue;
    node.remove();
    rowNodes.delete(id);
  }
  nodes.forEach((node, at) => { node.tabIndex = at ? -1 : 0; });
  [...$("requests-head").children].forEach((cell, at) => attribute(cell, "aria-sort",
    COLUMNS[at][0] !== view.sort ? null : view.down ? "descending" : "ascending"));
  paintFilters(rows.length);
}

function makeRow(r) {
  const cells = COLUMNS.map(([name, text, kind]) => {
    const cell = el(`td.c-${name}${kind ? "." + kind : ""}`);
    if (kind === "num") cell.dataset.label = text;
    return cell;
  });
  const row = {node: el("tr", ...cells), cells, version: -1};
  const open = el("button.plain");      // the row's click is enough; this tells a screen reader of it
  open.type = "button";
  open.tabIndex = -1;
  cells[0].append(open);
  cells[0] = open;
  row.node.dataset.id = r.requestId;
  rowNodes.set(r.requestId, row);
  return row;
}

function paintRow(r) {
  const row = rowNodes.get(r.requestId) ?? makeRow(r);
  if (row.version === r.version && ended(r)) return row.node;
  row.version = r.version;
  COLUMNS.forEach(([name, , , value, show = value], at) => {
    const cell = row.cells[at], shown = show(r);
    if (!Array.isArray(shown)) put(cell, shown);
    else if (outdated(cell, shown[1])) cell.replaceChildren(...shown);
    if (HINTS[name]) attribute(cell, "title", HINTS[name](r));
  });
  return row.node;
}

function paintFilters(found) {
  const all = allRequests(), filtered = FILTERS.some(name => view[name]);
  choices($("by-status"), "Any outcome", Object.keys(OUTCOMES), view.status);
  choices($("by-key"), "Any key or client", different(all.map(who)), view.key);
  choices($("by-model"), "Any model", different(all.map(modelOf)), view.model);
  put($("requests-note"), filtered ? `${whole(found)} of ${whole(all.length)}`
    : all.length ? "the latest " + whole(all.length) : "");
  put($("requests-empty"), filtered ? "No request fits the filter." : page.loaded ? "No request yet." : "");
  $("clear").hidden = !filtered;
  $("requests-empty").hidden = found > 0;
  $("requests-more").hidden = found <= view.rows || view.rows >= ROWS;
}

/* A select's options.  It is left alone while nothing has changed, so that an open one stays open. */
function choices(select, any, values, chosen) {
  const list = chosen && !values.includes(chosen) ? [chosen, ...values] : values;
  if (!outdated(select, [any, ...list, chosen].join("\n"))) return;
  const shown = value => value.length > 40 ? value.slice(0, 39) + "\u2026" : value;
  options(select, [["", any], ...list.map(value => [value, shown(value)])], chosen);
}

// --- 14. one request, in a drawer

const drawer = {id: null, detail: null};       // which request, and the last answer about it

async function openDrawer(id) {
  Object.assign(drawer, {id, detail: null});
  put($("drawer-title"), id);
  paintDrawer();
  if (!$("drawer").open) $("drawer").showModal();
  $("drawer").scrollTop = 0;
  await readDetail();
}

async function readDetail() {
  const {id} = drawer, detail = await get("/debug/requests/" + encodeURIComponent(id));
  if (id !== drawer.id || !detail?.requestId) return;
  drawer.detail = detail;
  touch("drawer");
}

function paintDrawer() {
  if (!drawer.id) return;
  const r = {...page.requests.get(drawer.id), ...drawer.detail};
  const parts = [summaryOf, spentOn, samplingOf, timelineOf].map(make => make(r));
  $("drawer-body").replaceChildren(...parts.filter(Boolean));
}

const section = (title, ...content) => el("section", el("h3", title), ...content);

function summaryOf(r) {
  const {size, used} = r.context ?? {}, {reasoningTokens, progress} = r;
  const asked = r.modelAsked && r.modelAsked !== r.model ? ` (asked for ${r.modelAsked})` : "";
  const rows = [
    fact("Status", ...statusOf(r)),
    fact("Model", modelOf(r) + asked),
    fact("Key", words(r.key)),
    fact("Client", words(r.client)),
    fact("Program", words(r.userAgent)),
    fact("Request", listed([[r.method, r.path].filter(Boolean).join(" "), r.stream && "streaming"]) || NONE),
    fact("Started", dateTime(r.startedAt)),
    fact("Total", ended(r) ? span(r.totalTimeMs) : NONE),
    fact("First token", span(firstOf(r))),
    fact("Finish", words(r.finishReason)),
    fact("Prompt", listed([tokens(promptOf(r)) + " tok", known(prefillOf(r)) && speed(prefillOf(r)),
      !ended(r) && known(progress?.percent) && percent(progress.percent) + " read"])),
    fact("Cached", known(cachedOf(r)) ? tokens(cachedOf(r)) + " tok" : NONE),
    fact("Output", listed([outputTokens(r) + " tok", known(decodeOf(r)) && speed(decodeOf(r)),
      reasoningTokens && tokens(reasoningTokens) + " of them reasoning"])),
    fact("Context", known(size) ? `${tokens(used)} of ${tokens(size)} tok` : NONE),
    fact("Log", {exact: "joined, certain", likely: "joined, likely", none: "not joined"}[r.binding] ?? NONE),
  ];
  return el("dl.facts", ...r.error ? [fact("Error", r.error)] : [], ...rows);
}

/* Where the time went: queue, loading, prompt, answer, each as wide as it was long. */
function spentOn(r) {
  const phases = phasesOf(r), tone = phase => phase.name === "loading" ? "loading" : STATES[phase.name][2];
  if (!phases.length) return null;
  const bar = el("div.phase-bar", ...phases.map(phase => {
    const part = el("i." + tone(phase));
    part.style.setProperty("--share", phase.ms);
    return part;
  }));
  return section("Phases", bar, el("ul.legend", ...phases.map(phase => el("li", el("i.swatch." + tone(phase)),
    `${STATES[phase.name][0]} ${span(phase.ms)}${phase.slow ? " \u25b2 slow" : ""}`))));
}

function samplingOf(r) {
  const rows = Object.entries(r.sampling ?? {}).filter(([name]) => !ELSEWHERE.has(name));
  if (!rows.length) return null;
  return section("Sampling", el("dl.facts.names", ...rows.map(([name, value]) => fact(name, words(value)))));
}

function timelineOf(r) {
  const rows = Array.isArray(r.timeline) ? r.timeline.slice(-ROWS) : [];
  const none = drawer.detail ? "No event of the log was joined with this request." : "\u2026";
  if (!rows.length) return section("Timeline", el("p.muted", none));
  return section("Timeline", el("table.timeline",
    el("thead", el("tr", ...["After", "Event", "Says"].map(text => heading(text)))),
    el("tbody", ...rows.map(({ms, event, data}) => el("tr", el("td.num", span(ms)),
      el("td.mono", words(event)), el("td.isolate", textOf(event, data ?? {})))))));
}

// --- 15. the event log

const LEVELS = ["DEBUG", "INFO", "WARN", "ERROR"];
const chips = new Map();    // event name -> its button

const logView = {
  off: new Set(["inference_progress"]),     // types that are not shown
  needle: "", pattern: null, level: "", model: "",
  follow: true,
  top: 0,                   // where it was scrolled to when we last looked
  painted: 0,               // number of the last event that was painted or passed over
};

const logText = entry => entry.text ??= textOf(entry.name, entry.data);

function fitsLog(entry) {
  const {off, needle, pattern, level, model} = logView, {name, data} = entry;
  if (off.has(name)) return false;
  if (level && LEVELS.indexOf(entry.level) < LEVELS.indexOf(level)) return false;
  if (model && (data.model ?? page.requests.get(data.requestId)?.model) !== model) return false;
  const whole_ = [name, data.requestId, logText(entry)].join(" ");
  return pattern ? pattern.test(whole_) : !needle || whole_.toLowerCase().includes(needle);
}

/* Append what is new, and let go of the oldest.  While the reader has let go, only count. */
function paintLog() {
  paintChips();
  const box = $("log-lines"), {events} = page, fresh = [];
  for (let at = events.length - 1; events[at]?.n > logView.painted && fresh.length < ROWS; at -= 1) {
    if (fitsLog(events[at])) fresh.unshift(events[at]);
  }
  $("log-newer").hidden = logView.follow || !fresh.length;
  put($("log-newer"), whole(fresh.length) + (fresh.length === ROWS ? "+" : "") + " newer \u2193");
  if (!logView.follow) return;
  logView.painted = page.total;
  while (box.children.length > ROWS - fresh.length) box.firstChild.remove();
  box.append(...fresh.map(logLine));
  box.scrollTop = box.scrollHeight;
  logView.top = box.scrollTop;
}

function logLine(entry) {
  const {name, data, level} = entry, stamp = String(data.timestamp ?? "");
  if (name === "gap") return el("li.cut", `\u2014 ${logText(entry)} \u2014`);
  const time = stamp.endsWith("Z") ? clockTime(Date.parse(stamp)) : stamp.slice(11, 19);
  return el("li." + (LEVELS.includes(level) ? level : "INFO"), el("span.muted", time), el("span.muted", name),
    el("span.isolate", data.requestId ? requestLink(data.requestId) : null, logText(entry)));
}

/* The end of a request's id; a click opens it.  It is no stop of the Tab key: there are hundreds. */
function requestLink(id) {
  const link = el("button.plain", id.slice(-6));
  Object.assign(link, {type: "button", tabIndex: -1, title: id});
  link.dataset.id = id;
  return link;
}

/* Paint the log anew, after a filter has changed. */
function relog(changes = {}) {
  Object.assign(logView, {painted: 0}, changes);
  $("log-lines").replaceChildren();
  follow(true);
}

function follow(on) {
  logView.follow = on;
  $("log-follow").setAttribute("aria-pressed", on);
  PANELS.log.due = 0;
  touch("log");
}

function paintChips() {
  for (const name of [...page.counts.keys()].filter(one => one !== "ping" && !chips.has(one))) {
    const chip = button("", () => {
      if (!logView.off.delete(name)) logView.off.add(name);
      chip.setAttribute("aria-pressed", !logView.off.has(name));
      relog();
    });
    chip.setAttribute("aria-pressed", !logView.off.has(name));
    chips.set(name, chip);
    $("log-types").replaceChildren(...[...chips].sort(([a], [b]) => a < b ? -1 : 1).map(([, one]) => one));
  }
  for (const [name, chip] of chips) put(chip, name + " " + whole(page.counts.get(name)));
  put($("log-note"), plural(page.total, "event") + (page.missed ? `, ${whole(page.missed)} missed` : ""));
  choices($("log-model"), "Any model", different(allRequests().map(modelOf)), logView.model);
}

function saveLog() {
  const lines = page.events.map(({id, name, data}) => JSON.stringify({id, event: name, data}) + "\n");
  const link = el("a");
  link.href = URL.createObjectURL(new Blob(lines, {type: "application/x-ndjson"}));
  link.download = "lmgateway-events.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- 16. usage: what the history adds up to

const counted = name => row => tokens(row[name]), timed = of => row => span(1000 * of(row));
const USAGE = [
  ["Requests", counted("requests")],
  ["Errors", counted("errors")],
  ["Prompt tok", counted("promptTokens")],
  ["Cached tok", counted("cachedTokens")],
  ["Output tok", counted("completionTokens")],
  ["Reading", timed(row => row.promptSeconds)],
  ["Writing", timed(row => row.generationSeconds)],
  ["GPU time", timed(row => row.promptSeconds + row.generationSeconds)],
];

function openUsage() {
  options($("usage-by"), [["key", "by key"], ["model", "by model"], ["day", "by day"]], "key");
  options($("usage-since"), [["1d", "last day"], ["7d", "last 7 days"], ["30d", "last 30 days"]], "7d");
  for (const id of ["usage-by", "usage-since"]) $(id).addEventListener("change", readUsage);
  for (const id of ["usage", "usage-link"]) $(id).hidden = false;
}

async function readUsage() {
  const by = $("usage-by").value, asked = `?by=${by}&since=${$("usage-since").value}`;
  $("usage-csv").href = "/debug/usage" + asked + "&format=csv";
  const rows = (await get("/debug/usage" + asked))?.rows;
  const none = Array.isArray(rows) ? "No request in this time." : "The history does not answer.";
  $("usage-table").replaceChildren(rows?.length ? table([by, ...USAGE.map(([text]) => text)],
    rows.map(row => [words(row[by]), ...USAGE.map(([, show]) => show(row))])) : el("p.empty", none));
}

// --- 17. server facts, and the title

function paintServer() {
  if (!page.status) return;
  const {version, uptime, totalRequests, totalErrors} = page.status;
  const {gateway = {}, log = {}, stream: listeners = {}} = page.status;
  const counts = of => listed(Object.entries(of ?? {}).map(([name, n]) => name + " " + whole(n))) || NONE;
  const samples = Array.isArray(log.unknownSamples) ? log.unknownSamples.slice(0, 3) : [];
  const rows = [
    fact("Gateway", "lmgateway " + words(version)),
    fact("Address", words(gateway.address)),
    fact("LM Studio", words(gateway.upstream)),
    fact("Key", gateway.keyNeeded ? "asked for" : "none is asked for"),
    fact("Up for", known(uptime) ? running(1000 * uptime) : NONE),
    fact("Requests", `${tokens(totalRequests)} \u00b7 ${tokens(totalErrors)} errors`),
    fact("Listeners", `${tokens(listeners.clients)} \u00b7 ${tokens(listeners.dropped)} events dropped`),
    fact("This page", listed([plural(page.total, "event"), page.missed && whole(page.missed) + " missed",
      stream.breaks && plural(stream.breaks, "break")])),
    fact("Log size", bytes(log.directoryBytes)),
    fact("Growth", known(log.growthBytesPerDay) ? bytes(log.growthBytesPerDay) + " a day" : NONE),
    fact("Free disk", bytes(log.freeBytes)),
    fact("Last entry", dateTime(log.lastEntryAt)),
    fact("Read", `${bytes(log.position)} of ${bytes(log.size)}`),
    fact("Engines", counts(log.generations)),
    fact("Levels", counts(log.levels)),
    fact("Unknown lines", tokens(log.unknownLines)),
    fact("Requests joined", counts(page.status.bindings)),
  ];
  const wide = [fact("Log file", words(log.file ?? log.directory))];
  const strange = samples.map(sample => el("div.mono", String(sample).slice(0, 80)));
  if (strange.length) wide.push(fact("Not understood", ...strange));
  for (const row of wide) row.classList.add("whole");
  $("facts").replaceChildren(...rows, ...wide);
  put($("version"), "lmgateway " + words(version));
}

function paintTitle() {
  const active = runningOnes(), read = active.filter(r => r.state === "prompt").map(r => r.progress?.percent);
  const says = read.some(known) ? percent(Math.min(...read.filter(known))) : `${active.length} running`;
  document.title = (active.length ? says + " \u00b7 " : "") + "lmgateway";
}

// --- 18. controls

function setTheme(chosen) {
  applyTheme(chosen);
  put($("theme"), "\u25d0 " + ({light: "Light", dark: "Dark"}[chosen] ?? "Auto"));
  store("theme", chosen);
}

function pause(on) {
  page.paused = on;
  $("pause").setAttribute("aria-pressed", on);
  put($("pause"), on ? "Go on" : "Pause");
  paintHeader();
  touchAll();
}

/* To the next row of the table, or the one before; in the drawer, to its request. */
function step(by) {
  const rows = [...$("requests-rows").children], open = $("drawer").open;
  const at = rows.findIndex(row => open ? row.dataset.id === drawer.id : row === document.activeElement);
  const next = rows[at < 0 ? 0 : at + by];
  if (open && next) openDrawer(next.dataset.id);
  else next?.focus();
}

const KEYS = {
  "/": () => $("filter").focus(),
  p: () => pause(!page.paused),
  j: () => step(1),
  k: () => step(-1),
  "?": () => $("help").showModal(),
};

function onKey(event) {
  const {key, target} = event, row = target.closest?.("#requests-rows tr");
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(target.tagName)) return;
  const act = row && {Enter: () => openDrawer(row.dataset.id), ArrowDown: KEYS.j, ArrowUp: KEYS.k}[key]
    || $("keys-on").checked && KEYS[key];
  if (!act) return;
  event.preventDefault();
  act();
}

function onLogFilter() {
  const given = $("log-filter").value, asked = /^\/(.+)\/(i?)$/.exec(given);
  let pattern = null;
  try { pattern = asked && new RegExp(asked[1], asked[2]); } catch { /* it is not finished yet */ }
  relog({pattern, needle: pattern ? "" : given.toLowerCase()});
}

/* Following lets go when the reader scrolls up, not when lines grow, and holds on again at the end. */
function onLogScroll() {
  const box = $("log-lines"), rest = box.scrollHeight - box.scrollTop - box.clientHeight;
  const up = box.scrollTop < logView.top;
  logView.top = box.scrollTop;
  if (logView.follow ? up && rest > 40 : !up && rest < 2) follow(!logView.follow);
}

function onSelection() {
  const chosen = getSelection();
  if (logView.follow && chosen.type === "Range" && $("log-lines").contains(chosen.anchorNode)) follow(false);
}

/* The page is seen again, or the network is back. */
function onReturn() {
  if (document.hidden) return;
  stream.hurry();
  wantStatus();
  wantRequests();
  touchAll();
}

function listen() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("login", "submit", logIn);
  on("theme", "click", () => setTheme({auto: "light", light: "dark"}[stored("theme", "auto")] ?? "auto"));
  on("pause", "click", () => pause(!page.paused));
  on("filter", "input", event => refilter({text: event.target.value}));
  for (const name of ["status", "key", "model"]) {
    on("by-" + name, "change", event => refilter({[name]: event.target.value}));
  }
  on("clear", "click", () => {
    $("filter").value = "";
    refilter(Object.fromEntries(FILTERS.map(name => [name, ""])));
  });
  on("requests-rows", "click", event => openDrawer(event.target.closest("tr").dataset.id));
  on("requests-more", "click", () => refilter({rows: Math.min(ROWS, view.rows + PAGE_ROWS)}));
  on("requests-newer", "click", () => $("requests").scrollIntoView());
  for (const name of ["chart-list", "log-lines"]) {
    on(name, "click", event => {
      const id = event.target.closest("[data-id]")?.dataset.id;
      if (id) openDrawer(id);
    });
  }
  on("drawer-close", "click", () => $("drawer").close());
  on("drawer-copy", "click", event =>
    copy(JSON.stringify(drawer.detail ?? page.requests.get(drawer.id), null, 2), event.currentTarget));
  on("drawer", "click", event => { if (event.target === $("drawer")) $("drawer").close(); });
  on("drawer", "close", () => {
    rowNodes.get(drawer.id)?.node.focus({preventScroll: true});
    drawer.id = null;
  });
  on("help-close", "click", () => $("help").close());
  on("keys-on", "change", event => store("keys", event.target.checked ? "on" : "off"));
  on("log-filter", "input", onLogFilter);
  on("log-level", "change", event => relog({level: event.target.value}));
  on("log-model", "change", event => relog({model: event.target.value}));
  on("log-follow", "click", () => follow(!logView.follow));
  on("log-newer", "click", () => follow(true));
  on("log-save", "click", saveLog);
  for (const name of ["wrap", "large"]) {
    on("log-" + name, "click", event =>
      event.currentTarget.setAttribute("aria-pressed", $("log-lines").classList.toggle(name)));
  }
  on("log-lines", "scroll", onLogScroll);
  document.addEventListener("selectionchange", onSelection);
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", onReturn);
  for (const event of ["online", "pageshow"]) addEventListener(event, onReturn);
  addEventListener("resize", () => {
    PANELS.charts.due = 0;
    touch("charts");
  });
  addEventListener("scroll", () => { if (view.since !== null) touch("requests"); }, {passive: true});
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", () => applyTheme(stored("theme", "auto")));
}

/* Once a second: what changes by itself. */
function tick() {
  stream.watch();
  if (document.hidden) return;
  const active = runningOnes();
  touch("now");
  if (Math.round(Date.now() / 1000) % 5 === 0) touch("tiles", "charts");
  if (active.length) touch("requests");
  if (live() && Date.now() - page.asked > 5000) wantStatus();
  if (active.some(r => r.source === "lmstudio")) wantRequests();
  if (active.some(r => r.requestId === drawer.id)) readDetail();
}

panel("header", 250, paintHeader);
panel("banners", 500, paintBanners);
panel("now", 250, paintNow);
panel("tiles", 1000, paintTiles, $("trends"));
panel("charts", 2000, paintCharts, $("charts"));
panel("requests", 500, paintRequests);
panel("log", 250, paintLog, $("log"));
panel("usage", 15000, readUsage, $("usage"));
panel("server", 1000, paintServer, $("server"));
panel("drawer", 500, paintDrawer);
panel("title", 1000, paintTitle);

options($("log-level"), [["", "Every level"], ["INFO", "INFO and up"], ["WARN", "WARN and up"],
  ["ERROR", "ERROR only"]], "");
$("keys-on").checked = stored("keys", "on") === "on";
setTheme(stored("theme", "auto"));
makeTiles();
makeCharts();
makeTable();
readAddress();
listen();
watchSight();
touchAll();
setInterval(tick, 1000);
stream.run();
wantStatus();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
