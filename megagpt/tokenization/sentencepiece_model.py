"""sentencepiece models, BPE or unigram; all special tokens are in the model itself."""

from pathlib import Path

import numpy as np

from megagpt.errors import DataError
from megagpt.tokenization.codec import SpecialIds, as_arrays


class SentencepieceCodec:
    """A sentencepiece model. Control pieces (`</s>`, chat tokens) spelt out in a text stay plain text."""

    def __init__(self, path: Path, model: bytes):
        """Parse a model.

        Raises:
            DataError: it is not a sentencepiece model, is empty or has no end-of-sequence token.
        """
        import sentencepiece  # not needed for other kinds

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{path} is not a sentencepiece model; train one with tools/train_tokenizer.py") from None
        if processor.get_piece_size() == 0:
            raise DataError(f"{path} is a sentencepiece model without tokens; train one with tools/train_tokenizer.py")
        if processor.eos_id() < 0:
            raise DataError(
                f"{path} has no end-of-sequence token (</s>), which ends documents; train it with eos_id >= 0"
            )
        self._processor = processor
        self._gives_arrays = hasattr(processor, "EncodeAsNumpy")  # since 0.2.2
        self.vocab_size: int = processor.get_piece_size()
        controls = [i for i in range(self.vocab_size) if processor.is_control(i)]
        self.special = SpecialIds(
            eod=processor.eos_id(),
            bos=_present(processor.bos_id()),
            pad=_present(processor.pad_id()),
            unk=_present(processor.unk_id()),
            texts={processor.id_to_piece(i): i for i in controls},
        )

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """See `Codec`."""
        return self._processor.encode(texts, out_type=int, num_threads=threads)

    def encode_arrays(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """See `Codec`."""
        if not self._gives_arrays:
            return as_arrays(self.encode_batch(texts, threads))
        return self._processor.encode(texts, out_type="numpy", num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        """See `Codec`; control pieces give no text."""
        return self._processor.decode(ids)


def _present(token: int) -> int | None:
    return token if token >= 0 else None
