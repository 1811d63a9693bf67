"""Settings: defaults <- YAML <- key=value, and the sentence for everything that is wrong."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro.common.settings import differing, find_config, load_settings, save_settings, to_plain


@dataclass
class Inner:
    depth: int = 2
    rate: float = 0.5


@dataclass
class Outer:
    output: str
    steps: int = 10
    lr: float = 1e-3
    limit: int | None = 5
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} is below 0; give 0 or more")


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_yaml_then_overrides(tmp_path):
    file = write(
        tmp_path / "a.yaml", "output: out\nsteps: 20\nlr: 1e-4\ninner: {depth: 7}\nmodel: {width: 8, rate: 2e-3}\n"
    )
    settings = load_settings(Outer, file, ["steps=30", "inner.rate=0.25", "model.layers=[2, 4]", "model.width=16"])
    assert settings == Outer(
        output="out",
        steps=30,
        lr=1e-4,
        inner=Inner(depth=7, rate=0.25),
        model={"width": 16, "rate": 2e-3, "layers": [2, 4]},
    )
    assert isinstance(settings.lr, float) and isinstance(settings.inner, Inner)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("output=3", "output", "3"),
        ("output=a=b", "output", "a=b"),
        ("limit=null", "limit", None),
        ("lr=3", "lr", 3.0),
        ("flag=true", "flag", True),
        ("mode=slow", "mode", "slow"),
        ("betas=[0.8, 0.9]", "betas", (0.8, 0.9)),
        ("names=[a, b]", "names", ["a", "b"]),
        ("--steps=4", "steps", 4),
    ],
)
def test_overrides_are_read_by_the_type_of_their_field(override, name, value):
    got = getattr(load_settings(Outer, None, ["output=out", override]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=abc", ["steps", "'abc'", "a whole number", "steps=4"]),
        ("steps=1.5", ["steps", "'1.5'", "a whole number"]),
        ("steps=null", ["steps", "null", "a whole number"]),
        ("steps=true", ["steps", "'true'", "a whole number"]),
        ("inner.depth=x", ["inner.depth", "'x'", "inner.depth=4"]),
        ("inner=3", ["inner"]),
        ("limit=x", ["limit", "'x'", "a whole number or null", "limit=4"]),
        ("mode=quick", ["mode", "'quick'", "fast, slow"]),
        ("flag=maybe", ["flag", "'maybe'", "true or false"]),
        ("betas=[1]", ["betas", "'[1]'", "2 values"]),
        ("model=3", ["model", "'3'", "a mapping"]),
        ("stpes=3", ["stpes", "unknown", "did you mean steps?"]),
        ("inner.dpeth=3", ["inner.dpeth", "unknown", "did you mean inner.depth?"]),
        ("zzzzz=3", ["zzzzz", "unknown", "betas, flag, inner"]),
        ("steps", ["'steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("steps=-1", ["steps", "-1", "give 0 or more"]),
    ],
)
def test_a_wrong_override_is_one_sentence_with_field_value_and_remedy(override, named):
    with pytest.raises(ValueError) as error:
        load_settings(Outer, None, ["output=out", override])
    message = str(error.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stpes: 3\noutput: a", ["stpes", "did you mean steps?"]),
        ("output: 3", ["output", "3", "text"]),
        ("- 1\n- 2", ["list", "not a mapping"]),
        ("output: a\nlr: [1\nsteps: 2", ["line 3", "not YAML"]),
        ("steps: 3", ["output is required", "output=..."]),
        ("output: a\ninner: {depht: 1}", ["inner.depht", "did you mean inner.depth?"]),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, named):
    file = write(tmp_path / "a.yaml", text)
    with pytest.raises(ValueError) as error:
        load_settings(Outer, file)
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)


names = st.text("abcxyz_", min_size=1, max_size=5)
values = st.none() | st.booleans() | st.integers(-9, 9) | names | st.lists(st.integers(0, 9), max_size=3)


@given(
    st.builds(
        Outer,
        output=names,
        steps=st.integers(0, 10**12),
        lr=st.floats(allow_nan=False, allow_infinity=False),
        limit=st.none() | st.integers(),
        mode=st.sampled_from(["fast", "slow"]),
        flag=st.booleans(),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        names=st.lists(names, max_size=3),
        inner=st.builds(Inner, depth=st.integers(), rate=st.floats(0, 1)),
        model=st.dictionaries(names, values, max_size=3),
    )
)
def test_saved_settings_load_equal(tmp_path_factory, settings):
    file = tmp_path_factory.mktemp("settings") / "config.yaml"
    save_settings(settings, file)
    assert load_settings(Outer, file) == settings
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]


def test_differing_names_are_dotted():
    one = Outer("a", inner=Inner(depth=1), model={"width": 8})
    other = Outer("a", steps=11, inner=Inner(depth=2), model={"width": 8, "layers": 2})
    assert differing(to_plain(one), to_plain(other)) == ["inner.depth", "model.layers", "steps"]
    assert differing(to_plain(one), to_plain(one)) == []


def test_a_configuration_is_found_by_path_or_packaged_name(tmp_path):
    own = write(tmp_path / "mine.yaml", "output: a")
    assert find_config(own) == own
    assert find_config("train_small", "train").name == "train_small.yaml"
    assert find_config("train_small.yaml", "train").name == "train_small.yaml"
    with pytest.raises(FileNotFoundError, match="nothing: no such file.*train_172m.*train_small"):
        find_config("nothing", "train")


def test_settings_load_without_torch():
    import subprocess
    import sys

    code = "import sys, retro.common.settings; sys.exit('torch' in sys.modules or 'jsonargparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
