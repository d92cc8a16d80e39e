from pathlib import Path

import pytest
from batch_files import RUN, STUBS
from repository_copy import lay_out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's folder as the batch files see it."""
    return lay_out(tmp_path, RUN, {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}, STUBS)
