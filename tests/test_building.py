"""Whole files, locks, a collection in the making and its progress."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loras import building

ROOT = Path(building.__file__).parent.parent


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(number):
    with pytest.raises(ValueError, match="JSON"):
        building.canonical_json({"a": [number]})


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, step):
    path = tmp_path / "x.json"
    building.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        building.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_obeys_the_umask(tmp_path):
    path = tmp_path / "x.json"
    building.write_atomically(path, b"old")
    before = os.umask(0o027)
    try:
        building.write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_order_and_letters():
    assert building.canonical_json({"ü": 1, "a": [0.1]}) == '{"ü": 1, "a": [0.1]}\n'.encode()


def test_an_object_is_read_and_an_absent_file_or_another_value_is_none(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert building.read_object(path) == {"a": 1}
    for contents in (b"[1]", b'{"a": ', b"\xff"):
        path.write_bytes(contents)
        assert building.read_object(path) is None
    assert building.read_object(tmp_path / "absent.json") is None
    assert building.read_object(path / "below-a-file.json") is None


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(IsADirectoryError) as fault:
        building.read_object(tmp_path)
    assert fault.value.filename == str(tmp_path)
    path = tmp_path / "x.json"
    path.symlink_to("/proc/self/mem")  # its first page cannot be read: the system's error names no file
    with pytest.raises(OSError) as fault:
        building.read_object(path)
    assert (fault.value.errno, fault.value.filename) == (errno.EIO, str(path))


def test_one_holds_a_lock_at_a_time_and_its_end_frees_it(tmp_path):
    path = tmp_path / "deep" / "x.lock"
    with building.locked(path):
        with pytest.raises(building.LockedError, match=f"process {os.getpid()} on .*, since 20"), building.locked(path):
            pass
        child = "import sys; from loras import building; building.locked(building.Path(sys.argv[1])).__enter__()"
        refused = subprocess.run([sys.executable, "-c", child, path], capture_output=True, text=True, cwd=ROOT)
        assert "LockedError" in refused.stderr
    assert list(tmp_path.iterdir()) == []  # nor are folders left that were made for it
    killed = (
        "import os, sys; from loras import building; "
        "held = building.locked(building.Path(sys.argv[1])); held.__enter__(); os.abort()"
    )
    assert subprocess.run([sys.executable, "-c", killed, path], cwd=ROOT).returncode < 0
    assert path.exists()
    with building.locked(path):
        pass
    assert not path.exists()


def test_a_lock_follows_no_link_and_waits_for_no_pipe(tmp_path):
    """The file that a link leads to would be emptied, and a pipe never be opened."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    link, dangling, pipe = (tmp_path / f"{name}.lock" for name in ("link", "dangling", "pipe"))
    link.symlink_to(precious)
    dangling.symlink_to(tmp_path / "new")
    os.mkfifo(pipe)
    for path, words in ((link, "a link in"), (dangling, "a link in"), (pipe, "a pipe or a device in")):
        with pytest.raises(OSError) as error, building.locked(path):
            pass
        assert building.fault_of(error.value) == f"{path}: {words} the place of a lock file; remove it"
        assert os.path.lexists(path)
    assert precious.read_text() == "kept" and not (tmp_path / "new").exists()


def test_a_file_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "x.json").symlink_to(precious)
    building.write_atomically(tmp_path / "x.json", b"new")
    assert precious.read_text() == "kept" and not (tmp_path / "x.json").is_symlink()


def test_a_forked_process_has_no_share_in_a_lock(tmp_path):
    path, asleep, (reading, writing) = tmp_path / "lock", None, os.pipe()
    try:
        with building.locked(path):
            asleep = os.fork()
            if asleep == 0:
                os.write(writing, b"!")
                time.sleep(60)
                os._exit(0)
            assert os.read(reading, 1) == b"!"
            descriptor = os.open(path, os.O_RDWR)
        # Its holder removed the file at the end; nobody holds what was open.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        if asleep is not None:
            os.kill(asleep, 9)
            os.waitpid(asleep, 0)


def test_a_process_that_waits_for_a_lock_gets_its_holder(tmp_path):
    path, holders, order = tmp_path / "x.lock", [], []

    def second():
        with building.locked(path, holders.append):
            order.append("second")

    with building.locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        while not holders:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and str(os.getpid()) in holders[0] and not path.exists()


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with building.locked(tmp_path / "x.lock"):
        assert (tmp_path / "x.lock").exists()


def test_only_old_temporary_files_are_cleared_away(tmp_path):
    old, new, kept = tmp_path / "a" / ".unit.npz.12345678", tmp_path / ".unit.npz.abcdef01", tmp_path / "a" / "unit.npz"
    old.parent.mkdir()
    for path in (old, new, kept):
        path.write_text("x")
    for path in (old, kept):
        os.utime(path, (0, 0))
    building.remove_temporaries(tmp_path)
    assert not old.exists() and new.exists() and kept.exists()


class Killed(BaseException):
    """Stands for Ctrl-C."""


def build(out: Path, rows: range, owner: bytes = b"me") -> None:
    """Write the files of some rows and a record of whose they are; fail where a row is missing from the range."""

    def check(folder: Path) -> None:
        if (folder / "record").read_bytes() != owner:
            raise FileExistsError(f"{folder}: another collection. Remove it.")

    with building.partial_folder(out, check) as partial:
        building.write_atomically(partial / "record", owner)
        for row in rows:
            building.write_lora(partial / str(row), b"{}", b"weights")
        if len(rows) < 3:
            raise Killed


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_collection_in_the_making_is_continued_and_renamed_when_whole(tmp_path):
    out = tmp_path / "made" / "here" / "zoo"
    with pytest.raises(Killed):
        build(out, range(1))
    partial = out.with_name("zoo.partial")
    kept = (partial / "0" / building.WEIGHTS_NAME).stat().st_ino
    (partial / "0" / f".{building.WEIGHTS_NAME}.0123abcd").write_bytes(b"cut short")
    (partial / ".record.89abcdef").write_bytes(b"cut short")
    with pytest.raises(Killed):
        build(out, range(1, 2))
    assert not out.exists() and (partial / "0" / building.WEIGHTS_NAME).stat().st_ino == kept
    build(out, range(1, 4))
    assert sorted(path.name for path in out.parent.iterdir()) == ["zoo"]
    loras = [f"{row}/{name}" for row in range(4) for name in (building.METADATA_NAME, building.WEIGHTS_NAME)]
    assert names_below(out) == [*loras, "record"]


def test_a_build_that_fails_before_any_lora_leaves_nothing(tmp_path):
    with pytest.raises(Killed):
        build(tmp_path / "made" / "here" / "zoo", range(0))
    assert list(tmp_path.iterdir()) == []


def test_a_partial_folder_of_another_build_is_left_as_it_is(tmp_path):
    partial = tmp_path / "zoo.partial"
    partial.mkdir()
    for name in ("record", ".thesis.txt.01234567"):  # as a temporary file is called
        (partial / name).write_bytes(b"you")
    with pytest.raises(FileExistsError, match="another collection"):
        build(tmp_path / "zoo", range(3))
    assert names_below(tmp_path) == ["zoo.partial/.thesis.txt.01234567", "zoo.partial/record"]


def test_two_builds_never_work_in_one_folder(tmp_path):
    out = tmp_path / "zoo"
    with building.partial_folder(out, None):
        words = rf"zoo\.partial: process {os.getpid()} on .* is at work there\. Wait for it, or end it\."
        with pytest.raises(building.LockedError, match=words):
            build(out, range(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


@pytest.mark.parametrize("contents", ["a folder", "a file", "a link to nowhere"])
def test_what_another_process_has_finished_meanwhile_is_left_alone(tmp_path, contents):
    out = tmp_path / "zoo"
    if contents == "a folder":
        build(out, range(3))
    elif contents == "a file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = names_below(tmp_path)
    with building.partial_folder(out, None) as partial:
        assert partial is None
    assert names_below(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set; its progress writes to standard output, as into a log file."""
    now = [0.0]
    monkeypatch.setattr(building.time, "monotonic", lambda: now[0])
    return now


def lines_of(clock, capsys, calls) -> list[str]:
    """Return what a progress prints of calls, each after the moment at which it is made."""
    progress = building.Progress()
    for clock[0], *call in calls:
        progress(*call)
    return capsys.readouterr().out.splitlines()


def test_progress_in_a_log_is_a_line_after_some_seconds_then_one_a_minute(clock, capsys):
    calls = [(float(second), "ranking", second, 640) for second in range(1, 640)]
    lines = lines_of(clock, capsys, calls)
    assert lines[0] == "  ranking: 12 of 640, about 10 min left"
    assert [line.split()[1] for line in lines] == [str(12 + 61 * n) for n in range(11)]
    assert lines[-1] == "  ranking: 622 of 640, about 20 s left"


def test_the_time_left_is_counted_from_what_this_run_did(clock, capsys):
    found = [(0.0, "phase 2", done, 100) for done in range(1, 81)]  # of an earlier run, reported at once
    assert lines_of(clock, capsys, [*found, (61.0, "phase 2", 90, 100)]) == ["  phase 2: 90 of 100, about 60 s left"]


def test_the_time_left_goes_by_the_share_of_the_work_where_steps_differ(clock, capsys):
    calls = [(0.0, "phase 2", 0, 100, 0.0), (90.0, "phase 2", 3, 100, 0.5), (180.0, "phase 2", 50, 100, 0.9)]
    assert lines_of(clock, capsys, calls) == [
        "  phase 2: 3 of 100, about 2 min left",
        "  phase 2: 50 of 100, about 20 s left",
    ]


def test_progress_of_a_stage_that_nobody_knows_the_end_of_is_a_number(clock, capsys):
    assert lines_of(clock, capsys, [(0.0, "import", 3, None), (70.0, "import", 7, None)]) == ["  import: 7"]


def test_a_stage_that_ends_begins_anew_with_the_next_of_its_name(clock, capsys):
    calls = [(t, "phase 2", done, 2) for t, done in ((0.0, 1), (20.0, 2), (100.0, 0), (108.0, 1), (119.0, 1))]
    assert lines_of(clock, capsys, calls) == ["  phase 2: 1 of 2, about 20 s left"]


def test_the_end_of_a_stage_whose_length_nobody_knew(clock, capsys):
    calls = [(0.0, "import", 1, None), (60.0, "import", 2, None), (61.0, "import", 3, 3), (90.0, "import", 4, None)]
    assert lines_of(clock, capsys, calls) == ["  import: 2"]


def test_what_is_said_has_no_control_character(capsys):
    building.say("a folder: \x1b[31m\nand \u202e")
    assert capsys.readouterr().out == "a folder: \\x1b[31m\nand \\u202e\n"


def test_progress_on_a_terminal_is_a_bar_with_the_time_left_and_lines_go_above_it(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = building.Progress()
    assert list(progress.track("abc", "stage")) == ["a", "b", "c"]
    assert "stage:   0%" in capsys.readouterr().err
    for clock[0], done in ((0.0, 1), (100.0, 2)):
        progress("later", done, 4)
    building.say("a row")
    progress("next", 1, 3)  # whatever was before has failed
    shown = capsys.readouterr()
    assert "later:  50%" in shown.err and "2/4, about 3 min left" in shown.err and shown.out == "a row\n"
    assert "next:   0%" in shown.err  # tqdm draws at most ten times a second
    progress("next", 3, 3)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "under 1 s"),
        (1, "about 1 s"),
        (17, "about 20 s"),
        (44, "about 40 s"),
        (86, "about 1 min"),
        (5400, "about 1.5 h"),
    ],
)
def test_times_are_said_as_people_do(seconds, words):
    assert building.duration(seconds) == words
