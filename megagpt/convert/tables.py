"""Which Hugging Face family expresses a model.

To add a family, write a `Family` (see `family.py`) into the file of its kin, or a new file:

1. `rows`: one `Row` per module joins ours (as in `canonical.canonical_shapes`) to theirs, which hold the same numbers,
   with the reshaping; it counts for `.weight` and `.bias` alike. Rows for modules that a model lacks are unused, so kin
   share a table. A module without a row is an error.
2. `requires`: what the family fixes. Keys of `family.FEATURES` are off unless a family allows more.
3. `config`: config.json, for transformers 4 and 5.

Then list it in FAMILIES, before any family that would express the same model less naturally, and add a tiny model of
it to `MODELS` in tests/convert/convert_reference.py and to the table in tests/convert/test_hf_families.py: the tests
compare logits and round trips. A new key of ModelConfig that changes the computation goes into FEATURES, so that no
family exports it by accident.
"""

from megagpt.convert.family import Dtype, Family, Read, TokenIds
from megagpt.convert.gemma_families import GEMMA, GEMMA2, GEMMA3
from megagpt.convert.gpt_families import GPT2, GPT_NEOX
from megagpt.convert.llama_families import LLAMA, MISTRAL, QWEN2, QWEN3
from megagpt.convert.moe_families import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from megagpt.errors import ConversionError
from megagpt.plan.config import ModelConfig

__all__ = ["FAMILIES", "Dtype", "Family", "Read", "TokenIds", "family_for"]

FAMILIES: tuple[Family, ...] = (
    QWEN2,
    QWEN3,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
)


def family_for(model: ModelConfig, own_tokenizer: bool = False) -> Family:
    """The first family that expresses the model exactly.

    Args:
        own_tokenizer: the folder will hold our tokenizer, so families that bring their own are passed over.

    Raises:
        ConversionError: none does; the message lists per family the keys that stand in the way.
    """
    obstacles = {}
    for family in FAMILIES:
        found = family.obstacles(model)
        if own_tokenizer and family.brings_tokenizer:
            found.append("transformers replaces the tokenizer of this family by another one")
        if not found:
            return family
        obstacles[family.name] = found
    lines = [f"  {name}: {'; '.join(found)}" for name, found in obstacles.items()]
    raise ConversionError(
        "no Hugging Face family expresses this model exactly; to export, train with keys that one of them allows:\n"
        + "\n".join(lines)
    )
