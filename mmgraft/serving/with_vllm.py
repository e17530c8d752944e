"""Start vLLM with an export of the grafts, where it and the plugin ``mmgraft-vllm`` take them."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmgraft.errors import UsageError
from mmgraft.export.folder import check_folder, default_folder
from mmgraft.export.vllm import export_vllm, serve_command
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import graft_folder
from mmgraft.progress import say
from mmgraft.serving.requests import Allowed

_HERE_ALONE = (
    "no_vllm", "show_reasoning", "device", "quantization", "template_option", "revision"
)  # fmt: skip


def start_vllm(
    runs: Sequence[str],
    address: tuple[str, int],
    allowed: Allowed,
    key: str | None,
    cors: bool,
    options: Mapping[str, Any],
) -> str | None:
    """Export the grafts, and put vLLM's server in the place of this process.

    Args:
        runs: Folders or Hub ids of grafts.
        address: Host and port.
        allowed: Images beside data URLs.
        key: What clients must send.
        cors: Let pages of other origins ask.
        options: Others of ``mmgraft serve``; a dry run says the command and starts nothing.

    Returns:
        The reason why vLLM does not serve them; None after a dry run.
    """
    folders = [graft_folder(run) for run in runs]
    try:
        further = shlex.split(options["vllm_options"])
    except ValueError as error:
        raise UsageError(f"--vllm-options: {error}; close every quote") from error
    if missing := [name for name in ("vllm", "mmgraft_vllm") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    for name in _HERE_ALONE:
        if options[name]:
            return f"--{name.replace('_', '-')}"
    out = check_folder(default_folder(folders[0], "vllm"), folders[0], force=True)
    try:
        export_vllm(folders, out, options["base"], options["dtype"], options["dry_run"])
    except UsageError as error:
        return str(error)
    command = serve_command(out, [GraftFile.read(folder) for folder in folders])
    command += ["--host", address[0], "--port", str(address[1])]
    command += ["--allowed-origins", json.dumps(["*"] if cors else [])]
    command += ["--dtype", options["dtype"]] if options["dtype"] else []
    command += ["--allowed-local-media-path", str(allowed.files)] if allowed.files else []
    command += further
    say(shlex.join(command))
    if options["dry_run"]:
        return None
    schemes = ["http", "https"] * allowed.urls + ["file"] * (allowed.files is not None)
    own = {"VLLM_API_KEY": key or "", "MMGRAFT_ALLOWED": ",".join(schemes)}
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]
    os.execve(sys.executable, program, {**os.environ, **own})
