"""TLS to an engine: what the command needs of a socket, over one.

Runs in: the boxship command; imported only when an address asks for it.
Spec: RFC 8446; docker's ca.pem, cert.pem and key.pem.

The ssl module's own sockets cannot end one direction alone, which is how a container learns that its input is over.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, cast

from boxship.cli.http.client import Certificates, ConnectFailed
from boxship.kit.errors import NotFound

if TYPE_CHECKING:
    import _socket

_CHUNK = 65536


def secure(sock: _socket.socket, where: str, certificates: Certificates) -> _socket.socket:
    """The same connection by TLS. Raises ConnectFailed, NotFound for files that are not there."""
    folder = certificates.folder
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificates.verify:
            context.load_verify_locations(f"{folder}/ca.pem")
        else:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
        except FileNotFoundError:
            pass  # the engine may do without
        made = _Secured(sock, context, where.rstrip("/").rpartition(":")[0].strip("[]"))
    except FileNotFoundError:
        sock.close()
        raise NotFound(f"unable to resolve docker endpoint: open {folder}/ca.pem: no such file or directory") from None
    except ssl.SSLError as error:
        sock.close()
        raise ConnectFailed(f"TLS with {where}: {error.reason or error}") from None
    except OSError as error:
        sock.close()
        raise ConnectFailed(f"TLS with {where}: {error.strerror or error}") from None
    return cast("_socket.socket", made)


class _Secured:
    """What `Connection` and `Session` use of a socket."""

    def __init__(self, sock: _socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()

    def _flush(self) -> None:
        if self._out.pending:
            self._sock.sendall(self._out.read())

    def _fill(self) -> None:
        data = self._sock.recv(_CHUNK)
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    def sendall(self, data: bytes) -> None:
        self._tls.write(data) if data else None
        self._flush()

    def recv(self, size: int) -> bytes:
        # All that has come is given out at once: whoever polls the descriptor does not see what waits here.
        found = b""
        while True:
            try:
                piece = self._tls.read(max(size, _CHUNK))
            except ssl.SSLWantReadError:
                if found:
                    return found
                self._flush()
                self._fill()
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return found
            if not piece:
                return found
            found += piece

    def shutdown(self, _how: int) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # says that the other side has not ended yet
        self._flush()

    def settimeout(self, timeout_s: float | None) -> None:
        self._sock.settimeout(timeout_s)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
