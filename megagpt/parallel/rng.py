"""Random state of one rank: all generators that dropout draws from."""

import torch


def rng_state() -> dict[str, torch.Tensor]:
    """Copies of all generator states of this rank, by name (uint8 vectors)."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"{_tracker_prefix()}{name}"] = state.cpu()
    return {name: state.clone() for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Set all generators of this rank from what `rng_state` returned.

    Raises:
        KeyError: the CPU state is missing.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"].contiguous())
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].contiguous())
    prefix = _tracker_prefix()
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    if tracked:  # saved on the same kind of device
        get_cuda_rng_tracker().set_states({name: state.clone() for name, state in tracked.items()})


def _tracker_prefix() -> str:
    # The generators of a GPU and of the CPU have states of different sizes.
    return f"tracker.{'cuda' if torch.cuda.is_available() else 'cpu'}."
