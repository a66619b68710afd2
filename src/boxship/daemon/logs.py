"""The daemon's log: one line a record on standard error, for people as containerd writes it, or as JSON.

Runs in: the daemon.
"""

from __future__ import annotations

import json
import logging
import time

from boxship.daemon.config import Log

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _stamp(record: logging.LogRecord) -> str:
    seconds, fraction = divmod(record.created, 1)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(fraction * 1e6):06d}Z"


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


class Text(logging.Formatter):
    """`time="…" level=info msg="…" key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: list[tuple[str, object]] = [
            ("time", _stamp(record)), ("level", record.levelname.lower()), ("msg", record.getMessage()), ("logger", record.name)]
        fields += _extra(record).items()
        if record.exc_info:
            fields.append(("error", self.formatException(record.exc_info)))
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields)


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and all(char.isalnum() or char in "-._/@^+" for char in text)
    return text if plain else json.dumps(text, ensure_ascii=False)


class Json(logging.Formatter):
    """One object a line, with the same names."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _stamp(record), "level": record.levelname.lower(), "msg": record.getMessage(), "logger": record.name}
        fields.update(_extra(record))
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def configure(settings: Log) -> None:
    """Log so from now on; may be called again."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if settings.format == "json" else Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # Every step of the selector is of interest to nobody who asks for debug messages of a daemon.
    for name in ("asyncio", "aiohttp.access", "grpc"):
        logging.getLogger(name).setLevel(max(logging.INFO, root.level))
