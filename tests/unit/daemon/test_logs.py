"""A record is one line, whatever is in it."""

import json
import logging
import sys

from boxship.daemon.logs import Json, Text


def record(message, error=False, **extra):
    made = logging.getLogger("x").makeRecord("boxship.x", logging.INFO, "f", 1, message, (), None, extra=extra)
    if error:
        try:
            raise ValueError("a\nb")
        except ValueError:
            made.exc_info = sys.exc_info()
    return made


def test_text_is_one_line_of_pairs():
    line = Text().format(record('say "hi"\nthere', error=True, namespace="ns", id="a b"))
    assert "\n" not in line
    assert 'level=info msg="say \\"hi\\"\\nthere" logger=boxship.x namespace=ns id="a b"' in line
    assert "ValueError" in line


def test_json_is_an_object():
    fields = json.loads(Json().format(record("x\ny", error=True, namespace="ns")))
    assert (fields["msg"], fields["namespace"], fields["level"]) == ("x\ny", "ns", "info")
    assert fields["error"].endswith("ValueError: a\nb")
    assert fields["time"].endswith("Z")
