"""Who takes part, what goes over the wire, and how it is said."""

import asyncio
import dataclasses
import json

HELLO = "masm-jax roll call 1"
LINE, ANSWER = 2**24, 2**30  # most bytes to and from process 0, which answers with all values
GRACE = 1.0  # seconds in which a death comes before an error as the cause
THE_END = "the end"


@dataclasses.dataclass
class Member:
    """A process of the run, as others know it."""

    id: int
    host: str
    pid: int
    writer: asyncio.StreamWriter | None = None
    heard: float = 0.0  # time.monotonic() of its last line

    def __str__(self):
        return f"process {self.id} (host {self.host}, pid {self.pid})"

    def send(self, line):
        """Never blocks: what the network does not take yet is kept."""
        if self.writer and not self.writer.is_closing():
            self.writer.write(line)


def numbers(ids):
    """[2] -> "process 2"; [0, 2, 3, 4] -> "processes 0 and 2-4"; [0, 1] -> "processes 0 and 1"."""
    runs = []
    for id in ids:
        if runs and runs[-1][1] == id - 1:
            runs[-1][1] = id
        else:
            runs.append([id, id])
    words = []
    for first, last in runs:
        words += [f"{first}-{last}"] if last > first + 1 else map(str, range(first, last + 1))
    words = words[:20] + ["more"] if len(words) > 21 else words
    words = [*words[:-2], " and ".join(words[-2:])]
    return f"process{'es' if len(ids) > 1 else ''} {', '.join(words)}"


def differences(values):
    """Where the values (by process id) differ, one line each; "" if all are the same."""
    if len({json.dumps(value, sort_keys=True) for value in values}) == 1:
        return ""
    leaves = [dict(_leaves(value)) for value in values]
    lines = []
    for name in dict.fromkeys(name for each in leaves for name in each):
        whose = {}
        for id, each in enumerate(leaves):
            whose.setdefault(each.get(name, "absent"), []).append(id)
        if len(whose) > 1:
            said = [f"{value:.200} on {numbers(ids)}" for value, ids in list(whose.items())[:8]]
            lines.append("  " + (f"{name}: " if name else "") + "; ".join(said))
    more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "\n".join(lines[:10] + more)


def _leaves(value, name=""):
    """(dotted name, JSON text) of all that is in a JSON value."""
    inside = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(inside, dict) and inside:
        for key, child in inside.items():
            yield from _leaves(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value)


def names(members):
    members = sorted(members, key=lambda member: member.id)
    more = f" and {len(members) - 8} more" if len(members) > 8 else ""
    return ", ".join(map(str, members[:8])) + more


def gone(member, roll, how="has gone without a word (killed? out of memory?)"):
    return (
        f"process {member.id} of {roll.place.num_processes} (host {member.host}, pid {member.pid}) "
        f"{how}; the run ends here; start all processes again, it goes on from its newest "
        f"checkpoint"
    )


def silent(member, roll):
    how = f"has given no sign of life for {roll.silence:g} s (paused? host or network gone?)"
    return gone(member, roll, how)


def line(message):
    return json.dumps(message).encode() + b"\n"


async def for_ever():
    """For what must not return: the process is about to end."""
    await asyncio.Event().wait()
