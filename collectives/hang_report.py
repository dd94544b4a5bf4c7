"""What ranks are doing, in words: who holds up whom, from the snapshots of their flight recorders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from ..algorithms.words import count, in_words, ranges
from ..transports.flight import Message, Operation, Peer, Snapshot, parse_call

T = TypeVar("T")
K = TypeVar("K")

MOVING = 0.1
"""Seconds that ranks may be apart, or in a call, before anybody is said to be late: they are not read at one moment."""

SHOWN = 4
"""Waits that are written out, of ranks that are in one call."""

MOST_RANGES = 6
"""Ranges of process numbers that are written out."""

_GRAVITY = ("Mismatch", "PeerLost", "DeadlineExceeded", "", "Aborted")
"""Errors, the cause before its consequences; "" is any other."""


def report(snapshots: Iterable[Snapshot]) -> str:
    """A paragraph for each open communicator: first who holds up whom, then what ranks do, alike ones together."""
    everyone = list(snapshots)
    groups = [sorted(group, key=_rank) for group in _by(everyone, _communicator).values()]
    alive = [group for group in groups if not all(one["closed"] for one in group)]
    return "\n\n".join(_paragraph(group, everyone) for group in alive) or "no communicator is open"


def group_name(one: Snapshot) -> str:
    """A communicator as messages call it: group "default"."""
    return f'group "{one["group"]}"' if one["group"] else "ranks that are still meeting"


def title(operation: Operation) -> str:
    """An operation as error messages call it: all_reduce #17 (ring, float32, 4 MiB)."""
    call = parse_call(operation["call"])
    size = in_words(operation["bytes"]) if call.dtype else None
    details = ", ".join(word for word in (call.algorithm, call.dtype, size) if word)
    return f"{call.kind} #{operation['number']}" + f" ({details})" * bool(details)


def duration(seconds: float) -> str:
    """A time in words: 35 ms, 4.2 s, 12 min, 3.4 h."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else _hours(seconds)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"


# ---- a rank


def _communicator(one: Snapshot) -> tuple[object, ...]:
    """What the ranks of a communicator have in common: a token, or they are threads of one process."""
    return (one["token"],) if one["token"] else (one["host"], one["pid"], one["group"], one["size"])


def _rank(one: Snapshot) -> int:
    return one["rank"]


def _under_way(one: Snapshot) -> Operation | None:
    """The collective that it is in: of several that were begun the first."""
    if one["closed"] or one["error"]:
        return None
    return next((operation for operation in one["operations"] if operation["state"] == "running"), None)


def _last(one: Snapshot) -> Operation | None:
    """The newest collective that has ended."""
    return next((operation for operation in reversed(one["operations"]) if operation["end"] is not None), None)


def _lasts(one: Snapshot, since: float) -> float:
    return one["monotonic"] - since


def _before(one: Snapshot) -> str:
    """What it did last, in words."""
    last = _last(one)
    if last is None or last["end"] is None:
        return "it has called nothing"
    kind = parse_call(last["call"]).kind
    return f"its last was {kind} #{last['number']}, {last['state']} {duration(_lasts(one, last['end']))} ago"


def _messages(one: Snapshot) -> list[Message]:
    """The sends and receives that have been under way for some time."""
    found = [message for message in one["messages"] if message["state"] == "running"]
    return [message for message in found if _lasts(one, message["start"]) >= MOVING and not one["closed"]]


def _message(one: Snapshot, message: Message) -> str:
    towards = "to" if message["call"] == "send" else "from"
    peer = "any rank" if message["peer"] is None else f"rank {message['peer']}"
    tag = "any tag" if message["tag"] is None else f"tag {message['tag']}"
    lasts = duration(_lasts(one, message["start"]))
    return f"{message['call']} {towards} {peer} ({tag}, {in_words(message['bytes'])}), for {lasts}"


def _wait(one: Snapshot) -> str:
    """Where it waits, in words, with what is known of a peer on another host."""
    waiting = one["waiting"]
    if waiting is None:
        return ""
    note = waiting.get("note")
    return f"rank {one['rank']} {waiting['text']}" + f"; {note}" * bool(note)


def _who(ranks: Sequence[Snapshot]) -> str:
    return f"{_ranks(map(_rank, ranks))} ({_processes(one['pid'] for one in ranks)})"


def _processes(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    words = ranges(found)
    if words.count(",") >= MOST_RANGES:
        return f"{len(found)} processes from {found[0]} to {found[-1]}"
    return f"{'process' if len(found) == 1 else 'processes'} {words}"


def _ranks(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"{'rank' if len(found) == 1 else 'ranks'} {ranges(found)}"


# ---- a communicator


def _paragraph(group: list[Snapshot], everyone: Sequence[Snapshot]) -> str:
    size, missing = group[0]["size"], sorted(set(range(group[0]["size"])) - {one["rank"] for one in group})
    held = _hold_up(group, everyone)
    lines = [f"{group_name(group[0])}, {count(size, 'rank')}: {held or _calm(group)}"]
    if not held and _moves(group):
        return f"{lines[0]}\n  {_who(group)}"
    for alike in _by(group, _state).values():
        lines.append(f"  {_who(alike)}: {_doing(alike)}")
        lines += [f"    {line}" for line in (*_errors(alike, held), *_waits(alike))]
        lines += [f"    rank {one['rank']}: {_message(one, m)}" for one in alike for m in _messages(one)[:SHOWN]]
    gone, seen = _gone(group), _seen(group)
    if gone:
        lines.append(f"  {_ranks(gone)}: ended")
    lines += [f"  {_ranks(ranks)}: {words}, as others see it" for words, ranks in _by(seen, seen.get).items()]
    elsewhere = [rank for rank in missing if rank not in gone and rank not in seen]
    if elsewhere:
        lines.append(f"  {_ranks(elsewhere)}: on another host, closed or ended")
    return "\n".join(lines)


class _State(NamedTuple):
    """What is put together."""

    kind: str
    number: int
    words: str


def _state(one: Snapshot) -> _State:
    operation = _under_way(one)
    if one["error"]:
        return _State("broken", 0, _kind(one["error"]))
    if one["closed"]:
        return _State("closed", one["finished"], "")
    if operation:
        return _State("in", operation["number"], _agreed(operation["call"]))
    return _State("idle", one["finished"], "")


def _doing(alike: Sequence[Snapshot]) -> str:
    """What ranks of one state do, and for how long."""
    one, state = alike[0], _state(alike[0])
    operation = _under_way(one)
    if operation:
        lasts = [_lasts(each, each_in["start"]) for each in alike if (each_in := _under_way(each))]
        later = max(each["entered"] for each in alike) - operation["number"]
        return f"in {title(operation)} for {_span(lasts)}" + f", {later} more begun" * bool(later)
    last = _last(one)
    ends = [_lasts(each, ended["end"]) for each in alike if (ended := _last(each)) and ended["end"] is not None]
    before = (
        f"the last was {title(last)}, {last['state']} {_span(ends)} ago" if last else "no collective was called yet"
    )
    words = {"broken": "broken", "closed": "has closed it", "idle": "in no call"}[state.kind]
    return f"{words}; {before}"


def _waits(alike: Sequence[Snapshot]) -> list[str]:
    """Where ranks of one call wait: some in full, first those who wait for others than themselves."""
    inside = {one["rank"] for one in alike}
    waiting = [(one, one["waiting"]) for one in alike if one["waiting"] and _under_way(one)]
    waiting.sort(key=lambda pair: (pair[1]["peer"] in inside, pair[1]["since"]))
    lines = [f"{_wait(one)}, for {duration(_lasts(one, wait['since']))}" for one, wait in waiting[:SHOWN]]
    rest = [wait["peer"] for _, wait in waiting[SHOWN:]]
    if rest:
        peers = {peer for peer in rest if peer is not None}
        lines.append(f"and {len(rest)} more wait" + f" for {_ranks(peers)}" * bool(peers))
    return lines


def _errors(alike: Sequence[Snapshot], told: str) -> list[str]:
    """The different errors, some in full, but what was told already."""
    sides = _by([one for one in alike if one["error"] and one["error"] not in told], lambda one: one["error"])
    lines = [f"{_ranks(map(_rank, side))}: {error}" for error, side in list(sides.items())[:SHOWN]]
    return lines + [f"and {len(sides) - SHOWN} more"] * (len(sides) > SHOWN)


def _kind(error: str) -> str:
    return error.partition(":")[0]


def _span(seconds: Sequence[float]) -> str:
    least, most = duration(min(seconds)), duration(max(seconds))
    return most if least == most else f"{least} to {most}"


def _peers(group: Sequence[Snapshot]) -> dict[int, Peer]:
    """Ranks of this host that were not read, as others see them."""
    read = {one["rank"] for one in group}
    return {peer["rank"]: peer for one in group for peer in one["peers"] if peer["rank"] not in read}


def _gone(group: Sequence[Snapshot]) -> dict[int, int]:
    """Ranks of this host whose processes have ended, with their numbers."""
    return {rank: peer["pid"] for rank, peer in _peers(group).items() if peer["gone"]}


def _seen(group: Sequence[Snapshot]) -> dict[int, str]:
    """Ranks of this host that are there, but were not read: how far they are."""
    return {
        rank: "has closed it" if peer["closed"] else f"has entered #{peer['entered']}, finished #{peer['finished']}"
        for rank, peer in _peers(group).items()
        if not peer["gone"]
    }


# ---- who holds up whom


def _hold_up(group: Sequence[Snapshot], everyone: Sequence[Snapshot]) -> str:
    """What keeps ranks from going on; nothing if they do, or have nothing to do."""
    return (
        _broken(group)
        or _different(group)
        or _lost(group)
        or _late(group, everyone)
        or _inside(group)
        or _only_messages(group)
    )


def _broken(group: Sequence[Snapshot]) -> str:
    errors = _by([one for one in group if one["error"]], lambda one: one["error"] or "")
    if not errors:
        return ""

    def gravity(error: str) -> int:
        return _GRAVITY.index(_kind(error) if _kind(error) in _GRAVITY else "")

    worst = min(errors, key=gravity)
    return f"broken; {_ranks(map(_rank, errors[worst]))}: {worst}"


def _stuck(group: Sequence[Snapshot]) -> list[tuple[Snapshot, Operation]]:
    """Who has been for some time in the first call that somebody has been in for some time."""
    found = [(one, operation) for one in group if (operation := _under_way(one))]
    found = [(one, operation) for one, operation in found if _lasts(one, operation["start"]) >= MOVING]
    first = min((operation["number"] for _, operation in found), default=0)
    return [(one, operation) for one, operation in found if operation["number"] == first]


def _different(group: Sequence[Snapshot]) -> str:
    """Ranks that have called different things as the collective of one number."""
    stuck = _stuck(group)
    if not stuck:
        return ""
    number = stuck[0][1]["number"]
    calls = [(one, operation) for one in group for operation in one["operations"] if operation["number"] == number]
    sides = _by(calls, lambda pair: _agreed(pair[1]["call"]))
    if len(sides) == 1:
        return ""
    told = [f"{_who([one for one, _ in side])} called {side[0][1]['call']}" for side in sides.values()]
    return f"different calls as #{number}: {'; '.join(told)}"


def _agreed(call: str) -> str:
    """A call without what ranks need not agree on: the parts of an all_to_all."""
    words = parse_call(call)
    return str(words._replace(what=None)) if words.kind == "all_to_all" else call


def _lost(group: Sequence[Snapshot]) -> str:
    gone, stuck = _gone(group), _stuck(group)
    if not gone:
        return ""
    process = f" ({_processes(gone.values())})"
    waiting = f"; {_ranks(one['rank'] for one, _ in stuck)} in {title(stuck[0][1])}" if stuck else ""
    return f"{_ranks(gone)}{process} {'has' if len(gone) == 1 else 'have'} ended{waiting}"


def _late(group: Sequence[Snapshot], everyone: Sequence[Snapshot]) -> str:
    """Ranks that have not entered what others wait in."""
    stuck = _stuck(group)
    if not stuck:
        return ""
    operation = stuck[0][1]
    late = [one for one in group if one["entered"] < operation["number"]]
    if not late:
        return ""
    # Who waits for a message is held up, too, by one who does not.
    free = [one for one in late if not _messages(one)]
    held, late = ([one for one in late if _messages(one)], free) if free else ([], late)
    has, what = "has" if len(late) == 1 else "have", title(operation)
    waiting = [one["rank"] for one, _ in stuck]
    wait = f"{_ranks(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for {'it' if len(late) == 1 else 'them'}"
    farthest = min(late, key=lambda one: (one["entered"], one["rank"]))
    whose = "" if len({one["entered"] for one in late}) == 1 else f"rank {farthest['rank']} is farthest back, "
    held_up = "".join(f"; rank {one['rank']} waits in {_message(one, _messages(one)[0])}" for one in held[:3])
    if len(late) > 1:
        whose = whose or f"of rank {farthest['rank']}, "
    return f"{_who(late)} {has} not entered {what}: {whose}{_instead(farthest, everyone)}; {wait}{held_up}"


def _instead(one: Snapshot, everyone: Sequence[Snapshot]) -> str:
    """What a rank does that others wait for."""
    if one["closed"]:
        return f"it has closed the communicator, {_before(one)}"
    words = [_before(one)]
    operation = _under_way(one)
    if operation:
        words.append(f"it is in {title(operation)} for {duration(_lasts(one, operation['start']))}")
    words += [f"it waits in {_message(one, message)}" for message in _messages(one)[:1]]
    for other in everyone:
        elsewhere = _under_way(other)
        if other["token"] != one["token"] and (other["host"], other["pid"]) == (one["host"], one["pid"]) and elsewhere:
            lasts = duration(_lasts(other, elsewhere["start"]))
            words.append(f"it is in {title(elsewhere)} of {group_name(other)} for {lasts}")
    return ", ".join(words)


def _inside(group: Sequence[Snapshot]) -> str:
    """All are in the call, or beyond it: who waits for whom in there."""
    stuck = _stuck(group)
    if not stuck:
        return ""
    what = title(stuck[0][1])
    if any(_lasts(one, step["end"]) < MOVING for one, _ in stuck for step in one["steps"][-1:]):
        return ""
    by_rank = {one["rank"]: one for one, _ in stuck}
    for one in by_rank.values():
        note = one["waiting"].get("note") if one["waiting"] else ""
        if note and "is in it too" not in note:
            return f"in {what}, {_wait(one)}"
    complete = len(group) == group[0]["size"]
    who = f"all {len(group)} ranks have" if complete else f"{_ranks(map(_rank, group))}, all that are here, have"
    one, path = next(iter(by_rank.values())), [-1]
    while one["rank"] not in path:
        path.append(one["rank"])
        peer = one["waiting"]["peer"] if one["waiting"] else None
        if peer is None or peer not in by_rank:
            break
        one = by_rank[peer]
    if one["waiting"]:
        return f"{who} entered {what}; {_wait(one)}"
    lasts = duration(_lasts(one, _start(one)))
    return f"{who} entered {what}; {_who([one])} waits for nobody there, for {lasts}: it computes, or does not run"


def _start(one: Snapshot) -> float:
    operation = _under_way(one)
    return operation["start"] if operation else one["monotonic"]


def _only_messages(group: Sequence[Snapshot]) -> str:
    found = [(one, message) for one in group for message in _messages(one)]
    if not found:
        return ""
    one, message = min(found, key=lambda pair: pair[1]["start"])
    return (
        f"no collective is under way, and {count(len(found), 'message')}: rank {one['rank']} {_message(one, message)}"
    )


def _moves(group: Sequence[Snapshot]) -> bool:
    """Whether a collective, or a step of one, has just begun or ended."""
    if any(_under_way(one) for one in group):
        return True  # not for long, or somebody would be held up; or its steps go on
    ends = [(one, ended) for one in group if (last := _last(one)) and (ended := last["end"]) is not None]
    return any(_lasts(one, ended) < MOVING for one, ended in ends)


def _calm(group: Sequence[Snapshot]) -> str:
    """Nobody is held up."""
    entered = sorted({one["entered"] for one in group})
    newest = max(group, key=lambda one: one["entered"])
    if not newest["operations"]:
        return "no collective was called yet"
    if _moves(group):
        numbers = f"#{entered[-1]}" if len(entered) == 1 else f"#{entered[0]} to #{entered[-1]}"
        begun = _under_way(newest)
        lasts = f", for {duration(_lasts(newest, begun['start']))} so far" if begun else ""
        return f"moves on, at {numbers}: {title(newest['operations'][-1])}{lasts}"
    ends = [_lasts(one, ended) for one in group if (last := _last(one)) and (ended := last["end"]) is not None]
    return f"nothing is under way; the last was {title(newest['operations'][-1])}, finished {duration(min(ends))} ago"


def _by(things: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Things put together by what `key` says of them, in the order in which they come."""
    found: dict[K, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found
