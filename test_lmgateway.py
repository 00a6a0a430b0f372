#!/usr/bin/env python3
"""Tests of lmgateway, in the order of its sections.

`python3 test_lmgateway.py` runs them all; where pytest is missing it first makes a .venv beside this
file and installs it there.  No test sleeps to pace itself: PATIENCE_S only bounds a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
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
from lmgateway import Event, Parser  # noqa: E402

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


# --- 9.2 cards and the screen

def card_events(*rows, request=True):
    """Events from (name, data) rows, of one request of the gateway or of one chat of the log."""
    chat = None if request else lmgateway.Chat(1, None)
    return [Event(name, {**({"requestId": "req_1"} if request else {}), **data}, chat) for name, data in rows]


def cards_after(events, now=61.0, columns=120, rows=24, marks="#."):
    """The lines of cards that took events, one a second from second 0 on."""
    cards = lmgateway.Cards(marks)
    for second, event in enumerate(events):
        cards.take(event, float(second))
    return cards.lines(now, columns, rows)


PREFILL = (("lmstudio_chat_start", {"messages": 2, "model": "qwen3-8b"}),
           ("lmstudio_token_info", {"totalPromptTokens": 1000, "n_ctx": 4096}),
           ("lmstudio_cache_stats", {"reused": 200, "total": 1000}),
           ("lmstudio_prompt_progress", {"progress": 20.0, "model": "qwen3-8b"}),
           ("lmstudio_prompt_progress", {"progress": 30.0, "model": "qwen3-8b"}))
SPOKEN = (("lmstudio_prompt_progress", {"progress": 100.0}), ("lmstudio_generation_start", {}))
GATEWAY = {"requestId": "req_1", "state": "prompt", "percent": 41.2, "promptTokens": 14906, "promptTokensRead": 6144,
           "promptTokensPerSecond": 101.0, "etaMs": 87000, "elapsedMs": 61000, "model": "m", "cachedTokens": 0}

CARDS = [  # what happened, the lines of the cards at second 5
    (card_events(*PREFILL, request=False),
     ["qwen3-8b", "PREFILL  ######..............   30 %  300/1,000 tok  100 tok/s  elapsed 5s  eta 6s",
      "cache    200 of 1,000 prompt tokens reused (20 %)  context 1,000 of 4,096"]),
    (card_events(*PREFILL[:1], *SPOKEN, request=False), ["qwen3-8b", "WRITE  for 3s  elapsed 5s"]),
    (card_events(*PREFILL[:1], *SPOKEN[::-1], request=False), ["qwen3-8b", "WRITE  for 4s  elapsed 5s"]),
    (card_events(*PREFILL, ("lmstudio_chat_end", {"outcome": "finished"}), request=False), []),
    (card_events(PREFILL[0], ("lmstudio_chat_end", {}), PREFILL[3], ("lmstudio_prediction_stats", {}), request=False), []),
    (card_events(PREFILL[3], ("lmstudio_prediction_stats", {"completionTokens": 3}), request=False), []),
    (card_events(("inference_start", {"model": "m", "path": "/v1/chat/completions", "client": "10.0.0.7", "key": "anna"})),
     ["m  anna  10.0.0.7  /v1/chat/completions", "WAIT  waiting  elapsed 5s"]),
    (card_events(("inference_start", {"model": "m"}), ("lmstudio_chat_end", {"outcome": "finished"})),
     ["m", "WAIT  waiting  elapsed 5s"]),
    (card_events(("inference_start", {"model": "m"}), ("inference_complete", {})), []),
    (card_events(("inference_start", {"model": "m"}), ("error", {}), ("inference_progress", GATEWAY)), []),
    (card_events(("inference_progress", GATEWAY)),
     ["m", "PREFILL  ########............   41 %  6,144/14,906 tok  101 tok/s  elapsed 1m06s  eta 1m22s",
      "cache    0 of 14,906 prompt tokens reused (0 %)"]),
    (card_events(("inference_progress", {"state": "generating", "outputTokens": 1312, "outputTokensPerSecond": 17.84})),
     ["(model not named)", "WRITE  1,312 tok  17.8 tok/s  for 5s  elapsed 5s"]),
    (card_events(("inference_progress", {**{name: "x\x1b[2J" for name in GATEWAY}, "requestId": "req_1"})),
     ["x\\x1b[2J", "WAIT  x\\x1b[2J  elapsed 5s"]),
    (card_events(("inference_progress", {**{name: float("nan") for name in GATEWAY}, "requestId": "req_1"})), ["(model not named)", "WAIT  waiting  elapsed 5s"]),
]


@pytest.mark.parametrize("number", range(len(CARDS)))
def test_cards_show_what_each_running_request_does(number):
    events, lines = CARDS[number]
    assert cards_after(events, now=5.0) == lines


def test_cards_never_need_more_room_than_the_terminal_has():
    events = [Event("inference_start", {"requestId": f"req_{number}", "model": "界" * number + "\u202e"}) for number in range(9)]
    for rows in (-1, 0, 1, 2, 3, 7, 50):
        for columns in (-1, 1, 2, 9, 80):
            lines = cards_after(events, columns=columns, rows=rows)
            assert len(lines) <= max(0, rows)
            assert all(lmgateway.width_of(line) <= max(1, columns) and "\u202e" not in line for line in lines)
    assert cards_after(events, rows=7)[-1] == "and 6 more running"
    assert cards_after(events, now=lmgateway.STALE_S + 10) == []


class Terminal:
    """A terminal that knows what Printer writes: line feeds, going up, clearing below, colours."""

    encoding = "utf-8"

    def __init__(self):
        self.rows, self.at = [""], 0

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
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
    for name, value in {"COLUMNS": "100", "LINES": "20", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_on_a_terminal_lines_scroll_above_cards_that_are_redrawn_in_place(terminal):
    printer = lmgateway.Printer(terminal, as_json=False, names=(), live=True)
    for event in card_events(*PREFILL, request=False):
        printer([event])
    printer([Event("lmstudio_log", {"timestamp": "2026-09-01 10:00:00", "level": "INFO", "tags": [],
                                    "message": "[qwen3-8b] Prompt processing progress: 30.0%"})])
    names = [line[10:].split()[0] for line in terminal.rows[:3]]
    assert names == ["chat_start", "token_info", "cache_stats"]
    assert terminal.rows[3] == "qwen3-8b" and terminal.rows[4].startswith("PREFILL") and len(terminal.rows) == 7
    printer.finish()
    assert terminal.rows[3:] == [""]
    printer(card_events(("lmstudio_chat_end", {"outcome": "finished", "message": "m"}), request=False))
    assert [line[10:].split()[0] for line in terminal.rows[:-1]] == [*names, "chat_end"]


def test_replayed_logs_and_dumb_terminals_get_plain_lines(terminal, monkeypatch):
    for live, term in ((False, "xterm"), (True, "dumb")):
        monkeypatch.setenv("TERM", term)
        out = Terminal()
        lmgateway.Printer(out, as_json=False, names=(), live=live)(card_events(*PREFILL, request=False))
        assert len(out.rows) == len(PREFILL) + 1


def test_a_narrower_terminal_rubs_out_all_rows_of_the_cards():
    size = os.terminal_size
    assert lmgateway.rubbed_out([], size((80, 24))) == ""
    assert lmgateway.rubbed_out(["x" * 60, ""], size((80, 24))) == "\r\x1b[2A\x1b[J"
    assert lmgateway.rubbed_out(["x" * 60, ""], size((20, 24))) == "\r\x1b[4A\x1b[J"
    assert lmgateway.rubbed_out(["界" * 30] * 9, size((20, 5))) == "\r\x1b[4A\x1b[J"


@pytest.mark.parametrize(("encoding", "marks"), [("utf-8", "█░"), ("cp1252", "#."), ("ascii", "#."), (None, "#.")])
def test_bars_are_made_of_what_the_terminal_can_show(encoding, marks):
    assert lmgateway.bar_marks(encoding) == marks


# --- 9.3 --watch

@contextlib.contextmanager
def stream_server(hub, port=0, **options):
    """A gateway that serves hub's events; gives its port."""
    config = lmgateway.Config(port=port, **options)
    gateway = lmgateway.Gateway(config, hub, lmgateway.Upstream("http://127.0.0.1:9"))
    server = lmgateway.Server(gateway, "127.0.0.1", port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.port
    finally:
        hub.close()
        server.shutdown()
        server.finish_requests(PATIENCE_S)
        server.server_close()
        thread.join(PATIENCE_S)
        hub._closed = False


class Reached(Exception):
    """Ends a StreamLine once it has brought what a test waits for."""


def brought(url, until, wait=lambda seconds: True, key=None, since=None):
    """What a StreamLine hands over up to the first item for which until is true."""
    found = []

    def take(item):
        found.append(item)
        if until(item):
            raise Reached

    with contextlib.suppress(Reached):
        lmgateway.StreamLine(lmgateway.watched_address(url), key, since).run(take, wait)
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
                hub.tell("later")           # while nobody listens
            elif len(pauses) == 3:
                servers.enter_context(stream_server(hub, port))
            elif len(pauses) == 4:
                servers.close()
                new = lmgateway.Hub()
                new.tell("end")
                servers.enter_context(stream_server(new, port))
            return False

        def seen(item):
            if named("connected")(item) and not pauses:
                hub.tell("first")
            elif named("first")(item) or named("later")(item):
                servers.close()
            return named("end")(item)

        found = brought(f"127.0.0.1:{port}", seen, go_on)
    events = [item for item in found if isinstance(item, tuple)]
    assert [event.name for _, event in events] == ["connected", "first", "connected", "later", "connected", "gap", "end"]
    assert [event_id for event_id, _ in events[:4]] == [hub.event_id(seq) for seq in (0, 1, 1, 2)]
    assert events[5][1].data["count"] is None
    assert pauses == [1, 2, 4, 1]
    assert all("trying again in" in item for item in found if isinstance(item, str))


def test_watch_from_the_start_brings_what_the_ring_holds_and_leaves_pings_out(monkeypatch):
    monkeypatch.setattr(lmgateway, "PING_S", 0.01)
    hub = lmgateway.Hub()
    hub.tell("old")
    with stream_server(hub) as port:
        threading.Timer(0.1, hub.tell, ("new",)).start()
        found = brought(f"http://127.0.0.1:{port}/debug/stream", named("new"), since="0")
    assert [event.name for _, event in found] == ["connected", "old", "new"]


@pytest.mark.parametrize(("key", "said"), [(None, "--api-key KEY"), ("wrong", "another key")])
def test_watch_without_the_right_key_ends_with_the_remedy(key, said):
    with stream_server(lmgateway.Hub(), api_key={"anna": "right"}) as port:
        (error,) = brought(f"127.0.0.1:{port}", lambda item: True, key=key)
        assert (error.exit_status, said in str(error), "401" in str(error)) == (1, True, True)
        assert named("connected")(brought(f"127.0.0.1:{port}", lambda item: True, key="right")[0])


def test_watch_of_lm_studio_itself_is_a_wrong_address(tmp_path):
    demo = lmgateway.DemoServer(str(tmp_path))
    demo.start()
    try:
        (error,) = brought(demo.url, lambda item: True)
    finally:
        demo.stop()
    assert isinstance(error, lmgateway.ConfigError) and "no lmgateway" in str(error)


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "http://h:0", "http://h:x", "http://a b", "http://h:1/\x07",
                                  "http://" + "x" * 64, "http://[::1"])
def test_watch_refuses_what_is_no_address(text):
    with pytest.raises(lmgateway.ConfigError, match="--watch"):
        lmgateway.watched_address(text)


@pytest.mark.parametrize(("text", "url"), [
    ("192.168.1.20:8001", "http://192.168.1.20:8001/debug/stream"), ("http://h/", "http://h/debug/stream"),
    ("https://h/llm/?x=1#y", "https://h/llm/debug/stream"), ("h:1/debug/stream", "http://h:1/debug/stream"),
    ("http://[::1]:8001", "http://[::1]:8001/debug/stream")])
def test_watch_takes_an_address_as_people_type_it(text, url):
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


# === 10. DASHBOARD ===========================================================


# === What the one file keeps apart ===========================================
