"""What an exercise's notebook uses: the task of this student, and self-checks.

A self-check runs the student's part in the notebook's own process, so it proves nothing to
anybody else, and it knows only some of the guests.  Credit comes from `xenlab grade`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xenlab.errors import XenlabError
from xenlab.grading.guests import image_from_source, record, replay
from xenlab.grading.instances import NO_STUDENT_SEED, seed_of
from xenlab.grading.lessons import Lesson, lesson
from xenlab.grading.lessons.base import Finding, Plan, told

_NO_STUDENT = (
    "`student` is empty, so this is the instance of seed 0, the same for everybody. "
    "Fill in your id and run the cells again: your own instance is another one.\n\n"
)


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The result of a self-check.  It is true when all that was looked at passed."""

    passed: bool
    text: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return self.text


class Exercise:
    """One student's instance of an exercise.

    Attributes:
        seed: follows from the student's id.
        parameters: what the seed chose, by name.
    """

    def __init__(self, lesson: Lesson, seed: int) -> None:
        self._lesson, self.seed = lesson, seed
        self.parameters = dict(lesson.parameters)

    def __repr__(self) -> str:
        return f"Exercise {self._lesson.number}: {self._lesson.title} (seed {self.seed})\n\n{self._task()}"

    def _repr_markdown_(self) -> str:
        return f"**Exercise {self._lesson.number}** · seed {self.seed}\n\n{self._task()}"

    def _task(self) -> str:
        """The task in words, as Markdown; without a student's id it begins by saying so."""
        return (_NO_STUDENT if self.seed == NO_STUDENT_SEED else "") + self._lesson.task()

    def check(self, check: str, *answers: Any) -> SelfCheck:
        """Try an answer on the guests of one self-check.

        Args:
            check: its id, like ``"02.1"``.
            answers: what the exercise asks for: the source, the two dicts, or the class.

        Raises:
            XenlabError: no such check, or not as many answers as the exercise asks for.
        """
        plan = self._plan(check)
        slot = self._lesson.slot
        if len(answers) != len(slot.names):
            raise XenlabError(
                f"check {check} takes {len(slot.names)} answers ({', '.join(slot.names)}), got {len(answers)}"
            )
        if slot.kind:
            findings = [self._try(guest, answers[0]) for guest in self._lesson.guests() if guest.check == check]
        else:
            data = dict(zip(slot.names, answers, strict=True))
            findings = [finding for finding in self._lesson.examine(data) if finding.check == check]
        return _self_check(plan, findings)

    def _plan(self, check: str) -> Plan:
        for plan in self._lesson.plan:
            if plan.id == check:
                return plan
        raise XenlabError(f"check {check!r}: expected one of {', '.join(plan.id for plan in self._lesson.plan)}")

    def _try(self, guest: Any, part: Any) -> Finding:
        if not callable(part):
            return Finding(guest.check, False, f"expected the class {self._lesson.slot.names[0]}, found {part!r:.80}")
        image = image_from_source(guest.source, guest.name)
        decisions = record(image, self._lesson.slot, part)
        return self._lesson.judge(guest, replay(image, self._lesson.slot, decisions), decisions)


def _self_check(plan: Plan, findings: Sequence[Finding]) -> SelfCheck:
    failed = [finding.message for finding in findings if not finding.passed]
    if failed:
        return SelfCheck(False, f"self-check {plan.id} failed: {plan.invariant}\n{told(failed)}")
    said = next((finding.remark for finding in findings if finding.remark), plan.invariant)
    return SelfCheck(True, f"self-check {plan.id} passed: {said}\nGrading looks at more than this.")


def exercise(number: str, student: str = "") -> Exercise:
    """The instance of an exercise for a student.

    Args:
        number: of the lesson, like ``"02"``.
        student: the id under which answers are handed in; empty gives the instance of seed 0.

    Raises:
        XenlabError: there is no such exercise.
    """
    seed = seed_of(student)
    return Exercise(lesson(number, seed), seed)
