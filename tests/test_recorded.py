"""Steps that a GPU records: on a CPU a tape stands in, and what is recorded trains to the same bits."""

import gc
import weakref

import pytest
import torch
from recording import Refused, Tape, use_tape

from autoencoders import AUTOENCODERS, AutoencoderStack
from training import recorded, stacks
from training.attention import TOKEN, AttentionStack
from training.classifier import ClassifierStack, Models
from training.projections import Blocks, ProjectionStack
from training.recorded import Recorded
from training.stacks import Adam, Schedule, Split, Stored, standardise, train

CLASSES, HIDDEN = 3, 8
CPU = torch.device("cpu")
# Of each epoch 32, 32 and 21 rows; drawn two at a time, so that the last part is shorter.
SPLIT = Split(torch.arange(85), torch.arange(85, 110), torch.arange(110, 120))
RUNS = torch.tensor([0, 0, 1, 2])
TWO_OF_CLASSIFIERS = 2 * 32 * 3 * HIDDEN  # random numbers in two minibatches of a run


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels():
    return torch.arange(120) % CLASSES


def live(columns):
    return normal(4, columns, seed=7) > -0.5


def classifiers(live=None):
    x = standardise(normal(2, 120, 6), SPLIT.train)
    x[0, torch.arange(120), labels()] += 1.5
    models = Models(torch.tensor([0, 1, 0, 0]), RUNS, live)
    return ClassifierStack(x, labels(), SPLIT, models, CLASSES, seed=0, hidden=(HIDDEN,) * 3)


def attention(live=None):
    x = normal(1, 120, 3 * TOKEN)
    x[0, torch.arange(120), TOKEN + labels()] += 2
    models = Models(torch.zeros(4, dtype=torch.int64), RUNS, live)
    return AttentionStack(x, labels(), SPLIT, models, CLASSES, seed=0, hidden=HIDDEN)


def projections(live=None):
    shapes = [(2, 10, 12), (1, 8, 6), (2, 10, 12)]
    x = normal(1, 120, sum(rank * (wide + high) for rank, wide, high in shapes))
    start = [[normal(side, 3, seed=side) for side in sides] for sides in ((12, 6, 12), (10, 8, 10))]
    models = Models(torch.zeros(4, dtype=torch.int64), RUNS, live)
    blocks = Blocks(x, shapes, start, SPLIT.train)
    return ProjectionStack(blocks, labels(), SPLIT, models, CLASSES, seed=0, hidden=(HIDDEN,) * 3)


def autoencoders(name, train_rows=85):
    x = normal(4, 120, 2) @ normal(4, 2, 20, seed=1) + 0.3 * normal(4, 120, 20, seed=2)
    split = Split(torch.arange(train_rows), SPLIT.validation, SPLIT.test)
    return AutoencoderStack(name, x, split, 0, hidden=(12, 8))


CASES = {
    "classifiers": (classifiers, TWO_OF_CLASSIFIERS),
    "classifiers, masked": (lambda: classifiers(live(6)), TWO_OF_CLASSIFIERS),
    "attention": (attention, TWO_OF_CLASSIFIERS),
    "attention, masked": (lambda: attention(live(3)), TWO_OF_CLASSIFIERS),
    "projections": (projections, TWO_OF_CLASSIFIERS),
    "projections, masked": (lambda: projections(live(27)), TWO_OF_CLASSIFIERS),
    **{name: (lambda name=name: autoencoders(name), 2) for name in AUTOENCODERS},
    "a row left over": (lambda: autoencoders("vae", 65), 2),
}
SCHEDULE = Schedule(max_epochs=12, patience=2, lr=5e-2, lr_patience=0, weight_decay=0.01)


@pytest.fixture
def tape(monkeypatch):
    """Record on this CPU; returns a list that takes in what is recorded."""
    made = []

    def record(function, generators):
        made.append(len(made))
        return recorded_by_tape(function, generators)

    use_tape(monkeypatch)
    recorded_by_tape = recorded.record
    monkeypatch.setattr(recorded, "record", record)
    return made


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_train_to_the_same_bits(case, monkeypatch, request):
    network, at_once = CASES[case]
    eager = train(network(), SCHEDULE)
    made = request.getfixturevalue("tape")
    monkeypatch.setattr(stacks, "drawn_at_once", lambda device: at_once)
    rates, begin = [], Adam.begin
    monkeypatch.setattr(Adam, "begin", lambda *args: (rates.append(len(args[1].unique())), begin(*args)))
    stack = network()
    assert stack.minibatches.at_once == 2 < len(stack.minibatches.sizes) == 3
    taped = train(stack, SCHEDULE)
    assert len(set(eager.epochs.tolist())) > 1 and max(rates) > 1 and len(made) > 4  # models leave, and rates part
    assert torch.equal(taped.epochs, eager.epochs) and torch.equal(taped.best_loss, eager.best_loss)
    for name, tensor in eager.state.items():
        assert torch.equal(taped.state[name], tensor), name


class FrozenAdam(Adam):
    """Counts steps in Python, as `torch.optim.Adam` does by default: a recording repeats one of them for ever."""

    made = 0

    def step(self, params, gradients):
        for _, _, counts in self.slices:
            for count in counts:
                count.fill_(self.made)
        self.made += 1
        super().step(params, gradients)


def test_a_number_from_python_freezes_on_the_tape(monkeypatch, tape):
    right = train(classifiers(), SCHEDULE).state
    monkeypatch.setattr(stacks, "Adam", FrozenAdam)
    frozen = train(classifiers(), SCHEDULE).state
    monkeypatch.setattr(recorded, "is_recorded", lambda device: False)
    eager = train(classifiers(), SCHEDULE).state
    assert all(torch.equal(eager[name], right[name]) for name in right)
    assert not any(torch.equal(frozen[name], right[name]) for name in right)


def test_what_a_gpu_cannot_record_is_refused():
    x, mask, generator = torch.ones(3), torch.tensor([True, False, True]), torch.Generator()
    for function in (
        lambda: x.sum().item(),
        lambda: x[mask],
        lambda: mask.nonzero(),
        lambda: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda: torch.equal(x, x),
        lambda: torch.rand(3),
        lambda: torch.rand(3, generator=torch.Generator()),
    ):
        with pytest.raises(Refused), Tape([generator]):
            function()
    with Tape([generator]):
        torch.rand(3, generator=generator)


def test_a_cpu_calls_and_a_gpu_repeats(monkeypatch):
    calls, x = [], torch.zeros(2)

    def function():
        calls.append(x.clone())
        x.add_(1)

    for taped in (False, True):
        if taped:
            use_tape(monkeypatch)
        calls.clear()
        step, before = Recorded(function, CPU), x[0].item()
        for _ in range(5):
            step()
        assert x[0].item() == before + 5 and len(calls) == (2 if taped else 5)


def test_what_is_read_at_each_step_is_not_recorded(tape):
    stored = normal(120, 6).numpy()
    x = Stored(lambda rows: stored[rows], stored.shape, SPLIT.train, hold=None)
    models = Models(torch.zeros(4, dtype=torch.int64), RUNS)
    train(ClassifierStack(x, labels(), SPLIT, models, CLASSES, seed=0, hidden=(HIDDEN,) * 3), SCHEDULE)
    assert not tape


@pytest.mark.parametrize("case", ["classifiers", "attention", "projections", *AUTOENCODERS])
def test_nothing_of_a_training_is_left(tape, case):
    network, _ = CASES[case]
    short = Schedule(max_epochs=3, patience=3)
    train(network(), short)  # torch keeps frames of the first recording of a process, until Python looks for cycles
    stack, moments = network(), []
    seen = weakref.ref(stack), weakref.ref(next(iter(stack.params.values()))), weakref.ref(stack.x)
    begin = Adam.begin
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Adam, "begin", lambda self, *args: (moments.append(weakref.ref(self)), begin(self, *args)))
            train(stack, short)
        del stack
        assert tape and moments and all(reference() is None for reference in (*seen, *moments))
    finally:
        gc.enable()


def test_a_device_too_full_to_record_goes_on_without(monkeypatch):
    tried = []

    def full(function, generators):
        tried.append(function)
        raise torch.OutOfMemoryError

    expected = train(classifiers(), SCHEDULE)
    monkeypatch.setattr(recorded, "is_recorded", lambda device: True)
    monkeypatch.setattr(recorded, "record", full)
    trained = train(classifiers(), SCHEDULE)
    assert tried and all(torch.equal(trained.state[name], tensor) for name, tensor in expected.state.items())


def test_a_model_that_has_stopped_stays_while_recording_anew_takes_longer(monkeypatch):
    rates = torch.full((4,), 1e-3, dtype=torch.float64)
    left = {}
    for taped in (False, True):
        if taped:
            use_tape(monkeypatch)
        steps = stacks._Steps(classifiers(), SCHEDULE)
        steps.make_epoch(1, rates)  # of three steps
        monkeypatch.setattr(stacks, "RECORDING", 2)
        left[taped] = [steps.may_leave(stopped, rates) for stopped in (1, 2, 3)], steps.may_leave(1, rates / 2)
        steps.close()
    assert left == {False: ([True] * 3, True), True: ([False, False, True], True)}


@pytest.mark.parametrize("recording", [0, 1_000])
def test_who_has_stopped_and_stays_changes_nothing(monkeypatch, recording):
    constant = Schedule(max_epochs=60, patience=2, lr=0.02)
    expected = train(classifiers(), constant)
    assert len(expected.epochs.unique()) > 1
    use_tape(monkeypatch)
    monkeypatch.setattr(stacks, "RECORDING", recording)
    trained = train(classifiers(), constant)
    assert torch.equal(trained.epochs, expected.epochs) and torch.equal(trained.best_epoch, expected.best_epoch)
    for name, tensor in expected.state.items():  # one model's products are rounded otherwise than four models'
        torch.testing.assert_close(trained.state[name], tensor, rtol=1e-6, atol=1e-6)
