"""Copies and epochs: files of one collection that hold the same LoRA, or the same training at several moments.

Such files on both sides of a split let a classifier recognise a LoRA that it has seen. Copies are found by contents:
the same bytes, or the same weights in another order of keys, under other keys, in another type, or up to rounding.
Epochs are found by name, or by the session that the trainer wrote into the header.

Shape letters: N LoRAs, L layers, W weights of a LoRA.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from loras.lora_files import Layer, Layout
from loras.notices import Finding, Notice

EQUAL = 1e-4  # norm of the difference of two matrices of one type over their norm, up to which they are equal
SEVERAL_ROUNDINGS = 0.1  # of the numbers of a matrix may be rounded otherwise, where another type came between
# Of each type, the spacing of its numbers, relative and next to zero; float64 is read as float32.
SPACINGS = {
    "F64": (2.0**-23, 0.0),
    "F32": (2.0**-23, 0.0),
    "F16": (2.0**-10, 2.0**-24),
    "BF16": (2.0**-7, 0.0),
    "F8_E4M3": (2.0**-3, 2.0**-9),
    "F8_E5M2": (2.0**-2, 2.0**-16),
}
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
DIRECTIONS = 12  # in which sizes of layers are compared
NEIGHBOURS = 6  # nearest files that each is compared with, itself among them
SUMS = 16  # of weights, by which files are told apart before they are compared
SUMS_DISTANCE = 1e-3  # by which these may differ at least
ROWS_AT_ONCE = 10_000


def joined(count: int, groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the groups of rows that remain when those with a row in common are one, each of two rows or more, sorted.

    Example:
        >>> joined(6, [[4, 1], [0, 2], [5, 4]])
        [[0, 2], [1, 4, 5]]
    """
    edges = np.array([(group[0], row) for group in groups for row in group[1:]], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    members = defaultdict(list)
    for row, component in enumerate(connected_components(graph, directed=False)[1].tolist()):
        members[component].append(row)
    return sorted(rows for rows in members.values() if len(rows) > 1)


def common_names(names: Sequence[str], groups: Iterable[Sequence[int]]) -> list[str]:
    """Return names of which those in a group of rows are one: the first of them."""
    common = list(names)
    for rows in joined(len(names), groups):
        name = min(names[row] for row in rows)
        for row in rows:
            common[row] = name
    return common


# ----------------------------------------------------------------------------------------------------------------------
# Copies
# ----------------------------------------------------------------------------------------------------------------------


def find_copies(
    digests: Sequence[Hashable], sizes: np.ndarray, layouts: Sequence[Layout], read: Callable[[int], np.ndarray]
) -> list[list[int]]:
    """Return the groups of files that hold the same weights; scales may differ.

    Equal are matrices that differ by at most ``EQUAL`` of their norm, and those of which one is the other, rounded to a
    coarser type. Files whose sizes have no like are never read, nor are those of equal bytes; of the others each is
    read once, and again beside those few whose sums are nearly its own. So the work grows with the number of files, not
    of pairs of files.

    Args:
        digests: Of the bytes of each file.
        sizes: Root mean square of the weights of each layer, float[N, L].
        layouts: Of each file.
        read: Returns the flattened weights of a file, float32[W].

    Returns:
        Rows of the files of each group, sorted, the groups too.
    """
    first_row: dict[Hashable, int] = {}
    for row, digest in enumerate(digests):
        first_row.setdefault(digest, row)
    groups = [[first_row[digest], row] for row, digest in enumerate(digests) if first_row[digest] != row]
    rows = np.array(sorted(first_row.values()))
    distinct = {id(layout): layout for layout in layouts}.values()
    coarsest, tolerance = _tolerance({layer.dtype for layout in distinct for layer in layout.layers})
    suspects = rows[_has_like(sizes[rows], tolerance)]
    sums = np.array([_sums(read(row), layouts[row]) for row in suspects.tolist()]).reshape(-1, SUMS)
    compared: set[tuple[int, int]] = set()
    pairs = _of_equal_sums(suspects, sums) or _near(suspects, sums, max(SUMS_DISTANCE, coarsest))
    while pairs:  # until those that are left, one of each group, have no more copies among them
        compared.update(pairs)
        equal = _equal_pairs(pairs, layouts, read)
        groups += equal
        again = [row for group in joined(len(digests), equal) for row in group[1:]]
        left = ~np.isin(suspects, again)
        suspects, sums = suspects[left], sums[left]
        pairs = [pair for pair in _near(suspects, sums, max(SUMS_DISTANCE, coarsest)) if pair not in compared]
    return joined(len(digests), groups)


def _tolerance(types: set[str]) -> tuple[float, float]:
    """Return the spacing of the coarsest type, and by how much logarithms of sizes of copies may differ.

    Of 8 bits so little may be left that sizes say nothing: then infinity.
    """
    spacings = {SPACINGS[name][0] for name in types}
    if len(spacings) == 1:
        return 0.0, EQUAL  # norms differ by no more than the norm of the difference
    coarsest = max(spacings)
    return coarsest, 2 * coarsest if coarsest <= SPACINGS["BF16"][0] else np.inf


def _has_like(sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """Return which files have layers of the same sizes as those of another file, bool[N]."""
    count, layers = sizes.shape
    if count < 2 or np.isinf(tolerance):
        return np.full(count, count > 1)
    logarithms = np.log(sizes + 1e-7)  # float16 has nothing below that
    directions = np.random.default_rng(0).standard_normal((layers, min(layers, DIRECTIONS))) / np.sqrt(layers)
    places, first, position, counts = np.unique(
        logarithms @ directions, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    alike = (counts > 1)[position.ravel()]
    logarithms, count = logarithms[first], len(first)  # thousands of equal places would make the search quadratic
    near = cKDTree(places).query(
        places, range(1, 1 + min(NEIGHBOURS, count)), p=np.inf, distance_upper_bound=6 * tolerance
    )[1]
    for neighbours in near.T:
        rows = np.flatnonzero((neighbours < count) & (neighbours != np.arange(count)))
        for part in np.array_split(rows, 1 + len(rows) // ROWS_AT_ONCE):
            same = np.abs(logarithms[part] - logarithms[neighbours[part]]).max(1) <= tolerance
            alike[first[part[same]]] = True
            alike[first[neighbours[part[same]]]] = True
    return alike


def _sums(weights: np.ndarray, layout: Layout) -> np.ndarray:
    """Return sums of every 16th weight, float64[16]: unlike files differ in them.

    Each layer is divided by its norm: a barely trained factor, which weighs nothing, may be all that differs.
    """
    sums = np.zeros(SUMS)
    for columns in layout.columns:
        layer = weights[columns].astype(np.float64)
        folded = np.pad(layer, (0, -len(layer) % SUMS)).reshape(-1, SUMS).sum(0)
        sums += folded / (np.linalg.norm(layer) or 1.0)
    return sums / np.sqrt(len(layout.columns))


def _of_equal_sums(rows: np.ndarray, sums: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of rows of the very same sums, each row with the first; headers alone may differ in thousands."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(values.tobytes(), row), row) for row, values in zip(rows.tolist(), sums, strict=True)]
    return [(earlier, row) for earlier, row in pairs if earlier != row]


def _near(rows: np.ndarray, sums: np.ndarray, distance: float) -> list[tuple[int, int]]:
    """Return the pairs of rows whose sums are nearly the same, of each row with its nearest ones, sorted."""
    if len(rows) < 2:
        return []
    near = cKDTree(sums).query(sums, min(NEIGHBOURS, len(rows)), p=np.inf, distance_upper_bound=distance)[1]
    pairs = {(min(i, j), max(i, j)) for i, close in enumerate(near.tolist()) for j in close if j < len(rows) and i != j}
    return sorted((int(rows[i]), int(rows[j])) for i, j in pairs)


def _equal_pairs(
    pairs: list[tuple[int, int]], layouts: Sequence[Layout], read: Callable[[int], np.ndarray]
) -> list[list[int]]:
    """Return the pairs of files that hold the same weights."""
    equal, first, weights = [], -1, np.empty(0)
    for i, j in pairs:
        if [layer.shape for layer in layouts[i].layers] != [layer.shape for layer in layouts[j].layers]:
            continue
        if i != first:
            first, weights = i, read(i)
        places = zip(layouts[i].layers, layouts[j].layers, layouts[i].columns, strict=True)
        other = read(j)
        if all(_same(weights[columns], other[columns], layer, like) for layer, like, columns in places):
            equal.append([i, j])
    return equal


def _same(x: np.ndarray, y: np.ndarray, x_layer: Layer, y_layer: Layer) -> bool:
    """Return whether two matrices are one, or one is the other in a coarser type."""
    coarse = max(x_layer.dtype, y_layer.dtype, key=lambda name: SPACINGS[name])
    if SPACINGS[x_layer.dtype] == SPACINGS[y_layer.dtype]:
        x, y = x.astype(np.float64), y.astype(np.float64)
        return bool(np.linalg.norm(x - y) <= EQUAL * np.linalg.norm(x))
    x, y = _rounded(x, coarse), _rounded(y, coarse)
    relative, least = SPACINGS[coarse]
    close = np.abs(x - y) <= relative * np.maximum(np.abs(x), np.abs(y)) + least
    return bool(close.all() and (x != y).mean() <= SEVERAL_ROUNDINGS)


def _rounded(values: np.ndarray, name: str) -> np.ndarray:
    """Return float32 numbers as a coarser type has them, float64."""
    import torch  # seconds to load, and few collections are of several types

    return torch.from_numpy(values).to(getattr(torch, _TORCH_NAMES[name])).double().numpy()


def contradictions(paths: Sequence[str], labels: Sequence[str], groups: Iterable[Sequence[int]]) -> list[Finding]:
    """Return what is wrong with copies whose labels differ: a finding for each of their files."""
    findings = []
    for group in groups:
        for row in group:
            other = next((i for i in group if labels[i] != labels[row]), None)
            if other is not None:
                fault = f"the same weights as {paths[other]}, but another label ({labels[row]}, {labels[other]})"
                findings.append(Finding((paths[row],), f"{fault}. Mend the label, or keep one and its row."))
    return findings


# ----------------------------------------------------------------------------------------------------------------------
# Epochs
# ----------------------------------------------------------------------------------------------------------------------

# A moment of a training at the end of a name: a word and a number in either order; or a bare e, if the name has more.
_MOMENT = re.compile(
    r"(?:^|[-_. ])(?:epochs?|ep|steps?|checkpoint|ckpt|iter)[-_.= ]?(\d{1,12})$"
    r"|(?<=.)[-_. ](\d{1,12})[-_. ]?(?:epochs?|ep|steps?|iters?)$"
    r"|(?<=.)[-_. ]e(\d{1,12})(?:[-_. ]s\d{1,12})?$",
    re.IGNORECASE,
)
_LAST = re.compile(r"(?:^|[-_. ])(?:last|final)$", re.IGNORECASE)
_NUMBER = re.compile(r"[-_](\d{6,12})$")  # kohya's epochs have six digits, ai-toolkit's steps nine


def session_id(fields: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the session of training that a header's fields name, and the moment in it; None where they name none."""
    if not fields.get("ss_session_id"):
        return None
    session, moment = (
        "/".join(fields[name] for name in names if fields.get(name))
        for names in (("ss_session_id", "ss_training_started_at"), ("ss_epoch", "ss_steps"))
    )
    return session, moment


def find_epochs(
    paths: Sequence[str], sessions: Sequence[tuple[str, str] | None], copies: Iterable[Sequence[int]] = ()
) -> list[list[int]]:
    """Return the groups of files that are one training at several moments, the latest last.

    By name: in one folder ``x-e05``, ``x-step500`` or ``epoch-3``, in folders such as ``x/checkpoint-500``, and the
    file without such an end; and ``x-000001`` only where ``x`` is beside it, as numbers alone may count LoRAs. By
    header: files of one session, unless their headers say that all are of one moment. Files that are all copies of one
    another are no epochs.

    Args:
        paths: Relative to the collection.
        sessions: Of `session_id`, for each file.
        copies: Of `find_copies`.
    """
    by_name, by_session = defaultdict(list), defaultdict(list)
    names = [_without_suffix(path) for path in paths]
    present, moments = set(names), []
    for row, name in enumerate(names):
        stem, moment = _training(name, present)
        by_name[stem].append(row)
        moments.append(moment)
    for row, session in enumerate(sessions):
        if session is not None:
            by_session[session[0]].append(row)
    groups = [rows for rows in by_name.values() if any(moments[row] for row in rows)]
    for rows in by_session.values():
        stated = {sessions[row][1] for row in rows}
        groups += [rows] if len(stated) > 1 or stated == {""} else []
    same = [set(group) for group in copies]
    groups = [rows for rows in joined(len(paths), groups) if not any(group.issuperset(rows) for group in same)]

    def time(row: int) -> tuple:
        return not moments[row], moments[row], paths[row]  # a file without a number is the last of its training

    def time_in_header(row: int) -> tuple:
        return [int(number) for number in re.findall(r"\d+", sessions[row][1])], time(row)

    def in_order(rows: list[int]) -> list[int]:
        one_session = len({sessions[row] and sessions[row][0] for row in rows}) == 1  # one that goes on counts anew
        stated = all(sessions[row] and sessions[row][1] for row in rows)
        return sorted(rows, key=time_in_header if one_session and stated else time)

    return [in_order(rows) for rows in groups]


def split_moment(name: str) -> tuple[str, tuple[int, ...]]:
    """Return a name without the moments of a training at its end, and these: of x-epoch5-step500 x and (5, 500)."""
    numbers = ()
    while match := _MOMENT.search(name):
        name, numbers = name[: match.start()], (int(match[match.lastindex]), *numbers)
    return name, numbers


def _without_suffix(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    return (*parts[:-1], parts[-1][: -len(".safetensors")])


def _training(name: tuple[str, ...], present: set[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the name of a file's training, and the moment of it that the file's path names: () for none."""
    stem, number = (*name[:-1], _NUMBER.sub("", name[-1])), _NUMBER.search(name[-1])
    if number and stem in present:
        return stem, (int(number[1]),)
    parts, moment = [], ()
    for part in name:
        part, numbers = split_moment(part)
        moment += numbers
        parts += [part] if part else []
    if not moment:
        last = _LAST.sub("", name[-1])
        parts = [*name[:-1], last] if last else name[:-1]
    return tuple(parts), moment


# ----------------------------------------------------------------------------------------------------------------------
# Notices
# ----------------------------------------------------------------------------------------------------------------------


def twin_notices(
    paths: Sequence[str],
    labels: Sequence[str],
    copies: list[list[int]],
    epochs: list[list[int]],
    keep_twins: bool = False,
    strict: bool = False,
) -> list[Notice]:
    """Return the notices of copies and of epochs, where there are some.

    Args:
        paths: Of all files.
        labels: Of all files.
        copies: Of `find_copies`.
        epochs: Of `find_epochs`.
        keep_twins: Whether they stay where the split puts them.
        strict: Whether they are faults; then the notices' files are all but the first copy and the last epoch.
    """
    outcome = ": they are kept on one side of the split. Keep one of each; or --keep-twins has the split part them."
    if keep_twins:
        outcome = (
            ": as --keep-twins asks, they may be on both sides of the split, and recognised there. Keep one of each."
        )
    if strict:
        outcome = ". Keep one of each, as --strict --skip-bad does: of epochs the last."
    notices = []
    if copies:
        count = sum(len(group) - 1 for group in copies)
        subject = "1 LoRA is a copy of another" if count == 1 else f"{count} LoRAs are copies of others"
        at_fault = _all_but_one(copies, epochs) if strict else list(chain(*copies))
        message = f"{subject} ({_example(paths, copies, ' = ')}){outcome}"
        notices.append(_notice("copies", message, paths, at_fault, copies))
    if epochs:
        count, several = sum(map(len, epochs)), sum(len({labels[row] for row in group}) > 1 for group in epochs)
        trainings = "one training" if len(epochs) == 1 else f"{len(epochs)} trainings"
        sets = "1 set" if several == 1 else f"{several} sets"
        mixed = f"; {sets} of these with several labels, which one training seldom has" if several else ""
        at_fault = [row for group in epochs for row in group[:-1]] if strict else list(chain(*epochs))
        message = (
            f"{count} LoRAs are epochs of {trainings}, by their names ({_example(paths, epochs, ', ')}){mixed}{outcome}"
        )
        notices.append(_notice("epochs", message, paths, at_fault, epochs))
    return notices


def _all_but_one(copies: list[list[int]], epochs: list[list[int]]) -> list[int]:
    """Return the rows of copies less one of each group: the first that is no earlier epoch itself."""
    earlier = {row for group in epochs for row in group[:-1]}
    kept = {next((row for row in group if row not in earlier), group[0]) for group in copies}
    return [row for group in copies for row in group if row not in kept]


def _example(paths: Sequence[str], groups: list[list[int]], between: str) -> str:
    first = between.join(paths[row] for row in groups[0][:2])
    return first + (", ..." if len(groups) > 1 or len(groups[0]) > 2 else "")


def _notice(kind: str, message: str, paths: Sequence[str], at_fault: list[int], groups: list[list[int]]) -> Notice:
    named = tuple(tuple(sorted(paths[row] for row in group)) for group in groups)
    return Notice(kind, message, tuple(sorted(paths[row] for row in at_fault)), named)
