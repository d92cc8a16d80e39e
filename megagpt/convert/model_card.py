"""The README.md of an export."""

from collections.abc import Mapping

from megagpt.convert.family import Dtype, Family
from megagpt.plan.config import ModelConfig

_USE = """```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{name}")
{tokenizer_lines}```
"""


def model_card(
    name: str,
    family: Family,
    model: ModelConfig,
    parameters: int,
    dtype: Dtype,
    tokenizer_note: str | None,
    facts: Mapping[str, object],
) -> str:
    """The text of README.md: what the model is, how to load it, and the facts of its training run.

    Args:
        name: title.
        family: family that the model was exported to.
        parameters: number of stored weights.
        tokenizer_note: what to say about the tokenizer files beside the weights; None if there are none.
        facts: label -> value, shown as a table.
    """
    architecture = {
        "architecture": family.architecture,
        "parameters": f"{parameters:,}",
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "attention heads": model.num_attention_heads,
        "key/value heads": model.num_query_groups or model.num_attention_heads,
        "vocabulary": model.vocab_size,
        "longest sequence": model.max_position_embeddings,
        "weights stored as": dtype,
    }
    use = _USE.format(
        name=name,
        tokenizer_import=", AutoTokenizer" if tokenizer_note is not None else "",
        tokenizer_lines=f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if tokenizer_note is not None else "",
    )
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megagpt\n---\n"
    parts = [
        front,
        f"# {name}\n",
        "Trained with megagpt (Megatron-Core layers, DeepSpeed).\n",
        _table(architecture),
        use,
    ]
    if tokenizer_note is not None:
        parts.append(tokenizer_note.lstrip())
    if facts:
        parts += ["## Training\n", _table(facts)]
    return "\n".join(parts)


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {_cell(label)} | {_cell(value)} |" for label, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _cell(value: object) -> str:
    """One line without a cell border."""
    return " ".join(str(value).split()).replace("|", "\\|")
