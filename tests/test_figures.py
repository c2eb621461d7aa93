"""The figures: what they say, that they are what they claim to be, and that nothing makes them fail."""

import copy
import io
import re
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import matplotlib
import numpy as np
import planting
import pytest
from matplotlib import colormaps, style
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text
from networks_of_loras import NETWORKS
from PIL import Image
from scipy.cluster import hierarchy

from analysis.attention import attention
from analysis.collection_map import collection_map
from analysis.evidence import Evidence, Predictions
from analysis.questions import Controls, analyse, plain
from analysis.removal_plan import Order, plan_controls
from loras.blocks import attention_of, blocks_of, projection_of
from loras.lora_files import Layer
from report import drawing, figures, fonts, rendering, wording
from report.by_class import Rows
from report.names import layer_names

pytestmark = pytest.mark.filterwarnings("error")
NAMES = [
    "layer_importance", "ablation_curves", "representations", "concept_layer_map", "layer_clusters", "rank_structure",
    "attention", "collection_map",
]  # fmt: skip
LABELLED = ("concept_layer_map", "rank_structure", "attention", "collection_map")  # with names of concepts
LONG = [f"a photograph of a very small {i % 7}th $thing$ in the style of the old masters, {i}" for i in range(40)]
ODD = ["w" * 200, "$x_1^2", "a_b & c_d", "<b>\\frac{", "two\nlines", "猫と犬", "\udcff\x00", ""]


def bounds(value, half=0.03):
    return [max(0.0, value - half), min(1.0, value + half)]


def estimate(value):
    return {"accuracy": value, "interval": bounds(value)}


def layers_section(layers, classes, roles, blocks, generator, modules=None):
    chance, records = 1 / classes, []
    block_of = dict(zip(modules, blocks_of(tuple(modules)), strict=True)) if modules else {}
    for depth in range(layers):
        module, role = depth // len(roles), roles[depth % len(roles)]
        accuracy = float(chance + (1 - chance) * generator.beta(2, 6) * (1 + depth % 2) / 2)
        records.append(
            {
                "layer": f"network.{module}.lora.{role}.weight",
                "depth": depth,
                "module": f"network_{module}",
                "role": role,
                "projection": ("q", "k", "v", "context ff out", None)[module % 5],
                "attention": (None, "attn1", "attn2")[module % 3],
                "block": f"block {depth * blocks // layers}" if blocks else None,
                "accuracy": accuracy,
                "interval": bounds(accuracy),
                "above_null": accuracy > chance + 0.1,
                "above_chance": accuracy > chance + 0.1,
            }
        )
        if modules:
            module = modules[module]
            records[-1] |= {"layer": f"{module}.{role}.weight", "module": module, "block": block_of[module] or None}
            records[-1] |= {"projection": projection_of(module) or None, "attention": attention_of(module) or None}
    groups = {}
    for role in roles[:layers]:
        mean = float(np.mean([record["accuracy"] for record in records if record["role"] == role]))
        groups[role] = {"layers": layers // len(roles), "mean": mean, "interval": bounds(mean, 0.001)}
    return {
        "chance": chance,
        "null_band": [0.7 * chance, 1.2 * chance],
        "needed": chance + 0.1,
        "num_above_null": sum(record["above_null"] for record in records),
        "num_above_chance": sum(record["above_chance"] for record in records),
        "records": records,
        "groups": {"role": groups},
        "better_role": max(groups, key=lambda role: groups[role]["mean"]) if len(groups) > 1 else None,
        "depth": depth_section(blocks),
    }


def depth_section(blocks):
    if blocks < 5:
        return {"blocks": blocks, "why": "fewer than 5 blocks", **dict.fromkeys(("r", "interval", "p"))}
    return {"blocks": blocks, "why": None, "r": 0.25, "interval": [-0.1, 0.5], "p": 0.2}


def robustness_section(layers, chance, top_k, verdict, draws):
    """A section of layers; the last point of its curves is of nothing left, which has no interval."""
    removed, most = np.unique(np.linspace(0, layers, 11).astype(int)), max(top_k, -(-layers // 10))
    unseen = verdict in ("no signal", "unseen")

    def curve(power):
        accuracy = chance + (0.95 - chance) * (1 - removed / layers) ** power
        sides = {"low": np.maximum(0, accuracy - 0.05).tolist(), "high": np.minimum(1, accuracy + 0.05).tolist()}
        sides["low"][-1] = sides["high"][-1] = None
        return {"removed": removed.tolist(), "accuracy": accuracy.tolist(), **sides, "area": 0.5}

    random = {"draws": draws, "accuracies": np.linspace(0.88, 0.92, draws).tolist()}
    random |= {"mean": 0.9, "min": 0.88, "max": 0.92} if draws else dict.fromkeys(("mean", "min", "max"))
    return {
        "runs": 3,
        "units_above": 1,
        "top_k": top_k,
        "unit": "layer",
        "units": layers,
        "removed": top_k,
        "most": most,
        "all": estimate(0.953),
        "without_top": estimate(0.872),
        "without_most": estimate(0.812),
        "without_bottom": estimate(0.93),
        "top_alone": estimate(0.6),
        "without_random": random,
        "curves": {"most_first": curve(1), "least_first": curve(0.3), "random_order": curve(0.5)},
        "survives_most": None if unseen else {"share": 0.83, "interval": [0.78, 0.88]},
        "survives_half": None if unseen else {"share": 0.61, "interval": [0.5, 0.7], "removed": most + 1},
        "verdict": verdict,
    }


def representations_section(accuracy, dropped):
    best = max(accuracy, key=accuracy.get)
    near = [name for name in accuracy if name != best and accuracy[name] > accuracy[best] - 0.02]
    intervals = {
        "baseline": {name: bounds(value) for name, value in accuracy.items()},
        "ablation": {name: bounds(value - dropped[name]) for name, value in accuracy.items()},
    }
    return {
        "conditions": {
            condition: {"chosen": best, "best": best, "intervals": of_condition, "not_worse": near}
            | {"tied_on_validation": [], "above_null": list(accuracy)}
            for condition, of_condition in intervals.items()
        },
        "drops": {
            name: {"drop": drop, "interval": [drop - 0.03, drop + 0.03], "significant": drop > 0.05, "p": 0.04}
            for name, drop in dropped.items()
        },
        "significant_losses": [name for name, drop in dropped.items() if drop > 0.05],
    }


def rank_section(modules, names, answerable, generator):
    found = {"r": 0.36, "interval": [-0.35, 0.81], "p": 0.3} if len(names) > 3 else None
    records = [
        {
            "module": module,
            "statistic": float(generator.gamma(2, 40)),
            "effect": 0.01 * (i % 50),
            "significant": i % 2 == 0,
        }
        for i, module in enumerate(modules)
    ]
    by_class = [
        {
            "class": name,
            "effective_rank": rank if answerable else None,
            "norm": rank,
            "spread": spread,
            "recall": recall,
        }
        for name, (rank, spread, recall) in zip(names, generator.random((len(names), 3)).tolist(), strict=True)
    ]
    return {
        "answerable": answerable,
        "why": None if answerable else "not answerable at rank 1: the effective rank never varies",
        "tested": "effective rank" if answerable else "norm of the update",
        "modules": records,
        "num_significant": (len(records) + 1) // 2,
        "complexity": {
            "by_class": by_class,
            "spearman_spread": found,
            "spearman_recall": found,
            "recall_by": "a_very_long_name_of_a_representation",
        },
    }


def modules_sections(records, names):
    """Sections of attention and of the map, of planted modules; there are up to four panels."""
    of_module = {record["module"]: record for record in records}
    modules = list(of_module)
    evidence = planting.evidence_of(layers=2, classes=len(names), each=8, tested=4)
    evidence = replace(evidence, classes=list(names), resamples=50, permutations=50)
    attended = planting.attended_of(len(names), evidence.truth, modules, planted=tuple(range(0, len(modules), 7)))
    places = [record["block"] or "" for record in of_module.values()]
    projections = [record["projection"] or "" for record in of_module.values()]
    distances = {"all": 6.0} | dict(zip(modules[:3], (3.0, 1.0, 0.0), strict=False))
    mapped = planting.mapped_of(evidence.y, evidence.rows["train"], distances)
    sections = (
        attention(evidence, replace(attended, blocks=places, projections=projections)),
        collection_map(evidence, mapped),
    )
    return dict(zip(("attention", "collection_map"), map(plain, sections), strict=True))


def results_of(
    layers=12, names=("cat", "dog", "house", "tree"), told=("stats", "ensemble"), robust=("stats",), *,
    top_k=3, roles=("down", "up"), blocks=4, answerable=True, quick=False, draws=20, modules=None,
):  # fmt: skip
    """Results with an analysis of this shape; numbers are random, and only what the pictures read is there.

    Of ``modules``, canonical ids of a network, the layers are named as in files.
    """
    layers = len(modules) * len(roles) if modules else layers
    generator, classes = np.random.default_rng(0), len(names)
    section = layers_section(layers, classes, roles, blocks, generator, modules)
    records = section["records"]
    ranking = sorted(records, key=lambda record: -record["accuracy"])
    tree = hierarchy.linkage(generator.random((layers, 3)), "average")
    clusters = hierarchy.fcluster(tree, 0.5, "distance")
    accuracy = {name: float(value) for name, value in zip(told, generator.uniform(0.6, 1, len(told)), strict=True)}
    dropped = {name: float(value) for name, value in zip(told, generator.uniform(-0.02, 0.1, len(told)), strict=True)}
    verdicts = ("distributed", "localized", "no signal", "redundant", "undecided", "unseen")
    analysis = {
        "layers": section,
        "robustness": {
            name: robustness_section(layers, 1 / classes, top_k, verdicts[i % 6], draws)
            for i, name in enumerate(robust)
        },
        "representations": representations_section(accuracy, dropped) if told else None,
        "layer_information": {
            "kappa": {"top_k": np.eye(top_k).tolist()},
            "union": {"best_alone": 0.442, "any_of_top_k": 0.837},
            "clusters": {
                "linkage": tree.tolist(),
                "order": hierarchy.leaves_list(tree).tolist(),
                "threshold": 0.5,
                "of_layer": clusters.tolist(),
                "count": int(clusters.max()),
            },
            "concept_clusters": {"of_class": [1 + c % 3 for c in range(classes)]} if classes > 3 else None,
        },
        "rank_structure": rank_section(
            list(dict.fromkeys(record["module"] for record in records)), names, answerable, generator
        ),
        "concepts": {
            "classes": list(names),
            "recall": generator.beta(2, 5, (layers, classes)).tolist(),
            "baseline": {name: [accuracy[name]] * classes for name in told},
            "drop": {name: [dropped[name]] * classes for name in told},
        },
        **modules_sections(records, names),
    }
    runs = {name: {"test_accuracy": {"mean": value, "runs": [value] * 3}} for name, value in accuracy.items()}
    ablated = {name: {"test_accuracy": {"mean": accuracy[name] - dropped[name]}} for name in told}
    return {
        "dataset": {"num_samples": 500},
        "config": {"top_k": top_k, "num_runs": 3, "quick": quick},
        "top_layers": [record["layer"] for record in ranking[:top_k]],
        "baseline_results": runs,
        "ablation_results": ablated,
        "analysis": analysis | {"alpha": 0.05},
    }


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def drawn(results):
    return figures.draw(results)


def drawn_figures(results):
    """The figures themselves, finished, by name; no file is made of them."""
    return {name: figure for name, _, figure in figures.finished_figures(results)}


def figure_of(results, name):
    """One of the figures, finished."""
    ((_, _, figure),) = figures.finished_figures(results, {name: "A finding."})
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_every_figure_is_there_in_three_formats(drawn):
    assert list(drawn) == [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg", "pdf")]


@pytest.mark.parametrize("name", NAMES)
def test_pngs_are_as_wide_as_a_page_at_300_dpi_and_hold_their_title(drawn, results, name):
    content = drawn[f"{name}.png"]
    image = Image.open(io.BytesIO(content))
    image.load()
    assert image.format == "PNG"
    assert image.width == 2070
    assert 300 < image.height < 2000
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert image.info["Title"] == figures.findings(results)[name]
    assert image.convert("RGB").getpixel((2, image.height - 2)) == (255, 255, 255)
    assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is on it
    assert len(content) < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_svgs_parse_hold_their_title_and_refer_to_nothing_outside(drawn, results, name):
    content = drawn[f"{name}.svg"]
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(72 * drawing.WIDTH)
    title = root.find(".//{http://purl.org/dc/elements/1.1/}title")
    assert title.text == figures.findings(results)[name]
    assert root.find(".//{http://purl.org/dc/elements/1.1/}date") is None
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert all("font-family: 'DejaVu Sans', Verdana, sans-serif" in text.get("style") for text in texts)
    assert any("cat" in (text.text or "") for text in texts) or name not in LABELLED
    links = [element.get("{http://www.w3.org/1999/xlink}href") for element in root.iter()]
    assert all(link.startswith(("#", "data:image/png")) for link in links if link)


@pytest.mark.parametrize("name", NAMES)
def test_all_colours_of_svgs_but_those_of_maps_have_one_for_the_dark(drawn, name):
    colors = set(
        re.findall(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})", drawn[f"{name}.svg"].decode().split("</style>")[1])
    )
    count = {"concept_layer_map": 6, "layer_clusters": 6, "attention": 4}.get(name, 0)  # colours of the legend
    steps = {to_hex(color) for color in colormaps["YlGnBu"](np.linspace(0, 1, count))}
    assert drawing.INK in colors and colors - steps <= {*drawing.ON_DARK, *drawing.ON_CELLS}


@pytest.mark.slow
def test_figures_of_a_paper_are_there_in_both_widths_where_they_can_be_read(results):
    some = only(results_of(layers=60, names=LONG), "layers", "concepts", "representations")
    files = figures.draw(some | {"figures": {"style": "paper"}})
    stems = ["concept_layer_map", "layer_importance", "layer_importance_column", "representations"]
    assert sorted({name.split(".")[0] for name in files}) == [*stems, "representations_column"]
    for name, content in files.items():
        if name.endswith(".png"):
            width = drawing.COLUMN if "_column" in name else drawing.WIDTH
            assert Image.open(io.BytesIO(content)).width == 300 * width


def only(results, *sections):
    """The results with no other sections of the analysis."""
    return results | {"analysis": {section: results["analysis"][section] for section in ("alpha", *sections)}}


def test_the_same_results_give_the_same_bytes_in_two_threads_and_under_other_settings(drawn, results):
    some = only(results, "layers", "representations")
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "axes.grid": True, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        with ThreadPoolExecutor(2) as threads:
            again = list(threads.map(figures.draw, [some, copy.deepcopy(some)]))
        assert dict(matplotlib.rcParams) == before
    names = tuple(f"{row.name}." for row in figures.FIGURES if {*row.needs} <= {"layers", "representations"})
    assert len(names) >= 2 and list(again[0]) == [name for name in drawn if name.startswith(names)]
    for files in again:
        assert all(content == drawn[name] for name, content in files.items())


def test_the_results_are_not_changed(drawn, results):
    assert drawn
    assert results == results_of()


# ----------------------------------------------------------------------------------------------------------------------
# What is missing
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [{}, {"analysis": None}, {"analysis": {}}])
def test_without_an_analysis_there_is_no_figure(results, absent):
    bare = {key: value for key, value in results.items() if key != "analysis"} | absent
    assert figures.draw(bare) == {}
    assert figures.findings(bare) == {}


@pytest.mark.parametrize(
    ("section", "gone"),
    [
        ("robustness", {"ablation_curves"}),
        ("representations", {"representations"}),
        *(
            pytest.param(section, {figure}, marks=pytest.mark.slow)
            for section, figure in (
                ("concepts", "concept_layer_map"),
                ("layer_information", "layer_clusters"),
                ("rank_structure", "rank_structure"),
                ("attention", "attention"),
                ("collection_map", "collection_map"),
            )
        ),
    ],
)
def test_a_missing_section_leaves_out_its_figure_and_only_that(results, section, gone):
    without = {key: value for key, value in results["analysis"].items() if key != section}
    for analysis in (without, without | {section: {}}):
        assert set(figures.findings(results | {"analysis": analysis})) == set(NAMES) - gone
    assert set(drawn_figures(results | {"analysis": without | {section: None}})) == set(NAMES) - gone


def test_one_layer_has_no_tree(results):
    found = copy.deepcopy(results)
    found["analysis"]["layer_information"]["clusters"] |= {"linkage": [], "order": [0], "count": 1}
    assert set(figures.findings(found)) == set(NAMES) - {"layer_clusters"}


def test_without_whole_pairs_there_is_no_figure_of_ranks(results):
    found = copy.deepcopy(results)
    found["analysis"]["rank_structure"] |= {"answerable": False, "tested": None, "modules": [], "num_significant": 0}
    assert drawn_figures(only(found, "rank_structure")) == {}
    assert set(figures.findings(found)) == set(NAMES) - {"rank_structure"}


def test_without_other_layers_of_the_same_roles_the_figure_says_so():
    results = only(results_of(robust=("stats", "ensemble"), told=("stats", "ensemble")), "layers", "robustness")
    random = results["analysis"]["robustness"]["stats"]["without_random"]
    random |= {"draws": 0, "accuracies": [], "mean": None, "min": None, "max": None}
    told = figures.findings(results)["ablation_curves"]
    assert f"(with all 95.3 %, {wording.NO_OTHERS})" in told and "None" not in told
    figure = drawn_figures(results)["ablation_curves"]
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [[], [wording.NO_OTHERS], [], []]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "one random draw" in entries  # of ensemble
    results["analysis"]["robustness"]["ensemble"]["without_random"] = random
    entries = [text.get_text() for text in drawn_figures(results)["ablation_curves"].legends[0].get_texts()]
    assert "one random draw" not in entries


def test_a_concept_without_a_test_lora_is_left_out(results):
    found = copy.deepcopy(results)
    section = found["analysis"]["concepts"]
    for of in (*section["recall"], *section["baseline"].values(), *section["drop"].values()):
        of[2] = None
    found["analysis"]["rank_structure"]["complexity"]["by_class"][2]["recall"] = None
    drawn = drawn_figures(only(found, "layers", "concepts", "representations", "rank_structure"))
    axes = drawn["concept_layer_map"].axes[0]
    assert sorted(label.get_text() for label in axes.get_yticklabels()) == ["cat", "dog", "tree"]
    assert np.isfinite(np.asarray(axes.images[0].get_array())).all()
    of_recall = drawn["rank_structure"].axes[1].lines[0].get_xdata()
    assert np.isnan(of_recall).tolist() == [False, False, True, False]


# ----------------------------------------------------------------------------------------------------------------------
# What they say
# ----------------------------------------------------------------------------------------------------------------------


def test_titles_carry_the_numbers_of_the_results(results):
    titles, analysis = figures.findings(results), results["analysis"]
    layers, role = analysis["layers"], analysis["layers"]["groups"]["role"]
    high, low = sorted(role, key=lambda name: -role[name]["mean"])
    assert titles["layer_importance"].startswith(f"{layers['num_above_chance']} of 12 layers ")
    assert f"{high} factors reach more than {low}" in titles["layer_importance"]
    means = (wording.percent(role[name]["mean"]) for name in (high, low))
    assert "({} and {} %)".format(*means) in titles["layer_importance"]
    for number in ("3 most predictive layers", "81.2 %", "95.3 %", "88.0 to 92.0 %", ": distributed"):
        assert number in titles["ablation_curves"]
    section = analysis["representations"]
    best = section["conditions"]["baseline"]["best"]
    assert titles["representations"].startswith(f"{best} is best")
    for kind in ("baseline_results", "ablation_results"):
        assert f"{wording.percent(results[kind][best]['test_accuracy']['mean'])} %" in titles["representations"]
    assert f" {len(section['significant_losses'])} of 2 representations" in titles["representations"]
    recall = np.array(analysis["concepts"]["recall"]).max(0)
    for edge, position in ((recall.max(), recall.argmax()), (recall.min(), recall.argmin())):
        assert f"(up to {wording.percent(edge)} %" in titles["concept_layer_map"]
        assert analysis["concepts"]["classes"][position] in titles["concept_layer_map"]
    clusters = analysis["layer_information"]["clusters"]["count"]
    assert f"12 layers form {wording.counted(clusters, 'cluster')} " in titles["layer_clusters"]
    assert "83.7 %" in titles["layer_clusters"] and "44.2 %" in titles["layer_clusters"]
    assert "in 3 of 6 modules" in titles["rank_structure"]
    assert titles["rank_structure"].endswith(" 0.36 (-0.35 to 0.81)")


def test_titles_say_when_there_is_nothing_to_find():
    results = results_of(answerable=False)
    section = results["analysis"]["layers"]
    section |= {"num_above_null": 0, "num_above_chance": 0, "better_role": None}
    for role in section["groups"]["role"].values():
        role |= {"mean": 0.25, "interval": [0.2, 0.3]}
    results["analysis"]["layer_information"]["clusters"]["count"] = 12
    compared = results["analysis"]["representations"]["conditions"]["baseline"]
    compared |= {"best": None, "not_worse": [], "above_null": []}
    titles = figures.findings(results)
    assert titles["layer_importance"].startswith("None of 12 layers ")
    assert titles["layer_importance"].endswith("factors reach 25.0 and 25.0 % on average")
    assert "more than" not in titles["layer_importance"]
    assert titles["representations"].startswith("None of 2 representations ")
    assert titles["layer_clusters"].startswith("No two of 12 layers ")
    assert titles["rank_structure"].startswith("Not answerable at rank 1")
    assert "in 3 of 6 modules" in titles["rank_structure"]
    assert set(drawn_figures(results)) == set(NAMES)  # without a best representation too


@pytest.mark.parametrize(
    ("known", "above", "expected"),
    [
        (12, 12, "12 of 12 layers predict "),
        (1, 1, "1 of 12 layers predicts "),
        (5, 3, "5 of 12 layers know "),
        (1, 0, "1 of 12 layers knows "),
    ],
)
def test_layers_that_know_something_are_told_from_those_above_chance(known, above, expected):
    results = results_of()
    results["analysis"]["layers"] |= {"num_above_null": known, "num_above_chance": above}
    title = figures.findings(results)["layer_importance"]
    assert title.startswith(expected) and ("none more" in title) == (above == 0) and ("3 more" in title) == (above == 3)


@pytest.mark.parametrize("losses", [[], ["stats"]])
def test_one_representation_is_not_compared_with_others(losses):
    results = results_of(told=("stats",))
    results["analysis"]["representations"]["significant_losses"] = losses
    title = figures.findings(results)["representations"]
    assert title.startswith("stats: ") and title.endswith(f"{'a' if losses else 'no'} significant loss")
    results["analysis"]["representations"]["conditions"]["baseline"]["best"] = None
    assert figures.findings(results)["representations"].startswith("stats is ")


@pytest.mark.parametrize(("near", "shown"), [(1, "(b not"), (2, "(b and c not"), (3, "(3 others not")])
def test_few_representations_that_are_as_good_are_named_and_many_counted(near, shown):
    results = results_of(told=("a", "b", "c", "d", "e"))
    section = results["analysis"]["representations"]["conditions"]["baseline"]
    section |= {"best": "a", "not_worse": ["b", "c", "d"][:near]}
    assert f"a is best by validation {shown} significantly worse)" in figures.findings(results)["representations"]
    section["tied_on_validation"] = ["b", "e"]
    equal = ", 1 of them equal on validation" if near > 1 else ""
    title = figures.findings(results)["representations"]
    assert f"a is best by validation {shown} significantly worse{equal})" in title


def test_one_unit_and_one_draw_are_told_in_the_singular():
    results = results_of(draws=1, top_k=1, layers=6)
    section = results["analysis"]["robustness"]["stats"]
    section |= {"unit": "module"}
    title = figures.findings(results)["ablation_curves"]
    assert section["most"] == 1 and "the most predictive module stats" in title
    assert "without a random other 90.0 %" in title


@pytest.mark.parametrize(("needed", "shown"), [(0.4567, "12: more than 45.7 %"), (1.04, "12: more than 100.0 %")])
def test_of_few_test_loras_no_accuracy_is_enough(needed, shown):
    results = only(results_of(), "layers")
    results["analysis"]["layers"]["needed"] = needed
    figure = drawn_figures(results)["layer_importance"]
    assert [text for entry in figure.legends[0].get_texts() if (text := entry.get_text()).endswith(shown)]
    assert figure.axes[0].get_ylim()[1] < 130 and max(figure.axes[0].get_yticks()) <= 100


def test_what_the_top_layers_know_together_is_of_layers_that_others_chose():
    results = only(results_of(), "layers", "layer_information")
    crossed = {"union": {"accuracy": 0.654, "by_chance": 0.321}, "first": {"accuracy": 0.432}}
    results["analysis"]["cross_fitted"] = crossed
    title = figures.findings(results)["layer_clusters"]
    assert all(number in title for number in ("65.4 %", "32.1 %", "43.2 %")) and "83.7" not in title
    results["analysis"]["cross_fitted"] = {"union": None, "first": None}
    assert "83.7 %" in figures.findings(results)["layer_clusters"]


def test_runs_are_told_where_the_accuracies_are_of_more():
    results = results_of(quick=True)
    results["baseline_results"]["stats"]["test_accuracy"]["runs"] = [0.9] * 10
    assert "81.2 % in 3 of the 10 runs (with all 95.3 %, " in figures.findings(results)["ablation_curves"]


def test_the_recall_of_the_figure_is_that_of_who_is_named(results):
    results = copy.deepcopy(only(results, "rank_structure"))
    axes = drawn_figures(results)["rank_structure"].axes[1]
    assert axes.get_xlabel() == "recall by a…a_representation, %"
    results["analysis"]["rank_structure"]["complexity"]["recall_by"] = None
    assert drawn_figures(results)["rank_structure"].axes[1].get_xlabel() == "recall by the best single layer, %"


def test_many_verdicts_are_counted_and_few_are_named():
    assert figures.findings(results_of(robust="abc"))["ablation_curves"].endswith(
        ": distributed; b localized, c no signal"
    )
    assert figures.findings(results_of(robust="abcdefg"))["ablation_curves"].endswith(
        ": distributed; 1 localized, 1 no signal, 1 redundant, 1 undecided, 1 unseen, 1 distributed"
    )


def test_the_title_on_the_figure_is_the_caption_and_tells_of_a_quick_run():
    results = results_of(quick=True)
    for name, figure in drawn_figures(results).items():
        assert figure.get_suptitle().replace("\n", " ") == f"{figures.findings(results)[name]} [a --quick run]"
    results = only(results, "layers", "representations") | {"figures": {"style": "paper"}}
    for config, note in (({"quick": True}, "[a --quick run]"), ({"quick": False}, "")):
        for figure in drawn_figures(results | {"config": results["config"] | config}).values():
            assert figure.get_suptitle() == note


def test_what_is_drawn_is_what_was_found(results):
    drawn = drawn_figures(results)
    records = results["analysis"]["layers"]["records"]
    down, _ = drawn["layer_importance"].axes
    points = {tuple(point) for line in down.lines for point in line.get_xydata().tolist() if line.get_marker() == "v"}
    assert points == {(r["depth"], 100 * r["accuracy"]) for r in records if r["role"] == "down"}
    curves = results["analysis"]["robustness"]["stats"]["curves"]
    first = drawn["ablation_curves"].axes[0].lines[0]
    assert first.get_ydata() == pytest.approx(100 * np.array(curves["most_first"]["accuracy"]))
    assert first.get_xdata().tolist() == curves["most_first"]["removed"]
    order = [label.get_text() for label in drawn["representations"].axes[0].get_yticklabels()]
    accuracy = [results["baseline_results"][name]["test_accuracy"]["mean"] for name in order]
    assert accuracy == sorted(accuracy)
    image = drawn["concept_layer_map"].axes[0].images[0].get_array()
    classes = [label.get_text() for label in drawn["concept_layer_map"].axes[0].get_yticklabels()]
    recall = np.array(results["analysis"]["concepts"]["recall"])
    rows = [results["analysis"]["concepts"]["classes"].index(name) for name in classes]
    assert np.asarray(image) == pytest.approx(100 * recall[::2].T[rows])


# ----------------------------------------------------------------------------------------------------------------------
# Layers by name
# ----------------------------------------------------------------------------------------------------------------------


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def intervals_of(axes):
    """The number of bars from the lower to the upper bound."""
    bars = (lines for lines in axes.collections if isinstance(lines, LineCollection) and lines.get_alpha())
    return sum(len(lines.get_segments()) for lines in bars)


def bands_of(axes):
    return sum(isinstance(band, PolyCollection) for band in axes.collections)


def test_top_layers_are_named_beside_their_marks_and_modules_below():
    results = only(results_of(modules=NETWORKS["SD 1.5, cross"][:8], top_k=3), "layers")
    figure, names = figure_of(results, "layer_importance"), layer_names(results["analysis"])
    written = [text for axes in figure.axes for text in texts_of(axes)]
    expected = [f"{i}: {names[layer].split(',')[0]}" for i, layer in enumerate(results["top_layers"], 1)]
    assert sorted(written) == expected
    below = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert below == [f"attn2 {x}" for x in ("q", "k", "v", "out")] * 2
    (above,) = figure.axes[0].child_axes
    assert [label.get_text() for label in above.get_xticklabels()] == ["IN01", "IN02"]


def test_without_room_for_their_names_top_layers_have_ranks_and_are_named_below():
    results = only(results_of(modules=NETWORKS["SD 1.5, cross"], top_k=30), "layers")
    figure = figure_of(results, "layer_importance")
    written = {text for axes in figure.axes for text in texts_of(axes)}
    assert written <= {str(rank) for rank in range(1, 31)} and len(written) > 20
    label, names = figure.axes[1].get_xlabel().replace("\n", " "), layer_names(results["analysis"])
    first = names[results["top_layers"][0]].replace(", ", " (") + ")"
    assert f"top: 1: {first}, 2: " in label and label.endswith("and 6 more")


@pytest.mark.parametrize(("layers", "known", "bars", "bands"), [(100, 30, 100, 0), (102, 30, 3, 2), (102, 20, 22, 2)])
def test_of_many_layers_only_those_that_stand_out_have_an_interval(layers, known, bars, bands):
    results = only(results_of(layers, blocks=10), "layers")
    section, top = results["analysis"]["layers"], results["top_layers"]
    section["num_above_null"] = known
    for i, record in enumerate(section["records"]):
        record["above_null"] = record["layer"] == top[0] or (i < 25 and record["layer"] not in top)
    known_ones = {record["layer"] for record in section["records"] if record["above_null"]}
    expected = len({*known_ones, *top}) if bars == 22 else bars
    figure = figure_of(results, "layer_importance")
    assert sum(map(intervals_of, figure.axes)) == expected
    assert sum(map(bands_of, figure.axes)) == bands


def test_the_band_is_from_the_lowest_to_the_highest_bound_of_a_block():
    results = only(results_of(120, blocks=4), "layers")
    down = figure_of(results, "layer_importance").axes[0]
    (band,) = (band for band in down.collections if isinstance(band, PolyCollection))
    corners = band.get_paths()[0].vertices
    for number in range(4):
        inside = [r for r in results["analysis"]["layers"]["records"] if r["block"] == f"block {number}"]
        ends = np.array([record["interval"] for record in inside if record["role"] == "down"])
        over = corners[(corners[:, 0] > inside[1]["depth"]) & (corners[:, 0] < inside[-2]["depth"])]
        assert (over[:, 1].min(), over[:, 1].max()) == pytest.approx((100 * ends.min(), 100 * ends.max()))


def test_clusters_are_a_matrix_of_factors_in_the_networks_order():
    section = only(results_of(4, blocks=2), "layers", "layer_information")
    clusters = section["analysis"]["layer_information"]["clusters"]
    # down 0 and down 2 are joined at 0.1, up 1 and up 3 at 0.2, both at 0.7
    clusters |= {"linkage": [[0, 2, 0.1, 2], [1, 3, 0.2, 2], [4, 5, 0.7, 4]], "of_layer": [1, 2, 1, 2], "count": 2}
    figure = figure_of(section, "layer_clusters")
    image = np.asarray(figure.axes[0].images[0].get_array())
    expected = [[1, 0.9, 0.3, 0.3], [0.9, 1, 0.3, 0.3], [0.3, 0.3, 1, 0.8], [0.3, 0.3, 0.8, 1]]
    assert image == pytest.approx(np.array(expected))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.split(", ")[1] for label in labels] == ["down", "down", "up", "up"]
    assert "2 layers\n  all down" in texts_of(figure.axes[1])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Two classes and two hundred
# ----------------------------------------------------------------------------------------------------------------------


def of_classes(count):
    return only(
        results_of(8, [f"concept {i}" for i in range(count)]),
        "layers", "concepts", "representations", "attention", "collection_map",
    )  # fmt: skip


def rows_of(axes):
    return [label.get_text().removeprefix("* ") for label in axes.get_yticklabels()]


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_each_of_a_few_classes_has_a_row(count):
    results = of_classes(count)
    for name, place in (("concept_layer_map", 0), ("attention", 1)):
        axes = figure_of(results, name).axes[place]
        assert sorted(rows_of(axes)) == sorted(f"concept {i}" for i in range(count))


def test_of_many_classes_both_ends_are_named_and_the_others_are_a_mean():
    results = of_classes(200)
    recall = np.array(results["analysis"]["concepts"]["recall"])
    order = [f"concept {i}" for i in np.argsort(-recall.max(0), kind="stable")]
    axes = figure_of(results, "concept_layer_map").axes[0]
    assert rows_of(axes) == [*order[:12], "mean of 176 others", *order[-12:]]
    middle = np.argsort(-recall.max(0), kind="stable")[12:-12]
    image = np.asarray(axes.images[0].get_array())
    assert image[12] == pytest.approx(100 * recall[::2, middle].mean(1))
    low, high = (wording.percent(value) for value in (recall.max(0)[middle].min(), recall.max(0)[middle].max()))
    assert f"others' best {low} to {high} %" in axes.get_ylabel()
    assert len(rows_of(figure_of(results, "attention").axes[1])) == 25
    entries = [text.get_text() for text in figure_of(results, "collection_map").legends[0].get_texts()]
    assert len(entries) == 26 and entries[-2] == "176 others"


def test_rows_of_classes_by_hand():
    assert Rows.of([0.5, float("nan"), 0.7]) == Rows((2, 0))
    assert Rows.of([0.5, float("nan"), 0.7], order=[0, 1, 2]) == Rows((0, 2))
    many = Rows.of(np.arange(50.0))
    assert (many.first[0], len(many.first), len(many.others), many.last[-1], len(many)) == (49, 12, 26, 0, 25)
    assert many.values(np.arange(50.0)[:, None])[12, 0] == pytest.approx(np.arange(12, 38).mean())
    assert many.labels(list("abcdefghijklmnopqrstuvwx"))[11:14] == ["l", "mean of 26 others", "m"]
    assert many.edges == [11.5, 12.5]


# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------


def of_constants(value, modules):
    """Results all of whose numbers are the same."""
    results = results_of(names=("cat", "dog"), modules=modules, top_k=1)
    analysis = results["analysis"]
    for record in (*analysis["layers"]["records"], *analysis["layers"]["groups"]["role"].values()):
        record |= {"accuracy": value, "mean": value, "interval": [value, value]}
    analysis["layers"] |= {"null_band": [value, value], "needed": value, "chance": value}
    analysis["concepts"]["recall"] = np.full_like(analysis["concepts"]["recall"], value).tolist()
    for i, record in enumerate(analysis["rank_structure"]["complexity"]["by_class"]):
        record |= {"effective_rank": value * (4 + 1e-9 * i), "spread": value, "recall": value}
    for record in analysis["rank_structure"]["modules"]:
        record["effect"] = value
    for curve in analysis["robustness"]["stats"]["curves"].values():
        curve |= {"removed": [0], "accuracy": [value], "low": [value], "high": [value]}
    for panel in analysis["collection_map"]["panels"]:
        panel |= {"points": np.zeros_like(panel["points"]).tolist(), "explained": [0.0, 0.0]}
    modules = analysis["attention"]["modules"]
    for record in modules:
        record |= {"attention": 1 / len(modules), "interval": None, "contribution": 0.0}
    for record in analysis["attention"]["classes"]:
        record["contribution"] = [0.0] * len(modules)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("value", "count"), [(0.0, 1), (1.0, 8)])
def test_axes_of_constants_are_those_of_their_size(value, count):
    drawn = drawn_figures(of_constants(value, NETWORKS["SD 1.5, cross"][:count]))
    for name, figure in drawn.items():
        for axes in figure.axes:
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                assert not axis.get_offset_text().get_text(), name
                ticks = [t for t in axis.get_ticklocs() if min(limits) <= t <= max(limits)]
                written = [text for text in axis.get_major_formatter().format_ticks(ticks) if text]
                assert not [text for text in written if re.fullmatch(r"-.*|[0-9.]{7,}", text)], (name, written)
            assert axes.get_ylim()[0] != axes.get_ylim()[1]
    limits = drawn["layer_importance"].axes[0].get_ylim()
    assert limits[0] == 0 and limits[1] <= 127


def test_a_class_that_nothing_is_known_of_has_no_row():
    results = of_classes(3)
    for record in results["analysis"]["concepts"]["recall"]:
        record[:] = [None, None, None]
    assert "concept_layer_map" not in figures.findings(results)


# ----------------------------------------------------------------------------------------------------------------------
# Extremes
# ----------------------------------------------------------------------------------------------------------------------

EXTREMES = {
    "smallest": {"layers": 2, "names": ("w" * 200, "x"), "told": ("stats",), "top_k": 1, "blocks": 1},
    "one role, no blocks": {"layers": 5, "names": ODD, "roles": ("up",), "blocks": 0, "answerable": False},
    "no representation": {"told": (), "robust": ()},
    "nothing to draw": {"told": ("stats",), "robust": ("a", "b", "c"), "draws": 0},
    "long names": {"layers": 128, "names": LONG, "told": [f"representation_{i}" for i in range(15)], "blocks": 16},
    "largest": {"layers": 600, "names": LONG + LONG[:20], "told": [f"another_{i}" for i in range(20)],
                "robust": [f"another_{i}" for i in range(20)], "top_k": 20, "blocks": 57},
    "each layer": {"layers": 300, "names": LONG, "top_k": 20, "blocks": 57},
    "blocks of SDXL": {"layers": 1444, "names": LONG, "top_k": 20, "blocks": 25},
    "neighbours": {"layers": 1444, "names": LONG, "blocks": 0},
    "SDXL": {"modules": NETWORKS["SDXL"], "names": LONG, "top_k": 10},
    "language model": {"modules": NETWORKS["LLM"], "names": LONG, "top_k": 5},
    "encoder and UNet": {"modules": NETWORKS["SD 1.5 and text"], "names": LONG[:2], "top_k": 10},
    "200 classes": {"modules": NETWORKS["small LLM"], "names": [f"{name} {i}" for i in range(5) for name in LONG]},
    "more blocks than room": {"layers": 1444, "names": LONG, "top_k": 20, "blocks": 361},
}  # fmt: skip


DEFAULT = ("smallest",)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=() if name in DEFAULT else pytest.mark.slow)
        for name, shape in EXTREMES.items()
    ],
)
def test_no_text_lies_on_another_or_leaves_the_figure_which_stays_small(monkeypatch, shape):
    original, texts = Text.draw, []

    def draw(text, renderer):  # what is really drawn: matplotlib keeps labels of ticks outside the axes too
        texts.append(text)
        original(text, renderer)

    for name, figure in drawn_figures(results_of(**shape)).items():
        with monkeypatch.context() as patched, style.context(drawing.STYLE, after_reset=True), fonts.quietly():
            patched.setattr(Text, "draw", draw)
            assert len(rendering.saved(figure, "png", name)) < 600_000
            told = [text for text in texts if text.get_visible() and text.get_text().strip()]
            boxes = np.array([text.get_window_extent().extents for text in told])
        texts.clear()
        width, height = figure.bbox.size
        outside = (boxes[:, :2] < -1).any(1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
        assert not outside.any(), (name, [text.get_text() for text, out in zip(told, outside, strict=True) if out])
        for i, box in enumerate(boxes):
            over = np.minimum(box[2:], boxes[i + 1 :, 2:]) - np.maximum(box[:2], boxes[i + 1 :, :2])
            hit = np.flatnonzero((over > 4).all(1))  # pixels; the boxes of neighbours may touch
            assert not len(hit), (name, told[i].get_text(), [told[i + 1 + j].get_text() for j in hit])


@pytest.mark.slow
def test_the_oddest_names_make_valid_files():
    files = figures.draw(results_of(**EXTREMES["one role, no blocks"]))
    assert len(files) == 3 * len(NAMES)
    for name, content in files.items():
        if name.endswith("svg"):
            ElementTree.fromstring(content)
        elif name.endswith("png"):
            Image.open(io.BytesIO(content)).verify()


# ----------------------------------------------------------------------------------------------------------------------
# The contract
# ----------------------------------------------------------------------------------------------------------------------


def test_the_analysis_itself_is_drawn():
    generator = np.random.default_rng(0)
    layers = [
        Layer(f"layer {d}", f"blocks_{d // 4}_{d // 2}_to_q", ("down", "up")[d % 2], (1, 4), "F32", f"block {d // 4}")
        for d in range(8)
    ]
    y, names = np.arange(120) % 4, ("stats", "spectral")
    rows = {"train": np.arange(60), "validation": np.arange(60, 80), "test": np.arange(80, 120)}

    def guessed(*shape):
        truth = y[60:]
        return np.where(generator.random((*shape, 60)) < 0.6, truth, generator.integers(0, 4, (*shape, 60)))

    alone = {"predicted": guessed(8, 3), "log_loss": generator.random((8, 3, 60)).astype(np.float32)}
    predictions = Predictions(np.arange(60, 120), y[60:], alone)
    for condition in ("baseline", "ablation"):
        predictions.conditions[condition] = {name: {"predicted": guessed(3)} for name in names}
    e = Evidence(layers, list("abcd"), y, rows, None, np.arange(8), 2, predictions, 0, 50, 50)
    conditions = plan_controls(Order.of_layers(e), runs=3, draws=5, points=5, seed=0)
    controls = Controls(
        "basic",
        {"stats": (conditions, guessed(*conditions.kept.shape[:2])[..., 20:])},
        attended=planting.attended_of(4, e.truth, [layer.module for layer in layers[::2]]),
        mapped=planting.mapped_of(y, rows["train"], {"all": 3.0}),
    )
    features, updates = generator.random((120, 8, 7)), generator.random((120, 4, 2))
    accuracies = {name: {"test_accuracy": {"mean": 0.7, "runs": [0.7] * 3}} for name in names}
    results = {
        "dataset": {"num_samples": 120},
        "config": {"top_k": 2, "num_runs": 3, "quick": True},
        "top_layers": ["layer 0", "layer 1"],
        "baseline_results": accuracies,
        "ablation_results": accuracies,
        "analysis": analyse(e, names, features, updates, {}, controls),
    }
    assert list(drawn_figures(results)) == NAMES
    results["analysis"] = analyse(e, (), features, np.ones((120, 4, 2)), {}, Controls("none"))
    assert results["analysis"]["attention"] is None and results["analysis"]["collection_map"] is None
    rest = {"ablation_curves", "representations", "attention", "collection_map"}
    assert set(drawn_figures(results)) == set(NAMES) - rest
