"""Bounds on what one client may make the server hold or wait for."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of a connection.

    Attributes:
        target_bytes: Longest request target.
        header_bytes: All header names and values of one request together.
        header_count: Headers of one request.
        body_bytes: Longest body.
        pipelined_requests: Requests that may wait behind the one being answered before reading pauses.
        head_timeout_s: Time for a request's head to arrive once its first byte has.
        body_timeout_s: Longest pause within a body.
        idle_timeout_s: How long a connection may stay open between requests.
        write_timeout_s: How long a client may stop reading before it is dropped.
        write_buffer_bytes: Unsent bytes above which producers are told to stop.
    """

    target_bytes: int = 8 * 1024
    header_bytes: int = 64 * 1024
    header_count: int = 128
    body_bytes: int = 192 * _MIB
    pipelined_requests: int = 16
    head_timeout_s: float = 15.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 60.0
    write_buffer_bytes: int = 256 * 1024
