"""Memory that is used again, and elements that are converted while they are read."""

import pytest
import torch

from megagpt.host_tensors import MemoryPool, bytes_of, one_thread, read_elements, round_in_place

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("wanted", TYPES)
def test_elements_are_read_in_chunks_and_converted(stored, wanted):
    content = torch.randn(1001).to(stored)
    data = b"header" + bytes(bytes_of(content))

    def read_into(memory: memoryview, offset: int) -> int:
        part = data[offset : offset + min(len(memory), 50)]  # files give less than is asked for
        memory[: len(part)] = part
        return len(part)

    seen, out = bytearray(), torch.zeros(7, 143, dtype=wanted)
    assert read_elements(read_into, 6, stored, out, seen.extend, chunk_bytes=128)
    assert torch.equal(out.flatten(), content.to(wanted))
    assert bytes(seen) == data[6:], "hashes are of what is stored"
    assert not read_elements(read_into, 8, stored, out), "the file ends before"


def test_memory_that_is_given_back_is_used_again():
    pool = MemoryPool()
    first = pool.take((1 << 10, 1 << 10), torch.float32)
    second = pool.take((1 << 10, 1 << 10), torch.float32)
    first.fill_(1), second.fill_(2)
    assert bool((first == 1).all()), "never used twice at once"
    place = first.data_ptr()
    pool.give_back(first)
    half = pool.take((1 << 10, 1 << 10), torch.bfloat16)
    assert half.data_ptr() == place
    assert half.shape == (1 << 10, 1 << 10)
    pool.give_back(torch.empty(1 << 20))  # not from here
    assert pool.take((1 << 10, 1 << 10), torch.float32).data_ptr() != place


def test_rounding_in_place_is_rounding():
    values = torch.randn(3, (1 << 18) + 5)
    expected = values.bfloat16().float()
    round_in_place(values, torch.bfloat16)
    assert torch.equal(values, expected)


def test_threads_come_back():
    count = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == count
