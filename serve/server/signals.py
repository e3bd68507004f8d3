"""What signals other than those of shutdown do: read files again, and show where the threads are."""

import logging
import ssl
import sys
import threading
import traceback

from serve.api.keys import ApiKeys
from serve.config.api_keys import all_keys
from serve.config.config import ServeConfig
from serve.server.model_files import StartupError

logger = logging.getLogger(__name__)


class Reload:
    """Reads the files of API keys and certificates again. After an error, what was read before stays in use."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._is_requested = False

    @property
    def has_files(self) -> bool:
        return self._config.api_key_file is not None or self._config.ssl_certfile is not None

    def request(self, *_: object) -> None:
        """A signal handler."""
        self._is_requested = True

    def run_if_requested(self, keys: ApiKeys, context: ssl.SSLContext | None) -> None:
        """Update `keys` and `context`; connections that are open keep their certificate."""
        if not self._is_requested:
            return
        self._is_requested = False
        try:
            file = self._config.api_key_file
            read = None if file is None else all_keys(self._config.flag_keys, file)
            if context is not None:
                load_certificates(self._config, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # not a half of them
                load_certificates(self._config, context)
            if read is not None:
                keys.replace(read)
        except (ValueError, StartupError) as error:
            logger.error("SIGHUP: %s", error)
        else:
            logger.warning("SIGHUP: API keys and certificates were read again")


def load_certificates(config: ServeConfig, context: ssl.SSLContext) -> None:
    """Load the certificate, its key and the clients' authorities.

    Raises:
        StartupError: a file cannot be used for TLS.
    """
    if config.ssl_certfile is None:
        return
    flag, file = "--ssl-certfile", config.ssl_certfile
    try:
        # An empty password fails for an encrypted key; without one, OpenSSL would prompt on the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
        if config.ssl_ca_certs is not None:
            flag, file = "--ssl-ca-certs", config.ssl_ca_certs
            context.load_verify_locations(file)
    except OSError as error:  # includes ssl.SSLError
        raise StartupError(f"{flag} {file}: {error.strerror or error}") from error


def log_stacks(*_: object) -> None:
    """Log the stacks of all threads. A signal handler."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = (
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
    logger.warning("stacks of all threads:\n%s", "".join(stacks))
