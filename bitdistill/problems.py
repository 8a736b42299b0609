"""All mistakes of a run in one report, so that nobody corrects one, waits, and meets the next."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bitdistill.errors import UserError


class Problems(UserError):
    """Several mistakes at once, each in the words of its own UserError."""

    def __init__(self, problems: list[UserError]):
        first = problems[0]
        super().__init__(first.field, expected=first.expected, got=first.got, do=first.do)
        self.problems = problems

    def __str__(self) -> str:
        return f"{len(self.problems)} problems: " + " ".join(f"({i}) {one}" for i, one in enumerate(self.problems, 1))


def raise_all(problems: list[UserError]) -> None:
    """Raises the one problem as it is, several as Problems; nothing where there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


@dataclasses.dataclass
class Report:
    """What was looked at, and all that is wrong.

    Attributes:
        rows: (subject, "ok" or "problem", what was found), in the order of the checks.
        problems: as they would have been raised.
    """

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    problems: list[UserError] = dataclasses.field(default_factory=list)

    @contextmanager
    def part(self, subject: str) -> Iterator[list[str]]:
        """A check. Gives a list for what is worth saying; a UserError inside ends the check, and is kept."""
        found: list[str] = []
        try:
            yield found
        except Problems as several:
            self.add(subject, several.problems)
        except UserError as problem:
            self.add(subject, [problem])
        else:
            self.rows.append((subject, "ok", "; ".join(found)))

    def add(self, subject: str, problems: Iterable[UserError], found: str = "") -> None:
        """The outcome of a check that finds several problems at once."""
        problems = [problem for problem in problems if str(problem) not in map(str, self.problems)]
        self.problems += problems
        self.rows += [(subject, "problem", str(problem)) for problem in problems] or [(subject, "ok", found)]

    def table(self) -> str:
        """A line for each row."""
        width = max((len(subject) for subject, _, _ in self.rows), default=0)
        return "\n".join(f"{state:<8} {subject:<{width}}  {found}".rstrip() for subject, state, found in self.rows)

    def require(self) -> None:
        """Raises UserError for one problem, Problems for several."""
        raise_all(self.problems)
