"""A damaged file of a run is named or made again: never another result, never a traceback."""

from attack.folders import COMMANDS, RIGHT, attack


def test_every_file_of_a_run_may_be_damaged(memory):
    commands = [name for name in COMMANDS if name != "report"]
    found = attack(memory, flips=1, seed=0, commands=commands, each=1)
    assert len(found) >= 14
    wrong = {file: set(verdicts) - RIGHT for file, verdicts in found.items()}
    assert not any(wrong.values()), wrong
