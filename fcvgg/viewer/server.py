"""A local server that computes the page's maps in Python (extra ``serve``)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from fcvgg.errors import ArgumentError, FcvggError, one_line
from fcvgg.support.extras import imported
from fcvgg.viewer.document import document

Answer = Callable[[bytes, "int | None", "int | None"], Mapping[str, Any]]
"""The map's data of an image file's bytes, at a smaller side and an output stride or the usual."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that the address is known to be free before a network is loaded.

    Raises:
        ArgumentError: if it is not free, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ArgumentError(
            f"--host and --port must be an address that is free, got {host}:{port} "
            f"({error.strerror or error}); choose another --port"
        ) from error
    return listener


def application(
    network: Mapping[str, Any], answer: Answer, title: str, host: str, limit: int
) -> Any:
    """The server as an ASGI application: the page at ``/``, maps at ``/map``.

    Maps are computed one after the other, in a thread. A page of another site can neither read
    them nor have them computed: uploads need a content type that browsers ask about first, and on
    the loopback only its own names are answered to.

    Args:
        network: what the page knows of the network before an image is opened.
        answer: computes a map; what it raises as `FcvggError` is shown.
        title: of the page.
        host: on which the server listens.
        limit: bytes that an upload may have.

    Raises:
        MissingExtraError: if starlette is not installed.
    """
    applications = imported("starlette.applications", "serve")
    responses = imported("starlette.responses", "serve")
    routing = imported("starlette.routing", "serve")
    concurrency = imported("starlette.concurrency", "serve")
    lock = imported("anyio", "serve").Lock()
    refusal = f"the file must have at most {limit / 2**20:g} MB; raise --limit, or make it smaller"
    page = document("serve", {**network, "limit": limit, "refusal": refusal}, title)

    def refused(message: str, status: int) -> Any:
        return responses.JSONResponse({"error": message}, status, _HEADERS)

    async def index(request: Any) -> Any:
        return responses.HTMLResponse(page, headers=_HEADERS)

    async def compute(request: Any) -> Any:
        if request.headers.get("content-type") != "application/octet-stream":
            return refused("uploads must be application/octet-stream", 415)
        upload = bytearray()
        async for part in request.stream():
            upload += part
            if len(upload) > limit:
                return refused(refusal, 413)
        try:
            side, stride = (_positive(request.query_params, name) for name in ("side", "stride"))
            async with lock:
                found = await concurrency.run_in_threadpool(answer, bytes(upload), side, stride)
        except FcvggError as error:
            return refused(one_line(error), 422)
        return responses.JSONResponse(found, headers=_HEADERS)

    routes = [
        routing.Route("/", index),
        routing.Route("/map", compute, methods=["POST"]),
    ]
    middleware = []
    if host in _LOOPBACK:  # else a name that resolves to the loopback would reach the server
        trusted = imported("starlette.middleware.trustedhost", "serve").TrustedHostMiddleware
        wrapper = imported("starlette.middleware", "serve").Middleware
        allowed = [*_LOOPBACK, "[::1]"]
        middleware.append(wrapper(trusted, allowed_hosts=allowed, www_redirect=False))
    return applications.Starlette(routes=routes, middleware=middleware)


def run_server(application: Any, listener: socket.socket) -> None:
    """Answer until Ctrl-C."""
    uvicorn = imported("uvicorn", "serve")
    settings = uvicorn.Config(application, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(settings).run(sockets=[listener])


def _positive(parameters: Mapping[str, str], name: str) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0 and len(text) < 9):
        raise ArgumentError(f"{name} must be a positive integer, got {text!r}")
    return int(text)
