"""Whose work a commit lacks."""

from forge_lib.elastic.work import Work

PLANNED = {"a": ("alder", 100), "b": ("birch", 50), "c": ("cedar", 0)}


def test_a_peer_that_did_not_contribute_has_lost_at_most_what_was_planned():
    work = Work(index=0, planned_tokens=PLANNED)
    assert work.missing(["a"]) == [("birch", 50)], "cedar had nothing to do"
    assert work.missing(["a", "b"]) == []


def test_a_commit_of_another_plan_says_nothing_about_this_one():
    assert Work(index=0, planned_tokens=PLANNED).missing(["b"]) == []
    assert Work().missing(["a"]) == []
