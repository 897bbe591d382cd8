"""How a worker goes: what it has made is kept on the server's disk, and nobody there waits for it any more."""

import threading
from collections.abc import Callable

from forgather.diloco.membership import Membership
from forgather.errors import ForgatherError

_POLL_S = 0.2


def let_server_save(membership: Membership, is_stopping: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Have the server write down what this worker has brought, which this one will not be there to bring again.

    No longer than one request may take, and not when it `is_stopping`. What cannot be had is said, and no error.
    """
    client = membership.borrow()
    failures: list[ForgatherError] = []

    def ask() -> None:
        try:
            client.save()
        except ForgatherError as error:
            failures.append(error)

    thread = threading.Thread(target=ask, name="diloco save", daemon=True)
    thread.start()
    while thread.is_alive() and not is_stopping():
        thread.join(_POLL_S)
    is_done = not thread.is_alive()
    client.abort()
    if not is_done or failures:
        cause = failures[0].message if failures else "this run was told to stop"
        say(
            "note: the server has all that this run has made, and may not have saved it yet "
            f"({cause}); if it is killed before it does, start it again, and then this command"
        )
    thread.join(_POLL_S)
    membership.give_back(client)


def take_leave(membership: Membership, say: Callable[[str], None]) -> None:
    """Tell the server that nobody needs to wait for this worker."""
    client = membership.borrow()
    try:
        client.leave()
    except ForgatherError as error:
        # Its lease runs out by itself; the run has its own end, which is not to be this.
        say(f"note: could not take leave of the server: {error.message}")
    finally:
        client.close()
