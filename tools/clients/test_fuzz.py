"""schemathesis on /openapi.json: no answer is a 5xx, and each has a status, a type and a shape that are described."""

import re
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess
from tools.clients.environments import python_environment, run

pytestmark = pytest.mark.clients
# A tiny `timeout` is valid, and gets a 504.
SETTINGS = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n'
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_schemathesis_two_thousand_requests(tmp_path: Path) -> None:
    # A short context: many requests say nothing of their length, and would fill it.
    process = ServerProcess("--max-model-len", "128", "--response-store", str(tmp_path / "responses.db"))
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    try:
        options = f"-n 140 --seed 1 --phases coverage,fuzzing --checks {CHECKS} --request-timeout 120".split()
        programs = python_environment("schemathesis")
        command = ("schemathesis", "run", f"{process.url}/openapi.json", *options)
        printed = run(*command, base_url=process.url, home=tmp_path, programs=programs, folder=tmp_path)
    finally:
        code = process.terminate()
        print("".join(line for line in process.log if "access_log" not in line))  # shown if the test fails
    found = re.search(r"(\d+) generated", printed)
    assert found is not None, printed
    assert int(found[1]) >= 2000
    assert code == 0
