"""Further guests for exercise 05: each rule by itself, two rules broken at once, counts that have to come out even."""

from __future__ import annotations

from xenlab.grading.lessons.base import Guest
from xenlab.grading.lessons.lesson_05 import REFUSED_PAGE, REFUSED_TABLE, Validator
from xenlab.grading.lessons.page_guests import (
    FREE_FRAME,
    HYPERVISORS,
    LEAF,
    NEIGHBOUR,
    NOWHERE,
    OWN,
    READ_ONLY,
    ROOT,
    TABLE,
    WRITABLE,
    Step,
    fill,
    give_back,
    hang,
    map_page,
    new_base,
    own,
    pin,
    set_gdt,
    take_out,
    unmap,
    unpin,
)

_USER, _SUPERPAGE = 0x4, 0x80
_ROOT_SLOT = 768


def guests(lesson: Validator) -> list[Guest]:
    """What the judge runs besides the guests of the self-checks."""
    return [
        lesson.guest("05.1", "pinned", _pinned(lesson)),
        lesson.guest("05.1", "new-root", _new_root(lesson)),
        lesson.guest("05.1", "back-and-forth", _back_and_forth(lesson)),
        lesson.guest("05.1", "limit-and-back", _limit_and_back(lesson)),
        lesson.guest("05.2", "all-flags", _all_flags(lesson)),
        lesson.guest("05.2", "owners", _owners(lesson)),
        lesson.guest("05.2", "two-rules-at-once", _two_rules(lesson)),
        lesson.guest("05.2", "inside-a-table", _inside(lesson)),
        _hostile(lesson, "still-writable", _still_writable(lesson)),
        _hostile(lesson, "two-levels", _two_levels(lesson)),
        _hostile(lesson, "descriptors", _descriptors(lesson)),
        _hostile(lesson, "pinned-and-written", _pinned_and_written(lesson)),
        _hostile(lesson, "given-back", _given_back(lesson)),
        _hostile(lesson, "refused-and-given-back", _refused_and_given_back(lesson)),
        _hostile(lesson, "too-many-uses", _too_many_uses(lesson)),
    ]


def _hostile(lesson: Validator, name: str, steps: tuple[Step, ...]) -> Guest:
    """In the end each of them reaches for the neighbour's memory: without a check of owners all others are in vain."""
    return lesson.guest("05.3", name, (*steps, lesson.theirs(20)))


def _table(page: int, first: str) -> Step:
    """A spare page filled with one entry, and closed."""
    return fill(page, {0: first}).then(OWN.read_only(page))


def _still_pinned(lesson: Validator, page: int) -> Step:
    return lesson.refused(OWN.writable(page), "a pin is a use: the frame is a table still", REFUSED_PAGE)


# What a guest may have.


def _pinned(lesson: Validator) -> tuple[Step, ...]:
    return (
        _table(0, own(1)),
        pin(own(0)),
        hang(700, own(0)),
        take_out(700),
        unpin(own(0)),
        OWN.writable(0),
        lesson.theirs(0),
    )


def _new_root(lesson: Validator) -> tuple[Step, ...]:
    closed = fill(0, {_ROOT_SLOT: LEAF}, TABLE).then(OWN.read_only(0))
    back = new_base(ROOT)
    return (closed, new_base(own(0)), map_page(0, own(1)), back, OWN.writable(0), lesson.bad_bit(1))


def _back_and_forth(lesson: Validator) -> tuple[Step, ...]:
    """A frame is a table, a page, and a table again; with a count that leaks it is not."""
    once = (OWN.read_only(0), hang(700, own(0)), take_out(700), OWN.writable(0))
    return (_table(0, own(1)), OWN.writable(0), *once, *once, *once, lesson.theirs(0))


def _limit_and_back(lesson: Validator) -> tuple[Step, ...]:
    full = lesson.up_to_the_limit(3, range(8))
    read = map_page(10, own(3), READ_ONLY)
    return (*full, read, unmap(0), map_page(11, own(3)), OWN.gone(3), map_page(12, own(3)))


# What an entry may be.


def _all_flags(lesson: Validator) -> tuple[Step, ...]:
    steps = [map_page(0, own(1), WRITABLE)]
    for flag in (0x8, 0x10, 0x80, 0x100, lesson.bit):
        steps.append(lesson.refused(map_page(1, own(1), READ_ONLY | flag), f"flag {flag:#x} is refused", lesson.flags))
    rule = "no page of this kind for applications"
    steps.append(lesson.refused(map_page(1, own(1), WRITABLE | _USER), rule, lesson.flags))
    read_only = map_page(1, own(1), READ_ONLY | _USER)
    steps.append(read_only if lesson.user == "not writable" else lesson.refused(read_only, rule, lesson.flags))
    for flag in (0x600, 0xA00, 0xC00):
        if not flag & lesson.bit:
            steps.append(map_page(2, own(1), READ_ONLY | flag))
    steps += [_table(0, own(1)), lesson.refused(hang(700, own(0), TABLE | _SUPERPAGE), "a superpage", lesson.flags)]
    steps.append(lesson.refused(hang(700, own(0), TABLE | lesson.bit), "the forbidden bit, in the root", lesson.flags))
    return (*steps, hang(700, own(0)))


def _owners(lesson: Validator) -> tuple[Step, ...]:
    cases = (
        (NEIGHBOUR, "the neighbour's", lesson.foreign),
        (HYPERVISORS, "the hypervisor's", lesson.nobody),
        (FREE_FRAME, "free", lesson.nobody),
        (NOWHERE, "not there", lesson.nowhere),
    )
    pages = [
        lesson.refused(map_page(1, frame, READ_ONLY), f"the frame is {whose}", errno) for frame, whose, errno in cases
    ]
    tables = [lesson.refused(hang(700, frame), f"the table is {whose}", errno) for frame, whose, errno in cases]
    return (map_page(0, own(1)), *pages, *tables)


def _two_rules(lesson: Validator) -> tuple[Step, ...]:
    errno = lesson.flags if lesson.first == "flags" else lesson.foreign
    none = lesson.flags if lesson.first == "flags" else lesson.nowhere
    rule = f"of two broken rules the {lesson.first} is looked at first"
    return (
        map_page(0, own(1)),
        lesson.refused(map_page(1, NEIGHBOUR, WRITABLE | lesson.bit), rule, errno),
        lesson.refused(map_page(1, NOWHERE, WRITABLE | 0x10), rule, none),
        lesson.refused(hang(700, NEIGHBOUR, TABLE | _SUPERPAGE), rule, errno),
    )


def _inside(lesson: Validator) -> tuple[Step, ...]:
    """A table with one bad entry is refused, and what its good entries had taken goes back."""
    filled = fill(0, {0: own(1), 1: own(2)}).then(fill(0, {5: own(1)}, WRITABLE | lesson.bit)).then(OWN.read_only(0))
    return (
        filled,
        lesson.refused(hang(700, own(0)), "an entry of the table has the forbidden bit", lesson.flags),
        OWN.writable(0),
        fill(0, {5: own(3)}).then(OWN.read_only(0)),
        hang(700, own(0)),
        take_out(700),
        _table(4, own(2)),
        hang(701, own(4)),
    )


# What no frame may be.


def _still_writable(lesson: Validator) -> tuple[Step, ...]:
    rule = "the frame is mapped writable still"
    return (
        map_page(0, own(0)),
        _table(0, own(1)),
        lesson.refused(hang(700, own(0)), rule, REFUSED_TABLE),
        lesson.refused(pin(own(0)), rule, REFUSED_TABLE),
        unmap(0),
        hang(700, own(0)),
        lesson.refused(map_page(0, own(0)), "a page table must not be writable", REFUSED_PAGE),
        map_page(0, own(0), READ_ONLY),
    )


def _two_levels(lesson: Validator) -> tuple[Step, ...]:
    rule = "a table of one level cannot be one of another"
    return (
        _table(0, own(1)),
        pin(own(0)),
        lesson.refused(pin(own(0), 2), rule, REFUSED_TABLE),
        lesson.refused(new_base(LEAF), rule, REFUSED_TABLE),
        lesson.refused(set_gdt(LEAF), "a table cannot be descriptors", REFUSED_TABLE),
        lesson.refused(hang(700, ROOT), "the root cannot be written as an l1 table", REFUSED_TABLE),
        hang(700, own(0)),
    )


def _descriptors(lesson: Validator) -> tuple[Step, ...]:
    read = map_page(0, own(9), READ_ONLY)
    if lesson.secret:
        read = lesson.refused(read, "descriptors may not be read", REFUSED_PAGE)
    return (
        lesson.refused(set_gdt(own(9)), "the frame is mapped writable", REFUSED_TABLE),
        OWN.read_only(9),
        set_gdt(own(9)),
        lesson.refused(map_page(1, own(9)), "descriptors must not be writable", REFUSED_PAGE),
        read,
        lesson.refused(pin(own(9)), "descriptors cannot be a table", REFUSED_TABLE),
        set_gdt(own(9)),
    )


def _pinned_and_written(lesson: Validator) -> tuple[Step, ...]:
    return (
        _table(0, own(1)),
        hang(700, own(0)),
        hang(701, own(0)),
        pin(own(0)),
        take_out(700),
        take_out(701),
        _still_pinned(lesson, 0),
        unpin(own(0)),
        OWN.writable(0),
        lesson.refused(hang(700, own(0)), "it is writable again", REFUSED_TABLE),
    )


def _given_back(lesson: Validator) -> tuple[Step, ...]:
    """A frame that is given back while it is mapped is the guest's until the last mapping goes."""
    gone = lesson.refused(map_page(2, own(7)), "the frame is free", lesson.nobody)
    return (map_page(0, own(7)), give_back(own(7)), unmap(0), map_page(1, own(1)), OWN.gone(7), gone)


def _refused_and_given_back(lesson: Validator) -> tuple[Step, ...]:
    """A refused use that was counted as a reference would keep the frame for ever."""
    tried = lesson.refused(hang(700, own(7)), "the frame is mapped writable", REFUSED_TABLE)
    return (tried, *_given_back(lesson))


def _too_many_uses(lesson: Validator) -> tuple[Step, ...]:
    """The limit holds for tables, too; and a refused use is not counted."""
    slots = range(700, 700 + lesson.most)
    rule = f"a frame has at most {lesson.most} uses"
    return (
        _table(0, own(1)),
        *(hang(slot, own(0)) for slot in slots),
        lesson.refused(hang(800, own(0)), rule, REFUSED_TABLE),
        lesson.refused(pin(own(0)), rule, REFUSED_TABLE),
        *(take_out(slot) for slot in slots),
        OWN.writable(0),
    )
