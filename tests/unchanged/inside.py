"""All that the recordings lean on of mmgraft's inside: a module that moves is renamed here alone.

The rest goes through the command line and through what `import mmgraft` gives. The helpers of
tests/support (ranks, hub_fixtures, tiny_towers) have imports of their own.
"""

from mmgraft.cli.app import run as command_line
from mmgraft.data.chat.labels import supervise
from mmgraft.data.chat.processor import GraftProcessor

__all__ = ["GraftProcessor", "command_line", "supervise"]
