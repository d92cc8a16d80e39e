"""The fsspec file system behind a URL, with bounded waits, and what its errors mean in words."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from megagpt.errors import TRY_AGAIN, MegagptError, StorageError

REQUEST_SECONDS = 60.0
"""Wait for one answer; a request that stays without one is sent again."""
ATTEMPTS = 3
"""How often the client of S3 sends a request, and how often what has failed so is begun anew."""
WHOLE_SECONDS = 300.0
"""Wait for one operation with all that is repeated, of any client."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""What to install for a protocol: `pip install 'megagpt[...]'`."""

_known: dict[tuple[int, str], Any] = {}
_lock = threading.Lock()


def protocol_of(url: str) -> str:
    """`s3` of s3://bucket/folder."""
    return url.partition("://")[0]


def problem_of(url: str) -> str | None:
    """Why nothing can be kept at a URL, found out without any access; None if nothing is in the way."""
    protocol = protocol_of(url)
    if problem := _wrong_form(url):
        return problem
    try:
        import fsspec
    except ImportError:
        return f"{url} needs fsspec; {_install(protocol)}"
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        return f"{url}: fsspec knows no {protocol}://; use a local folder, s3:// or another one of fsspec's protocols"
    except ImportError:
        return f"{url} needs a package that is not installed; {_install(protocol)}"
    return None


def _wrong_form(url: str) -> str | None:
    protocol, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0]:
        return f"{protocol}://... holds credentials, which do not belong into a URL; give them in the environment"
    return None if rest.strip("/") else f"{url} names no bucket; give {protocol}://BUCKET/FOLDER"


def _install(protocol: str) -> str:
    extra = EXTRAS.get(protocol)
    return f"pip install 'megagpt[{extra}]'" if extra else f"install fsspec and its package for {protocol}://"


def filesystem(url: str) -> Any:
    """The file system of a URL; one for all threads of this process.

    Raises:
        StorageError: the protocol is unknown, or its package is not installed.
    """
    key = os.getpid(), protocol_of(url)  # of this process: threads that serve requests do not survive a fork
    with _lock:
        if problem := _wrong_form(url) if key in _known else problem_of(url):
            raise StorageError(problem)
        if key not in _known:
            import fsspec

            with worded(url):
                _known[key] = fsspec.filesystem(key[1], skip_instance_cache=True, **_options(key[1]))
            if key[1] in ("s3", "s3a"):
                _known[key].retries = ATTEMPTS
        return _known[key]


def _options(protocol: str) -> dict[str, Any]:
    """Options for a file system beyond those of the user's environment and of ~/.config/fsspec."""
    if protocol not in ("s3", "s3a"):
        return {"use_listings_cache": False}
    import fsspec.config

    theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    ours = {"connect_timeout": REQUEST_SECONDS / 6, "read_timeout": REQUEST_SECONDS, "retries": retries}
    return {"use_listings_cache": False, "config_kwargs": {**ours, **theirs}}


def call(url: str, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of the file system of a URL.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the store refuses, is not there, or does not answer.
    """
    target = filesystem(url)
    with worded(url):
        if target.async_impl:
            return getattr(target, method)(*args, **options, timeout=WHOLE_SECONDS)
        return within(WHOLE_SECONDS, lambda: getattr(target, method)(*args, **options))


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """Do something, but wait for its end no longer than that: a client may wait for ever where its own limits do not
    reach (for S3's `100 Continue`, for one).

    Raises:
        TimeoutError: it has not ended; its thread is left to itself.
    """
    ended: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((action(), None))
        except BaseException as error:
            ended.put((None, error))

    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        result, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def worded(url: str) -> Iterator[None]:
    """Turn what a client of a store raises into an error that says what to do.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: everything else.
    """
    try:
        yield
    except (MegagptError, AssertionError, TypeError, AttributeError):
        raise
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error) or "NoSuchBucket" in type(error.__cause__).__name__:
            raise StorageError(
                f"{url}: there is no such bucket ({_text(error)}); make it, or mend the name or the endpoint"
            ) from None
        raise FileNotFoundError(2, "No such file", url) from None
    except PermissionError as error:
        raise StorageError(
            f"{url}: access is denied ({_text(error)}); give credentials that may list, read, write and delete there"
        ) from None
    except Exception as error:  # each client has its own; none of them derives from a common one
        if "Credentials" in type(error).__name__:
            raise StorageError(f"{url}: no valid credentials ({_text(error)}); {_credentials(url)}") from None
        raise StorageError(
            f"{url}: the store fails or cannot be reached ({type(error).__name__}: {_text(error)}); see that endpoint, "
            "network and store are up, then start again",
            TRY_AGAIN,
        ) from None


def _text(error: Exception) -> str:
    """The first line of a client's words."""
    text = str(error).strip() or ("no answer in time" if isinstance(error, TimeoutError) else "")
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _credentials(url: str) -> str:
    if protocol_of(url) in ("s3", "s3a"):
        return "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the host a role"
    return f"see fsspec's documentation of {protocol_of(url)}://"
