"""Rows of an embedding, however it is cut over ranks and files."""

import pytest
import torch

from megagpt.errors import CheckpointError
from megagpt.plan import run_config_from_dict

pytestmark = pytest.mark.usefixtures("libraries")


def test_any_rows_of_two_halves_in_uneven_pieces(tmp_path):
    from megagpt.checkpoint import CheckpointReader
    from megagpt.checkpoint.manifest import FORMAT, Manifest, Parameter, Piece, write_manifest
    from megagpt.checkpoint.tensor_file import write_tensors

    model = dict(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=13, max_position_embeddings=8)
    run = run_config_from_dict({"model": model, "training": {"steps": 1}})
    padded, files, pieces = torch.randn(16, 8), {}, []
    for rank in range(2):
        shard = padded[rank * 8 : (rank + 1) * 8].flatten()
        for start, stop in ((0, 30), (30, 64)):
            name = f"{rank}-{start}.safetensors"
            entry = {"weight/head.weight": torch.empty(stop - start, device="meta")}
            files[name] = write_tensors(tmp_path / name, entry, lambda _, a=start, b=stop, s=shard: s[a:b])
            pieces.append(Piece(file=name, tensor_rank=rank, start=start, stop=stop))
    manifest = dict(step=0, samples=0, deepspeed={}, world_size=1, tensor_parallel_size=2, pipeline_parallel_size=1)
    write_manifest(
        tmp_path,
        Manifest(
            **manifest,
            format=FORMAT,
            megagpt="0",
            versions={},
            run=run.model_dump(mode="json"),
            padded_vocab_size=16,
            moments=(),
            parameters={"head.weight": Parameter(shape=(13, 8), pieces=tuple(pieces))},
            files=files,
            metrics={},
            precision="fp32",
            probe_tolerance=1e-4,
        ),
    )
    reader = CheckpointReader(tmp_path)
    for first in range(13):
        for last in range(first + 1, 14):
            assert torch.equal(reader.vocabulary_rows("head.weight", first, last), padded[first:last])
    assert torch.equal(reader.full("head.weight"), padded[:13])
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1  # in the padding, which no row has
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"head.weight: the hash differs from what was saved"):
        CheckpointReader(tmp_path).vocabulary_rows("head.weight", 12, 13)
