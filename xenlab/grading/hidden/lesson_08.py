"""Further guests for exercise 08: groups, insistent and quiet ports, masks in a flutter, sleep, short turns."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_08 import INSISTENT, LOUD, QUIET, SendMaskBlock

_TURNS = (1, 2, 3)


def guests(lesson: SendMaskBlock) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [*_sending(lesson), *_masking(lesson), *_sleeping(lesson)]


def _sending(lesson: SendMaskBlock) -> list[Guest]:
    loud, insistent, quiet = (lesson.ports(kind, 3, "sending") for kind in (LOUD, INSISTENT, QUIET))
    lesson.race("groups", loud, 30).takes().works(200).sends(*loud, *loud[::-1], pause=10)
    again = lesson.race("insistent", (insistent[0], loud[0]), 45).takes().works(220)
    again.sends(insistent[0], insistent[0], loud[0], insistent[0], insistent[0], pause=9)
    shut = lesson.race("insistent-while-shut", (insistent[1], loud[1]), 20).works(120).takes().works(40)
    shut.sends(insistent[1], loud[1], insistent[1], loud[1], pause=8)
    pair = _of_one_group(lesson)
    lesson.race("quiet-and-loud", pair, 50).takes().works(250).sends(pair[0], pair[1], pair[0], pair[1], pause=10)
    lesson.race("quiet", (quiet[0], quiet[1]), 60).takes().works(150).sends(quiet[0], quiet[1], quiet[0], pause=9)
    turn = lesson.pick_turn("storm")
    storm = lesson.race("storm", (loud[2], insistent[2], quiet[2]), turn).takes().works(300)
    storm.sends(*(loud[2], insistent[2], quiet[2]) * 4, pause=7)
    names = ("groups", "insistent", "insistent-while-shut", "quiet-and-loud", "quiet", "storm")
    return [lesson.guest("08.1", name) for name in names]


def _of_one_group(lesson: SendMaskBlock) -> tuple[int, int]:
    """A quiet and a loud port whose events share a bit of the selector."""
    rules = lesson.rules
    for quiet in range(2 * rules.group, 32):
        for loud in range(quiet - quiet % rules.group, quiet - quiet % rules.group + rules.group):
            if lesson.kind(quiet) == QUIET and lesson.kind(loud) == LOUD:
                return quiet, loud
    # Groups of three among remainders by three hold each kind once, so there always is one.
    raise AssertionError("no group has a quiet and a loud port")


def _masking(lesson: SendMaskBlock) -> list[Guest]:
    loud, insistent, quiet = (lesson.ports(kind, 2, "masking") for kind in (LOUD, INSISTENT, QUIET))
    for name, port in (("closed", loud[0]), ("closed-insistent", insistent[0]), ("closed-quiet", quiet[0])):
        race = lesson.race(name, (port, loud[1]), 30).closes(port).takes().works(60).opens(port).works(40)
        race.sends(port, loud[1], port, pause=6)
    twice = lesson.race("opened-twice", (loud[0], insistent[0], quiet[1]), 20)
    twice.closes(loud[0]).works(60).opens(loud[0]).opens(loud[0]).opens(quiet[1]).takes().works(20).opens(insistent[0])
    twice.sends(quiet[1], insistent[0], loud[0], pause=5)
    turn = lesson.pick_turn("flutter")
    flutter = lesson.race("flutter", (loud[0], insistent[1], quiet[0]), turn).takes()
    for port in (loud[0], insistent[1], quiet[0], loud[0]):
        flutter.closes(port).works(14).opens(port).works(9)
    flutter.sends(*(loud[0], insistent[1], quiet[0]) * 3, pause=4)
    names = ("closed", "closed-insistent", "closed-quiet", "opened-twice", "flutter")
    return [lesson.guest("08.2", name) for name in names]


def _sleeping(lesson: SendMaskBlock) -> list[Guest]:
    loud, insistent, quiet = (lesson.ports(kind, 2, "sleeping") for kind in (LOUD, INSISTENT, QUIET))
    lesson.race("quiet-sleeper", quiet, 40).blocks().blocks().sends(*quiet, quiet[0], pause=70)
    before = lesson.race("quiet-before-sleep", (quiet[0], loud[0]), 25).takes().works(80).blocks().works(5)
    before.sends(quiet[0], quiet[0], pause=5).sends(loud[0], pause=90)
    closed = lesson.race("not-woken", (loud[0], loud[1]), 30).closes(loud[0]).blocks().opens(loud[0]).works(10)
    closed.sends(loud[0], loud[0], loud[1], pause=50)
    lesson.race("insistent-sleeper", (insistent[0],), 35).blocks().works(4).blocks().sends(*insistent[:1] * 4, pause=45)
    made = ["quiet-sleeper", "quiet-before-sleep", "not-woken", "insistent-sleeper"]
    for turn in _TURNS:
        name = f"race-{turn}"
        race = lesson.race(name, (loud[0], insistent[1], quiet[1]), turn)
        for rounds in range(4):
            race.shuts().works(3 + rounds).blocks().works(5).takes()
        race.sends(*(quiet[1], loud[0], insistent[1], quiet[1]) * 2, pause=lesson.pick_turn(name) + 6)
        made.append(name)
    return [lesson.guest("08.3", name) for name in made]
