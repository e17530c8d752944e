"""Ask every workflow of a server of ``mmgraft serve`` the same about an image.

python examples/serve/workflows.py http://127.0.0.1:8000/v1 cat.png "What is this?"
"""

from __future__ import annotations

import os
import sys

from image import ask
from openai import BadRequestError, OpenAI


def ask_all(address: str, image: str, question: str) -> None:
    """Print a line for each model; the base alone says that it sees no images."""
    client = OpenAI(base_url=address, api_key=os.environ.get("MMGRAFT_API_KEY", "none"))
    for model in client.models.list():
        try:
            print(f"{model.id}: {ask(address, model.id, image, question)}")
        except BadRequestError as error:
            print(f"{model.id}: refused, {error.message}")


if __name__ == "__main__":
    ask_all(*sys.argv[1:4])
