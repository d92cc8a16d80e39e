"""Who waits for whom, from what each rank was doing."""

from megagpt.supervise.beats import Beat
from megagpt.supervise.pulse import Phase
from megagpt.supervise.verdict import Seen, describe_lost, explain


def seen(rank: int, phase: Phase, entered: int = 50, *, condition="alive", detail="", microbatch=3, step=11, **more):
    """A rank of TP2 x PP2 x DP2 on two hosts: tensor fastest, pipeline slowest."""
    beat = Beat(
        rank=rank,
        host=f"node{1 + rank // 4}",
        pid=100 + rank,
        pid_started=1,
        tensor=rank % 2,
        context=0,
        data=rank // 2 % 2,
        stage=rank // 4,
        step=step,
        microbatch=microbatch,
        phase=phase,
        count=entered,
        number=9,
        still_for=63.2,
        is_stuck=True,
        **more,
    )
    return Seen(beat, condition, detail)


def test_a_data_loader_is_found_through_the_stage_that_waits_for_it() -> None:
    ranks = [
        seen(0, Phase.FORWARD, 41),
        seen(1, Phase.DATA, 40, microbatch=4, where="loader.py:112 in _micro_batch"),
        seen(2, Phase.RECEIVE_GRADIENT),
        seen(3, Phase.RECEIVE_GRADIENT),
        *(seen(rank, Phase.RECEIVE_ACTIVATION) for rank in (4, 5)),
        *(seen(rank, Phase.REDUCE, microbatch=None) for rank in (6, 7)),
    ]
    text, culprits = explain(ranks, "logs/stack-*.txt")
    assert [culprit.beat.rank for culprit in culprits] == [1]
    assert text.startswith("no rank has made progress for 63 s; ")
    assert (
        "whose rank 1 on node1 has stopped in the data loader at loader.py:112 in _micro_batch (step 12, "
        "micro-batch 4) for 63 s"
    ) in text
    assert text.endswith(". Python stacks of all ranks: logs/stack-*.txt")


def test_who_waits_for_samples_waits_for_the_leader_of_its_replica() -> None:
    ranks = [seen(2, Phase.DATA), *(seen(rank, Phase.RECEIVE_SAMPLES) for rank in (3, 6, 7))]
    text, culprits = explain(ranks, "stacks")
    assert [culprit.beat.rank for culprit in culprits] == [2]
    assert (
        "rank 3 on node1 (stage 0, step 12, micro-batch 3) waits for samples of stage 0, whose rank 2 on node1 has "
        "stopped in the data loader"
    ) in text


def test_the_chain_is_told_from_its_last_link() -> None:
    ranks = [
        seen(0, Phase.DATA),
        seen(4, Phase.RECEIVE_ACTIVATION),
    ]
    text, _ = explain(ranks, "stacks")
    assert (
        "rank 4 on node2 (stage 1, step 12, micro-batch 3) waits for the activation of stage 0, whose rank 0 on node1 "
        "has stopped in the data loader"
    ) in text


def test_a_frozen_rank_is_worse_than_one_that_is_slow() -> None:
    ranks = [
        seen(0, Phase.FORWARD, 41),
        seen(1, Phase.FORWARD, 41, condition="frozen", detail="its process 101 is stopped"),
    ]
    text, culprits = explain(ranks, "stacks")
    assert [culprit.beat.rank for culprit in culprits] == [1]
    assert (
        "rank 1 on node1 does not run any more: its process 101 is stopped; it was last seen in the forward pass"
        in text
    )


def test_equal_ranks_point_at_the_network() -> None:
    text, culprits = explain([seen(rank, Phase.REDUCE, microbatch=None) for rank in range(8)], "stacks")
    assert culprits == []
    assert "look at the network between their hosts" in text


def test_ranks_that_wait_for_each_other_point_at_the_network_between_their_hosts() -> None:
    ranks = [
        *(seen(rank, Phase.SEND_ACTIVATION) for rank in range(4)),
        *(seen(rank, Phase.RECEIVE_ACTIVATION) for rank in range(4, 8)),
    ]
    text, culprits = explain(ranks, "stacks")
    assert sorted(culprit.beat.rank for culprit in culprits) == list(range(8))
    assert text == (
        "no rank has made progress for 63 s; rank 0 on node1 (sending an activation, stage 0, step 12, micro-batch 3) "
        "and rank 4 on node2 (waiting for an activation, stage 1, step 12, micro-batch 3) wait for each other (and so "
        "do 3 more pairs of ranks there), so that what one sends does not reach the other: look at the network between "
        "node1 and node2. Python stacks of all ranks: stacks"
    )


def test_the_rank_that_has_not_finished_its_step_holds_up_those_that_sum() -> None:
    ranks = [seen(rank, Phase.UPDATE, microbatch=None) for rank in range(8) if rank != 6]
    text, culprits = explain([*ranks, seen(6, Phase.BACKWARD, 30)], "stacks")
    assert [culprit.beat.rank for culprit in culprits] == [6]
    assert "waits in the optimizer step for stage 1, whose rank 6 on node2 has stopped in the backward pass" in text


def test_a_lost_rank_is_described_with_what_its_host_knows() -> None:
    text = describe_lost(seen(5, Phase.BACKWARD, condition="gone"))
    assert text.startswith(
        "rank 5 on node2 is gone: its process 105 ended without a word, last seen in the backward pass (stage 1, "
    )
    assert "it was killed" in text
    told = describe_lost(seen(5, Phase.BACKWARD, condition="gone", detail="killed for lack of memory"))
    assert told.endswith("; killed for lack of memory")
    assert "the way to the shared folder is lost" in describe_lost(seen(5, Phase.SAVE, condition="frozen"))
