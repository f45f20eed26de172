"""The cells that were measured, out of the observations, with their visits and in the order of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xfast.study import statistics
from xfast.study.document import BASELINE, rank
from xfast.study.factors import PREFERRED, SINGLE, TYPES, Settings
from xfast.study.languages import ordered
from xfast.study.store import Record

Visits = list[Record]


class Cells:
    """The cells of a store's records: low-resource languages first, then as the settings name sizes and engines."""

    def __init__(self, records: Sequence[Record], settings: Settings) -> None:
        self.facts: dict[str, Record] = {}
        self.visits: dict[str, dict[int, Record]] = {}
        for record in records:
            if record["kind"] == "cell":
                self.facts[record["cell"]] = record
            if record["kind"] == "visit":  # the last one counts, should a run have measured it twice
                self.visits.setdefault(record["cell"], {})[record["round"]] = record
        languages = ordered({parts(key)["language"] for key in self.visits})
        tasks = [task for task in settings.tasks if task in TYPES] or list(PREFERRED)

        def place(key: str) -> tuple[Any, ...]:
            mine = parts(key)
            where = [
                rank(names, mine[factor])
                for factor, names in (
                    ("size", settings.sizes),
                    ("engine", settings.engines),
                    ("task", tasks),
                    ("policy", (*settings.policies, SINGLE)),
                )
            ]
            return (languages.index(mine["language"]), *where, rank(settings.batch_sizes, int(mine["batch_size"])))

        self.keys = sorted(self.visits, key=place)

    def of(self, key: str) -> Visits:
        """Its visits, by round."""
        return [visit for _, visit in sorted(self.visits[key].items())]

    def seconds(self, key: str, arm: str) -> list[float]:
        """Of one pass, visit by visit (in a latency cell the sum over all single responses)."""
        return [sum(visit["seconds"][arm]) for visit in self.of(key)]

    def logs(self, key: str, arm: str) -> statistics.Floats:
        """log(time of the arm / time of the baseline), visit by visit."""
        return statistics.log_ratios(self.seconds(key, arm), self.seconds(key, BASELINE))

    def arms(self, key: str) -> list[str]:
        """Those that ran in all its visits: a run that was continued may have had memory for fewer, or for more."""
        first, *others = [visit["seconds"] for visit in self.of(key)]
        return [arm for arm in first if all(arm in each for each in others)]

    def whole(self, key: str, rounds: int) -> bool:
        """Whether it has all its visits."""
        return len(self.visits.get(key, ())) >= rounds


def parts(key: str) -> dict[str, str]:
    """The factors that a cell's key names."""
    size, engine, task, language, policy, batch = key.split("/")
    return {"size": size, "engine": engine, "task": task, "language": language, "policy": policy, "batch_size": batch}
