"""Text to tokens to samples to micro-batches.

    JSONL --tokenizer, preprocess--> .bin/.idx + manifest --indexed--> flat token stream
          --samples, order--> sample of seq_length + 1 tokens --loader--> micro-batches of one data-parallel rank

Nothing here depends on how the model is spread over ranks, except the last step, which says which rank reads which
sample of a global batch.
"""
