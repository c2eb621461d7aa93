"""The results in words: rows as they arrive, and results.json -> results.txt, which holds nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from report.cautions import checks, warnings
from report.sentences import NO_CONTROLS, answers, metric, signed, wrapped
from report.tables import Table, tables

SMALL_VALIDATION = 50  # rows; below this the results say how little early stopping rests on
LAYER_HEADER = f"{'rank':>4}  {'test accuracy':>13}  {'validation':>10}  {'role':4}  layer"
RESULT_HEADER = f"{'representation':<15} {'features':>8} {'test accuracy':>13}  {'test F1':>13}"
WIDTH = 118  # of a line of results.txt
WORD_WIDTH = 40  # of a name in a column of results.txt that is not the last


# ----------------------------------------------------------------------------------------------------------------------
# Lines as they arrive
# ----------------------------------------------------------------------------------------------------------------------


def settings_lines(config: dict, environment: dict, output_dir: object) -> str:
    """The resolved settings and the device."""
    shown = ", ".join(f"{key} {config[key]}" for key in ("top_k", "num_runs", "rank_by", "seed", "quick"))
    classifier, autoencoder = config["classifier"], config["autoencoder"]
    threads = f", {environment['threads']} threads" if config["device"] == "cpu" else ""
    return "\n".join(
        [
            f"settings  {shown}, output_dir {output_dir}",
            f"          at most {classifier['max_epochs']} epochs, patience {classifier['patience']}; autoencoders "
            f"{autoencoder['max_epochs']} and {autoencoder['patience']}",
            f"device    {environment['device']}{threads}",
        ]
    )


def collection_lines(header: dict, representations: int) -> str:
    """The collection in one paragraph, and what will be done with it."""
    dataset, top_k = header["dataset"], header["config"]["top_k"]
    lines = _collection(header)
    lines += [f"ignored   {pattern} ({count})" for pattern, count in dataset["ignored"].items()]
    if dataset["skipped"]:
        lines.append(
            f"skipped   {len(dataset['skipped'])} left out, as --skip-bad asks; results.json lists them and why"
        )
    noun = "representation" if representations == 1 else "representations"
    phases = f"{representations} {noun} without the top {top_k}, and with all layers"
    return "\n".join([*lines, f"plan      rank {dataset['num_layers_selected']} layers; then {phases}"])


def not_run_line(representation: str, reason: str) -> str:
    """Why a representation is left out."""
    return f"{representation:<15} not run: {reason}"


def layer_row(rank: int, record: dict) -> str:
    """One aligned row of the layer ranking, accuracies in percent."""
    accuracy = f"{100 * record['accuracy']:>6.1f} ± {100 * record['accuracy_std']:<4.1f}"
    return f"{rank:>4}  {accuracy}  {100 * record['val_accuracy']:>10.1f}  {record['role']:4}  {record['layer']}"


def result_row(name: str, entry: dict) -> str:
    """One aligned row of a representation's metrics, in percent."""
    row = f"{name:<15} {entry['num_features']:>8} {metric(entry['test_accuracy'])}  {metric(entry['test_f1'])}"
    return row.rstrip()


# ----------------------------------------------------------------------------------------------------------------------
# results.txt
# ----------------------------------------------------------------------------------------------------------------------


def render_text(results: dict) -> str:
    """The whole of results.txt from the content of results.json."""
    sections = (_what_was_run, short_answers, _with_care, _layers, _representations, _evidence, _not_run, _notes)
    return "\n\n".join("\n".join(lines) for section in sections if (lines := section(results))) + "\n"


def short_answers(results: dict) -> list[str]:
    """The five answers and hypotheses in lines, as the console and results.txt show them; none without an analysis."""
    told = answers(results)
    if not told:
        return []
    level = results["analysis"]["level"]
    title = f"Short answers (in brackets: intervals of {100 * level:.0f} % over the test LoRAs)"
    lines = [title, "-" * len(title)]
    for position, answer in enumerate(told, 1):
        lines += [f"{position}. {answer.question}"]
        lines += [line for sentence in answer.sentences for line in wrapped(sentence, WIDTH, "   ", "   ")]
        hypothesis = f"Hypothesis: {answer.hypothesis}: {answer.outcome.upper()}. {answer.evidence}"
        lines += wrapped(hypothesis, WIDTH, "   ", "   ")
    return lines


def _with_care(results: dict) -> list[str]:
    """Warnings; where there was no analysis only that, as the head already tells --quick."""
    if not results.get("analysis"):
        return wrapped(NO_CONTROLS, WIDTH)
    lines = [line for warning in warnings(results) for line in wrapped(warning, WIDTH, "- ", "  ")]
    return ["To bear in mind", "---------------", *lines] if lines else []


def _table_lines(table: Table, columns: Sequence[str] = ()) -> list[str]:
    """A table in aligned columns, all or those named and the last; a long name is cut unless it stands last."""
    last = len(table.columns) - 1
    kept = [i for i, column in enumerate(table.columns) if not columns or column in columns or i == last]
    rows = [
        [row[i] if i == last else _cut(row[i]) for i in kept] for row in (table.columns, *table.rows[: table.shown])
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(kept, row, widths, strict=True)
        lines.append(
            "  ".join(f"{cell:{'<' if i in table.words else '>'}{width}}" for i, cell, width in cells).rstrip()
        )
    more = len(table.rows) - table.shown
    lines += [f"({more} more in results.json)"] if more > 0 else []
    return lines + (wrapped(table.note, WIDTH) if table.note else [])


def _cut(word: str) -> str:
    return word if len(word) <= WORD_WIDTH else f"{word[: WORD_WIDTH - 3]}..."


def _what_was_run(results: dict) -> list[str]:
    title = f"LoRA layer ablation: {results['dataset']['name']}"
    lines = [title, "=" * len(title)]
    if results["config"]["quick"]:
        lines.append("A --quick run: fewer runs and epochs than the experiment is defined with. Not for reporting.")
    return [*lines, *run_lines(results)]


def run_lines(results: dict) -> list[str]:
    """What was run on what, and chance: each line a word in 10 columns, and what it is."""
    config, chance = results["config"], results["chance"]
    return [
        *_collection(results),
        f"training  {config['num_runs']} runs, seed {config['seed']}, on {config['device']}",
        f"chance    accuracy {100 * chance['accuracy']:.1f}, macro-F1 {100 * chance['f1']:.1f}: "
        "always guessing the largest class of the test rows",
    ]


def _collection(results: dict) -> list[str]:
    """The collection in one paragraph."""
    dataset = results["dataset"]
    split, sizes = dataset["split_sizes"], sorted(set(dataset["class_counts"].values()))
    per_class = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    names = ", ".join(dataset["classes"][:12]) + (", ..." if len(dataset["classes"]) > 12 else "")
    built_in = dataset["source"] == "built-in digits"
    pattern, groups = results["config"]["layers"], ""
    if dataset["group_column"] is not None:
        groups = f"; {dataset['num_groups']} groups by {dataset['group_column']}, each in one part"
    return [
        "data      the BUILT-IN DIGITS collection, trained by this program: no LoRAs of yours are read"
    ] * built_in + [
        f"data      {dataset['num_samples']} LoRAs of {dataset['num_layers']} layers in {dataset['path']}",
        *[f"layers    {dataset['num_layers_selected']} of them match {pattern}: the others are left out"]
        * bool(pattern),
        f"classes   {dataset['num_classes']} from {dataset['label_source']}, {per_class} LoRAs each: {names}",
        f"split     {split['train']} train, {split['validation']} validation, {split['test']} test{groups}",
    ]


def _layers(results: dict) -> list[str]:
    config, ranking = results["config"], results["layer_ranking"]
    chosen_by = {"test": "test accuracy, as the experiment is defined", "val": "validation accuracy"}[config["rank_by"]]
    middle, last = ranking[len(ranking) // 2], ranking[-1]
    if results.get("analysis"):
        shown = _table_lines(tables(results)["ranking"], ("rank", "test accuracy", "95 % interval", "p", "validation"))
    else:
        shown = [LAYER_HEADER, *(layer_row(rank, record) for rank, record in enumerate(ranking[: config["top_k"]], 1))]
    return [
        f"1. Which layers predict? Each of {len(ranking)} alone, on 7 statistics, ranked by {chosen_by}",
        *shown,
        f"The layer in the middle of the ranking reaches {100 * middle['accuracy']:.1f}, the last "
        f"{100 * last['accuracy']:.1f}.",
    ]


def _evidence(results: dict) -> list[str]:
    """The tables that only an analysis fills, one below the other, and how the controls came out."""
    made, lines = tables(results), []
    for name in ("differences", "controls", "places", "conditional", "concepts"):
        if name in made:
            lines += [made[name].title, *_table_lines(made[name]), ""]
    said = warnings(results)
    told = [line for check in checks(results) if check not in said for line in wrapped(check, WIDTH, "- ", "  ")]
    return lines + ["Controls", *told] * bool(told)


def _representations(results: dict) -> list[str]:
    k, ranking = results["config"]["top_k"], results["layer_ranking"]
    total, of_module = len(ranking), Counter(record["module"] for record in ranking)
    whole = {module for module, roles in of_module.items() if roles == 2}  # the down and the up
    baseline, ablation = results["baseline_results"], results["ablation_results"]
    pairs = len({record["module"] for record in ranking[:k]} & whole)
    rows = []
    for name in sorted(baseline, key=lambda name: -baseline[name]["test_accuracy"]["mean"]):
        all_layers, left = baseline[name], ablation[name]
        change = signed(left["test_accuracy"]["mean"] - all_layers["test_accuracy"]["mean"])
        right = f"{left['num_features']:>9} {metric(left['test_accuracy'])}  {metric(left['test_f1'])}"
        rows.append(f"{result_row(name, all_layers):<52} {right}  {change:>7}")
    return [
        f"2 and 3. Every representation with all {total} layers, and without the top {k} ({total - k} left)",
        *[f"(pair-wise ones lose a pair when either of its layers is removed: {pairs} of {len(whole)} pairs)"]
        * bool(whole),
        f"{'':<16}{' all layers ':-^37}   {f' without the top {k} ':-^37}",
        f"{RESULT_HEADER} {'features':>9} {'test accuracy':>13}  {'test F1':>13}  {'change':>7}",
        *rows,
    ]


def _not_run(results: dict) -> list[str]:
    entries = results["representations_not_run"]
    return ["Not run"] * bool(entries) + [not_run_line(**entry) for entry in entries]


def _notes(results: dict) -> list[str]:
    split, config, skipped = results["dataset"]["split_sizes"], results["config"], results["dataset"]["skipped"]
    lines = [
        "Accuracies and macro-F1 in percent, on the test rows; changes in points. ± is the sample standard deviation",
        f"over {config['num_runs']} runs, which differ in initial weights, minibatch order and dropout. The split and",
        "the fitted autoencoders are the same in all runs.",
    ]
    if config["rank_by"] == "test" and not results.get("analysis"):  # else the warnings say so
        lines.append(
            "The top layers were chosen on the same test rows that the tables report; --rank-by=val avoids that."
        )
    if split["validation"] < SMALL_VALIDATION:
        lines.append(
            f"Early stopping rests on only {split['validation']} validation rows: take small differences lightly."
        )
    if skipped:
        lines.append(f"{len(skipped)} files were left out; results.json lists them.")
    return lines
