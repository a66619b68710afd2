"""Tab completion: `boxship completion SHELL` prints what a shell reads, `boxship __complete WORD…` answers it.

Runs in: the boxship command; `__complete` once for every Tab, so it starts no daemon and waits for none that does not answer.

The last WORD is the one under the cursor, perhaps empty. Each line of the answer is a candidate, and after a tab what it is;
no line means that the shell goes on with names of files.
"""

from __future__ import annotations

from boxship.cli.command import MANY, Command
from boxship.cli.show.table import write
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from boxship.cli.command import Call
    from boxship.cli.flags import Flag
    from boxship.cli.http.client import Connection

_BASH = r"""# bash completion for boxship: source <(boxship completion bash)
_boxship() {
    local line=${COMP_LINE:0:COMP_POINT} words current
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]}-1]}
    local IFS=$'\n'
    COMPREPLY=($(boxship __complete "${words[@]:1}" 2>/dev/null | cut -f1))
    # bash takes the colons of image names for ends of words.
    if [[ $current == *:* && $COMP_WORDBREAKS == *:* ]]; then
        local index front=${current%"${current##*:}"}
        for index in "${!COMPREPLY[@]}"; do COMPREPLY[index]=${COMPREPLY[index]#"$front"}; done
    fi
}
complete -o default -F _boxship boxship
"""
_ZSH = r"""#compdef boxship
# zsh completion for boxship: source <(boxship completion zsh)
_boxship() {
    local -a found
    found=("${(@f)$(boxship __complete "${(@)words[2,CURRENT]}" 2>/dev/null | cut -f1)}")
    if [[ -n ${found[1]} ]]; then compadd -a found; else _files; fi
}
if [[ ${funcstack[1]} == _boxship ]]; then _boxship "$@"; else compdef _boxship boxship; fi
"""
_FISH = r"""# fish completion for boxship: boxship completion fish | source
function __boxship_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found (boxship __complete $words[2..-1] 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c boxship -f -a '(__boxship_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

_RUNNING, _ALL, _IMAGES, _NETWORKS, _VOLUMES = "running", "containers", "images", "networks", "volumes"
_WORDS = {
    **dict.fromkeys(("attach", "exec", "pause", "unpause", "port", "top"), (_RUNNING,)),
    **dict.fromkeys(("kill", "restart", "stats", "stop"), (_RUNNING, ...)),
    **dict.fromkeys(("commit", "diff", "export", "rename"), (_ALL,)),
    **dict.fromkeys(("logs", "rm", "start", "update", "wait", "container inspect"), (_ALL, ...)),
    **dict.fromkeys(("create", "history", "pull", "push", "run", "tag"), (_IMAGES,)),
    **dict.fromkeys(("rmi", "save", "image inspect"), (_IMAGES, ...)),
    **dict.fromkeys(("network inspect", "network rm"), (_NETWORKS, ...)),
    **dict.fromkeys(("network connect", "network disconnect"), (_NETWORKS, _ALL)),
    **dict.fromkeys(("volume inspect", "volume rm"), (_VOLUMES, ...)),
    "inspect": ("containers", ...),
}
"""Command → what its words name, one after another; `...` is the same for all that follow."""
_VALUES = {
    "network": _NETWORKS, "net": _NETWORKS, "volumes-from": _ALL, "link": _ALL, "cidfile": "", "volume": _VOLUMES,
}
_CHOICES = {
    "restart": ("no", "always", "unless-stopped", "on-failure"), "pull": ("missing", "always", "never"),
    "format": ("json", "table"), "type": ("container", "image", "network", "volume"),
    "log-driver": ("json-file", "local", "none"),
}


def _completion(call: Call) -> int:
    script = _SCRIPTS.get(call.words[0])
    if script is None:
        raise BoxshipError(f"no completion for the shell {call.words[0]!r}: there is one for bash, fish and zsh")
    write(script)
    return 0


def _complete(call: Call) -> int:
    def engine() -> Connection:
        from boxship.cli.http.where import connect

        return connect(call.environ, start=False)

    words = call.words or [""]
    found = candidates(words[:-1], words[-1], engine)
    write("".join(f"{name}\t{about}\n" if about else f"{name}\n" for name, about in found))
    return 0


def candidates(before: Sequence[str], current: str, engine: Callable[[], Connection]) -> list[tuple[str, str]]:
    """(candidate, what it is) for the word `current` after the words `before`."""
    from boxship.cli.main import GROUPS, MORE, VERBS

    words = [word for word in before if not word.startswith("-")]
    if not words:
        if current.startswith("-"):
            return _starting([("--host", "the engine's address"), ("--version", ""), ("--help", "")], current)
        known = [(name, about) for name, (_, about) in VERBS.items()] + [(name, about) for name, (about, _) in GROUPS.items()]
        own = [("daemon", "Run the daemon in the foreground"), ("doctor", "What this machine offers")]
        return _starting([*known, *own], current)
    name, rest = words[0], list(before[before.index(words[0]) + 1 :])
    if name in GROUPS:
        members = GROUPS[name][1]
        if len(words) == 1:
            return _starting([(word, (VERBS.get(to) or MORE[to])[1]) for word, to in members.items()], current)
        name, rest = members.get(words[1], ""), rest[rest.index(words[1]) + 1 :]
    place = VERBS.get(name) or MORE.get(name)
    if place is None:
        return []
    verbs = getattr(__import__(f"boxship.cli.verbs.{place[0]}").cli.verbs, place[0])
    return _starting(_of_verb(name, verbs.COMMANDS[name], rest, current, engine), current)


def _of_verb(
    name: str, command: Command, rest: list[str], current: str, engine: Callable[[], Connection]
) -> list[tuple[str, str]]:
    from boxship.cli import flags as f

    flags = f.table(command.flags)
    count, waiting = _position(flags, rest, interspersed=command.interspersed)
    if waiting is not None:
        if waiting.long in _CHOICES:
            return [(word, "") for word in _CHOICES[waiting.long]]
        return _names(_VALUES.get(waiting.long, ""), engine)
    if current.startswith("-") and (command.interspersed or not count):
        return [(f"--{flag.long}", flag.help) for flag in flags if flag.help] + [("--help", "")]
    if name == "completion":
        return [(shell, "") for shell in _SCRIPTS]
    kinds = _WORDS.get(name, ())
    kind = kinds[count] if count < len(kinds) else kinds[-1] if kinds else ""
    if kind is ...:
        kind = kinds[kinds.index(...) - 1]
    elif count >= len(kinds):
        kind = ""
    return _names(str(kind), engine)


def _position(flags: Sequence[Flag], rest: list[str], *, interspersed: bool) -> tuple[int, Flag | None]:
    """(words that are no flags, the flag whose value is the next word)."""
    long = {f"--{flag.long}": flag for flag in flags}
    short = {flag.short: flag for flag in flags if flag.short}
    count = 0
    waiting: Flag | None = None
    for word in rest:
        if waiting is not None:
            waiting = None
        elif word.startswith("--") and (interspersed or not count):
            flag = long.get(word)
            waiting = flag if flag is not None and flag.kind != "switch" else None
        elif word.startswith("-") and len(word) > 1 and (interspersed or not count):
            flag = short.get(word[-1])
            waiting = flag if flag is not None and flag.kind != "switch" else None
        else:
            count += 1
    return count, waiting


def _names(kind: str, engine: Callable[[], Connection]) -> list[tuple[str, str]]:
    """Names of the engine's objects of a kind; none when no engine answers."""
    if not kind:
        return []
    try:
        connection = engine()
        if kind in (_RUNNING, _ALL):
            found = connection.send("GET", f"/containers/json?all={int(kind == _ALL)}").json()
            return [(name.lstrip("/"), f"{each['Image']}, {each['Status']}") for each in found for name in each["Names"][:1]]
        if kind == _IMAGES:
            tags = [tag for each in connection.send("GET", "/images/json").json() for tag in each.get("RepoTags") or []]
            return [(tag.removesuffix(":latest"), "") for tag in tags if "<none>" not in tag]
        if kind == _NETWORKS:
            return [(each["Name"], each["Driver"]) for each in connection.send("GET", "/networks").json()]
        return [(each["Name"], each["Driver"]) for each in connection.send("GET", "/volumes").json()["Volumes"] or []]
    except BoxshipError:
        return []


def _starting(found: Sequence[tuple[str, str]], current: str) -> list[tuple[str, str]]:
    return sorted((name, about) for name, about in found if name.startswith(current))


COMMANDS = {
    "completion": Command(
        " bash|fish|zsh", "Print what a shell needs to complete boxship's words", _completion, least=1, most=1),
    "__complete": Command(" WORD...", "Answer a shell's question", _complete, most=MANY),
}
