"""When periodic work is due."""

from forge_lib.training.periodic import Periodic


def due_steps(steps: list[int], every: int, num_steps: int) -> list[int]:
    periodic = Periodic(0, num_steps)
    found = [0] if periodic.is_due(every) else []
    for step in steps:
        periodic.advance(step)
        if periodic.is_due(every):
            found.append(step)
    return found


def test_work_is_due_at_the_start_at_each_multiple_and_after_the_last_step():
    assert due_steps(list(range(1, 11)), 4, 10) == [0, 4, 8, 10]
    assert due_steps(list(range(1, 11)), 0, 10) == []


def test_work_is_due_once_if_several_steps_are_completed_at_once():
    assert due_steps([3, 3, 9, 9, 10, 23], 4, 30) == [0, 9, 23]


def test_a_run_that_continues_has_nothing_due_before_its_loop_unless_it_is_complete():
    assert not Periodic(5, 10).is_due(1)
    assert Periodic(10, 10).is_due(1)


def test_what_was_due_before_a_peer_came_is_not_due_for_it():
    periodic = Periodic(0, 100)
    periodic.advance(50, since=49)
    assert not periodic.is_due(20)
    periodic.advance(61, since=50)
    assert periodic.is_due(20)
