"""Kernels of updates, exact whatever the factorisation and the ranks, and support vector machines (SVMs) on them.

``update_kernel``: of one module ``K[i, j] = <ΔW_i, ΔW_j> = s_i s_j · sum((up_iᵀ up_j) ∘ (down_i down_jᵀ))``, over the
mean of ``K[i, i]`` of train LoRAs. ``update_views``: three views of a module, <ΔW_i, ΔW_j>, <ΔW_iΔW_iᵀ, ΔW_jΔW_jᵀ> =
||ΔW_iᵀΔW_j||² (what the module writes) and <ΔW_iᵀΔW_i, ΔW_jᵀΔW_j> = ||ΔW_iΔW_jᵀ||² (what it reads), each as a cosine.
They are summed with weights, as one view may hold the class and another only what hides it: the square of each view's
alignment with the labels of train LoRAs (Cortes, Mohri & Rostamizadeh, "Algorithms for learning kernels based on
centered alignment", 2012, whose first algorithm weights by the alignment itself).

The kernel of several modules is the sum of theirs, so removing modules is a subtraction, and a condition costs an SVM,
nothing more.

Columns of a kernel are the train LoRAs. For few LoRAs the kernels of modules are kept; for more they are computed
anew for each pass over the modules, which serves many conditions at once. For very many LoRAs the columns are
landmarks drawn from the train LoRAs, and the classifier reads the features that these give each LoRA (Nyström:
Williams & Seeger, 2001). `Limits` holds the bounds.

Shape letters: N LoRAs, n columns, P modules, K conditions, W views, r rank, V and T validation and test LoRAs, C
classes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from joblib import parallel_config
from torch import Tensor

from training.classifier import scored
from training.exact import eigenvectors, exact_dtype, qr
from training.stacks import numpy_stream

if TYPE_CHECKING:  # scikit-learn is imported where it is called: workers that only train networks start a second sooner
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

GRID = (0.01, 0.1, 1.0, 10.0, 100.0)  # values of C, of a kernel with mean diagonal 1
ITERATIONS = 10**7  # of an SVM before it counts as not converged; thousands are usual
ROUNDING = 1e-6  # a share of a kernel that is nothing but rounding of its float32 parts
NOTHING = 1e-12  # size of a sum of kernels from which all modules have been subtracted again
LARGEST = 1e15  # size of an update, in those of train LoRAs: products of two are numbers in float32
NUMBERS_AT_ONCE = 2**22  # worked on at a time in products of factors: 16 MiB in float32

# Of a module and row indices int64[n]: down float[n, r, in], up float[n, out, r] and scale float[n].
ReadModule = Callable[[int, np.ndarray], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Limits:
    """Sizes up to which kernels are kept or exact, and how much is worked on at a time.

    Attributes:
        kept: LoRAs up to which the kernels of modules are kept,
        kept_numbers: if they hold at most so many numbers (2 GiB in float32).
        exact: LoRAs up to which all train LoRAs are columns.
        landmarks: Columns beyond.
        numbers_at_once: Numbers of factors to work on at a time.
        summed: Numbers of kernels that a thread sums in one pass over the modules (256 MiB in float64).
    """

    kept: int = 2_000
    kept_numbers: int = 2**29
    exact: int = 5_000
    landmarks: int = 1_000
    numbers_at_once: int = NUMBERS_AT_ONCE
    summed: int = 2**25


@dataclass(frozen=True)
class Kernel:
    """A sum of views of updates.

    Attributes:
        views: W: 1, the update; or 3, its left and its right Gram matrix too.
        sized: Whether the sizes of updates count; else all but zero updates have size 1.
    """

    views: int
    sized: bool


# Each representation that is made "kernel", by name.
KERNELS = {"update_kernel": Kernel(views=1, sized=True), "update_views": Kernel(views=3, sized=False)}


# ----------------------------------------------------------------------------------------------------------------------
# The kernel of one module
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """Updates as ``norm · up · down``: rows of down are orthonormal, and up · down has norm 1, or 0 for a zero update.

    Columns of up are orthogonal where asked for: then the singular values of up · down are their norms. So products in
    float32 are exact to rounding relative to the norms of the two updates, whatever their factors were. Where a column
    of up is 0, a GPU may leave a row of down shorter than 1, or 0 (see `training.exact.gram_schmidt`).

    ``down`` [n, k, in], ``up`` [n, out, k], k = min(r, in), and ``norm`` float64[n].
    """

    down: Tensor
    up: Tensor
    norm: Tensor

    @classmethod
    def from_factors(
        cls,
        down: Tensor,
        up: Tensor,
        scale: Tensor,
        numbers_at_once: int = NUMBERS_AT_ONCE,
        orthogonal: bool = False,
    ) -> Updates:
        """Factorise updates scale · up · down of factors down float[n, r, in], up float[n, out, r], scale float[n]."""
        parts = []
        length = max(1, numbers_at_once // (down[0].numel() + up[0].numel()))
        blocks = zip(down.split(length), up.split(length), scale.double().split(length), strict=True)
        for down_block, up_block, scale_block in blocks:
            q, triangle = qr(down_block.double().mT)  # down = triangleᵀ·qᵀ
            product = up_block.double() @ triangle.mT  # (n, out, k)
            norm = torch.linalg.vector_norm(product, dim=(1, 2))
            product = product * torch.where(norm > 0, scale_block.sign() / norm, 0)[:, None, None]
            if orthogonal and product.shape[2] > 1:
                turn = eigenvectors(product.mT @ product)  # (n, k, k)
                product, q = product @ turn, q @ turn
            parts.append((q.mT.float(), product.float(), norm * scale_block.abs()))
        return cls(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def to(self, device: torch.device | str) -> Updates:
        """Return the same on a device; on a GPU in float64, as float32 products there have ten bits of mantissa."""
        dtype = exact_dtype(device)
        return Updates(self.down.to(device, dtype), self.up.to(device, dtype), self.norm.to(device))

    def __len__(self) -> int:
        """Return the number of updates."""
        return len(self.norm)

    def __getitem__(self, rows: slice | Tensor) -> Updates:
        """Return the updates of these rows."""
        return Updates(self.down[rows], self.up[rows], self.norm[rows])


def cosines(a: Updates, b: Updates, numbers_at_once: int = NUMBERS_AT_ONCE, views: int = 1) -> Tensor:
    """Compute the cosine between each update of a and each of b, in each view; 0 where one is zero.

    One product of matrices for each pair of columns of up, and one for each pair of rows of down. Where the views
    themselves have fewer entries than that has terms (large ranks, small matrices), blocks of them are formed and
    multiplied instead.

    Args:
        a: Updates; with orthogonal columns of up where there is more than one view.
        b: Updates, likewise.
        numbers_at_once: Numbers to work on at a time.
        views: W: 1, the updates; or 3, also their left Gram matrices ΔWΔWᵀ, and their right ones ΔWᵀΔW.

    Returns:
        Cosines, float64[W, len(a), len(b)].
    """
    (rank, wide), high, other = a.down.shape[1:], a.up.shape[1], b.down.shape[1]
    entries = wide * high if views == 1 else wide * high + wide**2 + high**2
    products = _products_of_views if rank * other * (wide + high) > entries else _products_of_columns
    cosine = products(a, b, numbers_at_once, views)
    if views > 1:  # a Gram matrix of an update of norm 1 has another norm
        a_size, b_size = (torch.linalg.vector_norm(_squares(updates), dim=1).double() for updates in (a, b))
        for size in (a_size[:, None], b_size):
            cosine[1:] *= torch.where(size > 0, 1 / size, 0)
    return cosine


def _squares(updates: Updates) -> Tensor:
    """Return the squared norms of the columns of up, [n, k]."""
    return updates.up.square().sum(1)


def _products_of_views(a: Updates, b: Updates, numbers_at_once: int, views: int) -> Tensor:
    """Compute inner products of the views, which are formed by blocks of their rows, float64[W, len(a), len(b)]."""
    product = torch.zeros(views, len(a), len(b), dtype=torch.float64, device=a.up.device)
    for view, (a_factors, b_factors) in enumerate(zip(_factors(a, views), _factors(b, views), strict=True)):
        (a_left, a_right), (b_left, b_right) = a_factors, b_factors
        length = max(1, numbers_at_once // (a_right.shape[2] * max(len(a), len(b))))
        for a_rows, b_rows in zip(a_left.split(length, dim=1), b_left.split(length, dim=1), strict=True):
            product[view] += (a_rows @ a_right).flatten(1) @ (b_rows @ b_right).flatten(1).mT
    return product


def _factors(updates: Updates, views: int) -> list[tuple[Tensor, Tensor]]:
    """Return two factors of each view: of the update, its left and its right Gram matrix."""
    down, up = updates.down, updates.up
    weighted = (_squares(updates)[:, :, None] * down).mT
    return [(up, down), (up, up.mT), (weighted, down)][:views]


def _products_of_columns(a: Updates, b: Updates, numbers_at_once: int, views: int) -> Tensor:
    """Compute inner products of the views from those of columns of up and rows of down, float64[W, len(a), len(b)]."""
    product = torch.zeros(views, len(a), len(b), dtype=torch.float64, device=a.up.device)
    # Each column of all updates in one piece, or every product would copy it: (k, n, out) and (k, n, in).
    a_up, b_up = (updates.up.permute(2, 0, 1).contiguous() for updates in (a, b))
    a_down, b_down = (updates.down.transpose(0, 1).contiguous() for updates in (a, b))
    a_size, b_size = (torch.linalg.vector_norm(x, dim=2) for x in (a_up, b_up))  # (k, n)
    length = max(1, numbers_at_once // (views * len(b)))
    for start in range(0, len(a), length):
        rows = slice(start, start + length)
        total = torch.zeros_like(product[:, rows], dtype=a.up.dtype)
        for i in range(a_up.shape[0]):
            for j in range(b_up.shape[0]):
                written, read = a_up[i, rows] @ b_up[j].mT, a_down[i, rows] @ b_down[j].mT
                total[0].addcmul_(written, read)
                if views > 1:
                    total[1].addcmul_(written, written)
                    read *= a_size[i, rows, None]
                    read *= b_size[j]
                    total[2].addcmul_(read, read)
        product[:, rows] = total
    return product


def own_cosines(a: Updates, numbers_at_once: int = NUMBERS_AT_ONCE, views: int = 1) -> Tensor:
    """Compute `cosines` of updates among themselves, for little more than half of the work.

    Of several views those of an update with itself are exactly 1.
    """
    length = math.ceil(len(a) / 8)
    cosine = torch.empty(views, len(a), len(a), dtype=torch.float64, device=a.up.device)
    for start in range(0, len(a), length):
        rows = slice(start, start + length)
        cosine[:, rows, start:] = cosines(a[rows], a[start:], numbers_at_once, views)
        cosine[:, rows, :start] = cosine[:, :start, rows].mT
    if views > 1:
        cosine.diagonal(dim1=1, dim2=2)[:] = a.norm > 0
    return cosine


def alignments(kernels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the alignment of kernels with labels, 0 where it is negative (Cortes, Mohri & Rostamizadeh, 2012).

    The cosine between the centred kernel and the centred matrix of equal labels. Their diagonals are left out: those
    of cosines are 1 whatever the labels are.

    Args:
        kernels: Kernels of the same samples, float64[W, n, n].
        labels: Class of each sample, [n].

    Returns:
        Alignments in [0, 1], float64[W]; 1 for all where all labels are equal, as they tell nothing.
    """
    from sklearn.preprocessing import KernelCenterer

    def centred(kernel: np.ndarray) -> np.ndarray:
        kernel = KernelCenterer().fit_transform(kernel)
        np.fill_diagonal(kernel, 0)
        return kernel

    if (labels == labels[0]).all():
        return np.ones(len(kernels))
    target = centred((labels[:, None] == labels).astype(np.float64))
    target /= np.linalg.norm(target)
    alignment = np.zeros(len(kernels))
    for view, kernel in enumerate(map(centred, kernels)):
        size = np.linalg.norm(kernel)
        if size > ROUNDING * len(kernel):  # else all updates are one and the same
            alignment[view] = max(0.0, (kernel * target).sum() / size)
    return alignment


# ----------------------------------------------------------------------------------------------------------------------
# The kernels of all modules, and of any of them
# ----------------------------------------------------------------------------------------------------------------------


class UpdateKernels:
    """Kernels of the modules of a collection, and of any choice of modules; several threads may ask at once.

    Args:
        read_module: Reads the factors of the updates of a module, for LoRAs by their indices.
        num_modules: P.
        train_rows: The LoRAs that kernels are normalised, centred and approximated by, int64[n].
        num_samples: N.
        kind: The kernel: a name of `KERNELS`, or another.
        labels: Classes of the train rows, int64[n], by which views are weighted; None: each counts the same.
        seed: Decides the landmarks.
        device: The device that computes inner products.
        limits: Bounds on what is kept, exact, and worked on at a time.

    Attributes:
        precomputed: Whether `inputs` are kernels; else features.
        columns: The LoRAs that are the columns of the kernels, int64[n].
        keeps: Whether the kernels of modules are kept.
        at_once: Conditions that a unit of work best holds.
        weights: Of the views of each module whose kernel has been computed, float64[P, W].
        sizes: What norms were divided by there, float64[P]; 0 where no train LoRA has an update.
    """

    def __init__(
        self,
        read_module: ReadModule,
        num_modules: int,
        train_rows: np.ndarray,
        num_samples: int,
        *,
        kind: str | Kernel = "update_kernel",
        labels: np.ndarray | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
    ):
        self.read_module, self.num_modules, self.device = read_module, num_modules, device
        self.train, self.num_samples = np.asarray(train_rows), num_samples
        self.kind = kind if isinstance(kind, Kernel) else KERNELS[kind]
        limits = limits or Limits()
        self.numbers_at_once = limits.numbers_at_once
        self.precomputed = num_samples <= limits.exact
        self.columns = self.train
        if not self.precomputed:
            self.columns = np.sort(numpy_stream(seed, "landmarks").permutation(self.train)[: limits.landmarks])
        self.labels = None
        if labels is not None:
            of_sample = dict(zip(self.train.tolist(), np.asarray(labels).tolist(), strict=True))
            self.labels = np.array([of_sample[row] for row in self.columns.tolist()])
        numbers = num_samples * len(self.columns)
        self.keeps = num_samples <= limits.kept and num_modules * numbers <= limits.kept_numbers
        self.at_once = 32 if self.keeps else max(1, limits.summed // numbers)
        self.weights, self.sizes = np.zeros((num_modules, self.kind.views)), np.zeros(num_modules)
        self._kept: list[np.ndarray | None] = [None] * num_modules
        self._locks = [threading.Lock() for _ in range(num_modules)]
        self._full: np.ndarray | None = None
        self._full_lock = threading.Lock()

    def module(self, module: int) -> np.ndarray:
        """Return a module's kernel over the mean of its diagonal on train rows, float32[N, n]; 0 if that is 0.

        Of several views it is their mean, or, where labels weight them, the mean of views times weights: then a module
        of small weights is small, and 0 if no view is aligned with the labels.
        """
        if not self.keeps:
            return self._compute(module)
        with self._locks[module]:
            if self._kept[module] is None:
                self._kept[module] = self._compute(module)
            return self._kept[module]

    def inputs(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the inputs of an SVM for each condition: of the modules ``kept`` bool[K, P].

        Centred on train rows and divided by the mean of the diagonal there, so that C means the same whatever is kept.
        All are 0 if no module is kept, or train rows differ by rounding only.

        Yields:
            The kernel float64[N, n], or features float64[N, at most n] if not ``precomputed``.
        """
        for kernel in self.sums(np.asarray(kept)):
            yield self.normalised(kernel)

    def normalised(self, kernel: np.ndarray) -> np.ndarray:
        """Return the inputs of an SVM, see `inputs`, of a sum of kernels float64[N, n], which may be overwritten."""
        return self._centred_kernel(kernel) if self.precomputed else self._features(kernel)

    def sums(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the sum of the kernels of modules kept, float64[N, n] for each of the conditions bool[K, P].

        Where more are kept than removed, it is that of all less that of the removed modules.
        """
        few = 2 * kept.sum(1) <= self.num_modules
        used = np.where(few[:, None], kept, ~kept)
        full = None if few.all() else self._sum_of_all()
        length = 1 if self.keeps else self.at_once
        shape = self.num_samples, len(self.columns)
        for start in range(0, len(kept), length):
            chunk = range(start, min(start + length, len(kept)))
            sums = {condition: np.zeros(shape) if few[condition] else full.copy() for condition in chunk}
            for module in np.flatnonzero(used[chunk.start : chunk.stop].any(0)).tolist():
                kernel = self.module(module)
                for condition in chunk:
                    if used[condition, module]:
                        add = np.add if few[condition] else np.subtract
                        add(sums[condition], kernel, out=sums[condition])
            for condition in chunk:
                yield sums.pop(condition)

    def _sum_of_all(self) -> np.ndarray:
        """Return the sum of the kernels of all modules, float64[N, n]."""
        if self.keeps and self._full is None:  # each thread computes modules that no other thread is computing
            for module, lock in enumerate(self._locks):
                if not lock.locked():
                    self.module(module)
        with self._full_lock:
            if self._full is None:
                full = np.zeros((self.num_samples, len(self.columns)))
                for module in range(self.num_modules):
                    full += self.module(module)
                self._full = full
            return self._full

    def _read(self, module: int, rows: np.ndarray) -> Updates:
        several = self.kind.views > 1
        factors = (factor.to(self.device) for factor in self.read_module(module, rows))
        return Updates.from_factors(*factors, self.numbers_at_once, orthogonal=several).to(self.device)

    def _compute(self, module: int) -> np.ndarray:
        """Compute a module's kernel; see `module`."""
        columns, views = self._read(module, self.columns), self.kind.views
        others = np.setdiff1d(np.arange(self.num_samples), self.columns)
        kernel = np.empty((self.num_samples, len(columns)), np.float32)
        norm = np.empty(self.num_samples)
        own = own_cosines(columns, self.numbers_at_once, views).cpu().numpy()
        weights = np.ones(views)
        if views > 1 and self.labels is not None:
            weights = alignments(own, self.labels) ** 2
        weights /= views
        kernel[self.columns] = np.tensordot(weights, own, 1)
        norm[self.columns] = columns.norm.cpu().numpy()
        numbers = max(views * len(columns), columns.down[0].numel() + columns.up[0].numel())
        length = max(1, self.numbers_at_once // numbers)
        for start in range(0, len(others), length):
            rows = others[start : start + length]
            updates = self._read(module, rows)
            products = cosines(updates, columns, self.numbers_at_once, views).cpu().numpy()
            kernel[rows] = np.tensordot(weights, products, 1)
            norm[rows] = updates.norm.cpu().numpy()
        if not self.kind.sized:
            norm = (norm > 0).astype(np.float64)
        size = math.sqrt(np.square(norm[self.train]).mean())
        self.weights[module], self.sizes[module] = weights, size
        if size == 0:
            return np.zeros_like(kernel)
        norm = np.minimum(norm / size, LARGEST)
        kernel *= norm[:, None]
        kernel *= norm[self.columns]
        return kernel

    def _centred_kernel(self, kernel: np.ndarray) -> np.ndarray:
        from sklearn.preprocessing import KernelCenterer

        own = kernel[self.train]
        centred = KernelCenterer().fit(own).transform(kernel, copy=False)
        size = np.trace(centred[self.train]) / len(own)
        return _divided(centred, size, size, np.trace(own) / len(own))

    def _features(self, kernel: np.ndarray) -> np.ndarray:
        """Return features ``kernel·UΛ^-½`` of landmarks' own kernel ``UΛUᵀ``: their inner products approximate all."""
        features = kernel @ landmark_map(kernel[self.columns])
        before = np.square(features[self.train]).sum(1).mean()
        features -= features[self.train].mean(0)
        size = np.square(features[self.train]).sum(1).mean()
        return _divided(features, math.sqrt(size), size, before)


def landmark_map(own: np.ndarray) -> np.ndarray:
    """Return ``UΛ^-½`` of the landmarks' own kernel ``UΛUᵀ`` without rounding, float64[n, n] -> [n, at most n]."""
    values, vectors = np.linalg.eigh(own)
    sound = values > max(NOTHING, ROUNDING * values[-1])
    return vectors[:, sound] / np.sqrt(values[sound])


def _divided(x: np.ndarray, divisor: float, size: float, size_before: float) -> np.ndarray:
    """Divide centred inputs, or return 0 if centring, or the removal of modules, has left nothing but rounding."""
    if size <= max(NOTHING, ROUNDING * size_before):
        return np.zeros_like(x)
    x /= divisor
    return x


# ----------------------------------------------------------------------------------------------------------------------
# The classifier
# ----------------------------------------------------------------------------------------------------------------------


def classify(
    x: np.ndarray,
    y: np.ndarray,
    rows: Mapping[str, np.ndarray],
    num_classes: int,
    precomputed: bool = True,
    iterations: int = ITERATIONS,
    threads: int = 1,
) -> dict[str, np.ndarray]:
    """Train an SVM (Cortes & Vapnik, 1995), C chosen on validation rows, the smallest of those that do equally well.

    Inputs that are all 0 predict the largest class of the train rows.

    Args:
        x: As `UpdateKernels.inputs` yields it: a kernel whose columns are the train rows, float64[N, n], or features.
        y: Class of each LoRA, int64[N]; every class has a train row.
        rows: Row indices of ``train``, ``validation`` and ``test``, int64 each.
        num_classes: C.
        precomputed: Whether x is a kernel.
        iterations: Iterations after which an SVM counts as not converged.
        threads: Threads that fit the classes of features, each against the rest.

    Returns:
        ``predicted`` int32[1, V + T] of the validation rows, then the test rows; ``train_accuracy``, ``train_f1`` and
        the chosen ``c``, float64[1].

    Raises:
        FloatingPointError: An SVM has not converged.
    """
    train = rows["train"]
    held_out = np.concatenate([rows["validation"], rows["test"]])
    if x[train].any():
        model, chosen = fit_svm(x, y, rows, precomputed, iterations, threads)
        fitted, predicted = model.predict(x[train]), model.predict(x[held_out])
    else:
        largest = np.bincount(y[train]).argmax()
        chosen, fitted, predicted = GRID[0], np.full(len(train), largest), np.full(len(held_out), largest)
    train_accuracy, train_f1 = scored(y[train], fitted[None], num_classes)
    return {
        "predicted": predicted[None].astype(np.int32),
        "train_accuracy": train_accuracy,
        "train_f1": train_f1,
        "c": np.array([chosen]),
    }


def _make_svm(precomputed: bool, iterations: int, threads: int, c: float) -> SVC | OneVsRestClassifier:
    """Return an SVM of this C: on a kernel one for each pair of classes, on features one for each against the rest."""
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC, LinearSVC

    if precomputed:
        return SVC(kernel="precomputed", C=c, max_iter=iterations)
    return OneVsRestClassifier(LinearSVC(dual=False, C=c, max_iter=iterations), n_jobs=threads)


def fit_svm(
    x: np.ndarray,
    y: np.ndarray,
    rows: Mapping[str, np.ndarray],
    precomputed: bool = True,
    iterations: int = ITERATIONS,
    threads: int = 1,
) -> tuple[SVC | OneVsRestClassifier, float]:
    """Return the SVM of the smallest C with the best validation accuracy, and C; arguments as of `classify`.

    Raises:
        FloatingPointError: An SVM has not converged.
    """
    inputs, truth = x[rows["train"]], y[rows["train"]]
    validation = x[rows["validation"]]
    best, chosen, best_accuracy = None, GRID[0], -1.0
    for c in GRID:
        model = _make_svm(precomputed, iterations, threads, c)
        _fit(model, inputs, truth, c)
        accuracy = float((model.predict(validation) == y[rows["validation"]]).mean())
        if accuracy > best_accuracy:
            best, chosen, best_accuracy = model, c, accuracy
        # A larger C cannot be chosen, or trains the same SVM, as C holds no coefficient back.
        if best_accuracy == 1 or (hasattr(model, "dual_coef_") and np.abs(model.dual_coef_).max() < c):
            break
    return best, chosen


def _fit(model: SVC | OneVsRestClassifier, x: np.ndarray, y: np.ndarray, c: float) -> None:
    """Fit an SVM, and refuse one that stopped before it had converged."""
    with parallel_config("threading"):
        model.fit(x, y)
    for machine in getattr(model, "estimators_", [model]):
        stopped = machine.fit_status_ if hasattr(machine, "fit_status_") else machine.n_iter_ >= machine.max_iter
        if stopped:
            iterations = f"after {np.max(machine.n_iter_)} iterations at C = {c:g}"
            raise FloatingPointError(f"a support vector machine has not converged {iterations}")


def classify_each(
    kernels: UpdateKernels,
    kept: np.ndarray,
    y: np.ndarray,
    rows: Mapping[str, np.ndarray],
    num_classes: int,
    threads: int = 1,
) -> dict[str, np.ndarray]:
    """Call `classify` for each of the conditions ``kept`` bool[K, P], and join its arrays: K in place of 1.

    The rows of ``train`` are to be those of the kernels.
    """
    how = {"precomputed": kernels.precomputed, "threads": threads}
    results = [classify(x, y, rows, num_classes, **how) for x in kernels.inputs(kept)]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}
