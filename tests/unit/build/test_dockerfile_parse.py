"""From text to typed instructions: lines, forms, flags, here-documents, and errors that show the place."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxship.build import dockerfile as language
from boxship.build.dockerfile import DockerfileError
from boxship.build.dockerfile.lines import MAX_BYTES


def all_of(text: str | bytes):
    data = text.encode() if isinstance(text, str) else text
    return [each for block in language.parse(data).blocks for each in (block.start, *block.instructions)]


def one(text: str):
    return all_of(f"FROM x\n{text}\n")[1]


# lines


@pytest.mark.parametrize(("text", "command"), [
    ("RUN a \\\n  b", "a   b"), ("RUN a\\\nb", "ab"), ("RUN a \\  \nb", "a b"), ("RUN a \\\n# c\n b", "a  b"), ("RUN a \\\n   # c\n b", "a  b"),
    ("RUN a \\\n\n\n b", "a  b"), ("RUN a \\\\\nENV A=1", "a \\\\"), ("RUN a # b", "a # b"), ("  RUN   a  ", "a"), ("run a", "a"), ("Run\ta", "a"),
    ("RUN \\\n  a", "a"), ("\\\nRUN a", "a"), ("RUN a \\\n", "a"), ("RUN a \\\n \\\n b", "a   b"),
    ("RUN --network=host \\\n  --security=insecure a", "a"), ("RUN -- --a", "--a"), ("RUN", ""),
])
def test_lines_are_joined_as_docker_joins_them(text, command):
    assert one(text).text == command


@pytest.mark.parametrize(("text", "command"), [
    ("# escape=`\nFROM x\nRUN a `\n b\\\n", "a  b\\"), ("#escape = `\nFROM x\nRUN a `\n b\\\n", "a  b\\"), ("# ESCAPE=`\nFROM x\nRUN a `\n b\\\n", "a  b\\"),
    ("# syntax=a\n# escape=`\nFROM x\nRUN a `\n b\\\n", "a  b\\"), ("# a comment\n# escape=`\nFROM x\nRUN a `", "a `"), ("\n# escape=`\nFROM x\nRUN a `", "a `"),
    ("FROM x\n# escape=`\nRUN a `", "a `"), ("# other=1\n# escape=`\nFROM x\nRUN a `", "a `"),
])
def test_directives_count_only_at_the_beginning(text, command):
    assert all_of(text)[1].text == command


def test_syntax_and_check_directives_are_known():
    parsed = language.parse(b"# syntax=docker/dockerfile:1.7\n# check=skip=all;error=true\nFROM x\n")
    assert parsed.syntax == "docker/dockerfile:1.7"
    assert language.options(parsed) == language.Options(skip_all=True, error=True)


def test_every_instruction_knows_its_range_and_text():
    text = "ARG A\n\n  FROM x AS y\nRUN one \\\n    two\nCOPY <<EOF /z\nhello\nEOF\n"
    start, run, copy = all_of(text)
    assert (start.line, start.location.column, start.last_line) == (3, 3, 3)
    assert (run.line, run.last_line, run.original) == (4, 5, "RUN one     two")
    assert (copy.line, copy.last_line, copy.location.end_column) == (6, 8, 3)
    assert run.error("x", "two").location[:2] == (5, 5)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_ends_of_lines_and_marks_of_encodings_do_not_matter(ends, bom):
    text = ends.join(["# escape=`", "FROM x", "RUN a `", "  b", 'CMD ["é"]', "COPY <<E /x", "\tq", "E"])
    _, run, cmd, copy = all_of(bom + text.encode())
    assert run.text == "a   b"
    assert cmd.words == ("é",)
    assert copy.heredocs[0].content == f"\tq{ends}"


def test_comments_above_belong_to_the_instruction():
    start, run = all_of("# one\n#\n# two\n# three\nFROM x\n\nRUN a\n# end\n")
    assert start.comments == ("two", "three")
    assert run.comments == ()


# forms


@pytest.mark.parametrize(("text", "words", "shell"), [
    ('CMD ["a", "b c"]', ("a", "b c"), ""), ("CMD [ ]", (), ""), ('CMD ["a",]', None, '["a",]'), ("CMD ['a']", None, "['a']"), ("CMD a b", None, "a b"),
    ('CMD ["\\u00e9\\n"]', ("é\n",), ""), ('CMD ["\\ud800"]', ("\ufffd",), ""), ("CMD [ -f x ]", None, "[ -f x ]"), ("CMD", None, ""),
    ('CMD ["a"] b', None, '["a"] b'), ("CMD [NaN]", None, "[NaN]"), ('CMD ["a"', None, '["a"'),
])
def test_the_exec_form_is_a_json_array_of_texts_and_anything_else_is_for_the_shell(text, words, shell):
    assert (one(text).words, one(text).text) == (words, shell)


@pytest.mark.parametrize("text", ["CMD [1]", 'RUN ["a", {}]', 'COPY ["a", ["b"]]', "ENTRYPOINT [null]", "VOLUME [1e999]", "CMD " + "[" * 50_000 + "]" * 50_000])
def test_an_array_of_anything_else_is_an_error(text):
    with pytest.raises(DockerfileError, match="arrays must be comprised of strings only"):
        one(text)


@pytest.mark.parametrize(("text", "pairs"), [
    ("ENV A=1", (("A", "1"),)), ("ENV A=1 B=2", (("A", "1"), ("B", "2"))), ("ENV A 1 2", (("A", "1 2"),)), ("ENV A=", (("A", ""),)),
    ('ENV A="b c" D=e\\ f', (("A", '"b c"'), ("D", "e\\ f"))), ("ENV A='b c'", (("A", "'b c'"),)), ("ENV A=b=c", (("A", "b=c"),)),
    ("ENV A   b", (("A", "b"),)), ('LABEL "a b"=c', (('"a b"', "c"),)), ("LABEL a=1 \\\n  b=2", (("a", "1"), ("b", "2"))),
])
def test_names_with_values(text, pairs):
    assert one(text).pairs == pairs


def test_arguments_may_have_no_value():
    assert one('ARG A B= C="d e"').pairs == (("A", None), ("B", ""), ("C", '"d e"'))


def test_healthcheck():
    check = one("HEALTHCHECK --interval=1m30s --timeout=1.5s --start-period=0s --start-interval=250ms --retries=3 CMD curl -f x || exit 1")
    assert (check.interval_ns, check.timeout_ns, check.start_period_ns, check.start_interval_ns, check.retries) == (
        90 * 10**9, 15 * 10**8, 0, 250 * 10**6, 3)
    assert (check.text, check.words, check.disabled) == ("curl -f x || exit 1", None, False)
    assert one('healthcheck cmd ["a"]').words == ("a",)
    assert one("HEALTHCHECK none").disabled


def test_flags_of_copy_and_add():
    copy = one('COPY --from=b --chown=1:2 --chmod=u=rw,go=r --link --parents=false --exclude=*.md --exclude=x ["a b", "c", "/d/"]')
    assert (copy.from_, copy.chown, copy.chmod, copy.link, copy.parents, copy.exclude) == ("b", "1:2", "u=rw,go=r", True, False, ("*.md", "x"))
    assert (copy.sources, copy.destination) == (("a b", "c"), "/d/")
    add = one("ADD --checksum=sha256:ab --keep-git-dir=true --unpack=false https://x/y.git#v1:sub /z")
    assert (add.checksum, add.keep_git_dir, add.unpack, add.link) == ("sha256:ab", True, False, False)
    assert one("ADD a b").unpack is None


def test_mounts():
    run = one("RUN --mount=type=cache,id=apt,target=/var/cache/apt,sharing=locked,mode=0700,uid=1,gid=2 --mount=type=bind,from=b,src=/s,dst=/t,rw"
              " --mount=type=secret,id=k,env=KEY --mount=type=secret,target=/root/x,required --mount=type=ssh --mount=target=/ctx"
              ' --mount=type=tmpfs,dst=/tmp,size=1.5g --mount=\'type=cache,"target=/a,b",ro\' make')
    cache, bind, key, file, ssh, context, tmpfs, comma = [each.expanded(lambda word: word) for each in run.mounts]
    assert (cache.id, cache.sharing, cache.mode, cache.uid, cache.gid, cache.read_only) == ("apt", "locked", 0o700, 1, 2, False)
    assert (bind.type, bind.from_, bind.source, bind.target, bind.read_write) == ("bind", "b", "/s", "/t", True)
    assert (key.id, key.env, key.target, key.target_given, key.required) == ("k", "KEY", "/run/secrets/k", False, False)
    assert (file.id, file.target, file.required, file.target_given) == ("x", "/root/x", True, True)
    assert (ssh.id, ssh.target) == ("default", "/run/buildkit/ssh_agent.0")
    assert (context.type, context.from_, context.read_only) == ("bind", "", True)
    assert tmpfs.size == 3 << 29
    assert (comma.target, comma.read_only, comma.id) == ("/a,b", True, "/a,b")
    assert run.text == "make"


@pytest.mark.parametrize(("mount", "message"), [
    ("type=nfs,target=/x", "unsupported mount type"), ("type=cache", "needs a target"), ("type=cache,target=/x,sharing=some", "unsupported sharing"),
    ("target=/x,bogus=1", "unexpected key 'bogus'"), ("target=/x,bogus", "invalid field 'bogus'"), ("target=/x,mode=755", "mode not allowed"),
    ("type=cache,target=/x,mode=888", "invalid value 888 for mode"), ("type=cache,target=/x,size=1", "unexpected key 'size'"), ("target=/x,ro=maybe", "invalid value for ro"),
    ("type=secret", "one of source, target required"), ("type=secret,id=a,src=b", "both source and id"), ("type=secret,id=a,from=b", "should not have a from"),
    ("target=/x,required", "unexpected key 'required'"), ("type=tmpfs,target=/x,size=lots", "invalid value for size"), ("type=tmpfs,target=/x,sharing=shared", "invalid cache sharing"),
    ("type=cache,target=/x,uid=99999999999", "for uid"), ("from=$X,target=/x", "doesn't support variable expansion"), ("", "it is empty"), ("type=ssh,source=x", "does not support source"),
])
def test_wrong_mounts(mount, message):
    with pytest.raises(DockerfileError, match=message):
        language.plan(language.parse(f"FROM x\nRUN --mount={mount} make\n".encode()))


# here-documents


@pytest.mark.parametrize(("text", "command", "script"), [
    ("RUN <<EOF\na\nb\nEOF", "a\nb\n", "a\nb\n"), ("RUN <<-EOF\n\ta\n\tb\n\tEOF", "a\nb\n", "a\nb\n"), ('RUN <<"EOF"\n$A\nEOF', "$A\n", "$A\n"),
    ("RUN <<EOF cat\na\nEOF", "<<EOF cat\na\nEOF", None), ("RUN cat <<A <<B\n1\nA\n2\nB", "cat <<A <<B\n1\nA\n2\nB", None), ("RUN <<EOF\nFROM y\n\\\n# x\nEOF", "FROM y\n\\\n# x\n", "FROM y\n\\\n# x\n"),
    ("RUN python3 <<EOF\nprint(1)\nEOF", "python3 <<EOF\nprint(1)\nEOF", None), ("RUN 5<<EOF cat\nx\nEOF", "5<<EOF cat\nx\nEOF", None), ("RUN echo $((1<<2))", "echo $((1<<2))", None),
    ("RUN echo '<<EOF'", "echo '<<EOF'", None), ("RUN --network=none <<EOF\na\nEOF", "a\n", "a\n"), ("RUN << EOF\na\nEOF", "a\n", "a\n"), ("RUN cat <<<word", "cat <<<word", None),
])
def test_here_documents_of_run(text, command, script):
    run = one(text)
    assert (run.text, run.script) == (command, script)


def test_the_name_of_a_program_is_its_document_s():
    run = one("RUN <<run.py\n#!/usr/bin/python3\nprint(1)\nrun.py")
    assert (run.script_name, run.script) == ("run.py", "#!/usr/bin/python3\nprint(1)\n")


def test_here_documents_of_copy():
    copy = one("COPY --chmod=755 <<a.sh x <<-'B' /bin/\necho $V\na.sh\n\tkeep $V\n\tB")
    assert [(each.name, each.content, each.expand) for each in copy.heredocs] == [("a.sh", "echo $V\n", True), ("B", "keep $V\n", False)]
    assert (copy.sources, copy.destination) == (("x",), "/bin/")


def test_only_some_instructions_have_here_documents():
    assert one("CMD cat <<EOF").text == "cat <<EOF"
    assert one('RUN ["cat", "<<EOF"]').words == ("cat", "<<EOF")
    assert one("ONBUILD COPY <<EOF /x\na\nEOF").trigger == "COPY <<EOF /x\na\nEOF"


def test_a_trigger_is_read_again():
    onbuild = one("OnBuild Run --mount=type=cache,target=/x <<EOF\nmake\nEOF")
    (run,) = language.trigger(onbuild.trigger)
    assert (run.text, len(run.mounts)) == ("make\n", 1)


# errors


@pytest.mark.parametrize(("text", "line", "column", "message", "hint"), [
    ("FROM x\nRUNN y", 2, 1, "unknown instruction: RUNN", "did you mean RUN?"), ("FROM x\nRUN a\n&& b", 3, 1, "unknown instruction: &&", "backslash"),
    ("FROM x\nCOPY \\\n  --form=y a b", 3, 3, "unknown flag: --form", "did you mean --from?"), ("FROM x\nCOPY a", 2, 6, "requires at least two arguments", "COPY SOURCE DESTINATION"),
    ("RUN x", 1, 1, "no build stage in current context", "after FROM"), ("", 1, 1, "file with no instructions", "FROM"), ("# only\n", 1, 1, "file with no instructions", "FROM"), ("ARG A", 1, 1, "no stages", "FROM"),
    ("FROM", 1, 1, "either one or three", "AS"), ("FROM a b", 1, 6, "either one or three", "AS"), ("FROM a AS 1x", 1, 11, "invalid name for build stage", ""), ("FROM x\nENV A", 2, 5, "must have two arguments", "NAME=VALUE"),
    ("FROM x\nENV A=1 B", 2, 9, "can't find = in", "quote"), ("FROM x\nENV =1", 2, 5, "names can not be blank", ""), ("FROM x\nENV", 2, 1, "requires at least one argument", ""),
    ("FROM x\nSHELL bash", 2, 7, "JSON form", "SHELL ["), ("FROM x\nHEALTHCHECK EXEC x", 2, 13, 'Unknown type "EXEC"', ""), ("FROM x\nHEALTHCHECK CMD", 2, 13, "Missing command", ""),
    ("FROM x\nHEALTHCHECK --interval=soon CMD x", 2, 13, "invalid duration", "30s"), ("FROM x\nHEALTHCHECK --retries=-1 CMD x", 2, 13, "cannot be negative", ""), ("FROM x\nHEALTHCHECK NONE x", 2, 18, "takes no arguments", ""),
    ("FROM x\nONBUILD FROM y", 2, 9, "isn't allowed as an ONBUILD trigger", ""), ("FROM x\nONBUILD ONBUILD RUN x", 2, 9, "Chaining ONBUILD", ""), ("FROM x\nONBUILD RUNN x", 2, 9, "unknown instruction", "RUN"),
    ("FROM x\nRUN <<EOF\nx", 2, 5, "unterminated heredoc EOF", "EOF"), ("FROM x\nCOPY a <<EOF\nx\nEOF", 2, 8, "heredoc as a destination", ""), ("FROM x\nRUN --network=moon a", 2, 5, "invalid network mode", "host"),
    ("FROM x\nRUN --security=none a", 2, 5, "security", "insecure"), ("FROM x\nCOPY --link=maybe a b", 2, 6, "expecting boolean", ""), ("FROM x\nCOPY --from a b", 2, 6, "missing a value", "--from=VALUE"),
    ("FROM x\nCOPY --from=a --from=b c d", 2, 15, "duplicate flag", ""), ("# escape=x\nFROM x", 1, 1, "invalid escape token", ""), ("# escape=`\n# escape=`\nFROM x", 2, 1, "only one escape", ""),
    ("FROM x\nVOLUME []", 2, 8, "at least one", ""), ('FROM x\nVOLUME ["a", " "]', 2, 8, "empty string", ""), ("FROM x\nUSER", 2, 1, "exactly one argument", ""), ("FROM x\nEXPOSE", 2, 1, "at least one", "PORT"),
    ("FROM x\nCMD --version", 2, 5, "unknown flag: --version", ""), ("FROM x\n\\\n\\\n", 2, 1, "continuation without an instruction", ""),
])
def test_errors_show_the_place_and_what_to_change(text, line, column, message, hint):
    with pytest.raises(DockerfileError) as caught:
        language.parse(text.encode(), "sub/Dockerfile")
    error = caught.value
    assert (error.location.line, error.location.column) == (line, column)
    assert message in error.message
    assert hint in error.hint
    assert str(error).startswith(f"dockerfile parse error on line {line}: {error.message}")
    assert f"sub/Dockerfile:{line}:{column}: " in error.shown()


def test_an_error_shows_the_line_with_a_caret():
    with pytest.raises(DockerfileError) as caught:
        language.parse(b"FROM x\nCOPY --frm=y a b\nRUN z\n")
    assert caught.value.shown() == (
        "Dockerfile:2:6: unknown flag: --frm\n"
        "  1 | FROM x\n"
        "> 2 | COPY --frm=y a b\n"
        "    |      ^\n"
        "  3 | RUN z\n"
        "hint: did you mean --from?")


def test_what_is_shown_cannot_act_upon_a_terminal():
    with pytest.raises(DockerfileError) as caught:
        language.parse(b"FROM x\nRUNN \x1b[2J" + b"y" * 10_000)
    shown = caught.value.shown()
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 200


def test_what_is_no_utf8_is_an_error_unless_it_is_a_comment():
    assert all_of(b"# caf\xe9\nFROM x\nRUN a \\\n# \xe9\n b\n")[1].text == "a  b"
    with pytest.raises(DockerfileError, match="line 2: the line is not valid UTF-8"):
        all_of(b"FROM x\nRUN caf\xe9\n")
    with pytest.raises(DockerfileError, match="UTF-16"):
        all_of("FROM x".encode("utf-16"))


# hostile


_SOUP = st.lists(st.sampled_from([
    "FROM x", "FROM x AS y", "RUN ", "COPY ", "ADD a b", "ENV A=", "ARG ", "<<EOF", "<<-", "EOF", "\\", "\n", "\r\n", " ", "\t", '"', "'", "[", "]", "{", "--from=", "--mount=type=cache",
    ",target=", "ONBUILD ", "HEALTHCHECK ", "CMD ", "$A", "${", "}", "#", "# escape=`", "`", "\x00", "é", "\ufeff", "=", "1", "LABEL ", "EXPOSE ", "VOLUME ", "SHELL ", "%", "/"]), max_size=30)


@settings(max_examples=300, deadline=None)
@given(_SOUP)
def test_no_text_does_anything_but_parse_or_fail_with_a_place(parts):
    try:
        parsed = language.parse("".join(parts).encode())
        stages = language.plan(parsed)
        language.check(parsed)
        stages[-1].environment({"PATH": "/bin"})
    except DockerfileError as error:
        assert 1 <= error.location.line <= max(1, len(error.source.lines))
        assert error.shown()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_either(data):
    try:
        language.plan(language.parse(b"FROM x\n" + data))
    except DockerfileError as error:
        assert error.shown()


def test_a_huge_file_is_refused_at_once():
    began = time.process_time()
    with pytest.raises(DockerfileError, match="more than 16777216"):
        language.parse(b"FROM x\n" + b"#" * (100 << 20))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("data", [
    b"FROM x\nRUN " + b"a\\\n" * 300_000, b"FROM x\n" + b"RUN a\n" * 50_000, b"FROM x\nRUN " + b"-" * 2_000_000, b"FROM x\n" + b"#\n" * 1_000_000,
    b"FROM x\nCOPY <<A /x\n" + b"a\n" * 1_000_000 + b"A\n", b"FROM x\nENV " + b"A=1 " * 200_000, b"FROM x\nRUN --mount=" + b"a," * 200_000 + b" x",
    b"FROM x\nRUN " + b"<<A " * 1000 + b"\n" + b"A\n" * 1000, b"FROM x\nCMD [" + b'"a",' * 200_000 + b'"b"]',
], ids=["continued", "many", "long", "comments", "document", "pairs", "fields", "documents", "words"])
def test_large_files_take_time_in_proportion(data):
    assert len(data) < MAX_BYTES
    began = time.process_time()
    try:
        language.parse(data)
    except DockerfileError:
        pass
    assert time.process_time() - began < 10
