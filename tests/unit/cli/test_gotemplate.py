"""Templates do what Go's text/template does, which wrote the expected texts here."""

import pytest

from boxship.cli.show.gotemplate import Row, Template
from boxship.kit.errors import InvalidArgument

DATA = {
    "Name": "/box", "State": {"Running": True, "Pid": 42, "Health": None}, "Args": ["a", "b<c"], "Labels": {"b": "2", "a": "1", "x.y": "z"},
    "Empty": [], "Config": {"Labels": None, "Env": None}, "Size": 1.5, "Big": 123456789012,
}


@pytest.mark.parametrize(("source", "expected"), [
    ("{{.Name}}", "/box"),
    ("{{ .State.Pid }}/{{.State.Running}}", "42/true"),
    ("{{json .Labels}}", '{"b":"2","a":"1","x.y":"z"}'),
    ('{{join .Args ","}}', "a,b<c"),
    ("{{upper .Name}}{{lower \"ABC\"}}", "/BOXabc"),
    ('{{range $i, $a := .Args}}{{$i}}={{$a}};{{end}}', "0=a;1=b<c;"),
    ('{{range $k, $v := .Labels}}{{$k}}:{{$v}} {{end}}', "a:1 b:2 x.y:z "),
    ("{{range .Empty}}x{{else}}none{{end}}", "none"),
    ('{{index .Labels "x.y"}}', "z"),
    ("{{index .Args 1}}", "b<c"),
    ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
    ('{{if eq .State.Pid 41}}a{{else if eq .State.Pid 42}}b{{else}}c{{end}}', "b"),
    ('{{if and .State.Running (gt .State.Pid 40)}}yes{{end}}', "yes"),
    ('{{with .State}}{{.Pid}}{{end}}', "42"),
    ("a  {{- .Name -}}  b", "a/boxb"),
    ("{{/* nothing */}}x", "x"),
    ("{{println .Name}}", "/box\n"),
    ('{{printf "%s-%d-%05d-%q" .Name .State.Pid 7 "x"}}', '/box-42-00007-"x"'),
    ("{{.Args}} {{.Labels}}", "[a b<c] map[a:1 b:2 x.y:z]"),
    ("{{len .Args}}", "2"),
    ('{{split "a:b" ":"}}', "[a b]"),
    ("{{.Name | upper | printf \"%s!\"}}", "/BOX!"),
    ('{{$x := "y"}}{{$x}}', "y"),
    ("{{.Config.Labels}}{{.Config.Env}}{{.State.Health}}", "map[][]<nil>"),
    ("{{json .Config.Labels}}", "null"),
    ('{{(index .Labels "a")}}', "1"),
    ("{{range .Args}}{{if eq . \"b<c\"}}{{break}}{{end}}{{.}}{{end}}", "a"),
    ("{{.Size}} {{.Big}}", "1.5 123456789012"),
    ("{{`raw \\n`}}", "raw \\n"),
    ('{{truncate "abcdef" 3}}{{pad "x" 1 2}}|', "abc x  |"),
    ("{{range $v := .Args}}{{$.Name}}{{end}}", "/box/box"),
    ('{{not .Empty}} {{or "" "b"}} {{slice "abcdef" 1 3}}', "true b bc"),
])
def test_template(source: str, expected: str) -> None:
    assert Template(source).render(DATA) == expected


@pytest.mark.parametrize(("source", "message"), [
    ("{{.Foo}}", 'map has no entry for key "Foo"'), ("{{", "unclosed action"), ("{{nope .}}", 'function "nope" not defined'),
    ("{{if .Name}}x", "unexpected EOF"), ("{{end}}", "unexpected {{end}}"), ("{{.Name.Foo}}", "can't evaluate field Foo"),
    ('{{"x}}', "unclosed action"), ("{{$y}}", "undefined variable"), ("{{}}", "missing value for command"),
])
def test_mistakes_are_named(source: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Template(source).render(DATA)
    assert message in str(caught.value)


def test_a_rows_fields_are_made_when_asked_for() -> None:
    asked = []
    row = Row(A=lambda: asked.append("A") or "1", B=lambda: asked.append("B") or "2")
    assert Template("{{.A}}").render(row) == "1"
    assert asked == ["A"]
    assert Template("{{json .}}").render(row) == '{"A":"1","B":"2"}'
