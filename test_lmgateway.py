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


# --- 3.8 the join


class Office:
    """Requests and a log, played in turn: ask(), log() and over() are what the gateway would see."""

    def __init__(self, at="2026-11-24 10:00:00"):
        self.requests, self.parser = lmgateway.Requests("e", 100), Parser()
        self.clock, self.stamp = 100.0, at
        self.events = []

    @property
    def epoch(self):
        return lmgateway.Calendar().moment(self.stamp).epoch

    def ask(self, name, model="m/one", messages=1, body=None, **about):
        """A request goes to LM Studio; body is the JSON that it asks with."""
        about = {"dialect": "chat", "target": "/v1/chat/completions", "stream": True, **about}
        record = lmgateway.Record(name, self.epoch + 0.4, self.clock, model_asked=model, messages=messages,
                                  fingerprint=body and lmgateway.fingerprint(body), **about)
        self.requests.begin(record)
        return record

    def log(self, *entries, level="INFO"):
        """Entries of one second; a line that names its level begins with [."""
        lines = [f"[{self.stamp}]{entry}" if entry.startswith("[") else f"[{self.stamp}][{level}] {entry}"
                 for entry in entries]
        events = self.parser.feed("".join(line + "\n" for line in lines).encode()) + self.parser.quiet()
        self.requests.see(events, self.clock)
        self.events += events
        return events

    def over(self, record, prompt=None, completion=5, state="done", **answer):
        """The answer is over; prompt and completion are its usage, without prompt it had none."""
        meter = lmgateway.Meter(lmgateway.DIALECTS["/v1/chat/completions"], False)
        usage = {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}} if prompt else {}
        meter.feed(json.dumps({**answer, **usage}).encode(), self.clock)
        meter.end()
        self.requests.over(record, self.clock, lmgateway.Outcome(state, 200, meter=meter))

    def told(self, record):
        """Names of the typed events that carry a request's id, in order."""
        return [event.name for event in self.events
                if event.data.get("requestId") == record.id and event.name != "lmstudio_log"]

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


def engine_run(task, prompt, cached=0):
    """What G3 writes before it reads a prompt."""
    slot = f"1.02.003.004 I slot   operator(): id  {task % 4} | task {task} | "
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


def test_a_logged_copy_of_the_request_binds_it_at_once_and_every_event_carries_its_id(utc):
    office = Office()
    long = "A long question about lighthouses. " * 20
    record = office.ask("r1", body=chat_body(long))
    logged = chat_body(f"{long[:50]}... <Truncated in logs> ...{long[-50:]}")
    office.log(received(logged), running("m/one"), streaming("m/one"))
    assert record.binding == "exact"
    office.log(engine_run(7, 900, 300), percent("m/one", 0), percent("m/one", 100), engine_end(7, 600, 50),
               finished("m/one"))
    typed = [event.name for event in office.events if event.name != "lmstudio_log"]
    assert office.told(record) == typed
    assert {"lmstudio_cache_stats", "lmstudio_prediction_stats", "lmstudio_chat_end"} <= set(typed)
    assert (record.cache["reused"], record.context_size) == (300, 8192)


@pytest.mark.parametrize("text", ["short", "x" * 100, "y" * 101, "ä" * 120, "z" * 121, "😀" * 70, "a" + "😀" * 70])
def test_a_prompt_and_its_logged_copy_have_one_fingerprint(text):
    units = text.encode("utf-16-le")
    cut = text if len(units) <= 240 else (units[:100].decode("utf-16-le", "replace") + "... <Truncated in logs> ..."
                                          + units[-100:].decode("utf-16-le", "replace"))
    assert lmgateway.fingerprint(chat_body(text)) == lmgateway.fingerprint(chat_body(cut))
    assert lmgateway.fingerprint(chat_body(text)) != lmgateway.fingerprint(chat_body(text + "!"))


def test_two_models_at_once_are_told_apart_without_any_body(utc):
    office = Office()
    one, two = office.ask("r1", "m/one"), office.ask("r2", "m/two")
    office.log(running("m/two"), streaming("m/two"))
    office.log(running("m/one"), streaming("m/one"))
    assert (one.chat.model, two.chat.model) == ("m/one", "m/two")
    office.log(percent("m/two", 10), percent("m/one", 20), percent("m/one", 100), finished("m/one"))
    assert office.told(one)[-1] == "lmstudio_chat_end"
    assert [event.data["progress"] for event in office.events
            if event.name == "lmstudio_prompt_progress" and event.data["requestId"] == "r2"] == [10.0]


def test_four_clients_of_one_model_are_told_apart_by_their_messages(utc):
    office = Office()
    records = {count: office.ask(f"r{count}", messages=count) for count in (3, 1, 4, 2)}
    for count in (1, 2, 3, 4):
        office.log(running("m/one", count), streaming("m/one"))
    assert all(record.chat.messages == count for count, record in records.items())
    office.log(percent("m/one", 50), finished("m/one"))     # whose, nobody can say
    assert [event.data.get("requestId") for event in office.events[-4:]] == [None] * 4


def test_what_two_requests_may_have_caused_is_nobodys(utc):
    office = Office()
    office.ask("r1"), office.ask("r2")
    office.log(running("m/one"), streaming("m/one"), running("m/one"), streaming("m/one"))
    office.log(percent("m/one", 40), finished("m/one"))
    assert office.claimed() == set()


def test_the_prompts_tokens_bind_in_the_end_what_could_not_be_told_apart(utc):
    office = Office()
    one, two = office.ask("r1"), office.ask("r2")
    office.log(running("m/one"), streaming("m/one"))
    office.log(engine_run(1, 500))
    office.log(running("m/one"), streaming("m/one"))
    office.log(engine_run(2, 700))
    office.over(one, prompt=700)
    office.over(two, prompt=500)
    assert (one.chat.total, two.chat.total) == (700, 500)
    assert {one.binding, two.binding} == {"exact"}


def test_a_request_sent_after_the_chats_line_did_not_cause_it(utc):
    office = Office()
    one = office.ask("r1")
    office.log(running("m/one"))
    two = office.ask("r2")
    office.log(running("m/one"))
    assert one.chat.number < two.chat.number


def test_a_chat_of_a_client_beside_us_is_lm_studios_own(utc):
    office = Office()
    office.log(running("m/one", 2), streaming("m/one"), percent("m/one", 100), finished("m/one"))
    assert office.claimed() == set()
    [record] = office.requests.finished
    assert (record.source, record.state, record.model) == ("lmstudio", "done", "m/one")


def test_a_client_beside_us_with_the_same_shape_is_told_apart_by_its_prompt(utc):
    office = Office()
    ours = office.ask("r1", body=chat_body("What is a fjord?"))
    office.log(received(chat_body("Other people's question")), running("m/one"), streaming("m/one"))
    assert office.claimed() == set()
    office.log(received(chat_body("What is a fjord?")), running("m/one"), streaming("m/one"))
    assert ours.binding == "exact"


def test_a_twin_that_turns_up_lets_a_likely_binding_go(utc):
    office = Office()
    ours = office.ask("r1")
    office.log(running("m/one"))
    assert ours.binding == "likely"
    office.log(running("m/one"))
    office.log(percent("m/one", 10))
    assert (ours.binding, office.events[-1].data.get("requestId")) == ("none", None)


def test_an_in_app_chat_is_not_taken_for_a_waiting_request_that_has_its_engine(utc):
    office = Office()
    ours = office.ask("r1")
    office.log(running("m/one"), streaming("m/one"), engine_run(1, 500), percent("m/one", 0))
    office.log(engine_run(2, 90), engine_end(2, 90, 9))
    office.log(percent("m/one", 100), engine_end(1, 500, 20), finished("m/one"))
    stats = [event.data for event in office.events if event.name == "lmstudio_prediction_stats"]
    assert [(row["promptTokens"], row.get("requestId")) for row in stats] == [(90, None), (500, "r1")]
    assert [record.source for record in office.requests.finished] == ["lmstudio"]
    assert ours.usage["promptTokens"] == 500


@pytest.mark.parametrize("served, bound", [("m/one", True), (None, True), ("m/two", False)],
                         ids=["known", "never seen", "known as another"])
def test_an_unknown_name_can_be_answered_by_any_model_and_a_known_one_by_none_but_its_own(utc, served, bound):
    office = Office()
    if served:
        earlier = office.ask("r0", "alias")
        office.over(earlier, prompt=3, model=served)
        office.clock += 60
    record = office.ask("r1", "alias")
    office.log(running("m/one"))
    assert (record.chat is not None) is bound


def test_an_answer_of_another_prompt_unbinds(utc):
    office = Office()
    record = office.ask("r1")
    office.log(running("m/one"), streaming("m/one"), engine_run(1, 500, 100))
    assert record.binding == "likely"
    office.over(record, prompt=77)
    assert (record.binding, record.cache) == ("none", None)
    assert "cachedTokens" not in record.usage


def test_an_answer_of_the_same_prompt_proves_a_likely_binding(utc):
    office = Office()
    record = office.ask("r1")
    office.log(running("m/one"), streaming("m/one"), engine_run(1, 500, 100))
    office.over(record, prompt=500)
    assert (record.binding, record.usage["cachedTokens"]) == ("exact", 100)


def test_what_an_abandoned_request_cost_comes_from_the_log(utc):
    office = Office()
    record = office.ask("r1")
    office.log(running("m/one"), streaming("m/one"), engine_run(1, 500, 100), percent("m/one", 100))
    office.over(record, state="abandoned")
    assert record.usage is None
    office.log(engine_end(1, 400, 12), finished("m/one"))
    assert (record.usage["promptTokens"], record.usage["completionTokens"]) == (500, 12)
    assert record in office.requests.changed


def test_embeddings_are_not_taken_for_chats(utc):
    office = Office()
    office.ask("r1", dialect="embeddings", target="/v1/embeddings", messages=None, stream=False)
    office.log(running("m/one"))
    assert office.claimed() == set()


def test_bindings_are_counted_when_a_request_is_over_for_good(utc):
    office = Office()
    bound, lost = office.ask("r1"), office.ask("r2", messages=9)
    office.log(running("m/one"))
    office.over(bound)
    office.over(lost)
    assert office.requests.bound() == {"exact": 0, "likely": 1, "none": 1}
    office.clock += lmgateway.LATE_S + 1
    office.log("Server started.")
    assert office.requests.bound() == {"exact": 0, "likely": 1, "none": 1}
    assert not office.requests._open


ONE_CHAT = [path for path in SAMPLES
            if path.read_bytes().count(b"Running chat completion") == 1 and path.stem != "gui-paste"]


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
    for piece in (data[place:place + 97] for place in range(0, len(data), 97)):
        events = office.parser.feed(piece)
        office.requests.see(events, office.clock)
        office.events += events
    events = office.parser.end()
    office.requests.see(events, office.clock)
    typed = [event for event in office.events + events if event.name not in ("lmstudio_log", "lmstudio_error")]
    assert [event.name for event in typed if event.data.get("requestId") != "r1"] == []


# --- 3.7 the life of a request


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
    record.generated(10, office.clock, office.clock)
    office.clock += 4
    assert record.progress(office.clock)["outputTokensPerSecond"] == 2.5
    office.over(record, prompt=1000, completion=24)
    assert [(phase["name"], phase["ms"], phase["slow"]) for phase in record.phases(office.clock)] == [
        ("waiting", 0, False), ("loading", 3000, True), ("queued", 500, False), ("prompt", 4000, True),
        ("generating", 4000, True)]
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
    figures = lmgateway.Figures()
    for number in range(lmgateway.SERIES + 50):
        record = lmgateway.Record(f"r{number}", 0, 0, model_asked=f"invented-{number}", target="/v1/made-up")
        record.end(1, lmgateway.Outcome("failed", 404, "no", "upstream_error"))
        figures.count_request(record)
        figures.count_event(Event("lmstudio_cache_stats", {"model": f"tag-{number}", "reused": 1}))
    requests = [line for line in exposition(figures) if line.startswith("lmstudio_gateway_requests_total{")]
    assert requests == ['lmstudio_gateway_requests_total{key="none",model="other",endpoint="other",code="404"} '
                        f"{lmgateway.SERIES + 50}"]
    cached = [line for line in exposition(figures) if line.startswith("lmstudio_cached_input_tokens_total{")]
    assert len(cached) == lmgateway.MODELS + 1


def test_histograms_are_cumulative_and_labels_escaped():
    figures = lmgateway.Figures()
    for value in (0.05, 0.3, 9999):
        figures.observe("lmstudio_time_to_first_token_seconds", value, 'a"b\\c\nd')
    text = exposition(figures)
    label = r'model="a\"b\\c\nd"'
    assert f'lmstudio_time_to_first_token_seconds_bucket{{{label},le="0.05"}} 1' in text
    assert f'lmstudio_time_to_first_token_seconds_bucket{{{label},le="0.5"}} 2' in text
    assert f'lmstudio_time_to_first_token_seconds_bucket{{{label},le="+Inf"}} 3' in text
    assert f'lmstudio_time_to_first_token_seconds_count{{{label}}} 3' in text


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


# --- 4.2 history


def finished_record(name="r1", started=1_700_000_000.0, **about):
    record = lmgateway.Record(name, started, 0.0, key="anna", client="192.168.1.7", path="/v1/chat/completions",
                              model_asked="m/one", stream=True, **about)
    meter = lmgateway.Meter(lmgateway.DIALECTS["/v1/chat/completions"], False)
    meter.feed(json.dumps({"model": "m/one", "usage": {"prompt_tokens": 70, "completion_tokens": 5}}).encode(), 1.0)
    meter.end()
    record.end(2.0, lmgateway.Outcome("done", 200, meter=meter))
    return record


def test_history_keeps_a_row_for_each_request_and_takes_the_later_word(tmp_path):
    history = lmgateway.History(str(tmp_path / "h.db"))
    record = finished_record()
    history.keep([lmgateway.history_row(record)])
    record.usage = {**record.usage, "cachedTokens": 40}
    history.keep([lmgateway.history_row(record), lmgateway.history_row(finished_record("r2", 1_700_100_000.0))])
    history.close()
    assert history.usage("key") == [{"key": "anna", "requests": 2, "errors": 0, "promptTokens": 140,
                                     "cachedTokens": 40, "completionTokens": 10, "promptSeconds": 0.0,
                                     "generationSeconds": 0.0}]
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


def test_history_forgets_rows_that_are_too_old(tmp_path):
    history = lmgateway.History(str(tmp_path / "h.db"), days=30)
    history.keep([lmgateway.history_row(finished_record("old", time.time() - 31 * 86400))])
    history.keep([lmgateway.history_row(finished_record("new", time.time() - 29 * 86400))])
    history.close()
    assert [row["requests"] for row in history.usage("key")] == [1]


@pytest.mark.parametrize("make", [lambda path: path.write_text("no database"), lambda path: path.mkdir()],
                         ids=["text", "directory"])
def test_what_is_no_history_is_refused_with_the_remedy(tmp_path, make):
    make(tmp_path / "h.db")
    with pytest.raises(lmgateway.HistoryError, match="--history .*h.db .HISTORY_FILE.*; name a file"):
        lmgateway.History(str(tmp_path / "h.db"))


def test_a_history_that_cannot_be_written_any_more_is_said_and_stops_nothing(tmp_path, caplog):
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep([("too", "few")])
    history.keep([lmgateway.history_row(finished_record())])
    history.close()
    assert history.usage("key")[0]["requests"] == 1
    assert "1 requests are missing" in caplog.text


def test_history_survives_a_killed_process(tmp_path):
    code = ("import sys, os, signal; sys.path.insert(0, sys.argv[1]); import lmgateway\n"
            "history = lmgateway.History(sys.argv[2])\n"
            "record = lmgateway.Record('r1', 1e9, 0.0); record.end(1.0, lmgateway.Outcome('done', 200))\n"
            "history.keep([lmgateway.history_row(record)])\n"
            "while not history.usage('key'): pass\n"
            "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n")
    subprocess.run([sys.executable, "-c", code, str(HERE), str(tmp_path / "h.db")], check=False, timeout=PATIENCE_S)
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


# --- reports


def test_report_of_saved_logs_sums_by_day_and_model(tmp_path, capsys, utc):
    for name in ("g2-nonstream-cache-hit.log", "g3-stream-split-lines.log"):
        (tmp_path / name).write_bytes((HERE / ".ci" / "samples" / name).read_bytes())
    assert lmgateway.main(["--report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["day", "model"], ["2026-08-08", "tundra/nimbus-14b-coder"], ["2026-04-08", "desk"], ["total", "2"]]
    assert lines[1].split()[2:] == ["1", "0", "1,500", "41", "%", "55", "742.5", "137.5"]
    assert len({len(line) for line in lines}) == 1


def test_report_of_a_history_as_json(tmp_path, capsys):
    history = lmgateway.History(str(tmp_path / "h.db"))
    history.keep([lmgateway.history_row(finished_record())])
    history.close()
    assert lmgateway.main(["--report", "--json", "--history", str(tmp_path / "h.db")]) == 0
    assert json.loads(capsys.readouterr().out)["promptTokens"] == 70


@pytest.mark.parametrize("args, said", [
    ([], "--report: name saved logs"), (["--history", "/nowhere/h.db"], "--history /nowhere/h.db"),
    (["/nowhere.log"], "/nowhere.log: no such file")])
def test_report_of_nothing_says_what_it_needs(args, said, capsys):
    assert lmgateway.main(["--report", *args]) in (1, 2)
    assert said in capsys.readouterr().err


# === 10. DASHBOARD ===========================================================


# === What the one file keeps apart ===========================================
