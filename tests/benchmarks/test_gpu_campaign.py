"""The campaign's runner on steps of a second, and on a machine without a GPU."""

import csv
import json
import subprocess
import sys
import time

import pytest
import torch

from gpu_campaign import (
    FACTS,
    FOLDER,
    SECONDS,
    STEPS,
    Step,
    campaign,
    chosen,
    command_of,
    main,
    missing,
    pack,
    unpack,
)
from tests import ROOT

HERE = {**dict.fromkeys(FACTS, "x"), "gpu": "a GPU"}
WRITES = f"open('{FOLDER}/rows.csv', 'a').write('row ')"


def python(name, code, *, limit=20.0, least=0.0, needs=()):
    return Step(name, "a test's", ("-c", code), limit, least, needs)


def states(steps, out, *, budget=1e9, again=False, facts=HERE):
    rows = campaign(steps, out, budget=budget, again=again, facts=facts)
    return {row["step"]: row["state"] for row in rows}


def test_a_failure_stops_nothing(tmp_path):
    steps = [
        python("breaks", "print('why'); raise SystemExit(1)"),
        python("works", f"{WRITES}; print('the last line')"),
        python("no_gpu", "print('needs an NVIDIA GPU'); raise SystemExit(3)"),
        python("no_package", "print('needs rapidocr'); raise SystemExit(5)"),
    ]
    expected = {"breaks": "failed", "works": "passed", "no_gpu": "skipped", "no_package": "skipped"}
    assert states(steps, tmp_path) == expected
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in rows.items()} == expected
    assert rows["breaks"]["detail"] == "why" and rows["works"]["detail"] == "the last line"
    assert rows["works"]["gpu"] == "a GPU" and float(rows["works"]["seconds"]) < 20
    assert json.loads((tmp_path / "breaks" / "result.json").read_text())["code"] == 1


def test_what_has_passed_is_not_run_again_and_what_failed_is_at_another_revision(tmp_path):
    steps = [python("good", WRITES), python("bad", f"{WRITES}; raise SystemExit(1)")]

    def ran():
        return [(tmp_path / s.name / "rows.csv").read_text().count("row") for s in steps]

    for _ in range(2):
        assert states(steps, tmp_path) == {"good": "passed", "bad": "failed"}
    assert ran() == [1, 1]
    mended = {**HERE, "revision": "another"}
    states(steps, tmp_path, facts=mended)
    assert ran() == [1, 2]
    states(steps, tmp_path, again=True)
    assert ran() == [2, 3]


def test_a_step_is_cut_with_all_that_it_has_started(tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    code = f"""import subprocess, sys, time
{WRITES}
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)"""
    start = time.monotonic()
    assert states([python("slow", code, limit=2.0)], tmp_path) == {"slow": "cut"}
    assert time.monotonic() - start < 15
    assert (tmp_path / "slow" / "rows.csv").exists(), "what it has measured stays"
    time.sleep(4.5)
    assert not late.exists()
    assert states([python("slow", WRITES)], tmp_path) == {"slow": "passed"}, "it goes on"


def test_what_does_not_fit_the_budget_is_left_for_the_next_call(tmp_path):
    steps = [python("long", WRITES, least=100.0), python("short", WRITES, least=1.0)]
    assert states(steps, tmp_path, budget=40.0) == {"long": "left", "short": "passed"}
    assert not (tmp_path / "long").exists()
    assert states(steps, tmp_path, budget=200.0) == {"long": "passed", "short": "passed"}


def test_a_step_is_told_its_folder_and_its_time(tmp_path):
    step = python("told", f"print('{SECONDS}', {FOLDER!r})", limit=300.0)
    (row,) = campaign([step], tmp_path, budget=60.0, again=False, facts=HERE)
    seconds, folder = row["detail"].split()
    assert 40 <= int(seconds) <= 45 and folder == str(tmp_path / "told")


def test_an_archive_carries_the_campaign_to_a_machine_that_keeps_nothing(tmp_path):
    steps = [python("one", f"{WRITES}; open('{FOLDER}/model.safetensors', 'w')"),
             python("two", WRITES)]  # fmt: skip
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "campaign.tgz"
    for folder in (first, second):
        folder.mkdir()
    unpack(archive, first)  # there is none yet
    states(steps[:1], first)
    pack(first, archive)
    unpack(archive, second)
    assert not (second / "one" / "model.safetensors").exists()
    assert states(steps, second) == {"one": "passed", "two": "passed"}
    assert (second / "one" / "rows.csv").read_text() == "row ", "it was run again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_without_a_gpu_every_measurement_is_skipped(tmp_path):
    names = [step.name for step in STEPS if "gpu" in step.needs]
    command = [sys.executable, "-m", "benchmarks.gpu_campaign", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--only", *names], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        result = json.loads((tmp_path / "out" / name / "result.json").read_text())
        assert (result["state"], result["detail"]) == ("skipped", "needs an NVIDIA GPU")
    assert "no GPU" in done.stdout


def test_steps_that_need_a_tool_say_so(tmp_path, monkeypatch):
    sanitizer = next(step for step in STEPS if step.name == "sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing(sanitizer, HERE) == "needs compute-sanitizer, which is not on the PATH"
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    assert missing(sanitizer, HERE) == ""
    assert missing(sanitizer, {**HERE, "gpu": ""}) == "needs an NVIDIA GPU"


def test_the_steps_are_there_and_fit_nine_minutes_each():
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert step.least <= step.limit <= 540
        first, second, *_ = step.command
        if first != "-m":
            assert (ROOT / first).is_file()
        elif second.startswith("campaign."):
            assert (ROOT / "benchmarks" / f"{second.replace('.', '/')}.py").is_file()
        for part in step.command:
            if part.startswith(("tests/", "recipes/")):
                assert (ROOT / part).exists()
    with pytest.raises(SystemExit, match="nonsense: no such step; there are doctor, ceilings"):
        chosen(["nonsense"])


def test_list(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(STEPS)


def test_the_measured_matmul_rate_is_handed_to_flux(tmp_path):
    step = next(step for step in STEPS if step.name == "flux")
    folder = tmp_path / "flux"
    assert "--ceiling" not in command_of(step, folder, 100.0)
    ceilings = tmp_path / "ceilings" / "ceilings.csv"
    ceilings.parent.mkdir()
    head = "what,size,rate,unit\ncopy,4096,4.1,TB/s\n"
    ceilings.write_text(head)
    assert "--ceiling" not in command_of(step, folder, 100.0)
    ceilings.write_text(
        f"{head}matmul bf16,8192,791.5,TFLOP/s\nmatmul bf16,16384,780,TFLOP/s\nmatmul"
    )
    command = command_of(step, folder, 100.0)
    assert command[command.index("--ceiling") + 1] == "791.5"
    assert command[command.index("--seconds") + 1] == "90" and str(folder) in command
