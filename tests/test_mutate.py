"""scripts/mutate.py in a tree of its own: a fault that its test notices, one that it does not, lists that are wrong."""

import pytest
from mutate import ROOT, main, read_lists

CODE = "import math\n\n\ndef area(radius):\n    return math.pi * radius**2  # of a disc\n\n\ndef waits():\n    return False\n"
TEST = """
import sslctl.disc

def test_area_of_the_unit_disc():
    while sslctl.disc.waits():
        pass
    assert 3.14 < sslctl.disc.area(1) < 3.15
"""


@pytest.fixture
def run(tmp_path, capfd):
    """run(faults, …) -> (status, what was printed) of a list with them."""
    for folder in ("sslctl", "tests", "scripts/mutations"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sslctl" / "__init__.py").touch()
    (tmp_path / "sslctl" / "disc.py").write_text(CODE)
    (tmp_path / "tests" / "test_disc.py").write_text(TEST)

    def of(*faults, tests="tests/test_disc.py", words=()):
        text = f"file: sslctl/disc.py\ntests: [{tests}]\nfaults:\n" + "".join(f"  - {fault}\n" for fault in faults)
        (tmp_path / "scripts" / "mutations" / "disc.yaml").write_text(text)
        status = main(["--jobs=2", *words], tmp_path, heavy=())
        return status, capfd.readouterr().out

    return of


KILLED = '{old: "radius**2", new: "radius + 2"}'
SURVIVING = '{old: "radius**2", new: "radius**3"}'
SAME = '{old: "import math", new: "import math, sys", equivalent: "sys is not used"}'


def test_a_fault_that_a_test_notices_is_killed(run):
    status, printed = run(KILLED)
    assert (status, printed.split(";")[0]) == (0, "1 faults: 1 killed")


def test_survivors_are_printed_with_file_line_and_both_texts(run):
    status, printed = run(KILLED, SURVIVING, SAME)
    assert status == 1
    assert printed.startswith(
        "survived: sslctl/disc.py:5\n  - radius**2\n  + radius**3\n3 faults: 1 killed, 1 equivalent, 1 survived;"
    )


def test_a_fault_marked_equivalent_may_survive_and_must_not_be_killed(run):
    assert run(SAME)[0] == 0
    status, printed = run(KILLED[:-1] + ', equivalent: "so it is said"}')
    assert status == 1
    assert printed.startswith("killed, though marked equivalent: sslctl/disc.py:5 FAILED tests/test_disc.py")


def test_a_fault_without_an_end_is_killed(run, monkeypatch):
    monkeypatch.setattr("mutate.PATIENCE", (1.0, 1.0))
    status, printed = run('{old: "return False", new: "return True"}')
    assert status == 0
    assert printed.startswith("killed (did not end): sslctl/disc.py:9\n")


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ('{old: "radius**4", new: "radius"}', "disc.yaml: this stands 0 times in sslctl/disc.py, not once: radius**4"),
        ('{old: "radius", new: "r"}', "disc.yaml: this stands 2 times in sslctl/disc.py, not once: radius"),
        ('{old: "of a disc", new: "of a circle"}', "nothing changes, or it is no Python: of a circle"),
        ('{old: "radius**2", new: "radius**"}', "nothing changes, or it is no Python: radius**"),
        ('{old: "radius**2", new: "radius", equivalent: ""}', "a fault has old, new and perhaps equivalent"),
        ('{old: "radius**2", now: "radius"}', "a fault has old, new and perhaps equivalent"),
    ],
)
def test_a_wrong_list_is_named(run, fault, wrong):
    status, printed = run(fault)
    assert status == 2
    assert wrong in printed


def test_what_every_list_replaces_stands_once_in_the_code(monkeypatch):
    monkeypatch.setattr("mutate._differs", lambda *texts: True)  # which takes time
    faults, wrong = read_lists([], ROOT)
    assert wrong == []
    assert len(faults) > 500


def test_tests_must_pass_and_exist_without_a_fault(run):
    assert run(KILLED, tests="tests/test_disc.py, -k, sphere")[0] == 2
    assert run(KILLED, tests="tests/test_ball.py")[0] == 2


def test_lists_are_chosen_by_name(run):
    assert run(KILLED, words=["disc"])[0] == run(KILLED, words=["."])[0] == 0
    status, printed = run(KILLED, words=["ball"])
    assert status == 2
    assert "No such file" in printed
    assert "ball.yaml" in printed
