"""The errors memfabric raises, and what each says about the effect of the call.

Responsible for the hierarchy and the stable refusal codes. It must not know any I/O.

* `UsageError`: the call itself is wrong. **Not applied.**
* `RefusedError`: the pool was asked and said no. **Not applied.** `code` is stable and machine-readable.
* `UnavailableError`: no server or node could be asked at all. **Not applied.**
* `OutcomeUnknownError`: the request left, no answer came in time. **Unknown**: it may have been applied;
  the message says how to find out.
* `CorruptBlockError`: bytes did not pass verification; none of them were reported as a success.
"""

from __future__ import annotations


class MemfabricError(Exception):
    """Base of every error that memfabric raises on purpose."""


class UsageError(MemfabricError, ValueError):
    """The arguments are wrong (size, type, order, a closed client). Nothing happened."""


class RefusedError(MemfabricError):
    """The pool refused the request. Nothing happened.

    Attributes:
        code: one of `RefusalCode`'s values; stable over versions.
        retry_after_s: seconds after which a retry makes sense; None when a retry cannot help.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class UnavailableError(MemfabricError):
    """The server or a node could not be reached within the deadline. Nothing happened."""


class OutcomeUnknownError(MemfabricError):
    """A request was sent and its answer did not come before the deadline: it may or may not have happened."""


class CorruptBlockError(MemfabricError):
    """A block's bytes did not match what was committed; they were not returned as a success."""


class RefusalCode:
    """Stable codes of `RefusedError.code` (and of `Refused` on the wire)."""

    BAD_REQUEST = "bad_request"
    VERSION = "version"
    UNKNOWN_SESSION = "unknown_session"
    STALE_TOKEN = "stale_token"
    UNKNOWN_NAMESPACE = "unknown_namespace"
    NAMESPACE_EXISTS = "namespace_exists"
    NAMESPACE_BUSY = "namespace_busy"
    FINGERPRINT = "fingerprint"
    UNKNOWN_LEASE = "unknown_lease"
    NOT_YOUR_LEASE = "not_your_lease"
    LEASE_EXPIRED = "lease_expired"
    TOO_LARGE = "too_large"
    QUOTA = "quota"
    NO_SPACE = "no_space"
    UNKNOWN_NODE = "unknown_node"
    NODE_NAME_TAKEN = "node_name_taken"
    STALE_INCARNATION = "stale_incarnation"
    NOT_ALLOWED = "not_allowed"
    OVERLOADED = "overloaded"
