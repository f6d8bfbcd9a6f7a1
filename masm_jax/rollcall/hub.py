"""The middle of the star: process 0 takes the roll, compares, and says why a run ends."""

import asyncio
import contextlib
import errno
import json
import logging
import socket
import time

from masm_jax.rollcall.members import (
    GRACE,
    HELLO,
    LINE,
    THE_END,
    Member,
    differences,
    for_ever,
    gone,
    line,
    names,
    numbers,
)
from masm_jax.runtime import EXIT_ERROR, EXIT_PEER

_log = logging.getLogger("masm_jax.processes")


class Hub:
    """Process 0's end of all connections."""

    def __init__(self, roll):
        self._roll, self._of = roll, roll.place.num_processes
        self._members = {0: roll.me}
        self._went = {}  # came and went before all were there
        self._complete = asyncio.Event()
        self._meeting, self._timer = {}, None  # messages by process id
        self._steps = None  # by process id, once one wants to stop
        self._connected = 0  # members
        self._said = b""  # the verdict
        self._server = None

    def others(self):
        return [member for id, member in self._members.items() if id]

    def post(self, message):
        self._take(self._roll.me, message)

    def verdict(self, text, code=EXIT_ERROR, cause=None):
        """The run ends, everywhere. The first verdict is the one."""
        if not self._roll.over:
            self._said = self._tell({"text": text, "code": code, "cause": cause})
            self._roll.end(text, code, cause)

    def _tell(self, message):
        said = line(message)
        for member in self.others():
            member.send(said)
        return said

    async def open(self, limit):
        """Listen, and return when all processes are there."""
        roll, place = self._roll, self._roll.place
        _allow_files(4 * self._of + 1024)
        try:
            _listening(place.port).close()  # JAX's own: it would share the port, and say nothing
            listening = _listening(place.roll_port)
        except OSError as error:
            roll.end(
                f"{roll.me} cannot listen on ports {place.port} and {place.roll_port}, for JAX and "
                f"for the roll call: {error.strerror}; is another run going there? Give all "
                f"processes a --coordinator with another port"
            )
            await for_ever()
        self._server = await asyncio.start_server(
            self._serve, sock=listening, limit=LINE, backlog=1024
        )
        roll.spawn(roll.beat(self))
        try:
            await asyncio.wait_for(self._complete.wait(), limit)
        except TimeoutError:
            missing = [id for id in range(self._of) if id not in self._members]
            went = [f"{self._went[id]} came and went" for id in missing if id in self._went]
            self.verdict(
                f"{numbers(missing)} of {self._of} did not come within {limit:g} s"
                f"{''.join(f'; {text}' for text in went[:8])}; present: "
                f"{names(self._members.values())}; look at the logs of the missing, start all "
                f"with the same --coordinator, {place.firewall}"
            )
            await for_ever()

    async def _serve(self, reader, writer):
        """One connection to its end. What does not begin with a hello is a stranger's, and left."""
        member = None
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10))
            if isinstance(hello, dict) and hello.get("hello") == HELLO:
                member = self._admit(hello, writer)
                self._connected += bool(member)
            while member and (said := await reader.readline()):
                member.heard = time.monotonic()
                self._take(member, json.loads(said))
        except (OSError, ValueError, TypeError, KeyError, TimeoutError):
            pass
        finally:
            writer.close()
            self._connected -= bool(member)
        if member and not self._complete.is_set():
            self._went[member.id] = self._members.pop(member.id)  # it may be started again
        elif member and not self._roll.left:
            self.verdict(gone(member, self._roll), EXIT_PEER, member.id)

    def _admit(self, hello, writer):
        """The new member; None for one that cannot be, which has been told."""
        new = Member(hello["id"], hello["host"], hello["pid"], writer, time.monotonic())
        if self._said:
            new.send(self._said)
            return None
        if hello["of"] != self._of:
            wrong = (
                f"{new} was started as one of {hello['of']} processes, {self._roll.me} as one of "
                f"{self._of}; give all the same --num_processes"
            )
        elif new.id in self._members:
            wrong = (
                f"two processes have the same id: {self._members[new.id]} and {new}; give each its "
                f"own --process_id"
            )
        else:
            self._members[new.id] = new
            if len(self._members) == self._of:
                self._complete.set()
                self._tell({"welcome": (self._roll.me.host, self._roll.me.pid)})
            return new
        new.send(line({"text": wrong, "code": EXIT_ERROR, "cause": new.id}))
        if not self._complete.is_set():  # else the run goes on without it
            self.verdict(wrong, cause=new.id)
        return None

    def _take(self, member, message):
        loop = asyncio.get_running_loop()
        if "fail" in message:
            # A process that died fails the collectives of others: its death may be read after that.
            text = f"{member}: {message['fail']}"
            loop.call_later(GRACE, self.verdict, text, message["code"], member.id)
        elif "stop" in message:
            if self._steps is None:
                self._steps = {}
                _log.warning("%s: %s; all stop after saving", member, message["stop"])
                self._tell({"stop": "soon"})
                self._roll.stop("soon")
        elif "at" in message:
            self._steps[member.id] = message["at"]
            if len(self._steps) == self._of:
                last = max(self._steps.values()) + 1
                self._tell({"stop": last})
                self._roll.stop(last)
        elif "meet" in message:
            if not self._meeting:
                self._timer = loop.call_later(message["limit"], self._overdue, message)
            self._meeting[member.id] = message
            if len(self._meeting) == self._of:
                self._timer.cancel()
                self._met(message["meet"], [self._meeting.pop(id) for id in range(self._of)])

    def _met(self, name, messages):
        values = [message["value"] for message in messages]
        if wrong := differences([message["meet"] for message in messages]):
            self.verdict(f"the processes are at different points of the run:\n{wrong}")
        elif messages[0]["same"] and (wrong := differences(values)):
            self.verdict(
                f"the processes do not agree on {name}; start all with the same command, code and "
                f"files:\n{wrong}"
            )
        else:
            self._roll.left = name == THE_END
            values = None if messages[0]["same"] else values
            self._tell({"met": name, "values": values})
            self._roll.answers.put(values)

    def _overdue(self, first):
        missing = [self._members[id] for id in range(self._of) if id not in self._meeting]
        self.verdict(
            f"{names(missing)} {'has' if len(missing) == 1 else 'have'} not reached "
            f"{first['meet']!r} within {first['limit']:g} s of the first; look at the logs there"
        )

    async def drained(self, seconds):
        """Until the others have hung up, for they leave when they have heard all."""
        end = time.monotonic() + seconds
        while self._connected and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def close(self):
        await self.drained(10)
        self._server.close()


def _listening(port):
    """A socket on all addresses of this host."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port))  # a host without IPv6


def _allow_files(count):
    """Connections are files, and many systems let a process have 1024 unless it asks."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; another limit there
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < count:
            most = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
