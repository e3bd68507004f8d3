"""TLS certificates for tests."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate authority and the files of one certificate."""

    authority: trustme.CA
    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> "Certificates":
        """Create an authority and a certificate for 127.0.0.1."""
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        return cls(authority, folder)

    def flags(self) -> list[str]:
        """Return the server's TLS flags."""
        return ["--ssl-certfile", str(self.folder / "cert.pem"), "--ssl-keyfile", str(self.folder / "key.pem")]

    def trusting(self) -> ssl.SSLContext:
        """Return a client context that trusts the authority."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context
