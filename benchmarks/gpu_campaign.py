"""Everything that waits for a GPU, in order of worth; a step that fails never stops the next one.

    ./run gpu                          every step
    ./run gpu --budget 540             what fits into nine minutes; the next call goes on from there
    ./run gpu --only parity sanitizer  these, also if they have run already
    ./run gpu --archive campaign.tgz   unpacks what an earlier call has packed, goes on, packs
                                       again: for machines that keep nothing
    ./run gpu --list                   the steps

A step is a process of its own with a time limit. Its folder under --out has log.txt, what it
measured, and result.json; summary.csv has a row a step. What has passed is not run again; what
failed is, at another revision; what was cut goes on where it was. A step that needs what the
machine has not is skipped and says so. Exit code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))  # as a script has it, also for `python -m`

from campaign.exit_codes import NEEDS_GPU, NEEDS_MORE, UNFINISHED
from pages import ROOT, revision

State = Literal["passed", "failed", "cut", "skipped", "left"]
Row = dict[str, Any]
FOLDER = "{out}"  # in a command: the step's folder
SECONDS = "{seconds}"  # in a command: how long it may take, less what it needs to end
CEILING = "{ceiling}"  # in a command: what `ceilings` measured; without it the option is left out
RESERVE = 10.0  # seconds of the budget kept for the summary and the archive
FACTS = ("gpu", "driver", "torch", "triton", "revision")


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    command: tuple[str, ...]  # after the Python interpreter
    limit: float  # seconds, past which it is cut
    least: float  # seconds under which it is not worth starting
    needs: tuple[str, ...] = ("gpu",)


def pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={FOLDER}/tests.xml",
            *arguments)  # fmt: skip


NO_CHIP = ["--ignore=tests/kernels/test_compiled.py"]
DEMO = ("recipes/tiny_flux_gardo.yaml", "--gpus", "1", "--set", f"run.folder={FOLDER}/runs")

STEPS = (
    Step("doctor", "versions, devices, which kernels run and how far off plain torch they are",
         ("-m", "gardo.cli", "doctor"), 90, 20, needs=()),
    Step("ceilings", "copy bandwidth and matmul rate, the rulers of everything else",
         ("-m", "campaign.ceilings", "--out", FOLDER), 60, 20),
    Step("parity", "every op against fp64: dtypes, odd shapes, NaN, equal bits over 10 runs",
         pytest("tests/kernels", *NO_CHIP), 240, 60),
    Step("sanitizer", "memcheck and racecheck on a small case of every kernel",
         ("-m", "campaign.sanitizer", "--out", FOLDER), 180, 60, ("gpu", "compute-sanitizer")),
    Step("engine", "the engine over NCCL in fp32 and bf16, slots, resume, every tiny recipe",
         pytest("tests/integration/test_gpu.py"), 540, 180),
    Step("parts", "attention backends, text encoders, optimizers: the engine's tests for a GPU",
         pytest("-m", "gpu", "tests/engine"), 180, 60),
    Step("kernels-quick", "two cases of every op against its competitors",
         ("benchmarks/bench_kernels.py", "--quick", "--out", FOLDER), 150, 60),
    Step("flux", "FLUX.1-dev's shapes, random weights: what fits, sampling, training, kinds of op",
         ("-m", "campaign.flux_full", "--out", FOLDER, "--seconds", SECONDS, "--ceiling", CEILING),
         420, 120),
    Step("ratio-noise", "bf16 on-policy |ratio - 1| over batch shapes, checkpointing, attention",
         ("-m", "campaign.ratio_noise", "--out", FOLDER, "--seconds", SECONDS), 300, 90),
    Step("flux-bases", "LoRA on a nf4, int8 and bf16 base, a step on all 12 B: memory, ms, error",
         ("-m", "campaign.flux_bases", "--out", FOLDER, "--seconds", SECONDS,
          "--ceiling", CEILING),
         420, 120),
    Step("step", "an iteration at FLUX.1-dev's width: ours, released, strong, reference everywhere",
         ("benchmarks/bench_step.py", "--case", "flux_wide", "--launches", "2", "--iterations", "3",
          "--out", f"{FOLDER}/step.csv"), 540, 240),
    Step("ways", "the same, each way to run the model: compiled, LoRA folded, our kernels",
         ("benchmarks/bench_step.py", "--case", "flux_wide_ways", "--launches", "2",
          "--iterations", "3", "--out", f"{FOLDER}/ways.csv"), 540, 240),
    Step("judges", "HPSv3 and a Qwen2.5-VL judge of 7 B, random weights: questions a second, bytes",
         ("-m", "campaign.judges", "--out", FOLDER, "--seconds", SECONDS), 300, 90),
    Step("kernels", "every case of every op, and the targets",
         ("benchmarks/bench_kernels.py", "--resume", "--out", FOLDER, "--budget-seconds", SECONDS),
         540, 120),
    Step("shapes", "block, chunk and warps of every op by size: what is better than the default",
         ("-m", "campaign.shapes", "--out", FOLDER, "--seconds", SECONDS), 540, 120),
    Step("words-make", "a Flux of 40 M that writes words: pre-training, in several calls",
         ("-m", "words", "make", "--out", FOLDER, "--seconds", SECONDS), 540, 120),
    Step("words", "no KL, uniform KL and GARDO on it, with a real OCR engine as the proxy",
         ("-m", "words", "arms", "--model", f"{FOLDER}/../words-make", "--out", FOLDER,
          "--seconds", SECONDS), 540, 180),
    Step("demo", "the demo on this GPU, in bf16",
         ("-m", "gardo.cli", "train", *DEMO, "--set", "distributed.precision=bfloat16"), 300, 60),
)  # fmt: skip


# ---- the machine ---------------------------------------------------------------------------------

PROBE = """
import json, torch, triton
gpu = torch.cuda.is_available()
print(json.dumps({"gpu": torch.cuda.get_device_name(0) if gpu else "", "torch": torch.__version__,
                  "triton": triton.__version__}))
"""


def machine() -> dict[str, str]:
    """FACTS of this machine; asked of a process of its own, so that none here holds the GPU."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    facts = json.loads(done.stdout) if done.returncode == 0 else dict.fromkeys(FACTS, "")
    driver = ""
    if facts["gpu"] and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {**facts, "driver": driver, "revision": revision()}


def missing(step: Step, facts: dict[str, str]) -> str:
    """What the step needs and the machine has not; "" if nothing."""
    for need in step.needs:
        if need == "gpu" and not facts["gpu"]:
            return "needs an NVIDIA GPU"
        if need != "gpu" and shutil.which(need) is None:
            return f"needs {need}, which is not on the PATH"
    return ""


def environment() -> dict[str, str]:
    here = [str(ROOT / part) for part in ("engine", "kernels", "benchmarks")]
    path = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# ---- one step ------------------------------------------------------------------------------------


def run(step: Step, folder: Path, seconds: float) -> Row:
    """Runs the step for at most so many seconds; its state, seconds, exit code and last line."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command_of(step, folder, seconds), cwd=ROOT, env=environment(), stdout=output,
            stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)  # whatever it has left running, too
    states: dict[int | None, State] = {
        None: "cut", UNFINISHED: "cut", 0: "passed", NEEDS_GPU: "skipped", NEEDS_MORE: "skipped"
    }  # fmt: skip
    return {
        "state": states.get(code, "failed"), "seconds": round(time.monotonic() - start, 1),
        "code": code, "detail": last_line(log),
    }  # fmt: skip


def command_of(step: Step, folder: Path, seconds: float) -> list[str]:
    """The step's command with its marks filled in."""
    rate = matmul_ceiling(folder.parent / "ceilings" / "ceilings.csv")
    fill = {FOLDER: str(folder), SECONDS: str(int(0.9 * seconds)), CEILING: f"{rate:g}"}
    command = [sys.executable, *step.command]
    if CEILING in command and not rate:
        at = command.index(CEILING)
        del command[at - 1 : at + 1]
    for mark, value in fill.items():
        command = [part.replace(mark, value) for part in command]
    return command


def matmul_ceiling(file: Path) -> float:
    """TFLOP/s of the fastest matmul that the step `ceilings` has measured; 0 if it has not."""
    if not file.is_file():
        return 0.0
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    matmuls = [
        row for row in rows if row["what"].startswith("matmul") and row["unit"]
    ]  # whole rows
    return max((float(row["rate"]) for row in matmuls), default=0.0)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those it has started."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:160] for line in reversed(lines) if line), "")


def result_of(folder: Path) -> Row:
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def is_done(result: Row, facts: dict[str, str]) -> bool:
    """Passed, or failed at this very revision."""
    state, same = result.get("state"), result.get("revision") == facts["revision"]
    return state == "passed" or (state == "failed" and same)


# ---- all of them ---------------------------------------------------------------------------------


COLUMNS = ("step", "state", "seconds", "detail", *FACTS)


def campaign(
    steps: Sequence[Step], out: Path, *, budget: float, again: bool, facts: dict[str, str]
) -> list[Row]:
    """Runs what is not done and fits the budget, in order; a row a step, in summary.csv too."""
    start = time.monotonic()
    rows: list[Row] = []
    for step in steps:
        result = result_of(out / step.name)
        if again or not is_done(result, facts):
            left = budget - RESERVE - (time.monotonic() - start)
            result = {**attempt(step, out / step.name, left, facts), **facts}
        rows.append({"step": step.name, **{name: result.get(name, "") for name in COLUMNS[1:]}})
        say(f"{step.name}: {result['state']} {result['detail']}")
        with (out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return rows


def attempt(step: Step, folder: Path, left: float, facts: dict[str, str]) -> Row:
    """What became of the step, with so many seconds left; kept in its folder once it was tried."""
    if left < step.least:
        return {"state": "left", "detail": f"{step.least:g} s needed, {max(left, 0):.0f} s left"}
    folder.mkdir(parents=True, exist_ok=True)
    if reason := missing(step, facts):
        found: Row = {"state": "skipped", "detail": reason}
    else:
        seconds = min(step.limit, left)
        say(f"{step.name}: {step.what} (at most {seconds:.0f} s)")
        found = run(step, folder, seconds)
    text = json.dumps({**found, **facts, "step": asdict(step)}, indent=1)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    return found


def table(rows: Sequence[Row]) -> str:
    width = max(len(row["step"]) for row in rows)
    return "\n".join(
        f"{r['step']:{width}}  {r['state']:7}  {r['seconds']!s:>6}  {r['detail'][:100]}"
        for r in rows
    )


def unpack(archive: Path, out: Path) -> None:
    if archive.is_file():
        with tarfile.open(archive) as packed:
            packed.extractall(out, filter="data")


def pack(out: Path, archive: Path) -> None:
    """Everything but weights and checkpoints of runs, which are large and tell nothing."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith((".safetensors", "/checkpoints")) else entry

    part = archive.with_name(f"{archive.name}.part")
    with tarfile.open(part, "w:gz") as packed:
        packed.add(out, arcname=".", filter=wanted)
    part.replace(archive)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(names: Sequence[str] | None) -> list[Step]:
    unknown = set(names or ()) - {step.name for step in STEPS}
    if unknown:
        known = ", ".join(step.name for step in STEPS)
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: no such step; there are {known}")
    return [step for step in STEPS if not names or step.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--archive", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    steps = chosen(options.only)
    if options.list:
        print("\n".join(f"{s.name:14} {s.limit:5g} s  {s.what}" for s in steps))
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.archive:
        unpack(options.archive, out)
    facts = machine()
    again = options.only is not None
    try:
        rows = campaign(steps, out, budget=options.budget, again=again, facts=facts)
    finally:  # what is there when it is interrupted, too
        if options.archive:
            pack(out, options.archive)
    print(f"{facts['gpu'] or 'no GPU'}, torch {facts['torch']}, triton {facts['triton']}, {out}")
    print(table(rows))
    return int(any(row["state"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
