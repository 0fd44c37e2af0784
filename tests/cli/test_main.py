from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch.cli import group, main
from tests.recorded import FakeStudy

HEAVY = {"torch", "torchvision", "mlflow", "optuna", "sklearn", "pandas", "matplotlib", "scipy", "numpy"}


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules that a command line loads."""
    code = (
        "import json, sys\n"
        "from hpsearch.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by("--help") & HEAVY


@pytest.mark.parametrize("name", list(group.commands))
def test_every_command_explains_itself_without_loading_anything_heavy(name: str) -> None:
    assert not loaded_by(name, "--help") & (HEAVY - {"numpy"})


def test_every_listed_command_exists() -> None:
    runner = CliRunner()
    for name in group.commands:
        result = runner.invoke(group, [name, "--help"])
        assert result.exit_code == 0, name
        assert "Usage" in result.output


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("status", "--out", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("hpsearch: there is no study in")
    assert error.count("\n") == 1


def test_a_wrong_flag_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("study", "--trails", "5") == 2
    assert "--trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("stdy",), "'study'"),
        (("Final", "--best"), "'final'"),
        (("data", "chek"), "'check'"),
        (("status", "--studdy", "x"), "'--study'"),
        (("study", "--set", "unet.dpeth=3"), "unet.depth"),
        (("study", "--set", "unet.lr=0.1"), "train.lr"),
        (("study", "--set", "lr=0.1"), "such as train.lr=0.1"),
        (("study", "--set", "search.unet.dpeth=[1, 2]"), "unet.depth"),
        (
            ("study", "--set", "search.base_channels=4"),
            "setting 'search.base_channels': did you mean unet.base_channels?",
        ),
        (("study", "--config", "isic2107"), "(did you mean isic2017?)"),
    ],
)
def test_a_typing_error_gets_a_suggestion(
    typed: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*typed) in (1, 2)
    assert meant in capsys.readouterr().err


def test_a_command_that_is_like_none_leads_to_help_which_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("xyz") == 2
    error = capsys.readouterr().err
    assert "Did you mean" not in error
    assert "Try 'hpsearch --help' for help" in error
    assert exit_code("-h") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("Commands:")[2].splitlines() if line]
    assert listed == [
        "study",
        "final",
        "status",
        "stop",
        "train",
        "plan",
        "predict",
        "export",
        "report",
        "track",
        "data",
    ]


def test_data_lists_its_commands_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("data", "-h") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("Commands:")[2].splitlines() if line]
    assert listed == ["check", "cache", "sample", "download", "augment"]


def test_a_file_in_place_of_a_folder_and_a_file_that_is_not_there_are_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("no folder")
    assert exit_code("status", "--out", str(tmp_path / "notes")) == 2
    assert "is a file" in capsys.readouterr().err
    assert exit_code("study", "--out", str(tmp_path), "--enqueue", str(tmp_path / "no.toml")) == 2
    assert "no.toml' does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_status_names_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = FakeStudy(tmp_path)

    def message() -> str:
        assert exit_code("status", "--out", str(tmp_path)) == 0
        return capsys.readouterr().out

    study.trial()
    assert f"continue with: hpsearch study --study fake --out {tmp_path}\n" in message()
    for _ in range(5):
        study.trial("pruned")
    assert f"next: hpsearch final --best --study fake --out {tmp_path}\n" in message()
    study.final(0)
    assert "hpsearch" not in message()


def test_an_unknown_setting_gets_a_suggestion_or_else_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("study", "--out", str(tmp_path), "--set", "unet.xyz=3") == 1
    error = capsys.readouterr().err
    assert "unet.xyz" in error
    assert "unet.base_channels" in error
    assert "docs/reference.md" in error
    assert exit_code("study", "--out", str(tmp_path), "--set", "unet.dpeth=3") == 1
    error = capsys.readouterr().err
    assert "did you mean unet.depth?" in error
    assert "unet.base_channels" not in error


def test_the_closest_options_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("final", "--tria", "3") == 2
    assert "'--trial'" in capsys.readouterr().err
    assert exit_code("study", "--seeds", "3") == 2
    assert "'--seed'" in capsys.readouterr().err


def test_missing_data_says_how_to_get_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code("study", "--tracking", "none") == 1
    error = capsys.readouterr().err
    assert "ISIC-2017" in error
    assert "--data sample" in error
    assert "hpsearch data download" in error


def test_a_delivery_that_nobody_waits_for_is_left_without_python_taking_it_apart() -> None:
    """Python would end its thread in the midst of C++ code, which aborts the process."""
    script = (
        "import atexit, time\n"
        "from types import SimpleNamespace\n"
        "from hpsearch import cli, views\n"
        "atexit.register(print, 'taken apart')\n"
        "view = SimpleNamespace(name='MLflow', update=lambda is_last: time.sleep(60))\n"
        "if {delivering}: views.ViewThread(view)\n"
        "cli.main(['--version'])\n"
    )
    for delivering in (False, True):
        command = [sys.executable, "-c", script.format(delivering=delivering)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "hpsearch" in ended.stdout
        assert ("taken apart" in ended.stdout) is not delivering


def test_a_command_that_loads_torch_ends_with_nothing_but_its_progress_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpsearch", "data", "sample", str(tmp_path / "drawn")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stderr.splitlines() == [f"generating images {n}/200" for n in (1, 50, 100, 150, 200)]
