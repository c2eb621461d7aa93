"""What threads share: made once, complete, without waiting for what others make; and weights that stay on a device."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from making import write_collection
from test_ablation_experiment import run

from data import index_collection
from experiment import inputs, resident, store
from experiment.arrays import WEIGHTS
from experiment.engine import Engine
from experiment.extraction import extract
from experiment.flags import parse_arguments
from experiment.inputs import Source, StoredRows
from experiment.phases import Experiment, split_collection
from experiment.resident import Latest, Once, Raw
from experiment.settings import resolve
from training import stacks
from training.stacks import Stored, filled

CPU, SLOW = torch.device("cpu"), pytest.mark.slow


@pytest.fixture
def waits(monkeypatch):
    """The devices whose streams were waited for."""
    devices = []
    monkeypatch.setattr(resident, "wait_for_stream", devices.append)
    return devices


def test_a_value_is_made_once_for_all_threads_and_complete_before_they_get_it(waits):
    made, begin = [], threading.Barrier(8)

    def make():
        time.sleep(0.05)
        made.append(0)
        return torch.ones(3)

    once = Once(CPU)

    def get(_):
        begin.wait()
        value = once.get(make)
        return value, len(waits)

    with ThreadPoolExecutor(8) as threads:
        values = list(threads.map(get, range(8)))
    assert len(made) == 1 and waits == [CPU] and {seen for _, seen in values} == {1}
    assert len({id(value) for value, _ in values}) == 1 and once.nbytes == 12
    once.clear()
    assert once.nbytes == 0 and once.get(make) is not values[0][0] and len(made) == 2


def test_what_failed_is_tried_again_and_nothing_is_a_value_too():
    results = iter([MemoryError("no room"), None])

    def make():
        result = next(results)
        if result:
            raise result

    once = Once(CPU)
    with pytest.raises(MemoryError):
        once.get(make)
    assert once.get(make) is None and once.get(make) is None


def test_who_makes_a_value_holds_up_nobody_whose_value_is_there():
    latest, may_end = Latest(CPU, kept=3), threading.Event()
    latest.get("there", lambda: 1)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(latest.get, "slow", lambda: may_end.wait(10))
        assert latest.get("there", pytest.fail) == 1 and latest.get("other", lambda: 2) == 2
        assert not slow.done()
        may_end.set()
        assert slow.result() is True


def test_four_threads_on_four_values_make_each_once():
    latest, made = Latest(CPU, kept=5), []

    def work(key):
        for _ in range(50):
            assert latest.get(key, lambda: made.append(key) or key) == key

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, "abcd"))
    assert sorted(made) == list("abcd")


def test_the_latest_values_are_kept_up_to_a_number_and_up_to_their_bytes():
    made = []

    def ask(latest, keys):
        made.clear()
        for key in keys:
            latest.get(key, lambda key=key: made.append(key) or torch.zeros(10))
        return "".join(made)

    assert ask(Latest(CPU, kept=2), "ababcabb") == "abcab"  # c is asked for last but one: a goes, then b, then c
    assert ask(Latest(CPU, kept=1), "aabba") == "aba"
    assert ask(Latest(CPU, kept=9, memory=80), "abcabcc") == "abc"  # two beside the latest
    assert ask(Latest(CPU, kept=9, memory=79), "abcbca") == "abca"
    latest = Latest(CPU, kept=2)
    ask(latest, "ab")
    latest.clear()
    assert ask(latest, "ab") == "ab"


# -- raw weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Eleven rows in three shards, and the whole of them."""
    x = np.random.default_rng(0).standard_normal((11, 30), np.float32)
    digests = [
        [len(part), store.save_array(store.shard_path(tmp_path, first), part)]
        for first, part in ((0, x[:4]), (4, x[4:8]), (8, x[8:]))
    ]
    store.describe_shards(tmp_path, "a test", (np.dtype(np.float32), (30,)), digests)
    return partial(store.Shards, tmp_path, "a test"), x


READS = [
    (None, None),
    (np.array([3, 10, 3, 0]), None),
    (None, slice(5, 17)),
    (np.array([9, 2]), slice(0, 1)),
    (np.array([9, 2]), np.array([29, 0, 7])),
    (None, np.array([4, 5])),
    (np.array([], int), slice(3, 9)),
]


@pytest.mark.parametrize("share", [0.0, 1e-15, 1.0])
def test_weights_that_stay_are_those_that_are_stored(stored, share):
    opened, x = stored
    raw = Raw(opened, CPU, share)
    assert raw.shape == x.shape
    for rows, columns in READS:
        expected = x[slice(None) if rows is None else rows][:, slice(None) if columns is None else columns]
        np.testing.assert_array_equal(raw.read(rows, columns), expected)
    blocks = StoredRows(raw, np.array([8, 1, 5]), ((2, 9), (20, 30)))
    whole = x[[8, 1, 5]][:, [*range(2, 9), *range(20, 30)]]
    np.testing.assert_array_equal(torch.cat(list(blocks.split(4, dim=1)), 1), whole)
    np.testing.assert_array_equal(torch.cat(list(blocks.split(2))), whole)
    assert raw.read(columns=slice(3, 9)).is_contiguous() != (share == 1)  # a view of what stays


def test_weights_are_read_once_by_all_threads_until_they_are_released(stored, monkeypatch):
    opened, x = stored
    passes, blocks = [], store.Shards.blocks
    monkeypatch.setattr(store.Shards, "blocks", lambda shards: passes.append(0) or blocks(shards))
    monkeypatch.setattr(store.Shards, "read", lambda *_: pytest.fail("read from storage"))
    raw = Raw(opened, CPU, 1.0)
    with ThreadPoolExecutor(4) as threads:
        for part in threads.map(lambda i: raw.read(np.array([i]), slice(2, 8)), range(8)):
            assert part.shape == (1, 6)
    assert len(passes) == 1
    raw.forget()
    np.testing.assert_array_equal(raw.read(), x)
    assert len(passes) == 2


def test_weights_that_do_not_fit_after_all_stay_where_they_are(stored, monkeypatch):
    opened, x = stored

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(resident, "filled", full)
    np.testing.assert_array_equal(Raw(opened, CPU, 1.0).read(np.array([7])), x[[7]])


def test_a_cpu_reads_what_it_needs_and_a_gpu_keeps_at_most_a_quarter_of_its_memory():
    assert resident.RAW_SHARE == {"cpu": 0.0, "cuda": 0.25}


# -- inputs of several threads -----------------------------------------------------------------------------------------

SOURCES = [Source(name) for name in ("stats", "flat_vec", "coupling", "update_sketch")]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Inputs as the threads of a GPU share them, on a CPU."""
    monkeypatch.setattr(inputs, "KEPT_SOURCES", {"cpu": 5})
    collection = index_collection(write_collection(tmp_path / "small", classes=2, per_class=6))
    settings = resolve(parse_arguments(["--quick", "--device=cpu"]))
    kept, rows = np.ones(len(collection.layers), bool), split_collection(collection, settings.seed)
    extracted = extract(collection, ["stats", "coupling", "update_sketch", WEIGHTS], tmp_path, CPU)
    return Experiment(settings, collection, kept, rows, extracted, Engine([CPU]), lambda *_: None).inputs


def test_four_threads_at_work_on_four_representations_read_each_once(opened, monkeypatch):
    read, real = [], opened._read
    monkeypatch.setattr(opened, "_read", lambda source: read.append(source.name) or real(source))
    begin = threading.Barrier(4)

    def work(number):
        begin.wait()
        ours = [SOURCES[(number + i) % 4] for i in range(20)]
        return {source.name: id(opened.read(source)) for source in ours}

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(work, range(4))
    assert all(other == first for other in others)
    assert sorted(read) == sorted(source.name for source in SOURCES)
    opened.release()
    assert {source.name: id(opened.read(source)) for source in SOURCES}.keys() == first.keys() and len(read) == 8


def test_reading_a_source_holds_up_no_thread_whose_source_is_there(opened, monkeypatch):
    there, real, may_end = opened.read(SOURCES[0]), opened._read, threading.Event()
    monkeypatch.setattr(opened, "_read", lambda source: may_end.wait(10) and real(source))
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(opened.read, SOURCES[2])
        assert opened.read(SOURCES[0]) is there and not slow.done()
        may_end.set()
        assert slow.result().shape[1] == there.shape[1]


def test_inputs_that_nobody_needs_are_gone_at_once_with_all_that_they_have_read(opened, monkeypatch):
    monkeypatch.setitem(resident.RAW_SHARE, "cpu", 1.0)
    ours = inputs.Inputs(opened.description, CPU)
    read = [ours.read(source) for source in SOURCES]
    seen = [weakref.ref(part) for part in (ours, ours.raw, ours.modules, read[1], read[1].ready(), read[2].x)]
    gc.disable()
    try:
        del ours, read
        assert [reference() for reference in seen] == [None] * 6
    finally:
        gc.enable()


def test_stored_rows_are_complete_before_a_second_thread_gets_them(monkeypatch):
    """A source may be a tensor on the device, of which a minibatch is a part."""
    waits = []
    monkeypatch.setattr(stacks, "wait_for_stream", waits.append)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    held = Stored(lambda rows: x[rows], (20, 3), torch.arange(10), partial(filled, device=CPU))
    with ThreadPoolExecutor(4) as threads:
        ready = list(threads.map(lambda _: held.ready(), range(4)))
    assert waits == [CPU] and len({id(matrix) for matrix in ready}) == 1
    rows, streamed = torch.tensor([[3, 15]]), Stored(lambda rows: x[rows], (20, 3), torch.arange(10), None)
    assert streamed.ready() is None and streamed.ready() is None and waits == [CPU, CPU]
    assert torch.equal(held.rows(rows), streamed.rows(rows))


# -- the whole experiment ----------------------------------------------------------------------------------------------

KEYS = ("layer_ranking", "baseline_results", "ablation_results")
OF_WEIGHTS = "flat_vec,pca,vae,update_kernel"


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-runs=1", "--layers=1", f"--representations={OF_WEIGHTS}"),
        pytest.param((f"--representations={OF_WEIGHTS},update_views,update_learned,update_attention",), marks=SLOW),
    ],
)
def test_an_experiment_on_weights_that_stay_has_the_same_numbers(one_core, tmp_path, monkeypatch, flags):
    root = write_collection(tmp_path / "small", classes=2, per_class=6, modules=3)
    flags, held = ("--top-k=1", "--quick", *flags), []
    expected = run(tmp_path, root, *flags, out="stored")
    monkeypatch.setitem(resident.RAW_SHARE, "cpu", 1.0)
    monkeypatch.setattr(resident, "filled", lambda *args: held.append(0) or filled(*args))
    results = run(tmp_path, root, *flags, out="held")
    assert held == [0] and all(results[key] == expected[key] for key in KEYS)
