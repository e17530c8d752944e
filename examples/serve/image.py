"""Ask a server of ``mmgraft serve`` about an image.

python examples/serve/image.py http://127.0.0.1:8000/v1 mm cat.png "What is this?"
"""

from __future__ import annotations

import base64
import mimetypes
import os
import sys
from pathlib import Path

from openai import OpenAI


def ask(address: str, model: str, image: str, question: str) -> str:
    """Return the answer of one workflow."""
    client = OpenAI(base_url=address, api_key=os.environ.get("MMGRAFT_API_KEY", "none"))
    kind = mimetypes.guess_type(image)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        temperature=0,
        max_tokens=256,
    )
    return answer.choices[0].message.content or ""


if __name__ == "__main__":
    print(ask(*sys.argv[1:5]))
