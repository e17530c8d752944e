"""Files whose layout or content has changed on purpose since the recording."""

CHANGED_FILES: dict[str, str] = {
    "*README.md": "a model card's words changed",
    "*recipe.used.yaml": "keys of a stage that only one method has stand in its stages alone",
    "*graft_config.json": "the recipe in it likewise; settings of wings-official left wings",
}
"""The reason, by the file's name as fnmatch reads it: `checkpoints/*/losses.json`.

Such a file is not compared. When everything is recorded anew this is emptied.
"""
