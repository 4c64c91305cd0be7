"""Is a run healthy? What it logged, read in plain sentences: while it trains, at its end, and by whoever looks later.

Pure functions of the files of a run, or of results; nothing here needs torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from sslctl.errors import say
from sslctl.runs.directory import RESULTS
from sslctl.runs.health_rules import RULES, features_collapsed, few_directions
from sslctl.runs.history import Finding, History, RunFacts
from sslctl.runs.intervals import wilson_noise
from sslctl.runs.metrics import read_metrics, readable_metrics
from sslctl.runs.reading import read_config, read_environment, read_stopped
from sslctl.runs.results import Result, read_results
from sslctl.schedules import fitted_warmup

LEVELS = ("ok", "early", "warn", "bad")  # early: too early to tell
UNHEALTHY = 1  # the exit status of a run that trainer.on_collapse=stop ends
LOOK_STEPS = 1000  # a run is looked at after every epoch, and at least so often


def read_run_facts(run: Path) -> RunFacts:
    """Reads them from config.yaml and environment.json. Raises Damaged where these cannot be read."""
    config, environment = read_config(run), read_environment(run)
    plan, scheduler, prototypes = environment["facts"], config["scheduler"], config["method"].get("prototypes")
    warmup = scheduler.get("warmup_steps") or round((scheduler.get("warmup_epochs") or 0) * plan["steps_per_epoch"])
    return RunFacts(
        steps_per_epoch=plan["steps_per_epoch"],
        total_steps=plan["total_steps"],
        warmup_steps=fitted_warmup(warmup, plan["total_steps"]),
        given=bool(config["backbone"].get("weights") or config["backbone"].get("pretrained")),
        prototypes=prototypes if type(prototypes) is int and prototypes > 1 else None,
        **{"num_classes": plan["num_classes"], **environment.get("known", {})},
    )


def findings(run: Path) -> list[Finding]:
    """Lists what there is to say about a run, the worst first; one `ok`, or `early`, where nothing is wrong.

    Raises Damaged for a directory whose files cannot be read.
    """
    result = judge(read_metrics(run), read_run_facts(run), read_results(run / RESULTS))
    if (reason := read_stopped(run)) is not None:
        result = [
            Finding("bad", "not finite", f"training stopped: {reason}"),
            *(f for f in result if f.level in ("warn", "bad")),
        ]
    return result


def verdict(result: list[Finding]) -> Finding:
    """Returns the worst of some findings."""
    return max(result, key=lambda finding: LEVELS.index(finding.level))


def as_line(finding: Finding) -> str:
    """Formats a finding as commands print it."""
    return f"{'health' if finding.level in ('ok', 'early') else finding.level}: {finding.sentence}"


def judge(records: list[dict], facts: RunFacts, results: Iterable[Result] = ()) -> list[Finding]:
    """Lists the `findings` that the records of metrics.jsonl and results.jsonl show."""
    history = History(records, facts)
    symptoms = [finding for rule in RULES if (finding := rule(history))]
    worse = _against_first(list(results))
    if history.past_warmup:
        symptoms += [
            Finding("warn", "random", f"{what}: {ours:.1%}, {weights} have {theirs:.1%}")
            for what, ours, theirs, weights in worse
        ]
        return _sorted(symptoms) or [_healthy(history)]
    if not worse and (so_far := _online(history)):
        worse = [so_far]
    return _sorted(symptoms) + ([_early(history, worse, not symptoms)] if worse or not symptoms else [])


def _sorted(result: list[Finding]) -> list[Finding]:
    return sorted(result, key=lambda finding: -LEVELS.index(finding.level))


# --- Results: figures of evaluations ---


def judge_features(results: list[Result], already_said: Iterable[Finding] = ()) -> list[Finding]:
    """Lists what label-free results say of trained and of given weights, beside what is told of them already, the worst first.

    results: of one evaluation; those of random weights in it, if any, are what the others began with. One `ok` where
    nothing is wrong. already_said: the findings of a run; a symptom that is among them is not said again.
    """
    figures = {(r.subject, r.metric): r for r in results if r.protocol == "label-free"}
    already_said, symptoms = list(already_said), []
    for subject in ("trained", "given"):
        std, rank = (figures.get((subject, metric)) for metric in ("feature_std", "rankme"))
        if std is None or rank is None:
            continue
        dim = std.details["dim"]
        first = "given" if subject == "trained" and ("given", "rankme") in figures else "random"
        spread, before = (_spread(figures.get((name, "feature_std")), dim) for name in (subject, first))
        untrained = figures.get((first, "rankme"))
        collapsed = features_collapsed(spread, dim, before)
        few = few_directions(rank.value, dim, untrained and untrained.value)
        symptoms += [finding for finding in (collapsed, few) if finding]
        if not already_said and not symptoms:
            sentence = f"feature std {std.value:.2g}, even would be {dim**-0.5:.2g}, RankMe {rank.value:.1f}"
            symptoms.append(Finding("ok", "ok", f"{sentence}: no sign of a collapse"))
    wrong = [
        finding for finding in symptoms if finding.level != "ok" and finding.rule not in {f.rule for f in already_said}
    ]
    return _sorted([*wrong, *(f for f in already_said if f.level != "ok" or not wrong)]) or symptoms


def _spread(std: Result | None, dim: int) -> float | None:
    """Returns √D times the std, as training logs it."""
    return std.value * dim**0.5 if std else None


def _against_first(results: list[Result]) -> list[tuple[str, float, float, str]]:
    """Lists results with all labels that are worse than those of the weights a run began with, by the same protocol.

    (protocol, value, that of the given weights, of random ones where there are none, and what these are called.)
    """
    latest = {(*_protocol(r), r.subject): r for r in results if _is_compared(r)}
    worse = []
    for (*protocol, subject), result in latest.items():
        given, random = (latest.get((*protocol, name)) for name in ("given", "random"))
        first = given or random
        if subject == "trained" and first and result.value < first.value - _noise(result, first):
            k = f" with k {result.params['k']}" if "k" in result.params else ""
            worse.append(
                (f"{result.protocol}{k} on {result.dataset}", result.value, first.value, _CALLED[first.subject])
            )
    return worse


def _noise(result: Result, other: Result) -> float:
    """Returns by how much two shares may differ by chance: half of the 95 % interval of their difference, as if each were
    of images of its own."""
    return wilson_noise(result.value, other.value, min(result.images, other.images))


_CALLED = {"given": "the weights it was given", "random": "random weights"}


def _online(history: History) -> tuple[str, float, float, str] | None:
    """Compares the run's own kNN among its training images with that of its first weights."""
    values = history.series("knn")
    if len(values) < 2 or values[0][0] != 0:
        return None
    if values[-1][1] >= values[0][1] - wilson_noise(values[-1][1], values[0][1], history.facts.knn_images):
        return None
    return "kNN", values[-1][1], values[0][1], _CALLED["given" if history.facts.given else "random"]


def _protocol(result: Result) -> tuple:
    """Returns all that two results must share to be compared."""
    settings = json.dumps(result.params, sort_keys=True)
    return result.protocol, *result.measured_on, result.features, result.labels, settings


def _is_compared(result: Result) -> bool:
    """Tells whether a trained network's result is compared with that of random weights."""
    return result.metric in ("top1", "mAP") and result.labels == "all" and result.protocol in ("knn", "linear-cached")


def _early(history: History, worse: list[tuple[str, float, float, str]], sound: bool) -> Finding:
    """Writes the one sentence before anything is judged. worse: as `_against_first`, the first is said. sound: no rule fired."""
    sentence = f"too early to tell: {history.step:,} steps, {history.needed:,} are needed"
    if history.past_settling and sound:
        sentence += "; no collapse so far"
    if worse:
        what, ours, theirs, weights = worse[0]
        sentence += f"; so far worse than {weights}: {what} {ours:.1%} against {theirs:.1%}"
    return Finding("early", "early", sentence)


def _healthy(history: History) -> Finding:
    """Writes the one sentence where nothing is wrong."""
    parts, losses = [], history.epochs("loss")
    if losses:
        parts.append(f"loss {losses[0][1]:.4g} → {losses[-1][1]:.4g}")
    for name, label, form in (
        ("feature_std", "feature std", ".2g"),
        ("rankme", "RankMe", ".1f"),
        ("knn", "kNN", ".1%"),
    ):
        if history.last(name, 1):
            parts.append(f"{label} {history.last(name, 1)[0]:{form}}")
    return Finding("ok", "ok", f"healthy: {', '.join(parts)}")


# --- While a run trains ---


class Unhealthy(RuntimeError):
    """A run that trainer.on_collapse=stop has ended, saved; with the sentence that says why."""


_SAID_EARLY = ("drift",)  # warnings that are said while a run trains: what is being lost cannot be had back


class Watch:
    """Looks at a run from time to time and says each bad finding once, and that given features drift off.

    on_collapse: "warn", or "stop", for which `stopping` becomes UNHEALTHY. The first process's alone.
    """

    def __init__(self, run: Path, on_collapse: str):
        self.run, self.on_collapse = run, on_collapse
        self.facts: RunFacts | None = None  # read when the run's directory is there
        self.reported: set[str] = set()
        self.stopping, self.reason = 0, ""

    def is_time(self, step: int, steps_per_epoch: int) -> bool:
        """Tells whether a run is looked at after `step` completed steps."""
        return step % min(steps_per_epoch, LOOK_STEPS) == 0

    def check(self) -> None:
        """Reads what is logged so far."""
        self.facts = self.facts or read_run_facts(self.run)
        for finding in judge(readable_metrics(self.run), self.facts):
            bad = finding.level == "bad"
            if (bad or finding.rule in _SAID_EARLY) and finding.rule not in self.reported:
                self.reported.add(finding.rule)
                if not bad:
                    say(f"  warning: {finding.sentence}")
                elif self.on_collapse == "stop":
                    self.stopping, self.reason = UNHEALTHY, self.reason or finding.sentence
                else:
                    say(f"  unhealthy: {finding.sentence}")
