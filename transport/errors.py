"""What transports raise. Unless a class says otherwise, nothing was applied."""

from __future__ import annotations


class TransportError(Exception):
    """Something a transport was asked for did not happen. Unless a subclass says otherwise, nothing was applied."""


class PeerLostError(TransportError):
    """The other side vanished during the operation; whether it was applied is unknown."""


class UnreachableError(TransportError):
    """The region named by a descriptor can't be reached from here: another host, already gone, or not permitted."""


class DescriptorError(UnreachableError, ValueError):
    """A descriptor is malformed, or names something that no region of this transport can be."""


class NotConnectedError(TransportError):
    """A handle is used that this side never connected or has disconnected."""


class BoundsError(TransportError):
    """An operation's range lies outside its region, or its local address is null; the whole batch was refused."""


class NotWritableError(TransportError):
    """A write to a region that was connected, or can only be opened, for reading."""


class OutOfMemoryError(TransportError):
    """A region can't be backed with memory; nothing of it is left behind."""


class RegionExistsError(TransportError):
    """A live owner holds a region of the same name."""


class UnsupportedError(TransportError):
    """This transport can't do that (see its `capabilities`), or can't be used on this machine; the message says why."""


class TimedOutError(TransportError):
    """The deadline passed. Of a batch: see its status column for what was begun, and with what outcome."""
