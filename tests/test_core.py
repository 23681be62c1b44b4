"""core: tables, files, log, progress, processes and shipped names."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pumice.core import progress as progress_module
from pumice.core import shipped as shipped_module
from pumice.core.distributed import is_main, rank, world_size
from pumice.core.errors import DataError, PumiceError
from pumice.core.files import (
    JsonlWriter,
    read_json,
    read_jsonl,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from pumice.core.log import get_logger, setup_logging
from pumice.core.progress import progress
from pumice.core.registry import Registry, suggest


def test_core_needs_neither_torch_nor_transformers() -> None:
    modules = [path.stem for path in Path(shipped_module.__file__).parent.glob("*.py")]
    lines = "; ".join(f"import pumice.core.{name}" for name in modules if name != "__init__")
    heavy = "{'torch', 'transformers', 'rich'} & {name.split('.')[0] for name in sys.modules}"
    code = f"import sys; {lines}; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


# Tables


def test_registry_gives_parts_and_explains_unknown_names() -> None:
    table = Registry("connector", {"linear": 1, "mlp2x_gelu": 2})
    assert table["linear"] == 1
    assert "mlp2x_gelu" in table and "qformer" not in table
    assert table.names() == ("linear", "mlp2x_gelu") == tuple(table)
    with pytest.raises(PumiceError) as caught:
        table["mlp2x_gellu"]
    message = str(caught.value)
    assert "connector 'mlp2x_gellu' is unknown" in message
    assert "known: linear, mlp2x_gelu." in message
    assert message.endswith("Did you mean 'mlp2x_gelu'?")


def test_registry_does_not_change_with_the_dict_it_was_built_from() -> None:
    parts = {"a": 1}
    table = Registry("part", parts)
    parts["b"] = 2
    assert table.names() == ("a",)


@pytest.mark.parametrize(
    ("given", "expected"), [("PAD", " Did you mean 'pad'?"), ("zzz", ""), ("", "")]
)
def test_suggest(given: str, expected: str) -> None:
    assert suggest(given, ["pad", "crop"]) == expected


# Files


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"text": "Käse 猫", "n": [1, 2.5, None]}
    write_json(tmp_path / "new" / "a.json", value)
    assert read_json(tmp_path / "new" / "a.json") == value
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_json_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_broken_json_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert f"{path}, line 2, column 6" in str(caught.value)
    assert "Correct this line" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_unreadable_json_names_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "Check the path" in str(caught.value)


def test_jsonl_rows_carry_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": }', "column 7"),
        (b'{"a": 1', "column 8"),
        (b"[1, 2]", "given list"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError) as caught:
        next(rows)
    message = str(caught.value)
    assert f"{path}, line 2" in message and expected in message
    assert "again" in message


def test_a_line_cut_by_a_crash_is_left_out_only_on_demand_and_never_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with pytest.raises(DataError, match="line 2"):
        list(read_jsonl(path))
    with caplog.at_level(logging.WARNING, "pumice"):
        assert list(read_jsonl(path, allow_cut_tail=True)) == [(1, {"a": 1})]
    assert "line 2 was cut short" in caplog.text
    path.write_text('{"a": 1\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 1"):
        list(read_jsonl(path, allow_cut_tail=True))


@pytest.mark.parametrize("tail", ['{"a": 2', '{"a": 2}'])
def test_writing_goes_on_after_a_crash(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + tail)
    with JsonlWriter(path) as writer:
        writer.write({"a": 3})
    whole = [{"a": 1}, {"a": 2}, {"a": 3}] if tail.endswith("}") else [{"a": 1}, {"a": 3}]
    assert [row for _, row in read_jsonl(path)] == whole


def test_a_cut_only_line_is_removed_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a"')
    with JsonlWriter(path) as writer:
        writer.write({"a": 1})
    assert path.read_text() == '{"a": 1}\n'


def test_every_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    with JsonlWriter(path) as writer:
        for n in range(3):
            writer.write({"n": n, "text": "é"})
            assert len(path.read_text("utf-8").splitlines()) == n + 1


def test_a_failed_atomic_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="/dev/full"), JsonlWriter("/dev/full") as writer:
        writer.write({"step": 1})


def test_an_atomic_write_keeps_links_and_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    write_atomic(link, "text")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "text"
    assert (tmp_path / "target").stat().st_mode == plain.stat().st_mode


def test_hashes(tmp_path: Path) -> None:
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "a") == known
    with pytest.raises(DataError, match="does not exist"):
        sha256_file(tmp_path / "b")


# Log and progress


def test_log_lines_go_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("pumice")
    before = (list(logger.handlers), logger.level)
    try:
        setup_logging(0)
        setup_logging(0)
        get_logger("pumice.core.images").info("a note")
        get_logger("elsewhere").debug("too fine")
        out, err = capsys.readouterr()
    finally:
        logger.handlers[:], logger.level = before
        logger.setLevel(before[1])
    assert out == "" and err == "INFO a note\n"


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress(40, "align") as bar:
        for step in range(40):
            now[0] += 1.0
            bar.update(loss=2.0 - step / 40)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 4
    assert lines[0] == "align: 10/40 (25 %), 1/s, 0:10 gone, 0:30 left, loss 1.775"
    assert lines[-1].startswith("align: 40/40 (100 %)") and "left" not in lines[-1]


def test_progress_tells_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress(None, "tune") as bar:
        bar.update(7)
        raise KeyError
    assert capsys.readouterr().err.startswith("tune: 7, ")


def test_only_the_main_process_shows_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress(1, "align") as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_the_bar_on_a_terminal_leaves_stdout_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(2, "[align]") as bar:
        bar.update(loss=1.5)
        bar.update()
    out, err = capsys.readouterr()
    assert out == "" and "[align]" in err and "2/2" in err and "loss 1.5" in err


# Processes


def test_one_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_main()) == (3, 4, False)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(PumiceError, match="RANK is 'one'"):
        rank()


# Shipped names


def test_names_and_directories_become_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shipped_module, "SHIPPED_DIR", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PumiceError, match="missing from this installation"):
        shipped_module.resolve_model("pocket")
    assert shipped_module.shipped("pocket") is None
    for name in ("pocket", "pocket-vision"):
        (tmp_path / "shipped" / name).mkdir(parents=True)
    assert shipped_module.shipped("pocket") == tmp_path / "shipped" / "pocket"
    assert shipped_module.shipped("../shipped/pocket") is None
    assert shipped_module.resolve_model("pocket") == tmp_path / "shipped" / "pocket"
    assert shipped_module.resolve_backbone("pocket-vision").name == "pocket-vision"
    assert shipped_module.resolve_backbone(str(tmp_path)) == tmp_path
    (tmp_path / "pocket").mkdir()
    with caplog.at_level(logging.INFO, "pumice"):
        assert shipped_module.resolve_model("pocket") == Path("pocket")
    assert "not the shipped model" in caplog.text


def test_an_unknown_model_lists_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(PumiceError) as caught:
        shipped_module.resolve_model("pockett")
    for part in ("'pockett' is unknown", "a directory that exists", "Did you mean 'pocket'?"):
        assert part in str(caught.value)
    file = tmp_path / "model.safetensors"
    file.write_text(json.dumps({}))
    with pytest.raises(PumiceError, match="is a file, not a directory"):
        shipped_module.resolve_model(file)
