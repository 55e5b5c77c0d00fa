"""``exec``: a command in an environment on the client's own descriptors, which travel over attach.sock.

The output of the command never passes through netnsd. With a terminal, the pty is made here and its slave travels;
without one, our own stdin, stdout and stderr do. The connection is the command's lease: when we die, it ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import tty
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from netnsd.client.transport import connect, error_from
from netnsd.errors import BadAnswer, DaemonUnreachable

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_READY_SECONDS = 60.0
_FRAME_BYTES_MAX = 1 << 20


def run(path: str, request: dict[str, Any], wants_tty: bool) -> int:
    """Run a command and return its exit code, 128 + n for a death by signal n.

    Args:
        path: the daemon's attach.sock.
        request: a ``wire.ExecRequest`` as a dict.
        wants_tty: make a pty for it and stand between it and our own terminal.

    Raises LaunchFailed and what else the daemon answers, DaemonUnreachable, SocketForbidden, BadAnswer, and OSError
    where there is no pty or our own terminal fails.
    """
    _fill_standard_descriptors()
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        return _run(path, request, wants_tty)
    except termios.error as error:
        raise OSError(*error.args) from error


def _run(path: str, request: dict[str, Any], wants_tty: bool) -> int:
    with ExitStack() as stack:
        connection = Connection(stack.enter_context(connect(path)), path)
        connection.open(request)
        # Until here ^C is ours. From here on signals are the command's, and none can leave the terminal raw.
        numbers = (*_FORWARDED, signal.SIGWINCH, signal.SIGCONT) if wants_tty else _FORWARDED
        signals = stack.enter_context(Signals(numbers))
        terminal = stack.enter_context(Terminal()) if wants_tty else None
        if terminal is None:
            connection.hand_over([0, 1, 2])
        else:
            connection.hand_over([terminal.slave] * 3)
            terminal.begin()
        return _relay(connection, signals, terminal)


def _fill_standard_descriptors() -> None:
    """Open /dev/null for each of 0, 1, 2 that is closed: the next socket would take its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _relay(connection: Connection, signals: Signals, terminal: Terminal | None) -> int:
    """Pass signals on, and with a terminal its bytes, until the command has ended."""
    while True:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        poll.register(signals.fileno(), select.POLLIN)
        for fd, events in terminal.interests() if terminal else ():
            poll.register(fd, events)
        ready = {fd for fd, _events in poll.poll()}
        if signals.fileno() in ready:
            for number in signals.take():
                if terminal and number in (signal.SIGWINCH, signal.SIGCONT):
                    terminal.refresh(number == signal.SIGCONT)
                else:
                    connection.send_signal(number)
        if terminal:
            terminal.copy(ready)
        if connection.fileno() in ready:
            frame = connection.receive()
            if frame is not None:
                if terminal:
                    terminal.drain()
                return frame


class Connection:
    """A connection to attach.sock and its frames: 4 bytes of length, big-endian, and a JSON object."""

    def __init__(self, connected: socket.socket, path: str) -> None:
        self._socket = connected
        self._path = path
        self._buffer = b""

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def open(self, request: dict[str, Any]) -> None:
        """Send the request, and return when the command's process waits for its descriptors."""
        payload = json.dumps(request).encode()
        self._socket.settimeout(_READY_SECONDS)
        try:
            self._socket.sendall(struct.pack("!I", len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError):
            # Refused before it was read whole: the reason is there to be read.
            pass
        except TimeoutError as error:
            raise DaemonUnreachable("netnsd does not read the request", hint="it is overloaded or stuck.") from error
        frame = None
        while frame is None:
            self._fill()
            frame = self._frame()
        if frame.get("ready") is not True:
            raise self._not_a_netnsd()
        self._socket.settimeout(None)

    def hand_over(self, fds: list[int]) -> None:
        """Send the command its stdin, stdout and stderr. We keep ours."""
        # Where its process is gone, the last frame has what became of it.
        with suppress(ConnectionError):
            socket.send_fds(self._socket, [b"\0"], fds)

    def send_signal(self, number: int) -> None:
        """Have the command's process group get a signal."""
        with suppress(ConnectionError):
            self._socket.send(bytes([number]))

    def receive(self) -> int | None:
        """Read what has come: the command's exit code, or None where the frame is not whole yet."""
        self._fill()
        frame = self._frame()
        if frame is None:
            return None
        code = frame.get("exit")
        if not isinstance(code, int):
            raise self._not_a_netnsd()
        return code

    def _fill(self) -> None:
        try:
            data = self._socket.recv(65536)
        except TimeoutError as error:
            raise DaemonUnreachable("netnsd does not start the command", hint="it is overloaded or stuck.") from error
        except ConnectionError:
            data = b""
        if not data:
            raise DaemonUnreachable("the connection to the command is lost: how it ended is not known",
                                    hint="`netnsctl doctor` tells whether netnsd is well.")
        self._buffer += data

    def _frame(self) -> dict[str, Any] | None:
        """The next whole frame. Raises what an error frame says."""
        if len(self._buffer) < 4:
            return None
        length = struct.unpack("!I", self._buffer[:4])[0]
        if length > _FRAME_BYTES_MAX:
            raise self._not_a_netnsd()
        if len(self._buffer) < 4 + length:
            return None
        payload, self._buffer = self._buffer[4:4 + length], self._buffer[4 + length:]
        try:
            frame = json.loads(payload)
        except ValueError:
            frame = None
        if error := error_from(frame):
            raise error
        if not isinstance(frame, dict):
            raise self._not_a_netnsd()
        return frame

    def _not_a_netnsd(self) -> BadAnswer:
        return BadAnswer(f"what answers at {self._path} is not a netnsd, or of another version",
                         hint="compare `netnsctl --version` and `netnsctl info`.")


class Signals:
    """Signals as bytes on a descriptor, while the context lasts. Those that are ignored (nohup) stay ignored."""

    def __init__(self, numbers: tuple[signal.Signals, ...]) -> None:
        self._numbers = numbers
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def __enter__(self) -> Self:
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda _number, _frame: None)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._reader

    def take(self) -> bytes:
        """The numbers of those that have come, one byte each."""
        try:
            return bytes(n for n in os.read(self._reader, 512) if n in self._before)
        except BlockingIOError:
            return b""


class Terminal:
    """A pty for the command, and our own terminal in raw mode in front of it. The terminal is always set back."""

    def __init__(self) -> None:
        self._ours = next((fd for fd in (0, 1) if os.isatty(fd)), None)
        self._cooked = termios.tcgetattr(0) if os.isatty(0) else None
        self._master, self.slave = os.openpty()
        os.set_blocking(self._master, False)
        if self._ours is not None:
            termios.tcsetattr(self.slave, termios.TCSANOW, termios.tcgetattr(self._ours))
        self._end_of_file: bytes = termios.tcgetattr(self.slave)[6][termios.VEOF]
        self._resize()
        self._typed = b""
        self._stdin_open = True
        self._master_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if self._cooked is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, self._cooked)
        except termios.error:
            # The terminal itself is gone: there is nothing to set back.
            pass
        finally:
            os.close(self._master)
            if self.slave >= 0:
                os.close(self.slave)

    def begin(self) -> None:
        """The slave has been handed over: let go of it, so that its end can be seen, and take every key as it is."""
        os.close(self.slave)
        self.slave = -1
        self._raw()

    def refresh(self, continued: bool) -> None:
        """Follow our terminal's size; after a stop (``continued``) its mode too, which the shell has changed."""
        if continued:
            self._raw()
        self._resize()

    def interests(self) -> list[tuple[int, int]]:
        """(descriptor, poll events) that ``copy`` waits for."""
        wanted = []
        if self._master_open:
            wanted.append((self._master, select.POLLIN | (select.POLLOUT if self._typed else 0)))
        # What the command does not read stays with us, and we read no more: it must still be able to write.
        if self._stdin_open and not self._typed and self._master_open:
            wanted.append((0, select.POLLIN))
        return wanted

    def copy(self, ready: set[int]) -> None:
        """Carry bytes between the terminal and the command, from those descriptors that are ready."""
        if 0 in ready:
            try:
                self._typed = os.read(0, 4096)
            except OSError:
                self._typed = b""
            if not self._typed:
                self._stdin_open = False
                self._typed = self._end_of_file
        if self._typed and self._master_open:
            try:
                self._typed = self._typed[os.write(self._master, self._typed):]
            except BlockingIOError:
                pass
            except OSError:
                self._typed = b""
        if self._master in ready:
            self._show()

    def drain(self) -> None:
        """Show what the command wrote before its end. What still holds the pty then is not waited for."""
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        while self._master_open and poll.poll(0):
            self._show()

    def _show(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except BlockingIOError:
            return
        except OSError:
            # EIO: nobody holds the slave any more.
            data = b""
        if not data:
            self._master_open = False
        while data:
            data = data[os.write(1, data):]

    def _raw(self) -> None:
        if self._cooked is not None:
            tty.setraw(0, termios.TCSADRAIN)

    def _resize(self) -> None:
        if self._ours is None:
            return
        # A terminal that has gone has no size.
        with suppress(termios.error):
            termios.tcsetwinsize(self._master, termios.tcgetwinsize(self._ours))
