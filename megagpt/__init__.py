"""megagpt: a tensor- and pipeline-parallel GPT built on Megatron-Core and trained by DeepSpeed."""

__version__ = "0.1.0"
