"""One way to refuse bad input: one clear line on stderr and exit code 2."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path

from midimamba.text import printable

__all__ = ["InputError", "check_hub", "exit_on_input_error", "reaching_hub"]

# What the user can mend, and how. Any other error of the operating system is a bug, and shows where it comes from.
_ADVICE = {
    errno.ENOSPC: "make room on that disk, then run the same command again",
    errno.EDQUOT: "make room in your quota, then run the same command again",
    errno.EFBIG: "choose a disk for larger files, or raise the limit, then run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a file or folder that you may use",
    errno.EPERM: "choose a file or folder that you may use",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a folder that is not inside a file",
}
# What helps when the Hub refuses, by the status of its answer.
_HUB_ADVICE = {
    401: "log in with `hf auth login`",
    403: "check what your token may do, or use another with `hf auth login`",
    429: "wait, then run the same command again",
}
_PATIENCE = 10  # seconds, with the Hub
_INTERRUPTED = 130  # the exit code that shells give to a program that Ctrl-C ended


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where and what to do, in one line."""


@contextmanager
def reaching_hub(purpose: str) -> Iterator[None]:
    """Turn a failed connection to the Hub, or the Hub's refusal, into an [`InputError`].

    Args:
        purpose (`str`): what could not be done, such as `"you/bach cannot be created"`.
    """
    import huggingface_hub.errors as hub

    # The base class of all errors of the client that huggingface_hub uses: httpx or, since its version 2.4, httpx2.
    connection_error: type[Exception] = hub.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split())
        advice = _HUB_ADVICE.get(status, "try again later" if status >= 500 else "check the name of the repository")
        raise InputError(f"{purpose}: the Hub answers {status} ({said}): {advice}") from error
    except JSONDecodeError as error:  # what answers is a login page of the network, for example
        raise InputError(f"{purpose}: what answers is not the Hub: check the connection") from error
    except (connection_error, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{purpose}: the Hub cannot be reached ({reason}): check the connection") from error


def check_hub(name: str, repo_type: str = "model") -> None:
    """Ask the Hub once for a repository that is not on this machine, before loaders ask for half a minute.

    What is here already, and a refusal by the Hub, is left to the loaders.

    Args:
        name (`str`): a folder or the name of a repository.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"dataset"`.

    Raises:
        InputError: if the Hub cannot be reached, or is out of order.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    here = Path(constants.HF_HUB_CACHE) / "--".join([f"{repo_type}s", *name.split("/")])
    if constants.HF_HUB_OFFLINE or Path(name).exists() or here.exists():
        return
    with reaching_hub(f"{name} is not here and cannot be loaded"), suppress(HFValidationError):
        try:
            HfApi().repo_info(name, repo_type=repo_type, timeout=_PATIENCE)
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:  # which loaders would try again as well
                raise


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2. Anything else is a bug and shows where.

    An interruption by Ctrl-C is one line too, with exit code 130.
    """
    try:
        yield
    except InputError as error:
        _leave(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _leave(f"error: {place}{error.strerror or error}: {_ADVICE[error.errno]}", 2)
    except KeyboardInterrupt:
        _leave("interrupted", _INTERRUPTED)


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"{printable(message)}\n")
    sys.exit(code)
