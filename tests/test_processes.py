"""Processes that this program starts."""

from __future__ import annotations

import subprocess

from fastambient.processes import python_command


def test_a_file_of_the_user_s_is_not_run_in_place_of_a_module(tmp_path):
    """A folder of somebody's work may hold an argparse.py; it is no part of this program."""
    for name in ("argparse", "csv", "html"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody wrote this')")
    command = python_command("fastambient.sweep.cell", str(tmp_path / "absent"), "2", "cpu", "pixel")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "absent" in done.stderr, done.stderr
    assert "somebody" not in done.stderr + done.stdout
