"""Who may talk to a Ray cluster: asks a cluster whether it wants a token, and keeps the token file private."""

import ipaddress
import os
import secrets
from pathlib import Path
from typing import Literal

from qlora_ray.errors import ConfigError
from qlora_ray.libraries import Patch

Answer = Literal["open", "asks for a token", "takes ours", "no answer"]
ASK_SECONDS = 5.0
HARMLESS_QUESTION = Patch(
    "ray", "2.60.0", "asks a head CheckAlive by gRPC, which needs no arguments (ray/protobuf/gcs_service.proto)",
    gains="whether a cluster wants a token is known before anything is sent there",
    delete_when="Ray offers a question that needs no connection",
)  # fmt: skip
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def check_cluster(address: str, allow_unauthenticated: bool) -> None:
    """Refuse a cluster that others could command, before anything is sent there. Raises ConfigError.

    A Ray without token authentication runs what anyone sends who reaches its ports (CVE-2023-48022).
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ConfigError(
            f"ray.address={address}: must be host:port of a cluster's head, or auto on one of its nodes. From outside "
            "use `ray job submit` (docs/cluster.md); the dashboard's URL belongs in RAY_API_SERVER_ADDRESS."
        )
    answer = ask(address, token())
    if answer == "no answer":
        raise ConfigError(f"ray.address={address}: no Ray cluster answers there within {ASK_SECONDS:g} s.")
    if answer == "asks for a token":
        raise ConfigError(
            f"ray.address={address}: the cluster asks for a token, and this machine's was not taken. Copy the head's "
            "token (`ray get-auth-token` there) to ~/.ray/auth_token, mode 0600, and set RAY_AUTH_MODE=token."
        )
    if answer == "open" and not allow_unauthenticated and not is_loopback(host.strip("[]")):
        raise ConfigError(
            f"ray.address={address}: the cluster takes commands without a token, from anyone who reaches its ports. "
            "Start it with RAY_AUTH_MODE=token (clusters/README.md), or, if its network is closed, set "
            "ray.allow_unauthenticated=true."
        )


def ask(address: str, our_token: str | None, seconds: float = ASK_SECONDS) -> Answer:
    """What the cluster at host:port says to a harmless question, first without a token, then with ours."""
    first = _ask(address, (), seconds)
    if first != "asks for a token" or our_token is None or not uses_token():
        return first
    return "takes ours" if _ask(address, (("authorization", f"Bearer {our_token}"),), seconds) == "open" else first


def _ask(address: str, metadata: tuple, seconds: float) -> Answer:
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            return "asks for a token" if error.code() == grpc.StatusCode.UNAUTHENTICATED else "no answer"
    return "open"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def uses_token() -> bool:
    """Whether this process sends its token to Ray."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token() -> str | None:
    """This machine's token, where Ray looks for it; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = token_path()
    return path.read_text().strip() or None if path.is_file() else None


def token_path() -> Path:
    """The file that holds the token: $RAY_AUTH_TOKEN_PATH, else where Ray looks."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


def keep_token_private() -> None:
    """Make the token file before Ray would, which makes it readable by all; close one that is open to others.

    Raises ConfigError where a file that others can read is not ours to close.
    """
    path = token_path()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        close_to_others(path)
        return
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path}: cannot be made: {error.strerror}.") from None
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def close_to_others(path: Path) -> None:
    """Take the rights of group and others from the token file. Raises ConfigError where that is not ours to do."""
    if path.stat().st_mode & 0o077:
        try:
            path.chmod(0o600)
        except PermissionError:
            raise ConfigError(f"{path}: others can read Ray's token. Its owner must run: chmod 600 {path}") from None
