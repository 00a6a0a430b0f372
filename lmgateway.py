#!/usr/bin/env python3
"""lmgateway: a gateway, log monitor and dashboard for LM Studio, in one file.

It forwards every request to LM Studio unchanged, with keys and metering; it follows LM Studio's
log files and turns them into typed events, whichever engine wrote them; and it hands those, joined
with the requests that caused them, to /debug/stream, a dashboard, a terminal and Prometheus.

Words used throughout:

    chunk      bytes that one look at a log file brought
    entry      one log record: a header line and the lines that continue it
    rule       one wording of LM Studio's log, and the fact that it states
    fact       the statement of a line, in words that no engine owns ("prompt is read", "client left")
    run        one prediction of an engine, as its DEBUG lines tell it
    chat       one prediction, as the app's INFO lines tell it
    event      a name and JSON, as listeners receive them
    request    one HTTP request of a client; its record is kept
    dialect    one of the APIs that LM Studio speaks: its places for usage, tokens and errors
    meter      reads a dialect's answer while it passes
    view       a function (gateway, request) -> Response
    card       one running request on a terminal
    finding    one result of --check, with its remedy
    upstream   LM Studio's server

Threads, and the state that each may change:

    main       nothing after start-up; it waits for a signal
    accept     takes connections in, closes some if there are too many, notices clients that left
    tail       the parser (others only read its figures); Hub.publish_log
    http       one per connection: its own sockets, its own meter; Hub.begin, Hub.generated, Hub.end
    question   asks LM Studio for all views that want to know, while they wait a little
    history    the SQLite file, fed through a queue
    log        our own log's file or stderr, fed through a queue
    watch      with --watch only: the line to another gateway; a queue to main
    demo-*     the imitation of LM Studio, with --demo only

Hub is the only object that requests and log have in common; it has one lock.  Other state of several
threads (keys, access, kept connections, our own log) guards itself and says how.  CORE is pure: no file,
no socket, no clock, no thread.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main() can say so better than with a traceback

import argparse
import base64
import bisect
import codecs
import contextlib
import csv
import datetime
import difflib
import errno
import fnmatch
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
import os
import platform
import plistlib
import queue
import random
import re
import secrets
import select
import selectors
import shutil
import socket
import socketserver
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1.0.0"
log = logging.getLogger("lmgateway")

# === 1. ERRORS ===============================================================
# One class per remedy.  The message tells the user the remedy.


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

    code is for programs, message for people; headers are sent along; close ends the connection, because the
    bytes that follow on it cannot be trusted."""

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

    variable: str
    default: Any
    parse: Callable[[str], Any]
    about: str
    value: str | None = None  # its flag's placeholder in --help; None: it has no flag
    alias: str | None = None  # its name, if that is not the variable's

    @property
    def name(self):
        return self.alias or self.variable.lower()

    @property
    def flag(self):
        return None if self.value is None else flag_of(self.name)


def flag_of(name):
    return "--" + name.replace("_", "-")


def one_of(*known):
    """A parser of words, in any case."""

    def parse(text):
        if text.strip().lower() not in known:
            raise ValueError(f"use {', '.join(known)}")
        return text.strip().lower()

    return parse


def boolean(text):
    return one_of("true", "false", "yes", "no", "on", "off", "1", "0")(text) in ("true", "yes", "on", "1")


def whole(low, high, unit=""):
    """A parser of whole numbers from low to high."""

    def parse(text):
        if not re.fullmatch(r"\s*\d{1,20}\s*", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"use a number {unit}from {low} to {high}")
        return int(text)

    return parse


def http_parts(text):
    """The parts of an http or https URL with a host (urllib.parse); None for anything else."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        return parts if usable and re.fullmatch("[!-~]+", text) else None
    return None


def base_url(text):
    """http://HOST[:PORT], without a path."""
    parts = http_parts(text.strip().rstrip("/"))
    if not parts or parts.path or parts.query or parts.fragment or parts.username:
        raise ValueError("use the form http://127.0.0.1:1234")
    return f"{parts.scheme}://{parts.netloc}"


def folder(text):
    """A directory, which need not be there yet."""
    if os.path.isfile(text):
        raise ValueError("that is a file; name LM Studio's server-logs directory")
    return text


def header_word(text):
    if not re.fullmatch(r"[!-~]+", text.strip()):
        raise ValueError("use printable ASCII without blanks")
    return text.strip()


def networks(text):
    """A tuple of networks from addresses and CIDR ranges; None for `*`, which is every address."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
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
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.ip_network((mapped, network.prefixlen - 96))


def api_keys(text):
    """{name: key} from one key, or from name=key,name=key.  A lone key may end in `=`, one of several without
    a name in the `==` of base64; NAME= is neither."""
    keys: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, key = part.partition("=")
        padded = "=" not in part.rstrip("=") and (part.endswith("==") or "," not in text.strip(" ,"))
        if not equals or padded:
            name, key = ("default" if not keys else f"key{len(keys) + 1}"), part
        if not key.strip("=") or not name.strip():
            raise ValueError("use KEY, or NAME=KEY,NAME=KEY; in a list, a key that ends in = needs a name")
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError("a key is made of printable ASCII without blanks")
        if name.strip() in keys:
            raise ValueError(f"the name {name.strip()} stands there twice")
        keys[name.strip()] = key
    return keys


def origins(text):
    """Origins as a browser writes them: in lower case, without a path; or `*`."""
    found = words(text.lower())
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
            raise ValueError("use origins such as https://chat.example,http://localhost:3000, or *")
    return found


def words(text):
    return tuple(word.strip().rstrip("/") for word in text.split(",") if word.strip())


LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
BYTES, MS = whole(1, 10**12, "of bytes "), whole(0, 10**9, "of milliseconds ")
GATEWAY_OPTIONS = (
    Option("LMSTUDIO_BASE_URL", "http://127.0.0.1:1234", base_url,
           "LM Studio's server; its port is found in its settings", "URL", "upstream"),
    Option("GATEWAY_HOST", "127.0.0.1", str, "address to listen on; 0.0.0.0 for the LAN", "HOST", "host"),
    Option("GATEWAY_PORT", 8001, whole(0, 65535), "port to listen on; 0: the system chooses", "PORT", "port"),
    Option("TLS_CERT", None, str, "certificate (PEM), to serve HTTPS", "FILE"),
    Option("TLS_KEY", None, str, "its private key (PEM)", "FILE"),
    Option("UPSTREAM_TOKEN", None, header_word, "LM Studio's own API token, if its server asks for one"),
    Option("MAX_BODY_BYTES", 256 * 1024**2, BYTES, "largest request body; 413 beyond it", None, "max_body"),
    Option("MAX_BODY_MEMORY", 512 * 1024**2, BYTES,
           "bytes that the bodies of all running requests may take together; 503 beyond them"),
    Option("MAX_RUNNING", 0, whole(0, 10_000), "inferences at once for each model, others wait; 0: all", "N"),
    Option("MAX_WAITING", 100, whole(0, 10_000), "inferences that may wait for their turn; 429 beyond them"),
    Option("MAX_CONNECTIONS", 512, whole(8, 100_000),
           "connections at once; beyond them one that has shown no right key is closed"),
    Option("PREFILL_COMMENTS", False, boolean, "SSE comments tell waiting clients how far their prompt is"),
    Option("PROXY_TIMEOUT", 600_000, MS, "ms without a byte from LM Studio on a plain request; 0: never"),
    Option("PROXY_STREAM_TIMEOUT", 0, MS, "the same for a streaming request"),
)
ACCESS_OPTIONS = (
    Option("GATEWAY_API_KEY", {}, api_keys,
           "one key, or several as name=key,name=key; a process list shows it", "KEY", "api_key"),
    Option("KEYS_FILE", None, str, "minted keys, hashed; else in the user's configuration directory", "FILE"),
    Option("USERS_FROM", (), words, "keys of several users each, whom Open WebUI's headers name", "LIST"),
    Option("NO_AUTH", False, boolean, "listen beyond this machine without a key", ""),
    Option("IP_ALLOWLIST", None, networks, "addresses and CIDR ranges that may connect", "LIST", "allow"),
    Option("CORS_ORIGINS", (), origins, "origins whose pages may call (https://chat.example), or *", "LIST"),
    Option("TRUSTED_PROXIES", (), networks,
           "proxies (addresses and ranges, or * for all) whose X-Forwarded-For is believed"),
    Option("REQUIRE_AUTH_FOR_HEALTH", False, boolean, "ask for a key on /health and /ready, too"),
)
LOG_OPTIONS = (
    Option("REQUESTS_KEPT", 100, whole(1, 100_000), "finished requests that /debug/requests keeps"),
    Option("HISTORY_FILE", None, str,
           "SQLite file that keeps a row for each request; no prompts, no answers", "FILE", "history"),
    Option("HISTORY_DAYS", 365, whole(0, 36_500, "of days "), "days after which rows are removed; 0: never"),
    Option("LMSTUDIO_LOG_DIR", None, folder,
           "LM Studio's server-logs directory; found under the home if not given", "DIR", "log_dir"),
    Option("ENABLE_LOG_MONITORING", True, boolean, "follow LM Studio's logs"),
    Option("LOG_SOURCE", "files", one_of("files", "stream", "auto"),
           "source of the log: files, stream (from LM Studio itself; experimental) or auto"),
    Option("LOG_DIR_WARN_BYTES", 5_000_000_000, whole(0, 10**15, "of bytes "),
           "size of the log directory that brings a warning; 0: never", None, "log_dir_warn"),
    Option("LOG_LEVEL", "info", one_of(*LEVELS), "error, warn, info or debug", "LEVEL"),
    Option("LOG_FILE", None, str, "our own log; turned over at 5 MB, begun anew once it was moved", "FILE"),
)
OPTIONS = (*GATEWAY_OPTIONS, *ACCESS_OPTIONS, *LOG_OPTIONS)


class Config:
    """The value of every option by the option's name; sources has the source of each that is set.
    Nothing changes it once it is made."""

    def __init__(self, **values):
        self.__dict__.update({row.name: row.default for row in OPTIONS}, sources={})
        self.__dict__.update(values)

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


SECRET = ("GATEWAY_API_KEY", "UPSTREAM_TOKEN")
# Not NO_AUTH's: NO_PROXY and NO_COLOR are others'.
PREFIXES = tuple({row.variable.partition("_")[0] + "_" for row in OPTIONS} - {"NO_"})

def load_config(args, environ, env_file=None):
    """(Config, warnings, errors) from flags, else environment, else `.env`, else defaults.

    args maps option names to the text of their flags.  An empty variable counts as not set, and an option
    with an error has its default."""
    from_file, warnings, errors = read_env_file(env_file)
    values, sources = {}, {}
    for row in OPTIONS:
        text, source = next(((text, source) for text, source in (
            (args.get(row.name), row.flag),
            (environ.get(row.variable, "").strip() or None, f"environment variable {row.variable}"),
            from_file.get(row.variable, (None, None))) if text is not None), (None, None))
        try:
            if text is not None:
                values[row.name], sources[row.name] = row.parse(text), source
        except ValueError as error:
            shown = "..." if row.variable in SECRET else repr(text)
            errors.append(f"{source}: {shown} is no value for {row.variable}: {error}")
    return Config(**values, sources=sources), warnings, errors


def read_env_file(path):
    """({variable: (text, source)}, warnings, errors) of a `.env` file; without a path, of the one in the
    working directory, which need not be there."""
    found: dict[str, tuple] = {}
    try:
        content = Path(path or ".env").read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        if path is not None:
            return found, [], [f"--env-file {path}: {error.strerror}; name a file that can be read"]
        unread = isinstance(error, PermissionError)
        return found, [f".env cannot be read ({error.strerror}): its lines do not count"] * unread, []
    form = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*"
                      r"(?:\"([^\"]*)\"|'([^']*)'|(.*?))\s*(?:(?<=\s)#.*)?$")
    variables, warnings, errors = [row.variable for row in OPTIONS], [], []
    for line_number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        source, match = f"{path or '.env'} line {line_number}", form.match(line)
        if not match:
            errors.append(f"{source}: not of the form NAME=value; mend the line or put # before it")
            continue
        name, text = match[1], next((part for part in match.groups()[1:] if part is not None), "")
        if name in variables and text.strip():
            found[name] = (text, source)
        elif name not in variables and name.startswith(PREFIXES):
            warnings.append(f"{source}: {name} is not a known option{nearest(name, variables, 0.5)}")
    return found, warnings, errors


def nearest(word, known, cutoff=0.6):
    """`; did you mean WORD?`, empty when nothing is near.  Dashes make no word like another."""
    plain = {name.lstrip("-"): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-"), plain, 1, cutoff)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def shown_default(row):
    """A default as a person would write it."""
    if isinstance(row.default, bool):
        return str(row.default).lower()
    return "*" if row.name == "allow" else "none" if row.default in (None, (), {}) else str(row.default)


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
    """News for every listener.  data is strict JSON.  One without a name is a fact for the join alone."""

    name: str
    data: dict
    run: int | None = None  # number of the run that its line surely is about
    chat: int | None = None  # number of the chat that the tracker takes it for
    about: Any = None  # further facts for the join and the figures: {name: value}


# --- 3.1 log rules: the only place that knows a wording of LM Studio's log ---
# A new wording is one new row: write down the fact that the line states, its pattern and a
# sample line.  Facts are methods of ChatTracker (3.3), on_<fact>; "" is a known line that states
# nothing we use.  A line that fits no row is counted as unknown and shown in /debug/status.


class Rule(NamedTuple):
    """One wording.  The pattern is matched behind the line's tags, clock and slot."""

    fact: str  # its statement: on_<fact> takes the pattern's named groups (engine) or the Entry
    where: str  # "app": first line of an entry; "error": all of an ERROR entry; "engine": a DEBUG line
    shape: str  # "line", "json" (on to a brace in column 1), "text" (all of its entry), "half" (a line)
    engines: str  # its writer: App, or the engine generations named below
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
    Rule("output", "app", "json", "App", r"Prediction stats: ", "Prediction stats: {"),     # LogStream's own
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
    Rule("", "app", "line", "App", r"Start thinking\.\.\.|Done (?:thinking|reasoning)\.|Tool name generated: "
         r"|Start to generate a tool call|Model generated a tool call\.",
         "Done reasoning. Reasoned for 6.13 seconds."),
    Rule("respond", "app", "line", "App", r"Generating synchronous v1/responses response",
         "Generating synchronous v1/responses response..."),
    Rule("", "app", "line", "App", r"Returning \d+ models", "Returning 5 models from v1 API"),
    Rule("", "app", "text", "App", r"Returning \{", "Returning {"),
    Rule("", "app", "line", "App",
         r"A value was passed to the 'Authorization' header|Developer role detected|Received OPTIONS request"
         r"|At least one tool has 'strict' set to true|Client disconnected: Error"
         r"|Failed to generate a tool call",
         "Developer role detected - replacing it with system role."),
    Rule("load", "app", "line", "App", r"Requested model \((?P<asked>.*)\) is not loaded\. Loading ",
         'Requested model (quillon/moraine-30b) is not loaded. Loading "quillon/moraine-30b" now...'),
    Rule("", "app", "line", "App", r"Just-in-time model loading (?:in)?active",
         "Just-in-time model loading active."),
    Rule("", "app", "line", "App",
         r"Server started\.|Success! HTTP server listening|Logs are saved into |The server can be reached"
         r"|Server accepting connections from the local network",
         "Success! HTTP server listening on port 1234"),
    Rule("", "app", "line", "App",
         r"Supported endpoints:|  OpenAI-compatible|  LM Studio API| *->\s+[A-Z]+ +http",
         "   ->  GET  http://localhost:1234/v1/models"),
    # --- errors: the whole text of an ERROR entry, 02-2025 to 09-2026.  Most of streams end in "Error Data".
    Rule("", "error", "text", "App", r"Failed to generate a tool call",
         "Failed to generate a tool call (this tool call will be omitted from the response):  no end"),
    Rule("", "error", "text", "App", r"Model Output: ", "Model Output:  <tool_call>{, Additional Data: n/a"),
    Rule("render_error", "error", "text", "App", r"Error rendering prompt with jinja template",
         'Error rendering prompt with jinja template: "No user turn to render".'),
    Rule("crash", "error", "text", "App", r"(?:Error: )?The model has crashed(?!.*Error Data: )",
         "Error: The model has crashed without additional information. (Exit code: 18446744072635812000)"),
    Rule("chat_error", "error", "text", "App", r"Error: (?:Channel Error|received prediction-error)"
         r"|Engine protocol predict "
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
    Rule("decoded", "engine", "line", "G3",
         r"n_(?:decoded|gen) = +(?P<tokens>\d+), tg = +(?P<rate>[\d.]+) t/s",
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
         r"update took|all slots are idle|cache reuse is not supported|n_past = |restored context"
         r"|created context"
         r"|erased invalidated|checking checkpoint|- cache state: |- prompt [0-9A-F]+:|saving idle slot"
         r"|- saving prompt|clearing prompt|chat format: |graphs reused|loading model|initializing, n_slots"
         r"|prompt_save: |statistics |- looking for better prompt|- skipping",
         "0.30.013.273 I slot get_availabl: id  3 | task -1 | selected slot by LRU, t_last = -1"),
    Rule("", "engine", "line", "G2 G3", r"LlamaV4(?:::|: server assigned slot \d+ to task)",
         "LlamaV4: server assigned slot 1 to task 3416"),
    Rule("", "engine", "half", "G2 G3", r"[IWED]?(?<=[\dIWED|])$",    # the rest is under the next header
         "0.30.015.244 I"),
    # --- lines of a model load, of the app's planning, of errors told elsewhere: classes, by their beginning
    Rule("", "engine", "text", "App", r"\[LM Studio\]|1 Error predicting: |\[LLMProcess\]|\[SamplingSwitch\]"
         r"|lmstudio-llama-cpp: failed to load model|SpeculativeDecodingNotSupportedError|CUDA error",
         "1 Error predicting: Error: the prompt does not fit."),
    Rule("", "engine", "line", "App",
         r"llama_model_load|llama_context|llama_kv_cache|llama_memory|print_info:|load_tensors:|load_hparams:"
         r"|load:|validate_override:|ggml_|common_init|GgmlThreadpools:|Metal :|warning: failed to mlock"
         r"|Try increasing RLIMIT_MEMLOCK|Prompt successfully formatted with Harmony"
         r"|Failed to remove tokens from cache"
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
SERVER_TAG = "LM STUDIO SERVER"  # where later versions name the model, or before it; never a model
SERVER_ERROR = "Server Error"  # its JSON may quote any other error; it ends no chat


def compile_rules(where, prefix="", suffix=""):
    """The rules of one place as one pattern, and {last group: (rule, [(field, group index)])}.

    A figure has at most 15 digits, so that int and float take every one."""
    parts, rows = [], {}
    for number, rule in enumerate(RULES):
        if rule.where == where:
            bounded = rule.pattern.replace("(?P<", f"(?P<r{number}_").replace(r"\d+", r"\d{1,15}")
            parts.append(f"(?:{bounded})(?P<r{number}>)")  # re passes over lines with another first letter
            rows[f"r{number}"] = rule
    pattern = re.compile(prefix + "(?:" + "|".join(parts) + ")" + suffix, re.MULTILINE)
    return pattern, {name: (rule, fields_of(pattern, name)) for name, rule in rows.items()}


def fields_of(pattern, name):
    """[(field, group index)] of one rule inside a compiled alternation: its own, and the prefix's."""
    return [(group.rpartition(f"{name}_")[2], index) for group, index in pattern.groupindex.items()
            if group.startswith(f"{name}_") or group in ("slot", "task", "clock")]


# G3 puts its clock (minutes.seconds.ms.us since the engine started) and a level before each line;
# G2 and G3 say which slot and task a line is about; G1 says which printer wrote it.
ENGINE_PREFIX = (r"(?P<clock>\d+\.\d\d\.\d{3}\.\d{3} ?)?(?:[IWED] )?"
                 r"(?:slot +[^:\n]*: +id +(?P<slot>\d+) \| +task +(?P<task>-?\d+) \| *"
                 r"|(?P<server>srv) +[^:\n]*: *"
                 r"|(?P<printer>llama_perf\w*): *|[ \t]+)?")

APP, APP_ROWS = compile_rules("app")
ERRORS, ERROR_ROWS = compile_rules("error")
ENGINE, ENGINE_ROWS = compile_rules("engine", "^(?:" + ENGINE_PREFIX, r")[^\n]*|^(?P<unknown>[^\n]*\S[^\n]*)")


HALVES = frozenset(["unknown", *(group for group, (rule, _) in ENGINE_ROWS.items() if rule.shape == "half")])
GROWING = frozenset(group for group, (rule, _) in ENGINE_ROWS.items()  # torn in a number, they are told again
                    if rule.fact == "params")
ANY_WORDING = next(group for group, (rule, _) in ENGINE_ROWS.items() if rule is RULES[-1])


def number(text):
    """int or float of the log's text; None for inf, nan and a text that is no number."""
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

TORN_S = 1  # a line broken over two headers goes on within this


class Moment(NamedTuple):
    """When an entry was written: the log's own text, the same in UTC, and epoch seconds."""

    text: str
    utc: str
    epoch: float


class UtcClock:
    """The log's local time to UTC, in file order.

    The log has no zone, so the hour that a change to winter time repeats is told
    apart by order: a time that would run back by more than a minute is the second one."""

    def __init__(self):
        self._last = Moment("", "", 0.0)
        self._repeats = False  # the hour is being repeated

    def moment(self, text):
        """The Moment of a header's time; a time that no calendar has keeps its text."""
        if text != self._last.text:
            self._last = self._resolve(text)
        return self._last

    def _resolve(self, text):
        try:
            local = datetime.datetime.fromisoformat(text)
            epoch, second = local.timestamp(), local.replace(fold=1).timestamp()
        except (ValueError, OverflowError, OSError):
            return Moment(text, text.replace(" ", "T") + "Z", self._last.epoch)
        self._repeats = second > epoch and (self._repeats or epoch < self._last.epoch - 60)
        epoch = second if self._repeats else epoch
        return Moment(text, utc_text(epoch), epoch)


def utc_text(epoch):
    """Epoch seconds as 2025-11-17T10:59:23Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch // 1))


class Entry:
    """One log record while its lines come in."""

    LIMIT = 256 * 1024  # characters; more is read and not kept
    TAGS = 32
    NO_MODEL = frozenset(("JIT", SERVER_ERROR, "INFO", "WARNING"))  # tags of other things
    CLOSED = ("\n}", "\n]")  # the end of pretty-printed JSON
    PANEL_GAP = re.compile(r"(?<=[^ \n])  (?=[{\[](?:\n|$))")  # the panel's second blank before JSON

    line = ""  # its first line that has any text, without the tags before it
    shape: str | None = None  # "line", "json", "text", "engine", "foreign"; None before its first text
    model = None
    row = fields = None  # the app rule that it fits, and that rule's fields
    listener = None  # the method of the tracker that hears of it once it is whole
    sent = -1  # characters of text that events have carried; -1 before the first event
    cut = False  # lines were left out
    told = loads = None  # the events of its first line; the model whose loading it announces

    def __init__(self, moment, level, panel):
        self.moment, self.level, self.panel = moment, level, panel
        self.text, self.tags, self.own_tags = "", [], []

    def add(self, lines):
        """Append lines as far as there is room.  Returns them; before its shape is known, all text so far."""
        room = self.LIMIT - len(self.text)
        self.cut = self.cut or len(lines) > room
        self.text += lines[:room]
        if self.shape:
            return lines
        if self.panel and self.text:
            self.text = self.PANEL_GAP.sub(" ", self.text[2 if self.text.startswith("\n ") else 1:], count=1)
            self.panel = False
        return self.text.lstrip("\n")

    def begin(self, line):
        """Take the first line that has text: the tags before it and, if it has one, the model."""
        end, tags = 0, self.tags
        while line.startswith("[", end) and len(tags) < self.TAGS and (match := TAG.match(line, end)):
            tags.append(match[1])
            end = match.end()
        self.line = line[end:]
        self.own_tags = [tag for tag in tags if tag != SERVER_TAG] if SERVER_TAG in tags else tags
        if len(self.own_tags) == 1 and self.level != "DEBUG" and self.own_tags[0] not in self.NO_MODEL:
            self.model = self.own_tags[0]  # the only other tag of an app line is its model

    def take(self):
        """Return the data of an lmstudio_log event with the text that no event has carried yet."""
        data = {"timestamp": self.moment.text, "level": self.level, "message": self.text, "tags": self.tags}
        if self.sent >= 0:
            data["message"], data["continued"] = self.text[self.sent:].lstrip("\n"), True
        if self.cut:
            data["truncated"] = True
        self.sent = len(self.text)
        return data


class EngineReader:
    """The lines of the engines in the entry at hand, told to the tracker."""

    SAMPLES = 8

    def __init__(self):
        self._events: list[Event] = []
        self.story = ChatTracker(self._events)
        self._entry: Any = None
        self._last_line = None  # (text, rule's group, epoch) of the engine's latest line
        self._engine = ""  # the generation that wrote it
        self.unknown = self.faults = 0
        self.by_engine: Counter[str] = Counter()
        self._strange: deque[str] = deque(maxlen=self.SAMPLES)  # how the latest unknown lines begin

    @property
    def samples(self):
        """How the latest unknown lines look, without their words."""
        return [redacted(line) for line in tuple(self._strange)]

    def _tell(self, listener, *news):
        """Tell the tracker something.  A fault there costs these events and is counted."""
        try:
            listener(*news)
        except Exception:  # lines that nobody foresaw; CORE has no log to say it in, the status shows it
            self.faults += 1

    def _engine_lines(self, lines, moment, torn):
        """Facts from lines of a DEBUG entry; torn is the line before its header, if they are its first."""
        match: Any = None
        entry: Any = self._entry
        for found in ENGINE.finditer(lines):
            match = self._mended(torn, found, moment) if torn else found
            torn = None
            group = match.lastgroup
            if group == "unknown":
                self._note_unknown(match[0])
                continue
            rule, fields = ENGINE_ROWS[group]
            engine = self._engine = engine_of(rule, match, self._engine)
            if engine and engine != "App":
                self.by_engine[engine] += 1
            if rule.shape == "text":
                entry.shape, self._last_line = "text", None
                return
            if rule.fact:
                facts = {name: match[index] for name, index in fields}
                self._tell(self.story.engine, rule.fact, facts, engine, moment)
        if match:
            self._last_line = match[0], group, moment.epoch

    def _mended(self, torn, match, moment):
        """The match of a line, joined with the line before its header if the two are one line.

        A rule's pattern begins at the start of a line.  So one that fits both together and not the first
        half alone says that they belong together; how the second half looks alone is chance.  A line of
        parameters fits at any of its numbers' digits."""
        line, group, epoch = torn
        if moment.epoch - epoch > TORN_S or group not in HALVES and match.lastgroup != "unknown":
            return match
        blank = line.endswith(" ") or match[0].startswith(" ")
        for glue in ("",) if blank else (" ", ""):
            joined = ENGINE.match(line + glue + match[0])
            if (joined.lastgroup not in ("unknown", ANY_WORDING, group)
                    or group == joined.lastgroup in GROWING
                    or group == ANY_WORDING and match.lastgroup == "unknown"):
                if group == "unknown":
                    self.unknown -= 1
                return joined
        return match

    def _note_unknown(self, line):
        self.unknown += 1
        self._strange.append(line[:160])


class Parser(EngineReader):
    """Bytes of one log, in any pieces, to events.

    feed() takes news and gives the events that are certain; quiet() says that nothing was added
    for a while, so that the last entry is complete; end() says that nothing will follow the
    bytes so far (end of a file, a replaced file)."""

    UNENDED_LIMIT = 1024 * 1024  # bytes of a line that does not end; more is read and not kept
    # The file's header, or the one that the Developer Logs panel copies (both seen from 04-2025 to 09-2026).
    HEADER = re.compile(r"\n(\[)?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?(1)\]|  ?)\[(DEBUG|INFO|WARN|ERROR)\] ?"
                        r"(?(1)|(?=\n|\Z))", re.ASCII)
    # The panel's header with its text on the same line; inside a log of another look it is a plugin's text.
    ONE_LINE_HEADER = re.compile(r"\n()(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ?\[(DEBUG|INFO|WARN|ERROR)\] ?"
                                 r"(?=\S)", re.ASCII)

    def __init__(self):
        super().__init__()
        self._rest = b"\n"  # the unfinished last line, after the "\n" that ends the one before
        self._cut = False  # it was longer than a line may be
        self._first = True  # the next line is the first of its file
        self._header = self.HEADER
        self._clock = UtcClock()
        self.entries = self.lines = self.headless = 0
        self.by_event: Counter[str] = Counter()
        self.by_level: Counter[str] = Counter()
        self.last_moment = None

    def feed(self, chunk):
        """The events that the bytes complete, in order."""
        end = chunk.rfind(b"\n")
        if end < 0:
            self._rest += chunk[:max(0, self.UNENDED_LIMIT - len(self._rest))]
            self._cut = self._cut or len(self._rest) >= self.UNENDED_LIMIT
        else:
            block, self._rest = self._rest + chunk[:end], chunk[end:]
            self._block(block)
        return self._taken()

    def quiet(self):
        """The events of the entry that was open.  A line that has not ended stays open."""
        if not self.midline:
            entry = self._entry
            if entry is not None:
                (self._conclude if entry.level == "ERROR" else self._send)(entry)
            self._tell(self.story.quiet)
        return self._taken()

    def end(self, torn=True):
        """The events of all that is there, the unfinished line included unless torn is False."""
        rest, self._rest = self._rest, b"\n"
        if len(rest) > 1 and torn:
            self._block(rest)
        self._first = True
        if self._entry is not None:
            self._conclude(self._entry)
        self._tell(self.story.later, None)
        return self._taken()

    def forget(self):
        """The bytes that follow are another file's: lines before its first header continue nothing."""
        self._entry = self._last_line = None

    @property
    def midline(self):
        """True while the last line has not ended."""
        return len(self._rest) > 1

    def _taken(self):
        events, self._events[:] = self._events[:], []
        self.by_event.update([event.name for event in events if event.name])
        return events

    def _block(self, block):
        """Take bytes of whole lines, the first after its "\n"."""
        if self._first:
            block, self._first = b"\n" + block[1:].removeprefix(codecs.BOM_UTF8), False
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").removesuffix(b"\r")
        self.lines += block.count(b"\n")
        text = block.decode("utf-8", "replace")
        if self.entries == 0 and self.ONE_LINE_HEADER.match(text):
            self._header = self.ONE_LINE_HEADER
        before, *pieces = self._header.split(text)
        if before:
            self._add(before)
        for bracket, stamp, level, lines in zip(*[iter(pieces)] * 4):
            if self._entry is not None:
                self._conclude(self._entry)
            self._open(stamp, level, not bracket and self._header is self.HEADER)
            if lines:
                self._add(lines)

    def _open(self, stamp, level, panel):
        self.entries += 1
        self.by_level[level] += 1
        moment = self._clock.moment(stamp)
        if moment is not self.last_moment:
            self.last_moment = moment
            self._tell(self.story.later, moment)
        self._entry = Entry(moment, level, panel)

    def _add(self, lines):
        """Take more lines of the open entry."""
        entry, torn = self._entry, None
        if entry is None:
            self.headless += lines.count("\n")
            return
        lines = entry.add(lines)
        entry.cut, self._cut = entry.cut or self._cut, False
        if entry.shape is None and lines:
            torn, entry.shape = self._last_line, self._recognise(entry, lines.partition("\n")[0])
        if entry.shape == "engine":
            self._engine_lines(lines, entry.moment, torn)
        elif (entry.shape == "line" and entry.sent < 0
              or entry.shape == "json" and lines.endswith(entry.CLOSED)):
            self._conclude(entry)

    def _recognise(self, entry, line):
        """The shape of an entry by its first line.  Entries of plugins and SDK clients are "foreign"."""
        entry.begin(line)
        text, entry.line = entry.line, entry.line.strip()
        stranger = entry.tags and STRANGER.match(line)
        if entry.level == "ERROR" and not PLUGIN.match(line):
            entry.listener = self.story.error
            return "text"
        if stranger:
            return "foreign"
        match = APP.match(text) if len(entry.own_tags) < 2 else None
        if match:
            row, fields = APP_ROWS[match.lastgroup]
            if entry.level != "DEBUG" or row.fact in ("", "received"):
                entry.row, entry.fields = row, {name: match[index] for name, index in fields}
                entry.listener = self.story.app if row.fact else None
                whole = row.shape == "json" and not text.endswith(("{", "["))
                return "line" if whole else row.shape
        if entry.level == "DEBUG":
            return "engine"
        self._note_unknown(text)
        return "text"

    def _conclude(self, entry):
        """Tell the statement of a whole entry and send it, without waiting for the next header."""
        if entry.level == "ERROR" and not entry.text.strip():
            entry.listener = self.story.error
        if entry.listener:
            listener, entry.listener, before = entry.listener, None, len(self._events)
            self._tell(listener, entry)
            entry.told = self._events[before:]
        self._send(entry)

    def _send(self, entry):
        if entry.sent < len(entry.text):
            about = {"told": entry.told, "loads": entry.loads} if entry.told or entry.loads else None
            self._events.append(Event("lmstudio_log", entry.take(), about=about))


def engine_of(rule, match, before):
    """The engine generation that wrote a line: by the line itself, else before, that of the line before
    it; "" if neither tells."""
    if " " not in rule.engines:
        return rule.engines
    clock, printer, task = match.group("clock", "printer", "task")
    shown = "G3" if clock else "G1" if printer else "G2" if task else ""
    return shown or (before if before in rule.engines else "")


QUOTED = re.compile(r'"[^"]*"?|\'[^\']*\'?')
WORD = re.compile(r"[^\W\d_]{4,}|\d+")


def redacted(line):
    """A line as a specimen without a user's own words: quotes emptied, words cut, digits to 0."""
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
    """One prediction, as an engine's lines tell it.  G2 and G3 number it, G1 begins one with its sampling
    block, MLX has a cache line for each, Splash a line when it is over."""

    def __init__(self, number, engine, born):
        self.number, self.engine, self.born = number, engine, born  # born: epoch of its first line
        self.task: Any = None  # (slot, task)
        self.chat: Any = None  # the Chat that it is taken for
        self.model = None  # once an app line has named it (3)
        self.tokens = {}  # of lmstudio_token_info
        self.total = self.cached = None  # tokens of the prompt; those of them that were cached
        self.positions = {}  # tokens read after the latest batches, of which the app has not told: epoch
        self.launched = self.begun = self.read = False  # it is at work, its prompt is read, has been read
        self.waiting = None  # (Moment, percent) of the engine's progress while the app's own can follow
        self.stats = {}  # of lmstudio_prediction_stats
        self.stops = False  # its number has been cancelled
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

    def may_be_answer_of(self, run):
        """True if its answer has a run's counts.  MLX counts a token less, G1 writes one more or less."""
        pairs = ((self.counts.get("promptTokens"), run.total),
                 (self.counts.get("completionTokens"), run.stats.get("completionTokens")))
        return not any(None not in pair and abs(pair[0] - pair[1]) > 1 for pair in pairs)

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
        """Facts of a run that the join needs and no event tells."""
        chat = run.chat
        about = {"fact": name, "clock": self.clock, **about}
        self._news.append(Event("", {}, run.number, chat and chat.number, about))

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
        """lmstudio_prediction_stats of a run with the figures of its chat's answer, or of one of the two."""
        run = run if run and (run.over or run.engine in UNTIMED) else None
        mine = run is None or chat.may_be_answer_of(run)
        stats = {**chat.speeds, **(run.stats if run else {}), **chat.counts} if mine else run.stats
        prompt = stats.get("promptTokens") or run and run.total or stats.get("evaluated")
        known = without_none(promptTokens=prompt, **{name: stats.get(name) for name in STATS})
        if known.keys() - {"promptTokens"}:
            self.once("lmstudio_prediction_stats", moment, chat if mine else None,
                      run if run and run.stats else None, model,
                      about=countable(chat, known.get("promptTokens")), **known)


def countable(chat, prompt_tokens):
    """The amounts that figures count for a chat, at its stats or its end: the first of the two."""
    if chat is None or chat.counted:
        return None
    chat.counted = True
    return without_none(requests=1, input=prompt_tokens)


class Runs:
    """The runs and chats that are known, and which of them are taken for each other."""

    def __init__(self, news):
        self._emit = Emitter(news)
        self._facts = {rule.fact: getattr(self, "on_" + rule.fact) for rule in RULES if rule.fact}
        self._numbers = itertools.count(1)  # of runs and chats
        self.running: list[Chat] = []  # the chats that have not ended, oldest first
        self._ended: deque[Chat] = deque(maxlen=ENDED_KEPT)  # late lines can still mean them
        self._tasks: dict[tuple, Run] = {}  # (slot, task) -> run; engines of two models count tasks alike
        self._launching: dict[str, Run] = {}  # slot -> run whose task is not known yet
        self._latest: dict[str, Run] = {}  # engine -> the run that its lines were about last
        self._runs: deque[Run] = deque(maxlen=RUNS_KEPT)
        self._sampling: Any = None  # (run, Moment, parameters so far) while the block is open
        self._timing: Any = None  # G2: fields of the line before bare timing lines
        self._timed_run: Any = None  # G1: (run, Moment) whose figures are whole unless a timing line follows
        self._held: list[tuple] = []  # (Moment, chat) whose stats wait for their other half (5)
        self._unmatched: deque[tuple] = deque(maxlen=8)  # (model, percent, epoch) at which no run was
        self._engine, self._now = "", 0.0  # engine and epoch of the line at hand
        self.resets: Counter[str] = Counter()  # prompts that were read wholly anew, by model

    def engine(self, fact, fields, engine, moment):
        """A recognised line of an engine."""
        self._engine, self._now, self._emit.clock = engine, moment.epoch, fields.get("clock")
        if fact not in TIMINGS:
            self._timing = None
            if self._timed_run:
                self._close_timings()
        if self._sampling and fact != "params":
            self._close_sampling()
        self._facts[fact](fields, moment)

    def _close_sampling(self):
        if self._sampling:
            (run, moment, values), self._sampling = self._sampling, None
            if values:
                self._emit.once("lmstudio_sampling_params", moment, run.chat, run, self._model(run), **values)

    def _model(self, run):
        """The model of a run, None unless it is certain."""
        if run.model or not run.chat.api:
            return run.model
        chats = [*self.running, *(chat for chat in self._ended if chat is run.chat or chat.abandoned)]
        return shared_model([chat for chat in chats if chat.api])

    # --- runs

    def _begin(self, chat=None):
        """A new run, taken for the oldest chat that can have it (2)."""
        waiting = [chat for chat in self.running if chat.api and chat.run is None]
        run = Run(next(self._numbers), self._engine, self._now)
        chat = chat or pick(waiting, lambda c: c.percent is None) or self._new_chat(None, None, api=False)
        run.chat, chat.run = chat, run
        self._runs.append(run)
        self._latest[self._engine] = run
        self._emit.fact("launch", run, engine=run.engine, epoch=run.born, api=chat.api)
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
        run.task = slot, task
        if run.task in self._tasks:  # of another model's engine: no line with these numbers can be told apart
            self._tasks[run.task].task = None
            self._emit.fact("mixed", run)
        self._tasks[run.task] = run
        while len(self._tasks) > RUNS_KEPT:
            del self._tasks[next(iter(self._tasks))]
        return run

    def _run(self, fields=None, lacks=None):
        """The run that a line is about (1)."""
        task = fields and fields["task"]
        if task and task != "-1":
            run = self._tasks.get((fields["slot"], task)) or self._launch(fields)
            if run.waiting:  # the next line of its task is no app line: it is a chat inside the app
                (moment, percent), run.waiting = run.waiting, None
                self._emit.progress(moment, run.chat, run, None, percent)
            return run
        run = self._latest.get(self._engine)
        if run is None or lacks and not lacks(run):
            run = self._begin()
        return run

    def _close_timings(self):
        if self._timed_run:
            (run, moment), self._timed_run = self._timed_run, None
            self._end_run(run, moment)

    def _end_run(self, run, moment):
        """No figures of it will follow."""
        self._tasks.pop(run.task, None)
        run.over = moment
        written = run.stats.get("completionTokens")
        self._emit.fact("over", run, total=run.total, written=written, api=run.chat.api)
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
            works = chat.run and not chat.run.over and chat.run.engine not in UNTIMED   # figures will come
            if final or (moment.epoch - since.epoch > HELD_S if moment else
                         (chat.ended or chat.answered) and not works):
                self._tell_stats(chat, since)
            else:
                self._held.append((since, chat))


class EngineLines(Runs):
    """Facts of the engines' lines, on_<fact>."""

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
        counts = (int(fields[name]) for name in ("reused", "prefix", "other"))
        self._emit.cache(moment, run, self._model(run), *counts)

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
        run = self._tasks.get((fields["slot"], fields["task"]))
        if run is None or run.launched or fields["slot"] in self._launching:
            run = self._launch(fields)
        run.launched = True

    def on_prompt(self, fields, moment):
        run = self._run(fields)
        run.total = int(fields["total"])
        run.tokens.update(n_ctx=int(fields["n_ctx"]), n_keep=int(fields["n_keep"]))
        self._emit.fact("prompt", run, total=run.total)
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
        """The number can be of another engine's task that has not begun: its run has no timings."""
        for run in self._runs:
            if run.task and run.task[1] == fields["cancelled"] and "totalMs" not in run.stats:
                run.stops, run.positions = True, {}
                if run.over:
                    self._emit.fact("cancel", run)

    def on_release(self, fields, moment):
        run = self._tasks.get((fields["slot"], fields["task"]))
        if run is None:
            return
        written = run.stats.get("completionTokens")
        if run.total is None and written and fields["truncated"] == "0":  # all that terse G3 tells of it
            run.total = int(fields["context"]) - written + 1
        if run.stops and "totalMs" not in run.stats:
            self._emit.fact("cancel", run)
        self._end_run(run, moment)

    # --- timings, in every generation of llama.cpp

    def on_timings(self, fields, moment):
        self._timing = fields

    def on_prompt_eval(self, fields, moment):
        run, tokens = self._timed(fields), int(fields["tokens"])
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
        return self._run(fields if fields["task"] else self._timing, lambda r: "totalMs" not in r.stats)

    # --- MLX and Splash

    def on_mlx_cache(self, fields, moment):
        run, reused = self._begin(), int(fields["reused"])
        run.total = int(fields["total"]) if "total" in fields else reused + int(fields["fresh"])
        self._emit.fact("prompt", run, total=run.total)
        self._emit.cache(moment, run, self._model(run), reused, reused, 0)
        run.tokens["promptTokensToDecode"] = run.total - reused
        self._emit.token_info(moment, run, self._model(run))
        self._emit.processing(moment, run.chat, run, self._model(run))

    def on_splash(self, fields, moment):
        waiting = [chat for chat in (*self._ended, *self.running) if chat.api and chat.run is None
                   and (chat.ended is None or chat.abandoned)]
        run = self._begin(pick(waiting, lambda c: c.percent is not None))
        run.total = number(fields["total"])
        run.tokens["promptTokensToDecode"] = run.total - number(fields["reused"])
        self._emit.token_info(moment, run, self._model(run))
        self._emit.cache(moment, run, self._model(run), number(fields["reused"]), number(fields["reused"]), 0)
        first = number(fields["ttft"])
        run.stats.update(completionTokens=number(fields["output"]), tokensPerSecond=number(fields["rate"]),
                         timeToFirstTokenMs=first and round(first * (1 if fields["milli"] else 1000), 3))
        self._end_run(run, moment)



class AppLines(EngineLines):
    """Facts of the app's lines up to a chat's end, on_<fact>."""

    def __init__(self, news):
        super().__init__(news)
        self._logged: deque[LoggedRequest] = deque(maxlen=LOGGED_KEPT)  # requests whose chat has not begun
        self._unseen_end = -math.inf  # epoch at which a chat ended whose beginning we did not see

    def app(self, entry):
        """A recognised entry of the app."""
        self._close_timings()
        if entry.row.fact in ("received", "start"):
            self._release()
        self._facts[entry.row.fact](entry)

    def later(self, moment):
        """The log's time has gone on, or (None) nothing will follow: news that waited for a line is told."""
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
        runs = [run for run in self._runs if run.task and not run.over and run.takes(percent, self._now)]
        if not runs and 0 < percent < 100:
            self._unmatched.append((model, percent, self._now))
        runs = [run for run in runs if run.model in (None, model)]
        return runs[0] if len(runs) == 1 else None

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
                pick(found, lambda c: (c.percent or 0) <= percent,
                     lambda c: (c.percent is None) == (percent == 0), lambda c: c.run)
                or pick([chat for chat in self._left(entry) if chat.percent != 100])
                or self._adopt(entry, percent))
        if run:
            self._pair(run, chat)
            run.model = entry.model or run.model
            run.drop(percent)
        if chat.run:
            chat.run.waiting = None
        if chat.run is None or chat.run.engine in UNTIMED:  # else a line of the engine tells its start
            self._emit.processing(entry.moment, chat, model=entry.model)
        self._emit.progress(entry.moment, chat, run, entry.model, percent, entry.line)
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
        found = [chat for chat in self._of(entry) if not chat.first_token]
        if found:
            chat = found[0]
            chat.first_token = True
            self._emit.generation(entry.moment, chat, model=entry.model)


class ChatTracker(AppLines):
    """The log's news of chats, told once each.  Facts come in as on_<fact>, events go to a list."""

    def error(self, entry):
        """An ERROR entry of LM Studio's own, complete."""
        self._emit.emit("lmstudio_error", entry.moment, model=entry.model, message=entry.text.strip())
        match = ERRORS.match(entry.text[entry.text.find(entry.line):].rstrip())
        if match and SERVER_ERROR not in entry.tags and ERROR_ROWS[match.lastgroup][0].fact:
            self._facts[ERROR_ROWS[match.lastgroup][0].fact](entry)

    def _end(self, chat, entry, outcome, model, message=None, answer=None):
        if chat:
            chat.answered = outcome == "finished"
            run = chat.run
            if run and "n_ctx" in run.tokens:
                self._emit.token_info(entry.moment, run, self._model(run))
            self._close(chat, entry.moment, outcome)
            self._settle(chat, entry.moment)
        counted = countable(chat, chat.run and chat.run.total) if outcome == "finished" and chat else None
        self._emit.emit("lmstudio_chat_end", entry.moment, chat, model=model, outcome=outcome,
                        message=message or entry.line, about={**(answer or {}), **(counted or {})})

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
        chat = pick(found, lambda c: c.run and c.run.over)
        whole = [run for run in self._runs if run.over and "totalMs" in run.stats
                 and run.model in (None, entry.model) and (run.model or run.chat.api)]
        if left and not whole and (chat is None or not (chat.run and chat.run.over)
                                   and entry.moment.epoch - left[0].ended.epoch <= LEFT_S):
            left[0].answered = True  # it finished because its client had left
            return
        if chat is None:
            if self._has_ended(entry, "error"):
                return
            self._unseen_end = entry.moment.epoch
        self._end(chat, entry, "finished", entry.model or shared_model(found))

    def on_prediction(self, entry):
        self._answer(entry, "Generated prediction")

    def on_response(self, entry):
        self._answer(entry, entry.line)

    def on_output(self, entry):
        """Figures of an answer, all that MLX tells of a stream.  They end nothing, and name no request."""
        found = [chat for chat in self._of(entry, *self._ended) if chat.stream is not False and not (
            chat.abandoned or chat.has_said("lmstudio_prediction_stats"))]
        if len(found) == 1:
            found[0].counts, found[0].speeds = prediction_figures(prediction_of(entry.text))
            self._settle(found[0], entry.moment)

    def _answer(self, entry, message):
        """A whole answer.  A client that has left gets one, too."""
        body = prediction_of(entry.text)
        counts, speeds = prediction_figures(body)
        running = [chat for chat in self._of(entry) if not (chat.answered or chat.stream)]
        left = [chat for chat in self._left(entry) if not chat.stream]
        total = counts.get("promptTokens")
        chat = pick([*left, *running], lambda c: c.run and total and c.run.total == total,
                    lambda c: (c in left) == ("usage" in body and total is None),
                    lambda c: c.run and c.run.over)
        model = entry.model or body.get("model") or shared_model([*left, *running])
        chat = chat or self._new_chat(entry.moment, model)
        chat.counts, chat.speeds = counts, speeds
        runs = [run for run in self._runs if run.over and "lmstudio_prediction_stats" not in run.said
                and chat.may_be_answer_of(run)]
        other = runs[0].chat if runs else chat
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
            if (chat.outcome == "finished" and chat.api and not (chat.left or began)
                    and now - chat.ended.epoch <= SWALLOW_S):
                chat.left = True  # the connection of an answer that is whole
                return
        chat = pick(found, lambda c: not (c.run and c.run.over))
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
            chat = pick(found[::-1], lambda c: not c.run)
            self._end(chat, entry, "error", entry.model or shared_model(found))

    def on_empty_error(self, entry):
        found = [chat for chat in self._of(entry) if chat.model is None]
        if found:
            self._end(found[0], entry, "error", None)

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
    """Tokens per second of a timing line; worked out if the line does not give it."""
    if fields["rate"]:
        return number(fields["rate"])
    ms = number(fields["ms"])
    return round(1000 * int(fields["tokens"]) / ms, 2) if ms else None


LENIENT = json.JSONDecoder()


def prediction_of(text):
    """The JSON of a Generated prediction, {} if it is hidden or cut."""
    try:
        body, _ = LENIENT.raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def prediction_figures(body):
    """(counts, speeds) of a prediction."""
    known = answer_figures(body)
    if not (known.get("prompt", 1) or known.get("completion")):  # of a cancelled one: no figures
        known = {"reasoning": known.get("reasoning")}
    first_s = known.get("first_s")
    counts = without_none(promptTokens=known.get("prompt"), completionTokens=known.get("completion"),
                     timeToFirstTokenMs=None if first_s is None else round(first_s * 1000, 3),
                     reasoningTokens=known.get("reasoning"), draftTokens=known.get("drafted"),
                     acceptedDraftTokens=known.get("accepted"))
    return counts, without_none(tokensPerSecond=known.get("speed"))


# --- 3.4 dialects: the places of model, tokens and usage in each API of LM Studio ---

WHOLE_LIMIT = 32 * 1024 * 1024  # bytes of a JSON text; a longer one is passed on unread
LONGEST_NAME, LONGEST_ERROR = 256, 500  # of a model or an id, of a message, as they are kept
UNSAFE = 2**53  # from here on JavaScript and others round


class Dialect(NamedTuple):
    """One inference API."""

    name: str
    token: re.Pattern  # found in a streamed event that holds content, reasoning or a tool call
    asks_usage: bool = False  # a stream carries usage only with stream_options.include_usage
    joined: bool = False    # the log shows its requests as chats
    counts_messages: bool = False   # and says how many messages each has


# Keys of an event can be told by their bytes: inside a JSON string each quote stands behind a backslash.
OPENAI_TOKEN = re.compile(rb'"(?:content|reasoning|reasoning_content|text)"\s*:\s*"(?!")'
                          rb'|"(?:tool_calls"\s*:\s*\[|function_call"\s*:)\s*\{')
CHAT = Dialect("chat", OPENAI_TOKEN, asks_usage=True, joined=True, counts_messages=True)
COMPLETIONS = Dialect("completions", OPENAI_TOKEN, asks_usage=True)
EMBEDDINGS = Dialect("embeddings", OPENAI_TOKEN)
RESPONSES = Dialect("responses", re.compile(rb'"delta"\s*:\s*"(?!")'), joined=True)
MESSAGES = Dialect("messages", joined=True, token=re.compile(
    rb'"(?:text|thinking|partial_json)"\s*:\s*"(?!")|"type"\s*:\s*"tool_use"'))
NATIVE = Dialect("native", joined=True, token=re.compile(
    rb'"type"\s*:\s*"(?:(?:message|reasoning)\.delta|tool_call\.(?:start|arguments))"'))
OTHER = Dialect("other", OPENAI_TOKEN)
SOCKET = Dialect("socket", OPENAI_TOKEN, joined=True)  # of LM Studio's own SDKs: 3.12

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
JOINED = frozenset(dialect.name for dialect in (*DIALECTS.values(), SOCKET) if dialect.joined)


def json_object(data, numbers=re.compile(rb"\[[-+.\deE,\s]{64,}\]")):
    """The JSON object in UTF-8 bytes; None for anything else and for one too large.  Never raises.

    Long lists of numbers (an embedding, a prompt in token numbers) are not read if there are many."""
    data = data[3:] if data[:3] == codecs.BOM_UTF8 else data
    if len(data) > WHOLE_LIMIT or too_many(data, b"[", b"{"):
        return None
    if too_many(data, b",", b"[", b"{"):    # each value but the first stands behind one of these
        data = numbers.sub(b"[]", data)
        if too_many(data, b",", b"[", b"{"):
            return None
    try:
        value = STRICT.decode(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def too_many(data, *marks, most=250_000, step=1024 * 1024):
    """True when these bytes stand in data so often that to read it would hold up everybody for a tenth of a
    second.  Other threads get their turn after each step."""
    found = 0
    for at in range(0, len(data) if len(data) > most else 0, step):
        found += sum(data.count(mark, at, at + step) for mark in marks)
        if found > most:
            return True
    return False


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(parse_constant=refuse_constant)  # no NaN, no Infinity: LM Studio knows none


def listed(value):
    """The dicts of a list, [] for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def member(value, *names):
    """The first member of those names that is an object; {} for none."""
    for name in names:
        if isinstance(value.get(name), dict):
            return value[name]
    return {}


def count(values, *names, default=None):
    """The first whole number among the values of those names."""
    for name in names:
        value = values.get(name)
        if type(value) is int and 0 <= value < UNSAFE:
            return value
    return default


def usable(value):
    """A figure of an answer; None if it is no number, or too large for other readers of JSON."""
    return value if type(value) in (int, float) and 0 <= value < UNSAFE else None


def bounded_text(text, length=LONGEST_NAME):
    """A text that a request or an answer brought, as it is kept: short, and such as UTF-8 can hold."""
    text = text[:length]
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def error_message(error):
    """The text of the error in an answer."""
    message = error.get("message") if isinstance(error, dict) else error
    return bounded_text(str(message or error), LONGEST_ERROR)


# --- 3.5 meter: the tokens of an answer, read while it passes ------------------

FIGURES = {  # figure -> the names of its count, in order: OpenAI's, Anthropic's, LM Studio's own, its SDKs'
    "prompt": ("prompt_tokens", "input_tokens", "inputTokens", "promptTokensCount"),
    "completion": ("completion_tokens", "total_output_tokens", "output_tokens", "outputTokens",
                   "predictedTokensCount"),
    "total": ("total_tokens", "totalTokens", "totalTokensCount"),
    "cached": ("cached_tokens", "cache_read_input_tokens"),
    "reasoning": ("reasoning_tokens", "reasoning_output_tokens"),
    "drafted": ("total_draft_tokens_count", "totalDraftTokensCount"),
    "accepted": ("accepted_draft_tokens_count", "acceptedDraftTokensCount"),
}
RATES = {  # the same for what is no count
    "speed": ("tokens_per_second", "tokensPerSecond"),
    "first_s": ("time_to_first_token", "time_to_first_token_seconds", "timeToFirstTokenSec"),
}


def answer_figures(body):
    """{name: number} of the usage and stats in an answer, an event or a logged answer.

    /v1 has usage, /api/v0 also stats with speeds, /api/v1/chat and the SDKs only stats (lmstudio-js,
    LLMPredictionStats.ts); speed is in tokens a second,
    first_s the time to the first token in seconds."""
    usage, stats = member(body, "usage"), member(body, "stats")
    if not usage and not stats:
        return {}
    known = {**stats, **usage, **member(usage, "prompt_tokens_details", "input_tokens_details"),
             **member(usage, "completion_tokens_details", "output_tokens_details")}
    found = {name: count(known, *names) for name, names in FIGURES.items()}
    if found["prompt"] is not None and "input_tokens" in usage and "total_tokens" not in usage:
        # Anthropic counts tokens apart that come from a cache or go into it
        found["prompt"] += sum(count(usage, f"cache_{kind}_input_tokens", default=0)
                               for kind in ("read", "creation"))
    rates = {figure: usable(stats[name]) for figure, names in RATES.items() for name in names
             if name in stats}
    return without_none(**found, **rates)


class Usage:
    """The figures, names and errors of an answer; None if LM Studio did not give one."""

    def __init__(self):
        self.prompt = self.completion = self.total = None
        self.cached = self.reasoning = self.drafted = self.accepted = None
        self.finish = self.model = self.error = self.answer_id = None
        self.speed = None  # tokens a second and ms to the first token, as LM Studio reports them
        self.first_ms = None

    def take(self, body):
        """Learn from a body or a streamed event, and from the answer inside one."""
        inner = (member(body, name) for name in ("response", "result", "message") if name in body)
        for part in (*inner, body):
            if part.get("error"):
                self.error = error_message(part["error"])
            model, answer_id = part.get("model") or part.get("model_instance_id"), part.get("id")
            self.model = bounded_text(model) if model and isinstance(model, str) else self.model
            self.answer_id = bounded_text(answer_id) if isinstance(answer_id, str) else self.answer_id
            self._take_finish(part)
            self._take_figures(answer_figures(part))

    def _take_finish(self, part):
        """Why it ended.  /v1/responses says so only if something cut it short, /api/v0 also in its stats."""
        reasons = [*(choice.get("finish_reason") for choice in listed(part.get("choices"))),
                   part.get("stop_reason"), member(part, "delta").get("stop_reason"),
                   member(part, "incomplete_details").get("reason"),
                   None if self.finish else member(part, "stats").get("stop_reason")]
        reason = next((reason for reason in reasons if isinstance(reason, str)), None)
        self.finish = self.finish if reason is None else bounded_text(reason)

    def _take_figures(self, known):
        """/v1/messages counts up: the most that it has said is right."""
        for name in known.keys() & {"prompt", "completion"}:
            known[name] = max(getattr(self, name) or 0, known[name])
        if "speed" in known:
            known["speed"] = round(known["speed"], 2)
        if "first_s" in known:
            known["first_ms"] = round(1000 * known["first_s"], 1)
        self.__dict__.update({name: known[name] for name in self.__dict__.keys() & known})

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


STREAM_LIMIT = 4 * 1024 * 1024  # bytes of one event of a stream; a longer one is passed on unread
EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")


class Meter:
    """Reads an answer while it passes.  feed() gives the bytes for the client, at once.

    With cut, the chunk that carries only the usage we asked for is taken out again; the beginning of an
    event is then held back as long as it may be that of such a chunk.  A compressed answer is read from a
    decoded copy and passed on as it came."""

    ERROR_EVENT = re.compile(rb"^event: ?error\s*$", re.MULTILINE)
    # An event with one of these tells more than a token.
    TELLING = re.compile(rb'"(?:usage|stats|error|response|(?:finish|stop)_reason"\s*:\s*")')

    def __init__(self, dialect, stream, cut=False, encoding=""):
        self.usage = Usage()
        self.stream, self.dialect = stream, dialect
        self._rest = bytearray()  # of a stream the event that has not ended, else the whole body
        self._decode = decoder(encoding)    # None once the answer cannot be read
        self._given = 0  # bytes of _rest that the client has, although _rest may be cut out
        self._cut = cut and self._decode is identity
        self.first = self.last = self._now = None  # clocks: first, latest token, piece
        self.pieces = 0  # events with a token
        # The bytes before and behind the text of the last event, if it told no more: most have the same, and
        # a thread that was just woken takes several times as long for a search as for a comparison.
        self._around: Any = None

    def feed(self, piece, now):
        """The bytes to pass on for the bytes that came at the clock reading now."""
        if self._around and not self._rest:
            before, after = self._around
            text = piece[len(before):len(piece) - len(after)]
            if text and b'"' not in text and piece.startswith(before) and piece.endswith(after):
                self.pieces += 1
                self.last = now
                return piece
        data = self._decode(piece) if self._decode else None
        if data is None:
            return self._give_up() + piece
        if self.stream:
            self._now, cut = now, self._cut
            kept = self._events(data)
            return kept if cut else piece
        self._rest += data
        if len(self._rest) > WHOLE_LIMIT:
            self._give_up()
        return piece

    def _give_up(self):
        """Read no more.  Gives the bytes that were held back."""
        held = bytes(self._rest[self._given:]) if self._cut else b""
        self._rest, self._decode, self._cut, self._around = bytearray(), None, False, None
        return held

    def end(self):
        """The answer is over.  Gives the bytes that were held back."""
        rest, ours = bytes(self._rest), False
        if rest and self.stream:
            ours = self._event(rest)
        elif rest:
            self.usage.take(json_object(rest) or {})
        held = self._give_up()
        return b"" if ours else held

    def _events(self, data):
        """Read the events that data completes; give their bytes without those that were ours alone."""
        if not self._rest and whole_event(data):
            return b"" if self._event(data) and self._cut else data
        start, position, kept = max(0, len(self._rest) - 4), 0, []  # the rest was searched before
        self._rest += data
        for end in EVENT_END.finditer(self._rest, start):
            event = bytes(self._rest[position:end.end()])
            position = end.end()
            ours = self._event(event) and self._cut
            if not ours or self._given:
                kept.append(event[self._given:])
            self._given = 0
        self._rest = self._rest[position:]
        if self._cut and self._rest and (self._given or not maybe_ours(self._rest)):
            kept.append(bytes(self._rest[self._given:]))
            self._given = len(self._rest)
        if len(self._rest) > STREAM_LIMIT:
            kept.append(self._give_up())
        return b"".join(kept)

    def _event(self, event):
        """Learn from one event.  True for a chunk that carries only usage: maybe only we asked for it."""
        self._around, token = None, self.dialect.token.search(event)
        if token:
            self.pieces += 1
            self.first, self.last = self.first or self._now, self._now
            if self.usage.model and not self.TELLING.search(event):     # nothing but the token is new
                if self._decode is identity and event.endswith(b"\n"):
                    self._around = event[:token.end()], event[event.find(b'"', token.end()):]
                return False
        data = event_data(event)
        body = json_object(data) or {}
        self.usage.take(body)
        if self.ERROR_EVENT.search(event) and not self.usage.error:
            self.usage.error = error_message(body.get("message") or str(data, "utf-8", "replace"))
        return isinstance(body.get("usage"), dict) and body.get("choices") == []


def whole_event(data):
    """True for bytes that are one event from its beginning to its end, as most pieces of a stream are."""
    return data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data


def maybe_ours(beginning, limit=64 * 1024, some_choice=re.compile(rb'"choices"\s*:\s*\[\s*[^\]\s]')):
    """True while an event that begins so may become a chunk that has only usage: short, without a choice."""
    data = bytes(beginning[:limit])
    return (len(beginning) < limit and (b"data:".startswith(data) or data.startswith(b"data:"))
            and data[5:].lstrip()[:1] in (b"", b"{") and not some_choice.search(data))


def event_data(event):
    """The data of one SSE event: its data lines, joined (WHATWG HTML, 9.2.6)."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def identity(data):
    return data


def decoder(encoding):
    """A function that decodes pieces of a body of that Content-Encoding and gives None for one that is
    broken or grows beyond measure; None for an encoding that the standard library cannot read."""
    name = encoding.strip().lower()
    return {"": identity, "identity": identity}.get(name) or (
        Inflater(name) if name in ("gzip", "x-gzip", "deflate") else None)


class Inflater:
    """Decodes gzip, which may have several members (RFC 1952, 2.2), and deflate, which some send without
    its zlib header (RFC 9110, 8.4.1.2)."""

    def __init__(self, name):
        self._gzip, self._inflate = name.endswith("gzip"), None

    def __call__(self, data):
        """The decoded bytes of data; None when it cannot be decoded."""
        decoded = b""
        while data:
            if self._inflate is None or self._inflate.eof:
                zlib_header = data[0] & 15 == 8     # RFC 1950, 2.2: its first half byte names deflate
                self._inflate = zlib.decompressobj(31 if self._gzip else 15 if zlib_header else -15)
            try:
                decoded += self._inflate.decompress(data, WHOLE_LIMIT)
            except zlib.error:
                return None
            if self._inflate.unconsumed_tail or len(decoded) > WHOLE_LIMIT:
                return None     # nothing honest grows so much
            data = self._inflate.unused_data
        return decoded


# --- 3.6 request bodies: the question that LM Studio is asked ------------------


class ParsedBody(NamedTuple):
    """A request body as it is sent on, and its meaning."""

    data: Any  # bytes-like: the client's own, or with the question for usage
    model: str | None = None
    stream: bool | None = None  # None when the body cannot be read: the answer will show it
    messages: int | None = None
    fingerprint: Fingerprint | None = None
    size: int | None = None  # characters of its prompt; None if it has more than text
    tools: bool = False
    asks_usage: bool = False  # on the client's behalf: the answer to it is taken out again
    user: str | None = None  # that it names


def parse_body(dialect, data):
    """The ParsedBody of an inference.  A body that is not a JSON object is passed on untouched."""
    body = json_object(data) if data else None
    if body is None:
        return ParsedBody(data)
    stream, options, messages = body.get("stream") is True, body.get("stream_options"), body.get("messages")
    model, user = (bounded_text(body[name]) if isinstance(body.get(name), str) else None
                   for name in ("model", "user"))
    asks = (stream and dialect.asks_usage
            and (options is None or isinstance(options, dict) and options.get("include_usage") is not True))
    found = ParsedBody(ask_usage(data, options) if asks else data, model, stream, asks_usage=asks, user=user,
                       tools=bool(body.get("tools")))
    if not dialect.joined:
        return found
    return found._replace(
        messages=len(messages) if dialect.counts_messages and isinstance(messages, list) else None,
        fingerprint=fingerprint(body) if len(data) <= 1024 * 1024 else None,   # the log cuts a longer one
        size=text_size([body.get(name) for name in (
            "messages", "input", "prompt", "system", "system_prompt", "instructions", "tools")]))


FILES = ("image_url", "source", "input_audio", "file", "data_url")    # members that hold no text


def text_size(value):
    """Characters of all texts in JSON, roles and types aside; None if there are pictures or files."""
    size, rest = 0, [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            size += 0 if value.startswith("data:") else len(value)
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            if not value.keys().isdisjoint(FILES):
                return None
            rest += [item for name, item in value.items() if name not in ("role", "type")]
    return size


def ask_usage(data, options):
    """The request with stream_options.include_usage behind its other members: of one name the last counts,
    in Python as in JavaScript (ECMA-262, 25.5.1).  A bytearray is amended in place."""
    amended = data if isinstance(data, bytearray) else bytearray(data)
    end = amended.rindex(b"}")
    amended[end:end] = b',"stream_options":' + json.dumps({**(options or {}), "include_usage": True}).encode()
    return amended


LOG_CUT = "... <Truncated in logs> ..."  # stands for the middle of a string of over about 120 UTF-16 units


class Fingerprint(NamedTuple):
    """Hashes of a request body: of the prompt, and of all its other members."""

    prompt: int
    rest: int


def fingerprint(body):
    """The Fingerprint of a request body; its copy in LM Studio's log has the same.  None for a body that asks
    nothing."""
    asked = {name: body[name] for name in ("messages", "input", "prompt", "system") if body.get(name)}
    rest = {name: value for name, value in body.items() if name not in asked and name != "stream_options"}
    try:
        return Fingerprint(json_hash(asked), json_hash(rest)) if asked else None
    except RecursionError:
        return None


def json_hash(value):
    """A hash of JSON in which each long string counts as the log shows it, so that a request and its logged
    copy have the same."""
    kind = type(value)
    if kind is str:
        return hash(log_text(value) if len(value) >= len(LOG_CUT) else value)
    if kind is dict:
        return hash(frozenset([(name, json_hash(item)) for name, item in value.items()]))
    if kind is list:
        return hash(tuple([json_hash(item) for item in value]))
    return hash(f"\0{int(value) if kind is float and value.is_integer() else value}")  # like no string


def log_text(text, keeps=100):
    """A string of a request body as the log shows it, without the mark for its missing middle: 50 UTF-16
    units (100 bytes) before and after it."""
    head, cut, tail = text.partition(LOG_CUT)
    if cut:
        return head + tail
    units = text.encode("utf-16-le", "surrogatepass")
    if len(units) <= 2 * keeps:
        return text
    return units[:keeps].decode("utf-16-le", "replace") + units[-keeps:].decode("utf-16-le", "replace")



# --- 3.7 records: the life of a request --------------------------------------

TIMELINE = 400  # events of one request that are kept
WAITING_SLOW_MS = 10_000  # a longer wait is marked; another phase if it takes twice its model's usual
OWN_EVENTS = frozenset(("inference_start", "inference_complete", "error"))
PLACE_S = 1.0  # between two that tell its place in the queue
TELL_S = 0.25  # between two inference_progress of one request
SPEED_S = 0.25  # before that nothing can be said of how fast an answer is written
FLUSH_S = 0.45  # a line is read at most so long after it was due
COUNT_S = 1.0  # between two that say how many tokens its answer has: each costs as much as ten pieces of it
STATES = ("waiting", "loading", "queued", "prompt", "generating")  # in the order in which they come
OUTCOMES = {"finished": "done", "disconnected": "abandoned", "error": "failed", "stopped": "failed",
            "forgotten": "failed"}  # of a chat -> state of its record
LEFT = ("client_disconnected", "stopped")  # operations that end a request in no failure


def was_left(state, operation):
    """True when the client left or somebody stopped the request: that is no failure."""
    return state == "abandoned" or operation in LEFT


def who(source, user, key, agent, client):
    """The sender in a word for people: a person, else a key, else a program, else an address."""
    if source == "lmstudio":
        return "not via gateway"
    program = re.match(r"[A-Za-z][\w.-]*(?:/[A-Za-z][\w.-]*)?", agent or "")
    return user or key or (program[0][:40] if program else client)


class Outcome(NamedTuple):
    """How a request ended.  state: done, failed or abandoned; meter: the one of its answer."""

    state: str
    status: int | None = None
    error: str | None = None
    operation: str | None = None
    meter: Any = None
    by: str | None = None  # the name of the key that stopped it


class RequestState:
    """One request, from its arrival to its end: an HTTP request of a client, or (source "lmstudio") a chat
    that the log shows and that did not come through us.

    Hub's lock guards it once it has begun.  Clock readings are monotonic seconds."""

    def __init__(self, request_id, epoch, clock, **about):
        self.id, self.started, self.clock = request_id, epoch, clock
        self.source = "gateway"
        self.method = self.path = self.target = self.dialect = self.client = self.key = self.agent = None
        self.user = None  # the person behind the key, once known
        self.model_asked = self.messages = self.fingerprint = None
        self.stream = False
        self.model = None  # the one that answered, once an answer or the log has named it
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
        self.place: Any = None  # while it waits here: position, waiting, etaMs if known
        self.waited_ms = None  # for its turn
        self.priority, self.by = "normal", None  # its key's; the name of the key that stopped it
        self._told_place: Any = None
        self.run: Any = None  # the OpenRun that it caused
        self.binding, self.bound_by = "none", None  # or "exact", and the numbers of the rules (3.8)
        self.begun = self.told_end = False  # its first and last line of the app have been found
        self.silent = False  # another prompt of its model has begun: if its client has left, it is over
        self.usual = {}  # phase -> its length lately on this model (ms)
        self.counted = {}  # tokens that the figures have, by kind
        self.tallied = None  # its share of the series, as Series.take() gave it
        self._base = None  # (clock, percent) from which the prompt's speed is measured
        self._told = -math.inf  # clock of the last inference_progress
        self.__dict__.update(about)

    # --- its life

    first = property(lambda self: self.output_since)  # clock of its first token

    def enter(self, state, clock):
        """A phase begins, or is known later to have begun.  True if its state is another now.  A line that is
        read after the next phase has begun tells of a moment at most FLUSH_S before."""
        place = STATES.index(state)
        ends = [self.entered[name] for name in STATES[place + 1:] if name in self.entered]
        end = min(ends if self.ended is None else [*ends, self.ended], default=math.inf)
        if clock >= end:
            if state in self.entered or clock - end > FLUSH_S:
                return False
            begins = [self.entered[name] for name in STATES[:place] if name in self.entered]
            clock = min(max(clock - FLUSH_S, *begins, self.clock), end)
        self.entered[state] = min(clock, self.entered.get(state, clock))
        if self.ended is None and self.state not in STATES[place:]:
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
        before, lesson = self.state, RECORD_HANDLERS.get(event.name)
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

    def wait(self, place, clock):
        """It waits here for its turn.  True when listeners should hear of its place."""
        if self.ended is not None or self.waited_ms is not None:
            return False
        self.place, self.state, self.sent, self.entered = place, "queued", math.inf, {"queued": self.clock}
        if place == self._told_place or clock - self._told < PLACE_S:
            return False
        self._told_place = place
        return True

    def send(self, clock):
        """It goes to LM Studio now."""
        if self.place:
            self.state, self.entered["waiting"] = "waiting", clock
        self._stop_waiting(clock)
        self.sent = clock

    def _stop_waiting(self, clock):
        if self.place:
            self.place, self.waited_ms = None, round(1000 * (clock - self.clock), 1)

    def cached_usage(self):
        """The cached part of tokenUsage, {} if the log has not told it."""
        return {"cachedTokens": self.cache["reused"]} if self.cache else {}

    def end(self, clock, outcome):
        """It is over."""
        self._stop_waiting(clock)
        self.total_ms, self.by = round(1000 * (clock - self.clock), 1), outcome.by
        self.status, self.error, self.operation = outcome.status, outcome.error, outcome.operation
        if outcome.meter:
            self._take_answer(outcome.meter, outcome.state == "done")
        self.ended, self.state = clock, outcome.state
        if self.usage is not None and self.usage.get("cachedTokens") is None:
            self.usage = {**self.usage, **self.cached_usage()}

    def _take_answer(self, meter, whole):
        """The answer counts before the log, a measurement before an estimate.  An
        answer that broke off may have counted up to its beginning (/v1/messages)."""
        usage = meter.usage
        self.model, self.finish = usage.model or self.model, usage.finish
        self.answer_id = usage.answer_id
        if usage.drafted is not None:
            self.drafted, self.accepted = usage.drafted, usage.accepted
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


class LoggedState(RequestState):
    """What a request learns from the events of its chat (RECORD_HANDLERS)."""

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
        if self._base:  # the reading began behind what was cached
            self._base = self._base[0], max(self._base[1], data["percentage"])
        if self.usage:
            self.usage = {**self.usage, "cachedTokens": data["reused"]}

    def on_tokens(self, data, clock):
        self.prompt_tokens = data.get("totalPromptTokens", self.prompt_tokens)
        self.context_size = data.get("n_ctx", self.context_size)

    def on_stats(self, data, clock):
        """The engine's own figures; if no answer brought usage, they are the request's."""
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


class Record(LoggedState):
    """What is shown of a request."""

    def progress(self, clock):
        """The known progress of a running request, {} of none; speeds per second, etaMs in ms."""
        run = self.run  # if it is known, its first token tells that its prompt has been read
        is_read = run and self.state == "generating" and (self.first or run.read)
        percent: Any = 100 if is_read else self.percent
        known = without_none(percent=percent, promptTokens=self.prompt_tokens)
        if len(known) == 2:
            known["promptTokensRead"] = round(self.prompt_tokens * percent / 100)
        percent, (since, base) = percent or 0, self._base or (clock, 0)
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
        """Its progress in words: `prompt 41% eta 87s`."""
        known = self.place or self.progress(clock)
        place = f" {known['position']} of {known['waiting']}" if self.place else ""
        percent = f" {known['percent']:.0f}%" if "percent" in known else ""
        left = f" eta {known['etaMs'] / 1000:.0f}s" if "etaMs" in known else ""
        return f"{self.state}{place}{percent}{left}"

    def progress_event(self, now, clock):
        """inference_progress: the record as it is now."""
        self._told = clock
        return Event("inference_progress", {
            "timestamp": now, "requestId": self.id, **self.shown(clock), **self.progress(clock),
            **self.cached_usage(),
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
        """[{name, ms, slow}] in the order in which they began.  One without known parts is answering."""
        starts: list[tuple] = []
        latest = math.inf
        for name in reversed([name for name in STATES if name in self.entered]):
            latest = min(latest, self.entered[name])    # a line of an earlier one can be read later
            starts.insert(0, (name, latest))
        ends = [start for _, start in starts[1:]] + [clock if self.ended is None else self.ended]
        spans = [(name, round(1000 * max(0.0, end - start), 1)) for (name, start), end in zip(starts, ends)]
        if self.ended is not None and "generating" not in self.entered and self.state == "done":
            spans[-1] = ("answering", spans[-1][1])
        return [{"name": name, "ms": ms, "slow": ms > (
            WAITING_SLOW_MS if name in ("waiting", "queued") else 2 * self.usual.get(name, math.inf))}
                for name, ms in spans]

    def used(self, field, otherwise=None):
        """A count of tokenUsage; if LM Studio gave none, the other one."""
        found = (self.usage or {}).get(field)
        return otherwise if found is None else found

    def prompt_ms(self):
        """How long the prompt was read: from the engine's speed if it is known, else as it was seen."""
        fresh = (self.used("promptTokens") or 0) - (self.used("cachedTokens") or 0)
        return round(1000 * fresh / self.read_speed, 1) if self.read_speed else self._phase_ms("prompt")

    def generation_ms(self):
        """How long the answer was generated, in the same way."""
        tokens = self.used("completionTokens")
        return round(1000 * tokens / self.speed, 1) if self.speed and tokens else self._phase_ms("generating")

    def queued_ms(self):
        """How long it waited here for its turn; if it did not, in LM Studio's queue as the log shows."""
        return self._phase_ms("queued") if self.waited_ms is None else self.waited_ms

    def _phase_ms(self, name):
        if name not in self.entered:
            return None
        return next((phase["ms"] for phase in self.phases(self.clock) if phase["name"] == name), None)

    def shown(self, clock):
        """The record as /debug/requests shows it."""
        elapsed = round(1000 * (clock - self.clock), 1) if self.total_ms is None else self.total_ms
        return {"requestId": self.id, "source": self.source, "method": self.method, "path": self.path,
                "model": self.model or self.model_asked, "modelAsked": self.model_asked,
                "stream": self.stream, "client": self.client, "key": self.key, "user": self.user,
                "userAgent": self.agent,
                "who": who(self.source, self.user, self.key, self.agent, self.client),
                "state": self.state, "startedAt": utc_text(self.started), "elapsedMs": elapsed,
                "status": self.status, "totalTimeMs": self.total_ms, "timeToFirstTokenMs": self.first_ms,
                "tokensPerSecond": self.speed, "promptTokensPerSecond": self.read_speed,
                **self.token_usage(), "finishReason": self.finish, "error": self.error,
                "operation": self.operation, "binding": self.binding, "boundBy": self.bound_by,
                "progress": self.progress(clock) if self.ended is None else {}, "cache": self.cache,
                "context": self.context(), "phases": self.phases(clock),
                **(self.place or {}),
                **without_none(queuedMs=self.waited_ms, by=self.by, draftTokens=self.drafted,
                               acceptedDraftTokens=self.accepted)}

    def token_usage(self):
        """tokenUsage with its three counts, None if one is unknown; beside it those that only some answers
        and logs have."""
        if self.usage is None:
            return {"tokenUsage": None}
        beside = without_none(**{name: self.usage.get(name) for name in ("cachedTokens", "reasoningTokens")})
        counts = {name: self.usage.get(name) for name in ("promptTokens", "completionTokens", "totalTokens")}
        return {"tokenUsage": {**counts, **without_none(estimated=self.usage.get("estimated"))}, **beside}

    def start_event(self, now):
        return Event("inference_start", {
            "timestamp": now, "requestId": self.id, "method": self.method, "path": self.path,
            "model": self.model_asked, "stream": self.stream, "client": self.client, "key": self.key,
            **without_none(user=self.user)})

    def end_event(self, now):
        """The one event that ends it."""
        common = {"timestamp": now, "requestId": self.id, "status": self.status, "totalTimeMs": self.total_ms,
                  **self.token_usage(), "model": self.model or self.model_asked,
                  **without_none(user=self.user, queuedMs=self.waited_ms)}
        if self.error is not None:
            by = {"by": self.by} if self.operation == "stopped" else {}
            return Event("error", {**common, "error": self.error, "operation": self.operation, **by})
        return Event("inference_complete", {**common, "timeToFirstTokenMs": self.first_ms,
                                            "tokensPerSecond": self.speed, "finishReason": self.finish})


RECORD_HANDLERS: dict[str, Any] = {  # what a record learns from the events of its chat
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


# --- 3.8 join: runs and lines of the log to requests ---------------------------
# A run is bound to a request if it fits no other request and that request fits no other run.  These hard
# facts rule a request out for a run:
#
#   1. It was sent after the run's first line was read.
#   2. The run was seen at work well after its answer had ended.
#   3. LM Studio serves its model under another name than the run's.
#   4. Its prompt is too long or too short for the run's tokens, by what answers of its model have shown.
#   5. Its first token came before the run can have read its prompt, or not when the run had read it.
#   6. Its usage has other counts.
#   7. It goes on although the run is over, or the run is over well before or after it.
#   8. The run was cancelled and its client did not leave, nor did it fail.
#   9. Another has no other run that it fits, and its usage is known or its first token is old.
#
# As long as its usage is not known a run can be of a chat inside the app, of which the app writes no line
# (10).  So it waits until the app has told of it, or until the request's first token is so old that its own
# run must have been seen.
# A run that no request fits is LM Studio's own: a chat inside the app or of a client beside us.
#
# A line of the app that surely is a run's (3.3) goes with the run.  Other lines:
#
#  11. A chat's start: the one request with that fingerprint, else the one that has no start yet.
#  12. Progress: the one request of its model that can go on to this percent.
#  13. An end: the request that ended in that way then; of several the first, as they are written in order.
#  14. An answer: the request whose answer has that id, or alone has these counts.
#
# Assumed of LM Studio, as seen: a line is read at most FLUSH_S late, and not later than others that were read
# before it; the app writes 0 % when an engine begins with a prompt; MLX reads one prompt of a model at a
# time.  What is open is published without an id and held; once it is certain the request's record takes it in
# with its own clocks.  Nothing that was published is taken back.

LAG_S = 0.6  # a line is read at most so long after its moment, and an HTTP moment noted
AT_ONCE_S = 0.06  # two lines that tell of one moment are read so close to each other
EXACT_S = 0.12  # how far a time can be off if the engine wrote it, and ...
SURE_READS = 15  # ... one of so many reads of its lines was not late
DRIFT = 2e-4  # seconds a second between two clocks
HTTP_S = 1.0  # news of an answer is noted here at most so much later
LATE_S = 10.0  # a request that is over can still be bound, and learn from its run, for so long
LEFT_LINE_S = 1.0  # LM Studio writes that a client has left within this
LATE_END_S = 3.5  # and ends its stream within this
TWIN_SIZE = 0.08  # prompts whose lengths differ by less are alike
MOMENT_S = 0.3  # and so much time decides nothing between them before their usage does
TWINS_S = 0.02  # ends so close to each other can be written in either order
SETTLE_S = 0.05  # between two looks at all that is open, without news that can decide
PAIR_S = 1e-4  # until the next look for each pair of a run (or a line) and a request of the last ...
PAIRS_AT_ONCE, PAIRS_MOST = 200, 4000  # ... beyond so many; of more none would be certain
OPEN_LIMIT = 512  # requests that are over and can still be bound
NAMES_KEPT = 1000  # models by the names that clients gave them
RUNS_OPEN = 200  # runs that are not bound, and their events
USUAL_KEPT = 50  # of each phase on a model, from which its usual time is known
SAME_SIZE = 1.2  # prompts of one kind have as many tokens for a character up to this factor
ALIKE = 3  # prompts whose lengths differ by less are compared closely, others by this factor
SIZES_KEPT = 20  # answers of a model from which its tokens for a character are learned
FORGOTTEN_S = 3600.0  # LM Studio's own is taken for over when the log has said nothing of it for so long
LINES_KEPT = 200  # last lines of chats that wait for their request's end
NO_START = "/v1/responses"  # the path of chats that write no start


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
    """An engine's process, known by its clock (G3).  offset turns that into ours; a line read late makes it
    too large for a while, and clocks may drift apart."""

    def __init__(self, offset, clock):
        self.offset, self.reads, self._latest = offset, 0, clock

    def takes(self, apart, clock):
        """True if a line is its own, by how far its clock is apart from ours."""
        if not -0.1 < apart - self.offset < 1.0:
            return False
        self.offset = min(apart, self.offset + DRIFT * (clock - self._latest))
        self.reads, self._latest = self.reads + (clock > self._latest), clock
        return True


class OpenRun:
    """A run, as the join knows it.  Its times are the process's if that is known, else those at which lines
    were read."""

    def __init__(self, number, chat):
        self.number, self.chat = number, chat
        self.process: Any = None
        self.launched: Any = None  # its first line
        self.active = self.unread = -math.inf  # it surely still worked then; had not written a token
        self.began = self.read = None  # its prompt began to be read, was read
        self.sampled = None  # its last batch is about to be read
        self.over: Any = None
        self.cancelled: Any = None
        self.ran = -math.inf  # it surely was neither of both before
        self.heard = -math.inf  # clock of its latest line
        self.engine = self.model = self.total = self.written = self.epoch = None
        self.in_app = self.is_announced = self.is_mixed = False
        self.record: Any = None
        self.held = []  # [(event, clock)] until it is bound

    # Lines of the app are about it; G1, which has no tasks, works on one chat after the other.
    is_of_api = property(lambda self: self.model is not None or self.is_announced
                         or self.engine == "G1" and not self.in_app)
    base = property(lambda self: self.process.offset if self.process else 0.0)  # its time to ours

    def learn(self, fact, about, time, since):
        """Take in one fact of its engine, of a time of its own, not before since."""
        self.total = about.get("total") or self.total
        if "api" in about:
            self.in_app = not about["api"]
        if fact == "launch":
            self.launched, self.engine, self.epoch = time, about["engine"], about["epoch"]
        elif fact == "over":
            self.over, self.ran, self.written = time, since, about["written"]
        elif fact == "cancel":
            self.cancelled, self.ran = time, since
        elif fact == "mixed":
            self.is_mixed = True
        elif fact == "model":
            self.model = about["model"]
        if self.launched is None:
            self.launched = time
        if fact in ("launch", "prompt", "reading", "read"):
            self.works(since, unread=fact != "read" or about.get("total") or self.sampled is None)
        if fact == "prompt":
            self.began = time
        if fact == "read":
            self.sampled = self.sampled or time

    def works(self, since, unread):
        """It was at work at some time after since, and had not written a token if unread."""
        self.active = max(self.active, since)
        if unread:
            self.unread = max(self.unread, since)

    def phases(self, readings):
        """(state, clock of ours) that its lines show; readings: of its model, one of which can be its."""
        same = next((end for begin, end in readings if self.engine == "MLX" and self.began is not None
                     and -AT_ONCE_S < begin - self.began < FLUSH_S), None)
        last = self.sampled if self.over else None  # its last batch has been read for sure
        for state, at in (("prompt", self.began), ("generating", self.read or last or same)):
            if at is not None:
                yield state, at + self.base


class Ledger:
    """The requests, the runs and LM Studio's own chats, as far as they are known."""

    def __init__(self, epoch, keep):
        self._epoch = epoch
        self.running = {}  # id -> Record, of both sources, oldest first
        self.finished: deque[Record] = deque(maxlen=keep)
        self.total = self.errors = self.abandoned = 0  # requests through us; failed ones; left ones
        self.bindings: Counter[str] = Counter()  # of requests that are over for good: exact, none
        self.changed = []  # records that changed after their end, until somebody takes them
        self.told = {}  # id -> Record of which listeners should hear
        self._open = {}  # id -> Record that can still be bound, or learn
        self._runs: dict[int, OpenRun] = {}
        self._own = {}  # chat number -> Record of LM Studio's own
        self._lines: deque[tuple] = deque(maxlen=LINES_KEPT)  # (event, clock): they wait for their request's
        self._names = {}  # model asked for -> model that answered
        self._sizes = {}  # model asked for -> tokens for a character, of its latest answers
        self._usual = {}  # model -> phase -> deque of ms
        self._processes: deque[Process] = deque(maxlen=8)
        self._readers: dict[Any, OpenRun] = {}  # model -> run of MLX that reads its prompt
        self._readings: dict[Any, deque] = {}  # model -> [clock of 0 %, clock of 100 %] of its latest prompts
        self._unequal = -math.inf  # clock of the latest moment when these were not as many as those
        self._begun = []  # (clock, run) of prompts that begin and (clock, model) of 0 %, at one moment
        self._numbers = itertools.count(1)
        self._swept = self._settle_at = 0.0  # clock of the last _expire, of the next settle
        self._settled = -math.inf  # clock of the last settle
        self._pairs = 0  # that the present settle has compared
        self._seen = self._live = -math.inf  # clock of the latest look at the log, of the latest with lines
        self._heard = self._bound = -math.inf  # those lines were written after _heard, the next after _bound
        self._gap = LAG_S  # how late the latest lines can have been read

    def find(self, request_id):
        """A record by its id, or None."""
        return self.running.get(request_id) or next(
            (record for record in self.finished if record.id == request_id), None)

    def bound(self):
        """How the requests that are over were bound, as far as is known by now."""
        late = Counter(record.binding for record in self._open.values() if record.ended is not None)
        return {binding: self.bindings[binding] + late[binding] for binding in ("exact", "none")}

    def served(self, asked):
        """The model that has answered to a name, else the name."""
        return self._names.get(asked, asked)

    def _of_model(self, event):
        """The requests that a line of its model can mean, as far as the model tells."""
        model = event.data.get("model")
        for record in self._open.values():
            served = record.model or self._names.get(record.model_asked)
            if record.sent < math.inf and record.dialect != SOCKET.name and (
                    None in (model, served) or model == served):     # an SDK's has no lines of the app
                yield record

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
                self._sizes.setdefault(model, deque(maxlen=SIZES_KEPT)).append((record.size, total))

    def _show(self, record, news):
        if news and record.ended is None:
            self.told[record.id] = record

    def _give(self, record, event, clock):
        """An event is a record's, and says so."""
        if record and record.source == "gateway":
            event.data["requestId"] = record.id
        if record:
            self._note(record, event, clock)

    def _note(self, record, event, clock):
        record.model = record.model or event.data.get("model")
        self._show(record, record.take(event, clock))
        if record.ended is not None:
            self.changed.append(record)
            if record.id in self.running:  # LM Studio's own, and over
                self._own_over(record)

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

    def _end_own(self, run, clock, late=False):
        """A chat inside the app has no line for its end; of another, late, none will come."""
        record = run.record
        if record and record.source == "lmstudio" and record.ended is None and (
                run.over and (late or run.in_app) or run.cancelled):
            record.end(clock, Outcome("abandoned" if run.cancelled else "done"))
            self._own_over(record)

    def _own_over(self, record):
        if self.running.pop(record.id, None):
            self.finished.append(record)
            self.told[record.id] = record  # it has no other event that says its end
        self.changed.append(record)


class Timing(Ledger):
    """When the lines were written, and which run a line about a prompt means."""

    def _look(self, events, clock, looked):
        """The log has been read.  Lines that were not there when it was read before are not older than that,
        unless they are the rest of lines that were written a moment ago."""
        if any(event.name in LIVE for event in events):
            if clock - self._live > AT_ONCE_S:
                self._heard = self._bound
            self._bound, self._live = self._seen, clock
            self._gap = min(LAG_S, clock - self._heard) + AT_ONCE_S
        self._seen = looked

    def _time_of(self, run, stamp, clock):
        """The time of an engine's line, by the engine's own clock (minutes.seconds.ms.us) if it wrote one;
        and the earliest time that it can be."""
        if not stamp:
            return clock - run.base, clock - run.base - self._gap
        minutes, *parts = map(int, stamp.split("."))
        at = 60 * minutes + parts[0] + parts[1] / 1e3 + parts[2] / 1e6
        if run.process is None or not run.process.takes(clock - at, clock):
            run.process = next((known for known in self._processes if known.takes(clock - at, clock)), None)
            if run.process is None:
                run.process = Process(clock - at, clock)
                self._processes.append(run.process)
        return at, at - (EXACT_S if run.process.reads >= SURE_READS else FLUSH_S)

    def _see_progress(self, event, clock):
        """The event with the run that it is of, as far as that is certain.  MLX reads one prompt of a model
        at a time; llama.cpp writes of a batch when the app does."""
        model, percent = event.data.get("model"), event.data.get("progress")
        if len(self._readings) < NAMES_KEPT and percent in (0, 100):
            readings = self._readings.setdefault(model, deque([[-math.inf, None]], maxlen=SIZES_KEPT))
            if percent == 100:
                readings[-1][1] = clock
            else:
                readings.append([clock, None])
                self._see_begun(model, clock)
                self._readers.pop(model, None)
        run = self._runs.get(event.run)
        if run is None and model in self._readers:
            return event._replace(run=self._readers[model].number)
        if run and percent and model and run.engine not in UNTIMED and clock - run.heard > AT_ONCE_S:
            return event._replace(run=None)
        return event

    def _see_begun(self, thing, clock):
        self._announce(clock)
        self._begun.append((clock, thing))

    def _announce(self, clock):
        """The app writes 0 % when an engine begins with a prompt of the API: if there are as many of both at
        one moment, none of these runs is of a chat inside the app; unless others just before were not as
        many, and the late half of one of them is here."""
        if not self._begun or clock - self._begun[-1][0] < AT_ONCE_S:
            return
        latest = self._begun[-1][0]
        runs = [thing for _, thing in self._begun if isinstance(thing, OpenRun)]
        models = {thing for _, thing in self._begun if not isinstance(thing, OpenRun)}
        is_announced = 2 * len(runs) == len(self._begun) and latest - self._unequal > FLUSH_S
        self._begun = []
        if not is_announced:
            self._unequal = latest
        for run in runs if is_announced else ():
            run.is_announced = True
            if len(models) == 1:
                model = run.model = run.model or min(models)
                if run.engine == "MLX" and len(self._readers) < NAMES_KEPT:
                    self._readers[model] = run

    def _enter(self, run):
        """The phases of a request that its run's lines show; a stream's first token is seen better here."""
        record = run.record
        model = record.model or self.served(record.model_asked)
        for state, clock in run.phases(self._readings.get(model, ())):
            if state == "prompt" or not record.stream:
                self._show(record, record.enter(state, clock))


class Matching(Timing):
    """Rules 1 to 10: which request caused a run."""

    def _ruled_out(self, run, record, clock, slack=0.0):
        """The number of the rule by which a run is not a request's; 0 if it can be.  Times may be off by
        slack seconds more."""
        done, left = record.state == "done", record.state in LEFT_STATES
        now = clock - run.base
        ended: Any = None if record.ended is None else record.ended - run.base
        if record.sent - run.base > run.launched:
            return 1
        if ended is not None and not left and ended < run.active:
            return 2
        served = record.model or self._names.get(record.model_asked)
        if run.model and served and run.model != served:
            return 3
        if self._other_size(run, record):
            return 4
        if record.stream and self._other_first(run, record, now, slack):
            return 5
        if self._other_usage(run, record):
            return 6
        if run.cancelled:
            until, early_s = (now, 0.3) if ended is None else (ended, 0.1)
            return 8 if done or run.cancelled < until - early_s else 0
        if run.over and (now > run.over + LAG_S + slack if ended is None else
                         ended > run.over + HTTP_S + slack
                         or not left and ended < run.ran - AT_ONCE_S - slack):
            return 7
        if run.over is None and done and run.engine not in UNTIMED and now > ended + LAG_S + slack:
            return 7
        return 0

    def _other_size(self, run, record):
        """4: learned from answers; how far they lie apart says how far a run's tokens may."""
        known, slack = self._sizes.get(record.model_asked), 1.05
        if not known:  # by those of other models: their tokens can be longer or shorter
            known, slack = self._sizes.get(None), 1.3
        if not known or not run.total or not record.size:
            return False
        ratio = run.total / record.size
        near = [total / size for size, total in known if 1 / ALIKE < record.size / size < ALIKE]
        if not near:  # the template weighs more in a shorter prompt
            return not all(min(1, longer) / ALIKE < run.total / total < max(1, longer) * ALIKE
                           for longer, total in ((record.size / size, total) for size, total in known))
        usual = median(near)
        slack *= max(1.07, max(near) / usual, usual / min(near)) * (1 + 0.1 / len(near))
        return not 1 / slack < ratio / usual < slack

    def _compare_sizes(self, fits):
        """4, if nothing has been learned yet: by the ratio of a pair each other prompt has a request, too."""
        runs = [run for run in fits if run.total]
        records = {record.id for records in fits.values() for record in records if record.ended is None}
        if len(runs) != len(records):
            runs = [run for run in runs if run.is_of_api]
        if self._sizes or not 1 < len(runs) <= 8 or len(records) > 8:  # each is tried with each
            return

        def is_possible(ratio, rest, taken):
            return not rest or any(
                1 / SAME_SIZE < rest[0].total / (ratio * record.size) < SAME_SIZE and
                is_possible(ratio, rest[1:], {*taken, record.id})
                for record in fits[rest[0]] if record.size and record.id not in taken)

        others = {run: [other for other in runs if other is not run] for run in runs}
        kept = {run: [record for record in fits[run] if record.size and is_possible(
            run.total / record.size, others[run], {record.id})] for run in runs}
        if all(kept.values()):
            fits.update(kept)

    @staticmethod
    def _other_first(run, record, now, slack):
        """5: an answer of tool calls begins late, so its first token says less."""
        read_by = math.inf if run.read is None or record.tools else run.read + HTTP_S + slack
        if record.first is None:
            return (now if record.ended is None else record.ended - run.base) > read_by + LAG_S
        return not run.unread - slack <= record.first - run.base <= read_by

    @staticmethod
    def _other_usage(run, record):
        """MLX counts one token of the prompt less, G1 one of the answer more or less."""
        if not has_counts(record):
            return False
        counts = ((run.total, record.used("promptTokens"), run.engine not in ("G2", "G3")),
                  (run.written, record.used("completionTokens"), run.engine == "G1"))
        return any(None not in (told, used) and abs(told - used) > slack for told, used, slack in counts)

    def _is_certain(self, run, record, records, runs, clock):
        """True if a run fits so many requests, and this one so many runs, that it is this one's.  Before its
        usage is known the app must have told of the run, as it does not of a chat inside the app or an SDK's.
        """
        if runs == 1 and (has_counts(record) or record.first and record.first < clock - LAG_S):
            return True
        return records == runs == 1 and run.is_of_api and record.dialect != SOCKET.name

    def _has_twin(self, run, record, free, clock):
        """Before its usage is known: another request or run of that size is out by tenths of a second."""
        if has_counts(record):
            return False
        pairs = [(run, other) for other in free
                 if other is not record and nearly_equal(other.size, record.size)]
        pairs += [(other, record) for other in self._runs.values()
                  if other is not run and other.record is None and nearly_equal(other.total, run.total)]
        return any(self._ruled_out(*pair, clock) and not self._ruled_out(*pair, clock, MOMENT_S)
                   for pair in pairs)


class Lines(Matching):
    """Rules 11 to 14: whose a line of the app is that names no run."""

    def _line_of_start(self, event, clock):
        """11."""
        data, logged = event.data, (event.about or {}).get("logged")
        copy = logged_request(logged)
        if data.get("model"):
            self._names.setdefault(data["model"], data["model"])
        found = [record for record in self._of_model(event) if not record.begun and record.target != NO_START
                 and record.messages in (None, data["messages"])
                 and (record.ended is None or clock - record.ended < LAG_S) and copy.may_be(record)]
        same = [record for record in found if copy.fingerprint and record.fingerprint == copy.fingerprint]
        record = same[0] if len(same) == 1 else found[0] if len(found) == 1 else None
        if record:
            record.begun = True
            record.model = record.model or data.get("model")
        elif not found:
            record = self._own_record(event.chat, clock, epoch_of(data["timestamp"]),
                                      messages=data["messages"], model=data.get("model"))
        return record

    def _line_of_progress(self, event, clock):
        """12."""
        percent = event.data.get("progress", 0 if event.name == "lmstudio_processing_start" else 100)
        own = self._own.get(event.chat)
        fitting = (record for record in self._of_model(event)
                   if self._may_reach(record, event, percent, clock))
        found = [*itertools.islice(fitting, 2)]   # whether there is one, or more, is all that counts
        model = event.data.get("model")
        if own or any(record.model == model and record.ended is None and clock - record.heard < LATE_S
                      for record in self._own.values()):
            return own if own and not found else None
        if model and not any(self._of_model(event)):
            return self._own_record(event.chat, clock, epoch_of(event.data["timestamp"]), model=model)
        others = [run for run in self._runs.values() if run.over is None and run.cancelled is None
                  and (run.engine not in UNTIMED or run.record is None)
                  and (len(found) != 1 or run is not found[0].run)]
        if len(found) != 1 or model is None or len(others) > (found[0].run is None):
            return None  # a percent of its own names its run (3.3)
        for record in self._of_model(event) if percent == 0 else ():
            record.silent = record is not found[0]  # another prompt begins
        self._mark(found[0], "12")
        return found[0]

    @staticmethod
    def _may_reach(record, event, percent, clock):
        """True if a request's prompt can be read so far now."""
        if record.ended is not None and (record.silent or clock - record.ended >= LAG_S and (
                record.state != "abandoned" or record.told_end and record.percent is None)):
            return False
        if record.first and percent < 100 and record.first < clock - LAG_S:
            return False
        return (record.percent is None or record.percent < percent
                or record.percent == percent < 100 and record.ended is None
                or event.name == "lmstudio_generation_start" and record.heard == clock)

    def _line_of_end(self, event, clock):
        """13 and 14, when the request's own end is known."""
        if event.chat in self._own:
            return self._own[event.chat]
        self._lines.append((event, clock))  # settle() matches it

    def _match_lines(self, clock):
        self._pairs += len(self._lines) * len(self._open)
        for line in list(self._lines):
            event, seen = line
            alike = [other for other in self._lines if self._is_like(other, line)]
            records = self._match_line(event, seen, clock, alike) if alike and alike[0] is line else []
            give = self._give if len(records) == 1 else self._note  # of several nobody can say which is whose
            is_equal = all(other.data == event.data for other, _ in alike[:len(records)])
            for record, other in zip(records, alike if len(records) <= len(alike) else ()):
                record.told_end |= event.name == "lmstudio_chat_end"
                self._lines.remove(other)
                if is_equal:
                    self._mark(record, "14" if "counts" in (event.about or "counts") else "13")
                    give(record, *other)
        while self._lines and clock - self._lines[0][1] > LAG_S:
            self._lines.popleft()

    def _match_line(self, event, seen, clock, alike):
        """The requests that ended at once of which one has this last line, [] while that is open."""
        about, data = event.about or {}, event.data
        if event.name == "lmstudio_prediction_stats":  # 14, of an answer without a run
            counts = data.get("promptTokens"), data.get("completionTokens")
            found = [record for record in self._of_model(event)
                     if record.state == "done" and record.run is None
                     and counts == (record.used("promptTokens"), record.used("completionTokens"))
                     and abs(record.ended - seen) < LAG_S]
            return found if len(found) == 1 else []
        answer, wanted = "counts" in about, ENDS[data["outcome"]]
        late = data["outcome"] == "finished" and not answer and any(
            record.stream and record.state in LEFT_STATES and 0 < seen - record.ended < LATE_END_S
            for record in self._of_model(event))
        since = seen - (LEFT_LINE_S if wanted is LEFT_STATES else LAG_S)
        found = [record for record in self._of_model(event) if not record.told_end
                 and (record.state in wanted or record.ended is None)
                 and (record.ended is None or since < record.ended < alike[-1][1] + 0.1)
                 and (data["outcome"] != "finished" or record.stream != answer)]
        if answer:
            same = [record for record in self._open.values()
                    if about["answer_id"] and record.answer_id == about["answer_id"]]
            counts = about["counts"].get("promptTokens"), about["counts"].get("completionTokens")
            found = same or [record for record in found if record.ended is None or counts == (None, None)
                             or counts == (record.used("promptTokens"), record.used("completionTokens"))]
        if wanted == ("failed",):
            found = [record for record in found if record.error and record.error in data["message"]] or found
        ended = sorted((record for record in found if record.ended is not None), key=lambda one: one.ended)
        waits = len(found) > len(ended) and clock - seen < 0.3 or (late or len(alike) < len(ended)) and (
            clock - seen < FLUSH_S)
        if waits or late and len(alike) > len(ended) or not ended:
            return []  # one can be the late line of a stream whose client left
        if len(alike) < len(ended):  # the line of an earlier one has not been seen
            ended = [record for record in ended if abs(record.ended - seen) < AT_ONCE_S][-1:]
        return [record for record in ended if record.ended - ended[0].ended < TWINS_S]

    @staticmethod
    def _is_like(one, other):
        """True if two last lines are of one kind and model and were read at about the same time."""
        kinds = [(event.name, event.data.get("outcome"), event.data.get("model"),
                  "counts" in (event.about or ())) for event, _ in (one, other)]
        return kinds[0] == kinds[1] and abs(one[1] - other[1]) < FLUSH_S

    def _mark(self, record, rule):
        if record.binding == "none":
            record.binding, record.bound_by = "exact", rule


class Requests(Lines):
    """Every request, and what the log says of it.  Hub's lock guards all of it."""

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
        left = was_left(record.state, record.operation)
        self.abandoned += left
        self.errors += record.error is not None and not left
        if record.run:
            self._enter(record.run)
        self._learn(record)
        self.settle(clock)
        return True

    def see(self, events, clock, looked=math.inf):
        """Take the log's events in, and write requestId into those that surely are a request's of ours.

        Gives the records of which listeners should hear; clock: monotonic seconds; looked: when the log began
        to be read for this, if that was before."""
        self._look(events, clock, min(clock, looked))
        for event in events:
            if event.name in OF_PROMPTS:
                event = self._see_progress(event, clock)
            if event.name == "lmstudio_log":
                self._see_entry(event, clock)
            elif event.run is not None:
                self._see_run(event, clock)
            elif event.name in LINES:
                self._give(LINES[event.name](self, event, clock), event, clock)
        self._announce(clock)
        if clock - self._settled >= SETTLE_S:
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

    def _see_run(self, event, clock):
        run = self._runs.get(event.run) or self._runs.setdefault(event.run, OpenRun(event.run, event.chat))
        run.chat = event.chat
        if event.name == "":
            about, fact = event.about, event.about["fact"]
            run.learn(fact, about, *self._time_of(run, about["clock"], clock))
            if fact == "prompt":
                self._see_begun(run, clock)
            run.heard = clock
            if run.record is None and fact in SETTLING:
                self.settle(clock)
            elif run.record:
                self._enter(run)
            self._end_own(run, clock)
            return
        if event.name in OF_PROMPTS:
            run.works(clock - run.base - self._gap, unread=True)
            if event.data.get("progress") == 100:
                run.read = run.read or clock - run.base
        if "model" in event.data and event.name in LINES_OF_ENTRIES:  # else it is the tracker's guess
            run.model, proven = event.data["model"], run.is_of_api
            if not proven and run.record is None:
                self.settle(clock)
        if run.record:
            self._give(run.record, event, clock)
        else:
            run.held.append((event, clock))

    def settle(self, clock):
        """Bind all that is certain by now.  The more there is to compare, the less often it is done."""
        self._settled = clock
        if clock >= self._settle_at and (self._runs or self._lines):
            self._pairs = 0
            while self._bind_one(clock):
                pass
            self._match_lines(clock)
            self._settle_at = clock + PAIR_S * self._pairs if self._pairs > PAIRS_AT_ONCE else clock
        if clock - self._swept > 1.0 or len(self._open) > 2 * OPEN_LIMIT:  # also when no log is followed
            self._expire(clock)

    def _bind_one(self, clock):
        """Bind the first run that has become certain; False if there is none, or too much to compare."""
        open_runs = [run for run in self._runs.values() if run.record is None and not run.is_mixed and (
            run.total or run.over is not None or run.cancelled is not None)]
        free = [record for record in self._open.values() if record.run is None]
        self._pairs += len(open_runs) * len(free)
        if self._pairs > PAIRS_MOST:
            return False
        fits = {run: [record for record in free if not self._ruled_out(run, record, clock)]
                for run in open_runs}
        self._compare_sizes(fits)
        wanted = Counter(record.id for records in fits.values() for record in records)
        for run, records in fits.items():
            record = only([record for record in records
                           if self._is_certain(run, record, len(records), wanted[record.id], clock)
                           and not self._has_twin(run, record, free, clock)])
            if record:
                self._bind(run, record, free, clock)
                return True
            if not fits[run] and all(self._ruled_out(run, other, clock) not in (4, 5) for other in free):
                self._take_as_own(run, clock)
        return False

    def _bind(self, run, record, free, clock):
        rules = {self._ruled_out(run, other, clock) or 9 for other in free if other is not record}
        run.record, record.run, record.binding = record, run, "exact"
        record.bound_by = ", ".join(map(str, sorted(rules))) or "alone"
        if run.model:
            record.model = record.model or run.model
        self._learn_size(record, run.total)
        self._enter(run)
        for event, seen in run.held:
            record.take(event, seen)
        run.held = []
        record.timeline.sort(key=lambda row: row[0])
        self._show(record, True)
        if record.ended is not None:
            self.changed.append(record)

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
            end = max(run.over or 0, run.cancelled or 0)
            if end and clock - run.base - end > LATE_S or len(self._runs) > RUNS_OPEN:
                if run.record is None:
                    self._take_as_own(run, clock)
                if run.over:
                    self._end_own(run, run.base + run.over, late=True)
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
    """True for an answer with LM Studio's usage."""
    return record.state == "done" and record.usage is not None and not record.usage.get("estimated")


def nearly_equal(one, other):
    """True if two sizes are known and nearly equal."""
    return bool(one and other) and abs(one / other - 1) < TWIN_SIZE


def median(values):
    """The value in the middle, of an even number the larger one."""
    return sorted(values)[len(values) // 2]


def only(rows):
    """The one row, None of none or several."""
    return rows[0] if len(rows) == 1 else None


SETTLING = frozenset(("prompt", "model", "over", "cancel"))  # facts that can make a run's request certain
LEFT_STATES = ("abandoned", "stopped")
# outcome of a chat -> states of its request
ENDS = {"finished": ("done",), "disconnected": LEFT_STATES, "error": ("failed",)}
OF_PROMPTS = frozenset(("lmstudio_prompt_progress", "lmstudio_generation_start"))
LIVE = OF_PROMPTS | {""}  # events of lines that are told as soon as they are read
LINES_OF_ENTRIES = frozenset(("lmstudio_chat_start", "lmstudio_prompt_progress"))
LINES = {"lmstudio_chat_start": Requests._line_of_start,
         "lmstudio_prompt_progress": Requests._line_of_progress,
         "lmstudio_processing_start": Requests._line_of_progress,
         "lmstudio_generation_start": Requests._line_of_progress,
         "lmstudio_chat_end": Requests._line_of_end, "lmstudio_prediction_stats": Requests._line_of_end}


# --- 3.9 figures: counters and histograms ------------------------------------


class Metric(NamedTuple):
    """One Prometheus metric.  Its name ends in _total if it is a counter; only a histogram has buckets."""

    name: str
    labels: str  # their names
    about: str
    buckets: tuple = ()

    @property
    def kind(self):
        return "counter" if self.name.endswith("_total") else "histogram" if self.buckets else "gauge"


# Buckets, in seconds (reading a prompt takes minutes at home), in tokens a second, in seconds a token.
DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
A_SECOND = (1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 5000)
A_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
OVERHEAD_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)

# lmstudio_* are figures of the log and of LM Studio's REST API, whether a request came through us or not,
# with lmstudio-exporter's names; lmstudio_gateway_* are of requests through us.  Base units, ratios up to 1.
METRICS = (
    Metric("lmstudio_up", "", "1 when LM Studio answered when last asked"),
    Metric("lmstudio_loaded_models", "", "Models that are loaded; absent when unknown"),
    Metric("lmstudio_model_loaded", "model type", "1 for a model that is loaded"),
    Metric("lmstudio_model_context_length_tokens", "model type", "Context with which it is loaded"),
    Metric("lmstudio_requests_total", "model", "Predictions that the log shows finished"),
    Metric("lmstudio_input_tokens_total", "model", "Prompt tokens of them"),
    Metric("lmstudio_output_tokens_total", "model", "Generated tokens of them"),
    Metric("lmstudio_reasoning_tokens_total", "model", "Those of them that are reasoning"),
    Metric("lmstudio_accepted_draft_tokens_total", "model", "Draft tokens that were taken"),
    Metric("lmstudio_cached_input_tokens_total", "model", "Prompt tokens reused from the cache"),
    Metric("lmstudio_cache_resets_total", "model", "Prompts read wholly anew although a part was cached"),
    Metric("lmstudio_time_to_first_token_seconds", "model", "As the log has it", DURATION_S),
    Metric("lmstudio_prompt_eval_seconds", "model", "Time to read the prompt", DURATION_S),
    Metric("lmstudio_generation_seconds", "model", "Time to generate the answer", DURATION_S),
    Metric("lmstudio_prompt_tokens_per_second", "model", "Speed of reading", A_SECOND),
    Metric("lmstudio_tokens_per_second", "model", "Speed of generating", A_SECOND),
    Metric("lmstudio_prompt_progress_ratio", "model slot", "How much of a prompt has been read"),
    Metric("lmstudio_log_lines_total", "dialect", "Engine lines recognised, by engine generation"),
    Metric("lmstudio_log_entries_total", "event", "Events made of the log"),
    Metric("lmstudio_log_unparsed_entries_total", "", "Lines that no rule knows"),
    Metric("lmstudio_log_bytes_read_total", "", "Bytes of log read"),
    Metric("lmstudio_log_rotations_total", "reason", "Changes to another log file"),
    Metric("lmstudio_log_read_lag_bytes", "", "Bytes written and not yet read"),
    Metric("lmstudio_log_last_entry_timestamp_seconds", "", "Time of the latest log entry"),
    Metric("lmstudio_log_directory_bytes", "", "Size of the log directory"),
    Metric("lmstudio_log_filesystem_free_bytes", "", "Room left on its file system"),
    Metric("lmstudio_gateway_requests_total", "key model endpoint code", "Ended inferences; 0: no answer"),
    Metric("lmstudio_gateway_tokens_total", "key model type", "input, output, cached_input, reasoning"),
    Metric("lmstudio_gateway_request_duration_seconds", "endpoint model stream", "From arrival to end",
           DURATION_S),
    Metric("lmstudio_gateway_time_to_first_token_seconds", "model",
           "From arrival to the first content, reasoning or tool call", DURATION_S),
    Metric("lmstudio_gateway_time_per_output_token_seconds", "model",
           "Between tokens of a stream, at the mean", A_TOKEN_S),
    Metric("lmstudio_gateway_queue_seconds", "key_priority outcome",
           "Time in the queue, here or, if the log shows it, in LM Studio; outcome: done, failed, abandoned",
           DURATION_S),
    Metric("lmstudio_gateway_queue_waiting", "model", "Requests that wait here for their turn"),
    Metric("lmstudio_gateway_overhead_seconds", "",
           "From a request's last byte to its first byte to LM Studio", OVERHEAD_S),
    Metric("lmstudio_gateway_requests_in_flight", "model", "Requests that are running"),
    Metric("lmstudio_gateway_requests_queued", "model", "Those that wait in LM Studio's queue"),
    Metric("lmstudio_gateway_errors_total", "", "Requests that failed"),
    Metric("lmstudio_gateway_abandoned_total", "", "Clients that left, and requests that were stopped"),
    Metric("lmstudio_gateway_client_disconnects_total", "phase", "Who left: queued, prefill, decode"),
    Metric("lmstudio_gateway_rejected_total", "reason", "Requests turned away here"),
    Metric("lmstudio_gateway_upstream_errors_total", "kind",
           "refused, timeout, reset, bad_status, error_in_200"),
    Metric("lmstudio_gateway_sse_clients", "", "Listeners of /debug/stream"),
    Metric("lmstudio_gateway_sse_events_total", "type", "Events published"),
    Metric("lmstudio_gateway_sse_dropped_total", "reason", "Events that slow listeners lost"),
    Metric("lmstudio_gateway_sse_replays_total", "result", "Listeners that came back: full, gap"),
    Metric("lmstudio_gateway_correlated_total", "result", "Requests joined with the log: exact, none"),
    Metric("lmstudio_gateway_build_info", "version python", "1"),
    Metric("process_start_time_seconds", "", "When this gateway started"),
)
METRIC = {metric.name: metric for metric in METRICS}
TOKEN_KINDS = {"input": "promptTokens", "output": "completionTokens", "cached_input": "cachedTokens",
               "reasoning": "reasoningTokens"}
LOGGED = {  # event of the log -> its metrics, each with its value in the event's data or in Event.about
    "lmstudio_chat_end": (),
    "lmstudio_cache_stats": (("lmstudio_cached_input_tokens_total", lambda data: data["reused"]),),
    "lmstudio_prediction_stats": (
        ("lmstudio_output_tokens_total", lambda data: data.get("completionTokens")),
        ("lmstudio_reasoning_tokens_total", lambda data: data.get("reasoningTokens")),
        ("lmstudio_accepted_draft_tokens_total", lambda data: data.get("acceptedDraftTokens")),
        ("lmstudio_time_to_first_token_seconds", lambda data: seconds_of(data.get("timeToFirstTokenMs"))),
        ("lmstudio_prompt_eval_seconds", lambda data: seconds_of(data.get("promptMs"))),
        ("lmstudio_generation_seconds", lambda data: data["completionTokens"] / data["tokensPerSecond"]
         if data.get("completionTokens") and data.get("tokensPerSecond") else None),
        ("lmstudio_prompt_tokens_per_second", lambda data: data.get("promptTokensPerSecond")),
        ("lmstudio_tokens_per_second", lambda data: data.get("tokensPerSecond"))),
}


def seconds_of(ms):
    return ms if ms is None else ms / 1000


class Figures:
    """Counters and histograms since the start.  Pure; Hub's lock guards them."""

    SERIES = 500  # of one metric; beyond them all count as "other"
    MODELS = 100  # names of models that become labels
    PHASES = {"waiting": "queued", "loading": "queued", "queued": "queued", "prompt": "prefill",
              "generating": "decode"}
    FAILURES = {"upstream_unreachable": "refused", "upstream_timeout": "timeout", "upstream_reset": "reset"}
    REJECTIONS = {  # code of our own error -> reason
        "key_needed": "no_key", "key_wrong": "bad_key", "key_expired": "bad_key", "right_missing": "scope",
        "address_not_allowed": "host", "host_not_local": "host", "origin_not_allowed": "host",
        "model_not_allowed": "model", "queue_full": "concurrency", "body_too_large": "body_size"}

    def __init__(self):
        self._values: dict[str, dict] = {metric.name: {} for metric in METRICS}
        self._models: set[str] = set()

    def add(self, name, *labels, amount: float | None = 1):
        """Count an amount, or observe it in a histogram; None is none."""
        if amount is None:
            return
        series, buckets = self._values[name], METRIC[name].buckets
        if labels not in series and len(series) >= self.SERIES:
            labels = ("other",) * len(labels)
        if buckets:     # a count for each of them and one beyond, then the sum
            row = series.setdefault(labels, [0] * (len(buckets) + 1) + [0.0])
            row[bisect.bisect_left(buckets, amount)] += 1
            row[-1] += amount
        else:
            series[labels] = series.get(labels, 0) + amount

    def model(self, name):
        """A label for a model that LM Studio has named: no client can invent one."""
        if name and name not in self._models and len(self._models) < self.MODELS:
            self._models.add(name)
        return name if name in self._models else "other" if name else "unknown"

    def model_of(self, record):
        """A label for a request's model: the one that answered, else the one asked for if it is known."""
        if record.model:
            return self.model(record.model)
        return record.model_asked if record.model_asked in self._models else "other"

    def count_request(self, record):
        """A request through us is over."""
        model, endpoint = self.model_of(record), record.target if record.target in DIALECTS else "other"
        stream = "true" if record.stream else "false"
        for name, amount, *labels in (
                ("requests_total", 1, record.key or "none", model, endpoint, str(record.status or 0)),
                ("overhead_seconds", record.overhead_s),
                ("queue_seconds", seconds_of(record.queued_ms()), record.priority, record.state),
                ("request_duration_seconds", seconds_of(record.total_ms), endpoint, model, stream),
                ("time_to_first_token_seconds", seconds_of(record.first_ms), model),
                ("time_per_output_token_seconds",
                 1 / record.speed if record.stream and record.speed else None, model)):
            self.add(f"lmstudio_gateway_{name}", *labels, amount=amount)
        if record.operation == "client_disconnected":
            self.add("lmstudio_gateway_client_disconnects_total",
                     self.PHASES[max(record.entered, key=STATES.index)])
        elif record.error is not None and not was_left(record.state, record.operation):
            self.add("lmstudio_gateway_upstream_errors_total", self.FAILURES.get(
                record.operation, "error_in_200" if record.status == 200 else "bad_status"))

    def count_rejection(self, code):
        """A request was turned away here with this code of our own."""
        if code in self.REJECTIONS:
            self.add("lmstudio_gateway_rejected_total", self.REJECTIONS[code])

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

    def count_event(self, event):
        """An event of the log."""
        if event.name not in LOGGED:
            return
        model, about = self.model(event.data.get("model")), event.about or {}
        for name, value in LOGGED[event.name]:
            self.add(name, model, amount=value(event.data))
        self.add("lmstudio_requests_total", model, amount=about.get("requests"))
        self.add("lmstudio_input_tokens_total", model, amount=about.get("input"))

    def gauges(self, requests):
        """{metric: {labels: value}} of the requests that are running now, and of the join."""
        flight: Counter[tuple] = Counter()
        queued: Counter[tuple] = Counter()
        waiting: Counter[tuple] = Counter()
        prompts = {}
        for record in requests.running.values():
            labels = (self.model_of(record),)
            flight[labels] += record.source == "gateway"
            waiting[labels] += record.place is not None
            queued[labels] += record.state == "queued"
            if record.state == "prompt" and record.percent is not None:
                prompts[(*labels, record.run and record.run.slot or "")] = round(record.percent / 100, 4)
        return {"lmstudio_gateway_requests_in_flight": flight, "lmstudio_gateway_requests_queued": queued,
                "lmstudio_gateway_queue_waiting": waiting,
                "lmstudio_gateway_errors_total": {(): requests.errors},
                "lmstudio_gateway_abandoned_total": {(): requests.abandoned},
                "lmstudio_prompt_progress_ratio": prompts,
                "lmstudio_gateway_correlated_total": {(name,): n for name, n in requests.bound().items()}}

    def exposition(self, gauges):
        """All of it as Prometheus text 0.0.4.  gauges: {metric: {labels: value}} as of now."""
        for name, _ in gauges.get("lmstudio_model_loaded", ()):
            self.model(name)    # LM Studio has listed it
        lines = []
        for metric in METRICS:
            series = {**self._values[metric.name], **gauges.get(metric.name, {})}
            if series:
                lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            for labels, value in series.items():
                lines += metric_lines(metric, labels, value)
        return "\n".join(lines) + "\n"


def metric_lines(metric, labels, value):
    """The lines of one series."""
    pairs = [f'{name}="{escaped(label)}"' for name, label in zip(metric.labels.split(), labels)]

    def line(suffix, number, *more):
        inside = ",".join([*pairs, *more])
        return f"{metric.name}{suffix}{'{' + inside + '}' if inside else ''} {number}"

    if not metric.buckets:
        return [line("", value)]
    counts = list(itertools.accumulate(value[:-1]))
    bounds = [*metric.buckets, "+Inf"]
    return [*(line("_bucket", number, f'le="{bound}"') for bound, number in zip(bounds, counts)),
            line("_sum", round(value[-1], 6)), line("_count", counts[-1])]


def escaped(label):
    """A label's value as Prometheus wants it."""
    return str(label).replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


def rank(values, share):
    """The nearest-rank percentile of sorted values; None of none."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def mean(values):
    return round(sum(values) / len(values), 2) if values else None


def performance(records, requests, tokens):
    """`performance` of /debug/metrics: totals since the start, times (ms) over the requests that are kept."""
    total, errors = requests.total, requests.errors
    times = sorted(record.total_ms for record in records)
    firsts = sorted(record.first_ms for record in records if record.first_ms is not None)
    return {"totalRequests": total, "totalErrors": errors, "totalAbandoned": requests.abandoned,
            "errorRate": round(errors / total, 4) if total else 0,
            "keptRequests": len(times), "avgResponseTimeMs": mean(times), "minResponseTimeMs": rank(times, 0),
            "maxResponseTimeMs": rank(times, 1), "medianResponseTimeMs": rank(times, 0.5),
            "p95ResponseTimeMs": rank(times, 0.95), "p99ResponseTimeMs": rank(times, 0.99),
            "medianTimeToFirstTokenMs": rank(firsts, 0.5), "p95TimeToFirstTokenMs": rank(firsts, 0.95),
            "avgTokensPerSec": mean([record.speed for record in records if record.speed]),
            "totalTokensProcessed": tokens["input"] + tokens["output"],
            "tokenStats": {field: tokens[kind] for kind, field in TOKEN_KINDS.items()}}


# --- 3.10 series: figures by minute ------------------------------------------

DAY_MINUTES = 24 * 60
MOST_MINUTES = 7 * DAY_MINUTES  # that one can ask for
CELLS = 30  # (model, key, who) of one minute that are kept apart; the others are "other"
BUCKET = 1.1  # a histogram's buckets are so much wider each: a percentile of it is right to 5 %
BY = ("", "model", "key", "user")  # the ways to tell rows apart
STEPS = (60, 300, 3600)  # seconds of a row
MOST_ROWS = 360
MOST_NAMES = 50  # in one answer; the others are "other"


def tally(row):
    """One request, a row of the history, in its minute: {figure, or (figure, bucket): amount}."""
    prompt, cached = row["prompt_tokens"] or 0, row["cached_tokens"] or 0
    written = row["completion_tokens"] or 0
    fresh, read_ms, write_ms = max(0, prompt - cached), row["prompt_ms"] or 0, row["generation_ms"] or 0
    left = was_left(row["outcome"], row["operation"])
    found: dict[Any, Any] = {"requests": 1, "abandoned": int(left),
                             "errors": int(row["outcome"] != "done" and not left), "promptTokens": prompt,
                             "cachedTokens": cached, "completionTokens": written, "gpuMs": read_ms + write_ms}
    speeds = {}
    if fresh and read_ms:
        found.update(readTokens=fresh, readMs=read_ms)
        speeds["reading"] = 1000 * fresh / read_ms
    if written and write_ms:
        found.update(writtenTokens=written, writtenMs=write_ms)
        speeds["writing"] = 1000 * written / write_ms
    for name, value in {"ttftMs": row["first_ms"], "queuedMs": row.get("queued_ms"), **speeds}.items():
        if value is not None:
            found[name, math.floor(math.log(max(value, 0.01), BUCKET))] = 1
    return found


def percentile(amounts, name, share):
    """Of a histogram in a tally, by the nearest rank; None of nothing."""
    buckets = sorted((key[1], n) for key, n in amounts.items() if key[0] == name and n > 0)
    wanted = math.ceil(share * sum(n for _, n in buckets))
    for (bucket, _), so_far in zip(buckets, itertools.accumulate(n for _, n in buckets)):
        if so_far >= wanted:
            return round(BUCKET ** (bucket + 0.5), 2)
    return None


def series_row(amounts):
    """Sums of tallies as /debug/series shows them; None if no request told it."""
    def speed(tokens, ms):
        return round(1000 * amounts[tokens] / amounts[ms], 1) if amounts[ms] > 0 else None

    both = {name: {"p50": percentile(amounts, name, 0.5), "p95": percentile(amounts, name, 0.95)}
            for name in ("ttftMs", "reading", "writing", "queuedMs")}
    return {**{name: round(amounts[name]) for name in ("requests", "errors", "abandoned", "promptTokens",
                                                       "cachedTokens", "completionTokens", "gpuMs")},
            "promptTokensPerSecond": speed("readTokens", "readMs"),
            "tokensPerSecond": speed("writtenTokens", "writtenMs"), **both}


class Series:
    """Tallies of the requests that ended, by minute, for a day, told apart by model, key and who asked.

    Pure; Hub's lock guards it."""

    def __init__(self, since, kept=DAY_MINUTES):
        self.since, self._kept = since, kept  # epoch seconds, from then on it holds every request; minutes
        self._minutes: dict[int, dict[tuple, Counter]] = {}
        self.used: dict[str, float] = {}  # model -> when it last answered, epoch seconds

    def take(self, row, before=None):
        """Add a request that is over.  before: the result for the same one earlier, which is taken back:
        the log can tell more of a request after its end."""
        ended = row["started"] + (row["total_ms"] or 0) / 1000
        model = row["model"] or row["model_asked"] or "unknown"
        key = row["key"] or ("not via gateway" if row["source"] == "lmstudio" else "no key")
        person = who(row["source"], row.get("user"), row["key"], row.get("agent"), row["client"]) or "unknown"
        minute, names, amounts = int(ended // 60), ("", model, key, person), tally(row)
        if before and before[0] in self._minutes:
            self._minutes[before[0]][before[1]].subtract(before[2])
        if minute not in self._minutes:
            self._minutes[minute] = {}
            self.since = max(self.since, 60 * (minute - self._kept + 1))
            for old in [one for one in self._minutes if one <= minute - self._kept]:
                del self._minutes[old]
        cells = self._minutes[minute]
        if names not in cells and len(cells) >= CELLS:
            names = ("", "other", "other", "other")
        cell = cells.setdefault(names, Counter())
        for name, amount in amounts.items():    # Counter.update() takes three times as long
            cell[name] += amount
        if len(self.used) < NAMES_KEPT or model in self.used:
            self.used[model] = max(ended, self.used.get(model, 0))
        return minute, names, amounts

    def cells(self, begin):
        """A copy of the tallies from the minute of begin (epoch seconds) on: [(minute, names, tally)]."""
        return [(minute, names, dict(amounts)) for minute, cells in self._minutes.items()
                if minute >= begin // 60 for names, amounts in cells.items()]


def series_step(minutes):
    """Seconds of a row: the smallest that gives at most MOST_ROWS."""
    return next(step for step in STEPS if minutes * 60 <= step * MOST_ROWS)


def series_rows(cells, step, by):
    """`rows` and `total` of /debug/series: of all, or with by ("model", "key", "user") of each name."""
    place = BY.index(by)
    asked: Counter[str] = Counter()
    for _, names, amounts in cells:
        asked[names[place]] += amounts["requests"]
    known = {name for name, _ in asked.most_common(MOST_NAMES)}
    sums: dict[str, dict] = {}
    totals: dict[str, Counter] = {}
    for minute, names, amounts in cells:
        name = names[place] if names[place] in known else "other"
        totals.setdefault(name, Counter()).update(amounts)
        sums.setdefault(name, {}).setdefault(60 * minute // step * step, Counter()).update(amounts)
    rows = {name: [{"t": utc_text(t), **series_row(found[t])} for t in sorted(found) if found[t]["requests"]]
            [-MOST_ROWS:] for name, found in sums.items()}
    total = {name: series_row(amounts) for name, amounts in totals.items()}
    return {"rows": rows, "total": total} if by else {
        "rows": rows.get("", []), "total": total.get("") or series_row(Counter())}


# --- 3.11 wire formats of events ----------------------------------------------

JSON = json.JSONEncoder(ensure_ascii=False)
# JSONEncoder makes an encoder in C for each call, which takes as long as the encoding.  This is made once.
json_parts: Any = (json.encoder.c_make_encoder or (lambda *options: JSON.iterencode))(  # type: ignore
    None, JSON.default, json.encoder.encode_basestring, None, ": ", ", ", False, False, True)


def to_json(data):
    """data as one line of strict JSON, also for clients that read by str.splitlines().  It may hold lone
    surrogates: to_utf8() writes them as JSON does."""
    text = "".join(json_parts(data, 0))
    if text.isascii():
        return text
    return text.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def to_utf8(text):
    """Text around JSON as bytes.  A lone surrogate has no UTF-8: it becomes JSON's escape for it."""
    return text.encode("utf-8", "backslashreplace")


def sse_frame(event_id, name, data, retry=""):
    """One frame of a text/event-stream (WHATWG HTML, 9.2); data is JSON."""
    return to_utf8(f"{retry}id: {event_id}\nevent: {name}\ndata: {data}\n\n")


def json_line(event_id, event):
    """The event as --json prints it."""
    return f'{{"id": "{event_id}", "event": "{event.name}", "data": {to_json(event.data)}}}\n'



# --- 3.12 WebSocket: the protocol of LM Studio's own SDKs ---------------------

NAMESPACES = ("llm", "embedding", "system", "files", "diagnostics", "repository", "plugins", "runtime")
OPCODES = CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # RFC 6455, 5.2
LONGEST_CONTROL = 125  # bytes of a control frame's payload (RFC 6455, 5.5)
LONGEST_MESSAGE = 128 * 1024 * 1024  # bytes of one of LM Studio's: its `ws` refuses more than 100 MiB
CLOSE_CODES = frozenset((*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)))  # RFC 6455, 7.4; IANA
SDK_TOKEN = re.compile(r"sk-lm-(\w{8}):(\w{20})").fullmatch  # a client shows its halves


class FrameError(GatewayError):
    """Bytes that are no WebSocket frames.  code: of the close frame that ends the connection."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Message(NamedTuple):
    """A message, or a control frame: its payload without mask, and its frames as they came."""

    opcode: int
    payload: bytes
    raw: bytes


class Frames:
    """Cuts the bytes of one direction into messages (RFC 6455, section 5), strictly.

    masked: as a client's frames are.  limit: bytes of a message."""

    def __init__(self, masked, limit):
        self._masked, self.limit = masked, limit
        self.rest = bytearray()  # of a frame that has not ended
        self._need = 2  # bytes that rest must have before another look is worth it
        self._pieces: list[Message] = []    # of a message that has not ended
        self._size = 0  # bytes of their payloads

    @property
    def between(self):
        """True when neither a frame nor a message is under way."""
        return not (self.rest or self._pieces)

    @property
    def held(self):
        """Bytes of a message that is not whole."""
        return len(self.rest) + self._size

    def feed(self, data):
        """The Messages that data completes.  Raises FrameError, at the first fault."""
        size = len(data) - 4
        if not self._masked and self.between and 125 < size < 1 << 16 and (    # one whole text, as most of an
                data[:4] == b"\x81\x7e" + size.to_bytes(2, "big")):            # answer's are
            return [Message(TEXT, data[4:], data)]
        self.rest += data
        found: list[Message] = []
        while len(self.rest) >= self._need:
            start, self._need = self._bounds()
            if start and len(self.rest) >= self._need:
                found += self._take(start, self._need)
        return found

    def _bounds(self):
        """(start, end) of the payload of the frame that rest begins with; of its head (0, end) while that is
        not whole.  Raises FrameError."""
        rest = self.rest
        final, opcode, size = rest[0] >> 7, rest[0] & 15, rest[1] & 127
        misplaced = (not final or size > LONGEST_CONTROL) if opcode >= CLOSE else (
            (opcode == CONTINUATION) != bool(self._pieces))
        if misplaced or rest[0] & 0x70 or opcode not in OPCODES or rest[1] >> 7 != self._masked:
            raise FrameError(1002, f"a frame that cannot begin with {rest[:2].hex()} here")
        extra = {126: 2, 127: 8}.get(size, 0)
        start = 2 + extra + 4 * self._masked
        if len(rest) < start:
            return 0, start
        if extra:
            size = int.from_bytes(rest[2:2 + extra], "big")
            if size < (126 if extra == 2 else 1 << 16) or size >> 63:
                raise FrameError(1002, "a length that is not written in its shortest form")
        if self._size + size > self.limit:
            raise FrameError(1009, f"a message of more than {self.limit} bytes")
        return start, start + size

    def _take(self, start, end):
        """Take a whole frame off rest.  Gives the Messages that it completes: one or none."""
        with memoryview(self.rest) as rest:
            data = bytes(rest[:end])
        del self.rest[:end]
        self._need = 2
        piece = Message(data[0] & 15, unmasked(data[start:], data[start - 4:start]) if self._masked
                        else data[start:], data)
        if piece.opcode < CLOSE:
            self._pieces.append(piece)
            self._size += len(piece.payload)
            if not data[0] >> 7:
                return []
            opcodes, payloads, frames = zip(*self._pieces)
            piece = Message(opcodes[0], b"".join(payloads), b"".join(frames))
            self._pieces, self._size = [], 0
        if piece.opcode == CLOSE or self._masked and piece.opcode == TEXT:
            check_payload(*piece[:2])
        return [piece]


def unmasked(data, mask):
    """Bytes masked or unmasked (RFC 6455, 5.3)."""
    size = len(data)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ key).to_bytes(size, "little")


def check_payload(opcode, payload):
    """Raises FrameError for a close frame that may not be sent (RFC 6455, 5.5.1 and 7.4) and for text that
    is not UTF-8."""
    code = payload[:2] if opcode == CLOSE else b""
    if code and (len(code) == 1 or int.from_bytes(code, "big") not in CLOSE_CODES):
        raise FrameError(1002, "a close code that nobody may send")
    try:
        str(payload[len(code):], "utf-8")
    except UnicodeDecodeError:
        raise FrameError(1007, "a text that is not UTF-8") from None


def frame(opcode, payload, mask=b""):
    """One whole frame; with a mask of 4 bytes it is a client's."""
    size, masked = len(payload), 0x80 if mask else 0
    mark, width = (size, 0) if size < 126 else (126, 2) if size < 1 << 16 else (127, 8)
    head = bytes((0x80 | opcode, masked | mark)) + (size.to_bytes(width, "big") if width else b"")
    return head + mask + (unmasked(payload, mask) if mask else payload)


def packet(mask=b"", **members):
    """A text frame of the gateway's own: for a client, with a mask for LM Studio."""
    return frame(TEXT, json.dumps(members, separators=(",", ":")).encode(), mask)


# A row: namespace, the right that its endpoints need, the dialect of those that are inferences.
ANY_MODEL = ("listLoaded getModelInfo getLoadConfig getBasePredictionConfig getInstanceProcessingState "
             "estimateModelUsage tokenize countTokens getOrLoad ")
ENDPOINTS = {f"/{space}/{endpoint}": (right, dialect) for space, right, dialect, endpoints in (
    ("llm", "infer", SOCKET, "predict completeRawText"),    # channels; any other inference is a call
    ("embedding", "infer", EMBEDDINGS, "embedString"),
    ("llm", "infer", None, ANY_MODEL + "applyPromptTemplate preloadDraftModel"),
    ("embedding", "infer", None, ANY_MODEL),
    ("system", "infer", None, "listDownloadedModels listDownloadedModelVariants version alive"),
    ("files", "infer", None, "uploadFileBase64 getDocumentParsingLibrary retrieve parseDocument"),
    ("diagnostics", "view", None, "streamLogs"),    # everybody's prompts and answers
) for endpoint in endpoints.split()}
UNKNOWN_ENDPOINT = "admin", None    # one in no row, or in another namespace than here
OPENERS = {"rpcCall": "rpcError", "channelCreate": "channelError", "signalSubscribe": "signalError",
           "writableSignalSubscribe": "writableSignalError"}  # a packet that begins something -> its refusal
ID_NAMES = {"rpc": "callId", "cha": "channelId", "sig": "subscribeId", "wri": "subscribeId"}  # by its type
# As Node writes most messages of an answer: to find the id and the tokens costs a fifth of reading JSON.
FRAGMENT = re.compile(rb'\{"type":"channelSend","channelId":(\d{1,15}),"message":\{"type":"fragment",'
                      rb'"fragment":\{"content":"[^"\\]*(?:\\.[^"\\]*)*","tokensCount":(\d{1,9})[,}]')


def call_of(body):
    """(name of its id, number) of the call, channel or signal that a packet is about.  The number is None if
    it is no whole one that Node keeps exact.  LM Studio takes 5.0 for 5."""
    name = ID_NAMES.get(str(body.get("type"))[:3])
    number = body.get(name)
    if type(number) is float and number.is_integer():
        number = int(number)
    return name, number if type(number) is int and abs(number) < UNSAFE else None


def name_of(value):
    """A name in a message, as it is kept; None for none."""
    return bounded_text(value) if value and isinstance(value, str) else None


def model_named(specifier, instances):
    """The model that a specifier means, as it was asked for; None for any."""
    reference, query = name_of(specifier.get("instanceReference")), member(specifier, "query")
    return instances.get(reference) or name_of(query.get("identifier")) or name_of(query.get("path"))


def named_instances(body):
    """[(instance reference, identifier)] of the models that a message of LM Studio's describes."""
    result, content = body.get("result"), member(body, "message")
    rows = [*(result if isinstance(result, list) else [result]), content.get("info"),
            content.get("modelInfo")]
    found = [(name_of(row.get("instanceReference")), name_of(row.get("identifier"))) for row in listed(rows)]
    return [(reference, model) for reference, model in found if reference and model]


# --- 3.13 sharing: limits of keys, and turns -----------------------------------

PRIORITIES = ("high", "normal", "low")
RISE_S = 30.0  # of waiting raise a request by one priority
MINUTE_S, GRAIN_S = 60.0, 0.1  # amounts within GRAIN_S count as one
TIMES_KEPT, TIMES_NEEDED = 50, 3  # of a model's latest requests; before that nothing is foretold
LIMITS = {"running": "requests at once", "rpm": "requests in the last minute",
          "tpm": "tokens in the last minute", "tpd": "tokens today"}


class Terms(NamedTuple):
    """The limits of a key."""

    limits: dict = {}  # name in LIMITS -> number
    priority: str = "normal"
    models: tuple = ()  # globs; without any, every model
    expires: str = ""  # its last day (2026-12-31), if it has one


class Window:
    """Amounts of the last minute.  Clock readings are monotonic seconds."""

    def __init__(self):
        self._parts: deque[list] = deque()  # [clock, amount], oldest first
        self._total = 0

    def add(self, clock, amount):
        if self._parts and clock - self._parts[-1][0] < GRAIN_S:
            self._parts[-1][1] += amount
        else:
            self._parts.append([clock, amount])
        self._total += amount

    def used(self, clock):
        while self._parts and clock - self._parts[0][0] >= MINUTE_S:
            self._total -= self._parts.popleft()[1]
        return self._total

    def free_s(self, clock, limit):
        """Seconds until less than the limit is used."""
        left, free = self.used(clock), 0.0
        for since, amount in self._parts:
            if left < limit:
                break
            left, free = left - amount, since + MINUTE_S - clock
        return free


class Account:
    """The use of a key: in the last minute, and on this day, which has a name and so many s left."""

    def __init__(self):
        self.requests, self.tokens = Window(), Window()
        self._day = ""
        self.today: Counter[str] = Counter()

    def turn(self, day):
        """Another day has begun, or the clock was set."""
        if day != self._day:
            self._day, self.today = day, Counter()

    def refusal(self, limits, clock, left_s):
        """(name of a limit that is reached, the use, seconds until it is free), None if it may ask."""
        today = self.today["promptTokens"] + self.today["completionTokens"]
        for name, used, free_s in (("rpm", self.requests.used(clock), self.requests.free_s),
                                   ("tpm", self.tokens.used(clock), self.tokens.free_s),
                                   ("tpd", today, lambda *_: left_s)):
            if name in limits and used >= limits[name]:
                return name, used, free_s(clock, limits[name])
        return None

    def let_in(self, clock):
        self.requests.add(clock, 1)
        self.today["requests"] += 1

    def spend(self, clock, prompt, completion):
        """A request has ended."""
        self.tokens.add(clock, prompt + completion)
        self.today["promptTokens"] += prompt
        self.today["completionTokens"] += completion

    def headers(self, limits, clock):
        """x-ratelimit-*, as OpenAI's API has them, for the limits by the minute."""
        found = []
        for kind, name, window in (("requests", "rpm", self.requests), ("tokens", "tpm", self.tokens)):
            if name in limits:
                left, reset_s = max(0, limits[name] - window.used(clock)), window.free_s(clock, 1)
                found += [(f"x-ratelimit-{what}-{kind}", str(value)) for what, value in (
                    ("limit", limits[name]), ("remaining", left), ("reset", span(reset_s)))]
        return found


def span(seconds):
    """250ms, 1s, 6m0s: as OpenAI's x-ratelimit-reset-* have it."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms" if seconds else "0s"
    minutes, rest_s = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest_s}s" if minutes else f"{rest_s}s"


class Turn:
    """A request's place: it waits, then runs, then is over.  who: its owner in turns; about: the caller's."""

    def __init__(self, model, key, who, priority, clock):
        self.model, self.key, self.who, self.since = model, key, who, clock
        self.level = PRIORITIES.index(priority)  # rises while it waits
        self.number = 0  # in order of arrival
        self.began = None  # clock when its turn came
        self.over = False
        self.bell: Any = None
        self.about: Any = None


class Line:
    """The Turns of one model that run, and those that wait."""

    def __init__(self):
        self.running = set()  # of Turns
        self.queues = {}  # who -> deque of Turns that wait, in order of arrival
        self.rank_of = {}  # who -> rank of the first of these
        self.ranks = []  # the same, sorted: the first is next


class Scheduler:
    """Gives turns.  Pure: every caller brings the clock, and one lock guards all calls.

    Each model has so many slots.  A free one goes to the higher priority, then to whoever has the fewest
    running, then to whoever was served longest ago, then to the first.  A key may have a limit of its own."""

    def __init__(self, slots=0):
        self._slots = slots or math.inf
        self._lines: defaultdict = defaultdict(Line)  # by model, while there is something in it
        self._of_who: Counter[Any] = Counter()  # how many run
        self._of_key: Counter[Any] = Counter()
        self._served: dict = {}  # who -> number of the latest start, longest ago first
        self._times: dict = {}  # model -> deque of s that its latest requests ran
        self._rises: deque[tuple] = deque()  # (clock when its level rises, Turn), in this order
        self._numbers = itertools.count(1)
        self.limits: dict = {}  # key -> requests at once
        self.waiting = set()  # of Turns

    def join(self, turn, clock):
        """A request has come.  Gives the Turns that begin now, among them maybe this one."""
        turn.number = next(self._numbers)
        line = self._lines[turn.model]
        if not self.waiting and len(line.running) < self._slots and self._may_run(turn):
            self._begin(turn, clock)    # without a detour over the queue
            return [turn]
        self._enqueue(turn)
        begun = self.start(clock)
        if turn.began is None:
            self._rises.append((turn.since + RISE_S, turn))
        return begun

    def leave(self, turn, clock, done=False):
        """A request is over, wherever it was.  Gives the Turns that begin now."""
        if turn.over:
            return []
        turn.over = True
        if turn.began is None:
            self._dequeue(turn)
        else:
            self._lines[turn.model].running.discard(turn)
            self._count(turn, -1)
        if done and (turn.model in self._times or len(self._times) < NAMES_KEPT):
            self._times.setdefault(turn.model, deque(maxlen=TIMES_KEPT)).append(clock - turn.began)
        begun, line = self.start(clock), self._lines[turn.model]
        if not line.running and not line.queues:
            del self._lines[turn.model]
        return begun

    def start(self, clock):
        """Gives the Turns that begin now: as many as there is room for."""
        begun = []
        self._rise(clock)
        while self.waiting:
            rank = min(filter(None, map(self._next, self._lines.values())), default=None)
            if rank is None:
                break
            turn = rank[-1]
            self._dequeue(turn)
            self._begin(turn, clock)
            begun.append(turn)
        return begun

    def _begin(self, turn, clock):
        self._lines[turn.model].running.add(turn)
        turn.began = clock
        self._served.pop(turn.who, None)
        self._served[turn.who] = next(self._numbers)
        if len(self._served) > NAMES_KEPT:
            del self._served[next(iter(self._served))]
        self._count(turn, 1)

    def _next(self, line):
        """The rank of the Turn that a free slot of a line goes to, None while none may begin."""
        ranks = line.ranks if len(line.running) < self._slots else ()
        return next((rank for rank in ranks if self._may_run(rank[-1])), None)

    def _may_run(self, turn):
        """True unless as many of its key run as may."""
        return self._of_key.get(turn.key, 0) < self.limits.get(turn.key, math.inf)

    def _rise(self, clock):
        while self._rises and self._rises[0][0] <= clock:
            due, turn = self._rises.popleft()
            if turn in self.waiting and turn.level:
                turn.level -= 1
                self._rises.append((due + RISE_S, turn))
                self._rank(turn.who)

    def _count(self, turn, more):
        """One more of somebody's runs, or one less."""
        for counter, name in ((self._of_who, turn.who), (self._of_key, turn.key)):
            counter[name] += more
            if not counter[name]:
                del counter[name]
        if self.waiting:
            self._rank(turn.who)

    def _rank(self, who):
        """Somebody's rank may be another, in every line."""
        for line in self._lines.values():
            before = line.rank_of.pop(who, None)
            if before:
                del line.ranks[bisect.bisect_left(line.ranks, before)]
            if who in line.queues:
                line.rank_of[who] = self._rank_of(line.queues[who][0])
                bisect.insort(line.ranks, line.rank_of[who])

    def _rank_of(self, turn, ahead=0):
        """Less is sooner; ahead: how many of the same wait before it."""
        return (turn.level, self._of_who.get(turn.who, 0) + ahead, self._served.get(turn.who, 0),
                turn.number, turn)

    def _enqueue(self, turn):
        self._lines[turn.model].queues.setdefault(turn.who, deque()).append(turn)
        self.waiting.add(turn)
        self._rank(turn.who)

    def _dequeue(self, turn):
        queues = self._lines[turn.model].queues
        queues[turn.who].remove(turn)
        self.waiting.discard(turn)
        if not queues[turn.who]:
            del queues[turn.who]
        self._rank(turn.who)

    def rename(self, old, new):
        """Two names are one model's, as an answer has shown."""
        moved = [turn for turn in self.waiting if turn.model in (old, new)]
        moved.sort(key=lambda turn: turn.number)
        for turn in moved:
            self._dequeue(turn)
        running = self._lines.pop(old, Line()).running
        for turn in (*moved, *running):
            turn.model = new
        self._lines[new].running.update(running)
        for turn in moved:
            self._enqueue(turn)
        self._times.setdefault(new, deque(maxlen=TIMES_KEPT)).extend(self._times.pop(old, ()))

    def counts(self, key):
        """(how many of a key's requests run, how many wait)."""
        return self._of_key.get(key, 0), sum(turn.key == key for turn in self.waiting)

    def places(self, clock, left_s=lambda turn: 0.0):
        """[(Turn, {position, waiting, etaMs})] of those that wait; left_s(turn): time that one still needs at
        least that runs."""
        found = []
        for model, line in self._lines.items():
            order = sorted(self._rank_of(turn, ahead) for queue in line.queues.values()
                           for ahead, turn in enumerate(queue))
            for position, (rank, eta_s) in enumerate(zip(order, self._etas(model, clock, left_s)), 1):
                eta = {} if eta_s is None else {"etaMs": 1000 * math.ceil(eta_s)}
                found.append((rank[-1], {"position": position, "waiting": len(order), **eta}))
        return found

    def _etas(self, model, clock, left_s):
        """Seconds until the first, the second ... of those that wait has a slot; None if nothing tells."""
        times, running = sorted(self._times.get(model, ())), self._lines[model].running
        ends = []
        for turn in running if len(times) >= TIMES_NEEDED and len(running) >= self._slots else ():
            ran = clock - turn.began
            longer = times[bisect.bisect(times, ran):]  # it is one of the longer ones, if there were any
            ends += [max(median(longer) - ran, left_s(turn))] if longer else []
        if not ends or len(ends) < len(running):
            yield from itertools.repeat(None)
        ends.sort()
        while True:
            yield ends[0]
            bisect.insort(ends, ends.pop(0) + median(times))


# === 4. HUB: the shared state ================================================


class Listener:
    """One client's place in the ring."""

    def __init__(self, seq, owner=None):
        self.seq = self.sent = seq  # of the latest event that it has passed; that it was given
        self.owner = owner  # the key that may see its own events alone; None: it may see every event
        self.elsewhere = None  # the id after its latest event, which was another start's; None once told
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item ends Ring.wait()


class Ring:
    """The latest events, each as one frame for every listener.

    A listener waits until there is news, then takes the frames behind its place: publishing never waits.
    The ring forgets the oldest frames beyond its number or its bytes; a listener that has not read them is
    told so by `gap`."""

    EVENTS, BYTES = 10_000, 32_000_000  # that it holds at least, whichever is less
    BATCH = 4096  # frames that a listener looks through in one go

    def __init__(self):
        # Guards every field below; the counts and closed may be read without it.  Held for memory work only,
        # never across I/O.
        self._lock = threading.Lock()
        self.epoch = secrets.token_hex(4)
        self._frames = []  # (event name, name of the key that owns it, frame) of the events from _first on
        self._first = 1  # SEQ of _frames[0]
        self._bytes = 0  # of the frames
        self._waiting = set()  # bells of the listeners that have all there is
        self._owners: dict[str, str] = {}  # requestId -> name of its key
        self.listeners = 0
        self.closed = False
        self.counts: Counter[str] = Counter()  # events published, by name
        self.replays: Counter[str] = Counter()  # listeners that came back: full, gap
        self.dropped = 0  # events that slow listeners lost

    @property
    def last(self):  # lock held
        """SEQ of the latest event; 0 before the first."""
        return self._first + len(self._frames) - 1

    @property
    def last_id(self):
        """Any thread.  The id of the latest event."""
        with self._lock:
            return self.event_id(self.last)

    def event_id(self, seq):
        return f"{self.epoch}-{seq}"

    @contextlib.contextmanager
    def _changing(self):
        """Holds the lock; wakes the listeners once it is free again, if there is news for them."""
        with self._lock:
            before, bells = self.last, set()
            yield
            if self.last > before or self.closed:
                bells, self._waiting = self._waiting, set()
        wake(bells)

    def publish(self, events):
        """Any thread.  Appends the events in order and wakes the listeners.  Never blocks."""
        encoded = [self._encoded(event) for event in events if event.name]
        with self._changing():
            self._append(*encoded)

    def _encoded(self, event):
        """Any thread.  An event's name, the key that owns it, and its data as JSON."""
        owner = self._owners.get(event.data.get("requestId", "")) if event.name != "lmstudio_log" else None
        return event.name, owner, to_json(event.data)

    def _append(self, *encoded):  # lock held
        for seq, (name, owner, data) in enumerate(encoded, self.last + 1):
            frame = sse_frame(self.event_id(seq), name, data)
            self._frames.append((name, owner, frame))
            self._bytes += len(frame)
            self.counts[name] += 1
        dropped, surplus = 0, len(self._frames) - self.EVENTS
        for _, _, frame in self._frames:
            if dropped >= surplus and self._bytes - len(frame) < self.BYTES:
                break
            self._bytes -= len(frame)
            dropped += 1
        del self._frames[:dropped]
        self._first += dropped

    @contextlib.contextmanager
    def listening(self, since="", owner=None):
        """Any thread.  Yields the Listener for a client that saw the event with the id since last; with an
        owner it gets the events of that key's requests alone."""
        match = re.fullmatch(r"(?:([!-~]{1,64})-)?(\d{1,18})", since or "", re.ASCII)
        with self._lock:
            listener = Listener(self.last, owner)
            if match:
                self._resume(listener, match[1] or self.epoch, int(match[2]))
            self.listeners += 1
        try:
            yield listener
        finally:
            with self._lock:
                self.listeners -= 1
                self._waiting.discard(listener.bell)

    def _resume(self, listener, epoch, seq):  # lock held
        if epoch == self.epoch:
            listener.seq = listener.sent = min(seq, self.last)
        else:
            listener.seq, listener.sent, listener.elsewhere = -1, self._first - 1, f"{epoch}-{seq + 1}"
        self.replays["gap" if listener.seq < self._first - 1 else "full"] += 1

    def read(self, listener, names=(), most=math.inf):
        """Any thread.  (frames behind the listener's place, data of a gap before them or None); the listener
        goes on behind them.  names: only these events, if any; most: bytes, beyond which one frame may reach.
        """
        with self._lock:
            gap, lost = None, self._first - 1 - listener.seq
            if lost > 0:
                count = None if listener.elsewhere else lost
                gap = {"from": listener.elsewhere or self.event_id(listener.seq + 1),
                       "to": self.event_id(self._first - 1), "count": count}
                self.dropped += count or 0
                listener.seq, listener.elsewhere = self._first - 1, None
            start = listener.seq + 1 - self._first
            batch = self._frames[start:start + self.BATCH]
        frames, size = [], 0  # batch must not outlive this call: it keeps frames that the ring forgets
        for name, owner, frame in batch:
            if size >= most:
                break
            listener.seq += 1
            if (not names or name in names) and listener.owner in (None, owner):
                frames.append(frame)
                listener.sent, size = listener.seq, size + len(frame)
        return frames, gap

    def wait(self, listener, timeout_s):
        """Any thread.  Returns when there are events behind the listener, its bell rings, or time is up."""
        with self._lock:
            if listener.seq < self.last or self.closed:
                return
            self._waiting.add(listener.bell)
        with contextlib.suppress(queue.Empty):
            listener.bell.get(timeout=max(0.0, timeout_s))

    def close(self):
        """Any thread.  Wakes every listener; closed is True from now on."""
        with self._changing():
            self.closed = True


def wake(bells):
    for bell in bells:
        bell.put(None)


class Hub(Ring):
    """The Ring, and all that requests and log have in common: records, figures, series.

    keep takes the history rows of requests that are over, if there is a history."""

    # How the log begins to tell of a model that is loaded or unloaded (10-2025 to 09-2026).
    LOADS = re.compile(r"(?:\[[^]\n]*\])*:? ?(?:Requested model .* is not loaded|(?:Unl|L)oading model\b"
                       r"|Model (?:un)?loaded\b|load_model: load|\w+::load called)")

    def __init__(self, kept=100, keep=None, now=time.time, clock=time.monotonic):
        super().__init__()
        self._now, self._clock, self._keep = now, clock, keep
        self._requests = Requests(self.epoch, kept)
        self._figures = Figures()
        self._series = Series(now())
        self.loads = 0  # lines of the log that tell of a model that is loaded or unloaded
        self._ids = itertools.count(1)

    def request_id(self):
        """Any thread.  A new id, like no other of this or another start."""
        return f"req_{self.epoch}{next(self._ids):06x}"

    def now(self):
        """This moment as the events have it."""
        return utc_text(self._now())

    # --- the life of a request, and the log beside it

    def begin(self, record):
        """Any thread.  A request goes to LM Studio."""
        start = record.start_event(self.now())
        with self._changing():
            if record.key is not None:
                self._owners[record.id] = record.key
                if len(self._owners) > self.EVENTS:
                    del self._owners[next(iter(self._owners))]
            self._requests.begin(record)
            record.note(start, record.clock)
            self._append(self._encoded(start))

    def _tell(self, record, clock):  # lock held
        self._append(self._encoded(record.progress_event(self.now(), clock)))

    def generated(self, record, tokens, first):
        """Any thread.  The answer of a running request has so many tokens; the first came at clock first."""
        with self._changing():
            clock = self._clock()
            record.generated(tokens, first)
            if record.due(clock):
                self._tell(record, clock)

    def learned(self, record, events):
        """Any thread.  LM Studio told a running request's client how far its prompt is, as events."""
        with self._changing():
            clock = self._clock()
            due = [record.take(event, clock) for event in events]   # each is taken
            if any(due):
                self._tell(record, clock)

    def place(self, placed):
        """Any thread.  These (Record, place) wait for their turn."""
        with self._changing():
            clock = self._clock()
            for record, place in placed:
                if record.wait(place, clock):
                    self._tell(record, clock)

    def send(self, record):
        """Any thread.  A request's turn has come."""
        with self._lock:
            record.send(self._clock())

    def end(self, record, outcome):
        """Any thread.  A request is over.  Later calls do nothing."""
        with self._changing():
            clock = self._clock()
            if not self._requests.over(record, clock, outcome):
                return
            end = record.end_event(self.now())
            record.note(end, clock)
            self._figures.count_request(record)
            self._append(self._encoded(end))

    def publish_log(self, events, looked=math.inf):
        """Tail thread.  Joins the log's events with requests, then publishes them and the progress made.
        looked: as for Requests.see().

        The lock is free between the two, because a batch takes long to encode: a request can end there, and
        nothing may be told of its progress then."""
        with self._lock:
            clock = self._clock()
            told = self._requests.see(events, clock, looked)
            for event in events:
                self._figures.count_event(event)
                self.loads += event.name == "lmstudio_log" and bool(self.LOADS.match(event.data["message"]))
            self._count_changed()
        self.publish(events)
        with self._changing():
            for record in told:
                if record.ended is None or record.source == "lmstudio":
                    self._tell(record, clock)

    def _count_changed(self):  # lock held
        """Figures, series and history learn of requests that are over, or changed after their end.  No client
        waits for that: the tail thread does it at its next look, or whoever asks for the figures before."""
        changed = {record.id: record for record in self._requests.changed}
        self._requests.changed = []
        rows = [history_row(record) for record in changed.values()]
        for record, row in zip(changed.values(), rows):
            if record.source == "gateway":
                self._figures.count_tokens(record)
            record.tallied = self._series.take(dict(zip(HISTORY_NAMES, row), agent=record.agent),
                                               record.tallied)
        if rows and self._keep:
            self._keep(rows)

    def count(self):
        """Any thread.  What is over by now is in figures, series and history."""
        with self._lock:
            self._count_changed()

    def close(self):
        self.count()
        super().close()

    def reject(self, code):
        """Any thread.  A request was turned away here; code is our error's."""
        with self._lock:
            self._figures.count_rejection(code)

    # --- for views

    def served(self, asked):
        """Any thread.  The model that has answered to a name, else the name."""
        with self._lock:
            return self._requests.served(asked)

    def comment(self, record):
        """Any thread.  How far a running request is, as an SSE comment."""
        with self._lock:
            return f": {record.told(self._clock())}\n\n".encode()

    def shown(self, limit=None, owner=None):
        """Any thread.  The requests as /debug/requests shows them: running ones first, each newest first;
        with an owner, those of that key."""
        with self._lock:
            clock, found = self._clock(), self._requests
            records = itertools.chain(reversed(found.running.values()), reversed(found.finished))
            return [record.shown(clock) for record in itertools.islice(
                (record for record in records if owner in (None, record.key)), limit)]

    def overview(self, count):
        """Any thread.  (running requests, the latest count that are over, the model of the newest request
        that has one)."""
        with self._lock:
            clock = self._clock()
            running, over = (list(reversed(part)) for part in (
                self._requests.running.values(), self._requests.finished))
            models = (record.model or record.model_asked for record in (*running, *over))
            shown = [record.shown(clock) for record in (*running, *over[:count])]
            return shown[:len(running)], shown[len(running):], next(filter(None, models), None)

    def detail(self, request_id):
        """Any thread.  One request with its timeline and sampling parameters; None when it is not known."""
        with self._lock:
            record = self._requests.find(request_id)
            if record is None:
                return None
            timeline = [{"ms": ms, "event": name, "data": data} for ms, name, data in record.timeline]
            return {**record.shown(self._clock()), "sampling": record.sampling, "timeline": timeline}

    def totals(self):
        """Any thread.  Requests through us, those of them that failed or were left, and bindings so far."""
        with self._lock:
            found = self._requests
            return {"totalRequests": found.total, "totalErrors": found.errors,
                    "totalAbandoned": found.abandoned, "bindings": found.bound()}

    def series(self, begin):
        """Any thread.  (since when it knows every request, the cells of those that ended from begin on)."""
        self.count()
        with self._lock:
            return self._series.since, self._series.cells(begin)

    def models(self):
        """Any thread.  {model: (running, waiting, when it last answered or None, its state is loading)}."""
        self.count()
        with self._lock:
            found: dict[Any, list] = {name: [0, 0, used, False] for name, used in self._series.used.items()}
            for record in self._requests.running.values():
                model = record.model or self._requests.served(record.model_asked)
                row = found.setdefault(model, [0, 0, None, False])
                row[record.state == "queued"] += 1
                row[2], row[3] = self._now(), record.state == "loading"
            return found

    def performance(self):
        """Any thread.  `performance` of /debug/metrics."""
        self.count()
        with self._lock:
            ours = [record for record in self._requests.finished if record.source == "gateway"]
            return performance(ours, self._requests, self._figures.tokens())

    def exposition(self, gauges):
        """Any thread.  All figures as Prometheus text; gauges are those that others know."""
        self.count()
        with self._lock:
            return self._figures.exposition({**gauges, **self._figures.gauges(self._requests)})


# --- 4.2 history: finished requests in an SQLite file ------------------------

HISTORY = (  # column, type, its value; no prompt and no answer
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
    ("user", "TEXT", lambda record: record.user),
    ("queued_ms", "REAL", lambda record: record.queued_ms()),
)
HISTORY_NAMES, HISTORY_TYPES, HISTORY_VALUES = zip(*HISTORY)
ADDED = {"user", "queued_ms"}  # columns that files of an earlier version lack
GROUPS = {  # the ways to sum usage
    "key": "COALESCE(key, CASE source WHEN 'lmstudio' THEN 'not via gateway' ELSE 'no key' END)",
    "model": "COALESCE(model, model_asked, 'unknown')",
    "day": "date(started, 'unixepoch', 'localtime')",
    "user": "COALESCE(user, key, 'no user')",
}
LEFT_SQL = f"(outcome = 'abandoned' OR COALESCE(operation, '') IN {LEFT})"  # as was_left() has it
SUMS = (  # name in the answer, SQL
    ("requests", "COUNT(*)"), ("errors", f"SUM(outcome <> 'done' AND NOT {LEFT_SQL})"),
    ("promptTokens", "COALESCE(SUM(prompt_tokens), 0)"), ("cachedTokens", "COALESCE(SUM(cached_tokens), 0)"),
    ("completionTokens", "COALESCE(SUM(completion_tokens), 0)"),
    ("promptSeconds", "ROUND(COALESCE(SUM(prompt_ms), 0) / 1000, 1)"),
    ("generationSeconds", "ROUND(COALESCE(SUM(generation_ms), 0) / 1000, 1)"),
    ("promptTokensPerSecond",
     "ROUND(1000 * SUM(fresh_tokens) / SUM(CASE WHEN fresh_tokens > 0 THEN prompt_ms END), 1)"),
    ("tokensPerSecond",
     "ROUND(1000 * SUM(timed_tokens) / SUM(CASE WHEN timed_tokens > 0 THEN generation_ms END), 1)"),
    ("abandoned", f"SUM({LEFT_SQL})"))
TIMED = ("(SELECT *, CASE WHEN prompt_ms > 0 THEN prompt_tokens - COALESCE(cached_tokens, 0) END AS "
         "fresh_tokens, CASE WHEN generation_ms > 0 THEN completion_tokens END AS timed_tokens "
         "FROM requests)")


def history_row(record):
    return tuple([value(record) for value in HISTORY_VALUES])


def storable(value):
    """A value that SQLite takes and can sum: a client or LM Studio may name any text and any number."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value if value is None else max(-10**12, min(value, 10**12))


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

    A thread commits rows as they come; WAL lets a process die at any moment without harm to rows that are
    committed.  No file is held open: one that was removed is made anew, and that is said.  So is trouble,
    once: the latest ROWS wait and are tried again.  Raises HistoryError if the file is no database or
    cannot be written."""

    ROWS = 10_000
    PAUSE_S, RETRY_S = 0.2, 1.0  # after a commit; after one that failed
    LOCK_S = 2.0    # to wait for another process that writes
    PRUNE_S = 3600.0  # between two looks for rows that are too old

    def __init__(self, path, days=0):
        self.path, self._days, self._pruned = path, days, -math.inf
        self._lock = threading.Lock()  # guards the next two
        self._rows: list[tuple] = []  # not yet committed
        self._lost = 0  # rows that were too many to wait
        self._news, self._end = threading.Event(), threading.Event()
        with open_history(path):
            pass
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def keep(self, rows, first=False):
        """Have rows written; a row with a known id takes the place of the old one.  Never waits."""
        with self._lock:
            place = 0 if first else len(self._rows)
            self._rows[place:place] = rows
            surplus = max(0, len(self._rows) - self.ROWS)
            del self._rows[:surplus]
            self._lost += surplus
        self._news.set()

    def close(self):
        """Write the rows that are left; waits for it, 5 s at most."""
        self._end.set()
        self._news.set()
        self._thread.join(5.0)

    def usage(self, group, since=0.0):
        """Sums by one of GROUPS.  Raises HistoryError."""
        with open_history(self.path) as connection:
            return usage_rows(connection, [group], since)

    def ended(self, begin, end):
        """Series of the requests that ended from begin until end (epoch seconds).  Raises HistoryError."""
        found = Series(begin, MOST_MINUTES + STEPS[-1])
        with open_history(self.path) as connection:
            for row in connection.execute(
                    f"SELECT {', '.join(HISTORY_NAMES)} FROM requests WHERE started >= ? "
                    "AND started + COALESCE(total_ms, 0) / 1000 BETWEEN ? AND ?",
                    (begin - 86400, begin, end - 1e-3)):
                found.take(dict(zip(HISTORY_NAMES, row)))
        return found.cells(begin)

    def _run(self):
        """Body of the history thread."""
        over = failing = False
        while not over:
            self._news.wait()
            self._news.clear()
            over = self._end.is_set()  # asked first: rows that came before the end are still written
            with self._lock:
                rows, self._rows = self._rows, []
            gone = not os.path.exists(self.path)
            try:
                self._write(rows)
                if gone or failing:
                    log.warning("history %s: %s", self.path, "the file was gone, a new one is begun" if gone
                                else "it is written again")
                failing = False
            except HistoryError as error:
                if not failing:
                    log.error("history %s: %s; until then the latest %d rows wait",
                              self.path, error, self.ROWS)
                failing = True
                self.keep(rows, first=True)
            self._end.wait(self.RETRY_S if failing else self.PAUSE_S)
        if self._rows or self._lost:
            log.error("history %s: %d requests are missing in it", self.path, len(self._rows) + self._lost)

    def _write(self, rows):
        with open_history(self.path) as connection:
            store_rows(connection, rows)
            if self._days and time.monotonic() - self._pruned > self.PRUNE_S:
                self._pruned = time.monotonic()
                remove_rows(connection, time.time() - 86400 * self._days)


def requests_by_key(path, since=0.0):
    """{key or None: (requests, prompt tokens, completion tokens, epoch of the latest)} of our requests.
    Raises HistoryError."""
    with open_history(path) as connection:
        return {key: row for key, *row in connection.execute(
            "SELECT key, COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
            "MAX(started) FROM requests WHERE source = 'gateway' AND started >= ? GROUP BY key", (since,))}


@contextlib.contextmanager
def open_history(path):
    """Yields a connection to a history, whose file is its owner's alone; makes the file and the table if they
    are missing.  Raises HistoryError, also for what fails meanwhile."""
    import sqlite3  # here, because it takes 2 MB that only --history and --report need

    try:
        if path != ":memory:":  # SQLite's other two files take the mode of this one
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)   # one that was there, too
        with contextlib.closing(sqlite3.connect(path, timeout=History.LOCK_S)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            make_table(connection)
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise HistoryError(f"{error}; name a file that can be written and is a history or new") from None


def make_table(connection):
    """Make the table, or add the columns that a file of an earlier version lacks."""
    columns = ", ".join(f"{name} {kind}" for name, kind, _ in HISTORY)
    with connection:
        connection.execute(f"CREATE TABLE IF NOT EXISTS requests ({columns})")
        have = {row[1] for row in connection.execute("PRAGMA table_info(requests)")}
        lacks = [(name, kind) for name, kind, _ in HISTORY if name not in have]
        known = {name for name, _ in lacks} <= ADDED    # else it is another program's
        for name, kind in lacks if known else ():
            connection.execute(f"ALTER TABLE requests ADD COLUMN {name} {kind}")
        connection.execute("CREATE INDEX IF NOT EXISTS requests_started ON requests (started)")


def remove_rows(connection, before):
    with connection:
        connection.execute("DELETE FROM requests WHERE started < ?", (before,))


def store_rows(connection, rows):
    with connection:
        marks = ", ".join("?" * len(HISTORY))
        connection.executemany(f"INSERT OR REPLACE INTO requests VALUES ({marks})",
                               (tuple(map(storable, row)) for row in rows))


# === 5. TAIL: files to chunks ================================================

PIECE = 64 * 1024  # bytes of one read of a saved log, or of a socket
SETTINGS_NAME = "http-server-config.json"
MONTH = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])", re.ASCII)
LOG_NAME = re.compile(r"(\d{4}-\d\d-\d\d)\.(\d+)\.log", re.ASCII)


class LogFile(NamedTuple):
    """A server log by its place in time.  N is a number: 10 follows 9."""

    month: str
    day: str
    number: int
    path: str


def list_logs(directory, since=None):
    """The server logs of a log directory, oldest first; only plain files, and only those after since.

    Raises OSError when the directory itself cannot be listed."""
    found = []
    for month in os.listdir(directory):
        if MONTH.fullmatch(month) and (since is None or month >= since.month):
            path = os.path.join(directory, month)
            with contextlib.suppress(OSError):
                matches = filter(None, map(LOG_NAME.fullmatch, os.listdir(path)))
                found += [LogFile(month, match[1], int(match[2]), os.path.join(path, match[0]))
                          for match in matches if is_date(match[1])]
    return sorted(log_file for log_file in found
                  if (since is None or log_file > since) and os.path.isfile(log_file.path))


def written_instead(directory, newest):
    """The older log that was written after newest, if the day in newest's name has not come; else None.

    Raises OSError."""
    today = datetime.date.today().isoformat()
    if newest.day <= today:
        return None
    past = [log_file for log_file in list_logs(directory) if log_file.day <= today]
    return past[-1] if past and os.stat(past[-1].path).st_mtime > os.stat(newest.path).st_mtime else None


def switch_event(old, new, utc):
    """The event for the way from one log file to the next, by their paths."""
    months = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in (old, new)]
    if months[0] != months[1] and all(map(MONTH.fullmatch, months)):
        return Event("lmstudio_month_transition",
                     {"timestamp": utc, "oldDirectory": os.path.dirname(old),
                      "newDirectory": os.path.dirname(new), "newLogFile": new})
    return Event("lmstudio_file_switch", {"timestamp": utc, "oldLogFile": old, "newLogFile": new})


def open_plain(path):
    """A plain file, open for reading bytes.  Raises OSError for anything else: a FIFO or a device could make
    whoever opens or reads it wait for ever."""
    never_waiting = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | never_waiting))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no plain file", path)
    return file


def own_home():
    """The user's home directory; for a user without one, as containers have them, a `~` that is not there."""
    return Path(os.path.expanduser("~"))


def find_home(home=None):
    """LM Studio's home directory, as its own SDK finds it: the pointer file, else ~/.cache/lm-studio,
    else ~/.lmstudio (lmstudio-js, findLMStudioHome.ts).  Never writes the pointer."""
    home = Path(home) if home else own_home()
    with contextlib.suppress(OSError), open_plain(home / ".lmstudio-home-pointer") as file:
        pointed = file.read(PIECE).decode("utf-8", "replace").strip()
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
    """The file of LM Studio's server settings; the app's place when there is none."""
    places = [home / ".internal" / SETTINGS_NAME, home / "apps" / "bionic" / ".internal" / SETTINGS_NAME]
    return next((path for path in places if os.path.exists(path)), places[0])


def read_settings(home):
    """LM Studio's settings as a dict.  Raises OSError if there are none, ValueError for no JSON object."""
    with open_plain(settings_path(home)) as file:
        settings = json_object(file.read())
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
    """os.stat_result of a file, by opening it if the directory's figures can be stale (Windows)."""
    if os.name != "nt":
        return os.stat(path)
    with open_plain(path) as file:
        return os.fstat(file.fileno())


class Follower:
    """Follows the newest log of a directory.  next_news() gives the bytes that are there; it never waits.

    Only the tail thread calls methods; other threads may read the fields."""

    PIECE, PIECE_MOST = 8 * 1024, 1024 * 1024  # bytes of one read; more while there is a backlog
    LATE_S = 0.0025  # of CPU for a piece: with the hub's lock held for longer than the interpreter's switch
    # interval of 5 ms, a stream would be late by more than 10 ms
    PATIENCE_S = 10.0  # an old file that cannot be read holds up a newer one for so long
    LOOK_S = 0.1  # between listings of the directory
    ANCHOR = 64  # bytes before our position that must still be there
    HEAD = 1024  # first bytes that tell a file from its replacement
    REMEDY = ("I keep looking. Start LM Studio's server, or name its log directory with --log-dir "
              "(LMSTUDIO_LOG_DIR)")

    def __init__(self, directory, from_start=False, started=0.0):
        self.directory = directory
        self._started = started  # epoch seconds: files that were written before are history
        self.file: Any = None  # LogFile that is read, None before the first
        self.position = 0  # bytes of it that have been read
        self.size = 0  # its size when last looked at
        self.problem = None  # why nothing can be read, in words for a person
        self._piece = self.PIECE  # bytes of the next read
        self._seen = None  # (device, inode, mtime) of the file when last read
        self._unread_since = None  # when reading it began to fail
        self._head = self._anchor = b""
        self._from_start = from_start
        self._first_look = True
        self._looked = -math.inf  # when the directory was listed
        self._newer = []  # log files after self.file, oldest first

    @property
    def behind(self):
        """Bytes that are written and not yet read."""
        return max(0, self.size - self.position)

    def pace(self, spent_s):
        """Adapt the size of the next piece to the backlog and to the CPU seconds that the latest one took."""
        change = 0.5 if spent_s > self.LATE_S else 2 if spent_s < self.LATE_S / 2 else 1
        self._piece = max(self.PIECE, min(int(self._piece * change), self.behind, self.PIECE_MOST))

    def next_news(self, now):
        """A chunk (bytes), a LogFile to which reading went on, None for a file that was replaced or
        ended, or b"" for nothing new.  now: seconds of a clock that does not jump."""
        if now - self._looked >= self.LOOK_S:
            self._looked = now
            self._look_around()
        if self.file is None:
            return self._advance() if self._newer else b""
        try:
            finished = self._may_advance()  # asked first: the old file gets no more than it holds by then
            news = self._read()
            self._unread_since = None
            return self._advance() if news == b"" and finished else news
        except FileNotFoundError:
            return self._advance() if self._newer else b""  # its directory tells the reason
        except OSError as error:
            self._complain(f"cannot read {self.file.path}: {error.strerror or error}")
            self._unread_since = self._unread_since or now
            late = now - self._unread_since > self.PATIENCE_S
            return self._advance() if late and self._may_advance() else b""

    def _look_around(self):
        """Notice newer files."""
        try:
            logs = list_logs(self.directory, self.file)
            growing = self.file and written_instead(self.directory, self.file)
        except OSError as error:
            self._newer, self._first_look = [], False
            self._complain(f"cannot read the log directory {self.directory}: {error.strerror or error}")
            return
        if self.file is None and not logs:
            self._complain(f"no log files in {self.directory} yet")
        elif growing:
            self._complain(f"{self.file.path} lies in the future by its name, and LM Studio writes "
                           f"{growing.path}", "Move the former away and start lmgateway again")
        elif self._unread_since is None:
            self.problem = None
        self._newer = self._begin(logs) if self.file is None and logs else logs
        self._first_look = False

    def _begin(self, logs):
        """The files to read when none has been read yet.  Those that are there at start-up are history."""
        if self._first_look and self._from_start:
            return logs[-1:]
        if not self._first_look:
            with contextlib.suppress(OSError):
                recent = [new for new in logs if file_state(new.path).st_mtime >= self._started]
                if recent:
                    return recent
        self.file = logs[-1]
        try:
            found = file_state(self.file.path)
            self.position = self.size = found.st_size
            self._seen = (found.st_dev, found.st_ino, found.st_mtime_ns)
            with open_plain(self.file.path) as file:
                self._go_to_end(file)
        except OSError as error:
            self._complain(f"cannot read {self.file.path}: {error.strerror or error}")
        log.info("Monitoring log file: %s", self.file.path)
        return []

    def _may_advance(self):
        """True when a newer file has bytes, so that the old one will get no more."""
        for log_file in self._newer:
            with contextlib.suppress(OSError):
                if file_state(log_file.path).st_size:
                    return True
        return False

    def _advance(self):
        self.file, self._newer = self._newer[0], self._newer[1:]
        self.size = 0
        self._start_over()
        self.problem = self._unread_since = None
        log.info("Monitoring log file: %s", self.file.path)
        return self.file

    def _start_over(self):
        self.position, self._head, self._anchor, self._seen = 0, b"", b"", None

    def _read(self):
        """The next piece of the file; b"" at its end; None when it is not the file we knew."""
        found = file_state(self.file.path)
        self.size, seen = found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns)
        if self.size == self.position and seen == self._seen:
            return b""
        with open_plain(self.file.path) as file:
            if not self._is_ours(file):
                return None
            chunk = file.read(self._piece)
        self._seen, self.problem = seen, None
        if len(self._head) == self.position:
            self._head = (self._head + chunk)[:self.HEAD]
        self._anchor = (self._anchor + chunk)[-self.ANCHOR:]
        self.position += len(chunk)
        return chunk

    def _is_ours(self, file):
        """Go to our position.  False when the file has no longer the bytes before it.

        One that was cut short goes on at its end; another is read from its start."""
        head = file.read(len(self._head))
        file.seek(self.position - len(self._anchor))
        if self.size >= self.position and head == self._head and file.read(len(self._anchor)) == self._anchor:
            return True
        if 0 < self.size < self.position and self._head.startswith(head):
            self._go_to_end(file)
        else:
            self._start_over()
        return False

    def _go_to_end(self, file):
        """All that the file has is read."""
        self.position = self.size
        file.seek(0)
        self._head = file.read(min(self.HEAD, self.size))
        file.seek(max(0, self.size - self.ANCHOR))
        self._anchor = file.read(min(self.ANCHOR, self.size))

    def _complain(self, problem, remedy=REMEDY):
        if problem != self.problem:
            self.problem = problem
            log.warning("%s; %s", problem, remedy)


class LogVolume:
    """How much room a log directory takes and its disk has left.  Any thread; looked at once a minute."""

    LOW_BYTES = 2_000_000_000  # a disk with less room than this is worth a warning

    def __init__(self, directory, warn_bytes):
        self.directory, self._warn_bytes = directory, warn_bytes
        self._known: tuple = (-math.inf, {})    # (clock, facts)

    def facts(self, max_age_s=60.0):
        """{directoryBytes, growthBytesPerDay, freeBytes (None: unknown), warnings (with the remedy)}"""
        if time.monotonic() - self._known[0] >= max_age_s:
            self._known = time.monotonic(), self._look()
        return self._known[1]

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
        if free is not None and free < max(self.LOW_BYTES, 3 * (growth or 0)):
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

    YIELD_S = 0.0005  # between two pieces, so that a backlog does not hold up the proxy
    BUSY_S, IDLE_S = 0.01, 0.1  # pauses between looks while bytes flow, and after CALM_S without any
    CALM_S = 5.0
    QUIET_S = 0.2  # an entry without a next header is complete after this
    MIDLINE_S = 2.0  # a line without an end is taken as it is after this

    def __init__(self, follower, clock=time.monotonic, now=time.time):
        self.follower, self.parser = follower, Parser()
        self._clock, self._now = clock, now
        self._last_news = self.looked = -math.inf  # when bytes came last; when it looked last
        self._settled = True  # quiet() has been told since then
        self.read = 0  # bytes
        self.switches: Counter[str] = Counter()

    def run(self, publish, wait):
        """Until wait(seconds) returns True; lines that are there by then are told, too.  publish takes a list
        of events."""
        over = False
        while not over:
            began = time.thread_time()
            events, pause = self.step()
            publish(events)  # none, too: the join looks again
            self.follower.pace(time.thread_time() - began)
            over = wait(pause)
        last = [*self.step()[0], *self.parser.end(torn=False)]
        if last:
            publish(last)

    def step(self):
        """(events, seconds to wait before the next step)."""
        self.looked = now = self._clock()
        old, news = self.follower.file, self.follower.next_news(now)
        if news:
            return self._take(news, old, now), self.YIELD_S
        if news is None:
            events = self.parser.end()
            self.parser.forget()
            return events, 0
        since, midline = now - self._last_news, self.parser.midline
        if not self._settled and since >= (self.MIDLINE_S if midline else self.QUIET_S):
            self._settled = True
            return (self.parser.end() if midline else self.parser.quiet()), self.BUSY_S
        return [], self.BUSY_S if since < self.CALM_S else self.IDLE_S

    def _take(self, news, old, now):
        if isinstance(news, bytes):
            self._last_news, self._settled = now, False
            self.read += len(news)
            return self.parser.feed(news)
        if old is None:
            return []
        events = self.parser.end()  # and not forget(): LM Studio may go on with an entry in the next file
        event = switch_event(old.path, news.path, utc_text(self._now()))
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
    """The bytes of a saved log, in pieces.  Raises StartError if it cannot be read, ConfigError if it begins
    like no log: as PowerShell writes text, or packed."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            piece = file.read(PIECE)
            if piece.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ConfigError(f"{path}: it is UTF-16; save it as UTF-8 (PowerShell: Out-File "
                                  "-Encoding utf8)")
            if piece.startswith((b"\x1f\x8b", b"PK\3\4", b"\x28\xb5\x2f\xfd")):
                raise ConfigError(f"{path}: it is packed; unpack it first")
            while piece:
                yield piece
                piece = file.read(PIECE)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror or error}") from None


def saved_logs(paths):
    """The files that paths name, each directory's in date order.  Raises ConfigError if there is none."""
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
    """The plain log files directly in a directory, server logs by date and number, others by name."""
    names = sorted(os.listdir(directory), key=lambda name: (*log_place(name), name))
    paths = [os.path.join(directory, name) for name in names if name.endswith(".log")]
    return list(filter(os.path.isfile, paths))


def log_place(path):
    """(day, number) of a server log by its name; ("", 0) for any other file."""
    match = LOG_NAME.fullmatch(os.path.basename(path))
    return (match[1], int(match[2])) if match else ("", 0)


# === 6. UPSTREAM: requests to LM Studio ======================================

REUSE_S = 2.0  # LM Studio closes a kept connection after 5 s without a request
MATURE_S = 0.01  # a server that closes after each answer has closed by then
IDLE_KEPT = 64
REPEATABLE = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")  # idempotent methods (RFC 9110, 9.2.2)
CONNECT_S = 10.0
UPGRADE_S = 5.0  # for LM Studio to take a WebSocket
INTRODUCTION_S = 10.0  # for its client's first message, as LM Studio has it; the same for the answer
QUESTION_S = 3.0  # for a question of our own, all in all: reading a prompt on the CPU makes LM Studio slow
GREETING_S = 0.3  # `lms` waits 500 ms in all
ANSWER_HEAD_LIMIT = 256 * 1024  # bytes, with all that is said before it
MODELS_S = 60.0  # each question stands in the user's log
SMALL_BODY = 64 * 1024  # travels in one packet with its head
SLICE = 1024 * 1024     # of a large body, which has the timeout for itself
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # s; probes
STREAM_TYPES = ("text/event-stream", "application/x-ndjson")
HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-authenticate", "proxy-authorization",
                        "proxy-connection", "te",
                        "trailer", "transfer-encoding", "upgrade"))  # RFC 9110, 7.6.1
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
LENGTH = re.compile(r"[0-9]{1,18}")
BROKEN = (OSError, http.client.HTTPException)  # how a connection to LM Studio fails
TIMEOUTS = (TimeoutError, socket.timeout, BlockingIOError)   # the last one is the kernel's: set_timeout()
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)    # of a socket that does not wait


class UpstreamError(HttpError):
    """LM Studio gave no answer, or broke it off."""

    def __init__(self, status, kind, message):
        super().__init__(status, f"upstream_{kind}", message)


def upstream_error(error, option, begun):
    """The UpstreamError for a connection that failed before its answer had begun, or after; option: its
    timeout's."""
    why = error_text(error)
    if isinstance(error, TIMEOUTS) and error.errno != errno.ETIMEDOUT:  # which is for a machine that went off
        remedy = "" if begun else f". Raise {option}, or look at its log for what it is doing"
        return UpstreamError(504, "timeout", f"LM Studio was silent for too long{remedy}")
    if begun:
        return UpstreamError(502, "reset", f"LM Studio's answer broke off before its end ({why})")
    return UpstreamError(502, "reset", f"LM Studio closed the connection before it answered ({why}). Try "
                                       "again; its log may say why")


class Chunks:
    """Decodes a chunked body (RFC 9112, 7.1), strictly: a size that two readers could read in two ways is
    how requests are smuggled.  left: bytes of a chunk that are still to come."""

    SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
    TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")
    LINE_LIMIT = 8 * 1024

    def __init__(self):
        self.left, self.over = 0, False
        self.rest = b""  # bytes that are not read yet; once over, those behind the body
        self._room = self.LINE_LIMIT  # for trailers
        self._step = self._whole_chunks
        self.between = True  # the next byte begins a chunk

    def feed(self, data):
        """The payload in data.  Raises ValueError if it is not a chunked body."""
        if self.between:
            end = data.find(b"\r\n", 1, 9)
            if data[:end] == b"%x" % (len(data) - end - 4) and data.endswith(b"\r\n") and end < len(data) - 4:
                return data[end + 2:-2]     # one whole chunk, as most pieces of a stream are
        self.rest = self.rest + data if self.rest else data
        parts: list[bytes] = []
        while not self.over and self._step(parts):
            pass
        self.between = not self.rest and self._step == self._whole_chunks
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # Each step below takes its share of rest, and gives False when that is not there yet.

    def _whole_chunks(self, parts):
        """Chunks that are there from their size line to their end, then the size line of another."""
        data, at = self.rest, 0
        while match := self.SIZE.match(data, at):
            start, self.left = match.end(), int(match[1], 16)
            at = start + self.left
            if not self.left or data[at:at + 2] != b"\r\n":
                self.rest, self._step = data[start:], self._payload if self.left else self._trailers
                return True
            parts.append(data[start:at])
            at, self.left = at + 2, 0
        self.rest = rest = data[at:]
        if len(rest) > self.LINE_LIMIT or b"\n" in rest or b"\r" in rest[:-1]:
            raise ValueError("a chunk's size line is malformed")
        return False

    def _payload(self, parts):
        part, self.rest = self.rest[:self.left], self.rest[self.left:]
        self.left -= len(part)
        if part:
            parts.append(part)
        if self.left or self.rest in (b"", b"\r"):
            return False
        if self.rest[:2] != b"\r\n":
            raise ValueError("a chunk does not end where its size says")
        self.rest, self._step = self.rest[2:], self._whole_chunks
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


class Sized:
    """Decodes, with the fields of Chunks, a body of so many bytes; of None: until the connection ends."""

    def __init__(self, left):
        self.left, self.rest, self.over = left, b"", left == 0

    def feed(self, data):
        """The part of data that is the body's."""
        if self.left is None:
            return data
        part, self.rest = data[:self.left], data[self.left:]
        self.left -= len(part)
        self.over = not self.left
        return part


def parse_headers(lines, lenient=False):
    """[(name, value)] of header lines.  lenient: a value may go on in a line that begins with a blank, and
    blanks may stand before a colon (RFC 9112, 5).  Raises ValueError."""
    headers: list[tuple[str, str]] = []
    if CONTROLS.search("".join(lines)):
        raise ValueError("a header holds a control character")
    for line in lines:
        if lenient and line[:1] in (" ", "\t") and headers:
            headers[-1] = headers[-1][0], f"{headers[-1][1]} {line.strip()}"
            continue
        name, colon, value = line.partition(":")
        name = name.rstrip(" \t") if lenient else name
        if not colon or not TOKEN(name):
            raise ValueError("a header line is malformed")
        headers.append((name, value.strip(" \t")))
    return headers


def joined(headers):
    """{name in lower case: value}; values of one name are joined (RFC 9110, 5.3)."""
    named: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        named[key] = f"{named[key]}, {value}" if key in named else value
    return named


class Call(urllib.request.Request):
    """A request to a server, origin, and the connection that it runs over.  Its target and its headers are
    sent as they are: urllib's own lose a # and all behind it, order, case and repeats.

    timeout_s is for each read and write, None without end; deadline, a clock reading, for all together."""

    def __init__(self, origin, method, target, headers, body=b""):
        self.__dict__.update(origin.__dict__)   # a Request for the server's address, which is parsed once
        self.method, self.selector, self.raw_headers, self.body = method, target, headers, body or b""
        self.timeout_s, self.deadline = None, math.inf
        self.anew = False       # it needs a new connection
        self.upgrades = False   # to a WebSocket
        self.reused = False     # its connection had another request before
        self.cancelled = False
        self.sock: Any = None   # while the exchange runs
        self._lock = threading.Lock()  # guards the two above: a socket given back is not ours to shut

    def cancel(self):
        """Any thread.  Ends the exchange, so that LM Studio stops working for it."""
        with self._lock:
            self.cancelled = True
            if self.sock:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # below TLS: at once

    def use(self, sock):
        """Run over this socket, or over none.  Gives the one used before.  Raises ConnectionAbortedError."""
        with self._lock:
            before, self.sock = self.sock, sock
            if self.cancelled and sock:
                raise ConnectionAbortedError("the client left")
        return before

    def set_timeout(self, seconds):
        """For each read and write from now on; 0 or None: without end."""
        if (seconds or None) != self.timeout_s:
            self.timeout_s = seconds or None
            if self.sock:
                set_timeout(self.sock, self.timeout_s)

    def send(self):
        """Raises OSError."""
        lines = [f"{self.method} {self.selector} HTTP/1.1",
                 *[f"{name}: {value}" for name, value in self.raw_headers], "", ""]
        head, sock = "\r\n".join(lines).encode("latin-1"), self.sock
        if len(self.body) <= SMALL_BODY:
            sock.sendall(head + self.body)
            return
        sock.sendall(head)
        sock.settimeout(self.timeout_s)     # for each slice; the kernel's begins anew with any byte
        with memoryview(self.body) as whole:
            for at in range(0, len(whole), SLICE):
                sock.sendall(whole[at:at + SLICE])
        set_timeout(sock, self.timeout_s)

    def receive(self):
        """The next bytes before the deadline, b"" at the end.  Raises OSError."""
        self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        return self.sock.recv(PIECE)

    def wait(self, seconds):
        """True when there is something to receive, False after so many seconds of silence."""
        pending = isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()
        return bool(pending) or readable(self.sock, seconds)


class Answer:
    """LM Studio's answer: the head, which begin() reads, then the body, as it comes.

    http.client's own response reads heads through the email parser, which costs more than all else here.
    Informational forerunners (1xx, RFC 9110, 15.2) are skipped.  Raises OSError and HTTPException."""

    STATUS_LINE = re.compile(r"HTTP/1\.(\d) ([1-9]\d\d)(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")

    def __init__(self, call):
        endless = call.deadline == math.inf
        self._receive = functools.partial(call.sock.recv, PIECE) if endless else call.receive
        self._method, self._upgrades, self._buffer = call.method, call.upgrades, b""
        self.over = False  # the body has been read to its end

    def begin(self):
        """Read the head.  Gives itself."""
        self.status, room = 100, ANSWER_HEAD_LIMIT
        while 100 <= self.status < 200 and not (self.status == 101 and self._upgrades):
            room -= self._read_head(room)
        self._frame()
        return self

    def _read_head(self, room):
        """Gives the number of its bytes."""
        start = 0
        while (end := self._buffer.find(b"\r\n\r\n", start)) < 0:
            start = max(0, len(self._buffer) - 3)
            if len(self._buffer) > room:
                raise http.client.LineTooLong("response head")
            piece = self._receive()
            if not piece:
                raise http.client.RemoteDisconnected("in the middle of its head" if self._buffer
                                                     else "without a word")
            self._buffer += piece
        head, self._buffer = self._buffer[:end].decode("latin-1"), self._buffer[end + 4:]
        line, *lines = head.split("\r\n")
        first = self.STATUS_LINE.fullmatch(line)
        if end > room or not first or first[2] == "101" and not self._upgrades:
            raise http.client.BadStatusLine("its head is malformed or too long")
        self._minor, self.status, self.reason = int(first[1]), int(first[2]), first[3] or ""
        try:
            self.headers = parse_headers(lines, lenient=True)
        except ValueError as error:
            raise http.client.HTTPException(str(error)) from None
        return end + 4

    def _frame(self):
        """How the end of the body is known (RFC 9112, 6.3)."""
        self._named = joined(self.headers)
        coding = self.header("transfer-encoding").lower()
        length = ",".join({value for name, value in self.headers if name.lower() == "content-length"})
        if coding not in ("", "chunked") or length and not coding and not LENGTH.fullmatch(length):
            raise http.client.HTTPException("the length of its answer is not clear")
        options, self.chunked = self.header("connection").lower(), bool(coding)
        self._decoder: Any = Chunks() if coding else Sized(int(length) if length else None)
        if self._method == "HEAD" or self.status in (204, 304):
            self._decoder = Sized(0)
        self.over = self._decoder.over
        self.keeps = self._decoder.left is not None and (
            "close" not in options if self._minor else "keep-alive" in options) and not (
            self.over and self._buffer)

    def header(self, name):
        """The header's values, joined as RFC 9110, 5.3 has it; "" without one."""
        return self._named.get(name, "")

    @property
    def streams(self):
        """True for an event stream, however its type is written."""
        return self.header("content-type").lower().startswith(STREAM_TYPES)

    @property
    def rest(self):
        """The bytes behind the head of a 101."""
        return self._buffer

    @property
    def ready(self):
        """True when the first piece of the body, or its end, is already here."""
        return self.over or bool(self._buffer)

    def pieces(self):
        """The body as it comes, without its framing.  over is True as soon as its last piece is there."""
        data, self._buffer, receive, decoder = self._buffer, b"", self._receive, self._decoder
        while not self.over:
            data = data or receive()
            if not data and decoder.left is not None:
                raise http.client.IncompleteRead(b"", decoder.left)
            try:
                piece = decoder.feed(data)
            except ValueError as error:
                raise http.client.HTTPException(str(error)) from None
            if decoder.over or not data:
                self.over, self.keeps = True, self.keeps and not decoder.rest   # which belongs to no request
            if piece:
                yield piece
            data = b""

    def read(self, limit):
        """The whole body, at most limit bytes of it."""
        data = b""
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                break
        return data[:limit]


def close_quietly(sock):
    """Close a socket, if there is one."""
    if sock:
        sock.close()


def readable(sock, seconds=0.0):
    """True when a socket has something to read or has ended, within so many seconds."""
    if hasattr(select, "poll"):
        look = select.poll()
        look.register(sock, select.POLLIN)
        return bool(look.poll(math.ceil(1000 * seconds)))
    return bool(select.select([sock], [], [], seconds)[0])


def set_timeout(sock, seconds):
    """Each read and each write waits at most so long, without end for None.

    If the kernel keeps the time (socket(7), SO_RCVTIMEO), each is one system call and not two, and lets
    go of the GIL once.  It tells TLS nothing, and Windows counts in another unit: there Python keeps it."""
    sock.settimeout(seconds)
    if os.name == "posix" and not isinstance(sock, ssl.SSLSocket):
        kept = struct.pack("ll", *divmod(int(1e6 * (seconds or 0)), 1_000_000))
        with contextlib.suppress(OSError):  # a system that has another form of it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, kept)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, kept)
            sock.settimeout(None)


class Remembered:
    """A question that one asks for all: ask() gives its answer, also to a failure.

    It is asked in a thread of its own.  After limit_s the answer is silent and the next caller asks anew,
    also if that thread has ended."""

    def __init__(self, ask, limit_s, silent):
        self._ask, self._limit_s, self._silent = ask, limit_s, silent
        self._lock = threading.Lock()  # guards the two below
        self._known, self._version = (-math.inf, silent), 0   # (clock, answer), and the question
        self._asking: Any = None    # (clock, Event that is set in the end) of the question under way

    def value(self, max_age_s, wait_s, version=0):
        """Any thread.  An answer for this version, not older than max_age_s; the one before if none comes
        within wait_s."""
        with self._lock:
            now, (since, answer) = time.monotonic(), self._known
            if now - since < max_age_s and version == self._version:
                return answer
            self._version = version
            if self._asking and now - self._asking[0] > self._limit_s:
                self._known, self._asking = (-math.inf, self._silent), None
            mine = self._asking is None
            asking = self._asking = self._asking or (now, threading.Event())
        try:
            if mine:
                threading.Thread(target=self._refresh, args=(asking,), name="question", daemon=True).start()
        except RuntimeError:    # no thread is to be had
            self._refresh(asking)
        asking[1].wait(wait_s)
        return self._known[1]

    def _refresh(self, asking):
        """Body of the thread."""
        answer = self._silent
        try:
            answer = self._ask()
        finally:
            with self._lock:
                if self._asking is asking:
                    self._known, self._asking = (time.monotonic(), answer), None
            asking[1].set()


class KeptConnections(urllib.request.BaseHandler):
    """Opens a Call to the server at base for an OpenerDirector, over a connection that has nothing to do if
    there is one.  Any thread may call.

    A connection is used again if it has been idle for less than REUSE_S and is not readable (readable means
    closed); by a request that may not be repeated only if it has been used again before, or idle for
    MATURE_S."""

    def __init__(self, base):
        parts = urllib.parse.urlsplit(base)
        self._base, self._name = base, parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        host = "127.0.0.1" if self._name == "localhost" else self._name     # LM Studio listens on IPv4 only
        self._address = host, parts.port or (443 if self._tls else 80)
        # (socket, clock since when, used again before, timeout), the longest idle first; each step is atomic
        self._idle: deque[tuple] = deque()

    def put(self, sock, proven, timeout_s):
        """An answer was read to its end and its connection may serve another request."""
        self._idle.append((sock, time.monotonic(), proven, timeout_s))
        with contextlib.suppress(IndexError):
            while len(self._idle) > IDLE_KEPT:
                self._idle.popleft()[0].close()

    def take(self, repeatable):
        """(socket, its timeout); (None, None) when there is none."""
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

    def default_open(self, call):
        """The Answer, its head unread.  Raises OSError, HttpError."""
        sock, timeout_s = (None, None) if call.anew else self.take(call.method in REPEATABLE)
        call.reused = bool(sock)
        if not sock:
            sock = self._connect(call.timeout_s)
        elif timeout_s != call.timeout_s:
            set_timeout(sock, call.timeout_s)
        close_quietly(call.use(sock))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            call.send()     # a server that refuses a body may answer before it has read all of it
        return Answer(call)

    def _connect(self, timeout_s):
        try:
            sock = socket.create_connection(self._address, min(CONNECT_S, timeout_s or CONNECT_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a dead peer says no goodbye
            for name, value in KEEP_ALIVE.items():
                with contextlib.suppress(AttributeError, OSError):  # each system has some of them
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            sock = self._tls.wrap_socket(sock, server_hostname=self._name) if self._tls else sock
            set_timeout(sock, timeout_s)
            return sock
        except OSError as error:
            why = "the connection timed out" if isinstance(error, TIMEOUTS) else error_text(error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise HttpError(503, "no_descriptors", f"lmgateway cannot connect to LM Studio ({why}). "
                                "Raise its limit of open files (ulimit -n), or try again",
                                [("Retry-After", "5")]) from None
            raise UpstreamError(502, "unreachable",
                                f"LM Studio is not reachable at {self._base} ({why}). Start its server "
                                "(Developer > Start server, or: lms server start), or give its address with "
                                "--upstream") from None


class Upstream:
    """LM Studio's server.  Any thread may call."""

    def __init__(self, base, token=None):
        self.base, self.token, self.origin = base, token, urllib.request.Request(base)
        self.host = base.partition("://")[2]
        self._secret = secrets.token_bytes(32)  # makes the names under which it knows clients of sockets
        self._kept = KeptConnections(base)
        self._opener = urllib.request.OpenerDirector()  # bare: no redirects, proxies or cookies
        self._opener.add_handler(self._kept)
        self._silent = f"LM Studio at {base} does not answer. Look at its log"
        self._health = Remembered(self._ask_health, QUESTION_S + 1.0, self._silent)
        self._listed: Any = (None, 0.0)     # the latest rows that LM Studio told, and when
        self._models = Remembered(self._ask_models, QUESTION_S + 1.0, self._listed)
        self._listings: tuple = "/api/v1/models", "/api/v0/models"  # since 0.4.0, 0.3.6; then the one that is

    def open(self, call):
        """The Answer, its body unread.  Raises OSError, HTTPException, HttpError.

        A call that fails on a connection that was used before is tried again if the method allows it; other
        requests are not, because LM Studio may have begun to work (RFC 9110, 9.2.2)."""
        answer = self.send(call)
        try:
            return answer.begin()
        except BROKEN as error:
            if (not call.reused or call.cancelled or isinstance(error, TIMEOUTS)
                    or call.method not in REPEATABLE):
                raise
        call.anew = True
        return self.send(call).begin()

    def send(self, call):
        """Its Answer, the head unread.  Raises OSError, HttpError."""
        return self._opener.open(call)

    def upgrade(self, path):
        """A Side: LM Studio's of a new WebSocket.  Raises HttpError.

        LM Studio never answers for a namespace that it does not know (lmstudio-js, WsServer.ts)."""
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        call = Call(self.origin, "GET", path, [
            ("Host", self.host), ("Connection", "Upgrade"), ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key)])
        call.set_timeout(UPGRADE_S)
        call.deadline, call.anew, call.upgrades = time.monotonic() + UPGRADE_S, True, True
        try:
            answer = self.send(call).begin()
            if answer.status == 101 and answer.header("sec-websocket-accept") == accept_key(key):
                return Side(call.use(None), Frames(False, LONGEST_MESSAGE),
                            FrameError(1011, "LM Studio closed the socket"), answer.rest)
            kind, why = "reset", f"{answer.status} {answer.reason}"
        except BROKEN as error:
            kind, why = "timeout" if isinstance(error, TIMEOUTS) else "reset", error_text(error)
        self.done(call)
        raise UpstreamError(502, kind, f"LM Studio took no WebSocket on {path} ({why}): this version may not "
                                       "know it")

    def introduce(self, side, who):
        """Be let in over a new WebSocket, by the halves of LM Studio's own token, else by a guest's pair.
        Gives LM Studio's Messages.  Raises HttpError.

        Uploaded files belong to such a pair: one text who has always the same one, and no other has it."""
        token = SDK_TOKEN(self.token or "")
        name = hmac.new(self._secret, who.encode(), hashlib.sha256).hexdigest()
        identifier, passkey = token.groups() if token else (f"guest:{name[:32]}", name[32:])
        try:
            side.sock.sendall(packet(secrets.token_bytes(4), authVersion=1, clientIdentifier=identifier,
                                     clientPasskey=passkey))
            answers = side.first_messages()
        except (GatewayError, OSError) as error:
            raise UpstreamError(502, "reset", f"LM Studio let nobody in ({error_text(error)})") from None
        said = json_object(answers[0].payload) or {}
        if said.get("success") is not True:
            raise HttpError(403, "upstream_refused",
                            error_message(said.get("error") or "no word of LM Studio's"))
        return answers

    def done(self, call, answer=None):
        """An exchange is over: keep its connection if its answer was read to the end and allows that."""
        sock = call.use(None)
        if answer and answer.keeps and answer.over and not call.cancelled and call.deadline == math.inf:
            self._kept.put(sock, call.reused, call.timeout_s)
        else:
            close_quietly(sock)

    def health(self, max_age_s=3.0, wait_s=QUESTION_S + 1.0):
        """Why LM Studio does not answer; empty when it does.  Remembered for max_age_s; the reason before
        if a new one takes longer than wait_s."""
        return self._health.value(max_age_s, wait_s)

    def models(self, loads=0):
        """(ModelRow of each model that LM Studio lists, or None if it never told; epoch seconds of that).

        Remembered for MODELS_S while loads, a count of the log's lines on loading, stays the same."""
        if not self.health(10.0, GREETING_S):
            self._models.value(MODELS_S if self._listed[0] is not None else 3.0, QUESTION_S + 1.0, loads)
        return self._listed

    def _ask_health(self):
        """Any answer but a server's failure counts: not every LM Studio may greet without its token."""
        try:
            answer, _ = self._get("/lmstudio-greeting", 4096)
        except GatewayError as error:
            return str(error)
        except TIMEOUTS:
            return self._silent
        except BROKEN:
            return f"what answers at {self.base} breaks off. Look at LM Studio's log"
        return "" if answer.status < 500 else f"{self.base} answers {answer.status} {answer.reason}"

    def _ask_models(self):
        for path in self._listings:
            with contextlib.suppress(GatewayError, *BROKEN):
                rows = model_rows(json_object(self._get(path, 4 * 1024 * 1024)[1]) or {})
                if rows is not None:
                    self._listings, self._listed = (path,), (rows, time.time())
                    break
        return self._listed

    def _get(self, path, limit):
        """(Answer, its body up to limit bytes) of a question of our own, within QUESTION_S.  Raises OSError,
        HTTPException, HttpError."""
        headers = [("Host", self.host), ("Accept", "application/json")]
        headers += [("Authorization", f"Bearer {self.token}")] if self.token else []
        call, answer = Call(self.origin, "GET", path, headers), None
        call.set_timeout(QUESTION_S)
        call.deadline = time.monotonic() + QUESTION_S
        try:
            answer = self.open(call)
            return answer, answer.read(limit)
        finally:
            self.done(call, answer)


MODEL_STATES = ("loaded", "loading", "not-loaded")


def accept_key(key):
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, 4.2.2)."""
    salted = f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode("latin-1")
    return base64.b64encode(hashlib.sha1(salted).digest()).decode()


class Side:
    """One of the two connections of a socket, read and written without waiting once its first_messages() are
    there.

    gone: the error that its end is.  early: bytes that are there already."""

    def __init__(self, sock, frames, gone, early):
        self.sock, self.frames, self.gone, self._early = sock, frames, gone, early
        self.pending = bytearray()  # bytes that it has not taken
        self._wanted = 0

    def first_messages(self):
        """The Messages that come, from the first that is no ping on.  Raises FrameError, TimeoutError after
        INTRODUCTION_S, gone."""
        deadline, data = time.monotonic() + INTRODUCTION_S, self._early
        while True:
            found = list(itertools.dropwhile(lambda message: message.opcode in (PING, PONG),
                                             self.frames.feed(data)))
            if found and found[0].opcode != CLOSE:
                self.sock.setblocking(False)
                return found
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = b"" if found else self.sock.recv(PIECE)
            if not data:
                raise self.gone

    def watch(self, selector, reads):
        """Have a selector look for bytes that have come, if reads, and for room while some are pending."""
        wanted = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * bool(self.pending)
        if wanted != self._wanted:
            if self._wanted:
                selector.unregister(self.sock)
            if wanted:
                selector.register(self.sock, wanted, self)
            self._wanted = wanted

    def receive(self):
        """The Messages that have come, and their bytes.  Raises FrameError, gone."""
        data = self._call(self.sock.recv, PIECE)
        if data == b"":
            raise self.gone
        return self.frames.feed(data or b""), data or b""

    def send(self, data=b""):
        """Send as much as there is room for, and keep the rest.  Raises gone."""
        self.pending += data
        if self.pending:
            del self.pending[:self._call(self.sock.send, self.pending) or 0]

    def _call(self, function, argument):
        """None if that would have to wait."""
        try:
            return function(argument)
        except NOT_NOW:
            return None
        except OSError:
            raise self.gone from None


class LogStream:
    """A Follower of the log that LM Studio sends itself: diagnostics.streamLogs, which `lms log stream` reads
    (lmstudio-js, diagnosticsBackendInterface.ts), in the bytes of a log file.

    files: the Follower of this machine's log.  With both, files go first: as soon as they grow they are the
    log for good; an entry that only the stream has had for DOUBT_S makes it that."""

    RETRY_S, DOUBT_S = 5.0, 2.0
    LINES = {"server.log": "content", "runtime.log": "message"}  # data.type -> the place of its text
    LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")

    def __init__(self, upstream, files, both):
        self._upstream, self._files = upstream, files
        self._by = "" if both else "stream"     # or "files", once that is known
        self._side: Any = None  # LM Studio's, while there is one
        self._retry_at, self._trouble = -math.inf, ""
        self._held, self._since = b"", math.inf     # entries while _by is open, and their clock

    def __getattr__(self, name):
        """The Follower says which file is read, and from which place on."""
        return getattr(self._files, name)

    @property
    def problem(self):
        return self._trouble if self._by == "stream" else self._files.problem

    def next_news(self, now):
        """As Follower.next_news()."""
        if self._by == "stream":
            return self._receive(now)
        news = self._files.next_news(now)
        if news and isinstance(news, bytes):
            self._by = "files"
            self._leave()
        if news or self._by:
            return news
        self._held += self._receive(now)
        self._since = min(self._since, now) if self._held else math.inf
        if now - self._since <= self.DOUBT_S:
            return b""
        self._by = "stream"
        return self._held

    def _receive(self, now):
        """The lines that have come; b"" for none."""
        if not self._side and now < self._retry_at:
            return b""
        try:
            if not self._side:
                self._retry_at = now + self.RETRY_S
                self._side = self._upstream.upgrade("/diagnostics")
                self._upstream.introduce(self._side, "lmgateway")
                self._side.send(packet(secrets.token_bytes(4), type="channelCreate", endpoint="streamLogs",
                                       channelId=0))
                self._trouble = ""
            return b"".join(map(self._line, self._side.receive()[0]))
        except GatewayError as error:
            self._trouble = f"LM Studio's log stream: {error}"
            self._leave()
            return b""

    def _leave(self):
        if self._side:
            self._side.sock.close()
        self._side = None

    @classmethod
    def _line(cls, message):
        """A packet of the stream as a log file would have it; of an answer its figures, which no file has."""
        entry = member(member(json_object(message.payload) or {}, "message"), "log")
        data = member(entry, "data")
        kind, level = str(data.get("type")), str(data.get("level")).upper()
        text, level = data.get(cls.LINES.get(kind)), level if level in cls.LEVELS else "INFO"
        model, stats = name_of(data.get("modelIdentifier")), member(data, "stats")
        if kind == "llm.prediction.output" and model and stats and not CONTROLS.search(model):
            text, level = f"Prediction stats: {json.dumps({'stats': stats}, indent=2)}", f"INFO][{model}"
        if not isinstance(text, str):
            return b""
        if not re.match(r"\[\d{4}-\d\d-\d\d ", text):
            stamp = time.localtime(min(usable(entry.get("timestamp")) or 0, 4e12) / 1000)
            text = f"[{time.strftime('%Y-%m-%d %H:%M:%S', stamp)}][{level}] {text}"
        return text.rstrip("\n").encode("utf-8", "replace") + b"\n"


class ModelRow(NamedTuple):
    """A model as /debug/models shows it, and the names under which it answers."""

    shown: dict
    names: frozenset

    @property
    def loaded(self):
        return self.shown["state"] == "loaded"


def model_rows(body):
    """The ModelRows in an answer of /api/v1/models or /api/v0/models; None if it is no such answer."""
    for name, model_of in (("models", model_of_v1), ("data", model_of_v0)):
        if isinstance(body.get(name), list):
            return [row for row in map(model_of, listed(body[name])) if row.shown["id"]]
    return None


def model_of_v1(model):
    instances = listed(model.get("loaded_instances"))
    config = instances[0].get("config") if instances else None
    kind = model.get("quantization")
    return model_row(model, model.get("key"), "loaded" if instances else "not-loaded",
                     kind.get("name") if isinstance(kind, dict) else kind,
                     (count(config if isinstance(config, dict) else {}, "context_length"),
                      *(text_of(instance.get("id")) for instance in instances)))


def model_of_v0(model):
    state = text_of(model.get("state"))
    return model_row(model, model.get("id"), state if state in MODEL_STATES else "not-loaded",
                     model.get("quantization"), (count(model, "loaded_context_length"),))


def model_row(model, name, state, quantization, loaded):
    """loaded: the context length and the names of the loaded instances."""
    context, *instances = loaded
    shown = {"id": text_of(name), "state": state, **without_none(
        type=text_of(model.get("type")), quantization=text_of(quantization),
        contextLength=context if state == "loaded" else None,
        maxContextLength=count(model, "max_context_length"), sizeBytes=count(model, "size_bytes"))}
    return ModelRow(shown, frozenset([shown["id"], *instances]) - {None})


def text_of(value):
    """A name in LM Studio's answer; None if it is none."""
    return value[:LONGEST_NAME] if isinstance(value, str) and value else None


def error_text(error):
    """An exception in a few words for a person."""
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was closed"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# === 7. HTTP: wire, access, views, routes ====================================
# Four ideas keep one client from taking all room: bodies count against one budget in bytes as
# they come (BodyMemory); a head, a body and the whole answer to a stranger each have a deadline; a connection
# that has shown no right key gives way, those of the address that has the most first (Server); and a right
# that is used for long is asked for again (Server._look).

PING_S = 15.0
RETRY_MS = 2000  # of a browser before it connects again
WAKES_PER_S = 14_000  # of all listeners together: each pauses so long that they share these
FIRST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,40}) ([!-~]+) HTTP/(\d)\.(\d)")
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[\w.\-]*)(?::\d{0,5})?", re.ASCII)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Request:
    """One request as it stood on the wire.  The fields below the line are filled in on its way to a view."""

    def __init__(self, method, target, version, headers):
        self.key, target = key_before(target)   # which may lead the path, or come by a socket's first message
        self.method, self.target = method, target  # the target in origin form, as sent
        self.version = version  # (1, 0) or (1, 1)
        self.headers = headers  # [(name, value)], order, case and repeats kept
        self.path, _, self.query_text = target.partition("?")
        self._named = joined(headers)
        self.length, self.chunked = framing(self)  # of the body
        # --
        self.client = ""  # address
        self.port = 0  # of ours
        self.encrypted = False
        self.body: Any = b""  # bytes-like
        self.arrived = 0.0  # clock when its last byte had come
        self.identity: Any = None  # of the key that it carried, once it has been checked
        self.forwarded = False  # it goes on to LM Studio
        self.told = False  # the log has its line
        self.ratelimit: list = []  # headers for its answer that tell of its key's limits
        self.connection: Any = None  # the client's Connection
        self.pause: Callable[[float], Any] = time.sleep  # for so many s, or until the connection ends

    @property
    def query(self):
        return dict(urllib.parse.parse_qsl(self.query_text, keep_blank_values=True))

    def header(self, name, default=""):
        """The header's values, joined as RFC 9110, 5.3 has it."""
        return self._named.get(name, default)

    @property
    def has_body(self):
        return bool(self.length or self.chunked)


def key_before(target):
    """(the key that leads a target, or "", the target without it): a client that can send a key in no other
    way has it in its base URL."""
    found = re.match(r"/key/([^/?]*)", target)
    if not found:
        return "", target
    rest = target[found.end():]
    return urllib.parse.unquote(found[1]), rest if rest[:1] == "/" else "/" + rest


class Response(NamedTuple):
    """The answer of a view.  body: bytes, or an iterable of bytes that is written as it comes and whose
    close(), if it has one, is called in every case.  It may have ready: True if the first piece need not be
    waited for."""

    status: int
    headers: list
    body: Any = b""  # None for an answer that has none: to HEAD, 204, 304
    reason: str | None = None
    date: bool = True  # it is ours: add Date, no-store and nosniff; LM Studio's own is left as it is


def json_response(value, status=200, headers=()):
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(status, [("Content-Type", "application/json; charset=utf-8"), *headers], body)


# --- 7.1 wire: bytes of a socket to requests ---------------------------------


class BodyMemory:
    """The budget in bytes for the bodies of all requests together.  Any thread may call."""

    def __init__(self, limit):
        self._limit, self.used = limit, 0
        self._lock = threading.Lock()   # guards used

    def take(self, size):
        """Raises HttpError 503 if there is no room for so many bytes more; a negative size gives back."""
        with self._lock:
            if self.used + size > self._limit:
                raise HttpError(503, "bodies_too_large",
                                "the bodies of the running requests take all of MAX_BODY_MEMORY: try again, "
                                "or raise it", [("Retry-After", "5")], close=True)
            self.used += size


class Wire:
    """The reading side of a client's connection, strict because leniency lets requests be smuggled
    (RFC 9112, section 11.2).  Raises HttpError for anything but proper HTTP, ClientLeft at its end."""

    HEAD_LIMIT = 64 * 1024  # bytes of a request's head
    LINE_LIMIT = 8 * 1024  # bytes of its first line (RFC 9112, section 3: at least 8000)
    EMPTY_LINES = 8  # before it
    HEAD_S = 30.0  # for a head to arrive; then 408
    CLIENT_S = 60.0     # for the next request, for a byte of a body, for room in a client's socket
    BODY_S, BODY_RATE = 60.0, 256 * 1024  # for a body, and one s more for each so many bytes that came
    LINGER_S, LINGER_BYTES = 2.0, 64 * 1024 * 1024  # the most that is read of a request that was refused

    def __init__(self, sock, memory):
        self.sock, self._memory = sock, memory
        self.buffer = bytearray()
        self._timeout_s = 0.0  # of the socket
        self._held = 0  # bytes that the budget counts

    def _set_timeout(self, seconds):
        """For each read and write from now on, the Handler's writes included."""
        if seconds != self._timeout_s:
            self._timeout_s = seconds
            set_timeout(self.sock, seconds)

    def _more(self, timeout_s):
        self._set_timeout(max(0.001, timeout_s))
        self.buffer += self._receive(PIECE)

    def _receive(self, size):
        piece = self.sock.recv(size)
        if not piece:
            raise ClientLeft
        return piece

    def head(self):
        """The lines of the next request's head.  A client that says nothing gets ClientLeft.

        A few empty lines before it are skipped (RFC 9112, 2.2)."""
        empty_lines, known, deadline = self.EMPTY_LINES, 0, math.inf
        while True:
            while empty_lines and self.buffer[:2] == b"\r\n":
                del self.buffer[:2]
                empty_lines -= 1
            end = self.buffer.find(b"\r\n\r\n", known)
            self._check_size(len(self.buffer) if end < 0 else end)
            if end >= 0:
                break
            known, begun = max(0, len(self.buffer) - 3), self.buffer not in (b"", b"\r")
            if begun:
                deadline = min(deadline, time.monotonic() + self.HEAD_S)
            try:
                self._more(deadline - time.monotonic() if begun else self.CLIENT_S)
            except TIMEOUTS:
                if not begun:
                    raise ClientLeft from None
                raise HttpError(408, "head_timeout",
                                f"the head of the request did not arrive within {self.HEAD_S:.0f} s; "
                                "send it at once", close=True) from None
            finally:
                self._set_timeout(self.CLIENT_S)     # for the rest, our answer included
        head = self.buffer[:end].decode("latin-1")
        del self.buffer[: end + 4]
        return head.split("\r\n")

    def _check_size(self, size):
        line = self.buffer.find(b"\r\n", 0, self.LINE_LIMIT + 2)
        if line < 0 and len(self.buffer) > self.LINE_LIMIT:
            raise HttpError(414, "target_too_long",
                            f"the request line is longer than {self.LINE_LIMIT} bytes", close=True)
        if line < 0 and b"\n" in self.buffer:
            raise bad("a line ends in a bare LF")
        if size > self.HEAD_LIMIT:
            raise HttpError(431, "head_too_large",
                            f"the head of the request is larger than {self.HEAD_LIMIT} bytes", close=True)

    def body(self, request, limit):
        """The body of a request, whole; it counts in the budget until release().

        Raises HttpError: 413 before more than limit bytes are read, 408 when it comes too slowly, 503 when
        all bodies together are too large."""
        if (request.length or 0) > limit:
            raise too_large(limit)
        if not request.has_body:
            return b""
        if request.header("expect") and request.version >= (1, 1) and not self.buffer:
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        decoder: Any = Chunks() if request.chunked else Sized(request.length)
        data, piece, began = bytearray(), bytes(self.buffer), time.monotonic()
        self.buffer.clear()
        try:
            while not decoder.over:     # it grows as it comes: a length that is announced takes no memory
                part = decoder.feed(piece)
                if len(data) + len(part) + decoder.left > limit:
                    raise too_large(limit)
                self.hold(len(data) + len(part))
                data += part
                if time.monotonic() - began > self.BODY_S + len(data) / self.BODY_RATE:
                    raise TimeoutError
                if not decoder.over:
                    self._set_timeout(self.CLIENT_S)
                    piece = self._receive(PIECE)
        except ValueError as error:
            raise bad(error) from None
        except TIMEOUTS:
            raise HttpError(408, "body_timeout", "the body of the request stopped coming, or came too slowly",
                            close=True) from None
        self.buffer += decoder.rest
        return data

    def hold(self, size):
        """So many bytes of this connection are kept from now on.  Raises HttpError 503 beyond the budget."""
        if size != self._held:
            self._memory.take(size - self._held)
            self._held = size

    def linger(self):
        """Read the rest of a refused request, for a moment: closing at once would destroy the answer
        on its way (RFC 9112, 9.6)."""
        deadline, dropped = time.monotonic() + self.LINGER_S, 0
        with contextlib.suppress(OSError, ValueError, ClientLeft):
            self.sock.shutdown(socket.SHUT_WR)
            while dropped < self.LINGER_BYTES and time.monotonic() < deadline:
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))
                dropped += len(self._receive(PIECE))


def bad(what):
    return HttpError(400, "bad_request", f"this is not proper HTTP: {what}", close=True)


def too_large(limit):
    remedy = "send less" if limit == OWN_BODY else "raise MAX_BODY_BYTES or send less"
    return HttpError(413, "body_too_large", f"the body is larger than {limit} bytes; {remedy}", close=True)


HEADERS_LIMIT = 128


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
    try:
        headers = parse_headers(lines[1:])
    except ValueError as error:
        raise bad(error) from None
    if method not in METHODS:
        raise HttpError(501, "method_unknown", f"the method {method} is not supported", close=True)
    if not target.startswith("/") or "#" in target:     # behind # Express reads a path otherwise
        raise bad("the request target must be a path, without a fragment")
    request = Request(method, target, min(version, (1, 1)), headers)
    if "%" in target or "/." in target or "\\" in target:
        plain_path(request.path)    # raises for one that servers read in different ways
    host = request.header("host", None)  # of several, a list, which is none
    if host is None and version >= (1, 1) or host and not HOST.fullmatch(host):
        raise bad("exactly one Host header is needed")
    return request


def plain_path(path):
    """A path with its encodings undone, in lower case and without empty segments: as the most lenient server
    could read it.  Raises HttpError 400 for dot segments and backslashes, which servers read in different
    ways (RFC 3986, 5.2.4)."""
    for _ in range(3):  # encoded again and again
        if "%" in path:
            path = urllib.parse.unquote(path, "latin-1")
    segments = [segment for segment in path.split("/") if segment]
    if "\\" in path or "." in segments or ".." in segments:
        raise bad("a path has no dot segments and no backslashes")
    return "/" + "/".join(segments).lower()


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


def head_bytes(status, headers, reason=None):
    """A response's head."""
    reason = http.client.responses.get(status, "") if reason is None else reason
    lines = [f"HTTP/1.1 {status} {reason}", *[f"{name}: {value}" for name, value in headers], "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace")


def framed_head(response, request, alive):
    """(the head of a Response, True for a chunked body, True if the connection can take another request)."""
    headers, chunked = [*response.headers, *(request.ratelimit if request else ())], False
    if response.date:
        headers += [("Date", http_date()), ("X-Content-Type-Options", "nosniff")]
        if "Cache-Control" not in dict(headers):
            headers.append(("Cache-Control", "no-store"))
    if isinstance(response.body, (bytes, bytearray)):
        headers.append(("Content-Length", str(len(response.body))))
    elif response.body is not None and "content-length" not in [name.lower() for name, _ in headers]:
        chunked = request.version >= (1, 1)
        alive = alive and chunked
        headers += [("Transfer-Encoding", "chunked")] if chunked else []
    if not alive:
        headers.append(("Connection", "close"))
    elif request.version < (1, 1):
        headers.append(("Connection", "keep-alive"))
    return head_bytes(response.status, headers, response.reason), chunked, alive


def http_date():
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())


# --- 7.2 connections, and clients that leave while nobody reads from them ------

RESTING, READING, WORKING, STREAMING, TUNNELLING = "resting", "reading", "working", "streaming", "tunnelling"


class Connection:
    """A client's connection: its handler's thread writes the state, the accept thread reads it and may end
    the connection.  A guest has shown a right key, or needs none; others are strangers.

    A client that only closes its sending side has left, too: nginx and Node see it so, and a browser or an
    SDK that gives up looks like that."""

    __slots__ = ("sock", "place", "state", "since", "proven", "deadline", "request", "ended", "leave")
    ANSWER_S = 20.0  # for a stranger's request: its body, our answer

    def __init__(self, sock, address):
        self.sock, self.place = sock, network_of(address)
        self.state = RESTING    # without a request; or READING one, or WORKING on its answer, or STREAMING
        self.since = time.monotonic()   # clock when it came or last rested
        self.proven = False     # it is a guest's
        self.deadline = math.inf    # clock when it is ended
        self.request: Any = None    # while STREAMING or TUNNELLING
        self.ended = threading.Event()
        self.leave: Any = None      # called by dismiss()

    def reads(self, now):
        """The head of a request is there."""
        self.state = READING
        if not self.proven:
            self.deadline = now + self.ANSWER_S

    def works(self, request, streams):
        """Its request has been read whole."""
        self.request = request if streams else None
        self.state = STREAMING if streams else WORKING

    def tunnels(self, request, leave):
        """It is a WebSocket from now on: TUNNELLING, or WORKING while it has an inference."""
        self.request, self.state, self.deadline, self.leave = request, TUNNELLING, math.inf, leave

    def rests(self):
        """Its request has been answered."""
        self.state, self.request, self.deadline, self.since = RESTING, None, math.inf, time.monotonic()

    def dismiss(self):
        """Any thread.  The client has left, or is to go: a thread that waits for something else is told."""
        leave = self.leave
        if leave:
            self.leave = None
            leave()

    def end(self):
        """Any thread.  Its handler notices, also while it waits."""
        self.ended.set()
        shut(self.sock)


def shut(sock):
    """Any thread.  Ends a connection; its handler notices.  Below TLS: its objects are the handler's."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def those_left(sockets):
    """The sockets of clients that left, also if bytes that nobody read come before the end.

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
    except (BlockingIOError, ValueError):   # ValueError is readable's, for a closed one
        return False
    except OSError:
        return True
    goodbye = first[:1] == b"\x15" or first == b"\x17\x03\x03\x00\x13"
    return not first or isinstance(sock, ssl.SSLSocket) and goodbye


# --- 7.3 access: keys, their rights, addresses ---------------------------------

RIGHTS = "infer", "view", "admin"   # to ask models; to see /debug, /metrics; to load, unload, download models
ALL_RIGHTS = frozenset(RIGHTS)
SESSION = "lmgateway_session"  # how the names of our cookies begin; the port follows
LOCAL_ONLY = "without a key only this machine is served: use http://127.0.0.1, or set GATEWAY_API_KEY"


class Identity(NamedTuple):
    """The sender of a request.  name is the key's; None when no key is asked for."""

    name: str | None
    rights: frozenset = ALL_RIGHTS
    by_cookie: bool = False

    @property
    def owner(self):
        """The only key with requests that it may see; None: everybody's."""
        return None if "view" in self.rights else self.name


class Key(NamedTuple):
    """A key that is accepted.  Only its digest is kept."""

    name: str
    digest: bytes
    rights: frozenset
    created: str = ""
    terms: Terms = Terms()


class KeyFile:
    """Minted keys: JSON of names, SHA-256 digests, rights, terms and dates, readable by its owner only.

    A minted key has 160 random bits, so that a plain hash does not give it away.  Changes are made under a
    lock on a file beside it; reading needs none, because a new file takes the old one's place in one step."""

    LOOK_S = 0.5  # between two looks at the file

    def __init__(self, path):
        self.path = Path(path)
        self._lock = threading.Lock()  # held to read the file
        self._seen = None  # which file was read last
        self._keys = None  # the Keys, None without a file
        self._asked = -math.inf  # clock when they were last looked at, set once they are there
        self._problem = ""  # that was said last

    def keys(self):
        """Any thread.  The Keys, read again when the file has changed; None when there is no file."""
        with self._lock:
            if time.monotonic() - self._asked >= self.LOOK_S:
                self._refresh()
                self._asked = time.monotonic()
            return self._keys

    def _refresh(self):
        try:
            found = os.stat(self.path)
            which = found.st_mtime_ns, found.st_size, found.st_ino
            if which != self._seen:
                self._keys = self.load()[1]
                self._seen, self._problem = which, ""
        except FileNotFoundError:
            self._keys = self._seen and []  # a file that vanished opens no door
            self._seen = self._seen and (0,)      # it may come back as it was
        except (OSError, ConfigError) as error:
            if str(error) != self._problem:
                log.error("%s; the keys known so far go on", error)
            self._problem = str(error)
            self._keys = self._keys or []   # a file that cannot be read opens no door either

    def load(self):
        """(the file's content, its Keys).  Raises OSError, ConfigError."""
        try:
            with open_plain(self.path) as file:
                content: Any = json.load(file)
            return content, [Key(str(row["name"]), bytes.fromhex(row["sha256"]), frozenset(row["rights"]),
                                 row.get("created", ""), terms_of(row)) for row in content["keys"]]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"--keys-file {self.path}: damaged; mend it, or move it away and mint keys "
                              "anew") from None

    @contextlib.contextmanager
    def changing(self):
        """Yields the file's rows as dicts, to be changed in place while no other process changes them; then
        writes them.  Fields that this version does not know stay.  Raises OSError, ConfigError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        with open(beside, "wb") as file, locked(file):
            content = self.load()[0] if self.path.exists() else {"keys": []}
            yield content["keys"]
            self._replace(content)

    def _replace(self, content):
        """Put a new file in the place of the old one, in one step.  Raises OSError."""
        target = os.path.realpath(self.path)
        draft = target + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)      # one that was left behind may have another mode
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w",
                  encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        deadline = time.monotonic() + (1.0 if sys.platform == "win32" else 0.0)
        while True:
            try:
                return os.replace(draft, target)
            except PermissionError:     # on Windows also while somebody reads the old file
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)


def key_row(key):
    """A new Key, without terms, as the file has it."""
    return {"name": key.name, "sha256": key.digest.hex(), "rights": sorted(key.rights),
            "created": key.created}


def terms_of(row):
    """The Terms in a row of the file.  Raises ValueError, TypeError or AttributeError if it is damaged."""
    limits, found = row.get("limits", {}), Terms(**{name: row[name] for name in Terms._fields if name in row})
    found = found._replace(limits={name: int(limits[name]) for name in LIMITS if name in limits},
                           models=tuple(map(str.lower, found.models)))
    if found.priority not in PRIORITIES or found.expires and not last_day(found.expires):
        raise ValueError
    return found


def last_day(text):
    """A date such as 2026-12-31, None if it is none."""
    with contextlib.suppress(ValueError):
        return datetime.datetime.strptime(text, "%Y-%m-%d").strftime("%Y-%m-%d")


@contextlib.contextmanager
def locked(file):
    """Holds the lock of an open file, once no other process does.  Raises OSError on Windows after 10 s."""
    if sys.platform == "win32":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)    # the byte at its position
        try:
            yield
        finally:
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def mint_key():
    """A key in the form of LM Studio's own tokens, which its SDKs insist on (lmstudio-js,
    lmstudioAPIToken.ts)."""
    letters = "".join(secrets.choice(ALPHANUMERIC) for _ in range(28))
    return f"sk-lm-{letters[:8]}:{letters[8:]}"


def keys_path(config):
    """The path of the minted keys."""
    if config.keys_file:
        return Path(config.keys_file)
    if os.name == "nt" and os.environ.get("APPDATA"):
        return Path(os.environ["APPDATA"], "lmgateway", "keys.json")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "lmgateway", "keys.json")


class AccessControl:
    """Addresses, origins, keys and sessions.  Any thread may call."""

    FREE_FAILURES = 3  # wrong keys that an address may offer before it is made to wait
    FAILURES_S = 60.0  # after this they are forgotten
    LONGEST_PAUSE_S = 3.0
    SESSIONS = 20  # of one key; the oldest gives way

    def __init__(self, config):
        self._config = config
        self._fixed = [Key(name, digest(key), ALL_RIGHTS) for name, key in config.api_key.items()]
        self._file = KeyFile(keys_path(config))
        self.guests: list[Key] = []  # Keys that are known though none may be asked for
        self._lock = threading.Lock()  # held to change the three below; each look at them is atomic
        self._sessions: dict = {}  # digest of the cookie -> digest of the key
        self._proven: dict = {}  # (address, digest) of keys that were right
        self._failures: dict = {}  # address -> (how many, monotonic seconds of the last)

    @property
    def need_key(self):
        """True when a key is asked for: one is set, or a keys file is there."""
        return bool(self._fixed) or self._file.keys() is not None

    def _keys(self):
        return [*self._fixed, *(self._file.keys() or ()), *self.guests]

    def terms(self, name):
        """The Terms that the key of this name has at this moment."""
        return next((key.terms for key in self._keys() if key.name == name), Terms())

    def client_of(self, request):
        """The client's address; behind trusted proxies, the last that they name and that is not one of
        them."""
        address, trusted = request.client, self._config.trusted_proxies
        if trusted == ():   # None are all addresses
            return address
        named = [part.strip() for part in request.header("x-forwarded-for").split(",") if part.strip()][-32:]
        while named and within(address, trusted):
            address = re.sub(r"^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$", r"\1\2", named.pop())    # some add a port
        return address

    def admit_address(self, address):
        """Raises HttpError 403 for an address that the allowlist does not name."""
        if not within(address, self._config.allow):
            raise HttpError(403, "address_not_allowed",
                            f"{address} is not in IP_ALLOWLIST; add it there to let it in", close=True)

    def recognize(self, request):
        """The Identity that a request's key or cookie has at this moment; None without a right one.

        It changes nothing, so that a right that is used for long can be asked for again."""
        if not self.need_key:
            return self._guest(request)
        with contextlib.suppress(HttpError):
            return self._identity(request, self._find(credentials(request)))
        return None

    def _guest(self, request):
        """The Identity if no key is asked for."""
        key = self._find(credentials(request)) if self.guests else None
        return Identity(key.name, key.rights) if key else Identity(None)

    def identify(self, request, offered):
        """The Identity of a request that offers these keys.  Raises HttpError 401, at a guesser's pace."""
        if not offered and not self.need_key:
            return self._guest(request)
        identity = self._identity(request, self._check(request, offered) if offered else None)
        if identity is None:
            raise HttpError(401, "key_wrong" if offered else "key_needed",
                            "send a valid key as Authorization: Bearer KEY or X-API-Key: KEY",
                            [("WWW-Authenticate", "Bearer")])
        return identity

    def _identity(self, request, key):
        """The Identity by the Key, else by the cookie; None without either.  Raises HttpError 401 if the
        key's last day is over."""
        by_cookie = key is None
        if by_cookie:
            cookie = session_of(request)
            session = self._sessions.get(digest(cookie)) if cookie else None
            key = next((key for key in self._keys() if key.digest == session), None)    # as it is now
        if key and key.terms.expires and this_day()[0] > key.terms.expires:
            raise HttpError(401, "key_expired",
                            f"the last day of the key {key.name} was {key.terms.expires}; --set-key "
                            f"{key.name} --expires 30d gives it more time")
        return key and Identity(key.name, ALL_RIGHTS if "admin" in key.rights else key.rights, by_cookie)

    def _find(self, offered):
        """The Key that is among those offered, or None.  Every key is compared, in constant time."""
        found = None
        for given in map(digest, offered):
            for key in self._keys():
                if hmac.compare_digest(given, key.digest):
                    found = found or key
        return found

    def _check(self, request, offered):
        """The Key among those offered, or None, after a pause if the address has offered wrong keys.

        A right key that is new from there waits as long as a wrong one: a guess cannot be told from its
        time.  Others behind the same address with keys or cookies that are known wait for nothing."""
        key, place = self._find(offered), network_of(request.client)
        if key and (place, key.digest) in self._proven:
            return key
        failures = self._count_failures(place, 0 if key else 1)
        if failures > self.FREE_FAILURES:
            request.pause(min(self.LONGEST_PAUSE_S, 0.1 * 2 ** min(failures - self.FREE_FAILURES, 16)))
        if key:
            with self._lock:
                remember(self._proven, (place, key.digest), True)
        return key

    def _count_failures(self, place, more):
        """How many wrong keys an address has offered of late, so many more included."""
        now = time.monotonic()
        with self._lock:
            failures, last = self._failures.get(place, (0, now))
            failures = more if now - last > self.FAILURES_S else failures + more
            if more:
                self._failures.pop(place, None)
                remember(self._failures, place, (failures, now))
        return failures

    def open_session(self, request, offered):
        """The cookie for a key; None for a wrong one."""
        key = self._check(request, [offered])
        if key is None:
            return None
        cookie = secrets.token_urlsafe(32)
        with self._lock:
            same = [session for session, owner in self._sessions.items() if owner == key.digest]
            for session in same[:max(0, len(same) + 1 - self.SESSIONS)]:
                del self._sessions[session]
            remember(self._sessions, digest(cookie), key.digest)
        return cookie

    def close_session(self, request):
        """The request's cookie opens no door any more."""
        with self._lock:
            self._sessions.pop(digest(session_of(request) or ""), None)

    def check_origin(self, request):
        """Raises HttpError 403 if a web page could be using this browser's reach (CSRF, DNS rebinding)."""
        host, config = host_of(request), self._config
        local_only = not self.need_key and (loopback(config.host) or not config.no_auth)
        if local_only and not loopback(host) and (host or request.version >= (1, 1)):
            raise HttpError(403, "host_not_local", LOCAL_ONLY)
        origin, opens = request.header("origin"), asks_websocket(request)
        if request.method in ("GET", "HEAD") and not opens or not origin:
            return
        if origin.partition("://")[2] != request.header("host") and not self.allows_origin(origin):
            raise HttpError(403, "origin_not_allowed",
                            f"pages of {origin[:100]} may not do this; CORS_ORIGINS can let them in")

    def allows_origin(self, origin):
        """True when pages of this origin may call."""
        allowed = self._config.cors_origins
        return bool(origin) and origin != "null" and (origin in allowed or "*" in allowed)


def this_day():
    """(this day, here: 2026-12-31, the seconds that are left of it)."""
    now = time.localtime()
    return "%04d-%02d-%02d" % now[:3], max(1, 86400 - 3600 * now.tm_hour - 60 * now.tm_min - now.tm_sec)


def remember(table, name, value, limit=10_000):
    """table[name] = value, in a table that forgets its oldest beyond the limit."""
    table[name] = value
    while len(table) > limit:
        table.pop(next(iter(table)), None)


@functools.lru_cache(maxsize=1024)
def network_of(address):
    """The address that a client's share is counted for: of IPv6, the /64 of one household or host."""
    if ":" in address:
        with contextlib.suppress(ValueError):
            found = ipaddress.IPv6Address(address.partition("%")[0])
            return str(found.ipv4_mapped or ipaddress.IPv6Network((found, 64), strict=False))
    return address


def within(address, ranges):
    """True when an address lies in one of the networks.  One that maps IPv4 into IPv6 counts as IPv4."""
    if ranges is None:
        return True
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in ranges)
    return False


def cors_headers(access, request):
    """The headers that let pages of an allowed origin read an answer (Fetch, 3.3)."""
    origin = request.header("origin")
    if not access.allows_origin(origin):
        return []
    return [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"),
            ("Access-Control-Expose-Headers", "*")]


def preflight(access, request):
    """The answer to a browser that asks before it sends; Private Network Access included."""
    if not access.allows_origin(request.header("origin")):
        raise HttpError(403, "origin_not_allowed",
                        "pages of this origin may not call; CORS_ORIGINS can let them in")
    asked = request.header("access-control-request-headers") or "authorization, x-api-key, content-type"
    headers = [*cors_headers(access, request), ("Access-Control-Allow-Methods", ", ".join(METHODS)),
               ("Access-Control-Allow-Headers", asked), ("Access-Control-Max-Age", "600")]
    if request.header("access-control-request-private-network").lower() == "true":
        headers.append(("Access-Control-Allow-Private-Network", "true"))
    return Response(204, headers, None)


def digest(secret):
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def credentials(request):
    """The keys that a request offers, in the forms of the OpenAI SDKs, the Anthropic SDKs and EventSource."""
    scheme, _, token = request.header("authorization").partition(" ")
    offered = [token.strip()] if scheme.lower() == "bearer" else []
    offered.append(request.header("x-api-key"))
    if request.query_text and request.path.startswith("/debug/") and request.method in ("GET", "HEAD"):
        offered.append(request.query.get("api_key", ""))
    return [key for key in offered if key] or [request.key] * bool(request.key)


def host_of(request):
    """The host name of the Host header, without its port."""
    host = request.header("host")
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def asks_websocket(request):
    return "websocket" in listing(request.header("upgrade"))


def cookies(value):
    """The name=value parts of a Cookie header."""
    return [part.strip() for part in value.split(";") if part.strip()]


def cookie_name(request):
    """Cookies do not tell ports apart (RFC 6265, 8.5), and two gateways may share a host."""
    return f"{SESSION}_{request.port}="


def session_of(request):
    """The value of our cookie; None without one."""
    name = cookie_name(request)
    return next((part[len(name):] for part in cookies(request.header("cookie").replace(",", ";"))
                 if part.startswith(name)), None)


# --- 7.4 forwarding ----------------------------------------------------------

ALIASES = re.compile(r"/(?:(?:chat/completions|completions|embeddings)/?"
                     r"|(?:models|responses|messages)(?:/.*)?)")
USER_HEADERS = ("x-openwebui-user-email", "x-openwebui-user-name", "x-openwebui-user-id")  # the first counts
WITHHELD = HOP_BY_HOP | {"authorization", "x-api-key", "expect"}  # these stop here, credentials included
QUEUE_RETRY_S = 10  # after which one that found the queue full may try again


class Unfinished(GatewayError):
    """An answer broke off: the client's connection is closed so that it cannot look complete."""


class Stopped(HttpError):
    """Somebody stopped a request.  by: the name of the key.  The header keeps the SDKs of OpenAI and
    Anthropic from trying again."""

    def __init__(self, by):
        super().__init__(503, "stopped", f"stopped by {by or 'somebody at the gateway'}; ask again if it was "
                                         "not you", [("x-should-retry", "false")])
        self.by = by


class Turns:
    """Lets inferences in, as far as the limits of their keys reach, and one after the other to LM Studio.

    Any thread may call.  A Turn that has to wait has a bell, which rings when a slot is free for it."""

    def __init__(self, config, access, hub, history):
        self._config, self._access, self._hub = config, access, hub
        self._lock = threading.Lock()  # guards the next two; held for memory work only
        self._scheduler = Scheduler(config.max_running)
        self._accounts: defaultdict = defaultdict(Account)  # by name of a key
        if history:
            self._restore(history)

    def _restore(self, history):
        """This day's counts go on."""
        day, left_s = this_day()
        try:
            for key, (requests, prompt, completion, _) in requests_by_key(
                    history.path, time.time() - 86400 + left_s).items():
                self._account(key, day).today.update(requests=requests, promptTokens=prompt,
                                                     completionTokens=completion)
        except HistoryError as error:
            log.error("history %s: %s; limits by the day begin anew", history.path, error)

    def _account(self, name, day):
        account = self._accounts[name]
        account.turn(day)
        return account

    def enter(self, request, model, user, bell=threading.Event):
        """The Turn of an inference that is let in; if it has to wait, with the result of bell().  Raises
        HttpError."""
        name, clock, (day, left_s) = request.identity.name, time.monotonic(), this_day()
        terms = self._access.terms(name)
        if terms.models and not (model and any(fnmatch.fnmatchcase(model.lower(), glob)
                                               for glob in terms.models)):
            raise HttpError(403, "model_not_allowed", f"the key {name} may ask {', '.join(terms.models)}; "
                            f"{model or 'a request that names no model'} is not among them")
        turn = Turn(self._hub.served(model), name, (name, user) if name is not None else request.client,
                    terms.priority, clock)
        with self._lock:
            account = self._account(name, day)
            reached = account.refusal(terms.limits, clock, left_s)
            if not reached:
                self._scheduler.limits[name] = terms.limits.get("running", math.inf)
                self._join(turn, bell)
                account.let_in(clock)
            request.ratelimit = account.headers(terms.limits, clock)
        if reached:
            raise limit_reached(terms.limits, *reached)
        return turn

    def _join(self, turn, bell):  # lock held
        ring(self._scheduler.join(turn, turn.since))
        if turn.began is None:
            if len(self._scheduler.waiting) > self._config.max_waiting:
                self._scheduler.leave(turn, turn.since)
                raise HttpError(
                    429, "queue_full", f"{self._config.max_waiting} requests wait for their turn, as many as "
                    "MAX_WAITING allows; try again later", [("Retry-After", str(QUEUE_RETRY_S))])
            turn.bell = bell()

    def leave(self, turn, record):
        """A request is over, in any way: its slot is another's."""
        usage, served = record.usage or {}, self._hub.served(turn.model)
        clock, (day, _) = time.monotonic(), this_day()
        with self._lock:
            if usage:
                self._account(turn.key, day).spend(clock, usage.get("promptTokens") or 0,
                                                   usage.get("completionTokens") or 0)
            if served != turn.model:
                self._scheduler.rename(turn.model, served)
            ring(self._scheduler.leave(turn, clock, record.state == "done"))
            turn.about = None

    def took(self, model, seconds):
        """It is known from before that a request of a model took so long."""
        turn = Turn(model, None, None, PRIORITIES[1], 0.0)
        with self._lock:
            self._scheduler.join(turn, 0.0)
            self._scheduler.leave(turn, seconds, done=True)

    def tell(self):
        """Those that wait hear of their places."""
        clock = time.monotonic()
        with self._lock:
            places = self._scheduler.places(clock, lambda turn: (
                turn.about.record.progress(clock).get("etaMs", 0) / 1000 if turn.about else 0.0))
            placed = [(turn.about.record, place) for turn, place in places if turn.about]
        self._hub.place(placed)

    def look(self):
        """Now and then: changes of the keys of those that wait count."""
        with self._lock:
            waiting = [(turn.key, turn.about) for turn in self._scheduler.waiting]
        if not waiting:
            return
        limits = {name: self._access.terms(name).limits.get("running", math.inf) for name in dict(waiting)}
        with self._lock:
            self._scheduler.limits.update(limits)
            ring(self._scheduler.start(time.monotonic()))
        for name, inference in waiting:
            if inference and self._access.recognize(inference.request) is None:
                inference.stop(HttpError(401, "key_wrong", f"the key {name} is no longer valid"))
        self.tell()

    def used(self, name):
        """A key's use, as GET /me tells it."""
        clock, (day, _) = time.monotonic(), this_day()
        with self._lock:
            account, (running, waiting) = self._account(name, day), self._scheduler.counts(name)
            requests, tokens, today = account.requests.used(clock), account.tokens.used(clock), account.today
        return {"running": running, "waiting": waiting, "minute": {"requests": requests, "tokens": tokens},
                "day": {kind: today[kind] for kind in ("requests", "promptTokens", "completionTokens")}}


def ring(turns):
    """The Turns that begin now hear of it."""
    for turn in turns:
        if turn.bell:
            turn.bell.set()


def limit_reached(limits, name, used, free_s):
    """The HttpError for a request beyond its key's limit."""
    wait_s = max(1, math.ceil(free_s))
    return HttpError(429, "rate_limit_exceeded", f"{name}: {used:,} of {limits[name]:,} {LIMITS[name]} are "
                     f"used; try again in {span(wait_s)}", [("Retry-After", str(wait_s))])


class Gateway:
    """All that views may reach.  Built once in main()."""

    def __init__(self, config, hub, upstream, monitor=None, history=None):
        self.config, self.hub, self.upstream, self.monitor = config, hub, upstream, monitor
        self.history, self.server = history, None
        self.access = AccessControl(config)
        self.turns = Turns(config, self.access, hub, history)
        self.started, self._started = time.time(), time.monotonic()
        self.address = ""
        self.lan_urls = []
        self.volume = LogVolume(monitor.follower.directory, config.log_dir_warn) if monitor else None
        self.inferences: dict[str, Exchange] = {}  # by requestId, while they run; each step is atomic
        self.instances: dict[str, str] = {}     # the models that LM Studio named to them, by their references
        self.demo = False  # LM Studio is the imitation
        self.stopping = False  # the end has come: connections are not kept
        self.cutting_off = False    # running requests are cut: they had their time

    @property
    def uptime(self):
        """Seconds since it was built, also if the clock was set since."""
        return round(time.monotonic() - self._started, 1)


class Exchange:
    """A client's request on its way to LM Studio, over HTTP or a socket.  One that asks a model is an
    inference: it has a record and a turn, and others hear of it until its one end."""

    bell: Callable[[], Any] = threading.Event  # gives the bell that rings when its turn comes
    record: Any = None
    turn: Any = None
    cause: Any = None  # the GatewayError for which it was stopped
    over = False
    _due = 0.0  # clock when listeners hear of its tokens again

    def __init__(self, gateway, request):
        self._gateway, self.request = gateway, request

    def enter(self, **about):
        """It is an inference.  Raises HttpError if the limits of its key or the queue do not let it in."""
        gateway, request = self._gateway, self.request
        self.turn = gateway.turns.enter(request, about["model_asked"], about.get("user"), self.bell)
        self.record = Record(gateway.hub.request_id(), time.time(), time.monotonic(), client=request.client,
                             key=request.identity.name, agent=request.header("user-agent")[:200] or None,
                             priority=PRIORITIES[self.turn.level], **about)

    def begin(self):
        """Others hear of it, and if it has to wait, of its place."""
        self._gateway.inferences[self.record.id] = self
        self._gateway.hub.begin(self.record)
        self.turn.about = self
        if self.turn.bell:
            self._gateway.turns.tell()

    def stop(self, cause):
        """Any thread.  Ends it, unless it is over: with an HttpError, which the client is told, or with
        ClientLeft."""
        self.cause = self.cause or cause
        if self.turn and self.turn.bell:
            self.turn.bell.set()

    def go(self):
        """It waited, and goes to LM Studio now."""
        self.turn.bell = None
        self._gateway.hub.send(self.record)

    def generated(self, tokens, first, now):
        """Its answer has so many tokens at the clock reading now; the first came at first."""
        if now >= self._due:
            self._due = now + COUNT_S
            self._gateway.hub.generated(self.record, tokens, first)

    def conclude(self, error, operation, status, meter):
        """An inference is over, in any way: its turn is another's; the hub and the log are told."""
        record, self.over = self.record, True
        state = "done" if error is None else "failed" if operation not in LEFT else "abandoned"
        self._gateway.inferences.pop(record.id, None)
        try:
            self._gateway.hub.end(record, Outcome(state, status, error, operation, meter,
                                                  getattr(self.cause, "by", None)))
        finally:
            self._gateway.turns.leave(self.turn, record)
        usage = record.usage or {}
        told = "upstream_error" if operation == "upstream_error" else error     # which can quote a prompt
        log.log(logging.WARNING if error else logging.INFO, "%s %s %s %s: %s, %.0f ms, %s + %s tokens%s",
                record.client, record.key or "-", record.path, record.model or record.model_asked or "-",
                record.status or "-", record.total_ms, usage.get("promptTokens", "?"),
                usage.get("completionTokens", "?"), f": {told}" if told else "")


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


def plain_target(target):
    """The path of a target, as Express compares paths."""
    return target.partition("?")[0].rstrip("/")


def upstream_headers(request, length, upstream, uncompressed, withheld=()):
    """The end-to-end headers of a request in their order, without the client's credentials; length is that of
    the body.  uncompressed: an answer is wanted that can be changed on its way."""
    dropped = WITHHELD.union(listing(request.header("connection")), withheld)
    headers = [] if request.header("host", None) is not None else [("Host", upstream.host)]
    for name, value in request.headers:
        key = name.lower()
        if key == "host":
            headers.append((name, upstream.host))
        elif key in ("content-length", "transfer-encoding"):    # one of the two, at most
            headers.append((name if key == "content-length" else "Content-Length", str(length)))
        elif key == "cookie" and SESSION in value:
            others = [part for part in cookies(value) if not part.startswith(SESSION)]
            headers += [(name, "; ".join(others))] if others else []
        elif key == "accept-encoding" and uncompressed:
            headers.append((name, "identity"))
        elif key not in dropped:
            headers.append((name, value))
    return [*headers, ("Authorization", f"Bearer {upstream.token}")] if upstream.token else headers


def user_of(request, asked):
    """The person behind a shared key, by Open WebUI's headers or the body; None of nobody."""
    named = [urllib.parse.unquote(request.header(name)).strip() for name in USER_HEADERS]
    return bounded_text(next(filter(None, [*named, (asked.user or "").strip()]), "")) or None


def client_headers(answer, cut):
    """The end-to-end headers of an answer, in order.  CORS is ours to say."""
    dropped = HOP_BY_HOP.union(listing(answer.header("connection")),
                               ("content-length",) if cut or answer.chunked else ())
    return [(name, value) for name, value in answer.headers
            if (key := name.lower()) not in dropped and not key.startswith("access-control-")]


def forward(gateway, request):
    """Any other path: LM Studio's answer, unchanged, metered if it is an inference."""
    target = upstream_target(request.target, gateway.access.need_key)
    dialect = DIALECTS.get(plain_target(target).lower()) if request.method == "POST" else None
    asked = parse_body(dialect, request.body) if dialect else ParsedBody(request.body)
    kind = CommentedForward if asked.stream and gateway.config.prefill_comments else Forward
    return kind(gateway, request, target, asked).response(dialect)


class Forward(Exchange):
    """A request on its way to LM Studio, and the body of the Response: its answer's pieces as they come.

    It lives in the thread of the client's connection: it begins, waits for its turn, is sent, waits for the
    answer's head, relays the pieces, and ends once, in _end().  An inference has a meter besides."""

    alters = False  # it may add to the answer

    def __init__(self, gateway, request, target, asked):
        super().__init__(gateway, request)
        self._asked, self._shared = asked, request.identity.name in gateway.config.users_from
        headers = upstream_headers(request, len(asked.data), gateway.upstream,
                                   asked.asks_usage or self.alters, USER_HEADERS if self._shared else ())
        self._call = Call(gateway.upstream.origin, request.method, target, headers, asked.data)
        self._choose_timeout(asked.stream)
        self._anthropic = plain_target(target).lower() == "/v1/messages"
        self._dialect: Any = None
        self._answer: Any = None
        self._meter: Any = None

    def _choose_timeout(self, stream):
        self._timeout_option = "PROXY_STREAM_TIMEOUT" if stream else "PROXY_TIMEOUT"
        self._call.set_timeout(getattr(self._gateway.config, self._timeout_option.lower()) / 1000)

    # --- to LM Studio

    def response(self, dialect):
        """LM Studio's own head; dialect: of an inference.  Raises HttpError, ClientLeft."""
        request, asked, self._dialect = self.request, self._asked, dialect
        if dialect:
            self.enter(method=request.method, path=request.path, target=plain_target(self._call.selector),
                       dialect=dialect.name, user=user_of(request, asked) if self._shared else None,
                       model_asked=asked.model, messages=asked.messages, fingerprint=asked.fingerprint,
                       stream=bool(asked.stream), size=asked.size, tools=asked.tools)
        try:
            if dialect:
                self.begin()
                self.record.overhead_s = time.monotonic() - request.arrived
            request.connection.leave = lambda: self.stop(ClientLeft())
            return self._respond()
        except BaseException as error:
            self._fail(error)
            raise self.cause from None

    def stop(self, cause):
        super().stop(cause)
        self._call.cancel()

    def _respond(self):
        self._has_turn(None)
        answer = self._take_head()
        headers = client_headers(answer, self.alters or self._cuts)
        if self.request.method != "HEAD" and answer.status not in (204, 304):
            return Response(answer.status, headers, self, answer.reason, date=False)
        self._finish()
        return Response(answer.status, headers, None, answer.reason, date=False)

    def _has_turn(self, wait_s):
        """True once it may be sent, False after so many s.  Raises the cause for which it was stopped."""
        if self.turn and self.turn.bell:
            if not self.turn.bell.wait(wait_s):
                return False
            if self.cause:
                raise self.cause
            self.go()
        return True

    def _open(self):
        return self._gateway.upstream.open(self._call)

    def _take_head(self):
        """LM Studio's Answer.  If we could not read the request, it shows whether a stream was asked for."""
        self._answer, asked = self._open(), self._asked.stream
        answer = self._answer
        if asked is None:
            self._choose_timeout(answer.streams)
        if self.record:
            self.record.stream = answer.streams if asked is None else asked
            self._meter = Meter(self._dialect, answer.streams, self._cuts, answer.header("content-encoding"))
        return answer

    @property
    def _cuts(self):
        """True if the answer's bytes may become fewer."""
        return self._asked.asks_usage and self._answer.streams

    # --- to the client

    @property
    def ready(self):
        """True when the first piece will not have to be waited for."""
        return bool(self._answer) and self._answer.ready

    def __iter__(self):
        """The pieces.  Raises Unfinished when it breaks off, ClientLeft."""
        try:
            yield from self._pieces()
        except Exception as error:
            stopped = self.cause is not None
            yield self._fail(error)
            told = isinstance(self.cause, HttpError) and (
                self._answer is None or stopped and self._answer.streams)
            if told:
                yield stream_event(error_response(self.cause, self._anthropic).body, self._anthropic)
            if not isinstance(self.cause, HttpError):
                raise self.cause from None
            if not told or stopped:
                raise Unfinished from None

    def _pieces(self):
        """The answer's pieces, metered.  A request is over before its last piece leaves, so that whoever has
        the answer finds it counted."""
        answer, meter = self._answer, self._meter
        for piece in answer.pieces():
            out = piece
            if meter:
                now = time.monotonic()
                out = meter.feed(piece, now)
                if meter.first is not None:
                    self.generated(meter.pieces, meter.first, now)
            yield out + self._finish() if answer.over else out
        if self.cause:     # an answer that ends with its connection cannot tell
            raise self.cause
        if not self.over:
            yield self._finish()

    # --- the end

    def close(self):
        """The client has all, or wants no more."""
        if not self.over:
            self._fail(ClientLeft())

    def _finish(self):
        """The answer is complete.  Gives bytes that were held back."""
        held, error = self._meter.end() if self._meter else b"", None
        if self._meter:
            error = self._meter.usage.error
            if self._answer.status >= 400 and not error:
                error = f"LM Studio answered {self._answer.status} {self._answer.reason}"
        self._end(error, "upstream_error" if error else None)
        return held

    def _fail(self, error):
        """It ends in error; the cause is to be raised for it.  Gives bytes that were held back."""
        if isinstance(error, BROKEN):
            error = upstream_error(error, self._timeout_option, self._answer is not None)
        cause = self.cause = self.cause or error
        held = self._meter.end() if self._meter else b""
        if isinstance(cause, ClientLeft):
            phase = ("before the answer" if self._answer is None else "while the prompt was read"
                     if self._meter and self._meter.stream and self._meter.first is None
                     else "during the answer")
            self._end(*(f"lmgateway stopped {phase}", "gateway_stopped") if self._gateway.cutting_off else
                      (f"the client left {phase}", "client_disconnected"))
        elif isinstance(cause, HttpError):
            self._end(str(cause), cause.code)
        else:
            self._end(f"a fault in lmgateway ({error_text(cause)})", "internal_error")
        return held

    def _end(self, error, operation):
        """It is over, once: LM Studio's connection is free, the hub and the log are told."""
        if self.over:
            return
        self.over = True
        self.request.connection.leave = None
        self._gateway.upstream.done(self._call, self._answer)
        self.request.told = bool(self.record or error)
        if self.record:
            self.conclude(error, operation, self._answer and self._answer.status, self._meter)
        elif error:
            log.log(logging.INFO if operation == "client_disconnected" else logging.WARNING, "%s %s: %s",
                    self.request.method, self.request.path, error)


class CommentedForward(Forward):
    """A Forward that fills its stream with SSE comments while LM Studio is silent (PREFILL_COMMENTS): every
    client ignores them, and they keep idle timers awake.

    A client without a byte for SILENCE_S gets a head of ours; a failure after that is told inside the
    stream."""

    SILENCE_S = 5.0  # before each comment
    alters = True

    _sent: Any = None   # the Answer before its head is there
    _silent_s = 0.0     # for how long LM Studio has said nothing

    def _respond(self):
        if self._is_silent():
            return Response(200, [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")], self)
        return super()._respond()

    def _open(self):
        return self._sent.begin()

    def _pieces(self):
        """Comments until LM Studio speaks, then its answer; if the client has a head of ours, as a stream."""
        late = self._answer is None
        while late and self._is_silent():
            yield self._gateway.hub.comment(self.record)
        if late:
            self._take_head()
        while self._is_silent():
            yield self._gateway.hub.comment(self.record)
        if not late or self._answer.streams:
            return (yield from super()._pieces())
        body = b""
        for piece in super()._pieces():
            body += piece[:WHOLE_LIMIT - len(body)]
        yield stream_event(body, self._anthropic)

    def _is_silent(self):
        """True after SILENCE_S without its turn or a byte of LM Studio's.  Raises TimeoutError."""
        if not self._sent:
            if not self._has_turn(self.SILENCE_S):
                return True
            self._sent = self._gateway.upstream.send(self._call)
        limit_s = self._call.timeout_s or math.inf
        wait_s = min(self.SILENCE_S, limit_s - self._silent_s)
        if self._answer and self._answer.ready or self._call.wait(wait_s):
            self._silent_s = 0.0
            return False
        self._silent_s += wait_s
        if self._silent_s >= limit_s:
            raise TimeoutError
        return True


def stream_event(body, anthropic):
    """A body that is no stream as an event of one; errors as LM Studio and Anthropic send them in streams."""
    value = json_object(body) or {"error": str(body, "utf-8", "replace")[:LONGEST_ERROR]}
    if isinstance(value.get("error"), str):
        value = {**value, "error": {"message": value["error"]}}
    kind = {"type": "error"} if anthropic and "error" in value else {}
    name = b"event: error\n" if "error" in value else b""
    return name + b"data: " + json.dumps({**kind, **value}).encode() + b"\n\n"


# --- 7.5 views: the gateway's own pages --------------------------------------


@functools.lru_cache(maxsize=None)
def dashboard_page():
    """(page, page in gzip, its Content-Security-Policy, which names the page's own scripts and styles by
    their digests), made once."""
    digests = {tag: " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
                             for inside in re.findall(b"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()),
                                                      DASHBOARD, re.DOTALL))
               for tag in ("script", "style")}
    policy = (f"default-src 'none'; script-src {digests['script']}; style-src {digests['style']}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
              "frame-ancestors 'none'")
    return DASHBOARD, gzip.compress(DASHBOARD, 9), policy


def dashboard(gateway, request):
    page, packed, policy = dashboard_page()
    headers = [("Content-Type", "text/html; charset=utf-8"), ("Vary", "Accept-Encoding"),
               ("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer")]
    if "gzip" not in listing(request.header("accept-encoding")):
        return Response(200, headers, page)
    return Response(200, [*headers, ("Content-Encoding", "gzip")], packed)


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
    """The page that LM Studio's own SDKs and `lms` ask for before they connect (lms, createClient.ts: within
    500 ms)."""
    require_upstream(gateway.upstream.health(1.0, GREETING_S))
    return json_response({"lmstudio": True})


def event_stream(gateway, request):
    """Events as Server-Sent Events; ?events= filters, Last-Event-ID or ?since= resumes."""
    asked = [value for name, value in urllib.parse.parse_qsl(request.query_text) if name == "events"]
    names = frozenset(words(",".join(asked)))
    since = request.header("last-event-id") or request.query.get("since", "")
    return Response(200, [("Content-Type", "text/event-stream; charset=utf-8"), ("X-Accel-Buffering", "no")],
                    stream_frames(gateway.hub, since, names, request))


def stream_frames(hub, since, names, request):
    """Bytes for one listener until the hub closes: connected, events that it missed, those that come, pings.

    No piece is longer than PIECE: so much does a client cost that does not read."""
    with hub.listening(since, request.identity.owner) as listener, watching(request, listener.bell) as left:
        held = hub.event_id(listener.sent)  # the client's latest id: repeated by frames that are no event
        yield own_frame(hub, held, "connected", {"message": "Connected to lmgateway"}, f"retry: {RETRY_MS}\n")
        heard = time.monotonic()    # when the client last had a byte
        while True:
            over = hub.closed or left.is_set()  # asked first: events of before the end are still sent
            frames, gap = hub.read(listener, names, PIECE)
            if gap:
                frames.insert(0, own_frame(hub, held, "gap", gap))
            held = hub.event_id(listener.sent)
            if not frames and time.monotonic() - heard >= PING_S:
                frames.append(own_frame(hub, held, "ping", {}))
            if frames:
                yield from pieces_of(b"".join(frames))
                heard = time.monotonic()
            elif over:
                return
            time.sleep(hub.listeners / WAKES_PER_S)
            hub.wait(listener, 0 if over else heard + PING_S - time.monotonic())


def pieces_of(data):
    with memoryview(data) as view:
        for start in range(0, len(data), PIECE):
            yield view[start:start + PIECE]


def own_frame(hub, held, name, data, retry=""):
    return sse_frame(held, name, to_json({"timestamp": hub.now(), **data}), retry)


@contextlib.contextmanager
def watching(request, bell):
    """Ring the bell when the listener leaves, so that its thread ends at once and not with the next ping."""
    left = threading.Event()

    def leave():
        left.set()
        wake([bell])

    request.connection.leave = leave
    try:
        yield left
    finally:
        request.connection.leave = None


STATUS_REQUESTS = 10    # that are over, in /debug/status


def status_page(gateway, request):
    """The requests of this moment, and how far the monitor has read."""
    hub = gateway.hub
    running, over, model = hub.overview(STATUS_REQUESTS)
    reason = gateway.upstream.health(10.0, GREETING_S)
    return json_response({"status": "degraded" if reason else "ok", "version": VERSION,
                          "timestamp": hub.now(), "uptime": gateway.uptime,
                          "currentOperation": operation_of(running), "activeModel": model,
                          "recentRequests": over, "running": running,
                          **hub.totals(),
                          "gateway": {"address": gateway.address, "upstream": gateway.upstream.base,
                                      "lanUrls": gateway.lan_urls, "keyNeeded": gateway.access.need_key,
                                      "history": gateway.history is not None, "demo": gateway.demo},
                          "lmstudio": {"up": not reason, "reason": reason or None},
                          "log": {**log_status(gateway.monitor),
                                  **(gateway.volume.facts() if gateway.volume else {})},
                          "stream": {"clients": hub.listeners, "lastId": hub.last_id,
                                     "dropped": hub.dropped}})


def operation_of(running):
    """The furthest state of the running requests, in a word."""
    return max((record["state"] for record in running), key=STATES.index, default="idle")


def log_status(monitor):
    """The monitor's state.  Only the tail thread writes it; each value is a number or copied whole."""
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
    """`?client=` keeps the requests with this text in their address, key, user or program."""
    sought = request.query.get("client", "").lower()
    rows = gateway.hub.shown(gateway.config.requests_kept, request.identity.owner)
    who = ("client", "key", "user", "userAgent")
    return json_response({"requests": [
        row for row in rows if any(sought in str(row.get(name) or "").lower() for name in who)]})


def known_request(gateway, request, owner=None):
    """The request that the path names; with an owner, if it is that key's.  Raises HttpError 404."""
    found = gateway.hub.detail(request.path.rpartition("/")[2])
    if found is None or owner not in (None, found["key"]):
        raise HttpError(404, "request_unknown", "no such request among the latest; see /debug/requests")
    return found


def request_detail(gateway, request):
    return json_response(known_request(gateway, request, request.identity.owner))


def stop_request(gateway, request):
    """End a request.  The answer waits until it is over, for a second at most."""
    found, identity = known_request(gateway, request), request.identity
    if "admin" not in identity.rights and found["key"] != identity.name:
        raise HttpError(403, "not_yours", "that is another's request; a key with the right admin can stop it")
    running = gateway.inferences.get(found["requestId"])
    if running is None:
        raise HttpError(409, "request_over", "it is over already" if found["totalTimeMs"] is not None else
                        "it did not come through this gateway, which therefore cannot stop it")
    running.stop(Stopped(identity.name))
    wait_until(lambda: running.turn.over, 1.0)
    return json_response(known_request(gateway, request))


def me(gateway, request):
    """The key that asks: its rights, limits and use."""
    identity = request.identity
    terms = gateway.access.terms(identity.name)
    rights = [name for name in RIGHTS if name in identity.rights]
    return json_response({"name": identity.name, "rights": rights, "priority": terms.priority,
                          "limits": terms.limits, "models": terms.models,
                          "expires": terms.expires or None, **gateway.turns.used(identity.name)})


def series_page(gateway, request):
    """Figures by minute: from memory for the part of the last day since this start, else from the history."""
    minutes, by = request.query.get("minutes", "60"), request.query.get("by", "")
    if not re.fullmatch("[0-9]{1,5}", minutes) or not 1 <= int(minutes) <= MOST_MINUTES:
        raise HttpError(400, "minutes_unknown", f"minutes={minutes[:50]}: use 1 to {MOST_MINUTES}")
    if "by" in request.query and by not in BY[1:]:
        raise HttpError(400, "by_unknown", f"by={by[:50]}: use one of {', '.join(BY[1:])}")
    step, now = series_step(int(minutes)), time.time()
    begin = now - 60 * int(minutes)
    first = begin // step * step
    since, cells = gateway.hub.series(first)
    if gateway.history is not None and since > first:
        try:
            cells += gateway.history.ended(first, since)
        except HistoryError as error:
            raise HttpError(503, "history_unreadable", str(error)) from None
    return json_response({"from": utc_text(begin), "to": utc_text(now), "step": step,
                          **({"by": by} if by else {}), **series_rows(cells, step, by)})


def models_page(gateway, request):
    """LM Studio's models, the loaded ones first, with the requests that run and wait here."""
    rows, as_of = gateway.upstream.models(gateway.hub.loads)
    if rows is None:
        raise HttpError(502, "upstream_unreachable", gateway.upstream.health(10.0, GREETING_S) or
                        "LM Studio does not list its models: it is older than 0.3.6 or wants UPSTREAM_TOKEN")
    ours = gateway.hub.models()
    models = [{**row.shown, **doings([ours[name] for name in row.names if name in ours], row.shown["state"])}
              for row in rows]
    return json_response({"models": sorted(models, key=lambda model: MODEL_STATES.index(model["state"])),
                          "asOf": utc_text(as_of)})


def doings(ours, state):
    """The row of Hub.models() of one model, under all of its names."""
    used = max((used for _, _, used, _ in ours if used), default=None)
    return {"state": "loading" if state != "loaded" and any(loading for *_, loading in ours) else state,
            "running": sum(row[0] for row in ours), "waiting": sum(row[1] for row in ours),
            "lastUsed": used and utc_text(used)}


def metrics_json(gateway, request):
    """Figures for people and scripts, which agree with those of /metrics, and the resources of this process;
    sizes in bytes, times in s.  A figure that the system does not tell is None."""
    hub = gateway.hub
    return json_response({"timestamp": hub.now(), "performance": hub.performance(), "system": {
        "uptime": gateway.uptime, "version": VERSION, "python": platform.python_version(),
        "platform": platform.platform(), "pid": os.getpid(), "cpuSeconds": round(time.process_time(), 2),
        "memoryBytes": resident_bytes(), "threads": threading.active_count(), "streamClients": hub.listeners,
        "connections": gateway.server and gateway.server.connections}})


def resident_bytes():
    """Memory of this process that is in RAM; None if /proc does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


def prometheus(gateway, request):
    """Text for Prometheus.  A scrape asks LM Studio for its models at most once a minute, because each
    question stands in the user's log."""
    text = gateway.hub.exposition(gauges_of(gateway))
    return Response(200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")],
                    text.encode("utf-8", "replace"))


def by_name(counts):
    """A Counter as a metric with one label.  It is copied whole first: its own thread may be counting."""
    return {(name,): count for name, count in sorted(dict(counts).items())}


def gauges_of(gateway):
    """{metric: {labels: value}} of states, and of figures that are counted elsewhere."""
    hub, monitor = gateway.hub, gateway.monitor
    up = not gateway.upstream.health(10.0, GREETING_S)
    models = gateway.upstream.models(hub.loads)[0] if up else None
    gauges = {"lmstudio_up": {(): int(up)}, "lmstudio_gateway_sse_clients": {(): hub.listeners},
              "lmstudio_gateway_sse_events_total": by_name(hub.counts),
              "lmstudio_gateway_sse_dropped_total": {("slow",): hub.dropped},
              "lmstudio_gateway_sse_replays_total": by_name(hub.replays),
              "lmstudio_gateway_build_info": {(VERSION, platform.python_version()): 1},
              "process_start_time_seconds": {(): round(gateway.started, 3)}}
    if models is not None:
        loaded = {(row.shown["id"], row.shown.get("type", "")): row.shown for row in models if row.loaded}
        gauges["lmstudio_loaded_models"] = {(): len(loaded)}
        gauges["lmstudio_model_loaded"] = dict.fromkeys(loaded, 1)
        gauges["lmstudio_model_context_length_tokens"] = {
            labels: shown["contextLength"] for labels, shown in loaded.items() if "contextLength" in shown}
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
    """Usage by one of GROUPS, from the history; ?since=, ?format=csv."""
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
        return Response(200, [("Content-Type", "text/csv; charset=utf-8")], csv_text(rows, group).encode())
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
    """A session cookie, because a browser's EventSource sends no key."""
    kind = request.header("content-type").partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        key = dict(urllib.parse.parse_qsl(bytes(request.body).decode("utf-8", "replace"))).get("key", "")
    else:
        key = (json_object(bytes(request.body)) or {}).get("key", "")
    cookie = gateway.access.open_session(request, key) if isinstance(key, str) else None
    if cookie is None:
        raise HttpError(401, "key_wrong", "that is no key of this gateway")
    return json_response({"status": "ok"}, headers=[set_cookie(request, cookie)])


def logout(gateway, request):
    """The browser's session ends, here and there."""
    gateway.access.close_session(request)
    return json_response({"status": "ok"}, headers=[set_cookie(request, "", "; Max-Age=0")])


def set_cookie(request, value, more=""):
    """The header that gives a browser our cookie (RFC 6265)."""
    secure = "; Secure" if request.encrypted else ""
    return "Set-Cookie", f"{cookie_name(request)}{value}; Path=/; HttpOnly; SameSite=Strict{secure}{more}"


class Route(NamedTuple):
    method: str
    path: str  # ending in /*: one more part
    view: Callable[[Gateway, Request], Response]
    access: str  # "open", "health", the right that it needs, or "own": any key, for its own requests
    about: str


ROUTES = (
    Route("GET", "/", dashboard, "open", "the dashboard"),
    Route("GET", "/health", health, "health", "this gateway is up"),
    Route("GET", "/ready", ready, "health", "LM Studio answers, else 503 with the reason"),
    Route("GET", "/lmstudio-greeting", greeting_page, "open",
          "LM Studio's own sign of life, while it answers"),
    Route("GET", "/debug/stream", event_stream, "own", "events as Server-Sent Events"),
    Route("GET", "/debug/status", status_page, "view", "what is going on, and how the log monitor does"),
    Route("GET", "/debug/requests", requests_list, "own", "the latest requests, newest first"),
    Route("GET", "/debug/requests/*", request_detail, "own", "one request with its timeline"),
    Route("DELETE", "/debug/requests/*", stop_request, "own", "stop a request: one's own, with admin any"),
    Route("GET", "/me", me, "own", "the key that asks: rights, limits, what it has used"),
    Route("GET", "/debug/series", series_page, "view",
          "figures by minute: ?minutes=60, ?by=model, key or user"),
    Route("GET", "/debug/models", models_page, "view",
          "LM Studio's models: state, context, running, waiting"),
    Route("GET", "/debug/metrics", metrics_json, "view", "figures as JSON: performance and system"),
    Route("GET", "/debug/usage", usage_page, "view",
          "what was used, by key, user, model or day (with --history)"),
    Route("GET", "/metrics", prometheus, "view", "figures for Prometheus"),
    Route("POST", "/login", login, "open", "a session cookie for a key"),
    Route("POST", "/logout", logout, "open", "ends the session"),
)
FOLDERS = frozenset(route.path.rpartition("/")[0] for route in ROUTES)
FORWARD = Route("*", "*", forward, "infer", "LM Studio's answer, unchanged")


def find_route(request):
    """The Route of a request; FORWARD if no path of ours fits.  Raises HttpError 405."""
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

# --- 7.6 sockets: LM Studio's own SDKs, message by message --------------------

FIRST_LIMIT = 4096  # bytes of a client's first message
PARTING_S = 0.5  # for the other side's close frame once one side has sent its own
LOOK_S = 3600.0  # a longer wait would be none that every system can count
UNREAD_LIMIT = 2 * PIECE  # bytes that a client has not taken: beyond them its calls are not read
REFUSALS_KEPT = 1000  # of calls that must send nothing more
OPERATIONS = {None: "client_disconnected", 1001: "gateway_stopped", 1008: "key_revoked",
              1011: "upstream_reset"}  # by close code
KEY_REMEDY = ("this gateway asks for a key: give a client that takes a token (apiToken, LM_API_TOKEN) one of "
              "its sk-lm- keys, or let the key lead the path, as in HOST:PORT/key/KEY")


def open_tunnel(gateway, request, wire):
    """The Response 101 to an opening handshake (RFC 6455, 4.2.1), with a Tunnel for its body.  Raises
    HttpError for anything else, and for a page of another origin: a browser asks nobody before that."""
    key = request.header("sec-websocket-key")
    if request.path[1:] not in NAMESPACES:
        raise HttpError(404, "namespace_unknown", "a WebSocket leads to /" + ", /".join(NAMESPACES))
    if request.method != "GET" or request.version < (1, 1) or "upgrade" not in listing(
            request.header("connection")):
        raise bad("an upgrade is a GET of HTTP/1.1 with Connection: upgrade")
    if request.header("sec-websocket-version") != "13":
        raise HttpError(426, "version_unknown", "use version 13 of WebSocket",
                        [("Sec-WebSocket-Version", "13")])
    if not re.fullmatch(r"[A-Za-z0-9+/]{21}[AQgw]==", key):
        raise bad("Sec-WebSocket-Key must be 16 bytes of base64")
    gateway.access.check_origin(request)
    request.forwarded = True
    tunnel = Tunnel(gateway, request, wire, gateway.upstream.upgrade(request.path))
    return Response(101, [("Upgrade", "websocket"), ("Connection", "Upgrade"),
                          ("Sec-WebSocket-Accept", accept_key(key))], tunnel)


class Prediction(Exchange):
    """One inference over a socket, from its call to its end, and the meter that its end asks: LM Studio's own
    figures come with the result, and the count here is for an end without one."""

    first = last = None

    def __init__(self, talk, path, dialect, body, message):
        """Raises HttpError if it is not let in."""
        super().__init__(talk.gateway, talk.request)
        self.dialect, self.stream, self.bell = dialect, dialect is SOCKET, lambda: talk.bell
        self.cancelled = False  # by the client
        self.usage, self.pieces, self._begun = Usage(), 0, None     # begun: clock of the first token
        asked = member(body, "creationParameter" if self.stream else "parameter")
        messages = member(asked, "history").get("messages")
        files = any(part.get("type") == "file" for said in listed(messages)     # nobody knows their size
                    for part in listed(said.get("content")))
        self.enter(
            method="GET", path=path, target=path, dialect=dialect.name, stream=self.stream,
            messages=len(messages) if isinstance(messages, list) else None,
            model_asked=model_named(member(asked, "modelSpecifier"), talk.gateway.instances),
            size=None if files else text_size([messages, asked.get("rawPrompt")]),
            tools=b'"llm.prediction.tools"' in message.payload)
        self.held = message.raw if self.turn.bell else b""  # while it waits for its turn

    def stop(self, cause):
        super().stop(cause)
        self.bell().set()

    def take(self, body, now):
        """Learn from a packet of LM Studio's that answers it."""
        kind, content = body.get("type"), member(body, "message")
        kind = str(content.get("type") if kind == "channelSend" else kind)
        if kind == "promptProcessingProgress":
            self._take_progress(content)
        elif kind == "fragment" or kind.startswith("toolCallGeneration"):     # of a tool call, a token each
            self.more(count(member(content, "fragment"), "tokensCount", default=1), now)
        elif kind == "success":
            self._take_result(member(content, "stats"), member(content, "modelInfo").get("identifier"))
        elif kind == "rpcResult":
            self.end()
        elif kind in ("rpcError", "channelError"):
            title = member(body, "error").get("title") or body.get("error") or "LM Studio reported an error"
            self.end(bounded_text(str(title), LONGEST_ERROR), "upstream_error")
        elif kind == "channelClose":
            self.end("LM Studio closed the channel without a result", "upstream_error")

    def more(self, tokens, now):
        """So many tokens more, at the clock reading now."""
        self.pieces, self._begun = self.pieces + tokens, self._begun or now
        self.generated(self.pieces, self._begun, now)

    def _take_progress(self, content):
        """How much of the prompt has been read; only here is said how much of it came from the cache."""
        read, details = usable(content.get("progress")), member(content, "details")
        cached, total = count(details, "cachedTokenCount"), count(details, "totalPromptTokenCount")
        events = []
        if cached is not None and total:
            self.usage.cached = cached
            events.append(Event("lmstudio_cache_stats", {
                "reused": cached, "total": total, "percentage": round(100 * cached / total, 2)}))
        if read is not None:
            events.append(Event("lmstudio_prompt_progress", {"progress": round(100 * min(read, 1), 2)}))
        self._gateway.hub.learned(self.record, events)

    def _take_result(self, stats, model):
        self.usage.take({"stats": stats, "stop_reason": stats.get("stopReason"), "model": model})
        self.pieces = 0  # estimates are for requests without figures
        self.cancelled = self.usage.finish == "userStopped"
        self.end("the client cancelled it" if self.cancelled else None)

    def end(self, error=None, operation=None):
        """It is over, in any way.  Later calls do nothing."""
        if self.cause:
            error, operation = str(self.cause), self.cause.code
        elif error and self.cancelled:
            error, operation = "the client cancelled it", "client_disconnected"
        if not self.over:
            self.conclude(error, operation, None if error else 200, self)


class Conversation:
    """The talk over one socket: which calls may go on, and when, and their cost.  A call is known by
    call_of()."""

    def __init__(self, gateway, request, bell):
        self.gateway, self.request, self.bell = gateway, request, bell
        self.running = {}   # call -> Prediction
        self._refused: dict = {}    # the calls that LM Studio never heard of, or must hear no more of
        self.words = bytearray()  # packets of ours for the client

    @property
    def held(self):
        """Bytes of calls that wait for their turn."""
        return sum(len(prediction.held) for prediction in self.running.values())

    def check_key(self):
        """Raises FrameError when the client's key has changed."""
        if self.gateway.access.recognize(self.request) != self.request.identity:
            raise FrameError(1008, "the key was revoked or has other rights now")

    def admits(self, message):
        """True when a client's message may go on to LM Studio now.  Raises FrameError for one that cannot be
        judged: LM Studio may read more than this program can."""
        self.check_key()
        text = message.payload
        if message.opcode == BINARY:    # LM Studio reads it as text
            text = str(text, "utf-8", "replace").encode()
        body = json_object(text)
        if body is None and "admin" not in self.request.identity.rights:
            raise FrameError(1008, "a message that is no JSON object")
        body = body or {}
        call = call_of(body)
        if body.get("type") in list(OPENERS):
            return self._opens(call, body, message)
        prediction = self.running.get(call)
        if prediction and member(body, "message").get("type") == "cancel":
            prediction.cancelled = True
            if prediction.held:
                self._drop(call, "it was cancelled while it waited for its turn")
        return call not in self._refused and not (prediction and prediction.held)

    def _opens(self, call, body, message):
        """True when a new call may go on now."""
        kind, path = body["type"], f"{self.request.path}/{body.get('endpoint')}"
        identity = self.request.identity
        right, dialect = ENDPOINTS.get(path, UNKNOWN_ENDPOINT)
        if call[1] is None or call in self.running:
            return False    # LM Studio drops such a call, too
        try:
            if not identity.rights & {right, "admin"}:
                raise right_missing(identity, right)
            self._refused.pop(call, None)
            if not dialect or (dialect is SOCKET) != (kind == "channelCreate"):
                return True
            prediction = self.running[call] = Prediction(self, path, dialect, body, message)
            prediction.begin()
            return not prediction.held
        except HttpError as error:
            self.gateway.hub.reject(error.code)
            self._refuse(call, OPENERS[kind], f"{bounded_text(path, 60)}: {error}")
            return False

    def _refuse(self, call, kind, title):
        remember(self._refused, call, True, REFUSALS_KEPT)
        self.words += packet(type=kind, **dict([call]), error={"title": title})

    def _drop(self, call, title):
        """A prediction ends here; its client is told why."""
        prediction = self.running.pop(call)
        prediction.end(title)
        self._refuse(call, "channelError" if prediction.stream else "rpcError", title)

    def tend(self):
        """Frames for LM Studio: of the calls whose turn has come, and to cancel those that somebody has
        stopped."""
        for call, prediction in list(self.running.items()):
            if prediction.cause:
                self._drop(call, str(prediction.cause))
                if not prediction.held and prediction.stream:
                    yield packet(secrets.token_bytes(4), type="channelSend", channelId=call[1],
                                 message={"type": "cancel"})
            elif prediction.held and prediction.turn.began is not None:
                yield prediction.held
                prediction.held = b""
                prediction.go()

    def hear(self, message, now):
        """LM Studio's message, before the client has it: a client may leave the moment it has the last."""
        fragment = FRAGMENT.match(message.payload)
        body = {} if fragment else json_object(message.payload) or {}
        call = ("channelId", int(fragment[1])) if fragment else call_of(body)
        prediction = self.running.get(call)
        if prediction and fragment:
            prediction.more(int(fragment[2]), now)
        elif prediction:
            prediction.take(body, now)
            if prediction.over:
                del self.running[call]
        for reference, model in named_instances(body):
            remember(self.gateway.instances, reference, model)

    def end(self, fault):
        """The socket is over, and with it all that runs or waits."""
        operation = OPERATIONS.get(getattr(fault, "code", None), "protocol_error")
        with contextlib.ExitStack() as stack:   # each of them, also if another fails
            while self.running:
                stack.callback(self.running.popitem()[1].end, str(fault), operation)


class Bell:
    """Wakes the thread of a tunnel.  Any thread may ring, also when nobody waits."""

    def __init__(self):
        self.sock, self._rope = socket.socketpair()
        self._rope.setblocking(False)

    def set(self):
        with contextlib.suppress(OSError):  # it rings already, or there is nobody left
            self._rope.send(b"!")

    def close(self):
        self.sock.close()
        self._rope.close()


class Tunnel:
    """Both connections of a socket, served by one thread that waits for none of them alone: what one side has
    not taken holds up the other.  TLS would not bear two threads (SSL_read(3) beside SSL_write(3))."""

    def __init__(self, gateway, request, wire, studio):
        self._gateway, self._request, self._wire, self._bell = gateway, request, wire, Bell()
        self.client = Side(wire.sock, Frames(True, FIRST_LIMIT), ClientLeft("the client left"),
                           bytes(wire.buffer))
        self.studio = studio
        self.talk = Conversation(gateway, request, self._bell)
        self._selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()     # without a file
        self._dismissed = False     # the client has left, or is to go
        self._parting = math.inf  # clock when it is over in any case: one side has closed

    def serve(self, server, head):
        """Answer the upgrade with head, and pass messages on until one side ends it.  Gives the exception
        that ended it."""
        request, fault = self._request, self.studio.gone
        try:
            self.client.sock.sendall(head)
            calls = self._admit()
            server.prove(request.connection)
            request.connection.tunnels(request, self.dismiss)
            self._selector.register(self._bell.sock, selectors.EVENT_READ)
            self._pass_on(calls)
            while time.monotonic() < self._parting:
                self._step()
                self._count()
        except HttpError as error:  # as LM Studio refuses: in a string, but in an object to its Python SDK
            fault, text = error, KEY_REMEDY if error.status == 401 else str(error)
            self._gateway.hub.reject(error.code)
            plain = not request.header("user-agent").startswith("python-httpx")
            self.client.pending += packet(success=False, error=text if plain else {"title": text})
            self.client.pending += frame(CLOSE, b"")
        except (FrameError, ClientLeft, OSError) as error:  # an OSError is the client's
            fault = error
        finally:
            self._part(fault)
        return fault

    def _admit(self):
        """Take the client's first message, and have LM Studio let it in.  Gives the Messages that came
        behind.  Raises HttpError with why not, FrameError, ClientLeft."""
        request = self._request
        try:
            first, *calls = self.client.first_messages()
        except TIMEOUTS:
            raise HttpError(408, "authentication_timeout", "authentication timed out") from None
        said = json_object(first.payload) or {}
        halves = said.get("clientIdentifier"), said.get("clientPasskey")
        token = SDK_TOKEN("sk-lm-{}:{}".format(*halves))
        request.key = request.key or (token[0] if token else "")
        request.identity = self._gateway.access.identify(request, credentials(request))
        answers = self._gateway.upstream.introduce(self.studio, json.dumps([request.identity.name, *halves]))
        self.client.send(b"".join(message.raw for message in answers))
        self.client.frames.limit = self._gateway.config.max_body
        return calls

    def dismiss(self):
        """Any thread.  The client has left, or is to go."""
        self._dismissed = True
        self._bell.set()

    def _step(self):
        """Wait for news, and pass them on.  Raises FrameError with the close code for the client,
        ClientLeft."""
        client, studio, talk = self.client, self.studio, self.talk
        self._request.connection.state = WORKING if talk.running else TUNNELLING
        if self._gateway.stopping and not talk.running:
            raise FrameError(1001, "lmgateway stops")
        if talk.words and studio.frames.between:    # ours stand between two messages of LM Studio's
            client.send(talk.words)
            talk.words.clear()
        client.watch(self._selector,
                     not studio.pending and len(client.pending) + len(talk.words) <= UNREAD_LIMIT)
        studio.watch(self._selector, not client.pending)
        news = {key.data: events & selectors.EVENT_READ for key, events in self._selector.select(
            min(self._parting - time.monotonic(), LOOK_S))}
        client.send()
        studio.send()
        if None in news:
            self._wake()
        if news.get(studio):
            self._hear(*studio.receive())
        if news.get(client):
            self._pass_on(client.receive()[0])

    def _count(self):
        """What is kept counts in the budget of all bodies."""
        try:
            self._wire.hold(self.client.frames.held + self.talk.held)
        except HttpError as error:
            raise FrameError(1009, str(error)) from None

    def _wake(self):
        """Another thread has rung."""
        self._bell.sock.recv(PIECE)
        if self._dismissed and not self._gateway.stopping:
            self.talk.check_key()
            raise self.client.gone
        for data in self.talk.tend():
            self.studio.send(data)

    def _hear(self, messages, data):
        """LM Studio's messages are metered, then their bytes go on their way."""
        now = time.monotonic()
        for message in messages:
            if message.opcode == CLOSE:
                self._close(self.studio)
            self.talk.hear(message, now)
        self.client.send(data)

    def _pass_on(self, messages):
        """A client's messages, to LM Studio or not."""
        for message in messages:
            if message.opcode >= CLOSE or self.talk.admits(message):
                self.studio.send(message.raw)
            if message.opcode == CLOSE:
                return self._close(self.client)

    def _close(self, side):
        """One side has sent its close frame; after both, or soon, all is over."""
        self.talk.end(side.gone)
        self._parting = 0.0 if self._parting < math.inf else time.monotonic() + PARTING_S

    def _part(self, fault):
        """It is over, for the exception given."""
        if self._gateway.cutting_off:
            fault = FrameError(1001, "lmgateway stopped during the answer")
        self._request.connection.leave = None
        close_quietly(self.studio.sock)
        self.talk.end(fault)
        self._bell.close()
        if isinstance(fault, FrameError) and self._parting == math.inf:
            log.debug("%s %s: closed with %d: %s", self._request.client, self._request.path, fault.code,
                      fault)
            if not self.studio.frames.rest:
                self.client.pending += frame(CLOSE, fault.code.to_bytes(2, "big")
                                             + str(fault).encode()[:LONGEST_CONTROL - 2])
        with contextlib.suppress(OSError):
            self.client.sock.settimeout(PARTING_S)
            self.client.sock.sendall(self.client.pending)


# --- 7.7 server: connections to views ----------------------------------------

GRACE_S = 10.0  # for running requests at the end
OWN_BODY = 4 * 1024  # bytes of a body for our own pages, some of which come before any key
# The paths, as plain_path() gives them, that the right to infer lets pass.  All others, also those that LM
# Studio has yet to invent, need the right to admin.
INFERENCES = re.compile(r"/v1(?:/.*)?|/api/v0/(?:chat/completions|completions|embeddings)|/api/v1/chat",
                        re.DOTALL)
LISTINGS = re.compile(r"/api/v\d+/models(?:/.*)?", re.DOTALL)   # GET and HEAD
TOOLS_LIMIT = 4 * 1024 * 1024  # bytes of JSON that are read to look for tools
RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER: close() sends no FIN but a RST


def right_for(request):
    """The right that a request to LM Studio needs, as far as its head tells."""
    path = plain_path(request.path)
    listed = request.method in ("GET", "HEAD") and LISTINGS.fullmatch(path)
    return "infer" if listed or INFERENCES.fullmatch(path) or ALIASES.fullmatch(path) else "admin"


def runs_tools(request):
    """True when it asks LM Studio to run tools on its machine (`integrations` of /api/v1/chat), or could ask
    so in a way that is not read here."""
    if plain_path(request.path) != "/api/v1/chat" or not request.body:
        return False
    kind = request.header("content-type").lower()
    coded = request.header("content-encoding") or "charset" in kind and "utf-8" not in kind
    if not coded and not re.search(rb"integrations|\\u00[4-7]", request.body):  # a name may have escapes
        return False
    body = json_object(request.body) if not coded and len(request.body) <= TOOLS_LIMIT else None
    return body is None or bool(body.get("integrations"))


class Handler(socketserver.BaseRequestHandler):
    """One connection: its requests to views, their responses to the socket.  Nothing else is decided here."""

    server: Server

    def handle(self):
        threading.current_thread().name = "http"
        self.connection = self.server.connection_of(self.request)
        self.wire = Wire(self.request, self.server.memory)
        with contextlib.suppress(ClientLeft, OSError, Unfinished):
            while self._serve_one():
                pass

    def _serve_one(self):
        """Answer one request.  True when the connection can take another."""
        self.target = ""  # the target of the request line
        self.seen = None  # the Request, once its head is understood
        self.unread = True  # its body is still on the wire
        self.begun = False  # its answer is on the wire
        try:
            lines = self.wire.head()
            self.came = time.monotonic()
            self.target = key_before((lines[0].split(" ") + [""])[1])[1]
            self.connection.reads(self.came)
            self.seen = parse_head(lines)
            alive = self._write(self._respond(self.server.gateway, self.seen), self.seen)
            return alive and self.connection.state != STREAMING     # a stream that ended had its reason
        except HttpError as error:
            return self._refuse(error)
        except (ClientLeft, Unfinished, OSError):
            raise
        except Exception:  # the end of the line for one request: a fault of ours must not end the server
            log.exception("a fault in lmgateway: please report it")
            return self._refuse(HttpError(500, "internal_error", "a fault in lmgateway; its log says more",
                                          close=True))
        finally:
            self.seen = None    # its body can be large
            self.wire.hold(0)
            self.connection.rests()

    def _refuse(self, error):
        """Send an error of ours.  True when the connection can take another request."""
        request: Any = self.seen
        if self.begun:
            raise Unfinished
        if error.status == 401:
            self.connection.proven = False  # its key may have been right before
        self.server.gateway.hub.reject(error.code)
        response = error_response(error, upstream_target(self.target, False).startswith("/v1/messages"))
        close = error.close or request is None or self.unread and request.has_body
        if request:
            response.headers.extend(cors_headers(self.server.gateway.access, request))
        alive = self._write(response, request, close)
        if close:
            self.wire.linger()
        return alive

    def _respond(self, gateway, request):
        """The Response to a request that access control lets pass."""
        access = gateway.access
        request.client, request.connection = self.client_address[0], self.connection
        request.port, request.pause = self.server.port, self.connection.ended.wait
        request.client = access.client_of(request)
        request.encrypted = isinstance(self.request, ssl.SSLSocket)
        access.admit_address(request.client)
        if request.method == "OPTIONS" and request.header("access-control-request-method"):
            return preflight(access, request)
        if asks_websocket(request):     # a key may come later
            return open_tunnel(gateway, request, self.wire)
        route = find_route(request)
        request.forwarded = route is FORWARD
        offered = credentials(request) if access.need_key else []
        if not offered:
            access.check_origin(request)
        request.identity = self._identify(request, route, offered)
        if offered and (request.identity.name is None or request.identity.by_cookie):     # by no key of these
            access.check_origin(request)
        config = gateway.config
        limit = min(config.max_body, config.max_body_memory) if request.forwarded else OWN_BODY
        request.body, request.arrived = self.wire.body(request, limit), time.monotonic()
        self.unread = False
        if not self.connection.proven and route.access in (*RIGHTS, "own"):
            # without keys, a whole request proves it
            self.server.prove(self.connection)
        if request.forwarded and "admin" not in request.identity.rights and runs_tools(request):
            raise right_missing(request.identity, "admin")
        self.connection.works(request, route.view is event_stream)
        shared = cors_headers(access, request)
        response = route.view(gateway, request)
        response.headers.extend(shared)
        return response

    def _identify(self, request, route, offered):
        """The Identity that sent it.  Raises HttpError 401, and 403 for a key without the right."""
        gateway = self.server.gateway
        if route.access == "open" or route.access == "health" and not gateway.config.require_auth_for_health:
            return Identity(None)
        identity = gateway.access.identify(request, offered)
        self.connection.deadline = math.inf     # the answer may take its time
        if identity.name is not None:
            self.server.prove(self.connection)
        right = route.access
        if right == "infer" and "admin" not in identity.rights:
            right = right_for(request)
        if right in RIGHTS and right not in identity.rights:
            raise right_missing(identity, right)
        return identity

    def _write(self, response, request, close=False):
        """Send a response.  True when the connection can take another request."""
        if response.status == 101:
            return self._tunnel(response, request)
        body, alive = response.body, bool(request) and keeps_alive(request)
        try:    # in any case: a body that is closed gives its turn to another
            head, chunked, alive = framed_head(response, request,
                                               alive and not close and not self.server.gateway.stopping)
            self.begun = True
            if request and request.method == "HEAD":
                self.request.sendall(head)
            elif body is None or isinstance(body, (bytes, bytearray)):
                self.request.sendall(head + (body or b""))
            else:
                send_pieces(self.request, head, body, chunked)
        finally:
            if hasattr(body, "close"):
                body.close()
            self._note(request, response.status)
        return alive

    def _tunnel(self, response, request):
        """HTTP is over: both connections pass on WebSocket frames until one side ends them.  False."""
        self.begun = True
        head = head_bytes(101, response.headers)
        fault = response.body.serve(self.server, head)
        self._note(request, 101)
        if not isinstance(fault, (ClientLeft, OSError)) and not self.server.gateway.stopping:
            self.wire.linger()
        return False

    def _note(self, request, status):
        """One line a request: at info if it was forwarded or refused, else at debug."""
        if request and not request.told:
            level = logging.INFO if request.forwarded or status >= 400 else logging.DEBUG
            name = request.identity.name if request.identity else None
            log.log(level, "%s %s %s %s %d %.0f ms", request.client or self.client_address[0], name or "-",
                    request.method, request.path[:200], status, 1000 * (time.monotonic() - self.came))


def send_pieces(sock, head, pieces, chunked):
    """The head, then each piece in one write the moment it comes.  The head waits for the first piece only if
    that is there already."""
    if not getattr(pieces, "ready", False):
        sock.sendall(head)
        head = b""
    try:
        for piece in pieces:
            if piece or head:
                framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece
                sock.sendall(head + framed)
                head = b""
    except Unfinished:
        if not chunked:     # a connection that ends in peace could be taken for the end of the body
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        raise
    if chunked or head:
        sock.sendall(head + (b"0\r\n\r\n" if chunked else b""))


def right_missing(identity, right):
    return HttpError(403, "right_missing", f"the key {identity.name} has no right to {right}; mint one with "
                                           f"--new-key NAME --rights {right}")


class Server(http.server.ThreadingHTTPServer):
    """Carries the gateway to its handlers, and decides which connection gives way when there are too many."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"   # there it would let two servers share a port,
    allow_reuse_port = False                # which this would do elsewhere
    LOOK_S = 0.1  # between two looks at clients, deadlines and the rights of listeners
    LEAVE_S = 1.0   # for a listener whose right has changed
    SPARE = 32  # connections beyond the limit that may still be on their way out
    NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

    def __init__(self, gateway, host, port, context=None):
        self.gateway, self._context = gateway, context  # an ssl.SSLContext, or None for plain HTTP
        config = gateway.config if gateway else Config()
        self.memory = BodyMemory(config.max_body_memory)
        self.limit = connection_limit(config.max_connections)
        self._most_guests = self.limit - max(1, self.limit // 8)
        self._connections: dict = {}    # socket -> Connection, the oldest first; each step is atomic
        self.ticked = self._looked = time.monotonic()  # when the accept loop last came round, and _look()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)    # HTTPServer's asks the DNS for our name

    def service_actions(self):
        self.ticked = now = time.monotonic()
        if now - self._looked >= self.LOOK_S:
            self._looked = now
            self._look(now)
            if self.gateway:
                self.gateway.turns.look()

    def _look(self, now):
        """Notice clients that left.  End connections that are over their time, and streams if the right of
        their listener has changed: in order if the stream can be woken, else LEAVE_S later."""
        watched = {connection.sock: connection for connection in self._all() if connection.leave}
        for sock in those_left(list(watched)):
            watched[sock].dismiss()
        for connection in self._all():
            request = connection.request
            if now >= connection.deadline:
                connection.end()
            elif request and self.gateway.access.recognize(request) != request.identity:
                connection.deadline = min(connection.deadline, now + self.LEAVE_S)
                connection.dismiss()

    def get_request(self):
        """A new connection.  A TLS handshake is left to its handler: a slow one must not hold up others."""
        try:
            sock, address = super().get_request()
        except OSError as error:
            if error.errno in self.NO_ROOM:
                self._put_out(self._strangers()) or self._put_out(self._surplus_guests(self.limit))
                time.sleep(0.05)    # the connection still waits: without a pause this would spin
            raise
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
        return len(self._all(READING, WORKING))

    @property
    def connections(self):
        return len(self._all(RESTING, READING, WORKING, TUNNELLING))

    def connection_of(self, sock):
        return self._connections[sock]

    def _all(self, *states):
        """The Connections that were not ended; with states, those in one of them."""
        return [connection for connection in list(self._connections.values())
                if not connection.ended.is_set() and (not states or connection.state in states)]

    def _strangers(self):
        return [connection for connection in self._all() if not connection.proven]

    def _surplus_guests(self, coming=0):
        """Guests of which one has to make room: those that rest, else those with a request still coming.
        None while they leave room for strangers: else these could not show a key."""
        guests = [connection for connection in self._all() if connection.proven]
        if len(guests) + coming <= self._most_guests:
            return []
        return ([guest for guest in guests if guest.state == RESTING]
                or [guest for guest in guests if guest.state == READING])

    @staticmethod
    def _put_out(connections):
        """End the one that came or rested first, of the address that has the most; False without any."""
        held = Counter(connection.place for connection in connections)
        for connection in sorted(connections, key=lambda one: (-held[one.place], one.since))[:1]:
            connection.end()
        return bool(connections)

    def process_request(self, request, client_address):
        """A connection was accepted.  When there are too many, a stranger's gives way, maybe this one."""
        connection = self._connections[request] = Connection(request, client_address[0])
        if len(self._connections) > self.limit and len(self._all()) > self.limit:
            self._put_out(self._surplus_guests()) or self._put_out(self._strangers())
        if connection.ended.is_set() or len(self._connections) > self.limit + self.SPARE:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def prove(self, connection):
        """It is a guest's, and gives way to no stranger from now on."""
        if not connection.proven:
            if len(self._connections) >= self._most_guests:
                self._put_out(self._surplus_guests(1))
            connection.proven = True

    def shutdown_request(self, request):
        self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        log.debug("connection from %s ended: %s", client_address[0], sys.exc_info()[1])

    def finish_requests(self, seconds):
        """The end: running requests may finish for that long, then they are cut, then the event streams,
        which have told of them, end.  Connections without a request are closed at once."""
        self.gateway.stopping = True
        self.server_close()     # the port is free for the next one
        for connection in self._all(RESTING):
            connection.end()
        for connection in self._all(TUNNELLING):
            connection.dismiss()
        wait_until(lambda: self._are_over(READING, WORKING, TUNNELLING), seconds)
        self.gateway.cutting_off = True
        for connection in self._all(READING, WORKING):
            shut(connection.sock)   # it counts until its handler has told of its end
        wait_until(lambda: self._are_over(READING, WORKING), 1.0)
        self.gateway.hub.close()
        wait_until(lambda: self._are_over(STREAMING), 1.0)

    def _are_over(self, *states):
        """True when no connection is in one of the states.  The accept thread, which looks after them, has
        ended."""
        self.service_actions()
        return not self._all(*states)


def connection_limit(wanted):
    """How many connections there may be: so many as wanted, or fewer if the system has not enough
    descriptors (each can need one towards LM Studio, too) even after the soft limit was raised."""
    if sys.platform == "win32":
        return wanted
    import resource
    spare = 128     # files, connections that are kept or on their way out
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + spare
    if 0 <= soft < needed:
        more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    limit = max(8, min(wanted, (soft - spare) // 2)) if soft >= 0 else wanted
    if limit < wanted:
        log.warning("%d connections at once, not MAX_CONNECTIONS=%d: the system allows %d open files "
                    "(ulimit -n)", limit, wanted, soft)
    return limit


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


# === 8. DEMO: an imitation of LM Studio ======================================
# Answers inferences as LM Studio does, in the dialects that the README shows, and writes the log that the
# newest llama.cpp engine writes.  It serves --demo and the tests, and nothing beside the real LM Studio.

DEMO_MODELS = ("demo/kestrel-8b", "demo/wren-2b")
DEMO_EMBEDDING = "demo/lark-embed"
DEMO_CONTEXT = 32768  # tokens
DEMO_WORDS = re.findall(r"\S+ ", (
    "The lamp on the harbour wall turns slowly and the boats come home one by one while somebody upstairs "
    "reads aloud from a letter about copper, rivers and the price of bread. "))


class DemoLog:
    """LM Studio's log directory, written as LM Studio writes it: whole entries, the file opened for each."""

    def __init__(self, directory):
        self.directory = directory
        self.listeners: list[queue.Queue] = []  # of streamLogs
        self._lock = threading.Lock()  # entries do not mix

    def write(self, level, text, tag=""):
        """Append one entry; its continuation lines are in text."""
        now = time.localtime()
        path = Path(self.directory, time.strftime("%Y-%m", now), time.strftime("%Y-%m-%d.1.log", now))
        label = f"[{tag}] " if tag else "" if text.startswith("[") else " "
        entry = f"[{time.strftime('%Y-%m-%d %H:%M:%S', now)}][{level}]{label}{text}\n"
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(entry)
        for news in list(self.listeners):
            news.put({"type": "server.log", "level": level.lower(), "content": entry})


class DemoEngine:
    """The process that answers for one model: one request after the other, at its own pace."""

    def __init__(self, log, pace):
        self.pace, self.turn = pace, threading.Lock()
        # A process of its own for each: their clocks and tasks have nothing in common.
        self.tasks, self._started = itertools.count(round(3000 * pace)), time.monotonic() - 1000 * pace
        self._log = log
        self._prompts: deque[str] = deque(maxlen=8)  # that it still has in its cache

    def write(self, *lines):
        """One entry of the log, each line after the engine's clock."""
        us = int(1e6 * (time.monotonic() - self._started))
        clock = f"{us // 60_000_000}.{us // 1_000_000 % 60:02}.{us // 1000 % 1000:03}.{us % 1000:03} I "
        self._log.write("DEBUG", "\n".join(clock + line for line in lines))

    def cached(self, prompt, tokens):
        """Tokens of a prompt that it has from an earlier one: those of the same beginning."""
        same = max((len(os.path.commonprefix([prompt, known])) for known in self._prompts), default=0)
        self._prompts.append(prompt)
        return min(tokens - 1, 20 + 7 * same) if same else 0


def demo_texts(body):
    """The texts of a request's messages."""
    return [str(message.get("content")) for message in listed(body.get("messages"))]


class DemoRun:
    """One answer of the imitation, at its speed, for as long as alive() says that somebody waits for it."""

    def __init__(self, server, model, texts, limit, alive):
        self.server, self.texts, self.alive = server, texts, alive
        self.model = model if model in DEMO_MODELS else DEMO_MODELS[0]
        self.engine = server.engines[self.model]
        self.answer = limit if isinstance(limit, int) and 0 < limit < 500 else server.answer_tokens
        self.prompt, self.cached = 20 + 7 * len("".join(texts)), 0  # tokens

    def reading(self):
        """How many tokens are read, after each batch of those that the engine has yet to read."""
        batch = self.server.batch
        for read in (*range(self.cached + batch, self.prompt, batch), self.prompt):
            if self._pause(self.server.batch_s):
                return
            yield read

    def words(self):
        """The words of the answer."""
        for number in range(self.answer):
            if self._pause(self.server.token_s):
                return
            yield DEMO_WORDS[number % len(DEMO_WORDS)]

    def remember(self):
        """Its turn has come: now its cached part is known."""
        self.cached = self.engine.cached("".join(self.texts), self.prompt)

    def _pause(self, seconds):
        return self.server.stopping.wait(seconds * self.engine.pace) or not self.alive()


class DemoAnswer(DemoRun):
    """One answer over HTTP: the same figures in it and in the log."""

    def __init__(self, server, path, body, alive):
        super().__init__(server, body.get("model"), demo_texts(body), body.get("max_tokens"), alive)
        self.path, self.body, self.stream = path, body, body.get("stream") is True
        self.created, self.id = int(time.time()), secrets.token_hex(12)
        self.task = next(self.engine.tasks)
        self.slot = f"id  {self.task % 4} | task {self.task} | "

    def log(self, text):
        self.server.log.write("INFO", text, self.model)

    def received(self):
        shown = json.dumps(self.body, indent=2, ensure_ascii=False)
        self.server.log.write("DEBUG", f"Received request: POST to {self.path} with body {shown}")
        self.log(f"Running chat completion on conversation with {len(self.texts)} messages.")
        if self.stream:
            self.log("Streaming response...")

    def read_prompt(self):
        self.remember()
        self.engine.write(f"slot launch_slot_: id  {self.task % 4} | task -1 | sampler params:\n"
                          " repeat_last_n = 64, repeat_penalty = 1.000, presence_penalty = 0.000\n"
                          " top_k = 40, top_p = 0.950, min_p = 0.050, temp = 0.700\n"
                          " mirostat = 0, mirostat_lr = 0.100, mirostat_ent = 5.000")
        self.engine.write(f"slot launch_slot_: {self.slot}processing task, is_child = 0",
                          f"slot   operator(): {self.slot}new prompt, n_ctx_slot = {DEMO_CONTEXT}, "
                          f"n_keep = 20, task.n_tokens = {self.prompt}")
        for read in itertools.chain([0], self.reading()):
            known = max(read, self.cached)
            if known < self.prompt:     # before each batch
                self.engine.write(f"slot   operator(): {self.slot}cached n_tokens = {known}, memory_seq_rm "
                                  f"[{known}, end)")
            self.log(f"Prompt processing progress: {100 * read / self.prompt:.1f}%")
        self.insist()
        self.engine.write(f"slot init_sampler: {self.slot}init sampler, took 0.33 ms, "
                          f"tokens: text = {self.prompt}, total = {self.prompt}")

    def insist(self):
        """Raises OSError when nobody waits for the answer any more."""
        if not self.alive():
            raise BrokenPipeError

    def finished(self):
        """The engine's timings and the app's last line."""
        self.insist()
        pace, fresh = 1000 * self.engine.pace, self.prompt - self.cached
        read_ms = max(0.01, pace * self.server.batch_s * math.ceil(fresh / self.server.batch))
        write_ms = max(0.01, pace * self.server.token_s * self.answer)
        timed = f"slot print_timing: {self.slot}"
        lines = [f"{timed}{name} = {ms:10.2f} ms / {tokens:5} tokens ({ms / tokens:8.2f} ms per token, "
                 f"{1000 * tokens / ms:8.2f} tokens per second)" for name, ms, tokens in (
                     ("prompt eval time", read_ms, fresh), ("       eval time", write_ms, self.answer))]
        self.engine.write(*lines, f"{timed}      total time = {read_ms + write_ms:10.2f} ms / "
                          f"{fresh + self.answer:5} tokens", f"slot      release: {self.slot}stop processing:"
                          f" n_tokens = {self.prompt + self.answer - 1}, truncated = 0",
                          "srv  update_slots: all slots are idle")
        if self.stream:
            return self.log("Finished streaming response")
        self.log("Model generated tool calls: []")
        return self.log(f"Generated prediction: {json.dumps(chat_whole(self, ''), indent=2)}")

    def abandoned(self):
        self.server.log.write("INFO", "Client disconnected. Stopping generation... (If the model is busy "
                              "processing the prompt, it will finish first.)", SERVER_TAG)
        self.engine.write(f"srv          stop: cancel task, id_task = {self.task}",
                          f"slot      release: {self.slot}stop processing: n_tokens = {self.prompt}, "
                          "truncated = 0")

    def usage(self):
        return {"prompt_tokens": self.prompt, "completion_tokens": self.answer,
                "total_tokens": self.prompt + self.answer}


# How each dialect says an answer: as a body, and as a stream's events, (name, data), the words as they come.

def chat_whole(run, text, **choice):
    """A body of OpenAI's; with the members of a choice, a chunk of its stream."""
    kind = {"object": "chat.completion.chunk"} if choice else {
        "object": "chat.completion", "usage": run.usage(), "stats": {}}
    choice = choice or {"message": {"role": "assistant", "content": text, "tool_calls": []}}
    return {"id": f"chatcmpl-{run.id}", "created": run.created, "model": run.model,
            "system_fingerprint": run.model, **kind,
            "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop", **choice}]}


def chat_events(run):
    for word in run.words():
        yield "", chat_whole(run, "", delta={"role": "assistant", "content": word}, finish_reason=None)
    last = chat_whole(run, "", delta={}, finish_reason="stop")
    yield "", last
    if (run.body.get("stream_options") or {}).get("include_usage"):
        yield "", {**last, "choices": [], "usage": run.usage()}
    yield "", None


def message_whole(run, text):
    return {"id": f"msg_{run.id}", "type": "message", "role": "assistant", "model": run.model,
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": run.prompt, "output_tokens": run.answer}}


def message_events(run):
    yield "message_start", {"message": {**message_whole(run, ""), "content": [], "stop_reason": None,
                                        "usage": {"input_tokens": run.prompt, "output_tokens": 0}}}
    yield "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
    for word in run.words():
        yield "content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": word}}
    yield "content_block_stop", {"index": 0}
    yield "message_delta", {"delta": {"stop_reason": "end_turn", "stop_sequence": None},
                            "usage": {"output_tokens": run.answer}}
    yield "message_stop", {}


DEMO_SPEECH = {  # path -> (body, events)
    "/v1/chat/completions": (chat_whole, chat_events),
    "/v1/messages": (message_whole, message_events),
}


def demo_limit(asked):
    """llm.prediction.maxPredictedTokens of a prediction over a socket; None without it."""
    fields = [field for layer in listed(member(asked, "predictionConfigStack").get("layers"))
              for field in listed(member(layer, "config").get("fields"))]
    return next((count(member(field, "value"), "value") for field in fields
                 if field.get("key") == "llm.prediction.maxPredictedTokens"), None)


def demo_prediction(socket, asked, cancelled):
    """One answer over a socket, packet by packet: LM Studio's log does not name it."""
    server, own = socket.server, socket.model_of(asked)
    texts = demo_texts(member(asked, "history")) or [str(asked.get("rawPrompt", ""))]
    run = DemoRun(server, server.loaded.get(own), texts, demo_limit(asked), lambda: not cancelled.is_set())
    with run.engine.turn:
        started, first, written = time.monotonic(), None, 0
        run.remember()
        for read in run.reading():
            yield {"type": "promptProcessingProgress", "progress": read / run.prompt, "details": {
                "cachedTokenCount": run.cached, "totalPromptTokenCount": run.prompt,
                "processedPromptTokenCount": read - run.cached,
                "unprocessedPromptTokenCount": run.prompt - read}}
        for word in run.words():
            first, written = first or time.monotonic(), written + 1
            yield {"type": "fragment", "fragment": {
                "content": word, "tokensCount": 1, "containsDrafted": False, "reasoningType": "none",
                "isStructural": False}}
    now = time.monotonic()
    yield {"type": "success", "modelInfo": demo_model(run.model, own),
           "loadModelConfig": {"fields": []}, "predictionConfig": {"fields": []}, "stats": {
               "stopReason": "eosFound" if run.alive() else "userStopped", "promptTokensCount": run.prompt,
               "predictedTokensCount": written, "totalTokensCount": run.prompt + written,
               "timeToFirstTokenSec": (first or now) - started, "totalTimeSec": now - started,
               "tokensPerSecond": written / max(0.001, now - (first or now))}}


def demo_model(name, identifier=None):
    """LM Studio's description of a model; with an identifier, of its instance that is loaded under that."""
    model = {"type": "embedding" if name == DEMO_EMBEDDING else "llm", "modelKey": name, "path": name,
             "format": "gguf", "displayName": name, "publisher": "demo", "sizeBytes": 5_000_000_000,
             "indexedModelIdentifier": name, "deviceIdentifier": None, "maxContextLength": DEMO_CONTEXT,
             **({} if name == DEMO_EMBEDDING else {"vision": False, "trainedForToolUse": False})}
    return {**model, "identifier": identifier, "instanceReference": f"instance of {identifier}",
            "ttlMs": None, "lastUsedTime": None, "contextLength": DEMO_CONTEXT} if identifier else model


class DemoSocket:
    """One WebSocket of LM Studio's: calls are answered at once, each channel has a thread."""

    def __init__(self, handler, namespace):
        self.server, self._sock, self._kind = handler.server, handler.connection, namespace
        self._lock = threading.Lock()   # held to send
        self._open: dict = {}   # channelId -> Event that is set when the client cancels

    def serve(self):
        """Until the client goes."""
        frames, met = Frames(True, 2**28), False
        while data := self._sock.recv(PIECE):
            for message in frames.feed(data):
                if message.opcode == PING:
                    self._send(frame(PONG, message.payload))
                elif message.opcode == CLOSE:
                    return self._send(frame(CLOSE, message.payload[:2]))
                elif not met:
                    met = True
                    self._say(success=True)
                elif message.opcode in (TEXT, BINARY):
                    self._take(json_object(message.payload) or {})
        return None

    def close(self):
        """The client has gone."""
        for cancelled in list(self._open.values()):
            cancelled.set()

    def _take(self, body):
        kind, name, endpoint = body.get("type"), body.get("channelId"), body.get("endpoint")
        call = DEMO_CALLS.get(endpoint) if kind == "rpcCall" else None
        if call:
            result = call(self, member(body, "parameter"))
            self._say(type="rpcResult", callId=body.get("callId"), **without_none(result=result))
        elif kind == "channelCreate" and endpoint in DEMO_CHANNELS and name not in self._open:
            self._open[name] = threading.Event()
            start_thread(self._run, name, endpoint, member(body, "creationParameter"), name="demo-channel")
        elif kind == "channelSend" and name in self._open:
            self._open[name].set()  # any packet to it: cancel, or stop
        else:
            self._say(type="communicationWarning", warning=f"nothing is known of {kind} {endpoint}")

    def _run(self, name, endpoint, asked):
        """Body of a channel's thread."""
        with contextlib.suppress(OSError):
            for item in DEMO_CHANNELS[endpoint](self, asked, self._open[name]):
                self._say(type="channelSend", channelId=name, message=item)
            del self._open[name]
            self._say(type="channelClose", channelId=name)

    def _say(self, **members):
        self._send(packet(**members))

    def _send(self, data):
        with self._lock:
            self._sock.sendall(data)

    def model_of(self, asked):
        """The model that a call means: by its name, or the reference of its instance; else any."""
        specifier = member(asked, "modelSpecifier", "specifier")
        name = member(specifier, "query").get("identifier") or str(
            specifier.get("instanceReference", "")).rpartition(" ")[2]
        return name or DEMO_MODELS[0]

    def loaded(self, asked):
        return [demo_model(name, own) for own, name in self.server.loaded.items()
                if (name == DEMO_EMBEDDING) == (self._kind == "embedding")]

    def load(self, asked, cancelled):
        """getOrLoad and loadModel: their packets have other names."""
        name, get = asked.get("modelKey") or asked.get("identifier"), "modelKey" not in asked
        own = asked.get("identifier") or name
        info = demo_model(name, own)
        if get and name in self.server.loaded:
            yield {"type": "alreadyLoaded", "info": info}
            return
        yield {"type": "startLoading", "identifier": name, "info": info} if get else {
            "type": "resolved", "info": demo_model(name)}
        for step in range(1, 6):
            if cancelled.wait(self.server.token_s):
                return
            yield {"type": "loadProgress" if get else "progress", "progress": step / 5}
        self.server.hold(own, name)
        yield {"type": "loadSuccess" if get else "success", "info": info}

    def logs(self, asked, cancelled):
        """The log's lines from now on."""
        news: queue.Queue = queue.Queue()
        self.server.log.listeners.append(news)
        while not cancelled.is_set():
            with contextlib.suppress(queue.Empty):
                data = news.get(timeout=0.1)
                yield {"type": "log", "log": {"timestamp": int(time.time() * 1000), "data": data}}
        self.server.log.listeners.remove(news)


def demo_vector(socket, asked):
    """The same for the same text."""
    source = random.Random(str(asked.get("inputString")))
    return {"embedding": [source.uniform(-0.1, 0.1) for _ in range(128)]}


DEMO_CALLS = {  # endpoint -> (socket, parameter) to result
    "listLoaded": DemoSocket.loaded, "embedString": demo_vector,
    "unloadModel": lambda socket, asked: socket.server.hold(asked.get("identifier")),
    "getModelInfo": lambda socket, asked: demo_model(socket.model_of(asked)),
    "getLoadConfig": lambda socket, asked: {
        "fields": [{"key": "llm.load.contextLength", "value": DEMO_CONTEXT}]},
    "listDownloadedModels": lambda socket, asked: list(map(demo_model, (*DEMO_MODELS, DEMO_EMBEDDING))),
    "version": lambda socket, asked: {"version": VERSION, "build": 1},
}
DEMO_CHANNELS = {  # endpoint -> (socket, parameter, Event of its cancelling) to packets
    "predict": demo_prediction, "completeRawText": demo_prediction, "getOrLoad": DemoSocket.load,
    "loadModel": DemoSocket.load, "streamLogs": DemoSocket.logs}


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """The imitation's answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: DemoServer

    def do_GET(self):
        namespace, server = self.path.partition("?")[0][1:], self.server
        if self.headers.get("Upgrade") and namespace in NAMESPACES:
            return self._switch(namespace)
        if self.path == "/lmstudio-greeting":
            return self._json({"lmstudio": True})
        if self.path not in ("/v1/models", "/api/v1/models"):
            return self._unexpected()
        server.log.write("DEBUG", f"Received request: GET to {self.path}")
        if self.path == "/api/v1/models":
            return self._json({"models": server.models()})
        server.log.write("INFO", f"Returning {len(DEMO_MODELS)} models from v1 API")
        return self._json({"data": [{"id": name, "object": "model", "owned_by": "organization_owner"}
                                    for name in DEMO_MODELS], "object": "list"})

    def do_POST(self):
        body = json_object(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        path, server = self.path.partition("?")[0], self.server
        if path == "/api/v1/models/load" and body:
            server.load(body.get("model"))
            return self._json({"instance_id": body.get("model"), "status": "loaded"})
        if path == "/api/v1/models/unload" and body:
            server.hold(body.get("instance_id"))
            return self._json(body)
        if path not in DEMO_SPEECH:
            return self._unexpected()
        if body is None or not demo_texts(body):
            return self._json({"error": "a field is required: 'messages'"}, 400)
        run = DemoAnswer(server, path, body,
                         lambda: not server.stopping.is_set() and not has_left(self.connection))
        run.received()
        whole, events = DEMO_SPEECH[path]
        try:
            with run.engine.turn:
                if run.model not in server.loaded.values():
                    server.load(run.model)
                if run.stream:
                    return self._stream(run, events)
                run.read_prompt()
                text = "".join(run.words()).strip()
                run.finished()
                return self._json(whole(run, text))
        except OSError:     # the client has left, or this server stops
            run.abandoned()
            self.close_connection = True

    def _stream(self, run, events):
        self._head(200, "text/event-stream", "Transfer-Encoding", "chunked")
        run.read_prompt()
        for name, data in events(run):
            run.insist()
            text = "[DONE]" if data is None else json.dumps({"type": name, **data} if name else data)
            event = (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
            self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
        run.finished()
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status, kind, name, value):
        self.send_response(status)
        for header in (("X-Powered-By", "Express"), ("Content-Type", kind), (name, value)):
            self.send_header(*header)
        self.end_headers()

    def _switch(self, namespace):
        self.send_response(101)
        for header in (("Upgrade", "websocket"), ("Connection", "Upgrade"),
                       ("Sec-WebSocket-Accept", accept_key(self.headers.get("Sec-WebSocket-Key", "")))):
            self.send_header(*header)
        self.end_headers()
        self.close_connection = True
        with contextlib.closing(DemoSocket(self, namespace)) as connection, contextlib.suppress(OSError):
            connection.serve()

    def _json(self, value, status=200):
        data = json.dumps(value, indent=2).encode()
        self._head(status, "application/json; charset=utf-8", "Content-Length", str(len(data)))
        self.wfile.write(data)

    def _unexpected(self):
        """LM Studio's answer to a path that it does not know: 200 with an error (as of 1.1.7)."""
        what = f"Unexpected endpoint or method. ({self.command} {self.path})"
        self.server.log.write("ERROR", what + ". Returning 200 anyway")
        self._json({"error": what})

    def log_message(self, format, *args):
        pass


def start_thread(body, *args, name):
    """Start a thread that does not hold up the end of the process."""
    threading.Thread(target=body, args=args, name=name, daemon=True).start()


class DemoServer(http.server.ThreadingHTTPServer):
    """The imitation on a port of its own.  Its speed is set by the fields; it serves from start to stop()."""

    daemon_threads = True
    request_queue_size = 128
    batch, answer_tokens = 512, 60  # tokens

    def __init__(self, directory, batch_s=0.8, token_s=0.03):
        super().__init__(("127.0.0.1", 0), DemoHandler)
        self.log, self.stopping = DemoLog(directory), threading.Event()
        self.engines = {name: DemoEngine(self.log, pace) for name, pace in zip(DEMO_MODELS, (1.0, 0.4))}
        self.loaded = {name: name for name in DEMO_MODELS}    # by identifier
        self.batch_s, self.token_s = batch_s, token_s

    def models(self):
        """The models as /api/v1/models lists them."""
        return [{"type": "embedding" if key == DEMO_EMBEDDING else "llm", "publisher": "demo", "key": key,
                 "quantization": {"name": "Q4_K_M", "bits_per_weight": 4}, "size_bytes": 5_000_000_000,
                 "max_context_length": DEMO_CONTEXT, "loaded_instances": [
                     {"id": own, "config": {"context_length": DEMO_CONTEXT}}
                     for own, name in list(self.loaded.items()) if name == key]}
                for key in (*DEMO_MODELS, DEMO_EMBEDDING)]

    def hold(self, own, name=None):
        """A model is loaded under an identifier of its own; without a name it is unloaded."""
        self.loaded.pop(own, None)
        if name:
            self.loaded[own] = name
        self.log.write("DEBUG", f"[model_kit][INFO]: Model {'' if name else 'un'}loaded successfully")

    def load(self, name):
        """Load a model that was asked for, which takes a moment."""
        self.log.write("INFO", f'Requested model ({name}) is not loaded. Loading "{name}" now...', "JIT")
        self.stopping.wait(50 * self.token_s)
        self.hold(name, name)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self):
        self.log.write("INFO", f"Success! HTTP server listening on port {self.server_address[1]}", SERVER_TAG)
        start_thread(self.serve_forever, 0.05, name="demo-server")

    def stop(self):
        self.stopping.set()
        self.shutdown()
        self.server_close()


# --- 8.1 the story: people who ask the imitation ------------------------------


class DemoClient(NamedTuple):
    """One request of the demo's own traffic."""

    who: str
    agent: str
    model: str
    prompt: str
    answer_tokens: int
    then_s: float = 1.0     # until the next one asks
    stream: bool = True
    read_bytes: int | None = None   # then it leaves


DEMO_KEYS = {"anna": "high", "ben": "normal", "clara": "low", "n8n": "normal", "backup.sh": "low"}
LONG = "The minutes of the garden club, all years. " * 80  # 24,000 tokens: 38 s to read
LARGE, SMALL = DEMO_MODELS
DEMO_STORY = (  # Clara's agent asks for much at once, and the others need not wait for it
    DemoClient("backup.sh", "backup.sh/2", SMALL, "Why is the sky dark at night?", 20),
    DemoClient("anna", "OpenWebUI/0.6", LARGE, LONG + "Summarise them.", 90),
    DemoClient("ben", "Continue/1.2", SMALL, "Which of these invoices is overdue? " * 60, 200),
    *6 * [DemoClient("clara", "agent/3.1", LARGE, "Sort these letters by urgency. ", 80, 0.4)],
    DemoClient("ben", "Continue/1.2", LARGE, "Which of these invoices is overdue? " * 6, 80, 4.0),
    DemoClient("n8n", "n8n", SMALL, "", 40, 6.0, stream=False),    # refused: it asks nothing
    DemoClient("n8n", "n8n", SMALL, "Sort these letters by urgency. " * 25, 160, 9.0, stream=False),
    DemoClient("clara", "agent/3.1", SMALL, "Tell me a very long story. " * 30, 400, 12.0, read_bytes=30_000),
    DemoClient("backup.sh", "backup.sh/2", SMALL, "Why is the sky dark at night?", 20, 6.0),
    DemoClient("anna", "OpenWebUI/0.6", LARGE, LONG + "And who was absent most often? " * 6, 60, 20.0),
    DemoClient("ben", "Continue/1.2", SMALL, "Which of these invoices is overdue? " * 60, 200, 30.0),
)
PAST_S = 3600.0  # that the demo has behind it when it starts


class Demo:
    """--demo: the imitation, the people who ask it, and an hour that lies behind them."""

    def __init__(self, cleanup):
        directory = tempfile.mkdtemp(prefix="lmgateway-demo-")
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        self.studio = DemoServer(directory)
        cleanup.callback(self.studio.stop)
        self.studio.start()
        self._behind_s = PAST_S  # the Hub's clocks
        self._keys = {name: mint_key() for name in DEMO_KEYS}

    def config(self, config):
        """The Config that points to the imitation.  The user's minted keys count only if their file is named:
        trying it must not need one."""
        directory = self.studio.log.directory
        return config.but(upstream=self.studio.url, log_dir=directory, enable_log_monitoring=True,
                          max_running=config.max_running or 1,
                          keys_file=config.keys_file or os.path.join(directory, "keys.json"))

    def now(self):
        return time.time() - self._behind_s

    def clock(self):
        return time.monotonic() - self._behind_s

    def furnish(self, gateway):
        """Give a gateway its people, by the priorities of their keys, and its past, before it serves."""
        gateway.demo = True
        gateway.access.guests += [
            Key(name, digest(self._keys[name]), frozenset(("infer",)), terms=Terms(priority=priority))
            for name, priority in DEMO_KEYS.items()]
        for at, tell, *about in sorted(self._past(gateway), key=lambda moment: moment[0]):
            self._behind_s = PAST_S - at
            tell(*about)
        self._behind_s = 0.0

    def _past(self, gateway):
        """An hour of requests: (second of the hour, method of the Hub, its arguments)."""
        source, hub, began, clock, at = random.Random(3), gateway.hub, self.now(), self.clock(), 20.0
        kinds, free = list(dict.fromkeys(DEMO_STORY)), dict.fromkeys(DEMO_MODELS, 0.0)
        weights = [1 if client.prompt and not client.read_bytes else 0.3 for client in kinds]
        while at < PAST_S - 60:
            (client,) = source.choices(kinds, weights)
            record = Record(hub.request_id(), began + at, clock + at, method="POST", client="127.0.0.1",
                            path="/v1/chat/completions", key=client.who, agent=client.agent,
                            stream=client.stream, model_asked=client.model, model=client.model)
            begin, took_s, outcome = max(at, free[client.model]), 0.01, DEMO_REFUSED
            if client.prompt:
                pace = self.studio.engines[client.model].pace * source.uniform(0.95, 1.2)
                took_s = demo_answer(record, client, source, clock + begin, pace)
                outcome, free[client.model] = DEMO_OUTCOMES[bool(client.read_bytes)], begin + took_s
                gateway.turns.took(client.model, took_s)
            yield at, hub.begin, record
            yield begin + took_s, hub.end, record, outcome
            at += source.expovariate(1 / 25)

    def traffic(self, address, pause):
        """Body of a thread: the story over and over, until pause(seconds) returns True."""
        for client in itertools.cycle(DEMO_STORY):
            start_thread(demo_request, address, self._keys[client.who], client, name="demo-client")
            if pause(client.then_s * random.uniform(0.9, 1.1)):
                return


DEMO_REFUSED = Outcome("failed", 400, "LM Studio answered 400 Bad Request", "upstream_error")
DEMO_OUTCOMES = (Outcome("done", 200),
                 Outcome("abandoned", 200, "the client left while the answer came", "client_disconnected"))


def demo_answer(record, client, source, begin, pace):
    """A request of the past, with its turn at a clock reading; gives the s that it took."""
    prompt = 20 + round(7 * len(client.prompt) * source.uniform(0.5, 1.2))
    cached = round(prompt * source.choice((0, 0.3, 0.95)))
    answer = round(client.answer_tokens * source.uniform(0.6, 1.6))
    read_s, write_s = (prompt - cached) / 640 * pace, answer * 0.03 * pace
    record.usage = {"promptTokens": prompt, "completionTokens": answer, "totalTokens": prompt + answer}
    record.cache = {"reused": cached, "total": prompt, "percentage": round(100 * cached / prompt, 1)}
    record.prompt_tokens, record.context_size, record.finish = prompt, DEMO_CONTEXT, "stop"
    record.speed, record.read_speed = round(answer / write_s, 2), round((prompt - cached) / read_s, 2)
    record.waited_ms = round(1000 * (begin - record.clock), 1)
    record.first_ms = record.waited_ms + round(1000 * read_s, 1)
    record.entered = {"queued": record.clock, "prompt": begin, "generating": begin + read_s}
    return read_s + write_s


def demo_request(address, key, client):
    """One request of the story."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    messages = [{"role": "user", "content": client.prompt}] if client.prompt else []
    body = {"model": client.model, "stream": client.stream, "max_tokens": client.answer_tokens,
            "messages": messages}
    sent = urllib.request.Request(address + "/v1/chat/completions", json.dumps(body).encode(), {
        "Content-Type": "application/json", "Authorization": f"Bearer {key}", "User-Agent": client.agent})
    with contextlib.suppress(*BROKEN), opener.open(sent, timeout=600) as answer:
        answer.read(client.read_bytes)


# === 9. COMMAND ==============================================================

# --- 9.1 output, and our own log ----------------------------------------------


def lenient_streams(encoding=None):
    """Any text of a log can be printed: Windows' cp1252 has no place for much of it."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(encoding=encoding, errors="backslashreplace")  # type: ignore[union-attr]


def closed_pipe():
    """Output went into a closed pipe: end quietly, and keep Python from complaining at exit."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class OneLine(logging.Formatter):
    """A message is one line, also with names and errors of others in it; a fault's traceback follows."""

    def formatMessage(self, record):
        record.message = record.message.translate(CONTROL)
        return super().formatMessage(record)


class OwnLogFile(logging.handlers.RotatingFileHandler):
    """LOG_FILE, readable by its owner only; made anew after logrotate(8) has moved it.  The first line that
    cannot be written is said on stderr."""

    failed = False

    def _open(self):
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors,
                    opener=lambda path, flags: os.open(path, flags, 0o600))

    def emit(self, record):
        if not os.path.exists(self.baseFilename):
            self.close()    # the next line opens it
        super().emit(record)

    def handleError(self, record):
        if not self.failed:
            self.failed = True
            print(f"lmgateway: {self.baseFilename}: {error_text(sys.exc_info()[1])}; lines of our log are "
                  "missing in it", file=sys.stderr)


class LogQueue(logging.handlers.QueueHandler):
    """Takes records in for a LogWriter and never waits: beyond MOST of them they are lost, and counted."""

    MOST = 10_000
    lost = 0    # guarded by the handler's lock

    def prepare(self, record):
        return record   # it stays in this process

    def enqueue(self, record):
        if self.queue.qsize() < self.MOST:  # type: ignore[attr-defined]
            self.queue.put_nowait(record)
        else:
            self.lost += 1


class LogWriter(logging.handlers.QueueListener):
    """A thread that writes our log, while the context lasts: no other thread waits for a disk, or for the
    reader of stderr.

    It gathers lines: to be woken for each, and to let others in while each is written, would cost a request
    more than all else here."""

    GATHER_S, BATCH = 0.05, 1000    # for a batch of lines; the most of them
    END_S = 0.5     # to write the rest

    def __init__(self, handler):
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(self._lines, handler)
        self._entrance, self._handler, self._formatter = LogQueue(self._lines), handler, handler.formatter

    def __enter__(self):
        self._handler.setFormatter(None)    # a batch has its form
        log.handlers = [self._entrance]
        lone = isinstance(self._handler, OwnLogFile) or not is_terminal(sys.stderr)
        if lone and hasattr(signal, "SIGHUP"):  # else it ends with its terminal
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.start()

    def handle(self, record):
        time.sleep(self.GATHER_S)
        batch = [record]
        if self._entrance.lost:
            with self._entrance.lock:   # type: ignore[union-attr]
                lost, self._entrance.lost = self._entrance.lost, 0
            batch.insert(0, logging.makeLogRecord({
                "levelname": "warn", "msg": f"{lost} lines were lost: they came too fast to be written"}))
        while not self._lines.empty() and len(batch) < self.BATCH:
            following = self._lines.get_nowait()
            if following is None:   # the end, as stop() says it: behind the lines that came since
                self.enqueue_sentinel()
                break
            batch.append(following)
        super().handle(logging.makeLogRecord({"msg": "\n".join(map(self._formatter.format, batch))}))

    def __exit__(self, kind, error, traceback):
        """Write the rest.  A stream that takes nothing would also hold up the interpreter's own end."""
        ending = threading.Thread(target=self.stop, daemon=True)
        ending.start()
        ending.join(self.END_S)
        if ending.is_alive():
            os._exit(0 if kind is None else 1)
        self._handler.setFormatter(self._formatter)
        log.handlers = [self._handler]


def set_up_logging(config):
    """2025-11-17 12:00:00 [info]: message, on stderr or in LOG_FILE.  Raises ConfigError."""
    for number, name in ((10, "debug"), (20, "info"), (30, "warn"), (40, "error")):
        logging.addLevelName(number, name)
    handler: logging.Handler = logging.StreamHandler()
    if config.log_file:
        try:
            handler = OwnLogFile(config.log_file, maxBytes=5_000_000, backupCount=3, encoding="utf-8",
                                 errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"{config.named('log_file')}: {error_text(error)}; name a file that "
                              "can be written") from None
    handler.setFormatter(OneLine("%(asctime)s [%(levelname)s]: %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(LEVELS[config.log_level])
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback
    # No line of ours names its place in the code: that would be a third of its cost (Python's Logging
    # HOWTO, "Optimization").
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


# --- 9.2 keys ----------------------------------------------------------------

# These read a key's flags, and give None for a text that is none of the forms in TERMS.

def rights_of(text):
    rights = set(words(text))
    return sorted(rights) if rights and rights <= set(RIGHTS) else None


def limits_of(text):
    pairs = [part.strip().partition("=") for part in text.split(",")] if text.strip() != "none" else []
    found = {name: int(number) for name, _, number in pairs
             if name in LIMITS and re.fullmatch(r"[1-9]\d{0,11}", number, re.ASCII)}
    return found if len(found) == len(pairs) else None


def globs_of(text):
    globs = [part.strip() for part in text.split(",")]
    if any(not re.fullmatch(r"[!-~]+", glob) or glob.count("[") != glob.count("]") for glob in globs):
        return None
    return [] if "*" in globs else globs


def expiry_of(text):
    days = re.fullmatch(r"([1-9]\d{0,4})d", text, re.ASCII)
    if days:
        return str(datetime.date.today() + datetime.timedelta(int(days[1])))
    return "" if text == "never" else last_day(text)


TERMS = {  # field of a key's row -> the reader of its flag, the forms that it takes
    "rights": (rights_of, f"choose from {', '.join(RIGHTS)}"),
    "limits": (limits_of, "use running=2,rpm=30,tpm=20000,tpd=500000, or some of them, or none"),
    "priority": (lambda text: text if text in PRIORITIES else None, f"choose from {', '.join(PRIORITIES)}"),
    "models": (globs_of, "use names and patterns such as qwen*,openai/gpt-oss-20b, or * for all"),
    "expires": (expiry_of, "use 30d, a date such as 2026-12-31 for the last day, or never"),
}
MAY = {"infer": "ask models and see its own requests", "view": "see everybody's requests and the log",
       "admin": "do everything"}


def chosen_terms(args):
    """The fields of a key's row that flags set.  Raises ConfigError."""
    said = {name: getattr(args, name) for name in TERMS if getattr(args, name) is not None}
    found = {name: TERMS[name][0](text) for name, text in said.items()}
    for name, value in found.items():
        if value is None:
            raise ConfigError(f"--{name} {said[name]}: {TERMS[name][1]}")
    return found


def change_row(row, changes):
    """Set these in a key's row; empty and usual values do not stand there."""
    row.update(changes)
    for name in changes:
        if row[name] in ({}, [], "", "normal"):
            del row[name]


def terms_text(terms):
    """A key's limits and the like in words; empty if it has none."""
    return "  ".join(filter(None, (
        ",".join(f"{name}={number}" for name, number in terms.limits.items()),
        f"priority {terms.priority}" if terms.priority != "normal" else "",
        f"models {','.join(terms.models)}" if terms.models else "",
        f"until {terms.expires}" if terms.expires else "")))


def say_what_it_may(row):
    rights = ["admin"] if "admin" in row["rights"] else row["rights"]
    may = " and ".join(MAY[right] for right in rights if right in MAY)
    terms = terms_text(terms_of(row)) or "without limits"
    print(printable(f"lmgateway: {row['name']} may {may}; {terms}"), file=sys.stderr)


def new_key(args, config):
    """--new-key NAME: mint a key, keep its hash, print it once."""
    name, chosen = args.new_key.strip(), {"rights": ["infer"], **chosen_terms(args)}
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise ConfigError("--new-key: a name is made of up to 64 letters, digits and . _ - @")
    key = mint_key()
    row = key_row(Key(name, digest(key), frozenset(), time.strftime("%Y-%m-%d")))
    change_row(row, chosen)
    with changing_keys(config) as (file, rows):
        if any(row["name"] == name for row in rows) or name in config.api_key:
            raise ConfigError(f"--new-key {name}: there is a key of that name; choose another, or "
                              f"--revoke-key {name} first")
        rows.append(row)
    print(key)
    print(f"lmgateway: this is the only time the key of {name} is shown; its hash is in {file.path}",
          file=sys.stderr)
    say_what_it_may(row)
    return 0


def row_of(file, rows, flag, name):
    """The row of that name.  Raises ConfigError."""
    for row in rows:
        if row["name"] == name:
            return row
    raise ConfigError(f"{flag} {name}: no such key in {file.path}; --list-keys shows them")


def set_key(args, config):
    """--set-key NAME: change a key; a running gateway notices within a second."""
    chosen = chosen_terms(args)
    if not chosen:
        raise ConfigError(f"--set-key {args.set_key}: say what to change, with "
                          + ", ".join(map(flag_of, TERMS)))
    with changing_keys(config) as (file, rows):
        row = row_of(file, rows, "--set-key", args.set_key)
        change_row(row, chosen)
    say_what_it_may(row)
    return 0


def list_keys(args, config):
    """--list-keys: names, rights, dates, limits and, from the history, the last use."""
    file, keys = open_key_file(config)
    used = requests_by_key(config.history) if config.history and os.path.exists(config.history) else {}
    rows = [(key.name, ",".join(sorted(key.rights)), key.created, terms_text(key.terms)) for key in keys]
    rows += [(name, ",".join(sorted(RIGHTS)), "GATEWAY_API_KEY", "") for name in config.api_key]
    for name, rights, created, terms in rows:
        last = used[name][-1] if name in used else None
        last_use = last and time.strftime("last used %Y-%m-%d %H:%M", time.localtime(last))
        print(printable("  ".join(filter(None, (f"{name:24}", f"{rights:18}", created, terms, last_use)))))
    if not rows:
        print(f"lmgateway: no keys in {file.path}; --new-key NAME mints one", file=sys.stderr)
    return 0


def revoke_key(args, config):
    """--revoke-key NAME: a running gateway notices within a second."""
    with changing_keys(config) as (file, rows):
        rows.remove(row_of(file, rows, "--revoke-key", args.revoke_key))
    print(f"lmgateway: {args.revoke_key} is revoked", file=sys.stderr)
    return 0


def open_key_file(config):
    """(KeyFile, its Keys).  Raises ConfigError when it cannot be read."""
    file = KeyFile(keys_path(config))
    try:
        return file, file.load()[1] if file.path.exists() else []
    except OSError as error:
        raise ConfigError(f"{config.named('keys_file', file.path)}: {error_text(error)}; name a file that "
                          "can be read") from None


@contextlib.contextmanager
def changing_keys(config):
    """Yields (KeyFile, its rows) to change while nobody else does.  Raises ConfigError."""
    file = open_key_file(config)[0]
    try:
        with file.changing() as rows:
            yield file, rows
    except OSError as error:
        raise ConfigError(f"--keys-file {file.path}: {error_text(error)}; name a file that can be "
                          "written") from None


# --- 9.3 the terminal view: events as lines, running requests as cards -------

UNSEEN = (*range(32), *range(127, 160), 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F),
          *range(0x2066, 0x206A))
CONTROL = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
           for code in UNSEEN}  # and marks that turn text round
PROGRESS = ("lmstudio_prompt_progress", "inference_progress")  # on a terminal the cards show these
ODD = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)    # another version's data


def printable(text):
    """Text without control characters."""
    return str(text).translate(CONTROL)


def chosen_events(text):
    """A predicate of event names for --events: `a,b` keeps only these, `-a` leaves one out."""
    names = words(text or "")
    keep = {name for name in names if not name.startswith("-")}
    leave = {name[1:] for name in names if name.startswith("-")}
    return lambda name: name not in leave and (not keep or name in keep)


class Printer:
    """Events as JSON lines, or as aligned lines for people.  Flushes after each batch.

    On a terminal something stands below the lines and is redrawn in place: with live the running requests
    as cards, else the latest progress, which becomes a line when something else comes."""

    TICK_S = 0.5    # the cards' clocks are redrawn so often

    def __init__(self, out, as_json, chosen, live):
        self._out, self._json, self._chosen = out, as_json, chosen
        self._epoch, self._seq = secrets.token_hex(4), 0
        self._redraws = is_terminal(out) and not as_json
        if self._redraws and os.name == "nt":
            os.system("")  # Windows' console understands escape sequences from here on
        self._colour = self._redraws and not os.environ.get("NO_COLOR")
        self.cards: Any = Cards(bar_marks(out.encoding)) if self._redraws and live else None
        self._progress = []  # without cards: the latest
        self._drawn = []  # (line, its colour) of the block below
        self._ticked = 0.0

    def __call__(self, events):
        events = [event for event in events if event.name]
        numbers = range(self._seq + 1, self._seq + 1 + len(events))
        self._seq += len(events)
        self.write([(f"{self._epoch}-{number}", event) for number, event in zip(numbers, events)])

    def write(self, identified):
        """Print (id, event) pairs."""
        parts = []
        for event_id, event in identified:
            if self.cards:
                self.cards.take(event, time.monotonic())
            if not self._chosen(event.name):
                continue
            if self._json:
                parts.append(json_line(event_id, event))
            elif not self._redraws or not shown_on_cards(event):
                parts += itertools.starmap(self._painted, [*self._progress, self._line(event)])
                self._progress = []
            elif event.name in PROGRESS and not self.cards:
                self._progress = [self._line(event)]
        text = "".join(parts)
        if self._redraws:
            text = self._screen(text)
        if text:
            self._out.write(text)
            self._out.flush()

    def tick(self):
        """To be called often: redraws the cards now and then, for their clocks."""
        if self.cards and time.monotonic() - self._ticked >= self.TICK_S:
            self.write([])

    def finish(self):
        """Take the cards off the screen."""
        if self.cards and self._drawn:
            self._out.write(self._erasure(shutil.get_terminal_size()))
            self._out.flush()
            self._drawn = []

    def _screen(self, text):
        """The bytes that show text above the block that is redrawn; empty when nothing changed."""
        size, self._ticked = shutil.get_terminal_size(), time.monotonic()
        below = self._progress if not self.cards else [
            (line, CARD_COLOURS.get(line.partition(" ")[0], "0"))
            for line in self.cards.lines(self._ticked, size.columns - 1, size.lines - 1)]
        if not text and below == self._drawn:
            return ""
        text = self._erasure(size) + text + "".join(itertools.starmap(self._painted, below))
        self._drawn = below
        return text

    def _erasure(self, size):
        return erasure([line for line, _ in self._drawn], size)

    def _line(self, event):
        """(line for people, its colour).  A redrawn line, and an excerpt of the log, is cut at the edge
        of a terminal; any other line goes on in the next row."""
        time_of_day = printable(str(event.data.get("timestamp", ""))[11:19])
        name = printable(event.name.replace("lmstudio_", ""))
        line = f"{time_of_day:8}  {name:18}  {summary(event)}".rstrip()
        if self._redraws and event.name in (*PROGRESS, "lmstudio_log"):
            line = clipped(line, shutil.get_terminal_size().columns - 1)
        return line, EVENTS[event.name].colour if event.name in EVENTS else "0"

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


def erasure(lines, size):
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


CARD_COLOURS = {"PREFILL": "33", "WRITE": "32", "WAIT": "36", "cache": "2"}


class Cards:
    """The running requests, each as its latest inference_progress shows it.  Pure: lines() draws them."""

    STALE_S = 3600.0    # a request that is silent for so long is taken off the screen
    OVER = ("done", "error", "abandoned")   # the last state of a chat that no gateway has forwarded

    def __init__(self, marks):
        self._marks = marks
        self._cards = {}  # requestId -> (clock, record), in order of arrival

    def take(self, event, now):
        """Learn from one event."""
        key = str(event.data.get("requestId"))
        if event.name in ("inference_complete", "error") or event.data.get("state") in self.OVER:
            self._cards.pop(key, None)
        elif event.name in ("inference_start", "inference_progress"):
            self._cards[key] = (now, event.data)

    def lines(self, now, columns, rows):
        """At most rows lines of at most so many columns: the oldest requests first, those in a queue last."""
        self._cards = {key: card for key, card in self._cards.items() if now - card[0] < self.STALE_S}
        cards = sorted(self._cards.values(), key=lambda card: count(card[1], "position", default=0))
        blocks = [card_lines(record, now - told, self._marks) for told, record in cards]
        shown: list[str] = []
        for number, block in enumerate(blocks):
            more = len(blocks) - number
            if len(shown) + len(block) + (more > 1) > rows:
                shown.append(f"and {more} more running")
                break
            shown += block
        return [clipped(line, max(1, columns)) for line in shown[:max(0, rows)]]


def card_lines(record, age_s, marks):
    """A running request in up to three lines: its client, its progress, its cache and context; one that waits
    in one.  record is the data of an inference_progress that is age_s old."""
    who = [record.get("model") or "(model not named)",
           *(record[name] for name in ("user", "key", "client", "path") if record.get(name))]
    try:
        words = list(doing(record, age_s, marks))
        rows = [[*words, *who]] if words[0] == "WAIT" else [who, words, list(holding(record))]
    except ODD:
        rows = [who]
    return [printable("  ".join(map(str, row))) for row in rows if row]


def doing(record, age_s, marks):
    """The words of a card's second line."""
    known, state = record.get("progress") or {}, record.get("state") or "waiting"
    elapsed = f"elapsed {duration((record.get('elapsedMs') or 0) / 1000 + age_s)}"
    left = known.get("etaMs", record.get("etaMs"))
    eta = "" if left is None else f"eta {duration(max(0, left / 1000 - age_s))}"
    if state == "generating":
        words = ["WRITE", counted(known.get("outputTokens"), "tok"),
                 per_second(known.get("outputTokensPerSecond")), elapsed]
    elif state == "prompt":
        percent, total, read = (known.get(name) for name in ("percent", "promptTokens", "promptTokensRead"))
        full = max(0, min(8, round((percent or 0) / 12.5)))
        words = ["PREFILL", marks[0] * full + marks[1] * (8 - full), f"{percent or 0:.0f} %", eta,
                 "" if not total or read is None else f"{read:,}/{total:,}",
                 per_second(known.get("promptTokensPerSecond")), elapsed]     # fits into 80 columns
    else:
        place = f"{record['position']} of {record['waiting']}" if record.get("position") else ""
        words = ["WAIT", "" if state == "waiting" else str(state), place, elapsed, eta]
    return filter(None, words)


def holding(record):
    """The words of a card's third line, none when the cache is unknown."""
    cache, context = record.get("cache"), record.get("context")
    if not cache:
        return
    yield (f"cache    {cache['reused']:,} of {cache['total']:,} prompt tokens reused "
           f"({cache['percentage']:.0f} %)")
    if context:
        yield f"context {context['used']:,} of {context['size']:,}"


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
    """An event's data in one line for a person: figures first, the id last, no control characters."""
    data = event.data
    try:
        shown = EVENTS[event.name].figures(data) if event.name in EVENTS else message_of(data)
        request_id = event.name.startswith(("inference_", "error")) and data.get("requestId")
        shown = "  ".join(filter(None, (shown, data.get("model"), request_id)))
    except ODD:
        shown = json.dumps(data)
    return printable(shown.replace("\n", " | ").replace("\t", " "))


def message_of(data):
    return str(data.get("message", ""))


def percent_bar(data):
    done = max(0, min(20, round(data["progress"] / 5)))
    return f"[{'#' * done}{'.' * (20 - done)}] {data['progress']:5.1f} %"


def labelled(**fields):
    """A function that shows fields of an event's data as `label value`, those that are there."""
    return lambda data: "  ".join(f"{label} {data[field]}".strip() for label, field in fields.items()
                                  if data.get(field) is not None)


def used_tokens(usage):
    """645 + 39 tok: those of the prompt and those of the answer."""
    counts = [usage.get(name) for name in ("promptTokens", "completionTokens")]
    return " + ".join("?" if count is None else f"{count:,}" for count in counts) + " tok" if usage else ""


def figures_of_answer(data):
    return "  ".join(filter(None, (
        f"{data['status']}  {data['totalTimeMs'] / 1000:.1f} s", used_tokens(data.get("tokenUsage") or {}),
        per_second(data.get("tokensPerSecond")))))


def log_line(data):
    return f"{data['level']:5}  " + data["message"].strip().partition("\n")[0][:400]


class EventRow(NamedTuple):
    """One event: its line in the README, its colour on a terminal, and a function that shows its data."""

    about: str
    colour: str = "0"
    figures: Callable[[dict], str] = message_of


RED, GREEN, YELLOW, PURPLE, CYAN, FAINT = "31", "32", "33", "35", "36", "2"
EVENTS = {  # every event of the stream; a test holds the README's table to it
    "connected": EventRow("you are listening"),
    "inference_start": EventRow(
        "a client's request goes to LM Studio", CYAN,
        lambda data: "  ".join(str(data[name]) for name in ("key", "client", "path") if data.get(name))),
    "inference_progress": EventRow(
        "how far it is, as the whole record; at most four times a second, once while it answers", YELLOW,
        lambda data: "  ".join(doing(data, 0, "#."))),
    "inference_complete": EventRow("it was answered: status, times, tokens", GREEN, figures_of_answer),
    "error": EventRow("it was not: refused, failed, broken off or abandoned", RED,
                      labelled(status="status", what="error")),
    "lmstudio_log": EventRow("one entry of LM Studio's log, as it stands there", FAINT, log_line),
    "lmstudio_chat_start": EventRow("LM Studio took a chat on", CYAN,
                                    lambda data: f"{data['messages']} messages"),
    "lmstudio_sampling_params": EventRow(
        "how the engine samples", figures=labelled(temp="temp", top_k="top_k", top_p="top_p", min_p="min_p",
                                                   repeat="repeat_penalty")),
    "lmstudio_token_info": EventRow(
        "context size, prompt tokens and how many of them are to be read",
        figures=labelled(prompt="totalPromptTokens", fresh="promptTokensToDecode", context="n_ctx",
                         limit="n_predict")),
    "lmstudio_cache_stats": EventRow(
        "how much of the prompt was in the cache",
        figures=lambda data: f"{data['reused']} of {data['total']} tokens from the cache "
                             f"({data['percentage']} %)"),
    "lmstudio_processing_start": EventRow("the engine begins to read the prompt"),
    "lmstudio_prompt_progress": EventRow("how much of the prompt has been read, in percent", YELLOW,
                                         percent_bar),
    "lmstudio_generation_start": EventRow("the prompt is read, the first token is next",
                                          figures=lambda data: "prompt read, generating"),
    "lmstudio_prediction_stats": EventRow(
        "tokens and speeds of the finished run",
        figures=labelled(prompt="promptTokens", output="completionTokens", read="promptTokensPerSecond",
                         wrote="tokensPerSecond", first_ms="timeToFirstTokenMs", total_ms="totalMs")),
    "lmstudio_chat_end": EventRow("finished, disconnected or error", GREEN,
                                  lambda data: f"{data['outcome']}: {data['message'][:200]}"),
    "lmstudio_error": EventRow("an ERROR entry of LM Studio's own", RED),
    "lmstudio_file_switch": EventRow("the log goes on in a new file of the same month",
                                     figures=labelled(to="newLogFile")),
    "lmstudio_month_transition": EventRow("the log goes on in a new month",
                                          figures=labelled(to="newLogFile")),
    "gap": EventRow("events that this listener will never get", PURPLE,
                    labelled(first="from", last="to", count="count")),
    "ping": EventRow("15 s of silence"),
}


# --- 9.4 commands that print events: --tail-only and --watch -----------------


@contextlib.contextmanager
def open_printer(args, live):
    """A Printer on stdout that makes room for our log on the same terminal.  Raises StartError."""
    if sys.stdout is None:
        raise StartError("there is no standard output to print to: send it to a file or a pipe")
    if args.json:
        lenient_streams("utf-8")
    printer = Printer(sys.stdout, args.json, chosen_events(args.events), live)
    for handler in log.handlers:
        handler.addFilter(lambda record: printer.finish() or True)
    try:
        yield printer
    finally:
        with contextlib.suppress(OSError):
            printer.finish()


def changed_records(requests, events, clock=0.0):
    """The Records of Requests that change with a log's events, those that are over included."""
    told = requests.see(events, clock)
    over, requests.changed = requests.changed, []
    return {record.id: record for record in (*told, *over)}.values()


def tail_only(args, config):
    """--tail-only: replay PATHs, or follow the live log until a signal.  Returns the exit status."""
    with open_printer(args, live=not args.paths) as printer:
        if args.paths:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
            freeze_start_up()
            replay(saved_logs(args.paths), printer)
            return 0
        stop, directory = Stop(), log_dir_of(config)
        follower = Follower(directory, args.from_start, time.time())
        log.info("lmgateway %s, log directory: %s", VERSION, directory)
        freeze_start_up()
        Monitor(follower).run(with_cards(printer), lambda seconds: printer.tick() or stop.wait(seconds))
        return stop.status


def with_cards(printer):
    """A function that prints a log's events, and shows its chats on the printer's cards."""
    requests = Requests("", keep=0)

    def publish(events):
        if printer.cards:
            clock = time.monotonic()
            for record in changed_records(requests, events, clock):
                printer.cards.take(record.progress_event("", clock), clock)
        printer(events)

    return publish


@contextlib.contextmanager
def naming_history(config):
    """A HistoryError as a ConfigError that names --history and its source."""
    try:
        yield
    except HistoryError as error:
        raise ConfigError(f"{config.named('history')}: {error}") from None


def report(args, config):
    """--report: usage by day and model, from PATHs or from the history.  Returns the exit status."""
    if not args.paths and not config.history:
        raise ConfigError("--report: name saved logs or a log directory, or a history with --history FILE "
                          "(HISTORY_FILE)")
    if config.history and not args.paths and not os.path.exists(config.history):
        raise ConfigError(f"{config.named('history')}: no such file; name one that a gateway keeps")
    file = ":memory:" if args.paths else config.history
    with naming_history(config), open_history(file) as kept:
        if args.paths:
            freeze_start_up()
            requests = Requests("", keep=0)
            replay(saved_logs(args.paths), lambda events: store_rows(kept, [
                history_row(record) for record in changed_records(requests, events)
                if record.ended is not None]))
        rows, total = usage_rows(kept, ["day", "model"]), usage_rows(kept, [])
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    elif rows:
        print(report_text([*rows, {"day": "total", "model": "", **total[0]}]))
    else:
        print("lmgateway: no request in it; name LM Studio's log directory, or a history that has been "
              "kept for a while", file=sys.stderr)
    return 0


REPORT = ("{day:10}  {model:32.32}  {requests:>8,}  {errors:>6,}  {promptTokens:>12,}  {cached:>6}  "
          "{completionTokens:>12,}  {promptTokensPerSecond:>10}  {tokensPerSecond:>11}")
REPORT_HEADS = {"day": "day", "model": "model", "requests": "requests", "errors": "failed",
                "promptTokens": "prompt tok", "cached": "cached", "completionTokens": "output tok",
                "promptTokensPerSecond": "read tok/s", "tokensPerSecond": "write tok/s"}


def report_text(rows):
    """Rows as a table for people."""
    lines = [REPORT.replace(",}", "}").format(**REPORT_HEADS)]
    for row in rows:
        known = {name: "-" if value is None else value for name, value in row.items()}
        prompt = row["promptTokens"]
        cached = f"{100 * row['cachedTokens'] / prompt:.0f} %" if prompt else "-"
        lines.append(REPORT.format(**{**known, "model": printable(row["model"]), "cached": cached}))
    return "\n".join(lines)


def watch(args, config):
    """--watch URL: print the events of another gateway until a signal.  Returns the exit status."""
    stop = Stop()
    news: queue.Queue[Any] = queue.Queue(1000)
    stream = GatewayStream(watched_address(args.watch), next(iter(config.api_key.values()), None),
                           "0" if args.from_start else None)
    with open_printer(args, live=True) as printer:
        start_thread(stream.run, news.put, stop.wait, name="watch")
        freeze_start_up()
        while not stop.wait(0):
            items = drain(news, 0.1)
            printer.write([item for item in items if isinstance(item, tuple)])
            for item in items:
                if isinstance(item, GatewayError):
                    raise item
                if isinstance(item, str):
                    log.warning(item)
            printer.tick()
    return stop.status


def drain(news, timeout_s):
    """The items of a queue, in order.  Waits for the first."""
    found: list[Any] = []
    with contextlib.suppress(queue.Empty):
        found.append(news.get(timeout=timeout_s))
        while len(found) < 500:
            found.append(news.get_nowait())
    return found


def watched_address(text):
    """The URL of a gateway's stream from an address as people type it.  Raises ConfigError."""
    parts = http_parts(text if "://" in text else f"http://{text}")
    if not parts:
        raise ConfigError(f"--watch {text}: no address of a gateway; use the form http://192.168.1.20:8001")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/debug/stream") else path + "/debug/stream",
                          query="", fragment="")


class GatewayStream:
    """Another gateway's /debug/stream: connects again by itself, and misses nothing."""

    FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0  # before the next try; doubled from one to the other
    SILENCE_S = 40  # a gateway sends a ping every 15 s: without any for so long, the connection is dead

    def __init__(self, address, key, since):
        self._address, self._key = address, key
        self._last = since  # id of the latest event that was handed over
        self._known = False  # a gateway has answered there
        self._pause = self.FIRST_PAUSE_S

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
                problem = connection_problem(error)
                if isinstance(error, ssl.SSLError) and not self._known:
                    return hand_over(GatewayError(f"{self._address.netloc}: {problem}"))
            hand_over(f"{self._address.netloc}: {problem}; trying again in {self._pause:.0f} s")
            if wait(self._pause):
                return None
            self._pause = min(self.LAST_PAUSE_S, self._pause * 2)

    def _listen(self, hand_over):
        """One connection, from request to end.  Raises GatewayError if trying again is of no use."""
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        headers = {"Accept": "text/event-stream", "User-Agent": f"lmgateway/{VERSION}",
                   **({"Last-Event-ID": self._last} if self._last is not None else {}),
                   **({"X-API-Key": self._key} if self._key else {})}
        with contextlib.closing(kind(self._address.hostname, self._address.port,
                                     timeout=self.SILENCE_S)) as connection:
            connection.request("GET", self._address.path, headers=headers)
            answer = connection.getresponse()
            self._check(answer)
            for event_id, event in stream_events(iter(lambda: answer.read1(65536), b"")):
                self._known, self._pause = True, self.FIRST_PAUSE_S
                self._last = event_id
                hand_over((event_id, event))

    def _check(self, answer):
        status, url = answer.status, self._address.geturl()
        if status in (401, 403):
            error = (json_object(answer.read(65536)) or {}).get("error")
            reason = printable(error.get("message", ""))[:200] if isinstance(error, dict) else ""
            problem = ("the key that --api-key (GATEWAY_API_KEY) names is wrong or may not see events there; "
                       "name another" if self._key
                       else "it asks for a key; name one with --api-key KEY (GATEWAY_API_KEY)")
            raise GatewayError(f"{url} answers {status}: {problem}" + (f" ({reason})" if reason else ""))
        if status in (429, 500, 502, 503, 504) or self._known and status != 200:
            raise http.client.HTTPException(f"it answers {status}")
        if status != 200 or not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise ConfigError(f"--watch: what answers at {url} ({status}) is no lmgateway; give the address "
                              "that lmgateway prints when it starts")


def connection_problem(error):
    """Why there is no connection to a gateway, with the remedy if one is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"its certificate is not trusted ({error.verify_message}); name it in the environment "
                "variable SSL_CERT_FILE")
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS ({error_text(error)}); use http://"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without an answer; if it serves TLS, use https://"
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
        self.status = self.signals = 0
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
    """Start-up is over: its objects stay out of later garbage collections, and the memory that compiling
    this file took goes back to the system (glibc would keep it)."""
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
        cleanup.enter_context(LogWriter(log.handlers[0]))
        demo = Demo(cleanup) if args.demo else None
        config = demo.config(config) if demo else find_upstream(config)
        check_exposure(config)
        check_upstream(config)
        context = tls_context(config)
        history = open_history_file(config, cleanup)
        hub = Hub(config.requests_kept, history and history.keep, *((demo.now, demo.clock) if demo else ()))
        upstream = Upstream(config.upstream, config.upstream_token)
        monitor = open_monitor(config, upstream)
        gateway = Gateway(config, hub, upstream, monitor, history)
        if demo:
            demo.furnish(gateway)
        server = gateway.server = open_server(gateway, context)
        if monitor:     # only now: a port in use is said in one line
            start_thread(run_monitor, monitor, hub, stop, name="tail")
        gateway.address = own_url(config, config.host, server.port)
        gateway.lan_urls = [own_url(config, address, server.port) for address in reachable(config)]
        start_thread(server.serve_forever, 0.1, name="accept")
        announce(gateway, server.port, args.demo)
        freeze_start_up()
        if demo:
            start_thread(demo.traffic, page_url(config, server.port), stop.wait, name="demo-traffic")
        if args.open:
            start_thread(open_browser, page_url(config, server.port), name="browser")
        notify("READY=1")
        keep_watchdog(stop, server)
        notify("STOPPING=1")
        grace_s = 0.5 if demo else GRACE_S      # the demo's own are never done
        log.info("Stopping: %d requests are running, they have %.1f s", server.working, grace_s)
        server.shutdown()
        server.finish_requests(grace_s)
    return 0


def open_browser(url):
    """--open: show the dashboard.  Body of a thread: some browsers hold up the program that starts them."""
    import webbrowser

    if not webbrowser.open(url):
        log.warning("no browser was found: open %s yourself", url)


def open_history_file(config, cleanup):
    """The History of --history; None without one.  Raises ConfigError."""
    if not config.history:
        return None
    with naming_history(config):
        history = History(config.history, config.history_days)
    cleanup.callback(history.close)
    return history


def find_upstream(config):
    """The Config with LM Studio's port from its own settings file, if no address was given."""
    if "upstream" in config.sources:
        return config
    with contextlib.suppress(OSError, ValueError):
        port = settings_port(read_settings(find_home()))
        if port:
            return config.but(upstream=f"http://127.0.0.1:{port}")
    return config


def check_exposure(config):
    """Raises ConfigError if the LAN could come in without a key, or a keys file cannot be read."""
    open_key_file(config)
    if not loopback(config.host) and not AccessControl(config).need_key and not config.no_auth:
        raise ConfigError(f"{config.named('host')} listens beyond this machine, and no key "
                          "is set; mint one with --new-key NAME, set GATEWAY_API_KEY, or say --no-auth to "
                          "let everybody in")


def check_upstream(config):
    """Raises ConfigError if the upstream is this gateway itself."""
    parts = urllib.parse.urlsplit(config.upstream)
    if config.port == (parts.port or (443 if parts.scheme == "https" else 80)):
        ours = {"127.0.0.1", "::1", *lan_addresses()} if config.host in ANYWHERE else resolved(config.host)
        if ours & resolved(parts.hostname):
            raise ConfigError(f"{config.named('upstream')} is this gateway's own address; name LM Studio's, "
                              "such as http://127.0.0.1:1234")


def open_monitor(config, upstream=None):
    """The Monitor of LM Studio's log; None when it is switched off."""
    if not config.enable_log_monitoring:
        return None
    files = Follower(log_dir_of(config), started=time.time())
    return Monitor(files if config.log_source == "files" else
                   LogStream(upstream, files, config.log_source == "auto"))


def run_monitor(monitor, hub, stop):
    """Body of the tail thread.  A fault of ours costs the events of one step, not the monitor."""
    while True:
        try:
            return monitor.run(lambda events: hub.publish_log(events, monitor.looked), stop.wait)
        except Exception:  # the end of the line for the thread: it says so and goes on
            log.exception("a fault in lmgateway's log monitor: please report it")
            if stop.wait(1.0):
                return None


def open_server(gateway, context):
    """The Server, bound.  Raises StartError with the remedy."""
    config = gateway.config
    try:
        return Server(gateway, config.host, config.port, context)
    except OSError as error:
        raise StartError(listen_problem(config, error)) from None


def listen_problem(config, error):
    """Why nobody can listen at our address, with the remedy."""
    host, port, url = config.host, config.port, page_url(config, config.port)
    if error.errno != errno.EADDRINUSE:
        return (f"cannot listen on {host}:{port}: {error_text(error)}; choose another address with --host "
                "(GATEWAY_HOST) and --port")
    if is_lmgateway(url):
        return f"lmgateway already runs there: {url}; open that, stop it, or choose another port with --port"
    tell = {"win32": f"netstat -ano | findstr :{port}", "darwin": f"lsof -i :{port}"}.get(
        sys.platform, f"ss -ltnp 'sport = :{port}'")
    return (f"port {port} is in use on {host}; stop the program that has it ({tell} tells which it is), or "
            "choose another with --port (GATEWAY_PORT)")


def is_lmgateway(url):
    """True when the page of an lmgateway answers there within a second."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                         urllib.request.HTTPSHandler(context=context))
    with contextlib.suppress(*BROKEN, ValueError), opener.open(url, timeout=1.0) as page:
        return b"<title>lmgateway" in page.read(4096)
    return False


def tls_context(config):
    """The SSLContext of --tls-cert and --tls-key; None without them.  Raises ConfigError."""
    if not config.tls_cert and not config.tls_key:
        return None
    if not config.tls_cert or not config.tls_key:
        raise ConfigError("--tls-cert (TLS_CERT) and --tls-key (TLS_KEY) go together: name both files")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password=refuse_password)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.named('tls_cert')}, {config.named('tls_key')}: {error_text(error)}; name "
                          "a matching pair of PEM files that can be read, see the README") from None
    return context


def refuse_password():
    raise ValueError("the private key asks for a password; store it without one, readable by this user only")


def own_url(config, host, port):
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if config.tls_cert else ''}://{shown}:{port}"


def page_url(config, port):
    """The URL of the dashboard for a browser of this machine."""
    return own_url(config, "127.0.0.1" if config.host in ANYWHERE else config.host, port)


def announce(gateway, port, demo):
    """Log the facts that a person needs first.  Never a key."""
    config, monitor = gateway.config, gateway.monitor
    here = page_url(config, port)
    base = gateway.lan_urls[0] if gateway.lan_urls else here
    log.info("lmgateway %s on Python %s%s", VERSION, platform.python_version(),
             ", DEMO: LM Studio and all requests are imitated" * demo)
    log.info("Listening on %s", gateway.address)
    if not config.port and not log.isEnabledFor(logging.INFO):
        print(f"Listening on {gateway.address}", file=sys.stderr, flush=True)   # nobody could know it
    log.info("Dashboard: %s/%s", here, " (Ctrl-C ends lmgateway)" * is_terminal(sys.stderr))
    closed = "closed; --host 0.0.0.0 opens it, to those who have a key (--new-key NAME)"
    log.info("On the LAN: %s", ", ".join(gateway.lan_urls) or (
        "no address found" if config.host in ANYWHERE else closed))
    log.info("Base URL for clients: %s/v1 (OpenAI SDKs), %s (Anthropic SDKs)", base, base)
    log.info("Key: %s", "needed" if gateway.access.need_key
             else "none is asked for; clients that insist take any text")
    log.info("LM Studio: %s", config.upstream)
    log.info("Log directory: %s",
             monitor.follower.directory if monitor else "not monitored (ENABLE_LOG_MONITORING=false)")


# --- 9.6 addresses of this machine -------------------------------------------

ANYWHERE = ("", "0.0.0.0", "::")


def reachable(config):
    """The addresses at which others reach this gateway."""
    if loopback(config.host):
        return []
    return lan_addresses() if config.host in ANYWHERE else [config.host]


def lan_addresses():
    """The IPv4 address with which this machine goes out; without a way out, those of its name."""
    found = set()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # kept for documentation (RFC 5737); to connect UDP sends nothing
        found.add(sock.getsockname()[0])
    usable = map(ipaddress.ip_address, sorted(found or resolved(socket.gethostname())))
    return [str(address) for address in usable
            if address.version == 4 and not (address.is_loopback or address.is_unspecified)]


def resolved(host):
    """The addresses of a host's name, empty when it has none."""
    with contextlib.suppress(OSError, UnicodeError):
        return {str(row[4][0]) for row in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return set()


# --- 9.7 services: systemd and launchd ---------------------------------------

ALIVE_S = 5.0  # an accept loop that has not come round for so long hangs


def notify(state, environ=os.environ):
    """Tell systemd a state (sd_notify(3)), if it asked for that."""
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
    """Until a signal: signs of life for as long as the server takes connections.

    Of two signals in a row the kernel may give one to another thread, which does not wake this one: so it
    never sleeps for longer than a second."""
    pause = watchdog_pause(os.environ, os.getpid())
    while not stop.wait(min(pause or 1.0, 1.0)):
        if pause and time.monotonic() - server.ticked < ALIVE_S:
            notify("WATCHDOG=1")


def print_launchd(args, config):
    """--print-launchd: an agent for macOS that runs this file as it was called here (launchd.plist(5)).

    It runs as a module, so that its compiled code is kept (PYTHONPYCACHEPREFIX): half the time to start,
    half the memory."""
    given = [row for row in OPTIONS if row.flag and getattr(args, row.name) is not None]
    secret = [row for row in given if row.variable in SECRET]
    if secret:
        raise ConfigError(f"{secret[0].flag}: a plist is no place for a secret; put {secret[0].variable} "
                          f"into {os.path.join(os.getcwd(), '.env')}, or mint a key with --new-key")
    flags = itertools.chain.from_iterable(
        [row.flag] if row.default is False else [row.flag, getattr(args, row.name)] for row in given)
    library, script = own_home() / "Library", Path(__file__).resolve()
    environ = {"LOG_FILE": config.log_file or str(library / "Logs" / "lmgateway.log"),
               "PYTHONPATH": str(script.parent), "PYTHONSAFEPATH": "1",
               "PYTHONPYCACHEPREFIX": str(library / "Caches" / "lmgateway")}
    agent = {"Label": "lmgateway", "ProgramArguments": [sys.executable, "-m", script.stem, *flags],
             "WorkingDirectory": os.getcwd(), "EnvironmentVariables": environ,
             "RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 10,
             "ProcessType": "Interactive"}  # else launchd holds back its processor time
    sys.stdout.write(plistlib.dumps(agent, sort_keys=False).decode())
    return 0


# --- 9.8 --check -------------------------------------------------------------
# A check is one row of CHECKS: it looks at one thing and yields its findings, (mark, finding, remedy).

SERVER_MENU = "LM Studio: Developer > Server settings"
LOGS_MENU = 'LM Studio: Developer Logs, "..." menu'


class Installation:
    """Everything that several checks look at."""

    def __init__(self, args, environ):
        self.config, self.warnings, self.errors = load_config(vars(args), environ, args.env_file)
        self.env_file, self.home = args.env_file or ".env", find_home()
        self.log_dir = self.config.log_dir or find_log_dir(self.home)
        self.upstream = Upstream(find_upstream(self.config).upstream, self.config.upstream_token)

    @functools.cached_property
    def log(self):
        """(path, stat, Parser of its last 4 MB) of the newest log, None without any.  Raises OSError."""
        logs, parser, most = list_logs(self.log_dir), Parser(), 4_000_000
        if not logs:
            return None
        with open(logs[-1].path, "rb") as file:
            state = os.fstat(file.fileno())
            file.seek(max(0, state.st_size - most))
            parser.feed(file.read(most))
        parser.end()
        return logs[-1].path, state, parser


def refused(error):
    """The finding of an error of ours: its remedy stands behind the last semicolon."""
    finding, _, remedy = str(error).rpartition("; ")
    return "bad", finding or remedy, remedy if finding else "see --help and the README"


def check_python(found):
    yield "ok", (f"Python {platform.python_version()} on {platform.system()} {platform.release()}, "
                 f"lmgateway {VERSION}")


def check_options(found):
    yield from map(refused, found.errors)
    for warning in found.warnings:
        yield "warn", warning, "correct it, or take it away"
    for name, source in found.config.sources.items():
        variable = next(row.variable for row in OPTIONS if row.name == name)
        value = "set" if variable in SECRET else getattr(found.config, name)
        yield "ok", f"{variable}: {value} (from {source})"
    log_file = found.config.log_file
    if log_file and not os.access(os.path.dirname(os.path.abspath(log_file)), os.W_OK):
        yield "bad", f"LOG_FILE {log_file} cannot be written", "name a file in a directory of yours"
    if not found.config.sources and not found.errors:
        yield "ok", "each has its default"


def check_port(found):
    host, port = found.config.host, found.config.port
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            if os.name != "nt":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        yield "ok", f"port {port} of {host} is free" if port else "the system will choose one"
    except OSError as error:
        problem, url = listen_problem(found.config, error), page_url(found.config, port)
        yield ("ok", f"a running lmgateway has it: {url}") if url in problem else refused(problem)


def check_lmstudio(found):
    url, (problem, _, remedy) = found.upstream.base, found.upstream.health().partition(". ")
    settings = find_upstream(Config()).upstream
    if is_lmgateway(url):
        yield ("bad", f"another lmgateway answers at {url}",
               "name LM Studio's own server (http://127.0.0.1:1234, say) with --upstream (LMSTUDIO_BASE_URL)")
    elif not problem:
        yield "ok", f"LM Studio answers at {url}"
    else:
        yield "bad", problem, remedy if settings in (url, Config().upstream) else (
            f"its settings say {settings}: give that to --upstream (LMSTUDIO_BASE_URL). {remedy}")


def check_settings(found):
    path = settings_path(found.home)
    try:
        settings = read_settings(found.home)
    except (OSError, ValueError) as error:
        yield ("warn", f"LM Studio's settings {path} cannot be read: {error_text(error)}",
               "start LM Studio's server once, and run lmgateway as the user who runs LM Studio")
        return
    network = settings.get("networkInterface")
    network = network if isinstance(network, str) else ""
    yield "ok", f"{path}: port {settings_port(settings) or 'not named'}, interface {network or 'not named'}"
    if network and not loopback(network):
        yield ("warn", f"LM Studio itself listens on the network ({network}): requests that go there pass by "
               "this gateway, its keys and figures", f"{SERVER_MENU} > Serve on Local Network: off")
    for name, value, *finding in SETTINGS:
        if settings.get(name) == value and type(settings.get(name)) is type(value):
            yield finding


SETTINGS = (  # (a setting of LM Studio, its value, mark, finding, remedy)
    ("cors", True, "warn", "LM Studio allows every web page to call it (CORS)",
     f"{SERVER_MENU} > Enable CORS: off; name the origins that may call the gateway with --cors-origins"),
    ("fileLoggingMode", "off", "bad", "LM Studio writes no log files: there is nothing to monitor",
     f"{LOGS_MENU} > File Logging Mode: Succinct"),
    ("verbose", False, "warn", "verbose logging is off: no cache, token and speed figures of streams",
     f"{LOGS_MENU} > Verbose Logging: on"),
    ("verbose", True, "ok", "verbose logging is on"),
    ("logSensitiveData", True, "warn", "prompts and answers stand in LM Studio's logs in clear text",
     f"{LOGS_MENU} > Redact Content: on, if others can read this disk (plain requests then have no figures)"),
    ("logSensitiveData", False, "ok", "prompts and answers are redacted in LM Studio's logs"),
    ("logIncomingTokens", True, "warn", "every token is logged: files grow with the square of an answer",
     f"{LOGS_MENU} > Log Incoming Tokens: off"),
)


def check_logs(found):
    if not found.config.enable_log_monitoring:
        yield "warn", "the log monitor is switched off", "ENABLE_LOG_MONITORING=true"
    try:
        yield from check_newest_log(*found.log) if found.log else [(
            "bad", f"no server logs (YYYY-MM/YYYY-MM-DD.N.log) in {found.log_dir}",
            f"{LOGS_MENU} > File Logging Mode: Succinct, and send LM Studio a request")]
    except OSError as error:
        yield ("bad", f"{error.filename}: {error_text(error)}", "start LM Studio's server once; name another "
               "directory with --log-dir (LMSTUDIO_LOG_DIR); run as the user who runs LM Studio")
    if found.config.log_source != "files":
        stream = LogStream(found.upstream, None, False)
        stream.next_news(time.monotonic())
        yield ("warn", stream.problem, "LOG_SOURCE=files, or look at LM Studio") if stream.problem else (
            "ok", "LM Studio gives its log as a stream, too")
    written = newest_write(found.log_dir)
    homes = {found.home, own_home() / ".lmstudio", own_home() / ".cache" / "lm-studio"}
    for other in sorted(map(find_log_dir, homes)):
        if newest_write(other) > written + 3600:
            yield ("warn", f"{other} holds a newer log than {found.log_dir}",
                   f"--log-dir {other} (LMSTUDIO_LOG_DIR)")


def check_newest_log(path, state, parser):
    age_s = max(0, time.time() - state.st_mtime)
    age = f"{age_s / 86400:.0f} days" if age_s >= 2 * 86400 else duration(age_s)
    written = f"{path}: {shown_bytes(state.st_size)}, written {age} ago"
    yield ("ok", written) if age_s <= 86400 else (
        "warn", written, "see that LM Studio's server runs under this user and gets requests")
    if not parser.entries:
        yield "warn", "no log entry in it that lmgateway knows", "send LM Studio a request and look again"
        return
    engines = ", ".join(sorted(name for name in parser.by_engine if name != "App")) or "the app alone"
    yield "ok", f"{parser.entries:,} entries looked at, written by: {engines}"
    if not parser.by_level["DEBUG"]:
        yield ("warn", "no DEBUG lines: no cache, token and speed figures of streams",
               f"{LOGS_MENU} > Verbose Logging: on")
    if parser.unknown > parser.lines / 10:
        yield ("warn", f"{parser.unknown:,} of {parser.lines:,} lines have a wording that is not known here",
               "look for a newer lmgateway; /debug/status shows samples")


def check_room(found):
    facts = LogVolume(found.log_dir, found.config.log_dir_warn).facts()
    if facts["directoryBytes"] is not None:
        taken, growth, free = ("unknown" if facts[name] is None else shown_bytes(facts[name])
                               for name in ("directoryBytes", "growthBytesPerDay", "freeBytes"))
        yield "ok", f"logs take {taken}, grow by {growth} a day; {free} are free on that disk"
    for warning in facts["warnings"]:
        yield "warn", *warning.split(": ", 1)


def check_keys(found):
    config, path = found.config, keys_path(found.config)
    rows = [*(f"{key.name} ({', '.join(sorted(key.rights))})" for key in open_key_file(config)[1]),
            *(f"{name} (all rights)" for name in config.api_key)]
    needed = AccessControl(config).need_key
    if needed and not rows:
        yield ("warn", f"a key is asked for, and there is none: all of {path} were revoked",
               "mint one with --new-key NAME, or remove that file")
    else:
        yield "ok", f"keys: {', '.join(rows)}" if rows else "no keys: none is asked for"
    for file in (path, found.env_file):
        if os.name != "nt" and os.path.exists(file) and os.stat(file).st_mode & 0o044:
            yield "warn", f"{file} can be read by other users of this machine", f"chmod 600 {file}"
    check_exposure(config)
    if not needed and not loopback(config.host):
        yield ("warn", f"{config.host} is open to the network, and no key is asked for",
               "mint one with --new-key NAME")


def check_network(found):
    config = found.config
    encrypted, urls = tls_context(config), [own_url(config, host, config.port) for host in reachable(config)]
    if loopback(config.host):
        yield "ok", f"{config.host}: only this machine can connect"
        return
    firewall = {"Windows": "lmgateway.ps1 -OpenFirewall",
                "Darwin": "System Settings > Network > Firewall: allow Python"}.get(
        platform.system(), f"let the port through the firewall (sudo ufw allow {config.port}/tcp)")
    yield ("ok", f"others reach it at {', '.join(urls)}" if urls else "no LAN address found",
           f"if they do not: {firewall}")
    if not encrypted:
        yield ("warn", "keys and prompts pass over the LAN in clear text",
               "--tls-cert and --tls-key (see the README)")


def check_clock(found):
    yield "ok", f"{time.strftime('%Y-%m-%d %H:%M:%S')}, time zone {time.strftime('%Z %z')}"
    with contextlib.suppress(OSError):      # another check has said so
        if found.log and found.log[2].last_moment:
            _, state, parser = found.log
            if abs(parser.last_moment.epoch - state.st_mtime) > 900:
                yield ("warn", f"the newest log's last entry says {parser.last_moment.utc}, its file "
                       f"{utc_text(state.st_mtime)}",
                       "give lmgateway LM Studio's time zone (environment variable TZ), or set the clock")


CHECKS: dict[str, Callable[[Installation], Iterator]] = {
    "Python": check_python, "Options": check_options, "Port": check_port, "LM Studio": check_lmstudio,
    "Settings": check_settings, "Logs": check_logs, "Room": check_room, "Keys": check_keys,
    "Network": check_network, "Clock": check_clock}


def run_checks(args, config=None):
    """--check: every finding in one line; 1 when something is bad, else 0.  A broken machine is no fault."""
    installation = Installation(args, os.environ)
    found = [(name, mark, finding, *(remedy or [""])) for name, check in CHECKS.items()
             for mark, finding, *remedy in findings_of(check, installation)]
    failed = any(mark == "bad" for _, mark, _, _ in found)
    if args.json:
        rows = [dict(zip(("check", "mark", "what", "remedy"), row)) for row in found]
        print(json.dumps({"status": "bad" if failed else "ok", "version": VERSION, "findings": rows}))
        return int(failed)
    colours = {"ok": GREEN, "warn": YELLOW, "bad": RED}
    coloured = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    for name, mark, finding, remedy in found:
        shown = f"\x1b[{colours[mark]}m{mark:4}\x1b[0m" if coloured else f"{mark:4}"
        print(f"{shown}  {name:9}  " + printable(finding + (f"  ->  {remedy}" if remedy else "")))
    return int(failed)


def findings_of(check, installation):
    """A check's findings; a check that fails is a finding, too."""
    found = []
    try:
        found.extend(check(installation))
    except GatewayError as error:
        found.append(refused(error))
    except Exception as error:  # the end of the line: --check is for broken machines
        found.append(("bad", f"this check failed: {type(error).__name__}: {error}", "please report it"))
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
        fate = "removed" if args.yes else "would go"
        try:
            if args.yes:
                os.remove(log_file.path)
            total += size
        except OSError as error:
            fate, failed = f"kept, {error_text(error)}", failed + 1
        print(f"{fate}  {shown_bytes(size):>9}  {log_file.path}")
    count = f"{len(old) - failed} file{'s' * (len(old) - failed != 1)}, {shown_bytes(total)}"
    print(f"removed {count}" if args.yes else f"{count} older than {args.prune} days in {directory}"
          + ("; add --yes to remove them" if old else "; nothing to do"))
    return int(failed > 0)


def old_logs(directory, days, today):
    """[(LogFile, bytes)] of the logs that are, by their names, more than so many days old.

    Never the newest.  Only plain files in plain directories, with names of server logs.  Raises OSError if
    the directory cannot be listed."""
    first_kept = (today - datetime.timedelta(days=days)).isoformat()
    old = [(log_file, os.lstat(log_file.path)) for log_file in list_logs(directory)[:-1]
           if log_file.day < first_kept and log_file.day[:7] == log_file.month
           and not os.path.islink(os.path.dirname(log_file.path))]
    return [(log_file, state.st_size) for log_file, state in old if stat.S_ISREG(state.st_mode)]


# --- 9.10 main ---------------------------------------------------------------


class Command(NamedTuple):
    """One command.  run takes (args, config) and gives the exit status."""

    name: str  # of its flag, with _ for -
    run: Callable[[Any, Any], int]
    about: str
    value: str | None = None  # of its flag
    companions: tuple = ()  # flags that go with it
    paths: bool = False


COMMANDS = (
    Command("tail_only", tail_only, "print this machine's events; PATH ...: replay saved logs, - is "
            "standard input", companions=("json", "events", "from_start"), paths=True),
    Command("watch", watch, "print the events of a gateway elsewhere", "URL",
            ("json", "events", "from_start")),
    Command("report", report, "usage by day and model, of --history FILE or of saved logs (PATH)",
            companions=("json",), paths=True),
    Command("demo", serve, "try it all, beside a built-in imitation of LM Studio", companions=("open",)),
    Command("check", run_checks, "look for what commonly goes wrong, and say the remedy",
            companions=("json",)),
    Command("prune", prune, "show which of LM Studio's logs are older; --yes removes them", "DAYS", ("yes",)),
    Command("new_key", new_key, "mint a key; --rights [infer], --limits, --priority, --models, --expires",
            "NAME", tuple(TERMS)),
    Command("set_key", set_key, "change what it may, by the same flags", "NAME", tuple(TERMS)),
    Command("list_keys", list_keys, "minted keys: rights, limits, dates; with --history the last use"),
    Command("revoke_key", revoke_key, "take a minted key away", "NAME"),
    Command("print_launchd", print_launchd, "a launchd agent for macOS; see the README"),
)
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
    one_command = commands.add_mutually_exclusive_group()
    for command in COMMANDS:
        kind: dict[str, Any] = {"metavar": command.value} if command.value else {"action": "store_true"}
        one_command.add_argument(flag_of(command.name), help=command.about, **kind)
    commands.add_argument("--yes", action="store_true", help=argparse.SUPPRESS)
    for name in TERMS:
        commands.add_argument(flag_of(name), help=argparse.SUPPRESS)
    commands.add_argument("--help", "-h", action="help", help="show this and exit")
    commands.add_argument("--version", action="version", version=f"lmgateway {VERSION}",
                          help="show the version and exit")
    commands.add_argument("paths", nargs="*", metavar="PATH", help=argparse.SUPPRESS)
    printing = parser.add_argument_group("Printing (--tail-only, --watch; --report, --check: --json)")
    printing.add_argument("--json", action="store_true", help="one JSON object a line")
    printing.add_argument("--events", metavar="LIST",
                          help="only these events, comma-separated; -NAME leaves one out")
    printing.add_argument("--from-start", action="store_true",
                          help="begin at the start of the newest file, not at its end")
    add_options(parser)
    return parser


def add_options(parser):
    """A flag for each row of OPTIONS that has one, under a heading."""
    for heading, rows in (("Gateway", GATEWAY_OPTIONS), ("Access", ACCESS_OPTIONS), ("Logs", LOG_OPTIONS)):
        group = parser.add_argument_group(heading)
        for row in rows:
            if row.flag:
                kind = {"metavar": row.value} if row.value else {"action": "store_const", "const": "true"}
                default = "" if row.default in (None, False, (), {}) else f" [{shown_default(row)}]"
                group.add_argument(row.flag, dest=row.name, help=row.about + default, **kind)
        if heading == "Gateway":
            group.add_argument("--open", action="store_true", help="open the dashboard in the browser")
            group.add_argument("--env-file", metavar="FILE", help="read options from FILE [.env]")


def readme_tables():
    """The tables that the README takes from this file: .ci/readme writes them, a test compares them."""
    options = [[f"`{row.variable}`", row.flag and f"`{row.flag}`" or "", f"`{shown_default(row)}`", row.about]
               for row in OPTIONS]
    routes = [[f"`{row.method} {row.path.replace('*', 'ID')}`", row.access, row.about] for row in ROUTES]
    events = [[f"`{name}`", row.about] for name, row in EVENTS.items()]
    return ["\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
                       *(f"| {' | '.join(row)} |" for row in rows)])
            for heads, rows in ((("variable", "flag", "default", "meaning"), options),
                                (("route", "needs", "answer"),
                                 [*routes, ["every other", FORWARD.access, FORWARD.about]]),
                                (("event", "says"), events))]


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser that raises a ConfigError with a remedy."""

    def parse_args(self, args=None, namespace=None):
        """As ArgumentParser does; `--events -a,b` is as good as `--events=-a,b`."""
        given = list(sys.argv[1:] if args is None else args)
        for place in range(len(given) - 1, 0, -1):
            if given[place - 1] == "--events" and re.match(r"-[a-z]", given[place]):
                given[place - 1:place + 1] = [f"--events={given[place]}"]
        return super().parse_args(given, namespace)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            message = (f"{unknown[1]} is not a known option"
                       + nearest(unknown[1].partition("=")[0], self._option_string_actions))
        raise ConfigError(message if message.endswith("?") else f"{message}; see --help")


def chosen_command(args):
    """The Command that args name, None for the gateway.  Raises ConfigError for flags that do not go
    together, and for a value that cannot be used."""
    chosen = next((command for command in COMMANDS if getattr(args, command.name) not in (None, False)), None)
    if args.paths and not (chosen and chosen.paths):
        meant = nearest(args.paths[0], [flag_of(command.name) for command in COMMANDS])[2:]
        raise ConfigError(f"{args.paths[0]}: " + (
            meant or "a path goes with --tail-only or --report; see --help"))
    for name in dict.fromkeys(name for command in COMMANDS for name in command.companions):
        hosts = [command for command in COMMANDS if name in command.companions]
        if getattr(args, name) not in (None, False) and chosen not in hosts and (chosen or name != "open"):
            others = [flag_of(command.name) for command in hosts] + ["no command"] * (name == "open")
            raise ConfigError(f"{flag_of(name)} goes with {' or '.join(others)}")
    if args.prune is not None and not re.fullmatch(r"[1-9]\d{0,4}", args.prune):
        raise ConfigError(f"--prune {args.prune}: use a number of days from 1")
    if args.events is not None and not words(args.events):
        raise ConfigError("--events: name the events to print, comma-separated; see the README")
    for name in words(args.events or ""):
        if re.sub("^-", "", name) not in EVENTS:
            raise ConfigError(f"--events: {name} is not an event"
                              + (nearest(name, EVENTS) or "; see the README"))
    return chosen


def main(argv=None):
    """Run a command.  Returns its exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    lenient_streams()
    try:
        args = build_parser().parse_args(argv)
        command = chosen_command(args)
        if args.check:
            return run_checks(args)     # before anything that can be wrong
        config, warnings, errors = load_config(vars(args), os.environ, args.env_file)
        if errors:
            raise ConfigError(errors[0])
        set_up_logging(config)
        for warning in warnings:
            log.warning(warning)
        return (command.run if command else serve)(args, config)
    except GatewayError as error:
        print(f"lmgateway: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        return closed_pipe()
    except OSError as error:    # above all a full disk
        closed_pipe()
        print(f"lmgateway: {error.filename or 'standard output'}: {error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# === 10. DASHBOARD ===========================================================
# One complete HTML document, served as it is.  Raw, so that JavaScript keeps its backslashes;
# never formatted, so that CSS and JavaScript keep their braces.

DASHBOARD = rb"""<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lmgateway</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
%3E%3Cpath fill='%23F0B429' d='M2 2h4v12H2z'/%3E%3Cpath fill='%235CB8F2' d='M8 6h6v8H8z'/%3E%3C/svg%3E">
<style>
/* Colours.  Amber is the prompt being read, blue the answer being written, green what was cached; a test
   computes the contrast. */
:root {
  color-scheme: light;
  --page: #F6F7F9; --panel: #FFFFFF; --line: #DDE1E7; --track: #E2E6EC;
  --text: #1A1F26; --muted: #5A6472; --queued: #6B7280; --prefill: #9A6200; --decode: #0067A8;
  --cached: #00775A; --ok: #1B7F3B; --warn: #8A5A00; --error: #B3261E; --focus: #0B57D0;
  --fill-prefill: #CE7C00; --fill-decode: #2F8FD0; --fill-cached: #23987A;
  --tone-0: #5B5BD6; --tone-1: #A0448F; --tone-2: #00778A; --tone-3: #A5541B; --tone-4: #5C7A12;
  --tone-5: #6B7280;
}
:root[data-theme="dark"] {
  color-scheme: dark;
  --page: #0F1216; --panel: #171B21; --line: #2A313B; --track: #2A323C;
  --text: #E6E9EE; --muted: #9AA5B4; --queued: #8B95A5; --prefill: #F0B429; --decode: #5CB8F2;
  --cached: #3CCB9B; --ok: #5FD38A; --warn: #F5C451; --error: #FF8A80; --focus: #8AB4F8;
  --fill-prefill: #F0B429; --fill-decode: #5CB8F2; --fill-cached: #3CCB9B;
  --tone-0: #9C9CF5; --tone-1: #E08FD0; --tone-2: #4FC3D9; --tone-3: #E8A06A; --tone-4: #B2CC5F;
  --tone-5: #9AA5B4;
}
@media (prefers-contrast: more) {
  :root, :root[data-theme="dark"] { --line: var(--muted); --muted: var(--text); }
}
/* The page */
* { box-sizing: border-box; } html { font-size: 87.5%; scroll-padding-top: 6.5rem; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1, h2, h3, p, dl, dd, ol, ul, figure { margin: 0; padding: 0; } ol, ul { list-style: none; } h2 { font-size: 1.15rem; font-weight: 650; } h3 { font-size: 1rem; font-weight: 600; }
a { color: var(--decode); }
code, pre, .mono { font: .857rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.muted { color: var(--muted); font-weight: 400; } .small { font-size: .857rem; }
.isolate { unicode-bidi: isolate; } .strong { font-weight: 600; } [hidden], .own { display: none !important; }
.unseen { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; z-index: 9; padding: .5rem 1rem; background: var(--panel); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
svg.mark { width: .95em; height: .95em; flex: none; fill: currentColor; vertical-align: -.1em; }
/* A meaning: ink for its words and marks, fill for its areas. */
.ok { --ink: var(--ok); } .warn { --ink: var(--warn); } .error { --ink: var(--error); --fill: var(--error); }
.queued { --ink: var(--queued); --fill: var(--queued); } .prefill { --ink: var(--prefill); --fill: var(--fill-prefill); }
.decode { --ink: var(--decode); --fill: var(--fill-decode); } .cached { --ink: var(--cached); --fill: var(--fill-cached); }
.rest { --fill: var(--track); } .tone-0 { --ink: var(--tone-0); } .tone-1 { --ink: var(--tone-1); } .tone-2 { --ink: var(--tone-2); }
.tone-3 { --ink: var(--tone-3); } .tone-4 { --ink: var(--tone-4); } .tone-5 { --ink: var(--tone-5); }
:is(.ok, .warn, .error, .queued, .prefill, .decode, .cached, [class*="tone-"]) { color: var(--ink); }
.swatch, .bar i, .fall .track i { background: var(--fill, currentColor); } rect { fill: var(--fill); }
/* Things in a row */
.head, .row, .toolbar, .states, .states li, .legend, .legend li, .details, .tools, .range, .models, .tiles, .copy, .left, .name, .banner,
.login div, .drawer-head, .top h1, .top > div, .top nav { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .5rem; }
.head, .left, .name, .banner { align-items: baseline; } .top h1, .states li, .range, .left { white-space: nowrap; } .top h1, .states li, .range, .left, .name { flex-wrap: nowrap; }
button, select, input { font: inherit; color: inherit; }
button, select, input[type="search"], input[type="password"] { min-height: 2rem; padding: .15rem .65rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
button { cursor: pointer; white-space: nowrap; } button:hover, select:hover { border-color: var(--muted); }
button[aria-pressed="true"] { border-color: var(--text); box-shadow: inset 0 0 0 1px var(--text); }
button.plain { min-height: 0; padding: 0; border: 0; background: none; color: inherit; text-align: inherit; white-space: inherit; }
button.plain:hover { text-decoration: underline; }
button.dark { background: var(--text); border-color: var(--text); color: var(--panel); }
button.quiet { min-height: 1.75rem; padding: .05rem .55rem; font-size: .857rem; }
button:disabled { opacity: .5; cursor: default; } input[type="search"] { width: 15rem; max-width: 100%; }
/* Header */
.top { position: sticky; top: 0; z-index: 5; background: var(--panel); border-bottom: 1px solid var(--line); }
.top > div, .top nav, .states { column-gap: 1.25rem; } .top h1 { font-size: 1.15rem; font-weight: 650; } .top h1 small { font-size: .857rem; }
.top > div, .top nav { min-height: 46px; max-width: 120rem; margin: 0 auto; padding: 0 1.5rem; }
.top nav { min-height: 38px; padding-bottom: .35rem; }
.demo { padding: 0 .5rem; border-radius: 4px; background: var(--text); color: var(--panel); font-size: .857rem; }
.top nav a { color: var(--muted); text-decoration: none; padding: .2rem 0; }
.top nav a:hover { color: var(--text); text-decoration: underline; }
.states, .push, .range, .left { margin-left: auto; } .range { gap: 0; }
.range button { min-height: 1.85rem; border-radius: 0; margin-left: -1px; font-size: .93rem; }
.range button:first-child { border-radius: 6px 0 0 6px; }
.range button:last-child { border-radius: 0 6px 6px 0; }
.banner { flex-wrap: nowrap; max-width: 120rem; margin: 0 auto; padding: .55rem 1.5rem; border-bottom: 1px solid var(--line); background: var(--panel); }
.banner.dead { max-width: none; background: #B3261E; color: #FFFFFF; font-weight: 600; }
main { max-width: 120rem; margin: 0 auto; padding: 1.1rem 1.5rem 4rem; display: grid; gap: 1.5rem;
  grid-template-columns: minmax(0, 1fr); }
.column { display: contents; }
.head { column-gap: .75rem; margin-bottom: .6rem; }
.box { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
.empty { padding: 1.5rem 1rem; color: var(--muted); } body.dead #now, body.dead #models, #models.away { opacity: .55; }
/* Models */
.models, .tiles { gap: .6rem; align-items: stretch; }
.models > li { flex: 1 1 19rem; max-width: 36rem; padding: .6rem .9rem; }
.models .row { flex-wrap: nowrap; min-height: 2rem; } .models h3 { overflow-wrap: anywhere; } .models button { flex: none; }
.models > li.rest { flex: 0 1 auto; max-width: none; } .models summary { cursor: pointer; line-height: 2rem; }
/* Now: how long still is the largest thing on the page */
.cards { display: grid; gap: .75rem; }
.card { display: grid; gap: .6rem; padding: .8rem 1.1rem .85rem; border-left: 5px solid var(--fill, var(--line)); color: var(--text); }
.row { justify-content: space-between; column-gap: 1.25rem; } .row > * { min-width: 0; } .card h3 { font-size: 1.3rem; line-height: 1.25; overflow-wrap: anywhere; }
.left strong { font-size: 2.4rem; line-height: 1.05; font-weight: 650; letter-spacing: -.01em; }
.bar { display: flex; height: 22px; border-radius: 5px; background: var(--track); overflow: hidden; gap: 1px; }
.bar i { flex: 0 1 0; min-width: 0; } .legend, .details { column-gap: 1.2rem; } .legend { color: var(--muted); font-size: .93rem; }
.swatch { display: inline-block; flex: none; width: .75em; height: .75em; border-radius: 2px; }
.details .speed { font-weight: 600; } .details :empty { display: none; }
.lines li { display: grid; grid-template-columns: 1rem minmax(0, 1fr) auto; align-items: center; gap: .9rem;
  padding: .4rem 1.1rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.lines li:first-child { border-top: 0; }
.lines + .lines, .cards + .lines, .lines + .cards { margin-top: .75rem; } .lines:empty { display: none; }
/* First run and login */
.guide { padding: 1.25rem 1.5rem 1.5rem; display: grid; gap: 1rem; } .guide h3 { font-size: 1.3rem; }
.copy { align-items: stretch; flex-wrap: nowrap; max-width: 62rem; }
.copy code { flex: 1; min-width: 0; padding: .45rem .7rem; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.checks li { display: grid; grid-template-columns: 1.2rem minmax(0, 1fr); gap: .1rem .5rem; padding: .2rem 0; }
.checks p { grid-column: 2; }
.login { width: min(34rem, 100%); justify-self: center; padding: 1.25rem 1.5rem 1.5rem; display: grid; gap: .8rem; }
.login input { flex: 1; min-width: 12rem; }
/* Figures */
.tile { flex: 1 1 10.4rem; padding: .65rem .75rem; min-height: 6.2rem; } .tile dt, .tile .note { color: var(--muted); }
.tile .figure { font-size: 1.6rem; font-weight: 600; line-height: 1.35; }
.tile .figure small { font-size: .93rem; font-weight: 400; color: var(--muted); }
.tile .note { font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem; margin-top: .75rem; }
.chart { padding: .7rem 1rem .6rem; min-width: 0; } .chart .head { margin-bottom: .25rem; min-height: 2rem; }
.chart figcaption { display: contents; } .plots { min-height: 236px; }
.plots svg { display: block; width: 100%; } .plots text { fill: var(--muted); font-size: 11px; }
.plots line { stroke: var(--line); }
.none { display: grid; place-items: center; min-height: 236px; color: var(--muted); }
.plots circle { fill: currentColor; }
.plots path { fill: none; stroke: currentColor; stroke-width: 1.75; }
.plots path.band { fill: currentColor; stroke: none; opacity: .16; }
.twin { max-height: 260px; overflow: auto; } .wide { overflow-x: auto; }
.people td:first-child { white-space: normal; overflow-wrap: anywhere; width: 30%; min-width: 6.8rem; } .people .bar { height: 8px; margin: .2rem 0; }
.people table { font-size: .93rem; } .people th, .people td { padding: .3rem .25rem; }
/* Tables */
table { border-collapse: collapse; width: 100%; }
th, td { padding: .32rem .55rem; text-align: left; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; color: var(--muted); font-size: .857rem; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); } tbody tr:last-child td { border-bottom: 0; }
.num { text-align: right; }
#table td.c-who, #table td.c-model { white-space: normal; overflow-wrap: anywhere; min-width: 6.6rem; }
#table td.c-model { min-width: 9.3rem; }
#table th { white-space: normal; vertical-align: bottom; position: sticky; top: 85px; z-index: 2; background: var(--panel); }
#table tbody tr { cursor: pointer; }
#table tbody tr:hover, #table tbody tr:focus-visible { background: var(--page); }
#table tbody tr:focus-visible { outline-offset: -2px; } th button.plain { font-weight: 600; }
th[aria-sort="ascending"] button::after { content: " \2191"; }
th[aria-sort="descending"] button::after { content: " \2193"; }
.toolbar { row-gap: .4rem; margin-bottom: .6rem; }
.toolbar select { max-width: 15rem; }
.newer { position: sticky; top: 94px; z-index: 3; display: flex; justify-content: center; height: 0; }
.newer button, #log-newer { height: 2rem; background: var(--text); color: var(--panel); border-color: var(--text);
  border-radius: 1rem; }
.more { padding: .6rem; text-align: center; border-top: 1px solid var(--line); }
/* Event log */
.log-box { position: relative; }
#log-lines { height: 24rem; overflow: auto; padding: .4rem 0; overflow-anchor: none; overscroll-behavior: contain; }
#log-lines:empty { height: 5rem; } #log-lines li { display: grid; grid-template-columns: 5rem 1.2rem minmax(0, 1fr); gap: 0 .5rem; padding: .08rem .9rem; }
#log-lines li[data-id] { cursor: pointer; } #log-lines li[data-id]:hover { background: var(--page); }
#log-lines li > :last-child { overflow-wrap: anywhere; white-space: pre-wrap; }
#log-lines li.raw > :last-child { font: .857rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace;
  color: var(--muted); max-height: 9em; overflow: hidden; }
#log-lines li.cut { display: block; text-align: center; color: var(--warn); }
#log-newer { position: absolute; right: 1.25rem; bottom: .8rem; }
/* Facts, dialogs */
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 0 2rem; padding: .6rem 1rem; }
.facts > div { display: grid; grid-template-columns: 8rem minmax(0, 1fr); gap: .75rem; padding: .25rem 0; }
.facts dt { color: var(--muted); } .facts dd { overflow-wrap: anywhere; }
.facts .whole { grid-column: 1 / -1; }
dialog { color: inherit; background: var(--panel); border: 1px solid var(--line); padding: 0; }
dialog::backdrop { background: rgba(10, 14, 20, .35); }
dialog.drawer { width: min(50rem, 100vw); max-width: none; height: 100vh; max-height: none; margin: 0 0 0 auto;
  border-width: 0 0 0 1px; overflow: auto; overscroll-behavior: contain; }
dialog.help { border-radius: 8px; max-width: 34rem; padding: 1.25rem 1.5rem; }
.drawer-head { position: sticky; top: 0; min-height: 48px; padding: .5rem 1.25rem; background: var(--panel); border-bottom: 1px solid var(--line); z-index: 1; }
.drawer-body { padding: 1rem 1.25rem 3rem; display: grid; gap: 1.4rem; grid-template-columns: minmax(0, 1fr); }
.drawer-body h3 { margin-bottom: .4rem; } .drawer-body .facts { padding: 0; }
.fall { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: .3rem .9rem;
  align-items: center; }
.fall .track { position: relative; height: 14px; background: var(--track); border-radius: 4px; }
.fall .track i { position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 3px; }
.fall .ticks { background: none; border-top: 1px solid var(--line); border-radius: 0; }
.fall .ticks i { width: 1px; min-width: 1px; bottom: 5px; background: var(--muted); }
.timeline td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.timeline td:nth-child(-n+2) { white-space: nowrap; }
kbd { font: inherit; border: 1px solid var(--line); border-radius: 4px; padding: 0 .4rem; }
.keys { display: grid; grid-template-columns: 5rem 1fr; gap: .4rem; margin: .8rem 0; }
footer { padding: 0 1.5rem 2rem; text-align: center; color: var(--muted); }
/* Two columns on a wide screen; cards for rows on a narrow one */
@media (min-width: 1600px) {
  main { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } main > .all { grid-column: 1 / -1; }
  .column { display: grid; gap: 1.5rem; align-content: start; min-width: 0; }
  #table .c-prefill, #table .c-queue, #table .c-path { display: none; } .tile { flex-basis: 21%; }
}
@media (max-width: 1599px) { #login, #models, #now { order: -2; } #figures { order: -1; } }
@media (max-width: 1120px) { #table .c-queue, #table .c-path { display: none; } }
@media (max-width: 960px) {
  .charts { grid-template-columns: minmax(0, 1fr); } #table, #table tbody { display: block; }
  #table thead, #table .c-prefill, #table .c-cached, #table .c-output { display: none; }
  #table tr { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .1rem .75rem;
    padding: .55rem .8rem; border-bottom: 1px solid var(--line); }
  #table td, #table td.c-who, #table td.c-model { padding: 0; border: 0; text-align: left; white-space: normal;
    min-width: 0; overflow-wrap: anywhere; }
  #table .c-model { color: var(--muted); }
  #table td[data-label]::before, .people td[data-label]::before { display: block; color: var(--muted); font-size: .857rem; }
  #table td[data-label]::before { content: attr(data-label); }
}
@media (max-width: 640px) {
  html { scroll-padding-top: 7rem; } .top { position: static; } .top > div, .top nav { padding: .3rem 1rem; }
  .top nav { position: sticky; top: 0; gap: 0 .9rem; min-height: 0; } .top h1 small { display: none; }
  .states { order: 3; width: 100%; margin: 0; gap: 0 .8rem; font-size: .93rem; } .tools { margin-left: auto; }
  .range { width: 100%; } .range button { flex: 1; padding: .15rem .2rem; } .banner { padding: .5rem 1rem; }
  main { padding: 1rem 1rem 3rem; } .left strong { font-size: 2.1rem; } .left { margin-left: 0; }
  .tile { flex-basis: 40%; }
  #table tr { column-gap: .4rem; } #table .c-status { grid-column: span 3; }
  #table .c-who, #table td.c-model { grid-column: span 2; }
  .people table, .people tbody { display: block; } .people thead { display: none; }
  .people tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(4.2rem, 1fr)); border-bottom: 1px solid var(--line); }
  .people td { border: 0; text-align: left; } .people td:first-child { grid-column: 1 / -1; width: auto; }
  .people td[data-label]::before { content: attr(data-label); }
  #log-lines li { grid-template-columns: 4.9rem 1rem minmax(0, 1fr); padding: .15rem .6rem; }
  .facts, .drawer-body .facts { grid-template-columns: minmax(0, 1fr); }
  .facts > div { grid-template-columns: 7.5rem minmax(0, 1fr); } .copy { flex-wrap: wrap; }
  .copy code { flex-basis: 100%; } .toolbar select { max-width: 100%; flex: 1 1 40%; }
  input[type="search"] { width: 100%; } input, select, textarea { font-size: 16px; } .newer { top: 8px; }
}
@media (pointer: coarse) {
  button, select, input[type="search"], input[type="password"], button.quiet, .range button { min-height: 44px; }
  button.plain { min-height: 32px; }
}
@media (forced-colors: active) {
  .card { border-left-width: 7px; } .bar { border: 1px solid CanvasText; }
  .bar i, .fall .track i, .swatch, .plots rect { forced-color-adjust: none; }
  button[aria-pressed="true"] { border: 2px solid Highlight; }
}
@media print {
  .top { position: static; }
  button:not(.plain), .toolbar, .skip, nav, dialog, #log-lines li:nth-last-child(n + 41) { display: none !important; }
  #log-lines { height: auto; } #table th { position: static; }
  .box { break-inside: avoid; }
}
</style>
<script>
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
  <symbol id="mark-prefill" viewBox="0 0 16 16"><path d="M2 1h12v2H2zm0 4h12v2H2zm0 4h8v2H2zm0 4h5v2H2z"/></symbol>
  <symbol id="mark-decode" viewBox="0 0 16 16"><path d="M11.5 0L16 4.5 5.5 15 0 16l1-5.5z"/></symbol>
</svg>

<header class="top">
  <div>
    <h1><svg class="mark" viewBox="0 0 16 16" aria-hidden="true"><path fill="#CE7C00" d="M1 1h6v14H1z"/><path
      fill="#2F8FD0" d="M9 6h6v9H9z"/></svg>lmgateway <small class="muted" id="host"></small>
      <b class="demo" id="demo" hidden>DEMO</b></h1>
    <ul class="states" aria-label="State">
      <li id="state-lmstudio"></li><li id="state-log"></li><li id="state-link"></li>
    </ul>
    <div class="tools">
      <span class="isolate strong" id="me" hidden></span>
      <button type="button" id="logout" hidden>Log out</button>
      <button type="button" id="theme" title="Colours: as the system has them, light or dark">&#9680; Auto</button>
    </div>
  </div>
  <nav id="panels" aria-label="Panels">
    <a href="#now">Now</a><a href="#figures" class="view">Figures</a><a href="#requests">Requests</a>
    <a href="#log" class="view">Log</a><a href="#server" class="view">Server</a>
    <div class="range view" id="range" role="group" aria-label="Time range"></div>
  </nav>
</header>
<p class="banner dead" id="dead" role="alert" hidden></p>
<div id="banners"></div>
<p class="unseen" role="status" aria-live="polite" id="live"></p>
<noscript><p class="banner">This page needs JavaScript.  The same figures as JSON: /debug/status and
  /debug/requests.</p></noscript>

<main id="main">
  <form class="box login all" id="login" action="/login" method="post" hidden>
    <h2>This gateway asks for a key</h2>
    <p class="muted" id="login-why">The key that your clients use. It is sent once, answered with a cookie, and not
      kept on this page.</p>
    <div><label class="unseen" for="key">Key</label>
      <input type="password" id="key" name="key" placeholder="Key" autocomplete="current-password" required>
      <button class="dark">Log in</button></div>
    <p class="error" id="login-error" role="alert" hidden></p>
  </form>

  <section id="models" class="all view" aria-labelledby="models-title" hidden>
    <h2 class="unseen" id="models-title">Models</h2><ul class="models" id="model-list"></ul></section>

  <div class="column">
  <section id="now" aria-labelledby="now-title">
    <div class="head"><h2 id="now-title">Now</h2><p class="muted" id="now-note"></p>
      <button type="button" class="quiet push" id="notify" aria-pressed="false" hidden>Tell me when a long one is
        answered</button>
      <button type="button" class="quiet" id="pause" aria-pressed="false"
        title="Stop painting; nothing is lost (p)">Pause</button></div>
    <div id="first-run" class="box guide" hidden></div>
    <div class="cards" id="cards"></div>
    <ol class="box lines" id="queue" aria-label="Waiting"></ol>
    <ol class="box lines small" id="ended" aria-label="Just ended"></ol>
  </section>

  <section id="requests" aria-labelledby="requests-title">
    <div class="head"><h2 id="requests-title">Requests</h2><p class="muted" id="requests-note"></p></div>
    <div class="toolbar" role="group" aria-label="Filter requests">
      <label class="unseen" for="filter">Text</label>
      <input type="search" id="filter" placeholder="Filter by text ( / )" autocomplete="off" spellcheck="false">
      <label class="unseen" for="by-status">Outcome</label><select id="by-status"></select>
      <label class="unseen" for="by-who">Who</label><select id="by-who"></select>
      <label class="unseen" for="by-model">Model</label><select id="by-model"></select>
      <button type="button" id="clear" hidden>Clear</button>
    </div>
    <div class="newer" id="newer" hidden><button type="button"></button></div>
    <div class="box"><table id="table" aria-labelledby="requests-title">
      <thead><tr id="table-head"></tr></thead>
      <tbody id="rows"></tbody></table>
      <p class="empty" id="rows-empty" hidden></p>
      <p class="more" id="rows-more" hidden><button type="button">Show more</button></p></div>
  </section>
  </div>

  <div class="column">
  <section id="figures" class="view" aria-labelledby="figures-title">
    <div class="head"><h2 id="figures-title">Figures</h2><p class="muted" id="figures-note"></p>
      <a id="csv" class="small push" download hidden>Usage as CSV</a></div>
    <dl class="tiles" id="tiles"></dl>
    <div class="charts" id="charts"></div>
  </section>

  <section id="log" class="view" aria-labelledby="log-title">
    <div class="head"><h2 id="log-title">Event log</h2><p class="muted" id="log-note" role="status"></p></div>
    <div class="toolbar" role="group" aria-label="Filter events">
      <label class="unseen" for="log-filter">Text</label>
      <input type="search" id="log-filter" placeholder="Text, or /pattern/" autocomplete="off" spellcheck="false">
      <label class="unseen" for="log-kind">Events</label><select id="log-kind"></select>
      <button type="button" id="log-raw" class="view" aria-pressed="false">Log lines</button>
      <button type="button" id="log-follow" aria-pressed="true">Follow</button>
      <button type="button" id="log-save">Save</button>
    </div>
    <div class="box log-box"><ol id="log-lines" tabindex="0" aria-labelledby="log-title"></ol>
      <button type="button" id="log-newer" hidden></button></div>
  </section>

  <section id="server" class="view" aria-labelledby="server-title">
    <div class="head"><h2 id="server-title">Server</h2></div>
    <dl class="box facts" id="facts"></dl>
  </section>
  </div>
</main>
<footer class="small"><p><span id="version">lmgateway</span> &middot; keys: <kbd>?</kbd></p></footer>

<dialog class="drawer" id="drawer" aria-labelledby="drawer-title">
  <div class="drawer-head"><h2 id="drawer-title" class="isolate"></h2>
    <span class="push"></span><button type="button" id="drawer-stop" hidden>Stop</button>
    <button type="button" id="drawer-previous" title="Previous (k)">&#8593;</button>
    <button type="button" id="drawer-next" title="Next (j)">&#8595;</button>
    <button type="button" id="drawer-copy">Copy as JSON</button>
    <button type="button" id="drawer-close" autofocus>Close</button></div>
  <div class="drawer-body" id="drawer-body"></div>
</dialog>

<dialog class="help" id="help" aria-labelledby="help-title">
  <h2 id="help-title">Keys</h2>
  <dl class="keys"><dt><kbd>/</kbd></dt><dd>filter the requests</dd>
    <dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next, previous request; <kbd>Enter</kbd> opens it</dd>
    <dt><kbd>p</kbd></dt><dd>pause and resume</dd><dt><kbd>Esc</kbd></dt><dd>close what is open</dd>
    <dt><kbd>?</kbd></dt><dd>this list</dd></dl>
  <p><label><input type="checkbox" id="keys-on" checked> single keys act</label></p>
  <p><button type="button" id="help-close">Close</button></p>
</dialog>
<script>
"use strict";
/* How the page works: events of /debug/stream and answers of the other routes change `page`; whatever they
   changed is painted four times a second at most.  What a person does is painted at once.  All that is shown
   came from a client or a log and is hostile: it becomes text, never markup. */

// --- 1. words and numbers
const NONE = "\u2014";
const known = value => typeof value === "number" && Number.isFinite(value);
const words = value => value === null || value === undefined || value === "" ? NONE : String(value);
const whole = n => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const two = n => String(n).padStart(2, "0");
const plural = (n, word) => whole(n) + " " + word + (n === 1 ? "" : "s");
const tokens = n => known(n) ? whole(n) : NONE;
const rate = n => known(n) ? n < 100 ? n.toFixed(1) : whole(n) : NONE;
const speed = n => known(n) ? rate(n) + " tok/s" : NONE;
const percent = n => known(n) ? Math.round(n) + " %" : NONE;
const listed = parts => parts.filter(Boolean).join(" \u00b7 ");
const ordinal = n => n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th");

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

/* An estimate: 8 s, 40 s, 2 min, never more exact than it is. */
function about(ms) {
  const s = ms / 1000;
  return s < 10 ? Math.max(1, Math.round(s)) + " s" : s < 90 ? Math.round(s / 5) * 5 + " s"
    : s < 5400 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h";
}

/* A count in few letters: 6 144, 14.9K, 2.1M. */
const COMPACT = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const short = n => !known(n) ? NONE : n < 10000 && n === Math.round(n) ? whole(n) : COMPACT.format(n);
function bytes(n) {
  if (!known(n)) return NONE;
  const at = n < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(n) / 10)), size = n / 1024 ** at;
  return (at && size < 100 ? size.toFixed(1) : whole(size)) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][at];
}
const CLOCKS = ["short", "medium"].map(timeStyle => new Intl.DateTimeFormat("en-GB", {timeStyle}));
const clockTime = (ms, seconds = true) => CLOCKS[Number(seconds)].format(ms);

/* The moment of an ISO text in this place's own words. */
function dateTime(iso) {
  const ms = Date.parse(iso ?? "");
  return known(ms) ? new Date(ms).toLocaleString() : NONE;
}
const sum = values => values.reduce((total, value) => total + (known(value) ? value : 0), 0);
const different = values => [...new Set(values)].sort();

// --- 2. nodes
const $ = id => document.getElementById(id);

/* el("td.num", "text", node): an element with its classes; strings become text, null becomes nothing. */
function el(spec, ...content) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  node.append(...content.filter(part => part !== null && part !== undefined && part !== false));
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
const swatch = tone => el("i.swatch." + tone);

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
const fact = (term, ...content) => el("div", el("dt", term), el("dd.isolate", ...content));
function heading(text, spec = "th") {
  const cell = el(spec, text);
  cell.scope = "col";
  return cell;
}

/* A table of texts and nodes: the first column is a name, the others are numbers. */
function table(head, rows) {
  const kind = (tag, at) => tag + (at ? ".num" : ".isolate");
  return el("table", el("thead", el("tr", ...head.map((text, at) => heading(text, kind("th", at))))),
    el("tbody", ...rows.map(row => el("tr", ...row.map((text, at) => {
      const cell = el(kind("td", at), text);
      if (at) cell.dataset.label = head[at];
      return cell;
    })))));
}

/* Children in this order; one that is in its place is not touched, one that is not among them goes. */
function arrange(box, nodes) {
  for (const node of [...box.children]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, at) => {
    if (box.children[at] !== node) box.insertBefore(node, box.children[at] ?? null);
  });
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
function save(name, kind, lines) {
  const link = el("a");
  link.href = URL.createObjectURL(new Blob(lines, {type: kind}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/* The number of a name's colour: from the name, so that it stays the same; 5 is for all others. */
const tones = [];
function toneOf(name) {
  let at = tones.indexOf(name);
  if (at < 0 && tones.filter(Boolean).length < 5) {
    at = [...name].reduce((hash, letter) => (hash * 31 + letter.codePointAt(0)) % 5, 7);
    while (tones[at]) at = (at + 1) % 5;
    tones[at] = name;
  }
  return "tone-" + (at < 0 ? 5 : at);
}

// --- 3. what the page knows
const REQUESTS_KEPT = 1000, EVENTS_KEPT = 1000, TEXT_KEPT = 2000, ROWS = 500;
const page = {
  status: null,         // the last answer of /debug/status
  me: null,             // of /me; null where there is no such route
  models: [],           // of /debug/models
  requests: new Map(),  // id -> record, as /debug/requests and inference_progress have them
  loaded: false,        // /debug/requests has been read
  events: [],           // the latest, {n, id, name, data}; of one request's progress only the last
  total: 0, raw: 0, missed: 0,
  paused: false, signedOut: false,
};
const STATES = {        // word, mark and colour
  waiting: ["waiting", "queued", "queued"], queued: ["in line", "queued", "queued"],
  loading: ["loading the model", "queued", "queued"], prompt: ["reading", "prefill", "prefill"],
  generating: ["writing", "decode", "decode"], answering: ["answering", "decode", "queued"],
  done: ["answered", "ok", "ok"], failed: ["failed", "error", "error"], abandoned: ["stopped", "left", "warn"],
  lost: ["end not seen", "warn", "warn"],       // the page's own: it ran, and then nobody knew of it
};
const LEFT = ["client_disconnected", "stopped"];
const nameOfState = r => r.state === "failed" && LEFT.includes(r.operation) ? "abandoned" : r.state;
const stateOf = r => STATES[nameOfState(r)] ?? [words(r.state), "queued", "queued"];
const ended = r => ["done", "failed", "abandoned", "lost"].includes(r.state);
const who = r => r.who ?? r.user ?? r.key ?? words(r.client);
const modelOf = r => words(r.model);
const promptOf = r => r.tokenUsage?.promptTokens ?? r.progress?.promptTokens ?? r.cache?.total;
const cachedOf = r => r.cachedTokens ?? r.cache?.reused;
const outputOf = r => r.tokenUsage?.completionTokens ?? r.progress?.outputTokens;
const outputText = r => (r.tokenUsage?.estimated ? "~" : "") + tokens(outputOf(r));
const prefillOf = r => r.promptTokensPerSecond ?? r.progress?.promptTokensPerSecond;
const decodeOf = r => r.tokensPerSecond ?? r.progress?.outputTokensPerSecond;
const queueOf = r => r.queuedMs ?? r.phases?.find(phase => phase.name === "queued")?.ms;
const phasesOf = r => (r.phases ?? []).filter(phase => phase.ms >= 50);
const elapsedOf = r => ended(r) ? r.totalTimeMs ?? r.elapsedMs : (live() ? Date.now() : stream.heard) - r.began;
const WHAT = {"chat/completions": "chat", completions: "completion", "api/v1/chat": "chat"};
const whatOf = r => WHAT[String(r.path ?? "").replace(/^\/(?:v1\/|api\/v0\/)?/, "")]
  ?? words(String(r.path ?? "").split("/").filter(Boolean).pop()).slice(0, 24);
const runningOnes = () => [...page.requests.values()].filter(r => !ended(r)).sort((a, b) => a.began - b.began);
const newestFirst = () => [...page.requests.values()].sort((a, b) =>
  b.began - a.began || (b.requestId > a.requestId ? 1 : -1));
const canView = () => !page.me || page.me.rights?.includes("view") || page.me.rights?.includes("admin");
const isAdmin = () => page.me ? page.me.name === null || page.me.rights?.includes("admin")
  : page.status?.gateway?.keyNeeded === false;
const canStop = r => !ended(r) && r.source !== "lmstudio" && page.me !== null
  && (isAdmin() || (page.me.name ?? "") === r.key);

/* Take what is news about a request.  One that has ended stays so, whichever answer comes late. */
function learn(id, news) {
  let r = page.requests.get(id);
  if (!r) {
    r = {requestId: id, state: "waiting", version: 0, began: Date.parse(news.startedAt ?? news.timestamp ?? "") || Date.now()};
    page.requests.set(id, r);
    forget();
  }
  const over = ended(r) && r.state !== "lost";
  if (over && news.state && !ended(news)) return r;
  const progress = news.progress && Object.keys(news.progress).length ? news.progress : r.progress;
  const place = news.state && {position: undefined, waiting: undefined, etaMs: undefined};     // of an earlier state
  Object.assign(r, place, news, {progress, state: over ? r.state : news.state ?? r.state});
  if (!ended(r) && known(news.elapsedMs)) [r.began, r.heard] = [Date.now() - news.elapsedMs, Date.now()];
  else if (news.startedAt) r.began = Date.parse(news.startedAt);
  if (!over && ended(r)) r.seenEnd = page.loaded ? Date.now() : 0;
  r.version += 1;
  dirty.add("now").add("requests").add("title").add("models");
  return r;
}

/* The oldest that have ended make room. */
function forget() {
  for (const [id, r] of page.requests) {
    if (page.requests.size <= REQUESTS_KEPT) return;
    if (ended(r)) page.requests.delete(id);
  }
}

// --- 4. events
const message = data => words(data.message);
const asks = data => page.requests.get(data.requestId) ?? data;
const pairs = data => Object.entries(data).filter(([name, value]) => known(value) && name !== "requestId")
  .map(([name, value]) => name + " " + value).join(", ");
const on = data => data.model ? " on " + data.model : "";

/* How much was read and written, as far as that is known. */
function tokensSaid(data) {
  const {promptTokens: read, completionTokens: written} = data.tokenUsage ?? {}, cached = data.cachedTokens;
  return listed([known(read) && tokens(read) + " tokens read" + (cached > 0 ? ` (${percent(100 * cached / read)} cached)` : ""),
    known(written) && tokens(written) + " written", known(data.tokensPerSecond) && speed(data.tokensPerSecond)]);
}

/* Each event that the stream sends: kind, colour, its sentence, and what it changes. */
const EVENTS = {
  connected: ["", "", () => "", () => { wantRequests(); wantStatus(); }],
  ping: ["", "", () => ""],
  gap: ["link", "warn", gapText, data => { page.missed += data.count ?? 0; wantRequests(); }],
  inference_start: ["requests", "queued", data => `${who(asks(data))} asks${on(data)}: ${whatOf(data)}`,
    data => { learn(data.requestId, {...data, source: "gateway", modelAsked: data.model}); wantRequests(); }],
  inference_progress: ["requests", "prefill", data => listed([who(data), modelOf(data), ...progressSaid(data)]),
    data => learn(data.requestId, data)],
  inference_complete: ["requests", "ok", data => listed([`${who(asks(data))} was answered in ${span(data.totalTimeMs)}`,
    modelOf(data), tokensSaid(data)]), data => finished(data, "done")],
  error: ["errors", "error", data => LEFT.includes(data.operation)
    ? `${who(asks(data))}: stopped${data.by ? " by " + data.by : ""} after ${span(data.totalTimeMs)}: ${words(data.error)}`
    : `${who(asks(data))}: failed after ${span(data.totalTimeMs)}: ${words(data.error)}`,
    data => finished(data, LEFT.includes(data.operation) ? "abandoned" : "failed")],
  lmstudio_log: ["raw", "", message],
  lmstudio_chat_start: ["LM Studio", "queued", data =>
    `LM Studio takes a chat of ${plural(data.messages ?? 0, "message")}${on(data)}`],
  lmstudio_sampling_params: ["LM Studio", "queued", data => "It samples with " + pairs(data)],
  lmstudio_token_info: ["LM Studio", "queued", data =>
    `The engine has ${tokens(data.totalPromptTokens)} prompt tokens, ${tokens(data.promptTokensToDecode)} of them to read; context ${tokens(data.n_ctx)}`],
  lmstudio_cache_stats: ["LM Studio", "ok", data =>
    `${tokens(data.reused)} of ${tokens(data.total)} prompt tokens were in the cache (${percent(data.percentage)})${on(data)}`],
  lmstudio_processing_start: ["LM Studio", "prefill", data => "The engine begins to read" + on(data)],
  lmstudio_prompt_progress: ["LM Studio", "prefill", data => `${percent(data.progress)} of a prompt is read${on(data)}`],
  lmstudio_generation_start: ["LM Studio", "decode", data => "The prompt is read, the answer begins" + on(data)],
  lmstudio_prediction_stats: ["LM Studio", "decode", data => listed(["The engine: "
    + tokensSaid({...data, tokenUsage: data}) + on(data), known(data.promptTokensPerSecond) && "read at " + speed(data.promptTokensPerSecond)])],
  lmstudio_chat_end: ["LM Studio", "queued", data => `The chat is over: ${words(data.outcome)}${on(data)}`],
  lmstudio_error: ["errors", "error", data => "LM Studio: " + message(data)],
  lmstudio_file_switch: ["link", "queued", data => "The log goes on in " + words(data.newLogFile), () => wantStatus()],
  lmstudio_month_transition: ["link", "queued", data => "The log goes on in " + words(data.newLogFile), () => wantStatus()],
};
function gapText({from, to, count}) {
  return known(count) ? `${plural(count, "event")} missed while disconnected (${from} to ${to})`
    : "the gateway was restarted; events in between are not known";
}
function progressSaid(r) {
  const read = r.progress?.percent, left = r.progress?.etaMs;
  if (r.state === "prompt") return [known(read) ? percent(read) + " read" : "reading", known(left) && `about ${about(left)} left`];
  if (r.state === "queued") return [placeOf(r)];
  return [stateOf(r)[0], known(r.progress?.outputTokens) && plural(r.progress.outputTokens, "token")];
}

/* What is one moving line: the progress of a request, or of a prompt that is nobody's.  A place in the line is none. */
const foldOf = (name, data) => name === "inference_progress" ? data.state === "queued" ? "" : data.requestId
  : name === "lmstudio_prompt_progress" ? data.requestId ? "" : "prompt " + data.model : null;
const folds = new Map();
function receive(name, data, id) {
  page.total += 1;
  EVENTS[name][3]?.(data);
  const fold = foldOf(name, data);
  if (name === "ping" || name === "connected" || fold === "") return;   // its request's own progress says the same
  if (name === "lmstudio_log") page.raw += 1;
  if (typeof data.message === "string") data.message = bounded(data.message);
  const entry = {n: page.total, id, name, data}, before = fold && folds.get(fold);
  if (before) [before.gone, entry.node] = [true, before.node];
  if (fold) folds.set(fold, entry);
  if (name === "inference_complete" || name === "error") folds.delete(data.requestId);
  page.events.push(entry);
  if (page.events.length > EVENTS_KEPT * 1.25) {
    page.events = page.events.filter(one => !one.gone).slice(-EVENTS_KEPT);
    for (const [key, one] of folds) if (one.n < page.events[0].n) folds.delete(key);
  }
  dirty.add("log");
}

/* The beginning of a text.  Through JSON, because a slice would keep the whole of it in memory. */
function bounded(text) {
  if (text.length <= TEXT_KEPT) return text;
  return JSON.parse(JSON.stringify(`${text.slice(0, TEXT_KEPT)} ... (${whole(text.length)} characters)`));
}
function finished(data, state) {
  const r = learn(data.requestId, {...data, state});
  wantRequests();
  wantFigures();
  if (!page.loaded) return;
  tell(`${who(r)}: ${stateOf(r)[0]} after ${span(r.totalTimeMs)}`);
  const mine = !page.me?.name || page.me.name === r.key;
  if (notifying() && mine && state === "done" && r.totalTimeMs > 20000 && document.hidden) {
    new Notification("Answered after " + running(r.totalTimeMs), {body: listed([who(r), modelOf(r), outputText(r) + " tokens"])});
  }
}
const notifying = () => stored("notify", "off") === "on" && globalThis.Notification?.permission === "granted";
async function askNotify() {
  const wanted = stored("notify", "off") !== "on" && await Notification.requestPermission() === "granted";
  store("notify", wanted ? "on" : "off");
  attribute($("notify"), "aria-pressed", wanted);
}

// --- 5. the stream: EventSource comes back by itself and goes on where it was
const STALE_MS = 20000, DEAD_MS = 60000;    // the gateway breaks a silence after 15 s
const AT_FIRST = () => logView.raw ? 200 : 1000;    // events of the past that the log begins with; most are log lines
const stream = {
  source: null, state: "connecting",        // live, connecting, out
  heard: Date.now(), downSince: Date.now(), last: "", breaks: 0, again: 0,

  /* Listen from the event `last` on; without one to what is still known of the latest. */
  open() {
    clearTimeout(this.again);
    this.source?.close();
    const [epoch, seq] = String(page.status?.stream?.lastId ?? "").split("-");
    const since = this.last || (epoch ? `${epoch}-${Math.max(0, seq - AT_FIRST())}` : "");
    const names = Object.keys(EVENTS).filter(name => name !== "lmstudio_log" || logView.raw);
    const source = this.source = new EventSource(
      "/debug/stream?events=" + names + (since ? "&since=" + encodeURIComponent(since) : ""));
    for (const name of names) source.addEventListener(name, event => this.take(name, event));
    source.addEventListener("error", event => { if (event.data === undefined) this.broke(); });
    this.heard = Date.now();
  },

  take(name, event) {
    if (event.data === undefined) return;   // "error" is the browser's own, too
    this.heard = Date.now();
    if (name === "connected") this.become("live");
    if (event.lastEventId) this.last = event.lastEventId;
    receive(name, JSON.parse(event.data), event.lastEventId);
  },

  /* The browser tries again by itself, save after a refusal. */
  async broke() {
    this.become("connecting");
    if (this.source.readyState !== EventSource.CLOSED) return;
    await wantMe();
    if (!page.signedOut) this.again = setTimeout(() => this.open(), 2000);
  },

  become(state) {
    if (this.state === state) return;
    if (this.state === "live") [this.breaks, this.downSince] = [this.breaks + 1, this.heard];
    if (state === "live" && this.breaks) tell("The gateway answers again");
    this.state = state;
    document.body.classList.toggle("live", state === "live");
    dirty.add("header").add("now");
  },

  /* No event and no ping for a minute is a dead link, as after a laptop's sleep. */
  watch() {
    if (!page.signedOut && Date.now() - this.heard > DEAD_MS) this.open();
  },
};
const live = () => stream.state === "live";

// --- 6. questions, and the key
const refused = answer => answer.status === 401;

/* The JSON of one of our routes; null where there is no answer, no such route or no right. */
async function get(address) {
  try {
    const answer = await fetch(address, {cache: "no-store", signal: AbortSignal.timeout?.(20000)});
    if (refused(answer)) return signOut();
    return answer.ok ? await answer.json() : null;
  } catch { return null; }
}

/* A question: asked once in so many ms at most, however often it is wanted, and not by a hidden page. */
function question(every, ask) {
  let due = 0, planned = null;
  return () => planned ??= (async () => {
    await new Promise(go => setTimeout(go, Math.max(0, due - Date.now())));
    if (!document.hidden && !page.signedOut) await ask();
    due = Date.now() + (typeof every === "function" ? every() : every);
    planned = null;
  })();
}
const wantMe = question(500, async () => {
  const me = await get("/me");
  page.me = me?.rights ? me : null;
  for (const node of document.querySelectorAll(".view")) node.classList.toggle("own", !canView());
  put($("me"), page.me?.name ?? "");
  $("me").hidden = $("logout").hidden = !page.me?.name;
  dirty.add("header").add("now");
});
const wantStatus = question(1000, async () => {
  const status = canView() ? await get("/debug/status") : null;
  if (!status?.version) return;
  page.status = status;
  stream.answered = Date.now();
  showRanges();
  paintAll();
});
const wantRequests = question(2000, async () => {
  const asked = Date.now(), rows = (await get("/debug/requests"))?.requests;
  if (!Array.isArray(rows)) return;
  for (const r of [...rows].reverse()) learn(r.requestId, r);
  page.loaded = true;
  if (rows.some(ended) || rows.length < 10) {       // those that run stand first, so all of them are in it
    const seen = new Set(rows.map(r => r.requestId));
    for (const r of runningOnes()) {
      if (!seen.has(r.requestId) && r.began < asked - 2000) learn(r.requestId, {state: "lost"});
    }
  }
  dirty.add("now").add("requests");
});
const wantModels = question(1500, async () => {
  page.models = (canView() ? await get("/debug/models") : null)?.models ?? [];
  dirty.add("models");
});

/* A key is needed.  What the page has stays. */
function signOut() {
  if (page.loaded) put($("login-why"), "Log in again to go on; what you see stays.");
  stream.source?.close();
  stream.become("out");
  lock(true);
  if (!page.signedOut) $("key").focus();
  page.signedOut = true;
  return null;
}

/* The login form: above what the page has; before it has anything, alone. */
function lock(is) {
  $("login").hidden = !is;
  for (const id of ["panels", "now", "figures", "requests", "log", "server"]) $(id).hidden = is && !page.loaded;
  dirty.add("header").add("now");
}
async function logIn(event) {
  event.preventDefault();
  const key = $("key").value.trim(), error = $("login-error");
  $("key").value = "";
  const why = await act("POST", "/login", {key});
  error.hidden = !why;
  put(error, why);
  if (why) return $("key").focus();
  page.signedOut = false;
  lock(false);
  return begin();
}
async function logOut() {
  if (!await act("POST", "/logout")) location.reload();
}

/* Who we are decides what is asked; the status says from where to listen. */
async function begin() {
  await wantMe();
  if (page.signedOut) return;
  await wantStatus();
  if (page.signedOut) return;
  stream.open();
  wantRequests();
  wantModels();
  wantFigures();
}

/* What changes something.  The reason why not, "" when it was done. */
async function act(method, address, body) {
  try {
    const answer = await fetch(address, {method, headers: {"Content-Type": "application/json"},
      body: body && JSON.stringify(body)});
    if (answer.ok) return "";
    const said = await answer.json().catch(() => null);
    return refused(answer) && body?.key ? "Wrong key." : words(said?.error?.message ?? said?.error ?? "The gateway says no.");
  } catch { return "The gateway does not answer."; }
}
async function stop(r, from) {
  from.disabled = true;
  const why = await act("DELETE", "/debug/requests/" + encodeURIComponent(r.requestId));
  from.disabled = false;
  r.problem = why;
  wantRequests();
  paint("now");
}

// --- 7. painting
const PANELS = {};          // name -> paint
const dirty = new Set();

/* Panels at once: what a person did is to be seen in the same frame. */
function paint(...names) {
  for (const name of names) {
    dirty.delete(name);
    try { PANELS[name](); } catch (error) { console.error(name, error); }
  }
}
const paintAll = () => { for (const name of Object.keys(PANELS)) dirty.add(name); };

/* Four times a second: what the stream changed, a part in each frame, so that a click waits for no more. */
function paintDirty() {
  if (page.paused || document.hidden || !dirty.size) return;
  const [name] = dirty;
  paint(name);
  if (dirty.size) requestAnimationFrame(paintDirty);
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
  node.replaceChildren(mark(tone, tone), el("span", label + " " + word));
  node.title = detail;
}
PANELS.header = () => {
  const unknown = ["queued", "not known"], {lmstudio, log, gateway} = page.status ?? {};
  put($("host"), location.host);
  $("demo").hidden = !gateway?.demo;
  for (const id of ["state-lmstudio", "state-log"]) $(id).hidden = !canView();
  const fresh = live() ? null : unknown;
  showState("state-lmstudio", "LM Studio", ...fresh ?? (!lmstudio ? unknown : lmstudio.up ? ["ok", "up", lmstudio.version ?? ""]
    : ["error", "not answering", lmstudio.reason ?? ""]));
  showState("state-log", "Log", ...fresh ?? (log ? logState(log) : unknown));
  showState("state-link", "Link", ...linkState());
  const gone = !live() && !page.signedOut && Date.now() - stream.heard > 2500 && (page.loaded || page.status);
  document.body.classList.toggle("dead", Boolean(gone));
  $("dead").hidden = !gone;
  put($("dead"), gone ? `The gateway does not answer. What you see is from ${clockTime(stream.downSince)}.` : "");
};

/* LM Studio's verbose logging is off: so many entries, and none from its engine. */
const terse = log => log.verbose === false && log.entries > 20;
function logState(log) {
  if (log.enabled === false) return ["queued", "off"];
  if (log.problem) return ["error", "not readable", log.problem];
  if (!log.file) return ["warn", "no file yet"];
  if (terse(log)) return ["warn", "not verbose", log.file];
  return log.behindBytes > 1e6 ? ["warn", "behind", bytes(log.behindBytes)] : ["ok", "read", log.file];
}
function linkState() {
  if (page.signedOut) return ["warn", "signed out"];
  if (page.paused) return ["queued", "paused"];
  if (!live()) return page.loaded ? ["error", "broken, trying again"] : ["queued", "connecting"];
  const quiet = Date.now() - stream.heard;
  return quiet > STALE_MS ? ["warn", "silent for " + running(quiet)] : ["ok", "live"];
}
const DEVELOPER = "In LM Studio: Developer \u25b8 ";
const START = DEVELOPER + "switch Status to Running. On a machine without a screen: lms server start.";
const VERBOSE = DEVELOPER + "Developer Logs \u25b8 \u2026 \u25b8 Verbose Logging.";
const FILE_LOGGING = DEVELOPER + "Developer Logs \u25b8 \u2026 \u25b8 File Logging Mode must not be off. "
  + "LMSTUDIO_LOG_DIR names another directory.";
const MONITORING = "Set ENABLE_LOG_MONITORING=true to see prompts being read and what was cached.";

/* What the page needs of LM Studio, the worst first: [is it so, null while nobody knows; colour where not; what; what
   not; remedy]. */
function checks() {
  const {lmstudio = {}, log = {}} = page.status ?? {}, because = why => why ? why + ". " : "";
  return [
    [lmstudio.up, "error", "LM Studio answers", "LM Studio does not answer", lmstudio.reason || START],
    log.enabled === false ? [false, "warn", "", "Its log is not followed", MONITORING]
      : [Boolean(log.file) && !log.problem, log.problem ? "error" : "warn", "Its log is followed",
        log.problem ? "Its log cannot be followed" : "No log file was found", because(log.problem) + FILE_LOGGING],
    [terse(log) ? false : log.verbose || null, "warn", `Verbose logging: ${log.verbose ? "on" : "not known yet"}`,
      "Verbose logging: off, so most figures of its engine are missing", VERBOSE],
  ];
}
PANELS.banners = () => {
  const told = !page.status || page.signedOut || !$("first-run").hidden;    // the first run says the same in its own way
  const warnings = Array.isArray(page.status?.log?.warnings) ? page.status.log.warnings : [], box = $("banners");
  const found = told ? [] : [...checks().filter(([good]) => good === false).map(([, tone, , what, remedy]) => [tone, what, remedy]),
    ...warnings.map(text => ["warn", ...String(text).split(/: (.*)/s)])].slice(0, 2);
  if (!outdated(box, JSON.stringify(found))) return;
  box.replaceChildren(...found.map(([tone, what, remedy]) =>
    el("p.banner", mark(tone, tone), el("span", el("b", what + ". "), remedy ?? ""))));
};

// --- 9. models
PANELS.models = () => {
  const box = $("model-list"), active = runningOnes(), busy = new Set(active.map(modelOf));
  const shown = page.models.map(model => ({...model, mine: active.filter(r => r.model === model.id)}));
  const loaded = shown.filter(model => model.state !== "not-loaded" || busy.has(model.id));
  const rest = shown.filter(model => !loaded.includes(model));
  $("models").hidden = !shown.length || !canView();
  $("models").classList.toggle("away", page.status?.lmstudio?.up === false);
  const key = JSON.stringify([shown.map(({mine, ...model}) => [model, mine.map(r => [r.state, Math.round(decodeOf(r) ?? 0),
    Math.round(prefillOf(r) ?? 0)])]), isAdmin()]);
  if (!outdated(box, key)) return;
  const open = box.querySelector("details")?.open;
  box.replaceChildren(...loaded.map(modelBox), ...rest.length ? [restBox(rest, open)] : []);
};
function modelBox({id, state, mine, contextLength, running: slots = 0, waiting = 0}) {
  const states = mine.map(r => r.state), writing = sum(mine.filter(r => r.state === "generating").map(decodeOf));
  const reading = sum(mine.filter(r => r.state === "prompt").map(prefillOf));
  const name = state === "loading" || states.includes("loading") ? "loading" : states.includes("generating") ? "generating"
    : states.includes("prompt") ? "prompt" : mine.length ? "answering" : "";
  const [word, icon, tone] = name ? STATES[name] : ["idle", "ok", "queued"];
  return el("li.box", el("div.row", el("h3.isolate", id), el("span." + tone, mark(icon, tone), " " + word)),
    el("div.row", el("span", el("b", listed([reading && speed(reading) + " read", writing && speed(writing) + " written"])), " ",
      el("span.muted", listed([(slots || mine.length) && `${slots || mine.length} running`, waiting && `${waiting} waiting`,
        known(contextLength) && short(contextLength) + " context"]))),
      isAdmin() && state === "loaded" && button("Unload", event => change(event, "unload", () => instancesOf(id)), "button.quiet")));
}
function restBox(rest, open) {
  const list = el("details", el("summary.muted", `${rest.length} more, not loaded`), el("ul", ...rest.map(({id, sizeBytes}) =>
    el("li.row", el("span.isolate", listed([id, known(sizeBytes) && bytes(sizeBytes)])),
      isAdmin() && button("Load", event => change(event, "load", () => [{model: id}]), "button.quiet")))));
  list.open = Boolean(open);
  return el("li.box.rest", list);
}

/* A loaded model goes by the names of its instances, which need not be its own. */
async function instancesOf(id) {
  const found = (await get("/api/v1/models"))?.models?.find(model => model.key === id)?.loaded_instances ?? [{id}];
  return found.map(instance => ({instance_id: instance.id}));
}
async function change({currentTarget: from}, what, bodies) {
  from.disabled = true;
  put(from, what + "ing \u2026");
  let why = "";
  for (const body of await bodies()) why = await act("POST", "/api/v1/models/" + what, body) || why;
  put(from, why ? "failed" : "done");
  from.title = why;
  wantModels();
}

// --- 10. now: a card for each running request, a line for each that waits
const LINGER_MS = 5000, ENDED_MS = 120000, CARDS = 12;
const cards = new Map();    // request id -> {node, and its parts}
/* It waits, or nothing is known of it yet: a line is enough. */
const inLine = r => r.state === "queued" || r.state === "waiting" && !known(outputOf(r));
const placeOf = r => known(r.position) ? ordinal(r.position) + " in line"
  : r.state === "waiting" ? "not answered yet" : "in LM Studio's line";
PANELS.now = () => {
  const moment = Date.now(), all = runningOnes(), active = all.filter(r => !inLine(r));
  const over = [...page.requests.values()].filter(r => ended(r) && moment - (r.seenEnd ?? 0) < ENDED_MS && r.state !== "lost")
    .sort((a, b) => b.seenEnd - a.seenEnd);
  const fresh = over.filter(r => moment - r.seenEnd < LINGER_MS && cards.has(r.requestId));
  const seats = [...active, ...fresh].sort((a, b) => a.began - b.began).slice(0, CARDS);
  for (const id of cards.keys()) if (!seats.some(r => r.requestId === id)) cards.delete(id);
  arrange($("cards"), seats.map(r => cardOf(r).node));
  seats.forEach(paintCard);
  const queue = all.filter(inLine).sort((a, b) => (modelOf(a) > modelOf(b)) - (modelOf(a) < modelOf(b))
    || (a.position ?? 1e9) - (b.position ?? 1e9) || a.began - b.began);
  lines($("queue"), queue.slice(0, 30), r => listed([placeOf(r), who(r), modelOf(r), running(elapsedOf(r)),
    known(etaOf(r)) && "about " + about(etaOf(r))]), queue.length - 30);
  lines($("ended"), over.filter(r => !seats.includes(r)).slice(0, 3), r => listed([`${who(r)}: ${stateOf(r)[0]}`,
    modelOf(r), span(r.totalTimeMs), known(outputOf(r)) && outputText(r) + " written", running(moment - r.seenEnd) + " ago"]));
  put($("now-note"), !page.loaded ? "connecting" : !all.length ? "idle"
    : listed([`${active.length} running`, queue.length && `${queue.length} waiting`,
      active.length > CARDS && `${active.length - CARDS} of them in the table below`, !canView() && "your own"]));
  $("notify").hidden = !globalThis.Notification || !isSecureContext;
  paintFirstRun();
};
const etaOf = r => r.progress?.etaMs ?? r.etaMs;

/* One line for each request; what stands in it is written only where it has changed. */
function lines(box, rows, textOf, more = 0) {
  const old = new Map([...box.children].map(node => [node.dataset.id, node]));
  arrange(box, rows.map(r => {
    const node = old.get(r.requestId) ?? el("li", el("span.mark"), button("", () => openDrawer(r.requestId), "button.plain.isolate"),
      button("Stop", event => stop(r, event.currentTarget), "button.quiet.push"));
    node.dataset.id = r.requestId;
    const [icon, text, halt] = node.children, [, name, tone] = stateOf(r);
    if (outdated(icon, name)) icon.replaceChildren(mark(name, tone));
    put(text, textOf(r) + (r.problem ? ` \u00b7 ${r.problem}` : ""));
    halt.hidden = !canStop(r);
    return node;
  }));
  if (more > 0) box.append(el("li.muted", `and ${more} more`));
}
function cardOf(r) {
  let card = cards.get(r.requestId);
  if (card) return card;
  const part = {who: el("span.isolate"), model: el("span.muted.isolate"), big: el("strong"), small: el("span.muted"),
    bar: el("div.bar"), legend: el("ul.legend"), speed: el("span.speed"), context: el("span"), more: el("span.muted.isolate"),
    open: button("Details", () => openDrawer(r.requestId), "button.quiet.push"),
    stop: button("Stop", event => stop(r, event.currentTarget), "button.quiet")};
  Object.assign(part.bar, {role: "progressbar", ariaValueMin: 0, ariaValueMax: 100, ariaLabel: "Prompt read"});
  part.bar.append(...["cached", "prefill", "rest", "decode"].map(tone => el("i." + tone)));
  card = {...part, spoken: 0, node: el("article.box.card",
    el("div.row", el("h3", part.who, " ", part.model), el("p.left", part.big, part.small)),
    part.bar, el("div.row", part.legend),
    el("div.details", part.speed, part.context, part.more, part.open, part.stop))};
  cards.set(r.requestId, card);
  return card;
}
function paintCard(r) {
  const card = cardOf(r), [big, small] = headline(r);
  card.node.className = "box card " + stateOf(r)[2];
  put(card.who, who(r));
  card.who.title = listed([r.key, r.client, r.userAgent]);
  put(card.model, listed([modelOf(r), whatOf(r)]));
  put(card.big, big);
  put(card.small, small);
  paintBar(card, r);
  put(card.speed, ended(r) ? "" : listed([speed({generating: decodeOf(r), prompt: prefillOf(r)}[r.state])].filter(text => text !== NONE)));
  const {size, used} = r.context ?? {}, share = 100 * used / size, full = share >= 85;
  put(card.context, known(share) ? `context ${short(used)} of ${short(size)} (${percent(share)})${full ? " \u25b2 nearly full" : ""}` : "");
  card.context.className = share >= 95 ? "error" : full ? "warn" : "muted";
  put(card.more, r.problem || (ended(r) ? words(r.error ?? (r.finishReason && "finish: " + r.finishReason)).slice(0, 200) : known(leftOf(r)) ? running(elapsedOf(r)) + " so far" : ""));
  card.stop.hidden = !canStop(r);
}

/* How long still, in big letters; if nobody can tell, how long so far. */
function headline(r) {
  const left = leftOf(r), read = r.progress?.percent, took = span(r.totalTimeMs);
  if (ended(r)) return [took, stateOf(r)[0]];
  if (r.state === "prompt") {
    if (read > 99.4 || left < 500) return ["almost read", ""];
    return known(left) ? [(left < 10000 ? "~" : "") + running(left), "left to read"]
      : known(read) ? [percent(read), "read"] : [running(elapsedOf(r)), "reading"];
  }
  if (known(left)) return [running(left), "left"];
  return [running(elapsedOf(r)), {generating: "and writing", loading: "loading the model", waiting: "not answered yet"}[r.state]
    ?? stateOf(r)[0]];
}

/* Ms until the prompt is read, or it is its turn, as far as anybody can tell. */
function leftOf(r) {
  const left = etaOf(r);
  return known(left) ? Math.max(0, left - (live() && r.heard ? Date.now() - r.heard : 0)) : undefined;
}

/* Tokens by what became of them: cached, read, still to read, written.  What was read stays read. */
function partsOf(r) {
  const total = promptOf(r), written = outputOf(r) ?? 0, done = written > 0 || ["generating", "done"].includes(r.state)
    || r.phases?.some(phase => phase.name === "generating");
  const share = done ? 100 : r.progress?.percent ?? 0;
  if (!known(total)) return {cached: 0, prefill: share, rest: 100 - share, decode: written ? 6 : 0, written};
  const cached = Math.min(cachedOf(r) ?? 0, total), read = Math.max(cached, Math.round(total * share / 100));
  return {total, cached, prefill: read - cached, rest: total - read, decode: written && Math.max(written, total * 0.04), written};
}
function paintBar(card, r) {
  const parts = partsOf(r), {bar, legend} = card, read = 100 - 100 * parts.rest / (parts.total ?? 100);
  for (const node of bar.children) {
    const size = parts[node.className] ?? 0;
    node.style.flexGrow = size;
    node.hidden = !size;
  }
  const said = !known(parts.total) ? [["decode", parts.written, "written"]] : [["cached", parts.cached, "cached"],
    ["prefill", parts.prefill, "read"], ["rest", parts.rest, "to read"], ["decode", parts.written, "written"]];
  const texts = said.filter(([, n]) => n > 0);
  if (outdated(legend, texts.join())) {
    legend.replaceChildren(...texts.map(([tone, n, word]) => el("li", swatch(tone), `${tokens(n)} ${word}`)));
  }
  if (Date.now() - card.spoken < 5000) return;      // a screen reader is not to be hurried
  card.spoken = Date.now();
  const left = r.state === "prompt" && known(leftOf(r)) ? `, about ${about(leftOf(r))} left` : "";
  const known_ = known(parts.total) || known(r.progress?.percent);
  attribute(bar, "aria-valuenow", known_ ? Math.round(read) : null);
  attribute(bar, "aria-valuetext", known_ ? `${Math.round(read)} percent${left}` : "not known");
}

// --- 11. first run: what to do next, in place of empty panels
function paintFirstRun() {
  const {totalRequests, gateway = {}, lmstudio = {}, log = {}} = page.status ?? {}, box = $("first-run");
  const first = Boolean(page.loaded && page.status && !page.requests.size && !totalRequests);
  if (!page.signedOut) for (const id of ["figures", "requests"]) $(id).hidden = first;
  if (box.hidden === first) dirty.add("banners");
  box.hidden = !first;
  const shown = JSON.stringify([gateway, lmstudio.up, log.file, log.problem, log.verbose, terse(log)]);
  if (!first || !outdated(box, shown)) return;
  const here = location.origin, secret = gateway.keyNeeded ? ' -H "Authorization: Bearer YOUR_KEY"' : "";
  const key = gateway.keyNeeded ? ", with a key of this gateway. " : "; any API key will do. ";
  box.replaceChildren(
    el("div", el("h3", "No request yet"),
      el("p.muted", "Point a client at this base URL" + key + "The first request appears here by itself.")),
    copyLine(here + "/v1"), ...lanUrls().map(url => copyLine(url + "/v1", "From other machines")),
    copyLine(`curl ${here}/v1/chat/completions${secret} -H "Content-Type: application/json" -d `
      + '\'{"messages": [{"role": "user", "content": "Say hello."}], "stream": true}\'',
      "Or from a terminal"),
    el("ul.checks", ...checks().map(checkLine)));
}
const lanUrls = () => (page.status?.gateway?.lanUrls ?? []).filter(url => url !== location.origin);
function copyLine(text, label = "") {
  return el("div", label ? el("p.muted", label) : null,
    el("div.copy", el("code", text), button("Copy", event => copy(text, event.currentTarget))));
}

function checkLine([good, tone, fine, wrong, remedy]) {
  const shown = good === false ? tone : good ? "ok" : "queued";
  return el("li", mark(shown, shown), el("span", good === false ? wrong : fine), good === false && el("p.muted", remedy));
}

// --- 12. figures: tiles and charts of a range, from /debug/series
const RANGES = [["15min", 15, "15 min"], ["1h", 60, "1 h"], ["24h", 1440, "24 h"], ["7d", 10080, "7 d"]];
const figures = {range: "1h", all: null, model: null, user: null, by: "user"};
const minutesOf = () => RANGES.find(([name]) => name === figures.range)[1];
const series = by => get(`/debug/series?minutes=${minutesOf()}${by && "&by=" + by}`);
const wantFigures = question(() => minutesOf() < 1000 ? 3000 : 20000, readFigures);
async function readFigures() {
  if (!canView()) return;
  const {range} = figures, [all, model, user] = await Promise.all(["", "model", "user"].map(series));
  if (range !== figures.range || !all?.rows || !model?.rows || !user?.rows) return;
  Object.assign(figures, {all, model, user, read: Date.now()});
  dirty.add("figures");
}
function showRanges() {
  const history = page.status?.gateway?.history;
  if (!outdated($("range"), String(history))) return;
  $("range").replaceChildren(...RANGES.filter(([, minutes]) => history || minutes <= 1440).map(([name, , text]) => {
    const one = button(text, () => setRange(name));
    one.dataset.range = name;
    attribute(one, "aria-pressed", name === figures.range);
    return one;
  }));
}
async function setRange(name) {
  figures.range = name;
  for (const one of $("range").children) attribute(one, "aria-pressed", one.dataset.range === name);
  put($("figures-note"), "\u2026");
  writeAddress();
  await readFigures();
  paint("figures");
}
const share = row => row.promptTokens ? 100 * row.cachedTokens / row.promptTokens : undefined;
const TILES = [             // label, figure, unit, note
  ["Requests", t => whole(t.requests), "", t => `${whole(t.requests - t.errors - t.abandoned)} ok \u00b7 `
    + `${whole(t.abandoned)} stopped \u00b7 ${whole(t.errors)} failed`],
  ["First token", t => span(t.ttftMs.p50), "", t => known(t.ttftMs.p95) ? "median \u00b7 p95 " + span(t.ttftMs.p95) : "No data yet"],
  ["Reading", t => rate(t.reading.p50), " tok/s", t => known(t.reading.p50) ? "median" : "No data yet"],
  ["Writing", t => rate(t.writing.p50), " tok/s", t => known(t.writing.p50) ? "median" : "No data yet"],
  ["Tokens in", t => short(t.promptTokens), "", t => known(share(t)) ? percent(share(t)) + " from the cache" : "No data yet"],
  ["Tokens out", t => short(t.completionTokens), "", t => t.gpuMs ? running(t.gpuMs) + " of work" : "No data yet"],
  ["Waited in line", t => span(t.queuedMs.p95), "", t => known(t.queuedMs.p95) ? "p95" : "No data yet"],
];
const CHARTS = [
  ["Tokens", "by the end of the request", tokenChart],
  ["Speed", "median, and up to p95", byModel({reading: "Reading, tok/s", writing: "Writing, tok/s"}, 97, short, rate)],
  ["Time to first token", "median, and up to p95", byModel({ttftMs: "Time to first token"}, 236,
    ms => ms < 1000 ? whole(ms) + " ms" : short(ms / 1000) + " s", span)],
];
PANELS.figures = () => {
  const {all} = figures;
  if (!all || $("figures").hidden) return;
  $("tiles").replaceChildren(...TILES.map(([label, figure, unit, note]) => {
    const text = figure(all.total);
    return el("div.box.tile", el("dt", label), el("dd.figure", text, el("small", text === NONE ? "" : unit)), el("dd.note", note(all.total)));
  }));
  const first = all.rows[0] && Date.parse(all.rows[0].t), begin = Date.parse(all.from);
  put($("figures-note"), first - begin > 60000 * minutesOf() / 4 ? "since " + clockTime(first, false) : "");
  const {history} = page.status?.gateway ?? {};
  $("csv").hidden = !history;
  $("csv").href = "/debug/usage?by=key&format=csv&since=" + (minutesOf() < 1440 ? "1h" : minutesOf() / 1440 + "d");
  if (!$("charts").children.length) makeCharts();
  CHARTS.forEach(paintChart);
  paintPeople();
  figures.shown ??= performance.now();
};
function makeCharts() {
  for (const chart of CHARTS) {
    const [title, note] = chart, plots = el("div.plots"), twin = el("div.twin"), legend = el("ul.legend.small");
    twin.hidden = true;
    twin.tabIndex = 0;
    const toggle = button("Show as table", () => {
      [plots.hidden, twin.hidden] = [twin.hidden, plots.hidden];
      put(toggle, twin.hidden ? "Show as table" : "Show as chart");
      paintChart(chart);
    }, "button.quiet.push");
    Object.assign(chart, {plots, twin, legend});
    $("charts").append(el("figure.box.chart", el("div.head", el("figcaption", el("h3", title)), el("span.muted.small", note), toggle),
      plots, twin, legend));
  }
  const by = (name, text) => button(text, () => { figures.by = name; paintPeople(); }, "button.quiet");
  figures.tabs = {user: by("user", "By person"), model: by("model", "By model")};
  figures.people = el("div.people.wide");
  $("charts").append(el("figure.box.chart", el("div.head", el("figcaption", el("h3.unseen", "Who used how much")),
    ...Object.values(figures.tabs)), figures.people));
}
function paintChart({2: make, plots, twin, legend}) {
  const made = make(Math.max(240, plots.clientWidth || 560));
  legend.replaceChildren(...made.legend);
  if (plots.hidden) twin.replaceChildren(made.rows.length ? table(made.head, made.rows) : el("p.empty", "No data yet"));
  else plots.replaceChildren(...made.rows.length ? made.plots() : [el("p.none", "No data yet")]);
}

/* A round number at or above n. */
function round(n) {
  const power = 10 ** Math.floor(Math.log10(n || 1));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * power >= n - 1e-9) * power;
}
const LEFT_PX = 52, RIGHT_PX = 8;

/* An empty plot: its SVG, x(ms), y(value), with lines at the middle and the top of the scale. */
function plane(title, width, height, top, text) {
  const svg = draw("svg", {role: "img", "aria-label": title, height, viewBox: `0 0 ${width} ${height}`});
  const from = Date.parse(figures.all.from), to = Date.parse(figures.all.to), base = height - 22;
  const x = t => LEFT_PX + (t - from) / (to - from) * (width - LEFT_PX - RIGHT_PX), y = value => base - value / top * (base - 10);
  const label = (px, py, anchor, said) => draw("text", {x: px, y: py, "text-anchor": anchor}, said);
  for (const value of [0, top / 2, top]) {
    svg.append(draw("line", {x1: LEFT_PX, x2: width - RIGHT_PX, y1: y(value), y2: y(value)}), label(LEFT_PX - 7, y(value) + 4, "end", text(value)));
  }
  const minute = 60000, room = (to - from) / (width / 80), offset = new Date(to).getTimezoneOffset() * minute;
  const step = minute * ([1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440].find(n => n * minute >= room) ?? 2880);
  for (let t = Math.ceil((from - offset) / step) * step + offset; t <= to; t += step) {
    if (x(t) < LEFT_PX + 8 || x(t) > width - 24) continue;
    const day = new Date(t).toLocaleDateString(undefined, {weekday: "short", day: "numeric"});
    svg.append(label(x(t), height - 5, "middle", step >= 1440 * minute ? day : clockTime(t, false)));
  }
  return {svg, x, y, base};
}
const timeOf = row => minutesOf() > 1440 ? new Date(row.t).toLocaleString(undefined, {weekday: "short", hour: "2-digit", minute: "2-digit"})
  : clockTime(Date.parse(row.t), false);
function tokenChart(width) {
  const {rows, step} = figures.all, parts = row => [["cached", row.cachedTokens],
    ["prefill", Math.max(0, row.promptTokens - row.cachedTokens)], ["decode", row.completionTokens]];
  const top = round(Math.max(10, ...rows.map(row => sum(parts(row).map(([, n]) => n)))));
  return {
    legend: [["cached", "prompt, cached"], ["prefill", "prompt, read"], ["decode", "written"]].map(([tone, text]) =>
      el("li", swatch(tone), text)),
    head: ["From", "Requests", "Prompt, cached", "Prompt, read", "Written"],
    rows: rows.filter(row => row.promptTokens + row.completionTokens).map(row => [timeOf(row), whole(row.requests), ...parts(row).map(([, n]) => whole(n))]).reverse(),
    plots() {
      const {svg, x, y} = plane("Tokens over time", width, 236, top, short);
      for (const row of rows) {
        const t = Date.parse(row.t), begin = Math.max(LEFT_PX, x(t)), size = Math.max(1, x(t + 1000 * step) - begin - 1);
        let below = 0;
        const bar = draw("g", {}, draw("title", {}, listed([timeOf(row), plural(row.requests, "request"), short(row.promptTokens) + " in",
          short(row.completionTokens) + " out"])));
        for (const [tone, n] of parts(row)) {
          bar.append(draw("rect", {x: begin, width: Math.min(size, width - RIGHT_PX - begin), y: y(below + n), height: y(below) - y(below + n), class: tone}));
          below += n;
        }
        svg.append(bar);
      }
      return [svg];
    },
  };
}

/* Lines by model of row[name]: the median, and a band up to p95; a gap in time is a gap in the line. */
function lineChart(title, name, width, height, text) {
  const models = Object.entries(figures.model.rows).map(([model, rows]) => [model, rows.filter(row => known(row[name].p50))])
    .filter(([, rows]) => rows.length);
  const top = round(Math.max(0, ...models.flatMap(([, rows]) => rows.map(row => Math.max(row[name].p50, row[name].p95)))) || 1);
  const {svg, x, y} = plane(title, width, height, top, text), half = 500 * figures.model.step;
  const widest = Math.max(4 * half, (Date.parse(figures.all.to) - Date.parse(figures.all.from)) / 12);
  for (const [model, rows] of models) {
    const runs = [];
    for (const row of rows) {
      const t = Date.parse(row.t) + half, point = {t, x: Math.max(LEFT_PX, x(t)), low: y(row[name].p50), high: y(row[name].p95), row};
      const run = runs[runs.length - 1];
      if (run && t - run[run.length - 1].t <= widest) run.push(point);
      else runs.push([point]);
    }
    const group = draw("g", {class: toneOf(model)});
    for (const run of runs) {
      const path = points => points.map(([px, py]) => px.toFixed(1) + " " + py.toFixed(1)).join("L");
      if (run.length > 1) {
        group.append(draw("path", {class: "band", d: `M${path([...run.map(p => [p.x, p.low]), ...run.map(p => [p.x, p.high]).reverse()])}Z`}),
          draw("path", {d: "M" + path(run.map(p => [p.x, p.low]))}));
      }
      for (const p of run) {
        group.append(draw("circle", {cx: p.x, cy: p.low, r: run.length > 1 ? 2 : 3}, draw("title", {},
          `${timeOf(p.row)}  ${model}  ${text(p.row[name].p50)}, p95 ${text(p.row[name].p95)}`)));
      }
    }
    svg.append(group);
  }
  return svg;
}
/* Charts by model of some of a row's percentiles, each with its title; all as one table. */
function byModel(titles, height, text, shown) {
  const names = Object.keys(titles);
  return width => {
    const rows = Object.entries(figures.model.rows).flatMap(([model, of]) => of.map(row => [model, row]))
      .filter(([, row]) => names.some(name => known(row[name].p50))).sort(([, a], [, b]) => a.t < b.t ? 1 : -1);
    return {
      legend: different(rows.map(([model]) => model)).map(model => el("li.isolate", swatch(toneOf(model)), model)),
      head: ["Model", "From", ...names.flatMap(name => [titles[name], "p95"])],
      rows: rows.map(([model, row]) => [model, timeOf(row), ...names.flatMap(name => [shown(row[name].p50), shown(row[name].p95)])]),
      plots: () => names.flatMap(name => [names.length > 1 && el("p.muted.small", titles[name]),
        lineChart(titles[name], name, width, height, text)]).filter(Boolean),
    };
  };
}

/* What each person or model used: bars to scale, and the figures; a click filters the requests. */
function paintPeople() {
  const {by} = figures, total = Object.entries(figures[by]?.total ?? {});
  for (const [name, tab] of Object.entries(figures.tabs)) attribute(tab, "aria-pressed", name === by);
  const used = t => t.promptTokens + t.completionTokens, most = Math.max(1, ...total.map(([, t]) => used(t)));
  const columns = [["In", t => short(t.promptTokens)], ["Cached", t => percent(share(t))], ["Out", t => short(t.completionTokens)],
    ...by === "model" ? [["Read tok/s", t => rate(t.reading.p50)], ["Write tok/s", t => rate(t.writing.p50)]]
      : [["Work", t => t.gpuMs ? running(t.gpuMs) : NONE]], ["Requests", t => whole(t.requests)]];
  const rows = total.sort(([, a], [, b]) => used(b) - used(a) || b.requests - a.requests).slice(0, 12).map(([name, t]) => {
    const bar = el("div.bar");
    for (const [tone, n] of [["cached", t.cachedTokens], ["prefill", t.promptTokens - t.cachedTokens], ["decode", t.completionTokens],
      ["rest", most - used(t)]]) {
      const part = el("i." + tone);
      part.style.flexGrow = Math.max(0, n);
      bar.append(part);
    }
    const filter = button(name, () => {
      refilter({[by === "user" ? "who" : "model"]: name});
      $("requests").scrollIntoView();
    }, "button.plain");
    return [el("div", el("span.name", swatch(toneOf(name)), filter), bar), ...columns.map(([, show]) => show(t))];
  });
  figures.people.replaceChildren(rows.length ? table([by === "user" ? "Who" : "Model", ...columns.map(([text]) => text)], rows)
    : el("p.none", "No data yet"));
}

// --- 13. the table of requests
/* name, heading, class of the cell, what it sorts by, what it shows if that is another thing */
const COLUMNS = [
  ["time", "Time", "", r => r.began, r => clockTime(r.began)],
  ["status", "Outcome", "", r => stateOf(r)[0], outcomeOf],
  ["who", "Who", "isolate", who],
  ["model", "Model", "isolate", modelOf],
  ["path", "What", "isolate", whatOf],
  ["queue", "In line", "num", queueOf, r => span(queueOf(r))],
  ["first", "First token", "num", r => r.timeToFirstTokenMs, r => span(r.timeToFirstTokenMs)],
  ["prompt", "Prompt", "num", promptOf, r => tokens(promptOf(r))],
  ["cached", "Cached", "num", cachedOf, r => promptOf(r) ? percent(100 * cachedOf(r) / promptOf(r)) : NONE],
  ["prefill", "Read tok/s", "num", prefillOf, r => rate(prefillOf(r))],
  ["output", "Written", "num", outputOf, outputText],
  ["decode", "Write tok/s", "num", decodeOf, r => rate(decodeOf(r))],
  ["total", "Total", "num", elapsedOf, r => ended(r) ? span(r.totalTimeMs) : running(elapsedOf(r))],
];
const HINTS = {             // what a cell says when one points to it
  time: r => "started " + new Date(r.began).toLocaleString(),
  status: r => words(r.error ?? r.finishReason),
  who: r => listed([r.user, r.key, r.client, r.userAgent]),
  path: r => listed([r.method, words(r.path)]),
  cached: r => tokens(cachedOf(r)),
  output: r => r.tokenUsage?.estimated ? "Counted from the pieces of the answer, which gave no figure" : null,
};
const OUTCOMES = {running: r => !ended(r), answered: r => r.state === "done", stopped: r => nameOfState(r) === "abandoned",
  failed: r => nameOfState(r) === "failed" || r.state === "lost"};
const FILTERS = ["text", "status", "who", "model"];
const PAGE_ROWS = innerWidth <= 960 ? 12 : 25;
const view = {
  text: "", status: "", who: "", model: "", sort: "time", down: true,
  rows: PAGE_ROWS,          // that are shown at most
  since: null,              // requests that started later wait, because the reader is below the first rows
  order: [],                // ids of the rows
};
const rowNodes = new Map(); // request id -> {node, cells, version}
function outcomeOf(r) {
  const [word, icon, tone] = stateOf(r);
  return [mark(icon, tone), " " + word + (r.state === "failed" && r.status >= 400 ? " " + r.status : "")];
}

/* Range, filters, order and the open request live in the address, so that a view can be kept and sent. */
function readAddress() {
  const given = new URLSearchParams(location.search);
  for (const name of FILTERS) view[name] = given.get(name) ?? "";
  if (COLUMNS.some(([name]) => name === given.get("sort"))) view.sort = given.get("sort");
  view.down = given.get("order") !== "up";
  if (RANGES.some(([name]) => name === given.get("range"))) figures.range = given.get("range");
  $("filter").value = view.text;
  showDrawer(given.get("request"));
}
function writeAddress(push = false) {
  const given = new URLSearchParams();
  for (const name of FILTERS) if (view[name]) given.set(name, view[name]);
  if (view.sort !== "time") given.set("sort", view.sort);
  if (!view.down) given.set("order", "up");
  if (figures.range !== "1h") given.set("range", figures.range);
  if (drawer.id) given.set("request", drawer.id);
  const query = String(given) ? "?" + given : "";
  history[push ? "pushState" : "replaceState"](push ? "drawer" : history.state, "", location.pathname + query + location.hash);
}
function makeTable() {
  $("table-head").append(...COLUMNS.map(([name, text, kind]) => {
    const sort = () => refilter({sort: name, down: view.sort !== name || !view.down});
    return heading(button(text, sort, "button.plain"), `th.c-${name}${kind === "num" ? ".num" : ""}`);
  }));
}
function refilter(changes) {
  Object.assign(view, {since: null}, changes);
  writeAddress();
  paint("requests");
}

/* The requests that the filters let through, in order. */
function chosenRequests() {
  const needle = view.text.toLowerCase(), value = COLUMNS.find(([name]) => name === view.sort)[3];
  const texts = r => [r.requestId, who(r), r.key, r.user, r.client, r.model, r.modelAsked, r.path, r.userAgent, r.error,
    r.finishReason, r.status].join("\n").toLowerCase();
  const rows = newestFirst().filter(r => (OUTCOMES[view.status]?.(r) ?? true)
    && (!view.who || who(r) === view.who) && (!view.model || modelOf(r) === view.model)
    && (!needle || texts(r).includes(needle)));
  if (view.sort === "time") return view.down ? rows : rows.reverse();
  const lacks = r => [undefined, null, NONE].includes(value(r)), sign = view.down ? -1 : 1;
  const sorted = rows.filter(r => !lacks(r)).sort((a, b) => value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0);
  return [...sorted, ...rows.filter(lacks)];
}

/* True while the reader looks at rows below the first: new ones would push them down. */
function below() {
  const box = $("table").getBoundingClientRect();
  return view.sort === "time" && view.down && box.top < 0 && box.bottom > 200;
}
PANELS.requests = () => {
  let rows = chosenRequests();
  view.since = below() ? view.since ?? rows[0]?.began ?? null : null;
  const newer = view.since === null ? 0 : rows.filter(r => r.began > view.since).length;
  $("newer").hidden = !newer;
  put($("newer").firstElementChild, newer + " new \u2191");
  rows = rows.slice(newer);
  const shown = rows.slice(0, view.rows), nodes = shown.map(paintRow);
  view.order = shown.map(r => r.requestId);
  arrange($("rows"), nodes);
  for (const id of rowNodes.keys()) if (!view.order.includes(id)) rowNodes.delete(id);
  nodes.forEach((node, at) => { node.tabIndex = at ? -1 : 0; });
  [...$("table-head").children].forEach((cell, at) => attribute(cell, "aria-sort",
    COLUMNS[at][0] !== view.sort ? null : view.down ? "descending" : "ascending"));
  paintFilters(rows.length);
  paintDrawer();
};
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
  const all = [...page.requests.values()], filtered = FILTERS.some(name => view[name]);
  choices($("by-status"), "Any outcome", Object.keys(OUTCOMES), view.status);
  choices($("by-who"), "Anybody", different(all.map(who)), view.who);
  choices($("by-model"), "Any model", different(all.map(modelOf)), view.model);
  put($("requests-note"), filtered ? `${whole(found)} of ${whole(all.length)}`
    : !all.length ? "" : canView() ? "the latest " + whole(all.length) : whole(all.length) + " of your own");
  put($("rows-empty"), filtered ? "No request fits the filter." : page.loaded ? "No request yet." : "");
  $("clear").hidden = !filtered;
  $("rows-empty").hidden = found > 0;
  $("rows-more").hidden = found <= view.rows || view.rows >= ROWS;
}

/* A select's options.  It is left alone while nothing has changed, so that an open one stays open. */
function choices(select, any, values, chosen) {
  const list = chosen && !values.includes(chosen) ? [chosen, ...values] : values;
  if (!outdated(select, [any, ...list, chosen].join("\n"))) return;
  const shown = value => value.length > 40 ? value.slice(0, 39) + "\u2026" : value;
  select.replaceChildren(...["", ...list].map(value => new Option(value ? shown(value) : any, value, false, value === chosen)));
}

// --- 14. one request, in a drawer
const drawer = {id: null, detail: null};       // which request, and the last answer about it
function openDrawer(id) {
  const open = Boolean(drawer.id);
  showDrawer(id);
  writeAddress(!open);
}
function closeDrawer() {
  if (history.state === "drawer") history.back();
  else { showDrawer(null); writeAddress(); }
}

/* Show a request, or none: as a click, the address or the Back button says. */
function showDrawer(id) {
  const before = drawer.id;
  if (id === before) return;
  Object.assign(drawer, {id, detail: null});
  if (!id) {
    $("drawer").close();
    rowNodes.get(before)?.node.focus({preventScroll: true});
    return;
  }
  paintDrawer();
  if (!$("drawer").open) $("drawer").showModal();
  $("drawer").scrollTop = 0;
  readDetail();
}
async function readDetail() {
  const {id} = drawer, detail = await get("/debug/requests/" + encodeURIComponent(id));
  if (id !== drawer.id) return;
  drawer.detail = detail?.requestId ? detail : {missing: !page.requests.has(id)};
  paintDrawer();
}
function paintDrawer() {
  if (!drawer.id) return;
  const r = {...drawer.detail, ...page.requests.get(drawer.id)}, at = view.order.indexOf(drawer.id);
  put($("drawer-title"), r.missing ? "No such request" : `${who(r)}: ${whatOf(r)}`);
  $("drawer-stop").hidden = !canStop(r);
  $("drawer-previous").disabled = at <= 0;
  $("drawer-next").disabled = at < 0 || at >= view.order.length - 1;
  if (!outdated($("drawer-body"), [drawer.id, r.version, Boolean(drawer.detail), drawer.detail?.timeline?.length].join())) return;
  const parts = r.missing ? [el("p.muted", "It is no longer among those that are kept: " + drawer.id)]
    : [waterfall, summaryOf, samplingOf, timelineOf].map(make => make(r));
  $("drawer-body").replaceChildren(...parts.filter(Boolean));
}
const section = (title, ...content) => el("section", el("h3", title), ...content);

/* The phases on one time axis, and the events as ticks below them. */
function waterfall(r) {
  const phases = phasesOf(r), total = Math.max(1, r.totalTimeMs ?? r.elapsedMs ?? 0, sum(phases.map(phase => phase.ms)));
  if (!phases.length) return null;
  let from = 0;
  const rows = phases.flatMap(({name, ms, slow}) => {
    const bar = el("i." + (STATES[name]?.[2] ?? "queued"));
    bar.style.left = 100 * from / total + "%";
    bar.style.width = 100 * Math.min(ms, total - from) / total + "%";
    from += ms;
    return [el("span", STATES[name]?.[0] ?? name), el("div.track", bar), el("span.num", span(ms) + (slow ? " \u25b2 slow" : ""))];
  });
  const ticks = el("div.track.ticks", ...(r.timeline ?? []).slice(0, 200).map(({ms, event}) => {
    const tick = el("i");
    tick.style.left = Math.min(100, 100 * ms / total) + "%";
    tick.title = `${event} after ${span(ms)}`;
    return tick;
  }));
  return section("Where the time went", el("div.fall", ...rows, el("span.muted", "events"), ticks, el("span.num.muted", span(total))));
}
function summaryOf(r) {
  const {size, used} = r.context ?? {}, cached = cachedOf(r);
  const asked = r.modelAsked && r.modelAsked !== r.model ? ` (asked for ${r.modelAsked})` : "";
  const rows = [
    ["Outcome", ...outcomeOf(r)], ["Model", modelOf(r) + asked], ["Person", r.user], ["Key", r.key], ["Client", r.client],
    ["Program", r.userAgent], ["Request", listed([[r.method, r.path].filter(Boolean).join(" "), r.stream && "streaming"])],
    ["Started", dateTime(r.startedAt)], ["Total", ended(r) && span(r.totalTimeMs)],
    ["First token", known(r.timeToFirstTokenMs) && span(r.timeToFirstTokenMs)], ["Finish", r.finishReason],
    ["Prompt", listed([known(promptOf(r)) && plural(promptOf(r), "token"), known(prefillOf(r)) && speed(prefillOf(r))])],
    ["Cached", known(cached) && plural(cached, "token") + (promptOf(r) ? ` (${percent(100 * cached / promptOf(r))})` : "")],
    ["Written", listed([known(outputOf(r)) && outputText(r) + " tokens", known(decodeOf(r)) && speed(decodeOf(r)),
      r.reasoningTokens && tokens(r.reasoningTokens) + " of them reasoning"])],
    ["Context", known(size) && `${tokens(used)} of ${tokens(size)} tokens`],
    ["Log", r.binding !== "exact" ? "not matched to the log"
      : "matched to the log: exact" + (/^\d/.test(r.boundBy) ? ` (by ${r.boundBy})` : "")],
    ["Id", r.requestId],
  ];
  return el("dl.facts", ...r.error ? [fact("Reason", r.error)] : [],
    ...rows.filter(([, value]) => value).map(([term, ...value]) => fact(term, ...value)));
}
function samplingOf(r) {
  const rows = Object.entries(r.sampling ?? {}).filter(([, value]) => known(value));
  return rows.length && section("Sampling", el("dl.facts", ...rows.map(([name, value]) => fact(name, words(value)))));
}
function timelineOf(r) {
  const rows = Array.isArray(drawer.detail?.timeline) ? drawer.detail.timeline.slice(-ROWS) : [];
  if (!rows.length) return section("Events", el("p.muted", drawer.detail ? "No event was matched with this request." : "\u2026"));
  return section("Events", el("table.timeline", el("thead", el("tr", ...["After", "Event", "Says"].map(text => heading(text)))),
    el("tbody", ...rows.map(({ms, event, data}) => el("tr", el("td.num", span(ms)), el("td.small.muted", event),
      el("td.isolate", EVENTS[event]?.[2](data ?? {}) ?? words(data?.message)))))));
}

// --- 15. the event log
const logView = {needle: "", pattern: null, kind: "", raw: false, follow: true, top: 0, painted: 0};
function fitsLog({name, data, gone}) {
  const {needle, pattern, kind, raw} = logView, [kindOf] = EVENTS[name];
  if (gone || kindOf === "raw" && !raw) return false;
  if (kind && kindOf !== kind && !(kind === "errors" && data.level === "ERROR") && !(kind === "requests" && name === "error")) return false;
  if (!pattern && !needle) return true;
  const text = [name, data.requestId, EVENTS[name][2](data)].join(" ");
  return pattern ? pattern.test(text) : text.toLowerCase().includes(needle);
}

/* Append what is new, and let go of the oldest.  While the reader has let go, only count. */
PANELS.log = () => {
  const box = $("log-lines"), {events} = page, fresh = [];
  for (let at = events.length - 1; events[at]?.n > logView.painted && fresh.length < ROWS; at -= 1) {
    if (fitsLog(events[at])) fresh.unshift(events[at]);
  }
  $("log-newer").hidden = logView.follow || !fresh.length;
  put($("log-newer"), whole(fresh.length) + (fresh.length === ROWS ? "+" : "") + " newer \u2193");
  if (!logView.problem) put($("log-note"), listed([plural(page.total, "event"), page.missed && whole(page.missed) + " missed"]));
  if (!logView.follow || !fresh.length) return;
  logView.painted = page.total;
  box.append(...fresh.map(logLine));
  for (let surplus = box.children.length - ROWS; surplus > 0; surplus -= 1) box.firstChild.remove();
  box.scrollTop = box.scrollHeight;
  logView.top = box.scrollTop;
};
function logLine(entry) {
  const {name, data} = entry, stamp = String(data.timestamp ?? ""), [kind, tone, sentence] = EVENTS[name];
  const colour = name === "inference_progress" ? stateOf(data)[2] : LEFT.includes(data.operation) ? "warn"
    : {ERROR: "error", WARN: "warn"}[data.level] ?? tone;
  const icon = {prefill: "prefill", decode: "decode", ok: "ok", error: "error", warn: "warn"}[colour];
  const node = name === "gap" ? el("li.cut", `\u2014 ${sentence(data)} \u2014`)
    : el(kind === "raw" ? "li.raw" : "li", el("span.muted", stamp.endsWith("Z") ? clockTime(Date.parse(stamp)) : stamp.slice(11, 19)),
      icon ? mark(icon, colour) : el("span"), el("span.isolate" + (colour === "error" || colour === "warn" ? "." + colour : ""),
        sentence(data)));
  if (data.requestId) node.dataset.id = data.requestId;
  entry.node?.remove();     // the same request's line before it
  entry.node = node;
  return node;
}

/* Paint the log anew, after a filter has changed. */
function relog(changes = {}) {
  Object.assign(logView, {painted: 0}, changes);
  $("log-lines").replaceChildren();
  for (const entry of page.events) entry.node = null;
  follow(true);
}
function follow(is) {
  logView.follow = is;
  $("log-follow").setAttribute("aria-pressed", is);
  paint("log");
}

/* LM Studio's own lines come only when asked for: they are most of the stream. */
function showRaw() {
  logView.raw = !logView.raw;
  $("log-raw").setAttribute("aria-pressed", logView.raw);
  const [epoch, seq] = stream.last.split("-");
  if (logView.raw && epoch) {
    stream.last = `${epoch}-${Math.max(0, seq - AT_FIRST())}`;
    page.events = page.events.filter(({id}) => Number(String(id).split("-")[1]) <= seq - AT_FIRST());
    folds.clear();
  }
  relog();
  stream.open();
}
function onLogFilter() {
  const given = $("log-filter").value, asked = /^\/(.+?)(?:\/(i?))?$/.exec(given);
  let pattern = null;
  logView.problem = "";
  try { pattern = asked && new RegExp(asked[1], asked[2]); } catch (error) {
    logView.problem = "No such pattern: " + error.message.replace(/^.*: /, "");
    put($("log-note"), logView.problem);
  }
  attribute($("log-filter"), "aria-invalid", logView.problem ? "true" : null);
  if (!logView.problem) relog({pattern, needle: pattern ? "" : given.toLowerCase()});
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

// --- 16. server facts, and the title
PANELS.server = () => {
  if (!page.status) return;
  const {version, uptime, totalRequests, totalErrors, totalAbandoned, gateway = {}, log = {}, stream: listeners = {}} = page.status;
  const counts = of => listed(Object.entries(of ?? {}).map(([name, n]) => name + " " + whole(n))) || NONE;
  const samples = Array.isArray(log.unknownSamples) ? log.unknownSamples.slice(0, 3) : [];
  const key = JSON.stringify([page.status, page.total]);
  if (!outdated($("facts"), key)) return;
  const rows = [
    ["Gateway", "lmgateway " + words(version)],
    ["Address", words(gateway.address)],
    ["LM Studio", words(gateway.upstream)],
    ["Key", gateway.keyNeeded ? "asked for" : "none is asked for"],
    ["Up for", known(uptime) ? running(1000 * uptime) : NONE],
    ["Requests", listed([tokens(totalRequests), tokens(totalErrors) + " failed", known(totalAbandoned) && tokens(totalAbandoned) + " stopped"])],
    ["Listeners", listed([tokens(listeners.clients), tokens(listeners.dropped) + " events dropped"])],
    ["This page", listed([plural(page.total, "event"), page.missed && whole(page.missed) + " missed", stream.breaks && plural(stream.breaks, "break")])],
    ["Log size", listed([bytes(log.directoryBytes), known(log.growthBytesPerDay) && bytes(log.growthBytesPerDay) + " a day"])],
    ["Free disk", bytes(log.freeBytes)], ["Last entry", dateTime(log.lastEntryAt)],
    ["Read", `${bytes(log.position)} of ${bytes(log.size)}`],
    ["Engines", counts(log.generations)], ["Unknown lines", tokens(log.unknownLines)],
    ["Matched", counts(page.status.bindings)],
  ].map(([term, text]) => fact(term, text));
  const wide = lanUrls().map(url => fact("From the LAN", url + " ", button("Copy", event => copy(url, event.currentTarget), "button.quiet")));
  wide.push(fact("Log file", words(log.file ?? log.directory)));
  if (samples.length) wide.push(fact("Not understood", ...samples.map(sample => el("div.mono", String(sample).slice(0, 80)))));
  for (const row of wide) row.classList.add("whole");
  $("facts").replaceChildren(...rows, ...wide);
  put($("version"), "lmgateway " + words(version));
};
PANELS.title = () => {
  const active = runningOnes().filter(r => !inLine(r)), left = active.map(leftOf).filter(known);
  const says = left.length ? running(Math.min(...left)) : `${active.length} running`;
  document.title = (active.length ? says + " \u00b7 " : "") + "lmgateway" + (page.status?.gateway?.demo ? " DEMO" : "");
};

// --- 17. controls
function setTheme(chosen) {
  applyTheme(chosen);
  put($("theme"), "\u25d0 " + ({light: "Light", dark: "Dark"}[chosen] ?? "Auto"));
  store("theme", chosen);
}
function pause(is) {
  page.paused = is;
  $("pause").setAttribute("aria-pressed", is);
  put($("pause"), is ? "Resume" : "Pause");
  paint(...is ? ["header"] : Object.keys(PANELS));
}

/* To the next row of the table, or the one before; in the drawer, to its request. */
function step(by) {
  const focused = document.activeElement.closest?.("#rows tr"), at = view.order.indexOf(drawer.id ?? focused?.dataset.id);
  const next = view.order[at < 0 ? 0 : at + by];
  if (drawer.id && next) openDrawer(next);
  else rowNodes.get(next)?.node.focus();
}
const KEYS = {
  "/": () => $("filter").focus(),
  p: () => pause(!page.paused),
  j: () => step(1),
  k: () => step(-1),
  "?": () => $("help").showModal(),
};
function onKey(event) {
  const {key, target} = event, row = target.closest?.("#rows tr");
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(target.tagName)) return;
  const act = row && {Enter: () => openDrawer(row.dataset.id), ArrowDown: KEYS.j, ArrowUp: KEYS.k}[key]
    || $("keys-on").checked && KEYS[key];
  if (!act) return;
  event.preventDefault();
  act();
}

/* The page is seen again, or the network is back. */
function onReturn() {
  if (document.hidden || page.signedOut || !stream.source) return;
  if (!live()) stream.open();
  wantStatus();
  wantRequests();
  wantFigures();
  paintAll();
}
function listen() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("login", "submit", logIn);
  on("logout", "click", logOut);
  on("theme", "click", () => setTheme({auto: "light", light: "dark"}[stored("theme", "auto")] ?? "auto"));
  on("pause", "click", () => pause(!page.paused));
  on("notify", "click", askNotify);
  on("filter", "input", event => refilter({text: event.target.value}));
  for (const name of ["status", "who", "model"]) on("by-" + name, "change", event => refilter({[name]: event.target.value}));
  on("clear", "click", () => {
    $("filter").value = "";
    refilter(Object.fromEntries(FILTERS.map(name => [name, ""])));
  });
  on("rows-more", "click", () => refilter({rows: Math.min(ROWS, view.rows + 50)}));
  on("newer", "click", () => {
    $("requests").scrollIntoView();
    paint("requests");
  });
  for (const name of ["rows", "log-lines"]) {
    on(name, "click", event => {
      const id = event.target.closest("[data-id]")?.dataset.id;
      if (id && !String(getSelection())) openDrawer(id);
    });
  }
  on("drawer-close", "click", closeDrawer);
  on("drawer", "cancel", event => {
    event.preventDefault();
    closeDrawer();
  });
  on("drawer", "click", event => { if (event.target === $("drawer")) closeDrawer(); });
  on("drawer-previous", "click", () => step(-1));
  on("drawer-next", "click", () => step(1));
  on("drawer-stop", "click", event => stop(page.requests.get(drawer.id), event.currentTarget));
  on("drawer-copy", "click", event =>
    copy(JSON.stringify(drawer.detail ?? page.requests.get(drawer.id), null, 2), event.currentTarget));
  addEventListener("popstate", () => showDrawer(new URLSearchParams(location.search).get("request")));
  on("help-close", "click", () => $("help").close());
  on("keys-on", "change", event => store("keys", event.target.checked ? "on" : "off"));
  on("log-filter", "input", onLogFilter);
  on("log-kind", "change", event => relog({kind: event.target.value}));
  on("log-raw", "click", showRaw);
  on("log-follow", "click", () => follow(!logView.follow));
  on("log-newer", "click", () => follow(true));
  on("log-save", "click", () => save("lmgateway-events.jsonl", "application/x-ndjson",
    page.events.map(({id, name, data}) => JSON.stringify({id, event: name, data}) + "\n")));
  on("log-lines", "scroll", onLogScroll);
  document.addEventListener("selectionchange", onSelection);
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", onReturn);
  for (const event of ["online", "pageshow"]) addEventListener(event, onReturn);
  let sized = 0;
  addEventListener("resize", () => {
    clearTimeout(sized);
    sized = setTimeout(() => paint("figures"), 150);
  });
  addEventListener("scroll", () => { if (view.since !== null) dirty.add("requests"); }, {passive: true});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme(stored("theme", "auto")));
}

/* Once a second: what changes by itself. */
function tick() {
  stream.watch();
  if (document.hidden || page.signedOut) return;
  const active = runningOnes(), moment = Date.now();
  dirty.add("now").add("header");
  if (active.length) dirty.add("requests").add("title");
  if (live() && moment - (stream.answered ?? 0) > 5000) { wantStatus(); wantModels(); }
  if (moment - (figures.read ?? 0) > (minutesOf() < 1000 ? 15000 : 60000)) wantFigures();
  if (active.some(r => r.requestId === drawer.id)) readDetail();
}

choices($("log-kind"), "All events", ["requests", "LM Studio", "errors"], "");
$("keys-on").checked = stored("keys", "on") === "on";
attribute($("notify"), "aria-pressed", stored("notify", "off") === "on");
setTheme(stored("theme", "auto"));
makeTable();
readAddress();
showRanges();
listen();
paintAll();
setInterval(tick, 1000);
setInterval(() => requestAnimationFrame(paintDirty), 250);
begin();
</script>
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
