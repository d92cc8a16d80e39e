"""One rank of a replica reads; the others receive the same, however far each has come, and open no file."""

import json
import time
from itertools import islice

import numpy as np
import pytest
from ranks import run_ranks
from tiny import SGD, tiny_plan

from megagpt.data.loader import Marks, eval_batches, train_batches
from megagpt.data.marking import Marking, Spans
from megagpt.data.run_data import Elsewhere
from megagpt.data.samples import SampleStream
from megagpt.errors import DataError

pytestmark = pytest.mark.usefixtures("libraries")

MARKED = {"reset_attention_mask": True, "loss_spans": {"start": "<|im_start|>"}}


class Text:
    """Some tokens; those of one sample cannot be read."""

    prefix = "text"

    def __init__(self, unreadable=-1):
        self.all = np.random.default_rng(1).integers(0, 250, 200 * 32 + 1)
        self.unreadable = unreadable

    def tokens(self, start, stop):
        if start <= self.unreadable < stop:
            raise DataError(f"token {self.unreadable} cannot be read", 75)
        return self.all[start:stop]


def stream(unreadable=-1):
    marking = Marking(7, spans=Spans((9,), (3,)))
    return SampleStream(Text(unreadable), (0, 200 * 32 + 1), 32, seed=3, shuffle=False, marking=marking)


def shown(batch):
    return [None if part is None else part.tolist() for part in batch]


def supplied(plans):
    """What each plan's ranks get: five micro-batches, the rest of an evaluation, and three from another sample on."""
    from megagpt.data.supply import Supply
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import release_groups, start_ranks
    from megagpt.parallel.replica import Channel

    found = []
    for plan in plans:
        ranks = start_ranks(plan, detect_launch())
        training, evaluation = Channel(plan, ranks), Channel(plan, ranks)
        assert training.reads == plan.reads_samples(ranks.rank)
        supply = Supply(plan, ranks.data_rank, ranks.device, training, evaluation)
        samples = stream() if training.reads else Elsewhere(len(stream()), 32)
        got = []
        with supply.training(samples, 8) as batches:
            for i in range(5 if training.needs_samples else 0):
                time.sleep(0.02 * ((ranks.rank + i) % 3))
                got.append(shown(next(batches)))
            if training.needs_samples:
                with supply.evaluation(samples, 2) as held_out:
                    got += map(shown, held_out)
        with supply.training(samples, 40) as batches:
            got += [shown(next(batches)) for _ in range(3 if training.needs_samples else 0)]
        found.append((ranks.data_rank, training.needs_samples, got))
        ranks.barrier()
        release_groups()
    return found


def expected(plan, data_rank):
    """The same, read by one process for all data-parallel ranks together."""

    def batches(rank, function, sum_over_ranks, **options):
        data = plan.run.data
        return function(
            stream(), global_batch_size=8, microbatch_size=2, data_parallel_rank=rank,
            data_parallel_size=plan.data_parallel_size,
            marks=Marks(data.marks_documents, data.masks_loss, sum_over_ranks), **options,
        )  # fmt: skip

    def take(count, function, **options):
        counts = [[] for _ in range(plan.data_parallel_size)]
        for rank, own in enumerate(counts):
            told = batches(rank, function, lambda n, own=own: own.append(n) or n, **options)
            list(islice(told, count))
        totals = iter([sum(step) for step in zip(*counts, strict=True)])
        found = batches(data_rank, function, lambda _: next(totals), **options)
        return [shown(batch) for batch, _ in zip(found, range(count), strict=False)]

    rounds = 2 * 8 // 2 // plan.data_parallel_size
    return [
        *take(5, train_batches, first_sample=8),
        *take(rounds, eval_batches, num_batches=2),
        *take(3, train_batches, first_sample=40),
    ]


def test_ranks_of_a_replica_get_what_its_leader_reads():
    layouts = [
        ({"tp": 2, "dp": 2}, {}),
        ({"tp": 2, "dp": 2}, MARKED),
        ({"pp": 4}, {}),
        ({"pp": 4}, MARKED),
        ({"cp": 2, "pp": 2}, {**MARKED, "prefetch": 0}),
        ({"pp": 2, "dp": 2}, {**MARKED, "prefetch": 1}),
        ({"tp": 2, "dp": 2}, {**MARKED, "prefetch": 0}),
        ({"pp": 2, "dp": 2}, {**MARKED, "read_by": "all"}),
    ]
    plans = [tiny_plan("llama", SGD, sections={"data": data}, **layout) for layout, data in layouts]
    by_rank = run_ranks(supplied, 4, plans, timeout=120)
    for plan, found in zip(plans, zip(*by_rank, strict=True), strict=True):
        references = [expected(plan, data_rank) for data_rank in range(plan.data_parallel_size)]
        for rank, (data_rank, needs_samples, got) in enumerate(found):
            assert needs_samples == (rank in plan.sample_ranks(data_rank))
            assert got == (references[data_rank] if needs_samples else [])


def fail(plan):
    """Read on until something goes wrong; the words and the exit status."""
    from megagpt.data.supply import Supply
    from megagpt.parallel.launch import detect_launch
    from megagpt.parallel.ranks import start_ranks
    from megagpt.parallel.replica import Channel

    ranks = start_ranks(plan, detect_launch())
    supply = Supply(plan, ranks.data_rank, ranks.device, Channel(plan, ranks), Channel(plan, ranks))
    samples = stream(unreadable=200) if plan.reads_samples(ranks.rank) else Elsewhere(len(stream()), 32)
    try:
        with supply.training(samples, 0) as batches:
            for _ in batches:
                pass
    except DataError as error:
        return str(error), error.exit_code
    return "nothing was said", 0


@pytest.mark.parametrize("prefetch", [0, 3])
def test_what_goes_wrong_with_the_leader_is_told_by_all(prefetch):
    plan = tiny_plan("llama", SGD, tp=2, sections={"data": {"prefetch": prefetch}})
    said = "token 200 cannot be read"
    expected = [(said, 75), (f"the rank that reads for this one could not: {said}", 75)]
    assert run_ranks(fail, 2, plan, timeout=60) == expected


def dataset_maps():
    """Files of datasets that this process maps."""
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if line.rstrip().endswith((".bin", ".idx"))}


def train_and_count(plan):
    """Train; how many datasets this rank has opened, and which of their files its memory maps."""
    from tiny import train_quietly

    from megagpt.data.indexed import IndexedDataset

    opened, mapped = [], set()
    init, tokens = IndexedDataset.__init__, IndexedDataset.tokens
    inherited = dataset_maps()  # of the process that this one was forked from

    def counted(self, *args, **kwargs):
        opened.append(args)
        init(self, *args, **kwargs)

    def looking(self, *args):
        mapped.update(dataset_maps() - inherited)
        return tokens(self, *args)

    IndexedDataset.__init__, IndexedDataset.tokens = counted, looking
    assert train_quietly(plan) == 0
    return len(opened), sorted(path.rsplit("/")[-1] for path in mapped)


def test_who_does_not_read_opens_nothing(dataset, tmp_path):
    curves = []
    for read_by in ("leaders", "all"):
        folder = tmp_path / read_by
        sections = {
            "model": {"vocab_size": 300},
            "data": {**dataset, "read_by": read_by, "split": [80, 10, 10], "reset_attention_mask": True},
            "training": {"eval_interval": 2, "eval_batches": 2},
            "logging": {"directory": str(folder), "interval": 1},
        }
        plan = tiny_plan("llama", SGD, tp=2, pp=2, steps=4, sections=sections)
        found = run_ranks(train_and_count, 4, plan)
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves.append([(record["split"], record["loss"]) for record in records])
        expected = [(1, ["data.bin", "data.idx"])] * 4
        assert found == (expected[:1] + [(0, [])] * 3 if read_by == "leaders" else expected)
    assert curves[0] == curves[1]
    assert {split for split, _ in curves[0]} == {"train", "validation", "test"}
