"""Is a run healthy? What it logged, read in plain sentences: while it trains, at its end, and by whoever looks later.

Pure functions of the files of a run; nothing here needs torch.
"""

from collections.abc import Iterable
from pathlib import Path

from sslctl import run_directory as rundir
from sslctl.symptoms import KNN_NOISE, RULES, Finding, Known, Logged

__all__ = ["Finding", "Known", "Unhealthy", "Watch", "findings", "judge", "known_of", "verdict"]

LEVELS = ("ok", "warn", "bad")
UNHEALTHY = 1  # the exit status of a run that trainer.on_collapse=stop ends
LOOK_STEPS = 1000  # a run is looked at after every epoch, and at least so often


def known_of(run: Path) -> Known:
    """From config.yaml and environment.json. Raises InputError where they cannot be read."""
    config, environment = rundir.read_config(run), rundir.read_json(run / rundir.ENVIRONMENT)
    facts, scheduler = environment["facts"], config["scheduler"]
    warmup = scheduler.get("warmup_steps") or round((scheduler.get("warmup_epochs") or 0) * facts["steps_per_epoch"])
    return Known(
        steps_per_epoch=facts["steps_per_epoch"],
        total_steps=facts["total_steps"],
        warmup_steps=warmup,
        num_classes=facts["num_classes"],
        prototypes=config["method"].get("prototypes"),
        **environment.get("known", {}),  # of a run begun earlier: nothing
    )


def findings(run: Path) -> list[Finding]:
    """What there is to say about a run, the worst first; one `ok` where nothing is wrong.

    Raises InputError for a directory whose files cannot be read.
    """
    found = judge(rundir.read_lines(run / rundir.METRICS), known_of(run), rundir.read_lines(run / rundir.RESULTS))
    if (run / rundir.STOPPED).exists():
        reason = rundir.read_json(run / rundir.STOPPED)["reason"]
        found = [Finding("bad", "not finite", f"training stopped: {reason}"), *(f for f in found if f.level != "ok")]
    return found


def verdict(found: list[Finding]) -> Finding:
    """The worst of some findings."""
    return max(found, key=lambda finding: LEVELS.index(finding.level))


def judge(records: list[dict], known: Known, results: Iterable[dict] = ()) -> list[Finding]:
    """`findings` from the records of metrics.jsonl and results.jsonl."""
    logged = Logged(records, known)
    found = [finding for rule in RULES if (finding := rule(logged))]
    found += _against_random(list(results))
    found.sort(key=lambda finding: -LEVELS.index(finding.level))
    return found or [_healthy(logged)]


def _against_random(results: list[dict]) -> list[Finding]:
    """Results with all labels, worse than those of the same network with random weights."""
    value = {
        (r["protocol"], r["details"].get("k"), r["dataset"], r["subject"]): r["value"] for r in results if _counts(r)
    }
    found = []
    for (protocol, k, dataset, subject), trained in value.items():
        untrained = value.get((protocol, k, dataset, "random"))
        if subject == "trained" and untrained is not None and trained < untrained - KNN_NOISE:
            settings = f" with k {k}" if k else ""
            words = f"{protocol}{settings} on {dataset}: {trained:.1%}, random weights have {untrained:.1%}"
            found.append(Finding("warn", "random", words))
    return found


def _counts(result: dict) -> bool:
    return result["metric"] == "top1" and result["labels"] == "all" and result["protocol"] in ("knn", "linear-cached")


def _healthy(logged: Logged) -> Finding:
    """The one sentence where nothing is wrong."""
    if not logged.settled:
        return Finding("ok", "ok", f"too early to tell: {logged.step:,} steps, {logged.needed:,} are needed")
    words, losses = [], logged.epochs("loss")
    if losses:
        words.append(f"loss {losses[0][1]:.4g} → {losses[-1][1]:.4g}")
    for name, form in (("feature_std", ".2g"), ("rankme", ".1f"), ("knn", ".1%")):
        if logged.last(name, 1):
            label = {"feature_std": "feature std", "rankme": "RankMe", "knn": "kNN"}[name]
            words.append(f"{label} {logged.last(name, 1)[0]:{form}}")
    return Finding("ok", "ok", f"healthy: {', '.join(words)}")


class Unhealthy(RuntimeError):
    """A run that trainer.on_collapse=stop has ended, saved; with the sentence that says why."""


class Watch:
    """Looks at a run from time to time and says each bad finding once.

    on_collapse: "warn", or "stop", for which `stopping` becomes UNHEALTHY. The first process's alone.
    """

    def __init__(self, run: Path, on_collapse: str):
        self.run, self.on_collapse = run, on_collapse
        self.known: Known | None = None  # read when the run's directory is there
        self.said: set[str] = set()
        self.stopping, self.reason = 0, ""

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a run is looked at after `step` completed steps."""
        return step % min(steps_per_epoch, LOOK_STEPS) == 0

    def look(self) -> None:
        """Reads what is logged so far."""
        self.known = self.known or known_of(self.run)
        for finding in judge(rundir.read_lines(self.run / rundir.METRICS), self.known):
            if finding.level == "bad" and finding.rule not in self.said:
                self.said.add(finding.rule)
                if self.on_collapse == "stop":
                    self.stopping, self.reason = UNHEALTHY, self.reason or finding.sentence
                else:
                    print(f"  unhealthy: {finding.sentence}", flush=True)
