"""IP addresses and host names as they are written in configuration files."""

import ipaddress
import re

HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")
LOOPBACK_NAMES = ("localhost", "ip6-localhost", "localhost.localdomain")


def as_ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the IP address that a text stands for (an IPv4-mapped one as IPv4), or None if it is not one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def is_address(text: str) -> bool:
    """Returns whether a text is an IP address or a possible host name."""
    is_host_name = HOST_NAME.fullmatch(text) and not re.fullmatch(r"[0-9.]+", text)  # 999.1.1.1 is no name
    return bool(as_ip(text) or is_host_name)


def normalized(address: str) -> str:
    """Returns an address in a form in which two equal addresses are the same text."""
    ip = as_ip(address)
    return str(ip) if ip else address.lower().rstrip(".")


def is_loopback(address: str) -> bool:
    """Returns whether an address reaches only the machine that uses it."""
    ip = as_ip(address)
    return ip.is_loopback if ip else normalized(address) in LOOPBACK_NAMES


def is_valid_port(port: int) -> bool:
    """Returns whether a number can be a TCP or UDP port."""
    return 0 < port < 1 << 16


def bracketed(address: str) -> str:
    """Returns an address as it is written in a URL: an IPv6 address in brackets."""
    return f"[{address}]" if ":" in address else address
