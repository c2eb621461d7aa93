"""The representation ``update_kernel``: inner products of updates, and support vector machines on them.

The kernel of one module is ``K[i, j] = <ΔW_i, ΔW_j> = s_i s_j · sum((up_iᵀ up_j) ∘ (down_i down_jᵀ))``, exact whatever
the factorisation and the ranks, over the mean of ``K[i, i]`` of train LoRAs. The kernel of some modules is the sum of
theirs, so removing modules is a subtraction, and a condition costs a support vector machine, nothing more.

Columns of a kernel are the train LoRAs. Up to ``KEPT`` LoRAs the kernels of modules are kept; above they are computed
anew for each pass over the modules, which serves many conditions at once. Above ``EXACT`` LoRAs some ``LANDMARKS``
among the train LoRAs are the columns, and the classifier reads the features that these give each LoRA (Nyström:
Williams & Seeger, 2001).

Shape letters: N LoRAs, n columns, P modules, K conditions, r rank, V and T validation and test LoRAs, C classes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.preprocessing import KernelCenterer
from sklearn.svm import SVC, LinearSVC
from torch import Tensor

from training.stacks import scored

KEPT, KEPT_NUMBERS = 2_000, 2**29  # up to so many LoRAs, and 2 GiB in float32, the kernels of modules are kept
EXACT = 5_000  # LoRAs, above which the kernel is approximated
LANDMARKS = 1_000
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)  # values of C, of a kernel with mean diagonal 1
ITERATIONS = 10**7  # of a machine; thousands are usual
ROUNDING = 1e-6  # a share of a kernel that is nothing but rounding of its float32 parts
AT_ONCE = 2**22  # numbers worked on at a time: 16 MiB in float32
SUMS_AT_ONCE = 2**25  # numbers of kernels that a thread sums in one pass over the modules: 256 MiB in float64

# Of a module and row indices int64[n]: down float[n, r, in], up float[n, out, r] and scale float[n].
ReadModule = Callable[[int, np.ndarray], tuple[Tensor, Tensor, Tensor]]


# ----------------------------------------------------------------------------------------------------------------------
# The kernel of one module
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """Updates as ``norm · up · down``: rows of down are orthonormal, and up · down has norm 1, or 0 for a zero update.

    So products in float32 are exact to rounding relative to the norms of the two updates, whatever their factors were.

    ``down`` [n, k, in], ``up`` [n, out, k], k = min(r, in), and ``norm`` float64[n].
    """

    down: Tensor
    up: Tensor
    norm: Tensor

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scale: Tensor) -> Updates:
        """Updates scale · up · down of factors down float[n, r, in], up float[n, out, r] and scale float[n]."""
        parts = []
        length = max(1, AT_ONCE // (down[0].numel() + up[0].numel()))
        for d, u, s in zip(*(x.split(length) for x in (down, up, scale.double())), strict=True):
            q, triangle = torch.linalg.qr(d.double().mT)  # down = triangleᵀ·qᵀ
            u = u.double() @ triangle.mT
            norm = torch.linalg.vector_norm(u, dim=(1, 2))
            u = u * torch.where(norm > 0, s.sign() / norm, 0)[:, None, None]
            parts.append((q.mT.float(), u.float(), norm * s.abs()))
        return cls(*(torch.cat(of_all) for of_all in zip(*parts, strict=True)))

    def to(self, device: torch.device | str) -> Updates:
        """The same on a device; on a GPU in float64, as its float32 products have ten bits of mantissa in training."""
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float64
        return Updates(self.down.to(device, dtype), self.up.to(device, dtype), self.norm.to(device))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.norm)

    def __getitem__(self, rows: slice | Tensor) -> Updates:
        """Some of them."""
        return Updates(self.down[rows], self.up[rows], self.norm[rows])


def cosines(a: Updates, b: Updates) -> Tensor:
    """Cosine between each update of a and each of b, 0 where one is zero, float64[len(a), len(b)].

    One product of matrices for each pair of columns of the factors. Where the updates themselves have fewer entries
    than that has terms (large ranks, small matrices), blocks of them are formed and multiplied instead.
    """
    (rank, wide), high, other = a.down.shape[1:], a.up.shape[1], b.down.shape[1]
    found = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.up.device)
    if rank * other * (wide + high) > wide * high:
        length = max(1, AT_ONCE // (wide * max(len(a), len(b))))
        for x, y in zip(a.up.split(length, dim=1), b.up.split(length, dim=1), strict=True):
            found += (x @ a.down).flatten(1) @ (y @ b.down).flatten(1).mT
        return found
    # Each column of all updates in one piece, or every product would copy it.
    up, down, b_up, b_down = (
        x.contiguous() for of in (a, b) for x in (of.up.permute(2, 0, 1), of.down.transpose(0, 1))
    )
    length = max(1, AT_ONCE // len(b))
    for start in range(0, len(a), length):
        rows = slice(start, start + length)
        total = torch.zeros_like(found[rows], dtype=a.up.dtype)
        for i in range(rank):
            for j in range(other):
                total.addcmul_(up[i, rows] @ b_up[j].mT, down[i, rows] @ b_down[j].mT)
        found[rows] = total
    return found


def own_cosines(a: Updates) -> Tensor:
    """`cosines` of updates among themselves, for little more than half of the work."""
    length = math.ceil(len(a) / 8)
    found = torch.empty(len(a), len(a), dtype=torch.float64, device=a.up.device)
    for start in range(0, len(a), length):
        rows = slice(start, start + length)
        found[rows, start:] = cosines(a[rows], a[start:])
        found[rows, :start] = found[:start, rows].mT
    return found


def module_kernel(down: Tensor, up: Tensor, scale: Tensor, columns: Tensor | None = None) -> Tensor:
    """Inner products ``<ΔW_i, ΔW_j>`` of the updates of one module, ΔW = s·up·down.

    Exact to 1e-5 of the product of the two norms. Unchanged when (up, down) becomes (up·G⁻¹, G·down), and when factors
    are padded with zeros to a larger rank.

    Args:
        down: First factors, float[N, r, in].
        up: Second factors, float[N, out, r].
        scale: s = alpha / rank of each update, float[N].
        columns: The j wanted, int64[n]; None: all.

    Returns:
        float64[N, n].
    """
    rows = Updates.of(down, up, scale)
    if columns is None:
        return own_cosines(rows) * rows.norm[:, None] * rows.norm
    return cosines(rows, rows[columns]) * rows.norm[:, None] * rows.norm[columns]


# ----------------------------------------------------------------------------------------------------------------------
# The kernels of all modules, and of any of them
# ----------------------------------------------------------------------------------------------------------------------


class UpdateKernels:
    """Kernels of the modules of a collection, and of any choice of modules; several threads may ask at once.

    Args:
        read_module: Reads the factors of some LoRAs' updates of a module.
        num_modules: P.
        train_rows: What kernels are normalised, centred and approximated by, int64[n].
        num_samples: N.
        seed: Decides the landmarks.
        device: Where inner products are computed.

    Attributes:
        precomputed: Whether `inputs` are kernels; else features.
        columns: The LoRAs that are the columns of the kernels, int64[n].
        at_once: How many conditions a unit of work best holds.
    """

    def __init__(
        self,
        read_module: ReadModule,
        num_modules: int,
        train_rows: np.ndarray,
        num_samples: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.read_module, self.num_modules, self.device = read_module, num_modules, device
        self.train, self.num_samples = np.asarray(train_rows), num_samples
        self.precomputed = num_samples <= EXACT
        self.columns = self.train
        if not self.precomputed:
            key = hashlib.sha256(f"{seed}/landmarks".encode()).digest()  # so that any seed will do
            drawn = np.random.default_rng(int.from_bytes(key, "little")).permutation(self.train)[:LANDMARKS]
            self.columns = np.sort(drawn)
        numbers = num_samples * len(self.columns)
        self.keeps = num_samples <= KEPT and num_modules * numbers <= KEPT_NUMBERS
        self.at_once = 32 if self.keeps else max(1, SUMS_AT_ONCE // numbers)
        self._kept: list[np.ndarray | None] = [None] * num_modules
        self._locks = [threading.Lock() for _ in range(num_modules)]
        self._full: np.ndarray | None = None
        self._one_sums = threading.Lock()

    def module(self, module: int) -> np.ndarray:
        """The kernel of one module over the mean of its diagonal on train rows, float32[N, n]; 0 if that is 0."""
        if not self.keeps:
            return self._compute(module)
        with self._locks[module]:
            if self._kept[module] is None:
                self._kept[module] = self._compute(module)
            return self._kept[module]

    def inputs(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """What classifiers read of the modules ``kept`` bool[K, P], for each condition.

        Centred on train rows and divided by the mean of the diagonal there, so that C means the same whatever is kept.
        All are 0 if no module is kept, or train rows differ by rounding only.

        Yields:
            The kernel float64[N, n], or features float64[N, at most n] if not ``precomputed``.
        """
        for kernel in self.sums(np.asarray(kept)):
            yield self._centred_kernel(kernel) if self.precomputed else self._features(kernel)

    def sums(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Sum of the kernels of modules kept, float64[N, n] for each of the conditions bool[K, P].

        Where more are kept than removed, it is that of all less that of the removed ones.
        """
        few = 2 * kept.sum(1) <= self.num_modules
        used = np.where(few[:, None], kept, ~kept)
        full = None if few.all() else self._sum_of_all()
        length = 1 if self.keeps else self.at_once
        for start in range(0, len(kept), length):
            chunk = range(start, min(start + length, len(kept)))
            shape = self.num_samples, len(self.columns)
            sums = {k: np.zeros(shape) if few[k] else full.copy() for k in chunk}
            for module in np.flatnonzero(used[chunk.start : chunk.stop].any(0)).tolist():
                kernel = self.module(module)
                for k in chunk:
                    if used[k, module]:
                        (np.add if few[k] else np.subtract)(sums[k], kernel, out=sums[k])
            for k in chunk:
                yield sums.pop(k)

    def _sum_of_all(self) -> np.ndarray:
        """Sum of the kernels of all modules, float64[N, n]."""
        if self.keeps and self._full is None:  # each thread takes those that no other one is at
            for module, lock in enumerate(self._locks):
                if not lock.locked():
                    self.module(module)
        with self._one_sums:
            if self._full is None:
                full = np.zeros((self.num_samples, len(self.columns)))
                for module in range(self.num_modules):
                    full += self.module(module)
                self._full = full
            return self._full

    def _read(self, module: int, rows: np.ndarray) -> Updates:
        return Updates.of(*self.read_module(module, rows)).to(self.device)

    def _compute(self, module: int) -> np.ndarray:
        """See `module`."""
        columns = self._read(module, self.columns)
        others = np.setdiff1d(np.arange(self.num_samples), self.columns)
        kernel = np.empty((self.num_samples, len(columns)), np.float32)
        norm = np.empty(self.num_samples)
        kernel[self.columns], norm[self.columns] = own_cosines(columns).cpu().numpy(), columns.norm.cpu().numpy()
        length = max(1, AT_ONCE // max(len(columns), columns.down[0].numel() + columns.up[0].numel()))
        for start in range(0, len(others), length):
            rows = others[start : start + length]
            updates = self._read(module, rows)
            kernel[rows], norm[rows] = cosines(updates, columns).cpu().numpy(), updates.norm.cpu().numpy()
        size = math.sqrt(np.square(norm[self.train]).mean())
        if size == 0:
            return np.zeros_like(kernel)
        norm /= size
        kernel *= norm[:, None]
        kernel *= norm[self.columns]
        return kernel

    def _centred_kernel(self, kernel: np.ndarray) -> np.ndarray:
        own = kernel[self.train]
        centred = KernelCenterer().fit(own).transform(kernel, copy=False)
        return _over(centred, np.trace(centred[self.train]) / len(own), np.trace(own) / len(own))

    def _features(self, kernel: np.ndarray) -> np.ndarray:
        """Of landmarks' own kernel ``UΛUᵀ`` the features ``kernel·UΛ^-½``, whose inner products approximate all."""
        values, vectors = np.linalg.eigh(kernel[self.columns])
        sound = values > ROUNDING * max(1.0, values[-1])
        features = kernel @ (vectors[:, sound] / np.sqrt(values[sound]))
        before = np.square(features[self.train]).sum(1).mean()
        features -= features[self.train].mean(0)
        size = np.square(features[self.train]).sum(1).mean()
        return _over(features, size, before, math.sqrt(size))


def _over(x: np.ndarray, size: float, before: float, by: float | None = None) -> np.ndarray:
    """Centred inputs over their size, or 0 if centring has left nothing but rounding; a module's own size is 1."""
    if size <= ROUNDING * max(1.0, before):
        return np.zeros_like(x)
    x /= size if by is None else by
    return x


# ----------------------------------------------------------------------------------------------------------------------
# The classifier
# ----------------------------------------------------------------------------------------------------------------------


def classify(
    x: np.ndarray, y: np.ndarray, rows: Mapping[str, np.ndarray], num_classes: int, precomputed: bool = True
) -> dict[str, np.ndarray]:
    """One support vector machine (Cortes & Vapnik, 1995), C chosen on validation rows, a smaller one if equal.

    On a kernel scikit-learn's `SVC`, a machine for each pair of classes; on features its `LinearSVC`, one for each
    class against the rest. Inputs that are all 0 predict the largest class of the train rows.

    Args:
        x: As `UpdateKernels.inputs` yields it: a kernel whose columns are the train rows, float64[N, n], or features.
        y: Class of each LoRA, int64[N]; every class has a train row.
        rows: Row indices of ``train``, ``validation`` and ``test``, int64 each.
        num_classes: C.
        precomputed: Whether x is a kernel.

    Returns:
        ``predicted`` int32[1, V + T] of the validation rows, then the test rows; ``train_accuracy``, ``train_f1`` and
        the chosen ``c``, float64[1].

    Raises:
        FloatingPointError: A machine has not converged.
    """
    train, validation = rows["train"], rows["validation"]
    held_out = np.concatenate([validation, rows["test"]])
    best, chosen, accuracy = None, GRID[0], -1.0
    if x[train].any():
        own, truth = x[train], y[train]
        for c in GRID:
            model = SVC(kernel="precomputed") if precomputed else LinearSVC(dual=False)
            model.set_params(C=c, max_iter=ITERATIONS)
            _fit(model, own, truth)
            found = float((model.predict(x[validation]) == y[validation]).mean())
            if found > accuracy:
                best, chosen, accuracy = model, c, found
            if accuracy == 1 or (precomputed and np.abs(model.dual_coef_).max() < c):
                break  # no other C can be chosen, or a larger one, which no coefficient is held back by, is the same
        fitted, predicted = best.predict(own), best.predict(x[held_out])
    else:
        largest = np.bincount(y[train]).argmax()
        fitted, predicted = np.full(len(train), largest), np.full(len(held_out), largest)
    train_accuracy, train_f1 = scored(y[train], fitted[None], num_classes)
    return {
        "predicted": predicted[None].astype(np.int32),
        "train_accuracy": train_accuracy,
        "train_f1": train_f1,
        "c": np.array([chosen]),
    }


def _fit(model: SVC | LinearSVC, x: np.ndarray, y: np.ndarray) -> None:
    """Fit a machine, which is not to stop before it has converged."""
    model.fit(x, y)
    stopped = model.fit_status_ if isinstance(model, SVC) else model.n_iter_ >= model.max_iter
    if stopped:
        told = f"after {np.max(model.n_iter_)} iterations at C = {model.C:g}"
        raise FloatingPointError(f"a support vector machine has not converged {told}")


def classify_each(
    kernels: UpdateKernels, kept: np.ndarray, y: np.ndarray, rows: Mapping[str, np.ndarray], num_classes: int
) -> dict[str, np.ndarray]:
    """`classify` of each of the conditions ``kept`` bool[K, P]: its arrays, with K in place of 1.

    The rows of ``train`` are to be those of the kernels.
    """
    found = [classify(x, y, rows, num_classes, kernels.precomputed) for x in kernels.inputs(kept)]
    return {name: np.concatenate([of_one[name] for of_one in found]) for name in found[0]}
