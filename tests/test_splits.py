import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.splits import SHARES, split_rows

SIZES = st.one_of(
    st.lists(st.integers(3, 60), min_size=1, max_size=30),
    st.lists(st.sampled_from([3, 4, 5, 1000]), min_size=2, max_size=40),
)


@settings(deadline=None, max_examples=75)
@given(sizes=SIZES, seed=st.integers(0, 2**32), shuffled=st.randoms(use_true_random=False))
def test_split_has_its_sizes_and_every_class(sizes, seed, shuffled):
    y = np.repeat(np.arange(len(sizes)), sizes).tolist()
    shuffled.shuffle(y)
    y = np.array(y)
    rows = split_rows(y, seed)
    assert list(rows) == ["train", "validation", "test"]
    assert len(rows["validation"]) == max(round(0.1 * len(y)), len(sizes))
    assert len(rows["test"]) == max(round(0.2 * len(y)), len(sizes))
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(y)))
    for part in rows.values():
        assert (np.diff(part) > 0).all()
        assert (np.bincount(y[part], minlength=len(sizes)) >= 1).all()


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(20, 400), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_split_is_proportional_to_the_nearest_row(sizes, seed):
    y = np.repeat(np.arange(len(sizes)), sizes)
    rows = split_rows(y, seed)
    for part in ("validation", "test"):
        share = len(rows[part]) / len(y) * np.array(sizes)
        assert (np.abs(np.bincount(y[rows[part]]) - share) <= 1).all()


def test_split_is_fixed_by_the_seed():
    y = np.arange(300) % 3
    first, again, other = split_rows(y, 1), split_rows(y.copy(), 1), split_rows(y, 2)
    for part in first:
        np.testing.assert_array_equal(first[part], again[part])
        assert set(first[part]) != set(other[part])


def test_split_of_a_thousand_is_exact():
    y = np.arange(1000) % 10
    rows = split_rows(y, 42)
    assert {part: np.bincount(y[part_rows]).tolist() for part, part_rows in rows.items()} == {
        "train": [70] * 10,
        "validation": [10] * 10,
        "test": [20] * 10,
    }


def check_group_split(y, groups, rows):
    """Groups are apart, classes everywhere, every row in one part."""
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(y)))
    sides = [set(groups[part]) for part in rows.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))
    for part in rows.values():
        assert (np.bincount(y[part], minlength=y.max() + 1) >= 1).all() and (np.diff(part) > 0).all()


@settings(deadline=None, max_examples=8)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=14), min_size=2, max_size=7),
    seed=st.integers(0, 2**32),
)
def test_groups_of_one_class_are_kept_apart_wherever_each_class_has_three(sizes, seed):
    y = np.concatenate([np.full(sum(class_sizes), c) for c, class_sizes in enumerate(sizes)])
    every = [size for class_sizes in sizes for size in class_sizes]
    groups = np.repeat(np.arange(len(every)), every)
    check_group_split(y, groups, split_rows(y, seed, groups))


def test_groups_of_many_classes_give_the_shares():
    generator = np.random.default_rng(0)
    y, groups = generator.integers(0, 5, 1000), generator.integers(0, 60, 1000)
    rows = split_rows(y, 0, groups)
    check_group_split(y, groups, rows)
    for name, share in SHARES.items():
        np.testing.assert_allclose(np.bincount(y[rows[name]]) / np.bincount(y), share, atol=0.06)


def test_a_split_by_groups_is_fixed_by_labels_groups_and_seed():
    y = np.arange(600) % 3
    groups = np.arange(600) // 10
    first, again, other = (split_rows(y, seed, groups.copy()) for seed in (1, 1, 2))
    for part in first:
        np.testing.assert_array_equal(first[part], again[part])
        assert set(first[part]) != set(other[part])
    few = np.arange(600) // 60  # ten groups: all ways are tried, and which one of equals is taken is drawn
    assert len({tuple(split_rows(y, seed, few)["test"]) for seed in range(9)}) > 3
    assert [len(rows) for rows in split_rows(y, 0, few).values()] == [420, 60, 120]


def test_groups_of_one_are_no_groups():
    y = np.arange(300) % 3
    plain, grouped = split_rows(y, 1), split_rows(y, 1, np.arange(300)[::-1])
    for part in plain:
        np.testing.assert_array_equal(plain[part], grouped[part])


def test_the_only_split_that_there_is_is_found():
    """Groups A: both classes, B: the first, C: the second, D: both. B and C are one part, or none has both classes."""
    y, groups = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3])
    rows = split_rows(y, 0, groups)
    check_group_split(y, groups, rows)
    assert {4, 5, 6, 7} in [set(part) for part in rows.values()]
