"""Progress of a run of several phases: one bar's share of it all, and plain lines where there is no terminal."""

import pytest

from edge_moe import progress
from edge_moe.progress import Phases, phases

NAMES = ("read text", "measure", "choose widths", "round", "certify")


@pytest.fixture
def clock(monkeypatch):
    """A list whose one element is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_share_of_all_work_grows_from_none_to_all():
    seen = []
    shown = Phases(lambda now: seen.append((now.title, now.count, now.share)))
    for name in NAMES:
        shown.begin(name, NAMES)
        for done in range(3):
            shown.progress(name, done, 2)
    shares = [share for _, _, share in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert seen[5][:2] == ("2 of 5 measure experts", "0/2")


def test_steps_of_another_phase_do_not_move_it():
    seen = []
    shown = Phases(lambda now: seen.append(now.share))
    shown.progress("measure", 1, 2)
    shown.begin("choose widths", NAMES)
    shown.progress("measure", 1, 2)
    assert len(seen) == 1
    shown.progress("adjust top_k", 1, 2)
    assert len(seen) == 2 and seen[1] > seen[0]


def test_without_a_terminal_there_is_a_line_for_each_phase_and_one_a_minute(clock, capsys):
    with phases() as shown:
        shown.begin("read text", NAMES)
        clock[0] += 5
        shown.begin("measure", NAMES)
        for done in range(1, 131):
            clock[0] += 1
            shown.progress("measure", done, 1000)
        shown.begin("choose widths", NAMES)
    assert capsys.readouterr().err.splitlines() == [
        "0:00:05 phase 2 of 5 measure experts",
        "0:01:05 phase 2 of 5 measure experts 60/1,000",
        "0:02:05 phase 2 of 5 measure experts 120/1,000",
        "0:02:15 phase 3 of 5 choose widths",
    ]


def test_when_it_is_to_be_quiet_nothing_is_printed(capsys):
    with phases(quiet=True) as shown:
        shown.begin("measure", NAMES)
    assert capsys.readouterr() == ("", "")
