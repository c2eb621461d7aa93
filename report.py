"""results.json -> results.txt: the same facts for a person, and nothing that the JSON does not hold."""

from __future__ import annotations

SMALL_VALIDATION = 50  # rows; below this the results say how little early stopping rests on


def result_row(name: str, entry: dict, other: dict | None = None) -> str:
    """One aligned row of a representation's metrics; with ``other``, the same row holds both conditions' test accuracy."""
    if other is None:
        return f"{name:<15} {entry['num_features']:>8} {metric(entry, 'test_accuracy')}  {metric(entry, 'test_f1')}"
    drop = entry["test_accuracy"]["mean"] - other["test_accuracy"]["mean"]
    return (
        f"{name:<15} {entry['num_features']:>8} {metric(entry, 'test_accuracy')}  {metric(entry, 'test_f1')}"
        f" {other['num_features']:>9} {metric(other, 'test_accuracy')}  {metric(other, 'test_f1')}  {-100 * drop:>+7.1f}"
    )


RESULT_HEADER = f"{'representation':<15} {'features':>8} {'test accuracy':>13}  {'test F1':>13}"


def metric(entry: dict, key: str) -> str:
    """Mean ± std of a metric in percent, thirteen characters wide."""
    return f"{100 * entry[key]['mean']:>6.1f} ± {100 * entry[key]['std']:<4.1f}"


def render_text(results: dict) -> str:
    """The whole of results.txt from the content of results.json."""
    sections = [
        _what_was_run(results),
        _layer_section(results),
        _representation_section(results),
        _not_run_section(results),
        _notes(results),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _what_was_run(results: dict) -> list[str]:
    dataset, config = results["dataset"], results["config"]
    split = dataset["split_sizes"]
    counts = sorted(set(dataset["class_counts"].values()))
    per_class = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines = [f"LoRA layer ablation: {dataset['name']}", "=" * 24 + "=" * len(dataset["name"])]
    if dataset["source"] == "built-in digits":
        lines.append("This is the BUILT-IN DIGITS collection, trained by this program: no LoRAs of yours were read.")
    if config["quick"]:
        lines.append(
            "A --quick run: fewer runs and epochs than the experiment is defined with. Do not report these figures."
        )
    return [
        *lines,
        f"{dataset['num_samples']} LoRAs in {dataset['path']}, {dataset['num_layers']} layers, {dataset['num_classes']} classes "
        f"of {per_class}: {_shortened(dataset['classes'])}",
        f"split {split['train']} train / {split['validation']} validation / {split['test']} test; {config['num_runs']} runs; "
        f"seed {config['seed']}; trained on {config['device']}",
        f"chance: accuracy {100 * results['chance']['accuracy']:.1f} %, macro-F1 {100 * results['chance']['f1']:.1f} % "
        "(always guessing the largest class of the test rows)",
    ]


def _shortened(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _layer_section(results: dict) -> list[str]:
    config, ranking = results["config"], results["layer_ranking"]
    chosen_by = {"test": "test accuracy (as the experiment is defined)", "val": "validation accuracy"}[
        config["rank_by"]
    ]
    lines = [
        f"1. Which layers predict? Each of {len(ranking)} alone, 7 statistics, ranked by {chosen_by}",
        f"{'rank':>4}  {'test accuracy':>13}  {'validation':>10}  {'role':4}  layer",
    ]
    for rank, layer in enumerate(ranking[: config["top_k"]], 1):
        lines.append(
            f"{rank:>4}  {100 * layer['accuracy']:>6.1f} ± {100 * layer['accuracy_std']:<4.1f}  "
            f"{100 * layer['val_accuracy']:>10.1f}  {layer['role']:4}  {layer['layer']}"
        )
    middle, last = ranking[len(ranking) // 2], ranking[-1]
    lines.append(f"middle of the ranking: {100 * middle['accuracy']:.1f}, last: {100 * last['accuracy']:.1f}")
    return lines


def _representation_section(results: dict) -> list[str]:
    config, dataset = results["config"], results["dataset"]
    baseline, ablation = results["baseline_results"], results["ablation_results"]
    pairs = len({layer["module"] for layer in results["layer_ranking"][: config["top_k"]]})
    k, total = config["top_k"], dataset["num_layers"]
    lines = [
        f"2 and 3. Every representation with all {total} layers, and without the top {k} ({total - k} left)",
        f"Pair-wise representations lose a pair when either of its layers is removed: {pairs} of {total // 2} pairs.",
        f"{'':15} {'all layers':-^39} {'without the top ' + str(k):-^39}",
        f"{RESULT_HEADER} {'features':>9} {'test accuracy':>13}  {'test F1':>13}  {'change':>7}",
    ]
    order = sorted(baseline, key=lambda name: -baseline[name]["test_accuracy"]["mean"])
    return lines + [result_row(name, baseline[name], ablation[name]) for name in order]


def _not_run_section(results: dict) -> list[str]:
    missing = results["representations_not_run"]
    return ["Not run"] * bool(missing) + [f"{entry['representation']:<15} {entry['reason']}" for entry in missing]


def _notes(results: dict) -> list[str]:
    split, config = results["dataset"]["split_sizes"], results["config"]
    lines = [
        f"± is the sample standard deviation over {config['num_runs']} runs, which differ in initial weights, minibatch order and "
        "dropout; the split",
        "and the fitted autoencoders are the same in all of them. Accuracies and macro-F1 in percent; change in points.",
    ]
    if config["rank_by"] == "test":
        lines.append(
            "The top layers were chosen on the same test rows that the tables report: --rank-by=val avoids that."
        )
    if split["validation"] < SMALL_VALIDATION:
        lines.append(
            f"Early stopping rests on only {split['validation']} validation rows: the epoch it picks is largely a matter of luck."
        )
    if results["dataset"]["skipped"]:
        lines.append(f"{len(results['dataset']['skipped'])} files were left out; they are listed in results.json.")
    return lines
