"""What the plan says before anything is trained: sizes, what cannot fit, and sketches in place of all weights."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from making import planted_collection, write_collection
from test_ablation_experiment import NETWORKS, run

import autoencoders
from data import index_collection
from experiment import arrays, dynamics, estimates, forecast
from experiment.arrays import SKETCH_WIDTH, SKETCHES, WEIGHTS, sketched, sketching
from experiment.estimates import Estimates, Speed, unfit, without_room
from experiment.extraction import extract
from experiment.flags import parse_arguments
from experiment.inputs import StoredRows, Weights
from experiment.phases import split_collection
from experiment.resident import Raw
from experiment.samples import Samples
from experiment.settings import Networks, resolve
from loras.lora_files import Layer
from representations import REPRESENTATIONS

CPU = torch.device("cpu")
FLAT = ["flat_vec", "pca", "vae"]
WIDE = 300  # inputs and outputs of a module: with rank 2 more numbers than a sketch has


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    root = tmp_path_factory.mktemp("collections") / "wide"
    planted_collection(root, per_class=10, width=WIDE)
    return root


def of(root: Path, *flags: str, networks: Networks = NETWORKS) -> Estimates:
    settings = resolve(parse_arguments(["--dataset", str(root), "--device=cpu", *flags]), networks)
    collection = index_collection(root)
    selected = np.ones(len(collection.layers), bool)
    return Estimates(settings, collection, selected, split_collection(collection, settings.seed))


# -- what is estimated ------------------------------------------------------------------------------------------------


def test_parameters_are_those_that_are_trained(wide):
    found, hidden = of(wide), 128
    for name, columns in (("stats", 8 * 7), ("flat_vec", 8 * 600), ("coupling", 4 * 4), ("pca", 20)):
        trained = (columns + 1) * hidden + 2 * (hidden + 1) * hidden + (hidden + 1) * 3
        assert found.of(name).parameters == trained, name
    classifier = (8 * 60 + 1) * hidden + 2 * (hidden + 1) * hidden + (hidden + 1) * 3
    assert found.of("vae").parameters == 8 * autoencoders.num_parameters("vae", 600, (64, 32)) + classifier
    assert found.of("update_kernel").parameters == 0
    assert found.of("flat_vec").memory > 20 * found.of("flat_vec").parameters  # and what it reads


def test_more_takes_longer_and_more_workers_less(wide):
    speed, found = Speed(1e10, 1e10), of(wide)
    for name in REPRESENTATIONS:
        assert found.of(name).seconds(speed, 1) > 0
    assert found.of("flat_vec").seconds(speed, 1) > found.of("stats").seconds(speed, 1)
    stats, quick = found.of("stats"), of(wide, "--quick")
    assert stats.seconds(speed, 2) == stats.seconds(speed, 1) / 2
    assert quick.ranking().seconds(speed, 1) < found.ranking().seconds(speed, 1)
    assert of(wide, "--sketch-flat").of("flat_vec").parameters < found.of("flat_vec").parameters
    measured = Speed.measure(CPU)
    assert measured.operations > 1e8 and measured.copied > 1e8


def plan(found: Estimates, names: list[str], speed: Speed, **how) -> list[str]:
    return forecast.lines(found, names, speed, Path("cache"), **how)


def test_the_plan_has_a_line_for_each_step_that_is_asked_for(wide):
    names = ["stats", "pca", "flat_vec", "update_kernel"]
    slow, lines = Speed(1e6, 1e6), plan(of(wide, "--controls=none"), names, Speed(1e6, 1e6), workers=2)
    assert re.fullmatch(r"estimate  about [\d.]+ (min|h) on this machine:", lines[0])
    assert [line[10:27].strip() for line in lines[1:5]] == ["reading weights", "ranking", "fitting", "phases 2 and 3"]
    assert [line.split()[0] for line in lines[5:]] == ["analysis", "memory", "disk"]
    assert lines[6].endswith("iB (ranking, 34.4 thousand parameters)") and lines[7].endswith(" free in cache")
    more = plan(of(wide, "--controls=basic", "--splits=3"), names, slow)
    assert [line[10:27].strip() for line in more[5:7]] == ["controls", "2 more splits"] and len(more) <= 12
    shuffled = plan(of(wide, "--controls=none", "--null-shuffles=2"), ["stats"], slow)
    assert "shuffled labels" in shuffled[4] and "stats" not in shuffled[4] and "fitting" not in "".join(shuffled)


def test_a_plan_of_less_than_a_minute_is_a_line(wide):
    (small,) = plan(of(wide, "--controls=none"), ["stats", "update_kernel"], Speed(1e10, 1e10), workers=2)
    amount = r"[\d.,]+ (MiB|GiB|TiB)"
    memory, disk = rf"memory {amount} of {amount} \(.*\)", rf"disk {amount} of {amount} free in cache"
    assert re.fullmatch(rf"estimate  about \d+ s on this machine; {memory}; {disk}", small)
    many = plan(of(wide, "--controls=none"), ["flat_vec"], Speed(1e10, 1e10), workers=2, memory=2**24)
    assert "2 workers at once may take" in many[-1] and "OMP_NUM_THREADS" in many[-1]


def test_what_is_not_in_the_plan_is_named_where_it_is_asked_for(wide, monkeypatch):
    def last(*flags):
        lines = plan(of(wide, *flags), ["stats"], Speed(1e10, 1e10))
        assert len(lines) <= 2
        return lines[-1] if len(lines) > 1 else None

    assert last("--controls=basic") is None and last("--controls=none", "--save-models=none") is None
    assert last("--holdout=artist", "--also=rank") == "not in it --holdout, --also, model/"
    assert last("--also=all", "--save-models=none") == "not in it --also"
    assert last("--save-models=update_views") == "not in it model/"
    monkeypatch.setattr(dynamics, "trainings_of", lambda _: {"a": {1: 0, 2: 1}})
    assert last("--controls=none") == "not in it steps of the training, model/"


def test_the_largest_parts_of_a_step_come_first_and_small_ones_together(wide):
    lines = plan(of(wide, "--controls=none"), list(REPRESENTATIONS), Speed(1e6, 1e6))
    (phases,) = (line for line in lines if "phases 2 and 3" in line)
    parts = phases.split(": ")[1].split(", ")
    assert parts[0].startswith("flat_vec ") and re.match(r"\d+ more ", parts[-1]) and len(parts) <= 6
    assert all(len(line) < 160 for line in lines)


def test_controls_cost_what_they_train(wide):
    def costs(*flags, names=("stats", "spectral", "update_kernel", "pca")):
        return forecast.control_costs(of(wide, *flags), names)

    def models(name, cost, found):
        return cost.operations / (found.training(name).operations / (2 * found.settings.num_runs))

    found = of(wide, "--controls=basic")
    basic = costs("--controls=basic")
    assert list(basic) == ["stats", "spectral", "update_kernel", "pca"]
    assert models("spectral", basic["spectral"], found) == pytest.approx(3 * 5)  # the sets that five folds choose
    conditions = models("stats", basic["stats"], found) / 3 - 5 - 6
    units = len(found.widths)
    assert 5 + 39 <= conditions <= 5 + 39 + 3 * (units + 1) + units
    assert costs("--controls=all")["stats"].operations > basic["stats"].operations
    assert list(costs("--controls=basic", names=["pca"])) == ["stats", "pca"]  # by which layers are ranked
    assert list(costs("--controls=basic", "--rank-by=val")) == ["stats", "update_kernel"]
    assert costs("--controls=none") == {}


def test_threads_that_share_a_gpu_share_its_speed_and_its_memory(wide):
    found, speed = of(wide, "--controls=none"), Speed(1e6, 1e6)
    found.device = torch.device("cuda", 0)  # which is not there
    two = plan(found, ["flat_vec"], speed, workers=2, memory=2**40)[:-2]
    assert plan(found, ["flat_vec"], speed, workers=8, streams=4, memory=2**40)[:-2] == two
    needed = found.of("flat_vec").memory
    assert "at once" not in plan(found, ["flat_vec"], speed, workers=1, memory=needed)[-1]
    note = plan(found, ["flat_vec"], speed, workers=4, streams=4, memory=2 * needed)[-1]
    assert note.startswith("memory    4 workers at once may take ") and note.endswith("done again alone")


def test_a_thousand_loras_on_a_gpu_take_about_as_long_as_they_took(wide):
    """Of the shapes of SD1.5, on an H100, as it was measured; once that was said to take nine minutes."""
    found = of(wide, networks=Networks())
    found.device = torch.device("cuda", 0)  # which is not there
    found.count, found.train, found.held_out, found.num_classes = 1000, 700, 100, 10
    found.widths = 35 * [320] + 35 * [640] + 16 * [768] + 42 * [1280]
    # Products of 32 rows: 16 operations for each byte of weights that is read.
    h100 = Speed(4e13, 2.965e12, estimates.KERNEL_SECONDS)
    # With and without the top layers; of units at once a share, by how many were at work.
    measured = {"flat_vec": 9.0, "stats": 0.6, "vae": 3.7, "contrastive": 12.2, "denoising": 3.8}
    steps = {"ranking": found.ranking()} | {name: found.of(name) for name in measured}
    for name, seconds in ({"ranking": 7.8} | measured).items():
        assert seconds / 2 < steps[name].seconds(h100, 1) < 2 * seconds, name
    assert (steps["ranking"].units, steps["flat_vec"].units, steps["stats"].units) == (10, 20, 2)


def test_few_loras_take_more_epochs_than_many(wide):
    """A network takes some steps to learn, and an epoch of few LoRAs has few."""
    found = of(wide)
    for count, epochs in ((21, 50), (84, 30), (700, 25)):
        found.train = count
        assert found._epochs(found.settings.classifier) == epochs


def test_a_plan_of_small_units_takes_as_long_as_they_take_to_start(wide):
    """Twenty trainings of next to nothing were once said to take a second together."""
    quick, speed = of(wide, "--quick"), Speed(1e12, 1e12)
    assert (quick.ranking().units, quick.of("stats").units) == (1, 2 * 3)  # all layers in a stack, and each of stats
    alone = quick.ranking().seconds(speed, 1) + quick.of("stats").seconds(speed, 1)
    assert alone == pytest.approx(7 * estimates.UNIT_SECONDS, rel=0.1)
    assert quick.reading().seconds(speed, 1) < 0.1
    one, two = (int(re.search(r"(\d+) s", plan(quick, ["stats"], speed, workers=n)[0])[1]) for n in (1, 2))
    assert (one, two) == (8, 11)  # the analysis takes 8, and processes start


def test_counts_are_said_in_words():
    counts = [7, 5_300, 10_900_000, 22_300_000_000]
    assert [estimates.in_words(count) for count in counts] == ["7", "5.3 thousand", "10.9 million", "22.3 billion"]


# -- what cannot fit --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_memory_is_named_with_both_sizes(wide):
    found, names = of(wide), ["stats", "flat_vec"]
    assert unfit(found, names) == {}
    needed = found.of("flat_vec").memory
    reasons = unfit(found, names, memory=needed)  # some is left for others
    assert list(reasons) == ["flat_vec"]
    size = f"{found.of('flat_vec').parameters / 1000:.1f} thousand parameters takes {needed / 2**20:.0f} MiB"
    assert size in reasons["flat_vec"] and reasons["flat_vec"].endswith("256 numbers of each layer instead")
    sketched = of(wide, "--sketch-flat")
    assert "sketch" not in unfit(sketched, names, memory=sketched.of("flat_vec").memory)["flat_vec"]


def test_autoencoders_that_take_hours_are_trained_only_where_they_are_asked_for_by_name(wide):
    most = of(wide).autoencoders("vae").parameters
    assert unfit(of(wide), ["vae"], parameters=most) == {}
    reason = unfit(of(wide), ["vae", "stats"], parameters=most - 1)
    assert list(reason) == ["vae"] and "thousand parameters" in reason["vae"] and "--sketch-flat" in reason["vae"]
    assert unfit(of(wide, "--representations=vae"), ["vae"], parameters=0) == {}


def test_weights_that_leave_no_room_on_disk_are_not_packed(wide, tmp_path):
    found, cache, names = of(wide), tmp_path / "cache", ["stats", "pca", "update_kernel"]
    packed = 30 * 8 * 600 * 4
    how = found.settings, index_collection(wide), names, cache
    assert without_room(*how, free=2 * packed) == {} and without_room(*how) == {}
    reasons = without_room(*how, free=packed)
    assert list(reasons) == ["pca", "update_kernel"] and "--cache-dir" in reasons["pca"]
    sketch = of(wide, "--sketch-flat").settings, *how[1:]
    assert list(without_room(*sketch, free=packed)) == ["update_kernel"]
    extract(index_collection(wide), [WEIGHTS], cache, CPU)
    assert without_room(*how, free=0) == {}  # they are there already


def test_a_run_leaves_out_what_cannot_fit_and_says_so_before_anything_is_trained(
    wide, tmp_path, capsys, monkeypatch, one_core
):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "15")  # MiB, of which the flattened weights' classifier takes more
    flags = ("--quick", "--top-k=3", "--num-runs=1", "--representations=stats,flat_vec")
    results = run(tmp_path, wide, *flags, expected=3)
    (left_out,) = results["representations_not_run"]
    assert left_out["representation"] == "flat_vec" and "this machine has 15 MiB" in left_out["reason"]
    assert list(results["baseline_results"]) == ["stats"]
    printed = capsys.readouterr().out
    assert printed.index("flat_vec        not run: to train") < printed.index("estimate  about")
    assert printed.index("estimate  about") < printed.index("Phase 1")
    assert run(tmp_path, wide, *flags, "--partial-ok") and "Nothing to do" in capsys.readouterr().out


# -- sketches ---------------------------------------------------------------------------------------------------------


def layer(module: str, role: str = "down", shape: tuple[int, int] = (2, WIDE)) -> Layer:
    return Layer(f"{module}.{role}", module, role, shape, "F32", "")


def test_a_sketch_is_scikit_learns_projection_decided_by_module_and_role():
    first = sketching(layer("a"))
    assert first.shape == (SKETCH_WIDTH, 600) and first.dtype == np.float32
    density = 1 / np.sqrt(600)
    assert first.nnz / (SKETCH_WIDTH * 600) == pytest.approx(density, rel=0.1)
    np.testing.assert_allclose(np.abs(first.data), np.sqrt(1 / density / SKETCH_WIDTH), rtol=1e-6)
    assert (first != sketching(layer("a"))).nnz == 0
    assert (first != sketching(layer("a", shape=(WIDE, 2)))).nnz == 0  # as many numbers
    for other in (layer("b"), layer("a", "up"), layer("a", shape=(2, 301))):
        assert sketching(other).shape != first.shape or (first != sketching(other)).nnz > 1000
    x = np.random.default_rng(0).standard_normal((40, 600), np.float32)
    sizes = np.square((first @ x.T).T).sum(1) / np.square(x).sum(1)
    assert sizes.mean() == pytest.approx(1, abs=0.05)
    assert sketching(layer("a", shape=(1, SKETCH_WIDTH))) is None


def test_the_pass_packs_sketches_of_each_layer_and_not_the_weights(tmp_path):
    root = write_collection(tmp_path / "zoo", modules=3, rank=2, width=WIDE)
    collection = index_collection(root)
    found = extract(collection, [SKETCHES], tmp_path / "cache", CPU)
    assert not found.path(WEIGHTS).exists()
    numbers = found.weights(sketched=True).read()
    assert numbers.shape == (6, 6 * SKETCH_WIDTH)
    whole = extract(collection, [WEIGHTS], tmp_path / "cache", CPU).weights().read()
    for depth, (item, columns) in enumerate(zip(collection.layers, collection.packed_layout.columns, strict=True)):
        block = numbers[:, depth * SKETCH_WIDTH : (depth + 1) * SKETCH_WIDTH]
        np.testing.assert_allclose(block, (sketching(item) @ whole[:, columns].T).T, rtol=1e-5, atol=1e-6)


def test_narrow_layers_are_their_own_sketch(tmp_path):
    collection = index_collection(write_collection(tmp_path / "zoo", width=8))
    layout = collection.packed_layout
    x = np.random.default_rng(0).standard_normal((3, layout.width), np.float32)
    np.testing.assert_array_equal(sketched(x, layout, [None] * len(layout.layers)), x)
    assert arrays.widths_of(layout, True) == arrays.widths_of(layout, False) == [16] * 4


def test_removing_a_layer_drops_its_block_and_leaves_the_others(tmp_path):
    root = write_collection(tmp_path / "zoo", modules=3, width=WIDE)
    collection = index_collection(root)
    found = extract(collection, [SKETCHES], tmp_path / "cache", CPU)
    selected = np.array([True, True, True, True, False, True])
    weights = Weights(Samples.of(collection), selected, found, sketched=True)
    kept = weights.without([1])
    expected = np.concatenate([np.arange(i * SKETCH_WIDTH, (i + 1) * SKETCH_WIDTH) for i in (0, 2, 3, 5)])
    np.testing.assert_array_equal(weights.columns(kept), expected)
    assert weights.spans(kept) == ((0, 256), (512, 1024), (1280, 1536))
    assert weights.widths.tolist() == [SKETCH_WIDTH] * 5
    rows = np.array([4, 0, 5])
    stored = StoredRows(Raw(weights.packed, CPU), rows, weights.spans(kept))
    whole = found.weights(sketched=True).read()[rows][:, expected]
    assert stored.shape == whole.shape
    for length in (1, 100, 10_000):
        np.testing.assert_array_equal(torch.cat(list(stored.split(length))), whole)
        blocks = list(stored.split(length, dim=1))
        np.testing.assert_array_equal(torch.cat(blocks, dim=1), whole)
        assert max(block.shape[1] for block in blocks) <= length


def test_a_run_on_sketches_says_so_in_every_row(wide, tmp_path, capsys, one_core):
    flags = ("--quick", "--top-k=3", "--num-runs=1", f"--representations=stats,{','.join(FLAT)}", "--sketch-flat")
    results = run(tmp_path, wide, *flags)
    assert results["config"]["sketch_flat"]
    for condition, layers in (("baseline_results", 8), ("ablation_results", 5)):
        assert {name for name, entry in results[condition].items() if entry.get("sketched")} == set(FLAT)
        assert results[condition]["flat_vec"]["num_features"] == layers * SKETCH_WIDTH
        assert "sketched" not in results[condition]["stats"]
    printed = capsys.readouterr().out
    assert printed.count("  sketched\n") == 2 * len(FLAT)
    text = (tmp_path / "out" / "ablation_wide" / "results.txt").read_text()
    assert text.count("  sketched\n") == len(FLAT) and "Sketched: " in text
    assert not list((tmp_path / "out" / ".cache").glob(f"*/features/{WEIGHTS}-*"))
