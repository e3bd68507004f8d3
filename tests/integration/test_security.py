"""Security: API keys, template sandbox, file access, logs, cache isolation, host checks, the compilation cache."""

import asyncio
import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compiled.program_cache import ProgramCache
from model.config_hf import config_from_hf
from serve.api.access_log import log_answer
from serve.api.keys import ApiKeys
from serve.config.api_keys import ApiKey
from serve.config.config import ServeConfig
from serve.server.console import JsonFormatter
from serve.text.chat_template import ChatTemplateError, TemplateSandbox
from tests.support.http_client import chat_body, completion_body, error_of, serving
from tests.support.tiny import tiny_configs
from tools.portability.chips import abstract_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECRET = "zyzzyva-7351"
_TOUCHING = (
    "open",
    "os",
    "subprocess",
    "exec",
    "compile",
    "import",
    "shutil",
    "pathlib",
)  # audit events that are recorded


@pytest.fixture(scope="module")
def sandbox() -> TemplateSandbox:
    return TemplateSandbox(seconds=1, max_bytes=64 << 20, max_characters=10_000)


def rendered(sandbox: TemplateSandbox, template: str) -> str:
    return sandbox.render(
        template,
        [{"role": "user", "content": "Grüße, 🙂"}],
        special_tokens={"bos_token": "<s>"},
        add_generation_prompt=True,
        continue_final_message=False,
        template_kwargs={"mark": [1]},
    )


def test_sandbox_renders_a_template(sandbox: TemplateSandbox) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ mark[0] }}{% endfor %}"
    assert rendered(sandbox, template) == "<s>Grüße, 🙂1"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 10 ** (10 ** 9) }}", "more than 1 s"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ 'a' * 10001 }}", "more than 10000 characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ raise_exception('It is refused.') }}", "It is refused."),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_template_ends_at_its_limits(sandbox: TemplateSandbox, template: str, why: str) -> None:
    with pytest.raises(ChatTemplateError, match=why):
        rendered(sandbox, template)
    assert rendered(sandbox, "{{ messages[0].role }}") == "user"


async def test_request_template_is_sandboxed_or_refused() -> None:
    endless = chat_body(chat_template="{{ 'a' * 10 ** 10 }}")
    async with serving(trust_request_chat_template=True) as server:
        error = error_of(await server.post(CHAT, endless), 400)
        assert (error["param"], "memory" in error["message"]) == ("messages", True)
        assert error_of(await server.post("/tokenize", endless), 400)["param"] == "messages"
        own = chat_body(chat_template="{{ messages[0].content }}", return_prompt_text=True)
        assert (await server.post(CHAT, own)).json()["prompt_text"] == "Hi"
    async with serving() as server:
        for path in (CHAT, "/tokenize"):
            assert error_of(await server.post(path, endless), 400)["code"] == "unsupported_parameter"


async def test_request_templates_do_not_block_other_requests() -> None:
    """Two are rendered at a time; others are refused at once, and requests without a template are served."""
    endless = chat_body(chat_template="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    async with serving(trust_request_chat_template=True) as server:
        asked = [asyncio.create_task(server.post(CHAT, endless)) for _ in range(12)]
        first, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert error_of(first.pop().result(), 503)["code"] == "too_many_templates"
        assert (await server.complete())["choices"][0]["text"] == "Hello"
        statuses = [(await each).status_code for each in asked]
    assert sorted(statuses)[:2] == [400, 400]
    assert set(statuses[2:]) == {503} or statuses.count(503) >= 8


@contextmanager
def audited(needle: str) -> Iterator[list[str]]:
    """Record audit events, such as `open`, whose arguments contain a text. Hooks cannot be removed, only disabled."""
    events: list[str] = []
    heard = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        kind = event.split(".")[0]
        if heard and kind in _TOUCHING and any(needle in str(argument) for argument in arguments):
            events.append(event)

    sys.addaudithook(hook)
    try:
        yield events
    finally:
        heard = False


async def test_request_texts_are_never_looked_up_on_disk() -> None:
    path = f"/tmp/{SECRET}"
    texts = {"model": path, "user": path, "cache_salt": SECRET, "request_id": path, "stop": path, "bad_words": [path]}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, completion_body(**{name: value})) for name, value in texts.items()
    ]
    bodies += [
        (COMPLETIONS, completion_body(prompt=f"../../{path}")),
        (CHAT, chat_body(messages=[{"role": "user", "content": f"{{% include '{path}' %}}", "name": path}])),
        (CHAT, chat_body(chat_template=f"{{% include '{path}' %}}")),
        (CHAT, chat_body(chat_template=path)),
        (CHAT, chat_body(chat_template_kwargs={"chat_template": path, "tools": path})),
        (CHAT, chat_body(documents=[{"title": path, "path": path}])),
        ("/tokenize", {"prompt": path}),
        ("/tokenize", chat_body(chat_template_kwargs={"mark": path})),
    ]
    async with serving() as server:
        with audited(SECRET) as events:
            statuses = [(await server.post(where, body)).status_code for where, body in bodies]
            places = ("/web/", "/web/..%2f", "/docs/", "/v1/models/..%2f..%2ftmp%2f")
            statuses += [(await server.client.get(place + SECRET)).status_code for place in places]
    assert set(statuses) <= {200, 400, 404}
    assert events == []
    with audited(SECRET) as events:  # the hook works
        Path(path).exists()
        with pytest.raises(FileNotFoundError):
            open(path)  # noqa: SIM115  # it raises
    assert events


async def test_prompts_and_keys_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Neither of successful nor of failing requests."""
    caplog.set_level(logging.DEBUG)
    ids = list(SECRET.encode())
    async with serving(api_key=(SECRET,), on_answer=log_answer) as server:
        key = {"Authorization": f"Bearer {SECRET}"}
        for fault in (None, "prefill", "decode", "read"):
            if fault:
                server.runner.fail_once(fault)
            await server.post(COMPLETIONS, completion_body(prompt=SECRET, stop=SECRET, stream=fault == "read"), **key)
        await server.post(COMPLETIONS, completion_body(prompt=ids, prompt_logprobs=1, user=SECRET), **key)
        await server.post(CHAT, chat_body(messages=[{"role": SECRET, "content": SECRET}]), **key)
        await server.post(CHAT, chat_body(messages=[{"role": "user", "content": SECRET}], top_k=SECRET), **key)
        await server.post(CHAT, b'{"messages": "' + SECRET.encode(), **key)
        await server.post(f"{CHAT}?q={SECRET}", chat_body(), **key)
        await server.post(CHAT, chat_body(), Authorization=f"Bearer x{SECRET}")
    ours = [record for record in caplog.records if record.name.split(".")[0] != "httpx2"]  # the client's logs
    assert [record for record in ours if record.name == "serve.api.access_log"]
    assert [record for record in ours if record.exc_info]  # of failed steps
    text = "\n".join(JsonFormatter().format(record) for record in ours)
    assert SECRET not in text
    assert str(ids)[1:-1] not in text


def keyed(authorization: str) -> dict[str, Any]:
    return {"type": "http", "headers": [(b"authorization", authorization.encode())]}


def test_api_keys_have_names() -> None:
    keys = ApiKeys(["sk-1", "sk-2"])
    found = [keys.find(keyed(f"Bearer {key}")) for key in ("sk-1", "sk-2", "sk-3", "", "sk-1 ")]
    assert [key and key.name for key in found] == ["key1", "key2", None, None, "key1"]


def test_api_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = ApiKeys(["a", "b" * 100, "c"])
    for key in ("a", "b" * 100, "wrong"):
        compared.clear()
        keys.find(keyed(f"Bearer {key}"))
        assert compared == [(32, 32)] * 3


@pytest.mark.parametrize(
    "api_key",
    [("sk-1", "sk-2"), (ApiKey(name="alice", key="sk-1"), ApiKey(name="bob", key="sk-2"))],
    ids=["lines", "entries"],
)
async def test_prefix_cache_per_key_isolates_keys(api_key: tuple[str | ApiKey, ...]) -> None:
    prompt = [1] * 200
    for apart in (False, True):
        async with serving(None, api_key=api_key, prefix_cache_per_key=apart) as server:

            async def cached(key: str, salt: str | None = None) -> int:
                response = await server.post(
                    COMPLETIONS, completion_body(prompt=prompt, cache_salt=salt), Authorization=f"Bearer {key}"
                )
                return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            assert await cached("sk-1") == 0
            assert await cached("sk-1") > 0
            assert (await cached("sk-2") == 0) is apart
            assert await cached("sk-2") > 0
            for name in ("key2", "bob"):
                assert await cached("sk-1", name) == 0  # a salt equal to another key's name
            assert await cached("sk-1", "own") == 0
            assert (await cached("sk-2", "own") == 0) is apart


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("LocalHost:1", 200),
        ("[::1]:8000", 200),
        ("evil.test", 403),
        ("evil.test:8000", 403),
        ("127.0.0.1.evil.test", 403),
        ("localhost.", 403),
        ("", 200),  # no Host: not a browser
    ],
)
async def test_dns_rebinding_is_refused(host: str, status: int) -> None:
    async with serving(allowed_hosts=None) as server:
        for path in ("/v1/models", "/", "/health"):
            response = await server.client.get(path, headers={"Host": host})
            assert response.status_code == status
            if status == 403:
                assert error_of(response, 403)["code"] == "host_not_allowed"


def test_allowed_hosts_by_configuration() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "0:0:0:0:0:0:0:1", "localhost", "LOCALHOST"):
        assert "localhost" in ServeConfig(host=host).accepted_hosts
    assert ServeConfig(host="0.0.0.0").accepted_hosts == ()
    assert ServeConfig(api_key=("sk-1",)).accepted_hosts == ()
    assert ServeConfig(uds=Path("socket")).accepted_hosts == ()
    assert ServeConfig(allowed_hosts=("a.test",)).accepted_hosts == ("a.test",)
    assert ServeConfig(allowed_hosts=("*",)).accepted_hosts == ()


async def test_responses_have_nosniff() -> None:
    async with serving() as server:
        for path in ("/", "/web/page.css", "/docs", "/v1/models", "/nowhere", "/metrics"):
            assert (await server.client.get(path)).headers["x-content-type-options"] == "nosniff"


async def test_unknown_methods_share_a_metric_label() -> None:
    async with serving() as server:
        for number in range(20):
            await server.client.request(f"MADEUP{number}", "/v1/models")
        text = (await server.client.get("/metrics")).text
    assert 'method="other"' in text
    assert "MADEUP" not in text


def test_compilation_cache_is_private(tmp_path: Path) -> None:
    own = tmp_path / "own"
    ProgramCache(own)
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o2770])
def test_compilation_cache_writable_by_others_is_cleared(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other users may have written its entries. Another user's directory is refused."""
    shared = tmp_path / "shared"
    shared.mkdir()
    entries = [shared / name for name in ("decode_1-0.program", "decode_1-1.index", "foreign.txt")]
    for entry in entries:
        entry.write_bytes(b"x")
    shared.chmod(0o755)
    ProgramCache(shared)
    assert sorted(shared.iterdir()) == sorted(entries)
    shared.chmod(mode)
    ProgramCache(shared)
    assert list(shared.iterdir()) == entries[2:]
    assert "other users could write there" in caplog.text
    assert shared.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.geteuid", lambda: shared.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        ProgramCache(shared)


def test_compilation_cache_forgets_files_of_killed_writers(tmp_path: Path) -> None:
    (tmp_path / "decode_1-0.program.1.unfinished").touch()
    ProgramCache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_read_only_compilation_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used if it exists and is private, else skipped. An OSError stands in for a read-only file system."""

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def mkdir(path: Path, **_: Any) -> None:
        if not path.exists():
            read_only()

    own, model = tmp_path / "own", abstract_model(config_from_hf(tiny_configs()["llama"]), "bfloat16")
    ProgramCache(own)
    for name, function in {"mkdir": mkdir, "chmod": read_only, "unlink": read_only}.items():
        monkeypatch.setattr(Path, name, function)
    assert ProgramCache(own).programs_of(model) is not None
    assert caplog.messages == []
    missing = tmp_path / "missing"
    assert ProgramCache(missing).programs_of(model) is None
    assert caplog.messages == [
        f"{missing} cannot be written (Read-only file system): programs are compiled at every start"
    ]
