"""Files in an object store: a real S3 server, and what its client says when things go wrong."""

import itertools
import os
import time

import pytest

from megagpt.errors import StorageError
from megagpt.storage import RemotePath, filesystem, location, transfer

MIB = 1 << 20
_numbers = itertools.count()


@pytest.fixture(params=["s3", "memory"])
def folder(request) -> RemotePath:
    """An empty folder of a store."""
    if request.param == "memory":
        return location(f"memory://bucket/run-{next(_numbers)}")
    return location(request.getfixturevalue("bucket")) / "run"


@pytest.fixture
def fresh(monkeypatch):
    """Clients made in this test forget nothing into others, and lose patience soon."""
    monkeypatch.setattr(filesystem, "_known", {})
    monkeypatch.setattr(filesystem, "ATTEMPTS", 1)
    monkeypatch.setattr(filesystem, "REQUEST_SECONDS", 1.0)


def test_paths_are_local_without_a_protocol(tmp_path):
    assert location(str(tmp_path)) == tmp_path
    assert location(f"file://{tmp_path}") == tmp_path
    place = location("s3://bucket/run/")
    assert (str(place), place.name, str(place.parent)) == ("s3://bucket/run", "run", "s3://bucket")
    assert str((place / "a").with_name("b")) == "s3://bucket/run/b"


def test_remote_paths_behave_as_local_ones_do(folder):
    assert list(folder.iterdir()) == []
    assert not folder.exists()
    (folder / "sub" / "x").write_bytes(b"abc")
    (folder / "y").write_bytes(b"old")
    (folder / "y").write_bytes(b"new")
    assert sorted(path.name for path in folder.iterdir()) == ["sub", "y"]
    assert (folder.is_dir(), folder.is_file()) == (True, False)
    assert ((folder / "y").is_dir(), (folder / "y").is_file(), (folder / "z").exists()) == (False, True, False)
    assert (folder / "y").read_text() == "new"
    assert (folder / "sub" / "x").size() == 3
    (folder / "y").unlink()
    (folder / "y").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="/y"):
        (folder / "y").read_bytes()
    folder.require_writable()
    assert [path.name for path in folder.iterdir()] == ["sub"], "nothing is left of the probe"
    (folder / "sub").move_to(folder / "other")
    assert [(path.name, (path / "x").read_bytes()) for path in folder.iterdir()] == [("other", b"abc")]
    folder.remove_tree()
    folder.remove_tree()
    assert not folder.exists()


def test_large_files_come_back_in_any_parts(folder):
    content = os.urandom(20 * MIB + 5)
    with transfer.upload(folder / "large", len(content)) as write:
        for start in range(0, len(content), 3 * MIB):
            write(memoryview(content)[start : start + 3 * MIB])
    ranges = transfer.open_ranges(folder / "large")
    assert ranges.size == len(content)
    for start, count in ((0, 8), (8, 100), (108, 5000), (5108, 3 * MIB), (7, len(content) - 7), (len(content) - 9, 9)):
        memory, done = memoryview(bytearray(count)), 0
        while done < count:
            more = ranges.read_into(memory[done:], start + done)
            assert more > 0
            done += more
        assert memory == content[start : start + count], (start, count)
    assert ranges.read_into(memoryview(bytearray(4)), len(content)) == 0
    ranges.close()


def test_a_file_whose_writing_fails_is_not_there(bucket):
    path = location(bucket) / "run" / "file"

    def fail() -> None:
        with transfer.upload(path, 40 * MIB) as write:
            write(memoryview(bytes(40 * MIB)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not path.exists()
    assert uploads_under(bucket) == []


def test_what_killed_processes_have_left_of_uploads_is_forgotten(bucket):
    client = filesystem.filesystem(bucket)
    for folder in ("run", "run-2"):
        file = client.open(f"{bucket}/{folder}/file", "wb", block_size=5 * MIB)
        file.write(bytes(12 * MIB))
        file.closed = True  # as if it were killed
    assert len(uploads_under(bucket)) == 2
    (location(bucket) / "run").abandon_uploads()
    assert uploads_under(bucket) == ["run-2/file"], "those of others stay"


def uploads_under(bucket: str) -> list[str]:
    client = filesystem.filesystem(bucket)
    found = client.call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://")).get("Uploads") or []
    return [upload["Key"] for upload in found]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://key:secret@bucket/run", "holds credentials, which do not belong into a URL"),
        ("s3://", "names no bucket; give s3://BUCKET/FOLDER"),
        ("s4://bucket/run", "fsspec knows no s4://"),
    ],
)
def test_urls_are_judged_without_access(url, problem):
    assert problem in (filesystem.problem_of(url) or "")
    assert "secret" not in (filesystem.problem_of(url) or "")
    with pytest.raises(StorageError, match=problem):
        location(url).read_bytes()


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    assert filesystem.problem_of("s3://bucket/run") == (
        "s3://bucket/run needs a package that is not installed; pip install 'megagpt[s3]'"
    )


def test_a_missing_bucket_is_told(store):
    for action in (
        lambda place: list(place.iterdir()),
        lambda place: place.require_writable(),
        lambda place: (place / "x").read_bytes(),
    ):
        with pytest.raises(StorageError, match=r"s3://nowhere/run.*: there is no such bucket \(.*\); make it"):
            action(location("s3://nowhere/run"))


def test_missing_credentials_are_told(bucket, fresh, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match=r"no valid credentials \(Unable to locate credentials\); set AWS_PROFILE"):
        location(bucket).require_writable()


def test_what_is_forbidden_is_told(bucket, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied.")  # s3fs's for S3's AccessDenied, InvalidAccessKeyId and the like

    monkeypatch.setattr(filesystem.filesystem(bucket), "pipe_file", refuse)
    denied = r"access is denied \(Access Denied\); give credentials that may list, read"
    with pytest.raises(StorageError, match=denied) as failure:
        location(bucket).require_writable()
    assert failure.value.exit_code == 2, "it will not pass by itself"


def test_an_endpoint_that_is_not_there_is_told_soon(bucket, fresh, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot be reached \(EndpointConnectionError: .*127.0.0.1:9") as failure:
        (location(bucket) / "x").read_bytes()
    assert time.monotonic() - started < 10
    assert "never-to-be-printed" not in str(failure.value)
    assert failure.value.exit_code == 75, "it may be there later"


def test_a_server_that_says_nothing_is_given_up(store, bucket, fresh, monkeypatch):
    path = location(bucket) / "x"
    path.write_bytes(b"abc")
    store.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be reached .*ReadTimeout"):
            path.read_bytes()
        monkeypatch.setattr(filesystem, "WHOLE_SECONDS", 1.0)
        monkeypatch.setattr(transfer, "_DISCARD_SECONDS", 0.5)
        with pytest.raises(StorageError, match="no answer in time"), transfer.upload(path, 5) as write:
            write(memoryview(b"other"))
        assert time.monotonic() - started < 20
    finally:
        store.thaw()
    assert path.read_bytes() in (b"abc", b"other"), "what had been sent may still come about"


def test_any_client_is_given_up_after_a_while(store, bucket, monkeypatch):
    monkeypatch.setattr(filesystem, "WHOLE_SECONDS", 0.5)
    store.freeze()
    try:
        with pytest.raises(StorageError, match=r"cannot be reached \(FSTimeoutError: no answer in time\)"):
            (location(bucket) / "x").read_bytes()
    finally:
        store.thaw()
