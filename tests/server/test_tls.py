"""HTTPS, with and without client certificates."""

from pathlib import Path

import httpx2
import pytest
import trustme

from serve.config.flags import parse_args
from serve.server.server import main
from tests.support.certificates import Certificates
from tests.support.faulty_server import FaultyServer

pytestmark = pytest.mark.slow


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates.made_in(tmp_path)


def test_https_server_answers(certificates: Certificates) -> None:
    server = FaultyServer(*certificates.flags())
    try:
        assert server.url.startswith("https://")
        assert httpx2.get(f"{server.url}/health", verify=certificates.trusting()).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")  # does not trust the authority
        with pytest.raises(httpx2.TransportError):
            httpx2.get(server.url.replace("https", "http"))
    finally:
        assert server.terminate() == 0


def test_ssl_ca_certs_requires_a_client_certificate(certificates: Certificates) -> None:
    server = FaultyServer(*certificates.flags(), "--ssl-ca-certs", str(certificates.folder / "ca.pem"))
    try:
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/health", verify=certificates.trusting())
        context = certificates.trusting()
        certificates.authority.issue_cert("client@example.org").configure_cert(context)
        assert httpx2.get(f"{server.url}/health", verify=context).status_code == 200
        stranger = certificates.trusting()
        trustme.CA().issue_cert("client@example.org").configure_cert(stranger)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/health", verify=stranger)
    finally:
        assert server.terminate() == 0


@pytest.mark.parametrize("flag", ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"])
def test_invalid_certificate_file_is_reported_before_loading(
    certificates: Certificates, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = certificates.folder / "broken.pem"
    broken.write_text("nothing")
    flags = [*certificates.flags(), "--ssl-ca-certs", str(certificates.folder / "ca.pem"), flag, str(broken)]
    assert main(parse_args([*flags, "/no/such/model"])) == 1
    assert flag.replace("keyfile", "certfile") in capsys.readouterr().err
