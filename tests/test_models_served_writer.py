"""The writer behind a server: real HTTP to a small server that speaks the protocol."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.cli import main
from models.served_writer import connect
from models.writer import Reply
from stages import write_prompts
from stages.labels import load_labelspace
from stages.shards import read_jsonl
from tests.interruptions import digests
from tests.tiny import Told, stage_config, tiny_recipe

HOW = {"max_new_tokens": 20, "temperature": 0.5, "top_p": 0.9}
CHATS = [[{"role": "user", "content": f"Number {number}."}] for number in range(3)]


@contextmanager
def server(answer, *, models=("small",)):
    """A chat-completions server; `answer(body, number)` gives (status, reply as JSON or bytes);
    status None: the bytes are not even HTTP."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body | {"key": self.headers.get("Authorization")})
            self._send(*answer(body, len(seen)))

        def _send(self, status, value):
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            if status is None:  # these bytes are all that it sends before it goes
                self.wfile.write(content)
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1", seen
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def said(text: str, reason: str = "stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def echo(body, number):
    return said(f"{body['messages'][-1]['content']} {body['seed']}")


def test_replies_come_in_order_with_seed_and_settings():
    with server(echo) as (url, seen):
        replies = connect(url, model="small").write(CHATS, seeds=[5, 6, 2**40 + 7], **HOW)
    assert replies == [
        Reply(text="Number 0. 5", finished=True),
        Reply(text="Number 1. 6", finished=True),
        Reply(text="Number 2. 7", finished=True),
    ]
    assert all(
        (body["model"], body["max_tokens"], body["temperature"], body["top_p"])
        == ("small", 20, 0.5, 0.9)
        for body in seen
    )


def test_a_reply_cut_at_the_token_limit_is_not_finished():
    with server(lambda body, number: said("A street", "length")) as (url, _):
        (reply,) = connect(url, model="small").write(CHATS[:1], seeds=[1], **HOW)
    assert not reply.finished


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status):
    def busy_twice(body, number):
        return (status, {"error": "busy"}) if number < 3 else echo(body, number)

    with server(busy_twice) as (url, seen):
        writer = connect(url, model="small", pauses_s=(0.01, 0.01, 0.01))
        (reply,) = writer.write(CHATS[:1], seeds=[1], **HOW)
    assert reply.text == "Number 0. 1"
    assert len(seen) == 3


def test_a_server_that_refuses_is_asked_once_and_its_words_are_told():
    with server(lambda body, number: (400, {"error": "context too long"})) as (url, seen):
        writer = connect(url, model="small", pauses_s=(0.01,))
        with pytest.raises(ValueError, match=r"400.*context too long"):
            writer.write(CHATS[:1], seeds=[1], **HOW)
    assert len(seen) == 1


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    with server(echo) as (url, seen):
        connect(url, model="small").write(CHATS[:1], seeds=[1], **HOW)
    assert seen[0]["key"] == "Bearer word"


SECRET = "sk-test-8f3a1c"


def traces_of_secret(folder):
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


def describe(body, number):
    request = body["messages"][-1]["content"]
    classes = request.split("in the description: ")[1].split(".")[0]
    seed = body["seed"]
    return said(f"A street numbered {seed} with {classes} of the {seed % 89}th kind")


@pytest.mark.parametrize("accepts", [True, False])
def test_the_key_is_in_no_artifact_record_or_line_of_output(tmp_path, monkeypatch, capfd, accepts):
    def answer(body, number):
        if accepts:
            return said("A street.")  # what is refused, the bank replaces
        return 401, {"error": f"no such key: {SECRET}"}

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with server(answer) as (url, seen):
        settings = ("world.num_source=8", "world.num_target=1", "write_prompts.model=small")
        settings += ("write_prompts.max_attempts=1",)
        words = ["run", "--recipe", "tiny", "--artifacts", str(tmp_path / "artifacts")]
        words += ["--until", "write_prompts", "--set", f"write_prompts.server={url}"]
        code = main(words + [word for setting in settings for word in ("--set", setting)])
    assert {body["key"] for body in seen} == {f"Bearer {SECRET}"}
    shown = "".join(capfd.readouterr())
    assert (code == 0) == accepts, shown
    assert accepts or "401 Unauthorized: " in shown
    assert SECRET not in shown
    assert (tmp_path / "artifacts" / "runs").is_dir()
    assert not traces_of_secret(tmp_path)


def test_an_address_with_a_password_is_refused_without_repeating_it(tmp_path, capsys):
    address = f"write_prompts.server=http://me:{SECRET}@localhost:8000/v1"
    words = ["plan", "--recipe", "tiny", "--artifacts", str(tmp_path), "--set", address]
    assert main(words) == 2
    shown = "".join(capsys.readouterr())
    assert "environment variable OPENAI_API_KEY" in shown
    assert SECRET not in shown


def test_an_answer_that_is_no_completion_is_refused():
    with (
        server(lambda body, number: (200, {"nothing": 1})) as (url, _),
        pytest.raises(ValueError, match="no chat completion"),
    ):
        connect(url, model="small").write(CHATS[:1], seeds=[1], **HOW)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"<html>502 Bad Gateway</html>", "not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", "IncompleteRead"),
        (b"no HTTP at all\r\n\r\n", "no HTTP at all"),
        (b"", "closed connection"),
    ],
)
def test_a_server_that_goes_in_mid_answer_or_a_proxys_page_is_asked_again(answer, problem):
    def gone(body, number):
        return (200 if answer.startswith(b"<") else None), answer

    def gone_twice(body, number):
        return gone(body, number) if number < 3 else echo(body, number)

    with server(gone_twice) as (url, seen):
        writer = connect(url, model="small", pauses_s=(0.01, 0.01))
        (reply,) = writer.write(CHATS[:1], seeds=[1], **HOW)
    assert (reply.text, len(seen)) == ("Number 0. 1", 3)
    with server(gone) as (url, _):
        writer = connect(url, model="small", pauses_s=(0.01,))
        with pytest.raises(ConnectionError, match=f"{problem}.*replies so far are kept"):
            writer.write(CHATS[:1], seeds=[1], **HOW)


def test_another_model_a_wrong_address_or_nobody_there_is_refused_before_any_work():
    with (
        server(echo, models=("small", "large")) as (url, _),
        pytest.raises(ValueError, match="serves small, large; not 'big'"),
    ):
        connect(url, model="big")
    with pytest.raises(ConnectionError, match="nobody answers"):
        connect(url, model="small")
    with pytest.raises(ValueError, match="expected an address"):
        connect("localhost:8000", model="small")


def test_when_the_server_stops_the_replies_are_kept_and_a_restart_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        write_prompts, "connect", lambda url, model: connect(url, model=model, pauses_s=())
    )
    labelspace = tmp_path / "labelspace"
    labelspace.mkdir()
    load_labelspace("cityscapes19").save(labelspace)

    def run(out, url):
        out.mkdir(exist_ok=True)
        how = {"model": "small", "server": url, "num_prompts": 6, "batch_size": 2}
        return write_prompts.run(
            stage_config(tiny_recipe(write_prompts=how), "write_prompts"),
            out=out,
            progress=Told(),
            labelspace=labelspace,
        )

    with server(describe) as (url, _):
        run(tmp_path / "undisturbed", url)
    with (
        server(lambda b, n: describe(b, n) if n <= 4 else (503, {})) as (url, _),
        pytest.raises(ConnectionError, match="replies so far are kept"),
    ):
        run(tmp_path / "out", url)
    with server(describe) as (url, seen):
        run(tmp_path / "out", url)
    assert len(seen) == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    rows = read_jsonl(tmp_path / "out" / "prompts.jsonl")
    assert {row["model"] for row in rows} == {"small"}
