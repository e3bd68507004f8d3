"""The command line of a server: values, derived defaults, contradictions, configuration files and --help."""

import dataclasses
import re
from pathlib import Path

import pytest

from serve.config.config import ServeConfig
from serve.config.flags import parse_args, server_flags
from serve.config.options import GROUPS
from serve.config.values import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 2**30),
        ("1GiB", 2**30),
        ("1gi", 2**30),
        ("2G", 2 * 10**9),
        ("800 MB", 800 * 10**6),
        ("1.5KiB", 1536),
        ("12k", 12_000),
        ("1TiB", 2**40),
        ("7", 7),
        ("7B", 7),
        ("50%", 0.5),
        ("100%", 1.0),
        ("0.25", 0.25),
        ("1.0", 1.0),
    ],
)
def test_parse_memory_of_bytes_and_shares(text: str, size: float) -> None:
    amount = parse_memory(text)
    assert (amount, type(amount)) == (size, type(size))


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "-5G", "0.0", "1.5", "101%", "0%", "1 2", "1GG", "50%G", "nan", "1e9"]
)
def test_parse_memory_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="share"):
        parse_memory(text)


def test_parse_args_derived_defaults() -> None:
    config = parse_args([])
    assert (config.batched_tokens, config.computed_logprobs) == (272, 20)
    assert config.enable_prefix_caching
    assert config.kv_cache_memory is None
    config = parse_args(["--max-num-seqs", "4", "--max-logprobs", "-1", "--no-enable-prefix-caching"])
    assert (config.batched_tokens, config.computed_logprobs, config.max_logprobs) == (260, 20, -1)
    assert not config.enable_prefix_caching
    config = parse_args(["--max-logprobs", "151936"])
    assert (config.computed_logprobs, config.max_logprobs) == (20, 151_936)
    config = parse_args(["--max-num-batched-tokens", "64", "--max-logprobs", "50", "--kv-cache-memory", "25%"])
    assert (config.batched_tokens, config.computed_logprobs) == (64, 50)
    assert config.kv_cache_memory == 0.25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-num-batched-tokens", "31"], ("--max-num-batched-tokens", "--max-num-seqs")),
        (["--max-num-seqs", "300", "--max-num-batched-tokens", "256"], ("--max-num-batched-tokens", "--max-num-seqs")),
        (["--kv-cache-memory", "lots"], ("--kv-cache-memory", "lots")),
        (["--max-logprobs", "0"], ("--max-logprobs",)),
        (["--max-logprobs", "-2"], ("--max-logprobs",)),
        (["--ssl-keyfile", "key.pem"], ("--ssl-keyfile", "--ssl-certfile")),
        (["--ssl-ca-certs", "ca.pem"], ("--ssl-ca-certs", "--ssl-certfile")),
        (["--api-key", ""], ("--api-key",)),
        (["--api-key", "two words"], ("--api-key",)),
        (["--prefix-cache-per-key"], ("--prefix-cache-per-key",)),
        (["--max-body-bytes", "50%"], ("--max-body-bytes",)),
        (["--queue-timeout", "0"], ("--queue-timeout",)),
        (["--allowed-origins", "*"], ("--allowed-origins", '["*"]')),
        (["--logprobs-mode", "raw_logits"], ("--logprobs-mode",)),
        (["--block-size", "16"], ("--block-size", "64")),
        (["--kv-cache-dtype", "fp8"], ("--kv-cache-dtype", "bfloat16")),
        (["--conf", "nowhere.yaml"], ("--conf",)),
        (["--config", "nowhere.yaml"], ("--config", "nowhere.yaml")),
        (["--quantization", "int4"], ("--quantization", "int8")),
        (["--quantization", "q2_k"], ("--quantization", "q4_k")),
    ],
)
def test_parse_args_mistake_exits_with_code_2(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_args(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in words)


def test_api_keys_from_flags_or_environment() -> None:
    environ = {"LOGPROBD_API_KEY": "ours", "VLLM_API_KEY": "theirs"}
    assert parse_args([], environ).api_key == ("ours", "theirs")
    assert parse_args([], {}).api_key == ()
    assert parse_args(["--api-key", "a", "--api-key", "b"], environ).api_key == ("a", "b")


@pytest.mark.parametrize("key", ["", "two words", "tab\t"])
def test_api_keys_invalid_in_environment(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([], {"LOGPROBD_API_KEY": key})
    assert "$LOGPROBD_API_KEY" in capsys.readouterr().err


def test_api_keys_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nsk-1\n\n  sk-2  \n")
    assert parse_args(["--api-key", "a", "--api-key-file", str(path)], {"VLLM_API_KEY": "b"}).api_key == (
        "a",
        "sk-1",
        "sk-2",
    )


@pytest.mark.parametrize("content", ["", "# none\n", "two words\n", "schl\u00fcssel\n"])
def test_api_keys_file_without_a_valid_key(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    for file in (path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            parse_args(["--api-key-file", str(file)])
        assert "--api-key-file" in capsys.readouterr().err


def test_parse_args_accepts_flags_of_vllm() -> None:
    flags = ["--enable-chunked-prefill", "--enable-server-load-tracking"]
    assert parse_args(flags) == parse_args([])
    assert parse_args(["--block-size", "64", "--scheduling-policy", "priority"]) == parse_args([])


def test_parse_args_json_lists() -> None:
    config = parse_args(["--allowed-origins", '["https://a", "https://b"]', "--allow-credentials"])
    assert config.allowed_origins == ("https://a", "https://b")
    assert config.allow_credentials


def test_config_file_below_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: folder/model\nmax-num-seqs: 4\nmax_model_len: 512\nenable-prefix-caching: false\n"
        "served-model-name: [a, b]\nvllm-metrics: true\noverride-generation-config: {temperature: 0.5}\n"
        "allowed-origins: ['https://a']\nmax-log-len:\n"
    )
    config = parse_args(["--config", str(file), "--max-num-seqs", "8"])
    assert (config.model, config.max_num_seqs, config.max_model_len) == ("folder/model", 8, 512)
    assert (config.enable_prefix_caching, config.vllm_metrics) == (False, True)
    assert config.served_model_name == ("a", "b")
    assert config.override_generation_config == '{"temperature": 0.5}'
    assert config.allowed_origins == ("https://a",)
    assert config.max_log_len is None
    assert parse_args(["--config", str(file), "--served-model-name", "c"]).served_model_name == ("c",)
    assert parse_args(["other", "--config", str(file)]).model == "other"


@pytest.mark.parametrize("text", ["[1]", "max-num-seqs: many", "no-such-flag: 1", "a: b: c"])
def test_config_file_invalid_exits_with_code_2(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--config", str(file)])
    assert exit_info.value.code == 2
    assert "--" in capsys.readouterr().err


def printed_help(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return server_flags(ServeConfig, {}, prog="logprobd serve", description="").parser.format_help()


def test_help_shows_every_option_in_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed_help(monkeypatch, 100)
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE)[:7] == ["options", *GROUPS]
    for field in dataclasses.fields(ServeConfig):
        if field.name == "flag_keys":  # set by the parser
            continue
        option = field.metadata["option"]
        assert option.help, field.name
        assert option.group in GROUPS, field.name
        word = "--" + field.name.replace("_", "-")
        line = re.compile(rf"^  (\[?{word}|{word.replace('--', r'--\[no-\]')})(?![\w-])", re.MULTILINE)
        section = text[text.index(f"\n{option.group}:\n") :].split("\n\n")[0]
        assert len(line.findall(section)) == 1, field.name


@pytest.mark.parametrize(("columns", "widest"), [(200, 100), (100, 98), (80, 78)])
def test_help_width(columns: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, _, epilog = printed_help(monkeypatch, columns).partition("\nexamples:")
    assert max(map(len, flags.splitlines())) <= widest
    assert max(map(len, epilog.splitlines())) <= 100
    assert not re.search(r"(?<![$A-Z_])[A-Z]{2,}_[A-Z_]+", flags)  # long names in capitals, but for $VARIABLES


def test_help_of_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed_help(monkeypatch, 100)
    assert "--[no-]enable-prefix-caching" in text
    assert "--vllm-metrics " in text
    assert not parse_args(["--vllm-metrics", "--no-vllm-metrics"]).vllm_metrics  # not shown, but there


def test_help_examples_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    examples = printed_help(monkeypatch, 100).partition("examples:\n")[2]
    (tmp_path / "serve.yaml").write_text("port: 9000")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"logprobd serve(.*?)(?:   |  \w|$)", examples, re.MULTILINE)
    assert len(commands) == 6
    assert [parse_args(arguments.split()).port for arguments in commands] == [8000, 9000, 8000, 8000, 8000, 9000]


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["--max-num-seq", "4"], "--max-num-seqs"),
        (["--no-enable-prefix-cache"], "--no-enable-prefix-caching"),
        (["--confg=a.yaml"], "--config"),
        (["--dtype", "float23"], "float32"),
        (["--logprobs-mode", "raw_logprob"], "raw_logprobs"),
    ],
)
def test_parse_args_suggests_the_nearest_flag_or_value(
    arguments: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert capsys.readouterr().err.endswith(f"; did you mean {suggestion!r}?\n")


def test_parse_args_takes_the_model_with_or_without_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_args(["org/model"]) == parse_args(["--model", "org/model"])
    with pytest.raises(SystemExit):
        parse_args(["org/model", "--model", "org/model"])
    assert "--model: MODEL is given twice" in capsys.readouterr().err


def test_from_mapping_raises_for_a_mistake() -> None:
    line = server_flags(ServeConfig, {}, prog="logprobd serve", description="")
    assert line.from_mapping({"max_num_seqs": 4, "vllm-metrics": True}) == ServeConfig(
        max_num_seqs=4, vllm_metrics=True
    )
    for mapping in ({"max_num_seq": 4}, {"max_num_seqs": 0}, {"config": "a.yaml"}, {"help": True}):
        with pytest.raises(ValueError, match="--"):
            line.from_mapping(mapping)
