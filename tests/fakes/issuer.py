"""An issuer of tokens: real keys, and a JWKS over real HTTP that can be late, large, wrong, rotated or gone."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER, AUDIENCE = "https://issuer.example", "aim"

_NEW = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


class Issuer:
    """``with Issuer() as issuer``: its JWKS is at ``issuer.url``.

    Attributes:
        asked: how often it was.
        delay_s, body: how late it answers, and what instead of its keys.
    """

    def __init__(self, *algorithms: str) -> None:
        self.keys: dict[str, tuple[str, Any]] = {}
        self.asked, self.delay_s = 0, 0.0
        self.status, self.body = 200, b""
        for algorithm in algorithms or ("ES256",):
            self.add(algorithm.lower(), algorithm)

    def add(self, kid: str, algorithm: str = "ES256") -> None:
        self.keys[kid] = algorithm, _NEW[algorithm]()

    def jwks(self) -> bytes:
        listed = []
        for kid, (name, key) in self.keys.items():
            public = jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True)
            listed.append({**public, "kid": kid, "use": "sig", "alg": name})
        return orjson.dumps({"keys": listed})

    def token(self, kid: str | None = None, *, algorithm: str | None = None, **claims: Any) -> str:
        """Valid for 5 minutes and scope ``infer``, but for what ``claims`` say; None leaves one out."""
        kid = kid or next(iter(self.keys))
        name, key = self.keys[kid]
        now = int(time.time())
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 300, "iat": now, "scope": "infer"} | claims
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, key, algorithm or name, headers={"kid": kid})

    def flags(self, *more: str) -> list[str]:
        return ["--jwt_issuer", ISSUER, "--jwt_audience", AUDIENCE, "--jwt_jwks", self.url, *more]

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self, port: int = 0) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                time.sleep(issuer.delay_s)
                body = issuer.body or issuer.jwks()
                self.send_response(issuer.status)
                self.send_header("content-length", str(len(body)))
                self.send_header("location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/jwks"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody is there any more."""
        self._server.shutdown()
        self._server.server_close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()
