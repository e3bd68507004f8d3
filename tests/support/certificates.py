"""Certificates for servers and clients of tests."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority, and files of what it has issued."""

    authority: trustme.CA
    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> "Certificates":
        """New ones."""
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        return cls(authority, folder)

    def flags(self) -> list[str]:
        """Those of a server."""
        return ["--ssl-certfile", str(self.folder / "cert.pem"), "--ssl-keyfile", str(self.folder / "key.pem")]

    def trusting(self) -> ssl.SSLContext:
        """A client that knows the authority."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context
