"""Checks of weights: what is wrong or odd in a file, and which files of a collection differ from the others in size.

Shape letters: N LoRAs, L layers, P modules, W weights of a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loras import lora_files
from loras.lora_files import Header, LoraFileError
from loras.notices import Notice
from loras.scales import update_scales

FEWEST = 5  # files among which one can be an outlier
# A file is an outlier where the update of its modules is so many times those of the others, or of any module so many.
FACTOR, MODULE_FACTOR = 5, 20
DEVIATIONS, MODULE_DEVIATIONS = 10, 20  # and by so many standard deviations, estimated by the median deviation
# Or so many times at so many deviations, where sizes vary much anyway; of these there may be any minority.
HUGE, HUGE_DEVIATIONS = 1000, 6
OVERSIZED = 100  # times the others, from which on nothing is learned from a file: it would decide the scale of all
APART = 100  # times, between one file and the next larger, from which on sizes fall into two groups
LEAST_SPREAD = 0.03  # taken for the median deviation of logarithms where it is less
OUTLIERS = 0.1  # of the files at most, unless huge: more are another kind of LoRA and no outliers
MAX_NAMED = 3


@dataclass(frozen=True)
class Checked:
    """The findings of one reading of a file.

    Attributes:
        digest: Of all its bytes that a result depends on.
        sizes: Root mean square of the weights of each layer, float64[L].
        norms: Frobenius norm of the update s·up·down of each module, float64[P].
        fault: What makes its weights unusable, in words; empty where nothing does.
    """

    digest: str
    sizes: np.ndarray
    norms: np.ndarray
    fault: str = ""


def check_weights(path: Path | str, header: Header, adapter_config: dict | None = None) -> Checked:
    """Read the weights of a file and check them; only what no feature needs is computed.

    Raises:
        LoraFileError: The file has changed since its header was parsed.
        OSError: It cannot be read.
    """
    weights, alphas, digest = lora_files.read_weights(path, header)
    layout = header.layout
    try:
        lora_files.check_finite(weights, layout)
        scales = update_scales(header, alphas, adapter_config)
    except LoraFileError as error:
        return Checked(digest, np.zeros(len(layout.layers)), np.zeros(len(layout.modules)), str(error))
    places = zip(layout.layers, layout.columns, strict=True)
    matrices = [weights[columns].reshape(layer.shape).astype(np.float64) for layer, columns in places]
    sizes = np.array([np.sqrt(np.square(matrix).mean()) for matrix in matrices])
    norms = [_update_norm(down, up) for down, up in zip(matrices[::2], matrices[1::2], strict=True)]
    return Checked(digest, sizes, np.array([abs(scales[m]) * n for m, n in zip(layout.modules, norms, strict=True)]))


def _update_norm(down: np.ndarray, up: np.ndarray) -> float:
    """Return the norm of up·down, which is never formed: float[r, in], float[out, r]."""
    return float(np.sqrt(max(0.0, np.sum((up.T @ up) * (down @ down.T)))))


def weight_notices(
    paths: Sequence[str],
    labels: Sequence[str],
    modules: Sequence[str],
    norms: np.ndarray,
    selected: np.ndarray | None = None,
) -> list[Notice]:
    """Return the notices of untrained files, of modules that are zero in all others, and of outliers in size.

    Args:
        paths: Of the files.
        labels: Of the files.
        modules: Names of the modules.
        norms: Of the update of each module, float[N, P].
        selected: Layers that --layers keeps, bool[L]; modules that are zero are reported of these alone.
    """
    notices, zero = [], norms == 0
    untrained = zero.all(1)
    if untrained.any():
        files = [paths[row] for row in np.flatnonzero(untrained)]
        subject = "1 LoRA is untrained" if len(files) == 1 else f"{len(files)} LoRAs are untrained"
        message = (
            f"{subject}, as every update is zero ({_named(files)}). Leave such files out, as --strict --skip-bad does."
        )
        notices.append(Notice("untrained", message, tuple(files)))
    always = zero[~untrained].all(0)
    if selected is not None:
        always &= selected.reshape(-1, 2).any(1)  # a module's down and up are neighbours
    if always.any() and not untrained.all():
        names = _named([modules[position] for position in np.flatnonzero(always)])
        subject = "1 module is" if always.sum() == 1 else f"{always.sum()} modules are"
        message = f"{subject} zero in every LoRA that is trained ({names}). Leave such layers out with --layers."
        notices.append(Notice("zero modules", message, ()))
    compared = _compared(labels, norms)
    if compared is None:
        return notices
    if outliers := _outliers(compared, modules, norms):
        files = tuple(paths[row] for row in outliers)
        subject = "1 LoRA is" if len(files) == 1 else f"{len(files)} LoRAs are"
        described = _named([f"{paths[row]}: {words}" for row, words in outliers.items()])
        message = f"{subject} far from the others in size ({described}). "
        message += "Look at how such files were made; --strict --skip-bad leaves them out."
        notices.append(Notice("outlier", message, files))
    if message := _two_groups(compared):
        notices.append(Notice("two sizes", message, ()))
    return notices


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


@dataclass(frozen=True)
class _Compared:
    """Sizes of files beside those of the others, as logarithms.

    Attributes:
        rows: The n files that have sizes, int64[n].
        positions: The p modules that most of them have, int64[p].
        gaps: From the median of all, float64[n, p]; 0 for what is zero.
        far: Files that are far from the others as a whole, bool[n].
        single: And modules of the others, bool[n, p].
    """

    rows: np.ndarray
    positions: np.ndarray
    gaps: np.ndarray
    far: np.ndarray
    single: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """Gap of each file, float64[n]."""
        return np.median(self.gaps, axis=1)


def _compared(labels: Sequence[str], norms: np.ndarray) -> _Compared | None:
    """Compare sizes module by module, by medians, which a few outliers do not move; None where there is nothing to.

    Outliers are far from all others in size, and from those of their class. What is zero has no size. Where many files
    are far from the median, there are several kinds of LoRAs, and none is an outlier, unless by a huge factor: then
    any minority is, or a median would not tell it from the others.
    """
    rows = np.flatnonzero((norms > 0).any(1))
    if len(rows) < FEWEST:
        return None
    with np.errstate(divide="ignore"):
        gaps = np.log(norms[rows].astype(np.float64))  # (n, P)
    medians = np.median(gaps, axis=0)
    positions = np.flatnonzero(np.isfinite(medians))
    if len(positions) == 0:  # each module is zero in most files: nothing to compare with
        return None
    gaps = gaps[:, positions] - medians[positions]
    zero = np.isinf(gaps)
    gaps[zero] = 0
    gaps, spreads = _without_huge(gaps)
    gaps[zero] = 0
    deviations = np.abs(gaps) / spreads
    huge = (np.abs(gaps) > np.log(HUGE)) & (deviations > HUGE_DEVIATIONS)
    own = _gaps_in_class(np.array(labels)[rows], gaps, huge)

    def beyond(gap: np.ndarray, own: np.ndarray, deviations: np.ndarray, factor: float, least: float) -> np.ndarray:
        apart = (np.abs(gap) > np.log(factor)) & (np.sign(gap) * own > np.log(factor))
        huge = apart & (np.abs(gap) > np.log(HUGE)) & (deviations > HUGE_DEVIATIONS)
        huge &= 2 * huge.sum(0) < len(huge)
        return huge | _few(apart & (deviations > least) & ~huge)

    whole = np.median(gaps, axis=1), np.median(own, axis=1), np.median(deviations, axis=1)
    far = beyond(*whole, FACTOR, DEVIATIONS)
    single = beyond(gaps, own, deviations, MODULE_FACTOR, MODULE_DEVIATIONS) & ~far[:, None]
    return _Compared(rows, positions, gaps, far, single)


def _without_huge(gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gaps to the medians of what is not huge, float64[n, p], and the spread of that, float64[p].

    A large minority would move the medians to the edge of the others, and the spread with them.
    """
    huge = np.abs(gaps) > np.log(HUGE)
    huge &= 2 * huge.sum(0) < len(gaps)
    rest = np.where(huge, np.nan, gaps)
    medians = np.where(huge.any(0), np.nanmedian(rest, axis=0), 0)
    return gaps - medians, np.maximum(1.4826 * np.nanmedian(np.abs(rest - medians), axis=0), LEAST_SPREAD)


def _gaps_in_class(labels: np.ndarray, gaps: np.ndarray, huge: np.ndarray) -> np.ndarray:
    """Return the gaps to the median of a file's class, where that has others, float64[n, p].

    What is huge counts only where the whole class is: else a class of which most files are absurd would hide them.
    """
    own = gaps.copy()
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        if len(members) >= 3:
            left_out = huge[members] & ~huge[members].all(0)
            own[members] -= np.nanmedian(np.where(left_out, np.nan, gaps[members]), axis=0)
    return own


def _two_groups(compared: _Compared) -> str:
    """Return that files fall into two groups by size, in words, where outliers do not say so; else empty."""
    sizes = np.sort(compared.whole[~compared.far])
    inner = np.diff(sizes)[2:-2]  # with three files on each side
    if len(inner) == 0 or inner.max() <= np.log(APART):
        return ""
    smaller = int(inner.argmax()) + 3
    factor = _times(np.median(sizes[smaller:]) - np.median(sizes[:smaller]))
    return (
        f"The LoRAs fall into two groups by size: the updates of {len(sizes) - smaller} are {factor} those of the "
        f"other {smaller}. The larger decide the scale of what is learned. Look at how each group was made."
    )


def _outliers(compared: _Compared, modules: Sequence[str], norms: np.ndarray) -> dict[int, str]:
    """Return how far files are from all others in size, and from those of their class, in words by row."""
    rows, whole = compared.rows, compared.whole
    clipped = (norms == np.finfo(np.float32).max).any(1)  # as features are
    times = {i: ("over " if clipped[rows[i]] else "") + _times(whole[i]) for i in np.flatnonzero(compared.far).tolist()}
    words = {int(rows[i]): f"its updates are {factor} those of the others" for i, factor in times.items()}
    for i in np.flatnonzero(compared.single.any(1)):
        module = np.abs(np.where(compared.single[i], compared.gaps[i], 0)).argmax()
        name = modules[compared.positions[module]]
        words[int(rows[i])] = f"that of {name} is {_times(compared.gaps[i, module])} those of the others"
    return dict(sorted(words.items()))


def oversized(labels: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """Return the rows of files of which a size is more than a hundred times that of the others, int64.

    Args:
        labels: Of the files.
        sizes: Of their layers and updates, float[N, any].
    """
    if (compared := _compared(labels, sizes)) is None:
        return np.array([], int)
    least = np.log(OVERSIZED)
    far = (compared.far & (compared.whole > least)) | (compared.single & (compared.gaps > least)).any(1)
    return compared.rows[far]


def _few(far: np.ndarray) -> np.ndarray:
    """Return which are far, bool[n] or bool[n, P], where few of the n are."""
    return far & (far.sum(0) <= max(2, OUTLIERS * len(far)))


def _times(gap: float) -> str:
    factor = np.exp(abs(gap))
    return f"{factor:.3g} times" if gap > 0 else f"1/{factor:.3g} of"
