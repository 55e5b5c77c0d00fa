"""Every error that netnsd can answer with: one leaf class per condition.

A class has a stable ``code`` (clients branch on it), an HTTP ``status`` and the client's exit code ``exit_code``.
An instance adds a message for people, a hint that says what to do next, and typed details for programs.
Third-party exceptions are translated into these at the adapter that met them.
"""

from __future__ import annotations

import errno as _errno
import os

# typing takes a tenth of the client's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_NOT_FOUND = 4
EXIT_CONFLICT = 5
EXIT_TIMEOUT = 6
EXIT_FORBIDDEN = 7


class NetnsdError(Exception):
    """Base of all errors that reach a user. Never raised itself."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = EXIT_FAILURE

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        # A file name may hold what no encoder takes.
        self.message = message.encode("utf-8", "replace").decode()
        self.hint = hint
        self.details = details


# -- the request ------------------------------------------------------------------------------------------------


class BadRequest(NetnsdError):
    """The bytes are not an HTTP request that we accept. Use a plain HTTP/1.1 client."""

    code, status, exit_code = "bad_request", 400, EXIT_USAGE


class BadJson(NetnsdError):
    """The body is not JSON, names a key twice, or is nested too deep. Send one plain JSON object."""

    code, status, exit_code = "bad_json", 400, EXIT_USAGE


class BodyTooLarge(NetnsdError):
    """The body is larger than the daemon reads. Send less: a command line and its variables fit."""

    code, status, exit_code = "body_too_large", 413, EXIT_USAGE


class RequestTimeout(NetnsdError):
    """The request did not arrive whole in time. Send it again, faster."""

    code, status, exit_code = "request_timeout", 408, EXIT_TIMEOUT


class InvalidRequest(NetnsdError):
    """A field is unknown, missing, or of the wrong type. The message names it."""

    code, status, exit_code = "invalid_request", 422, EXIT_USAGE


class InvalidName(NetnsdError):
    """A name is not a DNS label (RFC 1123, lower case, 1-63 characters). Choose one that is."""

    code, status, exit_code = "invalid_name", 422, EXIT_USAGE


class InvalidPort(NetnsdError):
    """A port is not a number from 1 to 65535, is asked for twice, or is outside the published range."""

    code, status, exit_code = "invalid_port", 422, EXIT_USAGE


class InvalidLabel(NetnsdError):
    """A label is malformed. Write k=v, with letters, digits, '.', '_', '-' and '/' in the key."""

    code, status, exit_code = "invalid_label", 422, EXIT_USAGE


class InvalidVariable(NetnsdError):
    """An environment variable is malformed. Write K=V, no '=' or NUL in the name."""

    code, status, exit_code = "invalid_variable", 422, EXIT_USAGE


class InvalidCommand(NetnsdError):
    """A command, its directory, or its limits cannot be what was sent. The message names the part."""

    code, status, exit_code = "invalid_command", 422, EXIT_USAGE


class InvalidPolicy(NetnsdError):
    """A NetworkPolicy document has something that is wrong, or that cannot be honoured. Details: which field."""

    code, status, exit_code = "invalid_policy", 422, EXIT_USAGE


class NoRoute(NetnsdError):
    """There is nothing at that path. /openapi.json lists what there is."""

    code, status, exit_code = "no_route", 404, EXIT_FAILURE


class MethodNotAllowed(NetnsdError):
    """The path exists, but not with that method. /openapi.json lists what there is."""

    code, status, exit_code = "method_not_allowed", 405, EXIT_FAILURE


# -- authority --------------------------------------------------------------------------------------------------


class Unauthorized(NetnsdError):
    """No token that is good: none, unknown, expired or revoked. Send `Authorization: Bearer TOKEN`."""

    code, status, exit_code = "unauthorized", 401, EXIT_FORBIDDEN


class Forbidden(NetnsdError):
    """The caller may not do that. Ask an admin of netnsd (root, or a member of netnsd-admin)."""

    code, status, exit_code = "forbidden", 403, EXIT_FORBIDDEN


class ForeignRequest(NetnsdError):
    """A web page of elsewhere had a browser send it, or it names another host. Call the API from a program."""

    code, status, exit_code = "foreign_request", 403, EXIT_FORBIDDEN


class NotFound(NetnsdError):
    """The caller has no environment, or no service, of that name or id. `netnsctl ls` lists them."""

    code, status, exit_code = "not_found", 404, EXIT_NOT_FOUND


# -- conflicts and limits ---------------------------------------------------------------------------------------


class NameTaken(NetnsdError):
    """The caller has an environment of that name already. Choose another, remove it, or pass --replace."""

    code, status, exit_code = "name_taken", 409, EXIT_CONFLICT


class NetnsTaken(NetnsdError):
    """Both namespace names that the environment could have exist and are not ours. Choose another name."""

    code, status, exit_code = "netns_taken", 409, EXIT_CONFLICT


class PortTaken(NetnsdError):
    """The published port that was asked for is in use. Ask for another, or for none and get a free one."""

    code, status, exit_code = "port_taken", 409, EXIT_CONFLICT


class IdempotencyConflict(NetnsdError):
    """The Idempotency-Key was sent before, with another request. Each request has a key of its own."""

    code, status, exit_code = "idempotency_conflict", 422, EXIT_CONFLICT


class WrongState(NetnsdError):
    """The environment is not in a state in which that can be done, for example it is being removed."""

    code, status, exit_code = "wrong_state", 409, EXIT_CONFLICT


class PortsExhausted(NetnsdError):
    """Every port of the published range is leased or in use. Remove environments, or widen [ports] range."""

    code, status, exit_code = "ports_exhausted", 503, EXIT_UNAVAILABLE


class AddressesExhausted(NetnsdError):
    """The supernet has no free address. Remove environments, or configure a larger [network] supernet."""

    code, status, exit_code = "addresses_exhausted", 503, EXIT_UNAVAILABLE


class PoliciesExhausted(NetnsdError):
    """The caller has as many policies as one user may have, or all of them come to more than the firewall holds."""

    code, status, exit_code = "policies_exhausted", 503, EXIT_UNAVAILABLE


class Overloaded(NetnsdError):
    """So many creations of the caller's wait already that this one was not taken. Try again after Retry-After."""

    code, status, exit_code = "overloaded", 503, EXIT_UNAVAILABLE


class RateLimited(NetnsdError):
    """More requests by one token, or more wrong tokens from one address, than are answered. Wait for Retry-After."""

    code, status, exit_code = "rate_limited", 429, EXIT_UNAVAILABLE


class TooManyConnections(NetnsdError):
    """The caller has as many connections open as one user may have. Close some."""

    code, status, exit_code = "too_many_connections", 503, EXIT_UNAVAILABLE


class QuotaExceeded(NetnsdError):
    """The caller's quota has no room for that. Details: of what, the limit, what is used, what was asked for."""

    code, status, exit_code = "quota_exceeded", 403, EXIT_FORBIDDEN


class TooManyCreations(NetnsdError):
    """The caller has created as many environments in a minute as its quota allows. Try again after Retry-After."""

    code, status, exit_code = "too_many_creations", 429, EXIT_UNAVAILABLE


class WaitTimeout(NetnsdError):
    """What was waited for did not happen in time. The message says what was seen; nothing was undone."""

    code, status, exit_code = "wait_timeout", 504, EXIT_TIMEOUT


# -- doing it ---------------------------------------------------------------------------------------------------


class LaunchFailed(NetnsdError):
    """A command could not be started. Details: the stage (chdir, setns, ids, exec ...) and the errno's name."""

    code, status, exit_code = "launch_failed", 422, EXIT_FAILURE


class LimitUnavailable(NetnsdError):
    """The host has no controller for a limit that was asked for. Details: which limit. Leave it out, or enable it."""

    code, status, exit_code = "limit_unavailable", 422, EXIT_FAILURE


class KernelError(NetnsdError):
    """The kernel refused a step. Details: the stage and the errno's name. What was made was undone."""

    code, status, exit_code = "kernel_error", 500, EXIT_FAILURE

    @classmethod
    def at(cls, stage: str, error: OSError) -> KernelError:
        """A kernel error for a system call that failed at ``stage``."""
        number = error.errno or 0
        reason = os.strerror(number) if number else str(error)
        return cls(f"{stage}: {reason}", hint="`netnsctl doctor` checks what this host lacks.", stage=stage,
                   errno=_errno.errorcode.get(number, str(number)))


class NetnsLost(NetnsdError):
    """Nothing leads to an environment's namespace any more, neither its name nor its pin: it ends with that."""

    code, status, exit_code = "netns_lost", 500, EXIT_FAILURE


class LauncherUnavailable(NetnsdError):
    """The process that starts servers does not answer; it is being started again. Try again."""

    code, status, exit_code = "launcher_unavailable", 503, EXIT_UNAVAILABLE


class StoreError(NetnsdError):
    """The state file cannot be read or written (disk full, permissions), or is damaged. Nothing was changed."""

    code, status, exit_code = "store_error", 500, EXIT_FAILURE


class ShuttingDown(NetnsdError):
    """The daemon is stopping. Environments stay; try again when it is back."""

    code, status, exit_code = "shutting_down", 503, EXIT_UNAVAILABLE


class InternalError(NetnsdError):
    """A fault in netnsd. The daemon's log has the details under the request's id."""

    code, status, exit_code = "internal", 500, EXIT_FAILURE


# -- the daemon's own start -------------------------------------------------------------------------------------


class NotRoot(NetnsdError):
    """The daemon needs root: it makes namespaces and starts servers as their owners."""

    code, exit_code = "not_root", 77


class ConfigError(NetnsdError):
    """The configuration has an unknown key or a value that cannot be. The message names file and key."""

    code, exit_code = "config_error", 78


class SupernetConflict(NetnsdError):
    """The supernet overlaps a route of the host. Configure another [network] supernet."""

    code, exit_code = "supernet_conflict", 78


class HostUnfit(NetnsdError):
    """The kernel or the host lacks something. The message names it and the package that brings it."""

    code, exit_code = "host_unfit", 69


class AlreadyRunning(NetnsdError):
    """Another netnsd uses this state directory."""

    code, exit_code = "already_running", 75


# -- the client's own -------------------------------------------------------------------------------------------


class DaemonUnreachable(NetnsdError):
    """No daemon answers at the socket. Start it (systemctl start netnsd), or name its socket in NETNSD_SOCKET."""

    code, exit_code = "daemon_unreachable", EXIT_UNAVAILABLE


class SocketForbidden(NetnsdError):
    """The caller may not open the socket. Join the socket's group and log in again."""

    code, exit_code = "socket_forbidden", EXIT_FORBIDDEN


class BadAnswer(NetnsdError):
    """What answered is not a netnsd, or of a version that speaks otherwise."""

    code, exit_code = "bad_answer", EXIT_UNAVAILABLE
