"""A command to try a server with, ready to be pasted into a shell."""

import json
import shlex

from serve.server.startup_events import Serving

_CHAT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 32,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 3,
}
_COMPLETION = {"prompt": "The capital of France is", "max_tokens": 32, "temperature": 0, "logprobs": 3}


def curl_command(server: Serving) -> str:
    """Asks for a reply and its numbers. Where a key is needed, it names the key's variable, never the key."""
    begin = "curl"
    if server.url.startswith("unix:"):
        begin += f" --unix-socket {shlex.quote(server.url.removeprefix('unix:'))}"
    elif server.url.startswith("https:"):
        begin += " --insecure"  # a certificate is rarely of 127.0.0.1
    lines = [f"{begin} {server.reachable}/v1/{'chat/completions' if server.chats else 'completions'}"]
    lines.append("-H 'Content-Type: application/json'")
    if server.keyed:
        lines.append('-H "Authorization: Bearer $LOGPROBD_API_KEY"')
    lines.append(f"-d {shlex.quote(json.dumps(_CHAT if server.chats else _COMPLETION))}")
    return " \\\n  ".join(lines)
