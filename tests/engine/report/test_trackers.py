"""What TensorBoard and W&B have of a run, read back from what they wrote."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gardo.config import load
from gardo.recipe_errors import RecipeError
from gardo.report.trackers.base import Trackers, values_of
from tests import ROOT
from tests.engine.report.records import evaluation_record, step_record

ABOUT = {
    "id": "0123abcd",
    "name": "a run",
    "recipe": {"run": {"steps": 9}, "data": {"prompts": "x"}},
}
RECIPE = ROOT / "recipes/tiny_flux_gardo.yaml"


class Failing:
    """Fails at its second record."""

    package = None

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        self.logged: list[int] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append(step)
        if len(self.logged) == 2:
            raise ConnectionError("no route\nand more")

    def picture(self, file: Path, step: int, caption: str) -> None:
        pass

    def close(self) -> None:
        raise AssertionError("it was left out")


class Lacking(Failing):
    package = "not_there_at_all"


def tracked(
    folder: Path, names: list[str], records: list[dict[str, Any]], step: int = 0
) -> list[str]:
    """What was said while a run wrote these records."""
    said: list[str] = []
    trackers = Trackers(folder, said.append)
    trackers.start(names, ABOUT, step)
    for record in records:
        trackers.write(record)
    trackers.close()
    return said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with an evaluation's picture."""
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (6, 4), (255, 0, 9)).save(tmp_path / "samples/step-00002.png")
    return tmp_path


def evaluation() -> dict[str, Any]:
    more = {"images": "samples/step-00002.png", "prompts": ["two red <b>", "one"]}
    return {**evaluation_record(2, proxy=0.1), **more}


def test_numbers_have_their_paths() -> None:
    said = values_of(step_record(3, events=["reset"], peak_bytes=7))
    assert said["rewards/hpsv2/mean"] == pytest.approx(0.315) and said["metrics/kl"] == 1.9e-4
    assert said["peak_bytes"] == 7 and not {"step", "kind", "events"} & said.keys()
    assert all(type(value) in (int, float) for value in said.values())
    assert values_of(evaluation())["evaluation/rewards/count/low"] == pytest.approx(0.69)


def test_tensorboard_has_values_and_pictures_and_goes_on(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = [step_record(1), step_record(2), evaluation(), step_record(3)]
    assert tracked(run, ["tensorboard"], first) == []
    assert tracked(run, ["tensorboard"], [step_record(3), step_record(4)], step=2) == []
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    means = [(e.step, round(e.value, 4)) for e in events.Scalars("rewards/hpsv2/mean")]
    assert means == [(1, 0.313), (2, 0.314), (3, 0.315), (4, 0.316)], "step 3 of before is hidden"
    (shown,) = events.Images("evaluation/samples")
    with Image.open(io.BytesIO(shown.encoded_image_string)) as picture:
        assert shown.step == 2 and picture.size == (6, 4)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 9)
    (text,) = events.Tensors("recipe/text_summary")
    assert b"steps: 9" in text.tensor_proto.string_val[0]


def messages(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format in blocks of 32 KiB, after a head of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # a head does not fit
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def test_wandb_has_values_and_pictures_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(run / "none"))
    assert tracked(run, ["wandb"], [step_record(1), step_record(2), evaluation()]) == []
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    history, config = [], {}
    for data in messages(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            found = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            history.append({name: json.loads(value) for name, value in found.items()})
        if record.HasField("run"):
            config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
            assert record.run.run_id == ABOUT["id"]
    name = "rewards/hpsv2/mean"
    means = [(one["step"], one[name]) for one in history if name in one]
    assert means == [(1, pytest.approx(0.313)), (2, pytest.approx(0.314))]
    shown = {name.rpartition("/")[2]: value for name, value in history[-1].items()}
    assert shown["caption"] == "two red <b>, one" and shown["step"] == 2
    assert (shown["width"], shown["height"]) == (6, 4)
    assert config["run"] == {"steps": 9}
    assert str(run) not in json.dumps(config)


def test_one_that_fails_is_left_out_and_the_others_go_on(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = [f"{__name__}:Failing", "tensorboard"]
    said = tracked(run, names, [step_record(step) for step in (1, 2, 3)])
    assert said == [
        f"run.track: {__name__}:Failing has failed and is left out from here on: no route"
    ]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("metrics/kl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("[tensorbord]", "run.track.0: 'tensorbord' is none of tensorboard, wandb"),
        (f"['{__name__}:Lacking']", "needs not_there_at_all, which is not here; pip install"),
    ],
)
def test_one_that_cannot_be_used_is_refused(track: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"run\.track") as raised:
        load(RECIPE, [f"run.track={track}"])
    assert said in str(raised.value)
    assert load(RECIPE, ["run.track=[wandb, tensorboard]"]).run.track == ["wandb", "tensorboard"]
