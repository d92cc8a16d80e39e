"""Which nodes a job can do without, as Slurm's answers tell."""

import pytest

from megagpt.supervise import exclusion
from megagpt.supervise.exclusion import followers, keep_off
from megagpt.supervise.slurm import NoAnswerError

GPU = "8|64000|gpu:a100:4(S:0-1)"


class Slurm:
    """Answers as scontrol and sinfo do; notes what is changed."""

    def __init__(self) -> None:
        self.nodes = {f"node{number}": f"idle|{GPU}|(null)" for number in (1, 2, 3)}
        # NumNodes of a job that has just been queued again, and has left one of its two nodes
        self.job = {"Partition": "main", "ExcNodeList": "(null)", "Features": "(null)", "NumNodes": "1"}
        self.updates: list[str] = []
        self.refuses = self.is_away = False
        self.queue = ""

    def ask(self, *command: str, pauses: object = None) -> str | None:
        if self.is_away:
            raise NoAnswerError("Slurm does not answer")
        if command[0] == "sinfo":
            is_ours = "--partition=main" in command
            return "".join(f"{name}|{rest}\n" for name, rest in self.nodes.items() if is_ours)
        if command[0] == "squeue":
            return self.queue
        if command[1] == "update":
            self.updates += [command[-1]]
            return None if self.refuses else ""
        if command[2] == "hostnames":
            return command[-1].replace(",", "\n")
        if "reservation" in command:
            return f"ReservationName={command[-1]} Nodes=node1,node2 NodeCnt=2\n"
        return "JobId=7 Comment=x " + " ".join(f"{key}={value}" for key, value in self.job.items())


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    monkeypatch.setattr(exclusion, "ask", slurm.ask)
    return slurm


def test_nodes_are_left_out_besides_those_that_already_are(slurm: Slurm) -> None:
    slurm.nodes |= {"node4": f"resv|{GPU}|(null)", "node5": f"mix-|{GPU}|fast,new"}
    slurm.job |= {"ExcNodeList": "node4,node2"}
    assert keep_off("7", ["node2"], 2) == ""
    assert slurm.updates == ["ExcNodeList=node4,node2"]


@pytest.mark.parametrize(
    ("state", "is_enough"),
    [
        *[
            (state, True)
            for state in (
                "idle",
                "mix",
                "alloc",
                "comp",
                "idle~",
                "alloc-",
                "alloc+",
                "mix#",
                "idle%",
                "idle!",
                "mix@",
                "plnd",
            )
        ],
        *[
            (state, False)
            for state in ("down*", "drain", "comp*", "alloc*", "resv", "maint", "idle$", "drng+", "boot^")
        ],
    ],
)
def test_only_nodes_that_are_up_count(slurm: Slurm, state: str, is_enough: bool) -> None:
    slurm.nodes["node3"] = f"{state}|{GPU}|(null)"
    reason = keep_off("7", ["node2"], 2)
    assert reason == ("" if is_enough else "of nodes that serve as well 1 are up, and the job needs 2")
    assert bool(slurm.updates) == is_enough


@pytest.mark.parametrize("other", ["4|64000|gpu:a100:4(S:0-1)", "8|32000|gpu:a100:4(S:0-1)", "8|64000|gpu:t4:4"])
def test_nodes_that_have_less_or_other_gpus_do_not_count(slurm: Slurm, other: str) -> None:
    slurm.nodes["node3"] = f"idle|{other}|(null)"
    assert "1 are up, and the job needs 2" in keep_off("7", ["node2"], 2)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ("new", ""),
        ("new&fast", ""),
        ("old|new", ""),
        ("old", "of nodes that serve as well 0 are up"),
        ("[rack1|rack2]", "which nodes have --constraint=[rack1|rack2] is not worked out here"),
    ],
)
def test_nodes_need_the_features_of_the_constraint(slurm: Slurm, constraint: str, reason: str) -> None:
    slurm.nodes = {f"node{number}": f"idle|{GPU}|fast,new" for number in (1, 2, 3)}
    slurm.job["Features"] = constraint
    assert keep_off("7", ["node2"], 2).startswith(reason)
    assert bool(slurm.updates) == (reason == "")


def test_a_reservation_has_its_own_nodes_only(slurm: Slurm) -> None:
    slurm.nodes |= {"node1": f"resv|{GPU}|(null)"}
    slurm.job |= {"Reservation": "ours"}
    assert keep_off("7", ["node2"], 1) == ""
    assert "1 are up, and the job needs 2" in keep_off("7", ["node2"], 2)


def test_one_of_several_partitions_has_to_do(slurm: Slurm) -> None:
    slurm.job["Partition"] = "short,main"
    assert keep_off("7", ["node2"], 2) == ""
    slurm.job["Partition"] = "short"
    assert keep_off("7", ["node2"], 2) == "sinfo shows no node2 in partition short"


def test_a_node_that_slurm_calls_otherwise_or_that_is_asked_for_stays(slurm: Slurm) -> None:
    assert keep_off("7", ["node2.example.org"], 2) == "sinfo shows no node2.example.org in partition main"
    slurm.job["ReqNodeList"] = "node1,node2"
    assert keep_off("7", ["node2"], 2) == "--nodelist asks for node2"
    assert slurm.updates == []


def test_what_slurm_refuses_is_told(slurm: Slurm) -> None:
    slurm.refuses = True
    assert keep_off("7", ["node2"], 2) == "scontrol refuses to leave them out, as printed above"


def test_a_controller_that_is_away_is_no_obstacle_to_the_rest(slurm: Slurm) -> None:
    slurm.is_away = True
    assert keep_off("7", ["node2"], 2) == "Slurm does not answer"


def test_the_rest_of_a_chain_is_told_from_what_else_waits_for_it(slurm: Slurm) -> None:
    ours = "/repo/slurm/pretrain.sbatch run.yaml ds.json data.split=[90, 10, 0] a=b|c"
    slurm.queue = f"""
        7|(null)|{ours}
        8|afterany:7(unfulfilled)|{ours}
        9|afterany:8(unfulfilled)|{ours}
        10|afterok:9(unfulfilled)|/repo/slurm/evaluate.sbatch runs found.json
        11|afterany:7(unfulfilled)|/repo/slurm/pretrain.sbatch tune.yaml ds.json
        12|afterany:77(unfulfilled)|{ours}
        13|(null)|{ours}
        """
    assert followers("7", ended_well=True) == followers("7", ended_well=False) == ["8", "9"]
    slurm.queue = slurm.queue.replace("afterany:", "afterok:")
    assert followers("7", ended_well=True) == ["8", "9"]
    assert followers("7", ended_well=False) == [], "Slurm takes them away"
    assert followers("70", ended_well=True) == []
