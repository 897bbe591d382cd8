"""Where the text of a command goes: to stdout, to the file of `-o`, and with `-e` to an editor."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from forgather.cli.parser import UsageError


class Output:
    """Takes lines; stdout shows them as they come, a file has them once `close` is called.

    `edit` opens that file, or a temporary one that is kept, in $VISUAL, $EDITOR or vi. What would stop it later is
    raised when it is made, before the work whose output it takes: a folder that is not there, an editor that is not
    installed, no terminal to edit in.
    """

    def __init__(self, file: str | None, *, edit: bool, name: str) -> None:
        self.editor = _editor() if edit else None
        self.file = None if file is None else Path(file)
        self.lines: list[str] = []
        self.name = name
        if self.file is not None:
            _require_writable(self.file)

    def write(self, text: str) -> None:
        """Take text of whole lines, without the last line's end."""
        if self.file is None and self.editor is None:
            print(text, flush=True)
        else:
            self.lines.append(text)

    def close(self) -> None:
        """Write the file and open the editor, whichever were asked for."""
        if self.file is None and self.editor is None:
            return
        path = self.file or Path(tempfile.mkdtemp(prefix="forgather-")) / f"{self.name}.txt"
        try:
            path.write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error.strerror or "no reason given") from error
        print(f"output: {path}", file=sys.stderr)
        if self.editor is not None:
            done = subprocess.run([*self.editor, str(path)], check=False)
            if done.returncode != 0:
                editor = shlex.join(self.editor)
                raise UsageError(
                    f"--edit: {editor} ended with exit code {done.returncode}; the output is in {path}",
                    fix="set VISUAL or EDITOR to an editor that works here",
                )


def _editor() -> list[str]:
    """The editor and its arguments."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "--edit opens an editor, and there is no terminal to show it in", fix="write to a file instead: -o FILE"
        )
    variable = next((name for name in ("VISUAL", "EDITOR") if os.environ.get(name, "").strip()), None)
    try:
        words = shlex.split(os.environ[variable]) if variable else ["vi"]
    except ValueError as error:
        raise UsageError(
            f"--edit: {variable} cannot be read: {error}", fix=f"export {variable}='code --wait', say"
        ) from error
    if shutil.which(words[0]) is None:
        said = f"{variable} names {words[0]!r}" if variable else "neither VISUAL nor EDITOR is set, and there is no vi"
        raise UsageError(
            f"--edit: {said}" + (", which is not installed" if variable else ""),
            fix=f"export {variable or 'EDITOR'}=nano, say",
        )
    return words


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise _unwritable(path, "it is a folder")
    if not path.absolute().parent.is_dir():
        raise _unwritable(path, "its folder is not there")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise _unwritable(path, "permission denied")


def _unwritable(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"--output-file: {path} cannot be written: {reason}",
        fix="name a file in a folder that is there and can be written",
    )
