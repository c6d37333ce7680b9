"""Structured logs: one event, one line, on stderr. No secrets: rkeys, descriptors and payloads never come here."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LEVELS = ("debug", "info", "warning", "error")


class _LineFormatter(logging.Formatter):
    """``2026-01-02T03:04:05.678Z level component event key=value …``, or the same as a JSON object."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        if self._as_json:
            line = {"time": stamp, "level": record.levelname.lower(), "component": record.name}
            return json.dumps({**line, "event": record.getMessage(), **fields}, default=str)
        pairs = " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
        return f"{stamp} {record.levelname.lower():7} {record.name} {record.getMessage()} {pairs}".rstrip()


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(c.isspace() or c in "\"'=" or not c.isprintable() for c in text) else text


def setup(level: str = "info", *, as_json: bool = False) -> None:
    """Send memfabric's logs to stderr. Programs call this; the library never does.

    Raises:
        ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(as_json))
    root = logging.getLogger("memfabric")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


class EventLog:
    """Writes events with fields to one component's logger."""

    def __init__(self, component: str) -> None:
        self._logger = logging.getLogger(f"memfabric.{component}")

    def event(self, level: str, name: str, **fields: Any) -> None:
        """One line."""
        self._logger.log(getattr(logging, level.upper()), name, extra={"fields": fields})
