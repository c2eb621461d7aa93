"""The results as text: lines of the console as they arrive, and results.txt from the content of results.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report.cautions import Caution, checks, first_lines, missing, use_of, warnings
from report.further import FURTHER, further_lines, further_tables
from report.modules import module_lines
from report.predicted import model_lines
from report.sentences import VERDICTS, Answer, answers, over_splits
from report.tables import SHARES, SKETCH_NOTE, Table, tables
from report.wording import capital, counted, listed, mean_text, metric, signed, top_layers, wrapped

# Validation rows below which the results say how little early stopping rests on. It stands here, not in analysis/, as
# results without an analysis need it too.
SMALL_VALIDATION = 50
LAYER_HEADER = f"{'rank':>4}  {'test accuracy':>13}  {'validation':>10}  {'role':4}  {'block':<12}  layer"
RESULT_HEADER = f"{'representation':<15} {'features':>8} {'test accuracy':>13}  {'test F1':>13}"
SKETCHED = "sketched"  # behind the row of a representation that reads sketches of the weights
WIDTH = 118  # of a line of results.txt
MODULES_HEADING = "Modules, and the collection in the plane"
OUTCOMES = ("confirmed", "refuted", "undecided", "not answerable")  # of hypotheses
SKIPPED_NAMED, SKIPPED_WIDTH = 10, 240  # files that are skipped, and the width of the line of each
BEAR_IN_MIND = "Bear in mind"  # above what decides how the rest is read
WORD_WIDTH = 40  # of a name in a column of results.txt that is not the last


@dataclass(frozen=True)
class Content:
    """The sentences and tables that results.txt, report.html and the figures share, made once.

    Attributes:
        answers: Answers to the five questions; none without an analysis.
        warnings: Warnings that belong beside them; those that decide how all else is read come first of all.
        checks: Outcome of the controls; none without an analysis.
        tables: Tables by name.
        findings: Findings of the figures that can be drawn, by name.
        further: Sentences on further questions, by section.
    """

    answers: list[Answer]
    warnings: list[Caution]
    checks: list[str]
    tables: dict[str, Table]
    findings: dict[str, str]
    further: dict[str, list[str]]


def content_of(results: dict) -> Content:
    """Return the sentences and tables that the content of results.json gives."""
    findings = {}
    if results.get("analysis"):
        from report import figures  # and matplotlib, for half a second

        findings = figures.findings(results)
    made = tables(results) | further_tables(results)
    return Content(answers(results), warnings(results), checks(results), made, findings, further_lines(results))


# ----------------------------------------------------------------------------------------------------------------------
# Lines of the console
# ----------------------------------------------------------------------------------------------------------------------


def settings_lines(config: dict, environment: dict, output_dir: object, with_autoencoders: bool = True) -> str:
    """Return the resolved settings and the device; of flags and trainings that are not asked for, nothing.

    Args:
        config: As results.json holds it.
        environment: Likewise.
        output_dir: Folder of results.
        with_autoencoders: Whether any of the representations is an autoencoder.
    """
    shown = ", ".join(f"{key} {config[key]}" for key in ("top_k", "num_runs", "rank_by", "seed", "controls"))
    asked = {"splits": config["splits"] > 1, "null_shuffles": config["null_shuffles"], "quick": config["quick"]}
    shown += "".join(f", {key} {config[key]}" for key, is_asked in asked.items() if is_asked)
    classifier, autoencoder = config["classifier"], config["autoencoder"]
    epochs = f"at most {classifier['max_epochs']} epochs, patience {classifier['patience']}"
    if with_autoencoders:
        epochs += f"; autoencoders {autoencoder['max_epochs']} and {autoencoder['patience']}"
    workers = f", {environment['workers']} workers" if environment["workers"] > 1 else ""
    job = f", job {environment['job']}" if environment["job"] else ""
    return "\n".join(
        [
            f"settings  {shown}, output_dir {output_dir}",
            f"          {epochs}",
            f"device    {environment['device']}{workers}, on {environment['host']}{job}",
        ]
    )


def collection_lines(header: dict, representations: int, with_skipped: bool = True) -> list[str]:
    """Return the collection, and what will be done with it."""
    dataset, top_k = header["dataset"], header["config"]["top_k"]
    facts = _collection(header)
    facts += [("ignored", f"{pattern} ({count})") for pattern, count in dataset["ignored"].items()]
    if with_skipped:
        facts += skipped_facts(dataset["skipped"], "left out, as --skip-bad asks; results.json lists them and why")
    phases = f"{counted(representations, 'representation')} without {top_layers(top_k)}, and with all"
    facts.append(("plan", f"rank {dataset['num_layers_selected']} layers; then {phases}"))
    return _aligned(facts)


def skipped_facts(skipped: Sequence[dict], outcome: str) -> list[tuple[str, str]]:
    """Return how many files are skipped, and the first of them with the reason of each; nothing where none is."""
    if not skipped:
        return []
    facts = [("skipped", f"{counted(len(skipped), 'file')} {outcome}")]
    facts += [("", _cut(f"{entry['path']}: {entry['reason']}", SKIPPED_WIDTH)) for entry in skipped[:SKIPPED_NAMED]]
    more = len(skipped) - SKIPPED_NAMED
    return [*facts, ("", f"and {more} more")] if more > 0 else facts


def skipped_lines(skipped: Sequence[dict], outcome: str) -> str:
    """Return the lines on files that are skipped later than the others."""
    return "\n".join(_aligned(skipped_facts(skipped, outcome)))


def not_run_line(representation: str, reason: str) -> str:
    """Return why a representation is left out."""
    return f"{representation:<15} not run: {reason}"


def layer_row(rank: int, record: dict, runs: int) -> str:
    """Return one aligned row of the layer ranking, accuracies in percent; means of so many runs."""
    accuracy = mean_text(record["accuracy"], record["accuracy_std"], runs)
    place = f"{record['role']:4}  {record['block'] or '':<12}"
    return f"{rank:>4}  {accuracy}  {100 * record['val_accuracy']:>10.1f}  {place}  {record['layer']}"


def result_row(name: str, entry: dict) -> str:
    """Return one aligned row of a representation's metrics, in percent."""
    row = f"{name:<15} {entry['num_features']:>8} {metric(entry['test_accuracy'])}  {metric(entry['test_f1'])}"
    return row.rstrip() + (f"  {SKETCHED}" if entry.get("sketched") else "")


def short_lines(results: dict, answered: Sequence[Answer]) -> list[str]:
    """Return the beginning of each answer and the outcomes of the hypotheses, a screen of at most 40 lines.

    None without an analysis. All sentences stand in results.txt and report.html.
    """
    if not answered:
        return []
    of_quick = " of a --quick run" if results["config"]["quick"] else ""
    title = f"Short answers{of_quick} {_brackets(results)}"
    lines = ["", title, "-" * len(title)]
    for position, answer in enumerate(answered, 1):
        lines += [f"{position}. {answer.question}", *wrapped(" ".join(answer.sentences[:2]), WIDTH, "   ", "   ")]
    lines.append("Hypotheses")
    for outcome in OUTCOMES:
        if names := [answer.hypothesis for answer in answered if answer.outcome == outcome]:
            lines += wrapped(f"{outcome}: {'; '.join(names)}", WIDTH, "   ", "   ")
    if count := len(warnings(results)):
        lines.append(f"{counted(count, 'caution')} and the other sentences stand in results.txt and report.html.")
    return lines


def console_lines(results: dict, content: Content) -> list[str]:
    """Return what decides how the rest is read, and the short answers; nothing without an analysis."""
    if not content.answers:
        return []
    first = bear_in_mind_lines(content.warnings)
    further = [line for lines in content.further.values() for line in wrapped(lines[0], WIDTH, "   ", "   ")]
    further = ["Further questions", *further] if further else []
    return [*([""] if first else []), *first, *short_lines(results, content.answers), *further]


def next_step(results: dict) -> str:
    """Return the step that serves best after these results, from their content."""
    config, analysis = results["config"], results.get("analysis")
    groups = analysis and analysis["groups"]
    is_built_in = results["dataset"]["source"] == "built-in digits"
    again, compared = "the same command", analysis and analysis["representations"]
    if results["not_done"]:
        return f"{again} again does what is missing: {listed(list(results['not_done']))}"
    if is_built_in:
        return "python data.py inspect FOLDER looks at LoRAs of your own"
    if groups and groups["may_be_groups"]:
        return f"keep the groups together that may be what is predicted. {use_of(groups['column'])}"
    if config["quick"]:
        controls = ", and removes other layers to compare with" if config["controls"] == "none" else ""
        return f"{again} without --quick trains in more runs and epochs{controls}"
    if config["controls"] == "none":
        return (
            f"{again} with --controls=basic removes other layers to compare with; what is trained is not trained again"
        )
    if compared and not compared["conditions"]["baseline"]["above_null"]:
        return "more LoRAs of each class, or other labels (--labels, --label-column): none are told apart by these"
    if config["splits"] == 1:
        more = ", and more LoRAs decide more" if _is_open(analysis) else ""
        return f"{again} with --splits=5 shows how far the answers depend on the split{more}"
    if _is_open(analysis):
        return "more LoRAs of each class: with these some answers are undecided"
    return "docs/method.md says what each number means, for a report of them"


def _is_open(analysis: dict) -> bool:
    """Return whether there are few test LoRAs, or a verdict or hypothesis is undecided."""
    decided = [*analysis["hypotheses"], *({"outcome": part["verdict"]} for part in analysis["robustness"].values())]
    return analysis["few_test_loras"] or any(record["outcome"] == "undecided" for record in decided)


def end_lines(results: dict, folder: Path, first: str) -> list[str]:
    """Return the last lines of a run: ``first``, the path of the page, and the next step."""
    return ["", first, f"  {folder / 'report.html'}", *model_lines(results, folder), f"next: {next_step(results)}"]


# ----------------------------------------------------------------------------------------------------------------------
# results.txt
# ----------------------------------------------------------------------------------------------------------------------


def render_text(results: dict, content: Content | None = None) -> str:
    """Return the whole of results.txt from the content of results.json.

    Args:
        results: The content of results.json, with or without ``analysis``.
        content: Its sentences and tables, where they are made already.
    """
    content = content or content_of(results)
    sections = (
        _title(results),
        bear_in_mind_lines(content.warnings),
        _aligned(run_facts(results)),
        answer_lines(results, content.answers),
        _caution_lines(results, content.warnings),
        _layers(results, content.tables["ranking"]),
        _representations(results),
        _modules(results, content.tables),
        *_further(content),
        _splits(results, content.tables),
        _evidence(results, content),
        _not_run(results),
        _notes(results),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def run_facts(results: dict) -> list[tuple[str, str]]:
    """Return what was run on what, and chance: pairs of a word, which may come twice in a row, and a fact."""
    config, chance = results["config"], results["chance"]
    return [
        *_collection(results),
        ("training", f"{counted(config['num_runs'], 'run')}, seed {config['seed']}, on {config['device']}"),
        (
            "chance",
            f"accuracy {100 * chance['accuracy']:.1f}, macro-F1 {100 * chance['f1']:.1f}: "
            "always guessing the largest class of the test LoRAs",
        ),
        *skipped_facts(results["dataset"]["skipped"], "left out, as --skip-bad asks"),
        *_notices(results),
    ]


def notice_lines(results: dict) -> list[str]:
    """Return what is reported of the collection while the run goes on, and the split where that leaves LoRAs out."""
    left_out = results["dataset"].get("not_trained_on")
    return _aligned(_notices(results) + (_collection(results)[-1:] if left_out else []))


def _notices(results: dict) -> list[tuple[str, str]]:
    return [("note", finding["message"]) for finding in results["dataset"]["findings"]]


def _collection(results: dict) -> list[tuple[str, str]]:
    """Return the facts on the collection."""
    dataset, pattern = results["dataset"], results["config"]["layers"]
    facts = []
    if dataset["source"] == "built-in digits":
        facts.append(("data", "the BUILT-IN DIGITS collection, trained by this program: no LoRAs of yours are read"))
    facts.append(
        ("data", f"{dataset['num_samples']} LoRAs of {dataset['num_layers']} layers in {dataset['path']}"),
    )
    if pattern:
        facts.append(("layers", f"{dataset['num_layers_selected']} of them match {pattern}: the others are left out"))
    sizes = sorted(set(dataset["class_counts"].values()))
    per_class = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    quoted = [name if name == name.strip() else f"'{name}'" for name in dataset["classes"]]
    names = ", ".join(quoted[:12]) + (", ..." if len(quoted) > 12 else "")
    classes = f"{dataset['num_classes']} from {dataset['label_source']}, {per_class} LoRAs each: {names}"
    split, groups = dataset["split_sizes"], ""
    if dataset["group_column"] is not None:
        groups = f"; {dataset['num_groups']} groups by {dataset['group_column']}, each in one part"
    elif dataset["num_groups"] is not None:
        groups = "; copies, and epochs of one training, are in one part"
    parts = f"{split['train']} train, {split['validation']} validation, {split['test']} test{groups}"
    if left_out := dataset.get("not_trained_on"):
        named = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        parts += f"; {len(left_out)} more to train on left out, with weights over 100 times as large ({named})"
    return [*facts, ("classes", classes), ("split", parts)]


def _aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{word:<10}{fact}" for word, fact in facts]


def _title(results: dict) -> list[str]:
    title = f"LoRA layer ablation: {results['dataset']['name']}"
    return [title, "=" * len(title)]


def bear_in_mind_lines(cautions: Sequence[Caution]) -> list[str]:
    """Return what decides how the rest is read, a heading and at most four lines; none where nothing does."""
    if not (lines := first_lines(cautions)):
        return []
    return [BEAR_IN_MIND, "-" * len(BEAR_IN_MIND), *_bullets(lines)]


def answer_lines(results: dict, answered: Sequence[Answer]) -> list[str]:
    """Return the five answers and hypotheses in lines; none without an analysis."""
    if not answered:
        return []
    title = f"Short answers {_brackets(results)}"
    lines = [title, "-" * len(title)]
    for position, answer in enumerate(answered, 1):
        lines.append(f"{position}. {answer.question}")
        hypothesis = f"Hypothesis: {answer.hypothesis}: {answer.outcome.upper()}. {answer.evidence}"
        for sentence in (*answer.sentences, hypothesis):
            lines += wrapped(sentence, WIDTH, "   ", "   ")
    return lines


def _brackets(results: dict) -> str:
    return f"(in brackets: {100 * results['analysis']['level']:.0f} % intervals over the test LoRAs)"


def _caution_lines(results: dict, cautions: Sequence[Caution]) -> list[str]:
    """Return the warnings; without an analysis only why there is none, as the first lines say the rest."""
    if not results.get("analysis"):
        return [line for words in missing(results) for line in wrapped(words, WIDTH)]
    if not cautions:
        return []
    return ["Cautions", "--------", *_bullets([caution.text for caution in cautions])]


def _bullets(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in wrapped(sentence, WIDTH, "- ", "  ")]


def _layers(results: dict, ranking_table: Table) -> list[str]:
    config, ranking = results["config"], results["layer_ranking"]
    chosen_by = {"test": "test accuracy, as the experiment is defined", "val": "validation accuracy"}[config["rank_by"]]
    middle, last = ranking[len(ranking) // 2], ranking[-1]
    if results.get("analysis"):
        shown = table_lines(ranking_table, ("rank", "test accuracy", "95 % interval", "p", "validation", "block"))
    else:
        rows, more = ranking[: ranking_table.shown], config["top_k"] - ranking_table.shown
        shown = [LAYER_HEADER, *(layer_row(rank, record, config["num_runs"]) for rank, record in enumerate(rows, 1))]
        shown += [f"({more} more of the top in results.json)"] if more > 0 else []
    return [
        f"1. Which layers predict? Each of {len(ranking)} alone, on 7 statistics, ranked by {chosen_by}",
        *shown,
        f"The layer in the middle of the ranking reaches {100 * middle['accuracy']:.1f}, the last "
        f"{100 * last['accuracy']:.1f}.",
    ]


def _representations(results: dict) -> list[str]:
    k, ranking = results["config"]["top_k"], results["layer_ranking"]
    total, layers_of = len(ranking), Counter(record["module"] for record in ranking)
    whole = {module for module, layers in layers_of.items() if layers == 2}  # the down and the up
    lines = [f"2 and 3. Every representation with all {total} layers, and without {top_layers(k)} ({total - k} left)"]
    if whole:
        pairs = len({record["module"] for record in ranking[:k]} & whole)
        lines.append(
            f"(pair-wise ones lose a pair when either of its layers is removed: {pairs} of {len(whole)} pairs)"
        )
    lines.append(f"{'':<16}{' all layers ':-^37}   {f' without {top_layers(k)} ':-^37}")
    lines.append(f"{RESULT_HEADER} {'features':>9} {'test accuracy':>13}  {'test F1':>13}  {'change':>7}")
    baseline, ablation = results["baseline_results"], results["ablation_results"]
    for name in sorted(baseline, key=lambda name: -baseline[name]["test_accuracy"]["mean"]):
        all_layers, left = baseline[name], ablation[name]
        change = signed(left["test_accuracy"]["mean"] - all_layers["test_accuracy"]["mean"])
        right = f"{left['num_features']:>9} {metric(left['test_accuracy'])}  {metric(left['test_f1'])}"
        marked = f"  {SKETCHED}" if all_layers.get("sketched") else ""
        row = result_row(name, all_layers | {"sketched": False})
        lines.append(f"{row:<52} {right}  {change:>7}{marked}")
    return lines


def _splits(results: dict, made: dict[str, Table]) -> list[str]:
    """Return the tables of several splits, and how far their rankings agree where no answer says so."""
    agreement = [] if results.get("analysis") else list(over_splits(results))
    lines = [line for sentence in agreement for line in wrapped(sentence, WIDTH)]
    return lines + [line for name in ("splits", "split layers") if name in made for line in _titled(made[name])][:-1]


def _modules(results: dict, made: dict[str, Table]) -> list[str]:
    """Return what attention over modules and the map of the collection show; none where neither was made."""
    if not (lines := module_lines(results)):
        return []
    body = [MODULES_HEADING, *_bullets(lines)]
    for name in ("attention", "attention sums"):
        if table := made.get(name):
            body += ["", table.title, *table_lines(table, ("summed by", *SHARES[:3]))]
    return body


def _further(content: Content) -> list[list[str]]:
    """Return the sections of further questions, each with its sentences and tables."""
    sections = []
    for section in FURTHER:
        if lines := content.further.get(section.anchor):
            made = [table for table in content.tables.values() if table.anchor == section.anchor]
            body = [section.heading, *_bullets(lines), ""]
            sections.append([*body, *(line for table in made for line in _titled(table))][:-1])
    return sections


def _titled(table: Table) -> list[str]:
    return [table.title, *table_lines(table), ""]


def _evidence(results: dict, content: Content) -> list[str]:
    """Return the tables that only an analysis fills, one below the other, and the outcome of the controls."""
    lines, made, warned = [], content.tables, {caution.text for caution in content.warnings}
    controls = [check for check in content.checks if check not in warned]
    for name in ("differences", "drops", "controls", "blocks", "places", "conditional", "concepts"):
        if name in made:
            lines += _titled(made[name])
            if name == "controls":
                lines[-1:] = [*_verdict_lines(results), ""]
    return [*lines, "Controls", *_bullets(controls)] if controls else lines


def _verdict_lines(results: dict) -> list[str]:
    """Return what each verdict that was given means."""
    given = {section["verdict"] for section in results["analysis"]["robustness"].values()}
    return wrapped(
        " ".join(f"{capital(name)}: {meaning}." for name, meaning in VERDICTS.items() if name in given), WIDTH
    )


def table_lines(table: Table, columns: Sequence[str] = (), source: str = "results.json") -> list[str]:
    """Return a table in aligned columns, all or those named and the last; a long name is cut unless it stands last."""
    last = len(table.columns) - 1
    kept = [i for i, column in enumerate(table.columns) if not columns or column in columns or i == last]
    rows = [
        [row[i] if i == last else _cut(row[i]) for i in kept] for row in (table.columns, *table.rows[: table.shown])
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in table.words else cell.rjust(width)
            for i, cell, width in zip(kept, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    if (more := len(table.rows) - table.shown) > 0:
        lines.append(f"({more} more in {source})")
    return lines + wrapped(table.note, WIDTH)


def _cut(word: str, width: int = WORD_WIDTH) -> str:
    return word if len(word) <= width else f"{word[: width - 3]}..."


def not_run(results: dict) -> list[dict]:
    """Return representation and reason of all that could not be run, or is run only where it is asked for by name."""
    left_out = [{"representation": name, "reason": reason} for name, reason in results["config"]["left_out"].items()]
    return results["representations_not_run"] + left_out


def _not_run(results: dict) -> list[str]:
    lines = [not_run_line(**entry) for entry in not_run(results)]
    return ["Not run", *lines] if lines else []


def _notes(results: dict) -> list[str]:
    split, config, skipped = results["dataset"]["split_sizes"], results["config"], results["dataset"]["skipped"]
    lines = [
        "Accuracies and macro-F1 in percent, on the test LoRAs; changes in points. ± is the sample standard deviation",
        f"over {config['num_runs']} runs, which differ in initial weights, minibatch order and dropout. The split and",
        "the fitted autoencoders are the same in all runs. Where there is no ±, nothing differs between runs.",
    ]
    if config["num_runs"] == 1:
        lines = ["Accuracies and macro-F1 in percent, on the test LoRAs, of a single run; changes in points."]
    if config["rank_by"] == "test" and not results.get("analysis"):  # else a warning says so
        lines.append(
            "The top layers were chosen on the same test LoRAs that the tables report; --rank-by=val avoids that."
        )
    if config.get("sketch_flat"):
        lines += wrapped(SKETCH_NOTE, WIDTH)
    if split["validation"] < SMALL_VALIDATION:
        lines.append(
            f"Early stopping rests on only {split['validation']} validation LoRAs: do not rely on small differences."
        )
    if skipped:
        lines.append(f"{counted(len(skipped), 'file')} left out, as --skip-bad asks: see the beginning.")
    return lines
