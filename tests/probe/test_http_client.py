"""An endpoint on the loopback that times out, fails and talks nonsense, as told."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmtune.probe.clients import Example, Sent
from mmtune.probe.http_client import HttpClient, HttpOptions


@pytest.fixture
def server():
    """(url, what it does in turn, requests that it got); "ok:TEXT" answers."""
    plan, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            what = plan.pop(0) if plan else "ok:yes"
            if what == "hang":
                time.sleep(0.6)
            status = int(what) if what.isdigit() else 200
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "7")
            self.end_headers()
            text = what.removeprefix("ok:") if what.startswith("ok:") else None
            answers = {
                "nonsense": b"<html>",
                "empty": b'{"choices": []}',
                "null": b'{"choices": [{"message": {"content": null}}]}',
            }
            good = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(answers.get(what, good))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/v1", plan, seen
        found.shutdown()


def client(url, **settings):
    slept = []
    options = HttpOptions(url, "m", **{"timeout": 0.3, "workers": 1, **settings})
    return HttpClient(options, slept.append), slept


@pytest.mark.parametrize("trouble", ["hang", "500", "503", "nonsense", "empty", "null"])
def test_trouble_is_tried_again(server, trouble):
    url, plan, seen = server
    plan += [trouble, trouble, "ok: a cat "]
    asked, slept = client(url)
    (reply,) = asked.ask([Sent("what?")])
    assert (reply.text, reply.error, reply.tries) == ("a cat", "", 3)
    assert slept == [1.0, 2.0]
    assert len(seen) == 3


def test_it_gives_up_within_bounds_and_says_why(server):
    url, plan, seen = server
    plan += ["503"] * 9
    asked, slept = client(url, tries=3)
    (reply,) = asked.ask([Sent("what?")])
    assert reply.tries == len(seen) == 3
    assert "status 503" in reply.error
    assert len(slept) == 2


def test_what_the_client_does_wrong_is_not_tried_again(server):
    url, plan, seen = server
    plan += ["401"]
    (reply,) = client(url)[0].ask([Sent("what?")])
    assert (reply.tries, len(seen)) == (1, 1)
    assert "status 401" in reply.error


def test_the_endpoint_may_ask_for_a_longer_pause_but_not_for_any(server):
    url, plan, _ = server
    plan += ["429", "ok:yes", "429"]
    asked, slept = client(url)
    asked.ask([Sent("a")])
    assert slept == [7.0]
    asked, slept = client(url, longest=2.0)
    asked.ask([Sent("a")])
    assert slept == [2.0]


def test_nobody_there():
    (reply,) = client("http://127.0.0.1:9/v1", tries=2)[0].ask([Sent("a")])
    assert reply.tries == 2
    assert "127.0.0.1:9" in reply.error
    (reply,) = client("no url", tries=2)[0].ask([Sent("a")])
    assert (reply.tries, reply.text) == (1, "")


def test_one_failure_among_many(server):
    url, plan, _ = server
    plan += ["ok:1", "401", "ok:3"]
    replies = client(url)[0].ask([Sent(c) for c in "abc"])
    assert [r.text for r in replies] == ["1", "", "3"]


def test_what_is_sent(server, monkeypatch):
    url, _, seen = server
    monkeypatch.setenv("MY_KEY", "secret")
    sent = Sent("what?", (b"PNG1",), (Example("before?", "cat", (b"PNG2",)),), most=9)
    client(url, key_variable="MY_KEY")[0].ask([sent])
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0)
    roles = [m["role"] for m in body["messages"]]
    assert roles == ["user", "assistant", "user"]
    first, _, last = body["messages"]
    assert first["content"][0]["image_url"]["url"] == "data:image/png;base64,UE5HMg=="
    assert last["content"][-1] == {"type": "text", "text": "what?"}
