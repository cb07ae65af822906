"""Every engine gives the same bytes, does nothing twice, and ends with one message when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_prep.cli import main
from data_prep.errors import UserError
from data_prep.execute import Execution, Job, Spec, Target, process_shard, run_job
from data_prep.shards import Dataset

ONE = Execution(workers=1)


def silent(line: str) -> None:
    pass


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of five units, whose work is in a module that the workers find; what was called is entered in a file."""
    code = """
import os
from pathlib import Path

def work(piece, options, output):
    with open(options["log"], "a") as log:
        log.write(f"{piece['number']} ")
    if piece["number"] == options.get("die"):
        os.kill(os.getpid(), 9)
    if piece["number"] == options.get("stop"):
        output.write("text-pairs", {"json": b"{}"}, languages=["en"])
        raise KeyboardInterrupt
    for sample in range(piece["number"]):
        output.came_in()
        output.write("text-pairs", {"json": b"{}"}, languages=["en"])
        output.write("text-triplets", {"json": b"[]"}, languages=["de"], key=f"own-{piece['number']}-{sample}")
    output.came_in(2)
    output.drop("odd", f"unit {piece['number']}", 2)
"""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "work_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))

    def make(name: str = "n", **options: object) -> Job:
        options = {"log": str(tmp_path / "log"), **options}
        pieces = [{"number": number} for number in range(5)]
        return Job("test", Target(str(tmp_path / "out"), name, 3), "work_of_a_test:work", pieces, options)

    return make


def calls(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "log").read_text().split())


def test_units_become_data_sets_with_one_receipt(job, tmp_path):
    receipt = run_job(job(), ONE, log=silent)
    assert receipt is not None
    pairs = Dataset.open(tmp_path / "out/text-pairs/n", verify=True)
    assert pairs.shard_sizes == (1, 2, 3, 3, 1)
    assert [pairs.row(index).key for index in range(3)] == ["00001-000000", "00002-000000", "00002-000001"]
    assert Dataset.open(tmp_path / "out/text-triplets/n").row(0).key == "own-1-0"
    assert (receipt["came_in"], receipt["went_out"]) == (20, {"text-pairs": 10, "text-triplets": 10})
    assert (receipt["dropped"], receipt["examples"]["odd"][0]) == ({"odd": 10}, "unit 0")
    assert json.loads((tmp_path / "out/text-pairs/n/receipt.json").read_text()) == receipt
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text-pairs", "text-triplets"]


def test_a_finished_job_is_left_alone_and_another_of_its_name_is_refused(job, tmp_path, files):
    run_job(job(), ONE, log=silent)
    before = files(tmp_path / "out")
    assert run_job(job(), ONE, log=silent)["came_in"] == 20
    with pytest.raises(UserError, match="exists already, from something else \\(colour None, now 'red'\\)"):
        run_job(job(colour="red"), ONE, log=silent)
    assert files(tmp_path / "out") == before
    assert len(calls(tmp_path)) == 5


def test_a_folder_that_is_not_ours_is_never_replaced(job, tmp_path):
    (tmp_path / "out/text-pairs/n").mkdir(parents=True)
    (tmp_path / "out/text-pairs/n/diary.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already and is not ours to replace; choose another --name"):
        run_job(job(), ONE, log=silent)
    assert (tmp_path / "out/text-pairs/n/diary.txt").read_text() == "mine"


def test_a_job_that_was_killed_while_it_cleared_up_leaves_nothing_to_the_next(job, tmp_path, files, monkeypatch):
    def killed(path):  # in what order files go, the file system says
        (path / "publish.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    run_job(job("undisturbed"), ONE, log=silent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(job(), ONE, log=silent)
    assert run_job(job(), ONE, log=silent)
    assert not [name for name in files(tmp_path / "out") if "partial" in name or "lock" in name]


def test_an_interrupted_job_goes_on_and_does_no_unit_twice(job, tmp_path, files):
    run_job(job("undisturbed"), ONE, log=silent)
    (tmp_path / "log").unlink()
    stopped = job(stop=3)
    with pytest.raises(KeyboardInterrupt):
        run_job(stopped, ONE, log=silent)
    assert not list(stopped.partial.rglob("*.tmp"))
    (tmp_path / "out/n.partial/job.json").write_text(  # as if the unit had not been stopped by its options
        json.dumps(job().identity())
    )
    lines: list[str] = []
    run_job(job(), ONE, log=lines.append)
    assert calls(tmp_path) == ["0", "1", "2", "3", "3", "4"]
    assert "going on, 3 of 5 units are done" in lines[0]
    found = files(tmp_path / "out")
    for name, data in found.items():
        if "/n/" in name and name.endswith((".tar", ".jsonl")):
            assert data == found[name.replace("/n/", "/undisturbed/")]


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_when_all_units_were_done_the_job_is_published_by_the_next_run(job, tmp_path, monkeypatch, workers):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.execute.job._prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(), ONE, log=silent)
    monkeypatch.undo()
    assert run_job(job(), Execution(workers=workers), log=silent)["came_in"] == 20
    assert len(calls(tmp_path)) == 5


def test_another_job_does_not_go_on_from_what_one_left(job):
    with pytest.raises(KeyboardInterrupt):
        run_job(job(stop=3), ONE, log=silent)
    with pytest.raises(UserError, match="holds another unfinished job \\(stop 3, now None\\)"):
        run_job(job(), ONE, log=silent)


def test_a_job_of_the_former_default_goes_on_with_that_size_of_shards_and_leaves_no_sidecars_of_lines(job, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_job(job(stop=3), ONE, log=silent)
    mark, identity = tmp_path / "out/n.partial/job.json", job().identity()
    mark.write_text(json.dumps({**identity, "samples_per_shard": 1000}))
    with pytest.raises(UserError, match="samples_per_shard 1000, now 3.*the same job with --samples-per-shard 1000"):
        run_job(job(), ONE, log=silent)
    mark.write_text(json.dumps(identity))
    for index in (tmp_path / "out/n.partial").rglob("*.index.npy"):  # as an earlier release left them
        index.rename(index.with_name(index.name.replace(".npy", ".jsonl")))
    run_job(job(), ONE, log=silent)
    assert calls(tmp_path) == ["0", "1", "1", "2", "2", "3", "3", "4"]  # unit 0 has no shards
    assert len(Dataset.open(tmp_path / "out/text-pairs/n", verify=True)) == 10
    assert not list((tmp_path / "out").rglob("*.index.jsonl"))
    receipt = tmp_path / "out/text-pairs/n/receipt.json"
    receipt.write_text(receipt.read_text().replace('"samples_per_shard": 3', '"samples_per_shard": 1000'))
    with pytest.raises(UserError, match="exists already.*the same job with --samples-per-shard 1000"):
        run_job(job(), ONE, log=silent)


def test_stopped_between_two_data_sets_publishing_goes_on(job, tmp_path, monkeypatch):
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "text-triplets":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(), ONE, log=silent)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert run_job(job(), ONE, log=silent) is not None
    assert len(calls(tmp_path)) == 5
    assert len(Dataset.open(tmp_path / "out/text-pairs/n")) == len(Dataset.open(tmp_path / "out/text-triplets/n")) == 10
    assert not (tmp_path / "out/n.partial").exists()


def test_a_unit_whose_shard_is_gone_or_cut_is_done_again(job, tmp_path):
    spec = Spec("work_of_a_test:work", str(tmp_path / "one"), 2, {"number": 2}, {"log": str(tmp_path / "log")})
    first = process_shard(spec)
    assert process_shard(spec) == first
    assert calls(tmp_path) == ["2"]
    tar = tmp_path / "one/text-pairs" / first.shards["text-pairs"][0]["name"]
    data = tar.read_bytes()
    tar.write_bytes(data[:100])
    assert process_shard(spec) == first
    assert tar.read_bytes() == data
    assert calls(tmp_path) == ["2", "2"]


def test_a_worker_that_is_killed_gives_one_message_and_the_rest_stays_done(job, tmp_path):
    with pytest.raises(UserError, match="a worker process died.*run the same command again"):
        run_job(job(die=4), Execution(workers=2), log=silent)
    assert {path.name for path in (tmp_path / "out/n.partial/receipts").glob("*.json")} <= {
        f"0000{n}.json" for n in range(4)
    }


@pytest.mark.parametrize(
    "refused", ["multiprocessing.context.SpawnContext.Lock", "multiprocessing.util.spawnv_passfds"]
)
@pytest.mark.parametrize("command", ["import", "validate"])
def test_workers_that_the_system_refuses_to_start_are_one_message(
    downloads, tmp_path, monkeypatch, capsys, refused, command
):
    """/dev/shm is full when their locks are made, or memory and descriptors are short when they start."""
    words = ["import", "img2dataset", str(downloads), "--out", str(tmp_path / "out"), "--workers"]
    if command == "validate":
        assert main([*words, "1"]) == 0
        words = ["validate", str(tmp_path / "out"), "--workers"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(refused, full)
        assert main([*words, "2"]) == 2
    error = capsys.readouterr().err
    assert "worker processes cannot be started (No space left on device)" in error
    assert "/dev/shm" in error
    assert main([*words, "2"]) == 0


def test_processes_and_array_tasks_give_the_same_bytes(downloads, tmp_path, files):
    def run(name: str, *options: str) -> dict[str, bytes]:
        command = ["import", "img2dataset", str(downloads), "--out", str(tmp_path / name), "--image-size", "64"]
        assert main([*command, *options]) == 0
        return files(tmp_path / name)

    alone = run("alone", "--workers", "1")
    assert len(Dataset.open(tmp_path / "alone/image-short/img2dataset", verify=True)) == 108
    assert alone["image-short/img2dataset/dropped.jsonl"].count(b"\n") == 12
    assert run("two", "--workers", "2") == alone
    for task in ("1/3", "0/3"):
        unfinished = run("array", "--workers", "1", "--task", task)
        assert not any(name.startswith("image-short/") for name in unfinished)
    assert run("array", "--workers", "1", "--task", "2/3") == alone
    assert run("array", "--workers", "1", "--task", "2/3") == alone  # a task that comes late


def test_ray_tasks_give_the_same_bytes_as_processes(downloads, tmp_path, files):
    for name, options in (("alone", ["--workers", "1"]), ("ray", ["--engine", "ray", "--workers", "2"])):
        command = ["import", "img2dataset", str(downloads), "--out", str(tmp_path / name), "--image-size", "64"]
        assert main([*command, *options]) == 0
    assert files(tmp_path / "ray") == files(tmp_path / "alone")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of one machine, started from a folder of its own; RAY_ADDRESS names it."""
    (tmp_path / "elsewhere").mkdir()
    program = """
import sys, ray
for attempts_left in (4, 3, 2, 1, 0):
    try:
        found = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        break
    except Exception as error:  # Ray gives itself thirty seconds, which a busy machine may not keep
        ray.shutdown()
        if not attempts_left:
            raise
print("address", found["gcs_address"], flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path / "elsewhere",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = next(line.split()[1] for line in process.stdout if line.startswith("address"))
    monkeypatch.setenv("RAY_ADDRESS", address)
    yield address
    process.communicate("")


def test_on_a_cluster_that_was_started_elsewhere_names_start_from_where_the_command_is_given(
    cluster, downloads, tmp_path, files, monkeypatch, capsys
):
    monkeypatch.chdir(downloads.parent)
    assert main(["import", "img2dataset", "downloads", "--out", str(tmp_path / "alone"), "--workers", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "downloads").symlink_to(downloads)
    command = ["import", "img2dataset", "downloads", "--out", "ray", "--engine", "ray"]
    assert main(command) == 0
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path / "gone"))
    assert main([*command, "--name", "again"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'gone'}: not to be found on " in error
    assert "all machines of the cluster must see the folder" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--task", "3/3"], ["--task", "x"], ["--workers", "0"], ["--samples-per-shard", "0"]]
)
def test_options_out_of_range_give_one_line(downloads, tmp_path, capsys, options):
    assert main(["import", "img2dataset", str(downloads), "--out", str(tmp_path / "o"), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["../n", "a/b", ".hidden"])
def test_a_name_that_is_no_folders_name_is_refused(downloads, tmp_path, capsys, name):
    assert main(["import", "img2dataset", str(downloads), "--out", str(tmp_path / "o"), "--name", name]) == 2
    assert "expected letters, digits" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(downloads, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["import", "img2dataset", str(downloads), "--out", str(tmp_path / "o"), "--engine", "ray"]) == 2
    assert "--engine ray needs ray, which is not installed" in (error := capsys.readouterr().err)
    assert "pip install './data_prep[ray]'" in error


def test_a_full_disk_stops_with_one_message_and_the_same_command_goes_on(downloads, tmp_path, capsys):
    command = ["import", "img2dataset", str(downloads), "--out", str(tmp_path / "o"), "--image-size", "64"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, hard))  # as a full disk: writing beyond fails with an errno
    try:
        assert main([*command, "--workers", "1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "00000-0000.tar: cannot be written" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "o/image-short").exists()
    assert main([*command, "--workers", "1"]) == 0
    assert len(Dataset.open(tmp_path / "o/image-short/img2dataset", verify=True)) == 108


def test_a_target_that_cannot_be_written_gives_one_line(downloads, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["import", "img2dataset", str(downloads), "--out", str(tmp_path / "file/out")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_ctrl_c_ends_all_processes_quietly_and_the_next_run_goes_on(downloads, tmp_path, start):
    out = tmp_path / "o"
    process = start("import", "img2dataset", downloads, "--out", out, "--workers", "2")
    while not list(out.glob("*.partial/receipts/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate()
    if process.returncode:  # it may have been quicker than the signal
        assert process.returncode == 130
        assert "interrupted; run the same command again to resume" in error
        assert "Traceback" not in error
        assert not list(out.rglob("*.tmp")) or not (out / "image-short").exists()
    again = start("import", "img2dataset", downloads, "--out", out, "--workers", "2")
    again.communicate(timeout=550)
    assert again.returncode == 0
    assert len(Dataset.open(out / "image-short/img2dataset", verify=True)) == 108
