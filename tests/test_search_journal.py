"""The journal of a search: nothing that was finished is lost, and half a line is no trial."""

import errno
import json
import os
from pathlib import Path

import pytest

from fxcompress import CheckpointError, Proposal, Trial
from fxcompress.search.journal import Journal


def trial(number: int, score: float | None = 0.1) -> Trial:
    proposal = Proposal((3, number + 1), cost={"macs": 1 / 3}, notes={"temperature": 0.7})
    if score is None:
        return Trial(number, proposal, "failed", None, 0.5, "ValueError: no")
    return Trial(number, proposal, "done", score + number, 0.25)


def written(path: Path, count: int = 3) -> list[Trial]:
    journal = Journal(path, "this")
    trials = [trial(number, None if number == 1 else 0.1) for number in range(count)]
    for each in trials:
        journal.append(each)
    return trials


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    trials = written(tmp_path / "j")
    assert list(Journal(tmp_path / "j", "this").trials.values()) == trials
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert [line["trial"]["number"] for line in lines[1:]] == [0, 1, 2]


def test_another_searchs_journal_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "j")
    with pytest.raises(CheckpointError, match="journal of another search"):
        Journal(tmp_path / "j", "that")


def test_every_cut_loses_the_last_line_alone(tmp_path: Path) -> None:
    """A process is killed at any byte of its last line."""
    trials, path = written(tmp_path / "j"), tmp_path / "j"
    content = path.read_bytes()
    start = content.rstrip().rfind(b"\n") + 1
    for length in range(start, len(content)):
        path.write_bytes(content[:length])
        journal = Journal(path, "this")
        assert list(journal.trials.values()) == trials[:2]
        assert journal.recovered == length - start
        journal.append(trials[2])
        assert path.read_bytes() == content


def test_a_flipped_bit_in_the_last_line_is_recovered_from(tmp_path: Path) -> None:
    trials, path = written(tmp_path / "j"), tmp_path / "j"
    content = bytearray(path.read_bytes())
    place = content.rfind(b'"score": 2.1')
    content[place + 9 : place + 12] = b"9.1"
    path.write_bytes(content)
    assert list(Journal(path, "this").trials.values()) == trials[:2]


def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    written(tmp_path / "j")
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    with pytest.raises(CheckpointError, match="damaged in line 2 of 4"):
        Journal(tmp_path / "j", "this")


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("one\ntwo\n")
    with pytest.raises(CheckpointError, match="no journal of trials"):
        Journal(tmp_path / "j", "this")
    assert (tmp_path / "j").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("text", ["a line of notes, and no more", '{"journ', '{"notes": 1}'])
def test_a_single_line_is_overwritten_only_if_it_is_the_beginning_of_a_journal(text: str, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text(text)
    if '{"journal": 1'.startswith(text):
        Journal(path, "this").append(trial(0))
        assert list(Journal(path, "this").trials.values()) == [trial(0)]
        return
    with pytest.raises(CheckpointError, match="no journal of trials"):
        Journal(path, "this")
    assert path.read_text() == text


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, path = written(tmp_path / "j"), tmp_path / "j"
    content, real, room = path.read_bytes(), os.write, [20]

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, bytes(data)[: room[0]])
        room[0] -= done
        return done

    journal = Journal(path, "this")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(CheckpointError, match=r"No space left on device.*3 finished trials are kept"):
            journal.append(trial(3))
    assert path.read_bytes() == content
    journal.append(trial(3))
    assert list(Journal(path, "this").trials.values()) == [*trials, trial(3)]


def test_the_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Journal(tmp_path / "none" / "j", "this")
