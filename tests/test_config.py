"""Settings from YAML: plain numbers, overrides, and one line for each thing that is wrong."""

from pathlib import Path

import pytest

import hrsam
from hrsam.config import Settings, read_settings
from hrsam.train import TrainSettings

CONFIGS = sorted(p for p in (Path(hrsam.__file__).parents[1] / "configs").glob("*.yaml") if "distill" not in p.stem)


class Part(Settings):
    steps: int
    rate: float = 0.1


class Whole(Settings):
    name: str = "x"
    on: bool = True
    parts: tuple[Part, ...] = ()
    inner: Part = Part(steps=1)
    maybe: float | None = None


def read(tmp_path, text, *overrides, kind=Whole):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return read_settings(kind, path, overrides)


def test_values_and_defaults(tmp_path):
    got = read(tmp_path, "name: run\nparts: [{steps: 3}, {steps: 4, rate: 1e-4}]\n")
    assert got == Whole(name="run", parts=(Part(steps=3), Part(steps=4, rate=1e-4)))
    assert got.inner == Part(steps=1)
    with pytest.raises(ValueError, match="frozen"):
        got.name = "other"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("10_000", 10_000),
        ("010", 10),
        ("-7", -7),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("2024-01-02", "2024-01-02"),
        ("1:30", "1:30"),
        ("1e", "1e"),
        ("'3'", "3"),
        ("null", None),
    ],
)
def test_plain_yaml_values(tmp_path, text, value):
    class Anything(Settings):
        value: object

    got = read(tmp_path, f"value: {text}\n", kind=Anything).value
    assert got == value
    assert type(got) is type(value)


def test_overrides(tmp_path):
    text = "parts: [{steps: 3}, {steps: 4}]\n"
    got = read(tmp_path, text, "name=a=b", "parts.1.rate=1e-3", "inner.steps=9", "maybe=2", "on=false")
    assert got == Whole(
        name="a=b",
        on=False,
        parts=(Part(steps=3), Part(steps=4, rate=1e-3)),
        inner=Part(steps=9),
        maybe=2,
    )
    assert read(tmp_path, text, "parts=[{steps: 5}]").parts == (Part(steps=5),)
    assert read(tmp_path, text, "name=a", "name=b").name == "b"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("nmae: x", (), "nmae: no such setting; did you mean 'name'"),
        ("zzz: x", (), "zzz: no such setting; known are inner, maybe, name, on, parts"),
        ("parts: [{steps: 1, rte: 2}]", (), r"parts\.0\.rte: no such setting; did you mean 'rate'"),
        ("inner: {stps: 2}", (), r"inner\.stps: no such setting; did you mean 'steps'"),
        ("parts: [{rate: 1}]", (), r"parts\.0\.steps: this setting has no default"),
        ("parts: [{steps: many}]", (), r"parts\.0\.steps: .*integer.*'many'"),
        ("parts: [{steps: 1, rate: nan}]", (), r"parts\.0\.rate: .*finite"),
        ("maybe: .inf", (), r"maybe: "),
        ("name: x", ("parts.0.steps=3",), "parts: input should be a valid tuple"),
        ("parts: [{steps: 1}]", ("parts.4.steps=3",), r"cannot set 'parts\.4\.steps'"),
        ("parts: [{steps: 1}]", ("parts.a=3",), r"cannot set 'parts\.a'"),
        ("name: x", ("name.deeper=3",), r"cannot set 'name\.deeper'"),
        ("name: x", ("name",), "an override is key=value; got 'name'"),
        ("name: x", ("=3",), "an override is key=value"),
        ("name: x", ("name=[1",), "cannot set 'name'"),
        ("- 1", (), "must hold `name: value` lines; got list"),
        ("", (), "must hold `name: value` lines; got NoneType"),
        ("name: [1", (), "is not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []", (), "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="nmae") as caught:
        read(tmp_path, "nmae: x\nparts: [{rate: fast}]")
    for part in ("nmae: ", "parts.0.steps: ", "parts.0.rate: "):
        assert part in str(caught.value)


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(ValueError, match="there is no settings file"):
        read_settings(Whole, tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_settings(Whole, tmp_path / "latin.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_training_settings(path):
    settings = read_settings(TrainSettings, path)
    assert settings.steps > 0
    assert all(phase.side % 32 == 0 for phase in settings.phases)


def test_there_are_shipped_configs():
    assert CONFIGS
