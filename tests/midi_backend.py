"""A backend of mido without hardware: two ports that write down what is sent to them."""

from typing import Any

from mido.ports import BaseOutput

NAMES = ["Midi Through 0", "Synth"]
SENT: list[Any] = []


class Output(BaseOutput):  # type: ignore[misc]  # mido has no types
    """Writes messages down."""

    def _send(self, message: Any) -> None:
        SENT.append(message)

    def _close(self) -> None:
        SENT.append(f"closed {self.name}")


def get_devices(**_: Any) -> list[dict[str, Any]]:
    return [{"name": name, "is_input": False, "is_output": True} for name in NAMES]
