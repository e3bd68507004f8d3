"""Signals that do not end the server: files are read again, stacks are logged. Real processes are in test_lifecycle."""

import logging
import ssl
from pathlib import Path

import pytest

from serve.api.keys import ApiKeys
from serve.config.flags import parse_args
from serve.server.signals import Reload, load_certificates, log_stacks
from tests.support.certificates import Certificates


def names(keys: ApiKeys, *sent: str) -> list[str | None]:
    found = [keys.find({"type": "http", "headers": [(b"x-api-key", key.encode())]}) for key in sent]
    return [None if key is None else key.name for key in found]


def test_reload_reads_the_key_file_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    config = parse_args(["--api-key", "flag", "--api-key-file", str(file)], {})
    reload, keys = Reload(config), ApiKeys(config.api_key)
    assert reload.has_files
    assert names(keys, "flag", "one", "two", "three") == ["key1", "key2", "key3", None]
    file.write_text("three\ntwo\n")
    reload.run_if_requested(keys, None)
    assert names(keys, "three") == [None]  # no signal
    reload.request()
    reload.run_if_requested(keys, None)
    assert names(keys, "flag", "one", "two", "three") == ["key1", None, "key3", "key4"]
    for content in ("", "# none\n", "é\n"):
        file.write_text(content)
        reload.request()
        reload.run_if_requested(keys, None)
        assert names(keys, "flag", "two") == ["key1", "key3"]
    file.unlink()
    reload.request()
    reload.run_if_requested(keys, None)
    assert names(keys, "flag", "two") == ["key1", "key3"]
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, *[logging.ERROR] * 4]
    assert f"SIGHUP: argument --api-key-file: {file}: contains no key" in caplog.messages


def test_key_that_is_removed_during_the_start_is_no_flag(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    config = parse_args(["--api-key", "flag", "--api-key-file", str(file)], {})
    file.unlink()
    reload, keys = Reload(config), ApiKeys(config.api_key)
    file.write_text("two\n")
    reload.request()
    reload.run_if_requested(keys, None)
    assert names(keys, "flag", "one", "two") == ["key1", None, "key3"]


def test_reload_changes_limits_and_keeps_what_was_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    entry = '[[keys]]\nname = "alice"\nkey = "one"\nrequests_per_minute = '
    file.write_text(f"{entry}60\n")
    config = parse_args(["--api-key", "flag", "--api-key-file", str(file)], {})
    reload, keys = Reload(config), ApiKeys(config.api_key, lambda: 0.0)
    key = keys.find({"type": "http", "headers": [(b"x-api-key", b"one")]})
    assert key is not None
    with key.request():
        file.write_text(f"{entry}30\n")
        reload.request()
        reload.run_if_requested(keys, None)
    assert key.headers["x-ratelimit-limit-requests"] == "30"
    assert key.headers["x-ratelimit-remaining-requests"] == "29"
    file.write_text(f'{entry}30\n[[keys]]\nname = "bob"\nkey = "flag"\n')  # a key of the command line
    reload.request()
    reload.run_if_requested(keys, None)
    assert names(keys, "one", "flag") == ["alice", "key1"]
    assert f"SIGHUP: argument --api-key-file: {file}: the key of 'bob' is used twice" in caplog.messages


def test_reload_keeps_a_certificate_without_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates = Certificates.made_in(tmp_path)
    config = parse_args(certificates.flags(), {})
    reload, context = Reload(config), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificates(config, context)
    (tmp_path / "key.pem").write_text("nothing")
    reload.request()
    reload.run_if_requested(ApiKeys(()), context)
    [message] = caplog.messages
    assert message.startswith(f"SIGHUP: --ssl-certfile {tmp_path / 'cert.pem'}: ")


def test_reload_with_a_bad_certificate_keeps_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates, path = Certificates.made_in(tmp_path), tmp_path / "keys"
    path.write_text("first")
    config = parse_args([*certificates.flags(), "--api-key-file", str(path)], {})
    reload, context, keys = Reload(config), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ApiKeys(["first"])
    path.write_text("second")
    (tmp_path / "key.pem").write_text("nothing")
    reload.request()
    reload.run_if_requested(keys, context)
    assert len(caplog.messages) == 1
    assert [keys.find({"headers": [(b"x-api-key", key)]}) is not None for key in (b"first", b"second")] == [True, False]


def test_reload_without_files() -> None:
    assert not Reload(parse_args(["--api-key", "a"], {})).has_files


def test_log_stacks_names_threads_and_functions(caplog: pytest.LogCaptureFixture) -> None:
    log_stacks()
    assert "MainThread:\n" in caplog.text
    assert "in test_log_stacks_names_threads_and_functions" in caplog.text
