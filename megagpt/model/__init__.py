"""The GPT: a list of pipeline layers built from Megatron-Core's transformer layer and tensor-parallel layers."""

from megagpt.model.documents import Documents
from megagpt.model.experts import expert_parameters, set_auxiliary_loss_scale, take_router_counts
from megagpt.model.flash_attention import choose_flash_attention
from megagpt.model.fusion import fuse
from megagpt.model.gpt import GPT, PipelineLayer, pipeline_layers
from megagpt.model.grouped_experts import group_experts
from megagpt.model.initialize import initialize_weights
from megagpt.model.layers import Head, TiedHead
from megagpt.model.norm import is_partial_over_tensor_ranks
from megagpt.model.partition import Partition, canonical_name, partition_of
from megagpt.model.recompute import takes_documents, with_recomputation

__all__ = [
    "GPT",
    "Documents",
    "Head",
    "Partition",
    "PipelineLayer",
    "TiedHead",
    "canonical_name",
    "choose_flash_attention",
    "expert_parameters",
    "fuse",
    "group_experts",
    "initialize_weights",
    "is_partial_over_tensor_ranks",
    "partition_of",
    "pipeline_layers",
    "set_auxiliary_loss_scale",
    "take_router_counts",
    "takes_documents",
    "with_recomputation",
]
