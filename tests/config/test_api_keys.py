"""The file of API keys: entries with names, roles and limits, and one key per line."""

import hashlib
import re
from pathlib import Path

import pytest

from serve.config.api_keys import ApiKey, all_keys, digest, keys_in

HASH = hashlib.sha256(b"sk-1").hexdigest()
FILE = f"""\
# ours
[[keys]]
name = "alice"
sha256 = "{HASH}"
role = "admin"
requests_per_minute = 60
tokens_per_minute = 1000
max_bodies = 4
min_priority = -5

[[keys]]
name = "bob"  # without limits
key = "sk-2"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries(tmp_path: Path) -> None:
    alice, bob = keys_in(written(tmp_path, FILE))
    assert isinstance(alice, ApiKey)
    assert isinstance(bob, ApiKey)
    assert (alice.name, alice.role, alice.digest) == ("alice", "admin", digest("sk-1"))
    limits = (alice.requests_per_minute, alice.tokens_per_minute, alice.max_bodies, alice.min_priority)
    assert limits == (60, 1000, 4, -5)
    assert bob == ApiKey(name="bob", key="sk-2")
    assert (bob.role, bob.digest) == ("user", digest("sk-2"))
    assert "sk-2" not in repr(bob)


def test_example_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    [example] = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    entries = [key for key in keys_in(written(tmp_path, example)) if isinstance(key, ApiKey)]
    assert [(entry.name, entry.digest) for entry in entries] == [
        ("alice", digest("sk-alice")),
        ("monitoring", digest("sk-monitoring")),
    ]


def test_one_key_per_line(tmp_path: Path) -> None:
    assert keys_in(written(tmp_path, "# key = 1\n  sk-1\n\nkeys\n[x]\n")) == ["sk-1", "keys", "[x]"]


SECRET = "sk-secret"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (f'name = "a"\nkey = "{SECRET}"\nnmae = 1', "keys[0].nmae: unknown field"),
        (f'name = "a b"\nkey = "{SECRET}"', "keys[0].name: String should match"),
        (f'name = "key1"\nkey = "{SECRET}"', "keys[0]: the name 'key1' is reserved"),
        (f'key = "{SECRET}"', "keys[0].name: Field required"),
        ('name = "a"', "keys[0]: needs either `sha256` or `key`"),
        (f'name = "a"\nkey = "{SECRET}"\nsha256 = "{HASH}"', "keys[0]: needs either `sha256` or `key`"),
        (f'name = "a"\nsha256 = "{SECRET}"', "keys[0].sha256: String should match"),
        (f'name = "a"\nkey = "{SECRET} "', "keys[0].key: a key must be non-empty ASCII"),
        (f'name = "a"\nkey = "{SECRET}"\nrole = "root"', "keys[0].role: Input should be 'user' or 'admin'"),
        (f'name = "a"\nkey = "{SECRET}"\nmax_bodies = 0', "keys[0].max_bodies: Input should be greater"),
        (
            f'name = "a"\nkey = "{SECRET}"\ntokens_per_minute = "9"',
            "keys[0].tokens_per_minute: Input should be a valid",
        ),
        (f'name = "a"\nkey = "{SECRET}"\nkey = "b"', "not valid TOML"),
        (f'name = "a"\nkey = "{SECRET}"\n[[keys]]\nname = "a"\nkey = "b"', "the name of 'a' is used twice"),
        (f'name = "a"\nkey = "{SECRET}"\n[[keys]]\nname = "b"\nkey = "{SECRET}"', "the key of 'a' is used twice"),
        ('name = "a"\nkey = "flag"', "the key of 'a' is used twice"),
        (f'name = "a"\nkey = "{SECRET}"\n[other]', "other: unknown field"),
    ],
)
def test_wrong_entry_is_named(entry: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"[[keys]]\n{entry}\n")
    with pytest.raises(ValueError, match="argument --api-key-file: ") as error:
        all_keys(["flag"], path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("heading", ["[keys]", "[[key]]", "[[ keys ]]x"])
def test_mistaken_heading_is_no_key(heading: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--api-key-file"):
        keys_in(written(tmp_path, f'{heading}\nname="a"\nkey="b"\n'))
