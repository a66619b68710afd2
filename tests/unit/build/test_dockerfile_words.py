"""Expansion of variables, quotes and patterns."""

from __future__ import annotations

import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boxship.build.dockerfile.words import MAX_DEPTH, MAX_WORD, ExpansionError, Lexer

VALUES = {"A": "one", "E": "", "P": "/usr/local/bin/tool.tar.gz", "S": "two words", "STAR": "a*b*c", "REP": "aXbXaX"}

EXPANDED = [
    # plain, quotes, escapes
    ("", ""), ("plain", "plain"), ("$A", "one"), ("${A}", "one"), ("x${A}y", "xoney"), ("$Ay", ""), ("$A-y", "one-y"),
    ("$MISSING", ""), ("${MISSING}", ""), ("'$A'", "$A"), ('"$A"', "one"), ('"a b"', "a b"), ("a'b'\"c\"", "abc"),
    (r"\$A", "$A"), (r'"\$A"', "$A"), (r'"\A"', r"\A"), (r"\A", "A"), (r"'\A'", r"\A"), (r'"a\"b"', 'a"b'), (r"\\", "\\"),
    ("a\\", "a"), ("$", "$"), ("a$", "a$"), ("$ A", "$ A"), ("$$A", "A"), ("$1", ""), ("$12x", "x"), ("a<b", "a<b"), ("a<<b", "a<<b"),
    ('"it\'s"', "it's"), ("'say \"x\"'", 'say "x"'), ("\"'$A'\"", "'one'"), ("é$A€", "éone€"), ("~", "~"), ("`$A`", "`one`"),
    # defaults
    ("${A:-x}", "one"), ("${E:-x}", "x"), ("${E-x}", ""), ("${M:-x}", "x"), ("${M-x}", "x"), ("${M:-}", ""), ("${M:-a b}", "a b"),
    ("${M:-$A}", "one"), ("${M:-${N:-${A}}}", "one"), ("${M:-'$A'}", "$A"), ('${M:-"$A"}', "one"), (r"${M:-\}}", "}"),
    ("${A:+x}", "x"), ("${E:+x}", ""), ("${E+x}", "x"), ("${M:+x}", ""), ("${M+x}", ""), ("${A:+$S}", "two words"),
    ("${A:?no}", "one"), ("${E?no}", ""), ("${A?}", "one"), ("${M:-a:-b}", "a:-b"),
    # prefixes and suffixes
    ("${P#*/}", "usr/local/bin/tool.tar.gz"), ("${P##*/}", "tool.tar.gz"), ("${P%/*}", "/usr/local/bin"), ("${P%%/*}", ""),
    ("${P%.gz}", "/usr/local/bin/tool.tar"), ("${P%.*}", "/usr/local/bin/tool.tar"), ("${P%%.*}", "/usr/local/bin/tool"),
    ("${P#/}", "usr/local/bin/tool.tar.gz"), ("${P#x}", "/usr/local/bin/tool.tar.gz"), ("${A#o?}", "e"), ("${A%?}", "on"),
    ("${A#*}", "one"), ("${A##*}", ""), ("${A%*}", "one"), ("${A%%*}", ""), ("${A#}", "one"), ("${A%}", "one"), ("${M#x}", ""),
    (r"${STAR#a\*}", "b*c"), ("${STAR#'a*'}", "*b*c"), ('${STAR#"a*"}', "*b*c"), ("${STAR##a*b}", "*c"), ("${P#*/usr*/}", "local/bin/tool.tar.gz"),
    ("${P##*/*o*.}", "gz"), ("${P%%a*r.*}", "/usr/loc"), ("${P#${P%/*}/}", "tool.tar.gz"), ("${A#$A}", ""),
    # replacement
    ("${REP/X/-}", "a-bXaX"), ("${REP//X/-}", "a-b-a-"), ("${REP//X/}", "aba"), ("${REP/a*b/q}", "qXaX"), ("${REP//a?/q}", "qbXq"),
    ("${REP/zz/q}", "aXbXaX"), ("${REP/*/q}", "q"), ("${REP//*/q}", "q"), (r"${P//\//_}", "_usr_local_bin_tool.tar.gz"),
    ("${REP/X/$A}", "aonebXaX"), ("${M/a/b}", ""), ("${S/ /_}", "two_words"), ("${P/.tar.*/}", "/usr/local/bin/tool"),
    ("${REP//X}", None), ("${REP//b*/}", "aX"),
    # errors
    ("${A", None), ("${A:", None), ("${A:-", None), ("${A:-x", None), ("${}", None), ("${{A}}", None), ("${:x}", None), ("'a", None),
    ('"a', None), ("${M:?it is needed}", None), ("${E:?}", None), ("${M?}", None), ("${A^^}", None), ("${A:#x}", None), ("${A/x", None),
    ("${A!}", None), ("${A#\\x}", None), ("${A:=x}", None), ("${A-'x}", None), ("${A,,}", None), ("${A:0:1}", None),
]


@pytest.mark.parametrize(("word", "wanted"), EXPANDED)
def test_a_word_is_expanded(word, wanted):
    if wanted is None:
        with pytest.raises(ExpansionError, match="failed to process"):
            Lexer().expand(word, VALUES)
    else:
        assert Lexer().expand(word, VALUES) == wanted


@pytest.mark.parametrize(("word", "message"), [
    ("${M:?it is needed}", "M: it is needed"), ("${M:?}", "M: is not allowed to be unset"), ("${E:?}", "E: is not allowed to be empty"),
    ("${A", "missing '}'"), ("${}", "bad substitution"), ("'a", "matching single-quote"), ('"a', "matching double-quote"),
    ("${A^}", r"unsupported modifier \(\^\)"), ("${A:0:1}", r"unsupported modifier \(:0\)"),
])
def test_errors_say_what_is_wrong(word, message):
    with pytest.raises(ExpansionError, match=message):
        Lexer().expand(word, VALUES)


def test_the_other_escape_character():
    lexer = Lexer("`")
    assert lexer.expand("C:\\x\\$A", VALUES) == "C:\\x\\one"
    assert lexer.expand("`$A", VALUES) == "$A"
    assert lexer.expand('"`$A"', VALUES) == "$A"


def test_a_document_keeps_its_quotes():
    lexer = Lexer("\\", quotes=False)
    assert lexer.expand("a='$A' b=\"$A\" it's \\$A", VALUES) == "a='one' b=\"one\" it's $A"


@pytest.mark.parametrize(("text", "words"), [
    ("a b", ["a", "b"]), ("  a\tb  ", ["a", "b"]), ("$S", ["two", "words"]), ('"$S"', ["two words"]), ("x$S", ["xtwo", "words"]),
    ("${S}x", ["two", "wordsx"]), ("''", []), ("a\\ b", ["a b"]), ("$M", []), ("", []), ("'a b'c d", ["a bc", "d"]),
])
def test_words_are_split_where_spaces_are_not_quoted(text, words):
    assert Lexer().words(text, VALUES) == words


def test_unset_names_are_told():
    unset: set[str] = set()
    assert Lexer().expand("$A ${B:-x} $C ${E}", VALUES, unset) == "one x  "
    assert unset == {"B", "C"}


# with the shell, where it agrees

SH = [each for each, wanted in EXPANDED if wanted is not None and "//" not in each and "/" not in each.replace("${P", "")
      and "`" not in each and "<" not in each and each not in ("", "a\\", "$ A", "$$A", "$12x", "$1", "~", "${A:?no}")
      and not each.startswith(("${REP", "${S/", "${STAR#'", '${STAR#"'))]


def test_what_sh_does_too():
    script = "".join(f"A=one E= P={VALUES['P']} S='two words' STAR='a*b*c'; unset M N MISSING Ay; printf '%s\\n' \"\"{each}\n"
                     if " " not in each and "$S" not in each else "printf 'skip\\n'\n" for each in SH)
    shown = subprocess.run(["/bin/sh", "-f", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    differing = [(each, found) for each, found in zip(SH, shown, strict=True)
                 if found not in ("skip", Lexer().expand(each, VALUES))]
    assert differing == []


_PIECES = st.sampled_from(["a", "b", "/", "ab", "*", "?", "a*", "b/"])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(
    st.text("ab/", max_size=10), st.sampled_from(["#", "##", "%", "%%"]), st.lists(_PIECES, max_size=5)), min_size=30, max_size=60))
def test_patterns_match_as_in_sh(cases):
    script = "".join(f"v='{value}'; printf '%s\\n' \"${{v{operator}{''.join(pattern)}}}\"\n" for value, operator, pattern in cases)
    shown = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    for (value, operator, pattern), wanted in zip(cases, shown, strict=True):
        word = f"${{v{operator}{''.join(pattern)}}}"
        if operator in "#%" and pattern[:1] and pattern[0].startswith(operator):
            continue
        assert Lexer().expand(word, {"v": value}) == wanted, (value, word)


# hostile

_SOUP = st.text(st.sampled_from("$${}:-+?#%/\\'\"ab*? <") | st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=400, deadline=None)
@given(_SOUP, st.sampled_from("\\`"), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_no_text_does_anything_but_expand_or_fail(text, escape, keep_quotes, keep_escapes, keep_unset, quotes):
    lexer = Lexer(escape, keep_quotes=keep_quotes, keep_escapes=keep_escapes, keep_unset=keep_unset, quotes=quotes)
    for use in (lambda: lexer.expand(text, {"a": "x y", "b": ""}), lambda: "".join(lexer.words(text, {"a": "x y"}))):
        try:
            assert isinstance(use(), str)
        except ExpansionError:
            pass


def test_deep_nesting_is_refused():
    assert Lexer().expand("${a:-" * (MAX_DEPTH - 2) + "x" + "}" * (MAX_DEPTH - 2), {}) == "x"
    with pytest.raises(ExpansionError, match="nested deeper"):
        Lexer().expand("${a:-" * 100_000 + "}" * 100_000, {})


def test_a_word_cannot_grow_without_end():
    values = {"a": "x" * 1000}
    for _ in range(40):
        try:
            values["a"] = Lexer().expand("$a$a$a$a$a$a$a$a$a$a", values)
        except ExpansionError as error:
            assert "longer than" in str(error)
            break
    assert len(values["a"]) <= MAX_WORD
    with pytest.raises(ExpansionError, match="longer than"):
        Lexer().expand("${b//x/$c}", {"b": "x" * 5000, "c": "y" * 5000})


@pytest.mark.parametrize("word", ["${v#*a*a*a*a*a*a*a*a*a*ab}", "${v%%b*a*a*a*a*a*a*a*a*a*}", "${v//*a*a*a*a*a*a*b/x}", "${v//a?a?a?b/x}"])
def test_patterns_take_time_in_proportion(word):
    began = time.process_time()
    assert Lexer().expand(word, {"v": "a" * 100_000}) == "a" * 100_000
    assert time.process_time() - began < 5
