"""Folders that are local or in an object store: read in parts, written whole, listed, removed (no torch).

Local folders are `pathlib.Path`s and are worked with as such; what lies elsewhere is a `RemotePath`, which has the same
methods as far as they make sense there. An object store has no rename: what makes several objects one whole has to be
an object that is written last.
"""

from megagpt.storage.location import Location, RemotePath, local_folder, location

__all__ = ["Location", "RemotePath", "local_folder", "location"]
