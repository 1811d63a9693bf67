"""Executors: every task once, resumed by records, errors in one sentence, a dead process told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from retro.common.files import file_record, stable_hash
from retro.retrieval.executors import ranks as ranks_module
from retro.retrieval.executors.opening import open_executor
from retro.retrieval.executors.ranks import RankExecutor, rank_of
from retro.retrieval.executors.tasks import Task, finished
from tests.waiting import FOREVER, wait_until

HERE = "tests.retrieval.executors.test_executors"


def square(spec):
    """Append to a diary that a number is being squared, and where; write the square, once the file `after` is there."""
    folder = Path(spec["folder"])
    with open(folder / "diary.txt", "a") as diary:
        diary.write(f"{spec['number']} {os.getpid()}\n")
    wait_until(lambda: "after" not in spec or (folder / spec["after"]).exists())
    file = folder / f"{spec['number']}.txt"
    file.write_text(str(spec["number"] ** 2))
    return {"square": spec["number"] ** 2, "files": {file.name: file_record(file)}}


def fail(spec):
    if spec["kind"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError, "KeyError": KeyError}[spec["kind"]](
        "the remedy"
    )


def tasks(folder, count, **more):
    return [Task(f"square-{n}", f"{HERE}:square", {"folder": str(folder), "number": n, **more}) for n in range(count)]


def diary(folder):
    return [line.split() for line in (folder / "diary.txt").read_text().splitlines()]


def _lines(folder):
    return diary(folder) if (folder / "diary.txt").exists() else []


def run(folder, jobs, workers=1, executor="local"):
    seen = {}
    open_executor(executor, workers).run(folder, jobs, lambda task, record: seen.__setitem__(task.name, record))
    return seen


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once_and_those_it_leads_to(tmp_path, workers):
    more = {f"square-{n}": tasks(tmp_path, 4)[n + 1 : n + 2] for n in range(3)}  # 0 leads to 1, 1 to 2, 2 to 3
    seen = {}

    def on_done(task, record):
        seen[task.name] = record["square"]
        return more.get(task.name)

    others = [Task(f"other-{n}", f"{HERE}:square", {"folder": str(tmp_path), "number": n}) for n in range(10, 16)]
    open_executor("local", workers).run(tmp_path, [tasks(tmp_path, 1)[0], *others], on_done)
    assert sorted(int(number) for number, _ in diary(tmp_path)) == [0, 1, 2, 3, *range(10, 16)]
    assert seen == {f"square-{n}": n * n for n in range(4)} | {f"other-{n}": n * n for n in range(10, 16)}
    assert (str(os.getpid()) in {process for _, process in diary(tmp_path)}) == (workers == 1)


def test_no_process_is_started_for_light_tasks(tmp_path):
    light = [Task(task.name, task.function, task.spec, light=True) for task in tasks(tmp_path, 3)]
    run(tmp_path, [*light, *tasks(tmp_path, 4)[3:]], workers=2)
    assert {process for _, process in diary(tmp_path)} == {str(os.getpid())}


def test_light_tasks_do_not_hide_that_others_wait(tmp_path):
    """As in a build of small shards: tables, light, lead to keys, which are not."""
    each = tasks(tmp_path, 8)
    light = [Task(task.name, task.function, task.spec, light=True) for task in each[:4]]
    leads = {task.name: [other] for task, other in zip(light, each[4:], strict=True)}
    open_executor("local", 2).run(tmp_path, light, lambda task, record: leads.get(task.name))
    assert str(os.getpid()) not in {process for number, process in diary(tmp_path) if int(number) >= 4}


def test_what_is_done_is_not_done_again_unless_its_files_are_gone(tmp_path):
    first = run(tmp_path, tasks(tmp_path, 3))
    (tmp_path / "1.txt").unlink()
    assert finished(tmp_path, "square-1") is None and finished(tmp_path, "square-0") == first["square-0"]
    assert run(tmp_path, tasks(tmp_path, 4)) == first | {"square-3": run(tmp_path, tasks(tmp_path, 4))["square-3"]}
    assert [int(number) for number, _ in diary(tmp_path)] == [0, 1, 2, 1, 3]


def test_tasks_of_the_calling_process_run_while_workers_do_theirs(tmp_path):
    here = Task("here", f"{HERE}:square", {"folder": str(tmp_path), "number": 9}, here=True)
    first, *others = tasks(tmp_path, 3, after="9.txt")
    run(tmp_path, [first, here, *others], workers=2)
    where = dict(diary(tmp_path))
    assert where["9"] == str(os.getpid()) and where["9"] not in (where["0"], where["1"], where["2"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("ValueError", ValueError, "^the remedy$"),
        ("FileNotFoundError", FileNotFoundError, "^the remedy$"),
        ("KeyError", (KeyError, RuntimeError), "the remedy"),
    ],
)
def test_the_error_of_a_task_is_raised(tmp_path, workers, kind, raised, message):
    wrong = [Task(f"wrong-{n}", f"{HERE}:fail", {"kind": kind}) for n in range(2)]
    with pytest.raises(raised, match=message):
        run(tmp_path, wrong, workers)
    assert not list(tmp_path.glob("wrong*"))


def test_a_worker_that_dies_is_told(tmp_path):
    with pytest.raises(ChildProcessError, match="exit code -9 during dies"):
        run(tmp_path, [Task("dies", f"{HERE}:fail", {"kind": "die"}), *tasks(tmp_path, 2, after="never")], 2)


def test_a_worker_that_dies_while_it_is_idle_is_replaced(tmp_path):
    """So does the one that had nothing to do while the other was busy: the job goes on."""

    def on_done(task, record):
        if task.name == "square-0":
            (worker,) = [int(process) for number, process in diary(tmp_path) if number == "0"]
            listening = _listening()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: _listening() < listening)  # its end has been noted
            (tmp_path / "killed").touch()
        return more if task.name == "slow" else None

    more = tasks(tmp_path, 5)[2:]
    slow = Task("slow", f"{HERE}:square", {"folder": str(tmp_path), "number": 1, "after": "killed"})
    open_executor("local", 2).run(tmp_path, [tasks(tmp_path, 1)[0], slow], on_done)
    assert sorted(int(number) for number, _ in diary(tmp_path)) == [0, 1, 2, 3, 4]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = f"from {HERE} import *; f = Path({str(tmp_path)!r}); run(f, tasks(f, 2, after='never'), 2)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: parent.poll() is not None or len(_lines(tmp_path)) == 2)
    assert parent.poll() is None
    parent.kill()
    parent.wait()
    workers = [int(process) for _, process in diary(tmp_path)]
    wait_until(lambda: not any(_alive(worker) for worker in workers))


def _alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _listening():
    return sum("_listen" in thread.name for thread in threading.enumerate())


def _rank(folder, rank, count, code):
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "FOLDER": str(folder)}
    code = f"import os; from pathlib import Path; folder = Path(os.environ['FOLDER']); from {HERE} import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def test_ranks_share_the_tasks(tmp_path):
    code = "seen = run(folder, tasks(folder, 12), None, 'ranks'); print(seen); assert len(seen) == 12"
    ranks = [_rank(tmp_path, rank, 3, code) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0], [rank.stderr.read() for rank in ranks]
    assert sorted(int(number) for number, _ in diary(tmp_path)) == list(range(12))
    assert len({process for _, process in diary(tmp_path)}) == 3


def test_the_error_of_a_rank_stops_the_others_and_a_new_start_takes_it_back(tmp_path):
    wrong = "from retro.retrieval.executors import ranks; ranks._TAKE_BACK_SECONDS = 0\n"  # where one begins late
    wrong += "run(folder, [Task('wrong', HERE + ':fail', {'kind': 'ValueError'}), *tasks(folder, 6)], None, 'ranks')"
    ranks = [_rank(tmp_path, rank, 2, wrong) for rank in range(2)]
    said = [rank.communicate(timeout=FOREVER)[1] for rank in ranks]
    assert all("ValueError: the remedy" in words for words in said)
    assert all((tmp_path / f"error-of-rank-{rank}.json").exists() for rank in range(2))
    right = f"from retro.retrieval.executors import ranks; ranks._TAKE_BACK_SECONDS = {FOREVER}\n"
    right += "run(folder, tasks(folder, 6), None, 'ranks')"
    ranks = [_rank(tmp_path, 1, 2, right)]
    wait_until(lambda: ranks[0].poll() is not None or (tmp_path / "sign-of-rank-1").exists())
    ranks.append(_rank(tmp_path, 0, 2, right))
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr.read() for rank in ranks]


def test_a_rank_that_comes_late_to_the_end_stops_in_peace(tmp_path):
    """Rank 0 has seen every record, written the manifest and removed the folder while rank 1 was still reading them."""
    folder = tmp_path / "job"
    folder.mkdir()
    run(folder, tasks(folder, 3))

    def on_done(task, record):
        shutil.rmtree(folder, ignore_errors=True)
        return (folder / "0.txt").read_text() and None

    assert RankExecutor(1, 2).run(folder, tasks(folder, 3), on_done) is None
    folder.mkdir()
    run(folder, tasks(folder, 3))
    with pytest.raises(FileNotFoundError):
        RankExecutor(0, 1).run(folder, tasks(folder, 3), on_done)


def test_a_rank_that_is_killed_is_told_and_one_that_takes_long_is_not(tmp_path, monkeypatch):
    """It gives signs in the middle of a task; the others finish what they have and then name the dead one."""
    monkeypatch.setattr(ranks_module, "_BEAT_SECONDS", 0.1)
    jobs = [
        Task(task.name, task.function, task.spec | {"after": f"go{n}"}) for n, task in enumerate(tasks(tmp_path, 12))
    ]
    code = "from retro.retrieval.executors import ranks; ranks._BEAT_SECONDS = 0.1\n"
    code += f"run(folder, {jobs!r}, None, 'ranks')"
    rank, signs = _rank(tmp_path, 1, 2, code), set()

    def of_rank(process):
        return [number for number, own in _lines(tmp_path) if own == str(process)]

    def has_signs():
        signs.add((tmp_path / "sign-of-rank-1").stat().st_mtime_ns)
        return len(signs) > 5

    def kill_in_its_second_task():
        wait_until(lambda: len(of_rank(rank.pid)) == 1)
        wait_until(has_signs)
        (tmp_path / f"go{of_rank(rank.pid)[0]}").touch()
        wait_until(lambda: len(of_rank(rank.pid)) == 2)
        rank.kill()
        rank.wait()
        monkeypatch.setattr(ranks_module, "_SILENT_SECONDS", 3.0)
        for n in range(12):
            (tmp_path / f"go{n}").touch()

    killer = threading.Thread(target=kill_in_its_second_task, daemon=True)
    killer.start()
    message = "rank 1 has given no sign of life for 3 seconds.*start the same command again"
    with pytest.raises(ChildProcessError, match=message):
        RankExecutor(0, 2).run(tmp_path, jobs)
    killer.join()
    assert rank.wait() == -signal.SIGKILL
    mine = [int(number) for number, process in diary(tmp_path) if process == str(os.getpid())]
    assert sorted(mine) == [n for n in range(12) if int(stable_hash(f"square-{n}"), 16) % 2 == 0]
    with pytest.raises(ChildProcessError, match=message):  # nor does it matter who is told first
        RankExecutor(0, 2).run(tmp_path, jobs)
    assert len(run(tmp_path, tasks(tmp_path, 12))) == 12


@pytest.mark.parametrize("of_this_launch", [True, False])
def test_silence_is_counted_by_the_own_clock_and_while_somebody_looks(tmp_path, monkeypatch, of_this_launch):
    """The other's clock may be an hour off or run backwards; a watcher that slept for a day has heard one beat less."""
    clock, beat = [0.0], tmp_path / "sign-of-rank-1"
    monkeypatch.setattr(ranks_module.time, "monotonic", lambda: clock[0])
    beat.write_text(ranks_module._launch() if of_this_launch else "another")
    limit = ranks_module._SILENT_SECONDS if of_this_launch else ranks_module._BEGIN_SECONDS
    silence = ranks_module._Heartbeat(tmp_path, 1)

    def looks(seconds, step=5.0):
        for _ in range(int(seconds / step)):
            clock[0] += step
            silence.check()

    for shown in (10**18, 4 * 10**18, 3 * 10**18, 2 * 10**18) if of_this_launch else ():
        looks(limit - 10)
        os.utime(beat, ns=(shown, shown))
    looks(limit - 50)
    clock[0] += 24 * 3600.0
    silence.check()
    looks(30)
    with pytest.raises(ChildProcessError, match=f"rank 1 has (given no|not begun).* {limit:.0f} seconds"):
        looks(20)
    for text in (ranks_module._launch(), "as Slurm names a task that it started again"):  # what changes is alive
        beat.write_text(text)
        os.utime(beat, ns=(10**18, len(text)))
        looks(10)
        with pytest.raises(ChildProcessError, match="rank 1 has given no sign"):
            looks(ranks_module._SILENT_SECONDS)
    beat.unlink()  # it has ended in peace
    looks(ranks_module._SILENT_SECONDS * 2)


def test_a_rank_leaves_no_sign_when_it_ends(tmp_path):
    seen = []
    RankExecutor(0, 1).run(tmp_path, tasks(tmp_path, 2), lambda *done: seen.append(list(tmp_path.glob("sign-of-*"))))
    assert [len(files) for files in seen] == [1, 1] and not list(tmp_path.glob("sign-of-*"))
    with pytest.raises(ValueError, match="the remedy"):
        RankExecutor(0, 1).run(tmp_path, [Task("wrong", f"{HERE}:fail", {"kind": "ValueError"})])
    assert not list(tmp_path.glob("sign-of-*"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "7"}, (2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (2, 3),
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
    ],
)
def test_ranks_of_launchers(environment, expected):
    assert rank_of(environment) == expected


@pytest.mark.parametrize("environment", [{}, {"RANK": "3", "WORLD_SIZE": "3"}, {"SLURM_ARRAY_TASK_ID": "4"}])
def test_ranks_without_a_launcher_are_refused(environment):
    with pytest.raises(ValueError, match="rank"):
        rank_of(environment)


def test_executors_by_name(monkeypatch):
    with pytest.raises(ValueError, match="executor must be one of local, ranks, ray, not 'threads'"):
        open_executor("threads")
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        open_executor("local", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="workers is 3, but the launcher started 2 ranks"):
        open_executor("ranks", 3)


@pytest.mark.slow
def test_ray_spreads_tasks_over_a_cluster_and_does_those_of_a_dead_node_again(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    killed = []

    def on_done(task, record):
        if not killed:
            killed.append(cluster.remove_node(nodes[0], allow_graceful=False))

    try:
        open_executor("ray").run(tmp_path, tasks(tmp_path, 9), on_done)
        with pytest.raises(ValueError, match="^the remedy$"):
            run(tmp_path, [Task("wrong", f"{HERE}:fail", {"kind": "ValueError"})], None, "ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [json.loads((tmp_path / f"square-{n}.json").read_text())["square"] for n in range(9)] == [
        n * n for n in range(9)
    ]
