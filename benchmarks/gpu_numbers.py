"""Numbers of a GPU against those of a CPU, and of recorded steps against others: sections of benchmarks/gpu.py.

A recording is a CUDA graph of a training step, see training/recorded.py.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_networks import Bench, Case, drawn, small_cases, synchronise
from sd15_zoo import MODULES, draw

import training.recorded
import training.stacks
from experiment.threads import set_own_stream
from representations import FEATURES, matrix_features, pair_features
from training.kernels import KERNELS, UpdateKernels
from training.pca import PCA
from training.stacks import Adam, Schedule, start_thread, train

CPU = torch.device("cpu")
TOLERANCE = 1e-4
THREADS = 4


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def differs_by(reference: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | float | None = None) -> float:
    """Return the largest difference over the reference's largest magnitude, or a given scale; infinite for NaN."""
    reference, values = reference.detach().cpu().double(), values.detach().cpu().double()
    scale = reference.abs().max() if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    difference = (reference - values).abs()
    share = torch.where(difference == 0, 0, difference / scale.clamp(min=torch.finfo(torch.float64).tiny))
    return share.max().item() if share.isfinite().all() else float("inf")


State = dict[str, dict[str, torch.Tensor]]


def state_of(network) -> State:
    """Return copies of parameters and buffers."""
    return {
        kind: {name: tensor.detach().clone() for name, tensor in getattr(network, kind).items()}
        for kind in ("params", "buffers")
    }


def restore(network, state: State) -> None:
    """Give a network parameters and buffers, in place."""
    with torch.no_grad():
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                getattr(network, kind)[name].copy_(tensor)


def all_gradients(network, state: State) -> list[list[torch.Tensor]]:
    """Return the gradients of each minibatch of an epoch at a state, without a step between, on the CPU."""
    restore(network, state)
    gradients = []
    for sizes in network.begin(1):
        for size in sizes:
            gradients.append([gradient.detach().cpu().clone() for gradient in network.gradients(size)])
    return gradients


def worst_gradient(reference: list[list[torch.Tensor]], values: list[list[torch.Tensor]]) -> float:
    """Return the largest difference of gradients, ``||a - b|| / ||a||`` of each tensor.

    A tensor of less than a hundredth of the largest, such as rounding, counts as a share of that hundredth.
    """
    largest = max(gradient.norm().item() for gradients in reference for gradient in gradients)
    return max(
        (a - b).norm().item() / max(a.norm().item(), 0.01 * largest)
        for gradients in zip(reference, values, strict=True)
        for a, b in zip(*gradients, strict=True)
    )


def updated(network, state: State, weight_decay: float, gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the changes of parameters by three steps of these gradients, at two rates; on the CPU."""
    restore(network, state)
    first = next(iter(network.params.values()))
    rates = torch.full((len(first),), 5e-4, dtype=torch.float64)
    rates[: len(first) // 2] = 1e-3
    optimiser = Adam(network.params, weight_decay)
    optimiser.begin(rates, 0)
    for of_step in gradients[:3]:
        optimiser.step(network.params, [gradient.to(first.device) for gradient in of_step])
    parameters = zip(network.params.values(), state["params"].values(), strict=True)
    return [after.detach().cpu() - before.cpu() for after, before in parameters]


def compare_training(case: Case, device: torch.device) -> tuple[dict[str, float], float]:
    """Compare what training is made of, GPU and CPU.

    Returns:
        The differences of gradients, validation losses and updates, as shares of the largest number; and that of
        gradients with TF32.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        reference, network = case.make(CPU), case.make(device)
        if getattr(reference, "validation_noise", None) is not None:  # it is drawn on each device
            network.validation_noise = reference.validation_noise.to(device)
        state = state_of(reference)
        ours = all_gradients(reference, state)
        results = {"gradients": worst_gradient(ours, all_gradients(network, state))}
        with torch.no_grad():  # with the running statistics of the epoch
            results["validation loss"] = differs_by(reference.validation_losses(), network.validation_losses())
        changes = (updated(stack, state, case.weight_decay, ours) for stack in (reference, network))
        results["update"] = max(differs_by(a, b) for a, b in zip(*changes, strict=True))
    finally:
        torch.set_float32_matmul_precision(precision)
    return results, worst_gradient(ours, all_gradients(network, state))


def lora_factors(count: int, rank: int = 1) -> dict[tuple[int, int], tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Return down float[n, r, in] and up float[n, out, r] of LoRAs in SD1.5's shapes, by (in, out), and their modules.

    Of rank 1 they are those of benchmarks/sd15_zoo.py, else drawn.
    """
    loras = [draw(number) for number in range(count)]
    factors: dict[tuple[int, int], tuple[list[str], torch.Tensor, torch.Tensor]] = {}
    for sides in sorted(set(MODULES.values())):
        names = [name for name, shape in MODULES.items() if shape == sides]
        modules = [name for name in names for _ in loras]
        if rank == 1:
            down, up = (
                torch.stack([torch.from_numpy(lora[f"{name}.lora.{role}.weight"]) for name in names for lora in loras])
                for role in ("down", "up")
            )
        else:
            down = drawn(len(modules), rank, sides[0], device=CPU) / sides[0] ** 0.5
            up = 0.01 * drawn(len(modules), sides[1], rank, device=CPU, seed=1)
        factors[sides] = modules, down, up
    return factors


def all_features(factors: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Compute every representation that is computed, float32[n, F] by name, on the CPU in the end."""
    of_layers = [name for name, row in FEATURES.items() if (row.unit, row.made) == ("layer", "computed")]
    of_pairs = [name for name, row in FEATURES.items() if (row.unit, row.made) == ("pair", "computed")]
    parts: dict[str, list[torch.Tensor]] = {}
    for modules, down, up in factors.values():
        down, up = down.to(device), up.to(device)
        scale = torch.full((len(down),), 0.5, dtype=torch.float64, device=device)
        computed = [matrix_features(down, of_layers), matrix_features(up, of_layers)]
        computed.append(pair_features(down, up, modules, scale, of_pairs))
        for features in computed:
            for name, values in features.items():
                parts.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def compare_features(device: torch.device, count: int, rank: int) -> dict[str, float]:
    """Compare features, GPU and CPU, by representation: the largest difference in a column, of its largest number."""
    factors = lora_factors(count, rank)
    ours, theirs = all_features(factors, CPU), all_features(factors, device)
    return {name: differs_by(ours[name], theirs[name], ours[name].abs().amax(0).double()) for name in ours}


def principal_scores(device: torch.device, rows: int, columns: int, gram_side: int) -> torch.Tensor:
    """Return the scores of ten components of a falling spectrum, float32[rows, 10]."""
    turned = torch.linalg.qr(drawn(columns, 20, device=CPU)).Q
    x = (drawn(rows, 20, device=CPU, seed=1) * 0.7 ** torch.arange(20)) @ turned.mT + 3.0
    x = x.to(device)
    return PCA(10, gram_side=gram_side).fit(x[: rows * 7 // 10]).transform(x).cpu()


PCA_WAYS = {"PCA by rows": (200, 600, 3000), "PCA by columns": (600, 200, 3000), "PCA iterated": (600, 600, 100)}


def module_kernel(device: torch.device, name: str, samples: int = 60) -> torch.Tensor:
    """Return the kernel of one module of rank 4, float32[N, n]."""
    down, up = drawn(samples, 4, 48, device=CPU), drawn(samples, 40, 4, device=CPU, seed=1)
    scale = torch.linspace(0.5, 2, samples, dtype=torch.float64)
    train_rows = torch.arange(samples * 7 // 10)
    kernels = UpdateKernels(
        lambda _, rows: (down[rows], up[rows], scale[rows]),
        1,
        train_rows.numpy(),
        samples,
        kind=name,
        labels=(train_rows % 5).numpy(),
        device=device,
    )
    return torch.from_numpy(kernels.module(0)).clone()


def numbers(bench: Bench) -> str:
    """Compare gradients, features, components and kernels with the CPU's; TF32 is off for gradients alone."""
    device = bench.device
    wrong: list[str] = []

    def report(name: str, differences: dict[str, float]) -> None:
        off = [label for label, value in differences.items() if not value <= TOLERANCE]
        wrong.extend(f"{name} {label}".strip() for label in off)
        values = ", ".join(f"{label} {value:.1e}".strip() for label, value in differences.items())
        print(f"{'WRONG' if off else 'right'}  {name}: {values}", flush=True)

    for name, case in small_cases(fixed=True).items():
        compared, with_tf32 = compare_training(case, device)
        report(f"{name} ({with_tf32:.0e} with TF32)", compared)
    for rank, count in ((1, 2 if bench.small else 20), (4, 1 if bench.small else 2)):
        differences = compare_features(device, count, rank)
        report(f"features of {count} LoRAs of rank {rank}", differences)
    for name, size in PCA_WAYS.items():
        ours, theirs = principal_scores(CPU, *size), principal_scores(device, *size)
        report(name, {"": differs_by(ours, theirs, ours.abs().amax(0).double())})
    for name in KERNELS:
        report(name, {"": differs_by(module_kernel(CPU, name), module_kernel(device, name))})
    return f"WRONG: {', '.join(wrong)}" if wrong else f"all within {TOLERANCE:.0e} of the CPU's"


# ----------------------------------------------------------------------------------------------------------------------
# Recorded
# ----------------------------------------------------------------------------------------------------------------------

# Models leave at different epochs, and rates fall at different ones.
SCHEDULE = Schedule(max_epochs=12, patience=3, lr=3e-3, lr_patience=0)
Job = Callable[[torch.device], dict[str, torch.Tensor]]


class Eager(training.recorded.Recorded):
    """A step that is never recorded."""

    def __call__(self) -> None:
        """Do the step."""
        self.function()


@contextmanager
def not_recorded() -> Iterator[None]:
    """Train without recordings meanwhile; for all threads."""
    before = training.stacks.Recorded
    training.stacks.Recorded = Eager
    try:
        yield
    finally:
        training.stacks.Recorded = before


@contextmanager
def counted_recordings() -> Iterator[list[int]]:
    """Count the recordings that are made meanwhile, in a list of one number."""
    before, count, lock = training.recorded.record, [0], threading.Lock()

    def record(*arguments):
        with lock:
            count[0] += 1
        return before(*arguments)

    training.recorded.record = record
    try:
        yield count
    finally:
        training.recorded.record = before


def trained(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what a training leaves: states, epochs, and losses, on the CPU."""
    result = train(case.make(device), SCHEDULE)
    history = {"epochs": result.epochs, "best epoch": result.best_epoch, "best loss": result.best_loss}
    return {name: tensor.detach().cpu().clone() for name, tensor in (result.state | history).items()}


def jobs() -> dict[str, Job]:
    """Return all trainings, and what else the program's threads do on a GPU meanwhile."""
    trainings = {
        name: lambda device, case=case: trained(case, device) for name, case in small_cases(fixed=False).items()
    }
    others: dict[str, Job] = {
        name: lambda device, size=size: {"scores": principal_scores(device, *size)} for name, size in PCA_WAYS.items()
    }
    others |= {name: lambda device, name=name: {"kernel": module_kernel(device, name)} for name in KERNELS}
    return trainings | others


def differences(reference: dict[str, torch.Tensor], result: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are not the same to the bit."""
    return [name for name, tensor in reference.items() if not torch.equal(tensor, result[name])]


def begin_thread(device: torch.device) -> None:
    """Prepare this thread as the program's: with a stream of its own, as a recording is not made on the default one."""
    with training.recorded.capturing:
        start_thread(device)
        set_own_stream(device)


def in_threads(work: dict[str, Job], device: torch.device, alone: dict[str, dict], rounds: int) -> list[str]:
    """Do all jobs in each of four threads at once, each in an order of its own; return what was not as alone."""
    faults, barrier, names = [], threading.Barrier(THREADS), list(work)

    def thread(number: int) -> None:
        begin_thread(device)
        shift = number * len(names) // THREADS
        barrier.wait()
        for turn in range(rounds):
            for name in names[shift:] + names[:shift]:
                try:
                    different = differences(alone[name], work[name](device))
                    fault = f"{', '.join(different)} not as alone" if different else ""
                except Exception as error:
                    fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    if not any("Error" in known for known in faults):
                        print("".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
                if fault:
                    faults.append(f"thread {number}, round {turn}, {name}: {fault}")

    threads = [threading.Thread(target=thread, args=(number,), daemon=True) for number in range(THREADS)]
    synchronise(device)
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return faults


def recorded(bench: Bench) -> str:
    """Train every network recorded and not, then all in four threads at once: to the bit the same."""
    device, wrong, alone = bench.device, [], {}
    work, trainings = jobs(), small_cases(fixed=False)
    for name, job in work.items():
        with counted_recordings() as count:
            alone[name] = job(device)
        with not_recorded():
            different = differences(job(device), alone[name])
        wrong += [f"{name}, recorded and not"] * bool(different)
        if name in trainings and not (count[0] or bench.small):
            wrong.append(f"{name}, never recorded")
        said = f"DIFFERENT: {', '.join(different)}" if different else "the same bits"
        if name in trainings:
            epochs = alone[name]["epochs"].tolist()
            print(f"{name}: recorded ({count[0]} recordings) and not, epochs {epochs}: {said}", flush=True)
        elif different:
            print(f"{name}, twice: {said}", flush=True)
    rounds = 1 if bench.small else 3
    faults = in_threads(work, device, alone, rounds)
    by_job = Counter(fault.split(":")[0].split(", ", 2)[2] for fault in faults)
    print(
        f"in {THREADS} threads at once, {THREADS * rounds} times each: {len(faults)} not as alone {dict(by_job) or ''}"
    )
    for fault in faults[:10]:
        print(f"  {fault[:400]}", flush=True)
    wrong += [f"{name}, in threads" for name in by_job]
    if wrong:
        return f"WRONG: {'; '.join(wrong)}"
    return f"{len(trainings)} networks: recorded as not, and in {THREADS} threads as alone, to the bit"
