"""Write text through a server that speaks OpenAI's chat-completions protocol.

    writer = connect("http://localhost:8000/v1", model="some-model")
    replies = writer.write(chats, seeds=[0, 1], max_new_tokens=96, temperature=0.9, top_p=0.95)

vLLM, llama.cpp, Ollama, LM Studio and others speak it. A request is tried again, with growing
pauses, while the server is busy or gone; a request that it refuses is an error at once.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from models.reply import Reply

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Waits between the tries of one request."""
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_SEED_MAX = 2**31 - 1


class NotJson(ValueError):
    """An answer that is no JSON: the page of a proxy whose server is gone, or a wrong address."""


_UNHEARD = (URLError, OSError, HTTPException, NotJson)
"""What comes of a server that is gone, or goes in mid-answer."""


@dataclass(frozen=True, kw_only=True)
class ServedWriter:
    """A language model on a server; used as `models.writer.Writer` is."""

    url: str
    """Base of the server's interface, without a slash at the end."""
    model: str
    pauses_s: Sequence[float] = PAUSES_S
    untrained: bool = False

    def write(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[Reply]:
        """Answer a batch of conversations, asked at the same time; see `Writer.write`.

        Raises:
            ConnectionError: the server does not answer, after all tries.
            ValueError: it refuses the request.
        """
        how = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        bodies = [
            {"model": self.model, "messages": list(turns), "seed": seed & _SEED_MAX} | how
            for turns, seed in zip(conversations, seeds, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=len(bodies)) as pool:
            return list(pool.map(self._ask, bodies))

    def _ask(self, body: Mapping[str, Any]) -> Reply:
        answer = self._post("/chat/completions", body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            return Reply(text=text, finished=choice.get("finish_reason") == "stop")
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{self.url} answered {_without_key(json.dumps(answer))[:200]}, which is no chat "
                "completion: is write_prompts.server the base of an OpenAI-compatible interface "
                "(.../v1)?"
            ) from None

    def _post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """One request, tried again while the server is busy or gone."""
        problem = ""
        for pause_s in (*self.pauses_s, None):
            try:
                return request(self.url + path, body)
            except HTTPError as error:
                problem = f"{error.code} {error.reason}"
                if error.code not in _BUSY:
                    raise ValueError(_refusal(self.url + path, error)) from None
            except _UNHEARD as error:
                problem = str(getattr(error, "reason", error)).strip() or type(error).__name__
            if pause_s is not None:
                time.sleep(pause_s)
        raise ConnectionError(
            f"write_prompts.server: {self.url} stopped answering ({problem}; "
            f"{len(self.pauses_s) + 1} tries). The replies so far are kept: start the server and "
            "run the same command again."
        )


def request(url: str, body: Mapping[str, Any] | None, *, timeout_s: float = TIMEOUT_S) -> Any:
    """POST a JSON body (or GET, without one) and read the JSON answer.

    Raises:
        HTTPError: the server answered with an error.
        URLError, OSError, HTTPException: it did not answer, or not to the end.
        NotJson: the answer is no JSON.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data=data, headers=headers), timeout=timeout_s) as answer:
        text = answer.read().decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        said = _without_key(text)[:80]
        raise NotJson(f"{url} answered {said!r}, which is not JSON ({error.msg})") from None


def _refusal(url: str, error: HTTPError) -> str:
    told = _without_key(error.read().decode("utf-8", errors="replace"))[:300]
    hint = f" Set {KEY_VARIABLE} to a valid key." if error.code in (401, 403) else ""
    return f"write_prompts.server: {url} answered {error.code} {error.reason}: {told}{hint}"


def _without_key(text: str) -> str:
    """A server's words, which may repeat the key: errors are logged and kept beside artifacts."""
    key = os.environ.get(KEY_VARIABLE)
    return text.replace(key, "***") if key else text


def connect(url: str, *, model: str, pauses_s: Sequence[float] = PAUSES_S) -> ServedWriter:
    """Check that a server answers and knows the model, before any work.

    Raises:
        ConnectionError: nobody answers at that address.
        ValueError: it answers, but has other models or refuses.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"write_prompts.server is {url!r}; expected an address such as http://localhost:8000/v1"
        )
    url = url.rstrip("/")
    try:
        listed = request(f"{url}/models", None, timeout_s=CONNECT_TIMEOUT_S)
    except HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(_refusal(f"{url}/models", error)) from None
        listed = {}  # not every server lists its models
    except (URLError, OSError, HTTPException) as error:
        raise ConnectionError(
            f"write_prompts.server: nobody answers at {url} ({getattr(error, 'reason', error)}): "
            "start the server, or name a model to load here (write_prompts.server=null)."
        ) from None
    entries = listed.get("data") if isinstance(listed, dict) else None
    known = [entry.get("id") for entry in entries or () if isinstance(entry, dict)]
    if known and model not in known:
        raise ValueError(
            f"write_prompts.model: {url} serves {', '.join(map(str, known))}; not {model!r}"
        )
    return ServedWriter(url=url, model=model, pauses_s=pauses_s)
