"""Any endpoint that speaks OpenAI's chat completions, as a client."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmtune.probe.clients import Client, Reply, Sent

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which another try may do better


@dataclass(frozen=True)
class HttpOptions:
    """An endpoint.

    Attributes:
        url: up to /v1, such as http://127.0.0.1:8000/v1.
        model: as the endpoint calls it.
        key_variable: environment variable that holds the key; none is sent where it is not set.
        timeout: seconds of one try.
        tries: of one request.
        pause: seconds before the second try, twice as many before each further one, never more than
            `longest`, also where the endpoint asks for more.
        longest: seconds.
        workers: requests under way at once.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 4
    pause: float = 1.0
    longest: float = 30.0
    workers: int = 4


class _Failed(Exception):
    def __init__(self, text: str, again: bool, after: float | None = None) -> None:
        super().__init__(text)
        self.again, self.after = again, after


class HttpClient(Client):
    """Asks an endpoint; what times out, fails or makes no sense is tried again within bounds."""

    def __init__(self, options: HttpOptions, sleep: Callable[[float], None] = time.sleep) -> None:
        self.options, self.name, self.batch = options, options.model, 8 * options.workers
        self._sleep = sleep

    def ask(self, sent: Sequence[Sent]) -> list[Reply]:
        with ThreadPoolExecutor(self.options.workers) as pool:
            return list(pool.map(self._one, sent))

    def _one(self, sent: Sent) -> Reply:
        body = json.dumps(self.body(sent)).encode()
        pause, error = self.options.pause, ""
        for number in range(1, self.options.tries + 1):
            try:
                return Reply(self._text(body), tries=number)
            except _Failed as failed:
                error = str(failed)
                if not failed.again:
                    return Reply("", error, number)
                if number < self.options.tries:
                    self._sleep(min(max(pause, failed.after or 0.0), self.options.longest))
                    pause *= 2
        return Reply("", error, self.options.tries)

    def body(self, sent: Sent) -> dict[str, Any]:
        """The request as JSON: examples are turns of their own, pictures are data URLs."""
        messages: list[dict[str, Any]] = []
        for example in sent.examples:
            messages.append({"role": "user", "content": _content(example.text, example.images)})
            messages.append({"role": "assistant", "content": example.answer})
        messages.append({"role": "user", "content": _content(sent.text, sent.images)})
        return {
            "model": self.options.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": sent.most,
        }

    def _text(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.options.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.options.url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=self.options.timeout) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace").strip()
            after = error.headers.get("Retry-After", "")
            raise _Failed(
                f"status {error.code} from {url}: {detail}",
                error.code in AGAIN,
                float(after) if after.isdigit() else None,
            ) from None
        except (OSError, ValueError) as error:  # no connection, a timeout, a url that is none
            again = isinstance(error, OSError)
            raise _Failed(f"{url}: {type(error).__name__}: {error}", again) from None
        try:
            text = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Failed(f"{url} answered with no completion: {raw[:200]!r}", True) from None
        if not isinstance(text, str):
            raise _Failed(f"{url} answered with no text: {raw[:200]!r}", True)
        return text.strip()


def _content(text: str, images: Sequence[bytes]) -> list[dict[str, Any]]:
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*pictures, {"type": "text", "text": text}]
