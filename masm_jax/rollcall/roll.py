"""The end of the star in every process, and what commands call."""

import asyncio
import contextlib
import json
import os
import pathlib
import queue
import socket
import sys
import threading
import time

import jax

from masm_jax import locks
from masm_jax.rollcall.hub import Hub
from masm_jax.rollcall.members import ANSWER, HELLO, THE_END, Member, for_ever, gone, line, silent
from masm_jax.runtime import EXIT_ERROR, EXIT_PEER


class Roll:
    """The processes of a run, seen from one of them.

    The calls are for the main thread, and every process makes the same ones in the same order. A
    verdict (somebody failed, is gone, disagrees, does not come) prints its cause and ends every
    process at once, with what it has open, whatever its main thread is doing.

    Args:
      place: of this process (processes.Place).
      limit: seconds for all processes to come.
    """

    ping, silence = 5.0, 60.0  # seconds between signs of life; without one, a process is gone

    def __init__(self, place, *, limit=300.0):
        self.place = place
        self.me = Member(place.process_id, socket.gethostname(), os.getpid())
        self.over = self.left = False  # a verdict is out; all have reached the orderly end
        self.answers = queue.SimpleQueue()
        self._step, self._stop_at, self._asked = 0, None, False
        self._pace = threading.Condition()
        self._tasks = set()  # the loop itself keeps none alive
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="roll call", daemon=True).start()
        self._link = Hub(self) if place.process_id == 0 else Spoke(self)
        self._in_loop(self._link.open(limit))

    def agree(self, name, value, *, limit=600.0):
        """Wait for all processes, and see that the value is the same on all.

        Args:
          name: of the barrier, for messages: "the config".
          value: JSON-able.
          limit: seconds from the first process that came.
        """
        self._meet({"meet": name, "value": value, "limit": limit, "same": True})

    def gather(self, name, value, *, limit=600.0):
        """The values of all processes (a list, by process id), on all. Arguments as of agree."""
        return self._meet({"meet": name, "value": value, "limit": limit, "same": False})

    def stopping(self, step, wanted):
        """Whether to stop after this step: all processes after the same, if one of them wants to.

        Costs nothing until one does. Then the threads of the roll call say which step each is at,
        and the run stops one past the furthest; a process holds at its next call until that is
        known, which takes no longer than a message there and back.

        Args:
          step: just dispatched; grows by one from call to call.
          wanted: why this process wants to stop, such as "SIGTERM"; or None.
        """
        if wanted and not self._asked:
            self._asked = True
            self._post({"stop": str(wanted)})
        with self._pace:
            self._step = step
            self._pace.wait_for(lambda: self._stop_at != "soon")
            return self._stop_at is not None and step >= self._stop_at

    def stop(self, at):
        """News of the stop, in the loop's thread: "soon" asks for the step; a number is it."""
        with self._pace:
            self._stop_at = at
            self._pace.notify_all()
            if at == "soon":
                self._link.post({"at": self._step})

    def fail(self, text, code=EXIT_ERROR):
        """End all processes, with this process's error as the cause and the exit code."""
        self._post({"fail": text, "code": code})
        self.await_verdict(10)  # process 0 does not answer
        _say(f"{self.me}: {text}", code)
        _exit(code)

    def await_verdict(self, seconds):
        """Wait for a verdict, which ends this process; returns when there is none in time.

        For when a computation failed: often because another process died, and the error of the
        collective says less than the verdict.
        """
        time.sleep(seconds)

    def leave(self, *, limit=600.0):
        """The orderly end: all have come here, none is taken for dead. For exit codes 0 and 75."""
        self.gather(THE_END, None, limit=limit)
        jax.distributed.shutdown()  # does nothing if it was not connected
        self._in_loop(self._link.close())
        self._in_loop(self._rest())
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _rest(self):
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self, text, code=EXIT_ERROR, cause=None):
        """The verdict as it reaches this process; in the loop's thread.

        Args:
          text: its first line names the process that is the cause; process 0 and that one print
            all of it.
          code: exit code.
          cause: id of the process, or None.
        """
        if not self.over:
            self.over = True
            lines = text.splitlines() or [""]
            if len(lines) > 1 and self.me.id not in (0, cause):
                text = f"{lines[0]} (more in the output of process 0)"
            self.spawn(self._finish(text, code))

    async def _finish(self, text, code):
        _say(text, code)
        await self._link.drained(3)
        _exit(code)

    def spawn(self, coroutine):
        """Run it in the loop; from the loop's thread."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def beat(self, link):
        """Give signs of life to the members of a link and look for theirs, to the end."""
        while not self.left:
            due = time.monotonic() + self.ping
            await asyncio.sleep(self.ping)
            late = max(0.0, time.monotonic() - due)  # paused itself: did not hear what was said
            for member in link.others():
                member.send(line({"ping": 1}))
                member.heard += late
                if time.monotonic() - member.heard > self.silence:
                    link.verdict(silent(member, self), EXIT_PEER, member.id)

    def _meet(self, message):
        self._post(message)
        return self.answers.get()

    def _post(self, message):
        json.dumps(message)  # a value that cannot be sent is the caller's error
        self._loop.call_soon_threadsafe(self._link.post, message)

    def _in_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class Spoke:
    """The end of the connection in a process that is not process 0."""

    def __init__(self, roll):
        self._roll, self._zero = roll, Member(0, roll.place.host, 0)
        self.verdict = roll.end  # of what process 0 cannot tell: that it is gone

    def others(self):
        return [self._zero]

    def post(self, message):
        self._zero.send(line(message))

    async def open(self, limit):
        """Come to process 0, again and again until the limit; return when all are there."""
        roll, place = self._roll, self._roll.place
        last, reason = time.monotonic() + limit, ""
        while not reason or time.monotonic() < last:
            try:
                async with asyncio.timeout(max(1, min(10, last - time.monotonic()))):
                    reader, self._zero.writer = await asyncio.open_connection(
                        place.host, place.roll_port, limit=ANSWER
                    )
                if await self._greet(reader):
                    roll.spawn(self._listen(reader))
                    return
                reason = "what answers there is not process 0 of this run"
                self._zero.writer.close()
            except (OSError, TimeoutError) as error:
                reason = str(error) or "no answer"
            await asyncio.sleep(max(0.0, min(1.0, last - time.monotonic())))
        roll.end(
            f"process 0 of {place.num_processes} could not be reached at {place.host}:"
            f"{place.roll_port} within {limit:g} s ({reason}); this is {roll.me}; look at the log "
            f"of process 0, {place.firewall}"
        )
        await for_ever()

    async def _greet(self, reader):
        """Whether process 0 has said that all are there."""
        roll, me = self._roll, self._roll.me
        hello = {"hello": HELLO, "id": me.id, "of": roll.place.num_processes}
        self.post(hello | {"host": me.host, "pid": me.pid})
        try:
            # Process 0 has nothing else to do now: it gives signs of life in time.
            while said := await asyncio.wait_for(reader.readline(), 3 * roll.ping):
                self.post({"ping": 1})
                message = json.loads(said)
                if "text" in message:
                    roll.end(**message)
                    await for_ever()
                if "welcome" in message:
                    self._zero.host, self._zero.pid = message["welcome"]
                    return True
        except (OSError, ValueError, TypeError, TimeoutError):
            pass
        return False

    async def _listen(self, reader):
        roll, zero = self._roll, self._zero
        zero.heard = time.monotonic()
        roll.spawn(roll.beat(self))
        with contextlib.suppress(OSError):
            while said := await reader.readline():
                zero.heard = time.monotonic()
                message = json.loads(said)
                if "text" in message:
                    roll.end(**message)
                elif "stop" in message:
                    roll.stop(message["stop"])
                elif "met" in message:
                    roll.left = message["met"] == THE_END
                    roll.answers.put(message["values"])
        if not roll.left:
            roll.end(gone(zero, roll), EXIT_PEER, 0)

    async def drained(self, seconds):
        """Nobody is told through here."""

    async def close(self):
        self._zero.writer.close()


def _say(text, code):
    # Should a full pipe or a lock that the main thread holds stop us, the end comes all the same.
    with contextlib.suppress(RuntimeError):  # the interpreter is going down: no new threads
        threading.Timer(8, os._exit, (code,)).start()
    with contextlib.suppress(OSError, ValueError):  # nobody reads, or it is closed
        # In one write: print makes two where PYTHONUNBUFFERED is set, and others write between.
        sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {text}\n")
        sys.stderr.flush()


def _exit(code):
    locks.give_back_all()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # sys.exit would end this thread alone
