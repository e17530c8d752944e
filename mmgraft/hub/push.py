"""Put a graft on the Hub: one commit with what belongs to it, or nothing.

What the Hub's client raises becomes an error that says what to do next.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.atomic import atomic_text
from mmgraft.errors import MMGraftError, UsageError, first_line
from mmgraft.evaluation.report.about_run import settings_without_folders, without_folders
from mmgraft.frozen import Frozen
from mmgraft.hub.card import card_of, confirm_references, has_own_readme, is_repo_id, make_portable
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile
from mmgraft.progress import working
from mmgraft.runs.contents import README, RECIPE, UploadFile, belonging, folder_named, managed
from mmgraft.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


LOGIN = "log in with `hf auth login` (the token needs write access), or set HF_TOKEN"


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """While the block lasts, raise :class:`MMGraftError` where the Hub's client raises its own.

    Args:
        doing: What is being done, for the message: "pushing to me/x".

    Raises:
        UsageError: No or a refused token, no right to write, offline mode, a card that the Hub
            cannot read.
        MMGraftError: Everything else, foremost a network that went away.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except MMGraftError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise _refused(doing, error) from error
    except Exception as error:  # httpx, Xet and plain RuntimeErrors: all mean that it did not work
        if isinstance(error, ValueError) and README in str(error):
            raise UsageError(f"the Hub refuses {README}: {error}; mend its front matter") from error
        raise MMGraftError(
            f"{doing} failed: {first_line(error)}\nYour files are whole and the repository has "
            "its previous commit. Check the network and run the same command again."
        ) from error


def _refused(doing: str, error: Any) -> MMGraftError:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        return UsageError(f"the Hub refuses the token ({first_line(error)}); {LOGIN}")
    if status == 403:
        return UsageError(
            f"{doing} is not allowed with this token: {first_line(error)}\n"
            "Push under your own name, or take a token with write access: "
            "https://huggingface.co/settings/tokens"
        )
    again = "somebody pushed at the same time" if status == 412 else first_line(error)
    return MMGraftError(
        f"{doing} failed: {again}\nYour files are whole and the repository has its previous "
        "commit. Run the same command again."
    )


_NOT_A_MODEL = (".gitattributes", README)


class PushPlan(Frozen):
    """Files of a push, listed without any network.

    Attributes:
        run: The run folder.
        record: ``graft_config.json`` as the repository will have it.
        files: Everything but the card.
        own_readme: True where the run's README.md is the user's own; it is then sent as it is.
        warnings: Sentences that the user should read before agreeing.
        license: Identifier for the card.
        named: Hub ids that the user gave for base or tower; they must exist.
    """

    run: Path
    record: GraftFile
    files: list[UploadFile]
    own_readme: bool
    warnings: list[str] = field(default_factory=list)
    license: str | None = None
    named: tuple[str, ...] = ()

    def all_files(self, repo_id: str) -> list[UploadFile]:
        """Return every file with its size, the card written for ``repo_id``."""
        config = UploadFile(CONFIG_NAME, self.record.dump().encode())
        readme = UploadFile(README, self.run / README)
        if not self.own_readme:
            readme = UploadFile(README, self.card(repo_id).encode())
        return sorted([config, readme, *self.files], key=lambda file: file.name)

    def card(self, repo_id: str) -> str:
        """Return the model card for ``repo_id``."""
        names = [file.name for file in self.files]
        return card_of(self.run, self.record, repo_id, names, self.license)


class Target(Frozen):
    """The repository to push to, as the Hub has it now.

    Attributes:
        repo_id: ``owner/name``.
        revision: Its newest commit; None where there is no such repository yet.
        private: True where it is private already.
        stale: Its files from an earlier push that the plan no longer has.
        record: The plan's record, with the commit of a base or tower that was named by the user.
        warnings: Sentences about the Hub's base and tower.
    """

    api: "HfApi" = field(repr=False)
    repo_id: str
    revision: str | None
    private: bool
    stale: list[str]
    record: GraftFile
    warnings: list[str]


def plan_push(
    run: Path, base_id: str | None = None, vision_id: str | None = None, license: str | None = None
) -> PushPlan:
    """Check a run folder and list what a push would send. Touches no network.

    Raises:
        UsageError: No graft, a damaged one, or one whose base others cannot get.
    """
    portable = make_portable(GraftFile.read(run), run, base_id, vision_id)
    record = portable.record
    projector = settings_without_folders(record.projector.model_dump())
    update = {
        "recipe": settings_without_folders(record.recipe),
        "projector": record.projector.model_copy(update=projector),
    }
    record = record.model_copy(update=update)
    files = [_without_folders(file) for file in belonging(run, portable.folders)]
    own = has_own_readme(run)
    warnings = list(_doubts(own, files))
    named = tuple(name for name in (base_id, vision_id) if name is not None)
    return PushPlan(run, record, files, own, warnings, license, named)


def find_target(plan: PushPlan, repo_id: str | None = None, private: bool = False) -> Target:
    """Find the repository to push to, and what it holds already. Changes nothing.

    Raises:
        UsageError: No token or a refused one; a name that cannot be; a repository that holds
            something else than a graft, or is public where a private one was asked for.
        MMGraftError: The network failed.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise UsageError(f"there is no Hub token; {LOGIN}")
    api = HfApi(library_name="mmgraft", library_version=__version__)
    with hub_errors("asking the Hub"):
        if repo_id is None or "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id or default_name(plan.run)}"
        if not is_repo_id(repo_id):
            raise UsageError(
                f"{repo_id!r} cannot be the name of a repository; give one with --repo-id, of "
                "letters, digits, '-', '_' and '.'"
            )
        try:
            info: Any = api.model_info(repo_id)
        except RepositoryNotFoundError:
            info = None
        record, warnings = confirm_references(plan.record, api, plan.named)
    if info is None:
        return Target(api, repo_id, None, private, [], record, warnings)
    there = [sibling.rfilename for sibling in info.siblings or []]
    _check_holds_graft(repo_id, there)
    if private and not info.private:
        raise UsageError(
            f"{repo_id} exists and is public, so --private cannot hide what is pushed there; make "
            "it private in its settings on the Hub, or push under another name"
        )
    new = {file.name for file in plan.all_files(repo_id)}
    stale = [name for name in there if managed(name) and name not in new]
    return Target(api, repo_id, info.sha, bool(info.private), stale, record, warnings)


def send(plan: PushPlan, target: Target, private: bool = False) -> str:
    """Make the repository where there is none, and commit everything at once.

    Returns:
        The address of the repository.

    Raises:
        UsageError: The token may not write there.
        MMGraftError: The network failed; the repository keeps its previous commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    plan = replace(plan, record=target.record)
    files = plan.all_files(target.repo_id)
    what = f"pushing to {target.repo_id}"
    with hub_errors(what), working(what, bar=False):  # the Hub's client has its own
        if target.revision is None:
            target.api.create_repo(target.repo_id, private=private, exist_ok=True)
        target.api.create_commit(
            target.repo_id,
            [
                *(CommitOperationDelete(name) for name in target.stale),
                *(CommitOperationAdd(file.name, file.content) for file in files),
            ],
            commit_message=f"Push a {plan.record.method} graft with mmgraft {__version__}",
            parent_commit=target.revision,
        )
    if not plan.own_readme:
        _write_card(plan.run / README, files)
    return f"{target.api.endpoint}/{target.repo_id}"


def default_name(run: Path) -> str:
    """Return the repository's name where none was given: the folder's."""
    return run.resolve().name


def _without_folders(file: UploadFile) -> UploadFile:
    """Return the recipe as it is pushed: folders of this machine are nobody's business."""
    if file.name != RECIPE or not isinstance(file.content, Path):
        return file
    text = file.content.read_text(encoding="utf-8")
    shown = without_folders(text)
    return file if shown == text else UploadFile(RECIPE, shown.encode())


def _doubts(own: bool, files: list[UploadFile]) -> Iterator[str]:
    """Yield what the user should know of a README of their own, and of folders named in files."""
    if own:
        yield f"{README} is your own, without mmgraft's marker line: it is pushed as it is"
    found = {file.name: path for file in files if (path := folder_named(file)) is not None}
    if found:
        name, path = next(iter(found.items()))
        more = f" (and so do {len(found) - 1} more files)" if len(found) > 1 else ""
        yield (
            f"{name} names a folder of this machine, {path}{more}; it will be seen by whoever "
            "sees the repository"
        )


def _check_holds_graft(repo_id: str, there: list[str]) -> None:
    other = [name for name in there if name not in _NOT_A_MODEL and not name.startswith("LICENSE")]
    if other and CONFIG_NAME not in there:
        raise UsageError(
            f"{repo_id} exists and holds something else than a graft ({other[0]}); "
            "give another name with --repo-id"
        )


def _write_card(path: Path, files: list[UploadFile]) -> None:
    """Keep the card beside the graft, for its owner to take over. A read-only run does without."""
    content = next(file.content for file in files if file.name == README)
    assert isinstance(content, bytes)
    with suppress(MMGraftError):
        atomic_text(path, content.decode())
