"""Random state of one rank: all generators that dropout draws from."""

import torch


def rng_state() -> dict[str, torch.Tensor]:
    """Copies of all generator states of this rank, by name (uint8 vectors)."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state.cpu()
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
    prefix = "tracker."
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states({name: state.clone() for name, state in tracked.items()})
