"""What is said of the signs of life of many ranks."""

from __future__ import annotations

from megatron_nucleus.training.watchdog.roll_call import (
    DONE,
    ENDED,
    RUNNING,
    Beat,
    Sighting,
    find_missing,
    find_silent,
    rank_list,
)


def seen(silent_s: float = 0.0, **changes) -> Sighting:
    beat = Beat(1, 12, 3, "backward", 40.0, 60.0, "in all_reduce (core/x.py:8)", True, RUNNING)
    return Sighting(beat._replace(**changes), silent_s)


def test_beats_and_findings_survive_the_store():
    beat = seen().beat
    assert Beat.from_text(beat.to_text().encode()) == beat
    finding = find_missing(3, {0: seen(), 2: seen()}, 1.0)
    assert finding == ((1,), "rank 1 never gave a sign of life")
    assert type(finding).from_text(finding.to_text()) == finding


def test_silent_ranks_of_one_place_share_a_clause_and_neighbours_in_time_are_named_along():
    ranks = {
        0: seen(),
        1: seen(16.0),
        2: seen(14.0),
        3: seen(16.0, phase="forward", place=""),
        4: seen(99.0, state=DONE),
    }
    assert find_silent(ranks, 17.0, 4.0) is None
    finding = find_silent(ranks, 15.0, 4.0)
    assert finding.ranks == (1, 2, 3)
    assert finding.text == (
        "ranks 1-2 are dead or frozen: last sign of life 16 s ago, in step 12, backward, in all_reduce (core/x.py:8); "
        "rank 3 is dead or frozen: last sign of life 16 s ago, in step 12, forward"
    )


def test_who_is_missing():
    at = {"place": "at data/loader.py:31 in __next__", "waits": False}
    slow = seen(index=2, phase="waiting for data", seconds=61.0, **at)
    waiting = "ranks 0-1 wait in step 12, backward, in all_reduce (core/x.py:8)"
    behind = find_missing(3, {0: seen(), 1: seen(), 2: slow}, 6.0)
    assert behind.ranks == (2,)
    assert behind.text == (
        "rank 2 has not arrived: alive, for 61 s in step 12, waiting for data, at data/loader.py:31 in __next__; "
        + waiting
    )
    elsewhere = find_missing(3, {0: seen(), 1: seen(), 2: seen(**at)}, 6.0)
    assert elsewhere.text.startswith(
        "rank 2 has not arrived: alive, for 40 s in step 12, backward, at data/loader.py"
    )
    gone = find_missing(3, {0: seen(), 1: seen(7.0), 2: seen(state=ENDED)}, 6.0)
    assert gone.ranks == (1, 2)
    assert gone.text.startswith("rank 1 gave no sign of life for 7 s, the last in step 12")
    assert gone.text.endswith("rank 2 ended with an error in step 12, backward, in all_reduce (core/x.py:8)")
    mixed = find_missing(2, {0: seen(), 1: seen(place="in broadcast (core/y.py:9)")}, 6.0)
    assert mixed.ranks == ()
    assert "rank 0 waits in step 12, backward, in all_reduce" in mixed.text
    assert "rank 1 waits in step 12, backward, in broadcast" in mixed.text


def test_a_message_about_thousands_of_ranks_stays_a_line():
    ranks = {rank: seen(index=rank % 7) for rank in range(4096)}
    finding = find_missing(4096, {0: seen(index=9), **{r: s for r, s in ranks.items() if r}}, 6.0)
    assert len(finding.ranks) == 4095
    assert "; 1755 more ranks elsewhere; rank 0 waits" in finding.text
    assert rank_list([5, 0, 1, 2, 9, 10]) == "ranks 0-2,5,9-10"
