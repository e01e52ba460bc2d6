"""Music played to a MIDI port in real time, while a generator is still sampling it."""

import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any, Protocol, cast

from midimamba.errors import InputError
from midimamba.text import show

if TYPE_CHECKING:
    from midimamba.note_decoding import Note

# Notes sampled ahead of those that sound: enough for a pause of a second or more, and few enough to stop soon.
_AHEAD = 256
# Seconds from the first note to its sound: so much sampling is ahead from the start.
_LEAD = 0.2
# A note that comes this many seconds late is not heard as late.
_TOLERANCE = 0.02
# Seconds until a sampling thread that has nothing to do looks whether it is still wanted.
_PATIENCE = 0.1

_CHANNELS = [channel for channel in range(16) if channel != 9]
_DRUM_CHANNEL, _ALL_NOTES_OFF = 9, 123
# What operating systems call ports that lead nowhere by themselves.
_LOOPS = ("through", "thru")


class Port(Protocol):
    """What is needed of a `mido` output port."""

    def send(self, message: Any) -> None: ...


class Source(Protocol):
    """Where a player gets its notes."""

    def take(self, timeout: float | None) -> "Note | None":
        """The next note; `None` after the last one. Waits for it for some seconds, by default without end.

        Raises:
            queue.Empty: if there is none by then.
        """


class Ahead:
    """
    Samples in a thread of its own, some notes ahead of the one that is taken. A context: leaving it ends the thread.

    Args:
        notes (iterator of [`~midimamba.note_decoding.Note`]): such as [`~midimamba.streaming.stream`] returns.
        most (`int`, *optional*, defaults to 256): how many notes it is ahead.
    """

    def __init__(self, notes: "Iterator[Note]", most: int = _AHEAD):
        self._notes = notes
        self._queue: Queue[Note | BaseException | None] = Queue(most)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Ahead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def take(self, timeout: float | None) -> "Note | None":
        """See [`Source.take`]. What went wrong in sampling is raised here."""
        taken = self._queue.get(timeout=None if timeout is None else max(0.0, timeout))
        if isinstance(taken, BaseException):
            raise taken
        return taken

    def _sample(self) -> None:
        last: BaseException | None = None
        try:
            for note in self._notes:
                if not self._put(note):
                    return
        except BaseException as error:  # the player raises it
            last = error
        self._put(last)

    def _put(self, item: "Note | BaseException | None") -> bool:
        """Wait until there is room. Whether the item is still wanted."""
        while not self._is_over.is_set():
            try:
                self._queue.put(item, timeout=_PATIENCE)
            except Full:
                continue
            return True
        return False


class Player:
    """
    Sends notes to a port at their time.

    Each instrument gets a MIDI channel; if there are more than 15, the one that has been silent for longest gives its
    channel away. Where sampling is too slow, the music pauses and then goes on in time, and one line says so.

    Args:
        port ([`Port`]): where messages go.
        now (`Callable[[], float]`, *optional*): the time in seconds.
        sleep (`Callable[[float], None]`, *optional*): waits for some seconds.
    """

    def __init__(
        self, port: Port, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ):
        self._port, self._now, self._sleep = port, now, sleep
        self._start: float | None = None  # when second 0 of the music is
        self._is_late = False
        self._channels: OrderedDict[int, int] = OrderedDict()  # of programs, the last used last
        self._ends: list[tuple[float, int, int, int]] = []  # a heap of times, numbers of notes, channels, pitches
        self._sounding: dict[tuple[int, int], int] = {}  # the number of the note by channel and pitch
        self._count = 0

    def play(self, source: Source) -> None:
        """Play all notes. However it ends, no note goes on sounding."""
        try:
            note = self._next(source)
            while note is not None:
                self._wait_until(self._due(note))
                self._begin(note)
                note = self._next(source)
            while self._ends:
                self._wait_until(self._ends[0][0])
        finally:
            self._silence()

    def _next(self, source: Source) -> "Note | None":
        """The next note. While there is none, notes that sound end at their time."""
        while True:
            try:
                return source.take(self._ends[0][0] - self._now() if self._ends else None)
            except Empty:
                self._end_due()

    def _due(self, note: "Note") -> float:
        """When a note sounds."""
        now = self._now()
        if self._start is None:
            self._start = now + _LEAD - note.seconds
        late = now - (self._start + note.seconds)
        if late > _TOLERANCE:
            self._start += late
            if not self._is_late:
                self._is_late = True
                show("sampling is slower than the music, so it pauses: take a smaller generator", file=sys.stderr)
        return self._start + note.seconds

    def _wait_until(self, due: float) -> None:
        """Wait, and end the notes that end until then."""
        while True:
            self._end_due()
            until = min(due, self._ends[0][0]) if self._ends else due
            if until <= self._now():
                return
            self._sleep(until - self._now())

    def _end_due(self) -> None:
        while self._ends and self._ends[0][0] <= self._now():
            _, number, channel, pitch = heappop(self._ends)
            if self._sounding.get((channel, pitch)) == number:
                del self._sounding[channel, pitch]
                self._send("note_off", channel=channel, note=pitch)

    def _begin(self, note: "Note") -> None:
        assert self._start is not None
        channel = _DRUM_CHANNEL if note.is_drum else self._channel(note.program)
        place = channel, note.pitch
        if place in self._sounding:  # of a program that gave its channel away
            self._send("note_off", channel=channel, note=note.pitch)
        self._count += 1
        self._sounding[place] = self._count
        heappush(self._ends, (self._start + note.seconds + note.duration_seconds, self._count, *place))
        self._send("note_on", channel=channel, note=note.pitch, velocity=note.velocity)

    def _channel(self, program: int) -> int:
        if program not in self._channels:
            taken = len(self._channels)
            free = _CHANNELS[taken] if taken < len(_CHANNELS) else self._channels.popitem(last=False)[1]
            self._channels[program] = free
            self._send("program_change", channel=free, program=program)
        self._channels.move_to_end(program)
        return self._channels[program]

    def _silence(self) -> None:
        """End every note that sounds, each by itself and then all of a channel, for ports that count notes."""
        for channel, pitch in self._sounding:
            self._send("note_off", channel=channel, note=pitch)
        self._sounding.clear()
        self._ends.clear()
        for channel in (*self._channels.values(), _DRUM_CHANNEL):
            self._send("control_change", channel=channel, control=_ALL_NOTES_OFF, value=0)

    def _send(self, kind: str, **values: int) -> None:
        self._port.send(_import_mido().Message(kind, **values))


def _import_mido() -> Any:
    try:
        import mido
    except ImportError as error:
        raise _missing() from error
    return mido


def _missing() -> InputError:
    return InputError("playing needs mido and python-rtmidi: pip install 'midimamba[play]'")


def port_names() -> list[str]:
    """The MIDI ports that can be played to.

    Raises:
        InputError: if mido or python-rtmidi is missing, or the system has no MIDI.
    """
    mido = _import_mido()
    try:
        return cast(list[str], mido.get_output_names())
    except ImportError as error:  # mido imports python-rtmidi here
        raise _missing() from error
    except OSError as error:
        raise InputError(f"this machine has no MIDI that can be played to ({' '.join(str(error).split())})") from error


def choose_port(name: str | None) -> str:
    """A port by its name, or by default the first that does not merely lead back into the machine.

    Raises:
        InputError: if there is no such port; the message names those that exist.
    """
    names = port_names()
    if not names:
        raise InputError("there is no MIDI port: connect an instrument or start a synthesizer such as FluidSynth")
    if name is None:
        return next((one for one in names if not any(loop in one.lower() for loop in _LOOPS)), names[0])
    if name not in names:
        raise InputError(f"there is no MIDI port {name!r}: --port can name {', '.join(map(repr, names))}")
    return name


@contextmanager
def open_port(name: str) -> Iterator[Port]:
    """A port, closed afterwards.

    Raises:
        InputError: if it cannot be opened.
    """
    try:
        port = _import_mido().open_output(name)
    except OSError as error:
        raise InputError(f"the MIDI port {name!r} cannot be opened ({' '.join(str(error).split())})") from error
    try:
        yield port
    finally:
        port.close()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let the end of a terminal or of a session end the music as well, not only Ctrl-C: else notes would sound on."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)
