"""What metrics and logs call credentials that no key of the file is behind; no key may be called so."""

JWT = "jwt"
NOBODY = "none"
UNKNOWN = "unknown"
RESERVED = frozenset({JWT, NOBODY, UNKNOWN})
