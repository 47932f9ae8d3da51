"""What ranks tell each other between steps: the right answers, in as few messages as can be."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pipeline.agreement import Agreement, partners


@pytest.mark.parametrize("ranks", [*range(1, 35), 64, 100, 257])
def test_after_log2_rounds_every_rank_has_heard_of_all(ranks):
    knows = [{rank} for rank in range(ranks)]
    rounds = [partners(rank, ranks) for rank in range(ranks)]
    assert {len(ways) for ways in rounds} == {(ranks - 1).bit_length()}
    for number in range(len(rounds[0])):
        for rank, ways in enumerate(rounds):
            assert rounds[ways[number][0]][number][1] == rank  # to whom it sends, hears from it
        knows = [knows[rank] | knows[ways[number][1]] for rank, ways in enumerate(rounds)]
    assert all(heard == set(range(ranks)) for heard in knows)


def tell(rounds):
    """Runs on every rank: (answers, messages that this rank sent, rank)."""
    agreement, sent, send = Agreement(), [], dist.isend
    dist.isend = lambda *arguments, **options: sent.append(options["group_dst"]) or send(*arguments, **options)
    try:
        answers = [agreement.highest(agreement.rank * number, -agreement.rank, 1 << 40) for number in range(rounds)]
    finally:
        dist.isend = send
    return answers, len(sent), agreement.gather(agreement.rank), agreement.of_first(agreement.rank + 7)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_highest_takes_log2_messages(ranks, size):
    for answers, sent, gathered, first in ranks(size).run(tell, 50):
        assert answers == [[(size - 1) * number, 0, 1 << 40] for number in range(50)]
        assert sent == 50 * (size - 1).bit_length()
        assert gathered == list(range(size)) and first == 7


def test_a_single_rank_sends_nothing():
    alone = Agreement()
    assert alone.is_alone and alone.highest(3, 1) == [3, 1] and alone.gather("a") == ["a"] and alone.of_first(2) == 2
