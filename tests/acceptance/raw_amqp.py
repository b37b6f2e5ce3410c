"""AMQP as bytes: what no client library would send, and a broker takes nevertheless."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pamqp.base
from pamqp import commands, exceptions, frame, header

TIMEOUT_S = 30.0
FRAME_MAX_BYTES = 131_072
_BASIC_CLASS = 60
_METHOD, _HEADER, _BODY = 1, 2, 3
HEADERS_FLAG, MESSAGE_ID_FLAG, TIMESTAMP_FLAG, DELIVERY_MODE_FLAG = 1 << 13, 1 << 7, 1 << 6, 1 << 12


def short(text: bytes) -> bytes:
    """A short string."""
    return bytes([len(text)]) + text


def long(content: bytes) -> bytes:
    """A long string, a table or an array: its length, and then itself."""
    return struct.pack(">I", len(content)) + content


def header_table(*fields: tuple[bytes, bytes]) -> bytes:
    """Names, and values with the letter of their type before them."""
    return long(b"".join(short(name) + value for name, value in fields))


class WireClient:
    """One connection with one channel in confirm mode."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._socket = socket.create_connection((address.hostname, address.port), TIMEOUT_S)
        self._buffer = b""
        self._log_in(address.username or "guest", address.password or "guest")

    def close(self) -> None:
        self._socket.close()

    def publish(self, exchange: str, routing_key: bytes, body: bytes, flags: int = 0, properties: bytes = b"") -> bool:
        """``properties``: those of the ``flags``, in AMQP's order. False if the broker does not take it: it has closed
        the channel or the connection then."""
        method = struct.pack(">HHH", _BASIC_CLASS, 40, 0) + short(exchange.encode()) + short(routing_key) + b"\0"
        head = struct.pack(">HHQH", _BASIC_CLASS, 0, len(body), flags) + properties
        self._socket.sendall(_framed(_METHOD, method) + _framed(_HEADER, head) + b"".join(_in_frames(body)))
        try:
            return isinstance(self._receive(), commands.Basic.Ack)
        except (OSError, EOFError):
            return False

    # --- inside -----------------------------------------------------------------------------------------------

    def _log_in(self, user: str, password: str) -> None:
        self._socket.sendall(header.ProtocolHeader().marshal())
        self._receive()
        self._send(commands.Connection.StartOk({}, "PLAIN", f"\0{user}\0{password}", "en_US"), channel=0)
        self._receive()
        self._send(commands.Connection.TuneOk(1, FRAME_MAX_BYTES, 0), channel=0)
        self._send(commands.Connection.Open("/"), channel=0)
        self._receive()
        self._send(commands.Channel.Open())
        self._receive()
        self._send(commands.Confirm.Select())
        self._receive()

    def _send(self, method: pamqp.base.Frame, channel: int = 1) -> None:
        self._socket.sendall(frame.marshal(method, channel))

    def _receive(self) -> Any:
        while True:
            try:
                length, _, value = frame.unmarshal(self._buffer)
            except exceptions.UnmarshalingException:
                received = self._socket.recv(65_536)
                if not received:
                    raise EOFError("the broker has closed the connection") from None
                self._buffer += received
            else:
                self._buffer = self._buffer[length:]
                return value


def _framed(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def _in_frames(body: bytes) -> Iterator[bytes]:
    room = FRAME_MAX_BYTES - 8
    for start in range(0, len(body), room):
        yield _framed(_BODY, body[start : start + room])


@contextmanager
def wire_client(url: str) -> Iterator[WireClient]:
    client = WireClient(url)
    try:
        yield client
    finally:
        client.close()
