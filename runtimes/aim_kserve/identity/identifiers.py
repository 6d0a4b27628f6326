"""Names of headers that carry credentials, and of credentials in metrics and logs that no key of the file is behind."""

JWT = "jwt"
NOBODY = "none"
UNKNOWN = "unknown"
#: No key may be called so.
RESERVED = frozenset({JWT, NOBODY, UNKNOWN})
#: What says who asks, to us or to a proxy before us, is no business of whoever answers.
CREDENTIAL_HEADERS = frozenset(("authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"))
