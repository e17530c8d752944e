"""Ask a server of ``mmgraft serve`` a question, and print the answer as it comes.

python examples/serve/stream.py http://127.0.0.1:8000/v1 smollm2-135m-instruct "Why is it?"
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def stream(address: str, model: str, question: str) -> None:
    """Print the pieces of an answer."""
    client = OpenAI(base_url=address, api_key=os.environ.get("MMGRAFT_API_KEY", "none"))
    pieces = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=256,
        stream=True,
    )
    for piece in pieces:
        print(piece.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    stream(*sys.argv[1:4])
