"""What tells one dataset or tokenizer from another; checkpoints keep it, so that no run goes on with another one."""

import hashlib

from megagpt.data.manifest import read_manifest
from megagpt.data.opening import dataset_file, size_of
from megagpt.data.tokenizer import Tokenizer
from megagpt.plan.data_config import DataConfig
from megagpt.storage.transfer import sha256_of


def fingerprints(config: DataConfig) -> dict[str, str]:
    """Hashes of the `dataset` (of all that are mixed) and its `tokenizer`, as far as they can be told.

    The dataset's is taken from its manifest; without one (Megatron's own files) from the index and the size of the
    token file.

    Raises:
        DataError: a file is missing or damaged.
        OSError: the index cannot be read.
    """
    found, parts, manifests = {}, [], []
    for entry in config.mixed:
        manifest = read_manifest(entry.prefix)
        if manifest is not None:
            parts += [manifest.bin_sha256, manifest.idx_sha256]
            manifests.append(manifest)
        else:
            tokens, index = dataset_file(entry.prefix, ".bin"), dataset_file(entry.prefix, ".idx")
            parts += [str(size_of(tokens)), sha256_of(index)]
    if parts:
        found["dataset"] = hashlib.sha256("/".join(parts).encode()).hexdigest()
    if manifests:
        found["tokenizer"] = manifests[0].tokenizer_sha256
    elif config.tokenizer is not None:
        found["tokenizer"] = Tokenizer.load(config.tokenizer).sha256
    return found
