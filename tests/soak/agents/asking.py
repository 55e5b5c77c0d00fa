"""Does what it is told, as the user whose process this is. Each line on stdin is an order, answered by a line of JSON.

``sockets``: connect to these from now on. ``rows`` [path, query]: the first row of what the state file there answers.
``ask`` [method, path, body]: status and body. ``execute`` [ref, code]: how a command ended that ends with that code.
``greeting`` port: what the server there says. Where the daemon went away within a request, its answer is ``lost``.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from typing import Any

from tests.soak.agents.client import Client, GoneError, NetnsdError, greeting


def main() -> None:
    """Run as a program."""
    client: Client | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if "sockets" in order:
            if client is not None:
                client.close()
            client = Client(*order["sockets"])
            answer: dict[str, Any] = {}
        elif "rows" in order:
            with closing(sqlite3.connect(order["rows"][0], timeout=5)) as state:
                answer = {"row": state.execute(order["rows"][1]).fetchone()}
        else:
            assert client is not None
            answer = _answer(client, order)
        print(json.dumps(answer), flush=True)


def _answer(client: Client, order: dict[str, Any]) -> dict[str, Any]:
    try:
        if "ask" in order:
            status, code, body = client.ask(*order["ask"])
            return {"status": status, "body": {"error": body} if code else body}
        if "execute" in order:
            ref, code = order["execute"]
            return {"ended": client.execute(ref, ["/bin/sh", "-c", f"exit {code}"])[0]}
        return {"said": greeting(order["greeting"])}
    except NetnsdError as error:
        return {"ended": error.code}
    except GoneError as error:
        return {"lost": str(error)}


if __name__ == "__main__":
    main()
