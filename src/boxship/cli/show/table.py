"""Lists: docker's tables, --format, --quiet, JSON.

Runs in: the boxship command.
Spec: docker's `--format`: "table", "table TEMPLATE", "json", "raw" of some, or a template; Go's text/tabwriter with a least
width of 10 and three spaces between columns.
"""

from __future__ import annotations

import os

from boxship.kit.errors import InvalidArgument
from boxship.oci import text as json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Fields = Mapping[str, Callable[[], object] | object]

_LEAST, _BETWEEN = 10, 3


def write(data: str | bytes, fd: int = 1) -> None:
    """All of it, to a descriptor. Raises OSError."""
    left = memoryview(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
    while left:
        left = left[os.write(fd, left) :]


def columns(rows: Sequence[Sequence[str]], *, least: int = _LEAST) -> str:
    """Lines with their cells below one another; the last cell of each ends the line."""
    widths: list[int] = []
    for row in rows:
        for index, cell in enumerate(row[:-1]):
            if index == len(widths):
                widths.append(least)
            widths[index] = max(widths[index], len(cell) + _BETWEEN)
    lines = ["".join(cell.ljust(widths[index]) for index, cell in enumerate(row[:-1])) + (row[-1] if row else "") for row in rows]
    return "\n".join(lines) + "\n" if lines else ""


class Listing:
    """How a list is to be shown.

    Attributes:
        format: what --format says; "" is the default.
        default: names of the default table's columns.
        headings: column headings by field.

    `quiet` names the only field that --quiet shows; `go_type` is what docker calls such a line in its errors.
    """

    def __init__(
        self, form: str, default: Sequence[str], headings: Mapping[str, str], *, quiet: str = "", go_type: str = ""
    ) -> None:
        form = form.replace("\\t", "\t").replace("\\n", "\n") if form else ""
        self.names: Sequence[str] = ()
        self.source = ""
        self.json = form == "json"
        self.table = False
        self.headings = headings
        self._type = f" in type {go_type}" if go_type else ""
        if quiet and (form in ("", "table", "raw") or form.startswith("table ")):
            self.source, self.names = "", (quiet,)
        elif form in ("", "table"):
            self.table, self.names = True, default
        elif form.startswith("table "):
            self.table, self.source = True, form[6:].strip(" ")
        elif not self.json:
            self.source = form
        self._template = None
        if self.source:
            from boxship.cli.show.gotemplate import Template

            try:
                self._template = Template(self.source)
            except InvalidArgument as error:
                raise InvalidArgument(str(error).replace("template parsing error:", "failed to parse template:")) from None

    def needs(self, name: str) -> bool:
        """Whether the field is shown: some cost the engine work."""
        if self.json:
            return False
        return name in self.names or (self._template is not None and not self._template.fields().isdisjoint((name, ".")))

    def text(self, rows: Iterable[Fields]) -> str:
        """The list as text."""
        if self.json:
            return "".join(f"{json_text.dumps({name: _made(row[name]) for name in sorted(row)})}\n" for row in rows)
        if self._template is None:
            cells = [[str(_made(row[name])) for name in self.names] for row in rows]
            if not self.table:
                return "".join(f"{row[0]}\n" for row in cells)
            return columns([[self.headings[name] for name in self.names], *cells])
        from boxship.cli.show.gotemplate import Row

        try:
            lines = [self._template.render(Row(row)) for row in rows]
        except InvalidArgument as error:
            more = self._type if "evaluate field" in str(error) else ""
            raise InvalidArgument(f"failed to execute template: {error}{more}") from None
        if not self.table:
            return "".join(f"{line}\n" for line in lines)
        head = self._template.render(
            Row({name: self.headings.get(name, name) for name in {*self.headings, *self._template.fields()}})
        )
        return columns([line.split("\t") for line in [head, *lines]])

    def show(self, rows: Iterable[Fields]) -> None:
        """Print it."""
        write(self.text(rows))


def _made(value: object) -> object:
    return value() if callable(value) else value
