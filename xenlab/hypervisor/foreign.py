"""Domains that a hypercall names: itself, or another one (paper 2.3).

The invariant: only the control domain may act on another domain.  What breaks without it: any guest maps
any memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenlab.abi.numbers import DOMID_IO, DOMID_SELF, DOMID_XEN, Errno
from xenlab.errors import HypercallError
from xenlab.hypervisor.domain import Domain


def named_domain(domains: Mapping[int, Domain], caller: Domain, domid: int) -> Domain:
    """The domain that ``caller`` names by ``domid``.

    Raises:
        HypercallError: ESRCH where there is none, or where it names itself by number; EPERM where it may not.
    """
    if domid == DOMID_SELF:
        return caller
    if domid in (DOMID_IO, DOMID_XEN):
        # There are no devices to map, and nothing of the hypervisor's that anybody may.
        raise HypercallError(Errno.EPERM)
    found = domains.get(domid)
    if found is None or found is caller:
        raise HypercallError(Errno.ESRCH)
    if not caller.privileged:
        raise HypercallError(Errno.EPERM)
    return found
